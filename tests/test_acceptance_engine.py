"""What the engine promises, the whole way: a client, HTTP, a daemon process, and entries in memory or in a real Redis.

What is a key, a prefix or a tag is said anew here, in a line each, and not taken from the code that is tested.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, final

import aiohttp
import pytest
import pytest_asyncio

from pybustcall import BustcallClient
from pybustcall.errors import InvalidRequest
from pybustcall.integrations.redis import RedisCache
from pybustcall.models import STRATEGIES
from pybustcall.testing import FakeDaemon
from tests.configured_daemons import ConfiguredDaemons
from tests.conftest import PATIENCE, DaemonProcess
from tests.engines import RedisProcess

DEFAULT = "default"


class Store(Protocol):
    """Where entries are held."""

    async def put(self, key: str, *, tags: Iterable[str] = (), ttl: float = 600.0, namespace: str = DEFAULT) -> None:
        """Have an entry held."""

    async def holds(self, key: str, namespace: str = DEFAULT) -> bool:
        """Tell whether it is held."""


@final
class InMemory:
    """The daemon's own registry. Whether an entry is there is told by a bust that is not done."""

    def __init__(self, client: BustcallClient) -> None:
        self._client = client

    async def put(self, key: str, *, tags: Iterable[str] = (), ttl: float = 600.0, namespace: str = DEFAULT) -> None:
        await self._client.register(key, tags=tags, ttl=ttl, namespace=namespace)

    async def holds(self, key: str, namespace: str = DEFAULT) -> bool:
        told = await self._client.bust(key, strategy="direct", namespace=namespace, dry_run=True)
        return told.matched == 1


@final
class InRedis:
    """An application's cache, with a view of its own for each namespace."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._caches: dict[str, RedisCache] = {}

    def cache(self, namespace: str) -> RedisCache:
        if namespace not in self._caches:
            self._caches[namespace] = RedisCache(self._url, namespace=namespace)
        return self._caches[namespace]

    async def put(self, key: str, *, tags: Iterable[str] = (), ttl: float = 600.0, namespace: str = DEFAULT) -> None:
        assert await self.cache(namespace).set(key, key.encode(), tags=tags, ttl=ttl)

    async def holds(self, key: str, namespace: str = DEFAULT) -> bool:
        return await self.cache(namespace).get(key) is not None

    async def aclose(self) -> None:
        for cache in self._caches.values():
            await cache.aclose()


@final
class Place:
    """A daemon, and what it busts: `redis` is None where that is its own memory."""

    def __init__(self, daemon: DaemonProcess, redis: RedisProcess | None) -> None:
        self.daemon = daemon
        self.redis = redis


@pytest.fixture(scope="module", params=["memory", "redis"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Run a daemon with one layer for all tests, which empty it before they begin."""
    directory: Path = tmp_path_factory.mktemp(request.param)
    redis = RedisProcess(directory) if request.param == "redis" else None
    url = "" if redis is None else f'url = "{redis.url}"\n'
    daemons = ConfiguredDaemons(
        directory, f'[journal]\npath = "journal"\n[[layers]]\nname = "it"\nbackend = "{request.param}"\n{url}'
    )
    try:
        yield Place(daemons.start(), redis)
    finally:
        daemons.close()
        if redis is not None:
            redis.kill()


NAMESPACES = (DEFAULT, "our", "ours", "ours.eu", "ours-2", "OURS")


@pytest_asyncio.fixture
async def client(place: Place) -> AsyncIterator[BustcallClient]:
    async with BustcallClient(place.daemon.url, probes=None, timeout=PATIENCE) as client:
        for namespace in NAMESPACES:
            await client.bust("*", kind="all", confirm=True, namespace=namespace)
        yield client


@pytest_asyncio.fixture
async def store(place: Place, client: BustcallClient) -> AsyncIterator[Store]:
    async with AsyncExitStack() as stack:
        if place.redis is None:
            yield InMemory(client)
        else:
            in_redis = InRedis(place.redis.url)
            stack.push_async_callback(in_redis.aclose)
            yield in_redis


