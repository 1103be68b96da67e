"""A resumed run is the checkpoint's chain: other settings are refused, taken from it, or begin a new chain."""

import copy
import os
import re
import shutil
from functools import partial

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.precision.changes import ChangedSettingsError
from lightning_lpsgld.samplers import HALP, SGHMC, SGLD, ConstantStepSize, CyclicalStepSize, PolynomialStepSize

HALF, STEPS = 4, 8

#: Every sampler with its accumulators.
ROWS = {
    "SGLD low": {},
    "SGLD full": {"accumulator": "full"},
    "SGHMC low": {"sampler": partial(SGHMC, friction=2.0, velocity_format="bfp8")},
    "SGHMC full": {"sampler": partial(SGHMC, friction=2.0), "accumulator": "full"},
    "SGLD 16 bits": {"accumulator": "bfp16"},
    "HALP": {"sampler": partial(HALP, mu=2.0), "temperature": 1e-3},
}
#: Settings that a checkpoint can give back, and how the message shows them.
VALUES = {
    "temperature": ({"temperature": 0.5}, "temperature: 0.001 in the checkpoint, 0.5 now"),
    "num_data": ({"num_data": 99}, "num_data: 32 in the checkpoint, 99 now"),
    "seed": ({"seed": 8}, "seed: 7 in the checkpoint, 8 now"),
    "schedule": (
        {"schedule": PolynomialStepSize(10.0)},
        r"schedule: ConstantStepSize\(\) in the checkpoint, PolynomialStepSize\(offset=10.0, power=0.55\) now",
    ),
    "weight_decay": ({"weight_decay": 0.25}, "weight_decay: 0.01 in the checkpoint, 0.25 now"),
    "lr": ({"lr": 0.02}, "lr: 0.05 in the checkpoint, 0.02 now"),
}
#: Settings that the run is built with.
BUILT = {
    "activations": ({"activations": None}, "activations: 'bfp8' in the checkpoint, None now"),
    "gradients": ({"gradients": "fixed8.7"}, "gradients: 'bfp8' in the checkpoint, 'fixed8.7' now"),
    "variance_corrected": ({"variance_corrected": False}, "variance_corrected: True in the checkpoint, False now"),
    "exclude": ({"exclude": ["net.2"]}, r"exempt: \(\) in the checkpoint, \('net.2.weight', 'net.2.bias'\) now"),
    "compute": ({"compute": "bf16-mixed"}, "compute: '32-true' in the checkpoint, 'bf16-mixed' now"),
}


class Sees(Callback):
    """The card as training begins, and all weights after every step."""

    def __init__(self):
        self.card, self.weights, self.lrs = None, [], []

    def on_train_batch_start(self, trainer, module, *args):
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.card = self.card or copy.deepcopy(trainer.precision_plugin.card)

    def on_train_batch_end(self, trainer, module, *args):
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in module.parameters()]))


