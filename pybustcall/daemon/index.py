"""What is registered, what it depends on, its tags and its lifetime, and which keys are variants of one another.

This module decides relations between keys, and when an entry is over. It removes nothing from any cache (the backends
do) and does not decide what a bust covers (the engine does). Everything here is synchronous and belongs to one thread.

Theory of operation. Entries, the names that they depend on, pairs of tag and key, and pairs of deadline and key are
each kept sorted, so that whatever begins alike lies side by side: a question is two bisections and a walk over the
answer, O(log n + m). What is empty is dropped at once, so that nothing is left of what was removed. A question in
batches goes on behind the last key that it told, in the order of keys: what is gone or came meanwhile does not matter.

A page that is made of a fragment is made of what that was made of, also when the fragment is no entry any more. So the
links of an entry that goes are kept as long as an entry depends on its name, also by way of others that are gone: what
is reached through them is found, and they themselves are in no answer. Links lose their last use when what depends on
them goes or is registered anew; then those names are loose, and are looked at, a slice at a time: whether an entry is
found on the way up, through what is gone. If none is, all that was met goes, in a cycle too, and loosens what it
depended on. One look mostly ends at the first step; it takes as many steps as there are kept links above at most.

Lifetimes end by themselves, and what is over is dropped by whoever comes next: each addition, and each question for
many, begins by dropping some, the earliest deadline first, and nobody drops more than a slice. As long as the earliest
deadline lies ahead that is one look at the clock. If more are over than that, the rest is still there and is left out
of every answer, by its own deadline; only then is that looked at. Questions for one key drop nothing, since they are
asked many at a time. docs/explanation/complexity.md counts the steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final
from weakref import WeakValueDictionary

from sortedcontainers import SortedDict, SortedList

from pybustcall.keys import ENCODINGS, SEPARATORS, ranges_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

__all__ = ["Entry", "Index", "Indexes", "TooManyNamespaces"]

_BATCH: Final = 500  # keys that going through all of them looks up at a time
_STRIDE: Final = 250  # names whose dependents are looked up at a time
_NONE: Final[frozenset[str]] = frozenset()
_AT_ONCE: Final = 250  # entries that are dropped at a time: about a millisecond


class TooManyNamespaces(Exception):
    """There are as many namespaces with entries as may be, and this would be another."""

    def __init__(self, most: int) -> None:
        super().__init__(f"there are entries in the most namespaces that there may be, {most}; use one of these")
        self.most = most


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of an entry.

    - `depends_on`, `tags`: each name once, in the order in which they were given
    - `ttl`: seconds that it is kept from its registration, None if for good; 0 if it is no entry any more, and nothing
      but what it depended on is kept
    - `deadline`: when that is over, by the index's clock
    - `born`: the generation that it was registered in
    - `stale`: marked as such since then
    """

    depends_on: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    ttl: float | None = None
    deadline: float | None = None
    born: int = 0
    stale: bool = False

    @property
    def gone(self) -> bool:
        """Whether it is no entry any more, and only its links are kept."""
        return self.ttl == 0

    def links(self) -> Entry:
        """Tell what is kept of it once it is gone."""
        return Entry(depends_on=self.depends_on, ttl=0.0, deadline=-math.inf)


@final
class _Generations:
    """The counter of generations. It only ever rises."""

    def __init__(self) -> None:
        self.current = 0


class _Share(NamedTuple):
    """What an index holds.

    - `entries`, `size`: how many, and how many bytes of keys
    - `kept`: of how many that are gone the links
    - `due`: when there is something to drop: when the first entry is over, or long ago if links may be of no use
    """

    entries: int = 0
    size: int = 0
    kept: int = 0
    due: float | None = None


