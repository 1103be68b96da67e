"""The variance-corrected quantizer Q^vc: its mean, its variance and, for fixed and block formats, its whole law.

Invariant: E = mu and Var = max(v, p(1-p) gap^2) on a lattice of (frac(mu/gap), v/gap^2), in both regimes and up to the
range's ends, on every backend. Expected laws come from ``helpers.oracle``: exact fractions for v <= gap^2/4, Gaussian
integrals of a quadratic B-spline above.

Blind spot: correlation between elements (``test_neighbours_are_uncorrelated`` looks at a few lags).
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from helpers import oracle
from helpers.backends import runs
from helpers.stats import assert_frequencies, assert_moments, assert_uncorrelated, draws_for_moments

from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FloatingPoint, parse_format
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey

KEY = DrawKey(seed=1906, step=7, stream=21)
PARTS = (0.0, 2**-10, 0.1, 0.4, 0.5, 0.85)
#: In units of gap^2: unreachable, small, just below, at and above the switch at 1/4, large.
VARIANCES = (0.0, 0.01, 0.1, 0.2, 0.245, 0.25, 0.255, 0.5, 4.0, 30.0)
DRAWS = 100_000
MOMENTS_FROM = 0.2  # rarer outcomes than those of v = 0.2 gap^2 are left to the test of the law
DETECT_MOMENT, DETECT_LAW = 0.12, 0.06


def lattice(gap, base):
    """Means (float32, alternating in sign) and variances (float64); ``base`` is the code below the mean."""
    cells = [(base + part, v) for part in PARTS for v in VARIANCES]
    mean = torch.tensor([(-1) ** i * m * gap for i, (m, _) in enumerate(cells)])
    return mean, torch.tensor([v * gap * gap for _, v in cells], dtype=torch.float64)


def in_gaps(mean, variance, gap):
    """Exact means and variances in units of the gap."""
    gap = [Fraction(float(g)) for g in torch.as_tensor(gap).double().expand(len(mean))]
    scaled = [Fraction(float(m)) / g for m, g in zip(mean.double(), gap)]
    return scaled, [Fraction(float(v)) / g**2 for v, g in zip(variance, gap)]


def assert_law(codes, scaled, target, low=-math.inf, high=math.inf):
    """Codes against the exact law with saturation at both ends."""
    laws = [oracle.vc_law(s, t) for s, t in zip(scaled, target)]
    if math.isfinite(high):
        laws = [oracle.saturated_law(law, low, high) for law in laws]
    assert_laws(codes, laws)


def assert_laws(codes, laws):
    """Chi-square of integer codes, shape (draws, cells), against one law per cell."""
    assert torch.equal(codes, codes.round()), "values off the grid"
    first = torch.tensor([min(law) for law in laws])
    width = max(max(law) - min(law) for law in laws) + 1
    shifted = codes.long() - first
    # A value outside the listed law is put in a cell of its own, which has probability 0.
    shifted = torch.where((shifted >= 0) & (shifted < width), shifted, torch.full_like(shifted, width))
    cells = shifted + (width + 1) * torch.arange(len(laws))
    counts = cells.flatten().bincount(minlength=(width + 1) * len(laws)).view(len(laws), -1)
    law = torch.tensor([[float(law.get(min(law) + k, 0)) for k in range(width)] + [0.0] for law in laws])
    law = law.double() / law.double().sum(1, keepdim=True)
    assert_frequencies(counts, law, detect=DETECT_LAW)


def assert_lattice_moments(codes, scaled, target, mask):
    """Mean and variance of the cells in ``mask`` against their closed forms."""
    moments = torch.tensor([oracle.vc_moments(s, t) for s, t in zip(scaled, target)], dtype=torch.float64)[mask]
    reach = 6.8 * torch.tensor([math.sqrt(t) for t in target], dtype=torch.float64)[mask] + 2
    mean, variance, fourth = moments.T
    assert_moments(codes[:, mask], mean, variance, reach=reach, detect=DETECT_MOMENT, fourth_moment=fourth)


def common(scaled, target):
    """Cells whose variance is 0 or large enough for a test of moments."""
    achieved = torch.tensor([oracle.vc_moments(s, t)[1] for s, t in zip(scaled, target)])
    return (achieved == 0) | (achieved >= MOMENTS_FROM)


def sample(mean, variance, fmt, backend, draws=DRAWS):
    runs(backend, "quantize_variance_corrected", mean, fmt)
    got = quantize_variance_corrected(mean.expand(draws, -1), variance, fmt, key=KEY, backend=backend)
    assert got.isfinite().all()
    return got.double()


@pytest.mark.parametrize("fmt", ["fixed8.3", "fixed8.8"])
def test_fixed_point(fmt, backend):
    gap = parse_format(fmt).gap
    mean, variance = lattice(gap, base=23)
    if fmt == "fixed8.8":
        mean, variance = mean[1::7], variance[1::7]
    codes = sample(mean, variance, fmt, backend) / gap
    scaled, target = in_gaps(mean, variance, gap)
    assert_law(codes, scaled, target)
    assert_lattice_moments(codes, scaled, target, common(scaled, target))


def test_block_floating_point_in_rows(backend):
    """One exponent a row, both regimes side by side in it; the noise stays inside the block's range."""
    gap = 2.0**-6
    mean, variance = lattice(gap, base=23)
    mean[0], variance[0] = 1.25, 0.0  # the anchor: E = 0
    codes = sample(mean, variance, "bfp8", backend) / gap
    scaled, target = in_gaps(mean, variance, gap)
    assert_law(codes, scaled, target)
    assert_lattice_moments(codes, scaled, target, common(scaled, target))


