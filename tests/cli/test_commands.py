"""Every command: the good path, and each kind of bad input, which is one line with the key and exit code 2."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import lightning_lpsgld
from lightning_lpsgld.bank import SampleBank

RUN = ("--config", "run.yaml")


@pytest.fixture
def run_folder(folder):
    """A folder with the bank of a run: four samples of three epochs of four steps."""
    sys.path.insert(0, str(folder))
    from cli_module import Net

    bank = SampleBank(folder / "bank")
    for step in (3, 6, 9, 12):
        torch.manual_seed(step)
        bank.add(Net(), step=step, temperature=0.5, lr=0.1, metrics={"loss": step / 10})
    sys.path.remove(str(folder))
    return folder


def test_fit_then_test_then_predict(folder, lpsgld):
    assert lpsgld("fit", *RUN)[0] == 0
    assert SampleBank.open("bank").steps == [3, 6, 9, 12]
    code, out, _ = lpsgld("test", *RUN, "--ensemble.bank", "bank")
    assert code == 0
    assert "ensemble/nll" in out
    assert "ensemble/nll" in lpsgld("validate", *RUN, "--ensemble.bank=bank")[1]
    options = ("--ensemble.bank=bank", "--ensemble.output=p.csv", "--ensemble.coverage=0.8")
    assert lpsgld("predict", *RUN, *options)[0] == 0
    with open("p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {"probability_0", "mutual_information", "set"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--lpsgld.weights", "fixd8"), "lpsgld.weights: No number format is called 'fixd8'"),
        (("--lpsgld.temperature", "-1"), "lpsgld.temperature: LowPrecisionSGLD: `temperature` must be >= 0"),
        (("--lpsgld.temperature", "warm"), "lpsgld.temperature: "),
        (("--lpsgld.tempature", "1"), "--lpsgld.tempature"),
        (("--trainer.max_epochs", "x"), "trainer.max_epochs: Expected a <class 'int'>, got 'x'"),
        (("--model.width", "0"), "model.init_args.width: width must be positive, got 0"),
        (("--model", "cli_module.Nothing"), "model: "),
        (("--trainer.callbacks.start", "1.5"), "trainer.callbacks[0].init_args.start: SampleCollector: `start` must"),
        (("--ckpt_path", "nothing.ckpt"), "ckpt_path: "),
    ],
)  # fmt: skip
def test_bad_values_of_a_run(folder, lpsgld, args, said):
    code, _, errors = lpsgld("fit", *RUN, *args)
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("lpsgld fit: error: ")
    assert said in errors[0]


def test_bad_values_in_the_file(folder, lpsgld):
    text = (folder / "run.yaml").read_text()
    (folder / "bad.yaml").write_text(text.replace("temperature: 0.5", "weights: bfp99"))
    assert lpsgld("fit", "--config", "bad.yaml")[2][0].startswith("lpsgld fit: error: lpsgld.weights: ")
    (folder / "bad.yaml").write_text(text.replace("temperature: 0.5", "tempature: 0.5"))
    code, _, errors = lpsgld("fit", "--config", "bad.yaml")
    assert (code, len(errors)) == (2, 1)
    assert "lpsgld.tempature" in errors[0]
    code, _, errors = lpsgld("fit", "--config", "nothing.yaml")
    assert code == 2
    assert "config: File does not exist" in errors[0]


def test_a_bank_of_another_run_is_refused_with_its_key(run_folder, lpsgld):
    code, _, errors = lpsgld("fit", *RUN)
    assert code == 2
    assert errors[0].startswith("lpsgld fit: error: trainer.callbacks[0].init_args.path: ")


def test_own_mistakes_keep_their_traceback(folder, lpsgld):
    with pytest.raises(KeyError, match="my own mistake"):
        lpsgld("fit", *RUN, "--model", "cli_module.Broken")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--ensemble.bank=none",), "ensemble.bank: There is no sample bank at none"),
        (("--ensemble.bank=bank", "--model.width=7"), "ensemble.bank: `net.0.weight` is (7, 3)"),
        (("--ensemble.bank=bank", "--ensemble.coverage=0.999"), "ensemble.coverage: conformal: 30 held-out points"),
        (("--ensemble.coverage=0.9",), "ensemble.coverage: needs ensemble.bank."),
        (("--ensemble.output=p.csv",), "ensemble.output: needs ensemble.bank."),
        (("--ensemble.bank=bank",), "ensemble.output: nothing would keep the predictions; name a .parquet or .csv"),
        (("--ensemble.bank=bank", "--ensemble.output=p.txt"), "ensemble.output: PredictionWriter: `path` must end"),
        (("--ensemble.bank=bank", "--ensemble.task=ranking"), "ensemble.task: "),
        (("--ensemble.bank=bank", "--ensemble.output=p.csv", "--ensemble.noise_std=0.1"), ""),
    ],
)
def test_bad_ensembles(run_folder, lpsgld, args, said):
    code, _, errors = lpsgld("predict", *RUN, *args)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith(f"lpsgld predict: error: {said}")


# ------------------------------------------------------------------------------------------------------------- planner


def test_plan(folder, lpsgld):
    code, out, _ = lpsgld("plan", *RUN)
    assert code == 0
    assert "net.0.weight" in out
    assert "asked for 0.5" in out
    code, out, _ = lpsgld("plan", *RUN, "--json")
    plan = json.loads(out[out.index("{") :])
    assert code == 0
    assert plan["num_data"] == 16
    assert plan["learning_rates"] == pytest.approx([0.1, 0.05, 0.025])  # three epochs, halved after each
    assert [layer["name"] for layer in plan["layers"]] == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert not (folder / "bank").exists()


def test_plan_of_cold_weights_says_what_to_change(folder, lpsgld):
    plan = json.loads(lpsgld("plan", *RUN, "--lpsgld.temperature=1e-6", "--lpsgld.weights=fixed8.3", "--json")[1])
    assert plan["effective_temperature"] > 1e-5
    assert "To get there" in plan["verdict"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--lpsgld.weights=fixd8",), "lpsgld.weights: "),
        (("--lpsgld.weights=null",), "lpsgld.weights: a plan needs a format"),
        (("--ckpt_path=nothing.ckpt",), "ckpt_path: "),
        (("--jsn",), "--jsn"),
    ],
)
def test_bad_plans(folder, lpsgld, args, said):
    code, _, errors = lpsgld("plan", *RUN, *args)
    assert (code, len(errors)) == (2, 1)
    assert said in errors[0]


# --------------------------------------------------------------------------------------------------------------- banks


def test_bank_ls_and_info(run_folder, lpsgld):
    code, out, _ = lpsgld("bank", "ls", "bank")
    assert code == 0
    assert out.splitlines()[0].split() == ["index", "chain", "step", "cycle", "temperature", "lr", "loss"]
    assert out.splitlines()[1].split() == ["0", "0", "3", "-", "0.5", "0.1", "0.3"]
    rows = json.loads(lpsgld("bank", "ls", "bank", "--json")[1])
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    info = json.loads(lpsgld("bank", "info", "bank", "--json")[1])
    assert (info["samples"], info["steps"], info["damaged"]) == (4, [3, 12], 0)
    assert info["bytes_fp32"] == SampleBank.open("bank").nbytes_fp32
    assert "`net.0.weight` (4, 3) float32" in lpsgld("bank", "info", "bank")[1]


def damage(folder):
    victim = sorted(folder.glob("bank/**/*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(bytes(data))


def test_bank_verify(run_folder, lpsgld):
    assert lpsgld("bank", "verify", "bank")[:2] == (0, "4 samples are whole, 0 damaged, 0 not listed.\n")
    damage(run_folder)
    code, out, _ = lpsgld("bank", "verify", "bank")
    assert code == 1
    assert "3 samples are whole, 1 damaged, 0 not listed." in out
    assert "damaged: chain 0, step " in out


def test_bank_recover_lists_what_a_lost_table_named(run_folder, lpsgld):
    """A journal cut at the end of a line, a manifest that is no JSON, and one that is lost."""
    folder = run_folder / "bank"
    (journal,) = folder.glob("journal*")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-2]))
    code, out, _ = lpsgld("bank", "verify", "bank")
    assert code == 1
    assert "2 samples are whole, 0 damaged, 2 not listed." in out
    assert out.count("lpsgld bank recover bank takes it in if it is whole") == 2
    assert lpsgld("bank", "recover", "bank")[:2] == (0, "bank: 4 samples of chains [0] are listed.\n")
    for damaged in (b"{", b"[]", None):
        manifest = folder / "manifest.json"
        manifest.unlink() if damaged is None else manifest.write_bytes(damaged)
        code, _, errors = lpsgld("bank", "info", "bank")
        assert (code, len(errors)) == (2, 1)
        assert "recover" in errors[0]
        assert lpsgld("bank", "recover", "bank")[0] == 0
        assert lpsgld("bank", "verify", "bank")[0] == 0
    damage(run_folder)
    (folder / "manifest.json").unlink()
    assert "3 samples of chains [0] are listed; 1 more files are not whole." in lpsgld("bank", "recover", "bank")[1]
    code, _, errors = lpsgld("bank", "recover", "nowhere")
    assert (code, len(errors)) == (2, 1)


def test_the_version_is_the_packages(lpsgld):
    assert lpsgld("--version")[:2] == (0, f"lpsgld {lightning_lpsgld.__version__}\n")


def test_bank_merge(run_folder, lpsgld):
    code, out, _ = lpsgld("bank", "merge", "all", "bank", "bank")
    assert code == 0
    assert "8 samples of chains [0, 1]" in out
    assert SampleBank.open("all").steps == [3, 6, 9, 12] * 2
    code, _, errors = lpsgld("bank", "merge", "again", "bank", "bank", "--chains", "keep")
    assert (code, len(errors)) == (2, 1)


def test_bank_thin_keeps_samples_bit_for_bit(run_folder, lpsgld):
    code, out, _ = lpsgld("bank", "thin", "bank", "small", "--keep", "2")
    assert code == 0
    assert "2 of 4 samples, steps [6, 12]" in out
    small, bank = SampleBank.open("small"), SampleBank.open("bank")
    assert small.infos == [bank.infos[1], bank.infos[3]]
    for kept, index in zip(small, (1, 3)):
        original = bank.sample(index).state_dict()
        assert all(torch.equal(value, original[name]) for name, value in kept.state_dict().items())
    assert lpsgld("bank", "thin", "bank", "last", "--keep", "2", "--method", "last")[0] == 0
    assert SampleBank.open("last").steps == [9, 12]


@pytest.mark.parametrize(("method", "measure"), [("nll", "held-out NLL"), ("stein", "Stein discrepancy")])
def test_bank_thin_by_choice_says_what_was_lost(run_folder, lpsgld, method, measure):
    code, out, _ = lpsgld("bank", "thin", "bank", "chosen", "--keep", "2", "--method", method, "--config", "run.yaml")
    assert code == 0
    assert f"{measure} " in out
    assert "lost" in out
    assert len(SampleBank.open("chosen")) == 2


@pytest.mark.parametrize("name", ["posterior.onnx", "posterior.pt2"])
def test_export(run_folder, lpsgld, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    code, out, _ = lpsgld("export", *RUN, "--ensemble.bank=bank", f"--ensemble.output={name}")
    assert code == 0
    assert f"{name}: 4 samples" in out
    assert "largest difference from PyTorch on 4 inputs" in out
    assert (run_folder / name).exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--ensemble.bank=bank",), "ensemble.output: is needed"),
        (("--ensemble.output=a.onnx",), "ensemble.bank: is needed"),
        (("--ensemble.bank=bank", "--ensemble.output=a.txt"), "ensemble.output: must end in .onnx or .pt2"),
        (("--ensemble.bank=none", "--ensemble.output=a.pt2"), "There is no sample bank at none"),
        (("--ensemble.bank=bank", "--ensemble.output=a.pt2", "--model.width=7"), "`net.0.weight` is (7, 3)"),
        (("--ensemble.bank=bank", "--ensemble.output=a.pt2", "--inputs=all"), "inputs: must be train, val or test"),
        (("--ensemble.bank=bank", "--ensemble.output=a.pt2", "--ensemble.task=binary"), "got task='binary'"),
    ],
)
def test_bad_exports(run_folder, lpsgld, args, said):
    code, _, errors = lpsgld("export", *RUN, *args)
    assert (code, len(errors)) == (2, 1)
    assert said in errors[0]


def test_report(run_folder, lpsgld):
    code, out, _ = lpsgld("report", *RUN, "--ensemble.bank=bank", "--ensemble.output=page.html")
    assert (code, out.splitlines()[-1]) == (0, "page.html")
    page = (run_folder / "page.html").read_text()
    assert "4 of 1 chain(s)" in page
    assert page.count("<svg") >= 6


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "ensemble.bank: is needed"),
        (("--ensemble.bank=none",), "There is no sample bank at none"),
        (("--ensemble.bank=bank", "--ensemble.output=a.pdf"), "ensemble.output: must end in .html"),
        (("--ensemble.bank=bank", "--model.width=7"), "`net.0.weight` is (7, 3)"),
        (("--ensemble.bank=bank", "--inputs=train"), "inputs: must be val or test"),
        (("--ensemble.bank=bank", "--metrics=none.csv"), "none.csv"),
    ],
)
def test_bad_reports(run_folder, lpsgld, args, said):
    code, _, errors = lpsgld("report", *RUN, *args)
    assert (code, len(errors)) == (2, 1)
    assert said in errors[0]
    assert not (run_folder / "report.html").exists()


def test_bank_export(run_folder, lpsgld):
    from safetensors.torch import load_file

    code, out, _ = lpsgld("bank", "export", "bank", "plain", "--index", "1")
    assert code == 0
    (name,) = out.split()
    expected = SampleBank.open("bank").sample(1).state_dict()
    loaded = load_file(name)
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize("kind", ["stored", "reference"])
def test_banks_with_a_base(run_folder, lpsgld, kind):
    """Listed, merged, thinned and exported; with only checksums of the frozen weights, given their checkpoint."""
    from safetensors.torch import load_file

    net = torch.nn.Sequential(torch.nn.Linear(3, 4).requires_grad_(False), torch.nn.Linear(4, 2))
    with SampleBank("based", base=kind) as bank:
        for step in (1, 2, 3):
            torch.nn.init.normal_(net[1].weight)
            bank.add(net, step=step)
    code, out, _ = lpsgld("bank", "info", "based")
    assert code == 0
    assert f"`0.weight` (4, 3) float32 as it is, 48 bytes, {'once' if kind == 'stored' else 'as a checksum'}" in out
    assert json.loads(lpsgld("bank", "info", "based", "--json")[1])["base"] == {
        "kind": kind, "tensors": ["0.bias", "0.weight"]
    }  # fmt: skip
    assert lpsgld("bank", "merge", "twice", "based", "based")[0] == 0
    assert lpsgld("bank", "thin", "twice", "less", "--keep", "2", "--method", "last")[0] == 0
    assert lpsgld("bank", "verify", "less")[0] == 0
    less = SampleBank.open("less")
    assert less.base.kind == kind
    less.load_into(net, 1)
    torch.save({"state_dict": net.state_dict()}, "frozen.ckpt")
    if kind == "reference":
        code, _, errors = lpsgld("bank", "export", "less", "plain")
        assert code == 2
        assert "--base: less has only checksums of its frozen weights; give their checkpoint" in errors[0]
    code, out, _ = lpsgld("bank", "export", "less", "plain", "--index", "1", "--base", "frozen.ckpt")
    assert code == 0
    loaded = load_file(out.strip())
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("ls", "none"), "There is no sample bank at none"),
        (("info", "none"), "There is no sample bank at none"),
        (("verify", "none"), "There is no sample bank at none"),
        (("merge", "all", "none"), "There is no sample bank at none"),
        (("merge", "bank", "bank"), "bank"),
        (("thin", "bank", "small", "--keep", "9"), "--keep: must be between 1 and the 4 samples"),
        (("thin", "bank", "small", "--keep", "x"), "argument --keep: invalid int value: 'x'"),
        (("thin", "bank", "small"), "the following arguments are required: --keep"),
        (("thin", "bank", "bank", "--keep", "1"), "bank"),
        (("thin", "bank", "small", "--keep", "1", "--method", "nll"), "--config: --method nll needs the run's YAML"),
        (("export", "bank", "plain", "--index", "7"), "--index: must be between 0 and 3"),
        (("ls",), "the following arguments are required: path"),
        (("look", "bank"), "there is no action 'look'; use ls, info, verify, recover, merge, thin, export."),
    ],
)
def test_bad_banks(run_folder, lpsgld, args, said):
    code, _, errors = lpsgld("bank", *args)
    assert (code, len(errors)) == (2, 1)
    assert errors[0].startswith("lpsgld bank: error: ")
    assert said in errors[0]
    assert SampleBank.open("bank").steps == [3, 6, 9, 12]


def test_a_malformed_manifest_is_one_line(run_folder, lpsgld):
    shutil.copytree("bank", "torn")
    (run_folder / "torn" / "manifest.json").write_text("{")
    for action in ("ls", "info", "verify"):
        code, _, errors = lpsgld("bank", action, "torn")
        assert (code, len(errors)) == (2, 1)


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "command", ["fit", "validate", "test", "predict", "plan", "bank", "report", "export", "completion"]
)
def test_help_has_an_example(folder, lpsgld, command):
    code, out, _ = lpsgld(command, "--help")
    assert code == 0
    assert f"lpsgld {command}" in out


def test_the_list_of_commands(lpsgld):
    code, out, _ = lpsgld("--help")
    assert code == 0
    assert lpsgld()[1] == out
    for command in ("fit", "validate", "test", "predict", "plan", "bank", "completion"):
        assert f"  {command} " in out
    code, _, errors = lpsgld("fot")
    assert (code, len(errors)) == (2, 1)
    assert "there is no such command; use fit, validate" in errors[0]


def completed(script, *words):
    """What bash offers for the last word."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    typed = " ".join(repr(word) for word in words)
    line = f'COMP_WORDS=(lpsgld {typed}); COMP_CWORD={len(words)}; _lpsgld; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_completion_in_bash(lpsgld):
    code, script, _ = lpsgld("completion", "bash")
    assert code == 0
    assert completed(script, "pl") == ["plan"]
    assert completed(script, "bank", "ve") == ["verify"]
    assert "--keep" in completed(script, "bank", "thin", "--k")
    assert completed(script, "fit", "--lpsgld.temp") == ["--lpsgld.temperature"]
    assert lpsgld("completion", "zsh")[1].startswith("autoload -U +X bashcompinit")
    assert lpsgld("completion", "fish")[0] == 2
    _, listed, _ = lpsgld("--help")
    assert all(f"  {command} " in listed for command in completed(script, ""))
    assert len(completed(script, "")) == 9


