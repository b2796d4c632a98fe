"""JAX: arrays out and in, over DLPack."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gglspeedup.adapters.alignment import check_array, consumable
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.interchange import array_of
from gglspeedup.memory import aligned_empty

# What JAX has in place of 64-bit types unless it is told otherwise, by kind and size.
_HALVES = {"i8": np.int32, "u8": np.uint32, "f8": np.float32, "c16": np.complex64}


def to_framework(array: Any) -> jax.Array:
    """Return an array on the same device that shares the memory of a NumPy or CuPy array.

    An array that JAX cannot take as it is (strided, read-only, or not on a 64-byte boundary) is copied first. Without
    ``jax_enable_x64`` JAX has no 64-bit types: there the result is a copy with elements of half the width.

    Raises
    ------
    ArgumentValueError
        Whole numbers would not fit into 32 bits.
    ArgumentTypeError
        It is no NumPy or CuPy array, or of a dtype that JAX does not have.
    """
    check_array(array)
    if not jax.config.jax_enable_x64 and array.dtype.str[1:] in _HALVES:
        array = _halved(array)
    carried, narrow = consumable(array)
    if not isinstance(carried, np.ndarray):
        return jax.dlpack.from_dlpack(carried if narrow is None else carried.view(array.dtype))
    if narrow is not None:  # NumPy's DLPack does not carry it; JAX takes host memory without a copy in this way, too
        return jax.device_put(carried.view(array.dtype), _host(), may_alias=True)
    take = _quick_import()
    return jax.dlpack.from_dlpack(carried) if take is None else take(carried.__dlpack__(), _host())


def _halved(array: Any) -> Any:
    """Return a copy with elements of half the width."""
    dtype = np.dtype(_HALVES[array.dtype.str[1:]])
    if dtype.kind in "iu" and array.size:
        _check_fit(array, dtype)
    if not isinstance(array, np.ndarray):
        return array.astype(dtype)
    copy = aligned_empty(array.size * dtype.itemsize).view(dtype).reshape(array.shape)
    with np.errstate(over="ignore"):  # large values become infinite, as JAX converts them
        copy[...] = array
    return copy


def _check_fit(array: Any, dtype: np.dtype[Any]) -> None:
    bounds = np.iinfo(dtype)
    if array.dtype.isnative and int(array.view(np.uint64).max()) <= bounds.max:
        return  # one pass does for ids, which are not negative: as unsigned numbers those would be the largest
    low, high = int(array.min()), int(array.max())
    if low < bounds.min or high > bounds.max:
        remedy = 'call jax.config.update("jax_enable_x64", True) before the first JAX array is made'
        raise ArgumentValueError(explain("array", f"values that fit {dtype}", f"{low} to {high}", remedy))


def _host() -> Any:
    return jax.local_devices(backend="cpu")[0]


@functools.cache
def _quick_import() -> Callable[[Any, Any], jax.Array] | None:
    """Return what takes a capsule and a device and makes an array of it, None where this JAX has it not.

    It is the heart of ``jax.dlpack.from_dlpack``, which spends seven eighths of its time around it: on the CPU it asks
    for a stream, catches the exception that there is none, and converts the finished array to its own dtype. As it is
    no public function, it is used only if it does the right thing with a first array.
    """
    try:
        from jax._src.lib import _jax

        def take(capsule: Any, device: Any) -> jax.Array:
            return _jax.dlpack_managed_tensor_to_buffer(capsule, device, None, None, 1)  # no stream; a copy if need be

        given = aligned_empty(4 * 3).view(np.int32)
        given[:] = 7, -1, 0
        public, made = jax.dlpack.from_dlpack(given), take(given.__dlpack__(), _host())
        same = made.unsafe_buffer_pointer() == given.ctypes.data and made.committed == public.committed
        same = same and type(made) is type(public) and made.aval == public.aval and made.sharding == public.sharding
        return take if same else None
    except Exception:  # whatever another version does instead
        return None


def from_framework(tensor: jax.Array) -> Any:
    """Return a read-only NumPy array, or on a GPU a CuPy array, that shares the memory of an array.

    Raises
    ------
    ArgumentTypeError
        It is no JAX array, or a traced one.
    """
    return array_of(tensor, "jax")


def concatenate(first: jax.Array, second: jax.Array) -> jax.Array:
    """Return the rows of one tensor and then those of another, in the dtype of the first."""
    return jax.numpy.concatenate([first, second.astype(first.dtype)])


def current_stream() -> int | None:
    """Return None: JAX does not tell its streams."""
    return None


def sees_cuda(index: int) -> bool:
    """Return whether this build of JAX can use a CUDA device."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:  # there is no such backend
        return False
    return any(device.local_hardware_id == index for device in devices)
