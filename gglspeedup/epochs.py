"""What loaders have in common: epochs of batches in a reproducible order, made ahead, handed to a framework."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_flag
from gglspeedup.device import Device, DeviceLike, parse_device
from gglspeedup.errors import ArgumentValueError, DeviceError, explain
from gglspeedup.kernels.bounds import MAX_BATCH
from gglspeedup.prefetch import Prefetched
from gglspeedup.prefetcher import Prefetcher
from gglspeedup.side_stream import SideStream
from gglspeedup.trace import CONVERSION, Read, span
from gglspeedup.workers import Workers

if TYPE_CHECKING:
    from typing_extensions import Self

Made = TypeVar("Made")
Numbered = tuple[npt.NDArray[np.int64], int]  # the items of a batch, and its number

_MAX_SEED = 1 << 64
_STAGES = ("sampling", "gathering")  # what a profile calls them


class EpochLoader(ABC, Generic[Made]):
    """An iterable over the batches of an epoch; every iterator takes the next one, with its first batch.

    A subclass sets `device`, `features` and `labels`, and says how a batch is made, in three stages:
    :meth:`_sample_all`, :meth:`_gather` and :meth:`_convert`. The first two have a background thread each, and on a GPU
    a stream each; the third, which hands arrays to the framework, is done in the reader's thread.

    Parameters
    ----------
    items : int64 array [n]
        What epochs go over: node ids, or parts.
    batch_size : int
        Items a batch.
    shuffle, drop_last, backend, seed, prefetch, rank, world_size
        As NodeLoader's.
    workers : int
        As NodeLoader's.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it.
    """

    device: Device
    features: Any
    labels: Any

    def __init__(
        self, items: npt.NDArray[np.int64], *, batch_size: int, shuffle: bool, drop_last: bool, backend: str, seed: int,
        prefetch: int, rank: int, world_size: int, workers: int = 0,
    ) -> None:  # fmt: skip
        self.batch_size = check_count(batch_size, "batch_size", 1)
        self.shuffle = check_flag(shuffle, "shuffle")
        self.drop_last = check_flag(drop_last, "drop_last")
        self.prefetch = check_count(prefetch, "prefetch", 0)
        self.seed = check_count(seed, "seed", 0, _MAX_SEED)
        self.world_size = check_count(world_size, "world_size", 1)
        self.rank = check_count(rank, "rank", 0, self.world_size)
        self.backend = backend
        self.workers = check_count(workers, "workers", 0)
        if self.workers and not self.prefetch:
            needs, remedy = "batches that are made ahead, with workers", "pass 1 or more, or leave workers out"
            raise ArgumentValueError(explain("prefetch", needs, self.prefetch, remedy))
        # As many batches each as the stages' threads hold: two queues, and one that either stage is at.
        self._team = Workers(self.workers, 2 * self.prefetch + 2)
        self._items = items
        self._epoch = 0

    def _made_on(self, device: Device) -> Device:
        """Return the device; raise ArgumentValueError if workers cannot make batches there."""
        if self.workers and device.is_cuda:
            needs, remedy = f"0 on {device}, whose streams overlap", 'leave it out, or pass device="cpu"'
            raise ArgumentValueError(explain("workers", needs, self.workers, remedy))
        return device

    @abstractmethod
    def _sample_all(self, numbered: Iterable[Numbered]) -> Generator[Any, None, None]:
        """Give the nodes and edges of each of some batches, by their items and number, on the device."""

    @abstractmethod
    def _gather(self, sampled: Any) -> Any:
        """Return what else a batch consists of, with what was sampled, as arrays of the device."""

    def _in_order(self, batch_size: int | None) -> Self:
        """Return a copy that visits all of its items in their order, in batches of another size if one is given."""
        other = copy.copy(self)
        other.batch_size = self.batch_size if batch_size is None else check_count(batch_size, "batch_size", 1)
        other.shuffle = other.drop_last = False
        other._team = copy.copy(self._team)  # it makes other batches
        other._epoch = 0
        return other

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
            numbered = self._numbered(epoch)
            yield from self._convert_all(self._worked(numbered) if self._team.count else self._loaded(numbered))
            return
        gathering = SideStream(self.device.index)
        sampling = SideStream(self.device.index, gathering)
        sampled = partial(self._sample_on, self._numbered(epoch), sampling)
        gathered = Prefetcher(sampled, self.prefetch, [partial(self._gather_on, gathering)], names=_STAGES)
        yield from self._convert_all(self._handed_over(gathered, sampling, gathering))

    def _loaded(self, numbered: Iterable[Numbered]) -> Iterator[Any]:
        """Give batches as arrays of the host, made in threads of this process."""
        return iter(Prefetcher(partial(self._sample_all, numbered), self.prefetch, [self._gather], names=_STAGES))

    def _made_here(self, numbered: Iterable[Numbered]) -> Iterator[Any]:
        """Give the same in a worker: where it is the only one, another thread samples."""
        batches: Any = self._sample_each(numbered)
        if self._team.count == 1:
            batches = Prefetched(batches, self.prefetch)
        with contextlib.closing(batches):
            for index, sampled in enumerate(batches):
                with span(_STAGES[1], index):
                    loaded = self._gather(sampled)
                del sampled
                yield loaded
                del loaded

    def _sample_each(self, numbered: Iterable[Numbered]) -> Generator[Any, None, None]:
        """Sample one batch at a time: what a worker waits for until it is asked for the next is no sampling."""
        for index, batch in enumerate(numbered):
            with span(_STAGES[0], index):
                (sampled,) = self._sample_all([batch])
            yield sampled
            del sampled

    def _worked(self, numbered: Iterable[Numbered]) -> Iterator[Any]:
        """Give the same, made in processes."""
        with contextlib.closing(Read(self._team.each(numbered, self._made_here, self._prepare))) as batches:
            for loaded in batches:
                for rows, read in ((self.features, loaded.x), (self.labels, loaded.y)):
                    if rows is not None:
                        rows.count(read)  # by another process than the one whose statistics are asked for
                yield loaded
                del loaded

    def _prepare(self) -> None:
        """Load the kernels, by a batch of nothing."""
        for sampled in self._sample_all([(self._items[:0], 0)]):
            self._gather(sampled)

    def _numbered(self, epoch: int) -> Iterator[Numbered]:
        """Give the items of each batch, and its number, which is unlike any other batch's."""
        order = self.order(epoch)
        for index in range(len(self)):
            items = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield items, ((epoch * len(self) + index) * self.world_size + self.rank) % MAX_BATCH

    def _sample_on(self, numbered: Iterable[Numbered], sampling: SideStream) -> Iterator[tuple[Any, Any]]:
        """Give what :meth:`_sample_all` makes on a stream, each with the mark at which it is whole."""
        with contextlib.closing(self._sample_all(numbered)) as batches:
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
