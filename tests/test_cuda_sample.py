"""The sampler's CUDA kernels, run on the host, equal the naive version whatever the order of threads."""

from __future__ import annotations

import threading
from itertools import product

import naive
import numpy as np
import pytest
from conftest import random_graph
from host_cuda import ORDERS, RUNTIMES, CountingRuntime, HostRuntime, to_host
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup import CSRGraph, workspace_gpu
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError
from gglspeedup.kernels import sample_gpu
from gglspeedup.kernels.gather_gpu import address
from gglspeedup.sampler_gpu import CudaSampler

TABLES = ("dense", "hash")


@pytest.fixture(scope="session", params=RUNTIMES)
def new_runtime(request, tmp_path_factory):
    """Makes a runtime: kernels on the host, compiled once a session, in an order; and on the GPU if there is one."""
    folder = tmp_path_factory.getbasetemp()
    return lambda order="forwards": HostRuntime(folder, order) if request.param == "host" else CountingRuntime()


def make(runtime, graph, table="dense", edge_ids=None, wide=False, **options):
    """A sampler of a graph on a runtime."""
    indices = graph.indices.astype(np.int64 if wide else np.int32)
    edge_ids = None if edge_ids is None else runtime.to_device(edge_ids)
    indptr = runtime.to_device(graph.indptr)
    return CudaSampler(runtime, indptr, runtime.to_device(indices), edge_ids, graph.num_nodes, table, **options)


def assert_equal(result, expected):
    n_id, hops = result
    assert n_id.dtype == np.int64
    np.testing.assert_array_equal(to_host(n_id), expected[0])
    assert len(hops) == len(expected[1])
    for (edge_index, e_id, size), (edge_index_, e_id_, size_) in zip(hops, expected[1], strict=True):
        assert edge_index.dtype == e_id.dtype == np.int64
        np.testing.assert_array_equal(to_host(edge_index), edge_index_)
        np.testing.assert_array_equal(to_host(e_id), e_id_)
        assert size == size_


def check(sampler, graph, seeds, sizes, *, edge_ids=None, seed=0, batch=0, replace=False, expand="layer"):
    """Sample and compare; the host must wait once."""
    options = {"seed": seed, "batch": batch, "replace": replace, "expand": expand}
    reads = sampler.runtime.reads
    result = sampler.sample(np.asarray(seeds, np.int64), sizes, **options)
    assert sampler.runtime.reads == reads + 1
    seeds = [int(v) for v in seeds]
    assert_equal(result, naive.sample(graph.indptr, graph.indices, seeds, sizes, edge_ids=edge_ids, **options))


@pytest.mark.parametrize("fanout", [1, 2, 3, 5, 7, 8, 9, 10, 15, 16, 17, 25, 31, 32, 33, 40, 64, 100, 129, 1024, -1])
def test_fanouts(new_runtime, fanout):
    rng = np.random.default_rng(fanout + 1)
    graph = random_graph(rng, 90, max(4, 2 * fanout) if fanout < 100 else 40, hub=3000)
    seeds = rng.permutation(graph.num_nodes)[:17]
    if 0 not in seeds:
        seeds[0] = 0  # the hub
    sampler = make(new_runtime(), graph)
    for replace, expand in product((False, True), ("layer", "frontier")):
        check(sampler, graph, seeds, [fanout, 3], replace=replace, expand=expand, seed=9)


@pytest.mark.parametrize("fanout", [4, 8, 16, 32, 48, 300])
def test_rows_a_little_longer_than_the_fanout(new_runtime, fanout):
    # Here nearly every draw is replaced, and chains of replacements are long.
    degrees = np.arange(fanout - 1, fanout + 6).repeat(6)
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    graph = CSRGraph(indptr, np.random.default_rng(0).integers(0, len(degrees), indptr[-1]))
    sampler = make(new_runtime(), graph)
    for batch in range(4):
        check(sampler, graph, np.arange(len(degrees)), [fanout], batch=batch)


