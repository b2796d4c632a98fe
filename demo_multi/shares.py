"""What the demos in several processes share: a graph in shared memory, a share of its seeds each, gradients compared.

Nothing here knows a framework: what ranks tell each other goes through ``gather(array)``, which each demo makes of its
framework's means. It takes a float32 array, of the same shape in every rank, and returns them all, [ranks, ...].
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from demo import training
from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes
from gglspeedup import DeviceError, Multi_CGPUFeature, MultiGPUSampler, NodeLoader, set_num_threads
from gglspeedup.device import DeviceLike
from gglspeedup.epochs import device_for
from gglspeedup.loader import Batch
from gglspeedup.threads import usable_cores

Array = npt.NDArray[Any]
Gather = Callable[[Array], Array]

LARGEST_DEVIATION = 1e-5  # of averaged gradients, relative to the largest of them


class RanksDifferError(RuntimeError):
    """Gradients or weights of the ranks are not what averaging makes them."""


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line: a single process's, and the number of processes."""
    p = training.parser()
    p.description = "Train GraphSAGE in several processes that share one graph; batch sizes are those of a process."
    p.add_argument("--processes", type=_several, default=2, help="processes that train together (default: 2)")
    p.add_argument("--seed", type=int, default=0, help="the seed of the first training (default: 0)")
    return p


