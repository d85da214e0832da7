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

import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar, final

from pybustcall import sqlite_layout as layout
from pybustcall.errors import ConfigurationError
from pybustcall.integrations.filling import Make
from pybustcall.integrations.guard import BREAKER, Guards, Saying
from pybustcall.integrations.reading import Found, Looked, OnError, ReadersCache
from pybustcall.models import DEFAULT_NAMESPACE, check_namespace, check_target
from pybustcall.policies import Breaker
from pybustcall.sqlite_file import SqliteFile, SqliteUnavailable
from pybustcall.sqlite_layout import LEAST_ROOM, Seen, Stored, Token, WentBack

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Callable

    from pybustcall.errors import BustcallError
    from pybustcall.integrations.filling import Wanted

__all__ = ["Breaker", "Found", "Looked", "Make", "SqliteCache", "SqliteUnavailable", "Token"]

T = TypeVar("T")

_UNIT: Final = 1 << 14  # bytes of a value that cost as much as one more entry in a transaction


@final
class SqliteCache(ReadersCache[Token]):
    """A namespace of entries in an SQLite file, each of them bytes under a key, with tags and a lifetime.

    ```python
    cache = SqliteCache("/var/cache/shop/cache.db", namespace="shop")
    page = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=300.0)
    ```

    - `path`: a file on a local disk; all processes of this machine, and the daemon, name the same. It is made if it is
      missing or empty, its directory is not. It is for this user only, and PATH.lock lies beside it. One that is
      damaged is renamed to PATH.corrupt, and a new one begun
    - `namespace`: whose entries; the daemon is asked to bust the same
    - `max_bytes`: how large the file may become, about; beyond it what was stored longest ago goes. It counts for what
      this cache stores: let all processes say the same
    - `timeout`: seconds that another process may keep the file locked before what is to be written fails
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen
    - `on_error`: what `get_or_set` does if the file cannot be used: "fill" makes the value and returns it, not cached;
      "raise" raises `SqliteUnavailable`, as all other calls do
    - `breaker`: after how many calls in a row that waited in vain all fail at once, and for how long; None is never. By
      default after three, or after half of at least 20 within 10 seconds, for a second at most, later up to 10

    `store` and `set` also tell False for a value for which `max_bytes` leaves no room.

    One cache may be used in several event loops and threads, and goes on in a forked child. Two threads belong to it
    while it is open: close it at the end, in any of the loops. Raises `ConfigurationError` or `InvalidRequest` for a
    setting.
    """

    _unavailable: ClassVar[type[BustcallError]] = SqliteUnavailable

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        max_bytes: int = 256 << 20,
        timeout: float = 1.0,
        lease: float = 10.0,
        on_error: OnError = "fill",
        breaker: Breaker | None = BREAKER,
    ) -> None:
        super().__init__(lease=lease, on_error=on_error)
        if not max_bytes >= LEAST_ROOM:
            raise ConfigurationError(f"max_bytes must be {LEAST_ROOM} or more, not {max_bytes!r}", setting="max_bytes")
        self._namespace = check_namespace(namespace)
        self._room = max_bytes
        self._file = SqliteFile(path, timeout=timeout)
        where = f"the cache {self._file.path}"
        self._reads = Guards(breaker, where, SqliteUnavailable, _judge)
        self._writes = Guards(breaker, f"{where}, which was locked,", SqliteUnavailable, _judge)
        self._known: Token | None = None

    def __repr__(self) -> str:
        return f"SqliteCache({self._file.path!r}, namespace={self._namespace!r})"

    async def get(self, key: str) -> Found | None:
        """Tell what is held under `key`; None if nothing is. Who is to make a stale entry anew is not asked."""
        return _found(await self._look(check_target(key, "key")))

    async def lookup(self, key: str) -> Looked[Token]:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew."""
        seen = await self._look(check_target(key, "key"))
        entry, found = seen.entry, _found(seen)
        if entry is None or not entry.stale or entry.leased:
            return Looked(found, False, seen.token)
        token = await self._take_lease(entry.id)
        return Looked(found, token is not None, token or seen.token)

    # What is asked of the file

    async def _find(self, wanted: Wanted[bytes]) -> Looked[Token]:
        return await self.lookup(wanted.key)

    async def _close(self) -> None:
        await self._file.aclose()

    async def _look(self, key: str) -> Seen:
        known = self._known

        def work(db: sqlite3.Connection) -> Seen:
            now, since_start = time.time(), time.monotonic()
            return layout.look_up(db, self._namespace, key, known, now=now, since_start=since_start, lease=self._lease)

        while True:
            try:
                seen = await self._reads.call(partial(self._file.read, work))
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
        return await self._writes.call(partial(self._file.write, work, safe=safe, cost=cost))


def _judge(error: BaseException) -> Saying:
    """Tell what an error says of the file."""
    if not isinstance(error, SqliteUnavailable):
        return "nothing"
    return "answered" if error.answered else "silent"


def _found(seen: Seen) -> Found | None:
    return None if seen.entry is None else Found(seen.entry.value, seen.entry.stale)
