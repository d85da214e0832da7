"""Near caches: values inside of this process, dropped as soon as a daemon tells that they were busted.

This module decides what a near cache holds and when it may serve it, who loads a value while others wait for it, and
which loaded value comes too late to be held. What daemons tell, and how far that can be trusted, is decided by
`events`; what is done for caches that are none of ours by `attached`. docs/explanation/near-caches.md tells why it is
so.

Theory of operation. Every entry that is held was loaded after the last reset, and each daemon has told since then all
that it busted, up to the time until which it is trusted. So a hit needs no more than a look at the clock. While the
daemons are not trusted nothing is served and nothing is stored; what is held may be served again when they have told
what was missed.

A flight loads one value. What is busted while it runs is compared with it, and one that is concerned is refused: its
value is not stored. All who ask are numbered, and so are flights when they begin. Whoever asked before a flight began
takes its value in any case. Whoever asked later, and joined it, takes the value only if it was not refused, and if the
daemons were trusted when it came; else it may be of before a bust that was acknowledged before he asked, and he waits
for a flight that began after that, which is at most one more. So while the daemons are not trusted a key is loaded for
one flight after the other, each for all who asked during the one before.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, final, overload

from pybustcall.errors import ClientClosed, ConfigurationError, InvalidRequest
from pybustcall.events import BustEvent, Concern, Reset, clock, silence
from pybustcall.keys import bases_of, prefixes_of
from pybustcall.models import DEFAULT_NAMESPACE, check_maker, check_namespace, check_target, redact
from pybustcall.policies import check_seconds
from pybustcall.results import failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from pybustcall.events import Feed

__all__ = ["Join", "NearCache", "NearCacheStatistics", "Shelf"]

_COLLECTIONS: Final = (list, tuple, set, frozenset)
_MOST_TAGS: Final = 256
_MOST_MARKS: Final = 64  # prefixes by which one key is found
_LONG: Final = 1024  # characters; keys that have more than that, or more prefixes, are looked through

_log: Final = logging.getLogger("pybustcall")

_T = TypeVar("_T")


# What is held


@final
@dataclass(slots=True)
class _Entry:
    value: Any
    tags: frozenset[str]
    expires: float
    begun: int  # the number of the flight that brought it


@final
class Shelf:
    """Entries in the order of their use, found by key, and by what a bust names. `most`: how many at most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._empty()

    def _empty(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._tagged: dict[str, set[str]] = {}
        self._below: dict[str, set[str]] = {}
        self._variants: dict[str, set[str]] = {}
        self._deep: set[str] = set()  # keys that are long, or have very many segments

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str) -> _Entry | None:
        """Tell the entry, which is the one used last from now on."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def tags(self, key: str) -> frozenset[str]:
        """Tell the tags of the entry; none if none is held."""
        entry = self._entries.get(key)
        return frozenset() if entry is None else entry.tags

    def put(self, key: str, value: object, tags: frozenset[str], expires: float, begun: int = 0) -> int:
        """Hold an entry; tell how many others went for it."""
        self.drop(key)
        self._entries[key] = _Entry(value, tags, expires, begun)
        for table, name in self._places(key, tags):
            table.setdefault(name, set()).add(key)
        if _is_deep(key):
            self._deep.add(key)
        evicted = 0
        while len(self._entries) > self.most:
            evicted += self.drop(next(iter(self._entries)))
        return evicted

    def tag(self, key: str, tags: Iterable[str]) -> None:
        """Have an entry found by further tags."""
        entry = self._entries[key]
        for tag in tags:
            self._tagged.setdefault(tag, set()).add(key)
        entry.tags = entry.tags.union(tags)

    def drop(self, key: str) -> bool:
        """Hold it no more; tell whether it was held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        for table, name in self._places(key, entry.tags):
            keys = table[name]
            keys.discard(key)
            if not keys:
                del table[name]
        self._deep.discard(key)
        return True

    def clear(self) -> int:
        """Hold nothing any more; tell how much it was."""
        count = len(self._entries)
        self._empty()
        return count

    def bust(self, event: BustEvent) -> int:
        """Drop what an event concerns; tell how many entries."""
        if event.kind == "all":
            return self.clear()
        return sum(map(self.drop, self.concerned(event)))

    def concerned(self, event: BustEvent) -> set[str]:
        """List the keys of what is held that an event concerns: `BustEvent.concerns` is true of exactly these."""
        if event.kind == "all":
            return set(self._entries)
        found = {name for name in event.names if name in self._entries}
        if event.is_wide:
            for name in event.names:
                found |= self._variants.get(name, set())
        if event.kind == "tag":
            found |= self._tagged.get(event.target, set())
        elif event.kind == "prefix":
            found |= self._below.get(event.target, set())
            found |= {key for key in self._deep if event.concerns(key)}
        return found

    def _places(self, key: str, tags: frozenset[str]) -> Iterator[tuple[dict[str, set[str]], str]]:
        """List where a key is found beside itself."""
        for tag in tags:
            yield self._tagged, tag
        for base in bases_of(key):
            yield self._variants, base
        if not _is_deep(key):
            for prefix in prefixes_of(key):
                if prefix != key:
                    yield self._below, prefix


