"""Collection keyed on optimizer steps, its resume, and what it refuses."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_convnet, small_mlp
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.callbacks import SampleCollector
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.samplers import CyclicalStepSize

STEPS_PER_EPOCH = 8


class States(Callback):
    """Copies of the module's state after every optimizer step, by step."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, module, *args):
        self.after[trainer.global_step] = copy.deepcopy(module.state_dict())


def fit(collector, *, epochs=3, module=None, data=None, plugin=None, ckpt_path=None, callbacks=(), **options):
    trainer = make_trainer(
        max_epochs=epochs,
        plugins=[LowPrecisionSGLD(seed=5) if plugin is None else plugin],
        callbacks=[collector, *callbacks],
        **options,
    )
    module = small_mlp() if module is None else module
    trainer.fit(module, datamodule=SyntheticData() if data is None else data, ckpt_path=ckpt_path)
    return trainer, module


def contents(bank):
    return [(sample.info, {name: t.clone() for name, t in sample.tensors.items()}) for sample in bank]


def assert_same_bank(a, b):
    a, b = contents(a), contents(b)
    assert [info for info, _ in a] == [info for info, _ in b]
    for (_, x), (_, y) in zip(a, b):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


# ----------------------------------------------------------------------------------------------------------- when, what


def test_burn_in_and_thinning():
    collector = SampleCollector(start=10, every=4)
    fit(collector)
    assert collector.bank.steps == [14, 18, 22]


def test_a_float_start_is_a_fraction_of_the_run():
    collector = SampleCollector(start=0.5, every=4)
    fit(collector)
    assert collector.bank.steps == [16, 20, 24]


def test_gradient_accumulation_collects_once_per_step():
    collector = SampleCollector()
    trainer, _ = fit(collector, accumulate_grad_batches=3)
    assert trainer.global_step == 9
    assert collector.bank.steps == list(range(1, 10))


def test_epoch_ends():
    collector = SampleCollector(start=8, every="epoch")
    fit(collector, epochs=4)
    assert collector.bank.steps == [16, 24, 32]


def test_last_samples_of_each_cycle_of_the_sampler():
    plugin = LowPrecisionSGLD(seed=5, schedule=CyclicalStepSize(12, sampling_steps=2))
    collector = SampleCollector(every=2, per_cycle=2)
    fit(collector, plugin=plugin)
    assert [(info.step, info.cycle) for info in collector.bank.infos] == [(10, 0), (12, 0), (22, 1), (24, 1)]
    assert collector.bank.infos[0].lr == pytest.approx(0.1 * plugin.schedule.factor(9))


@pytest.mark.parametrize("accumulator", ["low", "full", "bfp16"])
def test_a_sample_is_what_the_forward_pass_saw(accumulator):
    """Parameters as codes, BatchNorm statistics as they are; loading gives the state after that step, bit for bit."""
    collector, states = SampleCollector(every=5), States()
    data = SyntheticData(shape=(1, 6, 6))
    fit(
        collector,
        module=small_convnet(),
        data=data,
        plugin=LowPrecisionSGLD(seed=5, accumulator=accumulator),
        callbacks=[states],
    )
    assert {e.name: str(e.format) for e in collector.bank.spec.entries if e.format} == {
        f"net.{name}": "bfp8" for name in ("0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias")
    }
    module = small_convnet(seed=1)
    for index, info in enumerate(collector.bank.infos):
        collector.bank.load_into(module, index)
        assert info.temperature == 1e-3
        assert info.lr == 0.1
        for name, value in module.state_dict().items():
            assert torch.equal(value, states.after[info.step][name]), (info.step, name)


def test_excluded_parameters_are_stored_as_they_are():
    collector = SampleCollector(every=8)
    fit(collector, plugin=LowPrecisionSGLD(seed=5, exclude=["net.3"]))
    assert {e.name for e in collector.bank.spec.entries if e.format is None} == {"net.3.weight", "net.3.bias"}


def test_any_optimizer_can_be_collected_from():
    collector, states = SampleCollector(every=6), States()
    trainer = make_trainer(max_epochs=3, callbacks=[collector, states])
    trainer.fit(small_mlp(), datamodule=SyntheticData())
    assert [(i.step, i.temperature, i.lr) for i in collector.bank.infos] == [(s, None, 0.1) for s in (6, 12, 18, 24)]
    sample = collector.bank[1].state_dict()
    assert all(torch.equal(value, states.after[12][name]) for name, value in sample.items())


