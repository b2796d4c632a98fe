"""Lightning: a model with histories, trained by an unmodified Trainer, is that of a plain loop, resumed or not."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import lightning_training  # where Lightning is missing, this skips the module; in CI it fails
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_training import CLASSES, NODES, TEST, TRAIN, VAL, planted, trainer
from torch.nn import functional

from gglspeedup import (
    CGPUFeature,
    CSRGraph,
    GGLSpeedupError,
    GPUSampler,
    HistoryStore,
    SubgraphLoader,
    partition,
    permute,
)
from gglspeedup.adapters import lightning_subgraphs as adapter
from gglspeedup.adapters import pyg_models
from gglspeedup.adapters.lightning import HistoryCallback
from gglspeedup.adapters.lightning_subgraphs import MaskedBatch, SubgraphDataModule
from gglspeedup.adapters.pyg_models import GCN
from gglspeedup.normalise import symmetric_normalisation

pytestmark = [
    # Lightning's own use of torch: it makes a LeafSpec, which newer torch releases call deprecated.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    # Tests resume from checkpoints into other folders, with callbacks that save at other times.
    pytest.mark.filterwarnings("ignore:(Checkpoint directory|The dirpath has changed|Be aware that when):UserWarning"),
]

PARTS, BATCH_PARTS, SEED = 9, 2, 11
MASKS = ("train_mask", "val_mask", "test_mask")


def arrays() -> dict[str, Any]:
    """The planted graph in parts of random nodes, which cut most edges, with normalised weights."""
    (indptr, indices), x, y = planted()
    graph, weight = symmetric_normalisation(CSRGraph(indptr, indices))
    perm, ptr = partition(graph, PARTS, "random")
    graph = permute(graph, perm)
    return {"graph": graph, "x": x[perm], "y": y[perm], "ptr": ptr, "edge_weight": weight[graph.edge_ids], "perm": perm}


def masks() -> dict[str, np.ndarray]:
    perm = arrays()["perm"]
    return {stage: np.isin(perm, nodes) for stage, nodes in (("train", TRAIN), ("val", VAL), ("test", TEST))}


def part_data(**options: Any) -> SubgraphDataModule:
    given = {**arrays(), **masks(), "batch_size": BATCH_PARTS, "seed": SEED, **options}
    del given["perm"]
    return SubgraphDataModule(**given)


def plain(**options: Any) -> SubgraphLoader:
    """The same batches without Lightning."""
    given = {**arrays(), "batch_size": BATCH_PARTS, "seed": SEED, **options}
    del given["perm"]
    return SubgraphLoader(given.pop("graph"), **given, device="cpu", backend="torch")


def content(batch: Any) -> list[Any]:
    """All that is in a batch but its masks, to be compared."""
    held = [batch.x, batch.y, batch.n_id, batch.adj.edge_index, batch.adj.e_id, batch.edge_weight]
    held += [batch.offset, batch.count, batch.parts]
    return [*(array.tolist() for array in held), batch.adj.size, batch.batch_size]


def epochs(loader: SubgraphLoader, count: int) -> list[Any]:
    return [content(batch) for _ in range(count) for batch in loader]


def own(batch: Any) -> np.ndarray:
    return batch.n_id[: batch.batch_size].numpy()


def make_model(dropout: float = 0.0) -> tuple[GCN, HistoryStore]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GCN(CLASSES, 8, CLASSES, num_layers=3, dropout=dropout)
    model.histories = HistoryStore(NODES, model.history_widths, "cpu")
    return model, model.histories


class Classifier(lightning_training.lightning.LightningModule):
    """A GCN with histories, as a user would write it, that remembers the batches it was given."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model, self.store = make_model(dropout)
        self.trained: list[Any] = []
        self.validated: list[Any] = []
        self.right: list[int] = []

    def training_step(self, batch: Any, index: int) -> Any:
        self.trained.append(content(batch))
        if not batch.train_mask.any():
            return None
        loss = functional.cross_entropy(self.model(batch)[batch.train_mask], batch.y[batch.train_mask])
        self.log("loss", loss, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(content(batch))
        right = self.model(batch).argmax(1) == batch.y
        if not self.trainer.sanity_checking:
            self.right.append(int(right[batch.val_mask].sum()))

    def test_step(self, batch: Any, index: int) -> None:
        right = (self.model(batch).argmax(1) == batch.y)[batch.test_mask]
        self.log("right", right.float().sum(), reduce_fx="sum", batch_size=batch.batch_size)

    def predict_step(self, batch: Any, index: int) -> Any:
        return self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02, weight_decay=1e-3)


