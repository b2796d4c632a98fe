"""Neighbour sampling of whole batches on a GPU: the hop loop, its buffers, and the one read.

All hops of a batch are enqueued for bounds that follow from the number of seeds and the fanouts, the true counts
stay on the device, and the host reads them once, to make arrays of exactly that size; :meth:`CudaSampler.sample_each`
enqueues the next batch before it waits. As the launches are the same for every batch, the second batch of a kind is
recorded as a graph, and the following ones replay it: what differs between batches (seeds, their number, seed, batch,
stamp) is data in `state`, not an argument.

Only a hop whose bound is beyond `max_edges` (every neighbour of many nodes, on a large graph) costs a further read,
of that hop's true number of edges, before room is made for them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gglspeedup.batches_gpu import CudaBatches
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError, explain
from gglspeedup.hops_gpu import DeviceGraph, Launches, check_counts, hops_of, seeds_bound
from gglspeedup.in_flight import InFlight, one_ahead
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.pieces import DevicePieces
from gglspeedup.recordings_gpu import Recordings
from gglspeedup.workspace_gpu import STATE_SIZE, Bound, Workspace, Workspaces

SampledHop = tuple[Any, Any, tuple[int, int]]
Sampled = tuple[Any, list[SampledHop]]
Numbered = tuple[Any, int]


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
        self.max_edges = max_edges
        self._kept = (indptr, indices, edge_ids)  # the memory that kernels read
        read = [getattr(array, "table", array) for array in self._kept]
        num_edges = len(indices)
        self._graph = DeviceGraph(
            read[0], read[1], read[2], num_nodes, num_edges, num_edges if max_degree is None else max_degree
        )  # fmt: skip
        self._hashed = hashed = table == "hash"
        index_dtype = indices.dtype
        in_pieces = isinstance(indices, DevicePieces)
        self._target = gpu.Target(runtime, gpu.macros_of(index_dtype, hashed, in_pieces))
        self._launches = Launches(self._target, self._graph)
        self._recordings = Recordings(runtime, capture)
        # Without `self`: a sampler's memory goes when the sampler does, not at some later collection of cycles.
        self._workspaces = Workspaces(runtime, lambda: Workspace(runtime, num_nodes, index_dtype, hashed))
        macros = gpu.macros_of(index_dtype, True, in_pieces, many=True)
        self._many = CudaBatches(gpu.Target(runtime, macros), self._graph, index_dtype, self._recordings, max_edges)

    def sample(
        self, seeds: Any, sizes: Sequence[int], *, seed: int, batch: int, replace: bool = False, expand: str = "layer"
    ) -> Sampled:
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
        return self._sample_one(seeds, batch, hops_of(sizes, replace, expand), seed)

    def sample_each(
        self, batches: Iterable[Numbered], sizes: Sequence[int], *, seed: int, replace: bool = False,
        expand: str = "layer", at_once: int = 1,
    ) -> Generator[Sampled, None, None]:  # fmt: skip
        """Give what :meth:`sample` returns of each (seeds, batch), in order.

        Up to `at_once` batches are sampled together, as many as have room, and the next ones are enqueued before the
        host waits for theirs.
        """
        hops = hops_of(sizes, replace, expand)
        begin, alone = partial(self._begin, hops=hops, seed=seed), partial(self._alone, hops=hops, seed=seed)
        with contextlib.closing(one_ahead(self._groups(batches, hops, at_once), begin, alone)) as groups:
            for group in groups:
                yield from group

    def _groups(self, batches: Iterable[Numbered], hops: tuple[gpu.Hop, ...], at_once: int) -> Iterator[list[Numbered]]:
        """Give the batches in groups that have room; an error of theirs comes after those before it."""
        source, error = iter(batches), None
        while error is None:
            group = []
            try:
                for batch in itertools.islice(source, at_once):
                    group.append(batch)
            except Exception as raised:
                error = raised
            else:
                if not group:
                    return
            room = self._many.at_once(group, hops) if len(group) > 1 else 1
            for low in range(0, len(group), room):
                yield group[low : low + room]
        raise error

    def _begin(self, group: list[Numbered], hops: tuple[gpu.Hop, ...], seed: int) -> InFlight:
        """Enqueue batches, and the copy of their counts to the host; what is made is an iterable of results."""

        def finish() -> Iterable[Sampled]:
            try:
                with self.runtime.activate():
                    found: list[Sampled] = begun.finish()
            except (ArgumentIndexError, ArgumentValueError):
                if len(group) == 1:
                    raise
                return self._one_by_one(group, hops, seed)  # those before the bad one are not lost
            return found

        with self.runtime.activate():
            one = len(group) == 1
            begun = self._begin_one(*group[0], hops, seed) if one else self._many.begin(group, hops, seed)
        return InFlight(finish, begun.abandon)

    def _alone(self, group: list[Numbered], hops: tuple[gpu.Hop, ...], seed: int) -> Iterable[Sampled]:
        """Return batches that had no room beside others: together if they have room now, else one by one."""
        try:
            found: Iterable[Sampled] = self._begin(group, hops, seed).finish()
        except MemoryError as error:
            if len(group) == 1:
                raise
            self._many.give_up(error)
            return self._one_by_one(group, hops, seed)
        return found

    def _one_by_one(self, group: list[Numbered], hops: tuple[gpu.Hop, ...], seed: int) -> Iterator[Sampled]:
        return (self._sample_one(*numbered, hops, seed) for numbered in group)

    def _sample_one(self, seeds: Any, batch: int, hops: tuple[gpu.Hop, ...], seed: int) -> Sampled:
        with self.runtime.activate():
            (sampled,) = self._begin_one(seeds, batch, hops, seed).finish()
        return sampled

    def _begin_one(self, seeds: Any, batch: int, hops: tuple[gpu.Hop, ...], seed: int) -> InFlight:
        order = _Batch(len(seeds), seeds_bound(len(seeds)), hops)
        with self._workspaces.begin() as workspace:
            self._send(workspace, order, seeds, seed, batch)
            self._run(workspace, order)
        return InFlight(partial(self._finish, workspace, order, seeds), partial(self._workspaces.abandon, workspace))

    def _finish(self, workspace: Workspace, order: _Batch, seeds: Any) -> list[Sampled]:
        with self._workspaces.finish(workspace):
            counts = workspace.finish_read()
            check_counts(self.runtime, counts, seeds, self.num_nodes)
            return [self._emit(workspace, order, counts)]

    def _send(self, workspace: Workspace, order: _Batch, seeds: Any, seed: int, batch: int) -> None:
        """Put the seeds and all that is new in this batch on the device, in one copy."""
        workspace.reserve_seeds(order.bound)
        stamp = workspace.next_stamp(self._target)
        staging = workspace.staging
        signed = seed - (1 << 64) if seed >> 63 else seed
        staging[: gpu.EDGES + 1] = order.count, signed, batch, stamp, 0, 0, 0, gpu.NONE, gpu.NONE, order.count, 0
        state = workspace.arrays["state"]
        if self.runtime.is_device(seeds):
            self.runtime.upload(staging[:STATE_SIZE], state[:STATE_SIZE])
            gpu.copy_ids(self._target, order.count, seeds, workspace.arrays["seeds"])
        else:
            end = STATE_SIZE + order.count
            staging[STATE_SIZE:end] = seeds
            self.runtime.upload(staging[:end], state[:end])

    def _run(self, workspace: Workspace, order: _Batch) -> None:
        """Enqueue all hops and the copy of the counts (see `Workspace.start_read`)."""
        hop, edges_before, nodes, new = 0, 0, order.bound, order.bound
        while True:
            bounds = self._graph.bounds(order.hops[hop:], nodes, new)
            fits = next((i for i, bound in enumerate(bounds) if bound.edges > self.max_edges), len(bounds))
            last = fits == len(bounds)
            fresh = workspace.reserve(order.bound, edges_before, bounds[: fits + 1], last)
            if hop == 0 and last:
                self._launch_all(workspace, order, bounds)
                workspace.start_read(len(order.hops))
                return
            if hop == 0:
                self._launches.start(workspace, order.bound, workspace.arrays["seeds"])
            elif fresh:
                self._launches.refill(workspace, hop, order.bound + edges_before)
            for h, bound in zip(order.hops[hop:], bounds[:fits], strict=False):
                self._launches.count(workspace, h, bound.rows)
                self._launches.finish(workspace, h, bound.rows, bound.edges)
            if last:
                workspace.start_read(len(order.hops))
                return
            hop += fits
            self._launches.count(workspace, order.hops[hop], bounds[fits].rows)
            workspace.start_read(hop + 1)
            counts = workspace.finish_read()
            if counts[0] != gpu.NONE or counts[1] != gpu.NONE:
                return  # bad seeds, of which the end of the batch tells
            nodes, edges_before, edges_after = (int(cell) for cell in counts[[2 + 2 * hop, 3 + 2 * hop, 5 + 2 * hop]])
            edges = edges_after - edges_before
            new = min(edges, self.num_nodes)
            bound = Bound(bounds[fits].rows, edges, min(nodes + new, self.num_nodes))
            if workspace.reserve(order.bound, edges_before, [bound]):
                self._launches.refill(workspace, hop, order.bound + edges_before)
            self._launches.finish(workspace, order.hops[hop], bound.rows, edges)
            hop, edges_before, nodes = hop + 1, edges_after, bound.nodes

    def _launch_all(self, workspace: Workspace, order: _Batch, bounds: Sequence[Bound]) -> None:
        """Enqueue a batch that needs one read."""

        def enqueue() -> None:
            self._launches.start(workspace, order.bound, workspace.arrays["seeds"])
            for hop, bound in zip(order.hops, bounds, strict=True):
                self._launches.count(workspace, hop, bound.rows)
                self._launches.finish(workspace, hop, bound.rows, bound.edges)

        self._recordings.run(workspace.graphs, order.key, enqueue)

    def _emit(self, workspace: Workspace, order: _Batch, counts: Any) -> Sampled:
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
                    self._graph.edge_ids, edge_index, e_id,
                )  # fmt: skip
            hops.append((edge_index, e_id, (nodes[hop + 1], nodes[hop])))
        n_id = runtime.empty(nodes[-1], np.int64)
        if nodes[-1]:
            gpu.copy_ids(self._target, nodes[-1], a["nodes"], n_id)
        return n_id, hops[::-1]
