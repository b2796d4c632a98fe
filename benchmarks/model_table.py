"""The tables of `model.py`: ``python -m benchmarks.model_table``, with ``--write docs/gpu.md`` into that file."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import marks
from benchmarks.graphs import products_like
from benchmarks.model import (
    BUS,
    COPY,
    LAUNCH,
    MULTIPROCESSORS,
    NODE,
    ROW_BYTES,
    TRIP,
    Batch,
    gathered,
    sampled,
    waits_of,
)
from benchmarks.recorder import Recorder
from gglspeedup import CSRGraph
from gglspeedup.placement import place_graph

BEGIN, END = "<!-- python -m benchmarks.model_table -->", "<!-- end -->"
SIZES = ((25, 10), (15, 10, 5))


def own_python(graph: CSRGraph, sizes: tuple[int, ...], counts: Any) -> float:
    """Return the microseconds of the library's own Python a batch, on a device that does nothing, of the middle one."""
    recorder = Recorder()
    sampler = place_graph(graph, recorder, "device", 1 << 60)
    seeds = np.arange(int(counts[2]))
    rounds = []
    for number in range(400):
        recorder.forget()
        recorder.answers = [counts]
        begin = time.perf_counter()
        sampler.sample(seeds, sizes, seed=0, batch=number)
        rounds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(rounds[200:])


