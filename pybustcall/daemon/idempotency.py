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
import hashlib
import hmac
import json
import logging
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from pybustcall.daemon.database import Database, Kind, close_in, open_in, transaction
from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Coroutine

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

_KIND: Final = Kind(
    setting="state",
    application=0x70624964,  # "pbId"
    version=1,
    schema=(
        """CREATE TABLE answers (
            id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, request BLOB NOT NULL, body BLOB NOT NULL,
            at REAL NOT NULL
        )""",
        "CREATE INDEX answers_at ON answers (at)",
    ),
    loss="idempotency keys used before are forgotten",
)

_MORE: Final = {"kind": "key", "soft": False, "namespace": None, "verify": False, "settle": None}

# What may befall the memory while it is used. None of it keeps a request from being applied.
_FAILURES: Final = (sqlite3.Error, OSError, ConfigurationError)

_log = logging.getLogger("pybustcall.daemon")


class KeyReused(Exception):
    """The key belongs to another request."""

    def __init__(self) -> None:
        super().__init__("the key was used for another request; use a new key for each request")


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
    """Tell requests apart by what changes their effect: what is named, and how it is busted.

    `binding`, `fault_tolerance` and `reason` change nothing here, and a replay by another client of the same
    application may say others. What has its default is left out, so that files of earlier versions still hold.
    """
    more = {name: value for name, default in _MORE.items() if (value := getattr(asked, name)) != default}
    effect = [asked.target, asked.strategy, *([more] if more else [])]
    return hashlib.sha256(json.dumps(effect, sort_keys=True).encode()).digest()


# In the thread


@final
class _Store:
    """The table of answers, in a file or, without a path, in memory. Used in one thread only."""

    def __init__(self, path: Path | None, window: float, most: int, clock: Callable[[], float]) -> None:
        self.database = Database(_KIND, path, self._prepare)
        self._window = window
        self._most = most
        self._clock = clock
        self._count = 0
        self._now = 0.0

    def recall(self, name: bytes) -> tuple[bytes, bytes] | None:
        """Tell what was remembered under a name, and is not too old: the fingerprint and the body."""
        return self.database.do(lambda db: self._recall(db, name))

    def remember(self, name: bytes, request: bytes, body: bytes) -> None:
        """Remember an answer; what is too old goes, and so does the oldest if there are too many."""
        self.database.do(lambda db: self._remember(db, name, request, body))

    def _prepare(self, db: sqlite3.Connection) -> None:
        self._now = self._clock()
        _date_back(db, self._now)
        self._count = db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def _recall(self, db: sqlite3.Connection, name: bytes) -> tuple[bytes, bytes] | None:
        now = self._tell_time(db)
        found: tuple[bytes, bytes] | None = db.execute(
            "SELECT request, body FROM answers WHERE name = ? AND at > ?", (name, now - self._window)
        ).fetchone()
        return found

    def _remember(self, db: sqlite3.Connection, name: bytes, request: bytes, body: bytes) -> None:
        now = self._tell_time(db)
        with transaction(db):
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


def _date_back(db: sqlite3.Connection, now: float) -> None:
    db.execute("UPDATE answers SET at = ? WHERE at > ?", (now, now))


# On the event loop


async def _always(_body: bytes) -> bool:
    return True


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
        may_pass = (sqlite3.Error, OSError)
        try:
            await open_in(thread, self._store.database, may_pass)
        except may_pass as error:
            self._warn("idempotency keys cannot be remembered for now", error)
        self._thread = thread

    async def close(self) -> None:
        """Break off what is still under way, close the file, and end the thread. A second time it does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            tasks = {flight.task for flight in self._flights.values()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        finally:
            if not await close_in(thread, self._store.database, self._patience):
                _log.warning(
                    "the memory of idempotency keys was not closed properly; the last of them may be forgotten"
                )

    async def once(
        self,
        name: bytes,
        request: bytes,
        apply: Callable[[], Awaitable[bytes]],
        stands: Callable[[bytes], Awaitable[bool]] = _always,
    ) -> Answer:
        """Have a request applied, unless that was done: then tell its body again.

        `name` is `name_of` its key, `request` its fingerprint; `apply` returns the body to answer with; `stands` tells
        of a remembered body whether it still holds: if not, the request is applied anew. While the same
        request is being applied, wait for it. What `apply` raises is raised here and not remembered; then one of those
        who waited applies it. Raises `KeyReused` if the key belongs to another request. A caller that is cancelled
        breaks nothing off.
        """
        while True:
            flight = self._flights.get(name)
            if flight is None:
                return await self._take_off(name, request, self._fly(name, request, apply, stands))
            if flight.request != request:
                raise KeyReused
            await asyncio.wait({flight.task})
            if not flight.task.cancelled() and flight.task.exception() is None:
                return Answer(flight.task.result().body, replayed=True)

    async def _take_off(self, name: bytes, request: bytes, flying: Coroutine[Any, Any, Answer]) -> Answer:
        flight = _Flight(request, asyncio.create_task(flying))
        self._flights[name] = flight
        flight.task.add_done_callback(partial(self._land, name, flight))
        try:
            await asyncio.wait({flight.task})
        except asyncio.CancelledError:
            flight.abandoned = True
            raise
        return flight.task.result()

    async def _fly(
        self,
        name: bytes,
        request: bytes,
        apply: Callable[[], Awaitable[bytes]],
        stands: Callable[[bytes], Awaitable[bool]],
    ) -> Answer:
        try:
            found = await self._ask(partial(self._store.recall, name))
        except _FAILURES as error:
            self._warn("an idempotency key could not be looked up, and its request is applied", error)
            found = None
        if found is not None:
            if found[0] != request:
                raise KeyReused
            if await stands(found[1]):
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
