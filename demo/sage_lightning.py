"""Trains GraphSAGE with PyTorch Lightning: gglspeedup samples and gathers, an unmodified Trainer runs the epochs.

Run it from the checkout with ``python -m demo.sage_lightning``; ``--help`` lists the options. It needs lightning and
torch-geometric.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.sage_torch import GraphSage
from demo.training import Run, assess, judged_nodes, main, speed
from gglspeedup.adapters.lightning import NodeDataModule
from gglspeedup.epochs import device_for
from gglspeedup.loader import Batch


class Classifier(lightning.LightningModule):
    """GraphSAGE with its optimiser; keeps the history of its training in a Run.

    Parameters
    ----------
    data : Dataset
        The graph.
    options : argparse.Namespace
        Of the command line.
    """

    def __init__(self, data: Dataset, options: argparse.Namespace) -> None:
        super().__init__()
        hidden = [options.hidden] * (len(options.fanouts) - 1)
        self.model = GraphSage([data.x.shape[1], *hidden, data.num_classes], options.dropout)
        self.data, self.options, self.run = data, options, Run()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.options.lr, weight_decay=self.options.weight_decay)

    def on_train_epoch_start(self) -> None:
        self.start, self.losses, self.sizes, self.scores = time.perf_counter(), [], [], []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        loss = functional.cross_entropy(self.model(batch.x, batch.adjs), batch.y)
        self.losses.append(float(loss.detach()))
        self.sizes.append(batch.batch_size)
        return loss

    def on_validation_start(self) -> None:
        self.run.epoch_seconds.append(time.perf_counter() - self.start)

    def validation_step(self, batch: Batch, index: int) -> None:
        self.scores.append(self.model(batch.x, batch.adjs).cpu().numpy())

    def on_validation_epoch_end(self) -> None:
        train_loss = float(np.average(self.losses, weights=self.sizes))
        self.run.history.append(assess(self.data, train_loss, np.concatenate(self.scores)))
        latest = self.run.history[-1]
        self.log_dict({"loss": train_loss, "val": latest["val_accuracy"]}, prog_bar=True)


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    torch.manual_seed(seed)
    batches = NodeDataModule(
        (data.indptr, data.indices), data.x, data.y, train=data.train_mask, val=judged_nodes(data),
        sizes=options.fanouts, batch_size=options.batch_size, eval_batch_size=options.eval_batch_size,
        cache=options.cache, seed=seed,
    )  # fmt: skip
    classifier = Classifier(data, options)
    device = device_for("torch", options.device)
    trainer = lightning.Trainer(
        accelerator="gpu" if device.is_cuda else "cpu", devices=[device.index] if device.is_cuda else 1,
        max_epochs=options.epochs, num_sanity_val_steps=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=not options.quiet,
    )  # fmt: skip
    trainer.fit(classifier, datamodule=batches)

    run, loader = classifier.run, batches.train_dataloader().loader
    run.device, run.hit_rate, run.speed = str(loader.device), loader.features.hit_rate, speed(loader)
    return run


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    # Lightning's own use of torch, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    sys.exit(main(train, framework=f"Lightning {lightning.__version__}, PyTorch {torch.__version__}"))
