"""Feature rows served on a GPU: hot ones in its memory, the others pinned in host memory, or staged by the CPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import device_ids, out_of_range
from gglspeedup.kernels import gather_gpu
from gglspeedup.kernels.cuda import PinnedView, PinningError, Runtime
from gglspeedup.pieces import DevicePieces
from gglspeedup.tiers_cpu import HostTier

Array = npt.NDArray[Any]

logger = logging.getLogger("gglspeedup")

NO_BAD = np.uint64(0xFFFFFFFFFFFFFFFF)  # where kernels note the first bad id: none
_CHUNK_BYTES = 1 << 26  # of hot rows that travel to the device in one go


class CudaTiers:
    """Rows in up to two tiers, gathered by one kernel wherever they are.

    Parameters
    ----------
    runtime : Runtime
        The device.
    rows : C-contiguous array [N] or [N, F]
        In host memory, where it stays if not all of it is hot, or a ``numpy.memmap``.
    order : int64 array [N]
        Node ids, hottest first.
    budget : int
        Bytes of GPU memory for hot rows.
    hot : DevicePieces, optional
        The first rows of `order`, or all in the order of their nodes, which are loaded already; instead of a budget.
        Its elements are whole rows.
    """

    def __init__(
        self, runtime: Runtime, rows: Array, order: npt.NDArray[np.int64], budget: int = 0,
        hot: DevicePieces | None = None,
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._rows = rows
        self._row_bytes = rows[:1].nbytes if len(rows) else 0
        with runtime.activate():
            self._counters = runtime.zeros(2, np.uint64)
            # Where the gather kernel notes bad ids: none, as they are checked before.
            self._no_bad = runtime.to_device(np.full(1, NO_BAD))
            count = len(rows) if self._row_bytes == 0 else min(len(rows), budget // self._row_bytes)
            self._hot: Any = hot
            if hot is None:
                self._hot, count = self._load_hot(order, count)
            else:
                count = len(hot)
            # Where a node's row is in the hot tier; None if one tier has all rows, in the order of their nodes.
            self._slot: Any = None
            # The cold tier: the rows as the kernel reads them, or the tier of the CPU that reads them for it.
            self._pinned: PinnedView | None = None
            self._staged: HostTier | None = None
            if count < len(rows):
                slot = np.full(len(rows), -1, np.int32)
                slot[order[:count]] = np.arange(count, dtype=np.int32)
                self._slot = runtime.to_device(slot)
                self._open_cold(slot)
            runtime.read(self._counters)  # from now on any stream may read what was put there

    def _load_hot(self, order: npt.NDArray[np.int64], count: int) -> tuple[Any, int]:
        """Return the hot rows on the device and how many they are: `count`, or fewer if memory ends before."""
        while True:
            try:
                hot = self._runtime.empty((count, *self._rows.shape[1:]), self._rows.dtype)
                break
            except MemoryError as error:  # CuPy's OutOfMemoryError is one
                if count == 0:
                    raise
                logger.warning("GPU memory holds no %d hot rows (%s); trying half of them", count, error)
                count //= 2
        if count == len(self._rows):
            order = np.arange(count)
        source = HostTier(self._rows)
        step = max(1, _CHUNK_BYTES // max(1, self._row_bytes))
        for begin in range(0, count, step):
            part = order[begin : begin + step][: count - begin]
            staging = self._runtime.pinned((len(part), *self._rows.shape[1:]), self._rows.dtype)
            source.gather_into(part, staging)
            self._runtime.upload(staging, hot[begin : begin + len(part)])
            self._runtime.read(self._counters)  # the staging memory goes with the copy done
        return hot, count

    def _open_cold(self, slot: npt.NDArray[np.int32]) -> None:
        if not isinstance(self._rows, np.memmap):
            try:
                self._pinned = self._runtime.pinned_view(self._rows)
                return
            except PinningError as error:
                logger.warning("%s; until then cold rows are gathered by the CPU and copied", error)
        self._staged = HostTier(self._rows)
        self._host_slot = slot

    def gather(self, n_id: Any) -> Any:
        """Check the ids and return their rows on the device, on the current stream; the host waits for the check."""
        runtime = self._runtime
        ids = device_ids(n_id, "n_id", runtime)
        with runtime.activate():
            check_device_ids(runtime, ids, len(self._rows), "n_id")
        return self.take(ids)

    def take(self, ids: Any) -> Any:
        """Return the rows of contiguous int64 ids on the device that are known to be in range; the host waits not."""
        runtime = self._runtime
        with runtime.activate():
            out = runtime.empty((len(ids), *self._rows.shape[1:]), self._rows.dtype)
            if len(ids) == 0 or self._row_bytes == 0:
                return out
            if self._staged is not None:
                self._gather_staged(self._staged, ids, out)
            elif self._pinned is None:
                self._gather(self._hot, None, None, ids, out)
            elif len(self._hot) == 0:
                self._gather(None, None, self._pinned.array, ids, out)
            else:
                self._gather(self._hot, self._slot, self._pinned.array, ids, out)
        return out

    def _gather(self, hot: Any, slot: Any, cold: Any, ids: Any, out: Any) -> None:
        rows = len(hot) if slot is None and hot is not None else len(self._rows)
        gather_gpu.gather_rows(
            self._runtime, hot, slot, cold, rows, ids, out, self._row_bytes, self._counters, self._no_bad
        )  # fmt: skip

    def _gather_staged(self, tier: HostTier, ids: Any, out: Any) -> None:
        """Gather hot rows on the device; let the CPU gather the others, copy them over and scatter them."""
        runtime = self._runtime
        wanted = np.array(runtime.read(ids))
        place = self._host_slot[wanted].astype(np.int64)
        hits, missed = np.flatnonzero(place >= 0), np.flatnonzero(place < 0)
        if len(hits):
            rows = runtime.empty((len(hits), *out.shape[1:]), out.dtype)
            self._gather(self._hot, None, None, runtime.to_device(place[hits]), rows)
            gather_gpu.scatter_rows(runtime, rows, runtime.to_device(hits), out, self._row_bytes)
        if len(missed):
            staging = runtime.pinned((len(missed), *out.shape[1:]), out.dtype)
            tier.gather_into(wanted[missed], staging)
            rows = runtime.empty(staging.shape, staging.dtype)
            runtime.upload(staging, rows)
            gather_gpu.scatter_rows(runtime, rows, runtime.to_device(missed), out, self._row_bytes)
            runtime.read(self._counters)  # the staging memory goes with the copy done

    def rows_served(self) -> dict[str, int]:
        """Return the number of rows that each tier has served; the host waits for the device."""
        with self._runtime.activate():
            hot, pinned = (int(count) for count in self._runtime.read(self._counters))
        served = {"device": hot}
        if self._pinned is not None:
            served["pinned"] = pinned
        if self._staged is not None:
            served.update(self._staged.rows_served())
        return served


def check_device_ids(runtime: Runtime, ids: Any, bound: int, argument: str) -> None:
    """Raise for the first of the int64 ids on the device that lies outside [0, bound); the host waits for it."""
    bad = runtime.to_device(np.full(1, NO_BAD))
    gather_gpu.check_ids(runtime, ids, bound, bad)
    first = int(runtime.read(bad)[0])
    if first != int(NO_BAD):
        raise out_of_range(argument, first, int(runtime.read(ids[first : first + 1])[0]), bound)
