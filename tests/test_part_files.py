"""Partitions on disk: equal to naive ones, whole after any interruption, and not trusted when they are read."""

from __future__ import annotations

import errno
import importlib.util
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import missing
from test_part_book import check_part, naive_owners

from gglspeedup import CSRGraph, GGLSpeedupError, graph_file, page_file, partition
from gglspeedup.__main__ import main
from gglspeedup.distributed import GraphPart, PartBook, meta, outputs, part_writer, partition_to_disk, verify_partition
from gglspeedup.distributed import verify as verifying
from gglspeedup.distributed.journal import JOURNAL, locked
from gglspeedup.errors import GraphFileError, PartFileError

NODES, PARTS = 1000, 3
SMALL = "64K"  # pieces of 128 rows and about 2000 edges


def made_graph(edge_ids: bool = False) -> CSRGraph:
    """Rows longer than a piece of edges, and more empty ones in a row than a piece of rows."""
    rng = np.random.default_rng(8)
    degree = rng.integers(0, 9, NODES)
    degree[[0, 500, 999]] = 5000
    degree[501:800] = 0
    indptr = np.concatenate([[0], np.cumsum(degree)])
    ids = rng.permutation(indptr[-1]) if edge_ids else None
    return CSRGraph(indptr, rng.integers(0, NODES, indptr[-1]), edge_ids=ids)


GRAPH, WITH_IDS = made_graph(), made_graph(edge_ids=True)
X = np.random.default_rng(1).random((NODES, 7)).astype(np.float32)
Y = np.random.default_rng(2).integers(0, 9, NODES).astype(">i2")
OWNERS = np.random.default_rng(3).choice([0, 2, 3], NODES)  # part 1 of 4 is empty


@pytest.fixture
def small_pieces(monkeypatch):
    """Many checkpoints, and many checksums a file."""
    monkeypatch.setattr(part_writer, "_CHECKPOINT", 1)
    for module in (outputs, meta, verifying):
        monkeypatch.setattr(module, "CHECKED_BYTES", 1000)


