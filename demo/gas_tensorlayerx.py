"""Trains GCN, GAT, APPNP or GCNII with histories (GNNAutoScale) in TensorLayerX, on GammaGL's layers.

Run it from the checkout with ``python -m demo.gas_tensorlayerx``; ``--help`` lists the options. It needs tensorlayerx,
gammagl and a backend, which the environment variable TL_BACKEND names: tensorflow (the default), torch or paddle; and
pymetis for METIS. Settings are the paper's, but gradients are not clipped: TensorLayerX cannot on every backend.
"""

# ruff: noqa: E402 - what is imported last must find the backend chosen

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo import tlx_compat

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, on import: errors, no notes on instruction sets
tlx_compat.install(os.environ.get("TL_BACKEND", "tensorflow"))
import tensorlayerx as tlx

from demo.datasets import DatasetError
from demo.gas_data import Benchmark, load_benchmark
from demo.gas_settings import DATASETS, MODELS, SETTINGS, Setting
from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters import gammagl_models
from gglspeedup.normalise import symmetric_normalisation, with_self_loops

tlx.logging.set_verbosity(tlx.logging.WARN)  # no line a layer

OUTSIDE = -1  # the label of nodes that are not trained on


class BatchLoss(tlx.model.WithLoss):
    """The loss of some rows of a batch, and the weight decay of the regularised modules and of the others."""

    def __init__(self, model: Any, decay: tuple[float, float]) -> None:
        super().__init__(model, tlx.losses.softmax_cross_entropy_with_logits)
        groups = zip(decay, (model.reg_modules, model.nonreg_modules), strict=True)
        self.decayed = [(rate, weight) for rate, modules in groups if rate for weight in modules.trainable_weights]

    def forward(self, batch: Any, rows: Any) -> Any:
        """Return the mean cross entropy, plus half the decay times each weight's square."""
        loss = self._loss_fn(tlx.gather(self.backbone_network(batch), rows), tlx.gather(batch.y, rows))
        for rate, weight in self.decayed:
            loss = loss + rate / 2 * tlx.reduce_sum(weight * weight)
        return loss


def train(data: Benchmark, setting: Setting, options: argparse.Namespace) -> float:
    """Train once; return the test accuracy (0 to 1) at the first epoch of the best validation."""
    tlx.set_seed(options.seed)
    graph, weight = CSRGraph(data.indptr, data.indices), None
    if setting.model == "gat":
        graph = with_self_loops(graph)
    else:
        graph, weight = symmetric_normalisation(graph)
    perm, ptr = partition(graph, setting.parts[0], options.partition)
    graph = permute(graph, perm)
    x, y = data.x[perm], data.y[perm]
    train_mask, *judged = (mask[perm] for mask in data.split(options.seed))
    loader = SubgraphLoader(
        graph, x.toarray() if scipy.sparse.issparse(x) else x, np.where(train_mask, y, OUTSIDE), ptr=ptr,
        batch_size=setting.parts[1], edge_weight=None if weight is None else weight[graph.edge_ids],
        device=options.device, backend="tensorlayerx", seed=options.seed,
    )  # fmt: skip
    (whole,) = loader.evaluation(batch_size=setting.parts[0])

    tlx.set_device("GPU" if loader.device.is_cuda else "CPU", loader.device.index or 0)
    model = setting.make(gammagl_models, x.shape[1], data.num_classes)
    model.histories = HistoryStore(len(y), model.history_widths, loader.device)
    loss, adam = BatchLoss(model, setting.decay), tlx.optimizers.Adam(setting.lr)
    update = tlx.model.TrainOneStep(loss, adam, model.trainable_weights)

    def accuracies() -> list[float]:
        """Return the accuracies of validation and test; the pass brings all histories up to date."""
        model.set_eval()
        right = tlx.convert_to_numpy(model(whole)).argmax(1) == y
        return [float(right[mask].mean()) for mask in judged]

    accuracies()
    best_val, best_test = -1.0, 0.0
    with tqdm(total=options.epochs, desc=f"{setting.model} on {data.name}", unit="epoch", disable=options.quiet) as bar:
        for _ in range(options.epochs):
            model.set_train()
            for batch in loader:
                rows = np.flatnonzero(tlx.convert_to_numpy(batch.y) != OUTSIDE)
                if len(rows):
                    update(batch, tlx.convert_to_tensor(rows, dtype=tlx.int64))
            val, test = accuracies()
            if val > best_val:
                best_val, best_test = val, test
            bar.set_postfix_str(f"test {100 * best_test:.2f}", refresh=False)
            bar.update()
    return best_test


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = argparse.ArgumentParser(description="Train a model with histories on GammaGL's layers, in the paper's setting.")
    p.add_argument("--model", choices=MODELS, default="gcn")
    p.add_argument("--dataset", choices=DATASETS, default="cora")
    p.add_argument("--root", help="folder with npz files; without, Cora, CiteSeer and PubMed are looked for elsewhere")
    p.add_argument("--device", default="auto", help='"cpu", "cuda:0", or "auto": a GPU if there is one (default)')
    p.add_argument("--epochs", type=int, help="default: the paper's")
    p.add_argument("--partition", choices=("metis", "contiguous", "random"), default="metis")
    p.add_argument("--seed", type=int, default=0, help="of the split, parameters, dropout and order of parts")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    options = p.parse_args(arguments)
    setting = SETTINGS.get((options.model, options.dataset))
    if setting is None:
        p.error(f"the paper has no setting of {options.model} on {options.dataset}")
    options.epochs, start = options.epochs or setting.epochs, time.perf_counter()
    try:
        accuracy = train(load_benchmark(options.dataset, options.root), setting, options)
    except (DatasetError, GGLSpeedupError) as error:
        print(f"gas_tensorlayerx: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{options.model} on {options.dataset}, in TensorLayerX {tlx.__version__} on {tlx.BACKEND}")
    print(f"test accuracy    {100 * accuracy:.2f} % at the best validation of {options.epochs} epochs")
    print(f"time             {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
