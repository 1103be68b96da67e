"""One posterior sample: its metadata, and its tensors on the way from and into a module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec, check_storable, identity, module_tensors
from lightning_lpsgld.formats import BlockFloatingPoint, FixedPoint, FloatingPoint, MicroscalingFloat
from lightning_lpsgld.ops import Encoded, decode, encode
from lightning_lpsgld.ops.blocks import expand_blocks
from lightning_lpsgld.ops.reference import power_of_two

__all__ = ["Damage", "Sample", "SampleInfo", "decode_into_", "encode_tensors"]


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


@torch.no_grad()
def decode_into_(target: Tensor, encoded: Encoded) -> Tensor:
    """Write the values of ``encoded`` into ``target``, without a full-size temporary for fixed and whole-dim blocks.

    Codes are converted in place and multiplied by powers of two, so nothing is rounded; the result has the bits of
    :func:`lightning_lpsgld.ops.decode`.

    Args:
        target: Tensor of the shape of ``encoded`` and a dtype that holds its format; any device and layout.
        encoded: Codes and exponents, on any device.

    Returns:
        ``target``.
    """
    fmt = encoded.format
    if isinstance(fmt, (FloatingPoint, MicroscalingFloat)):
        return target.copy_(decode(encoded.to(target.device), target.dtype))
    target.copy_(encoded.codes)
    if isinstance(fmt, FixedPoint):
        return target.mul_(fmt.gap)
    assert isinstance(fmt, BlockFloatingPoint)
    assert encoded.exponents is not None
    gaps = power_of_two(encoded.exponents.long() + (2 - fmt.word_length)).to(target.device, target.dtype)
    return target.mul_(expand_blocks(gaps, target.shape, fmt))


def _encode_exactly(entry: EntrySpec, tensor: Tensor) -> dict[str, Tensor]:
    """Codes and exponents of a tensor that is on its grid; refuses one that is not."""
    assert entry.format is not None
    try:
        encoded = encode(tensor.detach(), entry.format, rounding="nearest")
    except ValueError as error:
        raise BankError(f"`{entry.name}` cannot be stored: {error}") from error
    back = decode_into_(torch.empty_like(tensor, requires_grad=False), encoded)
    if not torch.equal(back, tensor.detach()):
        wrong = (back != tensor).nonzero()[0].tolist()
        raise BankError(
            f"`{entry.name}` is not on the grid of {entry.format}: element {wrong} is {tensor[tuple(wrong)].item()!r}, "
            f"the nearest grid value {back[tuple(wrong)].item()!r}. Leave it out of `formats`, or quantize it first."
        )
    tensors = {f"codes.{entry.name}": encoded.codes.cpu()}
    if encoded.exponents is not None:
        tensors[f"exponents.{entry.name}"] = encoded.exponents.cpu()
    return tensors


def _check_finite(name: str, tensor: Tensor) -> None:
    """A sample with one NaN gives predictions that are averaged into finite, wrong scores: it is none."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return
    missing, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    finite = tensor[torch.isfinite(tensor)]
    is_mask = not isinstance(tensor, nn.Parameter) and not missing and bool((finite == finite[:1]).all())
    if not is_mask:
        raise BankError(
            f"`{name}` cannot be stored: {missing} of its {tensor.numel()} elements are NaN and {infinite} infinite: "
            "this is no sample of any posterior. Lower the learning rate, or find out where they come from."
        )


@torch.no_grad()
def encode_tensors(tensors: Mapping[str, Tensor], spec: ModuleSpec) -> dict[str, Tensor]:
    """What a sample stores of ``tensors``: CPU copies, codes and exponents where ``spec`` has a format.

    Infinities are stored only in a tensor that is no parameter and has but one value beside them: a mask.

    Raises:
        BankError: If a tensor with a format is not exactly on its grid (negative zeros become positive), or an element
            is NaN or infinite.
    """
    stored: dict[str, Tensor] = {}
    for entry in spec.entries:
        if entry.format is not None:
            stored.update(_encode_exactly(entry, tensors[entry.name]))
        else:
            _check_finite(entry.name, tensors[entry.name])
            values = tensors[entry.name].detach()
            stored[f"values.{entry.name}"] = values.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return {key: value.contiguous() for key, value in stored.items()}


@dataclass(frozen=True)
class Sample:
    """A posterior sample in its stored form.

    Attributes:
        info: Step, cycle, chain, temperature, learning rate, metrics.
        spec: Names, shapes, dtypes and formats.
        tensors: The stored tensors, on the CPU; not to be written to.
    """

    info: SampleInfo
    spec: ModuleSpec
    tensors: Mapping[str, Tensor] = field(repr=False)

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
        """Bytes of the stored tensors."""
        return self.spec.nbytes

    @property
    def entries(self) -> dict[str, Encoded | Tensor]:
        """Every stored entry by name: :class:`~lightning_lpsgld.ops.Encoded` on a grid, a tensor otherwise."""
        return {entry.name: self._entry(entry) for entry in self.spec.entries}

    def _entry(self, entry: EntrySpec) -> Encoded | Tensor:
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
    def state_dict(self) -> dict[str, Tensor]:
        """Decoded copy for ``module.load_state_dict``, on the CPU, in the module's dtypes; tied names share memory."""
        decoded: dict[str, Tensor] = {}
        for entry in self.spec.entries:
            decoded[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            self._write(entry, decoded[entry.name])
        return decoded | {name: decoded[stored] for name, stored in self.spec.aliases}

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Write the sample into the parameters and buffers that ``module`` has, in place; nothing is rounded.

        Args:
            module: Same names, shapes and dtypes as the module that was sampled; any device. Gradients, hooks and
                ``requires_grad`` are left alone.

        Raises:
            BankError: If a name, shape or dtype differs; nothing has been written then.
        """
        targets = module_tensors(module)
        stored = {entry.name: entry for entry in self.spec.entries}
        stored |= {name: stored[kept] for name, kept in self.spec.aliases}
        _check_targets(targets, stored)
        for name, entry in stored.items():
            self._write(entry, targets[name])


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
