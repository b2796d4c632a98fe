"""Bad input raises at the call, in words that help, and changes nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest

import gglspeedup
from gglspeedup import CSRGraph, DeviceError, GGLSpeedupError, GPUSampler
from gglspeedup.device import cuda_problem, parse_device
from gglspeedup.memory import parse_size

GRAPH = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])


def sampler() -> GPUSampler:
    return GPUSampler("cpu", GRAPH, [2])


BAD = {
    "high": (lambda: sampler().sample([0, 3, 9]), IndexError, "seeds needs ids from 0 to 2, got 3 at position 1"),
    "negative": (lambda: sampler().sample([0, -1]), IndexError, "seeds .* got -1 at position 1"),
    "huge": (lambda: sampler().sample(np.array([2**64 - 1], np.uint64)), IndexError, "seeds"),
    "twice": (lambda: sampler().sample([0, 1, 0]), ValueError, "seeds needs unique ids, got 0 again at position 2"),
    "float": (lambda: sampler().sample([0.0]), TypeError, "seeds needs integers, got dtype float64"),
    "bool": (lambda: sampler().sample([True]), TypeError, "seeds needs integers"),
    "text": (lambda: sampler().sample("abc"), ValueError, "seeds needs one dimension"),
    "matrix": (lambda: sampler().sample([[0]]), ValueError, "seeds needs one dimension"),
    "scalar": (lambda: sampler().sample(0), ValueError, "seeds needs one dimension"),
    "ragged": (lambda: sampler().sample([[0], [1, 2]]), TypeError, "seeds needs an array"),
    "no sizes": (lambda: GPUSampler("cpu", GRAPH).sample([0]), ValueError, "sizes needs to be set"),
    "sizes nan": (lambda: sampler().set_size([float("nan")]), ValueError, "sizes"),
    "sizes half": (lambda: sampler().set_size([2.5]), ValueError, "sizes"),
    "sizes none": (lambda: sampler().set_size([]), ValueError, "sizes"),
    "sizes text": (lambda: sampler().set_size("25"), TypeError, "sizes"),
    "sizes int": (lambda: sampler().set_size(25), TypeError, "sizes"),
    "sizes bool": (lambda: sampler().set_size([True]), TypeError, "sizes"),
    "sizes large": (lambda: sampler().set_size([1025]), ValueError, "sizes needs fanouts up to 1024, got 1025"),
    "batch negative": (lambda: sampler().sample([0], batch=-1), ValueError, "batch"),
    "batch float": (lambda: sampler().sample([0], batch=1.0), TypeError, "batch"),
    "batch large": (lambda: sampler().sample([0], batch=1 << 48), ValueError, "batch"),
    "seed": (lambda: GPUSampler("cpu", GRAPH, seed=-1), ValueError, "seed"),
    "seed kind": (lambda: GPUSampler("cpu", GRAPH, seed="x"), TypeError, "seed"),
    "replace": (lambda: GPUSampler("cpu", GRAPH, replace=1), TypeError, "replace"),
    "expand": (lambda: GPUSampler("cpu", GRAPH, expand="all"), ValueError, "expand"),
    "placement": (lambda: GPUSampler("cpu", GRAPH, placement="moon"), ValueError, "placement"),
    "device": (lambda: GPUSampler("tpu", GRAPH), ValueError, "device"),
    "device kind": (lambda: GPUSampler(None, GRAPH), TypeError, "device"),
    "device negative": (lambda: GPUSampler(-1, GRAPH), ValueError, "device"),
    "threads": (lambda: gglspeedup.set_num_threads(0), ValueError, "n needs at least 1, got 0"),
    "threads kind": (lambda: gglspeedup.set_num_threads(1.5), TypeError, "n needs an integer"),
    "degree": (lambda: GRAPH.degree([5]), IndexError, "n_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    call, builtin, message = BAD[case]
    with pytest.raises(GGLSpeedupError, match=message) as caught:
        call()
    assert isinstance(caught.value, builtin)
    assert "needs" in str(caught.value) and "got" in str(caught.value) and ";" in str(caught.value)


def test_bad_input_changes_nothing():
    one = sampler()
    expected = sampler().sample([0, 1, 2]).adjs[0].e_id.tolist()
    for wrong in ([0, 9], [1, 1], [0.5]):
        with pytest.raises(GGLSpeedupError):
            one.sample(wrong)
    with pytest.raises(GGLSpeedupError):
        one.set_size([1, 2000])
    assert one.sizes == (2,)
    batch = one.sample([0, 1, 2])
    assert batch.batch == 0 and batch.adjs[0].e_id.tolist() == expected and batch.n_id.tolist() == [0, 1, 2]


def test_absent_device():
    if not cuda_problem(7):
        pytest.skip("this machine has eight GPUs")
    begin = time.perf_counter()
    with pytest.raises(DeviceError, match='device="cpu" works') as caught:
        GPUSampler(7, GRAPH)
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, GGLSpeedupError)
    assert "cuda:7" in str(caught.value) and time.perf_counter() - begin < 1.0
    with pytest.raises(DeviceError):
        gglspeedup.CGPUFeature(GRAPH, "cuda:7", 0)


def test_devices():
    assert str(parse_device("cpu")) == "cpu" and parse_device("auto").is_cuda == (not cuda_problem(0))


@pytest.mark.parametrize(
    ("size", "expected"),
    [(5, 5), (1.5e3, 1500), ("0.1G", 107374182), (".1G", 107374182), ("512MB", 512 << 20), ("64K", 65536),
     ("1 GiB", 1 << 30), ("7", 7), ("0", 0), (np.int64(9), 9), ("2t", 2 << 40)],
)  # fmt: skip
def test_sizes_in_bytes(size, expected):
    assert parse_size(size, "budget") == expected


@pytest.mark.parametrize("size", ["0.1Q", "", "G", "-1G", "1e3", "nan", float("inf"), -5, None, True, [1]])
def test_sizes_that_are_none(size):
    with pytest.raises(GGLSpeedupError, match="budget"):
        parse_size(size, "budget")
