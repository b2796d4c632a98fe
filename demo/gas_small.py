"""Trains GCN, GAT, APPNP and GCNII as the paper of GNNAutoScale does, on whole graphs or in parts with histories.

Run it from the checkout with ``python -m demo.gas_small``; ``--help`` lists the options. It needs torch,
torch-geometric and, for METIS, pymetis.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import DatasetError
from demo.gas_data import Benchmark, load_benchmark
from demo.gas_settings import DATASETS, MODELS, PUBLISHED, SETTINGS, Setting
from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters.pyg_models import APPNP, GAT, GCN, GCNII
from gglspeedup.normalise import symmetric_normalisation, with_self_loops

logger = logging.getLogger("gglspeedup.demo")

OUTSIDE = -100  # what cross_entropy leaves out


@dataclass(frozen=True)
class Cell:
    """What is trained, and how.

    Attributes
    ----------
    model, dataset : str
        Which hyper-parameters.
    mode : str
        ``"full"``: on the whole graph; ``"gas"``: in parts with histories, which the rest is about.
    epochs : int
        How many.
    parts, batch_parts : int
        Parts of the graph, and of a batch.
    partition, storage, dtype : str
        How the graph is cut, where histories lie, and what they are stored as.
    """

    model: str
    dataset: str
    mode: str
    epochs: int
    parts: int = 1
    batch_parts: int = 1
    partition: str = "none"
    storage: str = "none"
    dtype: str = "none"

    def variant(self) -> str:
        """Return how a training in parts differs from the paper's."""
        setting = SETTINGS[self.model, self.dataset]
        usual = replace(self, epochs=setting.epochs)
        if self.mode == "gas":
            parts, batch_parts = setting.parts
            usual = replace(usual, parts=parts, batch_parts=batch_parts, partition="metis", storage="memory",
                            dtype="float32")  # fmt: skip
        names = [field.name for field in fields(self)]
        values = ((name, getattr(self, name)) for name in names if getattr(self, name) != getattr(usual, name))
        return ", ".join(f"{value} {name}" if isinstance(value, int) else value for name, value in values)


@dataclass(frozen=True)
class Result:
    """One training: the first epoch of the best validation accuracy, both accuracies (0 to 1) then, and the time."""

    best_epoch: int = 0
    val_accuracy: float = -1.0
    test_accuracy: float = 0.0
    seconds: float = 0.0


