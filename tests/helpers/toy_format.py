"""A number format in one file, as a user could write it, on the contract in ``formats/base.py`` and nothing else.

Importing this file makes it known by its name: nothing in the package mentions it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lpsgld.formats import BlockFormat, Blocks
from lightning_lpsgld.formats.base import Bounds
from lightning_lpsgld.formats.blocks import Runs
from lightning_lpsgld.formats.dtypes import DTYPES, DtypeFacts
from lightning_lpsgld.formats.exponents import exponent_of, finite_magnitude, power_of_two

__all__ = ["BlockLogarithmic"]

_FIELDS = 127


@dataclass(frozen=True)
class BlockLogarithmic(BlockFormat):
    """Signed powers of two in 8 bits, relative to the largest of a run: 0 and ±2^(E - k), k from 0 to 126.

    E is the smallest exponent with M <= 2^E, so that nothing saturates. A code is the sign, on top, and 127 - k.
    """

    block_size: int = 16

    @classmethod
    def from_name(cls, name: str) -> BlockLogarithmic | None:
        match = re.fullmatch(r"log8b(\d+)", name, re.ASCII)
        return None if match is None else cls(int(match[1]))

    def __str__(self) -> str:
        return f"log8b{self.block_size}"

    @property
    def bits(self) -> int:
        return 8

    @property
    def max(self) -> float:
        return 2.0**127

    @property
    def min(self) -> float:
        return -self.max

    @property
    def blocks(self) -> Blocks:
        return Runs(self.block_size)

    @property
    def edge(self) -> float:
        return 2.0  # above every power of two gaps double

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        return 1, min(facts.highest, 127) - _FIELDS + 1, min(facts.highest, 127)

    def exponent_range(self, dtype: torch.dtype) -> tuple[int, int]:
        facts = DTYPES[dtype]
        return max(-127, facts.lowest + _FIELDS - 1), min(127, facts.highest)

    def exponents(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        low, high = self.exponent_range(dtype)
        largest = self.blocks.max(finite_magnitude(x))
        own = exponent_of(largest)
        own = (own + (largest > power_of_two(own.clamp(min=-1000)))).clamp(low, high)
        only_infinite = (largest == 0) & (self.blocks.max(x.isinf().double()) > 0)
        return torch.where(only_infinite, high, own)

    def exponents_with_noise(self, mean: Tensor, sigma: float | Tensor, dtype: torch.dtype) -> Tensor:
        """Room for a value that goes up by two of its gaps, which are at least sigma."""
        spread = torch.as_tensor(sigma, dtype=torch.float64).expand(mean.shape)
        far = torch.where(spread > 0, 4.0 * torch.maximum(finite_magnitude(mean), spread), finite_magnitude(mean))
        return self.exponents(far, dtype)

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        assert exponents is not None
        top = self.blocks.expand(exponents, x.shape)
        own = exponent_of(finite_magnitude(x))
        if sigma is not None:
            own = torch.maximum(own, exponent_of(sigma) + 1)  # then no variance is more than the gap's square
        return torch.minimum(torch.maximum(own, top - _FIELDS + 1), top)

    def code_limits(self, gap_exponents: Tensor, exponents: Tensor | None) -> Bounds:
        assert exponents is not None
        top = power_of_two(self.blocks.expand(exponents, gap_exponents.shape) - gap_exponents)
        return -top, top

    def pack(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        assert exponents is not None
        if bool(codes.isnan().any()):
            raise ValueError(f"encode: the codes of {self} have no NaN.")
        values = codes * power_of_two(gap_exponents)
        field = exponent_of(values.abs()) - self.blocks.expand(exponents, codes.shape) + _FIELDS
        pattern = torch.where(values == 0, 0, field + 128 * (values < 0))
        return torch.where(pattern > 127, pattern - 256, pattern).to(self.code_dtype)

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        assert exponents is not None
        field = codes.long() & 127
        size = power_of_two(self.blocks.expand(exponents.long(), codes.shape) + field - _FIELDS)
        return torch.where(field == 0, 0.0, torch.where(codes < 0, -size, size))
