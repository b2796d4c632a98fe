"""The buffers of one batch in flight on a GPU: sized by bounds, grown when those grow, used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.kernels.bounds import MAX_HOPS
from gglspeedup.kernels.cuda import Runtime

STATE_SIZE = gpu.FIRST_COUNT + 2 * (MAX_HOPS + 1)

_FIRST_STAMP = 0xFFFFFFFE  # a table of ones holds no batch's entries
_MAX_POSITIONS = (1 << 31) - 1  # local ids are int32 inside


class Bound(NamedTuple):
    """Upper bounds of one hop: rows drawn, edges, and nodes known after it."""

    rows: int
    edges: int
    nodes: int


class Workspace:
    """The buffers of one batch in flight; they grow and are used again.

    Attributes
    ----------
    arrays : dict
        The buffers by name.
    graphs : OrderedDict
        Recorded launches by the key of a batch; None for a key that has been launched once.
    event : object
        Marks the end of the last batch's work, on whatever stream it was.
    """

    def __init__(self, runtime: Runtime, num_nodes: int, key_dtype: Any, hashed: bool) -> None:
        self.runtime = runtime
        self.arrays: dict[str, Any] = {}
        self.graphs: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self.event: Any = None
        self.stamp = 0
        self.hashed = hashed
        self._key_dtype = key_dtype
        self._retired: list[Any] = []
        self.counts = runtime.pinned(STATE_SIZE, np.int64)
        self.staging = runtime.pinned(0, np.int64)
        if not hashed:
            self.grow("keys", max(1, num_nodes), np.uint64)
            self.grow("values", 1, np.uint32)

    def grow(self, name: str, size: int, dtype: Any, keep: bool = False) -> bool:
        """Make a buffer hold `size` elements, with what it held if `keep`; return whether it is another one now."""
        old = self.arrays.get(name)
        if old is not None and len(old) >= size:
            return False
        new = self.runtime.empty(max(1, size), dtype)
        if old is not None:
            if keep:
                new[: len(old)] = old
            # Work of this batch, or of the last on another stream, may still use it: it goes after the next read.
            self._retired.append(old)
        self.arrays[name] = new
        self.graphs.clear()  # they hold the addresses of the old buffers
        return True

    def reserve_seeds(self, bound: int) -> None:
        """Make room for the state and the seeds, which travel together."""
        if self.grow("state", STATE_SIZE + bound, np.int64):
            self.arrays["seeds"] = self.arrays["state"][STATE_SIZE:]
            self.staging = self.runtime.pinned(STATE_SIZE + bound, np.int64)

    def reserve(self, seeds: int, edges_before: int, bounds: Sequence[Bound], last_edges: bool = True) -> bool:
        """Make room for hops after `edges_before` edges; the last one's edges count if `last_edges`.

        Returns whether the table is another one, and empty.
        """
        drawn = bounds if last_edges else bounds[:-1]
        rows = max((bound.rows for bound in bounds), default=0)
        hop_edges = max((bound.edges for bound in drawn), default=0)
        edges = edges_before + sum(bound.edges for bound in drawn)
        nodes = max((bound.nodes for bound in drawn), default=0)
        if seeds + edges > _MAX_POSITIONS:
            needs = f"a batch of at most {_MAX_POSITIONS} seeds and edges"
            remedy = "take fewer seeds or a smaller fanout"
            raise ArgumentValueError(explain("sizes", needs, f"up to {seeds + edges}", remedy))
        for name, size, dtype in (
            ("row_start", rows, np.int64),
            ("row_degree", rows, np.uint32),
            ("row_first", rows, np.uint32),
            ("sums", max(gpu.tiles_of(rows, gpu.TILE_ROWS), gpu.tiles_of(hop_edges, gpu.TILE_EDGES)), np.int64),
            ("neighbour", hop_edges, self._key_dtype),
            ("position", edges, np.int64),
            ("where", edges, np.int32),
            ("first", seeds + edges, np.uint32),
            ("local_id", seeds + edges, np.int32),
            ("nodes", max(seeds, nodes), np.int64),
        ):
            self.grow(name, size, dtype, keep=True)
        if not self.hashed:
            return False
        # At most half full, and a whole number of 64-bit words.
        capacity = 1 << max(4, (2 * max(seeds, nodes) - 1).bit_length())
        fresh = self.grow("keys", capacity, self._key_dtype)
        self.grow("values", capacity, np.uint32)
        return fresh

    def table(self) -> gpu.Table:
        """Return the table as launchers take it."""
        keys = self.arrays["keys"]
        return gpu.Table(keys, self.arrays["values"], len(keys) - 1 if self.hashed else 0, self.hashed)

    def clear_table(self, target: gpu.Target) -> None:
        """Empty the table."""
        for name in ("keys", "values") if self.hashed else ("keys",):
            gpu.fill_ones(target, self.arrays[name].view(np.int64))

    def next_stamp(self, target: gpu.Target) -> int:
        """Return the stamp of a new batch, below all earlier ones; a used-up table starts anew."""
        if not self.hashed:
            if self.stamp == 0:
                self.clear_table(target)
                self.stamp = _FIRST_STAMP + 1
            self.stamp -= 1
        return self.stamp

    def read(self, hops: int) -> Any:
        """Wait for the device; return the state from BAD_RANGE to the counts after `hops` hops."""
        end = gpu.FIRST_COUNT + 2 * (hops + 1)
        counts = self.runtime.read(self.arrays["state"][gpu.BAD_RANGE : end], self.counts[gpu.BAD_RANGE : end])
        self._retired.clear()
        return counts
