"""Calls that all ranks make together: errors travel, differences are named, bytes are counted."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gglspeedup.arguments import check_count
from gglspeedup.distributed.communicator import (
    Communicator,
    CommunicatorError,
    Ids,
    RankError,
)
from gglspeedup.errors import ArgumentTypeError, explain

MOST_COUNTS = 6
_STEP, _FAILED, _FIRST = 0, 1, 2  # columns of a count message
_KINDS = ("counts", "ids", "rows")


class Collective:
    """What one distributed object does with its communicator.

    Parameters
    ----------
    communicator : Communicator
        Of all ranks that have such an object.

    Attributes
    ----------
    traffic : Counter
        Of ``(kind, "sent" or "received")`` in bytes, and ``("messages", ...)``; what stays on a rank is not counted.
    """

    def __init__(self, communicator: Communicator) -> None:
        if not isinstance(communicator, Communicator):
            remedy = "pass an MpiCommunicator, TorchCommunicator or LocalCommunicator"
            raise ArgumentTypeError(explain("communicator", "a Communicator", type(communicator).__name__, remedy))
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size
        self.traffic: Counter[tuple[str, str]] = Counter()
        self._announced: BaseException | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enclose a call that all ranks make: whatever the others have not been told of when it ends it, they are."""
        try:
            yield
        except (RankError, CommunicatorError):
            raise
        except BaseException as error:
            if error is not self._announced:
                self.communicator.abort(f"{type(error).__name__} in {self.communicator.step}: {error}")
            self._announced = None
            raise

    def counts(self, step: str, make: Callable[[], Ids]) -> Ids:
        """Do this rank's part of a step, and exchange up to `MOST_COUNTS` numbers with each rank.

        Parameters
        ----------
        step : str
            The same on all ranks.
        make : function
            Does the part, and returns the numbers, int64 [size, k]: row r for rank r. What it raises is raised here
            once the other ranks have been told.

        Returns
        -------
        int64 array [size, k]
            Row r of rank r.

        Raises
        ------
        RankError
            The part of another rank has failed; all ranks raise, and may go on.
        CommunicatorError
            A rank is in another step: they cannot go on.
        """
        self.communicator.step = step
        message = np.zeros((self.size, _FIRST + MOST_COUNTS), np.int64)
        message[:, _STEP] = zlib.crc32(step.encode())
        failure: Exception | None = None
        width = 0
        try:
            numbers = make()
            width = numbers.shape[1]
            message[:, _FIRST : _FIRST + width] = numbers
        except Exception as error:
            failure = error
            message[:, _FAILED] = 1
        received = self.communicator.exchange_counts(message)
        self._count("counts", [message[:1].nbytes] * self.size, [message[:1].nbytes] * self.size)
        if bool((received[:, _STEP] != message[0, _STEP]).any()) or bool(received[:, _FAILED].any()):
            self._raise(step, failure)
        return received[:, _FIRST : _FIRST + width]

    def _raise(self, step: str, failure: Exception | None) -> None:
        """Find out which rank is in which step, or has failed, and raise; all ranks do."""
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        said = [json.loads(message) for message in self.communicator.gather_all(json.dumps([step, text]).encode())]
        if any(theirs != step for theirs, _ in said):
            where = "; ".join(f"rank {rank} is in {theirs}" for rank, (theirs, _) in enumerate(said))
            reason = f"ranks must make the same calls in the same order, but {where}"
            self.communicator.abort(reason)
            raise CommunicatorError(reason) from failure
        if failure is not None:
            self._announced = failure
            raise failure
        failed = [f"rank {rank} failed in {step}: {error}" for rank, (_, error) in enumerate(said) if error is not None]
        raise RankError("; ".join(failed))

    def exchange(self, kind: str, rows: Any, send_counts: Ids, receive_counts: Ids) -> Any:
        """Exchange rows, as the communicator does; count their bytes as "ids" or "rows"."""
        received = self.communicator.exchange(rows, send_counts, receive_counts)
        width = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
        self._count(kind, np.asarray(send_counts) * width, np.asarray(receive_counts) * width)
        return received

    def _count(self, kind: str, sent: Sequence[int] | Ids, received: Sequence[int] | Ids) -> None:
        for way, amounts in ("sent", sent), ("received", received):
            others = [int(amount) for rank, amount in enumerate(amounts) if rank != self.rank and amount]
            self.traffic[kind, way] += sum(others)
            self.traffic["messages", way] += len(others)

    def traffic_by_kind(self) -> dict[str, dict[str, int]]:
        """Return bytes sent and received as counts, ids and rows, and messages sent and received."""
        return {kind: {way: self.traffic[kind, way] for way in ("sent", "received")} for kind in (*_KINDS, "messages")}

    def same(self, what: str, facts: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Make sure that all ranks have the same facts.

        Parameters
        ----------
        what : str
            What is being made of them: the first of the facts.
        facts : mapping
            Names and JSON values that must be the same.
        own : mapping, optional
            Others, which need not be.

        Returns
        -------
        list of dict
            The `own` of each rank.

        Raises
        ------
        RankError
            They differ; all ranks say which rank in what.
        """
        self.communicator.step = f"the making of {what}"
        mine = {"object": what, **facts}
        text = json.dumps([mine, own or {}]).encode()
        said = [json.loads(message) for message in self.communicator.gather_all(text)]
        differences = []
        for name in dict.fromkeys(name for theirs, _ in said for name in theirs):
            values = [json.dumps(theirs.get(name)) for theirs, _ in said]
            usual = Counter(values).most_common(1)[0][0]  # of equally common ones that of the lowest rank
            odd = [rank for rank, value in enumerate(values) if value != usual]
            differences += [f"rank {rank} has {name} {values[rank]} where others have {usual}" for rank in odd]
        if differences:
            raise RankError(f"ranks need the same {what}, but {'; '.join(differences)}")
        return [theirs for _, theirs in said]


def most_of_all(communicator: Communicator, count: int) -> int:
    """Return the largest of the counts that the ranks call this with."""
    return max(int(message) for message in communicator.gather_all(str(count).encode()))


def even_batches(communicator: Communicator, seeds: Ids, batch_size: int) -> Iterator[Ids]:
    """Give the batches of this rank's seeds, and empty ones at the end until every rank has had as many.

    All ranks have to call what is collective equally often; this is for those with fewer seeds than others.

    Parameters
    ----------
    communicator : Communicator
        Asked once, for the largest number of batches of a rank.
    seeds : int64 array [n]
        Those of this rank.
    batch_size : int
        Seeds a batch.

    Examples
    --------
    >>> from gglspeedup.distributed.local import run_ranks
    >>> run_ranks(2, lambda c: [b.tolist() for b in even_batches(c, np.arange(2 * c.rank + 1), 2)])
    [[[0], []], [[0, 1], [2]]]
    """
    size = check_count(batch_size, "batch_size", 1)
    for index in range(most_of_all(communicator, -(-len(seeds) // size))):
        yield seeds[index * size : (index + 1) * size]
