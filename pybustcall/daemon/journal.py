"""Which busts were asked for, and what came of each: written down before they are applied, and safe on the disk.

This module decides when a bust is safe, in which order busts are, how long those that are over are kept, and what
becomes of what cannot be written. What a bust does, and when it is over, the engine decides; it tells the journal with
`begin` and `put`. The journal keeps the fault history's faults, too, and the events that readers may come back for: it
is the shelf that `FaultHistory.attach` and `Events.attach` want.

Theory of operation. The file is this journal's alone, and so is the thread in which it is used. A writer, a task that
lives while there is something to write, commits all that has gathered; what comes meanwhile gathers for the next
commit. Whoever begins waits for the commit that carries it (FULL: it survives a loss of power). New versions wait for
nobody: they go with the next commit, at most 0.1 seconds later, and one that carries nothing else is NORMAL: it
survives a killed process. If such a version is lost, a bust that was over is applied once more, which costs a miss.

What is unwritten stays in memory, by number, and is taken out once a commit that had it as it is now has succeeded. A
reader reads the file and lays that over it. Readers and the writer hold one lock, from the look at what is unwritten
until the file has been read or what follows from the commit is in memory; so a reader sees each entry once, and never
an older version than was put before it asked. Whatever is not over is in memory anyway, so that a file which turns out
to be damaged can be replaced by one that has all of it.

A begin that fails, or is cancelled, leaves nothing behind: if it still waits for its commit it is taken out; if the
commit is under way, or done, its row is deleted by the next one. Until then it is a tombstone (None) among what is
unwritten, and nobody sees it. A daemon that is killed between these two commits finds a bust that nobody was promised,
and applies it: a miss again. The same is so if the disk failed (not: was full) in the very moment of a commit.

An event goes with the next commit, and never later than what is put after it: a bust whose end is written has its event
written. The numbers of events have an epoch, which is the file's. Each process goes on far beyond the numbers of the
one before, by a leap that is chosen at random, and the file says which numbers each had: so a file that was put back
from a copy has none of those that were given since. A file in use says that it was not closed: then some more may have
been given than are written. A copy that is used beside the file, or on another machine, has another epoch.

Without a file the same is done in a database in memory, on the event loop, a few hundred rows at a time; there is no
thread, and nothing is waited for.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import secrets
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast, final, get_args

from pybustcall.daemon.database import (
    Damaged,
    Database,
    Kind,
    close_in,
    error_code,
    is_damage,
    open_in,
    transaction,
)
from pybustcall.daemon.events import LEAP, UNWRITTEN, BustEvent
from pybustcall.daemon.history import Fault
from pybustcall.errors import ConfigurationError
from pybustcall.models import KINDS, OVER, JobState, LayerReply

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence

    from pybustcall.models import Kind as KindOfTarget

__all__ = ["GIVE_UP", "MOST", "RETENTION", "Entry", "Journal", "JournalFailure", "Wish"]

_T = TypeVar("_T")

RETENTION: Final = 7 * 86400.0
"""Seconds for which a bust that is over is kept."""
MOST: Final = 100_000
"""How many busts that are over are kept; beyond that the oldest go."""
GIVE_UP: Final = 5.0
"""Seconds that a disk may take; then begins are refused."""

_SLICES: Final = 10  # in which that is measured

_FOR_EVER: Final = 4e9  # seconds; in nanoseconds it still is a number of SQLite's
_PATIENCE: Final = 1.0  # seconds that closing waits for what is being written
_LINGER: Final = 0.1  # seconds that new versions gather, if no begin takes them along
_MANY: Final = 500  # new versions that do not wait for that
_RETRY: Final = 2.0  # seconds after which what could not be written is tried again
_MOST_WAITING: Final = 10_000  # begins that wait for their commit; more would only fill this process
_MOST_AT_ONCE: Final = 1000  # begins in one commit: who waits for it goes on in one turn of the event loop
_FEWEST_TRIMMED: Final = 500  # rows that one commit deletes or dates back at most, each; twice its new ones if more
_MOST_SPANS: Final = 1000  # processes whose numbers are known; a reader from before them must forget
_QUIET: Final = 10.0  # seconds between two lines of the log about a journal that fails

_EVENTS: Final = (
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY, namespace TEXT NOT NULL, kind TEXT NOT NULL, target TEXT NOT NULL,
        soft INTEGER NOT NULL, strategy TEXT NOT NULL, also TEXT NOT NULL
    )""",
    # One row: of which epoch the numbers are, after which they are given now, and whether all that were are written.
    """CREATE TABLE stream (
        place INTEGER PRIMARY KEY CHECK (place = 0), epoch TEXT NOT NULL, base INTEGER NOT NULL, closed INTEGER NOT NULL
    )""",
)
_ORIGIN: Final = (
    # The numbers that each process before this one may have given, from the one after which it began.
    "CREATE TABLE spans (begin INTEGER PRIMARY KEY, until INTEGER NOT NULL)",
    # One row: of which file, since which start of which machine, the numbers are, and up to which no event is kept.
    """CREATE TABLE origin (
        place INTEGER PRIMARY KEY CHECK (place = 0), inode INTEGER NOT NULL, boot TEXT NOT NULL, floor INTEGER NOT NULL
    )""",
)

