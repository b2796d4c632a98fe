"""What users pass in, turned into checked arrays: node ids, CSR parts, feature matrices."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ArgumentIndexError, ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.interchange import as_array, on_cuda
from gglspeedup.memory import kernel_view


def host_array(value: Any, argument: str) -> npt.NDArray[Any]:
    """Return a NumPy array of anything array-like: a view where memory is shared over DLPack, else a copy.

    Parameters
    ----------
    value : array-like or tensor
        NumPy, a list, or a tensor of any framework; one on a GPU is copied to the host.
    argument : str
        What to call it in an error.

    Raises
    ------
    ArgumentTypeError
        It is no array-like, is sparse, or is traced and has no values.
    """
    array = as_array(value, argument)
    return array if isinstance(array, np.ndarray) else np.asarray(array.get())  # CuPy's


def check_ids(array: Any, argument: str) -> None:
    """Raise unless the array can be a list of node ids: one-dimensional and of an integer dtype."""
    if array.ndim != 1:
        raise ArgumentValueError(
            explain(argument, "one dimension", f"shape {tuple(array.shape)}", "pass a flat list of node ids")
        )
    if array.dtype.kind not in "iu":
        raise ArgumentTypeError(
            explain(argument, "integers", f"dtype {array.dtype}", "convert it, for example with .astype('int64')")
        )


def host_ids(value: Any, argument: str) -> npt.NDArray[np.int64]:
    """Return node ids as a C-contiguous int64 NumPy array; their range is not looked at.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        They are not integers, or not one-dimensional.
    """
    array = host_array(value, argument)
    if array.size == 0 and not isinstance(value, np.ndarray) and array.ndim == 1 and isinstance(value, (list, tuple)):
        return np.empty(0, np.int64)  # an empty list has no integer dtype, and is a list of ids all the same
    check_ids(array, argument)
    if array.dtype == np.uint64 and array.size and array.max() > np.uint64(2**63 - 1):
        first = int(np.argmax(array > np.uint64(2**63 - 1)))
        raise out_of_range(argument, first, int(array[first]), None)
    return kernel_view(np.ascontiguousarray(array, np.int64))  # TensorFlow's and JAX's are read-only


def device_ids(value: Any, argument: str, runtime: Any) -> Any:
    """Return node ids as a contiguous int64 array on the device; their range is not looked at.

    `runtime` is that of the device (`kernels.cuda.Runtime`).

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        They are not integers, not one-dimensional, or on another GPU.
    """
    if runtime.is_device(value):
        array = value
    elif on_cuda(value):
        array = as_array(value, argument)
    else:
        with runtime.activate():
            return runtime.to_device(host_ids(value, argument))
    if on_cuda(array) and array.device.id != runtime.index:
        remedy = "move them, or pass them from the host"
        raise ArgumentValueError(explain(argument, f"ids on cuda:{runtime.index}", f"cuda:{array.device.id}", remedy))
    check_ids(array, argument)
    if array.dtype == np.int64 and array.flags.c_contiguous:
        return array
    with runtime.activate():
        return runtime.xp.ascontiguousarray(array, np.int64)


def out_of_range(argument: str, position: int, value: int, bound: int | None) -> ArgumentIndexError:
    """Return the error for the id at a position that lies outside [0, bound)."""
    needs = "ids that fit int64" if bound is None else f"ids from 0 to {bound - 1}"
    if bound == 0:
        needs = "no id, as the graph has no node"
    return ArgumentIndexError(
        explain(argument, needs, f"{value} at position {position}", "check that graph and ids belong together")
    )


def check_range(ids: npt.NDArray[np.int64], bound: int, argument: str) -> None:
    """Raise for the first of the ids that lies outside [0, bound)."""
    # As unsigned numbers the negative ids are the largest ones: one pass finds both kinds.
    if ids.size and int(ids.view(np.uint64).max()) >= bound:
        first = int(np.argmax(ids.view(np.uint64) >= np.uint64(bound)))
        raise out_of_range(argument, first, int(ids[first]), bound)


def duplicate(argument: str, position: int, value: int) -> ArgumentValueError:
    """Return the error for an id that stands twice."""
    return ArgumentValueError(
        explain(argument, "unique ids", f"{value} again at position {position}", "pass numpy.unique(...) of them")
    )


def check_unique(ids: npt.NDArray[np.int64], bound: int, argument: str) -> npt.NDArray[np.bool_]:
    """Return which of `bound` nodes are among the ids, bool [bound]; raise for the first id that stands twice."""
    listed = np.zeros(bound, np.bool_)
    listed[ids] = True
    if int(listed.sum()) != len(ids):
        first = np.unique(ids, return_index=True)[1]
        position = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise duplicate(argument, position, int(ids[position]))
    return listed


def check_count(value: Any, argument: str, least: int, bound: int | None = None) -> int:
    """Return an int that is at least `least` and below `bound`.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is no integer, or not in that range.
    """
    remedy = "pass a whole number in that range"
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(explain(argument, "an integer", repr(value), remedy))
    number = int(value.__index__())
    if number < least or (bound is not None and number >= bound):
        needs = f"at least {least}" if bound is None else f"{least} to {bound - 1}"
        raise ArgumentValueError(explain(argument, needs, number, remedy))
    return number


def check_fraction(value: Any, argument: str, bound: float = 1) -> float:
    """Return a float that is at least 0 and below `bound`; raise ArgumentTypeError or ArgumentValueError otherwise."""
    remedy = "pass a fraction" if bound == 1 else "pass such a number"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(explain(argument, "a number", repr(value), remedy))
    if not 0 <= float(value) < bound:
        raise ArgumentValueError(explain(argument, f"at least 0 and less than {bound}", value, remedy))
    return float(value)


def check_widths(*widths: Any) -> list[int]:
    """Return the widths of a model's input, of what is between its layers, and of its output, each at least 1."""
    names = ("in_channels", "hidden_channels", "out_channels")
    return [check_count(width, name, 1) for width, name in zip(widths, names, strict=True)]


def check_flag(value: Any, argument: str) -> bool:
    """Return a bool; raise ArgumentTypeError if it is none."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(explain(argument, "True or False", repr(value), "pass a bool"))
    return bool(value)


def check_sizes(sizes: Any, max_fanout: int, max_hops: int) -> tuple[int, ...]:
    """Return the fanouts of the hops as ints; every K <= 0 becomes -1, all neighbours.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        No sequence of integers; NaN or broken numbers; above `max_fanout`; no hop or more than `max_hops`.
    """
    remedy = "pass one integer a hop, nearest the seeds first, for example [25, 10] (-1: all neighbours)"
    if isinstance(sizes, (str, bytes)) or not hasattr(sizes, "__iter__"):
        raise ArgumentTypeError(explain("sizes", "a sequence of integers", repr(sizes), remedy))
    checked = []
    for size in sizes:
        if isinstance(size, (float, np.floating)):
            if not float(size).is_integer():
                raise ArgumentValueError(explain("sizes", "whole numbers", repr(size), remedy))
            size = int(size)
        if isinstance(size, (bool, np.bool_)) or not hasattr(size, "__index__"):
            raise ArgumentTypeError(explain("sizes", "integers", repr(size), remedy))
        size = size.__index__()
        if size > max_fanout:
            raise ArgumentValueError(explain("sizes", f"fanouts up to {max_fanout}", size, "-1 takes every neighbour"))
        checked.append(size if size > 0 else -1)
    if not 0 < len(checked) <= max_hops:
        raise ArgumentValueError(explain("sizes", f"1 to {max_hops} hops", f"{len(checked)}", remedy))
    return tuple(checked)
