# ruff: noqa: ANN001, ANN201, SIM108
# mypy: disallow_untyped_defs=False
# (device code: types are Triton's, and `if` on a compile-time value must stay a statement)
"""Triton kernels of the four ops on one tensor; tiles and format numbers as in :mod:`.triton_device`.

``SHARED`` says where exponents come from: 0, nothing is shared (fixed and floating point); 1, every element is its own
block; 2, a program holds whole rows and reduces them in registers; 3, long rows: largest keys were found before by
:func:`row_keys_kernel`. A program handles R rows, or with ``SHARED`` 0, 1 and 3 one chunk of 4 Q elements of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lpsgld.ops.triton_carry import carried, keep_level
from lightning_lpsgld.ops.triton_device import (
    BLOCK,
    FIXED,
    FLOAT,
    clamp,
    draw_words,
    element_exponent,
    key_exponent,
    key_magnitude,
    locate,
    nearest,
    noise_reach,
    raise_exponent,
    raise_float_exponent,
    round_codes,
    row_key,
    scale,
    to_gap,
    values,
    vc_codes,
)


@triton.jit
def place(program, chunks, R: tl.constexpr, SHARED: tl.constexpr):
    """First row and chunk of a tensor's program (int64)."""
    if SHARED == 2:
        row, chunk = program * R, program * 0
    else:
        row, chunk = program // chunks, program % chunks
    return row, chunk.to(tl.int32)


@triton.jit(do_not_specialize=["rows", "length", "chunks", "offset"])
def row_keys_kernel(x, keys, rows: tl.int64, length: tl.int64, chunks: tl.int64, offset: tl.int64,
                    Q: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Largest key of long rows, all chunks at once; ``keys`` is int64, zeroed."""
    row, chunk = place(tl.program_id(0).to(tl.int64), chunks, 1, 3)
    _, element, mask = locate(row, chunk, rows, length, offset, 1, Q, ALIGNED)
    tile = tl.load(x + element, mask=mask, other=0.0).to(tl.float32)
    key = tl.max(row_key(tile), axis=2)
    tl.atomic_max(keys + row + tl.zeros_like(key).to(tl.int64), key.to(tl.int64))


@triton.jit
def shared_exponent(x, keys, row, SHARED: tl.constexpr, KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Exponents of a tile, broadcastable against it; 0 for fixed point."""
    if KIND == FIXED:
        exponent = tl.zeros((1, 1, 1), tl.int32)
    elif SHARED == 3:
        key = tl.load(keys + row).to(tl.uint32)
        exponent = key_exponent(tl.zeros((1, 1, 1), tl.uint32) + key, LOW, HIGH)
    elif SHARED == 2:
        exponent = key_exponent(row_key(x), LOW, HIGH)
    else:
        exponent = element_exponent(x, KIND, LOW, HIGH)
    return exponent


@triton.jit
def block_magnitude(x, keys, row, SHARED: tl.constexpr):
    """Largest finite |x| of every block of a tile, broadcastable against it."""
    if SHARED == 3:
        size = key_magnitude(tl.zeros((1, 1, 1), tl.uint32) + tl.load(keys + row).to(tl.uint32))
    elif SHARED == 2:
        size = key_magnitude(row_key(x))
    else:
        size = tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0)
    return size


