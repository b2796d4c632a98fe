"""`Recomputed`: memory that does not grow with the depth of a torch model with histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gglspeedup.adapters import backend
from gglspeedup.adapters.scalable import Scalable
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain

Segment = Callable[[Any, Sequence[Any]], Any]


class Recomputed(Scalable):  # type: ignore[misc]
    """A :class:`Scalable` torch module that may compute its layers a second time instead of keeping what they made.

    In a forward pass a layer's output is pushed anyway. The backward pass pulls it again, computes the next layer once
    more, and forgets it: the memory of a batch is that of two layers, whatever the depth, for a third more work.

    Attributes
    ----------
    recompute : bool
        Whether to. It needs histories, which must not be pushed to between the two passes.

    Notes
    -----
    Gradient checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016) with the histories as
    checkpoints. Gradients are the same, bit for bit, if histories are stored in the dtype of the layers' outputs, else
    as close as that dtype is. What is drawn at random is drawn again alike; buffers, such as the running statistics of
    normalisations, change in the forward pass alone. A layer may read what the first one left in its `state`, but
    not add to it.
    """

    recompute = False

    def all_layers(self, batch: Any) -> Any:
        """Return the last layer's output for a batch's own nodes, as :meth:`Scalable.all_layers` does."""
        if not (self.recompute and torch.is_grad_enabled()):
            return super().all_layers(batch)
        if self.histories is None:
            raise ArgumentTypeError(explain("recompute", "histories", "a model without", "set model.histories"))
        self._start_pulls(batch)
        state: dict[str, Any] = {}
        own = self.layer(0, batch.x, batch, state)[: batch.batch_size]
        shared = [name for name, value in state.items() if torch.is_tensor(value) and value.requires_grad]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]  # type: ignore[attr-defined]
        for index in range(1, self.num_layers):

            def again(x: Any, values: Sequence[Any], index: int = index) -> Any:
                given = {**state, **dict(zip(shared, values, strict=True))}
                return self.layer(index, x, batch, given)[: batch.batch_size]

            rows = _Rows(self, index - 1, batch, own.dtype)
            own = _Again.apply(again, rows, len(shared), own, *(state[name] for name in shared), *parameters)
        return own


class _Rows:
    """What a layer reads: at first what the layer before returned, and later the same from the histories."""

    def __init__(self, model: Any, table: int, batch: Any, dtype: Any) -> None:
        self.model, self._table, self._batch, self._dtype = model, table, batch, dtype
        self._pushes = -1

    def first(self, own: Any) -> Any:
        """Push a layer's output, and return it with the rows of the halo."""
        rows = self.model.push_and_pull(self._table, own, self._batch)
        self._pushes = self.model.histories[self._table].pushes
        return rows

    def again(self) -> Any:
        """Return the same rows."""
        table = self.model.histories[self._table]
        if table.pushes != self._pushes:
            got = f"{table.pushes - self._pushes} later pushes to table {self._table}"
            remedy = "call backward() before the next batch, or set model.recompute = False"
            raise ArgumentValueError(explain("histories", "what the forward pass left", got, remedy))
        return backend("torch").to_framework(table.pull(self._batch.n_id)).to(self._dtype)


class _Again(torch.autograd.Function):  # type: ignore[misc]
    """A layer whose inputs and intermediate values are not kept."""

    @staticmethod
    def forward(ctx: Any, run: Segment, rows: _Rows, shared: int, own: Any, *leaves: Any) -> Any:
        ctx.run, ctx.rows, ctx.shared, ctx.size = run, rows, shared, len(own)
        ctx.random = _Random(own.device)
        ctx.save_for_backward(*leaves)  # which the model, or the first layer's part of the graph, keeps anyway
        return run(rows.first(own), leaves[:shared])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        leaves = ctx.saved_tensors
        values = [value.detach().requires_grad_() for value in leaves[: ctx.shared]]
        x = ctx.rows.again().requires_grad_()
        inputs = [x, *values, *leaves[ctx.shared :]]
        with torch.enable_grad(), ctx.random.again(), _other_buffers(ctx.rows.model):
            out = ctx.run(x, values)
        rows, *others = torch.autograd.grad(out, inputs, gradient, allow_unused=True)
        return None, None, None, None if rows is None else rows[: ctx.size], *others


class _Random:
    """What torch's generators would draw next, on the CPU and on a device."""

    def __init__(self, device: Any) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw it once more; later draws are not changed."""
        with torch.random.fork_rng([] if self._device is None else [self._device]):
            torch.set_rng_state(self._cpu)
            if self._device is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


@contextmanager
def _other_buffers(model: Any) -> Iterator[None]:
    """Let a model change copies of its buffers. Its own are not even restored: the first layer's part of the graph
    would find them written to."""
    own = [(module, name, buffer) for module in model.modules() for name, buffer in module.named_buffers(recurse=False)]
    for module, name, buffer in own:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)
