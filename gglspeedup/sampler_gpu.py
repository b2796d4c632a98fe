"""Neighbour sampling of whole batches on a GPU: the hop loop, its buffers, and the one read.

All hops of a batch are enqueued for bounds that follow from the number of seeds and the fanouts, the true counts
stay on the device, and the host reads them once, to make arrays of exactly that size. As the launches are then the
same for every batch, the second batch of a kind is recorded as a graph, and the following ones replay it: what
differs between batches (seeds, their number, seed, batch, stamp) is data in `state`, not an argument.

Only a hop whose bound is beyond `max_edges` (every neighbour of many nodes, on a large graph) costs a further read,
of that hop's true number of edges, before room is made for them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gglspeedup.arguments import duplicate, out_of_range
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError, explain
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.pieces import DevicePieces
from gglspeedup.workspace_gpu import STATE_SIZE, Bound, Workspace

logger = logging.getLogger("gglspeedup")

SampledHop = tuple[Any, Any, tuple[int, int]]

_MAX_GRAPHS = 8


@dataclass(frozen=True)
class _Batch:
    """What is the same for all hops of a call."""

    count: int  # seeds
    bound: int  # of seeds: a power of two, so that a short last batch has the launches of the others
    hops: tuple[gpu.Hop, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides the launches of a batch that needs one read."""
        return (self.bound, *self.hops)


