"""Checks of the GammaGL adapter, run by test_gammagl.py in a process a backend: ``gammagl_script.py BACKEND``.

It prints a JSON object, of each check None or the traceback. Frameworks are imported in the functions alone, since
pytest imports this file, too, when it looks for doctests.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

NODES = 60


def random_edges(seed: int = 0) -> np.ndarray:
    """Edges with self-loops and parallel ones, in no order; nodes 50 and above have none."""
    return np.random.default_rng(seed).integers(0, 50, (2, 400))


def tensor(array: Any) -> Any:
    import tensorlayerx as tlx

    array = np.asarray(array)
    dtypes = {"i": tlx.int64, "f": tlx.float32, "b": tlx.bool}
    return tlx.convert_to_tensor(array, dtype=dtypes[array.dtype.kind])


def numpy_of(value: Any) -> np.ndarray:
    """The array of a tensor, which must be one of the backend, of int64."""
    import tensorlayerx as tlx

    assert tlx.is_tensor(value), type(value)
    assert value.dtype == tlx.int64, value.dtype
    return tlx.convert_to_numpy(value)


def sampler(*arguments: Any, **options: Any) -> Any:
    from gglspeedup.adapters.gammagl import NeighborSampler

    return NeighborSampler(*arguments, **options)


def arrays(loader: Any) -> list[Any]:
    """One epoch, as lists that can be compared."""
    return [
        [numpy_of(dst_node).tolist(), numpy_of(n_id).tolist()]
        + [[numpy_of(adj.edge_index).tolist(), numpy_of(adj.e_id).tolist(), adj.size] for adj in adjs]
        for dst_node, n_id, adjs in loader
    ]


def raised(kind: type[Exception], *words: str, **options: Any) -> None:
    """Check that a sampler with such options is refused, and that the message says why."""
    arguments = {"edge_index": random_edges(), "sample_lists": [2], **options}
    try:
        sampler(**arguments)
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"{options} went through")


# --- what is yielded ------------------------------------------------------------------------------------------------


def check_contract() -> None:
    edges, sizes = random_edges(), [3, 4]
    nodes = np.random.default_rng(1).permutation(NODES)[:37]
    loader = sampler(tensor(edges), sizes, tensor(nodes), NODES, batch_size=8, shuffle=True, num_workers=4)
    assert len(loader) == 5 and len(loader.dataset) == 37 and loader.dataset.tolist() == nodes.tolist()
    degree = np.bincount(edges[1], minlength=NODES)
    visited = []
    for dst_node, n_id, adjs in loader:
        targets, ids = numpy_of(dst_node), numpy_of(n_id)
        visited += targets.tolist()
        assert ids[: len(targets)].tolist() == targets.tolist() and len(set(ids.tolist())) == len(ids)
        assert isinstance(adjs, list) and len(adjs) == 2
        assert adjs[0].size[0] == len(ids) and adjs[0].size[1] == adjs[1].size[0] and adjs[1].size[1] == len(targets)
        for adj, fanout in zip(adjs, reversed(sizes), strict=True):
            assert all(type(size) is int for size in adj.size)
            local, e_id = numpy_of(adj.edge_index), numpy_of(adj.e_id)
            assert local.shape == (2, len(e_id)) and (local >= 0).all()
            assert (local.max(1, initial=-1) < adj.size).all()
            assert (ids[local] == edges[:, e_id]).all()  # sources are in-neighbours, along just these edges
            assert len(set(e_id.tolist())) == len(e_id)
            # As many as there are, or as may be drawn.
            drawn = np.bincount(local[1], minlength=adj.size[1])
            assert (drawn == np.minimum(degree[ids[: adj.size[1]]], fanout)).all()
    assert visited != nodes.tolist() and sorted(visited) == sorted(nodes.tolist())


def check_examples() -> None:
    import doctest

    from gglspeedup.adapters import gammagl

    results = doctest.testmod(gammagl)
    assert results.attempted > 0 and results.failed == 0, results


def check_epochs() -> None:
    def make(**options: Any) -> Any:
        return sampler(tensor(random_edges()), [3, 4], batch_size=8, shuffle=True, **options)

    loader = make()
    first, second = arrays(loader), arrays(loader)
    assert first != second
    loader.set_epoch(0)
    assert arrays(loader) == first and arrays(loader) == second
    for prefetch in (0, 1, 9):
        assert arrays(make(prefetch=prefetch)) == first
    assert arrays(make(seed=1)) != first
    unshuffled = sampler(tensor(random_edges()), [3, 4], batch_size=8, drop_last=True)
    assert len(unshuffled) == 6 and [batch[0] for batch in arrays(unshuffled)] == np.arange(48).reshape(6, 8).tolist()


def check_workers() -> None:
    given = (random_edges(), [3, 4], np.arange(37), NODES)
    ours, theirs = (sampler(*given, batch_size=8, shuffle=True, **options) for options in ({"workers": 2}, {}))
    kept = [list(ours), list(ours)]  # whose memory is lent as long as there are tensors on it
    assert list(map(arrays, kept)) == [arrays(theirs), arrays(theirs)]


def check_layouts() -> None:
    from gammagl.loader.neighbor_sampler import EdgeIndex

    edges = tensor(random_edges())
    for dst_node, n_id, adj in sampler(edges, [3], batch_size=8):
        assert isinstance(adj, EdgeIndex) and not isinstance(adj, tuple)
        assert adj.size == (len(n_id), len(dst_node)) and numpy_of(adj.edge_index).shape[1] == len(numpy_of(adj.e_id))
    assert all(adj.e_id is None for _, _, adjs in sampler(edges, [3, 3], return_e_id=False) for adj in adjs)
    given = []

    def transform(dst_node: Any, n_id: Any, adjs: Any) -> int:
        given.append((dst_node, n_id, adjs))
        return len(given)

    transformed = sampler(edges, [3, 4], None, None, True, transform, batch_size=8)
    assert list(transformed) == list(range(1, 8))
    assert arrays(given) == arrays(sampler(edges, [3, 4], batch_size=8))


def check_inputs() -> None:
    import scipy.sparse
    from gammagl.sparse import SparseGraph

    from gglspeedup import CSRGraph

    targets, sources = np.unique(random_edges(), axis=1)  # sorted by both: all graphs number edges alike
    edges = np.stack([sources, targets])
    rows = scipy.sparse.coo_matrix((np.ones(len(edges[0])), edges[::-1]), shape=(50, 50)).tocsr()
    expected = arrays(sampler(edges, [3, 4], batch_size=8))
    for graph in (tensor(edges), edges.tolist(), edges.astype("i4"), CSRGraph.from_edge_index(edges, 50), rows):
        assert arrays(sampler(graph, [3, 4], batch_size=8)) == expected
    sparse = SparseGraph(row=tensor(edges[1]), col=tensor(edges[0]), sparse_sizes=(50, 50))
    pointers = SparseGraph(rowptr=tensor(rows.indptr), col=tensor(edges[0]), sparse_sizes=(50, 50), is_sorted=True)
    for graph in (sparse, pointers):
        got = [numpy_of(n_id).tolist() for _, n_id, _ in sampler(graph, [3, 4], batch_size=8)]
        assert got == [batch[1] for batch in expected]

    mask = np.zeros(50, bool)
    mask[[3, 14, 15, 49]] = True
    ids = np.flatnonzero(mask)
    expected = arrays(sampler(edges, [3, 4], ids.tolist(), batch_size=3))
    for nodes in (mask, tensor(mask), ids.astype("u1"), tensor(ids), tensor(ids.reshape(2, 2))):
        assert arrays(sampler(tensor(edges), [3, 4], nodes, batch_size=3)) == expected

    # Nodes without an edge count: those of num_nodes, of a mask, of ids.
    assert len(sampler(edges, [2], num_nodes=NODES).dataset) == NODES
    assert len(sampler(edges, [2], tensor(np.ones(NODES, bool))).dataset) == NODES
    (batch,) = sampler(tensor(edges), [2, 2], tensor([NODES - 1]))
    assert numpy_of(batch[1]).tolist() == [NODES - 1] and [adj.size for adj in batch[2]] == [(1, 1), (1, 1)]
    assert all(numpy_of(adj.edge_index).shape == (2, 0) for adj in batch[2])


def check_sparse_graph() -> None:
    import tensorlayerx as tlx
    from gammagl.loader.neighbor_sampler import Adj
    from gammagl.sparse import SparseGraph

    edges = random_edges()
    values = np.random.default_rng(2).random(400).astype(np.float32)
    plain = SparseGraph(row=tensor(edges[1]), col=tensor(edges[0]), sparse_sizes=(NODES, NODES))
    valued = SparseGraph(row=tensor(edges[1]), col=tensor(edges[0]), value=tensor(values), sparse_sizes=(NODES, NODES))
    for graph in (plain, valued):
        row, col, value = (None if part is None else tlx.convert_to_numpy(part) for part in graph.coo())
        for return_e_id in (True, False):
            for dst_node, n_id, adjs in sampler(graph, [3, 4], batch_size=8, return_e_id=return_e_id):
                ids = numpy_of(n_id)
                assert ids[: len(dst_node)].tolist() == numpy_of(dst_node).tolist()
                assert adjs[0].size[0] == len(ids) and adjs[1].size == (adjs[0].size[1], len(dst_node))
                for adj in adjs:
                    assert isinstance(adj, Adj) and adj.adj_t.sparse_sizes() == adj.size[::-1]
                    targets, sources = (numpy_of(part) for part in adj.adj_t.coo()[:2])
                    assert (np.lexsort((sources, targets)) == np.arange(len(targets))).all()
                    pointers = numpy_of(adj.adj_t.csr()[0])
                    assert (np.repeat(np.arange(adj.size[1]), np.diff(pointers)) == targets).all()
                    assert (adj.e_id is None) == (not return_e_id)
                    assert (adj.adj_t.storage.value() is None) == (value is None)
                    if return_e_id:
                        e_id = numpy_of(adj.e_id)
                        assert (row[e_id] == ids[targets]).all() and (col[e_id] == ids[sources]).all()
                        if value is not None:
                            assert (tlx.convert_to_numpy(adj.adj_t.storage.value()) == value[e_id]).all()
    (bare,) = sampler(plain, [-1], tensor([0]))
    assert isinstance(bare[2], Adj)
    raised(RuntimeError, "device", "SparseGraph", edge_index=plain, device="cuda:0")


def check_gammagls_own() -> None:
    """All neighbours are the same edges as GammaGL's own sampler finds."""
    from gammagl.loader import NeighborSampler
    from gammagl.sparse import SparseGraph

    mend_operators()
    edges = np.unique(random_edges(), axis=1)  # GammaGL's sorting of parallel edges is not stable
    values = tensor(np.random.default_rng(2).random(len(edges[0])).astype(np.float32))
    sparse = SparseGraph(row=tensor(edges[1]), col=tensor(edges[0]), value=values, sparse_sizes=(50, 50))
    nodes = tensor(np.arange(0, 50, 3))
    for graph, shape in ((tensor(edges), edge_rows), (sparse, sparse_rows)):
        options = {"node_idx": nodes, "batch_size": 4, "drop_last": True}
        theirs = list(NeighborSampler(graph, [-1, -1], **options))
        ours = list(sampler(graph, [-1, -1], **options))
        assert len(ours) == len(theirs) == 4
        for (dst_node, n_id, adjs), (their_dst, their_id, their_adjs) in zip(ours, theirs, strict=True):
            ids, their_ids = numpy_of(n_id), numpy_of(their_id)
            assert numpy_of(dst_node).tolist() == numpy_of(their_dst).tolist()
            assert sorted(ids) == sorted(their_ids) and len(adjs) == len(their_adjs) == 2
            for adj, their_adj in zip(adjs, their_adjs, strict=True):
                assert adj.size == their_adj.size
                assert shape(adj, ids) == shape(their_adj, their_ids)
    assert len(list(NeighborSampler(tensor(edges), [-1], batch_size=7))) == len(sampler(edges, [-1], batch_size=7))


