"""Posterior samples, kept as codes and exponents: in memory, or in a directory that survives crashes."""

from lightning_lpsgld.bank.base import Base, BaseKind, constant_names
from lightning_lpsgld.bank.collection import SampleBank
from lightning_lpsgld.bank.encoding import decode_into_
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.sample import Damage, Sample, SampleInfo
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec, module_tensors

__all__ = [
    "BankError",
    "Base",
    "BaseKind",
    "Damage",
    "EntrySpec",
    "ModuleSpec",
    "Sample",
    "SampleBank",
    "SampleInfo",
    "constant_names",
    "decode_into_",
    "module_tensors",
]
