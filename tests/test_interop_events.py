"""Events between languages: pybustcall follows the Node.js daemon, and a client in Node.js follows both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pybustcall import BustcallClient
from pybustcall.events import BustEvent, Reset
from pybustcall.sse import Block, StreamParser
from pybustcall.testing import Answer, FakeDaemon
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.interop import PeerProcess, start_peer
from tests.interop.node_lua import FOLLOWER, PEERS

pytestmark = [pytest.mark.requirement("INT-02"), pytest.mark.requirement("INT-04")]

BEAT = 0.1


def start_node(url: str = ":0", **options: object) -> PeerProcess:
    """Start the Node.js daemon, on a free port or again on the one of a URL."""
    more = [text for name, value in {"heartbeat": BEAT, **options}.items() for text in (f"--{name}", str(value))]
    return start_peer([*PEERS["node"](), "--port", url.rpartition(":")[2], *more])


@pytest.fixture
def brisk(tmp_path: Path) -> tuple[str, ...]:
    """Options of the reference daemon with which its events have a short heartbeat, and outlive it."""
    settings = tmp_path / "brisk.toml"
    settings.write_text(f'[events]\nheartbeat = {BEAT}\n\n[journal]\npath = "{tmp_path / "journal"}"\n')
    return "--config", str(settings)


# pybustcall follows the Node.js daemon


async def test_the_client_follows_a_peer_over_its_restart() -> None:
    """What it busts, in order; another process is another log, so that a reset comes before what that one busts."""
    node = start_node()
    try:
        async with BustcallClient(node.url) as client, client.events(prefix=["a", "käse/"]) as events:
            await events.wait_live(PATIENCE)
            for target in ("a/1", "ab", "käse/日本語", "a"):
                await client.bust(target, strategy="direct")
            told = [await anext(events) for _ in range(3)]
            assert [event.target for event in told if isinstance(event, BustEvent)] == ["a/1", "käse/日本語", "a"]
            node.kill()
            node = start_node(node.url)
            assert isinstance(await anext(events), Reset)
            await events.wait_live(PATIENCE)
            await client.bust("a/2")
            event = await anext(events)
        assert isinstance(event, BustEvent)
        assert (event.target, event.kind, event.strategy, event.daemon) == ("a/2", "key", "dimensional", node.url)
    finally:
        node.kill()


async def test_a_near_cache_drops_what_is_busted_at_a_peer() -> None:
    """By another client, whose answer comes after the event was sent."""
    loads = iter(range(10))
    with start_node() as node:
        async with BustcallClient(node.url) as client, BustcallClient(node.url) as other:
            near = client.near_cache(ttl=None)
            await near.wait_trusted(PATIENCE)
            assert [await near.get_or_load("a.css.gz", lambda: next(loads)) for _ in range(2)] == [0, 0]
            await other.bust("b")
            await other.bust("a.css")
            await eventually(lambda: len(near) == 0)
            assert await near.get_or_load("a.css.gz", lambda: next(loads)) == 1


# The Node.js daemon


@asynccontextmanager
async def reading(url: str, query: str = "", after: str | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
    """Open a stream, and read nothing yet."""
    headers = {} if after is None else {"Last-Event-ID": after}
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/events{query}", headers=headers) as told:
        yield told


async def blocks_until(response: aiohttp.ClientResponse, name: str) -> list[Block]:
    """Read a stream from its beginning until there is an event of a name."""
    parser, found = StreamParser(), list[Block]()
    async with asyncio.timeout(PATIENCE):
        while not any(block.name == name for block in found):
            piece = await response.content.readany()
            assert piece, "the stream has ended"
            found += parser.feed(piece)
    return found


async def bust(url: str, *targets: str) -> None:
    async with BustcallClient(url) as client:
        for target in targets:
            await client.bust(target)


async def test_a_peer_keeps_the_newest_events_only() -> None:
    """Who has missed more than is kept must forget; who has missed as much is told all of it."""
    with start_node(kept=3) as node:
        await bust(node.url, "0")
        async with reading(node.url) as response:
            [*_, live] = await blocks_until(response, "live")
        await bust(node.url, "1", "2", "3")
        async with reading(node.url, after=live.id) as response:
            told = await blocks_until(response, "live")
        assert [json.loads(block.data or "")["target"] for block in told[:-1]] == ["1", "2", "3"]
        await bust(node.url, "4")
        async with reading(node.url, after=live.id) as response:
            told = await blocks_until(response, "live")
        assert [block.name for block in told] == ["reset", "live"]
        assert {block.id.partition("-")[2] for block in told} == {"5"}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("?namespace=", "namespace"),
        ("?namespace=a&namespace=b", "namespace"),
        ("?prefix=", "prefix"),
        ("?tag=a%0Ab", "tag"),
        ("?" + "&".join(["tag=a"] * 101), "tag"),
    ],
)
async def test_a_peer_refuses_what_cannot_be_wanted(query: str, field: str) -> None:
    """As our daemon does."""
    with start_node() as node:
        async with reading(node.url, query) as response:
            assert (response.status, (await response.json())["field"]) == (422, field)


async def test_a_peer_ends_its_streams_when_it_is_asked_to_end() -> None:
    """Whoever reads learns of it at once, and the process does not wait for them."""
    with start_node() as node:
        async with reading(node.url) as response:
            await blocks_until(response, "live")
            node.signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                await response.content.read()
        await eventually(lambda: node.returncode() is not None)
        assert node.returncode() == 0


async def test_a_reader_that_takes_nothing_in_is_left_by_a_peer() -> None:
    """It costs the daemon a bounded number of bytes; others are told as ever."""
    with start_node() as node, socket.create_connection(("127.0.0.1", int(node.url.rpartition(":")[2]))) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        deaf.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert deaf.recv(16).startswith(b"HTTP/1.1 200")
        async with BustcallClient(node.url) as client, reading(node.url, "?prefix=end") as response:
            report = await client.bust_many((f"{number}/{'x' * 8000}" for number in range(1000)), concurrency=20)
            assert report.failed == 0
            await client.bust("end")
            await blocks_until(response, "bust")
        deaf.settimeout(PATIENCE)
        got = 0
        with suppress(ConnectionResetError):
            while piece := deaf.recv(1 << 20):  # what had gone out before
                got += len(piece)
        assert got < 8_000_000


# The client in Node.js


class Follower:
    """A client of the documentation, as a process that prints what it is told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    async def until(self, line: str, times: int = 1) -> None:
        """Read on until it has said a line so many times."""
        async with asyncio.timeout(PATIENCE):
            while self.lines.count(line) < times:
                assert self.process.stdout is not None
                told = await self.process.stdout.readline()
                assert told, f"it has ended after {self.lines}"
                self.lines.append(told.decode().removesuffix("\n"))

    async def end(self) -> int:
        """Tell its exit code."""
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()


