"""Trains GraphSAGE with PyTorch and judges every epoch: in between, and in a second process meanwhile.

Run it from the checkout with ``python -m demo.overlapped_evaluation``; ``--help`` lists the options. All trainings take
the same steps, and both evaluations see the same checkpoints; what differs is the time. It needs torch and
torch-geometric, and two cores to be of use.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import load_dataset
from demo.sage_torch import GraphSage, learn, score
from gglspeedup import CSRGraph, Multi_CGPUFeature, NodeLoader, OverlappedEvaluator, set_num_threads


class Judge:
    """Judges checkpoints. Pickled into the second process, it attaches to the features and opens the graph's file."""

    def __init__(self, loader: NodeLoader, y: np.ndarray, widths: Sequence[int]) -> None:
        self.loader, self.y, self.widths = loader, y, widths

    def __call__(self, state: dict[str, np.ndarray]) -> dict[str, float]:
        """Return the accuracy, and the sum of all scores, in which the smallest difference would show."""
        with torch.random.fork_rng():  # weights are drawn, which the training must not notice
            model = GraphSage(self.widths, 0.0)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        scores = np.concatenate([score(model, batch) for batch in self.loader])
        right = scores.argmax(1) == self.y[self.loader.dataset]
        return {"accuracy": float(right.mean()), "sum": float(scores.sum(dtype=np.float64))}


def train(
    loader: NodeLoader, widths: Sequence[int], options: argparse.Namespace, judge: Callable[[int, Any], None]
) -> float:  # fmt: skip
    """Train for all epochs, the same way each time, and hand over a checkpoint of each; return the seconds."""
    begun = time.perf_counter()
    torch.manual_seed(options.seed)
    loader.set_epoch(0)
    model = GraphSage(widths, 0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=5e-4)
    for epoch in range(options.epochs):
        for batch in loader:
            learn(model, optimizer, batch)
        judge(epoch, model.state_dict())
    return time.perf_counter() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with either evaluation, and without any, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="pubmed", help="as for demo.sage_torch")
    parser.add_argument("--root", help="as for demo.sage_torch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--fanouts", type=int, nargs="+", default=[10, 5])
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--train-nodes", type=int, default=6000, help="most nodes to train on: none that is judged")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # of each process: sums in the same order, and no more threads than cores
    set_num_threads(1)
    data = load_dataset(options.dataset, options.root)
    judged = data.val_mask | data.test_mask
    trained = np.flatnonzero(~judged & (data.y >= 0))[: options.train_nodes]
    widths = [data.x.shape[1], *[options.hidden] * (len(options.fanouts) - 1), data.num_classes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph"
        CSRGraph(data.indptr, data.indices).save(path)
        graph = CSRGraph.load(path)
        x = Multi_CGPUFeature(0, ["cpu"], 0, graph)
        x.from_cpu_tensor(data.x)
        loader = NodeLoader(
            graph, x, data.y, seeds=trained, sizes=options.fanouts, batch_size=options.batch_size, device="cpu",
            backend="torch", seed=options.seed, prefetch=0,
        )  # fmt: skip
        judge = Judge(loader.evaluation(judged), data.y, widths)
        serial: list[Any] = []

        def judge_here(epoch: int, state: dict[str, torch.Tensor]) -> None:
            serial.append((epoch, judge({name: tensor.numpy() for name, tensor in state.items()})))

        judge_here(0, GraphSage(widths, 0.0).state_dict())  # kernels are loaded, which is not measured
        serial.clear()
        alone = train(loader, widths, options, lambda epoch, state: None)
        between = train(loader, widths, options, judge_here)
        with OverlappedEvaluator(judge, threads=1) as evaluator:
            evaluator.submit(0, GraphSage(widths, 0.0).state_dict())
            evaluator.wait()  # its start is not measured either
            beside = train(loader, widths, options, evaluator.submit)
            begun = time.perf_counter()
            overlapped = evaluator.wait()
            rest = time.perf_counter() - begun
    for epoch, scores in overlapped:
        print(f"epoch {epoch:3}: accuracy {scores['accuracy']:.4f}")
    print(f"training alone                 {alone:.2f} s")
    print(f"evaluated between the epochs   {between:.2f} s")
    print(f"evaluated in a second process  {beside + rest:.2f} s, of which {rest:.2f} s after the last epoch")
    print(f"same scores, bit for bit       {serial == overlapped}")
    return 0 if serial == overlapped else 1


if __name__ == "__main__":
    sys.exit(main())
