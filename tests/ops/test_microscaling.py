"""Microscaling floats: rounding, scales and codes exactly, Q^vc in law, and the samplers that step on them.

Three kinds of tests that are kept apart: exact (rational arithmetic, PyTorch's own 8-bit casts), coupled (backends
under the same draws), statistical (declared error rates, laws from ``helpers.oracle``).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from helpers import oracle
from helpers.backends import runs
from helpers.stats import assert_moments, draws_for_moments
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference_exact import assert_values, expected_stochastic, fractions, same_bits
from test_variance_corrected import assert_laws, edge_means, float_laws, in_gaps

from lightning_lpsgld.analysis import expected_shrinkage, plan, variance_budget
from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.formats import MicroscalingFloat, parse_format
from lightning_lpsgld.ops import decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.lattice import lattice_step
from lightning_lpsgld.ops.reference import variance_plan
from lightning_lpsgld.random import DrawKey, uniforms
from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, PreconditionedSGLD
from lightning_lpsgld.samplers.updates import count_saturated

KEY = DrawKey(seed=77, step=3, stream=5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["mxfp8e4m3", "mxfp8e5m2", "mxfp6e3m2", "mxfp6e2m3", "mxfp4e2m1"]
RULES = [*NAMES, "mxfp8e4m3-fit", "mxfp6e2m3-fit", "mxfp4e2m1-fit"]
LONG = 2**20  # a row of any test is one run


def one_run(name):
    """The same element and rule with runs that are longer than any row."""
    fmt = parse_format(name)
    return MicroscalingFloat(fmt.exponent_bits, fmt.mantissa_bits, LONG, fmt.scaling)


# ------------------------------------------------------------------------------------------------------ exact: rounding


def anchors(fmt, dtype):
    """Largest magnitudes of a run: powers of two, values that ``"floor"`` saturates, both clamps, subnormals."""
    facts = torch.finfo(dtype)
    smallest, largest = (oracle.floor_log2(Fraction(v)) for v in (facts.smallest_normal * facts.eps, facts.max))
    clamps = [-127 + fmt.element.exponent_max, 127 + fmt.element.exponent_max]
    exponents = [e for e in (*clamps, smallest + 2, 0, largest) if smallest <= e <= largest]
    return [1.0 * 2.0**e for e in exponents] + [1.9375 * 2.0**e for e in exponents[-2:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_every_value_of_a_run_and_its_neighbours(name, dtype, backend):
    """Rows of one run: an anchor that fixes the scale, then all values, midpoints and neighbours that it allows."""
    fmt = one_run(name)
    for anchor in anchors(fmt, dtype):
        exponent = oracle.scale_exponent(Fraction(anchor), fmt, dtype)
        grid = oracle.run_grid(exponent, fmt)
        around = oracle.candidates(grid, dtype)
        x = torch.cat([torch.tensor([anchor], dtype=torch.float64).to(dtype), around[around.abs().double() <= anchor]])
        runs(backend, "quantize", x, fmt)
        nearest = quantize(x, fmt, rounding="nearest", backend=backend)
        assert_values(nearest, [oracle.nearest(v, grid) for v in fractions(x)], x)
        stochastic = quantize(x, fmt, key=KEY, backend=backend)
        assert_values(stochastic, expected_stochastic(x, grid, uniforms(x.shape, KEY)), x)
        assert encode(x, fmt, backend=backend).exponents.tolist() == [exponent]


@pytest.mark.parametrize(("name", "cast"), [("mxfp8e4m3", torch.float8_e4m3fn), ("mxfp8e5m2", torch.float8_e5m2)])
def test_conversion_is_that_of_the_specification(name, cast, backend):
    """OCP MX v1.0, 6.3, on random blocks: scale by frexp, clamp to the largest normal, PyTorch's cast and patterns."""
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 9, 400)[:, None]
    fmt = parse_format(name)
    runs(backend, "encode", x, fmt)
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 1 - fmt.element.exponent_max
    elements = (x.double() * 2.0 ** (-exponent).double()).clamp(fmt.element.min, fmt.element.max).float().to(cast)
    encoded = encode(x, fmt, backend=backend)
    positive_zero = torch.where(
        elements.float() == 0, torch.zeros_like(elements.view(torch.int8)), elements.view(torch.int8)
    )
    assert torch.equal(encoded.codes, positive_zero)
    assert torch.equal(encoded.exponents.long(), exponent.long())
    assert torch.equal(decode(encoded, backend=backend), (elements.double() * 2.0 ** exponent.double()).float() + 0.0)