_KIND: Final = Kind(
    setting="journal",
    application=0x7062_4A6E,  # "pbJn"
    version=3,
    schema=(
        # `over` is None while a bust is not over, and else the time from which it is kept, by the journal's clock.
        """CREATE TABLE busts (
            number INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, state TEXT NOT NULL,
            namespace TEXT NOT NULL, kind TEXT NOT NULL, target TEXT NOT NULL, strategy TEXT NOT NULL,
            soft INTEGER NOT NULL, verify INTEGER NOT NULL, settle REAL,
            who TEXT NOT NULL, binding TEXT NOT NULL, reason TEXT, daemon TEXT NOT NULL,
            at INTEGER NOT NULL, ended INTEGER, removed INTEGER NOT NULL, attempts INTEGER NOT NULL,
            layers TEXT NOT NULL, over INTEGER
        )""",
        "CREATE INDEX busts_job ON busts (job)",
        "CREATE INDEX busts_over ON busts (over)",
        """CREATE TABLE faults (
            place INTEGER PRIMARY KEY, stage INTEGER NOT NULL, message TEXT NOT NULL, binding TEXT NOT NULL,
            at INTEGER NOT NULL, first INTEGER NOT NULL, times INTEGER NOT NULL, denial INTEGER NOT NULL,
            namespace TEXT
        )""",
        *_EVENTS,
        *_ORIGIN,
    ),
    upgrades={1: _EVENTS, 2: (*_ORIGIN, "ALTER TABLE faults ADD COLUMN namespace TEXT")},
    loss="what was busted is no longer shown, and busts that a killed daemon had not applied yet never will be",
)

# What may befall the file while it is used.
_FAILURES: Final = (sqlite3.Error, OSError, ConfigurationError)

_log = logging.getLogger("pybustcall.daemon")


class JournalFailure(Exception):
    """Something could not be written or read. `full`: for want of room; `why`: in words, without the rest."""

    def __init__(self, why: str, *, full: bool = False) -> None:
        super().__init__(f"the journal cannot be used: {why}")
        self.why = why
        self.full = full


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked, as the engine takes it; the fields are those of `BustRequest`."""

    namespace: str
    kind: KindOfTarget
    target: str
    strategy: str
    soft: bool = False
    verify: bool = False
    settle: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One bust in the journal; most fields are those of `JobReply`.

    - `number`: its place in the order of all, given by the journal; 0 before
    - `job`: its public name, 32 random hex digits
    - `at`, `ended`: when, in nanoseconds since the Unix epoch, for people
    """

    number: int = 0
    job: str
    wish: Wish
    who: str = "anonymous"
    binding: str = "unknown"
    reason: str | None = None
    daemon: str = ""
    at: int
    state: JobState = "waiting"
    ended: int | None = None
    removed: int = 0
    attempts: int = 0
    layers: tuple[LayerReply, ...] = ()


# Rows

_COLUMNS: Final = (
    "number, job, state, namespace, kind, target, strategy, soft, verify, settle,"
    " who, binding, reason, daemon, at, ended, removed, attempts, layers"
)
_TYPES: Final = (
    (int,), (str,), (str,), (str,), (str,), (str,), (str,), (int,), (int,), (float, type(None)),
    (str,), (str,), (str, type(None)), (str,), (int,), (int, type(None)), (int,), (int,), (str,),
)  # fmt: skip
_INSERT: Final = f"INSERT OR REPLACE INTO busts ({_COLUMNS}, over) VALUES ({', '.join('?' * (len(_TYPES) + 1))})"  # noqa: S608
_UPDATE: Final = (
    "UPDATE busts SET state = ?, ended = ?, removed = ?, attempts = ?, layers = ?, over = ? WHERE number = ?"
)
_FAULT_COLUMNS: Final = "place, stage, message, binding, at, first, times, denial, namespace"
_FAULT_TYPES: Final = ((int,), (int,), (str,), (str,), (int,), (int,), (int,), (int,), (str, type(None)))
_EVENT_TYPES: Final = ((int,), (str,), (str,), (str,), (int,), (str,), (str,))
_STATES: Final[frozenset[str]] = frozenset(get_args(JobState))

_Row = tuple[Any, ...]


def _row(entry: Entry, now: int) -> _Row:
    wish = entry.wish
    return (
        entry.number, entry.job, entry.state,
        wish.namespace, wish.kind, _text(wish.target), _text(wish.strategy), wish.soft, wish.verify, wish.settle,
        _text(entry.who), _text(entry.binding), entry.reason and _text(entry.reason), _text(entry.daemon),
        entry.at, entry.ended, entry.removed, entry.attempts, _layers(entry), _over(entry, now),
    )  # fmt: skip


def _changes(entry: Entry, now: int) -> _Row:
    return (
        entry.state, entry.ended, entry.removed, entry.attempts, _layers(entry), _over(entry, now), entry.number,
    )  # fmt: skip


def _over(entry: Entry, now: int) -> int | None:
    """Tell from when an entry is kept: since it ended, and never from the future; None while it is not over."""
    if entry.state not in OVER:
        return None
    return now if entry.ended is None else min(entry.ended, now)


def _layers(entry: Entry) -> str:
    if not entry.layers:
        return "[]"
    return json.dumps([layer.model_dump(exclude_defaults=True) for layer in entry.layers], separators=(",", ":"))


