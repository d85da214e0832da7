"""The daemon's half of a cache in memcached: no reader ever gets what was busted, whatever the server forgets."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import signal
import string
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pybustcall import memcached_layout as items
from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope
from pybustcall.daemon.backends import memcached as module
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.engine import Engine, Layer
from pybustcall.daemon.index import Indexes
from pybustcall.daemon.journal import Wish
from pybustcall.errors import ConfigurationError
from pybustcall.integrations.memcached import Found, MemcachedCache, Token
from pybustcall.keys import covers, is_variant
from pybustcall.memcached_connection import MemcachedServer
from pybustcall.memcached_layout import Layout
from pybustcall.models import DEFAULT_NAMESPACE as HERE
from pybustcall.models import Kind
from tests.conftest import eventually
from tests.engines import free_port
from tests.memcached_process import MemcachedProcess, shared_memcached

AT: Final = Layout("bustcall", HERE)


@pytest.fixture
def engine() -> MemcachedProcess:
    """An empty server."""
    server = shared_memcached()
    server.ask("flush_all")
    return server


@pytest.fixture
def own_engine() -> Iterator[MemcachedProcess]:
    """One that may be killed."""
    with MemcachedProcess() as server:
        yield server


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[MemcachedBackend]:
    """A backend with patience, closed at the end."""
    backend = MemcachedBackend(url, timeout=20.0)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def bust(
    backend: MemcachedBackend,
    kind: Kind,
    target: str = "*",
    *,
    soft: bool = False,
    wide: bool = False,
    namespace: str = HERE,
) -> int:
    """Bust as the engine does; tell the count."""
    scope = Scope(namespace, kind, target)
    generation = await backend.begin(scope, soft=soft, wide=wide)
    count = 0
    if kind == "key":
        count += await backend.remove(namespace, [target], generation=generation, soft=soft)
    if wide and kind in {"key", "prefix"}:
        variants = await backend.variants(namespace, [target])
        count += await backend.remove(namespace, variants, generation=generation, soft=soft)
    await backend.end(scope, generation)
    return count


async def delete(url: str, *names: bytes) -> None:
    """Have the server lose items."""
    server = MemcachedServer(url)
    await server.run([items.delete(name) for name in names])
    await server.aclose()


# What a bust does


async def test_a_wide_bust_of_a_key_takes_the_variants_with_it(engine: MemcachedProcess) -> None:
    """Those with a query, too, which nobody can list; those with names of their own are counted."""
    keys = ["m.css", "m.css.gz", "m.css.br", "m.css?v=2", "m.css?v=2.gz", "m.css.gz?v=2", "m.css.map", "m.cssx"]
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for soft in (True, False):
            for key in keys:
                await cache.set(key, b"v", ttl=None)
            assert await backend.variants(HERE, ["m.css", "m.css", "x"]) == ["m.css.br", "m.css.gz"]
            assert await bust(backend, "key", "m.css", wide=True, soft=soft) == 3
            assert await bust(backend, "key", "m.css", wide=True, soft=soft) == 0
            left = {key for key in keys if (found := await cache.get(key)) is not None and not found.stale}
            assert left == {"m.css.map", "m.cssx"}


@pytest.mark.parametrize("soft", [False, True])
async def test_what_depends_on_the_named_is_busted_by_its_fence(engine: MemcachedProcess, soft: bool) -> None:
    """With its variants, and counted when it is removed; what was stored after that is left alone."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for key in ("page", "page.gz", "page?q", "list", "other"):
            await cache.set(key, b"v", ttl=None)
        scope = Scope(HERE, "tag", "product")
        generation = await backend.begin(scope, soft=soft, wide=True)
        await backend.fence(HERE, ["page", "list", "missing"], generation=generation, soft=soft)
        late = {key: await cache.get(key) for key in ("page", "page.gz", "page?q", "list", "other")}
        old = Found(b"v", stale=True) if soft else None
        assert late == {"page": old, "page.gz": old, "page?q": old, "list": old, "other": Found(b"v", stale=False)}
        await cache.set("list", b"new", ttl=None)
        removed = [
            await backend.remove(HERE, ["page", "list", "missing"], generation=generation, soft=soft) for _ in range(2)
        ]
        assert removed == [3, 0]
        await backend.end(scope, generation)
        assert await cache.get("list") == Found(b"new", stale=False)


