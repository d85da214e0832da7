"""What is found out about a configuration without serving, and that nothing is changed by it."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pybustcall.daemon import idempotency, journal, registry
from pybustcall.daemon.backends import BackendFailure
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.daemon.checking import Checked, check, look_at_cache, look_at_database, look_at_socket
from pybustcall.daemon.configuration import Configuration, load, read
from pybustcall.daemon.database import Database, Kind, transaction
from pybustcall.errors import ConfigurationError
from tests.engines import RedisProcess
from tests.memcached_process import shared_memcached
from tests.redis_harness import shared_redis

KINDS = {"state": idempotency._KIND, "registry": registry._KIND, "journal": journal._KIND}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a directory of its own."""
    monkeypatch.chdir(tmp_path)


def written(text: str) -> Configuration:
    """Load a file that says this."""
    Path("bustcall.toml").write_text(text, encoding="utf-8")
    return load("bustcall.toml")


def drafted(text: str) -> Configuration:
    """Read what can be read of a file that says this."""
    Path("bustcall.toml").write_text(text, encoding="utf-8")
    return read("bustcall.toml")


def run_check(configuration: Configuration, environ: dict[str, str], **more: Any) -> Checked:
    """Check as the command line does."""
    return asyncio.run(check(configuration, environ, **more))


def make(kind: Kind, path: Path) -> None:
    """Make a database as the daemon does."""
    database = Database(kind, path, lambda _db: None)
    database.open()
    database.close()


def seen() -> dict[str, tuple[int, int, int]]:
    """Tell what there is in the directory: sizes, modes and times."""
    return {
        str(path): (status.st_size, status.st_mode, status.st_mtime_ns)
        for path in Path().rglob("*")
        for status in [path.lstat()]
    }


def test_what_is_in_order_has_no_findings_and_is_not_changed() -> None:
    """All files are looked at, those that there are and those that are still to be made; Redis answers."""
    Path("pages").mkdir()
    Path("token").write_text("s3cret")
    Path("entries.json").write_text('{"index.html": ["product.html"]}')
    make(KINDS["state"], Path("state.db"))
    make(KINDS["journal"], Path("journal.db"))
    configuration = written(
        "[access]\ntoken_file = 'token'\n[listen]\nsocket = 'b.sock'\n[journal]\npath = 'journal.db'\n"
        "[files]\nstate = 'state.db'\nregistry = 'registry.db'\nregister = 'entries.json'\n"
        f"[[layers]]\nbackend = 'files'\nroot = 'pages'\nnumber = 2\n"
        f"[[layers]]\nbackend = 'redis'\nurl = '{shared_redis().url}'\n"
    )
    before = seen()
    checked = run_check(configuration, {})
    assert checked.findings == ()
    assert [layer.name for layer in checked.layers] == ["redis", "files"]
    assert seen() == before


def test_no_file_is_in_order() -> None:
    """As are the defaults."""
    checked = run_check(Configuration(), {})
    assert (checked.findings, [layer.name for layer in checked.layers]) == ((), ["memory"])


def test_everything_that_is_wrong_is_told() -> None:
    """At its key, whatever room it is of."""
    Path("state.db").write_text("no database")
    make(KINDS["journal"], Path("registry.db"))
    configuration = written(
        "[access]\ntoken_file = 'token'\n[listen]\nhost = '0.0.0.0'\n[limits]\nmax_entries = 1\n"
        "[files]\nstate = 'state.db'\nregistry = 'registry.db'\nregister = 'entries.json'\n"
        "[journal]\npath = 'missing/journal.db'\n"
        "[[layers]]\nbackend = 'files'\nroot = 'pages'\n"
        "[[layers]]\nbackend = 'redis'\nurl = 'redis://127.0.0.1:1/0'\n"
    )
    checked = run_check(configuration, {}, max_entries=-1)
    told = [(finding.key, finding.text) for finding in checked.findings]
    assert [key for key, _ in told] == [
        "access.token_file", "", "files.state", "files.registry", "journal.path", "layers.0.root", "files.register",
        "layers.1",
    ]  # fmt: skip
    assert told[2][1].endswith("state.db' is a text and no database, and is left as it is; choose another path")
    assert told[3][1].endswith("registry.db' is a database of the journal; choose another path")
    assert told[4][1].endswith("journal.db' is in a directory that does not exist; make it first")
    assert told[7][1].startswith("the layer redis cannot be used now: ")
    assert [layer.name for layer in checked.layers] == ["redis"]


