"""`MemoryModel`: a regression that says what a batch's training will take, from what batches before it took."""

from __future__ import annotations

import collections
import json
import math
import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.kernels.bounds import MAX_HOPS
from gglspeedup.page_file import beside

Floats = npt.NDArray[np.float64]

_KIND = "gglspeedup memory model 1"
_LARGEST_FILE = 64 << 20
_FORGETTING = 0.995
_EARLY_FORGETTING = 0.8  # the first steps make a framework's own memory, which is no batch's
_EARLY = 8
_FADED = 0.05
_KEPT_ERRORS = 128
_RIDGE = 1e-9
# Bytes of memory for each byte of the batches that wait, at most: as they are, converted, and a copy between the two.
# The first measurements would explain all that is in use by so little.
_MOST_HELD = 3.0
# What a margin is at least, of all memory; and before there are errors to go by, of that which depends on the batch.
_LEAST_MARGIN, _EARLY_MARGIN = 0.05, 0.5


class MemoryModelFileError(ArgumentValueError):
    """A file is no memory model, or was cut short or changed."""


class BatchLoad(NamedTuple):
    """What of a batch decides on its memory.

    Attributes
    ----------
    nodes : tuple of int
        Of each frontier, outermost first: the sources of each hop, then the seeds.
    edges : tuple of int
        Of each hop, outermost first.
    widths : tuple of float
        Bytes a row of each frontier, 1.0 where they are not known.
    own : int
        Bytes of the batch's own arrays.
    held : int
        Bytes of these, and of the other batches' that may wait before the training loop at the same time.
    """

    nodes: tuple[int, ...]
    edges: tuple[int, ...]
    widths: tuple[float, ...]
    own: int
    held: int

    def features(self) -> Floats:
        """Return the regressors, float64 [2 hops + 3]: 1, rows of each frontier, messages of each hop, bytes held."""
        rows = [count * width for count, width in zip(self.nodes, self.widths, strict=True)]
        messages = [count * width for count, width in zip(self.edges, self.widths[:-1], strict=True)]
        return np.array([1.0, *rows, *messages, self.held])


class Outlook(NamedTuple):
    """What is to be expected of a batch.

    Attributes
    ----------
    expected : float
        Its peak in bytes.
    fixed : float
        The part of that which the batch's own size has no influence on.
    margin : float
        By how many bytes the peak may be higher, by the errors made so far.
    reach : float
        How many times larger it is than all that was observed; infinite if nothing was.
    """

    expected: float
    fixed: float
    margin: float
    reach: float


