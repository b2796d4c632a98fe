"""GPUSampler on the CPU: equal to the naive version, reproducible, safe to share."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from itertools import pairwise

import naive
import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.sampler_cpu import CpuSampler

FANOUTS = [-1, 0, 1, 2, 5, 10, 25, 32, 33, 100, 1024]


def assert_equal(batch, expected):
    n_id, hops = expected
    assert batch.n_id.dtype == np.int64
    np.testing.assert_array_equal(batch.n_id, n_id)
    assert len(batch.adjs) == len(hops)
    for adj, (edge_index, e_id, size) in zip(batch.adjs, hops, strict=True):
        assert adj.edge_index.dtype == adj.e_id.dtype == np.int64
        np.testing.assert_array_equal(adj.edge_index, edge_index)
        np.testing.assert_array_equal(adj.e_id, e_id)
        assert adj.size == size


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), num_nodes=st.integers(1, 120), most=st.integers(0, 50),
    hub=st.sampled_from([0, 3000]), sizes=st.lists(st.sampled_from(FANOUTS), min_size=1, max_size=3),
    replace=st.booleans(), expand=st.sampled_from(["layer", "frontier"]), seed=st.integers(0, 2**64 - 1),
    batch=st.integers(0, 2**48 - 1),
    with_ids=st.booleans(), wide=st.booleans(), threads=st.integers(1, 2), table=st.sampled_from(["dense", "hash"]),
)  # fmt: skip
def test_equals_naive(
    numbers, num_nodes, most, hub, sizes, replace, expand, seed, batch, with_ids, wide, threads, table
):  # fmt: skip
    rng = np.random.default_rng(numbers)
    graph = random_graph(rng, num_nodes, most, hub)
    if with_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=rng.permutation(graph.num_edges))
    if wide:  # as a graph of 2**31 nodes has
        graph.indices = graph.indices.astype(np.int64)
    gglspeedup.set_num_threads(threads)
    sampler = GPUSampler("cpu", graph, sizes, seed=seed, replace=replace, expand=expand)
    sampler._sampler = CpuSampler(graph, table)
    seeds = rng.permutation(num_nodes)[: rng.integers(0, num_nodes + 1)]
    sampler.sample(seeds)  # what an earlier batch leaves in the workspace must not matter
    options = {"seed": seed, "batch": batch, "replace": replace, "expand": expand, "edge_ids": graph.edge_ids}
    assert_equal(sampler.sample(seeds, batch=batch), naive.sample(graph.indptr, graph.indices, seeds, sizes, **options))


@pytest.fixture(scope="module")
def real_graph(shared_data) -> CSRGraph:
    with np.load(shared_data / "pubmed.npz") as file:
        return CSRGraph(file["indptr"], file["indices"])


def test_real_graph_equals_naive(real_graph):
    seeds = np.random.default_rng(0).permutation(real_graph.num_nodes)[:300]
    sampler = GPUSampler("cpu", real_graph, [25, 10], seed=11)
    expected = naive.sample(real_graph.indptr, real_graph.indices, seeds, [25, 10], seed=11, batch=4)
    assert_equal(sampler.sample(seeds, batch=4), expected)


def bits(batch) -> list[bytes]:
    return [batch.n_id.tobytes(), *(part.tobytes() for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]


@pytest.mark.parametrize("table", ["dense", "hash"])
def test_threads_do_not_matter(table):
    """Many chunks, many new nodes, many repeats: whoever relabels, the bits are the same."""
    rng = np.random.default_rng(1)
    graph = random_graph(rng, 30_000, 60, hub=200_000)
    seeds = rng.permutation(graph.num_nodes)[:1500]
    expected = None
    for threads in (1, 2, 1, 2, 2):
        gglspeedup.set_num_threads(threads)
        for _ in range(3):
            sampler = GPUSampler("cpu", graph, [15, 10, 5])
            sampler._sampler = CpuSampler(graph, table)
            got = bits(sampler.sample(seeds, batch=9))
            expected = expected or got
            assert got == expected


@pytest.mark.parametrize("table", ["dense", "hash"])
def test_buffers_of_other_batches_do_not_matter(table):
    """Batches of many kinds, by more or fewer threads, in the buffers that the ones before them have left."""
    rng = np.random.default_rng(3)
    graph = random_graph(rng, 700, 9, hub=3000)
    sampler = GPUSampler("cpu", graph, [1])
    sampler._sampler = CpuSampler(graph, table)
    kinds = [(1, [3]), (2, [-1, 2]), (1, [60, 5]), (2, [60, 5]), (2, [1, 1, 1]), (1, [-1, -1]), (2, [200])]
    for place in [*range(len(kinds)), *rng.integers(0, len(kinds), 40)]:
        threads, sizes = kinds[place]
        gglspeedup.set_num_threads(threads)
        # What the last batch of a kind needed is enough for this one, nearly so, or not at all.
        seeds = rng.permutation(700)[: int(rng.choice([0, 1, 60, 63, 300]))]
        expected = naive.sample(graph.indptr, graph.indices, seeds, sizes, batch=5)
        assert_equal(sampler.sample(seeds, 5, sizes=sizes), expected)


def test_a_small_batch_after_a_large_one_holds_no_large_buffer():
    graph = CSRGraph(np.array([0, 400_000, 400_001, 400_002]), np.zeros(400_002, np.int32))
    sampler = GPUSampler("cpu", graph, [-1])
    for seed in (0, 1, 0, 2):
        adj = sampler.sample([seed]).adjs[0]
        held = adj.edge_index
        while getattr(held, "base", None) is not None:
            held = held.base
        assert adj.e_id.tolist() == list(range(*graph.indptr[seed : seed + 2]))
        assert held.owner.nbytes <= 2 * 24 * adj.e_id.size + (1 << 16)


def test_more_workers_than_cores():
    """Eight workers on any machine, through the kernel itself: schedules that two cores alone would not show."""
    code = """
