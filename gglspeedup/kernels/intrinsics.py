"""The few machine operations that Numba does not offer on the CPU: prefetch, atomics, row copies."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_BYTE = ir.IntType(8)
_INT = ir.IntType(32)


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Return the address of element args[1] of the array args[0]."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


def _prefetch(context: Any, builder: Any, pointer: Any) -> Any:
    """Generate a prefetch for reading, into all levels of the cache."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
    function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE.as_pointer()], kind)
    builder.call(function, [pointer, _INT(0), _INT(3), _INT(1)])
    return context.get_dummy_value()


@intrinsic
def prefetch(_typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]; any index is harmless."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(_element(context, builder, signature, args), _BYTE.as_pointer())
        return _prefetch(context, builder, pointer)

    return types.void(array, types.int64), generate


@intrinsic
def prefetch_address(_typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address given as an integer."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _prefetch(context, builder, builder.inttoptr(args[0], _BYTE.as_pointer()))

    return types.void(types.int64), generate


@intrinsic
def load_address(_typing: Any, address: Any, like: Any) -> Any:
    """Read an element of the type of the array `like` at an address given as an integer."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_data_type(signature.return_type)
        return builder.load(builder.inttoptr(args[0], kind.as_pointer()))

    return like.dtype(types.int64, like), generate


@intrinsic
def pointer_to(_typing: Any, address: Any, like: Any) -> Any:
    """Return an address given as an integer as a pointer to elements of the type of the array `like`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def copy_bytes(_typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy `count` bytes between two addresses given as integers."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, ir.IntType(64), ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, ir.IntType(64)], kind)
        into, out_of = builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer)
        builder.call(function, [into, out_of, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def load_acquire(_typing: Any, array: Any, index: Any) -> Any:
    """Read array[index]; what its writer wrote before it is visible after."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align = signature.args[0].dtype.bitwidth // 8
        return builder.load_atomic(_element(context, builder, signature, args), "acquire", align)

    return array.dtype(array, types.int64), generate


@intrinsic
def store_release(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write array[index]; who reads it with load_acquire sees all that was written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        align = signature.args[0].dtype.bitwidth // 8
        builder.store_atomic(args[2], _element(context, builder, signature, args), "release", align)
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@intrinsic
def fetch_add(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to array[index] and return what stood there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _element(context, builder, signature, args), args[2], "acq_rel")

    return array.dtype(array, types.int64, array.dtype), generate


@intrinsic
def exchange(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write array[index] and return what stood there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _element(context, builder, signature, args), args[2], "acq_rel")

    return array.dtype(array, types.int64, array.dtype), generate
