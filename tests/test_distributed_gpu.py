"""Features over ranks that have a GPU each, here a stand-in for it: the rows and batches of the CPU, on the device."""

from __future__ import annotations

import gc
import sys

import device_on_host
import ml_dtypes
import numpy as np
import pytest
from conftest import random_graph
from cupy_on_host import CUDARuntimeError, OutOfMemoryError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_distributed import a_book
from test_faults import check_all
from test_faults import cupy as cupy_on_host  # noqa: F401  # a fixture

from gglspeedup.distributed import (
    Communicator,
    DistFeature,
    DistNodeLoader,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    NcclCommunicator,
    PartBook,
    RankError,
    run_ranks,
)
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, DeviceMemoryError

NODES = 90
BOOK = PartBook.from_owners(np.arange(NODES) % 3, 3)
GRAPH = random_graph(np.random.default_rng(0), NODES, 12)


@pytest.fixture(autouse=True)
def cupy(request):
    yield request.getfixturevalue("cupy_on_host")
    gc.collect()  # what an exception has held on to is let go of before there is another CuPy


class Wire(Communicator):
    """Sends arrays of the device, if it says that it does, and never ones of the host in their place."""

    def __init__(self, host: Communicator, device_buffers: bool) -> None:
        super().__init__(host.rank, host.size, host.timeout)
        self.host, self.device_buffers = host, device_buffers
        self.device_rows = 0

    def exchange(self, rows, send_counts, receive_counts):
        self.host.step = self.step
        cupy = sys.modules["cupy"]
        if type(rows) is np.ndarray:
            return self.host.exchange(rows, send_counts, receive_counts)
        assert self.device_buffers and isinstance(rows, cupy.ndarray) and rows.flags.c_contiguous
        self.device_rows += len(rows)
        return cupy.asarray(self.host.exchange(np.array(rows), send_counts, receive_counts))

    def abort(self, reason):
        self.host.abort(reason)


def nccl(cupy, monkeypatch):
    """Let CuPy have the stand-in of NCCL, and return its network."""
    network = device_on_host.Network()
    network.record = lambda stream: None
    cupy.nccl, cupy.default.ptr = network.module(), device_on_host.STREAM
    monkeypatch.setattr(cupy, "Event", lambda disable_timing: network)
    # The stand-in's arrays are NumPy's, too.
    monkeypatch.setattr(sys.modules[NcclCommunicator.__module__], "on_cuda", lambda rows: type(rows) is cupy.ndarray)
    for name, module in (("cupy.cuda", cupy), ("cupy.cuda.nccl", cupy.nccl)):
        monkeypatch.setitem(sys.modules, name, module)
    return network


def same(found, expected) -> bool:
    cupy = sys.modules["cupy"]
    assert isinstance(found, cupy.ndarray) and found.ctypes.data % 16 == 0
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


# The fixture stays as it is from example to example.
_EXAMPLES = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=30, **_EXAMPLES)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 3), nodes=st.integers(1, 60), contiguous=st.booleans(),
    dtype=st.sampled_from(["float32", "int64", "uint8", "complex64", ml_dtypes.bfloat16]),
    width=st.sampled_from([None, 0, 1, 3, 8]), cached=st.sampled_from([0, 0, 5, 60]), device_buffers=st.booleans(),
    hot=st.sampled_from([0, 3, 60]),
)  # fmt: skip
def test_equals_the_cpu(numbers, ranks, nodes, contiguous, dtype, width, cached, device_buffers, hot):
    rng = np.random.default_rng(numbers)
    book = a_book(rng, nodes, ranks, contiguous)
    x = rng.integers(0, 100, (nodes,) if width is None else (nodes, width)).astype(dtype)
    order = rng.permutation(nodes)[: rng.integers(0, nodes + 1)]
    wanted = [[rng.integers(0, nodes, rng.integers(0, 2 * nodes)) for _ in range(3)] for _ in range(ranks)]
    wanted[0][1] = wanted[0][1][:0]
    row = max(1, x[:1].nbytes)

    def work(host):
        wire, mine = Wire(host, device_buffers), book.nodes_of(host.rank)
        options = {"cache": cached * row, "policy": order}
        cpu = DistFeature(book, host, x[mine], **options)
        gpu = DistFeature(book, wire, x[mine], device=0, budget=hot * row, **options)
        assert str(gpu.device) == "cuda:0" and str(cpu.device) == "cpu" and gpu.cached == cpu.cached
        for ids in wanted[host.rank]:
            assert same(gpu[ids], np.array(cpu[ids]))
        for found, expected in zip(gpu.take_many(wanted[host.rank]), cpu.take_many(wanted[host.rank]), strict=True):
            assert same(found, expected)
        assert gpu.take_many([]) == cpu.take_many([]) == []
        assert gpu.stats() == cpu.stats() and gpu.traffic()["rows"] == cpu.traffic()["rows"]
        return wire.device_rows

    sent = run_ranks(ranks, work)
    assert device_buffers or not any(sent)


