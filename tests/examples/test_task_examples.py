"""Examples of other tasks run in small, and what is committed is what they say."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import language_model_adapters as adapters
import regression
import segmentation

EXAMPLES = Path(segmentation.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_regression_in_small(tmp_path, capsys):
    """Three rows with every column, sizes as asked, and a picture; the first weights are no worse than the data."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    rows = regression.diabetes(epochs=6, samples=3)
    assert [row["size"] for row in rows.values()] == [1, 1, 3]
    ensemble = rows["8-bit SGLD, ensemble"]
    assert all(math.isfinite(ensemble[name]) for name in regression.COLUMNS)
    assert ensemble["rmse"] < 1.1  # 1 is the deviation of the targets
    assert ensemble["bytes"] < 0.3 * rows["SGD, float32, last weights"]["bytes"]
    regression.print_table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 4
    found = regression.curve(tmp_path / "curve.png", epochs=4, samples=2)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert all(value > 0 for value in found.values())


def test_curve_leaves_a_gap():
    x, y = regression.curve_data().tensors
    assert not bool(((x > 0.0) & (x < 0.8)).any())
    assert len(x) == len(y) == 400


def test_segmentation_in_small(capsys):
    rows = segmentation.compare(epochs=2, images=32, samples=2)
    assert [row["size"] for row in rows.values()] == [1, 1, 2]
    assert all(math.isfinite(rows["8-bit SGLD, ensemble"][name]) for name in segmentation.COLUMNS)
    segmentation.print_table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_shapes_have_three_classes_and_a_void_border():
    images, targets = segmentation.shapes(20, seed=3).tensors
    assert images.shape == (20, 1, 20, 20)
    assert set(targets.unique().tolist()) == {0, 1, 2, segmentation.VOID}
    border = torch.ones(20, 20, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert bool((targets[:, border] == segmentation.VOID).all())
    assert not bool((targets[:, ~border] == segmentation.VOID).any())


def test_adapters_of_a_language_model_in_small(capsys):
    """A small random transformer; of each sample only adapters and head are stored anew, and in 8 bits."""
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    rows = adapters.compare(per_library=12, held_out=12, epochs=2, samples=2, random_weights=True)
    assert [row["size"] for row in rows.values()] == [1, 1, 2]
    assert all(math.isfinite(rows["8-bit SGLD, ensemble"][name]) for name in adapters.COLUMNS)
    trained = 2 * 2 * 2 * 4 * 32 + 4 * 32 + 4  # two layers, query and value, two factors of rank 4; and the head
    plain, _, ensemble = rows.values()
    assert plain["bytes"] == 4 * trained
    assert trained < ensemble["bytes"] < 1.15 * trained
    adapters.print_table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_texts_are_different_sentences_without_names_of_libraries():
    pytest.importorskip("sklearn")
    train, test = adapters.corpus(40, 20)
    assert len({text for text, _ in train + test}) == 4 * 60
    assert [sum(label == number for _, label in train) for number in range(4)] == [40] * 4
    assert not any(re.search(r"(?i)numpy|scipy|sklearn|torch\b|tensor\b|ndarray", text) for text, _ in train + test)
    assert adapters.corpus(40, 20) == (train, test)


@pytest.mark.parametrize(
    ("name", "share"), [("regression", 0.27), ("segmentation", 0.27), ("language_model_adapters", 0.29)]
)
def test_committed_numbers_show_the_ensemble_ahead(name, share):
    """The average has a smaller NLL than one of its samples; adapters have an exponent every four weights."""
    rows = json.loads((EXAMPLES / "results" / f"{name}.json").read_text())
    sgd, single, ensemble = rows.values()
    assert ensemble["nll"] < single["nll"]
    assert ensemble["size"] >= 10
    assert ensemble["bytes"] <= share * sgd["bytes"]
    if name == "language_model_adapters":
        assert ensemble["nll"] < sgd["nll"]
        assert ensemble["bytes"] <= 60_000
