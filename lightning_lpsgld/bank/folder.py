"""Where files of a bank lie: a local directory with atomic writes, or anything that fsspec reaches."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from lightning_lpsgld.bank.errors import BankError

__all__ = ["Folder", "LocalFolder", "RemoteFolder", "open_folder", "sync_directory"]

log = logging.getLogger(__name__)

_PLAIN = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}")
_TEMPORARY = re.compile(r"\.[a-z0-9.-]{1,128}\.[0-9a-f]{16}\.tmp")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
#: Age at which a temporary file is taken for one that nobody writes any more.
_OLD_SECONDS = 3600.0
_CAREFUL = _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Folder(Protocol):
    """Flat set of files. Names are plain: no separators, no dots in front."""

    location: str
    #: Whether files can be appended to.
    appends: bool

    def create(self) -> None:
        """Make the folder if it is not there."""

    def there(self) -> bool:
        """Whether the folder itself is there."""

    def exists(self, name: str) -> bool:
        """Whether something has that name."""

    def mark(self, name: str) -> object:
        """Something that changes whenever the file does; ``None`` if it is missing."""

    def size(self, name: str) -> int:
        """Bytes of a file; :class:`BankError` if it is missing or not a plain file."""

    def read(self, name: str, limit: int) -> bytes:
        """Content; :class:`BankError` if it is missing, not a plain file, or larger than ``limit`` bytes."""

    def head(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes, or fewer if there are no more; otherwise as :meth:`read`."""

    def write(self, name: str, data: bytes, *, unnamed: bool = False) -> None:
        """Create or replace a file; ``unnamed``: nothing refers to it yet."""

    def append(self, name: str, data: bytes) -> None:
        """Write at the end of a file that is there."""

    def remove(self, names: Iterable[str]) -> set[str]:
        """Remove files; returns those that are gone now, also if they were before."""

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

    appends = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.location = str(self.path)

    def create(self) -> None:
        """Make the directory and its parents; on return their names are on the disk."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_directory(path.parent)

    def there(self) -> bool:
        """Whether the directory is there."""
        return self.path.is_dir()

    def exists(self, name: str) -> bool:
        """Whether something, a broken link included, has that name."""
        return os.path.lexists(self.path / _plain(name))

    def mark(self, name: str) -> object:
        """Inode, size and time of change."""
        try:
            status = os.lstat(self.path / _plain(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def size(self, name: str) -> int:
        """Bytes of the file."""
        try:
            status = os.lstat(f"{self.location}{os.sep}{_plain(name)}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BankError(f"{name} is missing from {self.location}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise BankError(f"{name} in {self.location} is not a regular file; links and devices are not opened.")
        return status.st_size

    def read(self, name: str, limit: int) -> bytes:
        """Content of the file, at most ``limit`` bytes."""
        size = self.size(name)
        if size > limit:
            raise BankError(f"{name} in {self.location} has {size} bytes; at most {limit} bytes are read.")
        return self.head(name, limit)

    def head(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes."""
        if not _NO_FOLLOW:
            self.size(name)
        try:
            handle = os.open(f"{self.location}{os.sep}{_plain(name)}", os.O_RDONLY | _CAREFUL)
        except OSError:
            self.size(name)  # says what it is, if it is missing or no regular file
            raise
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BankError(f"{name} in {self.location} is not a regular file; links and devices are not opened.")
            left = min(count, status.st_size)
            parts = [os.read(handle, left)]
            while (left := left - len(parts[-1])) and parts[-1]:
                parts.append(os.read(handle, left))
            return b"".join(parts)
        finally:
            os.close(handle)

    def write(self, name: str, data: bytes, *, unnamed: bool = False) -> None:
        """Create or replace the file atomically; on return it is on the disk.

        An ``unnamed`` file, which nothing refers to yet, is synced after its renaming where there is nothing to
        replace: one wait for the disk instead of two. After a crash it may be torn, which its checksum shows.
        """
        late = unnamed and not self.exists(name)
        temporary = self.path / f".{_plain(name)}.{secrets.token_hex(8)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                if not late:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path / name)
                if late:
                    os.fsync(file.fileno())
        except BaseException as error:
            for left in (temporary, self.path / name) if late else (temporary,):
                with contextlib.suppress(OSError):
                    os.unlink(left)
            if isinstance(error, IsADirectoryError):
                raise BankError(f"{name} in {self.location} is a directory; move it away.") from error
            raise
        sync_directory(self.path)

    def append(self, name: str, data: bytes) -> None:
        """Write at the end of the file; on return it is on the disk."""
        handle = os.open(self.path / _plain(name), os.O_WRONLY | os.O_APPEND | _NO_FOLLOW)
        try:
            written = os.write(handle, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, names: Iterable[str]) -> set[str]:
        """Remove files; what cannot be removed is logged."""
        gone = set()
        for name in names:
            try:
                os.unlink(self.path / _plain(name))
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("%s cannot be removed from %s: %s", name, self.location, error)
                continue
            gone.add(name)
        return gone

    def names(self) -> list[str]:
        """Names of all plain-named files."""
        return sorted(name for name in os.listdir(self.path) if _PLAIN.fullmatch(name))

    def sweep(self) -> None:
        """Remove temporary files that a killed process left behind at least an hour ago."""
        for name in os.listdir(self.path):
            if _TEMPORARY.fullmatch(name):
                with contextlib.suppress(OSError):
                    if time.time() - os.lstat(self.path / name).st_mtime > _OLD_SECONDS:
                        os.unlink(self.path / name)


