"""Cutting edges: against plain loops over dicts, and what every batch promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.edge_cut import EdgeCutter, node_importance, pagerank, random_importance

RNG = np.random.default_rng(0)
GRAPH = random_graph(RNG, 300, 12, hub=100)


def naive_cut(batch, keep, importance):
    """The same in plain words: rank the edges of every target, keep the best, follow them from the seeds."""
    order = batch.n_id[: batch.batch_size].tolist()
    hops = []
    for hop, adj in enumerate(reversed(batch.adjs)):
        weights = importance(batch, hop, batch.n_id[adj.row])
        rows: dict[int, list] = {}
        for edge, (source, target) in enumerate(adj.edge_index.T.tolist()):
            rows.setdefault(int(batch.n_id[target]), []).append(
                (-weights[edge], edge, int(batch.n_id[source]), int(adj.e_id[edge]))
            )
        edges, targets = [], list(order)
        for target in targets:
            row = rows.get(target, [])
            best = sorted(row)[: math.ceil(keep * len(row))]
            edges += [(source, target, e_id) for _, _, source, e_id in sorted(best, key=lambda entry: entry[1])]
        for source, _, _ in edges:
            if source not in order:
                order.append(source)
        hops.append((edges, len(order), len(targets)))
    return order, hops[::-1]


@settings(deadline=None, max_examples=40)
@given(
    seeds=st.integers(1, 40), keep=st.floats(0.01, 1.0), policy=st.sampled_from(["random", "degree"]),
    expand=st.sampled_from(["layer", "frontier"]), number=st.integers(0, 2**48 - 1), replace=st.booleans(),
)  # fmt: skip
def test_equals_naive(seeds, keep, policy, expand, number, replace):
    sampler = GPUSampler("cpu", GRAPH, [4, 3, -1], seed=7, expand=expand, replace=replace)
    batch = sampler.sample(np.random.default_rng(number).permutation(300)[:seeds], number)
    importance = random_importance(7) if policy == "random" else node_importance(GRAPH.degree())
    cut = EdgeCutter(batch, importance).cut(keep)
    order, hops = naive_cut(batch, keep, importance)
    assert cut.n_id.tolist() == order and cut.batch == number and cut.batch_size == seeds
    for adj, (edges, sources, targets) in zip(cut.adjs, hops, strict=True):
        assert adj.size == (sources, targets)
        assert adj.e_id.tolist() == [e_id for _, _, e_id in edges]
        assert cut.n_id[adj.edge_index].T.tolist() == [[source, target] for source, target, _ in edges]


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.99])
def test_a_cut_batch_keeps_its_promises(keep):
    batch = GPUSampler("cpu", GRAPH, [5, 5], seed=1).sample(np.arange(30), 3)
    cutter = EdgeCutter(batch, random_importance(1))
    cut = cutter.cut(keep)
    assert cutter.edges == sum(len(adj.e_id) for adj in batch.adjs)
    np.testing.assert_array_equal(cut.seeds, batch.seeds)
    assert len(np.unique(cut.n_id)) == len(cut.n_id) == cut.adjs[0].size[0]
    found = 30
    for adj in reversed(cut.adjs):
        assert adj.size[1] == found and (np.diff(adj.col) >= 0).all()
        fresh = adj.row[adj.row >= found]
        assert np.unique(fresh).tolist() == list(range(found, adj.size[0])), "a node that nothing reaches"
        assert list(dict.fromkeys(fresh.tolist())) == list(range(found, adj.size[0])), "not by first occurrence"
        found = adj.size[0]
    for ours, theirs in zip(cut.adjs[-1:], batch.adjs[-1:], strict=True):  # the seeds have the same rows as before
        degree = np.bincount(theirs.col, minlength=30)
        np.testing.assert_array_equal(np.bincount(ours.col, minlength=30), np.ceil(keep * degree))


def test_keeping_everything_changes_nothing():
    batch = GPUSampler("cpu", GRAPH, [5, 5], seed=1).sample(np.arange(30), 3)
    cut = EdgeCutter(batch, random_importance(1)).cut(1.0)
    np.testing.assert_array_equal(cut.n_id, batch.n_id)
    for ours, theirs in zip(cut.adjs, batch.adjs, strict=True):
        np.testing.assert_array_equal(ours.edge_index, theirs.edge_index)
        np.testing.assert_array_equal(ours.e_id, theirs.e_id)
        assert ours.size == theirs.size


def test_random_cuts_are_a_function_of_seed_batch_and_hop():
    sampler = GPUSampler("cpu", GRAPH, [8, 8], seed=1)
    batch, other = sampler.sample(np.arange(30), 3), sampler.sample(np.arange(30), 4)
    cuts = [EdgeCutter(batch, random_importance(seed)).cut(0.5).n_id.tolist() for seed in (1, 1, 2, 2**64 - 1)]
    assert cuts[0] == cuts[1] and cuts[0] != cuts[2] != cuts[3]
    words = [random_importance(1)(made, hop, np.arange(6)).tolist() for made in (batch, other) for hop in (0, 1)]
    assert len({tuple(word) for word in words}) == 4


def test_random_cuts_are_fair():
    """Of a row of 8, each edge is kept as often as any other."""
    graph = CSRGraph([0, 8] + [8] * 8, np.arange(1, 9))
    sampler = GPUSampler("cpu", graph, [-1], seed=1)
    kept = [EdgeCutter(sampler.sample([0], k), random_importance(1)).cut(0.25).n_id[1:].tolist() for k in range(4000)]
    counts = np.bincount(np.concatenate(kept), minlength=9)[1:]
    assert counts.sum() == 8000 and abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_the_least_important_are_cut():
    graph = CSRGraph([0, 4, 4, 5, 7, 10], [1, 2, 3, 4, 0, 0, 1, 0, 1, 2])
    batch = GPUSampler("cpu", graph, [-1]).sample([0])
    assert EdgeCutter(batch, node_importance(graph.degree())).cut(0.5).n_id.tolist() == [0, 3, 4]


def test_pagerank_equals_the_dense_one():
    graph = random_graph(RNG, 60, 6)
    walk = np.zeros((60, 60))
    for node in range(60):
        row = graph.indices[graph.indptr[node] : graph.indptr[node + 1]]
        np.add.at(walk[node], row, 1 / max(len(row), 1))
        if not len(row):
            walk[node] = 1 / 60
    values, vectors = np.linalg.eig((0.15 / 60 + 0.85 * walk).T)
    expected = np.real(vectors[:, np.argmax(np.real(values))])
    np.testing.assert_allclose(pagerank(graph.indptr, graph.indices), expected / expected.sum(), atol=1e-7)
    assert pagerank(np.zeros(1, np.int64), np.empty(0, np.int64)).tolist() == []
