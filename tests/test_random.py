"""Randomness: published answers, the naive version, uniformity."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from numba import njit
from scipy import stats

from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.kernels.random import bounded, philox

# The known answers that Random123, the reference implementation of the paper, publishes for philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@njit
def compiled_philox(c0, c1, c2, c3, k0, k1):
    return philox(c0, c1, c2, c3, k0, k1)


@njit
def compiled_bounded(draw, bound, c1, c2, c3, k0, k1):
    word = philox(np.uint32(draw >> 2), c1, c2, c3, k0, k1)[draw & 3]
    return bounded(word, draw, bound, c1, c2, c3, k0, k1)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert naive.philox(counter, key) == words
    assert compiled_philox(*map(np.uint32, counter + key)) == words


@pytest.mark.parametrize("bound", [1, 2, 10, 1000, (1 << 31) + 1, 3 << 30, (1 << 32) - 1])
def test_bounded_equals_naive_and_rejects(bound):
    """The large bounds reject up to half of the words: attempts are reached and agree."""
    for node in range(300):
        seed, batch, hop, draw = 12345678901234567 + node, (1 << 40) + 3, 7, node % 40
        c3 = hop << 8 | (batch >> 32) << 16
        words = (node, batch & naive.MASK, c3, seed & naive.MASK, seed >> 32)
        got = compiled_bounded(draw, bound, *map(np.uint32, words))
        assert got == naive.bounded(seed, batch, hop, node, draw, bound)
        assert 0 <= got < bound


def star(degree: int, rows: int = 1) -> CSRGraph:
    """Nodes 0 to rows - 1 each have the neighbours 0 to degree - 1."""
    indptr = np.concatenate([np.arange(rows + 1) * degree, np.full(max(degree - rows, 0), rows * degree)])
    return CSRGraph(indptr, np.tile(np.arange(degree, dtype=np.int32), rows))


def chi_square(counts: np.ndarray) -> float:
    return float(stats.chisquare(counts.ravel()).pvalue)


# The seeds are fixed: the p-values below never change, unless the draws do.
@pytest.mark.parametrize("degree", [10, 100, 1000, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("replace", [False, True])
def test_uniform_over_neighbours(degree, replace):
    sampler = GPUSampler("cpu", star(degree), [7], seed=1, replace=replace)
    picks = np.concatenate([sampler.sample([0]).adjs[0].e_id for _ in range(4000)])
    counts = np.bincount(picks * min(degree, 100) // degree, minlength=min(degree, 100))
    assert chi_square(counts) > 1e-3


@pytest.mark.parametrize(("degree", "fanout"), [(6, 2), (6, 3), (6, 5), (40, 35)])
def test_uniform_over_subsets(degree, fanout):
    """Every K-subset is equally likely: all of them for a small row, else all pairs of a subset."""
    sampler = GPUSampler("cpu", star(degree), [fanout], seed=3)
    pairs = np.zeros((degree, degree), np.int64)
    subsets: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        picks = np.sort(sampler.sample([0]).adjs[0].e_id)
        assert len(np.unique(picks)) == fanout
        subsets[tuple(picks)] = subsets.get(tuple(picks), 0) + 1
        first, second = np.triu_indices(fanout, 1)
        pairs[picks[first], picks[second]] += 1
    upper = pairs[np.triu_indices(degree, 1)]
    # Pairs of one subset are not independent; their spread is below the multinomial one, so only a bound is tested.
    assert stats.chi2.sf(((upper - upper.mean()) ** 2 / upper.mean()).sum(), len(upper) - 1) > 1e-3
    if degree == 6:
        assert len(subsets) == {2: 15, 3: 20, 5: 6}[fanout]
        assert chi_square(np.array(list(subsets.values()))) > 1e-3


def test_independent_over_rows_and_batches():
    """The pick of one row says nothing of another row's, of the next batch's, or of the next hop's."""
    degree, rows = 8, 3000
    sampler = GPUSampler("cpu", star(degree, rows), [1], seed=5)
    n_id = np.arange(rows)
    now, after = (sampler.sample(n_id, batch=b).adjs[0].e_id % degree for b in (0, 1))
    for one, other in ((now[:-1], now[1:]), (now, after)):
        table = np.zeros((degree, degree), np.int64)
        np.add.at(table, (one, other), 1)
        assert chi_square(table) > 1e-3
    other_seed = GPUSampler("cpu", star(degree, rows), [1], seed=6).sample(n_id, batch=0).adjs[0].e_id % degree
    table = np.zeros((degree, degree), np.int64)
    np.add.at(table, (now, other_seed), 1)
    assert chi_square(table) > 1e-3


def test_hops_draw_anew():
    """With expand="layer" a seed is expanded in both hops, by different draws."""
    sampler = GPUSampler("cpu", star(1000), [5, 5])
    outer, inner = sampler.sample([0]).adjs
    assert not np.array_equal(outer.e_id[outer.col == 0], inner.e_id)
