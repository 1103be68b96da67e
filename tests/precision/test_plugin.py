"""The plugin itself: card, number of examples, presets, seeds, resume."""

import os

import pytest
import torch
from helpers.loaders import ResumableLoader
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_compatibility import Module, fit, loader, on_grid, trainer
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.precision import PRESETS
from lightning_lpsgld.precision.num_data import count_examples
from lightning_lpsgld.samplers import CyclicalStepSize


def test_default_is_vc_sgldlp_l_in_8_bit_blocks_at_the_papers_temperature(tmp_path):
    plugin, module = LowPrecisionSGLD(), Module()
    run = fit(tmp_path, module, plugin)
    (sampler,) = run.optimizers
    assert {role: str(fmt) for role, fmt in plugin.formats.items()} == dict.fromkeys(
        ("weights", "gradients", "activations", "errors"), "bfp8"
    )
    assert {sampler.accumulation(p) for p in module.parameters()} == {"vc"}
    assert sampler.param_groups[0]["temperature"] == 1e-3
    assert sampler.num_data == 48
    assert on_grid(module.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(tmp_path, name):
    plugin = LowPrecisionSGLD.preset(name, seed=0)
    module = Module()
    run = fit(tmp_path, module, plugin, max_epochs=3)
    (sampler,) = run.optimizers
    assert (float(sampler.param_groups[0]["temperature"]) == 0) == name.startswith(("sgd-", "sgdlp-"))
    assert isinstance(sampler.schedule, CyclicalStepSize) == ("csgld" in name)
    kinds = {sampler.accumulation(p) for p in module.parameters()}
    expected = {"-fp": "float", "lp-f-": "full", "naive": "naive", "lp-l-": "vc"}
    assert kinds == {next(kind for part, kind in expected.items() if part in name)}
    if name.endswith("fixed8"):
        assert on_grid(module.parameters(), "fixed8.8")


def test_posterior_card_states_what_is_sampled(tmp_path):
    plugin = LowPrecisionSGLD(seed=3, temperature=0.5)
    module = Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.01))
    fit(tmp_path, module, plugin)
    card = plugin.card
    assert (card.num_data, card.temperature, card.seed, card.weights) == (48, 0.5, 3, 83)
    assert card.prior_variance == pytest.approx(1 / (48 * 0.01))
    assert card.noise_variance == (pytest.approx(2 * 0.1 * 0.5 / 48),)
    assert card.weight_bytes == 83 + 8 + 3 + 8 + 3, "one byte a code, one a row, one an element of 1-D parameters"
    assert card.tensor_bits["net.0.bias"] == 16.0
    assert card.tensor_bits["net.0.weight"] == 8 + 8 / 6, "a row of six codes shares one exponent"
    text = str(card)
    for part in ("VC SGLDLP-L", "N = 48", "T = 0.5", "bfp8", "simulated", "to 16.00 in net.0.bias"):
        assert part in text


def test_card_shows_clipped_initial_weights(tmp_path):
    """Fixed 8.8 holds only [-0.5, 0.496]: batch-norm scales start at 1 and are clipped at once."""
    plugin = LowPrecisionSGLD.preset("vc-sgldlp-l-fixed8", seed=0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    fit(tmp_path, Module(net), plugin)
    assert plugin.card.saturated >= 8 / sum(p.numel() for p in net.parameters())
    assert "outside the range" in str(plugin.card)


def test_excluded_modules_stay_in_full_precision(tmp_path):
    module = Module()
    plugin = LowPrecisionSGLD(weights="bfp4", exclude=["net.2"], seed=0)
    fit(tmp_path, module, plugin)
    assert on_grid(module.net[0].parameters(), "bfp4")
    assert not on_grid([module.net[2].weight], "bfp4")


def test_examples_are_counted_from_the_dataloader():
    data = TensorDataset(torch.zeros(50, 2))
    assert count_examples(DataLoader(data, 8, drop_last=True)) == 50
    assert count_examples(DataLoader(data, 8, sampler=SubsetRandomSampler(range(20)))) == 20


def test_seed_is_that_of_seed_everything_else_drawn_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "123")
    plugin = LowPrecisionSGLD()
    fit(tmp_path, Module(), plugin, max_epochs=1)
    assert plugin.card.seed == 123
    monkeypatch.delenv("PL_GLOBAL_SEED")
    seeds = set()
    for _ in range(2):
        plugin = LowPrecisionSGLD()
        fit(tmp_path, Module(), plugin, max_epochs=1)
        seeds.add(plugin.card.seed)
    assert len(seeds) == 2
    assert "PL_GLOBAL_SEED" not in os.environ


