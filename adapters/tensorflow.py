"""TensorFlow: arrays out, over DLPack."""

from __future__ import annotations

from typing import Any

import tensorflow

from gglspeedup.adapters.alignment import consumable


def to_framework(array: Any) -> Any:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array.

    An array that TensorFlow cannot take as it is (strided, read-only, or not on a 64-byte boundary, on which
    TensorFlow ends the process) is copied first.
    """
    return tensorflow.experimental.dlpack.from_dlpack(consumable(array).__dlpack__())
