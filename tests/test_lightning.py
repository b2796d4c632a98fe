"""Lightning: an unmodified Trainer gets the batches of a plain loop, whatever it does in between."""

from __future__ import annotations

import doctest
import gc
import itertools
import multiprocessing
import pickle
import subprocess
import sys
import types
from pathlib import Path

import lightning_training  # where Lightning is missing, this skips the module; in CI it fails
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_training import (
    BATCH_SIZE,
    CLASSES,
    NODES,
    SEED,
    SIZES,
    TEST,
    TRAIN,
    VAL,
    Sage,
    content,
    node_data,
    planted,
    trainer,
)
from torch.nn import functional

from gglspeedup import CGPUFeature, GGLSpeedupError, GPUSampler, HistoryStore, NodeLoader
from gglspeedup.adapters import lightning as adapter
from gglspeedup.adapters.lightning import HistoryCallback, NodeDataModule

pytestmark = [
    # Lightning's own use of torch: it makes a LeafSpec, which newer torch releases call deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # Tests resume from checkpoints into other folders, with callbacks that save at other times.
    pytest.mark.filterwarnings("ignore:(Checkpoint directory|The dirpath has changed|Be aware that when):UserWarning"),
]


def plain(**options) -> NodeLoader:
    """The same batches without Lightning."""
    given = {"seeds": TRAIN, "sizes": SIZES, "batch_size": BATCH_SIZE, "seed": SEED, **options}
    return NodeLoader(*planted(), **given, device="cpu", backend="torch")


def epochs(loader: NodeLoader, count: int) -> list:
    return [content(batch) for _ in range(count) for batch in loader]


def test_learns(tmp_path):
    model, data, runs = Sage(), node_data(), trainer(tmp_path, max_epochs=12)
    (before,) = runs.test(model, datamodule=data, verbose=False)
    runs.fit(model, datamodule=data)
    (after,) = runs.test(model, datamodule=data, verbose=False)
    assert before["test_accuracy"] < 0.6 and after["test_accuracy"] > 0.9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": -1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 18},
    ],
    ids=str,
)
def test_batches_are_those_of_a_plain_loop(tmp_path, options):
    model = Sage()
    trainer(tmp_path, **options).fit(model, datamodule=node_data())
    assert model.trained == epochs(plain(), 3)
    validation = epochs(plain().evaluation(VAL), 1)
    assert model.validated and all(given in validation for given in model.validated)
    checked = {0: 0, -1: len(validation)}.get(options.get("num_sanity_val_steps", 2), 2)
    assert len(model.validated) % len(validation) == checked % len(validation)


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}, {"precision": "64-true"}], ids=str)
def test_loaders_may_be_given_to_a_trainer_as_they_are(tmp_path, options):
    model, loader = Sage(), plain()
    trainer(tmp_path, **options).fit(model, loader, loader.evaluation(VAL))
    expected = epochs(plain(), 3)
    assert [batch[2:] for batch in model.trained] == [batch[2:] for batch in expected]
    assert len(model.trained) == len(expected) and model.validated


def test_batches_of_part_of_an_epoch(tmp_path):
    model = Sage()
    trainer(tmp_path, limit_train_batches=4).fit(model, datamodule=node_data())
    loader = plain()
    assert model.trained == [content(batch) for _ in range(3) for batch in list(loader)[:4]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked, on Linux alone")
def test_workers_make_the_same_batches(tmp_path):
    model = Sage()
    trainer(tmp_path).fit(model, datamodule=node_data(workers=2))
    assert model.trained == epochs(plain(), 3)
    del model  # and with it the Trainer and its loaders
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_second_training_starts_at_epoch_0(tmp_path):
    data, model = node_data(), Sage()
    trainer(tmp_path, max_epochs=2).fit(Sage(), datamodule=data)
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=data)
    assert model.trained == epochs(plain(), 2)


