"""torch: arrays out, over DLPack."""

from __future__ import annotations

from typing import Any

import torch


def to_framework(array: Any) -> torch.Tensor:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array."""
    return torch.from_dlpack(array)
