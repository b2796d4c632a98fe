"""Partitions: every node in one part, the cut METIS makes, renumbering, and what a cut costs, against plain loops."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from itertools import chain, pairwise
from unittest import mock

import numpy as np
import pytest
from conftest import missing
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup import CSRGraph, GGLSpeedupError, metis, partition, permute
from gglspeedup.errors import MissingPackageError
from gglspeedup.partitions import Partition, PartitionStats, _fill_empty, partition_stats

RNG = np.random.default_rng(0)


@st.composite
def graphs(draw, least: int = 1) -> CSRGraph:
    """Any small graph: isolated nodes, self-loops, parallel edges, one-way edges; with edge ids or without."""
    nodes = draw(st.integers(least, 12))
    node = st.integers(0, nodes - 1)
    rows = draw(st.lists(st.lists(node, max_size=6), min_size=nodes, max_size=nodes))
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([neighbour for row in rows for neighbour in row], np.int64)
    edge_ids = draw(st.none() | st.permutations(range(100, 100 + len(indices))))
    return CSRGraph(indptr, indices, edge_ids=edge_ids)


def rows_of(graph: CSRGraph) -> list[list[int]]:
    return [graph.indices[b:e].tolist() for b, e in zip(graph.indptr[:-1], graph.indptr[1:], strict=True)]


def small_chunks(size: int):
    """Work on a few edges at a time, so that small graphs have many chunks."""
    return mock.patch("gglspeedup.edges.CHUNK", size)


def check_partition(cut: Partition, num_nodes: int, num_parts: int) -> list[list[int]]:
    """Check what holds for every partition, and return its parts."""
    perm, ptr = cut
    assert perm.dtype == ptr.dtype == np.int64 and cut.perm is perm and cut.ptr is ptr
    assert len(ptr) == num_parts + 1 and ptr[0] == 0 and ptr[-1] == num_nodes
    parts = [perm[ptr[i] : ptr[i + 1]].tolist() for i in range(num_parts)]
    assert all(parts) and all(part == sorted(part) for part in parts)
    assert sorted(chain(*parts)) == list(range(num_nodes))
    return parts


def planted(blocks: int, size: int, seed: int = 0) -> tuple[CSRGraph, np.ndarray]:
    """A graph of dense blocks with few edges between them, its nodes shuffled, and the block of each node."""
    rng = np.random.default_rng(seed)
    block = rng.permutation(np.repeat(np.arange(blocks), size))
    members = [np.flatnonzero(block == b) for b in range(blocks)]
    source = rng.integers(0, blocks * size, 12 * blocks * size)
    target = np.array([rng.choice(members[block[node]]) for node in source])
    stray = rng.random(len(source)) < 0.02
    target[stray] = rng.integers(0, blocks * size, int(stray.sum()))
    return CSRGraph.from_edge_index(np.array([source, target]), blocks * size), block


@pytest.fixture
def pymetis() -> None:
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")


@settings(deadline=None)
@given(nodes=st.integers(1, 60), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_parts_without_metis_are_even(nodes, seed, data):
    graph = CSRGraph(np.zeros(nodes + 1, np.int64), [])
    count = data.draw(st.integers(1, nodes))
    expected = [len(part) for part in np.array_split(np.arange(nodes), count)]
    straight = check_partition(partition(graph, count, "contiguous"), nodes, count)
    assert list(chain(*straight)) == list(range(nodes)) and [len(part) for part in straight] == expected
    mixed = check_partition(partition(graph, count, "random", seed=seed), nodes, count)
    words = np.random.Philox(key=seed).random_raw(nodes).tolist()
    dealt = np.array_split(sorted(range(nodes), key=lambda node: words[node]), count)
    assert mixed == [sorted(part.tolist()) for part in dealt]


def test_seeds_differ():
    graph = CSRGraph(np.zeros(101, np.int64), [])
    one, same, other = (partition(graph, 5, "random", seed=seed).perm.tolist() for seed in (1, 1, 2))
    assert one == same != other


TWO_TRIANGLES = CSRGraph([0, 2, 4, 6, 8, 10, 12], [1, 2, 0, 2, 0, 1, 4, 5, 3, 5, 3, 4])
CASES = {
    "one part": (TWO_TRIANGLES, 1),
    "a part a node": (TWO_TRIANGLES, 6),
    "almost a part a node": (TWO_TRIANGLES, 5),
    "disconnected": (TWO_TRIANGLES, 2),
    "no edge": (CSRGraph(np.zeros(8, np.int64), []), 3),
    "one node": (CSRGraph([0, 1], [0]), 1),
    "self-loops alone": (CSRGraph([0, 1, 3, 4], [0, 1, 1, 2]), 2),
    "a directed star with parallel edges": (CSRGraph([0, 40, *[40] * 20], RNG.integers(0, 21, 40)), 4),
    "a path with isolated nodes": (CSRGraph.from_edge_index([range(9), range(1, 10)], 40), 13),
}


@pytest.mark.parametrize("case", CASES)
def test_metis_takes_every_graph(pymetis, case):
    graph, count = CASES[case]
    first = partition(graph, count, seed=2**64 - 1)
    parts = check_partition(first, graph.num_nodes, count)
    if case == "disconnected":
        assert sorted(parts) == [[0, 1, 2], [3, 4, 5]]
    second = partition(graph, count, seed=2**64 - 1)
    assert first.perm.tolist() == second.perm.tolist() and first.ptr.tolist() == second.ptr.tolist()


def test_metis_finds_what_was_planted(pymetis):
    graph, block = planted(6, 80)
    found = partition(graph, 6, "metis", seed=3)
    parts = check_partition(found, 480, 6)
    best = partition_stats(graph, np.argsort(block, kind="stable"), np.arange(0, 481, 80)).edge_cut
    cut = partition_stats(graph, *found)
    assert max(cut.sizes) <= 1.1 * 80
    assert cut.edge_cut <= 1.1 * best
    assert partition_stats(graph, *partition(graph, 6, "random")).edge_cut > 10 * cut.edge_cut
    assert all(np.bincount(block[part]).max() > 0.95 * len(part) for part in parts)


@settings(deadline=None)
@given(graph=graphs(), chunk=st.integers(1, 9))
def test_symmetric_equals_sets(graph, chunk):
    pairs = {(v, u) for v, row in enumerate(rows_of(graph)) for u in row if u != v}
    pairs |= {(u, v) for v, u in pairs}
    with small_chunks(chunk):
        indptr, indices = metis.symmetric(graph)
    assert indptr.dtype == indices.dtype == np.int64
    expected = [sorted(u for v, u in pairs if v == node) for node in range(graph.num_nodes)]
    assert rows_of(CSRGraph(indptr, indices)) == expected


@settings(deadline=None)
@given(part=st.lists(st.integers(0, 9), min_size=1, max_size=30), data=st.data())
def test_empty_parts_take_from_the_largest(part, data):
    count = data.draw(st.integers(max(max(part) + 1, 1), max(len(part), max(part) + 1)))
    if count > len(part):
        part = [*part, *range(count - len(part))]
    expected = list(part)
    for number in range(count):
        if number not in part:
            giver = max(range(count), key=lambda p: (expected.count(p), -p))
            expected[max(node for node, p in enumerate(expected) if p == giver)] = number
    got = np.array(part)
    _fill_empty(got, count)
    assert got.tolist() == expected and set(expected) == set(range(count))


@settings(deadline=None)
@given(graph=graphs(), data=st.data(), chunk=st.integers(1, 9))
def test_permute_equals_the_obvious_loop(graph, data, chunk):
    perm = data.draw(st.permutations(range(graph.num_nodes)))
    ids = np.arange(graph.num_edges) if graph.edge_ids is None else graph.edge_ids
    with small_chunks(chunk):
        made = permute(graph, perm)
    assert made.indptr.dtype == np.int64 and made.indices.dtype == np.int32
    assert rows_of(made) == [[perm.index(u) for u in rows_of(graph)[old]] for old in perm]
    expected = [int(i) for old in perm for i in ids[graph.indptr[old] : graph.indptr[old + 1]]]
    assert made.edge_ids is not None and made.edge_ids.tolist() == expected
    back = permute(made, np.argsort(perm))
    assert rows_of(back) == rows_of(graph) and back.edge_ids.tolist() == ids.tolist()


def test_permute_of_a_mapped_graph(tmp_path):
    graph, _ = planted(3, 10)
    graph.save(tmp_path / "graph")
    mapped = CSRGraph.load(tmp_path / "graph")
    perm = RNG.permutation(30)
    made = permute(mapped, perm)
    assert rows_of(made) == rows_of(permute(graph, perm)) and type(made.indices) is np.ndarray


def naive_stats(graph: CSRGraph, perm: list[int], ptr: list[int]) -> tuple[int, list[int], list[int], float]:
    parts = [set(perm[begin:end]) for begin, end in pairwise(ptr)]
    rows = rows_of(graph)
    cut = sum(u not in part for part in parts for v in part for u in rows[v])
    halo = [len({u for v in part for u in rows[v]} - part) for part in parts]
    within = graph.num_edges - cut
    return cut, [len(part) for part in parts], halo, cut / within if within else float("inf") if cut else 0.0


def figures(stats: PartitionStats) -> tuple[int, list[int], list[int], float]:
    return stats.edge_cut, stats.sizes.tolist(), stats.halo.tolist(), stats.inter_intra


@settings(deadline=None, max_examples=200)
@given(graph=graphs(), data=st.data(), chunk=st.integers(1, 9))
def test_stats_equal_sets(graph, data, chunk):
    perm = data.draw(st.permutations(range(graph.num_nodes)))
    inner = data.draw(st.lists(st.integers(0, graph.num_nodes), max_size=5))
    ptr = [0, *sorted(inner), graph.num_nodes]
    with small_chunks(chunk):
        assert figures(partition_stats(graph, perm, ptr)) == naive_stats(graph, perm, ptr)


def test_cora(pymetis, shared_data):
    with np.load(shared_data / "cora.npz") as arrays:
        graph = CSRGraph(arrays["indptr"], arrays["indices"])
    found, mixed = partition(graph, 40), partition(graph, 40, "random")
    check_partition(found, 2708, 40)
    stats, random = partition_stats(graph, *found), partition_stats(graph, *mixed)
    assert figures(stats) == naive_stats(graph, found.perm.tolist(), found.ptr.tolist())
    assert figures(random) == naive_stats(graph, mixed.perm.tolist(), mixed.ptr.tolist())
    assert 4 * stats.edge_cut < random.edge_cut and 3 * stats.halo.sum() < random.halo.sum()
    renumbered = permute(graph, found.perm)
    assert figures(partition_stats(renumbered, np.arange(2708), found.ptr)) == figures(stats)


BAD = [
    ({"num_parts": 0}, ValueError, "num_parts needs 1 to 6, got 0"),
    ({"num_parts": 7}, ValueError, "num_parts needs 1 to 6, got 7"),
    ({"num_parts": 2.0}, TypeError, "num_parts needs an integer"),
    ({"method": "kmeans"}, ValueError, "method needs one of .*'metis'.*, got 'kmeans'"),
    ({"method": None}, ValueError, "method needs one of"),
    ({"seed": -1}, ValueError, "seed needs 0 to"),
    ({"progress": "yes"}, TypeError, "progress needs True or False"),
    ({"csr": 5}, TypeError, "csr needs a CSRGraph"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message) as caught:
        partition(**{"csr": TWO_TRIANGLES, "num_parts": 2, "method": "contiguous", **options})
    assert isinstance(caught.value, GGLSpeedupError)


BAD_CUTS = [
    ([0, 1, 2], [0, 6], ValueError, "perm needs each of the 6 nodes, got 3"),
    ([0, 1, 2, 3, 4, 6], [0, 6], IndexError, "perm needs ids from 0 to 5, got 6 at position 5"),
    ([0, 1, 2, 3, 4, 4], [0, 6], ValueError, "perm needs unique ids, got 4 again at position 5"),
    ([0.5] * 6, [0, 6], TypeError, "perm needs integers"),
    (range(6), [0], ValueError, "ptr needs the bounds of at least one part"),
    (range(6), [1, 6], ValueError, "ptr needs bounds from 0 to 6, got 1 to 6"),
    (range(6), [0, 5], ValueError, "ptr needs bounds from 0 to 6, got 0 to 5"),
    (range(6), [0, 4, 3, 6], ValueError, "ptr needs bounds that never fall"),
]


@pytest.mark.parametrize(("perm", "ptr", "error", "message"), BAD_CUTS)
def test_what_is_no_partition(perm, ptr, error, message):
    with pytest.raises(error, match=message) as caught:
        partition_stats(TWO_TRIANGLES, np.array(perm), ptr)
    assert isinstance(caught.value, GGLSpeedupError)
    if message.startswith("perm"):
        with pytest.raises(error, match=message):
            permute(TWO_TRIANGLES, np.array(perm))


def test_a_graph_without_nodes():
    empty = CSRGraph([0], [])
    with pytest.raises(ValueError, match="num_parts needs 1 to 0"):
        partition(empty, 1)
    assert permute(empty, []).num_nodes == 0


def test_without_pymetis(monkeypatch):
    monkeypatch.setattr(metis, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pymetis.*pip install \"gglspeedup\[metis\]\""):
        partition(TWO_TRIANGLES, 2)
    assert len(partition(TWO_TRIANGLES, 2, "random").perm) == 6


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit('the parts fell apart')", "ended with status 1 .*the parts fell apart"),
        ("import os; os.kill(os.getpid(), 9)", "ended with status -9"),
        ("import os; os.write(1, bytes(8))", "ended with status 0"),
    ],
)
def test_metis_fails(pymetis, monkeypatch, program, message):
    monkeypatch.setattr(metis, "_CHILD", program)
    with pytest.raises(metis.PartitionError, match=message) as caught:
        partition(TWO_TRIANGLES, 2)
    assert isinstance(caught.value, GGLSpeedupError) and isinstance(caught.value, RuntimeError)


NOISY = """
import os, pymetis
from gglspeedup import metis
real = pymetis.part_graph
pymetis.part_graph = lambda *args, **options: (os.write(1, b"a remark"), real(*args, **options))[1]
metis.serve()
"""


def test_what_metis_prints_does_no_harm(pymetis, monkeypatch):
    expected = partition(TWO_TRIANGLES, 3).perm.tolist()
    monkeypatch.setattr(metis, "_CHILD", NOISY)
    assert partition(TWO_TRIANGLES, 3).perm.tolist() == expected


def slow_metis(monkeypatch) -> None:
    """A METIS that takes many looks at it."""
    monkeypatch.setattr(metis, "_CHILD", f"import time; time.sleep(1); {metis._CHILD}")
    monkeypatch.setattr(metis, "_QUIET", 0.1)
    monkeypatch.setattr(metis, "_TICK", 0.05)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_that_metis_runs(pymetis, monkeypatch, capsys, caplog, progress):
    slow_metis(monkeypatch)
    caplog.set_level(logging.INFO, "gglspeedup")
    check_partition(partition(TWO_TRIANGLES, 2, progress=progress), 6, 2)
    shown = capsys.readouterr()
    text = "METIS of 6 nodes, 6 undirected edges, 2 parts"
    assert shown.out == "" and (shown.err.count(f"{text}: 00:0") > 3 if progress else shown.err == "")
    for line in ("making 12 edges of 6 nodes symmetric", text, "METIS took", "ordering the nodes of 2 parts"):
        assert line in caplog.text


def test_lines_show_it_without_tqdm(pymetis, monkeypatch, capsys, caplog):
    slow_metis(monkeypatch)
    monkeypatch.setattr(metis, "_LINE", 0.2)
    monkeypatch.setattr(metis, "find_spec", lambda name: None if name == "tqdm" else importlib.util.find_spec(name))
    caplog.set_level(logging.INFO, "gglspeedup")
    partition(TWO_TRIANGLES, 2)
    assert caplog.text.count("METIS has run for") > 2 and capsys.readouterr().err == ""


# Without a main guard, as scripts are written; the process of METIS must not run the script again.
SCRIPT = """
import numpy as np
from gglspeedup import CSRGraph, metis, partition
print("begins", flush=True)
metis._CHILD = {child!r}
print(partition(CSRGraph([0, 1, 2, 3, 4], [1, 0, 3, 2]), 2).ptr.tolist(), flush=True)
"""


def test_a_script_needs_no_main_guard(pymetis):
    script = SCRIPT.format(child=metis._CHILD)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["begins", "[0, 2, 4]", ""]


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_ends_it(pymetis, tmp_path):
    """The signal reaches the caller alone, as in a notebook: METIS has to be ended by it."""
    told = tmp_path / "told"
    os.mkfifo(told)
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(child=child)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    number = int(told.read_text())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in said and process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.slow
def test_a_million_nodes(pymetis, monkeypatch, capsys):
    monkeypatch.setattr(metis, "_QUIET", 0.1)  # on a fast machine METIS may be done within the usual patience
    rng = np.random.default_rng(1)
    place = np.arange(1_000_000)
    edges = np.concatenate([np.array([place, (place + step) % 1_000_000]) for step in rng.integers(1, 200, 8)], axis=1)
    shuffled = rng.permutation(1_000_000)[edges]
    graph = CSRGraph.from_edge_index(shuffled, 1_000_000)
    found = partition(graph, 100)
    check_partition(found, 1_000_000, 100)
    assert "METIS of 1000000 nodes" in capsys.readouterr().err
    stats = partition_stats(graph, *found)
    assert stats.edge_cut < graph.num_edges / 10 and max(stats.sizes) < 1.1 * 10_000
