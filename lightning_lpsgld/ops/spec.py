"""What one sampler step does to a tensor, as frozen data: the contract between samplers and fused kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_lpsgld.formats import NumberFormat
from lightning_lpsgld.ops.flow import Flow
from lightning_lpsgld.ops.lattice import Rates

__all__ = ["Accumulation", "PreconditionedSpec", "StepSpec", "UnderdampedSpec"]

#: ``"float"``: the weight is not rounded; ``"full"``: a full-precision accumulator beside the rounded weight;
#: ``"naive"``: Gaussian noise, then stochastic rounding; ``"vc"``: the variance-corrected quantizer; ``"lattice"``: the
#: walk between neighbouring grid points, which no fused kernel takes.
Accumulation = Literal["float", "full", "naive", "vc", "lattice"]


@dataclass(frozen=True)
class StepSpec:
    r"""One Langevin step :math:`\theta \leftarrow \theta - \eta\,(Q_G(g) + \lambda\theta) + N(0, v)` and its rounding.

    Attributes:
        lr: Step size η >= 0.
        weight_decay: λ >= 0, applied after the gradient's rounding (to the accumulator where there is one).
        noise_variance: v >= 0 in squared weight units.
        weight_format: Grid of the weight; ``None`` only with ``accumulation="float"``.
        gradient_format: Grid of the gradient; stochastic rounding, stream ``Role.GRADIENT``. ``None``: not rounded.
        accumulation: Where the sum is kept, and how it is rounded; see :data:`Accumulation`.
        rates: Jump odds of ``accumulation="lattice"``; nothing else reads them.
        gradient_std: Standard deviation s of the noise in the rounded gradient, a float or a tensor that broadcasts to
            the weight; for exponential rates of ``accumulation="lattice"``, nothing else reads it.
    """

    lr: float
    weight_decay: float
    noise_variance: float
    weight_format: NumberFormat | None
    gradient_format: NumberFormat | None
    accumulation: Accumulation
    rates: Rates = "bernoulli"
    gradient_std: float | Tensor = 0.0


@dataclass(frozen=True)
class UnderdampedSpec:
    """What one underdamped step does to a tensor and its velocity.

    Attributes:
        flow: Coefficients, with the variances of this step.
        weight_decay: λ, added to the rounded gradient.
        weight_format: Grid of the weight; ``None`` only with ``accumulation="float"``.
        velocity_format: Grid of the velocity; ``None``: not rounded.
        gradient_format: Grid of the gradient; ``None``: not rounded.
        accumulation: As in :class:`StepSpec`; not ``"lattice"``.
        rescale: Give a fixed-point velocity a power-of-two scale per tensor.
    """

    flow: Flow
    weight_decay: float
    weight_format: NumberFormat | None
    velocity_format: NumberFormat | None
    gradient_format: NumberFormat | None
    accumulation: Accumulation
    rescale: bool


@dataclass(frozen=True)
class PreconditionedSpec:
    """What one preconditioned step does to a tensor; fields as of :class:`StepSpec` and the preconditioner's.

    Attributes:
        lr: η.
        weight_decay: λ.
        noise_variance: v = 2ηT/N; an element gets v·G.
        beta: β.
        eps: ε.
        weight: w after this step.
        weight_format: Grid of the weight.
        gradient_format: Grid of the gradient.
        accumulation: As in ``StepSpec``; not ``"lattice"``.
        shrinkage: q that the rounded gradient is divided by.
    """

    lr: float
    weight_decay: float
    noise_variance: float
    beta: float
    eps: float
    weight: float
    weight_format: NumberFormat | None
    gradient_format: NumberFormat | None
    accumulation: Accumulation
    shrinkage: float = 1.0
