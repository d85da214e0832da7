"""The daemon's backend for Redis: how it fails and comes back, what of other programs it reaches, and what readers see.

That it does what the engine relies on is told by test_backend_conformance.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pybustcall.daemon import Engine, Indexes, Layer
from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope
from pybustcall.daemon.backends.memory import MemoryBackend
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.daemon.journal import Wish
from pybustcall.errors import ConfigurationError
from pybustcall.integrations.redis import Found, RedisCache, RedisUnavailable
from pybustcall.keys import is_variant
from pybustcall.models import Kind
from pybustcall.redis_connection import RedisServer
from pybustcall.redis_layout import unlink
from tests.conftest import eventually
from tests.engines import RedisProcess, free_port
from tests.redis_harness import shared_redis

HERE = "default"


@pytest.fixture
def engine() -> RedisProcess:
    """An empty server."""
    server = shared_redis()
    server.ask("FLUSHALL")
    return server


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server of the test's own."""
    with RedisProcess(tmp_path) as server:
        yield server


@asynccontextmanager
async def opened(url: str, *, foreign: str | None = None, timeout: float = 5.0) -> AsyncIterator[RedisBackend]:
    """Open a backend, and close it."""
    backend = RedisBackend(url, foreign=foreign, timeout=timeout)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


async def bust(backend: RedisBackend, kind: Kind, target: str, *, soft: bool = False, namespace: str = HERE) -> int:
    """Bust as the engine does; tell the count."""
    scope, count = Scope(namespace, kind, target), 0
    generation = await backend.begin(scope, soft=soft)
    async for keys in backend.select(scope):
        count += await backend.remove(namespace, keys, generation=generation, soft=soft)
    await backend.end(scope, generation)
    return count


# Settings


