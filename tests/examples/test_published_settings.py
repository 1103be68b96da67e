"""CIFAR and IMDB with the published settings: YAML files and the CIFAR table, on archives in the original layouts."""

import argparse
import csv
import io
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from test_image_data import write_cifar

from lightning_lpsgld.bank import SampleBank

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(EXAMPLES / "study"))

POSITIVE, NEGATIVE = "A <br /><br />good, GOOD film it's {}.", "A bad film, {} <br />bad."


def write_imdb(root, packed, count=6):
    """Reviews as aclImdb_v1 has them, with the unlabelled ones and the lists of addresses that are not to be read."""
    files = {"aclImdb/train/unsup/0_0.txt": "unlabelled words", "aclImdb/train/urls_pos.txt": "http://example.org"}
    for part in ("train", "test"):
        for number in range(count):
            files[f"aclImdb/{part}/pos/{number}_9.txt"] = POSITIVE.format(f"{part}{number}")
            files[f"aclImdb/{part}/neg/{number}_1.txt"] = NEGATIVE.format(f"{part}{number}")
    if packed:
        with tarfile.open(root / "aclImdb_v1.tar.gz", "w:gz") as archive:
            for name, text in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
        return
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Small archives of both; torchvision's checksums of the real ones cannot hold."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    for name in ("cifar10", "cifar100"):
        write_cifar(tmp_path, name)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ reviews


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_reviews_are_read_as_they_are_published(tmp_path, packed):
    from imdb import Reviews

    write_imdb(tmp_path, packed)
    data = Reviews(tmp_path, batch_size=4, vocabulary=6, length=8)
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (12, 12)
    tokens, labels = data.test.tensors
    assert labels.tolist() == [0] * 6 + [1] * 6
    # by frequency, then alphabet: a, bad, film and good have 12 each; the other words are unknown
    assert tokens[6].tolist() == [0, 0, 2, 5, 5, 4, 1, 1]
    assert tokens[0].tolist() == [0, 0, 0, 2, 3, 4, 1, 3]
    short = Reviews(tmp_path, batch_size=4, vocabulary=6, length=2, limit=4)
    short.setup("fit")
    assert short.train.tensors[0].tolist() == [[2, 3], [2, 3], [2, 5], [2, 5]]
    assert next(iter(short.train_dataloader()))[0].shape == (4, 2)


def test_reviews_that_are_not_there_are_said(tmp_path):
    from imdb import Reviews

    with pytest.raises(FileNotFoundError, match=r"neither the folder aclImdb nor aclImdb_v1\.tar\.gz"):
        Reviews(tmp_path, batch_size=4).setup("fit")


# -------------------------------------------------------------------------------------------------- the configurations


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imdb"])
def test_a_configuration_trains_collects_and_is_tested(name, cifar, monkeypatch, capsys):
    """As it stands, but two short epochs on few examples: the published network, formats, schedule and collector."""
    pytest.importorskip("jsonargparse")
    from lightning_lpsgld.cli import main

    write_imdb(cifar, packed=True)
    monkeypatch.chdir(cifar)
    for word in ("model", "data"):
        sys.modules.pop(word, None)
    options = [
        "--config", str(EXAMPLES / "configs" / f"{name}.yaml"), f"--data.root={cifar}", "--data.batch_size=3",
        "--data.limit=3", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]  # fmt: skip
    options += ["--data.length=8"] if name == "imdb" else ["--data.workers=0"]
    main(["fit", *options])
    bank = SampleBank.open(f"runs/{name}-bank")
    assert bank.steps == [2]
    main(["test", *options, "--ensemble.bank", f"runs/{name}-bank"])
    assert "ensemble/nll" in capsys.readouterr().out


