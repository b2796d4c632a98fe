"""Reads the files of the Planetoid benchmark (Yang et al., ICML 2016) and of the original Cora, trusting none of them.

The files ``ind.*`` are pickles of Python 2. A pickle may call whatever its reader lets it call, so the reader here lets
it call nothing of NumPy or SciPy: the few names that such files need stand for classes that only write down what
they are given, and arrays are made from that record afterwards, with every length checked.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
VALIDATION_NODES = 500


class PlanetoidError(ValueError):
    """A file is not what it should be, or asks for more than a file of this kind may."""


class _Dtype:
    """What a pickle says about a dtype: its code, then its byte order."""

    def __init__(self, code: str = "", *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def make(self) -> np.dtype[Any]:
        if not (isinstance(self.code, str) and re.fullmatch(r"b1|[iu][1248]|f[48]", self.code)):
            raise PlanetoidError(f"an array of dtype {self.code!r} in a pickle; only plain numbers are read")
        if self.order not in ("<", ">", "=", "|"):
            raise PlanetoidError(f"byte order {self.order!r} in a pickle")
        return np.dtype(self.order + self.code)


class _Array:
    """What a pickle says about an array."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def make(self) -> Array:
        _, shape, dtype, fortran, data = self.state
        # Python 2 wrote bytes as str, which latin-1 carries over one to one.
        raw = data.encode("latin-1") if isinstance(data, str) else data
        sizes = isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)
        if not (sizes and isinstance(dtype, _Dtype) and isinstance(raw, bytes)):
            raise PlanetoidError("an array in a pickle lacks its shape, dtype or data")
        array: Array = np.frombuffer(raw, dtype.make()).reshape(shape, order="F" if fortran else "C")
        return array


class _Csr:
    """What a pickle says about a sparse matrix."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    def make(self) -> tuple[Array, Array, Array, tuple[int, int]]:
        """Return (indptr, indices, data, shape), each row's indices ascending."""
        indptr, indices, data = (_made(self.state.get(name), _Array) for name in ("indptr", "indices", "data"))
        rows, width = self.state["_shape"]
        sound = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == len(indices) == len(data)
        inside = not len(indices) or 0 <= indices.min() <= indices.max() < width
        if not (sound and inside and (np.diff(indptr) >= 0).all()):
            raise PlanetoidError("a sparse matrix in a pickle contradicts itself")
        row = np.repeat(np.arange(rows), np.diff(indptr))
        order = np.lexsort((indices, row))
        return indptr.astype(np.int64), indices[order].astype(np.int32), data[order], (rows, width)


def _reconstruct(*_: object) -> _Array:
    return _Array()


# Old and new names of the modules; nothing else is admitted.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("scipy.sparse.csr", "csr_matrix"): _Csr,
    ("scipy.sparse._csr", "csr_matrix"): _Csr,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
    ("builtins", "list"): list,
    ("__builtin__", "dict"): dict,
    ("builtins", "dict"): dict,
    ("__builtin__", "int"): int,
    ("builtins", "int"): int,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise PlanetoidError(f"a pickle asks for {module}.{name}, which these files have no use for") from None


def read_pickle(data: bytes) -> Any:
    """Return what a Planetoid pickle holds: an array, (indptr, indices, data, shape), or a dict of lists.

    Raises
    ------
    PlanetoidError
        The pickle names anything but what such files are made of, or is damaged.
    """
    try:
        loaded = _RestrictedUnpickler(io.BytesIO(data), encoding="latin1").load()
        return loaded.make() if isinstance(loaded, (_Array, _Csr)) else loaded
    except PlanetoidError:
        raise
    except Exception as error:  # damaged pickles raise whatever the damage leads to
        raise PlanetoidError(f"not a readable pickle: {type(error).__name__}: {error}") from error


def _made(record: Any, kind: type) -> Any:
    if not isinstance(record, kind):
        raise PlanetoidError(f"a pickle holds {type(record).__name__} where {kind.__name__.strip('_')} was expected")
    return record.make()  # type: ignore[attr-defined]