async def test_many_are_fenced_at_once(engine: MemcachedProcess) -> None:
    """As the engine gives them, some hundreds at a time."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        keys = [f"k/{number}" for number in range(250)]
        await asyncio.gather(*(cache.set(key, b"v", ttl=None) for key in keys))
        scope = Scope(HERE, "tag", "t")
        generation = await backend.begin(scope, soft=False, wide=True)
        await backend.fence(HERE, keys, generation=generation, soft=False)
        assert await backend.held(HERE, keys) == []
        assert await backend.remove(HERE, keys, generation=generation, soft=False) == 250
        await backend.end(scope, generation)


async def test_what_no_begin_named_is_removed_all_the_same(engine: MemcachedProcess) -> None:
    """With the place of one that is being made, if it is older than the bust."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for soft in (False, True):
            await cache.set("old", b"v", ttl=None)
            looked = await cache.lookup(f"late{soft}")
            generation = await backend.begin(Scope(HERE, "tag", "t"), soft=soft)
            await cache.set("new", b"v", ttl=None)
            keys = ["old", f"late{soft}", "new", "missing"]
            assert await backend.remove(HERE, keys, generation=generation, soft=soft) == 1
            assert not await cache.store(f"late{soft}", b"late", token=looked.token, ttl=None)
            assert await cache.get("new") == Found(b"v", stale=False)
            assert await cache.get("old") == (Found(b"v", stale=True) if soft else None)


async def test_a_soft_bust_of_what_is_dead_makes_nothing_alive(engine: MemcachedProcess) -> None:
    """Whichever came first."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for kind, target in (("key", "a/b"), ("prefix", "a"), ("tag", "t"), ("all", "*")):
            for softs in ((False, True), (True, False), (True, False, True)):
                await cache.set("a/b", b"v", tags=["t"], ttl=None)
                for soft in softs:
                    await bust(backend, kind, target, soft=soft)  # type: ignore[arg-type]
                assert await cache.get("a/b") is None


async def test_two_tenants_never_meet(engine: MemcachedProcess) -> None:
    """Nor do two applications with prefixes of their own."""
    caches = [
        MemcachedCache(engine.url, namespace=tenant, prefix=prefix) for tenant in "ab" for prefix in ("one", "two")
    ]
    backend = MemcachedBackend(engine.url, prefix="one")
    for kind, target in (("key", "k/1"), ("prefix", "k"), ("tag", "t"), ("all", "*")):
        for number, cache in enumerate(caches):
            await cache.set("k/1", b"%d" % number, tags=["t"], ttl=None)
        await bust(backend, kind, target, namespace="a")  # type: ignore[arg-type]
        found = [await cache.get("k/1") for cache in caches]
        assert [it and it.value for it in found] == [None, b"1", b"2", b"3"]
    await backend.close()
    for cache in caches:
        await cache.aclose()


async def test_keys_may_be_long_and_have_any_characters(engine: MemcachedProcess) -> None:
    """Spaces, what is no ASCII, and 8 KiB of it."""
    keys = ["a b", " ", "é", "日本/東京", "\u202ea", "x" * 8192, "é" * 4096, "/".join(["long" * 15] * 128)]
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for key in keys:
            await cache.set(key, key.encode(), tags=[key], ttl=None)
        for key in keys:
            assert await cache.get(key) == Found(key.encode(), stale=False)
            assert await bust(backend, "tag", key) == 0
            assert await cache.get(key) is None
            await cache.set(key, b"v", ttl=None)
            assert await bust(backend, "key", key) == 1
            assert await cache.get(key) is None


async def test_nobody_can_tell_what_a_prefix_covers(engine: MemcachedProcess) -> None:
    """It says so, and finds keys only."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        assert not backend.traits.counts
        await cache.set("a/b", b"v", tags=["t"], ttl=None)
        for kind, target, told in (("key", "a/b", 1), ("prefix", "a", None), ("tag", "t", None), ("all", "*", None)):
            scope = Scope(HERE, kind, target)  # type: ignore[arg-type]
            assert await backend.estimate(scope) == told
            assert [key async for keys in backend.select(scope) for key in keys] == (["a/b"] if told else [])


