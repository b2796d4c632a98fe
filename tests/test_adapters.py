"""Adjacencies in every framework, each in a process of its own: same values, same memory, own life."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import missing

METHODS = {"torch": "cp2torch", "tensorflow": "cp2tf", "paddle": "cp2pd", "tensorlayerx": "cp2tlx", "jax": "cp2jax"}

CODE = """
import gc, sys, warnings
import numpy as np
framework, method = sys.argv[1:]
from gglspeedup import CSRGraph, CGPUFeature, GPUSampler
assert framework not in sys.modules
rng = np.random.default_rng(0)
indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 500))])
graph = CSRGraph(indptr, rng.integers(0, 500, indptr[-1]))
sampler = GPUSampler("cpu", graph, [3, 4])
if framework == "jax":
    import jax
    from gglspeedup.adjs import Adj
    narrow = sampler.sample(np.arange(20), batch=0).adjs[0].cp2jax()
    assert narrow.edge_index.dtype == "int32"
    big = Adj(np.zeros((2, 1), np.int64), np.array([1 << 40]), (1, 1))
    try:
        big.cp2jax()
    except ValueError as error:
        assert "jax_enable_x64" in str(error)
    else:
        raise AssertionError("a value was cut")
    jax.config.update("jax_enable_x64", True)
for seeds in ([], np.arange(1), np.arange(37)):
    batch = sampler.sample(seeds, batch=1)
    for adj in batch.adjs:
        converted = getattr(adj, method)()
        assert framework in sys.modules and converted.size == adj.size
        for ours, theirs in ((adj.edge_index, converted.edge_index), (adj.e_id, converted.e_id)):
            assert type(theirs).__module__.split(".")[0] != "numpy"
            assert "int64" in str(theirs.dtype) and tuple(theirs.shape) == ours.shape
            np.testing.assert_array_equal(np.asarray(theirs), ours)
        np.testing.assert_array_equal(np.asarray(converted.row), adj.row)
        np.testing.assert_array_equal(np.asarray(converted.col), adj.col)
        if adj.e_id.size:  # the same memory
            adj.e_id[0] = 12345
            assert int(np.asarray(converted.e_id)[0]) == 12345
# A tensor outlives the sampler and its buffers, which others then use.
batch = sampler.sample(np.arange(37), batch=1)
expected = batch.adjs[0].edge_index.copy()
kept = getattr(batch.adjs[0], method)().edge_index
del batch, converted, adj, ours, theirs
gc.collect()
for number in range(20):
    sampler.sample(np.arange(37), batch=number)
del sampler
gc.collect()
np.testing.assert_array_equal(np.asarray(kept), expected)
if framework == "torch":
    moved = sampler2 = GPUSampler("cpu", graph, [2]).sample([1]).adjs[0].cp2torch().to("cpu")
    assert moved.edge_index.device.type == "cpu" and moved.size == sampler2.size
# Arrays that a strict consumer could not take: strided, read-only, misaligned.
from importlib import import_module
to_framework = import_module("gglspeedup.adapters." + framework).to_framework
raw = np.arange(64, dtype=np.int64)
readonly = raw.copy(); readonly.flags.writeable = False
for odd in (raw[1:], raw[::3], readonly):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, on a read-only array
        np.testing.assert_array_equal(np.asarray(to_framework(odd)), odd)
print("passed")
"""


@pytest.mark.parametrize("framework", METHODS)
def test_conversion(framework):
    if importlib.util.find_spec(framework) is None:
        missing(framework)
    environment = {**os.environ, "TL_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CODE, framework, METHODS[framework]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split()[-1:] == ["passed"] and result.returncode == 0, result.stderr[-3000:]


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
