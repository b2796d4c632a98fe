"""CGPUFeature on the CPU, and the orders of hot rows."""

from __future__ import annotations

import pickle

import naive
import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import CGPUFeature, CSRGraph, GGLSpeedupError, GPUSampler
from gglspeedup.hot_order import hot_order

DTYPES = ["bool", "int8", "uint8", "int16", "float16", "int32", "float32", "int64", "float64", "complex64"]


def made(num_nodes: int, width: int | None, dtype: str, rng: np.random.Generator) -> np.ndarray:
    shape = (num_nodes,) if width is None else (num_nodes, width)
    return rng.integers(0, 100, shape).astype(dtype)


def feature_of(x: np.ndarray) -> CGPUFeature:
    feature = CGPUFeature(CSRGraph(np.zeros(len(x) + 1, int), []), "cpu", "1M")
    feature.from_cpu_tensor(x)
    return feature


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    numbers=st.integers(0, 2**32), num_nodes=st.integers(1, 300), dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([None, 0, 1, 2, 3, 5, 7, 8, 16, 33, 100, 128, 1025, 2500]), count=st.integers(0, 3000),
    threads=st.integers(1, 2),
)  # fmt: skip
def test_equals_naive(numbers, num_nodes, dtype, width, count, threads):
    rng = np.random.default_rng(numbers)
    gglspeedup.set_num_threads(threads)
    x = made(num_nodes, width, dtype, rng)
    n_id = rng.integers(0, num_nodes, count)
    got = feature_of(x)[n_id]
    assert got.dtype == x.dtype and got.shape == (count, *x.shape[1:]) and got.ctypes.data % 64 == 0
    np.testing.assert_array_equal(got, x[n_id])
    if count < 50:
        np.testing.assert_array_equal(got, naive.gather(x, n_id))


@pytest.mark.parametrize("kind", ["torch", "memmap", "strided", "fortran", "big-endian", "read-only", "list"])
def test_matrices_of_any_kind(tmp_path, kind):
    import torch

    x = np.arange(60, dtype=np.float32).reshape(12, 5)
    if kind == "memmap":
        x.tofile(tmp_path / "x")
        given_x = np.memmap(tmp_path / "x", np.float32, "r", shape=(12, 5))
    else:
        given_x = {
            "torch": lambda: torch.from_numpy(x.copy()).requires_grad_(), "strided": lambda: np.repeat(x, 2, 1)[:, ::2],
            "fortran": lambda: np.asfortranarray(x), "big-endian": lambda: x.astype(">f4"),
            "read-only": lambda: np.frombuffer(x.tobytes(), np.float32).reshape(12, 5), "list": x.tolist,
        }[kind]()  # fmt: skip
    feature = feature_of(given_x)
    np.testing.assert_array_equal(feature[[3, 0, 3]], x[[3, 0, 3]])
    assert feature.shape == (12, 5) and feature.dim() == 5 and len(feature) == 12
    twin = pickle.loads(pickle.dumps(feature))
    np.testing.assert_array_equal(twin[torch.tensor([3, 0])], x[[3, 0]])
    assert list(feature.stats()) == (["disk"] if kind == "memmap" else ["host"])


def test_a_contiguous_matrix_is_not_copied():
    x = np.zeros((10, 4), np.float32)
    feature = feature_of(x)
    x[2] = 7
    assert feature[[2]].tolist() == [[7.0] * 4]


def test_a_slice_of_a_memmap_survives_pickling(tmp_path):
    x = np.arange(40, dtype=np.int64).reshape(10, 4)
    x.tofile(tmp_path / "x")
    feature = feature_of(np.memmap(tmp_path / "x", np.int64, "r", shape=(10, 4))[3:])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(feature))[[0, 6]], x[[3, 9]])


def test_statistics():
    feature = feature_of(np.zeros((10, 4), np.float16))
    assert feature.hit_rate == 0.0 and feature.stats() == {"host": {"rows": 0, "bytes": 0}}
    feature[[1, 1, 2]]
    assert feature.hit_rate == 1.0 and feature.stats() == {"host": {"rows": 3, "bytes": 24}}
    assert feature.dtype == np.float16 and feature_of(np.zeros(5)).dim() == 1


