"""HALP for linear models: kernels against numpy, convergence to exact solutions, and the estimators' manners."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_lpsgld.linear import HALPClassifier, HALPRegressor, fallback, kernels
from lightning_lpsgld.linear.solver import pack_rows, solve, sweep_order
from lightning_lpsgld.linear.state import LinearState, empty_rows
from lightning_lpsgld.random import philox4x32

ENGINES = [pytest.param(False, id="numpy")]
if kernels.unavailable() is None:
    ENGINES.append(pytest.param(True, id="compiled"))


def needs_kernels():
    if kernels.unavailable() is not None:
        pytest.skip(f"needs the compiled linear kernels: {kernels.unavailable()}")


def problem(n=3000, features=70, loss="squared", seed=0):
    """Features on the 8-bit grid with spreads from 0.3 to 1, noisy targets."""
    draw = np.random.default_rng(seed)
    x = np.clip(np.rint(30 * draw.standard_normal((n, features)) * np.linspace(0.3, 1, features)), -127, 127)
    y = x @ draw.standard_normal(features) / 30 + 0.5 * draw.standard_normal(n)
    y = np.where(y > 0, 1.0, -1.0) if loss == "logistic" else y
    return x.astype(np.int8), y.astype(np.float32)


def state_of(loss, low, alpha=1e-3, **options):
    x, y = problem(loss=loss, **options)
    packed, _ = pack_rows(x, low=low, intercept=True)
    return LinearState(packed, y, loss, np.full(packed.shape[1], alpha), unit=1 / 127 if low else 1.0)


def exact_gradient(state):
    x = state.x.astype(np.float64) * state.unit
    r = fallback.derivative(state.loss, x @ state.centre, state.y)
    return x.T @ r / len(x) + state.penalty * state.centre


@pytest.mark.parametrize("compiled", ENGINES)
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_eight_bits_reach_any_accuracy_at_a_linear_rate(loss, compiled):
    """The gradient in float64 at the returned centre, not the solver's account of it, falls to 1e-10 of the first."""
    state = state_of(loss, low=True)
    report = solve(state, batch=32, max_iter=120, tol=1e-11, compiled=compiled)
    assert report.converged
    assert np.linalg.norm(exact_gradient(state)) < 1e-10 * report.gradient_norm[0]
    logs = np.log(report.gradient_norm)
    half = len(logs) // 2
    early, late = (logs[half] - logs[5]) / (half - 5), (logs[-1] - logs[half]) / (len(logs) - 1 - half)
    assert late < 0.6 * early < 0  # a line: the second half falls about as fast


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_rates_of_eight_bits_and_float32_are_the_same(loss):
    def epochs(low):
        report = solve(state_of(loss, low=low), batch=32, max_iter=120, tol=1e-4)
        assert report.converged
        return len(report.objective)

    assert epochs(True) <= 1.25 * epochs(False) + 1


def test_too_tight_a_box_slows_and_is_counted():
    state = state_of("squared", low=True)
    report = solve(state, batch=32, max_iter=3, tol=0.0, mu=1e3)
    assert sum(report.saturated) > 0
    assert report.gradient_norm[-1] < report.gradient_norm[0]


# ----------------------------------------------------------------------------------------- kernels against numpy


@pytest.mark.parametrize("n", [1, 3, 64, 257, 1000])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("low", [True, False], ids=["int8", "float32"])
def test_outer_pass_equals_numpy(n, loss, low):
    needs_kernels()
    states = [state_of(loss, low, n=n, features=130) for _ in range(2)]
    draw = np.random.default_rng(1)
    z = draw.integers(-127, 128, states[0].offset.shape) if low else draw.standard_normal(states[0].offset.shape)
    for state, engine, threads in zip(states, (kernels, fallback), (2, 1)):
        state.gap = 1e-3 if low else 1.0
        state.offset[:] = z
        engine.outer(state, threads)
    ours, numpys = states
    np.testing.assert_allclose(ours.margin, numpys.margin, rtol=1e-4, atol=1e-4 * np.abs(numpys.margin).max())
    np.testing.assert_allclose(ours.full, numpys.full, atol=2e-4 * np.abs(numpys.full).max())
    np.testing.assert_allclose(ours.loss_sum, numpys.loss_sum, rtol=1e-4)
    if low:  # `full` is exactly what it claims to hold
        np.testing.assert_allclose(
            ours.full, ours.unit * (ours.residual @ ours.x.astype(np.float64)), rtol=1e-11, atol=1e-11 * n
        )


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]], ids=["top to bottom", "blocks"])
@pytest.mark.parametrize("low", [True, False], ids=["int8", "float32"])
def test_full_gradient_is_the_same_in_any_order_of_blocks(low, order):
    """Blocks of 100 rows, in two chunks each in low precision; the last is not full. Three threads share them."""
    needs_kernels()
    state, reference = (state_of("squared", low, n=333, features=1500) for _ in range(2))
    state.offset[:] = reference.offset[:] = np.random.default_rng(1).integers(-127, 128, state.x.shape[1])
    kernels.outer(state, 3, order=None if order is None else np.array(order, dtype=np.int32), batch=100)
    fallback.outer(reference)
    np.testing.assert_allclose(state.margin, reference.margin, rtol=1e-4, atol=1e-4 * np.abs(reference.margin).max())
    x = state.x.astype(np.float64)
    np.testing.assert_allclose(state.full, state.unit * (state.residual @ x), atol=1e-5 * np.abs(state.full).max())
    derivative = state.margin - state.y
    assert np.abs(state.residual - derivative).max() <= np.abs(derivative).max() * (0.5001 / 127 if low else 1e-6)


