"""Number formats as frozen data, their names, and what a dtype can hold of them.

Nothing here touches a tensor's values; :mod:`lightning_lpsgld.ops` rounds, this says onto which grid.
"""

from lightning_lpsgld.formats.limits import block_exponent_range, check_dtype, code_dtype, with_word_length
from lightning_lpsgld.formats.numbers import BlockFloatingPoint, FixedPoint, FloatingPoint, FormatLike, NumberFormat
from lightning_lpsgld.formats.parsing import parse_format, to_qtorch

__all__ = [
    "BlockFloatingPoint",
    "FixedPoint",
    "FloatingPoint",
    "FormatLike",
    "NumberFormat",
    "block_exponent_range",
    "check_dtype",
    "code_dtype",
    "parse_format",
    "to_qtorch",
    "with_word_length",
]
