"""A graph in parts, on disk and over several processes and machines."""

from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.part import GraphPart
from gglspeedup.distributed.partitioning import partition_to_disk
from gglspeedup.distributed.verify import verify_partition

__all__ = ["GraphPart", "PartBook", "partition_to_disk", "verify_partition"]
