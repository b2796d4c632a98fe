"""A graph larger than is comfortable, memory-mapped: does it work, how fast, in how much memory of our own?

``python -m benchmarks.large --nodes 100000000 --edges 1000000000 --folder FOLDER`` needs 13 GB of disk at its peak.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.rounds import machine
from gglspeedup import CSRGraph, GPUSampler, graph_file

_CHUNK = 1 << 26


def build(path: Path, nodes: int, edges: int) -> None:
    """Write a graph with degrees of a heavy tail and uniform neighbours, piece by piece."""
    rng = np.random.default_rng(0)
    weight = rng.pareto(1.8, nodes).astype(np.float32) + 0.2
    indptr = np.zeros(nodes + 1, np.int64)
    np.cumsum(weight, dtype=np.float64, out=(share := np.empty(nodes)))
    indptr[1:] = share * (edges / share[-1])
    del weight, share
    indptr[-1] = edges
    scratch = path.with_suffix(".indices")
    indices = np.memmap(scratch, np.int32, "w+", shape=(edges,))
    for begin in range(0, edges, _CHUNK):
        part = indices[begin : begin + _CHUNK]
        part[:] = rng.integers(0, nodes, len(part), dtype=np.int32)
    graph_file.write(str(path), indptr, indices, None)
    scratch.unlink()


def own_memory() -> dict[str, int]:
    """Return this process's resident bytes: anonymous ones are its own, those of files can be dropped any time."""
    fields = {}
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(("RssAnon", "RssFile", "VmHWM")):
                name, value, _unit = line.split()
                fields[name.rstrip(":")] = int(value) * 1024
    return fields


def main() -> None:
    """Build once, open, sample, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000_000)
    parser.add_argument("--edges", type=int, default=1_000_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10, 5])
    parser.add_argument("--table", choices=["dense", "hash"], help="default: the library's choice")
    options = parser.parse_args()
    path = options.folder / f"{options.nodes}-{options.edges}.ggl"
    print(machine())
    if not path.exists():
        build(path, options.nodes, options.edges)
    begin = time.perf_counter()
    graph = CSRGraph.load(path)
    print(f"{graph!r} opened and checked in {time.perf_counter() - begin:.1f} s")
    before = own_memory()
    sampler = GPUSampler("cpu", graph, options.fanouts)
    if options.table:
        from gglspeedup.sampler_cpu import CpuSampler

        sampler._sampler = CpuSampler(graph, options.table)
    rng = np.random.default_rng(1)
    sampler.sample(np.unique(rng.integers(0, options.nodes, 1024)))
    begin, edges = time.perf_counter(), 0
    for _ in range(options.batches):
        edges += sum(adj.e_id.size for adj in sampler.sample(np.unique(rng.integers(0, options.nodes, 1024))).adjs)
    seconds = time.perf_counter() - begin
    after = own_memory()
    grown = after["RssAnon"] - before["RssAnon"]
    print(f"{edges / seconds / 1e6:.1f} M sampled edges/s, {edges // options.batches} edges a batch")
    print(f"the sampler's own memory: {grown / 2**20:.0f} MiB, {grown / options.nodes:.2f} bytes a node")
    print(f"resident: {after['RssAnon'] / 2**20:.0f} MiB own, {after['RssFile'] / 2**20:.0f} MiB of mapped files")


if __name__ == "__main__":
    main()
