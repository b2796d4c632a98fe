"""Jobs of histories on a GPU, enqueued one after the other on a stream of their own."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.side_stream import SideStream


class _Enqueued:
    """The result of a job whose kernels may still be running."""

    def __init__(self, side: SideStream, value: Any, done: Any) -> None:
        self._side, self._value, self._done = side, value, done

    def result(self) -> Any:
        """Let the calling thread's current CuPy stream wait for the job, and return what it returned."""
        self._side.hand_over(self._done, self._side.current())
        return self._value


class StreamLane:
    """A stream of jobs, with the methods of `Lane`. The host waits for none of them, and the caller's stream for those
    alone whose results it asks for.

    Parameters
    ----------
    side : SideStream
        Owned by this lane.
    """

    busy = False  # jobs are enqueued at once; what they wait for is on the device
    ours = True

    def __init__(self, side: SideStream) -> None:
        self._side = side
        self._closed = False
        self.lock = threading.RLock()
        # What jobs read must outlive them: jobs, with the mark that they are done.
        self._running: collections.deque[tuple[Any, Callable[[], Any]]] = collections.deque()

    def run(self, job: Callable[[], Any]) -> Any:
        """Enqueue a job after all that were given before, and return its result, for the current stream to use."""
        return self.submit(job).result()

    def submit(self, job: Callable[[], Any], awaited: bool = False) -> Any:
        """Enqueue a job after all that were given before, and after what the caller has enqueued so far."""
        with self.lock:
            self.check()
            ready = self._side.mark()
            try:
                with self._side.filling(after=ready):
                    value = job()
                    done = self._side.record()
            except BaseException:
                with contextlib.suppress(Exception):
                    self._side.synchronize()  # what the job has enqueued may still read what goes with it
                raise
            while self._running and self._running[0][0].done:
                self._running.popleft()
            self._running.append((done, job))
            return _Enqueued(self._side, value, done)

    def drain(self) -> None:
        """Wait for all jobs."""
        with self.lock:
            self.check()
            self._side.synchronize()
            self._running.clear()

    def check(self) -> None:
        """Raise ArgumentValueError if the lane is closed."""
        if self._closed:
            raise ArgumentValueError(explain("store", "to be open", "a closed one", "make or load it again"))

    def close(self) -> None:
        """Wait for all jobs, and take no more."""
        if not self._closed:
            self._side.synchronize()
            self._running.clear()
            self._closed = True
