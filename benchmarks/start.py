"""Seconds from the start of a process to its first sample: kernels compiled, then kernels cached.

``python -m benchmarks.start``; each figure is of a new process, import included.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.rounds import ROOT, machine

_CODE = """
import time
begin = time.perf_counter()
import numpy as np
import gglspeedup
imported = time.perf_counter()
sampler = gglspeedup.GPUSampler("cpu", (np.arange(1001) * 4, np.arange(4000) % 1000), [25, 10])
n_id, adjs = sampler.sample(np.arange(100))
sampled = time.perf_counter()
features = gglspeedup.CGPUFeature(sampler.graph, "cpu")
features.from_cpu_tensor(np.zeros((1000, 100), np.float32))
features[n_id]
print(imported - begin, sampled - begin, time.perf_counter() - begin)
"""


def main() -> None:
    """Measure and print."""
    print(machine())
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}

        def once() -> list[float]:
            command = [sys.executable, "-c", _CODE]
            result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
            return [float(text) for text in result.stdout.split()]

        runs = [("compiled", once())]
        again = [once() for _ in range(7)]
        runs.append(("cached, median of 7", [statistics.median(column) for column in zip(*again, strict=True)]))
    print("| kernels | import | first sample | first features, too |\n|---|---|---|---|")
    for name, figures in runs:
        print(f"| {name} | " + " | ".join(f"{seconds:.2f} s" for seconds in figures) + " |")


if __name__ == "__main__":
    main()
