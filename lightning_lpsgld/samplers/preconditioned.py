"""Preconditioned SGLD (pSGLD, RMSprop's preconditioner), with weights and gradients in low precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_lpsgld.arguments import require_number
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.dispatch import BackendName, choose_motion
from lightning_lpsgld.ops.spec import PreconditionedSpec
from lightning_lpsgld.random import DrawKey, Role, normals, stream_id
from lightning_lpsgld.samplers.base import log
from lightning_lpsgld.samplers.ignored import IGNORED_OPTIONS
from lightning_lpsgld.samplers.options import GridOptions
from lightning_lpsgld.samplers.paired import PairedSampler
from lightning_lpsgld.samplers.statistics import (
    Measurement,
    StepStatistics,
    rounding_statistics,
    rounding_variance,
    same_rows,
)
from lightning_lpsgld.samplers.updates import put_, put_corrected_

__all__ = [
    "PreconditionedSGLD",
    "PreconditionedSpec",
    "preconditioned_step_",
    "preconditioned_steps_",
    "preconditioner_",
]

S = TypeVar("S", bound="PreconditionedSGLD")


def preconditioner_(second_moment: Tensor, force: Tensor, *, beta: float, weight: float, eps: float) -> Tensor:
    r"""Update the running second moment in place and return :math:`G = 1 / (\sqrt{V / w} + \epsilon)`.

    Args:
        second_moment: V, float32 or wider; overwritten with :math:`\beta V + (1 - \beta) f^2`.
        force: f, the gradient with the prior's, shape of V.
        beta: β in [0, 1).
        weight: w, the sum of the weights that V holds after this update, :math:`1 - \beta^t`.
        eps: ε > 0, which bounds G by 1/ε.

    Returns:
        Positive tensor of the shape and dtype of V.
    """
    second_moment.mul_(beta).add_((1.0 - beta) * force * force)  # (addcmul_ is rounded once or twice, by the machine)
    return 1.0 / ((second_moment / weight).sqrt() + eps)


def _moments(
    theta: Tensor, second_moment: Tensor, grad: Tensor, spec: PreconditionedSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of a step from ``theta`` along a rounded gradient, and G; V is brought up to date in place."""
    grad = grad.to(theta.dtype) if spec.shrinkage == 1.0 else grad.to(theta.dtype) / spec.shrinkage
    force = grad + spec.weight_decay * theta
    scale = preconditioner_(second_moment, force, beta=spec.beta, weight=spec.weight, eps=spec.eps)
    return theta - spec.lr * scale * force, spec.noise_variance * scale.double(), scale


def preconditioned_step_(
    param: Tensor,
    second_moment: Tensor,
    accumulator: Tensor | None,
    grad: Tensor,
    spec: PreconditionedSpec,
    key: DrawKey,
    index: int = 0,
    backend: BackendName = "auto",
) -> Tensor:
    r"""One step of one tensor, in place: mean :math:`\theta - \eta G f`, variance :math:`vG`.

    With the force :math:`f = Q_G(g)/q + \lambda\theta`, q = 1 unless shrinkage is compensated.

    Args:
        param: θ, any shape, floating dtype; overwritten.
        second_moment: V, float32; overwritten.
        accumulator: Float32 sum of the steps; overwritten. Only with ``accumulation="full"``.
        grad: Gradient of the batch-mean loss; not modified.
        spec: What the step does.
        key: Seed, step and offset of the draws.
        index: Number of the tensor among the sampler's parameters.
        backend: For the ops.

    Returns:
        Number of values outside the range of the weight format (0-d int64).
    """
    weight_key = key.at(stream=stream_id(Role.WEIGHT, index))
    if spec.gradient_format is not None:
        grad = quantize(grad, spec.gradient_format, key=key.at(stream=stream_id(Role.GRADIENT, index)), backend=backend)
    theta = (param if accumulator is None else accumulator).to(second_moment.dtype)
    mean, variance, _ = _moments(theta, second_moment, grad, spec)
    fmt = spec.weight_format
    if spec.accumulation == "vc":
        assert fmt is not None
        return put_corrected_(param, mean, variance, fmt, weight_key, backend)
    value = mean
    if spec.noise_variance > 0:
        value = mean + (variance.sqrt() * normals(mean.shape, weight_key, device=mean.device)).to(mean.dtype)
    return put_(param, accumulator, value, fmt, weight_key, backend)


