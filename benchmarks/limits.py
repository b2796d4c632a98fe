"""What the machine itself can do: independent random reads, copies, random rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numba import njit, prange

from gglspeedup.kernels.intrinsics import copy_bytes, prefetch, prefetch_address
from gglspeedup.threads import launching


@njit(cache=True, nogil=True, parallel=True)
def _random_reads(table, places, sums):  # type: ignore[no-untyped-def]
    workers = len(sums)
    for w in prange(workers):
        begin, end = len(places) * w // workers, len(places) * (w + 1) // workers
        total = 0
        for i in range(begin, end):
            if i + 32 < end:
                prefetch(table, places[i + 32])
            total += table[places[i]]
        sums[w] = total


@njit(cache=True, nogil=True, parallel=True)
def _random_rows(source, places, out, row_bytes, slots, workers):  # type: ignore[no-untyped-def]
    """Copy random rows into `slots` places: as many as rows, or a few that stay in the cache, to time reads alone."""
    for w in prange(workers):
        begin, end = len(places) * w // workers, len(places) * (w + 1) // workers
        shift = w * slots if slots < len(places) else 0
        for i in range(begin, end):
            if i + 8 < end:
                for line in range(0, row_bytes, 64):
                    prefetch_address(source + places[i + 8] * row_bytes + line)
            target = out + (shift + i % slots) * row_bytes
            copy_bytes(target, source + places[i] * row_bytes, np.int64(row_bytes))


def _best(call: Callable[[], None], tries: int = 5) -> float:
    times = []
    for _ in range(tries + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def random_reads(table_bytes: int = 1 << 30, count: int = 1 << 23) -> float:
    """Return independent random 8-byte reads a second, over a table of the given size."""
    table = np.ones(table_bytes // 8, np.int64)
    places = np.random.default_rng(0).integers(0, len(table), count)
    with launching() as workers:
        return count / _best(lambda: _random_reads(table, places, np.zeros(workers, np.int64)))


def random_rows(row_bytes: int, written: bool, rows: int = 1 << 21, count: int = 1 << 18) -> float:
    """Return bytes a second of random rows read (and, if `written`, stored one after another)."""
    source = np.ones(rows * row_bytes, np.uint8)
    places = np.random.default_rng(0).permutation(rows)[:count].astype(np.int64)
    out = np.ones(count * row_bytes, np.uint8)
    with launching() as workers:
        slots = count if written else 16
        seconds = _best(lambda: _random_rows(source.ctypes.data, places, out.ctypes.data, row_bytes, slots, workers))
    return count * row_bytes / seconds


def copy(num_bytes: int = 1 << 28) -> float:
    """Return bytes a second of one thread's contiguous copy."""
    source, out = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    return num_bytes / _best(lambda: np.copyto(out, source))
