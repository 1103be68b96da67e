"""Number formats as frozen data, their names, and what a dtype can hold of them.

Nothing here touches a tensor's values; :mod:`lightning_lpsgld.ops` rounds, this says onto which grid.
"""

from lightning_lpsgld.formats.accumulators import Accumulator, parse_accumulator
from lightning_lpsgld.formats.kinds import BlockFormat, FormatLike, NumberFormat
from lightning_lpsgld.formats.limits import (
    block_exponent_range,
    check_dtype,
    code_dtype,
    scale_exponent_range,
    with_word_length,
)
from lightning_lpsgld.formats.microscaling import MicroscalingFloat
from lightning_lpsgld.formats.numbers import BlockFloatingPoint, FixedPoint, FloatingPoint
from lightning_lpsgld.formats.parsing import parse_format, to_qtorch

__all__ = [
    "Accumulator",
    "BlockFloatingPoint",
    "BlockFormat",
    "FixedPoint",
    "FloatingPoint",
    "FormatLike",
    "MicroscalingFloat",
    "NumberFormat",
    "block_exponent_range",
    "check_dtype",
    "code_dtype",
    "parse_accumulator",
    "parse_format",
    "scale_exponent_range",
    "to_qtorch",
    "with_word_length",
]
