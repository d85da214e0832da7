"""The command `pybustcall daemon` with a configuration file: serving by it, and checking it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.conftest import PATIENCE
from tests.test_cli import call

REDIS_DOWN = "[[layers]]\nbackend = 'redis'\nurl = 'redis://127.0.0.1:1/0'\n"
PAGES = "[[layers]]\nbackend = 'files'\nname = 'pages'\nroot = 'pages'\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a directory of its own, with a cache in it, and no settings of the developer."""
    monkeypatch.chdir(tmp_path)
    Path("pages").mkdir()
    for name in [name for name in os.environ if name.startswith("BUSTCALL_")]:
        monkeypatch.delenv(name)


def write(text: str) -> None:
    Path("bustcall.toml").write_text(text, encoding="utf-8")


@contextmanager
def running(*options: str) -> Iterator[str]:
    """Run a daemon in a process of its own; tell the line that it says first. It ends with 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "daemon", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err


def status_of(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/api/v1/status", timeout=PATIENCE) as reply:
        found: dict[str, Any] = json.loads(reply.read())
    return found


def test_the_daemon_serves_what_the_file_says() -> None:
    """The line that says where it listens names the layers, inside out."""
    write(f"[listen]\nport = 0\n{PAGES}number = 3\n[[layers]]\nbackend = 'memory'\n")
    with running("--config", "bustcall.toml") as line:
        assert line.startswith("bustcall daemon listening on http://127.0.0.1:")
        assert line.endswith(" (layers: memory (1), pages (3))\n")


def test_a_redis_that_is_down_does_not_keep_the_daemon_from_starting() -> None:
    """What is to be busted there waits in the journal."""
    write(f"[listen]\nport = 0\n[journal]\npath = 'journal.db'\n{REDIS_DOWN}{PAGES}")
    with running("--config", "bustcall.toml", "--json") as line:
        told = json.loads(line)
        assert told["backend"] == "redis, files"
        assert told["layers"] == [
            {"name": "redis", "number": 0, "backend": "redis"},
            {"name": "pages", "number": 1, "backend": "files"},
        ]
        assert status_of(told["url"])["daemon_pid"] == told["pid"]
    assert Path("journal.db").exists()


def test_a_directory_that_is_missing_does() -> None:
    """It is told at its key, with exit code 4."""
    write(PAGES.replace("root = 'pages'", "root = 'missing'"))
    code, out, err = call("daemon", "--config", "bustcall.toml", "--port", "0")
    assert (code, out) == (4, "")
    assert err.startswith("Error: bustcall.toml: layers.0.root: the root '")
    assert err.endswith("missing' does not exist; make it, or name another\n")


def test_options_win_over_the_file() -> None:
    """Entries of the option's file are registered, and it listens where the option says."""
    Path("entries.json").write_text('{"index.html": []}')
    write("[listen]\nport = 1\n[files]\nregister = 'missing.json'\n")
    options = ["--port", "0", "--register", "entries.json", "--journal", "journal.db", "--json"]
    with running("--config", "bustcall.toml", *options) as line:
        assert status_of(json.loads(line)["url"])["cache_size"] == "10B"
    assert Path("journal.db").exists()


