"""The readers' half of a cache in Redis: look up, make, store, so that a bust by the daemon is never undone.

This module decides what a reader does with what it finds in the server. It busts nothing; that is asked of a daemon.
Who makes a value while others wait, and when a server that does not answer is no longer asked, is decided by `filling`,
how entries lie in the server by `redis_layout`. It needs the extra "redis".

Theory of operation. Each look-up tells a token: how far the busts of the namespace had come. A value that is made is
stored with the token from before it was made, and the server refuses it if it was busted since. So however long it
takes to make a value, an old one never replaces what a bust has removed.

A server that keeps everybody waiting is asked no more: after a few calls in a row without an answer all fail at once,
and after a pause one of them tries again, until one is answered. That is for each event loop to find out. Nothing is
held here meanwhile, so nothing old is served, and what is made is not stored. A server that says no, being full or not
yet loaded, keeps nobody waiting, and goes on being asked.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from pybustcall.integrations.filling import Make
from pybustcall.integrations.guard import BREAKER, Guards, Saying
from pybustcall.integrations.reading import Found, Looked, OnError, ReadersCache
from pybustcall.models import DEFAULT_NAMESPACE, check_target, redact
from pybustcall.policies import Breaker
from pybustcall.redis_connection import RedisServer, RedisUnavailable
from pybustcall.redis_layout import DEFAULT_PREFIX, Entry, Layout, Token, intruder

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from pybustcall.errors import BustcallError
    from pybustcall.integrations.filling import Wanted
    from pybustcall.redis_layout import Call

__all__ = ["Breaker", "Found", "Looked", "Make", "RedisCache", "RedisUnavailable", "Token"]


@final
class RedisCache(ReadersCache[Token]):
    """A namespace of entries in Redis, each of them bytes under a key, with tags and a lifetime.

    ```python
    cache = RedisCache("redis://127.0.0.1:6379/0", namespace="shop")
    page = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=300.0)
    ```

    - `url`: redis://HOST:PORT/DB, rediss://... or unix://PATH?db=DB
    - `client`: a `redis.asyncio.Redis` to use instead; it is never closed here, and belongs to its own event loop. All
      caches of one client use together at most 50 connections of its pool, and no more than the pool may have
    - `namespace`: whose entries; the daemon is asked to bust the same
    - `prefix`: what the names of all keys in Redis begin with, as in the daemon's settings
    - `timeout`: seconds that the server has to answer; `connect_timeout`: more, to open a connection
    - `connections`: how many are open at most, in each event loop; further calls wait
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen
    - `on_error`: what `get_or_set` does if Redis cannot be used: "fill" makes the value and returns it, not cached;
      "raise" raises `RedisUnavailable`, as all other calls do
    - `breaker`: after how many calls without an answer that is so at once, and for how long; None is never. By default
      after three in a row, or after half of at least 20 within 10 seconds, for a second at most, later up to 10. Each
      call counts, also of those that wait at the same time. What your callers cancel before the timeouts are over does
      not: let these be shorter than what callers wait

    One cache may be used in several event loops, each of which has connections of its own. `aclose` closes those of the
    running loop; `asyncio.run` does so at its end. Raises `ConfigurationError` or `InvalidRequest` for a setting.
    """

    _unavailable: ClassVar[type[BustcallError]] = RedisUnavailable

    def __init__(
        self,
        url: str | None = None,
        *,
        client: Redis | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        prefix: str = DEFAULT_PREFIX,
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        connections: int = 50,
        lease: float = 10.0,
        on_error: OnError = "fill",
        breaker: Breaker | None = BREAKER,
    ) -> None:
        super().__init__(lease=lease, on_error=on_error)
        self._layout = Layout(prefix, namespace)
        self._server = RedisServer(
            url, client=client, timeout=timeout, connect_timeout=connect_timeout, connections=connections
        )
        self._guards = Guards(breaker, self._server.where, _refuse, _judge)
        self._known: Token | None = None

    def __repr__(self) -> str:
        return f"RedisCache({self._server.where}, namespace={self._layout.namespace!r})"

    async def get(self, key: str) -> Found | None:
        """Tell what is held under `key`; None if nothing is. Who is to make a stale entry anew is not asked."""
        return (await self._look(key, lease=0.0)).found

    async def lookup(self, key: str) -> Looked[Token]:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew."""
        return await self._look(key, lease=self._lease)

    # What is asked of the server

    async def _find(self, wanted: Wanted[bytes]) -> Looked[Token]:
        return await self.lookup(wanted.key)

    async def _close(self) -> None:
        await self._server.aclose()

    async def _look(self, key: str, *, lease: float) -> Looked[Token]:
        checked = check_target(key, "key")
        reply = await self._run(self._layout.lookup(_fresh(), self._known, checked, lease=lease))
        entry = Entry.of(reply)
        found = None if entry is None else Found(entry.value, entry.stale)
        return Looked(found, entry is not None and entry.refresh, Token.of(reply))

    async def _store(
        self, key: str, value: bytes, token: Token | None, tags: tuple[str, ...], ttl: float | None
    ) -> bool:
        call = self._layout.store(_fresh(), self._known, key, value, tags=tags, ttl=ttl, token=token)
        reply = await self._run(call)
        if (found := intruder(reply)) is not None:
            raise RedisUnavailable(
                f"{self._server.where}: where the entry {redact(key)} of {self._layout.namespace} would lie, there is a"
                f" {found} that is none of ours; nothing was stored; remove it, or choose another prefix",
                whole=False,
                answered=True,
                applied="no",
            )
        return bool(reply[2])

    async def _run(self, call: Call) -> Any:
        reply = await self._guards.call(partial(self._server.run, call))
        self._known = Token.of(reply).newest(self._known)
        return reply


def _judge(error: BaseException) -> Saying:
    """Tell what an error says of the server: one of which nothing was sent says nothing."""
    if not isinstance(error, RedisUnavailable):
        return "nothing"
    return "answered" if error.answered else "nothing" if error.applied == "no" else "silent"


def _refuse(why: str) -> RedisUnavailable:
    return RedisUnavailable(why, applied="no")


def _fresh() -> str:
    return secrets.token_hex(8)