def misses(orders, room):
    """Blocks that a cache of ``room`` blocks lacks, reading these orders one after another; the oldest leave it."""
    held, missed = OrderedDict(), 0
    for block in np.concatenate(orders).tolist():
        missed += block not in held
        held[block] = held.pop(block, None)
        if len(held) > room:
            held.popitem(last=False)
    return missed


def test_pass_over_all_rows_meets_what_is_in_the_cache():
    """Against top to bottom: of 25 blocks that the cache holds of 100, all are met on both sides of a pass."""
    draw = np.random.default_rng(0)
    inner = [draw.permutation(100).astype(np.int32) for _ in range(8)]
    passes = [sweep_order(last, coming) for last, coming in zip([None, *inner], inner)]
    assert all(sorted(each) == list(range(100)) for each in passes)
    assert passes[0].tolist() == inner[0][::-1].tolist()
    natural = misses([part for order in inner for part in (np.arange(100), order)], 25)
    swept = misses([part for pair in zip(passes, inner) for part in pair], 25)
    met = sum(len({*a[-25:].tolist()} | {*b[:25].tolist()}) for a, b in pairwise(inner))
    assert swept <= 1600 - met - 25
    assert swept < 0.85 * natural


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_rows_begin_on_cache_lines(dtype):
    rows = empty_rows(5, 192, dtype)
    assert rows.shape == (5, 192)
    assert rows.dtype == dtype
    assert rows.flags.c_contiguous
    assert rows.ctypes.data % 64 == 0


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("low", [True, False], ids=["int8", "float32"])
def test_one_inner_step_equals_numpy_up_to_the_rounding_of_one_code(loss, threads, low):
    """Without draws; row weights are rounded per thread, so that a code may differ by one."""
    needs_kernels()
    z = []
    for engine in (kernels, fallback):
        state = state_of(loss, low, n=333, features=130)
        state.gap = 1e-2 if low else 1.0
        engine.outer(state)
        d = state.x.shape[1]
        state.offset[:] = np.random.default_rng(2).integers(-40, 40, d) * (1 if low else 1e-2)
        engine.inner(
            state, order=np.array([2], dtype=np.int32), batch=100, lr=0.5, seed=0, first_step=0, draws=False,
            threads=threads,
            drift=(0.5 * state.full / 333 / state.gap).astype(np.float32), shrink=np.full(d, 0.9, dtype=np.float32),
        )  # fmt: skip
        z.append(state.offset.astype(np.float64))
    assert np.abs(z[0] - z[1]).max() <= (1 if low else 1e-5)
    assert (z[0] != z[1]).mean() < 0.1 or not low


def test_draws_are_philox():
    needs_kernels()
    index = torch.arange(48, dtype=torch.int64)
    zero = torch.zeros_like(index)
    seed = 2**40 + 3
    words = philox4x32((index, zero, zero + 5, zero + 9), (seed & 0xFFFFFFFF, seed >> 32))
    expected = torch.stack(words).view(4, 3, 16).permute(1, 0, 2).flatten().numpy()
    assert (kernels.draw_words(192, step=9, stream=5, seed=seed) == expected).all()


def test_instruction_sets_agree_bitwise():
    """Integer arithmetic is exact, so all levels give the same 8-bit solve; each runs in its own process."""
    needs_kernels()
    code = (
        "import numpy as np\n"
        "from lightning_lpsgld.linear import HALPRegressor, instruction_set\n"
        "draw = np.random.default_rng(0)\n"
        "X = draw.standard_normal((301, 77)); y = X @ draw.standard_normal(77)\n"
        "model = HALPRegressor(n_threads=1, max_iter=4, tol=0, batch_size=50).fit(X, y)\n"
        "print(instruction_set(), model.coef_.tobytes().hex())\n"
    )
    seen = {}
    for level in ("baseline", "avx2", ""):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LIGHTNING_LPSGLD_CPU": level},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        name, coefficients = out.stdout.split()
        seen[name] = coefficients
    assert len(set(seen.values())) == 1, sorted(seen)


# ------------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("compiled", ENGINES)
@pytest.mark.parametrize("solver", ["halp8", "svrg"])
def test_regressor_finds_the_ridge_solution(solver, compiled):
    x, y = problem()
    model = HALPRegressor(0.5, solver=solver, batch_size=32, max_iter=200, tol=1e-6, n_threads=1, compiled=compiled)
    model.fit(x, y + 7)
    centred, target = x - x.mean(0, dtype=np.float64), y.astype(np.float64) - y.mean()
    exact = np.linalg.solve(centred.T @ centred / len(x) + 0.5 * np.eye(x.shape[1]), centred.T @ target / len(x))
    assert np.abs(model.coef_ - exact).max() < 1e-4 * np.abs(exact).max()
    assert abs(model.intercept_ - (7 + y.mean() - x.mean(0) @ exact)) < 1e-3
    assert model.score(x, y + 7) > 0.9


