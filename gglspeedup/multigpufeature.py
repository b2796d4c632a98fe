"""`Multi_CGPUFeature`: one copy of the features for all processes of a machine, hot rows dealt out to its GPUs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count
from gglspeedup.device import Device, DeviceLike, free_bytes, parse_devices
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.graph import GraphLike
from gglspeedup.interchange import integer_view
from gglspeedup.pieces import Pieces
from gglspeedup.shared_array import SharedArray
from gglspeedup.tiers_cpu import HostTier, Tiers

Array = npt.NDArray[Any]

_LAYOUTS = ("auto", "sharded", "replicated")


class Multi_CGPUFeature(CGPUFeature):
    """A feature matrix that several GPUs, and the processes that drive them, share.

    Hot rows are dealt out to the GPUs that can read each other's memory, so that more of them fit, and repeated on
    those that cannot. All other rows lie once in host memory, shared by all processes, or stay in the file that they
    are mapped to. Pickled into a spawned process, it attaches to the same memory.

    Parameters
    ----------
    rank : int
        Whose device rows are gathered on; see :meth:`on`.
    device_list : sequence of str or int
        A device for each rank, which may repeat: all CUDA, or all ``"cpu"``.
    budget : int, float or str
        Memory of each GPU for hot rows, in bytes or as ``"0.1G"``.
    csr : CSRGraph, ShardedGraph, scipy.sparse matrix or (indptr, indices)
        The graph whose nodes the rows belong to.
    policy, sampler, seeds, batch_size
        As CGPUFeature's.
    layout : str
        ``"sharded"``: hot rows are dealt out to all GPUs, which must have peer access; ``"replicated"``: each GPU has
        the hottest rows itself; ``"auto"``: dealt out among those that have peer access to each other.

    Raises
    ------
    DeviceError
        A CUDA device is not there.
    ShareError
        GPUs are to share their memory, and cannot.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    The process that made it has to live as long as others use rows in GPU memory. Statistics are those of one process.

    Examples
    --------
    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, Multi_CGPUFeature
    >>> features = Multi_CGPUFeature(0, ["cpu", "cpu"], "0.1G", CSRGraph([0, 1, 2], [1, 0]))
    >>> features.from_cpu_tensor(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))
    >>> features[[1, 0]].tolist(), features.on(1)[[1]].tolist()
    ([[3.0, 4.0], [1.0, 2.0]], [[3.0, 4.0]])
    """

    def __init__(
        self, rank: int, device_list: Sequence[DeviceLike], budget: int | float | str = 0, csr: GraphLike = None, *,
        policy: Any = "degree", sampler: Any = None, seeds: Any = None, batch_size: int = 1024, layout: str = "auto",
    ) -> None:  # fmt: skip
        self.devices: list[Device] = parse_devices(device_list, "device_list")
        self.rank = check_count(rank, "rank", 0, len(self.devices))
        if layout not in _LAYOUTS:
            raise ArgumentValueError(explain("layout", f"one of {_LAYOUTS}", repr(layout), 'leave it "auto"'))
        self.layout = layout
        super().__init__(
            csr, self.devices[self.rank], budget, policy=policy, sampler=sampler, seeds=seeds, batch_size=batch_size
        )  # fmt: skip
        self._shared: SharedArray | None = None
        self._hot: dict[int, tuple[npt.NDArray[np.int64], Pieces]] = {}

    def on(self, rank: int) -> Multi_CGPUFeature:
        """Return the same features, gathered on the device of another rank.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            There is no such rank.
        """
        other = copy.copy(self)
        other.rank = check_count(rank, "rank", 0, len(self.devices))
        other.device, other._tiers = self.devices[other.rank], None
        return other

    def _keep(self, rows: Array) -> None:
        mapped = isinstance(rows, np.memmap)
        shared = None if mapped else SharedArray.of(integer_view(rows)[0])
        kept = rows if shared is None else shared.array.view(rows.dtype)
        self._hot = self._load_hot(kept) if self.device.is_cuda else {}
        self._shared, self._rows, self._tiers = shared, kept, None

    def _load_hot(self, rows: Array) -> dict[int, tuple[npt.NDArray[np.int64], Pieces]]:
        """Return for each CUDA device the order of the hot rows that it reads, and where they lie."""
        from gglspeedup.peer_gpu import PeerArray, cliques
        from gglspeedup.placement import room_for_rows

        assert self._order is not None
        bits, _ = integer_view(rows)
        row_bytes = max(1, bits[:1].nbytes)
        indices = list(dict.fromkeys(device.index for device in self.devices if device.index is not None))
        found = {}
        for group in cliques(indices, self.layout):
            room = [room_for_rows(self.budget, bits, free_bytes(Device(index)), index) for index in group]
            counts = np.minimum(np.cumsum([size // row_bytes for size in room]), len(rows))
            first = np.concatenate([[0], counts])
            # All rows lie in the order of their nodes, which then need no slots.
            order = np.arange(len(rows)) if counts[-1] == len(rows) else self._order
            ranges = zip(first[:-1].tolist(), first[1:].tolist(), group, strict=True)
            parts = [PeerArray(HostTier(bits).take(order[begin:end]), index) for begin, end, index in ranges]
            found.update(dict.fromkeys(group, (order, Pieces(first, parts, np.dtype((np.void, row_bytes))))))
        return found

    def _make_tiers(self, rows: Array) -> Tiers:
        bits, _ = integer_view(rows)
        if self.device.index is None:
            return HostTier(bits)
        from gglspeedup.placement import place_shared_rows, runtime_of

        return place_shared_rows(bits, *self._hot[self.device.index], runtime_of(self.device))

    def __repr__(self) -> str:
        return f"Multi_{super().__repr__()[:-1]}, rank={self.rank} of {len(self.devices)})"

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._shared is not None and self._rows is not None:
            state["_rows"] = self._rows.dtype  # on memory that is shared
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        dtype, shared = state["_rows"], state["_shared"]
        if shared is not None:
            state["_rows"] = None
        super().__setstate__(state)
        if shared is not None:
            self._rows = shared.array.view(dtype)
