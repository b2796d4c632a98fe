"""What the demos share, whatever their framework: command line, training loop, measurements and report.

A demo has a function ``train(data, options, seed)`` that makes a loader, a model and two functions, and hands them to
:func:`fit`; :func:`main` calls it once for each seed. Nothing here knows a framework.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from demo.datasets import NAMES, Dataset, DatasetError, load_dataset
from gglspeedup import GGLSpeedupError, NodeLoader
from gglspeedup.threads import get_num_threads

Array = npt.NDArray[Any]


class Speed(NamedTuple):
    """How fast neighbours are sampled and features gathered."""

    edges_per_second: float = 0.0
    gathered_gb_per_second: float = 0.0


@dataclass
class Run:
    """One training.

    Attributes
    ----------
    device : str
        Where batches were made: ``"cpu"``, ``"cuda:0"``.
    history : list of dict
        Of each epoch `train_loss`, `val_loss`, `val_accuracy` and `test_accuracy`.
    epoch_seconds : list of float
        The time that each epoch trained, without its evaluation.
    hit_rate : float
        The fraction of feature rows that came from the fastest tier.
    speed : Speed
        Of :func:`speed`.
    seconds : float
        All of the training, from the making of the loader to the last measurement; :func:`main` fills it in.
    """

    device: str = "cpu"
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    hit_rate: float = 0.0
    speed: Speed = field(default_factory=Speed)
    seconds: float = 0.0

    @property
    def best_epoch(self) -> int:
        """The epoch with the best validation accuracy; of equals, that with the lowest validation loss."""
        merits = [(epoch["val_accuracy"], -epoch["val_loss"]) for epoch in self.history]
        return merits.index(max(merits))

    @property
    def test_accuracy(self) -> float:
        """Test accuracy at the epoch that validation chose."""
        return self.history[self.best_epoch]["test_accuracy"]


# --- training ------------------------------------------------------------------------------------------------------


def fit(
    data: Dataset, options: argparse.Namespace, seed: int, loader: Any, judged: Iterable[Any],
    step: Callable[[Any], float], score: Callable[[Any], Array], measured: NodeLoader | None = None,
) -> Run:  # fmt: skip
    """Train for all epochs, and judge each.

    Parameters
    ----------
    data : Dataset
        The graph.
    options : argparse.Namespace
        Of :func:`parser`.
    seed : int
        What to call this training in the progress bar.
    loader : NodeLoader, or another iterable of batches
        Every iteration is an epoch over the training nodes; batches have a `batch_size`.
    judged : iterable of batches
        Of the nodes :func:`judged_nodes`, in their order.
    step : callable
        Trains on a batch and returns its mean loss.
    score : callable
        Returns the scores of a batch's seeds, float [B, C].
    measured : NodeLoader, optional
        Whose sampler and features the report speaks of; by default `loader`.
    """
    measured = loader if measured is None else measured
    run = Run(str(measured.device))
    epochs = tqdm(range(options.epochs), desc=f"{data.name}, seed {seed}", unit="epoch", disable=options.quiet)
    for _ in epochs:
        start = time.perf_counter()
        losses, sizes = zip(*((step(batch), batch.batch_size) for batch in loader), strict=True)
        run.epoch_seconds.append(time.perf_counter() - start)
        scores = np.concatenate([score(batch) for batch in judged])
        run.history.append(assess(data, float(np.average(losses, weights=sizes)), scores))
        latest = run.history[-1]
        epochs.set_postfix(loss=f"{latest['train_loss']:.3f}", val=f"{latest['val_accuracy']:.3f}")
    run.hit_rate = measured.features.hit_rate
    run.speed = speed(measured)
    return run


def judged_nodes(data: Dataset) -> Array:
    """Return the nodes to judge a model by: those of validation, then those of the test."""
    return np.concatenate([np.flatnonzero(data.val_mask), np.flatnonzero(data.test_mask)])


def assess(data: Dataset, train_loss: float, scores: Array) -> dict[str, float]:
    """Return an epoch's entry in the history.

    Parameters
    ----------
    data : Dataset
        The graph.
    train_loss : float
        The mean loss of the epoch's training.
    scores : float array [V + T or more, C]
        Of :func:`judged_nodes`; rows beyond these do not count.
    """
    y = data.y[judged_nodes(data)]
    validation = int(data.val_mask.sum())
    val_loss, val_accuracy = judge(scores[:validation], y[:validation])
    _, test_accuracy = judge(scores[validation : len(y)], y[validation:])
    return {
        "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy, "test_accuracy": test_accuracy
    }  # fmt: skip


def judge(scores: Array, y: Array) -> tuple[float, float]:
    """Return mean cross entropy and accuracy.

    Parameters
    ----------
    scores : float array [B, C]
        Logits.
    y : int array [B]
        Classes.

    Examples
    --------
    >>> loss, accuracy = judge(np.array([[0.0, 0.0], [30.0, 0.0]]), np.array([1, 0]))
    >>> round(loss, 4), accuracy
    (0.3466, 0.5)
    """
    shifted = scores.astype(np.float64) - scores.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return float(losses.mean()), float((scores.argmax(1) == y).mean())


def speed(loader: NodeLoader, seconds: float = 0.3) -> Speed:
    """Measure how fast a loader's sampler samples and its features are gathered, one after the other.

    Parameters
    ----------
    loader : NodeLoader
        Its batches of epoch 0 are made, over and over.
    seconds : float
        How long to measure, at least.
    """
    sampler, features, order = loader.graph_sampler, loader.features, loader.order(0)
    batches = [order[start : start + loader.batch_size] for start in range(0, len(order), loader.batch_size)]
    edges = gathered = 0
    sample_seconds = gather_seconds = 0.0
    on_device, wait = _device_context(loader.device.index)
    with on_device:
        features[sampler.sample(batches[0], 0, sizes=loader.sizes).n_id]  # kernels are loaded, which is not measured
        wait()
        while sample_seconds + gather_seconds < seconds:
            for number, seeds in enumerate(batches):
                start = time.perf_counter()
                batch = sampler.sample(seeds, number, sizes=loader.sizes)
                wait()
                sampled = time.perf_counter()
                x = features[batch.n_id]
                wait()
                gather_seconds += time.perf_counter() - sampled
                sample_seconds += sampled - start
                edges += sum(adj.edge_index.shape[1] for adj in batch.adjs)
                gathered += x.nbytes
    return Speed(edges / sample_seconds, gathered / gather_seconds / 1e9)


def _device_context(index: int | None) -> tuple[Any, Callable[[], Any]]:
    """Return a context in which a device is current, and a function that waits until it has nothing left to do."""
    if index is None:
        return nullcontext(), lambda: None
    import cupy

    return cupy.cuda.Device(index), cupy.cuda.runtime.deviceSynchronize


# --- report --------------------------------------------------------------------------------------------------------


def report(data: Dataset, runs: Sequence[Run], framework: str) -> str:
    """Return the lines that a training ends with."""
    accuracy = np.array([run.test_accuracy for run in runs])
    spread = f" ± {accuracy.std():.4f} ({len(runs)} seeds)" if len(runs) > 1 else ""
    edges, gigabytes = np.mean([run.speed for run in runs], axis=0)
    epoch = np.median([seconds for run in runs for seconds in run.epoch_seconds])
    return "\n".join(
        [
            f"graph            {data.name}, from {data.source}: {len(data.y)} nodes, {len(data.indices)} edges",
            f"framework        {framework}",
            f"test accuracy    {accuracy.mean():.4f}{spread}",
            f"sampled edges/s  {edges:.3g}",
            f"gathered GB/s    {gigabytes:.3g}",
            f"cache hit rate   {np.mean([run.hit_rate for run in runs]):.3f}",
            f"device           {device_name(runs[0].device)}",
            f"training epoch   {epoch:.3g} s (median, without evaluation)",
            f"time             {sum(run.seconds for run in runs):.1f} s",
        ]
    )


def device_name(device: str) -> str:
    """Return a device with what it is: its name, or the threads that kernels use."""
    if device.startswith("cuda"):
        import cupy

        name = cupy.cuda.runtime.getDeviceProperties(int(device.partition(":")[2]))["name"]
        return f"{device} ({name.decode()})"
    return f"{device} ({get_num_threads()} threads)"


def write_results(data: Dataset, runs: Sequence[Run], folder: Path) -> tuple[Path, Path]:
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


def _plot(data: Dataset, runs: Collection[Run], path: Path) -> None:
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
    for panel, name, label, colour in curves:
        values = np.array([[epoch[name] for epoch in run.history] for run in runs])
        epochs = np.arange(1, values.shape[1] + 1)
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
    p = argparse.ArgumentParser(description="Train GraphSAGE with neighbours sampled by gglspeedup.")
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


def main(
    train: Callable[[Dataset, argparse.Namespace, int], Run], arguments: Sequence[str] | None = None, *, framework: str,
    command_line: argparse.ArgumentParser | None = None,
) -> int:  # fmt: skip
    """Run the command line of a demo; return its exit status.

    Parameters
    ----------
    train : callable
        Trains once, with a graph, the options and a seed.
    arguments : sequence of str, optional
        By default those of the process.
    framework : str
        What the report calls the framework.
    command_line : argparse.ArgumentParser, optional
        By default :func:`parser`'s; another has its options, and more.
    """
    options = (command_line or parser()).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runs = []
    try:
        data = load_dataset(options.dataset, options.root)
        for seed in range(options.seeds):
            start = time.perf_counter()
            runs.append(train(data, options, seed))
            runs[-1].seconds = time.perf_counter() - start
    except (DatasetError, GGLSpeedupError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    table, plot = write_results(data, runs, options.out)
    print(report(data, runs, framework))
    print(f"written          {plot}, {table}")
    return 0
