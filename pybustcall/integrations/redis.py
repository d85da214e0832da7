"""The readers' half of a cache in Redis: look up, make, store, so that a bust by the daemon is never undone.

This module decides what a reader does with what it finds, who makes a value while others wait, and when a server that
does not answer is no longer asked. It busts nothing; that is asked of a daemon. How entries lie in the server is said
by `redis_layout`, when a breaker opens by `policies`. It needs the extra "redis".

Theory of operation. Each look-up tells a token: how far the busts of the namespace had come. A value that is made is
stored with the token from before it was made, and the server refuses it if it was busted since. So however long it
takes to make a value, an old one never replaces what a bust has removed.

Of those readers in one event loop that miss the same key, one flight makes the value. Whoever was told the same token
joins: nothing at all was busted between the flight's beginning and that look-up. Whoever was told a newer one begins a
flight of its own, and the older goes on for those who wait for it. A flight is a task, which belongs to all of them: it
goes on if the one that began it is cancelled, and ends if nobody waits any more.

A server that keeps everybody waiting is asked no more: after a few calls in a row without an answer all fail at once,
and after a pause one of them tries again, until one is answered. That is for each event loop to find out. Nothing is
held here meanwhile, so nothing old is served, and what is made is not stored. A server that says no, being full or not
yet loaded, keeps nobody waiting, and goes on being asked.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, final
from weakref import WeakKeyDictionary

from pybustcall.errors import ClientClosed, ConfigurationError, InvalidRequest
from pybustcall.models import DEFAULT_NAMESPACE, check_target
from pybustcall.policies import Breaker, BreakerState, Circuit
from pybustcall.redis_connection import RedisServer, RedisUnavailable
from pybustcall.redis_layout import DEFAULT_PREFIX, Entry, Layout, Token, check_marks

if TYPE_CHECKING:
    from types import TracebackType

    from redis.asyncio import Redis

    from pybustcall.redis_layout import Call

__all__ = ["Breaker", "Found", "Looked", "Make", "RedisCache", "RedisUnavailable", "Token"]

Make = Callable[[], Awaitable[bytes] | bytes]
"""Makes the value of an entry anew."""

_MOST_TAGS: Final = 256
_LONGEST: Final = 10.0**9  # seconds
_QUIET: Final = 10.0  # seconds between two lines of the log about a server that cannot be used
_BREAKER: Final = Breaker(incidents=3, open=1.0, cap=10.0, proofs=1)

_log = logging.getLogger("pybustcall.integrations")


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A value that is held. `stale`: it was busted softly, and somebody is to make it anew."""

    value: bytes
    stale: bool


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
class _Flight:
    """A value that is being made, and how many wait for it."""

    def __init__(self, token: Token, task: asyncio.Task[bytes]) -> None:
        self.token = token
        self.task = task
        self.waiting = 0


_Flights = dict[str, _Flight]


