"""Least squares and logistic regression with ``fit``, ``predict`` and ``coef_``; no dependency on scikit-learn."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_lpsgld.linear import kernels
from lightning_lpsgld.linear.solver import SolveReport, SolverName, pack_rows, solve
from lightning_lpsgld.linear.state import LinearState

__all__ = ["HALPClassifier", "HALPRegressor"]

log = logging.getLogger(__name__)

E = TypeVar("E", bound="_HALPLinear")

_PARAMETERS = (
    "alpha", "solver", "batch_size", "max_iter", "tol", "lr", "mu", "fit_intercept", "random_state", "n_threads",
    "compiled",
)  # fmt: skip


@lru_cache(maxsize=1)
def _say_once(reason: str) -> None:
    log.info("The linear solvers run in numpy (slower): %s", reason)


class _HALPLinear(ABC):
    """Parameters, packing and solving; see the subclasses."""

    _loss: str

    def __init__(
        self,
        alpha: float = 1e-4,
        *,
        solver: SolverName = "halp8",
        batch_size: int = 256,
        max_iter: int = 100,
        tol: float = 1e-4,
        lr: float | None = None,
        mu: float | None = None,
        fit_intercept: bool = True,
        random_state: int = 0,
        n_threads: int = 1,
        compiled: bool | None = None,
    ) -> None:
        self.alpha = alpha
        self.solver = solver
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.tol = tol
        self.lr = lr
        self.mu = mu
        self.fit_intercept = fit_intercept
        self.random_state = random_state
        self.n_threads = n_threads
        self.compiled = compiled

    # -------------------------------------------------------------------------------------- scikit-learn's protocol

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments, as scikit-learn's ``clone`` and grid searches want them."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self: E, **params: Any) -> E:
        """Set constructor arguments by name.

        Raises:
            ValueError: If there is no such argument.
        """
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(_PARAMETERS)}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    # --------------------------------------------------------------------------------------------------------- fitting

    def _check(self, X: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        for name, rule, good in (
            ("alpha", ">= 0", self.alpha >= 0),
            ("batch_size", "in [1, 65536]", 1 <= self.batch_size <= 65536),
            ("max_iter", ">= 1", self.max_iter >= 1),
            ("tol", ">= 0", self.tol >= 0),
            ("n_threads", "in [1, 256]", 1 <= self.n_threads <= 256),
            ("lr", "None or > 0", self.lr is None or self.lr > 0),
            ("mu", "None or > 0", self.mu is None or self.mu > 0),
            ("solver", "'halp8' or 'svrg'", self.solver in ("halp8", "svrg")),
        ):
            if not good:
                raise ValueError(f"{type(self).__name__}: `{name}` must be {rule}, got {getattr(self, name)!r}.")
        x, target = np.asarray(X), np.asarray(y)
        if x.ndim != 2 or target.shape != x.shape[:1] or len(x) == 0:
            raise ValueError(
                f"`X` must have the shape (n, features) and `y` (n,), n >= 1; got {x.shape} and {target.shape}."
            )
        if not np.issubdtype(x.dtype, np.integer) and not np.isfinite(x.sum(dtype=np.float64)):
            raise ValueError("`X` contains NaN or infinity. Impute or drop those rows.")
        return x, target

    def _solve(self, x: NDArray[Any], y: NDArray[np.float32]) -> tuple[NDArray[np.float64], float]:
        low = self.solver == "halp8"
        rows = np.random.default_rng(self.random_state).permutation(len(x))
        packed, scale = pack_rows(x, low=low, intercept=self.fit_intercept, rows=rows)
        features = x.shape[1]
        penalty = np.zeros(packed.shape[1])
        penalty[:features] = self.alpha / scale**2
        state = LinearState(packed, y[rows], self._loss, penalty, unit=1 / 127 if low else 1.0)
        if kernels.unavailable() and self.compiled is None:
            _say_once(str(kernels.unavailable()))
        report = solve(
            state, batch=self.batch_size, max_iter=self.max_iter, tol=self.tol, lr=self.lr, mu=self.mu,
            seed=self.random_state, threads=self.n_threads, compiled=self.compiled,
        )  # fmt: skip
        self._finish(report)
        return state.centre[:features] / scale, float(state.centre[features]) if self.fit_intercept else 0.0

    def _finish(self, report: SolveReport) -> None:
        self.report_, self.n_iter_ = report, len(report.objective) - 1
        if not np.isfinite(report.objective[-1]) or report.objective[-1] > 10 * report.objective[0] + 1e-6:
            raise FloatingPointError(
                f"{type(self).__name__} diverged: the objective went from {report.objective[0]:.3g} to "
                f"{report.objective[-1]:.3g}. Lower `lr`, or leave it at None."
            )
        if not report.converged and self.tol > 0:
            warnings.warn(
                f"{type(self).__name__} stopped after max_iter={self.max_iter} epochs at "
                f"{report.gradient_norm[-1] / report.gradient_norm[0]:.1e} of the first gradient norm "
                f"(tol={self.tol:g}). Raise `max_iter` or `tol`.",
                stacklevel=4,
            )

    @abstractmethod
    def fit(self: E, X: ArrayLike, y: ArrayLike) -> E:
        """Fit the model."""


class HALPRegressor(_HALPLinear):
    r"""Ridge regression by HALP: 8-bit data, 8-bit offsets, linear convergence.

    .. math::
        \min_{w,b}\ \frac1{2n}\sum_i (x_i^\top w + b - y_i)^2 + \frac{\alpha}{2}\|w\|^2

    Each feature is scaled by its largest magnitude and **rounded to 8 bits** (``X`` of integers within ±127 is kept
    exactly): the solution is that of the rounded data, to full precision. Four times fewer bytes are read than by
    float32 SVRG, whose loop is otherwise the same (``solver="svrg"``).

    Args:
        alpha: α >= 0, coefficient of the L2 penalty (of the mean loss: scikit-learn's ``Ridge`` has n α). The intercept
            is not penalized.
        solver: ``"halp8"``, or ``"svrg"`` in float32 on unrounded data.
        batch_size: Rows of a mini-batch.
        max_iter: Most epochs; an epoch reads the data twice.
        tol: Stop once the gradient norm is at most this share of the first.
        lr: Step size in scaled features; ``None``: half the inverse smoothness, estimated.
        mu: Strong convexity for the paper's box of the offsets; ``None``: the box follows the offsets themselves.
        fit_intercept: Fit b.
        random_state: Seed of row order, mini-batches and draws.
        n_threads: Threads of the compiled kernels. They meet twice per mini-batch, which pays only on free processors
            with large mini-batches. Results are bitwise the same only for the same number.
        compiled: Use the compiled kernels; ``None``: where there are any, else numpy.

    Attributes:
        coef_: shape (features,), float64.
        intercept_: b.
        n_iter_: Epochs done.
        report_: Objective, gradient norm and seconds of every epoch (:class:`.solver.SolveReport`).

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).standard_normal((2000, 5))
        >>> model = HALPRegressor(alpha=0.0, n_threads=1).fit(X, X @ np.arange(5.0) + 3)
        >>> bool(np.abs(model.coef_ - np.arange(5)).max() < 0.02), round(model.intercept_, 1)
        (True, 3.0)

    Reference:
        De Sa et al., 2018, "High-accuracy low-precision training", arXiv:1803.03383. The box that follows the offsets,
        and the full gradient kept exact by carrying rounding errors over, are ours.
    """

    _loss = "squared"

    def fit(self, X: ArrayLike, y: ArrayLike) -> HALPRegressor:
        """Fit the model.

        Args:
            X: shape (n, features), any real dtype.
            y: shape (n,), real.

        Returns:
            The model.

        Raises:
            ValueError: If an argument or shape is wrong.
            FloatingPointError: If the solver diverged.
        """
        x, target = self._check(X, y)
        shift = float(target.mean()) if self.fit_intercept else 0.0
        self.coef_, intercept = self._solve(x, (target - shift).astype(np.float32))
        self.intercept_ = intercept + shift
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions, shape (n,)."""
        return np.asarray(X) @ self.coef_ + self.intercept_

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Coefficient of determination."""
        target = np.asarray(y, dtype=np.float64)
        return float(1.0 - ((self.predict(X) - target) ** 2).sum() / ((target - target.mean()) ** 2).sum())


class HALPClassifier(_HALPLinear):
    r"""Logistic regression by HALP: two classes, or one against the rest.

    .. math::
        \min_{w,b}\ \frac1n\sum_i \log\left(1 + e^{-y_i(x_i^\top w + b)}\right) + \frac{\alpha}{2}\|w\|^2,
        \qquad y_i \in \{-1, 1\}

    Arguments as :class:`HALPRegressor`.

    Attributes:
        classes_: Class labels, sorted.
        coef_: shape (1, features) for two classes, else (classes, features).
        intercept_: shape (1,) or (classes,).
        n_iter_: Epochs done, for the last class.
        report_: Report of the last class.

    Example:
        >>> import numpy as np
        >>> X = np.random.default_rng(0).standard_normal((500, 3))
        >>> model = HALPClassifier(n_threads=1).fit(X, np.where(X[:, 0] > 0, "up", "down"))
        >>> model.predict([[2.0, 0.0, 0.0]]).tolist()
        ['up']

    Reference:
        De Sa et al., 2018, arXiv:1803.03383.
    """

    _loss = "logistic"

    def fit(self, X: ArrayLike, y: ArrayLike) -> HALPClassifier:
        """Fit the model.

        Args:
            X: shape (n, features), any real dtype.
            y: shape (n,), labels of at least two classes.

        Returns:
            The model.

        Raises:
            ValueError: If an argument or shape is wrong, or there is only one class.
            FloatingPointError: If the solver diverged.
        """
        x, labels = self._check(X, y)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must have at least two classes, got only {self.classes_.tolist()}.")
        chosen = self.classes_[1:] if len(self.classes_) == 2 else self.classes_
        fits = [self._solve(x, np.where(labels == c, 1, -1).astype(np.float32)) for c in chosen]
        self.coef_ = np.stack([coef for coef, _ in fits])
        self.intercept_ = np.array([intercept for _, intercept in fits])
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Log-odds, shape (n,) for two classes, else (n, classes)."""
        margins = np.asarray(X) @ self.coef_.T + self.intercept_
        return margins[:, 0] if len(self.classes_) == 2 else margins

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels, shape (n,)."""
        margins = self.decision_function(X)
        return self.classes_[(margins > 0).astype(int) if margins.ndim == 1 else margins.argmax(1)]

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Accuracy."""
        return float((self.predict(X) == np.asarray(y)).mean())
