"""Invariant: the tables of SGHMC in docs/theory.md are what the named command prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lightning_lpsgld.analysis.table import main
from lightning_lpsgld.analysis.underdamped_table import TOYS, full_precision_variance, toy_row, underdamped_rows

THEORY = Path(__file__).parents[2] / "docs" / "theory.md"

documented = pytest.mark.skipif(not THEORY.exists(), reason="needs the documentation beside the tests")


@documented
def test_documented_rows_are_the_computed_ones():
    """The row of T = 0.01 and a step of 0.02 in all three tables."""
    text = THEORY.read_text(encoding="utf-8")
    for temperature, lr, cells in underdamped_rows(step_sizes=(2e-2,), temperatures=(0.01,)):
        for pick in ("position", "distance", "velocity"):
            numbers = [getattr(cell, pick) for cell in cells.values()]
            values = " | ".join(f"{number:.4f}" for number in numbers if not math.isnan(number))
            assert f"| {temperature:g} | {lr:g} | {values} |" in text


@documented
@pytest.mark.slow
@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_documented_toys_are_the_computed_ones(toy):
    text = THEORY.read_text(encoding="utf-8")
    for name, cell in toy_row(toy).items():
        velocity = "" if math.isnan(cell.velocity) else f"{cell.velocity:.4f}"
        assert f"| {toy.name} | {name} | {cell.position:.4f} | {cell.distance:.4f} | {velocity} |" in text


def test_commands_print_their_tables(capsys):
    main(["--sghmc", "--format", "fixed5.1", "--velocity-format", "fixed5.1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| T | step |") for line in lines) == 3
    assert sum(line.startswith("| 0.1 | 0.02 |") for line in lines) == 3


def test_full_precision_has_the_published_variances():
    """Of PUBLISHED in the sampler's tests: exact integrator, right sign, three decimals."""
    for u, gamma, lr, expected in ((2, 3, 0.09, 1.031), (1, 3, 0.1, 1.017), (2, 2, 0.1, 1.053), (2, 3, 1.0, 1.438)):
        assert abs(full_precision_variance(lr, 1.0, gamma, u)[0] - expected) < 5.1e-4


def test_toys_on_a_coarse_grid_order_the_forms():
    """fixed5.1: naive is wider than VC on both targets, and no law on the grid is nearer than the rounded target."""
    for toy in TOYS:
        cells = toy_row(toy, "fixed5.1")
        assert cells["naive"].position > cells["vc"].position
        assert all(cell.distance >= cells["target rounded"].distance for cell in cells.values())
