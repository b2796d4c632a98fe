"""A graph in parts, on disk and over several processes and machines."""

from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import even_batches
from gglspeedup.distributed.communicator import Communicator, CommunicatorError, RankError
from gglspeedup.distributed.feature import DistFeature
from gglspeedup.distributed.history import DistHistory
from gglspeedup.distributed.loader import DistNodeLoader
from gglspeedup.distributed.local import LocalCommunicator, run_ranks
from gglspeedup.distributed.mpi import MpiCommunicator
from gglspeedup.distributed.nccl import NcclCommunicator
from gglspeedup.distributed.part import GraphPart
from gglspeedup.distributed.partitioning import partition_to_disk
from gglspeedup.distributed.sampler import DistSampler
from gglspeedup.distributed.torch_group import TorchCommunicator
from gglspeedup.distributed.verify import verify_partition

__all__ = [
    "Communicator",
    "CommunicatorError",
    "DistFeature",
    "DistHistory",
    "DistNodeLoader",
    "DistSampler",
    "GraphPart",
    "LocalCommunicator",
    "MpiCommunicator",
    "NcclCommunicator",
    "PartBook",
    "RankError",
    "TorchCommunicator",
    "even_batches",
    "partition_to_disk",
    "run_ranks",
    "verify_partition",
]
