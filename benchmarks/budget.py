"""What a memory limit keeps and costs on a CPU; ``python -m benchmarks.budget [peak] [loss] [accuracy] [overhead]``.

``peak``: predicted against measured peak, and batches above 70 % of the unlimited peak, without the limit and with it;
each training is a process of its own. ``loss``: how far splitting moves the loss curve, and why. ``accuracy``: what
each policy costs on real graphs when batches have a share of the memory that they need. ``overhead``: epochs with a
limit that is never reached against epochs without one, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

import gglspeedup
from benchmarks.graphs import make
from benchmarks.rounds import ROOT, machine
from demo.datasets import draw_split, load_dataset
from demo.sage_torch import GraphSage
from gglspeedup import MemoryBudget, NodeLoader
from gglspeedup.memory_budget import POLICIES
from gglspeedup.memory_model import BatchLoad, MemoryModel

CLASSES = 47
TIMES = 4096  # see stated_model
TRIAL = 8  # the first batches, of which nothing is known


class Case(NamedTuple):
    """A training; `order` is that of the seeds: ``random``, or by ``degree``, so that batches differ in size."""

    graph: str = "rmat-18-6000000"
    fanouts: tuple[int, ...] = (10, 10, 10)
    width: int = 256
    hidden: int = 256
    batch_size: int = 1024
    order: str = "random"


def problem(case: Case) -> tuple[Any, Any, Any, Any]:
    """Return graph, features, classes and seeds of a case."""
    graph, rng = make(case.graph), np.random.default_rng(0)
    x = rng.random((graph.num_nodes, case.width), dtype=np.float32)
    seeds = rng.permutation(np.flatnonzero(graph.degree() > 0))
    if case.order == "degree":
        # A few of the largest degrees among all the others would make all batches alike: sorted, none is.
        seeds = seeds[np.argsort(graph.degree(seeds), kind="stable")]
    return graph, x, x[:, :CLASSES].argmax(1), seeds


def learner(case: Case, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimiser."""
    torch.manual_seed(seed)
    model = GraphSage([case.width, *[case.hidden] * (len(case.fanouts) - 1), CLASSES], 0.0)
    return model, torch.optim.Adam(model.parameters(), 0.003)


def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """Train on a batch or a part of one, and return its part of the step's mean loss."""
    loss = torch.nn.functional.cross_entropy(model(batch.x, batch.adjs), batch.y) * batch.share
    loss.backward()
    if batch.last:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


# --- peak ----------------------------------------------------------------------------------------------------------


def train_alone(case: Case, limit: int, batches: int) -> None:
    """Train on so many batches, and print what the budget says of them: what a process of :func:`peaks` does."""
    graph, x, y, seeds = problem(case)
    budget = MemoryBudget(limit)
    loader = NodeLoader(
        graph, x, y, seeds=seeds, sizes=case.fanouts, batch_size=case.batch_size, shuffle=case.order == "random",
        device="cpu", backend="torch", memory_limit=budget,
    )  # fmt: skip
    model, optimizer = learner(case)
    left = batches
    while left:
        for batch in loader:
            learn(model, optimizer, batch)
            left -= 1
            if not left:
                break
    print(json.dumps({"stats": budget.stats(), "records": budget.records}))


