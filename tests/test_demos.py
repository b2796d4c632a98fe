"""Every demo, run as its users run it: it finishes, reports, loads its own framework only, reaches the accuracy."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from conftest import missing

ROOT = Path(__file__).resolve().parent.parent

# What each demo is said to need; of the packages below it may load these alone.
NEEDS = {
    "torch": {"torch", "torch_geometric"},
    "tensorflow": {"tensorflow", "keras"},
    "paddle": {"paddle"},
    "tensorlayerx": {"tensorlayerx", "gammagl", "tensorflow"},
    "jax": {"jax", "optax"},
    "pyg": {"torch", "torch_geometric"},
    "lightning": {"lightning", "torch", "torch_geometric"},
}
FRAMEWORKS = set.union(*NEEDS.values()) | {"cupy"}
# With threads that spin, a machine that does anything else takes ten times as long.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TL_BACKEND": "tensorflow"}
REPORTED = ("graph", "framework", "test accuracy", "training epoch", "time", "written")


def demo_file(name: str) -> Path:
    """The file of a demo; whoever lacks one of its packages may skip it, but the file has to be there."""
    file = ROOT / "demo" / f"sage_{name}.py"
    assert file.is_file()
    for package in sorted(NEEDS[name]):
        if importlib.util.find_spec(package) is None:
            missing(package)
    return file


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command, "--device", "cpu"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process has written, to both streams."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out, errors


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A graph of 150 nodes whose neighbours mostly share their class, without a split."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 50)
    same = rng.integers(0, 50, (150, 4)) + 50 * y[:, None]
    indices = np.where(rng.random((150, 4)) < 0.9, same, rng.integers(0, 150, (150, 4)))
    x = (np.eye(8)[y] + rng.random((150, 8))).astype(np.float32)
    path = tmp_path / "toy.npz"
    np.savez(path, indptr=np.arange(0, 601, 4), indices=indices.ravel(), x=x, y=y)
    return path


def test_every_demo_is_tested() -> None:
    assert {path.stem.removeprefix("sage_") for path in (ROOT / "demo").glob("sage_*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_runs_as_a_file(name: str, toy: Path, tmp_path: Path) -> None:
    options = ["--dataset", str(toy), "--epochs", "2", "--batch-size", "16", "--hidden", "8", "--quiet"]
    out, errors = finish(start(["-X", "importtime", str(demo_file(name)), *options], tmp_path))
    for label in REPORTED:
        assert sum(line.startswith(f"{label} ") for line in out.splitlines()) == 1, out
    assert (tmp_path / "out" / "sage_toy.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "out" / "sage_toy.csv").read_text().splitlines()
    assert len(table) == 1 + 2 and np.isfinite([float(value) for value in table[-1].split(",")]).all()
    assert "toy has no split" in errors
    assert "epoch/s" not in errors
    imported = set(re.findall(r"^import time:.*\| +([a-z_]+)$", errors, re.MULTILINE)) & FRAMEWORKS
    # TensorFlow Lite, which is part of TensorFlow, imports JAX itself where it is installed.
    assert imported - ({"jax"} if "tensorflow" in NEEDS[name] else set()) == NEEDS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_reaches_the_accuracies(name: str, shared_data: Path, tmp_path: Path) -> None:
    command = ["-m", f"demo.{demo_file(name).stem}", "--root", str(shared_data), "--quiet"]
    least = {"cora": 0.78, "pubmed": 0.75}
    # Side by side, as each uses little more than one core.
    with ExitStack() as stack:
        options = {graph: ["--dataset", graph, "--out", str(tmp_path)] for graph in least}
        runs = {graph: stack.enter_context(start([*command, *options[graph]], ROOT)) for graph in least}
        reports = {graph: finish(process)[0] for graph, process in runs.items()}
    for graph, report in reports.items():
        accuracy = re.search(r"^test accuracy +(\d\.\d+)$", report, re.MULTILINE)
        assert accuracy and float(accuracy[1]) >= least[graph], report
        assert (tmp_path / f"sage_{graph}.png").exists()
