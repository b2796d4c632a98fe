"""What graphs beyond one machine need, by a model of measured constants; ``python -m benchmarks.scale --json FILE``.

FILE is what ``python -m benchmarks.ranks --json FILE`` has left. docs/scale.md explains the model and has its tables.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

EXCHANGES_A_HOP = 4  # counts and ids there, counts and rows back
HOPS_BYTES = 8  # an edge's neighbour and id, where they fit 32 bits; else the double
CORES = 16  # of a machine: a rank each
MESSAGE_SECONDS = 20e-6  # of a network between machines: assumed, as no other machine was there


@dataclass(frozen=True)
class Graph:
    """A graph, and the bytes of a feature row."""

    name: str
    nodes: float
    edges: float
    row_bytes: int
    featured: float  # nodes that have features


GRAPHS = (
    Graph("papers100M", 111_059_956, 1_615_685_872, 4 * 128, 111_059_956),
    Graph("MAG240M", 244_160_499, 1_728_364_232, 2 * 768, 121_751_666),
    Graph("10^10 edges", 1e9, 1e10, 4 * 128, 1e9),
)


@dataclass(frozen=True)
class Constants:
    """Seconds an edge and a gathered row of a rank's own work, of an empty exchange, and bytes a second, here."""

    edge: float
    row: float
    exchange: float
    bandwidth: float
    cut: float  # fewer feature bytes with copies of a tenth of the rows

    @classmethod
    def read(cls, file: Path) -> Constants:
        """Return the constants that a run of benchmarks.ranks has measured."""
        ranks = json.loads(file.read_text(encoding="utf-8"))["ranks"]
        one, two, most = ranks["1"], ranks["2"], ranks[max(ranks, key=int)]
        cut = most["gathering_bytes"] / most["cached_bytes"]
        return cls(
            one["sampling"] / one["edges"], one["gathering"] / one["nodes"], two["exchange"], two["bytes_a_second"], cut
        )  # fmt: skip


def bounds(batch: int, fanouts: list[int]) -> tuple[int, int]:
    """Return the most edges and nodes of a batch: all rows full, and no node met twice."""
    nodes, edges = batch, 0
    for fanout in fanouts:
        found = nodes * fanout
        nodes, edges = nodes + found, edges + found
    return edges, nodes


def table(constants: Constants, batch: int, fanouts: list[int]) -> list[str]:
    """Return the lines of a table: memory a machine, bytes and time a batch, and what bounds the machine."""
    edges, nodes = bounds(batch, fanouts)
    names = (
        "graph", "machines", "GB a machine: graph", "features", "MB a batch", "ms a batch of a rank",
        "batches/s a machine: 100 Gb/s", "400 Gb/s", "one epoch over all nodes: 400 Gb/s",
    )  # fmt: skip
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for graph in GRAPHS:
        wide = 2 if graph.nodes >= 2**31 or graph.edges >= 2**31 else 1
        for machines in (8, 64):
            owned = (8 * graph.nodes + 4 * (2 if graph.nodes >= 2**31 else 1) * graph.edges) / machines
            remote = 1 - 1 / machines
            sampled = remote * wide * HOPS_BYTES * edges
            # The hottest rows are cached on each machine, as many times fewer travel as here.
            gathered = remote * graph.row_bytes * nodes / constants.cut
            own = edges * constants.edge + nodes * constants.row + EXCHANGES_A_HOP * len(fanouts) * MESSAGE_SECONDS
            rates = [min(CORES / own, gigabits * 1e9 / 8 / (sampled + gathered)) for gigabits in (100, 400)]
            bound = ["network" if rate < CORES / own * 0.999 else "cores" for rate in rates]
            cells = (
                graph.name, str(machines), f"{owned / 1e9:.1f}",
                f"{graph.row_bytes * graph.featured / machines / 1e9:.0f}", f"{(sampled + gathered) / 1e6:.0f}",
                f"{1e3 * own:.0f}",
                *(f"{rate:.0f} ({what})" for rate, what in zip(rates, bound, strict=True)),
                f"{graph.nodes / batch / machines / rates[1] / 60:.0f} min",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the constants, what the model says of the measured runs, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10, 5])
    options = parser.parse_args()
    constants = Constants.read(options.json)
    print(
        f"{1e9 * constants.edge:.1f} ns an edge, {1e9 * constants.row:.1f} ns a row, {1e6 * constants.exchange:.0f} us "
        f"an empty exchange, {constants.bandwidth / 1e9:.2f} GB/s, {constants.cut:.1f} times fewer bytes with copies\n"
    )
    print("| ranks | ms a batch, predicted | measured |\n|---|---|---|")
    ranks = json.loads(options.json.read_text(encoding="utf-8"))["ranks"]
    for count, found in ranks.items():
        sent = found["ids"] + found["rows"]
        shared = max(1.0, int(count) / 2)  # ranks of a core, of which there are two
        waits = found["messages"] / max(1, int(count) - 1) * found["exchange"]
        predicted = shared * found["edges"] * constants.edge + waits + sent / constants.bandwidth
        print(f"| {count} | {1e3 * predicted:.1f} | {1e3 * found['sampling']:.1f} |")
    print()
    print("\n".join(table(constants, options.batch_size, options.fanouts)))


if __name__ == "__main__":
    main()
