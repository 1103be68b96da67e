"""The top of a block: no element is rounded down for being the largest, in any path, position or sign.

What the published rule does there stays available under the names that end in "-clamp", and is shown beside it.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from helpers import oracle
from helpers.backends import runs
from helpers.stats import assert_means_equal, assert_proportion, draws_for_means

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.carry import carry_key
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.random import DrawKey, uniforms, words
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

KEY = DrawKey(seed=29, step=3, stream=2)


def mean_of_rounding(values, fmt):
    """Exact mean of a stochastically rounded block: sum over who rounds up and over the first coins."""
    gap = Fraction(2) ** (oracle.block_exponent(max(map(abs, values)), fmt, torch.float32) + 2 - fmt.word_length)
    mean = [Fraction(0)] * len(values)
    for ups, coins in product(product((0, 1), repeat=len(values)), product((0, 1), repeat=len(values))):
        parts = [v / gap - v // gap for v in values]
        chance = Fraction(1, 2 ** len(values))
        for part, up in zip(parts, ups):
            chance *= part if up else 1 - part
        draws = [Fraction(0) if up else Fraction(1) for up in ups]
        if chance:
            rounded = oracle.block_rounded(values, fmt, torch.float32, draws, list(coins))[0]
            mean = [m + chance * r for m, r in zip(mean, rounded)]
    return mean


@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_exact_for_the_largest_at_all_128_positions(sign):
    """Of the oracle's law, in fractions; that the ops follow it draw by draw is the test below."""
    for text, exact in (("bfp8", True), ("bfp8-clamp", False)):
        fmt = parse_format(text)
        for position in range(128):
            top = sign * (127 + Fraction(2 * position + 1, 256)) / 64
            values = [top, Fraction(-37, 128) + Fraction(position, 997)]
            mean = mean_of_rounding(values, fmt)
            assert mean[1] == values[1]
            assert (mean[0] == top) == exact


@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "bfp8b4", "bfp4", "bfp2", "bfp8-clamp"])
def test_every_op_follows_the_oracle_at_the_top(fmt, backend):
    """128 positions of the largest and both signs, draw by draw; encode, decode and a second rounding agree."""
    number = parse_format(fmt)
    code, rows = number.code_max, torch.arange(256)
    top = (code + (rows % 128 + 0.5) / 128) / (code + 1) * torch.where(rows < 128, 1.0, -1.0)
    x = torch.stack([top, 0.3 * top, torch.linspace(-0.7, 0.7, 256), torch.full((256,), 0.0371)], dim=1)
    if fmt == "bfp8-tensor":
        x = x[100:104].contiguous()
    runs(backend, "encode", x, fmt)
    got = quantize(x, fmt, key=KEY, backend=backend)
    draws, coins = uniforms(x.shape, KEY), words(x.shape, carry_key(KEY))
    blocks = [range(x.numel())] if fmt == "bfp8-tensor" else [range(4 * i, 4 * i + 4) for i in range(len(x))]
    flat, raised = [Fraction(v) for v in x.flatten().double().tolist()], 0
    for block in blocks:
        values, first = [flat[i] for i in block], [Fraction(float(draws.flatten()[i])) for i in block]
        bits = [int(coins.flatten()[i]) for i in block]
        expected, exponent = oracle.block_rounded(values, number, torch.float32, first, bits)
        assert got.flatten()[list(block)].tolist() == [float(v) for v in expected]
        raised += exponent != oracle.block_exponent(max(map(abs, values)), number, torch.float32)
    assert (raised > 0) == (number.top == "carry")
    encoded = encode(x, fmt, rounding="stochastic", key=KEY, backend=backend)
    assert torch.equal(decode(encoded, backend=backend), got)
    for rounding in ("nearest", "stochastic"):
        again = quantize(got, fmt, rounding=rounding, key=KEY.at(step=9), backend=backend)
        assert torch.equal(again, got)


@pytest.mark.parametrize("variance", [0.0, 1e-6, 4e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "bfp8b4", "mxint8", "mxfp8e4m3-fit", "mxfp6e2m3-fit"])
def test_the_corrected_quantizer_has_the_exact_mean_at_the_top(fmt, variance, backend):
    """Largest elements within two gaps of a power of two, or of what a float's run ends with; and the others."""
    last = parse_format(fmt).element.max if fmt.startswith("mxfp") else None
    top = 127.4 / 64 if last is None else 0.999 * last / 2.0 ** (1 if last < 8 else 8)
    x = torch.tensor([top, -0.61, 0.003, 1.1])
    detect = 0.2 if fmt == "bfp8-tensor" else 0.03
    draws = draws_for_means(detect, 4)
    runs(backend, "quantize_variance_corrected", x, fmt)
    if fmt == "bfp8-tensor":  # a tensor is one draw
        each = [
            quantize_variance_corrected(x, variance, fmt, key=KEY.at(step=i), backend=backend) for i in range(draws)
        ]
        got = torch.stack(each)
    else:
        got = quantize_variance_corrected(x.repeat(draws, 1), variance, fmt, key=KEY, backend=backend)
    width = 14 * variance**0.5 + (4 * 2 / 64 if last is None else last / 2.0 ** (1 if last < 8 else 8))
    assert_means_equal(got.double(), x.double(), width=width, detect=detect)


