"""A memory limit while a model is trained: the loss curve stays, and the process stays below the limit."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import missing, random_graph

from gglspeedup import MemoryBudget, NodeLoader, memory_meter
from gglspeedup.device import Device
from gglspeedup.memory import BufferPool
from gglspeedup.memory_meter import DeviceMeter, ProcessMeter, meter_for
from gglspeedup.memory_model import BatchLoad, MemoryModel
from gglspeedup.memory_watch import MemoryWatch

MIB = 1 << 20

# --- measuring -------------------------------------------------------------------------------------------------------


def test_meters_share_the_peak_of_the_process():
    if not memory_meter._resets_peak():
        pytest.skip("the system does not set back a peak")
    outer, inner = ProcessMeter(), ProcessMeter()
    start = outer.start(tidy=True)
    block = np.ones(100 * MIB, np.uint8)
    del block
    again = inner.start(tidy=True)
    assert inner.peak() - again < 16 * MIB
    assert 90 * MIB < outer.peak() - start < 140 * MIB
    outer.start(tidy=True)
    assert outer.peak() - start < 16 * MIB


def test_the_peak_of_the_process_is_measured():
    meter = meter_for(Device(None), "numpy")
    assert isinstance(meter, ProcessMeter)
    start = meter.start(tidy=True)
    assert meter.peak() - start < 8 * MIB and abs(meter.in_use() - start) < 8 * MIB
    block = np.ones(64 * MIB, np.uint8)
    del block
    risen = meter.peak() - start
    assert 60 * MIB < risen < 80 * MIB
    if meter.tidies:
        assert meter.start(tidy=True) - start < 16 * MIB and meter.peak() - start < 16 * MIB


def test_a_system_that_does_not_set_its_peak_back(monkeypatch):
    monkeypatch.setattr(memory_meter, "_resets_peak", lambda: False)
    meter = ProcessMeter()
    assert not meter.tidies
    start = meter.start(tidy=True)
    assert start == meter.peak() >= 30 * MIB


def test_unknown_systems_are_told_of(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="memory_limit needs Linux or macOS"):
        meter_for(Device(None), "numpy")


def test_buffers_that_nothing_uses_are_freed():
    pool = BufferPool()
    first, second = pool.empty((MIB,), np.uint8), pool.empty((2 * MIB,), np.uint8)
    del first
    memory_meter.release_buffers()
    assert not pool._free and not pool._returned
    assert second.size == 2 * MIB


def test_a_gpu_is_measured_by_its_framework(monkeypatch):
    """Stand-ins for an adapter and for CuPy: what both have handed out counts."""
    told = {"now": 5, "peak": 9, "restarts": []}
    adapter = types.SimpleNamespace(
        bytes_in_use=lambda index: told["now"], peak_bytes=lambda index: told["peak"],
        restart_peak=lambda index: told["restarts"].append(index),
    )  # fmt: skip
    monkeypatch.setattr(memory_meter, "import_module", lambda name: types.SimpleNamespace(backend=lambda name: adapter))
    monkeypatch.setattr(memory_meter, "_pool_bytes", lambda index: 100)
    meter = meter_for(Device(1), "torch")
    assert isinstance(meter, DeviceMeter) and meter.tidies
    assert (meter.in_use(), meter.start(tidy=True), meter.peak(), told["restarts"]) == (105, 105, 109, [1])


def test_frameworks_that_measure_have_all_that_it_takes():
    """Whoever has one of the functions has the three of them, with these names."""
    for path in (Path(memory_meter.__file__).parents[1] / "adapters").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert (path.stem in ("torch", "tensorflow", "paddle", "tensorlayerx")) == ("def peak_bytes(index" in text)
        assert ("def peak_bytes(index" in text) == ("def restart_peak(index" in text) == ("def bytes_in_use(" in text)


class KeepingMeter:
    """Stands for an allocator that keeps what was freed until it is told not to."""

    def __init__(self, tidies: bool = True) -> None:
        self.tidies = tidies
        self.chance = 0
        self.kept = self.most = 1000

    def in_use(self) -> int:
        return self.kept

    def start(self, tidy: bool) -> int:
        self.kept = 1000 if tidy and self.tidies else self.kept
        self.most = self.kept
        return self.kept

    def peak(self) -> int:
        return self.most

    def train(self, nodes: int) -> None:
        self.kept = self.most = max(self.most, 1000 + 10 * nodes)


@pytest.mark.parametrize("tidies", [True, False])
def test_memory_that_an_allocator_keeps_is_told_from_what_a_batch_takes(tidies):
    budget, meter = MemoryBudget(10**6), KeepingMeter(tidies)
    budget.prepare(1, 1000)
    watch = MemoryWatch(budget, meter)
    for nodes in (20, 40, 60, 80, 100, 300, *range(10, 300)):
        watch.hand_out(BatchLoad((nodes, 1), (2 * nodes,), (4.0, 1.0), 0, 0), 0.0)
        meter.train(nodes)
    watch.end()
    assert budget.stats()["measured"] == 296
    for nodes in (50, 200):
        load = BatchLoad((nodes, 1), (2 * nodes,), (4.0, 1.0), 0, 0)
        assert budget.judge(load, meter.in_use).expected == pytest.approx(1000 + 10 * nodes, rel=0.05)
        assert watch.kept(load) >= 3900


# --- training --------------------------------------------------------------------------------------------------------


def training(limit, epochs=4):
    """The losses of all steps of a GraphSAGE of PyG in float64, and the loader."""
    try:
        import torch

        from demo.sage_torch import SAGEConv
    except ImportError:
        missing("torch-geometric")
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 2000, 14, hub=500)
    x, y = rng.standard_normal((2000, 16)), rng.integers(0, 5, 2000)
    loader = NodeLoader(
        graph, x, y, seeds=np.arange(600), sizes=[6, 4], batch_size=100, device="cpu", backend="torch",
        memory_limit=limit,
    )  # fmt: skip
    torch.manual_seed(0)
    first, second = SAGEConv(16, 32).double(), SAGEConv(32, 5).double()
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], 0.01)
    losses, loss_of_step = [], 0.0
    for _ in range(epochs):
        for batch in loader:
            outer, inner = batch.adjs
            hidden = first((batch.x, batch.x[: outer.size[1]]), outer.edge_index).relu()
            scores = second((hidden, hidden[: inner.size[1]]), inner.edge_index)
            loss = torch.nn.functional.cross_entropy(scores, batch.y) * batch.share
            loss.backward()
            loss_of_step += float(loss.detach())
            if batch.last:
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss_of_step)
                loss_of_step = 0.0
    return losses, loader


@pytest.mark.slow
def test_splitting_keeps_the_loss_curve():
    model, rng = MemoryModel(2), np.random.default_rng(1)
    for _ in range(40):
        nodes, edges = rng.integers(1, 3000, 3).tolist(), tuple(rng.integers(1, 3000, 2).tolist())
        model.observe(BatchLoad(tuple(nodes), edges, (128.0, 1.0, 1.0), 0, 0), (1 << 34) + (nodes[0] << 24))
    budget = MemoryBudget((1 << 34) + (400 << 24), model=model, learn=False)
    plain, _ = training(None)
    split, loader = training(budget)
    assert loader.memory_budget.stats()["split"] == 24 == len(plain) == len(split)
    assert loader.memory_budget.stats()["parts"] > 60
    assert plain[-1] < 0.95 * plain[0], "it learns"
    np.testing.assert_allclose(split, plain, rtol=1e-5)


LIMITED = """
import json, sys
import numpy as np
import torch
from gglspeedup import CSRGraph, MemoryBudget, NodeLoader, set_num_threads
torch.set_num_threads(1)
set_num_threads(1)
limit, batches = (json.loads(text) for text in sys.argv[1:])
rng = np.random.default_rng(0)
degree = rng.integers(1, 30, 60000)
indptr = np.concatenate([[0], np.cumsum(degree)])
graph = CSRGraph(indptr, rng.integers(0, 60000, indptr[-1]))
x, y = rng.random((60000, 64), dtype=np.float32), rng.integers(0, 5, 60000)
budget = MemoryBudget(limit or "1T")
loader = NodeLoader(graph, x, y, seeds=np.arange(60000), sizes=[10, 10], batch_size=512, device="cpu", backend="torch",
                    memory_limit=budget)
layers = torch.nn.Linear(64, 512), torch.nn.Linear(512, 5)
optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], 0.01)
steps = 0
for batch in loader:
    x = layers[0](batch.x).relu()
    for adj in batch.adjs:
        x = torch.zeros(adj.size[1], 512).index_add(0, adj.col, x[adj.row])
    loss = torch.nn.functional.cross_entropy(layers[1](x / 100), batch.y)
    (loss * batch.share).backward()
    if batch.last:
        optimizer.step()
        optimizer.zero_grad()
    steps += 1
    if steps == batches:
        break
print(json.dumps(budget.stats()))
"""


def limited(limit: int, batches: int) -> dict:
    if not ProcessMeter().tidies:
        pytest.skip("memory is measured less finely here")
    command = [sys.executable, "-c", LIMITED, json.dumps(limit), json.dumps(batches)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_process_stays_below_its_limit():
    """At 70 % of the peak that it has without one, from the first batch on."""
    free = limited(0, 15)
    assert free["split"] <= 8
    limit = int(0.7 * free["peak"])
    kept = limited(limit, 80)
    assert kept["over"] == 0 and kept["peak"] <= limit and kept["measured"] == 80 and kept["split"] > 0
    assert kept["error"] < 0.08  # most of these are the first ones
