"""A bank that is made of others is there whole, or not at all."""

import os
import signal

import fsspec
import pytest
from bank_samples import Net, assert_holds, fill, filled_bank

from lightning_lpsgld.bank import BankError, SampleBank
from lightning_lpsgld.bank.beside import made_beside


@pytest.fixture(params=["local", "remote"])
def place(request, tmp_path):
    """Address of a bank that is not there, and what lists everything around it."""
    if request.param == "local":
        yield str(tmp_path / "deep" / "new"), lambda: sorted(path.name for path in tmp_path.iterdir())
        return
    files = fsspec.filesystem("memory")
    yield "memory://lpsgld-beside-test/new", lambda: files.find("/lpsgld-beside-test")
    if files.exists("/lpsgld-beside-test"):
        files.rm("/lpsgld-beside-test", recursive=True)


def sources(tmp_path):
    """Two banks; the files of the second are gone by the time they are needed."""
    banks = [filled_bank(tmp_path / name, (1, 2)) for name in ("one", "two")]
    for bank in banks:
        bank.close()
    for file in (tmp_path / "two").glob("sample-*"):
        file.unlink()
    return banks


def test_a_merge_that_is_refused_midway_leaves_nothing(tmp_path, place):
    address, around = place
    banks = sources(tmp_path)
    before = around()
    with pytest.raises(BankError, match="missing"):
        SampleBank.merged(banks, address)
    assert around() == before
    merged = SampleBank.merged(banks[:1] * 2, address)
    assert_holds(merged, (1, 2, 1, 2))
    assert_holds(SampleBank.open(address), (1, 2, 1, 2))
    assert len(around()) > len(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_leaves_no_bank(tmp_path):
    child = os.fork()
    if not child:
        with made_beside(tmp_path / "new") as place:
            filled_bank(place, (1, 2))
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new.")
    SampleBank.merged([filled_bank(tmp_path / "one", (3,))], tmp_path / "new")
    assert_holds(SampleBank.open(tmp_path / "new"), (3,))


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    one = filled_bank(tmp_path / "one", (1, 2))
    SampleBank.merged([one], tmp_path / "new").add(fill(Net(), 9), step=9, formats="bfp8")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert SampleBank.open(tmp_path / "new").steps == [1, 2, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "one"]


def test_what_is_there_is_not_touched(tmp_path):
    one = filled_bank(tmp_path / "one", (1, 2))
    with pytest.raises(BankError, match=r"A bank is at .* already"):
        SampleBank.merged([one], tmp_path / "one")
    (tmp_path / "one" / "manifest.json").unlink()
    with pytest.raises(BankError, match="has samples but no manifest"), made_beside(tmp_path / "one"):
        raise AssertionError("not reached")
    assert len(list((tmp_path / "one").glob("sample-*"))) == 2
