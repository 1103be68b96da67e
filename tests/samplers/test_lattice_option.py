"""``SGLD(variant="lattice")``: the walk's own step and law, no fused kernel, and refusals that say the way out."""

import copy

import pytest
import torch
from helpers.stats import assert_frequencies

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.lattice import RATES, lattice_step, walk_law
from lightning_lpsgld.random import DrawKey, Role, stream_id
from lightning_lpsgld.samplers import SGLD, updates

LR, DECAY, TEMPERATURE, DATA = 0.05, 0.1, 0.5, 40


def one_parameter(fmt, **options):
    start = quantize(torch.linspace(-1.0, 1.0, 24).reshape(4, 6), fmt, rounding="nearest")
    param = torch.nn.Parameter(start.clone())
    param.grad = torch.linspace(2.0, -1.0, 24).reshape(4, 6).sin()
    options = {"weight_decay": DECAY, "temperature": TEMPERATURE, "variant": "lattice", **options}
    return start, param, SGLD([param], LR, num_data=DATA, weight_format=fmt, seed=4, **options)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("fmt", ["fixed8.6", "fixed8.3", "bfp8"])
def test_one_step_is_the_step_of_the_walk_with_the_named_draws(fmt, rates):
    """Coupled: drift −η(Q_G(g) + λθ), variance 2ηT/N, the weight's own stream."""
    start, param, opt = one_parameter(fmt, rates=rates, gradient_format="bfp8")
    opt.step()
    key = DrawKey(seed=4, step=0)
    grad = quantize(param.grad, "bfp8", key=key.at(stream=stream_id(Role.GRADIENT, 0)), backend="reference")
    expected = lattice_step(
        start,
        -LR * (grad + DECAY * start),
        2 * LR * TEMPERATURE / DATA,
        fmt,
        key=key.at(stream=stream_id(Role.WEIGHT, 0)),
        rates=rates,
    )
    assert torch.equal(param.detach(), expected)
    assert torch.equal(quantize(param, fmt, rounding="nearest"), param), "the weight left its grid"


@pytest.mark.parametrize("rates", RATES)
def test_frequencies_of_one_step_are_the_law_of_the_walk(rates):
    """Each element is an independent chain from one of three points; chi-square at the suite's declared rate.

    A law whose probabilities are off by a relative 5 % in any pattern is detected.
    """
    fmt, draws = parse_format("fixed8.3"), 50_000
    points = torch.tensor([-0.5, 0.0, 1.0])
    param = torch.nn.Parameter(points[:, None].repeat(1, draws))
    param.grad = param.detach().clone()
    opt = SGLD([param], 0.02, num_data=1, temperature=0.1, weight_format=fmt, variant="lattice", rates=rates, seed=9)
    opt.step()
    codes, masses, plan = walk_law(points.double(), -0.02 * points.double(), 2 * 0.02 * 0.1, fmt, rates=rates)
    assert not plan.ballistic.any()
    law = torch.zeros(3, 256, dtype=torch.float64).scatter_add_(1, (codes + 128).long(), masses)
    found = torch.stack([torch.bincount((row / fmt.gap).long() + 128, minlength=256) for row in param.detach()])
    assert_frequencies(found, law, detect=0.05)


def test_fused_kernels_are_never_asked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a fused backend was asked for a lattice step")

    monkeypatch.setattr(updates, "choose_step", refuse)
    _, _, opt = one_parameter("bfp8")
    opt.step()