@pytest.mark.parametrize("exponent", [-60, 20])
def test_block_floating_point_of_a_vector(exponent, backend):
    """One exponent per element: means between 64 and 96 gaps of any size, and noise that does not reach 127 gaps."""
    gap = 2.0 ** (exponent - 6)
    mean, variance = lattice(gap, base=76)
    runs(backend, "quantize_variance_corrected", mean, "bfp8")
    keep = torch.arange(0, len(mean), 3)
    mean, variance = mean[keep], variance[keep]
    got = quantize_variance_corrected(mean.repeat(DRAWS), variance.repeat(DRAWS), "bfp8", key=KEY, backend=backend)
    codes = got.view(DRAWS, -1).double() / gap
    scaled, target = in_gaps(mean, variance, gap)
    assert_law(codes, scaled, target)
    assert_lattice_moments(codes, scaled, target, common(scaled, target))


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_small_variance_in_block_floating_point_is_delivered(share, backend):
    """v = 0.1 and 0.2 gap^2, weights on the grid: the published code delivers no variance here."""
    gap = 2.0**-6
    mean = torch.tensor([80.0, -64.0, 33.0, 1.0, 0.0, -7.0]) * gap
    variance = torch.full((6,), share * gap**2, dtype=torch.float64)
    options = {"reach": gap, "detect": 0.1, "fourth_moment": share * gap**4}
    got = sample(mean, variance, "bfp8", backend, draws_for_moments(variance, **options))
    assert_moments(got, mean.double(), variance, **options)
    assert set((got / gap - mean / gap).unique().tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("share", [1.0, 1.7, 6.0, 90.0])
def test_noise_that_crosses_the_exponent_of_its_block(share, backend):
    """The largest mean is beside the end of its block's range: the exponent is raised once, both moments stay exact."""
    gap = 2.0**-6
    mean = torch.tensor([1.98, -1.97, 1.9, 0.3, 0.0, -0.011])
    v = share * gap**2
    variance = torch.full((6,), v, dtype=torch.float64)
    sigma = math.sqrt(v)
    options = {"reach": 6.8 * sigma + 4 * gap * max(1.0, sigma / gap), "detect": 0.1, "fourth_moment": 12 * v**2}
    draws = draws_for_moments(variance, **options)
    assert_moments(sample(mean, variance, "bfp8", backend, draws), mean.double(), variance, **options)


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "bfp8b4"])
def test_zero_blocks_get_their_noise(fmt, backend):
    """All means 0: the exponent comes from the noise alone."""
    v = 1e-5
    options = {"reach": 8 * math.sqrt(v), "detect": 0.1, "fourth_moment": 4 * v**2}
    draws = draws_for_moments(torch.full((4,), v), **options)
    mean = torch.zeros(4)
    assert_moments(sample(mean, torch.full((4,), v, dtype=torch.float64), fmt, backend, draws), 0.0, v, **options)


