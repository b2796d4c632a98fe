"""Gathered bytes a second, ours and peers', interleaved; run as ``python -m benchmarks.gather``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import gglspeedup
from benchmarks import limits
from benchmarks.rounds import Contestant, machine, play, table
from gglspeedup.device import parse_device

PEERS = ("torch.index_select(out=)", "torch.index_select", "numpy.take(out=)", "graphbolt")
OF_PEER_PYTHON = ("graphbolt",)
ON_GPU = ("gglspeedup-tenth-cached", "gglspeedup-none-cached", "torch-cuda")


def _cuda_limits() -> dict[str, float]:
    """Return bytes a second of a copy within the GPU (read and written, both counted) and of a pinned copy to it."""
    import cupy

    size = 1 << 30
    source, target = cupy.zeros(size, np.uint8), cupy.zeros(size, np.uint8)
    pinned = cupy.cuda.alloc_pinned_memory(size)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def best(call: object) -> float:
        times = []
        for _ in range(8):
            start.record()
            call()  # type: ignore[operator]
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
        return min(times)

    within = 2 * size / best(lambda: target.data.copy_from_device_async(source.data, size))
    across = size / best(lambda: target.data.copy_from_host_async(pinned.ptr, size))
    return {"copy within the GPU": within, "pinned copy to the GPU": across}


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_400_000)
    parser.add_argument("--width", type=int, default=128, help="float32 elements a row")
    parser.add_argument("--ids", type=int, default=200_000)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has GraphBolt")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    on_gpu = parse_device(options.device).is_cuda
    row_bytes = 4 * options.width
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}, numpy {np.__version__}\n", flush=True)
    results = []
    for threads in [1] if on_gpu else options.threads:
        if on_gpu:
            bounds = _cuda_limits()
        else:
            gglspeedup.set_num_threads(threads)
            bounds = {
                "random rows read": limits.random_rows(row_bytes, written=False),
                "random rows read and written": limits.random_rows(row_bytes, written=True),
            }
        names = ["gglspeedup", *(ON_GPU if on_gpu else options.peers)]
        contestants = [
            Contestant(
                name,
                [options.peer_python if name in OF_PEER_PYTHON else sys.executable, "-m",
                 "benchmarks.gather_contestants", name, str(threads), str(options.rows), str(options.width),
                 str(options.ids), options.device],
            )
            for name in names
        ]  # fmt: skip
        play(contestants, options.rounds)
        where = options.device if on_gpu else f"{threads} thread{'s'[: threads > 1]}"
        title = f"{options.ids:,} random rows of {row_bytes} bytes out of {options.rows:,}; {where}"
        print(table(title, contestants, 1e9, "GB/s of rows"), "\n")
        for name, rate in bounds.items():
            print(f"this machine's limit, {name}: {rate / 1e9:.2f} GB/s; ours is {contestants[0].median / rate:.0%}")
        print(flush=True)
        results += [
            {"where": where, "label": c.label, "versions": c.versions, "bytes_per_second": c.median, "rounds": c.rates}
            for c in contestants
            if c.rates
        ]
        results.append({"where": where, "limits": bounds})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "gather": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
