"""The journal of an unfinished partition: how far it is, so that the next run goes on from there."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gglspeedup.distributed.meta import META, Request, read_sealed, request_of, write_sealed
from gglspeedup.distributed.outputs import Progressed
from gglspeedup.errors import ArgumentValueError, PartFileError, explain

JOURNAL = "journal.json"
STAGES = ("owners", "rows", "edges", "features", "labels", "finish")


@dataclass
class State:
    """How far a run is.

    Attributes
    ----------
    stage : str
        One of `STAGES`: what is being written.
    at : int
        The node or edge that the stage goes on with.
    nodes, edges : list of int
        Of each part; edges are those of the rows written so far.
    checksums : dict
        CRC-32 of what was read of the graph's indices and edge ids, the features and the labels, up to `at`.
    files : dict
        See `Outputs`.
    """

    stage: str = STAGES[0]
    at: int = 0
    nodes: list[int] = field(default_factory=list)
    edges: list[int] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)
    files: Progressed = field(default_factory=dict)


class Journal:
    """The state of the run in a folder, made by :meth:`open`."""

    def __init__(self, path: str, request: Request, state: State) -> None:
        self._path, self._request, self.state = path, request, state

    @classmethod
    def open(cls, folder: str, request: Request) -> Journal:
        """Return the journal in a folder, a new one if the folder is empty.

        Raises
        ------
        ArgumentValueError
            The folder holds something else, or a run of another request.
        PartFileError
            Its journal is damaged.
        """
        path = os.path.join(folder, JOURNAL)
        for name in (JOURNAL, META):  # temporary files of a run that was killed
            for leftover in glob.glob(os.path.join(glob.escape(folder), f"{name}.*.part")):
                os.unlink(leftover)
        if os.path.exists(path):
            fields = read_sealed(path)
            try:
                found, state = request_of(fields["request"]), State(**fields["state"])
            except (KeyError, TypeError) as error:
                remedy = "delete the folder and begin anew"
                raise PartFileError(explain("folder", "a sound journal", f"{path!r}, which is none", remedy)) from error
            check_same(request, found, "begun")
            return cls(path, request, state)
        if os.listdir(folder):
            remedy = "give the partition a folder of its own"
            raise ArgumentValueError(explain("folder", "a new or empty folder", f"{folder!r}, with files", remedy))
        journal = cls(path, request, State())
        journal.save()
        return journal

    def save(self) -> None:
        """Write the state, in the place of the last one."""
        write_sealed(self._path, {"request": self._request._asdict(), "state": asdict(self.state)})

    def enter(self, stage: str) -> None:
        """Note that a stage begins."""
        self.state.stage, self.state.at = stage, 0
        self.save()

    def reached(self, stage: str) -> bool:
        """Return whether a stage has begun, or is over."""
        return STAGES.index(self.state.stage) >= STAGES.index(stage)


def remove_journal(folder: str) -> None:
    """Delete the journal of a partition that is finished, if it is still there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, JOURNAL))


def check_same(request: Request, found: Request, what: str) -> None:
    """Raise ArgumentValueError if a folder holds the partition of another request."""
    names = {"indptr": "graph", "owners": "owners"}
    for name, asked, there in zip(Request._fields, request, found, strict=True):
        if asked != there:
            needs, got = f"what the partition there was {what} with, {there}", f"{asked}"
            raise ArgumentValueError(explain(names.get(name, name), needs, got, "use another folder"))


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder; the lock ends with the process, whatever ends that."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle: Any = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "wait for the other run, or use another folder"
            raise ArgumentValueError(explain("folder", "no other run", f"{folder!r}, in use", remedy)) from error
        yield
    finally:
        os.close(handle)


def finished(folder: str) -> bool:
    """Return whether a folder holds a finished partition."""
    return os.path.exists(os.path.join(folder, META))
