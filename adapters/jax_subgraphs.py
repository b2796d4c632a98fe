"""Batches of whole parts in few different shapes, for ``jax.jit``: what `jax_padding` is for sampled ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gglspeedup.adapters.jax import to_framework
from gglspeedup.adapters.jax_padding import empty_near, padded_count, padded_edges, padded_rows
from gglspeedup.arguments import check_count, out_of_range
from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.interchange import as_array
from gglspeedup.subgraphs import SubgraphBatch


@dataclass(frozen=True, eq=False)
class PaddedSubgraph:
    """A batch of whole parts whose shapes are rounded up: a pytree of JAX arrays, to be given to jitted functions.

    Rows are those of the batch's own nodes, at least one row that is no node, those of the halo, and further rows that
    are none.

    Attributes
    ----------
    x : array [P, F] or [P], or None
        Features; zeros where there is no node.
    y : array [S] or [S, C], or None
        Labels of the own nodes, then zeros.
    mask : bool array [S]
        Which of the first S rows are nodes.
    n_id : int array [P]
        The nodes. Where there is none, ids from `num_nodes` on, each once: scatters with ``mode="drop"`` leave them
        out, gathers with ``mode="fill"`` fill them.
    edge_index : int array [2, E]
        Sources and targets, sorted by target. Edges that were added lead from row 0 to row S - 1, which is no node.
    edge_weight : array [E] or [E, C], or None
        The edges' weights, then zeros.
    num_nodes : int
        Of the whole graph; static under ``jax.jit``.
    """

    x: jax.Array | None
    y: jax.Array | None
    mask: jax.Array
    n_id: jax.Array
    edge_index: jax.Array
    edge_weight: jax.Array | None
    num_nodes: int

    @property
    def size(self) -> tuple[int, int]:
        """The numbers of rows, (P, S): of all, and of those that are targets of edges; known while tracing."""
        return len(self.n_id), len(self.mask)


jax.tree_util.register_dataclass(
    PaddedSubgraph, ["x", "y", "mask", "n_id", "edge_index", "edge_weight"], ["num_nodes"]
)  # fmt: skip


def pad_subgraph(batch: SubgraphBatch, num_nodes: int, steps: int = 8) -> PaddedSubgraph:
    """Return a batch whose numbers of own nodes, nodes of the halo and edges are rounded up, so that few occur.

    Parameters
    ----------
    batch : SubgraphBatch
        Of a SubgraphLoader whose backend is ``"jax"``, ``"numpy"`` or ``"cupy"``.
    num_nodes : int
        Of the whole graph, which is how many rows the histories have.
    steps : int
        Sizes between two powers of two, as for :func:`gglspeedup.adapters.jax_padding.pad`.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        `batch` is no such batch or has nodes from `num_nodes` on, or `steps` is below 1.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, SubgraphLoader
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> loader = SubgraphLoader(graph, ptr=[0, 2, 3], batch_size=1, device="cpu", backend="jax")
    >>> batch = next(iter(loader.evaluation()))
    >>> padded = pad_subgraph(batch, graph.num_nodes)
    >>> padded.size, padded.mask.tolist(), padded.n_id.tolist()
    ((4, 3), [True, True, False], [0, 1, 5, 2])
    >>> batch.adj.edge_index.tolist(), padded.edge_index.tolist()
    ([[1, 2, 0], [0, 0, 1]], [[1, 3, 0], [0, 0, 1]])
    """
    num_nodes, steps = check_count(num_nodes, "num_nodes", 0), check_count(steps, "steps", 1)
    if not isinstance(batch, SubgraphBatch):
        needs, got = "a batch of a SubgraphLoader", type(batch).__name__
        raise ArgumentTypeError(explain("batch", needs, got, 'iterate over a SubgraphLoader(..., backend="jax")'))
    given, own = as_array(batch.n_id), batch.batch_size
    if len(given) and int(given.max()) >= num_nodes:
        position = int(given.argmax())
        raise out_of_range("batch.n_id", position, int(given[position]), num_nodes)
    # One more than there are, since added edges need a target of their own.
    targets = padded_count(own + 1, steps)
    size = targets + padded_count(len(given) - own, steps), targets
    n_id = empty_near(given, size[:1])
    n_id.fill(1)
    n_id = n_id.cumsum(dtype=np.int64) + (num_nodes - 1)  # NumPy's or CuPy's, which need not be imported for that
    n_id[:own], n_id[targets : targets + len(given) - own] = given[:own], given[own:]
    edge_index = padded_edges(batch.adj.edge_index, targets, steps)
    sources = edge_index[0, : batch.adj.edge_index.shape[1]]
    sources += (sources >= own) * (targets - own)
    return PaddedSubgraph(
        None if batch.x is None else _apart(as_array(batch.x), own, size),
        None if batch.y is None else padded_rows(batch.y, targets),
        padded_rows(given[:own] >= 0, targets),
        to_framework(n_id),
        to_framework(edge_index),
        None if batch.edge_weight is None else padded_rows(batch.edge_weight, edge_index.shape[1]),
        num_nodes,
    )


def _apart(rows: Any, own: int, size: tuple[int, int]) -> jax.Array:
    """Return rows of own nodes and of the halo in their places, with zeros in between."""
    total, targets = size
    halo = targets + len(rows) - own
    apart = empty_near(rows, (total, *rows.shape[1:]))
    apart[:own], apart[own:targets] = rows[:own], 0
    apart[targets:halo], apart[halo:] = rows[own:], 0
    return to_framework(apart)
