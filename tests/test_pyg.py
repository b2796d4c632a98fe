"""PyG's loaders on our sampler and stores: the bits of the sample, the user's edges, workers, and models that learn."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn import functional

from gglspeedup import CSRGraph, DeviceError, GGLSpeedupError, threads
from gglspeedup.device import Device

if importlib.util.find_spec("torch_geometric") is None and not os.environ.get("CI"):
    pytest.skip("torch_geometric is missing", allow_module_level=True)

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    import torch_geometric.testing
    from torch_geometric import EdgeIndex
    from torch_geometric.data import Data, HeteroData, TensorAttr
    from torch_geometric.loader import LinkNeighborLoader, NeighborLoader
    from torch_geometric.nn import SAGEConv
    from torch_geometric.sampler import EdgeSamplerInput, NegativeSampling, NodeSamplerInput, NumNeighbors
    from torch_geometric.utils import k_hop_subgraph, trim_to_layer

    from gglspeedup.adapters import pyg
    from gglspeedup.adapters.pyg import FeatureStore, GraphStore, NeighborSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # where there are fewer cores
]

NODES, EDGES, ISOLATED = 300, 3000, 10


@pytest.fixture(scope="module")
def data() -> Data:
    """A graph with self-loops, parallel edges and isolated nodes, its edges in no order."""
    rng = np.random.default_rng(0)
    edge_index = torch.from_numpy(rng.integers(0, NODES - ISOLATED, (2, EDGES)))
    x, y = torch.from_numpy(rng.random((NODES, 5), np.float32)), torch.from_numpy(rng.integers(0, 3, NODES))
    return Data(x=x, y=y, edge_index=edge_index, edge_attr=torch.arange(EDGES).view(-1, 1))


def stores(data: Data) -> tuple[FeatureStore, GraphStore]:
    graph_store = GraphStore(data)
    feature_store = FeatureStore(graph_store)
    for name in ("x", "y"):
        assert feature_store.put_tensor(data[name], group_name=None, attr_name=name, index=None)
    return feature_store, graph_store


def sample(sampler: NeighborSampler, seeds):
    return sampler.sample_from_nodes(NodeSamplerInput(None, torch.as_tensor(seeds)))


def bits(batch) -> list[bytes]:
    return [part.numpy().tobytes() for part in (batch.n_id, batch.edge_index, batch.e_id, batch.x, batch.y)]


def check_batch(batch, data: Data) -> None:
    """What every batch of a loader must be, whatever was drawn."""
    assert torch.equal(batch.x, data.x[batch.n_id]) and torch.equal(batch.y, data.y[batch.n_id])
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
    assert sum(batch.num_sampled_nodes) == batch.num_nodes and sum(batch.num_sampled_edges) == batch.num_edges


class Sage(torch.nn.Module):
    """Two layers of GraphSAGE, which trim each layer to what it needs if told the sizes of hops."""

    def __init__(self, *widths: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(SAGEConv(*pair) for pair in itertools.pairwise(widths))
        self.dropout = dropout

    def forward(self, x, edge_index, nodes=None, edges=None):
        for number, layer in enumerate(self.layers):
            if nodes is not None:
                x, edge_index, _ = trim_to_layer(number, nodes, edges, x, edge_index)
            x = functional.relu(x) if number else x
            x = layer(functional.dropout(x, self.dropout, self.training), edge_index)
        return x


# --- the sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("sizes", [[3], [4, 2], [-1, 3], [2, -1, 5]])
def test_equals_naive(data, sizes, replace):
    sampler = NeighborSampler(data, sizes, seed=5, replace=replace)
    graph = CSRGraph.from_edge_index(data.edge_index, NODES)
    seeds = np.random.default_rng(1).permutation(NODES)[:40]
    torch.manual_seed(7)
    number = int(torch.randint(1 << 48, ()))
    n_id, hops = naive.sample(
        graph.indptr, graph.indices, seeds, sizes, seed=5, batch=number, replace=replace, expand="frontier",
        edge_ids=graph.edge_ids,
    )  # fmt: skip
    torch.manual_seed(7)
    out = sample(sampler, seeds)
    assert out.node.tolist() == n_id.tolist()
    row, col = np.concatenate([edge_index for edge_index, _, _ in hops[::-1]], 1)
    assert out.row.tolist() == row.tolist() and out.col.tolist() == col.tolist()
    assert out.edge.tolist() == np.concatenate([e_id for _, e_id, _ in hops[::-1]]).tolist()
    assert out.num_sampled_nodes == [40, *(size[0] - size[1] for _, _, size in hops[::-1])]
    assert out.num_sampled_edges == [len(e_id) for _, e_id, _ in hops[::-1]]
    assert {out.node.dtype, out.row.dtype, out.edge.dtype} == {torch.int64}
    assert out.batch is None and sampler.edge_permutation is None


@pytest.mark.parametrize("given", ["graph", "scipy", "pair", "store", "EdgeIndex"])
def test_graphs_that_are_taken(data, given):
    graph = CSRGraph.from_edge_index(data.edge_index, NODES)
    plain = CSRGraph(graph.indptr, graph.indices)
    csr = {
        "graph": graph,
        "scipy": scipy.sparse.csr_matrix((np.ones(EDGES), graph.indices, graph.indptr), (NODES, NODES)),
        "pair": (torch.from_numpy(graph.indptr), graph.indices),
        "store": GraphStore(graph),
        "EdgeIndex": Data(edge_index=EdgeIndex(data.edge_index, sparse_size=(NODES, NODES)), num_nodes=NODES),
    }[given]
    same = graph if given in ("graph", "store", "EdgeIndex") else plain
    outs = []
    for one in (csr, same):
        torch.manual_seed(0)
        outs.append(sample(NeighborSampler(one, NumNeighbors([4, 4])), torch.arange(50, dtype=torch.int32)))
    for key in ("node", "row", "col", "edge"):
        assert torch.equal(getattr(outs[0], key), getattr(outs[1], key))


def test_loader_gives_the_users_edges(data):
    sizes = [4, 3]
    loader = NeighborLoader(data, sizes, neighbor_sampler=NeighborSampler(data, sizes), batch_size=64)
    batches = list(loader)
    assert [batch.batch_size for batch in batches] == [64, 64, 64, 64, 44]
    assert torch.cat([batch.n_id[: batch.batch_size] for batch in batches]).tolist() == list(range(NODES))
    degree = torch.bincount(data.edge_index[1], minlength=NODES)
    for batch in batches:
        check_batch(batch, data)
        assert torch.equal(batch.edge_attr, data.edge_attr[batch.e_id])
        assert len(batch.n_id.unique()) == len(batch.n_id) and len(batch.e_id.unique()) == len(batch.e_id)
        begin_node = begin_edge = 0
        for hop, fanout in enumerate(sizes):  # each target of this hop, and no other, has its full share
            end_node = begin_node + batch.num_sampled_nodes[hop]
            end_edge = begin_edge + batch.num_sampled_edges[hop]
            taken = torch.bincount(batch.edge_index[1, begin_edge:end_edge], minlength=batch.num_nodes)
            expected = torch.zeros_like(taken)
            expected[begin_node:end_node] = degree[batch.n_id[begin_node:end_node]].clamp(max=fanout)
            assert torch.equal(taken, expected)
            begin_node, begin_edge = end_node, end_edge


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_all_neighbours(data, hops):
    """Every edge into what k - 1 hops reach, and every node that k hops reach."""
    seeds = torch.tensor([7, 0, 299, 31])
    loader = NeighborLoader(
        data, [-1] * hops, neighbor_sampler=NeighborSampler(data, [-1] * hops), input_nodes=seeds, batch_size=2
    )
    for batch in loader:
        chosen = batch.n_id[: batch.batch_size]
        reached = k_hop_subgraph(chosen, hops, data.edge_index, num_nodes=NODES)[0]
        inner = k_hop_subgraph(chosen, hops - 1, data.edge_index, num_nodes=NODES)[0] if hops > 1 else chosen
        assert sorted(batch.n_id.tolist()) == sorted(reached.tolist())
        expected = torch.isin(data.edge_index[1], inner).nonzero().view(-1)
        assert sorted(batch.e_id.tolist()) == expected.tolist()


def test_trim_to_layer(data):
    torch.manual_seed(0)
    model = Sage(5, 8, 8, 4).eval()
    sizes = [5, 4, 3]
    for batch in NeighborLoader(data, sizes, neighbor_sampler=NeighborSampler(data, sizes), batch_size=50):
        whole = model(batch.x, batch.edge_index)[: batch.batch_size]
        trimmed = model(batch.x, batch.edge_index, batch.num_sampled_nodes, batch.num_sampled_edges)
        assert len(trimmed) == sum(batch.num_sampled_nodes[:2])  # the last layer computes on seeds and first hop alone
        torch.testing.assert_close(trimmed[: batch.batch_size], whole)


def test_repeated_seeds(data):
    """Each place of a repeated seed has the edges of the seed, and a model computes the same there."""
    seeds = torch.tensor([5, 5, 0, 299, 5, 7, 0, 299])
    sampler = NeighborSampler(data, [3, 2])
    torch.manual_seed(3)
    once = sample(sampler, torch.tensor([5, 0, 299, 7]))
    torch.manual_seed(3)
    out = sample(sampler, seeds)
    assert torch.equal(out.node[:8], seeds) and torch.equal(out.node[8:], once.node[4:])
    assert torch.equal(out.node[out.row], data.edge_index[0, out.edge])
    assert torch.equal(out.node[out.col], data.edge_index[1, out.edge])
    assert out.num_sampled_nodes == [8, *once.num_sampled_nodes[1:]]
    assert out.num_sampled_edges[1:] == once.num_sampled_edges[1:]
    first = out.num_sampled_edges[0]
    assert torch.equal(out.edge[first:], once.edge[once.num_sampled_edges[0] :])
    assert torch.equal(out.col[:first], out.col[:first].sort().values)
    place = [0, 0, 1, 2, 0, 3, 1, 2]
    for i in range(8):
        assert out.edge[:first][out.col[:first] == i].tolist() == once.edge[once.col == place[i]].tolist()
    assert not set(out.row.tolist()) & {1, 4, 6, 7}  # sources are the first places


def test_weighted_sampling_of_seeds(data):
    weights = torch.zeros(NODES)
    weights[:20] = 1
    chosen = torch.utils.data.WeightedRandomSampler(weights.tolist(), 64)
    sampler = NeighborSampler(data, [-1, -1])
    torch.manual_seed(0)
    model = Sage(5, 8, 4).eval()
    expected = model(data.x, data.edge_index)
    (batch,) = NeighborLoader(data, [-1, -1], neighbor_sampler=sampler, batch_size=64, sampler=chosen)
    check_batch(batch, data)
    assert batch.batch_size == 64 and batch.n_id[:64].max() < 20
    for sizes in ((), (batch.num_sampled_nodes, batch.num_sampled_edges)):
        out = model(batch.x, batch.edge_index, *sizes)[:64]
        torch.testing.assert_close(out, expected[batch.n_id[:64]])


def test_no_seed(data):
    out = sample(NeighborSampler(data, [3, 2]), torch.empty(0, dtype=torch.int64))
    assert out.num_sampled_nodes == [0, 0, 0] and out.num_sampled_edges == [0, 0] and len(out.node) == len(out.row) == 0


# --- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("amount", [None, 1, 2])
def test_binary_links(data, amount, remote):
    links = data.edge_index[:, :100]
    loader = LinkNeighborLoader(
        stores(data) if remote else data, [3, 2], neighbor_sampler=NeighborSampler(data, [3, 2]), batch_size=40,
        edge_label_index=(None, links) if remote else links, edge_label=torch.ones(100),
        neg_sampling=amount and NegativeSampling("binary", amount),
    )  # fmt: skip
    for number, batch in enumerate(loader):
        check_batch(batch, data)
        positive = links[:, 40 * number : 40 * (number + 1)]
        count = positive.shape[1]
        assert torch.equal(batch.n_id[batch.edge_label_index[:, :count]], positive)
        assert batch.edge_label_index.shape == (2, count * (1 + (amount or 0)))
        assert batch.edge_label.tolist() == [1.0] * count + [0.0] * count * (amount or 0)
        # End points are the seeds: each has its share of neighbours.
        assert batch.edge_label_index.max() < batch.num_sampled_nodes[0]


def test_triplet_links(data):
    links = data.edge_index[:, :90]
    loader = LinkNeighborLoader(
        data, [3, 2], neighbor_sampler=NeighborSampler(data, [3, 2]), batch_size=30, edge_label_index=links,
        neg_sampling=NegativeSampling("triplet", 2),
    )  # fmt: skip
    for number, batch in enumerate(loader):
        check_batch(batch, data)
        positive = links[:, 30 * number :][:, :30]
        assert torch.equal(batch.n_id[batch.src_index], positive[0])
        assert torch.equal(batch.n_id[batch.dst_pos_index], positive[1])
        assert batch.dst_neg_index.shape == (30, 2) and batch.dst_neg_index.max() < batch.num_sampled_nodes[0]


# --- randomness and workers ----------------------------------------------------------------------------------------


def epochs(loader, seed: int, count: int = 2) -> list[list[list[bytes]]]:
    torch.manual_seed(seed)
    return [[bits(batch) for batch in loader] for _ in range(count)]


@pytest.mark.parametrize("method", [None, "fork"])
@pytest.mark.parametrize("remote", [False, True])
def test_torch_seed_fixes_the_batches(data, method, remote):
    if method and method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    workers = {"num_workers": 2, "multiprocessing_context": method} if method else {}
    source = stores(data) if remote else data
    sampler = NeighborSampler(source[1] if remote else source, [3, 2])
    loader = NeighborLoader(
        source, [3, 2], neighbor_sampler=sampler, input_nodes=torch.arange(100), batch_size=25, **workers
    )
    first = epochs(loader, 1)
    assert first == epochs(loader, 1) and first != epochs(loader, 2)
    drawn = {tuple(batch) for epoch in first for batch in epoch}
    assert len(drawn) == 8  # no two batches alike: not of two workers, and not of two epochs
    for batch in loader:
        check_batch(batch, data)


@pytest.mark.slow
def test_spawned_workers(data):
    """Forked or spawned, workers have the same random state."""
    feature_store, graph_store = stores(data)
    batches = [
        epochs(
            NeighborLoader(
                (feature_store, graph_store), [3, 2], neighbor_sampler=NeighborSampler(graph_store, [3, 2]),
                input_nodes=torch.arange(100), batch_size=25, num_workers=2, multiprocessing_context=method,
            ),
            seed=1,
            count=1,
        )
        for method in multiprocessing.get_all_start_methods()
        if method in ("fork", "spawn")
    ]  # fmt: skip
    assert len(batches[0][0]) == 4 and all(one == batches[0] for one in batches)


def test_same_nodes_are_drawn_anew(data):
    sampler = NeighborSampler(data, [2])
    assert sample(sampler, range(50)).edge.tolist() != sample(sampler, range(50)).edge.tolist()


def test_sampler_seed_counts(data):
    outs = []
    for seed in (0, 1):
        torch.manual_seed(0)
        outs.append(sample(NeighborSampler(data, [2], seed=seed), range(50)).edge.tolist())
    assert outs[0] != outs[1]


def test_pickle(data):
    feature_store, graph_store = stores(data)
    sampler = NeighborSampler(graph_store, [3, 2])
    twins = pickle.loads(pickle.dumps((feature_store, graph_store, sampler)))
    loaders = (
        NeighborLoader((features, graph), [3, 2], neighbor_sampler=one, input_nodes=torch.arange(60), batch_size=60)
        for features, graph, one in ((feature_store, graph_store, sampler), twins)
    )
    assert len({str(epochs(loader, 1)) for loader in loaders}) == 1


def thread_count(batch):
    batch.threads = threads.get_num_threads()
    return batch


def test_workers_use_as_many_threads_as_torch(data, monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    for workers, expected in ((0, 8), (1, 1)):
        loader = NeighborLoader(
            data, [2], neighbor_sampler=NeighborSampler(data, [2]), batch_size=NODES, num_workers=workers,
            multiprocessing_context="fork" if workers else None, transform=thread_count,
        )  # fmt: skip
        assert next(iter(loader)).threads == expected


def test_no_gpu_in_workers(monkeypatch):
    pyg._enter_worker(Device(0))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    with pytest.raises(DeviceError, match="num_workers"):
        pyg._enter_worker(Device(0))


# --- stores --------------------------------------------------------------------------------------------------------


def test_loader_on_stores(data):
    feature_store, graph_store = stores(data)
    loaders = [
        NeighborLoader(source, [4, 3], neighbor_sampler=NeighborSampler(csr, [4, 3]), **options)
        for source, csr in (((feature_store, graph_store), graph_store), (data, data))
        for options in [{"input_nodes": torch.arange(0, NODES, 2), "batch_size": 40, "shuffle": True}]
    ]
    ours, theirs = (epochs(loader, 1) for loader in loaders)
    assert ours == theirs
    for batch in loaders[0]:
        check_batch(batch, data)
        assert batch.x.dtype == torch.float32 and batch.y.dtype == torch.int64
        assert torch.equal(batch.n_id[: batch.batch_size], batch.input_id * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_features(dtype):
    x = (torch.arange(40).view(10, 4) % 7).to(dtype)
    store = FeatureStore(CSRGraph(np.zeros(11, np.int64), []))
    assert store.put_tensor(x, group_name=None, attr_name="f", index=None)
    ids = torch.tensor([9, 0, 0, 3])
    for index in (ids, ids.int(), ids[:0], slice(None), slice(2, 9, 3), slice(0)):
        assert torch.equal(store.get_tensor(group_name=None, attr_name="f", index=index), x[index])
    assert torch.equal(store[None, "f", None], x) and torch.equal(store[None, "f", 3], x[3])
    view = store.view(group_name=None)
    assert torch.equal(view["f"][ids], x[ids]) and torch.equal(view.f[ids], x[ids])
    # PyG 2.8's own get_tensor fails on NumPy indices of several elements.
    assert torch.equal(store._get_tensor(TensorAttr(None, "f", ids.numpy())), x[ids])
    assert store.get_tensor_size(None, "f") == (10, 4) and store.get_tensor_size(None, "f", ids) == (4, 4)


def test_features_share_memory(data):
    x = data.x.clone()
    store = FeatureStore(data)
    store.put_tensor(x, group_name=None, attr_name="x", index=None)
    x[3] = 7
    assert store[None, "x", torch.tensor([3])].tolist() == [[7.0] * 5]
    gathered = []

    class Spy:
        def __getitem__(self, n_id):
            gathered.append(np.ones((len(n_id), 2)))
            return gathered[0]

    store.features["x"] = Spy()
    assert store[None, "x", torch.tensor([3, 4])].data_ptr() == gathered[0].ctypes.data


def test_features_are_replaced_and_removed(data):
    store = stores(data)[0]
    attrs = store.get_all_tensor_attrs()
    assert [(attr.group_name, attr.attr_name, attr.is_set("index")) for attr in attrs] == [
        (None, "x", False), (None, "y", False)
    ]  # fmt: skip
    attrs[0].index = torch.arange(3)  # as PyG's filter does
    assert not store.get_all_tensor_attrs()[0].is_set("index")
    assert store.update_tensor(data.x + 1, group_name=None, attr_name="x", index=None)
    assert torch.equal(store[None, "x", None], data.x + 1)
    assert store.remove_tensor(None, "x", None) and not store.remove_tensor(None, "x", None)
    assert [attr.attr_name for attr in store.get_all_tensor_attrs()] == ["y"]
    assert store.get_tensor_size(None, "x") is None


def put(layout: str, edge_index: torch.Tensor) -> GraphStore:
    """A store with edges put in a layout; in CSC and CSR by scipy."""
    matrix = scipy.sparse.coo_matrix((np.ones(EDGES), edge_index.numpy()), (NODES, NODES))
    assert len(np.unique(edge_index, axis=1).T) == EDGES  # scipy adds parallel edges up
    csc, csr = matrix.tocsc(), matrix.tocsr()
    given = {
        "coo": tuple(edge_index),
        "csc": (torch.from_numpy(csc.indices), torch.from_numpy(csc.indptr).long()),
        "csr": (torch.from_numpy(csr.indptr), torch.from_numpy(csr.indices).long()),
    }[layout]
    store = GraphStore()
    assert store.put_edge_index(given, edge_type=None, layout=layout, size=(NODES, NODES))
    return store


@pytest.fixture(scope="module")
def simple_edges() -> torch.Tensor:
    cells = np.random.default_rng(0).choice((NODES - ISOLATED) ** 2, EDGES, replace=False)
    return torch.from_numpy(np.stack(np.divmod(cells, NODES - ISOLATED)))


@pytest.mark.parametrize("layout", ["coo", "csc", "csr"])
def test_layouts(simple_edges, layout):
    store = put(layout, simple_edges)
    matrix = scipy.sparse.coo_matrix((np.ones(EDGES), simple_edges.numpy()), (NODES, NODES))
    coo = torch.stack(store[None, "coo"])
    assert (scipy.sparse.coo_matrix((np.ones(EDGES), coo.numpy()), (NODES, NODES)) != matrix).nnz == 0
    rowptr, col = store[None, "csr"]
    assert (scipy.sparse.csr_matrix((np.ones(EDGES), col, rowptr), (NODES, NODES)) != matrix).nnz == 0
    row, colptr = store[None, "csc"]
    assert (scipy.sparse.csc_matrix((np.ones(EDGES), row, colptr), (NODES, NODES)) != matrix).nnz == 0
    assert np.shares_memory(row.numpy(), store.graph.indices) and np.shares_memory(colptr.numpy(), store.graph.indptr)
    by_target = torch.stack(store[None, "coo", True])
    assert torch.equal(by_target[1], simple_edges[1].sort().values)
    assert torch.equal(torch.stack(put("coo", by_target)[None, "coo"]), by_target)
    if layout == "coo":
        assert torch.equal(coo, simple_edges)
    out = sample(NeighborSampler(store, [4, 4]), range(30))
    assert torch.equal(out.node[torch.stack([out.row, out.col])], coo[:, out.edge])
    assert store.remove_edge_index(None, "csc") and not store.remove_edge_index(None, "csc")
    assert store.get_all_edge_attrs() == []
    with pytest.raises(KeyError):
        store[None, "csc"]


@pytest.mark.parametrize("layout", ["coo", "csc", "csr"])
def test_pygs_own_conversions_number_edges_as_we_do(simple_edges, layout):
    """A sampler of PyG's reads csc(), and takes its permutation for the way back to the edges."""
    store = put(layout, simple_edges)
    (attr,) = store.get_all_edge_attrs()
    assert attr.edge_type is None and attr.size == (NODES, NODES)
    columns = torch.stack(store[None, "coo"])
    row, colptr, perm = store.csc()
    col = torch.repeat_interleave(colptr.diff())
    assert torch.equal(torch.stack([row, col]), columns if perm is None else columns[:, perm])
    assert torch.equal(torch.stack(store.coo()[:2]), columns)
    rowptr, col, perm = store.csr()
    assert torch.equal(torch.stack([torch.repeat_interleave(rowptr.diff()), col]), columns[:, perm])


