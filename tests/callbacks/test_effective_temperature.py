"""The meter against what is known about the formats, and its verdict against trying the advice."""

import re
import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import RecordingLogger, SyntheticData, make_trainer, small_mlp
from helpers.small_resnet import SmallResNet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld.callbacks import EffectiveTemperature
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.samplers import SGHMC, SGLD, CyclicalStepSize, PreconditionedSGLD

WEIGHTS_ONLY = {"gradients": None, "activations": None, "errors": None, "seed": 0}


class GivenGradients(pl.LightningModule):
    """Weights of std 0.03 like a trained ResNet's, and a loss whose gradient is a fixed tensor of std 2e-3."""

    def __init__(self, lr=0.5, shapes=((64, 288), (32, 144), (10, 64))):
        super().__init__()
        self.lr = lr
        generator = torch.Generator().manual_seed(7)
        self.weights = nn.ParameterList([nn.Parameter(0.03 * torch.randn(s, generator=generator)) for s in shapes])
        self.gradients = [2e-3 * torch.randn(s, generator=generator) for s in shapes]

    def training_step(self, batch, batch_idx):
        return sum((w * g).sum() for w, g in zip(self.weights, self.gradients))

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(6, 1)), 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def meter(plugin, module=None, every=1, **options):
    callback = EffectiveTemperature(every, **options.pop("meter", {}))
    trainer = make_trainer(plugins=[plugin], callbacks=[callback], **{"max_steps": 1, "max_epochs": -1, **options})
    trainer.fit(GivenGradients() if module is None else module)
    return callback


def one_step(weights, temperature, lr, **options):
    plugin = LowPrecisionSGLD(weights, temperature=temperature, num_data=50_000, **{**WEIGHTS_ONLY, **options})
    return meter(plugin, GivenGradients(lr))


# ------------------------------------------------------------------------------------------------ the published setting


def on_grid(x, fmt):
    """Nearest grid values of float64 ``x`` and the gap of each element, straight from the definitions."""
    if fmt == "fixed8.8":
        gap = torch.full_like(x, 2.0**-8)
        return (x / gap).round().clamp(-128, 127) * gap, gap
    largest = x.abs().amax(1, keepdim=True)
    gap = 2.0 ** (torch.frexp(largest).exponent.double() - 1 - 6).expand_as(x)  # bfp8: 7 bits and a sign, per row
    gap = gap * (1 + ((x / gap).round().abs().amax(1, keepdim=True) > 127))  # the top rounds to the next power of two
    return (x / gap).round() * gap, gap


