"""`Scalable`: histories for a model of any framework, one line a layer (GNNAutoScale)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gglspeedup.adapters import backend
from gglspeedup.arguments import host_array, host_ids
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
    num_layers : int
        For models that define :meth:`layer`: how many they have.

    Notes
    -----
    Fey et al., "GNNAutoScale: scalable and expressive graph neural networks via historical embeddings" (ICML 2021),
    section 3. In evaluation rows are pushed as well: a pass over all parts brings the histories up to date.

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
    ...     def forward(self, batch):
    ...         x = batch.x
    ...         for layer, convolution in enumerate(self.convolutions[:-1]):
    ...             x = convolution(x, batch.adj.edge_index, batch.edge_weight).relu()
    ...             x = self.push_and_pull(layer, x, batch)
    ...         return self.convolutions[-1](x, batch.adj.edge_index, batch.edge_weight)[: batch.batch_size]

    The same for :meth:`inference`, which needs the layers one by one, and then brings its own loop over them:

    >>> class Layered(Scalable, torch.nn.Module):
    ...     def __init__(self, convolutions, histories=None):
    ...         super().__init__()
    ...         self.convolutions, self.histories = torch.nn.ModuleList(convolutions), histories
    ...         self.num_layers = len(convolutions)
    ...
    ...     def layer(self, index, x, batch, state):
    ...         x = self.convolutions[index](x, batch.adj.edge_index, batch.edge_weight)
    ...         return x if index == self.num_layers - 1 else x.relu()
    ...
    ...     def forward(self, batch):
    ...         return self.all_layers(batch)
    """

    histories: HistoryStore | None = None
    num_layers: int

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

    def _start_pulls(self, batch: Any) -> None:
        if self.histories is not None and self.histories.storage != "device":
            self.prefetch(batch)

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return one layer's output for the rows of a batch: to be defined by models that call what follows.

        Parameters
        ----------
        index : int
            0 to ``num_layers - 1``.
        x : tensor [len(batch.n_id), dim]
            Its input: ``batch.x`` for the first layer, what :meth:`push_and_pull` returned for the others.
        batch : SubgraphBatch
            The batch.
        state : dict
            Empty at the first layer that is run on a batch: what layers compute once and share, such as the initial
            rows of APPNP and GCNII. Each of them has to be able to make it, as :meth:`inference` runs them alone.

        Returns
        -------
        tensor [n, dim], n at least ``batch.batch_size``
            The first rows are those of the batch's own nodes; what follows is not looked at.
        """
        raise NotImplementedError

    def all_layers(self, batch: Any) -> Any:
        """Return the last layer's output for a batch's own nodes; histories are pushed and pulled in between.

        Pulls from histories outside the device are started before the first layer.
        """
        self._start_pulls(batch)
        x, state = batch.x, dict[str, Any]()
        for index in range(self.num_layers - 1):
            x = self.push_and_pull(index, self.layer(index, x, batch, state), batch)
        return self.layer(self.num_layers - 1, x, batch, state)[: batch.batch_size]

    def inference(self, loader: Iterable[Any]) -> Any:
        """Return the exact outputs of all nodes, layer by layer: each over all batches, then the next.

        One batch is in memory at a time, and no row is stale; the histories hold the exact rows of every layer when it
        returns. In torch and Paddle, call it under ``no_grad()``, with the model in evaluation.

        Parameters
        ----------
        loader : SubgraphLoader
            Over all parts, ``loader.evaluation()``; gone over once a layer.

        Returns
        -------
        NumPy array [num_nodes, dim]
            In the numbering of the loader's graph.

        Raises
        ------
        ArgumentTypeError
            The model has no histories.
        """
        store = self.histories
        if store is None:
            raise ArgumentTypeError(explain("histories", "a HistoryStore", "None", "set one, or call the model"))
        out, none = None, None
        for index in range(self.num_layers):
            for batch in loader:
                x = batch.x
                if index:
                    # In the dtype of the last layer's output, which need not be that of the histories.
                    adapter = backend(framework_of(none) or "numpy")
                    x = adapter.concatenate(none, adapter.to_framework(store[index - 1].pull(batch.n_id)))
                rows = self.layer(index, x, batch, {})[: batch.batch_size]
                if index < self.num_layers - 1:
                    store[index].push(rows, offset=batch.offset, count=batch.count)
                    continue
                last = host_array(rows, "rows")
                if out is None:
                    out = np.zeros((store.num_nodes, *last.shape[1:]), last.dtype)
                out[host_ids(batch.n_id, "n_id")[: batch.batch_size]] = last
            none = rows[:0]
        return out
