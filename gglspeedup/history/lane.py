"""Jobs run one after the other in the order given: at once while none is waiting, else by a thread of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.prefetch import ForkedError
from gglspeedup.trace import span


class Lane:
    """A queue of jobs with one worker thread, which ends when this object is gone.

    Parameters
    ----------
    depth : int
        The most jobs that wait; :meth:`submit` blocks beyond.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self.lock = threading.RLock()  # held by who gives a job, not by who runs one
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._closed = False
        self._worker = ThreadPoolExecutor(1, "gglspeedup-history")
        self._room = threading.Semaphore(self._depth)
        self._last: Future[Any] | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running in the thread."""
        return self._last is not None and not self._last.done()

    @property
    def ours(self) -> bool:
        """Whether this process started the lane, and is not a fork."""
        return os.getpid() == self._process

    def run(self, job: Callable[[], Any]) -> Any:
        """Run a job after all that were given before, and return its result: here if none is left, else in the thread.

        Raises what an earlier submitted job has raised that nobody waited for, without running this one.
        """
        with self.lock:
            self.check()
            if not self.busy:
                return job()
            last = self._submit(job, False)
        return last.result()

    def submit(self, job: Callable[[], Any], awaited: bool = False) -> Future[Any]:
        """Let the thread run a job after all that were given before.

        Parameters
        ----------
        job : function
            Without arguments.
        awaited : bool
            Whether the caller will ask the future for the job's error; else the next call on this lane raises it.
        """
        with self.lock:
            self.check()
            return self._submit(job, not awaited)

    def _submit(self, job: Callable[[], Any], keep_failure: bool) -> Future[Any]:
        self._room.acquire()

        def work() -> Any:
            try:
                with span("history lane"):
                    return job()
            except BaseException as error:
                if keep_failure:
                    self._failure = error
                raise
            finally:
                self._room.release()

        self._last = self._worker.submit(work)
        return self._last

    def drain(self) -> None:
        """Wait for all jobs, and raise what one of them has raised that nobody waited for."""
        with self.lock:
            last = self._last
        if last is not None:
            last.exception()
        with self.lock:
            self.check()

    def check(self) -> None:
        """Raise what a job has raised that nobody waited for.

        Raises
        ------
        ForkedError
            The process was forked while jobs were waiting.
        ArgumentValueError
            The lane is closed.
        """
        if self._closed:
            raise ArgumentValueError(explain("store", "to be open", "a closed one", "make or load it again"))
        if not self.ours:
            waiting = self.busy
            self._start()
            if waiting:
                raise ForkedError("the process was forked while histories were written; synchronize() before forking")
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Run what is waiting and end the thread."""
        self._closed = True
        if self.ours:
            self._worker.shutdown(wait=True)
