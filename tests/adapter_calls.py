"""Operations of the contract: public calls with tensors, tensors that are refused, devices, JAX's own rules."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
from adapter_kit import (
    DTYPES,
    FRAMEWORK,
    back,
    bits,
    dtype_of,
    equal,
    graph,
    operation,
    out,
    refused,
)

from gglspeedup import CGPUFeature, CSRGraph, GPUSampler, HistoryStore, NodeLoader
from gglspeedup.device import cuda_problem
from gglspeedup.hot_order import hot_order
from gglspeedup.interchange import as_array, framework_of, on_cuda

METHODS = {"torch": "cp2torch", "tensorflow": "cp2tf", "paddle": "cp2pd", "tensorlayerx": "cp2tlx", "jax": "cp2jax"}


@operation()
def sampler_takes_tensors() -> None:
    seeds = np.array([3, 499, 0, 77])
    sampler = GPUSampler("cpu", graph(), [3, 4])
    expected = sampler.sample(seeds, batch=5)
    for name in ("int64", "int32", "int16"):
        batch = sampler.sample(FRAMEWORK.tensor(seeds.astype(name)), batch=5)
        np.testing.assert_array_equal(batch.n_id, expected.n_id)
        for ours, theirs in zip(expected.adjs, batch.adjs, strict=True):
            np.testing.assert_array_equal(ours.edge_index, theirs.edge_index)
            np.testing.assert_array_equal(ours.e_id, theirs.e_id)
    assert len(sampler.sample(FRAMEWORK.tensor(seeds[:0]), batch=0).n_id) == 0
    refused(lambda: sampler.sample(FRAMEWORK.tensor(seeds.astype(np.float32))), "seeds needs integers")


@operation()
def features_take_and_keep_tensors() -> None:
    ids = np.array([3, 499, 0, 3])
    for name in DTYPES:
        if not FRAMEWORK.has(name):
            continue
        for shape in ((500, 4), (500,)):
            x = np.random.default_rng(1).integers(0, 2, shape).astype(dtype_of(name))
            feature = CGPUFeature(graph(), "cpu")
            feature.from_cpu_tensor(FRAMEWORK.tensor(x))
            rows = feature[FRAMEWORK.tensor(ids)]
            assert feature.dtype == x.dtype and rows.dtype == x.dtype and rows.ctypes.data % 64 == 0
            np.testing.assert_array_equal(rows, x[ids])
            np.testing.assert_array_equal(feature[ids], x[ids])
            equal(x[ids], out(rows))
            assert name in str(out(rows).dtype)
    from gglspeedup.kernels.gather_cpu import gather_rows

    assert len(gather_rows.signatures) == 1  # none anew for ids that are read-only


@operation()
def histories_take_tensors() -> None:
    ids, tensor = np.array([3, 499, 0]), FRAMEWORK.tensor
    values = np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)
    history = HistoryStore(500, [4], device="cpu")[0]
    history.push(tensor(values), tensor(ids))
    np.testing.assert_array_equal(history.pull(tensor(ids[::-1].copy())), values[::-1])
    equal(values, out(history.pull(ids)))
    history.push(tensor(values), offset=tensor(np.array([10, 20])), count=tensor(np.array([1, 2])))
    np.testing.assert_array_equal(history.pull(np.array([10, 20, 21])), values)
    assert history.age(tensor(ids)).tolist() == [1, 1, 1]


@operation()
def graphs_take_tensors() -> None:
    ours = graph()
    edge_ids = np.arange(ours.num_edges)[::-1].copy()
    tensor = FRAMEWORK.tensor
    theirs = CSRGraph(tensor(ours.indptr), tensor(ours.indices), edge_ids=tensor(edge_ids))
    pair = GPUSampler("cpu", (tensor(ours.indptr), tensor(ours.indices.astype(np.int64)))).graph
    for other in (theirs, pair):
        np.testing.assert_array_equal(ours.indptr, other.indptr)
        np.testing.assert_array_equal(ours.indices, other.indices)
    np.testing.assert_array_equal(theirs.edge_ids, edge_ids)
    nodes = np.array([0, 7, 499])
    np.testing.assert_array_equal(ours.degree(tensor(nodes)), ours.degree(nodes))
    edges = np.random.default_rng(2).integers(0, 100, (2, 400))
    ours, theirs = (CSRGraph.from_edge_index(given, 100) for given in (edges, tensor(edges)))
    for part in ("indptr", "indices", "edge_ids"):
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
    sampler = GPUSampler("cpu", theirs, [5])  # reads them as they are kept
    np.testing.assert_array_equal(sampler.sample([1, 2], 0).n_id, GPUSampler("cpu", ours, [5]).sample([1, 2], 0).n_id)


@operation()
def orders_of_hot_rows_take_tensors() -> None:
    order = np.array([5, 499, 3])
    expected = hot_order(graph(), order, None, None, 1)
    np.testing.assert_array_equal(hot_order(graph(), FRAMEWORK.tensor(order), None, None, 1), expected)
    sampler = GPUSampler("cpu", graph(), [3])
    expected = hot_order(graph(), "presample", sampler, order, 2)
    np.testing.assert_array_equal(hot_order(graph(), "presample", sampler, FRAMEWORK.tensor(order), 2), expected)
    CGPUFeature(graph(), "cpu", policy=FRAMEWORK.tensor(order))


@operation()
def loaders_take_and_give_tensors() -> None:
    x = np.random.default_rng(1).standard_normal((500, 4)).astype(np.float32)
    y, seeds = np.arange(500) % 7, np.arange(0, 500, 9)
    how: dict[str, Any] = {"sizes": [3, 4], "batch_size": 20, "device": "cpu"}
    tensor = FRAMEWORK.tensor
    expected = NodeLoader(graph(), x, y, seeds=seeds, **how)
    loader = NodeLoader(graph(), tensor(x), tensor(y), seeds=tensor(seeds), backend=FRAMEWORK.name, **how)
    for ours, theirs in zip(expected, loader, strict=True):
        pairs = [(ours.x, theirs.x), (ours.y, theirs.y), (ours.n_id, theirs.n_id)]
        for one, other in zip(ours.adjs, theirs.adjs, strict=True):
            pairs += [(one.edge_index, other.edge_index), (one.e_id, other.e_id)]
        for array, made in pairs:
            assert FRAMEWORK.is_tensor(made) and array.dtype.name in str(made.dtype)
            equal(array, made)


@operation()
def adjacencies_convert() -> None:
    sampler = GPUSampler("cpu", graph(), [3, 4])
    for seeds in ([], np.arange(1), np.arange(37)):
        for adj in sampler.sample(seeds, batch=1).adjs:
            converted = getattr(adj, METHODS[FRAMEWORK.name])()
            assert converted.size == adj.size
            for name in ("edge_index", "e_id", "row", "col"):
                ours, theirs = getattr(adj, name), getattr(converted, name)
                assert FRAMEWORK.is_tensor(theirs) and "int64" in str(theirs.dtype), name
                equal(ours, theirs)
            if adj.e_id.size:
                adj.e_id[0] = 12345
                assert int(FRAMEWORK.read(converted.e_id)[0]) == 12345
    if FRAMEWORK.name == "torch":
        assert converted.to("cpu").edge_index.device.type == "cpu"


@operation()
def tensors_within_computations() -> None:
    """Those that a framework exports only when asked in the right way: with gradients, pending bits, of variables."""
    values = np.array([1.0, -2.0, 3.0], np.float32)
    if FRAMEWORK.base == "torch":
        torch = FRAMEWORK.api
        for tensor in (torch.nn.Parameter(torch.tensor(values)), torch.tensor(values, requires_grad=True) * 1):
            np.testing.assert_array_equal(back(tensor), values)
        complex_values = values + 2j * values
        conjugate = torch.tensor(complex_values).conj()
        np.testing.assert_array_equal(back(conjugate), complex_values.conj())
        assert conjugate.imag.is_neg()
        np.testing.assert_array_equal(back(conjugate.imag), complex_values.conj().imag)
    elif FRAMEWORK.base == "paddle":
        tensor = FRAMEWORK.tensor(values)
        tensor.stop_gradient = False
        np.testing.assert_array_equal(back(tensor), values)
        np.testing.assert_array_equal(back(tensor * 1), values)
    elif FRAMEWORK.base == "tensorflow":
        variable = FRAMEWORK.api.Variable(values)
        array = back(variable)
        variable.assign(values + 1)
        np.testing.assert_array_equal(array, values)  # what it was when it was read
        np.testing.assert_array_equal(back(FRAMEWORK.api.keras.Variable(values)), values)
    else:
        jax = FRAMEWORK.api
        array = back(jax.numpy.ones((700, 700)) @ jax.numpy.ones((700, 700)))  # a result that may still be pending
        assert (array == 700).all()


@operation()
def tensors_without_values_are_refused() -> None:
    api = FRAMEWORK.api
    words = ("seeds needs", "has values")
    if FRAMEWORK.base == "torch":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            fake = api.ones(3)
        refused(lambda: as_array(fake, "seeds"), *words, "a fake tensor")
        for tensor in (api.ones(3, device="meta"), api.eye(3).to_sparse()):
            refused(lambda tensor=tensor: as_array(tensor, "seeds"), *words)
    elif FRAMEWORK.base == "tensorflow":

        @api.function(autograph=False)
        def traced(x: Any) -> None:
            refused(lambda: as_array(x, "seeds"), *words, "tf.function")

        traced(api.ones(3))
        for tensor in (api.sparse.eye(3), api.ragged.constant([[1], [1, 2]])):
            refused(lambda tensor=tensor: as_array(tensor, "seeds"), *words)
    elif FRAMEWORK.base == "paddle":
        refused(lambda: as_array(api.sparse.sparse_coo_tensor([[0, 1], [1, 0]], [1.0, 2.0], [2, 2]), "seeds"), *words)
        api.enable_static()
        try:
            symbol = api.static.data("symbol", [2])
            assert framework_of(symbol) == "paddle"
            refused(lambda: as_array(symbol, "seeds"), *words)
        finally:
            api.disable_static()
    else:
        for transform in (api.jit, api.vmap, api.grad):
            shape = () if transform is api.grad else (3,)
            transform(lambda x: (refused(lambda: as_array(x, "seeds"), *words, "jax.jit"), x)[1])(api.numpy.ones(shape))


@operation()
def other_values_are_refused() -> None:
    for value in ([1, 2], 3, np.arange(3), None):
        refused(lambda value=value: back(value), f"tensor of {FRAMEWORK.base}")
    for value in ([1, 2], None, FRAMEWORK.tensor(np.arange(3))):
        refused(lambda value=value: out(value), "NumPy or CuPy")
    for array in (np.array(["a"]), np.array([None]), np.zeros(2, [("a", int)]), np.zeros(2, np.longdouble)):
        refused(lambda array=array: out(array), "dtype")


@operation()
def scalable_models_push_and_pull() -> None:
    from types import SimpleNamespace

    from gglspeedup.adapters.scalable import Scalable

    rng = np.random.default_rng(3)
    old, new = rng.random((500, 6), dtype=np.float32), rng.random((20, 6), dtype=np.float32)
    for dtype in ("float32", "bfloat16"):
        model = Scalable()
        model.histories = HistoryStore(500, [1, 6], "cpu", dtype=dtype)
        model.histories[1].push(old, np.arange(500))
        halo = np.array([400, 7, 499])
        batch = SimpleNamespace(
            batch_size=15, offset=[100, 30], count=[10, 5],
            n_id=FRAMEWORK.tensor(np.concatenate([np.arange(100, 110), np.arange(30, 35), halo])),
        )  # fmt: skip
        rows = model.push_and_pull(1, FRAMEWORK.tensor(new), batch)
        equal(np.concatenate([new[:15], old[halo].astype(dtype_of(dtype)).astype(np.float32)]), rows)
        pushed = model.histories[1].pull([100, 109, 30, 34, 35])
        expected = np.concatenate([new[[0, 9, 10, 14]], old[35:36]]).astype(dtype_of(dtype))
        np.testing.assert_array_equal(pushed, expected)
        whole = SimpleNamespace(batch_size=15, offset=[0], count=[15], n_id=FRAMEWORK.tensor(np.arange(15)))
        equal(new[:15], model.push_and_pull(1, FRAMEWORK.tensor(new), whole))


@operation("jax")
def narrow_jax() -> None:
    jax = FRAMEWORK.api
    jax.config.update("jax_enable_x64", False)
    try:
        adj = GPUSampler("cpu", graph(), [3]).sample(np.arange(20), batch=0).adjs[0]
        narrow = adj.cp2jax()
        assert narrow.edge_index.dtype == "int32"
        equal(adj.edge_index, narrow.edge_index)
        for values in ([-(1 << 31), (1 << 31) - 1], [], [-5, 3]):
            array = np.array(values, np.int64)
            equal(array, out(array))
            equal(array, out(array.astype(">i8")))
        equal(np.array([(1 << 32) - 1], np.uint64), out(np.array([(1 << 32) - 1], np.uint64)))
        floats = np.array([1e-300, 0.1, -1e300, np.nan])
        with np.errstate(over="ignore"):
            equal(floats.astype(np.float32), out(floats))
            equal((floats * 1j).astype(np.complex64), out(floats * 1j))
        tall = {"int64": (1 << 31, -(1 << 31) - 1), "uint64": (1 << 32,), ">i8": (1 << 56,)}
        for name, value in [(name, value) for name, values in tall.items() for value in values]:
            try:
                out(np.array([0, value], name))
            except ValueError as error:
                assert "jax_enable_x64" in str(error)
            else:
                raise AssertionError("a value was cut")
    finally:
        jax.config.update("jax_enable_x64", True)


@operation("jax")
def quick_import_equals_the_public_one() -> None:
    from gglspeedup.adapters import jax as adapter

    quick = adapter._quick_import
    if quick() is None:  # it is JAX's own, and not public: another version need not have it
        return
    arrays = [bits(name) for name in DTYPES]
    one = [adapter.to_framework(array) for array in arrays]
    adapter._quick_import = lambda: None
    try:
        other = [adapter.to_framework(array) for array in arrays]
    finally:
        adapter._quick_import = quick
    for array, mine, public in zip(arrays, one, other, strict=True):
        assert mine.aval == public.aval and mine.sharding == public.sharding and mine.committed == public.committed
        assert mine.unsafe_buffer_pointer() == public.unsafe_buffer_pointer() == array.ctypes.data


class _Gpu:
    """What stands for CuPy's arrays, in the memory of the host, and notes what is done to it in which order."""

    def __init__(self, array: Any) -> None:
        self.array, self.log = array, []
        self.dtype, self.shape, self.flags = array.dtype, array.shape, array.flags
        self.data = type("Memory", (), {"ptr": array.ctypes.data})
        self.device = contextlib.ExitStack()
        self.device.callback(self.log.append, "leave")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def __dlpack__(self, **how: Any) -> Any:
        self.log.append(("export", how))
        return self.array.__dlpack__(**{name: value for name, value in how.items() if name != "stream"})

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


