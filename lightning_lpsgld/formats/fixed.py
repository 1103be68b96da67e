"""Two's-complement fixed point."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import require_int
from lightning_lpsgld.formats.dtypes import DtypeFacts
from lightning_lpsgld.formats.kernel import KernelIdentity
from lightning_lpsgld.formats.whole_codes import WholeCodes

__all__ = ["FixedPoint"]

# ASCII: to Python, full-width and other digits are digits, too.
_NAME = re.compile(r"fixed(\d+)\.(-?\d+)(s?)", re.ASCII)


@dataclass(frozen=True)
class FixedPoint(WholeCodes):
    r"""Two's-complement fixed point: the values :math:`k\,2^{-F}` for integers :math:`-2^{W-1} \le k \le 2^{W-1}-1`.

    Args:
        word_length: W, bits of a number, the sign bit included; 2 to 24.
        fraction_length: F, bits after the binary point; the gap is :math:`2^{-F}`. May exceed W or be negative.
        symmetric: Drop the lowest code, so that the range is :math:`\pm(2^{W-1}-1)2^{-F}`.

    Raises:
        TypeError: If a length is not an int.
        ValueError: If a length is out of range; the message names the argument, the rule and the value.

    Example:
        >>> fmt = FixedPoint(8, 6)
        >>> str(fmt), fmt.gap, fmt.min, fmt.max
        ('fixed8.6', 0.015625, -2.0, 1.984375)

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 2.
    """

    family: ClassVar[str | None] = "fixed"

    word_length: int
    fraction_length: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        require_int("FixedPoint", "word_length", self.word_length, 2, 24)
        require_int("FixedPoint", "fraction_length", self.fraction_length, -100, 120)

    @property
    def code_min(self) -> int:
        """Smallest integer code."""
        return -self.code_max if self.symmetric else -(2 ** (self.word_length - 1))

    @property
    def gap(self) -> float:
        """Distance Δ between neighbouring values."""
        return 2.0**-self.fraction_length

    @property
    def max(self) -> float:
        """Largest value."""
        return self.code_max * self.gap

    @property
    def min(self) -> float:
        """Smallest value."""
        return self.code_min * self.gap

    def __str__(self) -> str:
        return f"fixed{self.word_length}.{self.fraction_length}" + ("s" if self.symmetric else "")

    @classmethod
    def from_name(cls, name: str) -> FixedPoint | None:
        """``"fixed<W>.<F>"``, with an ``s`` behind it where the lowest code is dropped."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(int(match[1]), int(match[2]), symmetric=bool(match[3]))

    # ------------------------------------------------------------------------------------- what every format answers

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        """As :meth:`.NumberFormat.demands`."""
        return self.word_length - 1, -self.fraction_length, self.word_length - 1 - self.fraction_length

    def with_word_length(self, word_length: int) -> FixedPoint:
        """Copy with another word length and the same range."""
        shift = word_length - self.word_length
        return replace(self, word_length=word_length, fraction_length=self.fraction_length + shift)

    def at_least(self) -> str:
        """As :meth:`.NumberFormat.at_least`."""
        return f"{self} (fraction length >= {self.fraction_length})"

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """-F, 0-d."""
        return torch.tensor(-self.fraction_length, device=x.device)

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        """Code times gap."""
        return codes.double() * self.gap

    def gaps(self, exponents: Tensor | None) -> Tensor:
        """The gap, 0-d."""
        return torch.tensor(self.gap, dtype=torch.float64)

    def kernel(self, dtype: torch.dtype) -> KernelIdentity:
        """Family ``"fixed"``."""
        ends = (self.code_min, self.code_max, self.min, self.max)
        return KernelIdentity(-self.fraction_length, 0, 0, *ends)

    def to_qtorch(self) -> Any:
        """As :meth:`.NumberFormat.to_qtorch`.

        Raises:
            ValueError: Below one fraction bit, which QPyTorch does not have.
        """
        if self.fraction_length < 1:
            raise ValueError(f"QPyTorch has no fixed point with F < 1, got {self}.")
        import qtorch

        return qtorch.FixedPoint(wl=self.word_length, fl=self.fraction_length, clamp=True, symmetric=self.symmetric)
