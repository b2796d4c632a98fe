"""Spans of time, by stage and thread, recorded while a profile asks for them; a test of one global otherwise.

Code that is worth a line in a profile says so once::

    with span("gathering", index):
        rows = gather(ids)

The lowest layer: everything may have spans.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from time import perf_counter_ns
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")

# Stages that mean something to a profile; others are whatever a span is called.
WAITING, TRAINING, CONVERSION = "waiting", "training", "conversion"
_OURS = "gglspeedup"  # how the names of our own threads begin


class Span(NamedTuple):
    """A stage at work.

    Attributes
    ----------
    stage : str
        Its name.
    thread : int
        The number of its thread in `Recorder.threads`.
    begin, end : int
        Nanoseconds of ``time.perf_counter_ns``.
    batch : int or None
        The batch that it works on, counted from the first of its loop.
    num_bytes : int
        What it moves, if it says.
    """

    stage: str
    thread: int
    begin: int
    end: int
    batch: int | None
    num_bytes: int


class Source(Protocol):
    """What counts the rows and bytes that it serves, by tier: features."""

    def stats(self) -> dict[str, dict[str, int]]:
        """Return them, fastest tier first."""


class Recorder:
    """What one profile records; any thread may add to it.

    Parameters
    ----------
    limit : int
        The most spans that are kept: with the last of them the recording ends.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.begin = perf_counter_ns()
        self.end: int | None = None
        self.full = False
        self.threads: list[str] = []
        self.sources: list[tuple[Source, dict[str, dict[str, int]]]] = []  # with what they had served before
        self._seen: set[int] = set()
        self._spans: list[tuple[str, int, int, int, int | None, int]] = []
        self._mine = threading.local()
        self._lock = threading.Lock()

    def take(self) -> list[Span]:
        """Return what was recorded, in the order in which it ended, and keep it no longer."""
        spans, self._spans = self._spans, []
        return [Span(*fields) for fields in spans[: self.limit]]

    def add(self, stage: str, begin: int, batch: int | None, num_bytes: int) -> None:
        """Record a span of the calling thread that ends now."""
        end = perf_counter_ns()
        if self.end is not None:
            return
        number = getattr(self._mine, "number", None)
        if number is None:
            number = self._number()
        self._spans.append((stage, number, begin, end, batch, num_bytes))
        if len(self._spans) >= self.limit:
            self.end, self.full = end, True

    def _number(self) -> int:
        with self._lock:
            self._mine.number = number = len(self.threads)
            self.threads.append(threading.current_thread().name)
        return number

    def adopt(self, names: list[str], spans: Iterable[Span]) -> None:
        """Record spans of another process of this machine, whose clock is this one's.

        Parameters
        ----------
        names : list of str
            What its threads are called here.
        spans : iterable of Span
            With threads by their place in `names`.
        """
        with self._lock:
            for name in names:
                if name not in self.threads:
                    self.threads.append(name)
        for span in spans:
            if self.end is None and span.end >= self.begin:
                self._spans.append((*span[:1], self.threads.index(names[span.thread]), *span[2:]))
                if len(self._spans) >= self.limit:
                    self.end, self.full = span.end, True

    def watch(self, source: Source) -> None:
        """Note what a source has served before it is used for the first time."""
        if id(source) in self._seen:
            return
        with self._lock:
            if id(source) not in self._seen:
                self.sources.append((source, source.stats()))
                self._seen.add(id(source))  # last: whoever sees it there may go on

    def stop(self) -> None:
        """End the recording."""
        if self.end is None:
            self.end = perf_counter_ns()


_recorder: Recorder | None = None
_switch = threading.Lock()


def start(recorder: Recorder) -> bool:
    """Let a recorder record from now on; return whether there was no other one."""
    global _recorder
    with _switch:
        if _recorder is not None:
            return False
        _recorder = recorder
        return True


def current() -> Recorder | None:
    """Return the recorder that records now."""
    return _recorder


def forget() -> None:
    """Record nothing in a forked process, whatever its parent records."""
    global _recorder, _switch
    _recorder, _switch = None, threading.Lock()


def stop(recorder: Recorder) -> None:
    """End the recording of a recorder."""
    global _recorder
    with _switch:
        if _recorder is recorder:
            _recorder = None
    recorder.stop()


class _Open:
    """A span that has not ended."""

    __slots__ = ("_batch", "_begin", "_num_bytes", "_recorder", "_stage")

    def __init__(self, recorder: Recorder, stage: str, batch: int | None) -> None:
        self._recorder, self._stage, self._batch = recorder, stage, batch
        self._begin = self._num_bytes = 0

    def __enter__(self) -> _Open:
        self._begin = perf_counter_ns()
        return self

    def moved(self, num_bytes: int) -> None:
        """Say what the stage has moved."""
        self._num_bytes += num_bytes

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not StopIteration:  # the end of an iterator is no batch of it
            self._recorder.add(self._stage, self._begin, self._batch, self._num_bytes)


class _Nothing:
    """The span of a time in which nobody records."""

    __slots__ = ()

    def __enter__(self) -> _Nothing:
        return self

    def moved(self, num_bytes: int) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass


_NOTHING = _Nothing()


def span(stage: str, batch: int | None = None) -> _Open | _Nothing:
    """Return a context whose time counts as that of a stage, if a profile is being made.

    Parameters
    ----------
    stage : str
        What a profile calls it.
    batch : int, optional
        Which batch it works on.

    Examples
    --------
    >>> with span("copy") as copy:
    ...     copy.moved(1024)  # bytes, if they are worth a column
    """
    recorder = _recorder
    return _NOTHING if recorder is None else _Open(recorder, stage, batch)


def _reader_span(stage: str, batch: int) -> _Open | _Nothing:
    """Return a span, but of nothing in our own background threads, which train nothing and may wait."""
    if _recorder is None or threading.current_thread().name.startswith(_OURS):
        return _NOTHING
    return span(stage, batch)


def watch(source: Source) -> None:
    """Say that a source is about to be used, so that a profile has what it serves."""
    recorder = _recorder
    if recorder is not None:
        recorder.watch(source)


class Made(Generic[Item]):
    """An iterator over another one's items, the making of each of which is a span.

    Examples
    --------
    >>> list(Made("iteration", iter([1, 2])))
    [1, 2]
    """

    def __init__(self, stage: str, items: Iterator[Item]) -> None:
        self._stage, self._items, self._next = stage, items, 0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with span(self._stage, self._next):
            item = next(self._items)
        self._next += 1
        return item

    def close(self) -> None:
        """Close the other iterator, if it is of a kind that can be."""
        if hasattr(self._items, "close"):
            self._items.close()


class Read(Generic[Item]):
    """An iterator over another one's items: the reader's waiting for each is a span, and what it does with it.

    It keeps no item, so that one is freed when its reader lets go of it.

    Examples
    --------
    >>> list(Read(iter([1, 2])))
    [1, 2]
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._next = items, 0
        self._training: _Open | _Nothing = _NOTHING

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        self._end()
        with _reader_span(WAITING, self._next):
            item = next(self._items)
        self._training = _reader_span(TRAINING, self._next)
        self._training.__enter__()
        self._next += 1
        return item

    def _end(self) -> None:
        training, self._training = self._training, _NOTHING
        training.__exit__(None, None, None)

    def close(self) -> None:
        """End the training, and close the other iterator, if it is of a kind that can be."""
        self._end()
        if hasattr(self._items, "close"):
            self._items.close()