_Gpu.__module__, _Gpu.__name__ = "cupy", "ndarray"


@operation()
def arrays_of_a_gpu_are_handed_over() -> None:
    array = bits("int64", (8,))
    given = _Gpu(array)
    cuda = type("cuda", (), {"get_current_stream": staticmethod(lambda: given)})
    real = sys.modules.get("cupy")
    sys.modules["cupy"] = type("cupy", (), {"cuda": cuda})  # type: ignore[assignment]
    try:
        tensor = out(given)
    finally:
        sys.modules.pop("cupy")
        if real is not None:
            sys.modules["cupy"] = real
    equal(array, tensor)
    if FRAMEWORK.base == "tensorflow":  # it takes no more than a capsule: all has to be done before
        assert given.log == ["synchronize", "leave", ("export", {})]
    else:  # the others ask for what they need, on a GPU for their stream
        assert len(given.log) == 1 and given.log[0][0] == "export" and given.log[0][1]


@operation()
def device_rules() -> None:
    if not cuda_problem():
        return
    assert FRAMEWORK.adapter.current_stream() is None
    assert not FRAMEWORK.adapter.sees_cuda(0) and not FRAMEWORK.adapter.sees_cuda(3)
    assert not on_cuda(FRAMEWORK.tensor(np.arange(3)))
