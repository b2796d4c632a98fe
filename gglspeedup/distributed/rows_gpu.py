"""Rows of a rank's part on its GPU, and those of other ranks put together with them there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.distributed.communicator import Ids
from gglspeedup.distributed.rows import Cache, RowExchange
from gglspeedup.kernels import gather_gpu
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.placement import place_rows
from gglspeedup.tiers_gpu import NO_BAD

Array = npt.NDArray[Any]


class DeviceRows:
    """The rows of this rank's part, in the tiers of a GPU.

    Parameters
    ----------
    rows : C-contiguous array [N] or [N, F]
        In host memory, where those stay that are not hot, pinned, or a ``numpy.memmap``; of a dtype that CuPy knows.
    order : int64 array [N]
        Which of them are how hot, the hottest first.
    runtime : Runtime
        The device.
    budget, free : int
        Bytes of its memory for hot rows, and how many there are for them at most.

    Raises
    ------
    DeviceError, DeviceMemoryError
        The device fails, or has no room for what always lies there.
    """

    def __init__(self, rows: Array, order: Ids, runtime: Runtime, budget: int, free: int) -> None:
        self._runtime = runtime
        self._tiers = place_rows(rows, order, runtime, budget, free)
        self._shape, self._dtype = rows.shape[1:], rows.dtype
        self._row_bytes = rows.itemsize * int(np.prod(self._shape, dtype=np.int64))  # also where the part has no rows
        with runtime.activate():
            self._counters = runtime.zeros(2, np.uint64)  # the kernel wants some; ranks count on the host
            self._no_bad = runtime.to_device(np.full(1, NO_BAD))

    def empty(self, count: int) -> Any:
        """Return an uninitialised device array for so many rows."""
        with self._runtime.activate():
            return self._runtime.empty((count, *self._shape), self._dtype)

    def synchronize(self) -> None:
        """Wait for the current stream: what was put on the device until now is there for any other."""
        with self._runtime.activate():
            self._runtime.read(self._counters)

    def fetch(
        self, exchange: RowExchange, step: str, n_ids: Sequence[Any], cache: Cache | None, by_device: bool
    ) -> tuple[list[Any], Ids]:  # fmt: skip
        """Return the rows of some nodes on the device, on the current stream; collective.

        Parameters
        ----------
        exchange : RowExchange
            With the other ranks.
        step, n_ids, cache
            As :meth:`RowExchange.fetch` takes them; the cached rows are on the device.
        by_device : bool
            Whether the communicator is given arrays of the device, by all ranks or by none; else what travels is copied
            to the host, for which the host waits, and back.

        Returns
        -------
        list of device array [n, ...]
            Those of each list, buffers of their own.
        int64 array [3]
            How many of the nodes are own, cached and remote.
        """
        from gglspeedup.kernels import ranks_cpu as kernels

        asked = exchange.ask(step, n_ids, cache)
        runtime, bounds, book, rank = self._runtime, asked.bounds.tolist(), exchange.book, exchange.collective.rank
        with runtime.activate():
            answers = self._tiers.take(runtime.to_device(asked.wanted))
            sent = answers if by_device else runtime.read(answers)
            received = exchange.collective.exchange("rows", sent, asked.sends, asked.gets)
            received = received if by_device else runtime.to_device(received)

            def rows_of(source: int, at: Ids) -> Any:
                """Return the rows of some of the nodes, which all come from one source."""
                if source == kernels.OWN:
                    return self._tiers.take(runtime.to_device(book.rows_of(rank, asked.ids[at])))
                if source == kernels.CACHED and cache is not None:
                    return self._pick(cache.rows, asked.place[at])
                return self._pick(received, asked.moved[asked.place[at]])

            outs = []
            for first, last in pairwise(bounds):
                out = None
                for source in np.unique(asked.kind[first:last]).tolist():
                    positions = np.flatnonzero(asked.kind[first:last] == source)
                    rows = rows_of(source, first + positions)
                    if len(positions) == last - first:
                        out = rows
                        break
                    out = self.empty(last - first) if out is None else out
                    gather_gpu.scatter_rows(runtime, rows, runtime.to_device(positions), out, self._row_bytes)
                outs.append(self.empty(0) if out is None else out)
        return outs, asked.served()

    def _pick(self, rows: Any, places: Ids) -> Any:
        """Return some of the rows of a device array."""
        runtime = self._runtime
        out = runtime.empty((len(places), *self._shape), self._dtype)
        gather_gpu.gather_rows(
            runtime, rows, None, None, len(rows), runtime.to_device(places), out, self._row_bytes, self._counters,
            self._no_bad,
        )  # fmt: skip
        return out
