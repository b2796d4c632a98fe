"""A CuPy that works on the host, counts every call that can fail, and lets a test fail any of them.

Kernels are run by `HostRuntime`, at once: streams and events do nothing but exist. Two devices share the host's memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from host_cuda import DeviceArray, HostRuntime

from gglspeedup.kernels.cuda import Kernel, kernel_source

_LIBRARY = f"{os.sep}gglspeedup{os.sep}"


class OutOfMemoryError(MemoryError):
    """As CuPy has it."""


class CUDARuntimeError(RuntimeError):
    """As CuPy has it; of a status, or of what the driver refused."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class CUDADriverError(RuntimeError):
    """As CuPy has it."""


class CompileException(Exception):
    """As CuPy has it."""


class ndarray(DeviceArray):
    """A device array; its memory lives as long as it and its views."""

    memory: Any = None

    def __new__(cls, shape: Any, dtype: Any, pointer: Any) -> Any:
        """Return an array of memory that is there."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array = pointer.memory.array[:size].view(dtype).reshape(shape).view(cls)
        array.memory = pointer.memory
        return array

    def __array_finalize__(self, parent: Any) -> None:
        super().__array_finalize__(parent)
        self.memory = getattr(parent, "memory", None)

    @property
    def data(self) -> Any:
        """Where the array lies."""
        return Pointer(self.memory.cupy, self.ctypes.data)

    @property
    def device(self) -> Any:
        """The device."""
        return HostDevice(self.memory.cupy, 0)

    def __setitem__(self, where: Any, value: Any) -> None:
        if self.memory is not None:
            self.memory.cupy.faults.reach("copy on the device")
        super().__setitem__(where, value)

    def copy(self, order: str = "C") -> Any:
        """Return a copy, of the pool's memory."""
        made = self.memory.cupy.empty(self.shape, self.dtype)
        made[...] = self
        return made

    def get(self) -> Any:
        """Return a copy on the host."""
        self.memory.cupy.faults.reach("copy to the host")
        return np.array(self)


for kind, module in (
    (OutOfMemoryError, "cupy.cuda.memory"), (CUDARuntimeError, "cupy_backends.cuda.api.runtime"),
    (CUDADriverError, "cupy_backends.cuda.api.driver"), (CompileException, "cupy.cuda.compiler"), (ndarray, "cupy"),
):  # fmt: skip
    kind.__module__ = module

