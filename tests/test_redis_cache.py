"""The readers' half of a cache in Redis: who makes a value, who waits for it, and that no bust is ever undone."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import uvloop

from pybustcall.daemon.backends import Scope
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.errors import ClientClosed, ConfigurationError, InvalidRequest
from pybustcall.integrations.guard import Guard
from pybustcall.integrations.redis import Breaker, Found, RedisCache, RedisUnavailable
from pybustcall.models import Kind
from pybustcall.testing.proxy import FaultyProxy, Trouble
from tests.conftest import PATIENCE, eventually
from tests.engines import RedisProcess, free_port
from tests.redis_harness import shared_redis

SHOP = "shop"


@pytest.fixture
def engine() -> RedisProcess:
    """An empty server."""
    server = shared_redis()
    server.ask("FLUSHALL")
    return server


@pytest.fixture
async def cache(engine: RedisProcess) -> AsyncIterator[RedisCache]:
    """A cache in it."""
    async with RedisCache(engine.url, namespace=SHOP, timeout=10.0) as cache:
        yield cache


@pytest.fixture
async def backend(engine: RedisProcess) -> AsyncIterator[RedisBackend]:
    """The daemon's half."""
    backend = RedisBackend(engine.url)
    yield backend
    await backend.close()


@pytest.fixture
def dead() -> Iterator[str]:
    """The URL of a server that is not there."""
    return iter([f"redis://127.0.0.1:{free_port()}/0"])


async def bust(backend: RedisBackend, kind: Kind, target: str = "*", *, soft: bool = False) -> None:
    """Bust as the engine does."""
    scope = Scope(SHOP, kind, target)
    generation = await backend.begin(scope, soft=soft)
    async for keys in backend.select(scope):
        await backend.remove(SHOP, keys, generation=generation, soft=soft)
    await backend.end(scope, generation)


class Maker:
    """Makes values as slowly as the test wants, and counts."""

    def __init__(self, value: bytes = b"v") -> None:
        self.value = value
        self.calls = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self) -> bytes:
        self.calls += 1
        value = self.value
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return value


async def quick() -> bytes:
    """Make a value at once."""
    return b"v"


async def never() -> bytes:
    """Be not called."""
    raise AssertionError("it was called")


def start(cache: RedisCache, key: str, make: Maker, **more: Any) -> asyncio.Task[bytes]:
    """Ask for a value in a task."""
    return asyncio.create_task(cache.get_or_set(key, make, ttl=60.0, **more))


def waiting(cache: RedisCache, key: str) -> int:
    """Tell how many wait for a value."""
    return sum(flights[key].waiting for flights in cache._filling._flights.values() if key in flights)


# Values


async def test_a_value_is_made_once(cache: RedisCache) -> None:
    """And found from then on."""
    assert await cache.get_or_set("k", quick, tags=["t"], ttl=60.0) == b"v"
    assert await cache.get_or_set("k", never, tags=["t"], ttl=60.0) == b"v"
    assert await cache.get("k") == Found(b"v", stale=False)
    assert await cache.get("other") is None


async def test_a_plain_function_may_make_it(cache: RedisCache) -> None:
    """If it does not block."""
    assert await cache.get_or_set("k", lambda: b"plain", ttl=None) == b"plain"
    assert await cache.get("k") == Found(b"plain", stale=False)


async def test_an_entry_ends_with_its_ttl(cache: RedisCache) -> None:
    """A fraction of a millisecond is one."""
    await cache.set("k", b"v", ttl=0.0001)
    async with asyncio.timeout(10):
        while await cache.get("k") is not None:
            pass


