"""Gathering rows on the CPU: bytes are copied, whatever the dtype."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from gglspeedup.kernels.intrinsics import copy_bytes, prefetch_address

_LINE = 64
_BYTES_AHEAD = 4096  # of rows asked for before they are copied: deep enough to keep the memory busy
_CHUNK_BYTES = 1 << 18


@njit(cache=True, nogil=True, parallel=True)
def gather_rows(source, n_id, out, row_bytes):
    """Copy row n_id[i] at the address `source` to row i at the address `out`."""
    rows = len(n_id)
    per_chunk = max(1, _CHUNK_BYTES // max(row_bytes, 8))
    ahead = max(2, min(32, _BYTES_AHEAD // max(row_bytes, 1)))
    for c in prange((rows + per_chunk - 1) // per_chunk):
        begin = c * per_chunk
        end = min(begin + per_chunk, rows)
        for i in range(begin, end):
            if i + ahead < end:
                address = source + n_id[i + ahead] * row_bytes
                for line in range(0, row_bytes, _LINE):
                    prefetch_address(address + line)
            if row_bytes == 8:
                copy_bytes(out + i * 8, source + n_id[i] * 8, np.int64(8))
            elif row_bytes == 4:
                copy_bytes(out + i * 4, source + n_id[i] * 4, np.int64(4))
            else:
                copy_bytes(out + i * row_bytes, source + n_id[i] * row_bytes, np.int64(row_bytes))
