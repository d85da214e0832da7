"""The whole thing for real: stale pages, one awaited bust, a killed daemon, and what is said when nobody is left.

    python examples/demo.py

Two daemons run in processes of their own over one cache, a small shop (shop.py) serves pages from it, and readers come
over HTTP. Everything lives in a temporary directory and is gone afterwards, also after Ctrl-C. The exit code is 0 only
if every expectation held.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import shop
from aiohttp import web

from pybustcall import BustcallClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEADLINE = 5.0  # seconds: of one bust, which is the client's default
PATIENCE = 20.0  # seconds for a daemon to start, even on a busy machine
GRACE = 2.0  # seconds for a daemon to end before it is killed
TEAPOT = 7

GREEN, RED, BOLD, PLAIN = "32", "31", "1", "0"
COLOURS = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

READERS = {  # what each reader asks for: path, Accept-Encoding
    "page": ("/products/7.html", "identity"),
    "German variant": ("/products/7.html?lang=de", "identity"),
    "gzip variant": ("/products/7.html", "gzip"),
    "front page": ("/", "identity"),
}


class DemoFailedError(Exception):
    """The demo could not go on."""


def paint(text: str, colour: str) -> str:
    """Colour a text, if this terminal wants colours."""
    return f"\x1b[{colour}m{text}\x1b[{PLAIN}m" if COLOURS else text


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


# What was expected, and what was seen


@dataclass(frozen=True)
class Row:
    """One expectation."""

    asked: str
    expected: str
    seen: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it held."""
        return self.seen == self.expected


@dataclass
class Story:
    """What has been told so far."""

    rows: list[Row] = field(default_factory=list)
    chapter: str = ""

    def begin(self, chapter: str, text: str) -> None:
        """Open a chapter."""
        self.chapter = chapter
        say()
        say(paint(f"{chapter}. {text}", BOLD))

    def note(self, asked: str, expected: str, seen: str, seconds: float) -> None:
        """Take down one expectation, and tell what was seen."""
        row = Row(f"{self.chapter}. {asked}", expected, seen, seconds)
        self.rows.append(row)
        unlike = "" if row.ok else paint(f"  (expected: {expected})", RED)
        say(f"   {asked:<30} {seen}{unlike}")

    def table(self) -> str:
        """Sum up, in 100 columns."""
        line = "-" * 98
        lines = [line, f"{'what was asked':<32} {'expected':<26} {'seen':<26} {'ms':>7} ok", line]
        for row in self.rows:
            verdict = paint("yes", GREEN) if row.ok else paint("NO", RED)
            asked, expected, seen = row.asked[:32], row.expected[:26], row.seen[:26]
            lines.append(f"{asked:<32} {expected:<26} {seen:<26} {row.seconds * 1000:>7.1f} {verdict}")
        return "\n".join([*lines, line])

    @property
    def ok(self) -> bool:
        """Whether every expectation held."""
        return all(row.ok for row in self.rows)


# The daemons


@dataclass
class Daemon:
    """A daemon in a process of its own."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    url: str = ""

    async def wait_ready(self) -> None:
        """Wait until it says, in one line of JSON, where it listens."""
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            async with asyncio.timeout(PATIENCE):
                line = await self.process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise DemoFailedError(f"the {self.name} did not start:\n{self.log.read_text()}")
        self.url = json.loads(line)["url"]

    async def kill(self) -> int:
        """End it as `kill -9` does, and wait until it is gone; return its exit code."""
        os.kill(self.process.pid, signal.SIGKILL)
        await self.process.communicate()
        return await self.process.wait()

    async def stop(self) -> None:
        """Ask it to end, and see to it that it does."""
        with suppress(ProcessLookupError):
            if self.process.returncode is None:
                self.process.terminate()
        try:
            async with asyncio.timeout(GRACE):
                await self.process.communicate()
        except TimeoutError:
            await self.kill()


@asynccontextmanager
async def started_daemon(name: str, cache: Path, entries: Path, log: Path) -> AsyncIterator[Daemon]:
    """Start a daemon on a port that the system chooses; afterwards it is gone."""
    # A token or a URL meant for other daemons is not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BUSTCALL_")}
    command = [sys.executable, "-m", "pybustcall", "daemon", "--root", str(cache), "--register", str(entries)]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    try:
        process = await asyncio.create_subprocess_exec(
            *command, "--port", "0", "--json", stdout=asyncio.subprocess.PIPE, stderr=descriptor, env=environment
        )
    finally:
        os.close(descriptor)
    daemon = Daemon(name, process, log)
    try:
        yield daemon
    finally:
        await daemon.stop()


# The shop and its visitors


@asynccontextmanager
async def open_shop(database: Path, cache: Path, client: BustcallClient) -> AsyncIterator[str]:
    """Open the shop in this process; tell its URL."""
    runner = web.AppRunner(shop.create_app(database, cache, client), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class Visitors:
    """Readers and the owner, who speak to the shop over HTTP and note what they see."""

    http: aiohttp.ClientSession
    story: Story

    async def read(self, reader: str, expected: str, what: str = "") -> None:
        """Read the teapot's price as one of the readers does, and tell whether the page came from the cache."""
        path, encoding = READERS[reader]
        begun = time.perf_counter()
        async with self.http.get(path, headers={"Accept-Encoding": encoding}) as response:
            text = await response.text()
        seconds = time.perf_counter() - begun
        price = re.search(rf'id="price-{TEAPOT}">([0-9.]+)<', text)
        coded = response.headers.get("Content-Encoding", "identity")
        seen = f"{price[1]} {response.headers['X-Page']}" if price and coded == encoding else f"HTTP {response.status}"
        self.story.note(what or reader, expected, seen, seconds)

    async def read_all(self, expected: str) -> None:
        """Read as every reader does."""
        for reader in READERS:
            await self.read(reader, expected)

    async def post(self, price: str) -> tuple[dict[str, Any], float]:
        """Have the shop change the teapot's price; return its answer, and how many seconds it took."""
        begun = time.perf_counter()
        async with self.http.post(f"/products/{TEAPOT}/price", json={"price": price}) as response:
            answer = await response.json()
        return {"http": response.status, **answer}, time.perf_counter() - begun


