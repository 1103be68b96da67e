# ruff: noqa: ANN001, ANN201, ANN202, C901, SIM108, SIM300
# mypy: disallow_untyped_defs=False
# (device code: types are Triton's, and `if` on a compile-time value must stay a statement)
"""Triton kernel of the sampler's step; tiles and format numbers as in :mod:`.triton_device`."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_lpsgld.ops.triton_device import (
    NONE,
    draw_normals,
    locate,
    outside,
    row_key,
    values,
)
from lightning_lpsgld.ops.triton_kernels import corrected, noise_exponent, place, rounded, shared_exponent
from lightning_lpsgld.random import Role, stream_id

#: Columns of the table: addresses of weight, gradient, accumulator; rows, row length, stream, offset, first long row,
#: chunks of a row.
COLUMNS = tl.constexpr(9)
_GRADIENT_MAX = tl.constexpr(1)
_WEIGHT_MAX = tl.constexpr(2)
_GRADIENT_LEVELS = tl.constexpr(3)
_WEIGHT_LEVELS = tl.constexpr(4)
_GRADIENT_STREAM = tl.constexpr(stream_id(Role.GRADIENT, 0))


@triton.jit
def _at(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _in(x, DTYPE: tl.constexpr):
    """float32 rounded to the tensor's dtype, as after every operation of the composed step."""
    if DTYPE == tl.bfloat16:  # on the bits: Triton's interpreter truncates where the hardware rounds to nearest
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        out = tl.where(x == x, even, x)
    else:
        out = x.to(DTYPE).to(tl.float32)
    return out


@triton.jit
def _keep_key(keys, row, x):
    key = tl.max(row_key(x), axis=2)
    tl.atomic_max(keys + row + tl.zeros_like(key).to(tl.int64), key.to(tl.int64))