async def which(store: Store, keys: Iterable[str], namespace: str = DEFAULT) -> list[str]:
    """List those of the keys that are held."""
    return [key for key in keys if await store.holds(key, namespace)]


async def test_a_tag_lasts_as_long_as_its_last_member(client: BustcallClient, store: Store) -> None:
    """Once the server says that its member of 1 second has gone, the tag still leads to the one of 100 seconds."""
    await store.put("short", tags=["t"], ttl=1.0)
    await store.put("long", tags=["t"], ttl=100.0)
    assert await which(store, ["short", "long"]) == ["short", "long"]
    async with asyncio.timeout(PATIENCE):
        while await store.holds("short"):
            await asyncio.sleep(0.05)
    assert await store.holds("long")
    busted = await client.bust("t", kind="tag")
    assert (busted.status, busted.removed) == ("busted", 1)
    assert not await store.holds("long")
    assert (await client.bust("t", kind="tag", dry_run=True)).matched == 0


async def test_a_member_that_was_stored_again_is_found_by_its_new_tags_only(
    client: BustcallClient, store: Store
) -> None:
    """And lives as long as it was said the second time."""
    await store.put("page", tags=["old", "both"], ttl=1.0)
    await store.put("page", tags=["new", "both"], ttl=100.0)
    await store.put("timer", ttl=1.0)
    async with asyncio.timeout(PATIENCE):
        while await store.holds("timer"):
            await asyncio.sleep(0.05)
    assert (await client.bust("old", kind="tag")).removed == 0
    assert await store.holds("page")
    assert (await client.bust("both", kind="tag", dry_run=True)).matched == 1
    assert (await client.bust("new", kind="tag")).removed == 1


async def test_a_prefix_ends_with_its_segment(client: BustcallClient, store: Store) -> None:
    """`users` leaves `usersAbc:1`; with a separator at its end it covers what begins so, but not the key before it."""
    keys = [
        "users",
        "users/1",
        "users:2",
        "users?page=3",
        "users#4",
        "users/1/photo",
        "usersAbc:1",
        "users.bak",
        "User",
    ]
    for key in keys:
        await store.put(key)
    assert (await client.bust("users/", kind="prefix", strategy="direct")).removed == 2
    left = ["users", "users:2", "users?page=3", "users#4", "usersAbc:1", "users.bak", "User"]
    assert await which(store, keys) == left
    assert (await client.bust("users", kind="prefix")).removed == 4
    assert await which(store, keys) == ["usersAbc:1", "users.bak", "User"]


PATTERNS = ("*", "?", "[a-z]", "[^a]", "\\", "^", "a*", "a?c", "a[b]c", "a\\*", "**", "%", "{a,b}", ".*", "$", "a|b")
PLAIN = ("a", "b", "abc", "a.c", "ab", "*/x", "a/x", "?/x", "^/x", "\\/x", "[a-z]/x", "a*/x", "ab/x", ".*/x", "{a,b}/x")
KEYS = PATTERNS + PLAIN


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_characters_of_globs_and_patterns_are_just_characters(
    pattern: str, client: BustcallClient, store: Store
) -> None:
    """In a key, in a prefix and in a tag: nothing goes but what is called so."""
    for key in KEYS:
        await store.put(key, tags=[key])
    named = {
        "key": [pattern],
        "tag": [pattern],
        "prefix": [key for key in KEYS if key == pattern or key.startswith(f"{pattern}/")],
    }
    for kind in ("key", "tag", "prefix"):
        told = await client.bust(pattern, kind=kind, strategy="direct", dry_run=True)
        assert told.matched == len(named[kind])
        assert (await client.bust(pattern, kind=kind, strategy="direct")).removed == len(named[kind])
        assert await which(store, KEYS) == [key for key in KEYS if key not in named[kind]]
        for key in named[kind]:
            await store.put(key, tags=[key])


async def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/api/v1/bust", json=body) as response:
        return response.status, await response.json(content_type=None)