@pytest.mark.parametrize("soft", [False, True])
async def test_what_readers_could_not_see_any_more_is_not_counted(engine: MemcachedProcess, soft: bool) -> None:
    """What an earlier bust covered is still in memory, and a bust of the key takes it away; `held` tells the same."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for kind, target in (("all", "*"), ("prefix", "a"), ("tag", "t")):
            await cache.set("a/1", b"v", tags=["t"], ttl=None)
            await cache.set("a/1.gz", b"v", ttl=None)
            await bust(backend, kind, target)  # type: ignore[arg-type]
            held = await backend.held(HERE, ["a/1", "a/1.gz"], stale=not soft)
            assert await bust(backend, "key", "a/1", soft=soft) == len([key for key in held if key == "a/1"]) == 0
        await cache.set("a/1", b"v", tags=["t"], ttl=None)
        await bust(backend, "all", soft=True)
        assert await bust(backend, "key", "a/1", soft=soft) == (0 if soft else 1)


async def test_what_is_dead_is_not_held(engine: MemcachedProcess) -> None:
    """Though it takes memory until it is removed or evicted, which a bust can see to."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for key in ("a/1", "a/2", "b"):
            await cache.set(key, b"v", ttl=None)
        generation = await backend.begin(Scope(HERE, "prefix", "a"), soft=False)
        keys = ["a/1", "a/2", "b", "c"]
        assert await backend.held(HERE, keys, stale=True) == ["b"]
        assert await backend.held(HERE, keys[:2], generation=generation) == ["a/1", "a/2"]
        before = await backend.size_bytes()
        assert await backend.remove(HERE, keys[:2], generation=generation, soft=False) == 2
        assert await backend.size_bytes() < before
        assert await backend.held(HERE, keys[:2], generation=generation) == []


async def test_the_engine_busts_by_it_what_only_the_registry_knows(engine: MemcachedProcess) -> None:
    """Dependents, bearers of a tag that readers said nothing of, and the variants of each."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        layers = [
            Layer(name="memcached", number=0, backend=backend),
            Layer(name="registry", number=1, backend=MemoryBackend(indexes := Indexes())),
        ]
        daemon = Engine(layers, indexes)
        for soft in (True, False):
            daemon.register("page", ["product"], tags=["t"])
            daemon.register("list", ["page"])
            keys = ["product", "product?q", "page", "page.gz", "page?q", "list", "other"]
            for kind, target, named in (
                ("key", "product", {*keys[:6]}),
                ("prefix", "product", {*keys[:6]}),
                ("tag", "t", {"page", "page.gz", "page?q", "list"}),
            ):
                for key in keys:
                    await cache.set(key, b"v", ttl=None)
                wish = Wish(namespace=HERE, kind=kind, target=target, strategy="dimensional", soft=soft, verify=True)  # type: ignore[arg-type]
                daemon.check(wish)
                await daemon.bust(wish).visit(layers[0])
                found = {key: await cache.get(key) for key in keys}
                expected = Found(b"v", stale=True) if soft else None
                assert found == {key: expected if key in named else Found(b"v", stale=False) for key in keys}


async def test_a_key_that_no_reader_could_store_is_refused() -> None:
    """With the reason, and without the key."""
    backend = MemcachedBackend("memcached://host")
    for key, why in (
        ("", "must not be empty|is empty"),
        ("secret\n", "control character"),
        ("secret" * 2000, "8192|8 KiB"),
        ("secret/" * 129, "129 of the marks"),
    ):
        with pytest.raises(RefusedKey, match=why) as caught:
            backend.check(HERE, key)
        assert "secret" not in str(caught.value)
    backend.check(HERE, "secret/" * 128)


# A server that forgets


LOST: Final[dict[str, tuple[bytes, ...]]] = {
    "everything": AT.covering("a/b")[:1],
    "a beginning": AT.covering("a/b")[1:],
    "a tag": (AT.tag("t"),),
    "the entry": (AT.entry("a/b"),),
    "the sequence of tags": (AT.sequence,),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("soft", [False, True])
async def test_what_is_evicted_never_brings_back_what_was_busted(
    engine: MemcachedProcess, lost: str, soft: bool
) -> None:
    """Neither if it went before the bust nor after it; and it costs misses only."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for kind, target in (("key", "a/b"), ("prefix", "a"), ("tag", "t"), ("all", "*")):
            for first in (True, False):
                await cache.set("a/b", b"old", tags=["t"], ttl=None)
                looked = await cache.lookup("a/b")
                if first:
                    await delete(engine.url, *LOST[lost])
                await bust(backend, kind, target, soft=soft)  # type: ignore[arg-type]
                if not first:
                    await delete(engine.url, *LOST[lost])
                for _ in range(2):
                    found = await cache.get("a/b")
                    assert found is None or (soft and found == Found(b"old", stale=True))
                    assert not await cache.store("a/b", b"old", token=looked.token, tags=["t"], ttl=None)
                    await cache.lookup("a/b", tags=["t"])  # which makes the generations anew
                assert await cache.get_or_set("a/b", lambda: b"new", tags=["t"], ttl=None) in {b"new", b"old"}
                await bust(backend, "all")


