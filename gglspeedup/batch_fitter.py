"""Making batches that fit into a memory budget, of the seeds of a step."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.edge_cut import EdgeCutter, Importance, node_importance, pagerank, random_importance
from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import CSRGraph
from gglspeedup.kernels.bounds import MAX_BATCH, MAX_FANOUT
from gglspeedup.memory_budget import CUTS, MemoryBudget, MemoryLimitError, Verdict
from gglspeedup.memory_model import BatchLoad
from gglspeedup.memory_watch import MemoryWatch

Ids = npt.NDArray[np.int64]

_SAME_SIZES = 2  # times that neighbours are drawn again before fanouts shrink
_NUMBERS_APART = MAX_BATCH >> 4  # between the batch numbers of two attempts: epochs do not get that far
_LEVELS = 16  # fractions of edges to keep: k / 16
_LITTLE = 0.1  # of the memory in use
_CAREFUL = 0.95  # of what would just fit: halves of a batch have more than half of its nodes


class Part(NamedTuple):
    """What is sampled for a step, or for a part of one.

    Attributes
    ----------
    sampled : SampledBatch
        Nodes and edges.
    share : float
        Which fraction of the step's seeds it has.
    last : bool
        Whether no other part of the step follows.
    load, predicted
        What a memory budget has said of it; None and 0.0 without one.
    """

    sampled: SampledBatch
    share: float = 1.0
    last: bool = True
    load: BatchLoad | None = None
    predicted: float = 0.0


class BatchFitter:
    """Samples steps one after the other so that each batch fits into a budget; one an epoch.

    Parameters
    ----------
    budget : MemoryBudget
        The limit, the policy, and the predictions.
    sampler : GPUSampler
        Draws.
    sizes : tuple of int
        Fanouts.
    row_bytes : (int, int)
        Bytes of a row of features, and of labels; 0 without.
    depth : int
        Batches that may exist at once, at most.
    watch : MemoryWatch
        Knows what is in use, and what an allocator keeps.
    """

    def __init__(
        self, budget: MemoryBudget, sampler: GPUSampler, sizes: tuple[int, ...], *, row_bytes: tuple[int, int],
        depth: int, watch: MemoryWatch,
    ) -> None:  # fmt: skip
        self._budget = budget
        self._sampler = sampler
        self._sizes = sizes
        self._row_bytes = row_bytes
        self._others: collections.deque[int] = collections.deque(maxlen=max(depth - 1, 0))
        self._watch = watch
        self._fitting = 0.0  # seeds that are expected to fit, by the last batch that did; 0.0 before
        self._importance: Importance | None = None

    def fit(self, seeds: Ids, number: int) -> Iterator[Part]:
        """Give the parts of a step, in the order of its seeds.

        Raises
        ------
        MemoryLimitError
            Not even a seed with a neighbour a hop fits.
        """
        self._budget.count(batches=1)
        first, count, begin = True, len(seeds), 0
        size = max(1, min(count, int(self._fitting))) if self._fitting and self._budget.policy == "split" else count
        while begin < count:
            part, size = self._next(seeds[begin:], size, number, whole=begin == 0)
            begin += part.sampled.batch_size
            last = begin >= count
            self._budget.count(parts=1, split=int(first and not last))
            first = False
            self._others.append(part.load.own if part.load else 0)
            made = [part._replace(share=part.sampled.batch_size / count, last=last)]
            del part
            yield made.pop()  # a thread that waits for room holds no memory of the device

    def _next(self, seeds: Ids, size: int, number: int, whole: bool) -> tuple[Part, int]:
        """Return a part of the first of some seeds, and how many to try next."""
        size = _evenly(len(seeds), size)
        while True:
            part, verdict = self._judge(self._sampler.sample(seeds[:size], number, sizes=self._sizes))
            if verdict.over and whole and size == len(seeds):
                changed = self._changed(part.sampled, seeds, number)
                if changed is not None:
                    return changed, size
            if verdict.fits or size <= 1:
                break
            size = _evenly(len(seeds), max(1, min(size - 1, int(size * verdict.scale * _CAREFUL))))
        if not verdict.fits:
            part = self._single(part, verdict)
        self._fitting = max(1.0, size * verdict.scale)
        return part, int(self._fitting)

    def _judge(self, sampled: SampledBatch) -> tuple[Part, Verdict]:
        load = self._load(sampled)
        verdict = self._budget.judge(load, self._watch.in_use)
        return Part(sampled, load=load, predicted=max(verdict.expected, self._watch.kept(load))), verdict

    def _load(self, sampled: SampledBatch) -> BatchLoad:
        x_bytes, y_bytes = self._row_bytes
        nodes = (*(adj.size[0] for adj in sampled.adjs), sampled.batch_size)
        edges = tuple(int(adj.e_id.shape[0]) for adj in sampled.adjs)
        inner = self._budget.widths
        own = nodes[0] * (8 + x_bytes) + sampled.batch_size * y_bytes + 24 * sum(edges)
        # Features have the width that they have; of those that the model makes, only the user may know it.
        widths = tuple(4.0 * width for width in inner) if inner else (1.0,) * len(nodes)
        return BatchLoad(nodes, edges, (float(x_bytes or 1), *widths[1:]), own, own + sum(self._others))

    # --- batches over the limit --------------------------------------------------------------------------------------

    def _changed(self, sampled: SampledBatch, seeds: Ids, number: int) -> Part | None:
        """Return a step made smaller as the policy says, None if that is splitting, or not enough."""
        if self._budget.policy in CUTS:
            part, verdict = self._cut(sampled)
            if not verdict.fits:
                return None
            self._budget.count(cut=1, edges_cut=_edges(sampled) - _edges(part.sampled))
            return part
        if self._budget.policy == "resample":
            for attempt, sizes in enumerate(smaller_sizes(sampled, self._sizes), 1):
                again = self._sampler.sample(seeds, (number + attempt * _NUMBERS_APART) % MAX_BATCH, sizes=sizes)
                part, verdict = self._judge(again)
                if verdict.fits:
                    self._budget.count(resampled=1)
                    return part
        return None

    def _cut(self, sampled: SampledBatch) -> tuple[Part, Verdict]:
        """Return the batch with as many sixteenths of its edges as fit, at least one."""
        cutter = EdgeCutter(on_host(sampled), self._edge_importance())
        low, high = 1, _LEVELS - 1
        best = None
        while low <= high:
            level = (low + high) // 2
            part, verdict = self._judge(cutter.cut(level / _LEVELS))
            if verdict.fits or best is None or not best[1].fits:
                best = part, verdict
            low, high = (level + 1, high) if verdict.fits else (low, level - 1)
        assert best is not None
        return best[0]._replace(sampled=self._on_device(best[0].sampled)), best[1]

    def _single(self, part: Part, verdict: Verdict) -> Part:
        """Return a seed that may be too large alone, as it can be trained on."""
        limit, seed = self._budget.limit, int(part.sampled.seeds[0])
        little = verdict.expected - verdict.fixed < _LITTLE * verdict.expected  # what is in use anyway is the rest
        if verdict.expected <= limit and (not verdict.over or little):
            return part
        smaller, cut = self._cut(part.sampled)
        if cut.expected > limit:
            needs, remedy = f"room for seed {seed} alone", "raise the limit, or lower sizes and the width of the model"
            got = f"{limit} bytes where {round(cut.expected)} are expected to be taken"
            raise MemoryLimitError(explain("memory_limit", needs, got, remedy))
        self._budget.count(single_seeds_cut=1, edges_cut=_edges(part.sampled) - _edges(smaller.sampled))
        if self._budget.counters.single_seeds_cut == 1:
            warnings.warn(
                f"seed {seed} alone would exceed the memory limit of {limit} bytes and has edges cut: gradients "
                "are not exact; MemoryBudget.stats() says how many seeds have", stacklevel=2,
            )  # fmt: skip
        return smaller

    def _edge_importance(self) -> Importance:
        if self._importance is None:
            policy = self._budget.policy if self._budget.policy in CUTS else "degree"
            self._importance = importance_of(policy, self._sampler.graph, self._sampler.seed)
        return self._importance

    def _on_device(self, batch: SampledBatch) -> SampledBatch:
        if not self._sampler.device.is_cuda:
            return batch
        from gglspeedup.placement import runtime_of

        runtime = runtime_of(self._sampler.device)
        with runtime.activate():
            adjs = [Adj(runtime.to_device(adj.edge_index), runtime.to_device(adj.e_id), adj.size) for adj in batch.adjs]
            return SampledBatch(runtime.to_device(batch.n_id), adjs, batch.batch_size, batch.batch)


def importance_of(policy: str, graph: Any, seed: int) -> Importance:
    """Return which edges a policy cuts last.

    Raises
    ------
    ArgumentTypeError
        PageRank is asked for of a graph in shards.
    """
    if policy == "random":
        return random_importance(seed)
    if policy == "degree":
        return node_importance(graph.degree())
    check_policy(policy, graph)
    return node_importance(pagerank(graph.indptr, graph.indices))


def check_policy(policy: str, graph: Any) -> None:
    """Raise ArgumentTypeError if a policy cannot be used on a graph."""
    if policy == "pagerank" and not isinstance(graph, CSRGraph):
        remedy = 'take policy="degree"'
        raise ArgumentTypeError(explain("memory_limit", "a CSRGraph for PageRank", type(graph).__name__, remedy))


def smaller_sizes(sampled: SampledBatch, sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Give the fanouts to draw again with: twice the same, then half of the last until all are 1.

    Half of "all neighbours" is half of the most that a node had.
    """
    for _ in range(_SAME_SIZES):
        yield sizes
    most = [int(np.bincount(on_host(sampled).adjs[~hop].col, minlength=1).max()) for hop in range(len(sizes))]
    now = tuple(min(size if size > 0 else high, MAX_FANOUT * 2) for size, high in zip(sizes, most, strict=True))
    while max(now) > 1:
        now = tuple(max(1, size // 2) for size in now)
        yield now


def on_host(batch: SampledBatch) -> SampledBatch:
    """Return a batch of NumPy arrays."""
    if isinstance(batch.n_id, np.ndarray):
        return batch
    adjs = [Adj(adj.edge_index.get(), adj.e_id.get(), adj.size) for adj in batch.adjs]
    return SampledBatch(batch.n_id.get(), adjs, batch.batch_size, batch.batch)


def _edges(batch: SampledBatch) -> int:
    return sum(int(adj.e_id.shape[0]) for adj in batch.adjs)


def _evenly(count: int, size: int) -> int:
    """Return the size of the largest of as few parts as possible, of up to `size` each."""
    parts = -(-count // max(1, min(size, count)))
    return -(-count // parts)
