"""Graphs for benchmarks, made from a seed: R-MAT, and one of the size and degrees of ogbn-products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from gglspeedup import CSRGraph


@njit(cache=True)
def _rmat_edges(scale, edges, seed, sources, targets):  # type: ignore[no-untyped-def]
    """R-MAT (Chakrabarti, Zhan and Faloutsos, SDM 2004) with a, b, c, d = 0.57, 0.19, 0.19, 0.05."""
    state = np.uint64(seed)
    for e in range(edges):
        source = target = 0
        for _ in range(scale):
            state += np.uint64(0x9E3779B97F4A7C15)
            z = state
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            u = np.float64((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 9007199254740992.0
            source = 2 * source + (1 if u >= 0.76 else 0)
            target = 2 * target + (1 if 0.57 <= u < 0.76 or u >= 0.95 else 0)
        sources[e] = source
        targets[e] = target


def rmat(scale: int, edges: int, seed: int = 1) -> CSRGraph:
    """Return an R-MAT graph of 2**scale nodes, whose ids are shuffled so that hubs lie anywhere."""
    sources, targets = np.empty(edges, np.int32), np.empty(edges, np.int32)
    _rmat_edges(scale, edges, seed, sources, targets)
    shuffled = np.random.default_rng(seed).permutation(1 << scale).astype(np.int32)
    graph = CSRGraph.from_edge_index(np.stack([shuffled[sources], shuffled[targets]]), 1 << scale)
    return CSRGraph(graph.indptr, graph.indices)


def products_like(nodes: int = 2_400_000, edges: int = 124_000_000, seed: int = 2) -> CSRGraph:
    """Return a graph with log-normal degrees and uniform neighbours: nearly every sampled node is a new one."""
    rng = np.random.default_rng(seed)
    weight = np.minimum(rng.lognormal(3.4, 1.1, nodes), 15_000)
    degree: npt.NDArray[np.int64] = np.maximum(weight * (edges / weight.sum()), 1).astype(np.int64)
    indptr = np.zeros(nodes + 1, np.int64)
    np.cumsum(degree, out=indptr[1:])
    return CSRGraph(indptr, rng.integers(0, nodes, int(indptr[-1]), dtype=np.int32))


def parted(
    parts: int, nodes: int, degree: int, ratio: float, seed: int = 3
) -> tuple[CSRGraph, npt.NDArray[np.int64]]:
    """Return a graph of equal parts, and the first node of each: a node has `degree` neighbours in its part; a part has
    a halo of `ratio` times its nodes, drawn from the others, and each node of it has `degree` neighbours there."""
    rng = np.random.default_rng(seed)
    edges = []
    for first in range(0, parts * nodes, nodes):
        own = rng.integers(first, first + nodes, (2, nodes * degree))
        own[1] = np.repeat(np.arange(first, first + nodes), degree)
        halo = rng.choice((parts - 1) * nodes, int(ratio * nodes), replace=False)
        halo = np.repeat(halo + nodes * (halo >= first), degree)
        edges += [own, np.stack([halo, rng.integers(first, first + nodes, len(halo))])]
    graph = CSRGraph.from_edge_index(np.concatenate(edges, axis=1), parts * nodes)
    return CSRGraph(graph.indptr, graph.indices), np.arange(0, parts * nodes + 1, nodes)


def make(name: str) -> CSRGraph:
    """Return a graph by name: ``products``, or ``rmat-SCALE-EDGES`` such as ``rmat-20-30000000``."""
    if name == "products":
        return products_like()
    kind, scale, edges = name.split("-")
    if kind != "rmat":
        raise SystemExit(f"unknown graph {name}: products, or rmat-SCALE-EDGES")
    return rmat(int(scale), int(edges))
