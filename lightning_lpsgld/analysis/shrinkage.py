r"""The gradient shrinkage model: low precision turns a gradient g into :math:`q\,g + \varepsilon` with q in (0, 1].

Shrinkage is a property of truncation, underflow and saturation. Stochastic rounding does not shrink: its projection is
1 on average, and its norm *grows* by the rounding variance, so a q measured as a ratio of norms exceeds 1 and says
nothing about progress. The q of the model is therefore the projection; the norm ratio is reported beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_lpsgld.formats import FormatLike, parse_format
from lightning_lpsgld.ops import quantize
from lightning_lpsgld.ops.reference import power_of_two, variance_plan

__all__ = [
    "ConvergenceModel",
    "Shrinkage",
    "Suggestion",
    "expected_shrinkage",
    "gradient_shrinkage",
    "suggest_gradient_format",
]


class Shrinkage(NamedTuple):
    """What became of a gradient; 0-d float64 tensors.

    Attributes:
        norm_ratio: ‖g̃‖/‖g‖.
        projection: ⟨g̃, g⟩/‖g‖², the q of the model: progress along g per unit of step size.
        cosine: ⟨g̃, g⟩/(‖g̃‖‖g‖).
        zeroed: Share of the non-zero entries of g that are zero in g̃.
    """

    norm_ratio: Tensor
    projection: Tensor
    cosine: Tensor
    zeroed: Tensor

    @property
    def residual(self) -> Tensor:
        """‖g̃ − q g‖/‖g‖ with q the projection: the noise that quantization adds, relative to the gradient."""
        return (self.norm_ratio**2 - self.projection**2).clamp(min=0.0).sqrt()


def _ratio(numerator: Tensor, denominator: Tensor, empty: float) -> Tensor:
    safe = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    return torch.where(denominator > 0, numerator / safe, torch.full_like(denominator, empty))


def gradient_shrinkage(quantized: Tensor, exact: Tensor) -> Shrinkage:
    r"""Compare a quantized gradient with the exact one.

    Args:
        quantized: g̃, any shape, floating dtype.
        exact: g, same shape. Sums are taken in float64; nothing is copied to the host.

    Returns:
        The four measures. A zero gradient has lost nothing: ratio, projection and cosine are 1, ``zeroed`` is 0. A
        gradient that was zeroed altogether has projection, norm ratio and cosine 0.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> import torch
        >>> g = torch.tensor([0.3, -0.1, 0.02])
        >>> s = gradient_shrinkage(torch.tensor([0.25, 0.0, 0.0]), g)
        >>> round(float(s.projection), 3), round(float(s.zeroed), 3)
        (0.747, 0.667)

    Reference:
        Yun, 2025, arXiv:2508.07142 (the model).
    """
    if quantized.shape != exact.shape:
        raise ValueError(f"Shapes must agree, got {tuple(quantized.shape)} and {tuple(exact.shape)}.")
    rough, true = quantized.detach().double(), exact.detach().double()
    inner, rough2, true2 = (rough * true).sum(), rough.square().sum(), true.square().sum()
    alive = true != 0
    lost = (alive & (rough == 0)).double().sum()
    product = (rough2 * true2).sqrt()
    return Shrinkage(
        norm_ratio=_ratio(rough2.sqrt(), true2.sqrt(), 1.0),
        projection=_ratio(inner, true2, 1.0),
        cosine=torch.where(true2 > 0, _ratio(inner, product, 0.0), torch.ones_like(true2)),
        zeroed=_ratio(lost, alive.double().sum(), 0.0),
    )


def expected_shrinkage(
    fmt: FormatLike,
    gradient_std: float,
    *,
    rounding: Literal["nearest", "stochastic"] = "stochastic",
    points: int = 200_000,
) -> Shrinkage:
    r"""Shrinkage of Gaussian gradients in the limit of many entries, from moments of the rounded normal.

    Args:
        fmt: Fixed-point or floating-point format (a block format's scale depends on the sample: measure it).
        gradient_std: Standard deviation of the entries, > 0.
        rounding: Of the quantizer.
        points: Of the midpoint rule over 8.5 standard deviations on each side; error below 1e-5.

    Returns:
        The four measures; ``zeroed`` is the probability that an entry becomes 0.

    Raises:
        TypeError: For a block format, microscaling included.

    Example:
        >>> s = expected_shrinkage("fixed8.4", 0.01, rounding="nearest")
        >>> round(float(s.norm_ratio), 2), round(float(s.projection), 2)
        (0.26, 0.04)
    """
    number = parse_format(fmt)
    if number.blocks.shared:
        raise TypeError(f"The scale of {number} depends on the sample: quantize a gradient and measure it.")
    z = ((torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1) * 8.5
    weight = torch.exp(-0.5 * z * z)
    weight, x = weight / weight.sum(), z * gradient_std
    if rounding == "nearest":
        mean = quantize(x, number, rounding="nearest", backend="reference")
        second, zero = mean.square(), (mean == 0).double()
    else:
        plan = variance_plan(x, 0.0, number)
        gap = power_of_two(plan.gap_exponents)
        inside = (x >= number.min) & (x <= number.max)
        mean = x.clamp(number.min, number.max)
        second = mean.square() + torch.where(inside, plan.rounding * gap**2, 0.0)
        zero = (1.0 - plan.scaled.abs()).clamp(min=0.0)
    inner, rough2, true2 = ((weight * term).sum() for term in (mean * x, second, x.square()))
    norm_ratio, projection = (rough2 / true2).sqrt(), inner / true2
    return Shrinkage(norm_ratio, projection, _ratio(projection, norm_ratio, 0.0), (weight * zero).sum())


@dataclass(frozen=True)
class ConvergenceModel:
    r"""Bounds for SGD with shrunken, noisy gradients :math:`\tilde g = q\,g + \varepsilon` at a constant step size.

    Standard framework: F is L-smooth, E g = ∇F, E‖g‖² ≤ M + M_G‖∇F‖², E ε = 0 and uncorrelated with g.

    Args:
        lr: Step size μ, at most 1/(L·M_G·q_max).
        smoothness: L.
        curvature: c of strong convexity; 0 for the non-convex bound only.
        q_min: Smallest shrinkage factor over the steps, in (0, q_max].
        q_max: Largest.
        gradient_noise: M, variance of the stochastic gradient at the optimum.
        quantization_noise: σ_ε² = E‖ε‖².
        noise_growth: M_G >= 1.

    Raises:
        ValueError: If a number is out of its range; the message names it.

    Example:
        >>> exact = ConvergenceModel(lr=0.1, smoothness=1.0, curvature=0.5)
        >>> shrunk = ConvergenceModel(lr=0.1, smoothness=1.0, curvature=0.5, q_min=0.2, q_max=0.2)
        >>> round(shrunk.slow_down, 2), exact.contraction, shrunk.contraction
        (5.0, 0.95, 0.99)

    Reference:
        The model: Yun, 2025, arXiv:2508.07142. The bounds are re-derived as in Bottou, Curtis & Nocedal, 2018,
        arXiv:1606.04838, theorems 4.6 to 4.8, with q; see ``docs/theory.md``.
    """

    lr: float
    smoothness: float
    curvature: float = 0.0
    q_min: float = 1.0
    q_max: float = 1.0
    gradient_noise: float = 0.0
    quantization_noise: float = 0.0
    noise_growth: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("lr", self.lr > 0, "> 0"),
            ("smoothness", self.smoothness > 0, "> 0"),
            ("curvature", 0 <= self.curvature <= self.smoothness, "between 0 and `smoothness`"),
            ("q_min", 0 < self.q_min <= self.q_max, "in (0, q_max]"),
            ("gradient_noise", self.gradient_noise >= 0, ">= 0"),
            ("quantization_noise", self.quantization_noise >= 0, ">= 0"),
            ("noise_growth", self.noise_growth >= 1, ">= 1"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"ConvergenceModel: `{name}` must be {rule}, got {getattr(self, name)}.")

    @property
    def largest_step_size(self) -> float:
        """Step size up to which the bounds hold."""
        return 1.0 / (self.smoothness * self.noise_growth * self.q_max)

    @property
    def noise_power(self) -> float:
        """q_max² M + σ_ε²: what drives the floors."""
        return self.q_max**2 * self.gradient_noise + self.quantization_noise

    @property
    def contraction(self) -> float:
        """1 − μ c q_min: factor of the optimality gap per step."""
        return 1.0 - self.lr * self.curvature * self.q_min

    @property
    def slow_down(self) -> float:
        """Steps to a tolerance as a multiple of those at q = 1 (to first order in μc): 1/q_min."""
        return 1.0 / self.q_min

    @property
    def effective_step_size(self) -> float:
        """μ·q_min: the full-precision step size that makes the same progress."""
        return self.lr * self.q_min

    @property
    def compensated_step_size(self) -> float:
        """μ/q_min: restores the full-precision progress; its noise floor rises with it."""
        return self.lr / self.q_min

    @property
    def floor(self) -> float:
        r"""Gap where a constant step size stalls, :math:`L\mu(q_{max}^2M+\sigma_\varepsilon^2)/(2cq_{min})`."""
        if self.curvature == 0:
            return math.inf if self.noise_power else 0.0
        return self.smoothness * self.lr * self.noise_power / (2.0 * self.curvature * self.q_min)

    def optimality_gap(self, steps: int, initial: float) -> float:
        """Bound on E F(x_k) − F* after ``steps`` steps from an optimality gap ``initial``."""
        return self.floor + self.contraction**steps * (initial - self.floor)

    def steps_to(self, tolerance: float, initial: float) -> float:
        """Steps until the bound falls to ``tolerance``; infinite if it is not above the floor."""
        if tolerance >= initial:
            return 0.0
        if tolerance <= self.floor or self.contraction >= 1.0:
            return math.inf
        return math.log((tolerance - self.floor) / (initial - self.floor)) / math.log(self.contraction)

    def mean_gradient_norm(self, steps: int, initial: float) -> float:
        r"""Non-convex bound on :math:`\frac1K\sum E\|\nabla F(x_k)\|^2` after ``steps`` steps."""
        rate = 2.0 * initial / (steps * self.lr * self.q_min)
        return rate + self.smoothness * self.lr * self.noise_power / self.q_min

    def decaying_gap(self, step: int, initial: float, *, beta: float, start: float) -> float:
        r"""Bound :math:`\nu/(s + k)` for step sizes :math:`\mu_k = \beta/(s + k)`, β > 1/(c q_min).

        Raises:
            ValueError: If β is too small.
        """
        edge = beta * self.curvature * self.q_min
        if edge <= 1:
            raise ValueError(f"`beta` must exceed 1/(c q_min) = {1 / (self.curvature * self.q_min):.6g}, got {beta}.")
        noisy = beta**2 * self.smoothness * self.noise_power / (2.0 * (edge - 1.0))
        return max(noisy, (start + 1.0) * initial) / (start + step)


class Suggestion(NamedTuple):
    """What to do about a gradient format.

    Attributes:
        scale: Power of two to multiply the gradient by before quantizing (and to divide by after).
        rounding: ``"nearest"`` or ``"stochastic"``.
        before: Shrinkage now.
        after: Shrinkage with the advice taken.
        text: One sentence.
    """

    scale: float
    rounding: str
    before: Shrinkage
    after: Shrinkage
    text: str


def suggest_gradient_format(
    gradient: Tensor,
    fmt: FormatLike,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    tolerance: float = 0.05,
) -> Suggestion:
    """Advise on scale and rounding of a gradient that its format shrinks.

    A power-of-two scale costs nothing to undo. It is chosen so that the largest entry just fits; block formats choose
    theirs by themselves.

    Args:
        gradient: g, any shape.
        fmt: Format it is rounded to.
        rounding: Rule in use; ``"stochastic"`` is judged by its expectation, which shrinks only by saturation.
        tolerance: Accept a projection within this much of 1 and a residual of up to 0.5.

    Returns:
        The advice; scale 1 and the same rounding if nothing needs to change.

    Example:
        >>> import torch
        >>> g = torch.linspace(-0.02, 0.02, 1001)
        >>> advice = suggest_gradient_format(g, "fixed8.4")
        >>> advice.scale, float(advice.before.projection)
        (256.0, 0.0)
    """
    number, exact = parse_format(fmt), gradient.detach().double()

    def shrunk(scale: float) -> Shrinkage:
        return gradient_shrinkage(quantize(exact * scale, number, rounding="nearest") / scale, exact)

    before = shrunk(1.0)
    fine = abs(float(before.projection) - 1.0) <= tolerance and float(before.residual) <= 0.5
    top = float(exact.abs().max()) if exact.numel() else 0.0
    if fine or top == 0.0 or number.blocks.shared:
        rule = "stochastic" if not fine and top > 0.0 else rounding
        text = (
            "Nothing to change." if rule == rounding else "Round stochastically: the projection is then 1 on average."
        )
        return Suggestion(1.0, rule, before, before, text)
    scale = 2.0 ** math.floor(math.log2(number.max / top))
    after = shrunk(scale)
    text = (
        f"{number} keeps {float(before.projection):.2f} of the gradient and zeroes {float(before.zeroed):.0%} of its "
        f"entries; scale it by 2^{int(math.log2(scale))} before rounding (projection {float(after.projection):.2f})."
    )
    return Suggestion(scale, rounding, before, after, text)
