"""Writing history rows on the CPU: stamps first, then the rows whose stamp says that they are the last."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from gglspeedup.kernels.history import stamp_of
from gglspeedup.kernels.intrinsics import copy_bytes, fetch_add

_stamp_of = njit(stamp_of)
_ROWS = 512  # a chunk


@njit(cache=True, nogil=True)
def next_number(pushes, table):
    """Count a push to a table, which other processes may count at the same time, and return its number."""
    return fetch_add(pushes, table, 1) + 1


@njit(cache=True, nogil=True)
def stamp_rows(n_id, number, stamps):
    """Note that item i of push `number` writes row n_id[i]."""
    for i in range(len(n_id)):
        stamps[n_id[i]] = _stamp_of(number, i)


@njit(cache=True, nogil=True, parallel=True)
def scatter_rows(values, n_id, number, stamps, rows, row_bytes):
    """Copy row i at the address `values` to row n_id[i] at the address `rows`, unless a later item writes there."""
    count = len(n_id)
    for c in prange((count + _ROWS - 1) // _ROWS):
        for i in range(c * _ROWS, min(count, (c + 1) * _ROWS)):
            if stamps[n_id[i]] == _stamp_of(number, i):
                copy_bytes(rows + n_id[i] * row_bytes, values + i * row_bytes, np.int64(row_bytes))
