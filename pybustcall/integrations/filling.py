"""Who makes a value while others wait for it.

This module decides that for the readers' caches of every kind. What is looked up and stored, and where, is decided by
the cache itself.

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
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, final
from weakref import WeakKeyDictionary

from pybustcall.errors import ClientClosed
from pybustcall.models import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Filling", "Make", "Wanted"]

_T = TypeVar("_T")

Make = Callable[[], Awaitable[_T] | _T]
"""Makes the value of an entry anew."""


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
