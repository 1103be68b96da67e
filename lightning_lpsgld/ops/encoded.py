"""The stored form of a quantized tensor: integer codes and shared exponents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lpsgld.formats import NumberFormat

__all__ = ["Encoded"]


@dataclass(frozen=True)
class Encoded:
    r"""Codes (and, for block formats, shared exponents) of a quantized tensor.

    Attributes:
        codes: Shape of the tensor. Fixed point and block floating point: the integer k of the value
            :math:`k\Delta`. Floating point, microscaled or not: the bit pattern, sign on top. ``int8`` up
            to 8 bits, ``int16`` up to 16, else ``int32``.
        exponents: ``None`` except for block formats: int8, one per block: shape ``(size(block_dim),)``, ``()`` for a
            whole-tensor block, ``(*leading, runs)`` for ``block_size``. Block floating point: the shared exponent E;
            microscaling: log2 of the scale (E8M0 without its bias of 127).
        format: The number format.
    """

    codes: Tensor
    exponents: Tensor | None
    format: NumberFormat

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and exponents together."""
        return self.codes.nbytes + (0 if self.exponents is None else self.exponents.nbytes)

    def to(self, device: torch.device | str) -> Encoded:
        """Copy on another device; codes are moved, nothing is rounded."""
        exponents = None if self.exponents is None else self.exponents.to(device)
        return Encoded(self.codes.to(device), exponents, self.format)
