"""What was answered under which idempotency key, so that a repeat is answered again and not applied again.

This module decides when a request is a repeat, who applies it, what is remembered, and for how long. How a request is
applied, how refusals read, and whose token it was, is `app`'s affair.

Theory of operation. The first request with a key takes off: a task of our own looks the key up, applies the request,
remembers the answer, and lands. Repeats that come meanwhile wait for it. The task does not belong to the request that
began it: what was begun cannot be called back from a cache, so a client that goes away breaks nothing off, and finds
the answer when it asks again. If the task fails, one of those who waited is the next to take off.

The order is apply, remember, answer. Remembered first, a daemon killed in between would later acknowledge a bust that
never was. Answered first, a repeat could come before it is known. As it is, a daemon killed between the effect and the
remembering applies the repeat once more, which costs a miss and harms nothing. For the same reason nothing that befalls
the memory keeps a request from being applied and answered: to forget costs a miss, to refuse leaves an old value.

All of SQLite is done in one thread, first come first served. The event loop waits for it for a limited time and, once
that is over, goes on as if there were no memory.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import json
import logging
import os
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar, final

from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from pybustcall.models import BustRequest

__all__ = ["MOST", "WINDOW", "Answer", "Idempotency", "KeyReused", "fingerprint_of", "name_of"]

_T = TypeVar("_T")

WINDOW: Final = 600.0
"""Seconds for which an answer is remembered."""
MOST: Final = 100_000
"""How many answers are remembered; beyond that the oldest go."""

_PATIENCE: Final = 1.0  # seconds that a request waits for the memory, each time that it needs it
_MOST_WAITING: Final = 1000  # questions to a memory that does not answer; more would only fill this process
_QUIET: Final = 10.0  # seconds between two lines of the log about a memory that fails
_LOCK_PATIENCE: Final = 1.0  # seconds that opening waits for whoever has the file

_APPLICATION: Final = 0x70624964  # "pbId", by which a database is known as ours
_VERSION: Final = 1
_SCHEMA: Final = (
    """CREATE TABLE answers (
        id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, request BLOB NOT NULL, body BLOB NOT NULL, at REAL NOT NULL
    )""",
    "CREATE INDEX answers_at ON answers (at)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_OPERATORS_TO_MEND: Final = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

# What may befall the memory while it is used. None of it keeps a request from being applied.
_FAILURES: Final = (sqlite3.Error, OSError, ConfigurationError)

_log = logging.getLogger("pybustcall.daemon")


class KeyReused(Exception):
    """The key belongs to another request."""

    def __init__(self) -> None:
        super().__init__("the key was used for another request; use a new key for each request")


class _Damaged(sqlite3.DatabaseError):
    """The file is ours, and cannot be used as it is."""


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """The body of a success. `replayed`: it is that of an earlier request; this one was not applied."""

    body: bytes
    replayed: bool


def name_of(token: str | None, key: str) -> bytes:
    """Tell the name under which a key is remembered: a digest of it, keyed with the token that let it in.

    Whoever has another token, or none, has other names. A name shows neither key nor token, and without the key it
    cannot even be used to try out guesses of the token.
    """
    return hmac.digest((token or "").encode(), key.encode(), "sha256")


def fingerprint_of(asked: BustRequest) -> bytes:
    """Tell requests apart by what changes their effect: the target and the strategy.

    `binding` and `fault_tolerance` change nothing here, and a replay by another client of the same application may say
    others. A field that is added one day must leave the fingerprint as it is where the field has its default.
    """
    return hashlib.sha256(json.dumps([asked.target, asked.strategy]).encode()).digest()


# In the thread


@final
class _Store:
    """The table of answers, in a file or, without a path, in memory. Used in one thread only.

    A file belongs to one daemon at a time: what another daemon did to its own cache says nothing of this one's. A
    damaged file is set aside and a new one begun, also in the midst of the work.
    """

    def __init__(self, path: Path | None, window: float, most: int, clock: Callable[[], float]) -> None:
        self._path = path
        self._window = window
        self._most = most
        self._clock = clock
        self._db: sqlite3.Connection | None = None
        self._count = 0
        self._now = 0.0

    def open(self) -> None:
        """Open the file or make it. Raises `ConfigurationError` for what the operator must mend."""
        self._opened()

    def close(self) -> None:
        """Close the file."""
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def recall(self, name: bytes) -> tuple[bytes, bytes] | None:
        """Tell what was remembered under a name, and is not too old: the fingerprint and the body."""
        return self._do(lambda db: self._recall(db, name))

    def remember(self, name: bytes, request: bytes, body: bytes) -> None:
        """Remember an answer; what is too old goes, and so does the oldest if there are too many."""
        self._do(lambda db: self._remember(db, name, request, body))

    def _do(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            return work(self._opened())
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            self._set_aside(str(error))
            return work(self._opened())

    def _recall(self, db: sqlite3.Connection, name: bytes) -> tuple[bytes, bytes] | None:
        now = self._tell_time(db)
        found: tuple[bytes, bytes] | None = db.execute(
            "SELECT request, body FROM answers WHERE name = ? AND at > ?", (name, now - self._window)
        ).fetchone()
        return found

    def _remember(self, db: sqlite3.Connection, name: bytes, request: bytes, body: bytes) -> None:
        now = self._tell_time(db)
        with _transaction(db):
            gone = db.execute("DELETE FROM answers WHERE at <= ? OR name = ?", (now - self._window, name)).rowcount
            db.execute("INSERT INTO answers (name, request, body, at) VALUES (?, ?, ?, ?)", (name, request, body, now))
            there = self._count - gone + 1
            surplus = max(0, there - self._most)
            if surplus:
                db.execute("DELETE FROM answers WHERE id IN (SELECT id FROM answers ORDER BY id LIMIT ?)", (surplus,))
        self._count = there - surplus

    def _tell_time(self, db: sqlite3.Connection) -> float:
        """Tell the time. If the clock was set back, what now lies in the future is dated to now, so that it ends."""
        now = self._clock()
        if now < self._now:
            _date_back(db, now)
        self._now = now
        return now

    # Opening

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            try:
                self._connect()
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                self._set_aside(str(error))
                self._connect()
        assert self._db is not None  # noqa: S101 - made by _connect
        return self._db

    def _connect(self) -> None:
        if self._path is not None:
            _make_private(self._path)
        try:
            db = sqlite3.connect(self._path or ":memory:", timeout=_LOCK_PATIENCE, isolation_level=None)
            try:
                self._prepare(db)
            except BaseException:
                db.close()
                raise
        except sqlite3.Error as error:
            mistake = _mistake(error, self._path)
            if mistake is None:
                raise
            raise mistake from error
        self._db = db

    def _prepare(self, db: sqlite3.Connection) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
            db.execute(f"PRAGMA {pragma}")
        if not _pragma(db, "application_id") and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with _transaction(db):
                for statement in _SCHEMA:
                    db.execute(statement)
        elif _pragma(db, "application_id") != _APPLICATION:
            raise _refuse(self._path, "is a database of something else, which is left as it is; choose another path")
        elif (version := _pragma(db, "user_version")) != _VERSION:
            raise _Damaged(f"it is of version {version}, not {_VERSION}")
        elif (found := _pragma(db, "quick_check(1)")) != "ok":
            raise _Damaged(str(found))
        self._now = self._clock()
        _date_back(db, self._now)
        self._count = db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def _set_aside(self, why: str) -> None:
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
            "the state file %r cannot be used (%s); it was set aside as %r and a new one begun: idempotency keys used"
            " before are forgotten",
            str(self._path), why, str(aside),
        )  # fmt: skip

    def _numbered(self, number: int) -> Path:
        return Path(f"{self._path}.corrupt-{number}")


def _make_private(path: Path) -> None:
    """See to it that there is a file with mode 0600. Raises `ConfigurationError` if there cannot be one.

    A file that is there is not opened: closing it again would release the locks of another daemon in this process.
    """
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise _refuse(path, "is not a regular file; choose another path")
        if stat.S_IMODE(mode) != 0o600:
            path.chmod(0o600)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        raise _refuse(path, f"cannot be used: {error.strerror}; choose another path, or make its directory") from error


def _mistake(error: sqlite3.Error, path: Path | None) -> ConfigurationError | None:
    """Say what the operator must mend before the file can be opened; None if it is nothing of that kind."""
    code = _code(error)
    if code == sqlite3.SQLITE_BUSY:
        return _refuse(path, "is in use by another process; give each daemon a file of its own")
    if code in _OPERATORS_TO_MEND:
        return _refuse(path, f"cannot be used: {error}")
    return None


def _refuse(path: Path | None, why: str) -> ConfigurationError:
    return ConfigurationError(f"the state file {str(path)!r} {why}", setting="state")


def _code(error: sqlite3.Error) -> int:
    """Tell the primary code of an error; 0 for those that Python's module makes itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_damage(error: sqlite3.Error) -> bool:
    return isinstance(error, _Damaged) or _code(error) in _DAMAGE


