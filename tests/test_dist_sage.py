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


# The demo's trainings with two engines, in one process, as starting it takes longer than they do.
TWICE = "import runpy, sys; train = runpy.run_path(sys.argv.pop(1))['main']; [train() for sys.argv[-1] in ({!r}, {!r})]"


def halves(output: str) -> list[str]:
    """The reports of two trainings."""
    lines = output.splitlines()
    middle = len(lines) // 2
    return ["\n".join(lines[:middle]), "\n".join(lines[middle:])]


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
    return ["--dataset", str(tmp_path / "toy.npz"), "--epochs", "2", "--batch-size", "4", "--hidden", "8", "--quiet"]


def test_ranks_of_mpi(toy, tmp_path):
    """Three ranks, whose number that of the seeds is no multiple of, and a cache; the parts on disk are used again."""
    options = [*toy, "--cache", "400", "--parts-folder", "parts", "--communicator", ""]
    command = [mpiexec(), "-n", "3", sys.executable, "-c", TWICE.format("mpi", "mpi"), str(DEMO), *options]
    first, second = halves(finish(command, tmp_path))
    assert reported(first, "ranks").endswith("3, MpiCommunicator")
    assert reported(first, "test accuracy") == reported(second, "test accuracy")
    assert float(reported(first, "features").split()[1]) > 0


def test_ranks_of_torchrun(toy, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = finish([*launcher, str(DEMO), *toy, "--communicator", "torch"], tmp_path)
    assert reported(output, "ranks").endswith("2, TorchCommunicator")


def test_a_single_rank(toy, tmp_path):
    """Without a launcher, of either engine."""
    output = finish(
        [sys.executable, "-c", TWICE.format("mpi", "torch"), str(DEMO), *toy, "--communicator", ""], tmp_path
    )
    for text, name in zip(halves(output), ("Mpi", "Local"), strict=True):
        assert reported(text, "ranks").endswith(f"1, {name}Communicator")
        assert float(reported(text, "features").split()[1]) == 0


def test_reaches_the_accuracy(shared_data, tmp_path):
    """As many seeds a step as the demo of one process takes, over four ranks."""
    options = ["--root", str(shared_data), "--batch-size", "16", "--epochs", "40", "--quiet"]
    output = finish([mpiexec(), "-n", "4", sys.executable, str(DEMO), *options], tmp_path)
    accuracy = re.search(r"(\d\.\d+) ± \d\.\d+ \(1 seeds\)", reported(output, "test accuracy"))
    assert accuracy and float(accuracy[1]) >= 0.75, output
