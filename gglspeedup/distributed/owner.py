"""The part of a hop that owners do: drawing rows for all ranks, and what the messages about them look like.

A request to an owner lists, of each of the requester's batches, four numbers (batch and count, each its low and its
high 32 bits), then the nodes of the first batch, those of the second, and so on; all of the dtype of node ids. The
answer is whole 8-byte words: the edge ids of all rows, their neighbours, and the number of edges of each row, each
padded to a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.distributed.communicator import Ids, offsets_of
from gglspeedup.distributed.part import GraphPart
from gglspeedup.memory import kernel_view
from gglspeedup.sampler_cpu import Workspace as Workspace
from gglspeedup.threads import announce_compilation, launching, numba

Array = npt.NDArray[Any]

_HEADER = 4  # numbers of each batch in a request
_LOW = 0xFFFFFFFF


class Rows(NamedTuple):
    """Sampled rows: the number of edges of each, and the edges one row after the other."""

    counts: Array
    neighbours: Array
    e_ids: Array


def request_lengths(nodes: Ids, batches: int | Ids) -> Ids:
    """Return how long the requests are that ask for so many nodes of so many batches."""
    return np.where(nodes > 0, nodes + _HEADER * batches, 0)


def write_header(request: Array, numbers: Sequence[int], counts: Ids) -> Array:
    """Write the header of a request, and return where its nodes go."""
    header = np.empty((len(numbers), _HEADER), np.int64)
    header[:, 0], header[:, 1] = [number & _LOW for number in numbers], [number >> 32 for number in numbers]
    header[:, 2], header[:, 3] = counts & _LOW, counts >> 32
    request[: header.size] = header.ravel().astype(np.uint32).view(np.int32)
    return request[header.size :]


def read_header(request: Array, batches: int) -> tuple[Ids, Ids, Array]:
    """Return batch numbers, how many nodes of each there are, and the nodes."""
    header = request[: _HEADER * batches].astype(np.int64).reshape(batches, _HEADER) & _LOW
    return header[:, 0] | header[:, 1] << 32, header[:, 2] | header[:, 3] << 32, request[header.size :]


class Owner:
    """Draws the rows of one part.

    Parameters
    ----------
    part : GraphPart
        Not copied.
    edge_dtype : dtype
        Of edge ids in messages: int32 if all of the graph fit.
    """

    def __init__(self, part: GraphPart, edge_dtype: np.dtype[Any]) -> None:
        numba()
        self.part = part
        self.id_dtype, self.edge_dtype = part.indices.dtype, edge_dtype
        self._indptr, self._indices, self._start = (
            kernel_view(array) for array in (part.indptr, part.indices, part.start)
        )
        self._edge_ids = np.empty(0, np.int64) if part.edge_ids is None else kernel_view(part.edge_ids)
        self._space = Workspace(0, True, self.id_dtype)

    def draw(self, requests: Array, bounds: Ids, batches: Ids, hop: int, fanout: int, key: int, replace: bool) -> Rows:
        """Return the rows that requests ask for, in their order.

        Parameters
        ----------
        requests : array
            Those of all ranks, one after the other.
        bounds : int64 array [size + 1]
            Where each begins.
        batches : int64 array [size]
            How many batches each is about.
        hop, fanout, key, replace
            Of the draws.

        Returns
        -------
        Rows
            Buffers that are used again by the next draw.
        """
        from gglspeedup.kernels import ranks_cpu, sample_cpu

        announce_compilation(ranks_cpu.draw_rows)
        space = self._space
        numbers: list[Ids] = []
        counts: list[Ids] = []
        asked: list[Array] = []
        for rank in np.flatnonzero(np.diff(bounds)):
            of_rank = read_header(requests[bounds[rank] : bounds[rank + 1]], int(batches[rank]))
            numbers.append(of_rank[0])
            counts.append(of_rank[1])
            asked.append(of_rank[2])
        nodes = np.concatenate(asked) if asked else np.empty(0, self.id_dtype)
        chunk = sample_cpu.rows_per_chunk(fanout)
        chunk_begin, chunk_batch = _chunks(numbers, counts, chunk)
        rows = self.part.book.rows_of(self.part.index, nodes)
        first, degree, shift = (space.array(name, len(rows), np.int64) for name in ("first", "degree", "shift"))
        lengths = space.array("lengths", len(rows), _count_dtype(fanout))
        chunk_edge = np.empty(len(chunk_begin), np.int64)
        with launching(most=len(chunk_batch)):
            edges = ranks_cpu.count_rows(
                self._indptr, self._start, rows, chunk_begin, fanout, replace, first, degree, shift, lengths, chunk_edge
            )
        neighbours = space.array("neighbours", edges, self.id_dtype)
        e_ids = space.array("e_ids", edges, self.edge_dtype)
        words = -(-max(fanout, 0) // 4) * 4
        with launching(most=len(chunk_batch)) as workers:
            ranks_cpu.draw_rows(
                workers, self._indices, self._edge_ids, nodes, chunk_begin, chunk_edge, chunk_batch, fanout, replace,
                np.uint32(key & _LOW), np.uint32(key >> 32), hop, first, degree, shift,
                space.array("position", edges, np.int64), space.array("target", edges, np.int64), neighbours, e_ids,
                *(space.array(name, workers * chunk, np.uint32).reshape(workers, chunk) for name in ("c1", "c3")),
                space.array("words", workers * words * chunk, np.uint32).reshape(workers, words, chunk),
                *(space.array(name, workers * sample_cpu.SEEN_SIZE, np.int64).reshape(workers, -1)
                  for name in ("seen", "tags")),
            )  # fmt: skip
        return Rows(lengths, neighbours, e_ids)

    def answer_words(self, rows: Ids, edges: Ids, fanout: int) -> Ids:
        """Return how many words the answers are that hold so many rows and edges."""
        return sum(_words(count, dtype) for count, dtype in self._layout(rows, edges, fanout))

    def _layout(self, rows: Any, edges: Any, fanout: int) -> tuple[tuple[Any, np.dtype[Any]], ...]:
        return (edges, self.edge_dtype), (edges, self.id_dtype), (rows, _count_dtype(fanout))

    def pack(self, drawn: Rows, rows: Ids, edges: Ids, fanout: int, skip: int) -> Array:
        """Return the answers to all ranks but `skip`, int64 words, of rows that were drawn in the order of ranks."""
        lengths = self.answer_words(rows, edges, fanout)
        lengths[skip] = 0
        message = self._space.array("answers", int(lengths.sum()), np.int64)
        begins, row_at, edge_at = (offsets_of(counts) for counts in (lengths, rows, edges))
        for rank in np.flatnonzero(lengths):
            parts = self.views(message[begins[rank] : begins[rank + 1]], int(rows[rank]), int(edges[rank]), fanout)
            parts.counts[:] = drawn.counts[row_at[rank] : row_at[rank + 1]]
            parts.neighbours[:] = drawn.neighbours[edge_at[rank] : edge_at[rank + 1]]
            parts.e_ids[:] = drawn.e_ids[edge_at[rank] : edge_at[rank + 1]]
        return message

    def views(self, answer: Array, rows: int, edges: int, fanout: int) -> Rows:
        """Return the rows of an answer, as views."""
        parts, at = [], 0
        for count, dtype in self._layout(rows, edges, fanout):
            parts.append(answer[at : at + _words(count, dtype)].view(dtype)[:count])
            at += _words(count, dtype)
        return Rows(parts[2], parts[1], parts[0])


def _words(count: Any, dtype: np.dtype[Any]) -> Any:
    return -(-count * dtype.itemsize // 8)


def _count_dtype(fanout: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if fanout > 0 else np.uint32)


def _chunks(numbers: Sequence[Ids], counts: Sequence[Ids], rows: int) -> tuple[Ids, Ids]:
    """Cut the nodes of each batch into chunks: return where each begins, and its batch."""
    if not counts:
        return np.zeros(1, np.int64), np.empty(0, np.int64)
    lengths, batch = np.concatenate(counts), np.concatenate(numbers)
    pieces = -(-lengths // rows)
    of = np.repeat(np.arange(len(lengths)), pieces)  # the batch of each chunk, by its place
    begins = offsets_of(lengths)[of] + (np.arange(len(of)) - offsets_of(pieces)[of]) * rows
    return np.append(begins, lengths.sum()), batch[of]
