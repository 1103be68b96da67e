"""``storage="codes"`` in the Trainer: the run is that of floats, bit for bit, whatever users combine it with."""

from __future__ import annotations

import copy
import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from test_compatibility import Module, loader, trainer
from torch import nn

from lightning_lpsgld import (
    EffectiveTemperature,
    EnsembleEvaluation,
    GradientShrinkage,
    LowPrecisionSGLD,
    SampleBank,
    SampleCollector,
)
from lightning_lpsgld.arithmetic import capability, layers
from lightning_lpsgld.ops import CodedTensor, float_parameters_, quantize
from lightning_lpsgld.samplers import SGHMC, SGLD, SVRG, CyclicalStepSize


def bits(module):
    values = float_parameters_(copy.deepcopy(module)).state_dict().values()
    return [v.view(torch.int32) if v.dtype == torch.float32 else v for v in values]


def module_of(seed=0, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    return Module(net, **options)


def fitted(tmp_path, storage, make=module_of, plugin=None, data=None, ckpt_path=None, **options):
    module = make()
    arguments = {"seed": 0, "check_replicas": 0, "storage": storage, **(plugin or {})}
    run = trainer(tmp_path / storage, LowPrecisionSGLD(**arguments), **options)
    torch.manual_seed(1)
    run.fit(module, data or loader(), ckpt_path=ckpt_path)
    return run, module


def assert_same_run(tmp_path, **options):
    (mine, codes), (theirs, floats) = [fitted(tmp_path, storage, **options) for storage in ("codes", "float")]
    assert any(isinstance(p, CodedTensor) for p in codes.parameters())
    assert not any(isinstance(p, CodedTensor) for p in floats.parameters())
    assert list(codes.state_dict()) == list(floats.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bits(codes), bits(floats), strict=True))
    assert mine.callback_metrics.keys() == theirs.callback_metrics.keys()
    assert all(torch.equal(mine.callback_metrics[key], theirs.callback_metrics[key]) for key in mine.callback_metrics)
    return mine, codes, theirs, floats


def step_lr(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "interval": "step"}


def head_only():
    module = module_of()
    for param in module.net[0].parameters():
        param.requires_grad_(False)
    return module


def without_dropout():
    module = module_of()
    module.net[3] = nn.Identity()
    return module


class Tied(Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), nn.Linear(8 * 5, 8), nn.Linear(8, 7, bias=False))
        )
        self.net[3].weight = self.net[0].weight


class Encoder(Module):
    def __init__(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        super().__init__(
            nn.Sequential(nn.Embedding(7, 8), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3))
        )


