"""Sampling over ranks, here threads of one process: the bits of one machine, few bytes, and errors that all hear of."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import naive
import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_jobs import bits

from benchmarks.graphs import rmat
from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.distributed import (
    CommunicatorError,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    MpiCommunicator,
    PartBook,
    RankError,
    TorchCommunicator,
    even_batches,
    hops,
    run_ranks,
)
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError, MissingPackageError

FANOUTS = [-1, 1, 3, 10, 32, 33, 100]


def a_book(rng: np.random.Generator, nodes: int, ranks: int, contiguous: bool) -> PartBook:
    if contiguous:  # parts may be empty
        bounds = np.sort(rng.integers(0, nodes + 1, ranks - 1))
        return PartBook.contiguous([0, *bounds.tolist(), nodes])
    return PartBook.from_owners(rng.integers(0, ranks, nodes), ranks)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 4), nodes=st.integers(1, 120), most=st.integers(0, 50),
    hub=st.sampled_from([0, 3000]), sizes=st.lists(st.sampled_from(FANOUTS), min_size=1, max_size=3),
    contiguous=st.booleans(), replace=st.booleans(), expand=st.sampled_from(["layer", "frontier"]),
    seed=st.integers(0, 2**64 - 1), with_ids=st.sampled_from([None, 1, 1 << 40]), wide=st.booleans(),
    hashed=st.booleans(),
)  # fmt: skip
def test_equals_one_machine(
    numbers, ranks, nodes, most, hub, sizes, contiguous, replace, expand, seed, with_ids, wide, hashed
):  # fmt: skip
    """Whoever owns what, whoever samples how much: a batch at a time, and several of different numbers at once."""
    rng = np.random.default_rng(numbers)
    graph = random_graph(rng, nodes, most, hub)
    if with_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=rng.permutation(graph.num_edges) * with_ids)
    if wide:  # as a graph of 2**31 nodes has
        graph.indices = graph.indices.astype(np.int64)
    book = a_book(rng, nodes, ranks, contiguous)
    options = {"seed": seed, "replace": replace, "expand": expand}

    def seeds() -> np.ndarray:
        return rng.permutation(nodes)[: rng.integers(0, nodes + 1)]

    single = [[(seeds(), int(rng.integers(0, 2**48))) for _ in range(2)] for _ in range(ranks)]
    several = [[(seeds(), int(rng.integers(0, 2**48))) for _ in range(rng.integers(0, 4))] for _ in range(ranks)]

    def sample(communicator):
        part = GraphPart.of(graph, book, communicator.rank)
        sampler = DistSampler(part, communicator, sizes, **options)
        batches = [sampler.sample(*one) for one in single[communicator.rank]]
        return batches + sampler.sample_many(several[communicator.rank])

    reference = GPUSampler("cpu", graph, sizes, **options)
    dense, hops.DENSE_NODES = hops.DENSE_NODES, 0 if hashed else hops.DENSE_NODES
    try:
        found = run_ranks(ranks, sample)
    finally:
        hops.DENSE_NODES = dense
    for rank, batches in enumerate(found):
        wanted = single[rank] + several[rank]
        assert len(batches) == len(wanted)
        for batch, (seed_ids, number) in zip(batches, wanted, strict=True):
            assert bits(batch) == bits(reference.sample(seed_ids, batch=number))


def pair(graph: CSRGraph, work, **options):
    """Run `work(sampler)` on two ranks."""
    book = PartBook.from_owners(np.arange(graph.num_nodes) % 2, 2)
    options = {"sizes": [5, 3], **options}
    return run_ranks(2, lambda c: work(DistSampler(GraphPart.of(graph, book, c.rank), c, **options), c.rank))


@pytest.fixture(scope="module")
def graph() -> CSRGraph:
    return random_graph(np.random.default_rng(0), 300, 20)


def test_equals_naive(graph):
    seeds = [np.arange(20), np.arange(100, 250)]
    found = pair(graph, lambda sampler, rank: sampler.sample(seeds[rank], batch=7 + rank), seed=3)
    for rank, (n_id, adjs) in enumerate(found):
        expected, hops_of = naive.sample(graph.indptr, graph.indices, seeds[rank], [5, 3], seed=3, batch=7 + rank)
        np.testing.assert_array_equal(n_id, expected)
        for adj, (edge_index, e_id, size) in zip(adjs, hops_of, strict=True):
            np.testing.assert_array_equal(adj.edge_index, edge_index)
            np.testing.assert_array_equal(adj.e_id, e_id)
            assert adj.size == size


def test_batch_numbers(graph):
    """Those of successive calls and of ranks differ; a call that fails takes none."""

    def work(sampler, rank):
        first = sampler.sample([1]).batch
        with pytest.raises((ArgumentValueError, RankError)):
            sampler.sample([2, 2] if rank else [2])
        return [first, *(batch.batch for batch in sampler.sample_many([([1], None), ([2], 99), ([3], None)]))]

    assert pair(graph, work) == [[0, 2, 99, 4], [1, 3, 99, 5]]


def test_sizes_of_a_call_and_none(graph):
    def work(sampler, rank):
        with pytest.raises(ArgumentValueError, match="sizes needs to be set"):
            sampler.sample([rank])
        one = sampler.sample([rank], 4, sizes=[2])
        sampler.set_size([2])
        assert bits(sampler.sample([rank], 4)) == bits(one)
        return len(one.adjs)

    assert pair(graph, work, sizes=None) == [1, 1]


def test_ranks_with_fewer_batches(graph):
    seeds = [np.arange(5), np.arange(40)]
    found = pair(graph, lambda sampler, rank: [len(b.seeds) for b in sampler.batches(seeds[rank], 16)])
    assert found == [[5, 0, 0], [16, 16, 8]]
    assert run_ranks(3, lambda c: sum(1 for _ in even_batches(c, np.arange(c.rank * 2), 3))) == [2, 2, 2]


def test_results_outlive_later_batches(graph):
    def work(sampler, rank):
        kept = sampler.sample(np.arange(50), 1)
        before = bits(kept)
        for _ in range(5):
            sampler.sample(np.arange(60))
        return bits(kept) == before

    assert pair(graph, work) == [True, True]


# --- bytes ---------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_ids_and_rows():
    """What is sent is what was asked for and found, and at most a tenth more; own rows do not travel."""
    graph, ranks, rng = rmat(14, 200_000), 4, np.random.default_rng(0)
    owners = rng.integers(0, ranks, graph.num_nodes)
    book = PartBook.from_owners(owners, ranks)
    seeds = rng.permutation(graph.num_nodes)[: ranks * 512].reshape(ranks, -1)
    reference = GPUSampler("cpu", graph, [15, 10])

    def work(communicator):
        sampler = DistSampler(GraphPart.of(graph, book, communicator.rank), communicator, [15, 10])
        before = sampler.traffic()
        batch = sampler.sample(seeds[communicator.rank])
        after = sampler.traffic()
        assert bits(batch) == bits(reference.sample(batch.seeds, batch=batch.batch))
        ids = rows = 0
        for adj in batch.adjs:
            targets = batch.n_id[: adj.size[1]]
            ids += 4 * int((owners[targets] != communicator.rank).sum())
            remote = owners[targets][adj.col] != communicator.rank
            rows += 8 * int(remote.sum())  # a neighbour and an edge id
        return {kind: after[kind]["received"] - before[kind]["received"] for kind in after}, (ids, rows), after

    found = run_ranks(ranks, work)
    moved = {kind: sum(received[kind] for received, *_ in found) for kind in found[0][0]}
    ids, rows = (sum(wanted[k] for _, wanted, _ in found) for k in (0, 1))
    assert moved["ids"] >= ids and moved["rows"] >= rows > 100 * ranks * 512
    assert moved["ids"] + moved["rows"] + moved["counts"] <= 1.1 * (ids + rows)
    assert moved["messages"] == 2 * 4 * ranks * (ranks - 1)  # of each of two hops, between any two ranks
    for kind in ("ids", "rows", "counts", "messages"):
        assert sum(after[kind]["sent"] for *_, after in found) == sum(after[kind]["received"] for *_, after in found)


def test_several_batches_take_the_messages_of_one(graph):
    def work(sampler, rank):
        counts = []
        for number in 1, 6:
            before = sampler.traffic()["messages"]["sent"]
            sampler.sample_many([(np.arange(30), None)] * number)
            counts.append(sampler.traffic()["messages"]["sent"] - before)
        return counts

    assert pair(graph, work) == [[8, 8], [8, 8]]


def test_one_rank_sends_nothing(graph):
    sampler = DistSampler(GraphPart.of(graph, PartBook.contiguous([0, 300]), 0), LocalCommunicator(), [4, 4])
    sampler.sample(np.arange(100))
    assert all(amount == 0 for ways in sampler.traffic().values() for amount in ways.values())


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error"),
    [([1, 1], ArgumentValueError), ([300], ArgumentIndexError), ([-1], ArgumentIndexError), ([0.5], ArgumentTypeError)],
)
def test_bad_seeds_of_one_rank(graph, bad, error):
    """That rank says what is wrong, the other one who it was; both go on, with the same bits."""

    def work(sampler, rank):
        with pytest.raises(error if rank else RankError) as told:
            sampler.sample(bad if rank else [1, 2])
        return str(told.value), bits(sampler.sample([5, 6], 3))

    (other, left), (own, right) = pair(graph, work)
    assert "seeds needs" in own and "rank 1 failed in sampling, hop 1" in other and own in other
    assert left == right == bits(GPUSampler("cpu", graph, [5, 3]).sample([5, 6], 3))


def differing(graph, change):
    book = PartBook.from_owners(np.arange(300) % 3, 3)

    def work(communicator):
        made = {"graph": graph, "book": book, "index": communicator.rank, "options": {"sizes": [2], "seed": 1}}
        if communicator.rank == 2:
            change(made)
        part = GraphPart.of(made["graph"], made["book"], made["index"])
        with pytest.raises(RankError) as told:
            DistSampler(part, communicator, **made["options"])
        return str(told.value)

    texts = set(run_ranks(3, work))
    assert len(texts) == 1
    return texts.pop()


def test_differences_are_named(graph):
    other = CSRGraph(graph.indptr, graph.indices[::-1].copy())
    shifted = PartBook.from_owners((np.arange(300) + 1) % 3, 3)
    assert "rank 2 has seed 9 where others have 1" in differing(graph, lambda m: m["options"].update(seed=9))
    assert "rank 2 has sizes [3] where others have [2]" in differing(graph, lambda m: m["options"].update(sizes=[3]))
    assert "rank 2 has replace true" in differing(graph, lambda m: m["options"].update(replace=True))
    assert 'rank 2 has expand "frontier"' in differing(graph, lambda m: m["options"].update(expand="frontier"))
    assert "rank 2 has graph" in differing(graph, lambda m: m.update(graph=other))
    assert "rank 2 has partition" in differing(graph, lambda m: m.update(book=shifted))
    assert "rank 2 has part 0" in differing(graph, lambda m: m.update(index=0))


def test_as_many_ranks_as_parts(graph):
    book = PartBook.from_owners(np.arange(300) % 3, 3)
    with pytest.raises(RankError, match="2 ranks need 2 parts, got 3"):
        run_ranks(2, lambda c: DistSampler(GraphPart.of(graph, book, c.rank), c, [2]))


def test_bad_arguments_of_one_rank(graph):
    book = PartBook.from_owners(np.arange(300) % 2, 2)

    def work(communicator):
        part = GraphPart.of(graph, book, communicator.rank) if communicator.rank else graph
        with pytest.raises(RankError if communicator.rank else ArgumentTypeError) as told:
            DistSampler(part, communicator, [2])
        return str(told.value)

    own, other = run_ranks(2, work)
    assert "part needs a GraphPart" in own and "rank 0 failed in DistSampler(...)" in other
    with pytest.raises(ArgumentTypeError, match="communicator needs"):
        DistSampler(GraphPart.of(graph, PartBook.contiguous([0, 300]), 0), object(), [2])


def test_calls_in_another_order(graph):
    def work(sampler, rank):
        with pytest.raises(CommunicatorError) as told:
            sampler.sample([1], sizes=[2] if rank else [3])
        return str(told.value)

    for text in pair(graph, work):
        assert "rank 0 is in sampling, hop 1 of fanouts [3]; rank 1 is in sampling, hop 1 of fanouts [2]" in text


def test_a_rank_that_does_not_come():
    def work(communicator):
        if communicator.rank == 1:
            time.sleep(1)
            return ""
        with pytest.raises(CommunicatorError) as told:
            communicator.gather_all(b"x")
        with pytest.raises(CommunicatorError):
            communicator.gather_all(b"x")  # and it is over
        return str(told.value)

    texts = run_ranks(3, work, timeout=0.3)
    assert "rank 1 did not come to a call within 0.3 s" in texts[0] and texts[0] == texts[2]


def test_a_rank_that_raises_is_the_cause():
    def work(communicator):
        if communicator.rank == 1:
            raise KeyError("mine")
        communicator.gather_all(b"x")

    with pytest.raises(KeyError, match="mine"):
        run_ranks(3, work)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_bad_timeouts():
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ArgumentValueError, match="timeout needs"):
            LocalCommunicator(timeout=timeout)
    with pytest.raises(ArgumentTypeError, match="timeout needs"):
        LocalCommunicator(timeout="30")


def test_engines_that_are_not_there(monkeypatch):
    with pytest.raises(ArgumentValueError, match="init_process_group"):
        TorchCommunicator()
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingPackageError, match="pip install mpi4py"):
        MpiCommunicator()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match="install torch"):
        TorchCommunicator()


def test_a_communicator_tells_of_what_leaves_its_block():
    def work(communicator):
        with pytest.raises(KeyError if communicator.rank else CommunicatorError) as told, communicator:
            if communicator.rank:
                raise KeyError("mine")
            communicator.gather_all(b"x")
        return str(told.value)

    assert run_ranks(2, work)[0] == "rank 1 gave up: KeyError: 'mine'"


def test_importing_it_imports_no_engine():
    code = "import sys, gglspeedup.distributed; print([name for name in ('mpi4py', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
