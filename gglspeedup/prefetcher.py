"""`Prefetcher`: any iterable of batches made ahead of its reader, each stage of the making on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gglspeedup.arguments import check_count
from gglspeedup.device import DeviceLike, parse_device
from gglspeedup.device_copies import DeviceCopies
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.prefetch import Prefetched
from gglspeedup.trace import Made, Read, span

Stage = Callable[[Any], Any]


class Prefetcher:
    """An iterable over the batches of another one, which background threads make ahead of the training loop.

    One thread iterates, and each stage has a thread that applies it, so that they overlap with each other and with the
    reader as far as they leave Python's interpreter lock. Batches and their order are those of the plain loop
    ``for batch in iterable: batch = g(f(batch))``, bit for bit.

    Parameters
    ----------
    iterable : iterable, or callable that returns one
        Every iteration starts it anew, in the background: a list, a loader (torch's, PyG's, GammaGL's, a NodeLoader
        with ``prefetch=0``), a generator function. An iterator, which could be read once only, is refused: pass the
        function that makes it.
    depth : int
        The most batches that the iterable, and each stage, has made and the next one has not taken; 0 makes each batch
        when it is asked for, without a thread.
    stages : sequence of callables
        Each takes what the one before it returned, such as a batch of the iterable, and returns what the next one
        takes: gathering, conversion, augmentation. A stage is called by one thread at a time.
    device : str or int
        A GPU to which a last stage copies the batches' tensors, on a stream of its own: those of any framework (NumPy's
        become CuPy's) in dicts, lists, tuples, dataclasses and PyG's data objects. ``"cpu"`` leaves batches as they
        are.
    names : sequence of str, optional
        What a profile calls the iteration and each of the stages; by default ``"iteration"`` and names of functions.

    Raises
    ------
    DeviceError
        The device is not there; with the first batch, that a framework of its tensors cannot use it.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.

    Notes
    -----
    With S stages at most ``(S + 1) * depth`` batches wait, besides the S that stages work on and the reader's. Threads
    start with the first batch and end with the last one, with an exception of the iterable or of a stage (raised to the
    reader in the batch's place, with its traceback), with Ctrl-C, and when the iterator is let go of, by ``break`` for
    one; ending waits for the batch that is being made. Several iterators may be open at once if the iterable allows it.
    In a fork of the process an iterator raises ForkedError.

    The same bits need an iterable and stages that share no state with the training loop: those that draw random
    numbers from a framework's global generator should be given one of their own. torch's DataLoader draws from it
    before its first batch, for which the loop waits, and so stays as it was.

    Examples
    --------
    >>> from gglspeedup import Prefetcher
    >>> ahead = Prefetcher([1, 2, 3], stages=[lambda batch: batch * 10, str])
    >>> list(ahead), list(ahead), len(ahead)
    (['10', '20', '30'], ['10', '20', '30'], 3)
    >>> def numbers():
    ...     yield from (5, 6)
    >>> list(Prefetcher(numbers, depth=1))
    [5, 6]
    """

    def __init__(
        self, iterable: Iterable[Any] | Callable[[], Iterable[Any]], depth: int = 2, stages: Sequence[Stage] = (), *,
        device: DeviceLike = "cpu", names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        if isinstance(iterable, Iterator):
            remedy = "pass the function that makes it, as in Prefetcher(batches) instead of Prefetcher(batches())"
            raise ArgumentTypeError(
                explain("iterable", "what can be iterated again", f"the iterator {iterable!r}", remedy)
            )
        if not _can_iterate(iterable) and not callable(iterable):
            remedy = "pass a loader, a list or a generator function"
            raise ArgumentTypeError(explain("iterable", "an iterable or a callable", repr(iterable), remedy))
        self.device = parse_device(device)
        self.depth = check_count(depth, "depth", 0)
        self.stages = _checked(stages)
        self.names = _names(self.stages) if names is None else _checked_names(names, len(self.stages))
        self.iterable = iterable

    def __len__(self) -> int:
        """Return the number of batches; raise TypeError where the iterable does not know it."""
        return len(self.iterable)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that an iterator that nobody reads from starts no thread.
        if self.device.index is None:
            yield from self._staged(self.stages, self.names)
            return
        copies = DeviceCopies(self.device.index)
        for copied in self._staged((*self.stages, copies.start), (*self.names, "copying")):
            batch = copies.finish(copied)  # in the reader's thread, to the streams that are current there
            del copied
            yield batch
            del batch

    def _staged(self, stages: Sequence[Stage], names: Sequence[str]) -> Iterator[Any]:
        """Give what the last of some stages makes of the batches."""
        batches: Any = self._ahead(_started(self.iterable, names[0]))
        for stage, name in zip(stages, names[1:], strict=True):
            batches = self._ahead(_applied(stage, batches, name))
        batches = Read(batches)
        try:
            yield from batches
        finally:
            batches.close()

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        return Prefetched(batches, self.depth) if self.depth else batches

    def __repr__(self) -> str:
        return f"Prefetcher({self.iterable!r}, depth={self.depth}, {len(self.stages)} stages)"


def _can_iterate(value: Any) -> bool:
    kind = type(value)  # where iter() looks; a class has these names for its objects, and is none
    return hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")


def _checked(stages: Any) -> tuple[Stage, ...]:
    remedy = "pass a list of functions from a batch to a batch"
    if not _can_iterate(stages):
        raise ArgumentTypeError(explain("stages", "a sequence of callables", repr(stages), remedy))
    checked = tuple(stages)
    for stage in checked:
        if not callable(stage):
            raise ArgumentTypeError(explain("stages", "callables", repr(stage), remedy))
    return checked


def _names(stages: Sequence[Stage]) -> tuple[str, ...]:
    """Return what a profile calls the iteration, and stages by their place and, if they have one, their name."""
    names = [getattr(stage, "__name__", type(stage).__name__) for stage in stages]
    return ("iteration", *(f"stage {place}: {name}" for place, name in enumerate(names, 1)))


def _checked_names(names: Any, stages: int) -> tuple[str, ...]:
    remedy = "leave names out"
    if isinstance(names, str) or not _can_iterate(names):
        raise ArgumentTypeError(explain("names", "a sequence of texts", repr(names), remedy))
    checked = tuple(names)
    if len(checked) != stages + 1 or not all(isinstance(name, str) for name in checked):
        needs = f"{stages + 1} texts, for the iteration and each stage"
        raise ArgumentValueError(explain("names", needs, repr(checked), remedy))
    return checked


def _started(iterable: Any, name: str) -> Iterator[Any]:
    """Give the batches; even starting the iterable, which may take long, is left to the thread that reads from here."""
    yield from Made(name, iter(iterable if _can_iterate(iterable) else iterable()))


def _applied(stage: Stage, batches: Any, name: str) -> Iterator[Any]:
    """Give what a stage makes of batches."""
    index = 0
    try:
        for batch in batches:
            with span(name, index):
                made = stage(batch)
            del batch
            yield made
            del made  # a thread that waits for room holds no batch
            index += 1
    finally:
        batches.close()
