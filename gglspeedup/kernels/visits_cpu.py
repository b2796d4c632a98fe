"""Counting visits on the CPU."""

from __future__ import annotations

from numba import njit

from gglspeedup.kernels.visits import add_visit

_add_visit = njit(add_visit)


@njit(cache=True, nogil=True)
def count_visits(n_id, visits):
    """Add 1 to visits[v] for each v of n_id."""
    for i in range(len(n_id)):
        _add_visit(i, n_id, visits)
