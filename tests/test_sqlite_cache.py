"""The readers' half of a cache in an SQLite file: what is found, stored and refused, in one process and in several.

Who makes a value while others wait is told by the tests of other caches; here only that it is the same.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.integrations.sqlite import Breaker, Found, SqliteCache, SqliteUnavailable
from pybustcall.models import Kind
from tests.conftest import PATIENCE, eventually
from tests.readers import SHOP, Maker, bust, never, quick, start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
async def cache(path: Path) -> AsyncIterator[SqliteCache]:
    """A cache in it."""
    async with SqliteCache(path, namespace=SHOP, timeout=10.0) as cache:
        yield cache


@pytest.fixture
async def other(path: Path) -> AsyncIterator[SqliteCache]:
    """Another one, as another process has it."""
    async with SqliteCache(path, namespace=SHOP, timeout=10.0) as cache:
        yield cache


@pytest.fixture
async def backend(path: Path) -> AsyncIterator[SqliteBackend]:
    """The daemon's half."""
    backend = SqliteBackend(path, timeout=10.0)
    yield backend
    await backend.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be another process that writes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


# Values


async def test_an_entry_ends_with_its_ttl(cache: SqliteCache) -> None:
    """By itself."""
    await cache.set("k", b"v", ttl=0.001)
    async with asyncio.timeout(PATIENCE):
        while await cache.get("k") is not None:
            pass


async def test_namespaces_are_kept_apart(cache: SqliteCache, path: Path, backend: SqliteBackend) -> None:
    """One file may hold all tenants."""
    async with SqliteCache(path, namespace="tenant") as tenant:
        await cache.set("k", b"1", ttl=None)
        await tenant.set("k", b"2", ttl=None)
        await bust(backend, "all")
        assert await cache.get("k") is None
        assert await tenant.get("k") == Found(b"2", stale=False)


async def test_what_is_larger_than_the_cache_is_made_and_not_stored(path: Path) -> None:
    """And nothing goes for it; what has room makes older entries go."""
    async with SqliteCache(path, max_bytes=1 << 20) as cache:
        await cache.set("k", b"v", ttl=None)
        large = b"x" * ((1 << 20) + 1)
        assert await cache.get_or_set("large", lambda: large, ttl=None) == large
        assert await cache.get("large") is None
        assert not await cache.set("large", large, ttl=None)
        assert await cache.get("k") == Found(b"v", stale=False)
        for number in range(30):
            assert await cache.set(f"k/{number}", b"x" * 100_000, ttl=None)
        assert await cache.get("k") is None
        assert await cache.get("k/29") is not None
    assert os.lstat(path).st_size < 2 << 20


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("path", ""),
        ("path", ":memory:"),
        ("path", Path("a", ":memory:")),
        ("path", 5),
        ("path", b"a"),
        ("max_bytes", 1000),
        ("timeout", 0),
        ("lease", 0),
        ("lease", math.nan),
        ("on_error", "ignore"),
    ],
)
def test_settings_that_cannot_be_are_refused(path: Path, setting: str, value: Any) -> None:
    """At once, by name."""
    with pytest.raises(ConfigurationError) as caught:
        SqliteCache(**({"path": path} | {setting: value}))
    assert caught.value.setting == setting


def test_a_namespace_that_cannot_be_is_refused(path: Path) -> None:
    """It would reach somebody else's entries."""
    with pytest.raises(InvalidRequest):
        SqliteCache(path, namespace="a/b")


async def test_a_cache_says_which_file_it_is(cache: SqliteCache, path: Path) -> None:
    """And whose entries."""
    assert repr(cache) == f"SqliteCache({str(path)!r}, namespace='shop')"


# Busts


async def test_a_stale_value_is_served_while_one_of_all_makes_it_anew(
    cache: SqliteCache, other: SqliteCache, backend: SqliteBackend
) -> None:
    """In whichever process; the others get it at once."""
    await cache.set("k", b"old", ttl=60.0)
    await bust(backend, "key", "k", soft=True)
    make = Maker(b"new")
    one = start(cache, "k", make)
    await eventually(lambda: make.calls)
    for reader in (cache, other):
        assert await asyncio.gather(*(reader.get_or_set("k", never, ttl=60.0) for _ in range(10))) == [b"old"] * 10
        assert await reader.get("k") == Found(b"old", stale=True)
    make.go.set()
    assert await one == b"new"
    assert await other.get("k") == Found(b"new", stale=False)


async def test_of_all_who_find_a_stale_entry_one_is_chosen(
    cache: SqliteCache, other: SqliteCache, backend: SqliteBackend
) -> None:
    """Also of those who look at the same moment; after the next bust another one."""
    await cache.set("k", b"old", ttl=60.0)
    for _ in range(3):
        await bust(backend, "key", "k", soft=True)
        looked = await asyncio.gather(*(reader.lookup("k") for reader in (cache, other) for _ in range(20)))
        assert sum(it.refresh for it in looked) == 1
        assert {it.found for it in looked} == {Found(b"old", stale=True)}
    [chosen] = [it for it in looked if it.refresh]
    assert await other.store("k", b"new", token=chosen.token, ttl=60.0)


async def test_it_can_be_done_by_hand(cache: SqliteCache, backend: SqliteBackend) -> None:
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


