"""Models with histories for torch, on PyG's layers.

GCN (Kipf and Welling, ICLR 2017), GAT (Veličković et al., ICLR 2018), APPNP (Gasteiger et al., ICLR 2019), GCNII (Chen
et al., ICML 2020), GIN (Xu et al., ICLR 2019), PNA (Corso et al., NeurIPS 2020), and PNA with jumping knowledge (Xu et
al., ICML 2018). They take the batches of a SubgraphLoader with ``backend="torch"``.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Linear, ModuleList, functional

from gglspeedup.adapters import backend
from gglspeedup.adapters.recompute import Recomputed
from gglspeedup.arguments import check_count, check_flag, check_fraction, check_widths, host_array
from gglspeedup.errors import ArgumentValueError, explain

with warnings.catch_warnings():
    # PyG compiles a few of its operators with torch.jit.script, which newer torch releases call deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import MLP, GATConv, GCN2Conv, GCNConv, GINConv, PNAConv, SimpleConv

    # Once a process torch says that CSR tensors are in beta; what is used of them here is tested.
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)

_SPARSE_PRODUCTS = torch.backends.mkl.is_available()  # of CSR matrices and their transposes, on a CPU


class _Model(Recomputed, torch.nn.Module):  # type: ignore[misc]
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
        self.convs, self.lins = ModuleList(), ModuleList()

    def _groups(self) -> tuple[ModuleList, ModuleList]:
        return self.convs, self.lins

    @property
    def reg_modules(self) -> ModuleList:
        """The modules whose parameters are regularised."""
        return self._groups()[0]

    @property
    def nonreg_modules(self) -> ModuleList:
        """The modules of all other parameters, which have a weight decay of their own."""
        return self._groups()[1]

    def reset_parameters(self) -> None:
        """Draw all parameters anew; the histories stay as they are."""
        for module in (*self.convs, *self.lins):
            module.reset_parameters()

    def forward(self, batch: Any) -> Any:
        """Return the outputs of a batch's own nodes, [batch_size, out_channels]."""
        return self.all_layers(batch)

    def _drop(self, x: Any) -> Any:
        if not (self.training and self.dropout):
            return x
        if x.layout == torch.sparse_csr:
            values = self._drop(x.values())  # what is not stored is zero, dropped or not
            return torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape, check_invariants=False)
        if not x.is_cpu:
            return functional.dropout(x, self.dropout)
        # The same, but on a CPU torch draws Bernoulli variables at four times the cost of uniform ones.
        return x * torch.rand_like(x).ge_(self.dropout).mul_(1 / (1 - self.dropout))


def _edges(batch: Any, state: dict[str, Any], *, weighted: bool = True) -> tuple[Any, ...]:
    """Return a batch's edges as PyG's layers take them.

    Where CSR matrices can be multiplied: one, [batch_size, N0], whose products read the rows of `x` in place and give
    those of the batch's own nodes alone. Elsewhere: ``(edge_index, edge_weight)``, of which layers make messages.
    """
    if "edges" not in state:
        edge_index, weight = batch.adj.edge_index, batch.edge_weight if weighted else None
        product = _SPARSE_PRODUCTS and edge_index.is_cpu and batch.x.dtype in (torch.float32, torch.float64)
        state["edges"] = (_matrix(batch, weight),) if product else (edge_index, weight)
    return tuple(state["edges"])


def _matrix(batch: Any, weight: Any) -> Any:
    (sources, targets), shape = batch.adj.edge_index, (batch.batch_size, len(batch.n_id))
    begin = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(targets, minlength=shape[0]), 0, out=begin[1:])  # edges are sorted by target
    values = torch.ones(len(sources), dtype=batch.x.dtype) if weight is None else weight.to(batch.x.dtype)
    # MKL counts in 32 bits: wider indices are converted anew for each product.
    narrow = torch.int32 if max(len(sources), shape[1]) < 1 << 31 else torch.int64
    return torch.sparse_csr_tensor(begin.to(narrow), sources.to(narrow), values, shape, check_invariants=False)


