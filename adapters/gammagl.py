"""GammaGL: its ``NeighborSampler``, with sampling by gglspeedup behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from gammagl.loader.neighbor_sampler import Adj, EdgeIndex  # type: ignore[import-untyped]
from gammagl.sparse import SparseGraph  # type: ignore[import-untyped]

import gglspeedup.adjs
from gglspeedup.adapters.tensorlayerx import to_framework
from gglspeedup.arguments import check_range, check_unique, host_array, host_ids
from gglspeedup.device import DeviceLike
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, explain
from gglspeedup.graph import CSRGraph, as_graph
from gglspeedup.loader import Batch, NodeLoader

# Options of TensorLayerX's DataLoader that say how its worker processes make batches: there are none of these here.
_WITHOUT_MEANING = {"num_workers", "time_out", "worker_init_fn", "prefetch_factor", "persistent_workers"}


class NeighborSampler:
    """GammaGL's loader of sampled neighbourhoods: yields ``dst_node, n_id, adjs`` for each batch of nodes.

    Arguments, their order and what is yielded are those of ``gammagl.loader.NeighborSampler``. What differs:

    - Batches are a pure function of (graph, nodes, sizes, batch_size, seed, epoch). Each ``iter(loader)`` takes the
      next epoch, from 0, with other neighbours and, if shuffled, another order; see :meth:`set_epoch`.
    - Batches are made in a background thread, on a GPU if there is one that the backend can use.
    - Every K <= 0 in `sample_lists` takes all neighbours; GammaGL takes none for 0.
    - Edges are sorted by their targets; those of one target have the order of the graph. In an ``Adj`` they are sorted
      by target, then by source, as in GammaGL.
    - ``e_id`` is int64 on every backend. With ``return_e_id=False`` it is None for a SparseGraph as well, and a
      SparseGraph without values yields such ones.
    - Nodes that stand twice in `node_idx` are refused.

    Parameters
    ----------
    edge_index : int tensor or array [2, E], SparseGraph, CSRGraph or scipy.sparse matrix
        Edges from sources (row 0) to targets (row 1), as a tensor of any framework, a NumPy array or a list; neighbours
        are the sources of a node's edges. Rows of all others are targets: they list whom a node samples from.
    sample_lists : sequence of int
        Fanouts, nearest the nodes of a batch first.
    node_idx : int tensor or array [n], or bool [num_nodes], optional
        The nodes to make batches of: unique ids or a mask; all nodes by default.
    num_nodes : int, optional
        By default one more than the largest id in `edge_index` and `node_idx`, or the length of a mask.
    return_e_id : bool
        Whether to yield the numbers of edges: columns of `edge_index`, positions in a SparseGraph or scipy matrix, or a
        CSRGraph's own.
    transform : callable, optional
        Called with (dst_node, n_id, adjs) of each batch; what it returns is yielded in their place.
    device : str or int
        Where batches are made: ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``. Those of a SparseGraph are made
        on the CPU.
    seed : int
        0 to 2**64 - 1; of the order and the draws.
    prefetch : int
        Batches made ahead; 0 makes each when it is asked for.
    workers : int
        Processes in which batches are made, on the CPU, as NodeLoader's.
    batch_size : int
        Nodes a batch.
    shuffle, drop_last : bool
        Whether each epoch has an order of its own; whether to leave out a last, shorter batch.
    **options
        The other options of ``tensorlayerx.dataflow.DataLoader``. Those about its workers have no effect.

    Attributes
    ----------
    loader : NodeLoader
        What makes the batches.

    Raises
    ------
    DeviceError
        The CUDA device is not there, or the backend or the graph cannot be used with it.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    A batch has `dst_node`, int64 [B], the nodes it was made of; `n_id`, int64 [N0], which starts with them; and `adjs`,
    outermost hop first (of one hop the bare object), each with `size` = (sources, targets), `e_id`, and `edge_index`,
    int64 [2, E] in local ids, or `adj_t`, a SparseGraph [targets, sources], if the graph was given as one. The targets
    of each are the first of its sources, and the sources of the first are `n_id`.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup.adapters.gammagl import NeighborSampler
    >>> edge_index = np.array([[1, 2, 0], [0, 0, 2]])
    >>> loader = NeighborSampler(edge_index, [-1, -1], node_idx=np.array([2]), batch_size=1)
    >>> dst_node, n_id, adjs = next(iter(loader))
    >>> n_id.numpy().tolist(), [adj.size for adj in adjs], adjs[0].e_id.numpy().tolist()
    ([2, 0, 1], [(3, 2), (2, 1)], [2, 0, 1])
    """

    def __init__(
        self, edge_index: Any, sample_lists: Any, node_idx: Any = None, num_nodes: int | None = None,
        return_e_id: bool = True, transform: Callable[[Any, Any, Any], Any] | None = None, *,
        device: DeviceLike = "auto", seed: int = 0, prefetch: int = 2, batch_size: int = 1, shuffle: bool = False,
        drop_last: bool = False, workers: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        _check_options(options)
        if not (transform is None or callable(transform)):
            raise ArgumentTypeError(explain("transform", "a callable", repr(transform), "pass a function, or None"))
        self.return_e_id = return_e_id
        self.transform = transform
        self.is_sparse_graph = isinstance(edge_index, SparseGraph)
        self._values = None
        if self.is_sparse_graph:
            values = edge_index.storage.value()
            self._values = None if values is None else host_array(values, "edge_index")
            device = _host(device)
        nodes = None if node_idx is None else _ids_or_mask(node_idx)
        graph = _graph(edge_index, nodes, num_nodes)
        self.loader = NodeLoader(
            graph, seeds=_ids(nodes, graph.num_nodes), sizes=sample_lists, batch_size=batch_size,
            shuffle=shuffle, drop_last=drop_last, device=device, seed=seed, prefetch=prefetch, workers=workers,
            backend="numpy" if self.is_sparse_graph else "tensorlayerx",
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fanouts, nearest the nodes of a batch first; -1 takes every neighbour."""
        return self.loader.sizes

    @property
    def batch_size(self) -> int:
        """Nodes a batch."""
        return self.loader.batch_size

    @property
    def dataset(self) -> npt.NDArray[np.int64]:
        """The nodes that batches are made of, int64 [n]."""
        return self.loader.dataset

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, from 0, the next ``iter`` takes; the one after that takes the next."""
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return map(self._yielded, iter(self.loader))

    def _yielded(self, batch: Batch) -> Any:
        make = self._sparse if self.is_sparse_graph else self._edges
        adjs = [make(adj) for adj in batch.adjs]
        n_id = to_framework(batch.n_id) if self.is_sparse_graph else batch.n_id
        result = n_id[: batch.batch_size], n_id, adjs if len(adjs) > 1 else adjs[0]
        return result if self.transform is None else self.transform(*result)

    def _edges(self, adj: gglspeedup.adjs.Adj) -> EdgeIndex:
        return EdgeIndex(adj.edge_index, adj.e_id if self.return_e_id else None, adj.size)

    def _sparse(self, adj: gglspeedup.adjs.Adj) -> Adj:
        order = np.lexsort((adj.row, adj.col))
        row, col, e_id = adj.col[order], adj.row[order], adj.e_id[order]
        # GammaGL would compute the pointers when they are needed; its compiled operator for that, built against
        # NumPy 1, fills them with one and the same number under NumPy 2.
        rowptr = np.zeros(adj.size[1] + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=adj.size[1]), out=rowptr[1:])
        graph = SparseGraph(
            row=to_framework(row), rowptr=to_framework(rowptr), col=to_framework(col),
            value=None if self._values is None else to_framework(self._values[e_id]),
            sparse_sizes=adj.size[::-1], is_sorted=True, trust_data=True,
        )  # fmt: skip
        return Adj(graph, to_framework(e_id) if self.return_e_id else None, adj.size)

    def __repr__(self) -> str:
        return f"NeighborSampler({self.loader!r})"


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _WITHOUT_MEANING:
            continue
        if name not in ("sampler", "batch_sampler"):
            raise ArgumentTypeError(explain(name, "an option of DataLoader", "an unknown one", "leave it out"))
        if value is not None:
            remedy = "use node_idx, shuffle, batch_size and drop_last"
            raise ArgumentTypeError(explain(name, "None", type(value).__name__, remedy))


def _host(device: DeviceLike) -> DeviceLike:
    if str(device) not in ("auto", "cpu"):
        needs, remedy = "the CPU for a SparseGraph", "pass its edge_index, or leave the device out"
        raise DeviceError(explain("device", needs, repr(device), remedy))
    return "cpu"


def _ids_or_mask(node_idx: Any) -> npt.NDArray[Any]:
    """Return int64 or bool [n]; like GammaGL, take any shape as flat."""
    nodes = host_array(node_idx, "node_idx").reshape(-1)
    return nodes if nodes.dtype == np.bool_ else host_ids(nodes, "node_idx")


def _graph(edge_index: Any, nodes: npt.NDArray[Any] | None, num_nodes: int | None) -> CSRGraph:
    """Return the graph whose rows list the in-neighbours."""
    if isinstance(edge_index, SparseGraph):
        graph = _graph_of_sparse(edge_index)
    elif isinstance(edge_index, CSRGraph) or hasattr(edge_index, "tocsr"):
        graph = as_graph(edge_index)
    else:
        if num_nodes is None and nodes is not None:
            num_nodes = _count_nodes(edge_index, nodes)
        return CSRGraph.from_edge_index(edge_index, num_nodes)
    if num_nodes is not None and num_nodes != graph.num_nodes:
        remedy = "leave it out, or build the graph with it"
        raise ArgumentValueError(explain("num_nodes", f"the graph's {graph.num_nodes}", repr(num_nodes), remedy))
    return graph


def _graph_of_sparse(sparse: Any) -> CSRGraph:
    storage, num_nodes = sparse.storage, max(sparse.sparse_sizes())
    col = host_array(storage.col(), "edge_index")
    if storage._row is None:  # what is there is taken, as GammaGL's operators may fail to derive the other
        return CSRGraph(host_array(storage.rowptr(), "edge_index"), col, num_nodes=num_nodes)
    return CSRGraph.from_edge_index(np.stack([col, host_array(storage.row(), "edge_index")]), num_nodes)


def _count_nodes(edge_index: Any, nodes: npt.NDArray[Any]) -> int:
    if nodes.dtype == np.bool_:
        return len(nodes)
    edges = host_ids(host_array(edge_index, "edge_index").reshape(-1), "edge_index")
    return max((int(ids.max()) + 1 for ids in (nodes, edges) if len(ids)), default=0)


def _ids(nodes: npt.NDArray[Any] | None, num_nodes: int) -> npt.NDArray[np.int64]:
    if nodes is None:
        return np.arange(num_nodes)
    if nodes.dtype != np.bool_:
        check_range(nodes, num_nodes, "node_idx")
        check_unique(nodes, num_nodes, "node_idx")
        return nodes
    if len(nodes) != num_nodes:
        remedy = "pass a value a node, or node ids"
        raise ArgumentValueError(explain("node_idx", f"a mask of {num_nodes} nodes", f"{len(nodes)}", remedy))
    return np.flatnonzero(nodes)
