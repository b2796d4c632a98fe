"""Every CUDA and CuPy call that can fail is failed: the error is ours, nothing leaks, and a second try is right.

The library's own CUDA layer works on a CuPy that runs on the host. A scenario is a list of steps; it is run once to
count its calls, then once for each of them, which fails there: by each of its errors, once or from then on. A step that
raises is tried again, with nothing in its way, and must give what it gave without faults.
"""

from __future__ import annotations

import gc
import itertools
import logging
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import random_graph
from cupy_on_host import ERRORS, CompileException, CUDARuntimeError, CupyOnHost, OutOfMemoryError
from host_cuda import HostRuntime
from test_cuda_schedules import TILES

from gglspeedup import (
    CGPUFeature,
    CSRGraph,
    GGLSpeedupError,
    GPUSampler,
    HistoryStore,
    MultiGPUSampler,
    NodeLoader,
    adapters,
    device,
    peer_gpu,
    placement,
)
from gglspeedup.errors import ArgumentValueError, DeviceError, DeviceMemoryError, cuda_failures
from gglspeedup.history import place
from gglspeedup.kernels import cuda, gather_gpu, sample_gpu
from gglspeedup.kernels.cuda import CudaRuntime

NODES = 40
RNG = np.random.default_rng(5)
PLAIN = random_graph(RNG, NODES, 9)
GRAPH = CSRGraph(PLAIN.indptr, PLAIN.indices, edge_ids=RNG.permutation(PLAIN.num_edges))
X = RNG.random((NODES, 3), dtype=np.float32)

Step = Callable[[Any], Any]


@pytest.fixture
def cupy(tmp_path_factory, monkeypatch):
    """A CuPy on the host, of two devices that are there."""
    for name, value in {"TILE_ROWS": 32, "TILE_EDGES": 128, "_THREADS": 64, "_SCAN_THREADS": 64}.items():
        monkeypatch.setattr(sample_gpu, name, value)
    monkeypatch.setattr(gather_gpu, "_THREADS", 64)
    made = CupyOnHost(HostRuntime(tmp_path_factory.getbasetemp(), tiles=TILES))
    runtimes: dict[int, CudaRuntime] = {}
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.delitem(sys.modules, "gglspeedup.adapters.cupy", raising=False)  # it may have the real one
    adapters._adapter.cache_clear()
    monkeypatch.setattr(device, "driver_devices", lambda: (2, ""))
    monkeypatch.setattr(device, "_cupy_problem", lambda: "")
    for module in (placement, place):
        monkeypatch.setattr(
            module, "runtime_of", lambda at: runtimes.setdefault(at.index, CudaRuntime(at.index)), raising=True
        )
    made.forget_kernels = runtimes.clear
    stand_in = types.ModuleType("gglspeedup.kernels.history_gpu")
    stand_in.stamp_rows = made.stamp_rows
    monkeypatch.setitem(sys.modules, "gglspeedup.kernels.history_gpu", stand_in)
    monkeypatch.setattr(cuda, "_registrations", type(cuda._registrations)())
    # What pytest keeps of a log holds the errors in it, and so all memory that their frames know.
    monkeypatch.setattr(logging.getLogger("gglspeedup"), "disabled", True)
    gc.collect()
    gc.freeze()  # what is collected between runs is theirs alone, which takes no time
    yield made
    sys.modules.pop("gglspeedup.adapters.cupy", None)
    adapters._adapter.cache_clear()


def bits(value: Any) -> Any:
    """What a step gave, to be compared, holding no memory of the device."""
    if value is None or isinstance(value, (int, float, str, bool)):
        return value
    if isinstance(value, dict):
        return sorted(value.items())
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    array = np.array(value)
    return array.dtype.str, array.shape, array.tobytes()


