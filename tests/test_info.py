"""`python -m gglspeedup info` answers on any machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gglspeedup import info
from gglspeedup.device import cuda_problem


def test_command():
    result = subprocess.run([sys.executable, "-m", "gglspeedup", "info"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for word in ("gglspeedup 0.", "threading layer", "driver:", "CPU kernels:", "numba", "torch"):
        assert word in result.stdout
    if cuda_problem(0):
        assert cuda_problem(0) in result.stdout


def test_what_is_missing_names_its_command(monkeypatch):
    monkeypatch.setattr(info, "_PACKAGES", (("no_such_module", ("no-such-distribution",), "pip install it"),))
    assert "no_such_module: missing; pip install it" in info.report()


def test_no_command():
    result = subprocess.run([sys.executable, "-m", "gglspeedup"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "info" in result.stderr


@pytest.mark.skipif(not cuda_problem(0), reason="this machine has a GPU")
def test_no_gpu_is_said():
    assert "none usable" in info.report()
