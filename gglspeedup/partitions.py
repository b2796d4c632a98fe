"""Cutting a graph into parts: METIS, contiguous or random; renumbering by part; what a cut costs."""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_flag, check_range, check_unique, host_ids
from gglspeedup.edges import distinct, edge_chunks
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.graph import CSRGraph, GraphLike, as_graph
from gglspeedup.metis import metis_parts

logger = logging.getLogger("gglspeedup")

Ids = npt.NDArray[np.int64]

_METHODS = ("metis", "contiguous", "random")
_MAX_SEED = 1 << 64


class Partition(NamedTuple):
    """A partition of the nodes; it unpacks as ``perm, ptr``.

    Attributes
    ----------
    perm : int64 array [num_nodes]
        The nodes, part by part; of a part in rising order.
    ptr : int64 array [num_parts + 1]
        Part i is ``perm[ptr[i]:ptr[i + 1]]``, and in the permuted graph the range ``ptr[i]:ptr[i + 1]``.
    """

    perm: Ids
    ptr: Ids


def partition(
    csr: GraphLike, num_parts: int, method: str = "metis", *, seed: int = 0, progress: bool = True
) -> Partition:  # fmt: skip
    """Return a cut of the nodes into parts, none of them empty.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph.
    num_parts : int
        1 to the number of nodes.
    method : str
        ``"metis"``: few edges between parts of about the same size, in any direction; needs the package pymetis.
        ``"contiguous"``: the nodes in their order, in parts of one size. ``"random"``: of one size, at random.
    seed : int
        0 to 2**64 - 1, of ``"random"`` and ``"metis"``. The same graph, number of parts and seed give the same parts,
        with METIS as long as its build is the same.
    progress : bool
        Whether METIS shows the time that has passed, when it takes more than some seconds: a bar if tqdm is installed.
        Its stages are in the log in any case.

    Raises
    ------
    MissingPackageError
        ``"metis"`` was asked for, and pymetis is not installed.
    PartitionError
        METIS failed.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, partition
    >>> perm, ptr = partition(CSRGraph([0, 1, 2, 3], [1, 2, 0]), 2, "contiguous")
    >>> perm.tolist(), ptr.tolist()
    ([0, 1, 2], [0, 2, 3])
    """
    graph = as_graph(csr)
    if method not in _METHODS:
        raise ArgumentValueError(explain("method", f"one of {_METHODS}", repr(method), 'leave it "metis"'))
    count = check_count(num_parts, "num_parts", 1, graph.num_nodes + 1)
    seed = check_count(seed, "seed", 0, _MAX_SEED)
    progress = check_flag(progress, "progress")
    if method == "metis":
        part = metis_parts(graph, count, seed, progress)
        _fill_empty(part, count)
        logger.info("partition: ordering the nodes of %d parts", count)
    else:
        each, rest = divmod(graph.num_nodes, count)
        part = np.repeat(np.arange(count), each + (np.arange(count) < rest))
        if method == "random":
            # Raw Philox words, as for the order of epochs: NumPy promises them to stay the same in every version.
            words = np.random.Philox(key=seed).random_raw(graph.num_nodes)
            dealt = np.empty_like(part)
            dealt[np.argsort(words, kind="stable")] = part
            part = dealt
    ptr = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=count))])
    return Partition(np.argsort(part, kind="stable"), ptr)


def _fill_empty(part: Ids, num_parts: int) -> None:
    """Give every empty part the last node of the part that is largest then, which METIS leaves undone."""
    sizes = np.bincount(part, minlength=num_parts)
    empty = np.flatnonzero(sizes == 0).tolist()
    if not empty:
        return
    nodes, last = np.argsort(part, kind="stable"), np.cumsum(sizes) - 1
    largest = [(-size, number) for number, size in enumerate(sizes.tolist())]
    heapq.heapify(largest)
    for number in empty:
        size, giver = largest[0]
        part[nodes[last[giver]]] = number
        last[giver] -= 1
        heapq.heapreplace(largest, (size + 1, giver))


def permute(csr: GraphLike, perm: Any) -> CSRGraph:
    """Return the graph with its nodes renumbered: node ``perm[i]`` becomes node i.

    Rows keep the order of their edges. The graph's ``edge_ids`` are those of `csr` or, if it has none, positions in
    its ``indices``: then ``weight[graph.edge_ids]`` are the edges' values in their new order, as ``x[perm]`` are the
    nodes'.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph.
    perm : int array-like or tensor [num_nodes]
        Every node once, as :func:`partition` gives them.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        `perm` is no order of all nodes.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, permute
    >>> graph = permute(CSRGraph([0, 2, 3, 3], [1, 2, 0]), [2, 0, 1])
    >>> graph.indptr.tolist(), graph.indices.tolist(), graph.edge_ids.tolist()
    ([0, 0, 2, 3], [2, 0, 1], [0, 1, 2])
    """
    graph = as_graph(csr)
    nodes = check_permutation(perm, graph.num_nodes)
    rank = np.empty(graph.num_nodes, graph.indices.dtype)
    rank[nodes] = np.arange(graph.num_nodes, dtype=rank.dtype)
    indptr = np.concatenate([[0], np.cumsum(graph.degree()[nodes])])
    shift = graph.indptr[nodes] - indptr[:-1]  # from a place in a new row to that in the old one
    indices, edge_ids = np.empty_like(graph.indices, subok=False), np.empty(graph.num_edges, np.int64)
    for begin, end, rows in edge_chunks(indptr):
        places = np.arange(begin, end) + shift[rows]
        indices[begin:end] = rank[graph.indices[places]]
        edge_ids[begin:end] = places if graph.edge_ids is None else graph.edge_ids[places]
    return CSRGraph(indptr, indices, edge_ids=edge_ids)


