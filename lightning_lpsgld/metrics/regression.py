"""Scores of :mod:`.mixture` as ``torchmetrics.Metric``: sums of fixed size, added over batches and ranks.

Every metric is updated with ``(mean, variance, targets)`` of shapes ``(samples, *)``, ``(samples, *)`` and ``(*)``, or
with :class:`~.mixture.MixturePoints`; one Gaussian per point is a mixture of one sample.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_lpsgld.metrics.base import MeanScore, Score, zeros
from lightning_lpsgld.metrics.mixture import MixturePoints, mixture_points

__all__ = [
    "AleatoricVariance",
    "EpistemicVariance",
    "IntervalCoverage",
    "IntervalWidth",
    "MixtureCRPS",
    "MixtureNLL",
    "MixtureRMSE",
    "MixtureScore",
    "QuantileCalibration",
]


def _points(mean: Tensor | MixturePoints, variance: Tensor | None, targets: Tensor | None) -> MixturePoints:
    if isinstance(mean, MixturePoints):
        return mean
    if variance is None or targets is None:
        raise TypeError("Update with (mean, variance, targets), or with MixturePoints.")
    return mixture_points(mean, variance, targets)


class MixtureScore(MeanScore):
    """Mean over points of something that :class:`~.mixture.MixturePoints` knows; a subclass says of what."""

    @abstractmethod
    def terms(self, points: MixturePoints) -> Tensor:
        """Value of each point, shape ``(*)``."""

    def update(
        self, mean: Tensor | MixturePoints, variance: Tensor | None = None, targets: Tensor | None = None
    ) -> None:
        """Add predictions of shape ``(samples, *)`` and targets of shape ``(*)``, or points that are known already."""
        self.add(self.terms(_points(mean, variance, targets)))


class MixtureNLL(MixtureScore):
    r"""Mean negative log density of the mixture at the targets, :math:`-\ln\bar p(y)`, in nats.

    Example:
        >>> import torch
        >>> metric = MixtureNLL()
        >>> metric.update(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(3))
        >>> metric.compute()
        tensor(0.9189, dtype=torch.float64)
    """

    def terms(self, points: MixturePoints) -> Tensor:
        """Negative log density."""
        return -points.log_density


class MixtureCRPS(MixtureScore):
    """Mean continuous ranked probability score, in the unit of the targets; see :func:`.mixture.mixture_crps`.

    Example:
        >>> import torch
        >>> metric = MixtureCRPS()
        >>> metric.update(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1))
        >>> metric.compute()
        tensor(0.2337, dtype=torch.float64)
    """

    def terms(self, points: MixturePoints) -> Tensor:
        """Score of each point."""
        return points.crps


class MixtureRMSE(MixtureScore):
    """Root of the mean squared error of the mixture's mean.

    Example:
        >>> import torch
        >>> metric = MixtureRMSE()
        >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.ones(2, 2), torch.tensor([2.0, 4.0]))
        >>> metric.compute()
        tensor(1.4142, dtype=torch.float64)
    """

    def terms(self, points: MixturePoints) -> Tensor:
        """Squared error."""
        return (points.center - points.targets.double()).square()

    def compute(self) -> Tensor:
        """Root of the mean, float64."""
        return (self.total / self.count).sqrt()


class EpistemicVariance(MixtureScore):
    """Mean variance between the samples' means (population variance): what more data would take away.

    Example:
        >>> import torch
        >>> metric = EpistemicVariance()
        >>> metric.update(torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), torch.zeros(1))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def terms(self, points: MixturePoints) -> Tensor:
        """Variance between means."""
        return points.epistemic


class AleatoricVariance(MixtureScore):
    """Mean variance that the samples expect on average: what more data would leave.

    Example:
        >>> import torch
        >>> metric = AleatoricVariance()
        >>> metric.update(torch.zeros(2, 1), torch.tensor([[1.0], [2.0]]), torch.zeros(1))
        >>> metric.compute()
        tensor(1.5000, dtype=torch.float64)
    """

    def terms(self, points: MixturePoints) -> Tensor:
        """Mean of variances."""
        return points.aleatoric


