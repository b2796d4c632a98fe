"""The loader on a graph in parts, its ranks here threads of one process: the batches of NodeLoader on one machine."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from conftest import missing, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_jobs import bits
from test_distributed import a_book

from gglspeedup import CSRGraph, GPUSampler, NodeLoader, SampledBatch
from gglspeedup.distributed import (
    CommunicatorError,
    DistFeature,
    DistNodeLoader,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    PartBook,
    RankError,
    run_ranks,
)
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError

NODES = 120
BOOK = PartBook.from_owners(np.arange(NODES) % 3, 3)


@pytest.fixture(scope="module")
def graph() -> CSRGraph:
    return random_graph(np.random.default_rng(0), NODES, 12)


def whole(batch) -> list[object]:
    """All that a batch consists of, as bytes."""
    return [*bits(batch), *((rows.dtype.str, rows.shape, rows.tobytes()) for rows in (batch.x, batch.y))]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 4), contiguous=st.booleans(), shuffle=st.booleans(),
    drop_last=st.booleans(), deal_out=st.booleans(), together=st.integers(1, 4), prefetch=st.integers(0, 2),
    batch_size=st.integers(1, 30), cache=st.sampled_from([0, 200]), epoch=st.integers(0, 2**40),
    labels=st.sampled_from(["of ranks", "whole"]),
)  # fmt: skip
def test_equals_one_machine(
    graph, numbers, ranks, contiguous, shuffle, drop_last, deal_out, together, prefetch, batch_size, cache, epoch,
    labels,
):  # fmt: skip
    rng = np.random.default_rng(numbers)
    book = a_book(rng, NODES, ranks, contiguous)
    x, y = rng.random((NODES, 5)).astype(np.float32), rng.integers(0, 9, NODES)
    everyone = rng.permutation(NODES)[: rng.integers(1, NODES)]
    seeds = [everyone if deal_out else rng.permutation(NODES)[: rng.integers(0, 50)] for _ in range(ranks)]
    order = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": numbers}
    hot = rng.permutation(NODES)

    def work(communicator):
        rank = communicator.rank
        part, mine = GraphPart.of(graph, book, rank), book.nodes_of(rank)
        sampler = DistSampler(part, communicator, [4, 3], seed=3)
        loader = DistNodeLoader(
            sampler, DistFeature(part, communicator, x[mine], cache=cache, policy=hot),
            DistFeature(part, communicator, y[mine]) if labels == "of ranks" else y, seeds=seeds[rank],
            deal_out=deal_out, together=together, prefetch=prefetch, **order,
        )  # fmt: skip
        loader.set_epoch(epoch)
        epochs = [list(loader) for _ in range(2)]
        assert loader.epoch == epoch + 2 and all(len(batches) == len(loader) for batches in epochs)
        return epochs

    found = run_ranks(ranks, work)
    sampler = GPUSampler("cpu", graph, [4, 3], seed=3)
    lengths = {len(batches) for epochs in found for batches in epochs}
    assert len(lengths) == 1  # every rank has as many
    for rank, epochs in enumerate(found):
        share = {"rank": rank, "world_size": ranks} if deal_out else {}
        loader = NodeLoader(sampler, x, y, seeds=seeds[rank], sizes=[4, 3], prefetch=0, **share, **order)
        for offset, batches in enumerate(epochs):
            loader.set_epoch(epoch + offset)
            expected = list(loader)
            if deal_out:
                assert [whole(batch) for batch in batches] == [whole(batch) for batch in expected]
                continue
            assert len(batches) <= len(expected) if drop_last else len(batches) >= len(expected)
            for index, batch in enumerate(batches):
                # Ranks draw with other numbers than a single loader, so that their draws differ from each other's.
                assert batch.batch == (((epoch + offset) * len(batches) + index) * ranks + rank) % 2**48
                of_loader = expected[index].seeds if index < len(expected) else np.empty(0, np.int64)
                np.testing.assert_array_equal(batch.seeds, of_loader)
                alone = sampler.sample(of_loader, batch.batch)
                assert bits(batch) == bits(alone)
                assert batch.x.tobytes() == x[alone.n_id].tobytes() and batch.x.shape == (len(alone.n_id), 5)
                assert batch.y.tolist() == y[alone.seeds].tolist()


def on_three(graph, work, **options):
    """Run `work(loader, rank)` on three ranks, each with ten seeds."""

    def run(communicator):
        sampler = DistSampler(GraphPart.of(graph, BOOK, communicator.rank), communicator, [3])
        seeds = np.arange(10) + 10 * communicator.rank
        return work(DistNodeLoader(sampler, **{"seeds": seeds, "batch_size": 2, **options}), communicator.rank)

    return run_ranks(3, run)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("gglspeedup-prefetch")]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_loop_that_all_leave(graph, prefetch, stop):
    """Wherever the threads of the ranks are by then, the next epoch is whole."""

    def work(loader, rank):
        for index, _ in enumerate(loader, 1):
            if index == stop:
                break
        return [batch.batch for batch in loader]

    found = on_three(graph, work, prefetch=prefetch, together=2 - prefetch // 2)
    assert found == [[(5 + index) * 3 + rank for index in range(5)] for rank in range(3)]
    assert not threads()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loop_that_one_rank_leaves(graph, prefetch):
    """The others' loops end, and say why; all may begin another."""

    def work(loader, rank):
        def loop():
            for index, _ in enumerate(loader):
                if index == 1 and rank == 1:
                    return

        if rank == 1:
            loop()
        else:
            with pytest.raises(RankError, match="rank 1 failed in sampling, hop 1: _LeftError: its loop has left"):
                loop()
        return len(list(loader))

    assert on_three(graph, work, prefetch=prefetch) == [5] * 3
    assert not threads()


