"""Connections to one Redis server: a pool for each event loop, a limit for each call, one kind of error.

This module decides how a script gets to the server and its answer back. What scripts do is said by `redis_layout`. It
needs the extra "redis".

Theory of operation. Of redis-py its client and its pool are used, and neither its timeouts of single reads and writes
nor its retries. One limit lies over the whole of a call, the wait for a connection included: what is cut off by it, or
by its caller, leaves redis-py at a moment where that closes the connection, so that no answer is left unread on one
that somebody else gets. A limit to each write would not do: `asyncio.wait_for` of Python 3.11 can lose a cancellation.
Who repeats a call is decided by those who made it.

redis-py's pool refuses where all connections are taken. So a semaphore in front of it lets callers wait, which is
released without waiting, even by a call that is cancelled twice. Those who were given one client, or clients of one
pool, have one semaphore more in common. Who waits for a connection till the limit is over, or is refused by a pool that
others have emptied, has sent nothing, and learnt nothing of the server.

Connections belong to the event loop in which they were opened. They are closed by `aclose`, or, if the loop ends first,
with the loop: an asynchronous generator stands guard, which `asyncio.run` closes before it closes the loop. After a
fork the child keeps what it inherited, untouched, and opens its own.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, final
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary, WeakSet

from pybustcall.errors import BustcallError, ConfigurationError

try:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.client import NEVER_DECODE
    from redis.exceptions import (
        AskError,
        AuthenticationError,
        BusyLoadingError,
        ClusterCrossSlotError,
        MaxConnectionsError,
        NoScriptError,
        RedisError,
        ResponseError,
    )
    from redis.exceptions import TimeoutError as RedisTimeout
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "Redis needs an extra; install it with: pip install 'pybustcall[redis]'", name=missing.name
    ) from missing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from contextlib import AbstractAsyncContextManager

    from redis.asyncio import ConnectionPool

    from pybustcall.errors import Applied
    from pybustcall.redis_layout import Call

__all__ = ["RedisServer", "RedisUnavailable", "check_url", "shown_url"]

_SHARED: Final = 50  # connections of a given client that all who were given it use at most

# Answers that say something of one command, and nothing of the server. All others do, such as LOADING and OOM.
_OF_THE_COMMAND: Final = frozenset({"ERR", "WRONGTYPE", "EXECABORT"})


class RedisUnavailable(BustcallError):
    """Redis did not do what it was asked, and whether it was done is unknown, unless `applied` is "no".

    - `whole`: the server as a whole cannot be used now; otherwise it refused this one command
    - `answered`: it said so itself, and did not keep anybody waiting. Where it did not, and `applied` is "no", nothing
      was sent: that says nothing of the server

    The text names the server without credentials.
    """

    def __init__(self, message: str, *, whole: bool = True, answered: bool = False, applied: Applied = "maybe") -> None:
        super().__init__(message, applied=applied)
        self.whole = whole
        self.answered = answered


@final
class _LoopState:
    """What belongs to one event loop."""

    def __init__(self, client: Redis, most: int, shared: AbstractAsyncContextManager[None]) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(most)
        self.shared = shared
        self.guard = self._stand_guard()

    async def _stand_guard(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.client.aclose()


@final
class RedisServer:
    """Runs scripts and commands at one server.

    - `url`: redis://HOST:PORT/DB, rediss://... or unix://PATH?db=DB, as redis-py takes it; or None with a `client`
    - `client`: a client of redis-py to use instead; it belongs to one event loop, and is never closed here. All that
      are given it use together at most 50 connections of its pool, and no more than the pool may have
    - `timeout`: seconds that the server has to answer
    - `connect_timeout`: seconds more, where a connection is to be opened first
    - `connections`: how many are open at most, in each event loop; further calls wait

    Raises `ConfigurationError` if a setting cannot be used. Nothing is opened before the first call.
    """

    def __init__(
        self,
        url: str | None,
        *,
        client: Redis | None = None,
        timeout: float = 1.0,
        connect_timeout: float = 1.0,
        connections: int = 50,
    ) -> None:
        for name, value in {"timeout": timeout, "connect_timeout": connect_timeout, "connections": connections}.items():
            if not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {value!r}", setting=name)
        if (url is None) is (client is None):
            raise ConfigurationError("give either the URL of a Redis server or a client of redis-py", setting="url")
        self._url = url
        self._given = client
        self._connect_timeout = connect_timeout
        self._limit = timeout + connect_timeout
        self._most = connections
        self._states: dict[asyncio.AbstractEventLoop, _LoopState] = {}
        self._looked = False
        self.where = "Redis" if url is None else shown_url(url)
        if url is not None:
            check_url(url)
            self._open()
        _SERVERS.add(self)

    def __repr__(self) -> str:
        return f"RedisServer({self.where})"

    async def run(self, call: Call) -> Any:
        """Run a script; tell its answer, of which texts are bytes. Raises `RedisUnavailable`."""
        words = (len(call.keys), *call.keys, *call.arguments)
        with self._translated():
            await self._look_once()
            try:
                return await self._execute("EVALSHA", call.script.digest, *words)
            except NoScriptError:  # the server is a new one
                return await self._execute("EVAL", call.script.source, *words)

    async def execute(self, *command: str | bytes | int) -> Any:
        """Run a command; tell its answer, of which texts are bytes. Raises `RedisUnavailable`."""
        with self._translated():
            await self._look_once()
            return await self._execute(*command)

    async def aclose(self) -> None:
        """Close what was opened in the running loop. It is opened anew by the next call."""
        state = self._states.pop(asyncio.get_running_loop(), None)
        if state is not None:
            await state.guard.aclose()

    async def _look_once(self) -> None:
        """Refuse a node of a cluster: it has a part of the namespaces, and a walk through its keys finds a part."""
        if self._looked:
            return
        try:
            found = await self._execute("INFO", "cluster")
        except ResponseError:
            found = {}  # it may not be told; what lies at another node is refused by the server itself
        if isinstance(found, dict) and found.get("cluster_enabled"):
            raise self._refused_cluster()
        self._looked = True

    def _refused_cluster(self) -> RedisUnavailable:
        return RedisUnavailable(
            f"{self.where} is a node of a cluster, and those are not supported; use a server with cluster-enabled no,"
            " with replicas if it is to be replaced when it fails",
            answered=True,
            applied="no",
        )

    async def _execute(self, *command: str | bytes | int) -> Any:
        state = await self._state()
        task = asyncio.current_task()
        cancelled = task.cancelling() if task else 0
        has_turn = False
        try:
            async with asyncio.timeout(self._limit):
                async with state.slots, state.shared:
                    has_turn = True
                    answer = await state.client.execute_command(  # type: ignore[no-untyped-call]
                        *command, **{NEVER_DECODE: True}
                    )
                if task and task.cancelling() > cancelled:
                    raise asyncio.CancelledError  # it came with the answer, and a client that was given has lost it
                return answer
        except TimeoutError:
            if has_turn:
                raise
            text = f"no connection to {self.where} came free within {self._limit:g} s; nothing was sent"
            raise RedisUnavailable(text, applied="no") from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (TimeoutError, RedisTimeout) as error:
            raise RedisUnavailable(f"{self.where} did not answer within {self._limit:g} s") from error
        except (AskError, ClusterCrossSlotError) as error:
            raise self._refused_cluster() from error
        except MaxConnectionsError as error:
            raise RedisUnavailable(
                f"{self.where}: all connections of the client that was given are in use, by others than caches; give it"
                " more (max_connections); nothing was sent",
                applied="no",
            ) from error
        except (RedisError, OSError) as error:
            text = " ".join(str(error).split())
            code = getattr(error, "status_code", None) or text.partition(" ")[0]
            of_the_command = isinstance(error, ResponseError) and (code in _OF_THE_COMMAND or not code.isupper())
            answered = isinstance(error, ResponseError | BusyLoadingError | AuthenticationError)
            raise RedisUnavailable(f"{self.where}: {text}", whole=not of_the_command, answered=answered) from error

    async def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            for other in [it for it in list(self._states) if it.is_closed()]:
                self._states.pop(other, None)  # another thread may be at the same
            client = self._given or self._open()
            shared = nullcontext() if self._given is None else _shared_slots(client.connection_pool, loop)
            state = self._states[loop] = _LoopState(client, self._most, shared)
            if self._given is None:
                await anext(state.guard)  # never suspends; from here on the loop knows the guard
        return state

    def _open(self) -> Redis:
        try:
            client = Redis.from_url(
                self._url or "",
                socket_timeout=None,
                socket_connect_timeout=self._connect_timeout,
                retry=Retry(NoBackoff(), 0),
                max_connections=self._most,
                protocol=2,  # what each server speaks, without a greeting
            )
            # It opens nothing yet, and refuses options that there are not.
            client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ConfigurationError(f"{self.where} is no URL of a Redis server: {error}", setting="url") from None
        except TypeError:
            raise ConfigurationError(
                f"{self.where} has an option after its ? that redis-py does not know", setting="url"
            ) from None
        return client

    def forget_parent(self) -> None:
        """Begin anew in a forked child: keep what was inherited alive and untouched, for as long as the child lives."""
        _INHERITED.append(self._states)
        self._states = {}


_Slots = WeakKeyDictionary["asyncio.AbstractEventLoop", "asyncio.Semaphore"]
_POOLS: WeakKeyDictionary[ConnectionPool, _Slots] = WeakKeyDictionary()
"""The semaphore of each pool that was given, in each event loop that uses it."""


def _shared_slots(pool: ConnectionPool, loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    return _POOLS.setdefault(pool, _Slots()).setdefault(loop, asyncio.Semaphore(min(_SHARED, pool.max_connections)))


_SERVERS: WeakSet[RedisServer] = WeakSet()
_INHERITED: list[object] = []
"""What a forked child must neither use nor close, nor let the garbage collector close."""


def _after_fork() -> None:
    for server in list(_SERVERS):
        server.forget_parent()


os.register_at_fork(after_in_child=_after_fork)


def check_url(url: str) -> None:
    """Raise `ConfigurationError` for what redis-py would take for another server or database than is meant.

    No text shows any of it, since what is mistyped may have its password anywhere.
    """

    def refuse(why: str) -> ConfigurationError:
        return ConfigurationError(
            f"the URL of the Redis server {why}; expected redis://HOST:PORT/NUMBER, rediss://... or unix:///PATH",
            setting="url",
        )

    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise refuse("cannot be read") from None
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise refuse("begins with neither redis://, rediss:// nor unix://")
    if not url.startswith(f"{parts.scheme}://"):
        raise refuse(f"has no // after {parts.scheme}:")
    if parts.scheme == "unix" and len(parts.path) < 2:
        raise refuse("names no path of a socket")
    if parts.scheme != "unix" and not parts.hostname:
        raise refuse("names no host")
    numbers = [*parse_qs(parts.query).get("db", []), *([parts.path[1:]] if parts.scheme != "unix" else [])]
    if any(number and not (number.isascii() and number.isdigit()) for number in numbers):
        raise refuse("names a database that is no number")


def shown_url(url: str) -> str:
    """Write a server's URL without what opens it: user, password, and options but the number of the database."""
    try:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port is not None else ""
        database = parse_qs(parts.query).get("db", [])
    except ValueError:
        return "the URL"
    number = f"?db={database[0]}" if database else ""
    return f"{parts.scheme}://{host}{port}{parts.path}{number}"
