"""Slow and obvious versions of every operation, in plain Python: what the real ones must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. (SC 2011), on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def bounded(seed: int, batch: int, hop: int, node: int, draw: int, bound: int) -> int:
    """Draw number `draw` of (seed, batch, hop, node), uniform in [0, bound): Lemire, with rejection."""
    key = (seed & MASK, seed >> 32)
    attempt = 0
    while True:
        counter = (
            attempt << 16 | draw >> 2,
            node & MASK,
            batch & MASK,
            (node >> 32) | hop << 8 | (batch >> 32) << 16,
        )
        product = philox(counter, key)[draw & 3] * bound
        if (product & MASK) >= (1 << 32) % bound:
            return product >> 32
        attempt += 1


def pick_row(seed: int, batch: int, hop: int, node: int, degree: int, fanout: int, replace: bool) -> list[int]:
    """The chosen places of a row of `degree` neighbours, in the order of the edge list."""
    if fanout <= 0 or degree == 0 or (degree <= fanout and not replace):
        return list(range(degree))
    if replace:
        return [bounded(seed, batch, hop, node, j, degree) for j in range(fanout)]
    picks: list[int] = []
    for j in range(fanout):  # Floyd's algorithm
        last = degree - fanout + j
        pick = bounded(seed, batch, hop, node, j, last + 1)
        picks.append(last if pick in picks else pick)
    return picks


def sample(
    indptr: np.ndarray, indices: np.ndarray, seeds: Sequence[int], sizes: Sequence[int], *, seed: int = 0,
    batch: int = 0, replace: bool = False, expand: str = "layer", edge_ids: np.ndarray | None = None,
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, tuple[int, int]]]]:  # fmt: skip
    """n_id and the hops (edge_index, e_id, size), outermost first."""
    n_id = [int(v) for v in seeds]
    local = {v: i for i, v in enumerate(n_id)}
    hops = []
    old = 0
    for hop, fanout in enumerate(sizes):
        targets = len(n_id)
        row, col, e_id = [], [], []
        for i in range(old if expand == "frontier" else 0, targets):
            v = n_id[i]
            begin, degree = int(indptr[v]), int(indptr[v + 1] - indptr[v])
            for place in pick_row(seed, batch, hop, v, degree, fanout, replace):
                u = int(indices[begin + place])
                if u not in local:
                    local[u] = len(n_id)
                    n_id.append(u)
                row.append(local[u])
                col.append(i)
                e_id.append(begin + place if edge_ids is None else int(edge_ids[begin + place]))
        hops.append((np.array([row, col], np.int64).reshape(2, -1), np.array(e_id, np.int64), (len(n_id), targets)))
        old = targets
    return np.array(n_id, np.int64), hops[::-1]


def gather(x: np.ndarray, n_id: Sequence[int]) -> np.ndarray:
    """Rows n_id of x."""
    return np.array([x[int(v)] for v in n_id], dtype=x.dtype).reshape((len(n_id), *x.shape[1:]))


def hot_order(indptr: np.ndarray) -> list[int]:
    """Node ids by falling degree; of equal ones the lower id first."""
    return sorted(range(len(indptr) - 1), key=lambda v: (indptr[v] - indptr[v + 1], v))


def visits(batches: Sequence[Sequence[int]], num_nodes: int) -> np.ndarray:
    """How many of the batches each node is in (GNNLab's pre-sampling count)."""
    return np.array([sum(v in set(map(int, batch)) for batch in batches) for v in range(num_nodes)])


class History:
    """One table of a history store, and when each row was written."""

    def __init__(self, num_nodes: int, dim: int, dtype: Any) -> None:
        self.rows = [[np.zeros((), dtype)] * dim for _ in range(num_nodes)]
        self.written = [0] * num_nodes
        self.pushes = 0
        self.dtype = dtype

    def push(self, values: Any, n_id: list[int]) -> None:
        self.pushes += 1
        for row, node in zip(values, n_id, strict=True):
            self.rows[node] = [np.asarray(value).astype(self.dtype) for value in row]
            self.written[node] = self.pushes

    def pull(self, n_id: list[int]) -> Any:
        dim = len(self.rows[0]) if self.rows else 0
        return np.array([self.rows[node] for node in n_id], self.dtype).reshape(len(n_id), dim)

    def age(self, n_id: list[int]) -> list[int]:
        return [self.pushes - self.written[node] if self.written[node] else -1 for node in n_id]
