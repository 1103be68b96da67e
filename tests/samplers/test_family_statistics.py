"""``measure`` of SGHMC and preconditioned SGLD: the variances of real steps, and the temperature they amount to."""

import math

import pytest
import torch
from helpers.stats import assert_moments, draws_for_moments

from lightning_lpsgld.analysis import underdamped_stationary_law
from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.random import DrawKey, uniforms
from lightning_lpsgld.samplers import SGHMC, PreconditionedSGLD

DETECT = 0.1
COLD = 1e-4
FORCE = 1.5 + 0.5 * 0.25  # of equal_elements with weight decay 0.5


def sampler(kind, param, lr=0.1, **options):
    options = {"num_data": 10, "weight_format": "fixed8.3", "seed": 2, **options}
    if kind is SGHMC:
        options = {"friction": 2.0, "velocity_format": "fixed8.5", **options}
    return kind([param], lr, **options)


def measured(opt, **options):
    opt.measure(**options)
    opt.step()
    return opt.measured[0]


def equal_elements(count, theta=0.25, grad=1.5):
    param = torch.nn.Parameter(torch.full((count,), theta))
    param.grad = torch.full((count,), grad)
    return param


# -------------------------------------------------------------------------------------------- statistical: real steps


@pytest.mark.parametrize("temperature", [COLD, 10.0])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("kind", [SGHMC, PreconditionedSGLD])
def test_the_measured_variance_is_that_of_real_steps(kind, corrected, temperature):
    """Equal elements are equal chains: mean and variance of one step, in both regimes of Q^vc and after plain rounding.

    For naive rounding, whose measure is given one draw of the noise, the mean over 20,000 of them is measured. Reach:
    noise of 6.77 standard deviations and two gaps; of the velocity also what the position's error carries over.
    """

    def build(param):
        return sampler(kind, param, temperature=temperature, variance_corrected=corrected, weight_decay=0.5)

    exact = measured(build(equal_elements(1 if corrected else 20_000)))
    reach = 6.77 * math.sqrt(exact.target) + 2 * 2.0**-3
    needed = draws_for_moments(exact.achieved, reach=reach, detect=DETECT)
    param = equal_elements(needed)
    opt = build(param)
    flow = opt.flow(opt.param_groups[0]) if kind is SGHMC else None
    opt.step()
    step = flow.shift * FORCE if kind is SGHMC else 0.1 * FORCE / (FORCE + 1e-5)
    assert_moments(param.detach() - (0.25 - step), 0.0, exact.achieved, reach=reach, detect=DETECT)
    if kind is SGHMC:
        gap = float(opt.state[param]["velocity_scale"]) * 2.0**-5
        reach = flow.cov / exact.achieved * reach + 6.77 * math.sqrt(exact.velocity_target) + 2 * gap
        velocity = opt.velocity_of(param) + flow.kick * FORCE  # as many draws as the position's detect only 20 % here
        assert_moments(velocity, 0.0, exact.velocity_achieved, reach=reach, detect=2 * DETECT)


# -------------------------------------------------------------------------------------------------------------- exact


def test_preconditioned_noise_is_that_of_every_weight():
    """First step: V/w = f^2, so G = 1/(|f| + eps); mean of max(vG, p(1-p) gap^2), from the definitions."""
    theta = torch.linspace(-2, 2, 33).mul(8).round().div(8)
    param = torch.nn.Parameter(theta.clone())
    param.grad = torch.linspace(0.25, 3, 33)
    found = measured(sampler(PreconditionedSGLD, param, temperature=0.2, eps=0.5))
    g = 1 / (param.grad.double() + 0.5)
    mean, v, gap = theta.double() - 0.1 * g * param.grad, 2 * 0.1 * 0.2 / 10, 2.0**-3
    p = mean / gap - (mean / gap).floor()
    variance = torch.maximum(v * g, p * (1 - p) * gap**2)
    assert found.target == pytest.approx(float((v * g).mean()), rel=1e-6)
    assert found.achieved == pytest.approx(float(variance.mean()), rel=1e-6)
    assert found.effective_temperature == pytest.approx(0.2 * float(variance.mean() / (v * g).mean()), rel=1e-6)
    assert found.unreachable == float((p * (1 - p) * gap**2 > v * g).double().mean())


