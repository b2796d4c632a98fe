"""The kernels that move rows of features, run on the host: every width, every mix of tiers."""

from __future__ import annotations

import subprocess
from itertools import product

import naive
import numpy as np
import pytest
from host_cuda import ORDERS, RUNTIMES, CountingRuntime, HostRuntime, to_host
from hypothesis import given, settings
from hypothesis import strategies as st

from gglspeedup.kernels import gather_gpu
from gglspeedup.kernels.cuda import PinningError
from gglspeedup.kernels.gather_gpu import check_ids, gather_rows, scatter_rows

NO_PLACE = (1 << 64) - 1
DTYPES = [np.uint8, np.int8, np.bool_, np.float16, np.int16, np.float32, np.int32, np.float64, np.int64, np.complex128]


@pytest.fixture(scope="session", params=RUNTIMES)
def new_runtime(request, tmp_path_factory):
    """Makes a runtime: kernels on the host, compiled once a session, in an order; and on the GPU if there is one."""
    folder = tmp_path_factory.getbasetemp()
    return lambda order="forwards": HostRuntime(folder, order) if request.param == "host" else CountingRuntime()


def cells(runtime):
    """Counters and the cell of the first bad place, as a caller makes them."""
    return runtime.zeros(2, np.uint64), runtime.to_device(np.full(1, NO_PLACE, np.uint64))


def features(rng, rows, width, dtype):
    values = rng.integers(0, 256, (rows, width * np.dtype(dtype).itemsize), np.uint8)
    return (values % 2).view(dtype) if dtype == np.bool_ else values.view(dtype)


def assert_bytes_equal(left, right):
    left, right = to_host(left), to_host(right)
    assert left.dtype == right.dtype and left.shape == right.shape
    np.testing.assert_array_equal(left.view(np.uint8), right.view(np.uint8))


def gathered(runtime, x, ids, hot_nodes, cold_by_slot=False):
    """Gather through two tiers, the rows of `hot_nodes` in the first; return the rows, counters and bad place."""
    hot_nodes = np.asarray(hot_nodes, np.int64)
    slot = np.full(len(x), -1, np.int32)
    cold = x
    if cold_by_slot:
        cold_nodes = np.setdiff1d(np.arange(len(x)), hot_nodes)[::-1]
        slot[cold_nodes] = -1 - np.arange(len(cold_nodes))
        cold = x[cold_nodes]
    slot[hot_nodes] = np.arange(len(hot_nodes))
    row_bytes = x.itemsize * x.shape[1]
    out = runtime.to_device(np.full((len(ids), row_bytes), 0xA5, np.uint8).view(x.dtype))
    counters, bad = cells(runtime)
    gather_rows(
        runtime, runtime.to_device(x[hot_nodes]), runtime.to_device(slot), runtime.to_device(cold), len(x),
        runtime.to_device(np.asarray(ids, np.int64)), out, row_bytes, counters, bad, cold_by_slot=cold_by_slot,
    )  # fmt: skip
    return out, counters.tolist(), int(bad[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_widths(new_runtime, dtype):
    rng = np.random.default_rng(1)
    runtime = new_runtime()
    for width in (1, 2, 3, 5, 8, 25, 100, 129):
        x = features(rng, 50, width, dtype)
        ids = rng.integers(0, 50, 70)
        hot = rng.permutation(50)[:20]
        out, counters, bad = gathered(runtime, x, ids, hot)
        assert_bytes_equal(out, naive.gather(x, ids))
        in_hot = int(np.isin(ids, hot).sum())
        assert counters == [in_hot, 70 - in_hot] and bad == NO_PLACE


@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20, 24, 48, 100, 255, 400, 512, 528, 600, 2408])
def test_row_bytes_choose_the_word(new_runtime, row_bytes):
    rng = np.random.default_rng(row_bytes)
    runtime = new_runtime()
    x = features(rng, 9, row_bytes, np.uint8)
    ids = np.array([8, 0, 0, 5, 3])
    out, counters, _bad = gathered(runtime, x, ids, [5, 0])
    assert_bytes_equal(out, x[ids])
    assert counters == [3, 2]
    width = next(w for w in (16, 8, 4, 2, 1) if row_bytes % w == 0)
    assert runtime.launches == [f"gather_rows_{width}"]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1 << 30))
