"""Self-loops and edge weights: plain loops, and PyG's own normalisation."""

from __future__ import annotations

import importlib.util
import warnings
from unittest import mock

import numpy as np
import pytest
from conftest import missing
from hypothesis import given, settings
from hypothesis import strategies as st
from test_partitions import graphs, rows_of

from gglspeedup import CSRGraph, permute
from gglspeedup.normalise import symmetric_normalisation, with_self_loops


@settings(deadline=None)
@given(graph=graphs(), chunk=st.integers(1, 9))
def test_equals_the_obvious_loop(graph, chunk):
    with mock.patch("gglspeedup.edges.CHUNK", chunk):
        looped = with_self_loops(graph)
        same, weight = symmetric_normalisation(graph)
    rows = [[u for u in row if u != v] + [v] for v, row in enumerate(rows_of(graph))]
    assert rows_of(looped) == rows_of(same) == rows
    assert looped.indices.dtype == np.int32 and looped.edge_ids is None
    expected = [1 / np.sqrt(len(rows[u]) * len(row)) for row in rows for u in row]
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    again, _ = symmetric_normalisation(looped)
    assert rows_of(again) == rows


def test_no_nodes():
    graph, weight = symmetric_normalisation(CSRGraph([0], []))
    assert graph.num_nodes == 0 and len(weight) == 0


def check_against_pyg(graph: CSRGraph) -> None:
    if importlib.util.find_spec("torch_geometric") is None:
        missing("torch_geometric")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyG's imports
        import torch
        from torch_geometric.nn.conv.gcn_conv import gcn_norm
    target = np.repeat(np.arange(graph.num_nodes), graph.degree())
    edge_index = torch.from_numpy(np.array([graph.indices, target]))
    edges, value = gcn_norm(edge_index, None, graph.num_nodes, add_self_loops=True, dtype=torch.float32)
    made, weight = symmetric_normalisation(graph)
    order = np.argsort(edges[1].numpy(), kind="stable")
    np.testing.assert_array_equal(edges[0].numpy()[order], made.indices)
    np.testing.assert_array_equal(edges[1].numpy()[order], np.repeat(np.arange(made.num_nodes), made.degree()))
    np.testing.assert_allclose(weight, value.numpy()[order], rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_equals_pyg(seed):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, 40, (2, 200))  # self-loops and parallel edges among them
    check_against_pyg(CSRGraph.from_edge_index(edges, 43))


def test_equals_pyg_on_cora(shared_data):
    with np.load(shared_data / "cora.npz") as arrays:
        check_against_pyg(CSRGraph(arrays["indptr"], arrays["indices"]))


def test_weights_follow_a_permutation():
    """Normalising and then renumbering, or the other way round: the same weights on the same edges."""
    graph = CSRGraph.from_edge_index(np.random.default_rng(6).integers(0, 30, (2, 90)), 30)
    perm = np.random.default_rng(7).permutation(30)
    looped, weight = symmetric_normalisation(graph)
    one = permute(looped, perm)
    other, expected = symmetric_normalisation(permute(graph, perm))
    assert rows_of(one) == rows_of(other)
    np.testing.assert_array_equal(weight[one.edge_ids], expected)