def edge_rows(adj: Any, ids: np.ndarray) -> list[Any]:
    """The edges of an EdgeIndex in global ids: source, target, e_id."""
    import tensorlayerx as tlx

    source, target = ids[numpy_of(adj.edge_index)]
    return sorted(zip(source, target, tlx.convert_to_numpy(adj.e_id), strict=True))


def sparse_rows(adj: Any, ids: np.ndarray) -> list[Any]:
    """The edges of an Adj in global ids: source, target, e_id, value."""
    import tensorlayerx as tlx

    target, source, value = (tlx.convert_to_numpy(part) for part in adj.adj_t.coo())
    return sorted(zip(ids[source], ids[target], tlx.convert_to_numpy(adj.e_id), value, strict=True))


def mend_operators() -> None:
    """Put obvious versions in place of GammaGL's compiled operators if they do not work.

    Those of its wheel were built against NumPy 1; under NumPy 2 they fill an array with one and the same number.
    """
    from gammagl.ops import sparse

    if numpy_of(sparse.ind2ptr(tensor([0, 1]), 2)).tolist() == [0, 1, 2]:
        return

    def ind2ptr(row: Any, count: int) -> Any:
        return tensor(np.searchsorted(numpy_of(row), np.arange(count + 1)))

    def ptr2ind(pointers: Any, _: int) -> Any:
        lengths = np.diff(numpy_of(pointers))
        return tensor(np.repeat(np.arange(len(lengths)), lengths))

    def sample_adj(pointers: Any, column: Any, nodes: Any, fanout: int, replace: bool) -> Any:
        assert fanout < 0 and not replace
        pointers, column, nodes = numpy_of(pointers), numpy_of(column), numpy_of(nodes)
        rows = [np.arange(pointers[node], pointers[node + 1]) for node in nodes]
        e_id = np.concatenate(rows)
        n_id = list(dict.fromkeys([*nodes.tolist(), *column[e_id].tolist()]))
        local = [n_id.index(node) for node in column[e_id]]
        return tuple(map(tensor, (np.cumsum([0, *map(len, rows)]), local, n_id, e_id)))

    sparse.ind2ptr, sparse.ptr2ind, sparse.sample_adj = ind2ptr, ptr2ind, sample_adj


