"""Histories under `jax.jit`: equal to `Scalable` outside of it, whatever the padding, and written in place.

    python tests/test_jax_histories.py

runs the checks; pytest does so in a process of its own, and makes a test of each.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import missing, random_graph

from gglspeedup import CSRGraph, HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError
from gglspeedup.normalise import symmetric_normalisation

NODES, WIDTHS = 240, (9, 8, 7, 2)
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@functools.cache
def problem() -> tuple[Any, ...]:
    """A permuted graph with normalised weights, the bounds of its parts, features and labels."""
    rng = np.random.default_rng(0)
    graph, weights = symmetric_normalisation(random_graph(rng, NODES, 5, hub=40))
    perm, ptr = partition(graph, 8, "random")
    graph = permute(graph, perm)
    x = rng.standard_normal((NODES, WIDTHS[0])).astype(np.float32)
    return graph, weights[graph.edge_ids], ptr, x, rng.integers(0, WIDTHS[-1], NODES)


def loader(parts: int, **options: Any) -> SubgraphLoader:
    graph, weights, ptr, x, y = problem()
    options = {"backend": "jax", "prefetch": 0, "edge_weight": weights} | options
    return SubgraphLoader(graph, x, y, ptr=ptr, batch_size=parts, device="cpu", **options)


def make_weights(widths: Any = WIDTHS) -> list[Any]:
    import jax

    keys = jax.random.split(jax.random.key(0), len(widths))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, itertools.pairwise(widths), strict=False)]


def convolution(weight: Any, x: Any, edges: Any, edge_weight: Any, targets: int) -> Any:
    import jax

    messages = (x @ weight)[edges[0]] * edge_weight[:, None]
    return jax.ops.segment_sum(messages, edges[1], targets)


def layer(weights: Any, index: int, x: Any, batch: Any) -> Any:
    import jax.numpy as jnp

    x = convolution(weights[index], x, batch.edge_index, batch.edge_weight, batch.size[1])
    return x if index == len(weights) - 1 else jnp.tanh(x)


def forward(weights: Any, histories: Any, batch: Any) -> Any:
    """The scores of all targets of a padded batch, and the new histories."""
    from gglspeedup.adapters.jax_histories import push_and_pull

    x = layer(weights, 0, batch.x, batch)
    for index in range(1, len(weights)):
        x, histories = push_and_pull(histories, index - 1, x, batch)
        x = layer(weights, index, x, batch)
    return x, histories


def outside_of_jit(weights: Any, store: Any = None) -> Any:
    """The same model as a `Scalable`, of batches as the loader yields them."""
    import jax.numpy as jnp

    from gglspeedup.adapters.scalable import Scalable

    class Model(Scalable):
        num_layers, histories = len(weights), store

        def layer(self, index: int, x: Any, batch: Any, state: Any) -> Any:
            x = convolution(weights[index], x, batch.adj.edge_index, batch.edge_weight, len(batch.n_id))
            return x if index == self.num_layers - 1 else jnp.tanh(x)

    return Model()


def zeros(dtype: str = "float32", dims: Any = WIDTHS[1:-1]) -> Any:
    from gglspeedup.adapters.jax_histories import zero_histories

    return zero_histories(NODES, dims, dtype)


def padded(batch: Any, steps: int = 8) -> Any:
    from gglspeedup.adapters.jax_subgraphs import pad_subgraph

    return pad_subgraph(batch, NODES, steps)


def rows(histories: Any, index: int) -> Any:
    from gglspeedup.adapters.jax_histories import pull

    return np.asarray(pull(histories, index, np.arange(NODES)))


# --- padded batches ------------------------------------------------------------------------------------------------


@check
def batches_keep_what_they_have() -> None:
    import jax

    for number, backend in itertools.product(range(12), ("jax", "numpy")):
        rng = np.random.default_rng(number)
        parts, steps = int(rng.integers(1, 9)), int(rng.choice([1, 2, 8, 64]))
        options = {"edge_weight": rng.random((problem()[0].num_edges, 2))} if number % 3 == 0 else {}
        for batch in loader(parts, backend=backend, seed=number, **options):
            ours, own, n_id = padded(batch, steps), batch.batch_size, np.asarray(batch.n_id)
            (size, targets), halo = ours.size, len(n_id) - own
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(ours))
            assert np.asarray(ours.mask).tolist() == [row < own for row in range(targets)]
            assert own < targets <= (own + 1) * (1 + 1 / steps) and halo <= size - targets <= halo * (1 + 1 / steps)
            real = np.r_[:own, targets : targets + halo]
            np.testing.assert_array_equal(np.asarray(ours.n_id)[real], n_id)
            absent = np.delete(np.asarray(ours.n_id), real)
            assert (absent >= NODES).all() and len(np.unique(absent)) == len(absent)
            np.testing.assert_array_equal(np.asarray(ours.x)[real], np.asarray(batch.x))
            assert not np.delete(np.asarray(ours.x), real, axis=0).any()
            for values, given in ((ours.y, batch.y), (ours.edge_weight, batch.edge_weight)):
                np.testing.assert_allclose(np.asarray(values)[: len(given)], np.asarray(given), rtol=1e-6)
                assert not np.asarray(values)[len(given) :].any()
            edges, given = np.asarray(ours.edge_index), np.asarray(batch.adj.edge_index)
            real_edges, added = edges[:, : given.shape[1]], edges[:, given.shape[1] :]
            np.testing.assert_array_equal(np.asarray(ours.n_id)[real_edges], n_id[given])
            assert (added[0] == 0).all() and (added[1] == targets - 1).all() and (np.diff(edges[1]) >= 0).all()
            assert len(ours.edge_weight) == edges.shape[1]


@check
def batches_without_much() -> None:
    graph = CSRGraph([0, 0, 1], [0])
    for batch in SubgraphLoader(graph, ptr=[0, 0, 1, 2], batch_size=1, device="cpu").evaluation():
        from gglspeedup.adapters.jax_subgraphs import pad_subgraph

        ours = pad_subgraph(batch, 2)
        assert ours.x is ours.y is ours.edge_weight is None and int(ours.mask.sum()) == batch.batch_size
        assert (np.asarray(ours.edge_index[1]) < ours.size[1]).all()


@check
def padding_changes_nothing() -> None:
    import jax

    weights, jitted = make_weights(), jax.jit(forward)
    results = []
    for steps in (1, 8, 1024):
        histories, scores = zeros(), []
        for batch in loader(3, seed=5):
            out, histories = jitted(weights, histories, padded(batch, steps))
            scores.append(np.asarray(out)[: batch.batch_size])
        results.append([np.concatenate(scores), *(rows(histories, index) for index in range(2))])
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


# --- histories -----------------------------------------------------------------------------------------------------


@check
def equals_scalable_outside_of_jit() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import age

    tolerances = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}  # sums in another order round another way
    for dtype, tolerance in tolerances.items():
        orders = (loader(3, seed=1), loader(2, seed=2))[: 2 if dtype == "float32" else 1]
        weights, histories, jitted = make_weights(), zeros(dtype), jax.jit(forward)
        with HistoryStore(NODES, WIDTHS[1:-1], "cpu", dtype=dtype) as store:
            model = outside_of_jit(weights, store)
            seen = 0
            for batch in itertools.chain(*orders):
                expected = model.all_layers(batch)
                scores, histories = jitted(weights, histories, padded(batch, steps=1))
                np.testing.assert_allclose(scores[: batch.batch_size], expected, rtol=tolerance, atol=tolerance)
                for index, table in enumerate(store):
                    np.testing.assert_array_equal(age(histories, index), store.age(table=index))
                    kept = rows(histories, index)
                    assert kept.dtype == table.dtype
                    np.testing.assert_allclose(
                        kept.astype("f"), table.pull(np.arange(NODES)).astype("f"), rtol=tolerance, atol=tolerance
                    )  # fmt: skip
                seen += 1
            assert seen == store[0].pushes == (7 if dtype == "float32" else 3)


@check
def pushed_rows_are_rounded_once() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import push_and_pull

    batch = next(iter(loader(3)))
    ours = padded(batch)
    x = jax.random.normal(jax.random.key(1), (ours.size[1] + 3, 8)) * 1e4
    for dtype in ("float16", "bfloat16"):
        out, histories = jax.jit(push_and_pull, static_argnums=1)(zeros(dtype), 0, x, ours)
        own = batch.batch_size
        # In the batch itself nothing is rounded.
        np.testing.assert_array_equal(out[:own], x[:own])
        assert out.dtype == x.dtype and out.shape == (ours.size[0], 8) and not out[ours.size[1] :].any()
        kept = rows(histories, 0)
        expected = np.zeros((NODES, 8), kept.dtype)
        expected[np.asarray(batch.n_id)[:own]] = np.asarray(x)[:own].astype(kept.dtype)
        assert kept.tobytes() == expected.tobytes() and kept.dtype.itemsize == 2


@check
def as_many_passes_as_layers_are_exact() -> None:
    import jax

    for depth in (2, 4):
        widths = (WIDTHS[0], *[6] * (depth - 1), 2)
        weights, histories, jitted = make_weights(widths), zeros(dims=widths[1:-1]), jax.jit(forward)
        (whole,) = loader(8, shuffle=False)
        expected, errors = np.asarray(outside_of_jit(weights).all_layers(whole)), []
        batches = [(batch.batch_size, padded(batch, steps=1)) for batch in loader(2).evaluation()]
        for _ in range(depth):
            scores = []
            for own, batch in batches:
                out, histories = jitted(weights, histories, batch)
                scores.append(np.asarray(out)[:own])
            errors.append(np.abs(np.concatenate(scores) - expected).max())
        assert errors[-1] < 1e-5 < errors[0], (depth, errors)


@check
def inference_is_exact() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import inference

    (whole,) = loader(8, shuffle=False)
    for widths, parts in ((WIDTHS, 3), ((9, 4), 2), ((9, 3, 3), 8)):
        weights = make_weights(widths)
        expected = outside_of_jit(weights).all_layers(whole)
        jitted = jax.jit(functools.partial(layer, weights), static_argnums=0)
        out = inference(jitted, len(weights), loader(parts).evaluation(), NODES, steps=1)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentValueError, match="loader needs a batch a layer"):
        inference(jitted, 2, iter(loader(4).evaluation()), NODES)


# --- gradients, compilation, memory --------------------------------------------------------------------------------


@check
def gradients_flow_through_own_rows_alone() -> None:
    import jax
    import jax.numpy as jnp

    weights, histories = make_weights(), zeros()
    jitted = jax.jit(forward)
    for batch in loader(2, seed=3):
        _, histories = jitted(weights, histories, padded(batch, steps=1))
    batch = next(iter(loader(2, seed=9)))
    own, halo = batch.batch_size, np.asarray(batch.n_id)[batch.batch_size :]
    constants = [jnp.asarray(rows(histories, index)[halo]) for index in range(2)]
    assert len(halo) and all(constant.any() for constant in constants)

    def naive(weights: Any) -> Any:
        x, edges = batch.x, batch.adj.edge_index
        for weight, constant in zip(weights[:-1], constants, strict=True):
            x = jnp.tanh(convolution(weight, x, edges, batch.edge_weight, own))
            x = jnp.concatenate([x, constant])
        return (convolution(weights[-1], x, edges, batch.edge_weight, own) ** 2).mean()

    def ours(weights: Any, histories: Any, batch: Any) -> Any:
        scores, histories = forward(weights, histories, batch)
        return (scores**2).mean(where=batch.mask[:, None]), histories

    gradients, pushed = jax.jit(jax.grad(ours, has_aux=True))(weights, histories, padded(batch))
    for got, expected in zip(gradients, jax.grad(naive)(weights), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(rows(pushed, 0), 0)

    def of_tables(tables: Any) -> Any:
        given = tuple(table._replace(rows=values) for table, values in zip(histories, tables, strict=True))
        scores, pushed = forward(weights, given, padded(batch))
        return scores.sum() + sum(table.rows[np.asarray(batch.n_id)[:own]].sum() for table in pushed)

    # Neither into the tables nor out of what was pushed.
    assert not any(gradient.any() for gradient in jax.jit(jax.grad(of_tables))([table.rows for table in histories]))

    def of_pushed(weights: Any) -> Any:
        return sum(table.rows.sum() for table in forward(weights, histories, padded(batch))[1])

    assert not any(gradient.any() for gradient in jax.jit(jax.grad(of_pushed))(weights))


@check
def epochs_compile_few_times() -> None:
    import jax

    traced: list[Any] = []

    def step(weights: Any, histories: Any, batch: Any) -> Any:
        traced.append(batch.size)  # Python runs this only when XLA is about to compile
        return forward(weights, histories, batch)[1]

    jitted, weights, histories, shapes = jax.jit(step, donate_argnums=1), make_weights(), zeros(), set()
    batches = loader(2, seed=4)
    for _ in range(20):
        for batch in batches:
            shapes.add((batch.batch_size, len(batch.n_id), batch.adj.edge_index.shape))
            histories = jitted(weights, histories, padded(batch, steps=1))
    assert len(shapes) > 20 and len(traced) <= 4, (len(shapes), traced)


@check
def donated_tables_are_written_in_place() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import from_store

    weights, ours = make_weights(), padded(next(iter(loader(2))))

    def loss_of(weights: Any, histories: Any, batch: Any) -> Any:
        scores, histories = forward(weights, histories, batch)
        return (scores**2).mean(where=batch.mask[:, None]), histories

    def step(weights: Any, histories: Any, batch: Any) -> Any:
        gradients, histories = jax.grad(loss_of, has_aux=True)(weights, histories, batch)
        return [one - 0.1 * other for one, other in zip(weights, gradients, strict=True)], histories

    for dtype, stored in (("float32", "f32"), ("float16", "f16"), ("bfloat16", "u16")):
        for histories in (zeros(dtype), from_store(HistoryStore(NODES, WIDTHS[1:-1], "cpu", dtype=dtype))):
            jitted = jax.jit(step, donate_argnums=1)
            text = jitted.lower(weights, histories, ours).compile().as_text()
            assert "input_output_alias" in text
            # No table is copied, and none is converted to another type on its way.
            for width in WIDTHS[1:-1]:
                made = re.findall(rf"= (\w+)\[{NODES},{width}\]\S* ([\w-]+)\(", text.partition("\nENTRY")[2])
                assert {kind for kind, _ in made} == {stored}, (dtype, made)
                assert "copy" not in {operation for _, operation in made}, (dtype, made)
            leaves = jax.tree.leaves(histories)
            places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
            assert len(set(places)) == len(places) == 6
            _, pushed = jitted(weights, histories, ours)
            assert all(leaf.is_deleted() for leaf in leaves)
            assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pushed)] == places
            assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((weights, ours, pushed)))
    # Without donation, what was given stays as it was.
    histories = zeros()
    pushed = jax.jit(step)(weights, histories, ours)[1]
    assert not rows(histories, 0).any() and rows(pushed, 0).any()


# --- stores and files ----------------------------------------------------------------------------------------------


@check
def stores_and_files_come_and_go() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import age, from_store, to_store

    weights, jitted = make_weights(), jax.jit(forward)
    for dtype in ("float32", "float16", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            store = HistoryStore(NODES, WIDTHS[1:-1], "cpu", dtype=dtype)
            histories = zeros(dtype)
            for batch in itertools.islice(loader(2, seed=1), 3):  # the last quarter is never pushed
                _, histories = jitted(weights, histories, padded(batch))
            never = np.asarray(age(histories, 0)) < 0
            store[0].push(np.full((1, 8), 7.0), [int(np.flatnonzero(never)[0])])
            store[0].push(np.empty((0, 8)), [])
            to_store(histories, store)
            store.save(Path(folder) / "saved")
            again = from_store(HistoryStore.load(Path(folder) / "saved", "cpu"))
        for index in range(2):
            assert rows(again, index)[~never].tobytes() == rows(histories, index)[~never].tobytes()
            assert again[index].rows.dtype == histories[index].rows.dtype
            ages = np.asarray(age(histories, index))
            assert set(ages.tolist()) == {-1, 0, 1, 2}
            np.testing.assert_array_equal(store.age(table=index)[~never], ages[~never])
            np.testing.assert_array_equal(age(again, index), store.age(table=index))
            assert int(again[index].pushes) == store[index].pushes
        assert store.age()[never].tolist().count(-1) == never.sum() - 1 and store.age()[never].max() == 4
        (other,) = rows(again, 0)[never][store.age()[never] == 4]
        assert (other == 7).all()


@check
def ages_count_empty_pushes() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import age, from_store, to_store, zero_histories

    store = HistoryStore(3, [2], "cpu")
    to_store(zero_histories(3, [2]), store)
    assert store[0].pushes == 0  # there is nothing to push
    for nodes in ([0, 2], [0], [], []):
        store[0].push(np.ones((len(nodes), 2)), nodes)
    histories = from_store(store)
    assert age(histories, 0).tolist() == store.age().tolist() == [2, -1, 3]
    fresh = HistoryStore(3, [2], "cpu")
    to_store(histories, fresh)
    assert fresh.age().tolist() == [2, -1, 3] and fresh[0].pull([0, 1, 2]).tolist() == [[1, 1], [0, 0], [1, 1]]
    # A copy: what is pushed to the store later is not seen.
    store[0].push(np.zeros((3, 2)), [0, 1, 2])
    jax.block_until_ready(histories)
    assert histories[0].rows.tolist() == [[1, 1], [0, 0], [1, 1]]


@check
def training_goes_on_where_a_file_left_it() -> None:
    import jax

    from gglspeedup.adapters.jax_histories import from_store, to_store

    weights, jitted, batches = make_weights(), jax.jit(forward), [padded(batch) for batch in loader(2)]
    histories, store = zeros(), HistoryStore(NODES, WIDTHS[1:-1], "cpu")
    for batch in batches[:3]:
        _, histories = jitted(weights, histories, batch)
    to_store(histories, store)
    expected = jitted(weights, histories, batches[3])[0]
    np.testing.assert_array_equal(jitted(weights, from_store(store), batches[3])[0], expected)
    assert not np.allclose(jitted(weights, zeros(), batches[3])[0], expected)


# --- bad input -----------------------------------------------------------------------------------------------------


@check
def bad_batches_are_refused() -> None:
    from gglspeedup.adapters.jax_subgraphs import pad_subgraph

    batch = next(iter(loader(2)))
    for other in (None, batch.x, padded(batch), loader(2)):
        with pytest.raises(ArgumentTypeError, match="batch needs a batch of a SubgraphLoader"):
            pad_subgraph(other, NODES)
    for name, value, kind in (
        ("steps", 0, ArgumentValueError), ("steps", 1.5, ArgumentTypeError), ("num_nodes", -1, ArgumentValueError),
        ("num_nodes", "9", ArgumentTypeError),
    ):  # fmt: skip
        with pytest.raises(kind, match=f"{name} needs"):
            pad_subgraph(batch, **{"num_nodes": NODES, name: value})
    largest = int(np.asarray(batch.n_id).max())
    pad_subgraph(batch, largest + 1)
    with pytest.raises(ArgumentIndexError, match=f"n_id needs ids from 0 to {largest - 1}, got {largest} at position"):
        pad_subgraph(batch, largest)
    with pytest.raises(ArgumentValueError, match="jax_enable_x64"):
        pad_subgraph(batch, 2**31 - 2)


@check
def bad_histories_are_refused() -> None:
    import jax
    import jax.numpy as jnp

    from gglspeedup.adapters.jax_histories import age, from_store, pull, push_and_pull, to_store, zero_histories
    from gglspeedup.adapters.jax_subgraphs import pad_subgraph

    for dims, dtype, kind, words in (
        ("88", "float32", ArgumentTypeError, "dims needs"), (8, "float32", ArgumentTypeError, "dims needs"),
        ([8, -1], "float32", ArgumentValueError, "dims needs"), ([8], "float64", ArgumentValueError, "dtype needs"),
        ([8], "int32", ArgumentValueError, "dtype needs"), ([8], "floaty", ArgumentValueError, "dtype needs"),
        ([8], None, ArgumentValueError, "dtype needs"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            zero_histories(3, dims, dtype)
    with pytest.raises(ArgumentValueError, match="num_nodes needs"):
        zero_histories(-1, [8])
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype("float16"), np.float32):
        assert pull(zero_histories(3, [8], dtype), 0, [0]).dtype == jnp.dtype(dtype)

    batch = next(iter(loader(2)))
    ours, histories = padded(batch), zeros()
    x = jnp.ones((ours.size[1], 8))
    for arguments, kind, words in (
        (([], 0, x, ours), ArgumentTypeError, "histories needs"), ((None, 0, x, ours), ArgumentTypeError, "histories"),
        ((histories, 2, x, ours), ArgumentValueError, "layer needs 0 to 1"),
        ((histories, -1, x, ours), ArgumentValueError, "layer needs"),
        ((histories, 0.0, x, ours), ArgumentTypeError, "layer needs"),
        ((histories, 1, x, ours), ArgumentValueError, r"x needs shape \[n, 7\], n at least"),
        ((histories, 0, x[:-1], ours), ArgumentValueError, "x needs shape"),
        ((histories, 0, x[0], ours), ArgumentValueError, "x needs shape"),
        ((histories, 0, x.astype("int32"), ours), ArgumentTypeError, "x needs an array of real numbers"),
        ((histories, 0, x.tolist(), ours), ArgumentTypeError, "x needs an array of real numbers"),
        ((histories, 0, x, batch), ArgumentTypeError, "batch needs a PaddedSubgraph"),
        ((histories, 0, x, pad_subgraph(batch, NODES + 1)), ArgumentValueError, "batch needs a graph of 240 nodes"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            push_and_pull(*arguments)
    with pytest.raises(ArgumentValueError, match="x needs shape"):
        jax.jit(push_and_pull, static_argnums=1)(histories, 1, x, ours)
    with pytest.raises(ArgumentValueError, match="layer needs"):
        age(histories, 2)

    for store in (None, histories, "store"):
        for call in (lambda store=store: from_store(store), lambda store=store: to_store(histories, store)):
            with pytest.raises(ArgumentTypeError, match="store needs a HistoryStore"):
                call()
    for nodes, dims in ((NODES + 1, [8, 7]), (NODES, [8]), (NODES, [7, 8])):
        store = HistoryStore(nodes, dims, "cpu")
        with pytest.raises(ArgumentValueError, match="store needs tables of shapes"):
            to_store(histories, store)
        assert all(table.pushes == 0 for table in store)
    with pytest.raises(ArgumentTypeError, match="histories needs"):
        to_store([], HistoryStore(3, [8], "cpu"))  # type: ignore[arg-type]


@check
def examples() -> None:
    import doctest

    import gglspeedup.adapters.jax_histories
    import gglspeedup.adapters.jax_subgraphs

    for module in (gglspeedup.adapters.jax_histories, gglspeedup.adapters.jax_subgraphs):
        done = doctest.testmod(module)
        assert done.attempted and not done.failed


# --- pytest --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What came of each check, in a process of its own: JAX starts threads, after which none may fork safely."""
    if importlib.util.find_spec("jax") is None:
        missing("jax")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]  # not what doctest prints
    return dict(json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_histories(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "passed", outcomes[name]


if __name__ == "__main__":
    for name, function in CHECKS.items():
        try:
            function()
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)
