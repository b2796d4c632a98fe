"""`GPUSampler`: multi-hop neighbour sampling, the same bits on every device."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Protocol

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.arguments import check_count, check_flag, check_sizes, device_ids, host_ids
from gglspeedup.device import Device, DeviceLike, free_bytes, parse_device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.graph import GraphLike
from gglspeedup.interchange import on_cuda
from gglspeedup.kernels.bounds import MAX_BATCH, MAX_FANOUT, MAX_HOPS
from gglspeedup.sampler_cpu import CpuSampler, Hop
from gglspeedup.sharded_graph import ShardedGraph, as_any_graph
from gglspeedup.threads import lock_of

logger = logging.getLogger("gglspeedup")

_PLACEMENTS = ("device", "uva", "auto")
_EXPANSIONS = ("layer", "frontier")


class _Sampler(Protocol):
    def sample(
        self, seeds: Any, sizes: tuple[int, ...], *, seed: int, batch: int, replace: bool, expand: str
    ) -> tuple[Any, list[Hop]]: ...

    def sample_each(
        self, batches: Iterable[tuple[Any, int]], sizes: tuple[int, ...], *, seed: int, replace: bool, expand: str,
        at_once: int,
    ) -> Generator[tuple[Any, list[Hop]], None, None]: ...  # fmt: skip


class GPUSampler:
    """Samples the neighbourhoods of seed nodes, hop by hop.

    The result is a pure function of (graph, seeds, sizes, replace, seed, batch): the same arrays, bit for bit, on a
    CPU with any number of threads and on a GPU. A node's draw depends on (seed, batch, hop, node) alone.

    Parameters
    ----------
    device : str or int
        ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``.
    csr : CSRGraph, ShardedGraph, scipy.sparse matrix or (indptr, indices)
        Row v lists the neighbours that v samples from.
    sizes : sequence of int, optional
        See :meth:`set_size`.
    seed : int
        0 to 2**64 - 1, the key of all draws.
    replace : bool
        Whether to draw with replacement; without, a row of at most K neighbours gives all, in row order.
    expand : str
        ``"layer"``: each hop expands every node found so far. ``"frontier"``: only those new in the last hop.
    placement : str
        On a GPU: ``"device"`` keeps the graph in its memory, ``"uva"`` in pinned host memory that the kernels
        read in place, ``"auto"`` picks by free memory and says so in the log. On the CPU it has no effect.

    Raises
    ------
    DeviceError
        The CUDA device is not there.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    One sampler may be called from several threads at once, and pickled into spawned processes.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, GPUSampler
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> sampler = GPUSampler("cpu", graph, [2, 2])
    >>> n_id, adjs = sampler.sample([1])
    >>> n_id.tolist(), [adj.size for adj in adjs]
    ([1, 0, 2], [(3, 2), (2, 1)])
    """

    def __init__(
        self, device: DeviceLike, csr: GraphLike, sizes: Any = None, *, seed: int = 0, replace: bool = False,
        expand: str = "layer", placement: str = "auto",
    ) -> None:  # fmt: skip
        self.device: Device = parse_device(device)
        if placement not in _PLACEMENTS:
            raise ArgumentValueError(explain("placement", f"one of {_PLACEMENTS}", repr(placement), 'leave it "auto"'))
        if expand not in _EXPANSIONS:
            raise ArgumentValueError(explain("expand", f"one of {_EXPANSIONS}", repr(expand), 'leave it "layer"'))
        self.seed = check_count(seed, "seed", 0, 1 << 64)
        self.replace = check_flag(replace, "replace")
        self.expand = expand
        self.placement = placement
        self._sizes = None if sizes is None else check_sizes(sizes, MAX_FANOUT, MAX_HOPS)
        self.graph = as_any_graph(csr)
        self._batch = 0
        self._lock = lock_of(self)
        self._sampler: _Sampler | None = self._make()

    def _make(self) -> _Sampler:
        if not self.device.is_cuda:
            return CpuSampler(self.graph)
        from gglspeedup.placement import place_graph, place_shards, runtime_of

        if isinstance(self.graph, ShardedGraph):
            return place_shards(self.graph, runtime_of(self.device), free_bytes(self.device))
        return place_graph(self.graph, runtime_of(self.device), self.placement, free_bytes(self.device))

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Fanouts, nearest the seeds first; -1 for all neighbours; None before :meth:`set_size`."""
        return self._sizes

    def set_size(self, sizes: Any) -> None:
        """Set the fanouts.

        Parameters
        ----------
        sizes : sequence of int
            Fanout of hop 1 (nearest the seeds), hop 2, ...; up to 1024; K <= 0 takes every neighbour.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            It is no such sequence.
        """
        self._sizes = check_sizes(sizes, MAX_FANOUT, MAX_HOPS)

    def sample(self, seeds: Any, batch: int | None = None, *, sizes: Any = None) -> SampledBatch:
        """Return the sampled neighbourhood of some seeds.

        Parameters
        ----------
        seeds : int array-like or tensor [B]
            Unique node ids, of any framework, on the host or on the sampler's device.
        batch : int, optional
            0 to 2**48 - 1. Default: a counter that advances at every call, so that successive batches differ.
        sizes : sequence of int, optional
            Fanouts of this call, as in :meth:`set_size`. Default: those set.

        Returns
        -------
        SampledBatch
            Unpacks as ``n_id, adjs``; int64 arrays of NumPy or, on a GPU, CuPy (on the current CuPy stream).
            Each is a buffer of its own, used again once all that shares it is gone.

        Raises
        ------
        ArgumentIndexError
            A seed is out of range; the first such one is named.
        ArgumentTypeError, ArgumentValueError
            Seeds are not integers, not one-dimensional or not unique, or no sizes are set.
        """
        fanouts = self._fanouts(sizes)
        ids = self._seeds(seeds)
        number = self._take_batches(1) if batch is None else check_count(batch, "batch", 0, MAX_BATCH)
        try:
            n_id, hops = self._made().sample(
                ids, fanouts, seed=self.seed, batch=number, replace=self.replace, expand=self.expand
            )
        except BaseException:
            if batch is None:
                self._untake_batches(number, 1)
            raise
        return SampledBatch(n_id, [Adj(*hop) for hop in hops], len(ids), number)

    def sample_many(self, batches: Iterable[tuple[Any, int | None]], *, sizes: Any = None) -> list[SampledBatch]:
        """Return several batches, the bits that :meth:`sample` returns of one after the other.

        On a GPU they are sampled together, in the launches, the copy to the device and the wait of one batch, which are
        most of what small batches cost. On the CPU it saves nothing.

        Parameters
        ----------
        batches : iterable of (seeds, batch)
            Each as for :meth:`sample`; where `batch` is None, the counter gives the next number.
        sizes : sequence of int, optional
            Fanouts of this call, as in :meth:`set_size`. Default: those set.

        Returns
        -------
        list of SampledBatch
            In the order given. On a GPU the arrays of batches that were sampled together are parts of one buffer, which
            is used again once all of them are gone.

        Raises
        ------
        ArgumentIndexError, ArgumentTypeError, ArgumentValueError
            As by :meth:`sample` for the first batch that cannot be sampled; then none is, and no number is taken.
            `batches` are no pairs.

        Notes
        -----
        A GPU takes as many batches at once as have 2**23 seeds and edges by their bounds, of which the largest batch's
        count for each; batches of sizes alike are best. One by one are sampled those whose hops may have more than
        2**26 edges, and those of more than 16 hops. Seeds that are on the GPU already take a copy a batch.

        Examples
        --------
        >>> from gglspeedup import CSRGraph, GPUSampler
        >>> sampler = GPUSampler("cpu", CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), [2, 2])
        >>> [(batch.batch, batch.n_id.tolist()) for batch in sampler.sample_many([([1], None), ([2, 0], 7)])]
        [(0, [1, 0, 2]), (7, [2, 0, 1])]
        """
        fanouts = self._fanouts(sizes)
        given = [_pair(entry) for entry in batches]
        ids = [self._seeds(seeds) for seeds, _ in given]
        asked = [None if batch is None else check_count(batch, "batch", 0, MAX_BATCH) for _, batch in given]
        first, count = 0, asked.count(None)
        if count:
            first = self._take_batches(count)
        counter = iter(range(first, first + count))
        numbers = [next(counter) % MAX_BATCH if number is None else number for number in asked]
        try:
            made = list(self._each(zip(ids, numbers, strict=True), fanouts, max(1, len(ids))))
        except BaseException:
            self._untake_batches(first, count)
            raise
        return [
            SampledBatch(n_id, [Adj(*hop) for hop in hops], len(seeds), number)
            for (n_id, hops), seeds, number in zip(made, ids, numbers, strict=True)
        ]

    def sample_each(
        self, batches: Iterable[tuple[Any, int | None]], *, sizes: Any = None, at_once: int = 1
    ) -> Iterator[SampledBatch]:
        """Give batches in order, the bits that :meth:`sample` returns of each.

        On a GPU the next batch's work is enqueued before the host waits for the counts of the one before it, so that
        the device need not wait for the host in between. On the CPU each is made when it is asked for.

        Parameters
        ----------
        batches : iterable of (seeds, batch)
            Each as for :meth:`sample`; where `batch` is None, the counter gives the next number. It is read as batches
            are asked for: on the CPU none ahead, on a GPU up to ``2 * at_once - 1``.
        sizes : sequence of int, optional
            Fanouts of these batches, as in :meth:`set_size`. Default: those set.
        at_once : int
            On a GPU, how many are sampled together, as by :meth:`sample_many`.

        Returns
        -------
        iterator of SampledBatch
            One that is let go of early gives back the numbers of batches that it has not given.

        Raises
        ------
        ArgumentIndexError, ArgumentTypeError, ArgumentValueError
            As by :meth:`sample`, in the batch's place; those before it have been given.

        Examples
        --------
        >>> from gglspeedup import CSRGraph, GPUSampler
        >>> sampler = GPUSampler("cpu", CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), [2, 2])
        >>> [batch.n_id.tolist() for batch in sampler.sample_each([([1], None), ([2, 0], 7)])]
        [[1, 0, 2], [2, 0, 1]]
        """
        return self._numbered_each(iter(batches), self._fanouts(sizes), check_count(at_once, "at_once", 1))

    def _numbered_each(
        self, batches: Iterator[tuple[Any, int | None]], fanouts: tuple[int, ...], at_once: int
    ) -> Generator[SampledBatch, None, None]:
        begun: collections.deque[tuple[Any, int, int]] = collections.deque()  # seeds, number, of the counter or not

        def numbered() -> Iterator[tuple[Any, int]]:
            for entry in batches:
                seeds, batch = _pair(entry)
                ids = self._seeds(seeds)
                number = self._take_batches(1) if batch is None else check_count(batch, "batch", 0, MAX_BATCH)
                begun.append((ids, number, batch is None))
                yield ids, number

        try:
            with contextlib.closing(self._each(numbered(), fanouts, at_once)) as made:
                for n_id, hops in made:
                    ids, number, _ = begun.popleft()
                    yield SampledBatch(n_id, [Adj(*hop) for hop in hops], len(ids), number)
        finally:
            for _, number, counted in reversed(begun):
                self._untake_batches(number, counted)

    def _each(
        self, batches: Iterable[tuple[Any, int]], fanouts: tuple[int, ...], at_once: int
    ) -> Generator[tuple[Any, list[Hop]], None, None]:
        return self._made().sample_each(
            batches, fanouts, seed=self.seed, replace=self.replace, expand=self.expand, at_once=at_once
        )

    def _fanouts(self, sizes: Any) -> tuple[int, ...]:
        fanouts = self._sizes if sizes is None else check_sizes(sizes, MAX_FANOUT, MAX_HOPS)
        if fanouts is None:
            raise ArgumentValueError(
                explain("sizes", "to be set before sampling", "none", "call set_size([25, 10]) or pass sizes")
            )
        return fanouts

    def _made(self) -> _Sampler:
        if self._sampler is None:
            with self._lock:
                self._sampler = self._sampler or self._make()
        return self._sampler

    def _seeds(self, seeds: Any) -> Any:
        if not self.device.is_cuda:
            return host_ids(seeds, "seeds")
        from gglspeedup.placement import runtime_of

        # Those of the host stay there: they travel with the rest of the batch, in one copy.
        return device_ids(seeds, "seeds", runtime_of(self.device)) if on_cuda(seeds) else host_ids(seeds, "seeds")

    def _take_batches(self, count: int) -> int:
        with self._lock:
            number = self._batch
            self._batch = (number + count) % MAX_BATCH
            return number

    def _untake_batches(self, number: int, count: int) -> None:
        with self._lock:  # bad input changes nothing: the next call gets this number, unless another has moved on
            if count and self._batch == (number + count) % MAX_BATCH:
                self._batch = number

    def __repr__(self) -> str:
        sizes = None if self._sizes is None else list(self._sizes)
        return f"GPUSampler(device={str(self.device)!r}, {self.graph!r}, sizes={sizes}, seed={self.seed})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_sampler")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parse_device(self.device)  # the process that unpickles may lack the device
        self._lock = lock_of(self)
        self._sampler = None  # made when it is needed: a process uses one of a MultiGPUSampler's


def _pair(entry: Any) -> tuple[Any, Any]:
    """Return an entry of `sample_many`'s batches."""
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        return entry[0], entry[1]
    got = f"a {type(entry).__name__}" + (f" of {len(entry)}" if isinstance(entry, (tuple, list)) else "")
    remedy = "pass [(seeds, None), ...] to have the batches numbered"
    raise ArgumentTypeError(explain("batches", "pairs of seeds and a number or None", got, remedy))
