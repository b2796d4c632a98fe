"""Tensors of every framework as NumPy or CuPy arrays: recognised without an import, read without a copy."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import numpy as np

from gglspeedup.errors import ArgumentTypeError, MissingPackageError, explain

_CUDA, _CUDA_MANAGED = 2, 13  # device types of DLPack

# Packages, and how the classes that their tensors derive from are called in them. Compiled classes say where they come
# from in many ways (jax.Array is "jaxlib._jax.Array" of "jax"): only the first and the last part of a name are stable.
_TENSORS = {
    "numpy": ("numpy", {"ndarray"}),
    "cupy": ("cupy", {"ndarray"}),
    "torch": ("torch", {"Tensor"}),
    "tensorflow": ("tensorflow", {"Tensor", "Variable", "CompositeTensor"}),
    "paddle": ("paddle", {"Tensor", "Value", "Variable"}),
    "jax": ("jax", {"Array", "ArrayImpl", "Tracer"}),
    "jaxlib": ("jax", {"Array", "ArrayImpl"}),
}
# Types that NumPy's DLPack does not carry, though NumPy has them through ml_dtypes: integers stand in for them.
_NARROW = re.compile(r"bfloat16|float8_\w+")


def framework_of(value: Any) -> str | None:
    """Return the framework that a value is a tensor of, None if it is of none; nothing is imported.

    Parameters
    ----------
    value : object
        Anything. Tensors without values of their own (traced, sparse) are recognised, too.

    Returns
    -------
    str or None
        ``"numpy"``, ``"cupy"``, ``"torch"``, ``"tensorflow"``, ``"paddle"`` or ``"jax"``.

    Examples
    --------
    >>> import numpy as np
    >>> framework_of(np.arange(3)), framework_of([0, 1, 2])
    ('numpy', None)
    """
    return _framework_of_class(type(value))  # type: ignore[arg-type]  # mypy takes classes to have no hash


@functools.lru_cache(maxsize=1024)
def _framework_of_class(kind: type) -> str | None:
    for base in kind.__mro__:
        framework, names = _TENSORS.get(base.__module__.partition(".")[0], (None, ()))
        if base.__name__.rpartition(".")[2] in names:
            return framework
    return None


def on_cuda(value: Any) -> bool:
    """Return whether an array or tensor of any framework lives in a CUDA device's memory.

    Examples
    --------
    >>> on_cuda([0, 1, 2])
    False
    """
    if isinstance(value, np.ndarray):
        return False
    if not hasattr(value, "__dlpack_device__"):
        return hasattr(value, "__cuda_array_interface__")
    try:
        return int(value.__dlpack_device__()[0]) in (_CUDA, _CUDA_MANAGED)
    except Exception:  # sharded over devices, or on one that DLPack has no number for: of each framework's own classes
        return False


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Return whether values of a dtype are numbers, those of ml_dtypes (bfloat16, float8) included.

    Examples
    --------
    >>> import numpy as np
    >>> is_numeric(np.dtype(np.float16)), is_numeric(np.dtype("S4"))
    (True, False)
    """
    return dtype.kind in "biufc" or dtype.type.__module__ == "ml_dtypes"


def integer_view(array: Any) -> tuple[Any, str | None]:
    """Return an array that DLPack carries, and the name of the ml_dtypes type whose bits it holds, if it does.

    Parameters
    ----------
    array : NumPy or CuPy array
        Returned as it is unless it is of bfloat16 or a float8 type.

    Examples
    --------
    >>> import numpy as np
    >>> integer_view(np.zeros(2, np.float32))
    (array([0., 0.], dtype=float32), None)
    """
    dtype = array.dtype
    if dtype.type.__module__ != "ml_dtypes" or not _NARROW.fullmatch(dtype.name):
        return array, None
    return array.view(np.int16 if dtype.itemsize == 2 else np.uint8), dtype.name


def as_array(value: Any, argument: str = "value") -> Any:
    """Return the NumPy array, or for memory of a GPU the CuPy array, of anything array-like.

    Parameters
    ----------
    value : array-like or tensor
        NumPy, CuPy, a tensor of any framework, anything with ``__dlpack__`` or ``__cuda_array_interface__``, a list.
    argument : str
        What to call it in an error.

    Returns
    -------
    array
        It shares the tensor's memory where DLPack carries its dtype, and is read-only where the framework's tensors
        are. A CuPy array may be used on CuPy's current stream at once.

    Raises
    ------
    ArgumentTypeError
        It is no array-like, is sparse, or is traced and has no values.
    MissingPackageError
        A bfloat16 or float8 tensor without ml_dtypes, a tensor on a GPU without CuPy.

    Examples
    --------
    >>> as_array([[0, 1], [2, 3]]).shape
    (2, 2)
    """
    framework = framework_of(value)
    if framework in ("numpy", "cupy"):
        return value
    if framework is None:
        return _of_no_framework(value, argument)
    value = _readable(value, framework, argument)
    narrow = _NARROW.search(str(value.dtype))
    try:
        if narrow and (bits := _integers(value, framework)) is not None:
            return _shared(bits, framework, argument).view(_ml_dtype(narrow[0], argument))
        return _shared(value, framework, argument)
    except (ArgumentTypeError, MissingPackageError, MemoryError):
        raise
    except Exception as error:  # each framework refuses with classes of its own
        if framework in ("tensorflow", "jax"):
            # bfloat16 of JAX, without a copy; float8 of both; JAX arrays that lie on several devices.
            return _converted(value, argument)
        raise _refusal(value, argument, str(error)) from error


