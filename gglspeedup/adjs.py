"""What a sampler returns: bipartite adjacencies, hop by hop, and the batch that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple


class Adj(NamedTuple):
    """The edges of one hop, in local ids; the fields and their order are those of PyG, quiver and GammaGL.

    Attributes
    ----------
    edge_index : int64 array [2, E]
        Row 0 the local sources, row 1 the local targets; sorted by target.
    e_id : int64 array [E]
        Positions in the graph's ``indices``, or the graph's own ``edge_ids``.
    size : (int, int)
        Numbers of source and of target nodes; the targets are the first of the sources.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, GPUSampler
    >>> sampler = GPUSampler("cpu", CSRGraph([0, 1, 1], [1]), [-1])
    >>> n_id, (adj,) = sampler.sample([0])
    >>> adj.row.tolist(), adj.col.tolist(), adj.size
    ([1], [0], (2, 1))
    """

    edge_index: Any
    e_id: Any
    size: tuple[int, int]

    @property
    def row(self) -> Any:
        """Local sources, int64 [E], a view."""
        return self.edge_index[0]

    @property
    def col(self) -> Any:
        """Local targets, int64 [E], a view."""
        return self.edge_index[1]

    def to(self, *args: Any, **kwargs: Any) -> Adj:
        """Return the adjacency with its tensors moved by their own ``.to(...)``, as PyG's does."""
        e_id = None if self.e_id is None else self.e_id.to(*args, **kwargs)
        return Adj(self.edge_index.to(*args, **kwargs), e_id, self.size)

    def convert(self, backend: str) -> Adj:
        """Return the adjacency with arrays of a backend by its name, sharing memory where both sides allow it.

        Parameters
        ----------
        backend : str
            One of ``gglspeedup.adapters.BACKENDS``.
        """
        to_framework = import_module("gglspeedup.adapters").backend(backend).to_framework
        return Adj(to_framework(self.edge_index), to_framework(self.e_id), self.size)

    def cp2torch(self) -> Adj:
        """Return the adjacency with torch tensors on the same device, sharing memory."""
        return self.convert("torch")

    def cp2tf(self) -> Adj:
        """Return the adjacency with TensorFlow tensors on the same device, sharing memory."""
        return self.convert("tensorflow")

    def cp2pd(self) -> Adj:
        """Return the adjacency with Paddle tensors on the same device, sharing memory."""
        return self.convert("paddle")

    def cp2tlx(self) -> Adj:
        """Return the adjacency with tensors of TensorLayerX's active backend, sharing memory."""
        return self.convert("tensorlayerx")

    def cp2jax(self) -> Adj:
        """Return the adjacency with JAX arrays on the same device, sharing memory.

        JAX has 64-bit integers only with ``jax_enable_x64``; without it these are 32-bit copies.
        """
        return self.convert("jax")


@dataclass(frozen=True, eq=False)
class SampledBatch:
    """One sampled batch; it unpacks as ``n_id, adjs``.

    Attributes
    ----------
    n_id : int64 array [N0]
        The seeds in their order, then every other node once, hop by hop, by first occurrence.
    adjs : list of Adj
        Outermost hop first.
    batch_size : int
        The number of seeds.
    batch : int
        The batch number that the draws were made with.
    """

    n_id: Any
    adjs: list[Adj]
    batch_size: int
    batch: int

    @property
    def seeds(self) -> Any:
        """The seeds, int64 [batch_size], a view of n_id."""
        return self.n_id[: self.batch_size]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.n_id, self.adjs))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> Any:
        return (self.n_id, self.adjs)[item]
