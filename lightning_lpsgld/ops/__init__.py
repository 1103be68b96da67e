"""Quantizers: rounding to a number format, with a reference that defines them and fused backends that agree with it."""

from lightning_lpsgld.ops.coded import CodedTensor
from lightning_lpsgld.ops.coded_modules import code_parameters_, float_parameters_, parameters_made_as_codes
from lightning_lpsgld.ops.dispatch import backend_report
from lightning_lpsgld.ops.encoded import Encoded
from lightning_lpsgld.ops.functional import decode, encode, quantize, quantize_variance_corrected
from lightning_lpsgld.ops.lattice import lattice_step
from lightning_lpsgld.ops.spec import StepSpec

__all__ = [
    "CodedTensor",
    "Encoded",
    "StepSpec",
    "backend_report",
    "code_parameters_",
    "decode",
    "encode",
    "float_parameters_",
    "lattice_step",
    "parameters_made_as_codes",
    "quantize",
    "quantize_variance_corrected",
]
