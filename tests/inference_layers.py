"""Layer-wise inference in one framework against its own forward pass over the whole graph; in a process of its own."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import Any

import numpy as np

from gglspeedup import CSRGraph, layerwise_inference

PACKAGES = ("torch", "tensorflow", "paddle", "jax")
WIDTHS = (6, 9, 4)


def framework(name: str) -> tuple[Any, Any, Any]:
    """The framework, a function that makes a tensor of an array, and one that sums rows by their targets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of themselves on import
        api = __import__(name)
    if name == "jax":
        api.config.update("jax_enable_x64", True)
        return api.numpy, api.numpy.asarray, lambda rows, to, count: api.ops.segment_sum(rows, to, count)
    if name == "tensorflow":
        return api, api.constant, lambda rows, to, count: api.math.unsorted_segment_sum(rows, to, count)
    zeros = api.zeros if name == "paddle" else api.Tensor.new_zeros

    def add_up(rows: Any, to: Any, count: int) -> Any:
        shape = [count, rows.shape[1]]
        empty = zeros(shape, "float32") if name == "paddle" else zeros(rows, shape)
        return empty.index_add(to, 0, rows) if name == "paddle" else empty.index_add(0, to, rows)

    return api, api.to_tensor if name == "paddle" else api.tensor, add_up


def main(name: str) -> None:
    """Compare."""
    assert not set(PACKAGES) & set(sys.modules)
    rng = np.random.default_rng(0)
    degree = rng.integers(0, 9, 300)
    degree[7] = 250
    graph = CSRGraph(np.concatenate([[0], np.cumsum(degree)]), rng.integers(0, 300, degree.sum()))
    x = rng.standard_normal((300, WIDTHS[0])).astype(np.float32)
    api, tensor, add_up = framework(name)
    loaded = set(PACKAGES) & set(sys.modules)
    weights = [rng.standard_normal((2, *pair)).astype(np.float32) for pair in itertools.pairwise(WIDTHS)]
    own, neighbours = ([tensor(pair[side]) for pair in weights] for side in (0, 1))
    edge_weight = tensor(rng.random(graph.num_edges).astype(np.float32))

    def layer(index: int, x: Any, source: Any, target: Any, edges: Any, count: int) -> Any:
        take = api.take if name == "jax" else api.gather
        axis = {"axis": 0} if name != "torch" else {}
        pick = (lambda rows, ids: rows[ids]) if name == "torch" else (lambda rows, ids: take(rows, ids, **axis))
        messages = pick(x, source) * pick(edge_weight, edges)[:, None]
        out = api.matmul(x[:count], own[index]) + api.matmul(add_up(messages, target, count), neighbours[index])
        return out if index else api.tanh(out)

    def of(index: int) -> Any:
        return lambda x, adj: layer(index, x, adj.edge_index[0], adj.edge_index[1], adj.e_id, adj.size[1])

    targets = tensor(np.repeat(np.arange(300), degree))
    sources, every = tensor(graph.indices.astype(np.int64)), tensor(np.arange(graph.num_edges))
    expected = tensor(x)
    for index in range(2):
        expected = layer(index, expected, sources, targets, every, 300)
    found = layerwise_inference(
        graph, x, [of(0), of(1)], batch_size=110, device="cpu", backend=name, progress=False, prefetch=2
    )
    assert type(found) is np.ndarray and found.dtype == np.float32 and found.shape == (300, WIDTHS[-1])
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-4, atol=1e-5)
    assert set(PACKAGES) & set(sys.modules) == loaded
    print("passed")


if __name__ == "__main__":
    main(sys.argv[1])
