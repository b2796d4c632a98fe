"""PyTorch Lightning: a data module over SubgraphLoader, for models with histories (GNNAutoScale) and Cluster-GCN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gglspeedup.adapters.lightning import EpochBatches, LoaderDataModule
from gglspeedup.arguments import check_count, check_range, check_unique, host_array, host_ids
from gglspeedup.device import DeviceLike
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.graph import GraphLike, as_graph
from gglspeedup.subgraphs import SubgraphBatch, SubgraphLoader


@dataclass(eq=False)
class MaskedBatch(SubgraphBatch):
    """A SubgraphBatch, and which of its own nodes are there to train on, to validate with and to test with.

    Attributes
    ----------
    train_mask, val_mask, test_mask : bool tensor [B], or None
        Of the in-batch nodes, as `y`. None if the data module was given no such nodes.
    """

    train_mask: Any = None
    val_mask: Any = None
    test_mask: Any = None


class SubgraphDataModule(LoaderDataModule):  # type: ignore[misc]
    """Gives an unmodified Trainer the batches of a SubgraphLoader, made on the device that the Trainer trains on.

    Epoch k of a training has the batches of epoch k of ``SubgraphLoader(..., backend="torch")``, also when it is
    resumed from a checkpoint, even one from within an epoch; the batches before it are then made again, and dropped.
    Validation, test and prediction go over all parts in their order, so that each of them brings all histories up to
    date. Every batch is a :class:`MaskedBatch`.

    Parameters
    ----------
    graph : CSRGraph, scipy.sparse matrix or (indptr, indices)
        The permuted graph, as :func:`permute` returns it.
    x : array or tensor [num_nodes, F] or [num_nodes], optional
        Features, permuted as well.
    y : array or tensor [num_nodes] or [num_nodes, C], optional
        Labels, permuted as well.
    train, val, test : int array-like or tensor [n], or bool [num_nodes], optional
        The nodes of each: unique ids in the permuted graph, or a permuted mask. Without, the method of that name is
        None, and a Trainer does without the stage, or says that it cannot.
    ptr : int array-like [num_parts + 1]
        Part i is the nodes ``ptr[i]:ptr[i + 1]``, as :func:`partition` returns it.
    batch_size : int
        Parts a batch of training, for each process.
    eval_batch_size : int, optional
        Parts a batch of all but training; `batch_size` by default. Of all parts at once, nothing is stale.
    device : str or int, optional
        Where batches are made, if not on the Trainer's device; they are then moved there.
    **options
        Of SubgraphLoader: `edge_weight`, `shuffle`, `drop_last`, `cache`, `seed`, `prefetch`, `placement`,
        `policy`, `workers`.

    Raises
    ------
    DeviceError
        Also when a Trainer asks for batches: SubgraphLoader cannot use the device.
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        An argument cannot be used; the message names it.

    Notes
    -----
    The histories of a :class:`Scalable` model are filled before the first epoch by
    ``Trainer(num_sanity_val_steps=-1)``, which goes over all of the validation then, unless training is resumed; by
    default a Trainer does so with two batches alone. The model has to be called in ``validation_step``, even if no
    score is wanted. :class:`HistoryCallback` keeps the histories with the checkpoints.

    A batch may have no node to train on: return None from ``training_step`` before the model is called, and a Trainer
    leaves it out, with a warning.

    With several processes (DDP) each has histories of its own: give each its own HistoryStore, in memory or in a file
    of its own. A process trains on its share of the parts, of which up to ``world_size - 1`` are visited twice, and
    sees the rows that others have computed once it computes them itself, in training or in validation: each process
    validates and tests on all parts. Gradients are averaged over processes, not over nodes, and none of them may
    return None from ``training_step``: a sum over no nodes is a loss, too.

    Examples
    --------
    >>> import lightning, numpy as np
    >>> from gglspeedup import CSRGraph, partition, permute
    >>> from gglspeedup.adapters.lightning_subgraphs import SubgraphDataModule
    >>> graph, x, y = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0]), np.eye(3, dtype=np.float32), np.array([0, 1, 1])
    >>> perm, ptr = partition(graph, 2, "contiguous")
    >>> masks = {"train": np.array([True, False, True])[perm], "val": np.array([False, True, False])[perm]}
    >>> data = SubgraphDataModule(permute(graph, perm), x[perm], y[perm], **masks, ptr=ptr, batch_size=1, shuffle=False)
    >>> [(batch.n_id.tolist(), batch.y.tolist(), batch.train_mask.tolist()) for batch in data.train_dataloader()]
    [([0, 1, 2], [0, 1], [True, False]), ([2, 0], [1], [True])]
    >>> lightning.Trainer(max_epochs=3, num_sanity_val_steps=-1).fit(model, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self, graph: GraphLike, x: Any = None, y: Any = None, *, train: Any = None, val: Any = None, test: Any = None,
        ptr: Any, batch_size: int, eval_batch_size: int | None = None, device: DeviceLike | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(device, options, graph=graph, x=x, y=y)
        csr = as_graph(graph)
        # On the CPU neither graph nor rows are copied, and all that is wrong with the arguments comes to light.
        given = {"x": x, "y": y, "ptr": ptr, "batch_size": batch_size, "backend": "torch", **options}
        checked = SubgraphLoader(csr, **given, device="cpu")
        self._options = {"csr": csr, **given, "ptr": checked.ptr}
        self._eval_batch_size = checked.batch_size
        if eval_batch_size is not None:
            self._eval_batch_size = check_count(eval_batch_size, "eval_batch_size", 1)
        self._masks = {}
        for stage, nodes in (("train", train), ("val", val), ("test", test)):
            if nodes is None:
                self._leave_out(stage, SubgraphDataModule)
            else:
                self._masks[f"{stage}_mask"] = torch.from_numpy(_mask(nodes, csr.num_nodes, stage))

    def train_dataloader(self) -> EpochBatches:
        """Return the batches of training: those of the Trainer's epoch, each time they are iterated over."""
        return _MaskedBatches(self._masks, self._loader(), self._reached)

    def val_dataloader(self) -> EpochBatches:
        """Return the batches of validation: all parts, in their order."""
        return self._evaluation()

    def test_dataloader(self) -> EpochBatches:
        """Return the batches of the test: all parts, in their order."""
        return self._evaluation()

    def predict_dataloader(self) -> EpochBatches:
        """Return the batches of prediction: all parts, in their order, which is that of the graph's nodes."""
        return self._evaluation()

    def _evaluation(self) -> EpochBatches:
        loader = self._loader().evaluation(batch_size=self._eval_batch_size)
        # Every process goes over all parts: each has histories of its own to bring up to date.
        loader.rank, loader.world_size = 0, 1
        return _MaskedBatches(self._masks, loader)

    def _make(self, **place: Any) -> SubgraphLoader:
        return SubgraphLoader(**self._options, **place)


class _MaskedBatches(EpochBatches):  # type: ignore[misc]
    """Batches with their masks."""

    def __init__(self, masks: dict[str, torch.Tensor], loader: SubgraphLoader, *reached: Any) -> None:
        super().__init__(loader, *reached)
        self._masks = {name: mask.to(str(loader.device)) for name, mask in masks.items()}

    def __iter__(self) -> Iterator[MaskedBatch]:
        return map(self._masked, super().__iter__())

    def _masked(self, batch: SubgraphBatch) -> MaskedBatch:
        own = batch.n_id[: batch.batch_size]
        return MaskedBatch(**vars(batch), **{name: mask[own] for name, mask in self._masks.items()})


def _mask(nodes: Any, num_nodes: int, argument: str) -> npt.NDArray[np.bool_]:
    """Return a mask of nodes, a copy; raise if they are neither unique ids nor a mask."""
    given = host_array(nodes, argument)
    if given.dtype == np.bool_:
        if given.shape != (num_nodes,):
            needs = f"a mask of shape ({num_nodes},)"
            raise ArgumentValueError(explain(argument, needs, f"shape {given.shape}", "pass a value a node, or ids"))
        return np.array(given)
    ids = host_ids(nodes, argument)
    check_range(ids, num_nodes, argument)
    return check_unique(ids, num_nodes, argument)
