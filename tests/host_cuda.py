"""A runtime that runs the `.cu` files on the host: g++, a header that makes threads fibres, and NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from conftest import missing

from gglspeedup.device import cuda_problem
from gglspeedup.kernels.cuda import CudaRuntime, Kernel, PinnedView, PinningError, kernel_source

_HERE = Path(__file__).parent
_GUARD = 64  # bytes on either side of a device array that no kernel may touch
_FILL = 0xA5
ORDERS = {"forwards": 0, "backwards": 1, "random": 2}
WATCHED = {"shuffled": 3, "races": 4}  # also see what kernels touch; see fibres_on_host.hpp, watch_on_host.hpp
RUNTIMES = ["host"] if cuda_problem() else ["host", "cuda"]


class DeviceArray(np.ndarray):  # type: ignore[type-arg]
    """An array in what stands for device memory; views of it are such arrays too."""

    guarded: tuple[Any, int, int] | None = None

    def __array_finalize__(self, parent: Any) -> None:
        self.guarded = getattr(parent, "guarded", None)


def _shared(declaration: re.Match[str]) -> str:
    """Return a declaration of __shared__ arrays as references to memory of the block that runs."""
    kind, names = declaration.groups()
    cells = [re.fullmatch(r"(\w+)(.+)", name.strip()) for name in names.split(",")]
    return " ".join(
        f"{kind} (&{cell[1]}){cell[2]} = *({kind} (*){cell[2]})host::shared(__COUNTER__, sizeof({kind}{cell[2]}));"
        for cell in cells if cell
    )  # fmt: skip


def host_source(file: str, tiles: dict[str, int]) -> str:
    """Return a `.cu` file as the host compiles it, line by line the same; `tiles` replaces what it defines."""
    source = kernel_source(file)
    for name, value in tiles.items():
        source, replaced = re.subn(rf"#define {name} \d+", f"#define {name} {value}", source)
        assert replaced == 1, name
    return re.sub(r"__shared__ ((?:unsigned )?\w+) ([^;]+);", _shared, source)


def _compile(kernel: Kernel, folder: Path, watched: bool, tiles: dict[str, int]) -> ctypes.CDLL:
    source = host_source(kernel.file, tiles if kernel.file == "sample.cu" else {})
    names = re.findall(r"__global__ void ([a-z]\w*)\(", source)
    for width in re.findall(r"^ROW_KERNELS\((\d+),", source, re.MULTILINE):
        names += [f"gather_rows_{width}", f"scatter_rows_{width}"]
    launchers = "\n".join(
        f'extern "C" const char *launch_{name}(unsigned grid, unsigned layers, unsigned block, void **arguments, '
        "const int *sizes, int count, int how, unsigned long long seed, int broken) "
        f"{{ return host::launch({name}, grid, layers, block, arguments, sizes, count, how, seed, broken); }}"
        for name in names
    )
    kind = [*kernel.macros, *(["watched"] if watched else []), *map(str, tiles.values())]
    stem = "_".join([kernel.file.replace(".", "_"), *kind]).lower()
    unit, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
    if not library.exists():
        unit.write_text(f'#include "cuda_on_host.hpp"\n#line 1\n{source}\n{launchers}\n', encoding="utf-8")
        options = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        options += ["-Wno-unused-variable", *(f"-D{macro}" for macro in kernel.macros), f"-I{_HERE}"]
        # Not linked with that option: what it calls is in watch_on_host.hpp.
        made = [*(["-fsanitize=thread"] if watched else []), "-c", "-o", f"{library}.o", str(unit)]
        for command in (["g++", *options, *made], ["g++", "-shared", "-o", f"{library}.new", f"{library}.o"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        os.replace(f"{library}.new", library)
    return ctypes.CDLL(str(library))


class Mark:
    """A point of the stream; `host` gets what a copy to it has brought once somebody waits."""

    arriving: Any = None
    host: Any = None


class HostRuntime:
    """Stands in for `CudaRuntime`.

    Device memory is filled with rubbish and has guards on both sides; kernels refuse arrays that are not device
    memory and scalars that have no NumPy type; `reads` counts the host's waits.

    Parameters
    ----------
    folder : Path
        Where compiled kernels are kept for the session.
    order : {"forwards", "backwards", "random", "shuffled", "races"}
        In which order blocks and lanes run; "races" also refuses what is a race in any order.
    tiles : dict, optional
        What sample.cu defines otherwise, such as smaller tiles.

    Attributes
    ----------
    seed : int
        Of the order of the next launches.
    broken_line : int
        Where kernels lack a barrier, or that an operation is atomic; 0 for nowhere.
    """

    index = 0

    def __init__(self, folder: Path, order: str = "forwards", tiles: dict[str, int] | None = None) -> None:
        if shutil.which("g++") is None:
            missing("g++, which compiles the CUDA kernels for the host,")
        self.order = order
        self.reads = 0
        self.launches: list[str] = []
        self.pinned_addresses: dict[int, int] = {}
        self.refuse_pinning = False
        self._folder = folder
        self._libraries: dict[tuple[str, tuple[str, ...]], ctypes.CDLL] = {}
        self._guards: dict[int, tuple[Any, int]] = {}
        self._recording = threading.local()
        self._lock = threading.RLock()  # one launch at a time: threadIdx and its kin are globals on the host
        self.seed = 0
        self.broken_line = 0
        self._tiles = tiles or {}

    @property
    def xp(self) -> ModuleType:
        return np

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def is_device(self, array: Any) -> bool:
        return isinstance(array, DeviceArray)

    def empty(self, shape: Any, dtype: Any) -> Any:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        buffer = np.full(size + 2 * _GUARD + 16, _FILL, np.uint8)
        low = -buffer.ctypes.data % 16 + _GUARD
        array = buffer[low : low + size].view(dtype).reshape(shape).view(DeviceArray)
        array.guarded = (buffer, low, low + size)
        return array

    def zeros(self, shape: Any, dtype: Any) -> Any:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def to_device(self, host: Any) -> Any:
        """Return a device array of a host array's values."""
        host = np.asarray(host)
        array = self.empty(host.shape, host.dtype)
        array[...] = host
        return array

    def pinned(self, shape: Any, dtype: Any) -> np.ndarray[Any, Any]:
        return np.empty(shape, dtype)

    def upload(self, host: np.ndarray[Any, Any], device: Any) -> None:
        assert not self.is_device(host) and self.is_device(device)
        assert host.nbytes == device.nbytes
        device[...] = host

    def read(self, device: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        assert self.is_device(device) and self._recorded() is None
        self.reads += 1
        if out is None:
            return np.array(device)
        assert out.nbytes == device.nbytes
        out[...] = device
        return out

    def download(self, device: Any, host: np.ndarray[Any, Any], event: Any = None) -> Any:
        assert self.is_device(device) and self._recorded() is None and device.nbytes == host.nbytes
        event = event or Mark()
        event.arriving, event.host = np.array(device), host
        host[...] = -7  # what is read before it has arrived
        return event

    def settle(self, event: Any) -> None:
        self.reads += 1
        if event.host is not None:
            event.host[...] = event.arriving
            event.host = None

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        recorded = self._recorded()
        if recorded is not None:
            recorded.append((kernel, grid, block, tuple(arguments), layers))
            return
        with self._lock:
            self._launch(kernel, grid, block, arguments, layers)

    def _recorded(self) -> list[Any] | None:
        return getattr(self._recording, "launches", None)

    def _launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        key = (kernel.file, kernel.macros)
        library = self._libraries.get(key)
        if library is None:
            library = self._libraries[key] = _compile(kernel, self._folder, self.order in WATCHED, self._tiles)
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                assert self.is_device(argument) and argument.flags.c_contiguous, f"{kernel.name}: {type(argument)}"
                values.append(np.uint64(argument.ctypes.data))
            else:
                assert isinstance(argument, np.generic), f"{kernel.name}: {argument!r} has no NumPy type"
                values.append(argument)
        cells = [np.array(value) for value in values]
        pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        sizes = (ctypes.c_int * len(cells))(*(cell.itemsize for cell in cells))
        function = getattr(library, f"launch_{kernel.name}")
        function.restype = ctypes.c_char_p
        self.seed += 1
        problem = function(
            ctypes.c_uint(grid), ctypes.c_uint(layers), ctypes.c_uint(block), pointers, sizes, ctypes.c_int(len(cells)),
            ctypes.c_int({**ORDERS, **WATCHED}[self.order]),
            ctypes.c_ulonglong(0x9E3779B97F4A7C15 * self.seed % (1 << 64)), ctypes.c_int(self.broken_line),
        )  # fmt: skip
        self.launches.append(kernel.name)
        assert problem is None, f"{kernel.name}: {problem.decode()}"
        for argument in arguments:
            self._check_guards(kernel.name, argument)

    def _check_guards(self, name: str, argument: Any) -> None:
        guarded = getattr(argument, "guarded", None)
        if guarded is not None:
            buffer, low, high = guarded
            clean = (buffer[:low] == _FILL).all() and (buffer[high:] == _FILL).all()
            assert clean, f"{name} wrote outside an array"

    def capture(self, enqueue: Callable[[], None]) -> Any:
        self._recording.launches = []
        try:
            enqueue()
            return self._recording.launches
        finally:
            del self._recording.launches

    def replay(self, graph: Any) -> None:
        for launch in graph:
            self.launch(*launch)

    def record(self, event: Any = None) -> Any:
        return event or Mark()

    def wait(self, event: Any) -> None:
        assert event is not None

    def stream(self) -> int:
        return 0

    def address(self, array: Any) -> int:
        assert self.is_device(array)
        return int(array.ctypes.data)

    def pinned_view(self, host: np.ndarray[Any, Any]) -> PinnedView:
        if self.refuse_pinning:
            raise PinningError("pinning is refused")
        return PinnedView(host.view(DeviceArray), None)


class CountingRuntime(CudaRuntime):
    """The GPU, where there is one, with the same counters."""

    def __init__(self) -> None:
        super().__init__(0)
        self.reads = 0
        self.launches: list[str] = []

    def read(self, device: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        self.reads += 1
        return super().read(device, out)

    def settle(self, event: Any) -> None:
        self.reads += 1
        super().settle(event)

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        self.launches.append(kernel.name)
        super().launch(kernel, grid, block, arguments, layers)


def to_host(array: Any) -> Any:
    """Return a device array's values."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