@pytest.mark.parametrize("shape", [(70,), (3, 7), (2, 3, 40), (4, 1), (2, 2, 2, 33)], ids=str)
@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp4e2m1b3", "mxfp6e3m2b1-fit"])
def test_runs_are_those_of_the_last_dim(name, shape, backend):
    """Every run by itself gives what the tensor gives; the last run of a row may be shorter."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, shape[-1])
    fmt = parse_format(name)
    runs(backend, "quantize", x, fmt)
    rows = [quantize(run, fmt, rounding="nearest", backend=backend) for run in x.split(fmt.block_size, dim=-1)]
    assert torch.equal(torch.cat(rows, dim=-1), quantize(x, fmt, rounding="nearest", backend=backend))
    assert encode(x, fmt, backend=backend).exponents.shape == (*shape[:-1], len(rows))
    for run in x.split(fmt.block_size, dim=-1)[0].reshape(-1, min(fmt.block_size, shape[-1])):
        grid = oracle.run_grid(oracle.scale_exponent(max(map(abs, fractions(run))), fmt, x.dtype), fmt)
        got = quantize(run, fmt, rounding="nearest", backend=backend)
        assert_values(got, [oracle.nearest(v, grid) for v in fractions(run)], run)


def test_only_vectors_have_runs_across_rows():
    """What shards by rows, and meters that look at some rows, must know."""
    assert [parse_format("mxfp8e4m3").blocks.crosses_rows(ndim) for ndim in (1, 2, 4)] == [True, False, False]
    assert parse_format("mxfp8e4m3").blocks.count((3, 70)) == 9


@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e5m2-fit", "mxfp4e2m1"])
def test_specials_of_a_run(name, backend):
    """Zeros stay; NaN stays in its place; infinities take the run's largest value, the largest of all if alone."""
    fmt = parse_format(name)
    x = torch.tensor(
        [[0.0, -0.0, 0.0], [1.0, math.nan, -math.inf], [math.nan, math.inf, math.nan], [math.inf, 0.0, 0.0]]
    )
    got = quantize(x, fmt, rounding="nearest", backend=runs(backend, "quantize", x, fmt))
    one = oracle.scale_exponent(Fraction(1), fmt, x.dtype)
    top = fmt.element.max * 2.0 ** (127 - fmt.element.exponent_max)  # float32 ends before E8M0 does
    largest = float(oracle.run_grid(one, fmt)[-1])
    expected = [[0.0, 0.0, 0.0], [1.0, math.nan, -largest], [math.nan, top, math.nan], [top, 0.0, 0.0]]
    assert same_bits(got, torch.tensor(expected))
    assert not encode(x[0], fmt, backend=backend).codes.any()


@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e5m2"])
def test_codes_keep_nan_where_the_element_has_one(name, backend):
    x = torch.tensor([1.0, math.nan, 0.25, -math.inf])
    encoded = encode(x, name, backend=runs(backend, "encode", x, name))
    assert same_bits(decode(encoded, backend=backend), torch.tensor([1.0, math.nan, 0.25, -1.75]))


