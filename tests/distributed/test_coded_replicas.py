"""Two real ranks whose weights are held as codes: replicas of one chain, and chains of their own, as with floats."""

import os

import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_mlp
from helpers.processes import run_ranks
from lightning.pytorch.callbacks import Callback

from lightning_lpsgld import LowPrecisionSGLD
from lightning_lpsgld.ops import CodedTensor, code_parameters_, float_parameters_
from lightning_lpsgld.samplers import SGLD
from lightning_lpsgld.strategies import ParallelChainsStrategy

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


class GradientsWhenMoved(Callback):
    """Most gradients that were there when a weight moved."""

    def __init__(self):
        self.most = 0

    def on_train_start(self, trainer, module):
        def observe(group, params, grads):
            self.most = max(self.most, sum(p.grad is not None for p in module.parameters()))

        trainer.optimizers[0].gradient_observers.append(observe)


def fit(storage, strategy, **options):
    watch, module = GradientsWhenMoved(), small_mlp()
    rank = int(os.environ["RANK"])
    with torch.no_grad():
        module.net[0].weight += rank if strategy == "ddp" else 0  # DDP begins with rank zero's
    trainer = make_trainer(
        max_epochs=-1, max_steps=6, devices=2, limit_val_batches=0, strategy=strategy, callbacks=[watch],
        plugins=[LowPrecisionSGLD(seed=5, storage=storage, check_replicas=2, **options)],
    )  # fmt: skip
    trainer.fit(module, datamodule=SyntheticData(n_train=640))
    coded = all(isinstance(p, CodedTensor) for p in module.parameters())
    weights = [p.detach().view(torch.int32).clone() for p in float_parameters_(module).parameters()]
    return {"weights": weights, "coded": coded, "most": watch.most}


def both(strategy, options):
    make = ParallelChainsStrategy if strategy == "chains" else lambda: strategy
    return {storage: fit(storage, make(), **options) for storage in ("codes", "float")}


@pytest.mark.parametrize(
    "options",
    [{"weights": "bfp4", "accumulator": "bfp16"}, {"compress_gradients": True}],
    ids=["averaged, four bits and sums of sixteen", "averaged in 8 bits"],
)
def test_replicas_are_those_of_floats(options):
    ranks = run_ranks(both, "ddp", options)
    for rank in ranks:
        assert rank["codes"]["coded"]
        assert not rank["float"]["coded"]
        for mine, theirs, first in zip(
            rank["codes"]["weights"], rank["float"]["weights"], ranks[0]["codes"]["weights"]
        ):
            assert torch.equal(mine, theirs)
            assert torch.equal(mine, first)


def test_parallel_chains_are_those_of_floats():
    """Each is a DDP run of its own, whose gradients DDP holds until the backward pass is over."""
    ranks = run_ranks(both, "chains", {})
    for rank in ranks:
        assert rank["codes"]["most"] == len(rank["codes"]["weights"])
        assert all(torch.equal(a, b) for a, b in zip(rank["codes"]["weights"], rank["float"]["weights"]))
    assert any(not torch.equal(a, b) for a, b in zip(ranks[0]["codes"]["weights"], ranks[1]["codes"]["weights"]))


def bare():
    torch.distributed.init_process_group("gloo")
    net = code_parameters_(torch.nn.Linear(3, 2), "bfp8")
    opt = SGLD(net.parameters(), 0.1, num_data=10, weight_format="bfp8")

    def closure():
        opt.zero_grad()
        loss = net(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    try:
        opt.step(closure)
    except RuntimeError as error:
        message = str(error)
    opt.steps_in_backward = False
    opt.step(closure)
    return message, opt.steps


def test_a_bare_sampler_among_processes_asks_when_to_move():
    for message, steps in run_ranks(bare):
        assert "does not know whether gradients are averaged over the 2 processes" in message
        assert steps == 1