def test_the_learning_rate_is_that_of_the_step_not_of_the_next():
    class Scheduled(type(small_mlp())):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    collector = SampleCollector(every=1)
    fit(collector, module=Scheduled(small_mlp().net), epochs=1, max_steps=3)
    assert [info.lr for info in collector.bank.infos] == [1.0, 0.5, 0.25]


def test_collecting_does_not_change_the_chain():
    _, watched = fit(SampleCollector(), data=SyntheticData(shuffle=False))
    trainer, plain = make_trainer(max_epochs=3, plugins=[LowPrecisionSGLD(seed=5)]), small_mlp()
    trainer.fit(plain, datamodule=SyntheticData(shuffle=False))
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters()))


def test_manual_optimization_with_several_optimizers():
    class TwoSteps(type(small_mlp())):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]

    collector = SampleCollector(every=5)
    trainer, _ = fit(collector, module=TwoSteps(small_mlp().net), epochs=1)
    assert trainer.global_step == 2 * STEPS_PER_EPOCH
    assert collector.bank.steps == [6, 10, 16]  # the first batch end at or after steps 5, 10, 15


# --------------------------------------------------------------------------------------------- checkpoints and resuming


def same_batches():
    return SyntheticData(n_train=8, copies=STEPS_PER_EPOCH, shuffle=False)


def checkpointed_run(tmp_path, collector, stop_after=None, every=5, epochs=3, ckpt_path=None):
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=every, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True, "max_steps": -1 if stop_after is None else stop_after}
    return fit(collector, epochs=epochs, data=same_batches(), callbacks=[saver], ckpt_path=ckpt_path, **options)


@pytest.mark.parametrize("every", [1, 3])
def test_a_checkpoint_holds_the_sample_of_its_step(tmp_path, every):
    checkpointed_run(tmp_path, SampleCollector(every=every), every=3, epochs=1)
    for path in sorted((tmp_path / "ckpt").iterdir()):
        checkpoint = torch.load(path, weights_only=True)
        (state,) = (v for k, v in checkpoint["callbacks"].items() if k.startswith("SampleCollector"))
        bank = SampleBank()
        bank.load_state_dict(state["bank"])
        assert max(bank.steps) == checkpoint["global_step"]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("capacity", [None, 3])
def test_resume_gives_the_bank_of_an_uninterrupted_run(tmp_path, where, capacity):
    """Invariant: killed mid-epoch after samples that no checkpoint knows, resumed, the bank is bitwise the same."""

    def collector(name):
        return SampleCollector(None if where == "memory" else tmp_path / name, start=2, every=2, capacity=capacity)

    whole = collector("whole")
    checkpointed_run(tmp_path / "a", whole)
    killed = collector("parts")
    checkpointed_run(tmp_path / "b", killed, stop_after=14)
    resumed = collector("parts")
    checkpointed_run(tmp_path / "b", resumed, ckpt_path=tmp_path / "b" / "ckpt" / "step=10.ckpt")
    assert_same_bank(whole.bank, resumed.bank)
    assert resumed.collected == whole.collected


def test_a_checkpoint_written_before_our_hook_loses_nothing(tmp_path):
    """Invariant: what another callback saves between the step and our hook gives the same bank when resumed."""

    class Early(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def run(ckpt_path=None):
        collector = SampleCollector(every=3)
        trainer = make_trainer(max_epochs=2, plugins=[LowPrecisionSGLD(seed=5)], callbacks=[Early(), collector])
        trainer.fit(small_mlp(), datamodule=same_batches(), ckpt_path=ckpt_path)
        return collector.bank

    assert_same_bank(run(), run(tmp_path / "early.ckpt"))


def test_a_second_fit_continues(tmp_path):
    collector = SampleCollector(tmp_path, every=8)
    trainer, module = fit(collector, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=SyntheticData())
    assert collector.bank.steps == [8, 16]
    assert collector.collected == 2


def test_samples_of_another_run_are_not_touched(tmp_path):
    fit(SampleCollector(tmp_path, every=8), epochs=1)
    before = contents(SampleBank.open(tmp_path))
    with pytest.raises(BankError, match=r"already holds 1 samples.*ckpt_path.*another path.*append=True"):
        fit(SampleCollector(tmp_path, every=8), epochs=1)
    assert [info for info, _ in before] == SampleBank.open(tmp_path).infos


def test_append_makes_a_further_chain(tmp_path):
    fit(SampleCollector(tmp_path, every=8), epochs=1)
    fit(SampleCollector(tmp_path, every=4, append=True), epochs=1)
    bank = SampleBank.open(tmp_path)
    assert [(info.chain, info.step) for info in bank.infos] == [(0, 8), (1, 4), (1, 8)]


def test_a_new_trainer_with_a_used_collector_is_refused():
    collector = SampleCollector(every=8)
    fit(collector, epochs=1)
    with pytest.raises(BankError, match="Use a new SampleCollector for a new run"):
        fit(collector, epochs=1)


def test_testing_from_an_old_checkpoint_keeps_the_samples(tmp_path):
    collector = SampleCollector(tmp_path / "bank", every=5)
    trainer, module = checkpointed_run(tmp_path, collector)
    trainer.test(module, datamodule=SyntheticData(), ckpt_path=tmp_path / "ckpt" / "step=5.ckpt", verbose=False)
    assert SampleBank.open(tmp_path / "bank").steps == [5, 10, 15, 20]
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=same_batches())
    assert collector.bank.steps == [5, 10, 15, 20, 25, 30]


