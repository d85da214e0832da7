"""The readers' half of a cache in memcached: who makes a value, who waits for it, and that no bust is ever undone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, cast

import pytest

from pybustcall import memcached_layout as items
from pybustcall.daemon.backends.memcached import MemcachedBackend
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.integrations.memcached import Found, MemcachedCache, MemcachedUnavailable, Token
from pybustcall.memcached_connection import MemcachedServer
from pybustcall.memcached_layout import Answer, Command, Layout
from tests.conftest import PATIENCE, eventually
from tests.engines import free_port
from tests.memcached_process import MemcachedProcess, shared_memcached
from tests.readers import SHOP, Maker, bust, never, quick, start

AT = Layout("bustcall", SHOP)


@pytest.fixture
def engine() -> MemcachedProcess:
    """An empty server."""
    server = shared_memcached()
    server.ask("flush_all")
    return server


@pytest.fixture
async def cache(engine: MemcachedProcess) -> AsyncIterator[MemcachedCache]:
    """A cache in it."""
    async with MemcachedCache(engine.url, namespace=SHOP, timeout=PATIENCE) as cache:
        yield cache


@pytest.fixture
async def other(engine: MemcachedProcess) -> AsyncIterator[MemcachedCache]:
    """The same one, as another process has it."""
    async with MemcachedCache(engine.url, namespace=SHOP, timeout=PATIENCE) as cache:
        yield cache


@pytest.fixture
async def backend(engine: MemcachedProcess) -> AsyncIterator[MemcachedBackend]:
    """The daemon's half."""
    backend = MemcachedBackend(engine.url, timeout=PATIENCE)
    yield backend
    await backend.close()


@pytest.fixture
def dead() -> str:
    """The URL of a server that is not there."""
    return f"memcached://127.0.0.1:{free_port()}"


# Values


