"""What histories cost: epochs with them in each place, pulled ahead or when needed; ``python -m benchmarks.histories``.

As in figure 4 of Fey et al. (ICML 2021; set up as recalled): every batch has as many nodes, every node as many
neighbours in its batch, and the halo grows, each of whose nodes has as many neighbours in the batch. One process, the
ways taken in turn. With two cores, the model gets one and the histories' thread the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gglspeedup
from benchmarks.graphs import parted
from benchmarks.layers import Sage
from benchmarks.rounds import machine
from gglspeedup import HistoryStore, SubgraphLoader


class WithoutHistories(Sage):
    """Rows of the halo are zeros: what is left is the model's own time."""

    def push_and_pull(self, layer: int, x: Any, batch: Any) -> Any:
        """Return the batch's own rows, and zeros for its halo."""
        return torch.cat([x, x.new_zeros(len(batch.n_id) - batch.batch_size, x.shape[1])])


class Serial(Sage):
    """Rows are pulled when a layer needs them, not ahead."""

    def prefetch(self, batch: Any) -> None:
        """Start nothing."""


def stores(device: str, nodes: int, dims: list[int], folder: Path) -> dict[str, HistoryStore]:
    """Return a store for each place that the device knows."""
    made = {"device": HistoryStore(nodes, dims, device, storage="device")}
    if made["device"].device.is_cuda:
        made["pinned"] = HistoryStore(nodes, dims, device, storage="pinned")
        made["pinned, rows gathered by the CPU"] = HistoryStore(
            nodes, dims, device, storage="pinned", host_gather=True
        )  # fmt: skip
    made["mmap"] = HistoryStore(nodes, dims, device, storage="mmap", path=folder / "histories")
    return made


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 1.0, 1.5, 2.0, 2.5])
    parser.add_argument("--parts", type=int, default=8, help="batches an epoch")
    parser.add_argument("--nodes", type=int, default=4000, help="of a batch")
    parser.add_argument("--degree", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the model, and of each pull")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    gglspeedup.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, torch {torch.__version__}\n")
    print(
        f"GraphSAGE, {options.layers} layers of {options.hidden}, {options.parts} batches of {options.nodes} nodes "
        f"with {options.degree} neighbours; milliseconds an epoch, median of {options.rounds}, and what histories "
        "add to the model\n"
    )
    results = []
    for ratio in options.ratios:
        seconds = measure(options, ratio)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        own = median["none"]
        if not results:
            print(f"| halo / batch | {' | '.join(median)} |\n|{'---|' * (len(median) + 1)}")
        cells = (f"{1e3 * value:.0f} ({100 * (value / own - 1):+.0f} %)" for value in median.values())
        print(f"| {ratio} | {' | '.join(cells)} |", flush=True)
        results.append({"ratio": ratio, "seconds": seconds})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "histories": results}, indent=1), encoding="utf-8")


def measure(options: argparse.Namespace, ratio: float) -> dict[str, list[float]]:
    """Return the seconds of each round's epoch, by place and way."""
    graph, ptr = parted(options.parts, options.nodes, options.degree, ratio)
    rng = np.random.default_rng(0)
    x = rng.random((graph.num_nodes, options.hidden), dtype=np.float32)
    y = rng.integers(0, 10, graph.num_nodes)
    loader = SubgraphLoader(
        graph, x, y, ptr=ptr, batch_size=1, shuffle=False, device=options.device, backend="torch", prefetch=0
    )  # fmt: skip
    batches, device = list(loader), torch.device(str(loader.device))
    sizes = [*[options.hidden] * options.layers, 10]
    with tempfile.TemporaryDirectory() as folder:
        widths = [options.hidden] * (options.layers - 1)
        ways: dict[str, Any] = {"none": WithoutHistories(sizes)}
        for place, store in stores(options.device, graph.num_nodes, widths, Path(folder)).items():
            for name, kind in {place: Sage, f"{place}, serial": Serial}.items():
                if name != "device, serial":  # there nothing is pulled ahead
                    ways[name] = kind(sizes)
                    ways[name].histories = store
        optimizers = {name: torch.optim.Adam(model.to(device).parameters()) for name, model in ways.items()}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for k in range(options.rounds + 1):
            for name in list(ways) if k % 2 else list(ways)[::-1]:
                took = epoch(ways[name], batches, optimizers[name])
                if k:  # the first round warms up
                    seconds[name].append(took)
        for model in ways.values():
            if model.histories is not None:
                model.histories.close()
    return seconds


def epoch(model: Any, batches: list[Any], optimizer: Any) -> float:
    """Train on all batches; return the seconds until the last step and the last push are done."""
    begin = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch), batch.y).backward()
        optimizer.step()
    if batches[0].y.is_cuda:
        torch.cuda.synchronize()
    if model.histories is not None:
        model.histories.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
