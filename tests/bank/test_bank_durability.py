"""Banks in a directory: whole after a crash at any moment, and damage is seen, named and survived."""

import builtins
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bank_samples import Net, assert_holds, fill, filled_bank

from lightning_lpsgld.bank import BankError, SampleBank, store

STEPS = (10, 20, 30)


def sample_file(path, step):
    (found,) = path.glob(f"sample-c0-s{step}-*.safetensors")
    return found


def snapshot(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Crash(BaseException):
    """What a killed process does not catch."""


class CrashAt:
    """Counts the calls that change the disk, and stops the process (so to speak) before call number ``at``."""

    CALLS = ("open", "fsync", "replace", "unlink")

    def __init__(self, monkeypatch, at):
        self.calls, self.at = [], at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, call):
        def counted(*args, **kwargs):
            if name != "open" or args[1] & os.O_CREAT:
                if len(self.calls) == self.at:
                    self.calls.append("crash")
                if self.calls and self.calls[-1] == "crash":
                    raise Crash  # nothing at all happens after a crash, not even cleaning up
                self.calls.append(name)
            return call(*args, **kwargs)

        return counted


def crashes(tmp_path, monkeypatch, action):
    """Run ``action`` on the same bank, crashing before each of its disk operations in turn; yield the paths."""
    for at in range(100):
        path = tmp_path / f"bank{at}"
        bank = filled_bank(path, STEPS)
        with monkeypatch.context() as patch:
            crash = CrashAt(patch, at)
            try:
                action(bank)
            except Crash:
                pass
            else:
                assert at >= 4, "the action touched the disk less often than a safe one can"
                return
        assert crash.calls[-1] == "crash"
        bank.close()  # the lock of a process that is no more
        yield path


def test_a_crash_while_adding_leaves_the_bank_before_or_after(tmp_path, monkeypatch):
    """Every disk operation of add() in turn is the last one that happens."""
    seen = set()
    for path in crashes(tmp_path, monkeypatch, lambda bank: bank.add(fill(Net(), 40), step=40, formats="bfp8")):
        bank = SampleBank.open(path)
        assert bank.damaged == []
        seen.add(len(bank))
        assert_holds(bank, (*STEPS, 40)[: len(bank)])
        bank.add(fill(Net(), 40), step=40, formats="bfp8")
        assert_holds(SampleBank.open(path), (*STEPS, 40))
        bank.close()
        names = {file.name.split("-")[0].split(".")[0] for file in path.iterdir() if file.suffix != ".tmp"}
        assert names == {"sample", "manifest", "journal"}
        assert len(list(path.glob("sample-*"))) == 4, "what the crash left behind is used or removed"
        assert len(list(path.glob("journal-*"))) == 1
    assert seen == {3, 4}


def test_a_crash_while_truncating_leaves_the_bank_before_or_after(tmp_path, monkeypatch):
    seen = set()
    for path in crashes(tmp_path, monkeypatch, lambda bank: bank.truncate(10)):
        bank = SampleBank.open(path)
        assert bank.damaged == []
        seen.add(len(bank))
        assert_holds(bank, STEPS[: len(bank)])
    assert seen == {1, 3}


def test_a_crash_while_replacing_leaves_the_old_or_the_new_sample(tmp_path, monkeypatch):
    new = fill(Net(), 99)
    seen = set()
    for path in crashes(tmp_path, monkeypatch, lambda bank: bank.add(new, step=20, formats="bfp8")):
        bank = SampleBank.open(path)
        assert bank.damaged == []
        assert bank.steps == list(STEPS)
        bank.load_into(net := Net(), 1)
        old = torch.equal(net.fc.weight, fill(Net(), 20).fc.weight)
        assert old or torch.equal(net.fc.weight, new.fc.weight)
        seen.add(old)
    assert seen == {True, False}


