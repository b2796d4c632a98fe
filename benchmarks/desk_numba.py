"""What the compiler made of the kernels of `numba.cuda`: what it says of them, and their machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gglspeedup.errors import MissingPackageError, explain

JITTED = "numba.cuda"  # in place of a file's name


def compiled(architecture: int) -> list[tuple[str, str, bytes]]:
    """Return of each kernel its name, the assembler's words, and its machine code. Raises MissingPackageError."""
    try:
        from cuda.bindings import nvjitlink
        from numba import cuda, types

        from gglspeedup.kernels.history_gpu import keep_last, stamp_each
        from gglspeedup.kernels.visits_gpu import visit_each

        linker = nvjitlink.create(2, [f"-arch=sm_{architecture}", "-Xptxas=-v"])
        nvjitlink.destroy(linker)
    except (ImportError, RuntimeError, OSError) as error:
        message = explain("the desk check", "numba-cuda and nvJitLink", error, 'install the extra "cuda"')
        raise MissingPackageError(message) from error
    ids = types.int64[::1]
    signatures: dict[Callable[..., Any], tuple[Any, ...]] = {
        stamp_each: (ids, types.int64, ids),
        keep_last: (ids, types.int64, ids, ids),
        visit_each: (ids, types.int32[::1]),
    }
    found = []
    for kernel, arguments in signatures.items():
        capability = divmod(architecture, 10)
        text, _ = cuda.compile(kernel, types.void(*arguments), cc=capability, device=False, abi="numba")
        found.append((kernel.__name__, *_assembled(nvjitlink, text.encode(), architecture)))
    return found


def _assembled(nvjitlink: Any, text: bytes, architecture: int) -> tuple[str, bytes]:
    linker = nvjitlink.create(2, [f"-arch=sm_{architecture}", "-Xptxas=-v"])
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, text, len(text), "kernel")
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
        code = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, code)
        return log.decode().rstrip("\0"), bytes(code)
    finally:
        nvjitlink.destroy(linker)
