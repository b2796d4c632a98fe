"""Gives a model of one's own histories: GCNII of 64 layers, written with PyG's GCN2Conv, trained on Cora in parts.

GNNAutoScale adds a base class to the model, and one line a layer. Run it from the checkout with ``python -m
demo.gas_gcnii``; ``--help`` lists the options. It needs torch, torch-geometric and, for METIS, pymetis.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear, ModuleList, functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import GCN2Conv

from demo.datasets import DatasetError
from demo.gas_data import load_benchmark
from demo.gas_settings import SETTINGS
from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters.scalable import Scalable
from gglspeedup.normalise import symmetric_normalisation

SETTING = SETTINGS["gcnii", "cora"]


class GCNII(Scalable, torch.nn.Module):  # 1. Scalable is mixed in
    """Deep graph convolutional network (Chen et al., ICML 2020)."""

    def __init__(self, features: int, classes: int, layers: int) -> None:
        super().__init__()
        self.lins = ModuleList([Linear(features, SETTING.hidden), Linear(SETTING.hidden, classes)])
        sizes = (SETTING.hidden, SETTING.alpha, SETTING.theta)
        self.convs = ModuleList(GCN2Conv(*sizes, layer, normalize=False) for layer in range(1, layers + 1))

    def forward(self, batch: Any) -> Any:
        x = first = self.lins[0](self._drop(batch.x)).relu()
        for layer, conv in enumerate(self.convs):
            if layer:
                x = self.push_and_pull(layer - 1, x, batch)  # 2. between two layers, the rows of the halo are pulled
            x = conv(self._drop(x), first, batch.adj.edge_index, batch.edge_weight).relu()
        return self.lins[1](self._drop(x[: batch.batch_size]))  # 3. the first rows are those of the batch itself

    def _drop(self, x: Any) -> Any:
        return functional.dropout(x, SETTING.dropout, self.training)


def train(layers: int, epochs: int, method: str, root: str | None, quiet: bool) -> tuple[float, ...]:
    """Train, and return the accuracies of validation and test at the best epoch of validation."""
    data = load_benchmark("cora", root)
    graph, weight = symmetric_normalisation(CSRGraph(data.indptr, data.indices))
    parts, batch_parts = SETTING.parts
    perm, ptr = partition(graph, parts, method)
    graph = permute(graph, perm)
    train_mask, *judged = (torch.from_numpy(mask[perm]) for mask in data.split(0))
    # 4. A batch is a part with its halo; that of evaluation is all parts.
    loader = SubgraphLoader(
        graph, data.x[perm].toarray(), data.y[perm], ptr=ptr, batch_size=batch_parts, backend="torch", device="cpu",
        edge_weight=weight[graph.edge_ids],
    )  # fmt: skip
    (whole,) = loader.evaluation(batch_size=parts)
    torch.manual_seed(0)
    model = GCNII(data.x.shape[1], data.num_classes, layers)
    # 5. A table for each layer but the last, as wide as its output.
    model.histories = HistoryStore(graph.num_nodes, [SETTING.hidden] * (layers - 1), "cpu")
    groups = zip((model.convs, model.lins), SETTING.decay, strict=True)
    optimizer = torch.optim.Adam([{"params": g.parameters(), "weight_decay": decay} for g, decay in groups], SETTING.lr)

    @torch.no_grad()
    def accuracies() -> tuple[float, ...]:
        model.eval()
        right = model(whole).argmax(dim=1) == whole.y
        return tuple(float(right[mask].float().mean()) for mask in judged)

    accuracies()  # 6. fills the histories, as every evaluation brings them up to date
    best: tuple[float, ...] = (-1.0, 0.0)
    for _ in (bar := tqdm(range(epochs), f"GCNII of {layers} layers", unit="epoch", disable=quiet)):
        model.train()
        for batch in loader:
            chosen = train_mask[batch.n_id[: batch.batch_size]]
            if chosen.any():
                optimizer.zero_grad()
                functional.cross_entropy(model(batch)[chosen], batch.y[chosen]).backward()
                optimizer.step()
        best = max(best, accuracies(), key=lambda pair: pair[0])  # of equals, the earlier
        bar.set_postfix_str(f"test {100 * best[1]:.2f}", refresh=False)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = argparse.ArgumentParser(description="Train GCNII on Cora in parts with histories, in the paper's setting.")
    p.add_argument("--layers", type=int, default=SETTING.layers, help="at least 2")
    p.add_argument("--epochs", type=int, default=SETTING.epochs)
    p.add_argument("--partition", choices=("metis", "contiguous", "random"), default="metis")
    p.add_argument("--root", help="folder with cora.npz; without, it is looked for elsewhere")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    o = p.parse_args(arguments)
    try:
        val, test = train(o.layers, o.epochs, o.partition, o.root, o.quiet)
    except (DatasetError, GGLSpeedupError) as error:
        print(f"gas_gcnii: {error}", file=sys.stderr)
        return 1
    print(f"GCNII of {o.layers} layers on Cora: test accuracy {100 * test:.2f} at {100 * val:.2f} of validation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
