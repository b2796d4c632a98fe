"""Dealing out pieces of a graph to the parts: which elements of a piece go to which part, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gglspeedup.distributed.columns import Column, GraphColumns
from gglspeedup.threads import announce_compilation, numba

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Slice = tuple[int, int, int]  # part, begin, end


class Dealt(NamedTuple):
    """A piece in the order it was read, in one of part by part, and which elements of that go to which part."""

    read: list[Array]
    dealt: list[Array]
    slices: list[Slice]


class Dealer(Protocol):
    """What knows to which part rows and edges go."""

    def rows(self, begin: int, end: int, arrays: list[Array]) -> Dealt:
        """Deal out what belongs to nodes begin to end, in arrays of one element a node."""

    def edges(self, columns: GraphColumns, begin: int, step: int) -> Iterator[tuple[int, Dealt]]:
        """Give pieces of about `step` edges, from edge `begin` on, each with where it ends: neighbours, edge ids."""


class RangeDealer:
    """Parts that are ranges of nodes: nothing is copied.

    Parameters
    ----------
    ptr : int64 array [num_parts + 1]
        The first node of each part.
    edges : list of int
        How many each part has; asked for when edges are dealt out.
    """

    def __init__(self, ptr: Ids, edges: list[int]) -> None:
        self._ptr, self._edges = ptr, edges

    def rows(self, begin: int, end: int, arrays: list[Array]) -> Dealt:
        """Deal out what belongs to nodes begin to end, in arrays of one element a node."""
        return Dealt(arrays, arrays, range_slices(self._ptr, begin, end))

    def edges(self, columns: GraphColumns, begin: int, step: int) -> Iterator[tuple[int, Dealt]]:
        """Give pieces of `step` edges, from edge `begin` on, each with where it ends."""
        ptr = np.concatenate([[0], np.cumsum(self._edges)])
        for at in range(begin, columns.num_edges, step):
            end = min(at + step, columns.num_edges)
            read = _edge_arrays(columns, at, end)
            yield end, Dealt(read, read, range_slices(ptr, at, end))


class OwnerDealer:
    """Parts of any shape.

    Parameters
    ----------
    owners : Column
        The part of each node.
    num_parts : int
        Of how many.
    rows : int
        To look at in one go.
    """

    def __init__(self, owners: Column, num_parts: int, rows: int) -> None:
        self._owners, self._num_parts, self._rows = owners, num_parts, rows

    def rows(self, begin: int, end: int, arrays: list[Array]) -> Dealt:
        """Deal out what belongs to nodes begin to end, in arrays of one element a node."""
        owners = self._owners.read(begin, end)
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=self._num_parts)
        return Dealt(arrays, [array[order] for array in arrays], _slices(counts))

    def edges(self, columns: GraphColumns, begin: int, step: int) -> Iterator[tuple[int, Dealt]]:
        """Give pieces of up to `step` edges, from edge `begin` on, each with where it ends."""
        numba()
        from gglspeedup.kernels.parts_cpu import add_lengths, deal_edges

        announce_compilation(deal_edges)
        row, at = row_of(columns.indptr, begin), begin
        while at < columns.num_edges:
            bounds = columns.bounds(row, min(row + self._rows, columns.num_nodes) + 1)
            end = min(at + step, int(bounds[-1]))
            last = int(np.searchsorted(bounds, end, "left"))  # rows of this piece: the first and the last may be cut
            lengths = np.diff(np.clip(bounds[: last + 1], at, end))
            owners = self._owners.read(row, row + last)
            counts = np.zeros(self._num_parts, np.int64)
            add_lengths(owners, lengths, counts)
            read = _edge_arrays(columns, at, end)
            dealt = [np.empty_like(array) for array in read]
            for source, out in zip(read, dealt, strict=True):
                deal_edges(owners, lengths, source, np.cumsum(counts) - counts, out)
            yield end, Dealt(read, dealt, _slices(counts))
            row += int(np.searchsorted(bounds[:-1], end, "right")) - 1 if end < bounds[-1] else len(bounds) - 1
            at = end


def range_slices(ptr: Ids, begin: int, end: int) -> list[Slice]:
    """Return which elements of a piece begin:end lie in which of the ranges ptr[i]:ptr[i + 1].

    Examples
    --------
    >>> range_slices(np.array([0, 4, 4, 9]), 3, 6)
    [(0, 0, 1), (2, 1, 3)]
    """
    slices, at = [], begin
    while at < end:
        part = int(np.searchsorted(ptr, at, "right")) - 1
        to = min(end, int(ptr[part + 1]))
        slices.append((part, at - begin, to - begin))
        at = to
    return slices


def row_of(indptr: Column, edge: int) -> int:
    """Return the row that an edge stands in, reading no more of indptr than a search does."""
    low, high = 0, indptr.shape[0] - 1
    while high - low > 1:
        middle = (low + high) // 2
        if int(indptr.read(middle, middle + 1)[0]) <= edge:
            low = middle
        else:
            high = middle
    return low


def _slices(counts: Ids) -> list[Slice]:
    ends = np.cumsum(counts)
    return [(part, int(ends[part] - counts[part]), int(ends[part])) for part in np.flatnonzero(counts).tolist()]


def _edge_arrays(columns: GraphColumns, begin: int, end: int) -> list[Array]:
    arrays = [columns.neighbours(begin, end)]
    return arrays if columns.edge_ids is None else [*arrays, columns.edge_ids.read(begin, end)]
