"""The hops of batches on a graph in parts, several batches at a time: the requester's half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, duplicate
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Ids, offsets_of
from gglspeedup.distributed.owner import Owner, Rows, request_lengths, write_header
from gglspeedup.memory import BufferPool
from gglspeedup.sampler_cpu import DENSE_NODES, Hop
from gglspeedup.sampler_cpu import Workspace as Workspace

Array = npt.NDArray[Any]


class _Batch:
    """A batch in the making: its nodes so far, their local ids, and its hops."""

    def __init__(self, space: Workspace, seeds: Ids, number: int, num_nodes: int, dtype: np.dtype[Any]) -> None:
        from gglspeedup.kernels.sample_cpu import insert_nodes

        check_range(seeds, num_nodes, "seeds")
        self.number, self.space, self.base = number, space, space.begin()
        self.nodes = space.grown("nodes", 0, len(seeds), dtype)
        self.nodes[: len(seeds)] = seeds
        space.reserve(len(seeds), 0, self.nodes)
        repeated = insert_nodes(0, len(seeds), self.base, space.keys, space.table, self.nodes)
        if repeated >= 0:
            raise duplicate("seeds", repeated, int(seeds[repeated]))
        self.low, self.count = 0, len(seeds)
        self.hops: list[Hop] = []
        self.owners = np.empty(0, np.uint16)


class Batches:
    """Makes batches together with the other ranks.

    Parameters
    ----------
    owner : Owner
        Draws the rows of this rank's part.
    collective : Collective
        Whose ranks hold the parts.
    """

    def __init__(self, owner: Owner, collective: Collective) -> None:
        self._owner, self._collective = owner, collective
        self._book = owner.part.book
        self._pool = BufferPool()
        self._space = Workspace(0, True, owner.id_dtype)  # for what all batches share
        self._spaces: list[Workspace] = []
        self._made: list[_Batch] = []
        self._sizes: tuple[int, ...] = ()

    def begin(self, given: Sequence[tuple[Ids, int]], sizes: tuple[int, ...]) -> Ids:
        """Start batches of (seeds, batch number), and return the counts of the first hop's requests.

        Raises
        ------
        ArgumentIndexError, ArgumentValueError
            A seed is out of range, or stands twice.
        """
        self._sizes = sizes
        hashed, dtype = self._book.num_nodes > DENSE_NODES, self._owner.id_dtype
        while len(self._spaces) < len(given):
            self._spaces.append(Workspace(self._book.num_nodes, hashed, dtype))
        # After an error workspaces are dropped: their tables may hold local ids of the batch that failed.
        spaces, self._spaces = self._spaces, []
        self._made = [
            _Batch(space, seeds, number, self._book.num_nodes, dtype)
            for space, (seeds, number) in zip(spaces, given, strict=False)
        ]
        self._spaces = spaces[len(given) :]
        return self._deal()

    def _deal(self) -> Ids:
        """Find the owners of all rows to expand; return how many rows each is asked for, and of how many batches."""
        from gglspeedup.kernels.ranks_cpu import count_owners

        size = self._collective.size
        self._rows = np.zeros((size, len(self._made)), np.int64)
        for index, batch in enumerate(self._made):
            batch.owners = self._book.owner_of(batch.nodes[batch.low : batch.count])
            counts = np.empty(size, np.int64)
            count_owners(batch.owners, counts)
            self._rows[:, index] = counts
        return np.stack([self._rows.sum(1), np.full(size, len(self._made))], 1)

    def sample(
        self, prepare: Callable[[], Ids], seed: int, replace: bool, frontier: bool
    ) -> list[tuple[Array, list[Hop]]]:
        """Return n_id and the hops of each batch, outermost first.

        Parameters
        ----------
        prepare : function
            Calls :meth:`begin` and returns what that does.
        seed, replace
            Of the draws.
        frontier : bool
            Whether a hop expands the nodes alone that the last one found.
        """
        collective, hop = self._collective, 0
        self._sizes = ()
        while True:
            make = prepare if hop == 0 else self._deal
            asked = collective.counts(f"sampling, hop {hop + 1}", make)
            self._hop(hop, self._sizes[hop], asked, seed, replace)
            for batch in self._made:
                batch.low = batch.hops[-1][2][1] if frontier else 0
            hop += 1
            if hop == len(self._sizes):
                return self._finish()

    def _hop(self, hop: int, fanout: int, asked: Ids, seed: int, replace: bool) -> None:
        collective, owner = self._collective, self._owner
        requests, lengths = self._requests()
        incoming = request_lengths(asked[:, 0], asked[:, 1])
        received = collective.exchange("ids", requests, lengths, incoming)
        drawn: list[Rows] = []
        edges_of = np.zeros(collective.size, np.int64)

        def draw() -> Ids:
            from gglspeedup.kernels.ranks_cpu import sum_blocks

            drawn.append(owner.draw(received, offsets_of(incoming), asked[:, 1], hop, fanout, seed, replace))
            sum_blocks(drawn[0].counts, offsets_of(asked[:, 0]), edges_of)
            return edges_of[:, None]

        step = f"sampling, hop {hop + 1} of fanouts {list(self._sizes)}"
        edges = collective.counts(step, draw)[:, 0]
        own, rows = collective.rank, self._rows.sum(1)
        answers = owner.pack(drawn[0], asked[:, 0], edges_of, fanout, own)
        sent = owner.answer_words(asked[:, 0], edges_of, fanout)
        words = owner.answer_words(rows, edges, fanout)
        sent[own] = words[own] = 0  # what this rank has asked itself for is taken from what was drawn
        answered = collective.exchange("rows", answers, sent, words)
        begins = offsets_of(words)
        parts = [
            owner.views(answered[begins[rank] : begins[rank + 1]], int(rows[rank]), int(edges[rank]), fanout)
            for rank in range(collective.size)
            if rank != own
        ]
        first, edge = int(asked[:own, 0].sum()), int(edges_of[:own].sum())
        last, end = first + int(rows[own]), edge + int(edges[own])
        parts.insert(own, Rows(drawn[0].counts[first:last], drawn[0].neighbours[edge:end], drawn[0].e_ids[edge:end]))
        columns = zip(Rows._fields, zip(*parts, strict=True), strict=True)
        self._take(Rows(*(self._joined(name, pieces) for name, pieces in columns)))

    def _joined(self, name: str, pieces: Sequence[Array]) -> Array:
        out = self._space.array(name, sum(map(len, pieces)), pieces[0].dtype)
        return np.concatenate(pieces, out=out)

    def _requests(self) -> tuple[Array, Ids]:
        """Return the requests to all ranks, this one included, and their lengths."""
        from gglspeedup.kernels.ranks_cpu import deal_out

        lengths = request_lengths(self._rows.sum(1), len(self._made))
        begins = offsets_of(lengths)
        message = np.empty(int(begins[-1]), self._owner.id_dtype)
        cursors = np.zeros(self._rows.shape, np.int64)
        for rank in np.flatnonzero(lengths):
            request = message[begins[rank] : begins[rank + 1]]
            nodes = write_header(request, [batch.number for batch in self._made], self._rows[rank])
            cursors[rank] = begins[rank + 1] - len(nodes) + offsets_of(self._rows[rank])[:-1]
        for index, batch in enumerate(self._made):
            deal_out(batch.owners, batch.nodes, batch.low, np.ascontiguousarray(cursors[:, index]), message)
        return message, lengths

    def _take(self, rows: Rows) -> None:
        """Add a hop to each batch, of rows that lie by owner, and for each owner by batch."""
        from gglspeedup.kernels.ranks_cpu import put_in_order, sum_blocks

        size, batches = self._rows.shape
        bounds = offsets_of(self._rows.ravel())
        edges = np.empty(size * batches, np.int64)
        sum_blocks(rows.counts, bounds, edges)
        row_cursors = bounds[:-1].reshape(size, batches)
        edge_cursors = offsets_of(edges)[:-1].reshape(size, batches)
        edges = edges.reshape(size, batches).sum(0)
        dtype = self._owner.id_dtype
        for index, batch in enumerate(self._made):
            space, high, count = batch.space, batch.count, int(edges[index])
            most = min(high + count, self._book.num_nodes)
            batch.nodes = space.grown("nodes", high, most + 1, dtype)
            space.reserve(most, high, batch.nodes)
            edge_index, e_id = self._pool.empty_pair((2, count), (count,), np.int64)
            batch.count = put_in_order(
                batch.owners, batch.low, high, rows.counts, rows.neighbours, rows.e_ids,
                np.ascontiguousarray(row_cursors[:, index]), np.ascontiguousarray(edge_cursors[:, index]),
                np.int32(batch.base), space.keys, space.table, space.array("neighbour", count, dtype), batch.nodes,
                e_id, edge_index[0], edge_index[1],
            )  # fmt: skip
            batch.hops.append((edge_index, e_id, (batch.count, high)))

    def _finish(self) -> list[tuple[Array, list[Hop]]]:
        made, self._made = self._made, []
        results = []
        for batch in made:
            batch.space.base = batch.base + batch.count
            self._spaces.append(batch.space)
            n_id = self._pool.empty((batch.count,), np.int64)
            n_id[:] = batch.nodes[: batch.count]
            results.append((n_id, batch.hops[::-1]))
        return results
