"""Exact arithmetic: what every op must give, from the fields of a format alone.

Values are :class:`fractions.Fraction`. A grid is the sorted list of the values of a format (of a block, for block
formats); zero is in it, and a value is *even* when its distance from zero is an even number of steps in the list. That
is the even code for integers and the even bit pattern for floats.

Nothing of the package is imported: a format is anything with the right fields.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch

__all__ = [
    "block_exponent",
    "block_grid",
    "block_rounded",
    "candidates",
    "fixed_grid",
    "float_grid",
    "float_vc_law",
    "floor_log2",
    "grid_of",
    "nearest",
    "run_grid",
    "saturated_law",
    "scale_exponent",
    "split",
    "vc_law",
    "vc_moments",
]

Grid = list[Fraction]


def power(exponent: int) -> Fraction:
    """Two to the power of an int, exactly."""
    return Fraction(2) ** exponent


def floor_log2(x: Fraction) -> int:
    """``floor(log2(x))`` of a positive fraction, exactly."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if power(guess) <= x else guess - 1


# --------------------------------------------------------------------------------------------------------- grids


def fixed_grid(fmt: Any) -> Grid:
    """All values of a fixed-point format."""
    top = 2 ** (fmt.word_length - 1)
    return [k * power(-fmt.fraction_length) for k in range(-top + bool(fmt.symmetric), top)]


def float_grid(fmt: Any) -> Grid:
    """All finite values of a floating-point format, by decoding every bit pattern."""
    m, e = fmt.mantissa_bits, fmt.exponent_bits
    bias, patterns = 2 ** (e - 1) - 1, 2 ** (e + m)
    if fmt.specials == "ieee":
        patterns -= 2**m  # the all-ones exponent holds infinity and NaN
    elif fmt.specials == "nan":
        patterns -= 1  # the all-ones pattern is NaN
    positive = []
    for pattern in range(1, patterns):
        field, mantissa = divmod(pattern, 2**m)
        significand = mantissa + (2**m if field else 0)
        positive.append(significand * power(max(field, 1) - bias - m))
    return [-value for value in reversed(positive)] + [Fraction(0)] + positive


def block_exponent(largest: Fraction, fmt: Any, dtype: torch.dtype) -> int:
    """Shared exponent of a block whose largest magnitude is ``largest``.

    Clamped to the exponent's bits, and to what ``dtype`` can hold: the gap not below its smallest subnormal, the
    largest code not beyond its largest power of two.
    """
    low, high = _exponent_ends(fmt, dtype)
    return low if largest == 0 else min(max(floor_log2(largest), low), high)


def _exponent_ends(fmt: Any, dtype: torch.dtype) -> tuple[int, int]:
    facts = torch.finfo(dtype)
    lowest_gap = floor_log2(Fraction(facts.smallest_normal) * Fraction(facts.eps))
    low = max(-(2 ** (fmt.exponent_bits - 1)), lowest_gap + fmt.word_length - 2)
    return low, min(2 ** (fmt.exponent_bits - 1) - 1, floor_log2(Fraction(facts.max)))


def _nearest_integer(whole: int, gap: int) -> int:
    """Nearest integer to ``whole / gap``, ties to even."""
    code, rest = divmod(whole, gap)
    return code + (2 * rest > gap or (2 * rest == gap and code % 2 == 1))


