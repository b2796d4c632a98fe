"""Threads of the CPU kernels: how many, on which threading layer, and where compiled code is cached."""

from __future__ import annotations

import ctypes
import functools
import glob
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain

logger = logging.getLogger("gglspeedup")

_requested: int | None = None
_layer_lock = threading.Lock()
_launch_lock: threading.Lock | None = None
_layer_ready = False
_announced = False
_compiled: set[Any] = set()  # kernels that are


_launches: set[object] = set()  # one a kernel that runs
_held = False  # whether none may begin
_hold_lock = threading.Lock()
_locked: weakref.WeakSet[Any] = weakref.WeakSet()

_TICK = 1e-4  # seconds


def lock_of(owner: Any) -> threading.Lock:
    """Return a lock for an object's `_lock`, which a fork sets free: the threads that might hold it do not come along.

    What it guards has to be whole at every moment.
    """
    _locked.add(owner)
    return threading.Lock()


def _forked() -> None:
    """Know nothing of threads that did not come along."""
    global _held, _hold_lock
    _held, _hold_lock = False, threading.Lock()
    _launches.clear()
    for owner in _locked:
        owner._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@functools.lru_cache(maxsize=1)
def usable_cores() -> int:
    """Return the number of cores this process may use: its affinity, capped by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no cgroup, or an older kind: the affinity stands
    return max(1, cores)


def set_num_threads(n: int) -> None:
    """Set how many threads the CPU kernels use; no result depends on it.

    Parameters
    ----------
    n : int
        Threads, at least 1. More than the cores this process may use is cut to those.

    Raises
    ------
    ArgumentTypeError
        `n` is not an integer.
    ArgumentValueError
        `n` is below 1.

    Examples
    --------
    >>> import gglspeedup
    >>> gglspeedup.set_num_threads(1)
    """
    global _requested
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise ArgumentTypeError(explain("n", "an integer", f"{n!r}", "pass the number of threads, for example 2"))
    n = n.__index__()
    if n < 1:
        raise ArgumentValueError(explain("n", "at least 1", n, "pass 1 for a single thread"))
    _requested = n


def get_num_threads() -> int:
    """Return how many threads a CPU kernel started now would use."""
    limit = usable_cores()
    return limit if _requested is None else min(_requested, limit)


def _tbb_files() -> Iterator[str]:
    """Give the places where pip may have put tbb: below the prefixes, else wherever its record says."""
    for prefix in (sys.prefix, sys.base_prefix):
        yield os.path.join(prefix, "lib", "libtbb.so.12")
        yield os.path.join(prefix, "Library", "bin", "tbb12.dll")
    yield "libtbb.so.12"
    try:
        files = metadata.files("tbb") or []
    except metadata.PackageNotFoundError:
        return
    yield from (str(file.locate()) for file in files if file.name in ("libtbb.so.12", "tbb12.dll"))


def _load_tbb() -> bool:
    """Load tbb where Numba will find it, and say whether Numba can use it."""
    for name in _tbb_files():
        try:
            ctypes.CDLL(name, mode=getattr(os, "RTLD_GLOBAL", 0))
            import_module("numba.np.ufunc.tbbpool")
            return True
        except (OSError, ImportError):  # not there, or of a version that Numba cannot use
            continue
    return False


def numba() -> ModuleType:
    """Import Numba with its threading layer chosen: tbb, which may be forked and shared by threads."""
    global _layer_ready, _launch_lock
    import numba

    if _layer_ready:
        return numba
    with _layer_lock:
        if not _layer_ready:
            if _load_tbb():
                numba.config.THREADING_LAYER = "tbb"
                if threading.current_thread() is threading.main_thread():
                    numba.get_num_threads()  # starts tbb, which only the thread that did so can fork without harm
            else:
                # Without tbb Numba may pick a layer that refuses concurrent callers.
                logger.info("libtbb not found: CPU kernels run one call at a time (pip install tbb)")
                _launch_lock = threading.Lock()
            _layer_ready = True
    return numba


def announce_compilation(kernel: Any) -> None:
    """Say so in the log, once a process, if the first call of a kernel is about to compile, which takes seconds."""
    global _announced
    if _announced or kernel in _compiled:
        return
    if kernel.signatures:  # which takes longer than all else of a small batch
        _compiled.add(kernel)
        return
    folder = kernel._cache.cache_path
    if not glob.glob(os.path.join(glob.escape(folder), f"*.{kernel.__name__}-*.nbi")):
        _announced = True
        logger.warning("compiling the CPU kernels for this machine, once, some ten seconds; kept in %s", folder)


@contextmanager
def launching(most: int = 1 << 30) -> Iterator[int]:
    """Hold what a parallel kernel launch needs, and give the number of threads it may use, `most` or fewer."""
    module = numba()
    threads = max(1, min(get_num_threads(), module.config.NUMBA_NUM_THREADS, most))
    running = object()
    try:
        _launches.add(running)  # first: who holds launches back sees either this or a thread that sees it
        while _held:
            _launches.discard(running)
            time.sleep(_TICK)
            _launches.add(running)
        with _launch_lock or nullcontext():
            module.set_num_threads(threads)  # of the calling thread alone
            yield threads
    finally:
        _launches.discard(running)


@contextmanager
def holding_launches() -> Iterator[None]:
    """Wait until no kernel runs or is compiled in any thread, and let none begin: what they lock is then free."""
    global _held
    with _hold_lock:
        _held = True
        try:
            while _launches:
                time.sleep(_TICK)
            yield
        finally:
            _held = False