def test_tiers(new_runtime, data, seed):
    rng = np.random.default_rng(seed)
    rows = data.draw(st.integers(1, 300))
    x = features(rng, rows, data.draw(st.integers(1, 40)), data.draw(st.sampled_from(DTYPES)))
    ids = rng.integers(0, rows, data.draw(st.integers(0, 900)))
    hot = rng.permutation(rows)[: data.draw(st.integers(0, rows))]
    if not len(hot):
        hot = np.array([0])
    runtime = new_runtime(data.draw(st.sampled_from(list(ORDERS))))
    out, counters, bad = gathered(runtime, x, ids, hot, data.draw(st.booleans()) and len(hot) < rows)
    assert_bytes_equal(out, x[ids])
    assert counters == [int(np.isin(ids, hot).sum()), int((~np.isin(ids, hot)).sum())]
    assert bad == NO_PLACE


@pytest.mark.parametrize("resident", [False, True])
def test_one_tier_needs_no_slots(new_runtime, resident):
    rng = np.random.default_rng(2)
    runtime = new_runtime()
    x = features(rng, 40, 6, np.float32)
    ids = rng.integers(0, 40, 55)
    out = runtime.empty((55, 6), np.float32)
    counters, bad = cells(runtime)
    tier = runtime.to_device(x)
    hot, cold = (tier, None) if resident else (None, tier)
    gather_rows(runtime, hot, None, cold, 40, runtime.to_device(ids), out, 24, counters, bad)
    assert_bytes_equal(out, x[ids])
    assert counters.tolist() == ([55, 0] if resident else [0, 55])
    gather_rows(runtime, hot, None, cold, 40, runtime.to_device(ids), out, 24, counters, bad)
    assert sum(counters.tolist()) == 110  # counters add up


def test_few_blocks_walk_all_rows(new_runtime, monkeypatch):
    monkeypatch.setattr(gather_gpu, "MAX_BLOCKS", 2)
    rng = np.random.default_rng(2)
    x = features(rng, 300, 33, np.float32)
    ids = rng.integers(0, 300, 777)
    runtime = new_runtime()
    assert_bytes_equal(gathered(runtime, x, ids, [1, 2, 3])[0], x[ids])
    bad = cells(runtime)[1]
    ids[700] = -1
    check_ids(runtime, runtime.to_device(ids), 300, bad)
    assert int(bad[0]) == 700


def test_alignment_limits_the_word(new_runtime):
    runtime = new_runtime()
    rng = np.random.default_rng(3)
    whole = runtime.to_device(features(rng, 1, 16 * 20 + 4, np.uint8)[0])
    x = whole[4:].reshape(20, 16)
    assert gather_gpu.word_bytes(16, x) == 4 and gather_gpu.word_bytes(16, whole) == 16
    out = runtime.empty((3, 16), np.uint8)
    gather_rows(runtime, x, None, None, 20, runtime.to_device(np.array([19, 0, 4])), out, 16, *cells(runtime))
    assert runtime.launches == ["gather_rows_4"]
    assert_bytes_equal(out, to_host(x)[[19, 0, 4]])


@pytest.mark.parametrize("order", ORDERS)
def test_bad_ids_touch_nothing(new_runtime, order):
    rng = np.random.default_rng(3)
    runtime = new_runtime(order)
    x = features(rng, 30, 8, np.float32)
    ids = rng.integers(0, 30, 500)
    ids[[137, 138, 400]] = 30, -1, 1 << 62
    out, counters, bad = gathered(runtime, x, ids, [2, 9])
    assert bad == 137
    good = (ids >= 0) & (ids < 30)
    assert_bytes_equal(to_host(out)[good], x[ids[good]])
    assert (to_host(out)[~good].view(np.uint8) == 0xA5).all()
    assert sum(counters) == good.sum()
    cell = cells(runtime)[1]
    check_ids(runtime, runtime.to_device(ids), 30, cell)
    assert int(cell[0]) == 137
    cell = cells(runtime)[1]
    check_ids(runtime, runtime.to_device(ids[:137]), 30, cell)
    assert int(cell[0]) == NO_PLACE


