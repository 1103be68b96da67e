"""Where files of a bank lie: a local directory with atomic writes, or anything that fsspec reaches."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from lightning_lpsgld.bank.errors import BankError

__all__ = ["Folder", "LocalFolder", "RemoteFolder", "open_folder"]

_PLAIN = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}")
_TEMPORARY = re.compile(r"\.[a-z0-9.-]{1,128}\.[0-9a-f]{16}\.tmp")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CAREFUL = _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Folder(Protocol):
    """Flat set of files. Names are plain: no separators, no dots in front."""

    location: str

    def create(self) -> None:
        """Make the folder if it is not there."""

    def exists(self, name: str) -> bool:
        """Whether something has that name."""

    def size(self, name: str) -> int:
        """Bytes of a file; :class:`BankError` if it is missing or not a plain file."""

    def read(self, name: str, limit: int) -> bytes:
        """Content; :class:`BankError` if it is missing, not a plain file, or larger than ``limit`` bytes."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are gone already are no error."""

    def names(self) -> list[str]:
        """Names of the files, in order."""


def _plain(name: str) -> str:
    if not _PLAIN.fullmatch(name):
        raise BankError(f"{name!r:.120} is not a plain file name.")
    return name


class LocalFolder:
    """A local directory.

    A write is atomic and durable: temporary file in the same directory, flush, fsync, rename, fsync of the directory.
    Files are opened without following symbolic links, and only if they are regular files.

    Args:
        path: The directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.location = str(self.path)

    def create(self) -> None:
        """Make the directory and its parents."""
        self.path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether something, a broken link included, has that name."""
        return os.path.lexists(self.path / _plain(name))

    def _stat(self, name: str) -> os.stat_result:
        try:
            status = os.lstat(self.path / _plain(name))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BankError(f"{name} is missing from {self.location}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise BankError(f"{name} in {self.location} is not a regular file; links and devices are not opened.")
        return status

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return self._stat(name).st_size

    def read(self, name: str, limit: int) -> bytes:
        """Content of the file, at most ``limit`` bytes."""
        self._stat(name)
        try:
            handle = os.open(self.path / name, os.O_RDONLY | _CAREFUL)
        except FileNotFoundError as error:
            raise BankError(f"{name} is missing from {self.location}.") from error
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                raise BankError(f"{name} in {self.location} is no regular file of at most {limit} bytes.")
            return file.read(limit)

    def write(self, name: str, data: bytes) -> None:
        """Create or replace the file atomically; on return it is on the disk."""
        temporary = self.path / f".{_plain(name)}.{secrets.token_hex(8)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._sync()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / _plain(name))

    def names(self) -> list[str]:
        """Names of all plain-named files."""
        return sorted(name for name in os.listdir(self.path) if _PLAIN.fullmatch(name))

    def sweep(self) -> None:
        """Remove temporary files that a killed process left behind."""
        for name in os.listdir(self.path):
            if _TEMPORARY.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path / name)

    def _sync(self) -> None:
        if os.name != "posix":  # a directory cannot be opened, hence not synced, elsewhere
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RemoteFolder:
    """A folder behind fsspec (``s3://``, ``gs://``, ``memory://``, ...).

    **Where the promise stops.** A file is as atomic as one upload of the protocol is: on object stores whole or not at
    all, on others (``sftp://``, ``ftp://``) a crash may leave a torn file. Such a file is detected by its checksum, but
    a torn manifest has to be rebuilt with ``SampleBank.recover``. A sample is always uploaded before the manifest that
    names it.

    Args:
        url: Address with ``://``.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.files: Any
        self.files, root = url_to_fs(url)
        self.root = str(root).rstrip("/")
        self.location = url

    def _path(self, name: str) -> str:
        return f"{self.root}/{_plain(name)}"

    def create(self) -> None:
        """Make the folder where the protocol has folders."""
        self.files.makedirs(self.root, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether something has that name."""
        return bool(self.files.exists(self._path(name)))

    def size(self, name: str) -> int:
        """Bytes of the file."""
        try:
            info = self.files.info(self._path(name))
        except FileNotFoundError as error:
            raise BankError(f"{name} is missing from {self.location}.") from error
        if info.get("type") != "file" or info.get("islink") or not isinstance(info.get("size"), int):
            raise BankError(f"{name} in {self.location} is not a regular file of known size.")
        return int(info["size"])

    def read(self, name: str, limit: int) -> bytes:
        """Content of the file, at most ``limit`` bytes."""
        size = self.size(name)
        if size > limit:
            raise BankError(f"{name} in {self.location} has {size} bytes; at most {limit} are read.")
        try:
            return bytes(self.files.cat_file(self._path(name)))
        except FileNotFoundError as error:
            raise BankError(f"{name} is missing from {self.location}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Upload the file."""
        self.files.pipe_file(self._path(name), data)
        self.files.invalidate_cache(self.root)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self._path(name))
        self.files.invalidate_cache(self.root)

    def names(self) -> list[str]:
        """Names of all plain-named files."""
        try:
            listed = self.files.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in listed)
        return sorted(name for name in names if _PLAIN.fullmatch(name))

    def sweep(self) -> None:
        """Nothing to do: there are no temporary files."""


def open_folder(path: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """Folder of a path, or of an address with ``://``; ``file://`` is local.

    Raises:
        BankError: If the protocol of the address is unknown or its package is not installed.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return LocalFolder(text.removeprefix("file://"))
    if "://" not in text:
        return LocalFolder(text)
    try:
        return RemoteFolder(text)
    except (ImportError, ValueError) as error:
        raise BankError(f"{text!r:.200} cannot be reached: {error} Install what the protocol needs.") from error
