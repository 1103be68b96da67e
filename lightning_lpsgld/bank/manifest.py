"""The table of contents as a file: JSON with a version and a checksum of its own, read with distrust."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from lightning_lpsgld.bank.base import Base
from lightning_lpsgld.bank.catalog import Catalog, check_run
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.records import Record, checksum, parse_sample_name, sizes_of
from lightning_lpsgld.bank.retention import check_retention
from lightning_lpsgld.bank.spec import ModuleSpec

__all__ = ["MANIFEST", "MAX_MANIFEST_BYTES", "Manifest", "body_checksum", "check_json_size", "checksum"]

#: Name of a bank's table of contents.
MANIFEST = "manifest.json"
FORMAT_VERSION = 3
#: A longer table of contents is not read: it is no bank's.
MAX_MANIFEST_BYTES = 2**28
#: Most values in a manifest. Parsed, each takes up to a hundred bytes, however few its text has.
_MAX_VALUES = 2**23
_JOURNAL = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Manifest:
    """What the manifest says.

    Attributes:
        catalog: The table of contents, without what the journal adds.
        journal: Id of the journal that goes on from here; ``None``: there is none.
    """

    catalog: Catalog
    journal: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain form with version and checksum."""
        body = self._body()
        return {**body, "checksum": body_checksum(body)}

    def _body(self) -> dict[str, Any]:
        catalog = self.catalog
        base = {}  # without one, older releases read the manifest
        if catalog.base is not None or catalog.kind != "stored":
            base["base"] = (Base(catalog.kind, {}) if catalog.base is None else catalog.base).to_json()
        return {
            "format": "lightning_lpsgld.bank",
            "version": FORMAT_VERSION if base else 2,
            "fingerprint": None if catalog.spec is None else catalog.spec.fingerprint,
            "module": None if catalog.spec is None else catalog.spec.to_json(),
            "capacity": catalog.capacity,
            "policy": catalog.policy,
            "seed": catalog.seed,
            "recovered": catalog.recovered,
            "runs": {str(chain): run for chain, run in catalog.runs.items()},
            "arrivals": {str(chain): list(steps) for chain, steps in catalog.arrivals.items()},
            "samples": [record.to_json() for record in catalog.records.values()],
            "removed": sorted(catalog.removed),
            "journal": self.journal,
            **base,
        }

    def dumps(self) -> bytes:
        """File content.

        Raises:
            BankError: If it would be larger than what is read.
        """
        body = self._body()
        text = _canonical(body)
        data = f'{{"checksum":"{checksum(text)}",'.encode() + text[1:]
        try:
            check_json_size(data)
        except BankError as error:
            raise BankError(f"{error} Start another bank and merge later.") from error
        return data

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        """Inverse of :meth:`dumps`.

        Raises:
            BankError: If ``data`` is not a manifest that a bank of this or an earlier version wrote.
        """
        check_json_size(data)
        try:
            parsed = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BankError(f"{MANIFEST} is not valid JSON: {str(error)[:200]}.") from error
        return cls.from_json(parsed, sealed=_as_written(data))

    @classmethod
    def from_json(cls, data: object, *, sealed: bool = False) -> Manifest:
        """Inverse of :meth:`to_json`.

        Args:
            data: What :meth:`to_json` returned.
            sealed: Whether its checksum has been compared already.

        Raises:
            BankError: If ``data`` is malformed.
        """
        body = _checked_body(data, sealed)
        check_retention(body["capacity"], body["policy"], body["seed"])
        spec = None if body["module"] is None else ModuleSpec.from_json(body["module"])
        if body["fingerprint"] != (None if spec is None else spec.fingerprint):
            raise BankError(f"{MANIFEST}: the fingerprint is not that of the module described beside it.")
        samples = body["samples"]
        if not isinstance(samples, list) or (samples and spec is None):
            raise BankError(f"{MANIFEST}: `samples` must be a list, and empty without a module.")
        base = Base("stored", {}) if body["base"] is None else Base.from_json(body["base"], spec)
        sizes = None if spec is None else sizes_of(spec, base)
        records = [] if sizes is None else [Record.from_json(sample, sizes) for sample in samples]
        unique = {record.key: record for record in records}
        if len(unique) != len(records):
            raise BankError(f"{MANIFEST}: two samples have the same chain and step.")
        if type(body["recovered"]) is not bool:
            raise BankError(f"{MANIFEST}: `recovered` must be true or false.")
        catalog = Catalog(
            spec, unique, _arrivals_from_json(body["arrivals"]), body["capacity"], body["policy"], body["seed"],
            _runs_from_json(body["runs"]), _removed_from_json(body["removed"]), body["recovered"],
            base if base.digests else None, base.kind,
        )  # fmt: skip
        catalog.check_complete()
        if catalog.removed & catalog.files:
            raise BankError(f"{MANIFEST}: a sample is among `samples` and among `removed`.")
        return cls(catalog, _journal_from_json(body["journal"]))


