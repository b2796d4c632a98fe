"""One short module a framework; none is imported before it is asked for.

Each has the same four functions: ``to_framework(array)`` makes a tensor of a NumPy or CuPy array, on the same device
and in the same memory where the framework can take it; ``from_framework(tensor)`` goes the other way;
``current_stream()`` returns the CUDA stream that the framework works on in this thread, as a pointer, None if it has or
tells none; ``sees_cuda(index)`` returns whether it can use that CUDA device. Where a framework's allocator says what it
has handed out on a CUDA device, there are ``bytes_in_use(index)``, ``peak_bytes(index)`` and ``restart_peak(index)``.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from gglspeedup.errors import ArgumentValueError, MissingPackageError, explain

# What a user may ask for, and the package that provides it.
_PACKAGES = {
    "numpy": "numpy",
    "cupy": "cupy-cuda13x",
    "torch": "torch",
    "tensorflow": "tensorflow",
    "paddle": "paddlepaddle",
    "tensorlayerx": "tensorlayerx",
    "jax": "jax",
}
BACKENDS = tuple(_PACKAGES)


def backend(name: str) -> ModuleType:
    """Return the adapter of a framework, and import the framework.

    Parameters
    ----------
    name : str
        One of ``BACKENDS``.

    Raises
    ------
    ArgumentValueError
        It is not.
    MissingPackageError
        The framework is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup.adapters import backend
    >>> backend("numpy").to_framework(np.arange(3)).tolist()
    [0, 1, 2]
    """
    if not isinstance(name, str) or name not in _PACKAGES:
        remedy = 'backend="numpy" works everywhere'
        raise ArgumentValueError(explain("backend", f"one of {', '.join(BACKENDS)}", repr(name), remedy))
    return _adapter(name)


@functools.cache
def _adapter(name: str) -> ModuleType:
    if name not in sys.modules and find_spec(name) is None:
        extra = "cuda" if name == "cupy" else name
        needs, remedy = f"the package {_PACKAGES[name]} for {name!r}", f'pip install "gglspeedup[{extra}]"'
        raise MissingPackageError(explain("backend", needs, "none installed", remedy))
    return import_module(f"gglspeedup.adapters.{name}")
