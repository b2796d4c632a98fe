"""One table of a history store, as users hold it, and what the tables of a store share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import host_ids
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, explain
from gglspeedup.history import history_file
from gglspeedup.history.history_file import Header
from gglspeedup.history.lane import Lane
from gglspeedup.history.lane_gpu import StreamLane
from gglspeedup.history.tables_cpu import HostTable
from gglspeedup.trace import span

if TYPE_CHECKING:
    from gglspeedup.history.tables_gpu import CudaTable

Ids = npt.NDArray[np.int64]


class PendingPull:
    """Rows that are being pulled; :meth:`wait` returns them."""

    def __init__(self, pending: Any, deliver: Callable[[Any], Any]) -> None:
        self._pending, self._deliver = pending, deliver

    def wait(self) -> Any:
        """Return the rows, as :meth:`History.pull` does, once they are there."""
        with span("history pull") as pulled:
            rows = self._deliver(self._pending.result())
            pulled.moved(rows.nbytes)
        return rows


class Common:
    """What the tables of a store share: the order of pushes and pulls, and the file. Closed when the last is gone.

    Parameters
    ----------
    lane : Lane or StreamLane
        The order.
    queues : bool
        Whether every push is left to the lane, or only those that find it at work.
    header : Header
        Sizes, and the pushes so far.
    arrays : sequence of (stamps, rows)
        Of each table, those of the file.
    path : str, optional
        The file that they are mapped to.
    pushes : int64 array, optional
        Where to count pushes, if other processes count theirs there.
    """

    def __init__(
        self, lane: Lane | StreamLane, queues: bool, header: Header, arrays: Sequence[tuple[Any, Any]],
        path: str | None, pushes: Ids | None = None,
    ) -> None:  # fmt: skip
        self.lane, self.queues = lane, queues
        self.pushes: Any = list(header.pushes) if pushes is None else pushes
        self._shared = pushes is not None
        self.close = weakref.finalize(self, _close, lane, path, header, arrays, self.pushes)


    def next_number(self, table: int) -> int:
        """Return the number of the next push to a table, which is counted once it is on its way.

        Where other processes push as well, it is counted at once.
        """
        if not self._shared:
            return int(self.pushes[table]) + 1
        from gglspeedup.kernels.history_cpu import next_number

        return int(next_number(self.pushes, table))

    def count(self, table: int, number: int) -> None:
        """Count a push that is on its way."""
        if not self._shared:
            self.pushes[table] = number


class History:
    """One table of a store: a row for each node. Pulls see every push made before them, and none made after."""

    def __init__(self, table: HostTable | CudaTable, common: Common, index: int) -> None:
        self._table, self._common, self._index = table, common, index
        self._lane = common.lane
        self._ahead: tuple[Any, PendingPull] | None = None

    @property
    def pushes(self) -> int:
        """The number of pushes so far."""
        return int(self._common.pushes[self._index])

    @property
    def shape(self) -> tuple[int, int]:
        """Nodes, and the width of a row."""
        nodes, dim = self._table.rows.shape
        return nodes, dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are stored as."""
        return self._table.rows.dtype

    def push(self, values: Any, n_id: Any = None, *, offset: Any = None, count: Any = None) -> None:
        """Write rows.

        Parameters
        ----------
        values : array or tensor [n, dim]
            Of any framework and any real dtype; taken as they are now, so the caller may change them at once.
        n_id : int array-like or tensor [n], optional
            The rows' nodes; of repeated ids the last row stays.
        offset, count : int array-like, optional
            Instead of `n_id`: the first nodes and the lengths of contiguous ranges, n nodes in all.

        Raises
        ------
        ArgumentIndexError
            A node is out of range.
        ArgumentTypeError, ArgumentValueError
            The values' shape or dtype does not fit, or neither or both of `n_id` and ranges are given.
        """
        table = self._table
        if names_nodes(n_id, offset, count):
            ids = table.ids(n_id)
            rows = len(ids)
        else:
            offset, count = checked_ranges(offset, count, self.shape[0])
            rows = int(count.sum())
        with span("history push") as pushed, self._lane.lock:
            pushed.moved(rows * table.rows.shape[1] * table.rows.dtype.itemsize)
            queued = self._common.queues or self._lane.busy
            kept = table.values(values, rows, keep=queued)
            number = self._common.next_number(self._index)
            job: Callable[[], None]
            if n_id is None:
                job = partial(table.push_ranges, kept, offset, count, number)
            else:
                job = partial(table.push_rows, kept, table.copied(ids) if queued else ids, number)
            try:
                if queued:
                    self._lane.submit(job)
                else:
                    self._lane.run(job)
            except DeviceError:
                self._common.count(self._index, number)  # stamps of this number may be on the device
                raise
            self._common.count(self._index, number)

    def pull(self, n_id: Any) -> Any:
        """Return rows.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes, also repeated. If they are those of the last :meth:`HistoryStore.prefetch`, what it brought is
            returned.

        Returns
        -------
        array [n, dim]
            Of the store's dtype: zeros where nothing was pushed. A buffer of its own, 64-byte aligned.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            They are no node ids, or out of range.
        """
        ids = self._table.ids(n_id)
        if self._ahead is not None and self._table.equal(self._ahead[0], ids):
            (_, pending), self._ahead = self._ahead, None
            return pending.wait()
        with span("history pull") as pulled:
            found = self._table.deliver(self._lane.run(lambda: self._table.pull(ids)))
            pulled.moved(found.nbytes)
        return found

    def pull_async(self, n_id: Any) -> PendingPull:
        """Start a pull of rows as they are now, and return at once.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes, also repeated; errors are those of :meth:`pull`.

        Returns
        -------
        PendingPull
            Its ``wait()`` returns the rows, as :meth:`pull` does.
        """
        return self._start_pull(self._table.copied(self._table.ids(n_id)))

    def _start_pull(self, ids: Any) -> PendingPull:
        return PendingPull(self._lane.submit(lambda: self._table.pull(ids), awaited=True), self._table.deliver)

    def prefetch(self, n_id: Any) -> None:
        """Start a pull of rows as they are now; the next :meth:`pull` of these nodes returns what it brought."""
        ids = self._table.copied(self._table.ids(n_id))
        self._ahead = (ids, self._start_pull(ids))

    def _written(self, n_id: Any) -> Ids:
        ids = None if n_id is None else self._table.ids(n_id)
        written: Ids = self._lane.run(lambda: self._table.written(ids))
        return written

    def age(self, n_id: Any = None) -> Ids:
        """Return how many pushes ago each row was written, int64; -1 for never. Of all nodes if none are given."""
        written = self._written(n_id)
        return np.where(written == 0, -1, self.pushes - written)

    def dump(self) -> tuple[Ids, Any]:
        """Return stamps and rows on the host; to be called in the lane."""
        return self._table.dump()

    def fill(self, stamps: Ids, rows: Any) -> None:
        """Take stamps and rows of the host; to be called in the lane."""
        self._table.fill(stamps, rows)

    def forget(self) -> None:
        """Drop what :meth:`prefetch` has brought."""
        self._ahead = None

    def __repr__(self) -> str:
        return f"History(shape={self.shape}, dtype={self.dtype}, {self.pushes} pushes)"


