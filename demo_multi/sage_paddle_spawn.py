"""Trains GraphSAGE with Paddle in several processes: paddle.distributed.spawn, DataParallel.

Run it from the checkout with ``python -m demo_multi.sage_paddle_spawn``; ``--help`` lists the options. It needs
paddlepaddle. Processes talk through NCCL if they have GPUs, one each, else through Gloo.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module
os.environ.setdefault("GLOG_minloglevel", "1")  # read once, on import: warnings, no notes on connections

from demo.datasets import Dataset
from demo.sage_paddle import build, learn, loss_of, paddle, score
from demo.training import Run, main
from demo_multi import processes, shares
from demo_multi.shares import Job
from gglspeedup.loader import Batch


def start(
    on_gpus: bool, target: Callable[..., None], arguments: tuple[Any, ...], count: int
) -> processes.Started:  # fmt: skip
    """Start processes as Paddle does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your model will be trained under CPUONLY mode", category=UserWarning)
        return paddle.distributed.spawn(
            call_with_rank, (target, *arguments), count, join=False, backend="nccl" if on_gpus else "gloo"
        )  # fmt: skip


def call_with_rank(target: Callable[..., None], *arguments: Any) -> None:
    """Call a function with the rank of this process, which Paddle leaves to the function to find out."""
    target(paddle.distributed.get_rank(), *arguments)


def work(rank: int, job: Job) -> Run:
    """Train a process's share."""
    loaders = job.loaders(rank)
    device = loaders[0].device
    paddle.set_device(f"gpu:{device.index}" if device.is_cuda else "cpu")
    paddle.distributed.init_parallel_env()

    paddle.seed(job.rank_seed(rank))
    model, optimizer = build(job.features.dim(), job.data.num_classes, job.options)
    together = paddle.DataParallel(model)  # takes the weights of rank 0
    weights = model.parameters()

    def first_step(batch: Batch) -> tuple[float, np.ndarray, np.ndarray]:
        together.train()
        state = paddle.get_rng_state()
        own = paddle.grad(loss_of(model, batch), weights)
        paddle.set_rng_state(state)  # the step will drop the same
        loss = learn(together, optimizer, batch)
        return loss, values(own), values([weight.grad for weight in weights])

    def gather(array: np.ndarray) -> np.ndarray:
        every: list[paddle.Tensor] = []
        paddle.distributed.all_gather(every, paddle.to_tensor(array))
        return np.stack([tensor.numpy() for tensor in every])

    step = partial(learn, together, optimizer)
    return shares.fit_share(
        job, rank, loaders, first_step, step, partial(score, model), lambda: values(weights), gather
    )  # fmt: skip


def values(tensors: Sequence[paddle.Tensor]) -> np.ndarray:
    """Return the values of tensors, float32 [P]."""
    return shares.flat(tensor.numpy() for tensor in tensors)


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once, in several processes; `seed` is added to the option."""
    job = Job.of(data, options, seed, "paddle")
    on_gpus = job.sampler.devices[0].is_cuda
    return processes.run(partial(start, on_gpus), work, (job,), options.processes)[0]


if __name__ == "__main__":
    framework = f"Paddle {paddle.__version__}, DataParallel"
    sys.exit(main(train, framework=framework, command_line=shares.command_line()))
