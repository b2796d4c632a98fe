"""`NodeLoader`: batches of seeds with their neighbourhoods, features and labels, in the user's framework."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.arguments import check_range, check_sizes, check_unique, host_array, host_ids
from gglspeedup.batch_fitter import BatchFitter, Part, check_policy
from gglspeedup.device import Device, DeviceLike
from gglspeedup.epochs import EpochLoader, Numbered, device_for
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import CSRGraph, GraphLike
from gglspeedup.kernels.bounds import MAX_FANOUT, MAX_HOPS
from gglspeedup.memory_budget import MemoryBudget, budget_of
from gglspeedup.memory_meter import meter_for
from gglspeedup.memory_watch import MemoryWatch
from gglspeedup.sharded_graph import ShardedGraph, as_any_graph


@dataclass(eq=False)
class Batch:
    """What a model trains on in one step, as arrays of the loader's backend.

    Attributes
    ----------
    x : array [N0, F] or [N0], or None
        Features of the nodes `n_id`, in their own dtype.
    y : array [B] or [B, C], or None
        Labels of the seeds.
    n_id : int64 array [N0]
        The seeds in their order, then every other node once, hop by hop, by first occurrence.
    adjs : list of Adj
        Outermost hop first; the targets of each are the first of its sources.
    batch_size : int
        The number of seeds.
    batch : int
        The batch number that the draws were made with.
    share : float
        Which fraction of the seeds of its step it has: the weight of its mean loss. 1.0 unless a memory limit has split
        the step.
    last : bool
        Whether the optimiser may step after it: False before other parts of the same step.
    """

    x: Any
    y: Any
    n_id: Any
    adjs: list[Adj]
    batch_size: int
    batch: int
    share: float = 1.0
    last: bool = True

    @property
    def seeds(self) -> Any:
        """The seeds, int64 [B]."""
        return self.n_id[: self.batch_size]


class _Loaded(NamedTuple):
    """A batch as arrays of the device."""

    part: Part
    x: Any
    y: Any


class NodeLoader(EpochLoader[Batch]):
    """An iterable over batches of seeds, with their sampled neighbourhoods, features and labels.

    Sampling and gathering run in a background thread each, up to `prefetch` batches ahead. The batches are a pure
    function of (graph, seeds, sizes, batch_size, seed, epoch): they depend neither on `prefetch`, nor on the device,
    nor on the number of threads.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix, (indptr, indices) or GPUSampler
        The graph; a sampler brings its own device, seed and ways of drawing, and is shared, not copied.
    x : array or tensor [num_nodes, F] or [num_nodes], or CGPUFeature, optional
        Features. A CGPUFeature is shared, not copied.
    y : array or tensor [num_nodes] or [num_nodes, C], or CGPUFeature, optional
        Labels; each batch has those of its seeds.
    seeds : int array-like or tensor [n], or bool [num_nodes]
        The nodes to make batches of: unique ids or a mask.
    sizes : sequence of int
        Fanouts, nearest the seeds first; K <= 0 takes every neighbour.
    batch_size : int
        Seeds a batch.
    shuffle : bool
        Whether each epoch visits the seeds in an order of its own, which depends on `seed` and the epoch alone.
    drop_last : bool
        Whether to leave out a last batch that is shorter than the others.
    device : str or int
        Where batches are made: ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``: a GPU if there is one that the
        backend's installation can use as well.
    cache : int, float or str
        GPU memory for hot features, as CGPUFeature's budget.
    backend : str
        ``"numpy"``, ``"cupy"``, ``"torch"``, ``"tensorflow"``, ``"paddle"``, ``"tensorlayerx"`` or ``"jax"``.
    seed : int
        0 to 2**64 - 1; of the order and the draws.
    prefetch : int
        Batches that are sampled ahead of their gathering, and gathered ahead of the training loop; 0 makes each when it
        is asked for. On a GPU half as many are sampled together (:meth:`GPUSampler.sample_each`), which pays for small
        ones, and as many again are begun.
    replace, expand, placement
        As GPUSampler's.
    policy
        As CGPUFeature's.
    rank, world_size : int
        Which share of the seeds this process takes when several train together. Every rank gets the same number of
        batches; for that, up to ``world_size - 1`` seeds an epoch are visited twice.
    memory_limit : int, float, str or MemoryBudget, optional
        How much memory training may take, as ``"6.5G"``: of the process on the CPU, of the device on a GPU. See the
        notes, and :class:`MemoryBudget` for other policies than splitting.
    workers : int
        On the CPU: processes in which batches are made, in turn; 0 makes them in threads. See the notes.

    Raises
    ------
    DeviceError
        The CUDA device is not there, or the backend cannot use it, or does not tell the peak that a limit needs.
    MemoryLimitError
        While iterating: the limit leaves no room for a single seed.
    WorkerError
        While iterating: a worker has died.
    MissingPackageError
        The backend is not installed.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    Every iterator takes the next epoch, from 0, with its first batch; :meth:`set_epoch` says which comes next. Loaders
    may be pickled into spawned processes, and several iterators of one may be open at once.

    Threads share Python's interpreter lock with the training loop, workers do not: one takes sampling and gathering off
    a loop that spends its time in Python, and several make more batches at a time than the threads of one. They are
    forked with the first batch, stay for the next epoch unless a loop was left early, and end with the loader. A worker
    sees graph, features and labels as they are at that moment, and copies none of them; batches lie in memory that it
    shares with this process, and are not copied either. Each has ``prefetch`` batches ahead in both stages, and its
    share of the kernels' threads. Numba may say that it cannot join threads before a fork, where those of another
    loader are at work: nothing comes of it. Other than on Linux batches are made in threads.

    With a memory limit, a step whose batch would exceed it comes in several parts: batches of their own, one after the
    other, with the neighbourhoods that their seeds have in the whole. ``len(loader)`` stays the number of steps. A loop
    that is right with and without: ``(loss_of(batch) * batch.share).backward()``, and then ``if batch.last:
    optimizer.step(); optimizer.zero_grad()``, where ``loss_of`` is the mean over the batch's seeds. Gradients are then
    those of the whole up to rounding, except for layers that look at other seeds or draw random numbers (batch
    normalisation, dropout). The limit is kept for the loop that reads the loader: a batch counts until the next one is
    asked for. What is done depends on measurements; with ``MemoryBudget(model=..., learn=False)`` it does not.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, NodeLoader
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> x, y = np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> loader = NodeLoader(graph, x, y, seeds=[0, 2], sizes=[2], batch_size=1, shuffle=False, device="cpu")
    >>> [(batch.n_id.tolist(), batch.x.shape, batch.y.tolist()) for batch in loader]
    [([0, 1, 2], (3, 3), [0]), ([2, 0], (2, 3), [1])]
    >>> len(loader), len(loader.dataset)
    (2, 2)
    """

    def __init__(
        self, csr: GraphLike | GPUSampler, x: Any = None, y: Any = None, *, seeds: Any, sizes: Any, batch_size: int,
        shuffle: bool = True, drop_last: bool = False, device: DeviceLike = "auto", cache: int | float | str = "0",
        backend: str = "numpy", seed: int = 0, prefetch: int = 2, replace: bool = False, expand: str = "layer",
        placement: str = "auto", policy: Any = "degree", rank: int = 0, world_size: int = 1,
        memory_limit: int | float | str | MemoryBudget | None = None, workers: int = 0,
    ) -> None:  # fmt: skip
        self.sizes = check_sizes(sizes, MAX_FANOUT, MAX_HOPS)
        self.memory_budget = budget_of(memory_limit)
        graph = csr.graph if isinstance(csr, GPUSampler) else as_any_graph(csr)
        super().__init__(
            seed_ids(seeds, graph.num_nodes), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last,
            backend=backend, seed=seed, prefetch=prefetch, rank=rank, world_size=world_size,
            workers=workers,
        )  # fmt: skip
        self.device = self._made_on(device_for(backend, csr.device if isinstance(csr, GPUSampler) else device))
        if self.workers and self.memory_budget is not None:
            needs, remedy = "0 with a memory limit, which is kept for one process", "leave one of the two out"
            raise ArgumentValueError(explain("workers", needs, self.workers, remedy))
        self.graph_sampler = csr if isinstance(csr, GPUSampler) else GPUSampler(
            self.device, graph, seed=self.seed, replace=replace, expand=expand, placement=placement
        )  # fmt: skip
        self.features = rows_of(graph, self.device, x, "x", cache, policy)
        # Labels are read once an epoch each: a GPU reads them in host memory.
        self.labels = rows_of(graph, self.device, y, "y", 0, "degree")
        self._watch = self._watched()

    def _watched(self) -> MemoryWatch | None:
        """Return what measures batches for the memory budget, None without one."""
        budget = self.memory_budget
        if budget is None:
            return None
        check_policy(budget.policy, self.graph_sampler.graph)
        meter = meter_for(self.device, self.backend)
        in_use = meter.in_use()
        budget.prepare(len(self.sizes), in_use, meter.chance)
        if in_use >= budget.limit:
            needs = f"more than the {in_use} bytes that are in use before training"
            raise ArgumentValueError(explain("memory_limit", needs, budget.limit, "raise the limit"))
        return MemoryWatch(budget, meter)

    def evaluation(self, seeds: Any, *, sizes: Any = None, batch_size: int | None = None) -> NodeLoader:
        """Return a loader over other seeds, in their order, that shares graph, features and labels with this one.

        It has the same memory limit, and learns by itself what its batches take.

        Parameters
        ----------
        seeds : int array-like or tensor [n], or bool [num_nodes]
            The nodes to evaluate: unique ids or a mask.
        sizes : sequence of int, optional
            Fanouts; by default every neighbour, in as many hops as training takes.
        batch_size : int, optional
            Seeds a batch; that of training by default.

        Examples
        --------
        >>> from gglspeedup import CSRGraph, NodeLoader
        >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
        >>> loader = NodeLoader(graph, seeds=[0, 2], sizes=[1], batch_size=1, device="cpu")
        >>> [batch.n_id.tolist() for batch in loader.evaluation([0])]
        [[0, 1, 2]]
        """
        other = self._in_order(batch_size)
        other._items = seed_ids(seeds, self.graph_sampler.graph.num_nodes)
        other.sizes = check_sizes([-1] * len(self.sizes) if sizes is None else sizes, MAX_FANOUT, MAX_HOPS)
        if self.memory_budget is not None:
            other.memory_budget = self.memory_budget.renewed()
            other._watch = other._watched()
        return other

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        finally:
            if self._watch is not None:
                self._watch.end()

    def _sample_all(self, numbered: Iterable[Numbered]) -> Generator[Part, None, None]:
        if self._watch is None or self.memory_budget is None:
            batches = sampled_each(self.graph_sampler, numbered, self.sizes, self.prefetch)
            with contextlib.closing(batches):
                for sampled in batches:
                    yield Part(sampled)
            return
        fitter = BatchFitter(
            self.memory_budget, self.graph_sampler, self.sizes, row_bytes=(_row_bytes(self.features),
            _row_bytes(self.labels)), depth=self.prefetch + 2, watch=self._watch,
        )  # fmt: skip
        for items, number in numbered:
            yield from fitter.fit(items, number)

    def _gather(self, part: Part) -> _Loaded:
        x = None if self.features is None else self.features.take(part.sampled.n_id)
        y = None if self.labels is None else self.labels.take(part.sampled.seeds)
        return _Loaded(part, x, y)

    def _convert(self, loaded: _Loaded, adapter: ModuleType) -> Batch:
        part, x, y = loaded
        if self._watch is not None and part.load is not None:
            self._watch.hand_out(part.load, part.predicted)
        batch = batch_of(part.sampled, x, y, adapter, self.backend)
        batch.share, batch.last = part.share, part.last
        return batch

    def __repr__(self) -> str:
        return (
            f"NodeLoader({len(self._items)} seeds, sizes={list(self.sizes)}, batch_size={self.batch_size}, "
            f"{len(self)} batches, device={str(self.device)!r}, backend={self.backend!r})"
        )


def sampled_each(
    sampler: GPUSampler, batches: Iterable[tuple[Any, int]], sizes: Any, prefetch: int
) -> Generator[SampledBatch, None, None]:
    """Give batches of (seeds, number) that are sampled as far ahead as a loader's `prefetch` allows."""
    if prefetch:
        yield from sampler.sample_each(batches, sizes=sizes, at_once=max(1, prefetch // 2))
    else:
        for seeds, number in batches:
            yield sampler.sample(seeds, number, sizes=sizes)


def batch_of(sampled: SampledBatch, x: Any, y: Any, adapter: ModuleType, backend: str) -> Batch:
    """Return a batch of tensors of the framework that the adapter of a backend is for."""
    return Batch(
        x=None if x is None else adapter.to_framework(x),
        y=None if y is None else adapter.to_framework(y),
        n_id=adapter.to_framework(sampled.n_id),
        adjs=[adj.convert(backend) for adj in sampled.adjs],
        batch_size=sampled.batch_size,
        batch=sampled.batch,
    )


def _row_bytes(rows: CGPUFeature | None) -> int:
    return 0 if rows is None else rows.dtype.itemsize * math.prod(rows.shape[1:])


def seed_ids(seeds: Any, num_nodes: int) -> npt.NDArray[np.int64]:
    """Return node ids, int64, of unique ids or a mask; raise if they are neither."""
    given = host_array(seeds, "seeds")
    if given.dtype == np.bool_:
        if given.shape != (num_nodes,):
            needs = f"a mask of shape ({num_nodes},)"
            raise ArgumentValueError(explain("seeds", needs, f"shape {given.shape}", "pass a value a node, or ids"))
        return np.flatnonzero(given).astype(np.int64)
    ids = np.array(host_ids(seeds, "seeds"))  # a copy: what the user does to the array later must not matter
    check_range(ids, num_nodes, "seeds")
    check_unique(ids, num_nodes, "seeds")
    return ids


def rows_of(
    graph: CSRGraph | ShardedGraph, device: Device, rows: Any, argument: str, cache: int | float | str, policy: Any
) -> CGPUFeature | None:
    """Return a matrix as features on a device; features are checked and returned as they are.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        They do not belong to the graph, or are on another device.
    """
    if rows is None:
        return None
    if not isinstance(rows, CGPUFeature):
        store = CGPUFeature(graph, device, cache, policy=policy)
        store.from_cpu_tensor(rows)
        return store
    if rows.device != device:
        remedy = "make features and loader for the same device"
        raise ArgumentValueError(explain(argument, f"features on {device}", f"features on {rows.device}", remedy))
    if len(rows) != graph.num_nodes:
        remedy = "check that they belong to the graph"
        raise ArgumentValueError(explain(argument, f"{graph.num_nodes} rows", f"{len(rows)}", remedy))
    return rows
