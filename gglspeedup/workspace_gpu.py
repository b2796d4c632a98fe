"""The buffers of one batch in flight on a GPU: sized by bounds, grown when those grow, used again."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from gglspeedup.errors import ArgumentIndexError, ArgumentValueError, explain
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.kernels.bounds import MAX_HOPS
from gglspeedup.kernels.cuda import Runtime
from gglspeedup.recordings_gpu import Graphs

STATE_SIZE = gpu.FIRST_COUNT + 2 * (MAX_HOPS + 1)

_FIRST_STAMP = 0xFFFFFFFE  # a table of ones holds no batch's entries
_MAX_POSITIONS = (1 << 31) - 1  # local ids are int32 inside


class Bound(NamedTuple):
    """Upper bounds of one hop: rows drawn, edges, and nodes known after it."""

    rows: int
    edges: int
    nodes: int


def table_capacity(nodes: int) -> int:
    """Return the cells of a hash table: a power of two, at most half full, and a whole number of 64-bit words."""
    return 1 << max(4, (2 * nodes - 1).bit_length())


class Workspace:
    """The buffers of one batch in flight; they grow and are used again.

    Attributes
    ----------
    arrays : dict
        The buffers by name.
    graphs : OrderedDict
        Recorded launches by the key of a batch; None for a key that has been launched once.
    event : object
        Marks the end of the last batch's work, or of the copy of its counts, on whatever stream it was.
    """

    def __init__(self, runtime: Runtime, num_nodes: int, key_dtype: Any, hashed: bool) -> None:
        self.runtime = runtime
        self.arrays: dict[str, Any] = {}
        self.graphs: Graphs = OrderedDict()
        self.event: Any = None
        self.stamp = 0
        self.hashed = hashed
        self.key_dtype = key_dtype
        self._retired: list[Any] = []
        self._copied: Any = None  # of the state, on the host
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
            ("neighbour", hop_edges, self.key_dtype),
            ("position", edges, np.int64),
            ("where", edges, np.int32),
            ("first", seeds + edges, np.uint32),
            ("local_id", seeds + edges, np.int32),
            ("nodes", max(seeds, nodes), np.int64),
        ):
            self.grow(name, size, dtype, keep=True)
        if not self.hashed:
            return False
        capacity = table_capacity(max(seeds, nodes))
        fresh = self.grow("keys", capacity, self.key_dtype)
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

    def start_read(self, hops: int) -> None:
        """Enqueue a copy to the host of the state from BAD_RANGE to the counts after `hops` hops."""
        self._copy_state(gpu.BAD_RANGE, gpu.FIRST_COUNT + 2 * (hops + 1))

    def _copy_state(self, low: int, high: int) -> None:
        self._copied = self.counts[low:high]
        self.event = self.runtime.download(self.arrays["state"][low:high], self._copied, self.event)

    def finish_read(self) -> Any:
        """Wait for the device; return what :meth:`start_read` has copied."""
        self.runtime.settle(self.event)
        self._retired.clear()
        return self._copied

class BatchesWorkspace(Workspace):
    """The buffers of several batches in flight together, each with a hash table and an equal part of every buffer."""

    def __init__(self, runtime: Runtime, key_dtype: Any) -> None:
        super().__init__(runtime, 0, key_dtype, True)
        self._cells = 0  # of the tables in use, and of one of them
        self._capacity = 0

    def reserve_states(self, batches: int, seeds: int) -> None:
        """Make room for the states, and for the seeds behind them."""
        size = batches * gpu.BATCH_STATE_SIZE + seeds
        if self.grow("state", size, np.int64):
            self.staging = self.runtime.pinned(size, np.int64)
            self.counts = self.runtime.pinned(size, np.int64)

    def reserve_batches(self, batches: int, stride: int, nodes: int) -> None:
        """Make room for `batches`, each of up to `stride` seeds and edges and `nodes` nodes."""
        for name, dtype in (
            ("row_start", np.int64), ("row_degree", np.uint32), ("row_first", np.uint32), ("sums", np.int64),
            ("neighbour", self.key_dtype), ("position", np.int64), ("where", np.int32), ("first", np.uint32),
            ("local_id", np.int32), ("nodes", np.int64),
        ):  # fmt: skip
            self.grow(name, batches * stride, dtype)
        self._capacity = table_capacity(nodes)
        self._cells = batches * self._capacity
        self.grow("keys", self._cells, self.key_dtype)
        self.grow("values", self._cells, np.uint32)

    def table(self) -> gpu.Table:
        """Return the batches' tables as launchers take them."""
        return gpu.Table(self.arrays["keys"], self.arrays["values"], self._capacity - 1, True)

    def clear_table(self, target: gpu.Target) -> None:
        """Empty the tables."""
        for name in ("keys", "values"):
            gpu.fill_ones(target._replace(batches=1), self.arrays[name][: self._cells].view(np.int64))

    def start_read_states(self, batches: int) -> None:
        """Enqueue a copy to the host of the states of the batches."""
        self._copy_state(0, batches * gpu.BATCH_STATE_SIZE)


AnyWorkspace = TypeVar("AnyWorkspace", bound=Workspace)


class Workspaces(Generic[AnyWorkspace]):
    """The workspaces that no batch uses; any number of threads may take one at once."""

    def __init__(self, runtime: Runtime, make: Callable[[], AnyWorkspace]) -> None:
        self.free: list[AnyWorkspace] = []
        self._runtime = runtime
        self._make = make
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def begin(self) -> Iterator[AnyWorkspace]:
        """Give a workspace to enqueue a batch in, which then holds it until :meth:`finish` or :meth:`abandon`.

        One that an error leaves in an unknown state is not used again; bad arguments are found either before anything
        was enqueued or after the read.
        """
        with self._lock:
            workspace = self.free.pop() if self.free else None
        if workspace is None:
            workspace = self._make()
        else:
            self._runtime.wait(workspace.event)
        try:
            yield workspace
        except BaseException as error:
            self._take_back(workspace, error)
            raise

    @contextlib.contextmanager
    def finish(self, workspace: AnyWorkspace) -> Iterator[None]:
        """Take a workspace back after what is enqueued within the block."""
        try:
            yield
            self._release(workspace)
        except BaseException as error:
            self._take_back(workspace, error)
            raise

    def abandon(self, workspace: AnyWorkspace) -> None:
        """Take back a workspace whose batch nobody wants any more."""
        # Its next batch writes where this one's copies to the device read.
        with contextlib.suppress(Exception), self._runtime.activate():
            workspace.finish_read()
            self._put_back(workspace)

    def _take_back(self, workspace: AnyWorkspace, error: BaseException) -> None:
        if isinstance(error, (ArgumentIndexError, ArgumentValueError)):
            self._release(workspace)
            return
        with contextlib.suppress(Exception):  # what was enqueued may still use the buffers that go now
            self._runtime.read(workspace.arrays["state"][:1])

    def _release(self, workspace: AnyWorkspace) -> None:
        workspace.event = self._runtime.record(workspace.event)
        self._put_back(workspace)

    def _put_back(self, workspace: AnyWorkspace) -> None:
        with self._lock:
            self.free.append(workspace)