def _text(text: str) -> str:
    """Have a text be UTF-8. What a peer or the system calls something need not be, and must not spoil a commit."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _entry(row: _Row) -> Entry:
    (
        number, job, state, namespace, kind, target, strategy, soft, verify, settle,
        who, binding, reason, daemon, at, ended, removed, attempts, layers,
    ) = _typed(row, _TYPES)  # fmt: skip
    if state not in _STATES or kind not in KINDS:
        raise ValueError("a bust has no such state or kind")
    return Entry(
        number=number,
        job=job,
        wish=Wish(
            namespace=namespace,
            kind=kind,
            target=target,
            strategy=strategy,
            soft=bool(soft),
            verify=bool(verify),
            settle=settle,
        ),
        who=who,
        binding=binding,
        reason=reason,
        daemon=daemon,
        at=at,
        state=cast("JobState", state),
        ended=ended,
        removed=removed,
        attempts=attempts,
        layers=tuple(LayerReply.model_validate(it) for it in json.loads(layers)) if layers != "[]" else (),
    )


def _fault_row(fault: Fault) -> _Row:
    return (
        fault.place, fault.stage, _text(fault.message), _text(fault.binding),
        fault.at, fault.first, fault.times, fault.denial, fault.namespace,
    )  # fmt: skip


def _fault(row: _Row) -> Fault:
    place, stage, message, binding, at, first, times, denial, namespace = _typed(row, _FAULT_TYPES)
    return Fault(
        place=place,
        stage=stage,
        message=message,
        binding=binding,
        at=at,
        first=first,
        times=times,
        denial=bool(denial),
        namespace=namespace,
    )


def _event_row(event: BustEvent) -> _Row:
    return (
        event.seq, event.namespace, event.kind, _text(event.target), event.soft, _text(event.strategy),
        json.dumps(event.also, separators=(",", ":")),
    )  # fmt: skip


def _event(row: _Row) -> BustEvent:
    seq, namespace, kind, target, soft, strategy, also = _typed(row, _EVENT_TYPES)
    if kind not in KINDS:
        raise ValueError("an event has no such kind")
    return BustEvent(
        seq=seq,
        namespace=namespace,
        kind=kind,
        target=target,
        soft=bool(soft),
        strategy=strategy,
        also=tuple(map(str, json.loads(also))),
    )


def _typed(row: _Row, types: tuple[tuple[type, ...], ...]) -> _Row:
    for value, kinds in zip(row, types, strict=True):
        if not isinstance(value, kinds):
            raise TypeError(f"there is {type(value).__name__} where {kinds[0].__name__} should be")
    return row


@contextmanager
def _rows(db: sqlite3.Connection, statement: str, values: tuple[object, ...] = ()) -> Iterator[Iterable[_Row]]:
    """Give what a statement finds. Raises `Damaged` if a row is not as we write it."""
    cursor = db.cursor()
    try:
        yield cursor.execute(statement, values)
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"a row cannot be read: {error}") from error
    except sqlite3.OperationalError as error:
        if error_code(error):
            raise
        raise Damaged("a row has a text that is not UTF-8") from error  # of which SQLite itself knows nothing
    finally:
        cursor.close()  # or the file would stay open as long as the error is at hand


def _boot() -> str:
    """Tell since which start of the machine it runs, where the system says that."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


# In the thread


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What one transaction writes. None among `puts` and `faults` deletes what is there; events go up to `through`."""

    begins: tuple[Entry, ...] = ()
    puts: Mapping[int, Entry | None] = field(default_factory=dict)
    faults: Mapping[int, Fault | None] = field(default_factory=dict)
    events: Mapping[int, BustEvent] = field(default_factory=dict)
    through: int = 0
    durable: bool = True


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a file held when it was opened.

    - `last`: the highest number that a bust of it has ever had
    """

    last: int = 0
    unfinished: tuple[Entry, ...] = ()
    faults: tuple[Fault, ...] = ()
    events: tuple[BustEvent, ...] = ()


