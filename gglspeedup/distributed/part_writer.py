"""Writing the files of a partition, stage by stage, each a pass over one kind of data and all parts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.distributed.book import crc_of, owner_dtype
from gglspeedup.distributed.columns import Column, GraphColumns
from gglspeedup.distributed.dealing import Dealer, Dealt, OwnerDealer, RangeDealer
from gglspeedup.distributed.journal import Journal, remove_journal
from gglspeedup.distributed.meta import Meta, Request, array_files, write_meta
from gglspeedup.distributed.outputs import Outputs
from gglspeedup.distributed.part import fingerprint
from gglspeedup.distributed.part_file import WHOLE, ArrayFile
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.progress import Progress

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

_ROW_BYTES = 128  # of buffers, a row that is looked at
_MOST_ROWS = 1 << 22  # larger pieces are not faster
_MOST_EDGES = 1 << 24
_MOST_BYTES = 1 << 27  # of features
_CHECKPOINT = 1 << 30  # bytes written until the journal is


class PartWriter:
    """One run that writes a partition.

    Parameters
    ----------
    folder : str
        Where it goes.
    request : Request
        What is to be written.
    columns : GraphColumns
        The graph.
    sources : dict
        Features and labels, where there are some.
    ptr : int64 array [num_parts + 1] or None
        The bounds of parts that are ranges.
    journal : Journal
        How far an earlier run got; kept up to date.
    memory : int
        Bytes of buffers.
    """

    def __init__(
        self,
        folder: str,
        request: Request,
        columns: GraphColumns,
        sources: Mapping[str, Column | None],
        ptr: Ids | None,
        journal: Journal,
        memory: int,
    ) -> None:
        self._folder, self._request, self._columns, self._sources = folder, request, columns, sources
        self._ptr, self._journal, self._memory = ptr, journal, memory
        self._state = journal.state
        self._outputs = Outputs(folder, self._state.files)
        self._progress = Progress("partition", 0, shown=False)
        self._files: dict[tuple[int, str], ArrayFile] = {}  # those of the stage
        self._unsaved = 0
        self._rows = max(1, min(_MOST_ROWS, memory // 4 // _ROW_BYTES))

    def write_owners(self, pieces: Iterable[Array] | Ids) -> None:
        """Write the part of each node, given in pieces; of ranges, given by their bounds, only the sizes are kept."""
        if self._ptr is not None:
            nodes = np.diff(self._ptr)
        else:
            nodes = np.zeros(self._request.num_parts, np.int64)
            file = array_files(self._request, [], [])[WHOLE, "owners"]
            self._state.files.pop(file.path, None)  # of a run that was killed meanwhile
            self._outputs.create(file)
            for piece in pieces:
                owners = np.asarray(piece).astype(owner_dtype(self._request.num_parts), copy=False)
                nodes += np.bincount(owners, minlength=len(nodes))
                self._outputs.append(file, owners)
            self._outputs.sync()
        self._state.nodes, self._state.edges = nodes.tolist(), [0] * len(nodes)
        self._journal.enter("rows")

    def run(self, shown: bool) -> Meta:
        """Write all that is not written yet, and return what the partition is."""
        request = self._request
        total = sum(file.num_bytes for file in array_files(request, [request.num_nodes], [request.num_edges]).values())
        done = sum(position for position, *_ in self._state.files.values())
        with Progress("partition", total + 8 * (request.num_parts - 1), done, shown) as self._progress:
            for stage, write in (("rows", self._write_rows), ("edges", self._write_edges)):
                if self._state.stage == stage:
                    write()
            for name in ("features", "labels"):
                if self._state.stage == name:
                    self._write_source(name)
        return self._finish()

    def _dealer(self) -> Dealer:
        if self._ptr is not None:
            return RangeDealer(self._ptr, self._state.edges)
        file = array_files(self._request, [], [])[WHOLE, "owners"]
        column = Column(self._outputs.path(file), file.dtype, file.shape, page_file.PAGE)
        return OwnerDealer(column, self._request.num_parts, self._rows)

    def _write_rows(self) -> None:
        """Write indptr and start of every part."""
        state, dealer, nodes = self._state, self._dealer(), self._request.num_nodes
        files = array_files(self._request, state.nodes, [])
        for part in range(self._request.num_parts):
            if files[part, "indptr"].path not in state.files:
                self._outputs.create(files[part, "indptr"])
                self._outputs.create(files[part, "start"])
                self._note(self._outputs.append(files[part, "indptr"], np.zeros(1, np.int64)))
        for begin in range(state.at, nodes, self._rows):
            end = min(begin + self._rows, nodes)
            bounds = self._columns.bounds(begin, end + 1)
            _, (lengths, starts), slices = dealer.rows(begin, end, [np.diff(bounds), bounds[:-1]])
            for part, first, last in slices:
                ends = state.edges[part] + np.cumsum(lengths[first:last])
                self._note(self._outputs.append(files[part, "indptr"], ends))
                self._note(self._outputs.append(files[part, "start"], starts[first:last]))
                state.edges[part] = int(ends[-1])
            self._reach(end)
        self._enter("edges")

    def _write_edges(self) -> None:
        """Write indices and edge ids of every part."""
        names, columns = ["indices"], self._columns
        sources = [columns.indices]
        if columns.edge_ids is not None:
            names, sources = [*names, "edge_ids"], [*sources, columns.edge_ids]
        bytes_an_edge = 2 * sum(source.dtype.itemsize for source in sources) + 8
        step = max(1, min(_MOST_EDGES, self._memory // 2 // bytes_an_edge))
        self._create(names)
        for name, source in zip(names, sources, strict=True):
            self._recheck(name, columns.neighbours if name == "indices" else source.read, step)
        for end, piece in self._dealer().edges(columns, self._state.at, step):
            self._hand_out(names, piece)
            self._reach(end)
        self._enter("features")

    def _write_source(self, name: str) -> None:
        """Write features or labels of every part, if there are some."""
        source = self._sources[name]
        if source is not None:
            row_bytes = 2 * source.row_bytes + _ROW_BYTES
            step = max(1, min(_MOST_ROWS, min(_MOST_BYTES, self._memory // 2) // row_bytes))
            self._create([name])
            self._recheck(name, source.read, step)
            dealer = self._dealer()
            for begin in range(self._state.at, self._request.num_nodes, step):
                end = min(begin + step, self._request.num_nodes)
                self._hand_out([name], dealer.rows(begin, end, [source.read(begin, end)]))
                self._reach(end)
        self._enter("labels" if name == "features" else "finish")

    def _finish(self) -> Meta:
        """Write headers, give the files their names, and write meta.json, which makes it a partition."""
        state, request = self._state, self._request
        checksums = [request.indptr, *(state.checksums.get(name, 0) for name in ("indices", "edge_ids"))]
        mark = fingerprint(request.num_nodes, request.num_edges, checksums)
        files = array_files(request, state.nodes, state.edges)
        for file in files.values():
            self._outputs.finish(file, mark)
        for part in sorted({file.part for file in files.values()}):
            self._outputs.reveal(part)
        ptr = None if self._ptr is None else self._ptr.tolist()
        sums = {file.path: self._outputs.checksums(file) for file in files.values()}
        meta = Meta(request, mark, ptr, state.nodes, state.edges, sums)
        write_meta(self._folder, meta)
        remove_journal(self._folder)
        return meta

    def _create(self, names: list[str]) -> None:
        self._files = array_files(self._request, self._state.nodes, self._state.edges)
        for part in range(self._request.num_parts):
            for name in names:
                self._outputs.create(self._files[part, name])

    def _hand_out(self, names: list[str], piece: Dealt) -> None:
        for name, read, array in zip(names, piece.read, piece.dealt, strict=True):
            self._state.checksums[name] = crc_of(read, self._state.checksums.get(name, 0))
            for part, begin, end in piece.slices:
                self._note(self._outputs.append(self._files[part, name], array[begin:end]))

    def _recheck(self, name: str, read: Callable[[int, int], Array], step: int) -> None:
        """Raise ArgumentValueError if what an earlier run has read is no longer the same."""
        checksum = 0
        for begin in range(0, self._state.at, step):
            checksum = crc_of(read(begin, min(begin + step, self._state.at)), checksum)
        if checksum != self._state.checksums.get(name, 0):
            remedy = "delete the folder and begin anew"
            needs = f"the {name} that the partition there was begun with"
            raise ArgumentValueError(explain(name, needs, "others", remedy))

    def _note(self, count: int) -> None:
        self._unsaved += count
        self._progress.add(count)

    def _reach(self, at: int) -> None:
        """Note where a stage goes on; on the disk once in a while."""
        self._state.at = at
        if self._unsaved >= _CHECKPOINT:
            self._save()

    def _enter(self, stage: str) -> None:
        self._outputs.sync()
        self._journal.enter(stage)
        self._unsaved = 0

    def _save(self) -> None:
        self._outputs.sync()
        self._journal.save()
        self._unsaved = 0


