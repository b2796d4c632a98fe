"""What shards cost on the CPU: a graph whole and in shards, and processes' memory; ``python -m benchmarks.shards``."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import gglspeedup
from benchmarks.graphs import make
from benchmarks.rounds import machine
from gglspeedup import GPUSampler, Multi_CGPUFeature, MultiGPUSampler


def speeds(graph: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the median million edges a second of each sampler, taken in turn."""
    samplers: dict[str, Any] = {"whole": GPUSampler("cpu", graph, options.fanouts)}
    for count in options.shards:
        many = MultiGPUSampler("cpu", graph, ["cpu"] * count, sizes=options.fanouts)
        samplers[f"{count} shards"] = many.sampler()
    rng = np.random.default_rng(0)
    batches = [rng.choice(graph.num_nodes, 1024, replace=False) for _ in range(options.batches)]
    found: dict[str, list[float]] = {name: [] for name in samplers}
    for k in range(options.rounds + 1):
        for name in list(samplers) if k % 2 else list(samplers)[::-1]:
            begin, edges = time.perf_counter(), 0
            for number, seeds in enumerate(batches):
                edges += sum(adj.e_id.size for adj in samplers[name].sample(seeds, batch=number).adjs)
            if k:  # the first round warms up
                found[name].append(edges / (time.perf_counter() - begin) / 1e6)
    return {name: statistics.median(rates) for name, rates in found.items()}


def own_memory() -> float:
    """Return the MiB of this process that no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def _attach(sampler: Any, features: Any, rank: int, barrier: Any, queue: Any) -> None:
    gglspeedup.set_num_threads(1)
    rng = np.random.default_rng(rank)
    for _ in range(20):
        batch = sampler.sample(rng.choice(sampler.graph.num_nodes, 1024, replace=False), rank)
        rows = features.on(rank)[batch.n_id]
    barrier.wait()  # so that what is shared counts as such
    queue.put((own_memory(), rows.nbytes / 2**20))
    barrier.wait()


def memory(graph: Any, width: int, processes: int, fanouts: list[int]) -> tuple[float, float]:
    """Return the most MiB that one of so many processes has for itself, and those of a batch's rows."""
    devices = ["cpu"] * processes
    sampler = MultiGPUSampler("cpu", graph, devices, sizes=fanouts)
    features = Multi_CGPUFeature(0, devices, 0, sampler.graph)
    features.from_cpu_tensor(np.ones((graph.num_nodes, width), np.float32))
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(processes)
    started = [
        context.Process(target=_attach, args=(sampler, features, rank, barrier, queue)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    found = [queue.get() for _ in started]
    for process in started:
        process.join()
    return max(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-20-30000000", help="see graphs.py")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[25, 10])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=128, help="of features, for the memory of processes")
    options = parser.parse_args()
    gglspeedup.set_num_threads(options.threads)
    graph = make(options.graph)
    print(f"{machine()}; {options.graph}, fanouts {options.fanouts}, batch 1024, {options.threads} thread(s)\n")
    print("| | M sampled edges/s | whole / this |\n|---|---|---|")
    rates = speeds(graph, options)
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rates['whole'] / rate:.2f} |", flush=True)
    shared = (graph.indptr.nbytes + graph.indices.nbytes + 4 * graph.num_nodes * options.width) / 2**20
    print(f"\nGraph and features: {shared:.0f} MiB, shared\n")
    print("| processes | MiB of its own, the largest | MiB of a batch's rows |\n|---|---|---|")
    for processes in (1, 2, 4):
        own, rows = memory(graph, options.width, processes, options.fanouts)
        print(f"| {processes} | {own:.0f} | {rows:.0f} |", flush=True)


if __name__ == "__main__":
    main()
