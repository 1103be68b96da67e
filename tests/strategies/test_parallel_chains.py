"""Two chains on two ranks: one bank, no traffic between them, R-hat that says whether they agree."""

import os

import lightning.pytorch as pl
import pytest
import torch
from helpers.loaders import ResumableLoader
from helpers.models import Classifier, RecordingLogger, SyntheticData, make_trainer, small_mlp, synthetic_classes
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.analysis import chain_diagnostics, to_inference_data
from lightning_lpsgld.callbacks import ChainDiagnostics
from lightning_lpsgld.precision import LowPrecisionSGLD as Plugin
from lightning_lpsgld.random import derive_seed
from lightning_lpsgld.strategies import ParallelChainsStrategy

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
arviz_stats = pytest.importorskip("arviz_stats")


class Target(pl.LightningModule):
    """Posterior N(0, 1) per weight, or a mixture of two such at +-``modes``; N = 1 and T = 1."""

    def __init__(self, lr, modes=0.0, start=0.0):
        super().__init__()
        self.w, self.lr, self.modes = nn.Parameter(torch.full((4,), start)), lr, modes

    def training_step(self, batch, batch_idx):
        near = -0.5 * torch.stack([(self.w - self.modes).square().sum(), (self.w + self.modes).square().sum()])
        return -near.logsumexp(0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def sample_target(module, steps, every, path=None):
    collector, diagnostics, logger = SampleCollector(path, every=every, start=20), ChainDiagnostics(), RecordingLogger()
    plugin = Plugin(weights=None, gradients=None, activations=None, errors=None, temperature=1.0, num_data=1, seed=4)
    trainer = make_trainer(
        max_epochs=-1, max_steps=steps, devices=2, strategy=ParallelChainsStrategy(), plugins=[plugin],
        callbacks=[collector, diagnostics], logger=logger,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(2000, 1)), batch_size=2))
    return {
        "results": {name: tuple(row) for name, row in diagnostics.results.items()},
        "logged": [row for _, row in logger.rows if "chains/rhat" in row],
        "chains": collector.bank.chains,
        "samples": len(collector.bank),
        "end": module.w.tolist(),
    }


