"""Any iterable ahead of its reader, with stages: the plain loop's batches, and threads that always end."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup import CGPUFeature, GPUSampler, NodeLoader, Prefetcher
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError
from gglspeedup.prefetch import ForkedError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gglspeedup-prefetch"]


@pytest.fixture(autouse=True)
def _no_leaked_thread():
    yield
    assert not threads()


class Fault(Exception):
    """What a failing source or stage raises."""


def failing_at(fault: int):
    def stage(item):
        if item == fault:
            raise Fault(item)
        return item

    return stage


def outcome(batches) -> tuple[list, object]:
    """The batches up to an exception, and what the exception says."""
    taken: list = []
    try:
        for batch in batches:
            taken.append(batch)
    except Fault as fault:
        return taken, fault.args
    return taken, None


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 9), max_size=12), st.integers(0, 4), st.integers(0, 3), st.integers(-1, 9),
    st.integers(0, 3), st.integers(0, 12),
)  # fmt: skip
def test_batches_and_faults_are_those_of_the_plain_loop(items, depth, count, fault, where, stop):
    stages = [failing_at(fault) if k == where else lambda item: item for k in range(count)]

    def source():
        yield from map(failing_at(fault), items) if where == count else items

    def plain():
        for item in source():
            for stage in stages:
                item = stage(item)
            yield item

    ahead = Prefetcher(source, depth, stages)
    for _ in range(2):  # an epoch leaves nothing to the next
        assert outcome(ahead) == outcome(plain())
        assert outcome(itertools.islice(iter(ahead), stop)) == outcome(itertools.islice(plain(), stop))
    assert not threads()


def test_each_stage_has_a_thread_and_they_overlap():
    """Every stage waits for the others to be at work at once, which one thread could never do."""
    meeting = threading.Barrier(3, timeout=20)
    seen: list[set] = [set(), set(), set()]

    def numbers():
        for number in range(6):
            seen[0].add(threading.get_ident())
            if number >= 2:  # the third batch, while the stages have the second and the first
                meeting.wait()
            yield number

    def first(item):
        seen[1].add(threading.get_ident())
        if 1 <= item <= 4:
            meeting.wait()
        return item

    def second(item):
        seen[2].add(threading.get_ident())
        if item <= 3:
            meeting.wait()
        return item

    assert list(Prefetcher(numbers, 1, [first, second])) == list(range(6))
    assert all(len(idents) == 1 for idents in seen) and len(set.union(*seen)) == 3
    assert threading.get_ident() not in set.union(*seen)


@pytest.mark.parametrize("depth, stages", [(1, 0), (2, 1), (3, 2)])
def test_never_more_batches_than_said(depth, stages):
    made = 0

    def endless():
        nonlocal made
        while True:
            made += 1
            yield made

    iterator = iter(Prefetcher(endless, depth, [lambda item: item] * stages))
    assert made == 0 and not threads()  # until somebody reads
    assert next(iterator) == 1
    seen = -1
    while made != seen:
        seen = made
        time.sleep(0.05)
    # Stages wait for room before they take a batch, so those at rest hold none.
    assert made == 1 + (stages + 1) * depth and len(threads()) == stages + 1
    iterator.close()


def test_an_iterator_is_refused_and_a_function_is_not():
    def numbers():
        yield 1

    for once in (numbers(), iter([1]), map(int, "1")):
        with pytest.raises(ArgumentTypeError, match="iterated again"):
            Prefetcher(once)
    ahead = Prefetcher(numbers)
    assert [list(ahead), list(ahead)] == [[1], [1]]
    with pytest.raises(TypeError):
        len(ahead)
    assert len(Prefetcher("abc")) == 3


@pytest.mark.parametrize(
    "arguments", [(3,), ([], "2"), ([], 1.5), ([], 2, 7), ([], 2, [3]), ([], 2, lambda item: item)]
)  # fmt: skip
def test_bad_types(arguments):
    with pytest.raises(ArgumentTypeError):
        Prefetcher(*arguments)


def test_bad_values():
    with pytest.raises(ArgumentValueError, match="depth needs at least 0"):
        Prefetcher([], -1)


class Endless:
    """A source whose iterators say when they are closed."""

    closed = 0

    def __iter__(self):
        try:
            yield from itertools.count()
        finally:
            Endless.closed += 1


@pytest.fixture
def endless():
    Endless.closed = 0
    return Prefetcher(Endless(), 2, [lambda item: item, lambda item: item])


def test_break_ends_the_threads_and_closes_the_source(endless):
    for item in endless:
        if item == 5:
            assert len(threads()) == 3
            break
    assert not threads() and Endless.closed == 1


def test_an_exception_of_the_reader_ends_the_threads(endless):
    with pytest.raises(Fault):
        for _ in endless:
            raise Fault
    gc.collect()  # the traceback had the iterator
    assert not threads() and Endless.closed == 1


def test_garbage_in_a_cycle_is_collected(endless):
    ring: list = [iter(endless)]
    next(ring[0])
    ring.append(ring)
    del ring
    gc.collect()
    assert not threads() and Endless.closed == 1


def test_garbage_may_be_collected_by_a_thread_of_the_pipeline():
    """The iterating thread ends the stage's, which waits for it."""
    abandoned = threading.Event()

    def source():
        yield 0
        abandoned.wait(20)
        gc.collect()
        yield from itertools.count(1)

    gc.disable()
    try:
        ring: list = [iter(Prefetcher(source, 1, [lambda item: item, lambda item: item]))]
        assert next(ring[0]) == 0
        ring.append(ring)
        del ring
        abandoned.set()
        end = time.monotonic() + 20
        while threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert not threads()
    finally:
        gc.enable()


