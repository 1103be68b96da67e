"""FSDP2 through Lightning's ModelParallelStrategy, on two CPU ranks: the run that DDP gives, bit for bit."""

from collections import Counter

import pytest
import torch
from helpers.models import Classifier, SyntheticData, make_trainer
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import Callback
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


class Even(Sharded):
    """Rows that two ranks divide, so that FSDP2 pads nothing."""

    def after_fit(self):
        """Weights may leave the grid once the fit is over."""
        for param in self.parameters():
            param.to_local().add_(0.001)
        return self(torch.ones(2, 6))


def gathered_bytes(path, **options):
    """Gathers of three steps by the bytes that they bring, the weights then, and whether a forward after is right."""
    torch.manual_seed(0)
    module = Even(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)))
    module.validation_step = None
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = make_trainer(
        max_steps=3, max_epochs=-1, devices=2, strategy=strategy, limit_val_batches=0,
        plugins=[LowPrecisionSGLD(seed=1, **options)], callbacks=[SampleCollector(path, start=0, every=1)],
    )  # fmt: skip
    total = []

    def counted(function):
        def run(*args, **kwargs):
            output = args[0] if args else next(x for name, x in kwargs.items() if name.startswith("output"))
            total.append(output.nbytes)
            return function(*args, **kwargs)

        return run

    class Counting(Callback):
        def on_train_start(self, *args):
            total.clear()

        def on_train_end(self, trainer, module):
            self.bytes = Counter(total)

    counting = Counting()
    trainer.callbacks.append(counting)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_gather_single"):  # of older and of newer versions
            if hasattr(torch.distributed, name):
                patch.setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
        trainer.fit(module, datamodule=SyntheticData(n_train=640, shuffle=False))
    weights = {name: param.full_tensor() for name, param in module.state_dict().items()}
    with torch.no_grad():
        after = module.after_fit()
        expected = nn.functional.linear(torch.ones(2, 6), *(p.full_tensor() for p in module.net[0].parameters()))
        expected = nn.functional.linear(expected.relu(), *(p.full_tensor() for p in module.net[2].parameters()))
    return counting.bytes, weights, torch.equal(after, expected)


def both_gathers(folder):
    codes = gathered_bytes(folder / "codes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lpsgld.precision.replicas.gather_as_codes", lambda *args: (0, 0))
        floats = gathered_bytes(folder / "floats")
    after_sums = gathered_bytes(folder / "sum", accumulator="full")[2]
    return codes, floats, after_sums, gathered_bytes(folder / "packed", weights="bfp3"), three_bits_as_floats(folder)


def three_bits_as_floats(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_lpsgld.precision.replicas.gather_as_codes", lambda *args: (0, 0))
        return gathered_bytes(folder / "packed floats", weights="bfp3")[1]


def test_fsdp2_gathers_codes(tmp_path):
    """A byte a weight, one for each exponent: of each row, and of each element of a bias; the same chain."""
    for codes, floats, after_sums, packed, packed_floats in run_ranks(both_gathers, tmp_path):
        assert floats[0].keys() == {4 * (6 * 16 + 16), 4 * (16 * 4 + 4)}
        assert min(floats[0].values()) >= 3
        coded = {4 * (6 * 16 + 16): 6 * 16 + 16 + 2 * 16, 4 * (16 * 4 + 4): 16 * 4 + 4 + 2 * 4}
        assert codes[0] == {coded[size]: times for size, times in floats[0].items()}
        assert all(torch.equal(value, floats[1][name]) for name, value in codes[1].items())
        assert codes[2]
        assert floats[2]
        assert after_sums
        # Of a rank 8 rows of 6 codes, 8 of a bias, 2 rows of 16 and 2 of a bias: 144, 24, 96 and 6 bits, whole bytes.
        coded = {4 * (6 * 16 + 16): 2 * (18 + 3) + 2 * 16, 4 * (16 * 4 + 4): 2 * (12 + 1) + 2 * 4}
        assert packed[0] == {coded[size]: times for size, times in floats[0].items()}
        assert all(torch.equal(value, packed_floats[name]) for name, value in packed[1].items())
        assert packed[2]
