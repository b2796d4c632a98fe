"""Paddle: arrays out, over DLPack."""

from __future__ import annotations

from typing import Any

import paddle


def to_framework(array: Any) -> Any:
    """Return a tensor on the same device that shares the memory of a NumPy or CuPy array."""
    return paddle.utils.dlpack.from_dlpack(array)
