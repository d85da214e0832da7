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

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, final

from pybustcall import memcached_layout as layout
from pybustcall.errors import InvalidRequest
from pybustcall.integrations.filling import Make
from pybustcall.integrations.guard import BREAKER, Guards, Saying
from pybustcall.integrations.reading import Found, Looked, OnError, ReadersCache, checked_tags
from pybustcall.keys import check_marks
from pybustcall.memcached_connection import MemcachedServer, MemcachedUnavailable
from pybustcall.memcached_layout import DEFAULT_PREFIX, LEAST_LEASE, LONGEST_TTL, Entry, Layout, Token
from pybustcall.models import DEFAULT_NAMESPACE, check_target, redact
from pybustcall.policies import Breaker

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pybustcall.errors import BustcallError
    from pybustcall.integrations.filling import Wanted
    from pybustcall.memcached_layout import Answer, Command

__all__ = ["Breaker", "Found", "Looked", "Make", "MemcachedCache", "MemcachedUnavailable", "Token"]

_TRIES: Final = 5  # to make a generation that somebody busts, or the server evicts, again and again


@final
class MemcachedCache(ReadersCache[Token]):
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
    - `lease`: seconds that the one reader who makes a stale entry anew has for it, before another is chosen; 2 or more,
      rounded up to whole ones
    - `on_error`: what `get_or_set` does if memcached cannot be used, or the value is too large for it: "fill" makes the
      value and returns it, not cached; "raise" raises `MemcachedUnavailable`, as all other calls do
    - `breaker`: after how many calls without an answer that is so at once, and for how long; None is never. By default
      after three in a row, or after half of at least 20 within 10 seconds, for a second at most, later up to 10. Each
      call counts, also of those that wait at the same time. What your callers cancel before the timeouts are over does
      not: let these be shorter than what callers wait

    `store` also refuses where another value was stored meanwhile, or after an hour. A `ttl` is rounded up to whole
    seconds; more than 30 days is refused. Without one the entry is there until the server needs the room.

    One cache may be used in several event loops, each of which has connections of its own. `aclose` closes those of the
    running loop; `asyncio.run` does so at its end. Raises `ConfigurationError` or `InvalidRequest` for a setting.
    """

    _unavailable: ClassVar[type[BustcallError]] = MemcachedUnavailable
    _least_lease: ClassVar[float] = LEAST_LEASE
    _longest: ClassVar[float] = LONGEST_TTL

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
        on_error: OnError = "fill",
        breaker: Breaker | None = BREAKER,
    ) -> None:
        super().__init__(lease=lease, on_error=on_error)
        self._layout = Layout(prefix, namespace)
        self._server = MemcachedServer(url, timeout=timeout, connect_timeout=connect_timeout, connections=connections)
        self._guards = Guards(breaker, self._server.where, _refuse, _judge)

    def __repr__(self) -> str:
        return f"MemcachedCache({self._server.where}, namespace={self._layout.namespace!r})"

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

    async def lookup(self, key: str, *, tags: Iterable[str] = ()) -> Looked[Token]:
        """Tell what is held under `key`, and a token for `store`. If `refresh` is true, make the value anew.

        - `tags`: those that the value will have, as far as they are known: of others, `store` cannot tell which of them
          were busted meanwhile, and refuses the value if any tag of the namespace was
        """
        known = checked_tags(tags)
        if _has_too_many_marks(key):
            return Looked(None, False, Token(0, ()))
        names = self._layout.covering(key, known)
        return await self._look(key, (*names, self._layout.sequence))

    # What is asked of the server

    async def _find(self, wanted: Wanted[bytes]) -> Looked[Token]:
        return await self._look(wanted.key, self._layout.covering(wanted.key, wanted.tags))

    async def _close(self) -> None:
        await self._server.aclose()

    async def _look(self, key: str, names: Sequence[bytes]) -> Looked[Token]:
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

    async def _store(
        self, key: str, value: bytes, token: Token | None, tags: tuple[str, ...], ttl: float | None
    ) -> bool:
        names = self._layout.covering(key, tags)
        if token is None:
            made = await self._made(names, await self._read(names))
            return await self._put(key, value, tags, [made[name] for name in names], ttl=ttl, cas=None)
        known = dict(token.generations)
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
        return await self._guards.call(partial(self._server.run, commands))


def _judge(error: BaseException) -> Saying:
    """Tell what an error says of the server: where it was not asked, nothing."""
    if not isinstance(error, MemcachedUnavailable):
        return "nothing"
    return "answered" if error.answered else "silent" if error.asked else "nothing"


def _has_too_many_marks(key: object) -> bool:
    """Tell whether nothing can be stored under a key, and so nothing is held; raise `InvalidRequest` if it is none."""
    checked = check_target(key, "key")
    try:
        check_marks(checked)
    except InvalidRequest:
        return True
    return False


def _refuse(why: str) -> MemcachedUnavailable:
    return MemcachedUnavailable(why, asked=False, applied="no")