def fit(folder: Path, data: SubgraphDataModule, dropout: float = 0.0, ckpt_path: Any = None, **options: Any) -> Any:
    model = Classifier(dropout)
    callbacks = [HistoryCallback(model.store), *options.pop("callbacks", [])]
    options = {"num_sanity_val_steps": -1, **options}
    trainer(folder, callbacks=callbacks, **options).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


def weights(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([part.detach().flatten() for part in model.parameters()]).numpy()


def tables(store: HistoryStore) -> np.ndarray:
    return np.stack([table.pull(np.arange(NODES)) for table in store])


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2},
        {"max_epochs": -1, "max_steps": 15},
    ],
    ids=str,
)
def test_batches_are_those_of_a_plain_loader(tmp_path, options):
    model = fit(tmp_path, part_data(), **options)
    assert model.trained == epochs(plain(), 3) and model.trained[:5] != model.trained[5:10]
    everything = epochs(plain().evaluation(), 1)
    assert model.validated and all(given in everything for given in model.validated)
    checked = {0: 0, -1: 5, 2: 2}[options.get("num_sanity_val_steps", -1)]
    assert len(model.validated) % 5 == checked % 5 and len(model.right) % 5 == 0
    assert np.concatenate([given[2][: given[-1]] for given in everything]).tolist() == list(range(NODES))


def test_options_reach_the_loader(tmp_path):
    options = {"shuffle": False, "drop_last": True, "prefetch": 0, "batch_size": 4}
    model = fit(tmp_path, part_data(**options, eval_batch_size=PARTS), max_epochs=2)
    assert model.trained == epochs(plain(**options), 2) and len(model.trained) == 2 * 2
    assert model.validated == 3 * epochs(plain().evaluation(batch_size=PARTS), 1)


@pytest.mark.parametrize("kind", ["masks", "ids", "tensors"])
def test_masks(kind):
    expected, given = masks(), masks()
    if kind == "ids":
        given = {stage: np.random.default_rng(0).permutation(np.flatnonzero(mask)) for stage, mask in given.items()}
    elif kind == "tensors":
        given = {stage: torch.from_numpy(mask) for stage, mask in given.items()}
    data = part_data(**given)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    for loader in loaders:
        seen = []
        for batch in loader:
            assert isinstance(batch, MaskedBatch)
            for name in MASKS:
                mask = getattr(batch, name)
                assert mask.dtype == torch.bool and mask.shape == (batch.batch_size,)
                np.testing.assert_array_equal(mask, expected[name.removesuffix("_mask")][own(batch)])
            np.testing.assert_array_equal(batch.y, arrays()["y"][own(batch)])
            seen.append(own(batch))
        assert sorted(np.concatenate(seen)) == list(range(NODES))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_stages_without_nodes(tmp_path):
    data, model, runs = part_data(train=None, val=None), Classifier(), trainer(tmp_path, max_epochs=1)
    (batch, *_) = data.predict_dataloader()
    assert batch.train_mask is None and batch.val_mask is None and batch.test_mask is not None
    runs.test(model, datamodule=data, verbose=False)
    for run, stage in ((runs.fit, "train"), (runs.validate, "val")):
        with pytest.raises((TypeError, ValueError), match=f"{stage}_dataloader"):  # Lightning's own
            run(model, datamodule=data)
    runs.fit(model, datamodule=part_data(val=None, test=[]))
    assert len(model.trained) == 5 and model.validated == []


def test_overfitting_repeats_its_batches(tmp_path):
    model = fit(tmp_path, part_data(), overfit_batches=2)
    assert model.trained == 3 * epochs(plain(), 1)[:2]


