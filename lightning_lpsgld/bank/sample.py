"""One posterior sample: its metadata, and its tensors on the way from and into a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank.base import Base, entry_digest
from lightning_lpsgld.bank.encoding import check_has_base, decode_into_
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec, check_storable, identity, module_tensors
from lightning_lpsgld.ops import Encoded

__all__ = ["Damage", "Sample", "SampleInfo"]


def _check_count(name: str, value: object, *, optional: bool = False) -> None:
    if (value is None and optional) or (type(value) is int and 0 <= value < 2**63):
        return
    raise BankError(
        f"`{name}` of a sample must be an int in [0, 2**63){' or None' if optional else ''}, got {value!r:.80}."
    )


def _rate(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = _float(name, value)
    if not 0.0 <= number < math.inf:
        raise BankError(f"`{name}` of a sample must be finite and >= 0, or None, got {number!r}.")
    return number


def _float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BankError(f"`{name}` of a sample must be a number, got {value!r:.80}.")
    try:
        return float(value)
    except OverflowError as error:
        raise BankError(f"`{name}` of a sample is too large for a float.") from error


def _metrics(value: object) -> dict[str, float]:
    if not isinstance(value, Mapping) or len(value) > 10_000:
        raise BankError(f"`metrics` of a sample must map names to numbers, got {type(value).__name__}.")
    for name in value:
        if not isinstance(name, str) or len(name) > 1024:
            raise BankError(f"`metrics` of a sample must have short strings as names, got {name!r:.80}.")
    return {name: _float(f"metrics[{name[:80]!r}]", number) for name, number in value.items()}


_FIELDS = frozenset(("step", "cycle", "chain", "temperature", "lr", "metrics"))


def _is_plain(data: Mapping[str, Any]) -> bool:
    """Whether every field has the very type and range that :class:`SampleInfo` keeps, so that it can be taken as is."""
    for name, optional in (("step", False), ("chain", False), ("cycle", True)):
        value = data[name]
        if not (type(value) is int and 0 <= value < 2**63) and not (optional and value is None):
            return False
    for name in ("temperature", "lr"):
        value = data[name]
        if value is not None and not (type(value) is float and 0.0 <= value < math.inf):
            return False
    return not data["metrics"]


@dataclass(frozen=True)
class SampleInfo:
    """Where a sample comes from.

    Args:
        step: Optimizer step after which it was taken, >= 0.
        cycle: Number of the learning-rate cycle, if there are cycles.
        chain: Label of the chain, >= 0.
        temperature: Temperature of the sampler.
        lr: Learning rate at that step.
        metrics: Anything measured then, by name.

    Raises:
        BankError: If a field has the wrong type or is out of range.
    """

    step: int
    cycle: int | None = None
    chain: int = 0
    temperature: float | None = None
    lr: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count("step", self.step)
        _check_count("cycle", self.cycle, optional=True)
        _check_count("chain", self.chain)
        object.__setattr__(self, "temperature", _rate("temperature", self.temperature))
        object.__setattr__(self, "lr", _rate("lr", self.lr))
        object.__setattr__(self, "metrics", _metrics(self.metrics))

    def to_json(self) -> dict[str, Any]:
        """Plain form; numbers that JSON does not have become strings."""
        metrics = {name: x if math.isfinite(x) else repr(x) for name, x in self.metrics.items()}
        return {
            "step": self.step,
            "cycle": self.cycle,
            "chain": self.chain,
            "temperature": self.temperature,
            "lr": self.lr,
            "metrics": metrics,
        }

    @classmethod
    def from_json(cls, data: object) -> SampleInfo:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed.
        """
        if not isinstance(data, dict) or data.keys() != _FIELDS or not isinstance(data["metrics"], dict):
            raise BankError(f"A sample's metadata must have the fields {sorted(_FIELDS)}.")
        if _is_plain(data):  # nearly all are; there may be a hundred thousand of them
            info = object.__new__(cls)
            info.__dict__.update(data)
            return info
        special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
        metrics = {n: special.get(x, x) if isinstance(x, str) else x for n, x in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics})


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be used.

    Attributes:
        info: Its metadata, from the manifest.
        file: Its file name.
        reason: What is wrong with the file.
    """

    info: SampleInfo
    file: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A posterior sample in its stored form.

    Attributes:
        info: Step, cycle, chain, temperature, learning rate, metrics.
        spec: Names, shapes, dtypes and formats.
        tensors: The stored tensors, on the CPU; not to be written to. Those of the bank's base are among them if they
            are there; samples share them.
        base: The bank's base, if it has one.
        own: Names of the entries that are not taken from the base; ``None``: all.
    """

    info: SampleInfo
    spec: ModuleSpec
    tensors: Mapping[str, Tensor] = field(repr=False)
    base: Base | None = field(default=None, repr=False)
    own: frozenset[str] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        info: SampleInfo,
        spec: ModuleSpec,
        own: Mapping[str, Tensor],
        base: Base | None,
        shared: Mapping[str, Tensor],
    ) -> Sample:
        """Make a sample of what is kept with it, and of the tensors of the base, if they are there."""
        if base is None:
            return cls(info, spec, own)
        names = (e.name for e in spec.entries if e.name not in base.digests or any(key in own for key in e.stored))
        return cls(info, spec, {**shared, **own}, base, frozenset(names))

    def beside(self, base: Base | None) -> dict[str, Tensor]:
        """The tensors that a bank with that base has to keep with this sample.

        Raises:
            BankError: If one of them is not here, because only its checksum is.
        """
        own: dict[str, Tensor] = {}
        for entry in self.spec.entries:
            if base is None or entry.name not in base.digests or self._digest(entry) != base.digests[entry.name]:
                self._entry(entry)  # refuses one that is not here
                own.update({key: self.tensors[key] for key in entry.stored})
        return own

    def _digest(self, entry: EntrySpec) -> str:
        if self.base is not None and self.own is not None and entry.name not in self.own:
            return self.base.digests[entry.name]
        return entry_digest(entry, self.tensors)

    @property
    def step(self) -> int:
        """Optimizer step after which the sample was taken."""
        return self.info.step

    @property
    def chain(self) -> int:
        """Label of its chain."""
        return self.info.chain

    @property
    def cycle(self) -> int | None:
        """Its learning-rate cycle."""
        return self.info.cycle

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, without those of the base."""
        return sum(entry.nbytes for entry in self.spec.entries if self.own is None or entry.name in self.own)

    @property
    def entries(self) -> dict[str, Encoded | Tensor]:
        """Every stored entry by name: :class:`~lightning_lpsgld.ops.Encoded` on a grid, a tensor otherwise.

        Raises:
            BankError: As :meth:`state_dict`.
        """
        return {entry.name: self._entry(entry) for entry in self.spec.entries}

    def _is_there(self, entry: EntrySpec) -> bool:
        return all(key in self.tensors for key in entry.stored)

    def _entry(self, entry: EntrySpec) -> Encoded | Tensor:
        if not self._is_there(entry):
            raise BankError(
                f"`{entry.name}` was frozen, and the bank holds only its checksum (base='reference'): give it the "
                "weights that training began with, `bank.give_base(module)` or `SampleBank.open(path, base=module)`."
            )
        if entry.format is None:
            return self.tensors[f"values.{entry.name}"]
        return Encoded(self.tensors[f"codes.{entry.name}"], self.tensors.get(f"exponents.{entry.name}"), entry.format)

    def _write(self, entry: EntrySpec, target: Tensor) -> None:
        stored = self._entry(entry)
        if isinstance(stored, Encoded):
            decode_into_(target, stored)
        else:
            target.copy_(stored)

    @torch.no_grad()
    def state_dict(self, *, base: bool = True) -> dict[str, Tensor]:
        """Decoded copy for ``module.load_state_dict``, on the CPU, in the module's dtypes; tied names share memory.

        Args:
            base: Also what samples share; without it, the same names for all samples of a bank.

        Raises:
            BankError: If the bank has only checksums of its base, and was not given it
                (:meth:`.SampleBank.give_base`).
        """
        decoded: dict[str, Tensor] = {}
        shared = () if base or self.base is None else self.base.digests
        for entry in self.spec.entries:
            if entry.name in shared:
                continue
            decoded[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            self._write(entry, decoded[entry.name])
        return decoded | {name: decoded[stored] for name, stored in self.spec.aliases if stored in decoded}

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Write the sample into the parameters and buffers that ``module`` has, in place; nothing is rounded.

        Args:
            module: Same names, shapes and dtypes as the module that was sampled; any device. Gradients, hooks and
                ``requires_grad`` are left alone. Of a bank that holds only checksums of its base, and was not given it,
                the module must have those weights already.

        Raises:
            BankError: If a name, shape or dtype differs, or a weight that only the module has is another; nothing has
                been written then.
        """
        targets = module_tensors(module)
        stored = {entry.name: entry for entry in self.spec.entries}
        stored |= {name: stored[kept] for name, kept in self.spec.aliases}
        _check_targets(targets, stored)
        absent = [name for name, entry in stored.items() if not self._is_there(entry)]
        if self.base is not None:
            check_has_base(targets, {name: stored[name] for name in absent}, self.base)
        for name in stored.keys() - set(absent):
            self._write(stored[name], targets[name])


