"""A short row of the study is run again and compared with its stored band; the band itself can say no."""

import json
import os
import sys
from pathlib import Path

import pytest
from helpers.stats import SUITE_FALSE_FAIL_RATE

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))
STORED = json.loads((STUDY.parent / "results" / "study" / "band.json").read_text())
#: Fashion-MNIST's archives, by default where Debian's package puts them.
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@pytest.mark.parametrize("data", ["digits", pytest.param("fashion-mnist", marks=pytest.mark.slow)])
def test_a_short_row_lies_in_its_stored_band(data, tmp_path):
    """Two new seeds; fails correct code once in a million times where runs are normal about their mean."""
    from band import FRESH, measure, outside, write_digits

    if data == "digits":
        pytest.importorskip("sklearn")
        write_digits(tmp_path)
    elif not FASHION.exists():
        pytest.skip("Fashion-MNIST is not here; set FASHION_MNIST to the folder of its archives")
    runs = [measure(tmp_path if data == "digits" else FASHION, seed) for seed in FRESH]
    assert outside(STORED[data]["band"], runs, SUITE_FALSE_FAIL_RATE) == []


@pytest.mark.parametrize("data", ["digits", "fashion-mnist"])
def test_the_band_is_that_of_the_stored_runs_and_names_what_leaves_it(data):
    """What a run would give whose noise had twice the variance, or that had not learned anything."""
    from band import FRESH, MEASURED, SEEDS, band_of, outside

    band, runs = STORED[data]["band"], STORED[data]["runs"]
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
