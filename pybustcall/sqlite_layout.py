"""How entries lie in an SQLite file, and what readers and the daemon do there, each in one transaction.

This module decides what is kept and what each transaction does, and knows neither threads nor an event loop, nor how a
file is opened, which is `sqlite_file`'s affair. What readers do with an entry is decided by `integrations.sqlite`, what
a bust does by the daemon.

Theory of operation. One file holds all namespaces.

    meta         one row: the epoch, up to which id entries are dead, with which generation namespaces start, the inode
    namespaces   name, seq (the generation), floor
    entries      namespace, key, born (its generation), stale, lease, expires, ttl, tags; ids grow with each store
    contents     id of the entry, value: apart, so that marking an entry does not write its value again
    tags         namespace, tag, key: in that order, by which a tag finds its entries
    fences       namespace, name, generation: what was busted, and which bust of it was the last
    open_fences  likewise: what is being swept now, by hard busts

A fence is named "k:KEY", "w:KEY" (the key and its variants), "p:PREFIX", "t:TAG" or "a". A reader takes (epoch, seq) as
its token before it looks into its database; its store is refused if a fence over the key is newer than that. Only so
many fences are kept in a namespace. The oldest go, and `floor` is raised to the newest that went: tokens older than it
are refused, whatever they fill. An entry is as old as the token that it was stored with, since a bust that began
meanwhile may find only later that it covers it.

An entry dies with an open fence over it that is newer than the entry, so that a bust of many takes effect at once.

A namespace of which nobody has stored or busted anything has no row, and looks as if it had one with the generation
that `meta` says. If there are too many, those without entries go, and that generation is raised above theirs: what was
busted there is remembered by refusing all that began before.

What can be lost. A file may be set aside because it is damaged, removed, or replaced by a copy from some day before.
Each file has an epoch of its own, "NUMBER:RANDOM", and tokens of another one are refused. A copy has another inode than
the file says, and begins a new epoch when it is opened: what it holds is dead, by its ids, and goes by and by. Where it
was copied over the old file, only what clients remember tells: each hands in the newest token that it knows, and where
the file's own is older, busts have been lost, and a new epoch begins.

A process that is killed loses nothing that it had committed. A machine that stops may lose what was not yet on the
disk, always the last: so busts see to it, and stores do not (see `sqlite_file`). Fences need not be there after that,
for no fill has outlived it; open fences, what was removed and what was marked do.

Clocks. A lifetime ends by the clock of the day; an entry that would end later than its whole lifetime from now, since
the clock was set back, is over, too. A lease is held by the clock that runs since the machine was started, which its
processes share; one that lies further in the future than it can is over. Nothing else looks at a clock.

While a transaction writes, others wait. So what goes through entries does so in portions; what is over is dropped a few
at a time, by each store and by the daemon. With `room` for no more, what was stored longest ago goes.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, final

from pybustcall.keys import ENCODINGS, SEPARATORS, bases_of, prefixes_of, ranges_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Sequence

    from pybustcall.models import Kind

__all__ = [
    "APPLICATION",
    "EVERY",
    "LEAST_ROOM",
    "MAX_FENCES",
    "TABLES",
    "VERSION",
    "Entry",
    "Page",
    "Range",
    "Seen",
    "Stored",
    "Token",
    "WentBack",
    "begin",
    "begin_anew",
    "count",
    "create",
    "end",
    "fence",
    "held",
    "look_up",
    "page",
    "ranges_of_prefix",
    "recognize",
    "remove",
    "shrink",
    "store",
    "take_lease",
    "tidy",
    "used_bytes",
    "variants",
]

APPLICATION: Final = 0x42434C53
"""By which a file is known as ours."""
VERSION: Final = 1
_OPEN: Final = 1_000_000  # open fences that are kept; those of daemons that never came back go first
MAX_FENCES: Final = 10_000
"""How many fences are kept in a namespace. Each takes about 100 bytes."""
LEAST_ROOM: Final = 1 << 20
"""Bytes that a file must be allowed to hold."""

_MOST_NAMESPACES: Final = 1000  # beyond which those without entries go
_TIDIED: Final = 4  # entries that are over, which each store drops
_EVICTED: Final = 500  # entries that one store makes go at most
_OVERHEAD: Final = 300  # bytes that an entry takes beside its value, its key (twice) and its tags (twice)
_SPARE: Final = 256  # pages that may lie empty in the file
_VACUUMED: Final = 128  # pages that one transaction gives back

_SCHEMA: Final = (
    """CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        epoch TEXT NOT NULL,
        dead INTEGER NOT NULL,
        start INTEGER NOT NULL,
        inode INTEGER NOT NULL
    )""",
    """CREATE TABLE namespaces (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        seq INTEGER NOT NULL,
        floor INTEGER NOT NULL
    )""",
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        namespace INTEGER NOT NULL,
        key TEXT NOT NULL,
        born INTEGER NOT NULL,
        stale INTEGER NOT NULL,
        lease REAL,
        expires REAL,
        ttl REAL,
        tags TEXT NOT NULL,
        UNIQUE (namespace, key)
    )""",
    "CREATE INDEX ending ON entries (expires) WHERE expires IS NOT NULL",
    "CREATE TABLE contents (id INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    """CREATE TABLE tags (
        namespace INTEGER NOT NULL,
        tag TEXT NOT NULL,
        key TEXT NOT NULL,
        PRIMARY KEY (namespace, tag, key)
    ) WITHOUT ROWID""",
    *(
        statement
        for table in ("fences", "open_fences")
        for statement in (
            f"""CREATE TABLE {table} (
                namespace INTEGER NOT NULL,
                name TEXT NOT NULL,
                generation INTEGER NOT NULL,
                PRIMARY KEY (namespace, name)
            ) WITHOUT ROWID""",
            f"CREATE INDEX {table}_by_age ON {table} (namespace, generation)",
        )
    ),
)
TABLES: Final = frozenset({"meta", "namespaces", "entries", "contents", "tags", "fences", "open_fences"})
"""What a file of ours has."""

_Fences = Literal["fences", "open_fences"]

Range = tuple[str, str | bytes]
"""A range of keys, from, and up to but without. All bytes come after all texts."""

EVERY: Final[Range] = ("", b"")


@final
class WentBack(Exception):
    """The file is in a state from before what this client knows: see `begin_anew`."""


@final
@dataclass(frozen=True, slots=True)
class Token:
    """What was the case when a fill began: the epoch, which is "NUMBER:RANDOM", and its generation."""

    epoch: str
    generation: int

    @property
    def number(self) -> int:
        """The number of its epoch."""
        return int(self.epoch.partition(":")[0])

    def newest(self, other: Token | None) -> Token:
        """Tell which of both to hand in next time, where this one was told last."""
        if other is None:
            return self
        if other.epoch == self.epoch:
            return max(self, other, key=lambda it: it.generation)
        return max(self, other, key=lambda it: it.number)

    def is_before(self, known: Token | None) -> bool:
        """Tell whether a file where this is the case cannot have followed upon what is `known`."""
        if known is None:
            return False
        if known.epoch == self.epoch:
            return self.generation < known.generation
        return self.number <= known.number


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """What is held under a key. `leased`: it is stale, and somebody makes it anew."""

    id: int
    value: bytes
    stale: bool
    leased: bool


@final
@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader finds, and its token."""

    token: Token
    entry: Entry | None


