"""What the compiler made of every kernel, read without a GPU; ``python -m benchmarks.desk``.

Registers, shared memory, stack and spills are the compiler's own words (``ptxas -v``, through NVRTC); loads and stores
are counted in its machine code, by the disassembler of the package ``nvidia-cuda-nvdisasm``. ``--write docs/desk.md``
puts the table into that file, and `tests/test_desk.py` holds each change to it and to :data:`RULES`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import desk_numba, marks
from gglspeedup.errors import MissingPackageError, explain
from gglspeedup.kernels.cuda import compile_options, kernel_source
from gglspeedup.kernels.sample_gpu import macros_of

ARCHITECTURES = (80, 90)
VARIANTS = [
    *(
        ("sample.cu", macros_of(dtype, hashed, in_pieces))
        for dtype, hashed, in_pieces in itertools.product((np.int32, np.int64), (False, True), (False, True))
    ),
    *(
        ("sample.cu", macros_of(dtype, True, in_pieces, many=True))
        for dtype, in_pieces in itertools.product((np.int32, np.int64), (False, True))
    ),
    ("gather.cu", ()),
    ("gather.cu", ("IN_PIECES",)),
    (desk_numba.JITTED, ()),
]
LETTERS = {"INDEX64": "i", "HASH_TABLE": "h", "IN_PIECES": "p", "MANY_BATCHES": "m"}


class Multiprocessor(NamedTuple):
    """What the blocks on a streaming multiprocessor share."""

    registers: int
    warps: int
    blocks: int
    shared: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSORS = {
    80: Multiprocessor(65536, 64, 32, 164 << 10),
    90: Multiprocessor(65536, 64, 32, 228 << 10),
}
# How they are dealt out, the same for both, from the toolkit's cuda_occupancy.h.
REGISTERS_AT_ONCE = 256  # of a warp
QUARTERS = 4  # each with a fourth of the registers
SHARED_AT_ONCE = 128
SHARED_OF_SYSTEM = 1024  # of every block


class Rule(NamedTuple):
    """What a kernel is held to, whatever the variant and the architecture.

    Parameters
    ----------
    threads : int
        Of a block, as its launcher has it.
    registers : int
        The ceiling of a thread's registers.
    warps : int
        What that ceiling and the shared memory must at least leave of the 64 warps of a multiprocessor.
    hot : bool
        Neither stack nor spills nor local memory, nor instructions that must find out which memory an address means.
    words : int
        The loads and the stores of 128 bits there must at least be.
    """

    threads: int
    registers: int
    warps: int
    hot: bool = True
    words: int = 0


RULES = {
    "fill_ones": Rule(256, 32, 64, hot=False),
    "refill_table": Rule(256, 32, 64, hot=False),
    "insert_seeds": Rule(256, 32, 64, hot=False),
    "check_seeds": Rule(256, 32, 64, hot=False),
    "count_rows": Rule(256, 32, 64),
    "scan_sums": Rule(1024, 64, 32, hot=False),  # one block
    "draw_8": Rule(256, 40, 48),
    "draw_16": Rule(256, 40, 48),
    "draw_32": Rule(256, 40, 48),
    "draw_128": Rule(64, 56, 36),
    "draw_1024": Rule(128, 56, 28),  # its shared memory leaves no more
    "draw_all": Rule(256, 32, 64),
    "count_first": Rule(256, 32, 64),
    "assign": Rule(256, 32, 64),
    "emit_edges": Rule(256, 32, 64),
    "copy_ids": Rule(256, 32, 64),
    "place_outputs": Rule(1024, 64, 32, hot=False),  # one block
    "emit_batches": Rule(256, 40, 48),
    "gather_rows_16": Rule(256, 48, 40, words=4),  # four rows are in flight at once
    **{f"gather_rows_{width}": Rule(256, 40, 48) for width in (8, 4, 2, 1)},
    "scatter_rows_16": Rule(256, 48, 40, words=4),
    **{f"scatter_rows_{width}": Rule(256, 40, 48) for width in (8, 4, 2)},
    "scatter_rows_1": Rule(256, 48, 40),
    "check_ids": Rule(256, 32, 64),
    **{name: Rule(256, 32, 64) for name in ("stamp_each", "keep_last", "visit_each")},
}
# To find the piece that a row is in takes registers.
RULES_IN_PIECES = {
    "gather_rows_16": Rule(256, 64, 32, words=4),
    **{f"gather_rows_{width}": Rule(256, 48, 40) for width in (8, 4, 2, 1)},
}


class Figures(NamedTuple):
    """What was found of a kernel; bytes, and instructions of the machine code."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    local: int
    generic: int
    loads_128: int
    stores_128: int