def preconditioned_steps_(
    params: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    accumulators: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    specs: Sequence[PreconditionedSpec],
    keys: Sequence[DrawKey],
    indices: Sequence[int],
    backend: BackendName = "auto",
) -> Tensor:
    """One step of many tensors, by a fused kernel where one takes them all, else tensor by tensor.

    Args:
        params: Weights; overwritten.
        second_moments: Their V; overwritten.
        accumulators: float32 sums; ``None`` where there is none.
        grads: Gradients.
        specs: What the step does to each.
        keys: Seed, step and offset of the draws of each.
        indices: Number of each weight among the sampler's parameters.
        backend: For the ops and the fused step.

    Returns:
        Values outside the range of the weight format per weight, int64, shape ``(len(params),)``.
    """
    formats = list(dict.fromkeys(f for s in specs for f in (s.weight_format, s.gradient_format) if f is not None))
    fused = choose_motion(backend, [*params, *second_moments], formats)
    if fused is not None:
        counts: Tensor = fused.preconditioned_steps_(params, second_moments, accumulators, grads, specs, keys, indices)
        return counts
    found = [
        preconditioned_step_(param, second_moment, total, grad, spec, key, index, backend)
        for param, second_moment, total, grad, spec, key, index in zip(
            params, second_moments, accumulators, grads, specs, keys, indices
        )
    ]
    return torch.stack(found)


