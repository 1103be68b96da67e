"""Likelihood, Brier score and calibration against plain Python with exact fractions, and against torchmetrics."""

import math
from fractions import Fraction

import pytest
import torch
from helpers.toy_metric import TopTwo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_lpsgld.metrics import (
    BrierScore,
    CalibrationError,
    CategoricalNLL,
    bin_sums,
    brier_score,
    calibration_error,
    categorical_nll,
    entropy,
    reliability_bins,
)

VARIANTS = [(15, "standard"), (10, "standard"), (1, "standard"), (15, "paper")]
METRICS = [CategoricalNLL, BrierScore, CalibrationError, lambda: CalibrationError(variant="paper"), TopTwo]


def exact_bins(probabilities, targets, num_bins, variant):
    """Count, sum of confidences, hits per bin; plain Python, one prediction at a time, edges nearest to k/M."""
    bins = 9 if variant == "paper" else num_bins
    table = {}
    for row, target in zip(probabilities.tolist(), targets.tolist()):
        confidence = max(row)
        hit = row.index(confidence) == target
        k = 0
        while k <= bins and Fraction(confidence) > Fraction(k / bins):
            k += 1
        if variant == "standard":
            k = min(max(k, 1), bins)  # 0 belongs to the first bin, more than 1 to the last
        if k > bins:
            continue  # "paper": more than 1 is dropped
        count, total, hits = table.get(k, (0, Fraction(0), 0))
        table[k] = (count + 1, total + Fraction(confidence), hits + hit)
    return table


def exact_ece(probabilities, targets, num_bins, variant):
    bins = exact_bins(probabilities, targets, num_bins, variant)
    return sum(abs(total - hits) for _, total, hits in bins.values()) / Fraction(len(targets))


