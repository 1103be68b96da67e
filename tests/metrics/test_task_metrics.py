"""Selective risk, class-wise and equal-mass calibration, temperature scaling, diversity, soft targets."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.toy_metric import TopTwo, top_two
from scipy import optimize, special
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import binary_calibration_error

from lightning_lpsgld.metrics import (
    AURC,
    Accuracy,
    AdaptiveCalibrationError,
    Ambiguity,
    BrierScore,
    CalibratedNLL,
    CalibrationError,
    CategoricalNLL,
    ClasswiseCalibrationError,
    CoverageAtRisk,
    Disagreement,
    adaptive_calibration_error,
    area_under_risk_coverage,
    brier_score,
    calibrated_nll,
    calibration_error,
    categorical_nll,
    classwise_calibration_error,
    coverage_at_risk,
    risk_coverage,
    votes_of,
)

METRICS = {
    "aurc": AURC,
    "adaptive": AdaptiveCalibrationError,
    "coverage": CoverageAtRisk,
    "classwise": lambda: ClasswiseCalibrationError(4),
    "calibrated": CalibratedNLL,
    "accuracy": Accuracy,
    "toy": TopTwo,
}


def predictions(count=200, classes=4, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.distributions.Categorical(logits=logits / 1.7).sample()


def extremes():
    """Certain and right, certain and wrong, uniform, all of one class."""
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.25, 0.25, 0.25, 0.25], [1e-40, 1.0, 0, 0]]).repeat(5, 1)
    return rows, torch.zeros(20, dtype=torch.long)


CASES = {"random": predictions(), "sure": predictions(scale=200.0), "extreme": extremes(), "one": predictions(1)}


# ----------------------------------------------------------------------------------------------------------- the order


def naive_curve(probabilities, targets):
    """Mean over every way to order ties, by the formula of each prefix; loops in Python."""
    rows = sorted(
        zip(probabilities.max(1).values.tolist(), (probabilities.argmax(1) == targets).tolist()), reverse=True
    )
    errors, risks = [], []
    for confidence, _ in rows:
        tied = [1 - ok for other, ok in rows if other == confidence]
        errors.append(sum(tied) / len(tied))
        risks.append(sum(errors) / len(errors))
    return risks


@pytest.mark.parametrize("case", CASES)
def test_risk_coverage_is_the_naive_one(case):
    risks = naive_curve(*CASES[case])
    coverage, ours = risk_coverage(*CASES[case])
    np.testing.assert_allclose(ours.numpy(), risks, atol=1e-12)
    np.testing.assert_allclose(coverage.numpy(), np.arange(1, len(risks) + 1) / len(risks), atol=1e-15)
    assert area_under_risk_coverage(*CASES[case]).item() == pytest.approx(sum(risks) / len(risks), abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("risk", [0.0, 0.05, 0.3, 1.0])
def test_coverage_at_risk_is_that_of_the_best_threshold(case, risk):
    probabilities, targets = CASES[case]
    confidence, wrong = probabilities.max(1).values, probabilities.argmax(1) != targets
    kept = [confidence >= threshold for threshold in confidence.unique()]
    allowed = [part.double().mean().item() for part in kept if wrong[part].double().mean() <= risk]
    assert coverage_at_risk(probabilities, targets, risk).item() == pytest.approx(max(allowed, default=0.0))


def test_the_order_of_data_does_not_matter():
    probabilities, targets = (torch.cat([part, part[:60]]) for part in extremes())
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3))
    for function in (area_under_risk_coverage, coverage_at_risk, adaptive_calibration_error):
        a, b = function(probabilities, targets), function(probabilities[order], targets[order])
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bins", [1, 7, 15])
def test_equal_mass_bins(case, bins):
    probabilities, targets = CASES[case]
    confidence = probabilities.max(1).values.double()
    correct = (probabilities.argmax(1) == targets).double()
    tied = torch.stack([correct[confidence == c].mean() for c in confidence])
    rows = sorted(zip(confidence.tolist(), tied.tolist()), reverse=True)
    count, bins = len(rows), min(bins, len(rows))
    ends = [-(-k * count // bins) for k in range(bins + 1)]  # bin k holds the ranks with floor(rank bins / count) = k
    gaps = [abs(sum(c - a for c, a in rows[start:end])) for start, end in itertools.pairwise(ends)]
    assert adaptive_calibration_error(probabilities, targets, bins).item() == pytest.approx(
        sum(gaps) / count, abs=1e-12
    )


# --------------------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("bins", [3, 15])
def test_class_wise_error_is_the_mean_of_torchmetrics_binary_ones(bins):
    """Where no probability lies on an edge; torchmetrics sums in float32."""
    probabilities, targets = predictions(1000)
    theirs = [binary_calibration_error(probabilities[:, c], (targets == c).long(), bins, "l1") for c in range(4)]
    ours = classwise_calibration_error(probabilities, targets, bins).item()
    assert ours == pytest.approx(float(sum(theirs)) / 4, abs=1e-6)


def test_class_wise_error_at_the_extremes():
    """Five each: sure of 0 (right), sure of 1 (wrong), uniform, sure of 1: by hand, in one bin per class."""
    probabilities, targets = extremes()
    by_hand = (abs(1 + 0 + 0.25 + 0 - 4) + abs(0 + 1 + 0.25 + 1) + 0.25 + 0.25) / 4 / 4
    assert classwise_calibration_error(probabilities, targets, 1).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("soft", [False, True])
def test_calibrated_nll_is_scipys_minimum(case, soft):
    probabilities, targets = CASES[case]
    if soft:
        targets = 0.9 * torch.nn.functional.one_hot(targets, 4).double() + 0.1 / 4
    logs = np.log(np.maximum(probabilities.double().numpy(), 2.0**-126))
    weights = targets.numpy() if soft else np.eye(4)[targets.numpy()]

    def nll(log_beta):
        scaled = np.exp(log_beta) * logs
        return float((special.logsumexp(scaled, axis=1) - (weights * scaled).sum(1)).mean())

    best = optimize.minimize_scalar(nll, bounds=(-math.log(8), math.log(8)), method="bounded", options={"xatol": 1e-10})
    floor = min(best.fun, nll(math.log(8)), nll(-math.log(8)))
    ours, temperature = calibrated_nll(probabilities, targets)
    assert ours.item() == pytest.approx(floor, abs=1e-6)
    assert nll(-math.log(temperature.item())) == pytest.approx(floor, abs=1e-6)
    assert ours <= categorical_nll(probabilities, targets) + 1e-9


# -------------------------------------------------------------------------------------------------------- soft targets


@pytest.mark.parametrize("function", [categorical_nll, brier_score, calibration_error, adaptive_calibration_error])
def test_one_hot_targets_are_class_indices(function):
    probabilities, targets = predictions()
    hot = torch.nn.functional.one_hot(targets, 4).double()
    assert function(probabilities, hot).item() == pytest.approx(function(probabilities, targets).item(), rel=1e-12)


def test_soft_targets_are_expectations_over_labels():
    """NLL and calibration are means over labels drawn from the target; the Brier score less the target's own spread."""
    probabilities, _ = predictions(50)
    soft = predictions(50, seed=9)[0]
    nll = sum(soft[:, c] * -probabilities[:, c].log() for c in range(4)).mean()
    assert categorical_nll(probabilities, soft).item() == pytest.approx(nll.item(), rel=1e-12)
    brier = sum((probabilities - torch.eye(4)[c]).square().sum(1) * soft[:, c] for c in range(4))
    spread = 1 - soft.square().sum(1)
    assert brier_score(probabilities, soft).item() == pytest.approx((brier - spread).mean().item(), rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- diversity


def test_disagreement_counts_pairs():
    members = torch.stack([predictions(30, seed=seed)[0] for seed in range(5)])
    predicted = members.argmax(-1)
    pairs = [(predicted[i] != predicted[j]).double().mean() for i in range(5) for j in range(5) if i != j]
    metric = Disagreement()
    metric.update(members)
    assert metric.compute().item() == pytest.approx(float(sum(pairs)) / 20)
    assert torch.equal(votes_of(members).sum(1), torch.full((30,), 5))
    metric.reset()
    metric.update(members[:1])
    assert metric.compute() == 0


def test_ambiguity_is_what_averaging_gains():
    members, targets = torch.stack([predictions(30, seed=seed)[0] for seed in range(5)]), predictions(30)[1]
    gain = sum(categorical_nll(member, targets) for member in members) / 5 - categorical_nll(members.mean(0), targets)
    metric = Ambiguity()
    metric.update(members, targets)
    assert metric.compute().item() == pytest.approx(gain.item(), rel=1e-12)
    metric.reset()
    metric.update(members[:1].repeat(3, 1, 1), targets)
    assert metric.compute().item() == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------- the shells


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("case", ["random", "extreme"])
def test_a_metric_is_its_function_over_all_batches_and_ranks(name, case):
    """Sums of two ranks' states, or their concatenation, give the value of all data at once."""
    probabilities, targets = CASES[case]
    functions = {
        "aurc": area_under_risk_coverage,
        "adaptive": adaptive_calibration_error,
        "coverage": coverage_at_risk,
        "classwise": classwise_calibration_error,
        "calibrated": lambda p, t: calibrated_nll(p, t)[0],
        "toy": lambda p, t: top_two(p, t).mean(),
    }
    whole, ranks = METRICS[name](), [METRICS[name](), METRICS[name]()]
    whole.update(probabilities, targets)
    ranks[0].update(probabilities[:3], targets[:3])
    ranks[0].update(probabilities[3:3], targets[3:3])
    ranks[1].update(probabilities[3:], targets[3:])
    merged = METRICS[name]()
    for state, reduction in merged._reductions.items():
        parts = [getattr(rank, state) for rank in ranks]
        if isinstance(parts[0], list):
            setattr(merged, state, [torch.cat([torch.cat(part) for part in parts])])
        else:
            setattr(merged, state, reduction(torch.stack(parts)))
    merged._update_count = 1
    assert merged.compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)
    if name in functions:
        assert whole.compute().item() == pytest.approx(functions[name](probabilities, targets).item(), abs=1e-12)


def test_accuracy_is_torchmetrics():
    probabilities, targets = predictions(500)
    ours, theirs = Accuracy(), MulticlassAccuracy(4, average="micro")
    ours.update(probabilities, targets)
    theirs.update(probabilities, targets)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_everything_ignored_has_no_score(name):
    metric = METRICS[name]()
    metric.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert math.isnan(metric.compute().item())


@pytest.mark.parametrize("build", [*METRICS.values(), BrierScore, CalibrationError, CategoricalNLL])
def test_metrics_plot(build):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    metric = build()
    metric.update(*predictions())
    figure, axes = metric.plot()
    assert axes is not None
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveCalibrationError(0), "`num_bins` must be an int >= 1, got 0"),
        (lambda: ClasswiseCalibrationError(0), "`num_classes` must be an int >= 1, got 0"),
        (lambda: CoverageAtRisk(risk=5), r"`risk` must lie in \[0, 1\], got 5"),
        (lambda: brier_score(torch.ones(3, 2), torch.zeros(3, 3)), r"shape \(n, classes\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
