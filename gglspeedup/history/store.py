"""`HistoryStore`: the last known rows of every node, for each layer of a model (GNNAutoScale)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_flag
from gglspeedup.device import Device, DeviceLike, free_bytes, host_free_bytes, parse_device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, HistoryFileError, explain
from gglspeedup.history import history_file
from gglspeedup.history.history_file import Header
from gglspeedup.history.lane import Lane
from gglspeedup.history.lane_gpu import StreamLane
from gglspeedup.history.table import Common, History
from gglspeedup.history.tables_cpu import HostTable, SharedTables, empty_tables
from gglspeedup.memory import BufferPool

if TYPE_CHECKING:
    from gglspeedup.history.tables_gpu import CudaTable

Ids = npt.NDArray[np.int64]

logger = logging.getLogger("gglspeedup")

_STORAGES = ("device", "pinned", "mmap", "auto")
_MEMORY_SHARE = 0.8  # of the free memory that "auto" gives to histories


class Staleness(NamedTuple):
    """How old rows are, in pushes since they were written: their mean and largest age, and how many never were."""

    mean: float
    largest: int
    never: int

    @classmethod
    def of(cls, age: Ids) -> Staleness:
        """Return the summary of ages, of which -1 means never.

        Examples
        --------
        >>> import numpy as np
        >>> Staleness.of(np.array([0, 3, -1]))
        Staleness(mean=1.5, largest=3, never=1)
        """
        known = age[age >= 0]
        if not len(known):
            return cls(0.0, 0, len(age))
        return cls(float(known.mean()), int(known.max()), len(age) - len(known))


class HistoryStore:
    """Tables of rows that batches push to and pull from.

    Parameters
    ----------
    num_nodes : int
        Rows of every table.
    dims : sequence of int
        The width of each table: one a layer that keeps histories.
    device : str or int
        ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``: what pulls return, and where rows may lie.
    storage : str
        ``"device"``, ``"pinned"`` host memory that the GPU reads and writes in place (both ordinary memory on the CPU),
        ``"mmap"`` (a file, which may be larger than the memory), or ``"auto"``: the first of them that they fit.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: how rows are stored, and what pulls return.
    path : path, optional
        The file of ``"mmap"``. One that is there is opened, with what it holds.
    pool_size : int, optional
        How many pushes and pulls may wait at once; by default four for each table.
    buffer_size : int, optional
        Rows of the buffers that are made at once, for values on their way; larger ones are made as needed.
    host_gather : bool
        Of ``"pinned"``: whether the CPU picks and writes the rows, and whole blocks are copied, instead of a GPU that
        reads and writes each row in place. Which is faster depends on the machine; the rows are the same.
    shared : bool
        Whether the tables lie in host memory that processes share: unpickled in a spawned process, the store has the
        same tables. A process sees its own pushes in their order; those of others as they come, so write different
        nodes at a time, and let a process :meth:`synchronize`, and others wait for it, before they pull what it wrote.

    Raises
    ------
    DeviceError
        The CUDA device is not there.
    HistoryFileError
        The file is damaged, foreign, of other sizes, was not closed by its last writer, or the disk has no room.
    ShareError
        There is not so much memory that processes can share.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.

    Notes
    -----
    The method is that of Fey et al., "GNNAutoScale: scalable and expressive graph neural networks via historical
    embeddings" (ICML 2021), section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import HistoryStore
    >>> store = HistoryStore(4, [2], "cpu")
    >>> store[0].push(np.array([[1.0, 2.0], [3.0, 4.0]]), n_id=[3, 1])
    >>> store[0].push(np.array([[5.0, 6.0]]), offset=[0], count=[1])
    >>> store[0].pull([0, 1, 2]).tolist()
    [[5.0, 6.0], [3.0, 4.0], [0.0, 0.0]]
    >>> store.age([0, 1, 2]).tolist()
    [0, 1, -1]
    """

    def __init__(
        self, num_nodes: int, dims: Sequence[int], device: DeviceLike = "auto", *, storage: str = "auto",
        dtype: str = "float32", path: str | os.PathLike[str] | None = None, pool_size: int | None = None,
        buffer_size: int | None = None, host_gather: bool = False, shared: bool = False,
    ) -> None:  # fmt: skip
        self.num_nodes = check_count(num_nodes, "num_nodes", 0)
        if isinstance(dims, (str, bytes)) or not hasattr(dims, "__iter__"):
            raise ArgumentTypeError(explain("dims", "one width a table", repr(dims), "pass a list such as [64, 64]"))
        self.dims = tuple(check_count(dim, "dims", 0) for dim in dims)
        if not self.dims:
            raise ArgumentValueError(explain("dims", "at least one width", "none", "pass a list such as [64, 64]"))
        self.dtype = _dtype_name(dtype)
        if storage not in _STORAGES:
            raise ArgumentValueError(explain("storage", f"one of {_STORAGES}", repr(storage), 'leave it "auto"'))
        if storage == "mmap" and path is None:
            raise ArgumentTypeError(explain("path", "the file of a memory-mapped store", "none", "pass path="))
        self.device: Device = parse_device(device)
        self._depth = 4 * len(self.dims) if pool_size is None else check_count(pool_size, "pool_size", 1)
        self._buffer_rows = 0 if buffer_size is None else check_count(buffer_size, "buffer_size", 0)
        self.host_gather = check_flag(host_gather, "host_gather")
        self._shared: SharedTables | None = None
        if check_flag(shared, "shared"):
            storage = self._shareable(storage)
        self.storage = self._choose(storage, path)
        self.path = os.fspath(path) if self.storage == "mmap" and path is not None else None
        header = Header(self.num_nodes, self.dims, self.dtype, (0,) * len(self.dims))
        if shared:
            self._shared = SharedTables(header)
        if self.path is not None:
            header, arrays = self._map(self.path, header)
            self._start(header, arrays)
        else:
            self._start(header)

    @property
    def shared(self) -> bool:
        """Whether spawned processes have the same tables."""
        return self._shared is not None

    def _shareable(self, storage: str) -> str:
        """Return the storage of tables that processes share."""
        wanted = "pinned" if self.device.is_cuda else "device"
        if storage not in ("auto", "pinned", wanted):
            remedy = 'leave storage "auto", or make a store in each process'
            raise ArgumentValueError(explain("storage", '"pinned" for shared histories', repr(storage), remedy))
        return wanted

    def _choose(self, storage: str, path: Any) -> str:
        if storage != "auto":
            return storage
        itemsize = history_file.numpy_dtype(self.dtype).itemsize
        need = sum(self.num_nodes * (8 + dim * itemsize) for dim in self.dims)
        places = {"device": free_bytes(self.device), "pinned": host_free_bytes()} if self.device.is_cuda else {
            "device": host_free_bytes()
        }  # fmt: skip
        for place, free in places.items():
            if need <= _MEMORY_SHARE * free:
                return place
        free_text = f"{max(places.values()) / 2**30:.2f} GiB"
        if path is None:
            remedy = "pass path= to keep them in a file, or store float16"
            needs = f"{need / 2**30:.2f} GiB for histories"
            raise ArgumentValueError(explain("storage", needs, f"{free_text} of free memory", remedy))
        logger.info("histories of %.2f GiB are kept in %s: %s are free", need / 2**30, path, free_text)
        return "mmap"

    def _map(self, path: str, header: Header) -> tuple[Header, list[Any]]:
        if not os.path.exists(path):
            history_file.create(path, header)
        found = history_file.read_header(path)
        _same_sizes(path, found, header)
        history_file.mark(path, found, in_use=True)
        return found, history_file.tables(path, found, "r+")

    def _start(self, header: Header, arrays: Sequence[tuple[Any, Any]] = ()) -> None:
        """Make the tables: of the arrays of a file, of shared memory, or of zeros."""
        if self._shared is not None:
            arrays = self._shared.arrays
        pool = BufferPool()
        widest = max(self.dims) * history_file.numpy_dtype(self.dtype).itemsize
        made = [pool.empty((self._buffer_rows * widest,), np.uint8) for _ in range(self._depth)]
        del made  # they go back to the pool, to be used again
        tables: list[HostTable | CudaTable]
        lane: Lane | StreamLane = Lane(self._depth)
        # Writing to a file waits for its pages; memory is written at once, which is less work than a copy for later.
        queues = self.path is not None
        if self.device.is_cuda:
            from gglspeedup.history.place import cuda_tables

            tables, stream = cuda_tables(self.device, self.storage, header, arrays, pool, self.host_gather)
            lane, queues = (lane if stream is None else stream), True
        else:
            tables = [HostTable(stamps, rows, pool) for stamps, rows in arrays or empty_tables(header)]
        pushes = None if self._shared is None else self._shared.pushes
        self._common = Common(lane, queues, header, arrays, self.path, pushes)
        self._lane = lane
        self._tables = [History(table, self._common, index) for index, table in enumerate(tables)]

    def __getitem__(self, table: int) -> History:
        """Return a table."""
        return self._tables[table]

    def __len__(self) -> int:
        """Return the number of tables."""
        return len(self._tables)

    def __iter__(self) -> Iterator[History]:
        return iter(self._tables)

    def prefetch(self, n_id: Any) -> None:
        """Start the pulls of all tables; the next ``store[l].pull(n_id)`` of the same nodes returns what it brought.

        Rows are brought as they are now: later pushes are not seen.
        """
        for table in self._tables:
            table.prefetch(n_id)

    def synchronize(self) -> None:
        """Wait for all pushes and pulls; raise what a push in the background has raised."""
        self._lane.drain()

    def age(self, n_id: Any = None, table: int = 0) -> Ids:
        """Return how many pushes ago each row of a table was written, int64; -1 for never.

        Parameters
        ----------
        n_id : int array-like or tensor, optional
            Nodes; by default all.
        table : int
            Which table.
        """
        return self._tables[table].age(n_id)

    def staleness(self, n_id: Any = None, table: int = 0) -> Staleness:
        """Return a summary of :meth:`age`."""
        return Staleness.of(self.age(n_id, table))

    def _header(self) -> Header:
        return Header(self.num_nodes, self.dims, self.dtype, tuple(table.pushes for table in self._tables))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all tables to a file, with every push made before.

        A crash or a full disk while it is written leaves a file that was there before as it is.

        Raises
        ------
        HistoryFileError
            The disk has no room.
        ArgumentValueError
            It is the file that this store is mapped to.
        """
        target = os.fspath(path)
        if self.path is not None and os.path.exists(target) and os.path.samefile(target, self.path):
            raise ArgumentValueError(explain("path", "another file", "the store's own", "name a file for the copy"))
        with self._lane.lock:
            header = self._header()
            self._lane.run(lambda: history_file.write(target, header, [table.dump() for table in self._tables]))

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Take the rows and ages of a file that :meth:`save` has written.

        Raises
        ------
        HistoryFileError
            It is no such file, is damaged, or of other sizes.
        """
        source = os.fspath(path)
        header = history_file.read_header(source)
        _same_sizes(source, header, self._header())
        saved = history_file.tables(source, header, "r")
        with self._lane.lock:
            self._lane.run(lambda: self._copy(saved))
            self._common.pushes[:] = header.pushes
            for table in self._tables:
                table.forget()

    def _copy(self, saved: Sequence[tuple[Any, Any]]) -> None:
        for table, (stamps, rows) in zip(self._tables, saved, strict=True):
            table.fill(stamps, rows)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: DeviceLike = "auto", *, storage: str = "auto",
        pool_size: int | None = None, buffer_size: int | None = None,
    ) -> HistoryStore:  # fmt: skip
        """Return a store with the contents of a file that :meth:`save` has written; the file is not changed later.

        Raises
        ------
        HistoryFileError
            It is no such file, or is damaged.
        """
        header = history_file.read_header(os.fspath(path))
        store = cls(
            header.num_nodes, header.dims, device, storage=storage, dtype=header.dtype, pool_size=pool_size,
            buffer_size=buffer_size,
        )  # fmt: skip
        store.restore(path)
        return store

    def close(self) -> None:
        """Finish all pushes, write a mapped file out, and end the background thread; may be called again."""
        self._common.close()

    def __enter__(self) -> HistoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HistoryStore({self.num_nodes}, {list(self.dims)}, {str(self.device)!r}, dtype={self.dtype!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self.path is not None:
            needs, got = "one process for a mapped file", "a store to be pickled"
            raise ArgumentValueError(explain("store", needs, got, "save() it, and load() it in the other process"))
        with self._lane.lock:
            state = {name: value for name, value in self.__dict__.items() if name[0] != "_" or name in _PICKLED}
            if self._shared is not None:
                self._lane.drain()
                return {**state, "header": self._header(), "saved": None}
            saved = self._lane.run(lambda: [table.dump() for table in self._tables])
            return {**state, "header": self._header(), "saved": saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        header, saved = state.pop("header"), state.pop("saved")
        self.__dict__.update(state)
        parse_device(self.device)  # the process that unpickles may lack the device
        self._start(header)
        if saved is not None:
            self._lane.run(lambda: self._copy(saved))


_PICKLED = ("_depth", "_buffer_rows", "_shared")


def _dtype_name(dtype: Any) -> str:
    # A name, a NumPy or framework dtype (torch.float16), or a scalar type (numpy.float16).
    name = str(getattr(dtype, "__name__", dtype)).rsplit(".", 1)[-1]
    if name not in history_file.DTYPES:
        needs = f"one of {', '.join(history_file.DTYPES)}"
        raise ArgumentValueError(explain("dtype", needs, repr(dtype), 'leave it "float32"'))
    return name


def _same_sizes(path: str, found: Header, wanted: Header) -> None:
    if found[:3] != wanted[:3]:
        got = f"{found.num_nodes} nodes, dims {list(found.dims)} and {found.dtype} in {path!r}"
        needs = f"a file of {wanted.num_nodes} nodes, dims {list(wanted.dims)} and {wanted.dtype}"
        raise HistoryFileError(explain("path", needs, got, "name another file, or the sizes that it has"))