@final
class _Store:
    """The tables. Used in one thread only.

    - `epoch`, `base`: of the numbers of events, and after which of them these are given; known once it is open
    - `spans`: the numbers that events may have had before, from and up to, in their order
    - `floor`: up to which of them no event is kept
    """

    def __init__(self, path: Path | None, retention: float, most: int, clock: Callable[[], int]) -> None:
        self.database = Database(_KIND, path, self._prepare)
        self.known = _Known()
        self._retention = round(min(retention, _FOR_EVER) * 1e9)
        self._most = most
        self._clock = clock
        self._over = 0  # how many rows are over
        self.epoch = ""
        self.base = self.floor = 0
        self.spans: tuple[tuple[int, int], ...] = ()
        self._is_noted = True  # whether the file says all that

    def _prepare(self, db: sqlite3.Connection) -> None:
        with _rows(db, f"SELECT {_COLUMNS} FROM busts WHERE over IS NULL ORDER BY number") as rows:  # noqa: S608
            unfinished = tuple(map(_entry, rows))
        with _rows(db, f"SELECT {_FAULT_COLUMNS} FROM faults ORDER BY place") as rows:  # noqa: S608
            faults = tuple(map(_fault, rows))
        found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'busts'").fetchone()
        self._over = db.execute("SELECT count(*) FROM busts WHERE over IS NOT NULL").fetchone()[0]
        events = self._take_up_events(db)
        self.known = _Known(
            last=found[0] if found else 0,
            unfinished=unfinished,
            faults=faults,
            events=events,
        )

    def _take_up_events(self, db: sqlite3.Connection) -> tuple[BustEvent, ...]:
        """Tell the events; note which numbers were given before, and that more may be given from now on.

        Where that cannot be noted, another epoch begins, which only this process knows until there is room: nobody
        finds its numbers again.
        """
        if self.epoch:
            self._begin_in_new_file(db)
            return ()
        with _rows(db, "SELECT * FROM events ORDER BY seq") as rows:
            events = tuple(map(_event, rows))
        found = db.execute("SELECT epoch, base, closed FROM stream").fetchone()
        if found is None or not self._is_same_file(db):
            self._begin_epoch()
            events = ()
        else:
            epoch, base, closed = _typed(found, ((str,), (int,), (int,)))
            self._go_on(db, epoch, base, closed, events)
        try:
            db.execute("PRAGMA synchronous = FULL")
            with transaction(db):
                self._note_start(db, self.epoch)
        except sqlite3.Error as error:
            if is_damage(error):
                raise
            self._begin_epoch()
            self._is_noted = False  # the first commit does it
            return ()
        return events

    def _begin_epoch(self) -> None:
        self.epoch, self.base, self.floor, self.spans = secrets.token_hex(8), 0, 0, ()

    def _go_on(self, db: sqlite3.Connection, epoch: str, base: int, closed: int, events: Sequence[BustEvent]) -> None:
        """Go on in the epoch of the processes before, far beyond their numbers."""
        with _rows(db, "SELECT begin, until FROM spans ORDER BY begin") as rows:
            spans = [(begin, until) for begin, until in (_typed(row, ((int,), (int,))) for row in rows)]
        floor = db.execute("SELECT floor FROM origin").fetchone()
        last = max(events[-1].seq if events else 0, base)
        spans.append((base, last if closed else last + UNWRITTEN))
        self.epoch, self.base = epoch, last + LEAP + secrets.randbelow(LEAP)
        # A file of a version that did not note it has all that came after its first event.
        self.floor = floor[0] if floor is not None else events[0].seq - 1 if events else 0
        self.spans = tuple((begin, until) for begin, until in spans if until >= self.floor)[-_MOST_SPANS:]

    def _begin_in_new_file(self, db: sqlite3.Connection) -> None:
        """Go on in a file that is new in the midst of the work; all that was kept is written with the first commit.

        Until then it is of an epoch that nobody knows: who is killed before that has lost what readers may have missed.
        """
        self._is_noted = False
        try:
            with transaction(db):
                self._note_start(db, secrets.token_hex(8))
        except sqlite3.Error as error:
            if is_damage(error):
                raise

    def _is_same_file(self, db: sqlite3.Connection) -> bool:
        """Tell whether the numbers are of this file, and not of one that it is a copy of."""
        found = db.execute("SELECT inode, boot FROM origin").fetchone()
        return found is None or found == self._origin()  # one of before that was noted

    def _origin(self) -> tuple[int, str]:
        path = self.database.path
        if path is None:
            return 0, ""
        found = path.stat()
        return found.st_ino, f"{_boot()}:{found.st_dev}"

    def _note_start(self, db: sqlite3.Connection, epoch: str) -> None:
        known = db.execute("SELECT epoch FROM stream").fetchone()
        if known is not None and known[0] != epoch:
            db.execute("DELETE FROM events")
        db.execute("INSERT OR REPLACE INTO stream VALUES (0, ?, ?, 0)", (epoch, self.base))
        db.execute("INSERT OR REPLACE INTO origin VALUES (0, ?, ?, ?)", (*self._origin(), self.floor))
        db.execute("DELETE FROM spans")
        db.executemany("INSERT INTO spans VALUES (?, ?)", self.spans)

    def close_stream(self, db: sqlite3.Connection) -> None:
        """Note that all numbers given are written, if it was noted that some are."""
        if not self._is_noted:
            return
        db.execute("PRAGMA synchronous = FULL")
        with transaction(db):
            db.execute("UPDATE stream SET closed = 1")

    def write(self, batch: _Batch, db: sqlite3.Connection) -> bool:
        """Write a batch, and trim what is over; tell whether there is more to trim than one commit should."""
        now = self._clock()
        db.execute(f"PRAGMA synchronous = {'FULL' if batch.durable else 'NORMAL'}")
        with transaction(db):
            if not self._is_noted:
                self._note_start(db, self.epoch)
            over = self._over
            db.executemany(_INSERT, (_row(entry, now) for entry in batch.begins))
            over += sum(entry.state in OVER for entry in batch.begins)
            for number, entry in batch.puts.items():
                over += _put(db, number, entry, now)
            for place, fault in batch.faults.items():
                if fault is None:
                    db.execute("DELETE FROM faults WHERE place = ?", (place,))
                else:
                    db.execute("INSERT OR REPLACE INTO faults VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", _fault_row(fault))
            if batch.through > self.floor:
                db.execute("DELETE FROM events WHERE seq <= ?", (batch.through,))
                db.execute("UPDATE origin SET floor = ?", (batch.through,))
            db.executemany(
                "INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", map(_event_row, batch.events.values())
            )
            at_most = max(_FEWEST_TRIMMED, 2 * (len(batch.begins) + len(batch.puts)))
            gone, more = self._trim(db, now, over, at_most)
        self._over = over - gone
        self.floor = max(self.floor, batch.through)
        self._is_noted = True
        return more

    def _trim(self, db: sqlite3.Connection, now: int, over: int, at_most: int) -> tuple[int, bool]:
        """Delete what is too old or too much, the oldest first; tell how many went, and whether there are more.

        What lies in the future, since the clock was set back, is dated to now, so that it ends.
        """
        dated = db.execute(
            "UPDATE busts SET over = ? WHERE number IN (SELECT number FROM busts WHERE over > ? LIMIT ?)",
            (now, now, at_most),
        ).rowcount
        gone = db.execute(
            "DELETE FROM busts WHERE number IN (SELECT number FROM busts WHERE over <= ? ORDER BY over LIMIT ?)",
            (now - self._retention, at_most),
        ).rowcount
        surplus = min(over - gone - self._most, at_most - gone)
        if surplus > 0:
            gone += db.execute(
                "DELETE FROM busts WHERE number IN"
                " (SELECT number FROM busts WHERE over IS NOT NULL ORDER BY over, number LIMIT ?)",
                (surplus,),
            ).rowcount
        return gone, at_most in {dated, gone}

    def find(self, job: str, db: sqlite3.Connection) -> Entry | None:
        """Tell the entry of this name."""
        statement = f"SELECT {_COLUMNS} FROM busts WHERE job = ? ORDER BY number DESC LIMIT 1"  # noqa: S608
        with _rows(db, statement, (job,)) as rows:
            return next((_entry(row) for row in rows), None)

    def recent(
        self, terms: Mapping[str, object], before: int, limit: int, skipped: Container[int], db: sqlite3.Connection
    ) -> list[Entry]:
        """List the newest entries whose columns are as `terms` says, and whose numbers are not among the `skipped`."""
        found: list[Entry] = []
        # The plus keeps SQLite from looking there first: the order of the numbers is the one that counts.
        where = ["number < ?", "(+over IS NULL OR +over > ?)", *(f"+{name} = ?" for name in terms)]
        statement = f"SELECT {_COLUMNS} FROM busts WHERE {' AND '.join(where)} ORDER BY number DESC"  # noqa: S608
        with _rows(db, statement, (before, self._clock() - self._retention, *terms.values())) as rows:
            for row in rows:
                if row[0] not in skipped:
                    found.append(_entry(row))
                    if len(found) >= limit:
                        break
        return found