def test_nested_and_side_by_side():
    inner = Prefetcher(range(20), 2, [lambda item: item + 1])
    outer = Prefetcher(inner, 1, [lambda item: item * 2])
    expected = [2 * item for item in range(1, 21)]
    assert list(outer) == expected
    assert list(zip(outer, outer, strict=True)) == list(zip(expected, expected, strict=True))
    for row in outer:
        assert next(iter(outer)) == 2 and row
        break


def test_tracebacks_lead_to_the_fault():
    def faulty(item):
        raise Fault(item)

    def failing_source():
        yield 1
        raise Fault("source")

    with pytest.raises(Fault) as caught:
        list(Prefetcher([1], stages=[faulty]))
    assert "faulty" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(Fault) as caught:
        list(Prefetcher(failing_source, stages=[lambda item: item]))
    assert "failing_source" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(RuntimeError, match="StopIteration"):  # would otherwise look like the end
        list(Prefetcher([1], stages=[lambda item: next(iter([]))]))


def test_batches_that_nobody_wants_any_more_are_let_go_of():
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    def items():
        for _ in range(100):
            yield Item()

    taken = itertools.islice(iter(Prefetcher(items, 2, [lambda item: item])), 10)
    for _ in taken:
        # Two queues of two, the stage's, the one that is made, and the reader's, which `for` keeps.
        assert Item.alive <= 4 + 3
    del taken, _
    assert Item.alive == 0


def same(batch, other) -> bool:
    return (
        np.array_equal(batch.n_id, other.n_id) and np.array_equal(batch.x, other.x) and np.array_equal(batch.y, other.y)
        and all(np.array_equal(a.edge_index, b.edge_index) for a, b in zip(batch.adjs, other.adjs, strict=True))
    )  # fmt: skip


def test_a_node_loader_of_no_threads_of_its_own():
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 60, 8)
    x, y = rng.random((60, 5), np.float32), rng.integers(0, 3, 60)
    kinds = {"seeds": np.arange(50), "sizes": [3, 2], "batch_size": 8, "device": "cpu", "seed": 4}
    serial, wrapped, own = (NodeLoader(graph, x, y, prefetch=prefetch, **kinds) for prefetch in (0, 0, 2))
    ahead = Prefetcher(wrapped)
    assert len(ahead) == len(serial) == 7
    for _ in range(3):  # each iteration is the next epoch, as without
        for batch, other, third in zip(serial, ahead, own, strict=True):
            assert same(batch, other) and same(batch, third)
    assert wrapped.epoch == 3


def test_sampling_and_gathering_as_stages():
    rng = np.random.default_rng(1)
    graph = random_graph(rng, 80, 6)
    x = CGPUFeature(graph, "cpu")
    x.from_cpu_tensor(rng.random((80, 3), np.float32))
    sampler = GPUSampler("cpu", graph, [4, 4], seed=2)

    def sampled(numbered):
        return sampler.sample(numbered[1], numbered[0])

    def gathered(batch):
        return batch.n_id, x[batch.n_id]

    parts = list(enumerate(np.array_split(rng.permutation(80), 9)))
    expected = [gathered(sampled(part)) for part in parts]
    for depth in (0, 1, 3):
        found = list(Prefetcher(parts, depth, [sampled, gathered]))
        for one, other in zip(found, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_torch_data_loader(workers):
    """Shuffled by torch's global generator, from which the reader draws as well."""
    import torch

    data = torch.utils.data.TensorDataset(torch.arange(20))
    loader = torch.utils.data.DataLoader(
        data, 3, shuffle=True, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )  # fmt: skip

    def read(batches):
        torch.manual_seed(0)
        return [(batch.tolist(), torch.rand(1).item()) for _ in range(2) for (batch,) in batches]

    assert read(Prefetcher(loader, 2)) == read(loader)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_may_start_its_own(endless):
    iterator = iter(endless)
    next(iterator)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            next(iterator)
        except ForkedError:
            status = 0 if list(Prefetcher([1, 2], 1, [str])) == ["1", "2"] else 2
        finally:
            del iterator
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert next(iterator) == 1
    iterator.close()


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_iterator_alive_at_exit_does_not_hang_the_process():
    process = run(
        "import itertools\nfrom gglspeedup import Prefetcher\n"
        "kept = iter(Prefetcher(itertools.count, 2, [str, str]))\nprint(next(kept))"
    )
    out, error = process.communicate(timeout=30)
    assert (out, error, process.returncode) == ("0\n", "", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_stops_a_waiting_reader():
    process = run(
        "import threading, time\nfrom gglspeedup import Prefetcher\n"
        "def slow():\n    yield 0\n    time.sleep(1)\n    yield 1\n"
        "try:\n    for item in Prefetcher(slow, 1, [str, str]): print('waiting', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
        "print(threading.active_count())\n"
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (out.replace("waiting\n", ""), error) == ("stopped\n1\n", "")
