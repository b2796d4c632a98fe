"""The thin layer over CuPy: arrays, kernels compiled on first use, one-way copies, graphs, pinned memory.

Importing this module imports no CuPy. Every method enqueues on the current CuPy stream of the calling thread; only
in :meth:`CudaRuntime.read` and :meth:`CudaRuntime.settle` does the host wait. The tests have a second runtime with the
same methods that runs the same `.cu` files on the host, so nothing here knows what it launches.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from gglspeedup.errors import DeviceError, GGLSpeedupError, cuda_failures, explain

logger = logging.getLogger("gglspeedup")

_HERE = Path(__file__).parent
_MAPPED_PORTABLE = 0x1 | 0x2  # cudaHostRegisterPortable | cudaHostRegisterMapped
_READ_ONLY = 0x8  # cudaHostRegisterReadOnly
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered

OPTIONS = ("-std=c++17",)


class PinningError(GGLSpeedupError, RuntimeError):
    """Host memory cannot be pinned and mapped for the GPU; callers fall back to copies."""


class Kernel(NamedTuple):
    """A kernel: the file it is in, its name, and the macros the file is compiled with."""

    file: str
    name: str
    macros: tuple[str, ...] = ()


class Runtime(Protocol):
    """What launchers and samplers need of a device. Arrays are of `xp`, or behave as NumPy's do."""

    index: int

    @property
    def xp(self) -> ModuleType:
        """The module of the arrays."""

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device current for a block of code."""

    def is_device(self, array: Any) -> bool:
        """Whether kernels may read this array where it lies."""

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an uninitialised device array."""

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return a device array of zeros."""

    def to_device(self, host: np.ndarray[Any, Any]) -> Any:
        """Return a device array of a host array's values; the host array may change at once."""

    def pinned(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        """Return an uninitialised host array that copies to the device without a stop in between."""

    def upload(self, host: np.ndarray[Any, Any], device: Any) -> None:
        """Copy a host array to a device array of the same bytes; the host array must stay as it is until a read."""

    def read(self, device: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Return a device array's values, once all that was enqueued before has run; the host waits."""

    def download(self, device: Any, host: np.ndarray[Any, Any], event: Any = None) -> Any:
        """Enqueue a copy of a device array to a host array of the same bytes; return the mark at which it is whole.

        `event` is a mark to use again.
        """

    def settle(self, event: Any) -> None:
        """Let the host wait for a mark."""

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        """Enqueue a kernel of `grid` times `layers` blocks.

        Arguments are device arrays and NumPy scalars of the parameters' types.
        """

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record, not run, what `enqueue` launches. All its kernels must have been launched before."""

    def replay(self, graph: Any) -> None:
        """Enqueue what was recorded."""

    def record(self, event: Any = None) -> Any:
        """Mark this point of the current stream; `event` is one to use again."""

    def wait(self, event: Any) -> None:
        """Let what is enqueued from now on wait for a mark, without the host waiting."""

    def stream(self) -> int:
        """Return the current stream's pointer, for launchers that are not CuPy's; 0 is the default stream."""

    def pinned_view(self, host: np.ndarray[Any, Any]) -> PinnedView:
        """Pin a host array where it is and return it as a device array. Raises PinningError."""

    def address(self, array: Any) -> int:
        """Return where a device array lies, as kernels of this device see it."""


class PinnedView:
    """A host array as kernels see it. It stays pinned while this or an array made of it is alive.

    Parameters
    ----------
    array : device array
        The view.
    registration : object
        What unpins the memory when nobody holds it any more, or None.
    """

    def __init__(self, array: Any, registration: object | None) -> None:
        self.array = array
        self._registration = registration

    def close(self) -> None:
        """Let go of the memory; it is unpinned once no other view needs it. May be called again."""
        self.array = None
        self._registration = None


@functools.cache
def kernel_source(file: str) -> str:
    """Return the text of a `.cu` file with its own headers put in place.

    CuPy's disk cache is keyed by the source alone: a header that is found through a path could change unnoticed.
    """
    text = (_HERE / file).read_text(encoding="utf-8")
    for header in sorted(path.name for path in _HERE.glob("*.cuh")):
        line = f'#include "{header}"\n'
        if line in text:
            text = text.replace(line, (_HERE / header).read_text(encoding="utf-8"))
    return text


def compile_options(macros: Sequence[str]) -> tuple[str, ...]:
    """Return the options of NVRTC, without the architecture."""
    return (*OPTIONS, *(f"-D{macro}" for macro in macros))


class _Registration:
    """Pinned host memory, unpinned exactly once, when the last view of it goes."""

    def __init__(self, host: np.ndarray[Any, Any], device_index: int, owned: bool) -> None:
        self.host = host  # the memory must outlive the registration
        self.low, self.high = host.ctypes.data, host.ctypes.data + host.nbytes
        if owned:
            weakref.finalize(self, _unregister, host.ctypes.data, device_index, host)


def _unregister(pointer: int, device_index: int, host: np.ndarray[Any, Any]) -> None:
    del host  # was kept alive until now
    import cupy

    runtime = cupy.cuda.runtime
    try:
        with cupy.cuda.Device(device_index):
            runtime.deviceSynchronize()  # a kernel may still be reading
    except runtime.CUDARuntimeError as error:  # at exit the driver may have gone first
        logger.debug("waiting for the readers of host memory failed: %s", error)
    try:
        runtime.hostUnregister(pointer)  # whichever device is current: it was pinned for all
    except runtime.CUDARuntimeError as error:
        logger.debug("unpinning host memory failed: %s", error)


# One registration for a piece of memory, whoever asks: CUDA refuses a second one, and unpinning is for all.
_registrations: weakref.WeakSet[_Registration] = weakref.WeakSet()
_registrations_lock = threading.Lock()


class CudaRuntime:
    """CUDA device `index` through CuPy.

    Parameters
    ----------
    index : int
        The CUDA ordinal; the device must be usable.

    Examples
    --------
    >>> runtime = CudaRuntime(0)  # doctest: +SKIP
    >>> runtime.zeros(3, np.int64)  # doctest: +SKIP
    array([0, 0, 0])
    """

    def __init__(self, index: int = 0) -> None:
        import cupy

        self.index = index
        self._cupy: Any = cupy
        self._kernels: dict[Kernel, Any] = {}
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def xp(self) -> ModuleType:
        """The module of the arrays."""
        module: ModuleType = self._cupy
        return module

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device current for a block of code, whose CUDA errors become errors of this library.

        Raises
        ------
        DeviceError
            This process was forked from one that uses CUDA, whose calls would hang here.
        """
        if os.getpid() != self._process:
            needs, got = "a process that was not forked after CUDA was used", f"a fork of process {self._process}"
            remedy = 'start processes with multiprocessing.get_context("spawn")'
            raise DeviceError(explain("device", needs, got, remedy))
        return self._current()

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        with cuda_failures(self.index), self._cupy.cuda.Device(self.index):
            yield

    def is_device(self, array: Any) -> bool:
        """Whether kernels may read this array where it lies."""
        return isinstance(array, self._cupy.ndarray)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an uninitialised device array."""
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return a device array of zeros."""
        return self._cupy.zeros(shape, dtype)

    def to_device(self, host: np.ndarray[Any, Any]) -> Any:
        """Return a C-contiguous device array of a host array's values; CuPy copies through pinned memory of its own."""
        return self._cupy.asarray(host, order="C")

    def pinned(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        """Return an uninitialised pinned host array; an ordinary one, with a warning, if no more can be pinned."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        try:
            memory = self._cupy.cuda.alloc_pinned_memory(max(1, count * dtype.itemsize))
        except (MemoryError, self._cupy.cuda.runtime.CUDARuntimeError) as error:
            # Copies of it are right all the same: CUDA takes them through pinned memory of its own.
            logger.warning("no host memory can be pinned for copies (%s): they will be slower", error)
            return np.empty(shape, dtype)
        array: np.ndarray[Any, Any] = np.frombuffer(memory, dtype, count).reshape(shape)
        return array

    def upload(self, host: np.ndarray[Any, Any], device: Any) -> None:
        """Enqueue a copy of a pinned, contiguous host array to a device array of the same bytes."""
        if host.nbytes:
            device.data.copy_from_host_async(host.ctypes.data, host.nbytes)

    def read(self, device: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """Return a contiguous device array's values; waits for the current stream.

        Parameters
        ----------
        device : cupy.ndarray
            What to read.
        out : numpy.ndarray, optional
            A pinned array of the same bytes to use again; a new one if not given.
        """
        host = self.pinned(device.shape, device.dtype) if out is None else out
        self._copy_to_host(device, host)
        self._cupy.cuda.get_current_stream().synchronize()
        return host

    def _copy_to_host(self, device: Any, host: np.ndarray[Any, Any]) -> None:
        if device.nbytes:
            device.data.copy_to_host_async(host.ctypes.data, device.nbytes)

    def download(self, device: Any, host: np.ndarray[Any, Any], event: Any = None) -> Any:
        """Enqueue a copy of a contiguous device array to a pinned one; return the mark at which it is whole."""
        self._copy_to_host(device, host)
        return self.record(event)

    def settle(self, event: Any) -> None:
        """Let the host wait for a mark."""
        event.synchronize()

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        """Enqueue a kernel, compiled now if it never was (CuPy keeps the machine code on disk)."""
        function = self._kernels.get(kernel)
        if function is None:
            function = self._compile(kernel)
        function((grid, layers), (block,), tuple(arguments))

    def _compile(self, kernel: Kernel) -> Any:
        with self._lock:
            key = (kernel.file, kernel.macros)
            module = self._modules.get(key)
            if module is None:
                options = compile_options(kernel.macros)
                module = self._cupy.RawModule(code=kernel_source(kernel.file), options=options, backend="nvrtc")
                self._modules[key] = module
            function = module.get_function(kernel.name)
            self._kernels[kernel] = function
            return function

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Record what `enqueue` launches as a CUDA graph; on a stream of its own, as the default one refuses that."""
        stream = self._cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                enqueue()
            except BaseException:
                # The stream must leave its capture; what it recorded is of no use.
                with contextlib.suppress(Exception):
                    stream.end_capture()
                raise
            return stream.end_capture()

    def replay(self, graph: Any) -> None:
        """Enqueue a recorded graph on the current stream."""
        graph.launch()

    def record(self, event: Any = None) -> Any:
        """Mark this point of the current stream and return the event."""
        if event is None:
            event = self._cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """Let the current stream wait for an event."""
        self._cupy.cuda.get_current_stream().wait_event(event)

    def stream(self) -> int:
        """Return the current stream's pointer; 0 is the default stream."""
        return int(self._cupy.cuda.get_current_stream().ptr)

    def address(self, array: Any) -> int:
        """Return where a device array lies, as kernels of this device see it."""
        return int(array.data.ptr)

    def pinned_view(self, host: np.ndarray[Any, Any]) -> PinnedView:
        """Pin a host array where it is and return it as a CuPy array that kernels read over the bus.

        Parameters
        ----------
        host : numpy.ndarray
            C-contiguous; memory-mapped and read-only ones too where the system can pin them.

        Returns
        -------
        PinnedView
            Memory that somebody else has pinned is used as it is, and left pinned.

        Raises
        ------
        PinningError
            The system cannot pin or map it; the array can still be copied to the device.
        """
        if not host.flags.c_contiguous:
            raise PinningError("a pinned view needs a C-contiguous array, got one with strides; copy it first")
        with self.activate():
            if host.nbytes == 0:
                return PinnedView(self._cupy.empty(host.shape, host.dtype), None)
            try:
                return self._pin(host)
            except self._cupy.cuda.runtime.CUDARuntimeError as error:
                raise self._unpinnable(host, error) from error

    def _pin(self, host: np.ndarray[Any, Any]) -> PinnedView:
        with _registrations_lock:
            low, high = host.ctypes.data, host.ctypes.data + host.nbytes
            registration = next((r for r in _registrations if r.low <= low and high <= r.high), None)
            if registration is None:
                registration = _Registration(host, self.index, self._register(host))
                _registrations.add(registration)
        memory = self._cupy.cuda.UnownedMemory(self._mapped(host), host.nbytes, registration, self.index)
        pointer = self._cupy.cuda.MemoryPointer(memory, 0)
        return PinnedView(self._cupy.ndarray(host.shape, host.dtype, pointer), registration)

    def _unpinnable(self, host: np.ndarray[Any, Any], error: Exception) -> PinningError:
        return PinningError(
            f"{host.nbytes} bytes of host memory cannot be pinned for cuda:{self.index} ({error}); "
            "raise the limit on locked memory (ulimit -l), or let the data be copied to the device"
        )

    def _register(self, host: np.ndarray[Any, Any]) -> bool:
        """Pin an array, unless it is; return whether it was us who did."""
        runtime = self._cupy.cuda.runtime
        if self._is_pinned(host):
            return False
        flags = [_MAPPED_PORTABLE] if host.flags.writeable else [_MAPPED_PORTABLE | _READ_ONLY, _MAPPED_PORTABLE]
        for flag in flags:
            try:
                runtime.hostRegister(host.ctypes.data, host.nbytes, flag)
                return True
            except runtime.CUDARuntimeError as error:
                if error.status == _ALREADY_REGISTERED:
                    raise PinningError(
                        f"{host.nbytes} bytes of host memory are pinned in part, by somebody else; copy the array first"
                    ) from error
                failure = error
        raise self._unpinnable(host, failure) from failure

    def _is_pinned(self, host: np.ndarray[Any, Any]) -> bool:
        runtime = self._cupy.cuda.runtime
        ends = (host.ctypes.data, host.ctypes.data + host.nbytes - 1)
        return all(runtime.pointerGetAttributes(end).type == runtime.memoryTypeHost for end in ends)

    def _mapped(self, host: np.ndarray[Any, Any]) -> int:
        """Return the device's address of pinned memory."""
        runtime = self._cupy.cuda.runtime
        if runtime.deviceGetAttribute(runtime.cudaDevAttrCanUseHostPointerForRegisteredMem, self.index):
            return int(host.ctypes.data)
        return int(runtime.pointerGetAttributes(host.ctypes.data).devicePointer)
