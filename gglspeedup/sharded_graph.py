"""`ShardedGraph`: one copy of a graph for all devices of a machine, its rows dealt out to them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, host_ids
from gglspeedup.device import Device
from gglspeedup.errors import ShareError
from gglspeedup.graph import CSRGraph, GraphLike, as_graph
from gglspeedup.pieces import Pieces, balanced_rows
from gglspeedup.shared_array import SharedArray

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

logger = logging.getLogger("gglspeedup")


class ShardedGraph:
    """The rows of a graph in as many ranges as there are devices, in memory that spawned processes attach to.

    On CPU devices a shard is shared memory, or a range of the file that the graph is mapped to. On GPUs that can read
    each other's memory it lies in the memory of its device; on others, whole and pinned in shared host memory.

    Parameters
    ----------
    graph : CSRGraph
        The graph; not kept, unless it is mapped to a file.
    devices : sequence of Device
        Where the shards go: all on the CPU, or all CUDA devices.

    Attributes
    ----------
    num_nodes, num_edges, max_degree : int
        Of the whole graph.
    rows : int64 array [devices + 1]
        Where the shards' rows begin, and the number of nodes.
    indptr, indices, edge_ids : Pieces
        The arrays; the last is None if the graph has none.
    """

    def __init__(self, graph: CSRGraph, devices: Sequence[Device]) -> None:
        self.devices = list(devices)
        self.num_nodes, self.num_edges = graph.num_nodes, graph.num_edges
        self._degree = SharedArray((graph.num_nodes,), np.uint32)
        self._degree.array[:] = graph.degree()
        self.max_degree = int(self._degree.array.max()) if self.num_nodes else 0
        self.rows = balanced_rows(graph.indptr, len(devices))
        self._deal_out(graph)

    def _deal_out(self, graph: CSRGraph) -> None:
        """Put the shards where they belong."""
        self._mapped: CSRGraph | None = None
        indices = [device.index for device in self.devices if device.index is not None]
        if indices and self._on_devices(graph, indices):
            return
        # Of a mapped file processes share the pages; nothing has to be copied.
        self._mapped = None if graph.path is None else graph
        hold = SharedArray.of if self._mapped is None else _as_it_is
        self._make(graph, [hold] * len(self.devices))

    def _on_devices(self, graph: CSRGraph, indices: Sequence[int]) -> bool:
        """Put the shards into the memory of the devices; return whether that was possible."""
        from gglspeedup.peer_gpu import PeerArray, peers

        if not peers(indices):
            logger.warning("GPUs %s cannot read each other's memory; their graph stays in pinned host memory", indices)
            return False
        try:
            self._make(graph, [partial(PeerArray, index=index) for index in indices])
        except ShareError as error:
            logger.warning("%s; until then the graph stays in pinned host memory", error)
            return False
        return True

    def _make(self, graph: CSRGraph, hold: Sequence[Callable[[Array], Any]]) -> None:
        edges = graph.indptr[self.rows]
        self.indptr = _dealt_out(graph.indptr, self.rows, hold, 1)  # and where the last row ends
        self.indices = _dealt_out(graph.indices, edges, hold)
        self.edge_ids = None if graph.edge_ids is None else _dealt_out(graph.edge_ids, edges, hold)

    def degree(self, n_id: Any = None) -> Ids:
        """Return the lengths of the rows `n_id` (default: of all), int64; errors are those of CSRGraph."""
        if n_id is None:
            return self._degree.array.astype(np.int64)
        ids = host_ids(n_id, "n_id")
        check_range(ids, self.num_nodes, "n_id")
        return self._degree.array[ids].astype(np.int64)

    def __repr__(self) -> str:
        shards = " + ".join(str(count) for count in np.diff(self.indices.first).tolist())
        return f"ShardedGraph(num_nodes={self.num_nodes}, num_edges={self.num_edges} = {shards})"

    def __getstate__(self) -> dict[str, Any]:
        if self._mapped is None:
            return self.__dict__
        # The other process opens the file itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("indptr", "indices", "edge_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._mapped is not None:
            self._deal_out(self._mapped)


def _dealt_out(array: Array, first: Ids, hold: Sequence[Callable[[Array], Any]], more: int = 0) -> Pieces:
    ranges = zip(itertools.pairwise(first.tolist()), hold, strict=True)
    return Pieces(first, [put(array[begin : end + more]) for (begin, end), put in ranges], array.dtype)


def _as_it_is(array: Array) -> Array:
    return array


def as_any_graph(csr: GraphLike) -> CSRGraph | ShardedGraph:
    """Return a sharded graph as it is, and what else can be a graph as :func:`as_graph` does."""
    return csr if isinstance(csr, ShardedGraph) else as_graph(csr)
