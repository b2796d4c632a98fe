"""TensorFlow: arrays out and in, over DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow

from gglspeedup.adapters.alignment import consumable, lacks
from gglspeedup.interchange import array_of


def to_framework(array: Any) -> Any:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array.

    An array that TensorFlow cannot take as it is (strided, read-only, or not on a 64-byte boundary, on which
    TensorFlow ends the process) is copied first, and so are float8 types. For memory of a GPU the host waits until it
    is filled.

    Raises
    ------
    ArgumentTypeError
        It is no NumPy or CuPy array, or of a dtype that TensorFlow does not have.
    """
    carried, narrow = consumable(array)
    if narrow is not None and narrow != "bfloat16":  # tensorflow.bitcast knows none of the others
        return _copied(array)
    if not isinstance(carried, np.ndarray):
        _wait_for(carried)
    tensor = tensorflow.experimental.dlpack.from_dlpack(carried.__dlpack__())
    return tensor if narrow is None else tensorflow.bitcast(tensor, narrow)


def _wait_for(array: Any) -> None:
    """Wait until what CuPy has enqueued is done: TensorFlow reads on a stream that it does not tell.

    Its from_dlpack takes a capsule, which carries no stream, and waits for nothing (TFE_HandleFromDLPack).
    """
    import cupy

    with array.device:
        cupy.cuda.get_current_stream().synchronize()


def _copied(array: Any) -> Any:
    try:
        if isinstance(array, np.ndarray):
            return tensorflow.convert_to_tensor(array)
    except (TypeError, ValueError):
        pass
    raise lacks("TensorFlow", array)


def from_framework(tensor: Any) -> Any:
    """Return a read-only NumPy array, or on a GPU a CuPy array, that shares the memory of a tensor or variable.

    Raises
    ------
    ArgumentTypeError
        It is no TensorFlow tensor, or a sparse, ragged or symbolic one.
    """
    return array_of(tensor, "tensorflow")


def concatenate(first: Any, second: Any) -> Any:
    """Return the rows of one tensor and then those of another, in the dtype of the first."""
    return tensorflow.concat([first, tensorflow.cast(second, first.dtype)], 0)


def current_stream() -> int | None:
    """Return None: TensorFlow does not tell its stream."""
    return None


def sees_cuda(index: int) -> bool:
    """Return whether this build of TensorFlow can use a CUDA device."""
    return index < len(tensorflow.config.list_physical_devices("GPU"))


def bytes_in_use(index: int) -> int:
    """Return the bytes that TensorFlow's allocator has handed out on a CUDA device."""
    return int(tensorflow.config.experimental.get_memory_info(f"GPU:{index}")["current"])


def peak_bytes(index: int) -> int:
    """Return the most bytes that TensorFlow's allocator had handed out on a CUDA device since :func:`restart_peak`."""
    return int(tensorflow.config.experimental.get_memory_info(f"GPU:{index}")["peak"])


def restart_peak(index: int) -> None:
    """Let the peak of a CUDA device be what is in use now."""
    tensorflow.config.experimental.reset_memory_stats(f"GPU:{index}")
