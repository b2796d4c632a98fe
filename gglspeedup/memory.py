"""Host memory: sizes as users write them, and reused, 64-byte aligned output buffers."""

from __future__ import annotations

import collections
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.threads import lock_of

ALIGNMENT = 64
_MOST_BUFFERS = 64
_POOLS: weakref.WeakSet[BufferPool] = weakref.WeakSet()
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(size: int | float | str, argument: str) -> int:
    """Return a number of bytes, from an int, a float or a string such as ``"0.1G"``, ``"512MB"``, ``"64K"``.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is not a size, is negative, or is not finite.

    Examples
    --------
    >>> parse_size("0.5K", "budget")
    512
    """
    needs, remedy = "a number of bytes or a string with a unit", 'write it like 1024, "0.1G", "512MB" or "64K"'
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(?:I?B)?\s*", size.upper())
        if match is None:
            raise ArgumentValueError(explain(argument, needs, repr(size), remedy))
        return int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, (int, float, np.integer, np.floating)):
        raise ArgumentTypeError(explain(argument, needs, repr(size), remedy))
    if not math.isfinite(size) or size < 0:
        raise ArgumentValueError(explain(argument, needs, repr(size), remedy))
    return int(size)


def aligned_empty(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return uninitialised bytes that start on a 64-byte boundary, as every DLPack consumer needs."""
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + num_bytes]


_allocate: Callable[[int], npt.NDArray[np.uint8]] = aligned_empty  # buffers of pools


def allocate_by(allocate: Callable[[int], npt.NDArray[np.uint8]]) -> None:
    """Let another function make the buffers of all pools from now on: so many bytes, from a 64-byte boundary."""
    global _allocate
    _allocate = allocate
    release_buffers()


def release_buffers() -> None:
    """Free the buffers of all pools that no array uses."""
    for pool in list(_POOLS):
        pool.release()


class AliasedArray:
    """An object whose array interface points into another array; it keeps that array alive."""

    def __init__(self, owner: npt.NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.owner, self.dtype = owner, dtype
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            # The interface has no word for types such as bfloat16: they are given as bits, and viewed.
            "typestr": f"|u{dtype.itemsize}" if dtype.kind == "V" else dtype.str,
            # Not read-only: Numba compiles a kernel anew for read-only arrays, and kernels only read these.
            "data": (owner.ctypes.data, False),
        }

    def array(self) -> npt.NDArray[Any]:
        """Return an array on this object."""
        array = np.asarray(self)
        return array.view(self.dtype) if self.dtype.kind == "V" else array


def kernel_view(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array itself or, if it is read-only, a view that kernels take without compiling anew."""
    if array.flags.writeable:
        return array
    return AliasedArray(array, array.shape, array.dtype).array()


class _Lease(AliasedArray):
    """The owner of a handed-out array: when the last view of it dies, the buffer goes back to its pool."""

    def __init__(self, pool: BufferPool, buffer: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(buffer, shape, dtype)
        self.pool = pool

    def __del__(self) -> None:
        self.pool.give_back(self.owner)


class BufferPool:
    """Output buffers that are used again once the caller has dropped the arrays on them.

    A fresh buffer costs page faults, which are dearer than the sampling or copying that fills it. Arrays and
    everything made from them without a copy (views, tensors over DLPack) hold the buffer as long as they live.

    Parameters
    ----------
    limit : int
        Bytes kept for reuse; buffers beyond are freed, the longest unused first.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._free: list[npt.NDArray[np.uint8]] = []
        # Buffers come back whenever the garbage collector says so, even to a thread that holds the lock: they wait
        # here, where appending needs none, until the next call sorts them in.
        self._returned: collections.deque[npt.NDArray[np.uint8]] = collections.deque()
        self._lock = lock_of(self)
        _POOLS.add(self)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an uninitialised C-contiguous array that starts on a 64-byte boundary."""
        dtype = np.dtype(dtype)
        return _Lease(self, self._take(math.prod(shape) * dtype.itemsize), shape, dtype).array()

    def empty_pair(
        self, first: tuple[int, ...], second: tuple[int, ...], dtype: npt.DTypeLike
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return two such arrays on one buffer, which takes half the time and comes back when both are gone."""
        dtype = np.dtype(dtype)
        begin = -(-math.prod(first) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        buffer = self.empty((begin + math.prod(second) * dtype.itemsize,), np.uint8)
        one = buffer[: math.prod(first) * dtype.itemsize].view(dtype).reshape(first)
        return one, buffer[begin:].view(dtype).reshape(second)

    def _take(self, need: int) -> npt.NDArray[np.uint8]:
        """Return a buffer of at least so many bytes."""
        # Classes an eighth of a power of two apart: a batch a little larger than the last finds its buffer.
        step = max(4096, 1 << max(0, need.bit_length() - 4))
        size = -(-max(need, 1) // step) * step
        with self._lock:
            self._sort_in()
            fitting = [buffer for buffer in self._free if size <= buffer.size <= 2 * size]
            found = min(fitting, key=len, default=None)
            if found is not None:
                self._free = [buffer for buffer in self._free if buffer is not found]
            while len(self._free) > _MOST_BUFFERS or sum(map(len, self._free)) > self.limit:
                self._free.pop(0)
        return _allocate(size) if found is None else found

    def _sort_in(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def release(self) -> None:
        """Free the buffers that no array uses."""
        with self._lock:
            self._sort_in()
            self._free = []

    def give_back(self, buffer: npt.NDArray[np.uint8]) -> None:
        """Take a buffer that no array uses any more."""
        self._returned.append(buffer)

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self.limit,)
