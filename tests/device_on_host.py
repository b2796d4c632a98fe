"""Stands in for CuPy and its NCCL where there is no GPU: arrays that only their address gives away, sent in groups."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

UINT8 = 1  # as NCCL numbers it
STREAM = 4711


class DeviceArray:
    """An array that NumPy and the buffer protocol know nothing of."""

    device = contextlib.nullcontext()

    def __init__(self, host: Any) -> None:
        self.host = np.ascontiguousarray(host)
        self.shape, self.dtype, self.itemsize = self.host.shape, self.host.dtype, self.host.itemsize
        self.data = SimpleNamespace(ptr=self.host.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        whole = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.data.ptr, False), "version": 3}
        return {**whole, "strides": None}

    def reshape(self, *shape: int) -> DeviceArray:
        return DeviceArray(self.host.reshape(*shape))

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self.host.view(dtype))

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(self.host[key])

    def __setitem__(self, key: Any, value: DeviceArray) -> None:
        self.host[key] = value.host


class NcclError(RuntimeError):
    """What NCCL calls raise."""


class Network:
    """All ranks' GPUs: messages on their way, and what went wrong.

    Attributes
    ----------
    calls : list of (name, rank, peer, bytes)
        Every send and receive that was enqueued.
    aborted : set of int
        Ranks that have given up.
    broken : set of int
        Ranks whose connections broke; `refusing`: those that can send nothing.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, int]] = []
        self.aborted: set[int] = set()
        self.broken: set[int] = set()
        self.refusing: set[int] = set()
        self.waits = 0
        self.name: bytes | tuple[int, ...] = bytes(range(100, 228))
        self._boxes: dict[tuple[int, int], queue.Queue[bytes]] = defaultdict(queue.Queue)
        self._here = threading.local()

    def module(self) -> ModuleType:
        """Return what stands in for cupy.cuda.nccl."""
        nccl = ModuleType("cupy.cuda.nccl")
        network = self

        class Communicator:
            """One rank's."""

            def __init__(self, size: int, name: bytes | tuple[int, ...], rank: int) -> None:
                assert name == network.name and 0 <= rank < size
                if network.refusing == {-1}:
                    raise NcclError("NCCL_ERROR_INVALID_USAGE")
                self.rank = rank

            def send(self, address: int, count: int, dtype: int, peer: int, stream: int) -> None:
                if self.rank in network.refusing:
                    raise NcclError("NCCL_ERROR_SYSTEM_ERROR")
                network.enqueue("send", self.rank, address, count, dtype, peer, stream)

            def recv(self, address: int, count: int, dtype: int, peer: int, stream: int) -> None:
                network.enqueue("recv", self.rank, address, count, dtype, peer, stream)

            def check_async_error(self) -> None:
                if self.rank in network.broken:
                    raise NcclError("NCCL_ERROR_REMOTE_ERROR")

            def abort(self) -> None:
                network.aborted.add(self.rank)

        members = {
            "available": True, "NCCL_UINT8": UINT8, "NcclError": NcclError, "NcclCommunicator": Communicator,
            "get_unique_id": lambda: network.name, "get_version": lambda: 22707, "groupStart": self.group_start,
            "groupEnd": self.group_end,
        }  # fmt: skip
        nccl.__dict__.update(members)
        return nccl

    def group_start(self) -> None:
        assert getattr(self._here, "group", None) is None
        self._here.group = []

    def enqueue(self, name: str, rank: int, address: int, count: int, dtype: int, peer: int, stream: int) -> None:
        assert count > 0 and dtype == UINT8 and stream == STREAM and peer != rank
        self.calls.append((name, rank, peer, count))
        self._here.group.append((name, rank, address, count, peer))  # an AttributeError outside of a group

    def group_end(self) -> None:
        """Send; what is received arrives later."""
        group, self._here.group = self._here.group, None
        for name, rank, address, count, peer in group:
            if name == "send":
                self._boxes[rank, peer].put(ctypes.string_at(address, count))
        self._here.expected = [call[1:] for call in group if call[0] == "recv"]

    @property
    def done(self) -> bool:
        """Whether all that the calling thread expects has arrived: at the second look at the earliest."""
        self.waits += 1
        waiting = []
        for rank, address, count, peer in self._here.expected:
            try:
                message = self._boxes[peer, rank].get_nowait()
            except queue.Empty:
                waiting.append((rank, address, count, peer))
                continue
            assert len(message) == count
            ctypes.memmove(address, message, count)
        self._here.expected = waiting
        return not waiting


def install(modules: dict[str, ModuleType] = sys.modules) -> Network:
    """Put stand-ins for cupy and cupy.cuda.nccl in place, and return the network of the latter."""
    network = Network()
    cupy, cuda, nccl = ModuleType("cupy"), ModuleType("cupy.cuda"), network.module()

    def event(disable_timing: bool) -> Any:
        assert disable_timing
        return network

    stream = SimpleNamespace(ptr=STREAM, record=lambda mark: mark, synchronize=lambda: None)
    here = SimpleNamespace(id=0)
    cuda.__dict__.update(nccl=nccl, Event=event, get_current_stream=lambda: stream, Device=lambda: here)
    cupy.__dict__.update(cuda=cuda, empty=lambda shape, dtype: DeviceArray(np.empty(shape, dtype)))
    modules.update({"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl})
    return network
