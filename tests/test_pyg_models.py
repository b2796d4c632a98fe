"""The models on PyG's layers: formulas, batches against whole graphs, layer by layer, what training needs of them."""

from __future__ import annotations

import dataclasses
import doctest
import itertools

import numpy as np
import pytest
import torch
from conftest import random_graph

from gglspeedup import HistoryStore, SubgraphLoader, partition, permute
from gglspeedup.adapters import pyg_models
from gglspeedup.adapters.pyg_models import APPNP, GAT, GCN, GCNII, GIN, PNA, PNAJK
from gglspeedup.normalise import symmetric_normalisation

NODES, FEATURES, CLASSES = 120, 9, 4
HISTOGRAM = [3, 20, 30, 30, 20, 10, 7]

MODELS = {
    "gcn": lambda **options: GCN(FEATURES, 8, CLASSES, 3, **options),
    "gat": lambda **options: GAT(FEATURES, 5, CLASSES, 3, heads=2, out_heads=3, **options),
    "appnp": lambda **options: APPNP(FEATURES, 8, CLASSES, 5, 0.2, **options),
    "gcnii": lambda **options: GCNII(FEATURES, 8, CLASSES, 6, 0.2, 0.6, **options),
    "gcnii_two_weights": lambda **options: GCNII(FEATURES, 8, CLASSES, 3, shared_weights=False, **options),
    "gin": lambda **options: GIN(FEATURES, 8, CLASSES, 3, **options),
    "pna": lambda **options: PNA(FEATURES, 8, CLASSES, HISTOGRAM, 3, towers=2, **options),
    "pna_jk": lambda **options: PNAJK(FEATURES, 8, CLASSES, HISTOGRAM, 3, towers=2, **options),
    "gcn_of_one_layer": lambda **options: GCN(FEATURES, 8, CLASSES, 1, **options),
    "pna_jk_of_one_layer": lambda **options: PNAJK(FEATURES, 8, CLASSES, HISTOGRAM, 1, **options),
}
MULTIPLY = ("gcn", "appnp", "gcnii", "gcnii_two_weights", "gin")  # whose layers can be sparse products


@pytest.fixture(scope="module")
def problem():
    """A permuted graph with normalised weights, its parts and features."""
    rng = np.random.default_rng(0)
    graph, weight = symmetric_normalisation(random_graph(rng, NODES, 5))
    perm, ptr = partition(graph, 6, "random")
    graph = permute(graph, perm)
    x = rng.standard_normal((NODES, FEATURES)).astype(np.float32)
    x[rng.random(x.shape) < 0.5] = 0
    return graph, weight[graph.edge_ids], ptr, x


@pytest.fixture(params=["products", "messages"])
def edges(request, monkeypatch):
    """Both ways in which edges are given to PyG's layers."""
    if request.param == "products" and not pyg_models._SPARSE_PRODUCTS:
        pytest.skip("this build of torch lacks sparse products")
    monkeypatch.setattr(pyg_models, "_SPARSE_PRODUCTS", request.param == "products")


def loader(problem, parts: int) -> SubgraphLoader:
    graph, weight, ptr, x = problem
    y = np.arange(NODES) % CLASSES
    return SubgraphLoader(
        graph, x, y, ptr=ptr, batch_size=parts, edge_weight=weight, shuffle=False, backend="torch", device="cpu"
    )  # fmt: skip


def make(name: str, dropout: float = 0.0, seed: int = 0):
    torch.manual_seed(seed)
    return MODELS[name](dropout=dropout)


def store(model, **options) -> HistoryStore:
    return HistoryStore(NODES, model.history_widths or [1], "cpu", **options)


