"""Samplers as ``torch.optim.Optimizer`` classes, usable with and without Lightning."""

from lightning_lpsgld.samplers.base import LangevinOptimizer
from lightning_lpsgld.samplers.sgld import SGLD
from lightning_lpsgld.samplers.step_size import ConstantStepSize, CyclicalStepSize, PolynomialStepSize, StepSize

__all__ = [
    "SGLD",
    "ConstantStepSize",
    "CyclicalStepSize",
    "LangevinOptimizer",
    "PolynomialStepSize",
    "StepSize",
]
