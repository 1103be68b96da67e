"""The local learning coefficient of models for which the localized posterior can be integrated."""

import copy
import math

import pytest
import torch
from scipy import integrate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld.predictive import LocalLearningCoefficient
from lightning_lpsgld.samplers import SGLD

COPIES = 6000


class Copies(nn.Module):
    """Independent copies of one small model: every element of the parameter has its own noise, losses add up."""

    def __init__(self, potential, dim, copies=COPIES):
        super().__init__()
        self.w, self.potential = nn.Parameter(torch.zeros(copies, dim)), potential

    def forward(self, batch):
        return self.potential(self.w).sum()


def quadratic(w):
    """Regular: d parameters, coefficient d/2."""
    return 0.5 * (w.square() * torch.tensor([1.0, 0.5, 2.0])).sum(1)


def crossing(w):
    """x^2 y^2: two lines of minima that cross, coefficient 1/2 where a regular model of two parameters has 1."""
    return (w[:, 0] * w[:, 1]).square()


def flat(w):
    """One direction does nothing: coefficient 1/2."""
    return 0.5 * w[:, 0].square() + 0.0 * w[:, 1]


def localized_moments(potential, nbeta, gamma):
    """Mean and deviation of nbeta L under exp(-nbeta L - gamma |w|^2 / 2), by quadrature in the plane."""
    reach = 7.0 / math.sqrt(gamma)

    def moment(power):
        def integrand(y, x):
            loss = nbeta * float(potential(torch.tensor([[x, y]], dtype=torch.float64)))
            return loss**power * math.exp(-loss - gamma * (x * x + y * y) / 2)

        return 4 * integrate.dblquad(integrand, 0, reach, 0, reach, epsabs=1e-7, epsrel=1e-5)[0]

    total, first, second = moment(0), moment(1), moment(2)
    return first / total, math.sqrt(second / total - (first / total) ** 2)


def estimate(potential, dim, nbeta, gamma, step, burn_in, copies=COPIES, **options):
    run = LocalLearningCoefficient(4, gamma, nbeta, step=step, burn_in=burn_in, every=burn_in // 4, chains=1, **options)
    return run(Copies(potential, dim, copies), lambda module, batch: module(batch), [None]).value / copies


@pytest.mark.parametrize("formats", [{}, {"weight_format": "fixed8.7", "gradient_format": "bfp8"}])
def test_a_regular_model_has_half_its_parameters(formats):
    """d/2 less what the localization takes; six standard errors over 6000 copies, steps' own bias of at most 1.5 %.

    The deviation of nbeta L of a Gaussian is sqrt(d/2), so an error of 10 % of the coefficient is seen. In 8 bits the
    grid's gap is a ninth of the narrowest deviation and the step's variance is above the rounding's.
    """
    nbeta, gamma, step = 100.0, 10.0, 2.5e-4
    curvatures = [1.0, 0.5, 2.0]
    exact = sum(0.5 * nbeta * a / (nbeta * a + gamma) for a in curvatures)
    assert exact == pytest.approx(1.5, rel=0.12)
    found = estimate(quadratic, 3, nbeta, gamma, step, 400, **formats)
    bias = 0.25 * step * (nbeta * 2.0 + gamma)
    assert bias < 0.015
    assert abs(found - exact) <= 6 * math.sqrt(1.5 / COPIES) + bias * exact


@pytest.mark.parametrize("potential", [crossing, flat])
def test_a_singular_model_has_less(potential):
    """The exact localized expectation by quadrature; it is below 1/2, where a regular model of two parameters has 1.

    The localization takes its part (the lines of the crossing are cut at a few 1/sqrt(gamma)): what is tested is the
    number at this nbeta and gamma, with an error of at most 15 % to be seen.
    """
    nbeta, gamma, step = 1000.0, 40.0, 2e-4
    exact, deviation = localized_moments(potential, nbeta, gamma)
    assert 0.1 < exact < 0.5
    copies = 24_000
    found = estimate(potential, 2, nbeta, gamma, step, 1000, copies)
    curvature = nbeta * (1.0 if potential is flat else 2 * (2.0 / math.sqrt(gamma)) ** 2)
    bias = 0.25 * step * (curvature + gamma)
    bound = 6 * deviation / math.sqrt(copies) + bias * exact
    assert bound < 0.15 * exact
    assert abs(found - exact) <= bound


def formula(weight, gradient, initial, nbeta, gamma, step):
    """Drift of devinterp's SGLD, written out: dw = nbeta grad + localization (w - w0); w -= lr / 2 dw."""
    return weight - 0.5 * step * (nbeta * gradient + gamma * (weight - initial))


def package(weight, gradient, initial, nbeta, gamma, step):
    """The same by the package itself, its noise turned off."""
    optim = pytest.importorskip("devinterp.optim.sgld")
    param = nn.Parameter(initial.clone())
    opt = optim.SGLD([param], lr=step, noise_level=0.0, localization=gamma, nbeta=nbeta)
    param.data.copy_(weight)
    param.grad = gradient
    opt.step()
    return param.detach()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Warning")
@pytest.mark.parametrize("drift", [formula, package])
def test_chain_and_estimate_are_devinterps(drift):
    """A chain by devinterp's step with the very noise of ours: its states, and nbeta (mean loss - initial loss)."""
    nbeta, gamma, step, draws = 50.0, 7.0, 1e-3, 6
    curvature, seen, module = torch.tensor([1.0, 0.5, 2.0]), [], Copies(quadratic, 3, 500)
    with torch.no_grad():
        module.w.fill_(0.5)

    def loss(m, batch):
        seen.append(m.w.detach().clone())
        return m(batch)

    found = LocalLearningCoefficient(draws, gamma, nbeta, step=step, burn_in=0, chains=1, seed=3)(module, loss, [None])
    states = [seen[0], *seen[1::3]]  # calls: gradient, draw, initial; gradient ...
    still = nn.Parameter(torch.zeros(500, 3))
    plain = SGLD([still], step * nbeta / 2, num_data=1, temperature=1 / nbeta, seed=3)
    mine = initial = states[0]
    losses = []
    for number in range(draws):
        before = still.detach().clone()
        still.grad = torch.zeros_like(still)
        plain.step()
        noise = still.detach() - before
        assert noise.double().var().item() == pytest.approx(step, rel=6 * math.sqrt(2 / 1500))
        mine = drift(mine, mine * curvature, initial, nbeta, gamma, step) + noise
        torch.testing.assert_close(states[number + 1], mine, rtol=1e-5, atol=1e-6)
        losses.append(quadratic(mine).sum().item())
    estimate = nbeta * (sum(losses) / draws - quadratic(initial).sum().item())
    assert found.value == pytest.approx(estimate, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"accumulator": "full"}, {"variance_corrected": False}])
