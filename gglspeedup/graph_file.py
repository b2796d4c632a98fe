"""The file of a graph: a header of 4096 bytes, then indptr, indices and edge ids, each on a page boundary.

The header is little-endian: 8 bytes of magic; int64 number of nodes, of edges, bytes an index (4 or 8), bytes an
edge id (0 if there are none, or 8); uint32 CRC-32 of all that.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import GraphFileError, explain

Array = npt.NDArray[Any]
_MAGIC = b"GGLCSR\x00\x01"
_PAGE = 4096
_FIELDS = struct.Struct("<8sqqqq")
_LIMIT = 1 << 48  # of any size in a header: sums of them stay far inside int64


def _layout(nodes: int, edges: int, index_bytes: int, id_bytes: int) -> tuple[list[int], int]:
    """Return where the three arrays begin, and the size of the file."""
    begins, at = [], _PAGE
    for size in ((nodes + 1) * 8, edges * index_bytes, edges * id_bytes):
        begins.append(at)
        at += -(-size // _PAGE) * _PAGE
    return begins, at


def write(path: str, indptr: Array, indices: Array, edge_ids: Array | None) -> None:
    """Write a graph beside `path`, then rename it into place."""
    id_bytes = 0 if edge_ids is None else 8
    begins, size = _layout(len(indptr) - 1, len(indices), indices.itemsize, id_bytes)
    fields = _FIELDS.pack(_MAGIC, len(indptr) - 1, len(indices), indices.itemsize, id_bytes)
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(fields + struct.pack("<I", zlib.crc32(fields)))
            for begin, array in zip(begins, (indptr, indices, edge_ids), strict=True):
                file.seek(begin)
                if array is not None:
                    array.astype(array.dtype.newbyteorder("<"), copy=False).tofile(file)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str, mmap: bool) -> tuple[Array, Array, Array | None]:
    """Return indptr, indices and edge ids of a file, once its header and size are known to be right."""
    remedy = "write it again with CSRGraph.save"
    with open(path, "rb") as file:
        head = file.read(_FIELDS.size + 4)
        actual = os.fstat(file.fileno()).st_size
    if len(head) < _FIELDS.size + 4 or head[:8] != _MAGIC:
        raise GraphFileError(explain("path", "a graph file", f"{path!r}, which does not start as one", remedy))
    if struct.unpack("<I", head[_FIELDS.size :])[0] != zlib.crc32(head[: _FIELDS.size]):
        raise GraphFileError(explain("path", "a whole header", f"{path!r}, whose header is damaged", remedy))
    _magic, nodes, edges, index_bytes, id_bytes = _FIELDS.unpack(head[: _FIELDS.size])
    if not (0 <= nodes < _LIMIT and 0 <= edges < _LIMIT and index_bytes in (4, 8) and id_bytes in (0, 8)):
        raise GraphFileError(explain("path", "a sound header", f"{path!r}, whose header is not", remedy))
    begins, size = _layout(nodes, edges, index_bytes, id_bytes)
    if actual != size:
        raise GraphFileError(explain("path", f"a file of {size} bytes", f"{path!r} of {actual}", remedy))
    kinds = ("<i8", f"<i{index_bytes}", "<i8")
    counts = (nodes + 1, edges, edges if id_bytes else 0)
    arrays = []
    for begin, kind, count in zip(begins, kinds, counts, strict=True):
        if count == 0:
            arrays.append(np.empty(0, kind))
        elif mmap:
            arrays.append(np.asarray(np.memmap(path, kind, "r", begin, (count,))))
        else:
            arrays.append(np.fromfile(path, kind, count, offset=begin))
    return arrays[0], arrays[1], arrays[2] if id_bytes else None