@pytest.mark.parametrize("fmt", ["fixed8.3", "fixed8.3s"])
def test_range_ends_of_fixed_point(fmt, backend):
    """Beside and beyond the ends the law is the exact one with its tail moved onto the end."""
    number = parse_format(fmt)
    offsets = torch.tensor([0.0, 0.3, 0.5, 1.5, -0.4])
    codes = torch.cat([number.code_max - offsets, number.code_min + offsets])
    shares = torch.tensor([0.0, 0.2, 2.0], dtype=torch.float64)
    mean = (codes * number.gap).repeat_interleave(len(shares))
    variance = (shares * number.gap**2).repeat(len(codes))
    got = sample(mean, variance, fmt, backend) / number.gap
    assert_law(got, *in_gaps(mean, variance, number.gap), number.code_min, number.code_max)


def float_laws(scaled, target, mantissa_bits):
    """Exact laws of a float, whose mean and variance are checked in rational arithmetic before they are used."""
    laws = [oracle.float_vc_law(s, t, mantissa_bits) for s, t in zip(scaled, target)]
    for law, s, t in zip(laws, scaled, target):
        part = s - math.floor(s)
        assert sum(law.values()) == 1
        assert sum(code * chance for code, chance in law.items()) == s
        assert sum((code - s) ** 2 * chance for code, chance in law.items()) == max(t, part * (1 - part))
        assert all(code % 2 == 0 for code in law if abs(code) > 2 ** (mantissa_bits + 1))
    return laws


@pytest.mark.parametrize("fmt", ["e4m3", "e3m4"])
def test_floating_point_away_from_binade_edges(fmt, backend):
    """Both moments exact; means in the middle of a binade, noise up to a gap: no Gaussian below that."""
    number = parse_format(fmt)
    ulps = 2**number.mantissa_bits
    gap = 2.0**-number.mantissa_bits
    cells = [(1.5 * ulps + part, v) for part in (0.0, 0.1, 0.4, 0.5) for v in (0.0, 0.1, 0.2, 0.245, 0.26, 0.9)]
    mean = torch.tensor([m * gap for m, _ in cells])
    variance = torch.tensor([v * gap * gap for _, v in cells], dtype=torch.float64)
    codes = sample(mean, variance, fmt, backend) / gap
    assert_laws(codes, float_laws(*in_gaps(mean, variance, gap), number.mantissa_bits))


def edge_means(gap):
    """Means on, just below and just above powers of two, of both signs, as float32."""
    below = torch.tensor([0.0, 0.05, 0.5, 1.0, 1.5])
    return torch.cat([2 - below * gap, torch.tensor([1.0, 1 + 0.3 * gap, -(2 - 0.3 * gap)])])


@pytest.mark.parametrize("share", [0.24, 0.8])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_floating_point_at_binade_edges_with_little_noise(fmt, share, backend):
    """v < gap^2: beyond a power of two only every second code exists; both moments stay exact all the same."""
    number = parse_format(fmt)
    gap = 2.0**-number.mantissa_bits  # of the binade [1, 2)
    mean = edge_means(gap)
    variance = torch.full((len(mean),), share * gap**2, dtype=torch.float64)
    gap = torch.where(mean.abs() >= 2, 2 * gap, gap).double()
    codes = sample(mean, variance, fmt, backend) / gap
    assert_laws(codes, float_laws(*in_gaps(mean, variance, gap), number.mantissa_bits))


@pytest.mark.parametrize("share", [1.0, 5.0])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_floating_point_at_binade_edges_with_much_noise(fmt, share, backend):
    """v >= gap^2: the gap of the next binade is taken from the start, and both moments are exact."""
    gap = 2.0 ** -parse_format(fmt).mantissa_bits
    mean, v = edge_means(gap), share * gap**2
    variance = torch.full((len(mean),), v, dtype=torch.float64)
    options = {"reach": 6.8 * math.sqrt(v) + 4 * gap * math.sqrt(share), "detect": 0.12, "fourth_moment": 6 * v**2}
    draws = draws_for_moments(variance, **options)
    assert_moments(sample(mean, variance, fmt, backend, draws), mean.double(), variance, **options)