class PreconditionedSGLD(PairedSampler):
    r"""SGLD whose step and noise are scaled per weight by RMSprop's preconditioner, in low precision.

    .. math::
        V \leftarrow \beta V + (1 - \beta) f^2, \quad G = \frac{1}{\sqrt{V / (1 - \beta^t)} + \epsilon}, \quad
        \theta \leftarrow Q^{vc}\bigl(\theta - \eta G f,\; 2\eta G T/N\bigr), \quad f = Q_G(g) + \lambda\theta

    The target is that of :class:`SGLD`, :math:`p(\theta \mid D)^{1/T}`; G only changes how fast its directions are
    crossed. The rows SGLD, SGLDLP-F, naive and VC SGLDLP-L are chosen as there; Q^vc gets a variance per element.

    **A learning rate tuned for Adam is of use** in this sense: at T = 0 and without formats the step *is* that of
    ``torch.optim.Adam`` with ``betas=(0, beta)`` and the same ``eps`` (bias correction included), so every weight moves
    per step as far as under Adam up to what averaging over betas[0] takes away, and the learning rate is a length per
    step, whatever the scale of the loss. What it does not say is how warm the chain is: the noise of a weight has the
    variance 2ηGT/N, larger where gradients are small.

    **Where the promise stops.** (1) The term :math:`\Gamma_i = \sum_j \partial G_{ij}/\partial\theta_j` of the exact
    diffusion is left out, as Li et al. do in practice. What that costs is no matter of 1 - β alone, but of how far the
    chain gets in the 1/(1 - β) steps over which V averages. Where it crosses the posterior in that time, G is as good
    as constant and the law right. **The shorter the steps, the worse**: then V follows the present gradient, and the
    chain samples :math:`p(\theta \mid D)\prod_i |f_i|`, for a Gaussian *twice the posterior's variance* (exact
    gradients, β = 0.99, posterior standard deviation 1: 1.88 times at lr 1e-5). Noise of minibatches, which G does not
    follow, hides it. ``freeze_after`` ends it: with a constant G the law is that of :class:`SGLD` with a step size per
    weight. (2) V holds the present gradient, so G and f are correlated: a bias of order 1 - β, which freezing ends too.
    (3) A weight whose gradient is always zero has G = 1/ε and, unless weight decay holds it, wanders over its whole
    range: Adam's 1e-8 makes that fast; ``eps=1e-5`` (the paper's) does not. (4) On a grid, at T = 0 or with noise far
    below a gap and exact gradients, the mean lies between the optimum and the middle of its gap: unbiased rounding
    balances G f, not f. Freezing, noise of minibatches and a full accumulator end that.

    Args:
        params: Iterable of parameters or of parameter groups; as for :class:`SGLD`.
        lr: η >= 0, as for Adam.
        num_data: N, number of training examples.
        beta: β in [0, 1), of the running second moment.
        eps: ε > 0.
        freeze_after: Steps of burn-in, >= 1, after which the preconditioner stays as it is; ``None``: never. In the
            second half of them V turns from a running into a plain mean, so that G is no accident of the last steps.
            Discard the burn-in: ``SampleCollector(start=freeze_after)``.
        options: See :class:`~lightning_lpsgld.samplers.options.GridOptions`. At ``temperature=0`` this is
            (low-precision) RMSprop with bias correction; weight decay is inside the preconditioner, as in Adam's (not
            AdamW's) L2 term.

    State (all in ``state_dict``): per group ``step``, ``seed``, ``temperature``, ``lr``, ``weight_decay``, ``beta``,
    ``eps``, ``freeze_after``; per parameter ``second_moment`` (float32: four bytes a weight, not rounded), ``weight``
    (a float), ``accumulator`` (unless ``"low"``), ``shrinkage`` (only where :meth:`compensate` set it).

    Raises:
        ValueError: If an argument is out of range, or a format is wider than a parameter's dtype.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> adam = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.99))
        >>> opt = PreconditionedSGLD.from_optimizer(adam, num_data=50_000, weight_format="bfp8")
        >>> opt.param_groups[0]["beta"]
        0.99

    Reference:
        Li, Chen, Carlson & Carin, 2016, "Preconditioned stochastic gradient Langevin dynamics for deep neural
        networks", arXiv:1512.07666, algorithm 1; the quantizer: Zhang, Wilson & De Sa, 2022, arXiv:2206.09909.
    """

    #: The noise of a weight is known only once the preconditioner is.
    uniform_noise = False

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        num_data: int,
        beta: float = 0.99,
        eps: float = 1e-5,
        freeze_after: int | None = None,
        **options: Unpack[GridOptions],
    ) -> None:
        extra = {"beta": beta, "eps": eps, "freeze_after": freeze_after}
        super().__init__(params, extra, lr=lr, num_data=num_data, **options)

    @classmethod
    def from_optimizer(cls: type[S], optimizer: Optimizer, **options: Any) -> S:
        """As :meth:`LangevinOptimizer.from_optimizer`; takes β and ε too, where the other optimizer has them.

        β is Adam's ``betas[1]``, RMSprop's ``alpha`` or Adadelta's ``rho``. ``beta`` and ``eps`` in ``options`` win.
        """
        for group in optimizer.param_groups:
            for name in ("beta", "freeze_after"):
                group.pop(name, None)
            found = group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho"))
            if found is not None:
                group["beta"] = found
            group.update({name: options[name] for name in ("beta", "eps") if name in options})
        return super().from_optimizer(optimizer, **options)

    def _report_ignored(self, optimizer: Optimizer) -> None:
        names: set[str] = set()
        for group in optimizer.param_groups:
            others = IGNORED_OPTIONS.keys() - {"betas", "alpha", "rho"}
            names |= {k for k in others if group.get(k) not in (IGNORED_OPTIONS[k], None)}
            names |= {"betas[0]"} if "betas" in group and group["betas"][0] != 0 else set()
        if names:
            log.warning(
                "%s takes lr, weight_decay, the second moment's decay and eps from %s and does not use its %s.",
                type(self).__name__, type(optimizer).__name__, ", ".join(sorted(names)),
            )  # fmt: skip

    def check_group(self, group: Mapping[str, Any]) -> None:
        """As :meth:`LangevinOptimizer.check_group`.

        Raises:
            TypeError, ValueError: Also if ``beta`` is not in [0, 1) or ``eps`` is not finite and positive.
        """
        super().check_group(group)
        require_number("beta", group["beta"], below=1.0)
        require_number("eps", group["eps"], above=0.0)
        freeze = group.get("freeze_after")
        if freeze is not None and (isinstance(freeze, bool) or not isinstance(freeze, int) or freeze < 1):
            raise ValueError(f"`freeze_after` must be None or an int >= 1 (steps), got {freeze!r}.")

    # --------------------------------------------------------------------------------------------------------- facts

    @property
    def description(self) -> str:
        """Name of the variant, for display."""
        if self.weight_format is None:
            return "pSGLD (weights not rounded)"
        if self.accumulator == "full":
            return "pSGLDLP-F (full-precision accumulator)"
        width = "low-precision" if self.accumulator == "low" else str(self.accumulator)
        return ("VC " if self.variance_corrected else "naive ") + f"pSGLDLP-L ({width} accumulator)"

    def noise_variance(self, group: Any) -> float:
        r"""Variance :math:`v = 2\eta T/N` where the preconditioner is 1; a weight gets v·G."""
        return super().noise_variance(group)

    # ------------------------------------------------------------------------------------------------------ stepping

    def _beta(self, group: dict[str, Any], param: Tensor) -> float:
        """β of the step to come: rises in the second half of the burn-in, so that V is a mean over it; 1 thereafter.

        A parameter that got no gradient until then takes V from its first one.
        """
        beta, step, freeze = float(group["beta"]), int(group["step"]), group.get("freeze_after")
        if freeze is None or step < freeze // 2:
            return beta
        if step >= freeze and self.state.get(param, {}).get("weight", 0.0) > 0:
            return 1.0
        return 1.0 - 1.0 / (1.0 / (1.0 - beta) + min(step, freeze) - freeze // 2)

    def _second_moment(self, param: Tensor, beta: float) -> tuple[Tensor, float]:
        """V of a parameter, zero before its first step, and w after the step to come."""
        state = self.state.get(param, {})
        wide = torch.promote_types(param.dtype, torch.float32)
        second_moment = state.get("second_moment")
        if second_moment is None:
            second_moment = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
        return second_moment, beta * state.get("weight", 0.0) + (1.0 - beta)

    def _spec(self, group: dict[str, Any], param: Tensor, beta: float, weight: float) -> PreconditionedSpec:
        return PreconditionedSpec(
            lr=self.step_size(group),
            weight_decay=float(group["weight_decay"]),
            noise_variance=self.noise_variance(group),
            beta=beta,
            eps=float(group["eps"]),
            weight=weight,
            weight_format=self._grid_of(self.accumulation(param)),
            gradient_format=self.gradient_format_of(param),
            accumulation=self.accumulation(param),
            shrinkage=self.shrinkage_of(param),
        )

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the parameters of a group; see :func:`preconditioned_step_` for the equations."""
        self._measure(group, params, grads)
        specs, moments = [], []
        for param in params:
            beta = self._beta(group, param)
            second_moment, weight = self._second_moment(param, beta)
            self.state[param].update(second_moment=second_moment, weight=weight)
            moments.append(second_moment)
            specs.append(self._spec(group, param, beta, weight))
        counts = self._move(preconditioned_steps_, group, params, grads, moments, specs)
        self._note_saturated(group, params, counts)

    def _statistics(self, group: dict[str, Any], param: Tensor, grad: Tensor, what: Measurement) -> StepStatistics:
        """The noise of weight i is to have the variance v·G_i; reported are means over the weights."""
        beta = self._beta(group, param)
        second_moment, weight = self._second_moment(param, beta)
        spec = self._spec(group, param, beta, weight)
        theta = self.accumulator_of(param).to(second_moment.dtype)
        formats = (spec.weight_format, spec.gradient_format)
        drift = grad if self.prior_mean == "zero" else self.drift_of(group, param, grad)
        tensors = (theta, grad, drift, second_moment)
        theta, grad, drift, second_moment = same_rows(tensors, formats, what.max_elements)
        rounding = torch.zeros((), dtype=torch.float64, device=grad.device)
        if spec.gradient_format is not None:
            rounding = rounding_variance(grad, spec.gradient_format)
        raw = grad
        if self.prior_mean != "zero":
            grad, spec = drift, replace(spec, weight_decay=0.0)
        elif spec.gradient_format is not None:
            grad = quantize(grad, spec.gradient_format, key=what.stream(Role.GRADIENT))
        mean, variance, scale = _moments(theta, second_moment.clone(), grad, spec)
        found = rounding_statistics(theta, mean, variance, spec.weight_format, spec.accumulation, what)
        square = (spec.lr / spec.shrinkage * scale.double()) ** 2
        return replace(
            self._seen(found, param, what),
            numel=param.numel(),
            gradient_rounding=float((rounding * square).mean()),
            minibatch=what.gradient_variance(raw, square),
            effective_temperature=what.temperature(found.achieved, float(scale.double().mean())),
        )
