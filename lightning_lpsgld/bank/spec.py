"""What a bank's samples are samples of: names, shapes, dtypes and formats, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.formats import FormatLike, NumberFormat, check_dtype, parse_format
from lightning_lpsgld.formats.packing import is_packed, packed_size
from lightning_lpsgld.ops.coded import CodedTensor

__all__ = ["EntrySpec", "Formats", "ModuleSpec", "formats_by_name", "module_tensors"]

#: One format for all floating parameters, formats by name, or none.
Formats = Union[FormatLike, Mapping[str, Union[FormatLike, None]], None]

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_MAX_ENTRIES, _MAX_NAME, _MAX_DIMS, _MAX_BYTES = 1_000_000, 1024, 64, 2**44


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of ``module`` by their ``state_dict`` name, in its order; tied names included.

    The tensors are the module's own, not copies. ``_orig_mod.``, which ``torch.compile`` puts into names, is left out.

    Args:
        module: Any module.

    Returns:
        Name to tensor.
    """
    found: dict[str, Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        own = {**part._parameters, **part._buffers}
        for name, tensor in own.items():
            if tensor is not None and name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}".replace("_orig_mod.", "").removeprefix(".")] = tensor
    return found


def formats_by_name(tensors: Mapping[str, Tensor], formats: Formats) -> Mapping[str, FormatLike | None]:
    """``formats`` as a mapping; a single one is that of every floating parameter among ``tensors``.

    Raises:
        BankError: If a single one is given and there is no floating parameter.
    """
    if formats is None or isinstance(formats, Mapping):
        return formats or {}
    named = {n: formats for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
    if not named:
        raise BankError(f"formats={formats!s} is meant for parameters, and there is none; pass a mapping of names.")
    return named


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same memory seen in the same way: tied weights."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())


def check_storable(name: str, tensor: Tensor) -> None:
    """Raise :class:`BankError` unless ``tensor`` is a plain dense tensor of a dtype that safetensors has."""
    if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
        raise BankError(f"`{name}` is not initialized yet; run one batch through the lazy module first.")
    if type(tensor.data) not in (Tensor, CodedTensor) or tensor.layout != torch.strided:
        raise BankError(
            f"`{name}` is a {type(tensor).__name__} of layout {tensor.layout}; the bank takes plain dense tensors. "
            "Gather a sharded module first and pass the mapping of full tensors."
        )
    if tensor.dtype not in _DTYPES.values():
        raise BankError(f"`{name}` has dtype {tensor.dtype}; the bank takes {sorted(_DTYPES)}.")


@dataclass(frozen=True)
class EntrySpec:
    """One stored tensor.

    Attributes:
        name: Its name in the ``state_dict``.
        shape: Its shape.
        dtype: Its dtype in the module.
        format: Grid on which it lies, stored as codes and exponents; ``None``: stored as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: NumberFormat | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes_fp32(self) -> int:
        """Bytes in a float32 ``state_dict``; what is not floating keeps its dtype."""
        return self.numel * (4 if self.dtype.is_floating_point else self.dtype.itemsize)

    @cached_property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Tensors of this entry in a sample (packed in its file): key mapped to dtype and shape."""
        if self.format is None:
            return {f"values.{self.name}": (self.dtype, self.shape)}
        tensors = {f"codes.{self.name}": (self.format.code_dtype, self.shape)}
        if self.format.blocks.shared:
            tensors[f"exponents.{self.name}"] = (torch.int8, self.format.blocks.compact(self.shape))
        return tensors

    @cached_property
    def packed_bits(self) -> int:
        """Bits of a code where codes are packed in a file (fewer than 8), else 0."""
        return self.format.bits if self.format is not None and is_packed(self.format.bits) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, packed."""
        spared = self.numel - packed_size(self.numel, self.packed_bits) if self.packed_bits else 0
        return self.nbytes_unpacked - spared

    @property
    def nbytes_unpacked(self) -> int:
        """Bytes of the stored tensors in memory, and in files that were written before codes were packed."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.stored.values())

    def __str__(self) -> str:
        grid = "as it is" if self.format is None else f"on {self.format}"
        return f"`{self.name}` {tuple(self.shape)} {str(self.dtype).removeprefix('torch.')} {grid}"

    def to_json(self) -> list[Any]:
        """Plain form: ``[name, shape, dtype, format or None]``."""
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.name, list(self.shape), dtype, None if self.format is None else str(self.format)]

    @classmethod
    def from_json(cls, data: object) -> EntrySpec:
        """Inverse of :meth:`to_json`; refuses everything that a bank would not have written.

        Raises:
            BankError: If ``data`` is malformed.
        """
        if not isinstance(data, list) or len(data) != 4:
            raise BankError(f"An entry must be [name, shape, dtype, format], got {_short(data)}.")
        name, shape, dtype, grid = data
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise BankError(f"The name of an entry must be a printable string, got {_short(name)}.")
        dims_ok = isinstance(shape, list) and len(shape) <= _MAX_DIMS
        if not dims_ok or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise BankError(f"The shape of `{name}` must be a list of sizes, got {_short(shape)}.")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise BankError(f"The dtype of `{name}` must be one of {sorted(_DTYPES)}, got {_short(dtype)}.")
        entry = cls(name, tuple(shape), _DTYPES[dtype], None if grid is None else _format_from_json(name, grid))
        entry.check()
        return entry

    def check(self) -> None:
        """Raise :class:`BankError` unless the format fits the dtype and shape, and the size is sane."""
        try:
            if self.format is not None:
                check_dtype(self.format, self.dtype)
            size = self.nbytes_unpacked
        except (TypeError, ValueError) as error:
            raise BankError(f"{self} cannot be stored: {error}") from error
        if size > _MAX_BYTES or self.nbytes_fp32 > _MAX_BYTES:
            raise BankError(f"{self} would take {size} bytes; more than {_MAX_BYTES} is refused.")


