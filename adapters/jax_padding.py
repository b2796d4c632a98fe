"""Batches of few different shapes, for ``jax.jit``, which compiles anew for every shape that it meets.

No two sampled batches are alike in their numbers of nodes and edges, and a compilation takes as long as thousands of
steps. :func:`pad` rounds these numbers up and fills what is added with rows and edges that no seed ever sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from gglspeedup.adapters.jax import to_framework
from gglspeedup.adjs import Adj
from gglspeedup.arguments import check_count
from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.interchange import as_array
from gglspeedup.loader import Batch
from gglspeedup.memory import aligned_empty


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A batch of JAX arrays whose shapes are rounded up; the real seeds, nodes and edges come first in each.

    Attributes
    ----------
    x : array [P0, F] or [P0], or None
        Features, then zeros.
    y : array [S] or [S, C], or None
        Labels of the seeds, then zeros, where S is ``adjs[-1].size[1]``.
    mask : bool array [S]
        Which of these are seeds.
    n_id : int array [P0]
        The seeds, the other nodes, then zeros.
    adjs : list of Adj
        Outermost hop first. Each has padded sizes; edges that were added lead from source 0 to the last target, which
        is none of the batch's nodes. `e_id` ends in zeros.
    batch_size : int
        The number of seeds.
    batch : int
        The batch number that the draws were made with.
    """

    x: jax.Array | None
    y: jax.Array | None
    mask: jax.Array
    n_id: jax.Array
    adjs: list[Adj]
    batch_size: int
    batch: int

    @property
    def edges(self) -> list[jax.Array]:
        """The edges of each hop, int [2, P]: what a jitted function takes as an argument."""
        return [adj.edge_index for adj in self.adjs]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The numbers of sources and targets of each hop: what it takes as a static argument."""
        return tuple(adj.size for adj in self.adjs)


def pad(batch: Batch, steps: int = 8) -> PaddedBatch:
    """Return a batch whose shapes are rounded up, so that few different ones occur.

    Every number of nodes, plus one, and every number of edges is rounded up by at most 1/`steps` of the power of two
    below it. Edges stay sorted by target, and targets the first of the sources.

    Parameters
    ----------
    batch : Batch
        Of a NodeLoader whose backend is ``"jax"``, ``"numpy"`` or ``"cupy"``.
    steps : int
        Sizes between two powers of two: 8 adds up to an eighth; 1 up to as much again, and compiles least.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        `batch` is no such batch, or `steps` is below 1.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, NodeLoader
    >>> loader = NodeLoader(CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), seeds=[1], sizes=[2, 2], batch_size=1, backend="jax")
    >>> (batch,) = loader
    >>> padded = pad(batch, steps=2)
    >>> [adj.size for adj in batch.adjs], padded.sizes
    ([(3, 2), (2, 1)], ((4, 3), (3, 2)))
    >>> batch.adjs[0].edge_index.tolist(), padded.edges[0].tolist()
    ([[1, 0, 2], [0, 1, 1]], [[1, 0, 2], [0, 1, 1]])
    >>> padded.mask.tolist()
    [True, False]

    A jitted function takes the sizes as a static argument, and a loss counts the seeds alone:

    >>> @jax.jit(static_argnames="sizes")
    ... def forward(weights, x, edges, sizes):
    ...     for weight, (source, target), (_, targets) in zip(weights, edges, sizes):
    ...         x = jax.ops.segment_sum(x[source], target, targets) @ weight
    ...     return x
    """
    steps = check_count(steps, "steps", 1)
    if not isinstance(batch, Batch):
        needs, got = "a batch of a NodeLoader", type(batch).__name__
        raise ArgumentTypeError(explain("batch", needs, got, 'iterate over a NodeLoader(..., backend="jax")'))
    # One more than there are, since added edges need a target of their own.
    nodes = [padded_count(count + 1, steps) for count in (len(batch.n_id), *(adj.size[1] for adj in batch.adjs))]
    adjs = [
        _padded_adj(adj, (sources, targets), steps)
        for adj, sources, targets in zip(batch.adjs, nodes, nodes[1:], strict=False)
    ]
    return PaddedBatch(
        None if batch.x is None else padded_rows(batch.x, nodes[0]),
        None if batch.y is None else padded_rows(batch.y, nodes[-1]),
        padded_rows(as_array(batch.n_id)[: batch.batch_size] >= 0, nodes[-1]),
        padded_rows(batch.n_id, nodes[0]),
        adjs,
        batch.batch_size,
        batch.batch,
    )


def padded_count(count: int, steps: int) -> int:
    """Return a count rounded up to one of at most `steps` numbers between two powers of two, evenly spaced.

    Examples
    --------
    >>> [padded_count(count, 4) for count in (0, 1, 5, 100, 113, 129)]
    [0, 1, 5, 112, 128, 160]
    """
    power = 1 << count.bit_length() >> 1  # the one below; 0 for 0
    step = max(1, -(-power // steps))
    return min(power + -(-(count - power) // step) * step, 2 * power)


def _padded_adj(adj: Adj, size: tuple[int, int], steps: int) -> Adj:
    padded = padded_edges(adj.edge_index, size[1], steps)
    e_id = None if adj.e_id is None else padded_rows(adj.e_id, padded.shape[1])
    return Adj(to_framework(padded), e_id, size)


def padded_edges(edge_index: Any, targets: int, steps: int) -> Any:
    """Return a NumPy or CuPy array of edges, to which some from source 0 to the last target are added."""
    given = as_array(edge_index)
    edges = given.shape[1]
    padded = empty_near(given, (2, padded_count(edges, steps)))
    padded[:, :edges] = given
    padded[0, edges:] = 0
    padded[1, edges:] = targets - 1
    return padded


def padded_rows(array: Any, count: int) -> jax.Array:
    """Return a JAX array with rows of zeros added. Done by NumPy or CuPy: JAX would compile for each shape."""
    rows = as_array(array)
    padded = empty_near(rows, (count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    padded[len(rows) :] = 0
    return to_framework(padded)


def empty_near(like: Any, shape: tuple[int, ...]) -> Any:
    """Return an uninitialised array where another lives, aligned for JAX to take it as it is."""
    if isinstance(like, np.ndarray):
        count = int(np.prod(shape))
        return aligned_empty(count * like.dtype.itemsize).view(like.dtype).reshape(shape)
    import cupy

    return cupy.empty(shape, like.dtype)
