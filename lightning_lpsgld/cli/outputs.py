"""Places that a command is to write to: looked at before it works for minutes."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_lpsgld.bank.manifest import MANIFEST
from lightning_lpsgld.cli.errors import CommandError

__all__ = ["checked_file", "checked_folder"]


def checked_file(path: str, key: str) -> Path:
    """The path of a file to write, whose folder is made.

    Args:
        path: As it was given.
        key: What gave it, for messages.

    Raises:
        CommandError: If it is a folder, or nothing can be written there.
    """
    file = Path(path)
    if file.is_dir():
        raise CommandError(f"{key}: {path} is a folder; name a file, e.g. {file / ('out' + file.suffix)}.")
    _check_place(path, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{key}: {file.parent} cannot be made ({error.strerror}); name another place.") from error
    if file.exists() and not os.access(file, os.W_OK):
        raise CommandError(f"{key}: {path} may not be written; change its permissions or name another place.")
    return file


def checked_folder(path: str, key: str, *, of_bank: bool) -> Path:
    """The path of a folder to write into, which is not made yet.

    Args:
        path: As it was given.
        key: What gave it, for messages.
        of_bank: Whether it is to become a bank; if not, a folder that is one is refused.

    Raises:
        CommandError: If it is empty, a file, inside a file, or not writable.
    """
    if not path.strip():
        raise CommandError(f"{key}: needs the path of a folder, got {path!r}.")
    if "://" in path:  # not of this machine: who writes there finds out
        return Path(path)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{key}: {path} is a file, and a folder is made there; name another place.")
    if not of_bank and (folder / MANIFEST).exists():
        raise CommandError(f"{key}: {path} is a bank; name a folder for the files beside it.")
    _check_place(path, key)
    return folder


def _check_place(path: str, key: str) -> None:
    """Refuse a path below something that is no folder, or may not be written."""
    above = Path(path).absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise CommandError(f"{key}: {path} would be inside {above}, which is no folder; name another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise CommandError(f"{key}: {above} may not be written; change its permissions or name another place.")
