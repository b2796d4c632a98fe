"""The contract of the adapters, each framework in a process of its own; `adapter_contract.py` has the process."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import adapter_contract
import pytest
from adapter_kit import FRAMEWORKS, OPERATIONS
from conftest import missing

CASES = [
    pytest.param(framework, operation, marks=() if framework == "torch" else pytest.mark.slow)
    for framework in FRAMEWORKS
    for operation, (_, only) in OPERATIONS.items()
    if framework in only
]
ENVIRONMENT = {"TL_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}


@functools.cache
def outcomes(framework: str) -> dict[str, str]:
    """What became of each operation: "passed", "missing ..." or how it failed."""
    result = subprocess.run(
        [sys.executable, adapter_contract.__file__, framework],
        capture_output=True, text=True, env={**os.environ, **ENVIRONMENT}, timeout=600, check=False,
    )  # fmt: skip
    reports = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    ended = f"the process ended with {result.returncode} before it was done: {result.stderr[-3000:]}"
    return {"": ended, **{report["operation"]: report["outcome"] for report in reports}}


@pytest.mark.parametrize(("framework", "operation"), CASES)
def test_contract(framework, operation):
    if importlib.util.find_spec(framework) is None:
        missing(framework)
    outcome = outcomes(framework).get(operation, outcomes(framework)[""])
    if outcome.startswith("missing"):
        missing(outcome.removeprefix("missing "))
    assert outcome == "passed", outcome


def test_every_adapter_has_a_contract():
    folder = Path(importlib.util.find_spec("gglspeedup.adapters").origin).parent
    backends = importlib.import_module("gglspeedup.adapters").BACKENDS
    assert {path.stem for path in folder.glob("*.py")} >= set(backends)
    assert set(backends) == {*FRAMEWORKS, "numpy", "cupy"}  # the two are in test_interchange.py


def test_tensorlayerx_without_dlpack():
    if importlib.util.find_spec("tensorlayerx") is None:
        missing("tensorlayerx")
    code = """
import types, sys
stand_in = types.ModuleType("tensorlayerx"); stand_in.BACKEND = "mindspore"; sys.modules["tensorlayerx"] = stand_in
from gglspeedup import GPUSampler
try:
    GPUSampler("cpu", ([0, 1], [0]), [1]).sample([0]).adjs[0].cp2tlx()
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TL_BACKEND needs one of" in result.stdout and "mindspore" in result.stdout
