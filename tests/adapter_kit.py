"""The framework under test, as the contract of the adapters sees it, and what its operations share."""

from __future__ import annotations

import gc
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from gglspeedup import CSRGraph, adapters
from gglspeedup.errors import ArgumentTypeError
from gglspeedup.interchange import framework_of, on_cuda
from gglspeedup.memory import aligned_empty

FRAMEWORKS = ("torch", "tensorflow", "paddle", "jax", "tensorlayerx")
PACKAGES = ("torch", "tensorflow", "paddle", "jax", "tensorlayerx", "cupy")
# Of ml_dtypes, which comes with JAX and TensorFlow.
NARROW = ("bfloat16", "float8_e4m3fn", "float8_e5m2") if importlib.util.find_spec("ml_dtypes") else ()
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("bool", *WHOLE, "float16", "float32", "float64", "complex64", "complex128", *NARROW)
MEBIBYTE = 1 << 20

OPERATIONS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {}


def operation(*only: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register an operation, for all frameworks or for some."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        OPERATIONS[function.__name__] = function, only or FRAMEWORKS
        return function

    return register


class Framework:
    """The framework under test, as its own users use it: none of our code."""

    def __init__(self) -> None:
        self.name = ""
        self.loaded: set[str] = set()

    def load(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of themselves and of each other on import
            package = __import__(self.name)
            self.base = package.BACKEND if self.name == "tensorlayerx" else self.name  # what its tensors are of
            self.api = __import__(self.base)
        self.loaded = {package for package in PACKAGES if package in sys.modules}
        if self.name == "jax":
            self.api.config.update("jax_enable_x64", True)
        self.immutable = self.base in ("tensorflow", "jax")
        self.adapter = adapters.backend(self.name)

    def tensor(self, array: Any) -> Any:
        """A tensor with a copy of an array's values."""
        if array.dtype.name in NARROW:
            return self.cast(self.tensor(array.astype(np.float32)), array.dtype.name)
        if self.base == "torch":
            return self.api.tensor(array)
        if self.base == "tensorflow":
            return self.api.constant(array)
        return self.api.to_tensor(array) if self.base == "paddle" else self.api.numpy.array(array)

    def cast(self, tensor: Any, name: str) -> Any:
        if self.base == "torch":
            return tensor.to(getattr(self.api, name))
        if self.base == "tensorflow":
            return self.api.cast(tensor, getattr(self.api, name, None) or getattr(self.api.dtypes.experimental, name))
        return tensor.astype(name)

    def read(self, tensor: Any) -> Any:
        """A NumPy array with a copy of a tensor's values, narrow ones as float32."""
        if any(name in str(tensor.dtype) for name in NARROW):
            tensor = self.cast(tensor, "float32")
        return np.array(tensor) if self.base == "jax" else np.array(tensor.numpy())

    def is_tensor(self, value: Any) -> bool:
        kind = {"torch": "Tensor", "tensorflow": "Tensor", "paddle": "Tensor", "jax": "Array"}[self.base]
        return isinstance(value, getattr(self.api, kind))

    def has(self, name: str) -> bool:
        return not (self.base == "paddle" and name in ("uint16", "uint32", "uint64"))


FRAMEWORK = Framework()


def out(array: Any) -> Any:
    return FRAMEWORK.adapter.to_framework(array)


def back(tensor: Any) -> Any:
    return FRAMEWORK.adapter.from_framework(tensor)


def dtype_of(name: str) -> np.dtype[Any]:
    if name not in NARROW:
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name))


def bits(name: str, shape: tuple[int, ...] = (5, 3), seed: int = 0) -> Any:
    """Values of a dtype, every bit of them random, in aligned memory."""
    dtype = dtype_of(name)
    array = aligned_empty(int(np.prod(shape)) * dtype.itemsize)
    array[:] = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, array.size, np.uint8)
    return array.view(dtype).reshape(shape)


def some(name: str) -> Any:
    """A few values that every dtype has."""
    return np.array([[0, 1, 1, 2], [3, 0, 1, 4]]).astype(dtype_of(name))


def pages(array: Any) -> Any:
    """The array, each page of it touched, so that it counts as resident memory."""
    array.reshape(-1)[::512] = 1
    return array


def equal(ours: Any, theirs: Any) -> None:
    wide = ours.astype(np.float32) if ours.dtype.name in NARROW else ours
    np.testing.assert_array_equal(FRAMEWORK.read(theirs), wide)


def refused(call: Callable[[], Any], *words: str) -> None:
    try:
        call()
    except ArgumentTypeError as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError("this was not refused")


def collected() -> None:
    for _ in range(2):
        gc.collect()


def graph() -> CSRGraph:
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 9, 500))])
    return CSRGraph(indptr, rng.integers(0, 500, indptr[-1]))


@operation()
def imported_when_asked_for() -> None:
    assert FRAMEWORK.name not in sys.modules
    assert framework_of(np.arange(3)) == "numpy" and framework_of([1]) is None and not on_cuda([1])
    assert FRAMEWORK.name not in sys.modules
    FRAMEWORK.load()
    assert FRAMEWORK.name in sys.modules
    assert framework_of(FRAMEWORK.tensor(np.arange(3))) == FRAMEWORK.base
