"""The demo on several ranks, run as its users run it: under mpiexec, under torchrun, and by itself."""

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
from test_distributed_engines import ROOT, mpiexec

DEMO = ROOT / "demo_multi" / "dist_sage.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


def finish(command: list[str], folder: Path) -> str:
    """What a run writes; the demo's packages have to be there."""
    for package in ("torch", "torch_geometric"):
        if importlib.util.find_spec(package) is None:
            missing(package)
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def reported(output: str, label: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{label} ")]
    return line


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    """Options for a graph of 150 nodes whose neighbours mostly share their class."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 50)
    same = rng.integers(0, 50, (150, 4)) + 50 * y[:, None]
    indices = np.where(rng.random((150, 4)) < 0.9, same, rng.integers(0, 150, (150, 4)))
    split = rng.permutation(150)
    masks = {"train_mask": split < 31, "val_mask": (split >= 31) & (split < 61), "test_mask": split >= 61}
    x = (np.eye(8)[y] + rng.random((150, 8))).astype(np.float32)
    np.savez(tmp_path / "toy.npz", indptr=np.arange(0, 601, 4), indices=indices.ravel(), x=x, y=y, **masks)
    return ["--dataset", str(tmp_path / "toy.npz"), "--epochs", "3", "--batch-size", "4", "--hidden", "8", "--quiet"]


def test_ranks_of_mpi(toy, tmp_path):
    """Three ranks, of which one has a seed more than the others, and a cache; the parts on disk are used again."""
    command = [mpiexec(), "-n", "3", sys.executable, str(DEMO), *toy, "--cache", "400", "--parts-folder", "parts"]
    first, second = (finish(command, tmp_path) for _ in range(2))
    assert reported(first, "ranks").endswith("3, MpiCommunicator")
    assert reported(first, "test accuracy") == reported(second, "test accuracy")
    assert float(reported(first, "features").split()[1]) > 0


def test_ranks_of_torchrun(toy, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = finish([*launcher, str(DEMO), *toy, "--communicator", "torch"], tmp_path)
    assert reported(output, "ranks").endswith("2, TorchCommunicator")


@pytest.mark.parametrize("communicator", ["mpi", "torch"])
def test_a_single_rank(toy, tmp_path, communicator):
    output = finish([sys.executable, str(DEMO), *toy, "--communicator", communicator], tmp_path)
    assert reported(output, "ranks").split()[1] == "1,"
    assert float(reported(output, "features").split()[1]) == 0


def test_reaches_the_accuracy(shared_data, tmp_path):
    """As many seeds a step as the demo of one process takes, over four ranks."""
    options = ["--root", str(shared_data), "--batch-size", "16", "--seeds", "3", "--quiet"]
    output = finish([mpiexec(), "-n", "4", sys.executable, str(DEMO), *options], tmp_path)
    accuracy = re.search(r"(\d\.\d+) ± \d\.\d+ \(3 seeds\)", reported(output, "test accuracy"))
    assert accuracy and float(accuracy[1]) >= 0.75, output
