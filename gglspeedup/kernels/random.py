"""Counter-based randomness: Philox4x32-10 and unbiased bounded integers, for the CPU kernels.

Philox is of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the constants
of section 3; the range reduction is of Lemire, "Fast random integer generation in an interval" (ACM TOMACS 2019).

The key is the seed. The counter of a draw is a function of what it is for, and of nothing else:

====  =======================================================================
word  bits
====  =======================================================================
0     0-15: draw // 4; 16-31: attempt (0, then 1, 2, ... after a rejection)
1     node, bits 0-31
2     batch, bits 0-31
3     0-7: node, bits 32-39; 8-15: hop; 16-31: batch, bits 32-47
====  =======================================================================

Draw j reads word j % 4 of its block. `sample.cu` holds the same in CUDA C++.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_SHIFT, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Return the four words of one block; all arguments uint32."""
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0 = np.uint32(np.uint32(p1 >> _SHIFT) ^ c1 ^ k0)
        c1 = np.uint32(p1)
        c2 = np.uint32(np.uint32(p0 >> _SHIFT) ^ c3 ^ k1)
        c3 = np.uint32(p0)
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _redraw(product, draw, bound, c1, c2, c3, k0, k1):
    """Return the first product whose low half is not below 2**32 mod bound (Lemire, section 4)."""
    short = (np.uint64(1 << 32) - bound) % bound
    attempt = 0
    while (product & _LOW) < short:
        attempt += 1
        c0 = np.uint32((attempt << 16) | (draw >> 2))
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
        lane = draw & 3
        word = w0 if lane == 0 else (w1 if lane == 1 else (w2 if lane == 2 else w3))
        product = np.uint64(word) * bound
    return product


@njit(inline="always")
def bounded(word, draw, bound, c1, c2, c3, k0, k1):
    """Return draw number `draw` (0 <= draw < 65536) of a counter, in [0, bound); `word` is its first word."""
    size = np.uint64(bound)
    product = np.uint64(word) * size
    if (product & _LOW) < size:
        product = _redraw(product, draw, size, c1, c2, c3, k0, k1)
    return np.int64(product >> _SHIFT)