def test_a_checkpoint_brings_samples_to_a_process_that_has_none(tmp_path):
    used = SampleCollector(every=5)
    checkpointed_run(tmp_path, used)
    fresh = SampleCollector(every=5)
    trainer = make_trainer(callbacks=[fresh])
    path = tmp_path / "ckpt" / "step=10.ckpt"
    trainer.test(small_mlp(), datamodule=SyntheticData(), ckpt_path=path, verbose=False)
    assert fresh.bank.steps == [5, 10]


# ---------------------------------------------------------------------------------------------------- ends of all kinds


def test_keyboard_interrupt_leaves_the_bank_readable(tmp_path):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(SampleCollector(tmp_path), callbacks=[Interrupt()])
    assert SampleBank.open(tmp_path).steps == [1, 2, 3, 4, 5]


def test_early_stopping_and_max_steps():
    collector = SampleCollector(every="epoch")
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    fit(collector, epochs=10, callbacks=[stop])
    assert collector.bank.steps == [8, 16]
    collector = SampleCollector(every=5)
    fit(collector, epochs=-1, max_steps=11)
    assert collector.bank.steps == [5, 10]


def test_a_run_that_ends_early_without_a_sample_says_so():
    collector = SampleCollector(start=20)
    with pytest.warns(UserWarning, match=r"collected no sample: the run ended after 16 .* start=20 and every=1"):
        fit(collector, epochs=10, callbacks=[EarlyStopping("val_loss", patience=1, min_delta=1e9)])


@pytest.mark.parametrize("options", [{"start": 24}, {"every": 25}, {"start": 100, "every": "epoch"}])
def test_a_run_that_cannot_give_a_sample_is_refused(options):
    with pytest.raises(ValueError, match=r"will not collect a single sample: the run has 24 optimizer steps"):
        fit(SampleCollector(**options))


def test_a_dry_run_goes_through_collection_but_not_to_disk(tmp_path):
    collector = SampleCollector(tmp_path / "bank", start=1000)
    fit(collector, fast_dev_run=True)
    assert collector.bank.steps == [1]
    assert not (tmp_path / "bank").exists()
    collector.start = 0
    fit(collector, epochs=1)
    assert SampleBank.open(tmp_path / "bank").steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "`start`"),
        ({"start": 1.0}, "`start`"),
        ({"start": True}, "`start`"),
        ({"every": 0}, "`every`"),
        ({"every": "step"}, "`every`"),
        ({"cycle_length": 5}, "no effect without `per_cycle`"),
        ({"capacity": 0}, "`capacity`"),
        ({"policy": "best"}, "`policy`"),
    ],
)
def test_arguments_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SampleCollector(**options)


def test_cycles_must_be_known_and_agree():
    with pytest.raises(ValueError, match="needs the length of a cycle"):
        fit(SampleCollector(per_cycle=1))
    plugin = LowPrecisionSGLD(seed=5, schedule=CyclicalStepSize(12))
    with pytest.raises(ValueError, match="`cycle_length` is 6, but the sampler's cycles have 12"):
        fit(SampleCollector(per_cycle=1, cycle_length=6), plugin=plugin)


def test_a_fraction_of_an_endless_run_is_refused():
    with pytest.raises(ValueError, match="is a fraction of the run, whose number of steps is not known"):
        fit(SampleCollector(start=0.5), epochs=-1, callbacks=[pl.callbacks.Timer("00:00:00:05")])
