"""Invariant: the tables of docs/theory.md are what the named command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lpsgld.analysis.table import main, rows

THEORY = Path(__file__).parents[2] / "docs" / "theory.md"


@pytest.mark.skipif(not THEORY.exists(), reason="needs the documentation beside the tests")
def test_documented_rows_are_the_computed_ones():
    documented = THEORY.read_text(encoding="utf-8")
    for temperature, lr, cells in rows(step_sizes=(2e-3,)):
        for pick in (0, 1):
            values = " | ".join(f"{value[pick]:.4f}" for value in cells.values())
            assert f"| {temperature:g} | {lr:g} | {values} |" in documented


def test_command_prints_two_tables(capsys):
    main(["--format", "fixed5.1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| T | step |") for line in lines) == 2
    assert sum(line.startswith("| 0.1 | 0.02 |") for line in lines) == 2
