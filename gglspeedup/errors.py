"""The exceptions of the library: one base, and one class a built-in that fits.

A message always has the same four parts, made by :func:`explain`: the argument, what it needs, what
it got, and what to do about it.
"""

from __future__ import annotations


class GGLSpeedupError(Exception):
    """Base of every error that gglspeedup raises on purpose."""


class DeviceError(GGLSpeedupError, RuntimeError):
    """A device that was asked for cannot be used."""


class ArgumentValueError(GGLSpeedupError, ValueError):
    """An argument has the right type and a value that cannot be used."""


class ArgumentTypeError(GGLSpeedupError, TypeError):
    """An argument has a type or a dtype that cannot be used."""


class ArgumentIndexError(GGLSpeedupError, IndexError):
    """A node id lies outside the graph or the feature matrix."""


class GraphFileError(ArgumentValueError):
    """A file is not what its reader expects, or was cut short."""


class HistoryFileError(ArgumentValueError):
    """A file of histories is not what its reader expects, was cut short or not closed, or has no room."""


class PartFileError(ArgumentValueError):
    """A file of a partition is not what its reader expects, was cut short or changed, or has no room."""


class ShareError(GGLSpeedupError, RuntimeError):
    """Memory cannot be shared among processes or devices."""


class MissingPackageError(GGLSpeedupError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


def explain(argument: str, needs: str, got: object, remedy: str) -> str:
    """Return an error message: argument, needed, got, remedy."""
    return f"{argument} needs {needs}, got {got}; {remedy}"
