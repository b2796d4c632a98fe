"""The CUDA kernels in a thousand schedules, without races; and that both checks find what they look for.

Tiles are small here, so that small batches have several blocks at work, which take turns at every access to memory.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import naive
import numpy as np
import pytest
from conftest import random_graph
from host_cuda import HostRuntime, host_source
from test_visits import needs_numba_cuda

from gglspeedup import CSRGraph
from gglspeedup.errors import ArgumentIndexError, ArgumentValueError
from gglspeedup.kernels import gather_gpu, sample_gpu
from gglspeedup.kernels.history import stamp_of
from gglspeedup.sampler_gpu import CudaSampler

TILES = {"TILE_ROWS": 32, "TILE_EDGES": 128, "EDGE_THREADS": 64}
NODES = 120  # of which some share a cell of the hash table
# A kernel of draw.cuh each, and both kinds of expansion; the last reads a hop's edges before it draws them.
SIZES = {
    "draw_8": (5, 3), "draw_16": (12,), "draw_32": (25,), "draw_128": (33,), "draw_1024": (130,), "draw_all": (-1, 2)
}  # fmt: skip
CASES = [(table, name) for table in ("dense", "hash") for name in SIZES]


@pytest.fixture
def runtime(tmp_path_factory, monkeypatch):
    """Makes a runtime of small tiles in which blocks walk several of them."""
    smaller = {"TILE_ROWS": 32, "TILE_EDGES": 128, "_THREADS": 64, "_SCAN_THREADS": 64, "MAX_BLOCKS": 3}
    for name, value in smaller.items():
        monkeypatch.setattr(sample_gpu, name, value)
    monkeypatch.setattr(gather_gpu, "_THREADS", 64)
    monkeypatch.setattr(gather_gpu, "MAX_BLOCKS", 3)
    return lambda order: HostRuntime(tmp_path_factory.getbasetemp(), order, TILES)


class Sampling:
    """One batch, compared with the naive one."""

    def __init__(self, runtime, table, name):
        rng = np.random.default_rng(7)
        self.sizes = SIZES[name]
        self.graph = random_graph(rng, NODES, 9, hub=500)
        if self.sizes[0] > 32:  # rows a little longer than the fanout: nearly all draws meet
            degree = self.sizes[0] + 3
            self.graph = CSRGraph(np.arange(NODES + 1) * degree, rng.integers(0, NODES, NODES * degree))
        indptr, indices = (runtime.to_device(part) for part in (self.graph.indptr, self.graph.indices.astype(np.int32)))
        limit = 60 if name == "draw_all" else 1 << 26
        self.sampler = CudaSampler(runtime, indptr, indices, None, NODES, table, max_edges=limit)

    def __call__(self, seed):
        most = {5: 80, 33: 5, 130: 5}.get(self.sizes[0], 30)  # rows of more tiles than there are blocks
        seeds = np.random.default_rng(seed).permutation(NODES)[: most - seed % 5]
        if 0 not in seeds.tolist():
            seeds[0] = 0  # the hub
        options = {"seed": 3, "batch": seed, "expand": ("layer", "frontier")[seed % 2], "replace": seed % 5 == 4}
        self.compare(self.sampler.sample(seeds, self.sizes, **options), seeds, options)

    def compare(self, result, seeds, options):
        expected = naive.sample(self.graph.indptr, self.graph.indices, seeds.tolist(), self.sizes, **options)
        np.testing.assert_array_equal(result[0], expected[0])
        for hop, other in zip(result[1], expected[1], strict=True):
            np.testing.assert_array_equal(hop[0], other[0])
            np.testing.assert_array_equal(hop[1], other[1])
            assert hop[2] == other[2]


class Many(Sampling):
    """Several batches in the same launches, each compared with the naive one."""

    def __init__(self, runtime, name):
        super().__init__(runtime, "hash", name)
        self.sampler._many._max_edges = 1 << 26

    def __call__(self, seed):
        rng = np.random.default_rng(seed)
        most = 40 if self.sizes[0] == 5 else 5
        batches = [(rng.permutation(NODES)[: most - at], seed + at) for at in range(3)]
        options = {"seed": 3, "expand": ("layer", "frontier")[seed % 2], "replace": seed % 5 == 4}
        made = list(self.sampler.sample_each(batches, self.sizes, at_once=3, **options))
        assert len(self.sampler._many._workspaces.free) == 1  # they were sampled together
        for result, (seeds, number) in zip(made, batches, strict=True):
            self.compare(result, seeds, {**options, "batch": number})


class BadSeeds:
    """Many seeds that are no nodes, or repeat others: the first is named."""

    def __init__(self, runtime, table):
        self.sampler = Sampling(runtime, table, "draw_8").sampler

    def __call__(self, seed):
        good = np.arange(NODES // 2)
        for low, high, error in ((NODES, 3 * NODES, ArgumentIndexError), (0, 2 * NODES, ArgumentValueError)):
            more = np.random.default_rng(seed).integers(low, high, 120) % (3 * NODES if low else NODES)
            seeds = np.concatenate([good, more])
            first = len(good) if low else next(i for i in range(150) if seeds[i] in seeds[:i])
            with pytest.raises(error, match=f" at position {first}(;|$)"):
                self.sampler.sample(seeds, (3,), seed=0, batch=0)


class Gathering:
    """Rows of two tiers, and their counters; bad ids, and rows scattered back."""

    def __init__(self, runtime):
        self.runtime = runtime

    def __call__(self, seed):
        rng, runtime = np.random.default_rng(seed), self.runtime
        row_bytes = int(rng.choice([1, 2, 12, 40, 48, 96]))
        x = rng.integers(0, 256, (NODES, row_bytes), np.uint8)
        ids = rng.integers(0, NODES, 150)
        slot = np.where(rng.random(NODES) < 0.5, np.arange(NODES), -1).astype(np.int32)
        out, counters = runtime.empty((150, row_bytes), np.uint8), runtime.zeros(2, np.uint64)
        bad = runtime.to_device(np.full(1, (1 << 64) - 1, np.uint64))
        tier, wanted, places = runtime.to_device(x), runtime.to_device(ids), runtime.to_device(slot)
        gather_gpu.gather_rows(runtime, tier, places, tier, NODES, wanted, out, row_bytes, counters, bad)
        np.testing.assert_array_equal(out, x[ids])
        hot = int((slot[ids] >= 0).sum())
        assert counters.tolist() == [hot, 150 - hot] and bad[0] == (1 << 64) - 1
        back = runtime.zeros((200, row_bytes), np.uint8)
        places = rng.permutation(200)[:150]
        gather_gpu.scatter_rows(runtime, out, runtime.to_device(places), back, row_bytes)
        np.testing.assert_array_equal(back[places], x[ids])
        ids[rng.integers(rng.integers(0, 100), 150, 30)] = NODES
        first = int(np.flatnonzero(ids == NODES)[0])
        wanted = runtime.to_device(ids)
        gather_gpu.gather_rows(runtime, tier, None, None, NODES, wanted, out, row_bytes, counters, bad)
        assert bad[0] == first
        bad[0] = (1 << 64) - 1
        gather_gpu.check_ids(runtime, wanted, NODES, bad)
        assert bad[0] == first


def everything(runtime):
    """All there is to check, on one runtime."""
    return [
        *(Sampling(runtime, *case) for case in CASES), *(Many(runtime, name) for name in SIZES),
        *(BadSeeds(runtime, table) for table in ("dense", "hash")), Gathering(runtime),
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_bits_in_any_schedule(runtime, seeds):
    on_host = runtime("shuffled")
    checks = everything(on_host)
    for seed in range(seeds):
        on_host.seed = seed << 20
        checks[seed % len(checks)](seed)


def test_no_races(runtime):
    on_host = runtime("races")
    for seed, check in enumerate(everything(on_host)):
        check(seed)


# --- what the checks find -------------------------------------------------------------------------------------------


def lines_with(pattern):
    """The lines that match, of the `.cu` files with their headers."""
    return [
        pytest.param(file, i, id=f"{file}:{i} {text.strip()[:60]}")
        for file in ("sample.cu", "gather.cu")
        for i, text in enumerate(host_source(file, {}).splitlines(), 1)
        if re.search(pattern, text)
    ]


def is_caught(on_host, file, line, rounds):
    """Whether a check fails if a file's kernels lack the barrier of a line, or that its operation is atomic."""
    checks = everything(on_host)
    on_host.broken_line = line
    for seed in range(rounds):
        on_host.seed = seed << 20
        for check in checks[-1:] if file == "gather.cu" else checks[:-1]:
            try:
                check(seed)
            except (AssertionError, ArgumentIndexError, ArgumentValueError):  # also good seeds refused
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line"), lines_with(r"__syncthreads\(\)|atomic(Min|Add|CAS)\("))
def test_no_barrier_and_no_atomic_operation_is_idle(runtime, file, line):
    assert is_caught(runtime("races"), file, line, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "line"), lines_with(r"atomic(Min|Add|CAS)\("))
