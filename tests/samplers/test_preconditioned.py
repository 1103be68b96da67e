"""Preconditioned SGLD: Adam's step at T = 0, the written equation, one-step moments, state, taking over optimizers."""

import copy
import logging

import numpy as np
import pytest
import torch
from helpers.stats import assert_moments, assert_normal, assert_same_mean, draws_for_distribution, draws_for_moments

from lightning_lpsgld.formats import parse_format
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers import PreconditionedSGLD

VARIANTS = {
    "psgld": {},
    "full": {"weight_format": "fixed8.5", "gradient_format": "fixed8.8", "accumulator": "full"},
    "naive": {"weight_format": "bfp8", "gradient_format": "fixed8.2", "variance_corrected": False},
    "vc": {"weight_format": "bfp8", "gradient_format": "fixed8.2"},
    "vc-fixed": {"weight_format": "fixed8.6"},
}


def gradients(steps):
    """Gradients of very different sizes, so that a preconditioner matters."""
    size = torch.logspace(-3, 2, 24).reshape(4, 6).double()
    return [size * (normals((4, 6), DrawKey(8, step=step)) + 0.3) for step in range(steps)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_at_temperature_zero_it_is_adam_without_first_moment(weight_decay):
    """In float64, over ten steps, with the same learning rate: what makes a rate tuned for Adam of use."""
    start = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    ours, adams = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    source = torch.optim.Adam([ours], lr=0.01, betas=(0.0, 0.97), eps=1e-6, weight_decay=weight_decay)
    opt = PreconditionedSGLD.from_optimizer(source, num_data=10, temperature=0.0)
    adam = torch.optim.Adam([adams], lr=0.01, betas=(0.0, 0.97), eps=1e-6, weight_decay=weight_decay)
    for grad in gradients(10):
        ours.grad, adams.grad = grad.clone(), grad.clone()
        opt.step()
        adam.step()
    assert torch.allclose(ours, adams, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, start, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_is_the_written_equation_with_the_named_draws(variant):
    """Coupled: second step recomputed here, so that the running moment and its weight take part."""
    options = {"temperature": 0.5, "weight_decay": 0.1, "beta": 0.9, "eps": 1e-3, **VARIANTS[variant]}
    torch_state = torch.get_rng_state()
    param = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 24).reshape(4, 6))
    opt = PreconditionedSGLD([param], 0.01, num_data=50, seed=11, backend="reference", **options)
    first, second = (grad.float() for grad in gradients(2))
    param.grad = first.clone()
    opt.step()
    theta = opt.state[param].get("accumulator", param.detach()).clone()
    moment = opt.state[param]["second_moment"].clone()
    param.grad = second.clone()
    opt.step()

    key = DrawKey(seed=11, step=1)
    weight_key, gradient_key = key.at(stream=stream_id(Role.WEIGHT, 0)), key.at(stream=stream_id(Role.GRADIENT, 0))
    fmt = options.get("weight_format")

    def moved_along(grad):
        force = grad + 0.1 * theta
        second_moment = moment.clone().mul_(0.9).addcmul_(force, force, value=1.0 - 0.9)
        scale = 1.0 / ((second_moment / (0.9 * (1.0 - 0.9) + (1.0 - 0.9))).sqrt() + 1e-3)
        mean, variance = theta - 0.01 * scale * force, 2 * 0.01 * 0.5 / 50 * scale.double()
        noisy = mean + (variance.sqrt() * normals(mean.shape, weight_key)).float()
        if variant in ("psgld", "full"):
            return noisy
        if variant == "naive":
            return quantize(noisy, fmt, key=weight_key, backend="reference")
        return quantize_variance_corrected(mean, variance, fmt, key=weight_key, backend="reference")

    exact = second
    if "gradient_format" in options:
        second = quantize(second, options["gradient_format"], key=gradient_key, backend="reference")
        assert int((moved_along(second) != moved_along(exact)).sum()) >= 3, "rounding the gradient would go unnoticed"
    assert torch.equal(opt.state[param].get("accumulator", param.detach()), moved_along(second))
    if fmt is not None:
        assert torch.equal(quantize(param, fmt, rounding="nearest"), param)
    assert torch.equal(torch.get_rng_state(), torch_state), "a sampler must not touch the global generator"