def check_refusals() -> None:
    from gglspeedup import CSRGraph

    raised(TypeError, "nonsense", nonsense=1)
    raised(TypeError, "collate_fn", collate_fn=print)
    raised(TypeError, "batch_sampler", batch_sampler=[[0]])
    raised(TypeError, "transform", transform=3)
    raised(TypeError, "node_idx", node_idx=tensor([0.5]))
    raised(ValueError, "node_idx", "unique", node_idx=tensor([4, 1, 4]))
    raised(IndexError, "node_idx", "-1", node_idx=tensor([4, -1]))
    raised(IndexError, "node_idx", "50", node_idx=[50], num_nodes=50)
    raised(ValueError, "node_idx", "mask", node_idx=np.ones(7, bool), num_nodes=50)
    raised(TypeError, "edge_index", edge_index=random_edges().astype(float), node_idx=[1])
    raised(ValueError, "edge_index", edge_index=tensor([1, 2, 3]))
    raised(ValueError, "num_nodes", edge_index=CSRGraph([0, 1, 2], [1, 0]), num_nodes=9)
    raised(ValueError, "batch_size", batch_size=0)
    raised(ValueError, "seed", seed=-1)
    no_effect = {"num_workers": 2, "time_out": 1, "prefetch_factor": 4, "persistent_workers": True}
    no_effect |= {"worker_init_fn": print, "sampler": None, "batch_sampler": None}
    assert arrays(sampler(random_edges(), [2, 2], **no_effect)) == arrays(sampler(random_edges(), [2, 2]))


