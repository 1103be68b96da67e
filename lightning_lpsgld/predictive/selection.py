"""Fewer samples to ship: the k of K that lose least, by held-out likelihood or by Stein thinning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank import SampleBank
from lightning_lpsgld.predictive.batches import DataError, default_targets, device_of, to_device, with_targets
from lightning_lpsgld.predictive.posterior import PosteriorEnsemble
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.predictive.tasks import check_labels

__all__ = ["Selection", "greedy_selection", "member_probabilities", "posterior_scores", "stein_thinning"]


@dataclass(frozen=True)
class Selection:
    """Samples that were chosen, and what that costs.

    Attributes:
        indices: Chosen samples, in the order in which they were chosen.
        score: Of the chosen ones: mean held-out NLL in nats, or kernel Stein discrepancy.
        full: The same of all samples.
        even: The same of as many evenly spaced samples.
        measure: ``"held-out NLL"`` or ``"Stein discrepancy"``.
    """

    indices: tuple[int, ...]
    score: float
    full: float
    even: float
    measure: str

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.score:.5g} with {len(self.indices)} chosen samples, {self.full:.5g} with all "
            f"({self.score - self.full:+.2g} lost), {self.even:.5g} with as many evenly spaced"
        )


def evenly(n: int, k: int) -> list[int]:
    """K of n indices, evenly spaced, the last one included."""
    return [n - 1 - (i * n) // k for i in reversed(range(k))]


def _check(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"selection: `k` must be between 1 and the {n} samples, got {k}.")


def _nll(chosen: Tensor) -> Tensor:
    """Mean NLL of averaged likelihoods, shape ``(..., n)``; clamped as everywhere."""
    return -chosen.clamp(min=2.0**-126).log().mean(-1)


def greedy_selection(likelihoods: Tensor, k: int) -> Selection:
    r"""Add, k times, the sample with which the ensemble's held-out NLL is lowest.

    Args:
        likelihoods: :math:`p(y_i \mid x_i, \theta_s)`, shape ``(samples, points)``.
        k: How many.

    Raises:
        ValueError: If k or the shape is out of range.

    Example:
        >>> greedy_selection(torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]), 1).indices
        (1,)

    Reference:
        Caruana et al., 2004, "Ensemble selection from libraries of models" (here without replacement).
    """
    if likelihoods.ndim != 2 or not likelihoods.numel():
        raise ValueError(f"selection: likelihoods must have shape (samples, points), got {tuple(likelihoods.shape)}.")
    p = likelihoods.double()
    _check(k, len(p))
    chosen: list[int] = []
    total = torch.zeros_like(p[0])
    for size in range(1, k + 1):
        scores = _nll((total + p) / size)
        scores[chosen] = float("inf")
        chosen.append(int(scores.argmin()))
        total = total + p[chosen[-1]]
    return Selection(
        tuple(chosen), float(_nll(total / k)), float(_nll(p.mean(0))), float(_nll(p[evenly(len(p), k)].mean(0))),
        "held-out NLL",
    )  # fmt: skip


def stein_kernel(points: Tensor, scores: Tensor) -> Tensor:
    r"""Stein kernel of the inverse multiquadric :math:`(1 + r^2/\ell^2)^{-1/2}`, ℓ the median distance.

    Args:
        points: Samples, shape ``(K, d)``.
        scores: Gradients of the log density there, same shape.

    Returns:
        float64, shape ``(K, K)``: with expectation 0 under the density, in either argument.

    Reference:
        Gorham & Mackey, 2017, arXiv:1703.01717.
    """
    x, s = points.double(), scores.double()
    gram, cross = x @ x.T, x @ s.T  # cross[i, j] = x_i . s_j
    norms = gram.diagonal()
    r2 = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0.0)
    apart = r2[~torch.eye(len(x), dtype=torch.bool)]
    scale = float(apart.median()) if len(apart) and float(apart.median()) > 0 else 1.0
    q = 1.0 + r2 / scale
    own = cross.diagonal()
    drift = own[:, None] - cross - cross.T + own[None, :]  # (x_i - x_j) . (s_i - s_j)
    flat = (x.shape[1] + drift) / scale * q**-1.5
    return flat - 3.0 * r2 / scale**2 * q**-2.5 + q**-0.5 * (s @ s.T)


def stein_thinning(points: Tensor, scores: Tensor, k: int) -> Selection:
    r"""Add, k times, the sample with which the kernel Stein discrepancy to the posterior is lowest.

    Args:
        points: Samples, shape ``(K, d)``.
        scores: :math:`\nabla \log p` there, see :func:`posterior_scores`; same shape.
        k: How many.

    Raises:
        ValueError: If k or the shapes are out of range.

    Reference:
        Riabiz et al., 2022, arXiv:2005.03952, algorithm 1 (here without replacement).
    """
    if points.ndim != 2 or points.shape != scores.shape:
        raise ValueError(f"selection: points {tuple(points.shape)} and scores {tuple(scores.shape)} must be (K, d).")
    _check(k, len(points))
    kernel = stein_kernel(points, scores)
    chosen: list[int] = []
    cost = kernel.diagonal() / 2
    for _ in range(k):
        cost = cost.clone()
        cost[chosen] = float("inf")
        chosen.append(int(cost.argmin()))
        cost = cost + kernel[:, chosen[-1]]

    def discrepancy(rows: list[int]) -> float:
        return float(kernel[rows][:, rows].mean().clamp(min=0.0).sqrt())

    everything = list(range(len(points)))
    even = evenly(len(points), k)
    return Selection(
        tuple(chosen), discrepancy(chosen), discrepancy(everything), discrepancy(even), "Stein discrepancy"
    )


def member_probabilities(
    ensemble: PosteriorEnsemble,
    batches: Iterable[Any],
    *,
    targets: Callable[[Any], Tensor | None] = default_targets,
) -> Tensor:
    """Likelihood of every held-out target under every member of a classifier.

    Args:
        ensemble: The ensemble.
        batches: Held-out batches with targets.
        targets: ``targets(batch)`` gives class indices.

    Returns:
        float64, shape ``(samples, points)``.

    Raises:
        ValueError: If a batch has no targets or targets that are no classes, or there is none.
    """
    rows = []
    for batch, truth in with_targets(batches, targets, "selection", "score"):
        labels = truth.to(device_of(ensemble.module))
        with closing(ensemble.outputs(batch)) as outputs:
            rows.append(torch.stack([_likelihood(output, labels) for output in outputs]))
    return torch.cat(rows, dim=1)


def _likelihood(logits: Tensor, truth: Tensor) -> Tensor:
    """Probability of each target, shape ``(n,)``."""
    if logits.ndim != 2 or truth.shape != logits.shape[:1]:
        raise DataError(
            f"selection: takes logits (n, classes) and one class a point, got {tuple(logits.shape)} and targets "
            f"{tuple(truth.shape)}."
        )
    check_labels(truth, logits.shape[1])
    return logits.double().softmax(1).gather(1, truth.long()[:, None])[:, 0]


def posterior_scores(
    bank: SampleBank,
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    num_data: int,
    temperature: float = 1.0,
    weight_decay: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Samples and gradients of their log posterior, for :func:`stein_thinning`.

    .. math::
        \nabla \log p(\theta)^{1/T} = -\frac{N}{T} \big(\nabla \bar L(\theta) + \lambda\theta\big)

    Args:
        bank: The samples.
        module: Built like the one that was sampled; as before afterwards.
        batches: All training batches, iterated once per sample; batches count equally.
        loss: ``loss(module, batch)``, the batch-mean loss.
        num_data: N.
        temperature: T.
        weight_decay: λ.

    Returns:
        Points and scores, shape ``(samples, parameters)``, float32 on the CPU.
    """
    points, scores = [], []
    with swapped_weights(module):
        named = [p for p in module.parameters() if p.requires_grad]
        for index in range(len(bank)):
            bank.load_into(module, index)
            module.eval()
            total, count = [torch.zeros_like(p) for p in named], 0
            for batch in batches:
                count += 1
                with torch.enable_grad():
                    value = loss(module, to_device(batch, device_of(module)))
                for sum_, grad in zip(total, torch.autograd.grad(value, named, allow_unused=True)):
                    if grad is not None:
                        sum_ += grad
            if count == 0:
                raise ValueError("selection: got no training batch.")
            theta = torch.cat([p.detach().flatten() for p in named]).float().cpu()
            mean = torch.cat([t.flatten() for t in total]).float().cpu() / count
            points.append(theta)
            scores.append(-num_data / temperature * (mean + weight_decay * theta))
    return torch.stack(points), torch.stack(scores)
