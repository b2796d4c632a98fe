"""Batches one after the other on a GPU: the kernels of the next are enqueued before the host waits for one."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from conftest import random_graph
from test_cuda_many import some_batches
from test_cuda_sample import assert_equal, make, new_runtime  # noqa: F401

from gglspeedup import batches_gpu
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError


def expect(graph, results, batches, sizes, seed=0):
    for result, (seeds, number) in zip(results, batches, strict=True):
        assert_equal(result, naive.sample(graph.indptr, graph.indices, seeds.tolist(), sizes, seed=seed, batch=number))


@pytest.mark.parametrize("table", ["dense", "hash"])
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("max_edges", [1 << 26, 60])
def test_equal_to_one_by_one(new_runtime, table, at_once, max_edges):  # noqa: F811
    rng = np.random.default_rng(at_once)
    graph = random_graph(rng, 300, 25, hub=400)
    sampler = make(new_runtime(), graph, table, max_edges=max_edges)
    for sizes in ([4, 3], [-1, 2]):
        batches = some_batches(rng, 300, (9, 30, 1, 0, 12, 7, 30))
        before = sampler.runtime.reads
        made = list(sampler.sample_each(iter(batches), sizes, seed=5, at_once=at_once))
        expect(graph, made, batches, sizes, 5)
        if max_edges > 60:
            assert sampler.runtime.reads - before == -(-len(batches) // at_once)


def test_the_next_is_launched_before_the_wait(new_runtime, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    runtime = new_runtime()
    sampler = make(runtime, graph)
    log = []
    for name in ("upload", "download", "settle"):
        call = getattr(runtime, name)
        monkeypatch.setattr(runtime, name, lambda *a, call=call, name=name: log.append(name) or call(*a))
    batches = some_batches(rng, 300, [20] * 5)
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0), batches, [4, 3])
    first = ["upload", "download"]
    assert log == [*first, *([*first, "settle"] * 4), "settle"]
    assert len(sampler._workspaces.free) == 2
    # Two workspaces take turns, each with graphs of its own: all of this is replayed.
    runtime.launches.clear()
    expect(graph, sampler.sample_each(batches, [4, 3], seed=1), batches, [4, 3], 1)
    assert len(sampler._workspaces.free) == 2 and all(next(iter(w.graphs.values())) for w in sampler._workspaces.free)


@pytest.mark.parametrize("at_once", [1, 2])
def test_leaving_early_gives_the_buffers_back(new_runtime, at_once):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph)
    pool = sampler._workspaces if at_once == 1 else sampler._many._workspaces
    batches = some_batches(rng, 300, [20] * 8)
    for taken in (1, 3):
        each = sampler.sample_each(batches, [4, 3], seed=0, at_once=at_once)
        expect(graph, [next(each) for _ in range(taken)], batches[:taken], [4, 3])
        assert len(pool.free) == 1
        before = sampler.runtime.reads
        each.close()
        assert len(pool.free) == 2 and sampler.runtime.reads == before + 1  # what is used again is waited for
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0, at_once=at_once), batches, [4, 3])


@pytest.mark.parametrize("at_once", [1, 2, 4])
@pytest.mark.parametrize("place", [0, 2, 3, 5])
def test_a_bad_batch_loses_none_before_it(new_runtime, at_once, place):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph)
    batches = some_batches(rng, 300, [20] * 6)
    for value, error in ((300, ArgumentIndexError), (int(batches[place][0][0]), ArgumentValueError)):
        bad = [(seeds.copy(), number) for seeds, number in batches]
        bad[place][0][7] = value
        made = []
        with pytest.raises(error, match="at position 7"):
            made.extend(sampler.sample_each(bad, [4, 3], seed=0, at_once=at_once))
        expect(graph, made, batches[:place], [4, 3])

    def source():
        yield from batches[:place]
        raise OSError("no more")

    made = []
    with pytest.raises(OSError, match="no more"):
        made.extend(sampler.sample_each(source(), [4, 3], seed=0, at_once=at_once))
    expect(graph, made, batches[:place], [4, 3])
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0, at_once=at_once), batches, [4, 3])


def test_where_several_have_no_room_they_come_one_by_one(new_runtime, monkeypatch, caplog):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph)
    batches = some_batches(rng, 300, [20] * 6)

    def refuse(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(batches_gpu.BatchesWorkspace, "reserve_batches", refuse)
        expect(graph, sampler.sample_each(batches, [4, 3], seed=0, at_once=3), batches, [4, 3])
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "they are sampled one by one" in record.message
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0, at_once=3), batches, [4, 3])
    assert not sampler._many._workspaces.free


def test_where_two_groups_have_no_room_each_is_sampled_together(new_runtime, monkeypatch, caplog):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph)
    pool, made = sampler._many._workspaces, []
    make_workspace = pool._make

    def one():
        if made:
            raise MemoryError("no room")
        made.append(make_workspace())
        return made[0]

    monkeypatch.setattr(pool, "_make", one)
    batches = some_batches(rng, 300, [20] * 6)
    before = sampler.runtime.reads
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0, at_once=2), batches, [4, 3])
    assert sampler.runtime.reads == before + 3 and not caplog.records and pool.free == made


def test_where_two_have_no_room_they_are_sampled_in_turn(new_runtime, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 300, 25)
    sampler = make(new_runtime(), graph)
    make_workspace, made = sampler._workspaces._make, []

    def one():
        if made:
            raise MemoryError("no room")
        made.append(make_workspace())
        return made[0]

    monkeypatch.setattr(sampler._workspaces, "_make", one)
    batches = some_batches(rng, 300, [20] * 4)
    expect(graph, sampler.sample_each(batches, [4, 3], seed=0), batches, [4, 3])
    assert sampler._workspaces.free == made