# --- what is learnt -------------------------------------------------------------------------------------------------


def planted() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A graph whose features say little of a node's class, and those of its in-neighbours much."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 240)
    edges = rng.integers(0, 240, (2, 9000))
    edges = edges[:, (y[edges[0]] == y[edges[1]]) | (rng.random(9000) < 0.05)]
    x = rng.normal(size=(240, 6)).astype(np.float32) + np.eye(3, 6, dtype=np.float32)[y]
    return edges, x, y


def make_step(model: Any) -> Any:
    """GammaGL's way: a loss on the nodes of a batch, and a step of Adam."""
    import tensorlayerx as tlx

    class SemiSpvzLoss(tlx.model.WithLoss):
        def forward(self, data: Any, label: Any) -> Any:
            scores = self.backbone_network(data["x"], data["subgs"])
            return self._loss_fn(scores, tlx.gather(data["y"], data["dst_node"]))

    loss = SemiSpvzLoss(model, tlx.losses.softmax_cross_entropy_with_logits)
    return tlx.model.TrainOneStep(loss, tlx.optimizers.Adam(lr=0.01, weight_decay=5e-4), model.trainable_weights)


def check_training() -> None:
    import tensorlayerx as tlx
    from gammagl.models import GraphSAGE_Sample_Model

    tlx.set_seed(0)
    edges, x, y = planted()
    features, labels, edge_index = tensor(x), tensor(y), tensor(edges)
    model = GraphSAGE_Sample_Model(6, 16, 3, 0.2, 2)
    before = [tlx.convert_to_numpy(weights).copy() for weights in model.trainable_weights]
    train_one_step = make_step(model)
    train_loader = sampler(edge_index, [10, 5], node_idx=tensor(np.arange(240) < 160), batch_size=32, shuffle=True)
    model.set_train()
    for _ in range(20):
        losses = []
        for dst_node, n_id, adjs in train_loader:
            data = {"x": tlx.gather(features, n_id), "y": labels, "dst_node": dst_node, "subgs": adjs}
            losses.append(float(train_one_step(data, tensor([0]))))
    assert np.mean(losses) < 0.3, losses  # log(3) = 1.1 at the start
    for old, new in zip(before, model.trainable_weights, strict=True):
        assert not np.array_equal(old, tlx.convert_to_numpy(new))  # every weight had a gradient

    # The inference of GammaGL's model reads bare adjacencies, and agrees with batches of all neighbours.
    model.set_eval()
    scores = model.inference(features, sampler(edge_index, [-1], batch_size=50), features)
    scores = tlx.convert_to_numpy(scores)
    batched = [
        tlx.convert_to_numpy(model(tlx.gather(features, n_id), adjs))
        for _, n_id, adjs in sampler(edge_index, [-1, -1], batch_size=70)
    ]
    np.testing.assert_allclose(np.concatenate(batched), scores, rtol=1e-4, atol=1e-5)
    assert (scores.argmax(1) == y)[160:].mean() > 0.9