def test_what_is_wrong_in_the_file_hides_nothing_that_is_wrong_around_it() -> None:
    """Each at its key, a layer by its place in the file, though the one before it cannot be read."""
    Path("state.db").write_text("no database")
    checked = run_check(
        drafted(
            "[limits]\ndrain = -1\n[files]\nstate = 'state.db'\nregister = 'entries.json'\n[fish]\n"
            "[[layers]]\nbackend = 'tape'\n"
            "[[layers]]\nbackend = 'redis'\nurl = 'redis://127.0.0.1:1/0'\nsettle = 'soon'\n"
            "[[layers]]\nbackend = 'files'\nroot = 'missing'\nname = 'pages'\n"
            "[[layers]]\nbackend = 'memory'\nname = 'pages'\n"
        ),
        {},
    )
    assert [finding.key for finding in checked.findings] == [
        "limits.drain", "layers.0.backend", "layers.1.settle", "fish", "layers.3.name",
        "files.state", "layers.2.root", "files.register", "layers.1",
    ]  # fmt: skip
    assert [(layer.name, layer.number) for layer in checked.layers] == [("redis", 1), ("pages", 3)]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("[listen]\nhost = '0.0.0.0'\n[access]\ntoken_file = 7\n", ["access.token_file"]),
        ("[listen]\nhost = '0.0.0.0'\n[access]\ntokn_file = 'token'\n", ["access.tokn_file"]),
        ("[listen]\nhost = '0.0.0.0'\n[acess]\ntoken_file = 'token'\n", ["acess"]),
        ("access = 'token'\n[listen]\nhost = '0.0.0.0'\n", ["access"]),
        ("[listen]\nhost = '0.0.0.0'\nport = 'x'\n", ["listen.port", "access.token_file"]),  # which does not follow
        ("[[layers]]\nbackend = 'redis'\nurl_env = '-'\n", ["layers.0.url_env"]),
        ("[[layers]]\nbackend = 'files'\nroot = 7\n[files]\nregister = 'entries.json'\n", ["layers.0.root"]),
        ("layers = 7\n[files]\nregister = 'entries.json'\n", ["layers"]),
        ("[[layers]]\nbackend = 'memory'\nname = '?'\n[[layers]]\nbackend = 'memory'\n", ["layers.0.name"]),
        ("[namespaces]\nallowed = ['-', '?']\n", ["namespaces.allowed.0", "namespaces.allowed.1"]),
    ],
)
def test_what_only_follows_from_what_is_wrong_in_the_file_is_not_told(text: str, keys: list[str]) -> None:
    """A token that was meant is not missed, nor a URL; nor are entries judged by other layers than those that are."""
    Path("entries.json").write_text('{"/of/another/layer": []}')
    assert [finding.key for finding in run_check(drafted(text), {}).findings] == keys


def test_what_is_beside_the_journal_is_not_told_a_second_time() -> None:
    """The directory is missing for both, and only one of them is named in the file."""
    assert [it.key for it in run_check(written("[journal]\npath = 'missing/journal.db'\n"), {}).findings] == [
        "journal.path"
    ]
    make(KINDS["state"], Path("journal.db.registry"))
    assert [it.key for it in run_check(written("[journal]\npath = 'journal.db'\n"), {}).findings] == ["files.registry"]


