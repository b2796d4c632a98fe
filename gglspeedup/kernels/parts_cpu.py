"""Parts of a graph on the CPU: who owns a node, which of its part's rows it is, and dealing rows out to their parts."""

from __future__ import annotations

from numba import njit, prange

from gglspeedup.kernels.bounds import OWNERS_A_COUNT
from gglspeedup.kernels.intrinsics import prefetch

_IDS = 4096  # a chunk of work
_AHEAD = 16  # ids whose cache lines are asked for before their turn


@njit(cache=True, nogil=True, parallel=True)
def find_ranges(ptr, ids, out):
    """Write to out[i] the part p with ptr[p] <= ids[i] < ptr[p + 1]."""
    for c in prange((len(ids) + _IDS - 1) // _IDS):
        for i in range(c * _IDS, min(len(ids), (c + 1) * _IDS)):
            low, high = 0, len(ptr) - 1
            while high - low > 1:
                middle = (low + high) // 2
                if ptr[middle] <= ids[i]:
                    low = middle
                else:
                    high = middle
            out[i] = low


@njit(cache=True, nogil=True, parallel=True)
def take_owners(owners, ids, out):
    """Write owners[ids[i]] to out[i]."""
    for c in prange((len(ids) + _IDS - 1) // _IDS):
        end = min(len(ids), (c + 1) * _IDS)
        for i in range(c * _IDS, end):
            if i + _AHEAD < end:
                prefetch(owners, ids[i + _AHEAD])
            out[i] = owners[ids[i]]


@njit(cache=True, nogil=True)
def count_before(owners, part, before):
    """Write to before[k] how many of the first k * OWNERS_A_COUNT nodes `part` owns."""
    count = 0
    for block in range(len(before)):
        before[block] = count
        for v in range(block * OWNERS_A_COUNT, min(len(owners), (block + 1) * OWNERS_A_COUNT)):
            count += owners[v] == part


@njit(cache=True, nogil=True, parallel=True)
def find_rows(owners, part, before, ids, out):
    """Write to out[i] how many nodes below ids[i] `part` owns: the row of ids[i], if `part` owns it."""
    wanted = owners.dtype.type(part)  # of the owners' own size: compared many at a time
    for c in prange((len(ids) + _IDS - 1) // _IDS):
        end = min(len(ids), (c + 1) * _IDS)
        for i in range(c * _IDS, end):
            if i + _AHEAD < end:
                later = ids[i + _AHEAD]
                prefetch(owners, later // OWNERS_A_COUNT * OWNERS_A_COUNT)
                prefetch(owners, later)
                prefetch(before, later // OWNERS_A_COUNT)
            block = ids[i] // OWNERS_A_COUNT
            row = before[block]
            for owner in owners[block * OWNERS_A_COUNT : ids[i]]:
                row += owner == wanted
            out[i] = row


@njit(cache=True, nogil=True)
def list_nodes(owners, part, out):
    """Write the nodes that `part` owns to `out`, which has room for exactly those."""
    row = 0
    for v in range(len(owners)):
        if owners[v] == part:
            out[row] = v
            row += 1


@njit(cache=True, nogil=True)
def add_lengths(owners, lengths, counts):
    """Add the length of each row to the count of its owner."""
    for row in range(len(owners)):
        counts[owners[row]] += lengths[row]


@njit(cache=True, nogil=True)
def deal_edges(owners, lengths, source, place, out):
    """Copy each row of `source` to where its owner's rows go on; place[p] is where in `out`, and is used up."""
    at = 0
    for row in range(len(owners)):
        length = lengths[row]
        to = place[owners[row]]
        for k in range(length):
            out[to + k] = source[at + k]
        place[owners[row]] = to + length
        at += length
