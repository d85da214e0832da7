"""Redis behind FastAPI: a cached page in three lines, one awaited bust after each write, and what a dead Redis costs.

    pip install fastapi uvicorn 'pybustcall[daemon,redis]'
    python examples/fastapi_redis.py

`create_app` is a service to copy from; all else is the stage: a Redis server and a daemon in processes of their own,
and readers who come over HTTP. Everything is in a temporary directory and is gone afterwards, also after Ctrl-C. The
exit code is 0 only if all was as expected. With the URL of a Redis that runs already (redis://127.0.0.1:6379/0) that
one is used, under names that begin with "example-", and it is not killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Response
    from pydantic import BaseModel
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    from pybustcall import BustcallClient
    from pybustcall.integrations.redis import RedisCache
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing; install it with: pip install fastapi uvicorn 'pybustcall[daemon,redis]'")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PATIENCE = 20.0  # seconds for a process to start, or for a job to end, even on a busy machine
TEAPOT = 7
SCHEMES = ("redis://", "rediss://", "unix://")


# The service


class Products:
    """Stands for your database. It answers once `answering` is set; `reads` counts how often it was asked."""

    def __init__(self) -> None:
        self._prices = {TEAPOT: Decimal("10.00")}
        self.reads = 0
        self.asked = asyncio.Event()
        self.quick = self.answering = asyncio.Event()
        self.quick.set()

    async def read(self, number: int) -> Decimal | None:
        """Tell a product's price, or None if there is no such product."""
        price, answering = self._prices.get(number), self.answering
        self.reads += 1
        self.asked.set()
        await answering.wait()  # what was read is on its way, however long that takes
        return price

    async def write(self, number: int, price: Decimal) -> None:
        """Store a product's price."""
        self._prices[number] = price


class Change(BaseModel):
    """What is sent to change a price."""

    price: Decimal


def create_app(products: Products, cache: RedisCache, client: BustcallClient) -> FastAPI:
    """Make the service. It closes the cache's and the client's connections with itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client, cache:
            yield

    app = FastAPI(lifespan=lifespan)

    async def render(number: int) -> bytes:
        price = await products.read(number)
        if price is None:
            raise HTTPException(404)  # nothing is stored then
        return json.dumps({"number": number, "price": str(price)}).encode()

    @app.get("/products/{number}")
    async def product(number: int) -> Response:
        key, tags = f"products/{number}", [f"product:{number}"]
        page = await cache.get_or_set(key, partial(render, number), tags=tags, ttl=300.0)
        return Response(page, media_type="application/json")

    @app.put("/products/{number}/price")
    async def change_price(number: int, change: Change) -> dict[str, str | None]:
        await products.write(number, change.price)  # first the truth
        result = await client.bust(f"product:{number}", kind="tag", reason="a price was changed")  # then the bust
        return {"status": result.status, "job": result.job}

    return app


class Server(uvicorn.Server):
    """A server that leaves the signals to this script; run by `uvicorn` itself, a service has no need of it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """Serve at a free port; tell the URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", ws="none", timeout_graceful_shutdown=1)
    server = Server(config)
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            if task.done():
                raise StageError("the service did not start")
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


# What was expected, and what came


@dataclass(frozen=True)
class Row:
    """One expectation; `expected` may name two, with "or" between them."""

    asked: str
    expected: str
    came: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it held."""
        return self.came in self.expected.split(" or ")


@dataclass
class Story:
    """What has been told so far."""

    rows: list[Row] = field(default_factory=list)
    chapter: str = ""

    def begin(self, chapter: str, text: str) -> None:
        """Open a chapter."""
        self.chapter = chapter
        print(f"\n{chapter}. {text}", flush=True)

    def note(self, asked: str, expected: str, came: str, begun: float) -> None:
        """Take down one expectation, and tell what came."""
        row = Row(f"{self.chapter}. {asked}", expected, came, time.perf_counter() - begun)
        self.rows.append(row)
        print(f"   {asked:<32} {came}{'' if row.ok else f'  (expected: {expected})'}", flush=True)

    def table(self) -> str:
        """Sum up."""
        line = "-" * 96
        rows = [
            f"{row.asked:<36} {row.expected:<24} {row.came[:24]:<24} {row.seconds * 1000:>6.1f} "
            + ("yes" if row.ok else "NO")
            for row in self.rows
        ]
        head = f"{'what was asked':<36} {'expected':<24} {'came':<24} {'ms':>6} ok"
        return "\n".join([line, head, line, *rows, line])


