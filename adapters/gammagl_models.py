"""Models with histories for TensorLayerX, on GammaGL's layers.

GCN (Kipf and Welling, ICLR 2017), GAT (Veličković et al., ICLR 2018), APPNP (Gasteiger et al., ICLR 2019) and GCNII
(Chen et al., ICML 2020). They take the batches of a SubgraphLoader with ``backend="tensorlayerx"``, on any backend of
TensorLayerX that GammaGL's layers run on.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import tensorlayerx as tlx
from gammagl.layers.conv import GATConv, GCNConv, GCNIIConv, MessagePassing

from gglspeedup.adapters.scalable import Scalable
from gglspeedup.arguments import check_count, check_flag, check_fraction, check_widths


class _Model(Scalable, tlx.nn.Module):  # type: ignore[misc]
    """What the models share.

    Attributes
    ----------
    history_widths : tuple of int
        The `dims` of the HistoryStore that the model needs: one for each layer but the last.
    """

    def __init__(self, num_layers: Any, width: int, dropout: Any) -> None:
        super().__init__()
        self.num_layers = check_count(num_layers, "num_layers", 1)
        self.history_widths = (width,) * (self.num_layers - 1)
        self.dropout = check_fraction(dropout, "dropout")
        self._dropped = tlx.ops.Dropout(p=self.dropout)

    def _groups(self) -> tuple[list[Any], list[Any]]:
        return [*self.convs], [*self.lins]

    @property
    def reg_modules(self) -> Any:
        """The modules whose parameters, their `trainable_weights`, are regularised."""
        return tlx.nn.ModuleList(self._groups()[0])

    @property
    def nonreg_modules(self) -> Any:
        """The modules of all other parameters, which have a weight decay of their own."""
        return tlx.nn.ModuleList(self._groups()[1])

    def forward(self, batch: Any) -> Any:
        """Return the outputs of a batch's own nodes, [batch_size, out_channels]."""
        return self.all_layers(batch)

    def _drop(self, x: Any) -> Any:
        return self._dropped(x) if self.is_train and self.dropout else x


class WeightedGCNConv(GCNConv):  # type: ignore[misc]
    """GCNConv on edges that are weighted already; it has as many outputs as it is told.

    GammaGL's own, also with ``norm="none"``, puts the largest id among the edges in the place of `num_nodes`: too few
    rows where the last nodes have no edge, too many where there are more sources than targets, an error without edges.
    """

    def forward(self, x: Any, edge_index: Any, edge_weight: Any = None, num_nodes: Any = None) -> Any:
        """Return the rows of the first `num_nodes` nodes."""
        x = self.propagate(self.linear(x), edge_index, edge_weight=edge_weight, num_nodes=num_nodes)
        return x + self.bias


def _linears(widths: list[int]) -> Any:
    pairs = itertools.pairwise(widths)
    return tlx.nn.ModuleList([
        tlx.nn.Linear(in_features=one, out_features=other, W_init="xavier_uniform") for one, other in pairs
    ])  # fmt: skip


