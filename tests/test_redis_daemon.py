"""The whole way with a real Redis: an application's cache, a client, a daemon with a journal, a server that dies."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pybustcall import BustcallClient
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Jobs, Journal, Layer, MemoryBackend, create_app
from pybustcall.daemon.backends import Scope
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.daemon.bust import Bust
from pybustcall.daemon.journal import Wish
from pybustcall.integrations.redis import Looked, RedisCache, Token
from tests.conftest import eventually
from tests.engines import RedisProcess


@asynccontextmanager
async def daemon(url: str, journal: Path, **settings: Any) -> AsyncIterator[BustcallClient]:
    """Serve one Redis layer with a journal; tell a client of that daemon."""
    engine = Engine([Layer(name="redis", number=0, backend=RedisBackend(url, timeout=0.5))], Indexes())
    runner = web.AppRunner(create_app(engine, DaemonSettings(journal=journal, **settings)), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with BustcallClient(f"http://127.0.0.1:{runner.addresses[0][1]}", probes=None) as client:
            yield client
    finally:
        await runner.cleanup()


@pytest.fixture
def redis(tmp_path: Path) -> Any:
    with RedisProcess(tmp_path) as server:
        yield server


@pytest.mark.requirement("REL-04")
async def test_no_reader_sees_the_old_version_after_the_bust_has_returned(redis: RedisProcess, tmp_path: Path) -> None:
    """200 readers, one write, one bust; and a slow fill that began before it is not stored after it."""
    version = 1
    cache = RedisCache(redis.url)
    seen: list[tuple[float, int]] = []
    stop = asyncio.Event()
    now = asyncio.get_running_loop().time

    async def render() -> bytes:
        told = version
        await asyncio.sleep(0)
        return b"%d" % told

    async def read() -> None:
        while not stop.is_set():
            begun = now()
            value = await cache.get_or_set("products/7", render, tags=["product:7"], ttl=60.0)
            seen.append((begun, int(value)))

    async with daemon(redis.url, tmp_path / "journal") as client:
        looked = await cache.lookup("products/7")
        assert looked.found is None
        readers = [asyncio.create_task(read()) for _ in range(200)]
        await eventually(lambda: len(seen) > 1000)
        version = 2
        result = await client.bust("product:7", kind="tag", reason="a price has changed")
        returned = now()
        assert result.ok
        assert not await cache.store("products/7", b"1", token=looked.token, tags=["product:7"], ttl=60.0)
        after = len(seen)
        await eventually(lambda: len(seen) > after + 2000)
        stop.set()
        await asyncio.gather(*readers)
        [job] = await client.jobs()
        assert (job.reason, job.state) == ("a price has changed", "done")
    assert {value for begun, value in seen if begun > returned} == {2}
    assert {value for _, value in seen} == {1, 2}
    await cache.aclose()


@pytest.mark.requirement("REL-04")
async def test_busts_go_on_while_redis_is_dead_and_are_applied_when_it_is_back(
    redis: RedisProcess, tmp_path: Path
) -> None:
    """All 100, each once in the audit; calls meanwhile are answered soon, naming the layer."""
    cache = RedisCache(redis.url)
    async with daemon(redis.url, tmp_path / "journal", answer_within=1.0) as client:
        statuses = []
        for number in range(100):
            if number == 30:
                redis.kill()
            if number == 60:
                redis.start()
                for key in range(10):
                    await cache.set(f"page/{key}", b"old", tags=["shop"], ttl=600.0)
            result = await client.bust(f"page/{number % 10}", reason=str(number))
            assert result.status in {"busted", "accepted", "partial"}
            assert result.elapsed < 2.0
            statuses.append(result.status)
            if result.status == "partial":
                assert [layer.name for layer in result.layers if not layer.ok] == ["redis"]
        assert statuses[:30] == ["busted"] * 30
        assert statuses[30] in {"partial", "accepted"}
        audit = await client.jobs(limit=1000)
        assert sorted(int(job.reason or -1) for job in audit) == list(range(100))
        for job in audit:
            done = await client.wait_job(job.job, timeout=30.0)
            assert done.state == "done"
        assert [await cache.get(f"page/{key}") for key in range(10)] == [None] * 10
    await cache.aclose()


async def test_a_dry_run_tells_the_number_that_the_real_bust_then_removes(redis: RedisProcess, tmp_path: Path) -> None:
    """And removes nothing; whole segments, with characters that globs know; other tenants are not reached."""
    ours, theirs = RedisCache(redis.url, namespace="ours"), RedisCache(redis.url, namespace="theirs")
    keys = ["users", "users/1", "users:2", "users?*", "users/[a]", "usersAbc:1", "u*", "other"]
    for cache, key in itertools.product((ours, theirs), keys):
        await cache.set(key, b"v", tags=[], ttl=60.0)
    async with daemon(redis.url, tmp_path / "journal") as client:
        told = await client.bust("users", kind="prefix", namespace="ours", dry_run=True)
        assert (told.status, told.matched, told.removed or 0) == ("dry_run", 5, 0)
        assert (await client.bust("users", kind="prefix", namespace="ours")).removed == 5
        left = [key for key in keys if await ours.get(key) is not None]
        assert left == ["usersAbc:1", "u*", "other"]
        assert [key for key in keys if await theirs.get(key) is not None] == keys
        assert (await client.bust("*", kind="all", confirm=True, namespace="ours")).removed == 3
    await ours.aclose()
    await theirs.aclose()


class Interrupted:
    """A layer of Redis at which something happens right after each begin."""

    def __init__(self, url: str, between: Callable[[], Awaitable[object]]) -> None:
        self.inner = RedisBackend(url)
        self.between = between

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def begin(self, scope: Scope, *, soft: bool, wide: bool = False) -> int:
        generation = await self.inner.begin(scope, soft=soft, wide=wide)
        await self.between()
        return generation


class LateReaders:
    """Readers that have looked for some keys, and come to store the old value only later."""

    def __init__(self, cache: RedisCache) -> None:
        self.cache = cache
        self.looked: dict[str, Looked[Token]] = {}

    async def look(self, *keys: str) -> None:
        for key in keys:
            self.looked[key] = await self.cache.lookup(key)
            assert self.looked[key].found is None

    async def store(self) -> dict[str, bool]:
        """Store what each has made; tell for which that was not refused."""
        return {
            key: await self.cache.store(key, b"old", token=looked.token, ttl=60.0)
            for key, looked in self.looked.items()
        }

    async def seen(self) -> dict[str, bytes | None]:
        found = {key: await self.cache.get(key) for key in self.looked}
        return {key: it and it.value for key, it in found.items()}


def bust_of(engine: Engine, target: str, **more: Any) -> Bust:
    return engine.bust(
        Wish(**{"namespace": "default", "kind": "key", "target": target, "strategy": "dimensional", **more})
    )


@asynccontextmanager
async def opened(redis: RedisProcess) -> AsyncIterator[tuple[RedisCache, LateReaders, Engine]]:
    """Open a cache, readers of it, and an engine at whose begins these readers store."""
    cache = RedisCache(redis.url)
    readers = LateReaders(cache)
    engine = Engine([Layer(name="redis", number=0, backend=Interrupted(redis.url, readers.store))], Indexes())
    await engine.open()
    try:
        yield cache, readers, engine
    finally:
        await engine.close()
        await cache.aclose()


@pytest.mark.requirement("REL-04")
@pytest.mark.parametrize(("kind", "target"), [("key", "product"), ("prefix", "product"), ("tag", "shelf")])
async def test_a_dependent_made_before_the_bust_and_stored_before_its_fence_goes(
    redis: RedisProcess, kind: str, target: str
) -> None:
    """A begin cannot know what depends on the named, so such a fill is stored; it is as old as its reader's look."""
    async with opened(redis) as (cache, readers, engine):
        engine.register("product", tags=["shelf"])
        engine.register("page", ["product"])
        await cache.set("product", b"old", tags=["shelf"], ttl=60.0)
        await readers.look("page")
        await bust_of(engine, target, kind=kind).visit(engine.layers[0])
        assert await readers.seen() == {"page": None}
        assert await readers.store() == {"page": False}


