"""SGHMC: the exact integrator, its stationary law, its low-precision forms, and the ordering of the methods."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from helpers.stats import assert_moments, draws_for_moments
from scipy import stats
from scipy.linalg import solve_discrete_lyapunov

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id, uniforms
from lightning_lpsgld.samplers import SGHMC
from lightning_lpsgld.samplers.underdamped import exact_flow, velocity_scale

#: (u, γ, η) -> stationary Var x of U = x²/2: minus; plus; minus with independent noise; plus with independent noise.
#: NaN: the published sign diverges.
PUBLISHED = {
    (2, 3, 0.09): (1.031, 1.440, 0.824, 1.148),
    (1, 3, 0.1): (1.017, 1.435, 0.793, 1.117),
    (7, 4, 0.01): (1.009, 1.069, 0.970, 1.028),
    (2, 2, 0.01): (1.005, 1.036, 0.985, 1.015),
    (2, 2, 0.1): (1.053, 1.421, 0.889, 1.197),
    (2, 3, 1.0): (1.438, math.nan, 1.209, math.nan),
}


def sampler(start, lr, velocity=None, **options):
    param = torch.nn.Parameter(start.clone())
    opt = SGHMC([param], lr, **{"num_data": 1, "seed": 3, **options})
    if velocity is not None:
        opt.velocity_of(param).copy_(velocity)
    return param, opt


def one_step(start, grad, lr, velocity=None, **options):
    param, opt = sampler(start, lr, velocity, **options)
    param.grad = grad.clone()
    opt.step()
    return param.detach().clone(), opt.state[param]["velocity"].clone()


def linear_map(lr, **options):
    """The map of (x, v) that the optimizer makes for U = x²/2 at T = 0, read off unit vectors."""
    x, v = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.stack(one_step(x, x, lr, v, temperature=0.0, **options))


def noise_covariance(lr, **options):
    """The covariance of the optimizer's noise: it is linear in two known normal draws, so two coefficients each."""
    zero = torch.zeros(64, dtype=torch.float64)
    noise = torch.stack(one_step(zero, zero, lr, **options), dim=1)
    keys = (DrawKey(3, stream=stream_id(role, 0)) for role in (Role.WEIGHT, Role.VELOCITY))
    z = torch.stack([normals((64,), key) for key in keys], dim=1)
    factor, residual = torch.linalg.lstsq(z, noise).solution, None
    residual = (z @ factor - noise).abs().max()
    assert residual <= 1e-12 * noise.abs().max(), "the noise is not linear in its two draws"
    return factor.T @ factor


def stationary_variance(a, covariance):
    if torch.linalg.eigvals(a).abs().max() >= 1:
        return math.nan
    return float(solve_discrete_lyapunov(a.numpy(), covariance.numpy())[0, 0])


# ------------------------------------------------------------------------------------------------- the exact integrator


def exact_series(h, terms=60):
    """h + e - 1 and 2h + 4e - e² - 3 in rational arithmetic, e = exp(-h) by its series."""
    h = Fraction(h)
    e = sum((-h) ** k / math.factorial(k) for k in range(terms))
    return float(h + e - 1), float(2 * h + 4 * e - e * e - 3)


@pytest.mark.parametrize("h", [1e-9, 1e-4, 0.01, 0.27, 0.9999, 1.0, 3.0])
def test_coefficients_of_small_steps_do_not_cancel(h):
    """Against exact fractions, to 1e-14 relative: the closed form in float64 has no digit left below h = 1e-5."""
    flow = exact_flow(h, 1.0, 1.0)
    moved, spread = exact_series(h)
    assert flow.shift == pytest.approx(moved, rel=1e-14)
    assert flow.var_x == pytest.approx(spread, rel=1e-14)
    assert flow.cov**2 < flow.var_x * flow.var_v


def test_two_half_steps_are_one_whole_step():
    """Without a gradient the flow is a semigroup: map and covariance of two steps compose to those of one."""
    half, whole = (exact_flow(lr, 3.0, 2.0) for lr in (0.35, 0.7))
    a, cov = (
        torch.tensor([[1.0, half.carry], [0.0, half.keep]], dtype=torch.float64),
        torch.tensor([[half.var_x, half.cov], [half.cov, half.var_v]], dtype=torch.float64),
    )
    both = a @ cov @ a.T + cov
    expected = torch.tensor([[whole.var_x, whole.cov], [whole.cov, whole.var_v]], dtype=torch.float64)
    assert torch.allclose(both, expected, rtol=1e-12, atol=0)
    assert (a @ a)[0, 1] == pytest.approx(whole.carry, rel=1e-12)