def test_the_pull_is_that_of_weight_decay_to_the_initial_weights(options):
    """In 8 bits, bit for bit: the chain is SGLD's with prior_mean="initial", whatever else it is given."""
    torch.manual_seed(0)
    nbeta, gamma, step = 50.0, 7.0, 1e-3
    formats = {"weight_format": "bfp8", "gradient_format": "bfp8", **options}
    module, seen = Copies(quadratic, 3, 40), []
    nn.init.normal_(module.w)
    param = nn.Parameter(module.w.detach().clone())

    def loss(m, batch):
        seen.append(m.w.detach().clone())
        return m(batch)

    LocalLearningCoefficient(5, gamma, nbeta, step=step, burn_in=0, chains=1, seed=3, **formats)(module, loss, [None])
    opt = SGLD(
        [param], step * nbeta / 2, num_data=1, temperature=1 / nbeta, weight_decay=gamma / nbeta, prior_mean="initial",
        seed=3, **formats,
    )  # fmt: skip
    opt.round_parameters_()
    for number in range(5):
        assert torch.equal(seen[3 * number], param.detach())
        param.grad = param.detach() * torch.tensor([1.0, 0.5, 2.0])
        opt.step()
        assert torch.equal(seen[3 * number + 1], param.detach())
        assert torch.equal(seen[3 * number + 2], module.w.detach()), "the loss at w* is of the unrounded weights"


def test_the_module_is_as_before_and_chains_differ():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    loader = DataLoader(TensorDataset(torch.randn(40, 3), torch.randint(2, (40,))), 20)
    before, module[0].weight.grad = copy.deepcopy(module.state_dict()), torch.ones(4, 3)
    run = LocalLearningCoefficient(5, 100.0, step=1e-5, burn_in=2, chains=2)
    found = run(module, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), loader)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module[0].weight.grad, torch.ones(4, 3))
    assert module[2].weight.grad is None
    assert found.nbeta == pytest.approx(40 / math.log(40))
    assert found.excess.shape == (2, 5)
    assert not torch.equal(found.excess[0], found.excess[1])
    assert found.standard_error > 0
    again = run(module, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), loader)
    assert torch.equal(again.excess, found.excess)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "`num_draws` must be an int >= 1, got 0"),
        ({"gamma": -1.0}, "`gamma` must be positive"),
        ({"nbeta": 0.0}, "`nbeta` must be positive"),
        ({"step": math.inf}, "`step` must be positive and finite"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocalLearningCoefficient(**options)


def test_what_follows_from_the_arguments_is_not_taken_twice():
    with pytest.raises(TypeError, match="`weight_decay` of the sampler follows from `step`"):
        LocalLearningCoefficient(weight_decay=0.1)


def test_what_is_missing_is_named():
    module = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="the number of examples n is unknown"):
        LocalLearningCoefficient()(module, lambda m, b: m(b).sum(), [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="there is no batch"):
        LocalLearningCoefficient(nbeta=1.0)(module, lambda m, b: m(b).sum(), [])