@final
class RedisCache:
    """A namespace of entries in Redis, each of them bytes under a key, with tags and a lifetime.

    ```python
    cache = RedisCache("redis://127.0.0.1:6379/0", namespace="shop")
    page = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=300.0)
    ```

    - `url`: redis://HOST:PORT/DB, rediss://... or unix://PATH?db=DB
    - `client`: a `redis.asyncio.Redis` to use instead; it is never closed here, and belongs to its own event loop
    - `namespace`: whose entries; the daemon is asked to bust the same
    - `prefix`: what the names of all keys in Redis begin with, as in the daemon's settings
    - `timeout`: seconds that the server has to answer; `connect_timeout`: more, to open a connection
    - `connections`: how many are open at most, in each event loop; further calls wait
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen
    - `on_error`: what `get_or_set` does if Redis cannot be used: "fill" makes the value and returns it, not cached;
      "raise" raises `RedisUnavailable`, as all other calls do
    - `breaker`: after how many calls without an answer that is so at once, and for how long; None is never. Each call
      counts, also of those that wait at the same time. What your callers cancel before the timeouts are over does not:
      let these be shorter than what callers wait

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
        breaker: Breaker | None = _BREAKER,
    ) -> None:
        if on_error not in {"fill", "raise"}:
            raise ConfigurationError(f'on_error must be "fill" or "raise", not {on_error!r}', setting="on_error")
        if not 0 < lease <= _LONGEST:
            raise ConfigurationError(f"lease must be more than 0 seconds, not {lease!r}", setting="lease")
        self._layout = Layout(prefix, namespace)
        self._server = RedisServer(
            url, client=client, timeout=timeout, connect_timeout=connect_timeout, connections=connections
        )
        self._lease = lease
        self._fills_on_error = on_error == "fill"
        self._breaker = breaker
        self._known: Token | None = None
        self._flights: WeakKeyDictionary[asyncio.AbstractEventLoop, _Flights] = WeakKeyDictionary()
        self._tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, set[asyncio.Task[bytes]]] = WeakKeyDictionary()
        self._guards: WeakKeyDictionary[asyncio.AbstractEventLoop, _Guard] = WeakKeyDictionary()
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
        loop = asyncio.get_running_loop()
        self._flights.pop(loop, None)
        tasks = self._tasks.pop(loop, None)
        try:
            if tasks:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        finally:
            await self._server.aclose()

    async def get_or_set(self, key: str, make: Make, *, tags: Iterable[str] = (), ttl: float | None) -> bytes:
        """Return the value under `key`; if nothing is held, make it, store it and return it.

        - `make`: an async or plain function without arguments that returns bytes; a plain one must not block
        - `tags`: up to 256 texts by which a bust finds the entry
        - `ttl`: seconds until the entry ends by itself; None is never

        If the entry is stale, one reader makes it anew, and all others get the stale value at once. Whatever `make`
        raises is raised here. Of several calls at a time with one key, one `make` runs; without Redis each runs its
        own. Raises `InvalidRequest`, before anything is made, for arguments that cannot be, such as a key with more
        than 128 of the marks `/:?#`, and with on_error="raise" `RedisUnavailable`.
        """
        wanted = _Wanted(_storable(key), make, _checked_tags(tags), _checked_ttl(ttl))
        try:
            looked = await self.lookup(key)
        except RedisUnavailable as error:
            self._on_error(error)
            return await _made(make)
        if looked.found is not None and not looked.refresh:
            return looked.found.value
        flights = self._flights.setdefault(asyncio.get_running_loop(), {})
        flight = flights.get(key)
        if flight is None or flight.token != looked.token:
            flight = self._take_off(wanted, looked.token, flights)
        return await _wait(flight, wanted.key, flights)

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
        return await self._store(_storable(key), value, token, _checked_tags(tags), _checked_ttl(ttl))

    async def set(self, key: str, value: bytes, *, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value whatever was busted; tell whether it was stored.

        For values that are new by themselves, such as what was just written. One that was read somewhere, and took a
        while, may be older than a bust: use `get_or_set`, or `lookup` and `store`.
        """
        return await self._store(_storable(key), value, None, _checked_tags(tags), _checked_ttl(ttl))

    # Flights

    def _take_off(self, wanted: _Wanted, token: Token, flights: _Flights) -> _Flight:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._fill(wanted, token))
        flight = flights[wanted.key] = _Flight(token, task)
        tasks = self._tasks.setdefault(loop, set())
        tasks.add(task)

        def land(task: asyncio.Task[bytes]) -> None:
            tasks.discard(task)
            _leave(flight, wanted.key, flights)
            if not task.cancelled():
                task.exception()  # it is told to whoever waits, and may be nobody any more

        task.add_done_callback(land)
        return flight

    async def _fill(self, wanted: _Wanted, token: Token) -> bytes:
        value = await _made(wanted.make)
        try:
            await self._store(wanted.key, value, token, wanted.tags, wanted.ttl)
        except RedisUnavailable as error:
            self._on_error(error)
        return value

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
        return bool((await self._run(call))[2])

    async def _run(self, call: Call) -> Any:
        guard = self._guard()
        begun = self._clock()
        trial = guard.begin(begun)
        try:
            reply = await self._server.run(call)
        except RedisUnavailable as error:
            if error.answered:
                guard.answered(self._clock(), trial=trial)
            else:
                guard.silent(begun, self._clock(), trial=trial)
            raise
        except BaseException:
            guard.broken_off(trial=trial)
            raise
        guard.answered(self._clock(), trial=trial)
        self._known = Token.of(reply).newest(self._known)
        return reply

    def _guard(self) -> _Guard:
        loop = asyncio.get_running_loop()
        guard = self._guards.get(loop)
        if guard is None:
            guard = self._guards[loop] = _Guard(self._breaker, self._server.where)
        return guard