class Batches:
    """Batches of a graph's parts, with their features.

    Parameters
    ----------
    graph : CSRGraph
        With self-loops, its nodes renumbered by part.
    weight : float32 array [num_edges] or None
        Of its edges.
    x : float32 array [N, F], or scipy CSR matrix
        Features. A matrix stays one in the batches, whose first layer then reads and drops out what is stored alone.
    **options
        Of SubgraphLoader.
    """

    def __init__(self, graph: CSRGraph, weight: Any, x: Any, **options: Any) -> None:
        self.matrix = x if scipy.sparse.issparse(x) else None
        dense = x if self.matrix is None else None
        self.loader = SubgraphLoader(
            graph, dense, edge_weight=weight, backend="torch", device="cpu", prefetch=0, **options
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if self.matrix is not None:
                rows = self.matrix[batch.n_id.numpy()]
                parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
                batch.x = torch.sparse_csr_tensor(*parts, rows.shape, check_invariants=False)
            yield batch


class Trainer:
    """Trains a cell, run by run; what all runs share is made once.

    Parameters
    ----------
    cell : Cell
        What to train.
    data : Benchmark
        The graph.
    """

    def __init__(self, cell: Cell, data: Benchmark) -> None:
        self.cell, self.data, self.setting = cell, data, SETTINGS[cell.model, cell.dataset]
        graph, weight = CSRGraph(data.indptr, data.indices), None
        if cell.model == "gat":
            graph = with_self_loops(graph)
        else:
            graph, weight = symmetric_normalisation(graph)
        self.perm, self.ptr = partition(graph, cell.parts, cell.partition if cell.mode == "gas" else "contiguous")
        self.graph = permute(graph, self.perm)
        self.weight = None if weight is None else weight[self.graph.edge_ids]
        self.x, self.y = data.x[self.perm], data.y[self.perm]
        whole = Batches(self.graph, self.weight, self.x, y=self.y, ptr=[0, len(self.y)], batch_size=1)
        (self.whole,) = whole

    def train(self, run: int, advance: Callable[[Result], Any]) -> Result:
        """Train once; `run` decides the split, the parameters, what is dropped out, and the order of the parts."""
        start, result = time.perf_counter(), Result()
        train, val, test = (torch.from_numpy(mask[self.perm]) for mask in self.data.split(run))
        torch.manual_seed(run)
        model = make_model(self.setting, self.x.shape[1], self.data.num_classes)
        groups = zip((model.reg_modules, model.nonreg_modules), self.setting.decay, strict=True)
        optimizer = torch.optim.Adam(
            [{"params": modules.parameters(), "weight_decay": decay} for modules, decay in groups], self.setting.lr
        )
        labels = torch.where(train, self.whole.y, OUTSIDE)
        with self._histories(model) as model.histories:
            batches = self._batches(labels, run)
            self._accuracies(model, val, test)  # fills the histories
            for epoch in range(self.cell.epochs):
                self._epoch(model, batches, optimizer)
                val_accuracy, test_accuracy = self._accuracies(model, val, test)
                if val_accuracy > result.val_accuracy:
                    result = Result(epoch, val_accuracy, test_accuracy)
                advance(result)
        return replace(result, seconds=time.perf_counter() - start)

    @contextmanager
    def _histories(self, model: Any) -> Iterator[HistoryStore | None]:
        """Give histories of zeros while a context lasts; None for a training on whole graphs."""
        if self.cell.mode == "full":
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            mapped = self.cell.storage == "mmap"
            options = {"storage": "mmap", "path": Path(folder) / "histories"} if mapped else {"storage": "device"}
            with HistoryStore(len(self.y), model.history_widths, "cpu", dtype=self.cell.dtype, **options) as store:
                yield store

    def _batches(self, labels: Any, run: int) -> Iterable[Any]:
        if self.cell.mode == "full":
            return [replace(self.whole, y=labels)]
        return Batches(
            self.graph, self.weight, self.x, y=labels, ptr=self.ptr, batch_size=self.cell.batch_parts, seed=run
        )  # fmt: skip

    def _epoch(self, model: Any, batches: Iterable[Any], optimizer: Any) -> None:
        model.train()
        for batch in batches:
            if not bool((batch.y != OUTSIDE).any()):
                continue
            optimizer.zero_grad()
            functional.cross_entropy(model(batch), batch.y, ignore_index=OUTSIDE).backward()
            if self.setting.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    @torch.no_grad()
    def _accuracies(self, model: Any, *masks: Any) -> list[float]:
        """Return the accuracies on some nodes of the whole graph; its pass brings all histories up to date."""
        model.eval()
        right = model(self.whole).argmax(dim=1) == self.whole.y
        return [float(right[mask].double().mean()) for mask in masks]


def make_model(setting: Setting, in_channels: int, out_channels: int) -> Any:
    """Return a model with new parameters."""
    sizes = (in_channels, setting.hidden, out_channels, setting.layers)
    dropout = setting.dropout
    if setting.model == "gcn":
        return GCN(*sizes, dropout=dropout)
    if setting.model == "gat":
        return GAT(*sizes, *setting.heads, dropout=dropout)
    if setting.model == "appnp":
        return APPNP(*sizes, alpha=setting.alpha, dropout=dropout)
    return GCNII(*sizes, alpha=setting.alpha, theta=setting.theta, dropout=dropout)


# --- results -------------------------------------------------------------------------------------------------------


class Results:
    """The results in a folder: ``gas_small.csv``, a line a run, and ``gas_small.md``, a table of all of them.

    Parameters
    ----------
    folder : path
        What it holds from earlier calls stays, unless the same run is made again.
    """

    def __init__(self, folder: Path) -> None:
        self.csv, self.markdown = folder / "gas_small.csv", folder / "gas_small.md"
        self.lines: dict[tuple[Cell, int], Result] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.csv.exists():
            with self.csv.open(newline="", encoding="utf-8") as file:
                try:
                    for line in csv.DictReader(file):
                        self.lines[_read(Cell, line), int(line["run"])] = _read(Result, line)
                except (KeyError, ValueError, TypeError) as error:
                    raise DatasetError(f"{self.csv} does not hold results of this demo; name another --out") from error

    def add(self, cell: Cell, run: int, result: Result) -> None:
        """Add a run, and write both files."""
        self.lines[cell, run] = result
        names = [*(field.name for field in fields(Cell)), "run", *(field.name for field in fields(Result))]
        whole = self.csv.with_suffix(".part")  # a process that dies meanwhile leaves the earlier results whole
        with whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for (of, number), found in self.lines.items():
                writer.writerow({**vars(of), "run": number, **vars(found)})
        whole.replace(self.csv)
        self.markdown.write_text(self.table() + "\n", encoding="utf-8")

    def of(self, cell: Cell) -> list[Result]:
        """Return the runs of a cell."""
        return [result for (other, _), result in self.lines.items() if other == cell]

    def table(self) -> str:
        """Return a Markdown table of all results, beside what the paper has."""
        rows: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
        for (cell, _), result in self.lines.items():
            modes = rows.setdefault((cell.model, cell.dataset, cell.variant()), {"full": [], "gas": []})
            modes[cell.mode].append(result)
        names = ("model", "dataset", "unlike the paper", "full batch", "GAS", "published (recalled)")
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        order = list(SETTINGS)
        for model, dataset, variant in sorted(rows, key=lambda row: (order.index(row[:2]), row[2])):
            ours = " | ".join(percent(runs) for runs in rows[model, dataset, variant].values())
            lines.append(f"| {model} | {dataset} | {variant} | {ours} | {published(model, dataset)} |")
        return "\n".join(lines)


def _read(kind: Any, line: dict[str, str]) -> Any:
    read: dict[Any, Callable[[str], Any]] = {"str": str, "int": int, "float": float}
    return kind(**{field.name: read[field.type](line[field.name]) for field in fields(kind)})


def percent(runs: Sequence[Result]) -> str:
    """Return mean, standard deviation (of a sample) and number of runs; a dash for none.

    Examples
    --------
    >>> percent([Result(test_accuracy=0.81), Result(test_accuracy=0.83)])
    '82.00 ± 1.41 (2 runs)'
    """
    accuracy = 100 * np.array([run.test_accuracy for run in runs])
    if len(runs) < 2:
        return f"{accuracy[0]:.2f} (1 run)" if len(runs) else "-"
    return f"{accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f} ({len(runs)} runs)"


def published(model: str, dataset: str) -> str:
    """Return what the paper has for whole graphs, and for GAS."""
    return " / ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in PUBLISHED[model, dataset])


# --- command line --------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = argparse.ArgumentParser(description="Train the small benchmark of GNNAutoScale; the defaults are the paper's.")
    p.add_argument("--model", choices=MODELS, help="default: gcn, or with --all every model")
    p.add_argument("--dataset", choices=DATASETS, help="default: cora, or with --all every dataset at hand")
    p.add_argument("--all", action="store_true", help="every model on every dataset at hand")
    p.add_argument("--full-batch", action="store_true", help="on whole graphs, without parts and histories")
    p.add_argument("--parts", type=_positive, help="parts of the graph")
    p.add_argument("--batch-parts", type=_positive, help="parts a batch")
    p.add_argument("--partition", choices=("metis", "contiguous", "random"), default="metis")
    p.add_argument("--storage", choices=("memory", "mmap"), default="memory", help="where histories lie")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of histories")
    p.add_argument("--runs", type=_positive, help="trainings, each with its own seed and split")
    p.add_argument("--epochs", type=_positive)
    p.add_argument("--root", help="folder with npz files; without, Cora, CiteSeer and PubMed are looked for elsewhere")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder for results, which add up (default: out)")
    p.add_argument("--resume", action="store_true", help="leave out runs whose results the folder has already")
    p.add_argument("--quiet", action="store_true", help="no progress bar, and only warnings")
    return p


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def cell_of(options: argparse.Namespace, model: str, dataset: str) -> Cell:
    """Return what the command line asks for."""
    setting = SETTINGS[model, dataset]
    epochs, (parts, batch_parts) = options.epochs or setting.epochs, setting.parts
    if options.full_batch:
        return Cell(model, dataset, "full", epochs)
    return Cell(
        model, dataset, "gas", epochs, options.parts or parts, options.batch_parts or batch_parts, options.partition,
        options.storage, options.dtype,
    )  # fmt: skip


def work(options: argparse.Namespace, model: str, data: Benchmark, results: Results) -> str:
    """Train all runs of a cell; return a line about them."""
    cell = cell_of(options, model, data.name)
    runs = range(options.runs or SETTINGS[model, data.name].runs)
    left = [run for run in runs if not (options.resume and (cell, run) in results.lines)]
    trainer = Trainer(cell, data)
    name = f"{model} on {data.name}, {'whole' if options.full_batch else 'in parts'}"
    with tqdm(total=len(left) * cell.epochs, desc=name, unit="epoch", disable=options.quiet) as bar:
        for run in left:

            def advance(result: Result) -> None:
                bar.set_postfix_str(f"test {100 * result.test_accuracy:.2f}", refresh=False)
                bar.update()

            results.add(cell, run, trainer.train(run, advance))
    found = results.of(cell)
    seconds = np.mean([result.seconds for result in found])
    return f"{name}: {percent(found)}, {seconds:.1f} s a run, {1e3 * seconds / cell.epochs:.1f} ms an epoch"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s")
    chosen = [
        (model, dataset) for model, dataset in SETTINGS
        if model == (options.model or (model if options.all else "gcn"))
        and dataset == (options.dataset or (dataset if options.all else "cora"))
    ]  # fmt: skip
    done = 0
    try:
        results = Results(options.out)
        for dataset in DATASETS:
            models = [model for model, other in chosen if other == dataset]
            if not models:
                continue
            try:
                data = load_benchmark(dataset, options.root)
            except DatasetError as error:
                print(f"gas_small: {error}", file=sys.stderr)
                continue
            for model in models:
                print(work(options, model, data, results), flush=True)
                done += 1
    except (DatasetError, GGLSpeedupError) as error:
        print(f"gas_small: {error}", file=sys.stderr)
        return 1
    if not done:
        print("gas_small: nothing was trained: the paper has no such cell, or no graph is at hand", file=sys.stderr)
        return 1
    print(f"\n{results.table()}\n\nwritten: {results.csv}, {results.markdown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
