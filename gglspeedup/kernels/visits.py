"""Counting how often nodes are sampled: the body that the CPU and the GPU kernel share, one item of a batch."""

from __future__ import annotations

from typing import Any


def add_visit(i: int, n_id: Any, visits: Any) -> None:
    """Count item i of a batch; its ids are unique, so no two items meet."""
    visits[n_id[i]] += 1