class Place(NamedTuple):
    """Which kernel, compiled how. `variant` has a letter of :data:`LETTERS` for each macro."""

    architecture: int
    kernel: str
    variant: str


def rule_of(place: Place) -> Rule | None:
    """Return the rule of a kernel; None if it has none."""
    rule = RULES.get(place.kernel)
    return RULES_IN_PIECES.get(place.kernel, rule) if LETTERS["IN_PIECES"] in place.variant else rule


def variant_of(macros: Iterable[str]) -> str:
    """Return the letters of macros, "-" for none."""
    return "".join(LETTERS[macro] for macro in macros) or "-"


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Return the warps that a multiprocessor holds at once of blocks of so many threads.

    >>> occupancy(80, 256, 64, 0)
    32
    """
    limits = MULTIPROCESSORS[architecture]
    block = -(-threads // 32)
    of_warp = -(-32 * registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = limits.registers // QUARTERS // of_warp * QUARTERS // block
    of_block = -(-(shared + SHARED_OF_SYSTEM) // SHARED_AT_ONCE) * SHARED_AT_ONCE
    return block * min(limits.blocks, limits.warps // block, by_registers, limits.shared // of_block)


# --- compiling and reading --------------------------------------------------------------------------------------------


def compiler() -> str:
    """Return the compiler's name and version. Raises MissingPackageError."""
    return "NVRTC {}.{}".format(*_nvrtc().getVersion())


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        message = explain("the desk check", "CuPy and NVRTC", error, 'install the extra "cuda"')
        raise MissingPackageError(message) from error
    return nvrtc


def disassembler() -> Path:
    """Return where `nvdisasm` is. Raises MissingPackageError."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.stem == "nvdisasm":
            return Path(str(file.locate()))
    found = shutil.which("nvdisasm")
    if found is None:
        message = explain("the desk check", "nvdisasm", "none", 'install the package "nvidia-cuda-nvdisasm"')
        raise MissingPackageError(message)
    return Path(found)


def compiled(file: str, macros: tuple[str, ...], architecture: int) -> tuple[str, bytes]:
    """Return what the compiler says of a file's kernels, and their machine code."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(kernel_source(file), file, (), ())
    try:
        nvrtc.compileProgram(program, (*compile_options(macros), f"-arch=sm_{architecture}", "--ptxas-options=-v"))
        # CuPy leaves the last byte out, as if this were a text that ends with a zero; so does machine code.
        return nvrtc.getProgramLog(program), nvrtc.getCUBIN(program) + b"\0"
    finally:
        nvrtc.destroyProgram(program)


def disassembled(cubin: bytes) -> str:
    """Return the assembly text of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        command = [str(disassembler()), "--print-code", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_log(log: str) -> dict[str, tuple[int, int, int, int, int]]:
    """Return of each kernel that the compiler names: registers, shared bytes, stack, spill stores, spill loads."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert frame and registers, f"the compiler's log of {name} is not as known:\n{part}"
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        found[name] = int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads
    return found


# Of instructions: on local memory, on what memory an address may mean, and on 128 bits of global memory.
PATTERNS = (
    r"\b(?:LDL|STL)\b", r"\b(?:LD|ST|ATOM)\.E\b", r"\bLDG\.E\.(?:\w+\.)*128\b", r"\bSTG\.E\.(?:\w+\.)*128\b",
)  # fmt: skip


def read_assembly(text: str) -> dict[str, tuple[int, int, int, int]]:
    """Return how many of each of :data:`PATTERNS` every kernel has."""
    found = {}
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        name = part[: part.index(":")]
        local, generic, loads, stores = (len(re.findall(pattern, part)) for pattern in PATTERNS)
        found[name] = local, generic, loads, stores
    return found


def figures(file: str, macros: tuple[str, ...], architecture: int) -> dict[Place, Figures]:
    """Return what is found of a file's kernels, compiled with some macros for an architecture."""
    said: dict[str, tuple[int, int, int, int, int]] = {}
    counted: dict[str, tuple[int, int, int, int]] = {}
    if file == desk_numba.JITTED:
        for name, log, cubin in desk_numba.compiled(architecture):
            (said[name],) = read_log(log).values()
            (counted[name],) = read_assembly(disassembled(cubin)).values()
    else:
        log, cubin = compiled(file, macros, architecture)
        said, counted = read_log(log), read_assembly(disassembled(cubin))
    variant = variant_of(macros)
    return {Place(architecture, name, variant): Figures(*said[name], *counted[name]) for name in said}


