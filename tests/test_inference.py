"""Layer-wise inference: the rows of the whole graph, whatever makes them, and however often a run was killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import inference_layers
import numpy as np
import pytest
from conftest import missing, random_graph

import gglspeedup
from gglspeedup import CGPUFeature, CSRGraph, GPUSampler, inference_tables, layerwise_inference, page_file
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, GGLSpeedupError
from gglspeedup.inference_tables import InferenceFileError

RNG = np.random.default_rng(0)
GRAPH = random_graph(RNG, 200, 9, hub=150)
X = RNG.integers(-3, 4, (200, 5)).astype(np.float64)  # whole numbers: their sums are exact in any order
WEIGHT = RNG.integers(1, 4, GRAPH.num_edges).astype(np.float64)


def add_up(x, adj):
    """The row of a target, twice, beside the weighted sum of its neighbours' rows."""
    out = np.zeros((adj.size[1], x.shape[1]))
    np.add.at(out, adj.col, x[adj.row] * WEIGHT[adj.e_id][:, None])
    return np.concatenate([2 * x[: adj.size[1]], out], 1)


def negate(x, adj):
    return -x  # rows beyond the targets' are left out


LAYERS = [add_up, negate, add_up]


def expected(graph=GRAPH, x=X):
    matrix = np.zeros((graph.num_nodes, graph.num_nodes))
    np.add.at(matrix, (np.repeat(np.arange(graph.num_nodes), graph.degree()), graph.indices), WEIGHT)
    for layer in LAYERS:
        x = -x if layer is negate else np.concatenate([2 * x, matrix @ x], 1)
    return x


def infer(layers=LAYERS, graph=GRAPH, x=X, **options):
    options = {"batch_size": 30, "device": "cpu", "progress": False, **options}
    return layerwise_inference(graph, x, layers, **options)


@pytest.mark.parametrize("batch_size", [1, 30, 200, 1000])
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_equals_the_whole_graph(batch_size, in_a_folder, tmp_path):
    found = infer(batch_size=batch_size, path=tmp_path / "run" if in_a_folder else None)
    np.testing.assert_array_equal(found, expected())
    assert found.dtype == np.float64 and isinstance(found, np.memmap) == in_a_folder


def test_what_may_be_passed():
    sampler, features = GPUSampler("cpu", GRAPH), CGPUFeature(GRAPH, "cpu")
    features.from_cpu_tensor(X)
    np.testing.assert_array_equal(infer(graph=sampler, x=features), expected())
    np.testing.assert_array_equal(infer(iter(LAYERS), (GRAPH.indptr, GRAPH.indices), X.tolist()), expected())
    numbers = infer([lambda x, adj: x + 1, lambda x, adj: x * 2], x=X[:, 0])
    np.testing.assert_array_equal(numbers, 2 * (X[:, 0] + 1))
    assert infer([lambda x, adj: x[:, :0]]).shape == (200, 0)


def test_many_stretches(monkeypatch):
    """Nodes are gone over in stretches of whole batches."""
    monkeypatch.setattr("gglspeedup.inference._STRETCH", 45)
    batches = []
    found = infer([lambda x, adj: batches.append(adj.size[1]) or add_up(x, adj), *LAYERS[1:]])
    np.testing.assert_array_equal(found, expected())
    assert batches == [30] * 6 + [20]


@pytest.mark.parametrize("in_a_folder", [False, True])
def test_prefetch_and_threads_do_not_matter(in_a_folder, tmp_path):
    real = np.random.default_rng(1).standard_normal((200, 5)).astype(np.float32)
    bits = set()
    for run, (prefetch, threads) in enumerate([(0, 1), (1, 2), (5, 1 << 20)]):
        gglspeedup.set_num_threads(threads)
        path = tmp_path / str(run) if in_a_folder else None
        bits.add(infer(x=real, prefetch=prefetch, path=path).tobytes())
    assert len(bits) == 1


@pytest.mark.parametrize("dtype", ["float16", np.float32, "bfloat16"])
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_rows_are_kept_as_asked(dtype, in_a_folder, tmp_path):
    if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        missing("ml_dtypes")
    given = []
    kept = infer(
        [lambda x, adj: x / 3, lambda x, adj: given.append(x.dtype) or x.astype(np.float64)],
        dtype=dtype, path=tmp_path / "run" if in_a_folder else None,
    )  # fmt: skip
    name = np.dtype(dtype).name
    assert kept.dtype.name == name and {kind.name for kind in given} == {name}
    np.testing.assert_array_equal(kept.astype(np.float64), (X / 3).astype(kept.dtype).astype(np.float64))


