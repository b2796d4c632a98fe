"""The pool of output buffers, under threads and the garbage collector."""

from __future__ import annotations

import gc
import pickle
import threading

import numpy as np

from gglspeedup.memory import BufferPool, kernel_view


def test_views_hold_the_buffer():
    pool = BufferPool()
    array = pool.empty((100,), np.int64)
    view = array[50:].view(np.int32)
    address = array.ctypes.data
    del array
    assert pool.empty((100,), np.int64).ctypes.data != address
    del view
    gc.collect()
    addresses = {pool.empty((100,), np.int64).ctypes.data for _ in range(4)}
    assert address in addresses


def test_limit():
    pool = BufferPool(limit=1 << 20)
    arrays = [pool.empty((1 << 18,), np.uint8) for _ in range(20)]
    del arrays
    kept = pool.empty((8,), np.uint8)
    assert 0 < sum(buffer.size for buffer in pool._free) <= 1 << 20 and kept.size == 8


def test_kinds_and_alignment():
    pool = BufferPool()
    for shape in ((0,), (2, 0), (3, 5), (1 << 20,)):
        for dtype in (np.bool_, np.float16, np.int64, np.complex128):
            array = pool.empty(shape, dtype)
            assert array.shape == shape and array.dtype == dtype
            assert array.ctypes.data % 64 == 0 and array.flags.writeable
    assert pickle.loads(pickle.dumps(pool)).limit == pool.limit


def test_threads():
    pool = BufferPool()
    wrong = []

    def work(value: int) -> None:
        for size in range(1, 400):
            array = pool.empty((size,), np.int64)
            array[:] = value
            if not (array == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernel_view_of_read_only_memory():
    array = np.frombuffer(np.arange(5).tobytes(), np.int64)
    view = kernel_view(array)
    assert view.flags.writeable and np.shares_memory(view, array) and view.tolist() == [0, 1, 2, 3, 4]