def test_edge_ids_of_the_users_own():
    graph = CSRGraph([0, 2, 3], [1, 0, 0], edge_ids=[70, 50, 60])
    store = GraphStore(graph)
    assert torch.stack(store[None, "coo"]).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert sample(NeighborSampler(store, [-1]), [0, 1]).edge.tolist() == [70, 50, 60]


# --- errors --------------------------------------------------------------------------------------------------------

GRAPH = ([0, 1, 2], [1, 0])
TENSOR = torch.zeros(2, 3)
PLACE = {"group_name": None, "attr_name": "x", "index": None}
PAIR = torch.tensor([0, 1])


def filled() -> FeatureStore:
    store = FeatureStore(GRAPH)
    store.put_tensor(TENSOR, **PLACE)
    return store


BAD = [
    (lambda: NeighborSampler(HeteroData(), [2]), TypeError, "homogeneous"),
    (lambda: NeighborSampler(torch_geometric.testing.MyGraphStore(), [2]), TypeError, "GraphStore of gglspeedup"),
    (lambda: NeighborSampler(Data(x=TENSOR), [2]), ValueError, "edge_index"),
    (lambda: NeighborSampler(GraphStore(), [2]), ValueError, "put_edge_index"),
    (lambda: NeighborSampler("graph", [2]), TypeError, "csr needs"),
    (lambda: NeighborSampler(GRAPH, {("a", "to", "b"): [2]}), TypeError, "num_neighbors"),
    (lambda: NeighborSampler(GRAPH, NumNeighbors({("a", "to", "b"): [2]})), TypeError, "num_neighbors"),
    (lambda: NeighborSampler(GRAPH, [3, 0]), ValueError, "num_neighbors needs -1 or"),
    (lambda: NeighborSampler(GRAPH, []), ValueError, "1 to"),
    (lambda: NeighborSampler(GRAPH, 3), TypeError, "sequence"),
    (lambda: NeighborSampler(GRAPH, [3], disjoint=True), TypeError, "disjoint"),
    (lambda: NeighborSampler(GRAPH, [3], time_attr="time"), TypeError, "time_attr"),
    (lambda: NeighborSampler(GRAPH, [3], weight_attr="weight"), TypeError, "weight_attr"),
    (lambda: sample(NeighborSampler(GRAPH, [3]), [1, 2]), IndexError, "input_nodes.*2 at position 1"),
    (lambda: sample(NeighborSampler(GRAPH, [3]), [-1]), IndexError, "input_nodes"),
    (lambda: sample(NeighborSampler(GRAPH, [3]), [0.5]), TypeError, "integers"),
    (lambda: NeighborSampler(GRAPH, [3]).sample_from_nodes(NodeSamplerInput(None, PAIR, PAIR)), ValueError, "time"),
    (
        lambda: NeighborSampler(GRAPH, [3]).sample_from_nodes(NodeSamplerInput(None, PAIR, None, "paper")),
        ValueError,
        "input_type",
    ),
    (
        lambda: NeighborSampler(GRAPH, [3]).sample_from_edges(EdgeSamplerInput(None, PAIR, PAIR, None, PAIR)),
        ValueError,
        "time",
    ),
    (lambda: FeatureStore(GRAPH, budget="1Q"), ValueError, "budget"),
    (lambda: FeatureStore(GRAPH, policy="best"), ValueError, "policy"),
    (lambda: FeatureStore(GRAPH).put_tensor(torch.zeros(3, 3), **PLACE), ValueError, "row for each node"),
    (lambda: FeatureStore(GRAPH).put_tensor(TENSOR, **PLACE | {"group_name": "paper"}), ValueError, "group_name"),
    (lambda: FeatureStore(GRAPH).put_tensor(TENSOR, **PLACE | {"index": PAIR}), ValueError, "index needs None"),
    (lambda: filled()[None, "z", PAIR], ValueError, r"one of \['x'\], got 'z'"),
    (lambda: filled()["paper", "x", PAIR], ValueError, "attr_name"),
    (lambda: filled()[None, "x", PAIR + 1], IndexError, "2 at position 1"),
    (lambda: filled()[None, "x", -1], IndexError, "n_id"),
    (lambda: GraphStore().put_edge_index((PAIR, PAIR), ("a", "to", "b"), "coo"), ValueError, "edge_type"),
    (lambda: GraphStore(GRAPH).put_edge_index((PAIR, PAIR), None, "coo"), ValueError, "empty store"),
    (lambda: GraphStore().put_edge_index((PAIR, PAIR[:1]), None, "coo"), ValueError, "as many"),
    (lambda: GraphStore().put_edge_index((PAIR, PAIR), None, "csc"), ValueError, "indptr"),
    (lambda: GraphStore().put_edge_index((PAIR, PAIR + 5), None, "coo", False, (2, 2)), IndexError, "edge_index"),
]


