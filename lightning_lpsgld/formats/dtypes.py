"""What the floating dtypes of tensors can hold."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["DTYPES", "DtypeFacts"]


class DtypeFacts(NamedTuple):
    """Of a floating dtype.

    Attributes:
        significand: Bits of a number with the hidden one.
        lowest: Exponent of the smallest subnormal.
        highest: Exponent of the largest power of two.
    """

    significand: int
    lowest: int
    highest: int


#: The dtypes that tensors of rounded values may have.
DTYPES: dict[torch.dtype, DtypeFacts] = {
    torch.float64: DtypeFacts(53, -1074, 1023),
    torch.float32: DtypeFacts(24, -149, 127),
    torch.bfloat16: DtypeFacts(8, -133, 127),
    torch.float16: DtypeFacts(11, -24, 15),
}