async def test_a_server_that_is_emptied_serves_nothing_of_before(engine: MemcachedProcess) -> None:
    """And takes no late fill of before."""
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        await cache.set("k", b"old", ttl=None)
        looked = await cache.lookup("k2")
        engine.ask("flush_all")
        assert await cache.get("k") is None
        assert not await cache.store("k2", b"old", token=looked.token, ttl=None)
        assert await bust(backend, "key", "k") == 0
        assert await cache.set("k", b"new", ttl=None)
        assert await cache.get("k") == Found(b"new", stale=False)


async def test_a_late_fill_from_before_a_restart_is_refused(own_engine: MemcachedProcess) -> None:
    """Though the new server counts from 1 again, and what lies there has the very CAS number."""
    async with opened(own_engine.url) as backend, MemcachedCache(own_engine.url) as cache:
        before = await cache.lookup("k")
        own_engine.kill()
        own_engine.start()
        await eventually(lambda: not any(state.open for state in cache._server._states.values()))
        after = await cache.lookup("k")
        assert after.token.cas == before.token.cas
        assert not await cache.store("k", b"old", token=before.token, ttl=None)
        assert await cache.store("k", b"new", token=after.token, ttl=None)
        assert await bust(backend, "key", "k") == 1


async def test_a_bust_that_a_restart_interrupts_removes_more_and_never_less(own_engine: MemcachedProcess) -> None:
    """Since the new server counts from 1 again, what is new looks old."""
    async with opened(own_engine.url) as backend, MemcachedCache(own_engine.url) as cache:
        for number in range(20):
            await cache.set(f"k/{number}", b"v", ttl=None)
        scope = Scope(HERE, "prefix", "k")
        generation = await backend.begin(scope, soft=False)
        own_engine.kill()
        with pytest.raises(BackendFailure) as caught:
            await backend.remove(HERE, ["k/1", "k/2"], generation=generation, soft=False)
        assert (caught.value.unreachable, caught.value.removed, caught.value.failed) == (True, 0, 2)
        own_engine.start()
        await backend.check_ready()
        await eventually(lambda: not any(state.open for state in cache._server._states.values()))
        await cache.set("k/1", b"new", ttl=None)
        assert await backend.remove(HERE, ["k/1", "k/2"], generation=generation, soft=False) == 1
        await backend.end(scope, generation)
        assert await cache.get("k/1") is None


async def test_a_server_that_is_too_small_costs_misses_only() -> None:
    """Entries and generations are evicted all the time, and readers get what is new, or make it."""
    chance = random.Random(5)
    with MemcachedProcess("-m", "2") as own:
        async with opened(own.url) as backend, MemcachedCache(own.url, on_error="raise") as cache:
            now = dict.fromkeys(range(300), 0)
            for turn in range(1500):
                number = chance.randrange(300)
                if turn % 10 == 0:
                    now[number] += 1
                    await bust(backend, "tag", f"n:{number}")
                value = b"%d " % now[number] + b"x" * chance.randrange(20_000)
                made = partial(bytes, value)
                found = await cache.get_or_set(f"page/{number}", made, tags=[f"n:{number}"], ttl=None)
                assert found.startswith(b"%d " % now[number])
            evictions = await backend._told(b"stats")
            assert int(re.findall(r"evictions (\d+)", evictions)[0]) > 0


# The whole of it against a model


KEYS: Final = ("a", "a/b", "a/b/c", "a?x", "a.gz", "a.gz?x", "ab", "ab/c")
TAGS: Final = ("t", "u")


@dataclass
class Held:
    """An entry of the model."""

    value: bytes
    tags: frozenset[str]
    stale: bool = False


@dataclass
class Fill:
    """A fill of the model that has begun, and what keeps it from being stored."""

    key: str
    token: Token
    known: frozenset[str]
    refused: bool = False
    tags_busted: set[str] = field(default_factory=set)
    any_tag_busted: bool = False


