"""`pybustcall watch`: what the daemons bust, one line each, until it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, wait_until
from tests.test_cli import DOWN, call, running

STREAM = ("events.stream",)


@contextmanager
def watching(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in a process of its own, which is gone at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pybustcall", "watch", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[bytes]) -> str:
    """Tell the next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().decode().rstrip("\n")


def test_busts_are_printed_until_it_is_interrupted() -> None:
    """One a line, with what went with it; a reset, too. Ctrl-C ends it with 130."""
    with running(FakeDaemon(capabilities=STREAM, heartbeat=0.2)) as fake, watching("--url", fake.url) as process:
        wait_until(lambda: fake.followed, "it follows")
        fake.tell("products/7", also=["a", "b"])
        fake.tell("sale\x1b", kind="tag", soft=True, strategy="direct")
        assert line(process) == (
            f"busted key 'products/7' (default, dimensional), and with it 'a', 'b', told by {fake.url} as fake-1"
        )
        assert line(process) == f"marked stale tag 'sale\\x1b' (default, direct), told by {fake.url} as fake-2"
        fake.forget_events("another")
        fake.drop_connections()
        assert line(process) == f"reset by {fake.url}: events were missed that are no longer kept"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None
        assert process.stderr.read().strip() == b"interrupted"


def test_json_has_one_object_a_line() -> None:
    """With all that an event says; of the namespace that was asked for."""
    with running(FakeDaemon(capabilities=STREAM, heartbeat=0.2)) as fake:
        options = ["--json", "--namespace", "shop", "--prefix", "a", "--tag", "t", "--daemon", fake.url]
        with watching("--url", fake.url, *options) as process:
            wait_until(lambda: fake.followed, "it follows")
            fake.tell("elsewhere")
            fake.tell("a/b", namespace="shop")
            assert json.loads(line(process)) == {
                "event": "bust",
                "namespace": "shop",
                "kind": "key",
                "target": "a/b",
                "soft": False,
                "strategy": "dimensional",
                "also": [],
                "daemon": fake.url,
                "id": "fake-2",
            }
            fake.forget_events("another")
            fake.drop_connections()
            assert json.loads(line(process))["event"] == "reset"


def test_a_daemon_that_is_not_there_is_waited_for() -> None:
    """It says so."""
    with watching("--url", DOWN) as process:
        assert process.stderr is not None
        assert process.stderr.readline().decode().startswith(f"waiting: {DOWN}: no connection could be made")


def test_a_daemon_without_events_is_an_error() -> None:
    """Exit code 1: repeating will not help."""
    with running(FakeDaemon()) as fake:
        code, out, err = call("watch", "--url", fake.url)
        assert (code, out) == (1, "")
        assert "does not advertise events.stream" in err
        code, out, _ = call("watch", "--json", "--url", fake.url)
        told = json.loads(out)
        assert (code, told["error"], told["unmet"]) == (1, "IncompatibleDaemon", ["events.stream"])


@pytest.mark.parametrize("arguments", [["--prefix", ""], ["--namespace", "?"], ["--daemon", "http://elsewhere"]])
def test_what_cannot_be_followed_is_wrong_usage(arguments: list[str]) -> None:
    """Exit code 2, and nothing was sent."""
    code, _, err = call("watch", *arguments)
    assert code == 2
    assert err.startswith("Error: ")