@triton.jit
def rounded(x, keys, row, mask, quads, stream, step, seed, carry,
            KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CMAX: tl.constexpr,
            CARRY: tl.constexpr, STOCHASTIC: tl.constexpr, SHARED: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """Codes of a tile, not saturated, and their exponents; ``LEVELS``: only note what carried long rows need."""
    exponent = shared_exponent(x, keys, row, SHARED, KIND, LOW, HIGH)
    words = tl.zeros((1, 1, 1), tl.uint32)
    if STOCHASTIC:
        words = draw_words(quads, stream, step, seed)
    elif CARRY:
        largest = nearest(to_gap(block_magnitude(x, keys, row, SHARED), exponent + OFFSET, KIND))
        exponent += ((largest > CMAX) & (exponent < HIGH)).to(tl.int32)
    scaled = to_gap(x, exponent + OFFSET, KIND)
    codes = round_codes(scaled, words, STOCHASTIC)
    if CARRY and STOCHASTIC:
        if LEVELS:
            keep_level(codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET, HIGH, CMAX)
        else:
            codes, exponent = carried(
                codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET, HIGH, CMAX, SHARED, True
            )  # a value below the next power of two rounds to no more than that
    return codes, exponent


@triton.jit
def bit_patterns(codes, exponent, BITS: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, TOP: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """Sign, exponent and mantissa fields of floating point codes, as a signed integer of WIDTH bits.

    ``((e - LOW + 1) << m) + |code| - 2**m`` is right for normal and subnormal numbers, and where rounding carried into
    the next binade; TOP is the pattern of the largest value.
    """
    size = tl.abs(codes)
    hidden = 1 << (-OFFSET)
    whole = tl.minimum(size, 16777216.0).to(tl.int32)
    pattern = ((exponent - LOW + 1) << (-OFFSET)) + whole - hidden
    pattern = tl.where(size == float("inf"), TOP, tl.minimum(pattern, TOP))
    negative = (codes < 0) & (pattern > 0)
    if BITS == WIDTH:
        signed = pattern - (1 << (BITS - 2)) - (1 << (BITS - 2))
    else:
        signed = pattern + (1 << (BITS - 1))
    missing = (1 << (BITS - 2)) - 1 + (1 << (BITS - 2))
    return tl.where(codes != codes, missing, tl.where(negative, signed, pattern))


@triton.jit(do_not_specialize=["rows", "length", "chunks", "offset", "seed", "step", "stream", "carry"])
def quantize_kernel(x, out, keys, rows: tl.int64, length: tl.int64, chunks: tl.int64, offset: tl.int64,
                    seed: tl.int64, step: tl.int64, stream: tl.int64, carry: tl.int64,
                    KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                    CMIN: tl.constexpr, CMAX: tl.constexpr, CARRY: tl.constexpr, STOCHASTIC: tl.constexpr,
                    SHARED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
                    LEVELS: tl.constexpr):  # fmt: skip
    """One read and one write: quantize. ``LEVELS``: one read, to note what carried long rows need."""
    row, chunk = place(tl.program_id(0).to(tl.int64), chunks, R, SHARED)
    quads, element, mask = locate(row, chunk, rows, length, offset, R, Q, ALIGNED)
    tile = tl.load(x + element, mask=mask, other=0.0).to(tl.float32)
    codes, exponent = rounded(
        tile, keys, row, mask, quads, stream, step, seed, carry, KIND, OFFSET, LOW, HIGH, CMAX, CARRY, STOCHASTIC,
        SHARED, LEVELS,
    )  # fmt: skip
    if not LEVELS:
        result = values(codes, exponent + OFFSET, KIND, CMIN, CMAX)
        tl.store(out + element, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length", "chunks", "offset", "seed", "step", "stream", "carry"])
def encode_kernel(x, out, exponents, missing, keys, rows: tl.int64, length: tl.int64, chunks: tl.int64,
                  offset: tl.int64, seed: tl.int64, step: tl.int64, stream: tl.int64, carry: tl.int64,
                  KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                  CMIN: tl.constexpr, CMAX: tl.constexpr, CARRY: tl.constexpr, STOCHASTIC: tl.constexpr,
                  SHARED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
                  BITS: tl.constexpr, TOP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One read, one write of codes, one of exponents; counts NaN."""
    row, chunk = place(tl.program_id(0).to(tl.int64), chunks, R, SHARED)
    quads, element, mask = locate(row, chunk, rows, length, offset, R, Q, ALIGNED)
    tile = tl.load(x + element, mask=mask, other=0.0).to(tl.float32)
    codes, exponent = rounded(
        tile, keys, row, mask, quads, stream, step, seed, carry, KIND, OFFSET, LOW, HIGH, CMAX, CARRY, STOCHASTIC,
        SHARED, False,
    )  # fmt: skip
    nans = tl.sum(tl.sum(tl.sum((tile != tile).to(tl.int32), axis=2), axis=1), axis=0)
    tl.atomic_add(missing, nans, mask=nans > 0)
    if KIND == FLOAT:
        bits = bit_patterns(codes, exponent, BITS, OFFSET, LOW, TOP, WIDTH)
    else:
        bits = clamp(tl.where(codes == codes, codes, 0.0), CMIN, CMAX).to(tl.int32)
    tl.store(out + element, bits.to(out.dtype.element_ty), mask=mask)
    if KIND == BLOCK:
        if SHARED == 1:
            tl.store(exponents + element, exponent.to(tl.int8), mask=mask)
        else:
            at = row + tl.arange(0, R)[:, None, None]
            tl.store(exponents + at, exponent.to(tl.int8), mask=(at < rows) & (chunk == 0))


@triton.jit(do_not_specialize=["rows", "length", "chunks"])
def decode_kernel(codes, exponents, out, rows: tl.int64, length: tl.int64, chunks: tl.int64,
                  KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, CMAX: tl.constexpr,
                  SHARED: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
                  BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr, HAS_NAN: tl.constexpr):  # fmt: skip
    """One read of codes, one write of values."""
    row, chunk = place(tl.program_id(0).to(tl.int64), chunks, 1, 0)
    _, element, mask = locate(row, chunk, rows, length, rows * 0, 1, Q, ALIGNED)
    code = tl.load(codes + element, mask=mask, other=0).to(tl.int32)
    if KIND == FLOAT:
        field = (code >> (-OFFSET)) & ((1 << EXPONENT_BITS) - 1)
        size = code & ((1 << (-OFFSET)) - 1)
        size = tl.where(field > 0, size + (1 << (-OFFSET)), size).to(tl.float32)
        value = scale(size, tl.maximum(field, 1) - 1 + LOW + OFFSET)
        if HAS_NAN:
            value = tl.where(value > CMAX, float("nan"), value)
        value = tl.where(((code >> (BITS - 1)) & 1) == 1, -value, value)
    elif KIND == FIXED:
        value = scale(code.to(tl.float32), tl.zeros((1, 1, 1), tl.int32) + OFFSET)
    else:
        if SHARED == 1:
            exponent = tl.load(exponents + element, mask=mask, other=0).to(tl.int32)
        else:
            exponent = tl.load(exponents + row).to(tl.int32)
        value = scale(code.to(tl.float32), exponent + OFFSET)
    tl.store(out + element, (value + 0.0).to(out.dtype.element_ty), mask=mask)


@triton.jit
def noise_exponent(mean, keys, row, sigma, KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr,
                   HIGH: tl.constexpr, CMAX: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Exponents of Q^vc with one ``sigma`` (float64 scalar) for all, and those of the means alone."""
    own = shared_exponent(mean, keys, row, SHARED, KIND, LOW, HIGH)
    if KIND == FIXED:
        raised = own
    elif KIND == FLOAT:
        size = tl.where(tl.abs(mean) < float("inf"), tl.abs(mean), 0.0)
        raised = raise_float_exponent(own, size, sigma, OFFSET, LOW, HIGH)
    else:
        size = block_magnitude(mean, keys, row, SHARED)
        raised = raise_exponent(own, noise_reach(size, sigma), sigma, KIND, OFFSET, LOW, HIGH, CMAX)
    return raised, own


@triton.jit
def noise_exponents(mean, sigma, KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                    CMAX: tl.constexpr, SHARED: tl.constexpr, mask):  # fmt: skip
    """As :func:`noise_exponent` for a ``sigma`` (float64) of every element."""
    own = shared_exponent(mean, mean, mean, SHARED, KIND, LOW, HIGH)
    size = tl.where(tl.abs(mean) < float("inf"), tl.abs(mean), 0.0)
    reach = noise_reach(size, sigma)
    if KIND == FIXED:
        raised = own
    else:
        if SHARED == 2:
            reach = tl.max(tl.max(tl.where(mask, reach, 0.0), axis=2), axis=1)[:, None, None]
            sigma = tl.min(tl.min(tl.where(mask, sigma, float("inf")), axis=2), axis=1)[:, None, None]
        raised = raise_exponent(own, reach, sigma, KIND, OFFSET, LOW, HIGH, CMAX)
    return raised


@triton.jit(do_not_specialize=["rows", "length", "chunks", "offset", "seed", "step", "stream", "carry", "sigma_bits"])
def vc_kernel(x, variance, out, keys, sigma_bits: tl.int64, rows: tl.int64, length: tl.int64, chunks: tl.int64,
              offset: tl.int64, seed: tl.int64, step: tl.int64, stream: tl.int64, carry: tl.int64,
              KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
              CMIN: tl.constexpr, CMAX: tl.constexpr, CARRY: tl.constexpr, SHARED: tl.constexpr,
              PER_ELEMENT: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr,
              LEVELS: tl.constexpr):  # fmt: skip
    """One read and one write: Q^vc, with one variance (its root as the bits of a float64) or a tensor of them."""
    row, chunk = place(tl.program_id(0).to(tl.int64), chunks, R, SHARED)
    quads, element, mask = locate(row, chunk, rows, length, offset, R, Q, ALIGNED)
    mean = tl.load(x + element, mask=mask, other=0.0).to(tl.float32)
    if PER_ELEMENT:
        sigma = tl.sqrt(tl.load(variance + element, mask=mask, other=0.0).to(tl.float64))
        raised = noise_exponents(mean, sigma, KIND, OFFSET, LOW, HIGH, CMAX, SHARED, mask)
    else:
        sigma = sigma_bits.to(tl.int64).to(tl.float64, bitcast=True)
        raised, _ = noise_exponent(mean, keys, row, sigma, KIND, OFFSET, LOW, HIGH, CMAX, SHARED)
    codes, exponent = corrected(
        mean, raised, sigma, keys, row, mask, quads, stream, step, seed, carry, KIND, OFFSET, HIGH, CMAX, CARRY, SHARED,
        LEVELS, PER_ELEMENT,
    )  # fmt: skip
    if not LEVELS:
        result = values(codes, exponent + OFFSET, KIND, CMIN, CMAX)
        tl.store(out + element, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def corrected(mean, exponent, sigma, keys, row, mask, quads, stream, step, seed, carry,
              KIND: tl.constexpr, OFFSET: tl.constexpr, HIGH: tl.constexpr, CMAX: tl.constexpr, CARRY: tl.constexpr,
              SHARED: tl.constexpr, LEVELS: tl.constexpr, PER_ELEMENT: tl.constexpr):  # fmt: skip
    """Codes of Q^vc, not saturated, and their exponents; ``exponent`` has room for the noise. As :func:`rounded`."""
    words = draw_words(quads, stream, step, seed)
    scaled, target = to_gap(mean, exponent + OFFSET, KIND), variance_in_gaps(sigma, exponent + OFFSET)
    codes = vc_codes(scaled, target, words, quads, stream, step, seed, KIND, OFFSET)
    if CARRY:
        if LEVELS:
            keep_level(codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET, HIGH, CMAX)
        else:
            codes, exponent = carried(
                codes, exponent, keys, row, mask, quads, stream, step, carry, OFFSET, HIGH, CMAX, SHARED,
                OFFSET <= -3 and not PER_ELEMENT,
            )  # fmt: skip
    return codes, exponent


@triton.jit
def variance_in_gaps(sigma, gap):
    """Variance over gap**2, float32, kept finite."""
    ratio = scale(sigma.to(tl.float32), -gap)
    return tl.minimum(ratio * ratio, 1e37)
