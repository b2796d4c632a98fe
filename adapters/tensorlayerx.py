"""TensorLayerX: arrays out and in as tensors of its active backend."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import tensorlayerx

from gglspeedup.adapters import backend
from gglspeedup.errors import MissingPackageError, explain

_BACKENDS = ("tensorflow", "torch", "paddle")


def _active() -> ModuleType:
    name = tensorlayerx.BACKEND
    if name not in _BACKENDS:
        needs = f"one of the backends {', '.join(_BACKENDS)}"
        raise MissingPackageError(explain("TL_BACKEND", needs, repr(name), "set it before importing tensorlayerx"))
    return backend(name)


def to_framework(array: Any) -> Any:
    """Return a tensor of the active backend, on the same device, that shares the memory of an array.

    Raises
    ------
    MissingPackageError
        TensorLayerX runs on a backend that takes no DLPack.
    ArgumentTypeError
        It is no NumPy or CuPy array, or of a dtype that the backend does not have.
    """
    return _active().to_framework(array)


def from_framework(tensor: Any) -> Any:
    """Return a NumPy array, or on a GPU a CuPy array, that shares the memory of a tensor of the active backend.

    Raises
    ------
    MissingPackageError
        TensorLayerX runs on a backend that takes no DLPack.
    ArgumentTypeError
        It is no tensor of the active backend.
    """
    return _active().from_framework(tensor)


def current_stream() -> int | None:
    """Return the pointer of the active backend's current CUDA stream in this thread, None if it does not tell."""
    return _active().current_stream()


def sees_cuda(index: int) -> bool:
    """Return whether the active backend can use a CUDA device."""
    return _active().sees_cuda(index)


def bytes_in_use(index: int) -> int:
    """Return the bytes that the active backend's allocator has handed out on a CUDA device."""
    return int(_active().bytes_in_use(index))


def peak_bytes(index: int) -> int:
    """Return the most bytes that the active backend's allocator had handed out since :func:`restart_peak`."""
    return int(_active().peak_bytes(index))


def restart_peak(index: int) -> None:
    """Let the peak of a CUDA device be what is in use now."""
    _active().restart_peak(index)
