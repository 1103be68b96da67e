"""What samplers with weights on a grid share: the first rounding, the prior's mean, saturation, compensation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lpsgld.arguments import require_choice, require_number, require_seed
from lightning_lpsgld.formats import FormatLike, NumberFormat
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.dispatch import BACKENDS, BackendName
from lightning_lpsgld.random import DrawKey, Role, stream_id
from lightning_lpsgld.samplers.base import log
from lightning_lpsgld.samplers.coded_steps import stored_views_
from lightning_lpsgld.samplers.first_rounding import frozen_off_grid, round_to_nearest_
from lightning_lpsgld.samplers.shards import first_index, local_part
from lightning_lpsgld.samplers.statistics import Measurement, StepStatistics, rounding_variance, same_rows
from lightning_lpsgld.samplers.step_size import StepSize
from lightning_lpsgld.samplers.sums import SummingSampler

__all__ = ["GridSampler"]


class GridSampler(SummingSampler):
    """Base of SGLD, SGHMC and preconditioned SGLD.

    Args:
        params: As :class:`LangevinOptimizer`.
        group_options: Further options of a group, beside lr, weight decay, temperature and seed.
        lr: η.
        num_data: N.

    The other arguments are those of :class:`~lightning_lpsgld.samplers.options.GridOptions`; their defaults stand here.

    Raises:
        ValueError: If an argument is out of range, or a format is wider than a parameter's dtype.
    """

    #: Whether all weights of a group get the noise variance that :meth:`noise_variance` gives.
    uniform_noise = True

    def __init__(
        self,
        params: Any,
        group_options: dict[str, Any],
        *,
        lr: float,
        num_data: int,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        weight_format: FormatLike | None = None,
        gradient_format: FormatLike | None = None,
        accumulator: FormatLike = "low",
        variance_corrected: bool = True,
        seed: int = 0,
        backend: BackendName = "auto",
        schedule: StepSize | None = None,
        full_precision: Iterable[Tensor] = (),
        check_finite: bool = True,
        prior_mean: Literal["zero", "initial"] = "zero",
    ) -> None:
        require_choice("prior_mean", prior_mean, ("zero", "initial"))
        require_choice("backend", backend, ("auto", *BACKENDS))
        self.prior_mean = prior_mean
        self.backend = backend
        self._means: dict[Tensor, Tensor] = {}  # of the prior, until they are taken up
        self._placed = False
        self.saturated: list[tuple[list[Tensor], Tensor]] = []
        self.measured: list[StepStatistics] = []
        self._measure_next: int | None = None
        self._keep_next: int | None = None
        self._kept: dict[Tensor, Tensor] = {}
        seed = require_seed("seed", seed)
        defaults = {"lr": lr, "weight_decay": weight_decay, "temperature": temperature, "seed": seed}
        defaults.update(group_options)
        super().__init__(
            params, defaults, num_data=num_data, schedule=schedule, check_finite=check_finite,
            weight_format=weight_format, gradient_format=gradient_format, accumulator=accumulator,
            variance_corrected=variance_corrected, full_precision=full_precision,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------- compensation

    def shrinkage_of(self, param: Tensor) -> float:
        """What the rounded gradient of a parameter is divided by, q; 1 unless :meth:`compensate` was called."""
        return float(self.state.get(param, {}).get("shrinkage", 1.0))

    def compensate(self, param: Tensor, shrinkage: float) -> None:
        r"""Divide the rounded gradient of a parameter by q from the next step on.

        The drift is then that of :math:`Q_G(g)/q + \lambda\theta`; noise and weight decay are as they were. Rounding
        that leaves :math:`q\,g` slows the drift by q but leaves the noise, so that the chain samples the likelihood at
        the temperature T/q; this undoes both. For SGLD at T = 0 without weight decay it *is* the learning rate η/q.

        Args:
            param: One of the sampler's parameters.
            shrinkage: q > 0; 1 ends the compensation. Kept in the state (``shrinkage``), so saved and resumed.

        Raises:
            ValueError: If q is not finite and > 0.

        Example:
            >>> weight = torch.nn.Parameter(torch.zeros(3))
            >>> from lightning_lpsgld.samplers import SGLD
            >>> opt = SGLD([weight], lr=0.1, num_data=100, gradient_format="fixed8.7")
            >>> opt.compensate(weight, 0.25)
            >>> opt.shrinkage_of(weight)
            0.25

        Reference:
            Yun, 2025, arXiv:2508.07142 (the model; the step size μ/q); ``docs/theory.md``, section 5 (with noise).
        """
        value = require_number("shrinkage", shrinkage, above=0.0, remedy="Clamp a measured q from below.")
        self.state[param]["shrinkage"] = value

    # --------------------------------------------------------------------------------------------------------- prior

    def prior_mean_of(self, param: Tensor) -> Tensor | None:
        """What weight decay pulls a parameter to, in its shape; ``None``: zero. Taken up at the first call.

        Raises:
            TypeError: For sharded parameters.
        """
        if self.prior_mean == "zero":
            return None
        if isinstance(param, DTensor):
            raise TypeError(
                f"{type(self).__name__}: prior_mean='initial' does not take sharded parameters, and "
                f"{self.name_of(param)} is a DTensor. Use DDPStrategy."
            )
        state = self.state[param]
        if "prior_mean" not in state:
            told = self._means.pop(param, None)
            state["prior_mean"] = param.detach().clone(memory_format=torch.preserve_format) if told is None else told
        mean: Tensor = state["prior_mean"]
        return mean

    def centre_prior(self, means: Mapping[Tensor, Tensor]) -> None:
        """Let weight decay pull to given values, in place of the initial weights.

        Args:
            means: Parameter -> mean, in its shape; copied. Those of other samplers' parameters are passed over, those
                of parameters that may join later are kept for them.

        Raises:
            ValueError: If the sampler pulls to zero, or a shape is not the parameter's.

        Example:
            >>> weight = torch.nn.Parameter(torch.zeros(3))
            >>> from lightning_lpsgld.samplers import SGLD
            >>> opt = SGLD([weight], lr=0.1, num_data=100, weight_decay=1e-3, prior_mean="initial")
            >>> opt.centre_prior({weight: torch.ones(3)})
            >>> opt.prior_mean_of(weight)
            tensor([1., 1., 1.])
        """
        if self.prior_mean == "zero":
            raise ValueError(f"{type(self).__name__}: `centre_prior` needs prior_mean='initial', got 'zero'.")
        for param, mean in means.items():
            if mean.shape != param.shape:
                raise ValueError(
                    f"{type(self).__name__}: the prior's mean of {self.name_of(param)} must have its shape "
                    f"{tuple(param.shape)}, got {tuple(mean.shape)}."
                )
            self._means[param] = mean.detach().to(param.device, param.dtype, copy=True)
            self.state.get(param, {}).pop("prior_mean", None)

    def drift_of(self, group: dict[str, Any], param: Tensor, grad: Tensor, *, round_gradient: bool = True) -> Tensor:
        r"""Rounded gradient and the pull to the prior's mean, :math:`Q_G(g) + q\lambda(\theta - \mu)`.

        A step along it, without weight decay and without rounding of the gradient, is the step about μ: of any sampler
        and any backend, the fused ones too. With q of :meth:`compensate`, by which a step divides.

        Args:
            group: Of the parameter.
            param: θ, or its accumulator's.
            grad: g.
            round_gradient: Whether to round by the current step's draws.

        Raises:
            TypeError: For sharded parameters.
        """
        mean = self.prior_mean_of(param)
        assert mean is not None
        theta = self.accumulator_of(param)
        pull = (theta - mean) * (float(group["weight_decay"]) * self.shrinkage_of(param))
        grad = self.rounded_gradient(group, param, grad) if round_gradient else grad
        return (grad.to(pull.dtype) + pull).to(grad.dtype)

    # ------------------------------------------------------------------------------------------------------ stepping

    @torch.no_grad()
    def round_parameters_(self) -> None:
        """Bring the parameters onto the grid before the first step, by rounding to nearest; idempotent.

        With a full accumulator the unrounded values become the accumulators, with one on a grid the values nearest to
        them there. Without this call the first forward pass
        sees unrounded weights, as in the published code. Frozen weights (``requires_grad=False``) are left as they are.
        Tensors of which nothing is left but zeros are named in a warning of the log. Parameters of a group that is
        added later are brought onto the grid when it is.
        """
        self._placed = True
        self._frozen = set()
        self._place(list(self._indices))

    def _place(self, params: list[Tensor]) -> None:
        for param in params:
            self.prior_mean_of(param)
        if self.weight_format is None:
            return
        params = [param for param in params if param not in self.full_precision]
        self._frozen |= frozen_off_grid(params, self.weight_format)
        for param in (p for p in params if p.requires_grad):
            self.accumulator_of(param)
        round_to_nearest_(params, self.weight_format, self.name_of)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.add_param_group`; parameters that join a running chain are brought onto the grid.

        Raises:
            ValueError: Also if a format is wider than the dtype of a parameter that joins.
        """
        before = set(self._indices)
        super().add_param_group(param_group)
        if not self._placed:
            return
        joined = [param for param in self._indices if param not in before]
        for param in joined:
            if param not in self.full_precision:
                self._check_dtypes(param)
        self._say_joined(joined)
        self._place(joined)

    def _say_joined(self, params: list[Tensor]) -> None:
        if params and self.steps:
            log.warning(
                "%d parameter(s), %s among them, joined the chain of %s at step %d: samples taken before are of the "
                "posterior with these fixed. Collect from then on: SampleCollector(start=...).",
                len(params), self.name_of(params[0]), type(self).__name__, self.steps,
            )  # fmt: skip

    def _look(self, group: dict[str, Any], params: list[Tensor]) -> Tensor:
        """Round parameters from their sums, where those are on a grid; counts what lies outside the weights' range."""
        assert self.weight_format is not None
        sums, keys = [self.accumulator_of(p) for p in params], [self._draw_key(group, p) for p in params]
        indices = [self.index_of(p) for p in params]
        return stored_views_(params, sums, self.weight_format, keys, indices, self.backend)

    def _draw_key(self, group: dict[str, Any], param: Tensor) -> DrawKey:
        return self.key(group)

    def _with_gradients(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        params, grads = super()._with_gradients(group)
        thawed = [param for param in params if param in self._frozen]
        self._say_joined(thawed)
        self._frozen.difference_update(thawed)  # this step brings them onto the grid
        return params, grads

    @torch.no_grad()
    def rounded_gradient(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Tensor:
        """The gradient as the current step rounds it, by the step's own draws; for those who watch, changes nothing.

        Of a sharded gradient it is this rank's shard, rounded by itself: the step's own values unless a block crosses
        shards. QPyTorch's draws cannot be repeated; with ``backend="qtorch"`` they are others of the same law.
        """
        own, fmt = local_part(grad), self.gradient_format_of(param)
        if fmt is None or own.numel() == 0:
            return own
        key = self._draw_key(group, param).at(stream=stream_id(Role.GRADIENT, self.index_of(param)))
        if isinstance(grad, DTensor):
            key = key.at(offset=key.offset + (first_index(grad) or 0))
        return quantize(own, fmt, key=key, backend="auto" if self.backend == "qtorch" else self.backend)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """See :meth:`LangevinOptimizer.step`."""
        self.saturated = []
        if self._measure_next is not None:
            self.measured = []
        loss = super().step(closure)
        self._measure_next = self._keep_next = None
        return loss

    # ---------------------------------------------------------------------------------------------------- statistics

    def measure(self, max_elements: int = 2**16) -> None:
        """Measure the next step: :attr:`measured` then holds one :class:`StepStatistics` per parameter.

        Args:
            max_elements: Larger tensors are measured on evenly spaced indices of dim 0.
        """
        self._measure_next = max_elements

    def keep_gradients(self, max_elements: int = 2**16) -> None:
        """Keep the next step's gradients, so that a measurement of the step after knows their minibatch noise.

        Args:
            max_elements: As :meth:`measure`, and the same number.
        """
        self._keep_next = max_elements

    def _measure(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Measure the step of a group's parameters, if that was asked for; to be called before it is made."""
        if self._measure_next is not None:
            for param, grad in zip(params, grads):
                what = Measurement(
                    self.name_of(param), self._draw_key(group, param), self.index_of(param), self._measure_next,
                    self._noise_per_temperature(group), self._kept.pop(param, None),
                )  # fmt: skip
                self.measured.append(self._statistics(group, param, grad, what))
        if self._keep_next is not None:
            for param, grad in zip(params, grads):
                (some,) = same_rows([local_part(grad)], self._formats_of_a_step, self._keep_next)
                self._kept[param] = some.detach().clone()

    @property
    def _formats_of_a_step(self) -> tuple[NumberFormat | None, ...]:
        """Whose blocks decide which elements are measured."""
        return self.weight_format, self.gradient_format

    def _noise_per_temperature(self, group: dict[str, Any]) -> float:
        """What T = 1 would ask for: of a weight's variance per step."""
        return 2.0 * self.step_size(group) / self.num_data

    def _seen(self, found: StepStatistics, param: Tensor, what: Measurement) -> StepStatistics:
        """Statistics of a sum's step, with the variance of the weight around that sum."""
        if self.accumulator_format is None or not self.keeps_sum(param):
            return found
        assert self.weight_format is not None
        (total,) = same_rows([local_part(self.accumulator_of(param))], [self.weight_format], what.max_elements)
        return replace(found, view_rounding=float(rounding_variance(total, self.weight_format).mean()))

    @abstractmethod
    def _statistics(self, group: dict[str, Any], param: Tensor, grad: Tensor, what: Measurement) -> StepStatistics:
        """What the step that is about to be made does to a parameter's noise; changes nothing."""

    def saturation_counts(self) -> dict[str, int]:
        """Values outside the range of the weight format in the last step, by parameter name (synchronizes)."""
        return {
            self.name_of(param): int(count)
            for params, counts in self.saturated
            for param, count in zip(params, counts.tolist())
        }
