"""NodeLoader: the batches of an epoch, whatever makes them; and who may hold it."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time

import numpy as np
import pytest
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import CGPUFeature, CSRGraph, GPUSampler, NodeLoader

RNG = np.random.default_rng(0)
GRAPH = random_graph(RNG, 300, 12)
X = RNG.random((300, 7), dtype=np.float32)
Y = RNG.integers(0, 5, 300)
SEEDS = RNG.permutation(300)[:101]


def loader(**options) -> NodeLoader:
    return NodeLoader(GRAPH, X, Y, **{"seeds": SEEDS, "sizes": [4, 3], "batch_size": 20, "device": "cpu", **options})


def content(batch) -> list:
    """All that is in a batch, to be compared."""
    arrays = [batch.x, batch.y, batch.n_id, *(part for adj in batch.adjs for part in (adj.edge_index, adj.e_id))]
    return [*(np.array(array).tolist() for array in arrays), [adj.size for adj in batch.adjs], batch.batch]


def epochs(made: NodeLoader, count: int = 2) -> list:
    return [[content(batch) for batch in made] for _ in range(count)]


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(0, 60), batch_size=st.integers(1, 25), shuffle=st.booleans(), drop_last=st.booleans(),
    seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 9), world_size=st.integers(1, 4),
)  # fmt: skip
def test_equals_the_obvious_loop(count, batch_size, shuffle, drop_last, seed, epoch, world_size):
    """What the loader does, said again in plain words: shuffle, deal out, cut, sample, look up."""
    order = SEEDS[:count]
    if shuffle:
        words = np.random.Philox(key=seed, counter=epoch).random_raw(count)
        order = np.array([seed for _, seed in sorted(zip(words.tolist(), order.tolist(), strict=True))], np.int64)
    share = -(-count // world_size)
    for rank in range(world_size):
        mine = [int(order[(rank + k * world_size) % count]) for k in range(share)]
        cut = [mine[begin : begin + batch_size] for begin in range(0, share, batch_size)]
        cut = [part for part in cut if len(part) == batch_size or not drop_last]
        made = loader(
            seeds=SEEDS[:count], batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, prefetch=0,
            rank=rank, world_size=world_size,
        )  # fmt: skip
        made.set_epoch(epoch)
        batches = list(made)
        assert len(made) == len(batches) == len(cut) and len(made.dataset) == count
        sampler = GPUSampler("cpu", GRAPH, [4, 3], seed=seed)
        for index, (batch, seeds) in enumerate(zip(batches, cut, strict=True)):
            number = (epoch * len(cut) + index) * world_size + rank
            n_id, adjs = sampler.sample(seeds, batch=number)
            assert batch.batch == number and batch.batch_size == len(seeds) and batch.seeds.tolist() == seeds
            np.testing.assert_array_equal(batch.n_id, n_id)
            np.testing.assert_array_equal(batch.x, X[n_id])
            np.testing.assert_array_equal(batch.y, Y[seeds])
            for ours, theirs in zip(batch.adjs, adjs, strict=True):
                np.testing.assert_array_equal(ours.edge_index, theirs.edge_index)
                np.testing.assert_array_equal(ours.e_id, theirs.e_id)
                assert ours.size == theirs.size


@pytest.mark.parametrize("shuffle", [True, False])
def test_prefetch_does_not_matter(shuffle):
    expected = epochs(loader(shuffle=shuffle, prefetch=0))
    assert expected[0] != expected[1]
    for prefetch in (1, 2, 7, 100):
        assert epochs(loader(shuffle=shuffle, prefetch=prefetch)) == expected


def test_threads_do_not_matter():
    expected = epochs(loader())
    gglspeedup.set_num_threads(1)
    assert epochs(loader()) == expected


def test_every_seed_comes_once_an_epoch():
    made = loader()
    first, second = ([seed for batch in made for seed in batch.seeds.tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(SEEDS.tolist()) and first != second
    assert first != SEEDS.tolist()
    assert [s for batch in loader(shuffle=False) for s in batch.seeds.tolist()] == SEEDS.tolist()


def test_shuffling_is_fair():
    """Every seed stands at every place equally often, and pairs of neighbours part."""
    made = loader(seeds=np.arange(6))
    orders = np.array([made.order(epoch) for epoch in range(6000)])
    counts = np.array([[(orders[:, place] == seed).sum() for place in range(6)] for seed in range(6)])
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)
    assert len({tuple(order) for order in orders.tolist()}) == 720


def test_epochs_advance_and_can_be_chosen():
    made = loader()
    first, second = epochs(made)
    assert made.epoch == 2
    made.set_epoch(0)
    assert epochs(made) == [first, second]
    made.set_epoch(1)
    assert epochs(made, 1) == [second]
    assert epochs(loader(seed=1)) != [first, second]


def test_two_iterators_of_one_loader():
    expected = epochs(loader())
    made = loader()
    one, two = iter(made), iter(made)
    got: tuple[list, list] = ([], [])
    for a, b in zip(one, two, strict=True):
        got[0].append(content(a))
        got[1].append(content(b))
    assert list(got) == expected


def test_ranks_share_the_seeds_and_no_batch_number():
    for count in (1, 2, 99, 100, 101):
        ranks = [list(loader(seeds=SEEDS[:count], rank=rank, world_size=3)) for rank in range(3)]
        assert len({len(batches) for batches in ranks}) == 1
        numbers = [batch.batch for batches in ranks for batch in batches]
        assert len(set(numbers)) == len(numbers)
        seen = [seed for batches in ranks for batch in batches for seed in batch.seeds.tolist()]
        assert set(seen) == set(SEEDS[:count].tolist()) and len(seen) <= count + 2


def test_a_mask_names_its_nodes():
    mask = np.zeros(300, bool)
    mask[SEEDS] = True
    assert loader(seeds=mask).dataset.tolist() == sorted(SEEDS.tolist())


def test_seeds_are_the_loaders_own():
    seeds = SEEDS.copy()
    made = loader(seeds=seeds, shuffle=False)
    seeds[:] = 0
    assert made.dataset.tolist() == SEEDS.tolist()


def test_without_features_and_labels():
    made = NodeLoader(GRAPH, seeds=[3, 4], sizes=[2], batch_size=2, device="cpu")
    (batch,) = made
    assert batch.x is None and batch.y is None and batch.seeds.tolist() in ([3, 4], [4, 3])


def test_labels_may_be_rows():
    rows = RNG.random((300, 3))
    batch = next(iter(NodeLoader(GRAPH, y=rows, seeds=SEEDS, sizes=[2], batch_size=8, device="cpu")))
    np.testing.assert_array_equal(batch.y, rows[batch.seeds])


def test_evaluation_takes_every_neighbour_in_order_and_shares_everything():
    made = loader()
    other = made.evaluation([5, 3, 9], batch_size=2)
    assert other.graph_sampler is made.graph_sampler and other.features is made.features and other.labels is made.labels
    expected = loader(seeds=[5, 3, 9], sizes=[-1, -1], batch_size=2, shuffle=False)
    assert [content(batch)[:-1] for batch in other] == [content(batch)[:-1] for batch in expected]
    assert made.sizes == (4, 3) and len(made.dataset) == 101 and made.epoch == 0
    assert next(iter(made.evaluation(SEEDS, sizes=[1]))).adjs[0].edge_index.shape[1] <= 20


def test_parts_already_made_are_shared():
    sampler = GPUSampler("cpu", GRAPH, seed=9, replace=True)
    features = CGPUFeature(GRAPH, "cpu")
    features.from_cpu_tensor(X)
    made = NodeLoader(sampler, features, Y, seeds=SEEDS, sizes=[4, 3], batch_size=20)
    assert made.graph_sampler is sampler and made.features is features and str(made.device) == "cpu"
    batch = next(iter(made))
    expected = sampler.sample(batch.seeds, batch=0, sizes=[4, 3])
    np.testing.assert_array_equal(batch.n_id, expected.n_id)
    assert sampler.sizes is None


def test_sizes_of_one_call_leave_the_samplers_alone():
    sampler = GPUSampler("cpu", GRAPH, [4])
    one = sampler.sample(SEEDS[:9], batch=3, sizes=[2, 2])
    assert len(one.adjs) == 2 and sampler.sizes == (4,)
    other = GPUSampler("cpu", GRAPH, [2, 2]).sample(SEEDS[:9], batch=3)
    np.testing.assert_array_equal(one.n_id, other.n_id)
    with pytest.raises(ValueError, match="sizes needs"):
        sampler.sample(SEEDS[:9], sizes=[])


def prefetch_threads() -> int:
    return sum(thread.name == "gglspeedup-prefetch" for thread in threading.enumerate())


def test_break_and_exceptions_leave_no_thread():
    made = loader(prefetch=3)
    for _batch in made:
        break
    assert prefetch_threads() == 0
    with pytest.raises(RuntimeError, match="of the user"):
        for _batch in made:
            raise RuntimeError("of the user")
    assert prefetch_threads() == 0
    iterator = iter(made)
    next(iterator)
    del iterator
    never_started = iter(made)
    del never_started
    assert prefetch_threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_background_reaches_the_loop(prefetch, monkeypatch):
    made = loader(prefetch=prefetch)
    sampler = made.graph_sampler._made()
    sample = sampler.sample

    def failing(seeds, sizes, *, batch, **options):
        if batch == 2:
            raise ValueError("broken batch")
        return sample(seeds, sizes, batch=batch, **options)

    monkeypatch.setattr(sampler, "sample", failing)
    got = []
    with pytest.raises(ValueError, match="broken batch") as caught:
        got.extend(made)
    assert prefetch_threads() == 0
    names = [frame.name for frame in caught.traceback]
    assert "failing" in names and "_sample_all" in names


def test_batches_outlive_the_loader():
    kept = list(loader())
    expected = [content(batch) for batch in loader(prefetch=0)]
    for _ in range(3):
        list(loader(seed=5))
    assert [content(batch) for batch in kept] == expected


def test_buffers_are_used_again():
    """A loop that lets go of its batches stays within a few buffers, however long the epoch is."""
    made = loader(batch_size=5, prefetch=2)
    places = {batch.x.__array_interface__["data"][0] for batch in made}
    assert len(places) < len(made)


def _in_child(made: NodeLoader, results) -> None:
    results.put(epochs(made))


def test_spawned_processes_get_the_same_batches():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_in_child, args=(loader(), results))
    process.start()
    got = results.get(timeout=120)
    process.join(30)
    assert process.exitcode == 0 and got == epochs(loader())


def test_pickling_keeps_the_epoch():
    made = loader()
    list(made)
    copy = pickle.loads(pickle.dumps(made))
    assert copy.epoch == 1 and epochs(copy, 1) == epochs(made, 1)


def test_the_reader_and_the_thread_work_at_once():
    """While the reader has a batch, the next ones are made: shown by order of events, not by a clock."""
    made = loader(prefetch=2, batch_size=10)
    numbers: list[int] = []
    sampler = made.graph_sampler._made()
    sample = sampler.sample

    def noted(seeds, sizes, *, batch, **options):
        numbers.append(batch)
        return sample(seeds, sizes, batch=batch, **options)

    sampler.sample = noted  # type: ignore[method-assign]
    iterator = iter(made)
    next(iterator)
    deadline = time.monotonic() + 30
    while len(numbers) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert numbers[:3] == [0, 1, 2]
    iterator.close()


BAD = [
    ({"batch_size": 0}, ValueError, "batch_size needs at least 1, got 0"),
    ({"batch_size": 2.5}, TypeError, "batch_size needs an integer"),
    ({"prefetch": -1}, ValueError, "prefetch needs at least 0"),
    ({"shuffle": 1}, TypeError, "shuffle needs True or False"),
    ({"drop_last": "no"}, TypeError, "drop_last needs True or False"),
    ({"seed": -1}, ValueError, "seed needs 0 to"),
    ({"sizes": 5}, TypeError, "sizes needs a sequence"),
    ({"seeds": [1, 300]}, IndexError, "seeds needs ids from 0 to 299, got 300 at position 1"),
    ({"seeds": [1, 2, 1]}, ValueError, "seeds needs unique ids, got 1 again at position 2"),
    ({"seeds": [0.5]}, TypeError, "seeds needs integers"),
    ({"seeds": np.zeros(5, bool)}, ValueError, r"seeds needs a mask of shape \(300,\)"),
    ({"rank": 2, "world_size": 2}, ValueError, "rank needs 0 to 1"),
    ({"backend": "caffe"}, ValueError, "backend needs one of numpy, cupy, torch"),
    ({"backend": "cupy"}, gglspeedup.DeviceError, "device needs a CUDA device for CuPy"),
    ({"device": "cuda:77"}, gglspeedup.DeviceError, "cuda:77"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message) as caught:
        loader(**options)
    assert isinstance(caught.value, gglspeedup.GGLSpeedupError)


def test_features_that_do_not_belong():
    features = CGPUFeature(CSRGraph([0, 0], []), "cpu")
    features.from_cpu_tensor([1.0])
    with pytest.raises(ValueError, match="x needs 300 rows, got 1"):
        NodeLoader(GRAPH, features, seeds=[0], sizes=[1], batch_size=1, device="cpu")
    with pytest.raises(ValueError, match="x needs shape"):
        NodeLoader(GRAPH, X[:5], seeds=[0], sizes=[1], batch_size=1, device="cpu")
    with pytest.raises(ValueError, match="epoch needs at least 0"):
        loader().set_epoch(-1)


def test_repr_says_what_it_is():
    assert "101 seeds" in repr(loader()) and "backend='numpy'" in repr(loader())
