"""Trains GraphSAGE with TensorFlow in several processes: MultiWorkerMirroredStrategy, a training loop of its own.

Run it from the checkout with ``python -m demo_multi.sage_tensorflow_workers``; ``--help`` lists the options. It needs
tensorflow. Processes work on the CPU and talk over loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # when run as a file, not as a module

from demo.datasets import Dataset
from demo.sage_tensorflow import Hops, build, gradients_of, hops_of, keras, scorer, tf
from demo.training import Run, main
from demo_multi import processes, shares
from demo_multi.shares import Job
from gglspeedup import DeviceError
from gglspeedup.loader import Batch


def join_cluster(rank: int, ports: list[int]) -> tf.distribute.MultiWorkerMirroredStrategy:
    """Return this process's strategy, once all processes are there."""
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]}, "task": {"type": "worker", "index": rank}}
    )
    os.environ["TF_GRPC_REUSE_PORT"] = "1"  # as the first process holds them, see free_ports
    tf.config.set_visible_devices([], "GPU")
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def work(rank: int, job: Job, ports: list[int]) -> Run:
    """Train a process's share."""
    options, loaders = job.options, job.loaders(rank)
    strategy = join_cluster(rank, ports)
    keras.utils.set_random_seed(job.rank_seed(rank))
    with strategy.scope():  # variables take the values of rank 0
        model, optimizer = build(job.data.num_classes, options)

    # One trace for all shapes: where one process traced again, and another did not, they would wait for ever.
    hop = (tf.TensorSpec([2, None], tf.int64), tf.TensorSpec([], tf.int32))
    x = tf.TensorSpec([None, job.features.dim()], tf.float32)
    y = tf.TensorSpec([None], tf.int64)

    @tf.function(input_signature=[x, y, [hop] * len(options.fanouts)])
    def update(x: tf.Tensor, y: tf.Tensor, hops: Hops) -> tuple[tf.Tensor, list[tf.Tensor]]:
        return strategy.run(update_replica, (x, y, hops))

    def update_replica(x: tf.Tensor, y: tf.Tensor, hops: Hops) -> tuple[tf.Tensor, list[tf.Tensor]]:
        loss, gradients = gradients_of(model, options.weight_decay, x, y, hops)
        # Keras's optimizers add up the gradients of all replicas.
        optimizer.apply([gradient / options.processes for gradient in gradients], model.trainable_variables)
        return loss, gradients

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def gather_flat(values: tf.Tensor) -> tf.Tensor:
        return strategy.run(gather_replica, (values,))

    def gather_replica(values: tf.Tensor) -> tf.Tensor:
        # The identity is on the replica's device, where the gathered values are to go; an argument is on none.
        return tf.distribute.get_replica_context().all_gather(tf.identity(values), axis=0)

    def gather(array: np.ndarray) -> np.ndarray:
        return gather_flat(array.ravel()).numpy().reshape(-1, *array.shape)

    def step(batch: Batch) -> float:
        return float(update(batch.x, batch.y, hops_of(batch))[0])

    def first_step(batch: Batch) -> tuple[float, np.ndarray, np.ndarray]:
        loss, own = update(batch.x, batch.y, hops_of(batch))
        # What the optimizer made of them itself: Adam's first moment starts as this fraction of the gradient.
        moments = [variable for variable in optimizer.variables if variable.path.endswith("momentum")]
        averaged = shares.flat(moment.numpy() for moment in moments) / np.float32(1 - optimizer.beta_1)
        return float(loss), shares.flat(gradient.numpy() for gradient in own), averaged

    def weights() -> np.ndarray:
        return shares.flat(weight.numpy() for weight in model.trainable_variables)

    return shares.fit_share(job, rank, loaders, first_step, step, scorer(model), weights, gather)


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Hold ports that nobody else can take meanwhile, but processes of this user that reuse ports, too."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in held]


def train(data: Dataset, options: argparse.Namespace, seed: int) -> Run:
    """Train once, in several processes; `seed` is added to the option."""
    if options.device not in ("auto", "cpu"):
        raise DeviceError(f"this demo trains on the CPU, not on {options.device}; leave out --device")
    options = argparse.Namespace(**{**vars(options), "device": "cpu"})
    job = Job.of(data, options, seed, "tensorflow")
    with free_ports(options.processes) as ports:
        return processes.run(processes.spawn, work, (job, ports), options.processes)[0]


if __name__ == "__main__":
    framework = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, MultiWorkerMirroredStrategy"
    sys.exit(main(train, framework=framework, command_line=shares.command_line()))