# --- models of frameworks ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # with which PyG compiles some operators
def test_pyg_models():
    for package in ("torch", "torch_geometric"):
        if importlib.util.find_spec(package) is None:
            missing(package)
    import torch
    from torch_geometric.nn import GCNConv, SAGEConv
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    torch.manual_seed(0)
    edge_index = torch.from_numpy(np.stack([GRAPH.indices, np.repeat(np.arange(200), GRAPH.degree())])).long()
    x = torch.from_numpy(X).float()
    options = {"batch_size": 30, "device": "cpu", "backend": "torch", "progress": False}
    with torch.no_grad():
        convs = [SAGEConv(5, 16), SAGEConv(16, 3)]
        layers = [
            lambda x, adj: convs[0]((x, x[: adj.size[1]]), adj.edge_index).relu(),
            lambda x, adj: convs[1]((x, x[: adj.size[1]]), adj.edge_index),
        ]
        found = layerwise_inference(GRAPH, x, layers, **options)
        whole = convs[1](convs[0](x, edge_index).relu(), edge_index)
        np.testing.assert_allclose(found, whole.numpy(), rtol=1e-4, atol=1e-5)

        edge_index, weight = gcn_norm(edge_index, num_nodes=200)
        graph = CSRGraph.from_edge_index(edge_index, 200)
        convs = [GCNConv(5, 16, normalize=False), GCNConv(16, 3, normalize=False)]
        layers = [
            lambda x, adj: convs[0](x, adj.edge_index, weight[adj.e_id]).relu(),
            lambda x, adj: convs[1](x, adj.edge_index, weight[adj.e_id]),
        ]
        found = layerwise_inference(graph, x, layers, **options)
        whole = convs[1](convs[0](x, edge_index, weight).relu(), edge_index, weight)
        np.testing.assert_allclose(found, whole.numpy(), rtol=1e-4, atol=1e-5)
    found = layerwise_inference(graph, x, layers, **options)  # gradients are left behind
    np.testing.assert_allclose(found, whole.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["tensorflow", "paddle", "jax"])
def test_every_framework(framework):
    if importlib.util.find_spec(framework) is None:
        missing(framework)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, inference_layers.__file__, framework],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert result.stdout.endswith("passed\n"), result.stderr[-3000:]


# --- interrupted ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def failing(after: int, seen: list[int]):
    """The layers, of which one raises at the call `after`; each call is noted."""

    def wrap(index, layer):
        def call(x, adj):
            if len(seen) == after:
                raise Interrupted
            seen.append(index)
            return layer(x, adj)

        return call

    return [wrap(index, layer) for index, layer in enumerate(LAYERS)]


def test_a_run_goes_on_where_it_was(tmp_path):
    """Seven batches a layer: whichever of the 21 fails, the next run computes what is left, to the same bits."""
    whole = infer(path=tmp_path / "whole").tobytes()
    for after in range(21):
        path, seen = tmp_path / str(after), []
        with pytest.raises(Interrupted):
            infer(failing(after, seen), path=path)
        again = []
        assert infer(failing(99, again), path=path).tobytes() == whole
        assert len(again) == 21 - after and seen + again == sorted(seen + again)
        assert sorted(os.listdir(path)) == ["journal", "layer-00003"]


def test_every_batch_fails_once(tmp_path):
    path, runs = tmp_path / "run", 0
    while True:
        try:
            found = infer(failing(1, []), path=path, prefetch=runs % 3)
        except Interrupted:
            runs += 1
            continue
        break
    assert runs == 20
    np.testing.assert_array_equal(found, expected())


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_inference as test
from gglspeedup import inference_tables
inference_tables._SAVE_SECONDS = float(sys.argv[4])
calls = []
def killing(x, adj):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return test.add_up(x, adj)
test.infer([killing, test.negate, killing], path=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("at", "seconds"), [(5, 0), (10, 99)])
def test_a_killed_run_goes_on(at, seconds, tmp_path):
    """Killed in the first layer, whose batches the journal has noted, and in the third, where it has layers alone."""
    path = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(path), str(at), str(seconds)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = set(os.listdir(path))
    (path / "journal.0123.part").write_bytes(b"half")  # as a kill in the middle of a write leaves it
    seen = []
    found = infer(failing(99, seen), path=path)
    np.testing.assert_array_equal(found, expected())
    done = {5: 4, 10: 14}[at]
    assert len(seen) == 21 - done
    assert len(left - {"journal"}) == (1 if at == 5 else 2)
    assert sorted(os.listdir(path)) == ["journal", "layer-00003"]