@pytest.mark.parametrize(("setting", "published"), PUBLISHED.items())
def test_full_precision_has_the_stationary_variance_of_the_right_sign(setting, published):
    """Lyapunov's equation for the map and the noise of the optimizer itself, to the published three decimals."""
    u, gamma, lr = setting
    options = {"friction": gamma, "inverse_mass": u}
    for drift, expected in (("corrected", published[0]), ("paper", published[1])):
        covariance = noise_covariance(lr, **options)
        found = stationary_variance(linear_map(lr, **options, drift=drift), covariance)
        assert found == pytest.approx(expected, abs=5.1e-4, nan_ok=True)
        independent = torch.diag(covariance.diagonal())
        found = stationary_variance(linear_map(lr, **options, drift=drift), independent)
        assert found == pytest.approx(published[2 + (drift == "paper")], abs=5.1e-4, nan_ok=True)


@pytest.mark.parametrize(("temperature", "num_data"), [(0.1, 1), (1.0, 50)])
def test_temperature_and_num_data_scale_the_noise_only(temperature, num_data):
    options = {"friction": 3.0, "inverse_mass": 2.0}
    one, scaled = noise_covariance(0.1, **options), None
    scaled = noise_covariance(0.1, **options, temperature=temperature, num_data=num_data)
    assert torch.allclose(scaled, one * temperature / num_data, rtol=1e-12, atol=0)


def test_temperature_zero_is_descent_with_momentum():
    """The optimizer's map is the flow's, is stable, and is SGD(a, m) with η = sqrt(a/u), γ = (1 - m)/η to O(η)."""
    lr, gamma = 0.05, 1.5
    a = linear_map(lr, friction=gamma)
    flow = exact_flow(lr, gamma, 1.0)
    expected = torch.tensor([[1 - flow.shift, flow.carry], [-flow.kick, flow.keep]], dtype=torch.float64)
    assert torch.allclose(a, expected, rtol=1e-14, atol=0)
    assert torch.linalg.eigvals(a).abs().max() < 1
    rate, momentum = 1e-6, 0.99
    small = exact_flow(rate**0.5, (1 - momentum) / rate**0.5, 1.0)
    assert small.keep == pytest.approx(momentum, rel=1e-3)
    assert small.kick * small.carry == pytest.approx(rate, rel=2e-2)


# ------------------------------------------------------------------------------------------------------- low precision

TOY = {"friction": 3.0, "inverse_mass": 2.0}


@pytest.mark.parametrize(
    ("velocity_format", "drift"),
    [(None, "corrected"), ("fixed8.4", "corrected"), ("bfp8", "corrected"), ("fixed8.4", "paper")],
)
def test_variance_corrected_step_has_all_moments_of_the_noise(velocity_format, drift):
    """Means, variances and covariance of one VC step at the toy's setting, from one point, at declared rates.

    The covariance is tested as the variance of x'/sd + v'/sd, which is 2 + 2ρ; independent noise (ρ = 0, what the paper
    prints) has 2, and the toy has ρ = 0.84. A tenth of any variance is detected.
    """
    fmt, lr = parse_format("fixed8.4"), 0.09
    flow = exact_flow(lr, 3.0, 2.0)
    assert flow.var_x > fmt.gap**2 / 4, "the setting must be one where Q^vc reaches the position's variance"
    sds = flow.var_x**0.5, flow.var_v**0.5
    rho, shift = (flow.cov / (sds[0] * sds[1]), flow.shift) if drift == "corrected" else (0.0, -flow.shift)
    cells = {"reach": 14.0, "detect": 0.1, "fourth_moment": 20.0}
    count = draws_for_moments(torch.tensor([1.0, 1.0, 2 + 2 * rho], dtype=torch.float64), **cells)
    x, v, g = torch.full((count,), 0.5), torch.full((count,), 0.3), torch.full((count,), 0.7)
    new, velocity = one_step(x, g, lr, v, weight_format=fmt, velocity_format=velocity_format, drift=drift, **TOY)
    a = (new.double() - (0.5 + flow.carry * 0.3 - shift * 0.7)) / sds[0]
    b = (velocity.double() - (flow.keep * 0.3 - flow.kick * 0.7)) / sds[1]
    samples = torch.stack([a, b, a + b], dim=1)
    assert_moments(samples, mean=0.0, variance=torch.tensor([1.0, 1.0, 2 + 2 * rho]), **cells)
    assert torch.equal(quantize(new, fmt, rounding="nearest"), new)


