"""GraphPart: the rows of a graph that one part owns."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_flag
from gglspeedup.distributed.book import PartBook, crc_of
from gglspeedup.distributed.meta import read_meta
from gglspeedup.distributed.part_file import REMEDY, open_array
from gglspeedup.distributed.verify import verify_partition
from gglspeedup.edges import edge_chunks
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError, PartFileError, explain
from gglspeedup.graph import CSRGraph, GraphLike, as_graph, check_neighbours, check_pointers
from gglspeedup.memory import kernel_view

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

_CHUNK = 1 << 22  # rows looked at in one go


@dataclass(frozen=True, eq=False)
class GraphPart:
    """The rows of a graph that one part owns, in rising order of their nodes; made by :meth:`of` or :meth:`load`.

    Attributes
    ----------
    book : PartBook
        Who owns what.
    index : int
        Which of the parts this is.
    indptr : int64 array [n + 1]
        Local row r, of node ``book.nodes_of(index)[r]``, is ``indices[indptr[r]:indptr[r + 1]]``.
    indices : int32 or int64 array [E]
        Neighbours, by their ids in the whole graph; every row in the whole graph's order.
    start : int64 array [n]
        Where each row begins in the whole graph's ``indices``: the edge at place k of row r has the id
        ``start[r] + k``, if there are no `edge_ids`.
    edge_ids : int64 array [E] or None
        The whole graph's own edge ids.
    fingerprint : str
        Of the whole graph: parts of different graphs have different ones.
    features, labels : array [n, ...] or None
        Rows of the part's nodes, if the partition on disk has them.

    Examples
    --------
    >>> graph = CSRGraph([0, 2, 3, 3], [1, 2, 0])
    >>> part = GraphPart.of(graph, PartBook.from_owners([1, 0, 1], 2), 1)
    >>> part.indptr.tolist(), part.indices.tolist(), part.start.tolist()
    ([0, 2, 2], [1, 2], [0, 3])
    """

    book: PartBook
    index: int
    indptr: Ids
    indices: Array
    start: Ids
    edge_ids: Ids | None
    fingerprint: str
    features: Array | None = None
    labels: Array | None = None
    origin: tuple[str, int, bool] | None = None  # what to load it with in another process, so that nothing is copied

    @property
    def num_nodes(self) -> int:
        """The number of rows of this part."""
        return len(self.start)

    @property
    def num_edges(self) -> int:
        """The number of edges in them."""
        return len(self.indices)

    @classmethod
    def of(cls, graph: GraphLike, book: PartBook, index: int) -> GraphPart:
        """Return a part of a graph in memory; of a book of ranges its arrays are views.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            The book is not one of this graph, or there is no such part.
        """
        whole = as_graph(graph)
        number = check_count(index, "index", 0, book.num_parts)
        if book.num_nodes != whole.num_nodes:
            needs, got = f"the {whole.num_nodes} nodes of the graph", f"one of {book.num_nodes}"
            raise ArgumentValueError(explain("book", needs, got, "check that graph and book belong together"))
        mark = fingerprint_of(whole)
        if book.ptr is not None:
            first, last = book.ptr[number : number + 2].tolist()
            begin, end = whole.indptr[[first, last]].tolist()
            ids = None if whole.edge_ids is None else whole.edge_ids[begin:end]
            bounds = whole.indptr[first : last + 1]
            indices, start = kernel_view(whole.indices[begin:end]), kernel_view(bounds[:-1])
            ids = None if ids is None else kernel_view(ids)
            return cls(book, number, bounds - begin, indices, start, ids, mark)
        nodes = book.nodes_of(number)
        start = whole.indptr[nodes]
        indptr = np.concatenate([[0], np.cumsum(whole.indptr[nodes + 1] - start)])
        shift = start - indptr[:-1]  # from a place here to that in the whole graph
        indices = np.empty(indptr[-1], whole.indices.dtype)
        edge_ids = None if whole.edge_ids is None else np.empty(indptr[-1], np.int64)
        for begin, end, rows in edge_chunks(indptr):
            places = np.arange(begin, end) + shift[rows]
            indices[begin:end] = whole.indices[places]
            if edge_ids is not None and whole.edge_ids is not None:
                edge_ids[begin:end] = whole.edge_ids[places]
        return cls(book, number, indptr, indices, start, edge_ids, mark)


    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], index: int, mmap: bool = True, *, verify: bool = False
    ) -> GraphPart:  # fmt: skip
        """Return a part of a partition on disk.

        Its files are not trusted: headers and sizes are checked first, then every pointer and neighbour, in one pass.

        Parameters
        ----------
        folder : path
            Where :func:`partition_to_disk` wrote it.
        index : int
            Which part.
        mmap : bool
            Whether to leave the arrays on disk, memory-mapped (read-only), instead of reading them.
        verify : bool
            Whether to compare the checksums of all bytes of this part.

        Raises
        ------
        PartFileError
            The folder holds no finished partition, or one of its files is not what was written.
        ArgumentTypeError, ArgumentValueError
            There is no such part.
        """
        where = os.path.abspath(folder)
        mapped = check_flag(mmap, "mmap")
        meta = read_meta(where)
        number = check_count(index, "index", 0, meta.request.num_parts)
        if check_flag(verify, "verify"):
            verify_partition(where, part=number, progress=False)
        arrays = {
            file.name: kernel_view(open_array(where, file, meta.fingerprint, mapped)) for file in meta.files(number)
        }
        try:
            book = (
                PartBook.from_owners(arrays["owners"], meta.request.num_parts)
                if meta.ptr is None
                else PartBook.contiguous(meta.ptr)
            )
            check_pointers(arrays["indptr"], len(arrays["indices"]))
            check_neighbours(arrays["indices"], meta.request.num_nodes)
            _check_starts(arrays["indptr"], arrays["start"], meta.request.num_edges)
            if [book.count_of(part) for part in range(book.num_parts)] != meta.nodes:
                raise ArgumentValueError(explain("owners", f"parts of {meta.nodes} nodes", "others", REMEDY))
        except (ArgumentValueError, ArgumentIndexError) as error:
            remedy = "run python -m gglspeedup verify on it"
            raise PartFileError(explain("folder", "sound arrays", f"{where!r}: {error}", remedy)) from error
        return cls(
            book, number, arrays["indptr"], arrays["indices"], arrays["start"], arrays.get("edge_ids"),
            meta.fingerprint, arrays.get("features"), arrays.get("labels"), (where, number, mapped),
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        if self.origin is not None:
            return GraphPart.load, self.origin
        return GraphPart, tuple(getattr(self, field.name) for field in fields(self))


def _check_starts(indptr: Ids, start: Ids, num_edges: int) -> None:
    """Raise ArgumentValueError unless rows begin in the order of their nodes, and do not overlap in the graph."""
    for begin in range(0, len(start), _CHUNK):
        end = min(begin + _CHUNK, len(start))
        ends = start[begin:end] + np.diff(indptr[begin : end + 1])
        nexts = start[begin + 1 : end + 1]
        if start[begin] < 0 or ends[-1] > num_edges or bool((ends[: len(nexts)] > nexts).any()):
            got = f"others in rows {begin} to {end - 1}"
            raise ArgumentValueError(explain("start", "rows one behind the other in the graph", got, REMEDY))


def fingerprint_of(graph: CSRGraph) -> str:
    """Return what tells a graph from others: its sizes, and the CRC-32 of each of its arrays.

    Examples
    --------
    >>> fingerprint_of(CSRGraph([0, 1], [0]))
    '1-1-20114bcb-2144df1c-00000000'
    """
    arrays = (graph.indptr, graph.indices, graph.edge_ids)
    return fingerprint(graph.num_nodes, graph.num_edges, [0 if array is None else crc_of(array) for array in arrays])


def fingerprint(num_nodes: int, num_edges: int, checksums: list[int]) -> str:
    """Return the fingerprint of a graph with these sizes and CRC-32 of indptr, indices and edge ids."""
    return "-".join([str(num_nodes), str(num_edges), *(f"{checksum:08x}" for checksum in checksums)])