def test_a_redis_that_may_evict_what_it_needs_is_warned_of_as_a_daemon_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the same words, and at its own layer; it is no reason not to serve."""
    with RedisProcess(tmp_path, maxmemory="64mb", **{"maxmemory-policy": "allkeys-lru"}) as server:
        configuration = written(
            f"[[layers]]\nbackend = 'redis'\nname = 'well'\nurl = '{shared_redis().url}'\n"
            f"[[layers]]\nbackend = 'redis'\nurl = '{server.url}'\n"
        )
        checked = run_check(configuration, {})
        caplog.clear()

        async def start() -> None:
            (layer,) = (it for it in checked.layers if it.name == "redis")
            backend = type(layer.backend)(server.url)  # type: ignore[call-arg]
            await backend.check_ready()
            await backend.close()

        asyncio.run(start())
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "has the maxmemory-policy allkeys-lru" in said
    assert [(it.key, it.text) for it in checked.warnings] == [("layers.1", f"the layer redis: {said}")]
    assert checked.findings == ()
    assert logging.getLogger("pybustcall.daemon").handlers == []


def test_files_without_namespaces_are_warned_of_where_namespaces_are_named() -> None:
    """Since no bust in them is done anywhere."""
    Path("pages").mkdir()
    allowed = "[namespaces]\nallowed = {}\n[[layers]]\nbackend = 'memory'\n[[layers]]\nbackend = 'files'\nroot = {!r}\n"
    (warning,) = run_check(written(allowed.format(["default", "shop", *"abcdef"], "pages")), {}).warnings
    assert str(warning) == (
        "bustcall.toml: layers.1.root: the layer files knows the namespace default only: busts in others (shop, a, b,"
        " c, d, ...) are refused, at all layers; put {namespace} into its root"
    )
    assert run_check(written(allowed.format(["default", "shop"], "pages/{namespace}")), {}).warnings == ()
    assert run_check(written(allowed.format(["default"], "pages")), {}).warnings == ()
    assert run_check(written(allowed.format([], "pages")), {}).warnings == ()


def test_what_a_daemon_cannot_do_is_told_with_the_layers_that_lack_it() -> None:
    """It is not advertised, since a bust is done at all layers or at none."""
    Path("pages").mkdir()
    text = "[[layers]]\nbackend = 'memory'\n[[layers]]\nbackend = 'files'\nroot = '{}'\n"
    assert run_check(written(text.format("pages")), {}).lacking == {
        "cache.bust.namespace": ("files",), "cache.bust.soft": ("files",)
    }  # fmt: skip
    assert run_check(written(text.format("pages/{namespace}")), {}).lacking == {"cache.bust.soft": ("files",)}
    memcached = f"[[layers]]\nbackend = 'memcached'\nurl = '{shared_memcached().url}'\n"
    assert run_check(written(memcached), {}).lacking == {"cache.bust.dry_run": ("memcached",)}
    assert run_check(Configuration(), {}).lacking == {}


def test_a_cache_that_hangs_is_told_in_time() -> None:
    """The server accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configuration = written(
            f"[[layers]]\nbackend = 'redis'\nurl = 'redis://127.0.0.1:{listener.getsockname()[1]}/0'\ntimeout = 60\n"
        )
        checked = run_check(configuration, {}, patience=0.1)
    (finding,) = checked.findings
    assert str(finding) == (
        "bustcall.toml: layers.0: the layer redis cannot be used now: it did not answer within 0.1 s"
    )


def test_entries_are_read_and_their_keys_judged_by_the_layers() -> None:
    """What an option names is told without the file's name; only read if there are not all layers."""
    Path("pages").mkdir()
    Path("entries.json").write_text('{"/etc/passwd": []}')
    Path("other.json").write_text("[]")
    files = "[[layers]]\nbackend = 'files'\nroot = '{}'\n[files]\nregister = 'entries.json'\n"
    (finding,) = run_check(written(files.format("pages")), {}).findings
    assert (finding.file, finding.key) == ("bustcall.toml", "files.register")
    assert "is an absolute path" in finding.text
    (finding,) = run_check(written(files.format("pages")), {}, register="other.json").findings
    assert (finding.file, finding.key) == ("", "")
    assert "expected an object of lists" in finding.text
    (finding,) = run_check(written(files.format("missing")), {}).findings
    assert finding.key == "layers.0.root"


@pytest.mark.parametrize("setting", KINDS)
def test_a_file_of_ours_is_known_by_its_mark(setting: str) -> None:
    """And for one of another of ours."""
    for name, kind in KINDS.items():
        make(kind, Path(f"{name}.db"))
        why = look_at_database(f"{name}.db", setting)
        assert why == (None if name == setting else f"is a database of the {name}; choose another path")


