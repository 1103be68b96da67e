"""Mixtures of Gaussians as targets of samplers: gradient, draws, and the exact laws of their projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lightning_lpsgld.random import DrawKey, normals, uniforms


@dataclass(frozen=True)
class Target:
    """A mixture of Gaussians of equal weights and one covariance: U(x) = -log sum_k exp(-(x-c_k)' P (x-c_k) / 2)."""

    name: str
    source: str
    centres: tuple[tuple[float, ...], ...]
    covariance: tuple[tuple[float, ...], ...]

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.covariance)

    @cached_property
    def means(self) -> Tensor:
        """Centres, shape ``(modes, d)``, float64."""
        return torch.tensor(self.centres, dtype=torch.float64)

    @cached_property
    def cov(self) -> Tensor:
        """Covariance of every mode, shape ``(d, d)``."""
        return torch.tensor(self.covariance, dtype=torch.float64)

    @cached_property
    def precision(self) -> Tensor:
        """P, its inverse."""
        return torch.linalg.inv(self.cov)

    def gradient(self, x: Tensor) -> Tensor:
        """Of U at many points, shape ``(n, d)``: P (x - mean of the centres under their posterior weights)."""
        means, precision = self.means.to(x), self.precision.to(x)
        weight = torch.softmax(x @ precision @ means.T - (means @ precision * means).sum(1) / 2, dim=1)
        return (x - weight @ means) @ precision

    def draw(self, count: int, seed: int) -> Tensor:
        """Independent draws, shape ``(n, d)``, float32."""
        which = (uniforms((count,), DrawKey(seed, stream=1)) * len(self.means)).long()
        z = normals((count, self.dim), DrawKey(seed, stream=2)).double()
        return (self.means[which] + z @ torch.linalg.cholesky(self.cov).T).float()

    def scatter(self, x: Tensor) -> Tensor:
        """Mean over the axes of the squared distance to the nearest centre, in the metric of P."""
        off = x.double()[:, None] - self.means
        return ((off @ self.precision) * off).sum(-1).min(1).values / self.dim

    @cached_property
    def expected_scatter(self) -> float:
        """Mean of :meth:`scatter` under the target, by quadrature."""
        axis = torch.linspace(-6, 6, 801, dtype=torch.float64)
        x = torch.cartesian_prod(*[axis] * self.dim).reshape(-1, self.dim)
        off = x[:, None] - self.means
        weight = torch.softmax(torch.logsumexp(-((off @ self.precision) * off).sum(-1) / 2, dim=1), dim=0)
        return float(weight @ self.scatter(x))

    def cdf(self, direction: Tensor, x: Tensor) -> Tensor:
        """Distribution function of the projection on a unit vector."""
        centre, sd = self.means @ direction, float(direction @ self.cov @ direction) ** 0.5
        return torch.special.ndtr((x[:, None] - centre) / sd).mean(1)

    def quantile(self, direction: Tensor) -> Callable[[Tensor], Tensor]:
        """Quantile function of the projection, for :func:`wasserstein2`."""
        x = torch.linspace(-9, 9, 40_001, dtype=torch.float64)
        cdf = self.cdf(direction, x).numpy()
        return lambda u: torch.from_numpy(np.interp(u.numpy(), cdf, x.numpy()))
