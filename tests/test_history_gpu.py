"""HistoryStore of a GPU: its kernels run on the host, its stream is a stand-in; on a GPU, the same on the device."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from host_cuda import HostRuntime
from hypothesis import settings
from test_history import DIMS, NODES, Interleavings
from test_visits import needs_numba_cuda

from gglspeedup import HistoryStore
from gglspeedup.device import Device, cuda_problem
from gglspeedup.history import place, store
from gglspeedup.history.tables_gpu import CudaTable, StagedTable
from gglspeedup.kernels.history import stamp_of


class Side:
    """What a side stream does to an observer on one host: nothing but order, which is that of the calls."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.handed_over = 0

    def mark(self) -> Any:
        return types.SimpleNamespace(done=True)

    record = mark

    @contextlib.contextmanager
    def filling(self, after: Any = None) -> Any:
        assert after is not None  # what the caller has enqueued comes first
        yield

    def current(self) -> int:
        return 0

    def hand_over(self, event: Any, reader: int) -> None:
        self.handed_over += 1

    def synchronize(self) -> None:
        pass


def stamp_rows(n_id, number, stamps, positions, stream) -> None:
    """The kernels, said again: backwards, as the order must not matter."""
    for i in reversed(range(len(n_id))):
        stamps[n_id[i]] = max(stamps[n_id[i]], stamp_of(number, i))
    for i in range(len(n_id)):
        positions[i] = n_id[i] if stamps[n_id[i]] == stamp_of(number, i) else -1


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def on_host(kernels):
    """Device 0 is there, and runs on the host."""
    runtime = HostRuntime(kernels, "random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "parse_device", lambda device: Device(None if device == "cpu" else 0))
        patch.setattr(store, "free_bytes", lambda device: 1 << 30)
        patch.setattr(place, "runtime_of", lambda device: runtime)
        patch.setattr(place, "SideStream", Side)
        stand_in = types.ModuleType("gglspeedup.kernels.history_gpu")
        stand_in.stamp_rows = stamp_rows  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "gglspeedup.kernels.history_gpu", stand_in)
        yield runtime


class OnDevice(Interleavings):
    """The interleavings of the CPU, on device 0."""

    device = 0


OnDevice.TestCase.settings = settings(deadline=None, max_examples=40, stateful_step_count=25)


@pytest.mark.usefixtures("on_host")
class TestOnHost(OnDevice.TestCase):  # type: ignore[misc]
    pass


@pytest.mark.skipif(bool(cuda_problem(0)), reason=f"no usable GPU: {cuda_problem(0)}")
class TestOnGpu(OnDevice.TestCase):  # type: ignore[misc]
    pass


@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_rows_lie_where_they_were_asked_to(on_host, storage):
    made = HistoryStore(NODES, DIMS, 0, storage=storage)
    made[0].push(np.ones((1, 3)), [2])
    pulled = made[0].pull(on_host.to_device(np.array([2, 3])))
    assert on_host.is_device(pulled) and pulled.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert made._lane._side.handed_over == 1  # pulls wait for the stream, pushes do not
    assert HistoryStore(NODES, DIMS, 0).storage == "device"


