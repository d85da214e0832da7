"""What every backend must do, said once: checks that run against any cache through one small harness.

A harness brings a backend and plays the application whose entries it holds: it stores, reads and loses entries around
the backend. Each check gets a harness of an empty cache. What the traits of a backend exclude is skipped, and the
reason told.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, cast, final

import pytest

from pybustcall.daemon.backends import Backend, BackendFailure, RefusedKey, Scope
from pybustcall.keys import covers, is_variant
from pybustcall.models import DEFAULT_NAMESPACE, EVERYTHING, Kind

__all__ = ["CHECKS", "Check", "Fill", "Harness", "Seen", "opened"]

Seen = Literal["fresh", "stale", "missing"]
"""What a reader of the cache gets: the value, the value and the hint to make it anew, or nothing."""

Fill = Callable[[], Awaitable[bool]]
"""Stores what a reader has made meanwhile, and tells whether the cache has taken it."""


class Harness(Protocol):
    """One cache under test, empty at first, and an application that uses it, never by way of the backend."""

    @property
    def backend(self) -> Backend:
        """The backend, open. The harness closes it after the check."""

    @property
    def tags(self) -> bool:
        """Whether the cache itself knows its entries' tags; otherwise the backend finds nothing by a tag."""

    async def put(self, namespace: str, key: str, *, tags: Sequence[str] = (), size: int = 10) -> bool:
        """Store an entry of about `size` bytes, as an application does that begins now; also over an older one.

        False, and nothing stored, where the cache cannot hold it beside what it holds, such as a file below a file.
        """

    async def drop(self, namespace: str, key: str) -> None:
        """Lose an entry, as an application does that deletes it, or a cache that is full. It may be missing."""

    async def look(self, namespace: str, key: str) -> Seen:
        """Tell what a reader gets. Looking changes nothing, as far as the cache allows."""

    async def miss(self, namespace: str, key: str, *, tags: Sequence[str] = ()) -> Fill | None:
        """Be a reader that finds nothing, and tell how it stores later what it began to make now.

        None where that is no different from `put`, because the cache has no way to refuse late fills.
        """


async def _nothing_more() -> None:
    """Close nothing."""


