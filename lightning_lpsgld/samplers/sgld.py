"""Stochastic gradient Langevin dynamics, with weights, gradients and accumulators in low precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from lightning_lpsgld.arguments import require_choice, require_number
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.coded import plain
from lightning_lpsgld.ops.lattice import RATES, Rates
from lightning_lpsgld.ops.spec import Accumulation
from lightning_lpsgld.samplers.coded_steps import stored_steps_
from lightning_lpsgld.samplers.in_backward import CodedSampler
from lightning_lpsgld.samplers.options import GridOptions
from lightning_lpsgld.samplers.shards import local_part
from lightning_lpsgld.samplers.statistics import Measurement, StepStatistics, step_statistics

__all__ = ["SGLD"]

#: Noise of the gradient that the lattice walk is told: for all parameters, or by parameter.
GradientStd = float | Callable[[Tensor], float | Tensor]


class SGLD(CodedSampler):
    r"""Stochastic gradient Langevin dynamics in low precision.

    The loss is a batch **mean**; the target is :math:`p(\theta \mid D)^{1/T}` and one step injects noise of variance
    :math:`v = 2\eta T/N`. The variants of the paper, with their equations in :mod:`.updates`:

    =====================  =============================================================================
    SGD / SGLD             ``weight_format=None``
    SGDLP-F / SGLDLP-F     ``weight_format=..., accumulator="full"``
    SGDLP-L                ``weight_format=..., accumulator="low", temperature=0``
    naive SGLDLP-L         ``weight_format=..., accumulator="low", variance_corrected=False``
    VC SGLDLP-L            ``weight_format=..., accumulator="low"`` (``variance_corrected=True``)
    between -L and -F      ``weight_format="bfp8", accumulator="bfp16"``: -L on a grid of 16 bits, seen as 8
    lattice                ``weight_format=..., variant="lattice"``: not of the paper
    =====================  =============================================================================

    The "SGD" rows are those with ``temperature=0``; each row is cyclical with
    ``schedule=CyclicalStepSize(...)``.

    Args:
        params: Iterable of parameters or of parameter groups; float32, or a dtype that can hold ``weight_format``.
        lr: Step size η >= 0 per batch-mean loss; every LR scheduler of PyTorch applies.
        num_data: N, number of training examples (not batches, not divided by the world size).
        variant: ``"auto"``: the table above. ``"lattice"``: the walk between neighbouring grid points of
            :mod:`lightning_lpsgld.ops.lattice`, which has the right law where rounding alone has more variance than v.
            It needs T > 0, a fixed-point or block ``weight_format`` and a low accumulator; it has no fused kernels, so
            ``backend`` holds for the gradient's rounding only.
        rates: Jump odds of the walk. ``"bernoulli"`` survives the noise of minibatches, ``"exponential"`` is exact
            with exact gradients; see there.
        gradient_std: With exponential rates: s >= 0, the standard deviation of the minibatch noise in the gradient of
            the batch-mean loss, which the walk then takes out of its odds. A float, or a callable from a parameter to a
            float or to a tensor that broadcasts to it (of a sharded one: a float), called in every step. Estimate it
            from other batches than the present one.
        options: See :class:`~lightning_lpsgld.samplers.options.GridOptions`.

    State (all in ``state_dict``): per group ``step``, ``seed``, ``temperature``, ``lr``, ``weight_decay``; per
    parameter ``accumulator`` (unless ``"low"``), ``shrinkage`` (only where :meth:`compensate` set it).

    Raises:
        ValueError: If an argument is out of range, ``weight_format`` is wider than a parameter's dtype, or
            ``variant="lattice"`` is given what it cannot walk on.

    Note:
        The temperature's default is the textbook's 1: this class promises the posterior. The Lightning plugin's default
        is the papers' 1e-3, because T = 1 costs a short training of a deep net several points of error.

        Where stochastic rounding alone has more variance than v, no unbiased rounding can have v; the excess is counted
        by :meth:`measure`, not hidden.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = SGLD(model.parameters(), lr=0.1, num_data=50_000, weight_format="bfp8", gradient_format="bfp8")
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = model(torch.ones(1, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)

    Reference:
        Zhang, Wilson & De Sa, 2022, arXiv:2206.09909; Welling & Teh, 2011.
    """

    takes_shards = True

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        num_data: int,
        variant: Literal["auto", "lattice"] = "auto",
        rates: Rates = "bernoulli",
        gradient_std: GradientStd = 0.0,
        **options: Unpack[GridOptions],
    ) -> None:
        require_choice("variant", variant, ("auto", "lattice"))
        require_choice("rates", rates, RATES)
        if callable(gradient_std) or gradient_std != 0:
            _check_gradient_std(gradient_std, variant, rates)
        self.variant = variant
        self.rates: Rates = rates
        self.gradient_std: GradientStd = gradient_std
        super().__init__(params, {}, lr=lr, num_data=num_data, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.check_group`.

        Raises:
            TypeError, ValueError: Also if ``variant="lattice"`` cannot walk with the group's temperature or the
                formats.
        """
        super().check_group(group)
        if self.variant == "lattice":
            self._check_lattice(float(group["temperature"]))

    def _check_lattice(self, temperature: float) -> None:
        uneven = self.weight_format is not None and not self.weight_format.linear
        if self.weight_format is None or uneven or self.accumulator != "low":
            raise ValueError(
                "`variant='lattice'` walks on the grid of the weights: it needs a fixed-point or block `weight_format` "
                f"and accumulator='low', got {self.weight_format} and {str(self.accumulator)!r}."
            )
        if temperature == 0:
            raise ValueError(
                "`variant='lattice'` needs `temperature` > 0, got 0: the odds of its jumps are those of a target "
                "p(theta | D)^(1/T). Use variant='auto' for low-precision SGD."
            )

    # --------------------------------------------------------------------------------------------------------- facts

    def accumulation(self, param: Tensor) -> Accumulation:
        """How the steps of a parameter are summed and rounded."""
        mode = super().accumulation(param)
        return "lattice" if self.variant == "lattice" and mode in ("vc", "naive") else mode

    @property
    def description(self) -> str:
        """Name of the variant, for display."""
        kind = "SGD" if all(float(g["temperature"]) == 0 for g in self.sampled_groups) else "SGLD"
        if self.weight_format is None:
            return f"{kind} (weights not rounded)"
        if self.variant == "lattice":
            return f"lattice SGLDLP-L ({self.rates} rates)"
        if self.accumulator == "full":
            return f"{kind}LP-F (full-precision accumulator)"
        if kind == "SGD":
            return "SGDLP-L" + ("" if self.accumulator == "low" else f" ({self.accumulator} accumulator)")
        width = "low-precision" if self.accumulator == "low" else str(self.accumulator)
        return ("VC " if self.variance_corrected else "naive ") + f"SGLDLP-L ({width} accumulator)"

    def spec(
        self,
        group: dict[str, Any],
        accumulation: Accumulation,
        shrinkage: float = 1.0,
        gradient_std: float | Tensor = 0.0,
    ) -> StepSpec:
        """What the current step does to the parameters of a group that share an accumulation, a divisor and a noise."""
        exempt = accumulation == "float" and self.weight_format is not None
        return StepSpec(
            lr=self.step_size(group) / shrinkage,
            weight_decay=float(group["weight_decay"]) * shrinkage,
            noise_variance=self.noise_variance(group),
            weight_format=self._grid_of(accumulation),
            gradient_format=None if exempt else self.gradient_format,
            accumulation=accumulation,
            rates=self.rates,
            gradient_std=gradient_std * shrinkage,  # noise of the rounded gradient, which is divided by q with it
        )

    def _noise_told(self, param: Tensor) -> float | Tensor:
        if not callable(self.gradient_std):
            return self.gradient_std
        told = self.gradient_std(param)
        if isinstance(told, Tensor) and isinstance(param, DTensor):
            raise TypeError(
                f"SGLD: `gradient_std` gave a tensor for {self.name_of(param)}, which is sharded. Give a float per "
                "parameter, or use DDPStrategy."
            )
        return told

    # ------------------------------------------------------------------------------------------------------ stepping

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the parameters of a group; see :func:`.updates.langevin_step_` for the equations."""
        modes: dict[tuple[Accumulation, float, int], list[int]] = {}
        for i, param in enumerate(params):
            alone = i if callable(self.gradient_std) else -1
            modes.setdefault((self.accumulation(param), self.shrinkage_of(param), alone), []).append(i)
        self._measure(group, params, grads)
        for (accumulation, shrinkage, _), chosen in modes.items():
            some = [params[i] for i in chosen]
            sums = [self.accumulator_of(p) for p in some]
            accumulators = sums if accumulation == "full" else None
            keys = [self._draw_key(group, p) for p in some]
            indices = [self.index_of(p) for p in some]
            spec = self.spec(group, accumulation, shrinkage, self._noise_told(some[0]))
            drifts = [grads[i] for i in chosen]
            if self.prior_mean != "zero":
                drifts = [self.drift_of(group, p, g) for p, g in zip(some, drifts)]
                spec = replace(spec, weight_decay=0.0, gradient_format=None)
            moved = some if accumulation == "full" else sums
            counts = stored_steps_(moved, drifts, accumulators, spec, keys, indices, backend=self.backend)
            if accumulators is None and self.keeps_sum(some[0]):
                counts = counts + self._look(group, some)
            self.saturated.append((some, counts))

    def _statistics(self, group: dict[str, Any], param: Tensor, grad: Tensor, what: Measurement) -> StepStatistics:
        accumulation = self.accumulation(param)
        theta = plain(self.accumulator_of(param))
        spec = self.spec(group, accumulation, self.shrinkage_of(param), self._noise_told(param))
        found = step_statistics(local_part(theta), local_part(grad), spec, what)  # of sharded ones, this rank's part
        found = self._seen(found, param, what)
        if self.prior_mean == "zero":
            return found
        about = replace(spec, weight_decay=0.0, gradient_format=None)
        drift = self.drift_of(group, param, grad)
        # What rounding the gradient adds, and its minibatch noise, are those of the gradient alone, before the pull.
        pulled = self._seen(step_statistics(theta, drift, about, what), param, what)
        return replace(pulled, gradient_rounding=found.gradient_rounding, minibatch=found.minibatch)


def _check_gradient_std(gradient_std: GradientStd, variant: str, rates: str) -> None:
    if variant != "lattice" or rates != "exponential":
        raise ValueError(
            "`gradient_std` is what the lattice walk with exponential rates is told: it needs variant='lattice' and "
            f"rates='exponential', got {variant!r} and {rates!r}. Leave it at 0."
        )
    if not callable(gradient_std):
        require_number("gradient_std", gradient_std, remedy="A callable from parameters to such numbers will do, too.")
