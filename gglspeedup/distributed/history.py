"""`DistHistory`: histories whose rows lie on several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gglspeedup
from gglspeedup.arguments import check_range, host_array, host_ids
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Communicator, Ids, offsets_of
from gglspeedup.distributed.part import GraphPart
from gglspeedup.distributed.rows import RowExchange, book_of
from gglspeedup.distributed.sampler import check_parts
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.history.store import HistoryStore, Staleness
from gglspeedup.history.table import History
from gglspeedup.history.tables_cpu import check_values
from gglspeedup.interchange import integer_view

Array = npt.NDArray[Any]


class DistHistory:
    """Tables of rows that the batches of all ranks push to and pull from; each row lies with its node's owner.

    All ranks push and pull together, in the same order. A pull sees every push made before it, of any rank. One round
    of pushes counts as one, and is as if the ranks had pushed one after the other: of rows for the same node that of
    the highest rank stays, and of one rank's the last.

    Parameters
    ----------
    part_or_book : GraphPart or PartBook
        Who owns which row; rank i has part i.
    communicator : Communicator
        Of all ranks; to be used by one thread at a time.
    dims : sequence of int
        The width of each table; the same on all ranks.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``; the same on all ranks.
    storage, path
        As HistoryStore's, of the rows of this rank.

    Raises
    ------
    RankError
        Ranks have different partitions, dims or dtypes; all ranks say so.
    CommunicatorError
        A rank has died, or did not come.
    ArgumentTypeError, ArgumentValueError, HistoryFileError
        As HistoryStore; the other ranks raise RankError.

    Examples
    --------
    >>> from gglspeedup.distributed import DistHistory, LocalCommunicator, PartBook
    >>> histories = DistHistory(PartBook.contiguous([0, 3]), LocalCommunicator(), [2])
    >>> histories[0].push([[1.0, 2.0]], n_id=[2])
    >>> histories[0].pull([2, 0]).tolist(), histories.age([2, 0]).tolist()
    ([[1.0, 2.0], [0.0, 0.0]], [0, -1])
    """

    def __init__(
        self, part_or_book: GraphPart | PartBook, communicator: Communicator, dims: Sequence[int], *,
        dtype: str = "float32", storage: str = "auto", path: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        collective = self._collective = Collective(communicator)

        def make() -> Ids:
            self.book = book_of(part_or_book)
            rows = self.book.count_of(collective.rank) if collective.rank < self.book.num_parts else 0
            self._store = HistoryStore(rows, dims, "cpu", storage=storage, dtype=dtype, path=path)
            return np.empty((collective.size, 0), np.int64)

        with collective.together():
            collective.counts("DistHistory(...)", make)
            book, store = self.book, self._store
            facts = {
                "version": gglspeedup.__version__,
                "nodes": book.num_nodes,
                "parts": book.num_parts,
                "partition": book.checksum(),
                "dims": list(store.dims),
                "dtype": store.dtype,
                "pushes": [table.pushes for table in store],
            }
            index = part_or_book.index if isinstance(part_or_book, GraphPart) else collective.rank
            said = collective.same("DistHistory", facts, {"part": index})
            check_parts([own["part"] for own in said], book.num_parts, collective.size)
        exchange = RowExchange(book, collective)
        self._tables = [DistTable(book, collective, exchange, table, i) for i, table in enumerate(store)]

    @property
    def dims(self) -> tuple[int, ...]:
        """The width of each table."""
        return self._store.dims

    @property
    def dtype(self) -> str:
        """What rows are stored as."""
        return self._store.dtype

    def __getitem__(self, table: int) -> DistTable:
        """Return a table."""
        return self._tables[table]

    def __len__(self) -> int:
        """Return the number of tables."""
        return len(self._tables)

    def __iter__(self) -> Iterator[DistTable]:
        return iter(self._tables)

    def age(self, n_id: Any = None, table: int = 0) -> Ids:
        """Return how many rounds of pushes ago each row was written, int64; -1 for never; collective.

        Parameters
        ----------
        n_id : int array-like or tensor, optional
            Nodes; by default all of the graph.
        table : int
            Which table.
        """
        return self._tables[table].age(n_id)

    def staleness(self, n_id: Any = None, table: int = 0) -> Staleness:
        """Return a summary of :meth:`age`; collective."""
        age = self.age(n_id, table)
        known = age[age >= 0]
        if not len(known):
            return Staleness(0.0, 0, len(age))
        return Staleness(float(known.mean()), int(known.max()), len(age) - len(known))

    def synchronize(self) -> None:
        """Wait for the writing of this rank's rows; raise what it has raised in the background."""
        self._store.synchronize()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the rows of each rank to a file of the folder, which all ranks see or each has its own; collective.

        Files that were there before are replaced once all ranks have written theirs.

        Raises
        ------
        HistoryFileError, OSError
            This rank could not write its file; the other ranks raise RankError.
        """
        file = _file(folder, self._collective)
        new = file.with_suffix(".new")

        def write() -> Ids:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._store.save(new)
            return np.empty((self._collective.size, 0), np.int64)

        def rename() -> Ids:
            os.replace(new, file)
            return np.empty((self._collective.size, 0), np.int64)

        with self._collective.together():
            self._collective.counts("DistHistory.save", write)
            self._collective.counts("DistHistory.save, renaming", rename)

    def restore(self, folder: str | os.PathLike[str]) -> None:
        """Take the rows and ages that :meth:`save` has written with as many ranks and the same partition; collective.

        Raises
        ------
        HistoryFileError, OSError
            The file of this rank is not there, is damaged or of other sizes; the other ranks raise RankError.
        RankError
            The files are not of one save.
        """

        def read() -> Ids:
            self._store.restore(_file(folder, self._collective))
            return np.empty((self._collective.size, 0), np.int64)

        with self._collective.together():
            self._collective.counts("DistHistory.restore", read)
            self._collective.same("DistHistory.restore", {"pushes": [table.pushes for table in self._store]})

    def traffic(self) -> dict[str, dict[str, int]]:
        """Return what this rank has sent to others and received: bytes of counts, ids and rows, and messages."""
        return self._collective.traffic_by_kind()

    def close(self) -> None:
        """Finish the writing of this rank's rows; may be called again."""
        self._store.close()

    def __enter__(self) -> DistHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"rank {self._collective.rank} of {self._collective.size}"
        return f"DistHistory({where}, {self.book.num_nodes} nodes, {list(self.dims)}, dtype={self.dtype!r})"


