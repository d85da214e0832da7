"""What holds for readers' caches of every kind: who makes a value, who waits for it, and what a bust undoes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pybustcall.daemon.backends import Backend
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.errors import ClientClosed, InvalidRequest
from pybustcall.integrations.memcached import MemcachedCache
from pybustcall.integrations.reading import Found
from pybustcall.integrations.redis import RedisCache
from pybustcall.integrations.sqlite import SqliteCache
from pybustcall.models import Kind
from tests.conftest import PATIENCE, eventually
from tests.engines import free_port
from tests.memcached_process import shared_memcached
from tests.readers import SHOP, Maker, bust, never, quick, start, waiting
from tests.redis_harness import shared_redis


@dataclass
class House:
    """One kind of cache: how readers have it, how if it cannot be used, and the daemon's half."""

    kind: Callable[..., Any]
    where: str | Path
    nowhere: str | Path
    backend: Backend
    shortest_lease: float = 0.05

    def cache(self, **more: Any) -> Any:
        """Make a cache of readers."""
        return self.kind(self.where, **{"namespace": SHOP, "timeout": PATIENCE, **more})

    def broken_cache(self) -> Any:
        """Make one that cannot be used."""
        return self.kind(self.nowhere, namespace=SHOP)


@pytest.fixture(params=["redis", "sqlite", "memcached"])
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    """An empty cache of each kind."""
    match request.param:
        case "redis":
            redis = shared_redis()
            redis.ask("FLUSHALL")
            nowhere = f"redis://127.0.0.1:{free_port()}/0"
            made = House(RedisCache, redis.url, nowhere, RedisBackend(redis.url, timeout=PATIENCE))
        case "sqlite":
            path = tmp_path / "cache.db"
            made = House(SqliteCache, path, tmp_path / "missing" / "cache.db", SqliteBackend(path, timeout=PATIENCE))
        case _:
            memcached = shared_memcached()
            memcached.ask("flush_all")
            nowhere = f"memcached://127.0.0.1:{free_port()}"
            made = House(MemcachedCache, memcached.url, nowhere, MemcachedBackend(memcached.url, timeout=PATIENCE), 2.0)
    yield made
    await made.backend.close()


@pytest.fixture
async def cache(house: House) -> AsyncIterator[Any]:
    """What readers have of it."""
    async with house.cache() as cache:
        yield cache


@pytest.fixture
def backend(house: House) -> Backend:
    """What the daemon has of it."""
    return house.backend


# Values


async def test_a_value_is_made_once(house: House, cache: Any) -> None:
    """And found from then on, by other processes, too."""
    async with house.cache() as other:
        assert await cache.get_or_set("k", quick, tags=["t"], ttl=60.0) == b"v"
        assert await cache.get_or_set("k", never, tags=["t"], ttl=60.0) == b"v"
        assert await other.get_or_set("k", never, tags=["other"], ttl=60.0) == b"v"
        assert await cache.get("k") == await other.get("k") == Found(b"v", stale=False)
        assert await cache.get("missing") is None


async def test_a_plain_function_may_make_it(cache: Any) -> None:
    """If it does not block."""
    assert await cache.get_or_set("k", lambda: b"plain", ttl=None) == b"plain"
    assert await cache.get("k") == Found(b"plain", stale=False)


