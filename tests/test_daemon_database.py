"""Private SQLite files: what is the operator's to mend, and how transactions end. The owners' tests hold the rest."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pybustcall.daemon import database as module
from pybustcall.daemon.database import Damaged, Database, Kind, error_code, transaction
from pybustcall.errors import ConfigurationError

KIND = Kind(setting="state", application=7, version=1, schema=("CREATE TABLE t (x)",), loss="nothing is lost")


@pytest.mark.parametrize("code", [sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_READONLY | 1 << 8])
def test_a_file_that_cannot_be_written_is_the_operators_to_mend(code: int) -> None:
    """Also by the extended codes."""
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = code
    mistake = module._mistake(error, Path("s"), "registry")
    assert mistake is not None
    assert mistake.setting == "registry"
    assert "attempt to write a readonly database" in str(mistake)


def test_a_transaction_that_fails_changes_nothing() -> None:
    """Whatever made it fail."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE t (x)")

    def fail() -> None:
        with transaction(db):
            db.execute("INSERT INTO t VALUES (1)")
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)
    assert not db.in_transaction
    db.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_file_that_cannot_be_made_for_want_of_room_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Anything else is the operator's to mend."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError if number == errno.ENOSPC else ConfigurationError, match=os.strerror(number)):
        module._make_private(tmp_path / "s", "state")


def opened(path: Path | None, setting: str = "state") -> None:
    """Open a database and close it again."""
    database = Database(replace(KIND, setting=setting), path, lambda _: None)
    database.open()
    database.close()


@pytest.mark.parametrize("setting", ["state", "registry"])
@pytest.mark.parametrize("text", ["s3cret\n", '{"index.html": ["a"]}', "\n" * 5000, "[1]" + "x" * 100_000, "n\u00e4"])
def test_a_text_is_refused_and_left_as_it_is(tmp_path: Path, setting: str, text: str) -> None:
    """Somebody wrote it: it is no database, damaged or not."""
    path = tmp_path / "f"
    path.write_text(text)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="is a text and no database, and is left as it is") as caught:
        opened(path, setting)
    assert caught.value.setting == setting
    assert ("--register" in str(caught.value)) == (setting == "registry" and text[0] in "{[")
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("content", [b"SQLite format 3\0" + b"x" * 5000, b"{" + bytes(5000), b"x" * 4096 + b"\0"])
def test_what_no_text_can_be_is_set_aside(tmp_path: Path, content: bytes) -> None:
    """It begins as a database does, or has a NUL."""
    path = tmp_path / "f"
    path.write_bytes(content)
    opened(path)
    assert sorted(os.listdir(tmp_path)) == ["f", "f.corrupt-1"]
    assert (tmp_path / "f.corrupt-1").read_bytes() == content
    opened(path)
    assert sorted(os.listdir(tmp_path)) == ["f", "f.corrupt-1"]


def test_a_database_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    """Every byte of it, its journal mode and who may read it."""
    path = tmp_path / "f"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE precious (x)")
    db.close()
    path.chmod(0o644)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="is a database of something else, which is left as it is"):
        opened(path)
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_of_ours_is_made_private(tmp_path: Path) -> None:
    """Though somebody let others read it."""
    opened(tmp_path / "f")
    (tmp_path / "f").chmod(0o644)
    opened(tmp_path / "f")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_memory_that_is_damaged_at_once_is_begun_anew() -> None:
    """There is no file that could be a text."""
    prepared: list[sqlite3.Connection] = []

    def prepare(db: sqlite3.Connection) -> None:
        prepared.append(db)
        if len(prepared) == 1:
            raise Damaged("as if")

    database = Database(KIND, None, prepare)
    database.open()
    database.close()
    assert len(prepared) == 2


def test_an_error_that_sqlite_did_not_make_has_no_code() -> None:
    """So that any exception may be asked."""
    assert error_code(LookupError()) == 0


def test_each_connection_is_prepared(tmp_path: Path) -> None:
    """Also that of the file which takes a damaged one's place."""
    prepared: list[sqlite3.Connection] = []
    database = Database(KIND, tmp_path / "s", prepared.append)
    database.open()
    database.do(lambda db: db.execute("INSERT INTO t VALUES (1)"))
    database.set_aside("as if")
    assert database.do(lambda db: db.execute("SELECT count(*) FROM t").fetchone()) == (0,)
    database.close()
    assert len(prepared) == 2
    assert sorted(os.listdir(tmp_path)) == ["s", "s.corrupt-1"]


