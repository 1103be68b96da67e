"""What a bank knows of one sample: its line in the table of contents, and the name of its file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["Key", "Record", "Sizes", "check_size", "checksum", "parse_sample_name", "sample_name", "sizes_of"]

#: Chain and step: unique in a bank.
Key = tuple[int, int]

_SAMPLE = re.compile(r"sample-c(0|[1-9][0-9]{0,18})-s(0|[1-9][0-9]{0,18})-([0-9a-f]{40})\.safetensors")
_FIELDS = frozenset(("info", "file", "size"))
#: Room for the header of a safetensors file: a fixed part, and one line per tensor with its name and metadata.
_HEADER_BYTES, _HEADER_BYTES_PER_ENTRY = 2**20, 2**13


def checksum(data: bytes) -> str:
    """BLAKE2b of ``data``, 40 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def sample_name(info: SampleInfo, digest: str) -> str:
    """File name of a sample: chain, step and checksum of its content."""
    return f"sample-c{info.chain}-s{info.step}-{digest}.safetensors"


def parse_sample_name(name: str) -> tuple[int, int, str] | None:
    """Chain, step and checksum in a sample's file name; ``None`` if it is not one."""
    match = _SAMPLE.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


@dataclass(frozen=True)
class Record:
    """A sample's line in the table of contents.

    Attributes:
        info: Metadata.
        file: Plain file name that holds chain, step and checksum.
        size: Bytes of the file.
    """

    info: SampleInfo
    file: str
    size: int

    @property
    def key(self) -> Key:
        """Chain and step: unique in a bank."""
        return self.info.chain, self.info.step

    @property
    def checksum(self) -> str:
        """Checksum of the file's content."""
        return self.file[-52:-12]

    def to_json(self) -> dict[str, Any]:
        """Plain form."""
        return {"info": self.info.to_json(), "file": self.file, "size": self.size}

    @classmethod
    def from_json(cls, data: object, sizes: Sizes) -> Record:
        """Inverse of :meth:`to_json`.

        Args:
            data: What that returned.
            sizes: What a file of the bank can take.

        Raises:
            BankError: If ``data`` is malformed, the name is not one of ours, or the size cannot be right.
        """
        if not isinstance(data, dict) or data.keys() != _FIELDS:
            raise BankError("A sample in the manifest must have the fields `info`, `file` and `size`.")
        info, file, size = SampleInfo.from_json(data["info"]), data["file"], data["size"]
        match = _SAMPLE.fullmatch(file) if isinstance(file, str) else None
        if match is None or match[1] != str(info.chain) or match[2] != str(info.step):
            raise BankError(
                f"{file!r:.120} is not the file name of the sample of chain {info.chain} and step {info.step}; "
                "only plain names of the bank's own pattern are opened."
            )
        check_size(file, size, sizes)
        return cls(info, file, size)


class Sizes(NamedTuple):
    """Bytes that the file of a sample can have: more than ``low``, at most ``high``."""

    low: int
    high: int


def sizes_of(spec: ModuleSpec, base: Base | None = None) -> Sizes:
    """What samples of ``spec`` take, some of whose tensors may stand in ``base``."""
    high = spec.nbytes_unpacked + _HEADER_BYTES + _HEADER_BYTES_PER_ENTRY * len(spec.entries)
    return Sizes(spec.nbytes - (0 if base is None else base.nbytes(spec)), high)


def check_size(file: str, size: object, sizes: Sizes) -> None:
    """Raise :class:`BankError` unless ``size`` is what a sample can take."""
    if type(size) is not int or not sizes.low < size <= sizes.high:
        raise BankError(f"{file}: a sample of this module takes {sizes.low} to {sizes.high} bytes, not {size!r:.80}.")
