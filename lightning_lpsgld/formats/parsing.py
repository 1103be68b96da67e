"""Strings and QPyTorch numbers into format objects, and back."""

from __future__ import annotations

from typing import Any

from lightning_lpsgld.formats.base import NumberFormat
from lightning_lpsgld.formats.block_floating import BlockFloatingPoint
from lightning_lpsgld.formats.fixed import FixedPoint
from lightning_lpsgld.formats.floating import FloatingPoint
from lightning_lpsgld.formats.kinds import FormatLike
from lightning_lpsgld.formats.microscaling import MicroscalingFloat

__all__ = ["parse_format", "to_qtorch"]

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
    for kind in NumberFormat.kinds:
        fmt = kind.from_name(name)
        if fmt is not None:
            return fmt
    raise ValueError(
        f"No number format is called {text!r}; use 'fixed<W>.<F>' (e.g. 'fixed8.6'), 'bfp<W>' (e.g. 'bfp8', "
        f"'bfp8-tensor', 'bfp8b32'), 'e<E>m<M>' (e.g. 'e4m3'), 'mxfp<W>e<E>m<M>' (e.g. 'mxfp8e4m3', "
        f"'mxfp8e4m3-fit') or one of {sorted(_ALIASES)}."
    )


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
    return parse_format(fmt).to_qtorch()