@final
@dataclass(frozen=True, slots=True)
class Stored:
    """Whether an entry was stored, and how far the file is."""

    token: Token
    stored: bool


@final
@dataclass(frozen=True, slots=True)
class Page:
    """A part of what is found, and the ranges that are left."""

    keys: tuple[str, ...]
    rest: tuple[Range, ...]


@final
@dataclass(frozen=True, slots=True)
class _Namespace:
    """How far a namespace is. `id`: None if it has no row."""

    epoch: str
    dead: int
    id: int | None
    seq: int
    floor: int

    @property
    def token(self) -> Token:
        return Token(self.epoch, self.seq)

    def is_alive(self, ident: int, expires: float | None, ttl: float, now: float) -> bool:
        """Tell whether an entry is of this epoch, and its lifetime not over."""
        return ident > self.dead and (expires is None or now < expires <= now + ttl)


# The file


def create(db: sqlite3.Connection, inode: int) -> None:
    """Make the tables in a new, empty file, and tell it what it is."""
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES (1, ?, 0, 0, ?)", (_epoch(1), inode))
    db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def recognize(db: sqlite3.Connection, inode: int) -> bool:
    """Tell whether this file is the one that was made, and no copy; in a copy a new epoch begins."""
    if db.execute("SELECT inode FROM meta").fetchone()[0] == inode:
        return True
    db.execute("BEGIN IMMEDIATE")
    try:
        _begin_anew(db, 0)
        db.execute("UPDATE meta SET inode = ?", (inode,))
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    return False


