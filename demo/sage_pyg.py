"""Trains GraphSAGE with PyG's own NeighborLoader: gglspeedup stands in for its sampler and its stores.

Run it from the checkout with ``python -m demo.sage_pyg``; ``--help`` lists the options. It needs torch and
torch-geometric.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import CSRGraph, NodeLoader
from gglspeedup.epochs import device_for

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader
    from torch_geometric.nn import SAGEConv
    from torch_geometric.utils import trim_to_layer

    from gglspeedup.adapters.pyg import FeatureStore, GraphStore, NeighborSampler


class GraphSage(torch.nn.Module):
    """GraphSAGE over a sampled subgraph, mean aggregation.

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

    def forward(self, batch: Data) -> torch.Tensor:
        """Return the scores of the seeds, which are the first nodes of a batch."""
        x, edge_index = batch.x, batch.edge_index
        for hop, layer in enumerate(self.layers):
            # Each layer leaves out the outermost of the hops that are left: no seed sees its new features.
            x, edge_index, _ = trim_to_layer(hop, batch.num_sampled_nodes, batch.num_sampled_edges, x, edge_index)
            x = functional.dropout(functional.relu(x) if hop else x, self.dropout, self.training)
            x = layer(x, edge_index)
        return x[: batch.batch_size]


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    torch.manual_seed(seed)
    device = device_for("torch", options.device)
    graph = CSRGraph(data.indptr, data.indices)
    features = FeatureStore(graph, device, options.cache)
    features.put_tensor(data.x, group_name=None, attr_name="x", index=None)
    features.put_tensor(data.y, group_name=None, attr_name="y", index=None)

    def batches(nodes: np.ndarray, sizes: list[int], batch_size: int, shuffle: bool) -> NeighborLoader:
        return NeighborLoader(
            (features, GraphStore(graph)), sizes, input_nodes=torch.from_numpy(nodes), batch_size=batch_size,
            shuffle=shuffle, neighbor_sampler=NeighborSampler(graph, sizes, device=device, seed=seed),
        )  # fmt: skip

    loader = batches(np.flatnonzero(data.train_mask), options.fanouts, options.batch_size, shuffle=True)
    judged = batches(judged_nodes(data), [-1] * len(options.fanouts), options.eval_batch_size, shuffle=False)

    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([data.x.shape[1], *hidden, data.num_classes], options.dropout).to(str(device))
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)

    def step(batch: Data) -> float:
        model.train()
        loss = functional.cross_entropy(model(batch), batch.y[: batch.batch_size])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def score(batch: Data) -> np.ndarray:
        model.eval()
        return model(batch).cpu().numpy()

    measured = NodeLoader(
        graph, features.features["x"], seeds=data.train_mask, sizes=options.fanouts, batch_size=options.batch_size,
        device=device, expand="frontier", seed=seed,
    )  # fmt: skip
    return fit(data, options, seed, loader, judged, step, score, measured)


if __name__ == "__main__":
    sys.exit(main(train, framework=f"PyG {sys.modules['torch_geometric'].__version__}, PyTorch {torch.__version__}"))
