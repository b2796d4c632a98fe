"""PyTorch Geometric: a sampler for its loaders, and the stores of a graph and of features behind them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_geometric.data as pyg_data  # type: ignore[import-untyped]
import torch_geometric.sampler as pyg_sampler  # type: ignore[import-untyped]
from torch_geometric.data.graph_store import EdgeLayout  # type: ignore[import-untyped]
from torch_geometric.sampler.neighbor_sampler import edge_sample, node_sample  # type: ignore[import-untyped]

from gglspeedup.adapters.torch import to_framework
from gglspeedup.arguments import check_range, host_ids
from gglspeedup.device import Device, DeviceLike, parse_device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, explain
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import CSRGraph, as_graph
from gglspeedup.kernels.bounds import MAX_BATCH
from gglspeedup.threads import set_num_threads

GraphLike = Any  # what GPUSampler takes, a homogeneous Data, or a GraphStore of this module
Hops = list[tuple[torch.Tensor, torch.Tensor]]  # (edge_index, e_id), nearest the seeds first
Ids = npt.NDArray[np.int64]


class NeighborSampler(pyg_sampler.BaseSampler):  # type: ignore[misc]
    """Samples neighbours for PyG's loaders, as their ``neighbor_sampler``, ``node_sampler`` or ``link_sampler``.

    A batch is laid out as PyG's own sampler does it: `node` starts with the seeds, each hop expands only the nodes new
    in the last one, edges come hop by hop, and the sizes of hops are there for ``trim_to_layer``. The batch number of
    the draws comes from torch's random state: ``torch.manual_seed`` (``seed_everything``) fixes all batches, and
    workers and epochs differ.

    Parameters
    ----------
    csr : Data, GraphStore, CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph. Of a ``Data``, sampled edges (``e_id``) are columns of its ``edge_index``, and so index its edge
        attributes; else they are those of ``CSRGraph``. Pass the loader the same ``Data``.
    num_neighbors : list of int
        Neighbours a node in each hop, nearest the seeds first; -1 for all. A loader that is given a sampler ignores
        its own `num_neighbors`, `replace`, `disjoint`, `subgraph_type`, `time_attr` and `weight_attr`.
    device : str or int
        Where to sample, and where the tensors of a batch lie. On a CUDA device the loader needs ``num_workers=0``.
    seed : int
        The key of the draws, along with torch's random state.
    replace : bool
        Whether to draw with replacement.
    **unsupported
        Any other argument of PyG's sampler (`disjoint`, `time_attr`, `weight_attr`, ...) raises ArgumentTypeError.

    Raises
    ------
    DeviceError, ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        The device is not there, or an argument cannot be used; the message names it.

    Notes
    -----
    A seed that stands several times in a batch keeps all its places: ``node[:batch_size]`` are the seeds as given. It
    is sampled once, and each place gets a copy of its edges, so that a model computes the same for each; sources
    refer to the first place. In a worker process the kernels use as many threads as torch does there: one, unless a
    ``worker_init_fn`` calls ``torch.set_num_threads``.

    Examples
    --------
    >>> import torch
    >>> from torch_geometric.data import Data
    >>> from torch_geometric.loader import NeighborLoader
    >>> from gglspeedup.adapters.pyg import NeighborSampler
    >>> data = Data(x=torch.eye(3), edge_index=torch.tensor([[1, 2, 0], [0, 1, 2]]))
    >>> loader = NeighborLoader(data, [2, 2], neighbor_sampler=NeighborSampler(data, [2, 2]), batch_size=1)
    >>> batch = next(iter(loader))
    >>> batch.n_id.tolist(), batch.edge_index.tolist(), batch.e_id.tolist()
    ([0, 1, 2], [[1, 2], [0, 1]], [0, 1])
    """

    def __init__(
        self, csr: GraphLike, num_neighbors: Any, *, device: DeviceLike = "cpu", seed: int = 0, replace: bool = False,
        **unsupported: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        for name in unsupported:
            raise ArgumentTypeError(explain(name, "PyG's own sampler", "gglspeedup's", "leave it out"))
        fanouts = _fanouts(num_neighbors)
        self._sampler = GPUSampler(device, _as_graph(csr), fanouts, seed=seed, replace=replace, expand="frontier")
        self._num_nodes = self._sampler.graph.num_nodes

    def sample_from_nodes(self, index: Any, **kwargs: Any) -> Any:
        """Return the sampled neighbourhood of seed nodes.

        Parameters
        ----------
        index : torch_geometric.sampler.NodeSamplerInput
            Without `time` and `input_type`.

        Returns
        -------
        torch_geometric.sampler.SamplerOutput
            int64 tensors on the sampler's device.

        Raises
        ------
        ArgumentIndexError, ArgumentValueError
            A seed is out of range, or seeds have timestamps or a node type.
        DeviceError
            The sampler is on a CUDA device, and this is a worker process.
        """
        _check_plain(index)
        return node_sample(index, self._sample)

    def sample_from_edges(self, index: Any, neg_sampling: Any = None) -> Any:
        """Return the sampled neighbourhood of the end points of seed edges, and of sampled negative ones.

        Parameters and errors are those of :meth:`sample_from_nodes`; PyG draws the negatives, from torch's random
        state. What became of the edges, their labels and the negatives is in the output's `metadata`.
        """
        _check_plain(index)
        return edge_sample(index, self._sample, self._num_nodes, disjoint=False, neg_sampling=neg_sampling)

    def _sample(self, seed: torch.Tensor, seed_time: None = None) -> Any:
        _enter_worker(self._sampler.device)
        seeds = host_ids(seed, "input_nodes")
        check_range(seeds, self._num_nodes, "input_nodes")
        # Workers are copies of each other: only torch's random state differs between them, and between epochs.
        number = int(torch.randint(MAX_BATCH, ()))
        repeats = _repeats(seeds)
        batch = self._sampler.sample(seeds if repeats is None else seeds[repeats[0]], batch=number)
        node = to_framework(batch.n_id)
        hops = [(to_framework(adj.edge_index), to_framework(adj.e_id)) for adj in reversed(batch.adjs)]
        if repeats is not None:
            arrays = (torch.from_numpy(array).to(node.device) for array in (seeds, *repeats))
            node, hops = _repeat_seeds(node, hops, *arrays)
        edge_index, e_id = (_concatenate(parts) for parts in zip(*hops, strict=True))
        return pyg_sampler.SamplerOutput(
            node=node,
            row=edge_index[0],
            col=edge_index[1],
            edge=e_id,
            num_sampled_nodes=[len(seeds), *(adj.size[0] - adj.size[1] for adj in reversed(batch.adjs))],
            num_sampled_edges=[len(ids) for _, ids in hops],
        )


class FeatureStore(pyg_data.FeatureStore):  # type: ignore[misc]
    """Keeps the node features of a homogeneous graph for PyG's loaders, each in a ``CGPUFeature``: `features`, by name.

    Parameters
    ----------
    csr : Data, GraphStore, CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph whose nodes the rows belong to.
    device : str or int
        Where rows are gathered, and where they lie. On a CUDA device the loader needs ``num_workers=0``.
    budget : int, float or str
        GPU memory for the hot rows of each matrix.
    policy : str or int array-like
        Which rows are hot; as of ``CGPUFeature``.

    Raises
    ------
    DeviceError, ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        The device is not there, or an argument cannot be used; the message names it.

    Examples
    --------
    >>> import torch
    >>> from gglspeedup.adapters.pyg import FeatureStore
    >>> store = FeatureStore(([0, 1, 2], [1, 0]))
    >>> store.put_tensor(torch.tensor([[1.0], [2.0]]), group_name=None, attr_name="x", index=None)
    True
    >>> store[None, "x", torch.tensor([1, 0, 1])].tolist()
    [[2.0], [1.0], [2.0]]
    """

    def __init__(
        self, csr: GraphLike, device: DeviceLike = "cpu", budget: int | float | str = 0, *, policy: Any = "degree"
    ) -> None:
        super().__init__()
        self._device: Device = parse_device(device)
        self._new_feature = partial(CGPUFeature, _as_graph(csr), self._device, budget, policy=policy)
        self._new_feature()  # checks them
        self.features: dict[str, CGPUFeature] = {}

    def _put_tensor(self, tensor: Any, attr: Any) -> bool:
        """Keep a matrix [num_nodes] or [num_nodes, F] whole; one of that name is replaced."""
        _check_none("group_name", attr.group_name)
        if attr.index is not None:
            remedy = "put the whole matrix; a later one replaces it"
            raise ArgumentValueError(explain("index", "None", type(attr.index).__name__, remedy))
        feature = self._new_feature()
        feature.from_cpu_tensor(tensor)
        self.features[attr.attr_name] = feature
        return True

    def _get_tensor(self, attr: Any) -> torch.Tensor:
        """Return rows by ids, slice or number, or all of them, as a tensor that shares the gathered buffer."""
        feature = self._feature(attr)
        if feature is None:
            needs = f"one of {sorted(self.features)}"
            raise ArgumentValueError(explain("attr_name", needs, repr(attr.attr_name), "put the tensor first"))
        _enter_worker(self._device)
        index = attr.index
        if index is None or isinstance(index, slice):
            index = np.arange(len(feature))[index or slice(None)]
        elif isinstance(index, int):
            return to_framework(feature[[index]])[0]
        return to_framework(feature[index])

    def _remove_tensor(self, attr: Any) -> bool:
        return self._feature(attr) is not None and self.features.pop(attr.attr_name) is not None

    def _get_tensor_size(self, attr: Any) -> tuple[int, ...] | None:
        feature = self._feature(attr)
        if feature is None:
            return None
        return feature.shape if attr.index is None else tuple(self._get_tensor(attr).shape)

    def get_all_tensor_attrs(self) -> list[Any]:
        """Return the name of each matrix, as ``TensorAttr`` without an index."""
        return [self._tensor_attr_cls(group_name=None, attr_name=name) for name in self.features]

    def _feature(self, attr: Any) -> CGPUFeature | None:
        return self.features.get(attr.attr_name) if attr.group_name is None else None


class GraphStore(pyg_data.GraphStore):  # type: ignore[misc]
    """Keeps the edges of a homogeneous graph as a ``CSRGraph``, for PyG's loaders and for :class:`NeighborSampler`.

    Edges come out in any layout, with ``edge_type=None``. As CSC they share the graph's memory: pointers int64,
    sources of the graph's dtype, which is int32 where node ids fit. As COO and CSR they are int64 copies; COO keeps
    the order in which edges were put, to which a sample's ``e_id`` leads back.

    Parameters
    ----------
    csr : Data, CSRGraph, scipy.sparse matrix or (indptr, indices), optional
        The graph; else put one by ``put_edge_index``.

    Examples
    --------
    >>> import torch
    >>> from gglspeedup.adapters.pyg import GraphStore
    >>> store = GraphStore()
    >>> edges = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 0])
    >>> store.put_edge_index(edges, edge_type=None, layout="coo", size=(3, 3))
    True
    >>> [part.tolist() for part in store.get_edge_index(edge_type=None, layout="csc")]
    [[2, 1, 0], [0, 2, 3, 3]]
    """

    def __init__(self, csr: GraphLike = None) -> None:
        super().__init__()
        self._graph = None if csr is None else _as_graph(csr)

    @property
    def graph(self) -> CSRGraph:
        """The graph; ArgumentValueError if none has been put."""
        if self._graph is None:
            raise ArgumentValueError(explain("GraphStore", "a graph", "none", "call put_edge_index first"))
        return self._graph

    def _put_edge_index(self, edge_index: Any, edge_attr: Any) -> bool:
        """Keep edges given as COO (row, col), CSC (row, colptr) or CSR (rowptr, col)."""
        _check_none("edge_type", edge_attr.edge_type)
        if self._graph is not None:
            raise ArgumentValueError(explain("edge_index", "an empty store", repr(self._graph), "remove that first"))
        row, col = (host_ids(part, "edge_index") for part in edge_index)
        nodes = None if edge_attr.size is None else max(edge_attr.size)
        if edge_attr.layout == EdgeLayout.CSC:
            self._graph = CSRGraph(col, row, num_nodes=nodes)
            return True
        if edge_attr.layout == EdgeLayout.CSR:
            forward = CSRGraph(row, col, num_nodes=nodes)  # checks them
            row, nodes = np.repeat(np.arange(forward.num_nodes), forward.degree()), forward.num_nodes
        if len(row) != len(col):
            got = f"{len(row)} and {len(col)}"
            raise ArgumentValueError(explain("edge_index", "as many sources as targets", got, "check it"))
        self._graph = CSRGraph.from_edge_index(np.stack([row, col]), nodes)
        return True

    def _get_edge_index(self, edge_attr: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (row, col), (row, colptr) or (rowptr, col); None if there is no such edge type."""
        if self._graph is None or edge_attr.edge_type is not None:
            return None
        if edge_attr.layout == EdgeLayout.CSC:
            return to_framework(self._graph.indices), to_framework(self._graph.indptr)
        row, col = self._columns(self._graph, edge_attr.layout == EdgeLayout.COO and edge_attr.is_sorted)
        if edge_attr.layout == EdgeLayout.CSR:
            col = col[np.argsort(row, kind="stable")]
            row = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=self._graph.num_nodes))])
        return torch.from_numpy(row), torch.from_numpy(col)

    def _remove_edge_index(self, edge_attr: Any) -> bool:
        found = self._graph is not None and edge_attr.edge_type is None
        self._graph = None if found else self._graph
        return found

    def get_all_edge_attrs(self) -> list[Any]:
        """Return the one layout, as ``EdgeAttr``, that PyG should convert from, so that it numbers edges as we do."""
        if self._graph is None:
            return []
        layout = EdgeLayout.CSC if self._numbered_by_target(self._graph) else EdgeLayout.COO
        return [self._edge_attr_cls(None, layout, size=(self._graph.num_nodes, self._graph.num_nodes))]

    @staticmethod
    def _numbered_by_target(graph: CSRGraph) -> bool:
        """Whether edges have their numbers from the graph, and not from another list that they were given in."""
        return graph.edge_ids is None or not np.array_equal(np.sort(graph.edge_ids), np.arange(graph.num_edges))

    def _columns(self, graph: CSRGraph, by_target: bool) -> tuple[Ids, Ids]:
        row, col = graph.indices.astype(np.int64), np.repeat(np.arange(graph.num_nodes), graph.degree())
        if by_target or self._numbered_by_target(graph):
            return row, col
        columns = np.empty((2, len(row)), np.int64)
        columns[:, graph.edge_ids] = row, col
        return columns[0], columns[1]


