"""What ranks say to each other: checksums of replicas, 8-bit gradients. Without Lightning."""

from lightning_lpsgld.distributed.compression import GradientCompression
from lightning_lpsgld.distributed.replicas import (
    ForkedReplicasError,
    checksum,
    refuse_different_settings,
    refuse_forked_replicas,
)
from lightning_lpsgld.distributed.topology import RunsChains, Topology, topology_of

__all__ = [
    "ForkedReplicasError",
    "GradientCompression",
    "RunsChains",
    "Topology",
    "checksum",
    "refuse_different_settings",
    "refuse_forked_replicas",
    "topology_of",
]
