"""A short row of the study is run again and compared with its stored band; the band itself can say no."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.stats import SUITE_FALSE_FAIL_RATE

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))
STORED = json.loads((STUDY.parent / "results" / "study" / "band.json").read_text())["digits"]


def test_a_short_row_lies_in_its_stored_band():
    """Two new seeds; fails correct code once in a million times where runs are normal about their mean."""
    pytest.importorskip("sklearn")
    from band import FRESH, measure, outside, write_digits

    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        runs = [measure(Path(folder), seed) for seed in FRESH]
    assert outside(STORED["band"], runs, SUITE_FALSE_FAIL_RATE) == []


def test_the_band_is_that_of_the_stored_runs_and_names_what_leaves_it():
    """What a run would give whose noise had twice the variance, or that had not learned anything."""
    from band import FRESH, MEASURED, SEEDS, band_of, outside

    band, runs = STORED["band"], STORED["runs"]
    assert band == band_of(runs)
    assert len(runs) == len(SEEDS)
    assert not set(FRESH) & set(SEEDS)
    usual = {name: band[name]["mean"] for name in MEASURED}
    assert outside(band, [usual, usual], SUITE_FALSE_FAIL_RATE) == []
    wrong = {"t_eff": 2 * usual["t_eff"], "ensemble error": 0.9, "ensemble nll": 2.303, "last nll": 2.303}
    for name, value in wrong.items():
        (said,) = outside(band, [usual | {name: value}] * 2, SUITE_FALSE_FAIL_RATE)
        assert said.startswith(f"{name}: ")
    assert len(outside(band, [dict.fromkeys(MEASURED, float("nan"))], SUITE_FALSE_FAIL_RATE)) == len(MEASURED)
