"""One writer at a time: a lock file that says who holds it, and since when."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_lpsgld.bank.errors import BankError

__all__ = ["LOCK", "FileLock"]

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

#: Name of the file in a bank's folder that its writer holds a lock on.
LOCK = ".lock"
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)

log = logging.getLogger(__name__)


class FileLock:
    """An exclusive lock on a directory, from :meth:`acquire` to :meth:`release`, the end of the object or the process.

    The system's own lock on the file (``flock``) decides, and it ends with the process that holds it, however that
    ends. The file says who that is: host, process and time. On file systems without such locks, the file's being there
    decides; one whose process on this host has ended is taken over. Processes that are forked do not hold it.

    Args:
        folder: The directory.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._release: weakref.finalize[Any, Any] | None = None
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._release is not None and self._release.alive

    def acquire(self) -> None:
        """Take the lock, at once or not at all.

        Raises:
            BankError: If another writer holds it, named with its age.
        """
        for _ in range(100):  # whoever releases the lock removes the file, perhaps just now
            handle = self._open()
            if handle is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.lstat(self.path)):
                    self._sign(handle)
                    return
            os.close(handle)
        raise BankError(f"{self.path} cannot be locked: it is made and removed by others all the time.")

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._release is not None:
            self._release()
        self._release = self._handle = None

    def _open(self) -> int | None:
        """Handle of the locked file, or ``None`` to try again."""
        exclusive = _flock_works(self.path.parent)
        try:
            handle = os.open(self.path, _FLAGS | (0 if exclusive else os.O_EXCL), 0o666)
        except FileExistsError:
            self._take_over_or_refuse()
            return None
        if not exclusive:
            return handle
        assert fcntl is not None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(handle)
            os.close(handle)
            raise self._refusal(owner) from error
        return handle

    def _sign(self, handle: int) -> None:
        previous = _owner(handle)
        if previous:
            log.warning(
                "%s is taken over from %s, which ended without giving it back.", self.path, _described(previous)
            )
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()})
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode())
        self._handle = handle
        self._release = weakref.finalize(self, _give_back, handle, str(self.path), os.getpid())
        _HELD.add(self)

    def _take_over_or_refuse(self) -> None:
        """Without locks of the system: remove the file if its process is known to have ended."""
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return
        owner = _owner(handle)
        os.close(handle)
        if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int) or _alive(owner["pid"]):
            raise self._refusal(owner)
        log.warning("%s is taken over from %s, which has ended.", self.path, _described(owner))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _refusal(self, owner: dict[str, Any]) -> BankError:
        return BankError(
            f"The bank at {self.path.parent} has another writer: {_described(owner)}. One run writes at a time; give "
            f"every run a path of its own and merge them. Within one process, `close()` the other bank first. If that "
            f"writer has ended, remove {self.path}."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_release": None, "_handle": None}  # a copy does not hold the lock


def _give_back(handle: int, path: str, pid: int) -> None:
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(handle)


def _owner(handle: int) -> dict[str, Any]:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        owner = json.loads(os.read(handle, 4096) or b"{}")
    except (OSError, ValueError, RecursionError):
        return {"pid": "?"}
    return owner if isinstance(owner, dict) else {"pid": "?"}


def _described(owner: dict[str, Any]) -> str:
    since = owner.get("since")
    age = f", for {max(time.time() - since, 0.0):.0f} s" if isinstance(since, float) else ""
    return f"process {owner.get('pid', '?')!s:.20} on {owner.get('host', '?')!s:.80}{age}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _flock_works(folder: Path) -> bool:
    """Whether the file system of ``folder`` has locks; tried on the directory itself, shared, for an instant."""
    if fcntl is None:
        return False
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked process has copies of the handles, and would hold the lock for as long as it lives."""
    for lock in list(_HELD):
        if lock._release is not None:
            lock._release()
        lock._release = lock._handle = None
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
