"""Arrays of GPUs from rank to rank by NCCL, here a stand-in for it; on a GPU, as many ranks as NCCL allows it: one."""

from __future__ import annotations

import sys
import threading

import device_on_host
import ml_dtypes
import numpy as np
import pytest
from device_on_host import DeviceArray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gglspeedup import CSRGraph
from gglspeedup.device import cuda_problem
from gglspeedup.distributed import (
    CommunicatorError,
    DistFeature,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    NcclCommunicator,
    PartBook,
    RankError,
    run_ranks,
)
from gglspeedup.errors import MissingPackageError


@pytest.fixture
def network(monkeypatch):
    for name in ("cupy", "cupy.cuda", "cupy.cuda.nccl"):
        monkeypatch.setitem(sys.modules, name, None)
    return device_on_host.install()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.integers(0, 2**32), ranks=st.integers(1, 4), width=st.sampled_from([None, 0, 1, 5]),
    dtype=st.sampled_from(["float32", "int64", "uint8", "float16", ml_dtypes.bfloat16]),
)  # fmt: skip
def test_rows_come_as_they_do_by_the_host(network, numbers, ranks, width, dtype):
    rng = np.random.default_rng(numbers)
    counts = rng.integers(0, 4, (ranks, ranks))  # of rows from one rank to another; none is common
    shape = () if width is None else (width,)
    rows = [rng.integers(0, 200, (counts[rank].sum(), *shape)).astype(dtype) for rank in range(ranks)]
    network.calls.clear()

    def work(host):
        communicator, rank = NcclCommunicator(host), host.rank
        device = communicator.exchange(DeviceArray(rows[rank]), counts[rank], counts[:, rank])
        assert isinstance(device, DeviceArray)
        return device.host, communicator.exchange(rows[rank], counts[rank], counts[:, rank])

    for by_nccl, by_host in run_ranks(ranks, work):
        assert (by_nccl.dtype, by_nccl.shape) == (by_host.dtype, by_host.shape)
        assert by_nccl.tobytes() == by_host.tobytes()
    size = rows[0].itemsize * int(np.prod(shape))
    pairs = [(a, b, size * int(counts[a, b])) for a in range(ranks) for b in range(ranks) if a != b]
    expected = [("send", a, b, count) for a, b, count in pairs] + [("recv", b, a, count) for a, b, count in pairs]
    assert sorted(network.calls) == sorted(call for call in expected if call[3])
    assert not network.aborted


def test_the_classes_work_with_it(network):
    """All that they send is in the host's memory, and goes by the host."""
    graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    book = PartBook.from_owners([0, 1, 0], 2)

    def work(host):
        communicator = NcclCommunicator(host)
        part = GraphPart.of(graph, book, communicator.rank)
        batch = DistSampler(part, communicator, [2]).sample([communicator.rank])
        features = DistFeature(part, communicator, book.nodes_of(communicator.rank))
        return batch.n_id.tolist(), features[batch.n_id].tolist()

    assert run_ranks(2, work) == [([0, 1, 2], [0, 1, 2]), ([1, 0], [1, 0])]
    assert network.calls == []


def two(work, **options):
    """Run `work(communicator)` on two ranks; each expects a row of the other."""
    return run_ranks(2, lambda host: work(NcclCommunicator(host)), **options)


def swap(communicator):
    return communicator.exchange(DeviceArray(np.zeros(2)), [1, 1], [1, 1])


def test_older_versions_of_cupy(network):
    """Their unique ids are tuples of signed bytes."""
    network.name = (7, -8, 9)
    assert two(lambda communicator: swap(communicator).host.tolist()) == [[0.0, 0.0]] * 2


def test_a_rank_that_does_not_come(network):
    def work(communicator):
        if communicator.rank == 0:
            for _ in range(2):
                with pytest.raises(CommunicatorError, match=r"a rank did not come to a call within 0\.3 s"):
                    swap(communicator)
            with pytest.raises(CommunicatorError, match="did not come"):
                communicator.gather_all(b"x")
        return network.waits

    two(work, timeout=0.3)
    assert network.aborted == {0}


def test_a_rank_that_gives_up(network):
    def work(communicator):
        if communicator.rank == 1:
            communicator.abort("of its own accord")
            return ""
        with pytest.raises(CommunicatorError) as told:
            swap(communicator)
        return str(told.value)

    assert two(work)[0] == "rank 1 gave up: of its own accord"
    assert network.aborted == {0, 1}


def test_a_send_that_fails(network):
    network.refusing = {1}

    def work(communicator):
        with pytest.raises(CommunicatorError) as told:
            swap(communicator)
        assert network._here.group is None  # the group was ended all the same
        return str(told.value)

    other, own = two(work)
    assert own == "NCCL failed in a call (NCCL_ERROR_SYSTEM_ERROR)" and other == f"rank 1 gave up: {own}"


def test_a_connection_that_breaks(network):
    network.broken = {0}

    def work(communicator):
        if communicator.rank == 0:
            with pytest.raises(CommunicatorError, match=r"NCCL_ERROR_REMOTE_ERROR.*another rank has died"):
                swap(communicator)

    two(work)


def test_gpus_that_cannot_be_connected(network):
    network.refusing = {-1}
    with pytest.raises(CommunicatorError, match=r"NCCL could not connect the GPUs.*INVALID_USAGE"):
        two(swap)


def test_nccl_that_one_rank_lacks(network, monkeypatch):
    def work(host):
        with pytest.raises(RankError if host.rank else MissingPackageError, match="CuPy without it"):
            NcclCommunicator(host)

    nccl = sys.modules["cupy.cuda.nccl"]
    answers = {"rank 0": False, "rank 1": True}

    class Nccl:
        @property
        def available(self):
            return answers[threading.current_thread().name]

        def __getattr__(self, name):
            return getattr(nccl, name)

    sys.modules["cupy.cuda"].nccl = Nccl()
    run_ranks(2, work)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingPackageError, match="nvidia-nccl"):
        NcclCommunicator(LocalCommunicator())


@pytest.mark.filterwarnings("ignore:(?s).*nccl library could not be loaded")
@pytest.mark.skipif(bool(cuda_problem(0)), reason=f"no usable GPU: {cuda_problem(0)}")
def test_on_a_gpu():
    """A single rank, as NCCL takes no two on one GPU: its own rows, on a stream of the caller's."""
    import cupy
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("CuPy has no NCCL")
    communicator = NcclCommunicator(LocalCommunicator())
    with cupy.cuda.Stream(non_blocking=True):
        rows = cupy.arange(12, dtype=cupy.float32).reshape(4, 3)
        received = communicator.exchange(rows, [4], [4])
        assert isinstance(received, cupy.ndarray) and bool((received == rows).all())
    assert communicator.exchange(np.arange(3), [3], [3]).tolist() == [0, 1, 2]
