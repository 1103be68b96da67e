"""What the callback logs against the analysis on the very gradients and draws of the step, and its advice tried."""

import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import RecordingLogger, SyntheticData, make_trainer, small_mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.analysis import gradient_shrinkage
from lightning_lpsgld.callbacks import GradientShrinkage
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.random import DrawKey, Role, stream_id
from lightning_lpsgld.samplers import SGHMC, SGLD, PreconditionedSGLD

SHAPES = ((64, 32), (16,))
KEPT = ("q", "q_nearest", "norm_ratio", "cosine", "noise", "zeroed", "zeroed_nearest")


class Linear(pl.LightningModule):
    """A loss whose gradient is a fixed tensor of standard deviation ``size`` per parameter, under any optimizer."""

    def __init__(self, build=None, size=1e-4, steps=6):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList([nn.Parameter(0.1 * torch.randn(s, generator=generator)) for s in SHAPES])
        self.gradients = [size * torch.randn(s, generator=generator) for s in SHAPES]
        self.build, self.steps = build or (lambda params: torch.optim.SGD(params, lr=0.1)), steps

    def training_step(self, batch, batch_idx):
        return sum((w * g).sum() for w, g in zip(self.weights, self.gradients))

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(self.steps, 1)), 1)

    def configure_optimizers(self):
        return self.build(list(self.named_parameters()))


def sampler(kind=SGLD, **options):
    options = {"lr": 0.1, "num_data": 1000, "seed": 5, "weight_format": "bfp8", "gradient_format": "bfp8", **options}
    return lambda params: kind(params, **options)


def watched(module, callback=None, **options):
    callback = callback or GradientShrinkage(1, threshold=0.0)
    trainer = make_trainer(callbacks=[callback], max_epochs=1, **options)
    trainer.fit(module)
    return callback, trainer


def drawn(gradient, fmt, step, index, seed):
    key = DrawKey(seed=seed, step=step, stream=stream_id(Role.GRADIENT, index))
    return quantize(gradient, fmt, key=key)


# ------------------------------------------------------------------------------------------------ coupled: same draws


@pytest.mark.parametrize("kind", [SGLD, SGHMC, PreconditionedSGLD])
@pytest.mark.parametrize("fmt", ["bfp8", "fixed8.6", "e5m2"])
def test_values_are_those_of_the_analysis_on_the_draws_of_the_step(kind, fmt):
    options = {"friction": 0.1} if kind is SGHMC else {}
    module = Linear(sampler(kind, gradient_format=fmt, **options), size=0.01)
    callback, _ = watched(module)
    rows = [callback.table[name] for name, _ in module.named_parameters()]
    for index, (row, g) in enumerate(zip(rows, module.gradients)):
        made = gradient_shrinkage(drawn(g, fmt, module.steps - 1, index, 5), g)
        nearest = gradient_shrinkage(quantize(g, fmt, rounding="nearest"), g)
        parts = (made.projection, nearest.projection, made.norm_ratio, made.cosine, made.residual, made.zeroed)
        assert [row[name] for name in KEPT] == [float(part) for part in (*parts, nearest.zeroed)]
    total = callback.table["overall"]
    assert total["q_min"] == min(row["q"] for row in rows)
    assert total["q_mean"] == sum(row["q"] for row in rows) / 2
    pooled = gradient_shrinkage(
        torch.cat([drawn(g, fmt, module.steps - 1, i, 5).flatten() for i, g in enumerate(module.gradients)]),
        torch.cat([g.flatten() for g in module.gradients]),
    )
    assert total["zeroed"] == pytest.approx(float(pooled.zeroed))


@pytest.mark.parametrize("accumulator", ["low", "full"])
def test_the_watched_rounding_is_the_one_that_moves_the_weights(accumulator):
    """T = 0 and float weights: one step subtracts lr times the rounded gradient, from which q can be read back."""
    build = sampler(weight_format=None, accumulator=accumulator, temperature=0.0, gradient_format="fixed8.6", lr=1.0)
    module = Linear(build, size=0.01, steps=1)
    for weight in module.weights:
        nn.init.zeros_(weight)
    callback, _ = watched(module)
    for (name, weight), g in zip(module.named_parameters(), module.gradients):
        assert callback.table[name]["q"] == float(gradient_shrinkage(-weight, g).projection)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_clipped_and_accumulated_gradient(accumulate):
    module = Linear(sampler(gradient_format="fixed8.6"), size=1.0, steps=4)
    callback, trainer = watched(module, gradient_clip_val=0.5, accumulate_grad_batches=accumulate)
    for index, (name, param) in enumerate(module.named_parameters()):
        assert not torch.equal(param.grad, module.gradients[index])
        made = gradient_shrinkage(drawn(param.grad, "fixed8.6", trainer.global_step - 1, index, 5), param.grad)
        assert callback.table[name]["q"] == float(made.projection)


def test_watching_does_not_change_the_chain():
    def run(*callbacks):
        module = small_mlp(dropout=0.2)
        trainer = make_trainer(max_epochs=2, plugins=[LowPrecisionSGLD(seed=0)], callbacks=list(callbacks))
        torch.manual_seed(0)
        trainer.fit(module, datamodule=SyntheticData(shuffle=False))
        return module

    seen, plain = run(GradientShrinkage(1, threshold=0.0)), run()
    assert all(torch.equal(a, b) for a, b in zip(seen.parameters(), plain.parameters()))


# ----------------------------------------------------------------------------------------------- what formats are like


