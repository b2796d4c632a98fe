"""What the stricter DLPack consumers take: contiguous, writeable, on a 64-byte boundary."""

from __future__ import annotations

from typing import Any

import numpy as np

from gglspeedup.memory import ALIGNMENT, aligned_empty


def consumable(array: Any) -> Any:
    """Return the array, or a copy of a NumPy array that a strict consumer could not take as it is."""
    if not isinstance(array, np.ndarray):
        return array  # CuPy aligns its memory, and its copies belong to its streams
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
