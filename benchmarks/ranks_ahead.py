"""What 2 and 4 ranks on this machine save by fetching ahead and together; ``python -m benchmarks.ranks_ahead``.

Pulls of all tables of histories, one by one and by one prefetch; batches of DistNodeLoader, one or several in an
exchange; both with a training step beside them, whose time is slept, as a GPU's would be. Needs mpi4py and an
``mpiexec``, as pip's mpich has one.
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


def work(options: argparse.Namespace) -> None:
    """Be one rank; the first prints what it measured: of each way milliseconds and messages a batch, of one rank."""
    from gglspeedup.distributed import DistFeature, DistHistory, DistNodeLoader, DistSampler, GraphPart, MpiCommunicator

    gglspeedup.set_num_threads(1)
    own, communicator = MpiCommunicator(), MpiCommunicator()
    rank, part = communicator.rank, GraphPart.load(options.work, communicator.rank)
    nodes, step = part.book.num_nodes, options.step / 1e3
    sampler = DistSampler(part, communicator, options.fanouts)
    features = DistFeature(part, communicator, np.ones((part.num_nodes, options.width), np.float32))
    seeds = np.random.default_rng(rank).choice(nodes, options.batches * options.batch_size, replace=False)
    batches = list(sampler.batches(seeds, options.batch_size))
    ways: dict[str, tuple[Callable[[], Any], list[Any]]] = {}

    def pulls(histories: DistHistory, ahead: bool, step: float) -> None:
        for batch in batches:
            if ahead:
                histories.prefetch(batch.n_id)
            time.sleep(step)
            for table in histories:
                table.pull(batch.n_id)

    stores = [DistHistory(part, talk, [options.width] * options.tables, background=talk is own) for talk in
              (communicator, own)]  # fmt: skip
    for name, store, ahead, slept in (
        ("one by one", 0, False, 0.0), ("prefetch", 0, True, 0.0), ("one by one, with a step", 0, False, step),
        ("prefetch, with a step", 0, True, step), ("prefetch in the background, with a step", 1, True, step),
    ):  # fmt: skip
        arguments = stores[store], ahead, slept
        ways[f"histories: {name}"] = (lambda arguments=arguments: pulls(*arguments)), [stores[store]]  # type: ignore[misc]

    def epoch(loader: DistNodeLoader, step: float) -> None:
        for _ in loader:
            time.sleep(step)

    for together, prefetch, slept in (1, 0, 0.0), (4, 0, 0.0), (1, 0, step), (1, 2, step), (4, 2, step):
        loader = DistNodeLoader(
            sampler, features, seeds=seeds, batch_size=options.batch_size, together=together, prefetch=prefetch
        )
        name = f"batches: together={together}, prefetch={prefetch}{', with a step' if slept else ''}"
        ways[name] = (lambda loader=loader, slept=slept: epoch(loader, slept)), [sampler, features]  # type: ignore[misc]
    found: dict[str, Any] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, (call, talkers) in ways.items():
            before = sum(talker.traffic()["messages"]["sent"] for talker in talkers)
            begin = time.perf_counter()
            call()
            taken = 1e3 * (time.perf_counter() - begin) / options.batches
            sent = sum(talker.traffic()["messages"]["sent"] for talker in talkers) - before
            found[name].append((taken, sent / options.batches))
    for store in stores:
        store.close()
    if rank == 0:
        medians = {name: [statistics.median(values) for values in zip(*some[1:], strict=True)]
                   for name, some in found.items()}  # fmt: skip
        print("RESULT" + json.dumps(medians), flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", default="rmat-18-6000000", help="see graphs.py")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 5])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=12, help="of each rank")
    parser.add_argument("--width", type=int, default=64, help="of features and histories")
    parser.add_argument("--tables", type=int, default=3, help="of the histories")
    parser.add_argument("--step", type=float, default=10.0, help="milliseconds of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    from gglspeedup.distributed import partition_to_disk

    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        raise SystemExit("no mpiexec: pip install mpi4py mpich")
    print(f"{machine()}; {options.graph}, {options.fanouts}, batch {options.batch_size}, width {options.width}\n")
    graph, results = make(options.graph), {}
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "parts"
            partition_to_disk(graph, place, ranks, "random", progress=False)
            program = [sys.executable, "-m", "benchmarks.ranks_ahead", *sys.argv[1:], "--work", str(place)]
            command = [mpiexec, "-n", str(ranks), *program]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            (line,) = (line for line in ran.stdout.splitlines() if line.startswith("RESULT"))
            results[ranks] = json.loads(line.removeprefix("RESULT"))
    print(f"| | {' | '.join(f'{ranks} ranks: ms a batch | messages' for ranks in options.ranks)} |")
    print("|---" * (1 + 2 * len(options.ranks)) + "|")
    for name in results[options.ranks[0]]:
        cells = [f"{found[name][0]:.2f} | {found[name][1]:.1f}" for found in results.values()]  # type: ignore[index]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "ranks": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
