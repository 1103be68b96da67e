"""SVRG and HALP in a plain loop: rates, bookkeeping, and everything that a second evaluation could leave behind."""

from __future__ import annotations

import copy
import io
import logging
import math
import re

import pytest
import torch
from helpers.stats import assert_moments
from sklearn.datasets import load_digits
from torch import nn

from lightning_lpsgld.formats import FixedPoint
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey
from lightning_lpsgld.samplers import HALP, SGLD, SVRG, full_gradient
from lightning_lpsgld.samplers.halp import offset_gap
from lightning_lpsgld.samplers.variance_reduced import corrected_gradient

DOUBLE = torch.float64


class LeastSquares:
    """f(w) = |Xw - y|^2 / 2n with its gradients in closed form, float64."""

    def __init__(self, rows: int, features: int, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, features, dtype=DOUBLE, generator=draw)
        truth = torch.randn(features, dtype=DOUBLE, generator=draw)
        self.y = self.x @ truth + 0.5 * torch.randn(rows, dtype=DOUBLE, generator=draw)
        self.hessian = self.x.T @ self.x / rows
        self.mu = float(torch.linalg.eigvalsh(self.hessian)[0])
        self.solution = torch.linalg.solve(self.hessian, self.x.T @ self.y / rows)
        self.rows = rows

    def gradient(self, w, rows=None):
        x, y = (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])
        return x.T @ (x @ w.detach() - y) / len(y)

    def norms(self, make, *, epochs, steps, batch):
        """Gradient norm at the start of each epoch, and the largest |w* - centre| in units of the box."""
        w = nn.Parameter(torch.zeros(self.x.shape[1], dtype=DOUBLE))
        opt = make([w])
        order = torch.Generator().manual_seed(1)
        norms, boxes = [], []
        for _ in range(epochs):
            if not isinstance(opt, SGLD):
                opt.recentre(lambda: setattr(w, "grad", self.gradient(w)))
                state = opt.state[w]
                if isinstance(opt, HALP) and isinstance(opt.offset_format, FixedPoint):
                    reach = state["gap"] * opt.offset_format.code_max
                    boxes.append(float((self.solution - w.detach()).abs().max()) / reach)
            norms.append(float(self.gradient(w).norm()))
            for _ in range(steps):
                rows = torch.randint(self.rows, (batch,), generator=order)
                opt.step(lambda rows=rows: setattr(w, "grad", self.gradient(w, rows)))
        return torch.tensor(norms, dtype=DOUBLE), boxes


def slope(norms):
    """Least-squares slope of the log gradient norm per epoch."""
    epochs = torch.arange(len(norms), dtype=DOUBLE)
    centred = epochs - epochs.mean()
    return float((centred * norms.log()).sum() / centred.square().sum())


@pytest.fixture(scope="module")
def regression():
    return LeastSquares(rows=1000, features=100)


@pytest.fixture(scope="module")
def svrg_norms(regression):
    return regression.norms(lambda p: SVRG(p, 0.3), epochs=36, steps=35, batch=100)[0]


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"word_length": 8}, 0.85),
        ({"word_length": 8, "power_of_two": True}, 0.7),
        ({"word_length": 16}, 0.99),
        ({"mu": None, "offset_format": "bfp8"}, 0.97),
        ({"mu": None, "offset_format": "bfp8-tensor"}, 0.97),
    ],
    ids=["8-bit", "8-bit-power-of-two", "16-bit", "bfp8", "bfp8-tensor"],
)
def test_halp_converges_linearly_at_svrgs_rate(regression, svrg_norms, options, share):
    """Rounding costs at most a stated share of the rate, and there is no floor above 1e-10."""
    norms, boxes = regression.norms(
        lambda p: HALP(p, 0.3, **{"mu": regression.mu, **options}), epochs=36, steps=35, batch=100
    )
    assert norms[-1] < 1e-10 * norms[0]
    assert slope(norms) <= share * slope(svrg_norms) < 0
    first, second = slope(norms[:18]), slope(norms[18:])
    assert second < 0.8 * first  # still falling as fast in the second half: a line, not a floor
    assert all(box <= 1.0 for box in boxes), "the solution left the box"