@pytest.mark.parametrize("drift", ["corrected", "paper"])
def test_rescaled_velocity_is_on_the_grid_times_a_power_of_two(drift):
    """|v| far below the gap of fixed8.4: its scale brings it onto the grid, exactly."""
    start = torch.linspace(-1, 1, 64)
    param, opt = sampler(
        quantize(start, "fixed8.4", rounding="nearest"), 0.05, num_data=10_000, temperature=0.01, drift=drift,
        weight_format="fixed8.4", velocity_format="fixed8.4", **TOY,
    )  # fmt: skip
    for _ in range(3):
        param.grad = 1e-3 * param.detach().sin()
        opt.step()
    state = opt.state[param]
    scale = float(state["velocity_scale"])
    assert math.frexp(scale)[0] == 0.5
    assert scale < 1
    units = state["velocity"] / scale
    assert torch.equal(quantize(units, "fixed8.4", rounding="nearest"), units)
    assert units.unique().numel() > 10
    assert units.abs().max() < parse_format("fixed8.4").max, "noise was clipped by the scale"


def test_velocity_scale_is_the_smallest_that_holds_mean_and_noise():
    fmt = parse_format("fixed8.4")
    assert float(velocity_scale(torch.tensor([fmt.max, -1.0]), 0.0, fmt)) == 1.0
    assert float(velocity_scale(torch.tensor([fmt.max * 1.0001]), 0.0, fmt)) == 2.0
    assert float(velocity_scale(torch.tensor([fmt.max / 4]), 0.0, fmt)) == 0.25
    assert float(velocity_scale(torch.zeros(2), 0.0, fmt)) * fmt.gap == 2.0**-126
    assert float(velocity_scale(torch.zeros(2), 1.0, fmt)) == 1.0  # 6.77 of 7.9375


