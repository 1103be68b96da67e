"""Who may write a bank: one process at a time, any number of threads of it, and nobody loses what was acknowledged."""

import copy
import json
import os
import random
import threading
import time

import pytest
import torch
from helpers.processes import start
from torch import nn

from lightning_lpsgld.bank import BankError, SampleBank, folder
from lightning_lpsgld.bank import lock as locks
from lightning_lpsgld.bank.lock import LOCK, FileLock

FEW, TRIALS = 20, 200


def valued(value):
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(float(value))
    return module


def write_at(path, writer, offset, steps, began):
    """Wait until ``began`` plus an offset, then open the bank and add samples; the steps that were acknowledged."""
    acknowledged, refusal = [], "another writer"
    time.sleep(max(began + offset - time.time(), 0.0))
    try:
        with SampleBank(path, exist_ok=True) as bank:
            for step in steps:
                bank.add(valued(step), step=step, chain=writer)
                acknowledged.append((writer, step))
    except BankError as error:
        refusal = str(error)
    assert "another writer" in refusal
    return acknowledged


def keep_writing(pipe, writer):
    """A writer for many trials: reads ``[path, offset, began]`` line by line; what was acknowledged in each."""
    results = []
    with open(pipe) as lines:
        for line in lines:
            path, offset, began = json.loads(line)
            results.append(write_at(path, writer, offset, range(3), began))
    return results


def run_trials(tmp_path, trials, seed):
    """Two processes on the same new path, at random offsets within 3 ms; every acknowledged sample must be there."""
    moments = random.Random(seed)
    pipes = [tmp_path / f"pipe{writer}" for writer in (0, 1)]
    for pipe in pipes:
        os.mkfifo(pipe)
    results = [tmp_path / f"result{writer}.pt" for writer in (0, 1)]
    writers = [start(keep_writing, str(pipe), n, result=results[n]) for n, pipe in enumerate(pipes)]
    ends = [pipe.open("w", buffering=1) for pipe in pipes]
    for trial in range(trials):
        began = time.time() + 0.03
        for end in ends:
            end.write(json.dumps([str(tmp_path / f"bank{trial}"), moments.uniform(0.0, 0.003), began]) + "\n")
        time.sleep(0.06)
    for end in ends:
        end.close()
    for process in writers:
        process.join(60)
    outcomes = [torch.load(result, weights_only=False) for result in results]
    assert [kind for kind, _ in outcomes] == ["returned", "returned"], outcomes
    total = 0
    for trial in range(trials):
        acknowledged = sorted([*outcomes[0][1][trial], *outcomes[1][1][trial]])
        bank = SampleBank.open(tmp_path / f"bank{trial}")
        assert not bank.damaged
        held = {(sample.chain, sample.step): float(sample.tensors["values.weight"]) for sample in bank}
        assert set(acknowledged) <= held.keys(), trial
        assert all(value == step for (_, step), value in held.items())
        total += len(acknowledged)
    assert total >= 3 * trials, "at least one writer gets through in every trial"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_two_writers_within_milliseconds_lose_nothing(tmp_path):
    run_trials(tmp_path, FEW, seed=None)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_two_hundred_races_lose_nothing(tmp_path):
    run_trials(tmp_path, TRIALS, seed=None)


@pytest.mark.parametrize("place", ["memory", "directory"])
def test_threads_share_one_bank(tmp_path, place):
    """Four threads, one object: every addition counts, and reading meanwhile sees whole samples."""
    bank, errors = SampleBank(tmp_path / "bank" if place == "directory" else None), []

    def work(chain):
        try:
            for step in range(25):
                bank.add(valued(step), step=step, chain=chain)
                sample = bank.sample(len(bank) - 1)
                assert float(sample.tensors["values.weight"]) == sample.step
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(chain,)) for chain in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted((info.chain, info.step) for info in bank.infos) == [(c, s) for c in range(4) for s in range(25)]
    if place == "directory":
        assert len(SampleBank.open(tmp_path / "bank")) == 100


def test_temporary_files_of_others_are_left_until_they_are_old(tmp_path, monkeypatch):
    SampleBank(tmp_path).add(valued(0), step=0)
    foreign = tmp_path / ".sample-c0-s1-x.safetensors.0123456789abcdef.tmp"
    foreign.write_bytes(b"another writer is at it")
    SampleBank(tmp_path, exist_ok=True).add(valued(1), step=1)
    assert foreign.exists()
    os.utime(foreign, (time.time() - folder._OLD_SECONDS - 10,) * 2)
    SampleBank(tmp_path, exist_ok=True)
    assert not foreign.exists()


