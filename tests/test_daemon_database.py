"""Private SQLite files: what is the operator's to mend, and how transactions end. The owners' tests hold the rest."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest

from pybustcall.daemon import database as module
from pybustcall.daemon.database import Database, Kind, error_code, transaction
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
