"""A history table of a GPU: rows in its memory, pinned on the host and written in place, or staged by the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import device_ids
from gglspeedup.history.tables_cpu import HostTable, check_values
from gglspeedup.interchange import as_array
from gglspeedup.kernels import gather_gpu
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.kernels.history import POSITION_BITS, stamp_of
from gglspeedup.memory import BufferPool
from gglspeedup.tiers_gpu import NO_BAD, check_device_ids

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


class CudaTable:
    """Rows of one table and the stamps of who wrote them last, as kernels see both. Methods are those of `HostTable`.

    Parameters
    ----------
    runtime : Runtime
        The device.
    stamps : int64 device array [N]
        See `kernels.history`.
    rows : device array [N, dim]
        C-contiguous; in the GPU's memory, or mapped from the host's.
    most_blocks : int
        Of the grids that copy rows.
    """

    def __init__(
        self, runtime: Runtime, stamps: Any, rows: Any, most_blocks: int = gather_gpu.MAX_BLOCKS
    ) -> None:  # fmt: skip
        self._runtime, self.stamps, self.rows, self._most_blocks = runtime, stamps, rows, most_blocks
        self._row_bytes = rows.shape[1] * rows.dtype.itemsize
        with runtime.activate():
            self._counters = runtime.zeros(2, np.uint64)
            self._no_bad = runtime.to_device(np.full(1, NO_BAD))
            runtime.read(self._counters)  # from now on any stream may use the table

    def ids(self, n_id: Any) -> Any:
        """Return node ids as int64 on the device, checked: the host waits for the answer."""
        ids = device_ids(n_id, "n_id", self._runtime)
        with self._runtime.activate():
            check_device_ids(self._runtime, ids, len(self.rows), "n_id")
        return ids

    def copied(self, ids: Any) -> Any:
        """Return a copy of what :meth:`ids` returned."""
        with self._runtime.activate():
            return ids.copy()

    def equal(self, ids: Any, others: Any) -> bool:
        """Return whether two of what :meth:`ids` returned are the same: the host waits for the answer."""
        with self._runtime.activate():
            return len(ids) == len(others) and bool((ids == others).all())

    def values(self, values: Any, count: int, *, keep: bool) -> Any:
        """Return a copy of values as rows of this table's dtype, on the device, checked."""
        given = as_array(values, "values")
        check_values(given, (count, self.rows.shape[1]))
        with self._runtime.activate():
            if not self._runtime.is_device(given):
                given = self._runtime.to_device(np.ascontiguousarray(given, self.rows.dtype))
                return given
            staged = self._runtime.empty(given.shape, self.rows.dtype)
            staged[...] = given
            return staged

    def push_rows(self, values: Any, ids: Any, number: int) -> None:
        """Enqueue the writing of rows `ids` as push `number`; of repeated ids the last one stays."""
        from gglspeedup.kernels.history_gpu import stamp_rows

        runtime = self._runtime
        with runtime.activate():
            positions = runtime.empty(len(ids), np.int64)
            stamp_rows(ids, number, self.stamps, positions, runtime.stream())
            gather_gpu.scatter_rows(
                runtime, values, positions, self.rows, self._row_bytes, most_blocks=self._most_blocks
            )

    def push_ranges(self, values: Any, offset: Ids, count: Ids, number: int) -> None:
        """Enqueue the writing of contiguous ranges as push `number`; of ranges that overlap the last one stays."""
        at = 0
        with self._runtime.activate():
            for begin, length in zip(offset.tolist(), count.tolist(), strict=True):
                self.rows[begin : begin + length] = values[at : at + length]
                self.stamps[begin : begin + length] = stamp_of(number, 0)
                at += length

    def pull(self, ids: Any) -> Any:
        """Enqueue a gather of rows, and return them."""
        runtime = self._runtime
        with runtime.activate():
            out = runtime.empty((len(ids), self.rows.shape[1]), self.rows.dtype)
            gather_gpu.gather_rows(
                runtime, self.rows, None, None, len(self.rows), ids, out, self._row_bytes, self._counters,
                self._no_bad, most_blocks=self._most_blocks,
            )  # fmt: skip
        return out

    def deliver(self, rows: Any) -> Any:
        """Return what :meth:`pull` returned."""
        return rows

    def written(self, ids: Any) -> Ids:
        """Return the number of the push that wrote each row last, 0 for never, on the host, which waits for it."""
        with self._runtime.activate():
            stamps = self.stamps if ids is None else self.stamps[ids]
            host: Ids = np.array(self._runtime.read(stamps))
        return host >> POSITION_BITS

    def dump(self) -> tuple[Ids, Array]:
        """Return stamps and rows, copied to the host."""
        with self._runtime.activate():
            return np.array(self._runtime.read(self.stamps)), np.array(self._runtime.read(self.rows))

    def fill(self, stamps: Ids, rows: Array) -> None:
        """Take stamps and rows of the host."""
        with self._runtime.activate():
            self.stamps[...] = self._runtime.to_device(stamps)
            self.rows[...] = self._runtime.to_device(rows)


class StagedTable(HostTable):
    """A table that the CPU writes and reads for a GPU: a file, or memory that cannot be pinned.

    Parameters
    ----------
    stamps, rows, pool
        As `HostTable`'s.
    runtime : Runtime
        Where pulled rows go.
    """

    def __init__(self, stamps: Ids, rows: Array, pool: BufferPool, runtime: Runtime) -> None:
        super().__init__(stamps, rows, pool)
        self._runtime = runtime

    def deliver(self, rows: Any) -> Any:
        """Return a copy of pulled rows on the device."""
        with self._runtime.activate():
            return self._runtime.to_device(rows)
