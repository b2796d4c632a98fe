"""Trains GraphSAGE with TensorLayerX: gglspeedup samples and gathers, GammaGL's SAGEConv learns.

Run it from the checkout with ``python -m demo.sage_tensorlayerx``; ``--help`` lists the options. It needs tensorlayerx,
gammagl and a backend, which the environment variable TL_BACKEND names: tensorflow (the default), torch or paddle.
"""

# ruff: noqa: E402 - what is imported last must find the backend chosen

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo import tlx_compat

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, on import: errors, no notes on instruction sets
tlx_compat.install(os.environ.get("TL_BACKEND", "tensorflow"))
import tensorlayerx as tlx
from gammagl.layers.conv import SAGEConv

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import Adj, NodeLoader
from gglspeedup.loader import Batch

tlx.logging.set_verbosity(tlx.logging.WARN)  # no line a layer


class GraphSage(tlx.nn.Module):
    """GraphSAGE over sampled hops, mean aggregation.

    Parameters
    ----------
    widths : sequence of int
        Width of the features, of each hidden layer, and the number of classes.
    dropout : float
        Fraction dropped before each layer while training.
    """

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.convs = tlx.nn.ModuleList([SAGEConv(*pair) for pair in itertools.pairwise(widths)])
        self.activation = tlx.nn.ReLU()
        self.dropout = tlx.nn.Dropout(dropout)

    def forward(self, x: Any, adjs: list[Adj]) -> Any:
        """Return the scores of the seeds: each layer's targets are the first of its sources."""
        for hop, (layer, adj) in enumerate(zip(self.convs, adjs, strict=True)):
            x = self.dropout(self.activation(x) if hop else x)
            x = layer((x, x[: adj.size[1]]), adj.edge_index)
        return x


class BatchLoss(tlx.model.WithLoss):
    """The loss of a batch's scores."""

    def forward(self, batch: Batch, y: Any) -> Any:
        """Return the mean cross entropy."""
        return self._loss_fn(self.backbone_network(batch.x, batch.adjs), y)


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    tlx.set_seed(seed)
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=options.fanouts,
        batch_size=options.batch_size, device=options.device, cache=options.cache, backend="tensorlayerx", seed=seed,
    )  # fmt: skip
    judged = loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)

    tlx.set_device("GPU" if loader.device.is_cuda else "CPU", loader.device.index or 0)
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([data.x.shape[1], *hidden, data.num_classes], options.dropout)
    update = tlx.model.TrainOneStep(
        BatchLoss(model, tlx.losses.softmax_cross_entropy_with_logits),
        tlx.optimizers.Adam(options.lr, weight_decay=options.weight_decay),  # the usual L2 term, on every backend
        model.trainable_weights,
    )

    def step(batch: Batch) -> float:
        model.set_train()
        return float(update(batch, batch.y))

    def score(batch: Batch) -> np.ndarray:
        model.set_eval()
        return tlx.convert_to_numpy(model(batch.x, batch.adjs))

    return fit(data, options, seed, loader, judged, step, score)


if __name__ == "__main__":
    sys.exit(main(train, framework=f"TensorLayerX {tlx.__version__}, on {tlx.BACKEND} {tlx.BACKEND_VERSION}"))