async def test_what_is_no_value_is_refused(cache: RedisCache) -> None:
    """And nothing is stored."""
    with pytest.raises(TypeError, match="must return bytes, not str"):
        await cache.get_or_set("k", lambda: "text", ttl=None)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidRequest, match="value must be bytes, not str"):
        await cache.set("k", "text", ttl=None)  # type: ignore[arg-type]
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
        ("tags", {"tags": [f"{number}" for number in range(257)]}),
        ("ttl", {"ttl": 0}),
        ("ttl", {"ttl": -1.0}),
        ("ttl", {"ttl": float("nan")}),
        ("ttl", {"ttl": float("inf")}),
        ("ttl", {"ttl": True}),
        ("ttl", {"ttl": "60"}),
    ],
)
async def test_arguments_that_cannot_be_are_refused(cache: RedisCache, field: str, arguments: dict[str, Any]) -> None:
    """Before anything is made or sent."""
    said = {"key": "k", "tags": ["t"], "ttl": 60.0, **arguments}
    key = said.pop("key")
    for call in (cache.get_or_set(key, never, **said), cache.set(key, b"v", **said)):
        with pytest.raises(InvalidRequest) as caught:
            await call
        assert caught.value.field == field


async def test_a_key_with_very_many_marks_cannot_be_stored(cache: RedisCache) -> None:
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


def test_settings_that_cannot_be_are_refused() -> None:
    """At once."""
    for settings in (
        {},
        {"url": "redis://h", "client": redis.asyncio.Redis()},
        {"url": "http://h"},
        {"url": "redis://h", "prefix": "{"},
        {"url": "redis://h", "lease": 0},
        {"url": "redis://h", "timeout": -1},
        {"url": "redis://h", "on_error": "ignore"},
    ):
        with pytest.raises(ConfigurationError):
            RedisCache(**settings)
    with pytest.raises(InvalidRequest):
        RedisCache("redis://h", namespace="a/b")


# Busts


@pytest.mark.parametrize(("kind", "target"), [("key", "p/1"), ("prefix", "p"), ("tag", "t"), ("all", "*")])
@pytest.mark.parametrize("soft", [False, True])
async def test_a_slow_fill_is_not_stored_after_a_bust(
    cache: RedisCache, backend: RedisBackend, kind: Kind, target: str, soft: bool
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


async def test_a_slow_fill_is_stored_after_an_unrelated_bust(cache: RedisCache, backend: RedisBackend) -> None:
    """To refuse it would cost a miss for nothing."""
    make = Maker()
    task = start(cache, "p/1", make, tags=["t"])
    await eventually(lambda: make.calls)
    await bust(backend, "prefix", "p/10")
    await bust(backend, "tag", "u")
    make.go.set()
    await task
    assert await cache.get("p/1") == Found(b"v", stale=False)


async def test_a_stale_value_is_served_while_one_makes_it_anew(cache: RedisCache, backend: RedisBackend) -> None:
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


async def test_a_lease_that_ends_chooses_another(engine: RedisProcess, backend: RedisBackend) -> None:
    """If the one who was chosen has failed."""
    async with RedisCache(engine.url, namespace=SHOP, lease=0.05) as cache:
        await cache.set("k", b"old", ttl=60.0)
        await bust(backend, "key", "k", soft=True)

        async def fail() -> bytes:
            raise LookupError("the database is down")

        with pytest.raises(LookupError):
            await cache.get_or_set("k", fail, ttl=60.0)
        async with asyncio.timeout(10):
            while (value := await cache.get_or_set("k", lambda: b"new", ttl=60.0)) != b"new":
                assert value == b"old"


async def test_it_can_be_done_by_hand(cache: RedisCache, backend: RedisBackend) -> None:
    """Look up, make, store."""
    looked = await cache.lookup("k")
    assert (looked.found, looked.refresh) == (None, False)
    assert await cache.store("k", b"1", token=looked.token, tags=["t"], ttl=None)
    assert (await cache.lookup("k")).found == Found(b"1", stale=False)
    await bust(backend, "tag", "t", soft=True)
    assert not await cache.store("k", b"2", token=looked.token, ttl=None)
    looked = await cache.lookup("k")
    assert (looked.found, looked.refresh) == (Found(b"1", stale=True), True)
    assert not (await cache.lookup("k")).refresh
    assert await cache.set("k", b"3", ttl=None)
    assert await cache.get("k") == Found(b"3", stale=False)


# Flights


async def test_many_who_miss_at_once_make_it_once(cache: RedisCache) -> None:
    """All get the same."""
    make = Maker()
    tasks = [start(cache, "k", make) for _ in range(50)]
    await eventually(lambda: waiting(cache, "k") == 50)
    make.go.set()
    assert await asyncio.gather(*tasks) == [b"v"] * 50
    assert make.calls == 1


async def test_nobody_joins_a_flight_from_before_a_bust(cache: RedisCache, backend: RedisBackend) -> None:
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


async def test_what_fails_is_raised_by_all_who_wait(cache: RedisCache) -> None:
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


async def test_a_flight_goes_on_if_the_one_who_began_it_is_cancelled(cache: RedisCache) -> None:
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


async def test_a_flight_ends_if_nobody_waits_any_more(cache: RedisCache) -> None:
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


async def test_a_call_that_is_cancelled_anywhere_leaves_nothing_behind(cache: RedisCache) -> None:
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


async def test_closing_breaks_off_what_is_made(engine: RedisProcess) -> None:
    """Whoever waits is told; a later call opens anew."""
    cache = RedisCache(engine.url)
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


# Values that are made of others


async def test_what_makes_a_value_may_ask_for_others(cache: RedisCache) -> None:
    """Side by side and one in the other, of which some are being made by others."""
    slow = Maker(b"slow")
    other = start(cache, "slow", slow)
    await eventually(lambda: slow.calls)

    async def inner() -> bytes:
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
async def test_a_value_that_is_made_of_itself_is_refused(
    engine: RedisProcess, way: str, length: int, is_alive: bool
) -> None:
    """It would wait for itself for ever, or, without a server, make itself without an end."""
    url = engine.url if is_alive else f"redis://127.0.0.1:{free_port()}/0"
    async with RedisCache(url, timeout=10.0) as cache:

        async def ask(number: int) -> bytes:
            make = asks_by(way, partial(ask, (number + 1) % length))
            return await cache.get_or_set(f"secret/{number}/x", make, ttl=60.0)

        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"the entry secret/…\w+ cannot be made of itself") as caught:
                await asyncio.wait_for(ask(0), PATIENCE)
            assert "/x" not in str(caught.value)
        # What `gather` left behind still fails, and whoever joined it would, too.
        await eventually(lambda: not any(cache._filling._tasks.values()), "all flights have landed")
        assert await cache.get_or_set("secret/0/x", quick, ttl=60.0) == b"v"


