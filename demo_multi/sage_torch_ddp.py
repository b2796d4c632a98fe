"""Trains GraphSAGE with PyTorch in several processes: torch.multiprocessing.spawn, DistributedDataParallel.

Run it from the checkout with ``python -m demo_multi.sage_torch_ddp``; ``--help`` lists the options. It needs torch and
torch-geometric. Processes talk through NCCL if each has a GPU of its own, else through Gloo.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.sage_torch import build, learn, loss_of, score
from demo.training import Run, main
from demo_multi import processes, shares
from demo_multi.shares import Job
from gglspeedup import NodeLoader
from gglspeedup.loader import Batch


def start(target: Callable[..., None], arguments: tuple[Any, ...], count: int) -> processes.Started:
    """Start processes as torch does."""
    context = torch.multiprocessing.spawn(target, arguments, count, join=False)
    assert context is not None
    return context


def work(rank: int, job: Job, port: int) -> Run:
    """Train a process's share."""
    loaders = job.loaders(rank)
    device = torch.device(str(loaders[0].device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    engine = "nccl" if device.type == "cuda" and shares.distinct(job.sampler.devices) else "gloo"
    store = distributed.TCPStore("127.0.0.1", port)
    distributed.init_process_group(engine, store=store, rank=rank, world_size=job.options.processes)
    run = train_share(rank, job, loaders, device)
    # Only once the model is gone, and no thread of the group has anything left to do: the end of a model that was the
    # last to hold its group waits for these threads, and they may wait for the interpreter to let go of a tensor.
    distributed.barrier()
    distributed.destroy_process_group()
    return run


def train_share(rank: int, job: Job, loaders: tuple[NodeLoader, NodeLoader], device: torch.device) -> Run:
    """Train a process's share, as a member of a process group."""
    torch.manual_seed(job.rank_seed(rank))
    model, optimizer = build(job.features.dim(), job.data.num_classes, job.options, str(device))
    together = DistributedDataParallel(model)  # takes the weights of rank 0
    weights = list(model.parameters())

    def first_step(batch: Batch) -> tuple[float, np.ndarray, np.ndarray]:
        together.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the step will drop the same
            own = torch.autograd.grad(loss_of(model, batch), weights)
        loss = learn(together, optimizer, batch)
        return loss, values(own), values([weight.grad for weight in weights])

    def gather(array: np.ndarray) -> np.ndarray:
        mine = torch.from_numpy(array).to(device)
        every = [torch.empty_like(mine) for _ in range(job.options.processes)]
        distributed.all_gather(every, mine)
        return torch.stack(every).cpu().numpy()

    step = partial(learn, together, optimizer)
    return shares.fit_share(
        job, rank, loaders, first_step, step, partial(score, model), lambda: values(weights), gather
    )  # fmt: skip


def values(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the values of tensors, float32 [P]."""
    return shares.flat(tensor.detach().cpu().numpy() for tensor in tensors)


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once, in several processes; `seed` is added to the option."""
    job = Job.of(data, options, seed, "torch")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on any free port
    return processes.run(start, work, (job, store.port), options.processes)[0]


if __name__ == "__main__":
    framework = f"PyTorch {torch.__version__}, DistributedDataParallel"
    sys.exit(main(train, framework=framework, command_line=shares.command_line()))