def written(folder, graph=WITH_IDS, method="random", **options):
    given = {"features": X, "labels": Y, "memory": SMALL, "progress": False, **options}
    return partition_to_disk(graph, folder, given.pop("num_parts", PARTS), method, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_partition(folder: Path, graph: CSRGraph, owners: np.ndarray, num_parts: int, verify: bool = True) -> None:
    for index in range(num_parts):
        for mmap in (True, False):
            part = GraphPart.load(folder, index, mmap, verify=verify)
            assert np.array_equal(naive_owners(part.book), owners) and part.book.num_parts == num_parts
            check_part(part, graph, owners, index)
            assert part.features.dtype == X.dtype and np.array_equal(part.features, X[owners == index])
            assert part.labels.dtype == np.int16 and np.array_equal(part.labels, Y[owners == index])
            assert part.fingerprint == GraphPart.of(graph, part.book, index).fingerprint


def naive_cuts(graph: CSRGraph, num_parts: int, balance: str) -> np.ndarray:
    whole = graph.num_edges if balance == "edges" else NODES
    shares = [whole * i // num_parts for i in range(1, num_parts)]
    if balance == "edges":
        shares = np.searchsorted(graph.indptr, shares).tolist()
    return np.repeat(np.arange(num_parts), np.diff([0, *shares, NODES]))


def naive_random(seed: int, num_parts: int) -> np.ndarray:
    words = np.random.Philox(key=seed).random_raw(NODES).tolist()
    return np.array([(word >> 32) * num_parts >> 32 for word in words])


CASES = {
    "by edges": ("contiguous", {}, 5, lambda graph: naive_cuts(graph, 5, "edges")),
    "by nodes": ("contiguous", {"balance": "nodes"}, 5, lambda graph: naive_cuts(graph, 5, "nodes")),
    "one part": ("contiguous", {}, 1, lambda graph: np.zeros(NODES, np.int64)),
    "random": ("random", {"seed": 2**64 - 1}, 4, lambda graph: naive_random(2**64 - 1, 4)),
    "owners": ("owners", {"owners": OWNERS}, 4, lambda graph: OWNERS),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("graph", [GRAPH, WITH_IDS], ids=["positions", "edge ids"])
@pytest.mark.parametrize("memory", [SMALL, "2G"])
def test_equals_naive(tmp_path, small_pieces, case, graph, memory):
    method, options, num_parts, naive = CASES[case]
    found = written(tmp_path / "out", graph, method, num_parts=num_parts, memory=memory, **options)
    owners = naive(graph)
    assert found.nodes == np.bincount(owners, minlength=num_parts).tolist()
    assert found.edges == np.bincount(owners, graph.degree(), num_parts).astype(int).tolist()
    check_partition(tmp_path / "out", graph, owners, num_parts)
    assert verify_partition(tmp_path / "out", progress=False) > graph.num_edges * 4
    assert not list((tmp_path / "out").glob("*.part*l"))  # no name of an unfinished file


@pytest.mark.slow
@pytest.mark.parametrize("method", ["contiguous", "random"])
def test_many_parts(tmp_path, method):
    """More than nodes, and more than one byte counts."""
    num_parts = 1200
    written(tmp_path / "out", GRAPH, method, num_parts=num_parts)
    owners = naive_cuts(GRAPH, num_parts, "edges") if method == "contiguous" else naive_random(0, num_parts)
    for index in (0, 1, 600, owners[0], owners[500], owners[999]):
        check_part(GraphPart.load(tmp_path / "out", index, verify=True), GRAPH, owners, index)
    verify_partition(tmp_path / "out", progress=False)


def test_metis(tmp_path):
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    GRAPH.save(tmp_path / "graph")
    written(tmp_path / "out", tmp_path / "graph", "metis", seed=4)
    perm, ptr = partition(GRAPH, PARTS, "metis", seed=4)
    owners = np.empty(NODES, np.int64)
    for part in range(PARTS):
        owners[perm[ptr[part] : ptr[part + 1]]] = part
    check_partition(tmp_path / "out", GRAPH, owners, PARTS)


def test_sources_do_not_matter(tmp_path, small_pieces):
    """In memory, mapped, in a file; features in an array or a .npy: the same bytes, whatever the memory."""
    WITH_IDS.save(tmp_path / "graph")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(X))
    expected = written(tmp_path / "memory")
    for name, graph, options in (
        ("mapped", CSRGraph.load(tmp_path / "graph"), {}),
        ("path", tmp_path / "graph", {"features": tmp_path / "x.npy", "labels": tmp_path / "y.npy"}),
        ("str", str(tmp_path / "graph"), {"features": str(tmp_path / "fortran.npy"), "memory": 1 << 24}),
        ("pair", WITH_IDS, {"features": np.load(tmp_path / "x.npy", mmap_mode="r")}),
    ):
        assert written(tmp_path / name, graph, **options) == expected
        assert contents(tmp_path / name) == contents(tmp_path / "memory"), name


@pytest.mark.parametrize("nodes", [0, 1, 5])
def test_graphs_without_edges(tmp_path, nodes):
    graph = CSRGraph(np.zeros(nodes + 1, np.int64), [])
    graph.save(tmp_path / "graph")
    for method in ("contiguous", "random"):
        partition_to_disk(tmp_path / "graph", tmp_path / method, 3, method, progress=False)
        parts = [GraphPart.load(tmp_path / method, index, verify=True) for index in range(3)]
        assert sum(part.num_nodes for part in parts) == nodes and all(part.num_edges == 0 for part in parts)
        if method == "contiguous":
            assert [part.num_nodes for part in parts] == np.diff([0, nodes // 3, nodes * 2 // 3, nodes]).tolist()


def test_a_loaded_part_travels_as_its_path(tmp_path):
    written(tmp_path / "out")
    part = GraphPart.load(tmp_path / "out", 1)
    assert len(pickle.dumps(part)) < 1000 and not part.indices.flags.owndata
    again = pickle.loads(pickle.dumps(part))
    assert np.array_equal(again.indices, part.indices) and again.index == 1


def test_finished_and_other_requests(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first = written(folder)
    before = contents(folder)
    other = CSRGraph(np.r_[0, 1, WITH_IDS.indptr[2:]], WITH_IDS.indices, edge_ids=WITH_IDS.edge_ids)
    monkeypatch.setattr(outputs.Outputs, "append", None)  # nothing is written any more
    assert written(folder) == first and contents(folder) == before
    for options, match in (
        ({"num_parts": 4}, "num_parts needs"),
        ({"method": "contiguous"}, "method needs"),
        ({"seed": 1}, "seed needs"),
        ({"features": None}, "features needs"),
        ({"features": X[:, :2]}, "features needs"),
        ({"graph": GRAPH}, "edge_ids needs"),
        ({"graph": other}, "graph needs"),
    ):
        with pytest.raises(GGLSpeedupError, match=match):
            written(folder, **options)
    assert contents(folder) == before


KILLED = """
import os, signal, sys
import numpy as np
import test_part_files as tests
from gglspeedup.distributed import outputs, part_writer

owner, name = {"replace": (os, "replace"), "write_meta": (part_writer, "write_meta")}.get(
    sys.argv[3], (outputs.Outputs, sys.argv[3]))
function, left = getattr(owner, name), int(sys.argv[4])

def deadly(*arguments):
    global left
    left -= 1
    if left == 0 and name == "replace":
        os.kill(os.getpid(), signal.SIGKILL)
    found = function(*arguments)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

setattr(owner, name, deadly)
part_writer._CHECKPOINT = int(sys.argv[2])
tests.written(sys.argv[1])
"""
# What is being done when the process dies: the how manieth call of which function.
MOMENTS = [
    ("append", 1), ("append", 4), ("append", 30), ("append", 100), ("append", 130), ("append", 150), ("finish", 4),
    ("reveal", 2), ("write_meta", 1), ("replace", 1), ("replace", 6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count", "checkpoint"),
    [pytest.param("append", 100, 1), *(
        pytest.param(name, count, checkpoint, marks=pytest.mark.slow)
        for checkpoint, moments in ((1, MOMENTS), (1 << 30, MOMENTS[1::3])) for name, count in moments
        if (name, count, checkpoint) != ("append", 100, 1)
    )],
)  # fmt: skip
def test_killed_and_gone_on(tmp_path, name, count, checkpoint):
    """SIGKILL at any moment, and the next run leaves what an uninterrupted one does, byte for byte."""
    folder = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folder), str(checkpoint), name, str(count)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    if name != "write_meta":
        with pytest.raises(PartFileError, match="finished by the command that began it"):
            GraphPart.load(folder, 0)
    written(folder)
    written(tmp_path / "at once")
    assert contents(folder) == contents(tmp_path / "at once")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", ["random", "contiguous"])
def test_no_work_is_done_twice(tmp_path, small_pieces, monkeypatch, method):
    """Interrupted again and again, a run still ends, and writes no more than one piece again each time."""
    append, calls, most = outputs.Outputs.append, 0, 12

    def counting(self, array, values):
        nonlocal calls
        calls += 1
        return append(self, array, values)

    monkeypatch.setattr(outputs.Outputs, "append", counting)
    written(tmp_path / "at once", method=method)
    at_once, calls = calls, 0

    def failing(self, array, values):
        nonlocal calls
        calls += 1
        if calls % most == 0:
            raise Interrupted
        return append(self, array, values)

    monkeypatch.setattr(outputs.Outputs, "append", failing)
    runs = 0
    while True:
        runs += 1
        try:
            written(tmp_path / "out", method=method)
            break
        except Interrupted:
            pass
    a_piece = 3 * PARTS  # writes of a piece, and of the first one
    assert runs > 4 and calls <= at_once + runs * a_piece
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    verify_partition(tmp_path / "out", progress=False)


def interrupted(folder, monkeypatch, calls, error=Interrupted, **options):
    """Begin a partition whose run fails at a write."""
    with monkeypatch.context() as patch:
        append, left = outputs.Outputs.append, [calls]

        def failing(self, array, values):
            left[0] -= 1
            if left[0] == 0:
                raise error
            return append(self, array, values)

        patch.setattr(outputs.Outputs, "append", failing)
        written(folder, **options)


def test_the_rest_must_be_of_the_same_graph(tmp_path, small_pieces, monkeypatch):
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        interrupted(folder, monkeypatch, 100)
    assert b'"stage": "edges"' in (folder / JOURNAL).read_bytes()
    other = CSRGraph(WITH_IDS.indptr, (WITH_IDS.indices + 1) % NODES, edge_ids=WITH_IDS.edge_ids)
    with pytest.raises(GGLSpeedupError, match="indices needs the indices that the partition there was begun with"):
        written(folder, other)
    for options, match in (({"num_parts": 4}, "begun with, 3, got 4"), ({"method": "contiguous"}, "method needs")):
        with pytest.raises(GGLSpeedupError, match=match):
            written(folder, **options)
    journal = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(journal[:-30] + b"0" + journal[-29:])
    with pytest.raises(PartFileError):
        written(folder)
    (folder / JOURNAL).write_bytes(journal)
    written(folder)
    verify_partition(folder, progress=False)


def test_a_folder_of_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GGLSpeedupError, match="folder needs a new or empty folder"):
        written(tmp_path)
    (tmp_path / "out").mkdir()
    with locked(str(tmp_path / "out")), pytest.raises(GGLSpeedupError, match="folder needs no other run"):
        written(tmp_path / "out")
    written(tmp_path / "out")


def test_disk_full_while_writing(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PartFileError, match=r"room on its disk.*goes on where it was"):
        interrupted(tmp_path / "out", monkeypatch, 40, full)
    with pytest.raises(OSError, match="broken") as raised:  # another error stays what it is
        interrupted(tmp_path / "out", monkeypatch, 2, OSError(errno.EIO, "broken"))
    assert not isinstance(raised.value, GGLSpeedupError)
    written(tmp_path / "out")
    verify_partition(tmp_path / "out", progress=False)


def test_disk_too_small_from_the_start(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5, 5))
        with pytest.raises(PartFileError, match="bytes of room on its disk, got 5"):
            written(tmp_path / "out")
    written(tmp_path / "out")


def test_a_limit_of_file_sizes(tmp_path):
    """The system's own refusal, from the command line; with room, the same command goes on."""
    GRAPH.save(tmp_path / "graph")
    command = [sys.executable, "-m", "gglspeedup", "partition", tmp_path / "graph", tmp_path / "out", "--parts", "2"]

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    refused = subprocess.run(command, preexec_fn=small_files, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "error: folder needs room on its disk" in refused.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    verify_partition(tmp_path / "out", progress=False)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found(tmp_path, small_pieces, capsys):
    folder = tmp_path / "out"
    written(folder)
    for name, data in contents(folder).items():
        if name == meta.META:
            continue
        for at in (page_file.PAGE, (page_file.PAGE + len(data)) // 2, len(data) - 1):
            flip(folder / name, at)
            with pytest.raises(PartFileError, match=f"'{name}' differs in bytes"):
                verify_partition(folder, progress=False)
            index = int(name[5:10]) if "/" in name else 0
            with pytest.raises(PartFileError):
                GraphPart.load(folder, index, verify=True)
            if "/" in name:
                GraphPart.load(folder, (index + 1) % PARTS, verify=True)  # the others are whole
            flip(folder / name, at)
    assert main(["verify", str(folder), "--quiet"]) == 0 and "all as written" in capsys.readouterr().out
    flip(folder / "part-00002" / "features", -1)
    assert main(["verify", str(folder), "--quiet"]) == 1 and "part-00002/features" in capsys.readouterr().err


def test_files_are_not_trusted(tmp_path):
    """Headers and sizes are checked by every load, before anything is allocated."""
    folder, other = tmp_path / "out", tmp_path / "other"
    written(folder)
    written(other, GRAPH)
    good = folder / "part-00001" / "indices"
    data = good.read_bytes()
    page = page_file.PAGE
    huge = page_file.pack(data[:8], {"part": 1, "name": "indices", "dtype": "<i4", "shape": [1 << 47], "graph": ""})
    for bad, match in (
        (b"", "does not start as one"),
        (data[:100], "does not start as one"),
        (b"X" + data[1:], "does not start as one"),
        (data[:50] + bytes([data[50] ^ 1]) + data[51:], "header is damaged"),
        (data[:-1], f"a file of {len(data)} bytes"),
        (data + b"0", f"a file of {len(data)} bytes"),
        ((folder / "part-00002" / "indices").read_bytes(), "indices of part 1 of"),
        ((folder / "part-00001" / "edge_ids").read_bytes(), "indices of part 1 of"),
        ((other / "part-00001" / "indices").read_bytes(), "indices of part 1 of the graph"),
        (huge + data[page:], "which says"),
        (page_file.pack(data[:8], [1]) + data[page:], "which says"),
    ):
        good.write_bytes(bad)
        with pytest.raises(PartFileError, match=match):
            GraphPart.load(folder, 1)
        with pytest.raises(PartFileError, match=match):
            verify_partition(folder, progress=False)
        GraphPart.load(folder, 0)
    good.unlink()
    with pytest.raises(PartFileError, match="none in"):
        GraphPart.load(folder, 1)
    good.write_bytes(data)
    for name, values, match in (
        ("indices", np.full(1, NODES, "<i4"), "indices needs node ids"),
        ("indptr", np.array([0, 1 << 60], "<i8"), "indptr needs"),
        ("start", np.array([1 << 60], "<i8"), "start needs"),
        ("start", np.array([-1], "<i8"), "start needs"),
        ("../owners", np.array([PARTS], "u1"), "owners needs"),
        ("../owners", np.array([0, 0, 0, 0, 0, 0, 0, 0], "u1"), "owners needs"),
    ):
        path = folder / "part-00001" / name
        before = path.read_bytes()
        path.write_bytes(before[:page] + values.tobytes() + before[page + values.nbytes :])
        with pytest.raises(PartFileError, match=f"sound arrays.*{match}"):
            GraphPart.load(folder, 1)
        path.write_bytes(before)
    GraphPart.load(folder, 1, verify=True)


def test_meta_is_not_trusted(tmp_path):
    folder = tmp_path / "out"
    found = written(folder)
    path = folder / meta.META
    good = path.read_bytes()
    fields = {**found._asdict(), "request": found.request._asdict()}

    def sealed(version=meta.VERSION, **changes):
        data = meta.seal({**fields, **changes})
        return data if version == meta.VERSION else data.replace(b'"version": 1', b'"version": %d' % version)

    def asked(**changes):
        return sealed(request={**fields["request"], **changes})

    for bad, match in (
        (b"", "which is none"),
        (good[:200], "which is none"),
        (b"[" * 100_000, "which is none"),
        (b'{"content": {"format": "other"}}', "which is none"),
        (b"null", "which is none"),
        (good.replace(b"1000", b"1001", 1), "damaged"),
        (sealed(version=0), "version 1 of the format, got .* of version 0"),
        (sealed(version=2), "of version 2"),
        (sealed(nodes=[NODES]), "sound contents"),
        (sealed(nodes="abc"), "sound contents"),
        (sealed(nodes=[1 << 62, 0, 0]), "sound contents"),
        (sealed(edges=None), "sound contents"),
        (sealed(checksums={}), "sound contents"),
        (sealed(checksums=[1]), "sound contents"),
        (sealed(ptr=[0, 1, 2, NODES]), "sound contents"),
        (sealed(more=1), "sound contents"),
        (sealed(request=None), "sound contents"),
        (asked(num_nodes=1 << 45), "sound contents"),
        (asked(num_parts=-1), "sound contents"),
        (asked(num_parts=1 << 40), "sound contents"),
        (asked(num_nodes=1000.0), "sound contents"),
        (asked(index_dtype="O"), "sound contents"),
        (asked(features=["O", []]), "sound contents"),
        (asked(features=["<f4", [1 << 60]]), "sound contents"),
        (asked(features=5), "sound contents"),
        (asked(features=["<f4,<f4", [2]]), "sound contents"),
        (asked(edge_ids=False), "sound contents"),
    ):
        path.write_bytes(bad)
        with pytest.raises(PartFileError, match=match):
            GraphPart.load(folder, 0)
        with pytest.raises(PartFileError, match=match):
            written(folder)
    path.write_bytes(good)
    GraphPart.load(folder, 0, verify=True)
    with pytest.raises(PartFileError, match="a finished partition"):
        GraphPart.load(tmp_path / "nowhere", 0)
    with pytest.raises(PartFileError, match="a finished partition"):
        GraphPart.load(path, 0)
    with pytest.raises(GGLSpeedupError, match="index needs 0 to 2"):
        GraphPart.load(folder, 3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_parts": 0}, "num_parts needs"),
        ({"num_parts": 65537}, "num_parts needs"),
        ({"method": "best"}, "method needs"),
        ({"balance": "nodes"}, "balance needs nothing for 'random'"),
        ({"method": "contiguous", "balance": "bytes"}, "balance needs"),
        ({"seed": -1}, "seed needs"),
        ({"memory": "1K"}, "memory needs"),
        ({"memory": "1Q"}, "memory needs"),
        ({"progress": 1}, "progress needs"),
        ({"owners": OWNERS}, "owners needs"),
        ({"method": "owners"}, "owners needs"),
        ({"method": "owners", "owners": OWNERS[:9]}, "owners needs 1000 rows"),
        ({"method": "owners", "owners": X}, "owners needs"),
        ({"method": "owners", "owners": OWNERS.astype(float)}, "owners needs integers"),
        ({"method": "owners", "owners": OWNERS}, "owners needs ids from 0 to 2, got 3 at position"),
        ({"features": X[:9]}, "features needs 1000 rows"),
        ({"labels": np.array([None] * NODES)}, "labels needs"),
        ({"labels": np.array(["a"] * NODES)}, "labels needs"),
        ({"graph": 5}, "csr needs"),
    ],
)
def test_bad_arguments(tmp_path, options, match):
    with pytest.raises(GGLSpeedupError, match=match):
        written(tmp_path / "out", **options)


def test_bad_graphs_and_arrays(tmp_path):
    """What a graph file says is checked while it is read; objects are not unpickled."""
    GRAPH.save(tmp_path / "graph")
    for begin, value, error in (
        (graph_file.sections(str(tmp_path / "graph"))[0].begin + 80, 1 << 60, "indptr needs"),
        (graph_file.sections(str(tmp_path / "graph"))[0].begin, -1, "indptr needs"),
        (graph_file.sections(str(tmp_path / "graph"))[1].begin + 40, 1 << 30, "indices needs.*at position 10"),
    ):
        data = bytearray((tmp_path / "graph").read_bytes())
        data[begin : begin + 8] = np.array([value], "<i8").tobytes()
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(GGLSpeedupError, match=error):
            written(tmp_path / "out", tmp_path / "bad")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(GraphFileError):
        written(tmp_path / "out", Path(__file__))
    with pytest.raises(FileNotFoundError):
        written(tmp_path / "out", tmp_path / "nothing")
    np.save(tmp_path / "objects.npy", np.array([{}] * NODES), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name in ("objects.npy", "cut.npy", "graph"):
        with pytest.raises(GGLSpeedupError, match=r"features needs a \.npy file of numbers"):
            written(tmp_path / "out", features=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys):
    GRAPH.save(tmp_path / "graph")
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "owners.npy", OWNERS)
    graph, out = str(tmp_path / "graph"), tmp_path / "out"
    command = ["partition", graph, str(out), "--parts", "4", "--method", f"file:{tmp_path / 'owners.npy'}", "--quiet"]
    assert main([*command, "--features", str(tmp_path / "x.npy"), "--memory", "1M"]) == 0
    assert "4 parts of 0 to" in capsys.readouterr().out
    assert np.array_equal(GraphPart.load(out, 2).features, X[OWNERS == 2])
    assert main(command) == 1 and "error: features needs" in capsys.readouterr().err
    assert main(["partition", graph, str(tmp_path / "b"), "--parts", "2", "--balance", "nodes", "--quiet"]) == 0
    assert isinstance(GraphPart.load(tmp_path / "b", 0).book, PartBook)
    assert main(["verify", str(tmp_path / "b"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "c"), "--quiet"]) == 1 and "finished partition" in capsys.readouterr().err
    assert main(["partition", str(tmp_path / "c"), str(out), "--parts", "2"]) == 1
    with pytest.raises(SystemExit):
        main(["partition", graph])


def test_progress_is_shown(tmp_path, monkeypatch, capsys, caplog):
    from gglspeedup import progress

    monkeypatch.setattr(progress, "_QUIET", 0)
    written(tmp_path / "bar", progress=True)
    verify_partition(tmp_path / "bar")
    shown = capsys.readouterr().err
    assert "partition: 100%" in shown and "verify: 100%" in shown
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_LINE", 0)
    caplog.set_level("INFO", "gglspeedup")
    written(tmp_path / "lines", progress=True)
    assert "MiB" in caplog.text and capsys.readouterr().err == ""


PEAK = """
import sys
from gglspeedup.distributed import partition_to_disk
partition_to_disk(sys.argv[1], sys.argv[2], 4, sys.argv[3], memory="32M", progress=False)
with open("/proc/self/status", encoding="ascii") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says what a process took")
@pytest.mark.parametrize("method", ["contiguous", "random"])
def test_memory_does_not_grow_with_the_edges(tmp_path, method):
    """Of 500 thousand nodes with 1 million and with 30 million edges, which take 120 MB."""
    peaks = []
    for edges in (1_000_000, 1_000_000, 30_000_000):  # kernels are compiled, at the first time
        path = tmp_path / f"{edges}"
        indptr = np.linspace(0, edges, 500_001).astype(np.int64)
        graph_file.write(str(path), indptr, np.zeros(edges, np.int32), None)
        command = [sys.executable, "-c", PEAK, path, tmp_path / f"{edges}-out", method]
        shutil.rmtree(tmp_path / f"{edges}-out", ignore_errors=True)
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024)
    assert peaks[2] - peaks[1] < 40 << 20