# The stage


class StageError(Exception):
    """The stage could not be set."""


@dataclass
class RedisServer:
    """A Redis server that keeps nothing on the disk; started again, it has the same port."""

    program: str
    directory: Path
    process: Process | None = None
    port: int = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        if not self.port:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
        options = {"bind": "127.0.0.1", "port": str(self.port), "save": "", "appendonly": "no", "daemonize": "no"}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.process = await asyncio.create_subprocess_exec(
            self.program, *words, stdin=DEVNULL, stdout=DEVNULL, cwd=self.directory
        )
        async with asyncio.timeout(PATIENCE):
            while not await self._answers():
                if self.process.returncode is not None:
                    raise StageError(f"{self.program} ended with {self.process.returncode} before it listened")
                await asyncio.sleep(0.01)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
        finally:
            writer.close()

    async def kill(self) -> None:
        """End it as `kill -9` does."""
        process, self.process = self.process, None
        await _kill(process)


async def _kill(process: Process | None) -> None:
    if process is not None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


CONFIGURATION = """\
[listen]
port = 0                     # any that is free

[journal]
path = "journal.db"          # what was answered survives a kill

[[layers]]
backend = "redis"
url_env = "REDIS_URL"        # it may have a password
prefix = "{prefix}"
timeout = 0.5
"""


@asynccontextmanager
async def started_daemon(directory: Path, url: str, prefix: str) -> AsyncIterator[str]:
    """Start a daemon on that Redis; tell its URL."""
    settings = directory / "bustcall.toml"
    settings.write_text(CONFIGURATION.format(prefix=prefix))
    # A token or a URL meant for other daemons is not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BUSTCALL_")}
    environment["REDIS_URL"] = url
    command = [sys.executable, "-m", "pybustcall", "daemon", "--config", str(settings), "--json"]
    log = directory / "daemon.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=file, env=environment)
    try:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        async with asyncio.timeout(PATIENCE):
            line = await process.stdout.readline()
        if not line:
            raise StageError(f"the daemon did not start:\n{log.read_text()}")
        yield json.loads(line)["url"]
    finally:
        await _kill(process)


@asynccontextmanager
async def redis_to_use(
    given: str | None, directory: Path, prefix: str
) -> AsyncIterator[tuple[str, RedisServer | None]]:
    """Tell the URL of the Redis that was given; or else start one, and tell that, too."""
    if given is not None:
        async with Redis.from_url(given) as redis:
            try:
                await redis.ping()
            except RedisError as error:
                raise StageError(f"the Redis that was given cannot be used: {error}") from error
            try:
                yield given, None
            finally:
                async for key in redis.scan_iter(match=f"{prefix}:*", count=1000):
                    await redis.unlink(key)
        return
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise StageError(
            "redis-server is missing; install it, on Debian or Ubuntu with: apt-get install redis-server\n"
            "or name a Redis that runs: python examples/fastapi_redis.py redis://127.0.0.1:6379/0"
        )
    server = RedisServer(program, directory)
    try:
        await server.start()
        yield server.url, server
    finally:
        await server.kill()


# The story


@dataclass
class Visitors:
    """A reader and the owner, who speak to the service over HTTP."""

    http: aiohttp.ClientSession
    products: Products
    story: Story

    async def price(self) -> str:
        """Read the teapot's price."""
        async with self.http.get(f"/products/{TEAPOT}") as response:
            return str((await response.json())["price"]) if response.ok else f"HTTP {response.status}"

    async def read(self, expected: str, asked: str = "GET") -> None:
        """Read the price, and tell whether the database was asked for it."""
        begun, before = time.perf_counter(), self.products.reads
        price = await self.price()
        self.story.note(asked, expected, f"{price} {'made' if self.products.reads > before else 'cached'}", begun)

    async def write(self, price: str, expected: str) -> str | None:
        """Change the price; tell the job that the bust is, if it is one."""
        begun = time.perf_counter()
        async with self.http.put(f"/products/{TEAPOT}/price", json={"price": price}) as response:
            answer = await response.json() if response.ok else {"status": f"HTTP {response.status}"}
        self.story.note(f"PUT {price}, and bust", expected, answer["status"], begun)
        job: str | None = answer.get("job")
        return job


