# ruff: noqa: ANN001, ANN201, ANN202, SIM108
# mypy: disallow_untyped_defs=False
# (device code: types are Triton's, and `if` on a compile-time value must stay a statement)
"""Device functions of the Triton kernels: draws, exponents, rounding, the variance-corrected codes.

Tiles have shape ``(R, Q, 4)``: R rows, Q quads, and the four elements that share one Philox evaluation; a thread holds
a quad, so that float32 moves in vectors of 16 bytes. A format is seven compile-time numbers: ``KIND``, ``OFFSET`` (log2
of the gap; added to the exponent for block and float), ``LOW`` and ``HIGH`` (range of the exponent), ``CMIN`` and
``CMAX`` (smallest and largest code; for float: value), ``CARRY`` (a block that passes the top takes the next exponent,
see :mod:`.carry`). Scales are built from exponent bits; no ``exp2``, no ``log2``,
no device library. This module imports Triton: import it only where a kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
FIXED = tl.constexpr(1)
BLOCK = tl.constexpr(2)
FLOAT = tl.constexpr(3)

_REACH = tl.constexpr(6.77)  # reference.NOISE_REACH


@triton.jit
def philox(quads, stream, step, seed):
    """Four uint32 words of every quad: Philox4x32-10 of counter (quad lo, quad hi, stream, step), key = seed."""
    k0 = seed.to(tl.uint32)
    k1 = (seed.to(tl.int64) >> 32).to(tl.uint32)
    c0 = quads.to(tl.uint32)
    c1 = (quads >> 32).to(tl.uint32)
    c2 = stream.to(tl.uint32)
    c3 = step.to(tl.uint32)
    for _ in tl.static_range(10):
        # one 32 x 32 -> 64 bit product instead of a low and a high one
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def join_quad(a, b, c, d):
    """``(R, Q)`` tensors of the four lanes to one of shape ``(R, Q, 4)``."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], a.shape[1], 4))


@triton.jit
def draw_words(quads, stream, step, seed):
    """One word per element, shape ``(R, Q, 4)``."""
    a, b, c, d = philox(quads, stream, step, seed)
    return join_quad(a, b, c, d)