def array_of(tensor: Any, framework: str) -> Any:
    """Return the array of a tensor of one framework, as :func:`as_array` does.

    Raises
    ------
    ArgumentTypeError
        It is not a tensor of that framework.
    """
    if framework_of(tensor) != framework:
        kind = type(tensor)
        needs, got = f"a tensor of {framework}", f"{kind.__module__}.{kind.__qualname__}"
        raise ArgumentTypeError(explain("tensor", needs, got, "take the adapter of its framework"))
    return as_array(tensor, "tensor")


def _readable(value: Any, framework: str, argument: str) -> Any:
    """Return the tensor in a state in which it is exported: with values, outside of any gradient, its bits as meant."""
    if framework == "torch":
        if type(value).__module__.startswith("torch._subclasses"):
            raise _refusal(value, argument, "a fake tensor")  # exported as the null pointer that it holds
        if hasattr(value, "__tensor_flatten__"):  # of a class that wraps another tensor, and has no memory itself
            if not hasattr(value, "as_tensor"):
                raise _refusal(value, argument, "a tensor that wraps others")
            value = value.as_tensor()  # PyG's EdgeIndex and Index
        if value.requires_grad:
            value = value.detach()
        # Conjugation and negation may be pending, and DLPack has no flag for them: torch refuses the one, and exports
        # the other with the wrong sign.
        return value.resolve_conj().resolve_neg()
    if framework == "tensorflow":
        for _ in range(2):  # a Keras variable holds a tf.Variable, which holds a tensor
            if not hasattr(value, "__dlpack_device__") and hasattr(value, "value"):
                value = value.value() if callable(value.value) else value.value
    if not hasattr(value, "__dlpack_device__"):
        raise _refusal(value, argument, "no values")
    if framework == "paddle" and not value.stop_gradient:
        return value.detach()
    return value


def _integers(value: Any, framework: str) -> Any:
    """Return integers with the bits, and in the memory, of a bfloat16 or float8 tensor; None if there is no way."""
    name = "int16" if "bfloat16" in str(value.dtype) else "uint8"
    package = sys.modules.get(framework)  # loaded, as there is a tensor of it
    if framework == "torch":
        return value.view(getattr(package, name))
    if framework == "paddle":
        return value.view(name)
    if framework == "tensorflow" and name == "int16" and package is not None:
        return package.bitcast(value, name)
    return None


def _ml_dtype(name: str, argument: str) -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        needs = f"the package ml_dtypes for values of {name}"
        raise MissingPackageError(explain(argument, needs, "none installed", "pip install ml_dtypes")) from error
    return getattr(ml_dtypes, name)


def _shared(value: Any, framework: str | None, argument: str) -> Any:
    return _shared_on_cuda(value, framework, argument) if on_cuda(value) else np.from_dlpack(value)


def _shared_on_cuda(value: Any, framework: str | None, argument: str) -> Any:
    try:
        import cupy
    except ImportError as error:
        remedy = 'pip install "gglspeedup[cuda]", or move it to the host'
        raise MissingPackageError(explain(argument, "CuPy for memory of a GPU", "none installed", remedy)) from error
    if not hasattr(value, "__dlpack__"):
        return cupy.asarray(value)  # __cuda_array_interface__, whose stream CuPy waits for
    # CuPy 14 passes its current stream (1 for the default one), max_version and copy=None to __dlpack__. torch 2.13 and
    # Paddle 3.3 take all three and let that stream wait for their current one, JAX 0.10 for the array itself (left to
    # their defaults, torch would not wait at all). TensorFlow 2.21 raises RuntimeError for any stream; it waits for the
    # whole device before it exports (TFE_TensorHandleDevicePointer calls Device::Sync): nothing is left to wait for.
    try:
        return cupy.from_dlpack(_Finished(value) if framework == "tensorflow" else value)
    except MemoryError:
        raise
    except Exception as error:  # each framework refuses with classes of its own
        raise _refusal(value, argument, str(error)) from error


class _Finished:
    """A tensor on a GPU whose work is done when it is exported, whoever's stream asks."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def _of_no_framework(value: Any, argument: str) -> Any:
    if on_cuda(value):
        return _shared_on_cuda(value, None, argument)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError):
            pass  # a dtype or layout that NumPy's DLPack refuses may still convert
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise ArgumentTypeError(
            explain(argument, "a dense array", f"a sparse {type(value).__name__}", "pass .toarray() of it")
        )
    return _converted(value, argument)


def _converted(value: Any, argument: str) -> Any:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            explain(argument, "an array or tensor", f"{type(value).__name__} ({error})", "pass a NumPy array or tensor")
        ) from error


def _refusal(value: Any, argument: str, reason: str) -> ArgumentTypeError:
    remedy = "pass it from outside of tf.function, jax.jit and the like, a sparse one as a dense one"
    got = f"{type(value).__module__}.{type(value).__name__} ({reason})"
    return ArgumentTypeError(explain(argument, "a dense tensor that has values", got, remedy))
