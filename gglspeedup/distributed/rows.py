"""Rows of nodes that lie with their owners: asked for once each, sent back, and put where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, host_ids
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Ids, offsets_of
from gglspeedup.distributed.part import GraphPart
from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.memory import BufferPool
from gglspeedup.sampler_cpu import DENSE_NODES
from gglspeedup.sampler_cpu import Workspace as Workspace
from gglspeedup.threads import announce_compilation, launching, numba

Array = npt.NDArray[Any]

_NO_IDS = np.empty(0, np.int64)


class Source(NamedTuple):
    """Where a rank takes rows of its part from.

    Attributes
    ----------
    own : function
        Of rows of this part: an array, and which of its rows they are; None for one after the other.
    send : function
        Of rows of this part: those rows, contiguous, of the dtype and shape that all ranks have.
    """

    own: Callable[[Ids], tuple[Array, Ids | None]]
    send: Callable[[Ids], Array]


class Asked(NamedTuple):
    """What this rank wants of the others and they of it, once they have told each other.

    Attributes
    ----------
    bounds : int64 array [lists + 1]
        Where each list of nodes begins in what follows.
    ids, kind, place : array [n]
        The nodes; which of own, cached and remote each is, as `kernels.ranks_cpu` numbers them; its cell in the cache,
        or its place among the requests. They are scratch memory, which the next request overwrites.
    moved : int64 array [requests]
        Where in the answers that of each request is.
    wanted : int64 array
        The rows of this part that others want, by rank.
    sends, gets : int64 array [size]
        How many rows each rank is sent, and sends.
    """

    bounds: Ids
    ids: Ids
    kind: npt.NDArray[np.uint8]
    place: Ids
    moved: Ids
    wanted: Ids
    sends: Ids
    gets: Ids

    def served(self) -> Ids:
        """Return how many of the nodes are own, cached and remote, int64 [3]."""
        return np.bincount(self.kind, minlength=3)


class Cache:
    """Copies of rows that other ranks own.

    Parameters
    ----------
    nodes : int64 array [n]
        Unique.
    rows : C-contiguous array [n, ...]
        Theirs, of the host or of a device.
    """

    def __init__(self, nodes: Ids, rows: Array) -> None:
        from gglspeedup.kernels.sample_cpu import insert_nodes

        self.rows = rows
        space = Workspace(0, True, np.int64)
        if len(nodes):
            space.reserve(len(nodes), 0, nodes)
            insert_nodes(0, len(nodes), 1, space.keys, space.table, nodes)
        self.keys, self.table = space.keys, space.table


class RowExchange:
    """Fetches rows of any nodes for each rank, together with the other ranks.

    Parameters
    ----------
    book : PartBook
        Who owns which row; rank i owns part i.
    collective : Collective
        Of the ranks.

    Attributes
    ----------
    book, collective
        As given.
    id_dtype : dtype
        What ids travel as: int32 where those of all nodes fit.
    """

    def __init__(self, book: PartBook, collective: Collective) -> None:
        numba()
        self.book, self.collective = book, collective
        self.id_dtype = np.dtype(np.int32 if book.num_nodes <= np.iinfo(np.int32).max else np.int64)
        self._space = Workspace(book.num_nodes, book.num_nodes > DENSE_NODES, np.int64)
        self._pool = BufferPool()

    def fetch(
        self, step: str, n_ids: Sequence[Any], sources: Sequence[Source], cache: Cache | None = None
    ) -> tuple[list[list[Array]], Ids]:  # fmt: skip
        """Return the rows of some nodes, of several matrices at once; collective.

        Parameters
        ----------
        step : str
            What this is, in errors; the same on all ranks.
        n_ids : sequence of int array-like or tensor [n]
            Lists of nodes of the whole graph, also repeated; each rank has its own, and any number of them. A node
            that several lists have is asked for once.
        sources : sequence of Source
            A matrix each; the same ones on all ranks.
        cache : Cache, optional
            Where to look before asking others, if there is one source.

        Returns
        -------
        list of list of array [n, ...]
            Of each list of nodes the rows of each source: buffers of their own, 64-byte aligned.
        int64 array [3]
            How many of the nodes are own, cached and remote.
        """
        from gglspeedup.kernels import ranks_cpu as kernels

        announce_compilation(kernels.gather_mixed)
        asked = self.ask(step, n_ids, cache)
        _, ids, kind, place, moved, wanted, sends, gets = asked
        answers = [source.send(wanted) for source in sources]
        received = self.collective.exchange("rows", _beside(answers), sends, gets)
        mine = np.flatnonzero(kind == kernels.OWN)
        own_rows = self.book.rows_of(self.collective.rank, ids[mine])
        outs: list[list[Array]] = [[] for _ in n_ids]
        begin = 0
        for source, answer in zip(sources, answers, strict=True):
            width = _row_bytes(answer)
            theirs = received if len(sources) == 1 else np.ascontiguousarray(received[:, begin : begin + width])
            begin += width
            matrix, rows = source.own(own_rows)
            place[mine] = np.arange(len(mine)) if rows is None else rows
            for index, out in enumerate(outs):
                first, last = asked.bounds[index : index + 2]
                out.append(self._pool.empty((int(last - first), *answer.shape[1:]), answer.dtype))
                with launching():
                    kernels.gather_mixed(
                        kind[first:last], place[first:last], moved, matrix.ctypes.data,
                        0 if cache is None else cache.rows.ctypes.data, theirs.ctypes.data, out[-1].ctypes.data, width,
                    )  # fmt: skip
        return outs, asked.served()

    def ask(self, step: str, n_ids: Sequence[Any], cache: Cache | None) -> Asked:
        """Tell each rank which of its rows are wanted; collective. The arguments are those of :meth:`fetch`."""
        collective, rank = self.collective, self.collective.rank
        plan: list[tuple[Ids, npt.NDArray[np.uint8], Ids, Array, Ids, Ids]] = []
        lists: list[Ids] = []

        def ask() -> Ids:
            for n_id in n_ids:
                lists.append(host_ids(n_id, "n_id"))
                check_range(lists[-1], self.book.num_nodes, "n_id")
            plan.append(self._plan(lists[0] if len(lists) == 1 else np.concatenate([*lists, _NO_IDS]), cache))
            return plan[0][-1][:, None]

        asked = collective.counts(step, ask)[:, 0]
        ids, kind, place, sent, moved, counts = plan[0]
        wanted = collective.exchange("ids", sent, counts, asked).astype(np.int64, copy=False)
        wanted = self.book.rows_of(rank, wanted)
        return Asked(offsets_of([len(nodes) for nodes in lists]), ids, kind, place, moved, wanted, asked, counts)

    def _plan(self, ids: Ids, cache: Cache | None) -> tuple[Ids, npt.NDArray[np.uint8], Ids, Array, Ids, Ids]:
        """Return the ids, where each row comes from, and the requests: nodes, by owner, where each is, and counts."""
        from gglspeedup.kernels import ranks_cpu as kernels

        space, count = self._space, len(ids)
        base = space.begin()
        space.reserve(count, 0, ids)
        owners = self.book.owner_of(ids)
        kind, place = space.array("kind", count, np.uint8), space.array("place", count, np.int64)
        unique, owner_of_unique = space.array("unique", count, np.int64), space.array("owner", count, np.uint16)
        counts = np.empty(self.collective.size, np.int64)
        keys, table = (cache.keys, cache.table) if cache is not None else (np.empty(0, np.int64), np.empty(0, np.int32))
        found = kernels.list_requests(
            owners, self.collective.rank, ids, base, space.keys, space.table, keys, table, kind, place, counts,
            unique, owner_of_unique,
        )  # fmt: skip
        space.base = base + found
        sent, moved = np.empty(found, self.id_dtype), space.array("moved", found, np.int64)
        kernels.order_requests(unique[:found], owner_of_unique[:found], offsets_of(counts)[:-1].copy(), sent, moved)
        return ids, kind, place, sent, moved, counts


def _row_bytes(rows: Array) -> int:
    return rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))


def _beside(answers: Sequence[Array]) -> Array:
    """Return rows of several matrices that stand in one message: those of a node side by side, as bytes."""
    if len(answers) == 1:
        return answers[0]
    flat = [rows.reshape(-1).view(np.uint8).reshape(len(rows), _row_bytes(rows)) for rows in answers]
    return np.concatenate(flat, axis=1)


def book_of(part_or_book: GraphPart | PartBook) -> PartBook:
    """Return the book; raise ArgumentTypeError if it is neither a part nor a book."""
    if isinstance(part_or_book, GraphPart):
        return part_or_book.book
    if isinstance(part_or_book, PartBook):
        return part_or_book
    got = type(part_or_book).__name__
    raise ArgumentTypeError(explain("part_or_book", "a GraphPart or a PartBook", got, "pass the sampler's part"))
