"""Every command against every bad input: one line that begins with the command, with the key or the path; exit 2."""

import shutil
import sys

import pytest
import torch

from lightning_lpsgld.bank import SampleBank

RUN = ("--config", "run.yaml")
MISSING, TORN, OTHER, DAMAGED = "missing bank", "torn manifest", "other module", "damaged samples"
KEY, TYPE = "unknown key", "wrong type"


def ensemble(command, *more):
    """Bad inputs of a command that runs the samples of a bank: arguments, and words of the line."""
    out = ("--ensemble.output=out.html",) if command == "report" else ()
    out = ("--ensemble.output=out.pt2",) if command == "export" else out
    run = (command, *RUN, *out)
    return {
        MISSING: ((*run, "--ensemble.bank=none"), "There is no sample bank at none"),
        TORN: ((*run, "--ensemble.bank=torn"), "torn"),
        DAMAGED: ((*run, "--ensemble.bank=damaged"), "no usable sample"),
        OTHER: ((*run, "--ensemble.bank=bank", "--model.width=7"), "`net.0.weight` is (7, 3)"),
        KEY: ((*run, "--ensemble.bnk=bank"), "--ensemble.bnk"),
        TYPE: ((*run, "--ensemble.bank=bank", "--ensemble.coverage=much"), "ensemble.coverage: "),
    }


def samples(action, *more, key="--jsn", kind=None):
    """Bad inputs of a ``bank`` action."""
    run = ("bank", action)
    found = {
        MISSING: ((*run, "none", *more), "There is no sample bank at none"),
        TORN: ((*run, "torn", *more), "torn"),
        KEY: ((*run, "bank", *more, key), key),
    }
    return found | ({} if kind is None else {TYPE: ((*run, "bank", *more, *kind), kind[-1])})


COLLECT = ("fit", *RUN, "--trainer.callbacks.append=true")
THIN = ("--keep", "2")
#: What does not stand here does not exist: `fit` makes its bank, a plan has none, `ls` knows no module and no numbers.
BAD = {
    "fit": {
        TORN: ((*COLLECT, "--trainer.callbacks.path=torn"), "torn"),
        OTHER: ((*COLLECT, "--trainer.callbacks.path=bank", "--model.width=7"), "net.0.weight"),
        KEY: (("fit", *RUN, "--lpsgld.tempature=1"), "--lpsgld.tempature"),
        TYPE: (("fit", *RUN, "--lpsgld.temperature=warm"), "lpsgld.temperature: "),
    },
    "validate": ensemble("validate"),
    "test": ensemble("test"),
    "predict": ensemble("predict"),
    "plan": {
        OTHER: (("plan", *RUN, "--model.width=7", "--ckpt_path=weights.ckpt"), "net.0.weight"),
        KEY: (("plan", *RUN, "--jsn"), "--jsn"),
        TYPE: (("plan", *RUN, "--lpsgld.temperature=warm"), "lpsgld.temperature: "),
    },
    "report": ensemble("report"),
    "export": ensemble("export"),
    "bank ls": samples("ls"),
    "bank info": samples("info"),
    "bank verify": samples("verify"),
    "bank merge": {
        MISSING: (("bank", "merge", "new", "none"), "There is no sample bank at none"),
        TORN: (("bank", "merge", "new", "torn"), "torn"),
        OTHER: (("bank", "merge", "new", "bank", "wide"), "net.0.weight"),
        KEY: (("bank", "merge", "new", "bank", "--chans=keep"), "--chans"),
        TYPE: (("bank", "merge", "new", "bank", "--chains=some"), "some"),
    },
    "bank thin": samples("thin", "new", *THIN, kind=("--keep", "x"))
    | {
        DAMAGED: (("bank", "thin", "damaged", "new", *THIN), "the 0 samples"),
        OTHER: (("bank", "thin", "wide", "new", *THIN, "--method=nll", *RUN), "net.0.weight"),
    },
    "bank export": samples("export", "new", kind=("--index", "x"))
    | {DAMAGED: (("bank", "export", "damaged", "new"), "damaged")},
    "completion": {
        KEY: (("completion", "bash", "--shell"), "--shell"),
        TYPE: (("completion", "fish"), "fish"),
    },
}
CASES = [(command, kind) for command, kinds in BAD.items() for kind in kinds]


@pytest.fixture
def banks(folder):
    """A bank of a run, one with a torn manifest, one whose every sample is damaged, one of a wider module."""
    sys.path.insert(0, str(folder))
    from cli_module import Net

    sys.path.remove(str(folder))
    for name, width in (("bank", 4), ("wide", 7)):
        with SampleBank(name) as bank:
            for step in (3, 6, 9, 12):
                torch.manual_seed(step)
                bank.add(Net(width), step=step)
    torch.save({"state_dict": Net().state_dict()}, "weights.ckpt")
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
    assert SampleBank.open("bank").steps == [3, 6, 9, 12]
    assert not {path.name for path in banks.iterdir()} - set(before) - {"__pycache__"}, "something was left behind"


def test_every_command_and_every_action_is_tried(lpsgld):
    listed = lpsgld("--help")[1]
    commands = {command.split()[0] for command in BAD}
    assert all(f"  {command} " in listed for command in commands)
    assert lpsgld("bank", "look", "bank")[2][0].count(",") == 5
    assert {command.split()[1] for command in BAD if " " in command} == {
        "ls",
        "info",
        "verify",
        "merge",
        "thin",
        "export",
    }
    assert commands == {"fit", "validate", "test", "predict", "plan", "bank", "report", "export", "completion"}


def test_a_damaged_sample_among_whole_ones_is_left_out_and_said(banks, lpsgld):
    """A bank of which one file is damaged is read without it; only `verify` fails."""
    victim = sorted((banks / "bank").rglob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert lpsgld("bank", "verify", "bank")[0] == 1
    code, out, _ = lpsgld("export", *RUN, "--ensemble.bank=bank", "--ensemble.output=p.pt2")
    assert code == 0
    assert "p.pt2: 3 samples" in out
