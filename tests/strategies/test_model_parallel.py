"""FSDP2 through Lightning's ModelParallelStrategy, on two CPU ranks: the run that DDP gives, bit for bit."""

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from helpers.processes import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class Sharded(Classifier):
    """Its layers are sharded along dim 0; 15 and 3 rows do not divide evenly."""

    def configure_model(self):
        from torch.distributed._composable.fsdp import fully_shard

        if not isinstance(self.net[0].weight, DTensor):
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit(kind, strategy, accumulator, path):
    torch.manual_seed(0)
    module = kind(nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 3)))
    trainer = make_trainer(
        max_steps=12, max_epochs=-1, devices=2, strategy=strategy, limit_val_batches=0,
        plugins=[LowPrecisionSGLD(seed=1, accumulator=accumulator)],
        callbacks=[SampleCollector(path, start=2, every=3)],
    )  # fmt: skip
    trainer.fit(module, datamodule=SyntheticData(n_train=640, shuffle=False))
    sharded = isinstance(module.net[0].weight, DTensor)
    return sharded, {k: v.full_tensor() if sharded else v for k, v in module.state_dict().items()}


def fit_part(kind, strategy, path, **options):
    """The last layer is sampled, AdamW moves the first."""
    torch.manual_seed(0)
    module = kind(nn.Sequential(nn.Linear(6, 15), nn.ReLU(), nn.Linear(15, 3)))
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=0.02)
    trainer = make_trainer(
        max_steps=8, max_epochs=-1, devices=2, strategy=strategy, limit_val_batches=0,
        plugins=[LowPrecisionSGLD(seed=1, sampled=("net.2",), temperature=0.5, **options)],
        callbacks=[SampleCollector(path, start=2, every=3)],
    )  # fmt: skip
    trainer.fit(module, datamodule=SyntheticData(n_train=640, shuffle=False))
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in module.state_dict().items()}


def both_of_a_part(folder):
    def fsdp():
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    plain, sharded = (fit_part(Classifier, "ddp", folder / "ddp"), fit_part(Sharded, fsdp(), folder / "fsdp"))
    try:
        fit_part(Sharded, fsdp(), None, prior_mean="initial")
    except TypeError as error:
        return plain, sharded, str(error)
    return plain, sharded, "went on"


def both(folder):
    out = {}
    for accumulator in ("low", "full", "bfp16"):
        plain = fit(Classifier, "ddp", accumulator, folder / f"{accumulator}-ddp")
        fsdp = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        out[accumulator] = (plain, fit(Sharded, fsdp, accumulator, folder / f"{accumulator}-fsdp"))
    return out


def test_fsdp2_gives_the_chain_and_the_bank_of_ddp(tmp_path):
    """Sums of two gradients do not depend on their order, so that both strategies have the same ones."""
    for result in run_ranks(both, tmp_path):
        for (was_sharded, plain), (is_sharded, sharded) in result.values():
            assert (was_sharded, is_sharded) == (False, True)
            assert plain.keys() == sharded.keys()
            assert all(torch.equal(value, sharded[name]) for name, value in plain.items())
    for accumulator in ("low", "full", "bfp16"):
        plain, sharded = (SampleBank.open(tmp_path / f"{accumulator}-{kind}") for kind in ("ddp", "fsdp"))
        assert plain.steps == sharded.steps == [5, 8, 11]
        for mine, theirs in zip(plain, sharded):
            assert all(torch.equal(mine.tensors[k], v) for k, v in theirs.tensors.items())


def test_a_part_under_fsdp2_gives_the_chain_and_the_bank_of_ddp(tmp_path):
    """AdamW steps its shards beside the sampler; a prior's mean is refused before a step is made."""
    for plain, sharded, message in run_ranks(both_of_a_part, tmp_path):
        assert plain.keys() == sharded.keys()
        assert all(torch.equal(value, sharded[name]) for name, value in plain.items())
        assert "prior_mean='initial' does not take sharded parameters" in message
        assert "Use DDPStrategy" in message
    first, second = (SampleBank.open(tmp_path / kind) for kind in ("ddp", "fsdp"))
    assert first.steps == second.steps == [5, 8]
    for mine, theirs in zip(first, second):
        assert all(torch.equal(mine.tensors[k], v) for k, v in theirs.tensors.items())