@pytest.mark.parametrize(("order", "table", "wide"), list(product(ORDERS, TABLES, (False, True))))
def test_the_order_of_threads_does_not_matter(new_runtime, order, table, wide):
    rng = np.random.default_rng(4)
    graph = random_graph(rng, 400, 60, hub=5000)
    edge_ids = rng.permutation(graph.num_edges) + (1 << 40)
    sampler = make(new_runtime(order), graph, table, edge_ids, wide)
    for batch, sizes in enumerate(([5, 4], [15, 10], [40, -1], [-1, 2])):
        seeds = rng.permutation(graph.num_nodes)[: 5 + 20 * batch]
        check(sampler, graph, seeds, sizes, edge_ids=edge_ids, batch=batch, seed=(1 << 64) - 3)
        check(sampler, graph, seeds, sizes, edge_ids=edge_ids, batch=(1 << 48) - 1 - batch, replace=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rng_seed=st.integers(0, 1 << 30))
def test_random_graphs(new_runtime, data, rng_seed):
    rng = np.random.default_rng(rng_seed)
    graph = random_graph(rng, data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0, 1, 3, 12, 50])))
    seeds = rng.permutation(graph.num_nodes)[: data.draw(st.integers(0, graph.num_nodes))]
    fanouts = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 10, 17, 32, 33, 100])
    sampler = make(
        new_runtime(data.draw(st.sampled_from(list(ORDERS)))), graph, data.draw(st.sampled_from(TABLES)),
        wide=data.draw(st.booleans()),
    )  # fmt: skip
    check(
        sampler, graph, seeds, data.draw(st.lists(fanouts, min_size=1, max_size=4)), seed=rng_seed,
        batch=data.draw(st.integers(0, (1 << 48) - 1)), replace=data.draw(st.booleans()),
        expand=data.draw(st.sampled_from(["layer", "frontier"])),
    )  # fmt: skip


def test_few_blocks_walk_many_tiles(new_runtime, monkeypatch):
    monkeypatch.setattr(sample_gpu, "MAX_BLOCKS", 2)
    rng = np.random.default_rng(2)
    graph = random_graph(rng, 1500, 9)
    sampler = make(new_runtime(), graph)
    for sizes in ([3, 3], [9], [-1, -1], [40]):
        check(sampler, graph, rng.permutation(graph.num_nodes)[:900], sizes)


def test_more_tiles_than_the_scan_has_threads(new_runtime):
    graph = CSRGraph(np.arange(0, 2 * 300_001, 2), np.random.default_rng(1).integers(0, 300_000, 600_000))
    runtime = new_runtime()
    sampler = make(runtime, graph)
    seeds = np.arange(300_000)[::-1].copy()  # 1172 tiles of rows
    n_id, [(edge_index, e_id, size)] = sampler.sample(seeds, [2], seed=0, batch=0)
    n_id, edge_index, e_id = to_host(n_id), to_host(edge_index), to_host(e_id)
    np.testing.assert_array_equal(n_id, seeds)
    np.testing.assert_array_equal(edge_index[0], graph.num_nodes - 1 - graph.indices[e_id])
    np.testing.assert_array_equal(edge_index[1], np.arange(300_000).repeat(2))
    np.testing.assert_array_equal(e_id.reshape(-1, 2)[::-1].ravel(), np.arange(600_000))
    assert size == (300_000, 300_000)


def test_no_seeds_and_no_edges(new_runtime):
    for graph in (CSRGraph([0, 0, 0], []), CSRGraph([0], []), CSRGraph([0, 2], [0, 0])):
        for table in TABLES:
            sampler = make(new_runtime(), graph, table)
            for seeds in ([], range(graph.num_nodes)):
                check(sampler, graph, seeds, [2, -1, 40])


class Offset:
    """An array as it looks to somebody who counts its cells from `base`."""

    def __init__(self, array, base):
        self.array, self.base = array, base

    def __getitem__(self, index):
        return self.array[index - self.base]


def test_node_ids_beyond_32_bits(new_runtime):
    # All nodes below `base` are left out of memory: the kernels get an address that many cells before the array's.
    base = (1 << 40) - 50
    graph = random_graph(np.random.default_rng(3), 50, 40)
    runtime = new_runtime()
    here = runtime.to_device(graph.indptr)
    indices = graph.indices.astype(np.int64) + base
    indptr = np.uint64((address(here) - 8 * base) % (1 << 64))
    sampler = CudaSampler(runtime, indptr, runtime.to_device(indices), None, base + 50, "hash", max_degree=40)
    for batch, replace in enumerate((False, True)):
        seeds = np.array([3, 7, 1, 49]) + base
        expected = naive.sample(
            Offset(graph.indptr, base), indices, [int(v) for v in seeds], [4, 33], batch=batch, replace=replace
        )
        assert_equal(sampler.sample(seeds, [4, 33], seed=0, batch=batch, replace=replace), expected)


