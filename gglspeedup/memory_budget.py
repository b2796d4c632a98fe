"""`MemoryBudget`: a limit on memory, what is done with a batch that would exceed it, and an account of both."""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gglspeedup.arguments import check_flag
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, GGLSpeedupError, explain
from gglspeedup.memory import parse_size
from gglspeedup.memory_model import BatchLoad, MemoryModel, Outlook, model_of

POLICIES = ("split", "resample", "random", "degree", "pagerank")
CUTS = POLICIES[2:]

# Until a batch was trained on, one is taken to need so many times its own arrays; then one for which that is too much
# may be at most so many times larger than all before.
_FIRST_TIMES, _GROWTH = 256, 2.0
_ENOUGH = 8  # measurements before a batch is believed to be too large without a try
_KEPT_RECORDS = 4096


class MemoryLimitError(GGLSpeedupError, MemoryError):
    """The limit leaves no room for even the smallest batch."""


class Verdict(NamedTuple):
    """What is to be expected of a batch, in bytes.

    Attributes
    ----------
    expected, upper : float
        The predicted peak, without and with its margin.
    fixed : float
        What of the expected peak is not the batch's.
    fits : bool
        Whether it may be trained on as it is.
    over : bool
        Whether the limit would be exceeded; False where too little was seen yet to say so.
    scale : float
        How many times the batch would fit: the size to try instead.
    """

    expected: float
    upper: float
    fixed: float
    fits: bool
    over: bool
    scale: float


@dataclass
class Counters:
    """What was done; see :meth:`MemoryBudget.stats`."""

    batches: int = 0
    parts: int = 0
    split: int = 0
    resampled: int = 0
    cut: int = 0
    edges_cut: int = 0
    single_seeds_cut: int = 0
    measured: int = 0
    over: int = 0


