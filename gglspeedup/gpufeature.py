"""`CGPUFeature`: node features, hot rows near, cold rows far, gathered by one call."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import host_array
from gglspeedup.device import Device, DeviceLike, free_bytes, parse_device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.graph import GraphLike
from gglspeedup.hot_order import hot_order
from gglspeedup.interchange import integer_view, is_numeric
from gglspeedup.memory import parse_size
from gglspeedup.sharded_graph import as_any_graph
from gglspeedup.threads import lock_of
from gglspeedup.tiers_cpu import HostTier, Tiers
from gglspeedup.trace import watch

Array = npt.NDArray[Any]


class CGPUFeature:
    """A feature matrix whose hottest rows are cached on a GPU; the rest is read where it lies.

    On a GPU the rows beyond the budget stay in pinned host memory, read in place by the same kernel, or on disk if
    they are a ``numpy.memmap``. On the CPU there is one tier, and the budget has no effect.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph whose nodes the rows belong to.
    device : str or int
        ``"cpu"``, a CUDA ordinal, ``"cuda:1"``, or ``"auto"``.
    budget : int, float or str
        GPU memory for hot rows, in bytes or as ``"0.1G"``, ``"512MB"``, ``"64K"``.
    policy : str or int array-like
        Which rows are hot: ``"degree"``, ``"presample"`` (GNNLab's, with `sampler` and `seeds`), or node ids,
        hottest first.
    sampler, seeds, batch_size
        For ``"presample"``: a GPUSampler with its sizes set, the seeds of an epoch, and seeds a batch.

    Raises
    ------
    DeviceError
        The CUDA device is not there.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import CGPUFeature, CSRGraph
    >>> features = CGPUFeature(CSRGraph([0, 1, 2], [1, 0]), "cpu", "0.1G")
    >>> features.from_cpu_tensor(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    >>> features[[1, 0, 1]].tolist()
    [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    >>> features.shape, features.dim(), features.hit_rate
    ((2, 2), 2, 1.0)
    """

    def __init__(
        self, csr: GraphLike, device: DeviceLike, budget: int | float | str = 0, *, policy: Any = "degree",
        sampler: Any = None, seeds: Any = None, batch_size: int = 1024,
    ) -> None:  # fmt: skip
        self.device: Device = parse_device(device)
        self.budget = parse_size(budget, "budget")
        graph = as_any_graph(csr)
        self._num_nodes = graph.num_nodes
        self._order: npt.NDArray[np.int64] | None = None
        if self.device.is_cuda or not (isinstance(policy, str) and policy == "degree"):
            # The CPU has one tier, and no use for an order; a policy of the user's is checked all the same.
            order = hot_order(graph, policy, sampler, seeds, batch_size)
            self._order = order if self.device.is_cuda else None
        self._rows: Array | None = None
        self._tiers: Tiers | None = None
        self._lock = lock_of(self)

    def from_cpu_tensor(self, x: Any) -> None:
        """Take the feature matrix.

        Parameters
        ----------
        x : array or tensor [num_nodes] or [num_nodes, F]
            In host memory, of any framework and any numeric dtype, which is kept; also a ``numpy.memmap``, which stays
            on disk. It is not copied where it is C-contiguous: do not change it afterwards.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            Another shape, or no numeric dtype.
        """
        rows = host_array(x, "x")
        if rows.ndim not in (1, 2) or len(rows) != self._num_nodes:
            needs = f"shape [{self._num_nodes}] or [{self._num_nodes}, F], a row for each node"
            raise ArgumentValueError(explain("x", needs, f"shape {rows.shape}", "check that it belongs to the graph"))
        if not is_numeric(rows.dtype):
            raise ArgumentTypeError(explain("x", "a numeric dtype", f"dtype {rows.dtype}", "convert it first"))
        if not (rows.flags.c_contiguous and rows.flags.aligned and rows.dtype.isnative):
            rows = np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))
        self._keep(rows)

    def _keep(self, rows: Array) -> None:
        """Take rows that are known to be usable."""
        self._tiers = self._make_tiers(rows)
        self._rows = rows

    def _make_tiers(self, rows: Array) -> Tiers:
        rows, _ = integer_view(rows)  # to the tiers rows are bytes, and not all of them know bfloat16
        if self._order is None:
            return HostTier(rows)
        from gglspeedup.placement import place_rows, runtime_of

        return place_rows(rows, self._order, runtime_of(self.device), self.budget, free_bytes(self.device))

    def __getitem__(self, n_id: Any) -> Any:
        """Return the rows of some nodes.

        Parameters
        ----------
        n_id : int array-like or tensor [n]
            Node ids of any framework, on the host or on this device; repeated ids are allowed.

        Returns
        -------
        array [n] or [n, F]
            NumPy or, on a GPU, CuPy (on the current CuPy stream): a buffer of its own, 64-byte aligned, used again once
            all that shares it is gone.

        Raises
        ------
        ArgumentIndexError
            An id is out of range; the first such one is named.
        ArgumentTypeError, ArgumentValueError
            They are not integers or not one-dimensional, or no features are loaded.
        """
        tiers, rows = self._loaded()
        watch(self)
        return _of_dtype(tiers.gather(n_id), rows.dtype)

    def take(self, n_id: Any) -> Any:
        """Return the rows of ids that a sampler made, as indexing does, without looking at the ids.

        Parameters
        ----------
        n_id : int64 array [n]
            NumPy or, on a GPU, CuPy on this device; contiguous and in range, as the `n_id` of a sample is.

        Returns
        -------
        array [n] or [n, F]
            As indexing returns it.

        Raises
        ------
        ArgumentValueError
            No features are loaded.
        """
        tiers, rows = self._loaded()
        watch(self)
        return _of_dtype(tiers.take(n_id), rows.dtype)

    def count(self, rows: Any) -> None:
        """Count rows as served, in :meth:`stats`, that a fork of this process has taken on the CPU.

        Parameters
        ----------
        rows : array [n] or [n, F]
            What :meth:`take` has returned there; only its length is looked at.

        Raises
        ------
        ArgumentValueError
            No features are loaded.
        """
        tiers, _ = self._loaded()
        watch(self)
        if isinstance(tiers, HostTier):
            tiers.count(len(rows))

    def _loaded(self) -> tuple[Tiers, Array]:
        if self._rows is None:
            raise ArgumentValueError(explain("features", "to be loaded first", "none", "call from_cpu_tensor(x)"))
        if self._tiers is None:
            with self._lock:
                self._tiers = self._tiers or self._make_tiers(self._rows)
        return self._tiers, self._rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the feature matrix."""
        return tuple(self._loaded()[1].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the feature matrix."""
        return self._loaded()[1].dtype

    def dim(self) -> int:
        """Return the width of a row, 1 for a vector of scalars."""
        shape = self.shape
        return shape[1] if len(shape) == 2 else 1

    @property
    def hit_rate(self) -> float:
        """The fraction of the rows served so far that came from the fastest tier; 0.0 before the first."""
        served = list(self._loaded()[0].rows_served().values())
        return served[0] / sum(served) if sum(served) else 0.0

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the rows and bytes that each tier has served, fastest tier first.

        Examples
        --------
        >>> import numpy as np
        >>> from gglspeedup import CGPUFeature, CSRGraph
        >>> features = CGPUFeature(CSRGraph([0, 1], [0]), "cpu")
        >>> features.from_cpu_tensor(np.zeros((1, 16), np.float32))
        >>> rows = features[[0, 0]]
        >>> features.stats()
        {'host': {'rows': 2, 'bytes': 128}}
        """
        tiers, rows = self._loaded()
        row_bytes = rows[:1].nbytes
        return {name: {"rows": count, "bytes": count * row_bytes} for name, count in tiers.rows_served().items()}

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        loaded = "nothing loaded" if self._rows is None else f"shape={self.shape}, dtype={self.dtype}"
        return f"CGPUFeature(device={str(self.device)!r}, {loaded}, budget={self.budget} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_tiers", "_lock")}
        rows = self._rows
        if isinstance(rows, np.memmap) and isinstance(rows.base, mmap.mmap) and rows.filename is not None:
            # A spawned process opens the file itself: nothing is copied. (A slice of a memmap has another base, and
            # its offset is not its own: that one is pickled by value.)
            state["_rows"] = _Mapped(os.fspath(rows.filename), rows.dtype, rows.offset, rows.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        parse_device(self.device)  # the process that unpickles may lack the device
        self._lock = lock_of(self)
        self._tiers = None  # made when they are needed
        if isinstance(self._rows, _Mapped):
            self._rows = self._rows.open()


def _of_dtype(gathered: Any, dtype: np.dtype[Any]) -> Any:
    return gathered if gathered.dtype == dtype else gathered.view(dtype)


class _Mapped:
    """Where a memory-mapped matrix lies."""

    def __init__(self, path: str, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.offset, self.shape = path, dtype, offset, shape

    def open(self) -> np.memmap[Any, Any]:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
