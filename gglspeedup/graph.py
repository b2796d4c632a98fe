"""The graph: compressed sparse rows, checked once, in memory or memory-mapped."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup import graph_file
from gglspeedup.arguments import check_ids, check_range, host_array, host_ids
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.kernels.bounds import MAX_DEGREE, MAX_NODES
from gglspeedup.threads import numba

Array = npt.NDArray[Any]
_CHUNK = 1 << 24  # elements looked at in one go, so that checks of mapped arrays stay small in memory


class CSRGraph:
    """A graph whose row v lists the neighbours that node v samples from.

    Parallel edges and self-loops are kept, in the order given. Everything is validated here, once.

    Parameters
    ----------
    indptr : int array [num_nodes + 1]
        Row v is ``indices[indptr[v]:indptr[v + 1]]``. Kept as int64; a view where it is int64 already.
    indices : int array [num_edges]
        Neighbours. Kept as int32 where node ids fit, else int64; a view where it is that already.
    num_nodes : int, optional
        At least ``len(indptr) - 1``; the nodes beyond have empty rows.
    edge_ids : int array [num_edges], optional
        What samples report as ``e_id`` instead of positions in `indices`; kept as int64.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        Wrong dtype or shape, `indptr` not monotone from 0 to the number of edges, or a neighbour out of range.

    Examples
    --------
    >>> graph = CSRGraph([0, 2, 3, 3], [1, 2, 0])
    >>> graph.num_nodes, graph.num_edges, graph.degree().tolist()
    (3, 3, [2, 1, 0])
    """

    def __init__(self, indptr: Any, indices: Any, *, num_nodes: int | None = None, edge_ids: Any = None) -> None:
        pointers = _whole_numbers(indptr, "indptr")
        neighbours = _whole_numbers(indices, "indices")
        rows = len(pointers) - 1
        if rows < 0:
            raise ArgumentValueError(explain("indptr", "at least one entry", "none", "pass [0] for a graph of no node"))
        nodes = rows if num_nodes is None else _node_count(num_nodes)
        if nodes < rows:
            raise ArgumentValueError(
                explain("num_nodes", f"at least the {rows} rows of indptr", nodes, "leave it out or raise it")
            )
        pointers = np.ascontiguousarray(pointers, np.int64)
        check_pointers(pointers, len(neighbours))
        check_neighbours(neighbours, nodes)
        if nodes > rows:
            pointers = np.concatenate([pointers, np.full(nodes - rows, len(neighbours), np.int64)])
        self._path: str | None = None
        self.indptr: Array = pointers
        self.indices: Array = np.ascontiguousarray(neighbours, _index_dtype(nodes))
        self.edge_ids: Array | None = None
        if edge_ids is not None:
            ids = _whole_numbers(edge_ids, "edge_ids")
            if len(ids) != len(neighbours):
                raise ArgumentValueError(
                    explain("edge_ids", f"one id for each of the {len(neighbours)} edges", f"{len(ids)}", "check it")
                )
            self.edge_ids = np.ascontiguousarray(ids, np.int64)

    @classmethod
    def from_scipy(cls, csr: Any) -> CSRGraph:
        """Return the graph of a scipy.sparse matrix; row v lists the columns stored in row v, duplicates kept.

        Parameters
        ----------
        csr : scipy.sparse matrix or array
            Any format; a CSR is not copied. If it is not square the larger side counts the nodes.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            It is no two-dimensional sparse matrix, or a broken one.
        """
        if not (hasattr(csr, "format") and hasattr(csr, "shape") and hasattr(csr, "tocsr")):
            raise ArgumentTypeError(explain("csr", "a scipy.sparse matrix", type(csr).__name__, "convert it first"))
        if len(csr.shape) != 2:
            raise ArgumentValueError(explain("csr", "two dimensions", f"shape {csr.shape}", "pass an adjacency matrix"))
        nodes = max(csr.shape)
        if csr.format not in ("csr", "csc"):
            # Through COO, not .tocsr(): that one would add up parallel edges.
            coo = csr.tocoo()
            return cls._from_edges(coo.row, coo.col, nodes)
        if csr.format == "csc":
            csr = csr.tocsr()
        return cls(csr.indptr, csr.indices, num_nodes=nodes)

    @classmethod
    def from_edge_index(
        cls, edge_index: Any, num_nodes: int | None = None, *, flow: str = "source_to_target"
    ) -> CSRGraph:
        """Return the graph of a list of edges; samples report edges as columns of `edge_index`.

        Parameters
        ----------
        edge_index : int array or tensor [2, E]
            Row 0 the sources, row 1 the targets, in any order.
        num_nodes : int, optional
            Default: the largest id + 1. Pass it, so that isolated nodes stay.
        flow : str
            ``"source_to_target"``: row v lists the in-neighbours of v, as message passing needs them.
            ``"target_to_source"``: row v lists the out-neighbours.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            Wrong shape, dtype or `flow`, or an id out of range.

        Examples
        --------
        >>> graph = CSRGraph.from_edge_index([[0, 1, 2], [2, 2, 0]], num_nodes=4)
        >>> graph.indptr.tolist(), graph.indices.tolist()
        ([0, 1, 1, 3, 3], [2, 0, 1])
        """
        edges = host_array(edge_index, "edge_index")
        if edges.ndim != 2 or edges.shape[0] != 2:
            raise ArgumentValueError(
                explain("edge_index", "shape [2, E]", f"shape {edges.shape}", "row 0: sources, row 1: targets")
            )
        sources = host_ids(edges[0] if edges.size else np.empty(0, np.int64), "edge_index")
        targets = host_ids(edges[1] if edges.size else np.empty(0, np.int64), "edge_index")
        if num_nodes is None:
            nodes = int(max(sources.max(), targets.max())) + 1 if len(sources) else 0
            nodes = _node_count(max(nodes, 0))
        else:
            nodes = _node_count(num_nodes)
        check_range(sources, nodes, "edge_index")
        check_range(targets, nodes, "edge_index")
        if flow == "source_to_target":
            return cls._from_edges(targets, sources, nodes)
        if flow == "target_to_source":
            return cls._from_edges(sources, targets, nodes)
        raise ArgumentValueError(
            explain("flow", '"source_to_target" or "target_to_source"', repr(flow), "see the docstring")
        )

    @classmethod
    def _from_edges(cls, row: Array, column: Array, num_nodes: int) -> CSRGraph:
        counts = np.bincount(row, minlength=num_nodes) if len(row) else np.zeros(num_nodes, np.int64)
        indptr = np.zeros(num_nodes + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        if bool(np.all(row[1:] >= row[:-1])):
            return cls(indptr, column)  # in order already: positions are columns
        numba()
        from gglspeedup.kernels.build_cpu import group_edges

        indices = np.empty(len(row), _index_dtype(num_nodes))
        edge_ids = np.empty(len(row), np.int64)
        group_edges(np.ascontiguousarray(row), np.ascontiguousarray(column), indptr[:-1].copy(), indices, edge_ids)
        return cls(indptr, indices, edge_ids=edge_ids)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True) -> CSRGraph:
        """Return a graph that :meth:`save` wrote.

        Parameters
        ----------
        path : path
            The file. It is not trusted: header and size are checked first, then every value, in one pass.
        mmap : bool
            Whether to leave the arrays on disk, memory-mapped (read-only), instead of reading them.

        Raises
        ------
        GraphFileError
            It is no such file, or one cut short.
        OSError
            It cannot be opened.
        """
        indptr, indices, edge_ids = graph_file.read(os.fspath(path), mmap)
        graph = cls(indptr, indices, edge_ids=edge_ids)
        graph._path = os.path.abspath(path) if mmap else None
        return graph

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to one file, which appears whole or not at all.

        Raises
        ------
        OSError
            It cannot be written.
        """
        graph_file.write(os.fspath(path), self.indptr, self.indices, self.edge_ids)

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        """The number of stored edges."""
        return len(self.indices)

    @property
    def path(self) -> str | None:
        """The file that the graph is mapped to, None in memory."""
        return self._path

    def degree(self, n_id: Any = None) -> npt.NDArray[np.int64]:
        """Return the lengths of the rows `n_id` (default: of all), int64.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            `n_id` is no list of node ids of this graph.
        """
        if n_id is None:
            return np.diff(self.indptr)
        ids = host_ids(n_id, "n_id")
        check_range(ids, self.num_nodes, "n_id")
        lengths: npt.NDArray[np.int64] = self.indptr[ids + 1] - self.indptr[ids]
        return lengths

    def __repr__(self) -> str:
        where = f", mapped from {self._path!r}" if self._path else ""
        return f"CSRGraph(num_nodes={self.num_nodes}, num_edges={self.num_edges}{where})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path:  # a spawned process opens the file itself: nothing is copied
            return CSRGraph.load, (self._path, True)
        return _rebuild, (self.indptr, self.indices, self.edge_ids)


