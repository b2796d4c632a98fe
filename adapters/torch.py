"""torch: arrays out and in, over DLPack."""

from __future__ import annotations

from typing import Any

import torch

from gglspeedup.adapters.alignment import lacks, shareable
from gglspeedup.interchange import array_of


def to_framework(array: Any) -> torch.Tensor:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array.

    Read-only arrays, and those with strides that torch does not have, are copied.

    Raises
    ------
    ArgumentTypeError
        It is no such array, or of a dtype that torch does not have.
    """
    carried, narrow = shareable(array)
    tensor = torch.from_dlpack(carried)
    if narrow is None:
        return tensor
    if not hasattr(torch, narrow):
        raise lacks("torch", array)
    return tensor.view(getattr(torch, narrow))


def from_framework(tensor: torch.Tensor) -> Any:
    """Return a NumPy array, or on a GPU a CuPy array, that shares the memory of a tensor.

    Raises
    ------
    ArgumentTypeError
        It is no torch tensor, or a sparse one.
    """
    return array_of(tensor, "torch")


def concatenate(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the rows of one tensor and then those of another, in the dtype of the first."""
    return torch.cat([first, second.to(first.dtype)])


def current_stream() -> int | None:
    """Return the pointer of torch's current CUDA stream in this thread, None without a usable device."""
    return int(torch.cuda.current_stream().cuda_stream) if sees_cuda(0) else None


def sees_cuda(index: int) -> bool:
    """Return whether this build of torch can use a CUDA device."""
    return torch.version.cuda is not None and torch.cuda.is_available() and index < torch.cuda.device_count()


def bytes_in_use(index: int) -> int:
    """Return the bytes that torch's allocator has handed out on a CUDA device."""
    return int(torch.cuda.memory_allocated(index))


def peak_bytes(index: int) -> int:
    """Return the most bytes that torch's allocator had handed out on a CUDA device since :func:`restart_peak`."""
    return int(torch.cuda.max_memory_allocated(index))


def restart_peak(index: int) -> None:
    """Let the peak of a CUDA device be what is in use now."""
    if torch.cuda.is_initialized():  # else there is nothing yet to count from, and torch refuses
        torch.cuda.reset_peak_memory_stats(index)
