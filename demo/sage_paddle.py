"""Trains GraphSAGE with Paddle: gglspeedup samples and gathers, paddle.geometric aggregates, paddle learns.

Run it from the checkout with ``python -m demo.sage_paddle``; ``--help`` lists the options. It needs paddlepaddle.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)  # nothing is compiled here
    import paddle
    from paddle.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import Adj, NodeLoader
from gglspeedup.loader import Batch


class SageLayer(paddle.nn.Layer):
    """One GraphSAGE layer: a linear map of the neighbours' mean, plus one of the node itself."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.neighbours = paddle.nn.Linear(in_width, out_width)
        self.itself = paddle.nn.Linear(in_width, out_width, bias_attr=False)

    def forward(self, x: paddle.Tensor, adj: Adj) -> paddle.Tensor:
        """Return the targets' new features: targets are the first of the sources."""
        targets = adj.size[1]
        mean = paddle.geometric.send_u_recv(x, adj.row, adj.col, reduce_op="mean", out_size=targets)
        return self.neighbours(mean) + self.itself(x[:targets])


class GraphSage(paddle.nn.Layer):
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
        self.layers = paddle.nn.LayerList([SageLayer(*pair) for pair in itertools.pairwise(widths)])
        self.dropout = paddle.nn.Dropout(dropout)

    def forward(self, x: paddle.Tensor, adjs: list[Adj]) -> paddle.Tensor:
        """Return the scores of the seeds."""
        for layer, adj in zip(self.layers, adjs, strict=True):
            if layer is not self.layers[0]:
                x = functional.relu(x)
            x = layer(self.dropout(x), adj)
        return x


def build(width: int, classes: int, options: argparse.Namespace) -> tuple[GraphSage, paddle.optimizer.Optimizer]:
    """Return a model for features of a width, with its optimizer; the weights are of Paddle's random state."""
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([width, *hidden, classes], options.dropout)
    decay = paddle.regularizer.L2Decay(options.weight_decay)
    return model, paddle.optimizer.Adam(options.lr, parameters=model.parameters(), weight_decay=decay)


def loss_of(model: paddle.nn.Layer, batch: Batch) -> paddle.Tensor:
    """Return the mean loss of a batch's seeds."""
    return functional.cross_entropy(model(batch.x, batch.adjs), batch.y)


def learn(model: paddle.nn.Layer, optimizer: paddle.optimizer.Optimizer, batch: Batch) -> float:
    """Train on a batch and return its mean loss."""
    model.train()
    loss = loss_of(model, batch)
    optimizer.clear_grad()
    loss.backward()
    optimizer.step()
    return float(loss)


@paddle.no_grad()
def score(model: paddle.nn.Layer, batch: Batch) -> np.ndarray:
    """Return the scores of a batch's seeds."""
    model.eval()
    return model(batch.x, batch.adjs).numpy()


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    paddle.seed(seed)
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=options.fanouts,
        batch_size=options.batch_size, device=options.device, cache=options.cache, backend="paddle", seed=seed,
    )  # fmt: skip
    judged = loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)
    paddle.set_device(f"gpu:{loader.device.index}" if loader.device.is_cuda else "cpu")
    model, optimizer = build(data.x.shape[1], data.num_classes, options)
    return fit(data, options, seed, loader, judged, partial(learn, model, optimizer), partial(score, model))


if __name__ == "__main__":
    sys.exit(main(train, framework=f"Paddle {paddle.__version__}"))