def parse_planetoid(files: Mapping[str, bytes]) -> Arrays:
    """Return a Planetoid graph in the npz layout.

    Parameters
    ----------
    files : mapping of str to bytes
        The eight files, by the last part of their names: see `PARTS`.

    Returns
    -------
    dict of arrays
        ``indptr``, ``indices``, ``is_undirected``, ``x_indptr``, ``x_indices``, ``x_data``, ``x_shape``, ``y``,
        ``train_mask``, ``val_mask``, ``test_mask``. Test rows lie at the ids of ``test.index``; ids that have no record
        (15 of CiteSeer) have no feature and class 0. Self-loops and duplicates are gone, both directions are there.
    """
    read = {part: read_pickle(files[part]) for part in PARTS[:-1]}
    try:
        test = np.array([int(line) for line in files["test.index"].split()], np.int64)
        _, num_train = read["x"][3], len(read["y"])
        known = len(read["ally"])
        if test.min() < known or len(np.unique(test)) != len(test) or len(test) != len(read["ty"]):
            raise PlanetoidError("test.index does not fit the other files")
        nodes = int(test.max()) + 1
        if nodes > known + 2 * len(test):
            raise PlanetoidError(f"test.index leaves out {nodes - known - len(test)} ids")
        y = np.zeros(nodes, np.int64)
        y[:known] = read["ally"].argmax(1)
        y[test] = read["ty"].argmax(1)
        arrays = undirected(*_edges(read["graph"]), nodes)
        arrays |= _place_rows(read["allx"], read["tx"], np.concatenate([np.arange(known), test]), nodes)
    except PlanetoidError:
        raise
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise PlanetoidError(f"the files do not fit together: {error}") from error
    node = np.arange(nodes)
    arrays["y"] = y
    arrays["train_mask"] = node < num_train
    arrays["val_mask"] = (node >= num_train) & (node < num_train + VALIDATION_NODES)
    arrays["test_mask"] = np.isin(node, test)
    return arrays


def parse_content(content: bytes, cites: bytes) -> Arrays:
    """Return the original Cora in the npz layout, without a split: papers in ``content``, links in ``cites``."""
    try:
        papers = [line.split() for line in content.splitlines()]
        number = {paper[0]: node for node, paper in enumerate(papers)}
        words = np.array([paper[1:-1] for paper in papers]) == b"1"
        names, y = np.unique([paper[-1].decode("ascii") for paper in papers], return_inverse=True)
        links = np.array([[number[paper] for paper in line.split()] for line in cites.splitlines()], np.int64)
        arrays = undirected(links[:, 0], links[:, 1], len(papers))
    except (ValueError, IndexError, KeyError) as error:
        raise PlanetoidError(f"not the files of Cora: {type(error).__name__}: {error}") from error
    row, column = np.nonzero(words)
    arrays["x_indptr"] = _pointers(row, len(papers))
    arrays["x_indices"] = column.astype(np.int32)
    arrays["x_data"] = np.ones(len(row), np.uint8)
    arrays["x_shape"] = np.array(words.shape, np.int64)
    arrays["y"] = y.astype(np.int64)
    arrays["class_names"] = names
    return arrays


def _edges(graph: Any) -> tuple[Array, Array]:
    if not isinstance(graph, dict) or not all(isinstance(row, list) for row in graph.values()):
        raise PlanetoidError("the graph is not a dict of lists")
    ends = [end for row in graph.values() for end in row]
    if not all(isinstance(node, int) for node in (*graph, *ends)):
        raise PlanetoidError("the graph has a node that is not an integer")
    source = np.repeat(np.array(list(graph), np.int64), [len(row) for row in graph.values()])
    return source, np.array(ends, np.int64)


def undirected(source: Array, target: Array, nodes: int) -> Arrays:
    """Return a CSR graph with both directions of every edge, without self-loops and duplicates."""
    if len(source) and not 0 <= min(source.min(), target.min()) <= max(source.max(), target.max()) < nodes:
        raise PlanetoidError(f"an edge leaves the {nodes} nodes")
    proper = source != target
    source, target = source[proper], target[proper]
    code = np.unique(np.concatenate([source * nodes + target, target * nodes + source]))
    return {
        "indptr": _pointers(code // nodes, nodes),
        "indices": (code % nodes).astype(np.int32),
        "is_undirected": np.array(1, np.uint8),
    }


def _place_rows(known: Any, test: Any, place: Array, nodes: int) -> Arrays:
    """Return the sparse matrix whose row ``place[i]`` is row i of the two matrices stacked."""
    (ptr_a, indices_a, data_a, shape_a), (ptr_b, indices_b, data_b, shape_b) = known, test
    if shape_a[1] != shape_b[1]:
        raise PlanetoidError(f"features are {shape_a[1]} wide in allx and {shape_b[1]} in tx")
    row = np.repeat(place, np.concatenate([np.diff(ptr_a), np.diff(ptr_b)]))
    order = np.argsort(row, kind="stable")
    data = np.concatenate([data_a, data_b])[order]
    return {
        "x_indptr": _pointers(row, nodes),
        "x_indices": np.concatenate([indices_a, indices_b])[order],
        "x_data": data.astype(np.uint8 if (data == 1).all() else np.float32),
        "x_shape": np.array([nodes, shape_a[1]], np.int64),
    }


def _pointers(row: Array, rows: int) -> Array:
    return np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
