"""The process that evaluates checkpoints beside a training: how it is started, what it does, how it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

from gglspeedup.errors import ArgumentTypeError, explain
from gglspeedup.threads import set_num_threads

DONE, FAILED = "done", "failed"  # what an answer starts with

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
_LOOK = 1.0  # seconds between two looks at whether the parent lives

_environment_lock = threading.Lock()


def start(
    evaluate: Callable[[Any], Any] | None, setup: Callable[[], Callable[[Any], Any]] | None, threads: int | None,
    environment: dict[str, str],
) -> tuple[BaseProcess, Connection]:  # fmt: skip
    """Start the process, by spawning, and return it with the connection to it.

    Its first answer says whether `setup` went well; then it answers each ``(step, state)`` that it is sent.

    Raises
    ------
    ArgumentTypeError
        The callable cannot be pickled.
    """
    # A fork would bring along locks that other threads, such as a framework's, held at that moment.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, _Parcel((evaluate, setup)), threads)
    process = context.Process(target=_serve, args=arguments, name="gglspeedup-evaluator")
    if threads is not None:
        environment = {**dict.fromkeys(_THREAD_VARIABLES, str(threads)), **environment}
    try:
        with _variables(environment):
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        here.close()
        needs = "a callable that can be pickled: one at the top level of a module, functools.partial of such a one"
        name = "evaluate" if setup is None else "setup"
        remedy = "move it there, and pass what it needs as arguments of a partial"
        raise ArgumentTypeError(explain(name, needs, str(error), remedy)) from error
    finally:
        there.close()  # so that the end of the process ends what is read from it
    return process, here


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables: libraries read them when they are loaded, so they must be there from the beginning."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class _Parcel:
    """What is unpickled only when it is opened: with threads set, Ctrl-C ignored, and errors that are reported."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sealed, (bytes(ForkingPickler.dumps(self._content)),)


class _Sealed:
    """A parcel in the process that it was sent to."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self) -> Any:
        """Return the content."""
        return pickle.loads(self._data)


def _serve(connection: Connection, parcel: _Sealed, threads: int | None) -> None:
    """Answer checkpoints with scores until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; what it ends is the parent's to say
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="gglspeedup-parent", daemon=True).start()
    # What ends this thread early, closed pipes included, ends the process; the parent sees that.
    with contextlib.suppress(EOFError, OSError):
        try:
            evaluate, setup = parcel.open()
            if threads is not None:
                set_num_threads(threads)
            if setup is not None:
                evaluate = setup()
            if threads is not None and "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
        except Exception:
            connection.send_bytes(pickle.dumps((FAILED, traceback.format_exc())))
            return
        connection.send_bytes(pickle.dumps((DONE, None)))
        while True:
            step, state = pickle.loads(connection.recv_bytes())
            try:
                answer = pickle.dumps((DONE, evaluate(state)))
            except Exception:
                answer = pickle.dumps((FAILED, f"step {step}: {traceback.format_exc()}"))
            del state
            connection.send_bytes(answer)


def _end_with_parent(parent: int) -> None:
    """End this process, whatever it is doing, once its parent is gone."""
    process = multiprocessing.parent_process()
    assert process is not None
    # Processes that the parent forked may hold its end of the pipe open, so its number is looked at as well.
    while os.getppid() == parent and not wait([process.sentinel], _LOOK):
        pass
    os._exit(1)
