"""CuPy: arrays of a GPU as they are."""

from __future__ import annotations

from typing import Any

import cupy

from gglspeedup.device import cuda_problem
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.interchange import array_of, framework_of


def to_framework(array: Any) -> Any:
    """Return a CuPy array itself.

    Raises
    ------
    ArgumentValueError
        It is another array: what is made on the CPU stays there.
    """
    if framework_of(array) != "cupy":
        needs = "an array in the memory of a CUDA device"
        raise ArgumentValueError(explain("array", needs, f"{type(array)}", 'make it on a CUDA device, or take "numpy"'))
    return array


def from_framework(tensor: Any) -> Any:
    """Return a CuPy array itself.

    Raises
    ------
    ArgumentTypeError
        It is no CuPy array.
    """
    return array_of(tensor, "cupy")


def current_stream() -> int | None:
    """Return the pointer of CuPy's current stream in this thread, None without a usable device."""
    return None if cuda_problem() else int(cupy.cuda.get_current_stream().ptr)


def sees_cuda(index: int) -> bool:
    """Return whether CuPy can use a CUDA device."""
    return not cuda_problem(index)