def test_cycles_fill_the_run_and_the_last_weights_end_one(tmp_path):
    """Seven cycles of 50 steps: no eighth one at the full learning rate, and a sample at the end of each."""
    plugin, collector = LowPrecisionSGLD(seed=1, cycles=7), SampleCollector(per_cycle=1, every=1)
    fit(tmp_path, Module(), plugin, max_epochs=-1, max_steps=50, callbacks=[collector])
    schedule = plugin.samplers[0].schedule
    assert (schedule.cycle_length, schedule.cycle(49), schedule.cycle(50)) == (8, 6, 7)
    assert [info.step for info in collector.bank.infos] == [7, 14, 21, 28, 35, 42, 50]
    assert schedule.factor(49) < schedule.factor(48) < 0.25


@pytest.mark.parametrize("preset", ["vc-sgldlp-l-bfp8", "sgldlp-f-fixed8", "naive-sgldlp-l-bfp8", "vc-csgldlp-l-bfp8"])
@pytest.mark.parametrize("stop", [5, 7], ids=["epoch-end", "mid-epoch"])
def test_resume_equals_uninterrupted_bitwise(tmp_path, preset, stop):
    def build():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        return Module(net, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.7))

    def run(module, max_steps, **options):
        plugin = LowPrecisionSGLD.preset(preset, **({} if options.get("ckpt") else {"seed": 9}), **cycles)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        made = trainer(
            tmp_path, plugin, max_epochs=-1, max_steps=max_steps, callbacks=[saver], enable_checkpointing=True
        )
        made.fit(module, ResumableLoader(loader(count=80).dataset, 16), ckpt_path=options.get("ckpt"))
        return made

    cycles = {"cycles": None, "schedule": CyclicalStepSize(5, 2)} if "csgld" in preset else {}
    whole, half, resumed = build(), build(), build()
    full = run(whole, 12)
    run(half, stop)
    continued = run(resumed, 12, ckpt=tmp_path / f"step={stop}.ckpt")
    assert continued.global_step == full.global_step == 12
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(full.optimizers[0].state.values(), continued.optimizers[0].state.values()):
        assert torch.equal(a["accumulator"], b["accumulator"])


def test_backends_give_the_same_chain_up_to_float_rounding(tmp_path):
    """Coupled: same draws, so after one step the weights differ by at most one gap, and almost nowhere."""
    weights = {}
    for backend in ("reference", "auto"):
        torch.manual_seed(0)
        module = Module(nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)))
        fit(tmp_path, module, LowPrecisionSGLD(seed=0, backend=backend), max_steps=1)
        weights[backend] = module.net[0].weight.detach()
    different = (weights["reference"] != weights["auto"]).double().mean()
    assert different <= 0.01
    assert torch.equal(quantize(weights["auto"], "bfp8", rounding="nearest"), weights["auto"])


def test_a_second_fit_goes_on_and_repeats_no_draw(tmp_path):
    plugin, module = LowPrecisionSGLD(seed=0), Module()
    run = fit(tmp_path, module, plugin)
    assert run.optimizers[0].steps == run.global_step == 6
    run.fit_loop.max_epochs = 4
    run.fit(module, loader(), loader())
    assert run.optimizers[0].steps == run.global_step == 12


def test_activations_and_errors_are_cast_to_their_own_formats(tmp_path):
    """On fixed grids: hidden activations are multiples of 2^-4, sums of errors (a bias's gradient) of 2^-7."""
    seen = {"activations": [], "errors": []}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            hook = pl_module.net[2].register_forward_pre_hook(
                lambda _, inputs: seen["activations"].append(inputs[0].detach().clone())
            )
            self.remove = hook.remove

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["errors"].append(pl_module.net[0].bias.grad.clone())

        def on_train_end(self, trainer, pl_module):
            self.remove()

    torch.manual_seed(0)
    fit(tmp_path, Module(), LowPrecisionSGLD(None, None, "fixed8.4", "fixed8.7", seed=0), callbacks=[Look()])
    activations, errors = torch.cat(seen["activations"]), torch.cat(seen["errors"])
    assert torch.equal(activations * 2**4, (activations * 2**4).round())
    assert torch.equal(errors * 2**7, (errors * 2**7).round())
    assert not torch.equal(errors * 2**4, (errors * 2**4).round())
    assert activations.any()
