"""What tests share: the real graphs, and the rule for what may be missing where."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import gglspeedup

# Started in the background, a shell has Ctrl-C ignored, and by all that the tests start in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A process a core runs tests, each of which may start more: OpenMP's threads would spin while they wait for a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, which takes it a third of a second to go through."""
    gc.collect()
    gc.freeze()


def missing(what: str) -> None:
    """Skip for want of something optional; in CI, where all of it must be there, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is missing, and CI must have it", pytrace=False)
    pytest.skip(f"{what} is missing")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real graphs."""
    if not (SHARED_DATA / "cora.npz").exists():
        missing("the folder of real graphs (../shared/data)")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _default_threads():
    """Leave no thread setting behind."""
    yield
    gglspeedup.set_num_threads(1 << 20)


def named_memory() -> set[Path]:
    """Shared memory that has a name, as Python's SharedMemory and ours would; of other tests' there may be more."""
    return {path for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "gglspeedup"))}


def random_graph(rng: np.random.Generator, num_nodes: int, most: int, hub: int = 0) -> gglspeedup.CSRGraph:
    """A graph with empty rows, self-loops, parallel edges and, if asked for, a hub at node 0."""
    degree = rng.integers(0, most + 1, num_nodes)
    if hub and num_nodes:
        degree[0] = hub
    indptr = np.concatenate([[0], np.cumsum(degree)])
    return gglspeedup.CSRGraph(indptr, rng.integers(0, max(num_nodes, 1), indptr[-1]))