def names_nodes(n_id: Any, offset: Any, count: Any) -> bool:
    """Return whether a push is to nodes, rather than to ranges of them.

    Raises
    ------
    ArgumentTypeError
        It is to neither, to both, or lacks the begins or the lengths of its ranges.
    """
    if (n_id is None) == (offset is None) or (offset is None) != (count is None):
        remedy = "call push(values, n_id) or push(values, offset=[...], count=[...])"
        raise ArgumentTypeError(explain("n_id", "to be given, or offset and count", "another combination", remedy))
    return n_id is not None


def checked_ranges(offset: Any, count: Any, num_nodes: int) -> tuple[Ids, Ids]:
    """Return copies of the first nodes and the lengths of ranges, once they are known to be of `num_nodes` nodes.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        They are not as many whole numbers each, or a range is none of these nodes.
    """
    begins, lengths = np.array(host_ids(offset, "offset")), np.array(host_ids(count, "count"))
    if len(begins) != len(lengths):
        needs = f"a length for each of {len(begins)} ranges"
        raise ArgumentValueError(explain("count", needs, f"{len(lengths)}", "pass lists of the same length"))
    bad = np.flatnonzero((begins < 0) | (lengths < 0) | (lengths > num_nodes - begins))
    if len(bad):
        first = int(bad[0])
        got = f"{begins[first]} and {lengths[first]} at position {first}"
        remedy = "check that ranges and store belong together"
        raise ArgumentValueError(explain("offset and count", f"ranges within 0 to {num_nodes}", got, remedy))
    return begins, lengths


def _close(
    lane: Lane | StreamLane, path: str | None, header: Header, arrays: Sequence[tuple[Any, Any]], pushes: Any
) -> None:
    lane.close()
    if path is None or not lane.ours:
        return
    for pair in arrays:
        for array in pair:
            if isinstance(array, np.memmap):
                array.flush()
    # Last: until all rows are on the disk, the file says that it was not closed.
    history_file.mark(path, header._replace(pushes=tuple(pushes)), in_use=False)
