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
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import uvloop

from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.integrations.redis import Found, RedisCache, RedisUnavailable
from tests.conftest import PATIENCE, eventually
from tests.engines import RedisProcess, free_port
from tests.readers import SHOP, Maker, bust, never, quick, start
from tests.redis_harness import shared_redis


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


# Values


async def test_an_entry_ends_with_its_ttl(cache: RedisCache) -> None:
    """A fraction of a millisecond is one."""
    await cache.set("k", b"v", ttl=0.0001)
    async with asyncio.timeout(10):
        while await cache.get("k") is not None:
            pass


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


async def refusals(calls: Iterable[Awaitable[Any]]) -> list[str]:
    """Tell of each call "no" if it was not sent, "maybe" if there was no answer to it, "yes" if there was."""

    async def applied(call: Awaitable[Any]) -> str:
        try:
            await call
        except RedisUnavailable as error:
            return error.applied
        return "yes"

    return list(await asyncio.gather(*map(applied, calls)))


async def test_a_server_that_says_no_goes_on_being_asked(tmp_path: Path) -> None:
    """It keeps nobody waiting, and what it has can be read while it is full."""
    with RedisProcess(tmp_path) as server:
        async with RedisCache(server.url, timeout=10.0) as cache:
            await cache.set("k", b"v", ttl=None)
            server.ask("CONFIG", "SET", "maxmemory", "1")
            assert await refusals(cache.set(f"{number}", b"v", ttl=None) for number in range(10)) == ["maybe"] * 10
            assert await cache.get("k") == Found(b"v", stale=False)


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