async def test_a_file_that_went_back_serves_nothing_that_was_busted(
    cache: SqliteCache, path: Path, backend: SqliteBackend
) -> None:
    """A reader remembers how far it was, where somebody copies an older file over it."""
    await cache.set("k", b"old", ttl=None)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    backup = path.read_bytes()  # noqa: ASYNC240
    await bust(backend, "key", "k")
    assert await cache.get("k") is None
    await cache._file.aclose()
    await backend.close()
    path.write_bytes(backup)  # noqa: ASYNC240
    assert await asyncio.gather(*(cache.get("k") for _ in range(5))) == [None] * 5
    assert await cache.get_or_set("k", lambda: b"new", ttl=None) == b"new"
    assert await cache.get("k") == Found(b"new", stale=False)


# Files that cannot be used


async def test_values_are_made_if_the_file_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once in a while; each call makes its own."""
    async with SqliteCache(tmp_path / "missing" / "cache.db") as cache:
        for _ in range(3):
            assert await cache.get_or_set("k", quick, ttl=None) == b"v"
        with pytest.raises(SqliteUnavailable):
            await cache.get("k")
    assert len(caplog.records) == 1
    assert "values are made without a cache" in caplog.text
    assert "its directory does not exist" in caplog.text


async def test_it_raises_if_that_is_wanted(path: Path) -> None:
    """Where a database would not bear it."""
    path.mkdir()  # noqa: ASYNC240
    async with SqliteCache(path, on_error="raise") as cache:
        with pytest.raises(SqliteUnavailable, match="is a directory"):
            await cache.get_or_set("k", never, ttl=None)


async def test_while_another_process_writes_values_are_found_and_made(
    path: Path, backend: SqliteBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Not stored; nobody is chosen to make a stale one anew; and after some who waited in vain nobody waits."""
    breaker = Breaker(incidents=2, open=0.2, cap=0.2, proofs=1)
    async with SqliteCache(path, namespace=SHOP, timeout=0.05, breaker=breaker) as cache:
        await cache.set("fresh", b"1", ttl=None)
        await cache.set("stale", b"2", ttl=None)
        await bust(backend, "key", "stale", soft=True)
        with locked(path):
            assert await cache.get_or_set("fresh", never, ttl=None) == b"1"
            assert await cache.get_or_set("stale", never, ttl=None) == b"2"
            assert await cache.get_or_set("new", quick, ttl=None) == b"v"
            with pytest.raises(SqliteUnavailable, match=r"which was locked, has not answered, and is tried again in"):
                await cache.set("new", b"v", ttl=None)
            assert await cache.get_or_set("new", quick, ttl=None) == b"v"
            assert await cache.get_or_set("fresh", never, ttl=None) == b"1"
        async with asyncio.timeout(PATIENCE):
            while await cache.get("new") is None:
                await cache.get_or_set("new", quick, ttl=None)
        assert await cache.get_or_set("stale", quick, ttl=None) == b"v"
    assert len(caplog.records) == 1


async def test_without_a_breaker_each_call_waits(path: Path) -> None:
    """For those who would rather."""
    async with SqliteCache(path, timeout=0.01, breaker=None) as cache:
        await cache.get("k")
        with locked(path):
            for _ in range(5):
                with pytest.raises(SqliteUnavailable, match="kept it locked"):
                    await cache.set("k", b"v", ttl=None)


# Several processes


READING = """
    import asyncio, json, random, sys, time
    from pathlib import Path
    from pybustcall.integrations.sqlite import SqliteCache

    async def main():
        seen, made, over = [], 0, False

        async def make():
            nonlocal made
            made += 1
            value = Path(sys.argv[2]).read_bytes()
            await asyncio.sleep(random.random() * 0.01)
            return value

        async def read(key):
            while not over:
                begun = time.monotonic()
                seen.append((begun, int(await cache.get_or_set(key, make, tags=["t"], ttl=60.0))))
                await asyncio.sleep(0.002)

        async with SqliteCache(sys.argv[1], namespace="shop", timeout=10.0, on_error="raise") as cache:
            reading = [asyncio.create_task(read(f"p/{number % 2}")) for number in range(4)]
            print("reading", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            over = True
            await asyncio.gather(*reading)
        print(json.dumps([seen, made]))

    asyncio.run(main())
"""


@pytest.mark.requirement("REL-04")
async def test_no_process_reads_what_was_busted_before_it_asked(
    path: Path, tmp_path: Path, backend: SqliteBackend
) -> None:
    """However slowly others make values, and if one is killed in the midst of it."""
    database = tmp_path / "database"

    def change(version: int) -> None:
        (tmp_path / "new").write_text(f"{version}")
        (tmp_path / "new").replace(database)

    change(0)
    command = [sys.executable, "-c", textwrap.dedent(READING), str(path), str(database)]
    with ExitStack() as stack:
        readers = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))  # noqa: ASYNC220
            for _ in range(3)
        ]
        for reader in readers:
            stack.callback(reader.kill)
            assert reader.stdout is not None
            assert await asyncio.to_thread(reader.stdout.readline)
        busted: list[tuple[float, int]] = []
        scopes: list[tuple[Kind, str]] = [("key", "p/0"), ("prefix", "p"), ("tag", "t"), ("all", "*")]
        choose = random.Random(7)
        for version in range(1, 31):
            change(version)
            kind, target = choose.choice(scopes)
            await bust(backend, kind, target)
            if kind == "key":
                await bust(backend, "key", "p/1")
            busted.append((time.monotonic(), version))
            await asyncio.sleep(choose.random() * 0.03)
            if version == 20:
                readers.pop().kill()
        told = await asyncio.gather(*(asyncio.to_thread(reader.communicate, b"\n", PATIENCE) for reader in readers))
    for out, _ in told:
        seen, made = json.loads(out)
        assert len(seen) > 2 * made > 0
        for begun, value in seen:
            assert value >= max((version for at, version in busted if at <= begun), default=0)