def test_low_precision_floors_are_proportional_to_the_squared_gap(regression):
    """LP-SVRG and LP-SGD stall where HALP goes on, and |gradient|^2 at the floor falls fourfold when the gap halves."""

    def floor(make):
        norms, _ = regression.norms(make, epochs=24, steps=35, batch=100)
        late = norms[9:]
        assert late.min() > 1e-3 * norms[0]
        return float(late.square().mean())

    svrg = [floor(lambda p, f=f: SVRG(p, 0.3, weight_format=f"fixed12.{f}")) for f in (4, 5)]
    assert 3.0 < svrg[0] / svrg[1] < 5.3
    # SGD's own floor (gradient noise) does not depend on the gap: what rounding adds to it does.
    own = floor(lambda p: SGLD(p, 0.3, num_data=1, temperature=0.0))
    sgd = [
        floor(lambda p, f=f: SGLD(p, 0.3, num_data=1, temperature=0.0, weight_format=f"fixed12.{f}")) for f in (2, 3)
    ]
    assert 3.0 < (sgd[0] - own) / (sgd[1] - own) < 5.3


@pytest.mark.parametrize("bits", [2, 3])
def test_too_few_bits_do_not_contract(regression, bits):
    norms, _ = regression.norms(
        lambda p: HALP(p, 0.3, mu=regression.mu, word_length=bits, check_mu=False), epochs=6, steps=35, batch=100
    )
    assert norms[-1] > norms[0]


def test_a_box_that_is_too_small_saturates_and_says_so(regression):
    """mu 20 times too large: the offsets hit the box, are counted, and convergence slows down but stays."""
    w = nn.Parameter(torch.zeros(100, dtype=DOUBLE))
    opt = HALP([w], 0.3, mu=20 * regression.mu)
    opt.recentre(lambda: setattr(w, "grad", regression.gradient(w)))
    for _ in range(20):
        opt.step(lambda: setattr(w, "grad", regression.gradient(w)))
    assert opt.saturation_counts()["parameter 0"] > 0
    assert float(w.detach().abs().max()) <= opt.state[w]["gap"] * 127


class Digits:
    """Softmax regression on scikit-learn's digits in 18 batches: curvature of about 0.5, whatever its L2 term."""

    def __init__(self):
        inputs, targets = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets)
        self.model = nn.Linear(64, 10)
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()

    def loss(self, rows):
        return nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def run(self, epochs=8, **options):
        """Loss at each centre, and the sampler."""
        opt = HALP(self.model.parameters(), 0.3, num_data=len(self.y), weight_decay=1e-4, **options)
        batches = [torch.arange(i, min(i + 100, len(self.y))) for i in range(0, len(self.y), 100)]
        full, losses = full_gradient(self.loss, batches, self.model.parameters(), size_of=len), []
        for _ in range(epochs):
            losses.append(float(opt.recentre(full)))
            for rows in batches:

                def closure(rows=rows):
                    opt.zero_grad()
                    loss = self.loss(rows)
                    loss.backward()
                    return loss

                opt.step(closure)
        return losses, opt


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("mu", [2e-4, 1e-4])
def test_mu_far_below_the_curvature_is_refused_early_with_the_remedy(mu, temperature):
    digits = Digits()
    with pytest.raises(RuntimeError, match=r"HALP diverges: .* offset_format='bfp8'") as refused:
        digits.run(mu=mu, temperature=temperature, epochs=25)
    advised = float(re.search(r"Take mu=([\d.e-]+) or so", str(refused.value)).group(1))
    assert 0.01 < advised < 5.0
    losses, _ = Digits().run(mu=advised, temperature=0.0)  # and the advice is good
    assert losses[-1] < 0.5 * losses[0]


def test_without_the_check_such_a_run_goes_on_to_grow():
    losses, _ = Digits().run(mu=1e-4, check_mu=False)
    assert losses[-1] > 3 * losses[0]


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("mu", [0.05, 0.5, 5.0])
def test_runs_that_converge_or_sample_are_not_refused(mu, temperature):
    losses, _ = Digits().run(mu=mu, temperature=temperature)
    assert losses[-1] < losses[0]


