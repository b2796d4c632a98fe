"""A device that does nothing but note what it is told: what the GPU's code launches, copies and waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from gglspeedup.kernels.cuda import Kernel, PinnedView


class Launch(NamedTuple):
    """A kernel as it was launched; `recorded` if it is a node of a CUDA graph."""

    kernel: str
    blocks: int
    threads: int
    recorded: bool
    layers: int = 1


class Recorder:
    """Stands in for `kernels.cuda.CudaRuntime`: arrays are NumPy's, kernels are not run.

    Attributes
    ----------
    launches : list of Launch
        Kernels, in order.
    calls : list of str
        What the host asked of the device: "launch", "graph", "upload", "download", "settle", "read", "empty", "event".
    answers : list of array
        What the next reads return, by bytes; zeros when there is none.
    """

    index = 0

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self._recording: list[Launch] | None = None
        self.forget()

    def forget(self) -> None:
        """Start the lists anew."""
        self.launches: list[Launch] = []
        self.calls: list[str] = []

    @property
    def xp(self) -> ModuleType:
        """The module of the arrays."""
        return np

    def activate(self) -> contextlib.AbstractContextManager[Any]:
        """Do nothing."""
        return contextlib.nullcontext()

    def is_device(self, array: Any) -> bool:
        """Whether this is one of our arrays: seeds and rows are given as lists or plain arrays of the host."""
        return isinstance(array, _Array)

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return an array, whose pages are never touched."""
        self.calls.append("empty")
        return np.empty(shape, dtype).view(_Array)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        """Return an array of zeros."""
        return np.zeros(shape, dtype).view(_Array)

    def to_device(self, host: Any) -> Any:
        """Return the same memory."""
        self.calls.append("upload")
        return np.asarray(host).view(_Array)

    def pinned(self, shape: Any, dtype: Any) -> Any:
        """Return an array of the host."""
        return np.empty(shape, dtype)

    def upload(self, host: Any, device: Any) -> None:
        """Note a copy."""
        self.calls.append("upload")

    def read(self, device: Any, out: Any = None) -> Any:
        """Return the next of the answers."""
        self.calls.append("read")
        found = self.answers.pop(0) if self.answers else np.zeros(device.shape, device.dtype)
        if out is None:
            return found
        out[...] = found
        return out

    def download(self, device: Any, host: Any, event: Any = None) -> Any:
        """Note a copy; it gives the next of the answers."""
        self.calls.append("download")
        host[...] = self.answers.pop(0) if self.answers else 0
        return event or object()

    def settle(self, event: Any) -> None:
        """Note a wait of the host."""
        self.calls.append("settle")

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        """Note a kernel."""
        if self._recording is not None:
            self._recording.append(Launch(kernel.name, grid, block, True, layers))
            return
        self.calls.append("launch")
        self.launches.append(Launch(kernel.name, grid, block, False, layers))

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Return the launches of a function."""
        self._recording = []
        enqueue()
        recorded, self._recording = self._recording, None
        return recorded

    def replay(self, graph: Any) -> None:
        """Note the launches of a graph."""
        self.calls.append("graph")
        self.launches += graph

    def record(self, event: Any = None) -> Any:
        """Note an event."""
        self.calls.append("event")
        return event or object()

    def wait(self, event: Any) -> None:
        """Note that work waits for an event."""
        self.calls.append("event")

    def stream(self) -> int:
        """Return the default stream."""
        return 0

    def address(self, array: Any) -> int:
        """Return where an array lies."""
        return int(array.ctypes.data)

    def pinned_view(self, host: Any) -> PinnedView:
        """Return the same memory."""
        return PinnedView(np.asarray(host).view(_Array), None)


class _Array(np.ndarray):  # type: ignore[type-arg]
    """What counts as an array of the device."""
