"""A history table that the CPU writes and reads: in memory, or memory-mapped."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, host_array, host_ids
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.history.history_file import Header, numpy_dtype
from gglspeedup.interchange import is_numeric
from gglspeedup.kernels.history import POSITION_BITS, stamp_of
from gglspeedup.memory import BufferPool
from gglspeedup.shared_array import SharedArray
from gglspeedup.threads import announce_compilation, launching, numba

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


class HostTable:
    """Rows of one table and the stamps of who wrote them last.

    Parameters
    ----------
    stamps : int64 array [N]
        See `kernels.history`.
    rows : array [N, dim]
        C-contiguous.
    pool : BufferPool
        Where pulled rows and staged values lie.
    """

    def __init__(self, stamps: Ids, rows: Array, pool: BufferPool) -> None:
        numba()
        self.stamps, self.rows, self._pool = stamps, rows, pool
        self._row_bytes = rows.shape[1] * rows.itemsize

    def ids(self, n_id: Any) -> Ids:
        """Return node ids as int64, checked."""
        ids = host_ids(n_id, "n_id")
        check_range(ids, len(self.rows), "n_id")
        return ids

    def copied(self, ids: Any) -> Any:
        """Return a copy of what :meth:`ids` returned."""
        return ids.copy()

    def equal(self, ids: Any, others: Any) -> bool:
        """Return whether two of what :meth:`ids` returned are the same."""
        return len(ids) == len(others) and bool((ids == others).all())

    def values(self, values: Any, count: int, *, keep: bool) -> Array:
        """Return values as rows of this table's dtype, checked; a copy if they are to be kept for later."""
        given = host_array(values, "values")
        shape = (count, self.rows.shape[1])
        check_values(given, shape)
        if not keep and given.dtype == self.rows.dtype and given.flags.c_contiguous:
            return given
        staged = self._pool.empty(shape, self.rows.dtype)
        staged[...] = given
        return staged

    def push_rows(self, values: Array, ids: Ids, number: int) -> None:
        """Write rows `ids` as push `number`; of repeated ids the last one stays."""
        from gglspeedup.kernels.history_cpu import scatter_rows, stamp_rows

        announce_compilation(scatter_rows)
        stamp_rows(ids, number, self.stamps)
        with launching():
            scatter_rows(
                values.ctypes.data, ids, number, self.stamps, self.rows.ctypes.data, self._row_bytes
            )  # fmt: skip

    def push_ranges(self, values: Array, offset: Ids, count: Ids, number: int) -> None:
        """Write contiguous ranges as push `number`; of ranges that overlap the last one stays."""
        at = 0
        for begin, length in zip(offset.tolist(), count.tolist(), strict=True):
            self.rows[begin : begin + length] = values[at : at + length]
            self.stamps[begin : begin + length] = stamp_of(number, 0)
            at += length

    def pull(self, ids: Ids) -> Array:
        """Return rows, in a 64-byte aligned buffer that is used again once all that shares it is gone."""
        from gglspeedup.kernels.gather_cpu import gather_rows

        announce_compilation(gather_rows)
        out = self._pool.empty((len(ids), self.rows.shape[1]), self.rows.dtype)
        with launching():
            gather_rows(self.rows.ctypes.data, ids, out.ctypes.data, self._row_bytes)
        return out

    def deliver(self, rows: Array) -> Any:
        """Return pulled rows as the caller gets them."""
        return rows

    def dump(self) -> tuple[Ids, Array]:
        """Return stamps and rows, not copied."""
        return self.stamps, self.rows

    def fill(self, stamps: Ids, rows: Array) -> None:
        """Take stamps and rows."""
        self.stamps[...] = stamps
        self.rows[...] = rows

    def written(self, ids: Ids | None) -> Ids:
        """Return the number of the push that wrote each row last, 0 for never."""
        stamps = np.asarray(self.stamps if ids is None else self.stamps[ids])
        return stamps >> POSITION_BITS


def check_values(given: Any, shape: tuple[int, int]) -> None:
    """Raise unless an array has the shape of rows to be written, and real numbers."""
    if given.shape != shape:
        remedy = "pass one row for each node that is written"
        raise ArgumentValueError(explain("values", f"shape {shape}", f"shape {given.shape}", remedy))
    if not is_numeric(given.dtype) or given.dtype.kind == "c":
        remedy = "convert them first"
        raise ArgumentTypeError(explain("values", "real numbers", f"dtype {given.dtype}", remedy))


def empty_tables(header: Header) -> list[tuple[Ids, Array]]:
    """Return stamps and rows of zeros for each table, in memory."""
    kind = numpy_dtype(header.dtype)
    return [(np.zeros(header.num_nodes, np.int64), np.zeros((header.num_nodes, dim), kind)) for dim in header.dims]


class SharedTables:
    """Stamps and rows of all tables, and the numbers of their pushes, in memory that processes share.

    Attributes
    ----------
    pushes : int64 array [tables]
        How many pushes each table has had, of any process.
    """

    def __init__(self, header: Header) -> None:
        kind = numpy_dtype(header.dtype)
        bits = np.dtype(f"u{kind.itemsize}")  # of bfloat16 memory knows nothing
        self._kind = kind
        self._counts = SharedArray((len(header.dims),), np.int64)
        self._tables = [
            (SharedArray((header.num_nodes,), np.int64), SharedArray((header.num_nodes, dim), bits))
            for dim in header.dims
        ]

    @property
    def pushes(self) -> Ids:
        return self._counts.array

    @property
    def arrays(self) -> list[tuple[Ids, Array]]:
        """Stamps and rows of each table."""
        return [(stamps.array, rows.array.view(self._kind)) for stamps, rows in self._tables]
