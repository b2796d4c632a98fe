"""`Workers`: the processes in which a loader's batches are made, and the order in which they come back."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any

from gglspeedup.threads import get_num_threads
from gglspeedup.worker_process import Make, Worker

logger = logging.getLogger("gglspeedup")

# What a worker is: a fork, whose batches lie in memory that is reserved when it is made.
_SUPPORTED = hasattr(os, "fork") and hasattr(os, "posix_fallocate")


class Workers:
    """Processes that make batches, in turn; they are kept from one whole loop to the next.

    Parameters
    ----------
    count : int
        How many; 0 for none, as on systems without `fork`.
    ahead : int
        The most batches that one is asked for at a time.
    """

    def __init__(self, count: int, ahead: int) -> None:
        if count and not _SUPPORTED:
            logger.warning("no worker processes on this system: batches are made in threads")
            count = 0
        self.count, self.ahead = count, ahead
        self._idle: list[Worker] = []
        self._finalizer = weakref.finalize(self, _close, self._idle)

    def each(
        self, requests: Iterable[Any], make: Make, prepare: Callable[[], None]
    ) -> Generator[Any, None, None]:
        """Give the batch of each request, in order.

        Parameters
        ----------
        requests : iterable
            Read as far ahead as workers are asked.
        make : callable
            What each worker does: see :class:`Worker`.
        prepare : callable
            Called before workers are started: loads what each would have to load after the fork.

        Raises
        ------
        Exception
            Of the making of a batch, in its place.
        WorkerError
            A worker has died.
        """
        team = self._team(make, prepare)
        try:
            first = [worker.answered for worker in team]
            waiting: collections.deque[int] = collections.deque()

            def answer() -> Any:
                number = waiting.popleft()
                return team[number].answer(lambda batch: (batch - first[number]) * self.count + number)

            left, group = iter(requests), max(1, self.ahead // 2)
            while True:
                if len(waiting) <= self.count * (self.ahead - group):
                    # Several at a time: a message interrupts what the worker is at.
                    asked = list(islice(left, self.count * group))
                    for number, worker in enumerate(team[: len(asked)]):
                        worker.ask(asked[number :: self.count])
                    waiting.extend(index % self.count for index in range(len(asked)))
                if not waiting:
                    return
                yield answer()
        finally:
            if not self._idle and all(worker.idle for worker in team):
                self._idle.extend(team)
            else:
                _close(team)

    def _team(self, make: Make, prepare: Callable[[], None]) -> list[Worker]:
        team = list[Worker]()
        with contextlib.suppress(IndexError):
            while True:
                team.append(self._idle.pop())  # one at a time: a loop in another thread may do so, too
        if len(team) == self.count and all(worker.idle for worker in team):
            return team
        _close(team)
        prepare()
        threads = max(1, get_num_threads() // self.count)
        try:
            for number in range(self.count):
                team.append(Worker(make, f"gglspeedup-worker-{number}", threads))
        except BaseException:
            _close(team)
            raise
        return team

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (self.count, self.ahead)


def _close(workers: list[Worker]) -> None:
    while workers:
        workers.pop().close()
