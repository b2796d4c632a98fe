"""`DistFeature`: node features whose rows lie on several ranks, with copies of the hottest remote ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import gglspeedup
from gglspeedup.arguments import host_array
from gglspeedup.device import DeviceLike, free_bytes, parse_device
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective, most_of_all
from gglspeedup.distributed.communicator import Communicator, Ids
from gglspeedup.distributed.hot_rows import by_degree, by_list, by_presampling, own_order
from gglspeedup.distributed.part import GraphPart
from gglspeedup.distributed.rows import Cache, RowExchange, Source, book_of
from gglspeedup.distributed.sampler import check_parts
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.interchange import integer_view, is_numeric
from gglspeedup.memory import parse_size
from gglspeedup.tiers_cpu import HostTier

Array = npt.NDArray[Any]

_TIERS = ("own", "cached", "remote")
_FILL_BYTES = 1 << 26  # of a cache that are fetched at a time


class DistFeature:
    """A feature matrix of which each rank holds the rows of its part.

    Every rank asks for rows together with the others, each for nodes of its own. Own rows are read where they lie;
    a remote row travels once a call, however often it is asked for, unless the cache has it.

    With a CUDA device the hot rows of the part and the cache lie in its memory, and answers are gathered and put
    together there, on the current CuPy stream. The other rows of the part are read in place from pinned host memory, or
    from disk. Ids are dealt out on the host. Rows travel from GPU to GPU if all ranks have one, and communicators that
    take its arrays (NcclCommunicator, made for that device, or ``MpiCommunicator(device_buffers=True)``); otherwise
    they are copied to the host, which waits, and back.

    Parameters
    ----------
    part_or_book : GraphPart or PartBook
        Who owns which row; rank i has part i.
    communicator : Communicator
        Of all ranks; to be used by one thread at a time.
    rows : array or tensor [n] or [n, F], optional
        Those of this part, in rising order of their nodes; any numeric dtype, the same on all ranks; also a
        ``numpy.memmap``. By default the features of the part on disk.
    cache : int, float or str
        Memory for copies of remote rows, in bytes or as ``"0.1G"``, of the device; may differ from rank to rank.
    policy : str or int array-like
        Which ones: ``"presample"`` (those in the most batches of an epoch of this rank, with `sampler` and `seeds`),
        ``"degree"`` (with a GraphPart), or nodes, hottest first.
    sampler, seeds, batch_size
        For ``"presample"``: a DistSampler with its sizes set, the seeds of this rank, and seeds a batch.
    device : str or int
        Where rows are returned: ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``; may differ from rank to rank.
    budget : int, float or str
        GPU memory for rows of the part, beside `cache`; which, a `policy` that lists nodes says, then their degree
        with a GraphPart, or else their order. On the CPU it has no effect.

    Raises
    ------
    DeviceError
        The CUDA device is not there, or fails; the other ranks raise RankError.
    RankError
        Ranks have different partitions, dtypes or widths; all ranks say so.
    CommunicatorError
        A rank has died, or did not come.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it, and the other ranks raise RankError.

    Examples
    --------
    >>> from gglspeedup.distributed import DistFeature, LocalCommunicator, PartBook
    >>> features = DistFeature(PartBook.contiguous([0, 2]), LocalCommunicator(), np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> features[[1, 0, 1]].tolist(), features.shape, features.hit_rate
    ([[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]], (2, 2), 1.0)
    """

    def __init__(
        self, part_or_book: GraphPart | PartBook, communicator: Communicator, rows: Any = None, *,
        cache: int | float | str = "0", policy: Any = "presample", sampler: Any = None, seeds: Any = None,
        batch_size: int = 1024, device: DeviceLike = "cpu", budget: int | float | str = 0,
    ) -> None:  # fmt: skip
        collective = self._collective = Collective(communicator)
        self._served = np.zeros(len(_TIERS), np.int64)
        self._cache: Cache | None = None
        self._on_device: Any = None  # DeviceRows

        def take() -> Ids:
            self._take_rows(part_or_book, rows, cache)
            self._place(part_or_book, policy, device, budget)
            return np.empty((collective.size, 0), np.int64)

        with collective.together():
            collective.counts("DistFeature(...)", take)
            room = self._agree(part_or_book, policy)
            if room:
                self._fill(self._hottest(part_or_book, policy, room, sampler, seeds, batch_size))
            if self._on_device is not None:
                self._on_device.synchronize()  # a loader's threads have streams of their own

    def _take_rows(self, part_or_book: GraphPart | PartBook, rows: Any, cache: int | float | str) -> None:
        book, rank = book_of(part_or_book), self._collective.rank
        if rows is None:
            rows = part_or_book.features if isinstance(part_or_book, GraphPart) else None
            if rows is None:
                remedy = "pass rows, or partition the graph with its features"
                raise ArgumentTypeError(explain("rows", "the features of this rank's nodes", "none", remedy))
        given = host_array(rows, "rows")
        count = book.count_of(rank) if rank < book.num_parts else 0
        if given.ndim not in (1, 2) or (len(given) != count and rank < book.num_parts):
            needs = f"shape [{count}] or [{count}, F], a row for each node of part {rank}"
            raise ArgumentValueError(explain("rows", needs, f"shape {given.shape}", "pass those of this part alone"))
        if not is_numeric(given.dtype):
            raise ArgumentTypeError(explain("rows", "a numeric dtype", f"dtype {given.dtype}", "convert it first"))
        if not (given.flags.c_contiguous and given.flags.aligned and given.dtype.isnative):
            given = np.ascontiguousarray(given, given.dtype.newbyteorder("="))
        self.book, self.dtype = book, given.dtype
        self._rows, _ = integer_view(given)  # rows are bytes, and not all that carry them know bfloat16
        self._row_bytes = self._rows.itemsize * int(np.prod(self._rows.shape[1:], dtype=np.int64))
        self._room = parse_size(cache, "cache") // max(1, self._row_bytes)

    def _place(
        self, part_or_book: GraphPart | PartBook, policy: Any, device: DeviceLike, budget: int | float | str
    ) -> None:  # fmt: skip
        """Put the rows where they are to be served from."""
        self.device = parse_device(device)
        size = parse_size(budget, "budget")
        if not self.device.is_cuda:
            self._tier = HostTier(self._rows)
            return
        communicator = self._collective.communicator
        if communicator.device_index not in (None, self.device.index):
            needs = f"cuda:{communicator.device_index}, which the {type(communicator).__name__} was made for"
            remedy = "make that current, as with cupy.cuda.Device(index).use(), before the communicator is made"
            raise ArgumentValueError(explain("device", needs, f"{self.device}", remedy))
        from gglspeedup.distributed.rows_gpu import DeviceRows
        from gglspeedup.placement import runtime_of

        others = self.book.num_nodes - len(self._rows)
        order = own_order(part_or_book, self._collective.rank, policy)
        reserved = min(self._room, others) * self._row_bytes
        free = free_bytes(self.device) - reserved
        self._on_device = DeviceRows(self._rows, order, runtime_of(self.device), size, free)

    def _agree(self, part_or_book: GraphPart | PartBook, policy: Any) -> int:
        """Compare with the other ranks; return the rows of the largest cache."""
        book = self.book
        facts = {
            "version": gglspeedup.__version__,
            "nodes": book.num_nodes,
            "parts": book.num_parts,
            "partition": book.checksum(),
            "dtype": str(self.dtype),
            "row shape": list(self._rows.shape[1:]),
            "policy": policy if isinstance(policy, str) else "a list of nodes",
        }
        index = part_or_book.index if isinstance(part_or_book, GraphPart) else self._collective.rank
        takes = self.device.is_cuda and self._collective.communicator.device_buffers
        said = self._collective.same("DistFeature", facts, {"part": index, "room": self._room, "takes": takes})
        check_parts([own["part"] for own in said], book.num_parts, self._collective.size)
        self._exchange = RowExchange(book, self._collective)
        self._by_device = all(own["takes"] for own in said)
        return int(max(own["room"] for own in said))

    def _hottest(
        self, part_or_book: GraphPart | PartBook, policy: Any, room: int, sampler: Any, seeds: Any, batch_size: int
    ) -> Ids:
        collective = self._collective
        if not isinstance(policy, str):
            return by_list(collective, self.book, policy)
        if policy == "degree":
            return by_degree(collective, part_or_book, room)
        return by_presampling(collective, self.book, policy, sampler, seeds, batch_size)

    def _fill(self, hottest: Ids) -> None:
        """Fetch the rows of remote nodes, hottest first, as many as there is room for."""
        nodes = hottest[: self._room]
        if self._on_device is None:
            rows = np.empty((len(nodes), *self._rows.shape[1:]), self._rows.dtype)
        else:
            rows = self._on_device.empty(len(nodes))
        at_a_time = max(1, _FILL_BYTES // max(1, self._row_bytes))
        for index in range(most_of_all(self._collective.communicator, -(-len(nodes) // at_a_time))):
            begin = index * at_a_time
            (part,) = self._fetch("the filling of caches", [nodes[begin : begin + at_a_time]])[0]
            rows[begin : begin + len(part)] = part
        self._cache = Cache(nodes, rows)

    def _fetch(self, step: str, n_ids: Sequence[Any]) -> tuple[list[Any], Ids]:
        if self._on_device is not None:
            fetched: tuple[list[Any], Ids] = self._on_device.fetch(
                self._exchange, step, n_ids, self._cache, self._by_device
            )
            return fetched
        source = Source(lambda rows: (self._rows, rows), self._tier.take)
        found, served = self._exchange.fetch(step, n_ids, [source], self._cache)
        return [rows for (rows,) in found], served

    def __getitem__(self, n_id: Any) -> Any:
        """Return the rows of some nodes; collective.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Nodes of the whole graph, also repeated, and those of several batches one after the other: what is asked
            for twice in a call travels once. None at all, if other ranks have batches left and this one has not. Ids on
            a GPU are copied to the host.

        Returns
        -------
        array [n] or [n, F]
            NumPy or, on a GPU, CuPy (on the current CuPy stream): a buffer of its own, 64-byte aligned, used again once
            all that shares it is gone.

        Raises
        ------
        ArgumentIndexError, ArgumentTypeError, ArgumentValueError
            They are no ids of nodes; the first one out of range is named.
        RankError
            Those of another rank are not; the message says which, and why.
        CommunicatorError
            A rank has died, did not come, or makes another call.
        """
        return self.take_many([n_id])[0]

    take = __getitem__

    def take_many(self, n_ids: Sequence[Any]) -> list[Any]:
        """Return the rows of several lists of nodes, in as many messages as one takes; collective.

        Parameters
        ----------
        n_ids : sequence of int array-like or tensor [n]
            As many or as few as this rank has, each as indexing takes it; a row that several need travels once.

        Returns
        -------
        list of array [n] or [n, F]
            Of each list, as indexing returns it; that also says what is raised.
        """
        with self._collective.together():
            found, served = self._fetch("DistFeature[...]", n_ids)
        self._served += served
        return [rows if rows.dtype == self.dtype else rows.view(self.dtype) for rows in found]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole matrix."""
        return (self.book.num_nodes, *self._rows.shape[1:])

    def dim(self) -> int:
        """Return the width of a row, 1 for a vector of scalars."""
        return int(self._rows.shape[1]) if self._rows.ndim == 2 else 1

    @property
    def cached(self) -> int:
        """How many remote rows this rank keeps copies of."""
        return 0 if self._cache is None else len(self._cache.rows)

    @property
    def hit_rate(self) -> float:
        """The fraction of the rows served so far that did not travel; 0.0 before the first."""
        served = int(self._served.sum())
        return float(1 - self._served[2] / served) if served else 0.0

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the rows and bytes that were served to this rank: its own, cached, and from other ranks."""
        counts = zip(_TIERS, self._served.tolist(), strict=True)
        return {name: {"rows": rows, "bytes": rows * self._row_bytes} for name, rows in counts}

    def traffic(self) -> dict[str, dict[str, int]]:
        """Return what this rank has sent to others and received: bytes of counts, ids and rows, and messages."""
        return self._collective.traffic_by_kind()

    def __len__(self) -> int:
        return self.book.num_nodes

    def __repr__(self) -> str:
        where = f"rank {self._collective.rank} of {self._collective.size}"
        on = f", device='{self.device}'" if self.device.is_cuda else ""
        return f"DistFeature({where}, shape={self.shape}, dtype={self.dtype}, {self.cached} rows cached{on})"
