"""Peak memory by depth: whole graphs, sampled neighbours, and histories; ``python -m benchmarks.depth``.

Each cell is a process of its own, on Linux: what training needs at its peak beyond what lay in memory before it, which
is the graph, the features, the parameters and all histories.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gglspeedup
from benchmarks.graphs import parted
from benchmarks.layers import Sage
from benchmarks.rounds import ROOT, machine
from gglspeedup import HistoryStore, NodeLoader, SubgraphLoader

WAYS = {
    "full": "whole graph",
    "sampled": "sampled neighbours",
    "gas": "histories",
    "recompute": "histories, layers computed again",
}


# Memory that is freed goes back to the system at once, and the peak is that of what is in use.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def made(options: argparse.Namespace, nodes: int) -> tuple[Callable[[], Any], Any]:
    """Return what gives the batches of an epoch, and the model, for a graph with parts of so many nodes."""
    graph, ptr = parted(options.parts, nodes, options.degree, options.ratio)
    rng = np.random.default_rng(0)
    x = rng.random((graph.num_nodes, options.hidden), dtype=np.float32)
    y = rng.integers(0, 10, graph.num_nodes)
    model = Sage([*[options.hidden] * options.layers, 10])
    shared: dict[str, Any] = {"device": options.device, "backend": "torch", "prefetch": 0}
    loader: NodeLoader | SubgraphLoader
    if options.way == "sampled":
        seeds = rng.permutation(graph.num_nodes)[: 4 * options.seeds]
        fanouts = [options.fanout] * options.layers
        loader = NodeLoader(graph, x, y, seeds=seeds, sizes=fanouts, batch_size=options.seeds, **shared)
    else:
        parts = options.parts if options.way == "full" else 1
        loader = SubgraphLoader(graph, x, y, ptr=ptr, batch_size=parts, shuffle=False, **shared)
    if options.way in ("gas", "recompute"):
        model.recompute = options.way == "recompute"
        model.histories = HistoryStore(graph.num_nodes, [options.hidden] * (options.layers - 1), options.device)
        for table in model.histories:  # so that all of their memory is there before
            table.push(np.ones(table.shape, np.float32), np.arange(graph.num_nodes))
    device = torch.device(str(loader.device))
    return lambda: (batch for batch, _ in zip(loader, range(4), strict=False)), model.to(device)


class Peak:
    """The most memory that is used from now on, beyond what is used now, in bytes."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)  # freed memory is used again, unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        self._before = self._status("VmRSS")

    def read(self) -> int:
        """Return it."""
        return (torch.cuda.max_memory_allocated() if self._cuda else self._status("VmHWM")) - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(options: argparse.Namespace) -> int:
    """Return the peak of one epoch, in bytes."""
    torch.set_num_threads(1)
    gglspeedup.set_num_threads(1)
    epoch(*made(options, 50))  # so that kernels are compiled, and libraries have what they need
    batches, model = made(options, options.nodes)
    peak = Peak(options.device != "cpu")
    epoch(batches, model)
    return peak.read()


def epoch(batches: Callable[[], Any], model: Any) -> None:
    """Train on the batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for batch in batches():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), batch.y).backward()
        optimizer.step()
        del batch  # before the next one is made


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("--nodes", type=int, default=8000, help="of a part, one of which makes a batch")
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--ratio", type=float, default=0.5, help="nodes of the halo for each of the part")
    parser.add_argument("--hidden", type=int, default=128, help="also of features")
    parser.add_argument("--seeds", type=int, default=1024, help="of a sampled batch")
    parser.add_argument("--fanout", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(measure(options))
        return
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, torch {torch.__version__}\n")
    print(
        f"GraphSAGE of width {options.hidden}; {options.parts} parts of {options.nodes} nodes, {options.degree} "
        f"neighbours, halos of {options.ratio}; sampled: {options.seeds} seeds, {options.fanout} neighbours a hop; "
        "MB at the peak\n"
    )
    print(f"| layers | {' | '.join(WAYS[way] for way in options.ways)} |\n|{'---|' * (len(options.ways) + 1)}")
    peaks: dict[str, dict[int, int]] = {way: {} for way in options.ways}
    for depth in options.depths:
        for way, found in peaks.items():
            command = [sys.executable, "-m", "benchmarks.depth", *sys.argv[1:], "--way", way, "--layers", str(depth)]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, **RETURNED})
            found[depth] = int(ran.stdout)
        print(f"| {depth} | {' | '.join(f'{found[depth] / 1e6:.0f}' for found in peaks.values())} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "peak_bytes": peaks}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
