"""Number formats as frozen data that knows its own grid, their names, and what a dtype can hold of them.

What a format answers is the contract in :mod:`.base`; :mod:`lightning_lpsgld.ops` rounds by asking.
"""

from lightning_lpsgld.formats.accumulators import Accumulator, parse_accumulator
from lightning_lpsgld.formats.block_floating import BlockFloatingPoint
from lightning_lpsgld.formats.blocks import Blocks
from lightning_lpsgld.formats.fixed import FixedPoint
from lightning_lpsgld.formats.floating import FloatingPoint
from lightning_lpsgld.formats.kernel import KernelIdentity
from lightning_lpsgld.formats.kinds import BlockFormat, FormatLike, NumberFormat
from lightning_lpsgld.formats.limits import check_dtype, code_dtype, with_word_length
from lightning_lpsgld.formats.microscaling import MicroscalingFloat
from lightning_lpsgld.formats.parsing import parse_format, to_qtorch

__all__ = [
    "Accumulator",
    "BlockFloatingPoint",
    "BlockFormat",
    "Blocks",
    "FixedPoint",
    "FloatingPoint",
    "FormatLike",
    "KernelIdentity",
    "MicroscalingFloat",
    "NumberFormat",
    "check_dtype",
    "code_dtype",
    "parse_accumulator",
    "parse_format",
    "to_qtorch",
    "with_word_length",
]
