"""The daemon's backend for an SQLite file: how it fails and goes on, and what it leaves to readers meanwhile.

That it does what the engine relies on is told by test_backend_conformance.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pybustcall import BustcallClient
from pybustcall import sqlite_layout as layout
from pybustcall.daemon import Engine, Indexes, Layer
from pybustcall.daemon.backends import BackendFailure, RefusedKey, Scope
from pybustcall.daemon.backends import sqlite as backends
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.daemon.bust import Bust
from pybustcall.daemon.journal import Wish
from pybustcall.errors import ConfigurationError
from pybustcall.integrations.sqlite import Found, SqliteCache
from pybustcall.models import Kind
from tests.configured_daemons import ConfiguredDaemons
from tests.conftest import PATIENCE, eventually
from tests.sqlite_harness import SqliteHarness
from tests.test_bench import run_bench
from tests.test_full_disk import SmallDisk

HERE = "default"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@asynccontextmanager
async def opened(path: Path, **settings: Any) -> AsyncIterator[SqliteBackend]:
    """Open a backend, and close it."""
    backend = SqliteBackend(path, **settings)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@asynccontextmanager
async def application(path: Path) -> AsyncIterator[SqliteHarness]:
    """Open an application that stores in the file, with a backend of its own."""
    harness = SqliteHarness(path)
    try:
        yield harness
    finally:
        await harness.backend.close()
        await harness.aclose()


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Be another process that writes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield db
        if db.in_transaction:
            db.execute("ROLLBACK")


async def bust(backend: SqliteBackend, kind: Kind, target: str, *, soft: bool = False) -> int:
    """Bust as the engine does; tell the count."""
    scope, count = Scope(HERE, kind, target), 0
    generation = await backend.begin(scope, soft=soft)
    async for keys in backend.select(scope):
        count += await backend.remove(HERE, keys, generation=generation, soft=soft)
    await backend.end(scope, generation)
    return count


# Settings and keys


@pytest.mark.parametrize(("settings", "setting"), [({"path": ""}, "path"), ({"timeout": 0.0}, "timeout")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], setting: str) -> None:
    """At once."""
    with pytest.raises(ConfigurationError) as caught:
        SqliteBackend(**({"path": "cache.db"} | settings))
    assert caught.value.setting == setting


def test_a_backend_says_which_file_it_is(path: Path) -> None:
    """Whole, as an operator needs it."""
    assert repr(SqliteBackend(path)) == f"SqliteBackend({str(path)!r})"


def test_a_key_that_no_reader_could_store_is_refused(path: Path) -> None:
    """And is not shown."""
    for key in ("", "secret\n", "\ud800", "s" * 8193, "secret/" * 129):
        with pytest.raises(RefusedKey, match=r"^(has|is) ") as caught:
            SqliteBackend(path).check(HERE, key)
        assert "secret" not in str(caught.value)
    SqliteBackend(path).check(HERE, "secret/" * 128)


# Failures


def operations(backend: SqliteBackend) -> dict[str, Callable[[], Awaitable[object]]]:
    """Tell all that may be asked of a backend."""
    scope = Scope(HERE, "all", "*")

    async def select() -> None:
        async for _ in backend.select(scope):
            pass

    return {
        "check_ready": backend.check_ready,
        "begin": partial(backend.begin, scope, soft=False),
        "fence": partial(backend.fence, HERE, ["secret/key"], generation=1, soft=False),
        "end": partial(backend.end, scope, 1),
        "remove": partial(backend.remove, HERE, ["secret/key"], generation=1, soft=False),
        "select": select,
        "estimate": partial(backend.estimate, scope),
        "variants": partial(backend.variants, HERE, ["secret/key"]),
        "held": partial(backend.held, HERE, ["secret/key"]),
        "size_bytes": backend.size_bytes,
    }


async def test_a_file_that_cannot_be_used_is_unreachable(tmp_path: Path) -> None:
    """Each operation says so and names it; opening the backend is no error."""
    async with opened(tmp_path / "missing" / "cache.db") as backend:
        for operation in operations(backend).values():
            with pytest.raises(BackendFailure, match="its directory does not exist; make it") as caught:
                await operation()
            assert caught.value.unreachable
            assert "secret" not in str(caught.value)
        (tmp_path / "missing").mkdir()
        await backend.check_ready()


async def test_a_file_of_another_program_is_left_as_it_is(path: Path) -> None:
    """The daemon is not ready then."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
    async with opened(path) as backend:
        with pytest.raises(BackendFailure, match="a database of another program, and was left as it is"):
            await backend.check_ready()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM theirs").fetchone() == (0,)


