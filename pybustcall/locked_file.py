"""An SQLite file at a path that several processes use, and that any of them may make or set aside.

This module decides which file a process works in, and when it may be renamed. What is kept in the file, what makes it
one of ours, and who waits how long are the affair of the rooms above: the outbox, and caches in SQLite files.

Theory of operation. Who uses the file holds PATH.lock, shared with all others (flock); who makes it or sets it aside
holds it alone. Each use begins by making sure that its connection belongs to the file that is at the path now. So no
process can commit to a file that another has just set aside. A file is made under another name, and complete when it
gets its own. PATH.lock is never removed; should somebody else remove it, that is noticed as well.

The file itself is never opened but by SQLite while somebody may use it: closing it would drop the locks that SQLite
holds on it in this process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["WITH_IT", "Damaged", "LockedFile", "advice", "is_damage", "primary_code"]

WITH_IT: Final = ("-wal", "-shm", "-journal")
"""What SQLite puts beside a file."""

_Identity = tuple[int, int]


class Damaged(Exception):
    """The file is ours, and cannot be used as it is; the text says why."""


def primary_code(error: Exception) -> int:
    """Tell SQLite's primary result code of an error; 0 for those that it did not make itself."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def is_damage(error: Exception) -> bool:
    """Tell whether an error says that the file cannot be used as it is, whoever tries."""
    return isinstance(error, Damaged) or primary_code(error) in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


_UNOPENED: Final = "it cannot be opened; let this user read and write the file and its directory"
_DAMAGED: Final = "it is damaged, and so is the new one that was begun; look at the disk"
_FULL: Final = "its disk is full; make room there"
_BUSY: Final = "another process kept it locked for {timeout:g} s; see what holds it"
_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: "it is read-only; let this user write to the file and to its directory",
    sqlite3.SQLITE_CANTOPEN: _UNOPENED,
    sqlite3.SQLITE_PERM: _UNOPENED,
    sqlite3.SQLITE_IOERR: "its disk failed, is full or over a limit; look at the disk",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_NOMEM: "memory is short",
}
_ADVICE_OF_ERRNO: Final = {
    errno.ENOENT: "its directory does not exist; make it",
    errno.ENOTDIR: "its directory is no directory; choose another path",
    errno.ELOOP: "its lock file is a link; choose another path",
    errno.EISDIR: "a directory is where its lock file should be; choose another path",
    errno.EACCES: _UNOPENED,
    errno.EPERM: _UNOPENED,
    errno.EROFS: "its disk is read-only; choose another path",
    errno.ENOSPC: _FULL,
    errno.EMFILE: "this process has too many files open; allow more",
}


def advice(error: Exception, *, timeout: float) -> str:
    """Tell why the file cannot be used, and what to do; `timeout` is how long it was waited for, in seconds."""
    if isinstance(error, BlockingIOError):
        return _BUSY.format(timeout=timeout)
    if isinstance(error, Damaged):
        return _DAMAGED
    if isinstance(error, OSError):
        return _ADVICE_OF_ERRNO.get(error.errno or 0, f"the system says: {error.strerror}")
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return _ADVICE.get(primary_code(error), "SQLite failed").format(timeout=timeout) + f" ({name})"


