"""Arrays in the memory of one GPU that the other GPUs, and other processes, of the machine read in place."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ShareError, cuda_failures, explain

logger = logging.getLogger("gglspeedup")

_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled

# The arrays that this process made, by their handles: it cannot open those itself.
_own: weakref.WeakValueDictionary[bytes, PeerArray] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def peers(indices: Sequence[int]) -> bool:
    """Return whether each of these CUDA devices can read the memory of all others."""
    import cupy

    pairs = {(one, other) for one in indices for other in indices if one != other}
    with cuda_failures(indices[0] if indices else 0):
        return all(cupy.cuda.runtime.deviceCanAccessPeer(*pair) for pair in pairs)


def cliques(indices: Sequence[int], layout: str) -> list[list[int]]:
    """Return CUDA devices in groups that read each other's memory.

    Parameters
    ----------
    indices : sequence of int
        Different CUDA ordinals.
    layout : str
        ``"replicated"``: each alone; ``"sharded"``: all together; ``"auto"``: each joins the first group it can.

    Raises
    ------
    ShareError
        All are to share their memory, and some cannot.
    """
    groups: list[list[int]] = []
    for index in indices:
        fitting = [group for group in groups if layout != "replicated" and peers([*group, index])]
        if layout == "sharded" and groups and not fitting:
            got = f"none between cuda:{index} and one of {groups[0]}"
            raise ShareError(explain("layout", "peer access between all devices", got, 'leave it "auto"'))
        if fitting:
            fitting[0].append(index)
        else:
            groups.append([index])
    return groups


class PeerArray:
    """A copy of an array in GPU memory that is not CuPy's pool's, so that it can be handed to other processes.

    Unpickled in another process it is the same memory, which the process that made it has to keep.

    Parameters
    ----------
    host : array
        What to copy.
    index : int
        The CUDA ordinal.

    Raises
    ------
    ShareError
        The device has not so much memory.
    """

    def __init__(self, host: npt.NDArray[Any], index: int) -> None:
        import cupy

        self.index, self.nbytes = index, host.nbytes
        self._opened: dict[int, int] = {}
        with cuda_failures(index), cupy.cuda.Device(index):
            try:
                self._memory: Any = cupy.cuda.Memory(max(1, host.nbytes))
            except MemoryError as error:
                needs, remedy = f"{host.nbytes} bytes on cuda:{index}", "use more devices, or a smaller graph"
                raise ShareError(explain("memory", needs, str(error), remedy)) from error
            source, runtime = np.ascontiguousarray(host), cupy.cuda.runtime
            runtime.memcpy(self._memory.ptr, source.ctypes.data, host.nbytes, runtime.memcpyHostToDevice)
        self._handle: bytes | None = None

    def address(self, reader: int) -> int:
        """Return where the memory lies for the kernels of a CUDA device, which is given access to it."""
        import cupy

        with _lock, cuda_failures(reader), cupy.cuda.Device(reader):
            if self._memory is not None:
                if reader != self.index:
                    _enable(cupy.cuda.runtime, self.index)
                return int(self._memory.ptr)
            if reader not in self._opened:
                # Opened while the reader is current, CUDA gives it access to the other device's memory.
                self._opened[reader] = int(cupy.cuda.runtime.ipcOpenMemHandle(self._handle))
                weakref.finalize(self, _close, reader, self._opened[reader])
            return self._opened[reader]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._handle is None:
            import cupy

            with cuda_failures(self.index), cupy.cuda.Device(self.index):
                self._handle = bytes(cupy.cuda.runtime.ipcGetMemHandle(self._memory.ptr))
        if self._memory is not None:
            _own[self._handle] = self
        return _attach, (self._handle, self.index, self.nbytes)


def _enable(runtime: Any, peer: int) -> None:
    try:
        runtime.deviceEnablePeerAccess(peer)
    except runtime.CUDARuntimeError as error:
        if error.status != _ALREADY_ENABLED:
            raise


def _close(reader: int, pointer: int) -> None:
    import cupy

    try:
        with cupy.cuda.Device(reader):
            cupy.cuda.runtime.ipcCloseMemHandle(pointer)
    except cupy.cuda.runtime.CUDARuntimeError as error:  # a finaliser has nobody to raise it to
        logger.debug("closing another process's memory failed: %s", error)


def _attach(handle: bytes, index: int, nbytes: int) -> PeerArray:
    found = _own.get(handle)
    if found is not None:
        return found
    shared = PeerArray.__new__(PeerArray)
    shared.index, shared.nbytes, shared._opened, shared._memory, shared._handle = index, nbytes, {}, None, handle
    return shared
