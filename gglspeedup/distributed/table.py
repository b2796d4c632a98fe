"""One table of histories whose rows lie on several ranks, and the calls of all tables to the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, host_array, host_ids
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Ids, offsets_of
from gglspeedup.distributed.rows import RowExchange, Source
from gglspeedup.errors import GGLSpeedupError
from gglspeedup.history.lane import Lane
from gglspeedup.history.table import History, PendingPull, checked_ranges, names_nodes
from gglspeedup.history.tables_cpu import check_values
from gglspeedup.interchange import integer_view

Array = npt.NDArray[Any]
Read = Callable[[Ids], Array]  # rows of this part -> what a table has there


class Talk:
    """What the tables of a rank share: their calls to the other ranks, made in the order given.

    Parameters
    ----------
    book : PartBook
        Who owns which row.
    collective : Collective
        Of the ranks.
    depth : int
        The most pulls that wait at once.
    background : bool
        Whether pulls that are started are left to a thread.
    """

    def __init__(self, book: PartBook, collective: Collective, depth: int, background: bool) -> None:
        self.book, self.collective, self.background = book, collective, background
        self.lane = Lane(depth)
        self._exchange = RowExchange(book, collective)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """What ids travel as."""
        return self._exchange.id_dtype

    def fetch(self, step: str, n_id: Any, reads: Sequence[Read]) -> list[Array]:
        """Return the rows of some nodes, of a table each; collective."""
        found: list[Array] = self.lane.run(partial(self._fetch, step, n_id, reads))
        return found

    def start(self, step: str, n_id: Any, reads: Sequence[Read]) -> Future[list[Array]]:
        """Do what :meth:`fetch` does, in the background if there is one; collective."""
        if self.background:
            return self.lane.submit(partial(self._fetch, step, n_id, reads), awaited=True)
        done: Future[list[Array]] = Future()
        done.set_result(self.fetch(step, n_id, reads))
        return done

    def _fetch(self, step: str, n_id: Any, reads: Sequence[Read]) -> list[Array]:
        with self.collective.together():
            (found,), _ = self._exchange.fetch(step, [n_id], [_source(read) for read in reads])
        return found


def _source(read: Read) -> Source:
    def rows_of(rows: Ids) -> Array:
        array: Array = integer_view(read(rows))[0]
        return array

    return Source(lambda rows: (rows_of(rows), None), rows_of)


class DistTable:
    """One table: a row for each node of the graph."""

    def __init__(self, talk: Talk, table: History, index: int) -> None:
        self._talk, self._table = talk, table
        self._name = f"DistHistory[{index}]"
        self._ahead: tuple[Ids | None, PendingPull] | None = None

    @property
    def pushes(self) -> int:
        """The number of rounds of pushes so far."""
        return self._table.pushes

    @property
    def shape(self) -> tuple[int, int]:
        """Nodes of the graph, and the width of a row."""
        return self._talk.book.num_nodes, self._table.shape[1]

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
        self._talk.lane.run(lambda: self._push(values, n_id, offset, count))

    def _push(self, values: Any, n_id: Any, offset: Any, count: Any) -> None:
        collective, book = self._talk.collective, self._talk.book
        sent: list[tuple[Array, Array, Ids]] = []

        def sort() -> Ids:
            nodes = _nodes(n_id, offset, count, book.num_nodes)
            given = host_array(values, "values")
            if given.size == 0 and len(nodes) == 0:
                given = np.empty((0, self.shape[1]), self.dtype)
            check_values(given, (len(nodes), self.shape[1]))
            owners = book.owner_of(nodes)
            order = np.argsort(owners, kind="stable")
            rows = np.ascontiguousarray(given[order], self.dtype)
            counts = np.bincount(owners, minlength=collective.size)
            ids = nodes[order].astype(self._talk.id_dtype)
            sent.append((ids, integer_view(rows)[0], counts))
            return counts[:, None]

        with collective.together():
            incoming = collective.counts(f"{self._name}.push", sort)[:, 0]
            nodes, rows, counts = sent[0]
            theirs = collective.exchange("ids", nodes, counts, incoming)
            written = collective.exchange("rows", rows, counts, incoming)
            self._table.push(written.view(self.dtype), book.rows_of(collective.rank, theirs))

    def pull(self, n_id: Any) -> Any:
        """Return rows; collective, unless they are there since the last :meth:`DistHistory.prefetch`.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes, also repeated; none, if other ranks pull and this one does not. If they are those of the last
            prefetch, what it brought is returned: so either all ranks pull what they have prefetched, or none does.

        Returns
        -------
        array [n, dim]
            Zeros where nothing was pushed. A buffer of its own, 64-byte aligned.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            They are no node ids, or out of range; the other ranks raise RankError.
        CommunicatorError
            Some ranks have pulled what they had prefetched, and others have not.
        """
        step = f"{self._name}.pull"
        if self._ahead is not None:
            nodes, pending = self._ahead
            if nodes is None or _are(nodes, n_id):  # None: it has failed, which this pull says
                self._ahead = None
                return pending.wait()
            step += " of other nodes than it has prefetched"
        return self._of_dtype(self._talk.fetch(step, n_id, [self.read])[0])

    def pull_async(self, n_id: Any) -> PendingPull:
        """Start a pull of rows as they are now; collective.

        Without ``background=True`` the rows are there when this returns.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            As that of :meth:`pull`.

        Returns
        -------
        PendingPull
            Its ``wait()``, which is not collective, returns the rows as :meth:`pull` does. With ``background=True`` it
            also raises what :meth:`pull` would have raised.
        """
        nodes = copied(n_id, self._talk.book.num_nodes)
        pending = self._talk.start(f"{self._name}.pull_async", n_id if nodes is None else nodes, [self.read])
        return self._pending(pending, 0)

    def age(self, n_id: Any = None) -> Ids:
        """Return how many rounds of pushes ago each row was written, int64; -1 for never; collective."""
        nodes = np.arange(self._talk.book.num_nodes) if n_id is None else n_id
        return self._talk.fetch(f"{self._name}.age", nodes, [self._table.age])[0]

    def read(self, rows: Ids) -> Array:
        """Return rows of this part, by their place in it."""
        found: Array = self._table.pull(rows)
        return found

    def expect(self, nodes: Ids | None, pending: Future[list[Array]], place: int) -> None:
        """Let the next :meth:`pull` of these nodes return what stands at a place of what is being fetched."""
        self._ahead = nodes, self._pending(pending, place)

    def forget(self) -> None:
        """Drop what was fetched ahead."""
        self._ahead = None

    def _pending(self, pending: Future[list[Array]], place: int) -> PendingPull:
        return PendingPull(pending, lambda found: self._of_dtype(found[place]))

    def _of_dtype(self, rows: Array) -> Array:
        return rows if rows.dtype == self.dtype else rows.view(self.dtype)

    def __repr__(self) -> str:
        return f"DistTable(shape={self.shape}, dtype={self.dtype}, {self.pushes} rounds of pushes)"


def copied(n_id: Any, num_nodes: int) -> Ids | None:
    """Return a copy of ids of nodes; None of anything else, of which the ranks are told when they ask each other."""
    try:
        nodes = host_ids(n_id, "n_id").copy()
        check_range(nodes, num_nodes, "n_id")
    except GGLSpeedupError:
        return None
    return nodes


def _are(nodes: Ids, n_id: Any) -> bool:
    """Return whether ids are these nodes."""
    try:
        return np.array_equal(nodes, host_ids(n_id, "n_id"))
    except GGLSpeedupError:
        return False


def _nodes(n_id: Any, offset: Any, count: Any, num_nodes: int) -> Ids:
    """Return the nodes of a push, of a list or of ranges."""
    if names_nodes(n_id, offset, count):
        nodes = host_ids(n_id, "n_id")
        check_range(nodes, num_nodes, "n_id")
        return nodes
    begins, lengths = checked_ranges(offset, count, num_nodes)
    within = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
    return np.repeat(begins, lengths) + within
