"""The readers' half of a cache in memcached: look up, make, store, so that a bust by the daemon is never undone.

This module decides what a reader does with what it finds in the server. It busts nothing; that is asked of a daemon.
Who makes a value while others wait, and when a server that does not answer is no longer asked, is decided by `filling`,
how entries lie in the server by `memcached_layout`. It needs nothing but Python.

Theory of operation. A look-up asks for the entry and, in the same breath, for the generations that cover it; those of
tags that only the entry tells of need a second one. What is missing of the generations is made anew, so that whatever
was stored before is dead. A look-up tells a token: these generations, and the CAS number of what lies in the entry's
place. A value that is made is stored with the token from before it was made: if a generation is another one by now, it
is refused here, and if the entry itself was busted or stored meanwhile, by the server. A bust that comes between the
two does no harm, for what is stored says under which generations it was made.

A server that keeps everybody waiting is asked no more: after a few calls in a row without an answer all fail at once,
and after a pause one of them tries again, until one is answered. That is for each event loop to find out. Nothing is
held here meanwhile, so nothing old is served, and what is made is not stored. A server that says no keeps nobody
waiting, and goes on being asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Self, final
from weakref import WeakKeyDictionary

from pybustcall import memcached_layout as layout
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
from pybustcall.memcached_connection import MemcachedServer, MemcachedUnavailable
from pybustcall.memcached_layout import DEFAULT_PREFIX, Layout, Token
from pybustcall.models import DEFAULT_NAMESPACE, check_target, redact
from pybustcall.policies import Breaker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from pybustcall.memcached_layout import Answer, Command, Entry

__all__ = ["Breaker", "Found", "Looked", "Make", "MemcachedCache", "MemcachedUnavailable", "Token"]

_QUIET: Final = 10.0  # seconds between two lines of the log about a server that cannot be used
_TRIES: Final = 5  # to make a generation that somebody busts, or the server evicts, again and again

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
class MemcachedCache:
    """A namespace of entries in memcached, each of them bytes under a key, with tags and a lifetime.

    ```python
    cache = MemcachedCache("memcached://127.0.0.1:11211", namespace="shop")
    page = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=300.0)
    ```

    - `url`: memcached://HOST, memcached://HOST:PORT or unix:///PATH: one server, 1.6.10 or later, run with CAS (not -C)
    - `namespace`: whose entries; the daemon is asked to bust the same
    - `prefix`: what the names of all items begin with, as in the daemon's settings
    - `timeout`: seconds that the server has to answer; `connect_timeout`: more, to open a connection
    - `connections`: how many are open at most, in each event loop; further calls wait
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen; whole
      ones, 2 or more
    - `on_error`: what `get_or_set` does if memcached cannot be used, or the value is too large for it: "fill" makes the
      value and returns it, not cached; "raise" raises `MemcachedUnavailable`, as all other calls do
    - `breaker`: after how many calls without an answer that is so at once, and for how long; None is never. By default
      after three in a row, or after half of at least 20 within 10 seconds, for a second at most, later up to 10. Each
      call counts, also of those that wait at the same time. What your callers cancel before the timeouts are over does
      not: let these be shorter than what callers wait

    One cache may be used in several event loops, each of which has connections of its own. `aclose` closes those of the
    running loop; `asyncio.run` does so at its end. Raises `ConfigurationError` or `InvalidRequest` for a setting.
    """

    def __init__(
        self,
        url: str,
        *,
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
        self._server = MemcachedServer(url, timeout=timeout, connect_timeout=connect_timeout, connections=connections)
        self._lease = checked_lease(lease)
        self._fills_on_error = on_error == "fill"
        self._breaker = breaker
        self._filling: Filling[bytes] = Filling(only_bytes)
        self._guards: WeakKeyDictionary[asyncio.AbstractEventLoop, Guard] = WeakKeyDictionary()
        self._clock: Callable[[], float] = time.monotonic
        self._told = -math.inf

    def __repr__(self) -> str:
        return f"MemcachedCache({self._server.where}, namespace={self._layout.namespace!r})"

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
        - `ttl`: seconds until the entry ends by itself, rounded up to whole ones, and 30 days at most; None is until
          the server needs the room

        If the entry is stale, one reader makes it anew, and all others get the stale value at once, but for those whose
        own `make` asks for it: what is made must not be made of what is stale. Whatever `make` raises is raised here.
        Of several calls at a time with one key, one `make` runs; without memcached each runs its own. `make` may ask
        for other keys, and a task that it begins may. Raises `InvalidRequest`, before anything is made, for arguments
        that cannot be, such as a key with more than 128 of the marks `/:?#`, `RuntimeError` if it would wait for
        itself, since `make` asks for its own key, if only by way of others, and with on_error="raise"
        `MemcachedUnavailable`.
        """
        wanted = Wanted(_storable(key), make, checked_tags(tags), checked_ttl(ttl))
        self._filling.check(wanted.key)
        try:
            looked = await self._look(wanted.key, self._layout.covering(wanted.key, wanted.tags))
        except MemcachedUnavailable as error:
            self._on_error(error)
            return await self._filling.alone(wanted)
        if looked.found is not None and not looked.refresh and not (looked.found.stale and self._filling.is_making):
            return looked.found.value
        return await self._filling.together(wanted, looked.token, partial(self._fill, looked.token))

    async def get(self, key: str) -> Found | None:
        """Tell what is held under `key`; None if nothing is. Who is to make a stale entry anew is not asked."""
        if _has_too_many_marks(key):
            return None
        names = self._layout.covering(key)
        first, *others = await self._run([layout.read(self._layout.entry(key)), *map(layout.read, names)])
        if (entry := self._layout.unpack(key, first)) is None:
            return None
        held = dict(zip(names, map(layout.generation_of, others), strict=True))
        found, _ = await self._judge(key, entry, held)
        return found

    async def lookup(self, key: str, *, tags: Iterable[str] = ()) -> Looked:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew.

        - `tags`: those that the value will have, as far as they are known: of others, `store` cannot tell which of them
          were busted meanwhile, and refuses the value if any tag of the namespace was
        """
        known = checked_tags(tags)
        if _has_too_many_marks(key):
            return Looked(None, False, Token(0, ()))
        names = self._layout.covering(key, known)
        return await self._look(key, (*names, self._layout.sequence))

    async def store(self, key: str, value: bytes, *, token: Token, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value that was made after `token` was told; tell whether it was, or refused.

        It is refused if the key, a branch that it lies in, one of its tags, or everything was busted since: the value
        may be an old one. It may still be handed to whoever asked before that. It is also refused if another one was
        stored meanwhile, or if it took more than an hour to make.
        """
        _check_value(value)
        return await self._store(_storable(key), value, token, checked_tags(tags), checked_ttl(ttl))

    async def set(self, key: str, value: bytes, *, tags: Iterable[str] = (), ttl: float | None) -> bool:
        """Store a value whatever was busted; tell that it was stored.

        For values that are new by themselves, such as what was just written. One that was read somewhere, and took a
        while, may be older than a bust: use `get_or_set`, or `lookup` and `store`.
        """
        _check_value(value)
        names = self._layout.covering(_storable(key), bear := checked_tags(tags))
        lifetime = checked_ttl(ttl)
        held = await self._made(names, await self._read(names))
        return await self._put(key, value, bear, [held[name] for name in names], ttl=lifetime, cas=None)

    async def _fill(self, token: Token, wanted: Wanted[bytes], value: bytes) -> None:
        try:
            await self._store(wanted.key, value, token, wanted.tags, wanted.ttl)
        except MemcachedUnavailable as error:
            self._on_error(error)

    def _on_error(self, error: MemcachedUnavailable) -> None:
        """Raise it, or log it once in a while."""
        if not self._fills_on_error:
            raise error
        if (now := self._clock()) - self._told >= _QUIET:
            self._told = now
            _log.warning("values are made without a cache: %s", error)

    # What is asked of the server

    async def _look(self, key: str, names: Sequence[bytes]) -> Looked:
        """Look an entry up, and the generations of these names; make those that are missing."""
        first, *others = await self._run([layout.reserve(self._layout.entry(key)), *map(layout.read, names)])
        if not first.cas:
            raise self._failed("it was started without CAS (-C), by which late fills are refused; start it without -C")
        held = dict(zip(names, map(layout.generation_of, others), strict=True))
        token = Token(first.cas, tuple((await self._made(names, dict(held))).items()))
        entry = self._layout.unpack(key, first)
        if entry is None:
            return Looked(None, False, token)
        found, covering = await self._judge(key, entry, held)
        refresh = False
        if found is not None and found.stale:
            lease = self._layout.lease(key, first.cas, covering)
            (taken,) = await self._run([layout.take(lease, self._lease)])
            refresh = taken.done
        return Looked(found, refresh, token)

    async def _judge(self, key: str, entry: Entry, held: dict[bytes, bytes | None]) -> tuple[Found | None, list[bytes]]:
        """Tell what an entry is to a reader, and the generations that cover it; ask for those that are not `held`."""
        names = self._layout.covering(key, entry.tags)
        held |= await self._read([name for name in names if name not in held])
        covering = [held[name] for name in names]
        freshness = layout.judge(entry, covering)
        if freshness == "dead":
            return None, []
        return Found(entry.value, freshness == "stale"), [it for it in covering if it is not None]

    async def _read(self, names: Sequence[bytes]) -> dict[bytes, bytes | None]:
        """Tell generations, None of those that are missing; the last one was read last."""
        answers = await self._run([layout.read(name) for name in names]) if names else []
        return dict(zip(names, map(layout.generation_of, answers), strict=True))

    async def _made(self, names: Sequence[bytes], held: dict[bytes, bytes | None]) -> dict[bytes, bytes]:
        """Tell these generations, all of them; make those that are missing."""
        for _ in range(_TRIES):
            missing = [name for name in names if held[name] is None]
            if not missing:
                return {name: it for name, it in held.items() if it is not None}
            commands = [command for name in missing for command in (layout.add(name), layout.read(name))]
            answers = await self._run(commands)
            held |= dict(zip(missing, map(layout.generation_of, answers[1::2]), strict=True))
        raise self._failed(
            "it does not keep what it has just stored: it needs more memory (-m), or others use its names"
        )

    async def _store(self, key: str, value: bytes, token: Token, tags: tuple[str, ...], ttl: float | None) -> bool:
        known = dict(token.generations)
        names = self._layout.covering(key, tags)
        unknown = [name for name in names if name not in known]
        sequence = [self._layout.sequence] if unknown else []
        # A bust of a tag changes the sequence first. So if it is the same after these were read, they are from before.
        held = await self._read([*names, *sequence])
        if None in (held[name] for name in unknown):
            held |= await self._made(unknown, held)
            held |= await self._read(sequence)
        if any(held[name] != known.get(name, b"") for name in (*names, *sequence) if name not in unknown):
            return False
        generations = [it for name in names if (it := held[name]) is not None]
        return await self._put(key, value, tags, generations, ttl=ttl, cas=token.cas)

    async def _put(
        self,
        key: str,
        value: bytes,
        tags: tuple[str, ...],
        generations: Sequence[bytes],
        *,
        ttl: float | None,
        cas: int | None,
    ) -> bool:
        packed = self._layout.pack(key, value, tags, generations)
        try:
            (answer,) = await self._run([layout.store(self._layout.entry(key), packed, ttl=ttl, cas=cas)])
        except MemcachedUnavailable as error:
            if not error.too_large:
                raise
            raise self._failed(
                f"the entry {redact(key)} of {self._layout.namespace} has {len(packed)} bytes, which is more than it"
                " takes (-I, 1 MB unless it is told otherwise); nothing was stored",
                whole=False,
                too_large=True,
            ) from error
        return answer.done

    def _failed(self, text: str, *, whole: bool = True, too_large: bool = False) -> MemcachedUnavailable:
        return MemcachedUnavailable(
            f"{self._server.where}: {text}", whole=whole, answered=True, too_large=too_large, applied="no"
        )

    async def _run(self, commands: Sequence[Command]) -> list[Answer]:
        guard = self._guard()
        begun = self._clock()
        trial = guard.begin(begun)
        try:
            answers = await self._server.run(commands)
        except MemcachedUnavailable as error:
            if error.answered:
                guard.answered(self._clock(), trial=trial)
            elif not error.asked:
                guard.broken_off(trial=trial)
            else:
                guard.silent(begun, self._clock(), trial=trial)
            raise
        except BaseException:
            guard.broken_off(trial=trial)
            raise
        guard.answered(self._clock(), trial=trial)
        return answers

    def _guard(self) -> Guard:
        loop = asyncio.get_running_loop()
        guard = self._guards.get(loop)
        if guard is None:
            guard = self._guards[loop] = Guard(self._breaker, self._server.where, _refuse)
        return guard


def _storable(key: object) -> str:
    checked = check_target(key, "key")
    layout.check_marks(checked)
    return checked


def _has_too_many_marks(key: object) -> bool:
    """Tell whether nothing can be stored under a key, and so nothing is held; raise `InvalidRequest` if it is none."""
    checked = check_target(key, "key")
    try:
        layout.check_marks(checked)
    except InvalidRequest:
        return True
    return False


def _check_value(value: object) -> None:
    if not isinstance(value, bytes):
        raise InvalidRequest(f"value must be bytes, not {type(value).__name__}; nothing was sent", field="value")


def _refuse(why: str) -> MemcachedUnavailable:
    return MemcachedUnavailable(why, asked=False, applied="no")
