"""SubgraphLoader: whole parts with their halo, whatever makes them; against plain loops, and on a GPU."""

from __future__ import annotations

import importlib.util
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from conftest import missing, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import CGPUFeature, CSRGraph, SubgraphLoader, partition, permute
from gglspeedup.device import Device, cuda_problem
from gglspeedup.normalise import symmetric_normalisation

RNG = np.random.default_rng(0)
PLAIN = random_graph(RNG, 200, 9)
GRAPH = CSRGraph(PLAIN.indptr, PLAIN.indices, edge_ids=RNG.permutation(PLAIN.num_edges) + 5)
X = RNG.random((200, 7), dtype=np.float32)
Y = RNG.integers(0, 5, 200)
WEIGHT = RNG.random(GRAPH.num_edges, dtype=np.float32)
PTR = np.array([0, 30, 31, 80, 80, 120, 160, 161, 170, 199, 200])  # part 3 is empty


def loader(**options) -> SubgraphLoader:
    graph, x, y = (options.pop(name, default) for name, default in (("csr", GRAPH), ("x", X), ("y", Y)))
    fixed = {"ptr": PTR, "batch_size": 3, "edge_weight": WEIGHT, "device": "cpu"}
    return SubgraphLoader(graph, x, y, **{**fixed, **options})


def host(array) -> np.ndarray:
    return array.get() if hasattr(array, "get") else array.cpu().numpy() if hasattr(array, "cpu") else array


def content(batch) -> list:
    """All that is in a batch, to be compared."""
    arrays = [batch.x, batch.y, batch.n_id, *batch.adj[:2], batch.edge_weight, batch.offset, batch.count, batch.parts]
    return [*(host(array).tolist() for array in arrays), batch.adj.size, batch.batch_size]


def epochs(made: SubgraphLoader, count: int = 2) -> list:
    return [[content(batch) for batch in made] for _ in range(count)]


def naive_batch(graph: CSRGraph, ptr: list[int], parts: list[int]) -> list:
    """The batch of some parts, in plain words, as `content` gives it."""
    inside = [node for part in parts for node in range(ptr[part], ptr[part + 1])]
    n_id, local = list(inside), {node: place for place, node in enumerate(inside)}
    row, col, places = [], [], []
    for target, node in enumerate(inside):
        for place in range(graph.indptr[node], graph.indptr[node + 1]):
            source = int(graph.indices[place])
            if source not in local:
                local[source] = len(n_id)
                n_id.append(source)
            row.append(local[source])
            col.append(target)
            places.append(place)
    ids = np.arange(graph.num_edges) if graph.edge_ids is None else graph.edge_ids
    ranges: list[list[int]] = []
    for node in inside:
        if ranges and sum(ranges[-1]) == node:
            ranges[-1][1] += 1
        else:
            ranges.append([node, 1])
    offset, count = [begin for begin, _ in ranges], [length for _, length in ranges]
    arrays = [X[n_id], Y[inside], n_id, [row, col], ids[places], WEIGHT[places], offset, count, parts]
    return [*(np.array(part).tolist() for part in arrays), (len(n_id), len(inside)), len(inside)]