def check_originals_script() -> None:
    """What users of the original write: sampler and features by hand, adjacencies converted one by one."""
    import scipy.sparse
    import tensorlayerx as tlx
    from gammagl.models import GraphSAGE_Sample_Model

    from gglspeedup.gpufeature import CGPUFeature
    from gglspeedup.gpusample import GPUSampler

    tlx.set_seed(0)
    edges, x, y = planted()
    csr = scipy.sparse.csr_matrix((np.ones(len(edges[0])), edges[::-1]), shape=(240, 240))
    gpu_sampler = GPUSampler("cpu", csr)
    gpu_sampler.set_size([10, 5])
    feat = CGPUFeature(csr, "cpu", "0.1G")
    feat.from_cpu_tensor(x)
    labels = tensor(y)
    model = GraphSAGE_Sample_Model(6, 16, 3, 0.2, 2)
    train_one_step = make_step(model)
    convert = {"torch": "cp2torch", "tensorflow": "cp2tf", "paddle": "cp2pd"}[tlx.BACKEND]
    model.set_train()
    for _ in range(20):
        losses = []
        for dst_node in tlx.dataflow.DataLoader(list(range(160)), batch_size=32, shuffle=True, collate_fn=np.array):
            all_node, adjs = gpu_sampler.sample(dst_node)
            adjs = [getattr(adj, convert)() for adj in adjs]
            cur = feat[all_node]
            assert cur.shape == (len(all_node), feat.dim())
            data = {"x": tensor(cur), "y": labels, "dst_node": tensor(dst_node), "subgs": adjs}
            losses.append(float(train_one_step(data, tensor([0]))))
    assert np.mean(losses) < 0.3, losses


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(backend: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo import tlx_compat

    tlx_compat.install(backend)
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
