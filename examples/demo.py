"""The whole thing for real: stale pages, one awaited bust, a killed daemon, and what is said when nobody is left.

    python examples/demo.py

In the first act two daemons run in processes of their own over one cache, a small shop (shop.py) serves pages from it,
and readers come over HTTP. In the second, two web workers (worker.py) keep prices in memories of their own, and one
bust reaches both. Everything lives in a temporary directory and is gone afterwards, also after Ctrl-C. The exit code is
0 only if every expectation held.
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
import worker
from aiohttp import web

from pybustcall import BustcallClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEADLINE = 5.0  # seconds: of one bust, which is the client's default
PATIENCE = 20.0  # seconds for a process to start, even on a busy machine
GRACE = 2.0  # seconds for a process to end before it is killed
TEAPOT = 7
EXAMPLES = Path(__file__).parent

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


# The daemons and the workers


@dataclass
class Server:
    """A daemon or a web worker in a process of its own."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    url: str = ""

    async def wait_ready(self) -> None:
        """Wait until it says, in one line of JSON, where it listens; then tell that."""
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        try:
            async with asyncio.timeout(PATIENCE):
                line = await self.process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise DemoFailedError(f"the {self.name} did not start:\n{self.log.read_text()}")
        self.url = json.loads(line)["url"]
        say(f"   {self.name:<30} {self.url} (pid {self.process.pid})")

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
async def started(name: str, directory: Path, *command: str, url: str = "") -> AsyncIterator[Server]:
    """Start a Python process, which may need to know a daemon's URL; afterwards it is gone."""
    # A token or a URL meant for other daemons is not for these.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BUSTCALL_")}
    if url:
        environment["BUSTCALL_URL"] = url
    log = directory / f"{name}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=descriptor, env=environment
        )
    finally:
        os.close(descriptor)
    server = Server(name, process, log)
    try:
        yield server
    finally:
        await server.stop()


def daemon_command(*options: str) -> list[str]:
    """Tell how to start a daemon on a port that the system chooses."""
    return ["-m", "pybustcall", "daemon", *options, "--port", "0", "--json"]


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


def http_to(url: str) -> aiohttp.ClientSession:
    """Make a session for those who ask there."""
    return aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=2 * DEADLINE))


async def post_price(http: aiohttp.ClientSession, price: str) -> tuple[dict[str, Any], float]:
    """Have the teapot's price changed; return the answer, and how many seconds it took."""
    begun = time.perf_counter()
    async with http.post(f"/products/{TEAPOT}/price", json={"price": price}) as response:
        answer = await response.json()
    return {"http": response.status, **answer}, time.perf_counter() - begun


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
        return await post_price(self.http, price)


def told_price(answer: dict[str, Any], who: dict[str, str], seconds: float) -> str:
    """Say in short what came of a change."""
    by = f" by {who.get(answer['daemon'], 'nobody')}" if "daemon" in answer else ""
    late = "" if seconds < DEADLINE else ", LATE"
    return f"{answer['status']}{by}, stage {answer['stage']}{late}"


# The first act: a cache of files, and a daemon that is killed


async def tell_of_pages(story: Story, visitors: Visitors, hub: Server, peer: Server, database: Path) -> None:
    """Play it, chapter by chapter."""
    who = {hub.url: "hub", peer.url: "peer"}

    async def change_price(price: str, expected: str) -> None:
        answer, seconds = await visitors.post(price)
        story.note(f"POST price {price}", expected, told_price(answer, who, seconds), seconds)

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


async def play_pages(story: Story, directory: Path) -> None:
    """Set the stage of the first act, and play it."""
    cache, entries, database = directory / "cache", directory / "entries.json", directory / "shop.db"
    cache.mkdir()
    entries.write_text(json.dumps(shop.registrations()))
    async with AsyncExitStack() as stack:
        say("Two daemons start, in processes of their own.")
        command = daemon_command("--root", str(cache), "--register", str(entries))
        hub, peer = [await stack.enter_async_context(started(name, directory, *command)) for name in ("hub", "peer")]
        for daemon in (hub, peer):
            await daemon.wait_ready()
        client = BustcallClient(hub.url, peers=[peer.url], timeout=DEADLINE)
        url = await stack.enter_async_context(open_shop(database, cache, client))
        say(f"   {'shop':<30} {url} (in this process)")
        http = await stack.enter_async_context(http_to(url))
        await tell_of_pages(story, Visitors(http, story), hub, peer, database)


