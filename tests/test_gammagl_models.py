"""The models on GammaGL's layers on TensorLayerX's backends, each in a process of its own, and their demo."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path

import gammagl_models_script
import numpy as np
import pytest
from conftest import missing
from test_gammagl import BACKENDS, output

pytestmark = pytest.mark.slow

DEMO = Path(gammagl_models_script.__file__).parent.parent / "demo" / "gas_tensorlayerx.py"


@lru_cache
def found(backend: str) -> dict[str, str | None]:
    """What the checks found on a backend: None, or a traceback."""
    return json.loads(output(backend, gammagl_models_script.__file__, backend).splitlines()[-1])


@pytest.mark.parametrize("check", gammagl_models_script.CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_models(backend: str, check: str) -> None:
    problem = found(backend)[check]
    assert problem is None, problem


# --- the demo ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a made graph for Cora, of 150 nodes whose neighbours and features mostly tell their class."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 50)
    same = rng.integers(0, 50, (150, 4)) + 50 * y[:, None]
    indices = np.where(rng.random((150, 4)) < 0.9, same, rng.integers(0, 150, (150, 4)))
    x = np.zeros((150, 40), np.float32)
    x[np.arange(150), np.where(rng.random(150) < 0.7, y, rng.integers(0, 40, 150))] = 1
    nodes = np.arange(150) % 50
    masks = {"train_mask": nodes < 8, "val_mask": (nodes >= 8) & (nodes < 20), "test_mask": nodes >= 20}
    np.savez(tmp_path / "cora.npz", indptr=np.arange(0, 601, 4), indices=indices.ravel(), x=x, y=y, **masks)
    return tmp_path


def accuracy(printed: str) -> float:
    (found,) = re.findall(r"^test accuracy +(\d+\.\d+) % at the best validation", printed, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize(
    ("backend", "model"),
    [*((backend, "gcn") for backend in BACKENDS), *(("torch", model) for model in ("gat", "appnp", "gcnii"))],
)
def test_demo_trains_every_model(backend: str, model: str, root: Path) -> None:
    options = ["--root", str(root), "--device", "cpu", "--partition", "contiguous", "--quiet", "--seed", "1"]
    few = {"gcn": "20", "gat": "30", "appnp": "40", "gcnii": "30"}[model]
    printed = output(backend, str(DEMO), *options, "--model", model, "--epochs", few)
    assert f"{model} on cora, in TensorLayerX" in printed and f" on {backend}" in printed
    # An epoch of 64 layers takes seconds; that such a model learns, test_models shows.
    assert accuracy(printed) > (75 if model != "gcnii" else 0)


def test_demo_reaches_the_accuracy(shared_data: Path) -> None:
    if importlib.util.find_spec("pymetis") is None:
        missing("pymetis")
    options = ["--root", str(shared_data), "--device", "cpu", "--quiet", "--epochs", "80"]
    printed = output("torch", str(DEMO), *options)
    assert accuracy(printed) > 75


def test_demo_says_what_it_cannot_do(root: Path) -> None:
    for options, status, message in (
        (["--dataset", "citeseer", "--root", str(root)], 1, "gas_tensorlayerx: "),
        (["--dataset", "amazon_photo", "--model", "gat"], 2, "no setting of gat on amazon_photo"),
    ):
        with pytest.raises(AssertionError, match=message) as raised:
            output("torch", str(DEMO), *options)
        assert f"assert {status} == 0" in str(raised.value)