def kernels(batch: Batch) -> str:
    """Return the table of a batch's kernels."""
    lines = [
        "| hop | kernel | blocks | MB near | MB indices | trips | resident, us | bound by | UVA, us | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cost in batch.costs:
        near, far, trips = cost.touched
        moved = 1e6 * (near + far) / COPY
        bound = "bytes" if cost.resident == moved else "trips"
        bound_uva = {1e6 * far / BUS: "the bus", 1e6 * near / COPY: "bytes"}.get(cost.uva, "trips")
        lines.append(
            f"| {cost.hop or '-'} | {cost.launch.kernel} | {cost.launch.blocks} | {near / 1e6:.2f} | {far / 1e6:.2f} | "
            f"{trips:g} | {cost.resident:.1f} | {bound} | {cost.uva:.1f} | {bound_uva} |"
        )
    return "\n".join(lines)


def _ahead(batch: Batch, python: float, uva: bool) -> float:
    """Return the microseconds of a batch in the steady state of `sample_each`, where host and device work at once."""
    terms = batch.terms(uva)
    return max(terms["kernels"] + terms["between kernels"], terms["host"] + python)


def summary(batches: dict[tuple[int, ...], tuple[Batch, float]]) -> str:
    """Return the table of whole batches."""
    lines = [
        "| fanouts | edges | nodes | kernels | in a graph | uploads | waits | graph | kernels, us | between, us | "
        "calls, us | own Python, us | sum, us | M edges/s | one ahead, us | M edges/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sizes, (batch, python) in batches.items():
        for uva in (False, True):
            terms = batch.terms(uva)
            whole, ahead = sum(terms.values()) + python, _ahead(batch, python, uva)
            recorded = sum(cost.launch.recorded for cost in batch.costs)
            lines.append(
                f"| {list(sizes)} | {batch.edges:,} | {batch.nodes:,} | {len(batch.costs)} | {recorded} | "
                f"{batch.calls.count('upload')} | {waits_of(batch.calls)} | {'UVA' if uva else 'resident'} | "
                f"{terms['kernels']:.0f} | {terms['between kernels']:.0f} | {terms['host']:.0f} | {python:.0f} | "
                f"{whole:.0f} | {batch.edges / whole:.0f} | {ahead:.0f} | {batch.edges / ahead:.0f} |"
            )
    return "\n".join(lines)


def gathers(batches: dict[tuple[int, ...], tuple[Batch, float]]) -> str:
    """Return the table of gathers of the batches' rows."""
    lines = [
        f"| rows of {ROW_BYTES} bytes | from | kernel, us | calls, us | waits | of the copy's (bus's) rate |",
        "|---|---|---|---|---|---|",
    ]
    for rows in [*(batch.nodes for batch, _ in batches.values()), 1_000_000]:
        for far in (False, True):
            kernel, host, calls = gathered(rows, far)
            least = 1e6 * ROW_BYTES * rows * (1 / BUS if far else 2 / COPY)
            lines.append(
                f"| {rows:,} | {'pinned host memory' if far else 'GPU memory'} | {kernel:.0f} | {host:.0f} | "
                f"{waits_of(calls)} | {least / kernel:.0%} by the kernel, {least / (kernel + host):.0%} in all |"
            )
    return "\n".join(lines)


def bars(batches: dict[tuple[int, ...], tuple[Batch, float]]) -> str:
    """Return what is asked for, beside what the model says."""
    (two, python_two), (three, python_three) = (batches[sizes] for sizes in SIZES)

    def rate(batch: Batch, python: float, uva: bool) -> str:
        whole = sum(batch.terms(uva).values()) + python
        ahead = _ahead(batch, python, uva)
        return f"PREDICTED {batch.edges / ahead:,.0f} M/s one ahead, {batch.edges / whole:,.0f} M/s one by one"

    whole, ahead = sum(two.terms(False).values()) + python_two, _ahead(two, python_two, False)
    waits = max(waits_of(batch.calls) for batch, _ in batches.values())
    rows = [
        ("[15, 10, 5], resident: 1,000 M edges/s", rate(three, python_three, False)),
        ("[15, 10, 5], UVA: 200 M edges/s", rate(three, python_three, True)),
        ("[25, 10], resident: 150 us a batch", f"PREDICTED {ahead:.0f} us one ahead, {whole:.0f} us one by one"),
        ("one wait of the host a batch", f"PREDICTED {waits} (counted)"),
    ]
    for far, where in ((False, ": 80 % of a copy"), (True, ", pinned: 85 % of the bus")):
        kernel, host, _calls = gathered(three.nodes, far)
        share = 1e6 * ROW_BYTES * three.nodes * (1 / BUS if far else 2 / COPY) / (kernel + host)
        found = f"PREDICTED at most {share:.0%} for the {three.nodes:,} rows of [15, 10, 5]"
        rows.append((f"rows of {ROW_BYTES} bytes{where}", found))
    lines = ["| bar | by the model | measured |", "|---|---|---|", *(f"| {bar} | {found} | |" for bar, found in rows)]
    return "\n".join(lines)


def text(graph: CSRGraph) -> str:
    """Return all tables for a graph."""
    batches = {}
    for sizes in SIZES:
        batch = sampled(graph, sizes)
        batches[sizes] = batch, own_python(graph, sizes, batch.counts)
    parts = [
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges, batches of 1024; {COPY / 1e12:g} TB/s near, "
        f"{BUS / 1e9:g} GB/s over the bus, {TRIP:g} us a trip, {LAUNCH:g} us a call of the host, {NODE:g} us from a "
        f"kernel of a graph to the next, {MULTIPROCESSORS} multiprocessors.",
        "### Whole batches, PREDICTED", summary(batches),
    ]  # fmt: skip
    for sizes, (batch, _) in batches.items():
        parts += [f"### Kernels of {list(sizes)}, PREDICTED", kernels(batch)]
    parts += ["### Rows of features, PREDICTED", gathers(batches), "### The bars", bars(batches)]
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables, or write them into a file between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2_400_000)
    parser.add_argument("--edges", type=int, default=124_000_000)
    parser.add_argument("--write", type=Path, help="a file that has such tables already")
    options = parser.parse_args()
    made = text(products_like(options.nodes, options.edges))
    if options.write is None:
        print(made)
        return
    marks.replace(options.write, BEGIN, END, made)


if __name__ == "__main__":
    main()
