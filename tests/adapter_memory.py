"""Operations of the contract: dtypes and layouts, whose memory it is, and how long it lives."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from adapter_kit import (
    DTYPES,
    FRAMEWORK,
    MEBIBYTE,
    NARROW,
    PACKAGES,
    back,
    bits,
    collected,
    dtype_of,
    equal,
    graph,
    operation,
    out,
    pages,
    refused,
    some,
)

from gglspeedup import GPUSampler
from gglspeedup.arguments import host_array
from gglspeedup.memory import BufferPool, aligned_empty


@operation()
def round_trip_of_every_dtype() -> None:
    for name in DTYPES:
        array = bits(name)
        if FRAMEWORK.base == "paddle" and name == "uint16":
            refused(lambda array=array: out(array), "Paddle", "uint16")
            continue
        tensor = out(array)
        assert FRAMEWORK.is_tensor(tensor) and name in str(tensor.dtype), (name, tensor.dtype)
        again = back(tensor)
        assert again.dtype == array.dtype and again.shape == array.shape, (name, again.dtype)
        assert again.tobytes() == array.tobytes(), name


@operation()
def every_dtype_out() -> None:
    for name in DTYPES:
        if FRAMEWORK.has(name):
            equal(some(name), out(some(name)))


@operation()
def every_dtype_in() -> None:
    for name in DTYPES:
        if FRAMEWORK.has(name):
            array = back(FRAMEWORK.tensor(some(name)))
            assert isinstance(array, np.ndarray) and array.dtype == dtype_of(name), (name, array.dtype)
            np.testing.assert_array_equal(array, some(name))


@operation()
def zero_length() -> None:
    for name in ("int64", "float32", "bool", *NARROW):
        for shape in ((0,), (0, 7), (7, 0), (2, 0)):
            tensor = out(np.zeros(shape, dtype_of(name)))
            assert tuple(tensor.shape) == shape and name in str(tensor.dtype)
            array = back(tensor)
            assert array.shape == shape and array.dtype == dtype_of(name)


@operation()
def arrays_of_any_layout() -> None:
    raw = aligned_empty(8 * 60).view(np.int64)
    raw[:] = np.arange(60)
    matrix = raw.reshape(6, 10)
    unaligned = aligned_empty(8 * 9)[4 : 4 + 8 * 8].view(np.int64)
    unaligned[:] = np.arange(8)
    fields = np.zeros(5, [("a", np.int64), ("b", np.int32)])
    fields["a"] = np.arange(5)
    layouts = {
        "misaligned for SIMD": raw[1:], "misaligned for its type": unaligned, "strided": raw[::3],
        "strided in both": matrix[::2, 1::3], "reversed": raw[::-1], "Fortran order": np.asfortranarray(matrix),
        "transposed": matrix.T, "broadcast": np.broadcast_to(raw[:4], (3, 4)), "big-endian": raw.astype(">i8"),
        "field": fields["a"], "zero-dimensional": raw[5:6].reshape(()),
        **{f"{name}, strided": some(name)[:, ::2] for name in NARROW},
    }  # fmt: skip
    for layout, array in layouts.items():
        before = array.copy()
        tensor = out(array)
        assert tuple(tensor.shape) == array.shape, layout
        equal(before, tensor)


@operation()
def read_only_arrays_are_never_written() -> None:
    array = some("int64")
    array.flags.writeable = False
    tensor = out(array)
    equal(array, tensor)
    if not FRAMEWORK.immutable:
        tensor.fill_(9)
        np.testing.assert_array_equal(array, some("int64"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x")
        some("float32").tofile(path)
        mapped = np.memmap(path, np.float32, "r", shape=(2, 4))
        tensor = out(mapped)  # a write to a shared page of it would end the process
        if not FRAMEWORK.immutable:
            tensor.fill_(9)
        np.testing.assert_array_equal(mapped, some("float32"))


@operation()
def arrays_and_tensors_share_memory() -> None:
    for name in DTYPES:
        if not FRAMEWORK.has(name) or (FRAMEWORK.base == "tensorflow" and name.startswith("float8")):
            continue  # which TensorFlow copies
        array = bits(name, (64,))
        array[:] = 1
        tensor = out(array)
        array[3] = 0
        array[5:] = 0
        equal(array, tensor)
        if not FRAMEWORK.immutable and not name.startswith("float8"):  # which Paddle cannot assign to
            array[4] = 1
            tensor[4] = 0
            assert array[4] == 0 and array[2] == 1, name


@operation()
def tensors_and_arrays_share_memory() -> None:
    for name in ("int64", "float32", "bool", "complex64", *NARROW[:1]):
        tensor = FRAMEWORK.tensor(np.ones(64).astype(dtype_of(name)))
        array = back(tensor)
        assert array.ctypes.data == back(tensor).ctypes.data, name
        if FRAMEWORK.immutable:
            assert not array.flags.writeable
            continue
        tensor[4] = 0
        assert array[4] == 0 and array[2] == 1, name
        array[3] = 0
        equal(array, tensor)


@operation()
def host_arrays_are_views() -> None:
    tensor = FRAMEWORK.tensor(np.arange(40))
    assert host_array(tensor, "x").ctypes.data == back(tensor).ctypes.data


@operation()
def strided_tensors() -> None:
    for name in ("int64", *NARROW[:1]):
        array = np.arange(24).reshape(4, 6).astype(dtype_of(name))
        tensor = FRAMEWORK.tensor(array)
        np.testing.assert_array_equal(back(tensor[1:, ::2]), array[1:, ::2])
        transposed = FRAMEWORK.api.transpose(tensor) if FRAMEWORK.base == "tensorflow" else tensor.T
        np.testing.assert_array_equal(back(transposed), array.T)


@operation()
def tensors_outlive_what_they_were_made_of() -> None:
    sampler = GPUSampler("cpu", graph(), [3, 4])
    batch = sampler.sample(np.arange(37), batch=1)
    expected, kept = batch.adjs[0].edge_index.copy(), out(batch.adjs[0].edge_index)
    alone = out(pages(aligned_empty(MEBIBYTE).view(np.int64)))
    first = FRAMEWORK.read(alone)
    del batch
    collected()
    for number in range(20):
        sampler.sample(np.arange(37), batch=number)
        pages(aligned_empty(MEBIBYTE).view(np.int64))[:] = number
    del sampler
    collected()
    equal(expected, kept)
    equal(first, alone)


@operation()
def arrays_outlive_what_they_were_made_of() -> None:
    for name in ("int64", "float32", *NARROW[:1]):
        values = (np.arange(MEBIBYTE // 8) % 7).astype(dtype_of(name))
        tensor = FRAMEWORK.tensor(values)
        array = back(tensor)
        part = back(tensor)[5:9]
        del tensor
        collected()
        for number in range(20):
            FRAMEWORK.tensor(np.full(values.size, number).astype(values.dtype))
        np.testing.assert_array_equal(array, values)
        np.testing.assert_array_equal(part, values[5:9])


@operation()
def buffers_return_to_their_pool() -> None:
    pool = BufferPool()
    tensor = out(pool.empty((MEBIBYTE // 8,), np.int64))
    address = back(tensor).ctypes.data
    other = pool.empty((MEBIBYTE // 8,), np.int64)
    assert other.ctypes.data != address
    del tensor
    collected()
    assert pool.empty((MEBIBYTE // 8,), np.int64).ctypes.data == address


@operation("jax")
def memory_is_kept_while_results_are_pending() -> None:
    pool = BufferPool()
    jax = FRAMEWORK.api
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: (y @ x) / 600, x))
    for _ in range(3):
        array = pool.empty((600, 600), np.float32)
        array[:] = 1
        pending = work(out(array))
        del array
        collected()
        again = pool.empty((600, 600), np.float32)
        again[:] = 1000
        assert abs(np.asarray(pending) - 1).max() < 1e-3


def _grows(step: Callable[[], Any], times: int = 10_000) -> None:
    """Fail if resident memory grows by 64 of the 1 MiB arrays that the steps make."""
    import psutil

    for _ in range(200):
        step()
    process = psutil.Process()
    collected()
    before = process.memory_info().rss
    for number in range(times):
        step()
        if number % 500 == 499:
            growth = process.memory_info().rss - before
            assert growth < 64 * MEBIBYTE, f"{growth >> 20} MiB after {number + 1} conversions"


@operation()
def no_growth_out() -> None:
    def step() -> None:
        out(pages(aligned_empty(MEBIBYTE).view(np.int64)))

    _grows(step)


@operation()
def no_growth_out_of_pooled_buffers() -> None:
    pool = BufferPool()

    def step() -> None:
        one, two = pool.empty_pair((2, MEBIBYTE // 32), (MEBIBYTE // 16,), np.int64)
        out(pages(one)), out(pages(two))

    _grows(step)
    assert len(pool._free) + len(pool._returned) <= 2  # the same one or two again and again


@operation()
def no_growth_in() -> None:
    source = FRAMEWORK.tensor(np.ones(MEBIBYTE // 8, np.int64))

    def step() -> None:
        assert back(source + 1)[-1] == 2

    _grows(step)


@operation()
def no_growth_of_bfloat16() -> None:
    dtype = dtype_of("bfloat16")

    def step() -> None:
        array = pages(aligned_empty(MEBIBYTE).view(np.int64)).view(dtype)
        assert back(out(array)).size == array.size

    _grows(step, 2_000)


@operation()
def nothing_else_is_imported() -> None:
    assert {package for package in PACKAGES if package in sys.modules} == FRAMEWORK.loaded
