"""NumPy: arrays as they are; those of a GPU are copied to the host."""

from __future__ import annotations

from typing import Any

import numpy

from gglspeedup.adapters.alignment import check_array
from gglspeedup.interchange import array_of


def to_framework(array: Any) -> numpy.typing.NDArray[Any]:
    """Return a NumPy array itself, and a copy on the host of a CuPy array.

    Raises
    ------
    ArgumentTypeError
        It is neither.
    """
    check_array(array)
    return array if isinstance(array, numpy.ndarray) else array.get()


def from_framework(tensor: Any) -> numpy.typing.NDArray[Any]:
    """Return a NumPy array itself.

    Raises
    ------
    ArgumentTypeError
        It is no NumPy array.
    """
    return array_of(tensor, "numpy")


def current_stream() -> int | None:
    """Return None: NumPy works on no stream."""
    return None


def sees_cuda(index: int) -> bool:
    """Return whether batches made on a CUDA device can be had: they are copied to the host, as CuPy can do it."""
    return True
