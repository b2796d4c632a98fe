"""A model, its data and a Trainer for the tests of Lightning; as a script, a training of two processes on the CPU."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

# In CI it must be there.
lightning = import_module("lightning") if os.environ.get("CI") else pytest.importorskip("lightning")

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import SAGEConv

    from gglspeedup.adapters.lightning import NodeDataModule

CLASSES, NODES = 3, 180
TRAIN, VAL, TEST = np.arange(101), np.arange(101, 140), np.arange(140, 180)
SIZES, BATCH_SIZE, SEED = [4, 3], 20, 7


def planted() -> tuple[Any, Any, Any]:
    """A graph of three groups with many edges inside and few between, features that tell little, and the groups."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, CLASSES, NODES)
    edges = np.argwhere(rng.random((NODES, NODES)) < np.where(y[:, None] == y, 0.15, 0.01))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(edges[:, 0], minlength=NODES))])
    x = (np.eye(CLASSES)[y] + rng.normal(0, 1, (NODES, CLASSES))).astype(np.float32)
    return (indptr, edges[:, 1]), x, y


def node_data(**options: Any) -> NodeDataModule:
    given = {"train": TRAIN, "val": VAL, "test": TEST, "sizes": SIZES, "batch_size": BATCH_SIZE, "seed": SEED}
    return NodeDataModule(*planted(), **{**given, **options})


def content(batch: Any) -> list[Any]:
    """All that is in a batch, to be compared."""
    arrays = [batch.x, batch.y, batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]
    return [*(array.tolist() for array in arrays), [adj.size for adj in batch.adjs], batch.batch_size, batch.batch]


class Sage(lightning.LightningModule):
    """GraphSAGE that remembers the batches it was given; the same weights at the start whenever it is made."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList([SAGEConv(CLASSES, 8), SAGEConv(8, CLASSES)])
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def forward(self, batch: Any) -> torch.Tensor:
        x = batch.x
        for layer, adj in zip(self.layers, batch.adjs, strict=True):
            x = layer((x, x[: adj.size[1]]), adj.edge_index)
            x = x if layer is self.layers[-1] else x.relu()
        return x

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.trained.append(content(batch))
        loss = functional.cross_entropy(self(batch), batch.y)
        self.log("loss", loss, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(content(batch))
        accuracy = (self(batch).argmax(1) == batch.y).float().mean()
        self.log("accuracy", accuracy, batch_size=batch.batch_size, sync_dist=True)

    def test_step(self, batch: Any, index: int) -> None:
        accuracy = (self(batch).argmax(1) == batch.y).float().mean()
        self.log("test_accuracy", accuracy, batch_size=batch.batch_size)

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def weights(self) -> Any:
        """All weights, in one array."""
        return torch.cat([part.detach().flatten() for part in self.parameters()]).numpy()


class Diary(Sage):
    """Writes down what its process has seen."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        seen = {"trained": self.trained, "validated": self.validated, "accuracy": self.trainer.callback_metrics}
        torch.save({**seen, "weights": self.weights()}, self.folder / f"{self.global_rank}.pt")


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return lightning.Trainer(**{**quiet, **place, "enable_checkpointing": False, "max_epochs": 3, **options})


if __name__ == "__main__":
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    trainer(folder, devices=2, strategy=strategy, max_epochs=2).fit(Diary(folder), datamodule=node_data())
