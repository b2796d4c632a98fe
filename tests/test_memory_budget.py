"""A memory limit on NodeLoader: what is done with batches over it, and what is counted. See test_memory_limit.py."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from conftest import random_graph
from test_loader import content

import gglspeedup
from gglspeedup import GPUSampler, MemoryBudget, NodeLoader
from gglspeedup.batch_fitter import smaller_sizes
from gglspeedup.errors import DeviceError
from gglspeedup.kernels.bounds import MAX_BATCH
from gglspeedup.memory_budget import MemoryLimitError
from gglspeedup.memory_model import BatchLoad, MemoryModel

RNG = np.random.default_rng(0)
GRAPH = random_graph(RNG, 400, 12, hub=300)
X = RNG.random((400, 7), dtype=np.float32)
Y = RNG.integers(0, 5, 400)
SEEDS = RNG.permutation(400)[:101]
BASE, NODE, EDGE = 1 << 34, 1 << 30, 1 << 26  # far above what this process takes, so that it does not matter


def known_model(base: int = BASE) -> MemoryModel:
    """A model of a training whose peak is base + NODE for each node + EDGE for each edge of the outer hop."""
    model = MemoryModel(2)
    rng = np.random.default_rng(1)
    for _ in range(60):
        nodes, edges = rng.integers(100, 10000, 3), rng.integers(100, 10000, 2)
        load = BatchLoad(tuple(nodes.tolist()), tuple(edges.tolist()), (28.0, 1.0, 1.0), 0, 0)
        model.observe(load, base + NODE * nodes[0] + EDGE * edges[0])
    return model


def peak_of(batch) -> int:
    return BASE + NODE * batch.adjs[0].size[0] + EDGE * batch.adjs[0].e_id.shape[0]


def limit_for(nodes: int) -> int:
    """A limit that holds batches of about so many nodes."""
    return int((BASE + nodes * (NODE + 2 * EDGE)) * 1.05) + 1


def budget(nodes: int, **options) -> MemoryBudget:
    return MemoryBudget(limit_for(nodes), model=known_model(), learn=False, **options)


def loader(**options) -> NodeLoader:
    return NodeLoader(GRAPH, X, Y, **{"seeds": SEEDS, "sizes": [4, 3], "batch_size": 20, "device": "cpu", **options})


def test_without_a_limit_nothing_is_split():
    for batch in loader():
        assert batch.share == 1.0 and batch.last is True
    assert loader().memory_budget is None


def test_a_limit_that_is_not_reached_changes_nothing():
    limited = loader(memory_limit=budget(1000))
    assert [content(batch) for batch in limited] == [content(batch) for batch in loader()]
    stats = limited.memory_budget.stats()
    assert (stats["batches"], stats["parts"], stats["split"], stats["over"]) == (6, 6, 0, 0)
    assert stats["measured"] == 6


def steps_of(made: NodeLoader) -> list[list]:
    steps: list[list] = [[]]
    for batch in made:
        steps[-1].append(batch)
        if batch.last:
            steps.append([])
    assert not steps.pop()
    return steps


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_step_is_split_into_parts_that_fit(prefetch):
    limited = loader(memory_limit=budget(90), prefetch=prefetch)
    whole, steps = list(loader()), steps_of(limited)
    assert len(steps) == len(whole) == len(limited)
    assert sum(len(step) > 1 for step in steps) == limited.memory_budget.stats()["split"] > 0
    assert sum(map(len, steps)) == limited.memory_budget.stats()["parts"]
    for step, batch in zip(steps, whole, strict=True):
        assert [seed for part in step for seed in part.seeds.tolist()] == batch.seeds.tolist()
        assert sum(part.share for part in step) == pytest.approx(1.0)
        assert [part.last for part in step] == [False] * (len(step) - 1) + [True]
        for part in step:
            assert part.share == part.batch_size / batch.batch_size and part.batch == batch.batch
            assert peak_of(part) <= limited.memory_budget.limit / 1.05
            # The same neighbourhoods: what the sampler gives for these seeds under the step's number.
            n_id, adjs = GPUSampler("cpu", GRAPH, [4, 3]).sample(part.seeds, batch.batch)
            np.testing.assert_array_equal(part.n_id, n_id)
            np.testing.assert_array_equal(part.x, X[n_id])
            np.testing.assert_array_equal(part.y, Y[part.seeds])
            for ours, theirs in zip(part.adjs, adjs, strict=True):
                np.testing.assert_array_equal(ours.edge_index, theirs.edge_index)


def test_parts_have_the_draws_of_the_whole():
    """In the outer hop a seed of a part has the neighbours that it has in the whole step."""
    for step, batch in zip(steps_of(loader(memory_limit=budget(90))), loader(), strict=True):
        rows = neighbours(batch.adjs[0], batch.n_id)
        for part in step:
            for node, row in neighbours(part.adjs[0], part.n_id).items():
                assert rows[node] == row


def neighbours(adj, n_id) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {int(node): [] for node in n_id[: adj.size[1]]}
    for source, target in zip(n_id[adj.row].tolist(), n_id[adj.col].tolist(), strict=True):
        found[target].append(source)
    return found


def test_parts_are_few():
    """The limit is made use of, and parts are about as large as each other."""
    limited = loader(memory_limit=budget(120), batch_size=101)
    (step,) = steps_of(limited)
    assert 100 <= np.mean([len(part.n_id) for part in step]) <= 130
    sizes = [part.batch_size for part in step]
    assert max(sizes) - min(sizes) <= max(sizes) // 2


@pytest.mark.parametrize("policy", ["split", "resample", "random", "degree", "pagerank"])
def test_what_is_done_is_reproducible(policy):
    made = [[content(batch) for batch in loader(memory_limit=budget(90, policy=policy))] for _ in range(2)]
    other = [content(batch) for batch in loader(memory_limit=budget(90, policy=policy), prefetch=0)]
    assert made[0] == made[1] == other


@pytest.mark.parametrize("policy", ["random", "degree", "pagerank"])
def test_edges_are_cut(policy):
    limited = loader(memory_limit=budget(90, policy=policy))
    batches, whole, stats = list(limited), list(loader()), limited.memory_budget.stats()
    assert stats["cut"] > 0 and stats["split"] == 0 and stats["parts"] == len(batches) == 6
    lost = 0
    for cut, batch in zip(batches, whole, strict=True):
        assert cut.seeds.tolist() == batch.seeds.tolist() and cut.share == 1.0 and cut.last
        assert peak_of(cut) <= limited.memory_budget.limit / 1.05 + EDGE
        np.testing.assert_array_equal(cut.x, X[cut.n_id])
        rows = neighbours(batch.adjs[-1], batch.n_id)
        for node, row in neighbours(cut.adjs[-1], cut.n_id).items():
            assert set(row) <= set(rows[node]) and bool(row) == bool(rows[node])
        lost += sum(len(theirs.e_id) - len(ours.e_id) for ours, theirs in zip(cut.adjs, batch.adjs, strict=True))
    assert stats["edges_cut"] == lost


def test_neighbours_are_drawn_again():
    limited = loader(memory_limit=budget(90, policy="resample"))
    batches, whole, stats = list(limited), list(loader()), limited.memory_budget.stats()
    assert stats["resampled"] > 0 and stats["split"] == 0 and len(batches) == 6
    again = [batch for batch, plain in zip(batches, whole, strict=True) if batch.batch != plain.batch]
    assert len(again) == stats["resampled"]
    for batch in again:
        assert peak_of(batch) <= limited.memory_budget.limit / 1.05 and batch.share == 1.0
        sampler = GPUSampler("cpu", GRAPH)
        candidates = [[4, 3], [2, 1], [1, 1]]
        made = [sampler.sample(batch.seeds, batch.batch, sizes=sizes).n_id.tolist() for sizes in candidates]
        assert batch.n_id.tolist() in made


def test_smaller_sizes():
    sampled = GPUSampler("cpu", GRAPH, [4, -1]).sample(np.arange(20), 0)
    most = int(np.bincount(sampled.adjs[0].col).max())
    found = list(smaller_sizes(sampled, (4, -1)))
    assert found[:3] == [(4, -1), (4, -1), (2, min(most // 2, 1024))] and found[-1] == (1, 1)
    assert all(max(sizes) <= 1024 for sizes in found)


def test_attempts_have_numbers_of_their_own():
    """Those of redrawn batches are none of the epochs' own."""
    limited = loader(memory_limit=budget(90, policy="resample"))
    own = {batch.batch for _ in range(3) for batch in loader()}
    redrawn = {batch.batch for _ in range(3) for batch in limited} - {*range(3 * len(limited))}
    assert redrawn and not redrawn & own and max(redrawn) < MAX_BATCH