async def test_values_that_wait_for_each_other_are_refused(cache: RedisCache) -> None:
    """Where each was asked for by a reader of its own, so that neither is made for the sake of the other."""
    are_both_begun = asyncio.Barrier(3)

    async def ask(ring: list[str]) -> bytes:
        async def make() -> bytes:
            await are_both_begun.wait()
            return await cache.get_or_set(ring[1], never, ttl=60.0)

        return await cache.get_or_set(ring[0], make, ttl=60.0)

    readers = [ask(["a", "b"]), ask(["b", "c"]), ask(["c", "a"])]
    found = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), PATIENCE)
    assert [type(it) for it in found] == [RuntimeError] * 3
    assert await cache.get_or_set("a", quick, ttl=60.0) == b"v"


async def test_who_makes_a_value_may_ask_for_it_afterwards(cache: RedisCache, backend: RedisBackend) -> None:
    """By a task that it has begun, also if another reader is at the same key then."""
    tasks: list[asyncio.Task[bytes]] = []
    is_made = asyncio.Event()

    async def afterwards() -> bytes:
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


async def test_what_is_made_of_a_stale_entry_waits_for_it_to_be_made_anew(
    cache: RedisCache, backend: RedisBackend
) -> None:
    """Or it would be stored as fresh with the old value in it; everybody else is served the stale one."""
    for key in ("part", "page"):
        await cache.set(key, b"old", ttl=60.0)
        await bust(backend, "key", key, soft=True)
    refresh = Maker(b"new")
    reader = start(cache, "part", refresh)
    await eventually(lambda: refresh.calls)
    assert await cache.get_or_set("part", never, ttl=60.0) == b"old"
    page = asyncio.create_task(cache.get_or_set("page", lambda: cache.get_or_set("part", never, ttl=60.0), ttl=60.0))
    await asyncio.sleep(0)
    refresh.go.set()
    assert (await page, await reader) == (b"new", b"new")
    assert await cache.get("page") == Found(b"new", stale=False)