def begin_anew(db: sqlite3.Connection, namespace: str, known: Token | None) -> None:
    """Begin a new epoch if the file went back behind what is known, unless another client has done so meanwhile."""
    _enter(db, namespace, known)


def _begin_anew(db: sqlite3.Connection, number: int) -> None:
    (epoch,) = db.execute("SELECT epoch FROM meta").fetchone()
    db.execute(
        "UPDATE meta SET epoch = ?, dead = coalesce((SELECT max(id) FROM entries), dead)",
        (_epoch(max(number, Token(epoch, 0).number) + 1),),
    )
    db.execute("DELETE FROM fences")
    db.execute("DELETE FROM open_fences")
    db.execute("UPDATE namespaces SET floor = 0")


def _epoch(number: int) -> str:
    return f"{number}:{secrets.token_hex(8)}"


def used_bytes(db: sqlite3.Connection) -> int:
    """Tell how many bytes the file uses, without its empty pages."""
    pages, empty, size = (_pragma(db, name) for name in ("page_count", "freelist_count", "page_size"))
    return (pages - empty) * size


def _pragma(db: sqlite3.Connection, name: str) -> int:
    number: int = db.execute(f"PRAGMA {name}").fetchone()[0]
    return number


# Namespaces


def _state(db: sqlite3.Connection, namespace: str) -> _Namespace:
    return _Namespace(
        *db.execute(
            "SELECT epoch, dead, n.id, coalesce(seq, start), coalesce(floor, start)"
            " FROM meta LEFT JOIN namespaces n ON n.name = ?",
            (namespace,),
        ).fetchone()
    )


def _enter(db: sqlite3.Connection, namespace: str, known: Token | None) -> _Namespace:
    """Tell how far a namespace is, in a transaction that writes: where it went back, a new epoch begins."""
    state = _state(db, namespace)
    if known is not None and state.token.is_before(known):
        _begin_anew(db, known.number)
        state = _state(db, namespace)
    return state


def _settle_in(db: sqlite3.Connection, namespace: str, known: Token | None) -> tuple[int, _Namespace]:
    """Tell how far a namespace is, and its id; afterwards it has a row."""
    state = _enter(db, namespace, known)
    if state.id is not None:
        return state.id, state
    if db.execute("SELECT count(*) FROM namespaces").fetchone()[0] >= _MOST_NAMESPACES:
        _forget_an_empty_one(db)
        state = _state(db, namespace)
    made = db.execute("INSERT INTO namespaces (name, seq, floor) VALUES (?, ?, ?)", (namespace, state.seq, state.floor))
    assert made.lastrowid is not None  # noqa: S101 - a row was inserted
    return made.lastrowid, state


def _forget_an_empty_one(db: sqlite3.Connection) -> None:
    found = db.execute(
        "SELECT id, seq FROM namespaces n WHERE NOT EXISTS (SELECT 1 FROM entries WHERE namespace = n.id) LIMIT 1"
    ).fetchone()
    if found is not None:
        ident, seq = found
        db.execute("UPDATE meta SET start = max(start, ?)", (seq + 1,))
        for table, column in (("namespaces", "id"), ("fences", "namespace"), ("open_fences", "namespace")):
            db.execute(f"DELETE FROM {table} WHERE {column} = ?", (ident,))  # noqa: S608 - names of ours


# Fences


def _name(kind: Kind, target: str) -> str:
    return "a" if kind == "all" else f"{kind[0]}:{target}"


