"""An SQLite file that several processes share as a cache: opened, made, set aside, used in threads, never in a loop.

This module decides what becomes of the file at a path, whatever is found there; in which thread and how long it is
waited for; and what an error of SQLite means to a caller. What is kept in the file is `sqlite_layout`'s affair.

Theory of operation. Each user of a file has two lanes, each a thread with a connection: one reads, one writes. Readers
do not wait for writers (the file has a write-ahead log), so what is looked up does not queue behind what waits for
another process to finish writing. What is asked for while a lane is busy is done together then, by one transaction of
the writing lane, and told together. Whoever finds the file locked tries again every few milliseconds, at random, until
`timeout`: SQLite itself would wait longer and longer, and never get its turn beside somebody who writes much.

Nobody works in a file that is no longer at the path (`locked_file`). One that is damaged is renamed, and a new one
begun, which is what may be done to a cache. It is empty, and refuses what was read before it was there. A file of zero
bytes that somebody made beforehand is replaced without a word. Only what is ours is ever renamed: a file of another
program, or of a later version of ours, is refused and left as it is.

A commit is safe from kills. It is also on the disk, should the machine stop, if the work is called `safe`; what was
committed before it is so, too.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import random
import sqlite3
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, final
from weakref import WeakSet

from pybustcall.errors import BustcallError, ConfigurationError
from pybustcall.locked_file import WITH_IT, Damaged, LockedFile, advice, is_damage, primary_code
from pybustcall.sqlite_layout import APPLICATION, TABLES, VERSION, create, recognize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pybustcall.errors import Applied

__all__ = ["HEAD_BYTES", "LONGEST_TIMEOUT", "SqliteFile", "SqliteUnavailable", "refuse_content"]

T = TypeVar("T")

LONGEST_TIMEOUT: Final = 60.0
"""Seconds for which a busy file may be waited for."""

HEAD_BYTES: Final = 4096
"""Bytes of a file by which it is judged whose it is."""

_BATCH: Final = 128  # what is done at once, at most, and in one transaction; a work says what part of that it is
_PAUSES: Final = (0.0005, 0.003)  # seconds between two attempts at a file that is busy
_LOG_LIMIT: Final = 16 << 20  # bytes beyond which the write-ahead log is emptied
_MAGIC: Final = b"SQLite format 3\0"

_log = logging.getLogger("pybustcall.sqlite")


@final
class SqliteUnavailable(BustcallError):
    """The file cannot be used now. What was asked of it was not done, unless `applied` is "maybe".

    `answered`: it was found out at once; otherwise somebody else kept the file locked for as long as one may wait.
    """

    def __init__(self, message: str, *, answered: bool = True, applied: Applied = "no") -> None:
        super().__init__(message, applied=applied)
        self.answered = answered


@final
class _Refused(Exception):
    """The file cannot be used, and is not to be touched. The text goes on after the path."""


_NO_CACHE: Final = "is not a cache"
_OF_OTHERS: Final = "is a database of another program"
_LATER: Final = "was made by a later pybustcall (format {version}, known is {known})"


def refuse_content(head: bytes) -> str | None:
    """Tell why a file that begins so is none of ours, or of a later version; None if a cache may be there.

    `head` are its first `HEAD_BYTES` bytes. What is ours may be damaged.
    """
    if not head.strip(b"\0"):
        return None
    if not head.startswith(_MAGIC):
        return _NO_CACHE
    if int.from_bytes(head[68:72]) != APPLICATION:
        return _OF_OTHERS
    version = int.from_bytes(head[60:64])
    return _LATER.format(version=version, known=VERSION) if version > VERSION else None


_Outcome = tuple[Any, Exception | None]


def _is_busy(error: Exception) -> bool:
    return isinstance(error, BlockingIOError) or primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


@final
class _CacheFile(LockedFile):
    """The file of a cache; who cannot have it at once tries again (`BlockingIOError`)."""

    def __init__(self, path: str, *, writes: bool) -> None:
        super().__init__(path, patience=0.0)  # see the theory of operation
        self._writes = writes

    def _flock(self, lock: int, how: int) -> None:
        fcntl.flock(lock, how | fcntl.LOCK_NB)

    def _refused(self, why: str) -> Exception:
        return _Refused(f"{why}; choose another path")

    def _check(self, db: sqlite3.Connection) -> None:
        try:
            self._prepare(db)
        except sqlite3.Error as error:
            if is_damage(error) and (why := self._refuse_content()) is not None:
                raise self._refused(f"{why}, and was left as it is") from error
            raise

    def _refuse_content(self) -> str | None:
        """Tell of a file that SQLite cannot read why it is none of ours; None if it is, or is nothing any more.

        It is opened here, which would drop the locks of this process on it; nobody can be using such a file.
        """
        with Path(self.path).open("rb") as file:
            return refuse_content(file.read(HEAD_BYTES))

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION:
            raise self._refused(f"{_OF_OTHERS}, and was left as it is")
        if version > VERSION:
            later = _LATER.format(version=version, known=VERSION)
            raise _Refused(f"{later}, and was left as it is; upgrade, or choose another path")
        if version < VERSION:
            raise Damaged(f"its format is {version}, and {VERSION} is needed")
        for setting in ("cell_size_check = ON", "cache_size = -8192", f"journal_size_limit = {_LOG_LIMIT // 4}"):
            db.execute(f"PRAGMA {setting}")
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise _Refused("lies on a file system that cannot share memory between processes; choose a local disk")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables >= TABLES or db.execute("SELECT count(*) FROM meta").fetchone() != (1,):
            raise Damaged("tables are missing")
        if not recognize(db, os.lstat(self.path).st_ino):
            _log.warning("the cache %s is a copy of another file: all entries are forgotten", self.path)
        if not self._writes:
            db.execute("PRAGMA query_only = ON")

    def _clear(self) -> None:
        for end in WITH_IT:  # of a file that was removed
            Path(f"{self.path}{end}").unlink(missing_ok=True)

    def _fill(self, db: sqlite3.Connection, path: str) -> None:
        create(db, os.lstat(path).st_ino)
        db.execute("PRAGMA journal_mode = WAL")

    def _put_aside(self, why: str) -> None:
        if not any(map(_size_of, (self.path, *(f"{self.path}{end}" for end in WITH_IT)))):
            Path(self.path).unlink()  # nothing was ever in it: the new one takes its place
            return
        self._rename(f"{self.path}.corrupt")
        _log.warning(
            "the cache %s cannot be used (%s); it was set aside as %s.corrupt and a new one begun: all entries are"
            " forgotten", self.path, why, self.path,
        )  # fmt: skip


def _size_of(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


@final
class _Job(Generic[T]):
    """Something to do, and who waits for it."""

    __slots__ = ("answer", "cost", "dropped", "loop", "safe", "work")

    def __init__(
        self, work: Callable[[sqlite3.Connection], T], loop: asyncio.AbstractEventLoop, *, safe: bool, cost: int
    ) -> None:
        self.work = work
        self.loop = loop
        self.safe = safe
        self.cost = cost
        self.answer: asyncio.Future[T] = loop.create_future()
        self.dropped = False


@final
class _Lane:
    """A thread with a connection, which does what it is asked for."""

    def __init__(self, path: str, *, timeout: float, writes: bool) -> None:
        self._writes = writes
        self._timeout = timeout
        self._opener = _CacheFile(path, writes=writes)
        self._queue: deque[_Job[Any]] = deque()
        self._gate = threading.Lock()  # for the queue and the thread
        self._turn = threading.Lock()  # held by whoever uses the file
        self._is_draining = False
        self._thread: ThreadPoolExecutor | None = None
        with _REGISTRY:
            _LANES.add(self)

    @property
    def is_open(self) -> bool:
        """Whether it has a connection."""
        return self._opener.db is not None

    async def do(self, work: Callable[[sqlite3.Connection], T], *, safe: bool = False, cost: int = 1) -> T:
        """Have something done, and wait for it. Cancelled before it has begun, it is not done."""
        job = _Job(work, asyncio.get_running_loop(), safe=safe, cost=cost)
        with self._gate:
            self._queue.append(job)
            if not self._is_draining:
                self._is_draining = True
                self._submit(self._drain)
        try:
            return await job.answer
        except asyncio.CancelledError:
            job.dropped = True
            raise

    async def aclose(self) -> None:
        """Finish what was asked for, close the file, end the thread. It may be used again."""
        with self._gate:
            if self._thread is None:
                return
            thread, self._thread = self._thread, None
            closing = thread.submit(self.close)
        try:
            await asyncio.shield(asyncio.wrap_future(closing))  # cancelled, it is closed all the same
        finally:
            thread.shutdown(wait=False)

    def close(self) -> None:
        """Close the file, in the lane's thread or where there is none."""
        with self._turn:
            self._opener.close()

    def abandon(self) -> None:
        """End the thread once it has nothing to do, without waiting for it."""
        if self._thread is not None:
            self._thread.submit(self.close)
            self._thread.shutdown(wait=False)

    def _submit(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            name = "pybustcall-sqlite-" + ("writes" if self._writes else "reads")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._thread.submit(work)

    # In the thread

    def _drain(self) -> None:
        while jobs := self._take():
            try:
                with self._turn:
                    outcomes = self._serve(jobs)
            except Exception as error:  # noqa: BLE001 - it is raised where the answers are awaited
                outcomes = [(None, error)] * len(jobs)
            _tell(jobs, outcomes)

    def _take(self) -> list[_Job[Any]]:
        jobs: list[_Job[Any]] = []
        left = _BATCH
        with self._gate:
            while self._queue and (not jobs or self._queue[0].cost <= left):
                job = self._queue.popleft()
                if not job.dropped:
                    jobs.append(job)
                    left -= job.cost
            self._is_draining = bool(jobs)
        return jobs

    def _serve(self, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        """Do them together; where that fails, each by itself, so that each fails for itself."""
        end = time.monotonic() + self._timeout
        set_aside = False
        while True:
            try:
                with self._opener.use() as db:
                    return self._write(db, jobs) if self._writes else self._read(db, jobs)
            except (sqlite3.Error, OSError, _Refused, Damaged) as error:
                failure = error
            try:
                if is_damage(failure) and not set_aside:
                    self._opener.set_aside(str(failure))
                    set_aside = True
                    continue
            except (sqlite3.Error, OSError, _Refused) as error:
                failure = error
            if _is_busy(failure):
                if time.monotonic() < end:
                    time.sleep(random.uniform(*_PAUSES))  # noqa: S311 - no secret
                    continue
            elif len(jobs) > 1 and isinstance(failure, sqlite3.Error):
                return [outcome for job in jobs for outcome in self._serve([job])]
            return [(None, self._explain(failure)) for _ in jobs]

    def _read(self, db: sqlite3.Connection, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        return [_outcome(job, db) for job in jobs]

    def _write(self, db: sqlite3.Connection, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        safe = any(job.safe for job in jobs)
        db.execute("PRAGMA synchronous = " + ("FULL" if safe else "NORMAL"))
        db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = []
            for job in jobs:
                db.execute("SAVEPOINT job")
                outcome = _outcome(job, db)
                if outcome[1] is not None:
                    db.execute("ROLLBACK TO job")
                db.execute("RELEASE job")
                outcomes.append(outcome)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk may have ended it already
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise
        with suppress(FileNotFoundError, sqlite3.Error):  # it was committed
            if os.lstat(f"{self._opener.path}-wal").st_size > _LOG_LIMIT:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return outcomes

    def _explain(self, error: Exception) -> Exception:
        """Say what happened and what to do; the error itself is the cause. No text of it may hold a key."""
        applied: Applied = "no"
        if isinstance(error, _Refused):
            text = f"the cache {self._opener.path} {error}"
        else:
            text = f"the cache {self._opener.path} cannot be used: {advice(error, timeout=self._timeout)}"
            if self._writes and primary_code(error) == sqlite3.SQLITE_IOERR:
                applied = "maybe"  # it may be in the log, and what failed was to see it through to the disk
        text += "; nothing was done" if applied == "no" else ""
        explained = SqliteUnavailable(text, answered=not _is_busy(error), applied=applied)
        explained.__cause__ = error
        return explained

    # Forks

    def begin_fork(self) -> None:
        """Wait for what is under way, and close the file; hold everybody off until the fork is done."""
        self._gate.acquire()
        self._turn.acquire()
        with suppress(sqlite3.Error):
            self._opener.close()

    def end_fork(self) -> None:
        """Go on in the parent; the file is opened anew when it is needed."""
        self._turn.release()
        self._gate.release()

    def forget_parent(self) -> None:
        """Begin anew in a forked child: the queue and the thread are the parent's."""
        _INHERITED.append((self._thread, self._queue))
        self._queue = deque()
        self._thread = None
        self._is_draining = False
        self._gate, self._turn = threading.Lock(), threading.Lock()


def _outcome(job: _Job[Any], db: sqlite3.Connection) -> _Outcome:
    try:
        return job.work(db), None
    except (sqlite3.Error, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
        return None, error


def _tell(jobs: Sequence[_Job[Any]], outcomes: Sequence[_Outcome]) -> None:
    """Tell all who wait in one loop at once, each loop by itself."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job[Any], _Outcome]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        by_loop.setdefault(job.loop, []).append((job, outcome))
    for loop, told in by_loop.items():
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_deliver, told)


def _deliver(told: list[tuple[_Job[Any], _Outcome]]) -> None:
    for job, (answer, failure) in told:
        if job.answer.done():
            continue  # nobody waits any more
        if failure is None:
            job.answer.set_result(answer)
        else:
            job.answer.set_exception(failure)


def _names_a_file(path: object) -> bool:
    """Tell whether a path can be that of a file which other processes open, too."""
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    return isinstance(name, str) and bool(name) and "\0" not in name and os.path.basename(name) != ":memory:"  # noqa: PTH119


@final
class SqliteFile:
    """The file at `path`, for any event loop and thread of this process; other processes may share it.

    - `timeout`: seconds that another process may keep it locked; at most 60

    Nothing is opened before the first use, and a file that is missing is made then. All that waits raises
    `SqliteUnavailable` if the file cannot be used. Raises `ConfigurationError` (setting "path" or "timeout").
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float) -> None:
        if not _names_a_file(path):
            raise ConfigurationError(f"path must name a file, not {path!r}", setting="path")
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise ConfigurationError(
                f"timeout must be more than 0 and at most {LONGEST_TIMEOUT:g} seconds, not {timeout!r}",
                setting="timeout",
            )
        self.path: Final = os.path.abspath(os.fspath(path))  # noqa: PTH100 - links stay links
        self._reads = _Lane(self.path, timeout=timeout, writes=False)
        self._writes = _Lane(self.path, timeout=timeout, writes=True)

    def __repr__(self) -> str:
        return f"SqliteFile({self.path!r})"

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Have something read; each statement for itself sees one moment. What it raises is raised here."""
        return await self._reads.do(work)

    async def write(self, work: Callable[[sqlite3.Connection], T], *, safe: bool = False, cost: int = 1) -> T:
        """Have something written, wholly or not at all; what it raises is raised here, and then nothing was written.

        - `safe`: whether it is on the disk when this returns, should the machine stop
        - `cost`: about how long it takes, as a part of the 128 that one transaction may do

        Several may share a transaction. Cancelled, it may have been done or not.
        """
        return await self._writes.do(work, safe=safe, cost=cost)

    async def aclose(self) -> None:
        """Finish what was asked for, close the file, end the threads. Repeating it is harmless; use opens it anew."""
        try:
            await self._reads.aclose()
        finally:
            await self._writes.aclose()

    def __del__(self) -> None:
        lanes = [lane for lane in (getattr(self, "_reads", None), getattr(self, "_writes", None)) if lane is not None]
        if any(lane.is_open for lane in lanes):
            told = f"{self!r} was dropped open; use aclose"
            for lane in lanes:
                lane.abandon()
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)


_LANES: WeakSet[_Lane] = WeakSet()
_REGISTRY = threading.Lock()
_HELD: list[_Lane] = []
_INHERITED: list[object] = []
"""What a forked child must neither use nor close, nor let the garbage collector close."""


def _before_fork() -> None:
    _REGISTRY.acquire()
    for lane in _LANES:
        lane.begin_fork()
        _HELD.append(lane)


def _after_fork_in_parent() -> None:
    while _HELD:
        _HELD.pop().end_fork()
    _REGISTRY.release()


def _after_fork_in_child() -> None:
    global _REGISTRY  # noqa: PLW0603
    _REGISTRY = threading.Lock()
    while _HELD:
        _HELD.pop().forget_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