def test_copies_over_the_bus_leave_the_device_to_others(on_host, monkeypatch):
    nodes, grids = 40_000, {}
    launch = on_host.launch

    def noting(kernel, grid, block, arguments):
        grids[kernel.name] = max(grid, grids.get(kernel.name, 0))
        launch(kernel, grid, block, arguments)

    monkeypatch.setattr(on_host, "launch", noting)
    for storage, most in ("pinned", 32), ("device", -(-nodes * 8 // 1024)):
        grids.clear()
        made = HistoryStore(nodes, [32], 0, storage=storage)
        values = np.arange(nodes * 32, dtype=np.float32).reshape(nodes, 32)
        made[0].push(values, np.arange(nodes)[::-1])
        np.testing.assert_array_equal(made[0].pull(np.arange(nodes)), values[::-1])
        assert {grids["gather_rows_16"], grids["scatter_rows_16"]} == {most}


def test_the_cpu_gathers_where_it_is_told_to(on_host, caplog):
    in_place = HistoryStore(NODES, DIMS, 0, storage="pinned")
    staged = HistoryStore(NODES, DIMS, 0, storage="pinned", host_gather=True)
    assert [type(made[0]._table) for made in (in_place, staged)] == [CudaTable, StagedTable]
    for made in (in_place, staged, pickle.loads(pickle.dumps(staged))):
        made[0].push(np.ones((2, 3)), on_host.to_device(np.array([2, 5])))
        pulled = made[0].pull([5, 4])
        assert on_host.is_device(pulled) and pulled.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert not caplog.records
    with pytest.raises(TypeError, match="host_gather needs True or False"):
        HistoryStore(NODES, DIMS, 0, host_gather="pinned")


@pytest.mark.parametrize("host_gather", [False, True])
def test_shared_tables_of_a_gpu(on_host, host_gather):
    made = HistoryStore(NODES, DIMS, 0, shared=True, host_gather=host_gather)
    twin = pickle.loads(pickle.dumps(made))
    assert made.storage == twin.storage == "pinned"
    made[0].push(np.ones((2, 3)), [2, 5])
    made.synchronize()
    twin[0].push(np.full((1, 3), 7), [5])
    twin.synchronize()
    for store_ in (made, twin):
        assert store_[0].pull([2, 5, 0]).tolist() == [[1, 1, 1], [7, 7, 7], [0, 0, 0]]
        assert store_.age([2, 5, 0]).tolist() == [1, 0, -1] and store_[0].pushes == 2
    with pytest.raises(ValueError, match='storage needs "pinned" for shared histories'):
        HistoryStore(NODES, DIMS, 0, shared=True, storage="device")


def test_memory_that_runs_out_is_replaced_by_the_next_tier(on_host, monkeypatch, caplog):
    zeros = on_host.zeros

    def full(shape, dtype):
        if len(shape if isinstance(shape, tuple) else ()) == 2:
            raise MemoryError("of the GPU")
        return zeros(shape, dtype)

    monkeypatch.setattr(on_host, "zeros", full)
    pinned = HistoryStore(NODES, DIMS, 0, storage="device")
    monkeypatch.setattr(on_host, "refuse_pinning", True)
    staged = HistoryStore(NODES, DIMS, 0, storage="device")
    assert "do not fit into GPU memory" in caplog.text and "written by the CPU" in caplog.text
    for made in (pinned, staged):
        made[1].push(np.ones((2, 1)), offset=[4], count=[2])
        pulled = made[1].pull([5, 6])
        assert on_host.is_device(pulled) and pulled.tolist() == [[1], [0]]
        assert made.age([4, 6], table=1).tolist() == [0, -1]


def test_what_jobs_read_lives_as_long_as_they_run(on_host):
    made = HistoryStore(NODES, DIMS, 0)
    made._lane._side.record = lambda: types.SimpleNamespace(done=False)
    for _ in range(3):
        made[0].push(np.ones((1, 3)), [2])
    assert len(made._lane._running) == 3
    made.synchronize()
    assert not made._lane._running


SIMULATED = """
import numpy as np
from gglspeedup.kernels import history_cpu, history_gpu
rng = np.random.default_rng(0)
expected, got = np.zeros(90, np.int64), np.zeros(90, np.int64)
for number, size in enumerate((1, 255, 300, 7), start=1):
    n_id = rng.integers(0, 90, size)
    history_cpu.stamp_rows(n_id, number, expected)
    positions = np.full(size, -5)
    history_gpu._stamp_each[-(-size // 256), 256](n_id, number, got)
    history_gpu._keep_last[-(-size // 256), 256](n_id, number, got, positions)
    last = {node: i for i, node in enumerate(n_id.tolist())}
    assert positions.tolist() == [node if last[node] == i else -1 for i, node in enumerate(n_id.tolist())]
assert np.array_equal(got, expected) and got.any()
print("passed")
"""


def test_simulator_equals_cpu():
    needs_numba_cuda()
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-c", SIMULATED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split() == ["passed"], result.stderr[-2000:]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_compiles_for(capability):
    needs_numba_cuda()
    from numba import cuda, types

    from gglspeedup.kernels.history_gpu import keep_last, stamp_each

    ids = types.int64[::1]
    signatures = {stamp_each: (ids, types.int64, ids), keep_last: (ids, types.int64, ids, ids)}
    for kernel, arguments in signatures.items():
        code, _returns = cuda.compile(kernel, types.void(*arguments), cc=capability, device=False, abi="numba")
        assert f".target sm_{capability[0]}{capability[1]}" in code and ".entry" in code
