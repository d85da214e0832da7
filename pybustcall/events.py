"""What daemons bust, as a client follows it: events in order, or a reset where something may have been missed.

This module decides when a stream is broken and opened again, what its reader has missed, and how far all streams
together can be trusted. What is done with an event is decided by whoever listens: an `EventStream` here, a
`near_cache`. How a stream is opened over HTTP is decided by `daemon_client`, how its bytes are read by `sse`.
docs/explanation/near-caches.md tells why it is so.

Theory of operation. A daemon tells only of busts that went through it, so each daemon is followed, by a task of its
own. It knows the place in the daemon's log up to which it was told everything, and says it when it comes back; then the
daemon tells what was missed, or "reset", and then "live". A follower that begins without a place, or that has lost it
to a daemon that broke the rules, owes its listeners a reset, which they get when it is live: from there on they are
told everything.

A stream is heard of at least every heartbeat, and the daemon dates what it writes when nothing more is due. So the last
date tells up to when its listeners know all that was busted, however long it was on its way. Dates are by the daemon's
clock, which need not be set like ours: the first of a connection was written after its request was begun, and the
others so much later than that as their dates say. Clocks do not run alike for ever, and a request can take long; so
connections are renewed now and then. Ours goes on while the machine sleeps.

A daemon may not date what it writes. Then what comes is taken to be as new as it seems, unless it comes after too long
a silence: it may be as old as that, since the process was stopped or the network held it back, and is thrown away with
its connection.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import re
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, final
from urllib.parse import urlencode

from pydantic import ValidationError

from pybustcall.clock import clock, runs_here
from pybustcall.dispatcher import reap
from pybustcall.errors import ClientClosed, InvalidRequest
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.keys import bases_of, covers, is_variant
from pybustcall.models import (
    DEFAULT_NAMESPACE,
    DEFAULT_STRATEGY,
    StreamedBust,
    StreamedLive,
    StreamedReset,
    check_namespace,
    check_target,
    redact,
)
from pybustcall.policies import full_jitter
from pybustcall.results import failure
from pybustcall.sse import BrokenStream, StreamParser

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from pybustcall.models import Kind
    from pybustcall.sse import Block

    Read = Callable[[], Awaitable[bytes]]

__all__ = [
    "HEARTBEAT",
    "BustEvent",
    "Concern",
    "EventStream",
    "Feed",
    "Following",
    "Listener",
    "Reset",
    "Wanted",
    "clock",
    "tags_of",
]

HEARTBEAT: Final = 5.0
"""Seconds between two signs of life of a stream, until a daemon says its own."""

_BEATS: Final = 3.0  # heartbeats without a sign of life after which a connection is broken
_LEAST_BEATS: Final = 1.5  # the same at least, for listeners who want to know sooner; and after which bytes are too old
_LONGEST_BEAT: Final = 3600.0
_BASE: Final = 0.1
_CAP: Final = 5.0
_CAP_REFUSED: Final = 60.0
"""Seconds: the first ceiling of the pauses before a daemon is asked again, and the last; the last where it said no, or
when to come back."""
_MOST_FAILURES_LIVE: Final = 3  # how far the pauses grow if each connection becomes live, and ends soon
_RENEWED: Final = 600.0  # seconds after which a connection is, so that clocks that do not run alike differ by little
_RENEWED_SOON: Final = 10.0  # heartbeats, and seconds at least, after which it is where it took long to open: that
# makes all that is dated seem older
_LONG_TO_OPEN: Final = 0.25  # heartbeats
_STEADY: Final = 1.0  # seconds that a stream must have been live, so that it is opened again without a pause
_MOST_WAITING: Final = 1000  # events that may wait for one slow reader
_MOST_WANTED: Final = 100  # prefixes, and again tags, that a daemon lets one reader name
_EVENTS: Final = "/api/v1/events"
_CAPABILITY: Final = "events.stream"
_NO_SUCH_ROUTE: Final = frozenset({404, 405, 410, 501})
_REFUSALS: Final = frozenset(
    {
        FaultKind.NOT_THIS_SERVICE,
        FaultKind.UNSUPPORTED,
        FaultKind.TOKEN_REFUSED,
        FaultKind.NOT_ALLOWED,
        FaultKind.REJECTED,
        FaultKind.INCOMPATIBLE,
        FaultKind.CERTIFICATE,
    }
)
"""What no waiting mends, but somebody may."""

_log: Final = logging.getLogger("pybustcall")

# What is told


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BustEvent:
    """A bust that was applied.

    - `namespace`, `kind`, `target`, `soft`, `strategy`: as in `BustcallClient.bust`
    - `also`: further keys that went with it, such as those of its dependents, as far as the daemon knows
    - `daemon`: the URL of the daemon that told; `id`: its place in that daemon's log

    One bust may be told of twice, if something of it was done later.
    """

    namespace: str = DEFAULT_NAMESPACE
    kind: Kind = "key"
    target: str
    soft: bool = False
    strategy: str = DEFAULT_STRATEGY
    also: tuple[str, ...] = ()
    daemon: str = ""
    id: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether variants of the named keys went, too."""
        return self.strategy != "direct"

    def concerns(self, key: str, tags: str | Iterable[str] = ()) -> bool:
        """Tell whether an entry of this namespace, under `key` and with these tags, is what was busted.

        It goes by what the event names: the key, the prefix or the tag, and what was registered as going with it
        (`also`). Whether an entry was made of what was busted can be seen only where that was registered; and a bust of
        a key does not concern entries under other keys, whatever tags they have in common. Raises `InvalidRequest` for
        tags that are no texts.
        """
        borne = tags_of(tags)
        if self.kind == "all" or (self.kind == "tag" and self.target in borne):
            return True
        if self.kind == "prefix" and covers(self.target, key):
            return True
        return any(key == name or (self.is_wide and is_variant(name, key)) for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that it names: the target if that is a key or a prefix, and the further ones."""
        return (self.target, *self.also) if self.kind in {"key", "prefix"} else self.also

    def __repr__(self) -> str:
        more = f", and {len(self.also)} more" if self.also else ""
        where = f"{self.daemon} {self.id}" if self.id else "this client"
        return f"BustEvent({self.kind} {redact(self.target)} of {self.namespace}{more}, from {where})"


def tags_of(tags: object) -> Collection[str]:
    """Tell the tags that are given as one text or as several; raise `InvalidRequest` for anything else."""
    if isinstance(tags, str):
        return (tags,)
    given = tuple(tags) if isinstance(tags, Iterable) else None
    if given is None or not all(isinstance(tag, str) for tag in given):
        raise InvalidRequest(f"tags must be a text, or several, not {tags!r:.200}", field="tags")
    return given


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    """Something was missed: forget all that is held. `daemon` is the URL of the one whose events were missed."""

    daemon: str
    reason: str


@final
class Concern:
    """What several events are about, to ask of many keys: `concerns` is true iff it is of one of the events."""

    def __init__(self, events: Iterable[BustEvent]) -> None:
        self.everything = False
        self.tags: set[str] = set()
        self._exact: set[str] = set()
        self._wide: set[str] = set()
        self._prefixes: list[str] = []
        for event in events:
            self.everything = self.everything or event.kind == "all"
            self._exact.update(event.names)
            if event.is_wide:
                self._wide.update(event.names)
            if event.kind == "tag":
                self.tags.add(event.target)
            elif event.kind == "prefix":
                self._prefixes.append(event.target)

    def concerns(self, key: str, tags: Collection[str] = ()) -> bool:
        """Tell whether an entry under `key` with these tags is what one of the events is about."""
        if self.everything or key in self._exact or not self.tags.isdisjoint(tags):
            return True
        if any(covers(prefix, key) for prefix in self._prefixes):
            return True
        return bool(self._wide) and any(base in self._wide for base in bases_of(key))


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reader wants to be told of: all busts of a namespace, or those that concern these prefixes or tags."""

    namespace: str = DEFAULT_NAMESPACE
    prefixes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, namespace: str | None, prefixes: str | Iterable[str] = (), tags: str | Iterable[str] = ()) -> Wanted:
        """Check what a caller wants; raise `InvalidRequest` for what cannot be."""
        namespace = DEFAULT_NAMESPACE if namespace is None else check_namespace(namespace)
        return cls(namespace, _texts(prefixes, "prefix"), _texts(tags, "tag"))

    @property
    def path(self) -> str:
        """The route, with what is wanted."""
        asked = [("namespace", self.namespace)]
        asked += [("prefix", prefix) for prefix in self.prefixes]
        asked += [("tag", tag) for tag in self.tags]
        return f"{_EVENTS}?{urlencode(asked)}"


