"""What every rank does in the tests of real engines: ``rank_jobs.py ENGINE JOB[,JOB...]``, under mpiexec for "mpi".

Each job is called with a function that makes a communicator of all ranks, as often as it is called.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gglspeedup import CSRGraph, GPUSampler, __version__
from gglspeedup.distributed import (
    Communicator,
    CommunicatorError,
    DistFeature,
    DistHistory,
    DistNodeLoader,
    DistSampler,
    GraphPart,
    MpiCommunicator,
    PartBook,
    RankError,
    TorchCommunicator,
    hops,
    mpi,
    partition_to_disk,
)

NODES, RANKS = 400, 3
SIZES = [4, 40]
TIMEOUT = 20.0
STUCK_TIMEOUT = 1.5

Make = Callable[[], Communicator]


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


# --- jobs that end well ---------------------------------------------------------------------------------------------


def whole(make: Make) -> None:
    """Sampling, features, and histories, against what one process has."""
    communicator = make()
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


def in_pieces(make: Make) -> None:
    """As `whole`, with messages that are longer than one can be."""
    piece, mpi._PIECE = mpi._PIECE, 40
    whole(make)
    mpi._PIECE = piece


def in_the_background(make: Make) -> None:
    """Batches, histories and the training's own messages, each on a communicator of its own at the same time."""
    own, communicator = make(), make()
    sampler, rank = sampler_of(communicator), communicator.rank
    x = np.random.default_rng(2).random((NODES, 5)).astype(np.float32)
    features = DistFeature(sampler.part, communicator, x[sampler.book.nodes_of(rank)])
    loader = DistNodeLoader(
        sampler, features, np.arange(NODES), seeds=np.arange(40 + 20 * rank), batch_size=8, together=2
    )
    reference = GPUSampler("cpu", graph(), SIZES, seed=5)
    histories = DistHistory(sampler.part, make(), [5], background=True)
    expected = np.zeros_like(x)
    for turn, batch in enumerate(loader):
        histories.prefetch(batch.n_id)
        assert bits(batch) == bits(reference.sample(batch.seeds, batch=batch.batch))
        assert batch.x.tobytes() == x[batch.n_id].tobytes() and batch.y.tolist() == batch.seeds.tolist()
        pushed = own.gather_all(batch.seeds.tobytes())
        np.testing.assert_array_equal(histories[0].pull(batch.n_id), expected[batch.n_id])
        histories[0].push(x[batch.seeds] + turn, batch.seeds)
        for seeds in (np.frombuffer(message, np.int64) for message in pushed):
            expected[seeds] = x[seeds] + turn
    assert turn + 1 == len(loader) == -(-(40 + 20 * (communicator.size - 1)) // 8)
    histories.close()


def device_buffers(make: Make) -> None:
    """Arrays that MPI finds by ``__cuda_array_interface__``, as it does those of a GPU."""
    from device_on_host import DeviceArray, install

    install()
    plain, communicator = make(), MpiCommunicator(timeout=TIMEOUT, device_buffers=True)
    counts = np.random.default_rng(0).integers(0, 9, (plain.size, plain.size))
    to, of = counts[plain.rank], counts[:, plain.rank]
    rows = np.random.default_rng(plain.rank).random((to.sum(), 3))
    received = communicator.exchange(DeviceArray(rows), to, of)
    assert isinstance(received, DeviceArray)
    assert received.host.tobytes() == plain.exchange(rows, to, of).tobytes()
    try:
        plain.exchange(DeviceArray(rows), to, of)
    except TypeError as error:
        assert "device_buffers=True" in str(error)
    else:
        raise AssertionError("it has taken them")


def bad_seeds(make: Make) -> None:
    """Rank 1 passes seeds that nobody can sample; all say so, and go on."""
    communicator = make()
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


def differences(make: Make) -> None:
    """Rank 1 differs in one thing after the other; all ranks say so, and go on."""
    import gglspeedup

    communicator = make()
    odd = communicator.rank == 1

    def other_version() -> None:
        gglspeedup.__version__ = "0.0.7" if odd else __version__
        try:
            sampler_of(communicator)
        finally:
            gglspeedup.__version__ = __version__

    for differ, text in (
        (lambda: sampler_of(communicator, seed=6 if odd else 5), "rank 1 has seed 6 where others have 5"),
        (lambda: sampler_of(communicator, of_graph=odd), "rank 1 has graph"),
        (other_version, 'rank 1 has version "0.0.7"'),
    ):
        try:
            differ()
        except RankError as told:
            assert text in str(told), told
        else:
            raise AssertionError(f"nobody has said that {text}")


# --- jobs in which rank 1 fails -------------------------------------------------------------------------------------


def failing(communicator, fail) -> None:
    sampler = sampler_of(communicator)
    for turn in range(4):
        if communicator.rank == 1 and turn == 2:
            fail()
        sampler.sample(np.arange(10))


def cut_short(communicator) -> None:
    """The file of rank 1's part has lost its end."""
    if communicator.rank == 0:
        shutil.rmtree("parts", ignore_errors=True)
        partition_to_disk(graph(), "parts", communicator.size, progress=False)
        largest = max(Path("parts/part-00001").iterdir(), key=lambda file: file.stat().st_size)
        os.truncate(largest, largest.stat().st_size - 8)
    communicator.gather_all(b"the parts are there")
    DistSampler(GraphPart.load("parts", communicator.rank), communicator, SIZES)


def inside(communicator) -> None:
    """A rank fails where no count is exchanged, as when memory runs out."""

    def fail(*_: object) -> None:
        raise MemoryError("no room for the batch")

    take = hops.Batches._take
    try:
        failing(communicator, lambda: setattr(hops.Batches, "_take", fail))
    finally:
        hops.Batches._take = take


def other_call(communicator) -> None:
    failing(communicator, lambda: sampler_of(communicator))


def caught(make: Make) -> None:
    """Failures that every rank hears of, and survives: another communicator works."""
    for job, error, text in (
        (inside, MemoryError, "rank 1 gave up: MemoryError"),
        (cut_short, ValueError, "rank 1 gave up: PartFileError"),
        (other_call, CommunicatorError, "rank 1 is in DistSampler(...)"),
    ):
        communicator = make()
        try:
            with communicator:
                job(communicator)
        except CommunicatorError as told:
            assert text in str(told), told
            assert communicator.rank != 1 or error is CommunicatorError
        except error:
            assert communicator.rank == 1
        else:
            raise AssertionError(f"nobody has said that {text}")


def raised(make: Make) -> None:
    """The training loop of a rank raises, while batches are made in the background."""
    communicator, background = make(), make()
    loader = DistNodeLoader(sampler_of(background), seeds=np.arange(90), batch_size=10)
    # Python tells MPI's of what ends it, but not multiprocessing's children.
    with contextlib.nullcontext() if isinstance(communicator, MpiCommunicator) else communicator:
        for turn, _ in enumerate(loader):
            if communicator.rank == 1 and turn == 2:
                [][1]
            communicator.gather_all(b"a step")


def killed(make: Make) -> None:
    with make() as communicator:
        failing(communicator, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stuck(make: Make) -> None:
    with make() as communicator:
        sampler_of(communicator).sample([0])  # whatever takes its time at first is done now
        communicator.timeout = STUCK_TIMEOUT
        failing(communicator, lambda: time.sleep(600))


JOBS = {
    job.__name__: job
    for job in (
        whole, in_pieces, in_the_background, device_buffers, bad_seeds, differences, caught, raised, killed, stuck,
    )
}  # fmt: skip


def work(make: Make, names: str) -> None:
    """Do the jobs; the ranks end together if all went well."""
    for name in names.split(","):
        JOBS[name](make)
    communicator = make()
    print(f"rank {communicator.rank} is done", flush=True)
    communicator.gather_all(b"so are all")


def gloo_rank(rank: int, store: str, names: str) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    work(lambda: TorchCommunicator(timeout=TIMEOUT), names)
    distributed.destroy_process_group()


def start_gloo(store: str, names: str) -> int:
    """Start the ranks; end the stuck one when the others have."""
    import torch.distributed  # noqa: F401  # once for all of them, which are forked

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=gloo_rank, args=(rank, store, names), daemon=True) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in (ranks[0], ranks[2], ranks[1]):
        if process is ranks[1] and names == "stuck":
            process.kill()
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    engine, jobs = sys.argv[1:3]
    if engine == "gloo":
        sys.exit(start_gloo(str(Path(sys.argv[3]).resolve()), jobs))
    work(lambda: MpiCommunicator(timeout=TIMEOUT), jobs)
