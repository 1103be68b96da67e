"""Sampling a part of a network: the rest is the user's own optimizer's, what is frozen is left alone."""

import copy
import logging

import pytest
import torch
from helpers.loaders import ResumableLoader
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from test_compatibility import Module, fit, loader, on_grid, trainer
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleCollector
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.precision.parts import frozen_modules, matching_parameters
from lightning_lpsgld.samplers import SGHMC, SGLD, SVRG, PreconditionedSGLD, sample_part

UNCAST = {"activations": None, "errors": None}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()),
        nn.Linear(8, 3),
    )  # fmt: skip


def adamw(module, head_lr=0.01):
    """Two groups, the second the head's; momentum and second moments with a state of their own."""
    body = [p for name, p in module.named_parameters() if not name.startswith("net.2.")]
    groups = [{"params": body}, {"params": list(module.net[2].parameters()), "lr": head_lr}]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


# ------------------------------------------------------------------------------------------------------ who moves what


def test_the_rest_follows_the_users_own_optimizer_bit_for_bit(tmp_path):
    """Learning rate 0 and T = 0 on the sampled part, against AdamW on the others alone, head fixed where it lies."""
    module = Module(network(), optimizer=lambda m: adamw(m, head_lr=0.0), scheduler=halving)
    plugin = LowPrecisionSGLD(sampled=("net.2.*",), temperature=0.0, seed=0, **UNCAST)
    run = fit(tmp_path, module, plugin)
    alone = Module(network())
    with torch.no_grad():
        for param in alone.net[2].parameters():
            param.copy_(quantize(param, "bfp8", rounding="nearest"))
    optimizer = torch.optim.AdamW([p for n, p in alone.named_parameters() if "net.2." not in n], 0.02, weight_decay=0.1)
    schedule = halving(optimizer)
    for _ in range(2):
        for number, batch in enumerate(loader()):
            optimizer.zero_grad()
            alone.training_step(batch, number).backward()
            optimizer.step()
        schedule.step()
    for (name, a), b in zip(module.named_parameters(), alone.parameters()):
        assert torch.equal(a, b), name
    (sampler,) = run.optimizers
    for a, b in zip(module.parameters(), optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[b].items():
            assert torch.equal(sampler.state[a][key], value), key


def test_only_the_part_is_sampled_and_rounded(tmp_path):
    module = Module(network(), optimizer=adamw, scheduler=halving)
    module.net[0].requires_grad_(False)
    frozen = [p.detach().clone() for p in module.net[0].parameters()]
    plugin, collector = LowPrecisionSGLD(sampled=("net.2.*", nn.LayerNorm), seed=0), SampleCollector()
    (sampler,) = fit(tmp_path, module, plugin, callbacks=[collector]).optimizers
    assert on_grid([*module.net[2].parameters(), *module.net[1][1].parameters()])
    assert not on_grid(module.net[1][0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(frozen, module.net[0].parameters()))
    assert plugin.run.parts.sampled == ("net.1.1.weight", "net.1.1.bias", "net.2.weight", "net.2.bias")
    assert plugin.run.parts.trained == ("net.1.0.weight", "net.1.0.bias")
    assert plugin.run.parts.frozen == ("net.0.0.weight", "net.0.0.bias")
    card = plugin.card
    assert (card.sampled, card.trained, card.frozen, card.weights) == (16 + 27, 72, 56, 16 + 27)
    assert "43 sampled, 72 trained by the module's own optimizers, 56 frozen" in str(card)
    assert [sampler.step_size(group) for group in sampler.sampled_groups] == [0.02 / 4, 0.01 / 4], "schedulers go on"
    formats = {entry.name: entry.format for entry in collector.bank.spec.entries}
    assert {name for name, fmt in formats.items() if fmt is not None} == set(plugin.run.parts.sampled)


@pytest.mark.parametrize("accumulator", ["low", "bfp16"])
@pytest.mark.parametrize("sampler", [SGLD, SGHMC, PreconditionedSGLD])
def test_every_sampler_with_weights_on_a_grid_samples_a_part(sampler, accumulator):
    """The companion steps once a step, sees no gradient rounding, and one state dict holds both."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    options = {"accumulator": accumulator, **({"friction": 1.0} if sampler is SGHMC else {})}
    head = dict.fromkeys(net[2].parameters(), 0.25)
    opt = sample_part(sampler, optimizer, head, num_data=10, temperature=0.5, weight_format="bfp8", seed=1, **options)
    assert [group["weight_decay"] for group in opt.param_groups] == [0.25, 0.0]
    for _ in range(2):
        opt.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        net(torch.ones(4, 6)).square().sum().backward()
        opt.step()
        schedule.step()
    assert on_grid(net[2].parameters())
    assert not on_grid(net[0].parameters())
    assert all(optimizer.state[p]["step"] == 2 for p in net[0].parameters())
    assert opt.step_size(opt.sampled_groups[0]) == 0.01 / 4
    again_net = network()
    again_net.load_state_dict(net.state_dict())
    other = torch.optim.Adam(again_net.parameters(), lr=0.01)
    head = dict.fromkeys(again_net[2].parameters(), 0.25)
    again = sample_part(sampler, other, head, num_data=10, temperature=0.5, weight_format="bfp8", seed=1, **options)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for built, made in ((net, opt), (again_net, again)):
        made.zero_grad()
        built(torch.ones(4, 6)).square().sum().backward()
        made.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again_net.parameters()))


@pytest.mark.parametrize("accumulator", ["low", "bfp16"])
@pytest.mark.parametrize("stop", [3, 4], ids=["epoch-end", "mid-epoch"])
def test_resume_equals_uninterrupted_bitwise(tmp_path, stop, accumulator):
    def run(max_steps, ckpt=None):
        module = Module(network(), optimizer=adamw, scheduler=halving)
        module.net[0].requires_grad_(False)
        plugin = LowPrecisionSGLD(
            sampled=("net.2",), prior_mean="initial", prior_std=0.5, temperature=0.1, seed=None if ckpt else 9,
            accumulator=accumulator,
        )  # fmt: skip
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        made = trainer(
            tmp_path, plugin, max_epochs=-1, max_steps=max_steps, callbacks=[saver], enable_checkpointing=True
        )
        made.fit(module, ResumableLoader(loader().dataset, 16), ckpt_path=ckpt)
        return module, made.optimizers[0]

    whole, full = run(8)
    run(stop)
    resumed, continued = run(8, tmp_path / f"step={stop}.ckpt")
    assert continued.steps == full.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        mine, other = full.state.get(a, {}), continued.state.get(b, {})
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def _rank():
    module = Module(network(), optimizer=adamw)
    plugin = LowPrecisionSGLD(sampled=("net.2.*",), temperature=0.5, seed=0, check_replicas=1)
    fit(None, module, plugin, devices=2, strategy="ddp")
    return [p.detach() for p in module.parameters()]


def _thawing():
    """What a fit says that unfreezes a backbone on two ranks, which DDP then does not average."""
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    plugin = LowPrecisionSGLD(sampled=("net.2",), seed=0, check_replicas=1)
    try:
        fit(None, Backboned(), plugin, devices=2, strategy="ddp", callbacks=[thaw], max_epochs=3)
    except RuntimeError as error:
        return str(error)
    return "went on"


def test_replicas_that_a_thawed_backbone_drives_apart_are_stopped():
    for message in run_ranks(_thawing):
        assert "rank" in message
        assert message != "went on"


def test_two_ranks_stay_bit_identical():
    first, second = run_ranks(_rank)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not all(torch.equal(a, b) for a, b in zip(first, network().parameters()))


# ------------------------------------------------------------------------------------------------ what is left alone


def test_frozen_layers_are_not_cast_unless_asked(tmp_path):
    sites = {}
    for cast_frozen in (False, True):
        module = Module(network(), optimizer=adamw)
        module.net[0].requires_grad_(False)
        plugin = LowPrecisionSGLD(seed=0, cast_frozen=cast_frozen)
        seen = []

        class Look(Callback):
            def on_train_start(self, trainer, pl_module, plugin=plugin, seen=seen):
                seen.extend(site["name"] for site in plugin.casting.describe())

        fit(tmp_path, module, plugin, callbacks=[Look()])
        sites[cast_frozen] = seen
    assert set(sites[True]) - set(sites[False]) == {"net.0.0", "net.0.1"}
    assert "net.1.0" in sites[False]


def test_a_frozen_network_under_one_trained_parameter_is_cast_nowhere(tmp_path):
    """A part with no site at all (here a bare parameter) is no error."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = network().requires_grad_(False), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.body(x) * self.scale

    plugin = LowPrecisionSGLD(sampled=("*scale",), seed=0)
    fit(tmp_path, Module(Scaled()), plugin)
    assert plugin.card.casts == 0
    assert plugin.card.sampled == 3


def test_frozen_modules_and_patterns_by_hand():
    net = network()
    net[1][0].requires_grad_(False)
    assert frozen_modules(net) == ["1.0"]
    assert frozen_modules(network().requires_grad_(False)) == []
    assert matching_parameters(net, ["1.*"], "sampled") == ("1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias")
    assert matching_parameters(net, ["1", nn.LayerNorm], "sampled") == matching_parameters(net, ["1.*"], "sampled")
    with pytest.raises(ValueError, match=r"'nothing\.\*' matches no parameter of Sequential.*0\.0\.weight"):
        matching_parameters(net, ["nothing.*"], "sampled")
    with pytest.raises(TypeError, match="takes patterns of names and types of modules, got 3"):
        matching_parameters(net, [3], "sampled")


# ------------------------------------------------------------------------------------------- joining during the run


class Unfreeze(Callback):
    """Flips requires_grad at the second epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)


def test_parameters_whose_requires_grad_is_flipped_join_the_chain(tmp_path, caplog):
    module, collector = Module(network(), optimizer=adamw), SampleCollector()
    module.net[0].requires_grad_(False)
    before = module.net[0][0].weight.detach().clone()
    seen = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.net[0][0].weight.detach().clone())

    with caplog.at_level(logging.WARNING):
        fit(tmp_path, module, LowPrecisionSGLD(seed=0), callbacks=[Unfreeze(), Look(), collector])
    assert torch.equal(seen[0], before), "frozen parameters are left alone, off the grid as they were"
    assert not torch.equal(seen[1], before)
    assert on_grid(module.parameters())
    assert "2 parameter(s), net.0.0.weight among them, joined the chain of SGLD at step 3" in caplog.text
    assert len(collector.bank) == 6
    other = Module(network())
    collector.bank.load_into(other, -1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


class Backboned(Module):
    def __init__(self):
        net = network()
        super().__init__(net)
        self.backbone = net[0]

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("sampled", [None, ("*backbone*", "net.2"), ("net.2",)], ids=["all", "backbone", "head"])
def test_backbone_finetuning(tmp_path, sampled):
    """What unfreezes joins the sampler or the user's own optimizer, whichever it belongs to; the bank stays one."""
    module, collector = Backboned(), SampleCollector()
    names = [name for name, _ in module.named_parameters()]
    if sampled is not None and "*backbone*" in sampled:  # the backbone is listed first under net.0
        assert "net.0.0.weight" in names
        sampled = ("net.0", "net.2")
    plugin = LowPrecisionSGLD(sampled=sampled, seed=0)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    (sampler,) = fit(tmp_path, module, plugin, callbacks=[thaw, collector]).optimizers
    joined = module.backbone[0].weight
    assert not torch.equal(joined, network()[0][0].weight), "the backbone was not trained"
    assert on_grid([joined]) == (sampled != ("net.2",))
    assert (joined in {p for g in sampler.sampled_groups for p in g["params"]}) == (sampled != ("net.2",))
    assert len(collector.bank) == 6
    other = Backboned()
    collector.bank.load_into(other, -1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))


@pytest.mark.parametrize("stop", [2, 5], ids=["before-thaw", "after-thaw"])
@pytest.mark.parametrize("sampled", [None, ("net.0", "net.2"), ("net.2",)], ids=["all", "backbone", "head"])
def test_backbone_finetuning_resumes_bitwise(tmp_path, sampled, stop):
    """Stopped before or after the backbone joins: weights, momenta, bank and means are those of the uninterrupted run.

    Lightning then assigns `param_groups` anew and leaves the backbone frozen.
    """

    def run(folder, max_steps, ckpt=None):
        module = Backboned()
        plugin = LowPrecisionSGLD(sampled=sampled, prior_mean="initial", prior_std=0.5, temperature=0.5, seed=0)
        thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        collector = SampleCollector(folder / "bank")
        made = trainer(
            folder, plugin, max_epochs=-1, max_steps=max_steps, callbacks=[thaw, saver, collector],
            enable_checkpointing=True,
        )  # fmt: skip
        made.fit(module, ResumableLoader(loader().dataset, 16), ckpt_path=ckpt)
        return module, made.optimizers[0], collector.bank

    whole, full, bank = run(tmp_path / "whole", 8)
    run(tmp_path / "halves", stop)
    resumed, continued, again = run(tmp_path / "halves", 8, tmp_path / "halves" / f"step={stop}.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)
        mine, other = full.state.get(a, {}), continued.state.get(b, {})
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert bank.steps == again.steps == list(range(1, 9))
    for mine, theirs in zip(bank, again):
        assert all(torch.equal(mine.tensors[k], v) for k, v in theirs.tensors.items())
    assert not torch.equal(whole.backbone[0].weight, network()[0][0].weight)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "optimizer", "error", "message"),
    [
        ({"sampled": ("head.*",)}, adamw, ValueError, r"'head\.\*' matches no parameter of Module"),
        ({"sampled": ("net.0",)}, adamw, RuntimeError, "nothing that sampled=.* names can be sampled.*Unfreeze it"),
        ({"sampled": ("net.2",), "sampler": SVRG}, adamw, RuntimeError, "SVRG evaluates the loss at two points"),
        (
            {"sampled": ("net.2",)}, lambda m: torch.optim.LBFGS(m.parameters()), TypeError,
            "LBFGS evaluates its closure many times",
        ),
        (
            {"sampled": ("net.2",)}, lambda m: SGLD(m.parameters(), 0.1, num_data=48), RuntimeError,
            "configure_optimizers returned a SGLD, which samples what it was given",
        ),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_sampled_are_refused(tmp_path, options, optimizer, error, message):
    module = Module(network(), optimizer=optimizer)
    module.net[0].requires_grad_(False)
    with pytest.raises(error, match=message):
        fit(tmp_path, module, LowPrecisionSGLD(**options))


def test_an_optimizer_of_which_nothing_is_sampled_stays_as_it_is(tmp_path):
    class Two(Module):
        def __init__(self):
            super().__init__(network())
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net[:2].parameters(), 0.01), torch.optim.SGD(self.net[2].parameters(), 0.1)

    module = Two()
    run = fit(tmp_path, module, LowPrecisionSGLD(sampled=("net.2",), seed=0))
    assert [type(optimizer) for optimizer in run.optimizers] == [torch.optim.AdamW, SGLD]
    assert on_grid(module.net[2].parameters())
    assert not on_grid(module.net[0].parameters())


class Adapted(nn.Module):
    """A frozen linear layer with low-rank adapters, built and named as peft does."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_are_sampled_beside_a_trained_head_and_a_frozen_base(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    base = net[0].base_layer.weight.detach().clone()
    module = Module(net, optimizer=lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.05))
    plugin, collector = LowPrecisionSGLD(sampled=("*lora*",), seed=0), SampleCollector()
    fit(tmp_path, module, plugin, callbacks=[collector])
    assert (plugin.card.sampled, plugin.card.trained, plugin.card.frozen) == (28, 27, 56)
    assert torch.equal(net[0].base_layer.weight, base)
    assert on_grid([p for name, p in module.named_parameters() if "lora" in name])
    assert not on_grid(net[2].parameters())
    assert len(collector.bank) == 6
