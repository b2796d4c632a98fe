"""Batches copied to a GPU: what is looked into, and in what order streams wait. On a stand-in CuPy."""

from __future__ import annotations

import collections
import gc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_side_stream import Stream, cupy  # noqa: F401  # a fixture

from gglspeedup import CSRGraph, DeviceError, NodeLoader, Prefetcher, adapters, prefetcher
from gglspeedup.device import Device
from gglspeedup.device_copies import DeviceCopies, changed
from gglspeedup.errors import ArgumentTypeError


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass
class Record:
    x: Any
    name: str = "a"


class Moved(np.ndarray):
    """An array of the stand-in's device."""


@pytest.fixture
def device(cupy, monkeypatch):  # noqa: F811
    """The stand-in with copies, and adapters that say whose tensors were made while which stream waited for what."""

    def asarray(host: np.ndarray, order: str) -> Moved:
        assert order == "C" and Stream.current.name == "side"
        memory = cupy.allocators[-1](host.nbytes)
        copied = np.array(host).view(Moved)
        copied.memory = memory
        return copied

    def backend(name: str) -> SimpleNamespace:
        if name == "numpy":  # NodeLoader's, on the CPU
            return plain(name)
        return SimpleNamespace(
            to_framework=lambda array: (name, array), current_stream=lambda: streams.get(name, 7),
            sees_cuda=lambda index: index == 3 and name != "jax",
        )  # fmt: skip

    streams: dict[str, int] = {}
    plain = adapters.backend
    cupy.asarray = asarray
    monkeypatch.setattr(adapters, "backend", backend)
    return SimpleNamespace(cupy=cupy, streams=streams)


def moved(batch: Any) -> Any:
    copies = DeviceCopies(3)
    return copies.finish(copies.start(batch))


def test_every_tensor_of_a_batch_is_copied_and_nothing_else(device):
    x, y = np.arange(3.0), torch.arange(4)
    order = collections.OrderedDict(b=x, a=[x, (y, "text", 5, None)])
    batch = {"record": Record(x), "pair": Pair(y, np.array(["text"])), "order": order, "type": Record}
    found = moved(batch)
    assert found["record"].x[0] == "cupy" and found["record"].name == "a" and batch["record"].x is x
    framework, array = found["pair"].one
    assert framework == "torch" and type(array) is Moved and array.tolist() == [0, 1, 2, 3]
    assert found["pair"].other is batch["pair"].other  # no numbers
    assert type(found["order"]) is collections.OrderedDict and list(found["order"]) == ["b", "a"]
    assert found["order"]["a"][1][1:] == ("text", 5, None) and found["type"] is Record
    assert found["order"]["b"][1] is found["record"].x[1]  # one tensor, one copy
    assert order["b"] is x


def test_numbers_that_only_frameworks_have_keep_their_type(device):
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    _, array = moved([values])[0]
    assert array.dtype.name == "bfloat16" and array.astype(float).tolist() == [1.5, -2.0]


def test_tensors_of_a_device_are_left_alone(device):
    there = type("ndarray", (), {"__module__": "cupy", "__dlpack_device__": lambda self: (2, 0)})()
    assert changed([there], lambda tensor: "copied") == [there]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by torch_geometric
def test_data_of_pyg():
    from torch_geometric.data import Data, HeteroData

    data = Data(x=torch.ones(3, 2), edge_index=torch.zeros(2, 4, dtype=torch.long), sizes=[3, 2])
    found = changed(data, lambda tensor: tensor + 1)
    assert type(found) is Data and found.x.tolist() == [[2, 2]] * 3 and found.edge_index.sum() == 8
    assert found.sizes == [3, 2] and data.x.sum() == 6
    mixed = HeteroData()
    mixed["author"].x = torch.ones(2)
    assert changed(mixed, lambda tensor: tensor + 1)["author"].x.tolist() == [2, 2]
    assert mixed["author"].x.tolist() == [1, 1]


def test_batches_of_loaders(device):
    graph = CSRGraph([0, 1, 2], [1, 0])
    (batch,) = NodeLoader(graph, np.eye(2), [0, 1], seeds=[0, 1], sizes=[2], batch_size=2, device="cpu")
    found = moved(batch)
    assert found.adjs[0].edge_index[0] == found.x[0] == found.y[0] == found.n_id[0] == "cupy"
    assert found.adjs[0].size == batch.adjs[0].size and found.batch_size == 2
    assert found.x[1].tolist() == batch.x.tolist()


def test_the_reader_waits_for_the_copies_and_memory_for_the_reader(device):
    copies = DeviceCopies(3)
    copied = copies.start([torch.ones(3)])
    assert copied.whole.stream == "side" and Stream.current.waits == []
    batch = copies.finish(copied)
    assert Stream.current.waits == [copied.whole]
    del copied, batch
    gc.collect()
    (mark,) = copies._side._let_go[0][1]
    assert mark.stream == "reader 7 on 3" and device.cupy.freed == []
    mark.done = True
    copies.start([])
    assert len(device.cupy.freed) == 1


def test_frameworks_on_several_streams_are_waited_for_by_the_host(device):
    device.streams.update(torch=8)
    copies = DeviceCopies(3)
    copied = copies.start([torch.ones(3), np.ones(3)])
    copies.finish(copied)
    del copied
    gc.collect()
    copies.start([])
    assert device.cupy.synchronised == [0] and len(device.cupy.freed) == 2


def test_a_framework_that_cannot_use_the_device_is_named(device):
    copies = DeviceCopies(4)
    with pytest.raises(DeviceError, match=r"device needs a device that the installed torch can use, got cuda:4"):
        copies.finish(copies.start([torch.ones(3)]))


def test_sparse_tensors_are_refused(device):
    with pytest.raises(ArgumentTypeError, match="batch"):
        DeviceCopies(3).start([torch.eye(2).to_sparse()])


def test_prefetcher_copies_in_its_thread_and_hands_over_in_the_readers(device, monkeypatch):
    monkeypatch.setattr(prefetcher, "parse_device", lambda value: Device(3))
    for depth in (0, 2):
        made = Prefetcher([torch.full((2,), value) for value in range(5)], depth, [lambda x: x * 10], device=3)
        assert [(name, array.tolist()) for name, array in made] == [("torch", [10 * k] * 2) for k in range(5)]
    assert len(device.cupy.synchronised) <= 2  # of what is there when an iterator ends


def test_prefetcher_on_the_cpu_leaves_batches_as_they_are():
    batches = [torch.ones(2), {"x": np.ones(2)}]
    assert all(one is other for one, other in zip(Prefetcher(batches, device="cpu"), batches, strict=True))