def sync_directory(path: Path) -> None:
    """Have names in a directory on the disk on return, where the system can."""
    if os.name != "posix":  # a directory cannot be opened, hence not synced, elsewhere
        return
    handle = os.open(path, os.O_RDONLY)
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

    There is no lock and no journal: every addition uploads the manifest, and a second writer is noticed only when it
    has changed the manifest.

    Args:
        url: Address with ``://``.
    """

    appends = False

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

    def there(self) -> bool:
        """Always: object stores have no folders, only files."""
        return True

    def mark(self, name: str) -> object:
        """Checksum of the content."""
        try:
            return hashlib.blake2b(self.files.cat_file(self._path(name))).digest()
        except FileNotFoundError:
            return None

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

    def head(self, name: str, count: int) -> bytes:
        """The first ``count`` bytes."""
        end = min(count, self.size(name))
        return bytes(self.files.cat_file(self._path(name), start=0, end=end)) if end else b""

    def write(self, name: str, data: bytes, *, unnamed: bool = False) -> None:
        """Upload the file."""
        self.files.pipe_file(self._path(name), data)
        self.files.invalidate_cache(self.root)

    def append(self, name: str, data: bytes) -> None:
        """Not possible: objects are uploaded whole."""
        raise NotImplementedError(f"{self.location} cannot be appended to.")

    def remove(self, names: Iterable[str]) -> set[str]:
        """Remove files."""
        names = set(names)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self._path(name))
        self.files.invalidate_cache(self.root)
        return names

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
    """Folder of a path, or of an address with ``://``; ``file://`` (of this host) is local.

    Raises:
        BankError: If the path is empty or of another host, the protocol of the address is unknown, or its package is
            not installed.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip():
        raise BankError(f"The path of a bank must be a string that is not empty, got {text!r:.80}; None is in memory.")
    if text.startswith("file://"):
        host, slash, rest = text.removeprefix("file://").partition("/")
        if host not in ("", "localhost") or not slash:
            raise BankError(f"{text!r:.200} is no local file: write file:///path or file://localhost/path.")
        return LocalFolder(slash + rest)
    if "://" not in text:
        return LocalFolder(text)
    try:
        return RemoteFolder(text)
    except (ImportError, ValueError) as error:
        raise BankError(f"{text!r:.200} cannot be reached: {error} Install what the protocol needs.") from error