async def test_equal_keys_of_other_caches_are_others(engine: RedisProcess) -> None:
    """A tenant's page may be made of everybody's."""
    async with RedisCache(engine.url, namespace="a") as one, RedisCache(engine.url, namespace="b") as other:
        assert await one.get_or_set("k", lambda: other.get_or_set("k", quick, ttl=60.0), ttl=60.0) == b"v"


# Trouble


async def test_what_lies_where_an_entry_would_is_not_written_over(
    cache: RedisCache, engine: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told what there is and what to do; values are made all the same."""
    engine.ask("SET", f"bustcall:{{{SHOP}}}:e:secret/k", "of somebody")
    assert await cache.get("secret/k") is None
    looked = await cache.lookup("secret/k")
    for call in (cache.set("secret/k", b"v", ttl=None), cache.store("secret/k", b"v", token=looked.token, ttl=None)):
        with pytest.raises(RedisUnavailable, match=r"there is a string that is none of ours; .* remove it") as caught:
            await call
        assert (caught.value.applied, caught.value.whole, caught.value.answered) == ("no", False, True)
        assert "/k" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert await cache.get_or_set("secret/k", quick, ttl=None) == b"v"
    assert "none of ours" in caplog.text
    assert engine.ask("GET", f"bustcall:{{{SHOP}}}:e:secret/k") == b"$11\r\nof somebody\r\n"


async def test_without_redis_values_are_made_all_the_same(
    dead: Iterator[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once in a while, not for each."""
    async with RedisCache(next(dead)) as cache:
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"
    assert len(caplog.records) == 1
    assert "without a cache" in caplog.text


async def test_it_can_be_told_to_raise(dead: Iterator[str]) -> None:
    """As all calls but `get_or_set` do."""
    async with RedisCache(next(dead), on_error="raise", breaker=None) as cache:
        for call in (
            cache.get_or_set("k", never, ttl=60.0),
            cache.get("k"),
            cache.lookup("k"),
            cache.set("k", b"v", ttl=60.0),
        ):
            with pytest.raises(RedisUnavailable) as caught:
                await call
            assert caught.value.whole
            assert caught.value.applied == "maybe"


@pytest.mark.parametrize("on_error", ["fill", "raise"])
async def test_a_server_that_dies_meanwhile_does_not_lose_the_value(tmp_path: Path, on_error: Any) -> None:
    """Unless it is to be told; and it is used again when it is back."""
    with RedisProcess(tmp_path) as server:
        async with RedisCache(server.url, on_error=on_error) as cache:
            make = Maker()
            task = start(cache, "k", make)
            await eventually(lambda: make.calls)
            server.kill()
            make.go.set()
            if on_error == "fill":
                assert await task == b"v"
            else:
                with pytest.raises(RedisUnavailable):
                    await task
            server.start()
            assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"
            assert await cache.get("k") == Found(b"v", stale=False)


async def test_a_full_server_does_not_keep_values_from_being_made(tmp_path: Path) -> None:
    """They are not cached."""
    with RedisProcess(tmp_path) as server:
        async with RedisCache(server.url) as cache:
            await cache.set("kept", b"v", ttl=None)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            assert await cache.get_or_set("kept", never, ttl=None) == b"v"
            assert await cache.get_or_set("k", quick, ttl=None) == b"v"
            assert await cache.get("k") is None


# A server that does not answer


class Clock:
    """A clock that goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def proxy(engine: RedisProcess) -> AsyncIterator[FaultyProxy]:
    """A way to the server that can be a black hole."""
    async with FaultyProxy(f"http://127.0.0.1:{engine.port}") as proxy:
        yield proxy


@pytest.fixture
async def guarded(proxy: FaultyProxy) -> AsyncIterator[RedisCache]:
    """A cache that goes this way, with an entry. Its breaker has a clock of its own."""
    url = f"redis://127.0.0.1:{proxy.url.rpartition(':')[2]}/0"
    async with RedisCache(url, namespace=SHOP, timeout=PATIENCE) as guarded:
        guarded._guards.clock = Clock()
        await guarded.set("k", b"old", ttl=None)
        yield guarded


def fall_silent(cache: RedisCache, proxy: FaultyProxy) -> None:
    """Let nothing pass, and give up soon, since it is not slowness that keeps the answer back."""
    proxy.trouble = Trouble(stall=True)
    cache._server._limit = 0.05


def speak(cache: RedisCache, proxy: FaultyProxy) -> None:
    """Let all pass, and have patience with a slow machine."""
    proxy.heal()
    cache._server._limit = PATIENCE


async def refusals(calls: Iterable[Awaitable[Any]]) -> list[str]:
    """Tell of each call "no" if it was not sent, "maybe" if there was no answer to it, "yes" if there was."""

    async def applied(call: Awaitable[Any]) -> str:
        try:
            await call
        except RedisUnavailable as error:
            return error.applied
        return "yes"

    return list(await asyncio.gather(*map(applied, calls)))


def later(cache: RedisCache) -> None:
    """Let the pause of the breaker be over."""
    clock = cache._guards.clock
    assert isinstance(clock, Clock)
    clock.now += 10.0


async def test_a_black_hole_is_asked_no_more_after_a_few_calls(
    guarded: RedisCache, proxy: FaultyProxy, cache: RedisCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Values are made at once, nothing that the server holds is served, and nothing is stored."""
    fall_silent(guarded, proxy)
    assert await refusals(guarded.get("k") for _ in range(3)) == ["maybe"] * 3
    tried = proxy.connections
    looked = await cache.lookup("other")
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            assert await guarded.get_or_set("k", str(number).encode, ttl=None) == b"%d" % number
    for call in (
        guarded.get("k"),
        guarded.lookup("k"),
        guarded.store("other", b"v", token=looked.token, ttl=None),
        guarded.set("other", b"v", ttl=None),
    ):
        with pytest.raises(RedisUnavailable, match=r"not answered, and is tried again in \d\.\d s; nothing") as caught:
            await call
        assert (caught.value.applied, caught.value.whole, caught.value.answered) == ("no", True, False)
    assert proxy.connections == tried, "nobody has asked"
    assert len(caplog.records) == 1
    assert await cache.get("k") == Found(b"old", stale=False)
    assert await cache.get("other") is None


async def test_a_value_that_was_being_made_when_the_server_fell_silent_is_not_stored(
    guarded: RedisCache, proxy: FaultyProxy, cache: RedisCache
) -> None:
    """Whoever waits for it gets it."""
    make = Maker()
    task = start(guarded, "other", make)
    await eventually(lambda: make.calls)
    fall_silent(guarded, proxy)
    await refusals(guarded.get("k") for _ in range(3))
    tried = proxy.connections
    make.go.set()
    assert await task == b"v"
    assert proxy.connections == tried
    assert await cache.get("other") is None


async def test_one_call_tries_again_after_a_pause(guarded: RedisCache, proxy: FaultyProxy) -> None:
    """While the others fail at once; if it fails, there is another pause, and else all goes on."""
    fall_silent(guarded, proxy)
    await refusals(guarded.get("k") for _ in range(3))
    for _ in range(3):
        later(guarded)
        tried = proxy.connections
        assert sorted(await refusals(guarded.get("k") for _ in range(10))) == ["maybe", *["no"] * 9]
        assert await refusals(guarded.get("k") for _ in range(10)) == ["no"] * 10
        assert proxy.connections == tried + 1
    speak(guarded, proxy)
    later(guarded)
    assert sorted(await refusals(guarded.get("k") for _ in range(10))) == [*["no"] * 9, "yes"]
    assert await refusals(guarded.get("k") for _ in range(10)) == ["yes"] * 10
    assert await guarded.get("k") == Found(b"old", stale=False)


async def test_a_trial_that_is_cancelled_lets_the_next_call_try(guarded: RedisCache, proxy: FaultyProxy) -> None:
    """It says nothing of the server."""
    fall_silent(guarded, proxy)
    await refusals(guarded.get("k") for _ in range(3))
    later(guarded)
    task = asyncio.create_task(guarded.get("k"))
    await asyncio.sleep(0)
    with pytest.raises(RedisUnavailable, match="by another call just now"):
        await guarded.get("k")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert await refusals([guarded.get("k")]) == ["maybe"]


async def test_a_breaker_can_be_left_out(proxy: FaultyProxy) -> None:
    """Then each call waits for itself."""
    url = f"redis://127.0.0.1:{proxy.url.rpartition(':')[2]}/0"
    async with RedisCache(url, timeout=0.02, connect_timeout=0.02, breaker=None) as cache:
        proxy.trouble = Trouble(stall=True)
        assert await refusals(cache.get("k") for _ in range(20)) == ["maybe"] * 20
        assert await refusals([cache.get("k")]) == ["maybe"]


async def test_a_server_that_says_no_goes_on_being_asked(tmp_path: Path) -> None:
    """It keeps nobody waiting, and what it has can be read while it is full."""
    with RedisProcess(tmp_path) as server:
        async with RedisCache(server.url, timeout=10.0) as cache:
            await cache.set("k", b"v", ttl=None)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            assert await refusals(cache.set(f"{number}", b"v", ttl=None) for number in range(10)) == ["maybe"] * 10
            assert await cache.get("k") == Found(b"v", stale=False)


def test_calls_from_before_the_breaker_opened_do_not_open_it_again() -> None:
    """They may end long after the server has come back."""
    guard = Guard(Breaker(incidents=2, open=1.0, cap=1.0, proofs=1), "redis://h", RuntimeError)
    old = [guard.begin(0.0) for _ in range(9)]
    for trial in old[:3]:
        guard.silent(0.0, 2.0, trial=trial)
    with pytest.raises(RuntimeError):
        guard.begin(2.0)
    trial = guard.begin(4.0)
    assert trial
    guard.silent(0.0, 4.5, trial=old[3])
    guard.answered(5.0, trial=trial)
    for late in old[4:]:
        guard.silent(0.0, 6.0, trial=late)
    new = guard.begin(7.0)
    assert not new
    guard.silent(7.0, 9.0, trial=new)
    guard.answered(9.0, trial=guard.begin(9.0))
    guard.silent(9.0, 10.0, trial=guard.begin(9.0))
    guard.silent(9.0, 10.0, trial=guard.begin(9.0))
    with pytest.raises(RuntimeError):
        guard.begin(10.0)


def test_each_loop_finds_out_for_itself(dead: Iterator[str]) -> None:
    """What one has found out, or has left open when it ended, is in no other's way."""
    cache = RedisCache(next(dead), breaker=Breaker(incidents=3, open=60.0))

    async def use() -> list[str]:
        return [(await refusals([cache.get("k")]))[0] for _ in range(4)]

    for _ in range(2):
        assert asyncio.run(use()) == ["maybe", "maybe", "maybe", "no"]


def test_calls_half_of_which_get_no_answer_open_the_breaker() -> None:
    """By default, and if there are at least 20 within 10 seconds; also where never three in a row did."""
    cache = RedisCache("redis://h")
    guard = Guard(cache._guards.policy, "redis://h", RuntimeError)
    for number in range(20):
        trial = guard.begin(float(number) / 4)
        if number % 2:
            guard.silent(number / 4, number / 4 + 0.1, trial=trial)
        else:
            guard.answered(number / 4 + 0.1, trial=trial)
    with pytest.raises(RuntimeError):
        guard.begin(5.1)


async def test_few_connections_serve_many_readers(engine: RedisProcess) -> None:
    """They wait for their turn."""
    async with RedisCache(engine.url, connections=2, timeout=20.0) as cache:
        keys = [f"k/{number}" for number in range(300)]
        values = await asyncio.gather(*(cache.get_or_set(key, key.encode, ttl=60.0) for key in keys))
        assert values == [key.encode() for key in keys]
        assert b"connected_clients:3" in engine.ask("INFO", "clients")


# Clients, loops and processes


@pytest.mark.parametrize("decode", [False, True])
async def test_a_client_of_redis_py_may_be_given(engine: RedisProcess, decode: bool) -> None:
    """Whatever it decodes; it is not closed."""
    client = redis.asyncio.Redis.from_url(engine.url, decode_responses=decode)
    async with RedisCache(client=client, namespace=SHOP) as cache:
        assert await cache.get_or_set("k", lambda: b"\xff\0", tags=["é"], ttl=60.0) == b"\xff\0"
        assert await cache.get("k") == Found(b"\xff\0", stale=False)
        assert repr(cache) == "RedisCache(Redis, namespace='shop')"
    assert await client.ping()
    await client.aclose()


@pytest.mark.parametrize("most", [3, 100])
async def test_one_client_serves_many_caches(engine: RedisProcess, most: int) -> None:
    """They wait for its connections together, of which they use 50 at most, and its pool refuses none of them."""
    pool = redis.asyncio.ConnectionPool.from_url(engine.url, max_connections=most)
    clients = [redis.asyncio.Redis(connection_pool=pool), redis.asyncio.Redis(connection_pool=pool)]
    tenants = [
        RedisCache(client=clients[number % 2], namespace=f"n{number}", on_error="raise", timeout=20.0)
        for number in range(20)
    ]
    keys = [f"k/{number}" for number in range(15)]
    found = await asyncio.gather(*(it.get_or_set(key, key.encode, ttl=60.0) for key in keys for it in tenants))
    assert found == [key.encode() for key in keys for _ in tenants]
    assert engine.ask("INFO", "clients").split(b"connected_clients:")[1].split()[0] == b"%d" % (min(50, most) + 1)
    await pool.aclose()


async def test_a_client_that_others_use_up_is_no_silent_server(engine: RedisProcess) -> None:
    """Nothing was sent, so the breaker stays as it is; and all goes on once a connection is free."""
    client = redis.asyncio.Redis.from_url(engine.url, max_connections=2)
    cache = RedisCache(client=client, timeout=20.0)
    await cache.set("k", b"v", ttl=None)
    pool: Any = client.connection_pool
    taken = [await pool.get_connection() for _ in range(2)]
    for _ in range(30):
        with pytest.raises(RedisUnavailable, match=r"all connections of the client .*\(max_connections\)") as caught:
            await cache.get("k")
        assert (caught.value.applied, caught.value.answered) == ("no", False)
    assert await cache.get_or_set("k", lambda: b"made", ttl=None) == b"made"
    for connection in taken:
        await pool.release(connection)
    assert await cache.get("k") == Found(b"v", stale=False)
    await client.aclose()


async def test_who_waits_in_vain_for_a_connection_has_not_met_a_silent_server(engine: RedisProcess) -> None:
    """Those who have the connections find that out."""
    async with RedisCache(engine.url, connections=1) as cache:
        await cache.set("k", b"v", ttl=None)
        state = await cache._server._state()
        async with state.slots:
            cache._server._limit = 0.001
            for _ in range(30):
                with pytest.raises(RedisUnavailable, match=r"came free within 0\.001 s; nothing was sent") as caught:
                    await cache.get("k")
                assert (caught.value.applied, caught.value.answered) == ("no", False)
        cache._server._limit = PATIENCE
        assert await cache.get("k") == Found(b"v", stale=False)


class Careless(redis.asyncio.Redis):
    """A client that loses a cancellation which comes with the answer, as one with a timeout of its own may."""

    async def execute_command(self, *command: Any, **options: Any) -> Any:
        task = asyncio.ensure_future(super().execute_command(*command, **options))  # type: ignore[no-untyped-call]
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            return await task


async def test_a_cancellation_that_a_client_loses_is_not_lost(engine: RedisProcess) -> None:
    """Whoever cancels a call can rely on it."""
    async with Careless.from_url(engine.url) as client, RedisCache(client=client) as cache:
        task = asyncio.create_task(cache.get("k"))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


async def test_a_socket_serves_as_well(engine: RedisProcess) -> None:
    """As a server on the same machine has it."""
    async with RedisCache(f"unix://{engine.socket}?db=1") as cache:
        assert await cache.set("k", b"v", ttl=None)
    async with RedisCache(engine.url) as other:
        assert await other.get("k") is None


@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop])
def test_one_cache_serves_many_loops(
    engine: RedisProcess, factory: Callable[[], asyncio.AbstractEventLoop] | None
) -> None:
    """One after the other; each closes its connections at its end, also if nobody asked for it."""
    cache = RedisCache(engine.url)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.sleep(0))  # what the first loop of its kind opens for all of them
    before = len(os.listdir("/proc/self/fd"))

    async def use(number: int) -> None:
        make = Maker(b"%d" % number)
        make.go.set()
        assert (
            await asyncio.gather(*(cache.get_or_set(f"{number}", make, ttl=60.0) for _ in range(5)))
            == [b"%d" % number] * 5
        )
        if number % 2:
            await cache.aclose()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(use(number))
        gc.collect()
    assert [str(it.message) for it in caught] == []
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(cache._server._states) <= 1