class GCN(_Model):
    """Graph convolutional network: GCNConv, with ReLU in between; the last layer is not regularised.

    Batches carry the weights of :func:`gglspeedup.normalise.symmetric_normalisation`; without any, each edge weighs 1.
    As for all models here, ``batch.x`` may be sparse CSR, of which only stored values are dropped.

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
    >>> from gglspeedup.adapters.pyg_models import GCN
    >>> from gglspeedup.normalise import symmetric_normalisation
    >>> ring = CSRGraph(np.arange(0, 21, 2), np.stack([np.arange(-1, 9), np.arange(1, 11)], axis=1).ravel() % 10)
    >>> graph, weight = symmetric_normalisation(ring)
    >>> perm, ptr = partition(graph, 5, "contiguous")
    >>> graph = permute(graph, perm)
    >>> x, weight = np.eye(10, dtype=np.float32)[perm], weight[graph.edge_ids]
    >>> loader = SubgraphLoader(graph, x, ptr=ptr, batch_size=2, edge_weight=weight, backend="torch", device="cpu")
    >>> model = GCN(10, 8, 3, num_layers=2, dropout=0.5)
    >>> model.histories = HistoryStore(10, model.history_widths, "cpu")
    >>> [tuple(model(batch).shape) for batch in loader]
    [(4, 3), (4, 3), (2, 3)]
    >>> with torch.no_grad():
    ...     model.eval().inference(loader.evaluation()).shape
    (10, 3)
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 2, dropout: float = 0.5
    ) -> None:
        first, hidden, last = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, hidden, dropout)
        widths = (first, *self.history_widths, last)
        self.convs.extend(GCNConv(*pair, normalize=False) for pair in itertools.pairwise(widths))

    def _groups(self) -> tuple[ModuleList, ModuleList]:
        return self.convs[:-1], self.convs[-1:]

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        x = self.convs[index](self._drop(x), *_edges(batch, state))[: batch.batch_size]
        return x if index == self.num_layers - 1 else x.relu()


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
        options: dict[str, Any] = {"dropout": self.dropout, "add_self_loops": False}
        self.convs.extend(GATConv(width, hidden, heads, **options) for width in inputs)
        self.convs.append(GATConv(last_input, last, out_heads, concat=False, **options))

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        # Of a pair (x, x[:batch_size]) the layer would transform the batch's own rows twice.
        x = self.convs[index](self._drop(x), batch.adj.edge_index)[: batch.batch_size]
        return x if index == self.num_layers - 1 else functional.elu(x)


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
        self.lins.extend(Linear(*pair) for pair in itertools.pairwise(widths))
        self.propagation = SimpleConv("sum")

    def _groups(self) -> tuple[ModuleList, ModuleList]:
        return self.lins[:1], self.lins[1:]

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a propagation's output, as :meth:`Scalable.layer` does."""
        if "initial" not in state:
            initial = self.lins[1](self._drop(self.lins[0](self._drop(batch.x)).relu()))
            state["initial"] = self.alpha * initial[: batch.batch_size]
            x = x if index else initial
        x = self.propagation(x, *_edges(batch, state))[: batch.batch_size]
        return state["initial"] + (1 - self.alpha) * x


class GCNII(_Model):
    """Deep graph convolutional network: GCN2Conv, with initial residuals and identity mappings, between linear layers.

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
        alpha, shared = check_fraction(alpha, "alpha"), check_flag(shared_weights, "shared_weights")
        theta = check_fraction(theta, "theta", math.inf)
        self.lins.extend(Linear(*pair) for pair in itertools.pairwise(widths))
        depths = range(1, self.num_layers + 1)
        self.convs.extend(GCN2Conv(widths[1], alpha, theta, depth, shared, normalize=False) for depth in depths)

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        edges = _edges(batch, state)
        if "initial" not in state:
            initial = self.lins[0](self._drop(batch.x)).relu()
            state["initial"] = initial[: batch.batch_size] if len(edges) == 1 else initial  # as many as come out
            x = x if index else initial
        x = self.convs[index](self._drop(x), state["initial"], *edges)[: batch.batch_size].relu()
        return x if index < self.num_layers - 1 else self.lins[1](self._drop(x))


class GIN(_Model):
    """Graph isomorphism network: GINConv around a perceptron, plus the layer's input, between linear layers.

    The convolutions are regularised, the linear layers are not. Edge weights are not looked at.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels, num_layers, dropout
        As :class:`GCN`'s.
    batch_norm : bool
        Whether the perceptrons normalise over a batch's own nodes.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int = 4, batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        widths = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, widths[1], dropout)
        norm = "batch_norm" if check_flag(batch_norm, "batch_norm") else None
        self.lins.extend(Linear(*pair) for pair in itertools.pairwise(widths))
        self.convs.extend(
            GINConv(MLP([widths[1]] * 3, norm=norm, plain_last=False), train_eps=True) for _ in range(self.num_layers)
        )

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        if not index:
            x = self.lins[0](self._drop(x)).relu()
        dropped, edges = self._drop(x), _edges(batch, state, weighted=False)
        x = x[: batch.batch_size] + self.convs[index]((dropped, dropped[: batch.batch_size]), edges[0])
        return x if index < self.num_layers - 1 else self.lins[1](x)


