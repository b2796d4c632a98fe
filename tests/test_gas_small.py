"""GNNAutoScale's small benchmark: its settings, splits and datasets, the procedure, the command, and its accuracy."""

from __future__ import annotations

import csv
import doctest
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import missing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import gas_data, gas_results, gas_settings, gas_small
from demo.datasets import DatasetError
from demo.gas_results import Cell, Result
from demo.gas_settings import PUBLISHED, SETTINGS, Accuracy, Setting
from demo.gas_small import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FEW = ["--parts", "6", "--batch-parts", "2", "--epochs", "2", "--runs", "2", "--quiet", "--partition", "contiguous"]


def made_graph(width: int = 40) -> dict[str, Any]:
    """150 nodes of three classes, whose neighbours and features mostly tell the class; of 40 features, most are 0."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 50)
    same = rng.integers(0, 50, (150, 3)) + 50 * y[:, None]
    target = np.where(rng.random((150, 3)) < 0.8, same, rng.integers(0, 150, (150, 3))).ravel()
    x = np.zeros((150, width), np.float32)
    x[np.arange(150), np.where(rng.random(150) < 0.7, y, rng.integers(0, width, 150))] = 3
    return gas_data.undirected(np.repeat(np.arange(150), 3), target, 150) | {"x": x, "y": y}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a made graph for Cora, with a split, and for Coauthor-CS, without one."""
    arrays, nodes = made_graph(), np.arange(150) % 50
    masks = {"train_mask": nodes < 8, "val_mask": (nodes >= 8) & (nodes < 20), "test_mask": nodes >= 20}
    np.savez(tmp_path / "cora.npz", **arrays, **masks)
    np.savez(tmp_path / "coauthor_cs.npz", **arrays)
    return tmp_path


# --- settings ------------------------------------------------------------------------------------------------------


def test_every_cell_of_the_paper_is_there() -> None:
    datasets = ["cora", "citeseer", "pubmed", "coauthor_cs", "coauthor_physics"]
    datasets += ["amazon_computers", "amazon_photo", "wiki_cs"]
    cells = {(model, name) for model in ("gcn", "gat", "appnp", "gcnii") for name in datasets}
    assert set(SETTINGS) == set(PUBLISHED) == cells - {("gat", "amazon_computers"), ("gat", "amazon_photo")}
    assert gas_settings.MODELS == ("gcn", "gat", "appnp", "gcnii") and list(gas_settings.DATASETS) == datasets
    for (model, dataset), setting in SETTINGS.items():
        assert (setting.model, setting.dataset) == (model, dataset)
        assert setting.parts[0] >= 2 * setting.parts[1]
        assert setting.decay[1] == (5e-4 if model == "gcnii" else 0)
        assert setting.runs == (10 if model == "gcnii" else 20)


def test_settings_are_read_right() -> None:
    assert SETTINGS["gcn", "cora"] == Setting(
        "gcn", "cora", layers=2, hidden=16, dropout=0.5, lr=0.01, decay=(5e-4, 0), epochs=200, runs=20, parts=(40, 10),
        clip=True,
    )  # fmt: skip
    assert SETTINGS["gcn", "wiki_cs"] == Setting(
        "gcn", "wiki_cs", layers=2, hidden=33, dropout=0.25, lr=0.02, decay=(5e-4, 0), epochs=200, runs=20,
        parts=(32, 16), clip=True,
    )  # fmt: skip
    assert SETTINGS["gat", "pubmed"] == Setting(
        "gat", "pubmed", layers=2, hidden=8, dropout=0.6, lr=0.01, decay=(1e-3, 0), epochs=400, runs=20, parts=(4, 1),
        heads=(8, 8),
    )  # fmt: skip
    assert SETTINGS["appnp", "coauthor_physics"] == Setting(
        "appnp", "coauthor_physics", layers=10, hidden=64, dropout=0.5, lr=0.01, decay=(0.005, 0), epochs=600, runs=20,
        parts=(2, 1), clip=True, alpha=0.2,
    )  # fmt: skip
    assert SETTINGS["gcnii", "citeseer"] == Setting(
        "gcnii", "citeseer", layers=32, hidden=256, dropout=0.7, lr=0.01, decay=(0.01, 5e-4), epochs=1000, runs=10,
        parts=(40, 20), clip=True, alpha=0.1, theta=0.6,
    )  # fmt: skip
    clipped = {cell for cell, setting in SETTINGS.items() if setting.clip}
    assert len(clipped) == 14 and ("gcn", "citeseer") not in clipped and ("appnp", "citeseer") in clipped
    assert [SETTINGS["gcnii", name].epochs for name in ("amazon_computers", "amazon_photo")] == [300, 1000]
    assert SETTINGS["gcnii", "pubmed"].decay == SETTINGS["gcnii", "wiki_cs"].decay == (5e-4, 5e-4)
    assert (SETTINGS["appnp", "wiki_cs"].layers, SETTINGS["appnp", "wiki_cs"].alpha) == (2, 0.11)
    assert SETTINGS["gat", "wiki_cs"].heads == (5, 1) and SETTINGS["gat", "wiki_cs"].hidden == 14