def test_ctrl_c_at_any_point(tmp_path, monkeypatch):
    """Raised in place of each call that writing the rows, their checksum and the journal consists of."""
    whole, points = infer(path=tmp_path / "whole").tobytes(), ("_crc", "_map", "_create", "_write_journal")
    for name in points:
        owner = inference_tables if hasattr(inference_tables, name) else inference_tables.FolderTables
        for after in (0, 2, 9):
            calls, original, path = [], getattr(owner, name), tmp_path / f"{name}-{after}"

            def stand_in(*arguments, original=original, calls=calls, after=after):
                calls.append(1)
                if len(calls) == after + 1:
                    raise KeyboardInterrupt
                return original(*arguments)

            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(owner, name, stand_in)
                patch.setattr(inference_tables, "_SAVE_SECONDS", 0)
                infer(path=path)
            assert infer(path=path).tobytes() == whole


def test_another_batch_size_may_finish(tmp_path):
    with pytest.raises(Interrupted):
        infer(failing(9, []), path=tmp_path / "run")
    np.testing.assert_array_equal(infer(path=tmp_path / "run", batch_size=17), expected())


def test_two_tables_exist_at_a_time(tmp_path):
    path, files = tmp_path / "run", []

    def watch(layer):
        def call(x, adj):
            files.append({name for name in os.listdir(path) if name != "journal"})
            return layer(x, adj)

        return call

    infer([watch(layer) for layer in [add_up, negate, negate, negate]], path=path)
    assert max(map(len, files)) == 2 and files[-1] == {"layer-00003", "layer-00004"}


def test_a_finished_run_is_read(tmp_path):
    first = infer(path=tmp_path / "run", tag="a")
    second = infer(failing(0, []), path=tmp_path / "run", tag="a")
    np.testing.assert_array_equal(second, first)
    assert not second.flags.writeable