def test_a_database_of_something_else_is_refused() -> None:
    """Whether it has a mark of its own or none; an empty one may be taken."""
    for name, statements in {
        "marked": ["PRAGMA application_id = 7"],
        "unmarked": ["CREATE TABLE t (x)"],
        "empty": ["PRAGMA user_version = 1"],
    }.items():
        with sqlite3.connect(f"{name}.db") as db:
            for statement in statements:
                db.execute(statement)
        db.close()
    other = "is a database of something else; choose another path"
    assert look_at_database("marked.db", "state") == other
    assert look_at_database("unmarked.db", "state") == other
    assert look_at_database("empty.db", "state") is None


def test_a_file_that_a_daemon_has_just_made_is_ours() -> None:
    """As long as it runs, or was killed, its mark may be in the log beside the file only."""
    path = Path("state.db")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    with transaction(db):
        for statement in KINDS["state"].schema:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {KINDS['state'].application}")
    assert path.with_name("state.db-wal").stat().st_size
    assert look_at_database(path, "state") is None
    db.close()
    assert look_at_database(path, "state") is None


@pytest.mark.parametrize("content", [b"", b"\0\xff damaged", b"SQLite format 3\0"])
def test_a_file_that_is_empty_or_damaged_is_the_daemons_to_mend(content: bytes) -> None:
    """It makes a new one, and sets the damaged one aside."""
    Path("state.db").write_bytes(content + bytes(100) * bool(content))
    assert look_at_database("state.db", "state") is None


@pytest.mark.parametrize("setting", KINDS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"a text",
        b'{"index.html": []}',
        b"x" * 200 + bytes(5000),
        b"x" * 65535 + b"\0",
        b"x" * 65536 + b"\0",
        b"SQLite format 3",
        b"SQLite format 3\0" + b"x" * 5000,
        b"SQLite format 3\0" + bytes(5000),
        b"SQLite format 3\0\x10\0\1\3\0@  " + b"x" * 5000,
        b"SQLite format 3\0\x10\0\1\1\0@@@" + b"x" * 5000,
    ],
    ids=[
        "empty",
        "nul",
        "text",
        "json",
        "nul after 200",
        "nul within the head",
        "nul after the head",
        "magic cut short",
        "no page size",
        "all zero",
        "version 3",
        "other fractions",
    ],
)
def test_what_is_no_database_is_judged_as_the_daemon_judges_it(content: bytes, setting: str) -> None:
    """Both refuse a text, in the same words; what is damaged the check leaves to the daemon, which sets it aside."""
    path = Path("it.db")
    path.write_bytes(content)
    if (why := look_at_database(path, setting)) is None:
        make(KINDS[setting], path)
        return
    with pytest.raises(ConfigurationError, match=f"^the {setting} file 'it.db' {re.escape(why)}$"):
        make(KINDS[setting], path)


def test_what_is_no_file_is_refused() -> None:
    """A directory, a pipe (which is not opened), a name that is too long, a file as a directory."""
    Path("directory").mkdir()
    os.mkfifo("pipe")
    Path("file").touch()
    assert look_at_database("directory", "state") == "is not a regular file; choose another path"
    assert look_at_database("pipe", "state") == "is not a regular file; choose another path"
    assert look_at_database("x" * 300, "state") == "cannot be used: File name too long"
    assert look_at_database("file/state.db", "state") == "is in a directory that does not exist; make it first"


def test_what_this_user_may_not_write_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory, too: SQLite has files beside its own."""
    Path("state.db").touch(0o600)
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).is_dir())
    assert look_at_database("state.db", "state") == (
        "may not be read and written by this user; choose another path, or change its mode"
    )
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert look_at_database("state.db", "state") == (
        "is in a directory that this user may not write to; choose another path"
    )


def test_a_file_of_another_user_must_be_private_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since its mode cannot be changed."""
    Path("state.db").touch(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: Path("state.db").stat().st_uid + 1)
    assert look_at_database("state.db", "state") is None
    Path("state.db").chmod(0o644)
    assert look_at_database("state.db", "state") == (
        "belongs to another user, so that its mode cannot be made 0600; choose another path"
    )


CACHE = "[[layers]]\nbackend = 'sqlite'\npath = {!r}\n"


async def use_cache(path: Path) -> None:
    """Open a cache's file as the daemon does, or raise that it cannot be."""
    backend = SqliteBackend(path)
    try:
        await backend.check_ready()
    finally:
        await backend.close()