def _texts(texts: str | Iterable[str], what: str) -> tuple[str, ...]:
    given = (texts,) if isinstance(texts, str) else texts
    if not isinstance(given, Iterable):
        raise InvalidRequest(f"{what} must be a text, or several, not {type(given).__name__}", field=what)
    checked = tuple(dict.fromkeys(check_target(text, what) for text in given))
    if len(checked) > _MOST_WANTED:
        raise InvalidRequest(f"at most {_MOST_WANTED} can be named as {what}; nothing was sent", field=what)
    return checked


# Following one daemon


_PLACE: Final = re.compile(r"([!-~]{1,200})-([0-9]{1,19})")


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """How far a log was read."""

    epoch: str
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


class Listener(Protocol):
    """Who is told what a feed hears. None of these may raise or wait."""

    def busted(self, event: BustEvent) -> None:
        """Take in a bust."""

    def reset(self, daemon: str, reason: str, *, first: bool) -> None:
        """Forget all that is held. `first`: the daemon is followed from now on, and was reached as soon as asked."""

    def changed(self) -> None:
        """Take in that what came together has been told, or that a stream has begun, ended or gone silent."""

    def limit(self, heartbeat: float) -> float:
        """Tell after how many seconds without a sign of life a connection is to be given up."""


class Open(Protocol):
    """Opens a daemon's stream: raises `AttemptFailed`, or tells how to read from it."""

    def __call__(self, path: str, /, *, after: str | None, until: float) -> AbstractAsyncContextManager[Read]:
        """Open it, before `until` of the loop's clock; `after` is the place from which it goes on."""