def _check_level(level: float) -> float:
    if not isinstance(level, (int, float)) or not 0.0 < level < 1.0:
        raise ValueError(f"`level` must lie in (0, 1), got {level!r}.")
    return float(level)


class IntervalCoverage(MixtureScore):
    r"""Share of targets within the central interval, that is with :math:`\bar F(y)` in the middle ``level`` of [0, 1].

    Args:
        level: Probability of the interval; a calibrated prediction has this coverage.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``level`` does not lie in (0, 1).

    Example:
        >>> import torch
        >>> metric = IntervalCoverage(0.9)
        >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1.6, 1.7]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = None  # type: ignore[assignment]

    def __init__(self, level: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.level = _check_level(level)

    def terms(self, points: MixturePoints) -> Tensor:
        """1 inside, 0 outside."""
        return ((points.pit - 0.5).abs() <= 0.5 * self.level).double()


class IntervalWidth(MixtureScore):
    """Mean width of the central interval, in the unit of the targets: of two calibrated predictions the sharper wins.

    Args:
        level: Probability of the interval.
        kwargs: Passed on to ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``level`` does not lie in (0, 1).

    Example:
        >>> import torch
        >>> metric = IntervalWidth(0.95)
        >>> metric.update(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1))
        >>> metric.compute()
        tensor(3.9199, dtype=torch.float64)
    """

    def __init__(self, level: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.level = _check_level(level)

    def terms(self, points: MixturePoints) -> Tensor:
        """Width of each point's interval."""
        return points.quantile(0.5 + 0.5 * self.level) - points.quantile(0.5 - 0.5 * self.level)


class QuantileCalibration(Score):
    r"""How far predicted quantiles are from what they promise: mean over levels p of :math:`|\hat P(y \le q_p) - p|`.

    Levels are j/(levels + 1). 0 is perfect; predictions far too narrow or too wide tend to 1/4, and one-sided errors
    to 1/2.

    Args:
        levels: Number of levels.
        kwargs: Passed on to ``torchmetrics.Metric``.

    State: number of targets below each quantile; number of targets. Added over ranks.

    Raises:
        ValueError: If ``levels`` is not a positive int.

    Example:
        >>> import torch
        >>> metric = QuantileCalibration(levels=3)
        >>> metric.update(torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([-1.0, -0.5, 0.5, 1.0]))
        >>> metric.observed()
        tensor([0.2500, 0.5000, 0.7500], dtype=torch.float64)

    Reference:
        Kuleshov, Fenner & Ermon, 2018, arXiv:1807.00263, section 3.5 (there the square).
    """

    below: Tensor
    count: Tensor

    def __init__(self, levels: int = 19, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 1:
            raise ValueError(f"`levels` must be an int >= 1, got {levels!r}.")
        self.levels = levels
        self.add_state("below", zeros(levels), dist_reduce_fx="sum")
        self.add_state("count", zeros(), dist_reduce_fx="sum")

    @property
    def promised(self) -> Tensor:
        """The levels, float64, shape ``(levels,)``."""
        return torch.arange(1, self.levels + 1, dtype=torch.float64, device=self.below.device) / (self.levels + 1)

    def observed(self) -> Tensor:
        """Share of targets below each quantile of what **this rank** has seen; for a calibration curve."""
        return self.below / self.count

    def update(
        self, mean: Tensor | MixturePoints, variance: Tensor | None = None, targets: Tensor | None = None
    ) -> None:
        """Add predictions of shape ``(samples, *)`` and targets of shape ``(*)``, or points that are known already."""
        points = _points(mean, variance, targets)
        pit = points.pit.flatten()
        rank = torch.searchsorted(self.promised, pit)  # promised[rank - 1] < pit <= promised[rank]
        counts = torch.bincount(rank, minlength=self.levels + 1)[: self.levels]
        self.below += counts.cumsum(0)
        self.count += len(pit)

    def compute(self) -> Tensor:
        """Mean distance from the levels, float64; NaN for no predictions."""
        return (self.observed() - self.promised).abs().mean()