def test_published_accuracies_are_read_right() -> None:
    assert PUBLISHED["gcn", "cora"] == (Accuracy(81.88, 0.75), Accuracy(82.29, 0.76))
    assert PUBLISHED["gat", "citeseer"] == (Accuracy(71.72, 0.91), Accuracy(71.86, 1.00))
    assert PUBLISHED["gcnii", "amazon_computers"] == (Accuracy(83.04, 1.81), Accuracy(83.05, 1.16))
    assert PUBLISHED["appnp", "wiki_cs"] == (Accuracy(79.88, 0.40), Accuracy(79.75, 0.53))


@pytest.mark.parametrize("cell", SETTINGS, ids="-".join)
def test_models_have_their_sizes(cell: tuple[str, str]) -> None:
    setting = SETTINGS[cell]
    model = gas_small.make_model(setting, 30, 5)
    width = {"gat": setting.hidden * setting.heads[0], "appnp": 5}.get(setting.model, setting.hidden)
    assert model.history_widths == (width,) * (setting.layers - 1)
    assert model.dropout == setting.dropout
    last = model.convs[-1] if setting.model in ("gcn", "gat") else model.lins[-1]
    assert (last.out_channels if setting.model in ("gcn", "gat") else last.out_features) == 5
    if setting.model == "gat":
        assert (model.convs[0].heads, last.heads) == setting.heads
    if setting.model == "appnp":
        assert model.alpha == setting.alpha
    if setting.model == "gcnii":
        assert model.convs[0].alpha == setting.alpha and model.convs[0].weight2 is None
        assert model.convs[0].beta == pytest.approx(np.log(setting.theta + 1))


# --- datasets and splits -------------------------------------------------------------------------------------------


def test_drawn_splits() -> None:
    y = np.repeat([0, 1, 2, -1], [400, 70, 60, 10])
    train, val, test = gas_data.draw_splits(y)
    assert train.shape == val.shape == test.shape == (540, 20)
    for split in range(20):
        counts = [np.bincount(y[mask[:, split]] + 1, minlength=4).tolist() for mask in (train, val, test)]
        assert counts == [[0, 20, 20, 20], [0, 30, 30, 30], [0, 350, 20, 10]]
        assert (train[:, split].astype(int) + val[:, split] + test[:, split] == (y >= 0)).all()
    assert len({train[:, split].tobytes() for split in range(20)}) == 20
    assert np.array_equal(train, gas_data.draw_splits(y)[0])
    assert np.flatnonzero(train[:, 1])[:6].tolist() == [3, 5, 66, 78, 90, 115]  # for ever


def test_public_graphs(shared_data: Path) -> None:
    data = gas_data.load_benchmark("cora", shared_data)
    assert data.x.format == "csr" and data.x.shape == (2708, 1433)
    np.testing.assert_allclose(data.x.sum(1), 1, rtol=1e-5)
    for run in (0, 7):
        assert [int(mask.sum()) for mask in data.split(run)] == [140, 500, 1000]
    data = gas_data.load_benchmark("amazon_photo", shared_data)
    assert isinstance(data.x, np.ndarray) and set(np.unique(data.x)) == {0, 1}
    assert [int(mask.sum()) for mask in data.split(3)] == [160, 240, 7250]
    assert not np.array_equal(data.split(0)[0], data.split(1)[0])
    assert np.array_equal(data.split(20)[0], data.split(0)[0])