def test_the_heat_of_a_chain_that_starts_at_its_mode_is_no_divergence():
    """From the exact minimum the gradient grows from zero to its thermal size, many times over."""
    w, scales = nn.Parameter(torch.zeros(50)), torch.linspace(1.0, 4.0, 50)
    opt = HALP([w], 0.1, mu=1.0, num_data=100, temperature=1.0)

    def closure():
        w.grad = scales * w.detach()
        return (scales * w.detach().square()).sum() / 2

    norms = []
    for _ in range(30):
        opt.recentre(closure)
        norms.append(float((scales * w.detach()).norm()))
        for _ in range(10):
            opt.step(closure)
    assert min(norms[5:]) > 0.1 * norms[-1] > 0


def test_what_the_check_remembers_is_resumed():
    losses, opt = Digits().run(mu=0.5, epochs=2)
    saved = copy.deepcopy(opt.state_dict())
    other = HALP(Digits().model.parameters(), 0.3, mu=0.5)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["first_loss"] == pytest.approx(losses[0])
    assert group["least_gradient"] == opt.param_groups[0]["least_gradient"] > 0


@pytest.mark.parametrize(("mu", "words"), [(100.0, "at the edge of their box"), (1e-9, "not one offset has left")])
def test_a_box_that_cuts_steps_short_or_lets_none_happen_is_warned_of_once(mu, words, caplog):
    with caplog.at_level(logging.WARNING):
        Digits().run(mu=mu, epochs=4)
    assert [words in r.getMessage() for r in caplog.records] == [True]


@pytest.mark.slow
def test_the_published_self_check(regression):
    """n=200, d=10, batch 1, T=2n, as published: SVRG and HALP to machine precision, 4 bits not, the box slows."""
    problem = LeastSquares(rows=200, features=10)
    run = {"epochs": 21, "steps": 400, "batch": 1}
    halp = problem.norms(lambda p: HALP(p, 0.02, mu=problem.mu), **run)[0]
    svrg = problem.norms(lambda p: SVRG(p, 0.02), **run)[0]
    four = problem.norms(lambda p: HALP(p, 0.02, mu=problem.mu, word_length=4), **run)[0]
    boxed = problem.norms(lambda p: HALP(p, 0.02, mu=20 * problem.mu), **run)[0]
    assert svrg[-1] < 1e-5 * svrg[0]
    assert halp[-1] < 1e-5 * halp[0]
    assert four[10:].mean() > 0.01 * four[0]
    assert halp[-1] < boxed[-1] < boxed[0]


# ------------------------------------------------------------------------------------------------------- equations


def test_one_step_is_the_equation():
    """Coupled: the same draws through `quantize` on integers give the same codes, weight decay and box included."""
    draw = torch.Generator().manual_seed(3)
    w = nn.Parameter(torch.randn(50, dtype=DOUBLE, generator=draw))
    centre, full, at_point, at_centre = w.detach().clone(), *torch.randn(3, 50, dtype=DOUBLE, generator=draw)
    opt = HALP([w], 0.1, mu=2.0, weight_decay=0.5, seed=11)
    opt.recentre(lambda: setattr(w, "grad", full.clone()))
    gap = float((full + 0.5 * centre).norm()) / 2.0 / 127
    assert opt.state[w]["gap"] == pytest.approx(gap, rel=1e-14)
    gap, codes = opt.state[w]["gap"], torch.zeros(50, dtype=DOUBLE)
    for step in range(3):
        values = iter((at_centre, at_point))
        opt.step(lambda values=values: setattr(w, "grad", next(values).clone()))
        direction = corrected_gradient(at_point, at_centre, full) + 0.5 * (centre + codes * gap)
        codes = quantize(codes - 0.1 * (direction / gap), "fixed8.0s", key=DrawKey(11, step))
        assert torch.equal(opt.state[w]["offset"].double(), codes)
        assert torch.equal(w.detach(), centre + codes * gap)
    assert opt.state[w]["offset"].dtype == torch.int8


