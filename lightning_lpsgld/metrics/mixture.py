r"""Scores of predictive distributions of real targets: mixtures of Gaussians, one component per posterior sample.

.. math::
    \bar p(y) = \frac1K \sum_{s=1}^K \mathcal N(y; \mu_s, \sigma_s^2)

Everywhere ``mean`` and ``variance`` have shape ``(samples, *)``, ``targets`` has shape ``(*)``, sums are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "MixturePoints",
    "check_mixture",
    "gaussian_spread",
    "mixture_cdf",
    "mixture_crps",
    "mixture_log_density",
    "mixture_points",
    "mixture_quantile",
]

_SQRT2, _LOG_2PI = math.sqrt(2.0), math.log(2.0 * math.pi)


def check_mixture(mean: Tensor, variance: Tensor, targets: Tensor | None = None) -> None:
    """Raise unless shapes fit and everything is floating; values are not looked at.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If a dtype is wrong.
    """
    if mean.ndim < 1 or variance.shape != mean.shape or (targets is not None and targets.shape != mean.shape[1:]):
        shape = None if targets is None else tuple(targets.shape)
        raise ValueError(
            f"`mean` and `variance` must have shape (samples, *) and `targets` (*), got {tuple(mean.shape)}, "
            f"{tuple(variance.shape)} and {shape}. For one distribution add a dim: mean.unsqueeze(0)."
        )
    if not mean.is_floating_point() or not variance.is_floating_point():
        raise TypeError(f"`mean` and `variance` must be floating, got {mean.dtype} and {variance.dtype}.")


def gaussian_spread(difference: Tensor, variance: Tensor) -> Tensor:
    r"""Mean absolute value of a Gaussian, :math:`E|X|` for :math:`X \sim \mathcal N(m, s^2)`; :math:`|m|` at s = 0.

    .. math::
        A(m, s^2) = 2 s\,\varphi(m/s) + m\,(2\Phi(m/s) - 1)

    Args:
        difference: Means m, any shape.
        variance: Variances s², a shape that broadcasts; 0 is allowed.

    Returns:
        Broadcast shape, in the unit of the means.
    """
    m, s = difference.double(), variance.double().sqrt()
    z = torch.where(s > 0, m / s, math.inf)
    value = s * math.sqrt(2 / math.pi) * torch.exp(-0.5 * z * z) + m * torch.erf(z / _SQRT2)
    return torch.where(s > 0, value, m.abs())


def _log_normal(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    mean, variance = mean.double(), variance.double()
    return -0.5 * ((targets.double() - mean).square() / variance + variance.log() + _LOG_2PI)


def component_cdf(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    """Distribution function of every component; a component of variance 0 is a step that is one half at its place."""
    difference, scale = value.double() - mean.double(), variance.double().sqrt()
    z = torch.where(scale > 0, difference / scale, difference.sign() * math.inf).nan_to_num(0.0, math.inf, -math.inf)
    return torch.special.ndtr(z)


def mixture_log_density(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    r"""Log density of the mixture at the targets, :math:`\ln\bar p(y)`, in nats; float64 of shape ``(*)``.

    Args:
        mean: Means of the samples, shape ``(samples, *)``.
        variance: Their variances, the same shape. Above 0.
        targets: Shape ``(*)``.

    Returns:
        float64 of shape ``(*)``, in nats.
    """
    check_mixture(mean, variance, targets)
    return _log_normal(mean, variance, targets).logsumexp(0) - math.log(len(mean))


def mixture_cdf(mean: Tensor, variance: Tensor, value: Tensor) -> Tensor:
    r"""Distribution function :math:`\bar F(y)`; at the targets it is the probability integral transform (PIT).

    Args:
        mean: Means of the samples, shape ``(samples, *)``.
        variance: Their variances, the same shape.
        value: y, shape ``(*)``.

    Returns:
        float64 of shape ``(*)``, in [0, 1].
    """
    check_mixture(mean, variance, value)
    return component_cdf(mean, variance, value).mean(0)


def mixture_crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    r"""Continuous ranked probability score of each prediction, in the unit of the targets.

    .. math::
        \int (\bar F(x) - [x \ge y])^2\,dx = \frac1K\sum_s A(y - \mu_s, \sigma_s^2)
            - \frac1{2K^2}\sum_{s,t} A(\mu_s - \mu_t, \sigma_s^2 + \sigma_t^2)

    with A of :func:`gaussian_spread`. Time is quadratic in the number of samples. Variances of 0 are allowed.

    Args:
        mean: Means of the samples, shape ``(samples, *)``.
        variance: Their variances, the same shape.
        targets: Shape ``(*)``.

    Returns:
        float64 of shape ``(*)``, at least 0.

    Example:
        >>> import torch
        >>> mixture_crps(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([0.0]))
        tensor([0.2337], dtype=torch.float64)

    Reference:
        Grimit, Gneiting, Berrocal & Johnson, 2006, "The continuous ranked probability score for circular variables",
        equation 5; Gneiting & Raftery, 2007, equation 21.
    """
    check_mixture(mean, variance, targets)
    mean, variance, count = mean.double(), variance.double(), len(mean)
    pairs = torch.zeros_like(mean[0])
    for s in range(count):
        pairs = pairs + gaussian_spread(mean - mean[s], variance + variance[s]).sum(0)
    return gaussian_spread(targets.double() - mean, variance).mean(0) - pairs / (2 * count**2)


def mixture_quantile(probability: float, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Quantile of the mixture, :math:`\bar F^{-1}(p)`: Newton's method within a bracket that also halves.

    Args:
        probability: p in (0, 1).
        mean: Shape ``(samples, *)``.
        variance: The same, above 0.

    Returns:
        float64 of shape ``(*)``.

    Raises:
        ValueError: If ``probability`` is not inside (0, 1).

    Example:
        >>> import torch
        >>> mixture_quantile(0.975, torch.zeros(3, 1), torch.ones(3, 1))
        tensor([1.9600], dtype=torch.float64)
    """
    check_mixture(mean, variance)
    if not 0.0 < probability < 1.0:
        raise ValueError(f"`probability` must lie in (0, 1), got {probability}.")
    mean, variance = mean.double(), variance.double()
    z = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
    ends = mean + z * variance.sqrt()
    low, high = ends.amin(0), ends.amax(0)  # the quantile lies between those of the components
    x = ends.mean(0)
    tolerance = 1e-14 * (high - low + variance.amax(0).sqrt() + x.abs())
    for step in range(1, 200):
        error = component_cdf(mean, variance, x).mean(0) - probability
        low, high = torch.where(error < 0, x, low), torch.where(error < 0, high, x)
        newton = x - error / _log_normal(mean, variance, x).exp().mean(0)
        middle = 0.5 * (low + high)
        x = torch.where((newton > low) & (newton < high), newton, middle) if step % 3 else middle
        if bool(((high - low <= tolerance) | (error.abs() <= 1e-15)).all()):
            break
    return x.clamp(low, high)