# The story


async def tell(story: Story, visitors: Visitors, hub: Daemon, peer: Daemon, database: Path) -> None:
    """Play it all, chapter by chapter."""
    who = {hub.url: "hub", peer.url: "peer"}

    async def change_price(price: str, expected: str) -> None:
        answer, seconds = await visitors.post(price)
        seen = f"{answer['status']} by {who.get(answer.get('daemon', ''), 'nobody')}, stage {answer['stage']}"
        seen += "" if seconds < DEADLINE else ", LATE"
        story.note(f"POST price {price}", expected, seen, seconds)

    story.begin("a", "Four readers come. Each page is rendered from the database, then kept in the cache.")
    await visitors.read_all("10.00 rendered")

    story.begin("b", "The price becomes 11.00 in the database. Nobody tells the cache: its page is stale.")
    await asyncio.to_thread(shop.write_price, database, TEAPOT, "11.00")
    await visitors.read("page", "10.00 cached", "page, stale")

    story.begin("c", "The price becomes 12.00, and the shop awaits one bust: every page is fresh.")
    await change_price("12.00", "busted by hub, stage 12")
    await visitors.read_all("12.00 rendered")

    story.begin("d", f"kill -9 {hub.process.pid}: the hub is gone, without a word.")
    begun = time.perf_counter()
    code = await hub.kill()
    seen = "killed by SIGKILL" if code == -signal.SIGKILL else f"exit code {code}"
    story.note("hub after kill -9", "killed by SIGKILL", seen, time.perf_counter() - begun)

    story.begin("e", f"The price becomes 13.00. The peer serves the bust, well within {DEADLINE:g} s: fresh again.")
    await change_price("13.00", "busted by peer, stage 9")
    await visitors.read_all("13.00 rendered")

    story.begin("f", "Both daemons are dead, and the price becomes 14.00. The shop says so; it never pretends.")
    await peer.kill()
    answer, seconds = await visitors.post("14.00")
    story.note("POST price 14.00: HTTP status", "503", str(answer["http"]), seconds)
    story.note("its error", "DaemonsUnavailable", str(answer.get("error")), seconds)
    story.note("was the bust applied?", "no", answer["applied"], seconds)
    say(textwrap.indent(textwrap.fill(str(answer.get("detail")).replace("…", "..."), 94), "      "))
    await visitors.read("page", "13.00 cached", "page, stale, as was said")


async def play(story: Story) -> None:
    """Set the stage, play, and clear everything away, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="bustcall-demo-") as name:
        directory = Path(name)
        cache, entries, database = directory / "cache", directory / "entries.json", directory / "shop.db"
        cache.mkdir()
        entries.write_text(json.dumps(shop.registrations()))
        async with AsyncExitStack() as stack:
            # Last of all: a thread that still writes must not meet a directory that is being removed.
            stack.push_async_callback(asyncio.get_running_loop().shutdown_default_executor)
            say("Two daemons start, in processes of their own.")
            hub, peer = [
                await stack.enter_async_context(started_daemon(name, cache, entries, directory / f"{name}.log"))
                for name in ("hub", "peer")
            ]
            for daemon in (hub, peer):
                await daemon.wait_ready()
                say(f"   {daemon.name:<30} {daemon.url} (pid {daemon.process.pid})")
            client = BustcallClient(hub.url, peers=[peer.url], timeout=DEADLINE)
            url = await stack.enter_async_context(open_shop(database, cache, client))
            say(f"   {'shop':<30} {url} (in this process)")
            patience = aiohttp.ClientTimeout(total=2 * DEADLINE)
            http = await stack.enter_async_context(aiohttp.ClientSession(url, timeout=patience))
            await tell(story, Visitors(http, story), hub, peer, database)


async def run(signals: list[int]) -> int:
    """Play until the end, or until the first SIGINT or SIGTERM, which is noted; return the exit code."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we are in one

    def stop(number: int) -> None:
        if not signals:  # a second one would only interrupt the clearing away, which has its own deadlines
            signals.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    begun = time.perf_counter()
    story = Story()
    await play(story)
    say()
    say(story.table())
    held = sum(row.ok for row in story.rows)
    total = f"{held} of {len(story.rows)} expectations held, in {time.perf_counter() - begun:.1f} s; all cleared away."
    say(paint(total, GREEN if story.ok else RED))
    return 0 if story.ok else 1


def main() -> int:
    """Run the demo; return its exit code, which is 130 after Ctrl-C and 143 after SIGTERM."""
    signals: list[int] = []
    try:
        return asyncio.run(run(signals))
    except asyncio.CancelledError:
        number = signals[0] if signals else signal.SIGINT
        print(f"\nstopped by {signal.Signals(number).name}; all cleared away.", file=sys.stderr)
        return 128 + number
    except DemoFailedError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
