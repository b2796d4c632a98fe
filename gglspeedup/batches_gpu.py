"""Several batches on a GPU in the launches of one: what small batches cost is launches and the wait, not their edges.

Every kernel has blocks of its own for each batch, whose state, arrays and table lie behind those of the batch before
(`batch.cuh`). One copy takes all states and seeds to the device, one read brings all counts back, and one kernel
writes all results into one buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gglspeedup.hops_gpu import DeviceGraph, Launches, check_counts, seeds_bound
from gglspeedup.in_flight import InFlight
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.recordings_gpu import Recordings
from gglspeedup.workspace_gpu import BatchesWorkspace, Workspaces

logger = logging.getLogger("gglspeedup")

# Seeds and edges of all batches of a launch, by their bounds: some 0.8 GB of buffers. Many more fill the GPU anyway.
_MOST_POSITIONS = 1 << 23
_MOST_BATCHES = 1024

Batches = Sequence[tuple[Any, int]]


class CudaBatches:
    """Samples several batches at once. Any number of threads may do so.

    Parameters
    ----------
    target : Target
        Kernels of many batches.
    graph : DeviceGraph
        The graph.
    index_dtype : dtype
        Of its indices.
    recordings : Recordings
        What makes graphs of launches.
    max_edges : int
        A batch with a hop that may have more edges is not sampled together with others.
    """

    def __init__(
        self, target: gpu.Target, graph: DeviceGraph, index_dtype: Any, recordings: Recordings, max_edges: int
    ) -> None:
        runtime = target.runtime
        self._runtime = runtime
        self._target = target
        self._graph = graph
        self._recordings = recordings
        self._max_edges = max_edges
        self._workspaces = Workspaces(runtime, lambda: BatchesWorkspace(runtime, index_dtype))
        self._given_up = False

    def at_once(self, batches: Batches, hops: tuple[gpu.Hop, ...]) -> int:
        """Return how many of the batches have room in a launch; 1 if they have to be sampled one by one."""
        bound = _bound(batches)
        bounds = self._graph.bounds(hops, bound, bound)
        if self._given_up or len(hops) > gpu.MOST_HOPS or any(hop.edges > self._max_edges for hop in bounds):
            return 1
        stride = bound + sum(hop.edges for hop in bounds)
        return max(1, min(_MOST_BATCHES, _MOST_POSITIONS // stride))

    def give_up(self, error: MemoryError) -> None:
        """Have batches sampled one by one from now on, as their buffers had no room."""
        logger.warning("no room to sample several batches at once (%s): they are sampled one by one", error)
        self._given_up = True

    def begin(self, batches: Batches, hops: tuple[gpu.Hop, ...], seed: int) -> InFlight:
        """Enqueue batches, no more than there is room for; what is made is a list of what `CudaSampler.sample` returns.

        Raises
        ------
        ArgumentIndexError, ArgumentValueError
            When it is finished: a seed of a batch, the first such batch, is no node, or repeats an earlier one.
        """
        bound, count = _bound(batches), len(batches)
        bounds = self._graph.bounds(hops, bound, bound)
        stride = bound + sum(hop.edges for hop in bounds)
        target = self._target._replace(batches=count)
        launches = Launches(target, self._graph)
        with self._workspaces.begin() as workspace:
            workspace.reserve_states(count, count * bound)
            workspace.reserve_batches(count, stride, max(bound, *(hop.nodes for hop in bounds)))
            self._send(workspace, batches, seed, stride)

            def enqueue() -> None:
                launches.start(workspace, bound, workspace.arrays["state"][count * gpu.BATCH_STATE_SIZE :])
                for hop, most in zip(hops, bounds, strict=True):
                    launches.count(workspace, hop, most.rows)
                    launches.finish(workspace, hop, most.rows, most.edges)
                gpu.place_outputs(target, workspace.arrays["state"], len(hops))

            self._recordings.run(workspace.graphs, (count, bound, *hops), enqueue)
            workspace.start_read_states(count)
        finish = partial(self._finish, workspace, target, batches, len(hops))
        return InFlight(finish, partial(self._workspaces.abandon, workspace))

    def _finish(
        self, workspace: BatchesWorkspace, target: gpu.Target, batches: Batches, hops: int
    ) -> list[tuple[Any, list[Any]]]:
        with self._workspaces.finish(workspace):
            states = workspace.finish_read().reshape(-1, gpu.BATCH_STATE_SIZE)
            for (seeds, _), state in zip(batches, states, strict=True):
                check_counts(self._runtime, state[gpu.BAD_RANGE :], seeds, self._graph.num_nodes)
            return self._emit(workspace, target, states, hops)

    def _send(self, workspace: BatchesWorkspace, batches: Batches, seed: int, stride: int) -> None:
        """Put the states and the seeds on the device, in one copy; seeds that are there already take one each."""
        device, state, staging = self._runtime.is_device, workspace.arrays["state"], workspace.staging
        states = len(batches) * gpu.BATCH_STATE_SIZE
        lengths = np.array([len(seeds) for seeds, _ in batches])
        first = np.cumsum(lengths) - lengths
        cells = staging[:states].reshape(len(batches), -1)
        cells[:, gpu.SEEDS] = cells[:, gpu.NODES] = lengths
        cells[:, gpu.SEED] = seed - (1 << 64) if seed >> 63 else seed
        cells[:, gpu.BATCH] = [number for _, number in batches]
        cells[:, gpu.STAMP] = cells[:, gpu.OUTPUT] = cells[:, gpu.EDGES] = 0
        cells[:, gpu.STRIDE] = stride
        cells[:, gpu.FIRST_SEED] = first
        cells[:, gpu.BAD_RANGE] = cells[:, gpu.BAD_DUPLICATE] = gpu.NONE
        places = (first + states).tolist()
        end = states
        for (seeds, _), place in zip(batches, places, strict=True):
            if not device(seeds):
                end = place + len(seeds)
                staging[place:end] = seeds
        self._runtime.upload(staging[:end], state[:end])
        for (seeds, _), place in zip(batches, places, strict=True):
            if device(seeds):
                gpu.copy_ids(self._target, len(seeds), seeds, state[place : place + len(seeds)])

    def _emit(
        self, workspace: BatchesWorkspace, target: gpu.Target, states: Any, hops: int
    ) -> list[tuple[Any, list[Any]]]:
        """Write the results of all batches into one new buffer, and cut it into arrays."""
        a = workspace.arrays
        nodes = states[:, gpu.NODES :: 2][:, : hops + 1]
        edges = np.diff(states[:, gpu.EDGES :: 2][:, : hops + 1], axis=1)
        size = int(states[-1, gpu.OUTPUT]) + gpu.room_of(int(nodes[-1, -1]))
        size += sum(gpu.room_of(2 * count) + gpu.room_of(count) for count in edges[-1].tolist())
        output = self._runtime.empty(size, np.int64)
        if size:
            gpu.emit_batches(
                target, int(max(nodes[:, -1].max(), edges.max())), a["state"], hops, a["nodes"], a["first"],
                a["local_id"], a["position"], a["where"], self._graph.edge_ids, output,
            )  # fmt: skip
        begins = states[:, gpu.OUTPUT].tolist()
        return [_cut(output, *own) for own in zip(begins, nodes.tolist(), edges.tolist(), strict=True)]


def _bound(batches: Batches) -> int:
    """Return the bound of the seeds of each of the batches."""
    return seeds_bound(max((len(seeds) for seeds, _ in batches), default=0))


def _cut(output: Any, begin: int, nodes: list[int], edges: list[int]) -> tuple[Any, list[Any]]:
    """Return n_id and the hops of a batch, outermost first: parts of the output."""
    n_id = output[begin : begin + nodes[-1]]
    begin += gpu.room_of(nodes[-1])
    hops = []
    for hop, count in enumerate(edges):
        edge_index = output[begin : begin + 2 * count].reshape(2, count)
        begin += gpu.room_of(2 * count)
        hops.append((edge_index, output[begin : begin + count], (nodes[hop + 1], nodes[hop])))
        begin += gpu.room_of(count)
    return n_id, hops[::-1]
