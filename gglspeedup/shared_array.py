"""Arrays in host memory that processes share without a name, so that nothing is left behind however they end."""

from __future__ import annotations

import ctypes
import functools
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
    def attached(cls, file: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> SharedArray:
        """Return the array of another process, by the number that its :attr:`file` has here; it takes that over."""
        shared = cls.__new__(cls)
        shared._open(file, shape, np.dtype(dtype))
        return shared

    @property
    def file(self) -> int:
        """The number of the open file that the memory is."""
        return self._file

    def close_file(self) -> None:
        """Close the file. The memory stays, but can be handed to no other process any more."""
        self._close()

    @classmethod
    def of(cls, values: Array) -> SharedArray:
        """Return a copy of an array in shared memory."""
        shared = cls(values.shape, values.dtype)
        shared.array[...] = values
        return shared

    def _open(self, file: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._file = file
        self._close = weakref.finalize(self, os.close, file)  # the mapping lives as long as arrays on it
        size = math.prod(shape) * dtype.itemsize
        self.array: Array = np.asarray(_Mapping(file, max(1, size)))[:size].view(dtype).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        if not hasattr(reduction, "DupFd"):
            needs, got = "a system that hands files to other processes", os.name
            raise ShareError(explain("memory", needs, got, "make the object in each process"))
        return _attach, (reduction.DupFd(self._file), self.array.shape, self.array.dtype)


class _Mapping:
    """A file in memory. Python's own mappings would each keep a file open, of which a process may have a thousand."""

    def __init__(self, file: int, size: int) -> None:
        self._size, self._address = size, 0
        system = _system()
        address = system.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file, 0)
        if address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise ShareError(explain("memory", f"to map {size} bytes", os.strerror(number), "keep fewer arrays"))
        self._unmap, self._address = system.munmap, address
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, False)}

    def __del__(self) -> None:
        if self._address:
            self._unmap(self._address, self._size)


@functools.lru_cache(maxsize=1)
def _system() -> Any:
    """Return the system's own functions."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    system.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return system


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("gglspeedup", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # has no name either
        return os.dup(file.fileno())


def _attach(handle: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> SharedArray:
    return SharedArray.attached(handle.detach(), shape, dtype)
