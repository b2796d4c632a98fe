"""Launchers of `sample.cu`: one function a kernel, with its name, the order of its arguments and its grid.

A grid is computed from a bound. Kernels read the true counts on the device and walk their tiles with the stride
of the grid, so any grid gives the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gglspeedup.kernels.cuda import Kernel, Runtime

TILE_ROWS = 256
TILE_EDGES = 1024

# Cells of `state`: parameters of the batch, the two places of bad seeds, and for every hop the nodes and the
# edges before it. The seeds lie behind, so that all a batch needs is one copy. STRIDE, FIRST_SEED and OUTPUT are those
# of several batches in a launch: from one's arrays to the next one's, and where its seeds and its results begin.
SEEDS, SEED, BATCH, STAMP, STRIDE, FIRST_SEED, OUTPUT, BAD_RANGE, BAD_DUPLICATE, NODES, EDGES = range(11)
FIRST_COUNT = NODES
NONE = (1 << 63) - 1

MOST_HOPS = 16  # of several batches in a launch, whose states have a fixed size
BATCH_STATE_SIZE = FIRST_COUNT + 2 * (MOST_HOPS + 1)

_THREADS = 256
_SCAN_THREADS = 1024
_NARROW = 32  # fanouts up to this one are drawn by lanes of one warp

# Blocks of a launch: enough to fill the largest GPU several times, few enough that idle ones cost nothing.
MAX_BLOCKS = 8192


class Table(NamedTuple):
    """The table node -> smallest position: one entry a node, or keys and values of open addressing."""

    keys: Any
    values: Any
    mask: int
    hashed: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        """How kernels take it."""
        return self.keys, self.values, np.int64(self.mask)


class Target(NamedTuple):
    """Which kernels run: the runtime, the macros that the graph and the table ask for, and for how many batches."""

    runtime: Runtime
    macros: tuple[str, ...]
    batches: int = 1

    def launch(self, name: str, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
        """Enqueue a kernel of sample.cu."""
        kernel = Kernel("sample.cu", name, self.macros)
        most = max(1, MAX_BLOCKS // self.batches)
        self.runtime.launch(kernel, max(1, min(blocks, most)), threads, arguments, self.batches)


def macros_of(index_dtype: Any, hashed: bool, in_pieces: bool = False, many: bool = False) -> tuple[str, ...]:
    """Return the macros of sample.cu: indices' dtype, kind of table, graph whole or in pieces, one batch or many."""
    chosen = {
        "INDEX64": np.dtype(index_dtype) == np.int64, "HASH_TABLE": hashed, "IN_PIECES": in_pieces,
        "MANY_BATCHES": many,
    }  # fmt: skip
    return tuple(name for name, wanted in chosen.items() if wanted)