VARIANTS = {
    "sghmc": {},
    "full": {"weight_format": "fixed8.5", "gradient_format": "fixed8.8", "accumulator": "full"},
    "naive": {"weight_format": "bfp8", "velocity_format": "bfp8", "variance_corrected": False},
    "naive-fixed": {"weight_format": "fixed8.6", "velocity_format": "fixed8.6", "variance_corrected": False},
    "vc": {"weight_format": "bfp8", "velocity_format": "bfp8", "gradient_format": "bfp8"},
    "vc-fixed": {"weight_format": "fixed8.6", "velocity_format": "fixed8.4"},
    "vc-float-velocity": {"weight_format": "fixed8.6"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(variant):
    start = torch.linspace(-1, 1, 12).reshape(3, 4)
    options = {"num_data": 100, "weight_decay": 0.1, **TOY, **VARIANTS[variant]}

    def run(param, opt, steps):
        for _ in range(steps):
            param.grad = param.detach().cos()
            opt.step()
        return param.detach().clone()

    whole = run(*sampler(start, 0.1, **options), 7)
    param, opt = sampler(start, 0.1, **options)
    half = run(param, opt, 3)
    saved = copy.deepcopy(opt.state_dict())
    resumed, opt = sampler(half, 0.1, **options)
    opt.load_state_dict(saved)
    assert torch.equal(run(resumed, opt, 4), whole)
    assert opt.steps == 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_backends_agree(variant, backend):
    """Coupled: what is computed before rounding is the same linear map, so the same draws give the same bits.

    Where the noise is not rounded, the fused kernel's float32 normals differ in the last places, as SGLD's do.
    """
    start = torch.linspace(-1, 1, 40).reshape(4, 10)
    options = {"num_data": 10, **TOY, **VARIANTS[variant]}
    reference = one_step(start, start.cos(), 0.1, backend="reference", **options)
    other = one_step(start, start.cos(), 0.1, backend=backend, **options)
    rounded = "weight_format" in options and "velocity_format" in options
    reach = 0.0 if rounded or backend == "reference" else 8 * 2.0**-24 * (6.77 + 1.0)
    for a, b in zip(reference, other):
        assert bool(((a - b).abs() <= reach).all())


def test_bfloat16_weights_keep_a_float32_velocity_through_a_checkpoint():
    param, opt = sampler(torch.linspace(-1, 1, 8).bfloat16(), 0.1, weight_format="bfp8", **TOY)
    param.grad = torch.ones_like(param)
    opt.step()
    saved = opt.state[param]["velocity"].clone()
    other, again = sampler(torch.zeros(8).bfloat16(), 0.1, weight_format="bfp8", **TOY)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.state[other]["velocity"].dtype == torch.float32
    assert torch.equal(again.state[other]["velocity"], saved)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"friction": 0.0}, "`friction` must be finite and > 0"),
        ({"inverse_mass": -1.0}, "`inverse_mass` must be finite and > 0"),
        ({"drift": "plus"}, "`drift` must be 'corrected' or 'paper'"),
        ({"accumulator": "full", "velocity_format": "bfp8"}, "`velocity_format` has no place"),
        ({"velocity_format": "fixed32.16"}, "`word_length` must be in"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        sampler(torch.zeros(2), 0.1, **{"friction": 1.0, **options})


# ------------------------------------------------------------------------------------------------------- published toys

#: Method -> options but for the formats. The settings are the papers' toys with larger steps and gaps, at
#: Var ξx / (Δ²/4) of 0.9 and 2: at theirs (fixed8.4, η = 0.09) naive rounding is 0.7 % too wide, which few draws see.
METHODS = {
    "full": {"accumulator": "full"},
    "naive": {"velocity_format": "fixed8.4", "variance_corrected": False},
    "vc": {"velocity_format": "fixed8.4"},
}


def chains(method, fmt, start, velocity, gradient, lr, steps, **options):
    """Positions of independent chains, one per element (of the accumulator where there is one)."""
    param, opt = sampler(start, lr, velocity, weight_format=fmt, **options, **METHODS[method])
    opt.round_parameters_()
    for _ in range(steps):
        param.grad = gradient(param.detach())
        opt.step()
    return opt.state[param].get("accumulator", param.detach()).double()


def toy_law(method, lr, gap):
    """Stationary covariance of (x, v) for U = x²/2: Lyapunov's equation with what the rounding adds.

    Naive rounding adds p(1-p)Δ² to the position, a sixth of Δ² on average; that of the velocity is a thousandth of its
    noise. With a full accumulator the same sits on the gradient, taken at the rounded weight. VC adds nothing.
    """
    flow = exact_flow(lr, TOY["friction"], TOY["inverse_mass"])
    a = torch.tensor([[1 - flow.shift, flow.carry], [-flow.kick, flow.keep]], dtype=torch.float64)
    noise = torch.tensor([[flow.var_x, flow.cov], [flow.cov, flow.var_v]], dtype=torch.float64)
    through = {"naive": [1.0, 0.0], "full": [flow.shift, flow.kick], "vc": [0.0, 0.0]}[method]
    b = torch.tensor(through, dtype=torch.float64)
    return torch.tensor(solve_discrete_lyapunov(a.numpy(), (noise + gap**2 / 6 * b[:, None] * b).numpy()))


@pytest.mark.parametrize("method", METHODS)
def test_gaussian_toy_vc_and_full_match_and_naive_is_over_dispersed(method):
    """Second moments of U = x²/2 at declared rates: 6 % of the variance is detected, naive rounding adds 12 %."""
    lr, count, gap = 0.3, 140_000, 0.5
    law = toy_law(method, lr, gap)
    z = torch.stack([normals((count,), DrawKey(s)) for s in (1, 2)])
    x, v = (torch.linalg.cholesky(law) @ z).float()
    found = chains(method, "fixed8.1", x, v, lambda x: x, lr, 12, **TOY)
    variance = float(law[0, 0])
    assert_moments(found, mean=0.0, variance=variance, reach=8.0, detect=0.06, fourth_moment=3 * variance**2)
    exact = stationary_variance(linear_map(lr, **TOY), noise_covariance(lr, **TOY))
    assert (variance > 1.12 * exact) if method == "naive" else (variance < 1.01 * exact)


def mixture_gradient(x):
    """Of U = -log(exp(-2(x-1)²) + exp(-2(x+1)²))."""
    return 4.0 * (x - torch.tanh(4.0 * x))


def test_mixture_toy_orders_the_methods():
    """Spread about the two centres after 20 steps from the target: naive exceeds -F, VC is closer to it.

    Both statements are two-sample comparisons of means at one-sided error rates of 1e-6 (normal limit).
    """
    count, lr = 100_000, 0.3
    centre = torch.where(uniforms((count,), DrawKey(1)) < 0.5, 1.0, -1.0)
    x = (centre + 0.5 * normals((count,), DrawKey(2))).float()
    v = normals((count,), DrawKey(3)).float()
    spread = {
        method: (chains(method, "fixed8.2", x, v, mixture_gradient, lr, 20, friction=3.0).abs() - 1.0).square()
        for method in METHODS
    }
    sigma = -stats.norm.ppf(1e-6)

    def difference(method):
        other, full = spread[method], spread["full"]
        return float(other.mean() - full.mean()), sigma * float((other.var() + full.var()).div(count).sqrt())

    excess, error = difference("naive")
    assert excess > error, f"naive: {excess:.4f} +- {error:.4f}"
    corrected, error_vc = difference("vc")
    assert abs(corrected) + error_vc < excess, f"vc: {corrected:.4f} +- {error_vc:.4f}, naive: {excess:.4f}"