def predictions(n, classes=4, seed=0, sharp=3.0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (torch.randn(n, classes, generator=generator) * sharp).softmax(1)
    return probabilities, torch.randint(classes, (n,), generator=generator)


def awkward_predictions():
    """Confidences on every edge of 9, 10 and 15 bins, beside them, at 0, at 1 and just above."""
    edges = sorted({Fraction(k, m) for m in (9, 10, 15) for k in range(m + 1)})
    confidences = [float(edge) for edge in edges]
    near = torch.tensor(confidences, dtype=torch.float32)
    up, down = torch.full_like(near, 2.0), torch.full_like(near, -1.0)
    confidence = torch.cat([near, near.nextafter(up), near.nextafter(down).clamp(min=0)])
    probabilities = torch.stack([confidence, torch.zeros_like(confidence)], dim=1)
    return probabilities, torch.arange(len(confidence)) % 2


def rounding_bound(n):
    """Relative error of a float64 sum of n non-negative terms, each itself rounded a few times."""
    return (n + 8) * 2.0**-52


@pytest.mark.parametrize(("num_bins", "variant"), VARIANTS)
@pytest.mark.parametrize("data", [predictions(500), predictions(50, sharp=0.1), awkward_predictions()])
def test_calibration_error_is_the_exact_one(data, num_bins, variant):
    wanted = exact_ece(*data, num_bins, variant)
    got = calibration_error(*data, num_bins=num_bins, variant=variant)
    assert abs(Fraction(got.item()) - wanted) <= Fraction(rounding_bound(len(data[1])))


@given(st.lists(st.tuples(st.floats(0.0, 1.0, width=32), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_confidence_falls_into_the_exact_bin(rows):
    """Counts, confidences and hits of each bin, for any float32 confidences."""
    confidence = torch.tensor([row[0] for row in rows])
    probabilities = torch.stack([confidence, torch.full_like(confidence, -1.0)], dim=1)
    targets = torch.tensor([0 if row[1] else 1 for row in rows])
    for num_bins, variant in VARIANTS:
        sums, total = bin_sums(probabilities, targets, num_bins, variant)
        first = 0 if variant == "paper" else 1
        table = exact_bins(probabilities, targets, num_bins, variant)
        wanted = [table.get(k + first, (0, Fraction(0), 0)) for k in range(len(sums))]
        assert total == len(rows)
        assert [(c, h) for c, _, h in wanted] == [(int(c), int(h)) for c, _, h in sums.tolist()]
        off = [abs(exact - Fraction(got)) for (_, exact, _), got in zip(wanted, sums[:, 1].tolist())]
        assert max(off) <= len(rows) * Fraction(2) ** -50


def test_confidence_one_belongs_to_the_last_bin():
    """Three sure predictions, one wrong, and an unsure one of the last bin: torchmetrics would split them."""
    probabilities = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.96, 0.04]])
    targets = torch.tensor([0, 0, 1, 0])
    sums, _ = bin_sums(probabilities, targets)
    assert sums[-1, 0] == 4
    assert sums.sum(0)[0] == 4
    assert calibration_error(probabilities, targets).item() == pytest.approx(abs(3.96 - 3) / 4, rel=1e-6)


def test_the_paper_variant_has_nine_bins_and_drops_what_exceeds_one():
    above = torch.tensor(1.0).nextafter(torch.tensor(2.0)).item()
    probabilities = torch.tensor([[above, 0.0], [0.0, 0.0], [1.0 / 9.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    targets = torch.tensor([1, 1, 1, 0])
    sums, total = bin_sums(probabilities, targets, variant="paper")
    assert sums.shape == (10, 3)
    assert sums[:, 0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0, 0]
    assert total == 4
    assert calibration_error(probabilities, targets, variant="paper").item() == pytest.approx((0 + 1 / 9 + 0.5) / 4)


@pytest.mark.parametrize("num_bins", [9, 10, 15])
def test_agrees_with_torchmetrics_away_from_the_edges(num_bins):
    """torchmetrics sums in float32: of confidences in steps of 2^-8 that is exact, so only its last divisions round."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(257, (3000,), generator=generator).double() / 256
    on_an_edge = (first.maximum(1 - first) * num_bins).frac() == 0
    first = first[~on_an_edge].float()
    probabilities, targets = torch.stack([first, 1 - first], dim=1), torch.randint(2, first.shape, generator=generator)
    assert len(targets) > 2500
    theirs = multiclass_calibration_error(probabilities, targets, num_classes=2, n_bins=num_bins, norm="l1").item()
    ours = calibration_error(probabilities, targets, num_bins).item()
    assert abs(ours - theirs) <= (num_bins + 8) * 2.0**-24


def test_paper_and_nine_standard_bins_agree_on_ordinary_predictions():
    probabilities, targets = predictions(3000, seed=2)
    assert calibration_error(probabilities, targets, variant="paper") == calibration_error(probabilities, targets, 9)


def test_brier_score_is_the_exact_one():
    probabilities, targets = predictions(300, seed=3)
    rows = zip(probabilities.tolist(), targets.tolist())
    exact = sum((Fraction(p) - (k == y)) ** 2 for row, y in rows for k, p in enumerate(row)) / len(targets)
    assert abs(Fraction(brier_score(probabilities, targets).item()) - exact) <= exact * Fraction(rounding_bound(1200))


def test_brier_score_has_its_convention():
    """Summed over classes: 2 for a sure error, 0 for a sure hit, 1 - 1/K for a uniform guess."""
    sure = torch.tensor([[1.0, 0.0, 0.0]])
    assert brier_score(sure, torch.tensor([0])) == 0
    assert brier_score(sure, torch.tensor([2])) == 2
    assert brier_score(torch.full((1, 4), 0.25), torch.tensor([1])) == 0.75


def test_nll_is_the_mean_log_probability():
    probabilities, targets = predictions(400, seed=4)
    terms = [-math.log(row[y]) for row, y in zip(probabilities.tolist(), targets.tolist())]
    mean = math.fsum(terms) / len(terms)
    assert categorical_nll(probabilities, targets).item() == pytest.approx(mean, rel=rounding_bound(400))


def test_nll_of_an_impossible_target_is_bounded():
    assert categorical_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == pytest.approx(126 * math.log(2))


def test_entropy_of_certainty_and_of_ignorance():
    assert entropy(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert entropy(torch.full((8,), 0.125)).item() == pytest.approx(math.log(8), rel=1e-15)


@pytest.mark.parametrize("build", METRICS)
def test_a_metric_is_its_function_over_all_batches(build):
    """Probabilities are multiples of 2^-8, so every sum is exact and the order of batches cannot matter."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(257, (200, 1), generator=generator) / 256
    probabilities = torch.cat([first, 1 - first], dim=1)
    targets = torch.randint(2, (200,), generator=generator)
    whole, parts = build(), build()
    whole.update(probabilities, targets)
    for start, end in ((0, 7), (7, 7), (7, 150), (150, 200)):
        parts.update(probabilities[start:end], targets[start:end])
    if build is CategoricalNLL:  # logarithms are not dyadic
        assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=rounding_bound(200))
    else:
        assert torch.equal(parts.compute(), whole.compute())
    functions = {CategoricalNLL: categorical_nll, BrierScore: brier_score, CalibrationError: calibration_error}
    if build in functions:
        assert torch.equal(whole.compute(), functions[build](probabilities, targets))


@pytest.mark.parametrize("build", METRICS)
def test_states_of_ranks_add_up(build):
    """Invariant: every state is reduced by summation, and the sum of two ranks' states is the state of all."""
    probabilities, targets = predictions(64, classes=2, seed=6)
    probabilities = (probabilities * 256).round() / 256
    ranks = [build(), build()]
    whole = build()
    whole.update(probabilities, targets)
    ranks[0].update(probabilities[:50], targets[:50])
    ranks[1].update(probabilities[50:], targets[50:])
    for name, reduction in whole._reductions.items():
        stacked = torch.stack([getattr(rank, name) for rank in ranks])
        assert torch.equal(reduction(stacked), stacked.sum(0))
        assert stacked.dtype == torch.float64
        torch.testing.assert_close(stacked.sum(0), getattr(whole, name), rtol=rounding_bound(64), atol=0)


@pytest.mark.parametrize("build", METRICS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_no_predictions_have_no_score(build):
    assert math.isnan(build().compute().item())


@pytest.mark.parametrize("build", METRICS)
def test_sums_stay_float64_when_a_model_is_cast(build):
    holder = nn.Sequential(build()).half()
    holder[0].update(*predictions(10))
    assert holder[0].compute().dtype == torch.float64


def test_reliability_diagram():
    """The bins tile (0, 1], hold everything, and their weighted gap is the calibration error."""
    data = predictions(800, seed=7)
    diagram = reliability_bins(*data, num_bins=12)
    assert diagram.count.sum() == 800
    torch.testing.assert_close(diagram.lower[1:], diagram.upper[:-1], rtol=0, atol=2.0**-52)
    assert diagram.error.item() == pytest.approx(calibration_error(*data, num_bins=12).item(), rel=rounding_bound(800))
    for k in range(12):
        inside = (data[0].amax(1).double() > k / 12) & (data[0].amax(1).double() <= (k + 1) / 12)
        assert diagram.count[k] == inside.sum()
        if inside.any():
            hits = (data[0].argmax(1) == data[1])[inside].double().mean()
            assert diagram.accuracy[k].item() == pytest.approx(hits.item(), rel=1e-15)
        else:
            assert diagram.accuracy[k].isnan()


def test_reliability_of_a_metric_is_that_of_the_function():
    data = predictions(100, seed=8)
    metric = CalibrationError(num_bins=10)
    metric.update(*data)
    assert torch.equal(metric.reliability().count, reliability_bins(*data, num_bins=10).count)
    paper = CalibrationError(variant="paper")
    paper.update(*data)
    assert torch.equal(paper.reliability().count, reliability_bins(*data, num_bins=9).count)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: brier_score(torch.ones(3), torch.zeros(3).long()), ValueError, r"shape \(n, classes\)"),
        (lambda: brier_score(torch.ones(3, 2), torch.zeros(2).long()), ValueError, r"got \(3, 2\) and \(2,\)"),
        (lambda: brier_score(torch.ones(3, 2), torch.zeros(3)), TypeError, "must be floating and `targets` integer"),
        (lambda: CalibrationError(num_bins=0), ValueError, "`num_bins` must be an int >= 1, got 0"),
        (lambda: CalibrationError(variant="mine"), ValueError, "`variant` must be 'standard' or 'paper', got 'mine'"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
