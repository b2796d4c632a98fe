"""Loaders that `loaders.py` measures; each is run as a process: NAME FOLDER THREADS FANOUTS BATCH BATCHES WIDTH.

A round loads so many batches: neighbours sampled, features and labels gathered, all of it tensors of the framework.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import serve

Run = Callable[[int], tuple[float, float]]


class Job:
    """The arguments of a contestant: the graph, its features and labels, and the seeds of a round."""

    def __init__(self, arguments: list[str]) -> None:
        self.name, folder, threads, fanouts, batch, batches, width = arguments
        self.threads, self.batch, self.batches = int(threads), int(batch), int(batches)
        self.fanouts = [int(fanout) for fanout in fanouts.split(",")]
        self.indptr = np.load(Path(folder) / "indptr.npy")
        self.indices = np.load(Path(folder) / "indices.npy")
        self.order = np.load(Path(folder) / "order.npy")
        rng = np.random.default_rng(0)
        self.x = rng.random((len(self.indptr) - 1, int(width)), dtype=np.float32)
        self.y = rng.integers(0, 47, len(self.indptr) - 1)

    def seeds(self, k: int) -> np.ndarray:
        """Return the seeds of round k, and of one batch before it that is not timed."""
        count = (self.batches + 1) * self.batch
        return self.order[(np.arange(count) + (k + 1) * count) % len(self.order)]

    def edge_index(self) -> np.ndarray:
        """Return the edges, int64: source, target."""
        targets = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        return np.stack([self.indices.astype(np.int64), targets])


def timed(job: Job, batches_of: Callable[[np.ndarray], Iterable[Any]]) -> Run:
    """Time a loader from its first batch, which starts its workers, to its last; the amount is seeds."""

    def run(k: int) -> tuple[float, float]:
        batches = iter(batches_of(job.seeds(k)))
        next(batches)
        begin = time.perf_counter()
        count = sum(1 for _ in batches)
        assert count == job.batches
        return count * job.batch, time.perf_counter() - begin

    return run


def ours(backend: str, prefetch: int = 2) -> Callable[[Job], tuple[str, Run]]:
    """NodeLoader with a backend."""

    def prepare(job: Job) -> tuple[str, Run]:
        import gglspeedup
        from gglspeedup import CGPUFeature, GPUSampler, NodeLoader

        gglspeedup.set_num_threads(job.threads)
        sampler = GPUSampler("cpu", (job.indptr, job.indices))
        x, y = CGPUFeature(sampler.graph, "cpu"), CGPUFeature(sampler.graph, "cpu")
        x.from_cpu_tensor(job.x)
        y.from_cpu_tensor(job.y)

        def batches_of(seeds: np.ndarray) -> Iterable[Any]:
            return NodeLoader(
                sampler, x, y, seeds=seeds, sizes=job.fanouts, batch_size=job.batch, backend=backend, prefetch=prefetch
            )  # fmt: skip

        return f"gglspeedup {gglspeedup.__version__}", timed(job, batches_of)

    return prepare


def ours_in_pyg(job: Job) -> tuple[str, Run]:
    """PyG's NeighborLoader with our sampler and feature store, in this process or in `threads` workers."""
    import torch
    import torch_geometric
    from torch_geometric.loader import NeighborLoader

    import gglspeedup
    from gglspeedup.adapters.pyg import FeatureStore, GraphStore, NeighborSampler

    torch.set_num_threads(job.threads)
    gglspeedup.set_num_threads(job.threads)
    graph = gglspeedup.CSRGraph(job.indptr, job.indices)
    features, store = FeatureStore(graph), GraphStore(graph)
    features.put_tensor(torch.from_numpy(job.x), group_name=None, attr_name="x", index=None)
    features.put_tensor(torch.from_numpy(job.y), group_name=None, attr_name="y", index=None)
    sampler = NeighborSampler(store, job.fanouts)

    def batches_of(seeds: np.ndarray) -> Iterable[Any]:
        return NeighborLoader(
            (features, store), job.fanouts, torch.from_numpy(seeds), neighbor_sampler=sampler, batch_size=job.batch
        )  # fmt: skip

    return f"torch-geometric {torch_geometric.__version__}, torch {torch.__version__}", timed(job, batches_of)


def pyg(job: Job) -> tuple[str, Run]:
    """PyG's NeighborLoader with pyg-lib or torch-sparse: one thread in this process, or `threads` workers."""
    import torch
    import torch_geometric
    import torch_geometric.typing as found
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    torch.set_num_threads(job.threads)
    if found.WITH_PYG_LIB:
        import pyg_lib as operators
    else:
        import torch_sparse as operators
    data = Data(x=torch.from_numpy(job.x), y=torch.from_numpy(job.y), edge_index=torch.from_numpy(job.edge_index()))
    workers = 0 if job.threads == 1 else job.threads
    loader = NeighborLoader(data, job.fanouts, batch_size=job.batch)
    sampler = loader.node_sampler  # made once: it sorts the edges

    def batches_of(seeds: np.ndarray) -> Iterable[Any]:
        return NeighborLoader(
            data, job.fanouts, torch.from_numpy(seeds), neighbor_sampler=sampler, batch_size=job.batch,
            num_workers=workers,
        )  # fmt: skip

    name = f"{operators.__name__} {operators.__version__}"
    return f"torch-geometric {torch_geometric.__version__} on {name}, torch {torch.__version__}", timed(job, batches_of)