class PNA(_Model):
    """Principal neighbourhood aggregation: PNAConv, with ReLU after it, between linear layers.

    The convolutions are regularised, the linear layers are not. Edge weights are not looked at.

    Parameters
    ----------
    in_channels, hidden_channels, out_channels, num_layers, dropout
        As :class:`GCN`'s.
    deg : int array-like or tensor [D]
        How many nodes have 0, 1, 2, ... in-neighbours: ``numpy.bincount(graph.degree())``.
    aggregators, scalers : sequence of str
        As PNAConv's.
    towers : int
        Groups of hidden channels that each have weights of their own; must divide `hidden_channels`.
    """

    _jumps = False

    def __init__(
        self, in_channels: int, hidden_channels: int, out_channels: int, deg: Any, num_layers: int = 3,
        aggregators: Sequence[str] = ("mean", "min", "max", "std"),
        scalers: Sequence[str] = ("identity", "amplification", "attenuation"), towers: int = 1, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        first, hidden, last = check_widths(in_channels, hidden_channels, out_channels)
        super().__init__(num_layers, hidden, dropout)
        if hidden % check_count(towers, "towers", 1):
            raise ArgumentValueError(explain("towers", f"a divisor of {hidden} hidden channels", towers, "choose one"))
        counts = torch.as_tensor(host_array(deg, "deg"))
        if counts.ndim != 1 or not counts.sum() > 0:
            needs, remedy = "numbers of nodes by degree", "pass numpy.bincount(graph.degree())"
            raise ArgumentValueError(explain("deg", needs, f"shape {tuple(counts.shape)}", remedy))
        options: dict[str, Any] = {"towers": towers, "divide_input": True}
        joined = self.num_layers + 1 if self._jumps else 1
        self.lins.extend([Linear(first, hidden), Linear(joined * hidden, last)])
        self.convs.extend(
            PNAConv(hidden, hidden, list(aggregators), list(scalers), counts, **options) for _ in range(self.num_layers)
        )

    def _first(self, x: Any) -> Any:
        return self.lins[0](self._drop(x)).relu()

    def _convolved(self, index: int, x: Any, batch: Any) -> Any:
        # Rows of all nodes are made: the layer takes sources and targets from one tensor.
        return self.convs[index](self._drop(x), batch.adj.edge_index)[: batch.batch_size].relu()

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        x = self._convolved(index, x if index else self._first(x), batch)
        return x if index < self.num_layers - 1 else self.lins[1](self._drop(x))


class PNAJK(PNA):
    """:class:`PNA` with jumping knowledge: the last linear layer sees the outputs of all layers, and the first's input.

    Where layers are run one by one, as :meth:`inference` does, earlier outputs come from the histories. As all outputs
    are kept for the last layer, there is no :attr:`recompute`.
    """

    _jumps = True

    def all_layers(self, batch: Any) -> Any:
        """Return the last layer's output for a batch's own nodes."""
        if self.recompute:
            needs, remedy = "a model whose layers see one other", "leave it False for PNAJK"
            raise ArgumentValueError(explain("recompute", needs, "one with jumping knowledge", remedy))
        return super().all_layers(batch)

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output, as :meth:`Scalable.layer` does."""
        last = index == self.num_layers - 1
        if not index:
            x = self._first(x)
            state["rows"] = [x[: batch.batch_size]]
        elif "rows" not in state:
            state["rows"] = self._earlier(batch) if last else []  # which only the last layer looks at
        x = self._convolved(index, x, batch)
        state["rows"].append(x)
        return self.lins[1](self._drop(torch.cat(state["rows"], dim=1))) if last else x

    def _earlier(self, batch: Any) -> list[Any]:
        own, first = batch.n_id[: batch.batch_size], self._first(batch.x)[: batch.batch_size]
        pulled = (backend("torch").to_framework(table.pull(own)) for table in self.histories or ())
        return [first, *(rows.to(first.dtype) for rows in pulled)]
