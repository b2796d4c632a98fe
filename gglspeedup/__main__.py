"""The command line: ``python -m gglspeedup info``."""

from __future__ import annotations

import argparse
import sys

from gglspeedup import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m gglspeedup", description="gglspeedup " + __version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices, driver, versions, threading layer, cache folder, what is missing")
    parser.parse_args(arguments)
    from gglspeedup.info import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
