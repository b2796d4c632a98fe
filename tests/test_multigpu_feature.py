"""Multi_CGPUFeature: the rows of CGPUFeature on every rank, in every process, in memory that all share."""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import missing, named_memory, random_graph
from host_cuda import HostRuntime
from test_multigpu import FakeCupy

import gglspeedup
from gglspeedup import CGPUFeature, Multi_CGPUFeature, device, multigpufeature, placement
from gglspeedup.device import Device

NODES = 300
DTYPES = ["float32", "float16", "int64", "uint8", "bool"]


@pytest.fixture(scope="module")
def graph():
    return random_graph(np.random.default_rng(0), NODES, 9, hub=50)


def made(graph, x, **options) -> Multi_CGPUFeature:
    features = Multi_CGPUFeature(0, ["cpu", "cpu"], 0, graph, **options)
    features.from_cpu_tensor(x)
    return features


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(NODES,), (NODES, 7)])
def test_rows_are_those_of_one_feature(graph, dtype, shape):
    x = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    many, one = made(graph, x), CGPUFeature(graph, "cpu")
    one.from_cpu_tensor(x)
    x[:] = 0  # it has a copy
    ids = [5, 5, 0, NODES - 1]
    for features in (many, many.on(1), pickle.loads(pickle.dumps(many)), pickle.loads(pickle.dumps(many.on(1)))):
        assert features.shape == shape and features.dtype == dtype
    del one
    one = CGPUFeature(graph, "cpu")
    one.from_cpu_tensor(np.random.default_rng(1).integers(0, 100, shape).astype(dtype))
    for features in (many, many.on(1), pickle.loads(pickle.dumps(many))):
        np.testing.assert_array_equal(features[ids], one[ids])
        assert features[ids].dtype == dtype
    assert many.stats() == {"host": {"rows": 8, "bytes": 8 * x[:1].nbytes}}  # its own
    assert repr(many.on(1)).startswith("Multi_CGPUFeature(") and "rank=1 of 2" in repr(many.on(1))


def test_bfloat16_stays_bfloat16(graph):
    if importlib.util.find_spec("ml_dtypes") is None:
        missing("ml_dtypes")
    bfloat16 = importlib.import_module("ml_dtypes").bfloat16
    x = np.arange(2 * NODES).reshape(NODES, 2).astype(bfloat16)
    twin = pickle.loads(pickle.dumps(made(graph, x)))
    assert twin[[3, 1]].dtype == bfloat16 and twin[[3, 1]].tolist() == x[[3, 1]].tolist()


def _gather_elsewhere(features, rank, queue):
    mine = features.on(rank)
    rows = mine[np.arange(rank, NODES, 7)]
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    private = 1024 * next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))
    queue.put((rank, rows.tobytes(), private))


@pytest.mark.parametrize("mapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_processes_attach(graph, mapped, tmp_path):
    x = np.random.default_rng(2).random((NODES, 5))
    if mapped:
        np.save(tmp_path / "x.npy", x)
        features = made(graph, np.load(tmp_path / "x.npy", mmap_mode="r"))
    else:
        features = made(graph, x)
    for rank, rows, _ in gathered_elsewhere(features, 2):
        assert rows == x[rank::7].tobytes()


def gathered_elsewhere(features, count):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_gather_elsewhere, args=(features, rank, queue)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        found = sorted(queue.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return found


@pytest.mark.slow
def test_processes_do_not_copy_the_rows(graph):
    before = named_memory()
    small, large = (np.ones((NODES, width), np.float32) for width in (4, 50_000))
    ((_, _, least),) = gathered_elsewhere(made(graph, small), 1)
    for _, rows, private in gathered_elsewhere(made(graph, large), 2):
        assert private - least < 3 * len(rows) < large.nbytes / 2  # the batch, and what is sent of it
    del small, large
    assert named_memory() <= before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 2}, ValueError, "rank needs"),
        ({"rank": "0"}, TypeError, "rank needs"),
        ({"device_list": []}, ValueError, "device_list needs at least one"),
        ({"device_list": "cpu"}, TypeError, "device_list needs a device for each rank"),
        ({"budget": "0.1Q"}, ValueError, "budget needs"),
        ({"layout": "both"}, ValueError, "layout needs"),
        ({"csr": None}, TypeError, "csr needs"),
    ],
)
def test_bad_input(graph, arguments, error, message):
    with pytest.raises(error, match=message) as raised:
        Multi_CGPUFeature(**{"rank": 0, "device_list": ["cpu", "cpu"], "budget": 0, "csr": graph, **arguments})
    assert isinstance(raised.value, gglspeedup.GGLSpeedupError)


