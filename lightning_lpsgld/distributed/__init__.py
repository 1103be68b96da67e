"""What ranks say to each other: checksums of replicas. Needs ``torch.distributed`` only, no Lightning."""

from lightning_lpsgld.distributed.replicas import (
    ForkedReplicasError,
    checksum,
    refuse_different_settings,
    refuse_forked_replicas,
)

__all__ = ["ForkedReplicasError", "checksum", "refuse_different_settings", "refuse_forked_replicas"]
