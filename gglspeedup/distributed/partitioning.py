"""partition_to_disk: cut a graph into parts on disk, in one pass over its edges, whatever its size."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.arguments import check_count, check_flag
from gglspeedup.distributed.book import checked_owners, crc_of, owner_dtype
from gglspeedup.distributed.columns import Column, GraphColumns, graph_columns, row_column
from gglspeedup.distributed.journal import Journal, check_same, finished, locked, remove_journal
from gglspeedup.distributed.meta import Meta, Request, Rows, array_files, read_meta
from gglspeedup.distributed.part_writer import PartWriter
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, PartFileError, explain
from gglspeedup.graph import CSRGraph, GraphLike
from gglspeedup.kernels.bounds import MAX_PARTS
from gglspeedup.memory import parse_size
from gglspeedup.partitions import partition

logger = logging.getLogger("gglspeedup")

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

METHODS = ("contiguous", "random", "metis", "owners")
_LEAST_MEMORY = 1 << 16
_BOUNDS = 1 << 20  # of rows, looked at in one go


def partition_to_disk(
    graph: GraphLike,
    folder: str | os.PathLike[str],
    num_parts: int,
    method: str = "contiguous",
    *,
    balance: str | None = None,
    seed: int = 0,
    owners: Any = None,
    features: Any = None,
    labels: Any = None,
    memory: int | str = "2G",
    progress: bool = True,
) -> Meta:
    """Cut a graph into parts, each with its rows, and write them to a folder for :meth:`GraphPart.load`.

    What is read of the graph, features and labels is read front to back in pieces. A run that was interrupted,
    killed or found the disk full goes on where it was when it is started again; one that is finished does nothing.
    The files depend on the graph and the arguments alone, `memory` and `progress` left aside.

    Parameters
    ----------
    graph : path, CSRGraph, scipy.sparse matrix or (indptr, indices)
        A path names a file of :meth:`CSRGraph.save`, which is not mapped.
    folder : path
        A new or empty folder, or that of an earlier run.
    num_parts : int
        1 to 65536.
    method : str
        ``"contiguous"``: ranges of nodes. ``"random"``: each node by a draw of its own. ``"metis"``: few edges between
        parts, see :func:`gglspeedup.partition`; holds the graph several times in memory. ``"owners"``: as told.
    balance : str, optional
        Of contiguous parts: ``"edges"`` (default) or ``"nodes"``, of which each gets about as many.
    seed : int
        0 to 2**64 - 1, of ``"random"`` and ``"metis"``.
    owners : int array [num_nodes] or path of a .npy file
        The part of each node, for ``"owners"``.
    features, labels : array [num_nodes, ...] or path of a .npy file, optional
        Of which each part gets the rows of its nodes. Pickled objects are not read.
    memory : int or str
        Bytes for buffers beyond what the interpreter and its libraries take, 64 KiB or more.
    progress : bool
        Whether to show a bar, if tqdm is installed, or write lines to the log.

    Returns
    -------
    Meta
        What the parts are.

    Raises
    ------
    PartFileError
        The disk has no room, or what an earlier run left is damaged.
    GraphFileError
        `graph` names no graph file.
    MissingPackageError, PartitionError
        METIS is not there, or failed.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used, or the folder holds something else; the message names it.

    Examples
    --------
    >>> import tempfile
    >>> graph = CSRGraph([0, 2, 3, 3], [1, 2, 0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     partition_to_disk(graph, folder, 2).edges
    [2, 1]
    """
    count = check_count(num_parts, "num_parts", 1, MAX_PARTS + 1)
    if method not in METHODS:
        raise ArgumentValueError(explain("method", f"one of {METHODS}", repr(method), 'leave it "contiguous"'))
    kind = _balance(method, balance)
    seed = check_count(seed, "seed", 0, 1 << 64)
    shown = check_flag(progress, "progress")
    room = parse_size(memory, "memory")
    if room < _LEAST_MEMORY:
        raise ArgumentValueError(explain("memory", f"at least {_LEAST_MEMORY} bytes", room, 'leave it "2G"'))
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentTypeError(explain("folder", "a path", type(folder).__name__, "pass a str or pathlib.Path"))
    where = os.fspath(folder)
    columns = graph_columns(graph)
    nodes = columns.num_nodes
    told = _owners(owners, method, nodes)
    sources = {name: row_column(rows, nodes, name) if rows is not None else None for name, rows in
               (("features", features), ("labels", labels))}  # fmt: skip
    ptr, indptr_checksum = _survey(columns, count, kind)
    request = Request(
        nodes, columns.num_edges, count, method, kind, seed if method in ("random", "metis") else 0,
        columns.index_dtype.newbyteorder("<").str, columns.edge_ids is not None,
        _rows(sources["features"]), _rows(sources["labels"]),
        indptr_checksum, 0 if told is None else _checksum(told),
    )  # fmt: skip
    os.makedirs(where, exist_ok=True)
    remedy = "free some space and run the same again: it goes on where it was"
    with locked(where), page_file.telling_room("folder", PartFileError, remedy):
        if finished(where):
            meta = read_meta(where)
            check_same(request, meta.request, "made")
            remove_journal(where)
            logger.info("partition: %s is finished, there is nothing to do", where)
            return meta
        journal = Journal.open(where, request)
        _check_room(where, request, journal)
        writer = PartWriter(where, request, columns, sources, ptr if method == "contiguous" else None, journal, room)
        if not journal.reached("rows"):
            writer.write_owners(ptr if method == "contiguous" else _assign(graph, columns, told, request, shown))
        return writer.run(shown)


def _balance(method: str, balance: str | None) -> str:
    """Return what contiguous parts are balanced by, nothing for others."""
    if method != "contiguous":
        if balance is not None:
            raise ArgumentValueError(explain("balance", f"nothing for {method!r}", repr(balance), "leave it out"))
        return ""
    if balance not in (None, "edges", "nodes"):
        raise ArgumentValueError(explain("balance", '"edges" or "nodes"', repr(balance), "leave it out"))
    return balance or "edges"


def _owners(owners: Any, method: str, nodes: int) -> Column | None:
    """Return the owners that were given, for the method that needs them."""
    if (owners is not None) != (method == "owners"):
        needs = 'the part of each node for method="owners", and nothing for others'
        raise ArgumentValueError(explain("owners", needs, f"method={method!r}", "pass both or neither"))
    if owners is None:
        return None
    column = row_column(owners, nodes, "owners")
    if len(column.shape) != 1 or (nodes and column.dtype.kind not in "iu"):
        needs, got = "integers [num_nodes]", f"{column.dtype} of shape {column.shape}"
        raise ArgumentValueError(explain("owners", needs, got, "pass the part of each node"))
    return column


def _survey(columns: GraphColumns, num_parts: int, balance: str) -> tuple[Ids, int]:
    """Return the bounds of contiguous parts, and the CRC-32 of indptr, which is checked on the way."""
    nodes, edges = columns.num_nodes, columns.num_edges
    shares = np.array([(i * (edges or nodes)) // num_parts for i in range(1, num_parts)], np.int64)
    cuts, checksum = np.zeros(num_parts - 1, np.int64), 0
    for begin in range(0, max(nodes, 1), _BOUNDS):
        end = min(begin + _BOUNDS, nodes)
        bounds = columns.bounds(begin, end + 1)
        own = bounds if end == nodes else bounds[:-1]  # the last of them is the first of the next piece
        checksum = crc_of(own, checksum)
        cuts += np.searchsorted(own, shares)
    if balance == "nodes" or edges == 0:
        cuts = np.array([(i * nodes) // num_parts for i in range(1, num_parts)], np.int64)
    return np.concatenate([[0], cuts, [nodes]]).astype(np.int64), checksum


def _assign(
    graph: GraphLike, columns: GraphColumns, told: Column | None, request: Request, progress: bool
) -> Iterator[Array]:
    """Give the part of each node, in pieces."""
    nodes, parts = request.num_nodes, request.num_parts
    if told is not None:
        for begin in range(0, nodes, _BOUNDS):
            piece = told.read(begin, min(begin + _BOUNDS, nodes))
            for _at, checked in checked_owners(piece, parts, begin):
                yield checked
    elif request.method == "random":
        # Raw Philox words, as for partition(...): NumPy promises them to stay the same in every version.
        words = np.random.Philox(key=request.seed)
        for begin in range(0, nodes, _BOUNDS):
            drawn = words.random_raw(min(_BOUNDS, nodes - begin)) >> np.uint64(32)
            yield (drawn * np.uint64(parts)) >> np.uint64(32)
    else:
        logger.info("partition: METIS holds the graph in memory, several times, whatever `memory` says")
        whole = CSRGraph.load(graph) if isinstance(graph, (str, os.PathLike)) else graph
        perm, ptr = partition(whole, parts, "metis", seed=request.seed, progress=progress)
        owners = np.empty(nodes, owner_dtype(parts))
        for part in range(parts):
            owners[perm[ptr[part] : ptr[part + 1]]] = part
        yield owners


def _rows(column: Column | None) -> Rows:
    return None if column is None else (column.dtype.newbyteorder("<").str, tuple(map(int, column.shape[1:])))


def _checksum(column: Column) -> int:
    checksum = 0
    for begin in range(0, column.shape[0], _BOUNDS):
        checksum = crc_of(column.read(begin, min(begin + _BOUNDS, column.shape[0])), checksum)
    return checksum


def _check_room(folder: str, request: Request, journal: Journal) -> None:
    """Raise PartFileError if the disk has less room than the files will take; what is there already counts."""
    # How nodes and edges are spread does not matter to the sum but for the pages of headers.
    nodes, edges = [request.num_nodes], [request.num_edges]
    files = array_files(request, nodes, edges).values()
    per_part = sum(file.part == 0 for file in files)
    need = sum(file.num_bytes for file in files) + request.num_parts * (per_part * page_file.PAGE + 8)
    there = sum(entry.stat().st_size for entry in _files_below(folder))
    free = shutil.disk_usage(folder).free
    if need - there > free:
        needs = f"{need - there} bytes of room on its disk"
        raise PartFileError(explain("folder", needs, f"{free}", "free some space, or use another disk"))
    logger.info("partition: writing %d MiB to %s, from stage %s on", need >> 20, folder, journal.state.stage)


def _files_below(folder: str) -> Iterator[os.DirEntry[str]]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(entry.path)
        elif entry.is_file(follow_symlinks=False):
            yield entry