def cache_with(change: bytes, at: int) -> None:
    """Make a cache at `cache.db` and change its head there."""
    path = Path("cache.db")
    asyncio.run(use_cache(path))
    path.write_bytes(path.read_bytes()[:at] + change + path.read_bytes()[at + len(change) :])


def other_database() -> None:
    with sqlite3.connect("cache.db") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        (lambda: None, None),
        (lambda: Path("cache.db").touch(), None),
        (lambda: Path("cache.db").write_bytes(bytes(5000)), None),
        (lambda: asyncio.run(use_cache(Path("cache.db"))), None),
        (lambda: cache_with(b"\xff" * 20, 100), None),
        (lambda: cache_with((99).to_bytes(4), 60), "was made by a later pybustcall (format 99, known is 1)"),
        (lambda: Path("cache.db").write_text("2026-01-01 started"), "is not a cache"),
        (other_database, "is a database of another program"),
        (lambda: make(KINDS["journal"], Path("cache.db")), "is a database of another program"),
        (lambda: Path("cache.db").mkdir(), "is not a regular file"),
        (lambda: Path("cache.db").symlink_to("elsewhere"), "is a symbolic link"),
        (lambda: Path("cache.db.lock").mkdir(), "has no regular file beside it as cache.db.lock"),
    ],
    ids=[
        "missing", "empty", "zeros", "cache", "damaged", "later", "text", "database", "journal", "directory", "link",
        "lock",
    ],
)  # fmt: skip
def test_the_file_of_a_cache_is_looked_at_and_nothing_made_or_changed(
    arrange: Callable[[], None], why: str | None
) -> None:
    """Neither it nor a lock beside it; what is refused the daemon cannot use either, and it can what is not."""
    arrange()
    configuration = written(CACHE.format("cache.db"))
    before = seen()
    checked = run_check(configuration, {})
    assert seen() == before
    path = Path("cache.db").absolute()
    if why is None:
        assert checked.findings == ()
        asyncio.run(use_cache(path))
        return
    (finding,) = checked.findings
    assert finding.key == "layers.0"
    assert finding.text == (f"the layer sqlite cannot be used now: the file {str(path)!r} {why}; choose another path")
    with pytest.raises(BackendFailure):
        asyncio.run(use_cache(path))


def test_a_file_that_is_named_twice_is_told_once() -> None:
    """By the keys that name it, and not by what is found there."""
    make(KINDS["journal"], Path("bust.db"))
    checked = run_check(written("[journal]\npath = 'bust.db'\n" + CACHE.format("bust.db")), {})
    (finding,) = checked.findings
    assert finding.key == "layers.0.path"
    assert finding.text.startswith("the journal (journal.path) and the layer sqlite (layers.0.path) cannot both be")


def test_where_no_cache_can_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is missing, a name that is too long, what this user may not write to."""
    assert look_at_cache("missing/cache.db") == "is in a directory that does not exist; make it first"
    assert look_at_cache("x" * 300) == "cannot be used: File name too long"
    for name in ("cache.db", "cache.db-wal", "cache.db.lock"):
        Path(name).touch()
    for refused, why in {
        "cache.db": "may not be read and written by this user; choose another path, or change its mode",
        "cache.db-wal": "may not be read and written by this user; choose another path, or change its mode",
        "cache.db.lock": "has cache.db.lock beside it, which this user may not read and write; change its mode",
    }.items():
        monkeypatch.setattr(os, "access", lambda path, _mode, no=refused: Path(path).name != no)
        assert look_at_cache("cache.db") == why


def test_a_socket_may_be_in_use_but_nothing_else_may_be_there() -> None:
    """Whether another daemon listens is not asked."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("used.sock")
        assert look_at_socket("used.sock") is None
    assert look_at_socket("new.sock") is None
    assert look_at_socket("missing/b.sock") == "is in a directory that does not exist; make it first"
    Path("file").touch()
    (finding,) = run_check(written("[listen]\nsocket = 'file'\n"), {}).findings
    assert finding.key == "listen.socket"
    assert finding.text.endswith("file' is a file of another kind, which is not removed; choose another path")