def test_tiny_gradients_in_fixed_point_are_lost_to_nearest_and_drowned_by_stochastic_rounding():
    """All entries are below half a gap (1/32): nearest zeroes all; the mean of stochastic rounding is still g.

    An entry survives with probability |g|/gap, 2.6 % on average: 53 of 2064, so neither bound fails by chance.
    """
    callback, _ = watched(Linear(sampler(gradient_format="fixed8.4"), size=2e-3))
    total = callback.table["overall"]
    assert total["zeroed_nearest"] == 1.0
    assert 0.9 < total["zeroed"] < 1.0
    assert total["predicted_slowdown"] == 1.0
    row = callback.table["weights.0"]
    assert (row["q_nearest"], row["q_expected"]) == (0.0, 1.0)
    assert row["noise"] > 1.0
    assert row["nonzero"] == 64 * 32


def test_a_block_format_keeps_the_gradient():
    """An entry moves by less than a gap, at most 1/64 of the largest: |q - 1| < gap * sum|g| / sum g^2, here < 6 %."""
    module = Linear(sampler())
    callback, _ = watched(module, GradientShrinkage(1))
    assert callback.message is None
    for (name, _), g in zip(module.named_parameters(), module.gradients):
        row, gap = callback.table[name], g.abs().max() / 64
        bound = float(gap * g.abs().sum() / g.square().sum())
        assert bound < 0.06
        assert max(abs(row[part] - 1.0) for part in ("q", "q_expected", "q_nearest")) < bound
        assert row["zeroed"] <= float((g.abs() < gap).double().mean())


def test_saturation_slows_down_by_what_it_cuts_off():
    """Entries are +-4 and the range of fixed8.7 ends at -1 and 127/128: E q = (1 + 127/128) / 8."""
    module = Linear(sampler(gradient_format="fixed8.7"))
    module.gradients = [torch.tensor([4.0, -4.0]).repeat(n // 2).view(s) for n, s in ((2048, (64, 32)), (16, (16,)))]
    with pytest.warns(UserWarning, match=r"exceed the range.*4\.02 times slower"):
        callback, _ = watched(module, GradientShrinkage(1))
    total = callback.table["overall"]
    assert total["predicted_slowdown"] == pytest.approx(8 / (1 + 127 / 128))
    assert total["q_min"] == pytest.approx((1 + 127 / 128) / 8)
    assert "2^-3" in callback.message


# ------------------------------------------------------------------------------------------------- message and advice


def test_the_message_and_what_it_advises():
    with pytest.warns(UserWarning, match=r"Rounding to .* left q = ") as seen:
        callback, _ = watched(Linear(sampler(gradient_format="fixed8.4"), size=1e-5), GradientShrinkage(1))
    assert sum("Rounding to" in str(w.message) for w in seen) == 1
    assert "'bfp8'" in callback.message
    factor = 2.0 ** int(re.search(r"2\^(\d+)", callback.message)[1])
    scaled = sampler(gradient_format="fixed8.4", lr=0.1 / factor, temperature=factor)
    followed, _ = watched(Linear(scaled, size=1e-5 * factor), GradientShrinkage(1))
    assert followed.message is None
    assert followed.table["overall"]["q_min"] > 0.9


def test_scaling_as_advised_leaves_the_unrounded_chain_as_it_is():
    """Powers of two are exact, so the chain with float gradients is the same bit for bit."""

    def run(factor):
        parts = {"gradient_format": None, "temperature": factor, "weight_decay": 0.25 * factor, "lr": 0.125 / factor}
        module = Linear(sampler(**parts), size=0.01 * factor)
        make_trainer(max_epochs=1).fit(module)
        return module

    assert all(torch.equal(a, b) for a, b in zip(run(1.0).parameters(), run(1024.0).parameters()))


def test_the_message_is_not_repeated_after_resuming():
    callback = GradientShrinkage(1)
    callback.load_state_dict({"message": "said"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Rounding to")
        watched(Linear(sampler(gradient_format="fixed8.4"), size=1e-5), callback)
    assert callback.state_dict() == {"message": "said"}


# ------------------------------------------------------------------------------------------------- logs and refusals


def test_what_is_logged_and_when():
    logger = RecordingLogger()
    callback = GradientShrinkage(3)
    trainer = make_trainer(
        max_epochs=1, logger=logger, plugins=[LowPrecisionSGLD(seed=0)], callbacks=[callback], log_every_n_steps=1000
    )
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    rows = [(step, row) for step, row in logger.rows if "shrinkage/q_min" in row]
    assert [step for step, _ in rows] == [0, 3, 6]
    last = rows[-1][1]
    for quantity in ("q_min", "q_mean", "zeroed", "zeroed_nearest", "predicted_slowdown"):
        assert last[f"shrinkage/{quantity}"] == callback.table["overall"][quantity]
        assert float(trainer.callback_metrics[f"shrinkage/{quantity}"]) == pytest.approx(last[f"shrinkage/{quantity}"])
    for quantity in (*KEPT, "q_expected"):
        assert last[f"shrinkage/{quantity}/net.0.weight"] == callback.table["net.0.weight"][quantity]


def test_it_watches_no_longer_than_the_run():
    _, trainer = watched(Linear(sampler()))
    assert trainer.optimizers[0].gradient_observers == []


@pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": True}])
def test_dry_and_bare_trainers(options):
    callback = GradientShrinkage()
    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=0)], callbacks=[callback], **options)
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert callback.table["overall"]["q_min"] > 0


def test_without_a_sampler_training_is_refused():
    with pytest.raises(RuntimeError, match=r"nothing to measure: the trainer's optimizers are SGD.*LowPrecisionSGLD"):
        watched(Linear(lambda params: torch.optim.SGD([p for _, p in params], lr=0.1)))


def test_without_rounded_gradients_training_is_refused():
    with pytest.raises(RuntimeError, match=r"gradients are not rounded.*gradients='bfp8'"):
        watched(Linear(sampler(gradient_format=None)))


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": True}, {"threshold": 1.5}])
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` "):
        GradientShrinkage(**options)
