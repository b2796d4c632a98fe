"""Ranks that are MPI processes, by mpi4py."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_flag
from gglspeedup.distributed.communicator import (
    TIMEOUT_SECONDS,
    Communicator,
    CommunicatorError,
    Ids,
    name_ranks,
    offsets_of,
)
from gglspeedup.errors import ArgumentTypeError, MissingPackageError, explain
from gglspeedup.interchange import on_cuda

_ALARM = 0  # the tag of a rank that cannot go on; other messages have a running number
_TAGS = 32767  # what every MPI has
_PIECE = 1 << 30  # bytes of one message: counts of older MPIs are 32-bit
_GRACE_SECONDS = 3.0  # for the other ranks to say why they end, too


class MpiCommunicator(Communicator):
    """The ranks of an MPI communicator, which is duplicated: messages meet no others.

    A rank whose Python ends by an exception tells the others, which raise CommunicatorError; then MPI is aborted, as
    it could not be finalised. A rank that is killed takes the others with it: that is ``mpiexec``'s doing.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        By default ``MPI.COMM_WORLD``.
    timeout : float
        Seconds that a rank waits for another, however long it works meanwhile.
    device_buffers : bool
        Whether MPI is CUDA-aware, which it cannot be asked: then :meth:`exchange` takes and returns CuPy arrays, too.

    Raises
    ------
    MissingPackageError
        mpi4py is not installed, or finds no MPI.
    CommunicatorError
        Not all ranks made one.
    """

    def __init__(
        self, comm: Any = None, *, timeout: float = TIMEOUT_SECONDS, device_buffers: bool = False
    ) -> None:  # fmt: skip
        self.device_buffers = check_flag(device_buffers, "device_buffers")
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            remedy = "pip install mpi4py and an MPI such as mpich, or take TorchCommunicator"
            raise MissingPackageError(explain("MpiCommunicator", "mpi4py and an MPI", f"{error}", remedy)) from error
        self._mpi = MPI
        whole = MPI.COMM_WORLD if comm is None else comm
        super().__init__(whole.Get_rank(), whole.Get_size(), timeout)
        self.concurrent = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        self._failure: str | None = None
        self._turn = 0
        self._sent: list[Any] = []  # alarms on their way, with their buffers
        self._heard: set[int] = set()
        self._comm: Any
        self._comm, request = whole.Idup()
        self.step = "the making of an MpiCommunicator"
        if self.size > 1:
            _made.append(self)
            atexit.register(self.leave)
        self._wait(request.Test, lambda: None, lambda: "a rank")
        _unlink_segments()

    def exchange(self, rows: Any, send_counts: Sequence[int] | Ids, receive_counts: Sequence[int] | Ids) -> Any:
        """Send rows to all ranks and return theirs; see :class:`Communicator`."""
        self._check()
        begins, ends = offsets_of(send_counts), offsets_of(receive_counts)
        received = self._empty((int(ends[-1]), *rows.shape[1:]), rows)
        self._turn = self._turn % _TAGS + 1
        width = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
        sent, filled = _bytes(rows), _bytes(received)
        own = self.rank
        ranks: list[int] = []
        requests: list[Any] = []
        # Each begins with its neighbour, so that they do not all send to one at a time.
        others = [(own + step) % self.size for step in range(1, self.size)]
        for start, buffer, bounds in (self._comm.Irecv, filled, ends), (self._comm.Isend, sent, begins):
            for rank in others:
                for begin in range(width * int(bounds[rank]), width * int(bounds[rank + 1]), _PIECE):
                    piece = buffer[begin : min(begin + _PIECE, width * int(bounds[rank + 1]))]
                    requests.append(start([piece, self._mpi.BYTE], rank, self._turn))
                    ranks.append(rank)
        received[ends[own] : ends[own + 1]] = rows[begins[own] : begins[own + 1]]
        if requests:
            self._finish(ranks, requests)
        return received

    def _empty(self, shape: tuple[int, ...], like: Any) -> Any:
        """Return an array to receive into, of the dtype and in the memory of another, which is ready to be sent."""
        if not on_cuda(like):
            return self._pool.empty(shape, like.dtype)
        if not self.device_buffers:
            remedy = "copy them to the host, or pass device_buffers=True if this MPI is CUDA-aware"
            raise ArgumentTypeError(explain("rows", "an array of the host", "one of a GPU", remedy))
        import cupy

        with like.device:
            received = cupy.empty(shape, like.dtype)
            cupy.cuda.get_current_stream().synchronize()  # MPI knows of no stream, and uses both at once
        return received

    def _finish(self, ranks: list[int], requests: list[Any]) -> None:
        def missing() -> str:
            # `Testall` says nothing of the single ones.
            return name_ranks(sorted({r for r, request in zip(ranks, requests, strict=True) if not request.Test()}))

        try:
            self._wait(lambda: self._mpi.Request.Testall(requests), self.heard, missing)
        except self._mpi.Exception as error:
            reason = f"MPI failed in {self.step} ({error}): another rank is in another call, or its node has failed"
            self.abort(reason)
            raise CommunicatorError(reason) from error

    def heard(self) -> str | None:
        """Return what another rank has said of why it ends, None if none did."""
        status = self._mpi.Status()
        # Matched, as a background thread may look at the same time.
        found = self._comm.Improbe(self._mpi.ANY_SOURCE, _ALARM, status)
        if found is None:
            return None
        rank = status.Get_source()
        message = bytearray(status.Get_count(self._mpi.BYTE))
        found.Recv([message, self._mpi.BYTE])
        self._heard.add(rank)
        return f"rank {rank} gave up: {message.decode(errors='replace')}"

    def _check(self) -> None:
        if self._failure is not None:
            raise CommunicatorError(self._failure)

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on. MPI is aborted when Python ends."""
        if self._failure is not None:
            return
        self._failure = reason
        message = reason.encode()
        for rank in range(self.size):
            if rank != self.rank:
                self._sent.append((message, self._comm.Isend([message, self._mpi.BYTE], rank, _ALARM)))
        # Short messages leave at once, but for a peer that cannot take them.
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not all(request.Test() for _, request in self._sent):
            time.sleep(0.001)

    def leave(self) -> None:
        """End this rank as Python ends: as it is, or with all of MPI, if not all is well."""
        if self._mpi.Is_finalized():
            return
        raised = getattr(sys, "last_value", None)
        if raised is not None:
            for communicator in _made:  # other ranks may wait at any of them
                communicator.abort(f"{type(raised).__name__}: {raised}")
        if self._failure is None:
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        deadline = time.monotonic() + _GRACE_SECONDS
        while len(self._heard) < self.size - 1 and time.monotonic() < deadline:
            if self.heard() is None:
                time.sleep(0.01)
        print(f"rank {self.rank} ends: {self._failure}", file=sys.stderr, flush=True)
        self._mpi.COMM_WORLD.Abort(1)
        os._exit(1)  # should an MPI's Abort return


_made: list[MpiCommunicator] = []  # of this process, which leaves all of them as it ends


def _unlink_segments() -> None:
    """Take away the names of MPICH's shared memory, which all ranks of this machine have mapped by now.

    MPICH does so as it is finalised, and killed or aborted ranks never are: the segments would stay for good.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        names = set(re.findall(r"/dev/shm/mpich_shm_\w+", maps.read()))
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.unlink(name)


def _bytes(array: Any) -> npt.NDArray[np.uint8]:
    """Return the bytes of a C-contiguous array, of any dtype, also none that buffers know."""
    return array.reshape(-1).view(np.uint8)
