"""A CUDA stream of a background thread, whose arrays stay valid for the reader's stream."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from gglspeedup.errors import cuda_failures


class SideStream:
    """A non-blocking stream that fills arrays which another stream reads, on one device.

    CuPy's pool gives freed memory to the next allocation of the stream that it was allocated on. Here the reader works
    on another stream, and frees an array while its own kernels on it may still be queued. Memory therefore goes back
    to the pool only once the reader's stream has passed the point at which the array was let go of.

    Parameters
    ----------
    index : int
        The CUDA ordinal.
    between : SideStream, optional
        Another one that reads the arrays before the reader does.
    """

    def __init__(self, index: int, between: SideStream | None = None) -> None:
        import cupy

        self._cupy: Any = cupy
        self.index = index
        with self._on_device():
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self._between = between
        self._reader: Any = None
        # Arrays are let go of whenever the garbage collector says so, by any thread: appending needs no lock.
        self._let_go: collections.deque[tuple[Any, list[Any]]] = collections.deque()

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make the device current for a block of code, whose CUDA errors become errors of this library."""
        with cuda_failures(self.index), self._cupy.cuda.Device(self.index):
            yield

    def current(self) -> int:
        """Return the calling thread's current CuPy stream, as a pointer."""
        with self._on_device():
            return int(self._cupy.cuda.get_current_stream().ptr)

    def mark(self) -> Any:
        """Mark this point of the calling thread's current CuPy stream."""
        with self._on_device():
            return self._cupy.cuda.get_current_stream().record(self._cupy.cuda.Event(disable_timing=True))

    @contextlib.contextmanager
    def filling(self, after: Any = None) -> Iterator[None]:
        """Make the stream current in this thread, with memory that respects the reader.

        Parameters
        ----------
        after : cupy.cuda.Event, optional
            What the stream waits for first.
        """
        with self._on_device(), self._stream, self._cupy.cuda.using_allocator(self._allocate):
            if after is not None:
                self._stream.wait_event(after)
            self._free()
            yield

    def synchronize(self) -> None:
        """Wait until all that was enqueued on the stream is done."""
        with self._on_device():
            self._stream.synchronize()

    def record(self) -> Any:
        """Mark this point of the stream."""
        with self._on_device():
            return self._stream.record(self._cupy.cuda.Event(disable_timing=True))

    def hand_over(self, event: Any, reader: int | None) -> None:
        """Let the calling thread's current CuPy stream wait for a mark.

        Parameters
        ----------
        event : cupy.cuda.Event
            Of :meth:`record`.
        reader : int, optional
            The stream on which the arrays will be read, as a pointer; None if the framework does not say.
        """
        with self._on_device():
            self._cupy.cuda.get_current_stream().wait_event(event)
        self.read_on(reader)

    def read_on(self, reader: int | None) -> None:
        """Take note of the stream on which the arrays will be read, as :meth:`hand_over`, without a wait."""
        with self._on_device():
            self._reader = None if reader is None else self._cupy.cuda.ExternalStream(reader, self.index)

    def _allocate(self, size: int) -> Any:
        cuda = self._cupy.cuda
        memory = self._cupy.get_default_memory_pool().malloc(size)
        owned = cuda.UnownedMemory(memory.ptr, size, _Lease(self, memory), self.index)
        return cuda.MemoryPointer(owned, 0)

    def let_go(self, memory: Any) -> None:
        """Take memory that no array uses any more, but that kernels of the reader may."""
        marks: list[Any] = []
        # Without marks the host will wait for the whole device: a destructor has nobody to raise its errors to.
        with contextlib.suppress(Exception):
            marks = self._marks(self._reader)
        self._let_go.append((memory, marks))

    def _marks(self, reader: Any) -> list[Any]:
        if reader is None:
            return []
        with self._on_device():
            marks = [reader.record(self._cupy.cuda.Event(disable_timing=True))]
            if self._between is not None:
                # Of what is dropped before it comes to the reader, that one's mark says nothing.
                marks.append(self._between.record())
            return marks

    def _free(self) -> None:
        """Give back to the pool what the reader's stream has passed."""
        waiting = [self._let_go.popleft() for _ in range(len(self._let_go))]
        try:
            if any(not marks for _, marks in waiting):
                # Of a framework that does not name its stream nothing less than this is known to be enough.
                self._cupy.cuda.runtime.deviceSynchronize()
                waiting = []
            waiting = [entry for entry in waiting if not all(mark.done for mark in entry[1])]
        finally:
            self._let_go.extend(waiting)  # after an error, all of it


class _Lease:
    """The owner of an array's memory: when the last array on it dies, the memory is let go of."""

    def __init__(self, side: SideStream, memory: Any) -> None:
        self._side = side
        self._memory = memory

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then CuPy may be gone, and the memory goes with the process
            self._side.let_go(self._memory)
