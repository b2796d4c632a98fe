"""Trains GraphSAGE with JAX: gglspeedup samples, gathers and pads, a jitted function learns, optax updates.

Run it from the checkout with ``python -m demo.sage_jax``; ``--help`` lists the options. It needs jax and optax.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import NodeLoader
from gglspeedup.adapters.jax_padding import pad
from gglspeedup.loader import Batch

Layers = list[dict[str, jax.Array]]
Edges = list[jax.Array]
Sizes = tuple[tuple[int, int], ...]


def make_layers(key: jax.Array, widths: Sequence[int]) -> Layers:
    """Return the weights of GraphSAGE: of each layer a map of the neighbours' mean, one of the node, and a bias."""
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(key, (len(widths) - 1, 2))
    return [
        {"neighbours": glorot(first, shape), "itself": glorot(second, shape), "bias": jnp.zeros(shape[1])}
        for (first, second), shape in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def forward(
    layers: Layers, x: jax.Array, edges: Edges, sizes: Sizes, key: jax.Array | None = None, dropout: float = 0.0
) -> jax.Array:
    """Return the scores of the seeds: each layer's targets are the first of its sources."""
    for number, (layer, (row, col), (_, targets)) in enumerate(zip(layers, edges, sizes, strict=True)):
        if number > 0:
            x = jax.nn.relu(x)
        if dropout > 0:
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - dropout, x.shape)
            x = jnp.where(kept, x / (1 - dropout), 0)
        total = jax.ops.segment_sum(x[row], col, targets, indices_are_sorted=True)
        degree = jax.ops.segment_sum(jnp.ones_like(col, x.dtype), col, targets, indices_are_sorted=True)
        mean = total / jnp.maximum(degree, 1)[:, None]
        x = mean @ layer["neighbours"] + x[:targets] @ layer["itself"] + layer["bias"]
    return x


predict = jax.jit(forward, static_argnames=("sizes", "dropout"))


@partial(jax.jit, static_argnames=("sizes", "dropout"))
def learn(
    layers: Layers, x: jax.Array, y: jax.Array, mask: jax.Array, edges: Edges, sizes: Sizes, key: jax.Array,
    dropout: float,
) -> tuple[jax.Array, Layers]:  # fmt: skip
    """Return the mean loss of the seeds, which the mask names, and its gradients.

    XLA compiles this once for every combination of shapes and sizes.
    """

    def loss_of(layers: Layers) -> jax.Array:
        scores = forward(layers, x, edges, sizes, key, dropout)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean(where=mask)

    return jax.value_and_grad(loss_of)(layers)


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=options.fanouts,
        batch_size=options.batch_size, device=options.device, cache=options.cache, backend="jax", seed=seed,
    )  # fmt: skip
    judged = loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)

    key = jax.random.key(seed)
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    layers = make_layers(key, [data.x.shape[1], *hidden, data.num_classes])
    optimizer = optax.chain(optax.add_decayed_weights(options.weight_decay), optax.adam(options.lr))
    state = optimizer.init(layers)

    @jax.jit
    def update(layers: Layers, gradients: Layers, state: optax.OptState) -> tuple[Layers, optax.OptState]:
        updates, state = optimizer.update(gradients, state, layers)
        return optax.apply_updates(layers, updates), state

    def step(batch: Batch) -> float:
        nonlocal layers, state
        # In wide steps: the sizes of small batches vary much, and a compilation is dearer than any of these batches.
        b = pad(batch, steps=1)
        batch_key = jax.random.fold_in(key, batch.batch)
        loss, gradients = learn(layers, b.x, b.y, b.mask, b.edges, b.sizes, batch_key, options.dropout)
        layers, state = update(layers, gradients, state)
        return float(loss)

    def score(batch: Batch) -> np.ndarray:
        b = pad(batch)
        return np.asarray(predict(layers, b.x, b.edges, b.sizes))[: b.batch_size]

    return fit(data, options, seed, loader, judged, step, score)


if __name__ == "__main__":
    sys.exit(main(train, framework=f"JAX {jax.__version__}"))
