"""Several batches in the launches of one: the CUDA kernels, run on the host, equal the naive version of each."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import naive
import numpy as np
import pytest
from conftest import random_graph
from host_cuda import ORDERS, HostRuntime, to_host
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_sample import TABLES, assert_equal, make, new_runtime  # noqa: F401

from gglspeedup import CSRGraph, batches_gpu
from gglspeedup.device import parse_device
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError
from gglspeedup.kernels import sample_gpu
from gglspeedup.kernels.gather_gpu import address
from gglspeedup.placement import place_shards
from gglspeedup.sharded_graph import ShardedGraph


def sample_many(sampler, batches, sizes, **options):
    return list(sampler.sample_each(batches, sizes, at_once=max(1, len(batches)), **options))


def check(sampler, graph, batches, sizes, *, edge_ids=None, seed=0, replace=False, expand="layer", reads=1):
    """Sample several batches and compare each; the host must wait as often as said."""
    before = sampler.runtime.reads
    given = [(np.asarray(seeds, np.int64), number) for seeds, number in batches]
    options = {"seed": seed, "replace": replace, "expand": expand}
    results = sample_many(sampler, given, sizes, **options)
    assert sampler.runtime.reads == before + reads and len(results) == len(batches)
    for result, (seeds, number) in zip(results, given, strict=True):
        expected = naive.sample(
            graph.indptr, graph.indices, seeds.tolist(), sizes, batch=number, edge_ids=edge_ids, **options
        )
        assert_equal(result, expected)


def some_batches(rng, nodes, counts):
    return [(rng.permutation(nodes)[:count], int(rng.integers(1 << 48))) for count in counts]


@pytest.mark.parametrize("fanout", [1, 8, 9, 17, 33, 129, -1])
def test_fanouts(new_runtime, fanout):  # noqa: F811
    rng = np.random.default_rng(fanout + 1)
    graph = random_graph(rng, 90, 40, hub=1000)
    sampler = make(new_runtime(), graph)
    for replace, expand in product((False, True), ("layer", "frontier")):
        batches = some_batches(rng, 90, (9, 1, 7, 12))
        check(sampler, graph, batches, [fanout, 3], replace=replace, expand=expand, seed=(1 << 64) - 5)


@pytest.mark.parametrize(
    ("order", "wide"),
    [*((order, False) for order in ORDERS), pytest.param("random", True, marks=pytest.mark.slow)],
)
def test_the_order_of_threads_does_not_matter(new_runtime, order, wide):  # noqa: F811
    rng = np.random.default_rng(4)
    graph = random_graph(rng, 400, 60, hub=2000)
    edge_ids = rng.permutation(graph.num_edges) + (1 << 40)
    sampler = make(new_runtime(order), graph, "dense", edge_ids, wide)
    for sizes in ([5, 4], [15, 10], [-1, 2]):
        check(sampler, graph, some_batches(rng, 400, (20, 31, 5)), sizes, edge_ids=edge_ids)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rng_seed=st.integers(0, 1 << 30))
def test_random_graphs(new_runtime, data, rng_seed):  # noqa: F811
    rng = np.random.default_rng(rng_seed)
    graph = random_graph(rng, data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0, 1, 3, 12, 50])))
    counts = data.draw(st.lists(st.integers(0, graph.num_nodes), min_size=2, max_size=5))
    fanouts = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 10, 17, 33])
    sampler = make(new_runtime(data.draw(st.sampled_from(["forwards", "random"]))), graph)
    check(
        sampler, graph, some_batches(rng, graph.num_nodes, counts),
        data.draw(st.lists(fanouts, min_size=1, max_size=4)), seed=rng_seed, replace=data.draw(st.booleans()),
        expand=data.draw(st.sampled_from(["layer", "frontier"])),
    )  # fmt: skip


def test_few_blocks_walk_many_tiles(new_runtime, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample_gpu, "MAX_BLOCKS", 4)
    rng = np.random.default_rng(2)
    graph = random_graph(rng, 1500, 9)
    sampler = make(new_runtime(), graph)
    for sizes in ([3, 3], [-1, -1], [40]):
        check(sampler, graph, some_batches(rng, 1500, (700, 600)), sizes)


def test_more_batches_than_the_scan_has_threads(new_runtime, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sample_gpu, "_SCAN_THREADS", 32)
    rng = np.random.default_rng(2)
    graph = random_graph(rng, 50, 4)
    check(make(new_runtime(), graph), graph, some_batches(rng, 50, rng.integers(0, 4, 75)), [2, 1])


def test_launches_copies_and_waits_are_those_of_one_batch(new_runtime, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    runtime = new_runtime()
    uploads = []
    upload = runtime.upload
    monkeypatch.setattr(runtime, "upload", lambda *both: uploads.append(1) or upload(*both))
    for table in TABLES:
        sampler = make(runtime, graph, table, capture=False)
        for _ in range(2):
            runtime.launches.clear()
            uploads.clear()
            check(sampler, graph, some_batches(rng, 300, (40, 30, 20, 40, 35)), [15, 10, 5])
        # The tables are cleared; where the results go is found; one kernel writes them.
        assert len(runtime.launches) == 2 + 2 + 3 * 6 + 1 + 1
        assert len(uploads) == 1


def test_graphs_are_recorded_and_buffers_used_again(new_runtime, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    runtime = new_runtime()
    captures = []
    capture = runtime.capture
    monkeypatch.setattr(runtime, "capture", lambda enqueue: captures.append(1) or capture(enqueue))
    sampler = make(runtime, graph)
    for _ in range(4):
        check(sampler, graph, some_batches(rng, 300, (40, 33)), [4, 3])
    assert len(captures) == 1
    for count in range(2, 8):  # of many sizes: buffers grow, larger tables than needed are cleared in part
        check(sampler, graph, some_batches(rng, 300, rng.integers(0, 60, count)), [[4, 3], [10], [40, 2]][count % 3])
    check(sampler, graph, some_batches(rng, 300, (3, 4)), [2])
    assert len(sampler._many._workspaces.free) == 1 and not sampler._workspaces.free


def test_batches_that_have_no_room_together(new_runtime, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(8)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph, max_degree=int(graph.degree().max()))
    batches = some_batches(rng, 300, (8, 7, 8, 5, 6))
    monkeypatch.setattr(batches_gpu, "_MOST_POSITIONS", 2 * (8 + 8 * 3 + 32 * 2))
    check(sampler, graph, batches, [3, 2], reads=3)
    monkeypatch.setattr(batches_gpu, "_MOST_POSITIONS", 10)
    check(sampler, graph, batches, [3, 2], reads=5)
    monkeypatch.undo()
    check(sampler, graph, batches[:2], [1] * 17, reads=2)
    check(sampler, graph, batches[:2], [1] * 16)
    sampler = make(sampler.runtime, graph, max_edges=30)
    check(sampler, graph, batches[:3], [3, 2], reads=6)
    assert sample_many(sampler, [], [3, 2], seed=0) == []


def test_each_batch_has_a_table_of_its_own(new_runtime):  # noqa: F811
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 900, 8)
    sampler = make(new_runtime(), graph)
    made = sample_many(sampler, some_batches(rng, 900, (30, 20, 25)), [2, 1], seed=1)
    (workspace,) = sampler._many._workspaces.free
    keys = to_host(workspace.arrays["keys"]).reshape(3, -1)  # as large as they have to be: the first use
    for own, (n_id, _) in zip(keys, made, strict=True):
        assert sorted(own[own >= 0].tolist()) == sorted(to_host(n_id).tolist())


def test_memory_goes_with_the_sampler(new_runtime):  # noqa: F811
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 60, 8)
    gc.disable()
    try:
        sampler = make(new_runtime(), graph)
        check(sampler, graph, some_batches(rng, 60, (3, 4)), [2])
        check(sampler, graph, some_batches(rng, 60, (3,)), [2])
        workspaces = [*sampler._workspaces.free, *sampler._many._workspaces.free]
        held = [weakref.ref(found) for found in (sampler, *workspaces)]
        workspaces.clear()
        del sampler
        assert [found() for found in held] == [None] * 3
    finally:
        gc.enable()


def test_seeds_on_the_device(new_runtime):  # noqa: F811
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 60, 8)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    batches = some_batches(rng, 60, (5, 0, 9, 3))
    for on_device in ([0, 1, 2, 3], [1, 2], [3], [0]):
        given = [(runtime.to_device(s) if i in on_device else s, b) for i, (s, b) in enumerate(batches)]
        for result, (seeds, number) in zip(sample_many(sampler, given, [3, 2], seed=1), batches, strict=True):
            expected = naive.sample(graph.indptr, graph.indices, seeds.tolist(), [3, 2], seed=1, batch=number)
            assert_equal(result, expected)


@pytest.mark.parametrize("on_device", [False, True])
def test_bad_seeds(new_runtime, on_device):  # noqa: F811
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 600, 8)
    runtime = new_runtime("random")
    sampler = make(runtime, graph)
    good = [rng.permutation(600)[:40] for _ in range(3)]
    for place, value, error, message in (
        (30, 600, ArgumentIndexError, "got 600 at position 30"), (7, -1, ArgumentIndexError, "got -1 at position 7"),
        (20, int(good[1][4]), ArgumentValueError, f"got {good[1][4]} again at position 20"),
    ):  # fmt: skip
        bad = good[1].copy()
        bad[place] = value
        worse = good[2].copy()
        worse[:] = -5  # a later batch: not the one that is named
        given = [(runtime.to_device(s) if on_device else s, b) for b, s in enumerate([good[0], bad, worse])]
        with pytest.raises(error, match=message):
            sample_many(sampler, given, [3, -1], seed=0)
        check(sampler, graph, [(seeds, b) for b, seeds in enumerate(good)], [3, -1])
    assert len(sampler._many._workspaces.free) == 1


def test_arrays_begin_on_64_bytes_of_one_buffer(new_runtime):  # noqa: F811
    rng = np.random.default_rng(5)
    graph = random_graph(rng, 60, 8)
    made = sample_many(make(new_runtime(), graph), some_batches(rng, 60, (5, 3, 9)), [3, 2], seed=1)
    arrays = [array for n_id, hops in made for array in (n_id, *(part for hop in hops for part in hop[:2]))]
    begins = [address(array) for array in arrays]
    assert all((begin - begins[0]) % 64 == 0 for begin in begins) and len(set(begins)) == len(begins)
    assert all(array.flags.c_contiguous for array in arrays)


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_shards(tmp_path_factory, wide):
    rng = np.random.default_rng(8)
    plain = random_graph(rng, 300, 25)
    graph = CSRGraph(plain.indptr, plain.indices, edge_ids=rng.permutation(plain.num_edges))
    if wide:
        graph.indices = graph.indices.astype(np.int64)
    runtime = HostRuntime(tmp_path_factory.getbasetemp())
    sampler = place_shards(ShardedGraph(graph, [parse_device("cpu")] * 3), runtime, 1 << 30)
    check(sampler, graph, some_batches(rng, 300, (8, 20)), [3, 2], edge_ids=graph.edge_ids)