def run(cupy: CupyOnHost, steps: list[Step], expected: list[Any] | None = None) -> list[Any]:
    """Run the steps of a scenario; where `expected` is given, try each again that raises, and compare."""
    held = types.SimpleNamespace(cupy=cupy)
    found = []
    for number, step in enumerate(steps):
        try:
            found.append(bits(step(held)))
        except GGLSpeedupError as error:
            assert expected is not None, error
            assert " needs " in str(error) or "pinned" in str(error), error
            cupy.faults.arm(None)
            found.append(bits(step(held)))
        if expected is not None:
            assert found[-1] == expected[number], f"step {number}"
    return found


# Of these there may be no more for a while; others fail once.
MAY_STAY = ("allocation", "pinned allocation", "registration", "stream", "begin of a capture", "end of a capture")


def check_all(cupy: CupyOnHost, steps: list[Step], every: bool) -> None:
    """Fail every call of a scenario; or, once, one that stands for all that come from the same lines of the library."""
    cupy.faults.arm(None)
    cupy.forget_kernels()
    expected = run(cupy, steps)
    kinds, places = cupy.faults.reached, cupy.faults.places
    assert not cupy.leaked()
    seen: set[Any] = set()
    for at, kind in enumerate(kinds):
        if not every and (kind, places[at]) in seen:
            continue
        seen.add((kind, places[at]))
        for which in range(len(ERRORS.get(kind, [None])) if every else 1):
            for stays in (False, True) if every and kind in MAY_STAY else (False,):
                cupy.forget_kernels()
                cupy.faults.arm(at, which, stays)
                try:
                    run(cupy, steps, expected)
                    cupy.faults.arm(None)
                    leaked = cupy.leaked()
                    if places[at][0][0].co_name == "_close":  # without its device it cannot be closed
                        cupy.runtime.opened.clear()
                        leaked.pop("handles", None)
                    assert not leaked
                except BaseException as error:
                    error.add_note(f"the {kind} at {at} of {len(kinds)}, error {which}, stays: {stays}")
                    raise


def in_ci(first: Any, *others: Any) -> list[Any]:
    """One kind in short; the slow tests have every call of it, and the others in short."""
    slow = [(first, True), *((kind, False) for kind in others)]
    return [(first, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def sampling(where: str, hops: tuple[int, ...] = (3, 2)) -> list[Step]:
    """Make a sampler and take batches: launched, recorded, replayed, larger, and of seeds on the device."""

    def make(held: Any) -> None:
        held.sampler = GPUSampler(0, GRAPH, hops, seed=4, placement=where)

    def take(seeds: Any, batch: int) -> Step:
        def step(held: Any) -> Any:
            with held.cupy.faults.off():
                given = held.cupy.asarray(np.array(seeds)) if batch == 4 else seeds
            n_id, adjs = held.sampler.sample(given, batch)
            return [n_id, *(part for adj in adjs for part in adj)]

        return step

    def count(held: Any) -> Any:
        return held.sampler.sample([5, 6]).batch  # the number of a batch that failed is given again

    return [make, take([1, 2, 3], 1), take([4, 7, 8], 2), take([0, 9, 3], 3), take(list(range(20)), 4), count]


def sampling_many(where: str) -> list[Step]:
    """Make a sampler and take several batches at once: launched, recorded, replayed, more of them, and one by one."""

    def make(held: Any) -> None:
        held.sampler = GPUSampler(0, GRAPH, [3, 2], seed=4, placement=where)

    def take(*counts: int, on_device: bool = False) -> Step:
        def step(held: Any) -> Any:
            seeds = [np.arange(count)[::-1].copy() for count in counts]
            if on_device:
                with held.cupy.faults.off():
                    seeds[0] = held.cupy.asarray(seeds[0])
            made = held.sampler.sample_many([(ids, None) for ids in seeds])
            return [(b.batch, b.n_id, *(part for adj in b.adjs for part in adj)) for b in made]

        return step

    return [make, take(3, 2), take(4, 4), take(4, 3), take(2, 9, 1), take(3, 2, on_device=True), take(5)]


def sampling_each(at_once: int) -> list[Step]:
    """Take batches whose work is enqueued before the ones before them are waited for; leave some of them."""

    def make(held: Any) -> None:
        held.sampler = GPUSampler(0, GRAPH, [3, 2], seed=4, placement="device")

    def take(count: int, given: int) -> Step:
        def step(held: Any) -> Any:
            batches = [(np.arange(at + 1, at + 9), at) for at in range(count)]
            made = held.sampler.sample_each(batches, at_once=at_once)
            try:
                return [(b.n_id, *(part for adj in b.adjs for part in adj)) for b in itertools.islice(made, given)]
            finally:
                made.close()

        return step

    return [make, take(5, 5), take(7, 2), take(5, 5)]


@pytest.mark.parametrize(("at_once", "every"), in_ci(1, 2))
def test_sampling_each(cupy, at_once, every):
    check_all(cupy, sampling_each(at_once), every)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "every"), [("device", True), ("uva", False)])
