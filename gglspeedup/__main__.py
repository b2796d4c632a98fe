"""The command line: ``python -m gglspeedup info``, ``partition`` and ``verify``."""

from __future__ import annotations

import argparse
import logging
import sys

from gglspeedup import __version__
from gglspeedup.errors import GGLSpeedupError

_PARTITION = """Cut a graph into parts on disk, in pieces that fit into memory, whatever the size of the graph.
A run that was interrupted goes on where it was when the same command is given again."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    if not getattr(options, "quiet", True):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("gglspeedup").setLevel(logging.INFO)
    try:
        print(options.run(options))
    except (GGLSpeedupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gglspeedup", description="gglspeedup " + __version__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="devices, driver, versions, threading layer, cache folder, what is missing")
    info.set_defaults(run=_info)

    cut = commands.add_parser("partition", help="cut a graph into parts on disk", description=_PARTITION)
    cut.add_argument("graph", metavar="GRAPH", help="a file of CSRGraph.save")
    cut.add_argument("out", metavar="OUT", help="a new or empty folder, or that of an earlier run")
    cut.add_argument("--parts", type=int, required=True, metavar="P", help="1 to 65536")
    cut.add_argument(
        "--method", default="contiguous", metavar="METHOD",
        help="contiguous (default): ranges of nodes; random; metis, which holds the graph in memory; "
        "file:OWNERS.npy: the part of each node",
    )  # fmt: skip
    cut.add_argument("--balance", choices=["edges", "nodes"], help="of contiguous parts; default: edges")
    cut.add_argument("--seed", type=int, default=0, help="of random and metis; default: 0")
    cut.add_argument("--features", metavar="X.npy", help="each part gets the rows of its nodes")
    cut.add_argument("--labels", metavar="Y.npy", help="likewise")
    cut.add_argument("--memory", default="2G", metavar="SIZE", help="of buffers; default: 2G")
    cut.add_argument("--quiet", action="store_true", help="show no progress")
    cut.set_defaults(run=_partition)

    check = commands.add_parser("verify", help="compare every byte of a partition on disk with its checksums")
    check.add_argument("out", metavar="OUT", help="the folder of a finished partition")
    check.add_argument("--quiet", action="store_true", help="show no progress")
    check.set_defaults(run=_verify)
    return parser


def _info(_options: argparse.Namespace) -> str:
    from gglspeedup.info import report

    return report()


def _partition(options: argparse.Namespace) -> str:
    from gglspeedup.distributed.partitioning import partition_to_disk

    method, owners = options.method, None
    if method.startswith("file:"):
        method, owners = "owners", method.removeprefix("file:")
    meta = partition_to_disk(
        options.graph, options.out, options.parts, method, balance=options.balance, seed=options.seed, owners=owners,
        features=options.features, labels=options.labels, memory=options.memory, progress=not options.quiet,
    )  # fmt: skip
    nodes, edges = (f"{min(counts)} to {max(counts)}" for counts in (meta.nodes, meta.edges))
    return f"{options.out}: {len(meta.nodes)} parts of {nodes} nodes and {edges} edges"


def _verify(options: argparse.Namespace) -> str:
    from gglspeedup.distributed.verify import verify_partition

    return f"{options.out}: {verify_partition(options.out, progress=not options.quiet)} bytes, all as written"


if __name__ == "__main__":
    sys.exit(main())