@dataclass(frozen=True, eq=False)
class PartitionStats:
    """What a partition costs those who work on its parts one by one.

    Attributes
    ----------
    edge_cut : int
        Stored edges whose ends lie in different parts.
    sizes : int64 array [num_parts]
        Nodes of each part.
    halo : int64 array [num_parts]
        Distinct neighbours outside the part, in the rows of each part.
    inter_intra : float
        Edges between parts over edges within parts: 0.0 without any edge, infinite if all are between.
    """

    edge_cut: int
    sizes: Ids
    halo: Ids
    inter_intra: float


def partition_stats(csr: GraphLike, perm: Any, ptr: Any) -> PartitionStats:
    """Return the edge cut, the sizes and the halos of a partition.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph that was cut; row v lists the in-neighbours of v.
    perm, ptr : int array-likes or tensors [num_nodes], [num_parts + 1]
        As :func:`partition` gives them; parts may be empty.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        They are no partition of this graph.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, partition
    >>> graph = CSRGraph([0, 1, 2, 3], [1, 2, 0])
    >>> partition_stats(graph, *partition(graph, 2, "contiguous"))
    PartitionStats(edge_cut=2, sizes=array([2, 1]), halo=array([1, 1]), inter_intra=2.0)
    """
    graph = as_graph(csr)
    nodes, bounds = check_permutation(perm, graph.num_nodes), check_ptr(ptr, graph.num_nodes)
    sizes = np.diff(bounds)
    if len(sizes) * graph.num_nodes >= 1 << 63:
        needs = "parts times nodes below 2^63"
        raise ArgumentValueError(explain("ptr", needs, f"{len(sizes)} times {graph.num_nodes}", "cut coarser"))
    part = np.empty(graph.num_nodes, np.int64)
    part[nodes] = np.repeat(np.arange(len(sizes)), sizes)
    # Edges are walked part by part; of one that goes on in the next chunk, `counted` tells who is in its halo already.
    cut, halo, counted = 0, np.zeros(len(sizes), np.int64), np.full(graph.num_nodes, -1)
    indptr = np.concatenate([[0], np.cumsum(graph.degree()[nodes])])
    shift = graph.indptr[nodes] - indptr[:-1]
    for begin, end, rows in edge_chunks(indptr):
        own, neighbours = part[nodes[rows]], graph.indices[np.arange(begin, end) + shift[rows]].astype(np.int64)
        outside = part[neighbours] != own
        cut += int(outside.sum())
        pairs = distinct(own[outside] * graph.num_nodes + neighbours[outside])
        owner, neighbour = np.divmod(pairs, graph.num_nodes)
        halo += np.bincount(owner[counted[neighbour] != owner], minlength=len(sizes))
        last = owner == own[-1]
        counted[neighbour[last]] = own[-1]
    within = graph.num_edges - cut
    ratio = cut / within if within else float("inf") if cut else 0.0
    return PartitionStats(cut, sizes, halo, ratio)


def check_permutation(perm: Any, num_nodes: int) -> Ids:
    """Return an order of all nodes as int64; raise if it is none."""
    nodes = host_ids(perm, "perm")
    if len(nodes) != num_nodes:
        raise ArgumentValueError(explain("perm", f"each of the {num_nodes} nodes", f"{len(nodes)}", "check the graph"))
    check_range(nodes, num_nodes, "perm")
    check_unique(nodes, num_nodes, "perm")
    return nodes


def check_ptr(ptr: Any, num_nodes: int) -> Ids:
    """Return the bounds of parts as int64; raise unless they rise from 0 to the number of nodes."""
    bounds = host_ids(ptr, "ptr")
    remedy = "pass what partition(...) returned for this graph"
    if len(bounds) < 2:
        raise ArgumentValueError(explain("ptr", "the bounds of at least one part", f"{len(bounds)} entries", remedy))
    if bounds[0] != 0 or bounds[-1] != num_nodes:
        needs, got = f"bounds from 0 to {num_nodes}", f"{int(bounds[0])} to {int(bounds[-1])}"
        raise ArgumentValueError(explain("ptr", needs, got, remedy))
    if bool((np.diff(bounds) < 0).any()):
        raise ArgumentValueError(explain("ptr", "bounds that never fall", "such that do", remedy))
    return bounds
