"""What a pipeline hides where sampling, gathering or the model takes longest; ``python -m benchmarks.pipeline``.

One process, its contestants taken in turn, forwards and backwards. Of each case: the stages alone, and the epoch made
one batch after the other, with ``Prefetcher(NodeLoader(..., prefetch=0))`` on one thread, with NodeLoader's own
threads, of which sampling and gathering have one each, and in a process. All give the same batches.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import gglspeedup
from benchmarks.graphs import make
from benchmarks.overlap import trainer
from benchmarks.rounds import machine
from gglspeedup import NodeLoader, Prefetcher

CLASSES = 47
KEPT = 40  # batches on which gathering and the model alone work, again and again: more would not fit into memory
STAGES = ("sampling", "gathering", "model")
EPOCHS = ("serial", "one thread", "NodeLoader", "workers=1")


class Case(NamedTuple):
    """What decides which stage takes longest; a hidden width of 0 is logistic regression on the seeds' features."""

    fanouts: list[int]
    width: int
    hidden: int


CASES = {
    "sampling": Case([15, 10, 5], 4, 0),
    "gathering": Case([25, 10], 512, 0),
    "model": Case([25, 10], 100, 64),
}


def regression(width: int) -> Callable[[Any], None]:
    """Return a step that costs next to nothing."""
    layer = torch.nn.Linear(width, CLASSES)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)

    def step(batch: Any) -> None:
        loss = torch.nn.functional.cross_entropy(layer(batch.x[: batch.batch_size]), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(case: Case, graph: gglspeedup.CSRGraph, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of every round, of each stage alone and of each kind of epoch."""
    rng = np.random.default_rng(0)
    x = rng.random((graph.num_nodes, case.width), dtype=np.float32)
    y = rng.integers(0, CLASSES, graph.num_nodes)
    seeds = rng.permutation(np.flatnonzero(graph.degree() > 0))[: options.batches * options.batch_size]
    kinds: dict[str, Any] = {"seeds": seeds, "sizes": case.fanouts, "batch_size": options.batch_size, "shuffle": False}
    serial = NodeLoader(graph, x, y, device="cpu", backend="torch", prefetch=0, **kinds)
    shared = (serial.graph_sampler, serial.features, serial.labels)
    own = NodeLoader(*shared, backend="torch", prefetch=options.depth, **kinds)
    worked = NodeLoader(*shared, backend="torch", prefetch=options.depth, workers=1, **kinds)
    parts = [seeds[begin : begin + options.batch_size] for begin in range(0, len(seeds), options.batch_size)]
    numbered = list(enumerate(parts))
    sampler, features, labels = shared
    assert features is not None and labels is not None

    def sample(part: tuple[int, Any]) -> Any:
        return sampler.sample(part[1], part[0], sizes=case.fanouts)

    def gather(sampled: Any) -> Any:
        return features[sampled.n_id], labels[sampled.seeds], [adj.convert("torch") for adj in sampled.adjs]

    step = trainer(case.width, case.hidden, CLASSES, torch.device("cpu")) if case.hidden else regression(case.width)
    again = range(-(-len(parts) // KEPT))
    kept = list(islice(serial, KEPT))
    sampled = [sample(part) for part in numbered[:KEPT]]
    runs: dict[str, tuple[Iterable[Any], Callable[[Any], Any]]] = {
        "sampling": (numbered, sample),
        "gathering": ([batch for _ in again for batch in sampled][: len(parts)], gather),
        "model": ([batch for _ in again for batch in kept][: len(parts)], step),
        "serial": (serial, step),
        "one thread": (Prefetcher(serial, options.depth), step),
        "NodeLoader": (own, step),
        "workers=1": (worked, step),
    }
    for other, (one, *ahead) in enumerate(zip(kept, worked, own, strict=False)):
        same = all(torch.equal(one.x, batch.x) and torch.equal(one.y, batch.y) for batch in ahead)
        assert same, f"batch {other} differs"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(options.rounds + 1):
        for name in list(runs) if k % 2 else list(runs)[::-1]:
            batches, use = runs[name]
            # A stage alone has as many buffers in use as it has in the pipeline, so that it finds as much in the cache.
            alive: collections.deque[Any] = collections.deque(maxlen=2 * options.depth + 2 if name in STAGES[:2] else 0)
            begin = time.perf_counter()
            for batch in batches:
                alive.append(use(batch))
            if k:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-18-6000000", help="see graphs.py")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what takes longest")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=160, help="an epoch")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the kernels and of the model, each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    gglspeedup.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    graph = make(options.graph)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; gglspeedup {gglspeedup.__version__}, torch {torch.__version__}")
    print(
        f"{options.graph}, {options.batches} batches of {options.batch_size}, depth {options.depth}, {options.threads} "
        f"threads a stage; seconds an epoch, medians of {options.rounds}\n"
    )
    ratios = [f"{loader}, of the longest stage" for loader in EPOCHS[2:]]
    print(f"| {' | '.join(['longest stage', *STAGES, *EPOCHS, *ratios])} |")
    print("|---" * (len(STAGES) + len(EPOCHS) + len(ratios) + 1) + "|")
    results = {}
    for name in options.cases:
        results[name] = measure(CASES[name], graph, options)
        median = {part: statistics.median(times) for part, times in results[name].items()}
        longest = max(STAGES, key=median.__getitem__)
        # Round by round: what the machine's speed does from one to the next concerns both.
        ratios = [
            statistics.median(
                whole / alone for whole, alone in zip(results[name][loader], results[name][longest], strict=True)
            )
            for loader in EPOCHS[2:]
        ]
        cells = [f"{median[part]:.3f}" for part in (*STAGES, *EPOCHS)] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "pipeline": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
