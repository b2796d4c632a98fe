"""What prefetching hides: epochs of loading alone, of training alone, and of both; ``python -m benchmarks.overlap``.

One process, its parts taken in turn. With two cores, loading and training get a thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gglspeedup
from benchmarks.graphs import make
from benchmarks.layers import Sage
from benchmarks.rounds import machine
from gglspeedup import NodeLoader


def trainer(width: int, hidden: int, classes: int, device: torch.device) -> Callable[[Any], None]:
    """Return a function that takes one step of a two-layer GraphSAGE."""
    model = Sage([width, hidden, classes]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def step(batch: Any) -> None:
        loss = torch.nn.functional.cross_entropy(model(batch), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-20-30000000", help="see graphs.py")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4, 128], help="the smaller, the cheaper the model")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[25, 10])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=20, help="an epoch")
    parser.add_argument("--threads", type=int, default=1, help="of loading and of training, each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    gglspeedup.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    graph, rng = make(options.graph), np.random.default_rng(0)
    x = rng.random((graph.num_nodes, options.width), dtype=np.float32)
    y = rng.integers(0, 47, graph.num_nodes)
    seeds = rng.permutation(np.flatnonzero(graph.degree() > 0))[: options.batches * options.batch_size]
    serial = NodeLoader(
        graph, x, y, seeds=seeds, sizes=options.fanouts, batch_size=options.batch_size, device=options.device,
        cache=x.nbytes, backend="torch", prefetch=0,
    )  # fmt: skip
    ahead = NodeLoader(
        serial.graph_sampler, serial.features, serial.labels, seeds=seeds, sizes=options.fanouts,
        batch_size=options.batch_size, backend="torch",
    )  # fmt: skip
    device = torch.device(str(serial.device))
    kept = list(serial)
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, torch {torch.__version__}\n")
    print(
        f"GraphSAGE {options.fanouts} on {options.graph}, {options.width} features, batch {options.batch_size}; "
        f"seconds an epoch of {options.batches} batches, median of {options.rounds}\n"
    )
    print("| hidden | loading | training | one after the other | with prefetch | that is, of the longer |")
    print("|---|---|---|---|---|---|")
    results = []
    for hidden in options.hidden:
        step = trainer(options.width, hidden, 47, device)
        # What each part goes through, and what it does with every batch.
        parts: dict[str, tuple[Iterable[Any], Callable[[Any], None]]] = {
            "loading": (serial, lambda batch: None),
            "training": (kept, step),
            "serial": (serial, step),
            "ahead": (ahead, step),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for k in range(options.rounds + 1):
            for name in list(parts) if k % 2 else list(parts)[::-1]:
                batches, use = parts[name]
                begin = time.perf_counter()
                for batch in batches:
                    use(batch)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if k:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratio = median["ahead"] / max(median["loading"], median["training"])
        cells = " | ".join(f"{median[name]:.3f}" for name in parts)
        print(f"| {hidden} | {cells} | {ratio:.2f} |", flush=True)
        results.append({"hidden": hidden, "seconds": seconds, "ratio": ratio})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "overlap": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
