"""Resuming beside the samples of others, and with the wrong bank: every sampler, both accumulators, two ranks."""

from pathlib import Path

import pytest
import torch
from helpers.processes import run_ranks
from test_resume_settings import HALF, ROWS, STEPS, fit

from lightning_lpsgld import SampleBank, SampleCollector
from lightning_lpsgld.bank import BankError
from lightning_lpsgld.precision.changes import ChangedSettingsError


def values(bank, chain):
    """Step and all stored values of a chain's samples."""
    opened = SampleBank.open(bank)
    return [(s.info.step, {k: v.clone() for k, v in s.tensors.items()}) for s in opened if s.info.chain == chain]


def same(first, second):
    return [step for step, _ in first] == [step for step, _ in second] and all(
        torch.equal(a[name], b[name]) for (_, a), (_, b) in zip(first, second, strict=True) for name in a
    )


def collector(bank, **options):
    return SampleCollector(bank, every=1, **options)


def message_of(*args, **options):
    try:
        fit(*args, **options)
    except (BankError, ChangedSettingsError) as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def story(folder, options, ranks):
    """One run, another that is appended to its bank, and the first resumed; then with a bank that is not its own."""
    folder, lead = Path(folder), {**options, "ranks": ranks}
    whole, shared, foreign = folder / "whole", folder / "shared", folder / "foreign"
    fit(whole / "run", STEPS, collector=collector(whole / "bank"), **lead)
    fit(shared / "first", HALF, collector=collector(shared / "bank"), **lead)
    fit(shared / "second", STEPS, collector=collector(shared / "bank", append=True), **{**lead, "seed": 8})
    found = {"before": values(shared / "bank", 1)}
    changed = {**lead, "temperature": 0.5, "num_data": 99}
    found["changed"] = message_of(shared / "first", STEPS, resume=True, collector=collector(shared / "bank"), **changed)
    fit(shared / "first", STEPS, resume=True, collector=collector(shared / "bank"), **lead)
    found["mine"], found["theirs"] = values(shared / "bank", 0), values(shared / "bank", 1)
    found["whole"] = values(whole / "bank", 0)
    fit(foreign / "run", STEPS, collector=collector(foreign / "bank"), **{**lead, "seed": 9})
    there = values(foreign / "bank", 0)
    found["wrong"] = message_of(shared / "first", STEPS, resume=True, collector=collector(foreign / "bank"), **lead)
    found["foreign kept"] = same(there, values(foreign / "bank", 0))
    return found


def judge(found):
    assert len(found["mine"]) == len(found["theirs"]) == STEPS
    assert same(found["mine"], found["whole"]), "the resumed chain is that of a run that was never stopped"
    assert same(found["theirs"], found["before"]), "the other run's samples are as they were"
    assert "ChangedSettingsError" in found["changed"]
    assert "temperature: 0.001 in the checkpoint, 0.5 now" in found["changed"]
    assert found["wrong"].startswith("BankError"), found["wrong"]
    assert "run" in found["wrong"]
    assert found["foreign kept"]


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_keeps_to_its_own_chain_and_bank(tmp_path, name):
    judge(story(tmp_path, ROWS[name], 1))


def on_two_ranks(folder):
    return {name: story(Path(folder) / name.replace(" ", "-"), ROWS[name], 2) for name in ROWS}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_so_it_does_on_two_ranks(tmp_path):
    for outcome in run_ranks(on_two_ranks, str(tmp_path), timeout=900):
        for found in outcome.values():
            judge(found)
