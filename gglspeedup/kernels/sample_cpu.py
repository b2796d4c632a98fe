"""Neighbour sampling on the CPU, hop by hop: count, draw, gather, relabel.

:func:`sample_hops` does as many hops as there is room for without coming back to Python, whose lock other threads
hold meanwhile: to get it back costs more than a small hop.

A hop is cut into chunks of `rows` frontier rows. Workers take chunks by ticket, draw and gather them in any order;
whoever finishes a chunk relabels, under a try-lock, all chunks that are next in order.
Local ids are therefore given in the order of the edge list whatever the schedule, nobody waits, and
only ids not known when the chunk was gathered are left for the part that is serial.

Selection without replacement is Floyd's (Bentley and Floyd, "A sample of brilliance", CACM 1987).
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, prange, types
from numba.extending import register_jitable

from gglspeedup.kernels.intrinsics import (
    exchange,
    fetch_add,
    load_acquire,
    pointer_to,
    prefetch,
    store_release,
)
from gglspeedup.kernels.pieces_cpu import element, prefetch_element
from gglspeedup.kernels.random import bounded, philox

# Cells of `state`, each on a cache line of its own so that tickets do not slow the lock.
TICKET, LOCK, NEXT, NODES, STATE_SIZE = 0, 16, 32, 48, 64

# Cells of `progress`: the hop at hand, its rows nodes[LOW:HIGH], the nodes found so far, its edges, -1 uncounted, and
# the place of a seed that stands twice, or -1. LOW is -1 before the seeds are in the table.
HOP, LOW, HIGH, COUNT, EDGES, REPEATED = range(6)
# What `found` holds of a hop: nodes known in the end, the end of its rows, its edges, where they go, the room there.
FOUND_NODES, FOUND_ROWS, FOUND_EDGES, ADDRESS, ROOM, FOUND_SIZE = range(6)

# How many threads a kernel that is called next may use, as numba.set_num_threads, which cannot be cached.
_use_threads = types.ExternalFunction("set_num_threads", types.void(types.int32))

_ROWS_A_THREAD = 4096  # to count: waking a thread costs as much as that
_AHEAD = 16  # elements between a prefetch and its use
SEEN_SIZE = 2048  # cells of the hash set for long rows of picks: twice the largest fanout
_BLOOM_FANOUT = 32  # up to this fanout one 64-bit word keeps most duplicate scans away


@register_jitable
def rows_per_chunk(fanout):
    """Return how many frontier rows make one chunk, about 2048 edges."""
    return 64 if fanout <= 0 else max(8, min(128, 2048 // fanout))


@register_jitable
def chunks_of(rows, fanout):
    """Return the number of chunks of so many rows."""
    return -(-rows // rows_per_chunk(fanout))


@register_jitable
def words_of(fanout):
    """Return how many random words a row has room for."""
    return -(-max(fanout, 0) // 4) * 4


@register_jitable
def second_of(edges):
    """Return where the edge ids begin in a hop's output of int64, on a multiple of 64 bytes behind the edges."""
    return -(-2 * edges // 8) * 8


@njit(inline="always")
def _home(v, keys):
    """Return where a node's search in the table begins."""
    if len(keys) == 0:
        return np.int64(v)
    return ((np.int64(v) * 0x9E3779B97F4A7C1) >> 20) & (len(keys) - 1)


@njit(inline="always")
def _look_up(v, base, keys, table):
    """Return a node's cell in the table and its entry, below `base` if it has no local id yet.

    Without `keys` a node's cell is its id. With them the table is open-addressed, and a cell whose entry is below
    `base` is empty. The entry is read once, before the key: a cell that a relabeller fills meanwhile reads as empty.
    """
    cell = _home(v, keys)
    entry = load_acquire(table, cell)
    if len(keys) > 0:
        while entry >= base and keys[cell] != v:
            cell = (cell + 1) & (len(keys) - 1)
            entry = load_acquire(table, cell)
    return cell, entry


@njit(inline="always")
def _enter(v, cell, entry, keys, table):
    """Write a node's entry; whoever sees it sees its key, too."""
    if len(keys) > 0:
        keys[cell] = v
    store_release(table, cell, np.int32(entry))


@njit(cache=True, nogil=True)
def insert_nodes(begin, end, base, keys, table, nodes):
    """Enter nodes[begin:end], local ids begin to end - 1; return the place of the first that is in, or -1."""
    for i in range(begin, end):
        cell, entry = _look_up(nodes[i], base, keys, table)
        if entry >= base:
            return i
        _enter(nodes[i], cell, base + i, keys, table)
    return -1


@njit(cache=True, nogil=True, parallel=True)
def count_hop(indptr, nodes, low, high, fanout, replace, rows, start, degree, offsets):
    """Fill start and degree of the rows nodes[low:high] and the chunks' edge offsets; return the hop's edges."""
    chunks = len(offsets) - 1
    for c in prange(chunks):
        begin = low + c * rows
        end = min(begin + rows, high)
        edges = 0
        for i in range(begin, end):
            if i + _AHEAD < end:
                prefetch_element(indptr, np.int64(nodes[i + _AHEAD]))
            v = nodes[i]
            first = element(indptr, np.int64(v))
            d = element(indptr, np.int64(v) + 1) - first
            start[i - low] = first
            degree[i - low] = d
            if fanout > 0 and (d > fanout or (replace and d > 0)):
                d = fanout
            edges += d
        offsets[c + 1] = edges
    offsets[0] = 0
    for c in range(chunks):
        offsets[c + 1] += offsets[c]
    return offsets[chunks]


@njit(cache=True, nogil=True)
def _random_words(count, blocks, c1, c2, c3, k0, k1, words):
    """Fill words[4 * q + lane, r] for row r < count and block q < blocks; the inner loop is one vector loop."""
    for q in range(blocks):
        c0 = np.uint32(q)
        for r in range(count):
            w0, w1, w2, w3 = philox(c0, c1[r], c2, c3[r], k0, k1)
            words[4 * q, r] = w0
            words[4 * q + 1, r] = w1
            words[4 * q + 2, r] = w2
            words[4 * q + 3, r] = w3


@njit(cache=True, nogil=True)
def _seen_before(value, tag, seen, tags):
    """Insert value into the hash set of row `tag`; return whether it was in it."""
    cell = ((value * 0x9E3779B1) >> 21) & (SEEN_SIZE - 1)
    while tags[cell] == tag:
        if seen[cell] == value:
            return True
        cell = (cell + 1) & (SEEN_SIZE - 1)
    tags[cell] = tag
    seen[cell] = value
    return False


@njit(cache=True, nogil=True)
def _draw(
    indices, nodes, low, begin, end, fanout, replace, k0, k1, c2, c3_hop, start, degree, first_edge,
    position, target, c1, c3, words, seen, tags,
):  # fmt: skip
    """Write the chosen positions of rows [begin, end) and their target ids; return the end of their edges."""
    count = 0
    for i in range(begin, end):
        d = degree[i - low]
        if fanout > 0 and (d > fanout or (replace and d > 0)):
            v = np.uint64(nodes[i])
            c1[count] = np.uint32(v)
            c3[count] = np.uint32((v >> np.uint64(32)) & np.uint64(0xFF)) | c3_hop
            count += 1
    _random_words(count, (fanout + 3) // 4, c1, c2, c3, k0, k1, words)
    r = 0
    edge = first_edge
    for i in range(begin, end):
        first = start[i - low]
        d = degree[i - low]
        if fanout <= 0 or (d <= fanout and not (replace and d > 0)):
            for j in range(d):
                position[edge + j] = first + j
                target[edge + j] = i
                if (j & 7) == 0:
                    prefetch_element(indices, first + j)
            edge += d
            continue
        if replace:
            for j in range(fanout):
                p = bounded(words[j, r], j, d, c1[r], c2, c3[r], k0, k1)
                position[edge + j] = first + p
                target[edge + j] = i
                prefetch_element(indices, first + p)
        elif fanout <= _BLOOM_FANOUT:
            bloom = np.uint64(0)
            for j in range(fanout):
                last = d - fanout + j
                p = bounded(words[j, r], j, last + 1, c1[r], c2, c3[r], k0, k1)
                bit = np.uint64(1) << np.uint64(p & 63)
                if bloom & bit:
                    for q in range(j):
                        if position[edge + q] == first + p:
                            p = last
                            bit = np.uint64(1) << np.uint64(p & 63)
                            break
                bloom |= bit
                position[edge + j] = first + p
                target[edge + j] = i
                prefetch_element(indices, first + p)
        else:
            for j in range(fanout):
                last = d - fanout + j
                p = bounded(words[j, r], j, last + 1, c1[r], c2, c3[r], k0, k1)
                if _seen_before(p, i, seen, tags):
                    p = last
                    _seen_before(p, i, seen, tags)
                position[edge + j] = first + p
                target[edge + j] = i
                prefetch_element(indices, first + p)
        r += 1
        edge += fanout
    return edge


@njit(cache=True, nogil=True)
def _gather(indices, begin, end, keys, table, position, neighbour):
    """Read the chosen neighbours, and ask for their entries in the table."""
    for e in range(begin, end):
        v = element(indices, position[e])
        neighbour[e] = v
        prefetch(table, _home(v, keys))
        if len(keys) > 0:
            prefetch(keys, _home(v, keys))


@njit(cache=True, nogil=True)
def _take_known(begin, end, base, keys, table, neighbour, source, pending):
    """Write the local ids already given, and list the edges of the others; return the end of the list."""
    left = begin
    for e in range(begin, end):
        _cell, local = _look_up(neighbour[e], base, keys, table)
        source[e] = local - base
        pending[left] = e
        left += np.int64(local < base)
    return left


@njit(inline="always")
def _relabel_one(e, base, count, keys, table, neighbour, nodes, source):
    """Give edge e its local id; return the number of nodes found so far."""
    v = neighbour[e]
    cell, local = _look_up(v, base, keys, table)
    # Written without a branch: half the ids are new and no predictor knows which.
    fresh = local < base
    local = base + count if fresh else local
    _enter(v, cell, local, keys, table)
    nodes[count] = v
    source[e] = local - base
    return count + np.int64(fresh)


@njit(cache=True, nogil=True)
def _relabel_all(begin, end, base, count, keys, table, neighbour, nodes, source):
    """Give local ids, in order, to the edges [begin, end); return the number of nodes found so far."""
    for e in range(begin, end):
        count = _relabel_one(e, base, count, keys, table, neighbour, nodes, source)
    return count


@njit(cache=True, nogil=True)
def _relabel_pending(begin, end, base, count, keys, table, neighbour, pending, nodes, source):
    """Give local ids, in order, to the edges pending[begin:end]; return the number of nodes found so far."""
    for q in range(begin, end):
        count = _relabel_one(pending[q], base, count, keys, table, neighbour, nodes, source)
    return count


@njit(cache=True, nogil=True)
def _relabel_in_order(offsets, base, keys, table, neighbour, pending, left, nodes, source, state):
    """Relabel the chunks that are next in order, as far as they are gathered, and let go of the lock."""
    chunks = len(offsets) - 1
    c = state[NEXT]
    count = state[NODES]
    while c < chunks:
        end = load_acquire(left, c)
        if end < 0:
            break
        count = _relabel_pending(offsets[c], end, base, count, keys, table, neighbour, pending, nodes, source)
        c += 1
    state[NODES] = count
    store_release(state, NEXT, c)
    store_release(state, LOCK, 0)


@njit(cache=True, nogil=True)
def _next_is_gathered(left, state):
    """Return whether there is a chunk to relabel."""
    c = load_acquire(state, NEXT)
    return c < len(left) and load_acquire(left, c) >= 0


@njit(cache=True, nogil=True)
def _work(
    worker, indices, edge_ids, nodes, low, high, fanout, replace, k0, k1, c2, c3_hop, rows, start, degree,
    offsets, base, keys, table, position, neighbour, pending, left, source, target, state, c1, c3, words, seen, tags,
):  # fmt: skip
    """Take chunks until none is left."""
    chunks = len(offsets) - 1
    while True:
        c = fetch_add(state, TICKET, 1)
        if c >= chunks:
            return
        begin = low + c * rows
        end = min(begin + rows, high)
        edge = offsets[c]
        last = _draw(
            indices, nodes, low, begin, end, fanout, replace, k0, k1, c2, c3_hop, start, degree, edge,
            position, target, c1[worker], c3[worker], words[worker], seen[worker], tags[worker],
        )  # fmt: skip
        _gather(indices, edge, last, keys, table, position, neighbour)
        if load_acquire(state, NEXT) == c and exchange(state, LOCK, 1) == 0:
            # In order already: nothing need be looked up twice. (Only the holder of a chunk can pass it on as next.)
            state[NODES] = _relabel_all(edge, last, base, state[NODES], keys, table, neighbour, nodes, source)
            store_release(state, NEXT, c + 1)
            _relabel_in_order(offsets, base, keys, table, neighbour, pending, left, nodes, source, state)
        else:
            store_release(left, c, _take_known(edge, last, base, keys, table, neighbour, source, pending))
        while _next_is_gathered(left, state) and exchange(state, LOCK, 1) == 0:
            _relabel_in_order(offsets, base, keys, table, neighbour, pending, left, nodes, source, state)
        if len(edge_ids) > 0:
            for e in range(edge, last):
                position[e] = element(edge_ids, position[e])


@njit(cache=True, nogil=True, parallel=True)
def sample_hop(
    workers, indices, edge_ids, nodes, low, high, count, fanout, replace, k0, k1, c2, c3_hop, rows, start, degree,
    offsets, base, keys, table, position, neighbour, pending, left, source, target, state, c1, c3, words, seen, tags,
):  # fmt: skip
    """Sample the rows nodes[low:high]; append new nodes after `count`; return how many there are now."""
    state[:] = 0
    state[NODES] = count
    left[:] = -1
    if fanout > _BLOOM_FANOUT:
        tags[:] = -1
    for worker in prange(workers):
        _work(
            worker, indices, edge_ids, nodes, low, high, fanout, replace, k0, k1, c2, c3_hop, rows, start,
            degree, offsets, base, keys, table, position, neighbour, pending, left, source, target, state,
            c1, c3, words, seen, tags,
        )  # fmt: skip
    _relabel_in_order(offsets, base, keys, table, neighbour, pending, left, nodes, source, state)
    return state[NODES]


@njit(cache=True, nogil=True)
def sample_hops(
    threads, indptr, indices, edge_ids, num_nodes, fanouts, replace, frontier, k0, k1, c2, c3_batch, base, keys, table,
    nodes, start, degree, offsets, left, c1, c3, words, seen, tags, neighbour, pending, state, progress, found,
):  # fmt: skip
    """Sample hops from `progress` on, until one has no room in a buffer, which `progress` then tells of; see HOP."""
    if progress[LOW] < 0:
        progress[REPEATED] = insert_nodes(0, progress[COUNT], base, keys, table, nodes)
        if progress[REPEATED] >= 0:
            return
        progress[LOW] = 0
    while progress[HOP] < len(fanouts):
        hop = progress[HOP]
        low, high, count, fanout = progress[LOW], progress[HIGH], progress[COUNT], fanouts[hop]
        rows, chunks = rows_per_chunk(fanout), chunks_of(high - low, fanout)
        cells = words_of(fanout) * rows
        if min(len(start), len(degree)) < high - low or len(offsets) <= chunks or len(left) < chunks:
            return
        if min(len(c1), len(c3)) < threads * rows or len(words) < threads * cells:
            return
        if min(len(seen), len(tags)) < threads * SEEN_SIZE or len(state) < STATE_SIZE:
            return
        if progress[EDGES] < 0:
            _use_threads(np.int32(max(1, min(threads, (high - low) // _ROWS_A_THREAD))))
            progress[EDGES] = count_hop(
                indptr, nodes, low, high, fanout, replace, rows, start[: high - low], degree[: high - low],
                offsets[: chunks + 1],
            )  # fmt: skip
        edges = progress[EDGES]
        most = min(count + edges, num_nodes)
        if len(nodes) <= most or min(len(neighbour), len(pending)) < edges or 0 < len(keys) < 2 * most:
            return
        if found[hop, ROOM] < second_of(edges) + edges:
            return
        workers = max(1, min(threads, chunks))
        _use_threads(np.int32(workers))
        output = carray(pointer_to(found[hop, ADDRESS], progress), (second_of(edges) + edges,))
        progress[COUNT] = sample_hop(
            workers, indices, edge_ids, nodes, low, high, count, fanout, replace, k0, k1, c2,
            np.uint32(c3_batch | np.uint32(hop << 8)), rows, start[: high - low], degree[: high - low],
            offsets[: chunks + 1], base, keys, table, output[second_of(edges) :], neighbour, pending, left[:chunks],
            output[:edges], output[edges : 2 * edges], state, c1[: workers * rows].reshape(workers, rows),
            c3[: workers * rows].reshape(workers, rows),
            words[: workers * cells].reshape(workers, words_of(fanout), rows),
            seen[: workers * SEEN_SIZE].reshape(workers, SEEN_SIZE),
            tags[: workers * SEEN_SIZE].reshape(workers, SEEN_SIZE),
        )  # fmt: skip
        found[hop, FOUND_NODES], found[hop, FOUND_ROWS], found[hop, FOUND_EDGES] = progress[COUNT], high, edges
        progress[LOW] = high if frontier else 0
        progress[HIGH] = progress[COUNT]
        progress[EDGES] = -1
        progress[HOP] = hop + 1
