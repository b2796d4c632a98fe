"""Counting visits: CPU, the CUDA simulator, and machine code without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import naive
import numpy as np
import pytest
from conftest import missing

from gglspeedup.kernels.visits_cpu import count_visits

SIMULATED = """
import sys, types
import numpy as np
from numba import cuda
from gglspeedup.kernels import visits_cpu, visits_gpu
rng = np.random.default_rng(0)
expected, got = np.zeros(700, np.int32), np.zeros(700, np.int32)
for size in (0, 1, 256, 300, 700):
    n_id = rng.permutation(700)[:size]
    visits_cpu.count_visits(n_id, expected)
    if size:
        visits_gpu._visit_each[-(-size // 256), 256](n_id, got)
assert np.array_equal(got, expected) and expected.sum() == 1257
print("passed")
"""


def test_equals_naive():
    rng = np.random.default_rng(0)
    batches = [rng.permutation(60)[:size] for size in (0, 7, 60, 21)]
    visits = np.zeros(60, np.int32)
    for batch in batches:
        count_visits(batch, visits)
    np.testing.assert_array_equal(visits, naive.visits(batches, 60))


def needs_numba_cuda() -> None:
    if importlib.util.find_spec("numba_cuda") is None:
        missing("numba-cuda")


def test_simulator_equals_cpu():
    needs_numba_cuda()
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    command = [sys.executable, "-c", SIMULATED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split() == ["passed"], result.stderr[-2000:]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0)])
def test_compiles_for(capability):
    needs_numba_cuda()
    from numba import cuda, types

    from gglspeedup.kernels.visits_gpu import visit_each

    signature = types.void(types.int64[::1], types.int32[::1])
    code, _returns = cuda.compile(visit_each, signature, cc=capability, device=False, abi="numba")
    assert f".target sm_{capability[0]}{capability[1]}" in code and ".entry" in code
