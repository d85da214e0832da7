"""A private SQLite file: opened or made, upgraded if it is old, refused if it is not ours, set aside if it is damaged.

This module decides what becomes of the file that a setting names, whatever is found there, and how a transaction ends.
What is kept in the file, when it is written, and what follows if it cannot be, is decided by the rooms that own it.

Every database is used in one thread of its own; `open_in` and `close_in` are the two ends of that thread's life.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sqlite3
import stat
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, final

from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import ThreadPoolExecutor

__all__ = [
    "HEAD_BYTES",
    "Damaged",
    "Database",
    "Kind",
    "close_in",
    "error_code",
    "is_damage",
    "is_header",
    "open_in",
    "refuse_text",
    "transaction",
]

_T = TypeVar("_T")

_LOCK_PATIENCE: Final = 1.0  # seconds that opening waits for whoever has the file

_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_OPERATORS_TO_MEND: Final = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

HEAD_BYTES: Final = 65536
"""Bytes of a file by which it is judged: whether it is a database, or a text, or neither."""

_MAGIC: Final = b"SQLite format 3\0"
_PAGE_SIZES: Final = frozenset({1, *(2**power for power in range(9, 16))})  # as in the header; 1 is 65536
_FRACTIONS: Final = bytes((64, 32, 32))  # as they are in every database

_log = logging.getLogger("pybustcall.daemon")


class Damaged(sqlite3.DatabaseError):
    """The file is ours, and cannot be used as it is."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a database is for.

    - `setting`: which setting names its file, as in "state"
    - `application`, `version`: by which its files are known as ours
    - `schema`: the statements that make a new one
    - `upgrades`: the statements that make version k + 1 of version k, for each k that can still be read
    - `loss`: what setting a damaged file aside means, as in "idempotency keys used before are forgotten"
    """

    setting: str
    application: int
    version: int
    schema: tuple[str, ...]
    loss: str
    upgrades: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@final
class Database:
    """A database in a private file or, without a path, in memory. Used in one thread only.

    A file belongs to one daemon at a time: what another daemon did to its own cache says nothing of this one's. A
    damaged file is set aside and a new one begun, also in the midst of the work; so is one of a version that cannot be
    read, as a newer daemon's, and an older one is upgraded where that can be. Another program's database, and a text,
    are refused and left as they are. `prepare` is called with each connection that was opened.
    """

    def __init__(self, kind: Kind, path: Path | None, prepare: Callable[[sqlite3.Connection], None]) -> None:
        self._kind = kind
        self.path = self._path = path
        self._prepare = prepare
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file or make it. Raises `ConfigurationError` for what the operator must mend."""
        self._opened()

    def close(self) -> None:
        """Close the file."""
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def use(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` with the connection. A damage that it meets is raised: what to do then is the caller's affair."""
        return work(self._opened())

    def do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` with the connection; if it meets a damage, do it again in a new file."""
        try:
            return self.use(work)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self.set_aside(str(error))
            return self.use(work)

    def set_aside(self, why: str) -> None:
        """Rename what cannot be used, so that a new file can be begun; it may be looked at, and is never removed."""
        with suppress(sqlite3.Error):
            self.close()
        if self._path is None:
            return
        aside = next(path for path in map(self._numbered, count(1)) if not os.path.lexists(path))
        self._path.rename(aside)
        for suffix in ("-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                Path(f"{self._path}{suffix}").rename(f"{aside}{suffix}")
        _log.warning(
            "the %s file %r cannot be used (%s); it was set aside as %r and a new one begun: %s",
            self._kind.setting, str(self._path), why, str(aside), self._kind.loss,
        )  # fmt: skip

    def _numbered(self, number: int) -> Path:
        return Path(f"{self._path}.corrupt-{number}")

    # Opening

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            try:
                self._connect()
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                self._refuse_text()
                self.set_aside(str(error))
                self._connect()
        assert self._db is not None  # noqa: S101 - made by _connect
        return self._db

    def _refuse_text(self) -> None:
        """Raise `ConfigurationError` if what SQLite cannot read was never a database, but something that people write.

        The file is opened here, since it cannot be one of ours that another daemon in this process has locked.
        """
        if self._path is None:
            return
        with self._path.open("rb") as file:
            why = refuse_text(file.read(HEAD_BYTES), self._kind.setting)
        if why is not None:
            raise _refuse(self._path, self._kind.setting, why)

    def _connect(self) -> None:
        if self._path is None:
            self._db = self._connected()
            return
        mode = _make_private(self._path, self._kind.setting)
        try:
            self._db = self._connected()
        except (ConfigurationError, sqlite3.Error):
            self._path.chmod(mode)  # what is refused is left as it is
            raise

    def _connected(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path or ":memory:", timeout=_LOCK_PATIENCE, isolation_level=None)
            try:
                self._check(db)
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        except sqlite3.Error as error:
            mistake = _mistake(error, self._path, self._kind.setting)
            if mistake is None:
                raise
            raise mistake from error
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        application = _pragma(db, "application_id")
        is_new = not application and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_new and application != self._kind.application:
            why = "is a database of something else, which is left as it is; choose another path"
            raise _refuse(self._path, self._kind.setting, why)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):  # the first would change another's file
            db.execute(f"PRAGMA {pragma}")
        if is_new:
            with transaction(db):
                for statement in self._kind.schema:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self._kind.application}")
                db.execute(f"PRAGMA user_version = {self._kind.version}")
            return
        version = _pragma(db, "user_version")
        missing = range(version, self._kind.version)
        if version > self._kind.version or not all(step in self._kind.upgrades for step in missing):
            raise Damaged(f"it is of version {version}, not {self._kind.version}")
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise Damaged(str(found))
        for step in missing:
            self._upgrade(db, step)

    def _upgrade(self, db: sqlite3.Connection, version: int) -> None:
        with transaction(db):  # broken off, it is of the old version still, and upgraded the next time
            for statement in self._kind.upgrades[version]:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {version + 1}")
        _log.info("the %s file %r was upgraded to version %d", self._kind.setting, str(self._path), version + 1)


def refuse_text(head: bytes, setting: str) -> str | None:
    """Tell why a file that begins so is none for this `setting`, if people write such; None if they do not.

    `head` are its first `HEAD_BYTES` bytes. An empty file is no text.
    """
    if not head or head.startswith(_MAGIC) or b"\0" in head:
        return None
    why = "is a text and no database, and is left as it is; choose another path"
    if setting == "registry" and head.lstrip()[:1] in {b"{", b"["}:
        why += ", and give JSON that lists entries with --register"
    return why


def is_header(head: bytes) -> bool:
    """Tell whether SQLite would take a file that begins so for a database, and believe the rest of its header."""
    size, reads, fractions = int.from_bytes(head[16:18]), head[19:20], head[21:24]
    return head.startswith(_MAGIC) and size in _PAGE_SIZES and reads <= b"\2" and fractions == _FRACTIONS


def _make_private(path: Path, setting: str) -> int:
    """See to it that there is a file with mode 0600; tell its mode before. Raises `ConfigurationError` if it cannot be.

    A file that is there is not opened: closing it again would release the locks of another daemon in this process.
    """
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise _refuse(path, setting, "is not a regular file; choose another path")
        if stat.S_IMODE(mode) != 0o600:
            path.chmod(0o600)
        return stat.S_IMODE(mode)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        why = f"cannot be used: {error.strerror}; choose another path, or make its directory"
        raise _refuse(path, setting, why) from error


def _mistake(error: sqlite3.Error, path: Path | None, setting: str) -> ConfigurationError | None:
    """Say what the operator must mend before the file can be opened; None if it is nothing of that kind."""
    code = error_code(error)
    if code == sqlite3.SQLITE_BUSY:
        return _refuse(path, setting, "is in use by another process; give each daemon a file of its own")
    if code in _OPERATORS_TO_MEND:
        return _refuse(path, setting, f"cannot be used: {error}")
    return None


def _refuse(path: Path | None, setting: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"the {setting} file {str(path)!r} {why}", setting=setting)


def error_code(error: Exception) -> int:
    """Tell SQLite's primary code of an error; 0 for those that it did not make itself."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether the file cannot be used as it is, and never will be."""
    return isinstance(error, Damaged) or error_code(error) in _DAMAGE


def _pragma(db: sqlite3.Connection, name: str) -> int:
    number: int = db.execute(f"PRAGMA {name}").fetchone()[0]
    return number


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Have what is done within committed as one; if anything fails, nothing of it was done."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it already
            db.execute("ROLLBACK")
        raise


# The thread


async def open_in(thread: ThreadPoolExecutor, database: Database, tolerated: tuple[type[Exception], ...] = ()) -> None:
    """Open a database in its thread. If that fails, the thread ends, unless the failure is one that is `tolerated`."""
    try:
        await asyncio.get_running_loop().run_in_executor(thread, database.open)
    except tolerated:
        raise
    except BaseException as error:
        thread.submit(database.close)  # cancelled, the thread goes on, and may yet open the file
        thread.shutdown(wait=not isinstance(error, asyncio.CancelledError))
        raise


async def close_in(thread: ThreadPoolExecutor, database: Database, patience: float) -> bool:
    """Close a database and end its thread; tell whether that was done properly within `patience` seconds."""
    done = False
    try:
        closing = asyncio.get_running_loop().run_in_executor(thread, database.close)
        done = bool((await asyncio.wait({closing}, timeout=patience))[0])
        return done and closing.exception() is None
    finally:
        thread.shutdown(wait=done)
