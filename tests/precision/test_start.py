"""What training begins with: weights of a checkpoint, priors about them, shapes that are known."""

import logging
import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import save_file
from test_compatibility import Module, fit, loader, on_grid, trainer
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.precision.changes import ChangedSettingsError
from lightning_lpsgld.samplers import SGLD

UNROUNDED = {"weights": None, "gradients": None, "activations": None, "errors": None}


@pytest.fixture
def trained(tmp_path):
    """A checkpoint of plain Lightning with AdamW, and its weights."""
    import lightning as L

    torch.manual_seed(1)
    module = Module(optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=0.05))
    saver = ModelCheckpoint(dirpath=tmp_path, filename="plain")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    plain = L.Trainer(max_epochs=2, accelerator="cpu", devices=1, logger=False, callbacks=[saver], **quiet)
    plain.fit(module, loader())
    return tmp_path / "plain.ckpt", {name: value.clone() for name, value in module.state_dict().items()}


def start(tmp_path, path, **options):
    """Weights that a fit of no learning rate ends with."""
    module = Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    plugin = LowPrecisionSGLD(start_from=path, temperature=0.0, **{**UNROUNDED, **options})
    trainer(tmp_path, plugin, max_epochs=1).fit(module, loader())
    return module.state_dict()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_of_a_lightning_checkpoint_and_nothing_else(tmp_path, trained, caplog):
    path, weights = trained
    with caplog.at_level(logging.INFO):
        assert same(start(tmp_path, path), weights)
    said = re.findall(
        r"starts from the weights of .*plain.ckpt after step 6; its optimizer state is not used", caplog.text
    )
    assert len(said) == 1
    assert not same(start(tmp_path, None), weights)


def test_sums_on_a_grid_begin_at_the_weights_of_the_file(tmp_path, trained):
    """Not at their 8-bit view: with a learning rate of 0 they are still there when the fit ends."""
    path, weights = trained
    module = Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    plugin = LowPrecisionSGLD(start_from=path, temperature=0.0, **{**UNROUNDED, "weights": "bfp8"}, accumulator="bfp16")
    (sampler,) = fit(tmp_path, module, plugin).optimizers
    for name, param in module.named_parameters():
        assert torch.equal(sampler.accumulator_of(param), quantize(weights[name], "bfp16", rounding="nearest"))
        assert not torch.equal(sampler.accumulator_of(param), param)


def test_plain_weights_in_every_usual_wrapping(tmp_path, trained):
    _, weights = trained
    inner = {name.removeprefix("net."): value for name, value in weights.items()}
    for number, content in enumerate([weights, {"model_state_dict": weights, "optimizer": {"x": 1}}, inner,
                                      {f"module.{name}": value for name, value in weights.items()},
                                      {f"_orig_mod.{name}": value for name, value in weights.items()}]):  # fmt: skip
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        assert same(start(tmp_path, path), weights), number
    save_file(weights, tmp_path / "weights.safetensors")
    assert same(start(tmp_path, tmp_path / "weights.safetensors"), weights)


