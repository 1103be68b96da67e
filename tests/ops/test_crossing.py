"""What the plan says about the top of blocks, against enumeration in fractions and against draws of every backend."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from helpers import oracle
from helpers.backends import runs
from helpers.stats import assert_moments, assert_proportion, draws_for_means, draws_for_moments

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.formats.exponents import exponent_of, power_of_two
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.ops.crossing import crossing
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.ops.tops import at_top, chance_at_top
from lightning_lpsgld.random import DrawKey

KEY = DrawKey(seed=31, step=4, stream=2)


def enumerated(values, fmt):
    """Probability of the next exponent, and variance of every element about its value: all draws, two coins each."""
    start = oracle.block_exponent(max(map(abs, values)), fmt, torch.float32)
    gap = Fraction(2) ** (start + 2 - fmt.word_length)
    crossed, variance = Fraction(0), [Fraction(0)] * len(values)
    parts = [v / gap - v // gap for v in values]
    for ups in product((0, 1), repeat=len(values)):
        chance = math.prod((part if up else 1 - part) for part, up in zip(parts, ups))
        if not chance:
            continue
        for coins in product(range(4), repeat=len(values)):
            draws = [Fraction(1 - up) for up in ups]
            rounded, exponent = oracle.block_rounded(values, fmt, torch.float32, draws, list(coins))
            share = chance / 4 ** len(values)
            crossed += share * (exponent > start)
            variance = [s + share * ((r - v) / gap) ** 2 for s, r, v in zip(variance, rounded, values)]
    return float(crossed), [float(v) for v in variance]


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "bfp8b4", "bfp3", "bfp2", "bfp8-clamp"])
@pytest.mark.parametrize("share", [0, 3, 64, 127])
def test_probability_and_added_variance_are_those_of_all_draws(fmt, share):
    """The largest ``share`` of 128 of the last gap above the top code, another near it, and two small ones."""
    number = parse_format(fmt)
    top = number.code_max
    values = [top + Fraction(share, 128), -(top - Fraction(1, 4)), Fraction(1, 8), Fraction(-5, 16)]
    x = torch.tensor([[float(v) for v in values]], dtype=torch.float32)
    plan = variance_plan(x, 0.0, number)
    found = crossing(plan, number, torch.float32)
    expected, variance = enumerated([Fraction(v) for v in x.flatten().tolist()], number)
    if number.top == "clamp":
        assert float(found.probability.sum()) == 0.0
        assert found.bias.flatten().tolist() == pytest.approx([-share / 128, 0, 0, 0], abs=1e-12)
        return
    assert not found.bias.any()
    assert float(found.probability.sum()) == pytest.approx(expected, abs=1e-12)
    assert (plan.rounding + found.added).flatten().tolist() == pytest.approx(variance, abs=1e-12)
    assert (float(found.added.sum()) > 0) == (share > 0)


@pytest.mark.parametrize("variance", [0.1, 0.6])
@pytest.mark.parametrize("fmt", ["bfp8", "bfp4"])
def test_the_corrected_quantizer_has_the_variance_that_the_plan_says(fmt, variance, backend):
    """Both regimes, in gaps squared; every backend. The largest is 0.4 of a gap above the top code."""
    number = parse_format(fmt)
    gap = 2.0 / (number.code_max + 1)
    x = torch.tensor([[number.code_max + 0.4, 0.25, -(number.code_max - 0.3), number.code_max * 0.6]]) * gap
    plan = variance_plan(x, variance * gap**2, number)
    found = crossing(plan, number, torch.float32)
    square = float(power_of_two(plan.gap_exponents).max()) ** 2
    expected = ((plan.achieved + found.added) * square).flatten()
    assert 0.2 < float(found.probability.sum()) < 0.9
    options = {"reach": (6.77 * variance**0.5 + 4) * gap, "detect": 0.1}
    options["fourth_moment"] = 6 * expected**2 + gap**4  # a Gaussian's 3, a halving's 6 (2/4)(1/4) + 1/4, and room
    draws = draws_for_moments(expected, **options)
    runs(backend, "quantize_variance_corrected", x, fmt)
    got = quantize_variance_corrected(x.repeat(draws, 1), variance * gap**2, fmt, key=KEY, backend=backend)
    assert_moments(got.double(), x.flatten(), expected, **options)
    raised = exponent_of(got.double().abs().amax(1)) > exponent_of(x.double().abs().max())
    assert_proportion(int(raised.sum()), draws, float(found.probability.sum()), detect=0.03)


def test_naive_rounding_after_noise_is_covered_too(backend):
    """Noise that takes the block over by itself, and noise that the coin takes over."""
    gap, v = 1 / 64, 0.3 / 64**2
    x = torch.tensor([[127.2, 0.25, 60.5]]) * gap
    number = parse_format("bfp8")
    found = crossing(variance_plan(x, v, number), number, torch.float32, update="naive")
    draws = draws_for_means(0.02)
    z = torch.randn(draws, 3, generator=torch.Generator().manual_seed(3))
    got = quantize(x + v**0.5 * z, "bfp8", key=KEY, backend=backend)
    raised = got.abs().amax(1) >= 2.0
    assert_proportion(int(raised.sum()), draws, float(found.probability), detect=0.02)


@pytest.mark.parametrize(("fmt", "top"), [("bfp8-clamp", 127.0), ("mxint8-clamp", 127.0), ("fixed8.6", 127.0)])
@pytest.mark.parametrize("variance", [0.0, 0.1, 0.6])
def test_the_bias_of_a_clamp_is_that_of_the_exact_law(fmt, top, variance):
    number = parse_format(fmt)
    for above in (Fraction(1, 4), Fraction(3, 4)):
        scaled = Fraction(127) + above
        x = torch.tensor([[float(scaled)]]) / 64
        plan = variance_plan(x, variance / 64**2, number)
        assert float(plan.scaled) == float(scaled)
        law = oracle.saturated_law(oracle.vc_law(scaled, Fraction(variance)), -127, 127)
        mean = sum(float(chance) * code for code, chance in law.items())
        assert float(crossing(plan, number, torch.float32).bias) == pytest.approx(mean - float(scaled), abs=1e-9)


def test_of_scaled_floats_only_what_is_next_to_zero_gets_coarser():
    number = parse_format("mxfp4e2m1-fit")  # 6 is the largest, 0.5 the gap next to zero
    x = torch.tensor([[5.9, 0.2, 0.3, 2.4]])
    plan = variance_plan(x, 0.2, number)
    found = crossing(plan, number, torch.float32)
    assert float(found.probability.sum()) == pytest.approx(0.95 * (0.2 / 4 - 0.95 * 0.05) / 2, rel=1e-4)
    assert found.added[0, 1] > 0
    assert found.added[0, 0] == found.added[0, 3] == 0


def test_blocks_at_the_last_exponent_are_clamped_and_others_are_not():
    number = parse_format("bfp8e3")  # exponents from -4 to 3
    x = torch.tensor([15.97, 7.99])  # one block each
    found = crossing(variance_plan(x, 0.0, number), number, torch.float32)
    assert found.probability.tolist() == [0.0, pytest.approx(0.84, abs=0.01)]
    assert float(found.bias[0]) == pytest.approx(127 - 15.97 * 8, abs=1e-5)
    assert float(found.bias[1]) == 0.0


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-clamp", "mxfp8e4m3", "bfp4"])
def test_the_share_at_the_top_by_chance(fmt):
    """Of largest magnitudes that are spread evenly in the logarithm, two octaves."""
    spread = torch.rand(draws_for_means(0.01), 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (2.0 ** (2 * spread)).float()
    standing = at_top(quantize(x, fmt, key=KEY), parse_format(fmt))
    assert_proportion(int(standing.sum()), standing.numel(), chance_at_top(parse_format(fmt)), detect=0.01)


def test_nothing_is_at_a_top_without_blocks():
    assert at_top(torch.ones(3), parse_format("fixed8.6")).numel() == 0
    assert chance_at_top(parse_format("e4m3")) == 0.0