@pytest.mark.parametrize("lr", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("weights", ["fixed8.8", "bfp8"])
def test_out_of_reach_the_variance_is_that_of_stochastic_rounding(weights, lr):
    """Mean of max(v, p(1-p) gap^2) over v, from the definitions, at the published N = 50 000 and T = 1e-3."""
    with pytest.warns(UserWarning, match="behaves like"):
        callback = one_step(weights, 1e-3, lr)
    module, v, achieved = GivenGradients(), 2 * lr * 1e-3 / 50_000, []
    for weight, gradient in zip(module.weights, module.gradients):
        start, _ = on_grid(weight.detach().double(), weights)
        mean = (start.float() - lr * gradient).double()
        _, gap = on_grid(mean, weights)
        p = mean / gap - (mean / gap).floor()
        achieved.append((p * (1 - p) * gap**2).clamp(min=v).flatten())
    expected = float(torch.cat(achieved).mean()) / v
    assert callback.table["overall"]["achieved_over_target"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:T =")
@pytest.mark.parametrize("lr", [0.5, 0.05, 0.005])
@pytest.mark.parametrize(
    ("weights", "temperature", "low", "high"),
    [
        ("fixed8.8", 1e-3, 106, 155),
        ("bfp8", 1e-3, 8, 38),
        ("fixed8.8", 0.1, 1.3, 1.75),
        ("bfp8", 0.1, 1.0, 1.0),
        ("fixed8.8", 1.0, 1.0, 1.0),
        ("bfp8", 1.0, 1.0, 1.0),
    ],
)
def test_the_published_setting_is_reported_as_what_it_is(weights, temperature, low, high, lr):
    """Ranges: what such weights and gradients gave elsewhere; a tenth is left for other weights of the same law."""
    callback = one_step(weights, temperature, lr)
    total = callback.table["overall"]
    assert low / 1.1 <= total["achieved_over_target"] <= high * 1.1
    assert total["effective_temperature"] == pytest.approx(temperature * total["achieved_over_target"])
    assert (callback.message is not None) == (total["achieved_over_target"] > 1.5)


@pytest.mark.parametrize("lr", [0.1, 0.002])
def test_two_bytes_a_weight_carry_the_published_temperature_in_a_resnet(lr):
    """N = 50,000, T = 1e-3, bfp8 weights and gradients; the first layer and all weights, with sums of 8 and 16 bits.

    Batch-norm scales begin at 1, where the gap of 16 bits is largest: at the low rate some get six times the variance.
    """
    found = {}
    for accumulator in ("low", "bfp16"):
        torch.manual_seed(0)
        net, x, y = SmallResNet(16), torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
        opt = SGLD(
            net.parameters(), lr, num_data=50_000, temperature=1e-3, weight_decay=5e-4, weight_format="bfp8",
            gradient_format="bfp8", accumulator=accumulator,
        )  # fmt: skip
        opt.round_parameters_()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.measure()
        opt.step()
        target, achieved = (sum(getattr(s, name) * s.numel for s in opt.measured) for name in ("target", "achieved"))
        found[accumulator] = opt.measured[0].effective_temperature, achieved / target
    assert found["low"][0] > 0.1
    assert found["low"][1] > 2
    assert found["bfp16"][0] == pytest.approx(1e-3, rel=1e-6)
    assert found["bfp16"][1] == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("lr", [0.5, 0.05, 0.005])
def test_an_accumulator_of_16_bits_gets_what_it_asks_for(lr):
    callback = one_step("fixed8.8", 1e-3, lr, accumulator="bfp16")
    total = callback.table["overall"]
    assert total["achieved_over_target"] == pytest.approx(1.0, abs=0.005)
    assert total["effective_temperature"] == pytest.approx(1e-3, rel=0.005)
    assert total["view_rounding_over_target"] > 10, "the weights' own rounding, which is not accumulated"
    assert callback.message is None


def test_advice_for_sums_on_a_grid_is_a_finer_one():
    with pytest.warns(UserWarning, match=r"T = 0\.001 with fixed8\.8 summed in fixed10\.10 behaves like"):
        callback = one_step("fixed8.8", 1e-3, 0.05, accumulator="fixed10.10")
    assert "block floating point" not in callback.message
    assert "fraction length" not in callback.message
    (advice,) = re.findall(r"accumulator='((?:fixed|bfp)[\d.]+)'", callback.message)
    assert one_step("fixed8.8", 1e-3, 0.05, accumulator=advice).message is None


def test_verdict_and_its_advice():
    with pytest.warns(
        UserWarning, match=r"T = 0\.001 with fixed8\.8 behaves like T ~ 0\.1\d: rounding injects"
    ) as seen:
        callback = one_step("fixed8.8", 1e-3, 0.05)
    assert sum("behaves like" in str(w.message) for w in seen) == 1
    assert "accumulator='full'" in callback.message
    (hot,) = re.findall(r"T >= ([\d.e-]+)", callback.message)
    (fixed,) = re.findall(r"(fixed[\d.]+) \(fraction length >= \d+\)", callback.message)
    (block,) = re.findall(r"(bfp\d+) \(block", callback.message)
    for weights, temperature in ((fixed, 1e-3), (block, 1e-3), ("fixed8.8", float(hot))):
        followed = one_step(weights, temperature, 0.05)
        assert followed.table["overall"]["achieved_over_target"] <= 1.5
        assert followed.message is None
    (accumulator,) = re.findall(r"accumulator='(bfp\d+|fixed[\d.]+)'", callback.message)
    for wide in (accumulator, "full"):
        assert one_step("fixed8.8", 1e-3, 0.05, accumulator=wide).message is None


def test_advice_does_not_rest_on_a_coincidence_of_grids():
    """At lr 0.5, gradients on the grid of 1/256 move weights by multiples of 1/512: fixed9.9 would fit by accident."""
    with pytest.warns(UserWarning, match="behaves like") as seen:
        one_step("fixed8.8", 1e-3, 0.5, gradients="fixed8.8")
    (verdict,) = (str(w.message) for w in seen if "behaves like" in str(w.message))
    assert int(re.search(r"fixed(\d+)", verdict.split("times:")[1])[1]) > 10


def test_naive_rounding_is_told_of_variance_correction():
    with pytest.warns(UserWarning, match=r"behaves like.*variance_corrected=True"):
        callback = one_step("fixed8.6", 1.0, 0.05, variance_corrected=False)
    assert callback.table["overall"]["achieved_over_target"] > 1.5
    assert one_step("fixed8.6", 1.0, 0.05).message is None


def test_a_full_accumulator_gets_what_it_asks_for():
    callback = one_step("fixed8.8", 1e-3, 0.5, accumulator="full")
    total = callback.table["overall"]
    assert total["achieved_over_target"] == 1.0
    assert total["view_rounding_over_target"] > 1.0
    assert callback.message is None


def test_gradient_rounding_is_reported_beside_the_noise():
    """fixed8.8 gradients: lr^2 p(1-p) gap^2 with p = frac(g / gap), mean over elements, over v."""
    callback = one_step("fixed8.8", 1.0, 0.5, gradients="fixed8.8")
    scaled = torch.cat([g.double().flatten() for g in GivenGradients().gradients]) * 2**8
    p = scaled - scaled.floor()
    expected = 0.5**2 * (p * (1 - p)).mean() * 2.0**-16 / (2 * 0.5 / 50_000)
    assert callback.table["overall"]["gradient_rounding_over_target"] == pytest.approx(float(expected))


def test_saturation_and_zero_updates_are_seen():
    module = GivenGradients(shapes=((8, 8),))
    nn.init.constant_(module.weights[0], 0.499)  # the grid of fixed8.8 ends at 0.49609375
    module.gradients = [-torch.ones(8, 8)]
    plugin = LowPrecisionSGLD("fixed8.8", temperature=0.0, num_data=50_000, **WEIGHTS_ONLY)
    assert meter(plugin, module).table["overall"] == {
        "effective_temperature": 0.0,
        "saturated": 1.0,
        "unchanged": 1.0,
        "high": 0.0,
        "low": 1.0,
        "unreachable": 0.0,
    }


# ---------------------------------------------------------------------------------------------------- when and where to


class Batches(pl.Callback):
    """Which step each measurement belongs to, seen after the meter."""

    def __init__(self, callback):
        self.callback, self.seen, self.last = callback, [], None

    def on_train_batch_end(self, trainer, *args):
        table = self.callback.table
        if table and table is not self.last:
            self.seen.append(trainer.global_step - 1)
            self.last = table


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_measured_also_with_accumulation(accumulate):
    callback = EffectiveTemperature(4, verdict=False)
    spy = Batches(callback)
    trainer = make_trainer(
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        plugins=[LowPrecisionSGLD(seed=0)],
        callbacks=[callback, spy],
    )
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert spy.seen == list(range(0, trainer.global_step, 4))


def test_measuring_does_not_change_the_chain():
    def run(*callbacks):
        module = small_mlp()
        trainer = make_trainer(max_epochs=2, plugins=[LowPrecisionSGLD(seed=0)], callbacks=list(callbacks))
        trainer.fit(module, datamodule=SyntheticData(shuffle=False))
        return module

    measured, plain = run(EffectiveTemperature(1)), run()
    assert all(torch.equal(a, b) for a, b in zip(measured.parameters(), plain.parameters()))


def test_what_is_logged():
    logger = RecordingLogger()
    callback = EffectiveTemperature(3, verdict=False)
    trainer = make_trainer(
        max_epochs=1, logger=logger, plugins=[LowPrecisionSGLD(seed=0)], callbacks=[callback], log_every_n_steps=1000
    )
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    rows = [(step, row) for step, row in logger.rows if "noise/effective_temperature" in row]
    assert [step for step, _ in rows] == [0, 3, 6]
    last = rows[-1][1]
    ratios = [f"{name}_over_target" for name in ("achieved", "gradient_rounding", "view_rounding")]
    for quantity in ("effective_temperature", "saturated", "unchanged", "high", "low", "unreachable", *ratios):
        assert last[f"noise/{quantity}"] == callback.table["overall"][quantity]
        assert last[f"noise/{quantity}/net.0.weight"] == callback.table["net.0.weight"][quantity]
        assert float(trainer.callback_metrics[f"noise/{quantity}"]) == pytest.approx(last[f"noise/{quantity}"])
    assert last["noise/high"] + last["noise/low"] + last["noise/unreachable"] == pytest.approx(1.0)


def test_ratios_are_left_out_where_no_noise_is_asked_for():
    schedule = CyclicalStepSize(8, sampling_steps=2, noise_in="sampling-stage")
    callback = meter(LowPrecisionSGLD(schedule=schedule, num_data=50_000, **WEIGHTS_ONLY))
    assert "achieved_over_target" not in callback.table["overall"]
    assert callback.table["overall"]["effective_temperature"] > 0
    assert callback.message is None


def test_the_verdict_is_given_once_per_run_also_after_resuming(tmp_path):
    def run(steps, ckpt_path=None):
        callback = EffectiveTemperature(1)
        plugin = LowPrecisionSGLD("fixed8.8", temperature=1e-3, num_data=50_000, **WEIGHTS_ONLY)
        trainer = make_trainer(max_steps=steps, max_epochs=-1, plugins=[plugin], callbacks=[callback])
        trainer.fit(GivenGradients(), ckpt_path=ckpt_path)
        return trainer, callback

    with pytest.warns(UserWarning, match="behaves like") as seen:
        trainer, callback = run(2)
    assert sum("behaves like" in str(w.message) for w in seen) == 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "T =")
        _, resumed = run(4, tmp_path / "last.ckpt")
    assert resumed.message == callback.message
    assert (callback.state_dict()["measured"], resumed.state_dict()["measured"]) == (2, 4)


@pytest.mark.filterwarnings("ignore:T =")
@pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": True}])
def test_dry_and_bare_trainers(options):
    callback = EffectiveTemperature()
    trainer = make_trainer(plugins=[LowPrecisionSGLD(seed=0)], callbacks=[callback], **options)
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert callback.table["overall"]["effective_temperature"] > 0


@pytest.mark.parametrize("kind", [SGHMC, PreconditionedSGLD])
def test_the_whole_family_is_measured(kind):
    """Of SGHMC the verdict goes by the effective temperature of both noises; remedies are not tried."""

    def build(params, temperature):
        options = {"lr": 0.05, "num_data": 50_000, "weight_format": "fixed8.8", "seed": 0, "temperature": temperature}
        extra = {"friction": 2.0, "velocity_format": "bfp8"} if kind is SGHMC else {"eps": 1e-3}
        return kind(params, **options, **extra)

    def run(temperature, logger=False):
        module, callback = GivenGradients(), EffectiveTemperature(1)
        module.configure_optimizers = lambda: build(module.parameters(), temperature)
        make_trainer(max_steps=3, max_epochs=-1, callbacks=[callback], logger=logger, log_every_n_steps=1).fit(module)
        return callback

    logger = RecordingLogger()
    with pytest.warns(UserWarning, match=r"T = 1e-05 with fixed8\.8 behaves like T ~") as seen:
        cold = run(1e-5, logger)
    (verdict,) = (str(w.message) for w in seen if "behaves like" in str(w.message))
    assert "What brings it" not in verdict
    assert ("into positions" in verdict) == (kind is SGHMC)
    total = cold.table["overall"]
    assert total["effective_temperature"] > 1.5e-5
    assert ("velocity_achieved_over_target" in total) == (kind is SGHMC)
    assert logger.rows[0][1]["noise/effective_temperature"] > 1.5e-5
    warm = run(100.0)
    assert warm.message is None
    assert warm.table["overall"]["effective_temperature"] == pytest.approx(100.0, rel=0.5)


def test_without_a_sampler_training_is_refused():
    with pytest.raises(RuntimeError, match=r"nothing to measure: the trainer's optimizers are SGD.*LowPrecisionSGLD"):
        make_trainer(callbacks=[EffectiveTemperature()]).fit(small_mlp(), datamodule=SyntheticData())


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"max_elements": 0}, {"every_n_steps": True}])
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be an int >= 1"):
        EffectiveTemperature(**options)


