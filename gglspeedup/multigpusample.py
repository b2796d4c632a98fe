"""`MultiGPUSampler`: one graph for all GPUs of a machine, sampled by each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gglspeedup.adjs import SampledBatch
from gglspeedup.arguments import check_count
from gglspeedup.device import DeviceLike, driver_devices, parse_device, parse_devices
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import GraphLike, as_graph
from gglspeedup.sharded_graph import ShardedGraph


class MultiGPUSampler:
    """Samples one graph, whose rows are dealt out to several devices, on any of them.

    Each device reads the shards of the others where they lie: in each other's memory if the GPUs have peer access, else
    in pinned host memory. Pickled into a spawned process, it attaches to the same memory. A rank's samples are those of
    a :class:`GPUSampler` with the same arguments, bit for bit.

    Parameters
    ----------
    device : str or int
        Where :meth:`sample` works that is given no rank: one of `devices`.
    csr : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph. Copied into the shards, unless it is mapped to a file and the devices are CPUs.
    devices : sequence of str or int, optional
        A device for each rank, which may repeat: all CUDA, or all ``"cpu"``. Default: every GPU that is there, or the
        one CPU.
    sizes, seed, replace, expand
        As GPUSampler's.

    Raises
    ------
    DeviceError
        A CUDA device is not there.
    ShareError
        There is not enough memory that processes can share.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    The process that made it has to live as long as others use shards in GPU memory. Threads may call it at once.

    Examples
    --------
    >>> from gglspeedup import CSRGraph, GPUSampler, MultiGPUSampler
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> sampler = MultiGPUSampler("cpu", graph, devices=["cpu", "cpu"])
    >>> sampler.set_size([2, 2])
    >>> [sampler.sample([seed], rank).n_id.tolist() for rank, seed in enumerate([1, 2])]
    [[1, 0, 2], [2, 0, 1]]
    """

    def __init__(
        self, device: DeviceLike, csr: GraphLike, devices: Sequence[DeviceLike] | None = None, *, sizes: Any = None,
        seed: int = 0, replace: bool = False, expand: str = "layer",
    ) -> None:  # fmt: skip
        first = parse_device(device)
        if devices is None:
            devices = list(range(driver_devices()[0])) if first.is_cuda else [first]
        self.devices = parse_devices(devices)
        if first not in self.devices:
            needs, got = f"one of the devices {[str(one) for one in self.devices]}", str(first)
            raise ArgumentValueError(explain("device", needs, got, "add it to devices"))
        self._default = self.devices.index(first)
        options: dict[str, Any] = {"seed": seed, "replace": replace, "expand": expand}
        GPUSampler("cpu", ([0], []), sizes, **options)  # checks them before memory is taken
        self.graph = ShardedGraph(as_graph(csr), self.devices)
        self._samplers = [GPUSampler(one, self.graph, sizes, **options) for one in self.devices]

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Fanouts, nearest the seeds first; -1 for all neighbours; None before :meth:`set_size`."""
        return self._samplers[0].sizes

    def set_size(self, sizes: Any) -> None:
        """Set the fanouts of all ranks, as :meth:`GPUSampler.set_size` does."""
        for sampler in self._samplers:
            sampler.set_size(sizes)

    def sampler(self, rank: int | None = None) -> GPUSampler:
        """Return the sampler of a rank, which reads the shared graph: what loaders take as their graph.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            There is no such rank.
        """
        if rank is None:
            return self._samplers[self._default]
        return self._samplers[check_count(rank, "rank", 0, len(self.devices))]

    def sample(
        self, seeds: Any, rank: int | None = None, *, batch: int | None = None, sizes: Any = None
    ) -> SampledBatch:  # fmt: skip
        """Sample the neighbourhoods of some nodes on the device of a rank.

        Parameters
        ----------
        seeds, batch, sizes
            As :meth:`GPUSampler.sample` takes them. Each rank counts its own batches, from 0.
        rank : int, optional
            Whose device; by default that of `device`.

        Returns
        -------
        SampledBatch
            Arrays of that device, as :meth:`GPUSampler.sample` returns them; its errors, too.
        """
        return self.sampler(rank).sample(seeds, batch, sizes=sizes)

    def __repr__(self) -> str:
        devices = [str(device) for device in self.devices]
        sizes = None if self.sizes is None else list(self.sizes)
        return f"MultiGPUSampler({devices}, {self.graph!r}, sizes={sizes}, seed={self._samplers[0].seed})"
