"""The outbox: a durable queue of busts that no daemon has acknowledged yet, in one SQLite file.

It decides what is kept, in which order rows may be sent, who may send them now, and what happens to the file when it
is damaged. Which busts are put there is the client's affair; how they are sent again, and when, is the deliverer's.

Theory of operation. Rows of one (destination, namespace, kind, target) are a *line*; only its first row, the head, may
be leased. A row is ready, waiting (in a backoff), leased, or set aside; those set aside stand in no line. Triggers keep
the heads and the tally of states, so that no statement can forget them, and partial indexes make a lease cost what it
changes and not what is stored. All that depends on time is settled at a lease: leases that ended or are void make their
rows ready again, waits end, rows past their age are set aside. Time is the wall clock, read inside the transaction.

Rules that keep the promise "delivered at least once, and never answered by an older bust":

- A row changes its bust only while nobody can have begun to send it: never sent, and spoken for by nobody.
- A bust that was once sent brings its key nowhere: joining a row that was never sent, it leaves that row as it is.
- `owner` says who may speak for a row. It outlives the lease until another takes the row over: who delivers late may
  still delete the row, but not once another holds it. Then the other deletes it, after one repeat under the same key.
- Ids are never reused, not even by a file that replaces another: a late "done" cannot meet a stranger's row.

Files. PATH, SQLite's own PATH-wal and PATH-shm, and PATH.lock (`locked_file`): no process can commit to a file that
another has just set aside. Connections are closed before a fork: SQLite's table of locks is one for each process, and a
child that inherited it would believe that it holds locks which are its parent's.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar, final
from weakref import WeakSet

from pydantic import ConfigDict

from pybustcall.errors import ConfigurationError, InvalidRequest, OutboxError
from pybustcall.locked_file import WITH_IT, Damaged, LockedFile, advice, is_damage, primary_code
from pybustcall.models import redact
from pybustcall.policies import check_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from concurrent.futures import Executor

__all__ = [
    "ANY",
    "LONGEST_DELAY",
    "Outbox",
    "OutboxCounts",
    "OutboxRow",
    "OutboxStore",
    "RowState",
    "StoredBust",
]

T = TypeVar("T")

ANY: Final = ""
"""The destination of a bust that is for whichever daemon answers."""

LONGEST_DELAY: Final = 60.0
"""Seconds: the longest backoff of a row. A wait that reaches further ahead is void: the clock was set back."""

_PATIENCE: Final = 5.0
"""Seconds to wait for another process that holds the file or its lock."""

_APPLICATION: Final = 0x70624F42
_VERSION: Final = 2
_BATCH: Final = 256
"""How many requests one transaction may hold, so that the first of them need not wait for a long queue."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """Where busts are kept that no daemon acknowledged, and how.

    - `path`: the file, on a local disk. Its directory must exist; beside it lie `-wal`, `-shm` and `.lock`
    - `rows`: the most rows that are kept, those set aside included; beyond that a call fails with `OutboxError`
    - `age`: seconds after which a row that could not be delivered is set aside
    - `lease`: seconds for which a deliverer holds a row; one that takes longer may be repeated, under the same key
    - `replay`: the most deliveries a second
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    path: str | os.PathLike[str]
    rows: int = 100_000
    age: float = 86_400.0
    lease: float = 30.0
    replay: float = 50.0

    def __post_init__(self) -> None:
        given: object = self.path
        path = os.fspath(given) if isinstance(given, str | os.PathLike) else None
        if not isinstance(path, str) or not path or "\0" in path or path == ":memory:" or not _encodable(path):
            raise ConfigurationError(f"outbox.path must name a file, not {self.path!r}", setting="outbox.path")
        if type(self.rows) is not int or self.rows < 1:
            raise ConfigurationError(
                f"outbox.rows must be an integer of at least 1, not {self.rows!r}", setting="outbox.rows"
            )
        for name in ("age", "lease"):
            check_seconds(getattr(self, name), f"outbox.{name}")
        replay: object = self.replay
        if isinstance(replay, bool) or not isinstance(replay, int | float) or not 0 < replay <= 1e6:
            raise ConfigurationError(
                f"outbox.replay must be a number of deliveries a second above 0, not {replay!r}",
                setting="outbox.replay",
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoredBust:
    """What is to be sent again. `key` is its idempotency key, the same on every sending.

    The others are what was asked of `bust`; whether they can be sent is decided when it is.
    """

    target: str
    strategy: str
    fault_tolerance: int
    key: str
    kind: str = "key"
    namespace: str | None = None
    soft: bool = False
    verify: bool = False
    settle: float | None = None
    reason: str | None = None
    allow_wider: bool = False

    @property
    def options(self) -> str | None:
        """What is said beyond what a row has columns for, as JSON; None if nothing is."""
        said = {name: getattr(self, name) for name, default in _OPTIONS.items() if getattr(self, name) != default}
        return json.dumps(said, sort_keys=True) if said else None

    def __repr__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in fields(self)} | {"target": redact(self.target)}
        return f"StoredBust({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