def _several(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is not at least 2")
    return number


def devices(options: argparse.Namespace, backend: str) -> list[DeviceLike]:
    """Return a device for each process: a GPU each, if there are as many that the framework can use, else the CPU."""
    if options.device != "auto":
        return [options.device] * options.processes
    try:
        return [device_for(backend, index).index for index in range(options.processes)]
    except DeviceError:
        return ["cpu"] * options.processes


@dataclass(frozen=True, eq=False)
class Job:
    """What every process is given; pickled into it, it is small and handles of shared memory.

    Attributes
    ----------
    sampler : MultiGPUSampler
        The graph.
    features : Multi_CGPUFeature
        The features.
    data : Dataset
        The classes and the split, without graph and features.
    options : argparse.Namespace
        Of :func:`command_line`.
    seed : int
        Of the order of the seeds and the draws of neighbours; weights and dropout are of :meth:`rank_seed`.
    backend : str
        The framework.
    """

    sampler: MultiGPUSampler
    features: Multi_CGPUFeature
    data: Dataset
    options: argparse.Namespace
    seed: int
    backend: str

    @classmethod
    def of(cls, data: Dataset, options: argparse.Namespace, seed: int, backend: str) -> Job:
        """Put graph and features where all processes can read them; `seed` counts the trainings."""
        where, seed = devices(options, backend), options.seed + seed
        sampler = MultiGPUSampler(where[0], (data.indptr, data.indices), where, seed=seed)
        features = Multi_CGPUFeature(0, where, options.cache, sampler.graph)
        features.from_cpu_tensor(data.x)
        nothing = np.empty(0, np.int64)
        rest = replace(data, indptr=nothing, indices=nothing, x=nothing)
        return cls(sampler, features, rest, options, seed, backend)

    def rank_seed(self, rank: int) -> int:
        """Return a seed of a process's own, lest all drop the same; the weights are those of the first."""
        return self.seed * self.options.processes + rank

    def loaders(self, rank: int) -> tuple[NodeLoader, NodeLoader]:
        """Return the loaders over a process's shares of the training nodes and of those to judge by."""
        options, data = self.options, self.data
        set_num_threads(max(1, usable_cores() // options.processes))
        loader = NodeLoader(
            self.sampler.sampler(rank), self.features.on(rank), data.y, seeds=data.train_mask, sizes=options.fanouts,
            batch_size=options.batch_size, backend=self.backend, seed=self.seed, rank=rank,
            world_size=options.processes,
        )  # fmt: skip
        return loader, loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)


def fit_share(
    job: Job, rank: int, loaders: tuple[NodeLoader, NodeLoader],
    first_step: Callable[[Batch], tuple[float, Array, Array]], step: Callable[[Batch], float],
    score: Callable[[Batch], Array], weights: Callable[[], Array], gather: Gather,
) -> Run:  # fmt: skip
    """Train a process's share for all epochs, as :func:`demo.training.fit` does, and judge the model together.

    Every rank's batch has as many seeds, so that the mean of the ranks' means is the mean over all their seeds.

    Parameters
    ----------
    job, rank
        What to train, and which process this is.
    loaders : pair of NodeLoader
        Of :meth:`Job.loaders`.
    first_step : callable
        As `step`, and returns the gradients of this rank's seeds alone and those averaged over the ranks, too.
    step : callable
        Trains on a batch, with gradients averaged over the ranks, and returns the mean loss of its own seeds.
    score : callable
        Returns the scores of a batch's seeds, float32 [B, C].
    weights : callable
        Returns all weights of the model, float32 [P].
    gather : callable
        See the module.

    Raises
    ------
    RanksDifferError
        The first gradients are not averages, or weights differ in the end.
    """
    told = False

    def step_together(batch: Batch) -> float:
        nonlocal told
        if told:
            loss = step(batch)
        else:
            loss, own, averaged = first_step(batch)
            tell(rank, "gradients", compare_gradients(gather(own), gather(averaged)))
            told = True
        return float(gather(np.array([loss], np.float32)).mean())

    def score_together(batch: Batch) -> Array:
        # Ranks take the nodes in turns.
        scores = gather(score(batch)).swapaxes(0, 1)
        return scores.reshape(-1, scores.shape[-1])

    tqdm.set_lock(threading.RLock())  # its own is the system's, and stays behind when a process is killed
    options = argparse.Namespace(**{**vars(job.options), "quiet": job.options.quiet or rank > 0})
    loader, judged = loaders
    run = fit(job.data, options, job.seed, loader, judged, step_together, score_together)
    every = gather(weights())
    if not (every == every[0]).all():
        raise RanksDifferError(f"weights differ by up to {np.ptp(every, axis=0).max()} between ranks in the end")
    tell(rank, "weights", f"{every.shape[1]}, the same bits in all ranks in the end")
    return run


def tell(rank: int, label: str, text: str) -> None:
    """Print a line of the report, once for all processes."""
    if rank == 0:
        print(f"{label:<16} {text}", flush=True)


def flat(arrays: Iterable[Array]) -> Array:
    """Return the values of several arrays as one, float32 [P].

    Examples
    --------
    >>> flat([np.ones((2, 1)), np.zeros(1)]).tolist()
    [1.0, 1.0, 0.0]
    """
    return np.concatenate([np.ravel(array) for array in arrays]).astype(np.float32)


def compare_gradients(own: Array, averaged: Array) -> str:
    """Return how far gradients are apart before and after averaging, and from their mean.

    Parameters
    ----------
    own, averaged : float array [ranks, P]
        Each rank's, before and after.

    Raises
    ------
    RanksDifferError
        The averaged gradients differ between the ranks or from the mean by more than LARGEST_DEVIATION.

    Examples
    --------
    >>> compare_gradients(np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[2.0, 2.0], [2.0, 2.0]]))
    'apart by 2, after averaging by 0, and 0 from their mean (relative to its largest)'
    """
    mean = own.mean(0, dtype=np.float64)
    largest = max(float(np.abs(mean).max()), np.finfo(np.float32).tiny)
    before, after = (float(np.ptp(values, axis=0).max()) / largest for values in (own, averaged))
    off = float(np.abs(averaged - mean).max()) / largest
    found = f"apart by {before:.2g}, after averaging by {after:.2g}, and {off:.2g} from their mean"
    if not (after <= LARGEST_DEVIATION and off <= LARGEST_DEVIATION):  # nor are they if one is not a number
        raise RanksDifferError(f"gradients are {found} (relative to its largest), beyond {LARGEST_DEVIATION}")
    return f"{found} (relative to its largest)"


def distinct(where: Sequence[Any]) -> bool:
    """Return whether each process has a device of its own, as NCCL asks for."""
    return len(set(where)) == len(where)
