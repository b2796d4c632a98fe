"""JAX: arrays out, over DLPack."""

from __future__ import annotations

from typing import Any

import jax

from gglspeedup.adapters.alignment import consumable
from gglspeedup.errors import ArgumentTypeError, explain


def to_framework(array: Any) -> jax.Array:
    """Return an array on the same device that shares the memory of a NumPy or CuPy array.

    Raises
    ------
    ArgumentTypeError
        It has 64-bit elements and JAX runs without ``jax_enable_x64``, where these do not exist.
    """
    if array.dtype.itemsize == 8 and array.dtype.kind in "iuf" and not jax.config.jax_enable_x64:
        remedy = 'call jax.config.update("jax_enable_x64", True) before the first JAX array is made'
        raise ArgumentTypeError(explain("array", "JAX with 64-bit types", f"{array.dtype} without them", remedy))
    return jax.dlpack.from_dlpack(consumable(array))
