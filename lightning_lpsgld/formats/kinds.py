"""The kinds of formats together, as types and for ``isinstance``."""

from __future__ import annotations

from typing import Any, Union

from lightning_lpsgld.formats.microscaling import MicroscalingFloat
from lightning_lpsgld.formats.numbers import BlockFloatingPoint, FixedPoint, FloatingPoint

__all__ = ["BlockFormat", "FormatLike", "NumberFormat"]

#: Formats whose elements share an exponent, so that their grid depends on the tensor.
BlockFormat = BlockFloatingPoint | MicroscalingFloat
NumberFormat = FixedPoint | BlockFloatingPoint | FloatingPoint | MicroscalingFloat
FormatLike = Union[NumberFormat, str, Any]
