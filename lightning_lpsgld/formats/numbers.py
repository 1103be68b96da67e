"""Number formats as frozen data: every constant is a property derived from the fields."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

__all__ = ["BlockFloatingPoint", "FixedPoint", "FloatingPoint", "Specials", "Top", "require_int"]

Top = Literal["carry", "clamp"]


def require_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    """Refuse a field that is not an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: `{name}` must be an int, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{owner}: `{name}` must be in [{low}, {high}], got {value}.")


@dataclass(frozen=True)
class FixedPoint:
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

    word_length: int
    fraction_length: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        require_int("FixedPoint", "word_length", self.word_length, 2, 24)
        require_int("FixedPoint", "fraction_length", self.fraction_length, -100, 120)

    @property
    def bits(self) -> int:
        """Bits stored per element."""
        return self.word_length

    @property
    def code_max(self) -> int:
        """Largest integer code."""
        return 2 ** (self.word_length - 1) - 1

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


@dataclass(frozen=True)
class BlockFloatingPoint:
    r"""Block floating point: integers of W bits that share one power-of-two scale per block.

    With :math:`E = \lfloor\log_2 \max|x|\rfloor` of a block (clamped to the range of the exponent), the gap is
    :math:`\Delta = 2^{E-W+2}` and the values are :math:`k\Delta`, :math:`|k| \le 2^{W-1}-1`: symmetric codes, so that
    quantizing twice changes nothing.

    A largest magnitude between :math:`(2^{W-1}-1)\Delta` and the next power of two may round up to that power, which
    the block's codes do not reach. What happens then is ``top``:

    ===========  =====================================================================================================
    ``"carry"``  the block takes the exponent E + 1, and its codes are rounded onto the doubled gap: even ones are
                 halved, odd ones go up or down by a fair coin. Stochastic rounding has no bias for any element
    ``"clamp"``  the code stays at the largest one, as in QPyTorch and the code published with SWALP and LP-SGLD. The
                 largest element of a block is rounded down: no step smaller than a gap takes a weight over a power of
                 two, so that every power of two is a ceiling for biases and for the largest weight of a row
    ===========  =====================================================================================================

    Args:
        word_length: W, bits of a code with its sign; 2 to 24.
        block_dim: Elements with the same index along this dim form one block: with 0 (the default) a row of a weight,
            a sample of an activation, and *each single element of a 1-D tensor*. ``None``: one block for the tensor.
        exponent_bits: Bits of the shared exponent, 2 to 8; E is in ``[-2**(e-1), 2**(e-1) - 1]``.
        block_size: If given, every run of this many elements **along the last dim** is a block instead (microscaling);
            the last run of a row may be shorter. ``block_dim`` must then be left alone.
        top: What becomes of a code beyond the largest one; at the largest exponent both rules clamp.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or both ``block_size`` and a ``block_dim`` other than 0 are given.

    Example:
        >>> fmt = BlockFloatingPoint(8)
        >>> str(fmt), fmt.code_max, fmt.gap_at(0)
        ('bfp8', 127, 0.015625)
        >>> str(BlockFloatingPoint(8, top="clamp"))
        'bfp8-clamp'

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 2; Yang et al., 2019 (SWALP), arXiv:1904.11943.
    """

    word_length: int
    block_dim: int | None = 0
    exponent_bits: int = 8
    block_size: int | None = None
    top: Top = "carry"

    def __post_init__(self) -> None:
        if self.top not in get_args(Top):
            raise ValueError(f"BlockFloatingPoint: `top` must be one of {get_args(Top)}, got {self.top!r}.")
        require_int("BlockFloatingPoint", "word_length", self.word_length, 2, 24)
        require_int("BlockFloatingPoint", "exponent_bits", self.exponent_bits, 2, 8)
        if self.block_dim is not None:
            require_int("BlockFloatingPoint", "block_dim", self.block_dim, -8, 8)
        if self.block_size is not None:
            require_int("BlockFloatingPoint", "block_size", self.block_size, 1, 2**20)
            if self.block_dim != 0:
                raise ValueError(
                    f"BlockFloatingPoint: `block_size` cuts the last dim and excludes `block_dim`, "
                    f"got {self.block_dim}."
                )

    @property
    def bits(self) -> int:
        """Bits stored per element, the shared exponent not counted."""
        return self.word_length

    @property
    def code_max(self) -> int:
        """Largest integer code; the smallest is its negative."""
        return 2 ** (self.word_length - 1) - 1

    @property
    def code_min(self) -> int:
        """Smallest integer code."""
        return -self.code_max

    @property
    def exponent_min(self) -> int:
        """Smallest shared exponent E."""
        return -(2 ** (self.exponent_bits - 1))

    @property
    def exponent_max(self) -> int:
        """Largest shared exponent E."""
        return 2 ** (self.exponent_bits - 1) - 1

    def gap_at(self, exponent: int) -> float:
        """Gap Δ of a block with shared exponent ``exponent``."""
        return 2.0 ** (exponent - self.word_length + 2)

    @property
    def max(self) -> float:
        """Largest value any block can hold."""
        return self.code_max * self.gap_at(self.exponent_max)

    @property
    def min(self) -> float:
        """Smallest (most negative) value any block can hold."""
        return -self.max

    def __str__(self) -> str:
        text = f"bfp{self.word_length}"
        if self.block_size is not None:
            text += f"b{self.block_size}"
        elif self.block_dim is None:
            text += "-tensor"
        elif self.block_dim != 0:
            text += f"-dim{self.block_dim}"
        text += f"e{self.exponent_bits}" if self.exponent_bits != 8 else ""
        return text + ("-clamp" if self.top == "clamp" else "")


Specials = Literal["ieee", "nan", "none"]


@dataclass(frozen=True)
class FloatingPoint:
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
