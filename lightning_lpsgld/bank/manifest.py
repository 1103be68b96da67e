"""The table of contents of a bank: JSON with a version and a checksum of its own, read with distrust."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.retention import Policy, check_retention
from lightning_lpsgld.bank.sample import SampleInfo
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["MANIFEST", "Manifest", "Record", "checksum", "sample_name"]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 2**28
_SAMPLE = re.compile(r"sample-c(0|[1-9][0-9]{0,18})-s(0|[1-9][0-9]{0,18})-([0-9a-f]{40})\.safetensors")
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
    """A sample's line in the manifest.

    Attributes:
        info: Metadata.
        file: Plain file name that holds chain, step and checksum.
        size: Bytes of the file.
    """

    info: SampleInfo
    file: str
    size: int

    @property
    def key(self) -> tuple[int, int]:
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
    def from_json(cls, data: object, spec: ModuleSpec) -> Record:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed, the name is not one of ours, or the size cannot be right.
        """
        if not isinstance(data, dict) or set(data) != {"info", "file", "size"}:
            raise BankError("A sample in the manifest must have the fields `info`, `file` and `size`.")
        info, file, size = SampleInfo.from_json(data["info"]), data["file"], data["size"]
        parsed = parse_sample_name(file) if isinstance(file, str) else None
        if parsed is None or parsed[:2] != (info.chain, info.step):
            raise BankError(
                f"{file!r:.120} is not the file name of the sample of chain {info.chain} and step {info.step}; "
                "only plain names of the bank's own pattern are opened."
            )
        check_size(file, size, spec)
        return cls(info, file, size)


def check_size(file: str, size: object, spec: ModuleSpec) -> None:
    """Raise :class:`BankError` unless ``size`` is what a sample of ``spec`` can take."""
    most = spec.nbytes + _HEADER_BYTES + _HEADER_BYTES_PER_ENTRY * len(spec.entries)
    if type(size) is not int or not spec.nbytes < size <= most:
        raise BankError(f"{file}: a sample of this module takes {spec.nbytes} to {most} bytes, not {size!r:.80}.")


@dataclass(frozen=True)
class Manifest:
    """Everything about a bank but the tensors.

    Attributes:
        spec: The module's description; ``None`` until the first sample.
        records: The samples, in the order in which they arrived.
        arrivals: Per chain, the steps of all samples that were offered, kept or not.
        capacity: Most samples kept per chain, or ``None``.
        policy: What a full bank does.
        seed: Seed of the reservoir.
    """

    spec: ModuleSpec | None = None
    records: tuple[Record, ...] = ()
    arrivals: dict[int, tuple[int, ...]] = field(default_factory=dict)
    capacity: int | None = None
    policy: Policy = "thin"
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain form with version and checksum."""
        body = {
            "format": "lightning_lpsgld.bank",
            "version": FORMAT_VERSION,
            "fingerprint": None if self.spec is None else self.spec.fingerprint,
            "module": None if self.spec is None else self.spec.to_json(),
            "capacity": self.capacity,
            "policy": self.policy,
            "seed": self.seed,
            "arrivals": {str(chain): list(steps) for chain, steps in self.arrivals.items()},
            "samples": [record.to_json() for record in self.records],
        }
        return {**body, "checksum": body_checksum(body)}

    def dumps(self) -> bytes:
        """File content.

        Raises:
            BankError: If it would be larger than what is read.
        """
        data = json.dumps(self.to_json(), indent=1, allow_nan=False).encode()
        if len(data) > MAX_MANIFEST_BYTES:
            raise BankError(f"{MANIFEST} would exceed {MAX_MANIFEST_BYTES} bytes; start another bank and merge later.")
        return data

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        """Inverse of :meth:`dumps`.

        Raises:
            BankError: If ``data`` is not a manifest that a bank of this or an earlier version wrote.
        """
        try:
            parsed = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BankError(f"{MANIFEST} is not valid JSON: {str(error)[:200]}.") from error
        return cls.from_json(parsed)

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Inverse of :meth:`to_json`.

        Raises:
            BankError: If ``data`` is malformed.
        """
        body = _checked_body(data)
        check_retention(body["capacity"], body["policy"], body["seed"])
        spec = None if body["module"] is None else ModuleSpec.from_json(body["module"])
        if body["fingerprint"] != (None if spec is None else spec.fingerprint):
            raise BankError(f"{MANIFEST}: the fingerprint is not that of the module described beside it.")
        samples = body["samples"]
        if not isinstance(samples, list) or (samples and spec is None):
            raise BankError(f"{MANIFEST}: `samples` must be a list, and empty without a module.")
        records = tuple(Record.from_json(sample, spec) for sample in samples) if spec is not None else ()
        arrivals = _arrivals_from_json(body["arrivals"])
        keys = [record.key for record in records]
        if len(set(keys)) != len(keys):
            raise BankError(f"{MANIFEST}: two samples have the same chain and step.")
        offered = {(chain, step) for chain, steps in arrivals.items() for step in steps}
        if not offered.issuperset(keys):
            raise BankError(f"{MANIFEST}: a sample is missing from `arrivals`.")
        return cls(spec, records, arrivals, body["capacity"], body["policy"], body["seed"])


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def body_checksum(body: dict[str, Any]) -> str:
    """Checksum of a manifest's fields without ``checksum`` itself; of their values, not of white space.

    Raises:
        BankError: If the fields cannot be written as JSON.
    """
    try:
        text = json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"{MANIFEST} cannot be written as JSON: {str(error)[:200]}.") from error
    return checksum(text.encode())


_FIELDS = {
    "format",
    "version",
    "fingerprint",
    "module",
    "capacity",
    "policy",
    "seed",
    "arrivals",
    "samples",
    "checksum",
}


def _checked_body(data: object) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != "lightning_lpsgld.bank":
        raise BankError(f"{MANIFEST} is not the manifest of a sample bank.")
    version = data.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise BankError(
            f"{MANIFEST} has format version {version!r:.80}, this release reads {FORMAT_VERSION}. "
            "Use a release that matches."
        )
    if set(data) != _FIELDS:
        raise BankError(f"{MANIFEST} must have exactly the fields {sorted(_FIELDS)}.")
    body = {name: value for name, value in data.items() if name != "checksum"}
    if data["checksum"] != body_checksum(body):
        raise BankError(
            f"{MANIFEST} was altered: its checksum does not match. "
            "`SampleBank.recover(path)` rebuilds it from the samples."
        )
    return body


def _arrivals_from_json(data: object) -> dict[int, tuple[int, ...]]:
    if not isinstance(data, dict):
        raise BankError(f"{MANIFEST}: `arrivals` must map chains to lists of steps.")
    arrivals: dict[int, tuple[int, ...]] = {}
    for chain, steps in data.items():
        if not isinstance(chain, str) or not re.fullmatch(r"0|[1-9][0-9]{0,18}", chain) or int(chain) >= 2**63:
            raise BankError(f"{MANIFEST}: {chain!r:.80} in `arrivals` is no chain.")
        if not isinstance(steps, list) or not all(type(step) is int and 0 <= step < 2**63 for step in steps):
            raise BankError(f"{MANIFEST}: `arrivals` of chain {chain} must be a list of steps.")
        if len(set(steps)) != len(steps):
            raise BankError(f"{MANIFEST}: a step is twice in `arrivals` of chain {chain}.")
        arrivals[int(chain)] = tuple(steps)
    return arrivals
