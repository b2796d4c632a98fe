"""Walking over the edges of a graph in pieces, so that temporary arrays stay small whatever the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 22  # edges looked at in one go


def edge_chunks(indptr: npt.NDArray[Any]) -> Iterator[tuple[int, int, npt.NDArray[np.int64]]]:
    """Give ranges of edges that cover a graph in order, each with the rows that its edges stand in.

    Parameters
    ----------
    indptr : int64 array [num_nodes + 1]
        Of a checked graph.

    Yields
    ------
    begin, end : int
        The range.
    rows : int64 array [end - begin]
        The row of each of its edges.

    Examples
    --------
    >>> [(begin, end, rows.tolist()) for begin, end, rows in edge_chunks(np.array([0, 2, 2, 3]))]
    [(0, 3, [0, 0, 2])]
    """
    num_edges = int(indptr[-1])
    for begin in range(0, num_edges, CHUNK):
        end = min(begin + CHUNK, num_edges)
        first = int(np.searchsorted(indptr, begin, "right")) - 1
        last = int(np.searchsorted(indptr, end, "left"))
        bounds = np.clip(indptr[first : last + 1], begin, end)
        yield begin, end, np.repeat(np.arange(first, last), np.diff(bounds))


def distinct(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each of some numbers once, rising; sorts the array given.

    Examples
    --------
    >>> distinct(np.array([5, 1, 5])).tolist()
    [1, 5]
    """
    # Not numpy.unique: since NumPy 2.3 that one hashes integers, which took 15 times as long for millions of them.
    numbers.sort()
    first = np.ones(len(numbers), np.bool_)
    np.not_equal(numbers[1:], numbers[:-1], out=first[1:])
    return numbers[first]
