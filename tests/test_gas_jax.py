"""GNNAutoScale's GCN in JAX, run as its users run it: it reports, learns, and loads its own framework only."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import missing

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}


def run_demo(*options: str) -> tuple[str, str]:
    for package in ("jax", "optax"):
        if importlib.util.find_spec(package) is None:
            missing(package)
    command = [sys.executable, "-X", "importtime", "-m", "demo.gas_jax", *options]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def made_cora(folder: Path, width: int) -> None:
    """150 nodes of three classes in the place of Cora, whose neighbours and features mostly tell the class."""
    rng = np.random.default_rng(0)
    y, nodes = np.repeat(np.arange(3), 50), np.arange(150) % 50
    same = rng.integers(0, 50, (150, 3)) + 50 * y[:, None]
    indices = np.sort(np.where(rng.random((150, 3)) < 0.8, same, rng.integers(0, 150, (150, 3))), axis=1)
    x = np.zeros((150, width), np.float32)
    x[np.arange(150), np.where(rng.random(150) < 0.7, y, rng.integers(0, width, 150))] = 3
    masks = {"train_mask": nodes < 8, "val_mask": (nodes >= 8) & (nodes < 20), "test_mask": nodes >= 20}
    np.savez(folder / "cora.npz", indptr=np.arange(0, 451, 3), indices=indices.ravel(), x=x, y=y, **masks)


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 40], ids=["dense", "compact"])
def test_demo_learns(tmp_path: Path, width: int) -> None:
    made_cora(tmp_path, width)
    options = ["--root", str(tmp_path), "--epochs", "40", "--layers", "3", "--partition", "random"]
    out, errors = run_demo(*options, "--runs", "2", "--dtype", "bfloat16")
    found = {name: float(re.search(rf"^{name} +([\d.]+)", out, re.MULTILINE)[1])
             for name in ("test accuracy", "compilations", "epoch")}  # fmt: skip
    assert found["test accuracy"] > 60 and 2 <= found["compilations"] <= 6
    assert "80/80" in errors  # epochs, on the progress bar
    loaded = set(re.findall(r"^import time:.*\| +([a-z_]+)$", errors, re.MULTILINE))
    assert not {"torch", "tensorflow", "paddle", "tensorlayerx", "cupy"} & loaded and {"jax", "optax"} <= loaded


@pytest.mark.slow
def test_demo_reaches_the_accuracy(shared_data: Path) -> None:
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    out, errors = run_demo("--root", str(shared_data), "--quiet")
    assert float(re.search(r"^test accuracy +([\d.]+)", out, re.MULTILINE)[1]) > 79
    assert "epoch/s" not in errors
