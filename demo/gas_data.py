"""The graphs of GNNAutoScale's small benchmark, with the splits that it is run on."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from demo.datasets import PUBLIC, DatasetError, load_dataset
from demo.planetoid import Array, undirected

TRAIN_A_CLASS, VALIDATION_A_CLASS, SPLITS = 20, 30, 20
SPARSE_BELOW = 0.2  # of features, the fraction that is not zero


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A graph with its splits.

    Attributes
    ----------
    name : str
        What it is.
    indptr, indices : int arrays
        Row v lists the in-neighbours of v.
    x : float32 array [N, F], or scipy CSR matrix
        Features; a matrix if most are zero.
    y : int64 array [N]
        Classes.
    train_mask, val_mask, test_mask : bool arrays [N, S]
        Of each split.
    """

    name: str
    indptr: Array
    indices: Array
    x: Any
    y: Array
    train_mask: Array
    val_mask: Array
    test_mask: Array

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return int(self.y.max()) + 1

    def split(self, run: int) -> tuple[Array, Array, Array]:
        """Return the masks that a run trains, validates and tests on."""
        column = run % self.train_mask.shape[1]
        return self.train_mask[:, column], self.val_mask[:, column], self.test_mask[:, column]


def load_benchmark(name: str, root: str | os.PathLike[str] | None = None) -> Benchmark:
    """Return a graph of the benchmark, its features and splits as the paper's trainings have them.

    Parameters
    ----------
    name : str
        ``cora``, ``citeseer``, ``pubmed``: features divided by their row's sum, the public split. ``coauthor_cs``,
        ``coauthor_physics``, ``amazon_computers``, ``amazon_photo``: 20 splits of 20 training and 30 validation nodes
        a class, all others for the test. ``wiki_cs``: both directions of every edge, its own 20 splits.
    root : path, optional
        The folder with the npz files, and with ``wiki_cs.json`` or ``wiki_cs/data.json`` as its authors publish it.
        Only the first three can be had without.

    Raises
    ------
    DatasetError
        It is not there, or not such a graph.
    """
    if name == "wiki_cs":
        return _wiki_cs(root)
    if root is None and name not in PUBLIC:
        raise DatasetError(f"{name} needs a folder that holds {name}.npz; name it with --root")
    public = name in PUBLIC
    data = load_dataset(name, root, normalise=public)
    if data.name != name:
        raise DatasetError(f"no source has {name}; name a folder with --root")
    x = scipy.sparse.csr_matrix(data.x)
    if name.startswith("coauthor"):
        x.data[:] = 1  # a keyword counts once, as in PyG's copies, which the published figures are of
    masks = [mask[:, None] for mask in (data.train_mask, data.val_mask, data.test_mask)]
    return Benchmark(name, data.indptr, data.indices, _compact(x), data.y, *(masks if public else draw_splits(data.y)))


def _compact(x: Any) -> Any:
    return x if x.nnz < SPARSE_BELOW * np.prod(x.shape) else x.toarray()


def draw_splits(y: Array) -> list[Array]:
    """Return masks [N, 20] for training, validation and test: of each class 20 nodes, 30 others, and the rest."""
    masks = [np.zeros((len(y), SPLITS), bool) for _ in range(3)]
    for split in range(SPLITS):
        # Raw Philox words, which NumPy promises to stay the same in every version.
        order = np.argsort(np.random.Philox(key=split).random_raw(len(y)), kind="stable")
        for label in np.unique(y[y >= 0]):
            nodes = order[y[order] == label]
            bounds = [TRAIN_A_CLASS, TRAIN_A_CLASS + VALIDATION_A_CLASS]
            for mask, chosen in zip(masks, np.split(nodes, bounds), strict=True):
                mask[chosen, split] = True
    return masks


def _wiki_cs(root: str | os.PathLike[str] | None) -> Benchmark:
    folder = Path("." if root is None else root)
    paths = [folder / "wiki_cs.json", folder / "wiki_cs" / "data.json"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise DatasetError(f"wiki_cs needs {paths[0]} or {paths[1]}; name their folder with --root")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        y, links = np.array(data["labels"], np.int64), data["links"]
        source = np.repeat(np.arange(len(links)), [len(others) for others in links])
        target = np.array(list(itertools.chain.from_iterable(links)), np.int64)
        graph = undirected(source, target, len(y))
        x = np.array(data["features"], np.float32)
        train, val = (np.array(data[masks], bool).T for masks in ("train_masks", "stopping_masks"))
        test = np.repeat(np.array(data["test_mask"], bool)[:, None], train.shape[1], axis=1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path}: {error!r}") from error
    if not (len(links) == len(x) == len(y) and train.shape == val.shape == test.shape == (len(y), train.shape[1])):
        raise DatasetError(f"{path}: links, features, labels and masks are not of as many nodes")
    return Benchmark("wiki_cs", graph["indptr"], graph["indices"], x, y, train, val, test)