def targets():
    rank = int(os.environ["RANK"])
    return {
        "gaussian": sample_target(Target(lr=0.9), 2420, 2),
        "modes": sample_target(Target(lr=0.1, modes=8.0, start=8.0 if rank else -8.0), 220, 1),
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(targets)


def test_rhat_of_a_gaussian_target_is_below_one_percent(ranks):
    """With lr = 0.9 draws have correlation 0.1, and 0.01 between samples: 1200 draws a chain.

    1 + chi2(3) / (3 * 2 * 600) exceeds 1.01 with probability below 1e-7 for each quantity.
    """
    result = ranks[0]["gaussian"]
    assert result["chains"] == [0, 1]
    assert result["samples"] == 2400
    assert set(result["results"]) == {"norm", "projection0", "projection1", "projection2", "projection3"}
    assert all(0.99 < rhat < 1.01 for rhat, _, _ in result["results"].values())
    assert all(bulk > 1200 for _, bulk, _ in result["results"].values())
    assert result["logged"][-1]["chains/rhat"] == max(rhat for rhat, _, _ in result["results"].values())


def test_a_chain_in_another_mode_raises_rhat(ranks):
    result = ranks[0]["modes"]
    assert max(rhat for rhat, _, _ in result["results"].values()) > 1.1
    assert result["logged"][-1]["chains/rhat"] > 1.1
    assert min(ranks[0]["modes"]["end"]) < 0 < max(ranks[1]["modes"]["end"])


def test_chains_are_different(ranks):
    assert ranks[0]["gaussian"]["end"] != ranks[1]["gaussian"]["end"]


# ----------------------------------------------------------------------------- against a chain that runs by itself


def classify(strategy, folder, steps, ckpt=None, devices=2, seed=9):
    collector = SampleCollector(folder / "bank", start=1, every=2)
    saver = ModelCheckpoint(dirpath=folder / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    plugin = LowPrecisionSGLD(seed=seed, activations=None, errors=None)
    options = {} if strategy is None else {"strategy": strategy}
    trainer = make_trainer(
        max_epochs=-1, max_steps=steps, devices=devices, plugins=[plugin], callbacks=[collector, saver],
        enable_checkpointing=True, limit_val_batches=0, **options,
    )  # fmt: skip
    module = small_mlp()
    trainer.fit(module, ResumableLoader(synthetic_classes(32, (6,), 3, seed=0), 8), ckpt_path=ckpt)
    return trainer, module


def both(folder):
    trainer, module = classify(ParallelChainsStrategy(), folder / "two", 8)
    _, resumed = classify(ParallelChainsStrategy(), folder / "two", 8, ckpt=folder / "two" / "ckpt" / "step=4.ckpt")
    message = None
    try:
        classify(ParallelChainsStrategy(chains=1), folder / "other", 8, ckpt=folder / "two" / "ckpt" / "step=4.ckpt")
    except ValueError as error:
        message = str(error)
    before = {k: v.clone() for k, v in resumed.state_dict().items()}
    trainer.test(module, datamodule=SyntheticData(n_train=32), verbose=False)
    return {
        "state": before,
        "whole": module.state_dict(),
        "seed": trainer.optimizers[0].param_groups[0]["seed"] if trainer.optimizers else None,
        "message": message,
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    return folder, run_ranks(both, folder)


def test_each_chain_is_the_one_that_runs_alone_with_its_seed(pair, tmp_path):
    """Exact: no gradient, weight or draw comes from the other chain; each sees all data."""
    folder, results = pair
    bank = SampleBank.open(folder / "two" / "bank")
    assert bank.chains == [0, 1]
    for chain in (0, 1):
        seed = derive_seed(9, "chain", chain)
        _, alone = classify(None, tmp_path / str(chain), 8, devices=1, seed=seed)
        for name, value in alone.state_dict().items():
            assert torch.equal(results[chain]["whole"][name], value), name
        own = SampleBank.open(tmp_path / str(chain) / "bank")
        together = [sample for sample in bank if sample.chain == chain]
        assert [s.step for s in together] == own.steps == [3, 5, 7]
        for mine, theirs in zip(together, own):
            assert all(torch.equal(mine.tensors[k], v) for k, v in theirs.tensors.items())
    assert any(not torch.equal(results[0]["whole"][k], v) for k, v in results[1]["whole"].items())


def test_all_chains_resume_from_one_checkpoint(pair):
    for result in pair[1]:
        assert all(torch.equal(result["state"][name], value) for name, value in result["whole"].items())


def test_a_checkpoint_of_another_number_of_chains_is_refused(pair):
    assert all("holds 2 chains, and this run has 1" in result["message"] for result in pair[1])


def adapted(strategy, folder, ckpt=None, seed=9, devices=2):
    """The head is sampled about its initial weights, AdamW moves the layer before it, the first layer is frozen."""
    torch.manual_seed(0)
    module = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    module.net[0].requires_grad_(False)
    module.configure_optimizers = lambda: torch.optim.AdamW([*module.net[2:].parameters()], lr=0.02)
    saver = ModelCheckpoint(dirpath=folder / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    part = {"sampled": ("net.4",), "prior_mean": "initial", "prior_std": 0.5, "temperature": 1.0}
    plugin = LowPrecisionSGLD(seed=seed, activations=None, errors=None, **part)
    trainer = make_trainer(
        max_epochs=-1, max_steps=8, devices=devices, plugins=[plugin], limit_val_batches=0, enable_checkpointing=True,
        callbacks=[SampleCollector(folder / "bank", start=1, every=2), saver], **strategy,
    )  # fmt: skip
    trainer.fit(module, ResumableLoader(synthetic_classes(32, (6,), 3, seed=0), 8), ckpt_path=ckpt)
    return {name: value.clone() for name, value in module.state_dict().items()}


def adapted_chains(folder):
    whole = adapted({"strategy": ParallelChainsStrategy()}, folder)
    return whole, adapted({"strategy": ParallelChainsStrategy()}, folder, ckpt=folder / "ckpt" / "step=4.ckpt")


def test_chains_of_a_part_are_those_that_run_alone_and_resume(tmp_path):
    """What is trained beside the sampled part belongs to its chain: AdamW's weights and momenta differ, too."""
    results = run_ranks(adapted_chains, tmp_path / "two")
    bank = SampleBank.open(tmp_path / "two" / "bank")
    for chain, (whole, resumed) in enumerate(results):
        alone = adapted({}, tmp_path / str(chain), seed=derive_seed(9, "chain", chain), devices=1)
        assert all(
            torch.equal(whole[name], value) and torch.equal(resumed[name], value) for name, value in alone.items()
        )
        own = SampleBank.open(tmp_path / str(chain) / "bank")
        together = [sample for sample in bank if sample.chain == chain]
        assert [sample.step for sample in together] == own.steps == [3, 5, 7]
        for mine, theirs in zip(together, own):
            assert all(torch.equal(mine.tensors[k], v) for k, v in theirs.tensors.items())
    (first, _), (second, _) = results
    assert torch.equal(first["net.0.weight"], second["net.0.weight"])
    assert not any(torch.equal(first[name], second[name]) for name in ("net.2.weight", "net.4.weight"))


def replicated(folder):
    """Two chains of two replicas each, with the replica check at every step."""
    plugin = LowPrecisionSGLD(seed=9, check_replicas=1)
    trainer = make_trainer(
        max_epochs=-1, max_steps=8, devices=4, strategy=ParallelChainsStrategy(chains=2), plugins=[plugin],
        callbacks=[SampleCollector(folder, start=1, every=2)], limit_val_batches=0,
    )  # fmt: skip
    module = small_mlp(dropout=0.5)
    trainer.fit(module, datamodule=SyntheticData(n_train=64))
    return {"state": module.state_dict(), "chain": trainer.strategy.chain, "card": plugin.card.world_size}


def test_chains_of_several_replicas(tmp_path):
    results = run_ranks(replicated, tmp_path / "bank", world=4)
    assert [result["chain"] for result in results] == [0, 0, 1, 1]
    assert [result["card"] for result in results] == [2] * 4
    states = [result["state"] for result in results]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[2][name], states[3][name])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    bank = SampleBank.open(tmp_path / "bank")
    assert [(info.chain, info.step) for info in bank.infos] == [(c, s) for s in (3, 5, 7) for c in (0, 1)]


# ------------------------------------------------------------------------------------------------- the bare functions


def test_diagnostics_of_known_draws():
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(4, 1000, generator=generator)
    found = chain_diagnostics({"good": good, "apart": good + torch.arange(4.0)[:, None], "constant": torch.ones(2, 9)})
    assert found["good"].rhat < 1.01 < 1.1 < found["apart"].rhat
    assert found["good"].ess_bulk > 3000
    assert found["constant"].rhat != found["constant"].rhat
    with pytest.raises(ValueError, match="`x` must have the shape"):
        chain_diagnostics({"x": torch.zeros(5)})


def test_export_to_arviz():
    pytest.importorskip("arviz_base")
    data = to_inference_data({"norm": torch.arange(8.0).view(2, 4)})
    assert data["posterior"]["norm"].shape == (2, 4)
    assert float(data["posterior"]["norm"][1, 3]) == 7.0


def test_collector_is_needed():
    trainer = make_trainer(callbacks=[ChainDiagnostics()])
    with pytest.raises(RuntimeError, match="needs a SampleCollector"):
        trainer.fit(small_mlp(), datamodule=SyntheticData())


def test_held_out_loss_and_logits_are_diagnosed_too(tmp_path):
    """Two chains in one bank, one after the other; what ``measure`` gives is compared beside the weights."""
    x, y = SyntheticData().test.tensors

    def held_out(module):
        logits = module(x)
        loss = nn.functional.cross_entropy(logits, y)
        return {"loss": float(loss), "logit": float(logits[0, 1])}

    logger = RecordingLogger()
    for chain in (0, 1):
        diagnostics = ChainDiagnostics(measure=held_out)
        trainer = make_trainer(
            max_epochs=2,
            plugins=[Plugin(seed=chain, activations=None, errors=None)],
            callbacks=[SampleCollector(tmp_path / "bank", every=1, chain=chain, append=chain > 0), diagnostics],
            logger=logger,
        )
        module = small_mlp()
        trainer.fit(module, datamodule=SyntheticData())
    assert {"loss", "logit"} <= diagnostics.results.keys()
    bank = SampleBank.open(tmp_path / "bank")
    last = [i for i, info in enumerate(bank.infos) if info.chain == 1][-1]
    bank.load_into(module, last)
    with torch.no_grad():
        assert float(diagnostics.draws["loss"][1, -1]) == held_out(module)["loss"]
    assert diagnostics.draws["logit"].shape[0] == 2
    assert any("chains/rhat" in values for _, values in logger.rows)