class Model:
    """What a cache is expected to do, by going through all that there is."""

    def __init__(self) -> None:
        self.entries: dict[str, Held] = {}
        self.fills: list[Fill] = []

    def stored(self, key: str, value: bytes, tags: frozenset[str]) -> None:
        self.entries[key] = Held(value, tags)
        for fill in self.fills:
            fill.refused |= fill.key == key

    def may_store(self, fill: Fill, tags: frozenset[str]) -> bool:
        unknown = bool(tags - fill.known) and fill.any_tag_busted
        return not (fill.refused or unknown or fill.tags_busted & tags & fill.known)

    def busted(self, kind: Kind, target: str, *, soft: bool, wide: bool) -> None:
        def is_named(key: str) -> bool:
            if wide and kind in {"key", "prefix"} and is_variant(target, key):
                return True
            return kind == "all" or (key == target if kind == "key" else kind == "prefix" and covers(target, key))

        for key, held in list(self.entries.items()):
            if is_named(key) or (kind == "tag" and target in held.tags):
                if soft:
                    held.stale = True
                else:
                    del self.entries[key]
        for fill in self.fills:
            fill.refused |= is_named(fill.key)
            if kind == "tag":
                fill.tags_busted.add(target)
                fill.any_tag_busted = True


_KEY = st.sampled_from(KEYS)
_SOME_TAGS = st.frozensets(st.sampled_from(TAGS))
_STEPS = st.lists(
    st.tuples(st.just("set"), _KEY, _SOME_TAGS)
    | st.tuples(st.just("look"), _KEY, _SOME_TAGS)
    | st.tuples(st.just("store"), st.integers(0, 5), _SOME_TAGS)
    | st.tuples(
        st.just("bust"),
        st.tuples(st.sampled_from(["key", "prefix"]), st.sampled_from([*KEYS, "a/", "a?", "b"]))
        | st.tuples(st.just("tag"), st.sampled_from(TAGS))
        | st.just(("all", "*")),
        st.tuples(st.booleans(), st.booleans()),
    )
    | st.tuples(st.just("lose"), st.sampled_from(["all", "a/", "a?", "t", "sequence", "a/b"]), st.none()),
    min_size=1,
    max_size=25,
)


async def _go(url: str, steps: list[tuple[str, Any, Any]]) -> None:
    model, layout = Model(), Layout("bustcall", "model")
    losing: dict[str, tuple[bytes, tuple[Kind, str]]] = {
        "all": (layout.covering("a")[0], ("all", "*")),
        "a/": (layout.covering("a/")[1], ("prefix", "a/")),
        "a?": (layout.covering("a?")[1], ("prefix", "a?")),
        "t": (layout.tag("t"), ("tag", "t")),
        "a/b": (layout.entry("a/b"), ("key", "a/b")),
    }
    async with opened(url) as backend, MemcachedCache(url, namespace="model", timeout=20.0) as cache:
        for number, (what, one, other) in enumerate(steps):
            value = b"%d" % number
            if what == "set":
                assert await cache.set(one, value, tags=sorted(other), ttl=None)
                model.stored(one, value, other)
            elif what == "look":
                looked = await cache.lookup(one, tags=sorted(other))
                model.fills.append(Fill(one, looked.token, other))
            elif what == "store" and model.fills:
                fill = model.fills[one % len(model.fills)]
                stored = await cache.store(fill.key, value, token=fill.token, tags=sorted(other), ttl=None)
                assert stored is model.may_store(fill, other)
                if stored:
                    model.stored(fill.key, value, other)
            elif what == "bust":
                (kind, target), (soft, wide) = one, other
                await bust(backend, kind, target, soft=soft, wide=wide, namespace="model")
                model.busted(kind, target, soft=soft, wide=wide)
            elif what == "lose" and one == "sequence":
                await delete(url, layout.sequence)
                for fill in model.fills:
                    fill.any_tag_busted = True
            elif what == "lose":
                name, (kind, target) = losing[one]
                await delete(url, name)
                seen = [(fill, fill.any_tag_busted) for fill in model.fills]
                model.busted(kind, target, soft=False, wide=False)
                for fill, before in seen:
                    fill.any_tag_busted = before  # the sequence tells nothing of it
            for key in KEYS:
                held = model.entries.get(key)
                expected = None if held is None else Found(held.value, held.stale)
                assert await cache.get(key) == expected, (number, key)