def _is_deep(key: str) -> bool:
    return len(key) > _LONG or sum(map(key.count, "/:?#")) > _MOST_MARKS


# Who loads


@final
@dataclass(eq=False, slots=True)
class _Flight:
    """A value that is being loaded.

    - `begun`: its number among all that was asked and begun; `started`: when that was
    - `inner`: the flights that its loader waits for
    - `refused`: something that concerns it was busted since; `is_sound`: it was not, and the daemons were trusted, when
      the value came
    - `waiting`: how many wait for it
    """

    key: str
    tags: set[str]
    begun: int
    started: float
    refused: bool = False
    is_sound: bool = False
    is_over: bool = False
    waiting: int = 0
    task: asyncio.Task[Any] | None = None
    inner: list[_Flight] = field(default_factory=list)

    def waits_for(self, other: _Flight) -> bool:
        """Tell whether it is the other one, or waits for it, by way of others."""
        left, seen = [self], {self}
        while left:
            flight = left.pop()
            if flight is other:
                return True
            new = [inner for inner in flight.inner if inner not in seen and not inner.is_over]
            seen.update(new)
            left += new
        return False


_LOADING: ContextVar[_Flight | None] = ContextVar("pybustcall_loading", default=None)


def _current() -> _Flight | None:
    """Tell which value this task loads, or helps to load."""
    flight = _LOADING.get()
    return None if flight is None or flight.is_over else flight


def _check_circle(flight: _Flight) -> None:
    """Raise `RuntimeError` if a flight waits for what this task loads, which is about to wait for it."""
    current = _current()
    if current is not None and flight.waits_for(current):
        raise RuntimeError(
            f"the entry {redact(flight.key)} cannot be loaded by way of itself: its loader asks the same cache for it,"
            " if only by way of others, and would wait for ever"
        )


@contextmanager
def _waiting_for(flight: _Flight) -> Iterator[None]:
    """Note that what this task loads waits for that."""
    current = _current()
    if current is None:
        yield
        return
    current.inner.append(flight)
    try:
        yield
    finally:
        current.inner.remove(flight)


# Near caches


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NearCacheStatistics:
    """What a near cache holds, and has done so far.

    - `size`, `maxsize`: entries held now, and at most; `namespace`: whose
    - `hits`: calls that were served what was held; `misses`: calls that found nothing; `bypassed`: calls that were not
      served, whatever was held, since the daemons were not trusted
    - `loads`: how often a loader ran; `refused`: how many of the loaded values were not stored, since they were busted
      while they were loaded
    - `dropped`: entries that were busted; `expired`: found at the end of their time; `evicted`: went for others
    - `resets`: how often everything was forgotten, since events were missed
    - `trusted`: whether what is held is served now; `reason`: if not, why
    """

    namespace: str
    size: int = 0
    maxsize: int = 0
    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    loads: int = 0
    refused: int = 0
    dropped: int = 0
    expired: int = 0
    evicted: int = 0
    resets: int = 0
    trusted: bool = False
    reason: str = ""


class Join(Protocol):
    """Tells the feed of a namespace in the running event loop; raises `ClientClosed` once there is none."""

    async def __call__(self, namespace: str, /) -> Feed:
        """Tell it, begun."""
        ...


_CACHES: weakref.WeakSet[NearCache] = weakref.WeakSet()
_INHERITED: list[object] = []
"""What a forked child must neither use nor let the garbage collector find."""


def _after_fork() -> None:
    for cache in list(_CACHES):
        cache.forget_parent()


os.register_at_fork(after_in_child=_after_fork)


