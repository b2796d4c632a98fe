"""What lies between a training and the process that evaluates: checkpoints that wait, scores, failures; and the thread
that passes them on."""

from __future__ import annotations

import collections
import logging
import pickle
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy.typing as npt

from gglspeedup.errors import GGLSpeedupError
from gglspeedup.evaluator_process import DONE, FAILED

logger = logging.getLogger("gglspeedup")

State = dict[str, npt.NDArray[Any]]

_GRACE = 5.0  # seconds that a process which has nothing to do has to end by itself


class EvaluationError(GGLSpeedupError, RuntimeError):
    """The evaluating process ended or was ended, and evaluates nothing any more."""


class Failure(NamedTuple):
    """A checkpoint that has no scores.

    Attributes
    ----------
    step : int
        As it was submitted.
    reason : str
        The traceback of the evaluation, or what became of its process.
    """

    step: int
    reason: str


class Desk:
    """What the training and the thread share; neither keeps the other alive through it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: collections.deque[tuple[int, State]] = collections.deque()
        self.busy = True  # the process is starting, or evaluates
        self.closed = False
        self.scores: list[tuple[int, Any]] = []
        self.failed: list[Failure] = []
        self.error: EvaluationError | None = None

    def idle(self) -> bool:
        """Return whether nothing is waiting or being evaluated."""
        return not self.waiting and not self.busy


def deal(desk: Desk, process: BaseProcess, connection: Connection, timeout: float) -> None:
    """Pass on what waits, one after the other, until the desk is closed or the process gone; then end the process."""
    step: int | None = None
    reason = "the evaluator was closed"
    try:
        said, value = _ask(process, connection, timeout, None)
        if said == FAILED:
            raise EvaluationError(f"the setup of the evaluator failed: {value}")
        while True:
            with desk.changed:
                desk.busy = False
                desk.changed.notify_all()
                desk.changed.wait_for(lambda: desk.waiting or desk.closed)
                if desk.closed:
                    return
                step, state = desk.waiting.popleft()
                desk.busy = True
                desk.changed.notify_all()
            said, value = _ask(process, connection, timeout, (step, state))
            del state
            with desk.changed:
                if said == DONE:
                    desk.scores.append((step, value))
                else:
                    desk.failed.append(Failure(step, value))
                    logger.warning("evaluation of step %d failed, training goes on: %s", step, value)
            step = None
            del value
    except Exception as error:  # whatever it is, the training goes on
        with desk.changed:
            if not desk.closed:
                reason = str(error) if isinstance(error, EvaluationError) else f"{type(error).__name__}: {error}"
                desk.error = EvaluationError(reason)
                logger.warning("no more evaluations, training goes on: %s", reason)
    finally:
        with desk.changed:
            steps = ([] if step is None else [step]) + [waiting for waiting, _ in desk.waiting]
            desk.failed.extend(Failure(one, reason) for one in steps)
            desk.waiting.clear()
            desk.changed.notify_all()
        connection.close()
        process.join(_GRACE)
        process.kill()
        process.join()
        with desk.changed:
            desk.busy = False
            desk.changed.notify_all()


def _ask(
    process: BaseProcess, connection: Connection, timeout: float, checkpoint: tuple[int, State] | None
) -> tuple[str, Any]:  # fmt: skip
    """Return what the process answers to a checkpoint, or, to none, how its setup went.

    Raises
    ------
    EvaluationError
        It ended, or was ended since it took too long.
    """
    try:
        if checkpoint is not None:
            connection.send_bytes(pickle.dumps(checkpoint, pickle.HIGHEST_PROTOCOL))
        # Processes forked from this one may hold the other end of the connection: its end may never be seen.
        ready = wait([connection, process.sentinel], timeout)
        if not ready:
            process.kill()
            raise EvaluationError(f"the evaluation took more than {timeout:g} s, and was ended")
        if connection not in ready:
            raise EOFError
        answer = connection.recv_bytes()
    except (EOFError, OSError) as error:
        process.join(_GRACE)
        status = f"status {process.exitcode} (-9: killed, for want of memory as a rule)"
        raise EvaluationError(f"the evaluating process ended with {status}") from error
    try:
        return pickle.loads(answer)
    except Exception as error:  # a class that is not there in this process, for one
        return FAILED, f"scores that cannot be unpickled: {type(error).__name__}: {error}"


def close(desk: Desk, process: BaseProcess, thread: threading.Thread) -> None:
    """End the process and the thread."""
    with desk.changed:
        desk.closed = True
        if desk.busy:
            process.kill()
        desk.changed.notify_all()
    if thread is not threading.current_thread():  # from which the garbage collector may call this
        thread.join()