def run_alone(case: Case, limit: int, batches: int, threads: int) -> tuple[dict[str, Any], int]:
    """Return what :func:`train_alone` printed in a process of its own, and the largest size that was seen from here."""
    command = [sys.executable, "-m", "benchmarks.budget", "alone", "--threads", str(threads), "--batches", str(batches)]
    command += ["--limit", str(limit), "--case", json.dumps(case._asdict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        status, seen = Path(f"/proc/{process.pid}/status"), 0
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("VmRSS"):
                    seen = max(seen, int(line.split()[1]) << 10)
            time.sleep(0.005)
        assert process.returncode == 0 and process.stdout is not None
        return json.loads(process.stdout.read().splitlines()[-1]), seen


def peaks(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print predictions and batches above a limit."""
    print("| seeds' order | limit, MB | batches | split steps | above the limit | peak, MB |", end="")
    print(f" seen from outside, MB | MAPE | MAPE after the first {TRIAL} |\n" + "|---" * 9 + "|")
    results: dict[str, Any] = {}
    for order in ("random", "degree"):
        case = Case(order=order)
        free, seen = run_alone(case, 1 << 50, options.free, options.threads)
        limit = int(0.7 * free["stats"]["peak"])
        results[order] = {"free": free["stats"]}
        above = sum(peak > limit for _, peak in free["records"])
        _peak_row(order, "none", free, above, seen)
        kept, seen = run_alone(case, limit, options.batches, options.threads)
        results[order]["limited"] = kept["stats"]
        results[order]["above"] = [record for record in kept["records"] if record[1] > limit]
        _peak_row(order, f"{limit / 1e6:.0f}", kept, kept["stats"]["over"], seen)
    return results


def _peak_row(order: str, limit: str, told: dict[str, Any], above: int, seen: int) -> None:
    predicted, measured = np.array(told["records"]).T
    error = np.abs(predicted / measured - 1)
    stats = told["stats"]
    print(
        f"| {order} | {limit} | {stats['parts']} | {stats['split']} of {stats['batches']} | {above} | "
        f"{stats['peak'] / 1e6:.0f} | {seen / 1e6:.0f} | {error.mean():.1%} | {error[TRIAL:].mean():.1%} |", flush=True,
    )  # fmt: skip


# --- loss and accuracy ---------------------------------------------------------------------------------------------


def stated_model(hops: int, width: int) -> MemoryModel:
    """Return a model that says that a batch takes a row of features for each node and each edge of its outer hop, and
    nothing else, so that what is done is the same on every machine. All is 4096 times as large as it would be, so that
    what the process takes by itself does not matter."""
    model, rng = MemoryModel(hops), np.random.default_rng(0)
    for _ in range(100):
        nodes, edges = rng.integers(1, 100000, hops + 1).tolist(), rng.integers(1, 100000, hops).tolist()
        load = BatchLoad(tuple(nodes), tuple(edges), (4.0 * width, *(1.0,) * hops), 0, 0)
        model.observe(load, TIMES * 4.0 * width * (nodes[0] + edges[0]))
    return model


def most_needed(loader: NodeLoader) -> float:
    """Return what the largest of a loader's batches needs by :func:`stated_model`, in bytes."""
    assert loader.features is not None
    row = TIMES * 4.0 * loader.features.shape[1]
    return max(row * (batch.adjs[0].size[0] + batch.adjs[0].e_id.shape[0]) for batch in loader)


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print how far the loss curve is moved by splitting; without splitting, by edges in reverse order; and
    in float64 without splitting, by turning the ReLUs that were the first to differ when splitting."""
    case = Case(graph="rmat-16-1000000", width=64, hidden=64, fanouts=(10, 10), batch_size=512)
    graph, x, y, seeds = problem(case)
    kinds: dict[str, Any] = {
        "seeds": seeds[: 30 * case.batch_size], "sizes": case.fanouts, "batch_size": case.batch_size, "device": "cpu",
        "backend": "torch",
    }  # fmt: skip
    results = {}
    print("Largest relative difference of a step's loss, each seed (first step where a hidden unit's sign differs)\n")
    print("| numbers | optimiser | activation | steps | split | parts | loss, first to last | split |", end="")
    print(" edges reversed | float64, the split's first signs turned |\n" + "|---" * 10 + "|")
    exact = partial(NodeLoader, graph, torch.from_numpy(x).double(), y, **kinds)
    rows = ((torch.float64, "Adam", "relu"), (torch.float32, "Adam", "relu"), (torch.float32, "SGD", "relu"))
    for dtype, rule, activation in (*rows, (torch.float32, "Adam", "softplus")):
        features = torch.from_numpy(x).to(dtype)
        loader = partial(NodeLoader, graph, features, y, **kinds)
        limit = int(0.5 * most_needed(loader()) * features.element_size() / 4)
        model = stated_model(2, case.width * features.element_size() // 4)
        budget = MemoryBudget(limit, model=model, learn=False)
        told: dict[str, list[Any]] = {"split": [], "reversed": [], "turned": []}
        for seed in range(options.seeds):
            with mock.patch.object(torch.nn.functional, "relu", getattr(torch.nn.functional, activation)):
                curve = _curve(case, dtype, rule, seed, loader())
                told["split"].append(_apart(curve, _curve(case, dtype, rule, seed, loader(memory_limit=budget))))
                told["reversed"].append(_apart(curve, _curve(case, dtype, rule, seed, loader(), reverse=True)))
            if activation == "relu" and (turn := told["split"][-1][1:]) != (0, []):
                curves = (_curve(case, torch.float64, rule, seed, exact(), turn=turned) for turned in ((0, []), turn))
                told["turned"].append(_apart(*curves))
        stats = budget.stats()
        results[f"{dtype} {rule} {activation}"] = {"differences": told, **stats}
        cells = [", ".join(f"{apart:.1e}" + f" ({step})" * (step > 0) for apart, step, _ in c) for c in told.values()]
        print(
            f"| {dtype} | {rule} | {activation} | {stats['batches']} | {stats['split']} | {stats['parts']} | "
            f"{curve[0][0]:.3f} to {curve[0][-1]:.3f} | {' | '.join(cells)} |", flush=True,
        )  # fmt: skip
    return results


Turn = tuple[int, list[tuple[int, int]]]  # a step, counted from 1, and (node, unit) pairs; 0 for none


def _curve(
    case: Case, dtype: torch.dtype, rule: str, seed: int, loader: NodeLoader, *, reverse: bool = False,
    turn: Turn = (0, []),
) -> tuple[list[float], list[dict[int, Any]]]:  # fmt: skip
    """Return each step's loss, and which of a node's hidden units were above 0; `turn` moves some to the other side."""
    model, _ = learner(case, seed)
    model = model.to(dtype)
    optimizer = getattr(torch.optim, rule)(model.parameters(), 0.003 if rule == "Adam" else 0.3)
    curve, signs, loss = [], [{}], 0.0  # type: ignore[var-annotated]

    def watch(_: Any, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
        nodes = batch.n_id[: len(hidden)].tolist()
        if len(signs) == turn[0]:
            change = torch.zeros_like(hidden)
            for node, unit in turn[1]:
                change[nodes.index(node), unit] = -2 * hidden[nodes.index(node), unit].detach()
            hidden = hidden + change
        signs[-1].update(zip(nodes, (hidden > 0).numpy(), strict=True))
        return hidden

    model.layers[0].register_forward_hook(watch)  # type: ignore[index, union-attr]
    for _ in range(3):
        for batch in loader:
            if reverse:
                batch.adjs = [adj._replace(edge_index=adj.edge_index.flip(1)) for adj in batch.adjs]
            loss += learn(model, optimizer, batch)
            if batch.last:
                curve.append(loss)
                signs.append({})
                loss = 0.0
    return curve, signs


def _apart(one: tuple[list[float], list[Any]], other: tuple[list[float], list[Any]]) -> tuple[float, int, Any]:
    """Return the largest relative difference of a step's loss, and the first step with signs that differ, and which."""
    apart = float(np.abs(np.array(other[0]) / np.array(one[0]) - 1).max())
    for step, (ours, theirs) in enumerate(zip(one[1], other[1], strict=True), 1):
        turned = [(node, int(unit)) for node in ours for unit in np.flatnonzero(ours[node] != theirs[node])]
        if turned:
            return apart, step, turned
    return apart, 0, []


def accuracies(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the test accuracy of each policy at a share of the memory that batches need."""
    print(f"| graph | share of the need | {' | '.join(('no limit', *POLICIES))} | edges cut, by the last three |")
    print("|---" * (len(POLICIES) + 4) + "|")
    results: dict[str, Any] = {}
    for path in options.graphs:
        data = load_dataset(str(path), None)
        splits = [draw_split(data.y, seed) for seed in range(options.seeds)]
        for share in options.shares:
            cells, cuts = [], []
            for policy in (None, *POLICIES):
                runs = [_accuracy(data, split, seed, policy, share, options) for seed, split in enumerate(splits)]
                scores = [score for score, _ in runs]
                results[f"{data.name} {share} {policy}"] = runs
                cells.append(f"{statistics.mean(scores):.3f} ± {statistics.pstdev(scores):.3f}")
                if policy in POLICIES[2:]:
                    cuts.append(f"{statistics.mean(cut for _, cut in runs):.0%}")
            print(f"| {data.name} | {share} | {' | '.join(cells)} | {', '.join(cuts)} |", flush=True)
    return results


def _accuracy(
    data: Any, split: Any, seed: int, policy: str | None, share: float, options: argparse.Namespace
) -> tuple[float, float]:
    """Return test accuracy after the last epoch, and the fraction of edges that was cut."""
    train, _, test = split
    kinds: dict[str, Any] = {
        "seeds": train, "sizes": options.fanouts, "batch_size": options.batch_size, "device": "cpu", "backend": "torch",
        "seed": seed,
    }  # fmt: skip
    plain = NodeLoader((data.indptr, data.indices), data.x, data.y, **kinds)
    assert plain.features is not None
    shared = (plain.graph_sampler, plain.features, plain.labels)
    budget = None
    if policy is not None:
        model = stated_model(len(options.fanouts), plain.features.shape[1])
        budget = MemoryBudget(int(share * most_needed(plain)), policy=policy, model=model, learn=False)
    loader = NodeLoader(*shared, **kinds, memory_limit=budget)
    torch.manual_seed(seed)
    widths = [plain.features.shape[1], *[options.hidden] * (len(options.fanouts) - 1), data.num_classes]
    model, edges = GraphSage(widths, 0.5), 0
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=5e-4)
    for _ in range(options.epochs):
        for batch in loader:
            learn(model, optimizer, batch)
            edges += sum(adj.e_id.shape[0] for adj in batch.adjs)
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in plain.evaluation(test, sizes=options.fanouts, batch_size=1024):
            right += int((model(batch.x, batch.adjs).argmax(1) == batch.y).sum())
    cut = budget.stats()["edges_cut"] if budget else 0
    return right / int(np.sum(test)), cut / (edges + cut)


# --- overhead --------------------------------------------------------------------------------------------------------


def overheads(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print what a limit costs that is never reached: epochs with and without, in turn."""
    results: dict[str, Any] = {}
    print("| case | epoch without, s | with, s | wall, median of the rounds' ratios | processor time, likewise |")
    print("|---" * 5 + "|")
    for case in (Case(graph="rmat-17-2000000", fanouts=(15, 10), width=100, hidden=128), Case()):
        graph, x, y, seeds = problem(case)
        seeds = seeds[: (30 if case.width == 100 else 8) * case.batch_size]
        kinds: dict[str, Any] = {"seeds": seeds, "sizes": case.fanouts, "batch_size": case.batch_size}
        kinds["backend"] = "torch"
        plain = NodeLoader(graph, x, y, device="cpu", **kinds)
        shared = (plain.graph_sampler, plain.features, plain.labels)
        loaders = [plain, NodeLoader(*shared, memory_limit=MemoryBudget(1 << 50), **kinds)]
        model, optimizer = learner(case)
        times: list[list[tuple[float, float]]] = [[], []]
        for k in range(options.rounds + 1):
            for which in (0, 1) if k % 2 else (1, 0):
                begin = time.perf_counter(), time.process_time()
                for batch in loaders[which]:
                    learn(model, optimizer, batch)
                if k:  # the first round warms up
                    times[which].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        ratio = np.median(np.array(times[1]) / np.array(times[0]), axis=0) - 1
        name = f"{case.graph}, {list(case.fanouts)}, width {case.width}"
        results[name] = times
        without, limited = (np.median([wall for wall, _ in times[which]]) for which in (0, 1))
        print(f"| {name} | {without:.2f} | {limited:.2f} | {ratio[0]:+.1%} | {ratio[1]:+.1%} |", flush=True)
    return results


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"peak": peaks, "loss": losses, "accuracy": accuracies, "overhead": overheads}
    parser.add_argument("parts", nargs="*", default=list(parts), help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--free", type=int, default=60, help="peak: batches without a limit")
    parser.add_argument("--batches", type=int, default=1000, help="peak: batches with a limit")
    parser.add_argument("--graphs", type=Path, nargs="+", default=[], help="accuracy: npz files, see demo/datasets.py")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.4], help="accuracy: limits")
    parser.add_argument("--seeds", type=int, default=3, help="loss, accuracy: of weights, and of splits")
    parser.add_argument("--epochs", type=int, default=30, help="accuracy: of each training")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 10], help="accuracy: nearest the seeds first")
    parser.add_argument("--hidden", type=int, default=64, help="accuracy: width of the hidden layers")
    parser.add_argument("--batch-size", type=int, default=64, help="accuracy: seeds a batch")
    parser.add_argument("--rounds", type=int, default=5, help="overhead: of epochs")
    parser.add_argument("--threads", type=int, default=2, help="of the kernels and of the model, each")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    gglspeedup.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    if options.parts == ["alone"]:
        train_alone(Case(**options.case), options.limit, options.batches)
        return
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}; gglspeedup {gglspeedup.__version__}, torch {torch.__version__}")
    results = {}
    for part in options.parts:
        print(f"\n**{part}**\n")
        results[part] = parts[part](options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
