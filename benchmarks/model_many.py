"""Small batches one by one and together, by the model of `model.py`; ``--write docs/gpu.md`` puts the table there."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import marks
from benchmarks.graphs import products_like
from benchmarks.model import LAUNCH, NODE, TOUCHES, Hop, Touched, calls_of, floor, hops_of, sampled, scan
from benchmarks.model_table import own_python
from benchmarks.recorder import Launch, Recorder
from gglspeedup import CSRGraph, GPUSampler
from gglspeedup.hops_gpu import hops_of as kernel_hops
from gglspeedup.hops_gpu import seeds_bound
from gglspeedup.kernels import sample_gpu as gpu
from gglspeedup.placement import place_graph
from gglspeedup.workspace_gpu import table_capacity

BEGIN, END = "<!-- python -m benchmarks.model_many -->", "<!-- end of many -->"
CASES = (((15, 10), 16, 32), ((15, 10), 64, 32), ((25, 10), 256, 16), ((25, 10), 1024, 8))


class Together(NamedTuple):
    """Batches that are sampled together: launches, microseconds of kernels and of Python, and the host's calls."""

    launches: list[Launch]
    kernels: float
    calls: list[str]
    python: float

    def whole(self) -> float:
        """Return the microseconds of all of them, one term after the other."""
        return self.device() + LAUNCH * calls_of(self.calls) + self.python

    def device(self) -> float:
        """Return those of the device alone."""
        return self.kernels + NODE * sum(launch.recorded for launch in self.launches)


def together(graph: CSRGraph, sizes: tuple[int, ...], count: int, batches: int) -> Together:
    """Sample batches on the CPU, and let the GPU's code launch them together, as the third of their kind."""
    rng = np.random.default_rng(0)
    given = [(rng.permutation(graph.num_nodes)[:count], number) for number in range(batches)]
    many = [hops_of(graph, batch) for batch in GPUSampler("cpu", graph, sizes).sample_many(given)]
    recorder = Recorder()
    sampler = place_graph(graph, recorder, "device", 1 << 60)
    states = _states(many)
    rounds = []
    for _ in range(60):  # launched, recorded, replayed
        recorder.forget()
        recorder.answers = [states.ravel()]
        begin = time.perf_counter()
        made = list(sampler.sample_each(given, sizes, seed=0, at_once=batches))
        rounds.append(time.perf_counter() - begin)
    assert [len(n_id) for n_id, _ in made] == [len(hops[0].rows) + sum(hop.new for hop in hops) for hops in many]
    bounds = sampler._graph.bounds(kernel_hops(sizes, False, "layer"), *[seeds_bound(count)] * 2)
    table = batches * table_capacity(max(bound.nodes for bound in bounds))
    kernels = sum(_costs(many, recorder.launches, table))
    return Together(recorder.launches, kernels, recorder.calls, 1e6 * statistics.median(rounds[20:]))


def _states(many: list[list[Hop]]) -> Any:
    """Return the states that the device would have."""
    states = np.zeros((len(many), gpu.BATCH_STATE_SIZE), np.int64)
    states[:, gpu.BAD_RANGE] = states[:, gpu.BAD_DUPLICATE] = gpu.NONE
    output = 0
    for state, hops in zip(states, many, strict=True):
        edges = np.array([0, *(len(hop.place) for hop in hops)])
        nodes = len(hops[0].rows) + np.cumsum([0, *(hop.new for hop in hops)])
        state[gpu.NODES :: 2][: len(nodes)] = nodes
        state[gpu.EDGES :: 2][: len(edges)] = np.cumsum(edges)
        state[gpu.OUTPUT] = output
        output += gpu.room_of(int(nodes[-1]))
        output += sum(gpu.room_of(2 * count) + gpu.room_of(count) for count in edges[1:].tolist())
    return states


def _costs(many: list[list[Hop]], launches: list[Launch], table: int) -> Any:
    """Give the microseconds of each launch: the bytes are those of all batches, the trips those of one."""
    at, scans = -1, 0
    for launch in launches:
        name = launch.kernel
        at += name == "count_rows"
        hops = [batch[max(at, 0)] for batch in many]
        if name == "fill_ones":
            parts = [Touched(4 * table, 0, 1)]
        elif name == "scan_sums":
            rows = scans % 2 == 0
            scans += 1
            parts = [scan(len(h.rows if rows else h.place), gpu.TILE_ROWS if rows else gpu.TILE_EDGES) for h in hops]
        elif name == "place_outputs":
            parts = [Touched(8 * gpu.BATCH_STATE_SIZE * len(many), 0, 3)]
        elif name == "emit_batches":
            parts = [_emit_all(batch) for batch in many]
        else:
            parts = [TOUCHES[name](hop, 0) for hop in hops]
        yield floor(launch, sum(p.near + p.far for p in parts), 0, max(p.trips for p in parts))


def _emit_all(hops: list[Hop]) -> Touched:
    parts = [TOUCHES["emit_edges"](hop, 0) for hop in hops]
    nodes = len(hops[0].rows) + sum(hop.new for hop in hops)
    return Touched(16 * nodes + sum(part.near for part in parts), 0, 1 + 2 * len(hops))


def text(graph: CSRGraph, cases: Any = CASES) -> str:
    """Return the table for a graph."""
    lines = [
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges, resident; the other figures are those above.", "",
        "| fanouts | seeds a batch | batches | kernels, one by one | together | calls, one by one | together | "
        "us a batch, one by one | together | of these the device, one by one | together |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for sizes, count, batches in cases:
        one = sampled(graph, sizes, count)
        alone = one.terms(False)
        device = alone["kernels"] + alone["between kernels"]
        whole = device + alone["host"] + own_python(graph, sizes, one.counts)
        many = together(graph, sizes, count, batches)
        lines.append(
            f"| {list(sizes)} | {count} | {batches} | {batches * len(one.costs)} | {len(many.launches)} | "
            f"{batches * calls_of(one.calls)} | {calls_of(many.calls)} | {whole:.0f} | {many.whole() / batches:.0f} | "
            f"{device:.0f} | {many.device() / batches:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into a file between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=2_400_000)
    parser.add_argument("--edges", type=int, default=124_000_000)
    parser.add_argument("--write", type=Path, help="a file that has such a table already")
    options = parser.parse_args()
    made = text(products_like(options.nodes, options.edges))
    if options.write is None:
        print(made)
        return
    marks.replace(options.write, BEGIN, END, made)


if __name__ == "__main__":
    main()
