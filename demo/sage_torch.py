"""Trains GraphSAGE on a real graph: gglspeedup samples and gathers, PyG's SAGEConv and torch learn.

Run it with ``python -m demo.sage_torch`` from the checkout; ``--help`` lists the options.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import NAMES, Dataset, DatasetError, load_dataset
from gglspeedup import CGPUFeature, CSRGraph, GGLSpeedupError, GPUSampler

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import SAGEConv

logger = logging.getLogger("gglspeedup.demo")


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

    def forward(self, x: torch.Tensor, adjs: list[Any]) -> torch.Tensor:
        """Return the scores of the seeds: each layer's targets are the first of its sources."""
        for layer, adj in zip(self.layers, adjs, strict=True):
            if layer is not self.layers[0]:
                x = functional.relu(x)
            x = functional.dropout(x, self.dropout, self.training)
            x = layer((x, x[: adj.size[1]]), adj.edge_index)
        return x


@dataclass
class Meter:
    """What sampling and gathering for training brought, and the time they took."""

    edges: int = 0
    gathered_bytes: int = 0
    sample_seconds: float = 0.0
    gather_seconds: float = 0.0

    @property
    def edges_per_second(self) -> float:
        """Sampled edges a second of sampling."""
        return self.edges / max(self.sample_seconds, 1e-9)

    @property
    def gathered_gb_per_second(self) -> float:
        """Gathered gigabytes a second of gathering."""
        return self.gathered_bytes / max(self.gather_seconds, 1e-9) / 1e9


class Feed:
    """Makes torch batches of seeds: samples, gathers, and hands both over without a copy.

    Parameters
    ----------
    graph : CSRGraph
        The graph.
    features : CGPUFeature
        Its features.
    device : str
        Where batches are made: ``"cpu"``, ``"cuda:0"``, ``"auto"``.
    sizes : sequence of int
        Fanouts.
    seed : int
        Of the draws.
    """

    def __init__(self, graph: CSRGraph, features: CGPUFeature, device: str, sizes: Sequence[int], seed: int) -> None:
        self.sampler = GPUSampler(device, graph, sizes, seed=seed)
        self.features = features
        self.meter = Meter()

    def batch(self, seeds: Any) -> tuple[torch.Tensor, list[Any]]:
        """Return the features of a sampled neighbourhood and its hops, outermost first."""
        start = time.perf_counter()
        batch = self.sampler.sample(seeds)
        adjs = [adj.cp2torch() for adj in batch.adjs]
        sampled = time.perf_counter()
        x = torch.from_dlpack(self.features[batch.n_id])
        if x.is_cuda:
            torch.cuda.synchronize()  # a gather on a GPU has only been started when the call returns
        gathered = time.perf_counter()
        self.meter.edges += sum(adj.edge_index.shape[1] for adj in adjs)
        self.meter.gathered_bytes += x.numel() * x.element_size()
        self.meter.sample_seconds += sampled - start
        self.meter.gather_seconds += gathered - sampled
        return x, adjs


@dataclass
class Run:
    """One training: what each epoch reached, and the test accuracy at the epoch that validation chose."""

    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    meter: Meter = field(default_factory=Meter)
    hit_rate: float = 0.0
    device: str = "cpu"
    seconds: float = 0.0

    @property
    def test_accuracy(self) -> float:
        """Test accuracy at the epoch with the best validation accuracy; of equals, the lowest validation loss."""
        return self.history[self.best_epoch]["test_accuracy"]


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once.

    Parameters
    ----------
    data : Dataset
        The graph.
    options : argparse.Namespace
        Of :func:`parser`.
    seed : int
        Of weights, dropout, the order of the seeds and the draws of neighbours.

    Returns
    -------
    Run
        The training's history and figures.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    shuffle = np.random.default_rng(seed)
    graph = CSRGraph(data.indptr, data.indices)
    features = CGPUFeature(graph, options.device, options.cache)
    features.from_cpu_tensor(data.x)
    feed = Feed(graph, features, options.device, options.fanouts, seed)
    whole = Feed(graph, features, options.device, [-1] * len(options.fanouts), seed)
    device = torch.device(str(feed.sampler.device))
    y = torch.from_numpy(data.y).to(device)

    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([data.x.shape[1], *hidden, data.num_classes], options.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)
    train_nodes, val_nodes, test_nodes = (np.flatnonzero(m) for m in (data.train_mask, data.val_mask, data.test_mask))
    feed.batch(train_nodes[:1])  # the first call loads or compiles kernels, which is not what the meter is for
    feed.meter = Meter()

    run = Run(device=str(feed.sampler.device))
    epochs = tqdm(range(options.epochs), desc=f"{data.name}, seed {seed}", unit="epoch", disable=options.quiet)
    for _ in epochs:
        model.train()
        loss_sum = 0.0
        for seeds in _split(shuffle.permutation(train_nodes), options.batch_size):
            loss = functional.cross_entropy(model(*feed.batch(seeds)), y[seeds])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(seeds)
        scores = predict(model, whole, np.concatenate([val_nodes, test_nodes]), options.eval_batch_size)
        val_loss, val_accuracy = judge(scores[: len(val_nodes)], y[val_nodes])
        _, test_accuracy = judge(scores[len(val_nodes) :], y[test_nodes])
        run.history.append(
            {
                "train_loss": loss_sum / len(train_nodes),
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "test_accuracy": test_accuracy,
            }
        )
        epochs.set_postfix(loss=f"{run.history[-1]['train_loss']:.3f}", val=f"{val_accuracy:.3f}")
    run.best_epoch = max(range(len(run.history)), key=lambda i: _merit(run.history[i]))
    run.meter = feed.meter
    run.hit_rate = features.hit_rate
    run.seconds = time.perf_counter() - start
    return run