def test_the_gap_covers_norm_over_mu_and_the_posterior():
    assert offset_gap(12.7, 0.5, 127) == pytest.approx(0.2)
    assert offset_gap(0.0, 0.5, 127) == 0.0
    assert offset_gap(0.0, 1.0, 6, noise_scale=2.0) == 2.0
    for gap in (0.3, 1.0, 1.5, 2.0**-40):
        rounded = offset_gap(127 * gap, 1.0, 127, power_of_two=True)
        assert math.frexp(rounded)[0] == 0.5
        assert gap <= rounded < 2 * gap


def test_global_scale_uses_the_norm_over_all_tensors():
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))

    def full():
        a.grad, b.grad = torch.full((3,), 2.0), torch.full((2,), 1.0)

    own, shared = HALP([a, b], 0.1, mu=1.0), HALP([a, b], 0.1, mu=1.0, scale="global")
    own.recentre(full)
    shared.recentre(full)
    assert own.state[a]["gap"] == pytest.approx(math.sqrt(12) / 127)
    assert own.state[b]["gap"] == pytest.approx(math.sqrt(2) / 127)
    assert shared.state[a]["gap"] == shared.state[b]["gap"] == pytest.approx(math.sqrt(14) / 127)


def test_a_zero_gradient_moves_nothing_and_makes_no_nan():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = HALP([a, b], 0.1, mu=1.0)

    def closure():
        a.grad, b.grad = torch.zeros(3), b.detach().clone()

    opt.recentre(closure)
    opt.step(closure)
    assert torch.equal(a.detach(), torch.ones(3))
    assert bool(b.isfinite().all())
    assert not torch.equal(b.detach(), torch.ones(3))


@pytest.mark.parametrize(
    "make", [lambda p: SVRG(p, 0.3, weight_decay=0.7), lambda p: HALP(p, 0.3, mu=1.0, weight_decay=0.7)]
)
def test_weight_decay_pulls_to_zero_not_to_the_centre(regression, make):
    """With L2 the limit is the ridge solution, whatever the centres were (torchhalp's decay acted on the offset)."""
    w = nn.Parameter(torch.zeros(100, dtype=DOUBLE))
    opt = make([w])
    for _ in range(15):
        opt.recentre(lambda: setattr(w, "grad", regression.gradient(w)))
        for _ in range(20):
            opt.step(lambda: setattr(w, "grad", regression.gradient(w)))
    residual = regression.gradient(w) + 0.7 * w.detach()
    assert residual.norm() < 1e-6 * regression.gradient(torch.zeros_like(w)).norm()


def test_recentre_folds_the_offset_into_a_wider_centre():
    """float32 parameters, float64 centre: the sum keeps what float32 would lose."""
    w = nn.Parameter(torch.ones(1))
    opt = HALP([w], 1.0, mu=1.0, centre_dtype=DOUBLE)
    for _ in range(100):
        opt.recentre(lambda: setattr(w, "grad", torch.full((1,), -1e-9)))
        opt.step(lambda: setattr(w, "grad", torch.full((1,), -1e-9)))
    opt.recentre(lambda: setattr(w, "grad", torch.full((1,), -1e-9)))
    assert float(opt.state[w]["centre"]) == pytest.approx(1.0 + 1e-7, abs=1e-13)
    assert float(w.detach()) == pytest.approx(1.0 + 1e-7, abs=2.0**-24)


def test_a_parameter_changed_by_hand_becomes_the_centre():
    w = nn.Parameter(torch.zeros(2))
    opt = HALP([w], 0.5, mu=1.0)
    opt.recentre(lambda: setattr(w, "grad", torch.ones(2)))
    opt.step(lambda: setattr(w, "grad", torch.ones(2)))
    with torch.no_grad():
        w.fill_(7.0)
    opt.recentre(lambda: setattr(w, "grad", torch.ones(2)))
    assert torch.equal(opt.state[w]["centre"], torch.full((2,), 7.0))


def test_groups_have_their_own_mu_and_rate():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = HALP([{"params": [a], "mu": 2.0}, {"params": [b], "lr": 0.0}], 0.5, mu=8.0)

    def closure():
        a.grad, b.grad = torch.ones(4), torch.ones(4)

    opt.recentre(closure)
    assert opt.state[a]["gap"] == pytest.approx(4 * opt.state[b]["gap"])
    opt.step(closure)
    assert not torch.equal(a.detach(), torch.ones(4))
    assert torch.equal(b.detach(), torch.ones(4))