def tiles_of(count: int, tile: int) -> int:
    """Return how many tiles hold `count` things."""
    return -(-count // tile)


@dataclass(frozen=True)
class Hop:
    """What every kernel of one hop is told."""

    index: int
    frontier: bool
    fanout: int
    replace: bool

    @property
    def rows_arguments(self) -> tuple[Any, ...]:
        """Hop and frontier, as kernels take them."""
        return np.int32(self.index), np.int32(self.frontier)

    @property
    def draw_arguments(self) -> tuple[Any, ...]:
        """Hop, frontier, fanout and replace, as kernels take them."""
        return (*self.rows_arguments, np.int32(self.fanout), np.int32(self.replace))


def fill_ones(target: Target, words: Any) -> None:
    """Set every bit of an array of 64-bit words."""
    target.launch("fill_ones", tiles_of(len(words), 4 * _THREADS), _THREADS, (words, np.int64(len(words))))


def refill_table(
    target: Target, bound: int, state: Any, hop: int, nodes: Any, local_id: Any, first: Any, table: Table
) -> None:
    """Put the nodes known before a hop into a new table; `bound` is that of their positions."""
    arguments = (state, np.int32(hop), nodes, local_id, first, *table.arguments)
    target.launch("refill_table", tiles_of(bound, _THREADS), _THREADS, arguments)


def insert_seeds(
    target: Target, bound: int, state: Any, seeds: Any, num_nodes: int, nodes: Any, local_id: Any, first: Any,
    table: Table,
) -> None:  # fmt: skip
    """Enter the seeds in the table; note the first one that is no node."""
    arguments = (state, seeds, np.int64(num_nodes), nodes, local_id, first, *table.arguments)
    target.launch("insert_seeds", tiles_of(bound, _THREADS), _THREADS, arguments)


def check_seeds(
    target: Target, bound: int, state: Any, seeds: Any, num_nodes: int, first: Any, table: Table
) -> None:
    """Note the first seed that repeats an earlier one."""
    arguments = (state, seeds, np.int64(num_nodes), first, *table.arguments)
    target.launch("check_seeds", tiles_of(bound, _THREADS), _THREADS, arguments)


def count_rows(
    target: Target, bound: int, state: Any, hop: Hop, indptr: Any, nodes: Any, row_start: Any, row_degree: Any,
    row_first: Any, sums: Any,
) -> None:  # fmt: skip
    """Find start, degree and first edge of the hop's rows, and the sums of their tiles."""
    arguments = (state, *hop.draw_arguments, indptr, nodes, row_start, row_degree, row_first, sums)
    target.launch("count_rows", tiles_of(bound, TILE_ROWS), TILE_ROWS, arguments)


def scan_sums(target: Target, state: Any, hop: Hop, of_rows: bool, sums: Any) -> None:
    """Scan the sums of tiles of rows or of edges, and store the hop's edges or new nodes."""
    target.launch("scan_sums", 1, _SCAN_THREADS, (state, *hop.rows_arguments, np.int32(of_rows), sums))


def draw(
    target: Target, bound: int, edges_bound: int, state: Any, hop: Hop, indices: Any, nodes: Any, row_start: Any,
    row_degree: Any, row_first: Any, sums: Any, neighbour: Any, position: Any, where: Any, first: Any, table: Table,
) -> None:  # fmt: skip
    """Draw the hop's edges and enter their neighbours in the table, by the kernel that suits the fanout."""
    if hop.fanout <= 0:
        name, blocks, threads = "draw_all", tiles_of(edges_bound, TILE_EDGES), _THREADS
    elif hop.fanout <= _NARROW:
        width = 8 if hop.fanout <= 8 else 16 if hop.fanout <= 16 else 32
        name, blocks, threads = f"draw_{width}", tiles_of(bound, _THREADS // width), _THREADS
    else:
        name, threads = ("draw_128", 64) if hop.fanout <= 128 else ("draw_1024", 128)
        blocks = bound
    arguments = (
        state, *hop.draw_arguments, indices, nodes, row_start, row_degree, row_first, sums, neighbour, position,
        where, first, *table.arguments,
    )  # fmt: skip
    target.launch(name, blocks, threads, arguments)


def count_first(
    target: Target, bound: int, state: Any, hop: int, neighbour: Any, first: Any, sums: Any, table: Table
) -> None:
    """Look up where each edge's neighbour occurs first; count the new nodes of each tile."""
    arguments = (state, np.int32(hop), neighbour, first, sums, *table.arguments)
    target.launch("count_first", tiles_of(bound, TILE_EDGES), _THREADS, arguments)


def assign(
    target: Target, bound: int, state: Any, hop: int, neighbour: Any, first: Any, sums: Any, nodes: Any, local_id: Any
) -> None:
    """Give the new nodes their local ids."""
    arguments = (state, np.int32(hop), neighbour, first, sums, nodes, local_id)
    target.launch("assign", tiles_of(bound, TILE_EDGES), _THREADS, arguments)


def emit_edges(
    target: Target, seeds: int, low: int, count: int, first: Any, local_id: Any, position: Any, where: Any,
    edge_ids: Any, edge_index: Any, e_id: Any,
) -> None:  # fmt: skip
    """Write the edges [low, low + count) of the batch into the caller's arrays."""
    has_edge_ids = edge_ids is not None
    arguments = (
        np.int64(seeds), np.int64(low), np.int64(count), first, local_id, position, where, np.int32(has_edge_ids),
        edge_ids if has_edge_ids else position, edge_index, e_id,
    )  # fmt: skip
    target.launch("emit_edges", tiles_of(count, 2 * _THREADS), _THREADS, arguments)


def copy_ids(target: Target, count: int, source: Any, destination: Any) -> None:
    """Copy `count` 64-bit ids."""
    target.launch("copy_ids", tiles_of(count, 2 * _THREADS), _THREADS, (np.int64(count), source, destination))


def room_of(cells: int) -> int:
    """Return the cells that an array takes in the output of several batches, whose arrays begin on 64 bytes."""
    return -(-cells // 8) * 8


def place_outputs(target: Target, state: Any, hops: int) -> None:
    """Find where the output of each of several batches begins; by one block for all."""
    arguments = (state, np.int32(hops), np.int32(target.batches))
    target._replace(batches=1).launch("place_outputs", 1, _SCAN_THREADS, arguments)


def emit_batches(
    target: Target, bound: int, state: Any, hops: int, nodes: Any, first: Any, local_id: Any, position: Any, where: Any,
    edge_ids: Any, output: Any,
) -> None:  # fmt: skip
    """Write the nodes and the edges of several batches; `bound` is that of a batch's nodes and of a hop's edges."""
    has_edge_ids = edge_ids is not None
    arguments = (
        state, np.int32(hops), nodes, first, local_id, position, where, np.int32(has_edge_ids),
        edge_ids if has_edge_ids else position, output,
    )  # fmt: skip
    target.launch("emit_batches", tiles_of(bound, 2 * _THREADS), _THREADS, arguments)
