"""Arrays in host memory that processes share without a name, so that nothing is left behind however they end."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from multiprocessing import reduction
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.device import host_free_bytes
from gglspeedup.errors import ShareError, explain

Array = npt.NDArray[Any]


class SharedArray:
    """A zeroed array in anonymous shared memory; unpickled in a spawned process it is the same memory.

    The memory lives as long as any process maps it, and has no name that could outlive them: not even a process that is
    killed leaves it behind.

    Parameters
    ----------
    shape : tuple of int
        The shape; rows are contiguous.
    dtype : dtype
        The element type.

    Attributes
    ----------
    array : array
        The memory, page-aligned.

    Raises
    ------
    ShareError
        There is not so much memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        dtype = np.dtype(dtype)
        size = max(1, math.prod(shape) * dtype.itemsize)
        needs, free = f"{size} bytes that processes share", host_free_bytes()
        if size > free:  # the system would rather end processes than say so
            raise ShareError(explain("memory", needs, f"{free} that are free", "use a smaller array"))
        file = _anonymous_file()
        try:
            # Reserved now: memory that runs out later would end the process with a bus error.
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            os.close(file)
            raise ShareError(explain("memory", needs, f"{error.strerror or error}", "use a smaller array")) from error
        self._open(file, shape, dtype)

    @classmethod
    def of(cls, values: Array) -> SharedArray:
        """Return a copy of an array in shared memory."""
        shared = cls(values.shape, values.dtype)
        shared.array[...] = values
        return shared

    def _open(self, file: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file = file
        self._close = weakref.finalize(self, os.close, file)  # the mapping lives as long as arrays on it
        count = math.prod(shape)
        size = max(1, count * dtype.itemsize)
        self.array: Array = np.frombuffer(mmap.mmap(file, size), dtype, count).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        if not hasattr(reduction, "DupFd"):
            needs, got = "a system that hands files to other processes", os.name
            raise ShareError(explain("memory", needs, got, "make the object in each process"))
        return _attach, (reduction.DupFd(self._file), self.array.shape, self.array.dtype)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("gglspeedup", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # has no name either
        return os.dup(file.fileno())


def _attach(handle: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> SharedArray:
    shared = SharedArray.__new__(SharedArray)
    shared._open(handle.detach(), shape, dtype)
    return shared
