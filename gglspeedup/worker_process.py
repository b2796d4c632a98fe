"""A forked process that makes batches: what it does, and what is seen of it by the one that asks for them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import select
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from gglspeedup import trace
from gglspeedup.errors import WorkerError, explain
from gglspeedup.lent_arrays import Borrower, Lender
from gglspeedup.memory import allocate_by
from gglspeedup.prefetch import ForkedError
from gglspeedup.threads import holding_launches, set_num_threads

Make = Callable[[Iterable[Any]], Iterator[Any]]

_LOOK = 1000  # milliseconds between two looks at whether the parent lives
_GRACE = 5.0  # seconds that a process is given to end


class _Failure(NamedTuple):
    """The exception that has ended the making of batches: pickled, if it can be, and as text."""

    pickled: bytes | None
    text: str


class Worker:
    """A process that makes batches, in the order in which they are asked for.

    It is a fork: it sees what `make` reads as it was when the worker was started, and copies none of it.

    Parameters
    ----------
    make : callable
        Takes an iterator over what is asked for, and gives a batch of each, in order.
    name : str
        What a profile calls the process.
    threads : int
        Of its kernels.

    Raises
    ------
    WorkerError
        The system has no room for the process, or this one may have none, as it is daemonic itself.
    """

    def __init__(self, make: Make, name: str, threads: int) -> None:
        self.name = name
        self.asked = self.answered = 0
        self._parent = os.getpid()
        self._connection, connection = multiprocessing.Pipe()
        here, there = socket.socketpair()
        self._files, self._borrower = here, Borrower(here)
        ours = (self._connection, here)
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(make, name, threads, connection, there, ours, os.getpid()), name=name, daemon=True
        )
        try:
            with warnings.catch_warnings(), holding_launches():
                # JAX and Python 3.12 warn of threads that hold locks at the fork: the worker calls no framework, and
                # takes no lock of ours that a fork does not set free.
                warnings.filterwarnings("ignore", ".*fork.*")
                self._process.start()
        except (OSError, AssertionError) as error:  # no room for a process, or a daemonic one, which may have none
            self._connection.close()
            here.close()
            needs, remedy = "forks of this process", "take fewer, or leave them out: threads make the same batches"
            raise WorkerError(explain("workers", needs, getattr(error, "strerror", None) or error, remedy)) from error
        finally:
            connection.close()
            there.close()
        self._ready = select.poll()
        for file in (self._connection, here, self._process.sentinel):
            self._ready.register(file, select.POLLIN)

    @property
    def idle(self) -> bool:
        """Whether all that was asked for has been answered, by a process that lives and is this one's."""
        return os.getpid() == self._parent and self.asked == self.answered and self._process.is_alive()

    def ask(self, requests: list[Any]) -> None:
        """Ask for batches.

        Raises
        ------
        ForkedError
            This process is a fork of the one that started the worker.
        WorkerError
            It has died.
        """
        self._check()
        recorder = trace.current()
        message = (requests, self._borrower.returned(), 0 if recorder is None else recorder.limit)
        try:
            self._connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise self._death() from error
        self.asked += len(requests)

    def answer(self, place: Callable[[int], int]) -> Any:
        """Return the batch that was asked for first.

        Parameters
        ----------
        place : callable
            Says which batch of its loop the worker's k-th is, for a profile.

        Raises
        ------
        Exception
            What the making of it has raised, with the worker's traceback as its cause.
        WorkerError
            The process has died, of a signal or for want of memory.
        """
        self._check()
        try:
            names, spans, batch = self._borrower.unpickled(self._message())
        except (EOFError, OSError) as error:
            raise self._death() from error
        recorder = trace.current()
        if recorder is not None and spans:
            recorder.adopt(
                [f"{self.name} {name}" for name in names],
                [span if span.batch is None else span._replace(batch=place(span.batch)) for span in spans],
            )
        if isinstance(batch, _Failure):
            cause = WorkerError(f"in {self.name}:\n{batch.text}")
            if batch.pickled is None:
                raise cause
            raise pickle.loads(batch.pickled) from cause
        self.answered += 1
        return batch

    def _message(self) -> bytes:
        while True:
            ready = {file for file, _ in self._ready.poll()}
            # Buffers are mapped while a batch is waited for: the worker must not wait for room to announce them.
            if self._files.fileno() in ready:
                self._borrower.receive()
            elif self._connection.fileno() in ready:
                return self._connection.recv_bytes()
            elif ready:
                raise EOFError

    def _death(self) -> WorkerError:
        self._process.join(_GRACE)
        status = f"status {self._process.exitcode} (-9: killed, for want of memory as a rule)"
        return WorkerError(f"{self.name} ended with {status}; take fewer workers, or smaller batches")

    def _check(self) -> None:
        if os.getpid() != self._parent:
            raise ForkedError("the loader's workers belong to another process; iterate over it after forking")

    def close(self) -> None:
        """End the process. Arrays that it has lent stay as they are."""
        if os.getpid() != self._parent:
            return
        self._process.kill()  # it has nothing to put in order
        self._process.join()
        self._connection.close()
        self._files.close()


def _serve(
    make: Make, name: str, threads: int, connection: Connection, files: socket.socket, others: Iterable[Any],
    parent: int,
) -> None:  # fmt: skip
    """Make batches until the parent ends this process, or its own end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; what it ends is the parent's to say
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what was garbage at the fork is the parent's: files to remove, processes to end
    threading.current_thread().name = "gglspeedup-making"
    for other in others:
        other.close()
    trace.forget()
    lender = Lender(files)
    allocate_by(lender.allocate)
    set_num_threads(threads)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listening = (connection, parent, requests.put, lender)
    threading.Thread(target=_listen, args=listening, name="gglspeedup-listening", daemon=True).start()
    try:
        for batch in make(iter(requests.get, None)):
            connection.send_bytes(lender.pickled((*_recorded(), batch)))
            del batch
    except BaseException as error:
        connection.send_bytes(lender.pickled(([], [], _Failure(_pickled(error), traceback.format_exc()))))
    threading.Event().wait()  # for the parent to have read that


def _listen(connection: Connection, parent: int, put: Callable[[Any], None], lender: Lender) -> None:
    """Pass requests on, however many there are, so that the parent need not wait while this process does."""
    ready = select.poll()
    ready.register(connection, select.POLLIN)
    try:
        while True:
            # Processes that the parent forked may hold its end of the pipe open, so its number is looked at as well.
            while not ready.poll(_LOOK):
                if os.getppid() != parent:
                    raise EOFError
            asked, returned, spans = pickle.loads(connection.recv_bytes())
            lender.take_back(returned)
            _record(spans)
            for request in asked:
                put(request)
    except BaseException:  # the parent is gone
        os._exit(1)


def _record(spans: int) -> None:
    """Record at most so many spans a batch, or none."""
    recorder = trace.current()
    if spans and recorder is None:
        trace.start(trace.Recorder(spans))
    elif recorder is not None and not spans:
        trace.stop(recorder)


def _recorded() -> tuple[list[str], list[trace.Span]]:
    """Return the names of the threads that have spans, and those that were recorded since the last batch."""
    recorder = trace.current()
    return ([], []) if recorder is None else (list(recorder.threads), recorder.take())


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # classes with arguments of their own need not come back
    except Exception:
        return None
    return data
