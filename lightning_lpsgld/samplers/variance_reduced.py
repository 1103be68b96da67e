"""What SVRG and HALP share: a centre with its full gradient, and steps that evaluate the closure at both points."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lpsgld.arguments import require_choice, require_count, require_flag, require_seed
from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_format
from lightning_lpsgld.ops import StepSpec
from lightning_lpsgld.ops.dispatch import BACKENDS, BackendName
from lightning_lpsgld.ops.spec import Accumulation
from lightning_lpsgld.samplers.base import LangevinOptimizer
from lightning_lpsgld.samplers.passes import at_point, traceless
from lightning_lpsgld.samplers.step_size import StepSize

__all__ = ["VarianceReduced", "corrected_gradient"]

S = TypeVar("S", bound="VarianceReduced")


def corrected_gradient(point: Tensor | None, centre: Tensor | None, full: Tensor) -> Tensor:
    r"""Variance-reduced gradient :math:`\nabla f_i(w) - \nabla f_i(\tilde w) + \nabla f(\tilde w)`.

    Args:
        point: Gradient of the batch at w; ``None`` counts as zero.
        centre: Gradient of the same batch at the centre; ``None`` counts as zero.
        full: Gradient of all data at the centre, any float dtype.

    Returns:
        Tensor of the shape and dtype of ``full``; a new one.
    """
    out = full.clone() if point is None else point - centre + full if centre is not None else point + full
    return out - centre if point is None and centre is not None else out


class VarianceReduced(LangevinOptimizer):
    r"""Base of SVRG and HALP: steps along :math:`\nabla f_i(w) - \nabla f_i(\tilde w) + \nabla f(\tilde w)`.

    :meth:`recentre` takes the current point as the centre :math:`\tilde w` and the gradient of all data there; a
    subclass says how a centre is taken up (:meth:`place_centre`) and how parameters move (:meth:`update`).

    Weight decay λ is part of the objective everywhere: a step adds :math:`\lambda w` at the point itself, and the
    gradient that sets HALP's scale has its :math:`\lambda\tilde w`.

    Args:
        params: As :class:`LangevinOptimizer`.
        group_options: Further options of a group.
        lr: Step size.

    The other arguments are those of :class:`~lightning_lpsgld.samplers.options.CentredOptions`; their defaults stand
    here. ``gradient_format`` is that of the *corrected* gradient.
    """

    group_counters = ("seed", "step", "inner", "first_loss", "least_gradient")

    def __init__(
        self,
        params: Any,
        group_options: dict[str, Any],
        *,
        lr: float,
        num_data: int = 1,
        temperature: float = 0.0,
        weight_decay: float = 0.0,
        gradient_format: FormatLike | None = None,
        variance_corrected: bool = True,
        seed: int = 0,
        backend: BackendName = "auto",
        schedule: StepSize | None = None,
        full_precision: Iterable[Tensor] = (),
        period: int | None = None,
        check_finite: bool = True,
    ) -> None:
        if period is not None:
            require_count("period", period, unit="steps between two centres", remedy="None: one centre an epoch.")
        require_choice("backend", backend, ("auto", *BACKENDS))
        require_flag("variance_corrected", variance_corrected)
        self.gradient_format: NumberFormat | None = None if gradient_format is None else parse_format(gradient_format)
        self.variance_corrected = variance_corrected
        self.backend = backend
        self.full_precision = set(full_precision)
        self.period = period
        self.saturated: list[tuple[Tensor, Tensor]] = []
        seed = require_seed("seed", seed)
        defaults = {"lr": lr, "weight_decay": weight_decay, "temperature": temperature, "seed": seed, "inner": 0}
        defaults.update(group_options)
        super().__init__(params, defaults, num_data=num_data, schedule=schedule, check_finite=check_finite)
        if self.gradient_format is not None:
            for param in set(self._indices) - self.full_precision:
                check_dtype(self.gradient_format, param.dtype)

    @classmethod
    def from_optimizer(cls: type[S], optimizer: Optimizer, **options: Any) -> S:
        """As :meth:`LangevinOptimizer.from_optimizer`.

        Raises:
            ValueError: Also for any ``accumulator`` but ``"low"``: what these methods sum is the offset itself.
        """
        accumulator = options.pop("accumulator", "low")
        if accumulator != "low":
            raise ValueError(
                f"{cls.__name__} has no accumulator={str(accumulator)!r}: it sums its steps between two centres, which "
                "are in full precision. Leave `accumulator` at 'low', or use SGLD, SGHMC or PreconditionedSGLD."
            )
        for group in optimizer.param_groups:
            group.pop("inner", None)
        return super().from_optimizer(optimizer, **options)

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def centred(self) -> bool:
        """Whether there is a centre."""
        return any("full_gradient" in state for state in self.state.values())

    @property
    def inner_steps(self) -> int:
        """Steps taken since the last :meth:`recentre`."""
        return int(self.param_groups[0]["inner"])

    def due(self, *, first_batch: bool) -> bool:
        """Whether a loop that steps by itself must recentre now.

        Args:
            first_batch: Whether the next step is the first of an epoch.
        """
        if not self.centred:
            return True
        return first_batch if self.period is None else self.inner_steps >= self.period

    def spec(self, group: dict[str, Any], fmt: NumberFormat | None, *, exempt: bool = False) -> StepSpec:
        """What the current step does to one parameter; ``exempt`` ones do not round their gradient either."""
        variance = self.noise_variance(group)
        rounded: Accumulation = "vc" if self.variance_corrected and variance > 0 else "naive"
        return StepSpec(
            lr=self.step_size(group),
            weight_decay=float(group["weight_decay"]),
            noise_variance=variance,
            weight_format=fmt,
            gradient_format=None if exempt else self.gradient_format,
            accumulation="float" if fmt is None else rounded,
        )

    # --------------------------------------------------------------------------------------------------- the centre

    @abstractmethod
    def point_of(self, param: Tensor) -> Tensor:
        """Current point of a parameter in the dtype of its centre."""

    @abstractmethod
    def place_centre(self, params: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Start the inner loop of parameters whose ``centre`` and ``full_gradient`` have just been set."""

    def check_centre(self, work: list[tuple[dict[str, Any], Tensor, Tensor]], loss: Any) -> None:
        """Refuse a new centre, before anything is changed; ``work`` are group, parameter with gradient, and point."""

    def check_step(self, params: list[Tensor], at_centre: list[Tensor | None]) -> None:
        """Refuse a step, before anything is changed; parameters hold their gradients at the point, not corrected yet.

        Args:
            params: Parameters with a centre.
            at_centre: Their gradients there, on the same batch.
        """

    @torch.no_grad()
    def recentre(self, full_closure: Callable[[], Any]) -> Any:
        r"""Take the current point as the centre, with the gradient of all data there; call it before each epoch.

        Parameters then hold the centre, and offsets are zero.

        Args:
            full_closure: Zeroes gradients, runs over all data and leaves the **exact mean** gradient in ``.grad``;
                :func:`.passes.full_gradient` makes one that weights batches by their size. Without weight decay, which
                is added here. It runs with gradients enabled; BatchNorm statistics and torch's generators are given
                back afterwards, so that an epoch sees the same shuffling and dropout with and without it.

        Returns:
            The closure's value.

        Raises:
            FloatingPointError: If a gradient is NaN or infinite; then the old centre stays.
            RuntimeError: If no parameter got a gradient.
        """
        self._check_settings()
        params = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        points = [self.point_of(p) for _, p in params]
        with traceless([p for _, p in params]):
            for (_, param), point in zip(params, points):
                param.copy_(point)
                param.grad = None
            with torch.enable_grad():
                value = full_closure()
        work = [(g, p, point) for (g, p), point in zip(params, points) if p.grad is not None]
        if not work:
            raise RuntimeError(
                "recentre: `full_closure` left no gradient. It must run backward over all data, e.g. "
                "full_gradient(loss_of, batches, params)."
            )
        self._refuse_non_finite(value, [(g, [p], [p.grad]) for g, p, _ in work])
        self.settle()  # after a pass over all data there is nothing to gain from reading it later
        self.check_centre(work, value)
        for _, param, point in work:
            assert param.grad is not None
            self.state[param].update(centre=point.clone(), full_gradient=param.grad.detach().clone())
            param.grad = None
        self.place_centre([(g, p) for g, p, _ in work])
        for group in self.param_groups:
            group["inner"] = 0
        return value

    # ------------------------------------------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        centre_closure: Callable[[], Any] | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> Any:
        """Evaluate ``closure`` at the centre and at the point on the same batch, then move.

        The centre comes first, and leaves no trace: torch's generators are set back, so that both passes draw the same
        dropout masks, and buffers (BatchNorm statistics) are restored. Parameters are restored also if it raises.

        Args:
            closure: Re-evaluates the model, runs backward and returns the loss. Required. Gradients that were present
                before are dropped.
            centre_closure: Evaluated at the centre instead of ``closure``, e.g. one that does not log.
            before_update: Called once ``.grad`` holds the corrected gradient, e.g. to clip it.

        Returns:
            The closure's value at the point.

        Raises:
            TypeError: Without a closure, or if a gradient is sparse.
            RuntimeError: If there is no centre yet.
            FloatingPointError: As :meth:`LangevinOptimizer.step`.
        """
        if closure is None:
            raise TypeError(
                f"{type(self).__name__}.step needs a closure: the gradient is taken at two points. Pass a function "
                "that zeroes gradients, computes the loss, calls backward and returns the loss."
            )
        if not self.centred:
            raise RuntimeError(f"{type(self).__name__}: call `recentre(full_closure)` before the first step.")
        self.saturated = []

        def corrected() -> Any:
            value = self._evaluate_pair(closure, centre_closure or closure)
            if before_update is not None:
                before_update()
            return value

        value = super().step(corrected)
        for group in self.param_groups:
            group["inner"] += 1
        return value

    def _evaluate_pair(self, closure: Callable[[], Any], centre_closure: Callable[[], Any]) -> Any:
        params = [p for p in self._indices if "full_gradient" in self.state.get(p, ())]
        with at_point(params, [self.state[p]["centre"] for p in params]):
            with traceless(params):
                centre_closure()
            at_centre = [None if p.grad is None else p.grad.detach().clone() for p in params]
        for param in self._indices:
            param.grad = None
        value = closure()
        with torch.no_grad():
            self.check_step(params, at_centre)
            for param, centre in zip(params, at_centre):
                param.grad = corrected_gradient(param.grad, centre, self.state[param]["full_gradient"])
        return value

    def saturation_counts(self) -> dict[str, int]:
        """Values outside the range of their grid in the last step, by parameter name (synchronizes)."""
        return {self.name_of(param): int(count) for param, count in self.saturated}
