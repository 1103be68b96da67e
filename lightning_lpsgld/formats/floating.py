"""Binary floating point with subnormals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_lpsgld.formats.base import Bounds, NumberFormat, require_int
from lightning_lpsgld.formats.dtypes import DtypeFacts
from lightning_lpsgld.formats.exponents import (
    NOISE_REACH,
    exponent_of,
    finite_magnitude,
    power_of_two,
    with_headroom,
)
from lightning_lpsgld.formats.kernel import KernelIdentity

__all__ = ["FloatingPoint", "Specials"]

#: What the all-ones exponent of a float is used for; see :class:`FloatingPoint`.
Specials = Literal["ieee", "nan", "none"]

_NAME = re.compile(r"e(\d+)m(\d+)(?:-(ieee|nan|none))?", re.ASCII)


@dataclass(frozen=True)
class FloatingPoint(NumberFormat):
    r"""Binary floating point with subnormals; out of range saturates to the largest finite value.

    Args:
        exponent_bits: e, 2 to 8; the bias is :math:`2^{e-1}-1`.
        mantissa_bits: m, 1 to 23. The sign and the hidden bit are not counted.
        specials: What the all-ones exponent is used for: ``"ieee"`` (infinities and NaN, no numbers), ``"nan"``
            (numbers, all-ones mantissa is NaN, as in OCP E4M3) or ``"none"`` (numbers only, as in OCP FP6 and FP4).
            ``None`` takes the usual one: ``"ieee"`` for e >= 5, ``"nan"`` for e = 4, ``"none"`` for e <= 3; so
            ``FloatingPoint(4, 3)`` is E4M3 with maximum 448 and ``FloatingPoint(5, 2)`` is E5M2 with maximum 57344.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range.

    Example:
        >>> fmt = FloatingPoint(4, 3)
        >>> str(fmt), fmt.max, fmt.smallest_subnormal
        ('e4m3', 448.0, 0.001953125)

    Reference:
        OCP 8-bit Floating Point Specification (OFP8), revision 1.0, 2023.
    """

    family: ClassVar[str | None] = "float"

    exponent_bits: int
    mantissa_bits: int
    specials: Specials | None = None

    def __post_init__(self) -> None:
        require_int("FloatingPoint", "exponent_bits", self.exponent_bits, 2, 8)
        require_int("FloatingPoint", "mantissa_bits", self.mantissa_bits, 1, 23)
        usual: Specials = "ieee" if self.exponent_bits >= 5 else "nan" if self.exponent_bits == 4 else "none"
        if self.specials not in (None, "ieee", "nan", "none"):
            raise ValueError(f"FloatingPoint: `specials` must be 'ieee', 'nan' or 'none', got {self.specials!r}.")
        if self.specials is None:
            object.__setattr__(self, "specials", usual)

    @property
    def bits(self) -> int:
        """Bits stored per element."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def exponent_min(self) -> int:
        """Exponent of the smallest normal number; subnormals share its gap."""
        return 1 - self.bias

    @property
    def exponent_max(self) -> int:
        """Exponent of the largest finite number."""
        return 2**self.exponent_bits - 1 - self.bias - (1 if self.specials == "ieee" else 0)

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        ulps = 2 ** (self.mantissa_bits + 1) - (2 if self.specials == "nan" else 1)
        return ulps * 2.0 ** (self.exponent_max - self.mantissa_bits)

    @property
    def min(self) -> float:
        """Smallest (most negative) finite value."""
        return -self.max

    @property
    def smallest_normal(self) -> float:
        """Smallest positive normal number."""
        return 2.0**self.exponent_min

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive number, and the gap around zero."""
        return 2.0 ** (self.exponent_min - self.mantissa_bits)

    def __str__(self) -> str:
        default = FloatingPoint(self.exponent_bits, self.mantissa_bits)
        return f"e{self.exponent_bits}m{self.mantissa_bits}" + ("" if self == default else f"-{self.specials}")

    @classmethod
    def from_name(cls, name: str) -> FloatingPoint | None:
        """``"e<E>m<M>"``, with ``-ieee``, ``-nan`` or ``-none`` where the use of the top exponent is not the usual."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        specials: Any = match[3]
        return cls(int(match[1]), int(match[2]), specials)

    # ------------------------------------------------------------------------------------- what every format answers

    @property
    def edge(self) -> float:
        """Code of the next power of two."""
        return 2.0 ** (self.mantissa_bits + 1)

    @property
    def has_nan(self) -> bool:
        """Whether there is a bit pattern for NaN."""
        return self.specials != "none"

    def demands(self, facts: DtypeFacts) -> tuple[int, int, int]:
        """As :meth:`.NumberFormat.demands`."""
        return self.mantissa_bits + 1, self.exponent_min - self.mantissa_bits, self.exponent_max

    def gap_exponents(self, x: Tensor, exponents: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """As :meth:`.NumberFormat.gap_exponents`: that of the element's own exponent."""
        low, high, magnitude = self.exponent_min, self.exponent_max, finite_magnitude(x)
        own = exponent_of(magnitude).clamp(low, high)
        if sigma is not None:
            reach = magnitude + NOISE_REACH * sigma
            own = with_headroom(own, reach, sigma, -self.mantissa_bits, int(self.edge)).clamp(low, high)
        return own - self.mantissa_bits

    def code_limits(self, gap_exponents: Tensor, exponents: Tensor | None) -> Bounds:
        """The largest values in units of the gap."""
        gap = power_of_two(gap_exponents)
        return self.min / gap, self.max / gap

    def pack(self, codes: Tensor, gap_exponents: Tensor, exponents: Tensor | None) -> Tensor:
        """Bit patterns: sign, exponent and mantissa fields.

        Raises:
            ValueError: If an element is NaN and the format has none.
        """
        values = codes * power_of_two(gap_exponents)
        missing = int(values.isnan().sum())
        if missing and not self.has_nan:
            raise ValueError(f"encode: {self} has no NaN, but {missing} of {values.numel()} elements are NaN.")
        own = exponent_of(finite_magnitude(values)).clamp(min=self.exponent_min)
        ulps = torch.nan_to_num(values.abs() * power_of_two(self.mantissa_bits - own)).long()
        hidden = 2**self.mantissa_bits
        normal = ((own + self.bias) << self.mantissa_bits) + (ulps - hidden)
        pattern = torch.where(ulps >= hidden, normal, ulps)
        pattern = torch.where(values.isnan(), 2 ** (self.bits - 1) - 1, pattern)
        pattern = torch.where(values < 0, pattern + 2 ** (self.bits - 1), pattern)
        width = torch.iinfo(self.code_dtype).bits
        return torch.where(pattern >= 2 ** (width - 1), pattern - 2**width, pattern).to(self.code_dtype)

    def unpack(self, codes: Tensor, exponents: Tensor | None) -> Tensor:
        """Values of bit patterns."""
        pattern = codes.long() & (2**self.bits - 1)
        field = (pattern >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        mantissa = pattern & (2**self.mantissa_bits - 1)
        ulps = torch.where(field > 0, mantissa + 2**self.mantissa_bits, mantissa).double()
        value = ulps * power_of_two(field.clamp(min=1) - self.bias - self.mantissa_bits)
        if self.has_nan:
            value = torch.where(value > self.max, math.nan, value)
        return torch.where(pattern >> (self.bits - 1) > 0, -value, value) + 0.0

    def kernel(self, dtype: torch.dtype) -> KernelIdentity:
        """Family ``"float"``."""
        mantissa = 2**self.mantissa_bits - (2 if self.specials == "nan" else 1)
        return KernelIdentity(
            -self.mantissa_bits, self.exponent_min, self.exponent_max, -int(self.edge), int(self.edge),
            self.min, self.max, mantissa_bits=self.mantissa_bits, exponent_bits=self.exponent_bits, bias=self.bias,
            has_nan=self.has_nan, top_pattern=((self.exponent_max + self.bias) << self.mantissa_bits) + mantissa,
        )  # fmt: skip

    def to_qtorch(self) -> Any:
        """As :meth:`.NumberFormat.to_qtorch`; QPyTorch saturates later, inside our range they agree."""
        import qtorch

        return qtorch.FloatingPoint(exp=self.exponent_bits, man=self.mantissa_bits)
