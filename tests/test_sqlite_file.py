"""The file of an SQLite cache: made, shared between threads, loops and processes, refused, set aside, and kept small.

What lies in it is told by test_sqlite_layout.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pybustcall import sqlite_file
from pybustcall import sqlite_layout as layout
from pybustcall.errors import ConfigurationError
from pybustcall.sqlite_file import HEAD_BYTES, SqliteFile, SqliteUnavailable, refuse_content
from tests.conftest import PATIENCE, eventually

HERE = "default"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
async def file(path: Path) -> AsyncIterator[SqliteFile]:
    opened = SqliteFile(path, timeout=5.0)
    yield opened
    await opened.aclose()


def putting(db: sqlite3.Connection, key: str, value: bytes = b"x", *, ttl: float | None = None) -> bool:
    return layout.store(db, HERE, key, value, None, tags=(), ttl=ttl, token=None, room=1 << 30, now=time.time()).stored


def looking(db: sqlite3.Connection, key: str) -> bytes | None:
    seen = layout.look_up(db, HERE, key, None, now=time.time(), since_start=time.monotonic(), lease=10.0)
    return None if seen.entry is None else seen.entry.value


async def put(file: SqliteFile, key: str, value: bytes = b"x") -> None:
    assert await file.write(partial(putting, key=key, value=value))


async def get(file: SqliteFile, key: str) -> bytes | None:
    return await file.read(partial(looking, key=key))


def content(path: Path, end: str = "") -> bytes | None:
    """Tell what is in a file, or in one beside it; None if it is missing."""
    try:
        return Path(f"{path}{end}").read_bytes()
    except FileNotFoundError:
        return None


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def unlink(path: Path, *ends: str) -> None:
    """Remove a file, or what lies beside it."""
    for end in ends or ("",):
        Path(f"{path}{end}").unlink()


def link(path: Path, other: Path) -> None:
    path.symlink_to(other)


@contextmanager
def plain(path: Path) -> Iterator[sqlite3.Connection]:
    """Connect as any program does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


# Being made, and refused


async def test_a_missing_file_is_made_when_it_is_needed(file: SqliteFile, path: Path) -> None:
    """For this user only, and by whichever of both lanes is first."""
    assert content(path) is None
    assert await get(file, "a") is None
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    await put(file, "a")
    assert await get(file, "a") == b"x"


async def test_what_is_stored_is_there_when_it_is_opened_again(file: SqliteFile, path: Path) -> None:
    """By the same, after it was closed, and by another."""
    await put(file, "a")
    await file.aclose()
    assert await get(file, "a") == b"x"
    other = SqliteFile(path, timeout=1.0)
    assert await get(other, "a") == b"x"
    await other.aclose()
    await other.aclose()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [({"path": ""}, "path"), ({"path": "a\0b"}, "path"), ({"timeout": 0}, "timeout"), ({"timeout": 61}, "timeout")],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], setting: str) -> None:
    """Before anything is opened."""
    given: dict[str, Any] = {"path": "x", "timeout": 1.0}
    with pytest.raises(ConfigurationError) as caught:
        SqliteFile(**(given | settings))
    assert caught.value.setting == setting


async def refused(file: SqliteFile) -> str:
    for ask in (file.read, file.write):
        with pytest.raises(SqliteUnavailable) as caught:
            await ask(partial(looking, key="a"))
        assert caught.value.applied == "no"
        assert str(caught.value).endswith("; nothing was done")
    return str(caught.value)


async def test_a_directory_is_not_made(tmp_path: Path) -> None:
    """It may be one that is not mounted."""
    file = SqliteFile(tmp_path / "missing" / "cache.db", timeout=0.1)
    assert "its directory does not exist; make it" in await refused(file)
    await file.aclose()


