"""Features and histories over ranks, here threads of one process: rows of one matrix, caches, and files."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import a_book

from benchmarks.graphs import rmat
from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.distributed import (
    CommunicatorError,
    DistFeature,
    DistHistory,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    PartBook,
    RankError,
    run_ranks,
)
from gglspeedup.distributed import rows as exchanges
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError

NODES = 200
OWNERS = np.arange(NODES) % 3
BOOK = PartBook.from_owners(OWNERS, 3)


@pytest.fixture(scope="module")
def graph() -> CSRGraph:
    return random_graph(np.random.default_rng(0), NODES, 20)


# --- features ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 4), nodes=st.integers(1, 100), contiguous=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "int64", "uint8", "bool", "complex64", "bfloat16"]),
    width=st.sampled_from([None, 0, 1, 3, 40]), cached=st.integers(0, 60), hashed=st.booleans(),
)  # fmt: skip
def test_equals_one_matrix(numbers, ranks, nodes, contiguous, dtype, width, cached, hashed):
    import ml_dtypes

    rng = np.random.default_rng(numbers)
    book = a_book(rng, nodes, ranks, contiguous)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = rng.integers(0, 100, (nodes,) if width is None else (nodes, width)).astype(kind)
    hot = rng.permutation(nodes)[:cached]
    wanted = [[rng.integers(0, nodes, rng.integers(0, 3 * nodes)) for _ in range(3)] for _ in range(ranks)]

    def work(communicator):
        rows = x[book.nodes_of(communicator.rank)]
        features = DistFeature(book, communicator, rows, cache=10 * max(1, x[:1].nbytes), policy=hot)
        return [features[ids] for ids in wanted[communicator.rank]]

    dense, exchanges.DENSE_NODES = exchanges.DENSE_NODES, 0 if hashed else exchanges.DENSE_NODES
    try:
        served = run_ranks(ranks, work)
    finally:
        exchanges.DENSE_NODES = dense
    for asked, found in zip(wanted, served, strict=True):
        for ids, rows in zip(asked, found, strict=True):
            assert rows.dtype == x.dtype and rows.shape == x[ids].shape and rows.ctypes.data % 64 == 0
            assert rows.tobytes() == naive.gather(x, ids).tobytes()


def on_three(graph, x, work, **options):
    """Run `work(features, rank)` on three ranks."""

    def run(communicator):
        part = GraphPart.of(graph, BOOK, communicator.rank)
        return work(DistFeature(part, communicator, x[communicator.rank :: 3], **options), communicator.rank)

    return run_ranks(3, run)


def test_what_is_said_of_it(graph):
    x = np.random.default_rng(0).random((NODES, 4)).astype(np.float32)

    def work(features, rank):
        assert features.hit_rate == 0.0
        before = features.traffic()
        features[np.repeat(np.arange(NODES), 3)]  # of each node three times
        after = features.traffic()
        moved = {kind: after[kind]["received"] - before[kind]["received"] for kind in ("ids", "rows")}
        assert features.take([1]).shape == (1, 4)
        return features.stats(), moved, features.shape, features.dim(), len(features), features.dtype, features.cached

    for rank, said in enumerate(on_three(graph, x, work)):
        own = int((rank == OWNERS).sum())
        asked = sum(int((rank == OWNERS).sum()) for other in range(3) if other != rank)
        last = int(rank == 1), int(rank != 1)  # the row of node 1
        stats = {
            "own": {"rows": 3 * own + last[0], "bytes": 16 * (3 * own + last[0])},
            "cached": {"rows": 0, "bytes": 0},
            "remote": {"rows": 3 * (NODES - own) + last[1], "bytes": 16 * (3 * (NODES - own) + last[1])},
        }
        assert said == (stats, {"ids": 4 * asked, "rows": 16 * (NODES - own)}, (NODES, 4), 4, NODES, np.float32, 0)


@pytest.mark.parametrize("policy", ["degree", "presample", "list"])
def test_what_is_cached(graph, policy):
    """The rows that the policy says, hottest first, as many as there is room for, and no own ones."""
    x = np.arange(NODES * 2, dtype=np.float32).reshape(NODES, 2)
    order = np.random.default_rng(1).permutation(NODES)
    batches = range(0, 30, 8)

    def seeds(rank):
        return BOOK.nodes_of(rank)[:30]

    def work(communicator):
        part = GraphPart.of(graph, BOOK, communicator.rank)
        sampler, mine = DistSampler(part, communicator, [5, 3]), seeds(communicator.rank)
        features = DistFeature(
            part, communicator, x[communicator.rank :: 3], cache=8 * 25, policy=order if policy == "list" else policy,
            sampler=sampler, seeds=mine, batch_size=8,
        )  # fmt: skip
        cached = []
        for node in range(NODES):
            before = features.stats()["cached"]["rows"]
            np.testing.assert_array_equal(features[[node]], x[[node]])
            cached.append(features.stats()["cached"]["rows"] > before)
        return np.flatnonzero(cached).tolist()

    def hottest(rank):
        if policy == "list":
            return order
        if policy == "degree":
            return naive.hot_order(graph.indptr)
        sampler = GPUSampler("cpu", graph, [5, 3])
        n_ids = [sampler.sample(seeds(rank)[b : b + 8], batch=k * 3 + rank).n_id for k, b in enumerate(batches)]
        visits = naive.visits(n_ids, NODES)
        return sorted(np.flatnonzero(visits), key=lambda v: (-visits[v], v))

    for rank, cached in enumerate(run_ranks(3, work)):
        assert cached == sorted([v for v in hottest(rank) if OWNERS[v] != rank][:25])


def test_caches_of_different_sizes(graph):
    x = np.arange(NODES, dtype=np.int64)

    def work(communicator):
        part = GraphPart.of(graph, BOOK, communicator.rank)
        rows, room = x[communicator.rank :: 3], 80 * communicator.rank
        features = DistFeature(part, communicator, rows, cache=room, policy="degree")
        assert features[[5, 6, 7]].tolist() == [5, 6, 7]
        return features.cached

    assert run_ranks(3, work) == [0, 10, 20]


def test_a_tenth_of_the_rows_spares_two_thirds_of_the_bytes():
    """Copies of the rows of a pre-sampled epoch, on R-MAT: an epoch of other draws then brings a third or less."""
    graph, ranks = rmat(15, 400_000), 4
    rng = np.random.default_rng(0)
    book = PartBook.from_owners(rng.integers(0, ranks, graph.num_nodes), ranks)
    train = rng.permutation(graph.num_nodes)[: graph.num_nodes // 2]
    x = rng.random((graph.num_nodes, 8)).astype(np.float32)

    def work(communicator):
        part, seeds = GraphPart.of(graph, book, communicator.rank), train[communicator.rank :: ranks]
        sampler = DistSampler(part, communicator, [15, 10])
        received = []
        for cache in 0, x.nbytes // 10:
            rows = x[book.nodes_of(communicator.rank)]
            features = DistFeature(part, communicator, rows, cache=cache, sampler=sampler, seeds=seeds, batch_size=64)
            before = features.traffic()["rows"]["received"]
            for number in range(1000, 1040):
                batch = sampler.sample(rng_seeds(seeds, number), number)
                features[batch.n_id]
            received.append(features.traffic()["rows"]["received"] - before)
            assert features.stats()["remote"]["bytes"] == received[-1]
        return received

    def rng_seeds(seeds, number):
        return np.random.default_rng(number).choice(seeds, 64, replace=False)

    for without, with_cache in run_ranks(ranks, work, timeout=120):
        assert without >= 3 * with_cache


def test_bad_ids_of_one_rank(graph):
    x = np.zeros((NODES, 2))

    def work(features, rank):
        with pytest.raises(ArgumentIndexError if rank == 1 else RankError, match="n_id needs"):
            features[[NODES] if rank == 1 else [0]]
        return features[[0, 1]].shape

    assert on_three(graph, x, work) == [(2, 2)] * 3


def test_features_that_do_not_fit_together(graph):
    def make(change, error, **options):
        def work(communicator):
            rows = np.zeros((BOOK.count_of(communicator.rank), 2), np.float32)
            expected = RankError if communicator.rank != 1 else error
            with pytest.raises(expected) as told:
                part = GraphPart.of(graph, BOOK, communicator.rank)
                DistFeature(part, communicator, change(rows) if communicator.rank == 1 else rows, **options)
            return str(told.value)

        return run_ranks(3, work)

    assert "rank 1 has dtype" in make(lambda rows: rows.astype(np.float64), RankError)[0]
    assert "rank 1 has row shape [1]" in make(lambda rows: rows[:, :1], RankError)[0]
    assert "rows needs shape" in make(lambda rows: rows[1:], ArgumentValueError)[1]
    assert "rows needs a numeric dtype" in make(lambda rows: rows.astype("S3"), ArgumentTypeError)[1]
    assert "rows needs the features" in make(lambda rows: None, ArgumentTypeError)[1]


def test_policies_that_cannot_be(graph):
    x = np.zeros((NODES, 2))
    for options, error, text in (
        ({"policy": "best"}, ArgumentValueError, '"presample", "degree" or a list'),
        ({}, ArgumentTypeError, "sampler= and seeds="),
        ({"policy": [1, 1]}, ArgumentValueError, "unique ids"),
    ):
        with pytest.raises((error, RankError), match=text):
            on_three(graph, x, lambda *_: None, cache="1K", **options)
    with pytest.raises(ArgumentTypeError, match="a GraphPart for degrees"):
        DistFeature(PartBook.contiguous([0, 2]), LocalCommunicator(), np.zeros((2, 2)), cache=100, policy="degree")


# --- histories -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 4), nodes=st.integers(1, 60), contiguous=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
)  # fmt: skip
def test_histories_equal_one_table(numbers, ranks, nodes, contiguous, dtype):
    """A round of pushes is those of rank 0, of rank 1, ...: of rows for one node that of the highest rank stays."""
    rng = np.random.default_rng(numbers)
    book = a_book(rng, nodes, ranks, contiguous)
    rounds = []
    for _ in range(4):
        ids = [rng.integers(0, nodes, rng.integers(0, 2 * nodes)) for _ in range(ranks)]
        rounds.append([(rng.integers(0, 100, (len(part), 3)), part) for part in ids])
    asked = [rng.integers(0, nodes, 30) for _ in range(ranks)]

    def work(communicator):
        with DistHistory(book, communicator, [2, 3], dtype=dtype) as histories:
            obvious = naive.History(nodes, 3, histories[1].dtype)
            mine = asked[communicator.rank]
            for pushes in rounds:
                histories[1].push(*pushes[communicator.rank])
                values, ids = (np.concatenate(parts) for parts in zip(*pushes, strict=True))
                obvious.push(values, ids.tolist())
                pulled = histories[1].pull(mine)
                assert pulled.dtype == histories[1].dtype
                np.testing.assert_array_equal(pulled, obvious.pull(mine.tolist()))
                assert histories.age(mine, table=1).tolist() == obvious.age(mine.tolist())
            assert histories[1].age().tolist() == obvious.age(list(range(nodes)))
            assert not histories[0].pull(mine).any() and histories.staleness().never == nodes
            return histories[1].pushes

    assert run_ranks(ranks, work) == [4] * ranks


def test_ranges_and_files(tmp_path):
    def work(communicator):
        rank = communicator.rank
        histories = DistHistory(BOOK, communicator, [2])
        histories[0].push(np.full((5, 2), rank + 1), offset=[10 * rank, 10 * rank + 7], count=[3, 2])
        before = histories[0].pull(np.arange(NODES))
        histories.save(tmp_path)
        histories[0].push(np.zeros((0, 2)), [])
        histories.save(tmp_path)
        again = DistHistory(BOOK, communicator, [2])
        again.restore(tmp_path)
        np.testing.assert_array_equal(again[0].pull(np.arange(NODES)), before)
        return np.flatnonzero(before[:, 0]).tolist(), again.age([0, 1, 3]).tolist(), len(again), again.dims

    expected = [v for r in range(3) for v in (10 * r, 10 * r + 1, 10 * r + 2, 10 * r + 7, 10 * r + 8)]
    assert run_ranks(3, work) == [(expected, [1, 1, -1], 1, (2,))] * 3
    assert len(list(tmp_path.iterdir())) == 3


def test_files_of_several_saves_are_refused(tmp_path):
    def save(communicator):
        histories = DistHistory(BOOK, communicator, [2])
        for turn in "first", "second":
            histories[0].push(np.ones((1, 2)), [0])
            histories.save(tmp_path / turn)

    run_ranks(3, save)
    name = next(path.name for path in (tmp_path / "first").iterdir() if "00001-of" in path.name)
    (tmp_path / "first" / name).replace(tmp_path / "second" / name)
    with pytest.raises(RankError, match="rank 1 has pushes"):
        run_ranks(3, lambda c: DistHistory(BOOK, c, [2]).restore(tmp_path / "second"))
    (tmp_path / "second" / name).unlink()
    with pytest.raises((FileNotFoundError, RankError)) as told:
        run_ranks(3, lambda c: DistHistory(BOOK, c, [2]).restore(tmp_path / "second"))
    assert isinstance(told.value, FileNotFoundError)


def test_histories_that_differ_and_bad_pushes():
    with pytest.raises(RankError, match=r"rank 1 has dims \[3\] where others have \[2\]"):
        run_ranks(3, lambda c: DistHistory(BOOK, c, [3] if c.rank == 1 else [2]))

    def work(communicator):
        histories = DistHistory(BOOK, communicator, [2])
        bad = communicator.rank == 2
        for values, ids, error in (
            (np.ones((1, 2)), [NODES], ArgumentIndexError),
            (np.ones((1, 3)), [0], ArgumentValueError),
            (np.ones((1, 2), complex), [0], ArgumentTypeError),
        ):
            with pytest.raises(error if bad else RankError):
                histories[0].push(*((values, ids) if bad else (np.ones((1, 2)), [0])))
        with pytest.raises(ArgumentTypeError if bad else RankError, match="another combination"):
            histories[0].push(np.ones((1, 2)), *([] if bad else [[0]]))
        return histories[0].pull([0]).tolist(), histories[0].pushes

    assert run_ranks(3, work) == [([[0.0, 0.0]], 0)] * 3


def test_another_call_at_the_same_time(graph):
    def work(communicator):
        features = DistFeature(BOOK, communicator, np.zeros(BOOK.count_of(communicator.rank)))
        histories = DistHistory(BOOK, communicator, [1])
        with pytest.raises(CommunicatorError) as told:
            features[[0]] if communicator.rank else histories[0].pull([0])
        return str(told.value)

    assert all("rank 0 is in DistHistory[0].pull; rank 1 is in DistFeature[...]" in text for text in run_ranks(3, work))