def test_training_goes_on_with_the_next_epoch(tmp_path):
    data, model, runs = node_data(), Sage(), trainer(tmp_path, max_epochs=1)
    runs.fit(model, datamodule=data)
    runs.fit_loop.max_epochs = 3
    runs.fit(model, datamodule=data)
    assert model.trained == epochs(plain(), 3)


def test_options_reach_the_loader(tmp_path):
    options = {"shuffle": False, "drop_last": True, "replace": True, "expand": "frontier", "prefetch": 0}
    evaluation = {"sizes": [2, 2], "batch_size": 7}
    model = Sage()
    data = node_data(**options, eval_sizes=evaluation["sizes"], eval_batch_size=evaluation["batch_size"])
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert model.trained == epochs(plain(**options), 2)
    assert model.validated == 2 * epochs(plain(**options).evaluation(VAL, **evaluation), 1)


@pytest.mark.parametrize("precision, dtype", [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_precision(tmp_path, precision, dtype):
    class Checking(Sage):
        def training_step(self, batch, index):
            assert batch.x.dtype == dtype and batch.n_id.dtype == torch.int64 and batch.seeds.shape == batch.y.shape
            return super().training_step(batch, index)

    model = Checking()
    trainer(tmp_path, max_epochs=1, precision=precision).fit(model, datamodule=node_data())
    assert len(model.trained) == 6


def test_overfitting_repeats_its_batches(tmp_path):
    model = Sage()
    trainer(tmp_path, overfit_batches=2).fit(model, datamodule=node_data())
    assert model.trained == 3 * epochs(plain(), 1)[:2]


@pytest.mark.parametrize(
    "saved", [{}, {"every_n_train_steps": 4}, {"save_on_train_epoch_end": True}], ids=["default", "steps", "epochs"]
)
@pytest.mark.parametrize(
    "options",
    [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}, {"max_epochs": -1, "max_steps": 18}],
    ids=str,
)
def test_resuming(tmp_path, saved, options):
    """Wherever it was saved, a resumed training sees the batches and reaches the weights of one that never stopped."""
    whole, checkpoints = Sage(), tmp_path / "checkpoints"

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(checkpoints, filename="{step}", save_top_k=-1, **saved)

    options = {**options, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[keep()], **options).fit(whole, datamodule=node_data())
    files = list(checkpoints.iterdir())
    assert len(whole.trained) == 18 and len(files) >= 3
    for file in files:
        resumed = Sage()
        runs = trainer(tmp_path, callbacks=[keep()], **options)
        runs.fit(resumed, datamodule=node_data(), ckpt_path=file)
        assert resumed.trained == whole.trained[int(file.stem.removeprefix("step=")) :], file.name
        np.testing.assert_array_equal(resumed.weights(), whole.weights())


def test_prediction(tmp_path):
    model, nodes = Sage(), TEST[::-1]
    scores = trainer(tmp_path).predict(model, datamodule=node_data(predict=nodes))
    with torch.no_grad():
        expected = [model(batch) for batch in plain().evaluation(nodes)]
    torch.testing.assert_close(torch.cat(scores), torch.cat(expected))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_stages_without_nodes(tmp_path):
    data, model, runs = node_data(train=None, val=None), Sage(), trainer(tmp_path, max_epochs=1)
    (result,) = runs.test(model, datamodule=data, verbose=False)
    assert result["test_accuracy"] > 0
    for run, stage in ((runs.fit, "train"), (runs.validate, "val"), (runs.predict, "predict")):
        with pytest.raises((TypeError, ValueError), match=f"{stage}_dataloader"):  # Lightning's own
            run(model, datamodule=data)
    runs.fit(model, datamodule=node_data(val=None, test=None))
    assert len(model.trained) == 6 and model.validated == []


def test_batches_are_not_copied(tmp_path):
    class Watching(NodeDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.handed = batch
            return batch

    class Comparing(Sage):
        def training_step(self, batch, index):
            assert batch is self.trainer.datamodule.handed
            return super().training_step(batch, index)

    model = Comparing()
    data = Watching(*planted(), train=TRAIN, val=VAL, sizes=SIZES, batch_size=BATCH_SIZE)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert model.trained


def test_transfer():
    data = node_data()
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    tensors = [moved.x, moved.y, moved.n_id, *(part for adj in moved.adjs for part in (adj.edge_index, adj.e_id))]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.batch_size, moved.batch) == (batch.batch_size, batch.batch)
    assert [adj.size for adj in moved.adjs] == [adj.size for adj in batch.adjs]
    bare = NodeDataModule(planted()[0], train=TRAIN, sizes=SIZES, batch_size=BATCH_SIZE)
    moved = bare.transfer_batch_to_device(next(iter(bare.train_dataloader())), torch.device("meta"), 0)
    assert moved.x is None and moved.y is None and moved.n_id.is_meta
    assert data.transfer_batch_to_device({"a": torch.ones(2)}, torch.device("meta"), 0)["a"].is_meta


def test_without_a_trainer():
    data = node_data()
    batches = data.train_dataloader()
    assert len(batches) == 6
    assert [content(batch) for batch in batches] == [content(batch) for batch in batches] == epochs(plain(), 1)
    assert [content(batch) for batch in data.val_dataloader()] == epochs(plain().evaluation(VAL), 1)


def test_a_subclass_may_bring_loaders_of_its_own(tmp_path):
    class Own(NodeDataModule):
        def val_dataloader(self):
            return self.train_dataloader()

    model = Sage()
    data = Own(*planted(), train=TRAIN, sizes=SIZES, batch_size=BATCH_SIZE, seed=SEED)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert model.trained == model.validated == epochs(plain(), 2)


def test_place_is_the_trainers(monkeypatch):
    """Without a GPU: what would be asked of NodeLoader."""
    asked = []
    data, moved = node_data(), node_data(device="cpu")
    monkeypatch.setattr("gglspeedup.adapters.lightning.NodeLoader", lambda **options: asked.append(options))
    for name in ("cpu", "mps", "cuda:0", "cuda:1"):
        strategy = types.SimpleNamespace(root_device=torch.device(name))
        data.trainer = moved.trainer = types.SimpleNamespace(strategy=strategy, global_rank=3, world_size=4)
        data.train_dataloader()
        data.train_dataloader()
    moved.train_dataloader()
    assert [str(options["device"]) for options in asked] == ["cpu", "cuda:0", "cuda:1", "cpu"]
    assert all((options["rank"], options["world_size"]) == (3, 4) for options in asked)


def test_arrays_may_change_afterwards():
    seeds = TRAIN.copy()
    data = node_data(train=seeds, val=seeds)
    seeds[:] = 0
    assert [content(batch) for batch in data.train_dataloader()] == epochs(plain(), 1)
    assert [content(batch) for batch in data.val_dataloader()] == epochs(plain().evaluation(TRAIN), 1)


def test_pickling(tmp_path):
    data = node_data()
    size = len(pickle.dumps(data))
    used = list(data.train_dataloader())
    assert len(pickle.dumps(data)) == size
    trainer(tmp_path, max_epochs=1).fit(Sage(), datamodule=data)
    again = pickle.loads(pickle.dumps(data))
    again.trainer = None
    assert [content(batch) for batch in again.train_dataloader()] == [content(batch) for batch in used]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"backend": "numpy"}, "backend"),
        ({"rank": 0}, "rank"),
        ({"world_size": 2}, "world_size"),
        ({"memory_limit": "1G"}, "memory_limit"),
        ({"train": [0, 0]}, "seeds"),
        ({"val": [-1]}, "seeds"),
        ({"predict": [[1]]}, "seeds"),
        ({"sizes": "10"}, "sizes"),
        ({"eval_sizes": []}, "sizes"),
        ({"eval_batch_size": 0}, "batch_size"),
        ({"cache": "0.1Q"}, "budget"),
        ({"device": "tpu"}, "device"),
    ],
    ids=str,
)
def test_bad_arguments(options, named):
    with pytest.raises(GGLSpeedupError, match=f"^{named} needs"):
        node_data(**options)