async def tell(visitors: Visitors, client: BustcallClient, redis: RedisServer | None) -> None:
    """Play it all, chapter by chapter."""
    story, products = visitors.story, visitors.products

    story.begin("a", "Two readers come: the first has the value made, the second gets it from Redis.")
    await visitors.read("10.00 made")
    await visitors.read("10.00 cached", "GET again")

    story.begin("b", "The price is changed, and its tag is busted: nobody sees the old one any more.")
    await visitors.write("11.00", "busted")
    await visitors.read("11.00 made")
    await visitors.read("11.00 cached", "GET again")

    story.begin("c", "A reader asks a slow database; the price is changed before the answer has arrived.")
    await visitors.write("12.00", "busted")
    late = products.answering = asyncio.Event()
    products.asked.clear()
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        slow = group.create_task(visitors.price())
        await products.asked.wait()
        products.answering = products.quick
        await visitors.write("13.00", "busted")
        await visitors.read("13.00 made", "GET by another")
        late.set()
        story.note("the slow GET, from before", "12.00", await slow, begun)
    await visitors.read("13.00 cached", "GET: was the old one stored?")

    if redis is None:
        return
    story.begin("d", "Redis is killed. Readers are served from the database; the daemon keeps the bust.")
    await redis.kill()
    await visitors.read("13.00 made")
    job = await visitors.write("14.00", "accepted or partial")
    await visitors.read("14.00 made")

    story.begin("e", "Redis is back: the daemon does what it had promised, and the cache fills again.")
    begun = time.perf_counter()
    await redis.start()
    state = (await client.wait_job(job, timeout=PATIENCE)).state if job else "no job"
    story.note("the bust of 14.00", "done", state, begun)
    await until_cached(visitors)
    await visitors.read("14.00 cached")


async def until_cached(visitors: Visitors) -> None:
    """Read until the service has found out that Redis is back, which takes a second at most."""
    async with asyncio.timeout(PATIENCE):
        while True:
            before = visitors.products.reads
            await visitors.price()
            if visitors.products.reads == before:
                return
            await asyncio.sleep(0.05)


async def play(story: Story, given: str | None) -> None:
    """Set the stage, play, and clear everything away, whatever happens."""
    prefix = f"example-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastapi-redis-")))
        url, redis = await stack.enter_async_context(redis_to_use(given, directory, prefix))
        daemon = await stack.enter_async_context(started_daemon(directory, url, prefix))
        products, client = Products(), BustcallClient(daemon)
        service = await stack.enter_async_context(served(create_app(products, RedisCache(url, prefix=prefix), client)))
        http = await stack.enter_async_context(aiohttp.ClientSession(service))
        print(f"Redis   {url if redis else 'as given'}\ndaemon  {daemon}\nservice {service}")
        await tell(Visitors(http, products, story), client, redis)


async def run(signals: list[int], given: str | None) -> int:
    """Play until the end, or until the first SIGINT or SIGTERM, which is noted; return the exit code."""
    loop = asyncio.get_running_loop()
    task: asyncio.Task[Any] | None = asyncio.current_task()
    assert task is not None  # noqa: S101 - we are in one

    def stop(number: int) -> None:
        if not signals:  # a second one would only interrupt the clearing away
            signals.append(number)
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    story = Story()
    await play(story, given)
    held = sum(row.ok for row in story.rows)
    print(f"\n{story.table()}\n{held} of {len(story.rows)} expectations held; all cleared away.")
    return 0 if held == len(story.rows) else 1


def main(arguments: list[str]) -> int:
    """Run it; return the exit code, which is 130 after Ctrl-C and 143 after SIGTERM."""
    if len(arguments) > 1 or (arguments and not arguments[0].startswith(SCHEMES)):
        print("usage: python examples/fastapi_redis.py [redis://HOST:PORT/DB]", file=sys.stderr)
        return 2
    signals: list[int] = []
    try:
        return asyncio.run(run(signals, arguments[0] if arguments else None))
    except asyncio.CancelledError:
        number = signals[0] if signals else signal.SIGINT
        print(f"\nstopped by {signal.Signals(number).name}; all cleared away.", file=sys.stderr)
        return 128 + number
    except StageError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
