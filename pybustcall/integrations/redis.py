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

import asyncio
import logging
import math
import secrets
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self, final
from weakref import WeakKeyDictionary

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
from pybustcall.models import DEFAULT_NAMESPACE, check_target, redact
from pybustcall.policies import Breaker
from pybustcall.redis_connection import RedisServer, RedisUnavailable
from pybustcall.redis_layout import DEFAULT_PREFIX, Entry, Layout, Token, check_marks, intruder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from redis.asyncio import Redis

    from pybustcall.redis_layout import Call

__all__ = ["Breaker", "Found", "Looked", "Make", "RedisCache", "RedisUnavailable", "Token"]

_QUIET: Final = 10.0  # seconds between two lines of the log about a server that cannot be used

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
class RedisCache:
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
        on_error: Literal["fill", "raise"] = "fill",
        breaker: Breaker | None = BREAKER,
    ) -> None:
        if on_error not in {"fill", "raise"}:
            raise ConfigurationError(f'on_error must be "fill" or "raise", not {on_error!r}', setting="on_error")
        self._layout = Layout(prefix, namespace)
        self._server = RedisServer(
            url, client=client, timeout=timeout, connect_timeout=connect_timeout, connections=connections
        )
        self._lease = checked_lease(lease)
        self._fills_on_error = on_error == "fill"
        self._breaker = breaker
        self._known: Token | None = None
        self._filling: Filling[bytes] = Filling(only_bytes)
        self._guards: WeakKeyDictionary[asyncio.AbstractEventLoop, Guard] = WeakKeyDictionary()
        self._clock: Callable[[], float] = time.monotonic
        self._told = -math.inf

    def __repr__(self) -> str:
        return f"RedisCache({self._server.where}, namespace={self._layout.namespace!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Break off what is being made in the running loop, and close its connections. Repeating it is harmless.

        Whoever waits for a value gets `ClientClosed`. A call after that opens connections anew.
        """
        try:
            await self._filling.aclose()
        finally:
            await self._server.aclose()

    async def get_or_set(self, key: str, make: Make[bytes], *, tags: Iterable[str] = (), ttl: float | None) -> bytes:
        """Return the value under `key`; if nothing is held, make it, store it and return it.

        - `make`: an async or plain function without arguments that returns bytes; a plain one must not block
        - `tags`: up to 256 texts by which a bust finds the entry
        - `ttl`: seconds until the entry ends by itself; None is never

        If the entry is stale, one reader makes it anew, and all others get the stale value at once, but for those whose
        own `make` asks for it: what is made must not be made of what is stale. Whatever `make` raises is raised here.
        Of several calls at a time with one key, one `make` runs; without Redis each runs its own. `make` may ask for
        other keys, and a task that it begins may. Raises `InvalidRequest`, before anything is made, for arguments that
        cannot be, such as a key with more than 128 of the marks `/:?#`, `RuntimeError` if it would wait for itself,
        since `make` asks for its own key, if only by way of others, and with on_error="raise" `RedisUnavailable`.
        """
        wanted = Wanted(_storable(key), make, checked_tags(tags), checked_ttl(ttl))
        self._filling.check(wanted.key)
        try:
            looked = await self.lookup(key)
        except RedisUnavailable as error:
            self._on_error(error)
            return await self._filling.alone(wanted)
        if looked.found is not None and not looked.refresh and not (looked.found.stale and self._filling.is_making):
            return looked.found.value
        return await self._filling.together(wanted, looked.token, partial(self._fill, looked.token))

    async def get(self, key: str) -> Found | None:
        """Tell what is held under `key`; None if nothing is. Who is to make a stale entry anew is not asked."""
        return (await self._look(key, lease=0.0)).found

    async def lookup(self, key: str) -> Looked:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew."""
        return await self._look(key, lease=self._lease)

    async def store(self, key: str, value: bytes, *, token: Token, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value that was made after `token` was told; tell whether it was, or refused.

        It is refused if the key, a branch that it lies in, one of its tags, or everything was busted since: the value
        may be an old one. It may still be handed to whoever asked before that.
        """
        return await self._store(_storable(key), value, token, checked_tags(tags), checked_ttl(ttl))

    async def set(self, key: str, value: bytes, *, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value whatever was busted; tell whether it was stored.

        For values that are new by themselves, such as what was just written. One that was read somewhere, and took a
        while, may be older than a bust: use `get_or_set`, or `lookup` and `store`.
        """
        return await self._store(_storable(key), value, None, checked_tags(tags), checked_ttl(ttl))

    async def _fill(self, token: Token, wanted: Wanted[bytes], value: bytes) -> None:
        try:
            await self._store(wanted.key, value, token, wanted.tags, wanted.ttl)
        except RedisUnavailable as error:
            self._on_error(error)

    def _on_error(self, error: RedisUnavailable) -> None:
        """Raise it, or log it once in a while."""
        if not self._fills_on_error:
            raise error
        if (now := self._clock()) - self._told >= _QUIET:
            self._told = now
            _log.warning("values are made without a cache: %s", error)

    # What is asked of the server

    async def _look(self, key: str, *, lease: float) -> Looked:
        reply = await self._run(self._layout.lookup(_fresh(), self._known, _checked(key), lease=lease))
        entry = Entry.of(reply)
        found = None if entry is None else Found(entry.value, entry.stale)
        return Looked(found, entry is not None and entry.refresh, Token.of(reply))

    async def _store(
        self, key: str, value: bytes, token: Token | None, tags: tuple[str, ...], ttl: float | None
    ) -> bool:
        if not isinstance(value, bytes):
            raise InvalidRequest(f"value must be bytes, not {type(value).__name__}; nothing was sent", field="value")
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
        guard = self._guard()
        begun = self._clock()
        trial = guard.begin(begun)
        try:
            reply = await self._server.run(call)
        except RedisUnavailable as error:
            if error.answered:
                guard.answered(self._clock(), trial=trial)
            elif error.applied == "no":
                guard.broken_off(trial=trial)
            else:
                guard.silent(begun, self._clock(), trial=trial)
            raise
        except BaseException:
            guard.broken_off(trial=trial)
            raise
        guard.answered(self._clock(), trial=trial)
        self._known = Token.of(reply).newest(self._known)
        return reply

    def _guard(self) -> Guard:
        loop = asyncio.get_running_loop()
        guard = self._guards.get(loop)
        if guard is None:
            guard = self._guards[loop] = Guard(self._breaker, self._server.where, _refuse)
        return guard


def _checked(key: object) -> str:
    return check_target(key, "key")


def _storable(key: object) -> str:
    checked = _checked(key)
    check_marks(checked)
    return checked


def _refuse(why: str) -> RedisUnavailable:
    return RedisUnavailable(why, applied="no")


def _fresh() -> str:
    return secrets.token_hex(8)
