"""`pybustcall watch`: what the daemons bust, one line each, until it is interrupted."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, eventually
from tests.test_cli import DOWN, call, running

STREAM = ("events.stream",)


@asynccontextmanager
async def watching(*arguments: str) -> AsyncIterator[Process]:
    """Run the command in a process of its own, which is gone at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pybustcall", "watch", *arguments, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def line(stream: asyncio.StreamReader | None) -> str:
    """Tell the next line that it prints."""
    assert stream is not None
    async with asyncio.timeout(PATIENCE):
        return (await stream.readline()).decode().rstrip("\n")


async def test_busts_are_printed_until_it_is_interrupted() -> None:
    """One a line, with what went with it; a reset, too. Ctrl-C ends it with 130."""
    async with FakeDaemon(capabilities=STREAM, heartbeat=0.2) as fake, watching("--url", fake.url) as process:
        await eventually(lambda: fake.followed, "it follows")
        fake.tell("products/7", also=["a", "b"])
        fake.tell("sale\x1b", kind="tag", soft=True, strategy="direct")
        assert await line(process.stdout) == (
            f"busted key 'products/7' (default, dimensional), and with it 'a', 'b', told by {fake.url} as fake-1"
        )
        assert (
            await line(process.stdout)
            == f"marked stale tag 'sale\\x1b' (default, direct), told by {fake.url} as fake-2"
        )
        fake.forget_events("another")
        fake.drop_connections()
        assert await line(process.stdout) == f"reset by {fake.url}: events were missed that are no longer kept"
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE):
            _, errors = await process.communicate()
        assert (process.returncode, errors.strip()) == (130, b"interrupted")


async def test_json_has_one_object_a_line() -> None:
    """With all that an event says; of the namespace that was asked for."""
    async with FakeDaemon(capabilities=STREAM, heartbeat=0.2) as fake:
        options = ["--json", "--namespace", "shop", "--prefix", "a", "--tag", "t", "--daemon", fake.url]
        async with watching("--url", fake.url, *options) as process:
            await eventually(lambda: fake.followed, "it follows")
            fake.tell("elsewhere")
            fake.tell("a/b", namespace="shop")
            assert json.loads(await line(process.stdout)) == {
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
            assert json.loads(await line(process.stdout))["event"] == "reset"


async def test_a_daemon_that_is_not_there_is_waited_for() -> None:
    """It says so."""
    async with watching("--url", DOWN) as process:
        assert (await line(process.stderr)).startswith(f"waiting: {DOWN}: no connection could be made")


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