async def test_a_database_of_another_program_is_left_as_it_is(file: SqliteFile, path: Path) -> None:
    """And so is one of a later version of ours."""
    with plain(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = content(path)
    assert "a database of another program" in await refused(file)
    assert content(path) == before
    unlink(path)
    await put(file, "a")
    await file.aclose()
    with plain(path) as db:
        db.execute("PRAGMA user_version = 99")
    assert "made by a later pybustcall (format 99, known is 1)" in await refused(file)
    with plain(path) as db:
        db.execute("PRAGMA user_version = 1")
    assert await get(file, "a") == b"x"


@pytest.mark.parametrize(
    "others",
    [b"notes, which somebody wrote", b"\x89PNG\r\n\x1a\n" + bytes(5000), b"SQLite format 3\0" + b"\xff" * 5000],
)
async def test_a_file_that_is_no_cache_is_left_as_it_is(file: SqliteFile, path: Path, others: bytes) -> None:
    """A text, a picture, the damaged database of another program: none is renamed."""
    write(path, others)
    assert f"{refuse_content(others)}, and was left as it is" in await refused(file)
    assert content(path) == others
    assert content(path, ".corrupt") is None


@pytest.mark.parametrize(
    ("others", "why"),
    [
        (b"", None),
        (bytes(8192), None),
        (b"notes, which somebody wrote", "is not a cache"),
        (b"SQLite format 3\0", "is a database of another program"),
    ],
)
def test_a_file_is_judged_by_what_it_begins_with(others: bytes, why: str | None) -> None:
    """Without being opened: what is empty may be taken."""
    assert refuse_content(others) == why


async def test_a_file_of_ours_is_known_by_what_it_begins_with(file: SqliteFile, path: Path) -> None:
    """From its first moment, and whether it is of a later version."""
    await put(file, "a")
    head = (content(path) or b"")[:HEAD_BYTES]
    assert refuse_content(head) is None
    later = head[:60] + (99).to_bytes(4) + head[64:]
    assert refuse_content(later) == "was made by a later pybustcall (format 99, known is 1)"


async def test_what_is_no_file_is_refused(file: SqliteFile, path: Path, tmp_path: Path) -> None:
    """Links, too, which could lead to a file of somebody else."""
    os.mkdir(path)
    assert "is a directory or a special file" in await refused(file)
    os.rmdir(path)
    link(path, tmp_path / "other.db")
    assert "is a symbolic link" in await refused(file)
    assert content(tmp_path / "other.db") is None
    unlink(path, "", ".lock")
    link(Path(f"{path}.lock"), tmp_path / "other")
    assert "its lock file is a link" in await refused(file)


async def test_a_file_system_without_shared_memory_is_refused(
    file: SqliteFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes would not see each other's busts."""

    class Unshared(sqlite3.Connection):
        def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
            return super().execute(statement.replace("journal_mode = WAL", "journal_mode = DELETE"), *given)

    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Unshared))
    assert "cannot share memory between processes" in await refused(file)


# Being damaged, removed, replaced


def damage(path: Path) -> None:
    """Write over all but the first page, as a failing disk does."""
    with plain(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (path.stat().st_size - 4096))