@dataclass(frozen=True)
class MixturePoints:
    """Predictive distribution of each point, and what it says of the target: all that the scores need.

    Attributes:
        mean: Means of the components, shape ``(samples, *)``.
        variance: Variances of the components, shape ``(samples, *)``.
        targets: Targets, shape ``(*)``.
        log_density: Of the mixture at the target, float64, shape ``(*)``.
        pit: Distribution function at the target.
        crps: Continuous ranked probability score.
        center: Mean of the mixture.
        epistemic: Variance of the components' means: what the samples do not agree on.
        aleatoric: Mean of the components' variances: noise that all samples expect.
    """

    mean: Tensor
    variance: Tensor
    targets: Tensor
    log_density: Tensor
    pit: Tensor
    crps: Tensor
    center: Tensor
    epistemic: Tensor
    aleatoric: Tensor

    def quantile(self, probability: float) -> Tensor:
        """Quantile of each point's mixture, float64, shape ``(*)``."""
        return mixture_quantile(probability, self.mean, self.variance)


def mixture_points(mean: Tensor, variance: Tensor, targets: Tensor) -> MixturePoints:
    """All facts of :class:`MixturePoints` from the components of all samples.

    Args:
        mean: Shape ``(samples, *)``.
        variance: The same.
        targets: Shape ``(*)``.

    Returns:
        float64 facts per point.
    """
    center = mean.double().mean(0)
    return MixturePoints(
        mean=mean,
        variance=variance,
        targets=targets,
        log_density=mixture_log_density(mean, variance, targets),
        pit=mixture_cdf(mean, variance, targets),
        crps=mixture_crps(mean, variance, targets),
        center=center,
        epistemic=(mean.double() - center).square().mean(0),
        aleatoric=variance.double().mean(0),
    )
