"""Lattice Langevin against variance-corrected SGLD on a Bayesian logistic regression, full and minibatch gradients.

    python examples/lattice_logistic_regression.py            # about four minutes on one core

The posterior of two weights is known from quadrature, so "too wide" is a number: the variance of many parallel chains
over the posterior's. Exponential rates are tried as they are, told the exact noise of the minibatch gradient (from all
data), and told what the minibatch itself shows. Prints one table; docs/theory.md shows and discusses it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lpsgld.ops import lattice_step, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.lattice import Rates
from lightning_lpsgld.random import DrawKey, normals, uniforms

FORMAT = "fixed8.3"
NUM_DATA, PRIOR = 200, 1.0


def make_data() -> tuple[Tensor, Tensor]:
    """Two correlated features and labels drawn from the model at (1, -1); float64."""
    z = normals((NUM_DATA, 2), DrawKey(0, stream=1))
    x = torch.stack([z[:, 0], 0.5 * z[:, 0] + 0.75**0.5 * z[:, 1]], dim=1)
    y = (uniforms((NUM_DATA,), DrawKey(0, stream=2)) < torch.sigmoid(x @ torch.tensor([1.0, -1.0]).double())).double()
    return x, y


def posterior_moments(x: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each weight by quadrature on a fine square grid."""
    axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    logits = theta @ x.T
    loss = torch.nn.functional.softplus(logits).sum(1) - logits @ y
    weight = torch.softmax(-(loss + PRIOR / 2 * theta.square().sum(1)) / temperature, dim=0)
    mean = weight @ theta
    return mean, weight @ (theta - mean).square()


class Gradient:
    """Gradient of the batch-mean loss at many weight vectors, each chain with a batch of its own."""

    def __init__(self, batch: int | None, centre: Tensor | None = None) -> None:
        self.x, self.y = make_data()
        self.batch, self.centre = batch, centre
        self.at_centre = None if centre is None else self._of(centre[None], self.x[None], self.y[None])

    def _terms(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of each example at each chain's weights, without the prior, shape ``(chains, examples, 2)``."""
        residual = torch.sigmoid((x * theta[:, None]).sum(-1)) - y
        return residual[..., None] * x

    def _of(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._terms(theta, x, y).mean(1) + PRIOR / NUM_DATA * theta

    def _batch(self, chains: int, step: int) -> tuple[Tensor, Tensor]:
        assert self.batch is not None
        rows = (uniforms((chains, self.batch), DrawKey(1, step=step)) * NUM_DATA).long()
        return self.x[rows], self.y[rows]

    def __call__(self, theta: Tensor, step: int) -> Tensor:
        """Chains in rows; with a ``centre`` the difference to the full gradient there (control variate)."""
        theta = theta.double()
        if self.batch is None:
            return (torch.sigmoid(theta @ self.x.T) - self.y) @ self.x / NUM_DATA + PRIOR / NUM_DATA * theta
        x, y = self._batch(len(theta), step)
        out = self._of(theta, x, y)
        if self.centre is None:
            return out
        return out - self._of(self.centre.expand_as(theta), x, y) + self.at_centre

    def std(self, theta: Tensor, step: int, told: str | None) -> Tensor | float:
        """Standard deviation of the batch-mean gradient: ``"exact"``, over all data, or ``"batch"``, as it shows."""
        if told is None or self.batch is None:
            return 0.0
        theta, chains = theta.double(), len(theta)
        x, y = (self.x[None], self.y[None]) if told == "exact" else self._batch(chains, step)
        terms = self._terms(theta, x, y)
        if self.centre is not None:
            terms = terms - self._terms(self.centre.expand_as(theta), x, y)
        return terms.std(1, correction=int(told == "batch")) / self.batch**0.5


#: One step from (weights, drift, noise variance, standard deviation of the drift's noise, key).
Step = Callable[[Tensor, Tensor, float, "Tensor | float", DrawKey], Tensor]


def samplers() -> dict[str, tuple[Step, str | None]]:
    """Name of a sampler -> its step, and what it is told of the gradient's noise."""

    def full(theta: Tensor, drift: Tensor, variance: float, std: Tensor | float, key: DrawKey) -> Tensor:
        return theta + drift + variance**0.5 * normals(theta.shape, key)

    def naive(theta: Tensor, drift: Tensor, variance: float, std: Tensor | float, key: DrawKey) -> Tensor:
        return quantize(full(theta, drift, variance, std, key), FORMAT, key=key)

    def corrected(theta: Tensor, drift: Tensor, variance: float, std: Tensor | float, key: DrawKey) -> Tensor:
        return quantize_variance_corrected(theta + drift, variance, FORMAT, key=key)

    def lattice(rates: Rates) -> Step:
        return lambda theta, drift, variance, std, key: lattice_step(
            theta, drift, variance, FORMAT, key=key, rates=rates, gradient_std=std
        )

    return {
        "fp64": (full, None),
        "naive": (naive, None),
        "vc": (corrected, None),
        "exponential": (lattice("exponential"), None),
        "told s": (lattice("exponential"), "exact"),
        "told the batch's s": (lattice("exponential"), "batch"),
        "bernoulli": (lattice("bernoulli"), None),
        "heat-bath": (lattice("heat-bath"), None),
    }


def variance_ratio(
    sampler: tuple[Step, str | None], gradient: Gradient, temperature: float, lr: float, chains: int, steps: int
) -> float:
    """Variance of the chains after ``steps`` and ``2 * steps``..., over the posterior's, averaged over both weights."""
    step, told = sampler
    mean, variance = posterior_moments(gradient.x, gradient.y, temperature)
    theta = quantize(mean.expand(chains, 2).contiguous(), FORMAT, rounding="nearest")
    noise, total, count = 2 * lr * temperature / NUM_DATA, torch.zeros(2, dtype=torch.float64), 0
    for k in range(steps):
        drift, std = -lr * gradient(theta, k), lr * gradient.std(theta, k, told)
        theta = step(theta, drift, noise, std, DrawKey(2, step=k, stream=0))
        if k >= steps // 2 and k % 20 == 0:
            total, count = total + (theta.double() - mean).square().mean(0), count + 1
    return float((total / count / variance).mean())


def main() -> None:
    """Print Var/target for every sampler, temperature and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    x, y = make_data()
    mean, _ = posterior_moments(x, y, 1.0)
    gradients = {
        "full": Gradient(None),
        "32": Gradient(32),
        "8": Gradient(8),
        "8, control variate": Gradient(8, centre=mean),
    }
    names = samplers()
    print("| T | batch | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))
    for temperature in (1.0, 0.1):
        for batch, gradient in gradients.items():
            cells = [variance_ratio(s, gradient, temperature, args.lr, args.chains, args.steps) for s in names.values()]
            print(f"| {temperature} | {batch} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
