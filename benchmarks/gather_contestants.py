"""Gathers that `gather.py` measures; each is run as a process: NAME FOLDER THREADS ROWS WIDTH IDS DEVICE."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rounds import serve

Run = Callable[[int], tuple[float, float]]


class Job:
    """The arguments of a contestant: a float32 matrix [rows, width], and ids of each round."""

    def __init__(self, arguments: list[str]) -> None:
        self.name, self.device = arguments[0], arguments[5]
        self.threads, self.rows, self.width, self.count = (int(text) for text in arguments[1:5])
        self.x = np.random.default_rng(0).random((self.rows, self.width), dtype=np.float32)
        self.num_bytes = self.count * self.width * 4

    def ids(self, k: int) -> np.ndarray:
        """Return distinct random ids, as a sampler's n_id are."""
        return np.random.default_rng(k + 1).permutation(self.rows)[: self.count]


def _timed(job: Job, gather: Callable[[np.ndarray], Any], wait: Callable[[], None] = lambda: None) -> Run:
    def run(k: int) -> tuple[float, float]:
        seconds = 0.0
        for repeat in range(4):
            ids = job.ids(4 * (k + 1) + repeat)
            wait()
            begin = time.perf_counter()
            gather(ids)
            wait()
            seconds += time.perf_counter() - begin
        return 4 * job.num_bytes, seconds

    return run


def gglspeedup(job: Job, cached: float = 1.0) -> tuple[str, Run]:
    """This library, its output dropped before the next call as in a training loop; on a GPU ids are there already."""
    import gglspeedup as package
    from gglspeedup import CGPUFeature, CSRGraph

    package.set_num_threads(job.threads)
    graph = CSRGraph(np.zeros(job.rows + 1, np.int64), [])
    feature = CGPUFeature(graph, job.device, int(cached * job.x.nbytes))
    feature.from_cpu_tensor(job.x)
    versions = f"gglspeedup {package.__version__}"
    if not feature.device.is_cuda:
        return versions, _timed(job, lambda ids: feature[ids])
    xp: Any = feature.device.xp

    def run(k: int) -> tuple[float, float]:
        start, stop = xp.cuda.Event(), xp.cuda.Event()
        seconds = 0.0
        for repeat in range(4):
            ids = xp.asarray(job.ids(4 * (k + 1) + repeat))
            start.record()
            feature[ids]
            stop.record()
            stop.synchronize()
            seconds += xp.cuda.get_elapsed_time(start, stop) / 1e3
        return 4 * job.num_bytes, seconds

    return versions, run


def _torch(job: Job) -> Any:
    import torch

    torch.set_num_threads(job.threads)
    return torch


def torch_out(job: Job) -> tuple[str, Run]:
    """torch.index_select into a buffer that is used again."""
    torch = _torch(job)
    x = torch.from_numpy(job.x)
    out = torch.empty((job.count, job.width))
    run = _timed(job, lambda ids: torch.index_select(x, 0, torch.from_numpy(ids), out=out))
    return f"torch {torch.__version__}", run


def torch_fresh(job: Job) -> tuple[str, Run]:
    """torch.index_select into a fresh tensor."""
    torch = _torch(job)
    x = torch.from_numpy(job.x)
    return f"torch {torch.__version__}", _timed(job, lambda ids: torch.index_select(x, 0, torch.from_numpy(ids)))


def torch_cuda(job: Job) -> tuple[str, Run]:
    """torch.index_select on a GPU, all rows in its memory, into a buffer that is used again."""
    torch = _torch(job)
    x, out = torch.from_numpy(job.x).cuda(), torch.empty((job.count, job.width), device="cuda")

    def run(k: int) -> tuple[float, float]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        seconds = 0.0
        for repeat in range(4):
            ids = torch.from_numpy(job.ids(4 * (k + 1) + repeat)).cuda()
            start.record()
            torch.index_select(x, 0, ids, out=out)
            stop.record()
            stop.synchronize()
            seconds += start.elapsed_time(stop) / 1e3
        return 4 * job.num_bytes, seconds

    return f"torch {torch.__version__}", run


def numpy_take(job: Job) -> tuple[str, Run]:
    """numpy.take into a buffer that is used again (one thread)."""
    out = np.empty((job.count, job.width), np.float32)
    run = _timed(job, lambda ids: np.take(job.x, ids, axis=0, out=out, mode="clip"))
    return f"numpy {np.__version__}", run


def graphbolt(job: Job) -> tuple[str, Run]:
    """GraphBolt's feature store."""
    torch = _torch(job)
    import dgl
    import dgl.graphbolt as gb

    store = gb.TorchBasedFeature(torch.from_numpy(job.x))
    versions = f"dgl {dgl.__version__}, torch {torch.__version__}"
    return versions, _timed(job, lambda ids: store.read(torch.from_numpy(ids)))


CONTESTANTS: dict[str, Callable[[Job], tuple[str, Run]]] = {
    "gglspeedup": gglspeedup,
    "gglspeedup-tenth-cached": lambda job: gglspeedup(job, 0.1),
    "gglspeedup-none-cached": lambda job: gglspeedup(job, 0.0),
    "torch.index_select(out=)": torch_out,
    "torch.index_select": torch_fresh,
    "torch-cuda": torch_cuda,
    "numpy.take(out=)": numpy_take,
    "graphbolt": graphbolt,
}


if __name__ == "__main__":
    serve(lambda: CONTESTANTS[sys.argv[1]](Job(sys.argv[1:])))