@triton.jit
def unit(word):
    """The uniform ``((w >> 9) + 1/2) * 2**-23``, exact: mantissa bits under the exponent of 1, less 1 - 2**-24."""
    return ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def _radius(word):
    """``sqrt(-2 ln u)`` of ``u = (w + 1/2) 2**-32``, relative error below 2e-7 also beside u = 1."""
    near_one = word >= 0xB504F334  # there from 1 - u, whose bits are the word's complement
    x = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - 0x3F3504F3
    power = tl.where(near_one, 0, (x >> 23) - 32).to(tl.float32)
    mantissa = ((x & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(near_one, ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -2.3283064365386963e-10, mantissa - 1.0)
    tail = tl.fma(f, -0.07859546, 0.12881622)
    tail = tl.fma(f, tail, -0.13128768)
    tail = tl.fma(f, tail, 0.14181196)
    tail = tl.fma(f, tail, -0.16624553)
    tail = tl.fma(f, tail, 0.20002286)
    tail = tl.fma(f, tail, -0.2500081)
    tail = tl.fma(f, tail, 0.33333317)
    log1p = f + f * f * tl.fma(f, tail, -0.5)
    return tl.sqrt_rn(-2.0 * tl.fma(power, 0.6931471805599453, log1p))


@triton.jit
def _normal_pair(word, turn):
    """Box-Muller: the pair of normals of two words; the angle is reduced on the integer, exactly."""
    radius = _radius(word)
    quadrant = (turn + 0x20000000) >> 30
    rest = (turn - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32)
    t = (rest + 0.5) * 1.4629180792671596e-09  # 2 pi / 2**32
    t2 = t * t
    sine = tl.fma(t2, tl.fma(t2, tl.fma(t2, 2.71831158e-06, -1.98393348e-04), 8.33332939e-03), -1.66666666e-01)
    cosine = tl.fma(t2, tl.fma(t2, tl.fma(t2, -2.72102377e-07, 2.47995200e-05), -1.38888838e-03), 4.16666666e-02)
    sine = t + t * t2 * sine
    cosine = 1.0 + t2 * tl.fma(t2, cosine, -0.5)
    swap = (quadrant & 1) == 1
    first = tl.where(swap, sine, cosine) * radius
    second = tl.where(swap, cosine, sine) * radius
    first = tl.where(((quadrant + 1) & 2) == 2, -first, first)
    return first, tl.where((quadrant & 2) == 2, -second, second)


@triton.jit
def draw_normals(quads, stream, step, seed):
    """One standard normal per element, shape ``(R, Q, 4)``, from the sub-stream of normals."""
    a, b, c, d = philox(quads, stream.to(tl.uint32) | 0x80000000, step, seed)
    z0, z1 = _normal_pair(a, b)
    z2, z3 = _normal_pair(c, d)
    return join_quad(z0, z1, z2, z3)


@triton.jit
def power_of_two(exponent):
    """``2.0 ** exponent`` from the bits; int32 in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale(x, exponent):
    """``x * 2.0 ** exponent`` for exponents in [-252, 254], by two factors inside float32's range."""
    half = exponent >> 1
    return (x * power_of_two(half)) * power_of_two(exponent - half)


@triton.jit
def magnitude_key(x):
    """uint32 ordered like |x|: 0 for zero and NaN, 1 for infinity (it decides only where nothing else is)."""
    shifted = x.to(tl.uint32, bitcast=True) << 1
    return tl.where(shifted < 0xFF000000, shifted, (shifted == 0xFF000000).to(tl.uint32))


@triton.jit
def key_exponent(key, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Shared exponent of a block from the largest key in it."""
    field = (key >> 24).to(tl.int32)
    subnormal = ((key >> 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - (127 + 149)
    exponent = tl.where(field > 0, field - 127, subnormal)
    return tl.where(key == 1, HIGH, tl.minimum(tl.maximum(exponent, LOW), HIGH))


@triton.jit
def element_exponent(x, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Exponent of every element by itself: floating point, and blocks of one element."""
    if KIND == BLOCK:
        exponent = key_exponent(magnitude_key(x), LOW, HIGH)
    else:
        field = (x.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(field - 127, LOW), HIGH)
    return exponent


@triton.jit
def row_key(x):
    """Largest key of every row of a tile, shape ``(R, 1, 1)``."""
    return tl.max(tl.max(magnitude_key(x), axis=2), axis=1)[:, None, None]


@triton.jit
def nearest(x):
    """Round to the nearest integer, ties to even; NaN and infinities stay."""
    size = tl.abs(x)
    size = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def round_codes(scaled, words, STOCHASTIC: tl.constexpr):
    """Nearest, or up when ``u < frac``: decided on |scaled|, where the fraction is exact in float32."""
    if STOCHASTIC:
        size = tl.abs(scaled)
        whole = tl.floor(size)
        part = size - whole
        u = unit(words)
        # below zero the fraction is 1 - part, and u < 1 - part fails just when 1 - u <= part
        away = tl.where(scaled < 0, 1.0 - u <= part, u < part)
        size = whole + away.to(tl.float32)
        codes = tl.where(scaled < 0, -size, size)
    else:
        codes = nearest(scaled)
    return codes


@triton.jit
def clamp(x, low, high):
    """Saturate; NaN stays."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def to_gap(x, gap, KIND: tl.constexpr):
    """``x / gap`` with ``gap`` as log2; a fixed point's gap needs one factor."""
    if KIND == FIXED:
        out = x * power_of_two(-gap)
    else:
        out = scale(x, -gap)
    return out


@triton.jit
def values(codes, gap, KIND: tl.constexpr, CMIN: tl.constexpr, CMAX: tl.constexpr):
    """Saturated values of codes; no negative zero."""
    if KIND == FLOAT:
        out = clamp(scale(codes, gap), CMIN, CMAX)
    elif KIND == BLOCK:
        out = scale(clamp(codes, CMIN, CMAX), gap)
    else:
        out = clamp(codes, CMIN, CMAX) * power_of_two(gap)
    return out + 0.0


@triton.jit
def outside(x, gap, KIND: tl.constexpr, CMIN: tl.constexpr, CMAX: tl.constexpr):
    """Whether values are out of the range of their grid."""
    if KIND == FLOAT:
        scaled = x
    else:
        scaled = to_gap(x, gap, KIND)
    return (scaled > CMAX) | (scaled < CMIN)


@triton.jit
def _exponent64(x):
    return ((x.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)


@triton.jit
def raise_exponent(own, reach, sigma, KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr,
                   HIGH: tl.constexpr, CMAX: tl.constexpr):  # fmt: skip
    """Exponent of Q^vc: headroom for the noise as far as the coarser gap leaves every variance reachable.

    ``reach`` bounds |mean| + noise, ``sigma`` is the smallest standard deviation of the block; both float64, one per
    block, so that the choice is the reference's to the last bit.
    """
    wanted = _exponent64(reach)
    if KIND == BLOCK:
        top = ((wanted + OFFSET + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True) * CMAX
        wanted += (reach > top).to(tl.int32)
    free = _exponent64(2.0 * sigma) - OFFSET
    return tl.minimum(tl.maximum(tl.maximum(own, tl.minimum(wanted, free)), LOW), HIGH)


@triton.jit
def raise_float_exponent(own, magnitude, sigma, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """As :func:`raise_exponent` for every element by itself, in float32: one ``sigma`` (float64 scalar) for all."""
    reach = magnitude + _REACH * sigma.to(tl.float32)
    wanted = (reach.to(tl.int32, bitcast=True) >> 23) - 127
    free = _exponent64(2.0 * sigma) - OFFSET
    return tl.minimum(tl.maximum(tl.maximum(own, tl.minimum(wanted, free)), LOW), HIGH)


@triton.jit
def noise_reach(magnitude, sigma):
    """float64 bound on |mean| + noise."""
    return magnitude.to(tl.float64) + _REACH * sigma


@triton.jit
def key_magnitude(key):
    """Largest finite |x| of a block, float32."""
    return tl.where(key > 1, key >> 1, 0).to(tl.float32, bitcast=True)


@triton.jit
def _jumps_at_edge(lower, p, side, OFFSET: tl.constexpr):
    """Odds of the four neighbours where codes beyond a float's next power of two are even: mean and variance kept.

    Returns the odds of going below ``lower``, of staying at or below it, of going above ``lower + 1``, and how far the
    first and the last go. From the power of two it is one down with 1/3 and two up with 1/6 of the variance.
    """
    above, below = lower == 2.0 ** (1 - OFFSET) - 1.0, lower == -(2.0 ** (1 - OFFSET))
    down, up = (1.0 - p) * side, p * side
    middle = (1.0 - p) + (up * tl.where(above, 0.6666667, 1.0) - down * tl.where(below, 0.6666667, 1.0))
    down, up = down * tl.where(below, 0.33333334, 1.0), up * tl.where(above, 0.33333334, 1.0)
    return down, middle, up, tl.where(below, 2.0, 1.0), tl.where(above, 2.0, 1.0)


@triton.jit
def vc_codes(scaled, target, words, quads, stream, step, seed, KIND: tl.constexpr, OFFSET: tl.constexpr):
    """Codes of Q^vc before saturation; ``target`` is variance / gap**2. Tiles without a large one draw no normals."""
    u = unit(words)
    lower = tl.floor(scaled)
    p = scaled - lower
    side = tl.maximum(target - p * (1.0 - p), 0.0) * 0.5
    gaussian_from: tl.constexpr = 1.0 if KIND == FLOAT else 0.25  # for floats: where the gap has room for the noise
    if KIND == FLOAT:
        down, middle, up, first, last = _jumps_at_edge(lower, p, side, OFFSET)
        codes = lower + (u >= middle).to(tl.float32)
        codes += tl.where(u >= 1.0 - up, last, 0.0) - tl.where(u < down, first, 0.0)
    else:
        down = (1.0 - p) * side
        middle = down + ((1.0 - p) * (1.0 - 2.0 * side) + p * side)
        codes = lower - 1.0 + (u >= down).to(tl.float32)
        codes += (u >= middle).to(tl.float32) + (u >= 1.0 - p * side).to(tl.float32)
    if tl.max(tl.max(tl.max(target, axis=2), axis=1), axis=0) > gaussian_from:
        z = draw_normals(quads, stream, step, seed)
        x = scaled + tl.sqrt_rn(tl.maximum(target - 0.25, 0.0)) * z
        whole = nearest(x)
        left = x - whole
        down = (0.5 - left) * (0.5 - left) * 0.5
        up = (0.5 + left) * (0.5 + left) * 0.5
        large = whole - 1.0 + (u >= down).to(tl.float32) + (u >= 1.0 - up).to(tl.float32)
        if KIND == FLOAT:  # 6.7 standard deviations away it would leave its binade: then to an even code
            large = tl.where(tl.abs(large) > 2.0 ** (1 - OFFSET), 2.0 * nearest(0.5 * large), large)
        codes = tl.where(target > gaussian_from, large, codes)
    return tl.where(tl.abs(scaled) < float("inf"), codes, scaled)


@triton.jit
def locate(row0, chunk, rows, length, offset, R: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a tile lies: global quads ``(R, Q)``, elements of the tensor ``(R, Q, 4)``, and the mask.

    ``ALIGNED``: length and offset are multiples of 4, so quads never cross a row and the mask is one bit per quad,
    which lets the compiler move vectors. Otherwise a row's window starts at the quad that holds its first element.
    """
    row = row0 + tl.arange(0, R).to(tl.int64)
    quad = chunk * Q + tl.arange(0, Q)
    lane = tl.arange(0, 4)
    if ALIGNED:
        inside = (row * (length >> 2))[:, None] + quad[None, :]
        quads = inside + (offset >> 2)
        element = inside[:, :, None] * 4 + lane[None, None, :]
        valid = ((row < rows)[:, None] & (quad < (length >> 2))[None, :])[:, :, None]
        mask = tl.broadcast_to(valid, (R, Q, 4))
    else:
        quads = ((row * length + offset) >> 2)[:, None] + quad[None, :]
        element = quads[:, :, None] * 4 - offset + lane[None, None, :]
        first = (row * length)[:, None, None]
        mask = (element >= first) & (element < first + length) & (row < rows)[:, None, None]
    return quads, element, mask
