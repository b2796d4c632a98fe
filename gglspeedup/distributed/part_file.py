"""The files of a partition on disk: one array each, behind a header of one page (`page_file`) that says which it is.

The folder::

    meta.json              written last: what the graph is, the parts, the checksums of every file (`meta`)
    owners                 uint8 or uint16, the part of each node; missing if the parts are ranges of nodes
    part-00000/indptr      int64 [n + 1]
    part-00000/start       int64 [n]
    part-00000/indices     int32 or int64 [E]
    part-00000/edge_ids    int64 [E], if the graph has some
    part-00000/features    any dtype [n, ...], if asked for; labels likewise

All is little-endian. A header holds the fingerprint of the whole graph, so that a file of another partition is found
out by its first page; `WHOLE` is the part of arrays that belong to no part.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.errors import PartFileError, explain

Array = npt.NDArray[Any]

MAGIC = b"GGLPART\x01"
WHOLE = -1
REMEDY = "check the path, or partition the graph again"
CHECKED_BYTES = 1 << 26  # of a file's array for each checksum


class ArrayFile(NamedTuple):
    """One array of a partition; `dtype` is a NumPy name with its byte order, such as ``"<i8"``."""

    part: int
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """Where it lies in the folder."""
        return self.name if self.part == WHOLE else f"{part_folder(self.part)}/{self.name}"

    @property
    def num_bytes(self) -> int:
        """The size of the array; that of the file is a page more."""
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:
            size *= length
        return size


def part_folder(part: int) -> str:
    """Return the name of the folder of a part."""
    return f"part-{part:05d}"


def header(array: ArrayFile, fingerprint: str) -> bytes:
    """Return the first page of a file."""
    page = page_file.pack(MAGIC, {**array._asdict(), "graph": fingerprint})
    if page is None:
        raise PartFileError(explain(array.name, "a header of one page", f"shape {array.shape}", "use fewer dimensions"))
    return page


def check_file(folder: str, array: ArrayFile, fingerprint: str) -> str:
    """Return the path of a file, once its header and its size are known to be right.

    Raises
    ------
    PartFileError
        They are not.
    OSError
        It cannot be opened.
    """
    path = os.path.join(folder, array.path)
    try:
        with open(path, "rb") as file:
            page = file.read(page_file.PAGE)
            actual = os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise PartFileError(explain("folder", f"a file {array.path!r}", f"none in {folder!r}", REMEDY)) from error
    found = page_file.unpack(page, MAGIC, path, PartFileError, "a file of a partition", REMEDY)
    expected = {**array._asdict(), "shape": list(array.shape), "graph": fingerprint}
    if found != expected:
        needs = f"{array.name} of part {array.part} of the graph {fingerprint}, {array.dtype} {list(array.shape)}"
        raise PartFileError(explain("path", needs, f"{path!r}, which says {found}", REMEDY))
    size = page_file.PAGE + array.num_bytes
    if actual != size:
        raise PartFileError(explain("path", f"a file of {size} bytes", f"{path!r} of {actual}", REMEDY))
    return path


def open_array(folder: str, array: ArrayFile, fingerprint: str, mmap: bool) -> Array:
    """Return the array of a file that :func:`check_file` has nothing against; memory-mapped read-only, or read."""
    path = check_file(folder, array, fingerprint)
    if array.num_bytes == 0:
        return np.empty(array.shape, array.dtype)
    if mmap:
        return np.asarray(np.memmap(path, array.dtype, "r", page_file.PAGE, array.shape))
    count = array.num_bytes // np.dtype(array.dtype).itemsize
    return np.fromfile(path, array.dtype, count, offset=page_file.PAGE).reshape(array.shape)