def test_without_a_trainer():
    data = part_data()
    batches = data.train_dataloader()
    assert len(batches) == 5 and len(data.val_dataloader()) == 5
    assert [content(batch) for batch in batches] == [content(batch) for batch in batches] == epochs(plain(), 1)


def test_arrays_may_change_afterwards():
    given, ptr = masks(), arrays()["ptr"].copy()
    data = part_data(**given, ptr=ptr)
    ptr[:] = 0
    for mask in given.values():
        mask[:] = False
    batches = list(data.train_dataloader())
    assert [content(batch) for batch in batches] == epochs(plain(), 1)
    assert sum(int(batch.train_mask.sum()) for batch in batches) == len(TRAIN)


def test_transfer():
    data = part_data()
    batch = next(iter(data.train_dataloader()))
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved, MaskedBatch)
    held = [moved.x, moved.y, moved.n_id, moved.adj.edge_index, moved.adj.e_id, moved.edge_weight]
    assert {tensor.device.type for tensor in [*held, *(getattr(moved, name) for name in MASKS)]} == {"meta"}
    assert (moved.adj.size, moved.batch_size) == (batch.adj.size, batch.batch_size)
    for name in ("offset", "count", "parts"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(batch, name))


def test_pickling(tmp_path):
    data = part_data()
    fit(tmp_path, data, max_epochs=1)
    again = pickle.loads(pickle.dumps(data))
    again.trainer = None
    assert [content(batch) for batch in again.train_dataloader()] == epochs(plain(), 1)