# ----------------------------------------------------------------------------------------------------- top of blocks


def pushed_up(weights, **options):
    """200 scales, each a block, which their gradients push towards 1.2 from between 0.9 and 0.99: 40 steps."""
    module = GivenGradients(lr=3e-3, shapes=((200,),))
    with torch.no_grad():
        module.weights[0].copy_(torch.linspace(0.9, 0.99, 200))
    module.training_step = lambda batch, batch_idx: (module.weights[0] - 1.2).square().sum() / 2
    plugin = LowPrecisionSGLD(weights, num_data=50_000, **{**WEIGHTS_ONLY, **options})
    return meter(plugin, module, max_steps=40)


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_the_verdict_has_a_case_for_blocks_that_a_clamp_holds(temperature):
    with pytest.warns(UserWarning, match="Held below a power of two") as seen:
        held = pushed_up("bfp8-clamp", temperature=temperature)
    assert sum("Held below" in str(w.message) for w in seen) == 1
    assert "1.7 % would by chance" in held.held_message
    assert "Use 'bfp8'" in held.held_message
    assert ("times the variance asked for" in held.held_message) == (temperature > 0)
    total = held.table["overall"]
    assert total["at_top"] > 0.2
    assert total["held"] > 0.2
    assert total["crossing"] == 0.0
    if temperature:
        assert total["bias_over_target"] > 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Held below")
        free = pushed_up("bfp8", temperature=temperature)
    assert free.held_message is None
    total = free.table["overall"]
    assert total["held"] == 0.0
    assert total["crossing"] > 0.0
    assert total.get("bias_over_target", 0.0) == 0.0