# --- folders are not trusted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("csr", {"graph": CSRGraph(GRAPH.indptr, GRAPH.indices[::-1].copy())}),
        ("csr", {"graph": CSRGraph(GRAPH.indptr, GRAPH.indices, edge_ids=np.arange(GRAPH.num_edges))}),
        ("x", {"x": X + (np.arange(1000).reshape(200, 5) == 777)}),
        ("x", {"x": X.astype(np.float32)}),
        ("layers", {"layers": [*LAYERS, negate]}),
        ("dtype", {"dtype": "float32"}),
        ("tag", {"tag": "other weights"}),
    ],
)
@pytest.mark.parametrize("after", [0, 10, 99])
def test_a_run_of_something_else_is_refused(argument, change, after, tmp_path):
    path = tmp_path / "run"
    with contextlib.suppress(Interrupted):
        infer(failing(after, []), path=path)
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    with pytest.raises(ArgumentValueError, match=f"^{argument} needs what the run in .* was begun with"):
        infer(**{"path": path, **change})
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ArgumentValueError, match="path needs a new or empty folder"):
        infer(path=tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def interrupted(path: Path) -> Path:
    """A run that was stopped in its second layer."""
    with pytest.raises(Interrupted):
        infer(failing(10, []), path=path)
    assert sorted(os.listdir(path)) == ["journal", "layer-00001", "layer-00002"]
    return path


@pytest.mark.parametrize("name", ["journal", "layer-00001", "layer-00002"])
def test_damage_is_found(name, tmp_path):
    for number, change in enumerate([lambda b: b[:-1], lambda b: b[: page_file.PAGE - 9], lambda b: b"", swapped]):
        path = interrupted(tmp_path / f"{number}")
        data = (path / name).read_bytes()
        (path / name).write_bytes(change(data))
        with pytest.raises(InferenceFileError, match="path needs"):
            infer(path=path)
    if name == "journal":
        return
    path = interrupted(tmp_path / "rows")
    rows = np.memmap(path / name, np.uint8, "r+", page_file.PAGE)
    rows[80] ^= 1  # of a row that is whole in either table
    rows.flush()
    with pytest.raises(InferenceFileError, match="the rows that were written"):
        infer(path=path)
    (path / name).unlink()
    with pytest.raises(InferenceFileError, match="none there"):
        infer(path=path)


def swapped(data: bytes) -> bytes:
    """One bit of the header's text is another."""
    return data[:20] + bytes([data[20] ^ 1]) + data[21:]


def test_a_table_of_another_run_is_found(tmp_path):
    one, two = interrupted(tmp_path / "one"), tmp_path / "two"
    with pytest.raises(Interrupted):
        infer(failing(10, []), path=two, tag="other")
    (one / "layer-00001").write_bytes((two / "layer-00001").read_bytes())
    with pytest.raises(InferenceFileError, match="which says otherwise"):
        infer(path=one)


@pytest.mark.parametrize(
    "fields",
    [
        None, [], {}, "text", [1, 2, 3, 4, 5],
        [["g", "x", 200, 3, None, ""], 4, 0, ["float64", [5], 0], None],
        [["g", "x", 200, 3, None, ""], 1, 201, ["float64", [5], 0], ["float64", [5], 0]],
        [["g", "x", 200, 3, None, ""], 1, -1, ["float64", [5], 0], ["float64", [5], 0]],
        [["g", "x", 200, 3, None, ""], 1, True, ["float64", [5], 0], ["float64", [5], 0]],
        [["g", "x", 200, 3, None, ""], 1, 1, ["float64", [5], 0], None],
        [["g", "x", 200, 3, None, ""], 1, 0, None, None],
        [["g", "x", 200, 3, None], 1, 0, ["float64", [5], 0], None],
    ],
)  # fmt: skip
def test_a_journal_that_says_what_cannot_be(fields, tmp_path):
    path = interrupted(tmp_path / "run")
    (path / "journal").write_bytes(page_file.pack(inference_tables._MAGIC_JOURNAL, fields))
    with pytest.raises(InferenceFileError, match="a sound journal"):
        infer(path=path)


@pytest.mark.parametrize("kind", [["object", [5], 0], ["V8", [5], 0], ["float64", [-5], 0], ["float64", [5], "0"],
                                  ["float64", [5, 5], 0], [7, [5], 0], ["float64", [1 << 60], 0]])  # fmt: skip
def test_a_journal_of_rows_that_cannot_be(kind, tmp_path):
    path = interrupted(tmp_path / "run")
    page = (path / "journal").read_bytes()
    fields = page_file.unpack(page, inference_tables._MAGIC_JOURNAL, "", InferenceFileError, "", "")
    fields[3] = kind
    (path / "journal").write_bytes(page_file.pack(inference_tables._MAGIC_JOURNAL, fields))
    with pytest.raises(InferenceFileError, match="rows of a known kind"):
        infer(path=path)


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "run"

    def inner(x, adj):
        infer(path=path)

    with pytest.raises(ArgumentValueError, match="no other run"):
        infer([inner], path=path)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(file, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_file, "reserve", full)
    with pytest.raises(InferenceFileError, match="room on its disk"):
        infer(path=tmp_path / "run")
    monkeypatch.undo()
    np.testing.assert_array_equal(infer(path=tmp_path / "run"), expected())


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layers": []}, ArgumentValueError, "layers needs at least one layer"),
        ({"layers": negate}, ArgumentTypeError, "layers needs a sequence"),
        ({"layers": [negate, 3]}, ArgumentTypeError, "layers needs callables"),
        ({"x": None}, ArgumentTypeError, "x needs a row for each node"),
        ({"x": X[:-1]}, ArgumentValueError, "x needs shape"),
        ({"x": X.astype(str)}, ArgumentTypeError, "x needs a numeric"),
        ({"graph": CSRGraph([0], []), "x": X[:0]}, ArgumentValueError, "csr needs at least one node"),
        ({"graph": 3}, GGLSpeedupError, "csr"),
        ({"batch_size": 0}, ArgumentValueError, "batch_size needs"),
        ({"prefetch": -1}, ArgumentValueError, "prefetch needs"),
        ({"backend": "theano"}, ArgumentValueError, "backend needs"),
        ({"device": "cuda:77"}, DeviceError, "device"),
        ({"cache": "0.1Q"}, ArgumentValueError, "needs a number of bytes"),
        ({"progress": 1}, ArgumentTypeError, "progress needs"),
        ({"tag": 3}, ArgumentTypeError, "tag needs"),
        ({"tag": "long" * 1000}, ArgumentValueError, "tag needs a short text"),
        ({"dtype": "int32"}, ArgumentValueError, "dtype needs one of"),
        ({"path": 3}, ArgumentTypeError, "path needs a folder"),
    ],
)
def test_bad_arguments(change, error, words, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(error, match=words):
        infer(**{"path": path, **change})
    assert not path.exists() or os.listdir(path) == []


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (lambda x, adj: None, ArgumentValueError, r"layers\[1\] needs to return"),
        (lambda x, adj: x[: adj.size[1] - 1], ArgumentValueError, r"layers\[1\] needs to return \[30\] or \[30, F\]"),
        (lambda x, adj: x[:, :, None], ArgumentValueError, r"layers\[1\] needs to return"),
        (lambda x, adj: x.astype(str), ArgumentValueError, r"layers\[1\] needs to return"),
        (lambda x, adj: x[:, : 1 + (x[0, 0] > 0)], ArgumentValueError, r"layers\[1\] needs every batch's rows"),
        (lambda x, adj: x.astype("f4" if x[0, 0] > 0 else "f8"), ArgumentValueError, r"layers\[1\] needs every batch"),
    ],
)
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_bad_layers(layer, error, words, in_a_folder, tmp_path):
    with pytest.raises(error, match=words):
        signs = np.where(np.arange(200) < 100, 1.0, -1.0)  # by which a layer tells the first batches from the last
        path = tmp_path / "run" if in_a_folder else None
        infer([lambda x, adj: x, layer], x=np.repeat(signs[:, None], 5, 1), path=path)