def test_the_sample_is_on_the_disk_before_the_manifest_names_it(tmp_path, monkeypatch):
    """Order: the sample is created, renamed and synced, then its directory; and then the line of the journal is."""
    bank = filled_bank(tmp_path / "bank", (1,))
    bank.add(fill(Net(), 2), step=2, formats="bfp8")
    with monkeypatch.context() as patch:
        crash = CrashAt(patch, 100)
        bank.add(fill(Net(), 3), step=3, formats="bfp8")
    assert crash.calls == ["open", "replace", "fsync", "fsync", "fsync"]
    with monkeypatch.context() as patch:
        crash = CrashAt(patch, 100)
        bank.compact()
    journal, manifest = ["open", "replace", "fsync", "fsync"], ["open", "fsync", "replace", "fsync"]
    assert crash.calls == [*journal, *manifest, "unlink"]


def test_a_failed_write_leaves_the_bank_usable(tmp_path, monkeypatch):
    """No space: the error is the system's, nothing is left behind, the next add works."""
    bank = filled_bank(tmp_path / "bank", STEPS)
    before = snapshot(tmp_path / "bank")

    def no_space(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            bank.add(fill(Net(), 40), step=40, formats="bfp8")
    assert snapshot(tmp_path / "bank") == before
    assert_holds(bank, STEPS)
    bank.add(fill(Net(), 40), step=40, formats="bfp8")
    assert_holds(SampleBank.open(tmp_path / "bank"), (*STEPS, 40))


WRITER = """
import sys, torch
torch.set_num_threads(1)
from bank_samples import Net, fill
from lightning_lpsgld.bank import SampleBank
bank = SampleBank(sys.argv[1], capacity=5, policy="last", exist_ok=True)
for step in range(max(bank.steps, default=-1) + 1, 10**9):
    bank.add(fill(Net(), step), step=step, formats="bfp8")
    print("added", flush=True)
"""


def killed_runs(path, runs, seed):
    """Kill a process that adds samples without end, at random moments after its first, again and again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    moments, last = random.Random(seed), -1
    for _ in range(runs):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"added\n"
            time.sleep(moments.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
        bank = SampleBank.open(path)
        assert bank.damaged == []
        newest = max(bank.steps, default=-1)
        assert newest > last, "a committed sample was lost"
        assert_holds(bank, range(max(newest - 4, 0), newest + 1))
        last = newest


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_a_whole_bank(tmp_path):
    killed_runs(tmp_path / "bank", 1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_writer_killed_fifty_times_leaves_a_whole_bank(tmp_path):
    killed_runs(tmp_path / "bank", 50, seed=1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_torn_sample_is_named_and_the_rest_is_usable(tmp_path, share, caplog):
    filled_bank(tmp_path / "bank", STEPS)
    file = sample_file(tmp_path / "bank", 20)
    os.truncate(file, int(file.stat().st_size * share))
    bank = SampleBank.open(tmp_path / "bank")
    (damage,) = bank.damaged
    assert (damage.file, damage.info.step) == (file.name, 20)
    assert "is torn" in damage.reason
    assert "step 20 is left out" in caplog.text
    assert_holds(bank, (10, 30))
    assert_holds(SampleBank.open(tmp_path / "bank", verify=False), (10, 30))


def test_every_flipped_bit_is_noticed(tmp_path):
    """200 single-bit flips all over a sample file: never accepted, always named; without them the file is whole."""
    filled_bank(tmp_path / "bank", STEPS)
    file = sample_file(tmp_path / "bank", 20)
    content = file.read_bytes()
    for position in range(0, 8 * len(content), 8 * len(content) // 200):
        altered = bytearray(content)
        altered[position // 8] ^= 1 << position % 8
        file.write_bytes(altered)
        bank = SampleBank.open(tmp_path / "bank")
        assert [damage.file for damage in bank.damaged] == [file.name]
        assert bank.steps == [10, 30]
    file.write_bytes(content)
    assert_holds(SampleBank.open(tmp_path / "bank"), STEPS)


def test_damage_after_opening_is_noticed_when_the_sample_is_loaded(tmp_path):
    bank = filled_bank(tmp_path / "bank", STEPS)
    file = sample_file(tmp_path / "bank", 20)
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BankError, match=file.name):
        bank.load_into(Net(), 1)
    assert [damage.file for damage in bank.verify()] == [file.name]
    assert_holds(bank, (10, 30))


def test_a_missing_sample_is_named_and_can_be_added_again(tmp_path):
    filled_bank(tmp_path / "bank", STEPS)
    sample_file(tmp_path / "bank", 20).unlink()
    bank = SampleBank.open(tmp_path / "bank")
    assert "is missing" in bank.damaged[0].reason
    bank.add(fill(Net(), 40), step=40, formats="bfp8")
    assert len(SampleBank.open(tmp_path / "bank").damaged) == 1, "damage is not forgotten by later writes"
    bank.add(fill(Net(), 20), step=20, formats="bfp8", lr=0.1, temperature=1.0, metrics={"loss": 20 / 8})
    assert bank.damaged == []
    assert_holds(bank, (*STEPS, 40))
    assert_holds(SampleBank.open(tmp_path / "bank"), (*STEPS, 40))


def test_no_flipped_byte_of_the_manifest_changes_what_is_read(tmp_path):
    """Each altered byte either changes nothing that counts (white space) or is refused."""
    filled_bank(tmp_path / "bank", STEPS)
    file = tmp_path / "bank" / "manifest.json"
    content = file.read_bytes()
    complaints = []
    for position in range(0, len(content), 11):
        file.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            bank = SampleBank.open(tmp_path / "bank", verify=False)
        except BankError as error:
            complaints.append(str(error))
        else:
            assert_holds(bank, STEPS)
    assert all("manifest.json" in complaint for complaint in complaints)
    assert len(complaints) > len(content) // 11 // 2


@pytest.mark.parametrize("loss", ["removed", "torn", "a link"])
def test_a_lost_manifest_is_rebuilt_from_the_samples(tmp_path, loss):
    """Samples describe themselves; a damaged one is not taken in; nothing is removed."""
    filled_bank(tmp_path / "bank", STEPS)
    manifest = tmp_path / "bank" / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    if loss == "torn":
        manifest.write_bytes(content[:100])
    if loss == "a link":
        manifest.symlink_to(tmp_path / "elsewhere")
    torn = sample_file(tmp_path / "bank", 20)
    os.truncate(torn, 700)
    with pytest.raises(BankError, match="manifest"):
        SampleBank.open(tmp_path / "bank")
    with pytest.raises(BankError, match="manifest"):
        SampleBank(tmp_path / "bank", exist_ok=True)
    bank = SampleBank.recover(tmp_path / "bank")
    assert_holds(bank, (10, 30))
    assert bank.infos[0].metrics == {"loss": 1.25}
    assert torn.exists()
    assert not (tmp_path / "elsewhere").exists()


def test_nothing_to_recover_is_said(tmp_path):
    with pytest.raises(BankError, match="no intact sample"):
        SampleBank.recover(tmp_path)


def test_a_second_writer_is_refused(tmp_path):
    """While one has the bank open, another is refused; afterwards it sees what the first one did."""
    one = filled_bank(tmp_path / "bank", (1,))
    two = SampleBank.open(tmp_path / "bank")
    with pytest.raises(BankError, match=rf"has another writer: process {os.getpid()} on \S+, for \d+ s"):
        two.add(fill(Net(), 2), step=2, formats="bfp8")
    with pytest.raises(BankError, match="has another writer"):
        SampleBank(tmp_path / "bank", exist_ok=True)
    one.add(fill(Net(), 3), step=3, formats="bfp8")
    one.close()
    two.add(fill(Net(), 2), step=2, formats="bfp8")
    assert_holds(two, (1, 3, 2))
    del two
    one.add(fill(Net(), 4), step=4, formats="bfp8")
    assert_holds(SampleBank.open(tmp_path / "bank"), (1, 3, 2, 4))


def test_a_change_past_the_lock_is_noticed(tmp_path):
    """Who writes without asking for the lock, as an older release would, ends this writer with a clear message."""
    bank = filled_bank(tmp_path / "bank", (1,))
    shutil.copytree(tmp_path / "bank", tmp_path / "copy")
    (tmp_path / "copy" / ".lock").unlink()
    filled = SampleBank.open(tmp_path / "copy")
    filled.add(fill(Net(), 2), step=2, formats="bfp8")
    filled.compact()
    shutil.copytree(tmp_path / "copy", tmp_path / "bank", dirs_exist_ok=True)
    with pytest.raises(BankError, match="was changed by another writer"):
        bank.add(fill(Net(), 3), step=3, formats="bfp8")


def test_opening_changes_nothing(tmp_path):
    filled_bank(tmp_path / "bank", STEPS)
    before = snapshot(tmp_path / "bank")
    bank = SampleBank.open(tmp_path / "bank")
    list(bank)
    assert snapshot(tmp_path / "bank") == before
    with pytest.raises(BankError, match="There is no sample bank"):
        SampleBank.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_existing_bank_is_not_overwritten(tmp_path):
    filled_bank(tmp_path / "bank", STEPS)
    with pytest.raises(BankError, match=r"A bank is at .* already"):
        SampleBank(tmp_path / "bank")
    with pytest.raises(BankError, match="capacity, policy, seed"):
        SampleBank(tmp_path / "bank", capacity=3, exist_ok=True)
    assert_holds(SampleBank(tmp_path / "bank", exist_ok=True), STEPS)


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "bank").mkdir()
    for name in ("notes.txt", "weights.safetensors", ".hidden.tmp"):
        (tmp_path / "bank" / name).write_text(name)
    bank = filled_bank(tmp_path / "bank", STEPS)
    bank.truncate(0)
    bank.close()
    left = {"notes.txt", "weights.safetensors", ".hidden.tmp", "manifest.json"}
    (journal,) = set(snapshot(tmp_path / "bank")) - left
    assert journal.startswith("journal-")
    assert left < set(snapshot(tmp_path / "bank"))


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    """Every way into pickle is closed while a bank is written, opened, loaded, merged and rebuilt."""

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    filled_bank(tmp_path / "bank", STEPS)
    assert_holds(SampleBank.open(tmp_path / "bank"), STEPS)
    SampleBank.merged([tmp_path / "bank"], into=tmp_path / "merged")
    assert_holds(SampleBank.recover(tmp_path / "merged"), STEPS)


def test_file_addresses_are_local(tmp_path):
    filled_bank(f"file://{tmp_path}/bank", STEPS)
    assert_holds(SampleBank.open(tmp_path / "bank"), STEPS)
    filled_bank(f"file://localhost{tmp_path}/other", STEPS)
    assert_holds(SampleBank.open(tmp_path / "other"), STEPS)
    for address in ("file://elsewhere/bank", "file://bank", "", "  "):
        with pytest.raises(BankError, match=r"is no local file|must be a string that is not empty"):
            SampleBank(address)


def test_the_names_of_new_directories_are_synced(tmp_path, monkeypatch):
    """Otherwise the whole bank may be gone after a crash, with every sample in it."""
    synced, fsync = [], os.fsync

    def noted(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    SampleBank(tmp_path / "a" / "b" / "bank")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(synced)


# ------------------------------------------------------------------------------------------- failures between the steps


def test_a_directory_in_place_of_a_discarded_sample_ends_nothing(tmp_path, caplog):
    bank = filled_bank(tmp_path / "bank", STEPS, capacity=3, policy="last")
    victim = sample_file(tmp_path / "bank", 10)
    victim.unlink()
    victim.mkdir()
    for step in (40, 50):
        bank.add(fill(Net(), step), step=step, formats="bfp8")
    assert_holds(bank, (30, 40, 50))
    assert "cannot be removed" in caplog.text
    victim.rmdir()
    bank.close()
    assert_holds(SampleBank.open(tmp_path / "bank"), (30, 40, 50))


def test_a_directory_in_place_of_a_new_sample_is_named(tmp_path):
    bank = filled_bank(tmp_path / "bank", STEPS)
    name = sample_file(tmp_path / "bank", 20).name
    (tmp_path / "elsewhere").mkdir()
    other = SampleBank(tmp_path / "elsewhere" / "bank")
    other.add(fill(Net(), 1), step=1, formats="bfp8")
    (tmp_path / "elsewhere" / "bank" / name).mkdir()
    with pytest.raises(BankError, match=f"{name} in .* is a directory; move it away"):
        other.add(fill(Net(), 20), step=20, formats="bfp8", lr=0.1, temperature=1.0, metrics={"loss": 2.5})
    other.add(fill(Net(), 30), step=30, formats="bfp8")
    assert other.steps == [1, 30]
    assert_holds(bank, STEPS)


def failing(monkeypatch, name, error, *, at):
    """Let call number ``at`` of a system function fail, once."""
    calls, call = [], getattr(os, name)

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == at + 1:
            raise error
        return call(*args, **kwargs)

    monkeypatch.setattr(os, name, counted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=["ctrl-c", "disk"])
@pytest.mark.parametrize(
    ("change", "call"),
    [*itertools.product(["add", "replace", "truncate", "compact", "full"], ["fsync", "replace"]), ("add", "write"),
     ("replace", "write")],
)  # fmt: skip
def test_whatever_fails_within_a_change_the_bank_goes_on(tmp_path, monkeypatch, error, change, call):
    """Before or after, as the disk says; memory and disk agree, and the next change works. Every call in turn."""
    failed = 0
    for at in range(12):
        path = tmp_path / f"bank{at}"
        bank = filled_bank(path, STEPS, capacity=3, policy="last")
        outcomes = {STEPS: "before"}
        with monkeypatch.context() as patch:
            failing(patch, call, error, at=at)
            try:
                if change == "add" or change == "full":
                    patch.setattr(store, "_MIN_LINES", 0 if change == "full" else 1000)
                    bank.add(fill(Net(), 40), step=40, formats="bfp8")
                elif change == "replace":
                    bank.add(fill(Net(), 99), step=20, formats="bfp8")
                elif change == "truncate":
                    bank.truncate(10)
                else:
                    bank.compact()
            except type(error):
                failed += 1
        outcomes |= {"add": {(20, 30, 40): "after"}, "full": {(20, 30, 40): "after"}, "truncate": {(10,): "after"}}.get(
            change, {}
        )
        assert tuple(bank.steps) in outcomes
        assert not bank.damaged
        on_disk = SampleBank.open(path)
        assert (on_disk.steps, on_disk.damaged) == (bank.steps, [])
        newest = bank.steps[-1]
        bank.add(fill(Net(), 50), step=50, formats="bfp8")
        assert bank.steps[-2:] == [newest, 50]
        bank.close()
        reopened = SampleBank.open(path)
        assert (reopened.steps, reopened.damaged) == (bank.steps, [])
    assert failed


# ----------------------------------------------------------------------------------------------------- earlier releases

VERSION_1 = Path(__file__).parent / "version1"


def test_banks_of_the_first_version_open_and_go_on(tmp_path):
    """They are read where they are without a change, and continued with a journal."""
    before = snapshot(VERSION_1 / "plain")
    assert_holds(SampleBank.open(VERSION_1 / "plain"), STEPS, clamped=STEPS)
    assert snapshot(VERSION_1 / "plain") == before
    shutil.copytree(VERSION_1 / "plain", tmp_path / "bank")
    bank = SampleBank(tmp_path / "bank", exist_ok=True)
    for step in (40, 50):
        bank.add(fill(Net(), step), step=step, formats="bfp8")
    assert_holds(SampleBank.open(tmp_path / "bank"), (*STEPS, 40, 50), clamped=STEPS)


def test_a_thinned_bank_of_the_first_version_thins_on(tmp_path):
    shutil.copytree(VERSION_1 / "thin", tmp_path / "bank")
    bank = SampleBank(tmp_path / "bank", capacity=3, policy="thin", seed=4, exist_ok=True)
    whole = filled_bank(None, range(1, 14), capacity=3, policy="thin", seed=4)
    for step in range(8, 14):
        bank.add(fill(Net(), step), step=step, formats="bfp8")
    assert_holds(bank, whole.steps, clamped=range(1, 8))


def test_the_memory_of_the_first_version_is_read():
    bank = SampleBank(capacity=5)
    bank.load_state_dict(torch.load(VERSION_1 / "memory_state.pt", weights_only=True))
    assert_holds(bank, (1, 2), clamped=(1, 2))