def test_by_nccl(cupy, monkeypatch):
    """From GPU to GPU; hot rows, pinned ones, and copies of some remote ones."""
    network = nccl(cupy, monkeypatch)
    x = np.random.default_rng(1).random((NODES, 6)).astype(ml_dtypes.bfloat16)
    ids = np.random.default_rng(2).integers(0, NODES, (3, 70))

    def work(host):
        communicator, mine = NcclCommunicator(host), x[BOOK.nodes_of(host.rank)]
        features = DistFeature(
            GraphPart.of(GRAPH, BOOK, host.rank), communicator, mine, cache=5 * 12, policy="degree", device=0,
            budget=9 * 12,
        )  # fmt: skip
        network.calls.clear()
        communicator.gather_all(b"cleared")
        return same(features[ids[host.rank]], x[ids[host.rank]]) and features.stats()["remote"]["rows"]

    assert all(run_ranks(3, work))
    sent = {(rank, peer) for name, rank, peer, count in network.calls if name == "send" and count % 12 == 0}
    assert sent == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_ranks_with_and_without_a_gpu():
    """All of them then send host memory: an engine would wait for ever where one sends what another does not expect."""
    x = np.arange(3.0 * NODES).reshape(NODES, 3)

    def work(host):
        wire = Wire(host, True)
        features = DistFeature(BOOK, wire, x[host.rank :: 3], device="cpu" if host.rank == 1 else 0)
        found = features[np.arange(NODES)]
        assert np.array_equal(np.asarray(found), x) and (type(found) is np.ndarray) == (host.rank == 1)
        assert f"device='{features.device}'" in repr(features) or host.rank == 1
        return wire.device_rows

    assert run_ranks(3, work) == [0, 0, 0]


def test_rows_on_disk(tmp_path):
    x = np.random.default_rng(1).random((NODES, 3)).astype(np.float32)
    x.tofile(tmp_path / "x")
    rows = np.memmap(tmp_path / "x", x.dtype, "r", shape=x.shape)
    book = PartBook.contiguous([0, NODES])
    features = DistFeature(book, LocalCommunicator(), rows, device="cuda:0", budget=12 * 20)
    assert same(features[[3, 80, 3, 0]], x[[3, 80, 3, 0]])
    again = features[features[np.arange(4)][:0].astype(np.int64).reshape(-1)]  # ids on the device, none
    assert again.shape == (0, 3)


def hot_rows(features):
    return np.flatnonzero(np.asarray(features._on_device._tiers._slot) >= 0).tolist()


def test_which_rows_are_hot():
    """By a list of nodes, then by degree, where it is known, or else the first ones."""
    x = np.zeros((NODES // 3, 2))
    part = GraphPart.of(GRAPH, BOOK, 1)
    by_degree = np.argsort(-GRAPH.degree()[1::3], kind="stable").tolist()

    def work(host):
        found = []
        for where, policy in ((part, "degree"), (BOOK, "presample"), (part, [30, 31, 4]), (BOOK, [88, 31, 2, 85])):
            if host.rank == 1:
                found.append(hot_rows(DistFeature(where, host, x, device=0, budget=16 * 4, policy=policy)))
            else:
                DistFeature(BOOK, host, x, policy=policy)
        return found

    degree, first, listed, of_book = run_ranks(3, work)[1]
    assert degree == sorted(by_degree[:4]) and first == [0, 1, 2, 3]
    rest = [row for row in by_degree if row not in (10, 1)]
    assert listed == sorted([10, 1, *rest[:2]])
    assert of_book == [0, 10, 28, 29]  # nodes 1, 31, 85, 88


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"device": 2}, DeviceError, "device needs a usable CUDA device for cuda:2"),
        ({"device": "tpu"}, ArgumentValueError, "device needs"),
        ({"device": 0, "budget": "many"}, ArgumentValueError, "budget needs"),
        ({"budget": None}, ArgumentTypeError, "budget needs"),
        ({"device": 0, "policy": [1, 1]}, ArgumentValueError, "policy needs unique ids"),
    ],
)
def test_bad_arguments(options, error, text):
    """Of one rank: it says so, and the others who it was; all go on."""

    def work(host):
        x, bad = np.arange(NODES)[host.rank :: 3], host.rank == 1
        with pytest.raises(error if bad else RankError, match=text):
            DistFeature(BOOK, host, x, **(options if bad else {}))
        return DistFeature(BOOK, host, x, device=0)[[host.rank]].tolist()

    assert run_ranks(3, work) == [[0], [1], [2]]