def test_what_cannot_be_cut_enough_is_split():
    limited = loader(memory_limit=budget(25, policy="degree"))
    steps = steps_of(limited)
    stats = limited.memory_budget.stats()
    assert stats["split"] > 0 and [seed for step in steps for part in step for seed in part.seeds.tolist()] == [
        seed for batch in loader() for seed in batch.seeds.tolist()
    ]


def test_a_seed_that_is_too_large_alone():
    hub = loader(seeds=[0], sizes=[-1, -1], memory_limit=small_base(30))
    with pytest.warns(UserWarning, match=r"seed 0 alone would exceed the memory limit of \d+ bytes"):
        (batch,) = hub
    assert batch.seeds.tolist() == [0] and batch.batch_size == 1 and len(batch.n_id) > 1
    stats = hub.memory_budget.stats()
    assert stats["single_seeds_cut"] == 1 and stats["edges_cut"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(hub)) == 1  # says so once


def small_base(nodes: int) -> MemoryBudget:
    """A budget most of which is for batches."""
    limit = 1 << 50
    scale = limit // nodes
    model = MemoryModel(2)
    rng = np.random.default_rng(1)
    for _ in range(60):
        count, edges = rng.integers(1, 1000, 3), rng.integers(1, 1000, 2)
        load = BatchLoad(tuple(count.tolist()), tuple(edges.tolist()), (28.0, 1.0, 1.0), 0, 0)
        model.observe(load, scale * count[0])
    return MemoryBudget(limit, model=model, learn=False)


