"""Exponents from bits and powers of two from exponents: exact, never through ``log2``, ``pow`` or ``exp2``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NOISE_REACH", "exponent_of", "finite_magnitude", "power_of_two"]

#: No normal draw exceeds this (random.normals), so a block with this much headroom never clips noise.
NOISE_REACH = 6.77


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0 ** exponent`` as float64 from the bits; int64 exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exponent_of(x: Tensor) -> Tensor:
    """``floor(log2(x))`` of positive finite float64 values as int64, exact; very small (-2000) for zero."""
    _, exponent = torch.frexp(x)
    return torch.where(x > 0, exponent.long() - 1, torch.full_like(exponent.long(), -2000))


def finite_magnitude(x: Tensor) -> Tensor:
    """Magnitudes of ``x``; 0 for NaN and infinities."""
    return torch.where(x.isfinite(), x, torch.zeros_like(x)).abs()
