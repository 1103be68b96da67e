"""Every command against every bad input: one line that begins with the command, with the key or the path; exit 2."""

import shutil
import sys

import pytest
import torch

from lightning_lpsgld.bank import SampleBank

RUN = ("--config", "run.yaml")
MISSING, TORN, OTHER, DAMAGED = "missing bank", "torn manifest", "other module", "damaged samples"
KEY, TYPE = "unknown key", "wrong type"


def ensemble(command):
    """Bad inputs of a command that runs the samples of a bank: arguments, and words of the line."""
    out = ("--ensemble.output=out.html",) if command == "report" else ()
    out = ("--ensemble.output=out.pt2",) if command == "export" else out
    out = ("--ensemble.output=out.csv",) if command == "predict" else out
    run = (command, *RUN, *out)
    return {
        MISSING: ((*run, "--ensemble.bank=none"), "ensemble.bank: There is no sample bank at none"),
        TORN: ((*run, "--ensemble.bank=torn"), "ensemble.bank: "),
        DAMAGED: ((*run, "--ensemble.bank=damaged"), "ensemble.bank: "),
        OTHER: ((*run, "--ensemble.bank=bank", "--model.width=7"), "ensemble.bank: "),
        KEY: ((*run, "--ensemble.bnk=bank"), "ensemble.bnk"),
        TYPE: ((*run, "--ensemble.bank=bank", "--ensemble.coverage=much"), "ensemble.coverage: "),
    }


def samples(action, *more, kind):
    """Bad inputs of a ``bank`` action."""
    run = ("bank", action)
    return {
        MISSING: ((*run, "none", *more), "There is no sample bank at none"),
        TORN: ((*run, "torn", *more), "torn"),
        KEY: ((*run, "bank", *more, "--jsn"), "--jsn"),
        TYPE: ((*run, "bank", *more, *kind), kind[-1].rpartition("=")[2]),
    }


COLLECT = ("fit", *RUN, "--trainer.callbacks.append=true")
PLACE = "trainer.callbacks[0]"
THIN = ("--keep", "2")
#: What does not stand here does not exist: `fit` makes its bank and a plan has none, so that with them a file of
#: weights is missing or of another module; `bank` actions that only look show what is damaged (tested below).
BAD = {
    "fit": {
        MISSING: (("fit", *RUN, "--ckpt_path=none.ckpt"), "ckpt_path: "),
        TORN: ((*COLLECT, "--trainer.callbacks.path=torn"), PLACE),
        OTHER: ((*COLLECT, "--trainer.callbacks.path=bank", "--model.width=7"), PLACE),
        KEY: (("fit", *RUN, "--lpsgld.tempature=1"), "lpsgld.tempature"),
        TYPE: (("fit", *RUN, "--lpsgld.temperature=warm"), "lpsgld.temperature: "),
    },
    "validate": ensemble("validate"),
    "test": ensemble("test"),
    "predict": ensemble("predict"),
    "plan": {
        MISSING: (("plan", *RUN, "--ckpt_path=none.ckpt"), "ckpt_path: "),
        OTHER: (("plan", *RUN, "--model.width=7", "--ckpt_path=weights.ckpt"), "ckpt_path: "),
        KEY: (("plan", *RUN, "--jsn"), "--jsn"),
        TYPE: (("plan", *RUN, "--lpsgld.temperature=warm"), "lpsgld.temperature: "),
    },
    "report": ensemble("report"),
    "export": ensemble("export"),
    "bank ls": samples("ls", kind=("--json=yes",)),
    "bank info": samples("info", kind=("--json=yes",)),
    "bank verify": samples("verify", kind=("7",)),
    "bank recover": {k: v for k, v in samples("recover", kind=("7",)).items() if k != TORN},  # that one it mends
    "bank merge": {
        MISSING: (("bank", "merge", "new", "bank", "none"), "There is no sample bank at none"),
        TORN: (("bank", "merge", "new", "bank", "torn"), "torn"),
        DAMAGED: (("bank", "merge", "new", "damaged", "damaged"), "no usable sample"),
        OTHER: (("bank", "merge", "new", "bank", "wide"), "net.0.weight"),
        KEY: (("bank", "merge", "new", "bank", "--chans=keep"), "--chans"),
        TYPE: (("bank", "merge", "new", "bank", "--chains=some"), "some"),
    },
    "bank thin": samples("thin", "new", *THIN, kind=("--keep", "x"))
    | {
        DAMAGED: (("bank", "thin", "damaged", "new", *THIN), "damaged has no usable sample"),
        OTHER: (("bank", "thin", "wide", "new", *THIN, "--method=nll", *RUN), "net.0.weight"),
    },
    "bank export": samples("export", "new", kind=("--index", "x"))
    | {
        DAMAGED: (("bank", "export", "damaged", "new"), "damaged"),
        OTHER: (("bank", "export", "frozen", "new", "--base=weights.ckpt"), "frozen"),
    },
    "completion": {
        KEY: (("completion", "bash", "--shell"), "--shell"),
        TYPE: (("completion", "fish"), "fish"),
    },
}
CASES = [(command, kind) for command, kinds in BAD.items() for kind in kinds]


