"""Ranks with a GPU each: arrays of the device go from GPU to GPU by NCCL, all else by another engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gglspeedup.distributed.collective import Collective
from gglspeedup.distributed.communicator import Communicator, CommunicatorError, Ids, offsets_of
from gglspeedup.errors import MissingPackageError, cuda_failures, explain
from gglspeedup.interchange import on_cuda


class NcclCommunicator(Communicator):
    """The ranks of another communicator, each with a GPU of its own, whose memory :meth:`exchange` sends as well.

    CuPy arrays are sent by NCCL, on the calling thread's current stream, and returned as such; NumPy arrays, counts and
    messages go by `host`. The GPU is the one that is current when this is made; no two ranks may have the same.

    Parameters
    ----------
    host : Communicator
        An MpiCommunicator or TorchCommunicator, from now on used by this one alone; its timeout is kept.

    Raises
    ------
    MissingPackageError
        CuPy or NCCL is not installed; the other ranks raise RankError.
    DeviceError
        There is no GPU; the other ranks raise RankError.
    RankError
        Ranks have different versions of NCCL.
    CommunicatorError
        NCCL could not connect the GPUs, or a rank has died or did not come.
    """

    device_buffers = True

    def __init__(self, host: Communicator) -> None:
        collective = Collective(host)
        super().__init__(host.rank, host.size, host.timeout)
        self._host, self.concurrent = host, host.concurrent
        self._failure: str | None = None
        self._comm: Any = None
        name: dict[str, Any] = {}

        def load() -> Ids:
            self._cupy, self._nccl = _packages()
            with cuda_failures(0):
                self.device_index = int(self._cupy.cuda.Device().id)
            if host.rank == 0:
                unique = self._nccl.get_unique_id()  # bytes; a tuple in older versions of CuPy
                name.update(bytes=isinstance(unique, bytes), parts=list(unique))
            return np.empty((host.size, 0), np.int64)

        with collective.together():
            collective.counts("NcclCommunicator(...)", load)
            name = collective.same("NcclCommunicator", {"NCCL": self._nccl.get_version()}, name)[0]
            try:
                unique = (bytes if name["bytes"] else tuple)(name["parts"])
                self._comm = self._nccl.NcclCommunicator(self.size, unique, self.rank)
            except self._nccl.NcclError as error:
                reason = f"NCCL could not connect the GPUs ({error}), of which each rank needs its own"
                raise self._lost(reason) from error

    def exchange(self, rows: Any, send_counts: Sequence[int] | Ids, receive_counts: Sequence[int] | Ids) -> Any:
        """Send rows to all ranks and return theirs, NumPy or CuPy arrays as they were given; see :class:`Communicator`.

        CuPy arrays have to be of the GPU that this was made for. They are there when this returns.
        """
        if not on_cuda(rows):
            return self._by_host().exchange(rows, send_counts, receive_counts)
        if self._failure is not None:
            raise CommunicatorError(self._failure)
        cuda, own = self._cupy.cuda, self.rank
        begins, ends = offsets_of(send_counts), offsets_of(receive_counts)
        with rows.device:
            received = self._cupy.empty((int(ends[-1]), *rows.shape[1:]), rows.dtype)
            stream = cuda.get_current_stream()
            try:
                self._enqueue(rows, begins, received, ends, stream.ptr)
            except self._nccl.NcclError as error:
                raise self._lost(f"NCCL failed in {self.step} ({error})") from error
            received[ends[own] : ends[own + 1]] = rows[begins[own] : begins[own + 1]]
            whole = stream.record(cuda.Event(disable_timing=True))
            self._wait(lambda: bool(whole.done), self.heard, lambda: "a rank")
        return received

    def _enqueue(self, rows: Any, begins: Ids, received: Any, ends: Ids, stream: int) -> None:
        width = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
        self._nccl.groupStart()  # so that no send waits for a receive
        try:
            for rank in range(self.size):
                for call, array, bounds in (self._comm.send, rows, begins), (self._comm.recv, received, ends):
                    count = width * int(bounds[rank + 1] - bounds[rank])
                    if count and rank != self.rank:  # the other side leaves empty ones out as well
                        call(array.data.ptr + width * int(bounds[rank]), count, self._nccl.NCCL_UINT8, rank, stream)
        finally:
            self._nccl.groupEnd()

    def exchange_counts(self, send: Ids) -> Ids:
        """Send row r to rank r, and return what each rank has sent; see :class:`Communicator`."""
        return self._by_host().exchange_counts(send)

    def gather_all(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank; they should be short."""
        return self._by_host().gather_all(message)

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on; what NCCL has under way here is given up."""
        if self._failure is not None:
            return
        self._failure = reason
        if self._comm is not None:
            self._comm.abort()
        self._host.abort(reason)

    def _by_host(self) -> Communicator:
        if self._failure is not None:
            raise CommunicatorError(self._failure)
        self._host.step = self.step
        return self._host

    def heard(self) -> str | None:
        """Return what another rank has said of why it ends, or NCCL of a broken connection; None if neither."""
        said = self._host.heard()
        if said is not None:
            return said
        try:
            self._comm.check_async_error()
        except self._nccl.NcclError as error:
            return f"NCCL failed in {self.step} ({error}): another rank has died"
        return None

    def _lost(self, reason: str) -> CommunicatorError:
        self.abort(reason)
        return CommunicatorError(reason)


def _packages() -> tuple[Any, Any]:
    """Return CuPy and its NCCL."""
    remedy = 'pip install "gglspeedup[cuda]" and the nvidia-nccl package of the same CUDA'
    try:
        import cupy
        from cupy.cuda import nccl
    except ImportError as error:
        raise MissingPackageError(explain("NcclCommunicator", "CuPy and NCCL", f"{error}", remedy)) from error
    if not nccl.available:
        raise MissingPackageError(explain("NcclCommunicator", "NCCL", "CuPy without it", remedy))
    return cupy, nccl