def test_a_load_and_a_store_for_an_atomic_operation_changes_bits(runtime, file, line):
    assert is_caught(runtime("shuffled"), file, line, 100)


# --- histories: kernels of numba.cuda, of one atomic operation a thread; any order of those is an order of threads ---


def maximum(cells, at, value):
    """cuda.atomic.max"""
    cells[at] = max(cells[at], value)


def plain(cells, at, value):
    """What is no such thing."""
    cells[at] = value


@pytest.fixture
def push(runtime, monkeypatch):
    """Runs the kernels of a push in an order of threads, and scatters the rows."""
    needs_numba_cuda()
    from gglspeedup.kernels import history_gpu

    on_host = runtime("shuffled")

    def run(rng, n_id, values, number, stamps, rows, change):
        thread = SimpleNamespace(at=0)
        stand_in = SimpleNamespace(grid=lambda _: thread.at, atomic=SimpleNamespace(max=change))
        monkeypatch.setattr(history_gpu, "cuda", stand_in)
        monkeypatch.setattr(history_gpu, "_stamp_of", stamp_of)
        positions = np.full(len(n_id), -5)
        for kernel, arguments in (
            (history_gpu.stamp_each, (n_id, number, stamps)), (history_gpu.keep_last, (n_id, number, stamps, positions))
        ):  # fmt: skip
            for thread.at in rng.permutation(len(n_id) + 3).tolist():  # a few threads too many
                kernel(*arguments)
        given, where = on_host.to_device(values), on_host.to_device(positions)
        gather_gpu.scatter_rows(on_host, given, where, rows, values[:1].nbytes)

    run.zeros = on_host.zeros
    return run


@pytest.mark.parametrize("seeds", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_pushes_in_any_schedule(push, seeds):
    assert all(_pushed_right(push, seed, maximum) for seed in range(seeds))
    assert not all(_pushed_right(push, seed, plain) for seed in range(50))


def _pushed_right(push, seed, change):
    rng = np.random.default_rng(seed)
    expected = naive.History(20, 3, np.float32)
    rows, stamps = push.zeros((20, 3), np.float32), np.zeros(20, np.int64)
    for number in (1, 2):
        n_id, values = rng.integers(0, 20, 16), rng.random((16, 3), dtype=np.float32)
        expected.push(values, n_id.tolist())
        push(rng, n_id, values, number, stamps, rows, change)
    return np.array_equal(rows, expected.pull(range(20))) and (stamps >> 32).tolist() == expected.written