class Scheduled(Classifier):
    def __init__(self, *args, scheduler=None, **options):
        super().__init__(*args, **options)
        self.scheduler = scheduler

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def fit(
    folder, steps, *, resume=False, lr=0.05, weight_decay=0.01, scheduler=None, module=None, ranks=1, collector=None,
    **options,
):  # fmt: skip
    """A run up to ``steps``; with ``resume`` from the checkpoint after half of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    module = module or Scheduled(net, lr=lr, weight_decay=weight_decay, scheduler=scheduler)
    sees, plugin = Sees(), LowPrecisionSGLD(**{"seed": 7, **options})
    callbacks = [
        collector or SampleCollector(folder / "bank", every=1),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=HALF, save_top_k=-1),
        sees,
    ]
    several = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    trainer = make_trainer(
        max_epochs=-1, max_steps=steps, plugins=[plugin], callbacks=callbacks, enable_checkpointing=True,
        limit_val_batches=0, **several,
    )  # fmt: skip
    data = SyntheticData(n_train=32, shuffle=False)
    trainer.fit(module, data, ckpt_path=folder / f"step={HALF}.ckpt" if resume else None)
    return sees, plugin, trainer


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """For every row a folder with the checkpoint after half of the steps, and the weights of the whole run."""
    made = {}
    for name, options in ROWS.items():
        whole = fit(tmp_path_factory.mktemp("whole"), STEPS, **options)[0].weights
        folder = tmp_path_factory.mktemp("half")
        fit(folder, HALF, **options)
        made[name] = (folder, whole)
    return made


@pytest.fixture
def half(halves, tmp_path, request):
    """A copy of the folder of a row, its options, and the weights of the whole run."""
    folder, whole = halves[request.param]
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", {**ROWS[request.param]}, whole


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "bank").iterdir()) if path.is_file()}


over_rows = pytest.mark.parametrize("half", ROWS, indirect=True)


def merged(changes):
    return {option: value for changed, _ in changes.values() for option, value in changed.items()}


@over_rows
def test_other_settings_are_refused_in_one_message_with_both_values(half):
    folder, options, _ = half
    before = contents(folder)
    with pytest.raises(ChangedSettingsError) as seen:
        fit(folder, STEPS, resume=True, **{**options, **merged(VALUES), **merged(BUILT)})
    message = str(seen.value)
    for _, words in (*VALUES.values(), *BUILT.values()):
        assert re.search(words, message), words
    assert "on_change='checkpoint'" in message
    assert "on_change='new'" in message
    assert message.count(" in the checkpoint, ") == len(VALUES) + len(BUILT)
    assert contents(folder) == before


@pytest.mark.parametrize("half", ["SGLD low"], indirect=True)
@pytest.mark.parametrize("change", [*VALUES, *BUILT])
def test_each_alone_is_refused_and_the_others_are_not_named(half, change):
    folder, options, _ = half
    changed, words = {**VALUES, **BUILT}[change]
    with pytest.raises(ChangedSettingsError, match=words) as seen:
        fit(folder, STEPS, resume=True, **{**options, **changed})
    assert str(seen.value).count(" in the checkpoint, ") == 1


@pytest.mark.parametrize(
    ("half", "changed", "words"),
    [
        ("SGLD low", {"accumulator": "full"}, "accumulator: 'low' in the checkpoint, 'full' now"),
        ("SGLD full", {"accumulator": "low"}, "accumulator: 'full' in the checkpoint, 'low' now"),
        ("SGLD 16 bits", {"accumulator": "full"}, "accumulator: 'bfp16' in the checkpoint, 'full' now"),
        ("SGLD 16 bits", {"accumulator": "mxint16"}, "accumulator: 'bfp16' in the checkpoint, 'bfp16b32' now"),
        ("SGLD low", {"weights": "fixed8.6"}, "weights: 'bfp8' in the checkpoint, 'fixed8.6' now"),
        ("SGLD low", ROWS["SGHMC low"], "sampler: 'SGLD' in the checkpoint, 'SGHMC' now"),
        ("SGHMC low", {"sampler": SGLD}, "sampler: 'SGHMC' in the checkpoint, 'SGLD' now"),
        ("SGHMC low", {"sampler": partial(SGHMC, friction=3.0, velocity_format="bfp8")}, "friction: 2.0 in.*, 3.0 now"),
        ("SGLD low", ROWS["HALP"], "sampler: 'SGLD' in the checkpoint, 'HALP' now"),
        ("HALP", {"sampler": SGLD}, "sampler: 'HALP' in the checkpoint, 'SGLD' now"),
        ("HALP", {"sampler": partial(HALP, mu=2.0, word_length=6)}, "offset_format: 'fixed8.0s' in.*, 'fixed6.0s' now"),
    ],
    indirect=["half"],
)
def test_another_sampler_accumulator_or_format_is_refused(half, changed, words):
    folder, options, _ = half
    with pytest.raises(ChangedSettingsError, match=words):
        fit(folder, STEPS, resume=True, **{**options, **changed})


@over_rows
def test_the_same_settings_go_on_bit_for_bit(half):
    folder, options, whole = half
    sees, plugin, _ = fit(folder, STEPS, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True))
    assert sees.card == plugin.card
    assert SampleBank.open(folder / "bank").steps == list(range(1, STEPS + 1))


@over_rows
def test_the_checkpoints_settings_are_taken_if_asked_for_and_the_card_shows_them(half):
    folder, options, whole = half
    changed = {**options, **merged(VALUES)}
    sees, _, trainer = fit(folder, STEPS, resume=True, on_change="checkpoint", **changed)
    assert all(torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True))
    card, group = sees.card, trainer.optimizers[0].param_groups[0]
    assert (card.temperature, card.num_data, card.seed, card.lr[0], card.weight_decay[0]) == (1e-3, 32, 7, 0.05, 0.01)
    assert (group["temperature"], group["seed"], group["weight_decay"]) == (1e-3, 7, 0.01)
    assert trainer.optimizers[0].num_data == 32
    assert trainer.optimizers[0].schedule == ConstantStepSize()
    later = torch.load(folder / f"step={STEPS}.ckpt", weights_only=False)["LowPrecisionSGLD"]["settings"]
    first = torch.load(folder / f"step={HALF}.ckpt", weights_only=False)["LowPrecisionSGLD"]["settings"]
    assert later == first, "the next checkpoint is of the same chain"


@over_rows
def test_what_the_run_was_built_with_is_not_taken_from_a_checkpoint(half):
    folder, options, _ = half
    with pytest.raises(ChangedSettingsError, match="cannot change what the run was built with") as seen:
        fit(folder, STEPS, resume=True, on_change="checkpoint", **{**options, **merged(VALUES), **merged(BUILT)})
    for _, words in BUILT.values():
        assert re.search(words, str(seen.value)), words
    assert "temperature" not in str(seen.value)


@over_rows
def test_a_new_chain_begins_at_the_checkpoints_weights_under_a_label_of_its_own(half):
    folder, options, whole = half
    changed = {"temperature": 0.5, "num_data": 99, "weight_decay": 0.25}
    sees, _, trainer = fit(folder, STEPS, resume=True, on_change="new", **{**options, **changed})
    sampler = trainer.optimizers[0]
    assert (sees.card.temperature, sees.card.num_data, sees.card.weight_decay[0]) == (0.5, 99, 0.25)
    assert (sampler.param_groups[0]["temperature"], sampler.num_data, sampler.steps) == (0.5, 99, STEPS)
    assert len(sees.weights) == STEPS - HALF
    assert not torch.equal(sees.weights[0], whole[HALF])
    assert (sees.weights[0] - whole[HALF - 1]).abs().max() < 3, "did not start from the checkpoint's weights"
    bank = SampleBank.open(folder / "bank")
    assert [(s.chain, s.step) for s in bank.infos] == [(0, k) for k in range(1, 5)] + [(1, k) for k in range(5, 9)]


@pytest.mark.parametrize("half", ["SGLD low"], indirect=True)
def test_another_sampler_can_begin_a_new_chain(half):
    folder, options, _ = half
    changed = {**ROWS["SGHMC low"], "activations": None, "errors": None}
    sees, plugin, _ = fit(folder, STEPS, resume=True, on_change="new", **{**options, **changed})
    assert "SGHMC" in plugin.card.sampler
    assert "activations" not in plugin.card.formats
    assert len(sees.weights) == STEPS - HALF
    fit(folder, STEPS, resume=True, on_change="new", **options)


@pytest.mark.parametrize("half", ["SGLD low"], indirect=True)
@pytest.mark.parametrize("policy", ["checkpoint", "new"])
def test_a_policy_changes_nothing_where_nothing_differs(half, policy):
    folder, options, whole = half
    sees, *_ = fit(folder, STEPS, resume=True, on_change=policy, **options)
    assert all(torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True))
    assert SampleBank.open(folder / "bank").chains == [0]


@pytest.mark.parametrize("half", ["SGLD low"], indirect=True)
def test_a_seed_that_nobody_asked_for_is_no_difference(half):
    folder, options, whole = half
    sees, *_ = fit(folder, STEPS, resume=True, **{**options, "seed": None})
    assert all(torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True))
    assert sees.card.seed == 7


@pytest.mark.parametrize("half", ["SGLD low"], indirect=True)
@pytest.mark.parametrize("policy", ["refuse", "checkpoint", "new"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arithmetic": "auto"}, "arithmetic: 'simulated' in the checkpoint, 'auto' now"),
        ({"backend": "reference"}, "backend: 'auto' in the checkpoint, 'reference' now"),
    ],
)
def test_another_arithmetic_is_said_and_makes_no_other_chain(half, policy, changed, words):
    """It is exact where the other rounds sums: the same law, other last bits. The next checkpoint says what it was."""
    folder, options, whole = half
    with pytest.warns(UserWarning, match=rf"{words}\)\. It samples the same posterior .* not be those of an uninterr"):
        sees, *_ = fit(folder, STEPS, resume=True, on_change=policy, **options, **changed)
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(sees.weights[:1], whole[HALF : HALF + 1], strict=True))
    assert SampleBank.open(folder / "bank").chains == [0]
    ((name, value),) = changed.items()
    later = torch.load(folder / f"step={STEPS}.ckpt", weights_only=False)["LowPrecisionSGLD"]["settings"]
    assert later[name] == value


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "warmup": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: (k + 1) / STEPS),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, STEPS, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_change_the_learning_rate_and_are_no_difference(tmp_path, name):
    whole, *_ = fit(tmp_path / "whole", STEPS, scheduler=SCHEDULERS[name])
    fit(tmp_path / "run", HALF, scheduler=SCHEDULERS[name])
    resumed, *_ = fit(tmp_path / "run", STEPS, resume=True, scheduler=SCHEDULERS[name])
    assert len(set(whole.lrs)) > 2
    assert resumed.lrs == whole.lrs[HALF:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights, whole.weights[HALF:], strict=True))
    assert resumed.card.lr[0] == whole.lrs[HALF], "the card shows the rate that the first step has"
    if name != "one cycle":  # which sets its own rates
        with pytest.raises(ChangedSettingsError, match=r"lr: 0.05 in the checkpoint, 0.02 now"):
            fit(tmp_path / "run", STEPS, resume=True, scheduler=SCHEDULERS[name], lr=0.02)


def test_a_new_chain_cannot_have_another_rate_than_the_schedulers(tmp_path):
    fit(tmp_path, HALF, scheduler=SCHEDULERS["step"])
    with pytest.raises(ChangedSettingsError, match="cannot change the learning rate of a run with LR schedulers"):
        fit(tmp_path, STEPS, resume=True, scheduler=SCHEDULERS["step"], lr=0.02, on_change="new")
    sees, *_ = fit(tmp_path, STEPS, resume=True, scheduler=SCHEDULERS["step"], temperature=0.5, on_change="new")
    assert sees.lrs[0] == 0.0125


def test_cycles_that_an_extended_run_would_stretch_are_refused(tmp_path):
    """``cycles`` divides the whole run: with more steps, a resumed run would be another chain."""
    fit(tmp_path, HALF, cycles=2)
    with pytest.raises(ChangedSettingsError, match=r"CyclicalStepSize\(cycle_length=2.*cycle_length=4.* now"):
        fit(tmp_path, STEPS, resume=True, cycles=2)
    _, _, trainer = fit(tmp_path, STEPS, resume=True, cycles=2, on_change="checkpoint")
    assert trainer.optimizers[0].schedule == CyclicalStepSize.spread(total_steps=HALF, cycles=2)


class Own:
    def factor(self, step):
        return 1.0

    def noise(self, step):
        return True


def test_a_schedule_of_the_users_own_cannot_be_taken_from_a_checkpoint(tmp_path):
    fit(tmp_path, HALF, schedule=Own())
    fit(tmp_path, HALF + 1, resume=True, schedule=Own())
    with pytest.raises(ChangedSettingsError, match=r"built with: schedule: Own\(\) in the checkpoint"):
        fit(tmp_path, STEPS, resume=True, on_change="checkpoint")


def test_a_sampler_of_the_users_own_is_compared_too(tmp_path):
    def module(temperature):
        torch.manual_seed(0)
        made = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        made.configure_optimizers = lambda: SGLD(
            made.parameters(), 0.05, num_data=64, temperature=temperature, weight_format="bfp8", seed=3
        )
        return made

    fit(tmp_path, HALF, module=module(0.1))
    fit(tmp_path, HALF + 1, resume=True, module=module(0.1))
    with pytest.raises(ChangedSettingsError, match=r"temperature: 0.1 in the checkpoint, 0.2 now"):
        fit(tmp_path, STEPS, resume=True, module=module(0.2))


@over_rows
def test_checkpoints_from_before_settings_were_saved_are_compared_as_far_as_they_tell(half):
    folder, options, whole = half
    path = folder / f"step={HALF}.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["LowPrecisionSGLD"]["settings"]
    torch.save(checkpoint, path)
    told = {
        name: {**VALUES, **BUILT}[name] for name in ("temperature", "num_data", "seed", "weight_decay", "activations")
    }
    with pytest.raises(ChangedSettingsError) as seen:
        fit(folder, STEPS, resume=True, **{**options, **merged(told)})
    for _, words in told.values():
        assert re.search(words, str(seen.value)), words
    sees, *_ = fit(folder, STEPS, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True))


# ------------------------------------------------------------------------------------------------------- two ranks


def on_two_ranks(folder):
    """Per row: outcomes of a changed setting under each policy, on each rank."""
    from pathlib import Path

    results = {}
    for name, options in ROWS.items():
        place = Path(folder) / name.replace(" ", "-")
        whole = fit(place / "whole", STEPS, ranks=2, **options)[0].weights
        fit(place / "run", HALF, ranks=2, **options)
        changed = {**options, "temperature": 0.5, "num_data": 99}
        found = {"refused": None}
        try:
            fit(place / "run", STEPS, ranks=2, resume=True, **changed)
        except ChangedSettingsError as error:
            found["refused"] = str(error)
        sees, *_ = fit(place / "run", STEPS, ranks=2, resume=True, on_change="checkpoint", **changed)
        found["same"] = [torch.equal(a, b) for a, b in zip(sees.weights, whole[HALF:], strict=True)]
        found["card"] = (sees.card.temperature, sees.card.num_data)
        sees, _, trainer = fit(place / "run", STEPS, ranks=2, resume=True, on_change="new", **changed)
        found["new"] = (trainer.optimizers[0].param_groups[0]["temperature"], trainer.optimizers[0].num_data)
        found["new weights"] = sees.weights[-1].tolist()
        results[name] = found
    results["rank"] = int(os.environ["RANK"])
    return results


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_refuse_take_over_and_begin_anew_together(tmp_path):
    first, second = run_ranks(on_two_ranks, str(tmp_path), timeout=600)
    for name in ROWS:
        for found in (first[name], second[name]):
            assert "temperature: 0.001 in the checkpoint, 0.5 now" in found["refused"]
            assert "num_data: 32 in the checkpoint, 99 now" in found["refused"]
            assert found["same"] == [True] * (STEPS - HALF)
            assert found["card"] == (1e-3, 32)
            assert found["new"] == (0.5, 99)
        assert first[name]["new weights"] == second[name]["new weights"]
        bank = SampleBank.open(tmp_path / name.replace(" ", "-") / "run" / "bank")
        assert bank.chains == [0, 1]