@final
@dataclass(frozen=True, slots=True)
class _House:
    """What an index has in common with those of other namespaces, and whom it asks and tells. By itself: nobody.

    - `admit`: asked before its first entry; raises `TooManyNamespaces`
    - `changed`: told what it holds after each change
    - `tell`: told the key, and what was known of it before
    """

    generations: _Generations = field(default_factory=_Generations)
    admit: Callable[[], None] = lambda: None
    changed: Callable[[Index, _Share], None] = lambda _index, _share: None
    tell: Callable[[str, Entry | None], None] = lambda _key, _before: None


@final
class Index:
    """The registry of entries, and of which entry was made of what.

    - `clock`: tells seconds, for lifetimes, and never goes back
    - `at_once`: how many entries that are over one addition or question drops at most
    - `house`: not for callers; what `Indexes` ties its indexes together with

    A key may be depended on without being an entry itself: `product:7` is no file and no cached page, but pages are
    made of it. What has outlived its lifetime is no entry any more, for whatever is asked. Not safe between threads.

    Of what is gone the links stay as long as an entry depends on its name, also by way of others. So they take no more
    room than what was registered under names that what is registered now was made of, once for each name.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        at_once: int = _AT_ONCE,
        house: _House | None = None,
    ) -> None:
        self._clock = clock
        self._at_once = at_once
        self._house = house or _House()
        self._entries: SortedDict[str, Entry] = SortedDict()
        self._dependents: SortedDict[str, set[str]] = SortedDict()
        self._tagged: SortedList[tuple[str, str]] = SortedList()
        self._deadlines: SortedList[tuple[float, str]] = SortedList()
        self._kept: dict[str, Entry] = {}  # the links of what is gone
        self._loose: dict[str, None] = {}  # names of which they may have lost their use
        self._changed: dict[str, Entry | None] = {}  # what is still to be told
        self._size = 0
        self._expiring = False
        self._tell: Callable[[str, Entry | None], None] | None = None

    def watch(self, tell: Callable[[str, Entry | None], None] | None) -> None:
        """Have every change told once it is made: the key, and what was known of it before, None if nothing was.

        What is over is told as what was removed, when it is dropped, and so are links that were kept; a stale mark is
        not told. There is one watcher at a time; None is nobody.
        """
        self._tell = tell

    # Changes

    def add(
        self, key: str, depends_on: Iterable[str] = (), *, tags: Iterable[str] = (), ttl: float | None = None
    ) -> None:
        """Register an entry; if it is known already, all that was known of it is replaced, and it is not stale.

        It is kept for `ttl` seconds from now, or for good. Raises ValueError unless that is more than 0.
        """
        self.expire()
        if ttl is not None and not ttl > 0:
            raise ValueError("ttl must be more than 0 seconds; give None to keep an entry for good")
        entry = self._made(key, Entry(depends_on=tuple(depends_on), tags=tuple(tags), ttl=ttl))
        if len(self._entries) <= self.overdue:
            self._house.admit()
        self._turn(key, entry)
        self._end_change()

    def put_back(self, entries: Mapping[str, Entry | None]) -> None:
        """Undo changes: from now on each key is again what it was, with its birth, its deadline and its mark.

        None is nothing at all. Links of what was gone already are kept again if they are of use.
        """
        for key, entry in entries.items():
            self._turn(key, entry)
        self._end_change()

    def update(self, entries: Mapping[str, Entry]) -> None:
        """Register many at once, as by `add`: of each counts what it depends on, its tags, and its lifetime.

        Of what is gone (`Entry.gone`) the links are kept if they are of use. Here it is not asked whether there may be
        another namespace: this is for what was there before a restart.
        """
        self.expire()
        given = {key: self._made(key, entry) for key, entry in entries.items()}
        made = {key: entry for key, entry in given.items() if not entry.gone}
        for key in given:
            if key in self._entries or key in self._kept:
                self._turn(key, None)
            self._changed.setdefault(key, None)
        self._entries.update(made)
        self._size += sum(map(_size_of, made))
        for key, entry in given.items():
            if entry.gone:
                self._kept[key] = entry
                self._loose[key] = None
        links: dict[str, set[str]] = {}
        for key, entry in given.items():
            for name in entry.depends_on:
                links.setdefault(name, set()).add(key)
        self._dependents.update({name: keys | self._dependents.get(name, set()) for name, keys in links.items()})
        self._tagged.update((tag, key) for key, entry in made.items() for tag in entry.tags)
        self._deadlines.update((it.deadline, key) for key, it in made.items() if it.deadline is not None)
        self._end_change()

    def remove(self, key: str) -> bool:
        """Forget an entry and all that was known of it; tell whether it was known.

        What depends on it stays registered, and goes on depending on what it depended on.
        """
        before = self._entries.get(key)
        if before is None:
            return False
        self._forget(key, before)
        self._end_change()
        return before.deadline is None or not _is_over(before, self._clock())

    def mark_stale(self, key: str) -> bool:
        """Mark an entry as stale until it is registered again; tell whether it was known, and not stale already."""
        entry = self.entry(key)
        if entry is None or entry.stale:
            return False
        self._entries[key] = replace(entry, stale=True)
        return True

    def expire(self, most: int | None = None) -> int:
        """Drop entries that have outlived their lifetimes, and links that have lost their use; tell how many were seen.

        At most `most` (`at_once`) are. Those entries that are left are none all the same. While a watcher is told,
        nothing is dropped. O(1) if there is nothing to drop.
        """
        if self._expiring or not (self._deadlines or self._loose):
            return 0
        limit = self._at_once if most is None else most
        count = self._tie_up(limit)
        now = self._clock() if self._deadlines else 0.0
        while count < limit and self._deadlines and self._deadlines[0][0] <= now:
            key = self._deadlines[0][1]
            self._forget(key, self._entries[key])
            count += 1 + self._tie_up(limit - count - 1)
        if count:
            self._expiring = True
            try:
                self._publish()
            finally:
                self._expiring = False
        return count

    @property
    def overdue(self) -> int:
        """How many have outlived their lifetimes and are still to be dropped. O(log n), and O(1) if none is."""
        if not self._deadlines or self._deadlines[0][0] > (now := self._clock()):
            return 0
        return self._deadlines.bisect_left((math.nextafter(now, math.inf), ""))

    def _made(self, key: str, given: Entry) -> Entry:
        made = Entry(
            depends_on=tuple(dict.fromkeys(name for name in given.depends_on if name != key)),
            tags=tuple(dict.fromkeys(given.tags)),
            ttl=given.ttl,
            deadline=None if given.ttl is None else self._clock() + given.ttl,
            born=self._house.generations.current,
        )
        return made.links() if given.gone else made

    def _forget(self, key: str, entry: Entry) -> None:
        self._turn(key, entry.links() if entry.depends_on and key in self._dependents else None)

    def _turn(self, key: str, entry: Entry | None) -> None:
        """Have a key be this instead of what it was. What it goes on depending on does not get loose in between."""
        before = self._entries.pop(key, None)
        if before is None:
            before = self._kept.pop(key, None)
        else:
            self._size -= _size_of(key)
            for tag in before.tags:
                self._tagged.remove((tag, key))
            if before.deadline is not None:
                self._deadlines.remove((before.deadline, key))
        self._changed.setdefault(key, before)
        links = () if entry is None else entry.depends_on
        for name in links:
            self._dependents.setdefault(name, set()).add(key)
        if before is not None:
            for name in before.depends_on if not links else set(before.depends_on).difference(links):
                self._loosen(name, key)
        if entry is None:
            return
        if entry.gone:
            self._kept[key] = entry
            self._loose[key] = None
            return
        self._entries[key] = entry
        self._size += _size_of(key)
        for tag in entry.tags:
            self._tagged.add((tag, key))
        if entry.deadline is not None:
            self._deadlines.add((entry.deadline, key))

    def _loosen(self, name: str, key: str) -> None:
        keys = self._dependents[name]
        keys.remove(key)
        if not keys:
            del self._dependents[name]
        if name in self._kept:
            self._loose[name] = None

    def _tie_up(self, most: int) -> int:
        """Look at names that are loose, at most `most`, and drop links that are of no use; tell how many were seen."""
        count = 0
        while self._loose and count < most:
            name, _ = self._loose.popitem()
            count += 1
            kept = self._kept.get(name)
            if kept is None:
                continue
            if name in self._dependents and not any(it in self._kept for it in kept.depends_on):
                # It is in no cycle of what is gone: if what depends on it is of no use, that goes by itself.
                continue
            for unused in self._without_use(name):
                self._turn(unused, None)
                count += 1
        return count

    def _without_use(self, name: str, now: float = -math.inf) -> set[str]:
        """Go up from a name through what is gone, or over by now; tell all that was met, but nothing if an entry was.

        The first way up is gone to its end before the next: mostly an entry is there.
        """
        met: set[str] = set()
        ways = [iter(self._dependents.get(name, _NONE))]
        while ways:
            key = next(ways[-1], None)
            if key is None:
                ways.pop()
            elif key not in met:
                entry = self._entries.get(key)
                if entry is not None and not _is_over(entry, now):
                    return set()
                met.add(key)
                ways.append(iter(self._dependents.get(key, _NONE)))
        return met | {name}

    def _end_change(self) -> None:
        self._tie_up(_AT_ONCE)
        self._publish()

    def _publish(self) -> None:
        """Tell the others what has changed, once all of it is made."""
        due = self._deadlines[0][0] if self._deadlines else None
        if self._loose:
            due = -math.inf
        self._house.changed(self, _Share(len(self._entries), self._size, len(self._kept), due))
        changed, self._changed = self._changed, {}
        for key, before in changed.items():
            self._house.tell(key, before)
            if self._tell is not None:
                self._tell(key, before)

    # Generations

    @property
    def generation(self) -> int:
        """The number of the generation that entries are born in now."""
        return self._house.generations.current

    def begin(self) -> int:
        """Begin a generation; tell its number: what was there before was born under a lower one.

        Indexes of one daemon count together.
        """
        self._house.generations.current += 1
        return self._house.generations.current

    def born(self, key: str) -> int | None:
        """Tell the generation that the entry `key` was registered in; None if it is no entry."""
        entry = self.entry(key)
        return None if entry is None else entry.born

    # One entry

    def __contains__(self, key: str) -> bool:
        return self.entry(key) is not None

    def entry(self, key: str) -> Entry | None:
        """Tell all that is known of the entry `key`; None if it is no entry."""
        entry = self._entries.get(key)
        if entry is None or (entry.deadline is not None and _is_over(entry, self._clock())):
            return None
        return entry

    def known(self, key: str) -> Entry | None:
        """Tell what a restart must still know of `key`: as `entry`, or the links that are kept of what is gone."""
        entry = self._entries.get(key)
        if entry is None:
            return self._kept.get(key)
        if not _is_over(entry, self._clock()):
            return entry
        return entry.links() if entry.depends_on and key in self._dependents else None

    def is_stale(self, key: str) -> bool:
        """Tell whether `key` is an entry that was marked as stale since it was registered."""
        entry = self.entry(key)
        return entry is not None and entry.stale

    def tags(self, key: str) -> tuple[str, ...]:
        """List the tags of the entry `key`, in the order in which they were given; empty if it is no entry."""
        entry = self.entry(key)
        return () if entry is None else entry.tags

    def dependencies(self, key: str) -> tuple[str, ...]:
        """List what the entry `key` was registered as depending on, in that order; empty if it is no entry."""
        entry = self.entry(key)
        return () if entry is None else entry.depends_on

    # All of them

    def __len__(self) -> int:
        self.expire()
        return len(self._entries) - self.overdue

    def __iter__(self) -> Iterator[str]:
        """Go through the registered keys, in order. Entries may come and go meanwhile."""
        batch = self.keys(limit=_BATCH)
        while batch:
            yield from batch
            batch = self.keys(after=batch[-1], limit=_BATCH)

    def __repr__(self) -> str:
        return f"Index({len(self)} entries, {self._size} bytes of keys)"

    @property
    def size_bytes(self) -> int:
        """How many bytes of UTF-8 the registered keys have together, and those that are still to be dropped."""
        self.expire()
        return self._size

    def items(self) -> list[tuple[str, Entry]]:
        """List all entries with what is known of them, in the order of keys."""
        now = self._passed()
        return [(key, entry) for key, entry in self._entries.items() if now is None or not _is_over(entry, now)]

    def kept(self) -> list[tuple[str, Entry]]:
        """List what is gone and of which the links are kept, in no order."""
        return list(self._kept.items())

    def keys(self, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """List the registered keys, in order: those behind `after`, which need be no entry, at most `limit` of them."""
        now = self._passed()
        return self._answer(self._entries.irange(after, None, inclusive=(after is None, True)), now, limit)

    # What is named

    def under(self, prefix: str, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """List the entries that `prefix` covers, in order: those behind `after`, at most `limit` of them.

        The order is that of keys by code points: first the prefix itself, then what lies below it. So a bust in batches
        goes on behind the last key of the batch before, whether or not that is an entry still.
        """
        now = self._passed()
        return self._answer(_covered(self._entries, prefix, after), now, limit)

    def count_under(self, prefix: str) -> int:
        """Tell how many entries `prefix` covers, and those still to be dropped: O(log n), however many they are."""
        self.expire()
        bisect = self._entries.bisect_left
        below = sum(bisect(end) - bisect(begin) for begin, end in ranges_of(prefix))
        return below + (prefix[-1] not in SEPARATORS and prefix in self._entries)

    def tagged(self, tag: str, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """List the entries with this tag, in order: those behind `after`, at most `limit` of them."""
        now = self._passed()
        begin, end = _range_of(tag)
        pairs = self._tagged.irange(begin if after is None else (tag, after), end, inclusive=(after is None, False))
        return self._answer((key for _, key in pairs), now, limit)

    @property
    def has_tags(self) -> bool:
        """Whether any entry has a tag, or one that is still to be dropped."""
        return bool(self._tagged)

    def count_tagged(self, tag: str) -> int:
        """Tell how many entries have this tag, and those still to be dropped: O(log n), however many they are."""
        self.expire()
        begin, end = _range_of(tag)
        return self._tagged.bisect_left(end) - self._tagged.bisect_left(begin)

    def variants(self, key: str) -> list[str]:
        """List the entries that are variants of `key`, sorted: O(log n + m), m of them, whatever else begins alike."""
        found = []
        for encoding in ENCODINGS:
            if key + encoding in self._entries:
                found.append(key + encoding)
            found += _covered(self._entries, f"{key}{encoding}?")
        return self._answer((*found, *_covered(self._entries, f"{key}?")), self._passed(drop=False))

    # What depends on what

    def dependents(self, key: str) -> list[str]:
        """List the entries that depend on `key`, also by way of others, sorted; never `key` itself."""
        found: set[str] = set()
        for _ in self.walk([key], found):
            pass
        return sorted(found - {key})

    def direct(self, names: Iterable[str]) -> set[str]:
        """Tell what depends on any of these by itself; also what is gone, if its links are kept."""
        found: set[str] = set()
        for name in names:
            found |= self._dependents.get(name, _NONE)
        return found

    def walk(self, names: Iterable[str], found: set[str]) -> Iterator[list[str]]:
        """Go through the entries that depend on any of `names`, also by way of others, a few at a time.

        Each is told once, after one that it was found through, added to `found`, and left out if it was there before.
        The index may change between two answers; a list may be empty. What depends on what is left out is not looked
        for, since that was done. What is gone is not told, and gone through if its links are kept.
        """
        ahead = list(names)
        through: set[str] = set()
        name, pending = "", list[str]()  # of one name very much may depend
        while ahead or pending:
            now = self._passed(drop=False)
            batch: list[str] = []
            for _ in range(_STRIDE):
                if not pending:
                    if not ahead:
                        break
                    name = ahead.pop()
                    pending = list(self._dependents.get(name, _NONE))
                some = set(pending[-_STRIDE:])
                del pending[-_STRIDE:]
                new = (self._dependents.get(name, _NONE) & some) - found
                if now is not None or self._kept:
                    gone = self._not_held(new, now)
                    new -= gone
                    ahead += gone - through
                    through |= gone
                found |= new
                ahead += new
                batch += new
                if len(batch) >= _STRIDE:
                    break
            yield batch

    def subjects(self) -> list[str]:
        """List the names that entries depend on, also by way of what is gone, in order; they need be no entries."""
        return self._needed(self._dependents, self._passed())

    def subjects_under(self, prefix: str, *, after: str | None = None, limit: int | None = None) -> list[str]:
        """List those of the `subjects` that `prefix` covers, in order, behind `after`, at most `limit` of them."""
        return self._needed(_covered(self._dependents, prefix, after), self._passed(), limit)

    # What is over and still there

    def _passed(self, *, drop: bool = True) -> float | None:
        """Drop some of what is over; if not all of it, tell the time, by which the rest is left out of answers."""
        if drop:
            self.expire()
        return self._clock() if self.overdue else None

    def _answer(self, keys: Iterable[str], now: float | None, limit: int | None = None) -> list[str]:
        if now is not None:
            keys = (key for key in keys if not _is_over(self._entries[key], now))
        return list(islice(keys, limit))

    def _not_held(self, keys: AbstractSet[str], now: float | None) -> set[str]:
        """Tell those of the keys that are gone, or over by now."""
        gone = self._kept.keys() & keys  # takes as long as the fewer of both are
        if now is not None:
            gone |= {key for key in keys - gone if _is_over(self._entries[key], now)}
        return gone

    def _needed(self, names: Iterable[str], now: float | None, limit: int | None = None) -> list[str]:
        """List those of the names that entries depend on, at most `limit` of them."""
        if now is not None or self._loose:
            at = -math.inf if now is None else now
            names = (name for name in names if not self._without_use(name, at))
        return list(islice(names, limit))


def _is_over(entry: Entry, now: float) -> bool:
    return entry.deadline is not None and entry.deadline <= now


def _covered(names: SortedDict[str, Any], prefix: str, after: str | None = None) -> Iterator[str]:
    """Go through those of the names that a prefix covers, in order, from behind `after`."""
    if prefix[-1] not in SEPARATORS and prefix in names and (after is None or after < prefix):
        yield prefix
    for begin, end in ranges_of(prefix):
        if after is None or after < begin:
            yield from names.irange(begin, end, inclusive=(True, False))
        elif after < end:
            yield from names.irange(after, end, inclusive=(False, False))


def _range_of(tag: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Tell from where, and up to but without what, the pairs of a tag lie."""
    return (tag, ""), (tag + "\0", "")