def test_the_scales_of_the_standard_are_told_of_those_that_fit():
    module = GivenGradients(lr=1e-2, shapes=((640, 32),))
    nn.init.constant_(module.weights[0], 440.0 / 256)
    module.training_step = lambda batch, batch_idx: (module.weights[0] - 2.2).square().sum() / 2
    plugin = LowPrecisionSGLD("mxfp8e4m3", temperature=0.0, num_data=10, **WEIGHTS_ONLY)
    with pytest.warns(UserWarning, match=r"top code of mxfp8e4m3.*Use 'mxfp8e4m3-fit'"):
        meter(plugin, module, max_steps=10)


def test_the_verdict_about_held_blocks_is_given_once_also_after_resuming():
    callback = EffectiveTemperature()
    callback.load_state_dict({"message": None, "measured": 1, "log_excess": 0.0})  # of before there was this case
    assert callback.held_message is None
    callback.load_state_dict({**callback.state_dict(), "held_message": "said"})
    assert callback.held_message == "said"


# --------------------------------------------------------------------------------------------------- minibatch noise


class NoisyGradients(GivenGradients):
    """Gradients with minibatch noise of a known standard deviation, about a fixed mean."""

    noise = 0.01

    def __init__(self, kind):
        super().__init__(lr=0.05, shapes=((64, 256),))
        self.kind = kind

    def training_step(self, batch, batch_idx):
        generator = torch.Generator().manual_seed(batch_idx)
        grad = self.gradients[0] + self.noise * torch.randn(self.gradients[0].shape, generator=generator)
        return (self.weights[0] * grad).sum()

    def configure_optimizers(self):
        options = {"lr": self.lr, "num_data": 1000, "temperature": 1e-3, "weight_format": "bfp16", "seed": 0}
        return self.kind(self.parameters(), **options, **({"friction": 2.0} if self.kind is SGHMC else {}))


