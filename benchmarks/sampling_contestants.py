"""Samplers that `sampling.py` measures; each is run as a process: NAME FOLDER THREADS FANOUTS BATCH BATCHES DEVICE."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import serve

Run = Callable[[int], tuple[float, float]]


class Job:
    """The arguments of a contestant, and the batches of its rounds."""

    def __init__(self, arguments: list[str]) -> None:
        self.name, folder, threads, fanouts, batch, batches, self.device = arguments
        self.threads, self.batch, self.batches = int(threads), int(batch), int(batches)
        self.fanouts = [int(fanout) for fanout in fanouts.split(",")]
        self.indptr = np.load(Path(folder) / "indptr.npy")
        self.indices = np.load(Path(folder) / "indices.npy")
        self.order = np.load(Path(folder) / "order.npy")

    def seeds(self, k: int) -> list[np.ndarray]:
        """Return the seeds of the batches of round k."""
        begin = (k + 1) * self.batches
        last = len(self.order) - self.batch
        return [self.order[(begin + b) * self.batch % last :][: self.batch] for b in range(self.batches)]


def gglspeedup(job: Job, way: str = "one") -> tuple[str, Run]:
    """This library: n_id, edge_index and e_id of every hop, int64.

    `way` is "one" (a call of `sample` a batch), "ahead" (`sample_each`) or "many" (a call of `sample_many` a round).
    """
    import gglspeedup
    from gglspeedup import GPUSampler

    gglspeedup.set_num_threads(job.threads)
    sampler = GPUSampler(job.device, (job.indptr, job.indices), job.fanouts)
    versions = f"gglspeedup {gglspeedup.__version__}"
    ways = {
        "one": lambda batches: (sampler.sample(*batch) for batch in batches),
        "ahead": sampler.sample_each,
        "many": sampler.sample_many,
    }

    def wait() -> None:
        if sampler.device.is_cuda:
            sampler.device.xp.cuda.get_current_stream().synchronize()

    def run(k: int) -> tuple[float, float]:
        edges = 0
        seeds = job.seeds(k)
        wait()
        begin = time.perf_counter()
        for batch in ways[way]([(ids, None) for ids in seeds]):
            edges += sum(adj.e_id.size for adj in batch.adjs)
        wait()
        return edges, time.perf_counter() - begin

    return versions, run


def _torch(job: Job) -> Any:
    import torch

    torch.set_num_threads(job.threads)
    return torch


def graphbolt(job: Job, dtype: str = "int64") -> tuple[str, Run]:
    """GraphBolt's own operators, hop by hop as its NeighborSampler calls them, without its data pipes."""
    torch = _torch(job)
    import dgl
    import dgl.graphbolt as gb

    kind = getattr(torch, dtype)
    graph = gb.fused_csc_sampling_graph(torch.from_numpy(job.indptr), torch.from_numpy(job.indices).to(kind))

    def run(k: int) -> tuple[float, float]:
        edges = 0
        seeds = [torch.from_numpy(ids).to(kind) for ids in job.seeds(k)]
        begin = time.perf_counter()
        for nodes in seeds:
            for fanout in job.fanouts:
                sub = graph.sample_neighbors(nodes, torch.tensor([fanout]))
                nodes, csc = gb.unique_and_compact_csc_formats(sub.sampled_csc, nodes)
                edges += csc.indices.numel()
        return edges, time.perf_counter() - begin

    return f"dgl {dgl.__version__}, torch {torch.__version__}", run


def _epochs(job: Job, loader: Callable[[Any], Any], edges_of: Callable[[Any], int]) -> Run:
    """Time a loader with worker processes from its first batch to its last: their start does not count."""
    torch = _torch(job)

    def run(k: int) -> tuple[float, float]:
        batches = iter(loader(torch.from_numpy(np.concatenate(job.seeds(k)))))
        next(batches)
        begin = time.perf_counter()
        edges = sum(edges_of(batch) for batch in batches)
        return edges, time.perf_counter() - begin

    return run


def graphbolt_workers(job: Job) -> tuple[str, Run]:
    """GraphBolt's DataLoader with `threads` worker processes."""
    torch = _torch(job)
    import dgl
    import dgl.graphbolt as gb

    graph = gb.fused_csc_sampling_graph(torch.from_numpy(job.indptr), torch.from_numpy(job.indices).long())

    def loader(seeds: Any) -> Any:
        pipe = gb.ItemSampler(gb.ItemSet(seeds, names="seed_nodes"), batch_size=job.batch)
        pipe = pipe.sample_neighbor(graph, job.fanouts[::-1])
        # Without fetch_feature its DataLoader leaves sampling to the main process.
        pipe = pipe.fetch_feature(gb.BasicFeatureStore({}), node_feature_keys=[])
        return gb.DataLoader(pipe, num_workers=job.threads)

    def edges_of(batch: Any) -> int:
        return sum(sub.sampled_csc.indices.numel() for sub in batch.sampled_subgraphs)

    return f"dgl {dgl.__version__}, torch {torch.__version__}", _epochs(job, loader, edges_of)


def _operator(job: Job, sample: Callable[[Any, Any, Any], Any]) -> Run:
    """Time a C++ operator of PyG's family: one thread; each hop draws for new nodes only."""
    torch = _torch(job)
    indptr, indices = torch.from_numpy(job.indptr), torch.from_numpy(job.indices).long()

    def run(k: int) -> tuple[float, float]:
        seeds = [torch.from_numpy(ids) for ids in job.seeds(k)]
        begin = time.perf_counter()
        edges = sum(sample(indptr, indices, ids).numel() for ids in seeds)
        return edges, time.perf_counter() - begin

    return run


def torch_sparse(job: Job) -> tuple[str, Run]:
    """torch-sparse's operator."""
    torch = _torch(job)
    import torch_sparse as package

    sample = torch.ops.torch_sparse.neighbor_sample
    run = _operator(job, lambda indptr, indices, ids: sample(indptr, indices, ids, job.fanouts, False, True)[1])
    return f"torch-sparse {package.__version__}, torch {torch.__version__}", run


def pyg_lib(job: Job) -> tuple[str, Run]:
    """pyg-lib's operator."""
    torch = _torch(job)
    import pyg_lib as package

    sample = package.sampler.neighbor_sample
    run = _operator(job, lambda indptr, indices, ids: sample(indptr, indices, ids, job.fanouts)[0])
    return f"pyg-lib {package.__version__}, torch {torch.__version__}", run


CONTESTANTS: dict[str, Callable[[Job], tuple[str, Run]]] = {
    "gglspeedup": gglspeedup,
    "gglspeedup-ahead": lambda job: gglspeedup(job, "ahead"),
    "gglspeedup-many": lambda job: gglspeedup(job, "many"),
    "graphbolt": graphbolt,
    "graphbolt-int32": lambda job: graphbolt(job, "int32"),
    "graphbolt-workers": graphbolt_workers,
    "torch-sparse": torch_sparse,
    "pyg-lib": pyg_lib,
}


if __name__ == "__main__":
    serve(lambda: CONTESTANTS[sys.argv[1]](Job(sys.argv[1:])))