async def test_what_only_looks_goes_on_while_another_process_writes(path: Path) -> None:
    """What writes fails after the timeout, and is done again when it is asked again."""
    async with opened(path, timeout=0.05) as backend, application(path) as app:
        await app.put(HERE, "a")
        with locked(path):
            for name, operation in operations(backend).items():
                if name in {"check_ready", "begin", "fence", "end", "remove"}:
                    with pytest.raises(BackendFailure, match="kept it locked") as caught:
                        await operation()
                    assert caught.value.unreachable
                else:
                    await operation()
        assert await bust(backend, "key", "a") == 1


async def test_a_sweep_that_breaks_off_tells_how_far_it_was(path: Path) -> None:
    """And what had gone stays gone."""
    async with opened(path, timeout=0.05) as backend, application(path) as app:
        keys = [f"a/{number:04}" for number in range(3000)]
        await asyncio.gather(*(app.put(HERE, key) for key in keys))
        generation = await backend.begin(Scope(HERE, "prefix", "a"), soft=False)
        sweep = asyncio.create_task(backend.remove(HERE, keys, generation=generation, soft=False))
        while await backend.held(HERE, keys[:1]):
            pass
        with locked(path), pytest.raises(BackendFailure) as caught:
            await sweep
        removed = caught.value.removed
        assert 0 < removed < 3000
        assert (removed % 100, caught.value.failed) == (0, 3000 - removed)
        assert await backend.held(HERE, keys) == keys[removed:]
        assert await bust(backend, "prefix", "a") == 3000 - removed


async def test_a_file_that_is_damaged_is_begun_anew_and_the_bust_done(path: Path) -> None:
    """Of the old one nothing is served any more."""
    async with opened(path) as backend, application(path) as app:
        await app.put(HERE, "a")
        await app.aclose()
        await backend.check_ready()
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute("DELETE FROM sqlite_master WHERE name = 'tags'")
        assert await app.look(HERE, "a") == "missing"
        assert await bust(backend, "all", "*") == 0
        assert await app.put(HERE, "a")
        assert await bust(backend, "all", "*") == 1


async def test_a_file_that_was_put_back_is_noticed_by_the_next_bust(path: Path) -> None:
    """The daemon remembers how far each namespace was, of the last so many."""
    async with opened(path) as backend, application(path) as app:
        await app.put(HERE, "a")
        await backend.check_ready()
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        backup = Path(path).read_bytes()  # noqa: ASYNC240
        assert await bust(backend, "key", "b") == 0
        await backend.close()
        await app.aclose()
        Path(path).write_bytes(backup)  # noqa: ASYNC240 - in place, so that nothing else tells it
        assert await app.look(HERE, "a") == "fresh"
        assert await bust(backend, "key", "b") == 0
        assert await app.look(HERE, "a") == "missing"


async def test_of_many_namespaces_the_oldest_are_not_remembered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the daemon remembers is bounded."""
    monkeypatch.setattr(backends, "_MOST_NAMESPACES", 3)
    async with opened(path) as backend:
        for number in range(5):
            scope = Scope(f"n{number}", "all", "*")
            await backend.end(scope, await backend.begin(scope, soft=False))
        assert sorted(backend._known) == ["n2", "n3", "n4"]


# What goes on beside readers


async def test_another_daemon_does_not_end_a_bust(path: Path) -> None:
    """What it still has to sweep stays hidden."""
    async with opened(path) as one, opened(path) as two, application(path) as app:
        await app.put(HERE, "a/1")
        scope = Scope(HERE, "prefix", "a")
        first = await one.begin(scope, soft=False)
        second = await two.begin(scope, soft=False)
        await one.end(scope, first)
        assert await app.look(HERE, "a/1") == "missing"
        await two.end(scope, second)
        assert await app.look(HERE, "a/1") == "fresh", "as after a bust that was cancelled"


async def test_readers_store_while_a_sweep_goes_on(path: Path) -> None:
    """It leaves them half of the time."""
    async with opened(path) as backend, application(path) as app:
        await asyncio.gather(*(app.put(HERE, f"a/{number}", tags=["t"]) for number in range(3000)))
        sweep = asyncio.create_task(bust(backend, "tag", "t"))
        stored = 0
        while not sweep.done():
            assert await app.put(HERE, f"b/{stored}")
            stored += 1
        assert await sweep == 3000
        assert stored > 20
        assert await backend.held(HERE, ["b/0"]) == ["b/0"]


async def test_many_are_not_counted_in_advance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes as long as finding; a dry run counts exactly."""
    monkeypatch.setattr(backends, "_COUNTED", 1000)
    async with opened(path) as backend, application(path) as app:
        for number in range(1001):
            await app.put(HERE, f"a/{number}")
        scope = Scope(HERE, "prefix", "a")
        assert await backend.estimate(scope) is None
        assert await backend.estimate(Scope(HERE, "prefix", "a/1")) == 1
        assert await backend.estimate(Scope(HERE, "key", "a/1")) == 1
        layer = Layer(name="sqlite", number=0, backend=backend)
        wish = Wish(namespace=HERE, kind="prefix", target="a", strategy="dimensional")
        assert await Bust(Engine([layer], Indexes()), wish).count(layer) == 1001


