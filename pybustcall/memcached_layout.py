"""How entries lie in a memcached server: the names of items, what they hold, and the commands that touch them.

This module decides what a command says and what its answer means, and nothing runs here: it knows no connection and no
event loop. What readers do with an entry is decided by `integrations.memcached`, what a bust does by the daemon.

Theory of operation. memcached has neither scripts nor a way to list keys. So what a bust covers is never looked for;
each reader finds out whether what it has was busted.

    P:e:HASH   an entry, or the place of one that is being made (flags 0, no value)
    P:g:HASH   a generation: 16 random bytes, a hard and a soft half
    P:l:HASH   the lease of the one reader that makes a stale entry anew
    P:m        a mark, whose CAS number tells what is older than a bust

HASH is of the namespace and of what it stands for, since names are short, and have no spaces. So an entry says in its
value whose it is: its namespace, its key and its tags, and a digest of the generations that it was made under.

There is a generation for everything in the namespace, one for each beginning of a key that ends with one of the marks
`/:?#`, and one for each tag. An entry is alive if all the hard halves that cover it are those that it was made under,
and fresh if the soft ones are, too. A hard bust deletes the generation, and who needs it next makes a new one; a soft
bust puts another soft half in. So what the server loses, because it is full or was restarted, can only be busted by
that, and never come back; and a bust leaves nothing behind. Nothing is counted, and nothing looks at a clock.

A key needs no generation, for its entry is one item. A hard bust deletes it, a soft one marks it as stale, by which
its CAS number changes. A reader that finds nothing leaves the place of the entry there, and who stores presents the CAS
number that was there when it looked. What was deleted or marked since is refused by the server itself.

A prefix `a` covers `a`, and what begins with `a/`, `a:`, `a?` or `a#`: one key, and four beginnings. The variants of
`a` are `a?...`, `a.gz` and `a.gz?...`, and so on: five keys, and five beginnings. So each bust but one of a tag, or of
everything, is of a few items, whatever it covers.

Which tags an entry will have may be known only when it has been made. So each bust of a tag first deletes one
generation more, the namespace's `sequence`. As long as that is what it was when the making began, no tag was busted.

CAS numbers of one run of a server have an order: who was stored later has the higher one. Only what is spared and
counted rests on that. They begin anew with the server; but then all generations are new, too.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, final

from pybustcall.keys import ENCODINGS, SEPARATORS
from pybustcall.models import check_namespace
from pybustcall.redis_layout import DEFAULT_PREFIX, check_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pybustcall.models import Kind

__all__ = [
    "DEFAULT_PREFIX",
    "LEAST_LEASE",
    "LONGEST_TTL",
    "Answer",
    "Command",
    "Entry",
    "Freshness",
    "Layout",
    "Reach",
    "Token",
    "add",
    "bust",
    "check_prefix",
    "delete",
    "generation_of",
    "inspect",
    "is_entry",
    "judge",
    "put_mark",
    "read",
    "reserve",
    "soften",
    "store",
    "take",
]

LONGEST_TTL: Final = 30 * 24 * 3600
LEAST_LEASE: Final = 2
"""Seconds. What is longer, memcached would take for a time of the calendar; an entry ends by then at the latest."""

_ENTRY: Final = 1  # the flags of an entry, by which it is told from the place of one; and which layout its value has
_HALF: Final = 8  # bytes
_DIGEST: Final = 16  # bytes
_HEADER: Final = struct.Struct(f"!{_DIGEST}s{_DIGEST}sBHI")  # digests; lengths of the namespace, the key and the tags
_MADE_WITHIN: Final = 3600  # seconds after which the place of an entry that nobody stored is given up

Freshness = Literal["dead", "stale", "fresh"]


# What is said to a server


@final
@dataclass(frozen=True, slots=True)
class Command:
    """A line, without its end, and the value that follows; `until` is the last line of an answer of many."""

    line: bytes
    value: bytes | None = None
    until: bytes = b""


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says to one command.

    - `code`: "HD", "VA", "EN" and so on
    - `flags`: what was asked for, each under its letter
    - `value`: what is held, where that was asked for
    - `text`: the whole line, or all lines, of an answer that has no flags
    """

    code: str
    flags: Mapping[str, str] = field(default_factory=dict)
    value: bytes = b""
    text: str = ""

    @property
    def done(self) -> bool:
        """Whether the command had its effect."""
        return self.code == "HD"

    @property
    def cas(self) -> int:
        """The CAS number of an item; 0 if there is none, or if the server was told to have none."""
        number = self.flags.get("c", "")
        return int(number) if number.isdecimal() else 0