def _put(db: sqlite3.Connection, number: int, entry: Entry | None, now: int) -> int:
    """Write a new version, or delete the row; tell by how many rows more are over."""
    was = db.execute("SELECT over IS NOT NULL FROM busts WHERE number = ?", (number,)).fetchone()
    if entry is None:
        db.execute("DELETE FROM busts WHERE number = ?", (number,))
    elif was is None:
        db.execute(_INSERT, _row(entry, now))
    else:
        db.execute(_UPDATE, _changes(entry, now))
    return (entry is not None and entry.state in OVER) - (was is not None and was[0])


# On the event loop


@final
@dataclass(slots=True, eq=False)
class _Begin:
    """An entry that waits for its commit; `told` is what became of that. Nobody waits for a `withdrawn` one."""

    entry: Entry
    told: asyncio.Future[JournalFailure | None]
    withdrawn: bool = False


@final
class Journal:
    """The busts in the order in which they were accepted, in a file that outlives the process or in memory.

    - `path`: the file, mode 0600, this daemon's alone; None keeps everything in memory only
    - `retention`: seconds for which a bust that is over is kept, by the wall clock; one that is not over never goes
    - `most`: how many that are over are kept; beyond that those go first that ended first
    - `patience`: seconds that closing waits for what is being written
    - `give_up`: seconds that the disk may take; after that begins and reads are refused
    - `clock`: tells nanoseconds since the Unix epoch

    A clock that is set back makes nothing last longer than `retention` from then on; one that is set forward at most
    forgets what is over. Belongs to one event loop, between `open` and `close`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        retention: float = RETENTION,
        most: int = MOST,
        patience: float = _PATIENCE,
        give_up: float = GIVE_UP,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = None if path is None else Path(path).absolute()
        self._patience = patience
        self._give_up = give_up
        self._store = _Store(self._path, retention, most, clock)
        self._thread: ThreadPoolExecutor | None = None
        self._is_open = False
        self._is_usable = False  # until closing has written what had gathered
        self._last = 0
        self._known: dict[str, Entry] = {}  # by job: what is not over, and what is and was not written yet
        self._unwritten: dict[int, Entry | None] = {}  # by number, in the order of the first change
        self._begins: dict[int, _Begin] = {}  # by number: what waits for the next commit
        self._flushes: list[asyncio.Future[JournalFailure | None]] = []
        self._faults: dict[int, Fault] = {}  # by place
        self._fault_changes: dict[int, Fault | None] = {}
        self._events: dict[int, BustEvent] = {}  # by number, in order
        self._new_events: dict[int, BustEvent] = {}  # those that are not written yet
        self._dropped = self._dropping = 0  # up to which number events are gone from the file, and are to be
        self._using = asyncio.Lock()
        self._writer: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = False  # whether the writer is to commit once more
        self._watch: _Timer | None = None  # of the commit that is under way
        self._is_silent = False  # whether that takes longer than it may
        self._commits = 0
        self._has_failed = False
        self._warned = float("-inf")

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else str(self._path)
        return f"Journal({where}, {len(self._known)} at hand, {len(self._unwritten)} unwritten)"

    @property
    def durable(self) -> bool:
        """Whether there is a file, so that what was begun outlives the process."""
        return self._path is not None

    @property
    def commits(self) -> int:
        """How many transactions were committed since it was made."""
        return self._commits

    # Life

    async def open(self) -> tuple[Entry, ...]:
        """Open the file or make it; tell the busts that are not over, in the order of their numbers.

        Raises `ConfigurationError` (setting "journal") if the file is another process's or another program's, or
        cannot be there or be written. A damaged one is renamed, and a new one begun.
        """
        if self._path is None:
            self._store.database.open()
        else:
            thread = ThreadPoolExecutor(1, thread_name_prefix="pybustcall-journal")
            try:
                await open_in(thread, self._store.database)
            except (sqlite3.Error, OSError) as error:
                raise ConfigurationError(
                    f"the journal file {str(self._path)!r} cannot be used: {error}; make room, or choose another path",
                    setting="journal",
                ) from error
            self._thread = thread
        known, self._store.known = self._store.known, _Known()
        self._last = max(self._last, known.last)
        self._known = {entry.job: entry for entry in known.unfinished}
        self._unwritten = {}
        self._faults = {fault.place: fault for fault in known.faults}
        self._fault_changes = {}
        self._events = {event.seq: event for event in known.events}
        self._new_events = {}
        self._dropped = self._dropping = 0
        self._is_open = self._is_usable = True
        return known.unfinished

    async def close(self) -> None:
        """Write what has gathered, close the file, and end the thread. A second time it does nothing.

        What cannot be written in `patience` seconds is lost: at the next start such a bust is applied once more.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._stop_timer()
        try:
            await self._end_writer()
            await self._end_stream()
        finally:
            self._is_usable = False
            self._tell(self._begins, self._flushes, JournalFailure("it is closed"))
            self._begins, self._flushes = {}, []
            thread, self._thread = self._thread, None
            if thread is None:
                self._store.database.close()
            elif not await close_in(thread, self._store.database, self._patience):
                _log.warning("the journal was not closed properly; busts that were done may be done once more")

    async def _end_stream(self) -> None:
        """Note that no numbers were given that are not written, if that is so. If not, the next process leaps."""
        if self._path is None or self._new_events:
            return
        try:
            async with asyncio.timeout(self._patience), self._using:
                await self._use(self._store.close_stream)
        except (TimeoutError, *_FAILURES):
            _log.info("the journal could not note that it was closed")

    async def _end_writer(self) -> None:
        if self._begins or self._flushes or self._has_gathered():
            self._wake()
        writer = self._writer
        if writer is None:
            return
        try:
            await asyncio.wait({writer}, timeout=self._patience)
        finally:
            writer.cancel()
            await asyncio.wait({writer})

    # Busts

    async def begin(self, entry: Entry) -> Entry:
        """Write a bust down, and tell it with its number, once it is safe on the disk; without a file, at once.

        Raises `JournalFailure`; then it is not in the journal, and nothing is promised. A caller that is cancelled has
        withdrawn it, whether it was written or not: it is not in the journal either, and nobody is to apply it.
        """
        if not self._is_open:
            raise JournalFailure("it is closed")
        if len(self._begins) >= _MOST_WAITING:
            raise JournalFailure(f"{_MOST_WAITING} busts wait for it already")
        if self._is_silent:
            raise JournalFailure(f"its disk has not answered for more than {self._give_up:g} seconds")
        self._last += 1
        entry = replace(entry, number=self._last)
        if self._path is None:
            self.put(entry)
            return entry
        begin = self._begins[entry.number] = _Begin(entry, asyncio.get_running_loop().create_future())
        self._wake()
        try:
            is_told = await self._is_told(begin.told)
        except asyncio.CancelledError:
            self._withdraw(begin)
            raise
        if not is_told:
            self._withdraw(begin)
            raise JournalFailure(f"its disk has not answered for {self._give_up:g} seconds")
        _raise_for(begin.told.result())
        return entry

    def put(self, entry: Entry) -> None:
        """Have a new version of an entry, one that `begin` or `open` told.

        It is seen at once, and written with the next commit; what cannot be is kept in memory, and tried again.
        """
        self._known[entry.job] = entry
        self._unwritten[entry.number] = entry
        self._soon()

    async def flush(self) -> None:
        """Wait until all that has gathered is safe on the disk. Raises `JournalFailure` if it could not be written."""
        if self._path is None:
            return
        if not self._is_open:
            raise JournalFailure("it is closed")
        told: asyncio.Future[JournalFailure | None] = asyncio.get_running_loop().create_future()
        self._flushes.append(told)
        self._wake()
        if not await self._is_told(told):
            raise JournalFailure(f"its disk has not answered for {self._give_up:g} seconds")
        _raise_for(told.result())

    async def _is_told(self, told: asyncio.Future[JournalFailure | None]) -> bool:
        """Wait for what a commit comes to, as long as a disk may take; tell whether it is known."""
        with suppress(TimeoutError):
            async with _time_of_running(self._give_up):
                await asyncio.wait({told})
        return told.done()

    async def find(self, job: str) -> Entry | None:
        """Tell the entry of this name. Raises `JournalFailure` if the file would have to be read, and cannot be."""
        if (known := self._known.get(job)) is not None:
            return known
        unwritten, entry = await self._look(lambda _: partial(self._store.find, job))
        return None if entry is None else unwritten.get(entry.number, entry)

    async def recent(
        self,
        *,
        before: int | None = None,
        limit: int = 100,
        state: JobState | None = None,
        namespace: str | None = None,
        target: str | None = None,
    ) -> tuple[Entry, ...]:
        """List the newest `limit` entries, the newest first, of those with a number below `before`.

        With `state`, `namespace` or `target`, only those that have it. Raises `JournalFailure`.
        """
        terms = {"state": state, "namespace": namespace, "target": target}
        terms = {name: value for name, value in terms.items() if value is not None}
        end = self._last + 1 if before is None else min(before, self._last + 1)
        unwritten, found = await self._look(lambda unwritten: partial(self._store.recent, terms, end, limit, unwritten))
        found += [
            it
            for it in unwritten.values()
            if it is not None and it.number < end and all(_value_of(it, name) == terms[name] for name in terms)
        ]
        return tuple(sorted(found, key=lambda it: -it.number)[:limit])

    # Faults

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults that are kept, in the order of their places."""
        return tuple(self._faults[place] for place in sorted(self._faults))

    def put_fault(self, fault: Fault) -> None:
        """Keep a fault, instead of another one in its place; it is written with the next commit."""
        self._faults[fault.place] = fault
        self._fault_changes[fault.place] = fault
        self._soon()

    def drop_fault(self, place: int) -> None:
        """Keep no fault in that place any more."""
        self._faults.pop(place, None)
        self._fault_changes[place] = None
        self._soon()

    # Events

    @property
    def epoch(self) -> str:
        """The epoch of the numbers of events."""
        return self._store.epoch

    @property
    def last_event(self) -> int:
        """The number after which events get theirs."""
        return self._store.base

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The numbers that events may have had before this was opened, each span from and up to, in their order."""
        return self._store.spans

    @property
    def floor(self) -> int:
        """Up to which number no event is kept."""
        return self._store.floor

    @property
    def events(self) -> tuple[BustEvent, ...]:
        """The events that are kept, in order."""
        return tuple(self._events.values())

    def put_event(self, event: BustEvent) -> None:
        """Keep an event; it is written with the next commit, and not after anything that is put later."""
        self._events[event.seq] = self._new_events[event.seq] = event
        self._soon()

    def drop_events(self, through: int) -> None:
        """Keep none up to this number any more."""
        for events in (self._events, self._new_events):
            for seq in list(takewhile(lambda seq: seq <= through, events)):
                del events[seq]
        self._dropping = max(through, self._dropping)
        self._soon()

    # Writing

    def _has_gathered(self) -> bool:
        return bool(self._unwritten or self._fault_changes or self._new_events or self._dropping > self._dropped)

    def _soon(self) -> None:
        """Have what gathers written, with others that come in a moment."""
        if not self._is_open:
            return
        if len(self._unwritten) + len(self._fault_changes) + len(self._new_events) >= _MANY and not self._has_failed:
            self._wake()
        elif self._timer is None:
            wait = _RETRY if self._has_failed else _LINGER
            self._timer = asyncio.get_running_loop().call_later(wait, self._wake)

    def _wake(self) -> None:
        """Have the writer commit what has gathered by the time it comes to that."""
        self._stop_timer()
        self._due = True
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _write(self) -> None:
        try:
            while self._due:
                async with self._using:
                    await self._commit()
        finally:
            self._writer = None

    async def _commit(self) -> None:
        begins = dict(islice(self._begins.items(), _MOST_AT_ONCE))
        for number in begins:
            del self._begins[number]
        flushes, self._flushes = self._flushes, []
        self._due = bool(self._begins)
        self._watch = watch = _Timer(self._give_up, self._fall_silent)
        failure: JournalFailure | None = JournalFailure("it was closed meanwhile")
        fault: Exception | None = None
        try:
            waited_for = bool(begins or flushes)
            self._due = await self._mending(lambda: self._attempt(begins, durable=waited_for)) or self._due
            self._commits += 1
            failure = None
        except _FAILURES as error:
            failure = _failure(error)
        except Exception as error:  # noqa: BLE001 - a fault of ours, which those who wait are to hear of, too
            failure = JournalFailure(f"an unexpected error ({type(error).__name__}), which the daemon's log tells of")
            fault = error
        finally:
            watch.cancel()
            self._watch, self._is_silent = None, False
            self._tell(begins, flushes, failure)
            self._has_failed = failure is not None
        if failure is not None:
            self._warn(failure, fault)
            if self._has_gathered():
                self._soon()

    def _fall_silent(self) -> None:
        self._is_silent = True

    async def _attempt(self, begins: Mapping[int, _Begin], *, durable: bool) -> bool:
        batch = _Batch(
            begins=tuple(begin.entry for begin in begins.values()),
            puts=dict(self._unwritten),
            faults=dict(self._fault_changes),
            events=dict(self._new_events),
            through=self._dropping,
            durable=durable,
        )
        more = await self._use(partial(self._store.write, batch))
        for number, entry in _taken(self._unwritten, batch.puts):
            del self._unwritten[number]
            if entry is not None and entry.state in OVER:
                self._known.pop(entry.job, None)
        for place, _ in _taken(self._fault_changes, batch.faults):
            del self._fault_changes[place]
        for seq, _ in _taken(self._new_events, batch.events):
            del self._new_events[seq]
        self._dropped = max(self._dropped, batch.through)
        return more

    def _tell(
        self,
        begins: Mapping[int, _Begin],
        flushes: list[asyncio.Future[JournalFailure | None]],
        failure: JournalFailure | None,
    ) -> None:
        """Tell those who wait, each once."""
        for begin in begins.values():
            if failure is None and begin.withdrawn:
                self._strike(begin.entry)
            elif failure is None:
                self._known[begin.entry.job] = begin.entry
            begin.told.set_result(failure)
        for told in flushes:
            told.set_result(failure)

    def _withdraw(self, begin: _Begin) -> None:
        """See to it that a bust which nobody waits for any more is not in the journal."""
        begin.withdrawn = True  # if its commit is under way
        self._begins.pop(begin.entry.number, None)
        if begin.told.done() and begin.told.result() is None:
            self._known.pop(begin.entry.job, None)
            self._strike(begin.entry)

    def _strike(self, entry: Entry) -> None:
        self._unwritten[entry.number] = None
        self._soon()

    def _warn(self, failure: JournalFailure, fault: Exception | None) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._warned >= _QUIET:
            self._warned = now
            text = "busts cannot be written down, and those that must be are refused: %s"
            _log.warning(text, failure.why, exc_info=fault)

    # Using the file

    async def _look(
        self, work: Callable[[Mapping[int, Entry | None]], Callable[[sqlite3.Connection], _T]]
    ) -> tuple[Mapping[int, Entry | None], _T]:
        """Read: tell what was unwritten, which `work` is told too, and what the file said besides."""

        async def attempt() -> tuple[Mapping[int, Entry | None], _T]:
            unwritten = dict(self._unwritten)
            return unwritten, await self._use(work(unwritten))

        try:
            async with _time_of_running(self._give_up), self._using:
                return await self._mending(attempt)
        except TimeoutError:
            raise JournalFailure(f"its disk has not answered for {self._give_up:g} seconds") from None
        except _FAILURES as error:
            raise _failure(error) from error

    async def _mending(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Make an attempt; if the file turns out to be damaged, another one with a new file.

        That will have all that is in memory: it is written with the first commit, which is this attempt or the next.
        """
        try:
            return await attempt()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            await self._in_thread(partial(self._store.database.set_aside, str(error)))
            for entry in self._known.values():
                self._unwritten.setdefault(entry.number, entry)
            self._fault_changes = {**self._fault_changes, **self._faults}
            self._new_events = dict(self._events)
            self._soon()
        return await attempt()

    async def _use(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return await self._in_thread(partial(self._store.database.use, work))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        if not self._is_usable:
            raise JournalFailure("it is closed")
        if self._thread is None:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@final
class _Timer:
    """Calls `over` once this process has run for so many seconds, unless it is cancelled.

    A time in which the process was stopped, or its event loop had no turn, counts as one slice at most: it says nothing
    of those who are waited for, and they may have been stopped, too.
    """

    def __init__(self, seconds: float, over: Callable[[], None]) -> None:
        self._slice = seconds / _SLICES
        self._left = _SLICES
        self._over = over
        self._next = asyncio.get_running_loop().call_later(self._slice, self._pass)

    def cancel(self) -> None:
        """Call nothing any more."""
        self._next.cancel()

    def _pass(self) -> None:
        self._left -= 1
        if self._left:
            self._next = asyncio.get_running_loop().call_later(self._slice, self._pass)
        else:
            self._over()


@asynccontextmanager
async def _time_of_running(seconds: float) -> AsyncIterator[None]:
    """Raise `TimeoutError` as `asyncio.timeout` does, but by a `_Timer`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = _Timer(seconds, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            timer.cancel()


def _taken(now: Mapping[int, _T | None], written: Mapping[int, _T | None]) -> list[tuple[int, _T | None]]:
    """List what is still as it was when it was written."""
    return [(key, value) for key, value in written.items() if key in now and now[key] is value]


def _failure(error: Exception) -> JournalFailure:
    number = error.errno if isinstance(error, OSError) else None
    full = error_code(error) == sqlite3.SQLITE_FULL or number in {errno.ENOSPC, errno.EDQUOT}
    return JournalFailure(str(error), full=full)


def _raise_for(failure: JournalFailure | None) -> None:
    if failure is not None:
        raise JournalFailure(failure.why, full=failure.full)  # several may be told the same


def _value_of(entry: Entry, name: str) -> object:
    return getattr(entry if name == "state" else entry.wish, name)
