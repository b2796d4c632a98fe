"""How ranks talk: four methods that an engine has to offer, and the errors of talking."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, GGLSpeedupError, explain
from gglspeedup.memory import BufferPool

if TYPE_CHECKING:
    from typing_extensions import Self

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

# Of waiting for other ranks. Half a minute is left for all of them to say why they end.
TIMEOUT_SECONDS = 25.0
_BUSY_SECONDS = 0.0003  # for so long a wait only yields its core; messages of a fast network are there by then
_PAUSE_SECONDS = 0.00002  # and some 60 microseconds that a sleep of any length takes
_LOOK_SECONDS = 0.05  # between two looks at whether another rank has given up

_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))


class CommunicatorError(GGLSpeedupError, RuntimeError):
    """Ranks can no longer talk: one has died, has given up, has not come, or is in another call."""


class RankError(GGLSpeedupError, RuntimeError):
    """Another rank could not do its part of a call, or differs in what all must have in common.

    No rank has done anything then, and the communicator can be used further.
    """


class Communicator(ABC):
    """What the distributed classes need of an engine: four methods, of which two can be left to this class.

    All ranks call the first three in the same order. Each returns once this rank has what it is owed, and raises
    CommunicatorError if another rank dies, gives up, or does not come within `timeout`; after that none may be called.
    Used as ``with communicator:``, it tells the other ranks of an exception that leaves the block.

    An engine whose peers read device memory may take and return arrays of the device in :meth:`exchange`, and says so
    by `device_buffers`: counts and messages stay on the host. NcclCommunicator does, and MpiCommunicator if it is told
    to; the others take NumPy's.

    Attributes
    ----------
    rank, size : int
        Which of how many this is.
    timeout : float
        Seconds that a rank waits for another.
    step : str
        What errors say that this rank was doing; set by those who call.
    concurrent : bool
        Whether a thread may use it while other threads use other communicators.
    device_buffers : bool
        Whether :meth:`exchange` takes CuPy arrays as well.
    device_index : int or None
        The one CUDA device whose arrays it takes, if it takes no others.
    """

    concurrent = True
    device_buffers = False
    device_index: int | None = None

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, checked_timeout(timeout)
        self.step = "a call"
        self._pool = BufferPool()

    @abstractmethod
    def exchange(self, rows: Any, send_counts: Sequence[int] | Ids, receive_counts: Sequence[int] | Ids) -> Any:
        """Send rows to all ranks and return theirs.

        Parameters
        ----------
        rows : C-contiguous array [sum(send_counts), ...]
            Those for rank 0 first, then those for rank 1, ...; of any dtype.
        send_counts : int [size]
            How many are for each rank. Those for this rank are copied.
        receive_counts : int [size]
            How many come from each rank, as they count them; their rows are of the same dtype and width.

        Returns
        -------
        array [sum(receive_counts), ...]
            By rank; a buffer of its own.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on: what they wait for or call next raises `reason`."""

    def heard(self) -> str | None:
        """Return what another rank has said of why it ends, None if none did or the engine does not tell."""
        return None

    def exchange_counts(self, send: Ids) -> Ids:
        """Send row r to rank r, and return what each rank has sent: int64 [size, k] both, of one k for all ranks."""
        ones = [1] * self.size
        received: Ids = self.exchange(np.ascontiguousarray(send, np.int64), ones, ones)
        return received

    def gather_all(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank; they should be short."""
        lengths = self.exchange_counts(np.full((self.size, 1), len(message), np.int64))[:, 0]
        sent = np.frombuffer(message * self.size, np.uint8)
        received = self.exchange(sent, [len(message)] * self.size, lengths)
        ends = np.cumsum(lengths)
        return [received[end - length : end].tobytes() for length, end in zip(lengths, ends, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        # These all ranks have raised, or can go on after; the others need not be told.
        if error is not None and not isinstance(error, (RankError, CommunicatorError)):
            self.abort(f"{type(error).__name__}: {error}")

    def _wait(self, done: Callable[[], bool], failure: Callable[[], str | None], missing: Callable[[], str]) -> None:
        """Wait until `done`; abort and raise if there is a `failure`, or on the timeout, with what is `missing`."""
        start = time.monotonic()
        look = start + _LOOK_SECONDS
        while not done():
            now = time.monotonic()
            if now - start < _BUSY_SECONDS:
                _yield_core()
            else:
                time.sleep(_PAUSE_SECONDS)
            if now < look:
                continue
            look = now + _LOOK_SECONDS
            reason = failure()
            if reason is None and now - start > self.timeout:
                reason = self.not_come(missing())
            if reason is not None:
                self.abort(reason)
                raise CommunicatorError(reason)

    def not_come(self, ranks: str) -> str:
        """Return what to say of ranks that were waited for in vain."""
        return f"{ranks} did not come to {self.step} within {self.timeout:g} s: dead, stuck, or in another call"


def checked_timeout(timeout: float) -> float:
    """Return a number of seconds; raise ArgumentTypeError or ArgumentValueError if it is none above 0."""
    remedy = "pass the longest time that a rank may be away from the others"
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise ArgumentTypeError(explain("timeout", "seconds", repr(timeout), remedy))
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ArgumentValueError(explain("timeout", "seconds above 0", timeout, remedy))
    return float(timeout)


def check_concurrent(communicator: Communicator, argument: str) -> None:
    """Raise ArgumentValueError if a communicator is of no use to a background thread."""
    if not communicator.concurrent:
        remedy = "initialise MPI with THREAD_MULTIPLE, as mpi4py does by itself, or do without a background thread"
        raise ArgumentValueError(explain(argument, "an engine that several threads may use", "another", remedy))


def offsets_of(counts: Sequence[int] | Ids) -> Ids:
    """Return where the rows of each rank begin, int64 [size + 1]."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 2" or "ranks 1, 2"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
