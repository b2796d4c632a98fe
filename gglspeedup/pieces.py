"""An array in pieces that lie apart, and how rows of a graph are dealt out to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.kernels.cuda import Runtime
from gglspeedup.memory import kernel_view

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


class Pieces:
    """A vector whose pieces are arrays of their own; kernels read it through a table of their addresses.

    Parameters
    ----------
    first : int64 array [pieces + 1]
        The index at which each piece begins, and the length of the vector.
    holders : sequence of array, SharedArray or PeerArray
        The pieces, or what holds them; a piece may be longer than its share.
    dtype : dtype
        Their type.
    """

    def __init__(self, first: Ids, holders: Sequence[Any], dtype: npt.DTypeLike) -> None:
        self.first = np.ascontiguousarray(first, np.int64)
        self.holders = list(holders)
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @property
    def arrays(self) -> list[Array]:
        """The pieces, in host memory."""
        return [getattr(holder, "array", holder) for holder in self.holders]

    def __len__(self) -> int:
        return int(self.first[-1])

    def addresses(self, pointers: Sequence[int]) -> Ids:
        """Return where element 0 would lie if each piece, which lies at a pointer, reached back to it."""
        return np.array(pointers, np.int64) - self.first[:-1] * self.dtype.itemsize

    def kernel_view(self) -> tuple[Ids, Ids, Array]:
        """Return what CPU kernels take in the place of a whole array (see `kernels.pieces_cpu`)."""
        return self.first, self.addresses([array.ctypes.data for array in self.arrays]), np.empty(0, self.dtype)


class DevicePieces:
    """The pieces of a vector as the kernels of one device see them.

    Attributes
    ----------
    table : int64 device array [1 + 2 * pieces]
        What kernels take in the place of a whole array (see `kernels/pieces.cuh`).
    dtype : dtype
        Of the elements.
    """

    def __init__(self, runtime: Runtime, pieces: Pieces, pointers: Sequence[int], kept: Any) -> None:
        self._length, self.dtype = len(pieces), pieces.dtype
        self._kept = kept  # the memory at the pointers
        table = [len(pointers), *pieces.first[:-1].tolist(), *pieces.addresses(pointers).tolist()]
        self.table = runtime.to_device(np.array(table, np.int64))

    def __len__(self) -> int:
        return self._length


def host_view(array: Array | Pieces) -> Any:
    """Return what CPU kernels take for an array, whole or in pieces."""
    return array.kernel_view() if isinstance(array, Pieces) else kernel_view(array)


def balanced_rows(indptr: Ids, count: int) -> Ids:
    """Return where `count` ranges of rows begin and the last one ends, of nearly as many edges and rows each.

    Examples
    --------
    >>> balanced_rows(np.array([0, 6, 7, 8, 12]), 2).tolist()
    [0, 2, 4]
    """
    # A row weighs what it takes in memory: its entry in indptr, and its edges.
    weight = indptr + np.arange(len(indptr))
    wanted = weight[-1] * np.arange(1, count) / count
    inner = np.searchsorted(weight, wanted)
    before = np.maximum(inner - 1, 0)
    nearer = np.where(wanted - weight[before] < weight[inner] - wanted, before, inner)
    return np.concatenate([[0], np.maximum.accumulate(nearer), [len(indptr) - 1]]).astype(np.int64)
