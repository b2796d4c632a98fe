"""Counting visits on a GPU, through numba.cuda."""

from __future__ import annotations

from typing import Any

from numba import config, cuda

from gglspeedup.kernels.visits import add_visit

_THREADS = 256
_LEAST_BLOCKS = 128  # of fewer numba.cuda warns; those without an item end at once
# In the simulator a kernel calls plain Python; on a device the body has to be compiled for it.
_add_visit = add_visit if config.ENABLE_CUDASIM else cuda.jit(device=True, inline="always")(add_visit)


def visit_each(n_id, visits):
    """Count one batch: a thread an item."""
    i = cuda.grid(1)
    if i < n_id.size:
        _add_visit(i, n_id, visits)


_visit_each = cuda.jit(visit_each)


def count_visits(n_id: Any, visits: Any, stream: int = 0) -> None:
    """Add 1 to visits[v] for each v of n_id, on the stream of that address."""
    if len(n_id):
        queue = cuda.external_stream(stream) if stream else cuda.default_stream()
        _visit_each[max(-(-len(n_id) // _THREADS), _LEAST_BLOCKS), _THREADS, queue](n_id, visits)
