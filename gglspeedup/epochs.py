"""What loaders have in common: epochs of batches in a reproducible order, made ahead, handed to a framework."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_flag
from gglspeedup.device import Device, DeviceLike, parse_device
from gglspeedup.errors import DeviceError, explain
from gglspeedup.kernels.bounds import MAX_BATCH
from gglspeedup.prefetcher import Prefetcher
from gglspeedup.side_stream import SideStream
from gglspeedup.trace import CONVERSION, span

Made = TypeVar("Made")

_MAX_SEED = 1 << 64
_STAGES = ("sampling", "gathering")  # what a profile calls them


class EpochLoader(ABC, Generic[Made]):
    """An iterable over the batches of an epoch; every iterator takes the next one, with its first batch.

    A subclass sets `device`, and says how a batch is made, in three stages: :meth:`_sample_all`, :meth:`_gather` and
    :meth:`_convert`. The first two have a background thread each, and on a GPU a stream each; the third, which hands
    arrays to the framework, is done in the reader's thread.

    Parameters
    ----------
    items : int64 array [n]
        What epochs go over: node ids, or parts.
    batch_size : int
        Items a batch.
    shuffle, drop_last, backend, seed, prefetch, rank, world_size
        As NodeLoader's.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.
    """

    device: Device

    def __init__(
        self, items: npt.NDArray[np.int64], *, batch_size: int, shuffle: bool, drop_last: bool, backend: str, seed: int,
        prefetch: int, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.batch_size = check_count(batch_size, "batch_size", 1)
        self.shuffle = check_flag(shuffle, "shuffle")
        self.drop_last = check_flag(drop_last, "drop_last")
        self.prefetch = check_count(prefetch, "prefetch", 0)
        self.seed = check_count(seed, "seed", 0, _MAX_SEED)
        self.world_size = check_count(world_size, "world_size", 1)
        self.rank = check_count(rank, "rank", 0, self.world_size)
        self.backend = backend
        self._items = items
        self._epoch = 0

    @abstractmethod
    def _sample_all(self, epoch: int) -> Generator[Any, None, None]:
        """Give the nodes and edges of each batch of :meth:`_numbered`, on the device."""

    @abstractmethod
    def _gather(self, sampled: Any) -> Any:
        """Return what else a batch consists of, with what was sampled, as arrays of the device."""

    @abstractmethod
    def _convert(self, loaded: Any, adapter: ModuleType) -> Made:
        """Return the batch with arrays of the framework that the adapter is for."""

    @property
    def dataset(self) -> npt.NDArray[np.int64]:
        """The items, int64 [n], in the order given."""
        return self._items

    @property
    def epoch(self) -> int:
        """The epoch that the next iterator takes."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iterator takes; the one after that takes the next.

        Parameters
        ----------
        epoch : int
            From 0.
        """
        self._epoch = check_count(epoch, "epoch", 0)

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the items of this rank, int64, in the order in which an epoch visits them."""
        items, count = self._items, len(self._items)
        if self.shuffle:
            # Raw Philox words: NumPy promises them to stay the same in every version, unlike its permutations.
            words = np.random.Philox(key=self.seed, counter=epoch).random_raw(count)
            items = items[np.argsort(words, kind="stable")]
        if self.world_size == 1 or count == 0:
            return items
        return items[(self.rank + np.arange(-(-count // self.world_size)) * self.world_size) % count]

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        share = -(-len(self._items) // self.world_size)
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[Made]:
        # All of it when the first batch is asked for: an iterator that nobody reads from, as Lightning makes some to
        # see whether it can, takes no epoch and starts no thread.
        epoch, self._epoch = self._epoch, self._epoch + 1
        if self.device.index is None:
            sampled: Any = partial(self._sample_all, epoch)
            yield from self._convert_all(Prefetcher(sampled, self.prefetch, [self._gather], names=_STAGES))
            return
        gathering = SideStream(self.device.index)
        sampling = SideStream(self.device.index, gathering)
        sampled = partial(self._sample_on, epoch, sampling)
        gathered = Prefetcher(sampled, self.prefetch, [partial(self._gather_on, gathering)], names=_STAGES)
        yield from self._convert_all(self._handed_over(gathered, sampling, gathering))

    def _numbered(self, epoch: int) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
        """Give the items of each batch, and its number, which is unlike any other batch's."""
        order = self.order(epoch)
        for index in range(len(self)):
            items = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield items, ((epoch * len(self) + index) * self.world_size + self.rank) % MAX_BATCH

    def _sample_on(self, epoch: int, sampling: SideStream) -> Iterator[tuple[Any, Any]]:
        """Give what :meth:`_sample_all` makes on a stream, each with the mark at which it is whole."""
        with contextlib.closing(self._sample_all(epoch)) as batches:
            while True:
                with sampling.filling():
                    made = [(sampled, sampling.record()) for sampled in islice(batches, 1)]
                if not made:
                    return
                yield made.pop()  # a thread that waits for room holds no memory of the device

    def _gather_on(self, gathering: SideStream, sampled: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return what :meth:`_gather` makes on a stream, with the mark at which it is whole."""
        with gathering.filling(after=sampled[1]):
            return self._gather(sampled[0]), gathering.record()

    def _handed_over(self, gathered: Prefetcher, sampling: SideStream, gathering: SideStream) -> Iterator[Any]:
        """Give batches to the stream that is current for the framework in the reader's thread."""
        adapter = import_module("gglspeedup.adapters").backend(self.backend)
        for loaded, whole in gathered:
            reader = adapter.current_stream()
            sampling.read_on(reader)
            gathering.hand_over(whole, reader)
            yield loaded
            del loaded

    def _convert_all(self, batches: Iterable[Any]) -> Iterator[Made]:
        # In the reader's thread: a framework hands over to the stream that is current in a thread.
        adapter = import_module("gglspeedup.adapters").backend(self.backend)
        for loaded in batches:
            with span(CONVERSION):
                batch = self._convert(loaded, adapter)
            del loaded
            yield batch
            del batch


def device_for(backend: str, device: DeviceLike) -> Device:
    """Return the device to make batches on: one that the backend can read.

    Raises
    ------
    DeviceError
        The CUDA device is not there, or the backend cannot use it.
    ArgumentValueError, MissingPackageError
        There is no such backend, or it is not installed.
    """
    adapter = import_module("gglspeedup.adapters").backend(backend)
    found = parse_device(device)
    if found.index is None and backend == "cupy":
        raise DeviceError(explain("device", "a CUDA device for CuPy", f"{found}", 'take backend="numpy" on the CPU'))
    if found.index is None or adapter.sees_cuda(found.index):
        return found
    if device == "auto":
        return Device(None)
    needs = f"a device that the installed {backend} can use"
    raise DeviceError(explain("device", needs, f"{found}", f'install {backend} for CUDA, or pass device="cpu"'))