@pytest.mark.parametrize(
    "fmt", [FixedPoint(8, 6), BlockFloatingPoint(8), BlockFloatingPoint(8, None), FloatingPoint(4, 3)], ids=str
)
def test_no_variance_and_on_the_grid_never_moves(fmt, backend):
    grid = oracle.block_grid(0, fmt) if isinstance(fmt, BlockFloatingPoint) else oracle.grid_of(fmt)
    x = torch.tensor([float(v) for v in grid])
    assert torch.equal(sample(x, 0.0, fmt, backend, draws=2_000), x.double().expand(2_000, -1))


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8"])
def test_no_variance_is_stochastic_rounding_in_law(fmt, backend):
    """v = 0: two outcomes with the probabilities of stochastic rounding."""
    gap = 2.0**-6
    mean = torch.tensor([80.0, 10.25, -10.25, 3.7, -0.01]) * gap
    codes = sample(mean, 0.0, fmt, backend) / gap
    assert_law(codes, *in_gaps(mean, torch.zeros(5), gap))


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "bfp8-tensor", "mxint8", "e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("v", [0.0, 1e-12, 1e-5, 1e-3, 4.0, 1e30])
def test_results_are_on_the_grid_and_specials_are_kept(fmt, dtype, v, backend):
    """Finite stays finite, NaN stays NaN, infinities saturate, and rounding the result again changes nothing."""
    x = torch.tensor([[1.0, math.nan, -math.inf, 0.3], [0.0, 0.0, 0.0, 0.0], [1e-7, -6e-8, 3e4, math.inf]], dtype=dtype)
    runs(backend, "quantize_variance_corrected", x, fmt)
    got = quantize_variance_corrected(x, v, fmt, key=KEY, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), x.isnan())
    assert not got.isinf().any()
    assert (got[0, 2] < 0) & (got[2, 3] > 0)
    finite = got.nan_to_num()
    assert torch.equal(quantize(finite, fmt, rounding="nearest", backend="reference"), finite)


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e4m3"])
def test_variance_per_element_broadcasts(fmt, backend):
    """A tensor of variances acts element by element: a constant one is the float, shapes broadcast."""
    mean = torch.linspace(-0.9, 0.9, 24).view(4, 6)
    runs(backend, "quantize_variance_corrected", mean, fmt)
    scalar = quantize_variance_corrected(mean, 3e-4, fmt, key=KEY, backend=backend)
    for shape in ((), (1, 1), (6,), (4, 1), (4, 6)):
        variance = torch.full(shape, 3e-4, dtype=torch.float64)
        assert torch.equal(quantize_variance_corrected(mean, variance, fmt, key=KEY, backend=backend), scalar)


@pytest.mark.parametrize("fmt", ["fixed8.6", "bfp8", "e4m3"])
def test_layout_shape_and_shards_do_not_matter(fmt, backend):
    mean = torch.linspace(-0.9, 0.9, 120).view(2, 3, 4, 5)
    runs(backend, "quantize_variance_corrected", mean, fmt)
    for v in (1e-5, 1e-3):
        whole = quantize_variance_corrected(mean, v, fmt, key=KEY, backend=backend)
        last = mean.contiguous(memory_format=torch.channels_last)
        assert torch.equal(quantize_variance_corrected(last, v, fmt, key=KEY, backend=backend), whole)
        shard = quantize_variance_corrected(mean[1:], v, fmt, key=KEY.at(offset=60), backend=backend)
        assert torch.equal(shard, whole[1:])
        assert quantize_variance_corrected(mean[:0], v, fmt, key=KEY, backend=backend).shape == (0, 3, 4, 5)


@pytest.mark.parametrize("v", [0.2, 3.0])
def test_neighbours_are_uncorrelated(v, backend):
    """Noise of elements a few places apart, mean 0, standardised by its exact variance."""
    n = 2**19
    got = quantize_variance_corrected(torch.zeros(n), v, "fixed8.0", key=KEY, backend=backend).double() / math.sqrt(v)
    for lag in (1, 2, 4, 8):
        pairs = got.view(n // (2 * lag), 2, lag)
        assert_uncorrelated(pairs[:, 0].flatten(), pairs[:, 1].flatten(), reach=8.0, detect=0.03)