async def test_what_is_no_value_is_refused(cache: Any) -> None:
    """And nothing is stored."""
    with pytest.raises(TypeError, match="must return bytes, not str"):
        await cache.get_or_set("k", lambda: "text", ttl=None)
    looked = await cache.lookup("k")
    for call in (cache.set("k", "text", ttl=None), cache.store("k", "text", token=looked.token, ttl=None)):
        with pytest.raises(InvalidRequest, match="value must be bytes, not str"):
            await call
    assert await cache.get("k") is None


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("key", {"key": ""}),
        ("key", {"key": "a\n"}),
        ("key", {"key": "\ud800"}),
        ("key", {"key": 7}),
        ("key", {"key": "a" + "/:?#" * 32 + "/"}),
        ("tag", {"tags": [""]}),
        ("tag", {"tags": ["a\nb"]}),
        ("tags", {"tags": "product:7"}),
        ("tags", {"tags": None}),
        ("tags", {"tags": [f"{number}" for number in range(257)]}),
        ("ttl", {"ttl": 0}),
        ("ttl", {"ttl": -1.0}),
        ("ttl", {"ttl": float("nan")}),
        ("ttl", {"ttl": float("inf")}),
        ("ttl", {"ttl": True}),
        ("ttl", {"ttl": "60"}),
    ],
)
async def test_arguments_that_cannot_be_are_refused(cache: Any, field: str, arguments: dict[str, Any]) -> None:
    """Before anything is made or sent."""
    said = {"key": "k", "tags": ["t"], "ttl": 60.0, **arguments}
    key = said.pop("key")
    token = (await cache.lookup("other")).token
    for call in (
        cache.get_or_set(key, never, **said),
        cache.set(key, b"v", **said),
        cache.store(key, b"v", token=token, **said),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await call
        assert caught.value.field == field


@pytest.mark.parametrize("made", [b"value", None])
async def test_what_is_no_function_makes_no_value(cache: Any, made: object) -> None:
    """Also where one is held already; nor is a coroutine, which is not left to be awaited by nobody."""
    await cache.set("held", b"v", ttl=60.0)
    for key in ("held", "k"):
        with pytest.raises(InvalidRequest, match=r"make must be a function without arguments, .* not") as caught:
            await cache.get_or_set(key, made, ttl=60.0)
        assert caught.value.field == "make"
        with pytest.raises(InvalidRequest, match="not what calling it returned; name it without calling it"):
            await cache.get_or_set(key, quick(), ttl=60.0)


async def test_a_key_with_very_many_marks_cannot_be_stored(cache: Any) -> None:
    """It says how many there are and may be, and shows no key; to look for one is possible, and 128 are no trouble."""
    key = "secret/" * 129
    looked = await cache.lookup(key)
    assert looked.found is await cache.get(key) is None
    for call in (
        cache.store(key, b"v", token=looked.token, ttl=None),
        cache.set(key, b"v", ttl=None),
        cache.get_or_set(key, never, ttl=None),
    ):
        with pytest.raises(InvalidRequest, match=r"129 of the marks .* at most 128") as caught:
            await call
        assert "secret" not in str(caught.value)
        assert caught.value.target == key
    assert await cache.get_or_set("secret/" * 128, quick, ttl=None) == b"v"
    assert await cache.get("secret/" * 128) == Found(b"v", stale=False)


# Busts


@pytest.mark.parametrize(("kind", "target"), [("key", "p/1"), ("prefix", "p"), ("tag", "t"), ("all", "*")])
@pytest.mark.parametrize("soft", [False, True])
async def test_a_slow_fill_is_not_stored_after_a_bust(
    cache: Any, backend: Backend, kind: Kind, target: str, soft: bool
) -> None:
    """Whoever asked before it gets the value, and whoever asks after it makes a new one."""
    old, new = Maker(b"old"), Maker(b"new")
    before = start(cache, "p/1", old, tags=["t"])
    await eventually(lambda: old.calls)
    await bust(backend, kind, target, soft=soft)
    after = start(cache, "p/1", new, tags=["t"])
    await eventually(lambda: new.calls)
    new.go.set()
    assert await after == b"new"
    old.go.set()
    assert await before == b"old"
    assert await cache.get("p/1") == Found(b"new", stale=False)


async def test_a_slow_fill_is_stored_after_an_unrelated_bust(cache: Any, backend: Backend) -> None:
    """To refuse it would cost a miss for nothing."""
    make = Maker()
    task = start(cache, "p/1", make, tags=["t"])
    await eventually(lambda: make.calls)
    await bust(backend, "prefix", "p/10")
    await bust(backend, "tag", "u")
    make.go.set()
    await task
    assert await cache.get("p/1") == Found(b"v", stale=False)


async def test_a_stale_value_is_served_while_one_makes_it_anew(cache: Any, backend: Backend) -> None:
    """The others get it at once."""
    await cache.set("k", b"old", ttl=60.0)
    await bust(backend, "key", "k", soft=True)
    make = Maker(b"new")
    one = start(cache, "k", make)
    await eventually(lambda: make.calls)
    assert await asyncio.gather(*(cache.get_or_set("k", never, ttl=60.0) for _ in range(10))) == [b"old"] * 10
    assert await cache.get("k") == Found(b"old", stale=True)
    make.go.set()
    assert await one == b"new"
    assert await cache.get("k") == Found(b"new", stale=False)


async def test_a_lease_that_ends_chooses_another(house: House, backend: Backend) -> None:
    """If the one who was chosen has failed."""
    async with house.cache(lease=house.shortest_lease) as cache:
        await cache.set("k", b"old", ttl=60.0)
        await bust(backend, "key", "k", soft=True)

        async def fail() -> bytes:
            raise LookupError("the database is down")

        with pytest.raises(LookupError):
            await cache.get_or_set("k", fail, ttl=60.0)
        async with asyncio.timeout(10):
            while (value := await cache.get_or_set("k", lambda: b"new", ttl=60.0)) != b"new":
                assert value == b"old"
                await asyncio.sleep(0.01)


# Flights


async def test_many_who_miss_at_once_make_it_once(cache: Any) -> None:
    """All get the same."""
    make = Maker()
    tasks = [start(cache, "k", make) for _ in range(50)]
    await eventually(lambda: waiting(cache, "k") == 50)
    make.go.set()
    assert await asyncio.gather(*tasks) == [b"v"] * 50
    assert make.calls == 1


async def test_nobody_joins_a_flight_from_before_a_bust(cache: Any, backend: Backend) -> None:
    """Not even of something else: the token tells only that something was busted."""
    first, second = Maker(b"1"), Maker(b"2")
    one = start(cache, "k", first)
    await eventually(lambda: first.calls)
    await cache.set("x", b"v", ttl=None)
    await bust(backend, "key", "k")
    two = [start(cache, "k", second) for _ in range(3)]
    await eventually(lambda: second.calls)
    first.go.set()
    second.go.set()
    assert await one == b"1"
    assert await asyncio.gather(*two) == [b"2"] * 3
    assert (first.calls, second.calls) == (1, 1)
    assert await cache.get("k") == Found(b"2", stale=False)


async def test_what_fails_is_raised_by_all_who_wait(cache: Any) -> None:
    """And the next call tries again."""
    calls = 0

    async def fail() -> bytes:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.01)
        raise LookupError("no such product")

    found = await asyncio.gather(*(cache.get_or_set("k", fail, ttl=60.0) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(it, LookupError) for it in found)
    assert calls >= 1
    assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"


async def test_a_flight_goes_on_if_the_one_who_began_it_is_cancelled(cache: Any) -> None:
    """While others wait for it."""
    make = Maker()
    first = start(cache, "k", make)
    await eventually(lambda: make.calls)
    second = start(cache, "k", make)
    await eventually(lambda: waiting(cache, "k") == 2)
    first.cancel()
    await asyncio.wait({first})
    assert first.cancelled()
    make.go.set()
    assert await second == b"v"
    assert (make.calls, make.cancelled) == (1, 0)


async def test_a_flight_ends_if_nobody_waits_any_more(cache: Any) -> None:
    """At once, and the next call begins a new one."""
    make = Maker()
    tasks = [start(cache, "k", make) for _ in range(3)]
    await eventually(lambda: make.calls and waiting(cache, "k") == 3)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    assert make.cancelled == 1
    assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"


async def test_a_call_that_is_cancelled_anywhere_leaves_nothing_behind(cache: Any) -> None:
    """After any number of turns of the loop, and the cache goes on as before."""
    for turns in range(40):
        task = asyncio.create_task(cache.get_or_set(f"k/{turns}", quick, ttl=60.0))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() or task.result() == b"v"
        assert await cache.get_or_set(f"k/{turns}", quick, ttl=60.0) == b"v"
        assert await cache.get("missing") is None
    assert len(asyncio.all_tasks()) == 1


async def test_closing_breaks_off_what_is_made(house: House) -> None:
    """Whoever waits is told; a later call opens anew, and nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    cache = house.cache()
    make = Maker()
    task = start(cache, "k", make)
    await eventually(lambda: make.calls)
    await cache.aclose()
    await cache.aclose()
    with pytest.raises(ClientClosed):
        await task
    assert make.cancelled == 1
    assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"
    await cache.aclose()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, "all is closed")


# Values that are made of others


async def test_what_makes_a_value_may_ask_for_others(cache: Any) -> None:
    """Side by side and one in the other, of which some are being made by others."""
    slow = Maker(b"slow")
    other = start(cache, "slow", slow)
    await eventually(lambda: slow.calls)

    async def inner() -> Any:
        return b"inner of " + await cache.get_or_set("slow", never, ttl=60.0)

    async def outer() -> bytes:
        found = await asyncio.gather(*(cache.get_or_set(key, inner, ttl=60.0) for key in ("a", "b", "a")))
        return b", ".join(found)

    task = asyncio.create_task(cache.get_or_set("outer", outer, ttl=60.0))
    await eventually(lambda: waiting(cache, "slow") == 3)
    slow.go.set()
    assert await task == b"inner of slow, inner of slow, inner of slow"
    assert await other == b"slow"


def asks_by(way: str, ask: Callable[[], Awaitable[bytes]]) -> Callable[[], Awaitable[bytes]]:
    """Tell how to ask for a value: oneself, or by tasks."""

    async def gather() -> bytes:
        return (await asyncio.gather(ask(), ask()))[0]

    async def task() -> bytes:
        return await asyncio.ensure_future(ask())

    return {"itself": ask, "gather": gather, "task": task}[way]


@pytest.mark.parametrize("way", ["itself", "gather", "task"])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("is_alive", [True, False])
async def test_a_value_that_is_made_of_itself_is_refused(house: House, way: str, length: int, is_alive: bool) -> None:
    """It would wait for itself for ever, or, if the cache cannot be used, make itself without an end."""
    async with house.cache() if is_alive else house.broken_cache() as cache:

        async def ask(number: int) -> Any:
            make = asks_by(way, partial(ask, (number + 1) % length))
            return await cache.get_or_set(f"secret/{number}/x", make, ttl=60.0)

        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"the entry secret/…\w+ cannot be made of itself") as caught:
                await asyncio.wait_for(ask(0), PATIENCE)
            assert "/x" not in str(caught.value)
        # What `gather` left behind still fails, and whoever joined it would, too.
        await eventually(lambda: not any(cache._filling._tasks.values()), "all flights have landed")
        assert await cache.get_or_set("secret/0/x", quick, ttl=60.0) == b"v"


async def test_values_that_wait_for_each_other_are_refused(cache: Any) -> None:
    """Where each was asked for by a reader of its own, so that neither is made for the sake of the other."""
    are_both_begun = asyncio.Barrier(3)

    async def ask(ring: list[str]) -> Any:
        async def make() -> Any:
            await are_both_begun.wait()
            return await cache.get_or_set(ring[1], never, ttl=60.0)

        return await cache.get_or_set(ring[0], make, ttl=60.0)

    readers = [ask(["a", "b"]), ask(["b", "c"]), ask(["c", "a"])]
    found = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), PATIENCE)
    assert [type(it) for it in found] == [RuntimeError] * 3
    assert await cache.get_or_set("a", quick, ttl=60.0) == b"v"


async def test_who_makes_a_value_may_ask_for_it_afterwards(cache: Any, backend: Backend) -> None:
    """By a task that it has begun, also if another reader is at the same key then."""
    tasks: list[asyncio.Task[bytes]] = []
    is_made = asyncio.Event()

    async def afterwards() -> Any:
        await is_made.wait()
        return await cache.get_or_set("k", never, ttl=60.0)

    async def make() -> bytes:
        tasks.append(asyncio.create_task(afterwards()))
        return b"first"

    assert await cache.get_or_set("k", make, ttl=60.0) == b"first"
    await bust(backend, "key", "k")
    second = Maker(b"second")
    reader = start(cache, "k", second)
    await eventually(lambda: second.calls)
    is_made.set()
    await eventually(lambda: waiting(cache, "k") == 2)
    second.go.set()
    assert await reader == await tasks[0] == b"second"


async def test_what_is_made_of_a_stale_entry_waits_for_it_to_be_made_anew(cache: Any, backend: Backend) -> None:
    """Or it would be stored as fresh with the old value in it; everybody else is served the stale one."""
    for key in ("part", "page"):
        await cache.set(key, b"old", ttl=60.0)
        await bust(backend, "key", key, soft=True)
    refresh = Maker(b"new")
    reader = start(cache, "part", refresh)
    await eventually(lambda: refresh.calls)
    assert await cache.get_or_set("part", never, ttl=60.0) == b"old"
    page = asyncio.create_task(cache.get_or_set("page", lambda: cache.get_or_set("part", never, ttl=60.0), ttl=60.0))
    await eventually(lambda: waiting(cache, "part") == 2)
    refresh.go.set()
    assert (await page, await reader) == (b"new", b"new")
    assert await cache.get("page") == Found(b"new", stale=False)


async def test_equal_keys_of_other_caches_are_others(house: House) -> None:
    """A tenant's page may be made of everybody's."""
    async with house.cache(namespace="a") as one, house.cache(namespace="b") as other:
        assert await one.get_or_set("k", lambda: other.get_or_set("k", quick, ttl=60.0), ttl=60.0) == b"v"
