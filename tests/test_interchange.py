"""Recognising and reading tensors: what needs no framework, what a GPU needs, and the adapters of NumPy and CuPy."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import pytest
from conftest import missing

from gglspeedup import GGLSpeedupError, adapters
from gglspeedup.adapters import alignment
from gglspeedup.arguments import device_ids, host_array, host_ids
from gglspeedup.device import cuda_problem
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, MissingPackageError
from gglspeedup.interchange import array_of, as_array, framework_of, integer_view, is_numeric, on_cuda
from gglspeedup.memory import aligned_empty

CPU, CUDA, PINNED, MANAGED = (1, 0), (2, 0), (3, 0), (13, 0)


def stand_in(module: str, name: str, *bases: type, **members: Any) -> type:
    """A class that says it is of another package."""
    return type(name, bases, {"__module__": module, **members})


class Speaks:
    """An object of no known framework that speaks DLPack."""

    def __init__(self, array, device=CPU):
        self.array, self.device = array, device

    def __dlpack__(self, **how):
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.device


def narrow_types() -> list[np.dtype]:
    if importlib.util.find_spec("ml_dtypes") is None:
        missing("ml_dtypes")
    import ml_dtypes

    kinds = (getattr(ml_dtypes, name) for name in dir(ml_dtypes))
    return [np.dtype(kind) for kind in kinds if isinstance(kind, type) and issubclass(kind, np.generic)]


@pytest.mark.parametrize(
    ("value", "framework"),
    [
        (stand_in("torch", "Tensor")(), "torch"),
        (stand_in("some.model", "Weights", stand_in("torch", "Tensor"))(), "torch"),
        (stand_in("torch.nn.modules.linear", "Linear")(), None),
        (stand_in("torchvision.tv", "Tensor")(), None),
        (stand_in("tensorflow.python.ops", "EagerTensor", stand_in("tensorflow.python", "Tensor"))(), "tensorflow"),
        (stand_in("keras.src.backend", "Variable", stand_in("tensorflow.python.core", "Tensor"))(), "tensorflow"),
        (stand_in("keras.src.backend", "Variable")(), None),
        (stand_in("paddle", "Tensor")(), "paddle"),
        (stand_in("paddle.base.libpaddle.pir", "Value")(), "paddle"),
        (stand_in("jaxlib._jax", "ArrayImpl", stand_in("jax", "jaxlib._jax.Array"))(), "jax"),
        (stand_in("jaxlib.xla_extension", "ArrayImpl")(), "jax"),
        (stand_in("jax._src.interpreters.partial_eval", "T", stand_in("jax._src.core", "Tracer"))(), "jax"),
        (stand_in("cupy", "ndarray")(), "cupy"),
        (stand_in("cupyx.scipy.sparse", "csr_matrix")(), None),
        (np.ma.masked_array([1]), "numpy"),
        (np.arange(3), "numpy"),
        (np.float32(1), None),
        ([1], None),
    ],
)
def test_frameworks_are_told_by_the_names_of_classes(value, framework):
    assert framework_of(value) == framework


def test_where_memory_is():
    assert [on_cuda(Speaks(np.arange(3), at)) for at in (CPU, CUDA, PINNED, MANAGED)] == [False, True, False, True]
    assert on_cuda(stand_in("numba", "DeviceNDArray", __cuda_array_interface__={})())
    assert not on_cuda(np.arange(3)) and not on_cuda(3) and not on_cuda(None)

    def sharded(_):
        raise BufferError("on several devices")

    assert not on_cuda(stand_in("jax", "Array", __dlpack_device__=sharded)())


def test_numbers_of_ml_dtypes():
    for dtype in narrow_types():
        assert is_numeric(dtype)
        carried, name = integer_view(np.zeros(4, dtype))
        if dtype.name == "bfloat16" or dtype.name.startswith("float8"):
            assert name == dtype.name and carried.dtype in (np.int16, np.uint8) and carried.itemsize == dtype.itemsize
        else:
            assert name is None and carried.dtype == dtype
    for dtype in (np.bool_, np.int8, np.uint64, np.float16, np.complex128, np.dtype(">f4")):
        assert is_numeric(np.dtype(dtype))
    for dtype in ("S3", "U3", object, "V2", "M8[s]", [("a", int)]):
        assert not is_numeric(np.dtype(dtype))


def test_anything_that_speaks_dlpack():
    array = np.arange(5)
    assert np.shares_memory(as_array(Speaks(array)), array)
    assert np.shares_memory(host_array(Speaks(array), "x"), array) and as_array(array) is array

    class Refuses(Speaks):
        def __dlpack__(self, **how):
            raise BufferError("of a kind that DLPack has not")

        def __array__(self, dtype=None, copy=None):
            return self.array

    np.testing.assert_array_equal(as_array(Refuses(array)), array)


def test_ids_that_are_read_only_come_without_that_mark():
    ids = np.arange(5)
    ids.flags.writeable = False
    given = host_ids(ids, "seeds")  # which no kernel writes, and for which none is compiled anew
    assert given.flags.writeable and np.shares_memory(given, ids)
    ids = np.arange(5)
    assert host_ids(ids, "seeds") is ids


def test_values_that_are_no_arrays():
    import scipy.sparse

    with pytest.raises(ArgumentTypeError, match=r"seeds needs a dense array, got a sparse .*toarray"):
        as_array(scipy.sparse.eye(3).tocsr(), "seeds")
    with pytest.raises(ArgumentTypeError, match="seeds needs an array or tensor, got list"):
        as_array([[1], [2, 3]], "seeds")
    with pytest.raises(ArgumentTypeError, match=r"tensor needs a tensor of torch, got builtins\.list"):
        array_of([1], "torch")


def test_bfloat16_without_ml_dtypes(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingPackageError, match="x needs the package ml_dtypes for values of bfloat16"):
        as_array(torch.zeros(3, dtype=torch.bfloat16), "x")


# What stands for CuPy: its arrays, in host memory, and the way in which CuPy 14 asks for a capsule.
def cupy_array(array: Any) -> Any:
    kind = stand_in("cupy", "ndarray", get=lambda self: self.array, copy=lambda self, order: ("copied", order))
    made = kind()
    made.array, made.dtype, made.flags = array, array.dtype, array.flags
    made.data = types.SimpleNamespace(ptr=array.ctypes.data)
    made.device = types.SimpleNamespace(id=0)
    return made


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.from_dlpack = lambda given: ("array", given.__dlpack__(stream=1, max_version=(1, 0), copy=None))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def device_tensor(module: str, name: str, **members: Any) -> Any:
    made = stand_in(module, name, __dlpack_device__=lambda self: CUDA, **members)()
    made.dtype = "float32"
    return made


def test_tensors_of_a_gpu_are_asked_with_cupys_stream(cupy):
    def export(self, *, stream, max_version, copy):
        return stream, max_version, copy

    paddle = device_tensor("paddle", "Tensor", __dlpack__=export)
    paddle.stop_gradient = True
    other = device_tensor("of.no.framework", "Tensor", __dlpack__=export)
    for tensor in (device_tensor("jax", "Array", __dlpack__=export), paddle, other):
        assert as_array(tensor) == ("array", (1, (1, 0), None))


def test_tensorflow_is_asked_without_a_stream(cupy):
    def export(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if stream is not None:
            raise RuntimeError("tf.Tensor does not support DLPack export with a non-None stream")
        return "finished"

    assert as_array(device_tensor("tensorflow.python", "Tensor", __dlpack__=export)) == ("array", "finished")


def test_arrays_of_numba_are_read_by_their_interface(cupy):
    array = stand_in("numba.cuda", "DeviceNDArray", __cuda_array_interface__={})()
    cupy.asarray = lambda given: ("asarray", given)
    assert as_array(array) == ("asarray", array)


@pytest.mark.parametrize("module", ["jax", "of.no.framework"])
def test_refusals_of_a_gpu_are_explained(cupy, module):
    def export(self, **_):
        raise BufferError("a sparse layout")

    with pytest.raises(ArgumentTypeError, match=r"x needs a dense tensor that has values.*a sparse layout"):
        as_array(device_tensor(module, "Array", __dlpack__=export), "x")


def test_a_gpu_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingPackageError, match=r"x needs CuPy.*gglspeedup\[cuda\]"):
        as_array(Speaks(np.arange(3), CUDA), "x")


def test_arrays_of_a_gpu_on_the_host():
    array = np.arange(4)
    assert host_array(cupy_array(array), "x") is array
    assert adapters.backend("numpy").to_framework(cupy_array(array)) is array


def test_ids_on_another_gpu():
    array = cupy_array(np.arange(4))
    type(array).__dlpack_device__ = lambda self: CUDA
    runtime = types.SimpleNamespace(is_device=lambda value: False, index=1, activate=contextlib.nullcontext)
    with pytest.raises(ArgumentValueError, match="n_id needs ids on cuda:1, got cuda:0"):
        device_ids(array, "n_id", runtime)


def test_what_strict_frameworks_get_of_a_gpu():
    raw = aligned_empty(64 * 8).view(np.int64).reshape(8, 8)
    for whole in (raw, raw[2:]):
        given = cupy_array(whole)
        assert alignment.consumable(given) == (given, None) and alignment.shareable(given) == (given, None)
    for part in (raw[:, 1:], raw.T, raw.reshape(-1)[1:]):
        given = cupy_array(part)
        assert alignment.consumable(given) == (("copied", "C"), None)
        assert alignment.shareable(given) == (given, None)


def test_what_frameworks_get_of_the_host():
    raw = aligned_empty(64 * 8).view(np.int64).reshape(8, 8)
    read_only = raw.view()
    read_only.flags.writeable = False
    for array, shared, consumed in (
        (raw, True, True), (raw[1:], True, True), (raw[:, 1:], True, False), (raw.reshape(-1)[1:], True, False),
        (raw.T, True, False), (raw[::-1], False, False), (read_only, False, False),
        (raw.view(">i8"), False, False), (raw[:0], True, True),
    ):  # fmt: skip
        for given, as_it_is in ((alignment.shareable(array)[0], shared), (alignment.consumable(array)[0], consumed)):
            assert (given is array) == as_it_is
            np.testing.assert_array_equal(given, array)
            assert as_it_is or (given.ctypes.data % 64 == 0 and given.flags.c_contiguous and given.dtype.isnative)


def test_backends(monkeypatch):
    assert adapters.BACKENDS == ("numpy", "cupy", "torch", "tensorflow", "paddle", "tensorlayerx", "jax")
    for name in ("caffe", "pyg", "", None, ["torch"]):
        with pytest.raises(ArgumentValueError, match="backend needs one of numpy, cupy, torch"):
            adapters.backend(name)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    adapters._adapter.cache_clear()
    with pytest.raises(MissingPackageError, match=r"backend needs the package paddlepaddle.*gglspeedup\[paddle\]"):
        adapters.backend("paddle")
    assert adapters.backend("numpy") is adapters.backend("numpy")


def test_numpy():
    adapter = adapters.backend("numpy")
    array = np.arange(4)
    assert adapter.to_framework(array) is array and adapter.from_framework(array) is array
    assert adapter.current_stream() is None and adapter.sees_cuda(0)
    for value in ([1], None):
        with pytest.raises(ArgumentTypeError):
            adapter.to_framework(value)
        with pytest.raises(ArgumentTypeError):
            adapter.from_framework(value)


def test_cupy():
    if importlib.util.find_spec("cupy") is None:
        missing("cupy")
    adapter = adapters.backend("cupy")
    with pytest.raises(ArgumentValueError, match="array needs an array in the memory of a CUDA device"):
        adapter.to_framework(np.arange(4))
    with pytest.raises(ArgumentTypeError, match="a tensor of cupy"):
        adapter.from_framework(np.arange(4))
    array = cupy_array(np.arange(4))
    assert adapter.to_framework(array) is array and adapter.from_framework(array) is array
    assert adapter.sees_cuda(0) == (not cuda_problem())
    assert (adapter.current_stream() is None) == bool(cuda_problem())


gpu = pytest.mark.skipif(bool(cuda_problem()), reason=f"no usable GPU: {cuda_problem()}")


@gpu
@pytest.mark.parametrize("name", ["bool", "int64", "uint8", "float16", "float32", "complex64", "bfloat16"])
def test_torch_on_a_gpu(name):
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    if not torch.cuda.is_available():
        missing("torch for CUDA")
    adapter = adapters.backend("torch")
    assert adapter.sees_cuda(0) and not adapter.sees_cuda(torch.cuda.device_count())
    tensor = torch.arange(6, device="cuda").reshape(2, 3).to(getattr(torch, name))
    array = adapter.from_framework(tensor)
    assert isinstance(array, cupy.ndarray) and array.data.ptr == tensor.data_ptr() and array.dtype.name == name
    again = adapter.to_framework(array)
    assert again.data_ptr() == tensor.data_ptr() and again.dtype == tensor.dtype and torch.equal(again, tensor)
    assert host_array(tensor, "x").dtype.name == name
    np.testing.assert_array_equal(host_array(tensor, "x").astype(np.complex64), tensor.to(torch.complex64).cpu())


@gpu
def test_streams_are_handed_over():
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    if not torch.cuda.is_available():
        missing("torch for CUDA")
    adapter = adapters.backend("torch")
    theirs, ours = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    for _ in range(5):
        with torch.cuda.stream(theirs), ours:
            assert adapter.current_stream() == theirs.cuda_stream
            tensor = torch.ones(1 << 24, device="cuda")
            for _ in range(50):
                tensor += 1
            array = as_array(tensor) + 1  # on our stream, after theirs
            for _ in range(50):
                array += 1
            assert int(adapter.to_framework(array).sum()) == 102 << 24  # on theirs, after ours


@gpu
def test_ids_of_torch_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        missing("torch for CUDA")
    from gglspeedup import CGPUFeature, CSRGraph, GPUSampler

    graph = CSRGraph.from_edge_index(torch.tensor([[0, 1, 2], [2, 2, 0]], device="cuda"), 4)
    batch = GPUSampler(0, graph, [2]).sample(torch.tensor([2, 3], device="cuda"), batch=0)
    assert batch.n_id.get().tolist() == GPUSampler("cpu", graph, [2]).sample([2, 3], batch=0).n_id.tolist()
    feature = CGPUFeature(graph, 0, 16)
    feature.from_cpu_tensor(torch.arange(16, dtype=torch.bfloat16).reshape(4, 4))
    rows = feature[torch.tensor([3, 0], device="cuda")]
    expected = torch.arange(16, dtype=torch.bfloat16).reshape(4, 4)[[3, 0]].cuda()
    assert torch.equal(adapters.backend("torch").to_framework(rows), expected)


def test_errors_are_ours():
    with pytest.raises(GGLSpeedupError):
        adapters.backend("caffe")
