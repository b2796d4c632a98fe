"""Tiers of features and placement of graphs, with the GPU's code run on the host."""

from __future__ import annotations

import logging

import naive
import numpy as np
import pytest
from conftest import random_graph
from host_cuda import HostRuntime

from gglspeedup import CSRGraph, GGLSpeedupError
from gglspeedup.arguments import device_ids
from gglspeedup.placement import place_graph, place_rows

NODES = 150
PLENTY = 1 << 40


@pytest.fixture
def runtime(tmp_path_factory) -> HostRuntime:
    return HostRuntime(tmp_path_factory.getbasetemp())


def place(runtime, rows, budget, order=None, free=PLENTY):
    return place_rows(rows, np.arange(len(rows)) if order is None else order, runtime, budget, free)


@pytest.mark.parametrize("cold", ["pinned", "unpinned", "mapped"])
@pytest.mark.parametrize("hot", [0, 1, 40, NODES])
@pytest.mark.parametrize(("dtype", "width"), [("float32", 8), ("float16", 3), ("bool", None), ("int64", 0)])
def test_every_mix_of_tiers(runtime, tmp_path, cold, hot, dtype, width):
    rng = np.random.default_rng(0)
    shape = (NODES,) if width is None else (NODES, width)
    x = rng.integers(0, 99, shape).astype(dtype)
    if cold == "mapped" and x.size:
        x.tofile(tmp_path / "x")
        x = np.memmap(tmp_path / "x", dtype, "r", shape=shape)
    runtime.refuse_pinning = cold == "unpinned"
    order = rng.permutation(NODES)
    tiers = place(runtime, x, hot * x[:1].nbytes, order)
    if width == 0:
        assert tiers.gather([1, 2, 2]).shape == (3, 0)
        return
    ids = np.concatenate([rng.integers(0, NODES, 200), order[:3], order[-3:]])
    for n_id in (ids, ids[:0], ids[:1]):
        np.testing.assert_array_equal(tiers.gather(n_id), x[n_id])
    in_hot = int(np.isin(np.concatenate([ids, ids[:1]]), order[:hot]).sum())
    second = {"pinned": "pinned", "unpinned": "host", "mapped": "disk"}[cold]
    expected = {"device": in_hot}
    if hot < NODES:
        expected[second] = len(ids) + 1 - in_hot
    assert tiers.rows_served() == expected


def test_pinning_that_fails_says_what_to_raise(runtime, caplog):
    runtime.refuse_pinning = True
    with caplog.at_level(logging.WARNING, "gglspeedup"):
        tiers = place(runtime, np.arange(NODES), 80)
    assert "pinning is refused" in caplog.text
    np.testing.assert_array_equal(tiers.gather([149, 0]), [149, 0])


def test_a_budget_beyond_the_memory(runtime, caplog):
    x = np.arange(NODES * 4, dtype=np.int64).reshape(NODES, 4)
    with caplog.at_level(logging.WARNING, "gglspeedup"):
        tiers = place(runtime, x, 1 << 30, free=3000)
    assert "beyond the free memory" in caplog.text and "1.000 GiB" in caplog.text
    tiers.gather(np.arange(NODES))
    assert 0 < tiers.rows_served()["device"] < NODES
    place(runtime, x, 1 << 30)
    assert caplog.text.count("beyond the free memory") == 1  # a budget beyond the data is nothing to warn of


