"""Arrays that one process lends to another: the same values in the same memory, given back one by one."""

from __future__ import annotations

import gc
import os
import random
import socket
import sys

import numpy as np
import pytest

from gglspeedup import memory
from gglspeedup.errors import ShareError
from gglspeedup.lent_arrays import Borrower, Lender
from gglspeedup.memory import BufferPool

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is shared so on Linux alone")


@pytest.fixture
def pair():
    """Both ends in one process, which maps all buffers twice."""
    here, there = socket.socketpair()
    lender, borrower = Lender(there), Borrower(here)
    memory.allocate_by(lender.allocate)
    yield lender, borrower
    memory.allocate_by(memory.aligned_empty)
    here.close()
    there.close()


def handed_over(lender: Lender, borrower: Borrower, value):
    return borrower.unpickled(lender.pickled(value))


def test_arrays_arrive_as_they_are_in_whatever_holds_them(pair):
    pool = BufferPool()
    whole = pool.empty((6, 4), np.float32)
    whole[:] = np.arange(24).reshape(6, 4)
    value = {"whole": whole, "rows": [whole[2:4], whole[:, 1]], "own": np.arange(3), "none": np.empty((0, 2)), "n": 5}
    got = handed_over(*pair, value)
    np.testing.assert_array_equal(got["whole"], whole)
    np.testing.assert_array_equal(got["rows"][0], whole[2:4])
    np.testing.assert_array_equal(got["rows"][1], whole[:, 1])
    assert got["own"].tolist() == [0, 1, 2] and got["none"].shape == (0, 2) and got["n"] == 5
    assert got["whole"].ctypes.data % 64 == 0 and got["own"].ctypes.data % 64 == 0
    whole[2] = 9  # the memory is the same: nothing was copied that lay in a buffer
    assert (got["whole"][2] == 9).all() and (got["rows"][0][0] == 9).all()


@pytest.mark.parametrize("dtype", ["u1", ">i4", "f2", "c16", "?", "M8[s]", "bfloat16"])
def test_any_type(pair, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    values = np.arange(6).reshape(2, 3).astype(dtype)
    got = handed_over(*pair, values)
    assert got.dtype == values.dtype and got.shape == (2, 3)
    np.testing.assert_array_equal(got, values)


def test_objects_are_pickled(pair):
    assert handed_over(*pair, np.array(["a", None], object)).tolist() == ["a", None]


def test_a_loan_ends_with_the_last_view(pair):
    lender, borrower = pair
    pool = BufferPool()
    one = handed_over(lender, borrower, pool.empty((100,), np.int64))
    place = one.ctypes.data
    view = one[3:]
    del one
    gc.collect()
    assert borrower.returned() == []
    assert handed_over(lender, borrower, pool.empty((100,), np.int64)).ctypes.data != place
    del view
    gc.collect()
    loans = borrower.returned()
    assert len(loans) == 2 and borrower.returned() == []
    lender.take_back(loans)
    again = [handed_over(lender, borrower, pool.empty((100,), np.int64)) for _ in range(2)]
    assert place in {array.ctypes.data for array in again}


def test_buffers_that_end_are_forgotten(pair):
    lender, borrower = pair
    pool = BufferPool()
    for round_ in range(30):
        got = handed_over(lender, borrower, pool.empty((5000 * (round_ + 1),), np.uint8))
        del got
        gc.collect()
        lender.take_back(borrower.returned())
        memory.release_buffers()
    handed_over(lender, borrower, "anything")
    assert not borrower._buffers and not lender._buffers and not lender._lent


def test_random_traffic(pair):
    """Many arrays at once, let go of in any order: each keeps its values until then."""
    lender, borrower = pair
    pools, rng = [BufferPool(), BufferPool(1 << 16)], random.Random(0)
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(600):
        if held and rng.random() < 0.45:
            got, expected = held.pop(rng.randrange(len(held)))
            np.testing.assert_array_equal(got, expected)
            del got
            lender.take_back(borrower.returned())
        made = rng.choice(pools).empty((rng.randrange(1, 4000),), np.int32)
        made[:] = number
        held.append((handed_over(lender, borrower, made), made.copy()))
        del made
    for got, expected in held:
        np.testing.assert_array_equal(got, expected)


def test_no_file_stays_open(pair):
    pool, before = BufferPool(), len(os.listdir("/proc/self/fd"))
    kept = [handed_over(*pair, pool.empty((9000,), np.uint8)) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 20


def test_no_room_is_said(pair, monkeypatch):
    monkeypatch.setattr("gglspeedup.shared_array.host_free_bytes", lambda: 1000)
    with pytest.raises(ShareError, match="memory needs 4096 bytes that processes share, got 1000 that are free"):
        BufferPool().empty((1,), np.uint8)


def test_the_end_of_the_lender_is_the_end(pair):
    lender, borrower = pair
    lender._files.close()
    with pytest.raises(EOFError):
        borrower.receive()
