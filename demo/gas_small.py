"""Trains GCN, GAT, APPNP and GCNII as the paper of GNNAutoScale does, on whole graphs or in parts with histories.

Run it from the checkout with ``python -m demo.gas_small``; ``--help`` lists the options. It needs torch,
torch-geometric and, for METIS, pymetis.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from demo.gas_results import Cell, Result, Results, percent
from demo.gas_settings import DATASETS, MODELS, SETTINGS, Setting
from gglspeedup import CSRGraph, GGLSpeedupError, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters import pyg_models
from gglspeedup.epochs import device_for
from gglspeedup.normalise import symmetric_normalisation, with_self_loops

logger = logging.getLogger("gglspeedup.demo")

OUTSIDE = -100  # what cross_entropy leaves out


class Batches:
    """Batches of a graph's parts, with their features.

    Parameters
    ----------
    graph : CSRGraph
        With self-loops, its nodes renumbered by part.
    weight : float32 array [num_edges] or None
        Of its edges.
    x : float32 array [N, F], or scipy CSR matrix
        Features. On the CPU a matrix stays one in the batches, whose first layer then reads and drops out what is
        stored alone.
    device : torch.device
        Where the batches are made.
    **options
        Of SubgraphLoader.
    """

    def __init__(self, graph: CSRGraph, weight: Any, x: Any, device: torch.device, **options: Any) -> None:
        sparse = scipy.sparse.issparse(x)
        self.matrix = x if sparse and device.type == "cpu" else None
        dense = None if self.matrix is not None else x.toarray() if sparse else x
        self.loader = SubgraphLoader(
            graph, dense, edge_weight=weight, backend="torch", device=str(device), prefetch=0, **options
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
    device : torch.device
        Where to.
    """

    def __init__(self, cell: Cell, data: Benchmark, device: torch.device) -> None:
        self.device = device
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
        whole = self._batches_of(y=self.y, ptr=[0, len(self.y)], batch_size=1)
        (self.whole,) = whole

    def train(self, run: int, advance: Callable[[Result], Any]) -> Result:
        """Train once; `run` decides the split, the parameters, what is dropped out, and the order of the parts."""
        start, result = time.perf_counter(), Result()
        train, val, test = (torch.from_numpy(mask[self.perm]).to(self.device) for mask in self.data.split(run))
        torch.manual_seed(run)
        model = make_model(self.setting, self.x.shape[1], self.data.num_classes).to(self.device)
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
            options |= {"device": str(self.device), "dtype": self.cell.dtype}
            with HistoryStore(len(self.y), model.history_widths, **options) as store:
                yield store

    def _batches(self, labels: Any, run: int) -> Iterable[Any]:
        if self.cell.mode == "full":
            return [replace(self.whole, y=labels)]
        return self._batches_of(y=labels.cpu(), ptr=self.ptr, batch_size=self.cell.batch_parts, seed=run)

    def _batches_of(self, **options: Any) -> Batches:
        return Batches(self.graph, self.weight, self.x, self.device, **options)

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
    return setting.make(pyg_models, in_channels, out_channels)


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
    p.add_argument("--device", default="auto", help="cpu, cuda:0, or auto: a GPU that torch can use, else the CPU")
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
    trainer = Trainer(cell, data, torch.device(str(device_for("torch", options.device))))
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