def test_variance_corrected_step_has_the_mean_and_the_variance_of_each_element():
    """Three weights with gradients 0.1, 1 and 10 and a known second moment: mean θ - ηGf, variance 2ηGT/N."""
    fmt, lr, temperature = parse_format("fixed8.4"), 0.02, 0.05
    gradient = torch.tensor([0.1, 1.0, 10.0])
    scale = 1.0 / (gradient + 1e-5).double()  # one step: V / w is the squared gradient
    variance = 2 * lr * temperature * scale
    assert float(variance.min()) < fmt.gap**2 / 4 < float(variance.max()), "both regimes of Q^vc are wanted"
    reach, fourth = torch.maximum(8.0 * variance.sqrt(), torch.tensor(2 * fmt.gap)), 3 * variance**2
    cells = {"reach": reach, "detect": 0.2, "fourth_moment": fourth + variance * fmt.gap**2}
    count = draws_for_moments(variance, **cells)
    start = torch.tensor([0.5, 0.5 + 0.02, 0.5 + 0.02])  # ηGf = η: the means lie on the grid
    param = torch.nn.Parameter(start.repeat(count, 1))
    param.grad = gradient.repeat(count, 1)
    opt = PreconditionedSGLD([param], lr, num_data=1, temperature=temperature, weight_format=fmt)
    opt.step()
    mean = start.double() - lr * scale * gradient.double()
    assert_moments(param.detach(), mean=mean, variance=variance, **cells)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(variant):
    def build(weights):
        param = torch.nn.Parameter(weights.clone())
        return param, PreconditionedSGLD([param], 0.01, num_data=100, seed=5, **VARIANTS[variant])

    def run(param, opt, grads):
        for grad in grads:
            param.grad = grad.float()
            opt.step()
        return param.detach().clone()

    grads, start = gradients(7), torch.linspace(-1, 1, 24).reshape(4, 6)
    whole = run(*build(start), grads)
    param, opt = build(start)
    half = run(param, opt, grads[:3])
    saved = copy.deepcopy(opt.state_dict())
    resumed, opt = build(half)
    opt.load_state_dict(saved)
    assert torch.equal(run(resumed, opt, grads[3:]), whole)


def test_a_parameter_that_joins_late_is_corrected_from_its_own_first_gradient():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = PreconditionedSGLD(params, 0.1, num_data=10, temperature=0.0, eps=1e-8)
    params[0].grad = torch.ones(3)
    for _ in range(5):
        opt.step()
    params[1].grad = torch.full((3,), 7.0)
    opt.step()
    assert torch.allclose(params[1], torch.full((3,), -0.1), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "beta", "eps", "words"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, 0.98), eps=1e-7), 0.98, 1e-7, "betas[0]"),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.0, 0.98), amsgrad=True), 0.98, 1e-8, "amsgrad"),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, alpha=0.95), 0.95, 1e-8, None),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 0.99, 1e-5, "momentum"),
    ],
)
def test_takes_the_second_moment_of_other_optimizers_and_says_what_it_ignores(make, beta, eps, words, caplog):
    param = torch.nn.Parameter(torch.zeros(2))
    source = make([param])
    with caplog.at_level(logging.WARNING):
        opt = PreconditionedSGLD.from_optimizer(source, num_data=10)
    assert opt.param_groups is source.param_groups
    assert (opt.param_groups[0]["beta"], opt.param_groups[0]["eps"]) == (beta, eps)
    assert [words in record.getMessage() for record in caplog.records] == ([] if words is None else [True])


