"""Trains GraphSAGE on a graph in parts, one on each rank: sampling, features and gradients go from rank to rank.

With MPI: ``mpiexec -n 4 python demo_multi/dist_sage.py``. With PyTorch's launcher: ``torchrun --nproc-per-node 4
demo_multi/dist_sage.py --communicator torch``. Started by itself it is a single rank. It needs torch and
torch-geometric, and mpi4py with an MPI for more ranks of the first kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset, load_dataset
from demo.sage_torch import GraphSage
from demo.training import Run, assess, judged_nodes, parser
from gglspeedup import set_num_threads
from gglspeedup.distributed import (
    Communicator,
    DistFeature,
    DistNodeLoader,
    DistSampler,
    GraphPart,
    LocalCommunicator,
    MpiCommunicator,
    PartBook,
    TorchCommunicator,
    partition_to_disk,
)
from gglspeedup.threads import usable_cores

Array = npt.NDArray[Any]


def connect(options: argparse.Namespace) -> tuple[Communicator, Communicator]:
    """Return two communicators of the ranks that were started, be it one; two threads may use one each."""
    if options.communicator == "torch" and torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
        return TorchCommunicator(timeout=options.timeout), TorchCommunicator(timeout=options.timeout)
    if options.communicator == "mpi":
        try:
            return MpiCommunicator(timeout=options.timeout), MpiCommunicator(timeout=options.timeout)
        except ImportError as error:
            print(f"a single rank: {error}", file=sys.stderr)
    return LocalCommunicator(), LocalCommunicator()


def load_part(data: Dataset, communicator: Communicator, options: argparse.Namespace) -> tuple[GraphPart, Array]:
    """Return the part of this rank and the features of its nodes: of the folder, or cut from the graph in memory."""
    rank, size = communicator.rank, communicator.size
    if options.parts_folder is None:
        book = PartBook.contiguous(np.linspace(0, len(data.y), size + 1).astype(np.int64))
        part = GraphPart.of((data.indptr, data.indices), book, rank)
        return part, data.x[book.nodes_of(rank)]
    if rank == 0:  # a folder that is finished is left as it is
        graph = (data.indptr, data.indices)
        partition_to_disk(graph, options.parts_folder, size, features=data.x, progress=not options.quiet)
    communicator.gather_all(b"the folder is there")
    part = GraphPart.load(options.parts_folder, rank)
    assert part.features is not None
    return part, part.features


def average(communicator: Communicator, model: torch.nn.Module, weight: int) -> None:
    """Replace the gradients of each rank by the mean over ranks; `weight` is how many seeds its own are the sum of."""
    parameters = list(model.parameters())
    own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    vector = np.concatenate([*(gradient.numpy().ravel() for gradient in own), [weight]]).astype(np.float32)
    # Each rank adds up one piece of the vectors, and tells the others: all get the same bits.
    size = communicator.size
    pieces = np.zeros((size, -(-len(vector) // size)), np.float32)
    pieces.ravel()[: len(vector)] = vector
    mine = communicator.exchange(pieces, [1] * size, [1] * size).sum(0)
    total = communicator.exchange(np.tile(mine, (size, 1)), [1] * size, [1] * size).ravel()[: len(vector)]
    begin = 0
    for p in parameters:
        mean = total[begin : begin + p.numel()] / total[-1]
        p.grad = torch.from_numpy(mean.reshape(p.shape))
        begin += p.numel()


class Rank:
    """What one rank trains with.

    Parameters
    ----------
    data : Dataset
        Of which the labels and the split are used by every rank.
    communicators : tuple of two Communicator
        Of all ranks: one that batches are made with, in the background, and one for the training loop.
    options : argparse.Namespace
        Of the command line.
    seed : int
        Of the order in which seeds are visited.
    """

    def __init__(
        self, data: Dataset, communicators: tuple[Communicator, Communicator], options: argparse.Namespace, seed: int
    ) -> None:
        self.data = data
        background, self.communicator = communicators
        part, rows = load_part(data, self.communicator, options)
        self.sampler = DistSampler(part, background, options.fanouts)
        nodes, judged = np.flatnonzero(data.train_mask), judged_nodes(data)
        self.features = DistFeature(
            part, background, rows, cache=options.cache, sampler=self.sampler, seeds=self.share(nodes),
            batch_size=options.batch_size,
        )  # fmt: skip
        matrices = self.sampler, self.features, data.y
        self.training = DistNodeLoader(
            *matrices, seeds=nodes, deal_out=True, batch_size=options.batch_size, seed=seed, backend="torch"
        )
        self.evaluation = DistNodeLoader(
            *matrices, seeds=self.share(judged), sizes=[-1] * len(options.fanouts), shuffle=False, backend="torch",
            batch_size=options.eval_batch_size,
        )  # fmt: skip

    def share(self, nodes: Array) -> Array:
        """Return every so many-th node: those of this rank."""
        return nodes[self.communicator.rank :: self.communicator.size]

    def learn(self, model: GraphSage, optimizer: torch.optim.Optimizer) -> float:
        """Train for an epoch; return the mean loss."""
        losses = np.zeros(2)
        model.train()
        for batch in self.training:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(batch.x, batch.adjs), batch.y, reduction="sum")
            loss.backward()
            losses += float(loss.detach()), batch.batch_size
            average(self.communicator, model, batch.batch_size)
            optimizer.step()
        everyone = np.frombuffer(b"".join(self.communicator.gather_all(losses.tobytes()))).reshape(-1, 2).sum(0)
        return float(everyone[0] / everyone[1])

    @torch.no_grad()
    def judge(self, model: GraphSage) -> Array:
        """Return the scores of the nodes to judge by, with all their neighbours, on every rank."""
        model.eval()
        found = [model(batch.x, batch.adjs).numpy() for batch in self.evaluation if batch.batch_size]
        mine = np.concatenate([np.zeros((0, self.data.num_classes), np.float32), *found])
        scores = np.empty((len(judged_nodes(self.data)), self.data.num_classes), np.float32)
        for rank, message in enumerate(self.communicator.gather_all(mine.tobytes())):
            theirs = np.frombuffer(message, np.float32).reshape(-1, self.data.num_classes)
            scores[rank :: self.communicator.size] = theirs
        return scores


def train(
    data: Dataset, communicators: tuple[Communicator, Communicator], options: argparse.Namespace, seed: int
) -> tuple[Run, Rank]:
    """Train once; `seed` decides weights, dropout, and the order of the seeds."""
    rank = Rank(data, communicators, options, seed)
    torch.manual_seed(seed)
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    model = GraphSage([data.x.shape[1], *hidden, data.num_classes], options.dropout)  # the same on all ranks
    optimizer = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.weight_decay)
    communicator = rank.communicator
    torch.manual_seed(seed * communicator.size + communicator.rank)  # each has its own dropout
    run = Run()
    for _ in range(options.epochs):
        start = time.perf_counter()
        loss = rank.learn(model, optimizer)
        run.epoch_seconds.append(time.perf_counter() - start)
        run.history.append(assess(data, loss, rank.judge(model)))
    run.hit_rate = rank.features.hit_rate
    return run, rank


def main() -> int:
    """Run the command line; return the exit status."""
    command_line = parser()
    command_line.description = "Train GraphSAGE on a graph in parts, one on each rank."
    command_line.add_argument("--parts-folder", help="folder of the graph in parts, made if it is not there")
    command_line.add_argument("--communicator", choices=("mpi", "torch"), default="mpi")
    command_line.add_argument("--timeout", type=float, default=120.0, help="seconds that a rank waits for another")
    command_line.set_defaults(cache="0")
    options = command_line.parse_args()
    communicators = connect(options)
    communicator = communicators[0]
    # The ranks of one machine share its cores.
    threads = max(1, usable_cores() // communicator.size)
    torch.set_num_threads(threads)
    set_num_threads(threads)
    data = load_dataset(options.dataset, options.root)
    runs = []
    for seed in range(options.seeds):
        run, rank = train(data, communicators, options, seed)
        runs.append(run)
    if communicator.rank == 0:
        accuracy = [run.test_accuracy for run in runs]
        moved = {"sampling": rank.sampler.traffic(), "features": rank.features.traffic()}
        print(f"graph            {data.name}, from {data.source}: {len(data.y)} nodes, {len(data.indices)} edges")
        print(f"ranks            {communicator.size}, {type(communicator).__name__}")
        print(f"test accuracy    {np.mean(accuracy):.4f} ± {np.std(accuracy):.4f} ({len(runs)} seeds)")
        print(f"training epoch   {np.median([s for run in runs for s in run.epoch_seconds]):.3g} s (median)")
        print(f"rows at hand     {np.mean([run.hit_rate for run in runs]):.3f} of those asked for, own or cached")
        for what, traffic in moved.items():
            received = sum(traffic[kind]["received"] for kind in ("counts", "ids", "rows"))
            print(f"{what:<16} {received / 1e6:.3f} MB received by rank 0, last training")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
