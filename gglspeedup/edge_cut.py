"""Taking edges out of a sampled batch, the least important first, and with them the nodes that nothing reaches then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.adjs import Adj, SampledBatch

Ids = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

# Importance of the edges of a hop: (batch, hop from the seeds, global ids of the sources) -> a number an edge.
Importance = Callable[[SampledBatch, int, Ids], Array]

_TAG = 0x6375_74  # keeps these words apart from those of the order of epochs, which have a key of 64 bits
_DAMPING = 0.85
_MOST_ROUNDS, _PRECISION = 100, 1e-8
_CHUNK = 1 << 20  # rows that a round of PageRank spreads at once


class EdgeCutter:
    """Cuts edges of one batch, to any fraction.

    Every target keeps the same fraction of its edges, rounded up: its most important ones, of equals the first.

    Parameters
    ----------
    batch : SampledBatch
        NumPy arrays.
    importance : callable
        See :func:`random_importance` and :func:`node_importance`.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, GPUSampler
    >>> batch = GPUSampler("cpu", CSRGraph([0, 2, 2, 2], [1, 2]), [-1]).sample([0])
    >>> cutter = EdgeCutter(batch, node_importance(np.array([0.0, 1.0, 2.0])))
    >>> cutter.cut(0.5).n_id.tolist()
    [0, 2]
    """

    def __init__(self, batch: SampledBatch, importance: Importance) -> None:
        self.batch = batch
        self.edges = sum(len(adj.e_id) for adj in batch.adjs)
        self._places = []
        for hop, adj in enumerate(reversed(batch.adjs)):
            weights = importance(batch, hop, batch.n_id[adj.row])
            self._places.append(_place_in_row(adj.col, weights, adj.size[1]))

    def cut(self, keep: float) -> SampledBatch:
        """Return the batch with a fraction of its edges.

        Parameters
        ----------
        keep : float
            Above 0, at most 1. Every target that has edges keeps at least one.
        """
        batch = self.batch
        n_id = np.asarray(batch.n_id)
        found = np.arange(batch.batch_size)  # old local ids of the nodes found so far, in their new order
        adjs: list[Adj] = []
        for adj, (place, degree) in zip(reversed(batch.adjs), self._places, strict=True):
            kept = place < np.ceil(keep * degree[adj.col])
            new_of = np.full(len(n_id), -1, np.int64)
            new_of[found] = np.arange(len(found))
            edges = np.flatnonzero(kept & (new_of[adj.col] >= 0))
            # Targets may have changed places, as they stand in the order in which the edges left find them.
            edges = edges[np.argsort(new_of[adj.col[edges]], kind="stable")]
            sources, targets = adj.row[edges], new_of[adj.col[edges]]
            unique, first = np.unique(sources, return_index=True)
            fresh = new_of[unique] < 0
            fresh_nodes = unique[fresh][np.argsort(first[fresh])]
            before = len(found)
            found = np.concatenate([found, fresh_nodes])
            new_of[fresh_nodes] = np.arange(before, len(found))
            adjs.append(Adj(np.stack([new_of[sources], targets]), adj.e_id[edges], (len(found), before)))
        return SampledBatch(n_id[found], adjs[::-1], batch.batch_size, batch.batch)


def _place_in_row(targets: Ids, importance: Array, rows: int) -> tuple[Ids, Ids]:
    """Return which place each edge has in its target's row by importance, from 0, and the lengths of the rows."""
    order = np.lexsort((np.arange(len(targets)), -importance, targets))
    degree = np.bincount(targets, minlength=rows).astype(np.int64)
    place = np.empty(len(targets), np.int64)
    place[order] = np.arange(len(targets)) - np.repeat(np.cumsum(degree) - degree, degree)
    return place, degree


def random_importance(seed: int) -> Importance:
    """Return the policy that cuts at random: raw Philox words of (seed, batch number, hop), one an edge."""

    def importance(batch: SampledBatch, hop: int, sources: Ids) -> Array:
        key, counter = (np.array(words, np.uint64) for words in ([seed, _TAG], [0, 0, batch.batch, hop]))
        words = np.random.Philox(key=key, counter=counter).random_raw(len(sources))
        return (words >> np.uint64(11)).astype(np.float64)  # exact, and may be negated

    return importance


def node_importance(weights: Array) -> Importance:
    """Return the policy that cuts the edges from the nodes of the least weight, [num_nodes]."""

    def importance(batch: SampledBatch, hop: int, sources: Ids) -> Array:
        return np.asarray(weights[sources], np.float64)

    return importance


def pagerank(indptr: Ids, indices: Array) -> npt.NDArray[np.float64]:
    """Return the PageRank of the nodes, float64 [num_nodes], damping 0.85, for the walk that sampling takes.

    Parameters
    ----------
    indptr : int64 array [num_nodes + 1]
    indices : int array [num_edges]
        Row v lists the nodes that v passes its rank on to; that of a node with an empty row goes to all.

    Examples
    --------
    >>> pagerank(np.array([0, 1, 2]), np.array([1, 0])).tolist()
    [0.5, 0.5]
    """
    nodes = len(indptr) - 1
    rank = np.full(nodes, 1 / max(nodes, 1))
    degree = np.diff(indptr)
    for _ in range(_MOST_ROUNDS):
        share = rank / np.maximum(degree, 1)
        gained = np.full(nodes, float(rank[degree == 0].sum()) / max(nodes, 1))
        for begin in range(0, nodes, _CHUNK):  # so that the copies stay small
            part = slice(begin, begin + _CHUNK)
            edges = indices[indptr[begin] : indptr[min(begin + _CHUNK, nodes)]]
            gained += np.bincount(edges, np.repeat(share[part], degree[part]), nodes)
        new = (1 - _DAMPING) / max(nodes, 1) + _DAMPING * gained
        change, rank = float(np.abs(new - rank).sum()), new
        if change < _PRECISION:
            break
    return rank