def test_no_room_for_a_single_seed():
    with pytest.raises(MemoryLimitError, match="memory_limit needs room for seed") as raised:
        list(loader(memory_limit=MemoryBudget(BASE // 2, model=known_model(), learn=False)))
    assert isinstance(raised.value, MemoryError) and isinstance(raised.value, gglspeedup.GGLSpeedupError)


def test_learning_begins_with_small_parts(monkeypatch):
    """Nothing is known: the first part is small, the next ones grow, and the whole fits once that is known."""
    meter = FakeMeter()
    monkeypatch.setattr("gglspeedup.loader.meter_for", lambda device, backend: meter)
    made = loader(memory_limit=MemoryBudget(FakeMeter.base + 300 * FakeMeter.node), prefetch=0)
    sizes = []
    for epoch in range(6):
        sizes.append([])
        for batch in made:
            meter.train(batch)
            sizes[epoch].append(batch.batch_size)
    assert sizes[0][0] < 10 and max(sizes[0][:3]) <= 8 * sizes[0][0] and sizes[-1] == [20] * 5 + [1]
    stats = made.memory_budget.stats()
    assert stats["over"] == 0 and stats["peak"] <= made.memory_budget.limit
    assert made.memory_budget.model.count > 10


def test_learning_keeps_a_limit(monkeypatch):
    meter = FakeMeter()
    monkeypatch.setattr("gglspeedup.loader.meter_for", lambda device, backend: meter)
    limit = int((FakeMeter.base + 110 * FakeMeter.node) * 1.05)
    made = loader(memory_limit=MemoryBudget(limit), prefetch=0, batch_size=40)
    for _ in range(12):
        for batch in made:
            meter.train(batch)
    stats = made.memory_budget.stats()
    assert stats["over"] == 0 and stats["split"] > 12
    late = [predicted / peak for predicted, peak in made.memory_budget.records[-20:]]
    assert np.abs(np.array(late) - 1).mean() < 0.02


class FakeMeter:
    """Stands for a device on which a batch takes 4096 bytes for each node, and nothing is kept."""

    node = 4096
    base = 100 * node
    tidies = True
    chance = 0

    def __init__(self) -> None:
        self.most = self.base

    def in_use(self) -> int:
        return self.base

    def start(self, tidy: bool) -> int:
        self.most = self.base
        return self.base

    def peak(self) -> int:
        return self.most

    def train(self, batch) -> None:
        self.most = max(self.most, self.base + self.node * len(batch.n_id))


def test_larger_batches_are_not_split_far_below_the_limit():
    small, large = (BatchLoad((n, n), (n,), (4.0, 1.0), 100 * n, 100 * n) for n in (10, 1000))
    for limit, fits in ((1 << 40, True), (1000 + 256 * large.own + 200_000, True), (128 * large.own, False)):
        budget = MemoryBudget(limit)
        budget.prepare(1, 1000)
        for _ in range(20):
            budget.measured(small, 0.0, 1000 + 20 * small.own, True)
        verdict = budget.judge(large, lambda: 1000)
        assert verdict.fits == fits and not verdict.over and verdict.upper < limit
        assert verdict.scale >= 1 if fits else verdict.scale == pytest.approx(0.02)


def test_room_is_left_for_chance():
    """A margin is at least what the meter says of chance, unless the model alone decides, and half of the room."""
    load = BatchLoad((10, 10), (10,), (4.0, 1.0), 1000, 1000)
    for learn, limit, added in ((True, 10**6, 5000), (False, 10**6, 500), (True, 14_000, 2000)):
        budget = MemoryBudget(limit, model=MemoryModel(1), learn=learn)
        for _ in range(20):
            budget.model.observe_idle(0, 10_000)
            budget.model.observe(load, 10_000)
        budget.prepare(1, 0, chance=5000)
        verdict = budget.judge(load, lambda: 0)
        assert verdict.fixed == pytest.approx(10_000, rel=1e-3)
        assert verdict.upper - verdict.expected == pytest.approx(added, rel=0.02)


def test_a_fitted_model_is_used_again(tmp_path, monkeypatch):
    meter = FakeMeter()
    monkeypatch.setattr("gglspeedup.loader.meter_for", lambda device, backend: meter)
    limit = FakeMeter.base + 2000 * FakeMeter.node
    made = loader(memory_limit=MemoryBudget(limit), prefetch=0)
    for _ in range(3):
        for batch in made:
            meter.train(batch)
    made.memory_budget.save(tmp_path / "model")
    again = loader(memory_limit=MemoryBudget(limit, model=tmp_path / "model"), prefetch=0)
    assert [batch.batch_size for batch in again] == [20] * 5 + [1]
    assert again.memory_budget.stats()["split"] == 0


def test_a_process_may_have_more_in_use_than_the_one_that_a_model_was_fitted_in(tmp_path, monkeypatch):
    meter = FakeMeter()
    monkeypatch.setattr("gglspeedup.loader.meter_for", lambda device, backend: meter)
    made = loader(memory_limit=MemoryBudget("1G"), prefetch=0)
    for _ in range(10):
        for batch in made:
            meter.train(batch)
    made.memory_budget.save(tmp_path / "model")
    meter.base = FakeMeter.base + 300 * FakeMeter.node
    limit = int((meter.base + 110 * FakeMeter.node) * 1.05)
    again = loader(memory_limit=MemoryBudget(limit, model=tmp_path / "model"), prefetch=0)
    for _ in range(10):
        for batch in again:
            meter.train(batch)
    stats = again.memory_budget.stats()
    assert stats["over"] == 0 and stats["split"] > 10 and stats["error"] < 0.05


def test_an_evaluation_has_a_budget_of_its_own():
    made = loader(memory_limit=budget(90))
    other = made.evaluation(SEEDS[:10])
    assert other.memory_budget is not made.memory_budget and other.memory_budget.limit == made.memory_budget.limit
    assert sum(batch.batch_size for batch in other) == 10
    assert made.memory_budget.stats()["batches"] == 0 and other.memory_budget.stats()["batches"] == 1


def test_leaving_an_epoch_ends_the_measurement():
    made = loader(memory_limit=budget(1000))
    iterator = iter(made)
    next(iterator), next(iterator)
    assert made.memory_budget.stats()["measured"] == 1
    iterator.close()
    assert made.memory_budget.stats()["measured"] == 2


def test_loaders_with_a_limit_can_be_pickled():
    made = loader(memory_limit=budget(90))
    expected = [content(batch) for batch in made]
    made.set_epoch(0)
    copied = pickle.loads(pickle.dumps(made))
    assert [content(batch) for batch in copied] == expected
    assert "split" in repr(copied.memory_budget)


@pytest.mark.parametrize(
    ("limit", "error", "match"),
    [
        ("6.5Q", ValueError, "memory_limit needs a number of bytes"), (-1, ValueError, "memory_limit"),
        (0, ValueError, "limit needs more than no bytes"), ([1], TypeError, "memory_limit"), (True, TypeError, "limit"),
        ("1K", ValueError, r"memory_limit needs more than the \d+ bytes that are in use before training"),
    ],
)  # fmt: skip
def test_bad_limits(limit, error, match):
    with pytest.raises(error, match=match) as raised:
        loader(memory_limit=limit)
    assert isinstance(raised.value, gglspeedup.GGLSpeedupError)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"policy": "drop"}, ValueError, "policy needs one of"), ({"learn": 1}, TypeError, "learn"),
        ({"learn": False}, ValueError, "learn needs a model"), ({"model": 5}, TypeError, "model needs"),
        ({"widths": 5}, TypeError, "widths"), ({"widths": [1.5]}, TypeError, "widths"),
        ({"widths": [0, 1]}, ValueError, "widths"), ({"limit": "x"}, ValueError, "limit needs"),
    ],
)  # fmt: skip
def test_bad_budgets(options, error, match):
    with pytest.raises(error, match=match):
        MemoryBudget(**{"limit": "1G", **options})


