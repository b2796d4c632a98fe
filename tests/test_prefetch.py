"""An iterator ahead of its reader: the same items, bounded, and a thread that always ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup.prefetch import ForkedError, Prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gglspeedup-prefetch"]


@pytest.fixture(autouse=True)
def _no_leaked_thread():
    yield
    assert not threads()


class Counting:
    """An endless source that knows how far it got and whether it was closed."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self) -> int:
        self.made += 1
        return self.made - 1

    def close(self) -> None:
        self.closed += 1


def settled(source: Counting) -> int:
    """How many items the thread has made once it makes no more."""
    seen = -1
    while source.made != seen:
        seen = source.made
        time.sleep(0.05)
    return seen


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers()), st.integers(1, 5))
def test_items_and_order_are_those_of_the_source(items, depth):
    assert list(Prefetched(iter(items), depth)) == items


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_ahead(depth):
    source = Counting()
    ahead = Prefetched(source, depth)
    assert settled(source) == depth
    for taken in range(1, 6):
        assert next(ahead) == taken - 1
        assert settled(source) == depth + taken
    ahead.close()


def test_break_ends_the_thread_and_closes_the_source():
    source = Counting()
    for item in Prefetched(source, 3):
        if item == 4:
            break
    assert not threads() and source.closed == 1


def test_letting_go_ends_the_thread_even_while_it_waits():
    source = Counting()
    ahead = Prefetched(source, 1)
    settled(source)
    assert len(threads()) == 1
    del ahead
    assert not threads() and source.closed == 1


def test_garbage_in_a_cycle_is_collected():
    source = Counting()
    ring: list = [Prefetched(source, 1)]
    ring.append(ring)
    del ring
    gc.collect()
    assert not threads() and source.closed == 1


def test_close_may_be_called_again_and_ends_the_iteration():
    ahead = Prefetched(Counting(), 2)
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert list(ahead) == []


def test_exception_of_the_source_comes_in_its_place_with_its_traceback():
    def failing():
        yield 1
        yield 2
        raise ZeroDivisionError("the third item")

    ahead = Prefetched(failing(), 4)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="the third item") as caught:
        next(ahead)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_base_exception_does_not_vanish():
    def exiting():
        raise SystemExit(3)
        yield

    with pytest.raises(SystemExit):
        next(Prefetched(exiting(), 1))


def test_an_abandoned_thread_lets_go_of_its_items():
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    ahead = Prefetched((Item() for _ in range(100)), 3)
    for _ in range(10):
        next(ahead)
    assert Item.alive <= 4
    ahead.close()
    assert Item.alive == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told():
    ahead = Prefetched(Counting(), 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            next(ahead)
        except ForkedError:
            status = 0
        finally:
            ahead.close()  # waits for no thread, as none is there
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    ahead.close()


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_iterator_alive_at_exit_does_not_hang_the_process():
    process = run(
        "import itertools\nfrom gglspeedup.prefetch import Prefetched\n"
        "kept = Prefetched(itertools.count(), 2)\nprint(next(kept))"
    )
    out, error = process.communicate(timeout=30)
    assert (out, error, process.returncode) == ("0\n", "", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_stops_a_waiting_reader():
    process = run(
        "import threading, time\nfrom gglspeedup.prefetch import Prefetched\n"
        "def slow():\n    yield 0\n    print('waiting', flush=True)\n    time.sleep(1)\n    yield 1\n"
        "try:\n    for item in Prefetched(slow(), 1): pass\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
        "print(threading.active_count())\n"  # the traceback, which holds the iterator, is gone by now
    )
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert (out, error) == ("stopped\n1\n", "")
