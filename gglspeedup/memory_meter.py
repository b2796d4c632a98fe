"""How much memory was in use at most between two points: of the process, or of a GPU by its framework's allocator."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Protocol

from gglspeedup.device import Device
from gglspeedup.errors import DeviceError, explain
from gglspeedup.memory import release_buffers

_SIZES, _STATUS = "/proc/self/statm", "/proc/self/status"
_PEAK = b"VmHWM:"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_RESET_PEAK = b"5"  # of /proc/self/clear_refs: the peak of the resident set becomes its size


class Meter(Protocol):
    """Measures from one :meth:`start` to the next."""

    def in_use(self) -> int:
        """Return the bytes in use now."""

    def start(self, tidy: bool) -> int:
        """Begin anew, and return the bytes in use; `tidy` asks for freed memory to be given back first."""

    def peak(self) -> int:
        """Return the most bytes in use since :meth:`start`."""

    @property
    def tidies(self) -> bool:
        """Whether freed memory can be given back; else some of it may always be kept, and count as in use."""

    @property
    def chance(self) -> int:
        """Bytes by which the same batch may take more another time."""


class ProcessMeter:
    """The resident set of this process, as the system counts it: memory that an allocator keeps is part of it.

    On Linux the system's peak is set back at every start (``/proc/self/clear_refs``), which other readers of that peak
    (``ru_maxrss``, ``VmHWM``) will notice. Where that is refused, and on macOS, the peak is that of the whole life of
    the process: a start says how high it was, and it tells something only of what exceeds it.
    """

    # Two arrays as large as glibc still looks for holes between others for (mallopt(3), M_MMAP_THRESHOLD): whether it
    # finds one is chance. It gives larger ones memory of their own.
    chance = 2 * (32 << 20)

    def __init__(self) -> None:
        self._resets = _resets_peak()
        self._before = 0  # the peak until another meter set it back
        self._knows_size = os.path.exists(_SIZES)

    def in_use(self) -> int:
        """Return the size of the resident set; on macOS its peak."""
        return _resident() if self._knows_size else _lifetime_peak()

    def start(self, tidy: bool) -> int:
        """Begin anew, and return the bytes in use; `tidy` has glibc give freed memory back to the system."""
        if not self._resets:
            return _lifetime_peak()
        trim = _trim()
        if tidy and trim is not None:
            release_buffers()
            trim(0)
        with _SETTING_BACK:
            peak = _highest()
            for meter in _METERS:
                meter._before = max(meter._before, peak)
            _METERS.add(self)
            self._before = 0
            _reset_peak()
        return _resident()

    def peak(self) -> int:
        """Return the most bytes in use since :meth:`start`."""
        return max(self._before, _highest()) if self._resets else _lifetime_peak()

    @property
    def tidies(self) -> bool:
        """Whether freed memory can be given back; it can with glibc."""
        return self._resets and _trim() is not None


# All share the system's one peak: whoever sets it back tells the others how high it was.
_METERS: weakref.WeakSet[ProcessMeter] = weakref.WeakSet()
_SETTING_BACK = threading.Lock()


class DeviceMeter:
    """Memory of a GPU: what the framework's allocator has handed out, and what CuPy's pool has, where batches lie.

    Parameters
    ----------
    backend : str
        The framework; its adapter tells what its allocator has.
    index : int
        The GPU.
    """

    tidies = True  # freed memory counts as free, anyway
    chance = 0  # what is handed out is counted, not where it lies

    def __init__(self, backend: str, index: int) -> None:
        self._backend = backend
        self._index = index

    def in_use(self) -> int:
        """Return the bytes in use now."""
        return int(self._adapter().bytes_in_use(self._index)) + _pool_bytes(self._index)

    def start(self, tidy: bool) -> int:
        """Begin anew, and return the bytes in use."""
        self._adapter().restart_peak(self._index)
        return self.in_use()

    def peak(self) -> int:
        """Return the most bytes in use since :meth:`start`."""
        return int(self._adapter().peak_bytes(self._index)) + _pool_bytes(self._index)

    def _adapter(self) -> ModuleType:
        adapter: ModuleType = import_module("gglspeedup.adapters").backend(self._backend)
        return adapter


def meter_for(device: Device, backend: str) -> Meter:
    """Return what measures the memory of a device.

    Raises
    ------
    DeviceError
        The framework tells no peak on a GPU, or the system none of a process.
    """
    if device.index is not None:
        if not hasattr(import_module("gglspeedup.adapters").backend(backend), "peak_bytes"):
            needs = "a framework whose allocator tells its peak (torch, TensorFlow, Paddle)"
            raise DeviceError(explain("memory_limit", needs, f"backend={backend!r} on {device}", "take no limit there"))
        return DeviceMeter(backend, device.index)
    if not sys.platform.startswith("linux") and sys.platform != "darwin":
        needs = "Linux or macOS, whose processes know the peak of their memory"
        raise DeviceError(explain("memory_limit", needs, sys.platform, "leave it out"))
    return ProcessMeter()


def _pool_bytes(index: int) -> int:
    import cupy

    with cupy.cuda.Device(index):
        return int(cupy.get_default_memory_pool().used_bytes())


@functools.cache
def _resets_peak() -> bool:
    with suppress(OSError):
        _reset_peak()
        return True
    return False


def _reset_peak() -> None:
    file = os.open("/proc/self/clear_refs", os.O_WRONLY)
    try:
        os.write(file, _RESET_PEAK)
    finally:
        os.close(file)


def _read(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 8192)
    finally:
        os.close(file)


def _resident() -> int:
    """Return the bytes of the resident set; a fraction of the time that the status takes."""
    return int(_read(_SIZES).split(None, 2)[1]) * _PAGE


def _highest() -> int:
    """Return the peak of the resident set in bytes."""
    text = _read(_STATUS)
    begin = text.index(_PEAK) + len(_PEAK)
    return int(text[begin : text.index(b"kB", begin)]) << 10


def _lifetime_peak() -> int:
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, None with another C library."""
    with suppress(OSError, AttributeError):
        function: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return function
    return None