@pytest.mark.parametrize(("name", "bits"), [("mxfp8e4m3", 8.25), ("mxfp8e5m2-fit", 8.25), ("mxfp4e2m1", 8.25)])
def test_a_stored_element_takes_a_byte_and_a_share_of_its_scale(name, bits):
    """4-bit elements are not packed: a byte each too."""
    encoded = encode(torch.randn(64, 128), name)
    assert encoded.nbytes * 8 == bits * encoded.codes.numel()
    assert encoded.codes.dtype == encoded.exponents.dtype == torch.int8


# ------------------------------------------------------------------------------------------------- exact: twice is once


def unchanged(values, fmt):
    """Rounding ``values`` again, in every way, gives their bits; so do their codes."""
    assert same_bits(quantize(values, fmt, rounding="nearest"), values)
    assert same_bits(quantize(values, fmt, key=KEY.at(step=99)), values)
    assert same_bits(quantize_variance_corrected(values, 0.0, fmt, key=KEY.at(step=98)), values)
    assert same_bits(decode(encode(values, fmt), values.dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_quantizing_twice_changes_nothing_at_the_top_of_a_run(name, dtype):
    """Runs of two: the largest magnitude steps through the binade up to and beyond the next power of two."""
    fmt = one_run(name)
    top = torch.linspace(1.0, 2.0 + 2**-5, 67, dtype=torch.float64)
    facts = torch.finfo(dtype)
    for scale in (1.0, facts.smallest_normal, facts.smallest_normal * 2.0**-3, facts.max / 4):
        x = (torch.stack([top, -0.77 * top.flip(0)], dim=1) * scale).to(dtype)
        for rounding in ("nearest", "stochastic"):
            for step in range(4):
                unchanged(quantize(x, fmt, rounding=rounding, key=KEY.at(step=step)), fmt)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_one = st.floats(0.25, 4.0, width=32)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(floats, near_one, st.just(0.0)), min_size=1, max_size=40),
    st.sampled_from(RULES),
    st.sampled_from([0.0, 1e-9, 1e-4, 0.02, 1.0, 1e6]),
    st.integers(0, 2**30),
)
def test_quantizing_any_result_again_changes_nothing(values, name, variance, step):
    """Whatever a run holds, under both roundings and Q^vc of any variance."""
    x, fmt, key = torch.tensor(values), parse_format(name), KEY.at(step=step)
    for rounding in ("nearest", "stochastic"):
        unchanged(quantize(x, fmt, rounding=rounding, key=key), fmt)
    for backend in ("auto", "reference"):
        unchanged(quantize_variance_corrected(x, variance, fmt, key=key, backend=backend), fmt)


@pytest.mark.parametrize("name", RULES)
def test_only_the_floor_rule_saturates(name):
    """Stochastic rounding is unbiased where ``saturated`` counts nothing; ``"fit"`` never has anything to count."""
    fmt = one_run(name)
    top = torch.linspace(1.0, 2.0, 41)[:-1, None]
    count = int(count_saturated(top, fmt))
    largest = fmt.element.max / 2.0**fmt.element.exponent_max
    assert count == (0 if fmt.scaling == "fit" else int((top > largest).sum()))
    rounded = quantize(top, fmt, rounding="nearest")
    assert float(rounded.max()) == (2.0 if fmt.scaling == "fit" else largest)
    budget = variance_budget(top, 0.0, fmt)
    assert float(budget.saturated) * len(top) == pytest.approx(count)


# -------------------------------------------------------------------------------------------------------------- coupled


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_backends_agree_bitwise(name, dtype, backend):
    """Random bit patterns of every magnitude, in runs of similar and of wildly different size."""
    generator = torch.Generator().manual_seed(5)
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    wild = torch.randint(-(2**31), 2**31, (60, 96), generator=generator).to(integer).view(dtype)
    mild = torch.randn(60, 96, generator=generator) * torch.logspace(-6, 4, 60)[:, None]
    for x in (wild, mild.to(dtype)):
        runs(backend, "quantize", x, parse_format(name))
        for rounding in ("nearest", "stochastic"):
            options = {"rounding": rounding, "key": KEY}
            assert same_bits(
                quantize(x, name, backend=backend, **options), quantize(x, name, backend="reference", **options)
            )
            kept = x.nan_to_num()
            ours, theirs = (encode(kept, name, backend=b, **options) for b in (backend, "reference"))
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.exponents, theirs.exponents)
            assert same_bits(decode(ours, dtype, backend=backend), decode(theirs, dtype, backend="reference"))


