"""Gradients divided by the q that saturation leaves of them: the chain of unshrunk gradients, nothing else changed.

Gradients of +-12 saturate in e2m1 to +-6, which is on its grid: q = 1/2 exactly, without a draw, and dividing by a
power of two is exact. So trajectories are compared bit for bit.
"""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_mlp
from helpers.processes import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.analysis import stationary_law
from lightning_lpsgld.callbacks import GradientShrinkage
from lightning_lpsgld.callbacks.compensation import Compensation
from lightning_lpsgld.distributed import checksum
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

VARIANTS = {
    "float": (SGLD, {}),
    "vc": (SGLD, {"weight_format": "bfp8"}),
    "naive": (SGLD, {"weight_format": "fixed8.6", "variance_corrected": False}),
    "full": (SGLD, {"weight_format": "fixed8.6", "accumulator": "full"}),
    "lattice": (SGLD, {"weight_format": "fixed8.6", "variant": "lattice"}),
    # No fused step takes e2m1's gradients; unrounded weights show in the last place that both ways are compared.
    "hamiltonian": (SGHMC, {"friction": 1.0, "backend": "reference"}),
    "hamiltonian-vc": (SGHMC, {"friction": 1.0, "weight_format": "bfp8", "velocity_format": "bfp8"}),
    "preconditioned": (PreconditionedSGLD, {"weight_format": "bfp8"}),
}


def sampler(name, param, **options):
    kind, more = VARIANTS[name]
    options = {"lr": 2.0**-6, "num_data": 64, "temperature": 0.25, "weight_decay": 0.5, "seed": 3, **more, **options}
    return kind([param], **options)


def weight():
    """Half of the elements at zero, so that the lattice and the fixed grids hold the start, too."""
    return nn.Parameter(torch.linspace(-1, 1, 33).repeat(4, 1).mul(64).round().div(64))


def trajectory(opt, param, size, steps):
    """Weights after each step down the loss ``size * |theta|``, whose gradient has one magnitude everywhere."""
    seen = []
    for _ in range(steps):
        param.grad = size * torch.where(param.detach() < 0, -1.0, 1.0)
        opt.step()
        seen.append(param.detach().clone())
    return torch.stack(seen)


# -------------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("name", VARIANTS)
def test_a_compensated_chain_is_the_chain_of_unshrunk_gradients(name):
    """Bitwise, with noise, weight decay and every way of rounding; without compensation it is another chain."""

    def run(compensated, gradient_format):
        param = weight()
        opt = sampler(name, param, gradient_format=gradient_format)
        if compensated:
            opt.compensate(param, 0.5)
        return trajectory(opt, param, 12.0, 8)

    exact = run(False, None)
    assert torch.equal(run(True, "e2m1"), exact)
    assert not torch.equal(run(False, "e2m1"), exact)


def test_at_zero_temperature_it_is_the_learning_rate_over_q():
    def run(lr, q):
        param = weight()
        opt = sampler("vc", param, lr=lr, temperature=0.0, weight_decay=0.0, gradient_format="e2m1")
        opt.compensate(param, q)
        return trajectory(opt, param, 12.0, 5)

    assert torch.equal(run(2.0**-6, 0.25), run(2.0**-4, 1.0))


def test_lr_over_q_is_not_it_where_there_is_noise():
    """Var of the noise per step is 2*lr*T/N whatever q is; with lr/q it would be 1/q times as large."""
    param = weight()
    opt = sampler("vc", param, gradient_format="e2m1")
    group = opt.param_groups[0]
    plain, compensated = opt.spec(group, "vc"), opt.spec(group, "vc", 0.5)
    assert compensated.noise_variance == plain.noise_variance == opt.noise_variance(group)
    assert compensated.lr == 2 * plain.lr


def test_only_the_parameter_that_was_named_is_compensated():
    def run(compensate):
        params = [weight(), weight()]
        opt = SGLD(params, 2.0**-6, num_data=64, weight_format="bfp8", gradient_format="e2m1", seed=1)
        if compensate:
            opt.compensate(params[0], 0.5)
        for param in params:
            param.grad = torch.full_like(param, 12.0)
        opt.step()
        return [param.detach() for param in params]

    (moved, kept), (before, same) = run(True), run(False)
    assert torch.equal(kept, same)
    assert not torch.equal(moved, before)


