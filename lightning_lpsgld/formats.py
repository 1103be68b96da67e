"""Number formats as frozen data: every constant is a property derived from the fields.

Nothing here touches a tensor's values; :mod:`lightning_lpsgld.ops` rounds, this module says onto which grid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Union

import torch

__all__ = [
    "BlockFloatingPoint",
    "FixedPoint",
    "FloatingPoint",
    "FormatLike",
    "NumberFormat",
    "check_dtype",
    "code_dtype",
    "parse_format",
    "to_qtorch",
]

#: (significand bits with the hidden bit, exponent of the smallest subnormal, exponent of the largest power of two)
_DTYPE_FACTS: dict[torch.dtype, tuple[int, int, int]] = {
    torch.float64: (53, -1074, 1023),
    torch.float32: (24, -149, 127),
    torch.bfloat16: (8, -133, 127),
    torch.float16: (11, -24, 15),
}


def _require_int(owner: str, name: str, value: object, low: int, high: int) -> None:
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
        _require_int("FixedPoint", "word_length", self.word_length, 2, 24)
        _require_int("FixedPoint", "fraction_length", self.fraction_length, -100, 120)

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

    Args:
        word_length: W, bits of a code with its sign; 2 to 24.
        block_dim: Elements with the same index along this dim form one block: with 0 (the default) a row of a weight,
            a sample of an activation, and *each single element of a 1-D tensor*. ``None``: one block for the tensor.
        exponent_bits: Bits of the shared exponent, 2 to 8; E is in ``[-2**(e-1), 2**(e-1) - 1]``.
        block_size: If given, every run of this many elements **along the last dim** is a block instead (microscaling);
            the last run of a row may be shorter. ``block_dim`` must then be left alone.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of range, or both ``block_size`` and a ``block_dim`` other than 0 are given.

    Example:
        >>> fmt = BlockFloatingPoint(8)
        >>> str(fmt), fmt.code_max, fmt.gap_at(0)
        ('bfp8', 127, 0.015625)

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909, section 2; Yang et al., 2019 (SWALP), arXiv:1904.11943.
    """

    word_length: int
    block_dim: int | None = 0
    exponent_bits: int = 8
    block_size: int | None = None

    def __post_init__(self) -> None:
        _require_int("BlockFloatingPoint", "word_length", self.word_length, 2, 24)
        _require_int("BlockFloatingPoint", "exponent_bits", self.exponent_bits, 2, 8)
        if self.block_dim is not None:
            _require_int("BlockFloatingPoint", "block_dim", self.block_dim, -8, 8)
        if self.block_size is not None:
            _require_int("BlockFloatingPoint", "block_size", self.block_size, 1, 2**20)
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
        return text + (f"e{self.exponent_bits}" if self.exponent_bits != 8 else "")


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
        _require_int("FloatingPoint", "exponent_bits", self.exponent_bits, 2, 8)
        _require_int("FloatingPoint", "mantissa_bits", self.mantissa_bits, 1, 23)
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


NumberFormat = Union[FixedPoint, BlockFloatingPoint, FloatingPoint]
FormatLike = Union[NumberFormat, str, Any]

_FIXED = re.compile(r"fixed(\d+)\.(-?\d+)(s?)")
_BLOCK = re.compile(r"bfp(\d+)(?:b(\d+)|-(tensor)|-dim(-?\d+))?(?:e(\d))?")
_FLOAT = re.compile(r"e(\d+)m(\d+)(?:-(ieee|nan|none))?")
_ALIASES: dict[str, NumberFormat] = {
    "fp32": FloatingPoint(8, 23),
    "tf32": FloatingPoint(8, 10),
    "bf16": FloatingPoint(8, 7),
    "fp16": FloatingPoint(5, 10),
    "mxint8": BlockFloatingPoint(8, block_size=32),
}


def parse_format(fmt: FormatLike) -> NumberFormat:
    """Turn a string, a QPyTorch number or a format object into a format object.

    Args:
        fmt: A format; a string such as ``"fixed8.6"`` (W.F), ``"bfp8"`` (a block per index of dim 0),
            ``"bfp8-tensor"`` (one block), ``"bfp8b32"`` (runs of 32), ``"e4m3"``, ``"bf16"``; or an instance of
            ``qtorch.FixedPoint``, ``qtorch.BlockFloatingPoint``, ``qtorch.FloatingPoint``.

    Returns:
        The format object. ``parse_format(str(fmt)) == fmt`` for every format.

    Raises:
        ValueError: If a string matches no pattern.
        TypeError: If ``fmt`` is something else.

    Example:
        >>> parse_format("fixed8.6")
        FixedPoint(word_length=8, fraction_length=6, symmetric=False)
    """
    if isinstance(fmt, (FixedPoint, BlockFloatingPoint, FloatingPoint)):
        return fmt
    if isinstance(fmt, str):
        return _parse_string(fmt)
    if type(fmt).__module__.split(".")[0] == "qtorch":
        return _from_qtorch(fmt)
    raise TypeError(
        f"A number format must be a FixedPoint, BlockFloatingPoint or FloatingPoint, a string such as 'bfp8', "
        f"or a qtorch number; got {fmt!r}."
    )