def block_rounded(
    values: list[Fraction], fmt: Any, dtype: torch.dtype, draws: list[Fraction] | None, coins: list[int] | None = None
) -> tuple[list[Fraction], int]:
    """Values of one block rounded, and its exponent: to nearest (ties to even) without draws, else up where u < p.

    A block whose largest code passes the top takes the next exponent, unless the format clamps or there is none: to
    nearest from the values, stochastically by (code + bit) // 2 with the bits of each element's coin in turn.
    """
    exponent, top = block_exponent(max(map(abs, values)), fmt, dtype), 2 ** (fmt.word_length - 1) - 1
    last = exponent if fmt.top == "clamp" else _exponent_ends(fmt, dtype)[1]
    unit = power(exponent - fmt.word_length + 2)
    one = max(value.denominator for value in values) * max(unit.numerator, unit.denominator) * 2
    gap = int(unit * one)  # integers from here on: they are as exact and much faster
    wholes = [value.numerator * (one // value.denominator) for value in values]
    if draws is None:
        if max(map(abs, wholes)) * 2 >= (2 * top + 1) * gap and exponent < last:
            gap, exponent = 2 * gap, exponent + 1
        codes = [_nearest_integer(whole, gap) for whole in wholes]
    else:
        parts = [divmod(whole, gap) for whole in wholes]
        codes = [code + int(u.numerator * gap < rest * u.denominator) for (code, rest), u in zip(parts, draws)]
        for level in range(last - exponent):
            if max(map(abs, codes)) <= top:
                break
            codes = [(code + (coin >> level & 1)) // 2 for code, coin in zip(codes, coins or [0] * len(codes))]
            exponent += 1
    codes = [min(max(code, -top), top) for code in codes]
    return [code * power(exponent - fmt.word_length + 2) for code in codes], exponent


def block_grid(exponent: int, fmt: Any) -> Grid:
    """All values of a block with shared exponent ``exponent``: symmetric codes."""
    top = 2 ** (fmt.word_length - 1) - 1
    return [k * power(exponent - fmt.word_length + 2) for k in range(-top, top + 1)]


def scale_exponent(largest: Fraction, fmt: Any, dtype: torch.dtype) -> int:
    """log2 of the scale of a run whose largest magnitude is ``largest``: by trying one power of two after another.

    ``"fit"``: the smallest at which the largest element value reaches ``largest``. ``"floor"``: the one at which the
    largest power of two among the elements is the largest power of two not above ``largest``. Held to 8 bits without
    the highest code, and to what ``dtype`` can hold: the smallest element not below its smallest subnormal, the largest
    power of two among the elements not beyond its largest.
    """
    top, facts = float_grid(fmt.element)[-1], torch.finfo(dtype)
    smallest = next(value for value in float_grid(fmt.element) if value > 0)
    low = max(-127, floor_log2(Fraction(facts.smallest_normal) * Fraction(facts.eps) / smallest))
    high = min(127, floor_log2(Fraction(facts.max)) - floor_log2(top))
    if largest == 0:
        return low
    exponent = floor_log2(largest) - floor_log2(top)
    if fmt.scaling == "fit":
        exponent = next(k for k in range(exponent - 2, exponent + 3) if top * power(k) >= largest)
    return min(max(exponent, low), high)


def run_grid(exponent: int, fmt: Any) -> Grid:
    """All values of a microscaling run with scale ``2**exponent``."""
    return [value * power(exponent) for value in float_grid(fmt.element)]


def grid_of(fmt: Any) -> Grid:
    """All values of a fixed- or floating-point format."""
    return float_grid(fmt) if hasattr(fmt, "mantissa_bits") else fixed_grid(fmt)


def candidates(grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Every grid value, every midpoint, what lies beyond the ends, and the neighbours in ``dtype`` of all these."""
    points = list(grid) + [(a + b) / 2 for a, b in pairwise(grid)]
    step = grid[-1] - grid[-2]
    points += [sign * (grid[-1] + step * Fraction(n, 4)) for sign in (-1, 1) for n in (1, 2, 3, 4, 40)]
    biggest = Fraction(torch.finfo(dtype).max)
    x = torch.tensor([float(p) for p in points if abs(p) <= biggest], dtype=torch.float64).to(dtype)
    up, down = (torch.nextafter(x, torch.full_like(x, end)) for end in (math.inf, -math.inf))
    x = torch.cat([x, up, down])
    return x[x.isfinite()]


# ------------------------------------------------------------------------------------------------------- rounding


def split(x: Fraction, grid: Grid) -> tuple[Fraction, Fraction, Fraction]:
    """Neighbours of ``x`` on the grid and the probability of the upper one; outside, the end twice and 0."""
    if x <= grid[0]:
        return grid[0], grid[0], Fraction(0)
    if x >= grid[-1]:
        return grid[-1], grid[-1], Fraction(0)
    at = bisect_right(grid, x) - 1
    lower, upper = grid[at], grid[at + 1]
    return lower, upper, (x - lower) / (upper - lower)


def nearest(x: Fraction, grid: Grid) -> Fraction:
    """Nearest grid value; ties go to the even one, values outside to the end."""
    lower, upper, p = split(x, grid)
    if p != Fraction(1, 2):
        return lower if p < Fraction(1, 2) else upper
    zero = bisect_right(grid, Fraction(0)) - 1
    return lower if (bisect_right(grid, lower) - 1 - zero) % 2 == 0 else upper


# ------------------------------------------------------------------------------- the variance-corrected quantizer


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def _cell_moments(low: float, high: float, sigma: float) -> tuple[float, float, float]:
    """Integrals of 1, x, x^2 over [low, high] under N(0, sigma^2)."""
    a, b = low / sigma, high / sigma
    # Far tails: the difference of survival functions keeps its digits where that of cdfs does not.
    mass = _normal_cdf(-a) - _normal_cdf(-b) if a > 0 else _normal_cdf(b) - _normal_cdf(a)
    pa, pb = (math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in (a, b))
    return mass, sigma * (pa - pb), sigma * sigma * (mass + a * pa - b * pb)


def _high_law(scaled: Fraction, target: Fraction) -> dict[int, float]:
    """Law for target > 1/4: Gaussian of variance target - 1/4, nearest, then Cat(residual, 1/4).

    Given the Gaussian's value x, code k has the probability B(x - k) with the quadratic B-spline
    B(r) = 3/4 - r^2 for |r| <= 1/2, (3/2 - |r|)^2 / 2 for 1/2 <= |r| <= 3/2, 0 beyond.
    """
    sigma = math.sqrt(float(target) - 0.25)
    base, part = math.floor(scaled), float(scaled - math.floor(scaled))
    law = {}
    reach = math.ceil(9 * sigma) + 3
    for k in range(-reach, reach + 1):
        centre = k - part  # position of the code relative to the mean
        total = 0.0
        # Polynomials in t = x - mean; r = t - centre.
        pieces = ((-1.5, -0.5, 0.5, 1.5), (-0.5, 0.5, -1.0, 0.0), (0.5, 1.5, 0.5, -1.5))
        for low, high, square, shift in pieces:
            m0, m1, m2 = _cell_moments(centre + low, centre + high, sigma)
            s = shift - centre
            total += square * (m2 + 2 * s * m1 + s * s * m0) + (0.75 * m0 if square < 0 else 0.0)
        law[base + k] = max(total, 0.0)
    return law


def vc_law(scaled: Fraction, target: Fraction) -> dict[int, Fraction | float]:
    """Law of Q^vc over integer codes, before saturation; mean and variance in units of the gap and its square.

    Exact fractions for ``target <= 1/4``: stochastic rounding, then -1, 0, +1 with the variance that is left.
    """
    if target > Fraction(1, 4):
        return dict(_high_law(scaled, target))
    base = math.floor(scaled)
    p = scaled - base
    c = max(target - p * (1 - p), Fraction(0))
    law = {
        base - 1: (1 - p) * c / 2,
        base: (1 - p) * (1 - c) + p * c / 2,
        base + 1: p * (1 - c) + (1 - p) * c / 2,
        base + 2: p * c / 2,
    }
    return {code: chance for code, chance in law.items() if chance > 0}


def saturated_law(law: dict[int, Any], low: int, high: int) -> dict[int, Any]:
    """The same law with everything beyond the ends moved onto them."""
    out: dict[int, Any] = {}
    for code, chance in law.items():
        code = min(max(code, low), high)
        out[code] = out.get(code, 0) + chance
    return out


def float_vc_law(scaled: Fraction, target: Fraction, mantissa_bits: int) -> dict[int, Fraction | float]:
    """Law of Q^vc over the integer codes of a float: stochastic rounding, then a zero-mean jump, for ``target <= 1``.

    The jump has the variance c that is left: one code either way with c/2 each; from the next power of two, beyond
    which only every second code exists, one code inwards with c/3 and two outwards with c/6. Above, the Gaussian law.
    """
    if target > 1:
        return dict(_high_law(scaled, target))
    edge, base = 2 ** (mantissa_bits + 1), math.floor(scaled)
    p = scaled - base
    c = max(target - p * (1 - p), Fraction(0))
    law: dict[int, Fraction | float] = {}
    for start, chance in ((base, 1 - p), (base + 1, p)):
        sign = 1 if start > 0 else -1
        jumps = {sign: c / 2, -sign: c / 2} if abs(start) < edge else {2 * sign: c / 6, -sign: c / 3}
        for jump, part in {0: 1 - sum(jumps.values()), **jumps}.items():
            law[start + jump] = law.get(start + jump, Fraction(0)) + chance * part
    return {code: chance for code, chance in sorted(law.items()) if chance > 0}


def vc_moments(scaled: Fraction, target: Fraction) -> tuple[float, float, float]:
    """Mean, variance and fourth central moment of Q^vc in units of the gap, saturation not counted.

    Mean and variance come from their closed forms, ``scaled`` and ``max(target, p(1-p))``, not from the law.
    """
    p = scaled - math.floor(scaled)
    variance = target if target > Fraction(1, 4) else max(target, p * (1 - p))
    fourth = sum(float(chance) * float(code - scaled) ** 4 for code, chance in vc_law(scaled, target).items())
    return float(scaled), float(variance), fourth
