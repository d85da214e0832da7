"""The readers' half of a cache in an SQLite file: look up, make, store, so that a bust by the daemon is never undone.

This module decides what a reader does with what it finds. It busts nothing; that is asked of a daemon on the same
machine, which has the same file. Who makes a value while others wait is decided by `filling`, how entries lie in the
file by `sqlite_layout`, how it is shared and waited for by `sqlite_file`. It needs nothing but Python.

Theory of operation. Each look-up tells a token: how far the busts of the namespace had come. A value that is made is
stored with the token from before it was made, and is refused if it was busted since. So however long it takes to make a
value, an old one never replaces what a bust has removed, whichever process made it.

A look-up never waits for one who writes, and one of a stale entry only if nobody makes it anew yet: to be the one is
written down, so that of all processes one is chosen. If that cannot be written, the old value is served, and the next
reader tries.

Where another process keeps the file locked, what is to be stored waits, and with it whoever asked for the value. After
a few in a row nothing is stored any more for a while, then one tries again; likewise with look-ups, which only a
process that was stopped while it made the file can hold up. That is for each event loop to find out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar, final
from weakref import WeakKeyDictionary

from pybustcall import sqlite_layout as layout
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.filling import (
    BREAKER,
    Filling,
    Found,
    Guard,
    Make,
    Wanted,
    checked_lease,
    checked_tags,
    checked_ttl,
    only_bytes,
)
from pybustcall.models import DEFAULT_NAMESPACE, check_namespace, check_target
from pybustcall.policies import Breaker
from pybustcall.redis_layout import check_marks
from pybustcall.sqlite_file import SqliteFile, SqliteUnavailable
from pybustcall.sqlite_layout import LEAST_ROOM, Seen, Stored, Token, WentBack

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Awaitable, Callable, Iterable
    from types import TracebackType

__all__ = ["Breaker", "Found", "Looked", "Make", "SqliteCache", "SqliteUnavailable", "Token"]

T = TypeVar("T")

_QUIET: Final = 10.0  # seconds between two lines of the log about a file that cannot be used
_UNIT: Final = 1 << 14  # bytes of a value that cost as much as one more entry in a transaction

_log = logging.getLogger("pybustcall.integrations")


@final
@dataclass(frozen=True, slots=True)
class Looked:
    """What a reader knows after it looked.

    - `found`: what is held, or None
    - `refresh`: it is stale, and this reader was chosen to make it anew
    - `token`: to hand in when a value is stored that was made from now on
    """

    found: Found | None
    refresh: bool
    token: Token


@final
class SqliteCache:
    """A namespace of entries in an SQLite file, each of them bytes under a key, with tags and a lifetime.

    ```python
    cache = SqliteCache("/var/cache/shop/cache.db", namespace="shop")
    page = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=300.0)
    ```

    - `path`: a file on a local disk; all processes of this machine, and the daemon, name the same. It is made if it is
      missing, its directory is not. It is for this user only, and PATH.lock lies beside it. One that is damaged is
      renamed to PATH.corrupt, and a new one begun
    - `namespace`: whose entries; the daemon is asked to bust the same
    - `max_bytes`: how large the file may become, about; beyond it what was stored longest ago goes. It counts for what
      this cache stores: let all processes say the same
    - `timeout`: seconds that another process may keep the file locked before what is to be written fails
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen
    - `on_error`: what `get_or_set` does if the file cannot be used: "fill" makes the value and returns it, not cached;
      "raise" raises `SqliteUnavailable`, as all other calls do
    - `breaker`: after how many calls in a row that waited in vain all fail at once, and for how long; None is never. By
      default after three, or after half of at least 20 within 10 seconds, for a second at most, later up to 10

    One cache may be used in several event loops and threads, and goes on in a forked child. Two threads belong to it
    while it is open: close it at the end, in any of the loops. Raises `ConfigurationError` or `InvalidRequest` for a
    setting.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_bytes: int = 256 << 20,
        timeout: float = 1.0,
        lease: float = 10.0,
        on_error: Literal["fill", "raise"] = "fill",
        breaker: Breaker | None = BREAKER,
    ) -> None:
        if on_error not in {"fill", "raise"}:
            raise ConfigurationError(f'on_error must be "fill" or "raise", not {on_error!r}', setting="on_error")
        if not max_bytes >= LEAST_ROOM:
            raise ConfigurationError(f"max_bytes must be {LEAST_ROOM} or more, not {max_bytes!r}", setting="max_bytes")
        self._namespace = check_namespace(namespace)
        self._room = max_bytes
        self._lease = checked_lease(lease)
        self._fills_on_error = on_error == "fill"
        self._breaker = breaker
        self._file = SqliteFile(path, timeout=timeout)
        self._known: Token | None = None
        self._filling: Filling[bytes] = Filling(only_bytes)
        self._guards: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Guard, Guard]] = WeakKeyDictionary()
        self._told = -math.inf

    def __repr__(self) -> str:
        return f"SqliteCache({self._file.path!r}, namespace={self._namespace!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Break off what is being made in the running loop, and close the file. Repeating it is harmless.

        Whoever waits for a value gets `ClientClosed`. A call after that, or from another loop, opens the file anew.
        """
        try:
            await self._filling.aclose()
        finally:
            await self._file.aclose()

    async def get_or_set(self, key: str, make: Make[bytes], *, tags: Iterable[str] = (), ttl: float | None) -> bytes:
        """Return the value under `key`; if nothing is held, make it, store it and return it.

        - `make`: an async or plain function without arguments that returns bytes; a plain one must not block
        - `tags`: up to 256 texts by which a bust finds the entry
        - `ttl`: seconds until the entry ends by itself; None is never

        If the entry is stale, one reader makes it anew, and all others get the stale value at once, but for those whose
        own `make` asks for it: what is made must not be made of what is stale. Whatever `make` raises is raised here.
        Of several calls at a time with one key, one `make` runs in each event loop; if the file cannot be used, each
        runs its own. `make` may ask for other keys, and a task that it begins may. Raises `InvalidRequest`, before
        anything is made, for arguments that cannot be, such as a key with more than 128 of the marks `/:?#`,
        `RuntimeError` if it would wait for itself, since `make` asks for its own key, if only by way of others, and
        with on_error="raise" `SqliteUnavailable`.
        """
        wanted = Wanted(_storable(key), make, checked_tags(tags), checked_ttl(ttl))
        self._filling.check(wanted.key)
        try:
            looked = await self.lookup(key)
        except SqliteUnavailable as error:
            self._on_error(error)
            return await self._filling.alone(wanted)
        if looked.found is not None and not looked.refresh and not (looked.found.stale and self._filling.is_making):
            return looked.found.value
        return await self._filling.together(wanted, looked.token, partial(self._fill, looked.token))

    async def get(self, key: str) -> Found | None:
        """Tell what is held under `key`; None if nothing is. Who is to make a stale entry anew is not asked."""
        return _found(await self._look(check_target(key, "key")))

    async def lookup(self, key: str) -> Looked:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew."""
        seen = await self._look(check_target(key, "key"))
        entry, found = seen.entry, _found(seen)
        if entry is None or not entry.stale or entry.leased:
            return Looked(found, False, seen.token)
        token = await self._take_lease(entry.id)
        return Looked(found, token is not None, token or seen.token)

    async def store(self, key: str, value: bytes, *, token: Token, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value that was made after `token` was told; tell whether it was, or refused.

        It is refused if the key, a branch that it lies in, one of its tags, or everything was busted since: the value
        may be an old one. It may still be handed to whoever asked before that. So is what `max_bytes` leaves no room
        for.
        """
        return await self._store(_storable(key), value, token, checked_tags(tags), checked_ttl(ttl))

    async def set(self, key: str, value: bytes, *, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value whatever was busted; tell whether it was stored: `max_bytes` may leave no room for it.

        For values that are new by themselves, such as what was just written. One that was read somewhere, and took a
        while, may be older than a bust: use `get_or_set`, or `lookup` and `store`.
        """
        return await self._store(_storable(key), value, None, checked_tags(tags), checked_ttl(ttl))

    async def _fill(self, token: Token, wanted: Wanted[bytes], value: bytes) -> None:
        try:
            await self._store(wanted.key, value, token, wanted.tags, wanted.ttl)
        except SqliteUnavailable as error:
            self._on_error(error)

    def _on_error(self, error: SqliteUnavailable) -> None:
        """Raise it, or log it once in a while."""
        if not self._fills_on_error:
            raise error
        if (now := time.monotonic()) - self._told >= _QUIET:
            self._told = now
            _log.warning("values are made without a cache: %s", error)

    # What is asked of the file

    async def _look(self, key: str) -> Seen:
        known = self._known

        def work(db: sqlite3.Connection) -> Seen:
            now, since_start = time.time(), time.monotonic()
            return layout.look_up(db, self._namespace, key, known, now=now, since_start=since_start, lease=self._lease)

        reads, _ = self._guard()
        while True:
            try:
                seen = await _guarded(reads, self._file.read, work)
            except WentBack:
                await self._write(lambda db: layout.begin_anew(db, self._namespace, known), safe=True)
            else:
                break
        self._known = seen.token.newest(self._known)
        return seen

    async def _take_lease(self, entry: int) -> Token | None:
        known = self._known

        def work(db: sqlite3.Connection) -> Token | None:
            return layout.take_lease(db, self._namespace, entry, known, since_start=time.monotonic(), lease=self._lease)

        try:
            return await self._write(work)
        except SqliteUnavailable:
            return None  # what is held is served, and the next reader tries

    async def _store(
        self, key: str, value: bytes, token: Token | None, tags: tuple[str, ...], ttl: float | None
    ) -> bool:
        if not isinstance(value, bytes):
            raise InvalidRequest(f"value must be bytes, not {type(value).__name__}; nothing was sent", field="value")
        if len(value) > self._room:
            return False  # all would go for it in vain
        known, most = self._known, self._room

        def work(db: sqlite3.Connection) -> Stored:
            now = time.time()
            return layout.store(
                db, self._namespace, key, value, known, tags=tags, ttl=ttl, token=token, room=most, now=now
            )

        told = await self._write(work, cost=1 + len(value) // _UNIT)
        self._known = told.token.newest(self._known)
        return told.stored

    async def _write(self, work: Callable[[sqlite3.Connection], T], *, safe: bool = False, cost: int = 1) -> T:
        _, writes = self._guard()
        return await _guarded(writes, partial(self._file.write, safe=safe, cost=cost), work)

    def _guard(self) -> tuple[Guard, Guard]:
        """Tell the guards of reading and of writing in this loop."""
        loop = asyncio.get_running_loop()
        guards = self._guards.get(loop)
        if guards is None:
            where = f"the cache {self._file.path}"
            guards = self._guards[loop] = (
                Guard(self._breaker, where, _refuse),
                Guard(self._breaker, f"{where}, which was locked,", _refuse),
            )
        return guards


async def _guarded(
    guard: Guard,
    do: Callable[[Callable[[sqlite3.Connection], T]], Awaitable[T]],
    work: Callable[[sqlite3.Connection], T],
) -> T:
    """Have something done unless others wait in vain just now; take in whether it had to wait in vain."""
    begun = time.monotonic()
    trial = guard.begin(begun)
    try:
        done = await do(work)
    except SqliteUnavailable as error:
        if error.answered:
            guard.answered(time.monotonic(), trial=trial)
        else:
            guard.silent(begun, time.monotonic(), trial=trial)
        raise
    except BaseException:
        guard.broken_off(trial=trial)
        raise
    guard.answered(time.monotonic(), trial=trial)
    return done


def _refuse(text: str) -> SqliteUnavailable:
    return SqliteUnavailable(text)


def _found(seen: Seen) -> Found | None:
    return None if seen.entry is None else Found(seen.entry.value, seen.entry.stale)


def _storable(key: object) -> str:
    checked = check_target(key, "key")
    check_marks(checked)
    return checked