def test_several_batches_take_the_messages_of_one(graph):
    """Sampling and features both, and a row that two of them need travels once."""
    x = np.random.default_rng(0).random((NODES, 3))

    def work(communicator):
        part = GraphPart.of(graph, BOOK, communicator.rank)
        moved = []
        for together in 1, 5:
            sampler = DistSampler(part, communicator, [3])
            features = DistFeature(part, communicator, x[communicator.rank :: 3])
            before = [talker.traffic() for talker in (sampler, features)]
            batches = list(DistNodeLoader(sampler, features, seeds=np.arange(50), batch_size=10, together=together))
            after = [talker.traffic() for talker in (sampler, features)]
            messages, rows = (
                [new[kind]["received"] - old[kind]["received"] for old, new in zip(before, after, strict=True)]
                for kind in ("messages", "rows")
            )
            moved.append((messages, rows[1]))
            asked = [np.unique(batch.n_id[batch.n_id % 3 != communicator.rank]) for batch in batches]
            assert rows[1] == x[:1].nbytes * (
                sum(map(len, asked)) if together == 1 else len(np.unique(np.concatenate(asked)))
            )
        return moved

    for (apart, many), (at_once, fewer) in run_ranks(3, work):
        assert apart == [5 * count for count in at_once] and fewer < many


def test_other_frameworks(graph):
    try:
        import torch
    except ImportError:
        missing("torch")

    def check(loader, rank):
        for batch in loader:
            assert all(isinstance(part, torch.Tensor) for part in (batch.n_id, batch.y, batch.adjs[0].edge_index))
            assert batch.x is None and torch.equal(batch.y, 2 * batch.seeds)

    on_three(graph, check, y=2 * np.arange(NODES), backend="torch")


def test_epochs_that_differ(graph):
    def work(loader, rank):
        if rank == 2:
            loader.set_epoch(4)
        with pytest.raises(CommunicatorError) as told:
            list(loader)
        return str(told.value)

    for text in on_three(graph, work):
        assert "rank 1 is in epoch 0 of DistNodeLoader; rank 2 is in epoch 4 of DistNodeLoader" in text


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"seeds": [NODES]}, ArgumentIndexError, "seeds needs"),
        ({"seeds": [1, 1]}, ArgumentValueError, "seeds needs"),
        ({"together": 0}, ArgumentValueError, "together needs"),
        ({"deal_out": 1}, ArgumentTypeError, "deal_out needs"),
        ({"sizes": [2.5]}, ArgumentValueError, "sizes needs"),
        ({"x": np.zeros((5, 2))}, ArgumentValueError, "x needs a row for each of 120 nodes"),
        ({"y": np.zeros(NODES, "S2")}, ArgumentTypeError, "a numeric dtype"),
        ({"backend": "nothing"}, ArgumentValueError, "backend needs"),
    ],
)
def test_bad_arguments(graph, options, error, text):
    """Of one rank: it says so, and the others who it was."""

    def work(communicator):
        sampler = DistSampler(GraphPart.of(graph, BOOK, communicator.rank), communicator, [3])
        bad = communicator.rank == 1
        with pytest.raises(error if bad else RankError, match=text):
            DistNodeLoader(sampler, **{"seeds": [0], "batch_size": 2, **(options if bad else {})})

    run_ranks(3, work)


def test_arguments_that_differ(graph):
    for name, value in (("batch_size", 3), ("together", 2), ("seed", 1), ("sizes", [4]), ("y", np.zeros(NODES))):

        def work(communicator, name=name, value=value):
            sampler = DistSampler(GraphPart.of(graph, BOOK, communicator.rank), communicator, [3])
            other = {name: value} if communicator.rank == 2 else {}
            with pytest.raises(RankError, match=f"rank 2 has {name} "):
                DistNodeLoader(sampler, **{"seeds": [0], "batch_size": 2, **other})

        run_ranks(3, work)
    with pytest.raises(ArgumentTypeError, match="sampler needs a DistSampler"):
        DistNodeLoader(SampledBatch, seeds=[0], batch_size=1)


def test_what_is_said_of_it(graph):
    sampler = DistSampler(GraphPart.of(graph, PartBook.contiguous([0, NODES]), 0), LocalCommunicator(), [3])
    loader = DistNodeLoader(sampler, seeds=np.arange(NODES) < 5, batch_size=2)
    assert len(loader) == 3 and loader.dataset.tolist() == list(range(5))
    assert repr(loader) == (
        "DistNodeLoader(rank 0 of 1, 5 seeds, sizes=[3], batch_size=2, 3 batches, backend='numpy')"
    )
