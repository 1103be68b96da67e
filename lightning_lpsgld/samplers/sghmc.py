"""Stochastic gradient Hamiltonian Monte Carlo, with weights, velocities and gradients in low precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_lpsgld.arguments import require_choice, require_flag, require_number
from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_format
from lightning_lpsgld.ops.spec import Accumulation
from lightning_lpsgld.samplers.options import GridOptions
from lightning_lpsgld.samplers.paired import PairedSampler
from lightning_lpsgld.samplers.statistics import Measurement, StepStatistics
from lightning_lpsgld.samplers.underdamped import Flow, UnderdampedSpec, exact_flow, underdamped_steps_
from lightning_lpsgld.samplers.underdamped_statistics import underdamped_statistics

__all__ = ["SGHMC"]

S = TypeVar("S", bound="SGHMC")


class SGHMC(PairedSampler):
    r"""Underdamped Langevin dynamics (SGHMC) in low precision, by the exact integrator of :mod:`.underdamped`.

    The loss L is a batch **mean**; the target is :math:`p(\theta \mid D)^{1/T}` times a Gaussian for the velocity,

    .. math::
        \exp\!\Big(-\tfrac{N}{T}\big(L(\theta) + \tfrac{\lambda}{2}\lVert\theta\rVert^2
        + \tfrac{1}{2u}\lVert v\rVert^2\big)\Big)

    so the drift is :math:`-u(\nabla L + \lambda\theta)`, all noise variances are those of :mod:`.underdamped` times
    T/N, and a velocity has the standard deviation :math:`\sqrt{uT/N}`, in weight units per unit of time.

    =====================  =============================================================================
    SGHMC                  ``weight_format=None``
    SGHMCLP-F              ``weight_format=..., accumulator="full"``: θ and v are summed in float32
    naive SGHMCLP-L        ``weight_format=..., velocity_format=..., variance_corrected=False``
    VC SGHMCLP-L           ``weight_format=..., velocity_format=...``
    between -L and -F      ``weight_format="bfp8", accumulator="bfp16", velocity_format="bfp16"``, say
    =====================  =============================================================================

    Args:
        params: Iterable of parameters or of parameter groups; as for :class:`SGLD`.
        lr: η >= 0, the **time** of a step, not SGD's step size: from rest, a step moves a weight by about
            :math:`u\eta^2/2` per unit of gradient. SGD with learning rate a and momentum m is, to leading order,
            :math:`\eta = \sqrt{a/u}` and :math:`\gamma = (1 - m)/\eta`.
        num_data: N, number of training examples.
        friction: γ > 0, per unit of time; the velocity is forgotten after a time 1/γ.
        inverse_mass: u > 0.
        velocity_format: Grid of the velocities, unless the accumulator is full; ``None``: float32.
        rescale_velocity: A fixed-point velocity is stored as v = S·(value on the grid), with one scale S per tensor,
            chosen at every step as the smallest power of two at which neither mean nor noise leaves the range. A power
            of two keeps the arithmetic exact and lets S change without rounding error; without it |v| is often below
            the gap. Block formats have their own scales and are not touched.
        drift: ``"corrected"``. ``"paper"``: as printed and coded by the authors: a plus before the gradient term of the
            position, and with variance correction independent noise of position and velocity. The stationary variance
            is then wrong (at u = 2, γ = 3, η = 0.09 it is 1.44 instead of 1.03 for U = x²/2). Only for comparisons.
        options: See :class:`~lightning_lpsgld.samplers.options.GridOptions`. At ``temperature=0`` this is
            (low-precision) gradient descent with momentum. Without a ``weight_format`` velocities are not rounded
            either, nor are those of ``full_precision`` parameters; with ``accumulator="full"`` velocities are float32
            too (SGHMCLP-F).

    State (all in ``state_dict``): per group ``step``, ``seed``, ``temperature``, ``lr``, ``weight_decay``,
    ``friction``, ``inverse_mass``; per parameter ``velocity`` (float32, weight units per time, on its grid; starts at
    0), ``velocity_scale`` (0-d, only where rescaled), ``accumulator`` (unless ``"low"``), ``shrinkage``
    (only where :meth:`compensate` set it).

    Raises:
        ValueError: If an argument is out of range, a format is wider than its tensor's dtype, or a velocity format is
            given together with ``accumulator="full"``.

    Note:
        One step adds only :math:`\mathrm{Var}\,\xi_x \approx \tfrac23 u\gamma\eta^3 T/N` to a weight. Where stochastic
        rounding alone has more, the position's variance is larger than asked for (velocity and covariance stay right);
        :meth:`measure` has the excess. Velocities of sharded parameters are scaled per shard.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = SGHMC(model.parameters(), lr=0.1, num_data=50_000, friction=2.0, weight_format="bfp8",
        ...             velocity_format="bfp8")
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = model(torch.ones(1, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = opt.step(closure)

    Reference:
        Wang, Chen, Song & Zhang, "Enhancing low-precision sampling via stochastic gradient Hamiltonian Monte Carlo",
        arXiv:2310.16320, equations 3 to 8 (with another sign, see ``drift``); Chen, Fox & Guestrin, 2014.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        num_data: int,
        friction: float,
        inverse_mass: float = 1.0,
        velocity_format: FormatLike | None = None,
        rescale_velocity: bool = True,
        drift: Literal["corrected", "paper"] = "corrected",
        **options: Unpack[GridOptions],
    ) -> None:
        require_choice("drift", drift, ("corrected", "paper"))
        if velocity_format is not None and options.get("accumulator") == "full":
            raise ValueError(
                "`velocity_format` has no place with accumulator='full': SGHMCLP-F keeps the velocity in float32. Use "
                "accumulator='low', or velocity_format=None."
            )
        self.velocity_format: NumberFormat | None = None if velocity_format is None else parse_format(velocity_format)
        if self.velocity_format is not None:
            check_dtype(self.velocity_format, torch.float32)
        self.rescale_velocity = require_flag("rescale_velocity", rescale_velocity)
        self.drift = drift
        extra = {"friction": friction, "inverse_mass": inverse_mass}
        super().__init__(params, extra, lr=lr, num_data=num_data, **options)

    @classmethod
    def from_optimizer(cls: type[S], optimizer: Optimizer, **options: Any) -> S:
        """As :meth:`LangevinOptimizer.from_optimizer`; ``friction`` must be among ``options``.

        The learning rate is taken as the **time** of a step (see ``lr``), and momentum is not translated.
        """
        for group in optimizer.param_groups:
            for name in ("friction", "inverse_mass"):
                group.pop(name, None)
        return super().from_optimizer(optimizer, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.check_group`.

        Raises:
            TypeError, ValueError: Also if ``friction`` or ``inverse_mass`` is not finite and positive.
        """
        super().check_group(group)
        for name in ("friction", "inverse_mass"):
            require_number(name, group[name], above=0.0)

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def description(self) -> str:
        """Name of the variant, for display."""
        if self.weight_format is None:
            name = "SGHMC (weights not rounded)"
        elif self.accumulator == "full":
            name = "SGHMCLP-F (full-precision accumulators)"
        else:
            kind, velocity = "VC" if self.variance_corrected else "naive", self.velocity_format or "not rounded"
            width = "" if self.accumulator == "low" else f"{self.accumulator} accumulator, "
            name = f"{kind} SGHMCLP-L ({width}velocity {velocity})"
        return name if self.drift == "corrected" else f"{name}, drift as printed"

    @property
    def formats(self) -> dict[str, str]:
        """Role of each rounded quantity and its format, for display."""
        rounded = self.weight_format is not None and self.velocity_format is not None
        return {**super().formats, **({"velocities": str(self.velocity_format)} if rounded else {})}

    def flow(self, group: dict[str, Any], accumulation: Accumulation = "float") -> Flow:
        """Linear map and noise covariance of the current step of a group."""
        flow = exact_flow(self.step_size(group), float(group["friction"]), float(group["inverse_mass"]))
        noise = self.schedule.noise(group["step"])
        flow = flow.heated(float(group["temperature"]) / self.num_data if noise else 0.0)
        if self.drift == "paper":
            flow = replace(flow, shift=-flow.shift, cov=0.0 if accumulation == "vc" else flow.cov)
        return flow

    def noise_variance(self, group: Any) -> float:
        r"""Variance :math:`\mathrm{Var}\,\xi_x` that the current step adds to a weight; 0 without noise."""
        return self.flow(group).var_x

    # ------------------------------------------------------------------------------------------------------ stepping

    def velocity_of(self, param: Tensor) -> Tensor:
        """Velocity of a parameter, zero before its first step: float32 or wider, weight units per time."""
        state = self.state[param]
        if "velocity" not in state:
            wide = torch.promote_types(param.dtype, torch.float32)
            state["velocity"] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
        velocity: Tensor = state["velocity"]
        return velocity

    def _spec(self, group: dict[str, Any], param: Tensor) -> UnderdampedSpec:
        accumulation, shrinkage = self.accumulation(param), self.shrinkage_of(param)
        flow = self.flow(group, accumulation)
        return UnderdampedSpec(
            flow=replace(flow, kick=flow.kick / shrinkage, shift=flow.shift / shrinkage),
            weight_decay=float(group["weight_decay"]) * shrinkage,
            weight_format=self._grid_of(accumulation),
            velocity_format=self.velocity_format,
            gradient_format=self.gradient_format_of(param),
            accumulation=accumulation,
            rescale=self.rescale_velocity,
        )

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the parameters of a group; see :func:`.underdamped.underdamped_step_` for the equations."""
        self._measure(group, params, grads)
        specs, velocities = [self._spec(group, p) for p in params], [self.velocity_of(p) for p in params]
        counts, scales = self._move(underdamped_steps_, group, params, grads, velocities, specs)
        for param, scale in zip(params, scales):
            if scale is not None:
                self.state[param]["velocity_scale"] = scale
        self._note_saturated(group, params, counts)

    @property
    def _formats_of_a_step(self) -> tuple[NumberFormat | None, ...]:
        return self.weight_format, self.velocity_format, self.gradient_format

    def _statistics(self, group: dict[str, Any], param: Tensor, grad: Tensor, what: Measurement) -> StepStatistics:
        state = self.state.get(param, {})
        velocity = state.get("velocity")
        if velocity is None:
            velocity = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        theta = self.accumulator_of(param)
        at_one = exact_flow(self.step_size(group), float(group["friction"]), float(group["inverse_mass"]))
        theta, spec, at_one = theta.to(velocity.dtype), self._spec(group, param), at_one.heated(1.0 / self.num_data)
        found = self._seen(underdamped_statistics(theta, velocity, grad, spec, what, at_one), param, what)
        if self.prior_mean == "zero":
            return found
        about, drift = replace(spec, weight_decay=0.0, gradient_format=None), self.drift_of(group, param, grad)
        pulled = self._seen(underdamped_statistics(theta, velocity, drift, about, what, at_one), param, what)
        return replace(pulled, gradient_rounding=found.gradient_rounding, minibatch=found.minibatch)
