"""Measuring each batch's peak: from when it is handed to the training loop until the next one is."""

from __future__ import annotations

import collections
from statistics import median
from typing import NamedTuple

from gglspeedup.memory_budget import MemoryBudget
from gglspeedup.memory_meter import Meter
from gglspeedup.memory_model import BatchLoad

# Giving freed memory back to the system costs the faults that take it again. It is done while the model is new, then
# seldom, and whenever the limit might not hold otherwise.
_ALWAYS, _EVERY = 8, 64
_KEPT_SPILLS = 64


class _Handed(NamedTuple):
    load: BatchLoad
    predicted: float
    start: int
    tidy: bool


class MemoryWatch:
    """Attributes what is measured to the batch that the training loop has.

    Parameters
    ----------
    budget : MemoryBudget
        Takes the measurements.
    meter : Meter
        Makes them.
    """

    def __init__(self, budget: MemoryBudget, meter: Meter) -> None:
        self._budget = budget
        self._meter = meter
        self._open: _Handed | None = None
        self._handed_out = 0
        self._start = 0
        self._spill = 0.0
        # Of what a batch needs, the part that was not found in memory kept from earlier ones.
        self._spills = collections.deque([0.0], maxlen=_KEPT_SPILLS)

    def in_use(self) -> int:
        """Return the bytes in use now."""
        return self._meter.in_use()

    def kept(self, load: BatchLoad) -> float:
        """Return what the peak comes to by what an allocator keeps, in bytes: 0.0 where it will be given back."""
        variable = self._budget.variable(load)
        if not self._handed_out or self._start + variable > self._budget.limit:
            return 0.0
        return self._start + self._spill * variable

    def hand_out(self, load: BatchLoad, predicted: float) -> None:
        """Say that a batch is handed out now; the one before is over."""
        self.end()
        tidy = self._meter.tidies and self._tidy(load)
        self._start = start = self._meter.start(tidy)
        if tidy:
            self._budget.idle(load.held, start)
        self._open = _Handed(load, predicted, start, tidy)
        self._handed_out += 1

    def end(self) -> None:
        """Say that the training loop is done with the last batch."""
        if self._open is None:
            return
        (load, predicted, start, tidy), self._open = self._open, None
        peak = self._meter.peak()
        if not tidy:
            self._spills.append(min(1.0, (peak - start) / max(self._budget.variable(load), 1.0)))
            self._spill = median(self._spills)
        # What an allocator kept of earlier batches hides what this one took, or adds to it. Where that cannot be
        # helped, a peak that rose counts as its own.
        exact = tidy or (peak > start and not self._meter.tidies)
        self._budget.measured(load, predicted, peak, exact)

    def _tidy(self, load: BatchLoad) -> bool:
        if self._budget.learn and (self._handed_out < _ALWAYS or self._handed_out % _EVERY == 0):
            return True
        return self._meter.in_use() + self._budget.variable(load) > self._budget.limit
