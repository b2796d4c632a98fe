"""MultiGPUSampler: shards of any number, in one process and in spawned ones, give the bits of GPUSampler."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import named_memory, random_graph
from host_cuda import HostRuntime
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import (
    CGPUFeature,
    CSRGraph,
    GPUSampler,
    MultiGPUSampler,
    NodeLoader,
    device,
    multigpusample,
    peer_gpu,
    placement,
)
from gglspeedup.device import Device
from gglspeedup.errors import ShareError
from gglspeedup.pieces import balanced_rows
from gglspeedup.sharded_graph import ShardedGraph
from gglspeedup.shared_array import SharedArray


def bits(batch) -> bytes:
    return pickle.dumps([batch.n_id.tolist(), [(a.edge_index.tolist(), a.e_id.tolist(), a.size) for a in batch.adjs]])


@pytest.fixture(scope="module")
def graph() -> CSRGraph:
    rng = np.random.default_rng(3)
    plain = random_graph(rng, 500, 12, hub=900)
    return CSRGraph(plain.indptr, plain.indices, edge_ids=rng.permutation(plain.num_edges))


# --- shards --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 9))
def test_rows_are_dealt_out_evenly(degree, count):
    indptr = np.concatenate([[0], np.cumsum(degree, dtype=np.int64)]).astype(np.int64)
    rows = balanced_rows(indptr, count)
    assert len(rows) == count + 1 and rows[0] == 0 and rows[-1] == len(degree) and (np.diff(rows) >= 0).all()
    weight = indptr[rows] + rows
    heaviest = max(degree, default=0) + 1
    assert (np.abs(np.diff(weight) - weight[-1] / count) <= heaviest).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 7), st.booleans(), st.sampled_from(["layer", "frontier"]), st.booleans())
def test_any_number_of_shards_gives_the_same_bits(seed, shards, replace, expand, with_ids):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, int(rng.integers(1, 60)), int(rng.integers(0, 9)))
    if with_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=rng.permutation(graph.num_edges))
    options = {"seed": seed, "replace": replace, "expand": expand}
    sizes = rng.choice([-1, 1, 3, 40], 2).tolist()
    one = GPUSampler("cpu", graph, sizes, **options)
    many = MultiGPUSampler("cpu", graph, ["cpu"] * shards, sizes=sizes, **options)
    seeds = rng.permutation(graph.num_nodes)[: int(rng.integers(0, 9))]
    for _ in range(2):  # its own numbers of batches, too
        assert bits(many.sample(seeds, shards - 1)) == bits(one.sample(seeds))
    np.testing.assert_array_equal(many.graph.degree(), graph.degree())
    np.testing.assert_array_equal(many.graph.degree(seeds), graph.degree(seeds))


@pytest.mark.slow
def test_indices_of_64_bits_and_hashed_ids(graph):
    from gglspeedup.sampler_cpu import CpuSampler

    sharded = ShardedGraph(graph, [Device()] * 3)
    wide = ShardedGraph(graph, [Device()] * 3)
    for k, holder in enumerate(wide.indices.holders):
        wide.indices.holders[k] = SharedArray.of(holder.array.astype(np.int64))
    wide.indices.dtype = np.dtype(np.int64)
    options = {"seed": 1, "batch": 2, "replace": False, "expand": "layer"}
    expected = CpuSampler(graph).sample(np.arange(40), (5, 5), **options)
    for made in (CpuSampler(sharded), CpuSampler(sharded, "hash"), CpuSampler(wide)):
        n_id, hops = made.sample(np.arange(40), (5, 5), **options)
        np.testing.assert_array_equal(n_id, expected[0])
        for ours, theirs in zip(hops, expected[1], strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], theirs[1])


# --- the sampler ---------------------------------------------------------------------------------------------------


def test_ranks_count_their_own_batches(graph):
    many = MultiGPUSampler("cpu", graph, ["cpu", "cpu"], sizes=[4], seed=5)
    one = GPUSampler("cpu", graph, [4], seed=5)
    first, second = (one.sample(np.arange(50)) for _ in range(2))
    assert bits(many.sample(np.arange(50), 0)) == bits(first)
    assert bits(many.sample(np.arange(50))) == bits(second)  # rank 0 again
    assert bits(many.sample(np.arange(50), 1)) == bits(first) != bits(second)
    assert bits(many.sample(np.arange(50), 1, batch=1)) == bits(second)
    many.set_size([2, 2])
    assert many.sizes == (2, 2) and len(many.sample([1], 1).adjs) == 2
    assert many.sample([1], 1, sizes=[7]).adjs[0].e_id.size <= 7


def test_loaders_take_the_sampler_of_a_rank(graph):
    many = MultiGPUSampler("cpu", graph, ["cpu", "cpu"], seed=5)
    x = np.random.default_rng(0).random((500, 6), dtype=np.float32)
    options = {"seeds": np.arange(100), "sizes": [3, 3], "batch_size": 30, "seed": 5}
    for ours, theirs in zip(
        NodeLoader(many.sampler(1), x, **options), NodeLoader(graph, x, device="cpu", **options), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(ours.x, theirs.x)
        np.testing.assert_array_equal(ours.n_id, theirs.n_id)
    features = CGPUFeature(many.graph, "cpu")
    features.from_cpu_tensor(x)
    np.testing.assert_array_equal(features[[3, 1]], x[[3, 1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"devices": []}, ValueError, "devices needs at least one"),
        ({"devices": "cpu"}, TypeError, "devices needs a device for each rank"),
        ({"devices": ["cpu", "tpu"]}, ValueError, "devices needs"),
        ({"seed": -1}, ValueError, "seed needs"),
        ({"sizes": [0.5]}, ValueError, "sizes needs"),
        ({"csr": [1, 2, 3]}, TypeError, "csr needs"),
    ],
)
def test_bad_input(graph, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        MultiGPUSampler(**{"device": "cpu", "csr": graph, "devices": ["cpu"], **arguments})
    assert isinstance(raised.value, gglspeedup.GGLSpeedupError)


def test_bad_ranks(graph):
    many = MultiGPUSampler("cpu", graph, ["cpu", "cpu"], sizes=[2])
    for rank, error in ((2, ValueError), (-1, ValueError), ("0", TypeError)):
        with pytest.raises(error, match="rank needs"):
            many.sample([1], rank)
    with pytest.raises(IndexError, match="seeds"):
        many.sample([500], 1)


def test_kinds_of_devices_are_not_mixed(graph, monkeypatch):
    for module in (device, multigpusample):
        monkeypatch.setattr(module, "parse_device", lambda d, *_: Device(None if d == "cpu" else d))
    with pytest.raises(ValueError, match="devices needs CUDA devices only, or CPUs only"):
        MultiGPUSampler(0, graph, [0, "cpu"])
    with pytest.raises(ValueError, match="device needs one of the devices"):
        MultiGPUSampler(1, graph, [0, 0])


# --- other processes -----------------------------------------------------------------------------------------------


def _sample_elsewhere(many, rank, queue):
    batches = [bits(many.sample(np.arange(rank, 200 + rank), rank)) for _ in range(2)]
    queue.put((rank, batches, many.graph.degree([0]).tolist()))


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_attach_to_the_same_memory(graph, method, mapped, tmp_path):
    if mapped:
        graph.save(tmp_path / "graph")
        graph = CSRGraph.load(tmp_path / "graph")
    many = MultiGPUSampler("cpu", graph, ["cpu", "cpu"], sizes=[10, 5], seed=4)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=_sample_elsewhere, args=(many, rank, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(queue.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for rank, batches, degree in found:
        one = GPUSampler("cpu", graph, [10, 5], seed=4)
        assert batches == [bits(one.sample(np.arange(rank, 200 + rank))) for _ in range(2)]
        assert degree == [900]
    assert [process.exitcode for process in processes] == [0, 0]


def _memory_elsewhere(many, queue):
    many.sample(np.arange(100))
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    queue.put(1024 * next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:")))


@pytest.mark.slow
def test_processes_do_not_copy_the_graph():
    context = multiprocessing.get_context("spawn")
    queue, own = context.Queue(), []
    for nodes in (1000, 2_000_000):
        indices = np.random.default_rng(0).integers(0, nodes, 10 * nodes, dtype=np.int32)
        many = MultiGPUSampler("cpu", (np.arange(nodes + 1) * 10, indices), ["cpu"], sizes=[5, 5])
        process = context.Process(target=_memory_elsewhere, args=(many, queue))
        process.start()
        own.append(queue.get(timeout=60))
        process.join(10)
        assert process.exitcode == 0
    table = 4 * 2_000_000  # of local ids, which each process has for itself
    assert own[1] - own[0] < table + 0.1 * indices.nbytes


def test_shared_memory_is_seen_by_all_and_leaves_nothing_behind(tmp_path):
    before = named_memory()
    shared = SharedArray((3, 2), np.float32)
    twin = pickle.loads(pickle.dumps(shared))
    twin.array[1] = 7
    assert shared.array.tolist() == [[0, 0], [7, 7], [0, 0]] and twin.array.flags.c_contiguous
    view = SharedArray.of(np.arange(5)).array  # lives on without its owner
    del shared, twin
    assert view.tolist() == list(range(5))
    assert SharedArray((0, 4), np.int64).array.shape == (0, 4)
    assert named_memory() <= before


def test_memory_that_is_not_there_is_refused():
    with pytest.raises(ShareError, match="bytes that processes share"):
        SharedArray((1 << 60,), np.int64)


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_share", [0.25, 0.0])
@pytest.mark.parametrize("order", ["forwards", "random"])
def test_kernels_read_shards(graph, order, table_share, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(placement, "_TABLE_SHARE", table_share)  # a dense table, or a hash table
    runtime = HostRuntime(tmp_path_factory.getbasetemp(), order)
    one = GPUSampler("cpu", graph)
    for shards in (1, 2, 5):
        sharded = ShardedGraph(graph, [Device()] * shards)
        sampler = placement.place_shards(sharded, runtime, 1 << 30)
        assert sampler._hashed == (table_share == 0.0)
        for fanouts in ((5, 3), (20, -1), (40,)):
            options = {"seed": 0, "batch": 3, "replace": False, "expand": "layer"}
            n_id, hops = sampler.sample(np.arange(30), fanouts, **options)
            expected = one.sample(np.arange(30), 3, sizes=fanouts)
            np.testing.assert_array_equal(n_id, expected.n_id)
            for (edge_index, e_id, size), adj in zip(hops, expected.adjs, strict=True):
                np.testing.assert_array_equal(edge_index, adj.edge_index)
                np.testing.assert_array_equal(e_id, adj.e_id)
                assert size == adj.size


class PeerRuntime:
    """What peer_gpu asks of the CUDA runtime, for devices that each have an address space of 2**32 bytes."""

    memcpyHostToDevice = 1

    class CUDARuntimeError(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    def __init__(self, fake) -> None:
        self.fake = fake
        self.enabled: set[tuple[int, int]] = set()
        self.opened: list[tuple[int, int]] = []

    def deviceCanAccessPeer(self, one, other):
        return (one, other) not in self.fake.strangers

    def deviceEnablePeerAccess(self, peer):
        if (self.fake.current, peer) in self.enabled:
            raise self.CUDARuntimeError(704)
        self.enabled.add((self.fake.current, peer))

    def memcpy(self, target, source, size, kind):
        assert kind == self.memcpyHostToDevice
        self.fake.contents[target] = ctypes.string_at(source, size)

    def ipcGetMemHandle(self, pointer):
        return pointer.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle):
        self.opened.append((self.fake.current, int.from_bytes(handle, "little")))
        return int.from_bytes(handle, "little") + 1

    def ipcCloseMemHandle(self, pointer):
        self.opened.remove((self.fake.current, pointer - 1))


class FakeCupy(types.ModuleType):
    """A CuPy of several devices; `cuda` is itself."""

    def __init__(self, room: int = 1 << 20, strangers=()) -> None:
        super().__init__("cupy")
        self.cuda, self.current, self.contents, self.strangers = self, -1, {}, set(strangers)
        self.runtime, self.room = PeerRuntime(self), room

    @contextlib.contextmanager
    def Device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def Memory(self, size):
        if size > self.room:
            raise MemoryError("out of memory")
        self.room -= size
        return types.SimpleNamespace(ptr=((self.current + 1) << 32) + self.room)


def test_shards_in_the_memory_of_gpus(graph, monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    sharded = ShardedGraph(graph, [Device(0), Device(1), Device(0)])
    holders = sharded.indices.holders
    assert [holder.index for holder in holders] == [0, 1, 0]
    together = b"".join(fake.contents[holder.address(1)] for holder in holders)
    assert together == graph.indices.tobytes()
    assert fake.runtime.enabled == {(1, 0)}  # device 1 reads device 0; asking twice does no harm
    np.testing.assert_array_equal(sharded.degree(), graph.degree())
    # In the same process a pickled array is itself; in another one its handle is opened, once for each device.
    assert pickle.loads(pickle.dumps(holders[0])) is holders[0]
    text = pickle.dumps(holders[0])
    monkeypatch.setattr(peer_gpu, "_own", {})
    twin = pickle.loads(text)
    assert [twin.address(reader) for reader in (0, 1, 1)] == [holders[0].address(0) + 1] * 3
    assert fake.runtime.opened == [(reader, holders[0].address(0)) for reader in (0, 1)]
    assert pickle.loads(pickle.dumps(twin)).address(1) == twin.address(1)  # handed on
    del twin
    gc.collect()
    assert not fake.runtime.opened


def test_gpus_without_access_share_host_memory(graph, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(strangers=[(1, 0)]))
    sharded = ShardedGraph(graph, [Device(0), Device(1)])
    assert all(isinstance(holder, SharedArray) for holder in sharded.indices.holders)
    assert "cannot read each other's memory" in caplog.text


def test_out_of_gpu_memory_the_graph_stays_on_the_host(graph, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(room=graph.indices.nbytes // 4))
    sharded = ShardedGraph(graph, [Device(0), Device(1)])
    assert all(isinstance(holder, SharedArray) for holder in sharded.indices.holders)
    assert "pinned host memory" in caplog.text