async def test_what_is_over_is_dropped_and_room_given_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no reader stores any more, and again after a while in which the file could not be used."""
    monkeypatch.setattr(backends, "_PAUSE", 0.01)
    before = time.time() - 100.0
    async with application(path) as app:
        for number in range(200):
            work = partial(
                layout.store,
                namespace=HERE,
                key=f"a/{number}",
                value=b"x" * 10_000,
                known=None,
                tags=("t",),
                ttl=1.0,
                token=None,
                room=1 << 30,
                now=before,
            )
            await app.file.write(work)
        async with opened(path, timeout=0.01) as backend:
            with locked(path) as db:
                await asyncio.sleep(0.1)
                assert db.execute("SELECT count(*) FROM entries").fetchone() == (200,)

            async def is_small() -> bool:
                pages: int = await app.file.read(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
                return pages < 300

            async with asyncio.timeout(PATIENCE):
                while not await is_small():
                    await asyncio.sleep(0.01)
            assert await backend.estimate(Scope(HERE, "all", "*")) == 0


KILLED = """
    import asyncio, sys
    from pybustcall.daemon.backends import Scope
    from pybustcall.daemon.backends.sqlite import SqliteBackend

    async def begin():
        backend = SqliteBackend(sys.argv[1])
        scope = Scope("default", "prefix", "a")
        generation = await backend.begin(scope, soft=False)
        batches = backend.select(scope)
        await backend.remove("default", (await anext(batches))[:150], generation=generation, soft=False)
        print("removed some", flush=True)
        await asyncio.sleep(60)

    asyncio.run(begin())
"""


@pytest.mark.requirement("REL-04")
async def test_a_daemon_that_is_killed_in_the_midst_of_a_sweep_leaves_nothing_to_read(path: Path) -> None:
    """What it had begun to bust stays hidden, and the next daemon frees it."""
    async with application(path) as app, opened(path) as backend:
        await asyncio.gather(*(app.put(HERE, f"a/{number}") for number in range(400)))
        await app.put(HERE, "b")
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:  # noqa: ASYNC220
            assert daemon.stdout is not None
            assert await asyncio.to_thread(daemon.stdout.readline)
            daemon.kill()
        assert {await app.look(HERE, f"a/{number}") for number in range(400)} == {"missing"}
        assert await app.put(HERE, "a/7")
        assert (await app.look(HERE, "a/7"), await app.look(HERE, "b")) == ("fresh", "fresh")
        assert await bust(backend, "prefix", "a") in {250, 251}
        assert await app.look(HERE, "b") == "fresh"


# A daemon with such a layer


CONFIGURATION = """
[journal]
path = "journal.db"

[[layers]]
backend = "sqlite"
path = "cache.db"

