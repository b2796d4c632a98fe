"""Processes that work together: started, watched until all have answered, and never left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any, Protocol

from gglspeedup import GGLSpeedupError
from gglspeedup.threads import usable_cores


class Started(Protocol):
    """What frameworks return that start processes; it may own what these are about to open."""

    @property
    def processes(self) -> Sequence[BaseProcess]:
        """The processes, in the order of their ranks."""


# Starts so many processes, each of which calls target(rank, *arguments).
Start = Callable[[Callable[..., None], tuple[Any, ...], int], Started]

_ENDING_SECONDS = 20.0  # for what frameworks do after the work
_LATER_SECONDS = 0.5  # how much later the system may tell of a death than its peers notice it


class ProcessError(GGLSpeedupError, RuntimeError):
    """A process failed or died; the message has its error."""


def spawn(target: Callable[..., None], arguments: tuple[Any, ...], count: int) -> Started:
    """Start processes with the standard library's means."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    return SimpleNamespace(processes=processes)


def run(start: Start, work: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> list[Any]:
    """Let processes work, and return what each of them returned.

    Parameters
    ----------
    start : callable
        Starts them: :func:`spawn`, or the like of a framework.
    work : callable
        A module's function, called in each process as ``work(rank, *arguments)``.
    arguments : tuple
        Pickled into each process.
    count : int
        The number of processes.

    Raises
    ------
    ProcessError
        A process raised or died; the others have been ended.
    """
    # Otherwise each process's libraries would take all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(count)), strict=True)
    before = multiprocessing.active_children()
    try:
        with _interrupts_ignored():  # which processes inherit: this one alone is to hear Ctrl-C, and end them
            started = start(run_rank, (work, arguments, theirs), count)
        answers = _answers(started.processes, ours)
        for connection in ours:
            connection.send(None)
        _join(started.processes)
        return answers
    finally:
        # Those of a start that failed halfway, too.
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()
            process.join()
        for connection in (*ours, *theirs):
            connection.close()


def run_rank(
    rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], connections: Sequence[Connection]
) -> None:  # fmt: skip
    """Do the work of a process, tell what it returned or raised, and stay until all have done so."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = True, work(rank, *arguments)
    except Exception:
        answer = False, traceback.format_exc()
    connections[rank].send(answer)
    # Whoever ended now would look like the cause to those that still wait for it.
    connections[rank].recv()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _answers(processes: Sequence[BaseProcess], connections: Sequence[Connection]) -> list[Any]:
    """Wait until all have answered, or one has failed or died."""
    answers: dict[int, Any] = {}
    while len(answers) < len(processes):
        waiting = [rank for rank in range(len(processes)) if rank not in answers]
        wait([channel for rank in waiting for channel in (connections[rank], processes[rank].sentinel)])
        for rank in waiting:
            dead = processes[rank].exitcode is not None  # asked first, as an answer may come just before the end
            if connections[rank].poll():
                done, answers[rank] = connections[rank].recv()
                if not done:
                    time.sleep(_LATER_SECONDS)
                    _refuse_dead(processes)
                    raise ProcessError(f"process {rank} failed: {answers[rank]}")
            elif dead:
                _refuse_dead(processes)
    return [answers[rank] for rank in range(len(processes))]


def _join(processes: Sequence[BaseProcess]) -> None:
    end = time.monotonic() + _ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    _refuse_dead(processes, well=(0, None))


def _refuse_dead(processes: Sequence[BaseProcess], well: tuple[int | None, ...] = (None,)) -> None:
    """Raise if a process has died; one that fails does not: it tells, and waits."""
    for rank, process in enumerate(processes):
        code = process.exitcode
        if code not in well:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ProcessError(f"process {rank} ended with {how}; what it may have said is above")