@settings(max_examples=60, deadline=None)
@given(_STEPS)
@example([("look", "a", frozenset()), ("bust", ("tag", "u"), (False, False)), ("store", 0, frozenset("t"))])
@example([("look", "a", frozenset("t")), ("bust", ("tag", "u"), (False, False)), ("store", 0, frozenset("t"))])
@example([("set", "a", frozenset("t")), ("bust", ("tag", "t"), (True, False)), ("lose", "t", None)])
def test_it_does_what_a_model_does_that_goes_through_all_entries(steps: list[tuple[str, Any, Any]]) -> None:
    """Whatever is stored, looked up, busted, and lost by the server, in any order."""
    engine = shared_memcached()
    engine.ask("flush_all")
    asyncio.run(_go(engine.url, steps))


# Many at once


async def test_no_reader_gets_what_was_busted(engine: MemcachedProcess) -> None:
    """100 readers, slow and quick, while tags and branches are busted, and the server loses what it pleases."""
    written = {f"product:{number}": 0 for number in range(5)}
    ended = dict(written)  # what was written before a bust that has ended
    chance = random.Random(7)
    stop, reads = False, 0

    async def read(cache: MemcachedCache) -> None:
        nonlocal reads
        while not stop:
            product = chance.choice(sorted(written))
            at_least = ended[product]

            async def render(product: str = product) -> bytes:
                value = written[product]
                for _ in range(chance.randrange(12)):
                    await asyncio.sleep(0)
                return b"%d" % value

            key = f"pages/{product}/{chance.randrange(3)}"
            if chance.randrange(2):
                value = await cache.get_or_set(key, render, tags=[product, "all"], ttl=60.0)
            else:
                looked = await cache.lookup(key)
                value = looked.found.value if looked.found else await render()
                if looked.found is None:
                    await cache.store(key, value, token=looked.token, tags=[product, "all"], ttl=60.0)
            assert int(value) >= at_least
            reads += 1

    caches = [MemcachedCache(engine.url, timeout=20.0, connections=10) for _ in range(4)]
    names = [AT.covering("pages/")[0], AT.covering("pages/")[1], AT.sequence, *map(AT.tag, sorted(written))]
    async with opened(engine.url) as backend, asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(read(caches[number % 4]))
        for turn in range(60):
            product = chance.choice(sorted(written))
            written[product] += 1
            if turn % 9 == 0:
                await delete(engine.url, chance.choice(names))
            if turn % 7:
                await bust(backend, "tag", product)
            else:
                await bust(backend, "prefix", f"pages/{product}")
            ended[product] = written[product]
        stop = True
    for cache in caches:
        await cache.aclose()
    assert reads > 200


async def test_two_daemons_bust_the_same(engine: MemcachedProcess) -> None:
    """Each in the midst of the other, and the entries of afterwards live."""
    async with opened(engine.url) as one, opened(engine.url) as other, MemcachedCache(engine.url) as cache:
        for soft in (False, True):
            for key in ("k/1", "k/2"):
                await cache.set(key, b"v", tags=["t"], ttl=None)
            begun = await one.begin(Scope(HERE, "prefix", "k"), soft=soft)
            busts = [
                bust(it, kind, "k" if kind == "prefix" else "t", soft=soft)
                for it in (one, other)
                for kind in ("prefix", "tag")
                for _ in range(10)
            ]
            await asyncio.gather(*busts)
            await one.end(Scope(HERE, "prefix", "k"), begun)
            found = await cache.get("k/1")
            assert found is None or (soft and found.stale)
            assert await cache.set("k/1", b"new", tags=["t"], ttl=None)
            assert await cache.get("k/1") == Found(b"new", stale=False)


