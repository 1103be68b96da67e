"""Two real ranks: what they write, read and log equals what one process computes."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import SyntheticData, make_trainer, small_convnet
from torch.utils.data import DistributedSampler

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.callbacks import EnsembleEvaluation, SampleCollector
from lightning_lpsgld.callbacks.watching import Selection
from lightning_lpsgld.precision import LowPrecisionSGLD
from lightning_lpsgld.predictive import Regression, bayesian_model_average

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def means(module, batch):
    """The same network as a regression: its outputs are means of numbers that the images determine."""
    return module(batch[0]), batch[0].flatten(1)[:, :3]


def run_rank(folder: Path) -> None:
    """One of two ranks: fit with collection to disk and in memory; test; save what this rank saw."""
    on_disk, in_memory = SampleCollector(folder / "bank", start=4, every=3), SampleCollector(start=4, every=3, chain=1)
    evaluation = EnsembleEvaluation(folder / "bank", refresh_batch_norm=2)
    trainer = make_trainer(
        max_epochs=3,
        devices=2,
        strategy="ddp",
        num_sanity_val_steps=0,
        plugins=[LowPrecisionSGLD(seed=5, activations=None, errors=None)],
        callbacks=[on_disk, in_memory, evaluation],
    )
    module, data = small_convnet(), SyntheticData(shape=(1, 6, 6), shuffle=False)
    trainer.fit(module, datamodule=data)
    fitted, refreshed = copy.deepcopy(module.state_dict()), {"fit": evaluation.scores}
    trainer.validate(module, datamodule=data, verbose=False)
    refreshed["validate"] = evaluation.scores
    evaluation.refresh_batch_norm = None
    trainer.test(module, datamodule=data, verbose=False)
    classes = (evaluation.scores, evaluation.curve, dict(trainer.callback_metrics))
    evaluation.logits, evaluation.task = means, Regression(noise_variance=0.3)
    trainer.test(module, datamodule=data, verbose=False)
    assert trainer.world_size == 2
    result = {
        "scores": classes[0],
        "regression": evaluation.scores,
        "refreshed": refreshed,
        "logged": {k: float(v) for k, v in classes[2].items() if k.startswith("ensemble/")},
        "curve": classes[1],
        "steps": (on_disk.bank.steps, in_memory.bank.steps),
        "state": fitted,
        "after": module.state_dict(),
    }
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks, and the folder with their bank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "NODE_RANK": "0",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_all_ranks_have_the_same_numbers(ranks):
    _, (first, second) = ranks
    assert first["scores"] == second["scores"]
    for stage in ("fit", "validate"):
        shared = [name for name in first["refreshed"][stage] if not name.startswith("current/")]
        assert all(first["refreshed"][stage][name] == second["refreshed"][stage][name] for name in shared)
    assert first["curve"] == second["curve"]
    assert first["logged"] == second["logged"]
    assert first["logged"] == pytest.approx({k: v for k, v in first["scores"].items() if k in first["logged"]})


def test_samples_are_written_once_and_read_by_all(ranks):
    """64 points in batches of 8 on two ranks: 4 steps an epoch, 12 in all, samples after 7 and 10."""
    folder, results = ranks
    assert [result["steps"] for result in results] == [([7, 10], [7, 10])] * 2
    bank = SampleBank.open(folder / "bank")
    assert bank.steps == [7, 10]
    assert not bank.damaged


def test_replicas_are_left_as_they_were(ranks):
    """Evaluation changed no weight on any rank; BatchNorm statistics are private to ranks, as DDP leaves them."""
    for result in ranks[1]:
        assert all(torch.equal(value, result["after"][name]) for name, value in result["state"].items())
    first, second = (result["state"] for result in ranks[1])
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)


def test_scores_equal_those_of_one_process(ranks):
    """37 points over two ranks: 19 each, one of them a repeat; batches of 8, 8 and 3."""
    folder, results = ranks
    module, alone = small_convnet(), EnsembleEvaluation(folder / "bank")
    data = SyntheticData(shape=(1, 6, 6))
    make_trainer(callbacks=[alone]).test(module, datamodule=data, verbose=False)
    compared = [name for name in alone.scores if not name.startswith("current/")]
    assert len(compared) == 19
    for name in compared:
        assert results[0]["scores"][name] == pytest.approx(alone.scores[name]), name
    for mine, theirs in zip(alone.curve, results[0]["curve"]):
        assert mine == pytest.approx(theirs)


def test_scores_of_a_regression_equal_those_of_one_process(ranks):
    folder, results = ranks
    alone = EnsembleEvaluation(folder / "bank", logits=means, task=Regression(noise_variance=0.3))
    make_trainer(callbacks=[alone]).test(small_convnet(), datamodule=SyntheticData(shape=(1, 6, 6)), verbose=False)
    compared = [name for name in alone.scores if not name.startswith("current/")]
    assert {"ensemble/crps", "ensemble/width_90", "ensemble/quantile_error", "single/rmse"} <= set(compared)
    for name in compared:
        assert [r["regression"][name] for r in results] == pytest.approx([alone.scores[name]] * 2), name


def test_batch_norm_statistics_are_those_of_all_ranks_in_validate(ranks):
    """Outside of a fit nothing is sharded: the first two batches."""
    folder, results = ranks
    module, data = small_convnet(), SyntheticData(shape=(1, 6, 6))
    batches = [(data.train.tensors[0][8 * b : 8 * (b + 1)],) for b in (0, 1)]
    predictive = bayesian_model_average(
        SampleBank.open(folder / "bank"), module, [data.val.tensors], refresh_batch_norm=batches
    )
    for name, value in predictive.scores.items():
        for result in results:
            assert result["refreshed"]["validate"][f"ensemble/{name}"] == pytest.approx(value)


def test_batch_norm_statistics_are_those_of_all_ranks_in_a_fit(ranks):
    """Two batches of each of two ranks, as Lightning shuffles them in the epoch that the sample was first seen in."""
    folder, results = ranks
    module, data = small_convnet(), SyntheticData(shape=(1, 6, 6))
    bank, running = SampleBank.open(folder / "bank"), None
    for number, epoch in enumerate((1, 2)):  # samples after steps 7 and 10, four steps an epoch
        samplers = [DistributedSampler(range(64), 2, rank, shuffle=True) for rank in (0, 1)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        batches = [(data.train.tensors[0][share[8 * b : 8 * (b + 1)]],) for share in shares for b in (0, 1)]
        one = Selection(bank, 2)
        one.indices = [number]
        average = bayesian_model_average(
            one, module, [data.val.tensors], refresh_batch_norm=batches, predictive=running
        )
        running = average.predictive
    for name, value in average.scores.items():
        for result in results:
            assert result["refreshed"]["fit"][f"ensemble/{name}"] == pytest.approx(value)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
