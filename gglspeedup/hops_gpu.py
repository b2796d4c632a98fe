"""What sampling a hop on a GPU takes: bounds of its rows and edges, and the launches of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gglspeedup.arguments import duplicate, out_of_range
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.workspace_gpu import Bound, Workspace


class DeviceGraph(NamedTuple):
    """A graph as kernels read it, and what bounds its samples."""

    indptr: Any
    indices: Any
    edge_ids: Any
    num_nodes: int
    num_edges: int
    max_degree: int

    def bounds(self, hops: Sequence[gpu.Hop], nodes: int, new: int) -> list[Bound]:
        """Bound hops, given bounds of the nodes before them and of those the hop before brought."""
        bounds = []
        for hop in hops:
            rows = new if hop.frontier else nodes
            drawn = hop.fanout > 0 and hop.replace
            edges = rows * (hop.fanout if drawn else min(hop.fanout or self.max_degree, self.max_degree))
            if not drawn:
                edges = min(edges, self.num_edges)
            new = min(edges, self.num_nodes)
            nodes = max(nodes, min(nodes + new, self.num_nodes))
            bounds.append(Bound(rows, edges, nodes))
        return bounds


def hops_of(sizes: Sequence[int], replace: bool, expand: str) -> tuple[gpu.Hop, ...]:
    """Return the hops of a batch as kernels are told of them; fanouts that are not positive take every neighbour."""
    frontier = expand == "frontier"
    return tuple(gpu.Hop(hop, frontier, max(0, int(fanout)), replace) for hop, fanout in enumerate(sizes))


def seeds_bound(count: int) -> int:
    """Return a power of two that bounds `count` seeds: so a short last batch has the launches of the others."""
    return 1 << max(0, count - 1).bit_length()


def check_counts(runtime: Runtime, counts: Any, seeds: Any, num_nodes: int) -> None:
    """Raise what the kernels have found of a batch's seeds; `counts` begin with the two places of bad ones."""

    def value(place: int) -> int:  # of the device's, here the host may wait again
        return int(runtime.read(seeds[place : place + 1])[0] if runtime.is_device(seeds) else seeds[place])

    place, repeat = int(counts[0]), int(counts[1])
    if place != gpu.NONE:
        raise out_of_range("seeds", place, value(place), num_nodes)
    if repeat != gpu.NONE:
        raise duplicate("seeds", repeat, value(repeat))


@dataclass(frozen=True)
class Launches:
    """Enqueues the kernels of hops, for one batch or, by its target, for several at once."""

    target: gpu.Target
    graph: DeviceGraph

    def start(self, workspace: Workspace, bound: int, seeds: Any) -> None:
        """Enqueue what comes before the first hop; `bound` is that of a batch's seeds."""
        a, table = workspace.arrays, workspace.table()
        if table.hashed:
            workspace.clear_table(self.target)
        gpu.insert_seeds(
            self.target, bound, a["state"], seeds, self.graph.num_nodes, a["nodes"], a["local_id"], a["first"], table
        )
        gpu.check_seeds(self.target, bound, a["state"], seeds, self.graph.num_nodes, a["first"], table)

    def refill(self, workspace: Workspace, hop: int, bound: int) -> None:
        """Enqueue the filling of a hash table that has replaced a smaller one within a batch, before a hop.

        `bound` is that of the batch's positions.
        """
        a = workspace.arrays
        workspace.clear_table(self.target)
        gpu.refill_table(
            self.target, bound, a["state"], hop, a["nodes"], a["local_id"], a["first"], workspace.table()
        )  # fmt: skip

    def count(self, workspace: Workspace, hop: gpu.Hop, rows: int) -> None:
        """Enqueue the part of a hop that finds its number of edges."""
        a = workspace.arrays
        gpu.count_rows(
            self.target, rows, a["state"], hop, self.graph.indptr, a["nodes"], a["row_start"], a["row_degree"],
            a["row_first"], a["sums"],
        )  # fmt: skip
        gpu.scan_sums(self.target, a["state"], hop, True, a["sums"])

    def finish(self, workspace: Workspace, hop: gpu.Hop, rows: int, edges: int) -> None:
        """Enqueue the rest of a hop: draw, relabel, list the new nodes."""
        a, table = workspace.arrays, workspace.table()
        gpu.draw(
            self.target, rows, edges, a["state"], hop, self.graph.indices, a["nodes"], a["row_start"], a["row_degree"],
            a["row_first"], a["sums"], a["neighbour"], a["position"], a["where"], a["first"], table,
        )  # fmt: skip
        gpu.count_first(self.target, edges, a["state"], hop.index, a["neighbour"], a["first"], a["sums"], table)
        gpu.scan_sums(self.target, a["state"], hop, False, a["sums"])
        gpu.assign(
            self.target, edges, a["state"], hop.index, a["neighbour"], a["first"], a["sums"], a["nodes"], a["local_id"]
        )
