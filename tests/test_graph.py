"""CSRGraph: every way in, nothing lost, nothing broken let in; the file."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import scipy.sparse
from conftest import random_graph

from gglspeedup import CSRGraph, GGLSpeedupError, GPUSampler


def rows(graph: CSRGraph) -> list[list[int]]:
    return [graph.indices[a:b].tolist() for a, b in zip(graph.indptr[:-1], graph.indptr[1:], strict=True)]


def same(one: CSRGraph, other: CSRGraph) -> bool:
    ids = (one.edge_ids is None) == (other.edge_ids is None) and (
        one.edge_ids is None or np.array_equal(one.edge_ids, other.edge_ids)
    )
    return ids and np.array_equal(one.indptr, other.indptr) and np.array_equal(one.indices, other.indices)


def test_parts_are_not_copied():
    indptr, indices = np.array([0, 2, 2]), np.array([1, 1], np.int32)
    graph = CSRGraph(indptr, indices)
    assert np.shares_memory(graph.indptr, indptr) and np.shares_memory(graph.indices, indices)
    assert graph.indptr.dtype == np.int64 and graph.indices.dtype == np.int32
    assert (graph.num_nodes, graph.num_edges) == (2, 2) and graph.degree([1, 0, 0]).tolist() == [0, 2, 2]


def test_parallel_edges_and_self_loops_stay():
    edges = np.array([[0, 0, 1, 2, 2, 0], [1, 1, 1, 0, 0, 2]])
    graph = CSRGraph.from_edge_index(edges, num_nodes=5)
    assert rows(graph) == [[2, 2], [0, 0, 1], [0], [], []]
    assert graph.edge_ids.tolist() == [3, 4, 0, 1, 2, 5]
    reverse = CSRGraph.from_edge_index(edges, 5, flow="target_to_source")
    assert rows(reverse) == [[1, 1, 2], [1], [0, 0], [], []]


def test_edge_ids_lead_back_to_the_edges():
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 50, (2, 2000))
    graph = CSRGraph.from_edge_index(edges)
    n_id, (adj,) = GPUSampler("cpu", graph, [7]).sample(np.arange(50))
    np.testing.assert_array_equal(edges[0, adj.e_id], n_id[adj.row])
    np.testing.assert_array_equal(edges[1, adj.e_id], n_id[adj.col])


def test_edges_in_order_need_no_ids():
    graph = CSRGraph.from_edge_index([[3, 1, 0], [0, 0, 2]], num_nodes=4)
    assert graph.edge_ids is None and rows(graph) == [[3, 1], [], [0], []]


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "array"])
def test_scipy(kind):
    dense = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    matrix = scipy.sparse.csr_array(dense) if kind == "array" else scipy.sparse.csr_matrix(dense).asformat(kind)
    assert rows(CSRGraph.from_scipy(matrix)) == [[1, 2], [], [0, 2]]


def test_scipy_keeps_duplicates_and_trailing_nodes():
    data, row, column = np.ones(4), [0, 0, 0, 1], [2, 2, 1, 0]
    coo = scipy.sparse.coo_matrix((data, (row, column)), shape=(4, 4))
    assert rows(CSRGraph.from_scipy(coo)) == [[2, 2, 1], [0], [], []]
    # Without shape= scipy knows of two rows and three columns.
    loose = scipy.sparse.csr_matrix((data, np.array([2, 2, 1, 0]), np.array([0, 3, 4])))
    assert loose.shape == (2, 3) and rows(CSRGraph.from_scipy(loose)) == [[2, 2, 1], [0], []]


def test_torch_edges():
    import torch

    graph = CSRGraph.from_edge_index(torch.tensor([[1, 2], [0, 0]]))
    assert rows(graph) == [[1, 2], [], []]


def test_num_nodes_adds_empty_rows():
    assert rows(CSRGraph([0, 1], [3], num_nodes=4)) == [[3], [], [], []]
    assert CSRGraph([0], []).num_nodes == 0 and CSRGraph.from_edge_index(np.empty((2, 0), int)).num_nodes == 0


BROKEN = {
    "falls": (([0, 2, 1, 3], [0, 0, 0]), {}, ValueError, "indptr .* at row 1"),
    "no zero": (([1, 2], [0, 0]), {}, ValueError, "indptr needs 0 as its first"),
    "short": (([0, 2], [0]), {}, ValueError, "indptr needs the number of edges, 1"),
    "empty": (([], []), {}, ValueError, "indptr"),
    "too large": (([0, 2], [0, 7]), {}, IndexError, "indices needs node ids from 0 to 0, got 7 at position 1"),
    "negative": (([0, 2], [0, -3]), {}, IndexError, "got -3 at position 1"),
    "float": (([0, 1], [0.5]), {}, TypeError, "indices needs integers"),
    "float indptr": (([0.0, 1.0], [0]), {}, TypeError, "indptr needs integers"),
    "matrix": (([0, 1], [[0]]), {}, ValueError, "indices needs one dimension"),
    "few nodes": (([0, 1, 1], [0]), {"num_nodes": 1}, ValueError, "num_nodes needs at least the 2 rows"),
    "odd nodes": (([0, 1], [0]), {"num_nodes": 1.5}, TypeError, "num_nodes"),
    "few ids": (([0, 1], [0]), {"edge_ids": [1, 2]}, ValueError, "edge_ids needs one id for each of the 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_parts(case):
    arguments, options, builtin, message = BROKEN[case]
    with pytest.raises(GGLSpeedupError, match=message) as caught:
        CSRGraph(*arguments, **options)
    assert isinstance(caught.value, builtin)


@pytest.mark.parametrize(
    ("arguments", "options", "builtin"),
    [
        (([[0, 1], [1, 5]], 3), {}, IndexError),
        (([[0, -1], [1, 1]],), {}, IndexError),
        (([0, 1],), {}, ValueError),
        (([[0.5], [1.0]],), {}, TypeError),
        (([[0], [1]], 2), {"flow": "sideways"}, ValueError),
    ],
)
def test_broken_edges(arguments, options, builtin):
    with pytest.raises(GGLSpeedupError) as caught:
        CSRGraph.from_edge_index(*arguments, **options)
    assert isinstance(caught.value, builtin)


def test_csr_of_another_kind():
    for wrong in (5, "graph", np.zeros((3, 3))):
        with pytest.raises(GGLSpeedupError, match="csr needs a CSRGraph"):
            GPUSampler("cpu", wrong)
    with pytest.raises(TypeError):
        CSRGraph.from_scipy(np.zeros((2, 2)))


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("with_ids", [True, False])
def test_file(tmp_path, mmap, with_ids):
    graph = random_graph(np.random.default_rng(3), 500, 20)
    if with_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=np.arange(graph.num_edges)[::-1])
    graph.save(tmp_path / "graph.ggl")
    loaded = CSRGraph.load(tmp_path / "graph.ggl", mmap=mmap)
    assert same(loaded, graph) and isinstance(loaded.indices.base, np.memmap) == mmap
    assert [p.name for p in tmp_path.iterdir()] == ["graph.ggl"]
    one, other = (GPUSampler("cpu", g, [5, 5]).sample(np.arange(90)) for g in (graph, loaded))
    np.testing.assert_array_equal(one.n_id, other.n_id)
    np.testing.assert_array_equal(one.adjs[0].e_id, other.adjs[0].e_id)
    twin = pickle.loads(pickle.dumps(loaded))
    assert same(twin, graph) and (len(pickle.dumps(loaded)) < 1000) == mmap


def test_empty_graph_file(tmp_path):
    CSRGraph([0], []).save(tmp_path / "g")
    assert CSRGraph.load(tmp_path / "g").num_nodes == 0


def test_files_are_not_trusted(tmp_path):
    path = tmp_path / "graph.ggl"
    random_graph(np.random.default_rng(3), 50, 20).save(path)
    whole = path.read_bytes()
    broken = [b"", whole[:20], whole[:-1], whole + b"x", b"PK" + whole[2:]]
    broken += [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in range(0, 44)]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(GGLSpeedupError) as caught:
            CSRGraph.load(path)
        assert isinstance(caught.value, ValueError)
    path.write_bytes(whole[:8192] + b"\xff" * 64 + whole[8256:])  # the neighbours are checked, too
    with pytest.raises(IndexError):
        CSRGraph.load(path)
    with pytest.raises(FileNotFoundError):
        CSRGraph.load(tmp_path / "none")


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "graph.ggl"
    graph = random_graph(np.random.default_rng(3), 50, 20)
    graph.save(path)
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        graph.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_more_edges_than_int32_counts(tmp_path):
    """A mapped graph of more than 2^31 edges (a sparse file: nearly all neighbours are 0)."""
    nodes, edges = 1000, (1 << 31) + 4_000_000
    from gglspeedup import graph_file

    indptr = np.linspace(0, edges, nodes + 1).astype(np.int64)
    graph_file.write(str(tmp_path / "g"), indptr, np.empty(0, np.int32), None)
    begins, size = graph_file._layout(nodes, edges, 4, 0)
    with open(tmp_path / "g", "r+b") as file:
        fields = graph_file._FIELDS.pack(graph_file._MAGIC, nodes, edges, 4, 0)
        import struct
        import zlib

        file.write(fields + struct.pack("<I", zlib.crc32(fields)))
        file.truncate(size)
        file.seek(begins[1] + 4 * (edges - 1))
        file.write(np.int32(999).tobytes())
    graph = CSRGraph.load(tmp_path / "g")
    assert graph.num_edges == edges and graph.degree([999])[0] > 1_000_000
    n_id, (adj,) = GPUSampler("cpu", graph, [1000], replace=True).sample([999])
    assert adj.e_id.max() > np.iinfo(np.int32).max and set(n_id.tolist()) <= {0, 999}
    batch = GPUSampler("cpu", graph, [-1]).sample([999])
    assert batch.adjs[0].e_id[-1] == edges - 1 and batch.n_id.tolist() == [999, 0]
