"""The model of a batch on a GPU launches what the GPU's code launches, and knows every kernel of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from host_cuda import HostRuntime

from benchmarks.graphs import products_like
from benchmarks.model import COPY, Hop, Touched, floor, gathered, hops_of, sampled, sectors, waits_of
from benchmarks.model_many import BEGIN, CASES, END, together
from benchmarks.model_table import SIZES, text
from benchmarks.recorder import Launch
from gglspeedup import GPUSampler
from gglspeedup.placement import place_graph

DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"


@pytest.fixture(scope="module")
def graph():
    return products_like(2000, 20_000)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_launches_are_those_of_the_kernels_run_on_the_host(graph, sizes, tmp_path_factory):
    batch = sampled(graph, sizes, 32)
    runtime = HostRuntime(tmp_path_factory.getbasetemp())
    sampler = place_graph(graph, runtime, "device", 1 << 60)
    seeds = np.random.default_rng(0).permutation(graph.num_nodes)[:32]
    for _ in range(3):
        runtime.launches.clear()
        before = runtime.reads
        n_id, hops = sampler.sample(seeds, sizes, seed=0, batch=2)
    assert [cost.launch.kernel for cost in batch.costs] == runtime.launches
    assert waits_of(batch.calls) == runtime.reads - before == 1
    assert batch.nodes == len(n_id) and batch.edges == sum(len(e_id) for _, e_id, _ in hops)


def test_the_document_has_the_launches_of_today(graph):
    found = DOCUMENT.read_text(encoding="utf-8")
    for sizes in SIZES:
        batch = sampled(graph, sizes, 32)
        recorded = sum(cost.launch.recorded for cost in batch.costs)
        uploads, waits = batch.calls.count("upload"), waits_of(batch.calls)
        rows = re.findall(rf"^\| {re.escape(str(list(sizes)))} \| [\d,]+ \| [\d,]+ \| (.*?) \| resident", found, re.M)
        assert rows == [f"{len(batch.costs)} | {recorded} | {uploads} | {waits}"], "python -m benchmarks.model_table"
        table = found.split(f"### Kernels of {list(sizes)}")[1].split("###")[0]
        kernels = re.findall(r"^\| [\d-]+ \| (\w+) \|", table, re.M)
        assert kernels == [cost.launch.kernel for cost in batch.costs], "python -m benchmarks.model_table"


def test_what_is_touched(graph):
    assert sectors(np.array([0, 1, 3, 4, 9, 9]), 8) == 3 * 32
    batch = GPUSampler("cpu", graph, [3, 2]).sample([5, 6, 7], batch=0)
    hops = hops_of(graph, batch)
    np.testing.assert_array_equal(hops[0].rows, [5, 6, 7])
    for hop in hops:
        np.testing.assert_array_equal(graph.indices[hop.place], hop.neighbour)
    assert 3 + sum(hop.new for hop in hops) == len(batch.n_id)
    assert isinstance(hops[1], Hop) and len(hops[1].rows) == 3 + hops[0].new


def test_a_kernel_takes_its_bytes_or_its_trips():
    small, large = Launch("draw_8", 4, 256, True), Launch("draw_8", 10_000, 256, True)
    assert floor(small, int(COPY / 1e6), 0, 3) == 3 and floor(small, int(COPY / 1e5), 0, 3) == pytest.approx(10)
    assert floor(large, 0, 0, 3) == 3 * 13  # waves of 132 multiprocessors with 48 warps each


def test_a_kernel_that_is_not_known_is_an_error(graph):
    with pytest.raises(KeyError, match="draw_128"):
        sampled(graph, (40,), 32)


def test_gathers():
    near, far = gathered(10_000, False), gathered(10_000, True)
    assert near[0] > 1e6 * 2 * 512 * 10_000 / COPY and far[0] > 10 * near[0]
    assert near[2].count("launch") == 1 and waits_of(near[2]) == 0
    assert Touched(1, 0, 1).far == 0


def test_the_tables_are_made(graph):
    assert text(graph).count("PREDICTED") > 8


def test_several_batches_are_launched_as_the_kernels_on_the_host_are(graph, tmp_path_factory):
    many = together(graph, (4, 3), 16, 5)
    runtime = HostRuntime(tmp_path_factory.getbasetemp())
    sampler = place_graph(graph, runtime, "device", 1 << 60)
    rng = np.random.default_rng(0)
    given = [(rng.permutation(graph.num_nodes)[:16], number) for number in range(5)]
    for _ in range(3):
        runtime.launches.clear()
        before = runtime.reads
        list(sampler.sample_each(given, (4, 3), seed=0, at_once=5))
    assert [launch.kernel for launch in many.launches] == runtime.launches
    assert waits_of(many.calls) == runtime.reads - before == 1
    assert {launch.layers for launch in many.launches if "fill" not in launch.kernel} == {1, 5}
    assert many.kernels < 2 * sum(cost.resident for cost in sampled(graph, (4, 3), 16).costs)


def test_the_document_has_the_launches_of_several_batches(graph):
    found = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    for sizes, count, batches in CASES:
        one, many = sampled(graph, sizes, count), together(graph, sizes, count, batches)
        head = f"| {list(sizes)} | {count} | {batches} | {batches * len(one.costs)} | {len(many.launches)} |"
        assert found.count(head) == 1, "python -m benchmarks.model_many"