# -------------------------------------------------------------------------------- what two evaluations leave behind


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def classification():
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(50, 6, generator=draw)
    return x, torch.randint(3, (50,), generator=draw)


def whole_data(net, x, y):
    return full_gradient(lambda b: nn.functional.cross_entropy(net(b[0]), b[1]), [(x, y)], net.parameters())


def loss_closure(net, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("make", [lambda p: SVRG(p, 0.1), lambda p: HALP(p, 0.1, mu=1.0)], ids=["svrg", "halp"])
def test_centre_passes_leave_statistics_and_generators_alone(make):
    """After a step: BatchNorm saw the batch once, at the point; torch's generator is where one pass leaves it."""
    net, (x, y) = small_net(), classification()
    opt = make(net.parameters())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    opt.recentre(whole_data(net, x, y))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    opt.step(loss_closure(net, opt, x, y))
    after_step = torch.get_rng_state()
    torch.set_rng_state(state)
    twin = small_net()
    torch.set_rng_state(state)
    twin(x)
    assert torch.equal(torch.get_rng_state(), after_step)
    for name, value in twin[1].named_buffers():
        assert torch.equal(dict(net[1].named_buffers())[name], value)
    assert int(net[1].num_batches_tracked) == 1


def test_both_passes_draw_the_same_dropout():
    """At the centre itself the two gradients cancel exactly, so that the corrected gradient is the full one."""
    net, (x, y) = small_net(), classification()
    opt = SVRG(net.parameters(), 0.0)
    opt.recentre(whole_data(net, x, y))
    seen = []
    opt.step(
        loss_closure(net, opt, x[:10], y[:10]),
        before_update=lambda: seen.extend(p.grad.clone() for p in net.parameters()),
    )
    full = [opt.state[p]["full_gradient"] for p in net.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(seen, full))


def test_parameters_survive_a_closure_that_raises():
    w = nn.Parameter(torch.ones(2))
    opt = HALP([w], 0.5, mu=1.0)
    opt.recentre(lambda: setattr(w, "grad", torch.ones(2)))
    opt.step(lambda: setattr(w, "grad", torch.ones(2)))
    point = w.detach().clone()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    assert torch.equal(w.detach(), point)
    assert opt.steps == 1


def test_full_gradient_weights_batches_by_their_size():
    problem = LeastSquares(rows=103, features=4)
    w = nn.Parameter(torch.zeros(4, dtype=DOUBLE))
    batches = [(problem.x[i : i + 25], problem.y[i : i + 25]) for i in range(0, 103, 25)]  # the last has 3 rows
    closure = full_gradient(lambda b: (b[0] @ w - b[1]).square().mean() / 2, batches, [w])
    loss = closure()
    assert (w.grad - problem.gradient(w)).abs().max() < 1e-14
    assert float(loss) == pytest.approx(float((problem.y**2).mean() / 2), rel=1e-12)
    with pytest.raises(ValueError, match="empty"):
        full_gradient(lambda b: w.sum(), [], [w])()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SVRG(p, 0.05, weight_format="bfp8", temperature=1e-3, num_data=50, weight_decay=0.01),
        lambda p: HALP(p, 0.05, mu=0.5, temperature=1e-3, num_data=50, weight_decay=0.01),
        lambda p: HALP(p, 0.05, mu=0.5, word_length=16, centre_dtype=DOUBLE),
        lambda p: HALP(p, 0.05, mu=None, offset_format="bfp8", gradient_format="bfp8"),
    ],
    ids=["lp-svrg-ld", "halp-ld", "halp16-double", "halp-bfp"],
)
def test_resume_is_bitwise_also_mid_epoch(make):
    """6 + 5 steps with a centre in between, saved after step 3, equal an uninterrupted run, through torch.save."""

    def drive(net, opt, first, last):
        x, y = classification()
        for step in range(first, last):
            rows = torch.arange(step * 5 % 50, step * 5 % 50 + 5)
            torch.manual_seed(100 + step)
            if step in (0, 6):
                opt.recentre(whole_data(net, x, y))
            opt.step(loss_closure(net, opt, x[rows], y[rows]))

    whole, part = small_net(), small_net()
    reference, opt = make(whole.parameters()), make(part.parameters())
    drive(whole, reference, 0, 11)
    drive(part, opt, 0, 3)
    file = io.BytesIO()
    torch.save({"net": part.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = small_net()
    resumed = make(again.parameters())
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["opt"])
    drive(again, resumed, 3, 11)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())
    for a, b in zip(reference.state_dict()["state"].values(), resumed.state_dict()["state"].values()):
        assert a.keys() == b.keys()
        for name in a:
            same = a[name] == b[name]
            if torch.is_tensor(a[name]):
                same = a[name].dtype == b[name].dtype and bool(same.all())
            assert same, name


