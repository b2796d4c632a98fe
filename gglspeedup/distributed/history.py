"""`DistHistory`: histories whose rows lie on several ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gglspeedup
from gglspeedup.arguments import check_flag
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Communicator, Ids, check_concurrent
from gglspeedup.distributed.part import GraphPart
from gglspeedup.distributed.rows import book_of
from gglspeedup.distributed.sampler import check_parts
from gglspeedup.distributed.table import DistTable, Talk, copied
from gglspeedup.history.store import HistoryStore, Staleness

_DEPTH = 4  # pulls of each table that wait at once


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
    background : bool
        Whether :meth:`prefetch` and :meth:`DistTable.pull_async` leave the exchange to a thread, which goes on while
        the caller computes. The communicator must then be used by nothing else: make one for the histories alone, such
        as another ``MpiCommunicator()``. The same on all ranks.

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
        background: bool = False,
    ) -> None:  # fmt: skip
        collective = self._collective = Collective(communicator)

        def make() -> Ids:
            if check_flag(background, "background"):
                check_concurrent(communicator, "background")
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
                "background": background,
                "pushes": [table.pushes for table in store],
            }
            index = part_or_book.index if isinstance(part_or_book, GraphPart) else collective.rank
            said = collective.same("DistHistory", facts, {"part": index})
            check_parts([own["part"] for own in said], book.num_parts, collective.size)
        self._talk = Talk(book, collective, _DEPTH * len(store), background)
        self._tables = [DistTable(self._talk, table, index) for index, table in enumerate(store)]

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
        return Staleness.of(self.age(n_id, table))

    def prefetch(self, n_id: Any) -> None:
        """Start the pulls of all tables, in the messages of one; collective.

        The next ``histories[l].pull(n_id)`` of the same nodes returns the rows as they are now, without asking other
        ranks; later pushes are not seen.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes, also repeated; none, if other ranks prefetch and this one does not.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            They are no node ids, or out of range; the other ranks raise RankError. With ``background=True`` the next
            pull says so.
        """
        nodes = copied(n_id, self.book.num_nodes)
        reads = [table.read for table in self._tables]
        pending = self._talk.start("DistHistory.prefetch", n_id if nodes is None else nodes, reads)
        for place, table in enumerate(self._tables):
            table.expect(nodes, pending, place)

    def synchronize(self) -> None:
        """Wait for what this rank does in the background; raise what the writing of its rows has raised."""
        self._talk.lane.drain()
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

        def save() -> None:
            with self._collective.together():
                self._collective.counts("DistHistory.save", write)
                self._collective.counts("DistHistory.save, renaming", rename)

        self._talk.lane.run(save)

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

        def restore() -> None:
            with self._collective.together():
                self._collective.counts("DistHistory.restore", read)
                self._collective.same("DistHistory.restore", {"pushes": [table.pushes for table in self._store]})

        self._talk.lane.run(restore)
        for table in self._tables:
            table.forget()

    def traffic(self) -> dict[str, dict[str, int]]:
        """Return what this rank has sent to others and received: bytes of counts, ids and rows, and messages."""
        return self._collective.traffic_by_kind()

    def close(self) -> None:
        """Finish what was started, and the writing of this rank's rows; may be called again."""
        self._talk.lane.close()
        self._store.close()

    def __enter__(self) -> DistHistory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"rank {self._collective.rank} of {self._collective.size}"
        return f"DistHistory({where}, {self.book.num_nodes} nodes, {list(self.dims)}, dtype={self.dtype!r})"


def _file(folder: str | os.PathLike[str], collective: Collective) -> Path:
    return Path(folder) / f"histories-{collective.rank:05d}-of-{collective.size:05d}.bin"