@pytest.fixture
def banks(folder):
    """A bank of a run, one with a torn manifest, one whose every sample is damaged, two of a wider module."""
    sys.path.insert(0, str(folder))
    from cli_module import Net

    sys.path.remove(str(folder))
    for name, width in (("bank", 4), ("wide", 7)):
        with SampleBank(name) as bank:
            for step in (3, 6, 9, 12):
                torch.manual_seed(step)
                bank.add(Net(width), step=step)
    torch.save({"state_dict": Net().state_dict()}, "weights.ckpt")
    net = Net(7)
    net.net[0].requires_grad_(False)
    with SampleBank("frozen", base="reference") as bank:
        bank.add(net, step=3)
    shutil.copytree("bank", "torn")
    (folder / "torn" / "manifest.json").write_text("{")
    shutil.copytree("bank", "damaged")
    for file in (folder / "damaged").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    return folder


@pytest.mark.parametrize(("command", "kind"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_one_line_and_exit_code_2(banks, lpsgld, command, kind):
    args, said = BAD[command][kind]
    before = sorted(path.name for path in banks.iterdir())
    code, _, errors = lpsgld(*args)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"lpsgld {command.split()[0]}: error: ")
    assert said in errors[0]
    if said == PLACE or said.endswith(": "):
        assert errors[0].startswith(f"lpsgld {command}: error: {said}")
    assert SampleBank.open("bank").steps == [3, 6, 9, 12]
    assert not {path.name for path in banks.iterdir()} - set(before) - {"__pycache__"}, "something was left behind"


def test_every_command_and_every_action_is_tried(lpsgld):
    listed = lpsgld("--help")[1]
    commands = {command.split()[0] for command in BAD}
    assert all(f"  {command} " in listed for command in commands)
    assert lpsgld("bank", "look", "bank")[2][0].count(",") == 6
    assert {command.split()[1] for command in BAD if " " in command} == {
        "ls",
        "info",
        "verify",
        "recover",
        "merge",
        "thin",
        "export",
    }
    assert commands == {"fit", "validate", "test", "predict", "plan", "bank", "report", "export", "completion"}


FROM_YAML = (
    ("fit",),
    ("validate",),
    ("test",),
    ("predict",),
    ("plan",),
    ("report", "--ensemble.bank=bank"),
    ("export", "--ensemble.bank=bank", "--ensemble.output=a.pt2"),
    ("bank", "thin", "bank", "new", "--keep=2", "--method=nll"),
)


@pytest.mark.parametrize("args", FROM_YAML, ids=lambda value: value[0])
@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("tempature: 0.5", "lpsgld.tempature"),
        ("temperature: warm", "lpsgld.temperature: "),
        ("weights: fixd8", "lpsgld.weights: "),
    ],
)
def test_values_of_the_file_are_named_by_their_key(banks, lpsgld, args, line, key):
    text = (banks / "run.yaml").read_text()
    (banks / "bad.yaml").write_text(text.replace("temperature: 0.5", line))
    code, _, errors = lpsgld(*args, "--config=bad.yaml")
    assert (code, len(errors)) == (2, 1)
    assert key in errors[0].split("error: ", 1)[1][:60]


def test_what_is_damaged_is_shown(banks, lpsgld):
    for action, code, said in (("ls", 0, "damaged: "), ("info", 0, "4 damaged"), ("verify", 1, "4 damaged")):
        found, out, _ = lpsgld("bank", action, "damaged")
        assert (found, said in out) == (code, True)


def test_a_damaged_sample_among_whole_ones_is_left_out_and_said(banks, lpsgld):
    """A bank of which one file is damaged is read without it; only `verify` fails."""
    victim = sorted((banks / "bank").rglob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert lpsgld("bank", "verify", "bank")[0] == 1
    code, out, _ = lpsgld("export", *RUN, "--ensemble.bank=bank", "--ensemble.output=p.pt2")
    assert code == 0
    assert "p.pt2: 3 samples" in out
    code, out, _ = lpsgld("bank", "merge", "new", "bank")
    assert code == 0
    assert "damaged: chain 0, step 3: sample-" in out
    assert "new: 3 samples" in out