[[layers]]
name = "pages"
backend = "files"
root = "pages"
settle = 0.0
"""


@pytest.fixture
def daemons(pages: Path) -> Iterator[ConfiguredDaemons]:
    made = ConfiguredDaemons(pages.parent, CONFIGURATION)
    yield made
    made.close()


@pytest.mark.requirement("REL-04")
async def test_a_daemon_busts_what_readers_of_its_machine_hold(daemons: ConfiguredDaemons, pages: Path) -> None:
    """By key, by tag, softly, and all of a large branch, though it is killed in the midst of that."""
    daemon = daemons.start()
    async with SqliteCache(pages.parent / "cache.db") as cache:
        async with BustcallClient(daemon.url, probes=None) as client:
            assert await cache.set("a", b"v", tags=["t"], ttl=None)
            (pages / "a").touch()
            result = await client.bust("a")
            assert [(layer.name, layer.ok) for layer in result.layers] == [("sqlite", True), ("pages", True)]
            assert await cache.get("a") is None
            assert not (pages / "a").exists()
            assert await cache.set("b", b"v", tags=["t"], ttl=None)
            await client.bust("t", kind="tag")
            assert await cache.get("b") is None
            for some in range(20):
                keys = [f"c/{some}/{number}" for number in range(200)]
                await asyncio.gather(*(cache.set(key, b"v", ttl=None) for key in keys))
            answered = await client.bust("c", kind="prefix", strategy="hybrid")
        daemon.kill()
        assert await cache.get("c/7/7") is None
        async with BustcallClient(daemons.start().url, probes=None) as client:
            assert answered.job is not None
            assert (await client.wait_job(answered.job, timeout=PATIENCE)).state == "done"
        assert [await cache.get(f"c/{some}/7") for some in range(20)] == [None] * 20
        with closing(sqlite3.connect(pages.parent / "cache.db")) as db:
            assert db.execute("SELECT count(*) FROM entries").fetchone() == (0,)


async def test_a_daemon_with_a_file_alone_marks_as_stale(pages: Path) -> None:
    """Which files could not."""
    layer = CONFIGURATION.partition('[[layers]]\nname = "pages"')[0]
    daemons = ConfiguredDaemons(pages.parent, layer)
    try:
        async with (
            SqliteCache(pages.parent / "cache.db") as cache,
            BustcallClient(daemons.start().url, probes=None) as client,
        ):
            assert await cache.set("a/1", b"old", ttl=None)
            assert (await client.bust("a", kind="prefix", soft=True)).ok
            assert await cache.get("a/1") == Found(b"old", stale=True)
            assert await cache.get_or_set("a/1", lambda: b"new", ttl=None) == b"new"
            assert await cache.get("a/1") == Found(b"new", stale=False)
    finally:
        daemons.close()


# A full disk


ON_A_FULL_DISK = """
    import asyncio, json, sys
    from pathlib import Path
    from pybustcall.daemon.backends import BackendFailure
    from pybustcall.daemon.backends.sqlite import SqliteBackend
    from pybustcall.sqlite_file import SqliteUnavailable
    from tests.sqlite_harness import SqliteHarness
    from tests.test_sqlite_backend import bust

    async def main():
        app = SqliteHarness(Path(sys.argv[1]))
        asks = {
            "put": lambda key: app.put("default", key, size=2000),
            "look": lambda key: app.look("default", key),
            "bust": lambda key: bust(app.backend, "key", key),
        }
        while line := sys.stdin.readline():
            name, key = json.loads(line)
            try:
                told = [await asks[name](key), None]
            except (SqliteUnavailable, BackendFailure) as error:
                told = [None, str(error)]
            print(json.dumps(told), flush=True)
        await app.backend.close()
        await app.aclose()

    asyncio.run(main())
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    try:
        small = SmallDisk(tmp_path / "disk")
    except FileNotFoundError as error:
        pytest.skip(f"a file system cannot be mounted here: {error}")
    if not small.mounted:
        pytest.skip(f"a file system cannot be mounted here: {small.close()}")
    yield small
    small.close()


def test_on_a_full_disk_what_is_held_is_read_and_no_bust_is_promised(disk: SmallDisk) -> None:
    """Nothing is damaged, and when there is room again all goes on."""
    command = disk.command([sys.executable, "-c", textwrap.dedent(ON_A_FULL_DISK), str(disk.path / "cache.db")])
    here = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=here) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(name: str, key: str) -> tuple[Any, str | None]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([name, key]).encode() + b"\n")
            process.stdin.flush()
            told, error = json.loads(process.stdout.readline())
            return told, error

        try:
            assert ask("put", "a") == (True, None)
            for _ in range(2):
                disk.fill()
                errors = (ask("put", f"b/{number}")[1] for number in range(1000))
                assert "its disk is full; make room there" in next(error for error in errors if error is not None)
                assert ask("look", "a") == ("fresh", None)
                told, error = ask("bust", "a")
                assert told is None
                assert "its disk is full" in str(error)
                assert ask("look", "a") == ("fresh", None)
                disk.make_room()
                assert ask("bust", "a") == (1, None)
                assert ask("look", "a") == ("missing", None)
                assert ask("put", "a") == (True, None)
        finally:
            process.stdin.close()
            assert process.wait(PATIENCE) == 0


async def test_closing_twice_and_without_opening_is_harmless(path: Path) -> None:
    """And so is closing what was never used."""
    backend = SqliteBackend(path)
    await backend.close()
    await backend.open()
    await backend.close()
    await backend.close()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)


def test_the_bench_of_a_cache_in_a_file_leaves_nothing_and_touches_nothing_else(tmp_path: Path) -> None:
    """Whatever it takes; times are not judged."""
    ran = run_bench("sqlite_cache", tmp_path, "--entries", "1000", "--runs", "1", "--seconds", "0.1")
    assert len(ran.rows) == 3
