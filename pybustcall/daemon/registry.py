"""What a restarted daemon must still know: registered entries, cache dependencies, and how far each hot swap came.

This module decides what is written down, when, and what becomes of a change that cannot be. What a dependency is after
an announcement, and whether a swap may be, `dependencies` decides; what is done with a swap is `swaps`' affair.

Theory of operation. All that is known is held in memory, in the event loop; the file only follows, in a thread of its
own. It is read once, at the start. Dependencies and swaps change in memory after they are written. Entries change in
memory first, so that no bust overlooks one, and whoever changed them waits until that is written: the indexes tell of
every change, the keys gather, and each commit takes all that have gathered, as they are then. While one commit is
under way the next gathers. If it fails, the registrations in it are taken back, to what the file says of them, and so
are those that gathered meanwhile, for they may stand on these; each is told. Removals are not taken back: what was
busted is gone, and is written down with the next commit. So is what has outlived its lifetime, for which nobody waits.

What a commit takes is looked up in portions, between which the event loop has its turn. What changes before its portion
comes is told with what was known of it before, and that is what this commit writes; so it says how things were in one
moment, and what was removed later than something else is never gone without that.

Lifetimes are measured by a clock that says nothing after a restart, so they begin anew with it: an entry that is kept
for too long makes a bust reach too far, which costs a miss. The links that an index keeps of what is gone are kept in
the file too, as an entry with a lifetime of 0, or a chain would break there. Generations and stale marks are not kept.

Entries are safe from a killed process; swaps and dependencies, of which a loss could not be noticed, are safe from a
loss of power too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from pybustcall.daemon.backends import RefusedKey
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
from pybustcall.daemon.dependencies import Change, Dependency, InUse, announced, restored, with_version
from pybustcall.daemon.index import Entry, Indexes
from pybustcall.errors import ConfigurationError
from pybustcall.models import check_namespace

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

    from pybustcall.models import AnnounceRequest

__all__ = ["MOST_SWAPS", "WINDOW", "Errands", "Phase", "Registry", "RegistryFailure", "Swap", "report"]

_T = TypeVar("_T")

WINDOW: Final = 600.0
"""Seconds for which a swap that is over is remembered."""
MOST_SWAPS: Final = 1000
"""How many swaps that are over are remembered; beyond that the oldest go."""

_PATIENCE: Final = 1.0  # seconds that closing, and a bust, wait for what is being written
_PORTION: Final = 2000  # entries that are made ready for a commit before the event loop has its turn: some milliseconds

_ENTRIES: Final = """CREATE TABLE entries (
    namespace TEXT, key TEXT, depends_on TEXT NOT NULL, tags TEXT NOT NULL, ttl REAL, PRIMARY KEY (namespace, key)
) WITHOUT ROWID"""

_KIND: Final = Kind(
    setting="registry",
    application=0x70625267,  # "pbRg"
    version=2,
    schema=(
        _ENTRIES,
        """CREATE TABLE dependencies (
            name TEXT PRIMARY KEY, current TEXT NOT NULL, versions TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE swaps (
            id INTEGER PRIMARY KEY, name BLOB UNIQUE, request BLOB NOT NULL, phase TEXT NOT NULL,
            changes TEXT NOT NULL, busted INTEGER NOT NULL, at REAL NOT NULL
        )""",
    ),
    upgrades={
        1: (  # which knew neither namespaces nor tags nor lifetimes
            "ALTER TABLE entries RENAME TO entries_1",
            _ENTRIES,
            "INSERT INTO entries SELECT 'default', key, depends_on, '[]', NULL FROM entries_1",
            "DROP TABLE entries_1",
        ),
    },
    loss="what it held beyond this daemon's memory is forgotten",
)

_log = logging.getLogger("pybustcall.daemon")


class RegistryFailure(Exception):
    """Something could not be written down. `full`: for want of room."""

    def __init__(self, why: str, *, full: bool = False) -> None:
        super().__init__(f"the registry cannot be written: {why}")
        self.why = why
        self.full = full


class Phase(StrEnum):
    """How far a swap came. An `owed` one was put back after its commit, and its bust is not done yet."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    OWED = "owed"


_OVER: Final = frozenset({Phase.DONE, Phase.ROLLED_BACK})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One hot swap.

    - `name`: of its idempotency key, None if it has none or if that is free again
    - `request`: the fingerprint of what was asked
    - `busted`: how many entries went so far
    - `at`: when it came to its phase, in seconds since the Unix epoch
    """

    id: int
    name: bytes | None
    request: bytes
    changes: tuple[Change, ...]
    phase: Phase
    busted: int = 0
    at: float = 0.0

    def put_back(self) -> tuple[Change, ...]:
        """Tell the changes that undo it."""
        return tuple(Change(it.name, it.after, it.before) for it in self.changes)


# In the thread


_Place = tuple[str, str]  # a namespace, and a key in it
_Row = tuple[_Place, Entry | None]  # what is known of it, None if nothing is
_Portions = list[list[_Row]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Writing:
    """What one transaction writes. `gone` are the ids of swaps to forget, `forgotten` the names of dependencies."""

    entries: Sequence[Sequence[_Row]] = ()
    dependencies: tuple[Dependency, ...] = ()
    swaps: tuple[Swap, ...] = ()
    gone: tuple[int, ...] = ()
    forgotten: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class _Known:
    """What a file held when it was opened: the entries by their namespaces."""

    entries: dict[str, dict[str, Entry]]
    dependencies: dict[str, Dependency]
    swaps: dict[int, Swap]


def _write(db: sqlite3.Connection, writings: tuple[_Writing, ...], *, durable: bool) -> None:
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    with transaction(db):
        for writing in writings:
            db.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                (
                    (*place, json.dumps(entry.depends_on), json.dumps(entry.tags), entry.ttl)
                    for portion in writing.entries
                    for place, entry in portion
                    if entry is not None
                ),
            )
            db.executemany(
                "DELETE FROM entries WHERE namespace = ? AND key = ?",
                (place for portion in writing.entries for place, entry in portion if entry is None),
            )
            db.executemany(
                "INSERT OR REPLACE INTO dependencies VALUES (?, ?, ?)",
                ((it.name, it.current, json.dumps(it.versions)) for it in writing.dependencies),
            )
            db.executemany("DELETE FROM dependencies WHERE name = ?", ((name,) for name in writing.forgotten))
            db.executemany("DELETE FROM swaps WHERE id = ?", ((number,) for number in writing.gone))
            # A row that bears the same key is one that could not be written to its end: it is replaced.
            db.executemany("INSERT OR REPLACE INTO swaps VALUES (?, ?, ?, ?, ?, ?, ?)", map(_row, writing.swaps))


def _row(swap: Swap) -> tuple[object, ...]:
    changes = json.dumps([(it.name, it.before, it.after) for it in swap.changes])
    return (swap.id, swap.name, swap.request, swap.phase.value, changes, swap.busted, swap.at)


def _read(db: sqlite3.Connection) -> _Known:
    """Read everything. Raises `Damaged` if something in it is not as we write it."""
    cursor = db.cursor()
    try:
        return _Known(
            _entries(cursor.execute("SELECT namespace, key, depends_on, tags, ttl FROM entries")),
            {
                name: restored(name, current, _texts(versions))
                for name, current, versions in cursor.execute("SELECT name, current, versions FROM dependencies")
            },
            {
                row[0]: _swap(*row)
                for row in cursor.execute("SELECT id, name, request, phase, changes, busted, at FROM swaps ORDER BY id")
            },
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"a row cannot be read: {error}") from error
    except sqlite3.OperationalError as error:
        if error_code(error):
            raise
        raise Damaged("a row has a text that is not UTF-8") from error  # of which SQLite itself knows nothing
    finally:
        cursor.close()  # or the file would stay open as long as the error is at hand


def _entries(rows: Iterable[tuple[object, ...]]) -> dict[str, dict[str, Entry]]:
    found: dict[str, dict[str, Entry]] = {}
    for namespace, key, depends_on, tags, ttl in rows:
        if (known := found.get(_a(str, namespace))) is None:
            known = found[check_namespace(namespace)] = {}
        known[_a(str, key)] = Entry(
            depends_on=_texts(depends_on), tags=_texts(tags), ttl=None if ttl is None else _lifetime(ttl)
        )
    return found


def _lifetime(written: object) -> float:
    ttl = _a(float, written)
    if not ttl >= 0:
        raise ValueError("an entry is kept for less than no time")
    return ttl


def _swap(*row: object) -> Swap:
    number, name, request, phase, changes, busted, at = row
    if _a(int, busted) < 0:
        raise ValueError("a swap busted less than nothing")
    return Swap(
        id=_a(int, number),
        name=None if name is None else _a(bytes, name),
        request=_a(bytes, request),
        changes=tuple(Change(*_listed(it, of=str)) for it in _listed(json.loads(_a(str, changes)), of=list)),
        phase=Phase(_a(str, phase)),
        busted=_a(int, busted),
        at=_a(float, at),
    )


def _texts(written: object) -> tuple[str, ...]:
    return _listed(json.loads(_a(str, written)), of=str)


def _listed(value: object, *, of: type[_T]) -> tuple[_T, ...]:
    return tuple(_a(of, one) for one in _a(list, value))


def _a(kind: type[_T], value: object) -> _T:
    """Return the value if it is of this kind, and no other."""
    if not isinstance(value, kind):
        raise TypeError(f"there is {type(value).__name__} where {kind.__name__} should be")
    return value


# What was and what is


def _joined(held: Entry | None, known: Entry) -> Entry:
    """Tell what an entry is that is registered already, and known from before: all of both, for the longer of both."""
    if held is None:
        return known
    return Entry(
        depends_on=(*held.depends_on, *known.depends_on),
        tags=(*held.tags, *known.tags),
        ttl=None if held.ttl is None or known.ttl is None else max(held.ttl, known.ttl),
    )


# On the event loop


async def _drop(batch: dict[_Place, Entry | None], portions: _Portions) -> None:
    """Let go of what was written a portion at a time: to free much at once takes long, too."""
    while portions:
        for place, _ in portions.pop():
            del batch[place]
        if portions:
            await asyncio.sleep(0)


@final
class Errands:
    """Tasks that are nobody's own: whoever waits for one may go away, and it goes on to its end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Begin a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._land)
        return task

    async def wait_for(self, task: asyncio.Task[_T]) -> _T:
        """Wait for a task, and return or raise what it did; being cancelled cancels the waiting only."""
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.add_done_callback(report)
            raise
        return task.result()

    async def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Begin a task and wait for it."""
        return await self.wait_for(self.begin(work))

    async def end(self, patience: float) -> None:
        """Wait for all of them, and cancel what is not done in `patience` seconds."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=patience)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    def _land(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen; whoever waits for it is told


def report(task: asyncio.Task[Any]) -> None:
    """Log what a task raised whose client went away."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.warning("a request whose client went away failed: %s", error, exc_info=error)


@final
class Registry:
    """Entries, dependencies and hot swaps, in memory and, with a path, in a file that outlives the process.

    - `path`: the file, mode 0600, this daemon's alone; None keeps everything in memory only
    - `patience`: seconds that closing, and a bust that removed entries, wait for what is being written
    - `clock`: tells seconds since the Unix epoch

    Belongs to one event loop and the indexes of one daemon, between `open` and `close`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        patience: float = _PATIENCE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = None if path is None else Path(path).absolute()
        self._patience = patience
        self._clock = clock
        self._now = 0.0
        self._database = Database(_KIND, self._path, self._prepare)
        self._whole = True  # whether the file has all that was written: one begun in a damaged one's place has not
        self._thread: ThreadPoolExecutor | None = None
        self._errands = Errands()
        self._known = _Known({}, {}, {})
        self._dependencies: dict[str, Dependency] = {}
        self._swaps: dict[int, Swap] = {}
        self._ids = 0
        self._indexes = Indexes()
        self._writing = asyncio.Lock()  # held from a decision until what follows from it is in memory
        self._unwritten: dict[_Place, Entry | None] = {}  # what has changed, and what the file says of it
        self._removed = False  # whether there are removals among them
        self._taken: dict[_Place, Entry | None] = {}  # the same of what is being made ready
        self._meanwhile: dict[_Place, Entry | None] = {}  # what was known of those that have changed since
        self._gathering: asyncio.Task[None] | None = None
        self._failures = 0
        self._failure = RegistryFailure("not yet")  # the last that took registrations back

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else str(self._path)
        return f"Registry({where}, {len(self._dependencies)} dependencies, {len(self._swaps)} swaps)"

    # Life

    async def open(self, indexes: Indexes, check: Callable[[str, str], None]) -> None:
        """Read the file, register the entries that it holds in these indexes, and follow them from now on.

        They are joined with what is registered already, for to bust more costs a miss, and are not counted against how
        many namespaces there may be. Left out are those for which `check`, told the namespace and the key, raises
        `RefusedKey`: no cache could hold them any more, and only their links are kept. Lifetimes begin anew.

        Raises `ConfigurationError` (setting "registry") if the file is another process's or another program's, or
        cannot be there or be written. A damaged one is renamed, and a new one begun.
        """
        self._indexes = indexes
        if self._path is None:
            return
        thread = ThreadPoolExecutor(1, thread_name_prefix="pybustcall-registry")
        try:
            await open_in(thread, self._database)
        except (sqlite3.Error, OSError) as error:
            raise ConfigurationError(
                f"the registry file {str(self._path)!r} cannot be used: {error}; make room, or choose another path",
                setting="registry",
            ) from error
        known, self._known = self._known, _Known({}, {}, {})
        self._restore(known.entries, check)
        self._dependencies = known.dependencies
        self._swaps = known.swaps
        self._ids = max(known.swaps, default=0)
        self._thread = thread
        indexes.watch(self._note)
        for namespace, entries in known.entries.items():
            for key, entry in entries.items():
                if entry.gone and self._known_of((namespace, key)) is None:
                    self._note(namespace, key, entry)  # its links are of no use any more

    def _restore(self, known: Mapping[str, Mapping[str, Entry]], check: Callable[[str, str], None]) -> None:
        for namespace, entries in known.items():
            index, sound = self._indexes.of(namespace), {}
            for key, entry in entries.items():
                try:
                    check(namespace, key)
                except RefusedKey:
                    sound[key] = entry.links()
                else:
                    sound[key] = _joined(index.entry(key), entry)
            index.update(sound)

    async def close(self) -> None:
        """Write what is not written yet, close the file, and end the thread. A second time it does nothing."""
        thread = self._thread
        if thread is None:
            return
        self._indexes.expire()
        self._indexes.watch(None)
        try:
            if self._unwritten:
                self._gather()
            await self._errands.end(self._patience)
        finally:
            self._thread = None
            if not await close_in(thread, self._database, self._patience):
                _log.warning("the registry was not closed properly; the last that was written may be lost")

    def _prepare(self, db: sqlite3.Connection) -> None:
        self._known = _read(db)

    # Entries

    async def save(self) -> None:
        """Wait until the entries are written as they are now. Raises `RegistryFailure` if that could not be.

        Then what was registered is taken back, and what was removed is written down some other time.
        """
        if self._thread is not None and (self._unwritten or self._writing.locked()):
            await self._errands.wait_for(self._gather())

    async def try_save(self) -> None:
        """Wait, for a limited time, until removals are written; if that cannot be, log it, for no bust fails of that.

        What was removed and is not known to be so after a restart costs no more than being removed again.
        """
        if self._thread is None or not self._removed:
            return
        task = self._gather()
        done, _ = await asyncio.wait({task}, timeout=self._patience)
        why = task.exception() if done else f"not written in {self._patience:g} seconds"
        if why is not None:
            _log.warning("what was busted could not be noted, and may be taken as registered after a restart: %s", why)

    def _note(self, namespace: str, key: str, before: Entry | None) -> None:
        place = namespace, key
        self._unwritten.setdefault(place, before)
        if place in self._taken:
            self._meanwhile.setdefault(place, before)
        if not self._removed:
            index = self._indexes.peek(namespace)
            self._removed = index is None or key not in index

    def _known_of(self, place: _Place) -> Entry | None:
        namespace, key = place
        index = self._indexes.peek(namespace)
        return None if index is None else index.known(key)

    def _gather(self) -> asyncio.Task[None]:
        """Tell the task that writes what has changed by the time it begins: whoever asks until then shares it."""
        if self._gathering is None:
            self._gathering = self._errands.begin(self._save(self._failures))
        return self._gathering

    async def _save(self, failures: int) -> None:
        async with self._writing:
            self._gathering = None
            if failures != self._failures:
                raise RegistryFailure(self._failure.why, full=self._failure.full)
            batch, self._unwritten, self._removed = self._unwritten, {}, False
            try:
                portions = await self._rows(batch)
                if portions:
                    await self._commit(_Writing(entries=portions), durable=False)
            except RegistryFailure as error:
                self._failures += 1
                self._failure = error
                self._unwritten |= batch  # of which the file still says what it said before
                self._take_back()
                raise
            await _drop(batch, portions)

    async def _rows(self, batch: dict[_Place, Entry | None]) -> _Portions:
        """Look up what is known of all these now, in portions; what changes meanwhile counts as it is now."""
        portions: _Portions = []
        self._taken, places = batch, iter(batch)
        try:
            while some := list(islice(places, _PORTION)):
                if portions:
                    await asyncio.sleep(0)
                portions.append([(place, self._row_of(place)) for place in some])
        finally:
            self._taken, self._meanwhile = {}, {}
        return portions

    def _row_of(self, place: _Place) -> Entry | None:
        if place in self._meanwhile:
            return self._meanwhile[place]
        return self._known_of(place)

    def _take_back(self) -> None:
        """Make what has changed again what the file says of it, but for what is gone, which stays to be written.

        Links that were kept are again, if they are of use: what was registered anew without them may not have been.
        All the while lifetimes may end, also that of what was just put back; that is noted as at any other time.
        """
        back: dict[str, dict[str, Entry | None]] = {}
        for (namespace, key), before in self._unwritten.items():
            if before is None or before.gone or key in self._indexes.of(namespace):
                back.setdefault(namespace, {})[key] = before
        for namespace, entries in back.items():
            self._indexes.of(namespace).put_back(entries)
            for key, before in entries.items():
                if self._known_of((namespace, key)) == before:
                    del self._unwritten[namespace, key]
        self._removed = bool(self._unwritten)

    # Dependencies

    @property
    def dependencies(self) -> Mapping[str, Dependency]:
        """The dependencies by name."""
        return self._dependencies

    async def announce(self, asked: AnnounceRequest) -> Dependency:
        """Make a dependency or its versions known; tell what it is then.

        Raises what `announced` raises, and `RegistryFailure`; then nothing has changed. A caller that is cancelled
        breaks nothing off.
        """
        return await self._errands.run(self._announce(asked))

    async def _announce(self, asked: AnnounceRequest) -> Dependency:
        async with self._writing:
            known = self._dependencies.get(asked.name)
            told = announced(asked, known, len(self._dependencies), self._at_stake(asked.name))
            if told != known:
                await self._commit(_Writing(dependencies=(told,)))
                self._dependencies[told.name] = told
            return told

    async def forget(self, name: str) -> None:
        """Forget a dependency; one that is not known is forgotten already.

        Raises `InUse` if an entry depends on it or an unfinished swap names it, and `RegistryFailure`; then nothing has
        changed.
        """
        async with self._writing:
            if name not in self._dependencies:
                return
            if count := sum(len(index.dependents(name)) for _, index in self._indexes):
                raise InUse(f"{count} registered entries depend on it; register them without it first")
            if self._at_stake(name):
                raise InUse("a hot swap of it is not finished; ask again later")
            await self._commit(_Writing(forgotten=(name,)))
            del self._dependencies[name]

    def _at_stake(self, name: str) -> frozenset[str]:
        """Tell the versions of a dependency that unfinished swaps name."""
        changes = [it for swap in self.unfinished() for it in swap.changes if it.name == name]
        return frozenset(version for it in changes for version in (it.before, it.after))

    # Swaps

    def unfinished(self) -> tuple[Swap, ...]:
        """Tell the swaps that are not over, oldest first."""
        return tuple(swap for swap in self._swaps.values() if swap.phase not in _OVER)

    def swap_named(self, name: bytes) -> Swap | None:
        """Tell the committed swap with this key; one that is over is forgotten after a while."""
        self._tell_time()
        gone, known = self._to_forget(), {Phase.COMMITTED, Phase.DONE}
        found = (it for it in self._swaps.values() if it.name == name and it.phase in known and it.id not in gone)
        return next(found, None)

    async def prepare(self, name: bytes | None, request: bytes, changes: tuple[Change, ...]) -> Swap:
        """Write down that a swap begins. Raises `RegistryFailure`; then nothing has changed."""
        self._ids += 1
        swap = Swap(id=self._ids, name=name, request=request, changes=changes, phase=Phase.PREPARED)
        return await self.put(swap, swap.phase)

    async def put(self, swap: Swap, phase: Phase, changes: tuple[Change, ...] = (), busted: int = 0) -> Swap:
        """Write down that a swap came to a phase, in one transaction with the versions that change by it.

        `busted` is added to what went before. One that was rolled back frees its key. Raises `RegistryFailure`; then
        nothing has changed.
        """
        async with self._writing:
            put = self._moved(swap, phase, busted)
            dependencies = tuple(
                replace(
                    with_version(self._dependencies[it.name], it.after, spared=self._at_stake(it.name)),
                    current=it.after,
                )
                for it in changes
            )
            gone = self._to_forget()
            await self._commit(_Writing(dependencies=dependencies, swaps=(put,), gone=gone))
            self._dependencies.update((it.name, it) for it in dependencies)
            for number in gone:
                del self._swaps[number]
            self._swaps[put.id] = put
            return put

    async def end(self, swap: Swap, phase: Phase, busted: int = 0) -> Swap:
        """Note that a swap is over, also if it cannot be written down: then the next start ends it the same way."""
        try:
            return await self.put(swap, phase, busted=busted)
        except RegistryFailure as error:
            _log.warning(
                "the end of a hot swap (%s) could not be noted, and will be at the next start: %s", phase, error
            )
            self._swaps[swap.id] = put = self._moved(swap, phase, busted)
            return put

    def _moved(self, swap: Swap, phase: Phase, busted: int) -> Swap:
        kept = None if phase in {Phase.OWED, Phase.ROLLED_BACK} else swap.name
        return replace(swap, phase=phase, name=kept, busted=swap.busted + busted, at=self._tell_time())

    def _to_forget(self) -> tuple[int, ...]:
        """Tell the ids of swaps that have long been over, and of the oldest of those that are too many."""
        over = [swap for swap in self._swaps.values() if swap.phase in _OVER]
        return tuple(
            swap.id
            for number, swap in enumerate(reversed(over))
            if number >= MOST_SWAPS or self._now - swap.at >= WINDOW
        )

    def _tell_time(self) -> float:
        """Tell the time. If the clock was set back, what now lies in the future is dated to now, so that it ends."""
        now = self._clock()
        if now < self._now or not self._now:
            self._swaps = {it.id: replace(it, at=min(it.at, now)) for it in self._swaps.values()}
        self._now = now
        return now

    # Writing

    async def _commit(self, writing: _Writing, *, durable: bool = True) -> None:
        """Write in one transaction, into a new file if this one turns out to be damaged. Raises `RegistryFailure`."""
        if self._path is None:
            return
        write = partial(_write, durable=durable)
        try:
            try:
                await self._use(partial(write, writings=(writing,) if self._whole else (self._everything(), writing)))
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                self._whole = False
                await self._in_thread(partial(self._database.set_aside, str(error)))
                await self._use(partial(write, writings=(self._everything(), writing)))
        except (sqlite3.Error, OSError, ConfigurationError) as error:
            raise RegistryFailure(str(error), full=error_code(error) == sqlite3.SQLITE_FULL) from error
        self._whole = True

    def _everything(self) -> _Writing:
        return _Writing(
            entries=tuple(
                tuple(((namespace, key), entry) for key, entry in (*index.items(), *index.kept()))
                for namespace, index in self._indexes
            ),
            dependencies=tuple(self._dependencies.values()),
            swaps=tuple(self._swaps.values()),
        )

    async def _use(self, work: Callable[[sqlite3.Connection], None]) -> None:
        await self._in_thread(partial(self._database.use, work))

    async def _in_thread(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            raise RegistryFailure("it is closed")
        await asyncio.get_running_loop().run_in_executor(self._thread, work)