def test_what_does_not_go_with_the_loader():
    with pytest.raises(ValueError, match="widths needs 3 numbers for 2 hops, got 2"):
        loader(memory_limit=MemoryBudget("1T", widths=[7, 5]))
    with pytest.raises(ValueError, match="a model of batches of 1 hops"):
        loader(memory_limit=MemoryBudget("1T", model=known_model()), sizes=[4])
    with pytest.raises(ValueError, match="model needs measurements"):
        MemoryBudget("1T").save("nowhere")


def test_widths_make_a_model_fit_others():
    """Fitted with hidden layers of 16, used with such of 64."""
    meter_model = MemoryModel(2)
    rng = np.random.default_rng(3)
    for _ in range(60):
        nodes, edges = rng.integers(1, 1000, 3).tolist(), tuple(rng.integers(1, 1000, 2).tolist())
        load = BatchLoad(tuple(nodes), edges, (28.0, 64.0, 20.0), 0, 0)
        meter_model.observe(load, 10**6 + 3 * 28 * nodes[0] + 2 * 64 * nodes[1])
    wide = BatchLoad((500, 100, 20), (600, 300), (28.0, 256.0, 20.0), 0, 0)
    assert meter_model.predict(wide) == pytest.approx(10**6 + 3 * 28 * 500 + 2 * 256 * 100, rel=1e-4)


def test_frameworks_without_a_peak_on_a_gpu():
    from gglspeedup.device import Device
    from gglspeedup.memory_meter import meter_for

    with pytest.raises(DeviceError, match="memory_limit needs a framework whose allocator tells its peak"):
        meter_for(Device(0), "numpy")