class MemoryBudget:
    """A limit on the memory that training takes, for ``NodeLoader(..., memory_limit=...)``.

    On the CPU the limit is on the resident set of the process, all in all; on a GPU on what the framework's allocator
    and CuPy's pool have handed out. A batch's peak is predicted before its features are gathered, by a regression on
    what was measured while earlier batches were trained on, and a batch that would exceed the limit is changed.

    Parameters
    ----------
    limit : int, float or str
        Bytes, or ``"6.5G"``, ``"512MB"``.
    policy : str
        What is done with a batch over the limit. ``"split"``: its seeds come in several parts, with the same
        neighbourhoods, whose gradients add up to those of the batch. ``"resample"``: its neighbours are drawn again,
        twice with the same fanouts, then with half of them, a quarter, and so on. ``"random"``, ``"degree"``,
        ``"pagerank"``: every target loses the same share of its edges, at random, or those from the nodes of the
        lowest degree or PageRank. What neither makes small enough is split; a single seed that is too large has edges
        cut, by degree unless the policy is another cut, with a warning.
    model : MemoryModel, str or path, optional
        A fitted model, or the file of one; by default one is fitted from nothing, beginning with small parts.
    learn : bool
        Whether the model is fitted further. If not, what is done with a batch depends on it and the model alone.
    widths : sequence of int, optional
        Numbers that each layer of the user's model has a node: of its input, of its hidden layers, of its output. They
        make a fitted model fit other widths, too.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.
    MemoryModelFileError
        The file is no model.

    Examples
    --------
    >>> budget = MemoryBudget("6.5G")
    >>> budget.limit, budget.policy, budget.stats()["batches"]
    (6979321856, 'split', 0)
    """

    def __init__(
        self, limit: int | float | str, *, policy: str = "split",
        model: MemoryModel | str | os.PathLike[str] | None = None, learn: bool = True, widths: Any = None,
    ) -> None:  # fmt: skip
        self.limit = parse_size(limit, "limit")
        if self.limit == 0:
            raise ArgumentValueError(explain("limit", "more than no bytes", repr(limit), 'pass a size such as "6.5G"'))
        if policy not in POLICIES:
            raise ArgumentValueError(explain("policy", f"one of {POLICIES}", repr(policy), 'leave it "split"'))
        self.policy = policy
        self.learn = check_flag(learn, "learn")
        self.model = model_of(model)
        if self.model is None and not learn:
            raise ArgumentValueError(explain("learn", "a model where it is False", "none", "pass model=, or learn"))
        self.widths = None if widths is None else _checked_widths(widths)
        self.counters = Counters()
        self._chance = 0
        self._records: collections.deque[tuple[float, int]] = collections.deque(maxlen=_KEPT_RECORDS)
        self._lock = threading.Lock()

    def prepare(self, hops: int, in_use: int, chance: int = 0) -> None:
        """Take the number of hops of the batches to come, the bytes in use before, and by how many a batch may take
        more another time.

        Raises
        ------
        ArgumentValueError
            The model, or `widths`, is for another number.
        """
        if self.widths is not None and len(self.widths) != hops + 1:
            needs, remedy = f"{hops + 1} numbers for {hops} hops", "pass the widths of input, hidden layers and output"
            raise ArgumentValueError(explain("widths", needs, f"{len(self.widths)}", remedy))
        if self.model is None:
            self.model = MemoryModel(hops)
        if self.model.hops != hops:
            needs = f"a model of batches of {hops} hops"
            raise ArgumentValueError(explain("memory_limit", needs, f"{self.model!r}", "fit one for these sizes"))
        if self.learn:
            self._chance = chance  # else what is done depends on the model alone
            if self.model.count:
                self.model.move(in_use)

    def renewed(self) -> MemoryBudget:
        """Return a budget with the same limit and policy, for another kind of batches, with nothing fitted."""
        return MemoryBudget(self.limit, policy=self.policy, widths=self.widths)

    def judge(self, load: BatchLoad, in_use: Callable[[], int]) -> Verdict:
        """Say what is to be expected of a batch.

        Parameters
        ----------
        load : BatchLoad
            The batch.
        in_use : function
            Returns the bytes in use now; asked as long as nothing was measured.
        """
        model = self._prepared()
        with self._lock:
            if not model.count:
                used = in_use()
                scale = (self.limit - used) / (_FIRST_TIMES * max(load.own, 1))
                return Verdict(used + load.own, used + _FIRST_TIMES * load.own, used, scale >= 1, False, scale)
            expected, fixed, margin, reach = self._outlook(load)
        reach = reach if self.learn else 0.0
        # However large errors were, half of the room is for batches: else they would shrink to single seeds.
        upper = expected + min(margin, max(self.limit - fixed, 0.0) / 2)
        scale = (self.limit - (upper - expected) - fixed) / max(expected - fixed, 1.0)
        # A batch beyond what was seen fits if it would before all measurements: far below the limit nothing is at risk.
        roomy = fixed + _FIRST_TIMES * max(load.own, 1) <= self.limit
        scale = scale if roomy or not reach else min(scale, _GROWTH / reach)
        proven = roomy or reach <= _GROWTH
        # Beyond what was seen a prediction is good enough to say that a batch is too large, if it is so without the
        # margin as well.
        over = upper > self.limit and (proven or (model.count >= _ENOUGH and expected > self.limit))
        return Verdict(expected, upper, fixed, proven and upper <= self.limit, over, scale)

    def measured(self, load: BatchLoad, predicted: float, peak: int, exact: bool) -> None:
        """Take what a batch took at most, in bytes, and whether that was all its own, or perhaps less was."""
        model = self._prepared()
        with self._lock:
            self.counters.measured += 1
            self.counters.over += peak > self.limit
            self._records.append((predicted, peak))
            if self.learn and (exact or model.predict(load) > peak):
                model.observe(load, peak)

    def variable(self, load: BatchLoad) -> float:
        """Return how many bytes a batch may add to those in use."""
        with self._lock:
            expected, fixed, margin, _ = self._outlook(load)
        return expected + margin - fixed

    def idle(self, held: int, in_use: int) -> None:
        """Take what is in use between two batches, when no freed memory is kept."""
        model = self._prepared()
        with self._lock:
            if self.learn:
                model.observe_idle(held, in_use)

    def count(self, **amounts: int) -> None:
        """Add to the counters."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counters, name, getattr(self.counters, name) + amount)

    def stats(self) -> dict[str, Any]:
        """Return what was done and measured so far.

        Returns
        -------
        dict
            `batches`: steps; `parts`: batches handed out for them; `split`, `resampled`, `cut`: steps so changed;
            `edges_cut`: edges taken out; `single_seeds_cut`: seeds that were too large alone; `measured`: batches
            handed out whose peak was measured; `over`: those of them above the limit; `error`: the mean relative error
            of the last 4096 predictions; `peak`: the highest of these batches' peaks in bytes.
        """
        with self._lock:
            records = list(self._records)
            counters = asdict(self.counters)
        errors = [abs(predicted / peak - 1) for predicted, peak in records if peak]
        error = sum(errors) / len(errors) if errors else 0.0
        peak = max((peak for _, peak in records), default=0)
        return {"limit": self.limit, "policy": self.policy, **counters, "error": error, "peak": peak}

    @property
    def records(self) -> list[tuple[float, int]]:
        """Predicted and measured peak, in bytes, of the last 4096 batches handed out."""
        with self._lock:
            return list(self._records)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to a file, to be passed as `model`.

        Raises
        ------
        ArgumentValueError
            Nothing has been fitted yet.
        OSError
            The file cannot be written.
        """
        if self.model is None or not self.model.count:
            raise ArgumentValueError(explain("model", "measurements", "none", "train on some batches first"))
        with self._lock:
            self.model.save(path)

    def _outlook(self, load: BatchLoad) -> Outlook:
        found = self._prepared().outlook(load)
        return found._replace(margin=max(found.margin, float(self._chance)))

    def _prepared(self) -> MemoryModel:
        assert self.model is not None, "prepare comes first"
        return self.model

    def __repr__(self) -> str:
        return f"MemoryBudget({self.limit}, policy={self.policy!r}, {self.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def budget_of(limit: Any) -> MemoryBudget | None:
    """Return NodeLoader's `memory_limit` as a budget, None for None."""
    if limit is None or isinstance(limit, MemoryBudget):
        return limit
    return MemoryBudget(parse_size(limit, "memory_limit"))


def _checked_widths(widths: Any) -> tuple[int, ...]:
    remedy = "pass the widths of input, hidden layers and output, for example [100, 128, 47]"
    if isinstance(widths, (str, bytes)) or not hasattr(widths, "__iter__"):
        raise ArgumentTypeError(explain("widths", "a sequence of integers", repr(widths), remedy))
    found = []
    for width in widths:
        if isinstance(width, bool) or not hasattr(width, "__index__"):
            raise ArgumentTypeError(explain("widths", "integers", repr(width), remedy))
        found.append(int(width.__index__()))
    if any(width < 1 for width in found):
        raise ArgumentValueError(explain("widths", "numbers of at least 1", found, remedy))
    return tuple(found)
