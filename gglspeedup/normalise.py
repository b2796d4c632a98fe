"""Self-loops, and the edge weights of graph convolutions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gglspeedup.edges import edge_chunks
from gglspeedup.graph import CSRGraph, GraphLike, as_graph


def with_self_loops(csr: GraphLike) -> CSRGraph:
    """Return the graph with exactly one self-loop a node, at the end of its row.

    Self-loops that are there already make place for it; the other edges stay in their order. The result has no
    ``edge_ids``: samples report positions in its own ``indices``.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph.

    Examples
    --------
    >>> from gglspeedup import CSRGraph
    >>> graph = with_self_loops(CSRGraph([0, 2, 3], [0, 1, 0]))
    >>> graph.indptr.tolist(), graph.indices.tolist()
    ([0, 2, 4], [1, 0, 0, 1])
    """
    graph = as_graph(csr)
    nodes = graph.num_nodes
    loops = np.zeros(nodes, np.int64)
    for begin, end, rows in edge_chunks(graph.indptr):
        found = rows[graph.indices[begin:end] == rows]
        np.add.at(loops, found, 1)
    indptr = np.concatenate([[0], np.cumsum(graph.degree() - loops + 1)])
    indices = np.empty(int(indptr[-1]), graph.indices.dtype)
    kept = 0
    for begin, end, rows in edge_chunks(graph.indptr):
        neighbours = graph.indices[begin:end]
        others = neighbours != rows
        row = rows[others]
        # Each earlier row has one self-loop, at its end.
        indices[kept + np.arange(len(row)) + row] = neighbours[others]
        kept += len(row)
    indices[indptr[1:] - 1] = np.arange(nodes, dtype=indices.dtype)
    return CSRGraph(indptr, indices)


def symmetric_normalisation(csr: GraphLike) -> tuple[CSRGraph, npt.NDArray[np.float32]]:
    """Return the graph with self-loops, and the edge weights D^-1/2 (A + I) D^-1/2 of GCN.

    They are those of Kipf and Welling, "Semi-supervised classification with graph convolutional networks" (ICLR 2017):
    1 / sqrt(d(u) d(v)) for the edge from u to v, where d counts a node's row with its self-loop.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        Row v lists the in-neighbours of v; parallel edges count each.

    Returns
    -------
    graph : CSRGraph
        As :func:`with_self_loops` returns it.
    weight : float32 array [graph.num_edges]
        In the order of ``graph.indices``.

    Examples
    --------
    >>> from gglspeedup import CSRGraph
    >>> graph, weight = symmetric_normalisation(CSRGraph([0, 1, 1], [1]))
    >>> graph.indices.tolist(), weight.tolist()
    ([1, 0, 1], [0.7071067690849304, 0.5, 1.0])
    """
    graph = with_self_loops(csr)
    scale = 1 / np.sqrt(graph.degree())
    weight = np.empty(graph.num_edges, np.float32)
    for begin, end, rows in edge_chunks(graph.indptr):
        weight[begin:end] = scale[rows] * scale[graph.indices[begin:end]]
    return graph, weight
