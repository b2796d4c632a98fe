"""`SubgraphLoader`: batches of whole parts of a graph with their 1-hop halo, in the user's framework."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.arguments import host_array
from gglspeedup.device import DeviceLike
from gglspeedup.epochs import EpochLoader, Numbered, device_for
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import GraphLike, as_graph
from gglspeedup.loader import rows_of, sampled_each
from gglspeedup.memory import BufferPool
from gglspeedup.partitions import check_ptr

Ids = npt.NDArray[np.int64]


@dataclass(eq=False)
class SubgraphBatch:
    """Some parts of a graph with every edge into them, as arrays of the loader's backend.

    Attributes
    ----------
    x : array [N0, F] or [N0], or None
        Features of the nodes `n_id`, in their own dtype.
    y : array [B] or [B, C], or None
        Labels of the in-batch nodes.
    n_id : int64 array [N0]
        The in-batch nodes, part by part, then their halo: every other in-neighbour once, by first occurrence.
    adj : Adj
        Every edge into the in-batch nodes, which are its targets and the first of its sources.
    edge_weight : array [E] or [E, C], or None
        The weights of the edges of `adj`.
    batch_size : int
        B, the number of in-batch nodes.
    offset, count : int64 NumPy arrays [R]
        Where ranges of consecutive in-batch nodes begin, and their lengths, as they follow each other in `n_id`; parts
        that are neighbours, in their numbers and in the batch, make one range.
    parts : int64 NumPy array
        The parts, in their order in the batch.
    """

    x: Any
    y: Any
    n_id: Any
    adj: Adj
    edge_weight: Any
    batch_size: int
    offset: Ids
    count: Ids
    parts: Ids


class _Loaded(NamedTuple):
    """A batch as arrays of the device."""

    sampled: SampledBatch
    x: Any
    y: Any
    edge_weight: Any
    offset: Ids
    counts: Ids
    parts: Ids


class SubgraphLoader(EpochLoader[SubgraphBatch]):
    """An iterable over batches of whole parts, as GNNAutoScale and Cluster-GCN train on.

    The batches are a pure function of (graph, ptr, batch_size, shuffle, seed, epoch), whatever `prefetch`, the device
    and the number of threads; they are made in background threads.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The permuted graph, as :func:`permute` returns it: row v lists the in-neighbours of v.
    x : array or tensor [num_nodes, F] or [num_nodes], or CGPUFeature, optional
        Features, permuted as well. A CGPUFeature is shared, not copied.
    y : array or tensor [num_nodes] or [num_nodes, C], or CGPUFeature, optional
        Labels, permuted as well.
    ptr : int array-like [num_parts + 1]
        Part i is the nodes ``ptr[i]:ptr[i + 1]``, as :func:`partition` returns it.
    batch_size : int
        Parts a batch.
    edge_weight : array or tensor [num_edges] or [num_edges, C], optional
        Weights in the order of ``csr.indices``, whatever its ``edge_ids``: what was ``weight`` in the order of a graph
        without ``edge_ids`` is ``weight[csr.edge_ids]`` after :func:`permute`. They stay in host memory, also as a
        ``numpy.memmap``; do not change them afterwards.
    shuffle : bool
        Whether each epoch visits the parts in an order of its own, which depends on `seed` and the epoch alone.
    drop_last : bool
        Whether to leave out a last batch of fewer parts than the others.
    device, cache, backend, prefetch, placement, policy
        As NodeLoader's.
    seed : int
        0 to 2**64 - 1; of the order.
    rank, world_size : int
        As NodeLoader's, of parts.
    workers : int
        As NodeLoader's.

    Raises
    ------
    DeviceError
        The CUDA device is not there, or the backend cannot use it.
    MissingPackageError
        The backend is not installed.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, SubgraphLoader, partition, permute
    >>> graph, x = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), np.eye(3, dtype=np.float32)
    >>> perm, ptr = partition(graph, 2, "contiguous")
    >>> loader = SubgraphLoader(permute(graph, perm), x[perm], ptr=ptr, batch_size=1, shuffle=False, device="cpu")
    >>> [(batch.n_id.tolist(), batch.batch_size, batch.offset.tolist(), batch.count.tolist()) for batch in loader]
    [([0, 1, 2], 2, [0], [2]), ([2, 0], 1, [2], [1])]
    """

    def __init__(
        self, csr: GraphLike, x: Any = None, y: Any = None, *, ptr: Any, batch_size: int, edge_weight: Any = None,
        shuffle: bool = True, drop_last: bool = False, device: DeviceLike = "auto", cache: int | float | str = "0",
        backend: str = "numpy", seed: int = 0, prefetch: int = 2, placement: str = "auto", policy: Any = "degree",
        rank: int = 0, world_size: int = 1, workers: int = 0,
    ) -> None:  # fmt: skip
        graph = as_graph(csr)
        self.ptr = np.array(check_ptr(ptr, graph.num_nodes))  # a copy: what the user does to the array must not matter
        super().__init__(
            np.arange(len(self.ptr) - 1), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, backend=backend,
            seed=seed, prefetch=prefetch, rank=rank, world_size=world_size, workers=workers,
        )  # fmt: skip
        self.edge_weight = None if edge_weight is None else _edge_values(edge_weight, graph.num_edges)
        self.device = self._made_on(device_for(backend, device))
        self._indptr = graph.indptr
        self.graph_sampler = GPUSampler(self.device, graph, [-1], seed=self.seed, placement=placement)
        self.features = rows_of(graph, self.device, x, "x", cache, policy)
        self.labels = rows_of(graph, self.device, y, "y", 0, "degree")
        self._pool = BufferPool()

    def evaluation(self, *, batch_size: int | None = None) -> SubgraphLoader:
        """Return a loader over all parts, in their order, that shares graph, features and labels with this one.

        Parameters
        ----------
        batch_size : int, optional
            Parts a batch; that of training by default.

        Examples
        --------
        >>> from gglspeedup import CSRGraph, SubgraphLoader
        >>> loader = SubgraphLoader(CSRGraph([0, 1, 2], [1, 0]), ptr=[0, 1, 2], batch_size=1, device="cpu")
        >>> [batch.parts.tolist() for batch in loader.evaluation()]
        [[0], [1]]
        """
        return self._in_order(batch_size)

    def _sample_all(self, numbered: Iterable[Numbered]) -> Generator[tuple[SampledBatch, Ids], None, None]:
        numbered, begun = itertools.tee(numbered)
        seeds = ((self._nodes(items), number) for items, number in begun)
        with contextlib.closing(sampled_each(self.graph_sampler, seeds, None, self.prefetch)) as batches:
            for sampled in batches:
                yield sampled, np.array(next(numbered)[0])

    def _nodes(self, parts: Ids) -> Ids:
        """Return the nodes of some parts."""
        offset, count = self._ranges(parts)
        return np.arange(int(count.sum())) + np.repeat(offset - np.cumsum(count) + count, count)

    def _gather(self, sampled_parts: tuple[SampledBatch, Ids]) -> _Loaded:
        sampled, parts = sampled_parts
        offset, count = self._ranges(parts)
        x = None if self.features is None else self.features.take(sampled.n_id)
        y = None if self.labels is None else self.labels.take(sampled.seeds)
        return _Loaded(sampled, x, y, self._weights(offset, count), offset, count, parts)

    def _ranges(self, parts: Ids) -> tuple[Ids, Ids]:
        """Return the begins and lengths of the ranges of consecutive nodes that some parts make up."""
        begin, end = self.ptr[parts], self.ptr[parts + 1]
        filled = begin < end
        begin, end = begin[filled], end[filled]
        joined = np.flatnonzero(begin[1:] == end[:-1])
        offset = np.delete(begin, joined + 1)
        return offset, np.delete(end, joined) - offset

    def _weights(self, offset: Ids, count: Ids) -> Any:
        """Return the weights of all edges into some ranges of nodes, on the device."""
        values = self.edge_weight
        if values is None:
            return None
        # A batch has its rows whole and in order: its edges lie in ranges, and no edge has to be looked up.
        indptr = self._indptr
        ranges = list(zip(indptr[offset].tolist(), indptr[offset + count].tolist(), strict=True))
        found = self._pool.empty((sum(end - begin for begin, end in ranges), *values.shape[1:]), values.dtype)
        place = 0
        for begin, end in ranges:
            found[place : place + end - begin] = values[begin:end]
            place += end - begin
        if not self.device.is_cuda:
            return found
        from gglspeedup.placement import runtime_of

        runtime = runtime_of(self.device)
        with runtime.activate():
            return runtime.to_device(found)

    def _convert(self, loaded: _Loaded, adapter: ModuleType) -> SubgraphBatch:
        sampled, x, y, edge_weight, offset, count, parts = loaded
        return SubgraphBatch(
            None if x is None else adapter.to_framework(x),
            None if y is None else adapter.to_framework(y),
            adapter.to_framework(sampled.n_id),
            sampled.adjs[0].convert(self.backend),
            None if edge_weight is None else adapter.to_framework(edge_weight),
            sampled.batch_size,
            offset,
            count,
            parts,
        )

    def __repr__(self) -> str:
        return (
            f"SubgraphLoader({len(self.ptr) - 1} parts of {self.graph_sampler.graph.num_nodes} nodes, "
            f"batch_size={self.batch_size}, {len(self)} batches, device={str(self.device)!r}, backend={self.backend!r})"
        )


def _edge_values(values: Any, num_edges: int) -> npt.NDArray[Any]:
    """Return values of edges as a NumPy array; raise unless there is one an edge."""
    array = host_array(values, "edge_weight")
    if array.ndim not in (1, 2) or len(array) != num_edges:
        needs, remedy = f"shape [{num_edges}] or [{num_edges}, C], a value an edge", "permute them as the graph was"
        raise ArgumentValueError(explain("edge_weight", needs, f"shape {array.shape}", remedy))
    if array.dtype.kind not in "biufc":
        raise ArgumentTypeError(explain("edge_weight", "a numeric dtype", f"dtype {array.dtype}", "convert it first"))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