def _names_over(key: str, tags: Iterable[str]) -> Iterable[str]:
    """Tell the names of all fences that would cover an entry."""
    yield "a"
    yield f"k:{key}"
    for prefix in prefixes_of(key):
        yield f"p:{prefix}"
    for base in (key, *bases_of(key)):
        yield f"w:{base}"
    for tag in tags:
        yield f"t:{tag}"


def _is_covered(
    db: sqlite3.Connection, table: _Fences, namespace: int, key: str, tags: Iterable[str], since: int
) -> bool:
    """Tell whether a fence that is newer than `since` covers an entry."""
    query = f"SELECT 1 FROM {table} WHERE namespace = ? AND name = ? AND generation > ?"  # noqa: S608
    return any(db.execute(query, (namespace, name, since)).fetchone() for name in _names_over(key, tags))


def _raise(db: sqlite3.Connection, table: _Fences, namespace: int, names: Iterable[str], generation: int) -> None:
    db.executemany(
        f"INSERT INTO {table} VALUES (?, ?, ?)"  # noqa: S608 - a name of ours
        " ON CONFLICT DO UPDATE SET generation = max(generation, excluded.generation)",
        [(namespace, name, generation) for name in names],
    )


def _trim(db: sqlite3.Connection, table: _Fences, namespace: int, most: int) -> int | None:
    """Keep so many fences; tell the generation of the newest that went, or None."""
    where = f"FROM {table} WHERE namespace = ?"  # a name of ours
    surplus = db.execute(f"SELECT count(*) {where}", (namespace,)).fetchone()[0] - most
    if surplus <= 0:
        return None
    gone = db.execute(f"SELECT name, generation {where} ORDER BY generation LIMIT ?", (namespace, surplus)).fetchall()
    db.executemany(f"DELETE {where} AND name = ?", [(namespace, name) for name, _ in gone])
    newest: int = gone[-1][1]
    return newest


def _put_up(db: sqlite3.Connection, namespace: int, names: Iterable[str], generation: int, most: int) -> None:
    _raise(db, "fences", namespace, names, generation)
    if (newest := _trim(db, "fences", namespace, most)) is not None:
        db.execute("UPDATE namespaces SET floor = max(floor, ?) WHERE id = ?", (newest, namespace))


# What readers do


def look_up(
    db: sqlite3.Connection,
    namespace: str,
    key: str,
    known: Token | None,
    *,
    now: float,
    since_start: float,
    lease: float,
) -> Seen:
    """Tell what is held under a key. Raises `WentBack`.

    - `now`: the clock of the day; `since_start`: the clock that runs since the machine was started
    - `lease`: how many seconds a lease lasts
    """
    token, entry, fenced = _found(db, namespace, key, known, now, since_start, lease)
    if fenced:  # once more, and the fences, of one moment
        db.execute("BEGIN")
        try:
            token, entry, fenced = _found(db, namespace, key, known, now, since_start, lease)
            if fenced and _is_covered(db, "open_fences", fenced.namespace, key, fenced.tags, fenced.born):
                entry = None
        finally:
            db.execute("COMMIT")
    return Seen(token, entry)


@final
@dataclass(frozen=True, slots=True)
class _Fenced:
    """An entry that an open fence may cover."""

    namespace: int
    born: int
    tags: tuple[str, ...]


def _found(
    db: sqlite3.Connection, namespace: str, key: str, known: Token | None, now: float, since_start: float, lease: float
) -> tuple[Token, Entry | None, _Fenced | None]:
    """Look in one statement, which tells all of one moment; the longest part of it is to ask several times."""
    row = db.execute(
        "SELECT epoch, dead, n.id, coalesce(seq, start), coalesce(floor, start),"
        " e.id, e.expires, e.ttl, born, stale, lease, tags, value,"
        " (SELECT max(generation) FROM open_fences WHERE namespace = n.id)"
        " FROM meta LEFT JOIN namespaces n ON n.name = ?"
        " LEFT JOIN entries e ON e.namespace = n.id AND e.key = ? LEFT JOIN contents c ON c.id = e.id",
        (namespace, key),
    ).fetchone()
    state = _Namespace(*row[:5])
    ident, expires, ttl, born, stale, until, tags, value, newest = row[5:]
    if state.token.is_before(known):
        raise WentBack
    if ident is None or not state.is_alive(ident, expires, ttl, now):
        return state.token, None, None
    entry = Entry(ident, value, bool(stale), until is not None and since_start < until <= since_start + lease)
    assert state.id is not None  # noqa: S101 - it has an entry
    is_fenced = newest is not None and newest > born
    return state.token, entry, _Fenced(state.id, born, _unpacked(tags)) if is_fenced else None