def test_options_win_over_the_other_optimizer():
    source = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    group = PreconditionedSGLD.from_optimizer(source, num_data=10, beta=0.5, eps=1e-4).param_groups[0]
    assert (group["beta"], group["eps"]) == (0.5, 1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": 1.0}, "`beta` must be finite and >= 0 and < 1, got 1.0"),
        ({"eps": 0.0}, "`eps` must be finite and > 0"),
        ({"freeze_after": 0}, "`freeze_after` must be None or an int >= 1"),
        ({"freeze_after": True}, "got True"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, match):
    with pytest.raises(ValueError, match=match):
        PreconditionedSGLD([torch.nn.Parameter(torch.zeros(2))], 0.1, num_data=10, **options)


# -------------------------------------------------------------------------------------------- a frozen preconditioner


def standard_normal_chains(count, lr, steps, **options):
    """So many independent chains on N(0, 1) with exact gradients; their states after ``steps``, and their G."""
    theta = torch.nn.Parameter(normals((count,), DrawKey(3)).float())
    opt = PreconditionedSGLD([theta], lr, num_data=1, beta=0.99, seed=5, check_finite=False, **options)
    for _ in range(steps):
        theta.grad = theta.detach().clone()
        opt.step()
    state = opt.state[theta]
    return theta.detach().double(), 1.0 / ((state["second_moment"].double() / state["weight"]).sqrt() + 1e-5)


def test_frozen_the_law_is_exactly_that_of_a_step_size_per_weight():
    """Stationary under θ' = (1 - ηG)θ + sqrt(2ηG) ξ: a Gaussian of variance 1/(1 - ηG/2)."""
    lr, detect = 0.02, 0.03
    theta, scale = standard_normal_chains(draws_for_distribution(detect), lr, 1000, freeze_after=400)
    assert_normal(theta * (1.0 - lr * scale / 2).sqrt(), detect=detect)


def test_not_frozen_it_is_too_wide_and_the_more_so_the_shorter_the_steps():
    """What the class's docstring says: towards p(θ|D)|f|, of twice the variance."""
    wide, wider = (
        float(standard_normal_chains(2000, lr, steps)[0].square().mean()) for lr, steps in ((1e-2, 500), (1e-3, 2500))
    )
    error = 2.0 * (2.0 / 2000) ** 0.5  # standard error of a variance of at most 2
    assert 1.0 + 4 * error < wide < wider < 2.0 + 5 * error
    assert wider > 1.5


def test_while_v_freezes_it_is_the_mean_over_the_second_half_of_burn_in():
    param, beta = torch.nn.Parameter(torch.zeros(24, dtype=torch.float64)), 0.9
    opt = PreconditionedSGLD([param], 1e-3, num_data=1, temperature=0.0, beta=beta, freeze_after=20)
    squares = []
    for grad in gradients(30):
        param.grad = grad.flatten()
        squares.append(param.grad.square())
        opt.step()
    running = sum((1 - beta) * beta ** (9 - i) * s for i, s in enumerate(squares[:10]))
    old = 1.0 / (1.0 - beta) - 1.0  # steps that the running mean stands for, when the mean begins
    weight = (old * (1 - beta**10) + 10) / (old + 10)
    state = opt.state[param]
    assert torch.allclose(state["second_moment"], (old * running + sum(squares[10:20])) / (old + 10), rtol=1e-12)
    assert state["weight"] == pytest.approx(weight, rel=1e-12)


def test_a_frozen_preconditioner_is_resumed_and_can_be_left_frozen_for_one_group():
    def build(weights):
        groups = [{"params": [torch.nn.Parameter(w.clone())], "freeze_after": f} for w, f in zip(weights, (4, None))]
        return groups, PreconditionedSGLD(groups, 0.01, num_data=100, weight_format="bfp8")

    def run(groups, opt, grads):
        for grad in grads:
            for group in groups:
                group["params"][0].grad = grad.float()
            opt.step()
        return [group["params"][0].detach().clone() for group in groups]

    start, grads = [torch.linspace(-1, 1, 24).reshape(4, 6)] * 2, gradients(9)
    groups, opt = build(start)
    whole = run(groups, opt, grads)
    frozen, free = (opt.state[group["params"][0]]["second_moment"].clone() for group in groups)
    assert not torch.equal(frozen, free)
    groups, opt = build(start)
    half = run(groups, opt, grads[:5])
    assert torch.equal(opt.state[groups[0]["params"][0]]["second_moment"], frozen)
    saved = copy.deepcopy(opt.state_dict())
    groups, opt = build(half)
    opt.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(run(groups, opt, grads[5:]), whole))


