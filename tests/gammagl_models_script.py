"""Checks of the models on GammaGL's layers, run by test_gammagl_models.py in a process a backend.

``gammagl_models_script.py BACKEND`` prints a JSON object, of each check None or the traceback. Frameworks are imported
in the functions alone, since pytest imports this file, too, when it looks for doctests.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

NODES, FEATURES, CLASSES = 90, 7, 3
SIZES = {"gcn": 3, "gat": 3, "appnp": 5, "gcnii": 6, "gcnii_two_weights": 3, "gcn_of_one_layer": 1}


def make(name: str, dropout: float = 0.0, seed: int = 0) -> Any:
    """A model with parameters that a seed decides, biases as well, on every backend the same."""
    from gglspeedup.adapters import gammagl_models as models

    kind = {"gcn": models.GCN, "gat": models.GAT, "appnp": models.APPNP, "gcnii": models.GCNII}[name.split("_")[0]]
    options = {"gat": {"heads": 2, "out_heads": 3}, "appnp": {"alpha": 0.2}, "gcnii": {"alpha": 0.2, "theta": 0.6}}
    options["gcnii_two_weights"] = {"shared_weights": False}
    model = kind(FEATURES, 8, CLASSES, SIZES[name], dropout=dropout, **options.get(name, {}))
    rng = np.random.default_rng(seed)
    for weight in sorted(model.trainable_weights, key=lambda weight: tuple(weight.shape)):
        fill(weight, rng.normal(0, 0.4, tuple(weight.shape)).astype(np.float32))
    return model


def fill(weight: Any, values: np.ndarray) -> None:
    """Overwrite a parameter."""
    import tensorlayerx as tlx

    if tlx.BACKEND == "torch":
        weight.data.copy_(tlx.convert_to_tensor(values))
    else:
        getattr(weight, {"tensorflow": "assign", "paddle": "set_value"}[tlx.BACKEND])(values)


def numpy_of(value: Any) -> np.ndarray:
    import tensorlayerx as tlx

    return np.array(tlx.convert_to_numpy(value))


def values(model: Any) -> list[np.ndarray]:
    return [numpy_of(weight) for weight in model.trainable_weights]


@lru_cache
def problem() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A permuted graph, its weights and parts, features and classes: neighbours mostly share theirs."""
    from gglspeedup import CSRGraph, partition, permute
    from gglspeedup.normalise import symmetric_normalisation

    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, NODES)
    edges = np.unique(rng.integers(0, NODES, (2, 900)), axis=1)
    edges = edges[:, (y[edges[0]] == y[edges[1]]) | (rng.random(edges.shape[1]) < 0.1)]
    graph, weight = symmetric_normalisation(CSRGraph.from_edge_index(edges, NODES))
    perm, ptr = partition(graph, 6, "random")
    graph = permute(graph, perm)
    x = rng.normal(0, 0.7, (NODES, FEATURES)) + np.eye(CLASSES, FEATURES)[y]
    return graph, weight[graph.edge_ids], ptr, x.astype(np.float32)[perm], y[perm]


def loader(parts: int, **options: Any) -> Any:
    from gglspeedup import SubgraphLoader

    graph, weight, ptr, x, y = problem()
    options = {"edge_weight": weight, "shuffle": False, **options}
    return SubgraphLoader(graph, x, y, ptr=ptr, batch_size=parts, backend="tensorlayerx", device="cpu", **options)


def store(model: Any) -> Any:
    from gglspeedup import HistoryStore

    return HistoryStore(NODES, model.history_widths or [1], "cpu")