@final
class Follower:
    """Follows the log of one daemon, from one connection to the next, for its feed.

    - `place`: up to where everything was told, or None
    - `is_live`: whether the daemon has told by now all that was missed
    - `opened`: when the request of the connection was begun; `sound`: up to when everything was told, while it was live
    - `fault`: why it is not live; `refusal`: the same, if the daemon said no and never was live
    """

    def __init__(self, url: str, open_stream: Open, feed: Feed) -> None:
        self.url = url
        self.place: _Place | None = None
        self.heartbeat = HEARTBEAT
        self.is_live = False
        self.opened = -math.inf
        self.live_since = -math.inf
        self.sound = -math.inf
        self.fault: Fault | None = None
        self.refusal: Fault | None = None
        self._open = open_stream
        self._feed = feed
        self._owes_reset = True
        self._was_live = False
        self._failures = 0
        self._skew: float | None = None  # of the daemon's clock to ours, in this connection, if it dates what it writes
        self._renewal = math.inf
        self._is_renewed = False  # whether the connection was ended for that
        self._is_told = False  # whether the log says that it cannot be followed

    def __repr__(self) -> str:
        return f"Follower({self.url}, {self.place}, {'live' if self.is_live else 'not live'})"

    async def run(self) -> None:
        """Follow until cancelled, or until the client is closed."""
        while True:
            try:
                fault = await self._follow()
            except AttemptFailed as failed:
                fault = _explained(failed.fault)
            except ClientClosed:
                return
            except Exception:  # noqa: BLE001 - logged; a follower that ends would be silent for ever
                _log.exception("an unexpected error while the events of %s were followed; it goes on", self.url)
                self._lose()
                fault = self._broken(FaultKind.MALFORMED, "its events could not be taken in")
            await asyncio.sleep(self._end_connection(fault))

    async def _follow(self) -> Fault:
        """Read one connection to its end; tell why it ended."""
        loop = asyncio.get_running_loop()
        parser = StreamParser()
        heard = self.opened = self._feed.clock()
        self._skew, self._renewal = None, math.inf
        limit = self._feed.limit(self.heartbeat)
        after = None if self.place is None else str(self.place)
        async with self._open(self._feed.wanted.path, after=after, until=loop.time() + limit) as read:
            while True:
                try:
                    async with asyncio.timeout(limit):
                        chunk = await read()
                except TimeoutError:
                    return self._broken(FaultKind.TIMED_OUT, f"its stream was silent for {limit:g} s")
                now = self._feed.clock()
                silent, heard = now - heard, now
                if not chunk:
                    return self._broken(FaultKind.DISCONNECTED, "it ended its stream")
                try:
                    blocks = parser.feed(chunk)
                    is_dated = self._is_dated or any(block.at is not None for block in blocks)
                    if not is_dated and silent > _LEAST_BEATS * self.heartbeat:  # it may be as old as that
                        return self._broken(FaultKind.TIMED_OUT, f"its stream was not read for {silent:.1f} s")
                    for block in blocks:
                        self._take(block)
                        if block.at is not None:
                            self._date(block.at, now)
                except BrokenStream as error:
                    self._lose()
                    return self._broken(FaultKind.MALFORMED, f"its stream is none: {error}")
                if self.is_live and not self._is_dated:
                    self.sound = now
                self._feed.changed()
                if now >= self._renewal:
                    self._is_renewed = True
                    return self._broken(FaultKind.DISCONNECTED, "its stream is opened anew, as it is now and then")
                limit = self._feed.limit(self.heartbeat)

    @property
    def _is_dated(self) -> bool:
        """Whether the daemon dates what it writes."""
        return self._skew is not None

    def _date(self, at: float, now: float) -> None:
        """Take in that by `at` of the daemon's clock everything had been told."""
        if self._skew is None:
            self._skew = self.opened - at
            slow = now - self.opened > _LONG_TO_OPEN * self.heartbeat
            steady = _RENEWED * (0.9 + self._feed.random() / 5)  # so that they do not all come at once
            self._renewal = now + (_RENEWED_SOON * max(1.0, self.heartbeat) if slow else steady)
        self._skew = min(self._skew, now - at)  # it was written before now
        if self.is_live:
            self.sound = max(self.sound, at + self._skew)

    def _broken(self, kind: FaultKind, message: str) -> Fault:
        return Fault(kind, self.url, message, "no")

    def _end_connection(self, fault: Fault) -> float:
        """Take in that a connection ended, or could not be made; tell how long to wait before the next."""
        was_live, self.is_live, self.fault = self.is_live, False, fault
        refused = fault.kind in _REFUSALS
        if refused and not self._was_live:
            self.refusal = fault
        if not was_live and not self._is_told:
            self._is_told = True
            _log.warning("the events of %s cannot be followed, which is tried again: %s", self.url, fault.message)
        self._feed.changed()
        renewed, self._is_renewed = self._is_renewed, False
        if was_live and (renewed or self._feed.clock() - self.live_since >= _STEADY):
            self._failures = 0
            return 0.0
        self._failures = min(self._failures + 1, _MOST_FAILURES_LIVE) if was_live else self._failures + 1
        pause = full_jitter(self._failures, _BASE, _CAP_REFUSED if refused else _CAP, self._feed.random)
        return pause + min(fault.retry_after or 0.0, _CAP_REFUSED)

    def _lose(self) -> None:
        """Begin anew: it cannot be told what was missed."""
        self.place = None
        self.is_live = False
        self.sound = -math.inf
        self._owes_reset = True

    # What came

    def _take(self, block: Block) -> None:
        if block.name == "reset":
            self.place = _place_of(block)
            self._forget(_reason_of(block))
            return
        if block.id or block.name in {"bust", "live"}:
            self._move(_place_of(block))
        if block.name == "live":
            self._go_live(block)
        elif block.name == "bust":
            self._tell(block)

    def _move(self, new: _Place) -> None:
        """Take in how far the log was told; an id that cannot come next says that something is wrong."""
        old, self.place = self.place, new
        if old is not None and (new.epoch != old.epoch or new.number < old.number):
            self._forget("the daemon went over to another log, or back in its own, and did not say so")

    def _tell(self, block: Block) -> None:
        try:
            told = StreamedBust.model_validate_json(block.data or "")
        except ValidationError:
            # It may be of a later version, and say something that this one does not understand.
            self._forget("the daemon told of a bust in words that are not known here")
            return
        event = BustEvent(
            namespace=told.namespace,
            kind=told.kind,
            target=told.target,
            soft=told.soft,
            strategy=told.strategy,
            also=told.also,
            daemon=self.url,
            id=block.id,
        )
        self._feed.tell(event)

    def _go_live(self, block: Block) -> None:
        try:
            heartbeat = StreamedLive.model_validate_json(block.data or "").heartbeat
        except ValidationError:
            heartbeat = 0.0
        if not 0 < heartbeat <= _LONGEST_BEAT:
            raise BrokenStream("it does not say its heartbeat")
        self.heartbeat = heartbeat
        if self._owes_reset:
            first = not self._was_live and not self._failures
            self._forget("followed from now on" if first else "what was busted before cannot be told", first=first)
        if self._is_told:
            self._is_told = False
            _log.info("the events of %s are followed again", self.url)
        self.is_live = self._was_live = True
        self.live_since = self._feed.clock()
        self.fault = self.refusal = None

    def _forget(self, reason: str, *, first: bool = False) -> None:
        self._owes_reset = False
        self._feed.forget(self.url, reason, first=first)