@asynccontextmanager
async def opened(harness: Harness, close: Callable[[], Awaitable[None]] = _nothing_more) -> AsyncIterator[Harness]:
    """Open the backend of a harness, and close it and what `close` closes, with no descriptor left open."""
    before = len(os.listdir("/proc/self/fd"))
    await harness.backend.open()
    try:
        yield harness
    finally:
        await harness.backend.close()
        await close()
    assert len(os.listdir("/proc/self/fd")) == before


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One statement about a backend. `excluded` tells why it says nothing about this one, or is empty."""

    name: str
    run: Callable[[Harness], Awaitable[None]]
    excluded: Callable[[Harness], str]


CHECKS: Final[list[Check]] = []
"""All of them, in the order in which they are stated."""


def _always(_: Harness) -> str:
    return ""


def _with_tags(harness: Harness) -> str:
    return "" if harness.tags else "the cache does not know its entries' tags"


def _with_counts(harness: Harness) -> str:
    return "" if harness.backend.traits.counts else "it cannot list what it holds"


def _with_soft(harness: Harness) -> str:
    return "" if harness.backend.traits.soft else "it cannot mark entries as stale"


def _with_namespaces(harness: Harness) -> str:
    return "" if harness.backend.traits.namespaces else "it knows the default namespace only"


def _with_generations(harness: Harness) -> str:
    return "" if not harness.backend.traits.settle else "it cannot tell what is newer than a bust"


def _with_soft_generations(harness: Harness) -> str:
    return _with_soft(harness) or _with_generations(harness)


def _with_fences(harness: Harness) -> str:
    return "" if harness.backend.traits.fences else "it removes nothing before it sweeps"


Run = Callable[[Harness], Awaitable[None]]


def _check(name: str, excluded: Callable[[Harness], str] = _always) -> Callable[[Run], Run]:
    def noted(run: Run) -> Run:
        CHECKS.append(Check(name, run, excluded))
        return run

    return noted


# What the application and the engine do


HERE: Final = DEFAULT_NAMESPACE


def _possible(harness: Harness, keys: Iterable[str], namespace: str = HERE) -> list[str]:
    """List those of the keys that this backend could hold."""
    possible = []
    for key in keys:
        try:
            harness.backend.check(namespace, key)
        except RefusedKey:
            continue
        possible.append(key)
    return possible


async def _stock(
    harness: Harness, keys: Iterable[str], *, namespace: str = HERE, tags: Sequence[str] = (), size: int = 10
) -> set[str]:
    """Store all that can be; tell what was."""
    stored, possible = set[str](), _possible(harness, keys, namespace)
    for begin in range(0, len(possible), 100):
        some = possible[begin : begin + 100]
        taken = await asyncio.gather(*(harness.put(namespace, key, tags=tags, size=size) for key in some))
        stored |= {key for key, yes in zip(some, taken, strict=True) if yes}
    return stored


async def _select(harness: Harness, kind: Kind, target: str, namespace: str = HERE) -> set[str]:
    found: list[str] = []
    async for batch in harness.backend.select(Scope(namespace, kind, target)):
        assert 0 < len(batch) <= 500
        found += batch
    assert len(found) == len(set(found)), "none is told twice"
    return set(found)


async def _bust(
    harness: Harness, kind: Kind, target: str, *, soft: bool = False, namespace: str = HERE, wide: bool = False
) -> int:
    """Bust as the engine does; tell the count."""
    backend, scope, count = harness.backend, Scope(namespace, kind, target), 0
    generation = await backend.begin(scope, soft=soft, wide=wide)
    if kind == "key":
        count = await backend.remove(namespace, [target], generation=generation, soft=soft)
    else:
        async for batch in backend.select(scope):
            count += await backend.remove(namespace, batch, generation=generation, soft=soft)
    await backend.end(scope, generation)
    return count


async def _finds(harness: Harness, kind: Kind, target: str, namespace: str = HERE, *, found: set[str]) -> None:
    """See that this is found, where the cache can list it."""
    if kind == "key" or harness.backend.traits.counts:
        assert await _select(harness, kind, target, namespace) == found


async def _busts(
    harness: Harness, kind: Kind, target: str, *, soft: bool = False, namespace: str = HERE, count: int
) -> None:
    """Bust as the engine does, and see that so many are told, where the cache can list them."""
    told = await _bust(harness, kind, target, soft=soft, namespace=namespace)
    assert told == count or not (kind == "key" or harness.backend.traits.counts)


async def _looks(harness: Harness, keys: Iterable[str], namespace: str = HERE) -> dict[str, Seen]:
    return {key: await harness.look(namespace, key) for key in keys}


async def _left(harness: Harness, keys: Iterable[str], namespace: str = HERE) -> set[str]:
    """Tell what a reader still gets, of any freshness."""
    return {key for key, seen in (await _looks(harness, keys, namespace)).items() if seen != "missing"}


# Finding


BRANCHES: Final = (
    "users/2",
    "users",
    "users:1",
    "users:1:name",
    "users:10",
    "users?page=1",
    "users#top",
    "usersAbc:1",
    "users2",
    "user",
    "a/bc",
    "a/b/c",
    "a/b/c/d",
    "a/b",
    "a/b:c/d",
    "a/b?c",
    "a/b?c/d",
    "a/b.c",
    "b/a/b/c",
    "c/d",
    "c/d?e",
    "c/de/f",
    "a",
)
"""Keys of which some are branches of others. Where a key cannot be beside another, the one before is there."""


@_check("is ready, and is called something")
async def _(harness: Harness) -> None:
    await harness.backend.check_ready()
    assert harness.backend.name


@_check("finds a key if it is held")
async def _(harness: Harness) -> None:
    await _stock(harness, ["a:1", "a:1:b", "a"])
    assert await _select(harness, "key", "a:1") == {"a:1"}
    assert await _select(harness, "key", "a:2") == set()
    assert await harness.backend.held(HERE, ["a:2", "a:1", "a:1:b"]) == ["a:1", "a:1:b"]
    await harness.drop(HERE, "a:1")
    assert await _select(harness, "key", "a:1") == set()
    assert await harness.backend.held(HERE, ["a:1"]) == []


@_check("finds a branch by whole segments", _with_counts)
async def _(harness: Harness) -> None:
    stored = await _stock(harness, BRANCHES)
    assert len(stored) > len(BRANCHES) * 0.7
    for prefix in (*BRANCHES, "users:", "users/", "a/", "a/b/", "a/b:", "users?", "missing", "a/missing", "x/y/z"):
        assert await _select(harness, "prefix", prefix) == {key for key in stored if covers(prefix, key)}, prefix


@_check("busts a branch, and nothing beside it")
async def _(harness: Harness) -> None:
    stored = await _stock(harness, BRANCHES)
    for prefix in ("users", "a/b"):
        named = {key for key in stored if covers(prefix, key)}
        await _busts(harness, "prefix", prefix, count=len(named))
        stored -= named
        assert await _left(harness, BRANCHES) == stored
    assert {"usersAbc:1", "users2", "a/bc", "a/b.c"} <= stored


@_check("busts by tag, and nothing beside it", _with_tags)
async def _(harness: Harness) -> None:
    await harness.put(HERE, "page:1", tags=["news", "sport"])
    await harness.put(HERE, "page:2", tags=["news"])
    await harness.put(HERE, "page:3", tags=["new", "newspaper", "news:1", "NEWS"])
    await harness.put(HERE, "news")
    await _finds(harness, "tag", "news", found={"page:1", "page:2"})
    await _busts(harness, "tag", "sport", count=1)
    await _finds(harness, "tag", "news", found={"page:2"})
    await _busts(harness, "tag", "news", count=1)
    await _busts(harness, "tag", "news", count=0)
    assert await _left(harness, ["page:1", "page:2", "page:3", "news"]) == {"page:3", "news"}


@_check("knows the newest tags of an entry only", _with_tags)
async def _(harness: Harness) -> None:
    await harness.put(HERE, "page", tags=["old", "both"])
    await harness.put(HERE, "page", tags=["new", "both"])
    await _busts(harness, "tag", "old", count=0)
    assert await harness.look(HERE, "page") == "fresh"
    await _finds(harness, "tag", "both", found={"page"})
    await _busts(harness, "tag", "new", count=1)


@_check("takes characters of globs in tags for characters", _with_tags)
async def _(harness: Harness) -> None:
    await harness.put(HERE, "1", tags=["t*", "é", "{t}"])
    await harness.put(HERE, "2", tags=["tt", "e\u0301", "t"])
    for tag in ("t*", "é", "{t}"):
        await _finds(harness, "tag", tag, found={"1"})
    await _busts(harness, "tag", "t*", count=1)
    assert await _left(harness, ["1", "2"]) == {"2"}


@_check("finds nothing by a tag where entries have none")
async def _(harness: Harness) -> None:
    await _stock(harness, ["news", "a:news"])
    await _finds(harness, "tag", "news", found=set())
    assert await harness.backend.estimate(Scope(HERE, "tag", "news")) in {None, 0}
    await _busts(harness, "tag", "news", count=0)


@_check("busts everything")
async def _(harness: Harness) -> None:
    stored = await _stock(harness, BRANCHES)
    await _finds(harness, "all", EVERYTHING, found=stored)
    await _busts(harness, "all", EVERYTHING, count=len(stored))
    assert await _left(harness, stored) == set()
    await _busts(harness, "all", EVERYTHING, count=0)


@_check("takes characters of globs for characters")
async def _(harness: Harness) -> None:
    globs = ["*", "?", "[ab]", "[a-c]", "^a", "\\*", "a*", "a?", "a\\", "a-c", "a**", "[!a]", "a]", "[^b]"]
    stored = await _stock(harness, ["a", "b", "ab", "abc", *globs, "a/x", "b:x", *(f"{it}:x" for it in globs)])
    assert stored >= set(_possible(harness, globs))
    for prefix in globs:
        await _finds(harness, "prefix", prefix, found={key for key in stored if covers(prefix, key)})
    for key in _possible(harness, globs):
        assert await _select(harness, "key", key) == {key}
        before = set(await harness.backend.held(HERE, sorted(stored)))
        await _busts(harness, "key", key, count=1)
        assert set(await harness.backend.held(HERE, sorted(stored))) == before - {key}


ODD: Final = (
    "é",
    "e\u0301",
    "日本/東京",
    "😀:😀",
    "\u202ea",
    "{a}b",
    "{}",
    "{a",
    "{namespace}",
    " ",
    "a b",
    "%2F",
    "'",
    '"',
    "$(x)",
    ";",
    "a\u2215b",
    "\uff0e\uff0e",
    "x" * 255,
    "é" * 127,
    "/".join(["long" * 40] * 12),
    "long:" * 800,
    "\U0010ffff",
    "\uffff:\uffff",
)


@_check("holds odd keys apart")
async def _(harness: Harness) -> None:
    possible = _possible(harness, ODD)
    assert await _stock(harness, ODD) == set(possible)
    for number, key in enumerate(possible, start=1):
        assert await _select(harness, "key", key) == {key}
        await _finds(harness, "prefix", key, found={it for it in possible[number - 1 :] if covers(key, it)})
        await _busts(harness, "key", key, count=1)
        assert await _left(harness, possible) == set(possible[number:])


@_check("finds many in batches, each once", _with_counts)
async def _(harness: Harness) -> None:
    keys = {f"many/{number % 7}/{number}" for number in range(2000)}
    assert await _stock(harness, keys) == keys
    beside = await _stock(harness, (f"manyfold/{number}" for number in range(600)))
    await _finds(harness, "prefix", "many", found=keys)
    await _finds(harness, "all", EVERYTHING, found=keys | beside)
    estimate = await harness.backend.estimate(Scope(HERE, "prefix", "many"))
    assert estimate is None or 1000 <= estimate <= 4000
    estimate = await harness.backend.estimate(Scope(HERE, "all", EVERYTHING))
    assert estimate is None or 1300 <= estimate <= 5200
    assert await harness.backend.estimate(Scope(HERE, "key", "many")) in {None, 0, 1}
    await _busts(harness, "prefix", "many", count=2000)
    await _finds(harness, "all", EVERYTHING, found=beside)


@_check("finds many by a tag", _with_tags)
async def _(harness: Harness) -> None:
    keys = await _stock(harness, (f"many:{number}" for number in range(1200)), tags=["t"])
    await _stock(harness, (f"other:{number}" for number in range(600)), tags=["t2"])
    estimate = await harness.backend.estimate(Scope(HERE, "tag", "t"))
    assert estimate is None or 600 <= estimate <= 2400
    await _finds(harness, "tag", "t", found=keys)
    await _busts(harness, "tag", "t", count=1200)
    assert await _left(harness, ["many:0", "many:1199", "other:0"]) == {"other:0"}


@_check("finds all that stay while others come and go", _with_counts)
async def _(harness: Harness) -> None:
    staying = {f"busy/{number % 3}/stays{number}" for number in range(1200)}
    going = {f"busy/{number % 3}/goes{number}" for number in range(1200)}
    await _stock(harness, sorted(staying | going))
    found: list[str] = []
    gone, new = set[str](), set[str]()
    async for batch in harness.backend.select(Scope(HERE, "prefix", "busy")):
        found += batch
        for key in sorted(going - gone - set(found))[:100]:
            await harness.drop(HERE, key)
            gone.add(key)
        if len(new) < 400:
            new |= await _stock(harness, (f"busy/{number % 3}/new{len(found)}.{number}" for number in range(50)))
    assert len(found) == len(set(found))
    assert staying | (going - gone) <= set(found) <= staying | going | new


# Tenants


@_check("keeps namespaces apart", _with_namespaces)
async def _(harness: Harness) -> None:
    backend = harness.backend
    names = (HERE, "tenant", "tenant2", "ten")
    keys = ["page", "page:1", "page.gz", "tenant:page"]
    tags = ["t"] if harness.tags else []
    for namespace in names:
        assert await _stock(harness, keys, namespace=namespace, tags=tags) == set(keys)
    left = {namespace: set(keys) for namespace in names}

    async def busted(kind: Kind, target: str, gone: set[str]) -> None:
        await _finds(harness, kind, target, "tenant", found=gone)
        await _busts(harness, kind, target, namespace="tenant", count=len(gone))
        left["tenant"] -= gone
        for namespace in names:
            assert await _left(harness, keys, namespace) == left[namespace]
            assert set(await backend.held(namespace, keys)) == left[namespace]
            variants = {key for key in left[namespace] if is_variant("page", key)}
            assert set(await backend.variants(namespace, ["page"])) == variants

    await busted("key", "page", {"page"})
    await busted("prefix", "page", {"page:1"})
    if harness.tags:
        await busted("tag", "t", {"page.gz", "tenant:page"})
        await _stock(harness, ["page.gz"], namespace="tenant")
        left["tenant"] = {"page.gz"}
    await busted("all", EVERYTHING, set(left["tenant"]))


@_check("holds nothing in a namespace that nobody uses", _with_namespaces)
async def _(harness: Harness) -> None:
    await _stock(harness, ["page", "page.gz"])
    await _finds(harness, "all", EVERYTHING, "nobody", found=set())
    assert await harness.backend.held("nobody", ["page"]) == []
    assert await harness.backend.variants("nobody", ["page"]) == []
    for kind, target in (("key", "page"), ("prefix", "page"), ("tag", "t"), ("all", EVERYTHING)):
        await _busts(harness, cast("Kind", kind), target, namespace="nobody", count=0)
    assert await harness.backend.estimate(Scope("nobody", "prefix", "page")) in {None, 0}
    assert await _left(harness, ["page", "page.gz"]) == {"page", "page.gz"}


@_check(
    "refuses other namespaces than the default where there are none",
    lambda harness: "it keeps namespaces apart" if harness.backend.traits.namespaces else "",
)
async def _(harness: Harness) -> None:
    await _stock(harness, ["page", "page.gz"])
    with pytest.raises(RefusedKey):
        harness.backend.check("tenant", "page")
    await _finds(harness, "all", EVERYTHING, "tenant", found=set())
    assert await harness.backend.held("tenant", ["page"]) == []
    assert await harness.backend.variants("tenant", ["page"]) == []
    with pytest.raises(RefusedKey):
        await harness.backend.remove("tenant", ["page"], generation=0, soft=False)
    assert await _left(harness, ["page", "page.gz"]) == {"page", "page.gz"}


# Variants


@_check("finds the variants of keys, each once, and not the keys themselves", _with_counts)
async def _(harness: Harness) -> None:
    names = (
        "m.css",
        "m.css.gz",
        "m.css.br",
        "m.css?v=2",
        "m.css?v=2.gz",
        "m.css.gz?v=2",
        "m.css.map",
        "m.css2",
        "M.css.gz",
    )
    keys = [*names, *(f"a/{name}" for name in names), "m.css.gz.gz", "é.zst", "[m].css.gz", "m.cssXgz"]
    stored = await _stock(harness, keys)
    assert stored == set(_possible(harness, keys))
    for wanted in (
        ["m.css"],
        ["a/m.css"],
        ["m.css", "m.css?v=2", "m.css.gz"],
        ["é", "a/m.css", "[m].css", "missing/m"],
    ):
        found = await harness.backend.variants(HERE, wanted)
        assert len(found) == len(set(found))
        assert set(found) == {key for key in stored if any(is_variant(one, key) for one in wanted)}, wanted
    assert await harness.backend.variants(HERE, []) == []


@_check("finds variants of 500 keys at once")
async def _(harness: Harness) -> None:
    keys = [f"v/{number}.css" for number in range(500)]
    await _stock(harness, [*keys, *(f"{key}.gz" for key in keys)])
    assert set(await harness.backend.variants(HERE, keys)) == {f"{key}.gz" for key in keys}


# Removing


@_check("counts what it removed, once")
async def _(harness: Harness) -> None:
    await _stock(harness, ["a", "b", "c:1"])
    backend, scope = harness.backend, Scope(HERE, "all", EVERYTHING)
    generation = await backend.begin(scope, soft=False)
    assert await backend.remove(HERE, [], generation=generation, soft=False) == 0
    assert await backend.remove(HERE, ["a", "missing", "c:1", "c", "a"], generation=generation, soft=False) == 2
    assert await backend.remove(HERE, ["a", "c:1"], generation=generation, soft=False) == 0
    await backend.end(scope, generation)
    assert await _left(harness, ["a", "b", "c:1"]) == ({"b"} if backend.traits.counts else set())


@_check("removes 500 keys at once")
async def _(harness: Harness) -> None:
    keys = [f"r/{number % 5}/{number}" for number in range(500)]
    await _stock(harness, [*keys, "r/other"])
    backend, scope = harness.backend, Scope(HERE, "prefix", "r")
    generation = await backend.begin(scope, soft=False)
    assert await backend.remove(HERE, keys, generation=generation, soft=False) == 500
    await backend.end(scope, generation)
    assert await backend.held(HERE, [*keys[:499], "r/other"]) == (["r/other"] if backend.traits.counts else [])


@_check("can be asked to bust again, and to begin anew what broke off")
async def _(harness: Harness) -> None:
    await _stock(harness, ["a:1", "a:2", "b"])
    backend, scope = harness.backend, Scope(HERE, "prefix", "a")
    broken_off = await backend.begin(scope, soft=False)
    await backend.remove(HERE, ["a:1"], generation=broken_off, soft=False)
    await _busts(harness, "prefix", "a", count=1)
    await _busts(harness, "prefix", "a", count=0)
    await backend.end(scope, broken_off)
    await harness.put(HERE, "a:1")
    assert await _left(harness, ["a:1", "a:2", "b"]) == {"a:1", "b"}


@_check("lets new entries be stored after a bust")
async def _(harness: Harness) -> None:
    for soft in {False, harness.backend.traits.soft}:
        for kind, target in (("key", "a"), ("prefix", "a"), ("all", EVERYTHING)):
            await harness.put(HERE, "a")
            await _bust(harness, cast("Kind", kind), target, soft=soft, wide=True)
            assert await harness.put(HERE, "a")
            assert await harness.look(HERE, "a") == "fresh"
            assert await harness.backend.held(HERE, ["a"]) == ["a"]


@_check("leaves alone what was stored after the bust began", _with_generations)
async def _(harness: Harness) -> None:
    await _leave_the_new_alone(harness, soft=False, after="missing")


@_check("marks nothing that was stored after the bust began", _with_soft_generations)
async def _(harness: Harness) -> None:
    await _leave_the_new_alone(harness, soft=True, after="stale")


async def _leave_the_new_alone(harness: Harness, *, soft: bool, after: Seen) -> None:
    backend = harness.backend
    keys = ["p:old", "p:again", "p:new"]
    for kind, target in (("prefix", "p"), ("all", EVERYTHING)):
        await _stock(harness, keys[:2])
        await harness.drop(HERE, "p:new")
        scope = Scope(HERE, cast("Kind", kind), target)
        generation = await backend.begin(scope, soft=soft)
        await _stock(harness, keys[1:])
        assert await backend.held(HERE, keys, generation=generation) == ["p:old"]
        assert await backend.held(HERE, keys) == keys or backend.traits.fences
        assert await backend.remove(HERE, keys, generation=generation, soft=soft) == 1
        await backend.end(scope, generation)
        assert await _looks(harness, keys) == {"p:old": after, "p:again": "fresh", "p:new": "fresh"}
        assert await backend.held(HERE, keys, generation=generation) == []


@_check("marks as stale, and counts each mark once", _with_soft)
async def _(harness: Harness) -> None:
    backend = harness.backend
    await _stock(harness, ["a:1", "a:2", "b"])
    await _busts(harness, "prefix", "a", soft=True, count=2)
    assert await _looks(harness, ["a:1", "a:2", "b"]) == {"a:1": "stale", "a:2": "stale", "b": "fresh"}
    assert await backend.held(HERE, ["a:1", "a:2", "b"]) == ["b"]
    assert await backend.held(HERE, ["a:1", "a:2", "b"], stale=True) == ["a:1", "a:2", "b"]
    await _busts(harness, "prefix", "a", soft=True, count=0)
    await harness.put(HERE, "a:1")
    assert await harness.look(HERE, "a:1") == "fresh"
    await _busts(harness, "prefix", "a", soft=True, count=1)


@_check("removes what is stale", _with_soft)
async def _(harness: Harness) -> None:
    await _stock(harness, ["a:1", "a:2"])
    await _bust(harness, "key", "a:1", soft=True)
    await _finds(harness, "prefix", "a", found={"a:1", "a:2"})
    await _busts(harness, "prefix", "a", count=2)
    assert await harness.backend.held(HERE, ["a:1", "a:2"], stale=True) == []
    assert await _left(harness, ["a:1", "a:2"]) == set()


# Fills in flight


SCOPES: Final[tuple[tuple[Kind, str], ...]] = (("key", "p:1"), ("prefix", "p"), ("tag", "t"), ("all", EVERYTHING))


async def _began(harness: Harness, key: str, *, tags: Sequence[str] = ()) -> Fill:
    """Be a reader that begins to make an entry; where the cache refuses no late fills there is nothing to check."""
    fill = await harness.miss(HERE, key, tags=tags)
    if fill is None:
        pytest.skip("the cache has no way to refuse late fills")
    return fill


@_check("refuses fills that began before the bust, and takes those that began after it", _with_generations)
async def _(harness: Harness) -> None:
    for soft in {False, harness.backend.traits.soft}:
        for kind, target in SCOPES:
            if kind == "tag" and not harness.tags:
                continue
            tags = ["t"] if harness.tags else []
            during, after = await _began(harness, "p:1", tags=tags), await _began(harness, "p:1", tags=tags)
            scope = Scope(HERE, kind, target)
            generation = await harness.backend.begin(scope, soft=soft)
            assert not await during()
            newer = await _began(harness, "p:1", tags=tags)
            await harness.backend.end(scope, generation)
            assert not await after()
            assert await harness.look(HERE, "p:1") == "missing"
            assert await newer()
            assert await harness.look(HERE, "p:1") == "fresh"
            await harness.drop(HERE, "p:1")


@_check("takes fills of what is not named", _with_generations)
async def _(harness: Harness) -> None:
    fills = [await _began(harness, key) for key in ("ab", "a", "a:1", "c")]
    await _bust(harness, "prefix", "a")
    await _bust(harness, "key", "c:1")
    await _bust(harness, "tag", "t")
    assert [await fill() for fill in fills] == [True, False, False, True]


@_check("refuses late fills of variants if the bust is wide", _with_generations)
async def _(harness: Harness) -> None:
    for kind in ("key", "prefix"):
        fills = [await _began(harness, key) for key in ("m.css", "m.css.gz", "m.css?v=2", "m.css.map")]
        await _bust(harness, kind, "m.css", wide=True)
        assert [await fill() for fill in fills] == [False, False, False, True]
        await harness.drop(HERE, "m.css.map")


@_check("refuses late fills of what depends on the named", _with_generations)
async def _(harness: Harness) -> None:
    backend, scope = harness.backend, Scope(HERE, "key", "product")
    page, other = await _began(harness, "page"), await _began(harness, "other")
    generation = await backend.begin(scope, soft=False, wide=True)
    await backend.fence(HERE, ["page", "list"], generation=generation, soft=False)
    await backend.end(scope, generation)
    assert not await page()
    assert await other()


@_check("lets readers miss what is named as soon as the bust has begun", _with_fences)
async def _(harness: Harness) -> None:
    for kind, target in SCOPES:
        if kind == "tag" and not harness.tags:
            continue
        await _stock(harness, ["p:1", "q"], tags=["t"] if harness.tags else [])
        if kind == "tag":
            await harness.put(HERE, "q")
        scope = Scope(HERE, kind, target)
        generation = await harness.backend.begin(scope, soft=False)
        assert await harness.look(HERE, "p:1") == "missing"
        assert await harness.look(HERE, "q") == ("missing" if kind == "all" else "fresh")
        if harness.backend.traits.counts:
            assert "p:1" in await _select(harness, kind, target), "it is found all the same, to free its memory"
        assert await harness.backend.remove(HERE, ["p:1"], generation=generation, soft=False) == 1
        await harness.backend.end(scope, generation)


# Being an unreliable caller


@_check("does no harm to a sweep that is cancelled anywhere")
async def _(harness: Harness) -> None:
    backend, scope = harness.backend, Scope(HERE, "prefix", "c")
    keys = {f"c/{number % 3}/{number}" for number in range(1100)}
    beside = await _stock(harness, ["d", "cc/1"])

    async def sweep() -> None:
        generation = await backend.begin(scope, soft=False)
        async with aclosing(backend.select(scope)) as batches:
            async for batch in batches:
                await backend.remove(HERE, batch, generation=generation, soft=False)
        await backend.end(scope, generation)

    for turns in (0, 1, 2, 3, 5, 9):
        await _stock(harness, sorted(keys))
        task = asyncio.create_task(sweep())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        await sweep()
        await _finds(harness, "prefix", "c", found=set())
        assert await _left(harness, ["c/0/0", "c/1/1", *beside]) == beside


@_check("can be left alone in the midst of finding", _with_counts)
async def _(harness: Harness) -> None:
    keys = await _stock(harness, (f"c/{number}" for number in range(1100)))
    for _ in range(3):
        batches: AsyncIterator[Sequence[str]] = harness.backend.select(Scope(HERE, "prefix", "c"))
        async with aclosing(cast("AsyncGenerator[Sequence[str], None]", batches)):
            async for batch in batches:
                assert batch
                break
    await _finds(harness, "prefix", "c", found=keys)


@_check("does several things at once", _with_counts)
async def _(harness: Harness) -> None:
    keys = [f"{branch}/{number}" for branch in "abcd" for number in range(300)]
    stored = await _stock(harness, keys)
    found = await asyncio.gather(*(_select(harness, "prefix", branch) for branch in "abcd"))
    assert set().union(*found) == stored
    assert await asyncio.gather(*(_bust(harness, "prefix", branch) for branch in "abcd")) == [300] * 4


def _refusing(harness: Harness) -> str:
    return "" if len(_possible(harness, UNSOUND)) < len(UNSOUND) else "it refuses no key"


UNSOUND: Final = (
    "",
    "/secret/a",
    "..",
    "../secret",
    "secret/../a",
    "secret//a",
    "secret/",
    "./secret",
    "secret\\a",
    "secret\0a",
    "\ud800",
    "secret" * 60,
    "secret/" * 1500,
)
"""Keys that a backend may refuse."""


@_check("refuses what it could never hold, and holds nothing of it", _refusing)
async def _(harness: Harness) -> None:
    backend = harness.backend
    stored = await _stock(harness, ["a", "b", "secret/a"])
    refused = [key for key in UNSOUND if key not in _possible(harness, UNSOUND)]
    for key in refused:
        with pytest.raises(RefusedKey) as caught:
            backend.check(HERE, key)
        assert "secret" not in str(caught.value)
        assert await _select(harness, "key", key) == set()
        with pytest.raises(RefusedKey):
            await backend.remove(HERE, [key], generation=0, soft=False)
    assert await backend.variants(HERE, refused) == []
    assert await backend.held(HERE, refused) == []
    generation = await backend.begin(Scope(HERE, "key", "a"), soft=False)
    with pytest.raises(BackendFailure) as failure:
        await backend.remove(HERE, [refused[0], "a", *refused[1:]], generation=generation, soft=False)
    assert (failure.value.removed, failure.value.failed) == (1, len(refused))
    assert "secret" not in str(failure.value)
    assert await _left(harness, sorted(stored)) == stored - {"a"}


@_check("tells its size, in all namespaces", _with_counts)
async def _(harness: Harness) -> None:
    tenants = ["tenant", HERE] if harness.backend.traits.namespaces else [HERE]
    sizes = [await harness.backend.size_bytes()]
    for namespace in tenants:
        await _stock(harness, (f"size/{number}" for number in range(200)), namespace=namespace, size=5000)
        sizes.append(await harness.backend.size_bytes())
    assert sizes == sorted(set(sizes))
    for namespace in tenants:
        await _bust(harness, "all", EVERYTHING, namespace=namespace)
    assert await harness.backend.size_bytes() < sizes[-1]


@_check("can be closed twice")
async def _(harness: Harness) -> None:
    await harness.backend.close()
    await harness.backend.close()