def test_buffers_are_reused_but_never_shared():
    x = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    feature = feature_of(x)
    kept = feature[np.arange(500)]
    address = feature[np.arange(500, 1000)].ctypes.data
    again = feature[np.arange(500, 1000)]
    assert again.ctypes.data == address  # the dropped one's buffer
    np.testing.assert_array_equal(kept, x[:500])
    np.testing.assert_array_equal(again, x[500:])


def test_orders():
    rng = np.random.default_rng(0)
    graph = random_graph(rng, 200, 10)
    assert hot_order(graph, "degree", None, None, 1).tolist() == naive.hot_order(graph.indptr)
    order = hot_order(graph, [5, 3, 9], None, None, 1)
    assert order[:3].tolist() == [5, 3, 9] and sorted(order.tolist()) == list(range(200))
    sampler = GPUSampler("cpu", graph, [3, 2])
    seeds = rng.permutation(200)[:50]
    batches = [sampler.sample(seeds[at : at + 8], batch=b).n_id for b, at in enumerate(range(0, 50, 8))]
    visits = naive.visits(batches, 200)
    expected = sorted(range(200), key=lambda v: (-visits[v], v))
    assert hot_order(graph, "presample", sampler, seeds, 8).tolist() == expected
    assert sampler.sample([0]).batch == 0  # the counter has not moved


X = np.zeros((3, 2), np.float32)
GRAPH = CSRGraph([0, 1, 1, 2], [0, 2])
BAD = {
    "budget unit": (lambda: CGPUFeature(GRAPH, "cpu", "0.1Q"), ValueError, "budget"),
    "budget nan": (lambda: CGPUFeature(GRAPH, "cpu", float("nan")), ValueError, "budget"),
    "budget negative": (lambda: CGPUFeature(GRAPH, "cpu", -1), ValueError, "budget"),
    "budget kind": (lambda: CGPUFeature(GRAPH, "cpu", None), TypeError, "budget"),
    "policy": (lambda: CGPUFeature(GRAPH, "cpu", 0, policy="luck"), ValueError, "policy"),
    "presample alone": (lambda: CGPUFeature(GRAPH, "cpu", 0, policy="presample"), TypeError, "policy needs sampler="),
    "order range": (lambda: CGPUFeature(GRAPH, "cpu", 0, policy=[0, 3]), IndexError, "policy .* got 3 at position 1"),
    "order twice": (lambda: CGPUFeature(GRAPH, "cpu", 0, policy=[0, 1, 0]), ValueError, "0 again at position 2"),
    "rows": (lambda: feature_of(X).from_cpu_tensor(X[:2]), ValueError, r"x needs shape \[3\]"),
    "dimensions": (lambda: feature_of(X).from_cpu_tensor(X[None]), ValueError, "x needs"),
    "strings": (lambda: feature_of(X).from_cpu_tensor(np.array(["a", "b", "c"])), TypeError, "x needs a numeric dtype"),
    "objects": (lambda: feature_of(X).from_cpu_tensor(np.array([1, 2, None])), TypeError, "x needs a numeric dtype"),
    "ids high": (lambda: feature_of(X)[[0, 3, -1]], IndexError, "n_id needs ids from 0 to 2, got 3 at position 1"),
    "ids low": (lambda: feature_of(X)[[0, -1, 3]], IndexError, "got -1 at position 1"),
    "ids float": (lambda: feature_of(X)[[0.5]], TypeError, "n_id needs integers"),
    "ids mask": (lambda: feature_of(X)[[True, False, True]], TypeError, "n_id needs integers"),
    "ids matrix": (lambda: feature_of(X)[[[0]]], ValueError, "n_id needs one dimension"),
    "not loaded": (lambda: CGPUFeature(GRAPH, "cpu")[[0]], ValueError, "from_cpu_tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    call, builtin, message = BAD[case]
    with pytest.raises(GGLSpeedupError, match=message) as caught:
        call()
    assert isinstance(caught.value, builtin)


def test_bad_features_leave_the_old_ones():
    feature = feature_of(np.arange(3))
    with pytest.raises(ValueError):
        feature.from_cpu_tensor(np.arange(4))
    assert feature[[2]].tolist() == [2]
