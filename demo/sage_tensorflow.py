"""Trains GraphSAGE with TensorFlow: gglspeedup samples and gathers, Keras layers learn.

Run it from the checkout with ``python -m demo.sage_tensorflow``; ``--help`` lists the options. It needs tensorflow,
which brings Keras.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, on import: errors, no notes on instruction sets
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's keras.json says
import keras
import tensorflow as tf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.training import Run, fit, judged_nodes, main
from gglspeedup import NodeLoader
from gglspeedup.loader import Batch

Hops = list[tuple[tf.Tensor, tf.Tensor]]


def hops_of(batch: Batch) -> Hops:
    """Return each hop's edges and number of targets, the latter as a tensor, lest each value is traced anew."""
    return [(adj.edge_index, tf.constant(adj.size[1])) for adj in batch.adjs]


class SageLayer(keras.layers.Layer):
    """One GraphSAGE layer: a linear map of the neighbours' mean, plus one of the node itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.neighbours = keras.layers.Dense(width)
        self.itself = keras.layers.Dense(width, use_bias=False)

    def call(self, x: tf.Tensor, edge_index: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Return the targets' new features: targets are the first of the sources."""
        mean = tf.math.unsorted_segment_mean(tf.gather(x, edge_index[0]), edge_index[1], targets)
        return self.neighbours(mean) + self.itself(x[:targets])


class GraphSage(keras.Model):
    """GraphSAGE over sampled hops, mean aggregation.

    Parameters
    ----------
    widths : sequence of int
        Width of each hidden layer, and the number of classes.
    dropout : float
        Fraction dropped before each layer while training.
    """

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.sage = [SageLayer(width) for width in widths]
        self.dropout = keras.layers.Dropout(dropout)

    def call(self, x: tf.Tensor, hops: Hops, training: bool = False) -> tf.Tensor:
        """Return the scores of the seeds."""
        for layer, hop in zip(self.sage, hops, strict=True):
            if layer is not self.sage[0]:
                x = tf.nn.relu(x)
            x = layer(self.dropout(x, training=training), *hop)
        return x


def build(classes: int, options: argparse.Namespace) -> tuple[GraphSage, keras.optimizers.Optimizer]:
    """Return a model with its optimizer; the weights will be of Keras's random state."""
    hidden = [options.hidden] * (len(options.fanouts) - 1)
    return GraphSage([*hidden, classes], options.dropout), keras.optimizers.Adam(options.lr)


def gradients_of(
    model: GraphSage, weight_decay: float, x: tf.Tensor, y: tf.Tensor, hops: Hops
) -> tuple[tf.Tensor, list[tf.Tensor]]:  # fmt: skip
    """Return the mean loss of a batch's seeds, and its gradient with that of the L2 term, a tensor each weight."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, hops, training=True)))
    weights = model.trainable_variables
    gradients = tape.gradient(loss, weights)
    # Keras's own weight decay is decoupled from the gradient; this is the usual L2 term.
    return loss, [g + weight_decay * w for g, w in zip(gradients, weights, strict=True)]


def scorer(model: GraphSage) -> Callable[[Batch], np.ndarray]:
    """Return a function that returns the scores of a batch's seeds."""

    @tf.function(reduce_retracing=True)  # traced for the first shapes, then once for all others
    def predict(x: tf.Tensor, hops: Hops) -> tf.Tensor:
        return model(x, hops, training=False)

    return lambda batch: predict(batch.x, hops_of(batch)).numpy()


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once; `seed` decides weights, dropout, the order of the seeds and the draws of neighbours."""
    keras.utils.set_random_seed(seed)
    loader = NodeLoader(
        (data.indptr, data.indices), data.x, data.y, seeds=data.train_mask, sizes=options.fanouts,
        batch_size=options.batch_size, device=options.device, cache=options.cache, backend="tensorflow", seed=seed,
    )  # fmt: skip
    judged = loader.evaluation(judged_nodes(data), batch_size=options.eval_batch_size)
    model, optimizer = build(data.num_classes, options)

    @tf.function(reduce_retracing=True)
    def update(x: tf.Tensor, y: tf.Tensor, hops: Hops) -> tf.Tensor:
        loss, gradients = gradients_of(model, options.weight_decay, x, y, hops)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    def step(batch: Batch) -> float:
        return float(update(batch.x, batch.y, hops_of(batch)))

    with tf.device(f"/GPU:{loader.device.index}" if loader.device.is_cuda else "/CPU:0"):
        return fit(data, options, seed, loader, judged, step, scorer(model))


if __name__ == "__main__":
    sys.exit(main(train, framework=f"TensorFlow {tf.__version__}, Keras {keras.__version__}"))
