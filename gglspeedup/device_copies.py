"""Copies of whole batches to a GPU, whatever framework their tensors are of, on a stream of their own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from gglspeedup.errors import DeviceError, explain
from gglspeedup.interchange import as_array, framework_of, integer_view, is_numeric, on_cuda
from gglspeedup.side_stream import SideStream

Change = Callable[[Any], Any]


class Copied(NamedTuple):
    """A batch whose copies are on their way, and what stands for each of its tensors."""

    batch: Any
    tensors: list[Any]  # which their numbers in `arrays` need to stay alive
    arrays: dict[int, Any]
    whole: Any


class DeviceCopies:
    """Copies of the tensors in batches, to one GPU.

    Parameters
    ----------
    index : int
        The CUDA ordinal.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self._cupy: Any = cupy
        self.index = index
        self._side = SideStream(index)

    def start(self, batch: Any) -> Copied:
        """Enqueue the copies of a batch's tensors; in any thread, and one at a time.

        Raises
        ------
        ArgumentTypeError
            A tensor is sparse, or otherwise none that shares its memory.
        """
        tensors: list[Any] = []

        def collect(tensor: Any) -> Any:
            tensors.append(tensor)
            return tensor

        changed(batch, collect)
        with self._side.filling():
            arrays = {id(tensor): self._copy(as_array(tensor, "batch")) for tensor in tensors}
            return Copied(batch, tensors, arrays, self._side.record())

    def finish(self, copied: Copied) -> Any:
        """Return the batch with tensors of the device, for the streams that are current in this thread; none waits.

        Raises
        ------
        DeviceError
            A tensor is of a framework whose installation cannot use the device.
        """
        adapters = {name: self._adapter(name) for name in {framework_of(tensor) or "" for tensor in copied.tensors}}
        readers = {adapter.current_stream() for adapter in adapters.values()}
        self._side.hand_over(copied.whole, readers.pop() if len(readers) == 1 else None)

        def take(tensor: Any) -> Any:
            return adapters[framework_of(tensor) or ""].to_framework(copied.arrays[id(tensor)])

        return changed(copied.batch, take)

    def _copy(self, host: Any) -> Any:
        integers, narrow = integer_view(host)
        # CuPy copies through pinned memory of its own, so that the host's array may go at once.
        array = self._cupy.asarray(integers, order="C")
        return array if narrow is None else array.view(host.dtype)

    def _adapter(self, framework: str) -> Any:
        adapter = import_module("gglspeedup.adapters").backend("cupy" if framework == "numpy" else framework)
        if adapter.sees_cuda(self.index):
            return adapter
        needs, remedy = f"a device that the installed {framework} can use", f"install {framework} for CUDA"
        raise DeviceError(explain("device", needs, f"cuda:{self.index}", f'{remedy}, or pass device="cpu"'))


def changed(batch: Any, change: Change) -> Any:
    """Return a batch with something else for each of its tensors that are in host memory.

    Looked into are dicts, lists, tuples, dataclasses, and objects with an ``apply`` as PyG's Data has it; the batch
    itself stays as it is.

    Examples
    --------
    >>> import numpy as np
    >>> changed({"x": np.arange(3), "sizes": [(3, 2)]}, len)
    {'x': 3, 'sizes': [(3, 2)]}
    """
    if framework_of(batch) is not None:
        return change(batch) if _movable(batch) else batch
    if isinstance(batch, dict):
        made = copy.copy(batch)  # of the same class, with its default factory or order
        made.update({key: changed(value, change) for key, value in batch.items()})
        return made
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(changed(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(changed(value, change) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        same: Any = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(same, field.name, changed(getattr(batch, field.name), change))
        return same
    if callable(getattr(batch, "apply", None)) and not isinstance(batch, type):
        return copy.copy(batch).apply(lambda value: changed(value, change))
    return batch


def _movable(tensor: Any) -> bool:
    """Return whether a tensor has numbers, in host memory."""
    if framework_of(tensor) == "numpy":
        return is_numeric(tensor.dtype)
    return not on_cuda(tensor)
