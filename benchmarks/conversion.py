"""What it costs to hand a batch to each framework, and to take it back; run as ``python -m benchmarks.conversion``.

A batch here is seven arrays as the sampler and the features hand them out: n_id, x, y, and two adjacencies.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import gglspeedup
from benchmarks.rounds import machine
from gglspeedup.adapters import backend
from gglspeedup.memory import BufferPool

FRAMEWORKS = ("torch", "tensorflow", "paddle", "tensorlayerx", "jax", "jax-x64")


def batch(nodes: int, width: int, edges: int, seeds: int) -> list[np.ndarray]:
    """Return the arrays of a batch of two hops, in the library's own buffers."""
    pool, inner = BufferPool(), edges // 10
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((nodes,), np.int64), ((nodes, width), np.float32), ((seeds,), np.int64),
        ((2, edges - inner), np.int64), ((edges - inner,), np.int64), ((2, inner), np.int64), ((inner,), np.int64),
    ]  # fmt: skip
    arrays = [pool.empty(*shape) for shape in shapes]
    for array in arrays:
        array[...] = 1
    return arrays


def median(call: Callable[[], Any], repeats: int) -> float:
    """Return the median time of a call, in microseconds; what it returns is dropped outside of the time."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begin)
        del result
    return statistics.median(times) * 1e6


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure one framework in this process and print its line."""
    framework, _, x64 = name.partition("-")
    if x64:
        import jax

        jax.config.update("jax_enable_x64", True)
    adapter = backend(framework)
    arrays = batch(options.nodes, options.width, options.edges, options.seeds)
    out = median(lambda: [adapter.to_framework(array) for array in arrays], options.repeats)
    tensors = [adapter.to_framework(array) for array in arrays]
    back = median(lambda: [adapter.from_framework(tensor) for tensor in tensors], options.repeats)
    print(f"| {name} | {out:.0f} | {back:.0f} |", flush=True)


def main() -> None:
    """Measure each framework in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=25_000)
    parser.add_argument("--width", type=int, default=100, help="float32 features a node")
    parser.add_argument("--edges", type=int, default=250_000)
    parser.add_argument("--seeds", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--framework", choices=FRAMEWORKS, help="measure this one here")
    options = parser.parse_args()
    if options.framework:
        measure(options.framework, options)
        return
    print(f"{machine()}; gglspeedup {gglspeedup.__version__}\n")
    print(f"{options.nodes:,} nodes x {options.width} float32, {options.edges:,} edges; microseconds a batch, median\n")
    print("| | to the framework | back |\n|---|---|---|", flush=True)
    environment = {**os.environ, "TL_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    for name in FRAMEWORKS:
        command = [sys.executable, "-m", "benchmarks.conversion", *sys.argv[1:], "--framework", name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(next((line for line in done.stdout.splitlines() if line.startswith("| ")), f"| {name} | left out | |"))


if __name__ == "__main__":
    main()
