"""Rows of histories that ranks, here threads, fetch before they need them: every push before, and none after."""

from __future__ import annotations

import threading

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import a_book

from gglspeedup.distributed import CommunicatorError, DistHistory, PartBook, RankError, run_ranks
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError

DIMS = [2, 0, 3]
BOOK = PartBook.from_owners(np.arange(30) % 3, 3)
CALLS = ("push", "pull", "pull_async", "wait", "prefetch", "pull of what was prefetched", "age")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 3), nodes=st.integers(1, 30), contiguous=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]), background=st.booleans(),
    calls=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 2)), max_size=14),
)  # fmt: skip
def test_equals_one_table(numbers, ranks, nodes, contiguous, dtype, background, calls):
    """All ranks make the same calls in any order, each of nodes of its own."""
    rng = np.random.default_rng(numbers)
    book = a_book(rng, nodes, ranks, contiguous)
    drawn = [[rng.integers(0, nodes, rng.integers(0, 2 * nodes)) for _ in range(ranks)] for _ in calls]
    values = [[rng.integers(0, 100, (len(ids), 3)) for ids in of_all] for of_all in drawn]

    def work(communicator):
        rank = communicator.rank
        with DistHistory(book, communicator, DIMS, dtype=dtype, background=background) as histories:
            obvious = [naive.History(nodes, dim, histories[0].dtype) for dim in DIMS]
            ahead: dict[int, tuple] = {}  # table -> nodes and rows that a prefetch has brought
            started = []
            for (call, index), of_all, rows in zip(calls, drawn, values, strict=True):
                ids = of_all[rank].copy()
                if call == "push":
                    histories[index].push(rows[rank][:, : DIMS[index]], ids)
                    everyone = np.concatenate(rows)[:, : DIMS[index]], np.concatenate(of_all).tolist()
                    obvious[index].push(*everyone)
                elif call == "prefetch":
                    histories.prefetch(ids)
                    ahead = {k: (ids.copy(), table.pull(ids.tolist())) for k, table in enumerate(obvious)}
                    ids[:] = 0  # the caller's own again
                elif call == "pull of what was prefetched" and index in ahead:
                    asked, expected = ahead.pop(index)
                    found = histories[index].pull(asked)
                    assert found.dtype == histories[index].dtype and found.ctypes.data % 64 == 0
                    np.testing.assert_array_equal(found, expected)
                elif call == "pull_async":
                    started.append((histories[index].pull_async(ids), obvious[index].pull(ids.tolist())))
                    ids[:] = 0
                elif call == "wait" and started:
                    pending, expected = started.pop(0)
                    np.testing.assert_array_equal(pending.wait(), expected)
                elif call == "age":
                    assert histories.age(ids, table=index).tolist() == obvious[index].age(ids.tolist())
                elif call == "pull":
                    # None of these is what was prefetched, on any rank: they are one more.
                    ids = np.append(ids, rng_of(rank, nodes, 2 * nodes + 1))
                    np.testing.assert_array_equal(histories[index].pull(ids), obvious[index].pull(ids.tolist()))
            for pending, expected in started:
                np.testing.assert_array_equal(pending.wait(), expected)
            histories.synchronize()

    run_ranks(ranks, work)


def rng_of(rank: int, nodes: int, count: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, nodes, count)


def test_all_tables_in_the_messages_of_one():
    def work(communicator):
        histories = DistHistory(BOOK, communicator, [4] * 5)
        sent = []
        for call in (lambda: histories[0].pull([0, 1, 2]), lambda: histories.prefetch([0, 1, 2])):
            before = histories.traffic()["messages"]["sent"]
            call()
            sent.append(histories.traffic()["messages"]["sent"] - before)
        for table in histories:
            table.pull([0, 1, 2])
        assert histories.traffic()["messages"]["sent"] - before == sent[1]
        return sent

    assert run_ranks(3, work) == [[6, 6]] * 3  # counts, ids and rows, to two others


def test_the_background_does_not_wait_for_other_ranks():
    """One rank starts its pulls and goes on before the other has come."""
    gone_on, before = threading.Event(), set(threading.enumerate())
    book = PartBook.contiguous([0, 2, 4])

    def work(communicator):
        with DistHistory(book, communicator, [1], background=True) as histories:
            histories[0].push(np.full((4, 1), 7.0), np.arange(4)) if communicator.rank else histories[0].push([], [])
            if communicator.rank:
                assert gone_on.wait(20)
            histories.prefetch([0, 3])
            pending = histories[0].pull_async([1, 2])
            gone_on.set()
            assert histories[0].pull([0, 3]).tolist() == pending.wait().tolist() == [[7.0], [7.0]]

    run_ranks(2, work)
    assert not [thread for thread in set(threading.enumerate()) - before if "history" in thread.name]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("bad", "error"), [([30], ArgumentIndexError), ([0.5], ArgumentTypeError)])
def test_bad_nodes_of_one_rank(background, bad, error):
    """That rank says what is wrong, the others who it was, at the call or at the pull; then all go on."""

    def work(communicator):
        expected = error if communicator.rank == 1 else RankError
        ids = bad if communicator.rank == 1 else [0]
        with DistHistory(BOOK, communicator, [1, 1], background=background) as histories:
            for call in (
                lambda: histories[1].pull_async(ids).wait(),
                lambda: (histories.prefetch(ids), histories[0].pull(ids)),
            ):
                with pytest.raises(expected, match="n_id needs"):
                    call()
            histories.prefetch([1])
            return histories[0].pull([1]).tolist()

    assert run_ranks(3, work) == [[[0.0]]] * 3


def test_ranks_that_pull_what_they_have_not_prefetched():
    def work(communicator):
        histories = DistHistory(BOOK, communicator, [1])
        histories.prefetch([0])
        if communicator.rank:
            histories[0].pull([0])
        with pytest.raises(CommunicatorError) as told:
            histories[0].pull([1])
        return str(told.value)

    for text in run_ranks(3, work):
        assert "rank 0 is in DistHistory[0].pull of other nodes than it has prefetched; rank 1 is in" in text


def test_restored_rows_are_not_those_prefetched(tmp_path):
    def work(communicator):
        histories = DistHistory(BOOK, communicator, [1])
        histories[0].push([[3.0]], [communicator.rank])
        histories.save(tmp_path)
        histories[0].push([[4.0]], [communicator.rank])
        histories.prefetch([0, 1, 2])
        histories.restore(tmp_path)
        return histories[0].pull([0, 1, 2]).ravel().tolist()

    assert run_ranks(3, work) == [[3.0] * 3] * 3


def test_engines_that_one_thread_alone_may_use():
    def work(communicator):
        communicator.concurrent = communicator.rank != 1
        with pytest.raises(RankError if communicator.concurrent else ArgumentValueError, match="background needs"):
            DistHistory(BOOK, communicator, [1], background=True)
        with pytest.raises(RankError, match="background false where others have true"):
            communicator.concurrent = True
            DistHistory(BOOK, communicator, [1], background=communicator.rank != 1)

    run_ranks(3, work)


def test_ranges_beyond_the_graph():
    def work(communicator):
        histories = DistHistory(BOOK, communicator, [1])
        for offset, count, text in (
            ([25], [10], "ranges within 0 to 30"), ([0], [-1], "ranges within"), ([0, 1], [1], "a length for each"),
        ):  # fmt: skip
            with pytest.raises(ArgumentValueError, match=text):
                histories[0].push(np.zeros((10, 1)), offset=offset, count=count)

    run_ranks(3, work)
