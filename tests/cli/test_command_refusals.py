"""Kinds of mistakes that a user makes: files, outputs, data, keys. Each is one line with its key; exit code 2."""

import re

import pytest
import torch

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.cli.errors import as_command_error

RUN = ("--config", "run.yaml")
BANK = "--ensemble.bank=bank"


@pytest.fixture
def run_folder(folder, monkeypatch):
    """A folder with a bank of four samples, a file and a folder where others are expected."""
    from cli_module import Net

    with SampleBank("bank") as bank:
        for step in (3, 6, 9, 12):
            torch.manual_seed(step)
            bank.add(Net(), step=step)
    (folder / "file").write_text("text")
    for suffix in ("html", "pt2", "onnx", "csv"):
        (folder / f"folder.{suffix}").mkdir()
    return folder


def refused(lpsgld, *args):
    """The line that a command ends with."""
    code, _, errors = lpsgld(*args)
    assert (code, len(errors)) == (2, 1), errors
    return errors[0].split(" error: ", 1)[1]


# ------------------------------------------------------------------------------------------------------- the YAML file

FILES = {
    "empty": (b"", "config: bad.yaml must be a mapping with `model:", "is empty"),
    "list": (b"- model\n", "config: bad.yaml must be a mapping with `model:", "a list"),
    "word": (b"model\n", "config: bad.yaml must be a mapping with `model:", "'model'"),
    "torn": (b"model: {class_path: [\n", "config: bad.yaml is no YAML: line 2:", "node content"),
    "bytes": (bytes(range(200, 256)), "config: bad.yaml cannot be read as text in UTF-8", "decode"),
    "twice": (b"trainer: {max_epochs: 1}\nlpsgld: {temperature: 1, temperature: 2}\n",
              "lpsgld.temperature: stands twice in bad.yaml, on lines 2 and 2", "keep one"),
    "null": (b"model: {class_path: cli_module.Net}\nlpsgld:\n", "lpsgld: must be a mapping such as {weights", "line 2"),
    "scalar": (b"ensemble: bank\n", "ensemble: must be a mapping such as {bank: bank}, and is 'bank'", "defaults"),
    "no model": (b"trainer: {max_epochs: 1}\n", "model: is needed", "class_path"),
}  # fmt: skip


THIN = ("bank", "thin", "bank", "new", "--keep=2", "--method=nll")


TRIED = [*((("plan",), name) for name in FILES), (("fit",), "empty"), (THIN, "empty")]


@pytest.mark.parametrize(("command", "name"), TRIED)
def test_a_file_that_is_no_configuration(run_folder, lpsgld, command, name):
    content, start, word = FILES[name]
    (run_folder / "bad.yaml").write_bytes(content)
    line = refused(lpsgld, *command, "--config", "bad.yaml")
    assert line.startswith(start)
    assert word in line


KEYS = {
    ("every: 3", "evry: 3"): ("trainer.callbacks.init_args.evry: SampleCollector has no such argument.", "`every`?"),
    ("every: 3", "every: [3]"): ("trainer.callbacks.init_args.every: Expected a <class 'int'> or typing.", "got"),
    ("max_epochs: 3", "max_epoch: 3"): ("trainer.max_epoch: there is no such option.", "`max_epochs`?"),
    ("temperature: 0.5", "temperatur: 1"): ("lpsgld.temperatur: there is no such option.", "`temperature`?"),
    ("cli_module.Net", "cli_module.Net\n  init_args: {widht: 3}"): ("model.init_args.widht: Net has no", "`width`?"),
    ("cli_module.Net", "cli_module.Net\n  init_args: {width: wide}"): ("model.init_args.width: Expected a", "'wide'"),
    ("  class_path: cli_module.Net", "  class: cli_module.Net"): ("model.class: needs a `class_path`", "init_args"),
    ("cli_module.Data", "cli_module.Data\n  init_args: {batch: 3}"): ("data.init_args.batch: Data has no such", "."),
    ("accelerator: cpu", "accelerator: toaster"): ("trainer.accelerator: You selected", "toaster"),
    ("accelerator: cpu", "precision: 16-mixed"): ("trainer.precision: Received both", "plugins"),
    ("temperature: 0.5", "weights: [bfp8]"): ("lpsgld.weights: A number format must be", "bfp8"),
    ("temperature: 0.5", "sampled: ['*zzz']"): ("lpsgld.sampled: `sampled`: '*zzz' matches no parameter", "lora"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), KEYS.items(), ids=lambda value: re.sub(r"\W+", "-", str(value[-1]))[:30])
def test_a_wrong_value_is_named_by_its_whole_key(run_folder, lpsgld, change, said):
    text = (run_folder / "run.yaml").read_text().replace("path: bank", "path: new")
    assert text.count(change[0]) == 1
    (run_folder / "bad.yaml").write_text(text.replace(*change))
    line = refused(lpsgld, "fit", "--config", "bad.yaml")
    assert line.startswith(said[0])
    assert said[1] in line


# ---------------------------------------------------------------------------------------------------------- the outputs


@pytest.mark.parametrize(
    ("command", "suffix"), [("report", "html"), ("export", "pt2"), ("export", "onnx"), ("predict", "csv")]
)
@pytest.mark.parametrize("place", ["folder", "file/in"])
def test_an_output_that_cannot_be_is_refused_before_the_work(run_folder, lpsgld, monkeypatch, command, suffix, place):
    monkeypatch.setattr("lightning_lpsgld.report.evaluation.bayesian_model_average", None)
    monkeypatch.setattr("torch.export.export", None)
    line = refused(lpsgld, command, *RUN, BANK, f"--ensemble.output={place}.{suffix}")
    assert line.startswith(f"ensemble.output: {place}.{suffix} ")
    assert "name " in line


