"""Building a CSR from a list of edges on the CPU."""

from __future__ import annotations

from numba import njit


@njit(cache=True, nogil=True)
def group_edges(row, column, place, indices, edge_ids):
    """Write each edge behind those of its row that came before it; place[v] starts as indptr[v], and is used up."""
    for e in range(len(row)):
        v = row[e]
        at = place[v]
        place[v] = at + 1
        indices[at] = column[e]
        edge_ids[at] = e
