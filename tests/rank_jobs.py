"""What every rank does in the tests of real engines: run as ``rank_jobs.py ENGINE JOB``, under mpiexec for "mpi"."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from gglspeedup import CSRGraph, GPUSampler, __version__
from gglspeedup.distributed import (
    DistFeature,
    DistHistory,
    DistSampler,
    GraphPart,
    MpiCommunicator,
    PartBook,
    RankError,
    TorchCommunicator,
    mpi,
    partition_to_disk,
)

NODES, RANKS = 400, 3
SIZES = [4, 40]
TIMEOUT = 6.0


def graph(seed: int = 0) -> CSRGraph:
    rng = np.random.default_rng(seed)
    degree = rng.integers(0, 20, NODES)
    degree[0] = 2000
    return CSRGraph(np.concatenate([[0], np.cumsum(degree)]), rng.integers(0, NODES, degree.sum()))


def bits(batch) -> list[object]:
    arrays = [batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]
    return [*(array.tobytes() for array in arrays), [adj.size for adj in batch.adjs], batch.batch, batch.batch_size]


def sampler_of(communicator, *, seed: int = 5, of_graph: int = 0) -> DistSampler:
    book = PartBook.from_owners(np.random.default_rng(1).integers(0, communicator.size, NODES), communicator.size)
    return DistSampler(GraphPart.of(graph(of_graph), book, communicator.rank), communicator, SIZES, seed=seed)


def whole(communicator) -> None:
    """Sampling, features, and histories, against what one process has."""
    sampler, rank = sampler_of(communicator), communicator.rank
    reference = GPUSampler("cpu", graph(), SIZES, seed=5)
    rng = np.random.default_rng(rank)
    x = np.random.default_rng(2).random((NODES, 5)).astype(np.float32)
    mine = sampler.book.nodes_of(rank)
    features = DistFeature(sampler.part, communicator, x[mine], cache="400", sampler=sampler, seeds=mine[:50])
    histories = DistHistory(sampler.part, communicator, [5])
    expected = np.zeros_like(x)
    for turn in range(6):
        batch = sampler.sample(rng.permutation(NODES)[: rng.integers(0, 50) * (turn != rank)])
        assert bits(batch) == bits(reference.sample(batch.seeds, batch=batch.batch))
        assert features[batch.n_id].tobytes() == x[batch.n_id].tobytes()
        histories[0].push(x[batch.seeds] + turn, batch.seeds)
        pushed = communicator.gather_all(batch.seeds.tobytes())
        for seeds in (np.frombuffer(message, np.int64) for message in pushed):
            expected[seeds] = x[seeds] + turn
        np.testing.assert_array_equal(histories[0].pull(batch.n_id), expected[batch.n_id])
    several = sampler.sample_many([(np.arange(rank, rank + 20), number) for number in range(rank + 1)])
    for batch in several:
        assert bits(batch) == bits(reference.sample(batch.seeds, batch=batch.batch))


def in_pieces(communicator) -> None:
    """As `whole`, with messages that are longer than one can be."""
    mpi._PIECE = 40
    whole(communicator)


def cut_short(communicator) -> None:
    """The file of rank 1's part has lost its end."""
    if communicator.rank == 0:
        partition_to_disk(graph(), "parts", communicator.size, progress=False)
        largest = max(Path("parts/part-00001").iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 8)
    communicator.gather_all(b"the parts are there")
    DistSampler(GraphPart.load("parts", communicator.rank), communicator, SIZES)


def bad_seeds(communicator) -> None:
    """Rank 1 passes seeds that nobody can sample; all say so, and go on."""
    sampler = sampler_of(communicator)
    for bad, error in ([3, 3], ValueError), ([NODES], IndexError), ([0.5], TypeError):
        try:
            sampler.sample(bad if communicator.rank == 1 else [1, 2])
        except RankError as told:
            assert communicator.rank != 1 and "rank 1 failed" in str(told)
        except error:
            assert communicator.rank == 1
        else:
            raise AssertionError("nobody has said anything")
    assert len(sampler.sample([1, 2], batch=0).seeds) == 2


def other_seed(communicator) -> None:
    sampler_of(communicator, seed=6 if communicator.rank == 1 else 5)


def other_graph(communicator) -> None:
    sampler_of(communicator, of_graph=communicator.rank == 1)


def other_version(communicator) -> None:
    import gglspeedup

    gglspeedup.__version__ = "0.0.7" if communicator.rank == 1 else __version__
    sampler_of(communicator)


def failing(communicator, fail) -> None:
    sampler = sampler_of(communicator)
    for turn in range(4):
        if communicator.rank == 1 and turn == 2:
            fail()
        sampler.sample(np.arange(10))


def killed(communicator) -> None:
    failing(communicator, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stuck(communicator) -> None:
    failing(communicator, lambda: time.sleep(600))


def raised(communicator) -> None:
    failing(communicator, lambda: [][1])


def inside(communicator) -> None:
    """A rank fails where no count is exchanged, as when memory runs out."""
    from gglspeedup.distributed.hops import Batches

    def fail(*_: object) -> None:
        raise MemoryError("no room for the batch")

    failing(communicator, lambda: setattr(Batches, "_take", fail))


def other_call(communicator) -> None:
    failing(communicator, lambda: sampler_of(communicator))


JOBS = {
    job.__name__: job
    for job in (
        whole, in_pieces, cut_short, bad_seeds, other_seed, other_graph, other_version, killed, stuck, raised, inside,
        other_call,
    )
}


def gloo_rank(rank: int, store: str, job: str) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    with TorchCommunicator(timeout=TIMEOUT) as communicator:
        JOBS[job](communicator)
    print(f"rank {rank} is done", flush=True)
    distributed.destroy_process_group()


def start_gloo(store: str, job: str) -> int:
    """Start the ranks as torch.multiprocessing does; end the stuck one when the others have."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=gloo_rank, args=(rank, store, job), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in (ranks[0], ranks[2], ranks[1]):
        if process is ranks[1] and job == "stuck":
            process.kill()
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    engine, name = sys.argv[1:3]
    if engine == "gloo":
        sys.exit(start_gloo(str(Path(sys.argv[3]).resolve()), name))
    communicator = MpiCommunicator(timeout=TIMEOUT)
    JOBS[name](communicator)
    print(f"rank {communicator.rank} is done", flush=True)
