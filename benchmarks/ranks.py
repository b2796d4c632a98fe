"""Sampling and gathering on a graph in parts, by 1, 2 and 4 ranks on this machine; ``python -m benchmarks.ranks``.

Also measures what the model of docs/scale.md consists of: an exchange without content, bytes a second, and the work on
an edge and on a row. Needs mpi4py and an ``mpiexec``, as pip's mpich has one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gglspeedup
from benchmarks.graphs import make
from benchmarks.rounds import ROOT, machine

COLUMNS = (
    "ms a batch, sampling", "ms, gathering", "M edges/s, all ranks", "MB a batch: ids", "rows", "counts",
    "MB: features", "messages",
)  # fmt: skip


def seconds(call: Callable[[], Any], times: int) -> float:
    """Return the median time of a call."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def work(options: argparse.Namespace) -> None:
    """Be one rank; the first prints what it measured, and the sum of all ranks' edges and bytes."""
    from gglspeedup.distributed import DistFeature, DistSampler, GraphPart, MpiCommunicator

    gglspeedup.set_num_threads(1)
    communicator = MpiCommunicator()
    size, rank = communicator.size, communicator.rank
    part = GraphPart.load(options.work, rank)
    empty = np.zeros((size, 1), np.int64)
    found = {"exchange": seconds(lambda: communicator.exchange_counts(empty), 200)}
    some = np.zeros(size << 22, np.uint8)
    share = [1 << 22] * size
    found["bytes_a_second"] = (size - 1) * 2**22 / seconds(lambda: communicator.exchange(some, share, share), 9)
    sampler = DistSampler(part, communicator, options.fanouts)
    rng = np.random.default_rng(rank)
    seeds = [rng.choice(part.book.num_nodes, options.batch_size, replace=False) for _ in range(options.batches)]
    sampler.sample(seeds[0])
    before, taken, batches = sampler.traffic(), [], []
    for number, own in enumerate(seeds):
        begin = time.perf_counter()
        batches.append(sampler.sample(own, number))
        taken.append(time.perf_counter() - begin)
    after = sampler.traffic()
    found["sampling"] = statistics.median(taken)
    found["edges"] = statistics.mean(sum(adj.e_id.size for adj in batch.adjs) for batch in batches)
    found["nodes"] = statistics.mean(len(batch.n_id) for batch in batches)
    found["many"] = seconds(lambda: sampler.sample_many([(own, 0) for own in seeds[:4]]), 3) / 4
    for kind in after:
        found[kind] = (after[kind]["sent"] - before[kind]["sent"]) / options.batches
    for cache in (0, options.cache):
        rows = np.ones((part.book.count_of(rank), options.width), np.float32)
        room = int(cache * part.book.num_nodes) * rows[:1].nbytes
        policy = {"sampler": sampler, "seeds": np.concatenate(seeds), "batch_size": options.batch_size} if room else {}
        features = DistFeature(part, communicator, rows, cache=room, **policy)
        ids = [batch.n_id for batch in batches]
        features[ids[0]]
        begin = features.stats()["remote"]["bytes"]
        turns = iter(ids)
        taken_ = seconds(lambda turns=turns, features=features: features[next(turns)], len(ids))  # type: ignore[misc]
        name = "cached" if cache else "gathering"
        found[name], found[f"{name}_bytes"] = taken_, (features.stats()["remote"]["bytes"] - begin) / len(ids)
    if rank == 0:
        print("RESULT" + json.dumps(found), flush=True)


def launch(options: argparse.Namespace, ranks: int, folder: Path) -> dict[str, float]:
    """Return what a rank of so many has measured, on the graph's parts in a folder."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("no mpiexec: pip install mpi4py mpich")
    program = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:], "--work", str(folder)]
    ran = subprocess.run([mpiexec, "-n", str(ranks), *program], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("RESULT"))
    result: dict[str, float] = json.loads(line.removeprefix("RESULT"))
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-20-30000000", help="see graphs.py")
    parser.add_argument("--parts-folder", type=Path, help="a partition on disk, instead; one rank a part")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--method", default="random", help="of the partition")
    parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10, 5])
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--width", type=int, default=128, help="of features")
    parser.add_argument("--cache", type=float, default=0.1, help="share of all rows that a rank has copies of")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    from gglspeedup.distributed import partition_to_disk

    print(f"{machine()}; {options.parts_folder or options.graph}, {options.fanouts}, batch {options.batch_size}\n")
    print(f"| ranks | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    results = {}
    graph = None if options.parts_folder else make(options.graph)
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            place = options.parts_folder or Path(folder) / "parts"
            if graph is not None:
                partition_to_disk(graph, place, ranks, options.method, progress=False)
            found = results[ranks] = launch(options, ranks, place)
        cells = (
            1e3 * found["sampling"], 1e3 * found["gathering"], ranks * found["edges"] / found["sampling"] / 1e6,
            *(found[kind] / 1e6 for kind in ("ids", "rows", "counts")), found["gathering_bytes"] / 1e6,
            found["messages"],
        )  # fmt: skip
        print(f"| {ranks} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)
    print()
    for ranks, found in results.items():
        cut = found["gathering_bytes"] / max(1.0, found["cached_bytes"])
        print(
            f"{ranks} ranks: an empty exchange {1e6 * found['exchange']:.0f} us, {found['bytes_a_second'] / 1e9:.2f} "
            f"GB/s; four batches at once {1e3 * found['many']:.1f} ms a batch; with copies of {options.cache:.0%} of "
            f"the rows {cut:.1f} times fewer bytes of features, {1e3 * found['cached']:.1f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "ranks": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