def graphbolt(job: Job) -> tuple[str, Run]:
    """GraphBolt's DataLoader: `threads` threads in this process."""
    import dgl
    import dgl.graphbolt as gb
    import torch

    torch.set_num_threads(job.threads)
    graph = gb.fused_csc_sampling_graph(torch.from_numpy(job.indptr), torch.from_numpy(job.indices).long())
    store = gb.BasicFeatureStore(
        {
            ("node", None, "x"): gb.TorchBasedFeature(torch.from_numpy(job.x)),
            ("node", None, "y"): gb.TorchBasedFeature(torch.from_numpy(job.y[:, None])),
        }
    )

    def batches_of(seeds: np.ndarray) -> Iterable[Any]:
        pipe = gb.ItemSampler(gb.ItemSet(torch.from_numpy(seeds), names="seed_nodes"), batch_size=job.batch)
        pipe = pipe.sample_neighbor(graph, job.fanouts[::-1])
        return gb.DataLoader(pipe.fetch_feature(store, node_feature_keys=["x", "y"]))

    return f"dgl {dgl.__version__}, torch {torch.__version__}", timed(job, batches_of)


def gammagl(job: Job) -> tuple[str, Run]:
    """GammaGL's NeighborSampler on TensorLayerX's data loader, and a gather by TensorLayerX."""
    os.environ.setdefault("TL_BACKEND", "tensorflow")
    import tensorflow as tf
    import tensorlayerx as tlx
    from gammagl.loader.neighbor_sampler import NeighborSampler

    tf.config.threading.set_intra_op_parallelism_threads(job.threads)
    tf.config.threading.set_inter_op_parallelism_threads(job.threads)
    x, y = tlx.convert_to_tensor(job.x), tlx.convert_to_tensor(job.y)
    edges = tlx.convert_to_tensor(job.edge_index())
    sampler = NeighborSampler(edges, job.fanouts, tlx.convert_to_tensor(job.order[:1]), num_nodes=len(job.x))
    if not sum(adj.size[0] - adj.size[1] for adj in sampler.sample(job.order[: job.batch].tolist())[2]):
        # Its compiled operators, made for NumPy 1, fill arrays with one number.
        raise RuntimeError(f"it finds no neighbours under numpy {np.__version__}")

    def batches_of(seeds: np.ndarray) -> Iterable[Any]:
        # Its constructor sorts all edges: the sampler stays, and takes the seeds a batch at a time.
        for begin in range(0, len(seeds), job.batch):
            dst_node, n_id, adjs = sampler.sample(seeds[begin : begin + job.batch].tolist())
            yield tlx.gather(x, n_id), tlx.gather(y, dst_node), adjs

    return f"tensorlayerx {tlx.__version__} on tensorflow {tf.__version__}", timed(job, batches_of)


def paddle_loader(job: Job) -> tuple[str, Run]:
    """paddle.io.DataLoader with paddle.geometric's operators, in this process or in `threads` workers."""
    import paddle

    paddle.set_device("cpu")
    pointers, neighbours = paddle.to_tensor(job.indptr), paddle.to_tensor(job.indices.astype(np.int64))

    class Seeds(paddle.io.Dataset):  # type: ignore[misc]
        def __init__(self, ids: np.ndarray) -> None:
            self.ids = ids

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, place: int) -> int:
            return self.ids[place]

    def collate(ids: list[int]) -> Any:
        nodes = paddle.to_tensor(np.array(ids))
        hops = []
        for fanout in job.fanouts:
            found, count = paddle.geometric.sample_neighbors(neighbours, pointers, nodes, sample_size=fanout)
            source, target, nodes = paddle.geometric.reindex_graph(nodes, found, count)
            hops.append(paddle.stack([source, target]))
        return paddle.to_tensor(job.x[nodes.numpy()]), paddle.to_tensor(job.y[np.array(ids)]), hops[::-1]

    def batches_of(seeds: np.ndarray) -> Iterable[Any]:
        return paddle.io.DataLoader(Seeds(seeds), batch_size=job.batch, collate_fn=collate, num_workers=0)

    return f"paddle {paddle.__version__}", timed(job, batches_of)


CONTESTANTS: dict[str, Callable[[Job], tuple[str, Run]]] = {
    **{f"gglspeedup-{name}": ours(name) for name in ("torch", "tensorflow", "paddle", "tensorlayerx", "jax")},
    "gglspeedup-serial": ours("torch", prefetch=0),
    "gglspeedup-pyg": ours_in_pyg,
    "pyg": pyg,
    "graphbolt": graphbolt,
    "gammagl": gammagl,
    "paddle": paddle_loader,
}


if __name__ == "__main__":
    serve(lambda: CONTESTANTS[sys.argv[1]](Job(sys.argv[1:])))