def inspect(name: bytes) -> Command:
    """Look at an item without its value, and leave it as likely to be evicted as it is."""
    return Command(b"mg %b c f u" % name)


def read(name: bytes) -> Command:
    """Read an item."""
    return Command(b"mg %b c f v" % name)


def reserve(name: bytes) -> Command:
    """Read an item; if there is none, make the place of one."""
    return Command(b"mg %b c f v N%d" % (name, _MADE_WITHIN))


def add(name: bytes) -> Command:
    """Make a generation, unless there is one."""
    return Command(b"ms %b %d T0 ME" % (name, 2 * _HALF), _fresh() + _fresh())


def take(name: bytes, seconds: float) -> Command:
    """Take a lease, unless somebody has it: for whole seconds, since those are what memcached counts."""
    return Command(b"ms %b 0 T%d ME" % (name, max(LEAST_LEASE, _whole(seconds))), b"")


def put_mark(name: bytes) -> Command:
    """Put a mark; the answer's CAS number is higher than that of all that was stored or marked before."""
    return Command(b"ms %b 0 T0 c" % name, b"")


def store(name: bytes, packed: bytes, *, ttl: float | None, cas: int | None) -> Command:
    """Store a packed entry, if the item has that CAS number; None is whatever there is."""
    condition = b"" if cas is None else b" C%d" % cas
    seconds = 0 if ttl is None else _whole(ttl)
    return Command(b"ms %b %d T%d F%d%b" % (name, len(packed), seconds, _ENTRY, condition), packed)


def delete(name: bytes, *, cas: int | None = None) -> Command:
    """Delete an item, if it has that CAS number; None is whatever there is."""
    return Command(b"md %b" % name + (b"" if cas is None else b" C%d" % cas))


def bust(name: bytes, *, soft: bool, cas: int | None = None) -> Command:
    """Bust an entry by itself: delete it, or mark it as stale, by which its CAS number changes."""
    return Command(delete(name, cas=cas).line + (b" I" if soft else b""))


def soften(name: bytes, answer: Answer) -> Command:
    """Put another soft half into the generation that was read, unless it was changed since."""
    return Command(b"ms %b %d T0 C%d" % (name, 2 * _HALF, answer.cas), answer.value[:_HALF] + _fresh())


def _whole(seconds: float) -> int:
    return min(LONGEST_TTL, max(1, math.ceil(seconds)))


def _fresh() -> bytes:
    return secrets.token_bytes(_HALF)


# What its answers mean


def is_entry(answer: Answer) -> bool:
    """Tell whether an item that was looked at is an entry, and not only the place of one."""
    return answer.flags.get("f") == str(_ENTRY)


def generation_of(answer: Answer) -> bytes | None:
    """Tell the generation that was read; None if there is none."""
    return answer.value if answer.code == "VA" and len(answer.value) == 2 * _HALF else None


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it was found.

    - `tags`: what it is found by
    - `hard`, `soft`: digests of the generations that it was made under
    - `marked`: it was marked as stale by itself
    """

    value: bytes
    tags: tuple[str, ...]
    hard: bytes
    soft: bytes
    marked: bool


@final
@dataclass(frozen=True, slots=True)
class Token:
    """What was the case when a fill began: the item's CAS number, and the generations that cover it, by their names."""

    cas: int
    generations: tuple[tuple[bytes, bytes], ...]


def judge(entry: Entry, generations: Sequence[bytes | None]) -> Freshness:
    """Tell how an entry is, by the generations that cover it now, in the order of `Layout.covering`."""
    held = [it for it in generations if it is not None]
    if len(held) < len(generations):
        return "dead"
    hard, soft = _digests(held)
    if hard != entry.hard:
        return "dead"
    return "stale" if entry.marked or soft != entry.soft else "fresh"


def _digests(generations: Iterable[bytes]) -> tuple[bytes, bytes]:
    hard, soft = hashlib.blake2b(digest_size=_DIGEST), hashlib.blake2b(digest_size=_DIGEST)
    for it in generations:
        hard.update(it[:_HALF])
        soft.update(it[_HALF:])
    return hard.digest(), soft.digest()


# Where it lies