@settings(deadline=None, max_examples=40)
@given(
    inner=st.lists(st.integers(0, 200), max_size=15), batch_size=st.integers(1, 18), shuffle=st.booleans(),
    drop_last=st.booleans(), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 9), world_size=st.integers(1, 3),
    prefetch=st.integers(0, 3), ids=st.booleans(),
)  # fmt: skip
def test_equals_the_obvious_loop(inner, batch_size, shuffle, drop_last, seed, epoch, world_size, prefetch, ids):
    graph, ptr = GRAPH if ids else PLAIN, [0, *sorted(inner), 200]
    order = list(range(len(ptr) - 1))
    if shuffle:
        words = np.random.Philox(key=seed, counter=epoch).random_raw(len(order)).tolist()
        order.sort(key=lambda part: words[part])
    share = -(-len(order) // world_size)
    for rank in range(world_size):
        mine = [order[(rank + k * world_size) % len(order)] for k in range(share)]
        cut = [mine[begin : begin + batch_size] for begin in range(0, share, batch_size)]
        cut = [parts for parts in cut if len(parts) == batch_size or not drop_last]
        made = loader(
            csr=graph, ptr=ptr, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed,
            prefetch=prefetch, rank=rank, world_size=world_size,
        )  # fmt: skip
        made.set_epoch(epoch)
        batches = list(made)
        assert len(made) == len(batches) == len(cut) and made.dataset.tolist() == list(range(len(ptr) - 1))
        for batch, parts in zip(batches, cut, strict=True):
            assert content(batch) == naive_batch(graph, ptr, parts)
            for array in (batch.n_id, batch.adj.edge_index, batch.offset, batch.count, batch.parts):
                assert array.dtype == np.int64
            assert batch.edge_weight.dtype == batch.x.dtype == np.float32


def test_an_epoch_takes_each_part_once_with_all_its_edges():
    made = loader()
    for _ in range(3):
        batches = list(made)
        assert sorted(part for batch in batches for part in batch.parts.tolist()) == list(range(10))
        assert sorted(node for batch in batches for node in batch.n_id[: batch.batch_size]) == list(range(200))
        assert sorted(edge for batch in batches for edge in batch.adj.e_id) == sorted(GRAPH.edge_ids.tolist())


def test_halo_is_what_lies_outside():
    for batch in loader():
        inside, halo = batch.n_id[: batch.batch_size].tolist(), batch.n_id[batch.batch_size :].tolist()
        sources = {u for v in inside for u in GRAPH.indices[GRAPH.indptr[v] : GRAPH.indptr[v + 1]].tolist()}
        assert set(halo) == sources - set(inside) and len(set(halo)) == len(halo)
        ranges = [np.arange(begin, begin + length) for begin, length in zip(batch.offset, batch.count, strict=True)]
        assert np.concatenate(ranges).tolist() == inside


def test_neighbouring_parts_make_one_range():
    (whole,) = loader(batch_size=10, shuffle=False)
    assert (whole.offset.tolist(), whole.count.tolist()) == ([0], [200]) and len(whole.n_id) == 200
    batches = list(loader(batch_size=1, shuffle=False))
    assert [batch.count.tolist() for batch in batches] == [[n] if n else [] for n in np.diff(PTR).tolist()]
    assert batches[3].batch_size == 0 and batches[3].edge_weight.shape == (0,) and batches[3].x.shape == (0, 7)


@pytest.mark.parametrize("shuffle", [True, False])
def test_prefetch_and_threads_do_not_matter(shuffle):
    expected = epochs(loader(shuffle=shuffle, prefetch=0))
    assert (expected[0] != expected[1]) == shuffle
    for prefetch in (1, 2, 50):
        assert epochs(loader(shuffle=shuffle, prefetch=prefetch)) == expected
    gglspeedup.set_num_threads(1)
    assert epochs(loader(shuffle=shuffle)) == expected


def test_evaluation_goes_over_all_parts_in_order_and_shares_everything():
    made = loader(drop_last=True, batch_size=4)
    list(made)
    other = made.evaluation()
    assert other.graph_sampler is made.graph_sampler and other.features is made.features and other.labels is made.labels
    assert other.edge_weight is made.edge_weight and other.epoch == 0 and len(other) == 3 and len(made) == 2
    assert epochs(other) == epochs(loader(batch_size=4, shuffle=False))
    assert [batch.parts.tolist() for batch in made.evaluation(batch_size=9)] == [list(range(9)), [9]]
    assert made.shuffle and made.drop_last and made.batch_size == 4 and made.epoch == 1
    with pytest.raises(ValueError, match="batch_size needs at least 1"):
        made.evaluation(batch_size=0)


def test_without_features_labels_and_weights():
    for batch in SubgraphLoader(GRAPH, ptr=PTR, batch_size=4, device="cpu"):
        assert batch.x is None and batch.y is None and batch.edge_weight is None


def test_features_are_shared_and_labels_may_be_rows():
    features = CGPUFeature(GRAPH, "cpu")
    features.from_cpu_tensor(X)
    rows = RNG.random((200, 3))
    made = loader(x=features, y=rows)
    assert made.features is features
    batch = next(iter(made))
    np.testing.assert_array_equal(batch.y, rows[batch.n_id[: batch.batch_size]])


@pytest.mark.parametrize("kind", ["float64", "two columns", "strided", "big-endian", "mapped", "list"])
def test_weights_of_any_kind(tmp_path, kind):
    values = RNG.random((GRAPH.num_edges, 2))
    given = {
        "float64": values[:, 0].copy(),
        "two columns": values,
        "strided": values[:, 1],
        "big-endian": values[:, 0].astype(">f4"),
        "list": values[:, 0].tolist(),
    }.get(kind)
    if kind == "mapped":
        values.tofile(tmp_path / "weights")
        given = np.memmap(tmp_path / "weights", values.dtype, "r", shape=values.shape)
    flat = np.asarray(given)
    place = np.argsort(GRAPH.edge_ids)  # where the edge of an id stands, ids being 5, 6, ...
    for batch in loader(edge_weight=given):
        np.testing.assert_array_equal(batch.edge_weight, flat[place[batch.adj.e_id - 5]])
        assert batch.edge_weight.dtype == flat.dtype.newbyteorder("=")


def test_weights_travel_to_the_device(monkeypatch):
    sent = []
    runtime = SimpleNamespace(activate=nullcontext, to_device=lambda host: sent.append(host.copy()) or sent[-1])
    monkeypatch.setattr("gglspeedup.placement.runtime_of", lambda device: runtime)
    made = loader()
    made.device = Device(0)
    got = made._weights(np.array([120, 0]), np.array([40, 30]))
    rows = [*range(120, 160), *range(30)]
    expected = [w for v in rows for w in WEIGHT[GRAPH.indptr[v] : GRAPH.indptr[v + 1]]]
    assert len(sent) == 1 and got is sent[0] and got.tolist() == expected


def test_batches_outlive_later_ones():
    kept = [batch for _ in range(2) for batch in loader(seed=3)]
    before = [content(batch) for batch in kept]
    for seed in range(4, 8):
        list(loader(seed=seed))
    assert [content(batch) for batch in kept] == before


def test_ptr_is_the_loaders_own():
    ptr = PTR.copy()
    made = loader(ptr=ptr)
    ptr[:] = 0
    assert epochs(made) == epochs(loader())


def test_pickling_keeps_the_epoch():
    made = loader()
    list(made)
    twin = pickle.loads(pickle.dumps(made))
    assert twin.epoch == 1 and epochs(twin) == epochs(made)


def test_torch_batches():
    if importlib.util.find_spec("torch") is None:
        missing("torch")
    import torch

    for ours, expected in zip(loader(backend="torch"), loader(), strict=True):
        assert content(ours) == content(expected)
        for tensor in (ours.x, ours.y, ours.n_id, ours.adj.edge_index, ours.adj.e_id, ours.edge_weight):
            assert isinstance(tensor, torch.Tensor)
        assert isinstance(ours.offset, np.ndarray) and isinstance(ours.count, np.ndarray)
        assert ours.edge_weight.dtype == torch.float32 and ours.edge_weight.data_ptr() % 64 == 0


def test_one_layer_over_parts_equals_the_whole_graph(shared_data):
    """Cora, cut by METIS: what the batches aggregate is what the normalised adjacency of the whole graph does."""
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    with np.load(shared_data / "cora.npz") as arrays:
        graph = CSRGraph(arrays["indptr"], arrays["indices"])
    x = np.random.default_rng(1).random((2708, 5), dtype=np.float32)
    perm, ptr = partition(graph, 40)
    looped, weight = symmetric_normalisation(permute(graph, perm))
    made = SubgraphLoader(looped, x[perm], perm, ptr=ptr, batch_size=10, edge_weight=weight, device="cpu")
    whole, original = symmetric_normalisation(graph)
    expected = scipy.sparse.csr_array((original, whole.indices, whole.indptr)) @ x
    for one in (made, made.evaluation(batch_size=7)):
        got, halos = np.zeros_like(x), 0
        for batch in one:
            assert batch.adj.size == (len(batch.n_id), batch.batch_size)
            step = scipy.sparse.csr_array((batch.edge_weight, (batch.adj.col, batch.adj.row)), batch.adj.size[::-1])
            got[batch.y] = step @ batch.x
            halos += len(batch.n_id) - batch.batch_size
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert 0 < halos < 2708


BAD = [
    ({"ptr": [0, 199]}, ValueError, "ptr needs bounds from 0 to 200, got 0 to 199"),
    ({"ptr": [0, 50, 40, 200]}, ValueError, "ptr needs bounds that never fall"),
    ({"ptr": [[0, 200]]}, ValueError, "ptr needs one dimension"),
    ({"ptr": [0.0, 200.0]}, TypeError, "ptr needs integers"),
    ({"batch_size": 0}, ValueError, "batch_size needs at least 1"),
    ({"edge_weight": WEIGHT[:-1]}, ValueError, r"edge_weight needs shape \[\d+\]"),
    ({"edge_weight": np.float32(1)}, ValueError, "edge_weight needs shape"),
    ({"edge_weight": np.array(["a"] * GRAPH.num_edges)}, TypeError, "edge_weight needs a numeric dtype"),
    ({"x": X[:-1]}, ValueError, "x needs shape"),
    ({"y": Y[:-1]}, ValueError, "needs shape"),
    ({"seed": -1}, ValueError, "seed needs 0 to"),
    ({"shuffle": 1}, TypeError, "shuffle needs True or False"),
    ({"placement": "moon"}, ValueError, "placement needs one of"),
    ({"rank": 1}, ValueError, "rank needs 0 to 0"),
    ({"backend": "caffe"}, ValueError, "backend needs one of"),
    ({"device": "cuda:77"}, gglspeedup.DeviceError, "cuda:77"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message) as caught:
        loader(**options)
    assert isinstance(caught.value, gglspeedup.GGLSpeedupError)


def test_repr_says_what_it_is():
    assert repr(loader()) == (
        "SubgraphLoader(10 parts of 200 nodes, batch_size=3, 4 batches, device='cpu', backend='numpy')"
    )


@pytest.mark.skipif(bool(cuda_problem(0)), reason=f"no usable GPU: {cuda_problem(0)}")
@pytest.mark.parametrize("backend", ["numpy", "cupy", "torch"])
@pytest.mark.parametrize("placement", ["device", "uva"])
def test_gpu_equals_cpu(backend, placement):
    if backend == "torch":
        pytest.importorskip("torch", reason="torch is not installed on this GPU machine")
    plain = random_graph(np.random.default_rng(2), 20_000, 40, hub=50_000)
    for edge_ids in (None, np.random.default_rng(3).permutation(plain.num_edges)):
        graph = CSRGraph(plain.indptr, plain.indices, edge_ids=edge_ids)
        x, y = RNG.random((20_000, 17), dtype=np.float32), RNG.integers(0, 9, 20_000)
        weight = RNG.random(graph.num_edges, dtype=np.float32)
        options = {"ptr": np.linspace(0, 20_000, 41).astype(int), "batch_size": 6, "edge_weight": weight, "seed": 4}
        cpu = SubgraphLoader(graph, x, y, device="cpu", **options)
        gpu = SubgraphLoader(graph, x, y, device=0, cache="256K", backend=backend, placement=placement, **options)
        assert epochs(gpu) == epochs(cpu)
        assert epochs(gpu.evaluation()) == epochs(cpu.evaluation())