@pytest.mark.requirement("REL-04")
async def test_dependents_made_before_a_hot_swap_and_stored_while_it_busts_go(redis: RedisProcess) -> None:
    """Each of the many that depend on the swapped name, though a begin names but one."""
    async with opened(redis) as (_, readers, engine):
        keys = ["page/1", "page/2", "page/3"]
        for key in keys:
            engine.register(key, ["model"])
        await readers.look(*keys)
        await engine.bust_dependents(["model"])
        assert await readers.seen() == dict.fromkeys(keys)
        assert await readers.store() == dict.fromkeys(keys, False)


@pytest.mark.requirement("REL-04")
@pytest.mark.parametrize("strategy", ["direct", "dimensional", "hybrid"])
async def test_no_late_fill_of_what_a_tag_reaches_is_stored_after_the_bust(redis: RedisProcess, strategy: str) -> None:
    """Also under a key whose tag only the registry knows, and of a variant, where variants are reached."""
    async with opened(redis) as (cache, readers, engine):
        engine.register("registered", tags=["shelf"])
        await cache.set("page", b"old", tags=["shelf"], ttl=60.0)
        await readers.look("page?lang=de", "registered")
        await bust_of(engine, "shelf", kind="tag", strategy=strategy).visit(engine.layers[0])
        narrow = strategy == "direct"
        assert await readers.seen() == {"page?lang=de": b"old" if narrow else None, "registered": None}
        assert await readers.store() == {"page?lang=de": narrow, "registered": False}


