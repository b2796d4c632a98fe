"""PartBook and GraphPart in memory equal the obvious NumPy."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import CSRGraph, GGLSpeedupError
from gglspeedup.distributed import GraphPart, PartBook

RNG = np.random.default_rng(5)


def naive_owners(book: PartBook) -> np.ndarray:
    if book.ptr is not None:
        return np.repeat(np.arange(book.num_parts), np.diff(book.ptr))
    return np.asarray(book.owners)


def check_book(book: PartBook, owners: np.ndarray, num_parts: int) -> None:
    nodes = np.arange(len(owners))
    assert (book.num_nodes, book.num_parts) == (len(owners), num_parts)
    found = book.owner_of(nodes)
    assert found.dtype == np.uint16 and np.array_equal(found, owners)
    for part in range(num_parts):
        own = np.flatnonzero(owners == part)
        listed = book.nodes_of(part)
        assert listed.dtype == np.int64 and np.array_equal(listed, own) and book.count_of(part) == len(own)
        ids = RNG.permutation(np.repeat(own, 2))
        rows = book.rows_of(part, ids)
        assert rows.dtype == np.int64 and np.array_equal(own[rows], ids)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), max_size=300), st.sampled_from([7, 256, 257, 65536]))
def test_books_of_owners(owners, num_parts):
    book = PartBook.from_owners(owners, num_parts)
    check_book(book, np.array(owners, np.int64), 7) if num_parts == 7 else None
    assert book.owners is not None and book.owners.itemsize == (1 if num_parts <= 256 else 2)
    assert book.owner_of(np.arange(len(owners))).tolist() == owners
    assert book.nodes_of(3).tolist() == [node for node, owner in enumerate(owners) if owner == 3]
    assert book.rows_of(3, book.nodes_of(3)).tolist() == list(range(book.count_of(3)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9))
def test_books_of_ranges(sizes):
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    check_book(PartBook.contiguous(ptr), np.repeat(np.arange(len(sizes)), sizes), len(sizes))


@pytest.mark.parametrize("num_parts", [3, 300])
def test_many_ids_in_several_threads(num_parts):
    """Enough ids for several threads of a kernel, in rows far from the start, asked for by Python threads at once."""
    owners = RNG.integers(0, num_parts, 200_003)
    book = PartBook.from_owners(owners, num_parts)
    ids = RNG.integers(0, len(owners), 100_000)
    wrong = []

    def ask(part):
        own = ids[owners[ids] == part]
        expected = np.searchsorted(np.flatnonzero(owners == part), own)
        for _ in range(5):
            right = np.array_equal(book.rows_of(part, own), expected)
            if not right or not np.array_equal(book.owner_of(ids), owners[ids]):
                wrong.append(part)

    threads = [threading.Thread(target=ask, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gglspeedup.set_num_threads(1)
    ask(2)
    assert not wrong


def test_memory_of_a_book():
    """A book of ranges is its bounds; one of owners a byte a node, and a byte for every 8 nodes once rows are asked."""
    big = PartBook.contiguous([0, 1 << 39, 1 << 40])
    assert big.owner_of([0, (1 << 39) - 1, 1 << 39]).tolist() == [0, 0, 1]
    assert big.rows_of(1, [(1 << 40) - 1]).tolist() == [(1 << 39) - 1]
    assert len(pickle.dumps(big)) < 1000
    owners = np.zeros(6400, np.uint8)
    book = PartBook.from_owners(owners, 2)
    assert np.shares_memory(book.owners, owners)  # not copied
    book.rows_of(0, [1])
    book.rows_of(1, [])
    part, counts = book._before  # of the part asked for last alone
    assert part == 1 and counts.nbytes == 6400 // 8


def test_books_are_told_apart():
    owners = RNG.integers(0, 2, 100)
    other = owners.copy()
    other[7] ^= 1
    sums = [
        PartBook.from_owners(owners, 2).checksum(), PartBook.from_owners(other, 2).checksum(),
        PartBook.from_owners(owners, 3).checksum(), PartBook.contiguous([0, 50, 100]).checksum(),
        PartBook.contiguous([0, 51, 100]).checksum(),
    ]  # fmt: skip
    assert len(set(sums)) == 5 and PartBook.from_owners(owners.astype(np.int32), 2).checksum() == sums[0]


def test_read_only_owners_are_taken_as_they_are(tmp_path):
    np.save(tmp_path / "owners.npy", RNG.integers(0, 3, 500, dtype=np.uint8))
    mapped = np.load(tmp_path / "owners.npy", mmap_mode="r")
    check_book(PartBook.from_owners(mapped, 3), np.array(mapped), 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PartBook.contiguous([0]), "ptr needs"),
        (lambda: PartBook.contiguous([1, 2]), "ptr needs"),
        (lambda: PartBook.contiguous([0, 3, 2]), "ptr needs"),
        (lambda: PartBook.contiguous([0, 1 << 50]), "ptr needs"),
        (lambda: PartBook.contiguous(np.arange(65538)), "ptr needs"),
        (lambda: PartBook.contiguous([0.0, 1.0]), "ptr needs integers"),
        (lambda: PartBook.from_owners([0, 2], 2), "owners needs ids from 0 to 1, got 2 at position 1"),
        (lambda: PartBook.from_owners([0, -1], 2), "owners needs ids from 0 to 1, got -1 at position 1"),
        (lambda: PartBook.from_owners([[0]], 2), "owners needs one dimension"),
        (lambda: PartBook.from_owners([0.5], 2), "owners needs integers"),
        (lambda: PartBook.from_owners([0], 0), "num_parts needs"),
        (lambda: PartBook.from_owners([0], 65537), "num_parts needs"),
        (lambda: PartBook.from_owners([0, 1], 2).owner_of([2]), "ids needs ids from 0 to 1"),
        (lambda: PartBook.from_owners([0, 1], 2).rows_of(0, [-1]), "ids needs ids from 0 to 1"),
        (lambda: PartBook.from_owners([0, 1], 2).rows_of(2, [0]), "part needs 0 to 1"),
        (lambda: PartBook.from_owners([0, 1], 2).nodes_of(-1), "part needs 0 to 1"),
        (lambda: PartBook.contiguous([0, 1]).count_of("0"), "part needs an integer"),
        (lambda: GraphPart.of(CSRGraph([0, 0], []), PartBook.contiguous([0, 2]), 0), "book needs"),
        (lambda: GraphPart.of(CSRGraph([0, 0], []), PartBook.contiguous([0, 1]), 1), "index needs"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(GGLSpeedupError, match=match):
        call()


def check_part(part: GraphPart, graph: CSRGraph, owners: np.ndarray, index: int) -> None:
    """Every row of a part is that of the whole graph."""
    nodes = np.flatnonzero(owners == index)
    assert part.index == index and part.num_nodes == len(nodes) and part.indptr[0] == 0
    assert part.indptr.dtype == part.start.dtype == np.int64 and part.indices.dtype == graph.indices.dtype
    assert np.array_equal(part.start, graph.indptr[nodes]) and part.num_edges == part.indptr[-1]
    for row, node in enumerate(nodes):
        mine = slice(part.indptr[row], part.indptr[row + 1])
        whole = slice(graph.indptr[node], graph.indptr[node + 1])
        assert np.array_equal(part.indices[mine], graph.indices[whole])
        if graph.edge_ids is not None:
            assert np.array_equal(part.edge_ids[mine], graph.edge_ids[whole])
    assert (part.edge_ids is None) == (graph.edge_ids is None)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 5), st.booleans(), st.integers(0, 1000))
def test_parts_of_a_graph(num_nodes, num_parts, most, edge_ids, seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, num_nodes, most)
    if edge_ids:
        graph = CSRGraph(graph.indptr, graph.indices, edge_ids=rng.permutation(graph.num_edges))
    cuts = np.sort(rng.integers(0, num_nodes + 1, num_parts - 1))
    for book in (
        PartBook.from_owners(rng.integers(0, num_parts, num_nodes), num_parts),
        PartBook.contiguous(np.concatenate([[0], cuts, [num_nodes]])),
    ):
        parts = [GraphPart.of(graph, book, index) for index in range(num_parts)]
        for index, part in enumerate(parts):
            check_part(part, graph, naive_owners(book), index)
        assert len({part.fingerprint for part in parts}) == 1
        assert sum(part.num_edges for part in parts) == graph.num_edges


def test_parts_of_ranges_are_views(tmp_path):
    graph = random_graph(RNG, 50, 9)
    part = GraphPart.of(graph, PartBook.contiguous([0, 20, 50]), 1)
    assert np.shares_memory(part.indices, graph.indices) and np.shares_memory(part.start, graph.indptr)
    graph.save(tmp_path / "graph")
    mapped = GraphPart.of(CSRGraph.load(tmp_path / "graph"), PartBook.contiguous([0, 20, 50]), 1)
    assert np.array_equal(mapped.indices, part.indices) and mapped.fingerprint == part.fingerprint


def test_other_graphs_have_other_fingerprints():
    book = PartBook.contiguous([0, 2])
    graphs = [
        CSRGraph([0, 1, 2], [0, 1]), CSRGraph([0, 2, 2], [0, 1]), CSRGraph([0, 1, 2], [1, 1]),
        CSRGraph([0, 1, 2], [0, 1], edge_ids=[0, 1]), CSRGraph([0, 1, 2], [0, 1], edge_ids=[1, 0]),
    ]  # fmt: skip
    assert len({GraphPart.of(graph, book, 0).fingerprint for graph in graphs}) == len(graphs)


def test_pickle():
    part = GraphPart.of(random_graph(RNG, 50, 9), PartBook.from_owners(RNG.integers(0, 2, 50), 2), 1)
    again = pickle.loads(pickle.dumps(part))
    for name in ("index", "indptr", "indices", "start", "edge_ids", "fingerprint"):
        assert np.array_equal(getattr(again, name), getattr(part, name))
    assert np.array_equal(again.book.nodes_of(0), part.book.nodes_of(0))


def test_importing_is_cheap():
    unwanted = ["numba", "mpi4py", "torch"]
    code = f"import gglspeedup.distributed, sys; print(*(name in sys.modules for name in {unwanted}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"] * 3