def _as_graph(csr: GraphLike) -> CSRGraph:
    if isinstance(csr, GraphStore):
        return csr.graph
    if isinstance(csr, pyg_data.Data):
        if csr.edge_index is None:
            raise ArgumentValueError(explain("csr", "a Data with edge_index", "one without", "set data.edge_index"))
        return CSRGraph.from_edge_index(csr.edge_index, csr.num_nodes)
    if isinstance(csr, pyg_data.GraphStore):  # a HeteroData is one, too
        needs = "a homogeneous Data, or a GraphStore of gglspeedup"
        raise ArgumentTypeError(explain("csr", needs, type(csr).__name__, "pass data.to_homogeneous() of a HeteroData"))
    return as_graph(csr)


def _fanouts(num_neighbors: Any) -> Any:
    fanouts = getattr(num_neighbors, "values", num_neighbors)  # of PyG's NumNeighbors
    if isinstance(num_neighbors, dict) or isinstance(fanouts, dict):
        needs = "a list of int, as only homogeneous graphs are sampled"
        raise ArgumentTypeError(explain("num_neighbors", needs, "a dict", "pass one integer a hop"))
    fanouts = list(fanouts) if hasattr(fanouts, "__iter__") else fanouts
    if isinstance(fanouts, list) and 0 in fanouts:  # which GPUSampler takes for "all", and PyG for "none"
        remedy = "leave the hop out, or pass -1 for all neighbours"
        raise ArgumentValueError(explain("num_neighbors", "-1 or at least 1 a hop", fanouts, remedy))
    return fanouts


