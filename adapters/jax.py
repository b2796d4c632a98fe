"""JAX: arrays out, over DLPack."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from gglspeedup.adapters.alignment import consumable
from gglspeedup.errors import ArgumentValueError, explain

_INT32 = np.iinfo(np.int32)


def to_framework(array: Any) -> jax.Array:
    """Return an array on the same device that shares the memory of a NumPy or CuPy array.

    Without ``jax_enable_x64`` JAX has no 64-bit types: there the result is a copy with 32-bit elements.

    Raises
    ------
    ArgumentValueError
        The elements would not fit into 32 bits.
    """
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8 and not jax.config.jax_enable_x64 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < _INT32.min or high > _INT32.max:
            remedy = 'call jax.config.update("jax_enable_x64", True) before the first JAX array is made'
            raise ArgumentValueError(explain("array", "values that fit int32", f"{low} to {high}", remedy))
    return jax.dlpack.from_dlpack(consumable(array))