# --- judging ----------------------------------------------------------------------------------------------------------


def broken_rules(place: Place, found: Figures) -> Iterator[str]:
    """Yield what of a kernel's figures its rule forbids, and why it does."""
    rule = rule_of(place)
    if rule is None:
        yield "has no rule in benchmarks/desk.py: give it a ceiling of registers"
        return
    if found.registers > rule.registers:
        now = occupancy(place.architecture, rule.threads, found.registers, found.shared)
        yield f"has {found.registers} registers, the ceiling is {rule.registers}: {now} warps are left"
    warps = occupancy(place.architecture, rule.threads, rule.registers, found.shared)
    if warps < rule.warps:
        yield f"has {found.shared} bytes of shared memory, which leave {warps} warps, not {rule.warps}"
    for name in ("stack", "spill_stores", "spill_loads", "local"):
        if rule.hot and getattr(found, name):
            yield f"is hot and has {name.replace('_', ' ')}: {getattr(found, name)}; local memory is as far as any"
    if rule.hot and found.generic:
        yield f"is hot and has {found.generic} generic loads, stores or atomics: let the compiler know where they point"
    for name in ("loads_128", "stores_128"):
        if getattr(found, name) < rule.words:
            yield f"has {getattr(found, name)} {name.replace('_128', '')} of 128 bits, needs {rule.words}"


def changes(before: Figures, found: Figures) -> Iterator[str]:
    """Yield what differs from the committed figures, as better or worse."""
    for name, old, new in zip(Figures._fields, before, found, strict=True):
        if old != new:
            worse = new < old if name.endswith("_128") else new > old
            yield f"{name.replace('_', ' ')} {'rose' if new > old else 'fell'} from {old} to {new}, which is " + (
                "worse" if worse else "better"
            )


# --- the table --------------------------------------------------------------------------------------------------------

HEADER = (
    "| kernel | variants | sm | registers (ceiling) | shared | stack | spills: stored / loaded | local | generic "
    "| threads | warps (least) | 128-bit loads | stores |"
)
BEGIN, END = "<!-- python -m benchmarks.desk -->", "<!-- end -->"


def table(version: str, everything: dict[Place, Figures]) -> str:
    """Return the table in Markdown; variants of a kernel with the same figures are one row."""
    rows: dict[tuple[int, int, Figures, Rule], list[str]] = {}
    order = list(RULES)
    for place, found in everything.items():
        rule = rule_of(place)
        assert rule, f"{place.kernel} has no rule"
        rows.setdefault((order.index(place.kernel), place.architecture, found, rule), []).append(place.variant)
    lines = [f"{version}.", "", HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for (kernel, architecture, found, rule), variants in sorted(rows.items()):
        warps = occupancy(architecture, rule.threads, found.registers, found.shared)
        cells = (
            order[kernel], " ".join(variants), architecture, f"{found.registers} ({rule.registers})", found.shared,
            found.stack, f"{found.spill_stores} / {found.spill_loads}", found.local, found.generic, rule.threads,
            f"{warps} ({rule.warps})", found.loads_128, found.stores_128,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read_table(text: str) -> tuple[str, dict[Place, Figures]]:
    """Return the compiler and the figures of a file with a table."""
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()
    found = {}
    for line in lines[4:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [cells[3].split(" ")[0], *cells[4:6], *cells[6].split(" / "), *cells[7:9], *cells[11:13]]
        for variant in cells[1].split(" "):
            found[Place(int(cells[2]), cells[0], variant)] = Figures(*map(int, numbers))
    return lines[0].rstrip("."), found


def main() -> None:
    """Print the table, or write it into a file between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="a file that has such a table already")
    options = parser.parse_args()
    everything: dict[Place, Figures] = {}
    for (file, macros), architecture in itertools.product(VARIANTS, ARCHITECTURES):
        everything |= figures(file, macros, architecture)
    text = table(compiler(), everything)
    if options.write is None:
        print(text)
    else:
        marks.replace(options.write, BEGIN, END, text)
    for place, found in everything.items():
        for problem in broken_rules(place, found):
            print(f"{place.kernel} (sm_{place.architecture}, {place.variant}) {problem}")


if __name__ == "__main__":
    main()
