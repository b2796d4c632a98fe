"""The tables of a layer-wise inference: what the last layer gave, and what the current one gives, node by node.

In memory, or in a folder::

    journal        one page (`page_file`): what the run is, which layer it is at, how many rows of it are whole
    layer-00001    one page, then the rows of layer 1; as many files as there are layers, of which two exist at a time

The journal is written after the rows that it counts, so that a run that is killed goes on from rows that are there.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
import zlib
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.interchange import is_numeric

Array = npt.NDArray[Any]

JOURNAL = "journal"
_MAGIC_JOURNAL, _MAGIC_TABLE = b"GGLLAYJ\x01", b"GGLLAYT\x01"
_SAVE_SECONDS = 10  # between two entries in the journal
_PIECE = 1 << 26  # bytes that a checksum is taken of in one go
_REMEDY = "delete the folder and begin anew"
_ROOM = "free some space and run the same again: it goes on where it was"


class InferenceFileError(ArgumentValueError):
    """A file of a layer-wise inference is not what its reader expects, was cut short or changed, or has no room."""


class Request(NamedTuple):
    """What a run computes, as far as that can be known.

    Attributes
    ----------
    csr, x : str
        Fingerprints.
    nodes, layers : int
        How many there are.
    dtype : str or None
        What rows are kept as, if that was asked for.
    tag : str
        The user's word for what cannot be known: the weights of the layers.
    """

    csr: str
    x: str
    nodes: int
    layers: int
    dtype: str | None
    tag: str


class Kind(NamedTuple):
    """What the rows of a table are, and the CRC-32 of those that are whole."""

    dtype: str
    shape: tuple[int, ...]
    checksum: int


class Tables(Protocol):
    """The rows of two layers.

    Attributes
    ----------
    layer : int
        The layer that is being computed, from 0; the number of layers if all are.
    at : int
        How many of its rows are there.
    last : array [num_nodes] or [num_nodes, F], or None
        The rows of the layer before; None of the first.
    """

    @property
    def layer(self) -> int: ...
    @property
    def at(self) -> int: ...
    @property
    def last(self) -> Array | None: ...

    def append(self, rows: Array) -> None:
        """Take the next rows of the layer, which are all of the same kind."""

    def next_layer(self) -> None:
        """Go on with the next layer: all rows of this one are there."""

    def save(self) -> None:
        """See to it that a run that is killed from now on goes on from here, if this kind can do that."""


def check_kind(rows: Array, known: Array | None, argument: str) -> None:
    """Raise ArgumentValueError unless rows are of the kind of those before them."""
    if known is not None and (rows.dtype, rows.shape[1:]) != (known.dtype, known.shape[1:]):
        needs = f"every batch's rows to be {known.dtype} {list(known.shape[1:])}, as the first's"
        got = f"{rows.dtype} {list(rows.shape[1:])}"
        raise ArgumentValueError(explain(argument, needs, got, "make the layer return rows of one kind"))


class MemoryTables:
    """Tables in memory.

    Parameters
    ----------
    num_nodes : int
        Rows of each.
    """

    def __init__(self, num_nodes: int) -> None:
        self.layer = self.at = 0
        self.last: Array | None = None
        self._num_nodes = num_nodes
        self._current: Array | None = None

    def append(self, rows: Array) -> None:
        """Take the next rows of the layer."""
        check_kind(rows, self._current, f"layers[{self.layer}]")
        if self._current is None:
            self._current = np.empty((self._num_nodes, *rows.shape[1:]), rows.dtype)
        self._current[self.at : self.at + len(rows)] = rows
        self.at += len(rows)

    def next_layer(self) -> None:
        """Go on with the next layer."""
        self.last, self._current = self._current, None
        self.layer, self.at = self.layer + 1, 0

    def save(self) -> None:
        """Do nothing: memory ends with the process."""


class _State(NamedTuple):
    """Which rows are there: whole ones of the layer before the current one, `at` of the current one, their CRC-32."""

    layer: int = 0
    at: int = 0
    last: Any = None
    current: Any = None
    last_checksum: int = 0
    checksum: int = 0


class FolderTables:
    """Tables in files of a folder, which the run that is begun there, if there is one, goes on with.

    Parameters
    ----------
    folder : str
        Exists, and is locked by this process.
    request : Request
        What is computed.

    Raises
    ------
    ArgumentValueError
        The folder holds something else, or a run of another request.
    InferenceFileError
        What is there is damaged.
    """

    def __init__(self, folder: str, request: Request) -> None:
        self._folder, self._request = folder, request
        self._state = _State()  # replaced as a whole: Ctrl-C at any point leaves one that is true
        self._saved = time.monotonic()
        for leftover in glob.glob(os.path.join(glob.escape(folder), "*.part")):  # of a run that was killed
            os.unlink(leftover)
        if os.path.exists(os.path.join(folder, JOURNAL)):
            self._state = self._found()
            self._delete_others()
        elif os.listdir(folder):
            got, remedy = f"{folder!r}, with other files", "give the inference a folder of its own"
            raise ArgumentValueError(explain("path", "a new or empty folder", got, remedy))
        else:
            self.save()

    @property
    def layer(self) -> int:
        """The layer that is being computed."""
        return self._state.layer

    @property
    def at(self) -> int:
        """How many of its rows are there."""
        return self._state.at

    @property
    def last(self) -> Array | None:
        """The rows of the layer before, memory-mapped read-only."""
        return self._state.last

    def append(self, rows: Array) -> None:
        """Take the next rows of the layer; every few seconds the journal notes how far they go."""
        state = self._state
        check_kind(rows, state.current, f"layers[{state.layer}]")
        current = state.current
        if current is None:
            current = self._create(rows.dtype, (self._request.nodes, *rows.shape[1:]))
        current[state.at : state.at + len(rows)] = rows
        checksum = _crc(rows, state.checksum)
        self._state = state._replace(at=state.at + len(rows), current=current, checksum=checksum)
        if time.monotonic() >= self._saved + _SAVE_SECONDS:
            self.save()

    def next_layer(self) -> None:
        """Go on with the next layer; the rows of the one before the last are deleted."""
        layer, _, _, current, _, checksum = self._state
        current.flush()
        # Read-only: nobody is to change rows that a checksum was taken of.
        last = _map(self._path(layer), current.dtype, current.shape, "r")
        self._state = _State(layer + 1, last=last, last_checksum=checksum)
        self._write_journal()
        self._delete_others()

    def save(self) -> None:
        """Write the rows to the disk, and then how far they go."""
        if self._state.current is not None:
            self._state.current.flush()
        self._write_journal()

    def _path(self, layer: int) -> str:
        return os.path.join(self._folder, f"layer-{layer + 1:05d}")

    def _write_journal(self) -> None:
        layer, at, last, current, last_checksum, checksum = self._state
        kinds = [
            None if table is None else Kind(table.dtype.name, table.shape[1:], crc)
            for table, crc in ((last, last_checksum), (current, checksum))
        ]
        page = page_file.pack(_MAGIC_JOURNAL, [self._request, layer, at, *kinds])
        if page is None:
            raise ArgumentValueError(explain("tag", "a short text", f"{len(self._request.tag)} characters", "cut it"))
        path = os.path.join(self._folder, JOURNAL)
        with page_file.telling_room("path", InferenceFileError, _ROOM), page_file.beside(path) as file:
            file.write(page)
        self._saved = time.monotonic()

    def _create(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        path, header = self._path(self.layer), self._header(self.layer, dtype, shape)
        with page_file.telling_room("path", InferenceFileError, _ROOM), page_file.beside(path) as file:
            file.write(header)
            page_file.reserve(file, _file_size(dtype, shape))
        return _map(path, dtype, shape, "r+")

    def _header(self, layer: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
        known = zlib.crc32(repr(self._request).encode())
        page = page_file.pack(_MAGIC_TABLE, [known, layer, dtype.name, list(shape)])
        assert page is not None  # four short fields
        return page

    def _found(self) -> _State:
        """Return what an earlier run left, once it is known to be sound."""
        path = os.path.join(self._folder, JOURNAL)
        with open(path, "rb") as file:
            page = file.read(page_file.PAGE)
        fields = page_file.unpack(page, _MAGIC_JOURNAL, path, InferenceFileError, "a journal of an inference", _REMEDY)
        try:
            found, layer, at, *kinds = fields
            request = Request(*found)
            last, current = (None if kind is None else Kind(kind[0], tuple(kind[1]), kind[2]) for kind in kinds)
            counts = [request.nodes, request.layers, layer, at]
            sound = all(type(count) is int and 0 <= count < page_file.LIMIT for count in counts)
            sound = sound and layer <= request.layers and at <= request.nodes
            sound = sound and (last is None) == (layer == 0) and (current is not None or at == 0)
        except (TypeError, ValueError, IndexError, KeyError):
            sound = False
        if not sound:
            raise InferenceFileError(explain("path", "a sound journal", f"{path!r}, whose contents are not", _REMEDY))
        self._check_same(request)
        state = _State(layer, at)
        if last is not None:
            rows = self._open(layer - 1, last, request.nodes, "r")
            state = state._replace(last=rows, last_checksum=last.checksum)
        if current is not None:
            state = state._replace(current=self._open(layer, current, at, "r+"), checksum=current.checksum)
        return state

    def _check_same(self, found: Request) -> None:
        for name, asked, there in zip(Request._fields, self._request, found, strict=True):
            if asked != there:
                needs = f"what the run in {self._folder!r} was begun with, {there!r}"
                raise ArgumentValueError(explain(name, needs, repr(asked), "use another folder, or delete that one"))

    def _open(self, layer: int, kind: Kind, whole: int, mode: str) -> Any:
        """Return a table of an earlier run, once its header, its size and its whole rows are known to be right."""
        path = self._path(layer)
        dtype = _dtype(kind.dtype)
        sound = dtype is not None and len(kind.shape) <= 1 and type(kind.checksum) is int
        if dtype is None or not sound or not all(type(n) is int and 0 <= n < page_file.LIMIT for n in kind.shape):
            needs, got = "rows of a known kind", f"{kind.dtype!r} {list(kind.shape)} of layer {layer}"
            raise InferenceFileError(explain("path", needs, got, _REMEDY))
        shape = (self._request.nodes, *kind.shape)
        try:
            with open(path, "rb") as file:
                page = file.read(page_file.PAGE)
                actual = os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise InferenceFileError(explain("path", f"the file {path!r}", "none there", _REMEDY)) from error
        if page != self._header(layer, dtype, shape):
            needs = f"the rows of layer {layer}, {dtype} {list(shape)}"
            raise InferenceFileError(explain("path", needs, f"{path!r}, which says otherwise", _REMEDY))
        if actual != _file_size(dtype, shape):
            needs = f"a file of {_file_size(dtype, shape)} bytes"
            raise InferenceFileError(explain("path", needs, f"{path!r} of {actual}", _REMEDY))
        table = _map(path, dtype, shape, mode)
        if checksum_of(table[:whole]) != kind.checksum:
            raise InferenceFileError(explain("path", "the rows that were written", f"{path!r}, changed", _REMEDY))
        return table

    def _delete_others(self) -> None:
        """Delete the files of layers that are used no more."""
        kept = {self._path(self.layer - 1), self._path(self.layer)}
        for path in glob.glob(os.path.join(glob.escape(self._folder), "layer-*")):
            if path not in kept and re.fullmatch(r"layer-\d{5,}", os.path.basename(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def checksum_of(rows: Any) -> int:
    """Return the CRC-32 of the bytes of rows, of which a piece is in memory at a time.

    Examples
    --------
    >>> checksum_of(np.frombuffer(b"123456789", np.uint8)) == 0xCBF43926  # CRC-32's check value
    True
    """
    checksum, step = 0, max(1, _PIECE // max(1, rows[:1].nbytes))
    for begin in range(0, len(rows), step):
        checksum = _crc(rows[begin : begin + step], checksum)
    return checksum


def _crc(rows: Array, checksum: int) -> int:
    return zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data, checksum) if rows.size else checksum


def _file_size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return page_file.PAGE + int(np.prod(shape)) * dtype.itemsize


def _map(path: str, dtype: np.dtype[Any], shape: tuple[int, ...], mode: Any) -> Any:
    if 0 in shape:
        return np.memmap(path, np.uint8, mode, shape=page_file.PAGE)[:0].view(dtype).reshape(shape)
    return np.memmap(path, dtype, mode, page_file.PAGE, shape)


def _dtype(name: Any) -> np.dtype[Any] | None:
    """Return the dtype of a name that a file gives, None if there is no numeric one."""
    if not isinstance(name, str):
        return None
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  (names its types to NumPy)
    try:
        dtype = np.dtype(name)
    except TypeError:
        return None
    return dtype if is_numeric(dtype) and dtype.name == name else None