def _format_from_json(name: str, text: object) -> NumberFormat:
    if not isinstance(text, str) or len(text) > 32:
        raise BankError(f"The format of `{name}` must be a short string or null, got {_short(text)}.")
    try:
        fmt = parse_format(text)
    except (TypeError, ValueError) as error:
        raise BankError(f"The format of `{name}` is unknown: {error}") from error
    if str(fmt) != text:
        raise BankError(f"The format of `{name}` must be written {str(fmt)!r}, got {text!r}.")
    return fmt


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class ModuleSpec:
    """Names, shapes, dtypes and formats of a module's tensors: samples with another one are never mixed in.

    Attributes:
        entries: The stored tensors.
        aliases: Tied names: name mapped to the name under which the tensor is stored.
    """

    entries: tuple[EntrySpec, ...]
    aliases: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], formats: Mapping[str, FormatLike | None]) -> ModuleSpec:
        """Describe ``tensors``; one tensor under two names is an entry and an alias.

        Args:
            tensors: By name, as :func:`module_tensors` gives them or a ``state_dict``.
            formats: Grid of each name that lies on one; the name may be a tied one.

        Raises:
            BankError: If a tensor cannot be stored, or a format names no tensor or does not fit it.
        """
        unknown = sorted(set(formats) - set(tensors))
        if unknown:
            raise BankError(f"`formats` names tensors that the module does not have: {', '.join(unknown[:5])}.")
        first: dict[tuple[Any, ...], str] = {}
        grids: dict[str, NumberFormat | None] = {}
        aliases = []
        for name, tensor in tensors.items():
            check_storable(name, tensor)
            stored = first.setdefault(identity(tensor), name)
            if stored != name:
                aliases.append((name, stored))
            if formats.get(name) is not None:
                grids[stored] = parse_format(formats[name])
        names = first.values()
        entries = tuple(EntrySpec(n, tuple(tensors[n].shape), tensors[n].dtype, grids.get(n)) for n in names)
        for entry in entries:
            entry.check()
        return cls(entries, tuple(aliases))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in the spec, 40 hexadecimal digits."""
        text = json.dumps(self.to_json(), separators=(",", ":"), sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()

    @cached_property
    def text(self) -> str:
        """The plain form as JSON text."""
        return json.dumps(self.to_json())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one sample's tensors, packed."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def nbytes_unpacked(self) -> int:
        """The same in memory, and in files that were written before codes were packed."""
        return sum(entry.nbytes_unpacked for entry in self.entries)

    @cached_property
    def nbytes_fp32(self) -> int:
        """Bytes of one float32 ``state_dict``, tied tensors counted once."""
        return sum(entry.nbytes_fp32 for entry in self.entries)

    @cached_property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """All tensors of a sample file: key mapped to dtype and shape."""
        return {key: value for entry in self.entries for key, value in entry.stored.items()}

    def difference(self, other: ModuleSpec) -> str:
        """First difference to ``other`` in words; empty if there is none."""
        for ours, theirs in zip(self.entries, other.entries):
            if ours != theirs:
                return f"{ours} against {theirs}"
        if len(self.entries) != len(other.entries):
            longer = max(self.entries, other.entries, key=len)
            return f"{len(self.entries)} tensors against {len(other.entries)}, {longer[-1]} in one of them only"
        return "" if self.aliases == other.aliases else "other weights are tied"

    def to_json(self) -> dict[str, Any]:
        """Plain form."""
        return {"entries": [entry.to_json() for entry in self.entries], "aliases": [list(a) for a in self.aliases]}

    @classmethod
    def from_json(cls, data: object) -> ModuleSpec:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed.
        """
        if not isinstance(data, dict) or set(data) != {"entries", "aliases"}:
            raise BankError(f"The module's description must have `entries` and `aliases`, got {_short(data)}.")
        entries, aliases = data["entries"], data["aliases"]
        if not isinstance(entries, list) or not isinstance(aliases, list):
            raise BankError("`entries` and `aliases` of the module's description must be lists.")
        if len(entries) + len(aliases) > _MAX_ENTRIES:
            raise BankError(f"A module of more than {_MAX_ENTRIES} tensors is refused.")
        spec = cls(tuple(EntrySpec.from_json(entry) for entry in entries), tuple(map(_alias_from_json, aliases)))
        names = [entry.name for entry in spec.entries]
        tied = [name for name, _ in spec.aliases]
        if len({*names, *tied}) != len(names) + len(tied):
            raise BankError("The module's description names a tensor twice.")
        if not {stored for _, stored in spec.aliases} <= set(names):
            raise BankError("The module's description ties a name to a tensor that is not there.")
        if spec.nbytes_unpacked > _MAX_BYTES:
            raise BankError(f"A sample of {spec.nbytes_unpacked} bytes is refused; the limit is {_MAX_BYTES}.")
        return spec


def _alias_from_json(data: object) -> tuple[str, str]:
    if (
        not isinstance(data, list)
        or len(data) != 2
        or not all(isinstance(n, str) and len(n) <= _MAX_NAME for n in data)
    ):
        raise BankError(f"A tied name must be [name, stored name], got {_short(data)}.")
    if not data[0] or not data[0].isprintable():
        raise BankError(f"A tied name must be a printable string, got {_short(data[0])}.")
    return data[0], data[1]
