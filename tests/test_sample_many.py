"""`GPUSampler.sample_many` and `sample_each` on the CPU: the batches that `sample` gives, and one counter."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_graph

from gglspeedup import GPUSampler
from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError
from gglspeedup.kernels.bounds import MAX_BATCH


def bits(batch):
    arrays = [batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]
    return batch.batch, batch.batch_size, [array.tobytes() for array in arrays], [adj.size for adj in batch.adjs]


@pytest.fixture
def graph():
    return random_graph(np.random.default_rng(0), 300, 20, hub=400)


@pytest.mark.parametrize("options", [{}, {"replace": True, "expand": "frontier", "seed": 2**64 - 1}])
def test_equals_one_by_one(graph, options):
    rng = np.random.default_rng(1)
    one, many, each = (GPUSampler("cpu", graph, [5, 3], **options) for _ in range(3))
    numbers = [None, 7, None, 2**48 - 1, None]
    batches = [(rng.permutation(300)[: 10 * at], number) for at, number in enumerate(numbers)]
    for sizes in (None, [-1], [4, 40, 2]):
        expected = [bits(one.sample(seeds, number, sizes=sizes)) for seeds, number in batches]
        assert [bits(batch) for batch in many.sample_many(iter(batches), sizes=sizes)] == expected
        assert [bits(batch) for batch in each.sample_each(iter(batches), sizes=sizes)] == expected
    assert many.sample_many([]) == list(each.sample_each([])) == []
    assert many.sample([1]).batch == each.sample([1]).batch == one.sample([1]).batch == 9


def test_the_counter_starts_over(graph):
    sampler = GPUSampler("cpu", graph, [2])
    sampler._batch = MAX_BATCH - 1
    assert [batch.batch for batch in sampler.sample_many([([1], None), ([2], None)])] == [MAX_BATCH - 1, 0]
    assert sampler.sample([1]).batch == 1


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([([1], None), ([2, 300], None)], ArgumentIndexError, "got 300 at position 1"),
        ([([1], None), ([2, 2], None), ([-1], None)], ArgumentValueError, "2 again at position 1"),
        ([([1], None), ([2.5], None)], ArgumentTypeError, "seeds needs integers"),
        ([([1], None), ([1], -1)], ArgumentValueError, "batch needs 0 to"),
        ([[1, 2, 3]], ArgumentTypeError, "batches needs pairs of seeds and a number or None, got a list of 3"),
        ([5], ArgumentTypeError, "got a int"),
    ],
)
def test_errors_take_no_number(graph, batches, error, message):
    sampler = GPUSampler("cpu", graph, [2])
    with pytest.raises(error, match=message):
        sampler.sample_many(batches)
    assert sampler.sample([1]).batch == 0


def test_each_comes_when_asked_for_and_errors_in_their_place(graph):
    sampler = GPUSampler("cpu", graph, [2])
    asked = []

    def batches():
        for seeds in ([1], [2], [3, 300], [4]):
            asked.append(seeds)
            yield seeds, None

    each = sampler.sample_each(batches())
    assert not asked
    assert next(each).batch == 0 and len(asked) == 1
    assert next(each).batch == 1 and len(asked) == 2
    with pytest.raises(ArgumentIndexError, match="got 300 at position 1"):
        next(each)
    assert sampler.sample([1]).batch == 2
    each = sampler.sample_each(batches())
    assert next(each).batch == 3
    each.close()
    assert sampler.sample([1]).batch == 4
    for bad, error in ((0, ArgumentValueError), (1.5, ArgumentTypeError)):
        with pytest.raises(error, match="at_once"):
            sampler.sample_each([], at_once=bad)


def test_needs_sizes(graph):
    with pytest.raises(ArgumentValueError, match="sizes needs to be set before sampling"):
        GPUSampler("cpu", graph).sample_many([([1], None)])
    with pytest.raises(ArgumentValueError, match="sizes needs to be set before sampling"):
        GPUSampler("cpu", graph).sample_each([([1], None)])
