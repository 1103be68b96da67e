"""Are the replicas of a data-parallel run still the same? One 8-byte number per tensor, compared over all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lpsgld.ops.stored import StoredCodes

__all__ = ["ForkedReplicasError", "broadcast", "checksum", "refuse_different_settings", "refuse_forked_replicas"]

#: Elements that are summed at once: on the CPU few enough for its cache, elsewhere enough to keep the device busy.
_CHUNK, _DEVICE_CHUNK = 2**15, 2**22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ForkedReplicasError(RuntimeError):
    """The ranks of a replica group no longer hold the same chain."""


def checksum(x: Tensor) -> Tensor:
    r"""Order-sensitive checksum of the bits of a tensor.

    .. math::
        h = \sum_c 31^{C-1-c} \sum_{i} (2i + 1)\, b_{c, i} \pmod{2^{64}}

    over chunks c (of 2^15 elements on the CPU, 2^22 elsewhere) with bits b as signed integers. A change of a single
    element always changes h.

    Args:
        x: Any shape, dtype and device; not modified. Values are taken in row-major order.

    Returns:
        0-d int64 tensor on the device of ``x``; computing it does not synchronize.

    Example:
        >>> bool(checksum(torch.tensor([0.0, 1.0])) == checksum(torch.tensor([1.0, 0.0])))
        False
    """
    bits = x.detach().contiguous().view(-1).view(_BITS[x.element_size()])
    size = _CHUNK if x.device.type == "cpu" else _DEVICE_CHUNK
    weights = 2 * torch.arange(min(bits.numel(), size), dtype=torch.int64, device=x.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for chunk in bits.split(size):
        total = 31 * total + (weights[: chunk.numel()] * chunk).sum()
    return total


def _gathered(row: Tensor, group: Any) -> Tensor:
    """Rows of all ranks of the group, on the CPU, shape ``(ranks, len(row))``."""
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return torch.stack(rows).cpu()


def _ranks(group: Any) -> list[int]:
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def broadcast(stored: StoredCodes, group: Any = None) -> None:
    """Set codes and exponents to those of the first rank of a group; a collective call.

    Args:
        stored: Of the same shape and format on all ranks; overwritten.
        group: Process group; ``None``: all ranks.
    """
    codes = stored.codes.as_strided((stored.codes.numel(),), (1,)).view(torch.uint8)  # bytes go everywhere
    for x in (codes, stored.exponents):
        if x is not None:
            dist.broadcast(x, _ranks(group)[0], group=group)


def refuse_forked_replicas(tensors: Mapping[str, Tensor], step: int, group: Any = None) -> None:
    """Compare the bits of tensors over the ranks of a replica group; a collective call.

    Sends 8 bytes per tensor and rank, and synchronizes once.

    Args:
        tensors: Parameters and sampler state by name, in the same order on all ranks; on one device.
        step: Number of optimizer steps taken, for the message.
        group: Process group of the replicas; ``None``: all ranks.

    Raises:
        ForkedReplicasError: On **all** ranks of the group, if a tensor differs on any of them; it names the first such
            tensor, the step and the ranks.
    """
    names = list(tensors)
    if not names:
        return
    table = _gathered(torch.stack([checksum(tensor) for tensor in tensors.values()]), group)
    forked = (table != table[0]).any(0)
    if not bool(forked.any()):
        return
    first = int(forked.nonzero()[0])
    off = [rank for rank, same in zip(_ranks(group), (table[:, first] == table[0, first]).tolist()) if not same]
    raise ForkedReplicasError(
        f"The replicas have forked: after step {step}, {names[first]} on rank {_show(off)} differs from rank "
        f"{_ranks(group)[0]} ({int(forked.sum())} of {len(names)} tensors differ). The ranks would sample different "
        "chains with averaged gradients. Look for weights that are changed outside the sampler, for seeds that differ "
        "between ranks, or for gradients that are not synchronized (`no_sync`, unused parameters)."
    )


def _show(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def refuse_different_settings(
    settings: Mapping[str, Any], device: torch.device | str = "cpu", group: Any = None
) -> None:
    """Compare settings (seeds, temperature, formats, ...) over a replica group; a collective call.

    One number per rank is sent; only where it differs, the settings themselves. Ranks may have settings that others
    have not.

    Args:
        settings: Values by name; compared through their ``repr``, so that they must be plain values.
        device: Where the group communicates.
        group: Process group of the replicas; ``None``: all ranks.

    Raises:
        ForkedReplicasError: On all ranks, if anything differs on any of them; it names every such setting with its
            values by rank.
    """
    mine = {name: repr(value) for name, value in settings.items()}
    digest = hashlib.blake2b(repr(sorted(mine.items())).encode(), digest_size=8).digest()
    row = torch.tensor([int.from_bytes(digest, "little", signed=True)], dtype=torch.int64, device=device)
    table = _gathered(row, group)
    if bool((table == table[0]).all()):
        return
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    names = dict.fromkeys(name for each in found for name in each)
    off = [name for name in names if len({each.get(name) for each in found}) > 1]
    values = [_by_rank(name, [each.get(name, "missing") for each in found], _ranks(group)) for name in off]
    raise ForkedReplicasError(
        f"{', '.join(f'`{name}`' for name in off)} {'is' if len(off) == 1 else 'are'} not the same on all ranks of the "
        f"replica group ({'; '.join(values)}), so the replicas would fork at the first step. Give every rank the same "
        "value; LowPrecisionSGLD(seed=...) is broadcast from rank zero, a sampler's own `seed` is not."
    )


def _by_rank(name: str, values: Sequence[str], ranks: Sequence[int]) -> str:
    shown = [f"{value[:80]} on rank {rank}" for rank, value in zip(ranks, values)]
    return f"{name}: " + ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
