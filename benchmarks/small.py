"""A small batch through every kernel, for checkers: ``compute-sanitizer --tool memcheck python -m benchmarks.small``.

It compares what it gets with the CPU, and prints how many batches were equal.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from gglspeedup import CGPUFeature, CSRGraph, GPUSampler, HistoryStore


def host(array: Any) -> np.ndarray[Any, Any]:
    """Return an array on the host."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def main() -> None:
    """Sample, gather, push and pull."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    device = parser.parse_args().device
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 40, 2000))])
    graph = CSRGraph(indptr, rng.integers(0, 2000, indptr[-1]))
    x = rng.random((2000, 24), dtype=np.float32)
    cpu, equal = GPUSampler("cpu", graph), 0
    for placement in ("device", "uva"):
        for budget in ("0", "64K", "1G"):
            sampler, features = GPUSampler(device, graph, placement=placement), CGPUFeature(graph, device, budget)
            features.from_cpu_tensor(x)
            histories = HistoryStore(2000, [24], device)
            for number, sizes in enumerate([[5, 3], [5, 3], [5, 3], [40, 2], [-1, 2], [300]]):
                seeds = rng.permutation(2000)[:64]
                batch, expected = (one.sample(seeds, number, sizes=sizes) for one in (sampler, cpu))
                rows = features[batch.n_id]
                histories[0].push(rows, batch.n_id)
                assert np.array_equal(host(batch.n_id), expected.n_id)
                for adj, other in zip(batch.adjs, expected.adjs, strict=True):
                    assert np.array_equal(host(adj.edge_index), other.edge_index)
                assert np.array_equal(host(histories[0].pull(batch.n_id)), x[expected.n_id])
                equal += 1
    print(f"{equal} batches equal the CPU's")


if __name__ == "__main__":
    main()