def test_the_published_rule_holds_the_largest_down():
    x = torch.full((20_000,), 0.9961)
    assert (quantize(x, "bfp8-clamp", key=KEY) == 0.9921875).all()
    assert_proportion(int((quantize(x, "bfp8", key=KEY) == 1.0).sum()), len(x), 0.9961 * 128 - 127, detect=0.05)


# ------------------------------------------------------------------------------------------------------- samplers


def gaussian_chains(centre, fmt, sampler, *, shape, steps=400, temperature=1.0, **options):
    """End points of chains of N(centre, (centre/20)^2), started near the centre."""
    theta = torch.nn.Parameter(torch.full(shape, 0.99 * centre))
    precision = 400.0 / centre**2
    opt = sampler([theta], num_data=1, temperature=temperature, weight_format=fmt, seed=5, **options)
    for _ in range(steps):
        theta.grad = precision * (theta.detach() - centre)
        opt.step()
    return theta.detach()


CASES = [
    (SGLD, {"lr": 0.005}),
    (SGLD, {"lr": 0.005, "variance_corrected": False}),
    (SGLD, {"lr": 0.005, "accumulator": "full"}),
    (PreconditionedSGLD, {"lr": 0.005}),
]


@pytest.mark.parametrize(
    ("sampler", "options", "fmt", "centre"),
    [(*CASES[0], "bfp8", centre) for centre in (1.0, -2.0, 0.25, 0.5)]
    + [(*CASES[0], "mxint8", -2.0)]
    + [(*case, "bfp8", centre) for case, centre in zip(CASES[1:], (1.0, 0.5, -2.0))],
)
def test_chains_pass_a_power_of_two(fmt, sampler, options, centre):
    """The mean of N(b, (b/20)^2) at a boundary b; 12,000 blocks, each a chain."""
    settings = {**options, "lr": options["lr"] * centre**2 / 400}
    if sampler is PreconditionedSGLD:
        settings["lr"] = 2.5e-4 * abs(centre)
    shape = (12_000,) if fmt == "bfp8" else (12_000, 4)
    last = gaussian_chains(centre, fmt, sampler, shape=shape, **settings).reshape(12_000, -1)[:, 0]
    sigma = abs(centre) / 20
    assert_means_equal(
        last.double().clamp(centre - 5 * sigma, centre + 5 * sigma), centre, width=10 * sigma, detect=0.05
    )
    assert float((last.abs() > abs(centre)).double().mean()) > 0.25  # about 0.38: the gap above is twice that below


def test_the_published_rule_stops_chains_at_a_power_of_two():
    last = gaussian_chains(1.0, "bfp8-clamp", SGLD, shape=(4096,), lr=0.005 / 400)
    assert (last < 1.0).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
@pytest.mark.parametrize("fmt", ["bfp8", "bfp8-tensor", "bfp8b4"])
def test_descent_passes_a_power_of_two(fmt, temperature):
    """From 0.95 to the optimum at 1.2: the published rule ends at 0.9921875, at every temperature below a gap's."""
    for text, arrives in ((fmt, True), (f"{fmt}-clamp", False)):
        theta = torch.nn.Parameter(torch.full((8, 4), 0.95))
        opt = SGLD([theta], lr=0.01, num_data=10_000, temperature=temperature, weight_format=text, seed=1)
        for _ in range(600):
            theta.grad = theta.detach() - 1.2
            opt.step()
        assert bool((theta.detach() > 1.1).all()) == arrives
        assert arrives or float(theta.detach().max()) == 0.9921875


def test_sghmc_passes_a_power_of_two():
    theta = torch.nn.Parameter(torch.full((12_000,), 0.97))
    opt = SGHMC([theta], lr=0.04, friction=10.0, num_data=1, temperature=1.0, weight_format="bfp8", seed=3)
    for _ in range(400):
        theta.grad = 400.0 * (theta.detach() - 1.0)
        opt.step()
    last = theta.detach().double()
    assert_means_equal(last.clamp(0.7, 1.3), 1.0, width=0.6, detect=0.05)


def test_what_is_carried_costs_less_than_a_scale_that_always_fits():
    """Added variance of the others, exactly: carrying has f of that of the coarser grid, f how far the top has come."""
    fmt, other = parse_format("bfp8"), Fraction(37, 3)
    for position in range(1, 128, 7):
        share = Fraction(position, 128)
        part = other - other // 1
        fine = part * (1 - part)
        half = other / 2 - other // 2
        coarse = 4 * half * (1 - half)
        carried = (1 - share) * fine + share * coarse
        gap = Fraction(1, 64)
        values = [(127 + share) * gap, other * gap]
        second = Fraction(0)
        for up, this, coin in product((0, 1), (0, 1), (0, 1)):
            chance = (share if up else 1 - share) * (part if this else 1 - part) / 2
            draws = [Fraction(1 - up), Fraction(1 - this)]
            rounded = oracle.block_rounded(values, fmt, torch.float32, draws, [0, coin])[0]
            second += chance * (rounded[1] / gap - other) ** 2
        assert second == carried < coarse


def test_the_plan_of_a_block_has_no_end():
    x = torch.tensor([[1.99, 0.1]])
    assert float(variance_plan(x, 0.0, parse_format("bfp8")).high_code.max()) > 1e300
    assert float(variance_plan(x, 0.0, parse_format("bfp8-clamp")).high_code.max()) == 127
    largest = torch.tensor([[3e38, 0.1]])
    assert float(variance_plan(largest, 0.0, parse_format("bfp8")).high_code.max()) == 127
