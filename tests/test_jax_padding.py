"""Padded batches for `jax.jit`: nothing that a seed sees is changed, and few shapes occur.

    python tests/test_jax_padding.py

runs the checks; pytest does so in a process of its own, and makes a test of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import missing, random_graph

from gglspeedup import NodeLoader
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def loaders(count: int) -> Any:
    """Loaders over random graphs with empty rows, self-loops and parallel edges, of both kinds of arrays."""
    for number in range(count):
        rng = np.random.default_rng(number)
        nodes = int(rng.integers(1, 300))
        graph = random_graph(rng, nodes, int(rng.integers(0, 8)), hub=int(rng.integers(0, 2)) * 60)
        x = rng.normal(size=(nodes, 5)).astype(rng.choice([np.float32, np.float16]))
        y = rng.integers(1, 9, nodes if number % 2 else (nodes, 3))
        sizes = rng.integers(-1, 6, rng.integers(1, 4)).tolist()
        yield NodeLoader(
            graph, x, y, seeds=rng.permutation(nodes)[: rng.integers(1, nodes + 1)], sizes=sizes, seed=number,
            batch_size=int(rng.integers(1, 70)), device="cpu", backend=("jax", "numpy")[number // 2 % 2],
        )  # fmt: skip


def naive_sage(x: Any, adjs: Any) -> Any:
    """GraphSAGE with fixed weights: each target gets the mean of its sources, and itself."""
    x = np.asarray(x, np.float64)
    for adj in adjs:
        edge_index = np.asarray(adj.edge_index)
        new = np.zeros((adj.size[1], x.shape[1]))
        for target in range(adj.size[1]):
            sources = edge_index[0, edge_index[1] == target]
            mean = x[sources].mean(0) if len(sources) else np.zeros(x.shape[1])
            new[target] = np.maximum(mean @ np.arange(-12.0, 13.0).reshape(5, 5) + x[target], -1)
        x = new
    return x


@check
def seeds_see_no_padding() -> None:
    from gglspeedup.adapters.jax_padding import pad

    seen = 0
    for number, loader in enumerate(loaders(40)):
        for batch in loader:
            padded = pad(batch, steps=(1, 2, 8, 64)[number % 4])
            expected, scores = naive_sage(batch.x, batch.adjs), naive_sage(padded.x, padded.adjs)
            np.testing.assert_array_equal(scores[: batch.batch_size], expected)
            assert np.isfinite(scores).all()
            seen += len(scores) > batch.batch_size
    assert seen > 40


@check
def real_parts_come_first() -> None:
    import jax

    from gglspeedup.adapters.jax_padding import pad

    for loader in loaders(24):
        for batch in loader:
            padded = pad(batch)
            assert (padded.batch_size, padded.batch) == (batch.batch_size, batch.batch)
            assert padded.sizes == tuple(adj.size for adj in padded.adjs) and hash(padded.sizes)
            targets = padded.adjs[-1].size[1]
            assert np.asarray(padded.mask).tolist() == [row < batch.batch_size for row in range(targets)]
            for ours, theirs in ((padded.x, batch.x), (padded.y, batch.y), (padded.n_id, batch.n_id)):
                assert isinstance(ours, jax.Array) and ours.shape[1:] == theirs.shape[1:]
                assert ours.dtype == jax.dtypes.canonicalize_dtype(theirs.dtype)
                np.testing.assert_array_equal(np.asarray(ours)[: len(theirs)], np.asarray(theirs))
                assert not np.asarray(ours)[len(theirs) :].any()
            assert len(padded.x) == len(padded.n_id) == padded.adjs[0].size[0] and len(padded.y) == targets
            for ours, theirs in zip(padded.adjs, batch.adjs, strict=True):
                edges, ours_edges = theirs.edge_index.shape[1], np.asarray(ours.edge_index)
                assert ours.size[1] > theirs.size[1] and ours.size[0] >= ours.size[1]
                assert all(type(count) is int for count in ours.size)
                np.testing.assert_array_equal(ours_edges[:, :edges], np.asarray(theirs.edge_index))
                assert (ours_edges[0, edges:] == 0).all() and (ours_edges[1, edges:] == ours.size[1] - 1).all()
                assert (np.diff(ours_edges[1]) >= 0).all()
                np.testing.assert_array_equal(np.asarray(ours.e_id)[:edges], np.asarray(theirs.e_id))
                assert len(ours.e_id) == ours_edges.shape[1] and not np.asarray(ours.e_id)[edges:].any()
            for outer, inner in zip(padded.adjs, padded.adjs[1:], strict=False):
                assert outer.size[1] == inner.size[0]


@check
def few_shapes_are_compiled() -> None:
    import jax

    from gglspeedup.adapters.jax_padding import pad

    rng = np.random.default_rng(0)
    graph = random_graph(rng, 20_000, 30)
    loader = NodeLoader(
        graph, np.ones((20_000, 2), np.float32), seeds=np.arange(20_000), sizes=[5, 5], batch_size=128, device="cpu",
        backend="jax",
    )  # fmt: skip
    traced: list[Any] = []

    def forward(x: Any, edges: Any, sizes: Any) -> Any:
        traced.append(sizes)  # Python runs this only when XLA is about to compile
        for (source, target), (_, targets) in zip(edges, sizes, strict=True):
            x = jax.ops.segment_sum(x[source], target, targets)
        return x

    jitted = jax.jit(forward, static_argnames="sizes")
    before, shapes = set(), {8: set(), 1: set()}
    for batch in loader:
        before.add((*(adj.size for adj in batch.adjs), *(adj.edge_index.shape for adj in batch.adjs)))
        for steps, found in shapes.items():
            padded = pad(batch, steps)
            found.add((padded.sizes, *(edges.shape for edges in padded.edges)))
        scores = jitted(padded.x, padded.edges, padded.sizes)[: batch.batch_size]
        np.testing.assert_array_equal(np.asarray(scores)[:, 0], naive_counts(batch))
    assert len(loader) == 157 == len(before)
    assert len(shapes[8]) <= 12  # of what is the same at every run
    assert len(traced) == len(shapes[1]) <= 3


def naive_counts(batch: Any) -> Any:
    """The number of paths that end in each seed."""
    paths = np.ones(len(batch.n_id))
    for adj in batch.adjs:
        row, col = np.asarray(adj.edge_index)
        paths = np.bincount(col, paths[row], minlength=adj.size[1])
    return paths


@check
def masked_loss_has_the_same_gradient() -> None:
    import jax
    import jax.numpy as jnp

    from gglspeedup.adapters.jax_padding import pad

    def loss_of(weight: Any, x: Any, y: Any, mask: Any, adjs: Any) -> Any:
        for adj in adjs:
            row, col = adj.edge_index
            x = jnp.tanh(jax.ops.segment_sum(x[row], col, adj.size[1]) @ weight + x[: adj.size[1]])
        return ((x.sum(1) - y) ** 2).mean(where=mask)

    for loader in [loader for number, loader in enumerate(loaders(8)) if number % 2]:
        batch = next(iter(loader))
        padded = pad(batch)
        x, y, weight = jnp.asarray(batch.x, "float32"), jnp.asarray(batch.y), jnp.arange(25.0).reshape(5, 5) / 50
        plain = jax.value_and_grad(loss_of)(weight, x, y, True, batch.adjs)
        masked = jax.value_and_grad(loss_of)(
            weight, padded.x.astype("float32"), padded.y, padded.mask, padded.adjs
        )  # fmt: skip
        for ours, expected in zip(masked, plain, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@check
def what_a_loader_lacks_stays_none() -> None:
    from gglspeedup.adapters.jax_padding import pad

    graph = random_graph(np.random.default_rng(0), 50, 4)
    for batch in NodeLoader(graph, seeds=np.arange(50), sizes=[2], batch_size=20, device="cpu", backend="jax"):
        padded = pad(batch)
        assert padded.x is None and padded.y is None and int(padded.mask.sum()) == batch.batch_size


@check
def counts_are_rounded_up() -> None:
    from gglspeedup.adapters.jax_padding import padded_count

    for steps in (1, 2, 3, 8, 100):
        rounded = [padded_count(count, steps) for count in range(5000)]
        assert rounded == sorted(rounded)
        assert all(count <= up <= count + count / steps for count, up in enumerate(rounded))
        assert all(padded_count(up, steps) == up for up in rounded)
        assert len(set(rounded[1024:2049])) <= steps + 1


@check
def bad_arguments_are_refused() -> None:
    from gglspeedup.adapters.jax_padding import pad

    loader = next(iter(loaders(1)))
    batch = next(iter(loader))
    for steps, kind in ((0, ArgumentValueError), (-1, ArgumentValueError), (1.5, ArgumentTypeError)):
        with pytest.raises(kind, match="steps needs"):
            pad(batch, steps)  # type: ignore[arg-type]
    for other in (loader, None, pad(batch), loader.graph_sampler.sample([0], sizes=[1])):
        with pytest.raises(ArgumentTypeError, match="batch needs a batch of a NodeLoader"):
            pad(other)


@check
def examples() -> None:
    import doctest

    import gglspeedup.adapters.jax_padding

    done = doctest.testmod(gglspeedup.adapters.jax_padding)
    assert done.attempted and not done.failed


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of each check, in a process of its own: JAX starts threads, after which none may fork safely."""
    if importlib.util.find_spec("jax") is None:
        missing("jax")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]  # not what doctest prints
    return dict(json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_padding(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "passed", outcomes[name]


if __name__ == "__main__":
    for name, function in CHECKS.items():
        try:
            function()
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)
