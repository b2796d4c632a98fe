"""`DistNodeLoader`: batches of seeds on a graph in parts, with features and labels, in the user's framework."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.arguments import check_count, check_flag, check_sizes, host_array
from gglspeedup.device import Device
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import CommunicatorError, Ids, RankError, check_concurrent
from gglspeedup.distributed.feature import DistFeature
from gglspeedup.distributed.local import LocalCommunicator
from gglspeedup.distributed.sampler import DistSampler
from gglspeedup.epochs import EpochLoader, Numbered, device_for
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, GGLSpeedupError, explain
from gglspeedup.interchange import integer_view
from gglspeedup.kernels.bounds import MAX_BATCH, MAX_FANOUT, MAX_HOPS
from gglspeedup.loader import Batch, batch_of, seed_ids

_Loaded = tuple[SampledBatch, Any, Any]  # with x and y


class _LeftError(GGLSpeedupError, RuntimeError):
    """The loop of a rank has left its epoch."""


class DistNodeLoader(EpochLoader[Batch]):
    """An iterable over the batches of each rank, sampled and gathered on a graph in parts; NodeLoader's batches.

    All ranks iterate together, and have as many batches each. A batch is, bit for bit, what NodeLoader makes on the
    whole graph of the same seeds and the same batch number, whatever the number of ranks and whichever owns which node.

    Parameters
    ----------
    sampler : DistSampler
        Brings the graph, the communicator, and the seed and ways of drawing.
    x : DistFeature, or array or tensor [num_nodes, F] or [num_nodes], optional
        Features; an array has those of all nodes, and every rank has it.
    y : DistFeature, or array or tensor [num_nodes] or [num_nodes, C], optional
        Labels, in the same way; each batch has those of its seeds.
    seeds : int array-like or tensor [n], or bool [num_nodes]
        The nodes that this rank makes batches of: unique ids or a mask. Ranks may have different numbers of them; one
        that has fewer batches gets empty ones at the end.
    batch_size : int
        Seeds a batch.
    sizes : sequence of int, optional
        Fanouts; by default those of the sampler.
    shuffle : bool
        Whether each epoch visits the seeds in an order of its own, which depends on `seed` and the epoch alone.
    drop_last : bool
        Whether to end before the first rank has no batch of `batch_size` left.
    deal_out : bool
        Whether `seeds` are those of all ranks together, which each epoch deals out anew, as NodeLoader does with
        ``rank`` and ``world_size``; up to one seed less than there are ranks is visited twice for that.
    together : int
        Batches that are made in the messages of one; that many are held at once.
    backend, seed
        As NodeLoader's; the seed is that of the order.
    prefetch : int
        Batches made ahead, in a background thread; 0 makes each when it is asked for.

    Raises
    ------
    RankError
        Ranks have different arguments; all ranks say so. While iterating also: another rank has left its loop.
    CommunicatorError
        A rank has died, did not come, or is in another epoch.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it, and the other ranks raise RankError.

    Notes
    -----
    If `x` or `y` is a DistFeature on a GPU, all arrays of a batch are there: `n_id`, `adjs` and what else is made on
    the host is copied. The background threads have streams of their own, and hand batches over as NodeLoader's do.

    With `prefetch` the exchanges are made by the background thread, as long as an epoch is under way. The training loop
    must not use the communicators of `sampler`, `x` and `y` meanwhile, but one of its own: a second
    ``MpiCommunicator()`` or ``TorchCommunicator()``, whose messages never meet.

    A loop that ends before its epoch (``break``, an exception) tells the other ranks, whose loops have to end as well;
    after that the communicator can be used further.

    Examples
    --------
    >>> from gglspeedup import CSRGraph
    >>> from gglspeedup.distributed import DistNodeLoader, DistSampler, GraphPart, LocalCommunicator, PartBook
    >>> part = GraphPart.of(CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), PartBook.contiguous([0, 3]), 0)
    >>> sampler = DistSampler(part, LocalCommunicator(), [2])
    >>> loader = DistNodeLoader(sampler, np.eye(3), [5, 6, 7], seeds=[0, 2], batch_size=1, shuffle=False)
    >>> [(batch.n_id.tolist(), batch.x.shape, batch.y.tolist()) for batch in loader]
    [([0, 1, 2], (3, 3), [5]), ([2, 0], (2, 3), [7])]
    """

    device = Device()

    def __init__(
        self, sampler: DistSampler, x: Any = None, y: Any = None, *, seeds: Any, batch_size: int, sizes: Any = None,
        shuffle: bool = True, drop_last: bool = False, deal_out: bool = False, together: int = 1,
        backend: str = "numpy", seed: int = 0, prefetch: int = 2,
    ) -> None:  # fmt: skip
        if not isinstance(sampler, DistSampler):
            remedy = "make one of this rank's part"
            raise ArgumentTypeError(explain("sampler", "a DistSampler", type(sampler).__name__, remedy))
        self.sampler = sampler
        collective = self._collective = Collective(sampler.communicator)

        def check() -> Ids:
            self.deal_out = check_flag(deal_out, "deal_out")
            share = (collective.rank, collective.size) if self.deal_out else (0, 1)
            super(DistNodeLoader, self).__init__(
                seed_ids(seeds, sampler.book.num_nodes), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last,
                backend=backend, seed=seed, prefetch=prefetch, rank=share[0], world_size=share[1],
            )  # fmt: skip
            self._together = check_count(together, "together", 1)
            self.sizes = check_sizes(sampler.sizes if sizes is None else sizes, MAX_FANOUT, MAX_HOPS)
            self.features, self.labels = (_rows_of(rows, sampler, name) for rows, name in ((x, "x"), (y, "y")))
            self.device = device_for(backend, _device_of(self.features, self.labels))
            if self.prefetch:
                check_concurrent(collective.communicator, "prefetch")
            return _nothing(collective)

        with collective.together():
            collective.counts("DistNodeLoader(...)", check)
            facts = {
                "batch_size": self.batch_size,
                "sizes": self.sizes,
                "shuffle": self.shuffle,
                "drop_last": self.drop_last,
                "deal_out": self.deal_out,
                "seeds": zlib.crc32(self._items.data) if self.deal_out else None,
                "together": self._together,
                "seed": self.seed,
                "x": _is_shared(x),
                "y": _is_shared(y),
            }
            said = collective.same("DistNodeLoader", facts, {"batches": super().__len__()})
        counts = [own["batches"] for own in said]
        self._batches = int(min(counts) if self.drop_last else max(counts))

    def __len__(self) -> int:
        """Return the number of batches of an epoch, which is that of all ranks."""
        return self._batches

    def _numbered(self, epoch: int) -> Iterator[Numbered]:
        with self._collective.together():
            self._collective.counts(f"epoch {epoch} of DistNodeLoader", lambda: _nothing(self._collective))
        rank, ranks = self._collective.rank, self._collective.size
        for index, (items, _) in enumerate(super()._numbered(epoch)):
            yield items, ((epoch * len(self) + index) * ranks + rank) % MAX_BATCH

    def _sample_all(self, numbered: Iterable[Numbered]) -> Generator[_Loaded, None, None]:
        # All exchanges are here, and so in one thread and one order.
        left = iter(numbered)
        try:
            while group := list(islice(left, self._together)):
                yield from self._make(group)
        except GeneratorExit:
            if next(left, None) is not None:
                self._leave()
            raise

    def _make(self, batches: Sequence[Numbered]) -> list[_Loaded]:
        sampled = self.sampler.sample_many(batches, sizes=self.sizes)
        nothing = [None] * len(sampled)
        x = nothing if self.features is None else self.features.take_many([batch.n_id for batch in sampled])
        y = nothing if self.labels is None else self.labels.take_many([batch.seeds for batch in sampled])
        return list(zip(sampled, x, y, strict=True))

    def _leave(self) -> None:
        """Take part in the next exchange by saying that there will be none."""

        def none() -> Iterator[Any]:
            raise _LeftError("its loop has left the epoch")
            yield

        # Others may have left as well, or be gone.
        with contextlib.suppress(_LeftError, RankError, CommunicatorError):
            self.sampler.sample_many(none(), sizes=self.sizes)  # type: ignore[arg-type]

    def _gather(self, loaded: _Loaded) -> _Loaded:
        if not self.device.is_cuda:
            return loaded
        from gglspeedup.placement import runtime_of

        runtime = runtime_of(self.device)

        def there(array: Any) -> Any:
            if array is None or runtime.is_device(array):
                return array
            integers, narrow = integer_view(array)
            copied = runtime.to_device(integers)
            return copied if narrow is None else copied.view(array.dtype)

        sampled, x, y = loaded
        with runtime.activate():
            adjs = [Adj(there(adj.edge_index), there(adj.e_id), adj.size) for adj in sampled.adjs]
            return replace(sampled, n_id=there(sampled.n_id), adjs=adjs), there(x), there(y)

    def _convert(self, loaded: _Loaded, adapter: ModuleType) -> Batch:
        sampled, x, y = loaded
        return batch_of(sampled, x, y, adapter, self.backend)

    def __repr__(self) -> str:
        return (
            f"DistNodeLoader(rank {self._collective.rank} of {self._collective.size}, {len(self._items)} seeds, "
            f"sizes={list(self.sizes)}, batch_size={self.batch_size}, {len(self)} batches, backend={self.backend!r})"
        )


def _device_of(x: DistFeature | None, y: DistFeature | None) -> Device:
    """Return the GPU that rows are on, or the CPU; raise ArgumentValueError if they are on two."""
    gpus = {rows.device for rows in (x, y) if rows is not None and rows.device.is_cuda}
    if len(gpus) > 1:
        needs, got = "features and labels on one GPU", " and ".join(sorted(map(str, gpus)))
        raise ArgumentValueError(explain("y", needs, got, "make both on the same device"))
    return gpus.pop() if gpus else Device()


def _is_shared(rows: Any) -> bool | None:
    """Return whether the rows lie on several ranks, None for no rows."""
    return None if rows is None else isinstance(rows, DistFeature)


def _rows_of(rows: Any, sampler: DistSampler, argument: str) -> DistFeature | None:
    """Return rows as features, those of an array as features of a single rank."""
    if rows is None:
        return None
    nodes = sampler.book.num_nodes
    given = rows if isinstance(rows, DistFeature) else host_array(rows, argument)
    if len(given.shape) < 1 or given.shape[0] != nodes:
        needs, got = f"a row for each of {nodes} nodes", f"shape {tuple(given.shape)}"
        raise ArgumentValueError(explain(argument, needs, got, "check that it belongs to the graph"))
    if isinstance(rows, DistFeature):
        return rows
    return DistFeature(PartBook.contiguous([0, nodes]), LocalCommunicator(), given)


def _nothing(collective: Collective) -> Ids:
    return np.empty((collective.size, 0), np.int64)
