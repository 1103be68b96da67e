"""A hundred million weights: what ``storage="codes"`` promises, measured by the benchmark; minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "storage.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_and_bits_of_a_hundred_million_weights(tmp_path):
    """Time is measured too, and not asserted: it is a ratio of two processes on whatever else the machine does."""
    file = tmp_path / "storage.json"
    subprocess.run([sys.executable, str(BENCHMARK), f"--json={file}"], check=True)
    report = json.loads(file.read_text())
    assert report["rows"]["codes"]["parameters"] >= 100_000_000
    bars = {bar["what"]: bar for bar in report["bars"] if "time" not in bar["what"]}
    assert len(bars) == 3
    assert all(bar["met"] for bar in bars.values()), bars