@pytest.mark.parametrize("v", [0.0, 1e-5, 1e-2])
def test_corrected_rounding_does_not_depend_on_how_the_scales_are_shared_out(v, backend):
    """Rows of different scale in one tensor are what each row is by itself, with the draws of its place."""
    mean = torch.randn(7, 32, generator=torch.Generator().manual_seed(6)) * torch.logspace(-3, 3, 7)[:, None]
    runs(backend, "quantize_variance_corrected", mean, parse_format("mxfp8e4m3"))
    whole = quantize_variance_corrected(mean, v, "mxfp8e4m3", key=KEY, backend=backend)
    for i, row in enumerate(mean):
        own = quantize_variance_corrected(row, v, "mxfp8e4m3", key=KEY.at(offset=32 * i), backend=backend)
        assert torch.equal(own, whole[i])


# ---------------------------------------------------------------------------------------------------------- statistical

CELLS = [0.0, 0.05, 0.3, 0.5]
DRAWS = 60_000


def drawn(mean, variance, fmt, backend, draws=DRAWS):
    """``draws`` copies of one run, float64, all finite."""
    runs(backend, "quantize_variance_corrected", mean, fmt)
    got = quantize_variance_corrected(mean.expand(draws, -1), variance, fmt, key=KEY, backend=backend)
    assert got.isfinite().all()
    return got.double()


@pytest.mark.parametrize("share", [0.0, 0.24, 0.8])
@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e5m2-fit"])
def test_law_inside_binades_and_at_their_edges(name, share, backend):
    """An anchor of 4 fixes the scale; elements of [1, 2] have the law of floats: both moments exact at its edges."""
    fmt = one_run(name)
    gap = 2.0**-fmt.mantissa_bits
    middle = torch.tensor([1.5 + part * gap for part in CELLS])
    mean = torch.cat([torch.tensor([4.0]), edge_means(gap), middle])
    got = drawn(mean, share * gap**2, fmt, backend)[:, 1:]
    mean = mean[1:]
    unit = torch.where(mean.abs() >= 2, 2 * gap, gap).double()
    scaled, target = in_gaps(mean, torch.full((len(mean),), share * gap**2, dtype=torch.float64), unit)
    assert_laws(got / unit, float_laws(scaled, target, fmt.mantissa_bits))


@pytest.mark.parametrize("share", [1.0, 5.0])
@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e5m2-fit", "mxfp4e2m1", "mxfp4e2m1-fit"])
def test_moments_where_the_noise_crosses_the_top_of_the_run(name, share, backend):
    """Largest means beside and beyond what the run holds: the scale is raised once, both moments stay exact."""
    fmt = one_run(name)
    gap = 2.0**-fmt.mantissa_bits
    mean = torch.tensor([1.9, -1.97, 1.75, 1.0, 1 + 0.3 * gap, 2.0])
    v = share * gap**2
    variance = torch.full((len(mean),), v, dtype=torch.float64)
    options = {"reach": 6.8 * math.sqrt(v) + 4 * gap * math.sqrt(share), "detect": 0.12, "fourth_moment": 6 * v**2}
    draws = draws_for_moments(variance, **options)
    assert_moments(drawn(mean, v, fmt, backend, draws), mean.double(), variance, **options)


@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp8e5m2-fit", "mxfp4e2m1"])
def test_a_zero_run_gets_its_noise(name, backend):
    """The scale comes from the noise alone."""
    v, fmt = 1e-5, one_run(name)
    options = {"reach": 8 * math.sqrt(v), "detect": 0.1, "fourth_moment": 4 * v**2}
    draws = draws_for_moments(torch.full((4,), v), **options)
    assert_moments(drawn(torch.zeros(4), v, fmt, backend, draws), 0.0, torch.full((4,), v), **options)


