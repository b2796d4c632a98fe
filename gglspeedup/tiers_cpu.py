"""Feature rows that the CPU gathers: one tier, in memory or memory-mapped."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, host_ids
from gglspeedup.memory import BufferPool
from gglspeedup.threads import announce_compilation, launching, lock_of, numba

Array = npt.NDArray[Any]


class Tiers(Protocol):
    """Rows stored somewhere, gathered by id."""

    def gather(self, n_id: Any) -> Any:
        """Check the ids and return their rows, on the device that this serves."""

    def take(self, ids: Any) -> Any:
        """Return the rows of contiguous int64 ids on that device, which are known to be in range."""

    def rows_served(self) -> dict[str, int]:
        """Return the number of rows that each tier has served, fastest tier first."""


class HostTier:
    """All rows in one place that the CPU reads: memory, or a file that is memory-mapped.

    Parameters
    ----------
    rows : C-contiguous array [N] or [N, F]
        Not copied.
    """

    def __init__(self, rows: Array) -> None:
        numba()
        self._rows = rows
        self._row_bytes = rows[:1].nbytes if len(rows) else 0
        self._name = "disk" if isinstance(rows, np.memmap) else "host"
        self._pool = BufferPool()
        self._served = 0
        self._lock = lock_of(self)

    def gather(self, n_id: Any) -> Array:
        """Return the rows, in a 64-byte aligned buffer that is used again once all that shares it is gone."""
        ids = host_ids(n_id, "n_id")
        check_range(ids, len(self._rows), "n_id")
        return self.take(ids)

    def take(self, ids: npt.NDArray[np.int64]) -> Array:
        """Return the rows of ids that are known to be in range, in a buffer as that of :meth:`gather`."""
        out = self._pool.empty((len(ids), *self._rows.shape[1:]), self._rows.dtype)
        self.gather_into(ids, out)
        return out

    def gather_into(self, ids: npt.NDArray[np.int64], out: Array) -> None:
        """Copy the rows of ids that are known to be in range to a C-contiguous array."""
        from gglspeedup.kernels.gather_cpu import gather_rows

        announce_compilation(gather_rows)
        with launching():
            gather_rows(self._rows.ctypes.data, ids, out.ctypes.data, self._row_bytes)
        self.count(len(ids))

    def count(self, rows: int) -> None:
        """Count rows as served."""
        with self._lock:
            self._served += rows

    def rows_served(self) -> dict[str, int]:
        """Return the number of rows served."""
        return {self._name: self._served}