def test_float_data_is_solved_as_its_rounding():
    """Real features: the coefficients are within what rounding the data to 8 bits can do; svrg sees none of it."""
    draw = np.random.default_rng(3)
    x, truth = draw.standard_normal((5000, 20)), draw.standard_normal(20)
    y = x @ truth
    low = HALPRegressor(0.0, batch_size=32, max_iter=200, tol=1e-6, n_threads=1).fit(x, y)
    full = HALPRegressor(0.0, solver="svrg", batch_size=32, max_iter=200, tol=1e-6, n_threads=1).fit(x, y)
    assert np.abs(full.coef_ - truth).max() < 1e-4
    assert 1e-6 < np.abs(low.coef_ - truth).max() < 0.01


def test_classifier_matches_an_exact_newton_solution():
    x, y = problem(loss="logistic", features=20)
    model = HALPClassifier(1e-2, batch_size=32, max_iter=300, tol=1e-6, fit_intercept=False, n_threads=1).fit(x, y)
    w, features = np.zeros(20), x.astype(np.float64)
    for _ in range(30):
        p = 1 / (1 + np.exp(-y * (features @ w)))
        hessian = (features * (p * (1 - p))[:, None]).T @ features / len(x) + 1e-2 * np.eye(20)
        w -= np.linalg.solve(hessian, -(features * (y * (1 - p))[:, None]).mean(0) + 1e-2 * w)
    assert np.abs(model.coef_[0] - w).max() < 1e-4 * np.abs(w).max()


def test_three_classes_one_against_the_rest():
    draw = np.random.default_rng(4)
    labels = np.array(["a", "b", "c"])[draw.integers(3, size=900)]
    x = (
        draw.standard_normal((900, 2))
        + 4 * np.array([[np.cos(a), np.sin(a)] for a in (0, 2, 4)])[np.searchsorted(["a", "b", "c"], labels)]
    )
    model = HALPClassifier(max_iter=300, tol=1e-3, batch_size=32, n_threads=1).fit(x, labels)
    assert model.coef_.shape == (3, 2)
    assert model.score(x, labels) > 0.95


def test_same_seed_same_bits_other_seed_other_path():
    x, y = problem()
    fits = [HALPRegressor(random_state=s, n_threads=1, max_iter=3, tol=0).fit(x, y).coef_ for s in (0, 0, 1)]
    assert np.array_equal(fits[0], fits[1])
    assert not np.array_equal(fits[0], fits[2])


def test_odd_shapes_and_constant_columns():
    x = np.zeros((5, 3))
    x[:, 1] = [1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="max_iter"):
        model = HALPRegressor(0.0, batch_size=2, max_iter=20, tol=1e-12, n_threads=2).fit(x, x[:, 1])
    assert np.isfinite(model.coef_).all()
    assert HALPRegressor(max_iter=1, tol=0, n_threads=3).fit(np.ones((1, 1)), [2.0]).predict([[1.0]]).shape == (1,)


def test_errors_and_protocol():
    x, y = problem(n=50, features=3)
    with pytest.raises(ValueError, match="`solver` must be 'halp8' or 'svrg'"):
        HALPRegressor(solver="halp16").fit(x, y)
    with pytest.raises(ValueError, match=r"`alpha` must be >= 0"):
        HALPRegressor(-1.0).fit(x, y)
    with pytest.raises(ValueError, match="shape"):
        HALPRegressor().fit(x, y[:-1])
    with pytest.raises(ValueError, match="NaN or infinity"):
        HALPRegressor().fit(np.full((3, 2), np.nan), np.zeros(3))
    with pytest.raises(ValueError, match="two classes"):
        HALPClassifier().fit(x, np.zeros(50))
    with pytest.raises(ValueError, match="no parameter"):
        HALPRegressor().set_params(beta=1)
    with pytest.raises(FloatingPointError, match="Lower `lr`"):
        HALPRegressor(lr=1e4, max_iter=8, solver="svrg").fit(x, y)
    from sklearn.base import clone

    model = HALPRegressor(0.3, batch_size=8)
    assert clone(model).get_params() == model.get_params()


def test_it_works_without_the_kernels():
    """What an installation without a compiler does: numpy, said once, same estimator."""
    code = (
        "import numpy as np\n"
        "from lightning_lpsgld.linear import HALPRegressor, unavailable\n"
        "assert unavailable()\n"
        "X = np.arange(40.0).reshape(20, 2) % 7\n"
        "y = X @ [1.0, 2.0]\n"
        "assert HALPRegressor(0.0, max_iter=500, batch_size=4, tol=1e-3).fit(X, y).score(X, y) > 0.99\n"
    )
    env = {**os.environ, "LIGHTNING_LPSGLD_CPU": "0"}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env).returncode == 0
