"""gglspeedup feeds graph neural networks: neighbour sampling and feature caching, on GPU or CPU.

Importing it imports no framework and needs no GPU, driver or CuPy.
"""

from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.errors import DeviceError, GGLSpeedupError
from gglspeedup.evaluator import OverlappedEvaluator
from gglspeedup.gpufeature import CGPUFeature
from gglspeedup.gpusample import GPUSampler
from gglspeedup.graph import CSRGraph
from gglspeedup.history.store import HistoryStore
from gglspeedup.inference import layerwise_inference
from gglspeedup.loader import NodeLoader
from gglspeedup.memory_budget import MemoryBudget
from gglspeedup.multigpufeature import Multi_CGPUFeature
from gglspeedup.multigpusample import MultiGPUSampler
from gglspeedup.partitions import partition, permute
from gglspeedup.prefetcher import Prefetcher
from gglspeedup.profiling import profile
from gglspeedup.subgraphs import SubgraphLoader
from gglspeedup.threads import set_num_threads

__version__ = "0.1.0"

__all__ = [
    "Adj",
    "CGPUFeature",
    "CSRGraph",
    "DeviceError",
    "GGLSpeedupError",
    "GPUSampler",
    "HistoryStore",
    "MemoryBudget",
    "MultiGPUSampler",
    "Multi_CGPUFeature",
    "NodeLoader",
    "OverlappedEvaluator",
    "Prefetcher",
    "SampledBatch",
    "SubgraphLoader",
    "layerwise_inference",
    "partition",
    "permute",
    "profile",
    "set_num_threads",
]
