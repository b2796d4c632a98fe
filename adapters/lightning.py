"""PyTorch Lightning: a data module over NodeLoader, and what a model with histories needs beside its checkpoints.

That over SubgraphLoader is in `lightning_subgraphs`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gglspeedup.adjs import Adj
from gglspeedup.device import DeviceLike, parse_device
from gglspeedup.epochs import EpochLoader
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import GraphLike, as_graph
from gglspeedup.history.store import HistoryStore
from gglspeedup.loader import Batch, NodeLoader
from gglspeedup.subgraphs import SubgraphBatch

# A Trainer knows the classes of its own package alone, and two packages hold the same code.
_OLD_NAME = find_spec("lightning") is None and find_spec("pytorch_lightning") is not None
pl: Any = import_module("pytorch_lightning" if _OLD_NAME else "lightning.pytorch")


class LoaderDataModule(pl.LightningDataModule):  # type: ignore[misc]
    """What data modules over loaders have in common: where batches are made, which epoch it is, how they are moved.

    Parameters
    ----------
    device : str or int, optional
        Where batches are made, if not on the Trainer's device.
    options : dict
        For the loader; those that a Trainer decides on are refused.
    **arrays
        Graph, features and labels by their names; what lies on a device already is refused.
    """

    def __init__(self, device: DeviceLike | None, options: dict[str, Any], **arrays: Any) -> None:
        super().__init__()
        for name in {"backend", "rank", "world_size"} & options.keys():
            raise ArgumentTypeError(explain(name, "to be left out", repr(options[name]), "the Trainer decides on it"))
        if options.get("memory_limit") is not None:
            got, remedy = repr(options["memory_limit"]), "a Trainer steps after every part of a split batch"
            raise ArgumentTypeError(explain("memory_limit", "to be left out", got, remedy))
        for name, given in arrays.items():
            if isinstance(given, (GPUSampler, CGPUFeature)):
                remedy = "pass the graph or the array itself: the Trainer decides on the device"
                raise ArgumentTypeError(explain(name, "what belongs to no device yet", type(given).__name__, remedy))
        self._device = None if device is None else parse_device(device)
        self._made: tuple[dict[str, Any], Any] | None = None

    def _make(self, **place: Any) -> EpochLoader[Any]:
        """Return the loader of training for a device, a rank and a number of processes."""
        raise NotImplementedError

    def _loader(self) -> Any:
        """Return the loader of this process and its device; once made, graph and features stay there."""
        place: dict[str, Any] = {"device": "cpu"}
        if self.trainer is not None:
            root = self.trainer.strategy.root_device
            place = {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
            place["device"] = f"cuda:{root.index or 0}" if root.type == "cuda" else "cpu"
        if self._device is not None:
            place["device"] = self._device
        if self._made is None or self._made[0] != place:
            self._made = None  # frees what the old one holds on a device
            self._made = place, self._make(**place)
        return self._made[1]

    def _reached(self) -> tuple[int, int]:
        """Return the epoch that training is in, and how many of its batches it has had."""
        if self.trainer is None or self.trainer.overfit_batches:
            return 0, 0
        return self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1

    def _leave_out(self, stage: str, base: type) -> None:
        """Let a Trainer find no loader for a stage, unless a subclass of `base` brings one."""
        method = f"{stage}_dataloader"
        if getattr(type(self), method) is getattr(base, method):
            setattr(self, method, None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return a batch itself if it lies on the device, else a copy there."""
        if not isinstance(batch, (Batch, SubgraphBatch)):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if batch.n_id.device == device:
            return batch
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return type(batch)(**{name: _moved(value, device) for name, value in fields.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a spawned process has a place of its own


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, (torch.Tensor, Adj)) else value


class NodeDataModule(LoaderDataModule):
    """Gives an unmodified Trainer the batches of NodeLoaders, made on the device that the Trainer trains on.

    Epoch k of a training has the batches of epoch k of ``NodeLoader(..., backend="torch")``, also when it is resumed
    from a checkpoint, even one from within an epoch; the batches before it are then made again, and dropped. Nothing
    is copied between host and device but what NodeLoader copies itself.

    Parameters
    ----------
    graph : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The graph.
    x : array or tensor [num_nodes, F] or [num_nodes], optional
        Features.
    y : array or tensor [num_nodes] or [num_nodes, C], optional
        Labels.
    train, val, test, predict : int array-like or tensor [n], or bool [num_nodes], optional
        The nodes of each: unique ids or a mask. Without, the method of that name is None, and a Trainer does without
        the stage, or says that it cannot.
    sizes : sequence of int
        Fanouts of training, nearest the seeds first; K <= 0 takes every neighbour.
    batch_size : int
        Seeds a batch of training, for each process.
    eval_sizes : sequence of int, optional
        Fanouts of all but training; by default every neighbour, in as many hops. The draws are the same at each
        evaluation.
    eval_batch_size : int, optional
        Seeds a batch of all but training; `batch_size` by default.
    device : str or int, optional
        Where batches are made, if not on the Trainer's device; they are then moved there.
    **options
        Of NodeLoader: `shuffle`, `drop_last`, `cache`, `seed`, `prefetch`, `replace`, `expand`, `placement`, `policy`,
        `workers`.

    Raises
    ------
    DeviceError
        Also when a Trainer asks for batches: NodeLoader cannot use the device.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    With several processes (DDP) each takes its share of the seeds, in training and in evaluation. So that every
    process gets the same number of batches, up to ``world_size - 1`` seeds are visited twice: a metric logged with
    ``sync_dist=True`` is that of all seeds but for those. Evaluate with ``Trainer(devices=1)`` where this matters.

    A batch has many tensors of different lengths: pass ``batch_size=batch.batch_size`` to ``self.log``.

    With ``Trainer(overfit_batches=...)`` every epoch has the batches of epoch 0. Strategies that spawn processes
    (``"ddp_spawn"``) send them graph and features by value; with ``"ddp"`` each process loads its own.

    Examples
    --------
    >>> import lightning, numpy as np
    >>> from gglspeedup.adapters.lightning import NodeDataModule
    >>> graph, x, y = ([0, 2, 3, 4], [1, 2, 0, 0]), np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> data = NodeDataModule(graph, x, y, train=[0, 2], val=[1], sizes=[2], batch_size=1)
    >>> lightning.Trainer(max_epochs=3).fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self, graph: GraphLike, x: Any = None, y: Any = None, *, train: Any = None, val: Any = None, test: Any = None,
        predict: Any = None, sizes: Any, batch_size: int, eval_sizes: Any = None, eval_batch_size: int | None = None,
        device: DeviceLike | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(device, options, graph=graph, x=x, y=y)
        self._options = {
            "csr": as_graph(graph), "x": x, "y": y, "sizes": sizes, "batch_size": batch_size, "backend": "torch",
            **options,
        }  # fmt: skip
        self._eval_options = {"sizes": eval_sizes, "batch_size": eval_batch_size}
        self._seeds = {}
        # On the CPU nothing is copied, and all that is wrong with the arguments comes to light.
        checked = NodeLoader(**self._options, seeds=[] if train is None else train, device="cpu")
        self._seeds["train"] = checked.dataset
        for stage, seeds in (("val", val), ("test", test), ("predict", predict)):
            if seeds is not None:
                self._seeds[stage] = checked.evaluation(seeds, **self._eval_options).dataset
        for stage, seeds in (("train", train), ("val", val), ("test", test), ("predict", predict)):
            if seeds is None:
                self._leave_out(stage, NodeDataModule)

    def train_dataloader(self) -> EpochBatches:
        """Return the batches of training: those of the Trainer's epoch, each time they are iterated over."""
        return EpochBatches(self._loader(), self._reached)

    def val_dataloader(self) -> EpochBatches:
        """Return the batches of validation."""
        return self._evaluation("val")

    def test_dataloader(self) -> EpochBatches:
        """Return the batches of the test."""
        return self._evaluation("test")

    def predict_dataloader(self) -> EpochBatches:
        """Return the batches of prediction."""
        return self._evaluation("predict")

    def _evaluation(self, stage: str) -> EpochBatches:
        return EpochBatches(self._loader().evaluation(self._seeds[stage], **self._eval_options))

    def _make(self, **place: Any) -> NodeLoader:
        return NodeLoader(**self._options, seeds=self._seeds["train"], **place)


class EpochBatches:
    """Batches of an epoch that is settled when the first of them is asked for.

    A Trainer makes iterators that it never reads from, to see whether it can: those must not count as epochs.
    """

    def __init__(self, loader: EpochLoader[Any], reached: Callable[[], tuple[int, int]] | None = None) -> None:
        self.loader = loader
        self._reached = reached
        self._resumes = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self._reached() if self._reached else (0, 0)
        first, self._resumes = done if self._resumes else 0, False
        self.loader.set_epoch(epoch)
        # Not a loop: its variable would keep a batch in memory while the next one is awaited.
        yield from itertools.islice(self.loader, first, None)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the Trainer's own progress says where to resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, with the next batch, where the Trainer is within its epoch."""
        self._resumes = True


class HistoryCallback(pl.Callback):  # type: ignore[misc]
    """Keeps the histories of a model with its checkpoints.

    Pending pushes are waited for at the end of each training epoch, before validation, and before a checkpoint is
    saved. The tables are written beside each checkpoint, to its path with ``.histories`` added, and are removed with
    it. When a Trainer loads a checkpoint (``ckpt_path=...``), they are restored in place.

    Parameters
    ----------
    store : HistoryStore
        The histories; anything with its `synchronize`, `save` and `restore`.

    Raises
    ------
    ArgumentTypeError
        It lacks one of these.
    ArgumentValueError
        On loading a checkpoint: its tables are not beside it. On training: a Trainer has two such callbacks.

    Notes
    -----
    With several processes, the tables of the first are saved, and each process restores them. Checkpoints must be in a
    folder of this machine, and written by the Trainer's ``CheckpointIO``, which those of FSDP and DeepSpeed are not.

    A Trainer does not make up for a validation that a checkpoint came before, as one does that is written every so many
    steps and after the last of an epoch. If validation pushes rows, save after it, as ModelCheckpoint does by default.

    Examples
    --------
    >>> from gglspeedup import HistoryStore
    >>> from gglspeedup.adapters.lightning import HistoryCallback
    >>> callback = HistoryCallback(HistoryStore(1000, [64], "cpu"))
    >>> lightning.Trainer(callbacks=[callback]).fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(self, store: HistoryStore) -> None:
        for method in ("synchronize", "save", "restore"):
            if not callable(getattr(store, method, None)):
                remedy = "pass a HistoryStore"
                raise ArgumentTypeError(explain("store", f"a method {method}()", type(store).__name__, remedy))
        self.store = store

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put this store beside the Trainer's checkpoints, once."""
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, _HistoryIO):
            io = trainer.strategy.checkpoint_io = _HistoryIO(io, self.store)
        elif io.store is not self.store:
            remedy = "keep all tables in one store"
            raise ArgumentValueError(explain("callbacks", "one HistoryCallback", "two", remedy))
        io.loaded = None

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Where training is resumed, restore the tables again: the check has pushed what the training never did."""
        loaded = trainer.strategy.checkpoint_io.loaded
        if loaded is not None:
            self.store.restore(loaded)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the pushes of the epoch."""
        self.store.synchronize()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the pushes of training."""
        self.store.synchronize()


class _HistoryIO(pl.plugins.CheckpointIO):  # type: ignore[misc]
    """Does with the tables what another CheckpointIO does with the checkpoints.

    A callback's own hooks are not told the path of a checkpoint, nor that one is removed.
    """

    def __init__(self, inner: Any, store: HistoryStore) -> None:
        self.inner = inner
        self.store = store
        self.loaded: Path | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        tables = _tables(path)
        tables.parent.mkdir(parents=True, exist_ok=True)
        self.store.synchronize()
        self.store.save(tables)
        # Last: who finds a checkpoint finds its tables.
        self.inner.save_checkpoint(checkpoint, path, *args, **kwargs)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        tables = _tables(os.path.realpath(path))  # ModelCheckpoint(save_last="link") links to a checkpoint
        if not tables.is_file():
            remedy = "resume from a checkpoint that was saved with HistoryCallback"
            raise ArgumentValueError(explain("ckpt_path", f"the histories in {tables.name} beside it", "none", remedy))
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        self.store.restore(tables)
        self.loaded = tables
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
        _tables(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        self.inner.teardown()


def _tables(checkpoint: Any) -> Path:
    return Path(f"{os.fspath(checkpoint)}.histories")
