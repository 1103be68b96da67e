"""Samplers as ``torch.optim.Optimizer`` classes, usable with and without Lightning."""

from lightning_lpsgld.samplers.base import LangevinOptimizer
from lightning_lpsgld.samplers.halp import HALP
from lightning_lpsgld.samplers.options import CentredOptions, GridOptions, SamplerOptions
from lightning_lpsgld.samplers.parts import sample_part
from lightning_lpsgld.samplers.passes import full_gradient
from lightning_lpsgld.samplers.preconditioned import PreconditionedSGLD
from lightning_lpsgld.samplers.sghmc import SGHMC
from lightning_lpsgld.samplers.sgld import SGLD
from lightning_lpsgld.samplers.step_size import ConstantStepSize, CyclicalStepSize, PolynomialStepSize, StepSize
from lightning_lpsgld.samplers.svrg import SVRG
from lightning_lpsgld.samplers.variance_reduced import VarianceReduced

__all__ = [
    "HALP",
    "SGHMC",
    "SGLD",
    "SVRG",
    "CentredOptions",
    "ConstantStepSize",
    "CyclicalStepSize",
    "GridOptions",
    "LangevinOptimizer",
    "PolynomialStepSize",
    "PreconditionedSGLD",
    "SamplerOptions",
    "StepSize",
    "VarianceReduced",
    "full_gradient",
    "sample_part",
]
