"""Exact laws of blocks of one element, against draws of the ops and chains of the sampler: powers of two are passed."""

from __future__ import annotations

import pytest
import torch
from helpers.backends import runs
from helpers.stats import assert_frequencies, draws_for_frequencies

from lightning_lpsgld.analysis import stationary_law, transition_matrix
from lightning_lpsgld.analysis.block_laws import block_grid, naive_block_masses, vc_block_masses
from lightning_lpsgld.ops import quantize, quantize_variance_corrected
from lightning_lpsgld.random import DrawKey, normals
from lightning_lpsgld.samplers import SGLD

FORMAT = "bfp8e3"
#: Just below powers of two, in the middle of an octave, next to zero, at the end of the range.
MEANS = torch.tensor([0.9961, -0.4995, 1.992, 0.7, 1e-4, 15.9, 7.98])


def dense(masses, rows, states):
    row, index, mass = masses
    return torch.zeros(rows, states, dtype=torch.float64).index_put_((row, index), mass, accumulate=True)


def counts_of(samples, grid):
    """How often each value of the grid occurs, per column."""
    index = torch.searchsorted(grid, samples.double())
    assert torch.equal(grid[index], samples.double()), "a value is not on the grid"
    return torch.stack([torch.bincount(column, minlength=len(grid)) for column in index.T])


@pytest.mark.parametrize("variance", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("fmt", [FORMAT, f"{FORMAT}-clamp"])
def test_laws_have_the_mean_that_was_asked_for_unless_codes_are_clamped(fmt, variance):
    number, grid = block_grid(fmt)
    inner = MEANS[:5].double()
    for masses in (vc_block_masses, naive_block_masses):
        law = dense(masses(inner, variance, number, grid), len(inner), len(grid))
        torch.testing.assert_close(law.sum(1), torch.ones(len(inner), dtype=torch.float64))
        off = ((law @ grid) - inner).abs() > 1e-9
        if number.top == "carry" or variance > 1e-5:
            assert not off[3]
            assert not (off.any() and number.top == "carry")
        else:
            assert off[:3].all()


@pytest.mark.parametrize("fmt", [FORMAT, f"{FORMAT}-clamp"])
@pytest.mark.parametrize("variance", [0.0, 2e-5, 3e-4])
def test_one_step_of_the_ops_has_the_exact_law(fmt, variance, backend):
    number, grid = block_grid(fmt)
    runs(backend, "quantize_variance_corrected", MEANS, fmt)
    draws = draws_for_frequencies(0.15, 64, 2 * len(MEANS))
    x = MEANS.repeat(draws)
    got = quantize_variance_corrected(x, variance, fmt, key=DrawKey(7), backend=backend).reshape(draws, -1)
    noisy = x + variance**0.5 * normals(x.shape, DrawKey(8))
    naive = quantize(noisy.float(), fmt, key=DrawKey(7), backend=backend).reshape(draws, -1)
    means = MEANS.double()
    for samples, masses in ((got, vc_block_masses), (naive, naive_block_masses)):
        law = dense(masses(means, variance, number, grid), len(means), len(grid))
        law = torch.where(law < 1e-12, 0.0, law)  # beyond the largest normal draw there is
        for column, row in zip(counts_of(samples, grid), law):
            pooled, chance = pooled_cells(column, row)
            assert_frequencies(pooled, chance, detect=0.15, false_fail_rate=1e-7)


def pooled_cells(counts, law):
    """At most 64 neighbouring cells of about equal mass, empty ones left out, so that few draws have power."""
    cell = (law.cumsum(0) * 60).clamp(max=60).long()
    chance = torch.zeros(61, dtype=torch.float64).index_add_(0, cell, law)
    pooled = torch.zeros(61, dtype=torch.int64).index_add_(0, cell, counts)
    keep = (chance > 1e-9) | (pooled > 0)
    return pooled[keep], chance[keep] / chance[keep].sum()


@pytest.mark.parametrize("corrected", [True, False])
def test_chains_have_the_exact_stationary_law_across_a_power_of_two(corrected):
    """N(1, 1/400), a boundary; 500 steps of many blocks."""
    lr = 0.005 / 400
    grid, law = stationary_law(
        "vc" if corrected else "naive", FORMAT, lr=lr, temperature=1.0, grad=lambda x: 400 * (x - 1)
    )
    mean = float((law * grid).sum())
    assert mean == pytest.approx(1.0, abs=1e-9)
    assert 0.4 < float(law[grid >= 1].sum()) < 0.6
    count = draws_for_frequencies(0.1, 64)
    theta = torch.nn.Parameter(torch.ones(count))
    options = {"num_data": 1, "temperature": 1.0, "weight_format": FORMAT, "seed": 5}
    opt = SGLD([theta], lr=lr, variance_corrected=corrected, **options)
    for _ in range(500):
        theta.grad = 400.0 * (theta.detach() - 1.0)
        opt.step()
    pooled, chance = pooled_cells(counts_of(theta.detach()[:, None], grid)[0], law)
    assert_frequencies(pooled, chance, detect=0.1)


def test_under_the_published_rule_no_mass_passes_a_power_of_two():
    options = {"lr": 0.005 / 400, "temperature": 1.0, "grad": lambda x: 400 * (x - 1)}
    for fmt, passes in ((FORMAT, True), (f"{FORMAT}-clamp", False)):
        _, grid = block_grid(fmt)
        matrix = transition_matrix("vc", fmt, **options)
        below, above = grid == 0.9921875, grid >= 1
        assert bool(matrix[below][:, above].sum() > 0.01) == passes


def test_refusals():
    for fmt in ("bfp8", "bfp9e3", "e4m3"):
        with pytest.raises(TypeError, match="as in 'bfp8e3'"):
            block_grid(fmt)
    with pytest.raises(TypeError, match="lattice walk needs a fixed-point format"):
        transition_matrix("lattice", FORMAT, lr=0.1, temperature=1.0, grad=lambda x: x)
