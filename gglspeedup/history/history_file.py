"""The file of a history store: a header of one page, then for each table its stamps and its rows, on page boundaries.

The header is little-endian: 8 bytes of magic, an int64 length and so many bytes of JSON (nodes, dims, dtype, pushes),
their uint32 CRC-32. The page's last byte is 1 while a process has the file open for writing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import HistoryFileError, MissingPackageError, explain

Array = npt.NDArray[Any]

_MAGIC = b"GGLHIST\x01"
_PAGE = 4096
_LIMIT = 1 << 48  # of any size in a header: sums of them stay far inside int64
_MOST_TABLES = 256
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    begins, at = [], _PAGE
    for dim in header.dims:
        rows = at + _pages(8 * header.num_nodes)
        begins.append((at, rows))
        at = rows + _pages(header.num_nodes * dim * numpy_dtype(header.dtype).itemsize)
    return begins, at


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _pack(header: Header, in_use: bool) -> bytes:
    text = json.dumps(header._asdict()).encode()
    fields = _MAGIC + struct.pack("<q", len(text)) + text
    fields += struct.pack("<I", zlib.crc32(fields))
    if len(fields) >= _PAGE:
        raise HistoryFileError(explain("dims", "a header of one page", f"{len(header.dims)} tables", "use fewer"))
    return fields + bytes(_PAGE - 1 - len(fields)) + bytes([in_use])


def read_header(path: str) -> Header:
    """Return the header of a file that nobody is writing, once it and the file's size are known to be right.

    Raises
    ------
    HistoryFileError
        It is no such file, is damaged or cut short, or was left by a process that ended while it wrote.
    """
    with open(path, "rb") as file:
        page = file.read(_PAGE)
        actual = os.fstat(file.fileno()).st_size
    if len(page) < _PAGE or page[:8] != _MAGIC:
        raise HistoryFileError(explain("path", "a history file", f"{path!r}, which does not start as one", _REMEDY))
    (length,) = struct.unpack("<q", page[8:16])
    if not 0 <= length <= _PAGE - 21 or struct.unpack("<I", page[16 + length : 20 + length])[0] != zlib.crc32(
        page[: 16 + length]
    ):
        raise HistoryFileError(explain("path", "a whole header", f"{path!r}, whose header is damaged", _REMEDY))
    header = _sound(path, json.loads(page[16 : 16 + length]))
    size = layout(header)[1]
    if actual != size:
        raise HistoryFileError(explain("path", f"a file of {size} bytes", f"{path!r} of {actual}", _REMEDY))
    if page[-1]:
        got = f"{path!r}, which a process had open for writing and did not close"
        raise HistoryFileError(explain("path", "a file that was closed", got, _REMEDY))
    return header


def _sound(path: str, fields: Any) -> Header:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LIMIT

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
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


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
def _beside(path: str) -> Any:
    """Open a temporary file beside `path` that takes its place if all goes well, and goes away if not."""
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            remedy = "free some space, or store float16; what was there before is untouched"
            raise HistoryFileError(explain("path", "room on its disk", f"{error}", remedy)) from error
        raise


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
