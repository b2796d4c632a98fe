"""Paddle: arrays out and in, over DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from gglspeedup.adapters.alignment import lacks, shareable
from gglspeedup.interchange import array_of


def to_framework(array: Any) -> Any:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array.

    Read-only arrays, and those with strides that Paddle does not have, are copied.

    Raises
    ------
    ArgumentTypeError
        It is no such array, or of a dtype that Paddle does not have, such as uint16.
    """
    carried, narrow = shareable(array)
    if carried.dtype == np.uint16:
        raise lacks("Paddle", array)  # which takes such an array, and reads it as bfloat16
    tensor = paddle.utils.dlpack.from_dlpack(carried)
    if narrow is None:
        return tensor
    if not hasattr(paddle, narrow):
        raise lacks("Paddle", array)
    return tensor.view(narrow)


def from_framework(tensor: Any) -> Any:
    """Return a NumPy array, or on a GPU a CuPy array, that shares the memory of a tensor.

    Raises
    ------
    ArgumentTypeError
        It is no Paddle tensor, or a sparse or static one.
    """
    return array_of(tensor, "paddle")


def concatenate(first: Any, second: Any) -> Any:
    """Return the rows of one tensor and then those of another, in the dtype of the first."""
    return paddle.concat([first, second.astype(first.dtype)])


def current_stream() -> int | None:
    """Return the pointer of Paddle's current CUDA stream in this thread, None without a usable device."""
    if not sees_cuda(0) or not paddle.device.get_device().startswith("gpu"):
        return None
    return int(paddle.device.current_stream().stream_base.cuda_stream)


def sees_cuda(index: int) -> bool:
    """Return whether this build of Paddle can use a CUDA device."""
    return bool(paddle.device.is_compiled_with_cuda()) and index < int(paddle.device.cuda.device_count())


def bytes_in_use(index: int) -> int:
    """Return the bytes that Paddle's allocator has handed out on a CUDA device."""
    return int(paddle.device.cuda.memory_allocated(index))


def peak_bytes(index: int) -> int:
    """Return the most bytes that Paddle's allocator had handed out on a CUDA device since :func:`restart_peak`."""
    return int(paddle.device.cuda.max_memory_allocated(index))


def restart_peak(index: int) -> None:
    """Let the peak of a CUDA device be what is in use now."""
    paddle.device.cuda.reset_max_memory_allocated(index)