def test_one_cache_serves_loops_of_many_threads(engine: RedisProcess) -> None:
    """Loops that begin and end at the same time are in each other's way nowhere."""
    cache = RedisCache(engine.url, timeout=20.0)
    failures: list[BaseException] = []
    together = threading.Barrier(8)

    async def use() -> None:
        assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"

    def run() -> None:
        try:
            for _ in range(25):
                together.wait(PATIENCE)  # then the loops from before are closed, and each thread finds all of them
                asyncio.run(use())
        except BaseException as error:
            failures.append(error)
            together.abort()
            raise

    before, interval = len(os.listdir("/proc/self/fd")), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_loop_that_ends_in_the_midst_leaves_nothing(engine: RedisProcess) -> None:
    """What was being made is cancelled with it."""
    cache = RedisCache(engine.url)
    before = len(os.listdir("/proc/self/fd"))

    async def use() -> None:
        make = Maker()
        start(cache, "k", make)
        await eventually(lambda: make.calls)

    for _ in range(3):
        asyncio.run(use())
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_opens_its_own_connections(engine: RedisProcess) -> None:
    """And neither uses nor closes what it inherited."""
    code = """
    import asyncio, os, sys
    from pybustcall.integrations.redis import RedisCache

    cache = RedisCache(sys.argv[1])

    async def use(name):
        keys = [f"{name}/{it}" for it in range(9)]
        return await asyncio.gather(*(cache.get_or_set(key, key.encode, ttl=9) for key in keys))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use("parent"))
    child = os.fork()
    if not child:
        asyncio.run(use("child"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert loop.run_until_complete(use("parent"))[3] == b"parent/3"
    loop.run_until_complete(cache.aclose())
    loop.close()
    print("well")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), engine.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_without_the_extra_it_says_so() -> None:
    """What to install."""
    code = """
    import sys
    sys.modules["redis"] = None
    try:
        import pybustcall.integrations.redis
    except ModuleNotFoundError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'pybustcall[redis]'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("user:s3cret@127.0.0.1:7911", "begins with neither"),
        ("http://u:s3cret@h", "begins with neither"),
        ("redis//:s3cret@h", "begins with neither"),
        ("redis:/:s3cret@h:1/0", "has no // after redis:"),
        ("redis:/127.0.0.1:7911/s3cret", "has no // after redis:"),
        ("redis:///0?password=s3cret", "names no host"),
        ("redis://:s3cret@/0", "names no host"),
        ("unix://?password=s3cret", "names no path"),
        ("redis://:s3cret@h/abc", "names a database that is no number"),
        ("redis://:s3cret@h/1/2", "names a database that is no number"),
        ("unix:///s?db=s3cret", "names a database that is no number"),
        ("redis://:s3cret@h:port/0", "cannot be read"),
        ("redis://h?s3cret=1", "has an option after its ?"),
        ("redis://h?socket_timeout=s3cret", "is no URL of a Redis server"),
    ],
)
def test_a_mistyped_url_is_refused_and_shown_nowhere(url: str, why: str) -> None:
    """It would be taken for another server or database, and its password may stand anywhere in it."""
    with pytest.raises(ConfigurationError) as caught:
        RedisCache(url)
    assert why in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.setting == "url"
