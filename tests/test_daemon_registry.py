"""The registry: what was answered is still known after a restart, and what cannot be written down is not answered."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.daemon import (
    DaemonSettings,
    Idempotency,
    MemoryBackend,
    RefusedKey,
    Registry,
    Swaps,
    create_app,
    serve,
)
from pybustcall.daemon.database import Database, Kind
from pybustcall.daemon.dependencies import Change, InUse, NotCurrent
from pybustcall.daemon.index import Entry, Indexes
from pybustcall.daemon.registry import MOST_SWAPS, WINDOW, Errands, Phase, RegistryFailure, Swap
from pybustcall.errors import ConfigurationError
from pybustcall.models import AnnounceRequest
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.plain_cache import engine_over
from tests.test_daemon_app import BUST, ENTRIES, memory, refused, running
from tests.test_daemon_idempotency import (
    SPOILERS,
    Clock,
    files_limited,
    make_dangling,
    make_database,
    make_fifo,
    modes_in,
    warnings_in,
)

THREAD = "pybustcall-registry"


def anything(namespace: str, key: str) -> None:
    """Refuse no key."""


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@asynccontextmanager
async def keeping(
    path: Path | None = None,
    indexes: Indexes | None = None,
    check: Callable[[str, str], None] = anything,
    **more: Any,
) -> AsyncIterator[tuple[Registry, Indexes]]:
    """Open a registry; afterwards it is closed, and neither task nor thread of it is left."""
    tasks = asyncio.all_tasks()
    registry, indexes = Registry(path, **more), Indexes() if indexes is None else indexes
    await registry.open(indexes, check)
    try:
        yield registry, indexes
    finally:
        await registry.close()
    assert asyncio.all_tasks() <= tasks
    assert not threads()


async def register(registry: Registry, indexes: Indexes, key: str, *depends_on: str, ttl: float | None = None) -> None:
    indexes.of("default").add(key, depends_on, ttl=ttl)
    await registry.save()


def bust(indexes: Indexes, *keys: str) -> None:
    """Remove what is named, with what depends on it, as an engine does that has no cache but these."""
    index = indexes.of("default")
    for key in keys:
        for one in (key, *index.dependents(key)):
            index.remove(one)


async def known(path: Path) -> dict[str, tuple[str, ...]]:
    """Tell which entries a new process finds in the file."""
    async with keeping(path) as (_, indexes):
        return entries_of(indexes)


def entries_of(indexes: Indexes, namespace: str = "default") -> dict[str, tuple[str, ...]]:
    return {key: entry.depends_on for key, entry in indexes.of(namespace).items()}


def model(*versions: str, current: str | None = None, name: str = "model") -> AnnounceRequest:
    return AnnounceRequest(name=name, versions=versions, current=current)


async def in_thread(registry: Registry, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Do something with the registry's own connection, in its thread."""
    assert registry._thread is not None
    return await asyncio.get_running_loop().run_in_executor(registry._thread, registry._database.use, work)


@contextmanager
def held_up(registry: Registry) -> Iterator[None]:
    """Let the registry's thread do nothing meanwhile, as a disk does that does not answer."""
    assert registry._thread is not None
    free = threading.Event()
    registry._thread.submit(free.wait, PATIENCE)
    try:
        yield
    finally:
        free.set()


