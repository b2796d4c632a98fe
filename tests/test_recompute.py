"""Layers computed a second time from histories: the same gradients, and memory that does not grow with the depth."""

from __future__ import annotations

import pytest
import torch
from test_pyg_models import CLASSES, FEATURES, MODELS, edges, loader, make, problem, store, trained  # noqa: F401

from gglspeedup.adapters.pyg_models import GCN, GCNII, GIN


@pytest.mark.usefixtures("edges")
@pytest.mark.parametrize(
    ("name", "storage"),
    [*((name, "device") for name in MODELS if not name.startswith("pna_jk")), ("gcnii", "mmap")],
)
def test_gradients_are_the_same(problem, name, storage, tmp_path):  # noqa: F811
    found = []
    for recompute in (False, True):
        model = make(name, dropout=0.4)
        path = {"path": tmp_path / str(recompute)} if storage == "mmap" else {}
        model.recompute, model.histories = recompute, store(model, storage=storage, **path)
        for _ in range(3):  # rows of the halo are no zeros after the first
            outputs, gradients = trained(model, loader(problem, 2))
        found.append((outputs, gradients, list(model.buffers()), model.histories.age(), torch.rand(1)))
    (outputs, gradients, buffers, age, drawn), (others, again, kept, other_age, other_drawn) = found
    assert torch.equal(outputs, others) and torch.equal(drawn, other_drawn)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(buffers, kept, strict=True))
    assert (age == other_age).all()


def test_histories_of_half_the_width_give_nearly_the_same(problem):  # noqa: F811
    found = []
    for recompute in (False, True):
        model = make("gcn")
        model.recompute, model.histories = recompute, store(model, dtype="float16")
        found.append(trained(model, loader(problem, 2))[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)
    assert not all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def kept_bytes(model, batch) -> int:
    """What a forward pass keeps for the backward pass, but for parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        values = tensor.values() if tensor.layout == torch.sparse_csr else tensor
        memory = values.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(batch)
    size = sum(kept.values())
    out.sum().backward()
    return size


@pytest.mark.parametrize("kind", [GCN, GCNII, GIN])
def test_what_is_kept_does_not_grow_with_the_depth(problem, kind):  # noqa: F811
    sizes: dict[bool, list[int]] = {False: [], True: []}
    batch = next(iter(loader(problem, 2)))
    for recompute, found in sizes.items():
        for depth in (3, 12):
            model = kind(FEATURES, 8, CLASSES, depth, dropout=0.5)
            model.recompute, model.histories = recompute, store(model)
            model(batch)
            found.append(kept_bytes(model, batch))
    assert sizes[True][1] == sizes[True][0] < sizes[False][0]
    assert sizes[False][1] > 2 * sizes[False][0]


def test_rows_that_were_pushed_meanwhile_are_found(problem):  # noqa: F811
    model = make("gcn")
    model.recompute, model.histories = True, store(model)
    first, second, _ = loader(problem, 2)
    loss = model(first).sum()
    model(second)
    with pytest.raises(ValueError, match="histories needs what the forward pass left, got 1 later pushes"):
        loss.backward()


def test_what_it_needs(problem):  # noqa: F811
    (batch,) = loader(problem, 6)
    model = make("gcn")
    model.recompute = True
    with pytest.raises(TypeError, match="recompute needs histories"):
        model(batch)
    with torch.no_grad():
        assert model(batch).shape == (batch.batch_size, CLASSES)  # nothing is kept anyway
    model = make("pna_jk")
    model.recompute, model.histories = True, store(model)
    with pytest.raises(ValueError, match="recompute needs a model whose layers see one other"):
        model(batch)
