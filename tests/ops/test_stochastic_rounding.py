"""Stochastic rounding as a law: unbiased, variance p(1-p) gap^2, independent draws, the grid is fixed.

Invariant: E[Q(x)] = x for every x inside the range, on every backend. Expected values come from ``helpers.oracle``.

Blind spot of the means: correlated draws leave every mean right; ``test_errors_of_*_are_uncorrelated`` sees those.
Companions without statistics are in ``test_reference_exact.py``: given the draws, every result is exact.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from helpers import oracle
from helpers.backends import runs
from helpers.stats import assert_means_equal, assert_moments, assert_uncorrelated, draws_for_means, draws_for_moments

from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FloatingPoint, parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey

ELEMENTWISE = ["fixed8.8", "fixed8.6", "fixed8.3", "fixed8.6s", "fixed4.2", "e4m3", "e5m2", "e3m4", "e2m1"]
BLOCKS = ["bfp8", "bfp4", "bfp8b64", "bfp8-tensor"]
KEY = DrawKey(seed=2026, step=1, stream=9)
CELLS = 48
DETECT = 0.02  # of a gap


def inside(fmt, generator):
    """Inputs inside the range: on the grid, at midpoints, beside grid points, at both ends, both signs, random."""
    number = parse_format(fmt)
    block = isinstance(number, BlockFloatingPoint)
    grid = oracle.block_grid(0, number) if block else oracle.grid_of(number)
    # Floats: the finest and the coarsest binades and the steps between binades; the rest only evenly spaced.
    last, middle = len(grid) - 2, len(grid) // 2
    at = [*torch.linspace(0, last, 12).long().tolist(), 0, last, middle, middle - 1]
    points = [float(grid[i]) for i in at] + [float((grid[i] + grid[i + 1]) / 2) for i in at]
    x = torch.tensor(points + [p + 1e-3 * float(grid[i + 1] - grid[i]) for p, i in zip(points, at)])
    spread = torch.rand(CELLS, generator=generator, dtype=torch.float64)
    x = torch.cat([x[::2], (float(grid[0]) + spread * float(grid[-1] - grid[0])).float()])[:CELLS]
    if block:
        x[0] = 1.25  # the anchor: in every block of every layout the exponent is 0
    return x, grid


def rounding_law(x, grid):
    """Gap, mean, variance and fourth central moment of every cell, exactly rounded to float64."""
    rows = []
    for value in (Fraction(v) for v in x.double().tolist()):
        lower, upper, p = oracle.split(value, grid)
        gap = upper - lower
        rows.append(
            [
                float(q)
                for q in (gap, lower + p * gap, p * (1 - p) * gap**2, p * (1 - p) * (1 - 3 * p * (1 - p)) * gap**4)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64).T


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(8)


@pytest.mark.parametrize("fmt", ELEMENTWISE + BLOCKS)
def test_unbiased_inside_the_range(fmt, backend, generator):
    """A bias of 2 % of a gap in any cell is seen; a swapped direction is 50 times larger."""
    x, grid = inside(fmt, generator)
    gap, mean, _, _ = rounding_law(x, grid)
    draws = draws_for_means(DETECT, CELLS)
    rounded = quantize(x.expand(draws, CELLS), fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert torch.equal(mean, x.double()), "the oracle's inputs are inside the range"
    assert_means_equal(rounded, mean, width=gap, detect=DETECT)


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e4m3"])
def test_variance_is_that_of_a_bernoulli_draw(fmt, backend, generator):
    x, grid = inside(fmt, generator)
    gap, mean, variance, fourth = rounding_law(x, grid)
    wide = (variance > 0.1 * gap**2) | (variance == 0)  # rarer outcomes: see the test of the draws' distribution
    x, gap, mean, variance, fourth = x[wide], gap[wide], mean[wide], variance[wide], fourth[wide]
    if fmt == "bfp8":
        x[0], mean[0], variance[0], fourth[0] = 1.25, 1.25, 0.0, 0.0
    options = {"reach": gap, "detect": 0.1, "fourth_moment": fourth}
    draws = draws_for_moments(variance, **options)
    rounded = quantize(x.expand(draws, len(x)), fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert_moments(rounded, mean, variance, **options)


def test_one_exponent_per_element_of_a_vector(backend, generator):
    """1-D tensors in block floating point: 7-bit significands at every magnitude, still unbiased."""
    fmt = BlockFloatingPoint(8)
    x = torch.tensor([3.7e-39, 1e-30, -2.3e-3, 0.0999, 1.003, -77.77, 3.1e30])
    grids = [oracle.block_grid(oracle.block_exponent(abs(Fraction(float(v))), fmt, x.dtype), fmt) for v in x]
    gap, mean, _, _ = torch.cat([rounding_law(x[i : i + 1], grids[i]) for i in range(len(x))], dim=1)
    draws = draws_for_means(DETECT, len(x))
    rounded = quantize(x.repeat(draws), fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert_means_equal(rounded.view(draws, -1), mean, width=gap, detect=DETECT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_unbiased_in_every_dtype(dtype, backend, generator):
    fmt = "fixed4.2"
    x, grid = inside(fmt, generator)
    x = x.to(dtype)
    gap, mean, _, _ = rounding_law(x, grid)
    draws = draws_for_means(DETECT, CELLS)
    rounded = quantize(x.expand(draws, CELLS), fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert_means_equal(rounded, mean, width=gap, detect=DETECT)


@pytest.mark.parametrize(
    "fmt",
    [
        *(FixedPoint(8, f) for f in range(9)),
        *(BlockFloatingPoint(8, dim) for dim in (0, None)),
        *(FloatingPoint(e, 7 - e) for e in (3, 4, 5)),
    ],
    ids=str,
)
def test_grid_points_are_fixed(fmt, backend):
    """All codes, 10,000 draws each: a value on the grid never moves (rounding by floor(x + u) moves some)."""
    grid = oracle.block_grid(0, fmt) if isinstance(fmt, BlockFloatingPoint) else oracle.grid_of(fmt)
    x = torch.tensor([float(v) for v in grid]).expand(10_000, len(grid))
    rounded = quantize(x, fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert torch.equal(rounded, x)


@pytest.mark.parametrize("fmt", ["fixed8.6", "fixed8.6s", "e4m3", "e5m2"])
def test_saturates_outside_the_range(fmt, backend):
    """Beyond the ends every draw gives the end, just inside every draw stays on the grid."""
    number = parse_format(fmt)
    top = torch.tensor([number.max, number.min])
    x = torch.cat([top * (1 + 2**-20), top * 1.01, top * 2, top * 1e30 / number.max]).expand(2_000, 8)
    rounded = quantize(x, fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    assert torch.equal(rounded, top.repeat(4).expand(2_000, 8))


def test_the_largest_of_a_block_that_clamps_saturates(backend):
    """Symmetric codes: where a block clamps, the last gap below a power of two has no upper neighbour."""
    x = torch.tensor([1.99, -1.999]).expand(2_000, 2)
    rounded = quantize(x, "bfp8-clamp", key=KEY, backend=runs(backend, "quantize", x, "bfp8-clamp"))
    assert torch.equal(rounded, torch.tensor([1.984375, -1.984375]).expand(2_000, 2))


def standardised_errors(key, backend, count=2**20):
    """Rounding up or down at a midpoint as -1 and +1."""
    return quantize(torch.full((count,), 0.5), "fixed8.0", key=key, backend=backend).double() * 2 - 1


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 512])
def test_errors_of_elements_are_uncorrelated(lag, backend):
    e = standardised_errors(KEY, backend)
    pairs = len(e) // (2 * lag)  # disjoint pairs, so that products are independent
    e = e[: pairs * 2 * lag].view(pairs, 2, lag)
    assert_uncorrelated(e[:, 0].flatten(), e[:, 1].flatten(), reach=1.0, detect=0.02)


@pytest.mark.parametrize(
    "other",
    [
        KEY.at(step=2),
        KEY.at(step=0),
        KEY.at(stream=8),
        KEY.at(stream=10),
        DrawKey(2027, 1, 9),
        DrawKey(2026 + 2**32, 1, 9),
    ],
    ids=str,
)
def test_errors_of_different_keys_are_uncorrelated(other, backend):
    assert_uncorrelated(standardised_errors(KEY, backend), standardised_errors(other, backend), reach=1.0, detect=0.02)


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e4m3"])
def test_the_same_key_gives_the_same_result(fmt, backend, generator):
    x = torch.randn(50, 40, generator=generator)
    first = quantize(x, fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    state = torch.get_rng_state()
    torch.rand(7)
    assert torch.equal(quantize(x, fmt, key=KEY, backend=backend), first)
    assert not torch.equal(quantize(x, fmt, key=KEY.at(step=3), backend=backend), first)
    torch.set_rng_state(state)


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e4m3"])
def test_a_shard_draws_at_its_global_indices(fmt, backend, generator):
    """Rows cut out and rounded with an offset are the rows of the whole."""
    x = torch.randn(30, 7, generator=generator)
    whole = quantize(x, fmt, key=KEY, backend=runs(backend, "quantize", x, fmt))
    for first, last in ((0, 3), (3, 4), (11, 30)):
        part = quantize(x[first:last], fmt, key=KEY.at(offset=first * 7), backend=backend)
        assert torch.equal(part, whole[first:last])