@pytest.mark.parametrize(
    ("foreign", "why"),
    [
        ("", "begins with no text"),
        ("{key}", "begins with no text"),
        ("x{namespace}:{namespace}:{key}", "has {namespace} twice"),
        ("{namespace}:{key}", "begins with no text"),
        ("app:{key}:v", "goes on after"),
        ("app:{namespace}", "needs a mark"),
        ("app:{namespace}{key}", "needs a mark"),
        ("app:{namespace}x:{key}", "needs a mark"),
        ("bust", "covers this daemon's own keys"),
        ("bustcall:{namespace}:", "covers this daemon's own keys"),
        ("bustcall:{default}:e:", "covers this daemon's own keys"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_pattern_that_could_cover_what_it_should_not_is_refused(foreign: str, why: str) -> None:
    """Such as everybody's keys, or another tenant's."""
    with pytest.raises(ConfigurationError, match=why) as caught:
        RedisBackend("redis://127.0.0.1", foreign=foreign)
    assert caught.value.setting == "foreign"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1", "127.0.0.1:6379", "", "redis://h:port", "redis://h/0?socket_timeout=x", "redis://h?x=1"]
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    """At once, and without the password that may be in it."""
    with pytest.raises(ConfigurationError) as caught:
        RedisBackend(url.replace("//", "//user:secret@"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("setting", ["timeout", "connect_timeout", "connections"])
def test_limits_are_more_than_nothing(setting: str) -> None:
    """A timeout of 0 would let nothing through."""
    with pytest.raises(ConfigurationError) as caught:
        RedisServer("redis://127.0.0.1", **{setting: 0})  # type: ignore[arg-type]
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:secret@cache.internal:6379/3", "redis://cache.internal:6379/3"),
        ("rediss://:secret@[::1]:6380?db=2&password=secret", "rediss://[::1]:6380?db=2"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
        ("redis://cache.internal", "redis://cache.internal"),
    ],
)
def test_a_server_is_named_without_what_opens_it(url: str, shown: str) -> None:
    """Neither user nor password."""
    assert repr(RedisBackend(url)) == f"RedisBackend({shown})"
    assert repr(RedisServer(url)) == f"RedisServer({shown})"


def test_a_key_that_no_reader_could_store_is_refused() -> None:
    """Other programs may have named theirs as they like, if only in UTF-8."""
    plain = RedisBackend("redis://127.0.0.1")
    foreign = RedisBackend("redis://127.0.0.1", foreign="app:")
    for key in ("", "\ud800"):
        for backend in (plain, foreign):
            with pytest.raises(RefusedKey):
                backend.check(HERE, key)
    for key in ("secret\n", "s" * 8193, "secret/" * 129):
        with pytest.raises(RefusedKey, match=r"^(has|is) ") as caught:
            plain.check(HERE, key)
        assert "secret" not in str(caught.value)
        foreign.check(HERE, key)


def test_a_daemon_with_nothing_but_redis_refuses_keys_of_very_many_marks() -> None:
    """To bust and to register them; a layer of files beside it could hold them."""
    key = "secret/" * 129 + "x"
    redis = Layer(name="redis", number=0, backend=RedisBackend("redis://127.0.0.1"))
    alone = Engine([redis], Indexes())
    wish = Wish(namespace=HERE, kind="key", target=key, strategy="direct")
    with pytest.raises(RefusedKey, match=r"^has 129 of the marks .* at most 128 can be stored$"):
        alone.check(wish)
    with pytest.raises(RefusedKey):
        alone.check_key(HERE, key)
    with pytest.raises(RefusedKey):
        alone.check(replace(wish, kind="prefix"))
    alone.check(replace(wish, kind="prefix", target="secret/" * 127))
    both = Engine([redis, Layer(name="memory", number=1, backend=MemoryBackend(Indexes()))], Indexes())
    both.check(wish)
    both.check(replace(wish, kind="prefix"))


# Failures


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    """Each operation says so, and names it without its password."""
    port = free_port()
    async with opened(f"redis://user:secret@127.0.0.1:{port}/0") as backend:
        scope = Scope(HERE, "all", "*")

        async def select() -> None:
            async for _ in backend.select(scope):
                pass

        for operation in (
            backend.check_ready(),
            backend.begin(scope, soft=False),
            backend.fence(HERE, ["secret/key"], generation=1, soft=False),
            backend.end(scope, 1),
            select(),
            backend.estimate(scope),
            backend.variants(HERE, ["secret/key"]),
            backend.remove(HERE, ["secret/key"], generation=1, soft=False),
            backend.held(HERE, ["secret/key"]),
            backend.size_bytes(),
        ):
            with pytest.raises(BackendFailure, match=f"redis://127.0.0.1:{port}/0") as caught:
                await operation
            assert caught.value.unreachable
            assert "secret" not in str(caught.value)


async def test_a_server_that_was_killed_is_used_again_when_it_is_back(own_engine: RedisProcess) -> None:
    """By the same backend, which is not told."""
    async with opened(own_engine.url) as backend, RedisCache(own_engine.url) as cache:
        for _ in range(3):
            assert await cache.set("k", b"v", ttl=None)
            assert await bust(backend, "key", "k") == 1
            own_engine.kill()
            with pytest.raises(BackendFailure) as caught:
                await bust(backend, "key", "k")
            assert caught.value.unreachable
            own_engine.start()
            await backend.check_ready()


async def test_a_server_that_does_not_answer_is_given_up(own_engine: RedisProcess) -> None:
    """After the limits, and the next call gets its own answer."""
    backend = RedisBackend(own_engine.url, timeout=0.1, connect_timeout=0.1)
    await backend.check_ready()
    os.kill(own_engine.pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(BackendFailure, match=r"did not answer within 0\.2 s") as caught:
                await backend.size_bytes()
            assert caught.value.unreachable
    finally:
        os.kill(own_engine.pid, signal.SIGCONT)
    async with asyncio.timeout(10):
        while True:
            try:
                assert await backend.held(HERE, ["a", "b"]) == []
                break
            except BackendFailure:
                continue
    await backend.close()


async def test_a_server_that_takes_no_writes_is_unreachable(own_engine: RedisProcess) -> None:
    """A replica, or one whose disk is full, or that wants a password: the next bust would meet the same."""
    async with opened(own_engine.url) as backend, RedisCache(own_engine.url) as cache:
        await cache.set("k", b"v", ttl=None)
        own_engine.ask("REPLICAOF", "127.0.0.1", "1")
        for operation in (backend.check_ready(), bust(backend, "key", "k")):
            with pytest.raises(BackendFailure, match="replica") as caught:
                await operation
            assert caught.value.unreachable
        own_engine.ask("REPLICAOF", "NO", "ONE")
        await backend.check_ready()
        own_engine.ask("CONFIG", "SET", "requirepass", "secret")
        async with opened(own_engine.url) as stranger:
            with pytest.raises(BackendFailure, match="Authentication") as caught:
                await stranger.check_ready()
            assert caught.value.unreachable
        async with opened(own_engine.url.replace("//", "//:secret@")) as friend:
            assert await bust(friend, "key", "k") == 1


async def test_one_entry_that_is_broken_does_not_make_the_server_unreachable(engine: RedisProcess) -> None:
    """It is told how many went, and how many did not."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        keys = [f"k{number:03}" for number in range(250)]
        await asyncio.gather(*(cache.set(key, b"v", tags=["t"] * (key == "k100"), ttl=None) for key in keys))
        engine.ask("SET", "bustcall:{default}:t:t", "no index")
        generation = await backend.begin(Scope(HERE, "all", "*"), soft=False)
        with pytest.raises(BackendFailure, match="WRONGTYPE") as caught:
            await backend.remove(HERE, [*keys, "\ud800"], generation=generation, soft=False)
        assert (caught.value.removed, caught.value.failed, caught.value.unreachable) == (100, 151, False)
        assert "k100" not in str(caught.value)


@pytest.mark.parametrize("soft", [False, True])
async def test_what_lies_where_an_entry_would_is_not_in_the_way_of_a_bust(engine: RedisProcess, soft: bool) -> None:
    """It is none of ours, so it stays, and all entries beside it go."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        keys = [f"k/{number:03}" for number in range(150)]
        await asyncio.gather(*(cache.set(key, b"v", tags=["t"], ttl=None) for key in keys))
        engine.ask("SET", "bustcall:{default}:e:k/070", "of somebody")
        scope = Scope(HERE, "prefix", "k")
        assert await backend.remove(HERE, keys, generation=await backend.begin(scope, soft=soft), soft=soft) == 149
        assert await bust(backend, "key", "k/070", soft=soft) == 0
        assert await bust(backend, "tag", "t", soft=soft) == 0
        assert await bust(backend, "all", "*") == 149 * soft
        assert engine.ask("GET", "bustcall:{default}:e:k/070") == b"$11\r\nof somebody\r\n"


async def test_a_script_that_the_server_has_forgotten_is_sent_again(engine: RedisProcess) -> None:
    """As after a restart."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        for _ in range(2):
            await cache.set("k", b"v", ttl=None)
            engine.ask("SCRIPT", "FLUSH")
            assert await bust(backend, "key", "k") == 1


async def test_a_server_that_may_evict_the_index_is_warned_of_once(
    engine: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """By name, and with what to do; no other policy is."""
    try:
        for policy, warnings in (("volatile-lru", 0), ("allkeys-lfu", 1)):
            engine.ask("CONFIG", "SET", "maxmemory", "100mb")
            engine.ask("CONFIG", "SET", "maxmemory-policy", policy)
            async with opened(engine.url) as backend:
                with caplog.at_level(logging.WARNING, "pybustcall.daemon"):
                    await backend.check_ready()
                    await backend.check_ready()
            assert len(caplog.records) == warnings
        assert "allkeys-lfu" in caplog.text
        assert engine.url in caplog.text
    finally:
        engine.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        engine.ask("CONFIG", "SET", "maxmemory", "0")


async def test_a_user_who_may_not_ask_for_the_policy_is_ready_all_the_same(
    own_engine: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Managed servers do not let everybody look; what is not noticed then is warned of, once."""
    own_engine.ask("ACL", "SETUSER", "limited", "on", "nopass", "~*", "+@all", "-info")
    async with opened(own_engine.url.replace("//", "//limited:x@")) as backend:
        with caplog.at_level(logging.WARNING, "pybustcall.daemon"):
            await backend.check_ready()
            await backend.check_ready()
        assert await bust(backend, "all", "*") == 0
    [record] = caplog.records
    assert "older snapshot" in record.getMessage()


async def test_a_node_of_a_cluster_is_refused(tmp_path: Path) -> None:
    """It has a part of the namespaces only: a reader would store where no bust reaches, or the other way round."""
    with RedisProcess(tmp_path, **{"cluster-enabled": "yes"}) as node:
        node.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        async with opened(node.url) as backend, RedisCache(node.url) as cache:
            scope = Scope(HERE, "all", "*")
            for operation in (backend.check_ready(), backend.begin(scope, soft=False), backend.estimate(scope)):
                with pytest.raises(BackendFailure, match=f"{node.url} is a node of a cluster, .* not supported") as one:
                    await operation
                assert one.value.unreachable
            for call in (cache.get("k"), cache.set("k", b"v", ttl=None)):
                with pytest.raises(RedisUnavailable, match="is a node of a cluster") as other:
                    await call
                assert (other.value.applied, other.value.answered) == ("no", True)
            assert await cache.get_or_set("k", lambda: b"v", ttl=None) == b"v"
        assert node.ask("DBSIZE") == b":0\r\n"


async def test_a_node_of_a_cluster_that_does_not_tell_so_is_refused(tmp_path: Path) -> None:
    """Where INFO is not allowed, as soon as it says that something lies elsewhere."""
    with RedisProcess(tmp_path, **{"cluster-enabled": "yes"}) as node:
        node.ask("ACL", "SETUSER", "limited", "on", "nopass", "~*", "+@all", "-info")
        node.ask("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        server = RedisServer(node.url.replace("//", "//limited:x@"))
        with pytest.raises(RedisUnavailable, match="is a node of a cluster"):
            await server.run(unlink([b"a", b"b"]))
        await server.aclose()


# Bounds


async def test_many_keys_are_removed_in_small_steps(engine: RedisProcess) -> None:
    """So that the server answers others in between."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        keys = [f"k{number}" for number in range(500)]
        await asyncio.gather(*(cache.set(key, b"v", tags=["t"], ttl=None) for key in keys))
        generation = await backend.begin(Scope(HERE, "all", "*"), soft=False)
        engine.ask("CONFIG", "RESETSTAT")
        assert await backend.remove(HERE, keys, generation=generation, soft=False) == 500
        assert b"cmdstat_evalsha:calls=10," in engine.ask("INFO", "commandstats")


async def test_entries_of_very_many_tags_are_removed_in_small_steps(engine: RedisProcess) -> None:
    """Beside them plain keys, which go with them: each is counted once."""
    tags = [f"t{number}" for number in range(256)]
    server = RedisServer(engine.url)
    async with opened(engine.url, foreign="app:") as backend, RedisCache(engine.url) as cache:
        keys = [f"k{number:02}" for number in range(40)]
        for number, key in enumerate(keys):
            if number % 3:
                await cache.set(key, b"v", tags=tags, ttl=None)
            if number % 3 != 1:
                await server.execute("SET", f"app:{key}", "v")
        engine.ask("CONFIG", "RESETSTAT")
        assert await bust(backend, "all", "*") == 40
        assert engine.ask("EXISTS", *(f"app:{key}" for key in keys)) == b":0\r\n"
        calls = engine.ask("INFO", "commandstats").split(b"cmdstat_evalsha:calls=")[1]
        assert int(calls.split(b",")[0]) > 10
    await server.aclose()


@pytest.mark.parametrize("lost", ["m", "i", "m i h n f o"])
async def test_a_bust_of_everything_frees_what_an_epoch_has_left(engine: RedisProcess, lost: str) -> None:
    """Once; what was not lost is told and counted as ever, and whoever only looks is in nobody's way."""
    scope = Scope(HERE, "all", "*")
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        for number in range(600):
            await cache.set(f"k/{number}", b"v", tags=["t", f"t{number}"], ttl=None)
        for name in lost.split():
            engine.ask("DEL", f"bustcall:{{default}}:{name}")
        await cache.set("k/new", b"v", tags=["t"], ttl=None)
        assert int(engine.ask("DBSIZE")[1:]) > 1000
        assert [keys async for keys in backend.select(scope)] == [("k/new",)]
        assert await cache.get("k/new") is not None
        assert await bust(backend, "all", "*") == 1
        assert engine.ask("DBSIZE") == b":2\r\n", "the counters and the fences"
        engine.ask("CONFIG", "RESETSTAT")
        assert await bust(backend, "all", "*") == 0
        assert b"cmdstat_scan" not in engine.ask("INFO", "commandstats")


async def test_a_bust_of_everything_frees_what_was_lost_with_the_rest(engine: RedisProcess) -> None:
    """Also where nobody has stored since."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        await cache.set("k", b"v", tags=["t"], ttl=None)
        engine.ask("DEL", "bustcall:{default}:m")
        assert await bust(backend, "all", "*") == 0
        assert engine.ask("DBSIZE") == b":0\r\n"


async def test_what_cannot_be_freed_fails_no_bust(own_engine: RedisProcess, caplog: pytest.LogCaptureFixture) -> None:
    """A user who may not walk through all names is warned; it costs memory only."""
    own_engine.ask("ACL", "SETUSER", "limited", "on", "nopass", "~*", "+@all", "-scan")
    async with (
        opened(own_engine.url.replace("//", "//limited:x@")) as backend,
        RedisCache(own_engine.url) as cache,
    ):
        await cache.set("k", b"v", ttl=None)
        with caplog.at_level(logging.WARNING, "pybustcall.daemon"):
            assert await bust(backend, "all", "*") == 1
        assert "the namespace default had lost was not freed" in caplog.text
        own_engine.kill()
        with pytest.raises(BackendFailure) as caught:
            await backend._free(HERE)
        assert caught.value.unreachable


async def test_variants_come_in_pages(engine: RedisProcess) -> None:
    """One key may have very many."""
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        names = [f"k{mark}{number}" for mark in ("?", ".gz?") for number in range(600)]
        await asyncio.gather(*(cache.set(key, b"v", ttl=None) for key in [*names, "k.br", "kk", "k.png?1"]))
        found = await backend.variants(HERE, ["a", "k", "z"])
        assert sorted(found) == sorted([*names, "k.br"])


async def test_fences_are_bounded(engine: RedisProcess) -> None:
    """By a setting."""
    backend = RedisBackend(engine.url, fences=3)
    async with RedisCache(engine.url) as cache:
        token = (await cache.lookup("k")).token
        for number in range(5):
            await backend.begin(Scope(HERE, "key", f"other{number}"), soft=True)
        await backend.fence(HERE, [f"d{number}" for number in range(600)], generation=5, soft=False)
        assert engine.ask("ZCARD", "bustcall:{default}:f") == b":3\r\n"
        assert not await cache.store("k", b"v", token=token, ttl=None)
    await backend.close()


async def test_so_many_namespaces_are_remembered(engine: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that names ever new ones cannot fill the daemon."""
    monkeypatch.setattr("pybustcall.daemon.backends.redis._MOST_NAMESPACES", 3)
    async with opened(engine.url) as backend:
        for number in range(6):
            async with RedisCache(engine.url, namespace=f"n{number}") as cache:
                await cache.set("k", b"v", ttl=None)
            assert await bust(backend, "all", "*", namespace=f"n{number}") == 1
        assert list(backend._known) == ["n3", "n4", "n5"]


# What others see


async def test_a_running_server_that_went_back_in_time_is_busted_whole(engine: RedisProcess) -> None:
    """The daemon remembers how far it was, and what was brought back key by key is no longer held."""
    server = RedisServer(engine.url)
    async with opened(engine.url) as backend, RedisCache(engine.url) as cache:
        await cache.set("old", b"v", ttl=None)
        await bust(backend, "key", "x")
        names = await server.execute("KEYS", "*")
        snapshot = {name: await server.execute("DUMP", name) for name in names}
        token = (await cache.lookup("late")).token
        for _ in range(3):
            await bust(backend, "key", "old")
        engine.ask("FLUSHALL")
        for name, content in snapshot.items():
            await server.execute("RESTORE", name, 0, content)
        async with RedisCache(engine.url) as newcomer:
            assert await newcomer.get("old") is not None
            await bust(backend, "key", "x")
            assert await newcomer.get("old") is None
            assert not await newcomer.store("late", b"v", token=token, ttl=None)
    await server.aclose()


async def restarted(server: RedisProcess) -> None:
    """Kill it, and start it with what it has saved; the loop hears meanwhile that connections are closed."""
    server.kill()
    await asyncio.to_thread(server.start)


@pytest.mark.parametrize("first", ["new reader", "old reader", "new daemon", "old daemon"])
async def test_a_server_that_was_restored_from_a_snapshot_serves_nothing_of_it(
    own_engine: RedisProcess, first: str
) -> None:
    """Busts since then were lost with the rest. It is noticed by whoever comes first, knowing nothing of before."""
    async with (
        opened(own_engine.url) as old_daemon,
        opened(own_engine.url) as new_daemon,
        RedisCache(own_engine.url) as old_reader,
        RedisCache(own_engine.url) as new_reader,
    ):
        await old_reader.set("busted", b"old", tags=["t"], ttl=None)
        await old_reader.set("kept", b"v", ttl=None)
        token = (await old_reader.lookup("late")).token
        assert own_engine.ask("SAVE") == b"+OK\r\n"
        assert await bust(old_daemon, "tag", "t") == 1
        assert await bust(old_daemon, "key", "late") == 0
        await restarted(own_engine)
        assert own_engine.ask("EXISTS", "bustcall:{default}:e:busted") == b":1\r\n"
        match first:
            case "new reader":
                assert await new_reader.get_or_set("busted", lambda: b"new", tags=["t"], ttl=None) == b"new"
            case "old reader":
                assert await old_reader.get_or_set("busted", lambda: b"new", tags=["t"], ttl=None) == b"new"
            case "new daemon":
                assert await bust(new_daemon, "key", "unrelated") == 0
            case "old daemon":
                assert await bust(old_daemon, "key", "unrelated") == 0
        for reader in (new_reader, old_reader):
            assert (await reader.get("busted") or Found(b"new", stale=False)).value == b"new"
            assert await reader.get("kept") is None, "it may have been busted, too"
            assert not await reader.store("late", b"old", token=token, ttl=None)
            assert await reader.get_or_set("busted", lambda: b"new", tags=["t"], ttl=None) == b"new"
        assert await bust(new_daemon, "tag", "t") == 1
        assert await old_reader.get("busted") is None


async def test_others_cannot_bring_the_counter_up_to_what_was_lost(own_engine: RedisProcess) -> None:
    """As many busts by a daemon that knows nothing of before would hide from the others that the server went back."""
    async with opened(own_engine.url) as old, opened(own_engine.url) as new, RedisCache(own_engine.url) as reader:
        await reader.set("k", b"old", ttl=None)
        own_engine.ask("SAVE")
        for _ in range(3):
            await bust(old, "key", "k")
        await restarted(own_engine)
        for _ in range(5):
            await bust(new, "key", "unrelated")
        assert await reader.get("k") is None
        await bust(old, "key", "unrelated")
        assert await reader.get("k") is None


@pytest.mark.parametrize("first", ["new reader", "old reader", "new daemon", "old daemon"])
async def test_a_replica_that_takes_over_serves_nothing_from_before(
    own_engine: RedisProcess, tmp_path: Path, first: str
) -> None:
    """It may have lagged behind the busts of the server that failed. All find it where that one was."""
    (tmp_path / "replica").mkdir()
    with RedisProcess(tmp_path / "replica") as replica:
        async with (
            opened(own_engine.url) as old_daemon,
            opened(own_engine.url) as new_daemon,
            RedisCache(own_engine.url) as old_reader,
            RedisCache(own_engine.url) as new_reader,
            RedisCache(replica.url) as stray,
        ):
            await old_reader.set("k", b"old", tags=["t"], ttl=None)
            token = (await old_reader.lookup("late")).token
            own_engine.ask("CONFIG", "SET", "repl-diskless-sync-delay", "0")
            replica.ask("REPLICAOF", "127.0.0.1", str(own_engine.port))
            there = "bustcall:{default}:e:k"
            await eventually(lambda: replica.ask("EXISTS", there) == b":1\r\n", "the replica has it")
            with pytest.raises(RedisUnavailable, match="replica"):
                await stray.get("k")
            replica.ask("REPLICAOF", "NO", "ONE")
            assert await bust(old_daemon, "tag", "t") == 1
            assert await bust(old_daemon, "key", "late") == 0
            own_engine.kill()
            # In a thread, so that the loop hears meanwhile that connections are closed.
            await asyncio.to_thread(replica.ask, "CONFIG", "SET", "port", str(own_engine.port))
            replica.port = own_engine.port
            assert replica.ask("EXISTS", there) == b":1\r\n"
            match first:
                case "new reader":
                    assert await new_reader.get("k") is None
                case "old reader":
                    assert await old_reader.get("k") is None
                case "new daemon":
                    assert await bust(new_daemon, "key", "unrelated") == 0
                case "old daemon":
                    assert await bust(old_daemon, "key", "unrelated") == 0
            for reader in (new_reader, old_reader):
                assert await reader.get("k") is None
                assert not await reader.store("late", b"old", token=token, ttl=None)
            assert await old_reader.get_or_set("k", lambda: b"new", tags=["t"], ttl=None) == b"new"
            assert await bust(new_daemon, "tag", "t") == 1


async def test_two_daemons_bust_the_same(engine: RedisProcess) -> None:
    """Neither ends what the other has begun, and each entry is counted once."""
    async with opened(engine.url) as one, opened(engine.url) as other, RedisCache(engine.url) as cache:
        await asyncio.gather(*(cache.set(f"k/{number}", b"v", ttl=None) for number in range(1000)))
        scope = Scope(HERE, "prefix", "k")
        begun = await one.begin(scope, soft=False)
        counts = await asyncio.gather(bust(other, "prefix", "k"), bust(other, "all", "*"))
        await one.end(scope, begun)
        assert sum(counts) == 1000
        assert await cache.set("k/1", b"v", ttl=None)
        assert await cache.get("k/1") is not None


async def test_no_reader_gets_what_was_busted(engine: RedisProcess) -> None:
    """200 readers, slow and quick, while tags and branches are busted one after the other."""
    written = {f"product:{number}": 0 for number in range(5)}
    ended = dict(written)  # what was written before a bust that has ended
    chance = random.Random(7)
    stop, reads = False, 0

    async def read(cache: RedisCache) -> None:
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
            value = await cache.get_or_set(key, render, tags=[product, "all"], ttl=60.0)
            assert int(value) >= at_least
            reads += 1

    caches = [RedisCache(engine.url, timeout=20.0, connections=10) for _ in range(4)]
    async with opened(engine.url) as backend, asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(read(caches[number % 4]))
        for turn in range(60):
            product = chance.choice(sorted(written))
            written[product] += 1
            await (bust(backend, "tag", product) if turn % 7 else bust(backend, "prefix", f"pages/{product}"))
            ended[product] = written[product]
        stop = True
    for cache in caches:
        await cache.aclose()
    assert reads > 200


# Other programs' keys


async def test_only_keys_that_look_so_are_touched(engine: RedisProcess) -> None:
    """Neither what begins otherwise, nor ours of other tenants, nor what is not UTF-8."""
    server = RedisServer(engine.url)
    kept = ["app", "app2:k", "App:k", "xapp:k", "app:", "k", "default", "bustcall:{default}:x"]
    async with opened(engine.url, foreign="app:") as backend, RedisCache(engine.url, namespace="other") as other:
        await other.set("k", b"v", ttl=None)
        for name in [*kept, "app:k", "app:k/1", "app:{k}", "app:\n"]:
            await server.execute("SET", name, "v")
        await server.execute("SET", b"app:\xff", "v")
        await server.execute("LPUSH", "app:list", "v")
        assert await bust(backend, "all", "*", namespace="other") == 1
        assert await bust(backend, "all", "*") == 5
        names = await server.execute("KEYS", "*")
        ours = {name for name in names if name.startswith(b"bustcall:{other}:")}
        assert set(names) - ours == {*(name.encode() for name in kept), b"app:\xff"}
        assert await bust(backend, "key", "{default}:x") == 0
    await server.aclose()


async def test_no_tag_leads_to_other_programs_keys(engine: RedisProcess) -> None:
    """And one key that both have counts once."""
    server = RedisServer(engine.url)
    async with opened(engine.url, foreign="app:{namespace}:{key}") as backend:
        async with RedisCache(engine.url, namespace="shop") as cache:
            await cache.set("k", b"v", tags=["t"], ttl=None)
            await server.execute("SET", "app:shop:k", "v")
            assert [keys async for keys in backend.select(Scope("shop", "tag", "u"))] == []
            assert [keys async for keys in backend.select(Scope("shop", "all", "*"))] == [("k",)]
            assert await bust(backend, "all", "*", namespace="shop") == 1
            assert await server.execute("EXISTS", "app:shop:k") == 0
            assert await backend.estimate(Scope("shop", "tag", "t")) == 0
            assert await backend.estimate(Scope("shop", "prefix", "k")) is None
            assert await backend.estimate(Scope("shop", "all", "*")) is None
    await server.aclose()


async def test_variants_of_other_programs_keys_are_found(engine: RedisProcess) -> None:
    """Of several keys by one walk, with characters of globs in them."""
    server = RedisServer(engine.url)
    keys = ["[a]*.css", "[a]*.css.gz", "[a]*.css?v=1", "[a]*.css.br?v=1", "a.css.gz", "[a]*.cssx", "[a]*.css.map"]
    async with opened(engine.url, foreign="app:") as backend:
        for key in keys:
            await server.execute("SET", f"app:{key}", "v")
        found = await backend.variants(HERE, ["[a]*.css", "[a]*.js", "[a]*.css.br"])
        assert sorted(found) == sorted(key for key in keys if is_variant("[a]*.css", key))
        assert await backend.variants(HERE, ["\ud800"]) == []
    await server.aclose()


# Cancellation


async def test_cancelled_calls_leave_no_answer_to_others(engine: RedisProcess) -> None:
    """Cut off at any moment, on few connections, each answer is that to its own question."""
    server = RedisServer(engine.url, connections=3, timeout=20.0)
    chance = random.Random(3)
    cut = 0

    async def ask(number: int) -> None:
        assert await server.execute("ECHO", f"{number}") == b"%d" % number

    for number in range(400):
        tasks = [asyncio.create_task(ask(number * 10 + offset)) for offset in range(4)]
        for _ in range(chance.randrange(16)):
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.wait(tasks)
        cut += sum(task.cancelled() for task in tasks)
        for task in tasks:
            assert task.cancelled() or task.exception() is None
    assert cut > 100
    await asyncio.gather(*(ask(number) for number in range(50)))
    await server.aclose()


async def test_closing_again_and_using_again_is_possible(engine: RedisProcess) -> None:
    """Connections are opened anew, and none is left."""
    before = len(os.listdir("/proc/self/fd"))
    backend = RedisBackend(engine.url)
    for _ in range(2):
        await backend.check_ready()
        await backend.close()
        await backend.close()
    assert len(os.listdir("/proc/self/fd")) == before
