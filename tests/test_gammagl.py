"""GammaGL's sampler and models on all of TensorLayerX's backends, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import gammagl_script
import pytest
from conftest import missing

pytestmark = pytest.mark.slow


BACKENDS = ("tensorflow", "torch", "paddle")


def output(backend: str, *command: str) -> str:
    """What a Python program prints with a backend."""
    for package in ("tensorlayerx", "gammagl", backend):
        if importlib.util.find_spec(package) is None:
            missing(package)
    environment = {**os.environ, "TL_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@lru_cache
def found(backend: str) -> dict[str, str | None]:
    """What the checks found on a backend: None, or a traceback."""
    return json.loads(output(backend, gammagl_script.__file__, backend).splitlines()[-1])


@pytest.mark.parametrize("check", gammagl_script.CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gammagl(backend, check):
    problem = found(backend)[check]
    assert problem is None, problem


@pytest.mark.parametrize("backend", BACKENDS)
def test_demo(backend, shared_data, tmp_path):
    program = Path(gammagl_script.__file__).parent.parent / "demo" / "sage_tensorlayerx.py"
    options = ["--dataset", "cora", "--root", str(shared_data), "--out", str(tmp_path)]
    printed = output(backend, str(program), *options, "--hidden", "32", "--epochs", "20", "--quiet")
    assert f", on {backend} " in printed
    (accuracy,) = (float(line.split()[2]) for line in printed.splitlines() if line.startswith("test accuracy"))
    assert accuracy >= 0.75
    assert (tmp_path / "sage_cora.csv").exists()