def test_what_belongs_to_a_device_already():
    graph, x, y = planted()
    features = CGPUFeature(graph, "cpu")
    features.from_cpu_tensor(x)
    with pytest.raises(GGLSpeedupError, match=r"^graph needs .* got GPUSampler"):
        NodeDataModule(GPUSampler("cpu", graph), x, y, sizes=[2], batch_size=2)
    with pytest.raises(GGLSpeedupError, match=r"^x needs .* got CGPUFeature"):
        NodeDataModule(graph, features, y, sizes=[2], batch_size=2)
    with pytest.raises(TypeError, match="num_workers"):
        node_data(num_workers=2)


# --- two processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_processes(tmp_path, monkeypatch, strategy):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning finds a free port itself
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, lightning_training.__file__, strategy, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    loaders = [plain(rank=rank, world_size=2) for rank in range(2)]
    batches = [[batch for _ in range(2) for batch in loader] for loader in loaders]
    for rank, seen in enumerate(ranks):
        assert seen["trained"] == [content(batch) for batch in batches[rank]]
    numbers = [given[-1] for seen in ranks for given in seen["trained"]]
    assert len(numbers) == len(set(numbers)) == 2 * 2 * 3
    for epoch in range(2):
        seeds = [batch.seeds.tolist() for rank in batches for batch in rank[epoch * 3 : epoch * 3 + 3]]
        visited = list(itertools.chain(*seeds))
        assert set(visited) == set(TRAIN.tolist()) and len(visited) == 102  # one of 101 twice

    # Gradients are the mean of both: one process that averages them itself gets there, too.
    model = Sage()
    optimizer = model.configure_optimizers()
    for pair in zip(*batches, strict=True):
        optimizer.zero_grad()
        (sum(functional.cross_entropy(model(batch), batch.y) for batch in pair) / 2).backward()
        optimizer.step()
    np.testing.assert_array_equal(ranks[0]["weights"], ranks[1]["weights"])
    np.testing.assert_allclose(ranks[0]["weights"], model.weights(), rtol=1e-4, atol=1e-6)

    nodes = [node for seen in ranks for given in seen["validated"] for node in given[2][: given[-2]]]
    assert set(nodes) == set(VAL.tolist()) and len(nodes) == 40 * 3  # 39 and one twice; sanity check and two epochs
    hits = [(model(batch).argmax(1) == batch.y).float() for batch in plain().evaluation(VAL)]
    assert abs(float(ranks[0]["accuracy"]["accuracy"]) - float(torch.cat(hits).mean())) <= 1.01 / 39


