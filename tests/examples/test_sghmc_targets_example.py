"""The example's targets, distances and files; what it finds is asserted in tests/samplers."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import sghmc_targets
from sghmc_targets import CORRELATED, FOUR_MODES, GAUSSIAN, GROUPS, MIXTURE, PUBLISHED

TARGETS = [GAUSSIAN, MIXTURE, CORRELATED, FOUR_MODES]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_gradient_is_that_of_the_potential(target):
    x = target.draw(64, 1).double().requires_grad_()
    off = x[:, None] - target.means
    potential = -torch.logsumexp(-((off @ target.precision) * off).sum(-1) / 2, dim=1)
    (expected,) = torch.autograd.grad(potential.sum(), x)
    assert torch.allclose(target.gradient(x.detach()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_projections_have_the_moments_of_the_target(target):
    """Variance by the quantile function, midpoint rule, against the covariance: the rule's error is below 1e-3."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    whole = target.cov + target.means.T @ target.means / len(target.means)
    for direction in sghmc_targets.unit_vectors(target.dim):
        found = float(target.quantile(direction)(u).square().mean())
        assert found == pytest.approx(float(direction @ whole @ direction), rel=1e-3)


def test_expected_scatter_is_one_for_a_gaussian_and_smaller_where_modes_overlap():
    assert GAUSSIAN.expected_scatter == pytest.approx(1.0, rel=1e-6)
    assert CORRELATED.expected_scatter == pytest.approx(1.0, rel=1e-6)
    assert 0.85 < MIXTURE.expected_scatter < 1.0
    # The four modes are two copies of the mixture, turned: the same distance to the nearest centre per axis.
    assert FOUR_MODES.expected_scatter == pytest.approx(MIXTURE.expected_scatter, rel=1e-4)


def test_projected_counts_fall_into_the_cell_of_their_point():
    x = torch.tensor([[0.0], [0.0625]]).repeat(GROUPS, 1)  # two chains a group, 0 and one gap
    counts = sghmc_targets.histograms(x, torch.ones(1, 1, dtype=torch.float64), 1 / 16)
    assert counts.shape == (GROUPS, 1, 257)
    assert torch.equal(counts[:, 0, 128:130], torch.ones(GROUPS, 2, dtype=torch.float64))
    assert counts.sum() == len(x)


def test_step_size_for_a_given_noise_on_the_grid():
    for goal in (0.1, 2.45, 80.0):
        lr = sghmc_targets.lr_for(goal, PUBLISHED[2.0])
        setting = sghmc_targets.Setting("", "fixed8.4", lr, lr, 2.0)
        assert sghmc_targets.position_noise(setting) == pytest.approx(goal, rel=1e-6)


def test_one_part_writes_its_rows_with_errors_and_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sghmc_targets, "CASES", [(GAUSSIAN, PUBLISHED[2.0])])
    monkeypatch.setattr(sghmc_targets, "BURN_IN", 0.2)
    options = ["--part", "published", "--chains", "32", "--duration", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sghmc_targets.py", *options])
    sghmc_targets.main()
    results = json.loads((tmp_path / "sghmc_targets.json").read_text())
    rows = results["published"]
    assert len(rows) == 16
    assert {row["drift"] for row in rows} == {"", "corrected", "paper"}
    assert all(row["w2"] > 0 and row["w2_se"] > 0 and row["l2_se"] > 0 for row in rows)
    assert {"chains", "seed", "torch", "machine", "cores"} <= set(results["published, run"])
    with (tmp_path / "sghmc_targets.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
