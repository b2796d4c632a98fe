"""Ranks within one process: a thread each, or a single one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from gglspeedup.arguments import check_count
from gglspeedup.distributed.communicator import (
    TIMEOUT_SECONDS,
    Communicator,
    CommunicatorError,
    Ids,
    RankError,
    name_ranks,
    offsets_of,
)

Result = TypeVar("Result")


class _Board:
    """Where the ranks of a process lay out what they send."""

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.posted: list[tuple[Any, Ids]] = [(None, np.zeros(size + 1, np.int64))] * size
        self.arrived = [0] * size  # exchanges that each rank has posted rows for
        self.left = [0] * size  # and has read the others' rows of
        self.failure: str | None = None


class LocalCommunicator(Communicator):
    """Ranks that are threads of this process; by itself, the one rank of a job without others.

    Parameters
    ----------
    timeout : float
        Seconds that a rank waits for another.

    Examples
    --------
    >>> LocalCommunicator().gather_all(b"alone")
    [b'alone']
    """

    def __init__(self, *, timeout: float = TIMEOUT_SECONDS) -> None:
        super().__init__(0, 1, timeout)
        self._board = _Board(1)

    @classmethod
    def threads(cls, size: int, *, timeout: float = TIMEOUT_SECONDS) -> list[LocalCommunicator]:
        """Return the communicators of `size` ranks, each to be used by a thread of its own.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            `size` is not at least 1.
        """
        board = _Board(check_count(size, "size", 1))
        ranks = [cls(timeout=timeout) for _ in range(size)]
        for rank, communicator in enumerate(ranks):
            communicator.rank, communicator.size, communicator._board = rank, size, board
        return ranks

    def exchange(self, rows: Any, send_counts: Sequence[int] | Ids, receive_counts: Sequence[int] | Ids) -> Any:
        """Send rows to all ranks and return theirs; see :class:`Communicator`."""
        board, own = self._board, self.rank
        with board.changed:
            board.posted[own] = (rows, offsets_of(send_counts))
            self._meet(board.arrived)
            posted = list(board.posted)
        offsets = offsets_of(receive_counts)
        received = self._pool.empty((int(offsets[-1]), *rows.shape[1:]), rows.dtype)
        for rank, (theirs, begins) in enumerate(posted):
            received[offsets[rank] : offsets[rank + 1]] = theirs[begins[own] : begins[own + 1]]
        with board.changed:
            self._meet(board.left)  # before that, rows must stay as they are
        return received

    def _meet(self, passed: list[int]) -> None:
        """Count this rank among those that have passed a point, and wait for the others; with the lock held."""
        board = self._board
        passed[self.rank] += 1
        turn = passed[self.rank]
        board.changed.notify_all()
        deadline = time.monotonic() + self.timeout
        while board.failure is None and min(passed) < turn:
            if not board.changed.wait(deadline - time.monotonic()):
                board.failure = self.not_come(name_ranks([r for r, count in enumerate(passed) if count < turn]))
                board.changed.notify_all()
        if min(passed) < turn:
            raise CommunicatorError(board.failure)

    def heard(self) -> str | None:
        """Return what another rank has said of why it ends, None if none did."""
        return self._board.failure

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on."""
        with self._board.changed:
            if self._board.failure is None:
                self._board.failure = f"rank {self.rank} gave up: {reason}"
            self._board.changed.notify_all()


def run_ranks(
    size: int, function: Callable[[LocalCommunicator], Result], *, timeout: float = TIMEOUT_SECONDS
) -> list[Result]:
    """Call a function in `size` threads, each with the communicator of its rank, and return their results.

    Raises
    ------
    Exception
        What a rank has raised first; the others are told.

    Examples
    --------
    >>> run_ranks(2, lambda communicator: communicator.gather_all(bytes([communicator.rank])))
    [[b'\\x00', b'\\x01'], [b'\\x00', b'\\x01']]
    """
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(communicator: LocalCommunicator) -> None:
        try:
            results[communicator.rank] = function(communicator)
        except BaseException as error:
            failures.append(error)
            communicator.abort(f"{type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=work, args=(communicator,), name=f"rank {communicator.rank}", daemon=True)
        for communicator in LocalCommunicator.threads(size, timeout=timeout)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # What a rank was told by another says less than what that one has raised.
        raise min(failures, key=lambda error: isinstance(error, (CommunicatorError, RankError)))
    return results
