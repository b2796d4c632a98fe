"""Trains GraphSAGE with PyTorch: gglspeedup samples and gathers, PyG's SAGEConv and torch learn.

Run it from the checkout with ``python -m demo.sage_torch``; ``--help`` lists the options. It needs torch and
torch-geometric.
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
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import Adj, NodeLoader
from gglspeedup.loader import Batch

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import SAGEConv


class GraphSage(torch.nn.Module):
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
        self.layers = torch.nn.ModuleList(SAGEConv(*pair) for pair in itertools.pairwise(widths))
        self.dropout = dropout

    def forward(self, x: torch.Tensor, adjs: list[Adj]) -> torch.Tensor:
        """Return the scores of the seeds: each layer's targets are the first of its sources."""
        for layer, adj in zip(self.layers, adjs, strict=True):
            if layer is not self.layers[0]:
                x = functional.relu(x)
            x = functional.dropout(x, self.dropout, self.training)
            x = layer((x, x[: adj.size[1]]), adj.edge_index)
        return x


def build(
    width: int, classes: int, options: argparse.Namespace, device: str
) -> tuple[GraphSage, torch.optim.Optimizer]:  # fmt: skip
    """Return a model for features of a width, with its optimizer; the weights are of PyTorch's random state."""
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([width, *hidden, classes], options.dropout).to(device)
    return model, torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean loss of a batch's seeds."""
    return functional.cross_entropy(model(batch.x, batch.adjs), batch.y)


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Train on a batch and return its mean loss."""
    model.train()
    loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def score(model: torch.nn.Module, batch: Batch) -> np.ndarray:
    """Return the scores of a batch's seeds."""
    model.eval()
    return model(batch.x, batch.adjs).cpu().numpy()


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    torch.manual_seed(seed)
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=options.fanouts,
        batch_size=options.batch_size, device=options.device, cache=options.cache, backend="torch", seed=seed,
    )  # fmt: skip
    judged = loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)
    model, optimizer = build(data.x.shape[1], data.num_classes, options, str(loader.device))
    return fit(data, options, seed, loader, judged, partial(learn, model, optimizer), partial(score, model))


if __name__ == "__main__":
    sys.exit(main(train, framework=f"PyTorch {torch.__version__}"))
