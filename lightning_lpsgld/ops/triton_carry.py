# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disallow_untyped_defs=False
# (device code: types are Triton's, and `if` on a compile-time value must stay a statement)
"""Device functions for the top of a block: which blocks take the next exponent, and their codes then.

The definition is :mod:`.carry`; tiles and format numbers are those of :mod:`.triton_device`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lpsgld.ops.triton_device import clamp, draw_words, power_of_two


@triton.jit
def _halved(codes, coins, times):
    """``floor((k + b) / 2**times)`` with b the low bits of the coins; int32, |k| below 2**30."""
    return (codes + (coins.to(tl.int32, bitcast=True) & ((1 << times) - 1))) >> times


@triton.jit
def _doublings(codes, coins, OFFSET: tl.constexpr, CMAX: tl.constexpr):
    """How often each code (float32, finite) must be halved until it fits, by its own coins; see :mod:`.carry`."""
    size = tl.abs(codes)
    most = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127 + OFFSET, -64)
    most = tl.maximum(most + (size > CMAX * power_of_two(most)).to(tl.int32), 0)
    fewer = tl.maximum(most - 1, 0)
    fits = tl.abs(_halved(codes.to(tl.int32), coins, fewer)) <= CMAX
    return tl.where(fits, fewer, most)


@triton.jit
def _whole(codes, mask):
    """Codes that may pass the top: 0 where there is nothing finite, within what int32 takes."""
    return clamp(tl.where((tl.abs(codes) < float("inf")) & mask, codes, 0.0), -1073741824.0, 1073741824.0)


@triton.jit
def levels_of(codes, exponent, coins, mask, OFFSET: tl.constexpr, HIGH: tl.constexpr, CMAX: tl.constexpr):
    """Doublings that every element asks for, bounded by what its exponent allows."""
    return tl.minimum(_doublings(_whole(codes, mask), coins, OFFSET, CMAX), HIGH - exponent)


@triton.jit
def carried(codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET: tl.constexpr,
            HIGH: tl.constexpr, CMAX: tl.constexpr, SHARED: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """Codes and exponents of blocks after those that pass the top took the next exponent; most tiles have none.

    ``ONCE``: one doubling is enough, which saves registers. That is so for one variance and codes of five bits or more.
    For long rows (``SHARED`` 3) the number of doublings was found before: it is in the upper half of the row's key.
    """
    if SHARED == 3:
        found = (tl.load(keys + row) >> 32).to(tl.int32)
        needed = found > 0
    else:
        needed = tl.max(tl.max(tl.max(tl.abs(_whole(codes, mask)), axis=2), axis=1), axis=0) > CMAX
    if needed:
        coins = draw_words(quads, stream, step, carry)
        if SHARED == 3:
            level = tl.zeros((1, 1, 1), tl.int32) + found
        else:
            if ONCE:
                level = tl.minimum((tl.abs(_whole(codes, mask)) > CMAX).to(tl.int32), HIGH - exponent)
            else:
                level = levels_of(codes, exponent, coins, mask, OFFSET, HIGH, CMAX)
            if SHARED == 2:
                level = tl.max(tl.max(level, axis=2), axis=1)[:, None, None]
        if ONCE:
            moved = tl.floor((codes + (coins & 1).to(tl.float32)) * 0.5)  # NaN and infinities stay
            codes = tl.where(level > 0, moved, codes)
        else:
            moved = _halved(_whole(codes, mask).to(tl.int32), coins, level).to(tl.float32)
            codes = tl.where(tl.abs(codes) < float("inf"), moved, codes)
        exponent = exponent + level
    return codes, exponent


@triton.jit
def keep_level(codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET: tl.constexpr,
               HIGH: tl.constexpr, CMAX: tl.constexpr):  # fmt: skip
    """One chunk of a long row: note the doublings that it asks for above the row's key."""
    if tl.max(tl.max(tl.max(tl.abs(_whole(codes, mask)), axis=2), axis=1), axis=0) > CMAX:
        coins = draw_words(quads, stream, step, carry)
        level = levels_of(codes, exponent, coins, mask, OFFSET, HIGH, CMAX)
        level = tl.max(tl.max(tl.max(level, axis=2), axis=1), axis=0).to(tl.int64)
        key = tl.load(keys + row) & 0xFFFFFFFF
        tl.atomic_max(keys + row, (level << 32) | key)
