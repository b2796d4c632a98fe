"""What this machine offers and what is missing, for people and for bug reports."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
from importlib import metadata

from gglspeedup import __version__
from gglspeedup.device import cuda_problem, driver_devices
from gglspeedup.threads import get_num_threads, numba, usable_cores

# What is imported, the distributions it may come from, and the command that brings it.
_PACKAGES = (
    ("numpy", ("numpy",), ""),
    ("numba", ("numba",), ""),
    ("scipy", ("scipy",), "pip install scipy"),
    ("cupy", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), 'pip install "gglspeedup[cuda]"'),
    ("numba_cuda", ("numba-cuda",), 'pip install "gglspeedup[cuda]"'),
    ("torch", ("torch",), 'pip install "gglspeedup[torch]"'),
    ("tensorflow", ("tensorflow", "tensorflow-cpu"), 'pip install "gglspeedup[tensorflow]"'),
    ("paddle", ("paddlepaddle", "paddlepaddle-gpu"), 'pip install "gglspeedup[paddle]"'),
    ("tensorlayerx", ("tensorlayerx",), 'pip install "gglspeedup[tensorlayerx]"'),
    ("jax", ("jax",), 'pip install "gglspeedup[jax]"'),
)


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    """Return a package's version without importing it, or None if it is missing."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version" if importlib.util.find_spec(module) else None


def _driver_version() -> str | None:
    """Return the CUDA version that the driver supports, or None without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _gpus() -> list[str]:
    problem = cuda_problem(0)
    if problem:
        return [f"  none usable: {problem}"]
    import cupy

    lines = []
    for index in range(driver_devices()[0]):
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        with cupy.cuda.Device(index):
            free, total = cupy.cuda.runtime.memGetInfo()
        name = properties["name"].decode()
        capability = f"{properties['major']}.{properties['minor']}"
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        lines.append(f"  cuda:{index}: {name}, capability {capability}, {memory}")
    return lines


def _locked_limit() -> str:
    """Return how much memory may be page-locked without the driver's help."""
    try:
        import resource
    except ImportError:  # not on Windows
        return "unknown on this system"
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft // 1024} KiB (ulimit -l)"


def _threading_layer() -> str:
    """Run a parallel kernel, as only then Numba decides, and return its layer's name."""
    import numpy as np

    module = numba()
    from gglspeedup.kernels.gather_cpu import gather_rows

    rows = np.zeros(1, np.int64)
    gather_rows(rows.ctypes.data, np.zeros(1, np.int64), rows.ctypes.data, 8)
    return str(module.threading_layer())


def report() -> str:
    """Return a text of several lines.

    Examples
    --------
    >>> from gglspeedup.info import report
    >>> report().splitlines()[0].split()[0]
    'gglspeedup'
    """
    from gglspeedup.kernels.gather_cpu import gather_rows

    lines = [
        f"gglspeedup {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "devices",
        f"  cpu: {usable_cores()} usable cores, {get_num_threads()} threads, threading layer {_threading_layer()}",
        *_gpus(),
        f"driver: {f'supports CUDA {_driver_version()}' if _driver_version() else 'none'}",
        f"lockable memory: {_locked_limit()}",
        "caches",
        f"  CPU kernels: {gather_rows._cache.cache_path}",  # type: ignore[attr-defined]
        f"  GPU kernels: {os.environ.get('CUPY_CACHE_DIR') or os.path.expanduser('~/.cupy/kernel_cache')}",
        "packages",
    ]
    for module, distributions, command in _PACKAGES:
        version = _version(module, distributions)
        lines.append(f"  {module} {version}" if version else f"  {module}: missing; {command}")
    return "\n".join(lines)