def test_exempt_parameters_are_not_walked():
    _, param, _ = one_parameter("bfp8")
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    opt = SGLD([param, other], LR, num_data=DATA, weight_format="bfp8", variant="lattice", full_precision=[other])
    assert [opt.accumulation(p) for p in (param, other)] == ["lattice", "float"]
    opt.step()


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
def test_the_noise_that_it_is_told_reaches_the_walk(shrinkage):
    """As a float, and as a tensor per parameter; η·s whatever divides the rounded gradient."""
    told = {}
    options = {"rates": "exponential", "gradient_format": "bfp8"}
    start, one, opt = one_parameter("fixed8.6", gradient_std=0.2, **options)
    _, other, by_name = one_parameter("fixed8.6", gradient_std=lambda p: told[p], **options)
    told[other] = torch.full((6,), 0.2, dtype=torch.float64)
    for param, sampler in ((one, opt), (other, by_name)):
        sampler.compensate(param, shrinkage)
        sampler.step()
    key = DrawKey(seed=4, step=0)
    grad = quantize(one.grad, "bfp8", key=key.at(stream=stream_id(Role.GRADIENT, 0)), backend="reference")
    expected = lattice_step(
        start,
        -LR / shrinkage * (grad + DECAY * shrinkage * start),
        2 * LR * TEMPERATURE / DATA,
        "fixed8.6",
        key=key.at(stream=stream_id(Role.WEIGHT, 0)),
        gradient_std=LR * 0.2,
    )
    assert torch.equal(one.detach(), expected)
    assert torch.equal(other.detach(), expected)


@pytest.mark.parametrize("max_elements", [8, 1000])
def test_measuring_takes_the_noise_into_account(max_elements):
    """A tensor of large noise in the first rows stops the walk there: the variance is that of the others."""
    noise = torch.tensor([50.0, 50.0, 0.0, 0.0])[:, None].expand(4, 6)
    _, _, opt = one_parameter("fixed8.6", rates="exponential", gradient_std=lambda p: noise)
    _, _, calm = one_parameter("fixed8.6", rates="exponential")
    for sampler in (opt, calm):
        sampler.measure(max_elements)
        sampler.step()
    assert 0 < opt.measured[0].achieved < calm.measured[0].achieved


def test_resumes_bitwise():
    def run(param, opt, steps):
        for _ in range(steps):
            param.grad = param.detach().cos()
            opt.step()
        return param.detach().clone()

    _, param, opt = one_parameter("bfp8")
    run(param, opt, 3)
    saved, weights = copy.deepcopy(opt.state_dict()), param.detach().clone()
    whole = run(param, opt, 4)
    _, param, opt = one_parameter("bfp8")
    param.data.copy_(weights)
    opt.load_state_dict(saved)
    assert torch.equal(run(param, opt, 4), whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "needs `temperature` > 0, got 0"),
        ({"accumulator": "full"}, "accumulator='low', got fixed8.6 and 'full'"),
        ({"weight_format": None}, "fixed-point or block `weight_format`"),
        ({"weight_format": "e4m3"}, "fixed-point or block `weight_format`"),
        ({"variant": "grid"}, "`variant` must be 'auto' or 'lattice'"),
        ({"rates": "fast"}, "`rates` must be 'exponential', 'bernoulli'"),
        ({"gradient_std": 0.1}, "rates='exponential', got 'lattice' and 'bernoulli'"),
        ({"gradient_std": 0.1, "variant": "auto"}, "needs variant='lattice'"),
        ({"gradient_std": -0.1, "rates": "exponential"}, "`gradient_std` must be finite and >= 0"),
    ],
)
def test_what_it_cannot_walk_on_is_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        SGLD(
            [torch.nn.Parameter(torch.zeros(2))],
            0.1,
            **{"num_data": 10, "weight_format": "fixed8.6", "variant": "lattice", **options},
        )


def test_measured_variance_is_that_of_the_law():
    """``measure`` gives the exact variance of the walk's step, here against the moments of its law."""
    fmt = parse_format("fixed8.3")
    theta = torch.arange(-16, 17).float() * fmt.gap
    param = torch.nn.Parameter(theta.clone())
    param.grad = theta.clone()
    opt = SGLD([param], 0.02, num_data=1, temperature=1.0, weight_format=fmt, variant="lattice")
    opt.measure()
    opt.step()
    codes, masses, plan = walk_law(theta.double(), (-0.02 * theta).double(), 0.04, fmt, rates="bernoulli")
    assert not plan.ballistic.any()
    first, second = (codes * masses).sum(-1), (codes**2 * masses).sum(-1)
    exact = float(((second - first**2) * fmt.gap**2).mean())
    assert opt.measured[0].achieved == pytest.approx(exact, rel=1e-6)  # drifts are float32 in the optimizer
    assert opt.measured[0].target == pytest.approx(0.04)
