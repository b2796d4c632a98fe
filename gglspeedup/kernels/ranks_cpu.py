"""Sampling and gathering over ranks on the CPU: ids dealt out to their owners, rows drawn there, put in order here."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from gglspeedup.kernels.intrinsics import copy_bytes, prefetch, prefetch_address
from gglspeedup.kernels.sample_cpu import _draw, _enter, _home, _look_up, _relabel_all

_AHEAD = 16  # elements between a prefetch and its use
_ROWS = 128  # a chunk of rows to be put in order, whose table entries are asked for first
_LINE = 64
_BYTES_AHEAD = 4096
_CHUNK_BYTES = 1 << 18
OWN, CACHED, REMOTE = 0, 1, 2  # where a row comes from


@njit(cache=True, nogil=True)
def count_owners(owners, counts):
    """Count in counts[p] how often part p is among the owners."""
    counts[:] = 0
    for owner in owners:
        counts[owner] += 1


@njit(cache=True, nogil=True)
def deal_out(owners, nodes, low, cursor, out):
    """Write node low + i behind those of its owner so far, at cursor[owners[i]], which moves on."""
    for i in range(len(owners)):
        at = cursor[owners[i]]
        out[at] = nodes[low + i]
        cursor[owners[i]] = at + 1


@njit(cache=True, nogil=True, parallel=True)
def count_rows(indptr, start, rows, chunk_begin, fanout, replace, first, degree, shift, counts, chunk_edge):
    """Fill what is to be known of each row, and the edge at which each chunk begins; return the edges of all.

    A row begins at `first` here and `shift` further in the whole graph, and `counts` of its `degree` edges are taken.
    """
    chunks = len(chunk_begin) - 1
    for c in prange(chunks):
        edges = 0
        end = chunk_begin[c + 1]
        for i in range(chunk_begin[c], end):
            if i + _AHEAD < end:
                prefetch(indptr, rows[i + _AHEAD])
                prefetch(start, rows[i + _AHEAD])
            row = rows[i]
            first[i] = indptr[row]
            d = indptr[row + 1] - first[i]
            degree[i] = d
            shift[i] = start[row] - first[i]
            if fanout > 0 and (d > fanout or (replace and d > 0)):
                d = fanout
            counts[i] = d
            edges += d
        chunk_edge[c + 1] = edges
    chunk_edge[0] = 0
    for c in range(chunks):
        chunk_edge[c + 1] += chunk_edge[c]
    return chunk_edge[chunks]


@njit(cache=True, nogil=True, parallel=True)
def draw_rows(
    workers, indices, edge_ids, nodes, chunk_begin, chunk_edge, chunk_batch, fanout, replace, k0, k1, hop,
    first, degree, shift, position, target, neighbour, e_id, c1, c3, words, seen, tags,
):  # fmt: skip
    """Draw the rows of some nodes; chunk c of them is of batch chunk_batch[c], and its edges begin at chunk_edge[c]."""
    tags[:] = -1
    chunks = len(chunk_begin) - 1
    for worker in prange(workers):
        for c in range(worker, chunks, workers):
            batch = chunk_batch[c]
            c2 = np.uint32(batch & 0xFFFFFFFF)
            c3_hop = np.uint32((batch >> 32) << 16 | hop << 8)
            begin = chunk_edge[c]
            end = _draw(
                indices, nodes, 0, chunk_begin[c], chunk_begin[c + 1], fanout, replace, k0, k1, c2, c3_hop, first,
                degree, begin, position, target, c1[worker], c3[worker], words[worker], seen[worker], tags[worker],
            )  # fmt: skip
            for e in range(begin, end):
                neighbour[e] = indices[position[e]]
            if len(edge_ids) > 0:
                for e in range(begin, end):
                    e_id[e] = edge_ids[position[e]]
            else:
                for e in range(begin, end):
                    e_id[e] = position[e] + shift[target[e]]


@njit(cache=True, nogil=True)
def sum_blocks(counts, bounds, sums):
    """Write the sum of counts[bounds[b]:bounds[b + 1]] to sums[b]."""
    for b in range(len(sums)):
        total = np.int64(0)
        for i in range(bounds[b], bounds[b + 1]):
            total += np.int64(counts[i])
        sums[b] = total


@njit(cache=True, nogil=True)
def put_in_order(
    owners, low, count, counts, neighbours, e_ids, row_cursor, edge_cursor, base, keys, table, neighbour, nodes,
    e_id, source, target,
):  # fmt: skip
    """Put the edges that came from the owners in the order of the rows, and relabel them.

    Row low + i is the next one of owners[i]: at `row_cursor` its number of edges lies, at `edge_cursor` they begin.
    New nodes are appended after `count`; their number is returned.
    """
    edge = 0
    rows = len(owners)
    for begin in range(0, rows, _ROWS):
        chunk = edge
        for i in range(begin, min(begin + _ROWS, rows)):
            owner = owners[i]
            at = edge_cursor[owner]
            row = row_cursor[owner]
            row_cursor[owner] = row + 1
            for j in range(np.int64(counts[row])):
                v = neighbours[at + j]
                neighbour[edge] = v
                e_id[edge] = e_ids[at + j]
                target[edge] = low + i
                prefetch(table, _home(v, keys))
                if len(keys) > 0:
                    prefetch(keys, _home(v, keys))
                edge += 1
            edge_cursor[owner] = at + np.int64(counts[row])
        count = _relabel_all(chunk, edge, base, count, keys, table, neighbour, nodes, source)
    return count


@njit(cache=True, nogil=True)
def list_requests(
    owners, rank, ids, base, keys, table, cache_keys, cache_table, kind, place, counts, unique, unique_owner
):
    """Say where each row comes from; list remote nodes once each, and count them by owner; return their number.

    Of own rows `place` is left as it is, of cached ones it is the cell in the cache, of remote ones the place in the
    list.
    """
    counts[:] = 0
    found = 0
    for i in range(len(ids)):
        if i + _AHEAD < len(ids) and owners[i + _AHEAD] != rank:
            v = ids[i + _AHEAD]
            prefetch(table, _home(v, keys))
            if len(cache_keys) > 0:
                prefetch(cache_table, _home(v, cache_keys))
        if owners[i] == rank:
            kind[i] = OWN
            continue
        v = ids[i]
        if len(cache_keys) > 0:
            _cell, slot = _look_up(v, 1, cache_keys, cache_table)
            if slot >= 1:
                kind[i] = CACHED
                place[i] = slot - 1
                continue
        kind[i] = REMOTE
        cell, entry = _look_up(v, base, keys, table)
        if entry < base:
            entry = base + found
            _enter(v, cell, entry, keys, table)
            unique[found] = v
            unique_owner[found] = owners[i]
            counts[owners[i]] += 1
            found += 1
        place[i] = entry - base
    return found


@njit(cache=True, nogil=True)
def order_requests(unique, unique_owner, cursor, sent, moved):
    """Write the listed nodes by owner to `sent`, and to `moved` where each went."""
    for u in range(len(unique)):
        at = cursor[unique_owner[u]]
        sent[at] = unique[u]
        moved[u] = at
        cursor[unique_owner[u]] = at + 1


@njit(cache=True, nogil=True, parallel=True)
def gather_mixed(kind, place, moved, own, cached, received, out, row_bytes):
    """Copy each row from the address of its kind to the address `out`; remote places are looked up in `moved`."""
    rows = len(kind)
    per_chunk = max(1, _CHUNK_BYTES // max(row_bytes, 8))
    ahead = max(2, min(32, _BYTES_AHEAD // max(row_bytes, 1)))
    for c in prange((rows + per_chunk - 1) // per_chunk):
        begin = c * per_chunk
        end = min(begin + per_chunk, rows)
        for i in range(begin, end):
            if i + ahead < end:
                address = _address(i + ahead, kind, place, moved, own, cached, received, row_bytes)
                for line in range(0, row_bytes, _LINE):
                    prefetch_address(address + line)
            address = _address(i, kind, place, moved, own, cached, received, row_bytes)
            copy_bytes(out + i * row_bytes, address, np.int64(row_bytes))


@njit(inline="always")
def _address(i, kind, place, moved, own, cached, received, row_bytes):
    """Return where the row of the i-th node lies."""
    if kind[i] == OWN:
        return own + place[i] * row_bytes
    if kind[i] == CACHED:
        return cached + place[i] * row_bytes
    return received + moved[place[i]] * row_bytes