async def test_a_hit_takes_one_exchange(cache: MemcachedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it has the tags that were said; of others nobody knows before."""
    await cache.set("a/b", b"v", tags=["t", "u"], ttl=None)
    exchanges = 0
    run = MemcachedServer.run

    async def counted(server: MemcachedServer, commands: list[Command]) -> list[Answer]:
        nonlocal exchanges
        exchanges += 1
        return await run(server, commands)

    monkeypatch.setattr(MemcachedServer, "run", counted)
    assert await cache.get_or_set("a/b", never, tags=["u", "t"], ttl=None) == b"v"
    assert exchanges == 1
    assert await cache.get_or_set("a/b", never, ttl=None) == b"v"
    assert exchanges == 3


async def test_an_entry_ends_with_its_ttl(cache: MemcachedCache) -> None:
    """In whole seconds, rounded up, which memcached counts by the tick."""
    await cache.set("k", b"v", ttl=0.0001)
    await cache.set("kept", b"v", ttl=30 * 24 * 3600)
    async with asyncio.timeout(10):
        while await cache.get("k") is not None:
            await asyncio.sleep(0.05)
    assert await cache.get("kept") == Found(b"v", stale=False)


def test_settings_that_cannot_be_are_refused() -> None:
    """At once."""
    for settings in (
        {"url": "redis://h"},
        {"url": "memcached://h", "prefix": "{"},
        {"url": "memcached://h", "lease": 0},
        {"url": "memcached://h", "lease": 1.9},
        {"url": "memcached://h", "lease": 31 * 24 * 3600},
        {"url": "memcached://h", "timeout": -1},
        {"url": "memcached://h", "on_error": "ignore"},
    ):
        with pytest.raises(ConfigurationError):
            MemcachedCache(**cast("Any", settings))
    with pytest.raises(InvalidRequest):
        MemcachedCache("memcached://h", namespace="a/b")
    assert repr(MemcachedCache("memcached://h", namespace="a")) == "MemcachedCache(memcached://h, namespace='a')"


async def test_a_lifetime_that_memcached_cannot_count_is_refused(cache: MemcachedCache) -> None:
    """Rather than made another one: it takes 30 days for a date."""
    days = 24 * 3600
    for call in (
        cache.set("k", b"v", ttl=30 * days + 1),
        cache.store("k", b"v", token=(await cache.lookup("k")).token, ttl=40 * days),
        cache.get_or_set("k", never, ttl=40 * days),
    ):
        with pytest.raises(InvalidRequest, match="ttl must be more than 0 seconds and at most 2592000, or None"):
            await call
    assert await cache.set("k", b"v", ttl=30 * days)


@pytest.mark.parametrize("on_error", ["fill", "raise"])
async def test_a_value_that_is_too_large_is_told(
    engine: MemcachedProcess, caplog: pytest.LogCaptureFixture, on_error: Any
) -> None:
    """How large it is and what to do, without the key; whoever asked gets it unless he wants to be told."""
    value = bytes(2 << 20)
    async with MemcachedCache(engine.url, namespace=SHOP, on_error=on_error) as cache:
        await cache.set("secret key", b"old", ttl=None)
        with pytest.raises(MemcachedUnavailable, match=r"has 2097205 bytes, .* nothing was stored") as caught:
            await cache.set("secret key", value, ttl=None)
        error = caught.value
        assert (error.too_large, error.whole, error.answered, error.applied) == (True, False, True, "no")
        assert "secret key" not in str(error)
        assert await cache.get("secret key") is None, "what was there before would be older than what is known"
        if on_error == "fill":
            assert await cache.get_or_set("k", lambda: value, ttl=None) == value
            assert "is more than it takes (-I" in caplog.text
        else:
            with pytest.raises(MemcachedUnavailable):
                await cache.get_or_set("k", lambda: value, ttl=None)
        assert await cache.get("k") is None
        assert await cache.set("k", value[: 1000 << 10], ttl=None)


# Busts


def all_but_one_have_ended(tasks: list[asyncio.Task[bytes]], make: Maker) -> bool:
    """Tell whether one makes a value, and all others have theirs."""
    return make.calls > 0 and sum(task.done() for task in tasks) == len(tasks) - 1


@pytest.mark.parametrize("soft", [False, True])
async def test_a_bust_between_the_check_and_the_store_does_no_harm(
    cache: MemcachedCache, backend: MemcachedBackend, monkeypatch: pytest.MonkeyPatch, soft: bool
) -> None:
    """What is stored says under which generations it was made."""
    put = MemcachedCache._put
    for kind, target in (("prefix", "p"), ("tag", "t"), ("all", "*")):
        looked = await cache.lookup("p/1")

        async def busts_first(*arguments: Any, kind: Any = kind, target: str = target, **more: Any) -> bool:
            await bust(backend, kind, target, soft=soft)
            return await put(*arguments, **more)

        monkeypatch.setattr(MemcachedCache, "_put", busts_first)
        assert await cache.store("p/1", b"old", token=looked.token, tags=["t"], ttl=None)
        monkeypatch.undo()
        assert await cache.get("p/1") == (Found(b"old", stale=True) if soft else None)
        await bust(backend, "key", "p/1")


async def test_of_fifty_who_find_a_stale_entry_one_makes_it_anew(
    engine: MemcachedProcess, backend: MemcachedBackend
) -> None:
    """In five processes, all others get the old value at once; for each kind of bust, and after each once more."""
    caches = [MemcachedCache(engine.url, namespace=SHOP, timeout=PATIENCE) for _ in range(5)]
    for kind, target in (("key", "p/1"), ("prefix", "p"), ("tag", "t"), ("all", "*")):
        for tags in (["t"], ["t", "new"]):
            await caches[0].set("p/1", b"old", tags=["t"], ttl=None)
            await bust(backend, kind, target, soft=True)  # type: ignore[arg-type]
            make = Maker(b"new")
            tasks = [start(caches[number % 5], "p/1", make, tags=tags) for number in range(50)]
            await eventually(partial(all_but_one_have_ended, tasks, make))
            make.go.set()
            assert sorted(await asyncio.gather(*tasks)) == [b"new", *[b"old"] * 49]
            assert make.calls == 1
            assert await caches[1].get("p/1") == Found(b"new", stale=False)
    for cache in caches:
        await cache.aclose()


async def test_to_look_alone_chooses_nobody(cache: MemcachedCache, backend: MemcachedBackend) -> None:
    """Nor does it take the place of who is."""
    await cache.set("k", b"old", ttl=None)
    await bust(backend, "key", "k", soft=True)
    for _ in range(3):
        assert await cache.get("k") == Found(b"old", stale=True)
    assert (await cache.lookup("k")).refresh


async def test_another_soft_bust_chooses_another(cache: MemcachedCache, backend: MemcachedBackend) -> None:
    """What the first one makes may be old by then, and is refused."""
    await cache.set("k", b"old", tags=["t"], ttl=None)
    for kind, target in (("key", "k"), ("tag", "t")):
        await bust(backend, kind, target, soft=True)  # type: ignore[arg-type]
        first = await cache.lookup("k", tags=["t"])
        await bust(backend, kind, target, soft=True)  # type: ignore[arg-type]
        second = await cache.lookup("k", tags=["t"])
        assert (first.refresh, second.refresh) == (True, True)
        assert not await cache.store("k", b"1", token=first.token, tags=["t"], ttl=None)
        assert await cache.get("k") == Found(b"old", stale=True)


async def test_it_can_be_done_by_hand(cache: MemcachedCache, backend: MemcachedBackend) -> None:
    """Look up, make, store."""
    looked = await cache.lookup("k")
    assert (looked.found, looked.refresh) == (None, False)
    assert await cache.store("k", b"1", token=looked.token, tags=["t"], ttl=None)
    assert not await cache.store("k", b"late", token=looked.token, ttl=None), "another one was stored meanwhile"
    assert (await cache.lookup("k")).found == Found(b"1", stale=False)
    await bust(backend, "tag", "t", soft=True)
    looked = await cache.lookup("k")
    assert (looked.found, looked.refresh) == (Found(b"1", stale=True), True)
    assert not (await cache.lookup("k")).refresh
    assert await cache.set("k", b"3", ttl=None)
    assert not await cache.store("k", b"2", token=looked.token, ttl=None)
    assert await cache.get("k") == Found(b"3", stale=False)


async def test_tags_that_are_known_later_are_refused_if_any_was_busted(
    cache: MemcachedCache, backend: MemcachedBackend
) -> None:
    """Those that were said are told apart, and what has no tags is not concerned."""
    fills = [
        (await cache.lookup(key, tags=known), tags)
        for key, known, tags in (("a", [], ["t"]), ("b", ["t"], ["t"]), ("c", [], []), ("d", ["t", "u"], ["u"]))
    ]
    await bust(backend, "tag", "u")
    told = [
        await cache.store(key, b"v", token=looked.token, tags=tags, ttl=None)
        for key, (looked, tags) in zip("abcd", fills, strict=True)
    ]
    assert told == [False, True, True, False]
    looked = await cache.lookup("a")
    assert await cache.store("a", b"v", token=looked.token, tags=["never seen"], ttl=None)


async def test_a_token_of_nothing_stores_nothing(cache: MemcachedCache) -> None:
    """Whatever the server has lost."""
    assert not await cache.store("a/b", b"v", token=Token(0, ()), ttl=None)
    looked = await cache.lookup("a/b")
    token = Token(looked.token.cas, looked.token.generations[:-1])
    await cache._server.run([items.delete(AT.sequence)])
    assert not await cache.store("a/b", b"v", token=token, tags=["t"], ttl=None)


async def test_what_others_put_there_is_no_entry(cache: MemcachedCache, backend: MemcachedBackend) -> None:
    """It is a miss, and is replaced when a value is stored."""
    await cache._server.run([Command(b"ms %b 4 T0 F1" % AT.entry("k"), b"what")])
    assert await cache.get("k") is None
    assert await cache.get_or_set("k", quick, ttl=None) == b"v"
    assert await cache.get("k") == Found(b"v", stale=False)
    await bust(backend, "key", "k")


async def test_a_server_that_keeps_no_generation_says_so(cache: MemcachedCache) -> None:
    """Where somebody else has put something at its name."""
    await cache._server.run([Command(b"ms %b 4 T0" % AT.covering("k")[0], b"what")])
    for call in (cache.lookup("k"), cache.set("k", b"v", ttl=None)):
        with pytest.raises(MemcachedUnavailable, match="does not keep what it has just stored") as caught:
            await call
        assert caught.value.answered
    assert await cache.get_or_set("k", quick, ttl=None) == b"v"


# Without a server


async def test_without_memcached_values_are_made_all_the_same(dead: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once in a while, not for each."""
    async with MemcachedCache(dead) as cache:
        with caplog.at_level(logging.WARNING):
            for _ in range(5):
                assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"
    assert len(caplog.records) == 1
    assert "without a cache" in caplog.text


async def test_it_can_be_told_to_raise(dead: str) -> None:
    """As all calls but `get_or_set` do."""
    async with MemcachedCache(dead, on_error="raise", breaker=None) as cache:
        for call in (
            cache.get_or_set("k", never, ttl=60.0),
            cache.get("k"),
            cache.lookup("k"),
            cache.set("k", b"v", ttl=60.0),
        ):
            with pytest.raises(MemcachedUnavailable) as caught:
                await call
            assert (caught.value.whole, caught.value.asked, caught.value.applied) == (True, True, "no")


@pytest.mark.parametrize("on_error", ["fill", "raise"])
async def test_a_server_that_dies_meanwhile_does_not_lose_the_value(on_error: Any) -> None:
    """Unless it is to be told; and it is used again when it is back."""
    with MemcachedProcess() as server:
        async with MemcachedCache(server.url, on_error=on_error) as cache:
            make = Maker()
            task = start(cache, "k", make)
            await eventually(lambda: make.calls)
            server.kill()
            make.go.set()
            if on_error == "fill":
                assert await task == b"v"
            else:
                with pytest.raises(MemcachedUnavailable):
                    await task
            server.start()
            assert await cache.get_or_set("k", quick, ttl=60.0) == b"v"
            assert await cache.get("k") == Found(b"v", stale=False)


async def test_a_full_server_does_not_keep_values_from_being_made() -> None:
    """They are not cached, and what is there is found; it goes on being asked."""
    with MemcachedProcess("-M", "-m", "4") as server:
        async with MemcachedCache(server.url, timeout=PATIENCE) as cache:
            await cache.set("kept", b"v", ttl=None)
            refused = 0
            for number in range(40):
                value = bytes(900_000)
                assert await cache.get_or_set(f"k{number}", lambda value=value: value, ttl=None) == value  # type: ignore[misc]
                refused += await cache.get(f"k{number}") is None
            assert refused > 10
            assert await cache.get_or_set("kept", never, ttl=None) == b"v"


async def test_a_server_without_cas_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Late fills could be stored, so nothing is."""
    with MemcachedProcess("-C") as server:
        async with MemcachedCache(server.url) as cache:
            with pytest.raises(MemcachedUnavailable, match="start it without -C") as caught:
                await cache.lookup("k")
            assert (caught.value.answered, caught.value.applied) == (True, "no")
            assert await cache.get_or_set("k", quick, ttl=None) == b"v"
            assert await cache.get("k") is None
    assert "without -C" in caplog.text


# A server that does not answer


async def tried(calls: Iterable[Awaitable[Any]]) -> list[str]:
    """Tell of each call "no" if nobody tried to ask, "in vain" if there was no answer to it, "yes" if there was."""

    async def told(call: Awaitable[Any]) -> str:
        try:
            await call
        except MemcachedUnavailable as error:
            return "answered" if error.answered else "in vain" if error.asked else "no"
        return "yes"

    return list(await asyncio.gather(*map(told, calls)))


async def test_who_waits_in_vain_for_a_connection_has_not_met_a_silent_server(engine: MemcachedProcess) -> None:
    """So the breaker stays closed."""
    async with MemcachedCache(engine.url, timeout=0.05, connect_timeout=0.05, connections=1) as cache:
        await cache.get("k")
        (state,) = cache._server._states.values()
        async with state.slots:
            assert await tried(cache.get("k") for _ in range(10)) == ["no"] * 10
        assert await cache.get("k") is None


def test_one_cache_serves_many_loops(engine: MemcachedProcess) -> None:
    """One after the other; what one has found out of the server is in no other's way."""
    cache = MemcachedCache(engine.url)
    before = len(os.listdir("/proc/self/fd"))

    async def use(ask: Callable[[str], Awaitable[Found | None]], key: str) -> None:
        make = Maker(key.encode())
        make.go.set()
        assert await asyncio.gather(*(cache.get_or_set(key, make, ttl=60.0) for _ in range(5))) == [key.encode()] * 5
        assert await ask(key) == Found(key.encode(), stale=False)

    for number in range(6):
        asyncio.run(use(cache.get, f"{number}"))
    assert len(os.listdir("/proc/self/fd")) == before