def _check_targets(targets: Mapping[str, Tensor], stored: Mapping[str, EntrySpec]) -> None:
    missing, extra = sorted(set(stored) - set(targets)), sorted(set(targets) - set(stored))
    if missing or extra:
        raise BankError(
            f"The module is not the one that was sampled: it lacks {missing[:3] or 'nothing'}, and only it has "
            f"{extra[:3] or 'nothing'}. Build it as it was trained."
        )
    owners: dict[tuple[Any, ...], EntrySpec] = {}
    for name, entry in stored.items():
        target = targets[name]
        check_storable(name, target)
        _check_writable(name, target)
        if tuple(target.shape) != entry.shape or target.dtype != entry.dtype:
            raise BankError(
                f"`{name}` is {tuple(target.shape)} {target.dtype} in the module, but the sample has {entry}."
            )
        owner = owners.setdefault(identity(target), entry)
        if owner is not entry:
            raise BankError(f"`{name}` is tied to `{owner.name}` in the module, but not in the sample.")


def _check_writable(name: str, target: Tensor) -> None:
    if target.is_meta:
        raise BankError(f"`{name}` is on the meta device and has no memory to load into; use `module.to_empty` first.")
    if any(stride == 0 and size > 1 for stride, size in zip(target.stride(), target.shape)):
        raise BankError(
            f"`{name}` is expanded: several of its elements are one number in memory, and cannot be set to several. "
            "Make it a tensor of its own with `.clone()`."
        )