@pytest.mark.parametrize("said", ["file", "option"])
def test_what_keeps_the_daemon_from_listening_is_told_where_it_was_said(said: str) -> None:
    """At the key in the file, or without it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        write(f"[listen]\nport = {port}\n" if said == "file" else "")
        more = [] if said == "file" else ["--port", str(port)]
        code, _, err = call("daemon", "--config", "bustcall.toml", *more)
    place = "bustcall.toml: listen.port: " if said == "file" else ""
    assert code == 4
    assert err.startswith(f"Error: {place}port {port} on 127.0.0.1 is in use by another process")


@pytest.mark.parametrize(("option", "place"), [([], "bustcall.toml: files.register: "), (["--register", "x.json"], "")])
def test_entries_that_cannot_be_read_are_told_where_they_were_named(option: list[str], place: str) -> None:
    """By the file, or by the option."""
    write("[files]\nregister = 'missing.json'\n")
    code, _, err = call("daemon", "--config", "bustcall.toml", "--port", "0", *option)
    assert code == 4
    assert err.startswith(f"Error: {place}entries file ")


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (None, [], "bustcall.toml: cannot be read (No such file or directory)"),
        ("a = \n", [], "bustcall.toml: line 1, column 5: Invalid value"),
        ("[listen]\nport = 'a'\n", [], 'bustcall.toml: listen.port: expected a whole number, found "a"'),
        (PAGES, ["--root", "pages"], "bustcall.toml: layers: the file says which layers there are"),
        (PAGES, ["--backend", "memory"], "bustcall.toml: layers: the file says which layers there are"),
        ("[listen]\nhost = '0.0.0.0'\n", [], "bustcall.toml: access.token_file: listening on '0.0.0.0' lets other"),
        ("[requires]\nsemverx = 'new'\n", [], "bustcall.toml: requires: semverx: range 'new'"),
        ("[requires]\nsemverx = 'new'\n", ["--require-semverx", "old"], "Error: semverx: range 'old'"),
        ("[access.tiers]\ntea = 'public'\n", [], "bustcall.toml: access.tiers: there is no capability 'tea'"),
        ("", ["--access", "tea=public"], "Error: there is no capability 'tea'"),
    ],
)
def test_a_file_that_is_wrong_gets_a_sentence_and_exit_code_4(text: str | None, options: list[str], says: str) -> None:
    """Serving and checking alike."""
    if text is not None:
        write(text)
    code, out, err = call("daemon", "--config", "bustcall.toml", *options)
    assert (code, out) == (4, "")
    assert says in err
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check", *options)
    assert code == 4
    assert says.removeprefix("Error: ") in out + err


def test_a_check_tells_of_a_file_that_cannot_be_read_as_of_one_that_is_wrong() -> None:
    """One object a line, each with its key, on standard output."""
    write("[listen]\nport = 'a'\nhots = 'b'\n")
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert (code, err, [(it["ok"], it["key"]) for it in told]) == (
        4, "", [(False, "listen.port"), (False, "listen.hots")],
    )  # fmt: skip
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check")
    assert (code, err, [line.split(":")[0] for line in out.splitlines()]) == (4, "", ["bustcall.toml"] * 2)


@pytest.mark.parametrize(
    ("text", "options", "key", "says"),
    [
        (None, [], "", "cannot be read (No such file or directory)"),
        ("a = \n", [], "line 1, column 5", "Invalid value"),
        (PAGES, ["--root", "pages"], "layers", "the file says which layers there are; leave --root and --backend out"),
    ],
)
def test_a_check_that_cannot_begin_tells_so_in_an_object(
    text: str | None, options: list[str], key: str, says: str
) -> None:
    """A program reads one kind of line, whatever is wrong."""
    if text is not None:
        write(text)
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check", "--json", *options)
    assert (code, err) == (4, "")
    assert json.loads(out) == {"ok": False, "file": "bustcall.toml", "key": key, "text": says}


def test_a_byte_order_mark_is_no_part_of_the_file() -> None:
    """Some editors write one."""
    Path("bustcall.toml").write_bytes(b"\xef\xbb\xbf[limits]\ndrain = 3\n")
    assert call("daemon", "--config", "bustcall.toml", "--check")[0] == 0


def test_a_check_of_what_is_in_order_is_told_in_one_line() -> None:
    """With exit code 0, also while a daemon runs with it."""
    write(f"[listen]\nport = 0\n[journal]\npath = 'journal.db'\n[[layers]]\nbackend = 'memory'\n{PAGES}")
    with running("--config", "bustcall.toml"):
        told = (
            "bustcall.toml: in order: 2 layers: memory (0), pages (1); not advertised: cache.bust.namespace (lacked by"
            " pages), cache.bust.soft (lacked by pages)\n"
        )
        assert call("daemon", "--config", "bustcall.toml", "--check") == (0, told, "")
    code, out, _ = call("daemon", "--config", "bustcall.toml", "--check", "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "ok": True,
            "file": "bustcall.toml",
            "layers": [
                {"name": "memory", "number": 0, "backend": "memory"},
                {"name": "pages", "number": 1, "backend": "files"},
            ],
            "lacking": {"cache.bust.namespace": ["pages"], "cache.bust.soft": ["pages"]},
        },
    )


def test_a_check_tells_all_that_is_wrong() -> None:
    """One line a finding, or one object; a cache that does not answer is one; exit code 4."""
    write(f"[limits]\ndrain = 3\n{REDIS_DOWN}{PAGES}".replace("root = 'pages'", "root = 'missing'"))
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check", "--host", "0.0.0.0")
    assert (code, err) == (4, "")
    lines = out.splitlines()
    assert [line.split(": ", 2)[:2] for line in lines] == [
        ["bustcall.toml", "access.token_file"], ["bustcall.toml", "layers.1.root"], ["bustcall.toml", "layers.0"]
    ]  # fmt: skip
    code, out, _ = call("daemon", "--config", "bustcall.toml", "--check", "--host", "0.0.0.0", "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert [f"{told['file']}: {told['key']}: {told['text']}" for told in objects] == lines
    assert {told["ok"] for told in objects} == {False}


def test_a_check_tells_what_is_wrong_in_the_file_and_around_it_together() -> None:
    """Also where the options do not go with the file."""
    write(f"[limits]\ndrain = -1\n[files]\nregister = 'missing.json'\n{REDIS_DOWN}")
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check", "--state", "pages", "--root", "pages")
    assert (code, err) == (4, "")
    assert [line.split(" ")[1] for line in out.splitlines()] == [
        "limits.drain:", "layers:", "state", "files.register:", "layers.0:"
    ]  # fmt: skip
    code, _, err = call("daemon", "--config", "bustcall.toml", "--root", "pages")
    assert (code, len(err.splitlines())) == (4, 1)


def test_a_warning_of_a_check_is_no_reason_not_to_serve() -> None:
    """Exit code 0, a line of its own, and an object that is ok."""
    write(f"[namespaces]\nallowed = ['shop']\n{PAGES}")
    code, out, err = call("daemon", "--config", "bustcall.toml", "--check")
    assert (code, err) == (0, "")
    warned, told = out.splitlines()
    assert warned.startswith("bustcall.toml: layers.0.root: warning: the layer pages knows the namespace default only")
    assert told.startswith("bustcall.toml: in order: 1 layer: pages (0)")
    code, out, _ = call("daemon", "--config", "bustcall.toml", "--check", "--json")
    first, last = (json.loads(line) for line in out.splitlines())
    assert (code, first.keys(), first["ok"], last["ok"]) == (0, {"ok", "file", "key", "warning"}, True, True)


def test_the_audit_names_the_port_that_the_system_chose() -> None:
    """With port 0 the daemon would else stand there without one."""
    with running("--port", "0", "--json") as line:
        url = json.loads(line)["url"]
        assert call("bust", "a", "--url", url)[0] == 0
        (job,) = (json.loads(told) for told in call("jobs", "list", "--json", "--url", url)[1].splitlines())
    assert job["via"] == f"{socket.gethostname()} {url.removeprefix('http://')}"


def test_options_are_checked_without_a_file() -> None:
    """Then no line names one."""
    code, out, err = call("daemon", "--check", "--root", "pages")
    assert (code, err) == (0, "")
    assert out.startswith("in order: 1 layer: files (0); not advertised: ")
    code, out, _ = call("daemon", "--check", "--root", "missing", "--token-file", "none", "--state", "pages")
    assert code == 4
    first, second, third = out.splitlines()
    assert first == "token file none: cannot be read (No such file or directory)"
    assert second == "the state file 'pages' is not a regular file; choose another path"
    assert third.endswith("missing' does not exist; make it, or name another")


def test_tiers_and_requirements_of_options_are_joined_with_the_files() -> None:
    """Each capability has the tier that was said last, and each requirement stands for itself."""
    write(
        "[listen]\nport = 0\n[access.tiers]\ndaemon.status = 'private'\ncache.bust = 'public'\n"
        "[requires]\nsemverx = '>=0.1'\n"
    )
    options = ["--access", "daemon.status=public", "--require-capability", "cache.bust", "--json"]
    with running("--config", "bustcall.toml", *options) as line:
        url = json.loads(line)["url"]
        assert status_of(url)["daemon_pid"] == json.loads(line)["pid"]
        with urlopen(f"{url}/api/v1/capabilities", timeout=PATIENCE) as reply:
            document = json.loads(reply.read())
    assert document["requires"] == {"semverx": ">=0.1", "capabilities": ["cache.bust"]}
    assert document["access"]["cache.bust"] == "public"