def test_a_gpu_that_the_communicator_was_not_made_for(cupy, monkeypatch):
    nccl(cupy, monkeypatch)
    communicator = NcclCommunicator(LocalCommunicator())
    with pytest.raises(ArgumentValueError, match="device needs cuda:0, which the NcclCommunicator was made for"):
        DistFeature(PartBook.contiguous([0, 2]), communicator, np.zeros(2), device=1)


def test_room_on_one_gpu(cupy, monkeypatch):
    """Beyond it hot rows become fewer, and leave room for the cache."""
    monkeypatch.setattr(cupy, "free", 700)
    x = np.arange(NODES * 2.0).reshape(NODES, 2)
    book = PartBook.from_owners(np.arange(NODES) % 2, 2)

    def work(host):
        counts = []
        for cache in 0, 160:
            features = DistFeature(book, host, x[host.rank :: 2], device=0, budget="1G", cache=cache, policy=[0, 1])
            assert same(features[np.arange(NODES)], x)
            counts.append(len(hot_rows(features)))
        return counts

    # Of 95 %, less 4 bytes for each of 45 rows.
    assert run_ranks(2, work) == [[485 // 16, 333 // 16]] * 2


def test_no_room_for_a_cache(cupy, monkeypatch):
    """The others hear why there is none."""
    x = np.arange(NODES * 2.0).reshape(NODES, 2)
    empty = cupy.empty

    def refuse(shape, dtype=float):
        if shape == (7, 2):
            raise OutOfMemoryError("Out of memory")
        return empty(shape, dtype)

    monkeypatch.setattr(cupy, "empty", refuse)

    def work(host):
        with pytest.raises(Exception) as told:
            DistFeature(BOOK, host, x[host.rank :: 3], device=0, cache=7 * 16 * (host.rank == 1), policy=np.arange(20))
        return type(told.value), str(told.value)

    (_, first), (kind, _), (_, third) = run_ranks(3, work)
    assert kind is DeviceMemoryError and "DeviceMemoryError" in first and "rank 1" in third


# --- the loader ----------------------------------------------------------------------------------------------------


@settings(max_examples=12, **_EXAMPLES)
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 3), together=st.integers(1, 3), prefetch=st.integers(0, 2),
    device_buffers=st.booleans(), labels=st.sampled_from(["gpu", "cpu", "whole", None]), cache=st.integers(0, 200),
)  # fmt: skip
def test_batches_equal_those_of_the_cpu(numbers, ranks, together, prefetch, device_buffers, labels, cache):
    cupy = sys.modules["cupy"]
    rng = np.random.default_rng(numbers)
    book = a_book(rng, NODES, ranks, False)
    x, y = rng.random((NODES, 5)).astype(np.float32), rng.integers(0, 9, NODES).astype(ml_dtypes.bfloat16)
    seeds = [rng.permutation(NODES)[: rng.integers(0, 40)] for _ in range(ranks)]
    hot = rng.permutation(NODES)

    def work(host):
        part, mine = GraphPart.of(GRAPH, book, host.rank), book.nodes_of(host.rank)
        found = []
        for device in "cpu", 0:
            wire = Wire(host, device_buffers)
            features = DistFeature(part, wire, x[mine], cache=cache, policy=hot, device=device, budget=100)
            of = {"gpu": DistFeature(part, wire, y[mine], device=device), "cpu": DistFeature(part, wire, y[mine])}
            loader = DistNodeLoader(
                DistSampler(part, wire, [4, 3], seed=3), features, y if labels == "whole" else of.get(labels),
                seeds=seeds[host.rank], batch_size=7, together=together, prefetch=prefetch,
                backend="cupy" if device == 0 else "numpy",
            )  # fmt: skip
            assert loader.device == features.device
            found.append([batch for _ in range(2) for batch in loader])
        for ours, expected in zip(found[1], found[0], strict=True):
            arrays = [ours.x, ours.n_id, *(part for adj in ours.adjs for part in (adj.edge_index, adj.e_id))]
            arrays += [] if labels is None else [ours.y]
            assert all(isinstance(array, cupy.ndarray) for array in arrays)
            assert ours.x.tobytes() == expected.x.tobytes() and ours.x.dtype == expected.x.dtype
            if labels is None:
                assert ours.y is None
            else:
                assert (ours.y.dtype, ours.y.tobytes()) == (expected.y.dtype, expected.y.tobytes())
            assert (ours.batch, ours.batch_size) == (expected.batch, expected.batch_size)
            assert ours.n_id.tobytes() == expected.n_id.tobytes()
            for adj, other in zip(ours.adjs, expected.adjs, strict=True):
                assert adj.size == other.size and adj.e_id.tobytes() == other.e_id.tobytes()
                assert adj.edge_index.tobytes() == other.edge_index.tobytes()
        return len(found[1])

    run_ranks(ranks, work)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loop_that_is_left(prefetch):
    """The next epoch is whole: what one on the CPU is spared, one on a GPU is, too."""
    x = np.arange(NODES)

    def work(host):
        features = DistFeature(BOOK, host, x[host.rank :: 3], device=0)
        sampler = DistSampler(GraphPart.of(GRAPH, BOOK, host.rank), host, [3])
        loader = DistNodeLoader(sampler, features, seeds=np.arange(10), batch_size=2, backend="cupy", prefetch=prefetch)
        for _ in loader:
            break
        return [batch.batch for batch in loader]

    assert run_ranks(3, work) == [[(5 + index) * 3 + rank for index in range(5)] for rank in range(3)]


