"""Arrays that are read front to back in pieces: in memory, or in a file, of which no more than a piece is resident."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup import graph_file
from gglspeedup.arguments import host_array
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, GraphFileError, PartFileError, explain
from gglspeedup.graph import GraphLike, as_graph, check_lengths, check_neighbours
from gglspeedup.interchange import is_numeric

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]


class Column:
    """Rows that are read in pieces.

    Parameters
    ----------
    source : array [N, ...] or path
        The rows, or the file that they stand in.
    dtype : dtype
        Of the file; pieces have it in this machine's byte order.
    shape : tuple of int
        Of all rows.
    begin : int
        Where they begin in the file, in bytes.
    """

    def __init__(self, source: Array | str, dtype: Any, shape: tuple[int, ...], begin: int = 0) -> None:
        self._source, self._stored, self._begin = source, np.dtype(dtype), begin
        self.dtype = self._stored.newbyteorder("=")
        self.shape = shape
        self.row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    @classmethod
    def of(cls, array: Array) -> Column:
        """Return the rows of an array."""
        return cls(array, array.dtype, array.shape)

    def read(self, begin: int, end: int) -> Array:
        """Return rows begin to end, C-contiguous."""
        if not isinstance(self._source, str):
            return np.ascontiguousarray(self._source[begin:end], self.dtype)
        count = (end - begin) * (self.row_bytes // self.dtype.itemsize)
        at = self._begin + begin * self.row_bytes
        flat = np.fromfile(self._source, self._stored, count, offset=at)
        if len(flat) != count:
            remedy = "it was cut short while it was read"
            raise PartFileError(explain("path", f"{count} numbers from byte {at}", f"{len(flat)}", remedy))
        return flat.astype(self.dtype, copy=False).reshape(end - begin, *self.shape[1:])


class GraphColumns(NamedTuple):
    """The arrays of a graph; what is read of them is checked by :meth:`bounds` and :meth:`neighbours`."""

    indptr: Column
    indices: Column
    edge_ids: Column | None

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return self.indptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """The number of edges."""
        return self.indices.shape[0]

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """The dtype that a CSRGraph of these has its indices in."""
        return np.dtype(np.int32 if self.num_nodes <= np.iinfo(np.int32).max else np.int64)

    def bounds(self, begin: int, end: int) -> Ids:
        """Return entries begin to end of indptr, once they are known to be bounds of rows.

        Raises
        ------
        ArgumentValueError
            They are not.
        """
        found = self.indptr.read(begin, end)
        check_lengths(found, begin)
        wrong_start, wrong_end = begin == 0 and found[0] != 0, end == self.num_nodes + 1 and found[-1] != self.num_edges
        if wrong_start or wrong_end or found[0] < 0 or found[-1] > self.num_edges:
            needs, got = f"bounds from 0 to {self.num_edges}", f"{found[0]} to {found[-1]}"
            raise GraphFileError(explain("indptr", needs, got, "write the graph again with CSRGraph.save"))
        return found

    def neighbours(self, begin: int, end: int) -> Array:
        """Return neighbours begin to end, once they are known to be nodes.

        Raises
        ------
        ArgumentIndexError
            They are not.
        """
        found = self.indices.read(begin, end)
        check_neighbours(found, self.num_nodes, begin)
        return found.astype(self.index_dtype, copy=False)


def graph_columns(graph: GraphLike) -> GraphColumns:
    """Return the arrays of a graph, or of a graph file that a path names or a graph is mapped to.

    Raises
    ------
    GraphFileError
        The path names no graph file.
    OSError
        It cannot be opened.
    ArgumentTypeError
        It is neither a path nor a graph.
    """
    if not isinstance(graph, (str, os.PathLike)):
        whole = as_graph(graph)
        if whole.path is None:
            ids = None if whole.edge_ids is None else Column.of(whole.edge_ids)
            return GraphColumns(Column.of(whole.indptr), Column.of(whole.indices), ids)
        graph = whole.path
    path = os.fspath(graph)
    indptr, indices, edge_ids = (
        None if section is None else Column(path, section.dtype, (section.length,), section.begin)
        for section in graph_file.sections(path)
    )
    assert indptr is not None and indices is not None
    return GraphColumns(indptr, indices, edge_ids)


def row_column(rows: Any, count: int, argument: str) -> Column:
    """Return one row a node, of an array or of the .npy file that a path names.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        They are not numbers, or not so many rows; or the file is none.
    OSError
        It cannot be opened.
    """
    remedy = "pass an array, or the path of a .npy file, of one row a node"
    array = _npy(os.fspath(rows), argument, remedy) if isinstance(rows, (str, os.PathLike)) else None
    given = host_array(rows, argument) if array is None else array
    if given.ndim < 1 or len(given) != count:
        raise ArgumentValueError(explain(argument, f"{count} rows", f"shape {given.shape}", remedy))
    if not is_numeric(given.dtype) or given.dtype.kind == "V":
        raise ArgumentTypeError(explain(argument, "numbers that NumPy has", f"dtype {given.dtype}", remedy))
    if array is not None and array.flags.c_contiguous and array.filename is not None:
        # Read, not mapped: pages of a mapping count as this process's memory for as long as there is room.
        return Column(os.fspath(array.filename), array.dtype, array.shape, array.offset)
    return Column.of(given)


def _npy(path: str, argument: str, remedy: str) -> np.memmap[Any, Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (ValueError, EOFError) as error:
        raise ArgumentValueError(explain(argument, "a .npy file of numbers", f"{path!r}: {error}", remedy)) from error