def test_place_is_the_trainers(monkeypatch):
    """Every process trains on its share of the parts, and evaluates all of them."""
    data = part_data()
    strategy = types.SimpleNamespace(root_device=torch.device("mps"))
    data.trainer = types.SimpleNamespace(
        strategy=strategy, global_rank=1, world_size=2, overfit_batches=0, current_epoch=3,
        fit_loop=types.SimpleNamespace(batch_idx=-1),
    )  # fmt: skip
    loader = plain(rank=1, world_size=2)
    loader.set_epoch(3)
    assert [content(batch) for batch in data.train_dataloader()] == epochs(loader, 1)
    assert [content(batch) for batch in data.val_dataloader()] == epochs(plain().evaluation(), 1)
    asked = []
    monkeypatch.setattr(adapter, "SubgraphLoader", lambda **options: asked.append(options) or loader)
    strategy.root_device = torch.device("cuda:1")
    data.val_dataloader()
    assert (asked[0]["device"], asked[0]["rank"], asked[0]["world_size"]) == ("cuda:1", 1, 2)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"backend": "numpy"}, "backend"),
        ({"rank": 0}, "rank"),
        ({"world_size": 2}, "world_size"),
        ({"train": [0, 0]}, "train"),
        ({"val": [-1]}, "val"),
        ({"val": np.zeros(NODES - 1, bool)}, "val"),
        ({"test": [[1]]}, "test"),
        ({"test": [0.5]}, "test"),
        ({"ptr": [0, 1]}, "ptr"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"edge_weight": [1.0]}, "edge_weight"),
        ({"device": "tpu"}, "device"),
        ({"graph": GPUSampler("cpu", CSRGraph([0], []))}, "graph"),
        ({"x": CGPUFeature(CSRGraph([0], []), "cpu")}, "x"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_bad_arguments(options, named):
    with pytest.raises(GGLSpeedupError, match=rf"^{named}\b.* (needs|is out of range)"):
        part_data(**options)
    with pytest.raises(TypeError, match="num_workers"):
        part_data(num_workers=2)


# --- training ------------------------------------------------------------------------------------------------------


def train_plainly(count: int, dropout: float, mask: np.ndarray, clip: float) -> tuple[Any, HistoryStore, list[int]]:
    """What a Trainer is asked to do, spelled out."""
    model, store = make_model(dropout)
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-3)
    loader, val, right = plain(), masks()["val"], []

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        for batch in loader.evaluation():
            right.append(int((model(batch).argmax(1) == batch.y)[torch.from_numpy(val[own(batch)])].sum()))

    evaluate()
    right.clear()
    for _ in range(count):
        model.train()
        for batch in loader:
            chosen = torch.from_numpy(mask[own(batch)])
            if chosen.any():
                optimizer.zero_grad()
                functional.cross_entropy(model(batch)[chosen], batch.y[chosen]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        evaluate()
    return model, store, right


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("few", [False, True], ids=["every batch trains", "some batches do not"])
def test_a_training_is_that_of_a_plain_loop(tmp_path, few):
    """Bit for bit: filling the histories, dropout, clipping, evaluation, batches without a node to train on."""
    mask = masks()["train"]
    if few:
        mask[arrays()["ptr"][3] :] = False
    torch.manual_seed(5)
    ours = fit(tmp_path, part_data(train=mask), dropout=0.4, max_epochs=4, gradient_clip_val=0.5)
    torch.manual_seed(5)
    model, store, right = train_plainly(4, 0.4, mask, 0.5)
    np.testing.assert_array_equal(weights(ours.model), weights(model))
    np.testing.assert_array_equal(tables(ours.store), tables(store))
    np.testing.assert_array_equal(ours.store.age(), store.age())
    assert ours.right == right and len(right) == 4 * 5


def test_learns(tmp_path):
    data, model = part_data(), Classifier(0.2)
    runs = trainer(tmp_path, max_epochs=20, num_sanity_val_steps=-1, callbacks=[HistoryCallback(model.store)])
    (before,) = runs.test(model, datamodule=data, verbose=False)
    runs.fit(model, datamodule=data)
    (after,) = runs.test(model, datamodule=data, verbose=False)
    assert before["right"] < 0.6 * len(TEST) and after["right"] > 0.85 * len(TEST)


def test_the_sanity_check_fills_the_histories(tmp_path):
    class Watching(Classifier):
        def on_train_start(self) -> None:
            self.never = [int((table.age() < 0).sum()) for table in self.store]
            self.start = tables(self.store)

    model, data = Watching(), part_data(eval_batch_size=PARTS)
    trainer(tmp_path, num_sanity_val_steps=-1, max_epochs=1).fit(model, datamodule=data)
    assert model.never == [0, 0]
    first, _ = make_model()
    with torch.no_grad():
        first.eval().inference(plain().evaluation())
    np.testing.assert_allclose(model.start, tables(first.histories), atol=1e-5)


def test_prediction_is_of_all_nodes_in_their_order(tmp_path):
    model = Classifier()
    scores = trainer(tmp_path).predict(model, datamodule=part_data(eval_batch_size=PARTS))
    with torch.no_grad():
        expected = make_model()[0].eval().inference(plain().evaluation())
    np.testing.assert_allclose(torch.cat(scores), expected, atol=1e-5)


@pytest.mark.parametrize("precision, dtype", [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_precision(tmp_path, monkeypatch, precision, dtype):
    monkeypatch.setattr(pyg_models, "_SPARSE_PRODUCTS", False)  # which MKL does not have for bfloat16

    class Checking(Classifier):
        def training_step(self, batch: Any, index: int) -> Any:
            assert batch.x.dtype == batch.edge_weight.dtype == dtype and batch.train_mask.dtype == torch.bool
            assert batch.n_id.dtype == batch.y.dtype == torch.int64 and batch.offset.dtype == np.int64
            return super().training_step(batch, index)

    model = Checking()
    trainer(tmp_path, max_epochs=1, precision=precision, num_sanity_val_steps=-1).fit(model, datamodule=part_data())
    assert len(model.trained) == 5 and np.isfinite(tables(model.store)).all()


@pytest.mark.parametrize("saved", [{}, {"every_n_train_steps": 2}, {"save_on_train_epoch_end": True}], ids=str)
def test_resuming(tmp_path, saved):
    """Wherever it was saved, a resumed training reaches the weights and histories of one that never stopped.

    Its sanity check must not count. Step 10, if saved as a step, is before a validation, which a Trainer does not make
    up for.
    """

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", save_top_k=-1, **saved)

    options = {"enable_checkpointing": True, "max_epochs": 3}
    whole = fit(tmp_path, part_data(), callbacks=[keep()], **options)
    files = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert len(whole.trained) == 15 and len(files) >= 3
    for file in files:
        resumed = fit(tmp_path, part_data(), callbacks=[keep()], ckpt_path=file, **options)
        assert resumed.trained == whole.trained[int(file.stem.removeprefix("step=")) :], file.name
        if saved.get("every_n_train_steps") and file.stem == "step=10":
            continue
        np.testing.assert_array_equal(weights(resumed.model), weights(whole.model))
        np.testing.assert_array_equal(tables(resumed.store), tables(whole.store))
        np.testing.assert_array_equal(resumed.store.age(), whole.store.age())


def test_a_checkpoint_loaded_for_another_stage_is_forgotten(tmp_path):
    """A Trainer tests with a checkpoint, then trains anew: the sanity check fills the histories, and they stay."""
    model, data = Classifier(), part_data()
    keep = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}")
    fit(tmp_path, data, callbacks=[keep], enable_checkpointing=True, max_epochs=1)
    runs = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=-1, callbacks=[HistoryCallback(model.store)])
    runs.test(model, datamodule=data, ckpt_path=keep.best_model_path, verbose=False)
    restored = []
    model.store.restore = lambda path: restored.append(path)  # type: ignore[method-assign]
    runs.fit(model, datamodule=data)
    assert restored == [] and len(model.trained) == 5


# --- two processes -------------------------------------------------------------------------------------------------


class Averaged(Classifier):
    """For processes that each train on some of the parts; writes down what its process has made."""

    def training_step(self, batch: Any, index: int) -> Any:
        self.trained.append(content(batch))
        return loss_of(self.model, batch, batch.train_mask)

    def on_train_end(self) -> None:
        made = {"trained": self.trained, "weights": weights(self.model), "tables": tables(self.store)}
        torch.save({**made, "right": self.right}, Path(self.trainer.default_root_dir) / f"{self.global_rank}.pt")


def loss_of(model: Any, batch: Any, chosen: Any) -> Any:
    return functional.cross_entropy(model(batch)[chosen], batch.y[chosen], reduction="sum") / 20


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning finds a free port itself
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    # One process does the same with two stores, and averages the gradients itself.
    model, _ = make_model()
    stores = [HistoryStore(NODES, model.history_widths, "cpu") for _ in range(2)]
    optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-3)
    loaders, mask, right = [plain(rank=rank, world_size=2) for rank in range(2)], masks()["train"], []

    def evaluate() -> None:
        for store in stores:
            model.histories = store
            with torch.no_grad():
                right.append([int((model(batch).argmax(1) == batch.y).sum()) for batch in plain().evaluation()])

    evaluate()
    seen: list[list[Any]] = [[], []]
    for _ in range(2):
        for pair in zip(*loaders, strict=True):
            optimizer.zero_grad()
            for store, batch, trained in zip(stores, pair, seen, strict=True):
                model.histories = store
                trained.append(content(batch))
                (loss_of(model, batch, torch.from_numpy(mask[own(batch)])) / 2).backward()
            optimizer.step()
        evaluate()
    np.testing.assert_array_equal(ranks[0]["weights"], ranks[1]["weights"])
    for rank, store, trained in zip(ranks, stores, seen, strict=True):
        assert rank["trained"] == trained and len(rank["right"]) == 2 * 5
        np.testing.assert_allclose(rank["weights"], weights(model), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(rank["tables"], tables(store), rtol=1e-3, atol=1e-4)
    parts = [set(np.concatenate([given[8] for given in rank["trained"][:3]]).tolist()) for rank in ranks]
    assert parts[0] | parts[1] == set(range(PARTS)) and len(parts[0] & parts[1]) == 1


def test_the_examples_run():
    results = doctest.testmod(adapter)
    assert results.attempted > 0 and results.failed == 0


if __name__ == "__main__":
    given = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "num_sanity_val_steps": -1}
    trainer(Path(sys.argv[1]), **given).fit(Averaged(), datamodule=part_data())
