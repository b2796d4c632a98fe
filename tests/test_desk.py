"""What the compiler makes of the CUDA kernels is no worse than the table in docs/desk.md, and keeps to the rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import missing

from benchmarks import desk
from benchmarks.desk import ARCHITECTURES, RULES, VARIANTS, Figures, Place
from gglspeedup.errors import MissingPackageError
from gglspeedup.kernels import gather_gpu, sample_gpu
from gglspeedup.kernels.cuda import Kernel

TABLE = Path(__file__).parent.parent / "docs" / "desk.md"
REWRITE = "python -m benchmarks.desk --write docs/desk.md"
GOOD = Figures(40, 0, 0, 0, 0, 0, 0, 4, 4)
# The fast ones: one architecture, and the graph that most have.
FAST = (90, ())


@pytest.mark.parametrize(
    ("file", "macros", "architecture"),
    [
        pytest.param(
            file, macros, architecture,
            marks=() if (architecture, macros) == FAST else pytest.mark.slow,
            id="-".join((file, *macros, str(architecture))),
        )
        for file, macros in VARIANTS
        for architecture in ARCHITECTURES
    ],
)  # fmt: skip
def test_kernels_are_no_worse(file: str, macros: tuple[str, ...], architecture: int) -> None:
    try:
        compiler, found = desk.compiler(), desk.figures(file, macros, architecture)
    except MissingPackageError as error:
        missing(str(error))
    committed_by, committed = desk.read_table(TABLE.read_text(encoding="utf-8"))
    wrong = []
    for place, figures in found.items():
        name = f"{place.kernel}, sm_{place.architecture}, variant {place.variant}"
        wrong += [f"{name}: {problem}" for problem in desk.broken_rules(place, figures)]
        if place not in committed:
            wrong.append(f"{name}: not in the table; {REWRITE}")
        elif compiler == committed_by:  # another compiler's figures differ a little: there the rules alone hold
            wrong += [f"{name}: {change}; if meant: {REWRITE}" for change in desk.changes(committed[place], figures)]
    assert not wrong, "\n".join(wrong)


def test_table_has_every_kernel() -> None:
    """And no other; what it says keeps to the rules, whatever compiler there is here."""
    text = TABLE.read_text(encoding="utf-8")
    compiler, committed = desk.read_table(text)
    assert {place.kernel for place in committed} == set(RULES)
    variants = {(architecture, desk.variant_of(macros)) for _, macros in VARIANTS for architecture in ARCHITECTURES}
    assert {(place.architecture, place.variant) for place in committed} == variants
    assert [problem for item in committed.items() for problem in desk.broken_rules(*item)] == []
    assert desk.table(compiler, committed) == text.split(desk.BEGIN)[1].split(desk.END)[0].strip()


@pytest.mark.parametrize(
    ("kernel", "changed", "reason"),
    [
        ("draw_8", {"registers": 41}, "has 41 registers, the ceiling is 40: 40 warps are left"),
        ("draw_8", {"stack": 8}, "is hot and has stack: 8"),
        ("assign", {"registers": 32, "spill_stores": 4}, "is hot and has spill stores: 4"),
        ("scatter_rows_8", {"spill_loads": 4}, "is hot and has spill loads: 4"),
        ("count_first", {"registers": 32, "local": 2}, "is hot and has local: 2"),
        ("gather_rows_8", {"generic": 1}, "is hot and has 1 generic"),
        ("gather_rows_16", {"loads_128": 0}, "has 0 loads of 128 bits, needs 4"),
        ("scatter_rows_16", {"stores_128": 3}, "has 3 stores of 128 bits, needs 4"),
        ("draw_128", {"shared": 26624}, "has 26624 bytes of shared memory, which leave 12 warps, not 36"),
        ("no_such_kernel", {}, "has no rule"),
    ],
)
def test_rules_are_kept(kernel: str, changed: dict[str, int], reason: str) -> None:
    problems = list(desk.broken_rules(Place(80, kernel, "-"), GOOD._replace(**changed)))
    assert len(problems) == 1 and problems[0].startswith(reason)


def test_good_figures_break_no_rule() -> None:
    assert not list(desk.broken_rules(Place(80, "gather_rows_16", "-"), GOOD))
    assert not list(desk.broken_rules(Place(80, "gather_rows_16", "p"), GOOD._replace(registers=64)))
    assert list(desk.broken_rules(Place(80, "gather_rows_16", "-"), GOOD._replace(registers=64)))


def test_changes_have_a_direction() -> None:
    assert list(desk.changes(GOOD, GOOD)) == []
    worse = GOOD._replace(registers=41, stores_128=2)
    assert list(desk.changes(GOOD, worse)) == [
        "registers rose from 40 to 41, which is worse", "stores 128 fell from 4 to 2, which is worse",
    ]  # fmt: skip
    assert all(change.endswith("better") for change in desk.changes(worse, GOOD))


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "warps"),
    [
        (80, 256, 32, 0, 64),
        (80, 256, 33, 0, 48),
        (90, 256, 40, 0, 48),
        (90, 256, 48, 8, 40),
        (90, 256, 64, 0, 32),
        (80, 1024, 64, 0, 32),
        (80, 64, 32, 0, 64),
        (80, 32, 32, 0, 32),  # 32 blocks
        (80, 64, 56, 26624, 12),  # 6 blocks by shared memory
        (90, 64, 56, 26624, 16),
    ],
)
def test_occupancy(architecture: int, threads: int, registers: int, shared: int, warps: int) -> None:
    assert desk.occupancy(architecture, threads, registers, shared) == warps


def test_assembly_is_counted() -> None:
    text = """