@pytest.mark.parametrize("options", [{"weight_format": None, "velocity_format": None}, {"accumulator": "full"}])
def test_without_rounding_of_the_sum_noise_is_what_was_asked_for(options):
    options = {"velocity_format": None, **options}
    found = measured(sampler(SGHMC, equal_elements(50), temperature=0.3, **options))
    assert found.achieved == found.target
    assert found.velocity_achieved == found.velocity_target
    assert found.effective_temperature == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("kind", [SGHMC, PreconditionedSGLD])
def test_measuring_changes_nothing_and_sees_the_step_that_is_made(kind):
    """The same weights and the same saved state, and the share of elements that stay where they are."""
    results = []
    for ask in (True, False):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 96).mul(8).round().div(8).view(8, 12))
        opt = sampler(kind, param, temperature=COLD, gradient_format="bfp8")
        for _ in range(3):
            param.grad, before = param.detach().cos(), param.detach().clone()
            if ask:
                opt.measure()
            opt.step()
            if ask:
                assert opt.measured[0].unchanged == float((param == before).double().mean())
        results.append((param.detach().clone(), opt.state_dict()))
    (one, first), (two, second) = results
    assert torch.equal(one, two)
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["state"][0][name])), name


@pytest.mark.parametrize("kind", [SGHMC, PreconditionedSGLD])
def test_large_tensors_are_measured_on_rows(kind):
    param = torch.nn.Parameter(torch.zeros(64, 16))
    param.grad = torch.ones_like(param)
    found = measured(sampler(kind, param), max_elements=128)
    assert (found.count, found.numel) == (128, 1024)


def test_a_step_of_no_length_has_no_temperature():
    found = measured(sampler(SGHMC, equal_elements(4), lr=0.0))
    assert math.isnan(found.effective_temperature)


# ----------------------------------------------------------------------------------- what the temperature amounts to


@pytest.mark.parametrize(("update", "friction"), [("vc", 3.0), ("naive", 3.0), ("vc", 6.0)])
def test_effective_temperature_is_that_of_the_stationary_law_of_slow_directions(update, friction):
    """U = x^2/8, gap 1/4, from the exact law of (x, v): Var(x)/8 against the mean of what steps from it report.

    The excess is 10 to 20 %, where the position's own ratio is 3 to 7. A direction of rate u*h/friction is slow up to
    u*h/friction^2, 0.03 and 0.007 here: that much is allowed. Sampling the states adds 0.001.
    """
    h, lr, temperature, count = 0.25, 0.1, 1.0, 50_000
    x, v, law = underdamped_stationary_law(
        update, "fixed6.2", "fixed6.2", lr=lr, temperature=temperature, friction=friction, grad=lambda x: h * x
    )
    at = torch.searchsorted(law.flatten().cumsum(0), uniforms((count,), DrawKey(95))).clamp(max=law.numel() - 1)
    param = torch.nn.Parameter(x[at // len(v)].float())
    options = {"weight_format": "fixed6.2", "velocity_format": "fixed6.2", "rescale_velocity": False}
    opt = SGHMC(
        [param],
        lr,
        num_data=1,
        temperature=temperature,
        friction=friction,
        variance_corrected=update == "vc",
        **options,
    )
    opt.velocity_of(param).copy_(v[at % len(v)].float())
    param.grad = h * param.detach()
    found = measured(opt)
    variance = float((law.sum(1) * x**2).sum()) * h
    assert found.achieved > 3 * found.target
    assert variance > 1.1
    assert found.effective_temperature == pytest.approx(variance, abs=h / friction**2)


def test_formats_with_blocks_across_rows_are_measured_whole():
    param = torch.nn.Parameter(torch.zeros(64, 16))
    param.grad = torch.ones_like(param)
    found = measured(sampler(SGHMC, param, velocity_format=parse_format("bfp8-tensor")), max_elements=128)
    assert found.count == 1024
