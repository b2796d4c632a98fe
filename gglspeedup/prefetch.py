"""Running an iterator ahead of its reader, in a thread of its own."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from gglspeedup.errors import GGLSpeedupError

Item = TypeVar("Item")


class ForkedError(GGLSpeedupError, RuntimeError):
    """The process was forked while a background thread worked for it; the thread did not come along."""


class _Channel:
    """What the reader and its thread share; neither keeps the other alive through it."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.items: collections.deque[Any] = collections.deque()
        self.ended = False  # no item will follow
        self.closed = False  # no item is wanted any more
        self.error: BaseException | None = None
        self.reader: int | None = None  # the thread that took the last item


class _Worker(threading.Thread):
    """A thread that makes items."""


def _work(source: Iterator[Any], channel: _Channel) -> None:
    """Fill the channel until the source ends or the reader is gone."""
    error: BaseException | None = None
    try:
        while True:
            with channel.changed:
                # Room is waited for before the next item is made, so that never more than `depth` of them exist here.
                channel.changed.wait_for(lambda: channel.closed or len(channel.items) < channel.depth)
                if channel.closed:
                    return
            try:
                item = next(source)
            except StopIteration:
                return
            with channel.changed:
                channel.items.append(item)
                channel.changed.notify_all()
            del item
    except BaseException as raised:
        error = raised
    finally:
        if hasattr(source, "close"):
            source.close()
        with channel.changed:
            channel.ended, channel.error = True, error
            channel.changed.notify_all()


def _close(channel: _Channel, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child has no such thread to wait for, and a lock that was held at the fork stays held
    with channel.changed:
        channel.closed = True
        channel.items.clear()
        channel.changed.notify_all()
    # The garbage collector may call this from any thread: from the one to wait for, or, where iterators read from each
    # other, from one that this one waits for. A worker therefore waits for none but those that it has read from.
    current = threading.current_thread()
    if thread.ident is None:
        return  # Ctrl-C came before it was started
    if not isinstance(current, _Worker) or (thread is not current and channel.reader in (None, current.ident)):
        thread.join()


class Prefetched(Generic[Item]):
    """An iterator over another one's items, which a background thread makes up to `depth` ahead.

    The items and their order are those of `source`. An exception of the source is raised to the reader in its place,
    with its own traceback. The thread ends, and `source` is closed, when the source is exhausted or has failed, on
    :meth:`close`, when the reader lets go of this object (a ``break``, Ctrl-C, the end of a function), and at exit.

    Parameters
    ----------
    source : iterator
        From now on used by the thread alone.
    depth : int
        The most items that are made and not yet taken, at least 1.

    Examples
    --------
    >>> list(Prefetched(iter("abc"), 2))
    ['a', 'b', 'c']
    """

    def __init__(self, source: Iterator[Item], depth: int) -> None:
        self._channel = _Channel(depth)
        self._process = os.getpid()
        # A daemon, since a reader that is alive at exit would otherwise be waited for before `finalize` can end it.
        thread = _Worker(target=_work, args=(source, self._channel), name="gglspeedup-prefetch", daemon=True)
        self._finalizer = weakref.finalize(self, _close, self._channel, thread, self._process)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """Return the next item, waiting for it if need be.

        Raises
        ------
        ForkedError
            This process is a fork of the one that made the iterator.
        """
        if os.getpid() != self._process:
            raise ForkedError("the prefetching iterator belongs to another process; make it after forking, or spawn")
        channel = self._channel
        with channel.changed:
            channel.reader = threading.get_ident()
            channel.changed.wait_for(lambda: channel.items or channel.ended or channel.closed)
            if channel.items:
                item: Item = channel.items.popleft()
                channel.changed.notify_all()
                return item
            error, channel.error = channel.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback has this frame, and the two would keep each other alive
        raise StopIteration

    def close(self) -> None:
        """Drop what was made ahead and end the thread; may be called again."""
        self._finalizer()