def test_raw_features(root: Path) -> None:
    expected = made_graph()["x"]
    data = gas_data.load_benchmark("coauthor_cs", root)
    np.testing.assert_array_equal(data.x.toarray(), expected > 0)
    assert [int(mask.sum()) for mask in data.split(0)] == [60, 90, 0]
    np.savez(root / "amazon_photo.npz", **made_graph())
    np.testing.assert_array_equal(gas_data.load_benchmark("amazon_photo", root).x.toarray(), expected)
    np.testing.assert_array_equal(gas_data.load_benchmark("cora", root).x.toarray(), expected / 3)


def test_absent_graphs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("citeseer", "wiki_cs", "amazon_computers"):
        with pytest.raises(DatasetError, match=name):
            gas_data.load_benchmark(name, root)
    for name in ("amazon_computers", "wiki_cs"):
        with pytest.raises(DatasetError, match="--root"):
            gas_data.load_benchmark(name)
    digits = gas_data.load_dataset("digits")
    monkeypatch.setattr(gas_data, "load_dataset", lambda *_, **__: digits)  # what stands in where no source has a graph
    with pytest.raises(DatasetError, match="no source has cora"):
        gas_data.load_benchmark("cora")


def made_wiki_cs() -> dict[str, Any]:
    """Five nodes as Wiki-CS is published: links go one way; one is there twice, and one is a loop."""
    masks = [[split % 5 == node for node in range(5)] for split in range(20)]
    return {
        "features": [[0.5 * node, -1.0] for node in range(5)],
        "labels": [0, 1, 1, 2, 0],
        "links": [[1, 1, 2], [0], [2], [], [3]],
        "train_masks": masks,
        "val_masks": [[True] * 5] * 20,
        "stopping_masks": [[not chosen for chosen in mask] for mask in masks],
        "test_mask": [False, False, False, True, True],
    }


@pytest.mark.parametrize("path", ["wiki_cs.json", "wiki_cs/data.json"])
def test_wiki_cs(tmp_path: Path, path: str) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(json.dumps(made_wiki_cs()))
    data = gas_data.load_benchmark("wiki_cs", tmp_path)
    assert data.indptr.tolist() == [0, 2, 3, 4, 5, 6] and data.indices.tolist() == [1, 2, 0, 0, 4, 3]
    np.testing.assert_array_equal(data.x, [[0, -1], [0.5, -1], [1, -1], [1.5, -1], [2, -1]])
    assert data.x.dtype == np.float32 and data.y.tolist() == [0, 1, 1, 2, 0] and data.num_classes == 3
    assert data.train_mask.shape == (5, 20)
    for run in (0, 3, 23):
        train, val, test = data.split(run)
        assert train.tolist() == [node == run % 20 % 5 for node in range(5)]
        assert val.tolist() == [not chosen for chosen in train]  # the stopping mask, not val_masks
        assert test.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("links"),
        lambda data: data["labels"].pop(),
        lambda data: data["links"][0].append(5),
        lambda data: data["features"].append([1.0]),
        lambda data: data.update(stopping_masks=[[True] * 4] * 20),
        lambda data: data.update(test_mask=[True] * 4),
    ],
)
def test_damaged_wiki_cs(tmp_path: Path, damage: Any) -> None:
    data = made_wiki_cs()
    damage(data)
    (tmp_path / "wiki_cs.json").write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=r"wiki_cs\.json"):
        gas_data.load_benchmark("wiki_cs", tmp_path)


# --- the procedure -------------------------------------------------------------------------------------------------


def cell(model: str = "gcn", mode: str = "gas", **options: Any) -> Cell:
    usual = {"parts": 6, "batch_parts": 2, "partition": "random", "storage": "memory", "dtype": "float32"}
    return Cell(model, "cora", mode, **{"epochs": 3} | (usual if mode == "gas" else {}) | options)


def train(one: Cell, root: Path, run: int = 0) -> list[Result]:
    """The best result so far after each epoch."""
    seen: list[Result] = []
    Trainer(one, gas_data.load_benchmark("cora", root), CPU).train(run, seen.append)
    return seen