def test_out_of_memory_takes_fewer_hot_rows(runtime, monkeypatch, caplog):
    empty = runtime.empty

    def refuse(shape, dtype):
        if np.prod(shape) * np.dtype(dtype).itemsize > 600:
            raise MemoryError("out of device memory")
        return empty(shape, dtype)

    monkeypatch.setattr(runtime, "empty", refuse)
    x = np.arange(NODES)
    tiers = place(runtime, x, x.nbytes)
    monkeypatch.undo()
    assert "trying half" in caplog.text
    np.testing.assert_array_equal(tiers.gather(x), x)
    assert tiers.rows_served() == {"device": NODES // 2, "pinned": NODES - NODES // 2}


def test_bad_ids(runtime):
    tiers = place(runtime, np.arange(NODES), 80)
    with pytest.raises(IndexError, match="n_id needs ids from 0 to 149, got 150 at position 1"):
        tiers.gather([0, 150, -1])
    for wrong, builtin in (([0.5], TypeError), ([[1]], ValueError), ([True], TypeError)):
        with pytest.raises(GGLSpeedupError) as caught:
            tiers.gather(wrong)
        assert isinstance(caught.value, builtin)
    assert sum(tiers.rows_served().values()) == 0


def test_one_wait_to_gather_pinned_rows(runtime):
    tiers = place(runtime, np.arange(NODES), 80)
    ids = runtime.to_device(np.arange(100))
    before = runtime.reads
    tiers.gather(ids)
    assert runtime.reads == before + 1


@pytest.mark.parametrize("placement", ["device", "uva", "auto"])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("free", [PLENTY, 4000])
@pytest.mark.parametrize("refuse", [False, True])
def test_graphs_anywhere(runtime, placement, with_ids, free, refuse, monkeypatch, caplog):
    graph = random_graph(np.random.default_rng(1), NODES, 12)
    if with_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=np.arange(graph.num_edges)[::-1])
    if refuse:  # the graph's own arrays cannot be pinned; the copy can
        pinned_view, parts = runtime.pinned_view, {id(part) for part in (graph.indptr, graph.indices, graph.edge_ids)}

        def picky(host):
            runtime.refuse_pinning = id(host) in parts
            return pinned_view(host)

        monkeypatch.setattr(runtime, "pinned_view", picky)
    with caplog.at_level(logging.INFO, "gglspeedup"):
        sampler = place_graph(graph, runtime, placement, free)
    host_memory = placement == "uva" or (placement == "auto" and free == 4000)
    assert ("sampling a pinned copy" in caplog.text) == (refuse and host_memory)
    if placement == "auto":
        assert ("pinned host memory" if host_memory else "GPU memory") in caplog.text
    assert sampler._hashed == (free == 4000)
    in_place = np.shares_memory(np.asarray(sampler._graph.indices), graph.indices)
    assert in_place == (host_memory and not refuse)
    seeds = np.arange(20)
    n_id, hops = sampler.sample(seeds, (3, 2), seed=1, batch=2, replace=False, expand="layer")
    expected = naive.sample(graph.indptr, graph.indices, seeds, [3, 2], seed=1, batch=2, edge_ids=graph.edge_ids)
    np.testing.assert_array_equal(n_id, expected[0])
    for (edge_index, e_id, size), hop in zip(hops, expected[1], strict=True):
        np.testing.assert_array_equal(edge_index, hop[0])
        np.testing.assert_array_equal(e_id, hop[1])
        assert size == hop[2]


def test_a_graph_beyond_the_memory_is_sampled_where_it_is(runtime, monkeypatch, caplog):
    graph = random_graph(np.random.default_rng(1), NODES, 12)
    to_device = runtime.to_device

    def refuse(host):
        if host is graph.indices:
            raise MemoryError("out of device memory")
        return to_device(host)

    monkeypatch.setattr(runtime, "to_device", refuse)
    sampler = place_graph(graph, runtime, "device", PLENTY)
    assert "does not fit into GPU memory" in caplog.text
    assert np.shares_memory(np.asarray(sampler._graph.indices), graph.indices)


def test_ids_of_the_device_are_taken_as_they_are(runtime):
    ids = runtime.to_device(np.arange(5))
    assert device_ids(ids, "n_id", runtime) is ids
    assert device_ids(runtime.to_device(np.arange(5, dtype=np.int16)), "n_id", runtime).dtype == np.int64
    assert runtime.is_device(device_ids([3, 1], "n_id", runtime))
