"""Every CUDA kernel, with every set of macros, compiles to machine code; no driver is needed for that."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from conftest import missing

from gglspeedup.kernels import sample_gpu
from gglspeedup.kernels.cuda import compile_options, kernel_source

ARCHITECTURES = (75, 80, 90, 100)
VARIANTS = [
    *(
        ("sample.cu", sample_gpu.macros_of(dtype, hashed, in_pieces))
        for dtype, hashed, in_pieces in itertools.product((np.int32, np.int64), (False, True), (False, True))
    ),
    *(
        ("sample.cu", sample_gpu.macros_of(dtype, True, in_pieces, many=True))
        for dtype, in_pieces in itertools.product((np.int32, np.int64), (False, True))
    ),
    ("gather.cu", ()),
    ("gather.cu", ("IN_PIECES",)),
]
_ALWAYS = ((), ("INDEX64", "HASH_TABLE", "IN_PIECES", "MANY_BATCHES"))  # the two that differ most, for one architecture
KERNELS = {
    "sample.cu": {
        "fill_ones", "refill_table", "insert_seeds", "check_seeds", "count_rows", "scan_sums", "draw_8", "draw_16",
        "draw_32", "draw_128", "draw_1024", "draw_all", "count_first", "assign", "emit_edges", "copy_ids",
        "place_outputs", "emit_batches",
    },
    "gather.cu": {"check_ids", *(f"{op}_rows_{width}" for op in ("gather", "scatter") for width in (16, 8, 4, 2, 1))},
}  # fmt: skip


def compile_to_cubin(file: str, macros: tuple[str, ...], architecture: int) -> bytes:
    """Machine code of a file, by NVRTC."""
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        missing("CuPy, which compiles the CUDA kernels,")
    try:
        program = nvrtc.createProgram(kernel_source(file), file, (), ())
    except (RuntimeError, OSError) as error:
        missing(f"NVRTC, which compiles the CUDA kernels ({error}),")
    try:
        options = (*compile_options(macros), f"-arch=sm_{architecture}")
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        assert not re.search("warning", nvrtc.getProgramLog(program)), nvrtc.getProgramLog(program)
        return nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize(
    ("file", "macros", "architecture"),
    [
        # The others share nearly all their code with those that run always.
        pytest.param(
            file, macros, architecture,
            marks=() if architecture == 90 and macros in _ALWAYS else pytest.mark.slow,
            id="-".join((file, *macros, str(architecture))),
        )
        for file, macros in VARIANTS
        for architecture in ARCHITECTURES
    ],
)  # fmt: skip
def test_kernels_compile(file: str, macros: tuple[str, ...], architecture: int) -> None:
    cubin = compile_to_cubin(file, macros, architecture)
    assert cubin[:4] == b"\x7fELF"
    for name in KERNELS[file]:
        assert f".text.{name}\0".encode() in cubin, name


def test_headers_are_inlined() -> None:
    source = kernel_source("sample.cu")
    assert '#include "' not in source
    assert "__umulhi" not in source and "philox(" in source