@pytest.mark.parametrize("into", ["file", "file/bank", ""])
@pytest.mark.parametrize(
    "action", [("thin", "bank", "{}", "--keep=2"), ("merge", "{}", "bank"), ("export", "bank", "{}")]
)
def test_a_bank_is_not_made_of_a_file(run_folder, lpsgld, action, into):
    line = refused(lpsgld, "bank", *(word.format(into) for word in action))
    assert line.startswith("into: ")
    assert repr(into) in line or into in line


def test_plain_files_do_not_go_into_a_bank(run_folder, lpsgld):
    before = sorted(path.name for path in (run_folder / "bank").iterdir())
    assert refused(lpsgld, "bank", "export", "bank", "bank").startswith("into: bank is a bank; name a folder")
    assert sorted(path.name for path in (run_folder / "bank").iterdir()) == before


@pytest.mark.parametrize("path", ["file", "file/in"])
def test_a_collector_that_cannot_make_its_bank(run_folder, lpsgld, path):
    line = refused(lpsgld, "fit", *RUN, f"--trainer.callbacks.path={path}")
    assert line.startswith("trainer.callbacks[0].init_args.path: ")


@pytest.mark.parametrize("command", ["fit", "test", "plan"])
@pytest.mark.parametrize("path", ["file", "folder.csv"])
def test_a_checkpoint_that_is_none(run_folder, lpsgld, command, path):
    line = refused(lpsgld, command, *RUN, "--trainer.callbacks.path=new", f"--ckpt_path={path}")
    assert line.startswith(f"ckpt_path: {path}")


@pytest.mark.parametrize("name", ["none.csv", "file", "bank"])
def test_a_table_of_metrics_that_is_none(run_folder, lpsgld, name):
    line = refused(lpsgld, "report", *RUN, BANK, f"--metrics={name}")
    assert line.startswith("metrics: ")
    assert not (run_folder / "report.html").exists()


# ------------------------------------------------------------------------------------------------------------- the data

OUT = {"report": ("--ensemble.output=a.html",), "export": ("--ensemble.output=a.pt2",)}
DATA = [
    ("test", "NoTargets", "a batch has no targets to test with"),
    ("report", "NoTargets", "a batch has no targets to score with"),
    ("predict", "NoTargets", "a batch has no targets to calibrate with"),
    ("thin", "NoTargets", "a batch has no targets to score with"),
    ("test", "OtherClasses", "target 9 is no class of 2 (0 to 1)"),
    ("report", "OtherClasses", "target 9 is no class of 2 (0 to 1)"),
    ("predict", "OtherClasses", "target 9 is no class of 2 (0 to 1)"),
    ("thin", "OtherClasses", "target 9 is no class of 2 (0 to 1)"),
    ("report", "NoRows", "got no test batch"),
    ("export", "NoRows", "test_dataloader() gives no batch"),
    ("predict", "NoRows", "got no batch of held-out data"),
    ("thin", "NoRows", "got no batch of held-out data"),
    ("report", "Several", "test_dataloader() gave a list"),
    ("export", "Several", "test_dataloader() gave a list"),
    ("predict", "Several", "val_dataloader() gave a list"),
    ("thin", "Several", "val_dataloader() gave a list"),
    ("test", "NotThere", "the archive is not there"),
    ("plan", "NotThere", "the archive is not there"),
]


@pytest.mark.parametrize(("command", "data", "said"), DATA)
def test_data_that_do_not_fit_are_said_to_be_so(run_folder, lpsgld, command, data, said):
    (run_folder / "bad.yaml").write_text((run_folder / "run.yaml").read_text().replace(".Data", f".{data}"))
    args = (command, BANK, *OUT.get(command, ()), *(("--ensemble.coverage=0.8",) if command == "predict" else ()))
    args = ("plan",) if command == "plan" else args
    args = THIN if command == "thin" else args
    line = refused(lpsgld, *args, "--config=bad.yaml")
    assert line.startswith("data: ")
    assert said in line


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_module_that_cannot_be_exported(run_folder, lpsgld, suffix):
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    line = refused(lpsgld, "export", *RUN, BANK, f"--ensemble.output=a.{suffix}", "--model=cli_module.Branching")
    assert "export: torch.export cannot trace this network: " in line
    assert "must not branch on values" in line
    assert not (run_folder / f"a.{suffix}").exists()


# ----------------------------------------------------------------------------------------------- whose mistake it was


def raised(body):
    """What a user's function raises: it is of no library."""
    spaces = {"__name__": "users_code", "torch": torch}
    exec(f"def function():\n    {body}", spaces)
    try:
        spaces["function"]()
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "body",
    ["raise ValueError('mine')", "torch.zeros(2, 3) @ torch.zeros(2, 3)", "import lightning_lpsgld.nothing", "1 / 0"],
)
def test_what_the_users_code_raises_keeps_its_traceback(body):
    assert as_command_error(raised(body), {}) is None


def test_what_a_check_of_ours_refuses_in_the_users_code_is_one_line():
    error = raised("from lightning_lpsgld import formats; formats.parse_format('fixd8')")
    assert str(as_command_error(error, {})).startswith("No number format is called 'fixd8'")
