"""One short module a framework; none is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from gglspeedup.errors import ArgumentValueError, MissingPackageError, explain

BACKENDS = ("numpy", "cupy", "torch", "tensorflow", "paddle", "tensorlayerx", "jax")


def backend(name: str) -> ModuleType:
    """Return the adapter module of a backend; it imports the framework.

    Parameters
    ----------
    name : str
        One of `BACKENDS`.

    Raises
    ------
    ArgumentValueError
        It is not one of these.
    MissingPackageError
        The framework is not installed.

    Examples
    --------
    >>> from gglspeedup.adapters import backend
    >>> backend("numpy").to_framework([1, 2])
    [1, 2]
    """
    if name not in BACKENDS:
        needs = f"one of {', '.join(BACKENDS)}"
        raise ArgumentValueError(explain("backend", needs, repr(name), "name the framework that you train with"))
    try:
        return import_module(f"gglspeedup.adapters.{name}")
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        remedy = f"pip install {name}"
        raise MissingPackageError(explain("backend", f"{name} to be installed", "no such package", remedy)) from error