# --- histories -----------------------------------------------------------------------------------------------------


class Store:
    """A store of histories that writes down what is done to it."""

    def __init__(self) -> None:
        self.table = np.zeros(3)
        self.calls: list[str] = []

    def push(self, value: float) -> None:
        self.table += value
        self.calls.append("push")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def save(self, path: Path) -> None:
        self.calls.append("save")
        with open(path, "wb") as file:
            np.save(file, self.table)

    def restore(self, path: Path) -> None:
        self.calls.append("restore")
        self.table[:] = np.load(path)


class Pushing(Sage):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def training_step(self, batch, index):
        self.store.push(batch.batch + 1)
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        self.store.calls.append("validate")
        return super().validation_step(batch, index)


def train_with(store: Store, folder: Path, ckpt_path=None, **saved) -> None:
    keep = ModelCheckpoint(folder, **{"filename": "{step}", **saved})
    runs = trainer(folder, enable_checkpointing=True, callbacks=[HistoryCallback(store), keep])
    runs.fit(Pushing(store), datamodule=node_data(), ckpt_path=ckpt_path)


def test_histories_are_saved_and_restored(tmp_path):
    store = Store()
    train_with(store, tmp_path, every_n_train_steps=4, save_top_k=-1)
    expected = {f"step={step}.ckpt{suffix}" for step in (4, 8, 12, 16) for suffix in ("", ".histories")}
    assert {file.name for file in tmp_path.iterdir()} == expected
    for step in (4, 8, 12, 16):
        resumed, file = Store(), tmp_path / f"step={step}.ckpt"
        np.testing.assert_array_equal(np.load(f"{file}.histories"), np.full(3, step * (step + 1) / 2))
        train_with(resumed, tmp_path / "resumed", file, every_n_train_steps=4, save_top_k=-1)
        assert resumed.calls.count("restore") == 1 and resumed.calls.count("push") == 18 - step
        np.testing.assert_array_equal(resumed.table, store.table)