ERRORS: dict[str, list[Any]] = {
    "allocation": [lambda: OutOfMemoryError("Out of memory"), lambda: CUDARuntimeError(2)],
    "pinned allocation": [lambda: CUDARuntimeError(2), lambda: OutOfMemoryError("Out of memory")],
    "compilation": [lambda: CompileException("no code")],
    "function": [lambda: CUDADriverError("CUDA_ERROR_NOT_FOUND")],
    "launch": [lambda: CUDADriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")],
}


class Faults:
    """Which call fails.

    Attributes
    ----------
    reached : list of str
        The kind of every call since the last :meth:`arm`.
    places : list of tuple
        The lines of the library that each of them came from.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a destructor may count, too
        self._off = False
        self.arm(None)

    @contextlib.contextmanager
    def off(self) -> Any:
        """Count and fail none: what a test does itself."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def arm(self, place: int | None, which: int = 0, stays: bool = False) -> None:
        """Let the call at a place fail, counted from now, by one of its errors; with `stays` all later of its kind."""
        self.reached: list[str] = []
        self.places: list[tuple[Any, ...]] = []
        self._place, self._which, self._stays = place, which, stays
        self._kind: str | None = None

    def reach(self, kind: str) -> None:
        """Count a call, and fail it if it is the one."""
        if self._off:
            return
        with self._lock:
            self.reached.append(kind)
            if self._place is None:
                self.places.append(_place())
            if len(self.reached) - 1 == self._place:
                self._kind = kind
            elif kind != self._kind or not self._stays:
                return
            errors = ERRORS.get(kind, [lambda: CUDARuntimeError(999)])
            error = errors[self._which % len(errors)]()
        raise error


def _place() -> tuple[Any, ...]:
    """The lines of the library on the stack."""
    lines, frame = [], sys._getframe(2)
    while frame is not None:
        if _LIBRARY in frame.f_code.co_filename:
            lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


class Memory:
    """Memory of a device, or the host's where a kernel may read it; counted while it lives."""

    def __init__(self, cupy: Any, array: Any, kind: str) -> None:
        self.cupy, self.array, self.kind = cupy, array, kind
        self.ptr, self.size = array.ctypes.data, array.nbytes
        cupy.living[kind] = cupy.living.get(kind, 0) + 1

    def __del__(self) -> None:
        self.cupy.living[self.kind] -= 1


class PinnedMemory(bytearray):
    """Pinned memory of the pool."""

    living: Any = None

    def __del__(self) -> None:
        if self.living is not None:
            self.living["pinned"] -= 1


class Pointer:
    """An address, and what keeps the memory there."""

    def __init__(self, cupy: Any, ptr: int, memory: Any = None) -> None:
        self.cupy, self.ptr, self.memory = cupy, ptr, memory

    def copy_from_host_async(self, source: int, size: int) -> None:
        """Copy to the device."""
        self.cupy.faults.reach("copy to the device")
        ctypes.memmove(self.ptr, source, size)

    def copy_to_host_async(self, target: int, size: int) -> None:
        """Copy to the host."""
        self.cupy.faults.reach("copy to the host")
        ctypes.memmove(target, self.ptr, size)


class Event:
    """A mark that is passed at once."""

    done = True

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        cupy.faults.reach("event")

    def record(self, stream: Any = None) -> None:
        """Mark a stream."""
        self.cupy.faults.reach("event record")

    def synchronize(self) -> None:
        """Let the host wait."""
        self.cupy.faults.reach("synchronize")


class Stream:
    """A stream; `recorded` are launches while it is captured."""

    def __init__(self, cupy: Any, ptr: int) -> None:
        self.cupy, self.ptr = cupy, ptr
        self.recorded: list[Any] | None = None

    def __enter__(self) -> Stream:
        self.cupy.local.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.cupy.local.streams.pop() is self

    def record(self, event: Event) -> Event:
        """Mark the stream."""
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Let what comes later wait for a mark."""
        assert isinstance(event, Event)
        self.cupy.faults.reach("wait for an event")

    def synchronize(self) -> None:
        """Let the host wait."""
        self.cupy.faults.reach("synchronize")

    def begin_capture(self) -> None:
        """Record launches from now on."""
        self.cupy.faults.reach("begin of a capture")
        self.recorded = []
        self.cupy.living["captures"] = self.cupy.living.get("captures", 0) + 1

    def end_capture(self) -> Any:
        """Return what was recorded."""
        recorded, self.recorded = self.recorded, None
        self.cupy.living["captures"] -= 1
        self.cupy.faults.reach("end of a capture")
        return SimpleNamespace(launch=lambda: self.cupy.replay(recorded))


class HostDevice:
    """A device; current within a block."""

    def __init__(self, cupy: Any, index: int) -> None:
        self.cupy, self.id = cupy, index
        self.before: list[int] = []

    def __enter__(self) -> HostDevice:
        self.cupy.faults.reach("device")
        self.before.append(self.cupy.local.device)
        self.cupy.local.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self.cupy.local.device = self.before.pop()


class Local(threading.local):
    """What is current in a thread."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.allocators: list[Any] = []
        self.device = 0


class CupyOnHost(ModuleType):
    """The module; `cuda` is itself.

    Attributes
    ----------
    faults : Faults
        What fails.
    living : dict
        How many pieces of memory, captures and opened handles there are.
    """

    def __init__(self, host: HostRuntime, free: int = 1 << 30) -> None:
        super().__init__("cupy")
        self.host, self.free, self.faults, self.local = host, free, Faults(), Local()
        self.living: dict[str, int] = {}
        self.cuda, self.runtime = self, CudaRuntimeApi(self)
        self.default = Stream(self, 0)
        self.ndarray = ndarray

    # --- arrays ---

    def empty(self, shape: Any, dtype: Any = float) -> Any:
        """Return an array of memory of the current allocator."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        allocators = self.local.allocators
        return ndarray(shape, dtype, allocators[-1](size) if allocators else self.malloc(size))

    def zeros(self, shape: Any, dtype: Any = float) -> Any:
        """Return an array of zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def asarray(self, host: Any, order: str = "K") -> Any:
        """Return an array of a host array's values."""
        if isinstance(host, ndarray):
            return host
        array = self.empty(np.shape(host), host.dtype)
        array[...] = host
        return array

    ascontiguousarray = asarray

    # --- memory ---

    def malloc(self, size: int) -> Any:
        """Return memory of the pool."""
        if size:  # of nothing there is always enough
            self.faults.reach("allocation")
        memory = Memory(self, self.host.empty(size, np.uint8), "pool")
        return Pointer(self, memory.ptr, memory)

    def Memory(self, size: int) -> Any:
        """Return memory that is not the pool's."""
        self.faults.reach("allocation")
        return Memory(self, self.host.empty(size, np.uint8), "own")

    def UnownedMemory(self, ptr: int, size: int, owner: Any, index: int) -> Any:
        """Return somebody else's memory, which `owner` keeps."""
        array = getattr(getattr(getattr(owner, "_memory", None), "memory", None), "array", None)
        if array is None:
            array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(ptr)).view(DeviceArray)
        memory = Memory(self, array, "unowned")
        memory.owner = owner
        return memory

    def MemoryPointer(self, memory: Any, offset: int) -> Any:
        """Return a pointer to memory."""
        assert offset == 0
        return Pointer(self, memory.ptr, memory)

    def alloc_pinned_memory(self, size: int) -> Any:
        """Return pinned memory of the pool."""
        self.faults.reach("pinned allocation")
        memory = PinnedMemory(size)
        memory.living = self.living
        self.living["pinned"] = self.living.get("pinned", 0) + 1
        return memory

    def get_default_memory_pool(self) -> Any:
        """Return the pool."""
        return SimpleNamespace(malloc=self.malloc, free_bytes=lambda: 0)

    @contextlib.contextmanager
    def using_allocator(self, allocator: Any) -> Any:
        """Take memory from an allocator."""
        self.local.allocators.append(allocator)
        try:
            yield
        finally:
            self.local.allocators.pop()

    # --- devices, streams, kernels ---

    def Device(self, index: int | None = None) -> Any:
        """Return a device, the current one by default."""
        return HostDevice(self, self.local.device if index is None else index)

    def Stream(self, non_blocking: bool) -> Any:
        """Return a new stream."""
        assert non_blocking
        self.faults.reach("stream")
        return Stream(self, 77)

    def ExternalStream(self, ptr: int, index: int) -> Any:
        """Return somebody else's stream."""
        return Stream(self, ptr)

    def get_current_stream(self) -> Any:
        """Return the thread's current stream."""
        return self.local.streams[-1] if self.local.streams else self.default

    def Event(self, disable_timing: bool) -> Any:
        """Return a new event."""
        assert disable_timing
        return Event(self)

    def RawModule(self, code: str, options: tuple[str, ...], backend: str) -> Any:
        """Return the kernels of a file."""
        file = next(file for file in ("sample.cu", "gather.cu") if kernel_source(file) == code)
        macros = tuple(option[2:] for option in options if option.startswith("-D"))

        def function(name: str) -> Any:
            self.faults.reach("compilation")
            self.faults.reach("function")
            return lambda grid, block, arguments: self.launch(Kernel(file, name, macros), grid, block, arguments)

        return SimpleNamespace(get_function=function)

    def launch(self, kernel: Kernel, grid: Any, block: Any, arguments: Any) -> None:
        """Run a kernel, or record it."""
        self.faults.reach("launch")
        recorded = self.get_current_stream().recorded
        if recorded is not None:
            recorded.append((kernel, grid[0], block[0], arguments, *grid[1:]))
        else:
            self.host.launch(kernel, grid[0], block[0], arguments, *grid[1:])

    def replay(self, recorded: Any) -> None:
        """Run what was recorded."""
        self.faults.reach("launch of a graph")
        for launch in recorded:
            self.host.launch(*launch)

    def stamp_rows(self, n_id: Any, number: int, stamps: Any, positions: Any, stream: int) -> None:
        """Stands in for `history_gpu.stamp_rows`: two launches of numba.cuda."""
        stamps, positions = np.asarray(stamps), np.asarray(positions)
        self.faults.reach("launch of numba.cuda")
        for i, node in enumerate(np.asarray(n_id).tolist()):
            stamps[node] = max(stamps[node], number << 32 | i)
        self.faults.reach("launch of numba.cuda")
        for i, node in enumerate(np.asarray(n_id).tolist()):
            positions[i] = node if stamps[node] == number << 32 | i else -1

    def leaked(self) -> dict[str, int]:
        """Return what lives."""
        for _ in range(2):
            held = {"registered": len(self.runtime.registered), "handles": len(self.runtime.opened)}
            found = {name: count for name, count in {**self.living, **held}.items() if count}
            if not found:
                break
            gc.collect()  # dear, and seldom needed
        return found