def test_the_schedule_is_the_papers_by_epochs():
    from published import ScheduledClassifier, paper_decay

    module = ScheduledClassifier(torch.nn.Linear(2, 2), lr=0.5, weight_decay=5e-4)
    module._trainer = argparse.Namespace(max_epochs=245)
    (optimizer,), (scheduler,) = module.configure_optimizers()
    rates = []
    for _ in range(245):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == rates[122] == 0.5
    assert rates[195] == pytest.approx(0.134, abs=5e-4)
    assert rates[221] == rates[244] == pytest.approx(0.005)
    assert [round(paper_decay(t), 4) for t in (0.0, 0.5, 0.7, 0.9, 1.0)] == [1.0, 1.0, 0.505, 0.01, 0.01]
    constant = ScheduledClassifier(torch.nn.Linear(2, 2), lr=0.5, weight_decay=5e-4, decay=False)
    assert isinstance(constant.configure_optimizers(), torch.optim.SGD)


# --------------------------------------------------------------------------------------------------- the CIFAR table


def command(root, *more):
    return [f"--data-dir={root}", f"--out={root / 'rows.csv'}", f"--cache={root / 'cache'}", "--net=small",
            "--limit=20", "--workers=0", "--accelerator=cpu", "--seeds=1", "--checkpoint-every=1", *more]  # fmt: skip


def entries(root):
    with (root / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_published_numbers_beside_ours(cifar, capsys):
    from cifar import PUBLISHED, ROWS, main

    rows = ("sgd/fp32", "vc-csgldlp-l/bfp8-clamp", "sghmc-plain/fp32")
    main(command(cifar, "--epochs=7", "--only", *rows))
    found = entries(cifar)
    kinds = [(row, of) for row in rows for of in ("last", "ensemble")]
    assert [(f"{e['method']}/{e['format']}", e["of"]) for e in found] == kinds
    assert [e["temperature"] for e in found[::2]] == ["0", "0.001", "1"]
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("| vc-csgldlp-l/bfp8-clamp |")]
    ours = 100 * float(found[3]["error"])
    assert line.split("|")[2:4] == [" 1 ", f" {ours:.3f} "]
    assert "| paper: 4.97, 0.51, -; LP-SGLD-JAX: 5.45, 0.72, -; LP-SGLD-JAX, activations" in line
    assert "LP-SGLD-JAX, activations in float: 5.34, 0.58, -" in line
    assert "ICLR 2025, SGHMC: 13.4, -, 0.421; ICLR 2025, PX-SGHMC: 11.9, -, 0.376" in shown
    main(command(cifar, "--epochs=7", "--only", *rows))  # all is there
    assert entries(cifar) == found
    main(command(cifar, "--show", "--data=cifar100"))
    assert "paper: 25.22, 5.82, -" in capsys.readouterr().out
    with PUBLISHED.open() as file:
        assert {entry["row"] for entry in csv.DictReader(file)} <= {f"{method}/{fmt}" for method, fmt in ROWS}


def test_an_interrupted_row_goes_on_bit_for_bit(cifar, monkeypatch):
    import cifar as study
    from image_classification import Images

    command_ = command(cifar, "--epochs=4", "--only", "vc-sgldlp-l/bfp8")
    study.main(command_)
    whole = entries(cifar)
    (cifar / "rows.csv").unlink()
    loaded = Images.train_dataloader

    def stopping(data):
        loader = loaded(data)
        hooks = iter(range(100))

        class Cut(torch.utils.data.DataLoader):
            def __iter__(self):
                if next(hooks) == 2:
                    raise KeyError("power cut")
                return super().__iter__()

        return Cut(loader.dataset, loader.batch_size, shuffle=True)

    monkeypatch.setattr(Images, "train_dataloader", stopping)
    with pytest.raises(KeyError, match="power cut"):
        study.main(command_)
    assert not (cifar / "rows.csv").exists()
    monkeypatch.setattr(Images, "train_dataloader", loaded)
    study.main(command_)
    again = entries(cifar)
    assert [{k: v for k, v in e.items() if k not in ("seconds", "t_eff")} for e in again] == [
        {k: v for k, v in e.items() if k not in ("seconds", "t_eff")} for e in whole
    ]
    assert not list((cifar / "cache").iterdir())