# The second act: values in the memories of two processes


@dataclass
class Customer:
    """Somebody who speaks to one of the workers over HTTP, and notes what he sees."""

    name: str
    http: aiohttp.ClientSession
    story: Story

    async def ask(self) -> str:
        """Tell the teapot's price, and whether the worker held it in its memory."""
        async with self.http.get(f"/products/{TEAPOT}") as response:
            answer = await response.json()
        return f"{answer['price']} {answer['source']}"

    async def read(self, expected: str) -> None:
        """Read once, and note it."""
        begun = time.perf_counter()
        seen = await self.ask()
        self.story.note(self.name, expected, seen, time.perf_counter() - begun)

    async def read_soon(self, expected: str, what: str) -> None:
        """Read until it is what is expected, at most as long as a bust may take; note how long that took."""
        begun = time.perf_counter()
        while True:
            seen, seconds = await self.ask(), time.perf_counter() - begun
            if seen == expected or seconds > DEADLINE:
                break
            await asyncio.sleep(0.001)
        self.story.note(f"{self.name}, {what}", expected, seen, seconds)

    async def post(self, price: str) -> tuple[dict[str, Any], float]:
        """Have the worker change the teapot's price; return its answer, and how many seconds it took."""
        return await post_price(self.http, price)


async def tell_of_memories(story: Story, first: Customer, second: Customer, daemon: Server, database: Path) -> None:
    """Play it, chapter by chapter."""
    story.begin("g", "Each worker loads the price from the database, and holds it in its own memory.")
    for customer in (first, second):
        await customer.read("14.00 loaded")
        await customer.read("14.00 held")

    story.begin("h", "The price becomes 15.00 in the database. Nobody tells: both serve what they hold.")
    await asyncio.to_thread(shop.write_price, database, TEAPOT, "15.00")
    for customer in (first, second):
        await customer.read("14.00 held")

    story.begin("i", "The price becomes 16.00 through worker 1, which awaits one bust: both are fresh.")
    answer, seconds = await first.post("16.00")
    story.note("POST price 16.00", "busted, stage 12", told_price(answer, {}, seconds), seconds)
    await first.read("16.00 loaded")
    await second.read_soon("16.00 loaded", "since then")

    story.begin("j", "The daemon is killed, the price becomes 17.00: nobody can tell the workers.")
    await daemon.kill()
    answer, seconds = await first.post("17.00")
    story.note("POST price 17.00: HTTP status", "503", str(answer["http"]), seconds)
    for customer in (first, second):
        await customer.read_soon("17.00 loaded", f"after {worker.GRACE:g} s at most")


async def play_memories(story: Story, directory: Path) -> None:
    """Set the stage of the second act, and play it."""
    database = directory / "shop.db"
    async with AsyncExitStack() as stack:
        say()
        say("Now a daemon that tells everybody of each bust, and two web workers over the same database.")
        options = ("--backend", "memory", "--journal", str(directory / "journal.db"))
        daemon = await stack.enter_async_context(started("daemon", directory, *daemon_command(*options)))
        await daemon.wait_ready()
        command = (str(EXAMPLES / "worker.py"), str(database), "0")
        names = ("worker 1", "worker 2")
        workers = [
            await stack.enter_async_context(started(name, directory, *command, url=daemon.url)) for name in names
        ]
        customers = []
        for server in workers:
            await server.wait_ready()
            http = await stack.enter_async_context(http_to(server.url))
            customers.append(Customer(server.name, http, story))
        first, second = customers
        await tell_of_memories(story, first, second, daemon, database)


async def play(story: Story) -> None:
    """Play both acts, and clear everything away, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="bustcall-demo-") as name:
        try:
            await play_pages(story, Path(name))
            await play_memories(story, Path(name))
        finally:
            # A thread that still writes must not meet a directory that is being removed.
            await asyncio.get_running_loop().shutdown_default_executor()


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
