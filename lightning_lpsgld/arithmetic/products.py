r"""Exact products of integer codes: which way gives exactly :math:`\sum_i a_i w_i`, and the way itself.

Codes are bytes, a of an activation and w of a weight. oneDNN multiplies unsigned by signed bytes. Where the processor
adds two products in 16 bits first (AVX2 and AVX-512 without VNNI), the pair must stay below :math:`2^{15}`:

=========== ======================================= ==========================================================
path        what is multiplied                      exact where
=========== ======================================= ==========================================================
unsigned    a, if no code is negative               always with VNNI; else :math:`2\max a\max|w| < 2^{15}`,
                                                    so for all codes up to 127 by 128
shifted     a + 128, less 128 times the sum of w    always with VNNI; else :math:`2\cdot255\max|w| < 2^{15}`
split       max(a, 0) and max(-a, 0), subtracted    as unsigned, and sums below :math:`2^{24}`; two products
float64     a and w as doubles                      everywhere; slow
=========== ======================================= ==========================================================

Sums are 32-bit integers, turned into float32 at the end: the result is the exact product rounded once. A linear product
is a pointwise convolution of its rows: oneDNN's own takes fewer shapes and is no faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lpsgld.arithmetic.capability import Capability

__all__ = ["Geometry", "PackedWeight", "Path", "choose_path", "exact_product"]

#: How a product of codes is computed; :func:`choose_path` says when.
Path = Literal["unsigned", "shifted", "split", "float64"]

_SHIFT = 128
_PAIR_LIMIT = 2**15 - 1
_SUM_LIMIT = 2**31 - 1
_FLOAT_LIMIT = 2**24


@dataclass(frozen=True)
class Geometry:
    """How a product contracts.

    Attributes:
        kind: ``"linear"`` or ``"conv"``.
        stride: Per spatial dim; empty for a linear product.
        padding: Likewise; zeros on both sides.
        dilation: Likewise.
        groups: Groups of channels.
    """

    kind: Literal["linear", "conv"]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def multiplications(self, x: Sequence[int], weight: Sequence[int]) -> int:
        """How many products of two numbers a call takes."""
        per_output = torch.Size(weight[1:]).numel()
        if self.kind == "linear":
            return torch.Size(x[:-1]).numel() * weight[0] * per_output
        steps = zip(x[2:], self.stride, self.padding, self.dilation, weight[2:])
        outputs = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, s, p, d, k in steps]
        return x[0] * torch.Size(outputs).numel() * weight[0] * per_output


class PackedWeight:
    """Codes of a weight, the scale of each row, and packed forms as they are asked for.

    Args:
        codes: int8, shape of the weight: output channels first.
        scales: Powers of two, float32, shape ``(out,)``; ones by default.

    Attributes:
        largest: Largest magnitude of a code.
        reach: Largest sum of magnitudes of a row.
    """

    def __init__(self, codes: Tensor, scales: Tensor | None = None) -> None:
        self.codes = codes
        self.scales = torch.ones(len(codes)) if scales is None else scales
        low, high = codes.aminmax()
        self.largest = max(-int(low), int(high))
        self.reach = int(codes.flatten(1).float().abs_().sum(1, dtype=torch.float64).max())
        self._lifted: PackedWeight | None = None
        self._zeros = torch.zeros(len(codes), dtype=torch.int64)
        self._packed: dict[tuple[object, ...], Tensor] = {}

    @property
    def lifted(self) -> PackedWeight:
        """The same with one more spatial dim of size 1."""
        if self._lifted is None:
            self._lifted = PackedWeight(self.codes.unsqueeze(2), self.scales)
        return self._lifted

    def product(self, unsigned: Tensor, geometry: Geometry, zero: int) -> Tensor:
        """Product of unsigned codes ``(n, in, height, width)``, less ``zero``, with the weight, by oneDNN; float32."""
        packed = self._pack(unsigned.shape, geometry, zero)
        stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            unsigned, 1.0, zero, packed, self.scales, self._zeros, None, stride, padding, dilation, geometry.groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return out

    def _pack(self, shape: torch.Size, geometry: Geometry, zero: int) -> Tensor:
        key = (geometry, zero, shape[1:])
        if key not in self._packed:
            stride, padding, dilation = map(list, (geometry.stride, geometry.padding, geometry.dilation))
            self._packed[key] = torch.ops.onednn.qconv_prepack(
                self.codes, self.scales, 1.0, zero, stride, padding, dilation, geometry.groups, list(shape)
            )
        return self._packed[key]


def choose_path(lowest: int, highest: int, weight: PackedWeight, capability: Capability, device: str = "cpu") -> Path:
    """The fastest exact path.

    Args:
        lowest: Smallest code of the activation.
        highest: Largest code of the activation.
        weight: Codes of the weight.
        capability: What the machine can do.
        device: Type of the device that the codes are on.

    Returns:
        See the table above.

    Example:
        >>> weight = PackedWeight(torch.full((4, 8), 127, dtype=torch.int8))
        >>> avx2, vnni = Capability("AVX2", onednn=True, vnni=False), Capability("AVX512", onednn=True, vnni=True)
        >>> [choose_path(lowest, 127, weight, machine) for machine in (avx2, vnni) for lowest in (0, -127)]
        ['unsigned', 'split', 'unsigned', 'shifted']
    """
    if device != "cpu" or not capability.onednn:
        return "float64"

    def fits(largest: int) -> bool:
        pairs = capability.vnni or 2 * largest * weight.largest <= _PAIR_LIMIT
        return pairs and largest * weight.reach <= _SUM_LIMIT

    if lowest >= 0 and fits(highest):
        return "unsigned"
    if fits(2 * _SHIFT - 1):
        return "shifted"
    largest = max(-lowest, highest)  # the halves are rounded to float32 before they are subtracted
    return "split" if fits(largest) and largest * weight.reach <= _FLOAT_LIMIT else "float64"


def exact_product(codes: Tensor, weight: PackedWeight, geometry: Geometry, path: Path) -> Tensor:
    """Exact product of codes times the scales of the weight's rows, rounded once to float32.

    Args:
        codes: int8, shape ``(..., in)`` for a linear product, ``(n, in, *spatial)`` with one or two spatial dims.
        weight: Codes of the weight, shape ``(out, in)`` or ``(out, in / groups, *kernel)``.
        geometry: How they contract.
        path: One that is exact here; see :func:`choose_path`.

    Returns:
        float32 tensor; convolutions by integers give channels-last memory.

    Example:
        >>> a = torch.tensor([[3, -5]], dtype=torch.int8)
        >>> w = PackedWeight(torch.tensor([[7, 2], [-1, 4]], dtype=torch.int8))
        >>> exact_product(a, w, Geometry("linear"), "float64")
        tensor([[ 11., -23.]])
    """
    if path == "float64":
        return _in_float64(codes, weight, geometry).float()
    if geometry.kind == "linear":  # a pointwise convolution of one column of pixels, which are its rows: nothing moves
        column = codes.reshape(1, -1, 1, codes.shape[-1]).permute(0, 3, 1, 2)
        out = _in_bytes(column, weight.lifted.lifted, Geometry("conv", (1, 1), (0, 0), (1, 1)), path)
        return out.permute(0, 2, 3, 1).reshape(*codes.shape[:-1], len(weight.codes))
    if codes.ndim == 3:  # one spatial dim: a row of pixels
        flat = Geometry("conv", (1, *geometry.stride), (0, *geometry.padding), (1, *geometry.dilation), geometry.groups)
        return exact_product(codes.unsqueeze(2), weight.lifted, flat, path).squeeze(2)
    return _in_bytes(codes, weight, geometry, path)


def _in_bytes(codes: Tensor, weight: PackedWeight, geometry: Geometry, path: Path) -> Tensor:
    codes = codes.contiguous(memory_format=torch.channels_last)
    if path == "unsigned":
        return weight.product(codes.view(torch.uint8), geometry, 0)
    if path == "shifted":  # adding 128 to a byte flips its top bit
        return weight.product(codes.view(torch.uint8) ^ _SHIFT, geometry, _SHIFT)
    positive, negative = codes.clamp(min=0), codes.clamp(max=0).neg_()  # -(-128) is 128 once it is read as unsigned
    first = weight.product(positive.view(torch.uint8), geometry, 0)
    return first.sub_(weight.product(negative.view(torch.uint8), geometry, 0))


def _in_float64(codes: Tensor, weight: PackedWeight, geometry: Geometry) -> Tensor:
    x, w = codes.double(), weight.codes.double()
    scales = weight.scales.to(x.device, torch.float64)
    if geometry.kind == "linear":
        return F.linear(x, w) * scales
    convolve = F.conv1d if codes.ndim == 3 else F.conv2d
    out: Tensor = convolve(x, w, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return out * scales.view(-1, *[1] * (codes.ndim - 2))