def _explained(fault: Fault) -> Fault:
    """Say of a daemon that has no such route what it lacks."""
    if fault.status not in _NO_SUCH_ROUTE:
        return fault
    lacks = f"it does not advertise {_CAPABILITY}, and tells nobody of its busts (HTTP {fault.status})"
    return replace(fault, kind=FaultKind.UNSUPPORTED, message=lacks, unmet=(_CAPABILITY,))


def _place_of(block: Block) -> _Place:
    found = _PLACE.fullmatch(block.id)
    if found is None:
        raise BrokenStream("it has an event without an id of the form EPOCH-NUMBER")
    return _Place(found[1], int(found[2]))


def _reason_of(block: Block) -> str:
    try:
        reason = StreamedReset.model_validate_json(block.data or "").reason
    except ValidationError:
        return "the daemon does not say why"
    return "".join(character if character.isprintable() else "?" for character in reason[:200])


# Following all of them


@final
class Feed:
    """Follows some daemons, and tells its listeners, which it holds weakly, what it hears. One event loop only.

    - `daemons`: the URL of each, and what opens its stream
    - `wanted`: what its listeners want to be told of
    - `idle`: called once it has no listener any more
    """

    def __init__(
        self,
        daemons: Sequence[tuple[str, Open]],
        wanted: Wanted,
        *,
        random: Callable[[], float],
        clock: Callable[[], float] = clock,
        idle: Callable[[Feed], object] = lambda _: None,
    ) -> None:
        self.wanted = wanted
        self.random = random
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.is_closed = False
        self.followers = tuple(Follower(url, open_stream, self) for url, open_stream in daemons)
        self._listeners: dict[int, weakref.ref[Listener]] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.guests: set[asyncio.Task[Any]] = set()
        self._idle = idle
        self._waiting: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        live = sum(follower.is_live for follower in self.followers)
        return f"Feed({self.wanted.namespace}, {live} of {len(self.followers)} live, {len(self._listeners)} listen)"

    def start(self) -> None:
        """Begin to follow."""
        for follower in self.followers:
            # It inherits nothing of the call which happens to be the first: no span, no place in a queue.
            work = follower.run()
            context = contextvars.Context()
            task = self.loop.create_task(work, name="pybustcall-events", context=context)
            task.add_done_callback(self._ended)
            self.tasks.append(task)

    def cancel(self) -> None:
        """End, without waiting."""
        self.is_closed = True
        for task in self.tasks:
            task.cancel()
        for task in self.guests:
            task.cancel()
        self.changed()

    def _ended(self, _: asyncio.Task[None]) -> None:
        """End with any of its tasks: one that somebody else has cancelled would be missed by nobody."""
        if not self.is_closed:
            self.cancel()

    async def aclose(self) -> None:
        """End, and wait for that. Repeating it is harmless."""
        self.cancel()
        await reap(self.tasks)

    def own(self, task: asyncio.Task[Any]) -> None:
        """Have a listener's task end with the client, unless it ends before."""
        self.guests.add(task)
        task.add_done_callback(self.guests.discard)

    # Its listeners

    def join(self, listener: Listener) -> None:
        """Tell a listener what is heard from now on, as long as somebody else holds it."""
        ident = id(listener)
        loop, gone = self.loop, weakref.WeakMethod(self._left)

        def forget(ref: weakref.ref[Listener]) -> None:  # in whatever thread the last reference was dropped
            left = gone()
            if left is not None and not loop.is_closed():
                loop.call_soon_threadsafe(left, ident, ref)

        self._listeners[ident] = weakref.ref(listener, forget)

    def leave(self, listener: Listener) -> None:
        """Tell a listener nothing more."""
        ident = id(listener)
        if (ref := self._listeners.get(ident)) is not None and ref() is listener:
            self._left(ident, ref)

    def _left(self, ident: int, ref: weakref.ref[Listener]) -> None:
        if self._listeners.get(ident) is ref:
            del self._listeners[ident]
            if not self._listeners:
                self._idle(self)

    @property
    def listeners(self) -> Iterator[Listener]:
        """Those who listen now."""
        return iter([listener for ref in list(self._listeners.values()) if (listener := ref()) is not None])

    def tell(self, event: BustEvent) -> None:
        """Tell of a bust."""
        if event.namespace == self.wanted.namespace:
            for listener in self.listeners:
                listener.busted(event)

    def forget(self, daemon: str, reason: str, *, first: bool) -> None:
        """Have everything forgotten."""
        for listener in self.listeners:
            listener.reset(daemon, reason, first=first)

    def changed(self) -> None:
        """Tell that something is other than it was."""
        for listener in self.listeners:
            listener.changed()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def wait_changed(self) -> None:
        """Wait until something is other than it is now."""
        waiter = self.loop.create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    # How it stands

    @property
    def is_here(self) -> bool:
        """Whether it belongs to the event loop that runs here."""
        return runs_here(self.loop)

    def limit(self, heartbeat: float) -> float:
        """Tell after how many seconds without a sign of life a connection is given up."""
        longest = _BEATS * heartbeat
        return min((listener.limit(heartbeat) for listener in self.listeners), default=longest)

    def trusted_until(self, needed: int, grace: float | None) -> float:
        """Tell until when so many of the daemons are known to have told all that they busted.

        - `needed`: how many
        - `grace`: seconds that a broken stream is trusted after it was heard last; None for three heartbeats

        Daemons with one log vouch for each other.
        """
        best: dict[str, float] = {}
        own: list[tuple[str | None, float]] = []
        for follower in self.followers:
            if follower.is_live:
                until = follower.sound + silence(follower.heartbeat, grace)
            else:
                until = follower.sound + (_BEATS * follower.heartbeat if grace is None else grace)
            epoch = None if follower.place is None else follower.place.epoch
            own.append((epoch, until))
            if epoch is not None:
                best[epoch] = max(until, best.get(epoch, -math.inf))
        ends = sorted((until if epoch is None else best[epoch] for epoch, until in own), reverse=True)
        return ends[needed - 1] if needed else math.inf

    @property
    def is_live(self) -> bool:
        """Whether each daemon, or one with the same log, is followed, and has told what was missed."""
        epochs = {follower.place.epoch for follower in self.followers if follower.is_live and follower.place}
        return all(
            follower.is_live or (follower.place is not None and follower.place.epoch in epochs)
            for follower in self.followers
        )

    @property
    def refusal(self) -> Fault | None:
        """Why the first of the daemons tells nothing, if it said so and never did."""
        return self.followers[0].refusal if self.followers else None

    def why_not(self) -> str:
        """Tell which daemons are not followed just now, and why."""
        return "; ".join(
            f"{follower.url}: {follower.fault.message if follower.fault is not None else 'not live yet'}"
            for follower in self.followers
            if not follower.is_live
        )