@pytest.mark.parametrize("model", gas_settings.MODELS)
def test_one_part_is_the_whole_graph(root: Path, model: str) -> None:
    whole, parts = train(cell(model, "full"), root), train(cell(model, parts=1, batch_parts=1), root)
    assert len(whole) == 3 and whole == parts


def test_runs_repeat_and_differ(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(cell(), root) == train(cell(), root) == train(cell(storage="mmap"), root)
    make, made = gas_small.make_model, []
    monkeypatch.setattr(gas_small, "make_model", lambda *sizes: made.append(make(*sizes)) or made[-1])
    trainer = Trainer(cell(), gas_data.load_benchmark("cora", root), CPU)
    load, seeds = gas_small.SubgraphLoader, []
    monkeypatch.setattr(gas_small, "SubgraphLoader", lambda *a, **k: seeds.append(k["seed"]) or load(*a, **k))
    for run in (0, 1, 0):
        trainer.train(run, lambda _: None)
    first, other, again = (model.convs[0].lin.weight for model in made)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert seeds == [0, 1, 0]  # of the order of the parts


def test_training_is_the_papers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each pass trains on, pushes and steps, against what the procedure says."""
    data = gas_data.load_benchmark("cora", root)
    data.train_mask[:] = np.isin(np.arange(150), [0, 1, 100])[:, None]
    trainer = Trainer(cell(batch_parts=1), data, CPU)
    parts = [set(part.tolist()) & {0, 1, 100} for part in np.split(trainer.perm, trainer.ptr[1:-1])]
    trained = [sorted(part) for part in parts if part]
    assert len(parts) == 6 and len(trained) > 1  # so that at least three of six batches train nobody
    events: list[Any] = []
    forward, step, clip = gas_small.pyg_models.GCN.forward, torch.optim.Adam.step, torch.nn.utils.clip_grad_norm_

    def noted_forward(model: Any, batch: Any) -> Any:
        if not model.training:
            assert not torch.is_grad_enabled() and batch.batch_size == 150
            events.append(("evaluate", model.histories.staleness().never, model.histories[0].pushes))
        else:
            node = trainer.perm[batch.n_id.numpy()]
            labelled = batch.y.numpy() >= 0
            events.append(("train", sorted(node[: batch.batch_size][labelled].tolist())))
            assert np.array_equal(batch.y[labelled].numpy(), data.y[node[: batch.batch_size][labelled]])
            assert np.array_equal(batch.x.to_dense().numpy(), data.x.toarray()[node])
            assert (model.histories.age(batch.n_id[batch.batch_size :].numpy()) >= 0).all()
        return forward(model, batch)

    def noted_clip(parameters: Any, norm: float) -> Any:
        events.append(("clip", norm))
        return clip(parameters, norm)

    def noted_step(optimizer: Any, *arguments: Any) -> Any:
        first, second = optimizer.param_groups
        shapes = [[tuple(parameter.shape) for parameter in group["params"]] for group in (first, second)]
        assert shapes == [[(16,), (16, 40)], [(3,), (3, 16)]]
        assert (first["weight_decay"], second["weight_decay"], first["lr"], second["lr"]) == (5e-4, 0, 0.01, 0.01)
        events.append("step")
        return step(optimizer, *arguments)

    monkeypatch.setattr(gas_small.pyg_models.GCN, "forward", noted_forward)
    monkeypatch.setattr(torch.optim.Adam, "step", noted_step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted_clip)
    trainer.setting = replace(trainer.setting, clip=True)
    trainer.train(0, lambda _: None)
    assert events.pop(0) == ("evaluate", 150, 0)  # histories start empty, and are filled before the training
    length, orders = 3 * len(trained) + 1, set()
    assert len(events) == 3 * length
    for epoch in range(3):
        *steps, last = events[epoch * length : (epoch + 1) * length]
        assert steps[1::3] == [("clip", 1.0)] * len(trained) and steps[2::3] == ["step"] * len(trained)
        assert sorted(steps[::3]) == sorted(("train", nodes) for nodes in trained)
        # The batches and the whole graph were pushed, but none that was skipped.
        assert last == ("evaluate", 0, (epoch + 1) * (len(trained) + 1))
        orders.add(str(steps[::3]))
    assert len(orders) > 1  # parts are shuffled


@pytest.mark.parametrize("clip", [True, False])
def test_gradients_are_clipped_where_told(root: Path, monkeypatch: pytest.MonkeyPatch, clip: bool) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: calls.append(1))
    trainer = Trainer(cell(), gas_data.load_benchmark("cora", root), CPU)
    trainer.setting = replace(trainer.setting, clip=clip)
    trainer.train(0, lambda _: None)
    assert bool(calls) == clip


def test_the_first_best_epoch_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([[0.9, 0.9], [0.5, 0.1], [0.7, 0.2], [0.7, 0.3], [0.6, 0.4]])  # the first fills the histories
    monkeypatch.setattr(Trainer, "_accuracies", lambda *_: next(said))
    data = gas_data.load_benchmark("cora", root)
    result = Trainer(cell(epochs=4), data, CPU).train(0, lambda _: None)
    assert (result.best_epoch, result.val_accuracy, result.test_accuracy) == (1, 0.7, 0.2)
    assert result.seconds > 0


def test_accuracy_is_of_the_nodes_it_should_be_of(root: Path) -> None:
    data = gas_data.load_benchmark("cora", root)
    trainer = Trainer(cell(), data, CPU)
    right = data.val_mask[:, 0] & (np.arange(150) % 2 == 0)

    class Oracle(torch.nn.Module):
        def forward(self, batch: Any) -> Any:
            node = trainer.perm[batch.n_id.numpy()]
            return torch.nn.functional.one_hot(torch.from_numpy(np.where(right, data.y, (data.y + 1) % 3)[node]), 3)

    train_mask, val_mask, test_mask = (torch.from_numpy(mask[trainer.perm]) for mask in data.split(0))
    found = trainer._accuracies(Oracle(), train_mask, val_mask, test_mask)
    assert found == [0, right.sum() / data.val_mask[:, 0].sum(), 0]


# --- the command ---------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "gas_small.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_command_writes_results_that_add_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "out"
    options = ["--root", str(root), "--out", str(out), *FEW]
    assert gas_small.main(options) == 0
    printed = capsys.readouterr().out
    assert "| gcn | cora | 2 epochs, 6 parts, 2 batch_parts, contiguous | - | " in printed
    assert "| 81.88 ± 0.75 / 82.29 ± 0.76 |" in printed and "(2 runs)" in printed
    first = lines(out)
    assert [(line["mode"], line["run"], line["epochs"], line["parts"]) for line in first] == [
        ("gas", "0", "2", "6"), ("gas", "1", "2", "6")
    ]  # fmt: skip
    for line in first:
        assert 0 <= float(line["test_accuracy"]) <= 1 and float(line["seconds"]) > 0
    assert (out / "gas_small.md").read_text(encoding="utf-8").strip() in printed

    assert gas_small.main([*options, "--full-batch"]) == 0
    assert gas_small.main([*options, "--partition", "random", "--storage", "mmap", "--dtype", "float16"]) == 0
    assert [line["mode"] for line in lines(out)] == ["gas", "gas", "full", "full", "gas", "gas"]
    assert lines(out)[:2] == first
    table = capsys.readouterr().out.rpartition("\n\n|")[2]
    assert "| 2 epochs | " in table
    assert "| 2 epochs, 6 parts, 2 batch_parts, random, mmap, float16 | - | " in table

    assert gas_small.main([*options, "--runs", "3", "--resume"]) == 0
    resumed = lines(out)
    assert [line for line in resumed if line["partition"] == "contiguous"][:2] == first
    assert len(resumed) == 7
    assert gas_small.main([*options, "--runs", "1"]) == 0
    again = lines(out)
    assert len(again) == 7 and again[1:] == resumed[1:] and again[0]["test_accuracy"] == first[0]["test_accuracy"]
    assert again[0]["seconds"] != first[0]["seconds"]


def test_settings_of_the_paper_have_no_remark() -> None:
    setting = SETTINGS["gcn", "cora"]
    usual = Cell("gcn", "cora", "gas", 200, *setting.parts, "metis", "memory", "float32")
    assert usual.variant() == Cell("gcn", "cora", "full", 200).variant() == ""
    assert replace(usual, partition="random").variant() == "random"
    assert replace(usual, epochs=10, parts=8).variant() == "10 epochs, 8 parts"
    options = gas_small.parser().parse_args([])
    assert gas_small.cell_of(options, "gcn", "cora") == usual


def test_table_has_both_modes_in_a_row(tmp_path: Path) -> None:
    results = gas_small.Results(tmp_path / "deep" / "folder")
    usual = gas_small.cell_of(gas_small.parser().parse_args([]), "gcn", "citeseer")
    for run, accuracy in enumerate([0.70, 0.71, 0.72]):
        results.add(usual, run, Result(1, 0.5, accuracy, 2.0))
    results.add(Cell("gcn", "citeseer", "full", 200), 0, Result(1, 0.5, 0.7125, 2.0))
    results.add(Cell("gcn", "cora", "full", 200), 0, Result(1, 0.5, 0.8, 2.0))
    assert results.table().splitlines()[2:] == [
        "| gcn | cora |  | 80.00 (1 run) | - | 81.88 ± 0.75 / 82.29 ± 0.76 |",
        "| gcn | citeseer |  | 71.25 (1 run) | 71.00 ± 1.00 (3 runs) | 70.98 ± 0.66 / 71.18 ± 0.97 |",
    ]
    assert gas_small.Results(tmp_path / "deep" / "folder").lines == results.lines


def test_all_that_is_at_hand(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", str(root), "--out", str(root / "out"), *FEW, "--epochs", "1", "--runs", "1"]
    assert gas_small.main([*options, "--all", "--dataset", "cora", "--full-batch"]) == 0
    assert [line["model"] for line in lines(root / "out")] == list(gas_settings.MODELS)
    assert gas_small.main([*options, "--all", "--model", "appnp"]) == 0
    assert [line["dataset"] for line in lines(root / "out")][4:] == ["cora", "coauthor_cs"]
    assert "pubmed" in capsys.readouterr().err


def test_command_explains_what_it_lacks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--root", str(root), "--out", str(root / "out"), "--quiet"]
    assert gas_small.main([*options, "--dataset", "pubmed"]) == 1
    assert "pubmed.npz" in capsys.readouterr().err
    assert gas_small.main([*options, "--model", "gat", "--dataset", "amazon_photo"]) == 1
    assert "nothing was trained" in capsys.readouterr().err
    assert gas_small.main([*options, "--parts", "151"]) == 1
    assert "num_parts" in capsys.readouterr().err
    assert gas_small.main([*options, "--device", "cuda:9"]) == 1
    assert "device needs" in capsys.readouterr().err
    (root / "out" / "gas_small.csv").write_text("something,else\n1,2\n")
    assert gas_small.main(options) == 1
    assert "name another --out" in capsys.readouterr().err
    for wrong in (["--epochs", "0"], ["--model", "sage"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            gas_small.main([*options, *wrong])


@pytest.mark.slow
@pytest.mark.parametrize("how", [["demo/gas_small.py"], ["-m", "demo.gas_small"]], ids=["file", "module"])
def test_runs_as_a_program(root: Path, how: list[str]) -> None:
    options = ["--model", "gat", "--root", str(root), "--out", str(root / "out"), *FEW, "--storage", "mmap"]
    done = subprocess.run(
        [sys.executable, *how, *options], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| gat | cora |" in done.stdout and "epoch/s" not in done.stderr and "Warning" not in done.stderr
    assert len(lines(root / "out")) == 2


def test_examples() -> None:
    done = doctest.testmod(gas_results)
    assert done.attempted and not done.failed


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--full-batch"]], ids=["gas", "full"])
def test_gcn_on_cora_reaches_its_accuracy(shared_data: Path, tmp_path: Path, mode: list[str]) -> None:
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    options = ["--root", str(shared_data), "--out", str(tmp_path), "--runs", "3", "--quiet", *mode]
    assert gas_small.main(options) == 0
    accuracy = [float(line["test_accuracy"]) for line in lines(tmp_path)]
    assert len(accuracy) == 3 and np.mean(accuracy) >= 0.795, accuracy
