"""Who makes a value while others wait for it, and when a server that is silent is no longer asked.

This module decides that for the readers' half of every cache that the package knows, and for near caches. What is
looked up and stored, and where, is decided by the cache itself; when a breaker opens by `policies`.

Theory of operation. Of those readers in one event loop that miss the same key, one flight makes the value. Whoever was
told the same token joins: nothing at all was busted between the flight's beginning and that look-up. Whoever was told a
newer one begins a flight of its own, and the older goes on for those who wait for it. A flight is a task, which belongs
to all of them: it goes on if the one that began it is cancelled, and ends if nobody waits any more.

What makes a value may ask for others, and would wait for ever if one of them waited for its own. A context variable,
which the tasks that it begins inherit, says what it makes, and each value that is being made knows for which others it
waits. So whoever would close a circle is refused. What such a task asks for when its value has been made is no part of
that.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, TypeVar, final
from weakref import WeakKeyDictionary

from pybustcall.errors import ClientClosed, ConfigurationError, InvalidRequest
from pybustcall.models import check_target, redact
from pybustcall.policies import Breaker, BreakerState, Circuit

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BREAKER",
    "Filling",
    "Found",
    "Guard",
    "Make",
    "Wanted",
    "checked_lease",
    "checked_tags",
    "checked_ttl",
    "only_bytes",
]

_T = TypeVar("_T")

Make = Callable[[], Awaitable[_T] | _T]
"""Makes the value of an entry anew."""

BREAKER: Final = Breaker(incidents=3, open=1.0, cap=10.0, proofs=1)
"""When a server that does not answer is no longer asked, unless the cache is told otherwise."""

_MOST_TAGS: Final = 256
_LONGEST: Final = 10.0**9  # seconds


@final
@dataclass(frozen=True, slots=True)
class Found:
    """A value that is held. `stale`: it was busted softly, and somebody is to make it anew."""

    value: bytes
    stale: bool


@final
@dataclass(frozen=True, slots=True)
class Wanted(Generic[_T]):
    """An entry to be made, and how it is to be stored."""

    key: str
    make: Make[_T]
    tags: tuple[str, ...]
    ttl: float | None


# Making values


@final
@dataclass(eq=False, slots=True)
class _Making:
    """A value that is being made: for whose sake, and which others it waits for."""

    filling: object
    key: str
    outer: _Making | None
    inner: list[_Making] = field(default_factory=list)
    is_over: bool = False

    def waits_for(self, other: _Making) -> bool:
        """Tell whether it is the other one, or waits for it by way of others."""
        left, seen = [self], {self}
        while left:
            if (it := left.pop()) is other:
                return True
            new = [inner for inner in it.inner if inner not in seen and not inner.is_over]
            seen.update(new)
            left += new
        return False


_MAKING: ContextVar[_Making | None] = ContextVar("_MAKING", default=None)


@final
class _Flight(Generic[_T]):
    """A value that is being made, and how many wait for it."""

    def __init__(self, token: object, task: asyncio.Task[_T], making: _Making) -> None:
        self.token = token
        self.task = task
        self.making = making
        self.waiting = 0


_Flights = dict[str, _Flight[_T]]


@final
class Filling(Generic[_T]):
    """Has the values of one cache made, each once at a time, in each event loop that it is used in.

    `check` raises for a value that cannot be one.
    """

    def __init__(self, check: Callable[[_T], None]) -> None:
        self._check = check
        self._flights: WeakKeyDictionary[asyncio.AbstractEventLoop, _Flights[_T]] = WeakKeyDictionary()
        self._tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, set[asyncio.Task[_T]]] = WeakKeyDictionary()

    async def aclose(self) -> None:
        """Break off what is being made in the running loop: whoever waits for it gets `ClientClosed`."""
        loop = asyncio.get_running_loop()
        self._flights.pop(loop, None)
        if tasks := self._tasks.pop(loop, None):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    @property
    def is_making(self) -> bool:
        """Whether this task makes a value, of whatever cache. What it makes must not be made of stale ones."""
        return _current() is not None

    def check(self, key: str) -> None:
        """Raise `RuntimeError` if `key` is asked for by what makes it. Before it is looked up."""
        outer = _current()
        while outer is not None and not outer.is_over:
            if outer.key == key and outer.filling is self:
                raise _circle(key)
            outer = outer.outer

    async def alone(self, wanted: Wanted[_T]) -> _T:
        """Make a value for this call only, and store it nowhere. Raises as `together` does."""
        with _waiting_for(making := _Making(self, wanted.key, _current())):
            return await self._made(wanted.make, making)

    async def together(
        self, wanted: Wanted[_T], token: object, store: Callable[[Wanted[_T], _T], Awaitable[object]]
    ) -> _T:
        """Make a value and have it stored, or wait for whoever does, if they were told the same token.

        Raises what `make` or `store` raises, `RuntimeError` if the value would be made of itself, and `ClientClosed`
        if it was broken off.
        """
        flights = self._flights.setdefault(asyncio.get_running_loop(), {})
        flight = flights.get(wanted.key)
        if flight is None or flight.token != token:
            flight = self._take_off(wanted, token, store, flights)
        with _waiting_for(flight.making):
            return await _wait(flight, wanted.key, flights)

    def _take_off(
        self,
        wanted: Wanted[_T],
        token: object,
        store: Callable[[Wanted[_T], _T], Awaitable[object]],
        flights: _Flights[_T],
    ) -> _Flight[_T]:
        making = _Making(self, wanted.key, _current())

        async def fill() -> _T:
            value = await self._made(wanted.make, making)
            await store(wanted, value)
            return value

        loop = asyncio.get_running_loop()
        task = loop.create_task(fill())
        flight = flights[wanted.key] = _Flight(token, task, making)
        tasks = self._tasks.setdefault(loop, set())
        tasks.add(task)

        def land(task: asyncio.Task[_T]) -> None:
            tasks.discard(task)
            _leave(flight, wanted.key, flights)
            if not task.cancelled():
                task.exception()  # it is told to whoever waits, and may be nobody any more

        task.add_done_callback(land)
        return flight

    async def _made(self, make: Make[_T], making: _Making) -> _T:
        before = _MAKING.set(making)
        try:
            made = make()
            value = await made if inspect.isawaitable(made) else made
        finally:
            making.is_over = True
            _MAKING.reset(before)
        self._check(value)
        return value


async def _wait(flight: _Flight[_T], key: str, flights: _Flights[_T]) -> _T:
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


def _leave(flight: _Flight[_T], key: str, flights: _Flights[_T]) -> None:
    """Let nobody join any more."""
    if flights.get(key) is flight:
        del flights[key]


def _current() -> _Making | None:
    """Tell which value this task makes, or helps to make."""
    making = _MAKING.get()
    return None if making is None or making.is_over else making


@contextmanager
def _waiting_for(making: _Making) -> Iterator[None]:
    """Note that what this task makes waits for that; raise `RuntimeError` if that waits for this, too."""
    current = _current()
    if current is None:
        yield
        return
    if making.waits_for(current):
        raise _circle(making.key)
    current.inner.append(making)
    try:
        yield
    finally:
        current.inner.remove(making)


def _circle(key: str) -> RuntimeError:
    return RuntimeError(
        f"the entry {redact(key)} cannot be made of itself: what makes it asks the same cache for it, if only by way of"
        " others, and would wait for ever"
    )


def only_bytes(value: object) -> None:
    """Raise `TypeError` if a value is no bytes."""
    if not isinstance(value, bytes):
        raise TypeError(f"what makes a value must return bytes, not {type(value).__name__}")


# Asking a server


@final
class Guard:
    """Lets calls of one event loop through to a server, or none, or one that tries.

    What was begun before the breaker opened last counts no more when it ends: it may have waited long, and says nothing
    of the server as it is now. `refuse` makes the error of a call that is not let through, of a text.
    """

    def __init__(self, policy: Breaker | None, where: str, refuse: Callable[[str], Exception]) -> None:
        self._circuit = Circuit(policy)
        self._where = where
        self._refuse = refuse
        self._silent = 0
        self._opened = -math.inf

    def begin(self, now: float) -> bool:
        """Take in that a call begins; tell whether it is the one that tries. Raises what `refuse` made if none may."""
        if not self._circuit.admits(now, vouched=True):
            rest = self._circuit.until - now
            again = f"in {rest:.1f} s" if rest > 0 else "by another call just now"
            raise self._refuse(f"{self._where} has not answered, and is tried again {again}; nothing was sent")
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


# What is asked for


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tell the tags, each once. Raises `InvalidRequest` for what cannot be."""
    if isinstance(tags, str):
        raise InvalidRequest("tags must be several texts, such as a list, not one; nothing was sent", field="tags")
    checked = tuple(dict.fromkeys(check_target(tag, "tag") for tag in tags))
    if len(checked) > _MOST_TAGS:
        raise InvalidRequest(f"an entry has at most {_MOST_TAGS} tags; nothing was sent", field="tags")
    return checked


def checked_ttl(ttl: object) -> float | None:
    """Tell a lifetime in seconds; None is for ever. Raises `InvalidRequest` for what cannot be."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= _LONGEST:
        raise InvalidRequest(
            f"ttl must be more than 0 seconds and at most {_LONGEST:g}, or None, not {ttl!r}; nothing was sent",
            field="ttl",
        )
    return float(ttl)


def checked_lease(lease: float) -> float:
    """Tell for how many seconds one reader is to make an entry anew. Raises `ConfigurationError`."""
    if not 0 < lease <= _LONGEST:
        raise ConfigurationError(f"lease must be more than 0 seconds, not {lease!r}", setting="lease")
    return lease
