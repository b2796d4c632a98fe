"""What a batch costs on an H200 by a model: bytes, round trips, launches and waits. Tables of it: `model_table.py`.

The batch is sampled on the CPU, whose arrays say which memory the GPU's kernels would touch; the launches are those
that the GPU's own code makes of it (`recorder.py`). Nothing here has run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.desk import RULES
from benchmarks.recorder import Launch, Recorder
from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.placement import place_graph, place_rows

Ids = npt.NDArray[np.int64]

SECTOR = 32  # bytes: the least that is read of a GPU's memory, or over the bus
COPY = 4.3e12  # bytes a second read and written in a device's own copy
BUS = 55e9  # bytes a second out of pinned host memory
TRIP = 1.0  # microseconds of a read that another waits for
LAUNCH = 4.0  # microseconds of the host for a launch, a copy or a wait, of 3 to 5
NODE = 1.0  # microseconds from one kernel of a graph to the next that waits for it, an assumption
MULTIPROCESSORS = 132
ROW_BYTES = 512

class Hop(NamedTuple):
    """What a hop touches: the nodes whose rows are drawn, their edges' positions, neighbours and first occurrences."""

    rows: Ids
    place: Ids
    neighbour: Ids
    new: int


class Touched(NamedTuple):
    """Bytes of the device's memory, those over the bus if indices are on the host, and trips one after another."""

    near: int
    far: int
    trips: float


class Cost(NamedTuple):
    """A launch, what it touches, and its least time in microseconds, resident and with indices on the host."""

    hop: int
    launch: Launch
    touched: Touched
    resident: float
    uva: float


