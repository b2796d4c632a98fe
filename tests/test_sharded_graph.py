"""What a graph for all devices of a machine hands to other processes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from conftest import random_graph

from gglspeedup import CSRGraph
from gglspeedup.device import parse_device
from gglspeedup.sharded_graph import ShardedGraph


@pytest.mark.parametrize("mapped", [False, True])
def test_degrees_are_handed_over_and_not_computed_again(mapped, tmp_path, monkeypatch):
    graph = random_graph(np.random.default_rng(0), 200, 9)
    if mapped:
        graph.save(tmp_path / "graph")
        graph = CSRGraph.load(tmp_path / "graph")
    sharded = ShardedGraph(graph, [parse_device("cpu")] * 3)
    monkeypatch.setattr(CSRGraph, "degree", None)
    other = copy.copy(sharded)  # by the same two methods as pickle
    assert np.shares_memory(other._degree.array, sharded._degree.array)
    assert (other.max_degree, other.num_edges) == (sharded.max_degree, graph.num_edges)
    np.testing.assert_array_equal(other.rows, sharded.rows)
    np.testing.assert_array_equal(other.degree(), np.diff(graph.indptr))
    assert repr(other) == repr(sharded)
