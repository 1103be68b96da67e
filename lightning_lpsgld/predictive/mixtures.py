"""The running posterior predictive of a regression: a mixture with one Gaussian per sample and point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lpsgld.metrics import (
    MixturePoints,
    gaussian_spread,
    mixture_cdf,
    mixture_log_density,
    mixture_quantile,
)
from lightning_lpsgld.predictive.outputs import GaussianOutput
from lightning_lpsgld.predictive.running import RunningPredictive

__all__ = ["MixturePredictive"]


@dataclass
class _BatchSums:
    """What is known of one batch: its components, and sums over them where there are targets."""

    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    log_density: Tensor | None = None  # log of the sum of densities at the target
    cdf: Tensor | None = None
    distance: Tensor | None = None  # sum over components of E|X - target|
    pairs: Tensor | None = None  # sum over ordered pairs of components of E|X - X'|

    def add(self, mean: Tensor, variance: Tensor, targets: Tensor | None) -> None:
        if targets is not None:
            self._add_scores(mean, variance, targets)
        self.means.append(mean)
        self.variances.append(variance)

    def _add_scores(self, mean: Tensor, variance: Tensor, targets: Tensor) -> None:
        one = mean.unsqueeze(0), variance.unsqueeze(0), targets
        log_density, cdf = mixture_log_density(*one), mixture_cdf(*one)
        distance = gaussian_spread(targets.double() - mean.double(), variance)
        pairs = gaussian_spread(torch.zeros_like(mean), 2.0 * variance.double())
        for other, spread in zip(self.means, self.variances):
            pairs += 2.0 * gaussian_spread(mean.double() - other.double(), variance.double() + spread.double())
        if self.log_density is None or self.cdf is None or self.distance is None or self.pairs is None:
            self.log_density, self.cdf, self.distance, self.pairs = log_density, cdf, distance, pairs
            return
        self.log_density = torch.logaddexp(self.log_density, log_density)
        self.cdf, self.distance, self.pairs = self.cdf + cdf, self.distance + distance, self.pairs + pairs

    def points(self, targets: Tensor) -> MixturePoints:
        assert self.log_density is not None
        assert self.cdf is not None
        assert self.distance is not None
        assert self.pairs is not None
        mean, variance, count = torch.stack(self.means), torch.stack(self.variances), len(self.means)
        center = mean.double().mean(0)
        return MixturePoints(
            mean=mean,
            variance=variance,
            targets=targets,
            log_density=self.log_density - math.log(count),
            pit=self.cdf / count,
            crps=self.distance / count - self.pairs / (2 * count**2),
            center=center,
            epistemic=(mean.double() - center).square().mean(0),
            aleatoric=variance.double().mean(0),
        )


class MixturePredictive(RunningPredictive):
    r"""Posterior predictive density of real targets over a growing set of samples.

    .. math::
        \bar p(y \mid x) = \frac1K \sum_{s=1}^K \mathcal N(y; \mu_s(x), \sigma_s^2(x))

    Kept per point are the components themselves (mean and variance of each sample, in the dtype they came in), because
    quantiles and the CRPS need them, and four float64 sums, so that a further sample costs time linear in the number of
    samples before it. Batches are numbered and have to be the same ones for every sample.

    Args:
        device: Where components and sums are kept; that of the predictions by default.

    Example:
        >>> import torch
        >>> predictive = MixturePredictive()
        >>> for mean in (-1.0, 1.0):
        ...     predictive.update(0, GaussianOutput(torch.tensor([mean]), torch.tensor([0.5])), torch.tensor([0.0]))
        ...     predictive.end_sample()
        >>> predictive.mean, predictive.epistemic, predictive.aleatoric
        (tensor([0.], dtype=torch.float64), tensor([1.], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.device = device
        self._sums: list[_BatchSums] = []

    def update(self, index: int, prediction: GaussianOutput, targets: Tensor | None = None) -> None:
        """Add what the current sample predicts for batch number ``index``.

        Args:
            index: 0, 1, 2, ... in order; the same batches for every sample.
            prediction: Means and variances, shape ``(n,)`` each.
            targets: Shape ``(n,)``, or ``None``.

        Raises:
            ValueError: If batches come in another order, or differ from those of the first sample.
        """
        mean, variance = (part.detach() for part in prediction)
        device = mean.device if self.device is None else self.device
        moved = GaussianOutput(mean.to(device), variance.to(device))
        self._append(index, moved, None if targets is None else targets.detach().to(device))

    def _start(self, index: int, prediction: GaussianOutput, targets: Tensor | None) -> None:
        self._sums.append(_BatchSums())
        self._add(index, prediction, targets)

    def _add(self, index: int, prediction: GaussianOutput, targets: Tensor | None) -> None:
        self._sums[index].add(prediction.mean.clone(), prediction.variance.clone(), targets)

    def _fits(self, index: int, prediction: GaussianOutput) -> bool:
        return self._sums[index].means[0].shape == prediction.mean.shape

    def batches(self) -> Iterator[tuple[MixturePoints | None, Tensor | None]]:
        """Facts of the mixture at each point, and targets, of each batch; ``None`` where there are no targets."""
        for sums, targets in zip(self._sums, self._targets):
            yield (None if targets is None else sums.points(targets)), targets

    def __len__(self) -> int:
        return sum(len(sums.means[0]) for sums in self._sums)

    def _components(self) -> tuple[Tensor, Tensor]:
        means = torch.cat([torch.stack(sums.means) for sums in self._sums], dim=1).double()
        return means, torch.cat([torch.stack(sums.variances) for sums in self._sums], dim=1).double()

    @property
    def mean(self) -> Tensor:
        """Predictive mean of each point, float64, shape ``(points,)``."""
        return self._components()[0].mean(0)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' means, per point: what they do not agree on."""
        return self._components()[0].var(0, correction=0) if self.num_samples > 1 else torch.zeros_like(self.mean)

    @property
    def aleatoric(self) -> Tensor:
        """Mean of the samples' variances, per point: the noise that they expect."""
        return self._components()[1].mean(0)

    @property
    def variance(self) -> Tensor:
        """Predictive variance of each point: epistemic and aleatoric."""
        return self.epistemic + self.aleatoric

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of probability ``level`` of each point, float64.

        Raises:
            ValueError: If ``level`` does not lie in (0, 1).
        """
        mean, variance = self._components()
        return tuple(mixture_quantile(0.5 + side * level / 2, mean, variance) for side in (-1, 1))  # type: ignore[return-value]
