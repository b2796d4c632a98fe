"""Launchers of `gather.cu`: rows of features as bytes, whatever their dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from gglspeedup.kernels.cuda import Kernel, Runtime

# Where rows come from, as gather.cu numbers it.
_ONLY_COLD, _ONLY_HOT, _BY_SLOT, _BY_SLOT_BOTH = range(4)

_WIDTHS = (16, 8, 4, 2, 1)
_THREADS = 256
_ROWS = 4  # rows that a group of lanes has in flight
MAX_BLOCKS = 1 << 20


def address(array: Any) -> int:
    """Return the address of an array's first byte, as kernels see it."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def word_bytes(row_bytes: int, *arrays: Any) -> int:
    """Return the widest word, in bytes, that divides a row and to which all arrays are aligned."""
    return next(w for w in _WIDTHS if row_bytes % w == 0 and all(address(a) % w == 0 for a in arrays))


def lanes_of(row_words: int) -> int:
    """Return how many lanes, a power of two up to a warp, move a row together."""
    return min(32, 1 << max(0, row_words - 1).bit_length())


def _blocks(count: int, lanes: int, most: int) -> int:
    groups = -(-count // _ROWS)
    return max(1, min(-(-groups * lanes // _THREADS), most))


def gather_rows(
    runtime: Runtime, hot: Any, slot: Any, cold: Any, num_rows: int, ids: Any, out: Any, row_bytes: int,
    counters: Any, bad: Any, *, cold_by_slot: bool = False, most_blocks: int = MAX_BLOCKS,
) -> None:  # fmt: skip
    """Enqueue out[i] = row ids[i].

    Parameters
    ----------
    runtime : Runtime
        Where to.
    hot, cold : device array or None
        Rows in GPU memory, also DevicePieces whose elements are whole rows; rows in memory that is mapped for the GPU.
        Without `slot` one of them is None and the other holds row v at place v.
    slot : device array of int32 or None
        For each node its place in `hot` if not negative; else the row is in `cold`, at the node's id, or
        with `cold_by_slot` at ``-1 - slot[v]``.
    num_rows : int
        Ids must be in [0, num_rows).
    ids : device array of int64
        The rows wanted, repeats allowed.
    out : device array
        As many rows as ids, C-contiguous. Rows of bad ids are left as they are.
    row_bytes : int
        Bytes of a row.
    counters : device array of uint64, 2 cells
        The rows served by hot and by cold are added to it.
    bad : device array of uint64, 1 cell
        Becomes the smallest place whose id is bad, if it was larger before: start with all bits set.
    most_blocks : int
        Of the grid: a gather beside other work leaves it the rest of the device.
    """
    count = len(ids)
    if count == 0 or row_bytes == 0:
        return
    mode = _BY_SLOT_BOTH if cold_by_slot else _BY_SLOT
    if slot is None:
        mode = _ONLY_COLD if hot is None else _ONLY_HOT
    in_pieces = hasattr(hot, "table")  # each piece is an allocation of its own, aligned for any word
    arrays = [tier for tier in (out, None if in_pieces else hot, cold) if tier is not None]
    width = word_bytes(row_bytes, *arrays)
    words = row_bytes // width
    lanes = lanes_of(words)
    near = hot.table if in_pieces else cold if hot is None else hot
    arguments = (
        near, ids if slot is None else slot, near if cold is None else cold, np.int32(mode), np.int64(num_rows), ids,
        np.int64(count), np.int64(words), np.int32(lanes), out, counters, bad,
    )  # fmt: skip
    kernel = Kernel("gather.cu", f"gather_rows_{width}", ("IN_PIECES",) if in_pieces else ())
    runtime.launch(kernel, _blocks(count, lanes, most_blocks), _THREADS, arguments)


def scatter_rows(
    runtime: Runtime, staged: Any, positions: Any, out: Any, row_bytes: int, *, most_blocks: int = MAX_BLOCKS
) -> None:  # fmt: skip
    """Enqueue out[positions[i]] = staged[i]; positions are int64 and distinct. `most_blocks` as gather_rows'."""
    count = len(positions)
    if count == 0 or row_bytes == 0:
        return
    width = word_bytes(row_bytes, staged, out)
    words = row_bytes // width
    lanes = lanes_of(words)
    arguments = (staged, positions, np.int64(count), np.int64(words), np.int32(lanes), out)
    kernel = Kernel("gather.cu", f"scatter_rows_{width}")
    runtime.launch(kernel, _blocks(count, lanes, most_blocks), _THREADS, arguments)


def check_ids(runtime: Runtime, ids: Any, num_rows: int, bad: Any) -> None:
    """Enqueue bad = min(bad, first place in ids whose id is not in [0, num_rows))."""
    count = len(ids)
    if count:
        blocks = max(1, min(-(-count // _THREADS), MAX_BLOCKS))
        arguments = (ids, np.int64(count), np.int64(num_rows), bad)
        runtime.launch(Kernel("gather.cu", "check_ids"), blocks, _THREADS, arguments)