_OPTIONS: Final[dict[str, object]] = {
    field.name: field.default
    for field in fields(StoredBust)
    if field.name in {"verify", "settle", "reason", "allow_wider"}
}
"""What of a bust a row has no columns for, with its defaults."""


@final
class RowState(StrEnum):
    """What becomes of a row: it waits for its turn, somebody sends it now, or it was given up and kept to be seen."""

    PENDING = "pending"
    LEASED = "leased"
    ASIDE = "aside"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """One row of the outbox, as it was when it was read.

    - `id`: where it stands in the order of sending
    - `destination`: URL of the daemon that is owed, or `ANY`
    - `sent`: whether it may have reached a daemon already
    - `attempts`: deliveries that were tried and failed
    - `created`, `joined`: when its first and its newest bust were stored; its age counts from the newest
    - `not_before`: when its wait ends
    - `reason`: why it waits, or why it was set aside

    Times are seconds since the Unix epoch.
    """

    id: int
    destination: str
    bust: StoredBust
    state: RowState
    sent: bool
    attempts: int
    created: float
    joined: float
    not_before: float
    reason: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxCounts:
    """How many rows are in which state. `oldest`: age in seconds of the oldest that is not set aside, or None."""

    pending: int
    leased: int
    aside: int
    oldest: float | None


# States as they are stored. The numbers stand in the SQL below, since a partial index serves literal conditions only.
_READY, _WAITING, _LEASED, _ASIDE = range(4)
_STATES: Final = (RowState.PENDING, RowState.PENDING, RowState.LEASED, RowState.ASIDE)

_COLUMNS: Final = (
    "id, destination, target, namespace, kind, strategy, soft, fault_tolerance, key, "
    "state, sent, attempts, created, joined, not_before, reason, options"
)

_SELECT: Final = f"SELECT {_COLUMNS} FROM busts"  # noqa: S608 - the columns are named above

_SCHEMA: Final = """
CREATE TABLE busts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    destination TEXT NOT NULL,
    line BLOB NOT NULL,
    target TEXT NOT NULL,
    namespace TEXT,
    kind TEXT NOT NULL,
    strategy TEXT NOT NULL,
    soft INTEGER NOT NULL,
    fault_tolerance INTEGER NOT NULL,
    key TEXT NOT NULL,
    state INTEGER NOT NULL,
    head INTEGER NOT NULL,
    sent INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    joined REAL NOT NULL,
    not_before REAL NOT NULL,
    owner TEXT,
    leased_at REAL,
    lease_until REAL,
    reason TEXT NOT NULL DEFAULT '',
    options TEXT
);
CREATE INDEX lines ON busts (line, id) WHERE state < 3;
CREATE INDEX ready ON busts (destination, id) WHERE state = 0 AND head = 1;
CREATE INDEX waits ON busts (not_before) WHERE state = 1;
CREATE INDEX leases ON busts (lease_until) WHERE state = 2;
CREATE INDEX grants ON busts (leased_at) WHERE state = 2;
CREATE INDEX joinable ON busts (line, strategy, soft) WHERE state < 2 AND sent = 0 AND owner IS NULL;
CREATE INDEX ages ON busts (joined) WHERE state < 3;
CREATE INDEX births ON busts (created) WHERE state < 3;

CREATE TABLE tally (state INTEGER PRIMARY KEY, rows INTEGER NOT NULL);
INSERT INTO tally VALUES (0, 0), (1, 0), (2, 0), (3, 0);

CREATE TRIGGER row_came AFTER INSERT ON busts BEGIN
    UPDATE tally SET rows = rows + 1 WHERE state = new.state;
END;
CREATE TRIGGER row_changed AFTER UPDATE OF state ON busts WHEN new.state <> old.state BEGIN
    UPDATE tally SET rows = rows - 1 WHERE state = old.state;
    UPDATE tally SET rows = rows + 1 WHERE state = new.state;
END;
CREATE TRIGGER row_went AFTER DELETE ON busts BEGIN
    UPDATE tally SET rows = rows - 1 WHERE state = old.state;
    UPDATE busts SET head = 1
     WHERE old.head = 1 AND id = (SELECT min(id) FROM busts WHERE line = old.line AND state < 3);
END;
CREATE TRIGGER row_left_its_line AFTER UPDATE OF state ON busts WHEN new.state = 3 AND old.state < 3 BEGIN
    UPDATE busts SET head = 0 WHERE id = new.id;
    UPDATE busts SET head = 1
     WHERE old.head = 1 AND id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3);
END;
CREATE TRIGGER row_came_back AFTER UPDATE OF state ON busts WHEN new.state < 3 AND old.state = 3 BEGIN
    UPDATE busts SET head = 0
     WHERE id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3 AND id <> new.id);
    UPDATE busts SET head = 1 WHERE id = (SELECT min(id) FROM busts WHERE line = new.line AND state < 3);
END;
"""


