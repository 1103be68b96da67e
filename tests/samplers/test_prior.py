"""Weight decay towards the initial weights: exact on the grid, with every sampler and backend, in the state."""

import copy

import pytest
import torch

from lightning_lpsgld.ops import quantize
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

OPTIONS = {SGLD: {}, PreconditionedSGLD: {}, SGHMC: {"friction": 1.0}}
MODES = {
    "vc": {"weight_format": "bfp8"}, "naive": {"weight_format": "bfp8", "variance_corrected": False},
    "full": {"weight_format": "bfp8", "accumulator": "full"}, "float": {},
}  # fmt: skip


def weight(scale=1.0):
    return torch.nn.Parameter(scale * torch.linspace(-0.9, 0.7, 24).reshape(4, 6).sin())


def make(cls, param, **options):
    return cls([param], 0.1, num_data=100, weight_decay=0.5, **{**OPTIONS[cls], **options})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", OPTIONS)
def test_at_the_mean_without_gradient_nothing_moves(cls, mode):
    """θ = μ on the grid, g = 0, T = 0: not a bit moves, with momentum neither; with mean zero it would at once."""
    moved = []
    for prior_mean in ("initial", "zero"):
        param = torch.nn.Parameter(quantize(weight().detach(), "bfp8", rounding="nearest"))
        start = param.detach().clone()
        opt = make(cls, param, temperature=0.0, prior_mean=prior_mean, **MODES[mode])
        for _ in range(30):
            param.grad = torch.zeros_like(param)
            opt.step()
        moved.append(not torch.equal(param, start))
    assert moved == [False, True]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_that_of_the_loss_with_the_penalty_written_into_it(mode, backend):
    """Coupled: λ|θ-μ|²/2 added to the loss, no weight decay, the same draws: equal bits, on fused backends too."""
    chains = []
    for explicit in (False, True):
        param = weight()
        options = {"seed": 3, "temperature": 0.5, "backend": backend, **MODES[mode]}
        opt = make(SGLD, param, prior_mean="zero" if explicit else "initial", **options)
        if explicit:
            opt.param_groups[0]["weight_decay"] = 0.0
        mean = param.detach().clone()
        opt.round_parameters_()
        for step in range(5):
            param.grad = torch.full_like(param, 0.1 * (step - 2))
            if explicit:
                theta = opt.state[param]["accumulator"] if mode == "full" else param.detach()
                param.grad = param.grad + (theta - mean) * 0.5
            opt.step()
        chains.append(param.detach().clone())
    assert torch.equal(*chains)


def test_a_rounded_gradient_is_rounded_before_the_pull():
    """The pull is not on the gradient's grid: |λ(θ-μ)| far below its gap still acts, in the mean and in every step."""
    param = weight()
    opt = make(SGLD, param, temperature=0.0, prior_mean="initial", gradient_format="fixed8.2")
    mean = opt.prior_mean_of(param).clone()
    with torch.no_grad():
        param.add_(0.125)
    param.grad = torch.full_like(param, 0.25)  # on the gradient's grid
    before = param.detach().clone()
    opt.step()
    assert torch.equal(param, before - 0.1 * (0.25 + (before - mean) * 0.5))


@pytest.mark.parametrize("cls", OPTIONS)
def test_the_pull_follows_the_closed_form(cls):
    """Unrounded SGLD with g = 0, T = 0: θ_t - μ = (1-ηλ)^t (θ_0 - μ); the others come closer to μ, not to zero."""
    param = weight()
    opt = make(cls, param, temperature=0.0, prior_mean="initial")
    mean = opt.prior_mean_of(param).clone()
    with torch.no_grad():
        param.add_(0.5)
    for _ in range(60):
        param.grad = torch.zeros_like(param)
        opt.step()
    left = (param - mean).detach()
    if cls is SGLD:
        assert torch.allclose(left, torch.full_like(left, 0.5 * 0.95**60), rtol=1e-4, atol=1e-6)
    assert bool((left.abs() < 0.4).all())


def test_compensated_gradients_leave_the_pull_as_it_is():
    """With q the likelihood's part is divided, the prior's is not."""
    param = weight()
    opt = make(SGLD, param, temperature=0.0, prior_mean="initial")
    mean = opt.prior_mean_of(param).clone()
    with torch.no_grad():
        param.add_(0.5)
    before = param.detach().clone()
    opt.compensate(param, 0.25)
    param.grad = torch.full_like(param, 0.1)
    opt.step()
    assert torch.allclose(param, before - 0.1 * (0.1 / 0.25 + 0.5 * (before - mean)), atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", OPTIONS)
def test_the_mean_is_in_the_state_and_a_chain_goes_on_bitwise(cls, mode):
    options = {"seed": 5, "temperature": 0.3, "prior_mean": "initial", **MODES[mode]}

    def steps(param, opt, numbers):
        for number in numbers:
            param.grad = torch.full_like(param, 0.05 * number)
            opt.step()

    param = weight()
    opt = make(cls, param, **options)
    opt.round_parameters_()
    steps(param, opt, range(3))
    saved, here = copy.deepcopy(opt.state_dict()), param.detach().clone()
    steps(param, opt, range(3, 6))
    again = torch.nn.Parameter(here)
    resumed = make(cls, again, **options)
    resumed.load_state_dict(saved)
    steps(again, resumed, range(3, 6))
    assert torch.equal(param, again)
    assert torch.equal(resumed.prior_mean_of(again), weight().detach()), "μ is the weight before it was rounded"


def test_statistics_are_of_the_step_about_the_mean():
    """At θ = μ the mean of a step is θ itself: rounding has no variance to add; with mean zero it has."""
    reports = {}
    for prior_mean in ("initial", "zero"):
        param = torch.nn.Parameter(quantize(weight().detach(), "fixed8.6", rounding="nearest"))
        opt = make(SGLD, param, temperature=1e-6, prior_mean=prior_mean, weight_format="fixed8.6", seed=0)
        opt.measure()
        param.grad = torch.zeros_like(param)
        opt.step()
        (reports[prior_mean],) = opt.measured
    assert reports["initial"].achieved < 0.01 * reports["zero"].achieved


def test_what_the_mean_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`prior_mean` must be 'zero' or 'initial', got 'centre'"):
        make(SGLD, weight(), prior_mean="centre")


@pytest.mark.parametrize("mode", MODES)
def test_a_mean_that_is_told_is_that_of_weights_that_began_there(mode):
    """Bit for bit the chain whose initial weights these were, moved to where this one begins."""
    start, mean, chains = weight(0.5), weight().detach(), []
    for told in (True, False):
        param = torch.nn.Parameter((start if told else weight()).detach().clone())
        opt = make(SGLD, param, prior_mean="initial", seed=3, temperature=0.5, **MODES[mode])
        if told:
            opt.centre_prior({param: mean})
        else:
            assert torch.equal(opt.prior_mean_of(param), mean)
            with torch.no_grad():
                param.copy_(start)
        opt.round_parameters_()
        for step in range(4):
            param.grad = torch.full_like(param, 0.1 * step)
            opt.step()
        chains.append(param.detach().clone())
    assert torch.equal(*chains)


def test_means_that_do_not_fit_are_refused():
    param = weight()
    with pytest.raises(ValueError, match=r"must have its shape \(4, 6\), got \(3,\)"):
        make(SGLD, param, prior_mean="initial").centre_prior({param: torch.zeros(3)})
    with pytest.raises(ValueError, match="`centre_prior` needs prior_mean='initial', got 'zero'"):
        make(SGLD, param).centre_prior({param: torch.zeros(4, 6)})
