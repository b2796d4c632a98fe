"""Trains GCN with histories (GNNAutoScale) in JAX: jitted functions are given the histories, and return the new ones.

Run it from the checkout with ``python -m demo.gas_jax``; ``--help`` lists the options. It needs jax, optax and, for
METIS, pymetis. Parameters, the optimizer's state and histories are donated: a step writes them in place.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import DatasetError
from demo.gas_data import Benchmark, load_benchmark
from demo.gas_settings import DATASETS, SETTINGS
from gglspeedup import CSRGraph, GGLSpeedupError, SubgraphLoader, partition, permute
from gglspeedup.adapters.jax_histories import Histories, push_and_pull, zero_histories
from gglspeedup.adapters.jax_subgraphs import PaddedSubgraph, pad_subgraph
from gglspeedup.normalise import symmetric_normalisation

OUTSIDE = -1  # the label of nodes that are not trained on
Layers = list[dict[str, jax.Array]]

def make_layers(key: jax.Array, widths: Sequence[int]) -> Layers:
    """Return the parameters of a GCN: of each layer a matrix and a bias."""
    glorot, keys = jax.nn.initializers.glorot_uniform(), jax.random.split(key, len(widths) - 1)
    shapes = zip(keys, itertools.pairwise(widths), strict=True)
    return [{"weight": glorot(key, shape), "bias": jnp.zeros(shape[1])} for key, shape in shapes]


def compact(x: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return a matrix as float32 [N, 2 K], each row's columns, then its values: zeros need no dropout drawn."""
    counts = np.diff(x.indptr)
    rows, packed = np.repeat(np.arange(len(counts)), counts), np.zeros((len(counts), 2, counts.max()), np.float32)
    place = np.arange(x.nnz) - x.indptr[rows]
    packed[rows, 0, place], packed[rows, 1, place] = x.indices, x.data
    return packed.reshape(len(counts), -1)


def product(x: jax.Array, weight: jax.Array, key: jax.Array | None, dropout: float) -> jax.Array:
    """Return ``x @ weight``, where `x` may be compact; with a key, some of `x` is dropped first."""
    columns, values = (None, x) if x.shape[1] == len(weight) else jnp.split(x, 2, axis=1)
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - dropout, values.shape)
        values = jnp.where(kept, values / (1 - dropout), 0)
    return values @ weight if columns is None else jnp.einsum("nk,nkh->nh", values, weight[columns.astype("int32")])


def forward(
    layers: Layers, histories: Histories, batch: PaddedSubgraph, key: jax.Array | None = None, dropout: float = 0.0
) -> tuple[jax.Array, Histories]:
    """Return the scores of the batch's own nodes, and the histories with their rows of all layers but the last."""
    (source, target), targets, x = batch.edge_index, batch.size[1], batch.x
    for number, layer in enumerate(layers):
        if number > 0:
            x, histories = push_and_pull(histories, number - 1, jax.nn.relu(x), batch)
        x = product(x, layer["weight"], None if key is None else jax.random.fold_in(key, number), dropout)
        messages = x[source] * batch.edge_weight[:, None]
        x = jax.ops.segment_sum(messages, target, targets, indices_are_sorted=True) + layer["bias"]
    return x, histories


