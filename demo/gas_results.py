"""What trainings of GNNAutoScale's small benchmark reached: a CSV line a run, and a table beside the paper's."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from demo.datasets import DatasetError
from demo.gas_settings import PUBLISHED, SETTINGS


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
