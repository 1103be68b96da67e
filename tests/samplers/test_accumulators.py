"""Accumulators on a grid of their own: the sum of the steps by Q^vc or naively, the weight its rounded view."""

import io
from functools import partial

import pytest
import torch
from helpers.stats import assert_moments, assert_uncorrelated
from torch import nn

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, SVRG, PreconditionedSGLD

FAMILY = {
    "SGLD": SGLD,
    "SGHMC": partial(SGHMC, friction=2.0, velocity_format="bfp16"),
    "PreconditionedSGLD": PreconditionedSGLD,
}
WIDE = ["bfp16", "fixed16.14", "mxint16", "fp16", "bfp12", "fixed20.18"]


def on_grid(x, fmt):
    return torch.equal(quantize(x, fmt, rounding="nearest"), x)


def made(name, *, accumulator="bfp16", weights="bfp8", **options):
    """A sampler of three tensors, on their grids, and what sets the gradients of a step."""
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * 0.3) for shape in ((6, 40), (7,), (4, 3, 2, 2))]
    asked = {"num_data": 50_000, "temperature": 1e-3, "weight_format": weights, "gradient_format": weights, "seed": 5}
    opt = FAMILY[name](params, 0.1, accumulator=accumulator, **{**asked, **options})
    opt.round_parameters_()

    def step(number):
        for i, param in enumerate(params):
            at = torch.arange(param.numel()).reshape(param.shape)
            param.grad = (param.detach() + (at + number + i).float().sin()) * 0.1
        opt.step()

    return params, opt, step


@pytest.mark.parametrize("accumulator", WIDE)
@pytest.mark.parametrize("corrected", [True, False], ids=["vc", "naive"])
def test_one_step_is_the_written_equation_with_the_named_draws(accumulator, corrected):
    theta = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
    param = nn.Parameter(theta.clone())
    param.grad = torch.linspace(2.0, -1.0, 24).reshape(4, 6).sin()
    opt = SGLD(
        [param], lr=0.01, num_data=50, temperature=0.01, weight_decay=0.1, seed=11, backend="reference",
        weight_format="fixed8.5", gradient_format="bfp8", accumulator=accumulator, variance_corrected=corrected,
    )  # fmt: skip
    opt.round_parameters_()
    total = opt.accumulator_of(param)
    assert torch.equal(total, quantize(theta, accumulator, rounding="nearest"))
    assert torch.equal(param.detach(), quantize(theta, "fixed8.5", rounding="nearest"))
    before = total.clone()
    opt.step()

    key = {role: DrawKey(seed=11, step=0, stream=stream_id(role, 0)) for role in Role}
    grad = quantize(param.grad, "bfp8", key=key[Role.GRADIENT], backend="reference")
    mean, v = before - 0.01 * (grad + 0.1 * before), 2 * 0.01 * 0.01 / 50
    if corrected:
        expected = quantize_variance_corrected(mean, v, accumulator, key=key[Role.WEIGHT], backend="reference")
    else:
        noisy = mean + v**0.5 * normals(mean.shape, key[Role.WEIGHT]).float()
        expected = quantize(noisy, accumulator, key=key[Role.WEIGHT], backend="reference")
    assert torch.equal(opt.accumulator_of(param), expected)
    assert not torch.equal(expected, before)
    view = quantize(expected, "fixed8.5", key=key[Role.VIEW], backend="reference")
    assert torch.equal(param.detach(), view)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("accumulator", ["bfp16", "fixed16.13", "mxint16"])
def test_sums_stay_on_their_grid_and_weights_are_views_on_theirs(name, accumulator):
    """With the view's named draws; by whichever kernel is fastest here."""
    params, opt, step = made(name, accumulator=accumulator)
    for number in range(4):
        step(number)
        for i, param in enumerate(params):
            total, key = opt.accumulator_of(param), DrawKey(5, number, stream_id(Role.VIEW, i))
            assert total.dtype == torch.float32
            assert on_grid(total, accumulator)
            assert torch.equal(param.detach(), quantize(total, "bfp8", key=key))
            assert on_grid(param.detach(), "bfp8")
    assert not on_grid(opt.accumulator_of(params[0]), "bfp8"), "the sum is no finer than the weights"


def test_the_fused_step_is_that_of_the_composed_ops():
    """Views bit for bit; of the sums, one in some 10^5 may round to the neighbour."""
    results = []
    for backend in ("auto", "reference"):
        params, opt, step = made("SGLD", backend=backend)
        step(0)
        results.append(torch.cat([opt.accumulator_of(p).flatten() for p in params]))
    assert int((results[0] != results[1]).sum()) <= 1
    assert torch.allclose(results[0], results[1], atol=2e-4)


def test_a_bfloat16_weight_has_a_float32_sum_and_is_its_view():
    param = nn.Parameter(torch.linspace(-1, 1, 64).reshape(4, 16).bfloat16())
    opt = SGLD([param], 0.1, num_data=1000, temperature=1e-3, weight_format="bfp8", accumulator="bfp16", seed=1)
    opt.round_parameters_()
    param.grad = param.detach().clone()
    opt.step()
    total = opt.accumulator_of(param)
    assert total.dtype == torch.float32
    assert on_grid(total, "bfp16")
    key = DrawKey(1, 0, stream_id(Role.VIEW, 0))
    assert torch.equal(param.detach().float(), quantize(total, "bfp8", key=key))


