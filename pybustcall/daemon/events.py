"""Who is told of which bust: the log of events, and the readers that follow it.

This module decides what an event says, how long it is kept, which readers it concerns, and when one of them has missed
something and must be told to forget. When a bust is told of is decided by `jobs`, how events outlive the process by the
`journal`, and how a stream reads on the wire by `app`. docs/explanation/events.md tells why it is so.

Theory of operation. Each event has a number, ever rising within the epoch of its log. The log keeps the newest; all
readers share it, and each is only a place in it, with a short list of what is due to it. A new event is handed to those
whom the router finds, by look-ups of what the event names and never by asking each reader. A reader that falls behind,
because its list is full or because what it asks for is no longer kept, has its list emptied and gets a reset, whose
number is that of the newest event: it must forget all that it holds, and is up to date by that.

Numbers outlive the process with the journal. What was told and not yet written when a process was killed belongs to
busts that are not over in the journal either, so that the next process does them, and tells of them, again. Each
process begins far beyond the numbers of the one before, by a leap that is chosen at random. So a number that some
process gave whose journal was lost, since a copy was put back, is none of this log: who comes back with it must forget.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, final

from sortedcontainers import SortedDict

from pybustcall.clock import clock
from pybustcall.keys import ENCODINGS, covers, prefixes_of, ranges_of

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from pybustcall.models import Kind

_Place = TypeVar("_Place")

__all__ = [
    "HEARTBEAT",
    "LEAP",
    "MOST_ALSO",
    "MOST_EVENTS",
    "MOST_PENDING",
    "BustEvent",
    "EventShelf",
    "Events",
    "Interest",
    "Reader",
    "TooManyReaders",
]

MOST_EVENTS: Final = 10_000
"""How many events are kept for readers that come back."""
MOST_BYTES: Final = 16_000_000
"""How many bytes of keys and tags the kept events have together at most."""
MOST_ALSO: Final = 1000
"""How many further keys an event can name; one that would have more is told as if everything had been busted."""
MOST_PENDING: Final = 1000
"""How many events may wait for one reader."""
MOST_PENDING_BYTES: Final = 1_000_000
"""How many bytes of events may wait for one reader, unless a single one has more."""
HEARTBEAT: Final = 5.0
"""Seconds after which a stream that has nothing to say says so."""
LEAP: Final = 2**36
"""How far numbers go on in the next process, at least; at most it is twice as far."""
UNWRITTEN: Final = 2**14
"""How many numbers a process that was killed may have given beyond the last one that is written."""

_ALSO_BYTES: Final = 65536
_MOST_TAGS: Final = 1000  # of the entries that one event is about
_STRIDE: Final = 250  # events looked through between two turns of the event loop
_CHUNK: Final = 65536  # bytes handed to a connection at a time, and one event more


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BustEvent:
    """A bust that was applied, as readers are told of it.

    - `also`: further keys of the namespace that went with the named: what bears the tag or depends on it, as far as the
      daemon knows. Variants of any of them (`pybustcall.keys.is_variant`) went, too, unless the strategy is "direct"
    - `tags`: of the registered entries among all of these; None where they could be any. They say only who is told, and
      are neither written nor kept by the journal
    """

    seq: int = 0
    namespace: str
    kind: Kind
    target: str
    soft: bool = False
    strategy: str = "dimensional"
    also: tuple[str, ...] = ()
    tags: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 200 + _bytes_of(self.target) + sum(map(_bytes_of, (*self.also, *(self.tags or ()))))

    def bounded(self) -> BustEvent:
        """Make it short enough to tell: one that names very many keys is told as everything in its namespace.

        One with very many tags concerns all who want some tag.
        """
        if not _is_short(self.also, MOST_ALSO):
            return replace(self, kind="all", target="*", also=(), tags=None)
        return self if _is_short(self.tags or (), _MOST_TAGS) else replace(self, tags=None)

    def encoded(self, epoch: str) -> bytes:
        """Write it as a stream does."""
        said: dict[str, object] = {
            "namespace": self.namespace,
            "kind": self.kind,
            "target": self.target,
            "soft": self.soft,
            "strategy": self.strategy,
        }
        if self.also:
            said["also"] = self.also
        return block("bust", f"{epoch}-{self.seq}", said)


def _is_short(texts: Sequence[str], most: int) -> bool:
    return len(texts) <= most and sum(map(_bytes_of, texts)) <= _ALSO_BYTES


def block(name: str, place: str, said: dict[str, object], *, at: str = "") -> bytes:
    """Write an event of a stream; JSON has no line ends outside of its escapes. `at`: its date, if it has one."""
    data = json.dumps(said, separators=(",", ":"), ensure_ascii=False)
    return f"id: {place}\n{at}event: {name}\ndata: {data}\n\n".encode()


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _dated(events: bytes) -> bytes:
    """Put the date into the last of several events."""
    return events.removesuffix(b"\n") + f"{_at()}\n".encode()


def _at() -> str:
    """Write what time it is, so that a reader knows how old is what it reads."""
    return f"at: {clock():.3f}\n"


# Whom an event concerns


@final
@dataclass(frozen=True, slots=True)
class Interest:
    """What a reader wants to be told of, in one namespace: all, or what concerns these prefixes or tags."""

    namespace: str
    prefixes: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return not (self.prefixes or self.tags)

    def concerns(self, event: BustEvent) -> bool:
        """Tell whether what was busted could be something that this reader holds. What the router does, one by one."""
        if event.namespace != self.namespace:
            return False
        if self.is_everything or event.kind == "all" or self._has_tag_of(event):
            return True
        wide = event.strategy != "direct"
        named = () if event.kind == "tag" else (event.target,)
        below = event.target if event.kind == "prefix" else None
        return any(
            any(covers(prefix, key) or (wide and _begins_variant(key, prefix)) for key in (*named, *event.also))
            or (below is not None and covers(below, prefix))
            for prefix in self.prefixes
        )

    def _has_tag_of(self, event: BustEvent) -> bool:
        if event.kind == "tag" and event.target in self.tags:
            return True
        return bool(self.tags) if event.tags is None else not self.tags.isdisjoint(event.tags)


def _begins_variant(key: str, prefix: str) -> bool:
    """Tell whether variants of `key` could lie below `prefix`."""
    return prefix.startswith(tuple(f"{key}{mark}" for mark in ("?", *ENCODINGS)))


@final
class _Router:
    """Finds the readers that an event concerns, by what it names."""

    def __init__(self) -> None:
        self._everything: dict[str, set[Reader]] = {}
        self._tagged: dict[tuple[str, str], set[Reader]] = {}
        self._of_tags: dict[str, set[Reader]] = {}  # those that want some tag
        self._below: dict[str, SortedDict[str, set[Reader]]] = {}
        self._some: dict[str, set[Reader]] = {}  # those that want only some of the namespace

    def add(self, reader: Reader) -> None:
        interest = reader.interest
        if interest.is_everything:
            self._everything.setdefault(interest.namespace, set()).add(reader)
            return
        self._some.setdefault(interest.namespace, set()).add(reader)
        for tag in interest.tags:
            self._tagged.setdefault((interest.namespace, tag), set()).add(reader)
            self._of_tags.setdefault(interest.namespace, set()).add(reader)
        if interest.prefixes:
            below = self._below.setdefault(interest.namespace, SortedDict())
            for prefix in interest.prefixes:
                below.setdefault(prefix, set()).add(reader)

    def discard(self, reader: Reader) -> None:
        interest = reader.interest
        _drop(self._everything, interest.namespace, reader)
        _drop(self._some, interest.namespace, reader)
        _drop(self._of_tags, interest.namespace, reader)
        for tag in interest.tags:
            _drop(self._tagged, (interest.namespace, tag), reader)
        if (below := self._below.get(interest.namespace)) is not None:
            for prefix in interest.prefixes:
                _drop(below, prefix, reader)
            if not below:
                del self._below[interest.namespace]

    def concerned(self, event: BustEvent) -> set[Reader]:
        """List those whom the event concerns: `Interest.concerns` is true of exactly these."""
        found = set(self._everything.get(event.namespace, ()))
        if event.kind == "all":
            return found | self._some.get(event.namespace, set())
        if event.namespace in self._of_tags:
            found |= self._concerned_by_tags(event)
        below = self._below.get(event.namespace)
        if below is not None:
            named = () if event.kind == "tag" else (event.target,)
            for key in (*named, *event.also):
                for prefix in prefixes_of(key):
                    found |= below.get(prefix, set())
                if event.strategy != "direct":
                    for mark in ("?", *ENCODINGS):
                        _gather(below, key + mark, f"{key}{mark[:-1]}{chr(ord(mark[-1]) + 1)}", found)
            if event.kind == "prefix":
                for begin, end in ranges_of(event.target):
                    _gather(below, begin, end, found)
        return found

    def _concerned_by_tags(self, event: BustEvent) -> set[Reader]:
        if event.tags is None:
            return self._of_tags[event.namespace]
        found: set[Reader] = set()
        for tag in (*event.tags, event.target) if event.kind == "tag" else event.tags:
            found |= self._tagged.get((event.namespace, tag), set())
        return found


def _gather(below: SortedDict[str, set[Reader]], begin: str, end: str, found: set[Reader]) -> None:
    """Add the readers of all prefixes from `begin` up to, but without, `end`."""
    for prefix in below.irange(begin, end, inclusive=(True, False)):
        found |= below[prefix]


def _drop(places: MutableMapping[_Place, set[Reader]], place: _Place, reader: Reader) -> None:
    """Take a reader out of a place, and an empty place out of its table."""
    if (readers := places.get(place)) is not None:
        readers.discard(reader)
        if not readers:
            del places[place]


# The log


class EventShelf(Protocol):
    """What keeps events longer than the process: the journal."""

    @property
    def epoch(self) -> str:
        """The epoch of the numbers that it has."""

    @property
    def last_event(self) -> int:
        """The number after which events get theirs."""

    @property
    def spans(self) -> Sequence[tuple[int, int]]:
        """The numbers that events may have had before, each span from and up to, in their order."""

    @property
    def floor(self) -> int:
        """Up to which number it holds nothing."""

    @property
    def events(self) -> Sequence[BustEvent]:
        """What it holds, in the order of their numbers."""

    def put_event(self, event: BustEvent) -> None:
        """Keep it, before whatever is put later."""

    def drop_events(self, through: int) -> None:
        """Keep none any more up to this number."""


class TooManyReaders(Exception):
    """There are as many readers of one principal as there may be."""

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} readers with these credentials follow the events already, and more may not")


@final
class Events:
    """The events of one daemon, and those who follow them.

    - `most`, `most_bytes`: how many events are kept for readers that come back, of how many bytes; the newest always is
    - `most_readers`: how many may follow at a time, of each principal
    - `most_pending`: how many events may wait for one reader
    - `heartbeat`: seconds after which a stream that has nothing to say says so

    Belongs to one event loop. Readers that are left when it is closed come to their end.
    """

    def __init__(
        self,
        *,
        most: int = MOST_EVENTS,
        most_bytes: int = MOST_BYTES,
        most_readers: int = 1000,
        most_pending: int = MOST_PENDING,
        heartbeat: float = HEARTBEAT,
    ) -> None:
        self.epoch = secrets.token_hex(8)
        self.heartbeat = heartbeat
        self.most_pending = most_pending
        self._most = most
        self._most_bytes = most_bytes
        self._most_readers = most_readers
        self._last = 0
        self._floor = 0  # up to this number nothing is kept
        self._base = 0  # after which numbers are given
        self._spans: Sequence[tuple[int, int]] = ()  # those that processes before may have given
        self._kept: SortedDict[int, BustEvent] = SortedDict()
        self._bytes = 0
        self._shelf: EventShelf | None = None
        self._router = _Router()
        self._readers: dict[str, set[Reader]] = {}
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Events({self.place}, {len(self._kept)} kept, {self.readers} readers)"

    @property
    def place(self) -> str:
        """The id of the newest event."""
        return f"{self.epoch}-{self._last}"

    @property
    def readers(self) -> int:
        """How many follow now."""
        return sum(map(len, self._readers.values()))

    def attach(self, shelf: EventShelf) -> None:
        """Go on where a process before this one ended. Before the first event is told."""
        self._shelf = shelf
        self.epoch, self._last = shelf.epoch, shelf.last_event
        self._base, self._spans, self._floor = self._last, shelf.spans, shelf.floor
        self._kept = SortedDict({event.seq: event for event in shelf.events})
        self._bytes = sum(event.size for event in self._kept.values())
        self._trim()

    def tell(self, event: BustEvent) -> None:
        """Give an event its number, keep it, and hand it to those whom it concerns."""
        event = replace(event.bounded(), seq=self._last + 1)
        self._last = event.seq
        self._kept[event.seq] = event
        self._bytes += event.size
        if self._shelf is not None:
            self._shelf.put_event(event)
        self._trim()
        if readers := self._router.concerned(event):
            text = event.encoded(self.epoch)
            for reader in readers:
                reader.push(text)

    def _trim(self) -> None:
        before = self._floor
        while len(self._kept) > 1 and (len(self._kept) > self._most or self._bytes > self._most_bytes):
            self._floor, oldest = self._kept.popitem(0)
            self._bytes -= oldest.size
        if self._shelf is not None and self._floor != before:
            self._shelf.drop_events(self._floor)

    # Following

    def follow(self, interest: Interest, *, after: str | None = None, whose: str = "") -> Reader:
        """Begin to follow: what comes from now on, or what came after the event with the id `after`.

        If that is of another epoch, no longer kept, or no id at all, the reader begins with a reset. `whose` names the
        principal. Raises `TooManyReaders`. The reader must be closed.
        """
        readers = self._readers.setdefault(whose, set())
        if len(readers) >= self._most_readers:
            raise TooManyReaders(self._most_readers)
        seen = self._last if after is None else self._number_of(after)
        reader = Reader(self, interest, seen)
        readers.add(reader)
        self._router.add(reader)
        reader.on_close(lambda: self._leave(reader, whose))
        if self._is_closed:
            reader.end()
        return reader

    def _leave(self, reader: Reader, whose: str) -> None:
        self._router.discard(reader)
        _drop(self._readers, whose, reader)

    def _number_of(self, place: str) -> int | None:
        """Tell up to which event somebody has read; None if that cannot be told from here."""
        epoch, _, number = place.rpartition("-")
        if epoch != self.epoch or not (number.isascii() and number.isdigit()) or len(number) > 19:
            return None
        seen = int(number)
        if seen < self._floor:
            return None
        spans = ((self._base, self._last), *self._spans)
        return seen if any(begin <= seen <= until for begin, until in spans) else None

    @property
    def newest(self) -> int:
        """The number of the newest event."""
        return self._last

    def missed(self, seen: int) -> bool:
        """Tell whether events after that number are no longer kept."""
        return seen < self._floor

    def between(self, seen: int, until: int, limit: int) -> list[BustEvent]:
        """List at most `limit` events after the one, up to the other."""
        return [self._kept[seq] for seq in islice(self._kept.irange(seen + 1, until), limit)]

    def close(self) -> None:
        """Have all readers come to their end, now and later."""
        self._is_closed = True
        for readers in list(self._readers.values()):
            for reader in list(readers):
                reader.end()


@final
class Reader:
    """One reader's place in the log. Iterating tells what to write to it next, and ends with the log.

    - first what it has missed, or a reset; then "live"; then events as they come, and heartbeats between them
    """

    def __init__(self, events: Events, interest: Interest, seen: int | None) -> None:
        self.interest = interest
        self._events = events
        self._seen = events.newest if seen is None else seen  # how far the log was looked through
        self._until = events.newest  # from here on events come by `push`
        self._is_lost = seen is None
        self._is_live = False
        self._has_ended = False
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._closing: Callable[[], None] = lambda: None

    def __aiter__(self) -> Reader:
        return self

    def on_close(self, act: Callable[[], None]) -> None:
        """Have this done once the reader is closed."""
        self._closing = act

    def push(self, text: bytes) -> None:
        """Hand in an event. If there are too many already, all are dropped for a reset."""
        if self._is_lost:
            return  # the reset will have the number of the newest event
        full = len(self._pending) >= self._events.most_pending
        if full or (self._pending and self._pending_bytes + len(text) > MOST_PENDING_BYTES):
            self._is_lost = True
            self._drop()
        else:
            self._pending.append(text)
            self._pending_bytes += len(text)
        self._wake.set()

    def end(self) -> None:
        """Come to the end, without what is still due."""
        self._has_ended = True
        self._wake.set()

    def close(self) -> None:
        """Follow no more. Repeating it is harmless."""
        act, self._closing = self._closing, lambda: None
        act()
        self.end()

    async def __anext__(self) -> bytes:
        while True:
            if self._has_ended:
                raise StopAsyncIteration
            if self._is_lost or (self._seen < self._until and self._events.missed(self._seen)):
                return self._reset()
            if self._seen < self._until:
                if text := self._catch_up():
                    return text
                await asyncio.sleep(0)
                continue
            if self._pending or not self._is_live:
                text = self._due()
                if self._pending:
                    return text
                text = _dated(text) if self._is_live else text + self._live()
                self._is_live = True
                return text
            self._wake.clear()
            try:
                async with asyncio.timeout(self._events.heartbeat):
                    await self._wake.wait()
            except TimeoutError:
                if not self._wake.is_set():  # on a loop that was late both can come in one turn
                    return self._beat()

    def _reset(self) -> bytes:
        self._is_lost = False
        self._drop()
        self._seen = self._until = self._events.newest
        return block("reset", self._events.place, {"reason": "events were missed that are no longer kept"})

    def _catch_up(self) -> bytes:
        """Look on through the log; what comes meanwhile is pushed."""
        found = self._events.between(self._seen, self._until, _STRIDE)
        taken, size = [], 0
        for event in found:
            self._seen = event.seq
            if self.interest.concerns(event):
                taken.append(event.encoded(self._events.epoch))
                size += len(taken[-1])
                if size >= _CHUNK:
                    return b"".join(taken)
        if len(found) < _STRIDE:
            self._seen = self._until
        return b"".join(taken)

    def _drop(self) -> None:
        self._pending.clear()
        self._pending_bytes = 0

    def _due(self) -> bytes:
        """Take what is due, or the first of it if that is much: whoever is slow takes up no more than so much."""
        taken, size = [], 0
        while self._pending and size < _CHUNK:
            taken.append(self._pending.popleft())
            size += len(taken[-1])
        self._pending_bytes -= size
        return b"".join(taken)

    # Each of these is written when nothing more is due: all that was busted by then has been told.

    def _live(self) -> bytes:
        """Tell that all that was missed has been told, and how far that is."""
        return block("live", self._events.place, {"heartbeat": self._events.heartbeat}, at=_at())

    def _beat(self) -> bytes:
        return f": heartbeat\nid: {self._events.place}\n{_at()}\n".encode()
