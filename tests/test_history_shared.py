"""Histories that processes share: the same tables, counts and ages in each, whoever pushes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle

import numpy as np
import pytest
from conftest import missing, named_memory

from gglspeedup import HistoryStore

NODES, DIMS = 500, [3, 8]


def _push(store, rank, barrier, queue):
    nodes = np.arange(rank, NODES, 2)
    for number in range(20):
        store[0].push(np.full((len(nodes), 3), 100 * rank + number), nodes)
    store[1].push(np.full((5, 8), rank), offset=[10 * rank], count=[5])
    store.synchronize()
    barrier.wait(30)
    everything = np.arange(NODES)
    queue.put((rank, store[0].pull(everything).tolist(), store.age(table=1).tolist(), [t.pushes for t in store]))


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_have_the_same_tables(method, dtype):
    if dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        missing("ml_dtypes")
    store = HistoryStore(NODES, DIMS, "cpu", shared=True, dtype=dtype)
    store[0].push(np.full((NODES, 3), -1.0), np.arange(NODES))
    context = multiprocessing.get_context(method)
    queue, barrier = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=_push, args=(store, rank, barrier, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(queue.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    expected = [[19.0 + 100 * (node % 2)] * 3 for node in range(NODES)]
    for _, rows, _, pushes in found:
        assert rows == expected and pushes == [41, 2]
    assert store[0].pull(np.arange(NODES)).tolist() == expected and store[0].pushes == 41
    age = store.age(table=1)
    assert found[0][2] == found[1][2] == age.tolist()
    assert sorted({int(age[0]), int(age[10])}) == [0, 1] and (age[20:] == -1).all()


def test_what_is_shared_is_saved_restored_and_goes_away(tmp_path):
    before = named_memory()
    store = HistoryStore(NODES, DIMS, "cpu", shared=True)
    twin = pickle.loads(pickle.dumps(store))
    assert store.shared and twin.shared and not HistoryStore(3, [1], "cpu").shared
    store[1].push(np.ones((2, 8)), [4, 4])
    twin.save(tmp_path / "saved")
    store[1].push(np.zeros((1, 8)), [4])
    twin.restore(tmp_path / "saved")
    assert store[1].pull([4]).tolist() == [[1] * 8] and store[1].pushes == 1
    store.close()
    assert twin[1].pull([4]).tolist() == [[1] * 8]  # each closes for itself
    del store, twin
    assert named_memory() <= before


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match='storage needs "pinned" for shared histories'):
        HistoryStore(NODES, DIMS, "cpu", shared=True, storage="mmap", path=tmp_path / "x")
    with pytest.raises(TypeError, match="shared needs True or False"):
        HistoryStore(NODES, DIMS, "cpu", shared=1)
    store = HistoryStore(NODES, DIMS, "cpu", shared=True)
    with pytest.raises(IndexError, match="n_id"):
        store[0].push(np.ones((1, 3)), [NODES])
    assert store[0].pushes == 0