def test_the_views_rounding_is_unbiased_and_independent_of_the_sums():
    """A sum that goes one of its gaps up or down with 1/10 each; the view has p(1-p)gap^2 about it all the same."""
    draws, fine, gap = 200_000, 2.0**-11, 0.125
    param = nn.Parameter(torch.full((draws,), 0.4))
    options = {"weight_format": "fixed8.3", "accumulator": "fixed16.11", "seed": 9}
    opt = SGLD([param], 0.1, num_data=1, temperature=fine**2, **options)
    opt.round_parameters_()
    before = opt.accumulator_of(param).clone()
    param.grad = torch.zeros(draws)
    opt.step()
    total = opt.accumulator_of(param)
    moved, seen = (total - before).double() / fine, (param.detach() - total).double() / gap
    assert_moments(moved, 0.0, 0.2, reach=1.0, detect=0.1, fourth_moment=0.2)
    p = float(before[0]) / gap - 3
    assert_moments(seen, 0.0, p * (1 - p), reach=1.0, detect=0.1)
    assert_uncorrelated(moved / 0.2**0.5, seen / (p * (1 - p)) ** 0.5, reach=2.5, detect=0.05)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("accumulator", ["bfp16", "fixed16.13", "mxint16", "fp16"])
def test_a_saved_state_holds_codes_of_two_bytes_and_goes_on_bitwise(name, accumulator):
    params, opt, step = made(name, accumulator=accumulator)
    for number in range(3):
        step(number)
    saved = opt.state_dict()
    for number, param in enumerate(params):
        entry = saved["state"][number]["accumulator"]
        assert entry["codes"].dtype == torch.int16
        assert entry["codes"].shape == param.shape
        assert torch.is_tensor(opt.accumulator_of(param)), "the running state was changed by saving it"
    file = io.BytesIO()
    torch.save([[p.detach() for p in params], saved], file)
    for number in range(3, 6):
        step(number)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, resumed, go_on = made(name, accumulator=accumulator)
    with torch.no_grad():
        for param, value in zip(again, weights):
            param.copy_(value)
    resumed.load_state_dict(state)
    for number in range(3, 6):
        go_on(number)
    for first, second in zip(params, again):
        assert torch.equal(first, second)
        assert torch.equal(opt.accumulator_of(first), resumed.accumulator_of(second))


def test_what_codes_cannot_give_back_is_saved_as_it_is():
    """A sum loaded from a run with another grid, and one that holds NaN."""
    params, opt, step = made("SGLD")
    step(0)
    with torch.no_grad():
        opt.accumulator_of(params[0])[0, 0] = 1 / 3
        opt.accumulator_of(params[1])[2] = float("nan")
    state = opt.state_dict()["state"]
    assert float(state[0]["accumulator"][0, 0]) == pytest.approx(1 / 3)
    assert bool(state[1]["accumulator"].isnan().any())
    assert state[2]["accumulator"]["format"] == "bfp16"
    other = made("SGLD", accumulator="bfp12")[1]
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.accumulator_of(other.param_groups[0]["params"][2]), opt.accumulator_of(params[2]))


@pytest.mark.parametrize("name", FAMILY)
def test_the_meter_measures_the_sum_and_the_view(name):
    params, opt, step = made(name, accumulator="bfp20")
    step(0)
    opt.measure()
    step(1)
    for found, param in zip(opt.measured, params, strict=True):
        assert found.achieved == pytest.approx(found.target, rel=1e-6), "20 bits carry this temperature"
        assert found.effective_temperature == pytest.approx(1e-3, rel=1e-3)
        assert 0.0 < found.view_rounding <= float((2.0**-7 * 2 * param.detach().abs().max()) ** 2) / 4


def test_saturation_counts_sums_and_views_beyond_their_ranges():
    param = nn.Parameter(torch.tensor([[0.5, -0.5, 1.9, 3.9]]))
    opt = SGLD([param], 1.0, num_data=10, temperature=0.0, weight_format="fixed8.6", accumulator="fixed16.13")
    opt.round_parameters_()
    param.grad = torch.tensor([[0.0, 0.0, 0.0, -1.0]])
    opt.step()
    assert opt.accumulator_of(param)[0, 3] == parse_format("fixed16.13").max
    assert param.detach()[0, 3] == parse_format("fixed8.6").max
    assert list(opt.saturation_counts().values()) == [2], "beyond the sum's range, and as a sum beyond the weights'"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulator": "bfp16"}, "leave `accumulator` at 'low' and take weight_format='bfp16'"),
        ({"accumulator": "wide", "weight_format": "bfp8"}, "`accumulator` must be 'low', 'full' or a number format"),
        (
            {"accumulator": "bfp16", "weight_format": "bfp8", "variant": "lattice"},
            "variant='lattice' walks|needs a fixed",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        SGLD([nn.Parameter(torch.zeros(2))], 0.1, num_data=10, **options)


def test_an_accumulator_that_is_no_format_is_a_type_error():
    with pytest.raises(TypeError, match="`accumulator` must be 'low', 'full' or a number format"):
        SGLD([nn.Parameter(torch.zeros(2))], 0.1, num_data=10, weight_format="bfp8", accumulator=None)


@pytest.mark.parametrize("kind", [SVRG, partial(HALP, mu=1.0)], ids=["SVRG", "HALP"])
def test_samplers_with_a_centre_have_none_and_say_what_has(kind):
    build = kind.func.from_optimizer if isinstance(kind, partial) else kind.from_optimizer
    more = kind.keywords if isinstance(kind, partial) else {}
    with pytest.raises(ValueError, match=r"accumulator='bfp16'.*use SGLD"):
        build(torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1), accumulator=parse_format("bfp16"), **more)