class GCN(_Model):
    """Graph convolutional network: GCNConv, with ReLU in between; the last layer is not regularised.

    Batches carry the weights of :func:`gglspeedup.normalise.symmetric_normalisation`; without any, each edge weighs 1.
    GammaGL's own normalisation is left out.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels : int
        Width of the features, of what is between layers, and of the output.
    num_layers : int
        How many layers.
    dropout : float
        Fraction of each layer's input that is dropped in training.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, HistoryStore, SubgraphLoader, partition, permute
    >>> from gglspeedup.adapters.gammagl_models import GCN
    >>> from gglspeedup.normalise import symmetric_normalisation
    >>> ring = CSRGraph(np.arange(0, 21, 2), np.stack([np.arange(-1, 9), np.arange(1, 11)], axis=1).ravel() % 10)
    >>> graph, weight = symmetric_normalisation(ring)
    >>> perm, ptr = partition(graph, 5, "contiguous")
    >>> graph = permute(graph, perm)
    >>> x, weight = np.eye(10, dtype=np.float32)[perm], weight[graph.edge_ids]
    >>> options = {"ptr": ptr, "batch_size": 2, "edge_weight": weight, "backend": "tensorlayerx", "device": "cpu"}
    >>> loader = SubgraphLoader(graph, x, **options)
    >>> model = GCN(10, 8, 3, num_layers=2, dropout=0.5)
    >>> model.histories = HistoryStore(10, model.history_widths, "cpu")
    >>> [tuple(model(batch).shape) for batch in loader]
    [(4, 3), (4, 3), (2, 3)]
    >>> model.set_eval()
    >>> tuple(model.inference(loader.evaluation()).shape)
    (10, 3)
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 2, dropout: float = 0.5
    ) -> None:
        first, hidden, last = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, hidden, dropout)
        pairs = itertools.pairwise((first, *self.history_widths, last))
        self.convs = tlx.nn.ModuleList([WeightedGCNConv(*pair, norm="none") for pair in pairs])

    def _groups(self) -> tuple[list[Any], list[Any]]:
        *others, last = self.convs
        return others, [last]

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        x = self.convs[index](self._drop(x), batch.adj.edge_index, batch.edge_weight, batch.batch_size)
        return x if index == self.num_layers - 1 else tlx.relu(x)


class GAT(_Model):
    """Graph attention network: GATConv, heads joined, with ELU in between; the last layer's heads are averaged.

    The graph has self-loops (:func:`gglspeedup.normalise.with_self_loops`); edge weights are not looked at.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels : int
        Width of the features, of each head between layers, and of the output.
    num_layers : int
        How many layers.
    heads, out_heads : int
        Heads of all layers but the last, and of the last.
    dropout : float
        Fraction of each layer's input and attention that is dropped in training.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 2, heads: int = 8,
        out_heads: int = 1, dropout: float = 0.6,
    ) -> None:  # fmt: skip
        first, hidden, last = check_widths(in_channels, hidden_channels, out_channels)
        heads, out_heads = check_count(heads, "heads", 1), check_count(out_heads, "out_heads", 1)
        super().__init__(num_layers, hidden * heads, dropout)
        *inputs, last_input = (first, *self.history_widths)
        convs = [GATConv(width, hidden, heads, dropout_rate=self.dropout) for width in inputs]
        convs.append(GATConv(last_input, last, out_heads, concat=False, dropout_rate=self.dropout))
        self.convs = tlx.nn.ModuleList(convs)

    def _groups(self) -> tuple[list[Any], list[Any]]:
        return [*self.convs], []

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        conv = self.convs[index]
        conv.dropout.is_train = self.is_train  # on torch, set_eval() reaches a model's children, and not theirs
        x = conv(self._drop(x), batch.adj.edge_index, batch.batch_size)
        return x if index == self.num_layers - 1 else tlx.elu(x)


class APPNP(_Model):
    """A perceptron of two layers, the first of them regularised, whose outputs spread as personalised PageRank.

    Each propagation is a layer, with a history as wide as the output. Edge weights as for :class:`GCN`.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels, dropout
        Of the perceptron, as :class:`GCN`'s.
    num_layers : int
        How many propagations.
    alpha : float
        Share of the perceptron's output in each propagation's.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 10, alpha: float = 0.1,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        widths = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, widths[2], dropout)
        self.alpha = check_fraction(alpha, "alpha")
        self.lins = _linears(widths)
        # The base of GammaGL's layers: APPNPConv runs all propagations at once, each of which is a layer here,
        # transforms its input anew, and in training drops nine of ten edges, and again nine of ten of what is left.
        self.propagation = MessagePassing()

    def _groups(self) -> tuple[list[Any], list[Any]]:
        first, second = self.lins
        return [first], [second]

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a propagation's output, as :meth:`Scalable.layer` does."""
        if "initial" not in state:
            initial = self.lins[1](self._drop(tlx.relu(self.lins[0](self._drop(batch.x)))))
            state["initial"] = self.alpha * initial[: batch.batch_size]
            x = x if index else initial
        x = self.propagation.propagate(
            x, batch.adj.edge_index, edge_weight=batch.edge_weight, num_nodes=batch.batch_size
        )  # fmt: skip
        return state["initial"] + (1 - self.alpha) * x


class GCNII(_Model):
    """Deep graph convolutional network: GCNIIConv, with initial residuals and identity mappings, between linear layers.

    The convolutions are regularised, the linear layers are not. Edge weights as for :class:`GCN`.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels, num_layers, dropout
        As :class:`GCN`'s.
    alpha, theta : float
        Strength of the initial residuals, and of the layers' weights against the identity.
    shared_weights : bool
        Whether a layer has the same weights for its input and for the initial rows.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 64, alpha: float = 0.1,
        theta: float = 0.5, shared_weights: bool = True, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        widths = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, widths[1], dropout)
        alpha, variant = check_fraction(alpha, "alpha"), not check_flag(shared_weights, "shared_weights")
        theta = check_fraction(theta, "theta", math.inf)
        self.lins = _linears(widths)
        # GCNIIConv takes the share of the weights itself, not what it follows from.
        shares = [math.log(theta / depth + 1) for depth in range(1, self.num_layers + 1)]
        self.convs = tlx.nn.ModuleList([GCNIIConv(widths[1], widths[1], alpha, share, variant) for share in shares])

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        if "initial" not in state:
            initial = tlx.relu(self.lins[0](self._drop(batch.x)))
            state["initial"] = initial[: batch.batch_size]  # as many as come out
            x = x if index else initial
        x = self.convs[index](
            state["initial"], self._drop(x), batch.adj.edge_index, batch.edge_weight, batch.batch_size
        )  # fmt: skip
        x = tlx.relu(x)
        return x if index < self.num_layers - 1 else self.lins[1](self._drop(x))
