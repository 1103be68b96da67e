"""`kill -9` at any moment, then ``fit(ckpt_path="last")``: the weights and the bank of a run that was never killed."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.loaders import ResumableLoader
from helpers.models import Classifier, make_trainer, synthetic_classes
from helpers.processes import free_port, rank_environment, start
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_lpsgld import LowPrecisionSGLD, SampleBank, SampleCollector
from lightning_lpsgld.bank import BankError
from lightning_lpsgld.callbacks.step_seeding import StepSeeding

STEPS = 60


class Marker(Callback):
    """Leaves a file when training starts, and one at every step, so that a killer knows when to strike."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            (self.folder / "started").touch()

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.is_global_zero:
            (self.folder / "step").write_text(str(trainer.global_step))


class Part(Classifier):
    """Its first layer is frozen; AdamW, with momenta and a schedule of its own, moves what is not sampled."""

    def __init__(self, net):
        super().__init__(net)
        self.net[0].requires_grad_(
            False
        )  # before DDP wraps the module, which then expects a gradient of the others only

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, STEPS),
                "interval": "step",
            },
        }


def plugin_of(part):
    if not part:
        return LowPrecisionSGLD(seed=7)
    return LowPrecisionSGLD(seed=7, sampled=("net.4",), prior_mean="initial", prior_std=0.3, temperature=0.5)


def life(folder, world, part):
    """One life of a run: from the last checkpoint, if there is one, to the end, if it is not killed."""
    rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    body = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)]
    module = (Part if part else Classifier)(nn.Sequential(*body))
    folder = Path(folder)
    callbacks = [
        SampleCollector(folder / "bank", start=5, every=3),
        StepSeeding(seed=3),
        ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=4, save_last=True),
        Marker(folder),
    ]
    options = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    trainer = make_trainer(
        max_epochs=-1, max_steps=STEPS, plugins=[plugin_of(part)], callbacks=callbacks,
        enable_checkpointing=True, limit_val_batches=0, **options,
    )  # fmt: skip
    data = ResumableLoader(synthetic_classes(200, (6,), 3, seed=0), 8, rank, world)
    trainer.fit(module, data, ckpt_path="last")
    sampler = trainer.optimizers[0]
    return {
        "weights": {k: v for k, v in module.state_dict().items() if rank == 0 or "running" not in k},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in sampler.param_groups],
        "state": [value for p in module.parameters() for value in sampler.state.get(p, {}).values()],
        "steps": trainer.global_step,
    }


class Run:
    """A run over several lives, of one or two ranks."""

    def __init__(self, folder, world=1, part=False):
        self.folder, self.world, self.part = Path(folder), world, part
        self.folder.mkdir()
        self.results = [self.folder / f"rank{rank}.pt" for rank in range(world)]
        self.kills, self.training_time = [], 0.0

    def begin(self):
        for marker in ("started", "step"):
            (self.folder / marker).unlink(missing_ok=True)
        port = free_port()
        return [
            start(life, str(self.folder), self.world, self.part, result=result, environment=environment)
            for result, environment in zip(self.results, self._environments(port))
        ]

    def _environments(self, port):
        return [rank_environment(rank, self.world, port) if self.world > 1 else {} for rank in range(self.world)]

    def finish(self):
        processes = self.begin()
        self._wait_for_training(processes)
        began = time.monotonic()
        for process in processes:
            process.join(120)
            process.kill()
        self.training_time = time.monotonic() - began
        outcomes = [torch.load(result, weights_only=False) if result.exists() else None for result in self.results]
        assert all(o is not None and o[0] == "returned" for o in outcomes), outcomes
        return [value for _, value in outcomes]

    def _wait_for_training(self, processes):
        end = time.monotonic() + 120
        while not (self.folder / "started").exists() and processes[0].is_alive() and time.monotonic() < end:
            time.sleep(0.001)

    def strike(self, delay):
        """Live until ``delay`` seconds into training, then `kill -9` every rank; whether it was still alive."""
        processes = self.begin()
        self._wait_for_training(processes)
        time.sleep(delay)
        random.shuffle(processes)
        alive = [process.is_alive() for process in processes]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        step = self.folder / "step"
        self.kills.append(step.read_text() if step.exists() else "0")
        return all(alive) and not any(result.exists() for result in self.results)


def contents(bank):
    """Files of all samples, and what manifest and journal together say; ids of runs and journals are random."""
    files = {path.name: path.read_bytes() for path in sorted(Path(bank).iterdir()) if path.name.startswith("sample-")}
    body = SampleBank.open(bank).state_dict()["manifest"]
    random_parts = {"runs", "checksum", "journal"}
    assert list(body["runs"]) == ["0"]
    return {**files, "body": {name: value for name, value in body.items() if name not in random_parts}}


