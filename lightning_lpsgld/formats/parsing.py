"""Strings and QPyTorch numbers into format objects, and back."""

from __future__ import annotations

import re
from typing import Any

from lightning_lpsgld.formats.kinds import FormatLike, NumberFormat
from lightning_lpsgld.formats.microscaling import MicroscalingFloat
from lightning_lpsgld.formats.numbers import BlockFloatingPoint, FixedPoint, FloatingPoint

__all__ = ["parse_format", "to_qtorch"]

# ASCII: to Python, full-width and other digits are digits, too.
_FIXED = re.compile(r"fixed(\d+)\.(-?\d+)(s?)", re.ASCII)
_BLOCK = re.compile(r"bfp(\d+)(?:b(\d+)|-(tensor)|-dim(-?\d+))?(?:e(\d))?(-clamp)?", re.ASCII)
_FLOAT = re.compile(r"e(\d+)m(\d+)(?:-(ieee|nan|none))?", re.ASCII)
_MICROSCALING = re.compile(r"mxfp(\d)e(\d)m(\d)(?:b(\d+))?(-fit)?", re.ASCII)
_ALIASES: dict[str, NumberFormat] = {
    "fp32": FloatingPoint(8, 23),
    "tf32": FloatingPoint(8, 10),
    "bf16": FloatingPoint(8, 7),
    "fp16": FloatingPoint(5, 10),
    "mxint8": BlockFloatingPoint(8, block_size=32),
    "mxint8-clamp": BlockFloatingPoint(8, block_size=32, top="clamp"),
    "mxint16": BlockFloatingPoint(16, block_size=32),
    "mxfp4": MicroscalingFloat(2, 1),
}


def parse_format(fmt: FormatLike) -> NumberFormat:
    """Turn a string, a QPyTorch number or a format object into a format object.

    Args:
        fmt: A format; a string such as ``"fixed8.6"`` (W.F), ``"bfp8"`` (a block per index of dim 0),
            ``"bfp8-tensor"`` (one block), ``"bfp8b32"`` (runs of 32), ``"bfp8-clamp"`` (the published rule at the top
            of a block), ``"e4m3"``, ``"bf16"``, ``"mxfp8e4m3"``
            (runs of 32 floats with one scale; ``"mxfp8e4m3b16-fit"``: runs of 16, scale rounded up); or an instance of
            ``qtorch.FixedPoint``, ``qtorch.BlockFloatingPoint`` (whose rule at the top of a block is ``"clamp"``),
            ``qtorch.FloatingPoint``.

    Returns:
        The format object. ``parse_format(str(fmt)) == fmt`` for every format.

    Raises:
        ValueError: If a string matches no pattern.
        TypeError: If ``fmt`` is something else.

    Example:
        >>> parse_format("fixed8.6")
        FixedPoint(word_length=8, fraction_length=6, symmetric=False)
    """
    if isinstance(fmt, NumberFormat):
        return fmt
    if isinstance(fmt, str):
        return _parse_string(fmt)
    if type(fmt).__module__.split(".")[0] == "qtorch":
        return _from_qtorch(fmt)
    raise TypeError(
        f"A number format must be a FixedPoint, BlockFloatingPoint, FloatingPoint or MicroscalingFloat, a string such "
        f"as 'bfp8', or a qtorch number; got {fmt!r}."
    )


def _parse_string(text: str) -> NumberFormat:
    name = text.strip().lower()
    if name in _ALIASES:
        return _ALIASES[name]
    if match := _FIXED.fullmatch(name):
        return FixedPoint(int(match[1]), int(match[2]), symmetric=bool(match[3]))
    if match := _BLOCK.fullmatch(name):
        word, size, tensor, dim, exponent, clamp = match.groups()
        return BlockFloatingPoint(
            int(word),
            block_dim=None if tensor else int(dim or 0),
            exponent_bits=int(exponent or 8),
            block_size=int(size) if size else None,
            top="clamp" if clamp else "carry",
        )
    if match := _FLOAT.fullmatch(name):
        specials: Any = match[3]
        return FloatingPoint(int(match[1]), int(match[2]), specials)
    if match := _MICROSCALING.fullmatch(name):
        return _microscaling(text, match)
    raise ValueError(
        f"No number format is called {text!r}; use 'fixed<W>.<F>' (e.g. 'fixed8.6'), 'bfp<W>' (e.g. 'bfp8', "
        f"'bfp8-tensor', 'bfp8b32'), 'e<E>m<M>' (e.g. 'e4m3'), 'mxfp<W>e<E>m<M>' (e.g. 'mxfp8e4m3', "
        f"'mxfp8e4m3-fit') or one of {sorted(_ALIASES)}."
    )


def _microscaling(text: str, match: re.Match[str]) -> MicroscalingFloat:
    bits, exponent, mantissa, size, fit = match.groups()
    fmt = MicroscalingFloat(int(exponent), int(mantissa), int(size or 32), "fit" if fit else "floor")
    if fmt.bits != int(bits):
        raise ValueError(f"{text!r}: an element e{exponent}m{mantissa} has {fmt.bits} bits; write {str(fmt)!r}.")
    return fmt


def _from_qtorch(number: Any) -> NumberFormat:
    kind = type(number).__name__
    if kind == "FixedPoint":
        return FixedPoint(number.wl, number.fl, symmetric=bool(number.symmetric))
    if kind == "BlockFloatingPoint":
        return BlockFloatingPoint(number.wl, block_dim=None if number.dim == -1 else number.dim, top="clamp")
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
        ValueError: If QPyTorch has no such number: a fixed point without fraction bits, blocks that carry (QPyTorch
            clamps), runs of ``block_size`` elements (microscaling floats too), an exponent of other than 8 bits, or a
            negative ``block_dim``.
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
        if fmt.top != "clamp":
            raise ValueError(f"QPyTorch clamps at the top of a block, {fmt} does not; use '{fmt}-clamp' for its rule.")
        return qtorch.BlockFloatingPoint(wl=fmt.word_length, dim=-1 if fmt.block_dim is None else fmt.block_dim)
    if isinstance(fmt, MicroscalingFloat):
        raise ValueError(f"QPyTorch's floats share no scale; it has no {fmt}.")
    return qtorch.FloatingPoint(exp=fmt.exponent_bits, man=fmt.mantissa_bits)
