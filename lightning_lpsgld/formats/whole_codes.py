"""Formats whose codes are integers: value = code times gap, with one gap a block."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import NumberFormat

__all__ = ["WholeCodes"]


class WholeCodes(NumberFormat):
    """What fixed point and block floating point share; a subclass has ``word_length`` and says ``code_min``."""

    word_length: int

    @property
    def bits(self) -> int:
        """Bits stored per element, a shared exponent not counted."""
        return self.word_length

    @property
    def code_max(self) -> int:
        """Largest integer code."""
        return 2 ** (self.word_length - 1) - 1

    @property
    def code_min(self) -> int:
        """Smallest integer code."""
        raise NotImplementedError

    @property
    def linear(self) -> bool:
        """True."""
        return True

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.code_min, self.code_max

    def pack(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """The codes as integers.

        Raises:
            ValueError: If there is a NaN.
        """
        missing = int(codes.isnan().sum())
        if missing:
            raise ValueError(
                f"encode: the codes of {self} have no NaN, but {missing} of {codes.numel()} elements are NaN."
            )
        return codes.to(self.code_dtype)

    def saturated(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """Codes held to the smallest and the largest one."""
        return codes.clamp(self.code_min, self.code_max)

    def code_limits(self, gap_exponents: Tensor, exponents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The smallest and the largest code."""
        ends = torch.empty_like(gap_exponents, dtype=torch.float64)
        return torch.full_like(ends, self.code_min), torch.full_like(ends, self.code_max)
