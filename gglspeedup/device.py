"""Devices: what a user may ask for, whether it is there, and which array module belongs to it."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Union

from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, cuda_failures, explain

DeviceLike = Union[str, int, "Device"]

_REMEDY = 'device="cpu" works everywhere, and device="auto" picks a GPU only if one is usable'


@dataclass(frozen=True)
class Device:
    """A place where arrays live: the CPU (`index` is None) or a CUDA ordinal."""

    index: int | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.index is not None

    @property
    def xp(self) -> ModuleType:
        """NumPy on the CPU, CuPy on a CUDA device."""
        if self.is_cuda:
            import cupy

            return cupy
        import numpy

        return numpy

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.is_cuda else "cpu"


@functools.lru_cache(maxsize=1)
def driver_devices() -> tuple[int, str]:
    """Return the CUDA devices that the driver lists and, where there are none, why.

    The driver's library is asked directly: this takes milliseconds, and no CuPy.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0, "no NVIDIA driver (libcuda) is installed"
    status = driver.cuInit(0)
    if status != 0:
        return 0, f"the NVIDIA driver reports error {status} at its start (cuInit)"
    count = ctypes.c_int(0)
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return 0, f"the NVIDIA driver reports error {status} on counting its devices"
    return count.value, "" if count.value else "the NVIDIA driver lists no device"


@functools.lru_cache(maxsize=1)
def _cupy_problem() -> str:
    """Return why CuPy cannot be used, or an empty string."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except ImportError:
        return 'CuPy is not installed (pip install "gglspeedup[cuda]")'
    except Exception as error:  # CuPy raises its own classes, of a module that may not have loaded
        return f"CuPy cannot use the driver: {error}"
    return ""


def cuda_problem(index: int = 0) -> str:
    """Return why CUDA device `index` cannot be used, or an empty string."""
    count, reason = driver_devices()
    if count == 0:
        return reason
    if index >= count:
        listed = "one device, cuda:0" if count == 1 else f"{count} devices, cuda:0 to cuda:{count - 1}"
        return f"the NVIDIA driver lists {listed}"
    return _cupy_problem()


def parse_device(device: DeviceLike, argument: str = "device") -> Device:
    """Return the device a user names, once it is known to be usable.

    Parameters
    ----------
    device : str, int or Device
        ``"cpu"``, ``"auto"``, an int CUDA ordinal, ``"cuda"`` or ``"cuda:1"``.
    argument : str
        What to call it in an error.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is not one of these.
    DeviceError
        That CUDA device is not there, or CuPy is not.

    Examples
    --------
    >>> str(parse_device("cpu"))
    'cpu'
    """
    forms = '"cpu", "auto", a CUDA ordinal such as 0, or "cuda:1"'
    if isinstance(device, Device):
        index = device.index
    elif isinstance(device, str):
        if device == "auto":
            return Device(None) if cuda_problem(0) else Device(0)
        if device == "cpu":
            return Device(None)
        match = re.fullmatch(r"(?:cuda|gpu)(?::(\d{1,4}))?", device)
        if match is None:
            raise ArgumentValueError(explain(argument, forms, repr(device), _REMEDY))
        index = int(match[1] or 0)
    elif hasattr(device, "__index__") and not isinstance(device, bool):
        index = device.__index__()
        if index < 0:
            raise ArgumentValueError(explain(argument, forms, index, _REMEDY))
    else:
        raise ArgumentTypeError(explain(argument, forms, f"{device!r}", _REMEDY))
    if index is not None:
        problem = cuda_problem(index)
        if problem:
            raise DeviceError(explain(argument, f"a usable CUDA device for cuda:{index}", f"none: {problem}", _REMEDY))
    return Device(index)


def parse_devices(devices: Sequence[DeviceLike], argument: str = "devices") -> list[Device]:
    """Return the devices that a user lists, all CUDA or all CPUs, which may repeat.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is no list of devices, an empty one, or one of both kinds.
    DeviceError
        A CUDA device is not there, or CuPy is not.
    """
    remedy = "pass a list such as [0, 1]"
    if isinstance(devices, (str, bytes)) or not hasattr(devices, "__iter__"):
        raise ArgumentTypeError(explain(argument, "a device for each rank", repr(devices), remedy))
    found = [parse_device(device, argument) for device in devices]
    if not found:
        raise ArgumentValueError(explain(argument, "at least one device", "none", remedy))
    if len({device.is_cuda for device in found}) > 1:
        got = ", ".join(str(device) for device in found)
        raise ArgumentValueError(explain(argument, "CUDA devices only, or CPUs only", got, "leave the others out"))
    return found


def free_bytes(device: Device) -> int:
    """Return the free memory of a CUDA device, in bytes, with what CuPy's pool holds unused."""
    import cupy

    with cuda_failures(device.index or 0), cupy.cuda.Device(device.index):
        free, _total = cupy.cuda.runtime.memGetInfo()
        pool: Any = cupy.get_default_memory_pool()
        return int(free) + int(pool.free_bytes())


def host_free_bytes() -> int:
    """Return the host memory that can be had without swapping, in bytes, as the system estimates it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 1 << 62  # a system that says nothing is not held to anything