def sectors(index: Ids, itemsize: int) -> int:
    """Return the bytes of the different sectors that elements of an array lie in."""
    return SECTOR * len(np.unique(index * itemsize // SECTOR))


def hops_of(graph: CSRGraph, batch: Any) -> list[Hop]:
    """Return the hops of a sampled batch, nearest the seeds first."""
    n_id, found = batch.n_id, []
    for adj in reversed(batch.adjs):
        sources, targets = adj.size
        found.append(Hop(n_id[:targets], adj.e_id, n_id[adj.row], sources - targets))
    return found


def _seeds(hop: Hop, before: int) -> Touched:
    count = len(hop.rows)
    return Touched(8 * count + 2 * sectors(hop.rows, 8) + 16 * count, 0, 2)


def _check_seeds(hop: Hop, before: int) -> Touched:
    return Touched(12 * len(hop.rows) + sectors(hop.rows, 8), 0, 3)


def _count_rows(hop: Hop, before: int) -> Touched:
    rows = len(hop.rows)
    ends = sectors(np.concatenate([hop.rows, hop.rows + 1]), 8)
    return Touched(8 * rows + ends + 16 * rows + 8 * gpu.tiles_of(rows, gpu.TILE_ROWS), 0, 3)


def scan(count: int, tile: int) -> Touched:
    """Return what a scan of the sums of tiles touches."""
    tiles = gpu.tiles_of(count, tile)
    return Touched(16 * tiles, 0, 1 + math.ceil(tiles / 1024))


def _draw(hop: Hop, before: int) -> Touched:
    rows, edges = len(hop.rows), len(hop.place)
    return Touched(24 * rows + 16 * edges + 2 * sectors(hop.neighbour, 8), sectors(hop.place, 4), 3)


def _count_first(hop: Hop, before: int) -> Touched:
    edges = len(hop.place)
    return Touched(8 * edges + sectors(hop.neighbour, 8), 0, 3)


def _assign(hop: Hop, before: int) -> Touched:
    edges = len(hop.place)
    return Touched(8 * edges + 8 * hop.new + min(4 * edges, SECTOR * hop.new), 0, 3)


def _emit(hop: Hop, before: int) -> Touched:
    edges = len(hop.place)
    return Touched(40 * edges + min(4 * (before + edges), SECTOR * edges), 0, 2)


# What each kernel touches of a hop, by its code; `before` are the positions before the hop's.
TOUCHES: dict[str, Callable[[Hop, int], Touched]] = {
    "insert_seeds": _seeds, "check_seeds": _check_seeds, "count_rows": _count_rows,
    **{f"draw_{width}": _draw for width in (8, 16, 32)},
    "count_first": _count_first, "assign": _assign, "emit_edges": _emit,
}  # fmt: skip


def calls_of(calls: list[str]) -> int:
    """Return how many calls there are that take the host a launch's time."""
    return sum(call in ("launch", "graph", "upload", "download", "settle", "read") for call in calls)


def waits_of(calls: list[str]) -> int:
    """Return how often the host waits for the device."""
    return sum(call in ("settle", "read") for call in calls)


def floor(launch: Launch, near: int, far: int, trips: float) -> float:
    """Return the least microseconds of a kernel: of its bytes, or of the trips of its warps, wave after wave."""
    at_once = MULTIPROCESSORS * RULES[launch.kernel].warps * 32
    waves = math.ceil(launch.blocks * launch.layers * launch.threads / at_once)
    return max(1e6 * near / COPY, 1e6 * far / BUS, waves * trips * TRIP)


def _cost(hop: int, launch: Launch, touched: Touched) -> Cost:
    resident = floor(launch, touched.near + touched.far, 0, touched.trips)
    return Cost(hop, launch, touched, resident, floor(launch, touched.near, touched.far, touched.trips))


class Batch(NamedTuple):
    """A batch of the model: the hops, the costs of its kernels, what the host asks for, and what it reads."""

    hops: list[Hop]
    costs: list[Cost]
    calls: list[str]
    counts: Ids

    @property
    def edges(self) -> int:
        """Sampled edges."""
        return sum(len(hop.place) for hop in self.hops)

    @property
    def nodes(self) -> int:
        """Rows of features that it needs."""
        return len(self.hops[0].rows) + sum(hop.new for hop in self.hops)

    def terms(self, uva: bool) -> dict[str, float]:
        """Return the microseconds of each term of the batch's time."""
        kernels = sum(cost.uva if uva else cost.resident for cost in self.costs)
        nodes = NODE * sum(cost.launch.recorded for cost in self.costs)
        host = LAUNCH * calls_of(self.calls)
        return {"kernels": kernels, "between kernels": nodes, "host": host}


def sampled(graph: CSRGraph, sizes: tuple[int, ...], count: int = 1024) -> Batch:
    """Sample a batch on the CPU, and let the GPU's code launch it, as the third of its kind."""
    seeds = np.random.default_rng(0).permutation(graph.num_nodes)[:count]
    batch = GPUSampler("cpu", graph, sizes).sample(seeds, batch=2)
    hops = hops_of(graph, batch)
    recorder = Recorder()
    sampler = place_graph(graph, recorder, "device", 1 << 60)
    edges = np.cumsum([len(hop.place) for hop in hops])
    nodes = count + np.cumsum([hop.new for hop in hops])
    counts = np.array([gpu.NONE, gpu.NONE, count, 0, *np.stack([nodes, edges], 1).ravel().tolist()])
    for number in range(3):  # launched, recorded, replayed
        recorder.forget()
        recorder.answers = [counts]
        n_id, _made = sampler.sample(seeds, sizes, seed=0, batch=number)
    assert len(n_id) == len(batch.n_id)
    return Batch(hops, list(_costs(hops, recorder.launches)), recorder.calls, counts)


def _costs(hops: list[Hop], launches: list[Launch]) -> Any:
    """Give the costs of a batch's launches, which are in the order of its hops."""
    before = [len(hops[0].rows)]
    for hop in hops:
        before.append(before[-1] + len(hop.place))
    hop = emitted = scans = -1
    for launch in launches:
        name = launch.kernel
        if name == "count_rows":
            hop += 1
        at = max(hop, 0)
        if name == "emit_edges":
            emitted = at = emitted + 1
        if name == "scan_sums":
            scans += 1
            rows = scans % 2 == 0
            touched = scan(len(hops[at].rows if rows else hops[at].place), gpu.TILE_ROWS if rows else gpu.TILE_EDGES)
        elif name == "copy_ids":
            touched = Touched(16 * (len(hops[-1].rows) + hops[-1].new), 0, 1)
        else:
            touched = TOUCHES[name](hops[at], before[at])
        yield _cost(at + 1, launch, touched)


def gathered(rows: int, far: bool) -> tuple[float, float, list[str]]:
    """Return the microseconds of a gather's kernels and of its host, of rows that come in no order, and its calls."""
    recorder = Recorder()
    features = np.empty((max(rows, 2), ROW_BYTES // 4), np.float32)
    tiers = place_rows(features[:rows], np.arange(rows), recorder, 0 if far else features.nbytes, 1 << 60)
    recorder.forget()
    ids = np.zeros(rows, np.int64)
    tiers.take(recorder.to_device(ids))
    recorder.calls.remove("upload")  # ids of a batch are on the device
    (launch,) = recorder.launches
    moved = ROW_BYTES * rows
    time = floor(launch, 8 * rows + (1 if far else 2) * moved, moved if far else 0, 2)
    return time, LAUNCH * calls_of(recorder.calls), recorder.calls
