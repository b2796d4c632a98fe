"""Sampled edges a second, ours and peers', interleaved; run as ``python -m benchmarks.sampling``.

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
from benchmarks import limits
from benchmarks.graphs import make
from benchmarks.rounds import Contestant, machine, play, table
from gglspeedup.device import parse_device

PEERS = ("graphbolt", "graphbolt-int32", "torch-sparse", "pyg-lib")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", default=["rmat-20-30000000", "products"], help="see graphs.py")
    parser.add_argument("--fanouts", nargs="+", default=["25,10", "15,10,5"], help="hop 1 first")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=20, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--many", action="store_true", help="also the batches of a round in one call of sample_many")
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    on_gpu = parse_device(options.device).is_cuda
    results = []
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, numpy {np.__version__}\n", flush=True)
    for graph_name in options.graphs:
        with tempfile.TemporaryDirectory() as folder:
            graph = make(graph_name)
            np.save(f"{folder}/indptr.npy", graph.indptr)
            np.save(f"{folder}/indices.npy", graph.indices)
            with_neighbours = np.flatnonzero(graph.degree() > 0)
            np.save(f"{folder}/order.npy", np.random.default_rng(0).permutation(with_neighbours))
            size = f"{graph_name}: {graph.num_nodes:,} nodes, {graph.num_edges:,} edges"
            del graph
            for threads in [1] if on_gpu else options.threads:
                if not on_gpu:
                    gglspeedup.set_num_threads(threads)
                    print(f"independent random reads, {threads} threads: {limits.random_reads() / 1e6:.0f} M/s")
                for fanouts in options.fanouts:
                    names = ["gglspeedup", *(["gglspeedup-ahead"] if on_gpu else []),
                             *(["gglspeedup-many"] if options.many else []), *options.peers]  # fmt: skip
                    if threads > 1 and "graphbolt" in names:
                        names.append("graphbolt-workers")
                    contestants = [
                        Contestant(
                            name,
                            [sys.executable if name.startswith("gglspeedup") else options.peer_python, "-m",
                             "benchmarks.sampling_contestants", name, folder, str(threads), fanouts,
                             str(options.batch_size), str(options.batches), options.device],
                        )
                        for name in names
                    ]  # fmt: skip
                    play(contestants, options.rounds)
                    where = options.device if on_gpu else f"{threads} thread{'s'[: threads > 1]}"
                    title = f"{size}; fanouts [{fanouts}], batch {options.batch_size}, {where}"
                    print(table(title, contestants, 1e6, "M sampled edges/s"), "\n", flush=True)
                    results += [
                        {"graph": graph_name, "fanouts": fanouts, "where": where, "label": c.label,
                         "versions": c.versions, "edges_per_second": c.median, "rounds": c.rates}
                        for c in contestants if c.rates
                    ]  # fmt: skip
    if options.json:
        figures = {"machine": machine(), "many" if options.many else "sampling": results}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