def test_contraction_on_a_quadratic_is_restored():
    """U = h x^2/2, T = 0: |g| > 6 is cut to 6, so a step contracts by 1 - lr h q, with compensation by 1 - lr h.

    Elements have one magnitude, 2^-10 of which is lost per step, so that q of a step is that of the last within as
    much: the divisor lags one step, and with it the contraction is off by at most lr h times that.
    """
    lr, h, steps = 2.0**-10, 1.0, 40
    for compensate in (False, True):
        param = nn.Parameter(torch.full((8, 8), 24.0))
        opt = SGLD([param], lr, num_data=1, temperature=0.0, gradient_format="e2m1")
        for k in range(steps):
            before = float(param.detach()[0, 0])
            q = 6.0 / (h * before)
            param.grad = h * param.detach()
            opt.step()
            contraction = float(param.detach()[0, 0]) / before
            if compensate and k > 0:
                assert contraction == pytest.approx(1 - lr * h, abs=lr * h * 2 * lr)
            else:
                assert contraction == pytest.approx(1 - lr * h * q, abs=2.0**-22)
            if compensate:
                opt.compensate(param, q)


def test_shrinkage_heats_and_a_fixed_divisor_restores_the_variance_but_not_the_law():
    """U = x^2/2, T = 1, gradients cut at +-1, exact stationary laws on a grid of 1/8.

    Uncompensated, the variance is that of the Huber potential, 2.2445 by quadrature. Divided by the projection that the
    chain itself shows it is T (the virial theorem), up to the grid's O(gap^2); the tails stay exponential.
    """

    def law(q):
        options = {"lr": 1e-3, "temperature": 1.0, "rates": "exponential", "curvature": 0.0}
        grid, p = stationary_law("lattice", "fixed8.3", grad=lambda x: x.clamp(-1, 1) / q, **options)
        projection = float((p * grid * grid.clamp(-1, 1)).sum() / (p * grid**2).sum())
        return projection, float((p * grid**2).sum()), float((p * grid**4).sum() / (p * grid**2).sum() ** 2)

    q, heated, _ = law(1.0)
    assert heated == pytest.approx(2.2445, abs=0.125**2)
    for _ in range(12):  # contracts by a factor of about 2 per round
        q, variance, kurtosis = law(q)
    assert variance == pytest.approx(1.0, abs=0.125**2)
    assert q == pytest.approx(0.627, abs=0.125**2)
    assert kurtosis > 4.5


def test_refuses_a_divisor_that_is_none():
    opt = sampler("vc", param := weight())
    for q in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`shrinkage` must be finite and > 0"):
            opt.compensate(param, q)


def test_nothing_is_saved_unless_it_is_used():
    opt = sampler("vc", param := weight(), gradient_format="e2m1")
    trajectory(opt, param, 12.0, 2)
    assert opt.state_dict()["state"] == {}
    assert opt.shrinkage_of(param) == 1.0


@pytest.mark.parametrize("name", VARIANTS)
def test_resumes_bitwise(name):
    param = weight()
    opt = sampler(name, param, gradient_format="fixed8.6")
    opt.compensate(param, 0.3)
    trajectory(opt, param, 3.0, 3)
    saved, kept = copy.deepcopy(opt.state_dict()), param.detach().clone()
    whole = trajectory(opt, param, 3.0, 3)
    param = nn.Parameter(kept)
    opt = sampler(name, param, gradient_format="fixed8.6")
    opt.load_state_dict(saved)
    assert opt.shrinkage_of(param) == 0.3
    assert torch.equal(trajectory(opt, param, 3.0, 3), whole)


# ------------------------------------------------------------------------------------------------------- the average


def test_the_average_is_the_derived_one():
    settings = Compensation(smoothing=0.75, floor=0.25)
    assert settings.averaged(None, 0.5) == 0.5
    assert settings.averaged(0.5, 1.0) == 0.625
    assert settings.averaged(0.5, 7.0) == 0.625, "q of more than 1 is no shrinkage"
    assert settings.averaged(None, 1e-9) == 0.25
    assert Compensation().averaged(0.3, 0.3) == 0.3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compensate_until": 0}, "`compensate_until` must be an int >= 1"),
        ({"compensate_until": True}, "`compensate_until` must be an int >= 1"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\)"),
        ({"q_floor": 0.0}, r"`q_floor` must be in \(0, 1\]"),
    ],
)
def test_arguments_are_checked_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        GradientShrinkage(compensate=True, **options)


