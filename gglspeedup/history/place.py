"""Where history tables lie that serve a GPU: in its memory, pinned on the host, or staged by the CPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from gglspeedup.device import Device
from gglspeedup.history.history_file import Header
from gglspeedup.history.lane_gpu import StreamLane
from gglspeedup.history.tables_cpu import HostTable, empty_tables
from gglspeedup.history.tables_gpu import CudaTable, StagedTable
from gglspeedup.kernels.cuda import PinningError, Runtime
from gglspeedup.memory import BufferPool
from gglspeedup.placement import runtime_of
from gglspeedup.side_stream import SideStream

logger = logging.getLogger("gglspeedup")

# Blocks that copy rows over the bus, beside the training: each has 16 KB under way, and 55 GB/s for 2 us take 110 KB.
_BUS_BLOCKS = 32


def cuda_tables(
    device: Device, storage: str, header: Header, arrays: Sequence[tuple[Any, Any]], pool: BufferPool,
    host_gather: bool = False,
) -> tuple[list[HostTable | CudaTable], StreamLane | None]:  # fmt: skip
    """Return the tables of a store, and their lane if it is a stream.

    Parameters
    ----------
    device : Device
        A CUDA device.
    storage : str
        ``"device"``, ``"pinned"`` or ``"mmap"``. Out of GPU memory, or of memory that can be pinned, the next tier
        serves, with a warning.
    header : Header
        The sizes.
    arrays : sequence of (stamps, rows)
        Of a file, for ``"mmap"``, or in memory that processes share, for ``"pinned"``; else none.
    pool : BufferPool
        Of host memory.
    host_gather : bool
        Whether rows of ``"pinned"`` are left to the CPU.
    """
    runtime = runtime_of(device)
    staged = storage == "mmap" or (storage == "pinned" and host_gather)
    tables = None if staged else tables_on(runtime, storage, header, arrays)
    if tables is not None:
        return list(tables), StreamLane(SideStream(runtime.index))
    return [StagedTable(stamps, rows, pool, runtime) for stamps, rows in arrays or empty_tables(header)], None


def tables_on(
    runtime: Runtime, storage: str, header: Header, arrays: Sequence[tuple[Any, Any]] = ()
) -> list[CudaTable] | None:
    """Return tables that kernels write and read in place, of zeros unless given; None if there is no such memory."""
    with runtime.activate():
        if storage == "device":
            try:
                return [
                    CudaTable(runtime, runtime.zeros(stamps.shape, stamps.dtype), runtime.zeros(rows.shape, rows.dtype))
                    for stamps, rows in empty_tables(header)
                ]
            except MemoryError as error:  # CuPy's OutOfMemoryError is one
                logger.warning("histories do not fit into GPU memory (%s); keeping them in pinned host memory", error)
        try:
            if arrays:  # stamps that others read lie beside the rows
                pinned = [[runtime.pinned_view(array).array for array in pair] for pair in arrays]
                return [CudaTable(runtime, stamps, rows, _BUS_BLOCKS) for stamps, rows in pinned]
            return [
                CudaTable(
                    runtime, runtime.zeros(stamps.shape, stamps.dtype), runtime.pinned_view(rows).array, _BUS_BLOCKS
                )
                for stamps, rows in empty_tables(header)
            ]
        except (PinningError, MemoryError) as error:
            logger.warning("%s; until then histories are read and written by the CPU, and copied", error)
            return None