class DistTable:
    """One table: a row for each node of the graph."""

    def __init__(
        self, book: PartBook, collective: Collective, exchange: RowExchange, table: History, index: int
    ) -> None:
        self._book, self._collective, self._exchange, self._table = book, collective, exchange, table
        self._name = f"DistHistory[{index}]"

    @property
    def pushes(self) -> int:
        """The number of rounds of pushes so far."""
        return self._table.pushes

    @property
    def shape(self) -> tuple[int, int]:
        """Nodes of the graph, and the width of a row."""
        return self._book.num_nodes, self._table.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """What rows are stored as."""
        return self._table.dtype

    def push(self, values: Any, n_id: Any = None, *, offset: Any = None, count: Any = None) -> None:
        """Write rows; collective.

        Parameters
        ----------
        values : array or tensor [n, dim]
            Of any framework and any real dtype; none, if other ranks push and this one does not.
        n_id : int array-like or tensor [n], optional
            The rows' nodes.
        offset, count : int array-like, optional
            Instead of `n_id`: the first nodes and the lengths of contiguous ranges.

        Raises
        ------
        ArgumentIndexError, ArgumentTypeError, ArgumentValueError
            As History.push; the other ranks raise RankError, and nothing is written.
        """
        collective, book = self._collective, self._book
        sent: list[tuple[Array, Array, Ids]] = []

        def sort() -> Ids:
            nodes = _nodes(n_id, offset, count)
            check_range(nodes, book.num_nodes, "n_id")
            given = host_array(values, "values")
            if given.size == 0 and len(nodes) == 0:
                given = np.empty((0, self.shape[1]), self.dtype)
            check_values(given, (len(nodes), self.shape[1]))
            owners = book.owner_of(nodes)
            order = np.argsort(owners, kind="stable")
            rows = np.ascontiguousarray(given[order], self.dtype)
            counts = np.bincount(owners, minlength=collective.size)
            ids = nodes[order].astype(self._exchange.id_dtype)
            sent.append((ids, integer_view(rows)[0], counts))
            return counts[:, None]

        with collective.together():
            incoming = collective.counts(f"{self._name}.push", sort)[:, 0]
            nodes, rows, counts = sent[0]
            theirs = collective.exchange("ids", nodes, counts, incoming)
            written = collective.exchange("rows", rows, counts, incoming)
            self._table.push(written.view(self.dtype), book.rows_of(collective.rank, theirs))

    def pull(self, n_id: Any) -> Any:
        """Return rows; collective.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes, also repeated; none, if other ranks pull and this one does not.

        Returns
        -------
        array [n, dim]
            Zeros where nothing was pushed. A buffer of its own, 64-byte aligned.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            They are no node ids, or out of range; the other ranks raise RankError.
        """
        return self._fetch(f"{self._name}.pull", n_id, self._table.pull).view(self.dtype)

    def age(self, n_id: Any = None) -> Ids:
        """Return how many rounds of pushes ago each row was written, int64; -1 for never; collective."""
        nodes = np.arange(self._book.num_nodes) if n_id is None else n_id
        return self._fetch(f"{self._name}.age", nodes, self._table.age)

    def _fetch(self, step: str, n_id: Any, read: Any) -> Any:
        def rows_of(rows: Ids) -> Array:
            return integer_view(read(rows))[0]

        with self._collective.together():
            return self._exchange.fetch(step, n_id, lambda rows: (rows_of(rows), None), rows_of)[0]

    def __repr__(self) -> str:
        return f"DistTable(shape={self.shape}, dtype={self.dtype}, {self.pushes} rounds of pushes)"


def _nodes(n_id: Any, offset: Any, count: Any) -> Ids:
    """Return the nodes of a push, of a list or of ranges."""
    if (n_id is None) == (offset is None) or (offset is None) != (count is None):
        remedy = "call push(values, n_id) or push(values, offset=[...], count=[...])"
        raise ArgumentTypeError(explain("n_id", "to be given, or offset and count", "another combination", remedy))
    if n_id is not None:
        return host_ids(n_id, "n_id")
    begins, lengths = host_ids(offset, "offset"), host_ids(count, "count")
    if len(begins) != len(lengths) or bool((lengths < 0).any()):
        needs = f"a length for each of {len(begins)} ranges"
        raise ArgumentValueError(explain("count", needs, f"{lengths.tolist()}", "pass lists of the same length"))
    within = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return np.repeat(begins, lengths) + within


def _file(folder: str | os.PathLike[str], collective: Collective) -> Path:
    return Path(folder) / f"histories-{collective.rank:05d}-of-{collective.size:05d}.bin"