# Versions


OLD = replace(KIND, schema=("CREATE TABLE t (x)", "CREATE TABLE other (y)"))
NEW = replace(
    KIND,
    version=3,
    schema=("CREATE TABLE u (x, z)",),
    upgrades={
        1: ("DROP TABLE other", "ALTER TABLE t RENAME TO u"),
        2: ("ALTER TABLE u ADD COLUMN z DEFAULT 7", "UPDATE u SET x = x + 1"),
    },
)


def old(path: Path, kind: Kind = OLD) -> Database:
    """Make a file of the first version with a row in it."""
    made = Database(kind, path, lambda _: None)
    made.use(lambda db: db.execute("INSERT INTO t VALUES (1)"))
    made.close()
    return Database(NEW, path, lambda _: None)


def rows(database: Database) -> list[tuple[int, ...]]:
    """Tell what an upgraded file holds, and its version."""

    def read(db: sqlite3.Connection) -> list[tuple[int, ...]]:
        return [*db.execute("SELECT x, z FROM u"), *db.execute("PRAGMA user_version")]

    try:
        return database.use(read)
    finally:
        database.close()


def test_an_older_version_is_upgraded_step_by_step(tmp_path: Path) -> None:
    """Before anybody reads it, and once: what it held is there, and no file is set aside."""
    database = old(tmp_path / "f")
    assert rows(database) == [(2, 7), (3,)]
    assert rows(database) == [(2, 7), (3,)]
    assert os.listdir(tmp_path) == ["f"]


def test_an_upgrade_that_fails_leaves_the_version_before_it(tmp_path: Path) -> None:
    """What was done of it is undone, and the next start begins it anew."""
    path = tmp_path / "f"
    old(path)
    broken = replace(NEW, upgrades={**NEW.upgrades, 2: (*NEW.upgrades[2], "INSERT INTO nowhere VALUES (1)")})
    database = Database(broken, path, lambda _: None)
    with pytest.raises(sqlite3.OperationalError, match="no such table: nowhere"):
        database.open()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert db.execute("SELECT * FROM u").fetchall() == [(1,)]
    db.close()
    assert rows(Database(NEW, path, lambda _: None)) == [(2, 7), (3,)]
    assert os.listdir(tmp_path) == ["f"]


KILLED_IN_AN_UPGRADE = """
import os, sqlite3, sys

db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA locking_mode = EXCLUSIVE")
db.execute("PRAGMA cache_spill = 1")
db.execute("PRAGMA cache_size = 1")  # so that what is not committed is on the disk already
db.execute("BEGIN IMMEDIATE")
db.execute("DROP TABLE other")
db.execute("ALTER TABLE t RENAME TO u")
db.executemany("INSERT INTO u VALUES (?)", (("x" * 1000,) for _ in range(1000)))
db.execute("PRAGMA user_version = 2")
os._exit(9)
"""


def test_a_process_that_is_killed_in_an_upgrade_leaves_the_version_before_it(tmp_path: Path) -> None:
    """Though some of it was written by then."""
    path = tmp_path / "f"
    database = old(path)
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_AN_UPGRADE, str(path)], check=False)
    assert killed.returncode == 9
    assert (tmp_path / "f-wal").stat().st_size > 500_000
    assert rows(database) == [(2, 7), (3,)]
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(("version", "upgrades"), [(4, NEW.upgrades), (1, {}), (1, {2: NEW.upgrades[2]})])
def test_a_version_that_cannot_be_read_is_set_aside(
    tmp_path: Path, version: int, upgrades: dict[int, tuple[str, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """A newer daemon's, and one so old that a step is missing: whole, and a new one is begun."""
    path = tmp_path / "f"
    old(path, replace(OLD, version=version))
    assert rows(Database(replace(NEW, upgrades=upgrades), path, lambda _: None)) == [(3,)]
    assert sorted(os.listdir(tmp_path)) == ["f", "f.corrupt-1"]
    assert f"it is of version {version}, not 3" in caplog.text
    with sqlite3.connect(tmp_path / "f.corrupt-1") as db:
        assert db.execute("SELECT x FROM t").fetchall() == [(1,)]
    db.close()


def test_a_damaged_file_is_not_upgraded(tmp_path: Path) -> None:
    """It is set aside as it was found."""
    path = tmp_path / "f"
    database = old(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    before = path.read_bytes()
    assert rows(database) == [(3,)]
    assert (tmp_path / "f.corrupt-1").read_bytes() == before