@triton.jit
def _rounded_gradient(grad, keys, row, mask, quads, stream, step, seed, carry, KIND: tl.constexpr,
                      OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CMIN: tl.constexpr,
                      CMAX: tl.constexpr, CARRY: tl.constexpr, SHARED: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """The gradient on its grid, by its own stream; itself where it has none."""
    if KIND != NONE:
        codes, exponent = rounded(
            grad, keys, row, mask, quads, stream + _GRADIENT_STREAM, step, seed, carry, KIND, OFFSET, LOW, HIGH, CMAX,
            CARRY, True, SHARED, LEVELS,
        )  # fmt: skip
        grad = values(codes, exponent + OFFSET, KIND, CMIN, CMAX)
    return grad


@triton.jit
def _drifted(theta, grad, lr, decay, T_DTYPE: tl.constexpr):
    """The weight after decay and drift."""
    grad = _in(grad, T_DTYPE)
    pull = tl.where(decay != 0, _in(grad + _in(decay * theta, T_DTYPE), T_DTYPE), grad)
    return _in(theta - _in(lr * pull, T_DTYPE), T_DTYPE)


@triton.jit
def _noisy(value, sigma, mask, quads, stream, step, seed, T_DTYPE: tl.constexpr):
    """With Gaussian noise added, where there is any."""
    if sigma > 0:
        noise = _in(sigma * draw_normals(quads, stream, step, seed), T_DTYPE)
        value = _in(value + tl.where(mask, noise, 0.0), T_DTYPE)
    return value


@triton.jit
def _count_outside(count, value, keys, row, mask, KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr,
                   HIGH: tl.constexpr, CMIN: tl.constexpr, CMAX: tl.constexpr, CARRY: tl.constexpr,
                   SHARED: tl.constexpr):  # fmt: skip
    """Add the number of values out of range."""
    own = shared_exponent(value, keys, row, SHARED, KIND, LOW, HIGH)
    out = outside(value, own + OFFSET, KIND, CMIN, CMAX) & mask
    if CARRY:  # elsewhere than at the largest exponent only infinities are out of range
        out = out & ((own >= HIGH) | (tl.abs(value) == float("inf")))
    lost = tl.sum(tl.sum(tl.sum(out.to(tl.int32), axis=2), axis=1), axis=0)
    tl.atomic_add(count, lost.to(tl.int64), mask=lost > 0)


@triton.jit
def _weight_codes(value, sigma, keys, row, mask, quads, stream, step, seed, carry, VC: tl.constexpr,
                  KIND: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CMAX: tl.constexpr,
                  CARRY: tl.constexpr, SHARED: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """Codes of the new weight, not saturated, and their exponents."""
    if VC:
        raised, _ = noise_exponent(value, keys, row, sigma, KIND, OFFSET, LOW, HIGH, CMAX, SHARED)
        codes, exponent = corrected(
            value, raised, sigma, keys, row, mask, quads, stream, step, seed, carry, KIND, OFFSET, HIGH, CMAX, CARRY,
            SHARED, LEVELS, False,
        )  # fmt: skip
    else:
        codes, exponent = rounded(
            value, keys, row, mask, quads, stream, step, seed, carry, KIND, OFFSET, LOW, HIGH, CMAX, CARRY, True,
            SHARED, LEVELS,
        )  # fmt: skip
    return codes, exponent


@triton.jit(do_not_specialize=["seed", "carry", "step", "sigma_bits", "lr", "decay"])
def step_kernel(table, program_map, counts, gradient_keys, weight_keys, seed: tl.int64, carry: tl.int64,
                step: tl.int64, sigma_bits: tl.int64, lr, decay,
                W_KIND: tl.constexpr, W_OFFSET: tl.constexpr, W_LOW: tl.constexpr, W_HIGH: tl.constexpr,
                W_CMIN: tl.constexpr, W_CMAX: tl.constexpr, W_CARRY: tl.constexpr, W_SHARED: tl.constexpr,
                G_KIND: tl.constexpr, G_OFFSET: tl.constexpr, G_LOW: tl.constexpr, G_HIGH: tl.constexpr,
                G_CMIN: tl.constexpr, G_CMAX: tl.constexpr, G_CARRY: tl.constexpr, G_SHARED: tl.constexpr,
                VC: tl.constexpr, FULL: tl.constexpr, PHASE: tl.constexpr,
                DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, T_DTYPE: tl.constexpr,
                SHARED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Gradient rounding, decay, drift, noise, weight rounding and the count of saturated values of one tile."""
    program = tl.program_id(0).to(tl.int64)
    which = tl.load(program_map + program * 2).to(tl.int64)
    local = tl.load(program_map + program * 2 + 1).to(tl.int64)
    record = table + which * COLUMNS
    rows, length = tl.load(record + 3), tl.load(record + 4)
    stream, offset = tl.load(record + 5), tl.load(record + 6)
    first_key, chunks = tl.load(record + 7), tl.load(record + 8)
    row, chunk = place(local, chunks, R, SHARED)
    quads, element, mask = locate(row, chunk, rows, length, offset, R, Q, ALIGNED)
    sigma64 = sigma_bits.to(tl.int64).to(tl.float64, bitcast=True)
    sigma = sigma64.to(tl.float32)

    grad = tl.load(_at(tl.load(record + 1), G_DTYPE, ALIGNED) + element, mask=mask, other=0.0).to(tl.float32)
    if PHASE == _GRADIENT_MAX:
        _keep_key(gradient_keys + first_key, row, grad)
    else:
        grad = _rounded_gradient(
            grad, gradient_keys + first_key, row, mask, quads, stream, step, seed, carry, G_KIND, G_OFFSET, G_LOW,
            G_HIGH, G_CMIN, G_CMAX, G_CARRY, G_SHARED, PHASE == _GRADIENT_LEVELS,
        )  # fmt: skip
        param = _at(tl.load(record), DTYPE, ALIGNED) + element
        if FULL:
            theta_at = _at(tl.load(record + 2), T_DTYPE, ALIGNED) + element
        else:
            theta_at = param
        theta = tl.load(theta_at, mask=mask, other=0.0).to(tl.float32)
        value = _drifted(theta, grad, lr, decay, T_DTYPE)
        if not VC:
            value = _noisy(value, sigma, mask, quads, stream, step, seed, T_DTYPE)
        if PHASE == _WEIGHT_MAX:
            _keep_key(weight_keys + first_key, row, _in(value, DTYPE))
        elif PHASE != _GRADIENT_LEVELS:
            if FULL and PHASE != _WEIGHT_LEVELS:
                tl.store(theta_at, value.to(T_DTYPE), mask=mask)
            value = _in(value, DTYPE)
            if W_KIND != NONE:
                keys = weight_keys + first_key
                if PHASE != _WEIGHT_LEVELS:  # before the rounding, which needs the registers
                    _count_outside(
                        counts + which, value, keys, row, mask, W_KIND, W_OFFSET, W_LOW, W_HIGH, W_CMIN, W_CMAX,
                        W_CARRY, W_SHARED,
                    )  # fmt: skip
                codes, exponent = _weight_codes(
                    value, sigma64, keys, row, mask, quads, stream, step, seed, carry, VC, W_KIND, W_OFFSET, W_LOW,
                    W_HIGH, W_CMAX, W_CARRY, W_SHARED, PHASE == _WEIGHT_LEVELS,
                )  # fmt: skip
                if PHASE != _WEIGHT_LEVELS:
                    value = values(codes, exponent + W_OFFSET, W_KIND, W_CMIN, W_CMAX)
            if PHASE != _WEIGHT_LEVELS:
                tl.store(param, value.to(DTYPE), mask=mask)
