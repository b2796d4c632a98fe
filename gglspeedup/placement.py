"""Where things live on a GPU: the graph, by free memory, and the tiers of features."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.device import Device
from gglspeedup.graph import CSRGraph
from gglspeedup.kernels.cuda import CudaRuntime, PinnedView, PinningError, Runtime
from gglspeedup.peer_gpu import PeerArray
from gglspeedup.pieces import DevicePieces, Pieces
from gglspeedup.sampler_gpu import CudaSampler
from gglspeedup.sharded_graph import ShardedGraph
from gglspeedup.tiers_gpu import CudaTiers

Array = npt.NDArray[Any]

logger = logging.getLogger("gglspeedup")

_GRAPH_SHARE = 0.75  # of the free memory that "auto" gives to the graph and its table
_TABLES = 2  # a batch is begun before the one before it is finished
_TABLE_SHARE = 0.25  # of the free memory that dense tables of local ids may take
_POINTER_SHARE = 0.125  # of the free memory that indptr may take although the graph is in host memory
_SPARE = 0.95  # of the free memory that features may take


@functools.cache
def runtime_of(device: Device) -> CudaRuntime:
    """Return the runtime of a CUDA device; there is one, as it holds the compiled kernels."""
    return CudaRuntime(device.index or 0)


def place_graph(graph: CSRGraph, runtime: Runtime, placement: str, free: int) -> CudaSampler:
    """Return a sampler of the graph in GPU memory, or in pinned host memory that kernels read in place.

    Parameters
    ----------
    graph : CSRGraph
        In memory or memory-mapped.
    runtime : Runtime
        The device.
    placement : str
        ``"device"``, ``"uva"``, or ``"auto"``: the first of the two that the free memory allows.
    free : int
        Free memory of the device, in bytes.
    """
    parts = [graph.indptr, graph.indices, *([] if graph.edge_ids is None else [graph.edge_ids])]
    need = sum(part.nbytes for part in parts)
    table_bytes = 8 * _TABLES * graph.num_nodes
    table = "dense" if table_bytes <= _TABLE_SHARE * free else "hash"
    if placement == "auto":
        fits = need + (table_bytes if table == "dense" else 0) <= _GRAPH_SHARE * free
        placement = "device" if fits else "uva"
        logger.info(
            "graph of %.2f GiB placed in %s memory: %.2f GiB are free on cuda:%d (placement=%r)",
            need / 2**30, "GPU" if fits else "pinned host", free / 2**30, runtime.index, placement,
        )  # fmt: skip
    with runtime.activate():
        arrays = None
        if placement == "device":
            try:
                arrays = [runtime.to_device(part) for part in parts]
            except MemoryError as error:  # CuPy's OutOfMemoryError is one
                logger.warning("the graph does not fit into GPU memory (%s); sampling it in pinned host memory", error)
        if arrays is None:
            arrays = [_in_host_memory(runtime, part) for part in parts[1:]]
            near = parts[0].nbytes <= _POINTER_SHARE * free
            arrays.insert(0, runtime.to_device(parts[0]) if near else _in_host_memory(runtime, parts[0]))
        _settle(runtime)
    lengths = graph.degree()
    return CudaSampler(
        runtime, arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None, graph.num_nodes, table,
        max_degree=int(lengths.max()) if len(lengths) else 0,
    )  # fmt: skip


def place_shards(graph: ShardedGraph, runtime: Runtime, free: int) -> CudaSampler:
    """Return a sampler of a graph whose shards lie in the memory of several devices, or pinned on the host."""
    table = "dense" if 8 * _TABLES * graph.num_nodes <= _TABLE_SHARE * free else "hash"
    with runtime.activate():
        indptr, indices = (_on_device(runtime, vector) for vector in (graph.indptr, graph.indices))
        edge_ids = None if graph.edge_ids is None else _on_device(runtime, graph.edge_ids)
        _settle(runtime)
    return CudaSampler(runtime, indptr, indices, edge_ids, graph.num_nodes, table, max_degree=graph.max_degree)


def _settle(runtime: Runtime) -> None:
    """Wait for the current stream: the loaders' streams, which do not, will read what was put on the device."""
    runtime.read(runtime.zeros(1, np.uint64))


def _on_device(runtime: Runtime, pieces: Pieces) -> DevicePieces:
    kept, pointers = [], []
    for holder in pieces.holders:
        if isinstance(holder, PeerArray):
            pointers.append(holder.address(runtime.index))
        else:
            kept.append(_in_host_memory(runtime, getattr(holder, "array", holder)))
            pointers.append(runtime.address(kept[-1]))
    return DevicePieces(runtime, pieces, pointers, (pieces, kept))


def _in_host_memory(runtime: Runtime, part: Array) -> Any:
    """Return an array that kernels read over the bus: the array itself, pinned, else a pinned copy of it."""
    try:
        return _kept(runtime.pinned_view(part))
    except PinningError as error:
        logger.warning("%s; sampling a pinned copy", error)
        copy = runtime.pinned(part.shape, part.dtype)
        copy[...] = part
        return _kept(runtime.pinned_view(copy))


def _kept(view: PinnedView) -> Any:
    """Return the view's array, which keeps the memory pinned by itself."""
    return view.array


def room_for_rows(budget: int, rows: Array, free: int, index: int) -> int:
    """Return the bytes of a device that features get: their budget, or less, with a warning, if less is free."""
    usable = int(_SPARE * free) - 4 * len(rows)  # the slots are on the device, too
    if min(budget, rows.nbytes) <= usable:
        return budget
    usable = max(0, usable)
    logger.warning(
        "budget of %.3f GiB for features is beyond the free memory of cuda:%d: %.3f GiB are used",
        budget / 2**30, index, usable / 2**30,
    )  # fmt: skip
    return usable


def place_shared_rows(
    rows: Array, order: npt.NDArray[np.int64], hot: Pieces, runtime: Runtime
) -> CudaTiers:  # fmt: skip
    """Return the tiers of a feature matrix whose hot rows lie in the memory of several devices."""
    with runtime.activate():
        return CudaTiers(runtime, rows, order, hot=_on_device(runtime, hot))


def place_rows(
    rows: Array, order: npt.NDArray[np.int64], runtime: Runtime, budget: int, free: int
) -> CudaTiers:  # fmt: skip
    """Return the tiers of a feature matrix; a budget beyond the free memory is cut, with a warning."""
    return CudaTiers(runtime, rows, order, room_for_rows(budget, rows, free, runtime.index))
