"""The local learning coefficient: how many parameters a trained network effectively uses, seen by its posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.predictive.batches import device_of, to_device
from lightning_lpsgld.predictive.swap import swapped_weights
from lightning_lpsgld.samplers import SGLD

__all__ = ["LearningCoefficient", "LocalLearningCoefficient"]

#: Options of the sampler that follow from the arguments.
_DECIDED = frozenset({"lr", "num_data", "temperature", "weight_decay", "prior_mean", "seed"})


@dataclass(frozen=True)
class LearningCoefficient:
    r"""An estimate of the local learning coefficient.

    Attributes:
        value: Mean over chains, :math:`\hat\lambda = n\beta\,(E[L(w)] - L(w^*))`.
        chains: Estimate of each chain, float64, shape ``(chains,)``.
        excess: :math:`n\beta (L - L(w^*))` of every draw, float64, shape ``(chains, draws)``.
        nbeta: Inverse temperature that was used.
    """

    value: float
    chains: Tensor
    excess: Tensor
    nbeta: float

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over chains; NaN for one chain."""
        if len(self.chains) < 2:
            return math.nan
        return float(self.chains.std() / len(self.chains) ** 0.5)


class LocalLearningCoefficient:
    r"""Estimate the local learning coefficient at the weights that a module has.

    Chains start at the weights :math:`w^*` and sample

    .. math::
        p(w) \propto \exp\bigl(-n\beta\,L(w) - \tfrac\gamma2 \|w - w^*\|^2\bigr), \qquad
        \hat\lambda = n\beta\,(E[L(w)] - L(w^*))

    by SGLD of step :math:`\epsilon`, :math:`w \leftarrow w - \tfrac\epsilon2(n\beta\nabla L + \gamma(w - w^*)) +
    \mathcal N(0, \epsilon)`, which is the samplers' step with ``lr`` :math:`= \epsilon n\beta/2`, temperature over
    ``num_data`` :math:`= 1/(n\beta)` and weight decay :math:`\gamma/(n\beta)` with ``prior_mean="initial"``. L is the
    mean loss (a negative log likelihood per example); each draw's loss and that of :math:`w^*` are taken on the same
    batch. A regular model of d parameters has d/2, a degenerate one less.

    Args:
        num_draws: Draws per chain.
        gamma: Strength of the pull to the initial weights; too weak lets a chain leave the minimum, too strong makes
            the estimate smaller.
        nbeta: Inverse temperature; ``None``: n / ln n with the number of examples n.
        step: Step size :math:`\epsilon`; ``step * (nbeta * curvature + gamma)`` should be well below 1.
        burn_in: Steps before the first draw.
        every: Steps from draw to draw.
        chains: Number of chains, one after the other.
        seed: Of the first chain; each chain has the next one.
        options: Further options of :class:`~lightning_lpsgld.samplers.SGLD`, such as ``weight_format`` and
            ``gradient_format``: sampling in 8 bits. The grid of the weights has to hold the initial ones and to be as
            fine as the distribution is wide.

    Raises:
        TypeError: If ``options`` hold what follows from the arguments.
        ValueError: If an argument is out of range.

    Note:
        devinterp's ``SGLD(lr=step, nbeta=nbeta, localization=gamma)`` makes the same step, and its coefficient is the
        same difference of means with the initial loss averaged over batches of its own; taking both losses on one batch
        leaves the expectation and removes the noise of the batch. Its default of ``nbeta`` is m / ln m with the *batch*
        size m, the one here n / ln n.

    Example:
        >>> import torch
        >>> module = torch.nn.Linear(1, 50, bias=False)
        >>> _ = torch.nn.init.zeros_(module.weight)
        >>> batch = (torch.ones(8, 1), torch.zeros(8, 50))
        >>> estimate = LocalLearningCoefficient(200, gamma=1.0, nbeta=100.0, step=2e-3, chains=2, burn_in=50)
        >>> found = estimate(module, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().sum(1).mean(), [batch])
        >>> 22.5 < found.value < 27.5  # 50 parameters, all of which count
        True

    Reference:
        Lau et al., 2023, "The local learning coefficient", arXiv:2308.12108, equation 14 and algorithm 1.
    """

    def __init__(
        self,
        num_draws: int = 200,
        gamma: float = 100.0,
        nbeta: float | None = None,
        *,
        step: float = 1e-5,
        burn_in: int = 200,
        every: int = 1,
        chains: int = 4,
        seed: int = 0,
        **options: Any,
    ) -> None:
        counts = {"num_draws": (num_draws, 1), "burn_in": (burn_in, 0), "every": (every, 1), "chains": (chains, 1)}
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"LocalLearningCoefficient: `{name}` must be an int >= {least}, got {value!r}.")
        sizes = {"gamma": gamma, "step": step, "nbeta": 1.0 if nbeta is None else nbeta}
        for name, size in sizes.items():
            if not 0.0 <= size < math.inf or (size == 0.0 and name != "gamma"):
                raise ValueError(f"LocalLearningCoefficient: `{name}` must be positive and finite, got {size!r}.")
        if decided := sorted(_DECIDED & options.keys()):
            raise TypeError(
                f"LocalLearningCoefficient: `{decided[0]}` of the sampler follows from `step`, `nbeta`, `gamma` and "
                "`seed`; leave it out."
            )
        self.num_draws, self.gamma, self.nbeta, self.step = num_draws, gamma, nbeta, step
        self.burn_in, self.every, self.chains, self.seed = burn_in, every, chains, seed
        self.options = options

    def __call__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any],
        *,
        num_data: int | None = None,
    ) -> LearningCoefficient:
        """Run the chains; weights, gradients and modes of the module are as before afterwards.

        Args:
            module: Trained network; its training mode is kept while sampling.
            loss: Called as ``loss(module, batch)``; mean negative log likelihood of the batch.
            batches: Training batches; gone through again and again.
            num_data: Number of examples n, for ``nbeta=None``; by default ``len(batches.dataset)``.

        Returns:
            The estimate, per chain and draw.

        Raises:
            ValueError: If n cannot be found, or there is no batch.
        """
        nbeta = self._inverse_temperature(batches, num_data)
        gradients = [(param, param.grad) for param in module.parameters()]
        rows = []
        try:
            for chain in range(self.chains):
                with swapped_weights(module):
                    rows.append(self._chain(module, loss, _forever(batches), nbeta, self.seed + chain))
        finally:
            for param, gradient in gradients:
                param.grad = gradient
        excess = nbeta * torch.tensor(rows, dtype=torch.float64)
        return LearningCoefficient(float(excess.mean()), excess.mean(1), excess, nbeta)

    def _inverse_temperature(self, batches: Iterable[Any], num_data: int | None) -> float:
        if self.nbeta is not None:
            return self.nbeta
        count = num_data if num_data is not None else len(getattr(batches, "dataset", ()))
        if count < 2:
            raise ValueError(
                "LocalLearningCoefficient: nbeta=None takes n / ln n, and the number of examples n is unknown. Pass "
                "`num_data` (at least 2), or `nbeta`."
            )
        return count / math.log(count)

    def _chain(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        batches: Iterator[Any],
        nbeta: float,
        seed: int,
    ) -> list[float]:
        """Loss of each draw less that of the initial weights on the same batch."""
        params: list[Tensor] = [param for param in module.parameters() if param.requires_grad]
        initial = [param.detach().clone() for param in params]
        optimizer = SGLD(
            params, self.step * nbeta / 2, num_data=1, temperature=1.0 / nbeta, weight_decay=self.gamma / nbeta,
            prior_mean="initial", seed=seed, **self.options,
        )  # fmt: skip
        optimizer.round_parameters_()  # takes the initial weights up for the centre of the pull, before it rounds them
        device, found = device_of(module), []
        for number in range(1, self.burn_in + self.num_draws * self.every + 1):
            batch = to_device(next(batches), device)
            _take_gradient(module, loss, batch, params)
            optimizer.step()
            if number > self.burn_in and (number - self.burn_in) % self.every == 0:
                found.append(_excess(module, loss, batch, params, initial))
        return found


def _forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("LocalLearningCoefficient: there is no batch; pass some that can be iterated repeatedly.")


def _take_gradient(
    module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, params: list[Tensor]
) -> None:
    """Gradient of the loss; zeros where it depends on none of a parameter, which is pulled and shaken all the same."""
    for param in params:
        param.grad = None
    loss(module, batch).backward()
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)


@torch.no_grad()
def _excess(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    params: list[Tensor],
    initial: list[Tensor],
) -> float:
    """Loss at the weights less that at the initial ones, on one batch."""
    here = loss(module, batch).double()
    kept = [param.detach().clone() for param in params]
    for param, start in zip(params, initial):
        param.copy_(start)
    there = loss(module, batch).double()
    for param, value in zip(params, kept):
        param.copy_(value)
    return float(here - there)