# ------------------------------------------------------------------------------------------------------------- the lock


def hold(path, ready):
    lock = FileLock(path)
    lock.acquire()
    ready.touch()
    time.sleep(60)


@pytest.mark.parametrize("system_locks", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_with_a_word(tmp_path, system_locks, monkeypatch, caplog):
    """With the system's locks, and where there are none and only the file's owner decides."""
    ready = tmp_path / "ready"
    process = start(hold, tmp_path, ready, result=tmp_path / "result.pt")
    while not ready.exists():
        time.sleep(0.01)
    if not system_locks:
        monkeypatch.setattr(locks, "_flock_works", lambda folder: False)
    mine = FileLock(tmp_path)
    with pytest.raises(BankError, match=rf"another writer: process {process.pid} on .*, for \d+ s.* remove .*{LOCK}"):
        mine.acquire()
    process.kill()
    process.join()
    mine.acquire()
    assert mine.held
    assert f"is taken over from process {process.pid} on" in caplog.text
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    mine.release()
    assert not (tmp_path / LOCK).exists()


def test_without_system_locks_a_process_elsewhere_is_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock_works", lambda folder: False)
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": time.time() - 90.0}))
    with pytest.raises(BankError, match=r"process 1 on elsewhere, for (89|9\d) s"):
        FileLock(tmp_path).acquire()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    """A worker that outlives its parent must not keep the next run out; nor may it give the parent's lock back."""
    bank = SampleBank(tmp_path / "bank")
    bank.add(valued(0), step=0)
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        del bank
        os.read(ours, 1)  # until the parent closes its end
        os._exit(0)
    os.close(ours)
    assert (tmp_path / "bank" / LOCK).exists()
    bank.close()
    SampleBank(tmp_path / "bank", exist_ok=True).add(valued(1), step=1)
    os.close(theirs)
    os.waitpid(child, 0)
    assert SampleBank.open(tmp_path / "bank").steps == [0, 1]


def test_a_copy_of_a_bank_does_not_hold_its_lock(tmp_path):
    bank = SampleBank(tmp_path / "bank")
    bank.add(valued(0), step=0)
    other = copy.deepcopy(bank)
    with pytest.raises(BankError, match="another writer"):
        other.add(valued(1), step=1)
    bank.add(valued(2), step=2)
    bank.close()
    other.add(valued(1), step=1)
    assert other.steps == [0, 2, 1]


# --------------------------------------------------------------------------------------------------- runs and identity


def test_a_chain_with_samples_belongs_to_its_run():
    bank = SampleBank()
    bank.claim("0" * 16, [0, 1])
    bank.claim("1" * 16, [1])  # the first run took no sample of it
    bank.add(valued(0), step=0, chain=0)
    with pytest.raises(BankError, match=f"is that of run {'0' * 16}, and this is run {'1' * 16}"):
        bank.claim("1" * 16, [0])
    with pytest.raises(BankError, match="16 hexadecimal digits"):
        bank.claim("mine", [3])
    assert bank.runs == {0: "0" * 16, 1: "1" * 16}


def test_runs_go_along_when_banks_are_merged(tmp_path):
    one, two = SampleBank(), SampleBank(tmp_path / "two")
    for bank, run in ((one, "a" * 16), (two, "b" * 16)):
        bank.claim(run, [0])
        bank.add(valued(len(run)), step=ord(run[0]))
    with pytest.raises(BankError, match=f"run {'a' * 16} in one bank and of run {'b' * 16} in the other"):
        one.merge(two)
    one.merge(two, chains="renumber")
    assert one.runs == {0: "a" * 16, 1: "b" * 16}
    assert SampleBank.open(tmp_path / "two").runs == {0: "b" * 16}


def test_truncating_leaves_other_chains_alone(tmp_path):
    bank = SampleBank(tmp_path / "bank")
    for chain in (0, 1):
        for step in range(4):
            bank.add(valued(step), step=step, chain=chain)
    assert bank.truncate(1, chains=[1]) == 2
    assert [(i.chain, i.step) for i in SampleBank.open(tmp_path / "bank").infos] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)
    ]  # fmt: skip
