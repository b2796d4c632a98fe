"""Multi-hop sampling on the CPU: the hop loop, its scratch memory, and the buffers it hands out."""

from __future__ import annotations

import logging
from collections.abc import Generator, Hashable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, duplicate
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.graph import CSRGraph
from gglspeedup.memory import BufferPool
from gglspeedup.pieces import host_view
from gglspeedup.sharded_graph import ShardedGraph
from gglspeedup.threads import announce_compilation, launching, lock_of, numba

Array = npt.NDArray[Any]
Hop = tuple[Any, Any, tuple[int, int]]

logger = logging.getLogger("gglspeedup")

_MOST_NODES = 1 << 30  # of a batch: as many entries above as below fit int32
# Up to here a dense table was as fast as a hash table or faster, whatever the batch (docs/benchmarks.md).
DENSE_NODES = 1 << 25
_SMALL = 1 << 12  # elements of a buffer that may be held for less
_MOST_KINDS = 64  # of batches, whose numbers of edges are kept
# Buffers of `sample_hops` in the order of its arguments; None is the type of node ids.
_SCRATCH: dict[str, Any] = {
    "nodes": None, "start": np.int64, "degree": np.int64, "offsets": np.int64, "left": np.int64, "c1": np.uint32,
    "c3": np.uint32, "words": np.uint32, "seen": np.int64, "tags": np.int64, "neighbour": None, "pending": np.int64,
    "state": np.int64,
}  # fmt: skip


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
        self._dtypes = {name: key_dtype if dtype is None else dtype for name, dtype in _SCRATCH.items()}
        self._buffers: dict[str, Array] = {name: np.empty(0, dtype) for name, dtype in self._dtypes.items()}
        self._expected: dict[Hashable, list[int]] = {}

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

    def make_room(self, **sizes: int) -> None:
        """Make room in buffers of :meth:`scratch`; what they hold is lost where they grow."""
        for name, size in sizes.items():
            self.array(name, max(0, size), self._dtypes[name])

    def scratch(self) -> list[Array]:
        """Return the whole buffers that `sample_hops` works in, in the order of its arguments."""
        return [self._buffers[name] for name in self._dtypes]

    def expected(self, kind: Hashable, hops: int) -> list[int]:
        """Return how many edges to have room for in each hop of a batch of a kind; 0 where nothing is known."""
        return self._expected.get(kind, [0] * hops)

    def expect(self, kind: Hashable, edges: list[int]) -> None:
        """Keep what the next batch of a kind may need."""
        if len(self._expected) >= _MOST_KINDS:
            self._expected.clear()
        self._expected[kind] = edges

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
        self._lock = lock_of(self)

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

        announce_compilation(kernels.sample_hops)
        base = space.begin()
        check_range(seeds, self._num_nodes, "seeds")
        nodes = space.grown("nodes", 0, len(seeds), self._index_dtype)
        nodes[: len(seeds)] = seeds
        space.reserve(len(seeds), 0, nodes)
        key = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32)
        counter = np.uint32(batch & 0xFFFFFFFF), np.uint32((batch >> 32) << 16)
        fanouts = np.array(sizes, np.int64)
        progress = np.array([0, -1, len(seeds), len(seeds), -1, -1])
        found = np.zeros((len(sizes), kernels.FOUND_SIZE), np.int64)
        kind = (sizes, replace, expand, len(seeds).bit_length())
        outputs = [self._output(found, hop, edges) for hop, edges in enumerate(space.expected(kind, len(sizes)))]
        with launching() as threads:
            while True:
                kernels.sample_hops(
                    threads, self._indptr, self._indices, self._edge_ids, self._num_nodes, fanouts, replace,
                    expand == "frontier", *key, *counter, np.int32(base), space.keys, space.table, *space.scratch(),
                    progress, found,
                )  # fmt: skip
                if progress[kernels.HOP] == len(sizes):
                    break
                repeated = int(progress[kernels.REPEATED])
                if repeated >= 0:
                    raise duplicate("seeds", repeated, int(seeds[repeated]))
                self._make_room(space, sizes, threads, progress, found, outputs)
        counts = found[:, : kernels.FOUND_EDGES + 1].tolist()
        space.expect(kind, [edges + edges // 8 for _, _, edges in counts])
        space.base = base + counts[-1][0]
        n_id = self._pool.empty((counts[-1][0],), np.int64)
        n_id[:] = space.array("nodes", counts[-1][0], self._index_dtype)
        return n_id, [
            self._hop(output, edges, (known, rows))
            for output, (known, rows, edges) in zip(outputs[::-1], counts[::-1], strict=True)
        ]

    def _hop(self, output: Array, edges: int, size: tuple[int, int]) -> Hop:
        """Return a hop's arrays in its buffer, or in a smaller one where it has filled less than half of that."""
        from gglspeedup.kernels.sample_cpu import second_of

        begin, end = second_of(edges), second_of(edges) + edges
        if len(output) > 2 * end + _SMALL:
            output, larger = self._pool.empty((end,), np.int64), output
            output[:] = larger[:end]
        return output[: 2 * edges].reshape(2, edges), output[begin:end], size

    def _output(self, found: Array, hop: int, edges: int) -> Array:
        """Return a buffer for a hop of so many edges, and tell the kernel of it."""
        from gglspeedup.kernels import sample_cpu as kernels

        output = self._pool.empty((kernels.second_of(edges) + edges,), np.int64)
        found[hop, kernels.ADDRESS], found[hop, kernels.ROOM] = output.ctypes.data, len(output)
        return output

    def _make_room(
        self, space: Workspace, sizes: tuple[int, ...], threads: int, progress: Array, found: Array,
        outputs: list[Array],
    ) -> None:  # fmt: skip
        """Make room for the hop at hand: for its rows and, once they are counted, for its edges."""
        from gglspeedup.kernels import sample_cpu as kernels

        hop, low, high, count, edges, _ = progress.tolist()
        chunk, chunks = kernels.rows_per_chunk(sizes[hop]), kernels.chunks_of(high - low, sizes[hop])
        space.make_room(
            start=high - low, degree=high - low, offsets=chunks + 1, left=chunks, c1=threads * chunk,
            c3=threads * chunk, words=threads * chunk * kernels.words_of(sizes[hop]),
            seen=threads * kernels.SEEN_SIZE, tags=threads * kernels.SEEN_SIZE, neighbour=edges, pending=edges,
            state=kernels.STATE_SIZE,
        )  # fmt: skip
        if edges < 0:
            return
        most = min(count + edges, self._num_nodes)
        nodes = space.grown("nodes", count, most + 1, self._index_dtype)
        space.reserve(most, count, nodes)
        if found[hop, kernels.ROOM] < kernels.second_of(edges) + edges:
            outputs[hop] = self._output(found, hop, edges)
