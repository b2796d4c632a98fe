"""Seeds a second that loaders bring, ours and peers', interleaved; run as ``python -m benchmarks.loaders``.

Loading is sampling, gathering features and labels, and conversion to the framework's tensors; nothing is trained.
Peers that need another torch may live in another environment: name its interpreter with --peer-python.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import gglspeedup
from benchmarks.graphs import make
from benchmarks.rounds import Contestant, machine, play, table

OURS = ("torch", "serial", "tensorflow", "paddle", "tensorlayerx", "jax", "pyg")
PEERS = ("pyg", "graphbolt", "gammagl", "paddle")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-20-30000000", help="see graphs.py")
    parser.add_argument("--width", type=int, default=100, help="float32 features a node")
    parser.add_argument("--fanouts", default="25,10", help="hop 1 first")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=20, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", nargs="+", default=list(OURS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has pyg-lib, torch-sparse, dgl")
    parser.add_argument("--gammagl-python", default=sys.executable, help="interpreter that has gammagl, with NumPy 1")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    interpreters = {**dict.fromkeys(("pyg", "graphbolt"), options.peer_python), "gammagl": options.gammagl_python}
    results = []
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, numpy {np.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        graph = make(options.graph)
        np.save(f"{folder}/indptr.npy", graph.indptr)
        np.save(f"{folder}/indices.npy", graph.indices)
        with_neighbours = np.flatnonzero(graph.degree() > 0)
        np.save(f"{folder}/order.npy", np.random.default_rng(0).permutation(with_neighbours))
        size = f"{options.graph}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges, {options.width} features"
        del graph
        for threads in options.threads:
            contestants = [
                Contestant(
                    name,
                    [interpreters.get(name, sys.executable), "-m",
                     "benchmarks.loaders_contestants", name, folder, str(threads), options.fanouts,
                     str(options.batch_size), str(options.batches), str(options.width)],
                )
                for name in (*(f"gglspeedup-{name}" for name in options.ours), *options.peers)
            ]  # fmt: skip
            # Equal threads for all, also for what frameworks start by themselves.
            play(contestants, options.rounds, {"OMP_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"})
            where = f"{threads} thread{'s'[: threads > 1]}"
            title = f"{size}; fanouts [{options.fanouts}], batch {options.batch_size}, {where}"
            print(table(title, contestants, 1e3, "thousand seeds/s"), "\n", flush=True)
            results += [
                {"graph": options.graph, "where": where, "label": c.label, "versions": c.versions,
                 "seeds_per_second": c.median, "rounds": c.rates}
                for c in contestants if c.rates
            ]  # fmt: skip
    print("; ".join(sorted({result["versions"] for result in results})))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "loaders": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