_UPGRADES: Final = {1: "ALTER TABLE busts ADD COLUMN options TEXT"}
"""What makes a file of that format one of the next."""


def _line_of(destination: str, bust: StoredBust) -> bytes:
    """Tell the line that a row stands in, as a hash: targets may have 8 KiB, too much for an index."""
    namespace = ["", "-"] if bust.namespace is None else [bust.namespace, "+"]
    parts = [destination, *namespace, bust.kind, bust.target]
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _clean(reason: str) -> str:
    """Keep of a reason what can be stored and shown: others wrote parts of it."""
    return "".join(character if character.isprintable() else "?" for character in reason)


def _numbers(ids: Iterable[int] | None) -> tuple[int, ...] | None:
    """Check numbers of rows, which a caller may have typed; raise `InvalidRequest` for what is none."""
    if ids is None:
        return None
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise InvalidRequest(f"ids must be numbers of rows, not {type(ids).__name__}", field="ids")
    numbers = tuple(ids)
    for number in numbers:
        _check_number(number, "ids")
    return numbers


def _check_number(number: object, name: str) -> None:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise InvalidRequest(f"{name} must be whole numbers from 0, not {number!r}", field=name)


def _check_text(bust: StoredBust, destinations: Iterable[str]) -> None:
    texts = {"destination": "".join(destinations), "namespace": bust.namespace or ""}
    texts |= {name: getattr(bust, name) for name in ("target", "strategy", "key", "kind")}
    for name, text in texts.items():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{name} has a lone surrogate; nothing was stored", field=name) from None


def _row(values: Sequence[Any]) -> OutboxRow:
    ident, destination, target, namespace, kind, strategy, soft, tolerance, key, state, sent, *rest = values
    attempts, created, joined, not_before, reason, options = rest
    return OutboxRow(
        id=ident,
        destination=destination,
        bust=StoredBust(
            target=target,
            strategy=strategy,
            fault_tolerance=tolerance,
            key=key,
            kind=kind,
            namespace=namespace,
            soft=bool(soft),
            **_read_options(options),
        ),
        state=_STATES[state],
        sent=bool(sent),
        attempts=attempts,
        created=created,
        joined=joined,
        not_before=not_before,
        reason=reason,
    )


def _read_options(text: str | None) -> dict[str, Any]:
    """Read what a row says beyond its columns; of what cannot be read nothing, since the rest is worth sending."""
    try:
        said = json.loads(text or "{}")
    except ValueError:
        return {}
    return {name: said[name] for name in _OPTIONS if name in said} if isinstance(said, dict) else {}


def _tally(db: sqlite3.Connection) -> list[int]:
    return [rows for (rows,) in db.execute("SELECT rows FROM tally ORDER BY state")]


def _put(
    db: sqlite3.Connection,
    now: float,
    policy: Outbox,
    bust: StoredBust,
    destinations: Sequence[str],
    sent: bool,
    owner: str | None,
    lease: float,
    reasons: dict[str, str],
) -> tuple[int, ...]:
    """Store the bust for each destination, or let it join a row there; refuse where a row would be one too many."""
    ids: dict[str, int] = {}
    added = 0
    for destination in dict.fromkeys(destinations):
        line = _line_of(destination, bust)
        joined = _join(db, now, line, bust, sent) if owner is None else None
        if joined is None:
            added += 1
            joined = _insert(db, now, bust, destination, line, sent, owner, lease, reasons[destination])
        ids[destination] = joined
    counts = _tally(db)
    if added and sum(counts) > policy.rows:
        aside = counts[_ASIDE]
        raise OutboxError(
            f"the outbox is full: it holds {sum(counts) - added} of at most {policy.rows} rows, {aside} of them set "
            "aside. Nothing was stored. See to it that a daemon answers, retry or purge what was set aside, or allow "
            "more with Outbox(rows=...)"
        )
    return tuple(ids[destination] for destination in destinations)


def _insert(
    db: sqlite3.Connection,
    now: float,
    bust: StoredBust,
    destination: str,
    line: bytes,
    sent: bool,
    owner: str | None,
    lease: float,
    reason: str,
) -> int:
    leased = owner is not None
    db.execute(
        "INSERT INTO busts (destination, line, target, namespace, kind, strategy, soft, fault_tolerance, key,"
        " head, state, sent, created, joined, not_before, owner, leased_at, lease_until, reason, options)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NOT EXISTS (SELECT 1 FROM busts WHERE line = ? AND state < 3),"
        " ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(destination, line, bust.target, bust.namespace, bust.kind, bust.strategy, bust.soft),
            *(bust.fault_tolerance, bust.key, line, _LEASED if leased else _READY, sent, now, now, now),
            *(owner, now if leased else None, now + lease if leased else None, reason, bust.options),
        ),
    )
    return int(db.execute("SELECT last_insert_rowid()").fetchone()[0])