def test_sampling_many(cupy, where, every):
    check_all(cupy, sampling_many(where), every)


@pytest.mark.parametrize(("where", "every"), in_ci("device", "uva"))
def test_sampling(cupy, where, every):
    check_all(cupy, sampling(where), every)


def gathering(budget: int, mapped: Any = None) -> list[Step]:
    """Load features and gather rows, by ids of the host and of the device; ask for what was served."""

    def make(held: Any) -> None:
        held.features = CGPUFeature(GRAPH, 0, budget)

    def load(held: Any) -> None:
        held.features.from_cpu_tensor(X.copy() if mapped is None else mapped)

    def gather(held: Any) -> Any:
        return held.features[[3, 39, 3, 0]]

    def gather_on_device(held: Any) -> Any:
        with held.cupy.faults.off():
            ids = held.cupy.asarray(np.arange(NODES)[::-1].copy())
        return held.features[ids]

    def refuse(held: Any) -> Any:
        with pytest.raises(IndexError, match="got 40 at position 1"):
            held.features[[0, NODES]]

    return [make, load, gather, gather_on_device, refuse]


@pytest.mark.parametrize(("tiers", "every"), in_ci("hot and pinned", "hot", "pinned", "mapped"))
def test_gathering(cupy, tiers, every, tmp_path):
    mapped = None
    if tiers == "mapped":
        X.tofile(tmp_path / "x")
        mapped = np.memmap(tmp_path / "x", X.dtype, "r", shape=X.shape)
    check_all(cupy, gathering({"hot": X.nbytes, "pinned": 0}.get(tiers, X.nbytes // 3), mapped), every)


def keeping(storage: str, host_gather: bool = False) -> list[Step]:
    """Push to histories and pull from them, in every way."""
    rng = np.random.default_rng(9)
    values, ids = rng.random((6, 3), dtype=np.float32), [7, 2, 30, 2, 9, 7]

    def make(held: Any) -> None:
        held.store = HistoryStore(NODES, [3, 2], 0, storage=storage, host_gather=host_gather)

    def push(held: Any) -> None:
        held.store[0].push(values, ids)

    def push_in_any_order(held: Any) -> None:
        # The second try is another push: of what the first one has left on the device nothing may win over it.
        held.tried = not getattr(held, "tried", False)
        order = slice(None, None, 1 if held.tried else -1)
        held.store[0].push(values[:4][order], [11, 12, 13, 14][order])

    def push_ranges(held: Any) -> None:
        held.store[1].push(values[:, :2], offset=[3, 20], count=[4, 2])

    def push_again(held: Any) -> None:
        with held.cupy.faults.off():
            given, where = held.cupy.asarray(values[:2]), held.cupy.asarray(np.array([9, 9]))
        held.store[0].push(given, where)

    def pull(held: Any) -> Any:
        return held.store[0].pull(range(NODES)), held.store[1].pull([3, 4, 5, 6, 20, 21, 22])

    def pull_later(held: Any) -> Any:
        return held.store[0].pull_async([9, 2]).wait()

    def prefetch(held: Any) -> Any:
        held.store.prefetch([7, 9])
        return held.store[0].pull([7, 9]), held.store[1].pull([7, 9])

    def known(held: Any) -> Any:
        held.store.synchronize()
        return (held.store.age(table=0) >= 0).tolist(), held.store.age([3, 7], table=1).tolist()

    def close(held: Any) -> None:
        held.store.close()

    return [make, push_in_any_order, push, push_ranges, pull, push_again, pull, pull_later, prefetch, known, close]


@pytest.mark.parametrize(("storage", "every"), in_ci("device", "pinned", "staged"))
def test_histories(cupy, storage, every):
    check_all(cupy, keeping("pinned" if storage == "staged" else storage, storage == "staged"), every)


def sharing() -> list[Step]:
    """Shards of a graph in the memory of two devices, sampled on both; another process's view of one."""

    def make(held: Any) -> None:
        held.many = MultiGPUSampler(0, GRAPH, [0, 1], sizes=[3, 2], seed=4)

    def take(rank: int) -> Step:
        def step(held: Any) -> Any:
            n_id, adjs = held.many.sample([1, 2, 30], rank, batch=rank)
            return [n_id, *(part for adj in adjs for part in adj)]

        return step

    def attach(held: Any) -> Any:
        holder = held.many.graph.indices.holders[0]
        if not hasattr(holder, "address"):
            return True, True  # in host memory, as the devices had no room
        text = pickle.dumps(holder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peer_gpu, "_own", {})
            twin = pickle.loads(text)
        return twin.address(1) == holder.address(1), twin.address(1) == twin.address(1)

    return [make, take(0), take(1), attach]


@pytest.mark.slow
def test_sharing(cupy):
    check_all(cupy, sharing(), False)


def loading() -> list[Step]:
    """An epoch of a loader, whose threads have streams of their own."""

    def epoch(held: Any) -> Any:
        loader = NodeLoader(
            GRAPH, X, seeds=np.arange(24), sizes=[3, 2], batch_size=8, device=0, cache=X.nbytes // 3, backend="cupy",
            seed=6, prefetch=2,
        )  # fmt: skip
        return [(batch.x, batch.n_id, *(part for adj in batch.adjs for part in adj)) for batch in loader]

    return [epoch]


@pytest.mark.slow
def test_loading(cupy):
    check_all(cupy, loading(), False)


def test_what_serves_instead_is_said(cupy, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("gglspeedup"), "disabled", False)
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("gglspeedup"), "handlers", [handler])

    def refuse(*_: Any, **__: Any) -> Any:
        raise CUDARuntimeError(2)

    monkeypatch.setattr(cupy, "alloc_pinned_memory", refuse)
    monkeypatch.setattr(cupy, "Stream", refuse)
    gpu, cpu = GPUSampler(0, GRAPH, [3, 2], placement="device"), GPUSampler("cpu", GRAPH, [3, 2])
    for batch in range(4):
        np.testing.assert_array_equal(gpu.sample([1, 2, 3], batch).n_id, cpu.sample([1, 2, 3], batch).n_id)
    assert any("no host memory can be pinned" in text for text in warnings)
    assert sum("cannot be recorded as CUDA graphs" in text for text in warnings) == 1


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OutOfMemoryError("of it"), DeviceMemoryError), (CUDARuntimeError(700), DeviceError),
        (CompileException("no code"), DeviceError), (MemoryError("of the host"), DeviceMemoryError),
        (KeyError("ours"), KeyError), (ArgumentValueError("ours"), ArgumentValueError),
    ],
)  # fmt: skip
def test_errors_of_cuda_become_ours(raised, expected):
    with pytest.raises(expected) as caught, cuda_failures(1):
        raise raised
    if caught.value is not raised:
        assert caught.value.__cause__ is raised and "cuda:1" in str(caught.value)
        assert isinstance(caught.value, MemoryError) == isinstance(raised, MemoryError)