def test_as_a_process(folder):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_lpsgld.cli", "bank", "ls", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lpsgld bank: error: There is no sample bank at none")
    assert "Traceback" not in done.stderr


#: Words of the plan, and arguments that spare time or say where data are; ``None``: the data are not here.
SMALL = ("--model.init_args.body.init_args.random_weights=true", "--data.init_args.random_weights=true")
CONFIGS = {
    "digits": ("N = 1198", ()),
    "regression": ("N = 353", ()),
    "segmentation": ("N = 256", ()),
    "language-model-adapters": ("N = 240", SMALL),
    "billion-weights": ("blocks.1.linear2.weight", ()),
    "fashion-mnist": (None, ("--data.root=nowhere",)),
    "cifar10": (None, ("--data.root=nowhere",)),
    "cifar100": (None, ("--data.root=nowhere",)),
    "imdb": (None, ("--data.root=nowhere",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_the_examples(name, lpsgld, monkeypatch, request):
    """They are planned; those whose data are not here get as far as looking for them."""
    pytest.importorskip("sklearn")
    if name == "language-model-adapters":
        pytest.importorskip("peft")
    examples = request.config.rootpath / "examples"
    monkeypatch.chdir(examples)
    monkeypatch.syspath_prepend(examples)
    assert {path.stem for path in (examples / "configs").glob("*.yaml")} == set(CONFIGS)
    said, args = CONFIGS[name]
    code, out, errors = lpsgld("plan", "--config", f"configs/{name}.yaml", *args)
    if said is not None:
        assert (code, errors) == (0, [])
        assert said in out
    else:
        assert code == 2
        assert "Dataset not found" in errors[0]
    for path in examples.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_example_that_trains_a_module_has_a_configuration(request):
    """The others use samplers without a Trainer, or a grid of their own (the study)."""
    examples = request.config.rootpath / "examples"
    modules = {
        p.stem for p in examples.glob("*.py") if re.search(r"^class \w+\(L\.LightningModule\)", p.read_text(), re.M)
    }
    named = {
        name
        for path in (examples / "configs").glob("*.yaml")
        for name in re.findall(r"class_path: (\w+)\.", path.read_text())
    }
    assert modules <= named
