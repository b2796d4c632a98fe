"""meta.json of a partition on disk: what was asked for, the sizes of the parts, the checksums of all files.

It and the journal of an unfinished run are sealed: JSON with the CRC-32 of its own text.
"""

from __future__ import annotations

import json
import os
import zlib
from typing import Any, NamedTuple

import numpy as np

from gglspeedup import page_file
from gglspeedup.distributed.book import owner_dtype
from gglspeedup.distributed.part_file import CHECKED_BYTES, REMEDY, WHOLE, ArrayFile
from gglspeedup.errors import PartFileError, explain
from gglspeedup.kernels.bounds import MAX_NODES, MAX_PARTS

META = "meta.json"
FORMAT = "gglspeedup partition"
VERSION = 1
_MOST_BYTES = 1 << 28  # of sealed JSON: it is parsed in memory
_MOST_DIMENSIONS = 32
INDEX_DTYPES = ("<i4", "<i8")

Rows = tuple[str, tuple[int, ...]] | None  # dtype and shape of one row, of features or labels


class Request(NamedTuple):
    """What a partition is of, and how it is cut: the same request gives the same files, byte for byte.

    `indptr` and `owners` are CRC-32: of the graph's indptr, and of the owners that were given (0 if none were).
    """

    num_nodes: int
    num_edges: int
    num_parts: int
    method: str
    balance: str
    seed: int
    index_dtype: str
    edge_ids: bool
    features: Rows
    labels: Rows
    indptr: int
    owners: int


class Meta(NamedTuple):
    """A finished partition.

    Attributes
    ----------
    request : Request
        What it is of.
    fingerprint : str
        Of the whole graph.
    ptr : list of int or None
        Part i owns nodes ``ptr[i]:ptr[i + 1]``, if the parts are ranges.
    nodes, edges : list of int
        Of each part.
    checksums : dict
        Path in the folder -> CRC-32 of each `CHECKED_BYTES` of the array.
    """

    request: Request
    fingerprint: str
    ptr: list[int] | None
    nodes: list[int]
    edges: list[int]
    checksums: dict[str, list[int]]

    def files(self, part: int | None = None) -> list[ArrayFile]:
        """Return the files of one part and the owners, or of all parts."""
        files = array_files(self.request, self.nodes, self.edges)
        return [file for file in files.values() if part is None or file.part in (part, WHOLE)]


def array_files(request: Request, nodes: list[int], edges: list[int]) -> dict[tuple[int, str], ArrayFile]:
    """Return every file of a partition, by part and name; `edges` may be empty while they are not known."""
    files = []
    if request.method != "contiguous":
        files.append(ArrayFile(WHOLE, "owners", owner_dtype(request.num_parts).str, (request.num_nodes,)))
    for part, count in enumerate(nodes):
        files += [ArrayFile(part, "indptr", "<i8", (count + 1,)), ArrayFile(part, "start", "<i8", (count,))]
        if edges:
            files.append(ArrayFile(part, "indices", request.index_dtype, (edges[part],)))
        if edges and request.edge_ids:
            files.append(ArrayFile(part, "edge_ids", "<i8", (edges[part],)))
        for name, rows in (("features", request.features), ("labels", request.labels)):
            if rows is not None:
                files.append(ArrayFile(part, name, rows[0], (count, *rows[1])))
    return {(file.part, file.name): file for file in files}


def write_sealed(path: str, fields: dict[str, Any]) -> None:
    """Write JSON and its checksum to a file that appears whole or not at all."""
    with page_file.beside(path) as file:
        file.write(seal(fields))


def seal(fields: dict[str, Any]) -> bytes:
    """Return the bytes of sealed JSON."""
    text = json.dumps({"format": FORMAT, "version": VERSION, **fields})
    return f'{{"checksum": {zlib.crc32(text.encode())}, "content": {text}}}\n'.encode()


def read_sealed(path: str) -> dict[str, Any]:
    """Return what :func:`write_sealed` wrote.

    Raises
    ------
    PartFileError
        It is no such file, is damaged, or is of another version.
    OSError
        It cannot be opened.
    """
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        whole = json.loads(data if len(data) <= _MOST_BYTES else b"")
        content = whole["content"]
        known = content["format"] == FORMAT
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PartFileError(explain("path", "a file of a partition", f"{path!r}, which is none", REMEDY)) from error
    if not known:
        raise PartFileError(explain("path", "a file of a partition", f"{path!r}, which is none", REMEDY))
    if content.get("version") != VERSION:
        got = f"{path!r} of version {content.get('version')!r}"
        raise PartFileError(explain("path", f"version {VERSION} of the format", got, "partition the graph again"))
    if whole.get("checksum") != zlib.crc32(json.dumps(content).encode()):
        raise PartFileError(explain("path", "a whole file", f"{path!r}, which is damaged", REMEDY))
    del content["format"], content["version"]
    return dict(content)


def write_meta(folder: str, meta: Meta) -> None:
    """Write meta.json."""
    write_sealed(os.path.join(folder, META), {**meta._asdict(), "request": meta.request._asdict()})


def read_meta(folder: str) -> Meta:
    """Return what meta.json says, once it is known to be sound.

    Raises
    ------
    PartFileError
        There is none, or it is damaged, of another version, or says what cannot be.
    """
    path = os.path.join(folder, META)
    try:
        fields = read_sealed(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "check the path; an unfinished partition is finished by the command that began it"
        raise PartFileError(explain("folder", "a finished partition", f"{folder!r} without {META}", remedy)) from error
    try:
        meta = Meta(**{**fields, "request": request_of(fields["request"])})
        sound = _sound(meta)
    except (TypeError, KeyError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise PartFileError(explain("path", "sound contents", f"{path!r}, whose contents are not", REMEDY))
    return meta


def request_of(fields: dict[str, Any]) -> Request:
    """Return a request that was read from JSON, with its tuples."""
    tuples = {
        name: None if fields[name] is None else (fields[name][0], tuple(fields[name][1]))
        for name in ("features", "labels")
    }
    return Request(**{**fields, **tuples})


def _sound(meta: Meta) -> bool:
    """Return whether sizes fit each other, and no array is of more than can be."""
    request, parts = meta.request, meta.request.num_parts
    counts = (request.num_nodes, request.num_edges, parts, *meta.nodes, *meta.edges, *(meta.ptr or ()))
    return (
        all(type(count) is int and 0 <= count < page_file.LIMIT for count in counts)
        and 1 <= parts <= MAX_PARTS
        and request.num_nodes <= MAX_NODES
        and len(meta.nodes) == len(meta.edges) == parts
        and (sum(meta.nodes), sum(meta.edges)) == (request.num_nodes, request.num_edges)
        and request.index_dtype in INDEX_DTYPES
        and (meta.ptr is None) == (request.method != "contiguous")
        and (meta.ptr is None or meta.ptr == np.concatenate([[0], np.cumsum(meta.nodes)]).tolist())
        and all(_rows_sound(rows) for rows in (request.features, request.labels))
        and type(meta.fingerprint) is str
        and {file.path: -(-file.num_bytes // CHECKED_BYTES) for file in meta.files()}
        == {path: len(checksums) for path, checksums in meta.checksums.items()}
    )


def _rows_sound(rows: Rows) -> bool:
    if rows is None:
        return True
    dtype, shape = rows
    kind = np.dtype(dtype) if type(dtype) is str else None
    return (
        kind is not None
        and kind.kind in "biufc"
        and kind.str == dtype
        and len(shape) < _MOST_DIMENSIONS
        and all(type(length) is int and 0 <= length < page_file.LIMIT for length in shape)
    )