def _pragma(db: sqlite3.Connection, name: str) -> object:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _date_back(db: sqlite3.Connection, now: float) -> None:
    db.execute("UPDATE answers SET at = ? WHERE at > ?", (now, now))


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk may have ended it already
            db.execute("ROLLBACK")
        raise


# On the event loop


@final
@dataclass(slots=True, eq=False)
class _Flight:
    """A request that is being applied; `abandoned` when whoever began it has gone away."""

    request: bytes
    task: asyncio.Task[Answer]
    abandoned: bool = False


@final
class Idempotency:
    """Has each request applied once per key, and answers its repeats with the same body.

    - `path`: the file to remember in, mode 0600, so that a restarted daemon still knows; None forgets at the end
    - `window`: seconds for which an answer is remembered, by the wall clock
    - `most`: how many answers are remembered; beyond that the oldest go
    - `patience`: seconds that a request waits for the memory, each time that it needs it
    - `clock`: tells seconds since the Unix epoch

    A clock that is set back makes nothing last longer than `window` from then on; one that is set forward at most
    forgets everything. Belongs to one event loop, between `open` and `close`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        window: float = WINDOW,
        most: int = MOST,
        patience: float = _PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = None if path is None else Path(path).absolute()
        self._patience = patience
        self._store = _Store(self._path, window, most, clock)
        self._thread: ThreadPoolExecutor | None = None
        self._flights: dict[bytes, _Flight] = {}
        self._waiting = 0
        self._told = float("-inf")

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else str(self._path)
        return f"Idempotency({where}, {len(self._flights)} under way)"

    async def open(self) -> None:
        """Begin to remember. A full or failing disk is logged, and tried again at every request.

        Raises `ConfigurationError` (setting "state") if the file is another process's or another program's, or cannot
        be there. A damaged one is renamed, and a new one begun.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="pybustcall-idempotency")
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._store.open)
        except (sqlite3.Error, OSError) as error:
            self._warn("idempotency keys cannot be remembered for now", error)
        except BaseException as error:
            thread.submit(self._store.close)  # cancelled, the thread goes on, and may yet open the file
            thread.shutdown(wait=not isinstance(error, asyncio.CancelledError))
            raise
        self._thread = thread

    async def close(self) -> None:
        """Break off what is still under way, close the file, and end the thread. A second time it does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        ended = False
        try:
            tasks = {flight.task for flight in self._flights.values()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            closing = asyncio.get_running_loop().run_in_executor(thread, self._store.close)
            ended = bool((await asyncio.wait({closing}, timeout=self._patience))[0])
            if not ended or closing.exception() is not None:
                _log.warning(
                    "the memory of idempotency keys was not closed properly; the last of them may be forgotten"
                )
        finally:
            thread.shutdown(wait=ended)

    async def once(self, name: bytes, request: bytes, apply: Callable[[], Awaitable[bytes]]) -> Answer:
        """Have a request applied, unless that was done: then tell its body again.

        `name` is `name_of` its key, `request` its fingerprint; `apply` returns the body to answer with. While the same
        request is being applied, wait for it. What `apply` raises is raised here and not remembered; then one of those
        who waited applies it. Raises `KeyReused` if the key belongs to another request. A caller that is cancelled
        breaks nothing off.
        """
        while True:
            flight = self._flights.get(name)
            if flight is None:
                return await self._take_off(name, request, apply)
            if flight.request != request:
                raise KeyReused
            await asyncio.wait({flight.task})
            if not flight.task.cancelled() and flight.task.exception() is None:
                return Answer(flight.task.result().body, replayed=True)

    async def _take_off(self, name: bytes, request: bytes, apply: Callable[[], Awaitable[bytes]]) -> Answer:
        flight = _Flight(request, asyncio.create_task(self._fly(name, request, apply)))
        self._flights[name] = flight
        flight.task.add_done_callback(partial(self._land, name, flight))
        try:
            await asyncio.wait({flight.task})
        except asyncio.CancelledError:
            flight.abandoned = True
            raise
        return flight.task.result()

    async def _fly(self, name: bytes, request: bytes, apply: Callable[[], Awaitable[bytes]]) -> Answer:
        try:
            found = await self._ask(partial(self._store.recall, name))
        except _FAILURES as error:
            self._warn("an idempotency key could not be looked up, and its request is applied", error)
            found = None
        if found is not None:
            if found[0] != request:
                raise KeyReused
            return Answer(found[1], replayed=True)
        body = await apply()
        try:
            await self._ask(partial(self._store.remember, name, request, body))
        except _FAILURES as error:
            self._warn("an idempotency key could not be remembered; a repeat may be applied again", error)
        return Answer(body, replayed=False)

    def _land(self, name: bytes, flight: _Flight, task: asyncio.Task[Answer]) -> None:
        del self._flights[name]  # before anybody who waits for it goes on: this callback is the task's first
        error = None if task.cancelled() else task.exception()
        if error is not None and flight.abandoned:
            _log.warning("a request whose client went away failed: %s", error, exc_info=error)

    async def _ask(self, work: Callable[[], _T]) -> _T:
        """Do `work` in the thread. If that takes too long it is still done, but no longer waited for."""
        if self._thread is None or self._waiting >= _MOST_WAITING:
            raise TimeoutError("the memory is closed" if self._thread is None else "too many wait for it already")
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._waiting += 1
        doing.add_done_callback(self._answered)
        done, _ = await asyncio.wait({doing}, timeout=self._patience)
        if not done:
            raise TimeoutError(f"no answer in {self._patience:g} seconds")
        return doing.result()

    def _answered(self, doing: asyncio.Future[_T]) -> None:
        self._waiting -= 1
        doing.exception()  # seen; whoever still waits for it is told

    def _warn(self, what: str, error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told >= _QUIET:
            self._told = now
            _log.warning("%s: %s", what, error)
