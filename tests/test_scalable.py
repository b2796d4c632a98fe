"""Models with histories on PyG's layers: what is exact, where gradients go, and that stale rows train."""

from __future__ import annotations

import doctest
import itertools
import warnings

import numpy as np
import pytest
import torch
from conftest import random_graph

from gglspeedup import HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters import scalable
from gglspeedup.adapters.scalable import Scalable
from gglspeedup.normalise import symmetric_normalisation

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    from torch_geometric.nn import GCNConv


class Gcn(Scalable, torch.nn.Module):
    """A GCN of any depth that notes what each layer was given."""

    def __init__(self, widths: list[int], histories: HistoryStore | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(GCNConv(*pair, normalize=False) for pair in itertools.pairwise(widths))
        self.num_layers = len(self.layers)
        self.histories = histories
        self.inputs: list[torch.Tensor] = []

    def layer(self, index, x, batch, state):
        self.inputs.append(x)
        x = self.layers[index](x, batch.adj.edge_index, batch.edge_weight)
        return x if index == self.num_layers - 1 else x.relu()

    def forward(self, batch):
        self.inputs = []
        return self.all_layers(batch)


@pytest.fixture(scope="module")
def problem():
    """A permuted graph with normalised weights, its parts, features, and labels that follow from the features."""
    rng = np.random.default_rng(0)
    graph, weights = symmetric_normalisation(random_graph(rng, 240, 5))
    perm, ptr = partition(graph, 6, "contiguous")
    weighted = permute(graph, perm)
    weights = weights[weighted.edge_ids]
    x = rng.standard_normal((240, 9)).astype(np.float32)[perm]
    smooth = x[:, 0]
    for _ in range(3):  # what three layers can see
        smooth = np.add.reduceat(weights * smooth[weighted.indices], weighted.indptr[:-1])
    return weighted, weights, ptr, x, (smooth > np.median(smooth)).astype(np.int64)


def loader(problem, parts: int, **options) -> SubgraphLoader:
    graph, weights, ptr, x, y = problem
    return SubgraphLoader(
        graph, x, y, ptr=ptr, batch_size=parts, edge_weight=weights, backend="torch", device="cpu", **options
    )  # fmt: skip


def store(depth: int, **options) -> HistoryStore:
    return HistoryStore(240, [8] * (depth - 1), "cpu", **options)


def whole_outputs(problem, depth: int) -> torch.Tensor:
    (batch,) = loader(problem, 6, shuffle=False)
    return Gcn([9, *[8] * (depth - 1), 2])(batch)


def test_all_parts_at_once_equal_the_full_batch(problem):
    (batch,) = loader(problem, 6, shuffle=False)
    plain, kept = Gcn([9, 8, 8, 2]), Gcn([9, 8, 8, 2], store(3))
    ours, expected = kept(batch), plain(batch)
    assert torch.equal(ours, expected)
    for out in (ours, expected):
        torch.nn.functional.cross_entropy(out, batch.y).backward()
    for one, other in zip(kept.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("depth", [2, 3, 5])
@torch.no_grad()
def test_as_many_passes_as_layers_are_exact(problem, depth):
    expected = whole_outputs(problem, depth)
    model = Gcn([9, *[8] * (depth - 1), 2], store(depth))
    batches = loader(problem, 2).evaluation()
    errors = []
    for _ in range(depth):
        outputs = torch.cat([model(batch) for batch in batches])
        errors.append(float((outputs - expected).abs().max()))
    assert errors[-1] < 1e-5 < errors[0]


@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_inference_is_exact_whatever_the_histories_held(problem, depth):
    expected = whole_outputs(problem, depth).numpy()
    model = Gcn([9, *[8] * (depth - 1), 2], HistoryStore(240, [8] * max(1, depth - 1), "cpu"))
    for table in model.histories:
        table.push(np.full((240, 8), 99.0), np.arange(240))
    for parts in (1, 4):
        np.testing.assert_allclose(model.inference(loader(problem, parts).evaluation()), expected, atol=1e-5)
    model.histories = HistoryStore(240, [8] * max(1, depth - 1), "cpu", dtype="float16")
    np.testing.assert_allclose(model.inference(loader(problem, 4).evaluation()), expected, atol=1e-2)
    model.histories = None
    with pytest.raises(TypeError, match="histories needs a HistoryStore"):
        model.inference(loader(problem, 2).evaluation())


def test_gradients_flow_through_the_batchs_own_rows_alone(problem):
    model = Gcn([9, 8, 2], store(2))
    for batch in loader(problem, 2).evaluation():
        model(batch)  # fills the histories
    batch = next(iter(loader(problem, 2)))
    model(batch).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    # The same by hand: the halo's rows as constants.
    model.zero_grad()
    first, last = model.layers
    own = first(batch.x, batch.adj.edge_index, batch.edge_weight).relu()[: batch.batch_size]
    halo = torch.from_numpy(model.histories[0].pull(batch.n_id[batch.batch_size :]))
    assert len(halo)
    rows = last(torch.cat([own, halo]), batch.adj.edge_index, batch.edge_weight)
    rows[: batch.batch_size].sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_rows_pushed_are_the_layers_outputs(problem):
    model = Gcn([9, 8, 2], store(2))
    for batch in loader(problem, 2):
        model(batch)
        own = model.inputs[1][: batch.batch_size].detach().numpy()
        np.testing.assert_array_equal(model.histories[0].pull(batch.n_id[: batch.batch_size]), own)
        assert (model.histories.age(batch.n_id[: batch.batch_size]) == 0).all()
    assert model.histories.staleness().never == 0


def test_prefetching_changes_nothing(problem, tmp_path, monkeypatch):
    plain, ahead = Gcn([9, 8, 8, 2], store(3)), Gcn([9, 8, 8, 2], store(3))
    mapped = Gcn([9, 8, 8, 2], store(3, storage="mmap", path=tmp_path / "histories"))
    asked: list[Scalable] = []
    prefetch = Scalable.prefetch
    monkeypatch.setattr(Scalable, "prefetch", lambda model, batch: (asked.append(model), prefetch(model, batch)))
    for one, other in zip(loader(problem, 2), loader(problem, 2), strict=True):
        ahead.prefetch(other)
        expected = plain(one)
        assert torch.equal(expected, ahead(other)) and torch.equal(expected, mapped(other))
    # What is in the device's memory is not brought ahead unasked.
    assert asked.count(mapped) == asked.count(ahead) > 0 and plain not in asked


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stale_rows_train(problem, dtype):
    model = Gcn([9, 8, 8, 2], store(3, dtype=dtype))
    batches = loader(problem, 2, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(model(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    (whole,) = loader(problem, 6, shuffle=False)
    model.histories = None
    assert (model(whole).argmax(1) == whole.y).float().mean() > 0.85


def test_arrays_of_no_framework_are_refused(problem):
    batch = next(iter(loader(problem, 2)))
    with pytest.raises(TypeError, match="x needs a tensor of a framework"):
        Gcn([9, 8, 2], store(2)).push_and_pull(0, [[0.0] * 8] * 240, batch)


def test_the_examples_run():
    results = doctest.testmod(scalable)
    assert results.attempted > 0 and results.failed == 0