def top_law(code, share, fits):
    """Law of a run of one e4m3 whose mean is ``code`` gaps, below 16; the code 15 as a largest magnitude if it fits."""
    law = oracle.float_vc_law(Fraction(code), Fraction(share), 3)
    if not fits:
        hole = law.pop(15, 0)
        law[14], law[16] = law.get(14, 0) + hole / 2, law.get(16, 0) + hole / 2
    return law


@pytest.mark.parametrize("name", ["mxfp8e4m3b1", "mxfp8e4m3b1-fit"])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_the_hole_at_the_top_of_e4m3(name, share, backend):
    """1.875 cannot be a run's largest magnitude under ``"floor"``: it goes to 1.75 and 2 in equal parts, mean exact."""
    gap, codes = 1 / 8, [14.0, 14.5, 15.0, 15.75]
    mean = torch.tensor([code * gap for code in codes])
    got = drawn(mean, share * gap**2, parse_format(name), backend) / gap
    laws = [top_law(code, share, fits=name.endswith("-fit")) for code in codes]
    for law, code in zip(laws, codes):
        assert sum(k * p for k, p in law.items()) == code
    assert_laws(got, laws)


@pytest.mark.parametrize(("name", "law"), [("mxfp8e4m3b1", {14: 1.0}), ("mxfp8e4m3b1-fit", {14: 0.6, 15: 0.4})])
def test_without_noise_only_the_fit_rule_keeps_the_mean(name, law, backend):
    """14.4 gaps with no variance: ``"floor"`` saturates at 14, ``"fit"`` rounds stochastically."""
    got = drawn(torch.tensor([14.4 / 8]), 0.0, parse_format(name), backend) * 8
    assert_laws(got, [law])


def test_the_plan_tells_what_is_delivered():
    """Regimes and achieved variance per element, at the scale that noise raises; a small element is out of reach."""
    mean, fmt = torch.tensor([1.9, 1.5 + 0.4 / 8, 1.5 + 0.4 / 8, 1e-3]), parse_format("mxfp8e4m3")
    variance = torch.tensor([0.1, 0.3, 0.1, 0.1], dtype=torch.float64) / 64
    plan_ = variance_plan(mean, variance, fmt)
    assert plan_.high.tolist() == [False, True, False, True]
    assert plan_.unreachable.tolist() == [True, False, True, False]
    gap = 2.0 ** plan_.gap_exponents.double()
    assert gap[:3].tolist() == [1 / 8] * 3
    assert bool((gap * plan_.high_code >= 1.9).all()), "the scale is raised for the noise, so nothing saturates"
    assert int(count_saturated(mean, fmt)) == 1
    assert int(count_saturated(mean, fmt, variance)) == 0


# ------------------------------------------------------------------------------------------------ samplers and the rest


def regression():
    torch.manual_seed(0)
    net = torch.nn.Linear(40, 3)
    x, y = torch.randn(64, 40), torch.randn(64, 3)
    return net, lambda: (net(x) - y).square().mean()


def stepped(net, loss, optimizer, steps=3):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return [float(optimizer.step(closure).detach()) for _ in range(steps)]