def _join(db: sqlite3.Connection, now: float, line: bytes, bust: StoredBust, sent: bool) -> int | None:
    """Let a bust join a row that was never sent and that nobody speaks for; tell its id, or None if there is none.

    The row takes the newest key, and the request that the key is bound to, unless that was sent before: a daemon may
    remember such a key, and would answer the row's own, newer bust with what it did for the older one.
    """
    (found,) = db.execute(
        "SELECT max(id) FROM busts"
        " WHERE state < 2 AND sent = 0 AND owner IS NULL AND line = ? AND strategy = ? AND soft = ? AND options IS ?",
        (line, bust.strategy, bust.soft, bust.options),
    ).fetchone()
    if found is None:
        return None
    if sent:
        db.execute("UPDATE busts SET joined = ? WHERE id = ?", (now, found))
    else:
        db.execute(
            "UPDATE busts SET joined = ?, key = ?, fault_tolerance = ? WHERE id = ?",
            (now, bust.key, bust.fault_tolerance, found),
        )
    return int(found)


def _settle(db: sqlite3.Connection, now: float, policy: Outbox) -> None:
    """Do what time has brought: end leases and waits, set aside what is past its age."""
    db.execute("UPDATE busts SET state = 0 WHERE state = 2 AND lease_until <= ?", (now,))
    db.execute("UPDATE busts SET state = 0 WHERE state = 2 AND leased_at > ?", (now,))
    db.execute("UPDATE busts SET state = 0 WHERE state = 1 AND not_before <= ?", (now,))
    db.execute("UPDATE busts SET state = 0 WHERE state = 1 AND not_before > ?", (now + LONGEST_DELAY,))
    # A row of the future was stored before the clock was set back; taken as new, it keeps its whole age and no more.
    future = "UPDATE busts SET joined = :now, created = min(created, :now) WHERE state < 3 AND joined > :now"
    db.execute(future, {"now": now})
    db.execute(
        "UPDATE busts SET state = 3, reason = ? || CASE reason WHEN '' THEN '' ELSE '; before that: ' || reason END"
        " WHERE state < 3 AND state <> 2 AND joined <= ?",
        (f"it could not be delivered within {policy.age:g} s", now - policy.age),
    )


def _lease(
    db: sqlite3.Connection, now: float, policy: Outbox, owner: str, destinations: Collection[str], limit: int
) -> tuple[OutboxRow, ...]:
    _settle(db, now, policy)
    found = [
        db.execute(
            _SELECT + " WHERE state = 0 AND head = 1 AND destination = ? ORDER BY id LIMIT ?", (destination, limit)
        ).fetchall()
        for destination in destinations
    ]
    # One of each destination in turn: what waits for a daemon that fails must not keep another's rows from it.
    fair = [row for turn in zip_longest(*found) for row in turn if row is not None]
    ids = sorted(row[0] for row in fair[:limit])
    db.executemany(
        "UPDATE busts SET state = 2, sent = 1, owner = ?, leased_at = ?, lease_until = ? WHERE id = ?",
        [(owner, now, now + policy.lease, ident) for ident in ids],
    )
    return tuple(_row(db.execute(_SELECT + " WHERE id = ?", (ident,)).fetchone()) for ident in ids)


def _counts(db: sqlite3.Connection, now: float) -> OutboxCounts:
    ready, waiting, leased, aside = _tally(db)
    (oldest,) = db.execute("SELECT min(created) FROM busts WHERE state < 3").fetchone()
    return OutboxCounts(
        pending=ready + waiting,
        leased=leased,
        aside=aside,
        oldest=None if oldest is None else max(0.0, now - oldest),
    )


def _explain(error: Exception, path: str) -> OutboxError:
    """Say what happened and what to do; the error itself is the cause. No text of it may hold a target."""
    if isinstance(error, OutboxError):
        explained = OutboxError(str(error))
        explained.__cause__ = error.__cause__
        return explained
    explained = OutboxError(
        f"the outbox {path} cannot be used: {advice(error, timeout=_PATIENCE)}. Nothing was changed in it"
    )
    explained.__cause__ = error
    return explained