async def test_a_hybrid_bust_is_answered_once_no_reader_sees_what_bears_the_tag(redis: RedisProcess) -> None:
    """Also of what only the registry knows to bear it."""
    async with opened(redis) as (cache, _, engine):
        engine.register("registered", tags=["shelf"])
        await cache.set("registered", b"old", ttl=60.0)
        await cache.set("page", b"old", tags=["shelf"], ttl=60.0)
        bust = bust_of(engine, "shelf", kind="tag", strategy="hybrid")
        await bust.visit(engine.layers[0], "first")
        assert [await cache.get(key) for key in ("registered", "page")] == [None, None]
        assert bust.removed == {"redis": 1}
        await bust.visit(engine.layers[0])
        assert bust.removed == {"redis": 2}


@pytest.mark.requirement("REL-04")
@pytest.mark.parametrize("kind", ["key", "tag"])
async def test_pages_made_of_fragments_made_of_what_is_busted_are_never_old(
    redis: RedisProcess, tmp_path: Path, kind: Any
) -> None:
    """Readers make pages of fragments all the while; no read that begins after a bust has returned sees an old one."""
    version = acknowledged = 1
    fragments, pages = [f"fragment/{number}" for number in range(8)], [f"page/{number}" for number in range(4)]
    cache = RedisCache(redis.url)
    stale: list[tuple[int, int]] = []
    reads = 0
    dice = random.Random(3)
    stop = asyncio.Event()

    async def render_fragment() -> bytes:
        told = version
        await asyncio.sleep(dice.random() * 0.004)
        return b"%d" % told

    async def render_page() -> bytes:
        parts = [await cache.get_or_set(it, render_fragment, ttl=None) for it in dice.sample(fragments, 4)]
        return min(parts, key=int)

    async def read() -> None:
        nonlocal reads
        while not stop.is_set():
            least = acknowledged
            seen = int(await cache.get_or_set(dice.choice(pages), render_page, ttl=dice.choice([0.03, None])))
            reads += 1
            if seen < least:
                stale.append((seen, least))
            await asyncio.sleep(dice.random() * 0.01)

    def is_beyond(many: int) -> bool:
        return reads > many

    async with daemon(redis.url, tmp_path / "journal", answer_within=10.0) as client:
        for fragment in fragments:
            depends_on, tags = ([], ["product:7"]) if kind == "tag" else (["product:7"], [])
            await client.register(fragment, depends_on, tags=tags)
        for page in pages:
            await client.register(page, fragments)
        readers = [asyncio.create_task(read()) for _ in range(16)]
        for _ in range(25):
            before = reads
            await eventually(partial(is_beyond, before + 60), "readers read")
            version += 1
            assert (await client.bust("product:7", kind=kind)).ok
            acknowledged = version
        stop.set()
        await asyncio.gather(*readers)
    assert stale == []
    await cache.aclose()


async def test_what_is_registered_anew_behind_the_fence_stays_registered(redis: RedisProcess) -> None:
    """The registry's own bust is of what was there before the first layer was begun at, though it comes last."""
    cache = RedisCache(redis.url)
    indexes = Indexes()

    async def make_anew() -> None:
        indexes.of("default").add("page", ["product"])
        await cache.set("page", b"new", ttl=60.0)

    layers = [
        Layer(name="redis", number=0, backend=Interrupted(redis.url, make_anew)),
        Layer(name="memory", number=1, backend=MemoryBackend(indexes)),
    ]
    indexes.of("default").add("page", ["product"])
    await cache.set("page", b"old", ttl=60.0)
    jobs = Jobs(Engine(layers, indexes), Journal())
    await jobs.open()
    await jobs.bust(Wish(namespace="default", kind="key", target="page", strategy="direct"))
    assert await cache.get("page") is not None
    assert indexes.of("default").dependents("product") == ["page"]
    await jobs.close()
    await cache.aclose()


async def test_who_cancels_a_bust_takes_no_fence_away_that_another_needs(redis: RedisProcess) -> None:
    """Two of the same branch are under way; the fence goes with the last of them, whichever that is."""
    async with opened(redis) as (cache, _, engine):
        [layer] = engine.layers
        for number in range(3):
            await cache.set(f"p/{number}", b"old", ttl=None)
        first, second = (bust_of(engine, "p", kind="prefix", strategy="hybrid") for _ in range(2))
        await first.visit(layer, "first")
        await second.visit(layer, "first")
        await second.abandon()
        assert await cache.get("p/1") is None
        third = bust_of(engine, "p", kind="prefix", strategy="hybrid")
        await third.visit(layer, "first")
        await first.visit(layer)
        await third.abandon()
        await cache.set("p/1", b"new", ttl=None)
        assert await cache.get("p/1") is not None
        assert redis.ask("ZCARD", "bustcall:{default}:o") == b":0\r\n"
        assert [len(it) for it in engine.fences.values()] == [0]
