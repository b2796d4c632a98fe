"""`OverlappedEvaluator`: checkpoints are evaluated in a second process while training goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing.util import Finalize
from typing import Any

import numpy as np

from gglspeedup.arguments import check_count, check_fraction, host_array
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.evaluator_desk import Desk, EvaluationError, Failure, State, close, deal
from gglspeedup.evaluator_process import start
from gglspeedup.interchange import is_numeric
from gglspeedup.prefetch import ForkedError

Evaluate = Callable[[State], Any]

_FULL = ("block", "drop")


class OverlappedEvaluator:
    """Evaluates checkpoints in a process of its own, in the order given, while the caller trains on.

    Scores are those that the same call would return in the training process; where a framework sums in another order
    with other numbers of threads, give both processes the same number.

    Parameters
    ----------
    evaluate : callable, optional
        Takes a state, a dict of NumPy arrays by name, and returns scores: anything that can be pickled. It is pickled
        itself, thus at the top level of a module.
    setup : callable, optional
        Instead of `evaluate`: called once, in the process, without arguments (``functools.partial`` brings some), it
        returns the callable that evaluates. What it is given is pickled: a graph that was loaded from a path, a
        MultiGPUSampler, a Multi_CGPUFeature or a SharedArray is not copied, but attached to.
    threads : int, optional
        How many threads kernels and frameworks use in the process, so that it leaves the others to the training; by
        default as many as they like.
    device : str or int, optional
        What of the GPUs the process sees: ``"cpu"``, none; a CUDA ordinal, that one alone, as its device 0. By default
        all, under their numbers, which memory of GPUs that is shared needs.
    pending : int
        How many checkpoints wait at most, besides the one that is evaluated.
    when_full : str
        What :meth:`submit` does while so many wait: ``"block"`` until one is begun, or ``"drop"`` the oldest.
    timeout : float
        Seconds that the setup, and each evaluation, may take before the process is ended.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used, or not be pickled; the message names it.

    Notes
    -----
    An evaluation that raises leaves its checkpoint in :attr:`failed`. A process that is killed, runs out of memory or
    takes too long is not started again: :attr:`error` says why, and what is submitted from then on fails at once,
    without a word. The training is not disturbed by either, but for a warning in the log. The process ends with
    :meth:`close`, when the evaluator is let go of, at exit, and, should the training be killed, by itself. A script
    that makes an evaluator needs the ``if __name__ == "__main__":`` of every script that spawns.

    Examples
    --------
    >>> import math
    >>> import numpy as np
    >>> from gglspeedup import OverlappedEvaluator
    >>> with OverlappedEvaluator(sorted, threads=1) as evaluator:  # of a state: its names
    ...     evaluator.submit(1, {"weight": np.eye(2), "bias": np.zeros(2)})
    ...     evaluator.wait()
    [(1, ['bias', 'weight'])]
    """

    def __init__(
        self, evaluate: Evaluate | None = None, *, setup: Callable[[], Evaluate] | None = None,
        threads: int | None = None, device: str | int | None = None, pending: int = 2, when_full: str = "block",
        timeout: float = 3600.0,
    ) -> None:  # fmt: skip
        if (evaluate is None) == (setup is None):
            needs, got = "to be given if setup is not", "both" if evaluate is not None else "neither"
            raise ArgumentValueError(explain("evaluate", needs, got, "pass one of the two"))
        given, name = (evaluate, "evaluate") if setup is None else (setup, "setup")
        if not callable(given):
            raise ArgumentTypeError(explain(name, "a callable", repr(given), "pass a function"))
        if when_full not in _FULL:
            raise ArgumentValueError(explain("when_full", f"one of {_FULL}", repr(when_full), 'leave it "block"'))
        if check_fraction(timeout, "timeout", threading.TIMEOUT_MAX) == 0:
            raise ArgumentValueError(explain("timeout", "seconds above 0", repr(timeout), "leave it an hour"))
        self.pending = check_count(pending, "pending", 1)
        threads = None if threads is None else check_count(threads, "threads", 1)
        self.when_full = when_full
        #: The steps that were given up for newer ones.
        self.dropped: list[int] = []
        self._made_in = os.getpid()
        self._desk = Desk()
        self._process, connection = start(evaluate, setup, threads, _visible(device))
        # A daemon, since an evaluator that is alive at exit would otherwise be waited for.
        thread = threading.Thread(
            target=deal, args=(self._desk, self._process, connection, float(timeout)), name="gglspeedup-evaluator",
            daemon=True,
        )  # fmt: skip
        # Not weakref.finalize: at exit this has to come before multiprocessing ends its processes.
        self._finalizer = Finalize(self, close, (self._desk, self._process, thread), exitpriority=10)
        thread.start()

    def submit(self, step: int, state: Mapping[str, Any]) -> None:
        """Hand over a checkpoint, of which a copy is taken, and return; its scores come later.

        Parameters
        ----------
        step : int
            What to call it, at least 0.
        state : mapping of names to arrays or tensors
            NumPy's or any framework's, dense, on the host or a GPU; such as ``model.state_dict()``.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            The state has something else in it, or the evaluator is closed.
        ForkedError
            This process is a fork of the one that made the evaluator.
        """
        self._check_process()
        step = check_count(step, "step", 0)
        desk = self._desk
        if desk.error is None:
            copied = copy_of(state)
        with desk.changed:
            if self.when_full == "block":
                desk.changed.wait_for(lambda: len(desk.waiting) < self.pending or desk.closed or desk.error)
            if desk.closed:
                needs, remedy = "an open evaluator", "submit before close()"
                raise ArgumentValueError(explain("submit", needs, "a closed one", remedy))
            if desk.error is not None:
                desk.failed.append(Failure(step, str(desk.error)))
                return  # said in the log when it happened
            while len(desk.waiting) >= self.pending:
                self.dropped.append(desk.waiting.popleft()[0])
            desk.waiting.append((step, copied))
            desk.changed.notify_all()

    def results(self) -> list[tuple[int, Any]]:
        """Return the steps evaluated since the last call, each with its scores, in the order of their submission."""
        with self._desk.changed:
            found, self._desk.scores = self._desk.scores, []
        return found

    def wait(self) -> list[tuple[int, Any]]:
        """Wait until all that was submitted is evaluated, or has failed, and return :meth:`results`."""
        self._check_process()
        with self._desk.changed:
            self._desk.changed.wait_for(self._desk.idle)
        return self.results()

    @property
    def failed(self) -> list[Failure]:
        """The checkpoints without scores, and why."""
        with self._desk.changed:
            return list(self._desk.failed)

    @property
    def error(self) -> EvaluationError | None:
        """What became of the process, if it evaluates nothing any more."""
        return self._desk.error

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process, in the middle of an evaluation if need be; results stay. May be called again."""
        self._finalizer()

    def __enter__(self) -> OverlappedEvaluator:
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Wait for the scores and close; after an exception, close at once."""
        try:
            if kind is None:
                self._check_process()
                with self._desk.changed:
                    self._desk.changed.wait_for(self._desk.idle)
        finally:
            self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._made_in:
            raise ForkedError("the evaluator belongs to another process; make it after forking")


def copy_of(state: Mapping[str, Any]) -> State:
    """Return a state as NumPy arrays of their own memory.

    Raises
    ------
    ArgumentTypeError
        It is no mapping from names to dense arrays or tensors of numbers.

    Examples
    --------
    >>> copy_of({"weight": [1.0, 2.0]})
    {'weight': array([1., 2.])}
    """
    if not isinstance(state, Mapping):
        remedy = "pass model.state_dict(), or a dict of arrays"
        raise ArgumentTypeError(explain("state", "a mapping of names to arrays", type(state).__name__, remedy))
    copied = {}
    for name, value in state.items():
        array = np.array(host_array(value, f"state[{name!r}]"), order="C")
        if not is_numeric(array.dtype):
            needs, got = "numbers", f"dtype {array.dtype}"
            raise ArgumentTypeError(explain(f"state[{name!r}]", needs, got, "leave it out of the state"))
        copied[str(name)] = array
    return copied


def _visible(device: str | int | None) -> dict[str, str]:
    """Return the environment in which a process sees one GPU alone, or none."""
    if device is None:
        return {}
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    text = str(device).removeprefix("cuda:")
    if isinstance(device, bool) or not text.isdecimal():
        raise ArgumentValueError(explain("device", '"cpu" or a CUDA ordinal', repr(device), "leave it out for all"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        numbers = [number.strip() for number in seen.split(",") if number.strip()]
        if int(text) >= len(numbers):
            needs = f"one of the {len(numbers)} GPUs of CUDA_VISIBLE_DEVICES"
            raise ArgumentValueError(explain("device", needs, repr(device), "leave it out for all"))
        text = numbers[int(text)]
    return {"CUDA_VISIBLE_DEVICES": text}
