"""Memory of a side stream: it goes back to the pool only after the reader's stream has passed. On a stand-in CuPy."""

from __future__ import annotations

import contextlib
import gc
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gglspeedup.side_stream import SideStream


class Event:
    """A mark that the test lets pass."""

    def __init__(self, disable_timing: bool) -> None:
        assert disable_timing
        self.done = False
        self.stream: Any = None


class Stream:
    """Records what it was asked for; entered, it is the current one."""

    current: Any = None

    def __init__(self, name: str = "side", non_blocking: bool = True) -> None:
        assert non_blocking  # else the default stream would wait for it, and it for the default stream
        self.name = name
        self.waits: list[Event] = []

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_: object) -> None:
        Stream.current = self.before

    def record(self, event: Event) -> Event:
        event.stream = self.name
        return event

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)


class Pooled:
    """A piece of the pool's memory; gone, it is free for the next allocation."""

    def __init__(self, pool: list, size: int) -> None:
        assert Stream.current is not None  # allocated in the arena of the side stream
        self.pool, self.ptr, self.size = pool, id(self), size

    def __del__(self) -> None:
        self.pool.append(self.ptr)


@pytest.fixture
def cupy(monkeypatch):
    allocators: list = []
    freed: list[int] = []
    synchronised: list[int] = []

    @contextlib.contextmanager
    def using_allocator(allocator):
        allocators.append(allocator)
        yield
        allocators.pop()

    stand_in = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(), Stream=Stream, Event=Event, using_allocator=using_allocator,
            ExternalStream=lambda pointer, index: Stream(f"reader {pointer} on {index}"),
            get_current_stream=lambda: Stream.current,
            UnownedMemory=lambda pointer, size, owner, index: (pointer, owner),
            MemoryPointer=lambda memory, offset: memory,
            runtime=SimpleNamespace(deviceSynchronize=lambda: synchronised.append(len(freed))),
        ),
        get_default_memory_pool=lambda: SimpleNamespace(malloc=lambda size: Pooled(freed, size)),
        allocators=allocators, freed=freed, synchronised=synchronised,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(Stream, "current", Stream("caller"))
    return stand_in


def filled(side: SideStream, cupy: Any) -> Any:
    """An array's memory, as allocated while the side stream is being filled."""
    with side.filling():
        assert Stream.current.name == "side"
        return cupy.allocators[-1](100)


def test_memory_waits_for_the_readers_stream(cupy):
    side = SideStream(3)
    array = filled(side, cupy)
    event = side.record()
    assert event.stream == "side"
    side.hand_over(event, 77)
    assert Stream.current.waits == [event]
    del array
    gc.collect()
    (mark,) = side._let_go[0][1]
    assert mark.stream == "reader 77 on 3" and cupy.freed == []
    with side.filling():
        assert cupy.freed == []  # the reader has not passed yet
    mark.done = True
    with side.filling():
        assert len(cupy.freed) == 1 and cupy.synchronised == []


def test_memory_waits_for_every_stream_that_reads_it(cupy):
    gathering = SideStream(3)
    sampling = SideStream(3, gathering)
    gathering._stream.name = "between"
    array = filled(sampling, cupy)
    mark = sampling.record()
    with gathering.filling(after=mark):
        assert Stream.current.waits == [mark]
    sampling.read_on(77)
    assert Stream.current.waits == []  # it waits for the stream between, which has waited for this one
    del array
    gc.collect()
    marks = sampling._let_go[0][1]
    assert [mark.stream for mark in marks] == ["reader 77 on 3", "between"]
    for mark in marks:
        with sampling.filling():
            assert cupy.freed == []
        mark.done = True
    with sampling.filling():
        assert len(cupy.freed) == 1 and cupy.synchronised == []


def test_a_reader_of_unknown_stream_is_waited_for_by_the_host(cupy):
    side = SideStream(0)
    array = filled(side, cupy)
    side.hand_over(side.record(), None)
    del array
    gc.collect()
    assert cupy.freed == []
    with side.filling():
        assert cupy.synchronised == [0] and len(cupy.freed) == 1  # first the wait, then the pool


def test_memory_that_no_reader_ever_saw_is_waited_for_too(cupy):
    side = SideStream(0)
    filled(side, cupy)
    gc.collect()
    with side.filling():
        assert cupy.synchronised == [0] and len(cupy.freed) == 1


def test_arrays_in_use_are_left_alone(cupy):
    side = SideStream(0)
    kept = [filled(side, cupy) for _ in range(3)]
    with side.filling():
        assert cupy.freed == [] and cupy.synchronised == []
    assert len(kept) == 3