# ------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("make", [
    lambda p: HALP(p, 0.5, mu=1.0, temperature=1.0, num_data=4),
    lambda p: SVRG(p, 0.5, temperature=1.0, num_data=4, weight_format="fixed8.5"),
], ids=["halp-ld", "lp-svrg-ld"])  # fmt: skip
def test_langevin_with_a_centre_has_the_posterior_variance(make):
    """f(w) = w^2/2, N = 4, T = 1: the chain w <- w/2 + N(0, v), v = 1/4, has exactly the variance v/(1 - 1/4) = 1/3.

    420 independent coordinates, taken every 12 steps, where
    the correlation is 2^-12.
    """
    params = [nn.Parameter(torch.zeros(210)) for _ in range(2)]
    opt = make(params)

    def closure():
        for p in params:
            p.grad = p.detach().clone()

    samples = []
    for epoch in range(41):
        opt.recentre(closure)
        for _ in range(12):
            opt.step(closure)
        if epoch:
            samples.append(torch.cat([p.detach() for p in params]))
    # One step's law is within a gap of a normal, so is the fourth moment; 4 is 6.9 standard deviations.
    assert_moments(torch.cat(samples), 0.0, 1 / 3, reach=4.0, detect=0.2, fourth_moment=3.2 / 9)


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_name_rule_and_remedy():
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="`mu` must be finite and > 0"):
        HALP([w], 0.1, mu=0.0)
    with pytest.raises(ValueError, match="offset_format='bfp8', which needs none"):
        HALP([w], 0.1, mu=None)
    with pytest.raises(ValueError, match=r"in \[2, 16\]"):
        HALP([w], 0.1, mu=1.0, word_length=1)
    with pytest.raises(ValueError, match="leave `offset_format` out"):
        HALP([w], 0.1, mu=1.0, offset_format="fixed8.6")
    with pytest.raises(ValueError, match="`scale`"):
        HALP([w], 0.1, mu=1.0, scale="layer")
    with pytest.raises(ValueError, match="`period`"):
        SVRG([w], 0.1, period=0)
    opt = SVRG([w], 0.1)
    with pytest.raises(RuntimeError, match="recentre"):
        opt.step(lambda: None)
    with pytest.raises(RuntimeError, match="no gradient"):
        opt.recentre(lambda: None)
    with pytest.raises(FloatingPointError, match="NaN"):
        opt.recentre(lambda: setattr(w, "grad", torch.full((2,), math.nan)))
    assert not opt.centred
    opt.recentre(lambda: setattr(w, "grad", torch.ones(2)))
    with pytest.raises(TypeError, match="closure"):
        opt.step()
    with pytest.raises(ValueError, match="accumulator"):
        HALP.from_optimizer(torch.optim.SGD([w], 0.1), mu=1.0, accumulator="full")


def test_it_takes_over_an_optimizer_and_follows_its_schedule():
    w = nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([w], lr=0.5, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    opt = HALP.from_optimizer(sgd, mu=3.0, num_data=10, weight_format="bfp8", accumulator="low")
    assert opt.param_groups is sgd.param_groups
    opt.recentre(lambda: setattr(w, "grad", torch.ones(2)))
    opt.step(lambda: setattr(w, "grad", torch.ones(2)))
    scheduler.step()
    assert opt.step_size(opt.param_groups[0]) == 0.25
