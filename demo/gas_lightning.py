"""Trains GCN with histories on Cora by PyTorch Lightning: an unmodified Trainer, batches of parts from gglspeedup.

Run it from the checkout with ``python -m demo.gas_lightning``; ``--help`` lists the options. It needs lightning,
torch-geometric and, for METIS, pymetis.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import DatasetError
from demo.gas_data import Benchmark, load_benchmark
from demo.gas_settings import SETTINGS
from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, partition, permute
from gglspeedup.adapters.lightning import HistoryCallback
from gglspeedup.adapters.lightning_subgraphs import MaskedBatch, SubgraphDataModule
from gglspeedup.adapters.pyg_models import GCN
from gglspeedup.normalise import symmetric_normalisation

SETTING = SETTINGS["gcn", "cora"]


class Classifier(lightning.LightningModule):
    """GCN with its histories and its optimiser; keeps the accuracies of the best epoch of validation."""

    def __init__(self, features: int, classes: int, num_nodes: int) -> None:
        super().__init__()
        self.model = GCN(features, SETTING.hidden, classes, SETTING.layers, SETTING.dropout)
        self.model.histories = HistoryStore(num_nodes, self.model.history_widths, "cpu")
        self.best = {"val": -1.0, "test": 0.0}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = zip((self.model.reg_modules, self.model.nonreg_modules), SETTING.decay, strict=True)
        return torch.optim.Adam([{"params": g.parameters(), "weight_decay": decay} for g, decay in groups], SETTING.lr)

    def training_step(self, batch: MaskedBatch, index: int) -> torch.Tensor | None:
        if not batch.train_mask.any():
            return None
        return functional.cross_entropy(self.model(batch)[batch.train_mask], batch.y[batch.train_mask])

    def on_validation_epoch_start(self) -> None:
        self.counts: list[dict[str, Any]] = []

    def validation_step(self, batch: MaskedBatch, index: int) -> None:
        right = self.model(batch).argmax(dim=1) == batch.y
        self.counts.append({"val": right[batch.val_mask], "test": right[batch.test_mask]})

    def on_validation_epoch_end(self) -> None:
        scores = {name: float(torch.cat([count[name] for count in self.counts]).float().mean()) for name in self.best}
        if not self.trainer.sanity_checking and scores["val"] > self.best["val"]:
            self.best = scores
        self.log_dict(scores, prog_bar=True)


def train(data: Benchmark, seed: int, epochs: int, method: str, quiet: bool) -> float:
    """Train once; return the test accuracy at the best epoch of validation."""
    graph, weight = symmetric_normalisation(CSRGraph(data.indptr, data.indices))
    parts, batch_parts = SETTING.parts
    perm, ptr = partition(graph, parts, method)
    graph = permute(graph, perm)
    masks = dict(zip(("train", "val", "test"), (mask[perm] for mask in data.split(0)), strict=True))
    batches = SubgraphDataModule(
        graph, data.x[perm].toarray(), data.y[perm], **masks, edge_weight=weight[graph.edge_ids], ptr=ptr,
        batch_size=batch_parts, eval_batch_size=parts, seed=seed,
    )  # fmt: skip

    torch.manual_seed(seed)
    classifier = Classifier(data.x.shape[1], data.num_classes, graph.num_nodes)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0 if SETTING.clip else None,
        num_sanity_val_steps=-1,  # a whole validation, which fills the histories
        callbacks=[HistoryCallback(classifier.model.histories)], logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=not quiet, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(classifier, datamodule=batches)
    return classifier.best["test"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = argparse.ArgumentParser(description="Train GCN with histories on Cora by Lightning, in the paper's setting.")
    p.add_argument("--epochs", type=int, default=SETTING.epochs)
    p.add_argument("--runs", type=int, default=1, help="trainings, each with its own seed")
    p.add_argument("--partition", choices=("metis", "contiguous", "random"), default="metis")
    p.add_argument("--root", help="folder with cora.npz; without, it is looked for elsewhere")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    o = p.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    # Lightning's own use of torch, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    try:
        data = load_benchmark("cora", o.root)
        accuracy = 100 * np.array([train(data, seed, o.epochs, o.partition, o.quiet) for seed in range(o.runs)])
    except (DatasetError, GGLSpeedupError) as error:
        print(f"gas_lightning: {error}", file=sys.stderr)
        return 1
    spread = f" ± {accuracy.std(ddof=1):.2f} ({o.runs} runs)" if o.runs > 1 else ""
    print(f"GCN on Cora by Lightning: test accuracy {accuracy.mean():.2f}{spread} at the best epoch of validation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