@final
class _OutboxFile(LockedFile):
    """The file of an outbox. What befell it is told in `events`."""

    def __init__(self, path: str, clock: Callable[[], float]) -> None:
        super().__init__(path, patience=_PATIENCE)
        self.events: list[str] = []
        self._clock = clock

    def _flock(self, lock: int, how: int) -> None:
        end = time.monotonic() + _PATIENCE
        while not _try_flock(lock, how):
            if time.monotonic() >= end:
                raise OutboxError(
                    f"the outbox {self.path} cannot be used: another process kept {self.path}.lock for "
                    f"{_PATIENCE:g} s; try again, or see what holds it. Nothing was changed in it"
                )
            time.sleep(0.002)

    def _refused(self, why: str) -> Exception:
        return OutboxError(f"the outbox {self.path} cannot be used: it {why}; choose another path")

    def _check(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise self._refused("is an SQLite database of another program, which was left as it is")
        if version > _VERSION:
            raise OutboxError(
                f"the outbox {self.path} cannot be used: a later pybustcall wrote it (format {version}, known is "
                f"{_VERSION}), and it was left as it is; upgrade, or choose another path"
            )
        for name in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            with suppress(FileNotFoundError):
                if os.lstat(name).st_mode & 0o077:
                    os.chmod(name, 0o600)  # noqa: PTH101
        _configure(db)
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise OutboxError(
                f"the outbox {self.path} cannot be used: its file system cannot share memory between processes; "
                "choose a path on a local disk"
            )
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise Damaged("its pages contradict each other")
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type <> 'index'")}
        if not tables >= _OBJECTS or len(_tally(db)) != len(_STATES):
            raise Damaged("tables or triggers are missing")
        if version < _VERSION:
            _upgrade(db)

    def _clear(self) -> None:
        if any(Path(f"{self.path}{end}").exists() for end in ("-wal", "-journal")):
            self._put_aside("its main file is gone")

    def _fill(self, db: sqlite3.Connection, path: str) -> None:  # noqa: ARG002 - it is the same wherever it is
        _configure(db)
        # Where a file may have been before, ids begin in a range that it cannot have used.
        first = 0 if self.is_first else secrets.randbelow(1 << 20) + 1 << 32
        db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        db.execute("INSERT INTO sqlite_sequence VALUES ('busts', ?)", (first,))
        for setting in (f"application_id = {_APPLICATION}", f"user_version = {_VERSION}", "journal_mode = WAL"):
            db.execute(f"PRAGMA {setting}")

    def _put_aside(self, why: str) -> None:
        stamp = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        aside = f"{self.path}.corrupt-{stamp}"
        count = 1
        while any(Path(f"{aside}{end}").exists() for end in ("", *WITH_IT)):
            count += 1
            aside = f"{self.path}.corrupt-{stamp}-{count}"
        self._rename(aside)
        self.events.append(
            f"the outbox {self.path} is damaged ({why}) and was set aside whole as {aside}; a new one was begun. What "
            "the old one held will not be delivered unless it is recovered from there"
        )


_OBJECTS: Final = {"busts", "tally", "row_came", "row_changed", "row_went", "row_left_its_line", "row_came_back"}


def _upgrade(db: sqlite3.Connection) -> None:
    """Make a file of an earlier format one of ours, in one transaction; no row is changed.

    Processes with an earlier version that have it open go on: they do not see what was added.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may have been quicker
        for since in range(max(1, version), _VERSION):
            db.execute(_UPGRADES[since])
        db.execute(f"PRAGMA user_version = {max(version, _VERSION)}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _try_flock(lock: int, how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _configure(db: sqlite3.Connection) -> None:
    """Have every commit be on disk before it returns; look at pages with suspicion; keep memory and -wal small."""
    for setting in ("synchronous = FULL", "fullfsync = ON", "cell_size_check = ON"):
        db.execute(f"PRAGMA {setting}")
    for setting in ("cache_size = -8192", "journal_size_limit = 4194304"):
        db.execute(f"PRAGMA {setting}")


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    """Something to do in a transaction: given the connection and the time, it answers or raises."""

    work: Callable[[sqlite3.Connection, float], T]
    writes: bool
    answer: Future[T]


_Outcome = tuple[Any, Exception | None]
"""What a job answers, or what it raises."""


_STORES: WeakSet[OutboxStore] = WeakSet()
_REGISTRY = threading.Lock()
_HELD: list[OutboxStore] = []
_INHERITED: list[object] = []
"""What a forked child must neither use nor close, nor let the garbage collector close."""


def _before_fork() -> None:
    _REGISTRY.acquire()
    for store in _STORES:
        store.begin_fork()
        _HELD.append(store)


def _after_fork_in_parent() -> None:
    while _HELD:
        _HELD.pop().end_fork()
    _REGISTRY.release()


def _after_fork_in_child() -> None:
    global _REGISTRY  # noqa: PLW0603
    _REGISTRY = threading.Lock()
    _HELD.clear()
    for store in list(_STORES):
        store.forget_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


@final
class OutboxStore:
    """The queue of one outbox file, for any event loop and thread of this process; other processes may share the file.

    - `policy`: the file and its limits
    - `clock`: tells the seconds since the Unix epoch; called from the store's thread
    - `executor`: where SQLite runs instead of an own thread; it is not shut down here
    - `on_event`: called from there with a sentence when a damaged file was set aside; it must not raise

    Nothing is opened before the first use. What is asked for at the same time shares a transaction, but each request
    succeeds or fails for itself. Every method raises `OutboxError` if the file cannot be used, or after `aclose`.

    A method that is cancelled has done all of its work or nothing: a request that has not begun is dropped, one that
    has begun is finished. So a cancelled `put` may or may not have stored the bust, and the rows of a cancelled `lease`
    come back when the lease ends, or at once by `release(owner, ...)`.
    """

    def __init__(
        self,
        policy: Outbox,
        *,
        clock: Callable[[], float] = time.time,
        executor: Executor | None = None,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._given = executor
        self._on_event = on_event
        self._file = _OutboxFile(os.path.abspath(os.fspath(policy.path)), clock)  # noqa: PTH100
        self._own: ThreadPoolExecutor | None = None
        self._queue: deque[_Job[Any]] = deque()
        self._starting = threading.Lock()  # for the executor and the closing alone
        self._turn = threading.Lock()  # held by whoever uses the file
        self._closing: Future[None] | None = None
        with _REGISTRY:
            _STORES.add(self)

    async def open(self) -> None:
        """Open or create the file now, so that one that cannot be used is known before it is needed."""
        await self._ask(lambda _db, _now: None, writes=False)

    async def put(
        self,
        bust: StoredBust,
        destinations: Sequence[str] = (ANY,),
        *,
        sent: bool,
        owner: str | None = None,
        lease: float | None = None,
        reason: str | Sequence[str] = "",
    ) -> tuple[int, ...]:
        """Store a bust for each of these destinations, all or none; it is on disk when this returns.

        - `sent`: whether it may have reached a daemon; later busts do not join it then
        - `owner`: who is sending it now: the rows are born leased. Without it they may be leased at once
        - `lease`: seconds for which they are, if not the policy's
        - `reason`: why it is stored, without targets; one for all, or one for each destination

        Returns the rows' ids, in the order of `destinations`. An unsent row of the same bust for the same destination
        that nobody speaks for is joined instead of adding one (the same but for key and tolerance, which it then takes
        from this one, unless this one was sent). A row that is born leased joins none.

        Raises `OutboxError` if the outbox is full, and `InvalidRequest` for text that cannot be stored.
        """
        wanted = tuple(destinations)
        _check_text(bust, wanted)
        each = [reason] * len(wanted) if isinstance(reason, str) else reason
        reasons = {destination: _clean(text) for destination, text in zip(wanted, each, strict=True)}
        seconds = self._policy.lease if lease is None else lease
        return await self._ask(lambda db, now: _put(db, now, self._policy, bust, wanted, sent, owner, seconds, reasons))

    async def lease(self, owner: str, destinations: Collection[str], limit: int) -> tuple[OutboxRow, ...]:
        """Take rows to send: at most `limit`, for `ANY` or these destinations, in order of id.

        Only the first row of a line is given, once it is due. Leases that ended, or were granted in what is now the
        future, are taken over. Rows past their age are set aside in the same transaction. A leased row counts as sent
        from then on, since nobody knows how far its owner came. `owner` must not be shared by two that send.
        """
        wanted = tuple(dict.fromkeys((ANY, *destinations)))
        return await self._ask(lambda db, now: _lease(db, now, self._policy, owner, wanted, max(0, limit)))

    async def renew(self, owner: str, ids: Iterable[int]) -> tuple[int, ...]:
        """Hold rows for another lease from now; tell which are still the owner's. The others are not to be sent."""
        asked = tuple(ids)

        def work(db: sqlite3.Connection, now: float) -> tuple[int, ...]:
            change = (
                "UPDATE busts SET state = 2, leased_at = ?, lease_until = ? WHERE id = ? AND owner = ? AND state < 3"
            )
            until = now + self._policy.lease
            return tuple(ident for ident in asked if db.execute(change, (now, until, ident, owner)).rowcount)

        return await self._ask(work)

    async def done(self, owner: str, ids: Iterable[int]) -> int:
        """Delete rows that were delivered; tell how many.

        A row that another owner has taken over stays: that one is sending it, and deletes it. So a delivery that
        outlasts its lease is repeated under the same idempotency key, and no row is deleted on the word of somebody
        who may speak of another.
        """
        asked = [(ident, owner) for ident in ids]
        return await self._ask(
            lambda db, _now: db.executemany("DELETE FROM busts WHERE id = ? AND owner = ?", asked).rowcount
        )

    async def release(
        self,
        owner: str,
        ids: Iterable[int] | None,
        *,
        sent: bool,
        reason: str,
        delay: float = 0.0,
        attempted: bool = True,
    ) -> int:
        """Give rows back to be sent again after `delay` seconds (at most `LONGEST_DELAY`); tell how many.

        - `ids`: which, or None for all that this owner holds: what to do before it ends
        - `sent`: whether they may have reached a daemon. A row that ever counted as sent stays so
        - `reason`: why, without targets
        - `attempted`: whether a delivery was tried and is counted
        """
        wait = min(max(0.0, delay), LONGEST_DELAY)
        asked = None if ids is None else tuple(ids)

        def work(db: sqlite3.Connection, now: float) -> int:
            chosen = asked
            if chosen is None:
                held = db.execute("SELECT id FROM busts WHERE owner = ? AND state < 3", (owner,))
                chosen = tuple(ident for (ident,) in held)
            state = _WAITING if wait else _READY
            return db.executemany(
                "UPDATE busts SET state = ?, owner = NULL, sent = max(sent, ?), attempts = attempts + ?,"
                " not_before = ?, reason = ? WHERE id = ? AND owner = ? AND state < 3",
                [(state, sent, attempted, now + wait, _clean(reason), ident, owner) for ident in chosen],
            ).rowcount

        return await self._ask(work)

    async def set_aside(self, owner: str, ids: Iterable[int], reason: str) -> int:
        """Give rows up, and keep them to be seen (`rows`), retried or purged; tell how many. The attempt is counted."""
        asked = [(_clean(reason), ident, owner) for ident in ids]
        return await self._ask(
            lambda db, _now: (
                db.executemany(
                    "UPDATE busts SET state = 3, owner = NULL, attempts = attempts + 1, reason = ?"
                    " WHERE id = ? AND owner = ? AND state < 3",
                    asked,
                ).rowcount
            )
        )

    async def rows(self, *, after: int = 0, limit: int = 1000) -> tuple[OutboxRow, ...]:
        """List rows in order of id: at most `limit` of those beyond the id `after`."""
        _check_number(after, "after")
        _check_number(limit, "limit")
        select = _SELECT + " WHERE id > ? ORDER BY id LIMIT ?"
        return await self._ask(
            lambda db, _now: tuple(_row(row) for row in db.execute(select, (after, max(0, limit)))), writes=False
        )

    async def retry(self, ids: Iterable[int] | None = None) -> int:
        """Put rows that were set aside back into their lines, as if new, under their old ids; None: all. Tell how many.

        What may have been sent still counts as sent.
        """
        change = (
            "UPDATE busts SET state = 0, owner = NULL, attempts = 0, reason = '', created = :now, joined = :now,"
            " not_before = :now WHERE state = 3"
        )
        asked = _numbers(ids)

        def work(db: sqlite3.Connection, now: float) -> int:
            if asked is None:
                return db.execute(change, {"now": now}).rowcount
            rows = [{"now": now, "id": ident} for ident in asked]
            return db.executemany(f"{change} AND id = :id", rows).rowcount

        return await self._ask(work)

    async def hasten(self, destinations: Collection[str] | None = None) -> int:
        """End the backoff of rows, all or those for these destinations: they may be leased now. Tell how many."""
        change = "UPDATE busts SET state = 0, not_before = ? WHERE state = 1"
        asked = None if destinations is None else tuple(destinations)

        def work(db: sqlite3.Connection, now: float) -> int:
            if asked is None:
                return db.execute(change, (now,)).rowcount
            return db.executemany(f"{change} AND destination = ?", [(now, url) for url in asked]).rowcount

        return await self._ask(work)

    async def purge(self, ids: Iterable[int] | None = None, *, aside_only: bool = True) -> int:
        """Delete rows undelivered; tell how many. None: all. `aside_only=False`: those to be delivered, too."""
        change = "DELETE FROM busts WHERE state = 3" if aside_only else "DELETE FROM busts WHERE state >= 0"
        numbers = _numbers(ids)
        asked = None if numbers is None else [(ident,) for ident in numbers]
        return await self._ask(
            lambda db, _now: (
                (db.execute(change) if asked is None else db.executemany(f"{change} AND id = ?", asked)).rowcount
            )
        )

    async def counts(self) -> OutboxCounts:
        """Count rows by state, and tell the age of the oldest."""
        return await self._ask(_counts, writes=False)

    async def aclose(self) -> None:
        """Finish what was asked for, close the file, end the thread. Repeating it is harmless.

        A cancellation arrives when that is done.
        """
        with self._starting:
            fresh = self._closing is None
            closing = self._closing = self._closing or Future()
        if fresh:
            closing.set_running_or_notify_cancel()
            self._submit(lambda: self._close(closing))
        waiter = asyncio.wrap_future(closing)
        cancelled: asyncio.CancelledError | None = None
        while not waiter.done():
            try:
                await asyncio.wait({waiter})
            except asyncio.CancelledError as error:
                cancelled = error
        if self._own is not None:
            self._own.shutdown()  # its thread has nothing left to do, and ends at once
        if cancelled is not None:
            raise cancelled

    def __repr__(self) -> str:
        state = "closed" if self._closing is not None else "unopened" if self._file.db is None else "open"
        return f"OutboxStore({self._file.path!r}; {state})"

    def __del__(self) -> None:
        if hasattr(self, "_closing") and self._closing is None and self._file.db is not None:
            told = f"{self!r} was dropped open; use aclose"
            self._file.close()
            if self._own is not None:
                self._own.shutdown(wait=False)
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)

    async def _ask(self, work: Callable[[sqlite3.Connection, float], T], *, writes: bool = True) -> T:
        """Have something done in a transaction, and wait for it."""
        job = _Job(work, writes, Future())
        with self._starting:
            if self._closing is not None:
                raise OutboxError(
                    f"the outbox {self._file.path} is closed; nothing was changed in it. Call before aclose"
                )
            self._queue.append(job)
        self._submit(self._drain)
        return await asyncio.wrap_future(job.answer)

    def _submit(self, work: Callable[[], None]) -> None:
        with self._starting:
            executor = self._given or self._own
            if executor is None:
                executor = self._own = ThreadPoolExecutor(1, thread_name_prefix="pybustcall-outbox")
        try:
            executor.submit(work)
        except RuntimeError:  # it was shut down, or the interpreter ends: what was promised is done all the same
            work()

    def _close(self, closing: Future[None]) -> None:
        try:
            self._drain()
            with self._turn:
                self._file.close()
        finally:
            closing.set_result(None)

    def _drain(self) -> None:
        """Do what is in the queue; in the store's thread. What befell the file is told before what it led to."""
        while True:
            with self._turn:
                jobs = self._take()
                outcomes = self._serve(jobs)
                events, self._file.events = self._file.events, []
            try:
                if self._on_event is not None:
                    for event in events:
                        self._on_event(event)
            finally:
                for job, (answer, failure) in zip(jobs, outcomes, strict=True):
                    if failure is None:
                        job.answer.set_result(answer)
                    else:
                        job.answer.set_exception(failure)
            if not jobs:
                return

    def _take(self) -> list[_Job[Any]]:
        jobs: list[_Job[Any]] = []
        while self._queue and len(jobs) < _BATCH:
            job = self._queue.popleft()
            if job.answer.set_running_or_notify_cancel():
                jobs.append(job)
        return jobs

    def _serve(self, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        """Do them in one transaction; where that fails, each in its own, so that each fails for itself."""
        try:
            return self._transact(jobs) if jobs else []
        except (sqlite3.Error, OSError, OutboxError, Damaged) as error:
            if len(jobs) > 1 and isinstance(error, sqlite3.Error) and primary_code(error) != sqlite3.SQLITE_BUSY:
                return [outcome for job in jobs for outcome in self._serve([job])]
            return [(None, _explain(error, self._file.path)) for _ in jobs]
        except BaseException as error:
            for job in jobs:
                job.answer.set_exception(error)
            raise

    def _transact(self, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        try:
            with self._file.use() as db:
                return self._run(db, jobs)
        except (sqlite3.Error, Damaged) as error:
            if not is_damage(error):
                raise
            self._file.set_aside(str(error))
        with self._file.use() as db:
            return self._run(db, jobs)

    def _run(self, db: sqlite3.Connection, jobs: Sequence[_Job[Any]]) -> list[_Outcome]:
        outcomes: list[_Outcome] = []
        db.execute("BEGIN IMMEDIATE" if any(job.writes for job in jobs) else "BEGIN")
        try:
            now = self._clock()
            for job in jobs:
                db.execute("SAVEPOINT job")
                try:
                    outcomes.append((job.work(db, now), None))
                except sqlite3.Error:
                    raise
                except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
                    db.execute("ROLLBACK TO job")
                    outcomes.append((None, error))
                db.execute("RELEASE job")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise
        return outcomes

    def begin_fork(self) -> None:
        """Wait for the transaction under way, and close the file; hold everybody off until the fork is done."""
        self._turn.acquire()
        with suppress(sqlite3.Error):  # a fork is not stopped by it
            self._file.close()

    def end_fork(self) -> None:
        """Go on in the parent; the file is opened anew when it is needed."""
        self._turn.release()

    def forget_parent(self) -> None:
        """Begin anew in a forked child: the queue and the thread are the parent's."""
        _INHERITED.append((self._own, self._queue, self._file))
        self._file = _OutboxFile(self._file.path, self._clock)
        self._queue = deque()
        self._own = None
        self._turn = threading.Lock()
        self._starting = threading.Lock()
        if self._closing is not None:
            self._closing = Future()  # the old one may wait for the parent's thread
            self._closing.set_result(None)