class CudaSampler:
    """Samples batches on one GPU. Any number of threads may call :meth:`sample` at once.

    Parameters
    ----------
    runtime : Runtime
        The device.
    indptr, indices : device array or DevicePieces
        The graph, int64 and int32 or int64, where kernels can read it: in GPU memory or pinned and mapped; all whole or
        all in pieces. Degrees must be below 2**32.
    edge_ids : device array or DevicePieces of int64, or None
        What to return as `e_id` instead of positions in `indices`.
    num_nodes : int
        Nodes of the graph.
    table : {"dense", "hash"}
        Relabel by one 8-byte entry a node, or by a hash table of the batch's nodes.
    max_degree : int, optional
        The largest degree; makes buffers smaller for hops that take every neighbour.
    max_edges : int
        A hop that may have more edges than this costs one further read of the host.
    capture : bool
        Whether batches of one kind are recorded as a graph and replayed.
    """

    def __init__(
        self, runtime: Runtime, indptr: Any, indices: Any, edge_ids: Any, num_nodes: int, table: str = "dense", *,
        max_degree: int | None = None, max_edges: int = 1 << 26, capture: bool = True,
    ) -> None:  # fmt: skip
        if table not in ("dense", "hash"):
            raise ArgumentValueError(explain("table", '"dense" or "hash"', repr(table), "choose one of them"))
        if indices.dtype == np.int32 and num_nodes > 1 << 31:
            needs = f"int64 for {num_nodes} nodes"
            raise ArgumentValueError(explain("indices", needs, "int32", "convert them: indices.astype(numpy.int64)"))
        self.runtime = runtime
        self.num_nodes = num_nodes
        self.num_edges = len(indices)
        self.max_degree = self.num_edges if max_degree is None else max_degree
        self.max_edges = max_edges
        self._capture = capture
        self._index_dtype = indices.dtype
        self._kept = (indptr, indices, edge_ids)  # the memory that kernels read
        self._graph = tuple(getattr(array, "table", array) for array in self._kept)
        self._hashed = table == "hash"
        in_pieces = isinstance(indices, DevicePieces)
        self._target = gpu.Target(runtime, gpu.macros_of(indices.dtype, self._hashed, in_pieces))
        self._free: list[Workspace] = []
        self._lock = threading.Lock()

    def sample(
        self, seeds: Any, sizes: Sequence[int], *, seed: int, batch: int, replace: bool = False, expand: str = "layer"
    ) -> tuple[Any, list[SampledHop]]:
        """Sample one batch.

        Parameters
        ----------
        seeds : numpy.ndarray or device array
            Unique node ids, int64, one-dimensional, contiguous.
        sizes : sequence of int
            The fanout of each hop, nearest the seeds first, up to MAX_FANOUT; not positive takes every neighbour.
        seed, batch : int
            Key and counter of the randomness, below 2**64 and 2**48.
        replace : bool
            Draw with replacement.
        expand : {"layer", "frontier"}
            Draw for every node found so far, or for those the last hop brought.

        Returns
        -------
        n_id : device array of int64
            The seeds, then the other nodes by first occurrence.
        hops : list of (edge_index, e_id, (n_src, n_dst))
            Outermost first.

        Raises
        ------
        ArgumentIndexError
            A seed is no node; the first such is named.
        ArgumentValueError
            A seed repeats an earlier one, or a batch might have 2**31 edges.
        """
        frontier = expand == "frontier"
        hops = tuple(gpu.Hop(hop, frontier, max(0, int(fanout)), replace) for hop, fanout in enumerate(sizes))
        order = _Batch(len(seeds), 1 << max(0, len(seeds) - 1).bit_length(), hops)
        with self.runtime.activate():
            workspace = self._lease()
            # A workspace that an error leaves in an unknown state is not used again; bad arguments are found
            # either before anything was enqueued or after the read.
            try:
                self._send(workspace, order, seeds, seed, batch)
                counts = self._run(workspace, order)
                self._check(counts, seeds)
                result = self._emit(workspace, order, counts)
                self._release(workspace)
            except (ArgumentIndexError, ArgumentValueError):
                self._release(workspace)
                raise
            except BaseException:
                with contextlib.suppress(Exception):  # what was enqueued may still use the buffers that go now
                    self.runtime.read(workspace.arrays["state"][:1])
                raise
        return result

    def _lease(self) -> Workspace:
        with self._lock:
            workspace = self._free.pop() if self._free else None
        if workspace is None:
            return Workspace(self.runtime, self.num_nodes, self._index_dtype, self._hashed)
        self.runtime.wait(workspace.event)
        return workspace

    def _release(self, workspace: Workspace) -> None:
        workspace.event = self.runtime.record(workspace.event)
        with self._lock:
            self._free.append(workspace)

    def _send(self, workspace: Workspace, order: _Batch, seeds: Any, seed: int, batch: int) -> None:
        """Put the seeds and all that is new in this batch on the device, in one copy."""
        workspace.reserve_seeds(order.bound)
        stamp = workspace.next_stamp(self._target)
        staging = workspace.staging
        signed = seed - (1 << 64) if seed >> 63 else seed
        staging[: gpu.EDGES + 1] = order.count, signed, batch, stamp, gpu.NONE, gpu.NONE, order.count, 0
        state = workspace.arrays["state"]
        if self.runtime.is_device(seeds):
            self.runtime.upload(staging[:STATE_SIZE], state[:STATE_SIZE])
            gpu.copy_ids(self._target, order.count, seeds, workspace.arrays["seeds"])
        else:
            end = STATE_SIZE + order.count
            staging[STATE_SIZE:end] = seeds
            self.runtime.upload(staging[:end], state[:end])

    def _bounds(self, order: _Batch, hop: int, nodes: int, new: int) -> list[Bound]:
        """Bound the hops from `hop` on, given bounds of the nodes before it and of those the last hop brought."""
        bounds = []
        for fanout, replace, frontier in ((h.fanout, h.replace, h.frontier) for h in order.hops[hop:]):
            rows = new if frontier else nodes
            drawn = fanout > 0 and replace
            edges = rows * (fanout if drawn else min(fanout or self.max_degree, self.max_degree))
            if not drawn:
                edges = min(edges, self.num_edges)
            new = min(edges, self.num_nodes)
            nodes = max(nodes, min(nodes + new, self.num_nodes))
            bounds.append(Bound(rows, edges, nodes))
        return bounds

    def _run(self, workspace: Workspace, order: _Batch) -> Any:
        """Run all hops; return the counts (see `Workspace.read`)."""
        hop, edges_before, nodes, new = 0, 0, order.bound, order.bound
        while True:
            bounds = self._bounds(order, hop, nodes, new)
            fits = next((i for i, bound in enumerate(bounds) if bound.edges > self.max_edges), len(bounds))
            last = fits == len(bounds)
            fresh = workspace.reserve(order.bound, edges_before, bounds[: fits + 1], last)
            if hop == 0 and last:
                self._launch_all(workspace, order, bounds)
                return workspace.read(len(order.hops))
            if hop == 0:
                self._start(workspace, order)
            elif fresh:
                self._refill(workspace, order, hop, edges_before)
            for h, bound in zip(order.hops[hop:], bounds[:fits], strict=False):
                self._count(workspace, h, bound.rows)
                self._finish(workspace, h, bound.rows, bound.edges)
            if last:
                return workspace.read(len(order.hops))
            hop += fits
            self._count(workspace, order.hops[hop], bounds[fits].rows)
            counts = workspace.read(hop + 1)
            if counts[0] != gpu.NONE or counts[1] != gpu.NONE:
                return counts
            nodes, edges_before, edges_after = (int(cell) for cell in counts[[2 + 2 * hop, 3 + 2 * hop, 5 + 2 * hop]])
            edges = edges_after - edges_before
            new = min(edges, self.num_nodes)
            bound = Bound(bounds[fits].rows, edges, min(nodes + new, self.num_nodes))
            if workspace.reserve(order.bound, edges_before, [bound]):
                self._refill(workspace, order, hop, edges_before)
            self._finish(workspace, order.hops[hop], bound.rows, edges)
            hop, edges_before, nodes = hop + 1, edges_after, bound.nodes

    def _launch_all(self, workspace: Workspace, order: _Batch, bounds: Sequence[Bound]) -> None:
        """Enqueue a batch that needs one read: as a graph, if its kind has been seen before."""

        def enqueue() -> None:
            self._start(workspace, order)
            for hop, bound in zip(order.hops, bounds, strict=True):
                self._count(workspace, hop, bound.rows)
                self._finish(workspace, hop, bound.rows, bound.edges)

        graphs = workspace.graphs
        if not self._capture or order.key not in graphs:
            # The first batch of a kind compiles its kernels, which a recording must not.
            enqueue()
            graphs[order.key] = None
        else:
            if graphs[order.key] is None:
                graphs[order.key] = self._record(enqueue)
            if graphs[order.key] is None:
                enqueue()
            else:
                self.runtime.replay(graphs[order.key])
            graphs.move_to_end(order.key)
        if len(graphs) > _MAX_GRAPHS:
            graphs.popitem(last=False)

    def _record(self, enqueue: Callable[[], None]) -> Any:
        """Return the recorded launches, or None, from now on, if they cannot be."""
        try:
            return self.runtime.capture(enqueue)
        except Exception as error:  # of a recording nothing has run
            logger.warning("batches cannot be recorded as CUDA graphs (%s): each of their kernels is launched", error)
            self._capture = False
            return None

    def _start(self, workspace: Workspace, order: _Batch) -> None:
        """Enqueue what comes before the first hop."""
        a, table = workspace.arrays, workspace.table()
        if table.hashed:
            workspace.clear_table(self._target)
        gpu.insert_seeds(
            self._target, order.bound, a["state"], a["seeds"], self.num_nodes, a["nodes"], a["local_id"], a["first"],
            table,
        )  # fmt: skip
        gpu.check_seeds(self._target, order.bound, a["state"], a["seeds"], self.num_nodes, a["first"], table)

    def _refill(self, workspace: Workspace, order: _Batch, hop: int, edges: int) -> None:
        """Enqueue the filling of a hash table that has replaced a smaller one within a batch."""
        a = workspace.arrays
        workspace.clear_table(self._target)
        gpu.refill_table(
            self._target, order.bound + edges, a["state"], hop, a["nodes"], a["local_id"], a["first"],
            workspace.table(),
        )  # fmt: skip

    def _count(self, workspace: Workspace, hop: gpu.Hop, rows: int) -> None:
        """Enqueue the part of a hop that finds its number of edges."""
        a = workspace.arrays
        gpu.count_rows(
            self._target, rows, a["state"], hop, self._graph[0], a["nodes"], a["row_start"], a["row_degree"],
            a["row_first"], a["sums"],
        )  # fmt: skip
        gpu.scan_sums(self._target, a["state"], hop, True, a["sums"])

    def _finish(self, workspace: Workspace, hop: gpu.Hop, rows: int, edges: int) -> None:
        """Enqueue the rest of a hop: draw, relabel, list the new nodes."""
        a, table = workspace.arrays, workspace.table()
        gpu.draw(
            self._target, rows, edges, a["state"], hop, self._graph[1], a["nodes"], a["row_start"], a["row_degree"],
            a["row_first"], a["sums"], a["neighbour"], a["position"], a["where"], a["first"], table,
        )  # fmt: skip
        gpu.count_first(self._target, edges, a["state"], hop.index, a["neighbour"], a["first"], a["sums"], table)
        gpu.scan_sums(self._target, a["state"], hop, False, a["sums"])
        gpu.assign(
            self._target, edges, a["state"], hop.index, a["neighbour"], a["first"], a["sums"], a["nodes"],
            a["local_id"],
        )  # fmt: skip

    def _check(self, counts: Any, seeds: Any) -> None:
        """Raise what the seeds' kernels have found."""
        place, repeat = int(counts[0]), int(counts[1])
        if place != gpu.NONE:
            raise out_of_range("seeds", place, self._value(seeds, place), self.num_nodes)
        if repeat != gpu.NONE:
            raise duplicate("seeds", repeat, self._value(seeds, repeat))

    def _value(self, seeds: Any, place: int) -> int:
        """Return one seed, for an error: here the host may wait again."""
        return int(self.runtime.read(seeds[place : place + 1])[0] if self.runtime.is_device(seeds) else seeds[place])

    def _emit(self, workspace: Workspace, order: _Batch, counts: Any) -> tuple[Any, list[SampledHop]]:
        """Write the results into new arrays of exactly their size."""
        a, runtime = workspace.arrays, self.runtime
        cells = [int(cell) for cell in counts[2:]]
        nodes, edges = cells[0::2], cells[1::2]
        hops: list[SampledHop] = []
        for hop in range(len(order.hops)):
            count = edges[hop + 1] - edges[hop]
            edge_index = runtime.empty((2, count), np.int64)
            e_id = runtime.empty(count, np.int64)
            if count:
                gpu.emit_edges(
                    self._target, order.count, edges[hop], count, a["first"], a["local_id"], a["position"], a["where"],
                    self._graph[2], edge_index, e_id,
                )  # fmt: skip
            hops.append((edge_index, e_id, (nodes[hop + 1], nodes[hop])))
        n_id = runtime.empty(nodes[-1], np.int64)
        if nodes[-1]:
            gpu.copy_ids(self._target, nodes[-1], a["nodes"], n_id)
        return n_id, hops[::-1]