def _size_of(key: str) -> int:
    return len(key.encode("utf-8", "surrogatepass"))


@final
class Indexes:
    """An index for each namespace, made on demand, with one counter of generations for all.

    - `most`: how many namespaces may have entries; those without any cost nothing and do not count
    - `clock`, `at_once`: as of `Index`

    Not safe between threads.
    """

    def __init__(
        self, *, most: int = 1000, clock: Callable[[], float] = time.monotonic, at_once: int = _AT_ONCE
    ) -> None:
        self._most = most
        self._clock = clock
        self._at_once = at_once
        self._generations = _Generations()
        self._held: dict[str, Index] = {}
        # An index without entries lives as long as somebody has it at hand, and what is added to it then is not lost.
        self._empty: WeakValueDictionary[str, Index] = WeakValueDictionary()
        self._shares: dict[str, _Share] = {}
        self._due: SortedList[tuple[float, str]] = SortedList()
        self._count = 0
        self._size = 0
        self._tell: Callable[[str, str, Entry | None], None] | None = None

    def watch(self, tell: Callable[[str, str, Entry | None], None] | None) -> None:
        """Have every change in any namespace told: the namespace, the key, and what was known of it before.

        See `Index.watch`, which stays free for somebody else.
        """
        self._tell = tell

    def of(self, namespace: str) -> Index:
        """Tell the index of a namespace; there is one, though it may be empty.

        Its `add` raises `TooManyNamespaces` if it is empty and there are `most` others that are not.
        """
        index = self._held.get(namespace)
        if index is None:
            index = self._empty.get(namespace)
        if index is None:
            house = _House(
                self._generations,
                lambda: self._admit(namespace),
                lambda index, share: self._account(namespace, index, share),
                lambda key, before: self._report(namespace, key, before),
            )
            index = self._empty[namespace] = Index(clock=self._clock, at_once=self._at_once, house=house)
        return index

    def peek(self, namespace: str) -> Index | None:
        """Tell the index of a namespace; None if it has no entry."""
        index = self._held.get(namespace)
        return None if index is None or not self._has_entries(namespace, index) else index

    def __iter__(self) -> Iterator[tuple[str, Index]]:
        """Go through the namespaces that have entries, in order, with their indexes."""
        self.expire()
        return iter(sorted((name, index) for name, index in self._held.items() if self._has_entries(name, index)))

    def __len__(self) -> int:
        """How many entries there are in all namespaces."""
        self.expire()
        return self._count - self.overdue

    @property
    def overdue(self) -> int:
        """How many have outlived their lifetimes and are still to be dropped, in all namespaces."""
        if not self._due or self._due[0][0] > (now := self._clock()):
            return 0
        due = self._due.irange(None, (math.nextafter(now, math.inf), ""), inclusive=(True, False))
        return sum(self._held[namespace].overdue for _, namespace in due)

    def _has_entries(self, namespace: str, index: Index) -> bool:
        return self._shares[namespace].entries > index.overdue

    def __repr__(self) -> str:
        return f"Indexes({len(list(self))} namespaces, {len(self)} entries, {self._size} bytes of keys)"

    @property
    def size_bytes(self) -> int:
        """How many bytes of UTF-8 the registered keys of all namespaces have together. See `Index.size_bytes`."""
        self.expire()
        return self._size

    @property
    def generation(self) -> int:
        """The number of the generation that entries are born in now, in every namespace."""
        return self._generations.current

    def begin(self) -> int:
        """Begin a generation in every namespace; tell its number. See `Index.begin`."""
        self._generations.current += 1
        return self._generations.current

    def expire(self, most: int | None = None) -> int:
        """Drop what is over or of no use in any namespace, as `Index.expire` does."""
        if not self._due:
            return 0
        now, limit, count = self._clock(), self._at_once if most is None else most, 0
        while self._due and self._due[0][0] <= now and count < limit:
            dropped = self._held[self._due[0][1]].expire(limit - count)
            if not dropped:
                break  # a watcher is told of that one just now, and asks
            count += dropped
        return count

    def _admit(self, namespace: str) -> None:
        if len(self._held) >= self._most:
            self.expire()
        if len(self._held) >= self._most:
            others = sum(self._has_entries(name, index) for name, index in self._held.items() if name != namespace)
            if others >= self._most:
                raise TooManyNamespaces(self._most)

    def _account(self, namespace: str, index: Index, share: _Share) -> None:
        before = self._shares.get(namespace, _Share())
        self._count += share.entries - before.entries
        self._size += share.size - before.size
        if share.due != before.due:
            if before.due is not None:
                self._due.remove((before.due, namespace))
            if share.due is not None:
                self._due.add((share.due, namespace))
        if share.entries or share.kept:
            self._shares[namespace] = share
            if namespace not in self._held:
                self._held[namespace] = index
                self._empty.pop(namespace, None)
        elif namespace in self._held:
            self._empty[namespace] = index
            del self._held[namespace], self._shares[namespace]

    def _report(self, namespace: str, key: str, before: Entry | None) -> None:
        if self._tell is not None:
            self._tell(namespace, key, before)
