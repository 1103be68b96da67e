"""What all samples of a bank have in common: the tensors of frozen parts, kept once or only by their checksums."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.spec import EntrySpec, ModuleSpec, module_tensors

__all__ = [
    "BASE_KINDS",
    "Base",
    "BaseKind",
    "base_checksum",
    "base_name",
    "check_base_kind",
    "constant_entries",
    "constant_names",
    "entry_digest",
    "new_digests",
]

#: ``"stored"``: the tensors stand once in the bank; ``"reference"``: only their checksums do.
BaseKind = Literal["stored", "reference"]
#: The values of :data:`BaseKind`.
BASE_KINDS: tuple[str, ...] = get_args(BaseKind)

_DIGEST = re.compile(r"[0-9a-f]{40}")
_FILE = re.compile(r"base-([0-9a-f]{40})\.safetensors")


def check_base_kind(kind: object) -> None:
    """Raise :class:`BankError` unless ``kind`` is one of :data:`BASE_KINDS`."""
    if kind not in BASE_KINDS:
        raise BankError(f"`base` must be one of {', '.join(map(repr, BASE_KINDS))}, got {kind!r:.80}.")


@dataclass(frozen=True)
class Base:
    """The tensors that samples leave out because they are as they were at the first one.

    Attributes:
        kind: Whether the bank holds them.
        digests: Name of an entry -> checksum of its stored tensors.
        file: File that holds them, or with ``"reference"`` only describes them; ``None`` in memory.
        size: Bytes of that file.
    """

    kind: BaseKind
    digests: Mapping[str, str] = field(repr=False)
    file: str | None = None
    size: int = 0

    def nbytes(self, spec: ModuleSpec) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in spec.entries if entry.name in self.digests)

    def same_tensors(self, other: Base | None) -> bool:
        """Whether the other one has the same tensors, wherever they are."""
        return other is not None and self.digests == other.digests

    def holds(self, entry: EntrySpec, stored: Mapping[str, Tensor]) -> bool:
        """Whether an entry's stored tensors are those of the base."""
        return entry.name in self.digests and entry_digest(entry, stored) == self.digests[entry.name]

    def to_json(self) -> dict[str, Any]:
        """Plain form."""
        return {"kind": self.kind, "file": self.file, "size": self.size, "digests": dict(self.digests)}

    @classmethod
    def from_json(cls, data: object, spec: ModuleSpec | None) -> Base:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed or names tensors that ``spec`` does not have.
        """
        if not isinstance(data, dict) or data.keys() != {"kind", "file", "size", "digests"}:
            raise BankError("The base of a bank must have `kind`, `file`, `size` and `digests`.")
        kind, file, size, digests = data["kind"], data["file"], data["size"], data["digests"]
        check_base_kind(kind)
        if file is not None and base_checksum(file) is None:
            raise BankError(f"{file!r:.120} is not the file name of a base.")
        if type(size) is not int or not 0 <= size < 2**63:
            raise BankError(f"`size` of the base must be an int >= 0, got {size!r:.80}.")
        names = set() if spec is None else {entry.name for entry in spec.entries}
        if not isinstance(digests, dict) or not digests.keys() <= names:
            raise BankError("`digests` of the base must map names of the module's tensors to checksums.")
        if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests.values()):
            raise BankError("A checksum in the base is not 40 hexadecimal digits.")
        return cls(kind, digests, file, size)


def base_name(digest: str) -> str:
    """File name of a base: the checksum of its content."""
    return f"base-{digest}.safetensors"


def base_checksum(name: object) -> str | None:
    """Checksum in the file name of a base; ``None`` if it is not one."""
    match = _FILE.fullmatch(name) if isinstance(name, str) else None
    return None if match is None else match[1]


def constant_names(module: nn.Module) -> set[str]:
    """Names of what no sampler moves: parameters that need no gradient.

    Only a guess at what stays the same: a sample keeps every tensor of its own that differs from the base. Buffers are
    not among them: statistics move, and what they were at the first sample could not be given again.

    Args:
        module: Any module.

    Returns:
        Names as in the ``state_dict``.
    """
    return _constant_among(module_tensors(module))


def _constant_among(tensors: Mapping[str, Tensor]) -> set[str]:
    return {name for name, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad}


def constant_entries(
    tensors: Mapping[str, Tensor], spec: ModuleSpec, constant: Collection[str] | None
) -> list[EntrySpec]:
    """The entries of ``spec`` that are expected to be the same in every sample.

    Args:
        tensors: A sample's tensors by name.
        spec: Their description.
        constant: Names, tied ones included; ``None``: as for :func:`constant_names`.

    Raises:
        BankError: If a name is none of the module's.
    """
    names = _constant_among(tensors) if constant is None else set(constant)
    unknown = sorted(names - tensors.keys())
    if unknown:
        raise BankError(f"`constant` names tensors that the module does not have: {', '.join(unknown[:5])}.")
    tied = dict(spec.aliases)
    stored = {tied.get(name, name) for name in names}
    return [entry for entry in spec.entries if entry.name in stored]


def entry_digest(entry: EntrySpec, stored: Mapping[str, Tensor]) -> str:
    """Checksum of an entry's stored tensors, 40 hexadecimal digits; shapes and dtypes are those of the module."""
    found = hashlib.blake2b(digest_size=20)
    for key in entry.stored:
        found.update(stored[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def new_digests(entries: Iterable[EntrySpec], stored: Mapping[str, Tensor]) -> dict[str, str]:
    """Checksums of several entries by name."""
    return {entry.name: entry_digest(entry, stored) for entry in entries}
