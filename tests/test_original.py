"""The script that users of the original GGLSpeedup have, with the device "cpu" as the only change, and the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gglspeedup

ROOT = Path(__file__).resolve().parent.parent


def test_original_script():
    import scipy.sparse
    import torch

    from gglspeedup.gpufeature import CGPUFeature
    from gglspeedup.gpusample import GPUSampler

    rng = np.random.default_rng(0)
    csr = scipy.sparse.random(300, 300, density=0.05, format="csr", random_state=0)
    x = rng.random((300, 32), dtype=np.float32)
    seeds = rng.permutation(300)[:20]

    rank = "cpu"
    sampler = GPUSampler(rank, csr)
    sampler.set_size([25, 10])
    feat = CGPUFeature(csr, rank, "0.1G")
    feat.from_cpu_tensor(x)
    all_node, adjs = sampler.sample(seeds)
    cur = feat[all_node]
    assert cur.shape == (len(all_node), 32) and feat.shape == (300, 32) and feat.dim() == 32
    adjs = [adj.cp2torch() for adj in adjs]

    hidden = torch.from_numpy(cur)
    for edge_index, _e_id, (_n_src, n_dst) in adjs:
        hidden = torch.zeros(n_dst, 32).index_add_(0, edge_index[1], hidden[edge_index[0]]) + hidden[:n_dst]
    assert hidden.shape == (20, 32)


@pytest.mark.slow
def test_wheel_works_outside_the_tree(tmp_path):
    """Built, installed beside, imported from elsewhere: adapters, kernels and markers have come along."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    common = ["--no-deps", "--no-build-isolation"]
    # From a copy, as the build leaves its folder in the tree, and takes old files from one that it finds.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "out", "__pycache__"))
    subprocess.run([*pip, "wheel", *common, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("gglspeedup-*-py3-none-any.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = """
import importlib.metadata, pathlib, gglspeedup
from gglspeedup import GPUSampler
here = pathlib.Path(gglspeedup.__file__).parent
assert "site" in here.parts and (here / "py.typed").exists()
assert {"sample.cu", "gather.cu", "philox.cuh"} <= {path.name for path in (here / "kernels").iterdir()}
n_id, adjs = GPUSampler("cpu", ([0, 1, 2], [1, 0]), [2]).sample([1])
assert adjs[0].cp2torch().edge_index.tolist() == [[1], [0]]
assert not list(here.parent.glob("tests")) and not list(here.parent.glob("demo"))
print(importlib.metadata.version("gglspeedup"))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**environment, "PYTHONPATH": str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == gglspeedup.__version__, result.stderr
