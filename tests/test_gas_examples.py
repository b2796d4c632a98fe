"""The examples of GNNAutoScale: block models against their definition, what is measured, the demos as they are run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import missing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import gas_gcnii, gas_gin
from demo.gas_gin import BETWEEN, CLUSTERS, LAYERS, LEAST, MODES, MOST, WITHIN, SmoothGIN, block_models
from gglspeedup import HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters.pyg_models import GCNII, GIN
from gglspeedup.normalise import symmetric_normalisation

ROOT = Path(__file__).resolve().parent.parent
NODES = 150


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a made graph for Cora: 150 nodes whose neighbours and features mostly tell the class."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), NODES // 3)
    same = rng.integers(0, 50, (NODES, 4)) + 50 * y[:, None]
    other = np.where(rng.random((NODES, 4)) < 0.8, same, rng.integers(0, NODES, (NODES, 4)))
    linked = np.zeros((NODES, NODES), bool)
    linked[np.arange(NODES)[:, None], other] = True
    linked |= linked.T
    x = np.zeros((NODES, 30), np.float32)
    x[np.arange(NODES), np.where(rng.random(NODES) < 0.7, y, rng.integers(0, 30, NODES))] = 1
    number = np.arange(NODES) % 50
    masks = {"train_mask": number < 8, "val_mask": (number >= 8) & (number < 20), "test_mask": number >= 20}
    indptr = np.concatenate([[0], np.cumsum(linked.sum(1))])
    np.savez(tmp_path / "cora.npz", indptr=indptr, indices=np.nonzero(linked)[1], x=x, y=y, **masks)
    return tmp_path


# --- block models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks() -> gas_gin.Blocks:
    return block_models(150, 3)


def edges(blocks: gas_gin.Blocks) -> tuple[np.ndarray, np.ndarray]:
    graph = blocks.graph
    return np.repeat(np.arange(graph.num_nodes), np.diff(graph.indptr)), graph.indices.astype(np.int64)


def test_block_models_are_simple_graphs_side_by_side(blocks: gas_gin.Blocks) -> None:
    target, source = edges(blocks)
    assert len(blocks.ptr) == 151 and blocks.ptr[-1] == len(blocks.y) == blocks.graph.num_nodes
    owner = np.repeat(np.arange(150), np.diff(blocks.ptr))
    assert np.array_equal(owner[target], owner[source]) and not np.any(target == source)
    pairs = target * len(blocks.y) + source
    assert np.all(np.diff(pairs) > 0)  # none twice
    np.testing.assert_array_equal(np.sort(source * len(blocks.y) + target), pairs)


def test_clusters_have_the_sizes_of_the_definition(blocks: gas_gin.Blocks) -> None:
    owner = np.repeat(np.arange(150), np.diff(blocks.ptr))
    sizes = np.bincount(owner * CLUSTERS + blocks.y, minlength=150 * CLUSTERS)
    assert (sizes.min(), sizes.max()) == (LEAST, MOST) == (5, 35)
    assert abs(sizes.mean() - 20) < 4 * np.sqrt((31**2 - 1) / 12 / len(sizes))
    assert len(np.unique(sizes)) == 31


def test_one_node_of_each_cluster_tells_its_label(blocks: gas_gin.Blocks) -> None:
    assert blocks.x.shape == (len(blocks.y), 7) and blocks.x.dtype == np.float32
    np.testing.assert_array_equal(np.sort(blocks.x, axis=1)[:, -2:], [[0, 1]] * len(blocks.y))
    label = blocks.x.argmax(axis=1)
    telling = np.flatnonzero(label)
    np.testing.assert_array_equal(label[telling] - 1, blocks.y[telling])
    owner = np.repeat(np.arange(150), np.diff(blocks.ptr))
    assert np.array_equal(np.bincount(owner[telling] * CLUSTERS + blocks.y[telling]), np.ones(150 * CLUSTERS))
    first = np.concatenate([[True], (np.diff(owner) != 0) | (np.diff(blocks.y) != 0)])
    share = first[telling].mean()  # of telling nodes that are their cluster's first: 1 of its size
    assert 0.03 < share < 0.15


def test_edges_have_the_probabilities_of_the_definition(blocks: gas_gin.Blocks) -> None:
    target, source = edges(blocks)
    owner = np.repeat(np.arange(150), np.diff(blocks.ptr))
    sizes = np.bincount(owner * CLUSTERS + blocks.y, minlength=150 * CLUSTERS)
    within = int((sizes * (sizes - 1)).sum()) // 2
    between = int((np.diff(blocks.ptr) ** 2).sum() - (sizes**2).sum()) // 2
    same = blocks.y[target] == blocks.y[source]
    for found, pairs, probability in ((same.sum() / 2, within, WITHIN), ((~same).sum() / 2, between, BETWEEN)):
        assert abs(found / pairs - probability) < 4 * np.sqrt(probability * (1 - probability) / pairs)
    assert (CLUSTERS, WITHIN, BETWEEN) == (6, 0.55, 0.25)


def test_block_models_depend_on_their_seed_alone() -> None:
    first, again, other = block_models(3, 1), block_models(3, 1), block_models(3, 2)
    for one, two in ((first.x, again.x), (first.y, again.y), (first.graph.indices, again.graph.indices)):
        np.testing.assert_array_equal(one, two)
    assert len(first.y) != len(other.y) or not np.array_equal(first.graph.indices, other.graph.indices)


# --- the regulariser, and the error it is about --------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[SubgraphLoader, np.ndarray]:
    """Three block models in four parts of random nodes."""
    blocks = block_models(3, 5)
    perm, ptr = partition(blocks.graph, 4, "random")
    options = {"ptr": ptr, "batch_size": 1, "shuffle": False, "backend": "torch", "device": "cpu"}
    return SubgraphLoader(permute(blocks.graph, perm), blocks.x[perm], blocks.y[perm], **options), perm


def test_the_regulariser(problem) -> None:
    (whole,) = problem[0].evaluation(batch_size=4)
    torch.manual_seed(0)
    model = SmoothGIN(0.3)
    plain = GIN(7, gas_gin.HIDDEN, CLUSTERS, LAYERS)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    out, expected = model(whole), plain(whole)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)  # the regulariser is not in the output
    x, penalty, copy = whole.x, 0.0, GIN(7, gas_gin.HIDDEN, CLUSTERS, LAYERS)
    copy.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    for index in range(LAYERS):
        clean = copy.layer(index, x, whole, {})
        if index:
            penalty += ((copy.layer(index, x + 0.3 * torch.randn_like(x), whole, {}) - clean) ** 2).sum() / len(x)
        x = clean
    assert float(penalty.detach()) > 0.01
    torch.testing.assert_close(model.penalty, penalty, rtol=1e-4, atol=1e-6)
    model.penalty.backward()
    assert any(bool(part.grad.any()) for part in model.convs[-1].parameters())
    for quiet in (SmoothGIN(0.0), model.eval()):
        quiet.penalty = torch.zeros(())
        quiet(whole)
        assert float(quiet.penalty) == 0


def test_the_error_of_histories(problem) -> None:
    loader, _ = problem
    (whole,) = loader.evaluation(batch_size=4)
    batch = next(iter(loader))
    halo = batch.n_id[batch.batch_size :]
    assert len(halo) > 50
    torch.manual_seed(0)
    model = SmoothGIN(0.3).train()
    store = HistoryStore(len(whole.n_id), model.history_widths, "cpu")
    model.histories = store
    state = {name: part.clone() for name, part in model.state_dict().items()}
    distance, length = gas_gin.history_error(model, store, whole, batch)
    np.testing.assert_allclose(distance, length, rtol=1e-6)  # nothing was pushed: tables are zero
    assert min(length) > 0.1
    for name, part in model.state_dict().items():
        assert torch.equal(part, state[name])  # running statistics, too
    model.noise, model.histories = 0.0, store
    model(whole)
    exact = gas_gin.history_error(model, store, whole, batch)[0]
    assert max(exact) < 1e-5
    store[1].push(store[1].pull(halo) + np.full((len(halo), gas_gin.HIDDEN), 0.5, np.float32), halo)
    moved = gas_gin.history_error(model, store, whole, batch)[0]
    np.testing.assert_allclose(moved, [0, 0.5 * np.sqrt(gas_gin.HIDDEN), 0], atol=1e-4)


def test_accuracy_is_averaged_over_classes() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, batch):
            return torch.eye(CLUSTERS)[batch.guess]

    y = torch.tensor([0] * 8 + [1, 2, 3, 4, 5])
    whole = argparse.Namespace(y=y, guess=torch.zeros(13, dtype=torch.int64))
    (found,) = gas_gin.accuracies(Fixed(), whole, [torch.ones(13, dtype=torch.bool)])
    assert found == pytest.approx(1 / 6)


# --- GCNII of one's own --------------------------------------------------------------------------------------------


def test_the_own_model_is_gcnii(problem) -> None:
    """That of the library, of whole graphs and of batches with histories."""
    blocks = block_models(2, 1)
    graph, weight = symmetric_normalisation(blocks.graph)
    loader = SubgraphLoader(
        graph, blocks.x, ptr=blocks.ptr, batch_size=1, edge_weight=weight, shuffle=False, backend="torch", device="cpu"
    )
    setting = gas_gcnii.SETTING
    torch.manual_seed(0)
    ours = gas_gcnii.GCNII(7, 3, 5).eval()
    library = GCNII(7, setting.hidden, 3, 5, setting.alpha, setting.theta, dropout=setting.dropout).eval()
    library.load_state_dict(ours.state_dict())
    for model in (ours, library):
        model.histories = HistoryStore(len(blocks.y), library.history_widths, "cpu")
    with torch.no_grad():
        for batch in [*loader, *loader.evaluation(batch_size=2)]:
            torch.testing.assert_close(ours(batch), library(batch), atol=1e-5, rtol=1e-4)
    for mine, other in zip(ours.histories, library.histories, strict=True):
        np.testing.assert_allclose(mine.pull(np.arange(9)), other.pull(np.arange(9)), atol=1e-5)


# --- the demos, as they are run ------------------------------------------------------------------------------------


def run(name: str, *options: str, fails: bool = False) -> str:
    """What a demo prints; of one that fails, to the other stream."""
    for package in ("torch_geometric", *(["lightning"] if name == "gas_lightning" else [])):
        if importlib.util.find_spec(package) is None:
            missing(package)
    command = [sys.executable, "-W", "error::ResourceWarning", str(ROOT / "demo" / f"{name}.py"), "--quiet", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert result.returncode == (1 if fails else 0), result.stderr[-3000:]
    assert "epoch/s" not in result.stderr and "Traceback" not in result.stderr
    return result.stderr if fails else result.stdout


def percent(pattern: str, printed: str) -> list[float]:
    found = re.search(pattern, printed, re.MULTILINE)
    assert found, printed
    return [float(number) for number in found.groups()]


def rows(printed: str) -> dict[str, list[float]]:
    """The numbers of each training in the table of GIN."""
    lines = {line[:18].strip(): line[18:] for line in printed.splitlines()[2:]}
    return {mode: [float(number) for number in re.findall(r"\d+\.?\d*", line)] for mode, line in lines.items()}


@pytest.mark.slow
def test_gin_runs() -> None:
    printed = run("gas_gin", "--graphs", "6", "--parts", "3", "--epochs", "3")
    assert printed.startswith("6 block models: ")
    found = rows(printed)
    assert tuple(found) == MODES
    assert len(found["full"]) == 5 and all(len(found[mode]) == 4 + 2 * (LAYERS - 1) + 1 for mode in MODES[1:])
    assert found["full"][3] == 0 and min(found[mode][3] for mode in MODES[1:]) > 100
    uncut = run("gas_gin", "--graphs", "6", "--parts", "1", "--epochs", "3")
    assert all(numbers[3:-1] == [0] for numbers in rows(uncut).values()) and uncut.count(" -") == 3 * (LAYERS - 1)
    assert all(0 <= accuracy <= 100 for numbers in found.values() for accuracy in numbers[:3])


@pytest.mark.slow
def test_the_regulariser_lowers_the_errors_of_histories() -> None:
    found = rows(run("gas_gin", "--graphs", "20", "--epochs", "30"))
    distances = {mode: found[mode][4:10:2] for mode in MODES[1:]}
    for layer in (1, 2):  # after the first regularised layer, and the second
        assert distances[MODES[2]][layer] < 0.8 * distances[MODES[1]][layer]


@pytest.mark.slow
def test_gcnii_runs(root: Path) -> None:
    options = ["--layers", "4", "--epochs", "15", "--partition", "random", "--root", str(root)]
    printed = run("gas_gcnii", *options)
    assert run("gas_gcnii", *options) == printed
    assert "4 layers" in printed and percent(r"test accuracy (\d+\.\d\d) at", printed)[0] > 60


@pytest.mark.slow
def test_lightning_runs(root: Path) -> None:
    printed = run("gas_lightning", "--epochs", "20", "--runs", "2", "--partition", "random", "--root", str(root))
    assert percent(r"test accuracy (\d+\.\d\d) ± \d+\.\d\d \(2 runs\)", printed)[0] > 60


@pytest.mark.slow
def test_lightning_reaches_the_accuracy_of_cora(shared_data: Path) -> None:
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    printed = run("gas_lightning", "--epochs", "100", "--root", str(shared_data))
    assert percent(r"test accuracy (\d+\.\d\d) at the best epoch", printed)[0] > 78


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gas_gcnii", "gas_lightning"])
def test_a_folder_without_the_graph(name: str, tmp_path: Path) -> None:
    assert run(name, "--root", str(tmp_path), fails=True).startswith(f"{name}: ")