def test_a_parameter_without_gradient_during_burn_in_takes_its_first_one():
    late = torch.nn.Parameter(torch.zeros(3))
    opt = PreconditionedSGLD([late, torch.nn.Parameter(torch.zeros(1))], 0.1, num_data=10, temperature=0.0, eps=1e-8,
                             freeze_after=2)  # fmt: skip
    opt.param_groups[0]["params"][1].grad = torch.ones(1)
    for _ in range(3):
        opt.step()
    late.grad = torch.full((3,), 7.0)
    opt.step()
    assert torch.allclose(late, torch.full((3,), -0.1), rtol=1e-6)


# ------------------------------------------------------------------------------------- cold, on a grid: which mean

COLD, GAP, LOWER = 3000, 1 / 128, 80  # the optimum lies a share of a gap above code 80
#: Grids of that gap: without blocks, of an element, of a run whose largest element stays, of a whole tensor.
GRIDS = {"fixed8.7": 1, "bfp8": 1, "bfp8b4": 4}


def cold_codes(fmt, share, *, beta, rate, steps, first=None, **options):
    """Codes above the lower neighbour after ``steps`` without noise from it; curvature 1, steps of ``rate`` gaps."""
    width = GRIDS[fmt]
    start = torch.full((COLD, width) if width > 1 else (COLD,), LOWER * GAP)
    theta = torch.nn.Parameter(start.clone())
    opt = PreconditionedSGLD([theta], rate * GAP, num_data=1, temperature=0.0, beta=beta, eps=1e-9, weight_format=fmt,
                             seed=9, **options)  # fmt: skip
    for step in range(steps):
        theta.grad = theta.detach() - (LOWER + share) * GAP
        if step == 0 and first is not None:
            theta.grad = torch.full_like(theta, first * GAP)
        opt.step()
    return theta.detach().reshape(COLD, width)[:, -1] / GAP - LOWER


def written_codes(share, *, beta, rate, steps):
    """The same, written down anew: RMSprop with bias correction and stochastic rounding, in units of the gap."""
    random, x, moment = np.random.default_rng(4), np.zeros(20 * COLD), np.zeros(20 * COLD)
    for step in range(1, steps + 1):
        force = x - share
        moment = beta * moment + (1.0 - beta) * force**2
        mean = x - rate * force / (np.sqrt(moment / (1.0 - beta**step)) + 1e-9)
        x = np.floor(mean) + (random.random(len(x)) < mean - np.floor(mean))
    return torch.from_numpy(x)


@pytest.mark.parametrize("corrected", [True, False], ids=["vc", "naive"])
@pytest.mark.parametrize("fmt", GRIDS)
def test_cold_and_following_at_once_the_mean_is_the_middle_of_the_gap(fmt, corrected):
    """Each step is as long from either neighbour, however far from it the optimum is: E[G f] = 0, not E[f] = 0."""
    found = cold_codes(fmt, 0.2, beta=0.0, rate=0.25, steps=40, variance_corrected=corrected)
    assert_same_mean(found, torch.tensor([0.0, 1.0]).repeat(COLD), detect=0.2)


@pytest.mark.parametrize("corrected", [True, False], ids=["vc", "naive"])
@pytest.mark.parametrize("fmt", GRIDS)
def test_cold_and_fixed_the_mean_is_the_optimum(fmt, corrected):
    """G = 1/gap: steps of a quarter of the distance."""
    found = cold_codes(fmt, 0.2, beta=0.0, rate=0.25, steps=60, first=1.0, freeze_after=1, variance_corrected=corrected)
    assert_same_mean(found, torch.full((COLD,), 0.2), detect=0.15)


@pytest.mark.parametrize("fmt", ["fixed8.7", "bfp8"])
def test_cold_between_the_two_it_is_that_of_the_equations(fmt):
    """Where V averages over about as many steps as a code holds; neither end is the answer."""
    options = {"beta": 0.99, "rate": 1 / 64, "steps": 150}
    expected = written_codes(0.2, **options)
    assert 0.25 < float(expected.mean()) < 0.4
    assert_same_mean(cold_codes(fmt, 0.2, **options), expected, detect=0.12)
