"""Trains GIN on block models, whole or in parts, and measures how far histories are from the rows they stand for.

The data follow the definition of CLUSTER (Dwivedi et al., "Benchmarking graph neural networks", JMLR 2023), which
GNNAutoScale is judged on: stochastic block models, in which one node of each cluster tells its label. The regulariser
is that of Fey et al., "GNNAutoScale: scalable and expressive graph neural networks via historical embeddings" (ICML
2021), section 3: a stale row is an exact one with an error, and a layer passes errors on by at most its Lipschitz
constant. So each layer that reads histories is run again on slightly noisy inputs, and the distance between its two
outputs, which is large where the layer is steep, is made part of the loss.

Run it from the checkout with ``python -m demo.gas_gin``; ``--help`` lists the options. It needs torch, torch-geometric
and, for METIS, pymetis.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters.pyg_models import GIN

CLUSTERS, LEAST, MOST, WITHIN, BETWEEN = 6, 5, 35, 0.55, 0.25
HIDDEN, LAYERS, RATE, NOISE = 32, 4, 0.005, 0.1
MODES = ("full", "GAS", "GAS + regulariser")


class Blocks(NamedTuple):
    """Block models, merged into one graph without an edge between them.

    Attributes
    ----------
    graph : CSRGraph
        Every edge in both directions.
    x : float32 array [N, 7]
        One-hot: 1 + the cluster of the nodes that tell it, 0 of all others.
    y : int64 array [N]
        The cluster.
    ptr : int64 array [G + 1]
        Block model i is the nodes ``ptr[i]:ptr[i + 1]``.
    """

    graph: CSRGraph
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    ptr: npt.NDArray[np.int64]


def block_models(count: int, seed: int) -> Blocks:
    """Draw block models: six clusters of 5 to 35 nodes, edges of probability 0.55 within them and 0.25 between."""
    rng = np.random.default_rng(seed)
    labels, told, degrees, neighbours, start = [], [], [], [], 0
    for _ in range(count):
        sizes = rng.integers(LEAST, MOST + 1, CLUSTERS)
        y = np.repeat(np.arange(CLUSTERS), sizes)
        drawn = np.triu(rng.random((len(y), len(y))) < np.where(y[:, None] == y, WITHIN, BETWEEN), 1)
        rows, columns = np.nonzero(drawn | drawn.T)
        degrees.append(np.bincount(rows, minlength=len(y)))
        neighbours.append(columns + start)
        told.append(start + np.cumsum(sizes) - sizes + rng.integers(0, sizes))
        labels.append(y)
        start += len(y)
    y, ptr = np.concatenate(labels), np.cumsum([0, *map(len, labels)])
    x = np.zeros((len(y), 1 + CLUSTERS), np.float32)
    x[:, 0] = 1
    nodes = np.concatenate(told)
    x[nodes] = np.eye(1 + CLUSTERS)[1 + y[nodes]]
    return Blocks(CSRGraph(np.cumsum([0, *np.concatenate(degrees)]), np.concatenate(neighbours)), x, y, ptr)


class SmoothGIN(GIN):
    """GIN that adds up, in `penalty`, how much noise on their inputs changes the outputs of layers after the first."""

    def __init__(self, noise: float) -> None:
        super().__init__(1 + CLUSTERS, HIDDEN, CLUSTERS, LAYERS)
        self.noise, self.penalty = noise, torch.zeros(())

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        out = super().layer(index, x, batch, state)
        if self.training and self.noise and index:
            noisy = super().layer(index, x + self.noise * torch.randn_like(x), batch, state)
            self.penalty = self.penalty + (noisy - out).square().sum(dim=1).mean()
        return out


class Result(NamedTuple):
    """Accuracies (train, validation, test) at the best epoch of validation; rows that a batch pulls from each table; by
    layer, how far they are from exact ones, and how long these are, on average over epochs; and the time."""

    accuracy: tuple[float, ...]
    pulled: float
    distance: npt.NDArray[np.float64]
    length: npt.NDArray[np.float64]
    seconds: float


def train(blocks: Blocks, mode: str, options: argparse.Namespace) -> Result:
    """Train on batches of block models that are left whole ("full"), or of a part with histories."""
    start = time.perf_counter()
    perm, ptr, size = np.arange(len(blocks.y)), blocks.ptr, -(-options.graphs // options.parts)
    if mode != "full":
        (perm, ptr), size = partition(blocks.graph, options.parts, options.partition, seed=options.seed), 1
    owner = np.repeat(np.arange(options.graphs), np.diff(blocks.ptr))[perm]
    bounds = [options.graphs * 3 // 5, options.graphs * 4 // 5]  # three fifths train, one validates, one tests
    masks = [torch.from_numpy(np.searchsorted(bounds, owner, "right") == split) for split in range(3)]
    loader = SubgraphLoader(
        permute(blocks.graph, perm), blocks.x[perm], blocks.y[perm], ptr=ptr, batch_size=size, backend="torch",
        device="cpu", seed=options.seed,
    )  # fmt: skip
    (whole,) = loader.evaluation(batch_size=len(ptr) - 1)
    frequency = torch.bincount(whole.y[masks[0]], minlength=CLUSTERS) / masks[0].sum()

    torch.manual_seed(options.seed)
    model = SmoothGIN(NOISE if mode == MODES[2] else 0.0)
    store = None if mode == "full" else HistoryStore(len(perm), model.history_widths, "cpu")
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    best, measured, pulled = (0.0, -1.0, 0.0), [], 0
    for epoch in tqdm(range(options.epochs), mode, unit="epoch", disable=options.quiet):
        model.train()
        for number, batch in enumerate(loader):
            halo = len(batch.n_id) - batch.batch_size
            pulled += halo
            if halo and epoch and number == len(loader) - 1:
                measured.append(history_error(model, store, whole, batch))
            model.histories, model.penalty = store, torch.zeros(())
            chosen = masks[0][batch.n_id[: batch.batch_size]]
            scores = model(batch)
            loss = options.weight * model.penalty
            if chosen.any():
                loss = loss + functional.cross_entropy(scores[chosen], batch.y[chosen], 1 - frequency)
            if loss.requires_grad:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
        best = max(best, accuracies(model, whole, masks), key=lambda found: found[1])
    distance, length = np.mean(measured, axis=0) if measured else np.zeros((2, 0))
    return Result(best, pulled / options.epochs / len(loader), distance, length, time.perf_counter() - start)


@torch.no_grad()
def history_error(model: SmoothGIN, store: HistoryStore, whole: Any, batch: Any) -> list[list[float]]:
    """Return by layer the mean distance of the rows that a batch is about to pull from exact ones, and their length.

    Exact are the rows of the same weights on the whole graph, of whose nodes batch norm takes its statistics then.
    """
    model.histories, model.penalty = None, torch.zeros(())
    exact = copy.deepcopy(model)  # whose running statistics may change
    exact.noise = 0.0
    x, state, halo, found = whole.x, dict[str, Any](), batch.n_id[batch.batch_size :], []
    for index, table in enumerate(store):
        x = exact.layer(index, x, whole, state)
        stale = torch.from_numpy(table.pull(halo))
        found.append([float(rows.norm(dim=1).mean()) for rows in (stale - x[halo], x[halo])])
    return [list(column) for column in zip(*found, strict=True)]


@torch.no_grad()
def accuracies(model: SmoothGIN, whole: Any, masks: Sequence[Any]) -> tuple[float, ...]:
    """Return exact accuracies: of each class, then their mean."""
    model.eval()
    # Histories stay as training made them: in evaluation batch norm makes rows of another scale.
    model.histories = None
    right = (model(whole).argmax(dim=1) == whole.y).double()
    labels = [whole.y == label for label in range(CLUSTERS)]
    return tuple(float(np.mean([float(right[mask & label].mean()) for label in labels])) for mask in masks)


def table(results: dict[str, Result]) -> str:
    """Return a line for each training."""
    layers = "".join(f"{f'history error {layer}':>20}" for layer in range(1, LAYERS))
    lines = [f"{'':18}{'train':>7}{'val':>7}{'test':>7}{'pulled':>9}{layers}{'time':>9}"]
    for mode, (accuracy, pulled, distance, length, seconds) in results.items():
        errors = [f"{error:.2f} ({100 * error / exact:.0f} %)" for error, exact in zip(distance, length, strict=True)]
        cells = "".join(f"{text:>20}" for text in errors or ["-"] * (LAYERS - 1))
        scores = "".join(f"{100 * share:7.2f}" for share in accuracy)
        lines.append(f"{mode:18}{scores}{pulled:9.1f}{cells}{seconds:7.1f} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = argparse.ArgumentParser(description="Train GIN on block models: whole, with histories, and with a regulariser.")
    p.add_argument("--graphs", type=int, default=100, help="block models, of which three fifths train (default: 100)")
    p.add_argument("--parts", type=int, default=10, help="batches an epoch; with histories, parts (default: 10)")
    p.add_argument("--partition", choices=("random", "metis"), default="random", help="METIS cuts far fewer edges")
    p.add_argument("--epochs", type=int, default=60)
    p.add_argument("--weight", type=float, default=1.0, help="of the regulariser (default: 1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    options = p.parse_args(arguments)
    if options.graphs < 5 or options.parts < 1 or options.epochs < 2:
        p.error("at least 5 graphs, 1 part and 2 epochs are needed")
    blocks = block_models(options.graphs, options.seed)
    print(f"{options.graphs} block models: {len(blocks.y)} nodes, {blocks.graph.num_edges} edges")
    try:
        results = {mode: train(blocks, mode, options) for mode in MODES}
    except GGLSpeedupError as error:
        print(f"gas_gin: {error}", file=sys.stderr)
        return 1
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
