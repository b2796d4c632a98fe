"""METIS, through pymetis: in a process of its own, as it holds the interpreter from its first to its last moment.

So the caller can show that it is at work, and Ctrl-C ends it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from gglspeedup.edges import distinct, edge_chunks
from gglspeedup.errors import ArgumentValueError, GGLSpeedupError, MissingPackageError, explain
from gglspeedup.graph import CSRGraph

logger = logging.getLogger("gglspeedup")

_CHILD = "from gglspeedup.metis import serve; serve()"
_QUIET = 3  # seconds before a bar appears
_TICK = 0.5  # seconds between two looks at the process
_LINE = 10  # seconds between two lines of the log, where there is no bar


class PartitionError(GGLSpeedupError, RuntimeError):
    """METIS failed, or was ended by the system."""


def metis_parts(graph: CSRGraph, num_parts: int, seed: int, progress: bool) -> npt.NDArray[np.int64]:
    """Return the part of each node, int64 [num_nodes]; parts may be empty.

    Parameters
    ----------
    graph : CSRGraph
        Of one node or more, directed or not; METIS gets it symmetric, without self-loops and parallel edges.
    num_parts : int
        1 to the number of nodes.
    seed : int
        METIS takes its lowest 31 bits.
    progress : bool
        Whether to show a bar, of the time that has passed, when METIS takes longer than a few seconds.

    Raises
    ------
    MissingPackageError
        pymetis is not installed.
    PartitionError
        METIS failed, for want of memory as a rule.
    OSError
        There is no room for temporary files of 8 bytes a node and 16 an edge.
    """
    if find_spec("pymetis") is None:
        remedy = 'pip install "gglspeedup[metis]", or take method="contiguous"'
        raise MissingPackageError(explain("method", 'the package pymetis for "metis"', "none installed", remedy))
    if num_parts == 1:
        return np.zeros(graph.num_nodes, np.int64)
    with tempfile.TemporaryFile() as question, tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as words:
        logger.info("partition: making %d edges of %d nodes symmetric", graph.num_edges, graph.num_nodes)
        text = _ask(question, graph, num_parts, seed)
        logger.info("partition: %s", text)
        started = time.monotonic()
        code = _run(question, answer, words, text, progress)
        logger.info("partition: METIS took %.1f s", time.monotonic() - started)
        answer.seek(0)
        parts = np.fromfile(answer, np.int64)
        if code != 0 or len(parts) != graph.num_nodes:
            words.seek(0)
            said = words.read().decode(errors="replace").strip()[-2000:] or "nothing"
            raise PartitionError(f"METIS ended with status {code} (-9: killed, for want of memory as a rule): {said}")
    return parts


def symmetric(graph: CSRGraph) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return indptr and indices, int64, with both directions of every edge once, rising in a row, and no self-loop.

    Raises
    ------
    ArgumentValueError
        The graph has 2**31.5 nodes or more, beyond what a pair of them can be numbered for.

    Examples
    --------
    >>> indptr, indices = symmetric(CSRGraph([0, 3, 3, 4], [1, 1, 0, 0]))
    >>> indptr.tolist(), indices.tolist()
    ([0, 2, 3, 4], [1, 2, 0, 0])
    """
    nodes = graph.num_nodes
    if nodes * nodes >= 1 << 63:
        raise ArgumentValueError(explain("csr", "fewer than 2^31.5 nodes for METIS", nodes, 'take method="contiguous"'))
    pairs = np.empty(2 * graph.num_edges, np.int64)
    count = 0
    for begin, end, rows in edge_chunks(graph.indptr):
        neighbours = graph.indices[begin:end].astype(np.int64)
        apart = rows != neighbours
        rows, neighbours = rows[apart], neighbours[apart]
        middle = count + len(rows)
        pairs[count:middle] = rows * nodes + neighbours
        count = middle + len(rows)
        pairs[middle:count] = neighbours * nodes + rows
    pairs = distinct(pairs[:count])
    indptr = np.searchsorted(pairs, np.arange(nodes + 1) * nodes)
    np.remainder(pairs, nodes, out=pairs)
    return indptr, pairs


def _ask(question: IO[bytes], graph: CSRGraph, num_parts: int, seed: int) -> str:
    """Write what METIS is to do, and return it in words; a function, so that the arrays are gone when METIS runs."""
    indptr, indices = symmetric(graph)
    for array in (np.array([num_parts, seed % (1 << 31), graph.num_nodes], np.int64), indptr, indices):
        array.tofile(question)
    question.seek(0)
    return f"METIS of {graph.num_nodes} nodes, {len(indices) // 2} undirected edges, {num_parts} parts"


def _run(question: IO[bytes], answer: IO[bytes], words: IO[bytes], text: str, progress: bool) -> int:
    """Let a process of its own answer, show that it runs, and return its exit status."""
    # Not multiprocessing: it would run the caller's main module again.
    paths = os.pathsep.join(str(path) for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=question, stdout=answer, stderr=words,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    bar = _bar(text) if progress else None
    started, lines = time.monotonic(), 1
    try:
        while True:
            try:
                return process.wait(_TICK)
            except subprocess.TimeoutExpired:
                if bar is not None:
                    bar.update(0)
                elif time.monotonic() - started >= lines * _LINE:
                    logger.info("partition: METIS has run for %d s", lines * _LINE)
                    lines += 1
    finally:
        process.kill()  # after Ctrl-C; one that has ended is not touched
        process.wait()
        if bar is not None:
            bar.close()


def _bar(text: str) -> Any:
    """Return tqdm's bar of the time that has passed, for METIS says nothing else; None if tqdm is not there."""
    if find_spec("tqdm") is None:
        return None
    return import_module("tqdm").tqdm(desc=text, bar_format="{desc}: {elapsed}", delay=_QUIET, mininterval=_TICK)


def serve() -> None:
    """Answer one question, in the process that :func:`metis_parts` starts: standard input to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would have to wait for METIS
    answer = os.dup(1)
    os.dup2(2, 1)  # METIS prints complaints to standard output
    with open(0, "rb") as question:
        num_parts, seed, nodes = np.fromfile(question, np.int64, 3).tolist()
        indptr = np.fromfile(question, np.int64, nodes + 1)
        indices = np.fromfile(question, np.int64)
    pymetis = import_module("pymetis")
    dtype = pymetis.zero_copy_dtype()
    if len(indices) > np.iinfo(dtype).max:
        sys.exit(f"this build of METIS has {dtype} for {len(indices)} edges")
    adjacency = pymetis.CSRAdjacency(indptr.astype(dtype, copy=False), indices.astype(dtype, copy=False))
    found = pymetis.part_graph(num_parts, adjacency, options=pymetis.Options(seed=seed))
    with open(answer, "wb") as file:
        np.asarray(found.vertex_part, np.int64).tofile(file)