@pytest.mark.slow
def test_a_sharded_graph_runs_in_memory_alone(tmp_path):
    sampler = gglspeedup.MultiGPUSampler("cpu", GRAPH, devices=["cpu", "cpu"], sizes=[-1]).sampler(1)
    np.testing.assert_array_equal(infer(graph=sampler), expected())
    with pytest.raises(ArgumentTypeError, match="csr needs a CSRGraph"):
        infer(graph=sampler, path=tmp_path / "run")


def test_progress_is_shown(monkeypatch, capsys, caplog, tmp_path):
    if importlib.util.find_spec("tqdm") is None:
        missing("tqdm")
    from gglspeedup import progress

    monkeypatch.setattr(progress, "_QUIET", 0)
    with pytest.raises(Interrupted):
        infer(failing(10, []), path=tmp_path / "run")
    assert capsys.readouterr().err == ""
    infer(path=tmp_path / "run", progress=True)
    shown = capsys.readouterr().err
    assert "inference: 100%" in shown and "600/600" in shown and "inference:   0%" not in shown
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "_LINE", 0)
    caplog.set_level("INFO", "gglspeedup")
    infer(progress=True)
    assert "inference: 600 of 600 nodes" in caplog.text and capsys.readouterr().err == ""


# --- memory --------------------------------------------------------------------------------------------------------

ANONYMOUS = """
import sys
import numpy as np
from gglspeedup import CSRGraph, layerwise_inference
nodes, layers = int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
graph = CSRGraph(np.arange(nodes + 1) * 4, rng.integers(0, nodes, 4 * nodes))
x = np.memmap(sys.argv[1] + "/x", np.float32, "w+", shape=(nodes, 256))
taken = []
def layer(x, adj):
    with open("/proc/self/status", encoding="ascii") as file:
        taken.append(next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
    return x[: adj.size[1]] + 1
out = layerwise_inference(graph, x, [layer] * layers, batch_size=500, device="cpu", path=sys.argv[1] + "/run",
                          progress=False)
assert out[::1000].min() == layers == out[::1000].max()
print(max(taken) - taken[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says what a process took")
def test_memory_does_not_grow_with_nodes_and_layers(tmp_path):
    """Tables of 100 MB each, of which none is in memory of the process's own."""
    (tmp_path / "a").mkdir()
    command = [sys.executable, "-c", ANONYMOUS, str(tmp_path / "a"), "100000", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 40 << 20
