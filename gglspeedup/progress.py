"""How far a long piece of work is: tqdm's bar if it is installed, else lines in the log."""

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
    """A context in which an amount of work is done.

    Parameters
    ----------
    text : str
        What is done.
    total, done : int
        The amount in all, and of it that done before.
    shown : bool
        Whether to show anything.
    unit : str
        What is counted; bytes (``"B"``) are shown in KiB, MiB and so on.

    Examples
    --------
    >>> with Progress("counting", 2, shown=False, unit="sheep") as progress:
    ...     progress.add(2)
    """

    def __init__(self, text: str, total: int, done: int = 0, shown: bool = True, unit: str = "B") -> None:
        self._text, self._total, self._done, self._shown, self._unit = text, total, done, shown, unit
        self._bar = None
        if shown and find_spec("tqdm") is not None:
            self._bar = import_module("tqdm").tqdm(
                desc=text, total=total, initial=done, unit=unit, unit_scale=True,
                unit_divisor=1024 if unit == "B" else 1000, delay=_QUIET,
            )  # fmt: skip
        self._next_line = time.monotonic() + _LINE

    def add(self, count: int) -> None:
        """Note that so much more is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() >= self._next_line:
            shift, unit = (20, "MiB") if self._unit == "B" else (0, self._unit)
            logger.info("%s: %d of %d %s", self._text, self._done >> shift, self._total >> shift, unit)
            self._next_line = time.monotonic() + _LINE

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
