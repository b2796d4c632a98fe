"""`Scalable`: histories for a model of any framework, one line a layer (GNNAutoScale)."""

from __future__ import annotations

from typing import Any

from gglspeedup.adapters import backend
from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.history.store import HistoryStore
from gglspeedup.interchange import framework_of


class Scalable:
    """Gives a model histories: mix it in, set `histories`, and call :meth:`push_and_pull` between two layers.

    Layer by layer, a batch of whole parts (`SubgraphLoader`) computes the rows of its own nodes. Those of its halo come
    from the last batch that computed them. Gradients flow through the batch's own rows alone.

    Attributes
    ----------
    histories : HistoryStore or None
        One table for each layer but the last, as wide as that layer's output. None: the model sees whole graphs, and
        :meth:`push_and_pull` returns what it is given.

    Notes
    -----
    Fey et al., "GNNAutoScale: scalable and expressive graph neural networks via historical embeddings" (ICML 2021),
    section 3. In evaluation rows are pushed as well: a pass over all parts brings the histories up to date, and as many
    passes as the model has layers make the last one's outputs exact.

    Examples
    --------
    A model of PyG's layers; those of other frameworks differ in nothing that is shown here:

    >>> import torch
    >>> from gglspeedup import HistoryStore
    >>> from gglspeedup.adapters.scalable import Scalable
    >>> class Model(Scalable, torch.nn.Module):
    ...     def __init__(self, convolutions, histories=None):
    ...         super().__init__()
    ...         self.convolutions, self.histories = torch.nn.ModuleList(convolutions), histories
    ...
    ...     def forward(self, x, batch):
    ...         for layer, convolution in enumerate(self.convolutions[:-1]):
    ...             x = convolution(x, batch.adj.edge_index, batch.edge_weight).relu()
    ...             x = self.push_and_pull(layer, x, batch)
    ...         return self.convolutions[-1](x, batch.adj.edge_index, batch.edge_weight)[: batch.batch_size]
    """

    histories: HistoryStore | None = None

    def push_and_pull(self, layer: int, x: Any, batch: Any) -> Any:
        """Return the rows of all nodes of a batch: its own, which are pushed, and those of its halo, pulled.

        Parameters
        ----------
        layer : int
            Which table of the histories.
        x : tensor [n, dim], n at least ``batch.batch_size``
            The layer's output; the first rows are those of the batch's own nodes.
        batch : SubgraphBatch
            The batch; its `n_id`, `batch_size`, `offset` and `count` are looked at.

        Returns
        -------
        tensor [len(batch.n_id), dim]
            Of the dtype of `x`. `x` itself if there are no histories.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            `x` is no tensor of a framework, or is not as wide as the table.
        """
        if self.histories is None:
            return x
        framework = framework_of(x)
        if framework is None:
            got = f"{type(x).__module__}.{type(x).__qualname__}"
            raise ArgumentTypeError(explain("x", "a tensor of a framework", got, "pass the layer's output"))
        size, table = batch.batch_size, self.histories[layer]
        own = x[:size]
        table.push(own, offset=batch.offset, count=batch.count)
        if len(batch.n_id) == size:
            return own
        adapter = backend(framework)
        return adapter.concatenate(own, adapter.to_framework(table.pull(batch.n_id[size:])))

    def prefetch(self, batch: Any) -> None:
        """Start the pulls of a batch's halo from all tables, which its own pushes do not touch."""
        if self.histories is not None and len(batch.n_id) > batch.batch_size:
            self.histories.prefetch(batch.n_id[batch.batch_size :])
