"""README as a new user walks it, with an installed package: prints what each step gave and how long it took.

Run it outside the repository with the interpreter of a venv that has the package with the extras ``cli``, ``export``
and ``examples``::

    python walk.py --start .../docs/start.md

1. the five-minute page, as a file: the table of the ensemble;
2. a module of one's own, trained without and then with the one line;
3. the same from a YAML file: ``lpsgld plan``, ``fit``, ``test``, ``predict``;
4. ``lpsgld report``, opened in a browser where there is one;
5. ``lpsgld export`` to ONNX, asked again by onnxruntime: answers like PyTorch's to 1e-5;
6. the bank inspected, verified and thinned.

The first step that does not hold ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MODULE = '''
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    """Nothing in it knows of the package."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


class Data(L.LightningDataModule):
    """The side of the origin, in three parts."""

    def _loader(self, seed, count, shuffle=False):
        x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(0, 512, True)

    def val_dataloader(self):
        return self._loader(1, 256)

    def test_dataloader(self):
        return self._loader(2, 256)

    predict_dataloader = test_dataloader
'''
ONE_LINE = """
import lightning as L
from own import Data, Net
from lightning_lpsgld import EnsembleEvaluation, LowPrecisionSGLD, SampleCollector

options = dict(max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
L.Trainer(**options).fit(Net(), Data())
trainer = L.Trainer(
    **options,
    plugins=[LowPrecisionSGLD()],
    callbacks=[SampleCollector("own_bank", start=0.5, every="epoch"), EnsembleEvaluation()],
)
trainer.fit(model := Net(), data := Data())
trainer.test(model, data)
"""
CONFIG = """
seed_everything: 0
model: {class_path: own.Net}
data: {class_path: own.Data}
lpsgld: {weights: bfp8, temperature: 1.0e-3}
trainer:
  accelerator: cpu
  max_epochs: 20
  enable_progress_bar: false
  enable_checkpointing: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}
  callbacks:
    - class_path: SampleCollector
      init_args: {path: posterior, start: 0.5, every: epoch}
    - class_path: EffectiveTemperature
"""
ASK = """
import numpy, onnxruntime, torch
from own import Data, Net
from lightning_lpsgld import PosteriorEnsemble
x = next(iter(Data().test_dataloader()))[0]
session = onnxruntime.InferenceSession("posterior.onnx", providers=["CPUExecutionProvider"])
named = dict(zip([output.name for output in session.get_outputs()], session.run(None, {"input": x.numpy()})))
answer = PosteriorEnsemble.from_bank(Net(), "posterior")(x).tensors()
print(max(float(numpy.abs(named[name] - answer[name].numpy()).max()) for name in named))
"""


def run(*command: str | Path) -> str:
    """Output of a command; ends the walk if it failed."""
    env = os.environ | {"PYTHONPATH": str(Path.cwd()), "MPLBACKEND": "agg"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"walk: {' '.join(map(str, command))} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def lpsgld(*args: str) -> str:
    """The command as the installation has it."""
    return run(Path(sys.executable).parent / "lpsgld", *args)


def hold(what: bool, message: str) -> None:
    """End the walk where something does not hold."""
    if not what:
        raise SystemExit(f"walk: {message}")


def five_minutes(page: Path) -> str:
    """The page's program, saved and run."""
    found = re.search(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    Path("start.py").write_text(found[1])
    out = run(sys.executable, "start.py")
    hold("ensemble/nll" in out, "the five-minute page printed no table of the ensemble")
    return next(line.strip() for line in out.splitlines() if "ensemble/accuracy" in line)


def own_module() -> str:
    """A module of one's own, without and with the one line."""
    Path("own.py").write_text(MODULE)
    Path("one_line.py").write_text(ONE_LINE)
    out = run(sys.executable, "one_line.py")
    hold("ensemble/nll" in out, "the own module's test printed no table of the ensemble")
    return next(line.strip() for line in out.splitlines() if "ensemble/accuracy" in line)


def yaml() -> str:
    """Plan, fit, test and predict from a file."""
    Path("run.yaml").write_text(CONFIG)
    hold("T" in lpsgld("plan", "--config", "run.yaml"), "the plan says nothing")
    lpsgld("fit", "--config", "run.yaml")
    hold("ensemble/nll" in lpsgld("test", "--config", "run.yaml", "--ensemble.bank", "posterior"), "test has no table")
    lpsgld("predict", "--config", "run.yaml", "--ensemble.bank", "posterior", "--ensemble.output", "p.csv")
    rows = len(Path("p.csv").read_text().splitlines()) - 1
    hold(rows == 256, f"predict wrote {rows} rows of 256")
    return f"{rows} predictions in p.csv"


def report() -> str:
    """The page, opened."""
    lpsgld(
        "report",
        "--config",
        "run.yaml",
        "--ensemble.bank",
        "posterior",
        "--metrics",
        "logs/lightning_logs/version_0/metrics.csv",
    )
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        return "written; no browser here to open it in"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,3000"]
    place = f"file://{Path('report.html').resolve()}"
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={Path('profile').resolve()}", "--screenshot=report.png", place],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    hold(done.returncode == 0 and Path("report.png").stat().st_size > 20_000, "the browser drew no page")
    hold("CONSOLE" not in done.stderr, "the browser's console has messages")
    return f"opened; {Path('report.html').stat().st_size} bytes, console clean"


def onnx() -> str:
    """The file, and its answers."""
    said = lpsgld(
        "export", "--config", "run.yaml", "--ensemble.bank", "posterior", "--ensemble.output", "posterior.onnx"
    )
    Path("ask.py").write_text(ASK)
    difference = float(run(sys.executable, "ask.py"))
    hold(difference < 1e-5, f"onnxruntime's answers differ from PyTorch's by {difference:.2g}")
    return f"differs from PyTorch by {difference:.1g}; {said.splitlines()[0].split(': ', 1)[1]}"


def bank() -> str:
    """Inspected, verified, thinned."""
    info = json.loads(lpsgld("bank", "info", "posterior", "--json"))
    hold("0 damaged" in lpsgld("bank", "verify", "posterior"), "verify found damage")
    lost = lpsgld("bank", "thin", "posterior", "small", "--keep", "4", "--method", "nll", "--config", "run.yaml")
    kept = json.loads(lpsgld("bank", "info", "small", "--json"))["samples"]
    hold(kept == 4 and "lost" in lost, "thinning kept another number, or did not say what was lost")
    return f"{kept} of {info['samples']} samples kept; {lost.strip().splitlines()[-1].strip()}"


def main() -> None:
    """Walk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="the five-minute page")
    page = parser.parse_args().start.resolve()
    steps: dict[str, Callable[[], str]] = {
        "five minutes": lambda: five_minutes(page), "own module": own_module, "YAML": yaml, "report": report,
        "ONNX": onnx, "bank": bank,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, step in steps.items():
            start = time.perf_counter()
            said = step()
            print(f"   {name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
        os.chdir(os.path.sep)


if __name__ == "__main__":
    main()
