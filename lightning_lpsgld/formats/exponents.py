"""Exponents from bits and powers of two from exponents: exact, never through ``log2``, ``pow`` or ``exp2``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BOUNDLESS", "NOISE_REACH", "exponent_of", "finite_magnitude", "power_of_two", "with_headroom"]

#: No normal draw exceeds this (random.normals), so a block with this much headroom never clips noise.
NOISE_REACH = 6.77
#: Beyond every finite value: an infinity is all that is outside of a range that ends here.
BOUNDLESS = torch.finfo(torch.float64).max


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


def with_headroom(exponents: Tensor, reach: Tensor, sigma: Tensor, gap_offset: int, code_top: int) -> Tensor:
    """Raise exponents so that noise does not clip, as far as the coarser gap still leaves every variance reachable.

    Args:
        exponents: Those of the means alone.
        reach: Bound of |mean| + noise, float64.
        sigma: Smallest standard deviation of the noise that shares the exponent, float64.
        gap_offset: log2 of the gap less the exponent.
        code_top: Largest code.

    Returns:
        Exponents at which the gap is at most twice ``sigma`` where they were raised.
    """
    wanted = exponent_of(reach)
    wanted = wanted + (reach > code_top * power_of_two((wanted + gap_offset).clamp(min=-1022)))
    free = exponent_of(2.0 * sigma) - gap_offset  # gap <= 2 sigma: every p(1-p) gap**2 <= variance
    return torch.maximum(exponents, torch.minimum(wanted, free))