async def test_a_generation_that_others_change_all_the_time_fails_the_bust(
    engine: MemcachedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many tries, and it is begun anew."""
    monkeypatch.setattr(module, "_TRIES", 1)
    failures = 0
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        for _ in range(20):
            await cache.set("k", b"v", ttl=None)
            told = await asyncio.gather(*(bust(backend, "all", soft=True) for _ in range(10)), return_exceptions=True)
            for it in told:
                assert it == 0 or isinstance(it, BackendFailure)
                if isinstance(it, BackendFailure):
                    assert not it.unreachable
                    assert "again and again" in str(it)
                    failures += 1
            assert await cache.get("k") == Found(b"v", stale=True)
        assert failures


async def test_notes_are_bounded(engine: MemcachedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bust that was forgotten counts less, and removes no less."""
    monkeypatch.setattr(module, "_MOST_NOTES", 2)
    async with opened(engine.url) as backend, MemcachedCache(engine.url) as cache:
        await cache.set("a", b"v", ttl=None)
        await cache.set("b", b"v", ttl=None)
        scope = Scope(HERE, "key", "a")
        generation = await backend.begin(scope, soft=False)
        for _ in range(3):
            await backend.begin(scope, soft=False)
        assert len(backend._notes) == 2
        await backend.fence(HERE, ["b"], generation=generation, soft=False)
        assert await backend.remove(HERE, ["a", "b"], generation=generation, soft=False) == 0
        assert await cache.get("a") is await cache.get("b") is None
        assert len(backend._notes) == 2


# Failures


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    """Each operation says so."""
    port = free_port()
    async with opened(f"memcached://127.0.0.1:{port}") as backend:
        for operation in (
            backend.check_ready(),
            backend.begin(Scope(HERE, "all", "*"), soft=False),
            backend.begin(Scope(HERE, "tag", "t"), soft=True),
            backend.fence(HERE, ["secret/key"], generation=2, soft=False),
            backend.estimate(Scope(HERE, "key", "secret/key")),
            backend.variants(HERE, ["secret/key"]),
            backend.remove(HERE, ["secret/key"], generation=2, soft=False),
            backend.held(HERE, ["secret/key"]),
            backend.held(HERE, ["secret/key"], generation=2),
            backend.size_bytes(),
        ):
            with pytest.raises(BackendFailure, match=f"memcached://127.0.0.1:{port}") as caught:
                await operation
            assert caught.value.unreachable
            assert "secret" not in str(caught.value)


async def test_a_server_that_does_not_answer_is_given_up(own_engine: MemcachedProcess) -> None:
    """After the limits."""
    backend = MemcachedBackend(own_engine.url, timeout=0.1, connect_timeout=0.1)
    await backend.check_ready()
    os.kill(own_engine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BackendFailure, match=r"did not answer within 0\.2 s") as caught:
            await backend.size_bytes()
        assert caught.value.unreachable
    finally:
        os.kill(own_engine.pid, signal.SIGCONT)
    await backend.close()


async def test_a_server_without_cas_is_refused() -> None:
    """Late fills could be stored, so nobody uses it at all."""
    with MemcachedProcess("-C") as own:
        async with opened(own.url) as backend:
            for operation in (backend.check_ready(), backend.begin(Scope(HERE, "all", "*"), soft=False)):
                with pytest.raises(BackendFailure, match="start it without -C") as caught:
                    await operation
                assert caught.value.unreachable


async def test_a_server_that_evicts_nothing_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """When it is full, nothing can be stored any more."""
    with MemcachedProcess("-M") as own, caplog.at_level(logging.WARNING, "pybustcall"):
        async with opened(own.url) as backend:
            for _ in range(2):
                await backend.check_ready()
    assert [it for it in caplog.messages if "without -M" in it and own.url in it] == caplog.messages
    assert len(caplog.messages) == 1


async def test_a_server_that_tells_no_size_fails(monkeypatch: pytest.MonkeyPatch, engine: MemcachedProcess) -> None:
    """A number of no meaning would be worse."""
    async with opened(engine.url) as backend:

        async def told(_: bytes) -> str:
            return string.ascii_letters

        monkeypatch.setattr(backend, "_told", told)
        with pytest.raises(BackendFailure, match="does not tell how many bytes"):
            await backend.size_bytes()


@pytest.mark.parametrize(
    ("setting", "value"), [("url", "redis://host"), ("prefix", "a b"), ("timeout", 0), ("connections", -1)]
)
def test_settings_that_cannot_be_are_refused(setting: str, value: Any) -> None:
    """At once, by name."""
    with pytest.raises(ConfigurationError) as caught:
        MemcachedBackend(**{"url": "memcached://host", setting: value})
    assert caught.value.setting == setting


def test_a_backend_says_which_server_it_uses() -> None:
    """For the log."""
    assert repr(MemcachedBackend("memcached://host:1")) == "MemcachedBackend(memcached://host:1)"