class LockedFile(ABC):
    """The file at a path: opens it, makes it, sets it aside. Used by one thread at a time.

    - `patience`: seconds for which SQLite itself waits for a file that another process has locked

    `db` is the connection, if there is one. `is_first`: no such file was ever at this path, for all that is known: we
    made its lock file.
    """

    def __init__(self, path: str, *, patience: float) -> None:
        self.path = path
        self.db: sqlite3.Connection | None = None
        self.is_first = False
        self._patience = patience
        self._identity: _Identity | None = None  # of the file that `db` belongs to
        self._lock: int | None = None

    @abstractmethod
    def _flock(self, lock: int, how: int) -> None:
        """Take the lock, or raise that it cannot be had."""

    @abstractmethod
    def _refused(self, why: str) -> Exception:
        """Make the error of a path where something is that is none of ours, such as "is a symbolic link"."""

    @abstractmethod
    def _check(self, db: sqlite3.Connection) -> None:
        """Look at a file that was just opened, and make the connection ready; raise what is wrong with it."""

    @abstractmethod
    def _fill(self, db: sqlite3.Connection, path: str) -> None:
        """Make a new file whole; it has that name for now."""

    @abstractmethod
    def _clear(self) -> None:
        """See to what lies beside a path where no file is."""

    @abstractmethod
    def _put_aside(self, why: str) -> None:
        """Rename the file, and what belongs to it, and say so."""

    @contextmanager
    def use(self) -> Generator[sqlite3.Connection, None, None]:
        """Lend a connection to the file that is at the path now, and keep everybody from setting it aside."""
        while True:
            with self.holding(fcntl.LOCK_SH):
                found = self._look()
                if self.db is not None and found != self._identity:
                    self._disconnect()
                if found is not None:
                    yield self.db or self._open(found)
                    return
            self.make()

    def set_aside(self, why: str) -> None:
        """Rename the file that was found damaged, and what belongs to it, unless another process has done so."""
        # The connection is closed after it: SQLite sees then that the file was moved, and leaves the log as it is.
        try:
            with self.holding(fcntl.LOCK_EX):
                if self._look() == self._identity:
                    self._put_aside(why)
        finally:
            self._disconnect()

    def make(self) -> None:
        """Put a new, empty file at the path, complete from its first moment, unless one is there."""
        with self.holding(fcntl.LOCK_EX):
            if self._look() is not None:
                return
            self._clear()
            new = f"{self.path}.new"
            for end in ("", *WITH_IT):
                Path(f"{new}{end}").unlink(missing_ok=True)
            os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            db = self._connect(new)
            try:
                self._fill(db, new)
            finally:
                db.close()
            Path(new).rename(self.path)
            self._sync_directory()
            self.is_first = False

    def close(self) -> None:
        """Close the connection and the lock; both are opened anew when they are needed."""
        self._disconnect()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def holding(self, how: int) -> Generator[None, None, None]:
        """Hold the lock, `fcntl.LOCK_SH` or `LOCK_EX`."""
        while True:
            lock = self._lock = self._open_lock() if self._lock is None else self._lock
            self._flock(lock, how)
            if _identity(os.fstat(lock)) == _identity_at(f"{self.path}.lock"):
                break
            os.close(lock)  # somebody removed the lock file, and others may hold another one by now
            self._lock = None
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)

    def _open_lock(self) -> int:
        path, flags = f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            lock = os.open(path, flags | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.open(path, flags, 0o600)
        self.is_first = True
        return lock

    def _disconnect(self) -> None:
        self._identity = None
        if self.db is not None:
            db, self.db = self.db, None
            db.close()

    def _look(self) -> _Identity | None:
        """Tell which file is at the path, or None; refuse what can be no file of ours."""
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise self._refused(
                "is a symbolic link" if stat.S_ISLNK(found.st_mode) else "is a directory or a special file"
            )
        return _identity(found)

    def _open(self, identity: _Identity) -> sqlite3.Connection:
        self._identity = identity
        if not os.lstat(self.path).st_size:
            raise Damaged("it is empty")
        db = self.db = self._connect(self.path)
        try:
            self._check(db)
        except BaseException as error:
            if not isinstance(error, Exception) or not is_damage(error):
                self._disconnect()
            raise
        return db

    def _connect(self, path: str) -> sqlite3.Connection:
        """Prepare to open a file that exists; nothing of it is read yet."""
        return sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=self._patience,
            isolation_level=None,
            check_same_thread=False,  # one at a time, though not always the same
        )

    def _rename(self, aside: str) -> None:
        """Rename the file and what belongs to it."""
        for end in ("", *WITH_IT):  # the file first: without it, nobody takes up the others
            with suppress(FileNotFoundError):
                os.replace(f"{self.path}{end}", f"{aside}{end}")  # noqa: PTH105
        self._sync_directory()

    def _sync_directory(self) -> None:
        """See to it that an old file does not come back if the machine stops."""
        directory = os.open(Path(self.path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _identity_at(path: str) -> _Identity | None:
    try:
        return _identity(os.lstat(path))
    except FileNotFoundError:
        return None
