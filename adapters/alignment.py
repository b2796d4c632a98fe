"""Which arrays a framework takes as they are; the others are copied to what it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.interchange import framework_of, integer_view
from gglspeedup.memory import ALIGNMENT, aligned_empty

_CARRIED = frozenset("?bhilqBHILQefdFD")  # NumPy's characters of the dtypes that DLPack carries


def shareable(array: Any) -> tuple[Any, str | None]:
    """Return what torch and Paddle take: the array, or a copy if they lack its strides or it must not be written.

    Returns
    -------
    (array, str or None)
        What to hand over, and the name of the type whose bits these integers are, if DLPack does not carry it.

    Raises
    ------
    ArgumentTypeError
        It is no NumPy or CuPy array, or of a dtype that DLPack does not carry.
    """
    check_array(array)
    carried, narrow = integer_view(array)
    if not isinstance(carried, np.ndarray):
        return carried, narrow
    _check_dtype(carried)
    flags = carried.flags
    if flags.writeable and carried.dtype.isnative and (flags.c_contiguous or _strides_fit(carried)):
        return carried, narrow
    return _aligned_copy(carried), narrow


def consumable(array: Any) -> tuple[Any, str | None]:
    """Return what TensorFlow and JAX take: the array, or a copy if it is not contiguous, writeable and aligned.

    Memory has to start on a 64-byte boundary, without which TensorFlow ends the process and JAX copies.

    Returns
    -------
    (array, str or None)
        What to hand over, and the name of the type whose bits these integers are, if DLPack does not carry it.

    Raises
    ------
    ArgumentTypeError
        It is no NumPy or CuPy array, or of a dtype that DLPack does not carry.
    """
    check_array(array)
    carried, narrow = integer_view(array)
    flags = carried.flags
    if not isinstance(carried, np.ndarray):
        fits = flags.c_contiguous and carried.data.ptr % ALIGNMENT == 0
        return (carried if fits else carried.copy(order="C")), narrow
    _check_dtype(carried)
    if flags.c_contiguous and flags.writeable and carried.dtype.isnative and carried.ctypes.data % ALIGNMENT == 0:
        return carried, narrow
    return _aligned_copy(carried), narrow


def check_array(array: Any) -> None:
    """Raise unless it is a NumPy or CuPy array."""
    if not isinstance(array, np.ndarray) and framework_of(array) != "cupy":
        kind = type(array)
        got = f"{kind.__module__}.{kind.__qualname__}"
        raise ArgumentTypeError(explain("array", "a NumPy or CuPy array", got, "convert it, or call from_framework"))


def lacks(framework: str, array: Any) -> ArgumentTypeError:
    """Return the error for an array of a dtype that a framework does not have."""
    needs = f"a dtype that {framework} has"
    return ArgumentTypeError(explain("array", needs, f"dtype {array.dtype}", "convert it with .astype(...)"))


def _check_dtype(array: npt.NDArray[Any]) -> None:
    if array.dtype.char not in _CARRIED:
        raise lacks("DLPack", array)


def _strides_fit(array: npt.NDArray[Any]) -> bool:
    """Return whether DLPack can say the strides, which it counts in elements, and the framework take them."""
    return all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)


def _aligned_copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    copy = aligned_empty(array.nbytes).view(array.dtype.newbyteorder("=")).reshape(array.shape)
    copy[...] = array
    return copy