@final
@dataclass(frozen=True, slots=True)
class Reach:
    """The items by which what a bust names is busted: entries by themselves, and generations after all of `before`.

    `keys` are those of the entries.
    """

    entries: tuple[bytes, ...] = ()
    keys: tuple[str, ...] = ()
    generations: tuple[bytes, ...] = ()
    before: tuple[bytes, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """One namespace in a server.

    - `prefix`: what all names begin with: 1 to 64 letters, digits, dots, colons, dashes and underscores
    - `namespace`: whose entries

    Raises `ConfigurationError` (setting "prefix") or `InvalidRequest`.
    """

    prefix: str
    namespace: str

    def __post_init__(self) -> None:
        check_prefix(self.prefix)
        check_namespace(self.namespace)

    def entry(self, key: str) -> bytes:
        """Tell the name of an entry."""
        return self._name("e", key)

    def covering(self, key: str, tags: Iterable[str] = ()) -> tuple[bytes, ...]:
        """Tell the names of the generations that cover a key with these tags, in the order in which they count."""
        beginnings = [key[: place + 1] for place, character in enumerate(key) if character in SEPARATORS]
        return (self._everything, *map(self._beginning, beginnings), *map(self.tag, tags))

    def tag(self, tag: str) -> bytes:
        """Tell the name of the generation of a tag."""
        return self._name("g", f"t{tag}")

    @property
    def sequence(self) -> bytes:
        """The name of the generation that each bust of any tag deletes first."""
        return self._name("g", "s")

    @property
    def mark(self) -> bytes:
        """The name of the mark; one is enough for a server."""
        return f"{self.prefix}:m".encode()

    def lease(self, key: str, cas: int, generations: Iterable[bytes]) -> bytes:
        """Tell the name of the lease to make an entry anew, which has this CAS number and is covered by these.

        After another bust of it, it is another one.
        """
        return self._name("l", f"{cas}\0{b''.join(generations).hex()}\0{key}")

    def reach(self, kind: Kind, target: str, *, wide: bool) -> Reach:
        """Tell what is to be busted, for a `wide` bust with all variants of the key or of the prefix."""
        if kind == "all":
            return Reach(generations=(self._everything,))
        if kind == "tag":
            return Reach(generations=(self.tag(target),), before=(self.sequence,))
        if kind == "prefix" and target[-1] in SEPARATORS:
            return Reach(generations=(self._beginning(target),))
        keys, beginnings = [target], [target + mark for mark in SEPARATORS] if kind == "prefix" else []
        if wide:
            keys += self.encodings(target)
            beginnings += [f"{it}?" for it in keys]
        names = dict.fromkeys(map(self._beginning, beginnings))
        return Reach(entries=tuple(map(self.entry, keys)), keys=tuple(keys), generations=tuple(names))

    def encodings(self, key: str) -> list[str]:
        """List the variants of a key that have names of their own; those with a query have any."""
        return [key + ending for ending in ENCODINGS]

    def pack(self, key: str, value: bytes, tags: Sequence[str], generations: Iterable[bytes]) -> bytes:
        """Write what an item holds, made under these generations, in the order of `covering`. No tag twice."""
        whose, name, bear = self.namespace.encode(), key.encode(), "\n".join(tags).encode()  # no tag has a line's end
        header = _HEADER.pack(*_digests(generations), len(whose), len(name), len(bear))
        return b"".join((header, whose, name, bear, value))

    def unpack(self, key: str, answer: Answer) -> Entry | None:
        """Read an entry; None for whatever else is there."""
        held = answer.value
        if not is_entry(answer) or len(held) < _HEADER.size:
            return None
        hard, soft, *lengths = _HEADER.unpack_from(held)
        begin, parts = _HEADER.size, []
        for length in lengths:
            parts.append(held[begin : begin + length])
            begin += length
        whose, name, bear = parts
        if whose != self.namespace.encode() or name != key.encode():
            return None  # of all names of the world, two had one hash
        tags = tuple(bear.decode().split("\n")) if bear else ()
        return Entry(held[begin:], tags, hard, soft, "X" in answer.flags)

    @property
    def _everything(self) -> bytes:
        return self._name("g", "a")

    def _beginning(self, text: str) -> bytes:
        return self._name("g", f"b{text}")

    def _name(self, sort: str, what: str) -> bytes:
        hashed = hashlib.blake2b(f"{self.namespace}\0{what}".encode(), digest_size=_DIGEST).digest()
        return f"{self.prefix}:{sort}:".encode() + urlsafe_b64encode(hashed).rstrip(b"=")
