"""Stamps of history rows on a GPU, through numba.cuda: who writes a row last, and where rows that stay go."""

from __future__ import annotations

from typing import Any

from numba import config, cuda

from gglspeedup.kernels.history import stamp_of

_THREADS = 256
_LEAST_BLOCKS = 128  # of fewer numba.cuda warns; those without an item end at once
# In the simulator a kernel calls plain Python; on a device the body has to be compiled for it.
_stamp_of = stamp_of if config.ENABLE_CUDASIM else cuda.jit(device=True, inline="always")(stamp_of)


def stamp_each(n_id, number, stamps):
    """Note one item of a push: a thread an item; the highest stamp of a row stays, whatever the order."""
    i = cuda.grid(1)
    if i < n_id.size:
        cuda.atomic.max(stamps, n_id[i], _stamp_of(number, i))


def keep_last(n_id, number, stamps, positions):
    """Give one item its row, or -1 if a later item of the push writes there."""
    i = cuda.grid(1)
    if i < n_id.size:
        positions[i] = n_id[i] if stamps[n_id[i]] == _stamp_of(number, i) else -1


_stamp_each = cuda.jit(stamp_each)
_keep_last = cuda.jit(keep_last)


def stamp_rows(n_id: Any, number: int, stamps: Any, positions: Any, stream: int = 0) -> None:
    """Note that item i of push `number` writes row n_id[i], and fill `positions` with the rows, -1 for what is not to
    be written as a later item writes there; on the stream of that address."""
    if len(n_id):
        queue = cuda.external_stream(stream) if stream else cuda.default_stream()
        blocks = max(-(-len(n_id) // _THREADS), _LEAST_BLOCKS)
        _stamp_each[blocks, _THREADS, queue](n_id, number, stamps)
        _keep_last[blocks, _THREADS, queue](n_id, number, stamps, positions)