def _check_plain(index: Any) -> None:
    _check_none("input_type", index.input_type)
    _check_none("time", index.time)


def _check_none(name: str, value: Any) -> None:
    if value is not None:
        needs, got = "None, as only homogeneous graphs without time are sampled", type(value).__name__
        raise ArgumentValueError(explain(name, needs, got, "use PyG's own sampler and stores for others"))


def _enter_worker(device: Device) -> None:
    """Do as torch does in a DataLoader's worker process: take its number of threads, and keep off the GPU."""
    if torch.utils.data.get_worker_info() is None:
        return
    if device.is_cuda:
        raise DeviceError(explain("num_workers", f"0 with device {str(device)!r}", "a worker process", "leave it out"))
    set_num_threads(torch.get_num_threads())


def _concatenate(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if len(parts) == 1 or parts[0].is_cuda:
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    # torch.cat would wake torch's threads, which then wait busily for more, on the cores that the next sample needs.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts], -1))


def _repeats(seeds: Ids) -> tuple[Ids, Ids] | None:
    """Return None if no seed is repeated, else the first places of the unique ones, and each seed's number there."""
    if len(np.unique(seeds)) == len(seeds):
        return None
    _, first, inverse = np.unique(seeds, return_index=True, return_inverse=True)
    return np.sort(first), np.argsort(np.argsort(first))[inverse]


def _repeat_seeds(
    node: torch.Tensor, hops: Hops, seeds: torch.Tensor, first: torch.Tensor, number: torch.Tensor
) -> tuple[torch.Tensor, Hops]:
    """Return the batch of the unique seeds, those at `first`, as one of all seeds; seed i is their `number`[i]-th."""
    unique, count = len(first), len(seeds)
    local = torch.arange(len(node), device=node.device) + (count - unique)
    local[:unique] = first
    (edge_index, e_id), *others = hops
    degree = torch.bincount(edge_index[1], minlength=unique)
    length = degree[number]
    target = torch.repeat_interleave(length)
    shift = (torch.cumsum(degree, 0) - degree)[number] - (torch.cumsum(length, 0) - length)
    edge = torch.arange(len(target), device=node.device) + shift[target]  # edges are sorted by target
    copied = torch.stack([local[edge_index[0, edge]], target]), e_id[edge]
    return torch.cat([seeds, node[unique:]]), [copied, *((local[edges], ids) for edges, ids in others)]
