"""How far a long piece of work is: tqdm's bar of bytes if it is installed, else lines in the log."""

from __future__ import annotations

import logging
import time
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType

logger = logging.getLogger("gglspeedup")

_QUIET = 3  # seconds before a bar appears
_LINE = 10  # seconds between two lines of the log


class Progress:
    """A context in which work of a number of bytes is done.

    Parameters
    ----------
    text : str
        What is done.
    total, done : int
        Bytes in all, and of them those done before.
    shown : bool
        Whether to show anything.
    """

    def __init__(self, text: str, total: int, done: int = 0, shown: bool = True) -> None:
        self._text, self._total, self._done, self._shown = text, total, done, shown
        self._bar = None
        if shown and find_spec("tqdm") is not None:
            self._bar = import_module("tqdm").tqdm(
                desc=text, total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, delay=_QUIET
            )
        self._next_line = time.monotonic() + _LINE

    def add(self, count: int) -> None:
        """Note that so many bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() >= self._next_line:
            logger.info("%s: %d of %d MiB", self._text, self._done >> 20, self._total >> 20)
            self._next_line = time.monotonic() + _LINE

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
