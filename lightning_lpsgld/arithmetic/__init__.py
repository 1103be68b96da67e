"""Products of coded tensors, exact: linear and convolution layers that multiply the codes that casts have made."""

from lightning_lpsgld.arithmetic.capability import Capability, capability
from lightning_lpsgld.arithmetic.layers import ARITHMETICS, Arithmetic, ArithmeticRefusal, LayerArithmetic, check_choice
from lightning_lpsgld.arithmetic.operands import refusal_of_format
from lightning_lpsgld.arithmetic.products import Geometry, PackedWeight, choose_path, exact_product
from lightning_lpsgld.arithmetic.report import ProductAccount, summary

__all__ = [
    "ARITHMETICS",
    "Arithmetic",
    "ArithmeticRefusal",
    "Capability",
    "Geometry",
    "LayerArithmetic",
    "PackedWeight",
    "ProductAccount",
    "capability",
    "check_choice",
    "choose_path",
    "exact_product",
    "refusal_of_format",
    "summary",
]
