"""Multi-hop sampling on the CPU: the hop loop, its scratch memory, and the buffers it hands out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, duplicate
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.graph import CSRGraph
from gglspeedup.memory import BufferPool
from gglspeedup.pieces import host_view
from gglspeedup.sharded_graph import ShardedGraph
from gglspeedup.threads import announce_compilation, launching, numba

Array = npt.NDArray[Any]
Hop = tuple[Any, Any, tuple[int, int]]

logger = logging.getLogger("gglspeedup")

_MOST_NODES = 1 << 30  # of a batch: as many entries above as below fit int32
# Up to here a dense table was as fast as a hash table or faster, whatever the batch (docs/benchmarks.md).
DENSE_NODES = 1 << 25
_ROWS_A_THREAD = 4096  # to count: waking a thread costs as much as that


class Workspace:
    """Scratch memory of one call in flight: the table of local ids, and buffers that only grow.

    An entry minus `base` is the local id of a node in this batch; entries below `base` are no entries. Each batch
    starts `base` above all that earlier ones wrote, so the table is cleared only when int32 runs out. With `hashed`
    the table is open-addressed, with a key a cell, and grows with the batches.
    """

    def __init__(self, num_nodes: int, hashed: bool, key_dtype: npt.DTypeLike) -> None:
        self.hashed = hashed
        self.keys = np.empty(0, key_dtype)
        self.table = np.zeros(0 if hashed else num_nodes, np.int32)
        self.base = 1
        self._buffers: dict[str, Array] = {}

    def begin(self) -> int:
        """Return the base of a new batch."""
        if self.base > _MOST_NODES:
            self.table[:] = 0
            self.base = 1
        return self.base

    def reserve(self, most: int, count: int, nodes: Array) -> None:
        """Make room in the table for `most` nodes; those that it holds, nodes[:count], stay."""
        if not self.hashed or 2 * most <= len(self.keys):
            return
        if most > _MOST_NODES:
            needs, remedy = f"batches of at most {_MOST_NODES} nodes", "take fewer seeds or smaller fanouts"
            raise ArgumentValueError(explain("sizes", needs, f"up to {most}", remedy))
        from gglspeedup.kernels.sample_cpu import insert_nodes

        size = 1 << max(10, (4 * most - 1).bit_length())
        self.keys, self.table = np.empty(size, self.keys.dtype), np.zeros(size, np.int32)
        insert_nodes(0, count, self.base, self.keys, self.table, nodes)

    def array(self, name: str, size: int, dtype: npt.DTypeLike) -> Array:
        """Return a buffer of at least `size` elements; what it held is kept only by :meth:`grown`."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != dtype or len(buffer) < size:
            buffer = self._buffers[name] = np.empty(size + size // 4, dtype)
        return buffer[:size]

    def grown(self, name: str, used: int, size: int, dtype: npt.DTypeLike) -> Array:
        """Return the buffer with room for `size` elements, the first `used` of them kept."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            larger = np.empty(size + size // 4, dtype)
            if buffer is not None:
                larger[:used] = buffer[:used]
            buffer = self._buffers[name] = larger
        return buffer


class CpuSampler:
    """Samples a graph on the CPU; equal to `tests/naive.py` with any number of threads.

    Parameters
    ----------
    graph : CSRGraph or ShardedGraph
        In memory or memory-mapped; not copied, and kept.
    table : str
        What local ids are looked up in: ``"dense"``, 4 bytes a node; ``"hash"``, 8 or 12 bytes for 2 to 8 times
        the nodes of a batch; ``"auto"``, dense up to 2**25 nodes.
    """

    def __init__(self, graph: CSRGraph | ShardedGraph, table: str = "auto") -> None:
        numba()
        self._graph = graph  # whose memory kernels read by its addresses
        self._hashed = table == "hash" or (table == "auto" and graph.num_nodes > DENSE_NODES)
        self._num_nodes = graph.num_nodes
        self._indptr = host_view(graph.indptr)
        self._indices = host_view(graph.indices)
        self._index_dtype = graph.indices.dtype
        self._edge_ids = np.empty(0, np.int64) if graph.edge_ids is None else host_view(graph.edge_ids)
        self._pool = BufferPool()
        self._workspaces: list[Workspace] = []
        self._lock = threading.Lock()

    def sample(
        self, seeds: npt.NDArray[np.int64], sizes: tuple[int, ...], *, seed: int, batch: int, replace: bool, expand: str
    ) -> tuple[Array, list[Hop]]:
        """Return n_id and the hops (edge_index, e_id, size), outermost first.

        Parameters
        ----------
        seeds : int64 array [B]
            Unique node ids; both are checked here, by the kernel that numbers them.
        sizes : tuple of int
            Fanouts, nearest the seeds first; -1 for all.
        seed, batch : int
            Key and counter of the draws.

        Raises
        ------
        ArgumentIndexError, ArgumentValueError
            A seed is out of range, or stands twice.
        """
        with self._lock:
            workspace = self._workspaces.pop() if self._workspaces else None
        if workspace is None:
            workspace = Workspace(self._num_nodes, self._hashed, self._index_dtype)
        # After an error the workspace is dropped: its table may hold local ids of the batch that failed.
        result = self._sample(workspace, seeds, sizes, seed, batch, replace, expand)
        with self._lock:
            self._workspaces.append(workspace)
        return result

    def sample_each(
        self, batches: Iterable[tuple[npt.NDArray[np.int64], int]], sizes: tuple[int, ...], *, at_once: int = 1,
        **options: Any,
    ) -> Generator[tuple[Array, list[Hop]], None, None]:  # fmt: skip
        """Give what :meth:`sample` returns of each (seeds, batch), when it is asked for."""
        for seeds, batch in batches:
            yield self.sample(seeds, sizes, batch=batch, **options)

    def _sample(
        self, space: Workspace, seeds: Array, sizes: tuple[int, ...], seed: int, batch: int, replace: bool, expand: str
    ) -> tuple[Array, list[Hop]]:
        from gglspeedup.kernels import sample_cpu as kernels

        announce_compilation(kernels.sample_hop)
        base = space.begin()
        check_range(seeds, self._num_nodes, "seeds")
        nodes = space.grown("nodes", 0, len(seeds), self._index_dtype)
        nodes[: len(seeds)] = seeds
        space.reserve(len(seeds), 0, nodes)
        repeated = kernels.insert_nodes(0, len(seeds), base, space.keys, space.table, nodes)
        if repeated >= 0:
            raise duplicate("seeds", repeated, int(seeds[repeated]))
        key = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)
        counter = np.uint32(batch & 0xFFFFFFFF), (batch >> 32) << 16
        count, low = len(seeds), 0
        hops: list[Hop] = []
        for hop, fanout in enumerate(sizes):
            high = count
            rows = kernels.rows_per_chunk(fanout)
            chunks = -(-(high - low) // rows)
            start, degree = (space.array(name, high - low, np.int64) for name in ("start", "degree"))
            offsets = space.array("offsets", chunks + 1, np.int64)
            with launching(most=(high - low) // _ROWS_A_THREAD):
                edges = kernels.count_hop(self._indptr, nodes, low, high, fanout, replace, rows, start, degree, offsets)
            most = min(count + edges, self._num_nodes)
            nodes = space.grown("nodes", count, most + 1, self._index_dtype)
            space.reserve(most, count, nodes)
            edge_index, e_id = self._pool.empty_pair((2, edges), (edges,), np.int64)
            words = -(-max(fanout, 0) // 4) * 4
            with launching(most=chunks) as workers:
                count = kernels.sample_hop(
                    workers, self._indices, self._edge_ids, nodes, low, high, count, fanout, replace, *key,
                    counter[0], np.uint32(counter[1] | hop << 8), rows, start, degree, offsets,
                    np.int32(base), space.keys, space.table, e_id,
                    space.array("neighbour", edges, self._index_dtype), space.array("pending", edges, np.int64),
                    space.array("left", chunks, np.int64), edge_index[0], edge_index[1],
                    space.array("state", kernels.STATE_SIZE, np.int64),
                    *(space.array(name, workers * rows, np.uint32).reshape(workers, rows) for name in ("c1", "c3")),
                    space.array("words", workers * words * rows, np.uint32).reshape(workers, words, rows),
                    *(space.array(name, workers * kernels.SEEN_SIZE, np.int64).reshape(workers, -1)
                      for name in ("seen", "tags")),
                )  # fmt: skip
            hops.append((edge_index, e_id, (count, high)))
            low = high if expand == "frontier" else 0
        space.base = base + count
        n_id = self._pool.empty((count,), np.int64)
        n_id[:] = nodes[:count]
        return n_id, hops[::-1]
