"""On a GPU: the same bits as on the CPU, whatever the placement, the stream and the thread."""

from __future__ import annotations

import multiprocessing
import pickle
import threading

import numpy as np
import pytest
from conftest import random_graph

from gglspeedup import (
    CGPUFeature,
    CSRGraph,
    GGLSpeedupError,
    GPUSampler,
    Multi_CGPUFeature,
    MultiGPUSampler,
    NodeLoader,
    Prefetcher,
    peer_gpu,
)
from gglspeedup.device import cuda_problem
from gglspeedup.distributed import (
    DistFeature,
    DistNodeLoader,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    NcclCommunicator,
    PartBook,
)
from gglspeedup.hot_order import hot_order

pytestmark = pytest.mark.skipif(bool(cuda_problem(0)), reason=f"no usable GPU: {cuda_problem(0)}")


def bits(batch) -> list[bytes]:
    arrays = [batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]
    return [np.asarray(part.get() if hasattr(part, "get") else part).tobytes() for part in arrays]


@pytest.fixture(scope="module")
def graph() -> CSRGraph:
    graph = random_graph(np.random.default_rng(0), 50_000, 60, hub=300_000)
    return CSRGraph(graph.indptr, graph.indices, edge_ids=np.random.default_rng(1).permutation(graph.num_edges))