@final
class NearCache:
    """Values of one namespace, held in this process, and dropped as soon as a daemon tells that they were busted.

    ```python
    cache = client.near_cache(maxsize=10_000, ttl=60.0)
    product = await cache.get_or_load("products/7", load_product, tags=["product:7"])
    ```

    Made by `BustcallClient.near_cache`. Whoever asks is given the same object that was loaded: do not change it. One
    event loop only; in a forked child, or in the next loop, it begins empty.
    """

    def __init__(
        self,
        join: Join | None,
        *,
        maxsize: int,
        ttl: float | None,
        namespace: str | None,
        grace: float | None,
        needed: int,
        clock: Callable[[], float] = clock,
    ) -> None:
        if type(maxsize) is not int or maxsize < 1:
            raise ConfigurationError(f"maxsize must be an integer of at least 1, not {maxsize!r}", setting="maxsize")
        self._ttl = math.inf if ttl is None else check_seconds(ttl, "ttl")
        self._grace = None if grace is None else check_seconds(grace, "grace", zero=True)
        self._namespace = DEFAULT_NAMESPACE if namespace is None else check_namespace(namespace)
        self._needed = needed
        self._join = join
        self._clock = clock
        self._shelf = Shelf(maxsize)
        self._feed: Feed | None = None
        self._until = -math.inf  # up to when the daemons are trusted
        self._number = 0
        self._tag_busted = 0
        self._flights: dict[str, _Flight] = {}  # those that can be joined
        self._flying: set[_Flight] = set()  # all that have not ended
        self._counts = dict.fromkeys(_COUNTED, 0)
        _CACHES.add(self)

    def __len__(self) -> int:
        return len(self._shelf)

    def __repr__(self) -> str:
        state = "trusted" if self.is_trusted else "bypassed"
        return f"NearCache({self._namespace}, {len(self)} of {self._shelf.most}, {state})"

    @property
    def namespace(self) -> str:
        """Whose values it holds."""
        return self._namespace

    @property
    def is_trusted(self) -> bool:
        """Whether what it holds is served now."""
        return self._clock() <= self._until

    @overload
    async def get_or_load(self, key: str, loader: Callable[[], Awaitable[_T]], *, tags: Iterable[str] = ()) -> _T: ...

    @overload
    async def get_or_load(self, key: str, loader: Callable[[], _T], *, tags: Iterable[str] = ()) -> _T: ...

    async def get_or_load(self, key: str, loader: Callable[[], Any], *, tags: Iterable[str] = ()) -> Any:
        """Return the value under `key`; if none is held, or none can be trusted, load it, and hold it if it is sound.

        - `key`: as it is busted; `tags`: up to 256 texts by which a bust finds the entry, too; several calls' add up,
          to as many: a call with more beside them has the value loaded anew, as of its own
        - `loader`: an async or plain function without arguments; a plain one must not block

        Of several calls at a time with one key, one loader runs, and what it raises is raised by all; the loading ends
        early only if nobody waits for it any more. A value that was busted while it was loaded is not held, and is
        given only to those who asked before the loading began.

        Raises `InvalidRequest`, before anything is loaded, for arguments that cannot be; `RuntimeError` if the
        value would be loaded by way of itself; `ClientClosed` after the client's `aclose`; and `IncompatibleDaemon` or
        `NotAllowed` if the hub has said that it tells this client of no busts.
        """
        if not callable(loader):
            check_maker(loader, "loader")
        if not isinstance(tags, _COLLECTIONS):
            tags = _several(tags)
        if self._feed is None or self._feed.is_closed or self._feed.loop is not asyncio.get_running_loop():
            await self._begin()
        entry = self._look(key, tags)
        if entry is not None:
            return entry.value
        self._check_hub()
        check_target(key, "key")
        wanted = _checked_tags(tags)
        wanted = _added(wanted, self._shelf.tags(key)) or wanted  # what was named before is of the next value, too
        asked = self._next()
        while True:
            flight = self._board(key, loader, wanted, asked)
            with _waiting_for(flight):
                value = await self._wait(flight)
            if flight.is_sound or flight.begun > asked:
                return value

    def drop(self, key: str) -> bool:
        """Drop what is held or being loaded under `key`, here alone; tell whether something was held."""
        for flight in self._flying:
            flight.refused = flight.refused or flight.key == key
        return self._shelf.drop(key)

    def clear(self) -> None:
        """Drop everything that is held or being loaded, here alone."""
        self._shelf.clear()
        for flight in self._flying:
            flight.refused = True

    async def wait_trusted(self, timeout: float | None = None) -> None:
        """Wait until what is held is served. Raises `TimeoutError` after `timeout` seconds, and as `get_or_load` does.

        There is no need to: until then each value is loaded when it is asked for. With a client that is disabled there
        is nothing to wait for, and it returns at once.
        """
        async with asyncio.timeout(timeout):
            while not self.is_trusted:
                if self._feed is None or self._feed.is_closed:
                    await self._begin()
                self._check_hub()
                if self._feed is None:
                    return
                if not self.is_trusted:
                    await self._feed.wait_changed()

    def statistics(self) -> NearCacheStatistics:
        """Take a snapshot of what it holds and has done."""
        trusted = self.is_trusted
        return NearCacheStatistics(
            namespace=self._namespace,
            size=len(self),
            maxsize=self._shelf.most,
            trusted=trusted,
            reason="" if trusted else self._why_not(),
            **self._counts,
        )

    def _why_not(self) -> str:
        if self._join is None:
            return "the client is disabled"
        if self._feed is None:
            return "nothing was asked for yet"
        if self._feed.is_closed:
            return "the client is closed"
        return self._feed.why_not() or "the streams are silent"

    # Serving

    def _look(self, key: str, tags: Collection[str]) -> _Entry | None:
        """Tell the entry that may be served, and count what became of the call."""
        if type(key) is not str:
            check_target(key, "key")
        now = self._clock()
        if now > self._until:
            self._counts["bypassed"] += 1
            return None
        entry = self._shelf.find(key)
        if entry is not None and now >= entry.expires:
            self._counts["expired"] += 1
            self._shelf.drop(key)
            entry = None
        if entry is not None and tags and not _has_all(entry.tags, tags):
            entry = self._tag(key, entry, tags)
        self._counts["misses" if entry is None else "hits"] += 1
        return entry

    def _tag(self, key: str, entry: _Entry, tags: Collection[str]) -> _Entry | None:
        """Have an entry found by the tags that this call names; None if one of them may have been busted already.

        None also where it would have too many by that: then it is loaded anew, as of these.
        """
        wanted = _checked_tags(tags)
        if self._tag_busted > entry.begun or not _added(entry.tags, wanted):
            return None
        self._shelf.tag(key, wanted)
        return entry

    def _check_hub(self) -> None:
        refusal = None if self._feed is None or self.is_trusted else self._feed.refusal
        if refusal is not None:
            raise failure("following the busts for a near cache", "exhausted", (refusal,), 0.0)

    async def _begin(self) -> None:
        """Follow the daemons in the running loop, beginning with nothing."""
        if self._join is None:
            return
        if self._feed is not None and not self._feed.is_closed and self._feed.loop.is_running():
            raise RuntimeError("this near cache belongs to another event loop, which still runs; make one for each")
        old, feed = self._feed, await self._join(self._namespace)
        if feed is not self._feed:
            if old is not None and not old.loop.is_closed():
                old.loop.call_soon_threadsafe(old.leave, self)
            self._begin_anew()
            self._feed = feed
            feed.join(self)
            self.changed()

    def _begin_anew(self) -> None:
        self._shelf.clear()
        self._flights = {}
        self._flying = set()
        self._until = -math.inf
        self._feed = None

    def forget_parent(self) -> None:
        """Begin anew in a forked child: the parent's streams are none of its own."""
        _INHERITED.append((self._feed, self._flying))
        self._begin_anew()

    # Loading

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _board(self, key: str, loader: Callable[[], Any], tags: frozenset[str], asked: int) -> _Flight:
        """Join the flight whose value may do for who asked then, or begin one."""
        flight = self._flights.get(key)
        is_spent = flight is None or flight.refused or not self._may_bear(flight, tags)
        if flight is None or (is_spent and flight.begun < asked):
            return self._take_off(key, loader, tags)
        _check_circle(flight)
        flight.refused = is_spent
        flight.tags |= tags
        return flight

    def _may_bear(self, flight: _Flight, tags: frozenset[str]) -> bool:
        """Tell whether what a flight brings can be held as of these tags, too.

        None of them may have been busted since it began, when it did not bear it yet; nor may they be too many.
        """
        return tags <= flight.tags or (self._tag_busted < flight.begun and bool(_added(flight.tags, tags)))

    def _take_off(self, key: str, loader: Callable[[], Any], tags: frozenset[str]) -> _Flight:
        flight = _Flight(key, set(tags), self._next(), self._clock())
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight, loader))
        self._flights[key] = flight
        self._flying.add(flight)
        flight.task.add_done_callback(functools.partial(self._land, flight))
        if self._feed is not None:
            self._feed.own(flight.task)
        return flight

    async def _fly(self, flight: _Flight, loader: Callable[[], Any]) -> Any:
        self._counts["loads"] += 1
        outside = _LOADING.set(flight)
        try:
            value = loader()
            if inspect.isawaitable(value):
                value = await value
        finally:
            flight.is_over = True
            _LOADING.reset(outside)
        self._arrive(flight, value)
        return value

    def _arrive(self, flight: _Flight, value: object) -> None:
        """Hold a value that has come, if it is sound."""
        if flight not in self._flying:
            return  # of a loop that is left
        flight.is_sound = not flight.refused and self.is_trusted
        self._counts["refused"] += flight.refused
        # Another flight to this key began after it, and has brought a newer value, or will.
        is_last = self._flights.get(flight.key) is flight
        if flight.is_sound and is_last:
            expires = flight.started + self._ttl
            tags = frozenset(flight.tags)
            self._counts["evicted"] += self._shelf.put(flight.key, value, tags, expires, flight.begun)

    def _land(self, flight: _Flight, task: asyncio.Task[Any]) -> None:
        self._leave(flight)
        self._flying.discard(flight)
        if not task.cancelled():
            task.exception()  # it is told to whoever waits, and may be nobody any more

    def _leave(self, flight: _Flight) -> None:
        """Let nobody join any more."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    async def _wait(self, flight: _Flight) -> Any:
        """Wait for a flight; the last who gives up breaks it off."""
        task = flight.task
        assert task is not None  # noqa: S101 - made with the flight
        flight.waiting += 1
        try:
            await asyncio.wait({task})
        finally:
            flight.waiting -= 1
            if not flight.waiting and not task.done():
                self._leave(flight)
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            raise ClientClosed("the value was not loaded: the client was closed meanwhile, or loading it was cancelled")
        return task.result()

    # What its feed tells, and what its own client busts

    def busted(self, event: BustEvent) -> None:
        """Drop what a bust concerns, and refuse what is being loaded of it."""
        self._counts["dropped"] += self._shelf.bust(event)
        if event.kind == "tag":
            self._tag_busted = self._next()
        if self._flying:
            concern = Concern([event])
            for flight in self._flying:
                flight.refused = flight.refused or concern.concerns(flight.key, flight.tags)

    def reset(self, daemon: str, reason: str, *, first: bool) -> None:  # noqa: ARG002 - a listener is told why
        """Forget everything."""
        self._counts["resets"] += not first
        self.clear()

    def changed(self) -> None:
        """Take in up to when the daemons can be trusted."""
        feed = self._feed
        if feed is None:
            return
        if not feed.is_closed:
            self._until = feed.trusted_until(self._needed, self._grace)
            return
        self._until = -math.inf  # and what is being loaded is broken off by the feed, which owns it

    def limit(self, heartbeat: float) -> float:
        """Tell how long a stream may be silent."""
        return silence(heartbeat, self._grace)

    def bust_here(self, event: BustEvent | Reset) -> None:
        """Take in what its own client busts, in whatever thread that is."""
        feed = self._feed
        if feed is None:
            return
        act = functools.partial(self.busted, event) if isinstance(event, BustEvent) else self.clear
        if feed.is_here:
            act()
        elif not feed.loop.is_closed():
            feed.loop.call_soon_threadsafe(act)


_COUNTED: Final = (
    "hits",
    "misses",
    "bypassed",
    "loads",
    "refused",
    "dropped",
    "expired",
    "evicted",
    "resets",
)


def _several(tags: Iterable[str]) -> Collection[str]:
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise InvalidRequest(f"tags must be several texts, such as a list, not {tags!r:.60}", field="tags")
    return tuple(tags)


def _has_all(held: frozenset[str], tags: Collection[str]) -> bool:
    try:
        return held.issuperset(tags)
    except TypeError:  # what cannot be hashed is no tag, which is told when they are checked
        return False


def _added(held: Iterable[str], tags: frozenset[str]) -> frozenset[str] | None:
    """Tell all of these tags together; None if an entry cannot have so many."""
    added = tags.union(held)
    return added if len(added) <= _MOST_TAGS else None


def _checked_tags(tags: Collection[str]) -> frozenset[str]:
    checked = frozenset(check_target(tag, "tag") for tag in tags)
    if len(checked) > _MOST_TAGS:
        raise InvalidRequest(f"an entry has at most {_MOST_TAGS} tags", field="tags")
    return checked