TOKENS = {"data": loader(shape=(5,), classes=3, sequence_of=7)}
CASES = {
    "default": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipped values": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "loss scale": {"plugin": {"loss_scale": 4.0}, "accumulate_grad_batches": 2},
    "scheduler": {"make": functools.partial(module_of, scheduler=step_lr)},
    "cycles": {"plugin": {"schedule": CyclicalStepSize(cycle_length=3, sampling_steps=1)}},
    "temperature 1, fixed point": {"plugin": {"weights": "fixed8.6", "temperature": 1.0}},
    "weight decay by prior": {"plugin": {"prior_std": {"*weight": 0.5}}},
    "bf16-mixed": {"plugin": {"compute": "bf16-mixed"}},
    "saved activations": {"plugin": {"saved_activations": "codes"}},
    "four bits": {"plugin": {"saved_activations": "codes", "weights": "bfp4", "activations": "bfp4"}},
    "sums of 16 bits": {"plugin": {"accumulator": "bfp16", "temperature": 1.0}},
    "sums of 16 bits by the sampler": {"plugin": {"sampler": functools.partial(SGLD, accumulator="fixed16.14")}},
    "six bits, integers": {"plugin": {"weights": "bfp6", "arithmetic": "auto"}, "make": without_dropout},
    "integers": {"plugin": {"arithmetic": "auto"}, "make": without_dropout},
    "a part, the rest by Adam": {
        "plugin": {"sampled": ["net.4*"]},
        "make": functools.partial(module_of, optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.01)),
    },
    "excluded": {"plugin": {"exclude": [nn.BatchNorm1d]}},
    "frozen": {"make": head_only},
    "tied": {"make": Tied, **TOKENS},
    "encoder": {"make": Encoder, **TOKENS},
    "partial": {"plugin": {"sampler": functools.partial(SGLD, variance_corrected=False)}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_that_of_floats(case, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_WORTHWHILE", 0)
    mine, codes, theirs, _ = assert_same_run(tmp_path, **CASES[case])
    assert ("of sums" in mine.precision_plugin.card.storage) == case.startswith("sums")
    words = "until the last of 2 batches" if "accumulate_grad_batches" in CASES[case] else "one gradient at a time"
    assert words in mine.precision_plugin.card.storage
    assert mine.precision_plugin.card.storage in str(mine.precision_plugin.card)
    assert theirs.precision_plugin.card.storage == ""
    if case == "integers" and capability().onednn:
        assert mine.precision_plugin.layer_report["net.4"] == "integer"
    held = {name for name, p in codes.named_parameters() if isinstance(p, CodedTensor)}
    if case == "tied":
        assert codes.net[3].weight is codes.net[0].weight
    expected = {
        "a part, the rest by Adam": {"net.4.weight", "net.4.bias"},
        "frozen": {"net.1.weight", "net.1.bias", "net.4.weight", "net.4.bias"},
        "excluded": {"net.0.weight", "net.0.bias", "net.4.weight", "net.4.bias"},
    }.get(case, {name for name, _ in codes.named_parameters()})
    assert held == expected


class OneGradient(Callback):
    """Counts the gradients that are there when a weight moves."""

    def __init__(self):
        self.most = 0

    def on_train_start(self, run, module):
        def observe(group, params, grads):
            self.most = max(self.most, sum(p.grad is not None for p in module.parameters()))

        run.optimizers[0].gradient_observers.append(observe)


def test_one_gradient_at_a_time(tmp_path):
    counts = {storage: OneGradient() for storage in ("codes", "float")}
    for storage, count in counts.items():
        fitted(tmp_path, storage, callbacks=[count])
    assert counts["codes"].most == 1
    assert counts["float"].most == 6


@pytest.mark.parametrize("resumed", ["codes", "float"])
@pytest.mark.parametrize("saved", ["codes", "float"])
def test_checkpoints_go_from_each_storage_to_each(saved, resumed, tmp_path):
    """Of weights and of what their steps are summed in."""
    make = functools.partial(Module, nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)))
    make = functools.partial(copy.deepcopy, make())  # no dropout: its masks are the global generator's
    plugin = {"accumulator": "bfp16"}
    whole = fitted(tmp_path / "whole", "float", make, plugin, max_epochs=3)[1]
    keep = ModelCheckpoint(tmp_path, filename="half", save_last=False)
    fitted(tmp_path / "half", saved, make, plugin, max_epochs=1, callbacks=[keep], enable_checkpointing=True)
    _, module = fitted(tmp_path / "rest", resumed, make, plugin, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert any(isinstance(p, CodedTensor) for p in module.parameters()) == (resumed == "codes")
    assert all(torch.equal(a, b) for a, b in zip(bits(module), bits(whole), strict=True))


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    first = fitted(tmp_path, "float")[1]
    torch.save(first.state_dict(), tmp_path / "weights.pt")
    assert_same_run(tmp_path / "second", plugin={"start_from": tmp_path / "weights.pt"})


def test_a_second_fit_goes_on_and_another_storage_gives_floats_back(tmp_path):
    results = []
    for storages in (("codes", "codes"), ("float", "float"), ("codes", "float")):
        module = module_of()
        for number, storage in enumerate(storages):
            torch.manual_seed(number)
            trainer(tmp_path, LowPrecisionSGLD(seed=number, storage=storage)).fit(module, loader())
        results.append(bits(module))
        assert any(isinstance(p, CodedTensor) for p in module.parameters()) == (storages[-1] == "codes")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_bank_and_its_averages_are_the_same(tmp_path):
    """Samples have the same bytes; validation runs them through the module and puts its weights back."""
    metrics, files = [], []
    for storage in ("codes", "float"):
        folder = tmp_path / storage / "bank"
        collector = SampleCollector(folder, every=2, start=2)
        module, plugin = module_of(), LowPrecisionSGLD(seed=0, storage=storage)
        run = trainer(tmp_path, plugin, callbacks=[collector, EnsembleEvaluation()], max_epochs=3)
        torch.manual_seed(1)
        run.fit(module, loader(), loader())
        metrics.append({k: float(v) for k, v in run.callback_metrics.items()})
        bank = SampleBank.open(folder)
        files.append([{k: v.clone() for k, v in sample.tensors.items()} for sample in bank])
        before = bits(module)
        bank[0].load_into(module)
        assert any(not torch.equal(a, b) for a, b in zip(before, bits(module)))
        stored = bank[0].state_dict()
        assert all(torch.equal(module.state_dict()[name] + 0, value + 0) for name, value in stored.items())
    assert metrics[0] == metrics[1]
    assert any("ensemble" in key for key in metrics[0])
    for mine, theirs in zip(*files, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_meters_read_the_same(tmp_path):
    tables, verdicts = [], []
    for storage in ("codes", "float"):
        meters = [EffectiveTemperature(every_n_steps=2), GradientShrinkage(every_n_steps=2)]
        fitted(tmp_path, storage, callbacks=meters, plugin={"weights": "fixed8.4"})
        tables.append([meter.table for meter in meters])
        verdicts.append(meters[0].message)
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] is not None, "a coarse grid is warmer than T = 1e-3, which is said with what would help"
    assert tables[0][0].keys() == tables[1][0].keys()
    assert repr(tables[0]) == repr(tables[1])


def test_the_network_is_built_as_codes_with_the_weights_that_floats_would_have(tmp_path):
    plugin = LowPrecisionSGLD(storage="codes", seed=0, accumulator="bfp16", check_replicas=0)
    run = trainer(tmp_path, plugin)
    with run.init_module():
        module = module_of()
    assert all(isinstance(p, CodedTensor) for p in module.parameters())
    floats = module_of()
    for mine, theirs in zip(module.parameters(), floats.parameters()):
        assert torch.equal(mine + 0, quantize(theirs.detach(), "bfp8", rounding="nearest"))
    torch.manual_seed(1)
    run.fit(module, loader())
    _, twin = fitted(tmp_path, "float", plugin={"accumulator": "bfp16"})
    assert all(torch.equal(a, b) for a, b in zip(bits(module), bits(twin), strict=True)), "sums began at other values"
    chosen = LowPrecisionSGLD(storage="codes", exclude=["net.0"])
    with (
        pytest.raises(ValueError, match=r"exclude=\('net.0',\) cannot choose among them"),
        trainer(tmp_path, chosen).init_module(),
    ):
        pass


def test_configure_model_builds_codes_too(tmp_path):
    class Late(Module):
        def configure_model(self):
            if not isinstance(self.net, nn.Identity):
                return
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
            self.built_as = [type(p.data) for p in self.net.parameters()]

    module = Late(nn.Identity())
    trainer(tmp_path, LowPrecisionSGLD(storage="codes", seed=0)).fit(module, loader())
    assert set(module.built_as) == {CodedTensor}, "put into the module, all its parts are codes"


class Clips(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


class Looks(Module):
    def on_after_backward(self):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "weights must have a format"),
        ({"accumulator": "full"}, "accumulator='full' keeps a float sum"),
        ({"prior_mean": "initial"}, "prior_mean='initial' keeps a float mean"),
        ({"sampler": functools.partial(SGHMC, friction=1.0)}, "sampler=SGHMC keeps floats"),
        ({"sampler": SVRG, "weights": "fixed8.6"}, "sampler=SVRG keeps floats"),
        ({"sampler": functools.partial(SGLD, accumulator="full")}, "accumulator='full' keeps"),
        ({"storage": "bytes"}, "`storage` must be one of"),
    ],
)
def test_arguments_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        LowPrecisionSGLD(**{"storage": "codes", **options})


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Module, {"gradient_clip_val": 1.0}, "needs the norm of all gradients"),
        (lambda: torch.compile(Module()), {}, "a compiled module has its weights traced as floats"),
        (Clips, {}, "Clips.configure_gradient_clipping sees gradients only when they are gone"),
        (
            Module,
            {"callbacks": [StochasticWeightAveraging(0.1)]},
            "StochasticWeightAveraging averages weights in",
        ),
        (
            lambda: Module(optimizer=lambda m: torch.optim.SGD(m.net[0].parameters(), lr=0.1)),
            {},
            "net.2.weight became codes.*no sampler moves it",
        ),
    ],
)
def test_runs_that_do_not_go_together(module, options, message, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        trainer(tmp_path, LowPrecisionSGLD(storage="codes", seed=0), **options).fit(module(), loader())


def test_sharding_is_refused(tmp_path):
    class Sharded(Module):
        def configure_model(self):
            pass

    plugin = LowPrecisionSGLD(storage="codes", seed=0)
    run, module = trainer(tmp_path, plugin), Sharded()
    run.strategy.connect(module)
    module.trainer = run
    run.state.fn = "fit"
    run._accelerator_connector.strategy = ModelParallelStrategy()
    run.strategy.connect(module)
    with pytest.raises(RuntimeError, match="ModelParallelStrategy shards float parameters"):
        plugin.convert_module(module)


def test_a_hook_that_would_see_no_gradients_is_told(tmp_path):
    with pytest.warns(UserWarning, match="Looks.on_after_backward comes when gradients"):
        trainer(tmp_path, LowPrecisionSGLD(storage="codes", seed=0)).fit(Looks(), loader())


def test_an_infinite_loss_is_refused_before_anything_moves(tmp_path):
    class Blows(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < 1 else loss + float("inf")

    module = Blows()
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, run, module, *args):
            kept.append(bits(module))

    run = trainer(tmp_path, LowPrecisionSGLD(storage="codes", seed=0, loss_scale=1.0), callbacks=[Keep()])
    with pytest.raises(FloatingPointError, match="loss is inf at step 1; no parameter was changed"):
        run.fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], bits(module), strict=True))
    run.optimizers[0].state_dict()


def test_manual_optimization_is_as_with_floats(tmp_path):
    class Manual(Module):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    assert_same_run(tmp_path, make=Manual)


def test_testing_and_predicting_take_codes(tmp_path):
    run, module = fitted(tmp_path, "codes")
    floats = float_parameters_(copy.deepcopy(module))
    quiet = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert run.test(module, loader(), verbose=False)[0].keys() == {"test_loss"}
    for mine, theirs in zip(quiet.predict(module, loader()), quiet.predict(floats, loader())):
        assert torch.equal(mine, theirs)