def take_lease(
    db: sqlite3.Connection, namespace: str, entry: int, known: Token | None, *, since_start: float, lease: float
) -> Token | None:
    """Let this reader be the one that makes a stale entry anew, for `lease` seconds; tell its token, or None.

    The token is of now: what was busted since it looked made the entry stale again.
    """
    state = _enter(db, namespace, known)
    taken = db.execute(
        "UPDATE entries SET lease = :until"
        " WHERE id = :id AND stale AND (lease IS NULL OR lease <= :now OR lease > :until)",
        {"id": entry, "now": since_start, "until": since_start + lease},
    ).rowcount
    return state.token if taken and entry > state.dead else None


def store(
    db: sqlite3.Connection,
    namespace: str,
    key: str,
    value: bytes,
    known: Token | None,
    *,
    tags: Collection[str],
    ttl: float | None,
    token: Token | None,
    room: int,
    now: float,
) -> Stored:
    """Store an entry, for `ttl` seconds or for ever, unless it was busted after `token`. No tag twice.

    `room`: bytes that the file may hold. What was stored longest ago goes; if that is not enough, the entry is not
    stored.
    """
    ident, state = _settle_in(db, namespace, known)
    former = db.execute(f"{_ROWS} WHERE namespace = ? AND key = ?", (ident, key)).fetchone()
    if token is not None:
        if token.epoch != state.epoch or not state.floor <= token.generation <= state.seq:
            return Stored(state.token, False)
        both = {*tags, *(() if former is None else _unpacked(former[3]))}
        if token.generation < state.seq and _is_covered(db, "fences", ident, key, both, token.generation):
            return Stored(state.token, False)
    if former is not None:
        _drop(db, former)
    tidy(db, most=_TIDIED, now=now)
    packed = "\n".join(tags)  # no tag has a control character
    size = len(value) + _OVERHEAD + 2 * (len(key.encode()) + len(packed.encode()) + len(tags) * len(key.encode()))
    if not _make_room(db, room - size):
        return Stored(state.token, False)
    born = state.seq if token is None else token.generation
    made = db.execute(
        "INSERT INTO entries (namespace, key, born, stale, expires, ttl, tags) VALUES (?, ?, ?, 0, ?, ?, ?)",
        (ident, key, born, None if ttl is None else now + ttl, ttl, packed),
    )
    db.execute("INSERT INTO contents VALUES (?, ?)", (made.lastrowid, value))
    db.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(ident, tag, key) for tag in tags])
    return Stored(state.token, True)


_Row = tuple[int, int, str, str]
_ROWS: Final = "SELECT id, namespace, key, tags FROM entries"


def _unpacked(tags: str) -> tuple[str, ...]:
    return tuple(tags.split("\n")) if tags else ()


def _drop(db: sqlite3.Connection, row: _Row) -> None:
    ident, namespace, key, tags = row
    db.execute("DELETE FROM entries WHERE id = ?", (ident,))
    db.execute("DELETE FROM contents WHERE id = ?", (ident,))
    if tags:
        db.executemany(
            "DELETE FROM tags WHERE namespace = ? AND tag = ? AND key = ?",
            [(namespace, tag, key) for tag in _unpacked(tags)],
        )


def _make_room(db: sqlite3.Connection, most: int) -> bool:
    """Let what was stored longest ago go until the file uses so many bytes at most; tell whether that was enough."""
    for _ in range(_EVICTED):
        if used_bytes(db) <= most:
            return True
        oldest = db.execute(f"{_ROWS} ORDER BY id LIMIT 1").fetchone()
        if oldest is None:
            return False
        _drop(db, oldest)
    return used_bytes(db) <= most


# What keeps the file in order