@pytest.mark.parametrize("placement", ["device", "uva", "auto"])
@pytest.mark.parametrize("expand", ["layer", "frontier"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("sizes", [[25, 10], [15, 10, 5], [1], [33, 7], [1024], [-1, 3], [3, -1], [-1, -1]])
def test_equals_cpu(graph, placement, expand, replace, sizes):
    options = {"sizes": sizes, "seed": 2**63 + 17, "replace": replace, "expand": expand}
    cpu = GPUSampler("cpu", graph, **options)
    gpu = GPUSampler(0, graph, placement=placement, **options)
    order = np.random.default_rng(2).permutation(graph.num_nodes)
    few = 40 if -1 in sizes else 1000
    for number, count in enumerate([few, few, few, few // 3, 0, 1, few]):
        seeds = order[number * few :][:count]
        assert bits(gpu.sample(seeds)) == bits(cpu.sample(seeds))


@pytest.mark.parametrize("placement", ["device", "uva"])
@pytest.mark.parametrize("sizes", [[15, 10, 5], [33, 7], [-1, 3]])
def test_several_batches_at_once_equal_cpu(graph, placement, sizes):
    import cupy

    options = {"sizes": sizes, "seed": 2**63 + 17}
    cpu, gpu = GPUSampler("cpu", graph, **options), GPUSampler(0, graph, placement=placement, **options)
    order = np.random.default_rng(2).permutation(graph.num_nodes)
    for counts in ((64, 64, 64), (64, 64, 64), (64, 50, 64), (0, 1), (16,) * 70, (300, 7), (9,), ()):
        begins = np.cumsum((0, *counts))
        batches = [(order[low : low + count], None) for low, count in zip(begins, counts, strict=False)]
        expected = [bits(cpu.sample(*batch)) for batch in batches]
        assert [bits(batch) for batch in gpu.sample_many(batches)] == expected
        gpu._batch -= len(batches)
        at_once = 1 + len(counts) // 2
        assert [bits(batch) for batch in gpu.sample_each(batches, at_once=at_once)] == expected
        numbered = [(cupy.asarray(seeds), 2**40 + at) for at, (seeds, _) in enumerate(batches)]
        expected = [bits(cpu.sample(seeds.get(), number)) for seeds, number in numbered]
        assert [bits(batch) for batch in gpu.sample_many(numbered)] == expected
    with pytest.raises(GGLSpeedupError, match="got -4 at position 1"):
        gpu.sample_many([([1, 2], None), ([0, -4], None)])
    assert gpu.sample([5]).batch == cpu.sample([5]).batch


def test_wide_indices_and_no_edge_ids(graph):
    plain = CSRGraph(graph.indptr, graph.indices)
    wide = CSRGraph(graph.indptr, graph.indices)
    wide.indices = wide.indices.astype(np.int64)
    expected = bits(GPUSampler("cpu", plain, [9, 9]).sample(np.arange(500), batch=1))
    for one in (plain, wide):
        assert bits(GPUSampler(0, one, [9, 9]).sample(np.arange(500), batch=1)) == expected


def test_hash_table(graph):
    from gglspeedup.device import Device
    from gglspeedup.placement import place_graph, runtime_of

    sampler = place_graph(graph, runtime_of(Device(0)), "device", free=16 * graph.num_nodes)
    assert sampler._hashed
    cpu = GPUSampler("cpu", graph, [15, 10, 5], seed=3)
    for number in range(4):
        seeds = np.arange(700 * number, 700 * number + 700)
        n_id, hops = sampler.sample(seeds, (15, 10, 5), seed=3, batch=number, replace=False, expand="layer")
        expected = cpu.sample(seeds, batch=number)
        np.testing.assert_array_equal(n_id.get(), expected.n_id)
        for (edge_index, e_id, size), adj in zip(hops, expected.adjs, strict=True):
            np.testing.assert_array_equal(edge_index.get(), adj.edge_index)
            np.testing.assert_array_equal(e_id.get(), adj.e_id)
            assert size == adj.size


@pytest.mark.parametrize("where", ["cupy", "torch", "cupy-int32", "list"])
def test_seeds_and_ids_on_the_device(graph, where):
    import cupy

    ids = np.random.default_rng(3).permutation(graph.num_nodes)[:300]
    if where == "torch":
        import torch

        given = torch.from_numpy(ids).cuda()
    else:
        given = {"cupy": cupy.asarray(ids), "cupy-int32": cupy.asarray(ids, np.int32), "list": ids.tolist()}[where]
    assert bits(GPUSampler(0, graph, [5]).sample(given)) == bits(GPUSampler("cpu", graph, [5]).sample(ids))
    x = np.random.default_rng(4).random((graph.num_nodes, 5))
    feature = CGPUFeature(graph, 0, "64K")
    feature.from_cpu_tensor(x)
    np.testing.assert_array_equal(feature[given].get(), x[ids])


def test_streams_and_threads(graph):
    import cupy

    cpu, gpu = GPUSampler("cpu", graph, [10, 10]), GPUSampler(0, graph, [10, 10])
    seeds = np.arange(400)
    expected = [bits(cpu.sample(seeds, batch=b)) for b in range(24)]
    got: list = [None] * 24

    def work(first: int) -> None:
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True):
            for b in range(first, 24, 4):
                got[b] = bits(gpu.sample(seeds, batch=b))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_bad_seeds_and_ids(graph):
    import cupy

    gpu = GPUSampler(0, graph, [5])
    expected = bits(GPUSampler("cpu", graph, [5]).sample([1, 2, 3]))
    for array in (np.array, cupy.array):
        with pytest.raises(GGLSpeedupError, match="got -4 at position 1"):
            gpu.sample(array([0, -4, graph.num_nodes]))
        with pytest.raises(GGLSpeedupError, match="7 again at position 2"):
            gpu.sample(array([7, 1, 7]))
        feature = CGPUFeature(graph, 0, "1M")
        feature.from_cpu_tensor(np.zeros(graph.num_nodes))
        with pytest.raises(IndexError, match=f"got {graph.num_nodes} at position 1"):
            feature[array([0, graph.num_nodes, -1])]
    assert bits(gpu.sample([1, 2, 3])) == expected


@pytest.mark.parametrize("budget", [0, "100K", "10G"])
@pytest.mark.parametrize("dtype", ["bool", "float16", "float32", "int64", "complex128"])
@pytest.mark.parametrize("width", [None, 1, 3, 64, 1025])
def test_features(graph, tmp_path, budget, dtype, width):
    rng = np.random.default_rng(5)
    nodes = 3000
    small = random_graph(rng, nodes, 9)
    shape = (nodes,) if width is None else (nodes, width)
    x = rng.integers(0, 99, shape).astype(dtype)
    x.tofile(tmp_path / "x")
    ids = rng.integers(0, nodes, 2000)
    for rows in (x, np.memmap(tmp_path / "x", dtype, "r", shape=shape)):
        feature = CGPUFeature(small, 0, budget)
        feature.from_cpu_tensor(rows)
        got = feature[ids]
        assert got.dtype == x.dtype and got.data.ptr % 64 == 0
        np.testing.assert_array_equal(got.get(), x[ids])
        served = [tier["rows"] for tier in feature.stats().values()]
        assert sum(served) == len(ids) and feature.hit_rate == served[0] / len(ids)
        assert feature.hit_rate == {0: 0.0, "10G": 1.0}.get(budget, feature.hit_rate)


def test_a_budget_beyond_the_data_warns_of_nothing(graph, caplog):
    feature = CGPUFeature(graph, 0, "100T")
    feature.from_cpu_tensor(np.arange(graph.num_nodes))
    assert feature[[5]].tolist() == [5] and feature.hit_rate == 1.0 and not caplog.records


def test_presampling(graph):
    seeds = np.random.default_rng(6).permutation(graph.num_nodes)[:4000]
    orders = []
    for device in ("cpu", 0):
        sampler = GPUSampler(device, graph, [5, 5])
        orders.append(hot_order(graph, "presample", sampler, seeds, 512))
    np.testing.assert_array_equal(orders[0], orders[1])


def test_pickles(graph):
    sampler = GPUSampler(0, graph, [5])
    twin = pickle.loads(pickle.dumps(sampler))
    assert bits(sampler.sample(np.arange(9))) == bits(twin.sample(np.arange(9)))


def test_torch_shares_the_memory(graph):
    torch = pytest.importorskip("torch", reason="torch is not installed on this GPU machine")
    batch = GPUSampler(0, graph, [5, 5]).sample(np.arange(50))
    adj = batch.adjs[0].cp2torch()
    assert adj.edge_index.is_cuda and adj.edge_index.dtype == torch.int64
    assert adj.edge_index.data_ptr() == batch.adjs[0].edge_index.data.ptr
    np.testing.assert_array_equal(adj.e_id.cpu().numpy(), batch.adjs[0].e_id.get())


def test_memory_does_not_grow(graph):
    import cupy

    sampler = GPUSampler(0, graph, [10, 5])
    pool = cupy.get_default_memory_pool()

    def run(batches: int) -> int:
        for b in range(batches):
            sampler.sample(np.arange(b, b + 500))
        return pool.total_bytes()

    before = run(300)
    assert run(3000) - before < 64 << 20


@pytest.mark.parametrize("backend", ["numpy", "cupy", "torch"])
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_loader_equals_cpu(graph, backend, prefetch):
    if backend == "torch":
        pytest.importorskip("torch", reason="torch is not installed on this GPU machine")
    rng = np.random.default_rng(7)
    x, y = rng.random((graph.num_nodes, 33), dtype=np.float32), rng.integers(0, 9, graph.num_nodes)
    options = {"seeds": rng.permutation(graph.num_nodes)[:5000], "sizes": [10, 5], "batch_size": 300, "seed": 8}
    cpu = NodeLoader(graph, x, y, device="cpu", **options)
    gpu = NodeLoader(graph, x, y, device=0, cache="1M", backend=backend, prefetch=prefetch, **options)

    def host(array):
        return array.get() if hasattr(array, "get") else array.cpu().numpy() if hasattr(array, "cpu") else array

    for _ in range(2):
        for ours, expected in zip(gpu, cpu, strict=True):
            for name in ("x", "y", "n_id"):
                np.testing.assert_array_equal(host(getattr(ours, name)), getattr(expected, name))
            for adj, other in zip(ours.adjs, expected.adjs, strict=True):
                np.testing.assert_array_equal(host(adj.edge_index), other.edge_index)
                np.testing.assert_array_equal(host(adj.e_id), other.e_id)


def test_a_slow_reader_never_sees_a_later_batch(graph):
    """Kernels of the reader are still queued when it lets go of a batch: its memory must not be filled anew."""
    torch = pytest.importorskip("torch", reason="torch is not installed on this GPU machine")
    x = np.random.default_rng(9).integers(0, 1000, (graph.num_nodes, 64)).astype(np.float32)
    loader = NodeLoader(
        graph, x, seeds=np.arange(20_000), sizes=[10, 5], batch_size=500, device=0, cache="1G", backend="torch",
        prefetch=4,
    )  # fmt: skip
    busy = torch.randn(3000, 3000, device="cuda")
    sums = []
    for batch in loader:
        for _ in range(10):
            busy = busy @ busy / 3000  # queued before the sum, it keeps the stream behind the host
        sums.append(batch.x.sum(dtype=torch.float64))
    expected = [x[batch.n_id].sum(dtype=np.float64) for batch in NodeLoader(
        graph, seeds=np.arange(20_000), sizes=[10, 5], batch_size=500, device="cpu"
    )]  # fmt: skip
    assert [float(value) for value in sums] == expected


@pytest.mark.parametrize("shared", ["device", "pinned"])
def test_shards_equal_one_graph(graph, shared, monkeypatch):
    if shared == "pinned":
        monkeypatch.setattr(peer_gpu, "peers", lambda indices: False)
    many = MultiGPUSampler(0, graph, [0, 0, 0], sizes=[15, 10], seed=3)
    cpu = GPUSampler("cpu", graph, [15, 10], seed=3)
    for number in range(4):  # plain launches, then a replayed graph
        seeds = np.arange(number, 2000, 3)
        assert bits(many.sample(seeds, number % 3, batch=number)) == bits(cpu.sample(seeds, batch=number))


def _attach(many, features, rank, queue):
    batch = many.sample(np.arange(rank, 700), rank)
    rows = features.on(rank)[batch.n_id]
    queue.put((rank, bits(batch), rows.get().tobytes()))


def test_spawned_processes_read_the_shards_of_their_parent(graph):
    x = np.random.default_rng(7).random((graph.num_nodes, 24), dtype=np.float32)
    many = MultiGPUSampler(0, graph, [0, 0], sizes=[9, 9], seed=1)
    features = Multi_CGPUFeature(0, [0, 0], x.nbytes // 3, graph)
    features.from_cpu_tensor(x)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_attach, args=(many, features, rank, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for rank, sampled, rows in [queue.get(timeout=120) for _ in processes]:
            expected = GPUSampler("cpu", graph, [9, 9], seed=1).sample(np.arange(rank, 700))
            assert sampled == bits(expected) and rows == x[expected.n_id].tobytes()
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_prefetcher_copies_batches(framework):
    torch = pytest.importorskip("torch", reason="torch is not installed on this GPU machine")
    batches = [{"x": np.full((1000, 64), k, np.float32), "parts": [np.arange(k + 1)], "size": k} for k in range(30)]
    if framework == "torch":
        batches = [{**b, "x": torch.from_numpy(b["x"]), "parts": [torch.from_numpy(b["parts"][0])]} for b in batches]
    busy = torch.randn(3000, 3000, device="cuda")
    sums = []
    for batch in Prefetcher(batches, 4, device=0):
        for _ in range(10 if framework == "torch" else 0):
            busy = busy @ busy / 3000  # queued before the sum, it keeps the stream behind the host
        sums.append((batch["x"].sum(), batch["parts"][0].sum(), batch["size"]))
    assert [tuple(map(float, row)) for row in sums] == [(k * 64_000, k * (k + 1) / 2, k) for k in range(30)]


def communicator_of(engine):
    if engine == "local":
        return LocalCommunicator()
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="CuPy has no NCCL")
    if not nccl.available:
        pytest.skip("CuPy has no NCCL")
    return NcclCommunicator(LocalCommunicator())


@pytest.mark.filterwarnings("ignore:(?s).*nccl library could not be loaded")
@pytest.mark.parametrize("engine", ["local", "nccl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0, 3, 1])
def test_rows_of_a_rank(graph, engine, dtype, share):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = np.random.default_rng(7).random((graph.num_nodes, 24)).astype(kind)
    book = PartBook.contiguous([0, graph.num_nodes])
    part, budget = GraphPart.of(graph, book, 0), x.nbytes // share if share else 0
    features = DistFeature(part, communicator_of(engine), x, policy="degree", device=0, budget=budget)
    ids = np.random.default_rng(8).integers(0, graph.num_nodes, 30_000)
    for found, wanted in zip(features.take_many([ids, ids[:0], ids[:7]]), (ids, ids[:0], ids[:7]), strict=True):
        assert found.dtype == x.dtype and found.get().tobytes() == x[wanted].tobytes()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_of_a_rank(graph, prefetch):
    import cupy

    x = np.random.default_rng(9).integers(0, 1000, (graph.num_nodes, 32)).astype(np.float32)
    part, communicator = GraphPart.of(graph, PartBook.contiguous([0, graph.num_nodes]), 0), LocalCommunicator()
    features = DistFeature(part, communicator, x, device=0, budget=x.nbytes // 3)
    loader = DistNodeLoader(
        DistSampler(part, communicator, [10, 5], seed=3), features, np.arange(graph.num_nodes), seeds=np.arange(20_000),
        batch_size=500, backend="cupy", prefetch=prefetch, together=2,
    )  # fmt: skip
    cpu = GPUSampler("cpu", graph, [10, 5], seed=3)
    busy = cupy.ones((3000, 3000), cupy.float32)
    kept = []
    for batch in loader:
        for _ in range(4):
            busy = busy @ busy / 3000  # queued before the sums, it keeps the stream behind the host
        edges = batch.adjs[0].e_id.sum()
        kept.append((batch.batch, batch.x.sum(dtype=np.float64), batch.y.sum(), batch.n_id[-1], edges))
    for batch, rows, labels, last, edges in kept:
        expected = cpu.sample(loader.order(0)[500 * batch :][:500], batch)
        assert float(rows) == x[expected.n_id].sum(dtype=np.float64) and int(labels) == expected.seeds.sum()
        assert int(last) == expected.n_id[-1] and int(edges) == expected.adjs[0].e_id.sum()
