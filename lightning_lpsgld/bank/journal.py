"""The journal beside a manifest: one line per change since the manifest was written, each with its own checksum."""

from __future__ import annotations

import contextlib
import json
from typing import Any, NamedTuple

from lightning_lpsgld.bank.catalog import Catalog, Change
from lightning_lpsgld.bank.errors import BankError
from lightning_lpsgld.bank.manifest import check_json_size
from lightning_lpsgld.bank.records import Sizes, checksum, sizes_of

__all__ = ["Replay", "header", "journal_name", "line", "replay"]


def journal_name(journal: str) -> str:
    """File name of the journal with that id."""
    return f"journal-{journal}.jsonl"


def line(journal: str, number: int, text: str) -> bytes:
    """Line ``number`` of a journal: a checksum over its id, its number and the text, then the text."""
    return f"{checksum(f'{journal}:{number}:{text}'.encode())} {text}\n".encode()


def header(journal: str) -> bytes:
    """First line of a journal."""
    return line(journal, 0, '"lightning_lpsgld.bank"')


class Replay(NamedTuple):
    """What reading a journal gave.

    Attributes:
        lines: Lines that were applied, the header included.
        torn: Bytes of an unfinished last line; nobody was told that this change was made.
    """

    lines: int
    torn: int


def replay(catalog: Catalog, journal: str, data: bytes) -> Replay:
    """Apply every line of a journal to the catalog of its manifest.

    A last line that is not whole is left out: it was being written when the process ended. Any other line that is not
    what was written is an error.

    Raises:
        BankError: If a line was altered, or the header is missing.
    """
    check_json_size(data)
    rows = data.split(b"\n")
    name, torn = journal_name(journal), len(rows.pop())
    if not rows:
        raise BankError(f"{name} was altered: it lacks its first line. `SampleBank.recover(path)` reads the samples.")
    texts = []
    for number, row in enumerate(rows):
        digest, _, text = row.partition(b" ")
        if checksum(b"%s:%d:%s" % (journal.encode(), number, text)).encode() != digest:
            raise BankError(
                f"{name} was altered: the checksum of line {number} does not match. `SampleBank.recover(path)` reads "
                "the samples."
            )
        texts.append(text)
    sizes = None if catalog.spec is None else sizes_of(catalog.spec, catalog.base)
    for number, data in enumerate(_parsed(texts, name)):
        if number:
            catalog.apply(_change(data, sizes, f"{name}, line {number}"))
    catalog.check_complete()
    return Replay(len(rows), torn)


def _parsed(texts: list[bytes], name: str) -> list[Any]:
    """Every line's JSON; at once where that works, line by line to say which one is wrong."""
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(b"[%s]" % b",".join(texts))
        if len(parsed) == len(texts):
            return list(parsed)
    parsed = []
    for number, text in enumerate(texts):
        try:
            parsed.append(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise BankError(f"{name}, line {number}: {str(error)[:400]}") from error
    return parsed


def _change(data: object, sizes: Sizes | None, where: str) -> Change:
    if sizes is None:
        raise BankError(f"{where}: a sample without a module.")
    try:
        return Change.from_json(data, sizes)
    except BankError as error:
        raise BankError(f"{where}: {str(error)[:400]}") from error