def test_features_and_labels_on_two_gpus():
    book = PartBook.contiguous([0, NODES])
    on = [DistFeature(book, LocalCommunicator(), np.zeros(NODES), device=device) for device in (0, 1)]
    sampler = DistSampler(GraphPart.of(GRAPH, book, 0), LocalCommunicator(), [3])
    with pytest.raises(ArgumentValueError, match="y needs features and labels on one GPU, got cuda:0 and cuda:1"):
        DistNodeLoader(sampler, *on, seeds=[0], batch_size=1)


@pytest.mark.parametrize("mapped", [False, True])
def test_every_call_that_can_fail(cupy, tmp_path, mapped):
    """Each becomes an error of ours, leaves nothing behind, and does not come again."""
    x = np.arange(NODES * 3.0).reshape(NODES, 3)
    x.tofile(tmp_path / "x")
    rows = np.memmap(tmp_path / "x", x.dtype, "r", shape=x.shape) if mapped else x

    def use(held):
        features = DistFeature(PartBook.contiguous([0, NODES]), LocalCommunicator(), rows, device=0, budget=24 * 9)
        return features.take_many([[80, 3, 80], [4], []])

    check_all(cupy, [use], every=False)


@pytest.mark.parametrize("error", [CUDARuntimeError(700), OutOfMemoryError("of it")])
def test_a_gpu_that_fails_in_a_call(cupy, monkeypatch, error):
    """Its rank raises an error of ours, and the others hear of it."""
    x = np.arange(NODES)

    def work(host):
        features = DistFeature(BOOK, host, x[host.rank :: 3], device=0 if host.rank == 1 else "cpu")
        with pytest.raises(Exception) as told:
            if host.rank == 1:

                def fail(*_, **__):
                    raise error

                monkeypatch.setattr(features._on_device._tiers, "take", fail)
            features[np.arange(NODES)]
        return told.value

    first, own, third = run_ranks(3, work)
    assert isinstance(own, DeviceError) and own.__cause__ is error
    assert all("rank 1 gave up: Device" in str(told) for told in (first, third))
