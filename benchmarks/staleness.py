"""How many rows a batch pulls, and how old they are, by how a graph is cut; ``python -m benchmarks.staleness``.

Batches of the small benchmark's settings for GCN; every batch pulls its halo and pushes its own nodes, and nothing in
between refreshes the histories.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from demo.gas_data import load_benchmark
from demo.gas_settings import SETTINGS
from gglspeedup import CSRGraph, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.partitions import partition_stats


def measure(graph: CSRGraph, parts: int, batch_parts: int, method: str, epochs: int) -> list[float]:
    """Return the share of edges that are cut; nodes, halo and mean age of its rows, in pushes, of a batch."""
    perm, ptr = partition(graph, parts, method)
    permuted = permute(graph, perm)
    cut = partition_stats(graph, perm, ptr).edge_cut / graph.num_edges
    loader = SubgraphLoader(permuted, ptr=ptr, batch_size=batch_parts, device="cpu")
    halos, ages = [], []
    with HistoryStore(graph.num_nodes, [1], "cpu") as store:
        for epoch in range(epochs):
            for batch in loader:
                halo = batch.n_id[batch.batch_size :]
                halos.append(len(halo))
                if epoch and len(halo):
                    ages.append(store.age(halo).mean())
                store[0].push(np.zeros((batch.batch_size, 1)), offset=batch.offset, count=batch.count)
    return [cut, graph.num_nodes / len(loader), float(np.mean(halos)), float(np.mean(ages))]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with npz files")
    parser.add_argument("--datasets", nargs="+", default=["cora", "citeseer", "pubmed", "amazon_photo"])
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    names = ("dataset", "parts", "edges cut", "nodes of a batch", "its halo", "age of its rows, in pushes")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for name in options.datasets:
        data = load_benchmark(name, options.root)
        graph = CSRGraph(data.indptr, data.indices)
        for method in ("metis", "random"):
            cut, nodes, halo, age = measure(graph, *SETTINGS["gcn", name].parts, method, options.epochs)
            print(f"| {name} | {method} | {100 * cut:.1f} % | {nodes:.0f} | {halo:.0f} | {age:.2f} |", flush=True)


if __name__ == "__main__":
    main()