@pytest.mark.parametrize("kind", [SGLD, SGHMC, PreconditionedSGLD])
def test_minibatch_noise_is_estimated_from_the_run(kind):
    """(lr s)^2 over 2 lr T/N; with friction f a slow direction goes lr/f along it: (lr s/f)^2 over 2 lr T/(f N)."""
    module, callback, seen = NoisyGradients(kind), EffectiveTemperature(2, verdict=False), []
    spy = Batches(callback)
    spy.on_train_batch_end = lambda *args: seen.append(callback.table["overall"].get("minibatch_over_target"))
    plugin = LowPrecisionSGLD(activations=None, errors=None)
    trainer = make_trainer(max_steps=5, max_epochs=-1, callbacks=[callback, spy], plugins=[plugin])
    trainer.fit(module)
    assert seen[0] is None  # there was no step before
    plain = module.lr * module.noise**2 * 1000 / (2 * 1e-3)
    assert seen[2] == seen[3]
    for found in (seen[2], seen[4]):
        if kind is PreconditionedSGLD:
            assert found > 0.5
        else:
            assert found == pytest.approx(plain / 2.0 if kind is SGHMC else plain, rel=0.1)
    card = plugin.card
    assert card.minibatch == seen[4]
    assert f"its noise adds {seen[4]:.3g} times the variance asked for" in str(card)


def test_before_a_measurement_the_card_says_that_minibatch_noise_comes_on_top():
    plugin = LowPrecisionSGLD("bfp8-clamp", seed=0)
    make_trainer(plugins=[plugin], max_steps=1).fit(small_mlp(), datamodule=SyntheticData())
    assert plugin.card.minibatch is None
    assert "comes on top at any precision" in str(plugin.card)
    assert "weights bfp8-clamp: codes are clamped" in str(plugin.card)
    assert "clamped" not in str(replace(plugin.card, formats={"weights": "bfp8", "gradients": "bfp8"}))
