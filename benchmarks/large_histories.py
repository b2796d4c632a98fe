"""Histories larger than memory: all rows written, then rows from anywhere; ``python -m benchmarks.large_histories``.

Each row is a function of its node, so that what is pulled is checked.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.rounds import machine
from gglspeedup import HistoryStore
from gglspeedup.device import host_free_bytes

WIDTH = 64
PART = 1 << 18  # nodes of a push


def rows_of(nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the rows of some nodes."""
    return (nodes[:, None] % 9973 + np.arange(WIDTH)).astype(np.float32)


def own_memory() -> dict[str, int]:
    """Return this process's memory in bytes: its own, and pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, required=True, help="size of the store")
    parser.add_argument("--folder", type=Path, help="on the disk to be used (default: for temporary files)")
    parser.add_argument("--pulls", type=int, default=20)
    parser.add_argument("--rows", type=int, default=20_000, help="of a pull, anywhere")
    options = parser.parse_args()
    nodes = int(options.gib * 2**30 / (2 * (4 * WIDTH + 8)))
    print(f"{machine()}; {host_free_bytes() / 2**30:.1f} GiB of memory free")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "histories"
        with HistoryStore(nodes, [WIDTH, WIDTH], "cpu", storage="mmap", path=path) as store:
            print(f"{nodes} nodes, two tables of width {WIDTH}, {path.stat().st_size / 2**30:.1f} GiB", flush=True)
            begin = time.perf_counter()
            for first in range(0, nodes, PART):
                part = np.arange(first, min(first + PART, nodes))
                for table in store:
                    table.push(rows_of(part), offset=[first], count=[len(part)])
            store.synchronize()
            written = time.perf_counter() - begin
            print(f"all rows pushed in {written:.0f} s, {nodes * WIDTH * 8 / written / 1e6:.0f} MB/s", flush=True)
            rng, begin = np.random.default_rng(0), time.perf_counter()
            for k in range(options.pulls):
                n_id = rng.integers(0, nodes, options.rows)
                assert np.array_equal(store[k % 2].pull(n_id), rows_of(n_id))
            pulled = options.pulls * options.rows
            rate = pulled / (time.perf_counter() - begin)
            print(f"{pulled} rows pulled from anywhere, {rate:.0f} a second, all right")
            memory = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in own_memory().items())
            print(f"memory of this process: {memory}")
        with HistoryStore(nodes, [WIDTH, WIDTH], "cpu", storage="mmap", path=path) as store:
            n_id = rng.integers(0, nodes, options.rows)
            assert np.array_equal(store[1].pull(n_id), rows_of(n_id))
            print("opened again: the rows are there")


if __name__ == "__main__":
    main()