async def test_a_damaged_file_is_set_aside_and_a_new_one_begun(
    file: SqliteFile, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It can be looked at; fills of before are refused; who has it open goes over to the new one."""
    other = SqliteFile(path, timeout=5.0)
    await put(file, "a", b"old")
    assert await get(other, "a") == b"old"
    late = (
        await file.read(
            partial(layout.look_up, namespace=HERE, key="b", known=None, now=0.0, since_start=0.0, lease=1.0)
        )
    ).token
    damage(path)
    damaged = content(path)
    await file.aclose()
    with caplog.at_level(logging.WARNING, "pybustcall.sqlite"):
        assert await get(file, "a") is None
    assert "set aside as" in caplog.text
    assert content(path, ".corrupt") == damaged
    await put(file, "a", b"new")
    assert await get(other, "a") == b"new"
    stored = await other.write(
        partial(
            layout.store,
            namespace=HERE,
            key="b",
            value=b"late",
            known=None,
            tags=(),
            ttl=None,
            token=late,
            room=1 << 30,
            now=0.0,
        )
    )
    assert not stored.stored
    await other.aclose()
    assert await get(file, "a") == b"new"


async def test_a_damage_is_met_in_the_midst_of_the_work(file: SqliteFile, path: Path) -> None:
    """By either lane; what was asked for is done in the new file."""
    for ask in (partial(get, file, "a"), partial(put, file, "a")):
        for number in range(50):
            await put(file, f"{number}", b"x" * 5000)
        await file.aclose()
        await file.read(lambda db: db.execute("PRAGMA cache_size = 0"))
        await file.write(lambda _: None)
        damage(path)
        await ask()
        assert await get(file, "1") is None
        unlink(path, ".corrupt")


async def test_an_empty_file_is_begun_in(file: SqliteFile, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody made it for the cache; nothing is lost with it, so that nothing is kept or told."""
    for ask in (partial(get, file, "a"), partial(put, file, "a")):
        write(path, b"")
        await ask()
        assert content(path, ".corrupt") is None
        await file.aclose()
    assert await get(file, "a") == b"x"
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
    assert caplog.text == ""


@pytest.mark.parametrize("rest", [{"": bytes(8192)}, {"": b"", "-wal": b"log"}])
async def test_what_a_crash_left_of_a_file_is_replaced(file: SqliteFile, path: Path, rest: dict[str, bytes]) -> None:
    """Zeros, or nothing but the log beside it: it can be looked at."""
    for end, its in rest.items():
        write(Path(f"{path}{end}"), its)
    await put(file, "a")
    assert await get(file, "a") == b"x"
    assert content(path, ".corrupt") == rest[""]


@pytest.mark.parametrize("statement", ["PRAGMA user_version = 0", "DROP TABLE tags", "DELETE FROM meta"])
async def test_a_file_that_lacks_something_is_replaced(file: SqliteFile, path: Path, statement: str) -> None:
    """Or is of an earlier format: a cache can be made anew."""
    await put(file, "a")
    await file.aclose()
    with plain(path) as db:
        db.execute(statement)
    assert await get(file, "a") is None
    await put(file, "a")


async def test_a_new_file_that_is_damaged_at_once_is_told_of(
    file: SqliteFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is at fault; nobody goes round and round."""
    await put(file, "a")

    def fails(db: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("damaged")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    with pytest.raises(SqliteUnavailable, match="it is damaged, and so is the new one"):
        await file.write(fails)


def test_only_the_first_who_finds_a_damage_sets_the_file_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And only the first who finds none makes one: others take the new one for what it is."""
    first, second = sqlite_file._CacheFile(str(path), writes=True), sqlite_file._CacheFile(str(path), writes=True)
    with first.use() as one, second.use() as two:
        assert one.execute("SELECT epoch FROM meta").fetchone() == two.execute("SELECT epoch FROM meta").fetchone()
    damaged = content(path)
    for opener in (first, second):
        opener.set_aside("as it seems")
        with opener.use() as db:
            (epoch,) = db.execute("SELECT epoch FROM meta").fetchone()
    second.make()
    with first.use() as db:
        assert db.execute("SELECT epoch FROM meta").fetchone() == (epoch,)
    assert content(path, ".corrupt") == damaged
    assert len(caplog.records) == 1
    for opener in (first, second):
        opener.close()
        opener.close()


async def test_a_damaged_file_that_cannot_be_renamed_is_told_of(
    file: SqliteFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory became read-only, perhaps."""
    await put(file, "a")
    await file.aclose()
    with plain(path) as db:
        db.execute("DROP TABLE tags")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "replace", refuse)
    assert "let this user read and write the file and its directory" in await refused(file)


async def test_a_file_that_looks_damaged_whatever_is_done_is_told_of(
    file: SqliteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes round and round."""
    monkeypatch.setattr(sqlite_file, "TABLES", frozenset({"missing"}))
    with pytest.raises(SqliteUnavailable, match="it is damaged, and so is the new one"):
        await file.write(lambda _: None)


async def test_a_transaction_that_has_ended_already_is_not_undone_once_more(file: SqliteFile) -> None:
    """As a full disk ends one; what went wrong is told."""

    def ends(db: sqlite3.Connection) -> None:
        putting(db, "a")
        db.execute("ROLLBACK")
        db.execute("SELECT nothing")

    with pytest.raises(SqliteUnavailable, match="SQLite failed"):
        await file.write(ends)
    assert await get(file, "a") is None


async def test_an_error_that_nobody_thought_of_is_told_to_those_who_wait(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread goes on."""
    file = SqliteFile(path, timeout=5.0)
    await put(file, "a")
    with plain(path) as db, monkeypatch.context() as patches:
        patches.setattr("random.uniform", None)
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(TypeError):
            await put(file, "b")
        db.execute("ROLLBACK")
    await put(file, "b")
    await file.aclose()


@pytest.mark.parametrize(
    ("code", "text", "applied"),
    [
        (sqlite3.SQLITE_FULL, "its disk is full; make room there (OperationalError); nothing was done", "no"),
        (sqlite3.SQLITE_READONLY, "it is read-only", "no"),
        (sqlite3.SQLITE_IOERR, "its disk failed, is full or over a limit; look at the disk", "maybe"),
        (sqlite3.SQLITE_MISMATCH, "SQLite failed (OperationalError)", "no"),
    ],
)
async def test_what_went_wrong_is_said_with_what_to_do(file: SqliteFile, code: int, text: str, applied: str) -> None:
    """And whether anything was done."""

    def fails(_: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("secret-key")
        error.sqlite_errorcode = code
        raise error

    with pytest.raises(SqliteUnavailable) as caught:
        await file.write(fails)
    assert text in str(caught.value)
    assert "secret-key" not in str(caught.value)
    assert caught.value.applied == applied

    def fails_too(_: sqlite3.Connection) -> None:
        raise OSError(errno.EDQUOT, "Quota exceeded")

    with pytest.raises(SqliteUnavailable, match="the system says: Quota exceeded"):
        await file.write(fails_too)


async def test_a_removed_file_is_begun_anew(file: SqliteFile, path: Path) -> None:
    """Also if its log was left behind, by everybody who has it open, and also if the lock file is gone."""
    other = SqliteFile(path, timeout=5.0)
    for names in ([""], ["", ".lock"], ["", "-wal", "-shm"]):
        await put(file, "a", b"old")
        assert await get(other, "a") == b"old"
        unlink(path, *names)
        assert await get(other, "a") is None
        await put(other, "b", b"new")
        assert await get(file, "a") is None
        assert await get(file, "b") == b"new"
    await other.aclose()


async def test_a_copy_that_was_put_back_begins_anew(file: SqliteFile, path: Path, tmp_path: Path) -> None:
    """What was busted since would be there again."""
    await put(file, "a", b"old")
    await file.aclose()
    shutil.copy(path, tmp_path / "backup.db")
    await put(file, "a", b"new")
    (tmp_path / "backup.db").rename(path)
    assert await get(file, "a") is None
    await put(file, "a", b"newer")
    await file.aclose()
    assert await get(file, "a") == b"newer"


# Being busy


async def test_who_writes_waits_for_another_process_and_who_reads_does_not(file: SqliteFile, path: Path) -> None:
    """Many at once wait together, and the loop goes on meanwhile."""
    await put(file, "a")
    with plain(path) as db:
        db.execute("BEGIN IMMEDIATE")
        writing = asyncio.gather(*(put(file, f"b/{number}") for number in range(300)))
        for _ in range(20):
            assert await get(file, "a") == b"x"
            assert not writing.done()
        db.execute("COMMIT")
        await writing
    assert await get(file, "b/299") == b"x"


async def test_waiting_for_another_process_has_an_end(path: Path) -> None:
    """Then it is told that, and how long it took; nothing is written later."""
    file = SqliteFile(path, timeout=0.05)
    await put(file, "a")
    with plain(path) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(SqliteUnavailable, match=r"another process kept it locked for 0\.05 s") as caught:
            await put(file, "a", b"new")
        assert caught.value.applied == "no"
        db.execute("ROLLBACK")
    assert await get(file, "a") == b"x"
    await file.aclose()


async def test_the_lock_of_a_process_that_makes_the_file_is_waited_for(path: Path) -> None:
    """It has an end, too."""
    file = SqliteFile(path, timeout=0.05)
    with Path(f"{path}.lock").open("w") as lock:  # noqa: ASYNC230 - as another process does
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SqliteUnavailable, match="kept it locked"):
            await get(file, "a")
    assert await get(file, "a") is None
    await file.aclose()


async def test_what_is_cancelled_before_it_began_is_not_done(file: SqliteFile, path: Path) -> None:
    """What waits behind it is."""
    await put(file, "a")
    with plain(path) as db:
        db.execute("BEGIN IMMEDIATE")
        first = asyncio.ensure_future(put(file, "first"))
        await asyncio.sleep(0.02)
        second, third = asyncio.ensure_future(put(file, "second")), asyncio.ensure_future(put(file, "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        first.cancel()
        await asyncio.wait([first])
        db.execute("COMMIT")
    await third
    assert await get(file, "second") is None
    assert await get(file, "third") == b"x"


# Transactions


async def test_what_fails_undoes_itself_only(file: SqliteFile) -> None:
    """Of several that share a transaction."""

    def fails(db: sqlite3.Connection) -> None:
        putting(db, "lost")
        raise LookupError("on purpose")

    def fails_reading(_: sqlite3.Connection) -> None:
        raise LookupError("on purpose")

    def interrupts(db: sqlite3.Connection) -> None:
        putting(db, "lost")
        db.execute("SELECT nothing")

    told = await asyncio.gather(
        put(file, "a"),
        file.write(fails),
        put(file, "b"),
        file.write(interrupts),
        put(file, "c"),
        return_exceptions=True,
    )
    assert [type(it).__name__ for it in told] == [
        "NoneType",
        "LookupError",
        "NoneType",
        "SqliteUnavailable",
        "NoneType",
    ]
    assert [await get(file, key) for key in ("a", "b", "c", "lost")] == [b"x", b"x", b"x", None]
    with pytest.raises(LookupError):
        await file.read(fails_reading)


async def test_only_what_is_safe_waits_for_the_disk(file: SqliteFile) -> None:
    """Whoever shares its transaction waits, too."""
    assert await file.write(lambda db: db.execute("PRAGMA synchronous").fetchone()) == (1,)
    assert await file.write(lambda db: db.execute("PRAGMA synchronous").fetchone(), safe=True) == (2,)
    assert await file.write(lambda db: db.execute("PRAGMA synchronous").fetchone()) == (1,)


async def test_what_takes_long_has_a_transaction_of_its_own(file: SqliteFile) -> None:
    """So that nobody else waits for it; what is short shares one."""
    statements: list[str] = []
    begun, queued = threading.Event(), threading.Event()

    def begin(db: sqlite3.Connection) -> None:
        db.set_trace_callback(statements.append)
        begun.set()
        queued.wait(PATIENCE)

    first = asyncio.ensure_future(file.write(begin))
    await eventually(begun.is_set)
    costs = (1, 1, 1, 128, 1, 127, 2, 500, 500)
    others = [asyncio.ensure_future(file.write(lambda _: None, cost=cost)) for cost in costs]
    await asyncio.sleep(0)
    queued.set()
    await asyncio.gather(first, *others)
    assert [it for it in statements if "job" not in it and "PRAGMA" not in it] == [
        "COMMIT",
        *["BEGIN IMMEDIATE", "COMMIT"] * 6,
    ]


async def test_the_log_is_kept_small(file: SqliteFile, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if SQLite itself would let it grow."""
    monkeypatch.setattr(sqlite_file, "_LOG_LIMIT", 100_000)
    await file.write(lambda _: None)
    await file.write(lambda db: db.execute("SELECT 1"))
    for number in range(100):
        await put(file, f"{number}", b"x" * 10_000)
        assert os.lstat(f"{path}-wal").st_size < 200_000


# Threads, loops and forks


def test_one_file_serves_several_loops(path: Path) -> None:
    """One after another, and at the same time in two threads."""
    file = SqliteFile(path, timeout=5.0)

    async def use(name: str) -> None:
        for number in range(50):
            await put(file, f"{name}/{number}")
            assert await get(file, f"{name}/{number}") == b"x"

    asyncio.run(use("a"))
    threads = [threading.Thread(target=lambda name=name: asyncio.run(use(name))) for name in "bc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    async def check() -> None:
        assert await get(file, "b/49") == await get(file, "c/49") == b"x"
        await file.aclose()

    asyncio.run(check())


def test_a_loop_that_was_closed_is_told_nothing(path: Path) -> None:
    """What it had asked for may be done all the same, and the file serves others."""
    file = SqliteFile(path, timeout=5.0)
    gate, begun = threading.Event(), threading.Event()

    def work(_: sqlite3.Connection) -> None:
        begun.set()
        gate.wait(PATIENCE)

    async def leave() -> None:
        asking = asyncio.ensure_future(file.write(work))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        asking.cancel()

    asyncio.run(leave())
    gate.set()

    async def check() -> None:
        await put(file, "a")
        assert await get(file, "a") == b"x"
        await file.aclose()

    asyncio.run(check())


async def test_closing_finishes_what_was_asked_for(file: SqliteFile, path: Path) -> None:
    """Cancelled, it is closed all the same, and whoever asks meanwhile opens it anew."""
    await put(file, "a")
    with plain(path) as db:
        db.execute("BEGIN IMMEDIATE")
        writing = asyncio.ensure_future(put(file, "b"))
        await asyncio.sleep(0.01)
        closing_it = asyncio.ensure_future(file.aclose())
        await asyncio.sleep(0.01)
        closing_it.cancel()
        await asyncio.wait([closing_it])
        assert closing_it.cancelled()
        later = asyncio.ensure_future(put(file, "c"))
        db.execute("COMMIT")
    await asyncio.gather(writing, later)
    assert await get(file, "b") == await get(file, "c") == b"x"
    await file.aclose()
    await eventually(lambda: not any(str(path) in it for it in open_descriptors()))


def open_descriptors() -> list[str]:
    """Tell what is open in this process."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


async def test_a_file_that_is_dropped_open_warns_and_is_closed(path: Path) -> None:
    """Its threads end."""
    file = SqliteFile(path, timeout=5.0)
    await put(file, "a")
    held = [file]
    del file
    with pytest.warns(ResourceWarning, match="was dropped open; use aclose"):
        held.clear()
    await eventually(lambda: not any(it.name.startswith("pybustcall-sqlite") for it in threading.enumerate()))


FORKING = """
    import asyncio, os, sys
    from functools import partial
    from pybustcall import sqlite_layout as layout
    from pybustcall.sqlite_file import SqliteFile
    from tests.test_sqlite_file import get, put

    file = SqliteFile(sys.argv[1], timeout=5.0)
    unused = SqliteFile(sys.argv[1], timeout=5.0)

    async def use(name):
        await put(file, name)
        assert await get(file, name) == await get(unused, "before") == b"x"

    async def use_and_close(name):
        await use(name)
        await file.aclose()
        await unused.aclose()

    async def begin():
        await put(file, "before")

    asyncio.run(begin())
    child = os.fork()
    if not child:
        asyncio.run(use_and_close("child"))
        sys.exit()
    asyncio.run(use("parent"))
    assert os.waitpid(child, 0)[1] == 0
    asyncio.run(use_and_close("after"))
"""


def test_a_file_that_is_open_may_be_forked(path: Path) -> None:
    """Parent and child go on with connections and threads of their own."""
    script = textwrap.dedent(FORKING)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, str(path)]
    done = subprocess.run(
        command, check=False, capture_output=True, timeout=PATIENCE, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stderr) == (0, "")
    with plain(path) as db:
        assert {key for (key,) in db.execute("SELECT key FROM entries")} == {"before", "child", "parent", "after"}


# Other processes


WRITING = """
    import asyncio, sys
    from pybustcall.sqlite_file import SqliteFile
    from tests.test_sqlite_file import put

    async def write():
        file = SqliteFile(sys.argv[1], timeout=5.0)
        number = 0
        while True:
            await asyncio.gather(*(put(file, f"{sys.argv[2]}/{number % 300}/{it}", b"v" * 3000) for it in range(20)))
            number += 1
            print(number, flush=True)

    asyncio.run(write())
"""


@contextmanager
def writer(path: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that stores without an end."""
    command = [sys.executable, "-c", textwrap.dedent(WRITING), str(path), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline(), "it stored once"
            yield process
        finally:
            process.kill()


async def test_a_process_that_is_killed_in_the_midst_of_writing_does_no_harm(file: SqliteFile, path: Path) -> None:
    """Others go on at once, the file is sound, and all belongs together."""
    for number in range(4):
        with writer(path, f"w{number}") as process:
            for _ in range(5 + 3 * number):
                await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
            process.send_signal(signal.SIGKILL)
            await put(file, f"after/{number}")
            process.wait(PATIENCE)
        assert await get(file, f"after/{number}") == b"x"
        assert await file.read(lambda db: db.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]
        query = "SELECT (SELECT count(*) FROM entries) - (SELECT count(*) FROM contents)"
        assert await file.read(lambda db: db.execute(query).fetchone()) == (0,)  # noqa: B023
    assert content(path, ".corrupt") is None


async def test_a_process_that_is_stopped_in_the_midst_of_writing_holds_up_writers_only(path: Path) -> None:
    """For as long as they wait; when it goes on, so do they."""
    file = SqliteFile(path, timeout=0.1)
    with writer(path, "w") as process:
        stopped = False
        while not stopped:  # until it was caught with the lock
            process.send_signal(signal.SIGSTOP)
            try:
                await put(file, "a")
            except SqliteUnavailable:
                stopped = True
            else:
                process.send_signal(signal.SIGCONT)
                await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
        assert await get(file, "w/0/0") == b"v" * 3000
        process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(process.stdout.readline)  # type: ignore[union-attr]
        process.kill()
    await put(file, "a", b"after")
    assert await get(file, "a") == b"after"
    await file.aclose()


async def test_two_processes_that_write_without_end_let_each_other_in(file: SqliteFile, path: Path) -> None:
    """Nobody waits for so long that it fails."""
    with writer(path, "one"), writer(path, "two"):
        for number in range(50):
            await put(file, f"here/{number}")
    for name in ("one", "two", "here"):
        keys = (
            await file.read(
                lambda db: layout.page(db, HERE, layout.ranges_of_prefix(name), limit=100, now=time.time())  # noqa: B023
            )
        ).keys
        assert len(keys) >= 20