@final
class _Guard:
    """Lets calls of one event loop through to the server, or none, or one that tries.

    What was begun before the breaker opened last counts no more when it ends: it may have waited long, and says nothing
    of the server as it is now.
    """

    def __init__(self, policy: Breaker | None, where: str) -> None:
        self._circuit = Circuit(policy)
        self._where = where
        self._silent = 0
        self._opened = -math.inf

    def begin(self, now: float) -> bool:
        """Take in that a call begins; tell whether it is the one that tries. Raises `RedisUnavailable` if none may."""
        if not self._circuit.admits(now, vouched=True):
            rest = self._circuit.until - now
            again = f"in {rest:.1f} s" if rest > 0 else "by another call just now"
            raise RedisUnavailable(
                f"{self._where} has not answered, and is tried again {again}; nothing was sent", applied="no"
            )
        return self._circuit.begin()

    def answered(self, now: float, *, trial: bool) -> None:
        """Take in an answer."""
        self._silent = 0
        self._circuit.succeeded(now, trial=trial)

    def silent(self, begun: float, now: float, *, trial: bool) -> None:
        """Take in that a call that began then got no answer."""
        counted = begun > self._opened
        self._silent += counted
        before = self._circuit.state
        self._circuit.failed(now, self._silent, trial=trial, counted=counted, random=random.random)
        if self._circuit.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            self._silent, self._opened = 0, now

    def broken_off(self, *, trial: bool) -> None:
        """Take in that a call ended that says nothing of the server."""
        self._circuit.released(trial=trial)


@final
@dataclass(frozen=True, slots=True)
class _Wanted:
    """An entry to be made."""

    key: str
    make: Make
    tags: tuple[str, ...]
    ttl: float | None


async def _wait(flight: _Flight, key: str, flights: _Flights) -> bytes:
    """Wait for a flight; the last who gives up breaks it off."""
    flight.waiting += 1
    try:
        await asyncio.wait({flight.task})
    finally:
        flight.waiting -= 1
        if not flight.waiting and not flight.task.done():
            _leave(flight, key, flights)
            flight.task.cancel()
            await asyncio.wait({flight.task})
    if flight.task.cancelled():
        raise ClientClosed("the value was not made: the cache was closed meanwhile, or making it was cancelled")
    return flight.task.result()


def _leave(flight: _Flight, key: str, flights: _Flights) -> None:
    """Let nobody join any more."""
    if flights.get(key) is flight:
        del flights[key]


async def _made(make: Make) -> bytes:
    value = make()
    if inspect.isawaitable(value):
        value = await value
    if not isinstance(value, bytes):
        raise TypeError(f"what makes a value must return bytes, not {type(value).__name__}")
    return value


def _checked(key: object) -> str:
    return check_target(key, "key")


def _storable(key: object) -> str:
    checked = _checked(key)
    check_marks(checked)
    return checked


def _checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    if isinstance(tags, str):
        raise InvalidRequest("tags must be several texts, such as a list, not one; nothing was sent", field="tags")
    checked = tuple(dict.fromkeys(check_target(tag, "tag") for tag in tags))
    if len(checked) > _MOST_TAGS:
        raise InvalidRequest(f"an entry has at most {_MOST_TAGS} tags; nothing was sent", field="tags")
    return checked


def _checked_ttl(ttl: object) -> float | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= _LONGEST:
        raise InvalidRequest(
            f"ttl must be more than 0 seconds and at most {_LONGEST:g}, or None, not {ttl!r}; nothing was sent",
            field="ttl",
        )
    return float(ttl)


def _fresh() -> str:
    return secrets.token_hex(8)