def silence(heartbeat: float, grace: float | None) -> float:
    """Tell for how many seconds a live stream may be silent: three heartbeats, or less if so little is wanted."""
    longest = _BEATS * heartbeat
    return longest if grace is None else min(longest, max(grace, _LEAST_BEATS * heartbeat))


@final
class Following:
    """All that one client follows in one event loop.

    - `daemons`: the URL of each daemon, and what opens its stream
    """

    def __init__(self, daemons: Sequence[tuple[str, Open]], *, random: Callable[[], float]) -> None:
        self._daemons = tuple(daemons)
        self._random = random
        self._shared: dict[str, Feed] = {}
        self._feeds: set[Feed] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def has_begun(self) -> bool:
        """Whether anything is followed."""
        return bool(self._feeds)

    def shared(self, namespace: str) -> Feed:
        """Tell the feed of a whole namespace, which all share who want that, begun."""
        feed = self._shared.get(namespace)
        if feed is None or feed.is_closed:
            feed = self._shared[namespace] = self.begin(Wanted(namespace))
        return feed

    def begin(self, wanted: Wanted, daemon: str | None = None) -> Feed:
        """Begin a feed of all daemons, or of one. Raises `ClientClosed` at the end."""
        if self._is_closed:
            raise ClientClosed("the client is being closed; nothing was sent")
        daemons = [found for found in self._daemons if daemon in {None, found[0]}]
        feed = Feed(daemons, wanted, random=self._random, idle=self._end)
        self._feeds.add(feed)
        feed.start()
        return feed

    def _end(self, feed: Feed) -> None:
        """End a feed that nobody listens to."""
        if feed.is_closed:
            return
        if self._shared.get(feed.wanted.namespace) is feed:
            del self._shared[feed.wanted.namespace]
        task = feed.loop.create_task(feed.aclose())
        self._ending.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._ending.discard(task)
            self._feeds.discard(feed)

        task.add_done_callback(over)

    def cancel(self) -> None:
        """End all, without waiting."""
        self._is_closed = True
        for feed in list(self._feeds):
            feed.cancel()

    async def aclose(self) -> None:
        """End all, and wait for that."""
        self.cancel()
        tasks = [task for feed in self._feeds for task in (*feed.tasks, *feed.guests)]
        self._shared.clear()
        await reap([*tasks, *self._ending])
        self._feeds.clear()