@asynccontextmanager
async def following(url: str, *prefixes: str, **env: str) -> AsyncIterator[Follower]:
    """Run the client; it is gone at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
    process = await asyncio.create_subprocess_exec(
        *FOLLOWER(),
        *prefixes,
        env={**inherited, "BUSTCALL_URL": url, "NO_PROXY": "*", **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # Node.js 18 finds its own fetch experimental
    )
    follower = Follower(process)
    try:
        yield follower
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_client_in_another_language_follows_ours_over_a_kill(
    start_daemon: StartDaemon, brisk: tuple[str, ...]
) -> None:
    """What it wants it is told, in order; it goes on where it was, and need not forget anything."""
    daemon = start_daemon(*brisk)
    async with following(daemon.url, "a", "käse/") as follower:
        await follower.until("live")
        await bust(daemon.url, "b", "a/1")
        async with BustcallClient(daemon.url) as client:
            await client.bust("käse", kind="prefix")
        await follower.until("bust prefix käse")
        assert follower.lines == ["live", "bust key a/1", "bust prefix käse"]
        daemon.kill()
        await follower.until("lost")
        start_daemon(*brisk, "--port", daemon.url.rpartition(":")[2])
        await follower.until("live", 2)  # where busts were not written down as over, it tells that all was busted
        await bust(daemon.url, "a/2")
        await follower.until("bust key a/2")
        told = {"live", "lost", "bust key a/1", "bust prefix käse", "bust key a/2"}
        assert {*follower.lines} - {"bust all *"} == told
        follower.process.terminate()
        assert await follower.end() == 0


async def test_a_client_in_another_language_is_told_what_it_missed(
    start_daemon: StartDaemon, brisk: tuple[str, ...]
) -> None:
    """While it did not run, and the daemon was another process; before it says that it is live again."""
    daemon = start_daemon(*brisk)
    async with following(daemon.url) as follower:
        await follower.until("live")
        await bust(daemon.url, "0", "0")  # the first event is written down by the second bust
        await follower.until("bust key 0", 2)
        os.kill(follower.process.pid, signal.SIGSTOP)
        daemon.kill()
        start_daemon(*brisk, "--port", daemon.url.rpartition(":")[2])
        await bust(daemon.url, "1", "2")
        os.kill(follower.process.pid, signal.SIGCONT)
        await follower.until("live", 2)
        # The daemon first tells that all was busted, since it had not written down all as over; and that again.
        missed = [line for line in follower.lines[4:] if line not in {"bust all *", "bust key 0"}]
        assert follower.lines[:4] == ["live", "bust key 0", "bust key 0", "lost"]
        assert missed == ["bust key 1", "bust key 2", "live"]


async def test_a_client_in_another_language_forgets_with_another_log() -> None:
    """Of a peer that was killed and keeps nothing: neither side is ours."""
    node = start_node()
    try:
        async with following(node.url) as follower:
            await follower.until("live")
            await bust(node.url, "a")
            await follower.until("bust key a")
            node.kill()
            node = start_node(node.url)
            await follower.until("live", 2)
            assert follower.lines == ["live", "bust key a", "lost", "reset", "live"]
    finally:
        node.kill()


async def test_a_client_in_another_language_is_refused_without_the_token(
    start_daemon: StartDaemon, brisk: tuple[str, ...]
) -> None:
    """It says so and ends; with the token it is told."""
    daemon = start_daemon(*brisk, env={"BUSTCALL_TOKEN": "s3cret"})
    async with following(daemon.url) as follower:
        assert await follower.end() == 1
        assert follower.process.stdout is not None
        assert (await follower.process.stdout.read()).startswith(b"failed: HTTP 401: ")
    async with following(daemon.url, BUSTCALL_TOKEN="s3cret") as follower:
        await follower.until("live")


LIVE = b'id: e-5\nevent: live\ndata: {"heartbeat": 0.1}\n\n'


def told(number: int, **said: Any) -> bytes:
    event = {"namespace": "default", "kind": "key", "target": "a", "soft": False, "strategy": "direct", **said}
    return f"id: e-{number}\nevent: bust\ndata: {json.dumps(event)}\n\n".encode()


@pytest.mark.parametrize(
    ("stream", "lines"),
    [
        (LIVE + told(6) + b"data: \xff\n\n", ["live", "bust key a", "lost", "reset", "live"]),
        (LIVE + told(6) + b"event: bust\ndata: {\n\n", ["live", "bust key a", "lost", "reset", "live"]),
        (LIVE + b"data: x\nevent: bust\nid: 7\n\n", ["live", "lost", "reset", "live"]),
        (LIVE.replace(b"0.1", b"0"), ["reset", "live"]),
        (LIVE + told(4), ["live", "reset", "bust key a"]),
        (LIVE + told(6).replace(b"e-6", b"f-6"), ["live", "reset", "bust key a"]),
        (LIVE + b'id: e-9\nevent: reset\ndata: {"reason": "x"}\n\n' + told(10), ["live", "reset", "bust key a"]),
        (LIVE + b": beat\nid: e-8\n\n" + b"event: rumour\ndata: x\n\n" + told(9), ["live", "bust key a"]),
        (LIVE, ["live", "lost"]),
    ],
)
async def test_a_client_in_another_language_trusts_no_odd_stream(stream: bytes, lines: list[str]) -> None:
    """What may hide a bust is a reset; what is nothing to it is passed over; silence loses the connection."""
    async with FakeDaemon(stream_plan=[stream], capabilities=["events.stream"], heartbeat=BEAT) as fake:
        async with following(fake.url) as follower:
            await follower.until(lines[-1], lines.count(lines[-1]))
            assert follower.lines == lines


async def test_a_client_in_another_language_asks_again_where_it_may_be_well_later() -> None:
    """Of a daemon that is stopping, has too many readers, or cuts the connection."""
    plan = [Answer.problem(503), Answer.problem(429), Answer(reset=True)]
    async with FakeDaemon(stream_plan=plan, capabilities=["events.stream"], heartbeat=BEAT) as fake:
        async with following(fake.url) as follower:
            await follower.until("live")
            assert (follower.lines, fake.followed) == (["live"], [None] * 4)