MISTAKES: list[dict[str, Any]] = [
    {"target": "page", "namespace": ""},
    {"target": "page", "namespace": "*"},
    {"target": "page", "namespace": "ours/../theirs"},
    {"target": "page", "kind": "prefix", "namespace": ""},
    {"target": "*", "kind": "all"},
    {"target": "*", "kind": "all", "confirm": False},
    {"target": "page", "kind": "all", "confirm": True},
    {"target": "*", "kind": "all", "namespace": ""},
    {"target": "*", "kind": "all", "namespace": "", "confirm": True},
    {"target": "", "kind": "prefix"},
    {"target": "", "kind": "tag"},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
async def test_what_is_meant_by_mistake_is_refused_twice(
    mistake: dict[str, Any], place: Place, client: BustcallClient, store: Store
) -> None:
    """By the client before a daemon hears of it, and by the daemon whoever asks: nothing is removed or written down."""
    await store.put("page", tags=["page"])
    async with FakeDaemon(capabilities=["cache.bust.prefix", "cache.bust.tag", "cache.bust.all"]) as fake:
        async with BustcallClient(fake.url, probes=None) as careful:
            with pytest.raises(InvalidRequest, match="nothing was sent"):
                await careful.bust(**mistake)
        assert fake.connections == 0
    before = await client.jobs(limit=1)
    status, problem = await post(place.daemon.url, mistake)
    assert (status, problem["status"]) == (422, 422)
    assert await client.jobs(limit=1) == before
    assert await store.holds("page")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("kind", "target"),
    [("key", "a/1"), ("prefix", "a"), ("tag", "t"), ("all", "*")],
    ids=["key", "prefix", "tag", "all"],
)
async def test_a_bust_of_one_tenant_never_touches_anothers_entries(
    kind: Any, target: str, strategy: str, client: BustcallClient, store: Store
) -> None:
    """Nor those of one that is called alike, nor those of none: they have the same keys, variants and tags."""
    keys = ["a/1", "a/1.gz", "a/1?v=2", "a/2", "b"]
    for namespace, key in itertools.product(NAMESPACES, keys):
        await store.put(key, tags=["t"], namespace=namespace)
    busted = await client.bust(
        target, kind=kind, strategy=strategy, namespace="ours", confirm=True, verify=True, reason="tenant"
    )
    assert busted.job is not None
    assert (await client.wait_job(busted.job, timeout=PATIENCE)).state == "done"
    gone = {"prefix": keys[:4], "tag": keys, "all": keys, "key": keys[:1] if strategy == "direct" else keys[:3]}[kind]
    assert await which(store, keys, "ours") == [key for key in keys if key not in gone]
    for namespace in NAMESPACES:
        assert namespace == "ours" or await which(store, keys, namespace) == keys, namespace


async def test_what_depends_on_a_key_of_one_tenant_is_another_than_what_depends_on_anothers(
    client: BustcallClient, store: Store
) -> None:
    """Though both are called alike, also by way of others."""
    for namespace in NAMESPACES:
        for key, depends_on in (("page", ["fragment"]), ("fragment", ["product:7"])):
            await store.put(key, namespace=namespace)
            await client.register(key, depends_on, namespace=namespace)
    assert (await client.bust("product:7", namespace="ours")).removed == 2
    for namespace in NAMESPACES:
        left = [] if namespace == "ours" else ["page", "fragment"]
        assert await which(store, ["page", "fragment"], namespace) == left


@pytest.mark.parametrize("place", ["redis"], indirect=True)
async def test_a_bust_of_one_tenant_refuses_no_fill_of_another(place: Place, client: BustcallClient) -> None:
    """What one was making meanwhile is stored; the tenant's own is refused; in memory nobody stores."""
    assert place.redis is not None
    caches = InRedis(place.redis.url)
    tokens = {namespace: (await caches.cache(namespace).lookup("page")).token for namespace in NAMESPACES}
    for kind, target in (("key", "page"), ("prefix", "page"), ("tag", "t"), ("all", "*")):
        await client.bust(target, kind=kind, namespace="ours", confirm=True)  # type: ignore[arg-type]
    stored = [
        namespace
        for namespace in NAMESPACES
        if await caches.cache(namespace).store("page", b"v", token=tokens[namespace], tags=["t"], ttl=60.0)
    ]
    assert stored == [namespace for namespace in NAMESPACES if namespace != "ours"]
    await caches.aclose()