@pytest.mark.parametrize("table", TABLES)
def test_workspaces_and_graphs_are_used_again(new_runtime, table):
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    runtime = new_runtime()
    sampler = make(runtime, graph, table)
    for batch in range(12):  # batches of many sizes: buffers grow, graphs are dropped and recorded again
        count = int(rng.integers(0, 80))
        check(sampler, graph, rng.permutation(300)[:count], [[4, 3], [10], [40, 2]][batch % 3], batch=batch)
    assert len(sampler._workspaces.free) == 1


def test_replayed_graphs_equal_launches(new_runtime, monkeypatch):
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    runtime = new_runtime()
    captures = []
    capture = runtime.capture
    monkeypatch.setattr(runtime, "capture", lambda enqueue: captures.append(1) or capture(enqueue))
    sampler = make(runtime, graph)
    for batch in range(5):
        check(sampler, graph, rng.permutation(300)[: 40 + batch], [4, 3], batch=batch)
    assert len(captures) == 1
    for batch in range(5):
        check(sampler, graph, rng.permutation(300)[:40], [4, 3], batch=batch, expand="frontier", seed=batch)
    check(sampler, graph, rng.permutation(300)[:40], [4, 3])
    assert len(captures) == 2
    check(make(runtime, graph, capture=False), graph, [1, 2], [4, 3])
    assert len(captures) == 2


def test_a_batch_has_few_launches(new_runtime):
    graph = random_graph(np.random.default_rng(8), 300, 25)
    runtime = new_runtime()
    sampler = make(runtime, graph, capture=False)
    check(sampler, graph, range(40), [15, 10, 5])
    runtime.launches.clear()
    check(sampler, graph, range(40), [15, 10, 5])
    assert len(runtime.launches) == 2 + 3 * 6 + 3 + 1


@pytest.mark.parametrize("table", TABLES)
def test_a_graph_in_pinned_memory(new_runtime, table):
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    edge_ids = rng.permutation(graph.num_edges)
    runtime = new_runtime()
    parts = [np.array(part) for part in (graph.indptr, graph.indices.astype(np.int32), edge_ids)]
    views = [runtime.pinned_view(part) for part in parts]
    sampler = CudaSampler(runtime, *(view.array for view in views), graph.num_nodes, table)
    for batch, sizes in enumerate(([5, 4], [40, -1])):
        check(sampler, graph, rng.permutation(300)[:20], sizes, edge_ids=edge_ids, batch=batch)


def test_few_graphs_are_kept(new_runtime):
    graph = random_graph(np.random.default_rng(8), 50, 5)
    sampler = make(new_runtime(), graph)
    check(sampler, graph, range(50), [5, 5, 5])
    for _ in range(2):
        for fanout in range(1, 15):
            check(sampler, graph, [1, 2, 3], [fanout])
    assert len(sampler._workspaces.free[0].graphs) <= 8


def test_the_table_starts_anew_when_stamps_run_out(new_runtime, monkeypatch):
    monkeypatch.setattr(workspace_gpu, "_FIRST_STAMP", 3)
    graph = random_graph(np.random.default_rng(5), 60, 8)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    stamps = []
    for batch in range(11):
        check(sampler, graph, [5, 9, batch + 10], [3, 2], batch=batch)
        stamps.append(sampler._workspaces.free[0].stamp)
    assert stamps == [3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1]
    assert runtime.launches.count("fill_ones") == 3