def same_value(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def compared_groups(run, groups):
    """All options of the groups; of a run that was killed after its last step not the rate of a step after that.

    Resuming a finished run, Lightning steps its schedulers once more and makes no step with the rate.
    """
    left_out = {"lr"} if str(STEPS) in run.kills else set()
    return [{name: value for name, value in group.items() if name not in left_out} for group in groups]


def assert_same(run, outcome, reference, expected):
    for mine, theirs in zip(outcome, expected):
        assert mine["steps"] == theirs["steps"] == STEPS
        assert compared_groups(run, mine["groups"]) == compared_groups(run, theirs["groups"]), run.kills
        for name, value in theirs["weights"].items():
            assert torch.equal(mine["weights"][name], value), (name, run.kills)
        assert len(mine["state"]) == len(theirs["state"])
        assert all(map(same_value, mine["state"], theirs["state"])), run.kills
    ours, whole = contents(run.folder / "bank"), contents(reference.folder / "bank")
    assert sorted(ours) == sorted(whole), run.kills
    assert ours == whole, run.kills
    bank = SampleBank.open(run.folder / "bank")
    assert bank.steps == list(range(8, STEPS + 1, 3))
    assert not bank.damaged


def kill_and_compare(folder, world, kills, rng, part=False):
    """Kill one run after another, up to three times each, until there were ``kills``; compare each with the whole."""
    reference = Run(folder / "whole", world, part)
    expected = reference.finish()
    done, number = 0, 0
    while done < kills:
        run = Run(folder / f"killed{number}", world, part)
        for _ in range(min(3, kills - done)):
            if not run.strike(rng.random() * reference.training_time * 0.8):
                break
            done += 1
        assert_same(run, run.finish(), reference, expected)
        shutil.rmtree(run.folder)
        number += 1


def test_killed_runs_become_the_uninterrupted_one(tmp_path):
    kill_and_compare(tmp_path, 1, 3, random.Random())


def test_killed_runs_of_a_part_become_the_uninterrupted_one(tmp_path):
    """The optimizer of the rest goes on with its momenta, the prior with its means, the bank with its base."""
    kill_and_compare(tmp_path, 1, 2, random.Random(), part=True)
    first = torch.load(tmp_path / "whole" / "rank0.pt", weights_only=False)[1]["state"]
    assert len(first) == 2 + 2 * 3  # a mean of each sampled tensor; step and two moments of each that AdamW moves


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_fifty_points(tmp_path):
    kill_and_compare(tmp_path, 1, 50, random.Random())


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_killed(tmp_path):
    kill_and_compare(tmp_path, 2, 10, random.Random())


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_of_a_part_killed(tmp_path):
    kill_and_compare(tmp_path, 2, 6, random.Random(), part=True)


# ------------------------------------------------------------------------------------------------------- torn banks


def build_bank(path):
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    bank = SampleBank(path)
    for step in range(1, 7):
        torch.manual_seed(step)
        for param in module.parameters():
            nn.init.normal_(param)
        bank.add(module, step=step, temperature=1e-3, lr=0.1)
        if step == 3:
            bank.compact()  # three samples are in the manifest, three in its journal
    bank.close()
    return {sample.step: (sample.info, dict(sample.tensors)) for sample in SampleBank.open(path)}


def opens(path):
    try:
        SampleBank.open(path)
    except BankError:
        return False
    return True


def hurt(path, rng):
    """Truncate a random file of the bank or flip one of its bits; its name."""
    victim = rng.choice(sorted(path.iterdir()))
    data = bytearray(victim.read_bytes())
    if rng.random() < 0.5:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return victim.name


def test_two_hundred_hurt_files_lose_nothing_silently(tmp_path):
    """Every sample that is accepted is bitwise the one written, with its metadata; every one that is not, is named.

    A journal that was cut between two lines is a journal: then the files of its lost samples are named.
    """
    pristine = build_bank(tmp_path / "bank")
    rng = random.Random(0)
    for number in range(200):
        path = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "bank", path)
        name = hurt(path, rng)
        if name == "manifest.json" or (name.startswith("journal-") and not opens(path)):
            with pytest.raises(BankError, match=r"altered|not valid JSON|is not the manifest|must have exactly"):
                SampleBank.open(path)
            assert len(SampleBank.recover(path)) == len(pristine)
        bank = SampleBank.open(path)
        accepted = {sample.step: sample for sample in bank}
        for step, sample in accepted.items():
            info, tensors = pristine[step]
            assert sample.info == info, name
            assert all(torch.equal(sample.tensors[k], v) for k, v in tensors.items()), name
        lost = pristine.keys() - accepted.keys()
        if name.startswith("journal-"):
            assert lost == {int(file.split("-")[2][1:]) for file in bank.unlisted}
            assert SampleBank.recover(path).steps == sorted(pristine)
            continue
        assert lost == {damage.info.step for damage in bank.damaged}, name
        assert all(damage.file == name for damage in bank.damaged)
        assert name == "manifest.json" or len(lost) == 1, name
        shutil.rmtree(path)