def tidy(db: sqlite3.Connection, *, most: int, now: float) -> int:
    """Drop some of what is over: at most so many entries; tell how many."""
    rows = db.execute(f"{_ROWS} WHERE expires <= ? ORDER BY expires LIMIT ?", (now, most)).fetchall()
    if len(rows) < most:
        dead = db.execute(f"{_ROWS} WHERE id <= (SELECT dead FROM meta) ORDER BY id LIMIT ?", (most,))  # noqa: S608
        rows = list(dict.fromkeys([*rows, *dead]))[:most]
    for row in rows:
        _drop(db, row)
    return len(rows)


def shrink(db: sqlite3.Connection) -> bool:
    """Give some empty pages back to the file system, if there are very many; tell whether there may be more."""
    empty = _pragma(db, "freelist_count")
    if empty <= max(_SPARE, _pragma(db, "page_count") // 4):
        return False
    for _ in range(_VACUUMED):
        db.execute("PRAGMA incremental_vacuum(1)")  # Python would stop after the first of more
    return _pragma(db, "freelist_count") < empty


# What busts do


def begin(
    db: sqlite3.Connection,
    namespace: str,
    kind: Kind,
    target: str,
    known: Token | None,
    *,
    soft: bool,
    wide: bool,
    most: int = MAX_FENCES,
) -> Token:
    """Begin a bust, `wide` against variants of the target as well; keep at most `most` fences."""
    ident, state = _settle_in(db, namespace, known)
    seq = state.seq + 1
    db.execute("UPDATE namespaces SET seq = ? WHERE id = ?", (seq, ident))
    names = [_name(kind, target)]
    if wide and kind in {"key", "prefix"}:
        names.append(f"w:{target}")
    if not soft:
        _raise(db, "open_fences", ident, names, seq)
        _trim(db, "open_fences", ident, _OPEN)  # of daemons that never came back
    _put_up(db, ident, names, seq, most)
    return Token(state.epoch, seq)


def fence(
    db: sqlite3.Connection,
    namespace: str,
    keys: Sequence[str],
    *,
    generation: int,
    soft: bool,
    most: int = MAX_FENCES,
) -> None:
    """Refuse late fills of these keys and of their variants, too, and let readers miss them unless it is soft."""
    state = _state(db, namespace)
    if state.id is not None:  # of an epoch that is over the generation may lie ahead
        names, since = [f"w:{key}" for key in keys], min(generation, state.seq)
        if not soft:
            _raise(db, "open_fences", state.id, names, since)
        _put_up(db, state.id, names, since, most)


def end(db: sqlite3.Connection, namespace: str, fences: Iterable[tuple[Kind, str, int]]) -> None:
    """End busts of what is named, with its variants, each as the generation that it began as, if none began since."""
    db.executemany(
        "DELETE FROM open_fences WHERE namespace = (SELECT id FROM namespaces WHERE name = ?) AND name = ?"
        " AND generation = ?",
        [
            (namespace, name, generation)
            for kind, target, generation in fences
            for name in dict.fromkeys((_name(kind, target), f"w:{target}"))
        ],
    )


def page(
    db: sqlite3.Connection, namespace: str, ranges: Sequence[Range], *, tag: str | None = None, limit: int, now: float
) -> Page:
    """Find keys in these ranges, of all or of those with a tag, in their order; look at `limit` at most."""
    state = _state(db, namespace)
    query = "SELECT t.key, id, expires, ttl FROM entries t WHERE t.namespace = ?"
    which: tuple[Any, ...] = (state.id,)
    if tag is not None:
        query = (
            "SELECT t.key, id, expires, ttl FROM tags t"
            " CROSS JOIN entries e ON e.namespace = t.namespace AND e.key = t.key WHERE t.namespace = ? AND tag = ?"
        )
        which = (state.id, tag)
    found: list[str] = []
    for place, (low, high) in enumerate(ranges):
        rows = db.execute(f"{query} AND t.key >= ? AND t.key < ? ORDER BY t.key LIMIT ?", (*which, low, high, limit))
        last = low
        for last, ident, expires, ttl in rows:
            limit -= 1
            if state.is_alive(ident, expires, ttl, now):
                found.append(last)
        if limit <= 0:
            return Page(tuple(found), ((last + "\0", high), *ranges[place + 1 :]))  # nothing comes between
    return Page(tuple(found), ())


def variants(db: sqlite3.Connection, namespace: str, keys: Sequence[str], *, now: float) -> tuple[str, ...]:
    """Find the variants of any of these keys, each once: in another encoding, with a query, or both."""
    state = _state(db, namespace)
    ranges = [border for key in keys for it in _ranges_of_variants(key) for border in it]
    wanted = ", ".join(["(?, ?)"] * (len(ranges) // 2))
    rows = db.execute(
        f"WITH wanted (low, high) AS (VALUES {wanted}) SELECT key, id, expires, ttl FROM wanted"  # noqa: S608
        " CROSS JOIN entries ON namespace = ? AND key >= low AND key < high",
        (*ranges, state.id),
    )
    found = (key for key, ident, expires, ttl in rows if state.is_alive(ident, expires, ttl, now))
    return tuple(dict.fromkeys(found))


def count(
    db: sqlite3.Connection, namespace: str, ranges: Sequence[Range], *, tag: str | None = None, most: int
) -> int | None:
    """Tell how many keys there are in these ranges, those that are over included; None if more than `most`."""
    state = _state(db, namespace)
    within = "entries WHERE namespace = ?" if tag is None else "tags WHERE namespace = ? AND tag = ?"
    which: tuple[Any, ...] = (state.id,) if tag is None else (state.id, tag)
    query = f"SELECT count(*) FROM (SELECT 1 FROM {within} AND key >= ? AND key < ? LIMIT ?)"  # noqa: S608
    total = 0
    for low, high in ranges:
        total += db.execute(query, (*which, low, high, most + 1 - total)).fetchone()[0]
        if total > most:
            return None
    return total


def remove(
    db: sqlite3.Connection,
    namespace: str,
    keys: Iterable[str],
    *,
    generation: int,
    soft: bool,
    now: float,
) -> int:
    """Remove entries, or mark as stale what is fresh, that were born before `generation`; tell how many."""
    state = _state(db, namespace)
    done = 0
    for key in keys:
        found = db.execute(
            "SELECT id, namespace, key, tags, expires, ttl, born, stale FROM entries WHERE namespace = ? AND key = ?",
            (state.id, key),
        ).fetchone()
        if found is None:
            continue
        row, (expires, ttl, born, stale) = found[:4], found[4:]
        if not state.is_alive(row[0], expires, ttl, now):
            _drop(db, row)
        elif born < generation and not soft:
            _drop(db, row)
            done += 1
        elif born < generation:
            db.execute("UPDATE entries SET stale = 1, lease = NULL WHERE id = ?", (row[0],))
            done += not stale
    return done


def held(
    db: sqlite3.Connection, namespace: str, keys: Iterable[str], *, generation: int | None, stale: bool, now: float
) -> list[str]:
    """Tell which entries are held, if `stale` also those, and were born before `generation`, if there is one."""
    state = _state(db, namespace)
    query = "SELECT id, expires, ttl, born, stale FROM entries WHERE namespace = ? AND key = ?"
    told: list[str] = []
    for key in keys:
        found = db.execute(query, (state.id, key)).fetchone()
        if found is None:
            continue
        ident, expires, ttl, born, is_stale = found
        is_meant = (stale or not is_stale) and (generation is None or born < generation)
        if is_meant and state.is_alive(ident, expires, ttl, now):
            told.append(key)
    return told


def ranges_of_prefix(prefix: str) -> tuple[Range, ...]:
    """List the ranges of keys that a prefix covers, itself among them."""
    return ranges_of(prefix) if prefix[-1] in SEPARATORS else (_only(prefix), *ranges_of(prefix))


def _ranges_of_variants(key: str) -> tuple[Range, ...]:
    """List the ranges of keys that are variants of `key`."""
    encoded = [key + ending for ending in ENCODINGS]
    return (*(_only(it) for it in encoded), *((f"{it}?", f"{it}@") for it in (key, *encoded)))  # @ is next to ?


def _only(key: str) -> Range:
    """Tell the range that is one key: no key has a control character."""
    return key, key + "\0"