.text.one:
        /*0010*/  @!P0 LDG.E.128.CONSTANT R20, desc[UR8][R6.64] ;
        /*0020*/       LDG.E.64 R20, [R6.64] ;
        /*0030*/       STG.E.EF.128 [R6.64], R20 ;
        /*0040*/       LD.E.128 R20, [R6.64] ;
.text.two:
        /*0010*/       STL.64 [R1], R2 ;
        /*0020*/  @P0  LDL R2, [R1+0x8] ;
        /*0030*/       LDS.128 R8, [R24] ;
"""
    assert desk.read_assembly(text) == {"one": (0, 1, 1, 1), "two": (2, 0, 0, 0)}


def test_log_is_read() -> None:
    log = """ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 13 registers, used 0 barriers
"""
    assert desk.read_log(log) == {"a": (40, 16, 8, 4, 12), "b": (13, 0, 0, 0, 0)}


class Launches:
    """A runtime that notes the threads of each kernel's blocks."""

    def __init__(self) -> None:
        self.threads: dict[str, set[int]] = {}

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Any], layers: int = 1) -> None:
        self.threads.setdefault(kernel.name, set()).add(block)


def test_threads_are_those_of_the_launchers() -> None:
    try:
        from gglspeedup.kernels import history_gpu, visits_gpu
    except ImportError:
        missing("numba-cuda")
    runtime: Any = Launches()
    target, table = sample_gpu.Target(runtime, ()), sample_gpu.Table(None, None, 0, False)
    hop = sample_gpu.Hop(0, False, 1, False)
    for fanout in (-1, *range(1, 1025)):
        sample_gpu.draw(target, 9, 9, 0, sample_gpu.Hop(0, False, fanout, False), *[None] * 10, table)
    sample_gpu.fill_ones(target, [0])
    sample_gpu.refill_table(target, 9, None, 0, None, None, None, table)
    sample_gpu.insert_seeds(target, 9, None, None, 9, None, None, None, table)
    sample_gpu.check_seeds(target, 9, None, None, 9, None, table)
    sample_gpu.count_rows(target, 9, None, hop, *[None] * 6)
    sample_gpu.scan_sums(target, None, hop, True, None)
    sample_gpu.count_first(target, 9, None, 0, None, None, None, table)
    sample_gpu.assign(target, 9, None, 0, *[None] * 5)
    sample_gpu.emit_edges(target, 9, 0, 9, *[None] * 7)
    sample_gpu.copy_ids(target, 9, None, None)
    sample_gpu.place_outputs(target, None, 2)
    sample_gpu.emit_batches(target, 9, None, 2, *[None] * 7)
    rows, ids = np.zeros((9, 16), np.uint8), np.zeros(9, np.int64)
    for width in (16, 8, 4, 2, 1):
        gather_gpu.gather_rows(runtime, None, None, rows, 9, ids, rows, width, None, None)
        gather_gpu.scatter_rows(runtime, rows, ids, rows, width)
    gather_gpu.check_ids(runtime, ids, 9, None)
    for module, names in ((history_gpu, ("stamp_each", "keep_last")), (visits_gpu, ("visit_each",))):
        runtime.threads |= {name: {module._THREADS} for name in names}
    assert runtime.threads == {kernel: {rule.threads} for kernel, rule in RULES.items()}
