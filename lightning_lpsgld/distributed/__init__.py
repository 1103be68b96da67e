"""What ranks say to each other: checksums of replicas, 8-bit gradients, shards as codes. Without Lightning."""

from lightning_lpsgld.distributed.compression import GradientCompression
from lightning_lpsgld.distributed.gathering import GatheredAsCodes, gather_as_codes
from lightning_lpsgld.distributed.replicas import (
    ForkedReplicasError,
    checksum,
    refuse_different_settings,
    refuse_forked_replicas,
)
from lightning_lpsgld.distributed.topology import RunsChains, Topology, topology_of

__all__ = [
    "ForkedReplicasError",
    "GatheredAsCodes",
    "GradientCompression",
    "RunsChains",
    "Topology",
    "checksum",
    "gather_as_codes",
    "refuse_different_settings",
    "refuse_forked_replicas",
    "topology_of",
]