class CudaRuntimeApi:
    """`cupy.cuda.runtime`."""

    memcpyHostToDevice = 1
    memoryTypeHost = 1
    cudaDevAttrCanUseHostPointerForRegisteredMem = 91
    CUDARuntimeError = CUDARuntimeError

    def __init__(self, cupy: CupyOnHost) -> None:
        self.cupy = cupy
        self.registered: dict[int, int] = {}
        self.opened: list[int] = []
        self.enabled: set[tuple[int, int]] = set()

    def getDeviceCount(self) -> int:
        return 2

    def memGetInfo(self) -> tuple[int, int]:
        self.cupy.faults.reach("memory info")
        return self.cupy.free, 1 << 40

    def deviceSynchronize(self) -> None:
        self.cupy.faults.reach("synchronize")

    def deviceGetAttribute(self, attribute: int, index: int) -> int:
        self.cupy.faults.reach("attribute")
        return 1

    def pointerGetAttributes(self, pointer: int) -> Any:
        self.cupy.faults.reach("attribute")
        held = any(low <= pointer < low + size for low, size in self.registered.items())
        return SimpleNamespace(type=int(held), devicePointer=pointer)

    def hostRegister(self, pointer: int, size: int, flags: int) -> None:
        self.cupy.faults.reach("registration")
        assert pointer not in self.registered
        self.registered[pointer] = size

    def hostUnregister(self, pointer: int) -> None:
        del self.registered[pointer]
        self.cupy.faults.reach("end of a registration")

    def deviceCanAccessPeer(self, one: int, other: int) -> bool:
        self.cupy.faults.reach("peer access")
        return True

    def deviceEnablePeerAccess(self, peer: int) -> None:
        self.cupy.faults.reach("peer access")
        if (self.cupy.local.device, peer) in self.enabled:
            raise CUDARuntimeError(704)
        self.enabled.add((self.cupy.local.device, peer))

    def memcpy(self, target: int, source: int, size: int, kind: int) -> None:
        self.cupy.faults.reach("copy to the device")
        ctypes.memmove(target, source, size)

    def ipcGetMemHandle(self, pointer: int) -> bytes:
        self.cupy.faults.reach("handle")
        return pointer.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        self.cupy.faults.reach("handle")
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def ipcCloseMemHandle(self, pointer: int) -> None:
        self.opened.remove(pointer)
        self.cupy.faults.reach("handle")
