"""The file of a graph: a header of 4096 bytes, then indptr, indices and edge ids, each on a page boundary.

The header is little-endian: 8 bytes of magic; int64 number of nodes, of edges, bytes an index (4 or 8), bytes an
edge id (0 if there are none, or 8); uint32 CRC-32 of all that.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import GraphFileError, explain
from gglspeedup.page_file import LIMIT, beside, layout

Array = npt.NDArray[Any]
_MAGIC = b"GGLCSR\x00\x01"
_FIELDS = struct.Struct("<8sqqqq")


def _layout(nodes: int, edges: int, index_bytes: int, id_bytes: int) -> tuple[list[int], int]:
    """Return where the three arrays begin, and the size of the file."""
    return layout(((nodes + 1) * 8, edges * index_bytes, edges * id_bytes))


def write(path: str, indptr: Array, indices: Array, edge_ids: Array | None) -> None:
    """Write a graph beside `path`, then rename it into place."""
    id_bytes = 0 if edge_ids is None else 8
    begins, size = _layout(len(indptr) - 1, len(indices), indices.itemsize, id_bytes)
    fields = _FIELDS.pack(_MAGIC, len(indptr) - 1, len(indices), indices.itemsize, id_bytes)
    with beside(path) as file:
        file.write(fields + struct.pack("<I", zlib.crc32(fields)))
        for begin, array in zip(begins, (indptr, indices, edge_ids), strict=True):
            file.seek(begin)
            if array is not None:
                array.astype(array.dtype.newbyteorder("<"), copy=False).tofile(file)
        file.truncate(size)


class Section(NamedTuple):
    """One array of a file: where its bytes begin, its dtype and its number of elements."""

    begin: int
    dtype: str
    length: int


def sections(path: str) -> tuple[Section, Section, Section | None]:
    """Return where indptr, indices and edge ids of a file are, once its header and size are known to be right."""
    remedy = "write it again with CSRGraph.save"
    with open(path, "rb") as file:
        head = file.read(_FIELDS.size + 4)
        actual = os.fstat(file.fileno()).st_size
    if len(head) < _FIELDS.size + 4 or head[:8] != _MAGIC:
        raise GraphFileError(explain("path", "a graph file", f"{path!r}, which does not start as one", remedy))
    if struct.unpack("<I", head[_FIELDS.size :])[0] != zlib.crc32(head[: _FIELDS.size]):
        raise GraphFileError(explain("path", "a whole header", f"{path!r}, whose header is damaged", remedy))
    _magic, nodes, edges, index_bytes, id_bytes = _FIELDS.unpack(head[: _FIELDS.size])
    if not (0 <= nodes < LIMIT and 0 <= edges < LIMIT and index_bytes in (4, 8) and id_bytes in (0, 8)):
        raise GraphFileError(explain("path", "a sound header", f"{path!r}, whose header is not", remedy))
    begins, size = _layout(nodes, edges, index_bytes, id_bytes)
    if actual != size:
        raise GraphFileError(explain("path", f"a file of {size} bytes", f"{path!r} of {actual}", remedy))
    kinds = ("<i8", f"<i{index_bytes}", "<i8")
    found = [Section(*fields) for fields in zip(begins, kinds, (nodes + 1, edges, edges), strict=True)]
    return found[0], found[1], found[2] if id_bytes else None


def read(path: str, mmap: bool) -> tuple[Array, Array, Array | None]:
    """Return indptr, indices and edge ids of a file, once its header and size are known to be right."""
    indptr, indices, edge_ids = sections(path)
    return _array(path, indptr, mmap), _array(path, indices, mmap), _array(path, edge_ids, mmap) if edge_ids else None


def _array(path: str, section: Section, mmap: bool) -> Array:
    begin, dtype, length = section
    if length == 0:
        return np.empty(0, dtype)
    if mmap:
        return np.asarray(np.memmap(path, dtype, "r", begin, (length,)))
    return np.fromfile(path, dtype, length, offset=begin)
