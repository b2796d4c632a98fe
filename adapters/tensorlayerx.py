"""TensorLayerX: arrays out as tensors of its active backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import tensorlayerx

from gglspeedup.errors import MissingPackageError, explain

_BACKENDS = ("tensorflow", "torch", "paddle")


def to_framework(array: Any) -> Any:
    """Return a tensor of the active backend, on the same device, that shares the memory of an array.

    Raises
    ------
    MissingPackageError
        TensorLayerX runs on a backend that takes no DLPack.
    """
    backend = tensorlayerx.BACKEND
    if backend not in _BACKENDS:
        needs = f"one of the backends {', '.join(_BACKENDS)}"
        raise MissingPackageError(explain("TL_BACKEND", needs, repr(backend), "set it before importing tensorlayerx"))
    return import_module(f"gglspeedup.adapters.{backend}").to_framework(array)