import numpy as np
from gglspeedup import CSRGraph, GPUSampler, threads
from gglspeedup.sampler_cpu import CpuSampler
threads.usable_cores = lambda: 8
rng = np.random.default_rng(1)
indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 60, 20_000))])
graph = CSRGraph(indptr, rng.integers(0, 20_000, indptr[-1]))
import hashlib
for n, table in ((1, "dense"), (8, "dense"), (8, "hash"), (3, "hash")):
    threads.set_num_threads(n)
    sampler = GPUSampler("cpu", graph, [10, 10, 5])
    sampler._sampler = CpuSampler(graph, table)
    batch = sampler.sample(np.arange(1000), batch=1)
    print(hashlib.sha256(batch.n_id.tobytes() + b"".join(a.edge_index.tobytes() for a in batch.adjs)).hexdigest())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "8"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert len(result.stdout.split()) == 4 and len(set(result.stdout.split())) == 1


def test_a_draw_depends_on_its_node_alone(real_graph):
    """One batch or split batches: each seed has the same neighbours."""
    sampler = GPUSampler("cpu", real_graph, [5])
    seeds = np.arange(64)
    (whole,) = sampler.sample(seeds, batch=3).adjs
    parts = [sampler.sample(part, batch=3).adjs[0].e_id for part in np.split(seeds, 4)]
    np.testing.assert_array_equal(whole.e_id, np.concatenate(parts))


def test_frontier_draws_what_layer_draws(real_graph):
    seeds = np.arange(50)
    options = {"sizes": [4, 3], "seed": 2}
    layer = GPUSampler("cpu", real_graph, expand="layer", **options).sample(seeds, batch=0)
    frontier = GPUSampler("cpu", real_graph, expand="frontier", **options).sample(seeds, batch=0)
    fresh = layer.adjs[0].col >= len(seeds)
    np.testing.assert_array_equal(frontier.adjs[0].e_id, layer.adjs[0].e_id[fresh])


def test_invariants(real_graph):
    """What GammaGL, PyG and quiver rely on."""
    seeds = [5, 3, 4]
    batch = GPUSampler("cpu", real_graph, [5, 4, 3]).sample(seeds)
    n_id, adjs = batch
    assert batch.batch_size == 3 and batch.seeds.tolist() == seeds and len(np.unique(n_id)) == len(n_id)
    assert adjs[0].size[0] == len(n_id) and adjs[-1].size[1] == 3
    for adj, inner in pairwise(adjs):
        assert adj.size[1] == inner.size[0]
    for adj in adjs:
        assert np.all(np.diff(adj.col) >= 0)
        np.testing.assert_array_equal(real_graph.indices[adj.e_id], n_id[adj.row])
        assert (adj.row < adj.size[0]).all() and (adj.col < adj.size[1]).all()


def test_batches_differ_and_repeat(real_graph):
    first, second = (GPUSampler("cpu", real_graph, [3, 3]) for _ in range(2))
    seeds = np.arange(100)
    run = [bits(first.sample(seeds)) for _ in range(3)]
    assert run == [bits(second.sample(seeds)) for _ in range(3)] and run[0] != run[1] != run[2]
    assert bits(first.sample(seeds, batch=1)) == run[1]


def test_results_outlive_later_batches(real_graph):
    """A buffer is used again only once nothing shares it."""
    sampler = GPUSampler("cpu", real_graph, [5, 5])
    kept = sampler.sample(np.arange(200), batch=0)
    before, view = bits(kept), kept.adjs[0].row
    expected = view.copy()
    for batch in range(1, 20):
        sampler.sample(np.arange(200), batch=batch)
    assert bits(kept) == before
    del kept
    for batch in range(1, 20):
        sampler.sample(np.arange(200), batch=batch)
    np.testing.assert_array_equal(view, expected)


def test_outputs_are_aligned(real_graph):
    for seeds in (np.arange(7), np.arange(111)):
        batch = GPUSampler("cpu", real_graph, [3, 2]).sample(seeds)
        for array in (batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))):
            assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable


def test_python_threads_share_a_sampler(real_graph):
    sampler = GPUSampler("cpu", real_graph, [10, 5])
    seeds = np.arange(500)
    expected = [bits(sampler.sample(seeds, batch=b)) for b in range(40)]
    got: list = [None] * 40

    def work(first: int) -> None:
        for b in range(first, 40, 4):
            got[b] = bits(sampler.sample(seeds, batch=b))

    workers = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == expected


def test_without_tbb():
    """Where tbb is missing calls wait for each other, and the bits are the same."""
    code = """
import threading
import numpy as np
from gglspeedup import GPUSampler, threads
threads._tbb_files = lambda: iter(["no-such-libtbb.so"])
sampler = GPUSampler("cpu", (np.arange(2001) * 5, np.arange(10_000) * 7 % 2000), [3, 3])
got = []
work = lambda: got.append(sampler.sample(np.arange(500), batch=1).n_id.tobytes())
workers = [threading.Thread(target=work) for _ in range(4)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
assert threads._launch_lock is not None and len(got) == 4 and len(set(got)) == 1
print(hash(got[0]) == hash(sampler.sample(np.arange(500), batch=1).n_id.tobytes()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "True", result.stderr


def _sample_elsewhere(sampler, seeds, queue):
    queue.put(bits(sampler.sample(seeds, batch=5)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes(real_graph, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    sampler = GPUSampler("cpu", real_graph, [10, 5], seed=4)
    seeds = np.arange(300)
    expected = bits(sampler.sample(seeds, batch=5))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_sample_elsewhere, args=(sampler, seeds, queue))
    process.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        process.join(10)
        process.kill()
    assert process.exitcode == 0


def test_pickle_continues_the_counter(real_graph):
    sampler = GPUSampler("cpu", real_graph, [3], seed=8, expand="frontier", replace=True)
    sampler.sample([1])
    twin = pickle.loads(pickle.dumps(sampler))
    assert bits(sampler.sample(np.arange(9))) == bits(twin.sample(np.arange(9)))


def test_stamps_start_over(real_graph):
    """When the table's int32 stamps run out it is cleared, and nothing shows."""
    sampler = GPUSampler("cpu", real_graph, [5, 5])
    seeds = np.arange(100)
    expected = bits(sampler.sample(seeds, batch=0))
    (space,) = sampler._sampler._workspaces
    space.base = (1 << 30) - 2 * real_graph.num_nodes
    for _ in range(60):
        assert bits(sampler.sample(seeds, batch=0)) == expected
    assert space.base < 1 << 29


@pytest.mark.parametrize("as_what", ["list", "tuple", "int32", "uint64", "torch", "strided", "read-only"])
def test_seeds_of_any_kind(real_graph, as_what):
    import torch

    ids = np.array([4, 0, 9])
    readonly = ids.copy()
    readonly.flags.writeable = False
    seeds = {
        "list": [4, 0, 9], "tuple": (4, 0, 9), "int32": ids.astype(np.int32), "uint64": ids.astype(np.uint64),
        "torch": torch.tensor([4, 0, 9]), "strided": np.repeat(ids, 2)[::2], "read-only": readonly,
    }[as_what]  # fmt: skip
    sampler = GPUSampler("cpu", real_graph, [2])
    assert bits(sampler.sample(seeds, batch=0)) == bits(sampler.sample(ids, batch=0))


def test_no_seeds_no_edges():
    graph = CSRGraph([0, 0, 0], [])
    n_id, adjs = GPUSampler("cpu", graph, [3, 3]).sample([])
    assert n_id.shape == (0,) and [adj.size for adj in adjs] == [(0, 0), (0, 0)]
    n_id, adjs = GPUSampler("cpu", graph, [3]).sample([1])
    assert n_id.tolist() == [1] and adjs[0].edge_index.shape == (2, 0)
    assert GPUSampler("cpu", CSRGraph([0], []), [3]).sample([]).n_id.shape == (0,)


def test_the_original_import_path_and_positions(real_graph):
    from gglspeedup.gpusample import GPUSampler as original

    sampler = original("cpu", (real_graph.indptr, real_graph.indices))
    sampler.set_size([25, 10])
    all_node, adjs = sampler.sample(np.arange(10))
    assert len(adjs) == 2 and len(all_node) == adjs[0].size[0]


@pytest.mark.slow
def test_memory_does_not_grow(real_graph):
    import psutil

    sampler = GPUSampler("cpu", real_graph, [10, 5])
    order = np.random.default_rng(0).permutation(real_graph.num_nodes)
    process = psutil.Process()

    def run(batches: int) -> int:
        for b in range(batches):
            batch = sampler.sample(order[(b * 97) % 19000 :][:256])
            batch.adjs[0].cp2torch()
        return process.memory_info().rss

    before = run(2000)
    assert run(10_000) - before < 32 << 20
