"""Quantizers: rounding to a number format, with a reference that defines them and fused backends that agree with it."""

from lightning_lpsgld.ops.dispatch import backend_report
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.lattice import lattice_step
from lightning_lpsgld.ops.spec import StepSpec

__all__ = [
    "Encoded",
    "StepSpec",
    "backend_report",
    "decode",
    "encode",
    "lattice_step",
    "quantize",
    "quantize_variance_corrected",
]
