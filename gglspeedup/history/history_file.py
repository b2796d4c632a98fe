"""The file of a history store: a header of one page, then for each table its stamps and its rows, on page boundaries.

The header is little-endian: 8 bytes of magic, an int64 length and so many bytes of JSON (nodes, dims, dtype, pushes),
their uint32 CRC-32. The page's last byte is 1 while a process has the file open for writing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.errors import HistoryFileError, MissingPackageError, explain

Array = npt.NDArray[Any]

_MAGIC = b"GGLHIST\x01"
_MOST_TABLES = 256
_REMEDY = "check the path, or delete the file to start from zeros"
DTYPES = ("float32", "float16", "bfloat16")


class Header(NamedTuple):
    """What a file says of itself; `pushes` counts those of each table."""

    num_nodes: int
    dims: tuple[int, ...]
    dtype: str
    pushes: tuple[int, ...]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of a name in `DTYPES`; bfloat16 is ml_dtypes'.

    Raises
    ------
    MissingPackageError
        It is bfloat16, and ml_dtypes is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        remedy = "pip install ml_dtypes"
        raise MissingPackageError(explain("dtype", "ml_dtypes for bfloat16", "no such package", remedy)) from error
    return np.dtype(bfloat16)


def layout(header: Header) -> tuple[list[tuple[int, int]], int]:
    """Return where the stamps and the rows of each table begin, and the size of the file, in bytes."""
    row_bytes = [dim * numpy_dtype(header.dtype).itemsize for dim in header.dims]
    begins, size = page_file.layout(header.num_nodes * each for row in row_bytes for each in (8, row))
    return list(zip(begins[::2], begins[1::2], strict=True)), size


def _pack(header: Header, in_use: bool) -> bytes:
    page = page_file.pack(_MAGIC, header._asdict())
    if page is None:
        raise HistoryFileError(explain("dims", "a header of one page", f"{len(header.dims)} tables", "use fewer"))
    return page[:-1] + bytes([in_use])


def read_header(path: str) -> Header:
    """Return the header of a file that nobody is writing, once it and the file's size are known to be right.

    Raises
    ------
    HistoryFileError
        It is no such file, is damaged or cut short, or was left by a process that ended while it wrote.
    """
    with open(path, "rb") as file:
        page = file.read(page_file.PAGE)
        actual = os.fstat(file.fileno()).st_size
    fields = page_file.unpack(page, _MAGIC, path, HistoryFileError, "a history file", _REMEDY)
    header = _sound(path, fields)
    size = layout(header)[1]
    if actual != size:
        raise HistoryFileError(explain("path", f"a file of {size} bytes", f"{path!r} of {actual}", _REMEDY))
    if page[-1]:
        got = f"{path!r}, which a process had open for writing and did not close"
        raise HistoryFileError(explain("path", "a file that was closed", got, _REMEDY))
    return header


def _sound(path: str, fields: Any) -> Header:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < page_file.LIMIT

    def wholes(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) <= _MOST_TABLES and all(map(whole, value))

    if (
        not isinstance(fields, dict)
        or set(fields) != set(Header._fields)
        or not (whole(fields["num_nodes"]) and wholes(fields["dims"]) and wholes(fields["pushes"]))
        or len(fields["dims"]) != len(fields["pushes"])
        or fields["dtype"] not in DTYPES
    ):
        raise HistoryFileError(explain("path", "a sound header", f"{path!r}, whose header is not", _REMEDY))
    return Header(fields["num_nodes"], tuple(fields["dims"]), fields["dtype"], tuple(fields["pushes"]))


def create(path: str, header: Header) -> None:
    """Make a file of zeros, of its full size: a disk that is too small is found here, not while it is written.

    Raises
    ------
    HistoryFileError
        The disk has no room for it.
    """
    size = layout(header)[1]
    with _beside(path) as file:
        file.write(_pack(header, in_use=False))
        file.flush()
        page_file.reserve(file, size)


def write(path: str, header: Header, tables: Sequence[tuple[Array, Array]]) -> None:
    """Write (stamps, rows) of each table beside `path`, then rename the file into place."""
    begins, size = layout(header)
    with _beside(path) as file:
        file.write(_pack(header, in_use=False))
        for places, arrays in zip(begins, tables, strict=True):
            for begin, array in zip(places, arrays, strict=True):
                file.seek(begin)
                array.tofile(file)
        file.truncate(size)


@contextlib.contextmanager
def _beside(path: str) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place if all goes well, and goes away if not."""
    remedy = "free some space, or store float16; what was there before is untouched"
    with page_file.telling_room("path", HistoryFileError, remedy), page_file.beside(path) as file:
        yield file


def tables(path: str, header: Header, mode: Literal["r", "r+"]) -> list[tuple[Array, Array]]:
    """Return (stamps, rows) of each table, memory-mapped with a mode of ``numpy.memmap``."""
    dtype = numpy_dtype(header.dtype)
    found: list[tuple[Array, Array]] = []
    for dim, (stamps, rows) in zip(header.dims, layout(header)[0], strict=True):
        if header.num_nodes * dim == 0:
            found.append((np.zeros(header.num_nodes, np.int64), np.zeros((header.num_nodes, dim), dtype)))
            continue
        found.append(
            (
                np.memmap(path, np.int64, mode, stamps, (header.num_nodes,)),
                np.memmap(path, dtype, mode, rows, (header.num_nodes, dim)),
            )
        )
    return found


def mark(path: str, header: Header, in_use: bool) -> None:
    """Write the header of an existing file, and whether a process has it open for writing."""
    with open(path, "r+b") as file:
        file.write(_pack(header, in_use))
        file.flush()
        os.fsync(file.fileno())
