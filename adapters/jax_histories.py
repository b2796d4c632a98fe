"""Histories (GNNAutoScale) as pure functions of JAX arrays, for ``jax.jit``.

`Scalable` with a HistoryStore serves JAX outside of jitted functions. Here histories are a pytree that goes into a
jitted function and comes out of it; if it is donated, its tables are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gglspeedup.adapters.jax import to_framework
from gglspeedup.adapters.jax_subgraphs import PaddedSubgraph, pad_subgraph
from gglspeedup.arguments import check_count, host_array
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.history.history_file import DTYPES
from gglspeedup.history.store import HistoryStore
from gglspeedup.interchange import framework_of
from gglspeedup.subgraphs import SubgraphBatch


class Table(NamedTuple):
    """The rows of one layer; use :func:`pull` to read them.

    Attributes
    ----------
    rows : array [num_nodes, dim]
        float32 or float16, or uint16: the bits of bfloat16.
    written : int32 array [num_nodes]
        The number of the push that wrote each row last, from 1; 0 for never.
    pushes : int32 array []
        How many there were.
    """

    rows: jax.Array
    written: jax.Array
    pushes: jax.Array


Histories = tuple[Table, ...]


def zero_histories(num_nodes: int, dims: Iterable[int], dtype: Any = "float32") -> Histories:
    """Return tables of zeros, one for each layer but the last, as wide as that layer's output.

    Parameters
    ----------
    num_nodes, dims : int, sequence of int
        Rows of every table, and the width of each.
    dtype : str or dtype
        float32, float16 or bfloat16: how rows are stored. Those that are pulled have the dtype of the layer's output.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.
    """
    num_nodes = check_count(num_nodes, "num_nodes", 0)
    if isinstance(dims, (str, bytes)) or not hasattr(dims, "__iter__"):
        raise ArgumentTypeError(explain("dims", "one width a table", repr(dims), "pass a list such as [64, 64]"))
    widths = [check_count(dim, "dims", 0) for dim in dims]
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in DTYPES:
        raise ArgumentValueError(explain("dtype", f"one of {', '.join(DTYPES)}", name, 'leave it "float32"'))
    # XLA widens a bfloat16 table to float32 and back, all of it, for each push on a CPU; integers stay as they are.
    stored = "uint16" if name == "bfloat16" else name
    return tuple(
        Table(jnp.zeros((num_nodes, width), stored), jnp.zeros(num_nodes, "int32"), jnp.zeros((), "int32"))
        for width in widths
    )


def push_and_pull(histories: Histories, layer: int, x: jax.Array, batch: PaddedSubgraph) -> tuple[jax.Array, Histories]:
    """Return the rows of all nodes of a batch, and the histories with those of its own nodes.

    The same as :meth:`gglspeedup.adapters.scalable.Scalable.push_and_pull`, without side effects: no gradient flows to
    the histories, nor out of them. Where they are donated to a jitted function, their tables are not copied.

    Parameters
    ----------
    histories : tuple of Table
        Of :func:`zero_histories`, :func:`from_store`, or the last step.
    layer : int
        Which table.
    x : array [n, dim], n at least ``batch.size[1]``
        The layer's output; the first rows are those of the batch's own nodes, what follows is not looked at.
    batch : PaddedSubgraph
        The batch.

    Returns
    -------
    x : array [P, dim]
        In the order of ``batch.n_id``; zeros for halo rows that are no node.
    histories : tuple of Table
        The new ones.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        `x` is not as wide as the table, the batch is of another graph, or something is of another type. Under
        ``jax.jit`` it is raised while tracing.

    Examples
    --------
    A training step of a model of two layers, each of which multiplies by a matrix and adds up over edges:

    >>> from functools import partial
    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, SubgraphLoader
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> loader = SubgraphLoader(graph, np.eye(3, dtype="f"), ptr=[0, 2, 3], batch_size=1, device="cpu", backend="jax")
    >>> def forward(weights, histories, batch):
    ...     (source, target), targets, x = batch.edge_index, batch.size[1], batch.x
    ...     x = jax.ops.segment_sum((x @ weights[0])[source], target, targets)
    ...     x, histories = push_and_pull(histories, 0, jax.nn.relu(x), batch)
    ...     return jax.ops.segment_sum((x @ weights[1])[source], target, targets), histories
    >>> def loss_of(weights, histories, batch):
    ...     scores, histories = forward(weights, histories, batch)
    ...     return (scores**2).mean(where=batch.mask[:, None]), histories
    >>> @partial(jax.jit, donate_argnums=(0, 1))
    ... def step(weights, histories, batch):
    ...     gradients, histories = jax.grad(loss_of, has_aux=True)(weights, histories, batch)
    ...     return jax.tree.map(lambda weight, gradient: weight - gradient, weights, gradients), histories
    >>> weights, histories = [jnp.ones((3, 4)), jnp.ones((4, 2))], zero_histories(graph.num_nodes, [4])
    >>> for batch in loader.evaluation():
    ...     weights, histories = step(weights, histories, pad_subgraph(batch, graph.num_nodes))
    >>> age(histories, 0).tolist()
    [1, 1, 0]
    """
    table = _table(histories, layer)
    if not isinstance(batch, PaddedSubgraph):
        raise ArgumentTypeError(explain("batch", "a PaddedSubgraph", type(batch).__name__, "call pad_subgraph"))
    if framework_of(x) not in ("jax", "numpy") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = type(x).__name__ if framework_of(x) is None else f"{type(x).__name__} of {x.dtype}"
        raise ArgumentTypeError(explain("x", "an array of real numbers", got, "pass the layer's output"))
    (num_nodes, dim), targets = table.rows.shape, batch.size[1]
    if x.ndim != 2 or x.shape[0] < targets or x.shape[1] != dim:
        needs = f"shape [n, {dim}], n at least {targets}"
        raise ArgumentValueError(explain("x", needs, f"shape {x.shape}", "pass the layer's output"))
    if batch.num_nodes != num_nodes:
        remedy = "check that histories and batch belong together"
        raise ArgumentValueError(explain("batch", f"a graph of {num_nodes} nodes", batch.num_nodes, remedy))
    own, pushes = x[:targets], table.pushes + 1
    rows = _write(table.rows, batch.n_id[:targets], _stored(jax.lax.stop_gradient(own), table.rows.dtype))
    written = _write(table.written, batch.n_id[:targets], pushes)
    # Out of the table that was just written: with the old one, XLA would have to keep a copy.
    halo = jax.lax.stop_gradient(_loaded(_read(rows, batch.n_id[targets:]))).astype(x.dtype)
    table = Table(rows, written, pushes)
    return jnp.concatenate([own, halo]), (*histories[:layer], table, *histories[layer + 1 :])


def pull(histories: Histories, layer: int, n_id: Any) -> jax.Array:
    """Return rows of a table, [len(n_id), dim], as they are stored; zeros for ids that are no node."""
    return _loaded(_read(_table(histories, layer).rows, jnp.asarray(n_id)))


def age(histories: Histories, layer: int) -> jax.Array:
    """Return how many pushes ago each row of a table was written, int32 [num_nodes]; -1 for never."""
    table = _table(histories, layer)
    return jnp.where(table.written == 0, -1, table.pushes - table.written)


def _table(histories: Histories, layer: int) -> Table:
    _check_histories(histories)
    return histories[check_count(layer, "layer", 0, len(histories))]


def _check_histories(histories: Any) -> None:
    if not isinstance(histories, tuple) or not all(isinstance(table, Table) for table in histories):
        got = type(histories).__name__
        raise ArgumentTypeError(explain("histories", "a tuple of tables", got, "call zero_histories or from_store"))


def _write(rows: jax.Array, n_id: jax.Array, values: jax.Array) -> jax.Array:
    return rows.at[n_id].set(values, mode="drop", unique_indices=True)


_write_in_place = jax.jit(_write, donate_argnums=0)


def _read(rows: jax.Array, n_id: jax.Array) -> jax.Array:
    return rows.at[n_id].get(mode="fill", fill_value=0)


def _stored(values: jax.Array, dtype: Any) -> jax.Array:
    """Return values as a table of a dtype holds them."""
    if dtype != jnp.uint16:
        return values.astype(dtype)
    return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)


def _loaded(rows: jax.Array) -> jax.Array:
    """Return rows of a table as numbers."""
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def from_store(store: HistoryStore) -> Histories:
    """Return the rows and ages of a store, for instance of ``HistoryStore.load(path)``, as arrays of its device.

    Raises
    ------
    ArgumentTypeError
        It is no HistoryStore.
    """
    _check_store(store)
    nodes, histories = np.arange(store.num_nodes), []
    for layer, table in enumerate(store):
        rows, ages = table.pull(nodes), store.age(table=layer)
        written = np.where(ages < 0, 0, table.pushes - ages).astype(np.int32)
        if store.dtype == "bfloat16":
            rows = rows.view(np.uint16)
        # Copies that are JAX's own, which it can write in place.
        histories.append(Table(jnp.array(to_framework(rows)), jnp.array(written), jnp.int32(table.pushes)))
    return tuple(histories)


def to_store(histories: Histories, store: HistoryStore) -> None:
    """Push all rows that were ever written to a store, for instance to ``save`` them; each has the same age there.

    Parameters
    ----------
    histories : tuple of Table
        The tables.
    store : HistoryStore
        Of as many nodes, tables and columns. Its rows of nodes that were never pushed here stay as they are.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is no HistoryStore, or of other sizes; nothing is pushed then.
    """
    _check_store(store)
    _check_histories(histories)
    shapes = [table.rows.shape for table in histories]
    if shapes != [table.shape for table in store]:
        needs, got = f"tables of shapes {shapes}", f"{[table.shape for table in store]}"
        raise ArgumentValueError(explain("store", needs, got, "make it with the same num_nodes and dims"))
    for layer, kept in enumerate(store):
        ages = host_array(age(histories, layer), "histories")
        rows = host_array(pull(histories, layer, np.arange(store.num_nodes)), "histories")
        nodes = np.argsort(-ages, kind="stable")[: int((ages >= 0).sum())]  # the oldest first
        if len(nodes):
            # A push for each age: an empty one makes the rows of all earlier ones older, too.
            bounds = np.searchsorted(-ages[nodes], np.arange(1 - int(ages.max()), 1))
            for written in np.split(nodes, bounds):
                kept.push(rows[written], written)


def _check_store(store: Any) -> None:
    if not isinstance(store, HistoryStore):
        raise ArgumentTypeError(explain("store", "a HistoryStore", type(store).__name__, "make one, or load() it"))


def inference(
    layer: Callable[[int, jax.Array, PaddedSubgraph], jax.Array], num_layers: int, loader: Iterable[SubgraphBatch],
    num_nodes: int, steps: int = 8,
) -> jax.Array:  # fmt: skip
    """Return the exact outputs of all nodes, layer by layer: each over all batches, then the next, without histories.

    Parameters
    ----------
    layer : callable (index, x [P, dim], batch) -> array [n, dim]
        One layer; jit it with ``static_argnums=0``. n is at least ``batch.size[1]``.
    num_layers : int
        How many layers.
    loader : SubgraphLoader
        Over all parts, ``loader.evaluation()``; gone over once a layer.
    num_nodes, steps
        As for :func:`pad_subgraph`.

    Returns
    -------
    array [num_nodes, dim]
        In the numbering of the loader's graph.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used, or the loader has no batch.
    """
    x = None
    for index in range(check_count(num_layers, "num_layers", 1)):
        out = None
        for given in loader:
            batch = pad_subgraph(given, num_nodes, steps)
            rows = layer(index, batch.x if x is None else _read(x, batch.n_id), batch)[: batch.size[1]]
            if out is None:
                out = jnp.zeros((num_nodes, *rows.shape[1:]), rows.dtype)
            out = _write_in_place(out, batch.n_id[: batch.size[1]], rows)
        if out is None:
            raise ArgumentValueError(explain("loader", "a batch a layer", "none", "pass a loader, not its iterator"))
        x = out
    return x