def _parse_string(text: str) -> NumberFormat:
    name = text.strip().lower()
    if name in _ALIASES:
        return _ALIASES[name]
    if match := _FIXED.fullmatch(name):
        return FixedPoint(int(match[1]), int(match[2]), symmetric=bool(match[3]))
    if match := _BLOCK.fullmatch(name):
        word, size, tensor, dim, exponent = match.groups()
        return BlockFloatingPoint(
            int(word),
            block_dim=None if tensor else int(dim or 0),
            exponent_bits=int(exponent or 8),
            block_size=int(size) if size else None,
        )
    if match := _FLOAT.fullmatch(name):
        specials: Any = match[3]
        return FloatingPoint(int(match[1]), int(match[2]), specials)
    raise ValueError(
        f"No number format is called {text!r}; use 'fixed<W>.<F>' (e.g. 'fixed8.6'), 'bfp<W>' (e.g. 'bfp8', "
        f"'bfp8-tensor', 'bfp8b32'), 'e<E>m<M>' (e.g. 'e4m3') or one of {sorted(_ALIASES)}."
    )


def _from_qtorch(number: Any) -> NumberFormat:
    kind = type(number).__name__
    if kind == "FixedPoint":
        return FixedPoint(number.wl, number.fl, symmetric=bool(number.symmetric))
    if kind == "BlockFloatingPoint":
        return BlockFloatingPoint(number.wl, block_dim=None if number.dim == -1 else number.dim)
    if kind == "FloatingPoint":
        return FloatingPoint(number.exp, number.man)
    raise TypeError(f"No equivalent for the qtorch number {number!r}.")


def to_qtorch(fmt: FormatLike) -> Any:
    """Return the QPyTorch number that means the same as ``fmt``; imports ``qtorch`` (not its compiled part).

    Args:
        fmt: Anything :func:`parse_format` takes. In QPyTorch a whole-tensor block is ``dim=-1``.

    Returns:
        A ``qtorch.FixedPoint``, ``qtorch.BlockFloatingPoint`` or ``qtorch.FloatingPoint``. QPyTorch's floating point
        reserves no exponent for NaN or infinity, so it saturates later than ours; inside our range they agree.

    Raises:
        ValueError: If QPyTorch has no such number: a fixed point without fraction bits, runs of ``block_size``
            elements, an exponent of other than 8 bits, or a negative ``block_dim``.
    """
    import qtorch

    fmt = parse_format(fmt)
    if isinstance(fmt, FixedPoint):
        if fmt.fraction_length < 1:
            raise ValueError(f"QPyTorch has no fixed point with F < 1, got {fmt}.")
        return qtorch.FixedPoint(wl=fmt.word_length, fl=fmt.fraction_length, clamp=True, symmetric=fmt.symmetric)
    if isinstance(fmt, BlockFloatingPoint):
        if fmt.block_size is not None or fmt.exponent_bits != 8 or (fmt.block_dim or 0) < 0:
            raise ValueError(f"QPyTorch's blocks are whole dims with 8-bit exponents; it has no {fmt}.")
        return qtorch.BlockFloatingPoint(wl=fmt.word_length, dim=-1 if fmt.block_dim is None else fmt.block_dim)
    return qtorch.FloatingPoint(exp=fmt.exponent_bits, man=fmt.mantissa_bits)


def code_dtype(fmt: NumberFormat) -> torch.dtype:
    """Smallest signed integer dtype that holds the codes of ``fmt``."""
    return torch.int8 if fmt.bits <= 8 else torch.int16 if fmt.bits <= 16 else torch.int32


def check_dtype(fmt: NumberFormat, dtype: torch.dtype) -> None:
    """Refuse a tensor dtype in which values of ``fmt`` cannot be held exactly.

    Args:
        fmt: The format.
        dtype: Floating dtype of the tensor that would hold the rounded values.

    Raises:
        TypeError: If ``dtype`` is not float16, bfloat16, float32 or float64.
        ValueError: If the grid of ``fmt`` does not survive in ``dtype``.
    """
    if dtype not in _DTYPE_FACTS:
        raise TypeError(f"Quantization takes float16, bfloat16, float32 or float64 tensors, got {dtype}.")
    significand, lowest, highest = _DTYPE_FACTS[dtype]
    if isinstance(fmt, FixedPoint):
        need, low, high = fmt.word_length - 1, -fmt.fraction_length, fmt.word_length - 1 - fmt.fraction_length
    elif isinstance(fmt, BlockFloatingPoint):
        need, low, high = fmt.word_length - 1, lowest, min(fmt.exponent_max, highest)
    else:
        need, low, high = fmt.mantissa_bits + 1, fmt.exponent_min - fmt.mantissa_bits, fmt.exponent_max
    if need > significand or low < lowest or high > highest:
        raise ValueError(
            f"{fmt} is wider than {dtype}: it needs {need} significand bits and exponents {low} to {high}, the dtype "
            f"has {significand} and {lowest} to {highest}. Use a narrower format or a wider dtype."
        )


def block_exponent_range(fmt: BlockFloatingPoint, dtype: torch.dtype) -> tuple[int, int]:
    """Shared exponents whose whole grid is representable in ``dtype``.

    The lower end is raised where the gap would be smaller than the smallest subnormal of ``dtype``.
    """
    _, lowest, highest = _DTYPE_FACTS[dtype]
    return max(fmt.exponent_min, lowest + fmt.word_length - 2), min(fmt.exponent_max, highest)


def with_word_length(fmt: NumberFormat, word_length: int) -> NumberFormat:
    """Copy of a fixed or block format with another word length (range of a fixed point kept)."""
    if isinstance(fmt, FixedPoint):
        shift = word_length - fmt.word_length
        return replace(fmt, word_length=word_length, fraction_length=fmt.fraction_length + shift)
    if isinstance(fmt, BlockFloatingPoint):
        return replace(fmt, word_length=word_length)
    raise TypeError(f"{fmt} has no word length to change.")