def limit(pages: int, db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA max_page_count = {pages}")  # no less than there are already


@asynccontextmanager
async def full(registry: Registry) -> AsyncIterator[None]:
    """Let the database have no page more than it has; afterwards there is room again."""
    await in_thread(registry, partial(limit, 1))
    yield
    await in_thread(registry, partial(limit, 1_000_000))


LARGE = tuple(f"{number:03}{'x' * 97}" for number in range(80))  # more than there is room for in a page that is there


# Entries


@pytest.mark.requirement("IMP-12")
async def test_what_was_registered_is_known_after_a_restart(tmp_path: Path) -> None:
    """With what it depends on, in order, and only as it was registered last."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        await register(registry, indexes, "page", "model", "templates")
        await register(registry, indexes, "other", "model")
        await register(registry, indexes, "other", "templates")
        assert modes_in(tmp_path) == {0o600}
    assert await known(tmp_path / "r") == {"page": ("model", "templates"), "other": ("templates",)}
    assert os.listdir(tmp_path) == ["r"]


async def test_what_a_bust_removed_is_gone_after_a_restart(tmp_path: Path) -> None:
    """Where the registry is the cache."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        for key in ("page", "other"):
            await register(registry, indexes, key, key[0])
        bust(indexes, "p")
        await registry.try_save()
        found = await in_thread(registry, lambda db: db.execute("SELECT key FROM entries").fetchall())
    assert found == [("other",)]
    assert await known(tmp_path / "r") == {"other": ("o",)}


async def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    """And there is no thread."""
    async with keeping() as (registry, indexes):
        await register(registry, indexes, "page", "model")
        bust(indexes, "model")
        await registry.try_save()
        await registry.announce(model("1.0.0"))
        assert not threads()
        assert repr(registry) == "Registry(in memory, 1 dependencies, 0 swaps)"
        await registry.close()


async def test_the_index_is_followed_between_open_and_close_only(tmp_path: Path) -> None:
    """A second closing does nothing."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        assert str(tmp_path / "r") in repr(registry)
        indexes.of("default").add("page")
        await registry.close()
        indexes.of("default").add("late")
        await registry.save()
        await registry.try_save()
    assert await known(tmp_path / "r") == {"page": ()}


async def test_what_a_file_says_is_joined_with_what_is_registered_already(tmp_path: Path) -> None:
    """To bust too much costs a miss: all that it depends on, all tags, and the longer lifetime."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        index = indexes.of("default")
        index.add("page", ["b", "c"], tags=["u", "v"], ttl=60.0)
        index.add("short", ttl=60.0)
        index.add("for good")
        await registry.save()
    indexes = Indexes()
    index = indexes.of("default")
    index.add("page", ["a", "b"], tags=["t", "u"])
    index.add("short", ttl=30.0)
    index.add("for good", ttl=30.0)
    async with keeping(tmp_path / "r", indexes):
        assert (index.dependencies("page"), index.tags("page")) == (("a", "b", "c"), ("t", "u", "v"))
        assert {key: entry.ttl for key, entry in index.items()} == {"page": None, "short": 60.0, "for good": None}


async def test_keys_that_no_cache_could_hold_are_left_out(tmp_path: Path) -> None:
    """Whoever knows the caches is asked for each, with its namespace; the links of one that goes are kept."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        for namespace in ("default", "other"):
            for key in ("page", "/absolute"):
                indexes.of(namespace).add(key, ["b"])
        indexes.of("other").add("end", ["/absolute"])
        await registry.save()

    def check(namespace: str, key: str) -> None:
        if namespace == "other" and key.startswith("/"):
            raise RefusedKey("is an absolute path")

    async with keeping(tmp_path / "r", check=check) as (_, indexes):
        assert entries_of(indexes) == {"page": ("b",), "/absolute": ("b",)}
        assert entries_of(indexes, "other") == {"page": ("b",), "end": ("/absolute",)}
        assert indexes.of("other").dependents("b") == ["end", "page"]


@pytest.mark.requirement("IMP-12")
async def test_namespaces_tags_and_lifetimes_are_known_after_a_restart(tmp_path: Path) -> None:
    """A lifetime begins anew; a removal in one namespace is none in another."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        indexes.of("default").add("page", ["a"], tags=["t", "u"], ttl=60.0)
        indexes.of("tenant-1").add("page", ["b"], tags=["t"])
        indexes.of("tenant-2").add("page")
        await registry.save()
        indexes.of("tenant-2").remove("page")
        await registry.try_save()
    now = 1000.0
    indexes = Indexes(clock=lambda: now)
    async with keeping(tmp_path / "r", indexes):
        assert [namespace for namespace, _ in indexes] == ["default", "tenant-1"]
        assert dict(indexes.of("default").items()) == {
            "page": Entry(depends_on=("a",), tags=("t", "u"), ttl=60.0, deadline=1060.0)
        }
        assert dict(indexes.of("tenant-1").items()) == {"page": Entry(depends_on=("b",), tags=("t",))}


async def test_what_outlived_its_lifetime_is_gone_from_the_file(tmp_path: Path) -> None:
    """With the next writing, for which nobody needs to ask."""
    clock = Clock(0.0)
    indexes = Indexes(clock=clock)
    async with keeping(tmp_path / "r", indexes) as (registry, indexes):
        indexes.of("default").add("short", ttl=1.0)
        await register(registry, indexes, "page")
        clock.now = 1.0
        assert entries_of(indexes) == {"page": ()}
    assert await known(tmp_path / "r") == {"page": ()}


async def test_a_chain_holds_over_a_restart_though_what_is_between_is_gone(tmp_path: Path) -> None:
    """Whether it was over or removed, and dropped or not; when the links are of no use any more, the file says so."""
    clock = Clock(0.0)
    async with keeping(tmp_path / "r", Indexes(clock=clock, at_once=0)) as (registry, indexes):
        await register(registry, indexes, "a", "k", ttl=1.0)
        await register(registry, indexes, "b", "a")
        await register(registry, indexes, "c", "b")
        await register(registry, indexes, "page", "c")
        clock.now = 1.0
        indexes.of("default").remove("b")
        await registry.save()
        indexes.of("default").expire(1)
        indexes.of("default").remove("c")
        await registry.try_save()
    async with keeping(tmp_path / "r") as (registry, indexes):
        assert entries_of(indexes) == {"page": ("c",)}
        assert indexes.of("default").dependents("k") == ["page"]
        bust(indexes, "k")
        await registry.try_save()
        assert await in_thread(registry, lambda db: db.execute("SELECT key FROM entries").fetchall()) == []


async def test_links_that_were_of_no_use_at_the_start_go_from_the_file(tmp_path: Path) -> None:
    """As whoever needed them was registered without them in the configuration, or is not told in the file."""
    async with keeping(tmp_path / "r"):
        pass
    spoiling(ENTRY, "default", "a", '["k"]', "[]", 0.0)(tmp_path / "r")
    async with keeping(tmp_path / "r") as (registry, indexes):
        assert not indexes.of("default").kept()
        await registry.try_save()
        assert await in_thread(registry, lambda db: db.execute("SELECT key FROM entries").fetchall()) == []


async def test_links_are_taken_back_with_what_was_made_of_them(tmp_path: Path) -> None:
    """A page that is registered anew without a fragment, but not in the file, may still be the old one."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        await register(registry, indexes, "frag", "k")
        await register(registry, indexes, "page", "frag")
        index = indexes.of("default")
        index.remove("frag")
        await registry.try_save()
        async with full(registry):
            with pytest.raises(RegistryFailure):
                await register(registry, indexes, "page", *LARGE)
            assert index.dependents("k") == ["page"]
            with pytest.raises(RegistryFailure):
                await register(registry, indexes, "frag", *LARGE)
            assert (index.dependents("k"), list(index)) == (["page"], ["page"])
    async with keeping(tmp_path / "r") as (registry, indexes):
        assert indexes.of("default").dependents("k") == ["page"]


async def test_a_commit_that_is_made_ready_in_portions_says_how_things_were_in_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is removed meanwhile is still there in it, and gone after the next: nothing goes before what went first."""
    monkeypatch.setattr("pybustcall.daemon.registry._PORTION", 2)
    async with keeping(tmp_path / "r") as (registry, indexes):
        index = indexes.of("default")
        index.update({f"p{number}": Entry(depends_on=("k",)) for number in range(9)})
        saving = asyncio.create_task(registry.save())
        while not registry._taken:
            await asyncio.sleep(0)
        for number in range(8):
            index.remove(f"p{number}")
        index.add("p8", ["late"])
        index.add("p0", ["late"])
        index.add("new")
        await saving
        rows = await in_thread(registry, lambda db: db.execute("SELECT key, depends_on FROM entries").fetchall())
        assert rows == [(f"p{number}", '["k"]') for number in range(9)]
        await registry.save()
        assert not registry._meanwhile
    assert await known(tmp_path / "r") == {"p0": ("late",), "p8": ("late",), "new": ()}


async def test_the_event_loop_has_its_turn_while_much_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each portion that is made ready, and once for each that is let go of; it is one commit all the same."""
    monkeypatch.setattr("pybustcall.daemon.registry._PORTION", 10)
    statements: list[str] = []
    async with keeping(tmp_path / "r") as (registry, indexes):
        index = indexes.of("default")
        index.update({f"{number:03}": Entry() for number in range(300)})
        await in_thread(registry, lambda db: db.set_trace_callback(statements.append))
        saving = asyncio.create_task(registry.save())
        turns = 0
        while not saving.done():
            turns += 1
            await asyncio.sleep(0)
        await in_thread(registry, lambda db: db.set_trace_callback(None))
    assert turns >= 60 - 2
    assert statements.count("COMMIT") == 1
    assert len(await known(tmp_path / "r")) == 300


async def test_more_namespaces_than_may_be_are_known_after_a_restart(tmp_path: Path) -> None:
    """A smaller limit is for what comes: what is forgotten would leave old values behind."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        for number in range(3):
            indexes.of(f"tenant-{number}").add("page")
        await registry.save()
    async with keeping(tmp_path / "r", Indexes(most=1)) as (_, indexes):
        assert len(indexes) == 3


async def test_registrations_that_come_together_share_a_commit(tmp_path: Path) -> None:
    """However many: those that come while one is under way wait for the next, which takes them all."""
    statements: list[str] = []
    async with keeping(tmp_path / "r") as (registry, indexes):
        await in_thread(registry, lambda db: db.set_trace_callback(statements.append))
        with held_up(registry):
            first = asyncio.create_task(register(registry, indexes, "first"))
            await eventually(registry._writing.locked)
            rest = [asyncio.create_task(register(registry, indexes, f"page{number}")) for number in range(100)]
            await eventually(lambda: len(indexes) == 101)
        await asyncio.gather(first, *rest)
        await in_thread(registry, lambda db: db.set_trace_callback(None))
    assert statements.count("COMMIT") == 2
    assert len(await known(tmp_path / "r")) == 101


async def test_a_registration_that_is_repeated_waits_for_the_first(tmp_path: Path) -> None:
    """It is answered no sooner than it is written."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        with held_up(registry):
            asked = [asyncio.create_task(register(registry, indexes, "page", "a")) for _ in range(2)]
            await eventually(lambda: registry._gathering is not None or registry._writing.locked())
            await asyncio.sleep(0)
            assert not any(task.done() for task in asked)
        await asyncio.gather(*asked)
        assert registry._unwritten == {}


async def test_a_caller_that_is_cancelled_breaks_no_writing_off(tmp_path: Path) -> None:
    """Neither its own nor another's."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        with held_up(registry):
            first, second = (asyncio.create_task(register(registry, indexes, key)) for key in "ab")
            third = asyncio.create_task(registry.announce(model("1.0.0")))
            await eventually(lambda: len(indexes) == 2)
            for task in (first, third):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        await second
        await eventually(lambda: "model" in registry.dependencies)
    assert await known(tmp_path / "r") == {"a": (), "b": ()}


async def test_a_registration_that_cannot_be_written_is_taken_back(tmp_path: Path) -> None:
    """What was registered before stands, in memory as in the file; with room again it can be repeated."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        await register(registry, indexes, "page", "model")
        async with full(registry):
            for key in ("page", "other"):
                with pytest.raises(RegistryFailure, match="cannot be written: database or disk is full") as caught:
                    await register(registry, indexes, key, *LARGE)
                assert caught.value.full
            assert entries_of(indexes) == {"page": ("model",)}
        await register(registry, indexes, "other", *LARGE)
    assert await known(tmp_path / "r") == {"page": ("model",), "other": LARGE}


async def test_what_is_taken_back_is_as_it_was(tmp_path: Path) -> None:
    """With its tags, its deadline, its birth and its mark, in its namespace; what ended meanwhile stays gone."""
    clock = Clock(0.0)
    async with keeping(tmp_path / "r", Indexes(clock=clock)) as (registry, indexes):
        index = indexes.of("tenant")
        index.add("page", ["model"], tags=["t"], ttl=10.0)
        index.add("short", ttl=1.0)
        index.add("replaced", ttl=1.0)
        await registry.save()
        index.mark_stale("page")
        before = index.entry("page")
        indexes.begin()
        async with full(registry):
            index.add("page", LARGE)
            index.add("replaced", LARGE)
            index.add("other", LARGE, ttl=1.0)
            clock.now = 1.0
            with pytest.raises(RegistryFailure):
                await registry.save()
            assert dict(index.items()) == {"page": before}
        assert not indexes.of("default")
        await registry.save()
        found = await in_thread(registry, lambda db: db.execute("SELECT namespace, key, ttl FROM entries").fetchall())
    assert found == [("tenant", "page", 10.0)]


async def test_what_is_taken_back_and_over_by_then_is_gone(tmp_path: Path) -> None:
    """From the file too, though its end is noted in the midst of being taken back."""
    clock = Clock(0.0)
    async with keeping(tmp_path / "r", Indexes(clock=clock)) as (registry, indexes):
        await register(registry, indexes, "page", ttl=1.0)
        clock.now = 0.5
        async with full(registry):
            indexes.of("default").add("page", LARGE)
            clock.now = 1.0
            with pytest.raises(RegistryFailure):
                await registry.save()
        assert len(indexes) == 0
        await registry.try_save()
        assert await in_thread(registry, lambda db: db.execute("SELECT key FROM entries").fetchall()) == []


async def test_registrations_that_wait_behind_one_that_fails_fail_too(tmp_path: Path) -> None:
    """They may stand on it: all that was not written is taken back, and whoever waits is told."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        await register(registry, indexes, "page", "model")
        async with full(registry):
            with held_up(registry):
                first = asyncio.create_task(register(registry, indexes, "page", *LARGE))
                await eventually(registry._writing.locked)
                second = asyncio.create_task(register(registry, indexes, "page", "b"))
                third = asyncio.create_task(register(registry, indexes, "other", "b"))
                await eventually(lambda: len(indexes) == 2)
            told = await asyncio.gather(first, second, third, return_exceptions=True)
        assert [type(error) for error in told] == [RegistryFailure] * 3
        assert [getattr(error, "full", None) for error in told] == [True, True, True]
        assert entries_of(indexes) == {"page": ("model",)}
    assert await known(tmp_path / "r") == {"page": ("model",)}


async def test_a_removal_is_not_taken_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bust goes on, a line of the log says so, and the next commit notes it."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        for key in ("page", "new"):
            await register(registry, indexes, key, "model")
        async with full(registry):
            with held_up(registry):
                first = asyncio.create_task(register(registry, indexes, "other", *LARGE))
                await eventually(registry._writing.locked)
                assert indexes.of("default").remove("page")
                busted = asyncio.create_task(registry.try_save())
                await asyncio.sleep(0)
            with pytest.raises(RegistryFailure):
                await first
            await busted
        assert entries_of(indexes) == {"new": ("model",)}
        await registry.save()
        found = await in_thread(registry, lambda db: db.execute("SELECT key FROM entries").fetchall())
    assert found == [("new",)]
    (told,) = warnings_in(caplog)
    assert told.startswith("what was busted could not be noted, and may be taken as registered after a restart: ")


async def test_a_bust_does_not_wait_for_a_registry_that_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And not at all if it removed no entry."""
    async with keeping(tmp_path / "r", patience=0.05) as (registry, indexes):
        await register(registry, indexes, "page")
        with held_up(registry):
            indexes.of("default").add("other")
            await registry.try_save()
            assert not caplog.records
            bust(indexes, "page")
            await registry.try_save()
        await registry.save()
    (told,) = warnings_in(caplog)
    assert told.endswith("not written in 0.05 seconds")
    assert await known(tmp_path / "r") == {"other": ()}


# The file


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is not a regular file"),
        (make_fifo, "is not a regular file"),
        (make_dangling, "No such file or directory"),
        (make_database, "is a database of something else"),
    ],
)
async def test_what_is_not_ours_is_left_as_it_is(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    """It is a mistake of the operator's, told by name."""
    path = tmp_path / "r"
    make(path)
    before = path.lstat()
    with pytest.raises(ConfigurationError, match=reason) as caught:
        await Registry(path).open(Indexes(), anything)
    assert caught.value.setting == "registry"
    assert str(path) in str(caught.value)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert not threads()


async def test_a_file_is_one_daemons_alone(tmp_path: Path) -> None:
    """Also between the two files that a daemon may have."""
    async with keeping(tmp_path / "r"):
        with pytest.raises(ConfigurationError, match="in use by another process") as caught:
            await Registry(tmp_path / "r").open(Indexes(), anything)
        assert caught.value.setting == "registry"
    with pytest.raises(ConfigurationError, match="is a database of something else"):
        await Idempotency(tmp_path / "r").open()


async def test_a_disk_that_is_full_at_the_start_is_the_operators_to_mend(tmp_path: Path) -> None:
    """A daemon that does not know its entries would leave old values behind."""
    with files_limited(0), pytest.raises(ConfigurationError, match="make room") as caught:
        await Registry(tmp_path / "r").open(Indexes(), anything)
    assert caught.value.setting == "registry"
    assert not threads()


def spoil_a_row(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET depends_on = '7'")
    db.close()


def spoil_a_phase(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO swaps VALUES (1, NULL, x'', 'sleeping', '[]', 0, 0)")
    db.close()


def spoiling(statement: str, *values: object) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with sqlite3.connect(path) as db:
            db.execute(statement, values)
        db.close()

    return spoil


ENTRY = "INSERT INTO entries VALUES (?, ?, ?, ?, ?)"
DEPENDENCY = "INSERT INTO dependencies VALUES (?, ?, ?)"
SWAP = "INSERT INTO swaps VALUES (1, ?, ?, ?, ?, ?, ?)"
DEEP = "[" * 100_000 + "]" * 100_000
BY_HAND = {
    "deep json": spoiling(ENTRY, "default", "a", DEEP, "[]", None),
    "a blob as namespace": spoiling(ENTRY, b"default", "a", "[]", "[]", None),
    "a namespace that is none": spoiling(ENTRY, "two words", "a", "[]", "[]", None),
    "a blob as key": spoiling(ENTRY, "default", b"a", "[]", "[]", None),
    "a text as list": spoiling(ENTRY, "default", "a", '"abc"', "[]", None),
    "a number in a list": spoiling(ENTRY, "default", "a", "[1]", "[]", None),
    "a number as tag": spoiling(ENTRY, "default", "a", "[]", "[1]", None),
    "a text as lifetime": spoiling(ENTRY, "default", "a", "[]", "[]", "long"),
    "a lifetime below 0": spoiling(ENTRY, "default", "a", "[]", "[]", -1),
    "no UTF-8": spoiling("INSERT INTO entries VALUES ('default', CAST(x'ff' AS TEXT), '[]', '[]', NULL)"),
    "a name that is none": spoiling(DEPENDENCY, "two words", "1.0.0", "[]"),
    "a blob as name": spoiling(DEPENDENCY, b"model", "1.0.0", "[]"),
    "a current that is no version": spoiling(DEPENDENCY, "model", "one", "[]"),
    "a version that is none": spoiling(DEPENDENCY, "model", "1.0.0", '["one"]'),
    "deep versions": spoiling(DEPENDENCY, "model", "1.0.0", DEEP),
    "a text as key": spoiling(SWAP, "name", b"", "done", "[]", 0, 0),
    "a text as request": spoiling(SWAP, None, "request", "done", "[]", 0, 0),
    "a blob as changes": spoiling(SWAP, None, b"", "done", b"[]", 0, 0),
    "a change of two": spoiling(SWAP, None, b"", "done", '[["model", "1.0.0"]]', 0, 0),
    "a change that is a text": spoiling(SWAP, None, b"", "done", '["abc"]', 0, 0),
    "a text as count": spoiling(SWAP, None, b"", "done", "[]", "many", 0),
    "a count below 0": spoiling(SWAP, None, b"", "done", "[]", -1, 0),
    "a text as time": spoiling(SWAP, None, b"", "done", "[]", 0, "now"),
}


@pytest.mark.parametrize("spoil", [*SPOILERS, spoil_a_row, spoil_a_phase, *BY_HAND.values()])
async def test_a_damaged_file_is_set_aside(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Whole, and a new one is begun; one line of the log says so."""
    path = tmp_path / "r"
    async with keeping(path) as (registry, indexes):
        await register(registry, indexes, "page", "model")
    spoil(path)
    assert await known(path) == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["r", "r.corrupt-1"]
    (told,) = warnings_in(caplog)
    assert "the registry file" in told
    assert "cannot be used" in told


def damage(path: Path) -> Callable[[sqlite3.Connection], None]:
    """Spoil every page but the schema's, and have SQLite forget those that it has read."""

    def spoil(db: sqlite3.Connection) -> None:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(4096)
            file.write(b"\xff" * (size - 4096))
        db.execute("PRAGMA shrink_memory")

    return spoil


async def test_a_file_damaged_in_the_midst_of_the_work_is_written_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With all that this daemon knows, and what it was just about to write."""
    path = tmp_path / "r"
    async with keeping(path) as (registry, indexes):
        await registry.announce(model("1.0.0"))
        swap = await registry.prepare(b"name", b"request", (Change("model", "1.0.0", "1.1.0"),))
        for number in range(300):
            indexes.of("default").add(f"page{number}", ["model"])
        await registry.save()
        await in_thread(registry, damage(path))
        await register(registry, indexes, "page7", "templates")
        entries = entries_of(indexes)
    async with keeping(path) as (registry, indexes):
        assert entries_of(indexes) == entries
        assert registry.dependencies["model"].current == "1.0.0"
        assert registry.unfinished() == (swap,)
    assert sorted(os.listdir(tmp_path))[:2] == ["r", "r.corrupt-1"]
    assert len(warnings_in(caplog)) == 1


async def test_a_file_that_could_not_be_written_anew_is_not_taken_as_whole(tmp_path: Path) -> None:
    """The next writing tries again to write everything."""
    path = tmp_path / "r"
    async with keeping(path) as (registry, indexes):
        for number in range(300):
            indexes.of("default").add(f"page{number}", ["model"])
        await registry.save()
        await in_thread(registry, damage(path))
        with files_limited(0), pytest.raises(RegistryFailure):
            await register(registry, indexes, "other")
        await register(registry, indexes, "another")
    assert len(await known(path)) == 301


async def test_closing_writes_what_is_not_written_yet(tmp_path: Path) -> None:
    """Though nobody waits for it."""
    async with keeping(tmp_path / "r") as (_, indexes):
        indexes.of("default").add("page", ["model"])
    assert await known(tmp_path / "r") == {"page": ("model",)}


async def test_a_registry_that_hangs_does_not_hold_up_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is left behind, and ends when it can."""
    registry, indexes = Registry(tmp_path / "r", patience=0.02), Indexes()
    await registry.open(indexes, anything)
    with held_up(registry):
        indexes.of("default").add("page")
        await registry.close()
    await eventually(lambda: not threads())
    assert "not closed properly" in warnings_in(caplog)[-1]


async def test_an_opening_that_is_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    """The thread closes what it was about to open, and ends."""
    path = tmp_path / "r"
    async with keeping(path) as (registry, indexes):
        await register(registry, indexes, "page")
        opening = asyncio.create_task(Registry(path).open(Indexes(), anything))  # waits for the file, which is in use
        await eventually(lambda: len(threads()) == 2)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await eventually(lambda: len(threads()) == 1)
    assert await known(path) == {"page": ()}


async def test_a_registry_that_is_closed_takes_nothing(tmp_path: Path) -> None:
    """Rather than promise it."""
    async with keeping(tmp_path / "r") as (registry, _):
        await registry.close()
        with pytest.raises(RegistryFailure, match="it is closed"):
            await registry.announce(model("1.0.0"))


async def test_an_error_of_sqlite_while_reading_is_no_damage(tmp_path: Path) -> None:
    """What it says itself is another matter than a row that cannot be read: nothing is set aside."""
    async with keeping(tmp_path / "r"):
        pass
    spoiling("DROP TABLE entries")(tmp_path / "r")
    with pytest.raises(ConfigurationError, match="no such table"):
        await Registry(tmp_path / "r").open(Indexes(), anything)
    assert sorted(os.listdir(tmp_path)) == ["r"]
    assert not threads()


# A file of the first version


FIRST = Kind(
    setting="registry",
    application=0x70625267,
    version=1,
    schema=(
        "CREATE TABLE entries (key TEXT PRIMARY KEY, depends_on TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE dependencies (
            name TEXT PRIMARY KEY, current TEXT NOT NULL, versions TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE swaps (
            id INTEGER PRIMARY KEY, name BLOB UNIQUE, request BLOB NOT NULL, phase TEXT NOT NULL,
            changes TEXT NOT NULL, busted INTEGER NOT NULL, at REAL NOT NULL
        )""",
        """INSERT INTO entries VALUES ('page', '["model", "templates"]'), ('other', '[]')""",
        """INSERT INTO dependencies VALUES ('model', '1.0.0', '["1.0.0", "1.1.0"]')""",
        """INSERT INTO swaps VALUES (7, x'00', x'01', 'prepared', '[["model", "1.0.0", "1.1.0"]]', 3, 5.0)""",
    ),
    loss="",
)


def first_version(path: Path, kind: Kind = FIRST) -> None:
    """Make a file as a daemon made it that knew neither namespaces nor tags nor lifetimes."""
    database = Database(kind, path, lambda _: None)
    database.open()
    database.close()


async def test_a_file_of_the_first_version_is_upgraded(tmp_path: Path) -> None:
    """All that it held is there, in the default namespace and for good; and it can be written."""
    path = tmp_path / "r"
    first_version(path)
    async with keeping(path) as (registry, indexes):
        assert [namespace for namespace, _ in indexes] == ["default"]
        assert dict(indexes.of("default").items()) == {
            "page": Entry(depends_on=("model", "templates")),
            "other": Entry(),
        }
        assert registry.dependencies["model"].versions == ("1.0.0", "1.1.0")
        assert [(swap.id, swap.name, swap.busted) for swap in registry.unfinished()] == [(7, b"\0", 3)]
        indexes.of("tenant").add("page", tags=["t"], ttl=5.0)
        await registry.save()
    async with keeping(path) as (_, indexes):
        assert len(indexes) == 3
        assert indexes.of("tenant").tags("page") == ("t",)
    assert os.listdir(tmp_path) == ["r"]


async def test_an_upgrade_without_room_leaves_the_first_version(tmp_path: Path) -> None:
    """It is the operator's to mend; with room again nothing is lost."""
    path = tmp_path / "r"
    first_version(path)
    spoiling("INSERT INTO entries VALUES ('large', ?)", json.dumps(["x" * 1_000_000]))(path)
    with files_limited(0, 500_000), pytest.raises(ConfigurationError, match="make room"):
        await Registry(path).open(Indexes(), anything)
    assert not threads()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM entries").fetchone() == (3,)
    db.close()
    assert sorted(await known(path)) == ["large", "other", "page"]
    assert os.listdir(tmp_path) == ["r"]


async def test_a_row_of_the_first_version_that_cannot_be_read_is_damage(tmp_path: Path) -> None:
    """The file is set aside, as one of this version would be."""
    path = tmp_path / "r"
    first_version(path, replace(FIRST, schema=(*FIRST.schema, "INSERT INTO entries VALUES (x'00', '[]')")))
    assert await known(path) == {}
    assert sorted(os.listdir(tmp_path)) == ["r", "r.corrupt-1"]


# Dependencies


async def test_dependencies_are_known_after_a_restart(tmp_path: Path) -> None:
    """With their versions, and the current one."""
    async with keeping(tmp_path / "r") as (registry, _):
        first = await registry.announce(model("1.0.0"))
        told = await registry.announce(model("1.1.0", "2.0.0"))
        assert (first.versions, told.versions) == (("1.0.0",), ("1.0.0", "1.1.0", "2.0.0"))
        assert await registry.announce(model("1.1.0", current="1.0.0")) is told
    async with keeping(tmp_path / "r") as (registry, _):
        assert registry.dependencies == {"model": told}
        with pytest.raises(NotCurrent):
            await registry.announce(model("2.0.0", current="2.0.0"))


async def test_an_announcement_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    """And can be repeated."""
    many = [f"1.0.{number}-{'x' * 200}" for number in range(80)]
    async with keeping(tmp_path / "r") as (registry, _):
        async with full(registry):
            with pytest.raises(RegistryFailure):
                await registry.announce(model(*many))
            assert registry.dependencies == {}
        await registry.announce(model(*many))
        assert len(registry.dependencies["model"].versions) == 80


async def test_a_dependency_is_not_forgotten_while_entries_depend_on_it(tmp_path: Path) -> None:
    """In whichever namespace."""
    async with keeping(tmp_path / "r") as (registry, indexes):
        await registry.announce(model("1.0.0"))
        for namespace in ("default", "tenant"):
            indexes.of(namespace).add("page", ["model"])
        with pytest.raises(InUse, match="2 registered entries depend on it"):
            await registry.forget("model")
        for namespace in ("default", "tenant"):
            indexes.of(namespace).remove("page")
        await registry.forget("model")
        assert registry.dependencies == {}


async def test_announcements_at_once_lose_no_version(tmp_path: Path) -> None:
    """Each stands on the one before."""
    async with keeping(tmp_path / "r") as (registry, _):
        await asyncio.gather(*(registry.announce(model(f"1.0.{number}")) for number in range(50)))
        assert len(registry.dependencies["model"].versions) == 50


# Swaps


CHANGES = (Change("model", "1.0.0", "1.1.0"),)


async def done(registry: Registry, name: bytes | None) -> Swap:
    swap = await registry.prepare(name, b"request", CHANGES)
    return await registry.end(await registry.put(swap, Phase.COMMITTED, CHANGES, busted=2), Phase.DONE, busted=3)


@pytest.mark.requirement("IMP-12")
async def test_a_phase_and_its_versions_are_one_transaction(tmp_path: Path) -> None:
    """Both or neither, in memory as in the file; the new version is known from then on."""
    more = tuple(Change(f"m{number}", "1.0.0", f"1.0.1-{'x' * 200}") for number in range(60))
    async with keeping(tmp_path / "r") as (registry, _):
        for it in (*CHANGES, *more):
            await registry.announce(model("1.0.0", name=it.name))
        swap = await registry.prepare(b"name", b"request", (*CHANGES, *more))
        async with full(registry):
            with pytest.raises(RegistryFailure):
                await registry.put(swap, Phase.COMMITTED, (*CHANGES, *more))
        assert {it.current for it in registry.dependencies.values()} == {"1.0.0"}
        assert registry.unfinished() == (swap,)
    async with keeping(tmp_path / "r") as (registry, _):
        assert {it.current for it in registry.dependencies.values()} == {"1.0.0"}
        assert registry.unfinished() == (swap,)
        await registry.put(swap, Phase.COMMITTED, (*CHANGES, *more))
    async with keeping(tmp_path / "r") as (registry, _):
        assert "1.0.0" not in {it.current for it in registry.dependencies.values()}
        assert registry.dependencies["model"].versions == ("1.0.0", "1.1.0")
        assert [it.phase for it in registry.unfinished()] == [Phase.COMMITTED]


async def test_a_swap_is_found_by_its_key_for_ten_minutes(tmp_path: Path) -> None:
    """Also after a restart, and also if the clock was set back meanwhile."""
    clock = Clock()
    async with keeping(tmp_path / "r", clock=clock) as (registry, _):
        await registry.announce(model("1.0.0"))
        swap = await done(registry, b"name")
        assert (swap.busted, swap.at) == (5, clock.now)
    clock.now -= 86_400
    async with keeping(tmp_path / "r", clock=clock) as (registry, _):
        assert registry.swap_named(b"name") == replace(swap, at=clock.now)
        clock.now -= 86_400
        assert registry.swap_named(b"name") is not None
        clock.now += WINDOW - 1
        assert registry.swap_named(b"name") is not None
        assert registry.swap_named(b"other") is None
        clock.now += 1
        assert registry.swap_named(b"name") is None
        await done(registry, b"other")
        found = await in_thread(registry, lambda db: db.execute("SELECT name FROM swaps").fetchall())
    assert found == [(b"other",)]


async def test_only_so_many_swaps_are_remembered() -> None:
    """The newest of those that are over, and all that are not."""
    async with keeping() as (registry, _):
        await registry.announce(model("1.0.0"))
        prepared = await registry.prepare(None, b"", CHANGES)
        for number in range(MOST_SWAPS + 10):
            await done(registry, b"%d" % number)
        assert registry.swap_named(b"9") is None
        assert registry.swap_named(b"10") is not None
        assert registry.unfinished() == (prepared,)
        await registry.prepare(None, b"", CHANGES)
        assert len(registry._swaps) == MOST_SWAPS + 2


async def test_a_swap_that_was_rolled_back_frees_its_key(tmp_path: Path) -> None:
    """One that is not committed is not found by it either."""
    async with keeping(tmp_path / "r") as (registry, _):
        await registry.announce(model("1.0.0"))
        swap = await registry.prepare(b"name", b"request", CHANGES)
        assert registry.swap_named(b"name") is None
        assert (await registry.end(swap, Phase.ROLLED_BACK)).name is None
        await done(registry, b"name")
        found = await in_thread(registry, lambda db: db.execute("SELECT name, phase FROM swaps").fetchall())
    assert found == [(None, "rolled_back"), (b"name", "done")]


async def test_an_end_that_cannot_be_written_is_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file says less, which the next start ends alike; and the key's next swap takes its row's place."""
    async with keeping(tmp_path / "r") as (registry, _):
        await registry.announce(model("1.0.0"))
        swap = await registry.prepare(b"name", b"request", CHANGES)
        with files_limited(0):
            assert (await registry.end(swap, Phase.ROLLED_BACK)).phase is Phase.ROLLED_BACK
        assert registry.unfinished() == ()
        await done(registry, b"name")
        found = await in_thread(registry, lambda db: db.execute("SELECT name, phase FROM swaps").fetchall())
    assert found == [(b"name", "done")]
    (told,) = warnings_in(caplog)
    assert told.startswith("the end of a hot swap (rolled_back) could not be noted")


# Errands


async def test_the_failure_of_an_errand_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Its caller went away. One that is awaited is told to whoever awaits it, and one that was cancelled to nobody."""
    errands, go = Errands(), asyncio.Event()

    async def fail() -> None:
        await go.wait()
        raise LookupError("gone")

    abandoned = asyncio.create_task(errands.run(fail()))
    awaited = asyncio.create_task(errands.run(fail()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    abandoned.cancel()
    await asyncio.wait({abandoned})
    go.set()
    with pytest.raises(LookupError):
        await awaited
    assert warnings_in(caplog) == ["a request whose client went away failed: gone"]
    hanging = asyncio.create_task(errands.run(asyncio.Event().wait()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    hanging.cancel()
    await asyncio.wait({hanging})
    await errands.end(0.01)
    assert len(warnings_in(caplog)) == 1


# Over HTTP


async def test_a_registration_that_cannot_be_written_is_a_507(tmp_path: Path) -> None:
    """Or a 500, if it is no want of room that keeps it from being written; a bust goes on in either case."""
    async with running(registry=tmp_path / "r") as client:
        async with client.post(ENTRIES, json={"key": "page", "depends_on": ["model"]}) as response:
            assert response.status == 200
        with files_limited(0):
            async with client.post(ENTRIES, json={"key": "other"}) as response:
                problem = await refused(response, 500)
            assert "the registry cannot be written" in problem.detail
            assert problem.detail.endswith("; nothing was registered")
            async with client.post(BUST, json={"target": "model"}) as response:
                assert (response.status, (await response.json())["removed"]) == (200, 1)
        async with client.post(ENTRIES, json={"key": "other"}) as response:
            assert response.status == 200
    assert await known(tmp_path / "r") == {"other": ()}


async def test_a_registry_without_room_is_a_507(tmp_path: Path) -> None:
    """Nothing is promised."""
    indexes, registry = Indexes(), Registry(tmp_path / "r")
    engine = engine_over(MemoryBackend(indexes), indexes)
    app = create_app(engine, DaemonSettings(), swaps=Swaps(engine, registry))
    async with TestClient(TestServer(app)) as client:
        async with full(registry):
            async with client.post(ENTRIES, json={"key": "page", "depends_on": LARGE}) as response:
                problem = await refused(response, 507)
    assert problem.detail.endswith("disk is full; nothing was registered")
    assert await known(tmp_path / "r") == {}


async def test_a_registry_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    """The daemon does not begin to serve, and leaves nothing, of its other file either."""

    def unexpected(url: str) -> None:
        raise AssertionError(url)

    settings = DaemonSettings(port=0, registry=tmp_path, state=tmp_path / "s")
    with pytest.raises(ConfigurationError, match="is not a regular file") as caught:
        await serve(memory(), settings, ready=unexpected)
    assert caught.value.setting == "registry"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pybustcall")]


@pytest.mark.requirement("IMP-12")
async def test_a_killed_daemon_still_knows_its_entries(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Kill -9 as soon as they were answered, and a new process with the same file: dependents go with their subject."""
    options = ("--registry", str(tmp_path / "r"))
    daemon = start_daemon(*options)
    pages = [daemon.root / f"page{number}" for number in range(50)]
    for page in pages:
        page.write_text("old")

    async def tell(client: aiohttp.ClientSession, page: Path) -> None:
        async with client.post(ENTRIES, json={"key": page.name, "depends_on": ["product:7"]}) as response:
            assert response.status == 200

    async with aiohttp.ClientSession(daemon.url) as client:
        await asyncio.gather(*(tell(client, page) for page in pages))
        daemon.kill()
    async with aiohttp.ClientSession(start_daemon(*options).url) as client:
        async with client.post(BUST, json={"target": "product:7"}) as response:
            assert (await response.json())["removed"] == 50
    assert not any(page.exists() for page in pages)


async def test_a_daemon_that_ends_in_order_still_knows(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The file is whole, private, and alone."""
    kept = tmp_path / "kept"
    kept.mkdir()
    daemon = start_daemon("--registry", str(kept / "r"))
    async with aiohttp.ClientSession(daemon.url) as client:
        async with client.post(ENTRIES, json={"key": "page", "depends_on": ["model"]}) as response:
            assert response.status == 200
        assert modes_in(kept) == {0o600}
    daemon.process.terminate()
    daemon.process.wait(PATIENCE)
    assert os.listdir(kept) == ["r"]
    assert await known(kept / "r") == {"page": ("model",)}


# Any order of things

actions = st.tuples(
    st.sampled_from(["register", "register", "lend", "lend", "bust", "remove", "wait", "cancel", "fill", "make room"]),
    st.sampled_from("abc"),
    st.sampled_from([(), ("m",), ("a", "n"), ("b",), ("c",), LARGE]),
)
Action = tuple[str, str, tuple[str, ...]]


class Ticking:
    """A clock that goes on by a second whenever it is looked at, until it is stopped."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 1.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


async def play(runs: list[tuple[float, list[Action]]], path: Path) -> None:
    """Register, bust, fill the disk and cancel in any order; in the end the file says what the memory says.

    Lifetimes end in the midst of anything: they are counted in looks at the clock.
    """
    expected: dict[str, tuple[str, ...]] = {}
    gone: set[str] = set()
    for ttl, run in runs:
        clock = Ticking()
        async with keeping(path, Indexes(clock=clock), patience=PATIENCE) as (registry, indexes):
            index = indexes.of("default")
            assert {key: entry.depends_on for key, entry in [*index._entries.items(), *index.kept()]} == expected
            assert {key for key, _ in index.kept()} == gone
            asked: list[asyncio.Task[None]] = []
            for what, key, depends_on in run:
                match what:
                    case "register":
                        asked.append(asyncio.create_task(register(registry, indexes, key, *depends_on)))
                    case "lend":
                        asked.append(asyncio.create_task(register(registry, indexes, key, *depends_on, ttl=ttl)))
                    case "remove":
                        index.remove(key)
                        asked.append(asyncio.create_task(registry.try_save()))
                    case "bust":
                        bust(indexes, key)
                        asked.append(asyncio.create_task(registry.try_save()))
                    case "wait":
                        await asyncio.sleep(0)
                    case "cancel":
                        for task in asked[-2:]:
                            task.cancel()
                    case _:
                        await in_thread(registry, partial(limit, 1 if what == "fill" else 1_000_000))
            told = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(error) for error in told if error is not None} <= {RegistryFailure, asyncio.CancelledError}
            await in_thread(registry, partial(limit, 1_000_000))
            await registry._errands.end(PATIENCE)
            clock.step = 0.0
            while indexes.expire():
                pass
            await registry.save()
            gone = {key for key, _ in index.kept()}
            expected = entries_of(indexes) | {key: entry.depends_on for key, entry in index.kept()}
            rows = await in_thread(
                registry, lambda db: db.execute("SELECT key, depends_on, ttl FROM entries").fetchall()
            )
            assert {key: tuple(json.loads(names)) for key, names, _ in rows} == expected
            assert {key for key, _, lasting in rows if lasting == 0} == gone


@given(st.lists(st.tuples(st.floats(1.0, 40.0), st.lists(actions, max_size=12)), min_size=1, max_size=2))
@settings(max_examples=60, deadline=None)
def test_in_any_order_of_things_the_file_says_what_the_memory_says(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[float, list[Action]]]
) -> None:
    """Whatever failed, was taken back, was cancelled, or came to its end on the way."""
    asyncio.run(play(runs, tmp_path_factory.mktemp("r") / "r"))
