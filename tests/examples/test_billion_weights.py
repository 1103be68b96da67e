"""The example of a billion weights, with fewer: it builds codes, samples them, keeps a sample and says what it took."""

import json
import sys
from pathlib import Path

import torch

from lightning_lpsgld import SampleBank

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_it_samples_and_says_what_it_took(tmp_path, monkeypatch, capsys):
    import billion_weights

    torch.manual_seed(0)
    start = tmp_path / "start.pt"
    torch.save(billion_weights.ByteModel(2, 64).state_dict(), start)
    file, bank = tmp_path / "figures.json", tmp_path / "bank"
    arguments = ["--layers=2", "--width=64", "--steps=3", f"--weights={start}", f"--bank={bank}", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["billion_weights.py", *arguments])
    billion_weights.main()
    figures = json.loads(file.read_text())
    count = sum(p.numel() for p in billion_weights.ByteModel(2, 64).parameters())
    assert figures["weights"] == count
    assert count < figures["stored_bytes"] < 1.1 * count, "a byte a weight, and exponents"
    assert (figures["sgd_bytes"], figures["adamw_bytes"]) == (8 * count, 16 * count)
    assert figures["peak_bytes"] > 0
    assert len(figures["losses"]) == 3
    assert figures["machine"]["torch"] == torch.__version__
    assert "float32 AdamW, computed" in capsys.readouterr().out
    (kept,) = SampleBank.open(bank)
    assert kept.step == 3


def test_the_recorded_run_stayed_within_four_gigabytes():
    figures = json.loads((EXAMPLES / "results" / "billion_weights.json").read_text())
    assert figures["weights"] >= 1_000_000_000
    assert figures["peak_bytes"] < 4e9
    assert figures["peak_bytes"] < figures["sgd_bytes"] / 2 < figures["adamw_bytes"] / 4 + 1
