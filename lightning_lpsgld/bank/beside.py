"""A new bank appears whole or not at all: it is made beside its place, and gets its name when it is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning_lpsgld.bank.folder import LocalFolder, open_folder, sync_directory
from lightning_lpsgld.bank.manifest import MANIFEST
from lightning_lpsgld.bank.recovery import check_vacant

__all__ = ["made_beside"]


@contextlib.contextmanager
def made_beside(path: str | os.PathLike[str]) -> Iterator[str]:
    """Address to make a new bank at, which is at ``path`` when the block ends, and nowhere if it raises.

    The bank has to be closed within the block. A local one is made in a hidden folder on the same file system and
    renamed; where ``path`` is a folder with other files already, its files are moved one by one, the manifest last. A
    process that is killed leaves the hidden folder and no bank.

    **Where the promise stops.** Behind fsspec nothing can be renamed: files are uploaded to ``path`` itself, and are
    removed again if the block raises. If the process is killed, they stay.

    Args:
        path: As for :class:`.SampleBank`.

    Yields:
        The address.

    Raises:
        BankError: If there is a bank at ``path`` already, or samples without a manifest.
    """
    folder = open_folder(path)
    check_vacant(folder)
    if isinstance(folder, LocalFolder):
        with _hidden(folder.path.absolute()) as place:
            yield str(place)
            check_vacant(folder)
            _move(place, folder)
        return
    before = set(folder.names())
    try:
        yield folder.location
    except BaseException:
        folder.remove(set(folder.names()) - before)
        raise


@contextlib.contextmanager
def _hidden(target: Path) -> Iterator[Path]:
    """A folder that does not exist yet, on the target's file system; removed if it is still there in the end."""
    around = next(parent for parent in target.parents if parent.is_dir())
    place = around / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _move(place: Path, folder: LocalFolder) -> None:
    target = folder.path.absolute()
    LocalFolder(target.parent).create()
    if folder.there() and any(target.iterdir()):
        for name in sorted(LocalFolder(place).names(), key=lambda name: name == MANIFEST):
            os.replace(place / name, target / name)
        sync_directory(target)
    else:
        os.rename(place, target)
    sync_directory(target.parent)