def test_seeds_on_the_device(new_runtime):
    graph = random_graph(np.random.default_rng(5), 60, 8)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    for batch, seeds in enumerate(([4, 2, 59], [7], [])):
        result = sampler.sample(runtime.to_device(np.array(seeds, np.int64)), [3, 2], seed=1, batch=batch)
        assert_equal(result, naive.sample(graph.indptr, graph.indices, seeds, [3, 2], seed=1, batch=batch))
    assert runtime.reads == 3


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("on_device", [False, True])
def test_bad_seeds(new_runtime, table, on_device):
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 600, 8)
    runtime = new_runtime("random")
    sampler = make(runtime, graph, table)
    good = rng.permutation(600)[:400]
    cases = [
        ({300: 600, 350: -1, 20: 5, 30: 5}, ArgumentIndexError, "from 0 to 599, got 600 at position 300"),
        ({77: -(1 << 62)}, ArgumentIndexError, f"got {-(1 << 62)} at position 77"),
        ({399: (1 << 63) - 1}, ArgumentIndexError, "at position 399"),
        ({280: int(good[3]), 399: int(good[3])}, ArgumentValueError, f"got {good[3]} again at position 280"),
        ({1: int(good[0])}, ArgumentValueError, f"got {good[0]} again at position 1;"),
    ]
    for changes, error, message in cases:
        seeds = good.copy()
        seeds[list(changes)] = list(changes.values())
        for limit in (1 << 26, 10):  # also where the hops are read one by one
            sampler.max_edges = limit
            with pytest.raises(error, match=message):
                sampler.sample(runtime.to_device(seeds) if on_device else seeds, [3, -1], seed=0, batch=0)
        sampler.max_edges = 1 << 26
        check(sampler, graph, good, [3, -1])


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("expand", ["layer", "frontier"])
def test_hops_beyond_the_limit_cost_a_read_each(new_runtime, table, expand):
    rng = np.random.default_rng(6)
    graph = random_graph(rng, 500, 12, hub=900)
    runtime = new_runtime()
    for limit, sizes, reads in ((100, [3, -1, 2], 3), (0, [-1, 4, 40], 4), (40, [2, 2], 2), (6000, [-1, -1, 3], 1)):
        sampler = make(runtime, graph, table, max_edges=limit)
        for batch in range(3):
            seeds = rng.permutation(500)[:13]
            before = runtime.reads
            result = sampler.sample(seeds, sizes, seed=2, batch=batch, expand=expand)
            assert runtime.reads - before == reads
            expected = naive.sample(graph.indptr, graph.indices, seeds, sizes, seed=2, batch=batch, expand=expand)
            assert_equal(result, expected)


def test_too_many_edges(new_runtime, monkeypatch):
    monkeypatch.setattr(workspace_gpu, "_MAX_POSITIONS", 1000)
    graph = random_graph(np.random.default_rng(5), 600, 8)
    sampler = make(new_runtime(), graph)
    with pytest.raises(ArgumentValueError, match="sizes needs a batch of at most 1000 seeds and edges, got up to"):
        sampler.sample(np.arange(600), [5, 5], seed=0, batch=0)
    check(sampler, graph, [1, 2], [5])


def test_max_degree_makes_buffers_smaller(new_runtime):
    graph = random_graph(np.random.default_rng(5), 600, 8)
    sampler = make(new_runtime(), graph, max_degree=int(graph.degree().max()))
    check(sampler, graph, [1, 2, 3], [-1])
    assert len(sampler._workspaces.free[0].arrays["position"]) <= 4 * 8


def test_two_threads(new_runtime):
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 300, 20)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    batches = [(b, rng.permutation(300)[: 10 + 5 * b].tolist()) for b in range(8)]
    expected = [naive.sample(graph.indptr, graph.indices, seeds, [5, 4], batch=b) for b, seeds in batches]
    failures = []
    meet = threading.Barrier(2)

    def work(order):
        try:
            meet.wait()
            for _ in range(2):
                for i in order:
                    b, seeds = batches[i]
                    assert_equal(sampler.sample(np.array(seeds), [5, 4], seed=0, batch=b), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(order,)) for order in (range(8), range(7, -1, -1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert 1 <= len(sampler._workspaces.free) <= 2


def test_an_unknown_error_drops_the_workspace(new_runtime, monkeypatch):
    graph = random_graph(np.random.default_rng(5), 60, 8)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    check(sampler, graph, [1, 2], [5])
    monkeypatch.setattr(runtime, "settle", lambda *_: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        sampler.sample(np.array([1, 2]), [5], seed=0, batch=0)
    monkeypatch.undo()
    assert not sampler._workspaces.free
    check(sampler, graph, [1, 2], [5])


def test_wrong_options(new_runtime):
    runtime = new_runtime()
    indptr, indices = runtime.zeros(2, np.int64), runtime.zeros(0, np.int32)
    with pytest.raises(ArgumentValueError, match="table needs"):
        CudaSampler(runtime, indptr, indices, None, 1, "heap")
    with pytest.raises(ArgumentValueError, match="indices needs int64"):
        CudaSampler(runtime, indptr, indices, None, (1 << 31) + 1)
