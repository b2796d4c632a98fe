"""The exceptions of the library: one base, and one class a built-in that fits.

A message always has the same four parts, made by :func:`explain`: the argument, what it needs, what
it got, and what to do about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class GGLSpeedupError(Exception):
    """Base of every error that gglspeedup raises on purpose."""


class DeviceError(GGLSpeedupError, RuntimeError):
    """A device that was asked for cannot be used."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A device, or the host for its sake, has no room for what was to be done there."""


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


class WorkerError(GGLSpeedupError, RuntimeError):
    """A process that makes batches has died, or what went wrong in it."""


class MissingPackageError(GGLSpeedupError, ImportError):
    """An optional package is needed for what was asked and is not installed."""


# Where the classes are from that CuPy, its compiler and numba.cuda raise; they are known without those packages.
_OF_CUDA = ("cupy", "numba.cuda", "numba_cuda", "cuda.")


@contextlib.contextmanager
def cuda_failures(index: int) -> Iterator[None]:
    """Turn what CUDA's libraries raise within a block into errors of this one.

    Parameters
    ----------
    index : int
        The CUDA ordinal that the block works on.

    Raises
    ------
    DeviceMemoryError
        Instead of a MemoryError.
    DeviceError
        Instead of an error of CuPy's or numba.cuda's classes.

    Examples
    --------
    >>> with cuda_failures(0):
    ...     raise MemoryError("Out of memory allocating 512 bytes")
    Traceback (most recent call last):
    gglspeedup.errors.DeviceMemoryError: memory needs more room on cuda:0 or the host, got ...
    """
    try:
        yield
    except GGLSpeedupError:
        raise
    except MemoryError as error:
        remedy = "take smaller batches or a smaller budget, or let go of what else is in it"
        got = f"{type(error).__name__}: {error}"
        raise DeviceMemoryError(explain("memory", f"more room on cuda:{index} or the host", got, remedy)) from error
    except Exception as error:
        if not type(error).__module__.startswith(_OF_CUDA):
            raise
        remedy = "call again, and start the process anew if it stays so"
        got = f"{type(error).__name__}: {error}"
        raise DeviceError(explain("device", f"cuda:{index} to do what it was told", got, remedy)) from error


def explain(argument: str, needs: str, got: object, remedy: str) -> str:
    """Return an error message: argument, needed, got, remedy."""
    return f"{argument} needs {needs}, got {got}; {remedy}"
