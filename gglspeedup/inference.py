"""`layerwise_inference`: the exact outputs of a model for all nodes, one layer at a time over the whole graph."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.adjs import Adj
from gglspeedup.arguments import check_flag, host_array
from gglspeedup.device import DeviceLike
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import CSRGraph, GraphLike
from gglspeedup.history.history_file import numpy_dtype
from gglspeedup.inference_tables import FolderTables, MemoryTables, Request, Tables, checksum_of
from gglspeedup.interchange import is_numeric
from gglspeedup.loader import NodeLoader
from gglspeedup.progress import Progress

Array = npt.NDArray[Any]
Layer = Callable[[Any, Adj], Any]

_STRETCH = 1 << 20  # nodes, at least: so that the ids of all of them never lie in memory at once
_DTYPES = ("float16", "float32", "float64", "bfloat16")


def layerwise_inference(
    csr: GraphLike | GPUSampler, x: Any, layers: Iterable[Layer], *, batch_size: int = 1024,
    device: DeviceLike = "auto", backend: str = "numpy", path: str | os.PathLike[str] | None = None, tag: str = "",
    dtype: Any = None, progress: bool = True, prefetch: int = 2, cache: int | float | str = "0",
) -> Array:  # fmt: skip
    """Return the outputs of a model's last layer for all nodes, each from its whole neighbourhood.

    Each layer is applied to all nodes, batch by batch and with every neighbour, before the next one is: a row is
    computed once, where a batch with its neighbourhood of many hops would compute it over and over. What is in memory
    is two tables of rows, memory-mapped files if `path` is given, and a few batches, whatever the number of layers.

    Parameters
    ----------
    csr : CSRGraph, scipy.sparse matrix, (indptr, indices) or GPUSampler
        The graph; a sampler brings its own device, and is shared, not copied.
    x : array or tensor [num_nodes, F] or [num_nodes], or CGPUFeature
        What the first layer takes; a ``numpy.memmap`` stays on disk.
    layers : iterable of callables
        Each takes ``(x, adj)``, tensors of the backend: rows [n_src, F] of some nodes, of which the first n_dst are
        the targets, and the Adj of all edges into these, with ``adj.size == (n_src, n_dst)``. It returns the targets'
        rows, [n_dst, F'] or [n_dst]; rows beyond are left out. All batches get rows of one dtype and width.
    batch_size : int
        Targets a batch.
    device, backend, prefetch, cache
        As NodeLoader's; `cache` serves the layer that is being computed.
    path : path, optional
        A folder for the tables, new, empty or that of an earlier run: one that was interrupted or killed goes on where
        it was, with the rows that it has; one that is finished is read. Another graph, `x`, number of layers, `dtype`
        or tag is refused.
    tag : str
        A word for what the folder cannot know: the weights, such as the name of a checkpoint.
    dtype : str or dtype, optional
        What rows are kept as between layers, and returned as: ``"float16"``, ``"float32"``, ``"float64"`` or
        ``"bfloat16"``; by default what the layers return.
    progress : bool
        Whether to show a bar, if tqdm is installed, or write lines to the log.

    Returns
    -------
    NumPy array [num_nodes, F'] or [num_nodes]
        On the host; with `path`, a read-only ``numpy.memmap``.

    Raises
    ------
    InferenceFileError
        What an earlier run left in the folder is damaged, or the disk has no room.
    DeviceError
        The CUDA device is not there, or the backend cannot use it.
    MissingPackageError
        The backend is not installed.
    ArgumentTypeError, ArgumentValueError
        An argument, or what a layer returned, cannot be used; the message names it.

    Notes
    -----
    The same rows, bit for bit, whatever `prefetch` and the number of threads, and however often a run was interrupted,
    as far as the layers are deterministic; `batch_size` may change the rounding of a framework's products. With `path`
    the graph and `x` are read once more, for their checksums.

    In torch and Paddle, call it under ``no_grad()``, with the model in evaluation. A layer that weighs edges looks
    their weights up by ``adj.e_id``; one that needs more of a node than its row, as GCNII its first one, keeps that in
    further columns.

    Examples
    --------
    Two layers that add up neighbours:

    >>> import numpy as np
    >>> from gglspeedup import CSRGraph, layerwise_inference
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> def add_up(x, adj):
    ...     out = np.zeros((adj.size[1], x.shape[1]), x.dtype)
    ...     np.add.at(out, adj.col, x[adj.row])
    ...     return out
    >>> layerwise_inference(graph, np.eye(3), [add_up, add_up], batch_size=2, device="cpu").tolist()
    [[2.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """
    steps = _layers(layers)
    kept = None if dtype is None else _kept(dtype)
    shown = check_flag(progress, "progress")
    if not isinstance(tag, str):
        raise ArgumentTypeError(explain("tag", "a text", repr(tag), "pass a str, such as a checkpoint's name"))
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(explain("path", "a folder", type(path).__name__, "pass a str or pathlib.Path"))
    if x is None:
        raise ArgumentTypeError(explain("x", "a row for each node", "None", "pass the features of all nodes"))
    rows = x if isinstance(x, CGPUFeature) else host_array(x, "x")
    # Of no nodes yet: it checks what is given before anything is done.
    loader = NodeLoader(
        csr, rows, seeds=[], sizes=[-1], batch_size=batch_size, shuffle=False, device=device, cache=cache,
        backend=backend, prefetch=prefetch,
    )  # fmt: skip
    graph = loader.graph_sampler.graph
    if graph.num_nodes == 0:
        raise ArgumentValueError(explain("csr", "at least one node", "none", "there is nothing to compute"))
    if path is None:
        return _run(steps, loader, MemoryTables(graph.num_nodes), kept, cache, shown)
    folder = os.fspath(path)
    if not isinstance(graph, CSRGraph):
        needs, got = "a CSRGraph for a run that can be resumed", type(graph).__name__
        raise ArgumentTypeError(explain("csr", needs, got, "pass the graph, or leave out path"))
    # Only now: the package loads what a run in memory has no use for.
    from gglspeedup.distributed.journal import locked
    from gglspeedup.distributed.part import fingerprint_of

    name = None if kept is None else kept.name
    request = Request(fingerprint_of(graph), _mark_of(rows), graph.num_nodes, len(steps), name, tag)
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        return _run(steps, loader, FolderTables(folder, request), kept, cache, shown)


def _run(
    layers: list[Layer], first: NodeLoader, tables: Tables, dtype: np.dtype[Any] | None, cache: Any, shown: bool
) -> Array:
    """Compute what is not there yet, and return the last layer's rows."""
    nodes = first.graph_sampler.graph.num_nodes
    done = tables.layer * nodes + tables.at
    with Progress("inference", len(layers) * nodes, done, shown, "nodes") as progress, _saved(tables):
        for index in range(tables.layer, len(layers)):
            if index:
                first.features = None  # as the loaders of other layers, it lets go of the rows that it has read
            for batch in _batches(first if index == 0 else _over(first, tables.last, cache), tables.at):
                given = layers[index](batch.x, batch.adjs[0])
                tables.append(_rows(given, batch.batch_size, dtype, f"layers[{index}]"))
                progress.add(batch.batch_size)
                del batch, given
            tables.next_layer()
    assert tables.last is not None  # there is a layer, and a node
    return tables.last


@contextlib.contextmanager
def _saved(tables: Tables) -> Iterator[None]:
    """Save the tables if something goes wrong, such as Ctrl-C or a layer that is out of memory."""
    try:
        yield
    except BaseException:
        tables.save()
        raise


def _over(first: NodeLoader, rows: Array | None, cache: Any) -> NodeLoader:
    """Return a loader as the first one, of the rows of a layer."""
    return NodeLoader(
        first.graph_sampler, rows, seeds=[], sizes=[-1], batch_size=first.batch_size, shuffle=False, cache=cache,
        backend=first.backend, prefetch=first.prefetch,
    )  # fmt: skip


def _batches(loader: NodeLoader, begin: int) -> Iterator[Any]:
    """Give the batches of all nodes from one on, in their order."""
    nodes = loader.graph_sampler.graph.num_nodes
    step = -(-_STRETCH // loader.batch_size) * loader.batch_size
    for start in range(begin, nodes, step):
        yield from loader.evaluation(np.arange(start, min(start + step, nodes)))


def _rows(given: Any, count: int, dtype: np.dtype[Any] | None, argument: str) -> Array:
    """Return a layer's rows of the targets, as they are kept."""
    rows = host_array(given, argument)
    if rows.ndim not in (1, 2) or len(rows) < count or not is_numeric(rows.dtype):
        needs, got = f"to return [{count}] or [{count}, F] numbers, a row a target", f"{rows.dtype} {list(rows.shape)}"
        raise ArgumentValueError(explain(argument, needs, got, "the targets are the first adj.size[1] rows of x"))
    return rows[:count] if dtype is None else rows[:count].astype(dtype, copy=False)


def _layers(layers: Any) -> list[Layer]:
    remedy = "pass a list of functions of (x, adj)"
    if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise ArgumentTypeError(explain("layers", "a sequence of callables", repr(layers), remedy))
    steps = list(layers)
    if not steps:
        raise ArgumentValueError(explain("layers", "at least one layer", "none", remedy))
    for step in steps:
        if not callable(step):
            raise ArgumentTypeError(explain("layers", "callables", repr(step), remedy))
    return steps


def _kept(dtype: Any) -> np.dtype[Any]:
    # A name, a NumPy or framework dtype (torch.float16), or a scalar type (numpy.float16).
    name = str(getattr(dtype, "__name__", dtype)).rsplit(".", 1)[-1]
    if name not in _DTYPES:
        raise ArgumentValueError(explain("dtype", f"one of {', '.join(_DTYPES)}", repr(dtype), "leave it out"))
    return numpy_dtype(name)


def _mark_of(rows: Array | CGPUFeature) -> str:
    """Return what tells a matrix from others: its kind, and the CRC-32 of its rows."""
    kind = f"{rows.dtype.name} {list(rows.shape)}"
    return f"{kind} {checksum_of(_Read(rows) if isinstance(rows, CGPUFeature) else rows):08x}"


class _Read:
    """The rows of features, as slices of an array on the host."""

    def __init__(self, features: CGPUFeature) -> None:
        self._features = features

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, rows: slice) -> Array:
        return host_array(self._features[np.arange(*rows.indices(len(self)))], "x")
