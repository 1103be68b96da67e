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
bits, and where one block has very different variances. The coin of the j-th time is bit j of the element's word under
:func:`carry_key`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from lightning_lpsgld.formats import BlockFloatingPoint, MicroscalingFloat, block_exponent_range
from lightning_lpsgld.ops.blocks import block_max, expand_blocks
from lightning_lpsgld.ops.exponents import exponent_of, finite_magnitude, power_of_two
from lightning_lpsgld.ops.microscaling import scale_exponents
from lightning_lpsgld.random import DrawKey, derive_seed, words

__all__ = [
    "BOUNDLESS",
    "carried",
    "carried_scales",
    "carry_key",
    "carry_seed",
    "fitted",
    "open_bounds",
    "raised_for_nearest",
]

#: Beyond every finite value: an infinity is all that is outside of a range that ends here.
BOUNDLESS = torch.finfo(torch.float64).max
_NO_BLOCK = -(2**20)
_FAR, _MOST_DOUBLINGS = 2.0**60, 62


@lru_cache(256)
def carry_seed(seed: int) -> int:
    """Seed of the coins of every key with this seed."""
    return derive_seed(seed, "carry")


def carry_key(key: DrawKey) -> DrawKey:
    """Key of the coins: draws that share nothing with those of ``key``."""
    return replace(key, seed=carry_seed(key.seed))


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


def carried(
    codes: Tensor, gap_exponents: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype, key: DrawKey
) -> tuple[Tensor, Tensor]:
    """Codes of blocks that pass the top, rounded onto coarser gaps until they fit.

    Args:
        codes: Rounded codes of whole blocks, float64, not clamped; NaN and infinities take no part.
        gap_exponents: log2 of the gap at every element, broadcastable against ``codes``.
        fmt: The format; one that clamps changes nothing here.
        dtype: dtype of the result, which bounds the exponents.
        key: Key of the op's draws; the coins are made from it.

    Returns:
        The codes, of which only those of blocks at the largest exponent may still pass the top; and by how much the
        exponent of every block was raised (int64, compact shape).
    """
    largest = block_max(finite_magnitude(codes), fmt)
    none = torch.zeros_like(largest, dtype=torch.int64)
    if fmt.top == "clamp" or (codes.device.type == "cpu" and not bool((largest > fmt.code_max).any())):
        return codes, none  # (elsewhere than on a CPU, to look would synchronise)
    own = block_max(gap_exponents.expand(codes.shape), fmt, fill=_NO_BLOCK)
    room = (block_exponent_range(fmt, dtype)[1] + (2 - fmt.word_length) - own).clamp(0, _MOST_DOUBLINGS)
    coins = words(codes.shape, carry_key(key), device=codes.device)
    coins = coins | (coins << 31 << 1)
    whole = codes.where(codes.isfinite(), 0.0).clamp(-_FAR, _FAR).long()
    levels = torch.minimum(block_max(_doublings(whole, coins, fmt.code_max), fmt), room)
    moved = _halved(whole, coins, expand_blocks(levels, codes.shape, fmt)).double()
    return torch.where(codes.isfinite(), moved, codes), levels


def raised_for_nearest(x: Tensor, exponents: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype) -> Tensor:
    """Exponents of rounding to nearest: one more where the largest magnitude (float64) rounds to the next power of two.

    All elements are then rounded from their values on the coarser gap, once.
    """
    if fmt.top == "clamp":
        return exponents
    codes = block_max(finite_magnitude(x), fmt) * power_of_two(-(exponents + (2 - fmt.word_length)))
    over = (codes.round() > fmt.code_max) & (exponents < block_exponent_range(fmt, dtype)[1])
    return exponents + over


def open_bounds(gap_exponents: Tensor, fmt: BlockFloatingPoint, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Smallest and largest code that an element may have, float64; boundless below the largest exponent of a block."""
    top = torch.full_like(gap_exponents, fmt.code_max, dtype=torch.float64)
    if fmt.top == "carry":
        last = block_exponent_range(fmt, dtype)[1] + (2 - fmt.word_length)
        top = torch.where(gap_exponents < last, BOUNDLESS, top)
    return -top, top


def carried_scales(
    values: Tensor, exponents: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype, key: DrawKey
) -> tuple[Tensor, Tensor]:
    """The same for runs of floats: a larger scale where a value passes the largest of its run's grid.

    A float keeps its value under a larger scale unless it is next to zero, where the gap grows: there it is rounded
    stochastically, by the element's word under :func:`carry_key`.

    Args:
        values: Values on the grids of ``exponents``, float64, not clamped; NaN and infinities take no part.
        exponents: log2 of the scales, compact shape.
        fmt: A format whose scale is rounded up (``"fit"``).
        dtype: dtype of the result, which bounds the scales.
        key: Key of the op's draws.

    Returns:
        Values and scales; only runs of the largest scale may still have values beyond their grid.
    """
    finite = torch.where(values.isfinite(), values, 0.0)
    raised = torch.maximum(exponents, scale_exponents(finite, fmt, dtype))
    if values.device.type == "cpu" and not bool((raised > exponents).any()):
        return values, exponents
    element, u = fmt.element, (words(values.shape, carry_key(key), device=values.device).double() + 0.5) * 2.0**-32
    shift = expand_blocks(raised, values.shape, fmt)
    own = exponent_of(finite.abs()).clamp(min=-1000)
    gap = power_of_two(torch.maximum(own, shift + element.exponent_min) - element.mantissa_bits)
    moved = (finite / gap + u).floor() * gap  # what is on the grid stays: u < 1
    grown = expand_blocks(raised > exponents, values.shape, fmt) & values.isfinite()
    return torch.where(grown, moved, values), raised


def fitted(values: Tensor, exponents: Tensor, fmt: MicroscalingFloat, dtype: torch.dtype, key: DrawKey) -> Tensor:
    """Values of :func:`carried_scales`, saturated at the end of the last scale (infinities: of their run's)."""
    values, exponents = carried_scales(values, exponents, fmt, dtype, key)
    top = expand_blocks(fmt.element.max * power_of_two(exponents), values.shape, fmt)
    return values.clamp(-top, top)
