"""What a profile found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gglspeedup.span_times import Stage


@dataclass(frozen=True)
class Served:
    """What a matrix of features has served: rows and bytes by tier, fastest tier first."""

    name: str
    rows: dict[str, int]
    bytes: dict[str, int]
    hit_rate: float


@dataclass(frozen=True)
class Peak:
    """Bytes in use when the profile began, and the most until it ended."""

    before: int
    peak: int


@dataclass(frozen=True)
class Summary:
    """What a profile found.

    Attributes
    ----------
    seconds : float
        How long was recorded.
    batches : int
        How many were trained on.
    overlap : float
        Busy seconds of all stages over seconds recorded: 1 for a loop that does one thing at a time, more the more
        is done meanwhile, at most the number of threads.
    stages : dict of Stage
        By name, see there; ``"training"`` is the time between two requests of a loop, ``"waiting"`` that until one is
        answered.
    features : list of Served
        Of the features that were used.
    memory : dict of Peak
        ``"process"``, and ``"cuda:0 (torch)"`` and the like; what the system does not tell is missing.
    spans : int
        How many were recorded.
    full : bool
        Whether the recording ended early, as there were more spans than `limit`.
    """

    seconds: float
    batches: int
    overlap: float
    stages: dict[str, Stage]
    features: list[Served]
    memory: dict[str, Peak]
    spans: int
    full: bool

    def as_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists, strings and numbers."""
        return {**asdict(self), "stages": {name: stage._asdict() for name, stage in self.stages.items()}}