GraphLike = Any  # a CSRGraph, a scipy.sparse matrix or (indptr, indices)


def as_graph(csr: GraphLike) -> CSRGraph:
    """Return the graph of a CSRGraph, a scipy.sparse matrix or a pair (indptr, indices).

    Raises
    ------
    ArgumentTypeError
        It is none of these.
    """
    if isinstance(csr, CSRGraph):
        return csr
    if isinstance(csr, (tuple, list)) and len(csr) == 2:
        return CSRGraph(csr[0], csr[1])
    if hasattr(csr, "tocsr"):
        return CSRGraph.from_scipy(csr)
    raise ArgumentTypeError(
        explain("csr", "a CSRGraph, a scipy.sparse matrix or (indptr, indices)", type(csr).__name__, "convert it first")
    )


def _rebuild(indptr: Array, indices: Array, edge_ids: Array | None) -> CSRGraph:
    graph = CSRGraph.__new__(CSRGraph)  # checked when it was made
    graph.indptr, graph.indices, graph.edge_ids, graph._path = indptr, indices, edge_ids, None
    return graph


def _index_dtype(num_nodes: int) -> type[np.signedinteger[Any]]:
    return np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64


def _node_count(num_nodes: Any) -> int:
    if isinstance(num_nodes, (bool, np.bool_)) or not hasattr(num_nodes, "__index__"):
        raise ArgumentTypeError(explain("num_nodes", "an integer", repr(num_nodes), "pass the number of nodes"))
    count = int(num_nodes.__index__())
    if not 0 <= count <= MAX_NODES:
        raise ArgumentValueError(explain("num_nodes", f"0 to {MAX_NODES}", count, "pass the number of nodes"))
    return count


