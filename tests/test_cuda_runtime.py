"""CudaRuntime against a CuPy that is made up: what it calls, in which order, and what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import missing
from host_cuda import HostRuntime

from gglspeedup.kernels import cuda
from gglspeedup.kernels.cuda import CudaRuntime, Kernel, PinningError, Runtime

USED = [
    "RawModule", "RawModule.get_function", "ndarray", "empty", "zeros", "asarray", "cuda.Device",
    "cuda.alloc_pinned_memory", "cuda.MemoryPointer", "cuda.MemoryPointer.copy_from_host_async",
    "cuda.MemoryPointer.copy_to_host_async", "cuda.UnownedMemory", "cuda.get_current_stream", "cuda.Stream",
    "cuda.Stream.begin_capture", "cuda.Stream.end_capture", "cuda.Stream.synchronize", "cuda.Stream.wait_event",
    "cuda.Graph.launch", "cuda.Event", "cuda.Event.record", "cuda.runtime.hostRegister",
    "cuda.runtime.hostUnregister", "cuda.runtime.CUDARuntimeError", "cuda.runtime.pointerGetAttributes",
    "cuda.runtime.PointerAttributes.type", "cuda.runtime.memoryTypeHost",
    "cuda.runtime.PointerAttributes.devicePointer", "cuda.runtime.deviceSynchronize",
    "cuda.runtime.deviceGetAttribute", "cuda.runtime.cudaDevAttrCanUseHostPointerForRegisteredMem",
]  # fmt: skip


def test_cupy_has_what_is_used():
    try:
        import cupy
    except ImportError:
        missing("CuPy")
    for name in USED:
        where = cupy
        for part in name.split("."):
            assert hasattr(where, part), name
            where = getattr(where, part)


def test_both_runtimes_have_the_same_methods():
    names = [name for name in vars(Runtime) if not name.startswith("_")]
    assert len(names) >= 12
    for name in names:
        assert hasattr(CudaRuntime, name) and hasattr(HostRuntime, name), name
        if inspect.isfunction(getattr(CudaRuntime, name)):
            theirs = [list(inspect.signature(getattr(kind, name)).parameters) for kind in (Runtime, CudaRuntime)]
            assert theirs[0] == theirs[1] == list(inspect.signature(getattr(HostRuntime, name)).parameters), name


def test_importing_needs_no_cupy():
    code = (
        "import sys; sys.modules['cupy'] = None; import gglspeedup.sampler_gpu, gglspeedup.kernels.gather_gpu as g; "
        "from gglspeedup.kernels.cuda import CudaRuntime\ntry: CudaRuntime(0)\nexcept ImportError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr


class CudaError(RuntimeError):
    """CUDARuntimeError as CuPy has it."""

    def __init__(self, status):
        super().__init__(f"error {status}")
        self.status = status


class Stream:
    def __init__(self, log, name="current"):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"enter {self.name}")

    def __exit__(self, *_):
        self.log.append(f"leave {self.name}")

    def begin_capture(self):
        self.log.append("begin")

    def end_capture(self):
        self.log.append("end")
        return SimpleNamespace(launch=lambda: self.log.append("replay"))

    def synchronize(self):
        self.log.append("synchronize")

    def wait_event(self, event):
        self.log.append(f"wait {event.name}")


@pytest.fixture
def fake(monkeypatch):
    """A CuPy that logs; `registered` is what the driver has pinned."""
    log: list[str] = []
    state = SimpleNamespace(log=log, registered={}, status=0)

    def register(pointer, size, flags):
        if state.status:
            raise CudaError(state.status)
        if any(low < pointer + size and pointer < low + held for low, (held, _) in state.registered.items()):
            raise CudaError(712)
        state.registered[pointer] = (size, flags)

    def attributes(pointer):
        held = any(low <= pointer < low + size for low, (size, _) in state.registered.items())
        return SimpleNamespace(type=int(held), devicePointer=pointer)

    runtime = SimpleNamespace(
        CUDARuntimeError=CudaError, hostRegister=register, hostUnregister=state.registered.pop,
        pointerGetAttributes=attributes, memoryTypeHost=1, deviceSynchronize=lambda: log.append("device"),
        deviceGetAttribute=lambda attribute, index: 1, cudaDevAttrCanUseHostPointerForRegisteredMem=91,
    )  # fmt: skip
    kernels = lambda name: lambda grid, block, args: log.append((name, grid, block, args))  # noqa: E731
    fields = {
        "ndarray": lambda shape, dtype, pointer: SimpleNamespace(shape=shape, dtype=dtype, pointer=pointer),
        "empty": lambda shape, dtype: np.empty(shape, dtype), "asarray": lambda host, order: (host, order),
        "RawModule": lambda **options: log.append(options) or SimpleNamespace(get_function=kernels),
        "cuda": SimpleNamespace(
            runtime=runtime, Device=lambda index: contextlib.nullcontext(),
            Stream=lambda non_blocking: Stream(log, "own"), get_current_stream=lambda: Stream(log),
            UnownedMemory=lambda *args: args, MemoryPointer=lambda memory, offset: memory,
            alloc_pinned_memory=bytearray,
        ),
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(**fields))
    monkeypatch.setattr(cuda, "_registrations", type(cuda._registrations)())
    return state


def test_kernels_are_compiled_once(fake):
    runtime = CudaRuntime(0)
    for name in ("draw_8", "draw_8", "draw_16"):
        runtime.launch(Kernel("sample.cu", name, ("INDEX64",)), 3, 64, [1, 2])
    runtime.launch(Kernel("sample.cu", "draw_8"), 1, 32, [])
    modules = [entry for entry in fake.log if isinstance(entry, dict)]
    assert [module["options"] for module in modules] == [("-std=c++17", "-DINDEX64"), ("-std=c++17",)]
    assert modules[0]["code"] == cuda.kernel_source("sample.cu") and modules[0]["backend"] == "nvrtc"
    launches = [entry for entry in fake.log if isinstance(entry, tuple)]
    assert launches[1:3] == [("draw_8", (3, 1), (64,), (1, 2)), ("draw_16", (3, 1), (64,), (1, 2))]


def test_forks_are_refused(fake, monkeypatch):
    runtime = cuda.CudaRuntime(0)
    with runtime.activate():
        pass
    monkeypatch.setattr(cuda.os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="device needs a process that was not forked after CUDA was used"):
        runtime.activate()


def test_capture(fake):
    runtime = CudaRuntime(0)
    graph = runtime.capture(lambda: fake.log.append("work"))
    runtime.replay(graph)
    assert fake.log == ["enter own", "begin", "work", "end", "leave own", "replay"]
    fake.log.clear()

    def fails():
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        runtime.capture(fails)
    assert fake.log == ["enter own", "begin", "end", "leave own"]


def test_copies(fake):
    runtime = CudaRuntime(0)
    host = runtime.pinned((2, 3), np.int64)
    assert host.shape == (2, 3) and host.flags.writeable and runtime.pinned(0, np.int64).shape == (0,)
    copies = []
    data = SimpleNamespace(
        copy_from_host_async=lambda *args: copies.append(("from", *args)),
        copy_to_host_async=lambda *args: copies.append(("to", *args)),
    )
    device = SimpleNamespace(data=data, nbytes=48, shape=(2, 3), dtype=np.dtype(np.int64))
    runtime.upload(host, device)
    assert copies == [("from", host.ctypes.data, 48)] and not fake.log
    assert runtime.read(device, host) is host
    assert copies[1:] == [("to", host.ctypes.data, 48)] and fake.log == ["synchronize"]
    assert runtime.read(device).shape == (2, 3)
    assert runtime.to_device(host) == (host, "C")
    runtime.wait(SimpleNamespace(name="mark"))
    assert fake.log[-1] == "wait mark"


def test_memory_is_pinned_once_and_unpinned_once(fake):
    runtime = CudaRuntime(0)
    x = np.arange(100.0).reshape(10, 10)
    first, second = runtime.pinned_view(x), runtime.pinned_view(x)
    assert fake.registered == {x.ctypes.data: (800, 3)}
    assert first.array.shape == (10, 10) and first.array.pointer[:2] == (x.ctypes.data, 800)
    array = second.array
    first.close()
    second.close()
    second.close()
    gc.collect()
    assert fake.registered  # an array made of it is still there
    part = runtime.pinned_view(x[4:6])
    assert part.array.pointer[0] == x[4:].ctypes.data
    del array
    gc.collect()
    assert len(fake.registered) == 1  # a part needs the whole
    part.close()
    gc.collect()
    assert not fake.registered and fake.log == ["device"]
    view = runtime.pinned_view(x)
    assert fake.registered
    view.close()
    gc.collect()
    assert not fake.registered


def test_memory_that_somebody_else_pinned_stays_pinned(fake):
    x = np.arange(100.0)
    fake.registered[x.ctypes.data - 8] = (4096, 1)
    view = CudaRuntime(0).pinned_view(x)
    assert view.array.shape == (100,)
    view.close()
    gc.collect()
    assert fake.registered == {x.ctypes.data - 8: (4096, 1)}
    fake.registered[x.ctypes.data - 8] = (100, 1)  # theirs ends before the array does
    with pytest.raises(PinningError, match="in part"):
        CudaRuntime(0).pinned_view(x)


def test_what_cannot_be_pinned(fake):
    runtime = CudaRuntime(0)
    x = np.arange(100.0).reshape(10, 10)
    with pytest.raises(PinningError, match="C-contiguous"):
        runtime.pinned_view(x.T)
    fake.status = 2
    with pytest.raises(PinningError, match="cannot be pinned for cuda:0"):
        runtime.pinned_view(x)
    gc.collect()
    assert not fake.registered
    assert runtime.pinned_view(x[:0]).array.shape == (0, 10)


def test_read_only_memory_is_pinned_read_only(fake):
    x = np.arange(10.0)
    x.flags.writeable = False
    view = CudaRuntime(0).pinned_view(x)
    assert fake.registered[x.ctypes.data] == (80, 3 | 8)
    view.close()
