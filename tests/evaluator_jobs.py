"""What the evaluators of test_evaluator.py do, in a module that a spawned process imports quickly."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import numpy as np

from gglspeedup import GPUSampler, Multi_CGPUFeature, NodeLoader
from gglspeedup.shared_array import SharedArray
from gglspeedup.threads import get_num_threads


def total(state: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(array.sum()) for name, array in state.items()}


def echo(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for array in state.values():
        assert array.flags.writeable
    return state


def told(state: dict[str, np.ndarray]) -> Any:
    """Do what the value of `do` says: one of 1 to 5, or sleep so many milliseconds."""
    do = int(state["do"])
    if do == 1:
        raise ZeroDivisionError("as told")
    if do == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if do == 3:
        return lambda: None  # which cannot be pickled
    if do == 4:
        sys.exit(5)
    if do == 5:
        return OnlyThere()
    time.sleep(do / 1000)
    return do


def announced(state: dict[str, np.ndarray]) -> Any:
    """Print the process, and do as told."""
    print(os.getpid(), flush=True)
    return told(state)


def _refuse() -> None:
    raise ImportError("only there")


class OnlyThere:
    """What can be pickled and not unpickled."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def surroundings(state: dict[str, np.ndarray]) -> tuple[Any, ...]:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return (os.getpid(), get_num_threads(), *map(os.environ.get, names))


def bad_setup() -> Any:
    raise ValueError("no data here")


def slow_setup() -> Any:
    time.sleep(3600)


class Shift:
    """Adds the values of shared memory, of which the parent sees what is written."""

    def __init__(self, shared: SharedArray) -> None:
        self.shared = shared

    def __call__(self, state: dict[str, np.ndarray]) -> float:
        self.shared.array[0] += 1
        return float(self.shared.array.sum() + state["x"].sum())


class Linear:
    """The mean over a node's sampled neighbourhood times the weight, for every node of a loader."""

    def __init__(self, loader: NodeLoader) -> None:
        self.loader = loader

    def __call__(self, state: dict[str, np.ndarray]) -> np.ndarray:
        self.loader.set_epoch(0)
        return np.concatenate([mean(batch) @ state["weight"] for batch in self.loader])


def mean(batch: Any) -> np.ndarray:
    source, target = batch.adjs[0].edge_index
    found = batch.x[: batch.batch_size].copy()
    np.add.at(found, target, batch.x[source])
    return found


def loader_of(sampler: GPUSampler, x: Multi_CGPUFeature) -> NodeLoader:
    return NodeLoader(sampler, x, seeds=np.arange(40), sizes=[4], batch_size=16, shuffle=False)


def linear(sampler: Any, x: Multi_CGPUFeature) -> Linear:
    return Linear(loader_of(sampler.sampler(0), x))