def _whole_numbers(value: Any, argument: str) -> Array:
    array = host_array(value, argument)
    if array.size == 0 and array.ndim == 1 and not isinstance(value, np.ndarray):
        return np.empty(0, np.int64)
    check_ids(array, argument)
    return array


def check_pointers(indptr: Array, num_edges: int) -> None:
    """Raise ArgumentValueError unless these are the bounds of rows of so many edges."""
    if indptr[0] != 0:
        raise ArgumentValueError(explain("indptr", "0 as its first entry", int(indptr[0]), "pass whole rows"))
    for begin in range(0, len(indptr) - 1, _CHUNK):
        check_lengths(indptr[begin : begin + _CHUNK + 1], begin)
    if indptr[-1] != num_edges:
        needs = f"the number of edges, {num_edges}, as its last entry"
        raise ArgumentValueError(explain("indptr", needs, int(indptr[-1]), "indptr and indices must belong together"))


def check_lengths(bounds: Array, first: int) -> npt.NDArray[np.int64]:
    """Return the lengths of the rows from `first` on, by their bounds; raise ArgumentValueError for one below 0."""
    lengths = np.diff(bounds)
    if len(lengths) and int(lengths.min()) < 0:
        row = int(np.argmax(lengths < 0))
        got = f"{int(bounds[row])} then {int(bounds[row + 1])} at row {first + row}"
        raise ArgumentValueError(explain("indptr", "entries that never fall", got, "rebuild the matrix"))
    if len(lengths) and int(lengths.max()) > MAX_DEGREE:
        row = first + int(np.argmax(lengths > MAX_DEGREE))
        got = f"{int(lengths.max())} in row {row}"
        raise ArgumentValueError(explain("indptr", "rows of up to 2^32 - 1 edges", got, "split that node"))
    return lengths


def check_neighbours(indices: Array, num_nodes: int, first: int = 0) -> None:
    """Raise ArgumentIndexError for a neighbour that is no node; the first of them stands at position `first`."""
    for begin in range(0, len(indices), _CHUNK):
        part = indices[begin : begin + _CHUNK]
        bad = (part < 0) | (part >= num_nodes) if _outside(part, num_nodes) else None
        if bad is not None:
            at = int(np.argmax(bad))
            where = f"position {first + begin + at}"
            raise ArgumentIndexError(
                explain(
                    "indices", f"node ids from 0 to {num_nodes - 1}", f"{int(part[at])} at {where}",
                    "pass num_nodes if nodes without a row are meant",
                )
            )  # fmt: skip


def _outside(part: Array, num_nodes: int) -> bool:
    return bool(int(part.min()) < 0 or int(part.max()) >= num_nodes)