def test_bad_rows_and_ids(graph):
    features = made(graph, np.zeros((NODES, 2)))
    with pytest.raises(ValueError, match="x needs shape"):
        features.from_cpu_tensor(np.zeros((NODES + 1, 2)))
    with pytest.raises(IndexError, match="n_id"):
        features.on(1)[[NODES]]
    with pytest.raises(ValueError, match="features needs to be loaded first"):
        Multi_CGPUFeature(0, ["cpu"], 0, graph)[[0]]


# --- on GPUs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch, tmp_path_factory):
    """Three CUDA devices, of which 0 and 1 have peer access; kernels run on the host, where all memory is."""
    runtime = HostRuntime(tmp_path_factory.getbasetemp(), "random")
    fake = FakeCupy(strangers=[(0, 2), (2, 0), (1, 2), (2, 1)])
    kept = []

    def memory(size):
        kept.append(runtime.empty((size,), np.uint8))
        return type("Memory", (), {"ptr": kept[-1].ctypes.data})

    def memcpy(target, source, size, _kind):
        np.copyto(_bytes(target, size), _bytes(source, size))

    fake.Memory, fake.runtime.memcpy = memory, memcpy
    monkeypatch.setitem(sys.modules, "cupy", fake)
    for module in (device, gglspeedup.gpufeature):
        monkeypatch.setattr(module, "parse_device", lambda d, *_: d if isinstance(d, Device) else Device(d))
    monkeypatch.setattr(multigpufeature, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(placement, "runtime_of", lambda device: runtime)
    return runtime


def _bytes(pointer, size):
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), np.uint8)


@pytest.mark.parametrize("layout", ["auto", "replicated"])
@pytest.mark.parametrize("rows", [0, 40, NODES])
def test_hot_rows_are_dealt_out_to_gpus(graph, gpus, layout, rows):
    x = np.random.default_rng(3).random((NODES, 6), dtype=np.float32)
    features = Multi_CGPUFeature(0, [0, 1, 2], rows * 24, graph, layout=layout)
    features.from_cpu_tensor(x)
    ids = np.random.default_rng(4).integers(0, NODES, 500)
    hottest = np.argsort(-graph.degree(), kind="stable")
    for rank in range(3):
        mine = features.on(rank)
        np.testing.assert_array_equal(mine[gpus.to_device(ids)], x[ids])
        shared = 2 if layout == "auto" and rank < 2 else 1  # how many devices its hot rows lie on
        hot = hottest[: min(shared * rows, NODES)]
        served = mine.stats()
        assert served["device"]["rows"] == np.isin(ids, hot).sum()
        assert sum(tier["rows"] for tier in served.values()) == 500


def test_gpus_that_cannot_share_say_so(graph, gpus):
    features = Multi_CGPUFeature(0, [0, 1, 2], 100, graph, layout="sharded")
    with pytest.raises(gglspeedup.GGLSpeedupError, match="layout needs peer access between all devices"):
        features.from_cpu_tensor(np.zeros((NODES, 2)))
    pair = Multi_CGPUFeature(0, [0, 1], 100, graph, layout="sharded")
    pair.from_cpu_tensor(np.zeros((NODES, 2)))
    assert pair[gpus.to_device(np.array([1]))].tolist() == [[0, 0]]