@pytest.mark.parametrize("every, saves", [({}, 3), ({"every_n_train_steps": 4}, 4)], ids=["epochs", "steps"])
def test_pushes_are_waited_for(tmp_path, every, saves):
    store = Store()
    train_with(store, tmp_path, **every)
    for before, after in itertools.pairwise(store.calls):
        assert (before, after) not in {("push", "validate"), ("push", "save")}
    assert store.calls.count("save") == saves and store.calls.count("validate") == 2 + 3 * 2
    assert store.calls[-1] != "push"


def test_histories_go_with_their_checkpoints(tmp_path):
    train_with(Store(), tmp_path, every_n_train_steps=4, save_top_k=1, save_last="link")
    assert {file.name for file in tmp_path.iterdir()} == {"step=16.ckpt", "step=16.ckpt.histories", "last.ckpt"}
    resumed = Store()
    train_with(resumed, tmp_path / "resumed", tmp_path / "last.ckpt")
    assert resumed.calls.count("restore") == 1
    (tmp_path / "step=16.ckpt.histories").unlink()
    with pytest.raises(GGLSpeedupError, match=r"^ckpt_path needs the histories in step=16\.ckpt\.histories"):
        train_with(Store(), tmp_path / "again", tmp_path / "last.ckpt")


def test_a_history_store_resumes_as_if_it_had_never_stopped(tmp_path):
    class Remembering(Sage):
        def __init__(self, store: HistoryStore) -> None:
            super().__init__()
            self.store = store

        def training_step(self, batch, index):
            self.store[0].push(self(batch), batch.seeds)
            return super().training_step(batch, index)

    def run(folder: Path, ckpt_path=None) -> HistoryStore:
        store = HistoryStore(NODES, [CLASSES], "cpu", storage="mmap", path=folder / "tables")
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=8)
        runs = trainer(folder, enable_checkpointing=True, callbacks=[HistoryCallback(store), keep])
        runs.fit(Remembering(store), datamodule=node_data(), ckpt_path=ckpt_path)
        return store

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole, nodes = run(tmp_path / "whole"), np.arange(NODES)
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "step=8.ckpt")
    np.testing.assert_array_equal(resumed[0].pull(nodes), whole[0].pull(nodes))
    np.testing.assert_array_equal(resumed.age(), whole.age())
    assert whole.age().max() > 0 and np.any(whole[0].pull(nodes))


def test_bad_history_arguments(tmp_path):
    store = Store()
    with pytest.raises(GGLSpeedupError, match=r"^store needs a method synchronize\(\)"):
        HistoryCallback(object())
    two: list[Callback] = [HistoryCallback(store), HistoryCallback(Store())]
    with pytest.raises(GGLSpeedupError, match=r"^callbacks needs one HistoryCallback"):
        trainer(tmp_path, callbacks=two).fit(Sage(), datamodule=node_data())


def test_the_examples_run():
    results = doctest.testmod(adapter)
    assert results.attempted > 0 and results.failed == 0
