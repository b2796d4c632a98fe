"""A model for benchmarks that needs torch alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from gglspeedup.adapters.recompute import Recomputed

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)  # says so once a process


class MeanLayer(torch.nn.Module):
    """GraphSAGE's layer with the mean of the neighbours."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.neighbours = torch.nn.Linear(width_in, width_out)
        self.own = torch.nn.Linear(width_in, width_out, bias=False)

    def forward(self, x: torch.Tensor, adj: Any) -> torch.Tensor:
        """Return the new rows of the targets."""
        targets = adj.size[1]
        count = torch.bincount(adj.col, minlength=targets)
        if x.is_cuda:
            total = x.new_zeros(targets, x.shape[1]).index_add_(0, adj.col, x[adj.row])
        else:  # makes no messages, and takes a fraction of the time
            begin = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
            ones = torch.ones(len(adj.row), dtype=x.dtype)
            total = torch.sparse_csr_tensor(begin, adj.row.int(), ones, adj.size[::-1], check_invariants=False) @ x
        return self.neighbours(total / count.clamp(min=1)[:, None]) + self.own(x[:targets])


class Sage(Recomputed, torch.nn.Module):
    """GraphSAGE, for batches of a NodeLoader, and with histories for those of a SubgraphLoader."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(MeanLayer(*pair) for pair in itertools.pairwise(widths))
        self.num_layers = len(self.layers)

    def layer(self, index: int, x: Any, batch: Any, state: dict[str, Any]) -> Any:
        """Return a layer's output."""
        x = self.layers[index](x, batch.adj if hasattr(batch, "adj") else batch.adjs[index])
        return x if index == self.num_layers - 1 else x.relu()

    def forward(self, batch: Any) -> Any:
        """Return the outputs of a batch's own nodes, or of the seeds."""
        if hasattr(batch, "adj"):
            return self.all_layers(batch)
        x = batch.x
        for index in range(self.num_layers):
            x = self.layer(index, x, batch, {})
        return x
