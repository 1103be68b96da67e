r"""The top of a block: where a rounded code passes the largest one, the block takes the next exponent.

A block's exponent comes from its largest magnitude, which lies below the next power of two :math:`2^{W-1}\Delta`; the
codes end one gap before it. Clamping there would round the largest element down always, so that no step smaller than a
gap could ever take it over the power of two. Instead, all codes of such a block are rounded onto the doubled gap: even
codes are halved, odd ones go up or down by a fair coin that is independent of everything before. So the mean of every
element, given its first code, is that code; twice rounded is the same law as rounded once onto the coarser grid.

.. math::
    k \;\to\; \lfloor (k + b)/2 \rfloor, \qquad b \sim \{0, 1\} \text{ fair}

It works from the codes alone (a step made in place needs nothing else) and is repeated until the codes fit: whether to
go on depends on coins that were thrown, so the mean stays. More than once is needed only by codes of fewer than five
bits, and where one block has very different variances. The coin of the j-th time is bit j of the element's word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lpsgld.formats.blocks import Blocks
from lightning_lpsgld.formats.exponents import exponent_of, power_of_two

__all__ = ["halved_until_they_fit"]

_FAR = 2.0**60


def _doublings(codes: Tensor, coins: Tensor, top: int) -> Tensor:
    """How often each code must be halved until it fits, by its own coins; int64 in, int64 out.

    With j the smallest for which |k| <= top 2^j, that is j or, by the coins' grace, j - 1.
    """
    wide = codes.double().abs()
    most = exponent_of(wide) - (top.bit_length() - 1)
    most = (most + (wide > top * power_of_two(most.clamp(min=-64)))).clamp(min=0)
    fewer = (most - 1).clamp(min=0)
    return torch.where(_halved(codes, coins, fewer).abs() <= top, fewer, most)


def _halved(codes: Tensor, coins: Tensor, times: Tensor) -> Tensor:
    """Codes after that many halvings: floor((k + b) / 2^j), b the coins of bits 0 to j - 1."""
    return (codes + (coins & ((1 << times) - 1))) >> times


def halved_until_they_fit(
    codes: Tensor, blocks: Blocks, top: int, room: Tensor, words: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of blocks that pass the top, rounded onto coarser gaps until they fit.

    Args:
        codes: Rounded codes of whole blocks, float64, not clamped; NaN and infinities take no part.
        blocks: Which of them share an exponent.
        top: Largest code.
        room: How many exponents higher each block may take, int64, compact shape.
        words: 32 bits an element, int64: the coins.

    Returns:
        The codes, of which only those of blocks without room may still pass the top; and by how much the exponent of
        every block was raised (int64, compact shape).
    """
    coins = words | (words << 31 << 1)
    whole = codes.where(codes.isfinite(), 0.0).clamp(-_FAR, _FAR).long()
    levels = torch.minimum(blocks.max(_doublings(whole, coins, top)), room)
    moved = _halved(whole, coins, blocks.expand(levels, codes.shape)).double()
    return torch.where(codes.isfinite(), moved, codes), levels
