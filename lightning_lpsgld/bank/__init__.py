"""Posterior samples, kept as codes and exponents: in memory, or in a directory that survives crashes."""

from lightning_lpsgld.bank.collection import SampleBank
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.sample import Damage, Sample, SampleInfo, decode_into_
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec, module_tensors

__all__ = [
    "BankError",
    "Damage",
    "EntrySpec",
    "ModuleSpec",
    "Sample",
    "SampleBank",
    "SampleInfo",
    "decode_into_",
    "module_tensors",
]
