"""What a bank costs as it grows: processor time, so that a busy machine or a slow disk does not count."""

import json
import time

import pytest
from torch import nn

from lightning_lpsgld.bank import SampleBank, store


def timed(call):
    began = time.process_time()
    call()
    return time.process_time() - began


def additions(bank, first, last):
    module = nn.Linear(4, 4)
    for step in range(first, last):
        bank.add(module, step=step)


def opened(path):
    assert not SampleBank.open(path).damaged


def test_an_addition_costs_the_same_in_a_large_bank(tmp_path):
    """Rewriting the manifest for each, the last 300 of 2,400 would cost 8 times the first 300; foldings are counted."""
    bank = SampleBank(tmp_path / "bank")
    additions(bank, 0, 50)
    early = timed(lambda: additions(bank, 50, 350))
    additions(bank, 350, 2100)
    late = timed(lambda: additions(bank, 2100, 2400))
    assert late < 2.0 * early
    assert len(SampleBank.open(tmp_path / "bank")) == 2400


def test_a_journal_stays_shorter_than_its_manifest(tmp_path, monkeypatch):
    """A large bank is read from its manifest; what is replayed on top is at most half as much."""
    monkeypatch.setattr(store, "_MIN_LINES", 10)
    manifest, lines = [], []
    with SampleBank(tmp_path / "bank") as bank:
        for step in range(120):
            bank.add(nn.Linear(1, 1), step=step)
            manifest.append(len(json.loads((tmp_path / "bank" / "manifest.json").read_text())["samples"]))
            (journal,) = (tmp_path / "bank").glob("journal-*")
            lines.append(journal.read_bytes().count(b"\n") - 1)
    assert [m + n for m, n in zip(manifest, lines)] == list(range(1, 121))
    assert all(n < max(10, m // 2) for m, n in zip(manifest, lines))
    assert len(set(manifest)) < 10, "folding is rare"
    assert SampleBank.open(tmp_path / "bank").steps == list(range(120))


@pytest.mark.slow
def test_five_thousand_additions_take_at_most_twenty_seconds(tmp_path):
    with SampleBank(tmp_path / "bank") as bank:
        assert timed(lambda: additions(bank, 0, 5_000)) < 20.0


@pytest.mark.slow
@pytest.mark.timeout(7200)  # 300,000 waits for the disk
def test_a_hundred_thousand_samples_are_added_in_linear_time_and_opened_in_five_seconds(tmp_path):
    with SampleBank(tmp_path / "bank") as bank:
        first = timed(lambda: additions(bank, 0, 10_000))
        assert timed(lambda: additions(bank, 10_000, 100_000)) < 1.5 * 9 * first
    assert timed(lambda: opened(tmp_path / "bank")) < 5.0