def test_weights_of_something_else_are_refused(tmp_path):
    torch.save({"net.0.weight": torch.zeros(8, 6), "tail": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not a checkpoint of a Module: missing net\.0\.bias.*unexpected tail"):
        start(tmp_path, tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        start(tmp_path, tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a `state_dict`"):
        start(tmp_path, tmp_path / "list.pt")


def test_the_prior_is_about_the_weights_loaded_and_a_resumed_run_keeps_it(tmp_path, trained):
    """Once resumed, neither the file nor the resumed weights become the centre: the saved one stays."""
    path, weights = trained

    def run(max_steps, ckpt=None):
        module = Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        plugin = LowPrecisionSGLD(start_from=path, prior_mean="initial", prior_std=0.1, temperature=1.0, seed=0)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        made = trainer(tmp_path, plugin, max_epochs=-1, max_steps=max_steps, callbacks=[saver],
                       enable_checkpointing=True)  # fmt: skip
        made.fit(module, loader(), ckpt_path=ckpt)
        return module, made.optimizers[0], plugin

    whole, sampler, plugin = run(6)
    assert plugin.card.prior_variance == pytest.approx(0.1**2)
    assert "N(initial weights, 0.01) per weight" in str(plugin.card)
    for name, param in whole.named_parameters():
        assert torch.equal(sampler.prior_mean_of(param), weights[name])
    path.unlink()  # a resumed run must not read it
    resumed, again, _ = run(6, tmp_path / "step=3.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    for name, param in resumed.named_parameters():
        assert torch.equal(again.prior_mean_of(param), weights[name])


def centred(path, **options):
    return LowPrecisionSGLD(prior_mean=path, prior_std=0.1, **{"temperature": 1.0, "seed": 0, **options})


def run_centred(tmp_path, path, max_steps=6, ckpt=None, callbacks=(), module=None, **options):
    torch.manual_seed(0)
    module = module or Module(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    plugin = centred(path, **options)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    made = trainer(tmp_path, plugin, max_epochs=-1, max_steps=max_steps, callbacks=[saver, *callbacks],
                   enable_checkpointing=True)  # fmt: skip
    made.fit(module, loader(), ckpt_path=ckpt)
    return module, made.optimizers[0], plugin


def test_the_prior_is_about_the_weights_of_a_file(tmp_path, trained):
    """Training begins elsewhere; by the drift of the prior alone the chain goes to the file's weights."""
    path, weights = trained
    start = {name: value.clone() for name, value in Module().state_dict().items()}
    module, sampler, plugin = run_centred(tmp_path, path)
    for name, param in module.named_parameters():
        assert torch.equal(sampler.prior_mean_of(param), weights[name])
        assert not torch.equal(weights[name], start[name])
    assert "N(weights of plain.ckpt, 0.01) per weight" in str(plugin.card)

    class NoLikelihood(Module):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    still = NoLikelihood(optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.2))
    run_centred(
        tmp_path, path, 60, module=still, temperature=0.0, **UNROUNDED
    )  # a step leaves 1 - 0.2 / (48 * 0.01) of the distance
    for name, param in still.named_parameters():
        torch.testing.assert_close(param.detach(), weights[name], rtol=1e-4, atol=1e-5)


def test_a_file_of_the_weights_themselves_is_the_initial_mean(tmp_path):
    torch.manual_seed(0)
    torch.save(Module().state_dict(), tmp_path / "same.pt")
    chains = []
    for mean in ("initial", tmp_path / "same.pt"):
        torch.manual_seed(0)
        chains.append(run_centred(tmp_path, mean)[0])
    assert all(torch.equal(a, b) for a, b in zip(chains[0].parameters(), chains[1].parameters()))


def test_a_resumed_run_keeps_the_means_of_a_file_that_is_gone(tmp_path, trained):
    path, weights = trained
    whole, _, _ = run_centred(tmp_path, path)
    path.unlink()
    with pytest.warns(UserWarning, match="is not there any more. The resumed run keeps the means"):
        resumed, again, plugin = run_centred(tmp_path, path, ckpt=tmp_path / "step=3.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert all(torch.equal(again.prior_mean_of(p), weights[name]) for name, p in resumed.named_parameters())
    assert "weights of plain.ckpt" in str(plugin.card)
    with pytest.raises(ChangedSettingsError, match=r"prior_centre: 'plain\.ckpt' in the checkpoint, 'initial' now"):
        run_centred(tmp_path, "initial", ckpt=tmp_path / "step=3.ckpt")
    with pytest.raises(FileNotFoundError):
        run_centred(tmp_path, path)


def test_parameters_that_join_are_pulled_to_their_tensors_of_the_file(tmp_path, trained):
    path, weights = trained

    class Thaw(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 0.1})

    module = Module(optimizer=lambda m: torch.optim.SGD(m.net[2].parameters(), lr=0.1))
    module.net[0].requires_grad_(False)
    _, sampler, _ = run_centred(tmp_path, path, callbacks=[Thaw()], module=module)
    assert all(torch.equal(sampler.prior_mean_of(p), weights[name]) for name, p in module.named_parameters())


def test_a_part_needs_only_its_own_tensors_of_the_file(tmp_path, trained):
    _, weights = trained
    part = {name: value for name, value in weights.items() if name.startswith("net.2.")}
    torch.save({**part, "other": torch.zeros(3)}, tmp_path / "part.pt")
    module, sampler, _ = run_centred(tmp_path, tmp_path / "part.pt", sampled=("net.2",))
    assert all(
        torch.equal(sampler.prior_mean_of(p), weights[f"net.2.{n}"]) for n, p in module.net[2].named_parameters()
    )
    with pytest.raises(ValueError, match=r"has no finite tensor of the right shape for net\.0\.weight"):
        run_centred(tmp_path, tmp_path / "part.pt")
    torch.save({**weights, "net.0.bias": torch.full((8,), float("nan"))}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"no finite tensor of the right shape for net\.0\.bias of Module"):
        run_centred(tmp_path, tmp_path / "nan.pt")


def test_a_sampler_of_the_modules_own_says_its_prior_itself(tmp_path):
    module = Module(optimizer=lambda m: SGLD(m.parameters(), 0.1, num_data=48))
    with pytest.raises(RuntimeError, match="`prior_mean` and `prior_std` say how samplers are made"):
        fit(tmp_path, module, LowPrecisionSGLD(prior_mean="initial"))


def test_prior_std_is_another_way_to_say_weight_decay(tmp_path):
    """λ = 1/(N s²) by name, the first pattern that matches; what none matches keeps its group's."""

    def decayed(m):
        return torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.25)

    plugin = LowPrecisionSGLD(prior_std={"net.0.bias": 2.0, "net.0": 0.5}, seed=0)
    module = Module(optimizer=decayed)
    (sampler,) = fit(tmp_path, module, plugin).optimizers
    found = {sampler.name_of(p): group["weight_decay"] for group in sampler.sampled_groups for p in group["params"]}
    assert found == {
        "net.0.weight": 1 / (48 * 0.25), "net.0.bias": 1 / (48 * 4.0), "net.2.weight": 0.25, "net.2.bias": 0.25,
    }  # fmt: skip
    assert on_grid(module.parameters())
    with pytest.raises(ValueError, match=r"`prior_std`: 'head' matches no parameter"):
        fit(tmp_path, Module(optimizer=decayed), LowPrecisionSGLD(prior_std={"head": 1.0}))


def test_one_prior_std_gives_the_chain_of_that_weight_decay(tmp_path):
    chains = []
    for decay, std in ((1 / (48 * 0.25), None), (0.0, 0.5)):
        torch.manual_seed(0)
        module = Module(optimizer=lambda m, decay=decay: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=decay))
        fit(tmp_path, module, LowPrecisionSGLD(prior_std=std, seed=0))
        chains.append(module)
    assert all(torch.equal(a, b) for a, b in zip(chains[0].parameters(), chains[1].parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_std": 0.0}, "`prior_std` must be finite and > 0, got 0.0"),
        ({"prior_std": {"*": float("inf")}}, "`prior_std` must be finite and > 0"),
        ({"prior_mean": "centre"}, "`prior_mean` must be one of.*A file of weights is named with its suffix"),
    ],
)
def test_priors_that_are_none_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        LowPrecisionSGLD(**options)


def test_a_prior_mean_that_the_sampler_does_not_know_is_refused(tmp_path):
    from helpers.toy_sampler import FloatToy

    with pytest.raises(TypeError, match="FloatToy takes no `prior_mean`, so prior_mean='initial'"):
        fit(tmp_path, Module(), LowPrecisionSGLD(sampler=FloatToy, prior_mean="initial", **UNROUNDED))


def test_lazy_modules_that_have_not_run_are_refused_by_name(tmp_path):
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match=r"LazyLinear 'net\.0' is lazy and has not run.*2 such.*Run one batch"):
        trainer(tmp_path).fit(Module(lazy), loader())
    lazy(torch.zeros(2, 6))
    module = Module(lazy)
    (sampler,) = fit(tmp_path, module).optimizers
    assert isinstance(sampler, SGLD)
    assert on_grid(module.parameters())