class MemoryModel:
    """A linear model of peak memory, with no negative coefficient and at most 3 bytes for each that waits, fitted one
    measurement at a time.

    Recent measurements and relative errors count most. The margin is the worst of the last 128 errors.

    Parameters
    ----------
    hops : int
        Hops of the batches, 1 to 255.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        It is no such number.

    Examples
    --------
    >>> model = MemoryModel(1)
    >>> for count in (10, 20, 40):
    ...     model.observe(BatchLoad((count, 1), (3 * count,), (4.0, 1.0), 0, 0), 1000 + 100 * count)
    >>> round(model.predict(BatchLoad((30, 1), (90,), (4.0, 1.0), 0, 0)))
    4000
    """

    def __init__(self, hops: int) -> None:
        self.hops = check_count(hops, "hops", 1, MAX_HOPS)
        size = 2 * self.hops + 3
        self.count = 0
        self._gram = np.zeros((size, size))
        self._moment = np.zeros(size)
        self._largest = np.ones(size)
        self._errors: collections.deque[float] = collections.deque(maxlen=_KEPT_ERRORS)
        self._worst = _LEAST_MARGIN
        self._coefficients = np.zeros(size)

    @property
    def coefficients(self) -> Floats:
        """Bytes for each unit of :meth:`BatchLoad.features`, float64 [2 hops + 3]."""
        return self._coefficients.copy()

    def predict(self, load: BatchLoad) -> float:
        """Return the expected peak in bytes, 0.0 before anything was observed."""
        return float(self._coefficients @ load.features())

    def outlook(self, load: BatchLoad) -> Outlook:
        """Return what is to be expected of a batch."""
        features = load.features()
        expected = float(self._coefficients @ features)
        fixed = float(self._coefficients[0] + self._coefficients[-1] * (load.held - load.own))
        if self.count < _EARLY:
            margin = max(_LEAST_MARGIN * expected, _EARLY_MARGIN * (expected - fixed))
        else:
            margin = self._worst * expected
        reach = float((features / self._largest)[1:-1].max()) if self.count else math.inf
        return Outlook(expected, fixed, margin, reach)

    def observe(self, load: BatchLoad, peak: float) -> None:
        """Take a measured peak, in bytes."""
        features, size = load.features(), max(float(peak), 1.0)
        if self.count >= _EARLY:
            # Of the model as it is without this measurement.
            self._errors.append(size / max(float(self._coefficients @ features), 1.0) - 1)
            self._worst = max(_LEAST_MARGIN, *self._errors)
        self._fit(features, size)
        self._largest = np.maximum(self._largest, features)
        self.count += 1

    def observe_idle(self, held: int, used: float) -> None:
        """Take what is in use, in bytes, when no batch is trained on and `held` bytes of batches wait."""
        features = np.zeros(len(self._moment))
        features[0], features[-1] = 1.0, held
        self._fit(features, max(float(used), 1.0))

    def move(self, in_use: float) -> None:
        """Prepare for another process, with so many bytes in use before it trains: these count if they are more than
        was found to be fixed, and what was observed so far counts for little from now on."""
        more = max(float(in_use) - float(self._coefficients[0]), 0.0)
        self._gram *= _FADED
        self._moment = _FADED * self._moment + more * self._gram[:, 0]  # as if each peak had been higher by that
        self._coefficients = _solve(self._gram, self._moment)

    def _fit(self, features: Floats, size: float) -> None:
        forgetting = _EARLY_FORGETTING if self.count < _EARLY else _FORGETTING
        scaled = features / size  # least squares of relative errors
        self._gram = forgetting * self._gram + np.outer(scaled, scaled)
        self._moment = forgetting * self._moment + scaled
        self._coefficients = _solve(self._gram, self._moment)

    # --- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file of JSON, beside `path` first, then in its place.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        state = {
            "kind": _KIND,
            "hops": self.hops,
            "count": self.count,
            "gram": self._gram.tolist(),
            "moment": self._moment.tolist(),
            "largest": self._largest.tolist(),
            "errors": list(self._errors),
        }
        with beside(os.fspath(path)) as file:
            file.write(json.dumps(state, allow_nan=False).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemoryModel:
        """Return the model in a file.

        Raises
        ------
        OSError
            There is no such file.
        MemoryModelFileError
            It is none of :meth:`save`'s.
        """
        name = os.fspath(path)
        with open(name, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        try:
            if len(content) > _LARGEST_FILE:
                raise ValueError("it is too large")
            return cls._of_state(json.loads(content))
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as found:
            remedy = "fit it again, and save it with MemoryModel.save"
            raise MemoryModelFileError(explain("path", "a memory model", f"{name!r}: {found}", remedy)) from found

    @classmethod
    def _of_state(cls, state: Any) -> MemoryModel:
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            raise ValueError("it does not say that it is one")
        model = cls(state["hops"])
        size = len(model._moment)
        model.count = check_count(state["count"], "count", 0, 1 << 62)
        model._gram = _numbers(state["gram"], (size, size))
        model._moment = _numbers(state["moment"], (size,))
        model._largest = np.maximum(_numbers(state["largest"], (size,)), 1.0)
        model._errors.extend(_numbers(state["errors"], (len(state["errors"]),), signed=True).tolist())
        model._worst = max([_LEAST_MARGIN, *model._errors])
        if not np.array_equal(model._gram, model._gram.T):
            raise ValueError("its matrix is not symmetric")
        model._coefficients = _solve(model._gram, model._moment)
        if not np.isfinite(model._coefficients).all():
            raise ValueError("it gives no finite prediction")
        return model

    def __repr__(self) -> str:
        return f"MemoryModel(hops={self.hops}, {self.count} batches observed)"


def model_of(model: Any) -> MemoryModel | None:
    """Return a model that was given as itself or as the path of its file, None for None."""
    if model is None or isinstance(model, MemoryModel):
        return model
    if isinstance(model, (str, os.PathLike)):
        return MemoryModel.load(model)
    needs, remedy = "a MemoryModel or the path of one", "leave it out to fit one"
    raise ArgumentTypeError(explain("model", needs, repr(model), remedy))


def _solve(gram: Floats, moment: Floats) -> Floats:
    """Return the least-squares coefficients, none negative and the last one bounded."""
    found = _positive(gram, moment)
    if found[-1] > _MOST_HELD:  # the error is convex: within the bound, it is least at the bound
        rest = _positive(gram[:-1, :-1], moment[:-1] - _MOST_HELD * gram[:-1, -1])
        found = np.append(rest, _MOST_HELD)
    return found


def _positive(gram: Floats, moment: Floats) -> Floats:
    """Return the least-squares coefficients, none negative, of the smallest norm where several fit."""
    scale = np.sqrt(np.diag(gram))
    found = np.zeros(len(moment))
    used = np.flatnonzero(scale > 0)
    while len(used):
        scales = scale[used]
        normed = gram[np.ix_(used, used)] / np.outer(scales, scales)
        normed[np.diag_indices(len(used))] += _RIDGE
        solved = np.linalg.solve(normed, moment[used] / scales)
        if (solved >= 0).all():
            found[used] = solved / scales
            break
        used = np.delete(used, np.argmin(solved))
    return found


def _numbers(values: Any, shape: tuple[int, ...], signed: bool = False) -> Floats:
    array = np.array(values, np.float64)
    if array.shape != shape or not np.isfinite(array).all() or (not signed and (array < 0).any()):
        raise ValueError(f"it lacks {shape} sound numbers")
    return array