# What a caller iterates over


@final
class EventStream:
    """The busts of all daemons, as they are told: `BustEvent`s, and a `Reset` wherever some may have been missed.

    ```python
    async with client.events(prefix="products/") as events:
        async for event in events:
            ...
    ```

    It begins with its block, or with the first event that is waited for, and ends with `aclose` or with the client. If
    more than a thousand events wait for a slow reader, they are dropped for a `Reset`. Iterating raises
    `IncompatibleDaemon` or `NotAllowed` if the hub, or the daemon that was named, has no events for this client. What
    is told by several daemons that share a log comes once. One event loop only, and one task at a time, which a
    second one that iterates meanwhile is told by `RuntimeError`.
    """

    def __init__(self, begin: Callable[[], Awaitable[Feed]]) -> None:
        self._begin = begin
        self._feed: Feed | None = None
        self._waiting: deque[BustEvent | Reset] = deque()
        self._wake: asyncio.Event | None = None
        self._has_ended = False
        self._is_read = False
        self._silent: set[str] = set()
        self._told: OrderedDict[tuple[str, int], None] = OrderedDict()

    def __repr__(self) -> str:
        state = "ended" if self._has_ended else "not begun" if self._feed is None else repr(self._feed)
        return f"EventStream({state}, {len(self._waiting)} waiting)"

    @property
    def is_live(self) -> bool:
        """Whether every daemon has told what was missed, and is followed."""
        return self._feed is not None and not self._feed.is_closed and self._feed.is_live

    @property
    def reason(self) -> str:
        """Why it is not live; empty if it is."""
        return "" if self.is_live else "not begun" if self._feed is None else self._feed.why_not() or "it has ended"

    async def wait_live(self, timeout: float | None = None) -> None:
        """Wait until it is live. Raises `TimeoutError` after `timeout` seconds, and otherwise as iterating does."""
        feed = await self._start()
        async with asyncio.timeout(timeout):
            while not self.is_live:
                self._check(feed)
                if feed.is_closed:
                    raise ClientClosed("the client was closed, or this stream of events")
                await feed.wait_changed()

    async def aclose(self) -> None:
        """End. What waits is dropped, and whoever waits for an event comes to the end. Repeating it is harmless."""
        self._has_ended = True
        self._waiting.clear()
        if self._wake is not None:
            self._wake.set()
        feed = self._feed
        if feed is not None:
            feed.leave(self)
            await feed.aclose()

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BustEvent | Reset:
        if self._is_read:
            raise RuntimeError("another task waits for this stream's next event; begin a stream for each")
        self._is_read = True
        try:
            return await self._next()
        finally:
            self._is_read = False

    async def _next(self) -> BustEvent | Reset:
        if self._has_ended:
            raise StopAsyncIteration
        feed = await self._start()
        assert self._wake is not None  # noqa: S101 - made with the feed
        while not self._waiting:
            if feed.is_closed or self._has_ended:
                self._has_ended = True
                raise StopAsyncIteration
            self._check(feed)
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.popleft()

    async def _start(self) -> Feed:
        if self._feed is None and not self._has_ended:
            self._wake = asyncio.Event()
            feed = await self._begin()
            if not self._take(feed):
                await feed.aclose()
        if self._feed is None:
            raise ClientClosed("this stream of events was closed; begin another one")
        if self._feed.loop is not asyncio.get_running_loop():
            raise RuntimeError("this stream of events belongs to another event loop; begin one in each")
        return self._feed

    def _take(self, feed: Feed) -> bool:
        """Take a feed that was begun, unless another has come first, or the end."""
        if self._feed is not None or self._has_ended:
            return False
        self._feed = feed
        feed.join(self)
        return True

    def _check(self, feed: Feed) -> None:
        if (refusal := feed.refusal) is not None:
            raise failure("following the events", "exhausted", (refusal,), 0.0)

    # What its feed tells

    def busted(self, event: BustEvent) -> None:
        """Take in a bust."""
        if self._feed is not None and len(self._feed.followers) > 1:
            place = event.id, hash(replace(event, daemon=""))
            if place in self._told:
                return
            self._told[place] = None
            if len(self._told) > _MOST_WAITING:
                self._told.popitem(last=False)
        self._add(event)

    def reset(self, daemon: str, reason: str, *, first: bool) -> None:
        """Take in that something was missed; what waits is of no use then."""
        if not first:
            self._waiting.clear()
            self._add(Reset(daemon=daemon, reason=reason))

    def changed(self) -> None:
        """Wake whoever waits; tell once of a peer that has no events for us, so that its busts are missed."""
        feed = self._feed
        if feed is not None:
            for follower in feed.followers[1:]:
                if follower.refusal is not None and follower.url not in self._silent:
                    self._silent.add(follower.url)
                    self._add(Reset(daemon=follower.url, reason=follower.refusal.message))
        if self._wake is not None:
            self._wake.set()

    @staticmethod
    def limit(heartbeat: float) -> float:
        """Tell how long a stream may be silent."""
        return silence(heartbeat, None)

    def _add(self, event: BustEvent | Reset) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._waiting.clear()
            event = Reset(daemon=event.daemon, reason=f"more than {_MOST_WAITING} events waited for a slow reader")
        self._waiting.append(event)
