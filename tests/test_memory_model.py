"""MemoryModel: a regression on what batches took; and its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import nnls

from gglspeedup.memory_model import BatchLoad, MemoryModel, MemoryModelFileError, model_of

RNG = np.random.default_rng(0)
WIDTHS = (400.0, 512.0, 188.0)


def some_load(scale: float = 1.0) -> BatchLoad:
    """A batch of two hops; how nodes and edges relate differs from batch to batch."""
    seeds = int(RNG.integers(10, 200) * scale)
    middle, outer = seeds + int(seeds * RNG.uniform(2, 9)), seeds + int(seeds * RNG.uniform(20, 60))
    edges = (int(outer * RNG.uniform(1, 4)), int(middle * RNG.uniform(1, 4)))
    own = outer * 408 + 24 * sum(edges)
    return BatchLoad((outer, middle, seeds), edges, WIDTHS, own, own + int(RNG.integers(0, 10**6)))


def fitted(truth: np.ndarray, count: int = 60, noise: float = 0.0) -> MemoryModel:
    model = MemoryModel(2)
    for _ in range(count):
        load = some_load()
        model.observe(load, float(truth @ load.features()) * (1 + noise * RNG.standard_normal()))
    return model


TRUTH = np.array([6e8, 2.0, 3.5, 0.0, 4.0, 1.5, 1.0])


def test_linear_memory_is_fitted_exactly():
    model = fitted(TRUTH)
    for _ in range(20):
        load = some_load(3.0)  # beyond what was observed, too
        assert model.predict(load) == pytest.approx(TRUTH @ load.features(), rel=1e-6)
    np.testing.assert_allclose(model.coefficients, TRUTH, rtol=1e-3, atol=1e-3)
    assert model.outlook(load).fixed == pytest.approx(6e8 + load.held - load.own, rel=1e-4)


def test_the_least_squares_are_those_of_numpy():
    """Relative errors, the latest counting most, as one plain solution of all observations."""
    model, rows, values = MemoryModel(2), [], []
    for _ in range(50):
        load = some_load()
        rows.append(load.features())
        values.append(float((TRUTH + 1) @ rows[-1]) * (1 + 0.001 * RNG.standard_normal()))
        model.observe(load, values[-1])
    age = np.arange(50)[::-1]
    weights = np.sqrt(0.995 ** np.minimum(age, 42) * 0.8 ** np.maximum(age - 42, 0))  # the first 8 fade quickly
    scaled = np.array(rows) / np.array(values)[:, None]
    found = np.linalg.lstsq(scaled * weights[:, None], weights, rcond=None)[0]
    assert (found >= 0).all(), "so that the bounds do not matter"
    np.testing.assert_allclose(np.array(rows) @ model.coefficients, np.array(rows) @ found, rtol=1e-6)


def test_no_coefficient_is_negative():
    model = fitted(TRUTH, 30, noise=0.2)
    assert (model.coefficients >= 0).all() and (model.coefficients == 0).any()


def test_noise_stays_within_the_margin():
    model = fitted(TRUTH, 300, noise=0.01)
    inside = 0
    for _ in range(200):
        load = some_load()
        peak = TRUTH @ load.features() * (1 + 0.01 * RNG.standard_normal())
        assert abs(model.predict(load) / peak - 1) < 0.05
        inside += peak <= model.predict(load) + model.outlook(load).margin
    assert inside >= 198


def test_the_margin_grows_with_the_errors():
    load, margins = some_load(), []
    for noise in (0.0, 0.05, 0.3):
        model = fitted(TRUTH, 100, noise)
        margins.append(model.outlook(load).margin)
    assert margins == sorted(margins)
    assert margins[0] == pytest.approx(0.05 * TRUTH @ load.features(), rel=1e-2)


def test_what_changes_is_learnt_again():
    model = fitted(TRUTH)
    for _ in range(1500):
        load = some_load()
        model.observe(load, float((TRUTH * 2) @ load.features()))
    assert model.predict(load) == pytest.approx(2 * TRUTH @ load.features(), rel=1e-3)


def test_idle_measurements_tell_what_is_fixed():
    model = MemoryModel(2)
    load = some_load()
    for _ in range(5):
        model.observe_idle(load.held, 5e8 + load.held)
        model.observe(load, 9e8)
    assert model.predict(load) == pytest.approx(9e8, rel=1e-3)
    model.observe_idle(0, 5e8)
    assert 4e8 < model.outlook(load).fixed < 6e8


def test_what_is_in_use_anyway_is_not_put_down_to_waiting_batches():
    """As a process of 460 MB in use measured it: a batch that waits is a thousandth of that."""
    model = MemoryModel(2)
    load = BatchLoad((2095, 234, 24), (2043, 210), (256.0, 1.0, 1.0), 600_000, 600_000)
    model.observe_idle(load.held, 458e6)
    model.observe(load, 496e6)
    more = load._replace(held=4 * load.held)
    assert 450e6 < model.outlook(more).fixed < model.predict(more) < 510e6
    assert model.coefficients[-1] <= 3.0


def test_the_bound_on_what_waits_is_the_best_within_it():
    """All else is fitted as if what waits took 3 bytes each."""
    truth = np.where(np.arange(7) == 6, 9.0, TRUTH)
    bounded, loads = MemoryModel(2), [some_load() for _ in range(40)]
    for load in loads:
        bounded.observe(load, float(truth @ load.features()))
    assert bounded.coefficients[-1] == 3.0
    rows = np.array([load.features() for load in loads])
    scaled, age = rows / (rows @ truth)[:, None], np.arange(40)[::-1]
    weights = np.sqrt(0.995 ** np.minimum(age, 32) * 0.8 ** np.maximum(age - 32, 0))
    found = nnls(scaled[:, :-1] * weights[:, None], (1 - 3.0 * scaled[:, -1]) * weights)[0]
    np.testing.assert_allclose(rows @ bounded.coefficients, rows @ np.append(found, 3.0), rtol=1e-4)


def test_a_model_moves_to_a_process_that_has_more_in_use():
    model, load = fitted(TRUTH), some_load()
    before = model.predict(load)
    model.move(7e8)
    assert model.predict(load) == pytest.approx(before + 1e8, rel=1e-4)
    model.move(1e8)  # before it trains, a process has less in use than later on
    assert model.predict(load) == pytest.approx(before + 1e8, rel=1e-4)
    for _ in range(30):  # less than half of what it took to fit it
        load = some_load()
        model.observe(load, 2 * float(TRUTH @ load.features()))
    assert model.predict(load) == pytest.approx(2 * TRUTH @ load.features(), rel=0.02)


def test_reach():
    model = MemoryModel(2)
    assert model.outlook(some_load()).reach == np.inf
    load = some_load()
    model.observe(load, 1e9)
    assert model.outlook(load).reach == 1.0
    assert model.outlook(load._replace(edges=(3 * load.edges[0], load.edges[1]))).reach == pytest.approx(3.0)


def test_a_file_holds_the_model(tmp_path):
    model = fitted(TRUTH, noise=0.02)
    model.save(tmp_path / "model.json")
    again = MemoryModel.load(tmp_path / "model.json")
    other = model_of(str(tmp_path / "model.json"))
    for _ in range(5):
        load = some_load()
        assert again.predict(load) == model.predict(load) == other.predict(load)
        assert again.outlook(load) == model.outlook(load)
    load = some_load()
    model.observe(load, 1e9)
    again.observe(load, 1e9)
    assert again.predict(load) == model.predict(load)
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "something else"}, {"hops": 0}, {"hops": 3}, {"hops": "2"}, {"hops": 10**9}, {"count": -1},
        {"gram": [[1.0]]}, {"gram": None}, {"moment": ["a"] * 7}, {"moment": [float("nan")] * 7},
        {"moment": [-1.0] * 7}, {"errors": 5}, {"errors": [[1.0]]}, {"errors": [1e999]}, {"largest": []},
        {"largest": [float("inf")] * 7},
    ],
)  # fmt: skip
def test_files_are_not_trusted(tmp_path, change):
    path = tmp_path / "model.json"
    fitted(TRUTH).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MemoryModelFileError, match="path needs a memory model, got"):
        MemoryModel.load(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100000, b"\x93NUMPY"])
def test_no_model_at_all(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(MemoryModelFileError):
        MemoryModel.load(path)
    with pytest.raises(FileNotFoundError):
        MemoryModel.load(tmp_path / "none.json")


def test_a_matrix_that_is_not_symmetric(tmp_path):
    path = tmp_path / "model.json"
    fitted(TRUTH).save(path)
    state = json.loads(path.read_text())
    state["gram"][0][1] += 1.0
    path.write_text(json.dumps(state))
    with pytest.raises(MemoryModelFileError, match="symmetric"):
        MemoryModel.load(path)


def test_bad_arguments():
    for hops, error in ((0, ValueError), (256, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="hops"):
            MemoryModel(hops)
    with pytest.raises(TypeError, match="model needs"):
        model_of(5)
