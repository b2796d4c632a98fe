"""Reading an array that kernels are given whole, or in pieces that lie apart.

An array in pieces is a tuple ``(first, address, like)``: ``first[k]`` is the index at which piece k begins,
``address[k]`` where element 0 would lie if piece k reached back to it, and ``like`` an array of the elements' type.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import overload

from gglspeedup.kernels.intrinsics import load_address, prefetch, prefetch_address


def element(array: Any, index: Any) -> Any:
    """Return an element of an array, whole or in pieces; to be called by kernels."""


def prefetch_element(array: Any, index: Any) -> Any:
    """Ask for the cache line of an element; to be called by kernels."""


@overload(element, strict=False)
def _element(array: Any, index: Any) -> Any:
    if isinstance(array, types.Array):
        return lambda array, index: array[index]

    def in_pieces(array, index):  # type: ignore[no-untyped-def]
        first, address, like = array
        # Counted, not searched: there are few pieces, and no predictor knows where the next index lies.
        piece = 0
        for k in range(1, len(address)):
            piece += index >= first[k]
        return load_address(address[piece] + index * like.itemsize, like)

    return in_pieces


@overload(prefetch_element, strict=False)
def _prefetch_element(array: Any, index: Any) -> Any:
    if isinstance(array, types.Array):
        return lambda array, index: prefetch(array, index)

    def in_pieces(array, index):  # type: ignore[no-untyped-def]
        first, address, like = array
        piece = 0
        for k in range(1, len(address)):
            piece += index >= first[k]
        prefetch_address(address[piece] + index * like.itemsize)

    return in_pieces