class Trainer:
    """Trains a GCN on a graph with the options of :func:`parser`; what is compiled serves all runs."""

    def __init__(self, data: Benchmark, options: argparse.Namespace) -> None:
        self.data, self.options, self.compilations = data, options, 0
        self.setting = setting = SETTINGS["gcn", data.name]
        graph, weight = symmetric_normalisation(CSRGraph(data.indptr, data.indices))
        self.perm, self.ptr = partition(graph, setting.parts[0], options.partition)
        self.graph = permute(graph, self.perm)
        self.weight, self.x = weight[self.graph.edge_ids], data.x[self.perm]
        if scipy.sparse.issparse(self.x):  # a row's products with the matrix must not outgrow the row
            few = np.diff(self.x.indptr).max() * setting.hidden < self.x.shape[1]
            self.x = compact(self.x) if few else self.x.toarray()
        (whole,) = self.batches(data.y[self.perm], ptr=[0, len(self.x)], batch_size=1)
        self.whole = pad_subgraph(whole, len(self.x))
        regularised = [dict.fromkeys(("weight", "bias"), layer < options.layers - 1) for layer in range(options.layers)]
        decay = optax.add_decayed_weights(setting.decay[0], regularised)
        clip = optax.clip_by_global_norm(1.0) if setting.clip else optax.identity()
        self.optimizer = optax.chain(clip, decay, optax.adam(setting.lr))
        self.step = jax.jit(self._step, donate_argnums=(0, 1, 2))
        self.evaluate = jax.jit(self._evaluate, donate_argnums=1)

    def batches(self, y: Any, **options: Any) -> SubgraphLoader:
        """Return a loader of the graph's parts with some labels."""
        return SubgraphLoader(self.graph, self.x, y, edge_weight=self.weight, backend="jax", device="cpu", **options)

    def _step(self, layers: Layers, state: Any, histories: Histories, batch: PaddedSubgraph, key: jax.Array) -> Any:
        """Return parameters, the optimizer's state and histories after a step."""
        self.compilations += 1  # Python runs this only when XLA is about to compile

        def loss_of(layers: Layers) -> Any:
            scores, pushed = forward(layers, histories, batch, key, self.setting.dropout)
            losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(batch.y, 0))
            return losses.mean(where=batch.mask & (batch.y != OUTSIDE)), pushed

        gradients, histories = jax.grad(loss_of, has_aux=True)(layers)
        updates, state = self.optimizer.update(gradients, state, layers)
        return optax.apply_updates(layers, updates), state, histories

    def _evaluate(self, layers: Layers, histories: Histories, batch: PaddedSubgraph, masks: jax.Array) -> Any:
        """Return the accuracies on the masked nodes, and the histories with all rows of these layers."""
        self.compilations += 1
        scores, histories = forward(layers, histories, batch)
        right = masks & (scores.argmax(1) == batch.y)
        return right.sum(1) / masks.sum(1), histories

    def train(self, run: int, bar: Any) -> float:
        """Return the test accuracy, 0 to 1, at the best validation accuracy; `run` decides what is drawn."""
        nodes, setting, best = len(self.x), self.setting, [-1.0, 0.0]
        train, *judged = (mask[self.perm] for mask in self.data.split(run))
        masks = jnp.asarray(np.pad(judged, ((0, 0), (0, self.whole.size[1] - nodes))))
        labels = np.where(train, self.data.y[self.perm], OUTSIDE)
        batches = self.batches(labels, ptr=self.ptr, batch_size=setting.parts[1], seed=run)
        hidden, key = [setting.hidden] * (self.options.layers - 1), jax.random.key(run)
        layers = make_layers(key, [self.data.x.shape[1], *hidden, self.data.num_classes])
        state, histories = self.optimizer.init(layers), zero_histories(nodes, hidden, self.options.dtype)
        _, histories = self.evaluate(layers, histories, self.whole, masks)  # fills the histories
        for epoch in range(self.options.epochs):
            for number, batch in enumerate(batches):
                if (np.asarray(batch.y) != OUTSIDE).any():
                    # In wide steps: a compilation is dearer than hundreds of batches of this size.
                    padded = pad_subgraph(batch, nodes, steps=1)
                    step_key = jax.random.fold_in(key, epoch * len(batches) + number)
                    layers, state, histories = self.step(layers, state, histories, padded, step_key)
            accuracies, histories = self.evaluate(layers, histories, self.whole, masks)
            best = max(best, accuracies.tolist(), key=lambda pair: pair[0])
            bar.set_postfix_str(f"test {100 * best[1]:.2f}", refresh=False)
            bar.update()
        return best[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    p = argparse.ArgumentParser(description="Train GCN with histories in JAX, as the paper of GNNAutoScale does.")
    p.add_argument("--dataset", choices=DATASETS, default="cora")
    p.add_argument("--root", help="folder with npz files; without, Cora, CiteSeer and PubMed are looked for elsewhere")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--epochs", type=int, help="default: the paper's")
    p.add_argument("--runs", type=int, default=1, help="trainings, each with its own seed and split (default: 1)")
    p.add_argument("--partition", choices=("metis", "contiguous", "random"), default="metis")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of histories")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    options = p.parse_args(arguments)
    options.epochs = SETTINGS["gcn", options.dataset].epochs if options.epochs is None else options.epochs
    if min(options.runs, options.epochs, options.layers) < 1:
        p.error("--runs, --epochs and --layers need numbers from 1 on")
    try:
        trainer, start = Trainer(load_benchmark(options.dataset, options.root), options), time.perf_counter()
        with tqdm(total=options.runs * options.epochs, unit="epoch", disable=options.quiet) as bar:
            accuracy = [100 * trainer.train(run, bar) for run in range(options.runs)]
    except (DatasetError, GGLSpeedupError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    milliseconds = 1e3 * (time.perf_counter() - start) / (options.runs * options.epochs)
    print(f"model            GCN, {options.layers} layers, {options.dtype} histories, on {options.dataset}")
    print(f"test accuracy    {np.mean(accuracy):.2f} ± {np.std(accuracy):.2f} % ({options.runs} runs)")
    print(f"compilations     {trainer.compilations}")
    print(f"epoch            {milliseconds:.1f} ms, with compilations and evaluation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
