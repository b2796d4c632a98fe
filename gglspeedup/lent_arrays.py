"""Arrays that pass from one process to another without a copy: made in memory that both map, and lent."""

from __future__ import annotations

import bisect
import collections
import io
import itertools
import pickle
import socket
import struct
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.errors import ShareError, explain
from gglspeedup.memory import AliasedArray, BufferPool
from gglspeedup.shared_array import SharedArray
from gglspeedup.threads import lock_of

Array = npt.NDArray[Any]
Place = tuple[int, int, int]  # the number of a loan, that of a buffer, and where in it the array begins

_BUFFER = struct.Struct("qq")  # its number, and its bytes


class Lender:
    """Makes buffers that another process maps, too, and lends it arrays in them.

    Any thread may ask for buffers; one thread lends.

    Parameters
    ----------
    files : socket
        A stream to the Borrower, for the buffers' files alone.
    """

    def __init__(self, files: socket.socket) -> None:
        self._files = files
        self._numbers, self._loans = itertools.count(), itertools.count()
        self._lent: dict[int, Array] = {}
        self._buffers: list[tuple[int, int, int]] = []  # address, end and number, by address
        # Buffers may end whenever the garbage collector says so, even in a thread that holds the lock.
        self._ended: collections.deque[int] = collections.deque()
        self._unsaid: list[int] = []  # of the buffers that have ended
        self._lock = lock_of(self)
        self._pool = BufferPool()

    def allocate(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return a buffer, which lives as long as this process has it or an array in it is lent.

        Raises
        ------
        ShareError
            There is not so much memory.
        """
        shared = SharedArray((num_bytes,), np.uint8)
        buffer, number = shared.array, next(self._numbers)
        address = buffer.ctypes.data
        with self._lock:
            self._sort_out()  # another may have been here
            bisect.insort(self._buffers, (address, address + num_bytes, number))
        weakref.finalize(buffer, self._ended.append, number).atexit = False
        socket.send_fds(self._files, [_BUFFER.pack(number, num_bytes)], [shared.file])
        shared.close_file()
        return buffer

    def _sort_out(self) -> None:
        ended = {self._ended.popleft() for _ in range(len(self._ended))}
        if ended:
            self._buffers = [buffer for buffer in self._buffers if buffer[2] not in ended]
            self._unsaid.extend(ended)

    def pickled(self, value: Any) -> bytes:
        """Return an object with arrays for :meth:`Borrower.unpickled`; an array that lies in no buffer is copied."""
        data = io.BytesIO()
        with self._lock:
            self._sort_out()
            ended, self._unsaid = self._unsaid, []
        _Pickler(data, self).dump((ended, value))
        return data.getvalue()

    def lend(self, array: Array) -> Place:
        """Keep an array for the other process, and return where it finds it."""
        place = self._find(array)
        if place is None:
            array, copied = self._pool.empty(array.shape, array.dtype), array
            array[...] = copied
            place = self._find(array)
            assert place is not None  # of a buffer that `allocate` made
        loan = next(self._loans)
        self._lent[loan] = array
        return loan, *place

    def _find(self, array: Array) -> tuple[int, int] | None:
        if not array.flags.c_contiguous:
            return None
        address = array.ctypes.data
        with self._lock:
            at = bisect.bisect_right(self._buffers, (address, 1 << 64, 0)) - 1
            if at < 0:
                return None
            begin, end, number = self._buffers[at]
        return (number, address - begin) if address + array.nbytes <= end else None

    def take_back(self, loans: list[int]) -> None:
        """Let go of arrays that the other process has let go of."""
        for loan in loans:
            del self._lent[loan]


class Borrower:
    """Reads the arrays that a Lender of another process lends.

    Parameters
    ----------
    files : socket
        The other end of the Lender's.
    """

    def __init__(self, files: socket.socket) -> None:
        self._files = files
        self._buffers: dict[int, Array] = {}
        # Appended to by whatever thread lets go of the last array of a loan.
        self._returned: collections.deque[int] = collections.deque()

    def receive(self) -> None:
        """Map the next buffer that the Lender has made.

        Raises
        ------
        EOFError
            The other process has ended.
        ShareError
            This one may open no more files.
        """
        data, files, _, _ = socket.recv_fds(self._files, _BUFFER.size, 1, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not data:
            raise EOFError
        if not files:
            needs, remedy = "to open a file for a moment", "raise the limit of open files (ulimit -n)"
            raise ShareError(explain("memory", needs, "too many open files", remedy))
        number, num_bytes = _BUFFER.unpack(data)
        shared = SharedArray.attached(files[0], (num_bytes,), np.uint8)
        shared.close_file()
        self._buffers[number] = shared.array

    def unpickled(self, data: bytes) -> Any:
        """Return an object of :meth:`Lender.pickled`, whose arrays are lent until they and their views are gone."""
        ended, value = _Unpickler(io.BytesIO(data), self).load()
        for number in ended:
            self._buffers.pop(number, None)
        return value

    def array(self, place: Place, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a lent array."""
        loan, number, begin = place
        while number not in self._buffers:
            self.receive()
        memory = self._buffers[number][begin:]
        return _Loan(self._returned, loan, memory, shape, dtype).array()

    def returned(self) -> list[int]:
        """Return the loans whose arrays are gone, once each."""
        return [self._returned.popleft() for _ in range(len(self._returned))]


class _Loan(AliasedArray):
    """The owner of a lent array: when the last view of it dies, the loan is over."""

    def __init__(
        self, returned: collections.deque[int], loan: int, memory: Array, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        super().__init__(memory, shape, dtype)
        self._returned, self._loan = returned, loan

    def __del__(self) -> None:
        self._returned.append(self._loan)


class _Pickler(pickle.Pickler):
    """Pickles arrays as the places where they are lent."""

    def __init__(self, file: io.BytesIO, lender: Lender) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._lender = lender

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for an array, None for all else."""
        if type(value) is not np.ndarray or value.nbytes == 0 or value.dtype.hasobject:
            return None
        return self._lender.lend(value), value.shape, value.dtype


class _Unpickler(pickle.Unpickler):
    """Unpickles what a `_Pickler` has pickled."""

    def __init__(self, file: io.BytesIO, borrower: Borrower) -> None:
        super().__init__(file)
        self._borrower = borrower

    def persistent_load(self, identity: Any) -> Array:
        """Return the array that an identity stands for."""
        return self._borrower.array(*identity)