def test_nothing_to_do_launches_nothing(new_runtime):
    runtime = new_runtime()
    x = runtime.zeros((4, 3), np.float32)
    none = runtime.empty(0, np.int64)
    counters, bad = cells(runtime)
    gather_rows(runtime, x, None, None, 4, none, runtime.empty((0, 3), np.float32), 12, counters, bad)
    flat = runtime.empty((2, 0), np.float32)
    gather_rows(runtime, x, None, None, 4, runtime.zeros(2, np.int64), flat, 0, counters, bad)
    scatter_rows(runtime, x, none, x, 12)
    check_ids(runtime, none, 4, bad)
    assert not runtime.launches


@pytest.mark.parametrize(("row_bytes", "order"), list(product([1, 6, 12, 40, 512, 1040], ORDERS)))
def test_scatter(new_runtime, row_bytes, order):
    rng = np.random.default_rng(row_bytes)
    runtime = new_runtime(order)
    staged = features(rng, 70, row_bytes, np.uint8)
    positions = rng.permutation(100)[:70]
    out = runtime.zeros((100, row_bytes), np.uint8)
    scatter_rows(runtime, runtime.to_device(staged), runtime.to_device(positions), out, row_bytes)
    expected = np.zeros((100, row_bytes), np.uint8)
    expected[positions] = staged
    assert_bytes_equal(out, expected)


# --- the runtime that these tests rest on ---------------------------------------------------------------------------

WRONG = {
    "lanes that have left": ("if (threadIdx.x == 3) return; __ballot_sync(0xFFFFFFFFu, 1);", "wait for each other"),
    "two operations": (
        "if (threadIdx.x & 1) __ballot_sync(0xFFFFFFFFu, 1); else __shfl_sync(0xFFFFFFFFu, 1, 0);",
        "wait for each other",
    ),
    "a barrier not all reach": ("if (threadIdx.x < 32) __syncthreads();", "wait for each other"),
    "a partial mask": ("__ballot_sync(0xFFu, 1);", "mask that is not full"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_host_finds_what_the_device_leaves_undefined(tmp_path_factory, tmp_path, case):
    HostRuntime(tmp_path_factory.getbasetemp())  # asks for g++
    body, message = WRONG[case]
    unit = tmp_path / "wrong.cpp"
    unit.write_text(
        f'#include "cuda_on_host.hpp"\nvoid wrong() {{ {body} }}\n'
        "int main() { const char *found = host::launch(wrong, 1, 1, 64, nullptr, nullptr, 0, 0, 1);"
        ' std::puts(found ? found : ""); }\n',
        encoding="utf-8",
    )
    here = str(naive.__file__).rsplit("/", 1)[0]
    subprocess.run(["g++", "-std=c++17", f"-I{here}", str(unit), "-o", str(tmp_path / "wrong")], check=True)
    found = subprocess.run([str(tmp_path / "wrong")], capture_output=True, text=True, check=True).stdout
    assert message in found


def test_the_host_finds_writes_outside_an_array(tmp_path_factory):
    runtime = HostRuntime(tmp_path_factory.getbasetemp())
    out = runtime.empty((1, 4), np.float32)
    x, ids = runtime.zeros((4, 4), np.float32), runtime.zeros(2, np.int64)
    with pytest.raises(AssertionError, match="wrote outside"):
        gather_rows(runtime, x, None, None, 4, ids, out, 16, *cells(runtime))
    with pytest.raises(AssertionError, match="ndarray"):
        gather_rows(runtime, np.zeros((4, 4), np.float32), None, None, 4, ids, out, 16, *cells(runtime))


def test_pinned_views(new_runtime):
    runtime = new_runtime()
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    view = runtime.pinned_view(x)
    assert runtime.is_device(view.array)
    out = runtime.empty((2, 3), np.float32)
    gather_rows(runtime, None, None, view.array, 4, runtime.to_device(np.array([3, 1])), out, 12, *cells(runtime))
    assert_bytes_equal(out, x[[3, 1]])
    view.close()
    view.close()
    assert view.array is None
    with pytest.raises(PinningError):
        if isinstance(runtime, HostRuntime):
            runtime.refuse_pinning = True
        runtime.pinned_view(x[:, 1:])