def trained(model, batches, seed: int = 1):
    """Outputs and gradients of a pass over batches."""
    model.zero_grad()
    outputs = []
    for number, batch in enumerate(batches):
        torch.manual_seed(seed + number)
        outputs.append(model(batch))
        torch.nn.functional.cross_entropy(outputs[-1], batch.y).backward()
    return torch.cat(outputs).detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_close(ours, expected, tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# --- what they compute ---------------------------------------------------------------------------------------------


def dense(problem) -> torch.Tensor:
    graph, weight, _, _ = problem
    matrix = torch.zeros(NODES, NODES)
    rows = np.repeat(np.arange(NODES), np.diff(graph.indptr))
    return matrix.index_put((torch.from_numpy(rows), torch.from_numpy(graph.indices.astype(np.int64))),
                            torch.from_numpy(weight), accumulate=True)  # fmt: skip


# In the place of dropout, the formulas have `drop`.


def gcn(model, a, x, drop):
    for index, layer in enumerate(model.convs):
        x = a @ (drop(x) @ layer.lin.weight.T) + layer.bias
        x = x if index == len(model.convs) - 1 else x.relu()
    return x


def appnp(model, a, x, drop):
    first, second = model.lins
    x = initial = second(drop(first(drop(x)).relu()))
    for _ in range(5):
        x = 0.8 * a @ x + 0.2 * initial
    return x


def gcnii(model, a, x, drop):
    x = initial = model.lins[0](drop(x)).relu()
    for depth, layer in enumerate(model.convs, start=1):
        mixed, beta = 0.8 * a @ drop(x) + 0.2 * initial, np.log(0.6 / depth + 1)
        x = ((1 - beta) * mixed + beta * mixed @ layer.weight1).relu()
    return model.lins[1](drop(x))


def gat(model, a, x, drop):
    for index, layer in enumerate(model.convs):
        heads = []
        for head, weight in enumerate(layer.lin.weight.chunk(layer.heads)):
            h = drop(x) @ weight.T
            score = (h @ layer.att_dst[0, head])[:, None] + (h @ layer.att_src[0, head])[None]
            score = torch.nn.functional.leaky_relu(score, 0.2).masked_fill(a == 0, -torch.inf)
            heads.append(score.softmax(dim=1) @ h)
        if index == len(model.convs) - 1:
            return torch.stack(heads).mean(0) + layer.bias
        x = torch.nn.functional.elu(torch.cat(heads, dim=1) + layer.bias)


def gin(model, a, x, drop):
    x = model.lins[0](drop(x)).relu()
    for layer in model.convs:
        x = x + layer.nn(a @ drop(x) + (1 + layer.eps) * drop(x))
    return model.lins[1](x)


@pytest.mark.parametrize("drop", [lambda x: x, lambda x: 2 * x], ids=["as_it_is", "dropped"])
@pytest.mark.parametrize("formula", [gcn, appnp, gcnii, gat, gin], ids=lambda formula: formula.__name__)
@torch.no_grad()
def test_whole_graphs_give_the_formula(problem, edges, formula, drop, monkeypatch):
    graph, weight, ptr, x = problem
    if formula is gat:  # the matrix cannot tell parallel edges
        rows = np.repeat(np.arange(NODES), np.diff(graph.indptr))
        codes = np.unique(rows * NODES + graph.indices)
        graph = type(graph)(np.searchsorted(codes, np.arange(NODES + 1) * NODES), codes % NODES)
    if formula in (gat, gin):
        weight = np.ones(graph.num_edges, np.float32)
    problem = graph, weight, ptr, x
    (batch,) = loader(problem, 6)
    model = make(formula.__name__).eval()
    monkeypatch.setattr(model, "_drop", drop)
    for parameter in model.parameters():  # biases, too, which start as zeros
        parameter += 0.1 * torch.randn(parameter.shape)
    assert_close([model(batch)], [formula(model, dense(problem), torch.from_numpy(x), drop)])


@torch.no_grad()
def test_jumping_knowledge_joins_all_layers(problem):
    (batch,) = loader(problem, 6)
    model = make("pna_jk")
    rows = [model.lins[0](batch.x).relu()]
    for layer in model.convs:
        rows.append(layer(rows[-1], batch.adj.edge_index).relu())
    assert_close([model(batch)], [model.lins[1](torch.cat(rows, dim=1))])
    plain = make("pna")
    x = plain.lins[0](batch.x).relu()
    for layer in plain.convs:
        x = layer(x, batch.adj.edge_index).relu()
    assert_close([plain(batch)], [plain.lins[1](x)])


def test_edges_without_weights_weigh_one(problem, edges):
    graph, weight, ptr, x = problem
    for name in ("gcn", "appnp", "gcnii"):
        expected = trained(make(name), loader((graph, np.ones_like(weight), ptr, x), 6))
        ours = trained(make(name), loader((graph, None, ptr, x), 6))
        assert torch.equal(ours[0], expected[0])
    for name in ("gat", "gin", "pna", "pna_jk"):  # which look at none
        assert torch.equal(trained(make(name), loader((graph, None, ptr, x), 6))[0],
                           trained(make(name), loader(problem, 6))[0])  # fmt: skip


# --- in parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_parts_at_once_equal_the_full_batch(problem, edges, name):
    batches = list(loader(problem, 6))
    plain, kept = make(name, 0.5), make(name, 0.5)
    kept.histories = store(kept)
    (ours, our_gradients), (expected, gradients) = trained(kept, batches), trained(plain, batches)
    assert torch.equal(ours, expected)
    for one, other in zip(our_gradients, gradients, strict=True):
        assert torch.equal(one, other)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_layer_by_layer_several_batches_equal_the_full_batch(problem, edges, name, dtype):
    (whole,) = loader(problem, 6)
    model = make(name, 0.5).eval()
    expected = model(whole).numpy()
    model.histories = store(model, dtype=dtype)
    for table in model.histories:
        table.push(np.full(table.shape, 99.0), np.arange(NODES))
    for parts in (1, 4):
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        found = model.inference(loader(problem, parts))
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_passes_over_parts_converge_to_the_full_batch(problem, edges, name):
    (whole,) = loader(problem, 6)
    model = make(name).eval()
    expected = model(whole)
    model.histories = store(model)
    for _ in range(model.num_layers):
        ours = torch.cat([model(batch) for batch in loader(problem, 2)])
    assert_close([ours], [expected], 1e-4)


@pytest.mark.parametrize("name", MULTIPLY)
def test_products_equal_messages(problem, monkeypatch, name):
    if not pyg_models._SPARSE_PRODUCTS:
        pytest.skip("this build of torch lacks sparse products")
    found = []
    for products in (True, False):
        monkeypatch.setattr(pyg_models, "_SPARSE_PRODUCTS", products)
        model = make(name)
        model.histories = store(model)
        found.append(trained(model, itertools.chain(loader(problem, 2), loader(problem, 1))))
    assert_close([found[0][0], *found[0][1]], [found[1][0], *found[1][1]], 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_layers_hand_over_rows_of_the_batch_alone(problem, edges, name):
    model = make(name)
    model.histories = store(model)
    batch = next(iter(loader(problem, 2)))
    assert len(batch.n_id) > batch.batch_size
    x, state = batch.x, {}
    for index in range(model.num_layers):
        rows = model.layer(index, x, batch, state)
        width = CLASSES if index == model.num_layers - 1 else model.history_widths[index]
        assert rows.shape == (batch.batch_size, width)
        if index < model.num_layers - 1:
            x = model.push_and_pull(index, rows, batch)


def test_history_widths():
    assert GCN(9, 16, 4, 3).history_widths == (16, 16)
    assert GAT(9, 8, 4, 2, heads=5).history_widths == (40,)
    assert APPNP(9, 64, 4, 10).history_widths == (4,) * 9
    assert GCNII(9, 32, 4, 64).history_widths == (32,) * 63
    assert GIN(9, 16, 4, 1).history_widths == ()
    assert PNA(9, 16, 4, HISTOGRAM, 4).history_widths == PNAJK(9, 16, 4, HISTOGRAM, 4).history_widths == (16,) * 3


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_weight_decay(name):
    model = make(name)
    regularised, others = ({*map(id, group.parameters())} for group in (model.reg_modules, model.nonreg_modules))
    assert not regularised & others
    assert regularised | others == {*map(id, model.parameters())}
    assert not any("modules" in key for key in model.state_dict())  # no parameter has a second name


def test_what_is_regularised():
    model = GCN(9, 8, 4, 3)
    assert [*model.reg_modules] == [*model.convs[:2]] and [*model.nonreg_modules] == [model.convs[2]]
    model = GAT(9, 8, 4)
    assert [*model.reg_modules] == [*model.convs] and not len(model.nonreg_modules)
    model = APPNP(9, 8, 4)
    assert [*model.reg_modules] == [model.lins[0]] and [*model.nonreg_modules] == [model.lins[1]]
    for model in (GCNII(9, 8, 4), GIN(9, 8, 4), PNA(9, 8, 4, HISTOGRAM), PNAJK(9, 8, 4, HISTOGRAM)):
        assert [*model.reg_modules] == [*model.convs] and [*model.nonreg_modules] == [*model.lins]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_drawn_anew(name):
    model = make(name, seed=0)
    before = [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(0)
    model.reset_parameters()
    again = [parameter.clone() for parameter in model.parameters()]
    model.reset_parameters()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert matrices and not any(
        torch.equal(one, other)
        for one, other in zip(matrices, [parameter for parameter in again if parameter.dim() > 1], strict=True)
    )
    assert [one.shape for one in before] == [one.shape for one in again]
    torch.manual_seed(0)
    model.reset_parameters()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again, strict=True))


def test_dropout():
    model = GCN(9, 8, 4, dropout=0.3)
    torch.manual_seed(0)
    x = torch.rand(400, 500) + 1
    dropped = model._drop(x)
    kept = dropped != 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    assert abs(kept.float().mean(0) - 0.7).max() < 0.15 and abs(kept.float().mean(1) - 0.7).max() < 0.15
    sparse = model._drop(x.to_sparse_csr())
    assert sparse.layout == torch.sparse_csr
    values = sparse.to_dense()
    kept = values != 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    torch.testing.assert_close(values[kept], x[kept] / 0.7)
    assert model.eval()._drop(x) is x
    assert GCN(9, 8, 4, dropout=0)._drop(x) is x


@pytest.mark.parametrize("name", MODELS)
def test_sparse_features_equal_dense_ones(problem, edges, name):
    (batch,) = loader(problem, 6)
    expected = trained(make(name), [batch])
    batch.x = batch.x.to_sparse_csr()
    ours = trained(make(name), [batch])
    assert_close([ours[0], *ours[1]], [expected[0], *expected[1]])
    model = make(name, 0.5)
    assert not torch.equal(trained(model, [batch])[0], trained(model, [batch], seed=2)[0])


@torch.no_grad()
def test_inference_takes_sparse_features(problem):
    model = make("gcn").eval()
    model.histories = store(model, dtype="float16")
    batches = loader(problem, 2)
    expected = model.inference(batches)
    sparse = [dataclasses.replace(batch, x=batch.x.to_sparse_csr()) for batch in batches]
    np.testing.assert_allclose(model.inference(sparse), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["gcn", "gat", "appnp", "gcnii", "gin", "pna", "pna_jk"])
def test_stale_rows_train(problem, name):
    graph, weight, ptr, x = problem
    y = x[:, 0] > 0
    batches = SubgraphLoader(
        graph, x, y.astype(np.int64), ptr=ptr, batch_size=2, edge_weight=weight, backend="torch", device="cpu"
    )  # fmt: skip
    model = make(name)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    model.histories = store(model)
    losses = []
    for _ in range(30):
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(model(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_other_dtypes(problem, edges):
    (batch,) = loader(problem, 6)
    batch.x = batch.x.double()
    for name in MULTIPLY:
        assert make(name).double()(batch).dtype == torch.float64


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_model", "error", "match"),
    [
        (lambda: GCN(9, 8, 4, 0), ValueError, "num_layers needs at least 1"),
        (lambda: GCN(0, 8, 4), ValueError, "in_channels needs at least 1"),
        (lambda: GCN(9, 8.0, 4), TypeError, "hidden_channels needs an integer"),
        (lambda: GCN(9, 8, 4, dropout=1), ValueError, "dropout needs at least 0 and less than 1, got 1"),
        (lambda: GCN(9, 8, 4, dropout=float("nan")), ValueError, "dropout needs"),
        (lambda: GCN(9, 8, 4, dropout="0.5"), TypeError, "dropout needs a number"),
        (lambda: GAT(9, 8, 4, heads=0), ValueError, "heads needs at least 1"),
        (lambda: APPNP(9, 8, 4, alpha=-0.1), ValueError, "alpha needs"),
        (lambda: GCNII(9, 8, 4, shared_weights=1), TypeError, "shared_weights needs True or False"),
        (lambda: GIN(9, 8, 4, batch_norm="no"), TypeError, "batch_norm needs True or False"),
        (lambda: PNA(9, 8, 4, HISTOGRAM, towers=3), ValueError, "towers needs a divisor of 8"),
        (lambda: PNA(9, 8, 4, [[1]]), ValueError, "deg needs numbers of nodes"),
        (lambda: PNA(9, 8, 4, [0, 0]), ValueError, "deg needs numbers of nodes"),
    ],
)
def test_bad_arguments_are_refused(make_model, error, match):
    with pytest.raises(error, match=match):
        make_model()


def test_example():
    done = doctest.testmod(pyg_models)
    assert done.attempted and not done.failed