def assert_close(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def whole_outputs(model: Any) -> np.ndarray:
    (batch,) = loader(6)
    return numpy_of(model(batch))


# --- formulas ------------------------------------------------------------------------------------------------------


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ numpy_of(layer.weights) + numpy_of(layer.biases)


def gcn(model: Any, a: np.ndarray, x: np.ndarray, drop: Callable[[Any], Any]) -> np.ndarray:
    for index, layer in enumerate(model.convs):
        x = a @ (drop(x) @ numpy_of(layer.linear.weights)) + numpy_of(layer.bias)
        x = x if index == len(model.convs) - 1 else relu(x)
    return x


def gat(model: Any, a: np.ndarray, x: np.ndarray, drop: Callable[[Any], Any]) -> np.ndarray:
    for layer in model.convs:
        heads = []
        for head, weight in enumerate(np.split(numpy_of(layer.linear.weights), layer.heads, axis=1)):
            h = drop(x) @ weight
            score = (h @ numpy_of(layer.att_dst)[0, head])[:, None] + (h @ numpy_of(layer.att_src)[0, head])[None]
            share = np.exp(np.where(score > 0, score, 0.2 * score)) * (a != 0)
            heads.append(share / share.sum(1, keepdims=True) @ h)
        if not layer.concat:
            return np.mean(heads, axis=0) + numpy_of(layer.bias)
        x = np.concatenate(heads, axis=1) + numpy_of(layer.bias)
        x = np.where(x > 0, x, np.exp(x) - 1)
    raise AssertionError("the last layer joins its heads")


def appnp(model: Any, a: np.ndarray, x: np.ndarray, drop: Callable[[Any], Any]) -> np.ndarray:
    first, second = model.lins
    x = initial = linear(second, drop(relu(linear(first, drop(x)))))
    for _ in range(5):
        x = 0.8 * a @ x + 0.2 * initial
    return x


def gcnii(model: Any, a: np.ndarray, x: np.ndarray, drop: Callable[[Any], Any]) -> np.ndarray:
    first, last = model.lins
    x = initial = relu(linear(first, drop(x)))
    for depth, layer in enumerate(model.convs, start=1):
        mixed, beta = 0.8 * a @ drop(x) + 0.2 * initial, math.log(0.6 / depth + 1)
        x = relu((1 - beta) * mixed + beta * mixed @ numpy_of(layer.linear.weights))
    return linear(last, drop(x))


def gcnii_two_weights(model: Any, a: np.ndarray, x: np.ndarray, drop: Callable[[Any], Any]) -> np.ndarray:
    first, last = model.lins
    x = initial = relu(linear(first, drop(x)))
    for depth, layer in enumerate(model.convs, start=1):
        ours, theirs, beta = 0.9 * a @ drop(x), 0.1 * initial, math.log(0.5 / depth + 1)
        ours = (1 - beta) * ours + beta * ours @ numpy_of(layer.linear.weights)
        x = relu(ours + (1 - beta) * theirs + beta * theirs @ numpy_of(layer.linear0.weights))
    return linear(last, drop(x))


FORMULAS = {"gcn": gcn, "gat": gat, "appnp": appnp, "gcnii": gcnii, "gcnii_two_weights": gcnii_two_weights,
            "gcn_of_one_layer": gcn}  # fmt: skip


def each_formula(name: str) -> None:
    graph, weight, _, x, _ = problem()
    dense = np.zeros((NODES, NODES))
    np.add.at(dense, (np.repeat(np.arange(NODES), np.diff(graph.indptr)), graph.indices), weight)
    model = make(name, dropout=0.5)
    model.set_eval()
    assert_close(whole_outputs(model), FORMULAS[name](model, dense, x.astype(float), lambda x: x))
    model._drop = lambda x: 2 * x  # which tells where dropout is
    assert_close(whole_outputs(model), FORMULAS[name](model, dense, x.astype(float), model._drop))


# --- in parts ------------------------------------------------------------------------------------------------------


def each_passes_converge(name: str) -> None:
    model = make(name)
    model.set_eval()
    expected = whole_outputs(model)
    model.histories = store(model)
    errors = []
    for _ in range(model.num_layers):
        ours = np.concatenate([numpy_of(model(batch)) for batch in loader(2)])
        errors.append(np.abs(ours - expected).max() / np.abs(expected).max())
    assert errors[-1] < 1e-5, errors
    assert model.num_layers == 1 or errors[0] > 1e-3, errors


def each_inference(name: str) -> None:
    model = make(name, dropout=0.5)
    model.set_eval()
    expected = whole_outputs(model)
    model.histories = store(model)
    for table in model.histories:
        table.push(np.full(table.shape, 99.0), np.arange(NODES))
    for parts in (1, 4):
        assert_close(model.inference(loader(parts)), expected)
    for batch in loader(2):  # the histories hold exact rows
        assert_close(numpy_of(model(batch)), expected[numpy_of(batch.n_id)[: batch.batch_size]])


def each_layers_rows(name: str) -> None:
    model = make(name)
    model.histories = store(model)
    batch = next(iter(loader(2)))
    assert len(batch.n_id) > batch.batch_size
    x, state = batch.x, {}
    for index in range(model.num_layers):
        rows = model.layer(index, x, batch, state)
        width = CLASSES if index == model.num_layers - 1 else model.history_widths[index]
        assert tuple(rows.shape) == (batch.batch_size, width)
        if index < model.num_layers - 1:
            x = model.push_and_pull(index, rows, batch)
            assert tuple(x.shape) == (len(batch.n_id), width)


def each_weights_of_one(name: str) -> None:
    graph, _, _, _, _ = problem()
    model = make(name)
    model.set_eval()
    (plain,) = loader(6, edge_weight=None)
    (ones,) = loader(6, edge_weight=np.ones(graph.num_edges, np.float32))
    assert plain.edge_weight is None
    assert_close(numpy_of(model(plain)), numpy_of(model(ones)), 0)
    changed = np.abs(numpy_of(model(ones)) - whole_outputs(model)).max()
    assert (changed == 0) == (name == "gat")  # which looks at none


def check_nodes_without_edges() -> None:
    """GCNConv of GammaGL counts nodes by the ids among the edges."""
    import tensorlayerx as tlx

    from gglspeedup import CSRGraph, SubgraphLoader

    graph = CSRGraph([0, 1, 2, 2, 2], [1, 0])
    x = np.eye(4, FEATURES, dtype=np.float32)
    model = make("gcn")
    for parts in (1, 2) if tlx.BACKEND != "paddle" else (2,):  # which takes the largest of no edges' ids
        options = {"ptr": [0, 2, 4], "batch_size": parts, "backend": "tensorlayerx", "device": "cpu"}
        batches = SubgraphLoader(graph, x, shuffle=False, **options)
        assert sum(len(numpy_of(model(batch))) for batch in batches) == 4


# --- training ------------------------------------------------------------------------------------------------------


def updater(model: Any) -> Callable[[Any], float]:
    """A step of Adam on a batch, TensorLayerX's way; it returns the loss."""
    import tensorlayerx as tlx

    class BatchLoss(tlx.model.WithLoss):
        def forward(self, batch: Any, y: Any) -> Any:
            return self._loss_fn(self.backbone_network(batch), y)

    loss = BatchLoss(model, tlx.losses.softmax_cross_entropy_with_logits)
    step = tlx.model.TrainOneStep(loss, tlx.optimizers.Adam(lr=0.02), model.trainable_weights)
    return lambda batch: float(step(batch, batch.y))


def each_step(name: str) -> None:
    """Every parameter has a gradient, and with all parts in a batch histories do not change it."""

    def changed(parts: int, *, kept: bool) -> list[np.ndarray]:
        batch, model = next(iter(loader(parts))), make(name)
        model.histories = store(model) if kept else None
        step, before = updater(model), values(model)
        for _ in range(2):
            step(batch)
        changes = [new - old for old, new in zip(before, values(model), strict=True)]
        assert all(np.abs(change).max() > 1e-3 for change in changes)
        return changes

    changed(2, kept=True)
    for one, other in zip(changed(6, kept=True), changed(6, kept=False), strict=True):
        assert_close(one, other, 1e-4)


def each_learns(name: str) -> None:
    import tensorlayerx as tlx

    tlx.set_seed(0)
    model = make(name, dropout=0.2)
    model.histories = store(model)
    step, batches, losses = updater(model), loader(3, shuffle=True), []
    model.set_train()
    for _ in range(30):
        losses.append(np.mean([step(batch) for batch in batches]))
    model.set_eval()
    accuracy = (whole_outputs(model).argmax(1) == problem()[4]).mean()
    assert losses[-1] < 0.5 * losses[0], losses
    assert accuracy > 0.8, accuracy


def each_dropout(name: str) -> None:
    (batch,) = loader(6)
    model = make(name, dropout=0.5)
    model.set_train()
    assert np.abs(numpy_of(model(batch)) - numpy_of(model(batch))).max() > 1e-3
    model.set_eval()
    assert_close(numpy_of(model(batch)), numpy_of(make(name)(batch)))
    model.set_train()
    assert np.abs(numpy_of(model(batch)) - numpy_of(model(batch))).max() > 1e-3


def check_attention_is_dropped() -> None:
    (batch,) = loader(6)
    model = make("gat", dropout=0.5)
    model._drop = lambda x: x
    model.set_train()
    assert np.abs(numpy_of(model(batch)) - numpy_of(model(batch))).max() > 1e-3
    model.set_eval()
    assert_close(numpy_of(model(batch)), numpy_of(model(batch)), 0)


def each_regularised(name: str) -> None:
    model = make(name)
    regularised, others = ([id(weight) for weight in group.trainable_weights]
                           for group in (model.reg_modules, model.nonreg_modules))  # fmt: skip
    assert sorted(regularised + others) == sorted(map(id, model.trainable_weights))
    counts = {"gcn": (4, 2), "gat": (12, 0), "appnp": (2, 2), "gcnii": (6, 4), "gcnii_two_weights": (6, 4)}
    assert (len(regularised), len(others)) == counts.get(name, (0, 2))


# --- arguments -----------------------------------------------------------------------------------------------------


def check_widths() -> None:
    from gglspeedup.adapters.gammagl_models import APPNP, GAT, GCN, GCNII

    assert GCN(9, 16, 4, 3).history_widths == (16, 16)
    assert GAT(9, 8, 4, 2, heads=5).history_widths == (40,)
    assert APPNP(9, 64, 4, 10).history_widths == (4,) * 9
    assert GCNII(9, 32, 4, 64).history_widths == (32,) * 63
    assert GCN(9, 16, 4, 1).history_widths == ()


def check_refusals() -> None:
    from gglspeedup.adapters.gammagl_models import APPNP, GAT, GCN, GCNII

    for make_model, error, message in (
        (lambda: GCN(9, 8, 4, 0), ValueError, "num_layers needs at least 1"),
        (lambda: GCN(0, 8, 4), ValueError, "in_channels needs at least 1"),
        (lambda: GCN(9, 8.0, 4), TypeError, "hidden_channels needs an integer"),
        (lambda: GCN(9, 8, 4, dropout=1), ValueError, "dropout needs at least 0 and less than 1, got 1"),
        (lambda: GCN(9, 8, 4, dropout=float("nan")), ValueError, "dropout needs"),
        (lambda: GCN(9, 8, 4, dropout="0.5"), TypeError, "dropout needs a number"),
        (lambda: GAT(9, 8, 4, heads=0), ValueError, "heads needs at least 1"),
        (lambda: GAT(9, 8, 4, out_heads=True), TypeError, "out_heads needs an integer"),
        (lambda: APPNP(9, 8, 4, alpha=-0.1), ValueError, "alpha needs"),
        (lambda: GCNII(9, 8, 4, theta=-1), ValueError, "theta needs at least 0"),
        (lambda: GCNII(9, 8, 4, theta="1"), TypeError, "theta needs a number"),
        (lambda: GCNII(9, 8, 4, shared_weights=1), TypeError, "shared_weights needs True or False"),
    ):
        try:
            make_model()
        except error as found:
            assert message in str(found), str(found)
        else:
            raise AssertionError(f"{message}: went through")


def check_histories_of_other_widths() -> None:
    from gglspeedup import HistoryStore

    model = make("gcn")
    model.histories = HistoryStore(NODES, [8, 9], "cpu")
    try:
        model(next(iter(loader(2))))
    except ValueError as error:
        assert "9" in str(error)
    else:
        raise AssertionError("rows of another width went through")
    model.histories = None
    try:
        model.inference(loader(2))
    except TypeError as error:
        assert "histories needs a HistoryStore" in str(error)
    else:
        raise AssertionError("inference() without histories went through")


def check_examples() -> None:
    import doctest

    from gglspeedup.adapters import gammagl_models

    results = doctest.testmod(gammagl_models)
    assert results.attempted > 0 and results.failed == 0, results


def _checks() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            found[name.removeprefix("check_")] = check
        elif name.startswith("each_"):
            found |= {f"{name.removeprefix('each_')}-{model}": partial(check, model) for model in SIZES}
    return found


CHECKS = _checks()


def main(backend: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from demo import tlx_compat

    tlx_compat.install(backend)
    import tensorlayerx as tlx

    tlx.logging.set_verbosity(tlx.logging.WARN)  # no line a layer
    found = {}
    for name, check in CHECKS.items():
        try:
            check()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
