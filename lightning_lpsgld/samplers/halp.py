"""High-accuracy low precision: SVRG whose offset from a full-precision centre is kept in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_lpsgld.arguments import require_choice, require_count, require_flag, require_number
from lightning_lpsgld.formats import (
    FixedPoint,
    FormatLike,
    NumberFormat,
    check_dtype,
    parse_format,
)
from lightning_lpsgld.ops import Encoded, decode, encode, quantize
from lightning_lpsgld.random import Role, stream_id
from lightning_lpsgld.samplers import box
from lightning_lpsgld.samplers.base import log
from lightning_lpsgld.samplers.options import CentredOptions
from lightning_lpsgld.samplers.updates import langevin_step_
from lightning_lpsgld.samplers.variance_reduced import VarianceReduced

__all__ = ["HALP", "offset_gap"]

#: Standard deviations of the posterior, sqrt(T / (N mu)) at most, that the box of the offsets holds beside the minimum.
_THERMAL_REACH = 6.0


def offset_gap(
    gradient_norm: float, mu: float, code_max: int, *, noise_scale: float = 0.0, power_of_two: bool = False
) -> float:
    r"""Gap of the offsets, :math:`\delta = \left(\|\nabla f(\tilde w)\|/\mu + 6\sigma\right)/(2^{b-1}-1)`.

    A μ-strongly convex f has its minimum within :math:`\|\nabla f(\tilde w)\|/\mu` of the centre, so it lies in the box
    of the offsets, and the grid shrinks with the gradient.

    Args:
        gradient_norm: Norm of the full gradient at the centre, >= 0.
        mu: μ > 0.
        code_max: Largest code, :math:`2^{b-1}-1`.
        noise_scale: σ, bound :math:`\sqrt{T/(N\mu)}` on the posterior's standard deviation; 0 without temperature.
        power_of_two: Round the gap up to a power of two, so that centre + offset is formed without rounding the offset;
            the grid is up to twice as coarse.

    Returns:
        δ, in units of the parameter; 0 for a zero gradient at zero temperature: nothing is left to move.

    Example:
        >>> offset_gap(254.0, 2.0, 127), offset_gap(300.0, 2.0, 127, power_of_two=True)
        (1.0, 2.0)

    Reference:
        De Sa et al., 2018, "High-accuracy low-precision training", arXiv:1803.03383, algorithm 3 (σ = 0).
    """
    gap = (gradient_norm / mu + _THERMAL_REACH * noise_scale) / code_max
    if power_of_two and gap > 0:
        mantissa, exponent = math.frexp(gap)
        gap = math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)
    return gap


class HALP(VarianceReduced):
    r"""SVRG with bit centring: linear convergence to full precision with offsets of 8 bits.

    Around a full-precision centre :math:`\tilde w` with full gradient :math:`\tilde g` an inner loop moves

    .. math::
        z \leftarrow Q_{(\delta, b)}\!\left(z - \eta\,[\nabla f_i(\tilde w + z) - \nabla f_i(\tilde w) + \tilde g
        + \lambda(\tilde w + z)]\right), \qquad \delta = \frac{\|\tilde g + \lambda\tilde w\|}{\mu\,(2^{b-1}-1)}

    from z = 0, with stochastic rounding; :meth:`recentre` adds z to the centre. Parameters always hold
    :math:`\tilde w + z` (as float). With a temperature the rounding is Q^vc with variance 2ηT/N (variance-reduced
    low-precision Langevin), and the box is widened by six posterior standard deviations.

    Codes are **symmetric**, :math:`|k| \le 2^{b-1}-1`, so that the box is exactly :math:`\pm s`; the published code has
    one more negative code. Saturated offsets are counted (:meth:`saturation_counts`).

    Args:
        params: Iterable of parameters or of parameter groups; a group may have its own ``mu``.
        lr: Step size η >= 0 per batch-mean loss.
        mu: Strong convexity μ > 0 of the loss; where there is none, a hyper-parameter (larger: finer grid, smaller box;
            20 for a ResNet in the published code). **Not the L2 coefficient**: far below the curvature the grid is so
            coarse that rounding outgrows the steps; such a run is refused within its first inner loops, with the
            curvature that it met. ``None`` only with a block ``offset_format``.
        word_length: b, bits of an offset, 2 to 16.
        offset_format: ``None``: fixed point with the scale above. A block format such as ``"bfp8"``: each block's
            exponent follows its own offsets, which needs no μ and has no box.
        scale: Norm in δ: each ``"tensor"``'s own (the published code), or the ``"global"`` norm, for which the promise
            that the minimum lies in the box is proved.
        power_of_two: Round δ up to a power of two.
        centre_dtype: Dtype of the centre; by default the parameter's, at least float32. With float64 beside float32
            parameters centres add up without loss, but gradients are still those of a float32 point.
        check_mu: Refuse a run that diverges: a full gradient ten times the smallest one so far, with a loss above the
            first, or a step's gradient a hundred times its centre's. Above what temperature alone gives a gradient.
        options: See :class:`~lightning_lpsgld.samplers.options.CentredOptions`. Weight decay is of centre *and* offset;
            a block ``gradient_format`` keeps the linear rate, a fixed one does not; ``full_precision`` parameters are
            moved by plain SVRG.


    State (all in ``state_dict``): per group ``step``, ``inner``, ``seed``, ``mu``, and of the check of μ
    ``first_loss`` and ``least_gradient``; per parameter ``centre``,
    ``full_gradient``, ``offset`` (integer codes), and ``gap`` or ``exponents``.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: From :meth:`recentre` and :meth:`step`, if the run diverges.

    Note:
        The linear rate holds for :math:`(2^{b-1}-1)^2 \ge 4 d\kappa^2(1+\gamma)/\gamma^2` (d dims, condition κ, rate
        γ), which is sufficient, not necessary; with too few bits (b <= 3 already for κ = 44, d = 10) it does not
        contract at all.

    Example:
        >>> import torch
        >>> w, x = torch.nn.Parameter(torch.zeros(2)), torch.tensor([[1.0, 5.0], [3.0, -7.0]])
        >>> opt = HALP([w], lr=0.25, mu=1.0)
        >>> def closure(i):
        ...     opt.zero_grad()
        ...     loss = (w - x[i]).square().sum(-1).mean() / 2
        ...     loss.backward()
        ...     return loss
        >>> for epoch in range(8):
        ...     _ = opt.recentre(lambda: closure([0, 1]))
        ...     for i in range(10):
        ...         loss = opt.step(lambda: closure([i % 2]))
        >>> bool((w - torch.tensor([2.0, -1.0])).abs().max() < 1e-5)
        True

    Reference:
        De Sa et al., 2018, "High-accuracy low-precision training", arXiv:1803.03383, algorithm 3.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        mu: float | None,
        word_length: int = 8,
        offset_format: FormatLike | None = None,
        scale: Literal["tensor", "global"] = "tensor",
        power_of_two: bool = False,
        centre_dtype: torch.dtype | None = None,
        check_mu: bool = True,
        **options: Unpack[CentredOptions],
    ) -> None:
        self.offset_format = _offset_format(word_length, offset_format)
        require_choice("scale", scale, ("tensor", "global"), owner="HALP")
        self.scale = scale
        self.power_of_two = require_flag("power_of_two", power_of_two, owner="HALP")
        self.centre_dtype = centre_dtype
        self.check_mu = check_mu and self.offset_format.gap is not None
        self._curvature: float | None = None
        self._warned = False
        super().__init__(params, {"mu": mu, "first_loss": None, "least_gradient": None}, lr=lr, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have its own ``mu``."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            check_dtype(self.offset_format, self._dtype(param))

    def check_group(self, group: Mapping[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.check_group`.

        Raises:
            TypeError, ValueError: Also if ``mu`` is not finite and positive, or missing where offsets need it.
        """
        super().check_group(group)
        remedy = (
            "Pass a number not far below the curvature of the loss (20 for a ResNet in the published code; with the L2 "
            "coefficient the grid is so coarse that the run diverges), or offset_format='bfp8', which needs none."
        )
        if group["mu"] is not None:
            require_number("mu", group["mu"], above=0.0, owner="HALP", remedy=remedy)
        elif self.offset_format.gap is not None:
            raise ValueError(f"HALP: `mu` must be finite and > 0, got None. {remedy}")

    @classmethod
    def from_optimizer(cls, optimizer: Any, **options: Any) -> HALP:
        """As :meth:`VarianceReduced.from_optimizer`; a ``weight_format`` is not used: offsets have their own."""
        options.pop("weight_format", None)
        for group in optimizer.param_groups:
            for name in ("first_loss", "least_gradient"):
                group.pop(name, None)
        return super().from_optimizer(optimizer, **options)

    def _dtype(self, param: Tensor) -> torch.dtype:
        return self.centre_dtype or torch.promote_types(param.dtype, torch.float32)

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def formats(self) -> dict[str, str]:
        """Role of each rounded quantity and its format, for display."""
        pairs = {"offsets": self.offset_format, "gradients": self.gradient_format}
        return {role: str(fmt) for role, fmt in pairs.items() if fmt is not None}

    def offset_of(self, param: Tensor) -> Tensor:
        """Offset z of a parameter, in the dtype of its centre; what its codes say, nothing is rounded."""
        state = self.state[param]
        return self._decoded(state) * state["gap"]

    def _decoded(self, state: dict[str, Any]) -> Tensor:
        """Offset in units of the gap (fixed point) or of the parameter (block floating point, whose gap is 1)."""
        dtype: torch.dtype = state["centre"].dtype
        if self.offset_format.gap is not None:
            codes: Tensor = state["offset"]
            return codes.to(dtype)
        return decode(Encoded(state["offset"], state["exponents"], self.offset_format), dtype, backend=self.backend)

    # --------------------------------------------------------------------------------------------------- the centre

    def point_of(self, param: Tensor) -> Tensor:
        """Centre + offset; the parameter itself where there is none, or where it was changed by hand since."""
        state = self.state.get(param, {})
        if "offset" in state:
            point: Tensor = state["centre"] + self.offset_of(param)
            if torch.equal(point.to(param.dtype), param.detach()):
                return point
        return param.detach().to(self._dtype(param))

    def place_centre(self, params: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Fix the gap of the coming inner loop and set the offsets to zero."""
        rounded = [(group, p) for group, p in params if p not in self.full_precision]
        if not rounded:
            return
        norms = self._gradient_norms(rounded)
        for (group, param), norm in zip(rounded, norms):
            state = self.state[param]
            state["offset"] = torch.zeros(param.shape, dtype=self.offset_format.code_dtype, device=param.device)
            state["gap"] = 1.0
            if self.offset_format.blocks.shared:
                shape = self.offset_format.blocks.compact(param.shape)
                state["exponents"] = torch.zeros(shape, dtype=torch.int8, device=param.device)
                continue
            sigma = math.sqrt(float(group["temperature"]) / (self.num_data * group["mu"]))
            gap = offset_gap(
                norm, group["mu"], self.offset_format.code_range[1], noise_scale=sigma, power_of_two=self.power_of_two
            )
            # Below the smallest normal number a division by the gap could overflow: as good as zero.
            state["gap"] = gap if gap >= torch.finfo(state["centre"].dtype).tiny else 0.0

    def _gradient_norms(self, params: list[tuple[dict[str, Any], Tensor]]) -> list[float]:
        totals = []
        for group, param in params:
            state = self.state[param]
            totals.append(state["full_gradient"].double() + float(group["weight_decay"]) * state["centre"].double())
        norms = torch.stack([t.norm().to(totals[0].device) for t in totals])
        return [float(norms.norm())] * len(totals) if self.scale == "global" else [float(n) for n in norms.tolist()]

    # ---------------------------------------------------------------------------------------------- whether mu fits

    def check_centre(self, work: list[tuple[dict[str, Any], Tensor, Tensor]], loss: Any) -> None:
        """Refuse a centre whose full gradient has outgrown the smallest one, and whose loss the first.

        Raises:
            RuntimeError: With the curvature that was met, and what to do; the old centre stays.
        """
        if not self.check_mu:
            return
        self._warn_of_box([p for _, p, _ in work])
        norm = box.global_norm(
            [p.grad + float(g["weight_decay"]) * point for g, p, point in work if p.grad is not None]
        )
        known, memory = box.scalar(loss), self.param_groups[0]
        first, least = memory.get("first_loss"), memory.get("least_gradient")
        known_least = math.inf if least is None else max(least, self._thermal_gradient())
        if box.outgrown(norm, known_least, known, first, self._thermal_loss()):
            what = f"the full gradient grew from {least:.3g} to {norm:.3g} by step {self.steps}"
            what += "" if known is None or first is None else f", the loss from {first:.4g} to {known:.4g}"
            raise RuntimeError(box.misfit(memory["mu"], self.offset_format.code_range[1], self._curvature, what))
        memory["first_loss"] = known if first is None else first
        memory["least_gradient"] = norm if least is None else min(least, norm)

    def check_step(self, params: list[Tensor], at_centre: list[Tensor | None]) -> None:
        """At inner steps 1, 2, 4, 8, ...: measure the curvature, and refuse a corrected gradient that has exploded.

        Raises:
            RuntimeError: As :meth:`check_centre`; no parameter has been changed by this step.
        """
        inner = self.inner_steps
        if inner == 0 or inner & (inner - 1) or not self.check_mu:
            return
        both = [(p, p.grad, c) for p, c in zip(params, at_centre)]
        pairs = [(p, g, c, self.state[p]) for p, g, c in both if g is not None and c is not None]
        found = box.measured_curvature([(g, c) for _, g, c, _ in pairs], [(p, s["centre"]) for p, _, _, s in pairs])
        self._curvature = max(self._curvature or 0.0, found or 0.0) or None
        full = box.global_norm([s["full_gradient"] for _, _, _, s in pairs])
        norm = box.global_norm([g - c + s["full_gradient"] for _, g, c, s in pairs])
        if norm > box.STEP_GROWTH * max(full, self._thermal_gradient()) and full > 0:
            what = f"{inner} steps after a centre the gradient grew from {full:.3g} to {norm:.3g}"
            raise RuntimeError(
                box.misfit(self.param_groups[0]["mu"], self.offset_format.code_range[1], self._curvature, what)
            )

    def _thermal_gradient(self) -> float:
        """Norm that temperature alone gives the full gradient."""
        return box.thermal_gradient(self._curvature, 2.0 * self._thermal_loss())

    def _thermal_loss(self) -> float:
        """What temperature alone adds to the loss, dT/2N."""
        warmest = max(float(group["temperature"]) for group in self.param_groups)
        return sum(p.numel() for p in self._indices) * warmest / (2 * self.num_data)

    def _warn_of_box(self, params: list[Tensor]) -> None:
        states = [self.state.get(p, {}) for p in params]
        codes = [s["offset"] for s in states if "offset" in s and s["gap"] > 0]
        found = box.badly_used(codes, self.offset_format.code_range[1]) if self.inner_steps else None
        if found is not None and not self._warned:
            self._warned = True
            log.warning("HALP with mu = %g: %s", self.param_groups[0]["mu"], found)

    # ------------------------------------------------------------------------------------------------------ stepping

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the offsets of a group along their corrected gradients."""
        for param, grad in zip(params, grads):
            if "offset" in self.state.get(param, ()):
                self._move_offset(group, param, grad)
            else:
                spec = self.spec(group, None, exempt=True)
                langevin_step_(param, grad, None, spec, self.key(group), self.index_of(param), self.backend)

    def _move_offset(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state, gap = self.state[param], self.state[param]["gap"]
        if gap == 0:
            return
        key, index = self.key(group), self.index_of(param)
        if self.gradient_format is not None:
            stream = key.at(stream=stream_id(Role.GRADIENT, index))
            grad = quantize(grad, self.gradient_format, key=stream, backend=self.backend)
        units = self._decoded(state)
        direction = grad.to(units.dtype)
        if group["weight_decay"]:
            direction = direction + float(group["weight_decay"]) * (state["centre"] + units * gap)
        spec = self.spec(group, self.offset_format, exempt=True)
        # In units of the gap the grid is that of the integers, whatever the gap.
        spec = replace(spec, weight_decay=0.0, noise_variance=spec.noise_variance / gap**2)
        count = langevin_step_(units, direction / gap, None, spec, key, index, self.backend)
        self.saturated.append((param, count))
        self._store(state, units)
        param.copy_(state["centre"] + units * gap)

    def _store(self, state: dict[str, Any], units: Tensor) -> None:
        if self.offset_format.gap is not None:
            state["offset"] = units.to(state["offset"].dtype)
            return
        encoded = encode(units, self.offset_format, backend=self.backend)  # on the grid: nothing is rounded
        state.update(offset=encoded.codes, exponents=encoded.exponents)


def _offset_format(word_length: int, offset_format: FormatLike | None) -> NumberFormat:
    if offset_format is None:
        return FixedPoint(require_count("word_length", word_length, low=2, high=16, owner="HALP"), 0, symmetric=True)
    fmt = parse_format(offset_format)
    if not fmt.linear or not fmt.blocks.shared or fmt.bits > 16:
        raise ValueError(
            f"HALP: `offset_format` must be a block floating point of at most 16 bits such as 'bfp8', got {fmt}. "
            "The scale of a fixed point follows from `mu` and `word_length`; leave `offset_format` out."
        )
    return fmt
