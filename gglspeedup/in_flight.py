"""Work that is enqueued on a device and not yet waited for: the next item's is begun before one's is finished."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")


def _nothing() -> None:
    """Hold nothing."""


class InFlight(NamedTuple):
    """What was begun. One of its two functions is called, once.

    Attributes
    ----------
    finish : callable
        Waits for the device, and returns what was made.
    abandon : callable
        Waits for the device, and drops what was made.
    alone : bool
        Whether nothing may be begun before it is finished.
    """

    finish: Callable[[], Any]
    abandon: Callable[[], None] = _nothing
    alone: bool = False


def one_ahead(
    items: Iterable[Item], begin: Callable[[Item], InFlight], alone: Callable[[Item], Any]
) -> Generator[Any, None, None]:
    """Give what is made of each item, in order; each is begun before the one before it is finished.

    While the host waits for one, the device has the next one's work. An error comes in its item's place; what has no
    room in memory is made again when nothing else is in flight.

    Parameters
    ----------
    items : iterable
        Read one item ahead.
    begin : callable
        Enqueues the work of an item; a MemoryError says that it has no room.
    alone : callable
        Makes such an item.

    Examples
    --------
    >>> def begin(item):
    ...     print("begin", item)
    ...     return InFlight(lambda: item)
    >>> for made in one_ahead([1, 2], begin, alone=str):
    ...     print("made", made)
    begin 1
    begin 2
    made 1
    made 2
    """
    flying: collections.deque[InFlight] = collections.deque()
    try:
        for begun in _begun(items, begin, alone):
            flying.append(begun)
            while len(flying) > 1 or (flying and flying[0].alone):
                yield flying.popleft().finish()
        while flying:
            yield flying.popleft().finish()
    finally:
        while flying:
            flying.popleft().abandon()


def _begun(
    items: Iterable[Item], begin: Callable[[Item], InFlight], alone: Callable[[Item], Any]
) -> Iterator[InFlight]:
    source = iter(items)
    while True:
        try:
            item = next(source)
        except StopIteration:
            return
        except Exception as error:
            yield _failed(error)
            return
        try:
            begun = begin(item)
        except MemoryError:
            begun = InFlight(partial(alone, item), alone=True)
        except Exception as error:
            begun = _failed(error)
        yield begun
        del begun, item


def _failed(error: Exception) -> InFlight:
    def finish() -> Any:
        raise error

    return InFlight(finish, alone=True)