@pytest.mark.parametrize(("bad", "kind", "message"), BAD)
def test_bad_input(bad, kind, message):
    state = torch.get_rng_state()
    with pytest.raises(GGLSpeedupError, match=message) as caught:
        bad()
    assert isinstance(caught.value, kind)
    assert torch.equal(torch.get_rng_state(), state)


def test_documented_examples():
    assert doctest.testmod(pyg) == (0, 19)


# --- learning ------------------------------------------------------------------------------------------------------


def train(data: Data, source, model: Sage, *, batch_size: int, epochs: int, decay: float) -> float:
    """Test accuracy at the epoch with the best validation accuracy."""
    sampler = NeighborSampler(data if source is data else source[1], [25, 10])
    loader = NeighborLoader(
        source, [25, 10], neighbor_sampler=sampler, input_nodes=data.train_mask, batch_size=batch_size, shuffle=True
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=decay)
    best = (0.0, 0.0)
    for _ in range(epochs):
        model.train()
        for batch in loader:
            out = model(batch.x, batch.edge_index, batch.num_sampled_nodes, batch.num_sampled_edges)
            loss = functional.cross_entropy(out[: batch.batch_size], batch.y[: batch.batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (model.eval()(data.x, data.edge_index).argmax(1) == data.y).float()
        best = max(best, (float(right[data.val_mask].mean()), float(right[data.test_mask].mean())))
    return best[1]


@pytest.mark.parametrize("remote", [False, True])
def test_learns_a_planted_partition(remote):
    """Classes that hardly show in a node's own features, but do in its neighbours'."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    same = y[:, None] == y
    edge_index = np.stack(np.nonzero(rng.random((400, 400)) < np.where(same, 0.15, 0.02)))
    x = np.eye(4)[y] + rng.normal(0, 1, (400, 4))
    assert (x.argmax(1) == y).mean() < 0.65
    data = Data(x=torch.from_numpy(x).float(), y=torch.from_numpy(y), edge_index=torch.from_numpy(edge_index))
    part = torch.from_numpy(rng.permutation(400))
    data.train_mask, data.val_mask, data.test_mask = part < 200, (part >= 200) & (part < 250), part >= 250
    torch.manual_seed(0)
    source = stores(data) if remote else data
    assert train(data, source, Sage(4, 16, 4), batch_size=50, epochs=30, decay=0.0) > 0.9


@pytest.mark.slow
def test_accuracy_on_cora(shared_data: Path):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo.datasets import load_dataset

    cora = load_dataset("cora", shared_data)
    masks = {name: torch.from_numpy(getattr(cora, name)) for name in ("train_mask", "val_mask", "test_mask")}
    targets = np.repeat(np.arange(len(cora.y)), np.diff(cora.indptr))
    edge_index = torch.from_numpy(np.stack([cora.indices, targets]).astype(np.int64))
    data = Data(x=torch.from_numpy(cora.x), y=torch.from_numpy(cora.y), edge_index=edge_index, **masks)
    accuracy = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Sage(data.x.shape[1], 128, cora.num_classes, dropout=0.5)
        accuracy.append(train(data, data, model, batch_size=64, epochs=40, decay=5e-4))
    assert np.mean(accuracy) >= 0.78, accuracy