@pytest.mark.parametrize("accumulator", ["low", "full"])
@pytest.mark.parametrize(
    "sampler", [SGLD, partial(SGHMC, friction=1.0), PreconditionedSGLD], ids=["sgld", "sghmc", "p"]
)
@pytest.mark.parametrize("name", ["mxfp8e4m3", "mxfp6e2m3-fit"])
def test_samplers_stay_on_the_grid(sampler, name, accumulator):
    """Three steps with microscaled weights and gradients: weights move, stay on the grid, and the loss stays finite."""
    net, loss = regression()
    before = net.weight.detach().clone()
    options = {"num_data": 64, "temperature": 1e-3, "weight_format": name, "gradient_format": "mxfp8e5m2"}
    optimizer = sampler(net.parameters(), 0.05, accumulator=accumulator, seed=1, **options)
    losses = stepped(net, loss, optimizer)
    assert all(map(math.isfinite, losses))
    for param in net.parameters():
        assert torch.equal(quantize(param.detach(), name, rounding="nearest"), param)
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("corrected", [True, False])
def test_a_step_in_its_composition_is_the_reference(corrected):
    """The ops behind a step give what the reference gives, under the same draws."""
    results = []
    for backend in ("auto", "reference"):
        net, loss = regression()
        optimizer = SGLD(
            net.parameters(), 0.05, num_data=64, weight_format="mxfp8e4m3", gradient_format="mxfp8e5m2-fit",
            temperature=0.0, variance_corrected=corrected, backend=backend,
        )  # fmt: skip
        stepped(net, loss, optimizer)
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_bank_keeps_samples_at_a_byte_and_a_thirty_second(tmp_path):
    net = torch.nn.Linear(64, 32, bias=False)
    with torch.no_grad():
        net.weight.copy_(quantize(net.weight, "mxfp8e4m3", key=KEY))
    bank = SampleBank(tmp_path / "bank")
    bank.add(net, step=1, formats="mxfp8e4m3")
    other = torch.nn.Linear(64, 32, bias=False)
    SampleBank.open(tmp_path / "bank").load_into(other, 0)
    assert torch.equal(other.weight, net.weight)
    assert sum(entry.nbytes for entry in bank.spec.entries) == 64 * 32 * (1 + 1 / 32)


def test_the_planner_counts_scales_and_offers_no_longer_word():
    net, _ = regression()
    batch = torch.randn(8, 40), torch.randn(8, 3)
    out = plan(net, batch, lambda m, b: (m(b[0]) - b[1]).square().mean(), lr=0.1, num_data=64, weights="mxfp8e4m3")
    assert [layer.weight_bytes for layer in out.layers] == [3 * 40 + 3 * 2, 3 + 1]
    assert all(layer.remedy_bits in (None, 8) for layer in out.layers)
    assert "mxfp8e4m3" in str(out)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: quantize(x, "mxfp8e4m3", rounding="nearest", backend="qtorch"), RuntimeError, "no mxfp8e4m3"),
        (
            lambda x: lattice_step(x, x, 0.1, "mxfp8e4m3", key=KEY),
            ValueError,
            "equal gaps up and down, which mxfp8e4m3",
        ),
        (lambda x: expected_shrinkage("mxfp8e4m3", 1.0), TypeError, "scale of mxfp8e4m3 depends on the sample"),
        (lambda x: HALP([x], 0.1, mu=1.0, num_data=4, offset_format="mxfp8e4m3"), ValueError, "block floating point"),
        (
            lambda x: SGLD([x], 0.1, num_data=4, weight_format="mxfp8e4m3", variant="lattice"),
            ValueError,
            "fixed-point or block `weight_format`",
        ),
        (lambda x: encode(x * math.nan, "mxfp4", backend="reference"), ValueError, "e2m1 has no NaN, but 6 of 6"),
    ],
)
def test_refusals_name_what_is_asked(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3))


def test_the_fused_step_is_that_of_the_reference():
    """Taken by name, so that it is the fused one; plain rounding, so that all bits are the same."""
    runs("cpu", "quantize", torch.ones(2, 3), parse_format("e4m3"))
    weights = []
    for backend in ("cpu", "reference"):
        net, loss = regression()
        options = {"temperature": 0.0, "variance_corrected": False, "gradient_format": "mxfp8e5m2"}
        optimizer = SGLD(net.parameters(), 0.05, num_data=64, weight_format="mxfp8e4m3", backend=backend, **options)
        stepped(net, loss, optimizer)
        weights.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights))