# ------------------------------------------------------------------------------------------------------- the callback


class Slope(pl.LightningModule):
    """Loss ``12 |theta|`` in step k, ``24 |theta|`` from step ``change`` on: q is 1/2, then 1/4."""

    def __init__(self, change=100, steps=8, gradient_format="e2m1"):
        super().__init__()
        self.weight, self.change, self.steps, self.format = weight(), change, steps, gradient_format
        self.seen = []

    def training_step(self, batch, batch_idx):
        size = 12.0 if self.trainer.global_step < self.change else 24.0
        self.seen.append(self.weight.detach().clone())
        return size * self.weight.mul(torch.where(self.weight.detach() < 0, -1.0, 1.0)).sum()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(self.steps, 1)), 1)

    def configure_optimizers(self):
        return sampler("vc", self.weight, gradient_format=self.format)


def fit(module, *callbacks, **options):
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, ckpt_path=options.pop("ckpt_path", None))
    return trainer


@pytest.mark.filterwarnings("ignore:Rounding to")
def test_divisors_follow_the_measurements_with_one_step_of_delay():
    module, callback = Slope(change=4), GradientShrinkage(2, compensate=True, smoothing=0.5)
    trainer = fit(module, callback)
    assert trainer.optimizers[0].shrinkage_of(module.weight) == (0.5 + 0.25) / 4 + 0.25 / 2  # steps 0, 2; 4; 6
    assert callback.table["overall"]["gain"] == callback.table["parameter 0"]["gain"] == 1 / 0.3125
    # Steps 1 to 3 are those of the exact chain from the weights after step 0.
    param = nn.Parameter(module.seen[1].clone())
    opt = sampler("vc", param)
    opt.param_groups[0]["step"] = 1
    assert torch.equal(trajectory(opt, param, 12.0, 3), torch.stack(module.seen[2:5]))


@pytest.mark.filterwarnings("ignore:Rounding to")
def test_from_the_given_step_on_divisors_are_fixed():
    module = Slope(change=4)
    trainer = fit(module, GradientShrinkage(2, compensate=True, smoothing=0.0, compensate_until=4))
    assert trainer.optimizers[0].shrinkage_of(module.weight) == 0.5
    module = Slope(change=4)
    trainer = fit(module, GradientShrinkage(2, compensate=True, smoothing=0.0, compensate_until=5))
    assert trainer.optimizers[0].shrinkage_of(module.weight) == 0.25


@pytest.mark.filterwarnings("ignore:Rounding to")
def test_off_by_default():
    watched, plain = Slope(), Slope()
    trainer = fit(watched, GradientShrinkage(1))
    fit(plain)
    assert torch.equal(watched.weight, plain.weight)
    assert trainer.optimizers[0].shrinkage_of(watched.weight) == 1.0


def compensated(seed=0, **options):
    """An MLP whose gradients are too large for their grid, at +-2^-6."""
    plugin = LowPrecisionSGLD(gradients="fixed8.13", seed=seed)
    callback = GradientShrinkage(3, threshold=0.0, compensate=True)
    module = small_mlp()
    return module, make_trainer(max_epochs=-1, plugins=[plugin], callbacks=[callback], **options)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Saved after step 10; the divisors of steps 10 and 11 come from step 9, those of 13 from the saved average."""
    data = SyntheticData(shuffle=False, n_train=8, copies=20)
    whole, trainer = compensated(max_steps=16)
    trainer.fit(whole, datamodule=data)
    divisors = [trainer.optimizers[0].shrinkage_of(p) for p in whole.parameters()]
    assert all(q < 0.9 for q in divisors)
    _, trainer = compensated(max_steps=10)
    trainer.fit(small_mlp(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    resumed, trainer = compensated(max_steps=16)
    trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "ten.ckpt")
    assert [trainer.optimizers[0].shrinkage_of(p) for p in resumed.parameters()] == divisors
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def on_a_rank():
    module, trainer = compensated(max_steps=12, devices=2, strategy="ddp", limit_val_batches=0)
    trainer.fit(module, datamodule=SyntheticData(n_train=160))
    opt = trainer.optimizers[0]
    return [(int(checksum(p)), opt.shrinkage_of(p)) for p in module.parameters()]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_divide_by_the_same():
    first, second = run_ranks(on_a_rank)
    assert first == second
    assert all(q < 1 for _, q in first)
