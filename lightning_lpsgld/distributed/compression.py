"""Averages gradients over ranks in 8 bits: codes and shared exponents go over the wire, unbiased."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lpsgld.formats import FixedPoint
from lightning_lpsgld.ops import encode
from lightning_lpsgld.ops.reference import exponent_of, power_of_two
from lightning_lpsgld.random import DrawKey, Role, derive_seed, stream_id

__all__ = ["GradientCompression", "compress", "decompress"]

#: Elements that share an exponent on the wire.
BLOCK = 256
_CODES = FixedPoint(word_length=8, fraction_length=0)
_LARGEST = 127
_MARK = 127  # exponent of a block that holds NaN or infinity
_LOWEST, _HIGHEST = -120, 121


def compress(flat: Tensor, key: DrawKey) -> Tensor:
    r"""Codes and exponents of a vector, by stochastic rounding that never saturates.

    Each block of 256 elements gets the smallest gap :math:`\Delta = 2^e` with :math:`127 \Delta \ge \max |x|`, so that
    :math:`E[\text{decompress}(\text{compress}(x))] = x` for every element, the largest one included.

    Args:
        flat: float32 vector whose length is a multiple of 256. A block with NaN or infinity becomes NaN.
        key: Names the draws.

    Returns:
        uint8 vector: a byte per element, then a byte per block.
    """
    blocks = flat.view(-1, BLOCK)
    largest = blocks.abs().amax(1).double()
    finite = largest.isfinite()
    largest = torch.where(finite, largest, torch.zeros_like(largest))
    exponents = (exponent_of(largest) - 6).clamp(_LOWEST, _HIGHEST)
    exponents = exponents + (largest > _LARGEST * power_of_two(exponents))
    scaled = blocks * power_of_two(-exponents).float()[:, None]
    scaled = torch.where(finite[:, None], scaled, torch.zeros_like(scaled))
    codes = encode(scaled.view(-1), _CODES, rounding="stochastic", key=key).codes
    marked = torch.where(finite, exponents, torch.full_like(exponents, _MARK))
    return torch.cat([codes, marked.to(torch.int8)]).view(torch.uint8)


def decompress(data: Tensor) -> Tensor:
    """Values of what :func:`compress` returned, float32; exact."""
    count = data.numel() // (BLOCK + 1)
    codes, exponents = data.view(torch.int8).split([count * BLOCK, count])
    gaps = power_of_two(exponents.long()).float()
    gaps = torch.where(exponents == _MARK, torch.full_like(gaps, float("nan")), gaps)
    return (codes.view(-1, BLOCK) * gaps[:, None]).view(-1)


class GradientCompression:
    r"""Communication hook of DDP that sends 8-bit gradients: ``ddp.register_comm_hook(state, state.hook)``.

    Each rank sends every other rank its part of the gradient in codes; each averages the part that it owns in float32,
    encodes it once more, and sends it to all. A rank sends :math:`2 \cdot \tfrac{257}{256} n (w-1)/w` bytes of n
    gradients in a group of w ranks, a quarter of a float32 ring all-reduce for every w (parts are padded to whole
    blocks, so tiny buckets gain less). Both roundings are stochastic: the average is unbiased, with a variance of at
    most :math:`\Delta^2/4` (its own gap) plus :math:`1/w` of the mean of that of the ranks. All ranks decode the same
    bits.

    **Where the promise stops.** The exchange runs when a bucket is full and is not overlapped with the rest of
    backward beyond that; float32 gradients only.

    Args:
        seed: Any int; the draws of a rank are private to it.
        step: Gives the number of the optimizer step, so that a resumed run draws what it would have drawn.
        group: Process group of the replicas; ``None``: all ranks.

    Attributes:
        bytes_sent: Bytes of the buffers that this rank has handed over for other ranks.
        bytes_fp32: What a float32 ring all-reduce would have sent.
    """

    def __init__(self, seed: int, step: Callable[[], int], group: Any = None) -> None:
        self.group, self.step = group, step
        self.world = dist.get_world_size(group)
        self.seed = derive_seed(seed, "communication", dist.get_rank())
        self.bytes_sent, self.bytes_fp32 = 0, 0
        self._last, self._calls = -1, 0

    def _key(self) -> DrawKey:
        """A key of its own for every rounding."""
        step = self.step()
        if step != self._last:
            self._last, self._calls = step, 0
        self._calls += 1
        return DrawKey(self.seed, step, stream_id(Role.COMMUNICATION, self._calls - 1))

    def average(self, flat: Tensor) -> Tensor:
        """Unbiased 8-bit average over the ranks; a collective call.

        Args:
            flat: float32 vector, of the same length on all ranks; not modified.

        Returns:
            float32 vector of the same length, bit-identical on all ranks.

        Raises:
            TypeError: If ``flat`` is not float32.
        """
        if flat.dtype != torch.float32:
            raise TypeError(f"GradientCompression averages float32 gradients, got {flat.dtype}. Turn it off.")
        count, world = flat.numel(), self.world
        part = -(-count // (world * BLOCK)) * BLOCK
        padded = torch.nn.functional.pad(flat, (0, part * world - count))
        mine = compress(padded, self._key())
        codes, exponents = mine.split([part * world, part * world // BLOCK])
        outgoing = torch.cat([codes.view(world, -1), exponents.view(world, -1)], 1)  # a row for every rank
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        mean = torch.stack([decompress(row) for row in incoming]).sum(0) / world
        own = compress(mean, self._key())
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own, group=self.group)
        self.bytes_sent += (outgoing.nbytes // world + own.nbytes) * (world - 1)
        self.bytes_fp32 += 2 * flat.nbytes * (world - 1) // world
        return torch.cat([decompress(row) for row in parts])[:count]

    @staticmethod
    def hook(state: GradientCompression, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls with every full bucket of gradients."""
        buffer = bucket.buffer()
        devices = [buffer.device] if buffer.device.type == "cuda" else []
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)  # type: ignore[arg-type]
        future.set_result(state.average(buffer))
        return future


# DDP compares the hook's annotations with the objects themselves, and postponed ones are strings.
GradientCompression.hook.__annotations__.update(bucket=dist.GradBucket)
GradientCompression.hook.__annotations__["return"] = torch.futures.Future[Tensor]