def check_json_size(data: bytes) -> None:
    """Raise :class:`BankError` if parsing ``data`` would take more memory than any bank's contents do."""
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if len(data) > MAX_MANIFEST_BYTES or values > _MAX_VALUES:
        raise BankError(
            f"{MANIFEST} has {len(data)} bytes and {values} values; at most {MAX_MANIFEST_BYTES} bytes and "
            f"{_MAX_VALUES} values are read."
        )


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def body_checksum(body: dict[str, Any]) -> str:
    """Checksum of a manifest's fields without ``checksum`` itself; of their values, not of white space.

    Raises:
        BankError: If the fields cannot be written as JSON.
    """
    return checksum(_canonical(body))


def _canonical(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"{MANIFEST} cannot be written as JSON: {str(error)[:200]}.") from error


_SEALED = re.compile(rb'\{"checksum":"([0-9a-f]{40})",')


def _as_written(data: bytes) -> bool:
    """Whether the bytes are those of :meth:`Manifest.dumps`: then nothing has to be written again to compare them."""
    seal = _SEALED.match(data)
    return seal is not None and checksum(b"{" + data[seal.end() :]).encode() == seal[1]


_FIELDS_1 = {
    *("format", "version", "fingerprint", "module", "capacity", "policy", "seed", "arrivals", "samples", "checksum")
}
#: Fields by version, and what those that an older version lacks mean.
_FIELDS_2 = _FIELDS_1 | {"recovered", "runs", "removed", "journal"}
_FIELDS = {1: _FIELDS_1, 2: _FIELDS_2, 3: _FIELDS_2 | {"base"}}
_ABSENT: dict[str, Any] = {"recovered": False, "runs": {}, "removed": [], "journal": None, "base": None}


def _checked_body(data: object, sealed: bool) -> dict[str, Any]:
    if not isinstance(data, dict) or data.get("format") != "lightning_lpsgld.bank":
        raise BankError(f"{MANIFEST} is not the manifest of a sample bank.")
    version = data.get("version")
    if type(version) is not int or version not in _FIELDS:
        raise BankError(
            f"{MANIFEST} has format version {version!r:.80}, this release reads 1 to {FORMAT_VERSION}. "
            "Use a release that matches."
        )
    if set(data) != _FIELDS[version]:
        raise BankError(f"{MANIFEST} must have exactly the fields {sorted(_FIELDS[version])}.")
    body = {name: value for name, value in data.items() if name != "checksum"}
    if not sealed and data["checksum"] != body_checksum(body):
        raise BankError(
            f"{MANIFEST} was altered: its checksum does not match. "
            "`SampleBank.recover(path)` rebuilds it from the samples."
        )
    return {**_ABSENT, **body}


def _chain_from_json(chain: object, where: str) -> int:
    if not isinstance(chain, str) or not re.fullmatch(r"0|[1-9][0-9]{0,18}", chain) or int(chain) >= 2**63:
        raise BankError(f"{MANIFEST}: {chain!r:.80} in `{where}` is no chain.")
    return int(chain)


def _arrivals_from_json(data: object) -> dict[int, list[int]]:
    if not isinstance(data, dict):
        raise BankError(f"{MANIFEST}: `arrivals` must map chains to lists of steps.")
    arrivals: dict[int, list[int]] = {}
    for name, steps in data.items():
        chain = _chain_from_json(name, "arrivals")
        if not isinstance(steps, list) or not all(type(step) is int and 0 <= step < 2**63 for step in steps):
            raise BankError(f"{MANIFEST}: `arrivals` of chain {chain} must be a list of steps.")
        if len(set(steps)) != len(steps):
            raise BankError(f"{MANIFEST}: a step is twice in `arrivals` of chain {chain}.")
        arrivals[chain] = list(steps)
    return arrivals


def _runs_from_json(data: object) -> dict[int, str]:
    if not isinstance(data, dict):
        raise BankError(f"{MANIFEST}: `runs` must map chains to ids of runs.")
    return {_chain_from_json(chain, "runs"): check_run(run) for chain, run in data.items()}


def _removed_from_json(data: object) -> set[str]:
    if not isinstance(data, list) or not all(isinstance(name, str) and parse_sample_name(name) for name in data):
        raise BankError(f"{MANIFEST}: `removed` must be a list of sample files.")
    return set(data)


def _journal_from_json(data: object) -> str | None:
    if data is not None and not (isinstance(data, str) and _JOURNAL.fullmatch(data)):
        raise BankError(f"{MANIFEST}: `journal` must be null or 16 hexadecimal digits, got {data!r:.80}.")
    return data