@torch.no_grad()
def predict(model: GraphSage, feed: Feed, nodes: np.ndarray[Any, Any], batch_size: int) -> torch.Tensor:
    """Return the scores of some nodes, batch by batch."""
    model.eval()
    return torch.cat([model(*feed.batch(seeds)) for seeds in _split(nodes, batch_size)])


def judge(scores: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    return float(functional.cross_entropy(scores, y)), float((scores.argmax(1) == y).float().mean())


def _split(nodes: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, len(nodes), size):
        yield nodes[start : start + size]


def _merit(epoch: dict[str, float]) -> tuple[float, float]:
    return epoch["val_accuracy"], -epoch["val_loss"]


# --- report --------------------------------------------------------------------------------------------------------


def report(data: Dataset, runs: list[Run]) -> str:
    """Return the lines that a training ends with."""
    accuracy = np.array([run.test_accuracy for run in runs])
    meters = [run.meter for run in runs]
    total = Meter(*(sum(getattr(meter, name) for meter in meters) for name in Meter.__dataclass_fields__))
    spread = f" ± {accuracy.std():.4f} ({len(runs)} seeds)" if len(runs) > 1 else ""
    return "\n".join(
        [
            f"graph            {data.name}, from {data.source}: {len(data.y)} nodes, {len(data.indices)} edges",
            f"test accuracy    {accuracy.mean():.4f}{spread}",
            f"sampled edges/s  {total.edges_per_second:.3g}",
            f"gathered GB/s    {total.gathered_gb_per_second:.3g}",
            f"cache hit rate   {np.mean([run.hit_rate for run in runs]):.3f}",
            f"device           {device_name(runs[0].device)}",
            f"time             {sum(run.seconds for run in runs):.1f} s",
        ]
    )


def device_name(device: str) -> str:
    """Return a device with what it is: its name, or the threads that torch uses."""
    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def write_results(data: Dataset, runs: list[Run], folder: Path) -> tuple[Path, Path]:
    """Write a CSV file of every epoch and a plot of loss and accuracy; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, plot = folder / f"sage_{data.name}.csv", folder / f"sage_{data.name}.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "epoch", *runs[0].history[0]])
        for number, run in enumerate(runs):
            writer.writerows([number, epoch, *values.values()] for epoch, values in enumerate(run.history))
    _plot(data, runs, plot)
    return table, plot


def _plot(data: Dataset, runs: list[Run], path: Path) -> None:
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    curves = [
        (panels[0], "train_loss", "training", "C0"),
        (panels[0], "val_loss", "validation", "C1"),
        (panels[1], "val_accuracy", "validation", "C1"),
        (panels[1], "test_accuracy", "test", "C2"),
    ]
    epochs = np.arange(1, len(runs[0].history) + 1)
    for panel, name, label, colour in curves:
        values = np.array([[epoch[name] for epoch in run.history] for run in runs])
        panel.plot(epochs, values.mean(0), label=label, color=colour)
        if len(runs) > 1:
            panel.fill_between(epochs, values.min(0), values.max(0), alpha=0.2, color=colour)
    for run in runs:
        panels[1].plot(run.best_epoch + 1, run.test_accuracy, "o", color="C2", markersize=4)
    for panel, label in zip(panels, ("loss", "accuracy"), strict=True):
        panel.set(xlabel="epoch", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend()
    accuracy = np.mean([run.test_accuracy for run in runs])
    figure.suptitle(f"GraphSAGE on {data.name}: test accuracy {accuracy:.3f} (dots: epochs that validation chose)")
    figure.savefig(path, dpi=120)


# --- command line --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(prog="demo", description="Train GraphSAGE with neighbours sampled by gglspeedup.")
    p.add_argument("--dataset", default="pubmed", help=f"{', '.join(NAMES)}, or a path (default: pubmed)")
    p.add_argument("--root", help="folder with Planetoid's ind.* files or npz files; the only place looked in if given")
    p.add_argument("--device", default="auto", help='"cpu", "cuda:0", or "auto": a GPU if there is one (default)')
    p.add_argument("--epochs", type=_positive, default=60)
    p.add_argument("--hidden", type=_positive, default=128, help="width of the hidden layers")
    p.add_argument("--batch-size", type=_positive, default=64, help="seeds a training batch")
    p.add_argument("--eval-batch-size", type=_positive, default=2048, help="seeds a batch of evaluation")
    p.add_argument("--fanouts", type=int, nargs="+", default=[25, 10], help="neighbours a hop, nearest the seeds first")
    p.add_argument("--seeds", type=_positive, default=1, help="train with this many seeds, report mean and deviation")
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--dropout", type=float, default=0.5)
    p.add_argument("--weight-decay", type=float, default=5e-4)
    p.add_argument("--cache", default="0.1G", help="GPU memory for hot features (default: 0.1G; no effect on a CPU)")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder for plot and table (default: out)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = load_dataset(options.dataset, options.root)
        runs = [train(data, options, seed) for seed in range(options.seeds)]
    except (DatasetError, GGLSpeedupError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    table, plot = write_results(data, runs, options.out)
    print(report(data, runs))
    print(f"written          {plot}, {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
