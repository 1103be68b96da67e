"""Banks behind fsspec, on its in-memory file system."""

import fsspec
import pytest
from bank_samples import Net, assert_holds, fill, filled_bank

from lightning_lpsgld.bank import BankError, SampleBank


@pytest.fixture
def url():
    files = fsspec.filesystem("memory")
    yield "memory://lpsgld-bank-test/run"
    files.rm("/lpsgld-bank-test", recursive=True)


def files_at(url):
    return {name.rsplit("/", 1)[-1]: name for name in fsspec.filesystem("memory").ls(url, detail=False)}


def test_a_remote_bank_is_a_bank(url):
    bank = filled_bank(url, (1, 2, 3))
    assert_holds(SampleBank.open(url), (1, 2, 3))
    bank.truncate(2)
    bank.add(fill(Net(), 5), step=5, formats="bfp8")
    assert_holds(SampleBank.open(url), (1, 2, 5))
    assert len(files_at(url)) == 4
    with pytest.raises(BankError, match="already"):
        SampleBank(url)
    assert_holds(SampleBank(url, exist_ok=True), (1, 2, 5))


def test_the_manifest_is_uploaded_after_the_sample(url, monkeypatch):
    bank = filled_bank(url, (1,))
    order, write = [], type(bank._store.folder).write

    def noted(folder, name, data, **options):
        order.append(name.split("-")[0])
        write(folder, name, data, **options)

    monkeypatch.setattr(type(bank._store.folder), "write", noted)
    bank.add(fill(Net(), 2), step=2, formats="bfp8")
    assert order == ["sample", "manifest.json"]


@pytest.mark.parametrize("harm", ["missing", "torn", "altered"])
def test_damage_is_named_and_the_rest_is_usable(url, harm):
    filled_bank(url, (1, 2))
    files = fsspec.filesystem("memory")
    (name,) = [full for short, full in files_at(url).items() if "-s1-" in short]
    content = files.cat_file(name)
    files.rm_file(name)
    if harm == "torn":
        files.pipe_file(name, content[:500])
    if harm == "altered":
        files.pipe_file(name, content[:-1] + b"\xff")
    bank = SampleBank.open(url)
    assert [damage.info.step for damage in bank.damaged] == [1]
    assert_holds(bank, (2,))


def test_a_lost_manifest_is_rebuilt(url):
    filled_bank(url, (1, 2))
    fsspec.filesystem("memory").pipe_file(files_at(url)["manifest.json"], b"{")
    with pytest.raises(BankError, match="not valid JSON"):
        SampleBank.open(url)
    assert_holds(SampleBank.recover(url), (1, 2))


def test_no_bank_and_no_protocol_are_said():
    with pytest.raises(BankError, match="There is no sample bank"):
        SampleBank.open("memory://lpsgld-bank-test/none")
    with pytest.raises(BankError, match="cannot be reached"):
        SampleBank.open("nosuchprotocol://somewhere")
