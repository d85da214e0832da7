"""A FastAPI service with its cache in Redis, as the how-to page has it, under 200 readers: none is served what is old.

Everything is what a user has: the page's own service, run by uvicorn in two processes, a daemon that the page's own
configuration describes, a Redis server, and readers who come over TCP. The same check is made of services that do what
the page warns of, and must find each of them out.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import aiohttp
import pytest

from pybustcall import BustcallClient
from pybustcall.integrations.redis import RedisCache
from tests.configured_daemons import ConfiguredDaemons
from tests.conftest import PATIENCE, DaemonProcess, eventually
from tests.engines import RedisProcess, free_port

PAGE: Final = (Path(__file__).parent.parent / "docs" / "how-to" / "redis-behind-fastapi.md").read_text(encoding="utf-8")
BLOCKS: Final = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
[CONFIGURATION] = [text for language, text in BLOCKS if language == "toml"]
SERVICE, *SNIPPETS, IN_TESTS = [text for language, text in BLOCKS if language == "python"]
READERS = 200

# What stands for the user's database. A worker that has a GATE holds what it has read for as long as that file exists.
PRODUCTS = """
import asyncio, os, sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

def _run(statement, *values):
    with closing(sqlite3.connect("shop.db")) as connection, connection:
        return connection.execute(statement, values).fetchone()

_run("CREATE TABLE IF NOT EXISTS prices (number INTEGER PRIMARY KEY, price TEXT)")
_run("INSERT OR IGNORE INTO prices VALUES (7, '1')")

async def read_price(number):
    with open("reads", "ab") as reads:
        reads.write(b"x")
    (price,) = await asyncio.to_thread(_run, "SELECT price FROM prices WHERE number = ?", number)
    gate = Path(os.environ.get("GATE", "no gate"))
    if gate.exists():
        gate.with_suffix(".reached").touch()
        while gate.exists():
            await asyncio.sleep(0.002)
    return price

async def write_price(number, price):
    await asyncio.to_thread(_run, "UPDATE prices SET price = ? WHERE number = ?", str(price), number)
"""


def edited(text: str, *changes: tuple[str, str]) -> str:
    """Change a text in places of which there is exactly one, each."""
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@final
class Workers:
    """The service in two processes, which share a database: the second one is slow while `gate` exists."""

    def __init__(self, directory: Path, service: str, env: dict[str, str]) -> None:
        self.gate = directory / "gate"
        self._directory = directory
        (directory / "service.py").write_text(service, encoding="utf-8")
        (directory / "products.py").write_text(PRODUCTS, encoding="utf-8")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        self.urls: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for more in ({}, {"GATE": str(self.gate)}):
            port = free_port()
            command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port), "--log-level", "warning"]
            log = directory / f"worker-{port}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, cwd=directory, env={**inherited, **env, **more}, stdout=file, stderr=file
                )
            self._processes.append(process)
            self.urls.append(f"http://127.0.0.1:{port}")

    async def listen(self, http: aiohttp.ClientSession) -> None:
        """Wait until both answer."""
        async with asyncio.timeout(PATIENCE):
            for url, process in zip(self.urls, self._processes, strict=True):
                while True:
                    assert process.poll() is None, [log.read_text() for log in self._directory.glob("worker-*.log")]
                    try:
                        await (await http.get(f"{url}/openapi.json")).read()
                        break
                    except aiohttp.ClientConnectionError:
                        await asyncio.sleep(0.02)

    def reads(self) -> int:
        """Tell how often the database was read."""
        return (self._directory / "reads").stat().st_size

    def close(self) -> None:
        """End both."""
        self.gate.unlink(missing_ok=True)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(PATIENCE)


@final
@dataclass
class Site:
    """The whole of it."""

    redis: RedisProcess
    daemons: ConfiguredDaemons
    daemon: DaemonProcess
    workers: Workers


OpenSite = Callable[..., Site]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisProcess]:
    with RedisProcess(tmp_path) as server:
        yield server


@pytest.fixture
def open_site(redis: RedisProcess, tmp_path: Path) -> Iterator[OpenSite]:
    """Start all of it; all is gone when the test ends."""
    with ExitStack() as stack:

        def start(service: str = SERVICE, configuration: str = CONFIGURATION, **env: str) -> Site:
            env["REDIS_URL"] = redis.url
            daemons = ConfiguredDaemons(tmp_path, configuration, env=env)
            stack.callback(daemons.close)
            daemon = daemons.start()
            workers = Workers(tmp_path, service, {**env, "BUSTCALL_URL": daemon.url})
            stack.callback(workers.close)
            return Site(redis, daemons, daemon, workers)

        yield start


@final
@dataclass(frozen=True, slots=True)
class Read:
    """What a reader saw; `floor` is the last version of which the bust had returned when it began to read."""

    floor: int
    seen: int


def late(reads: list[Read]) -> list[Read]:
    """List the reads that saw what was old before they began."""
    return [read for read in reads if read.seen < read.floor]


async def read_price(http: aiohttp.ClientSession, url: str) -> int:
    """Read the price of product 7, which tells its version."""
    async with http.get(f"{url}/products/7") as response:
        text = await response.text()
        assert response.status == 200, text
    found = re.fullmatch(r"<h1>Product 7: (\d+)</h1>", text)
    assert found is not None, text
    return int(found[1])


async def write_price(http: aiohttp.ClientSession, url: str, price: int) -> str:
    """Have the service change the price; tell what its bust came to."""
    async with http.put(f"{url}/products/7/price", json={"price": price}) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["status"])


def visitors() -> aiohttp.ClientSession:
    """Let as many read at a time as want to."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=2 * PATIENCE)
    )


async def hammered(site: Site) -> list[Read]:
    """Let 200 read without end while the price is changed, and a fill that began before all that end after it."""
    workers, (quick, slow) = site.workers, site.workers.urls
    reads: list[Read] = []
    floor, asked, stop = 1, [quick], False

    async def read_on(first: int) -> None:
        for turn in itertools.count(first):
            if stop:
                return
            known = floor
            seen = await read_price(http, asked[turn % len(asked)])
            reads.append(Read(known, seen))

    async def more(number: int) -> None:
        enough = len(reads) + number
        await eventually(lambda: len(reads) >= enough, f"{number} more reads")

    async def quiet() -> None:
        """Let no bust be under way, nor a fill: where there is no fence, a second bust follows after a second."""
        async with asyncio.timeout(PATIENCE):
            while not all(job.is_over for job in await client.jobs()):
                await asyncio.sleep(0.02)
            before = -1
            while before != workers.reads():
                before = workers.reads()
                await more(2 * READERS)

    async with visitors() as http, BustcallClient(site.daemon.url, probes=None) as client:
        await workers.listen(http)
        workers.gate.touch()
        async with asyncio.TaskGroup() as group:
            filling = group.create_task(read_price(http, slow))
            await eventually(workers.gate.with_suffix(".reached").exists, "the slow reader has read the old price")
            for number in range(READERS):
                group.create_task(read_on(number))
            await more(600)
            for version in (2, 3, 4):
                assert await write_price(http, quick, version) == "busted"
                floor = version
                await more(300)
            await quiet()
            assert not filling.done()
            workers.gate.unlink()
            assert await filling == 1, "who asked before the write may still be told what was true then"
            asked.append(slow)
            await more(600)
            stop = True
    return reads


@pytest.mark.requirement("REL-04")
async def test_no_read_that_begins_after_the_bust_has_returned_sees_the_old_version(open_site: OpenSite) -> None:
    """200 readers, three writes with a bust each, and a fill from before them that ends after; most reads are hits."""
    site = open_site()
    reads = await hammered(site)
    assert late(reads) == []
    assert {read.seen for read in reads} == {1, 2, 3, 4}
    assert site.workers.reads() < len(reads) / 4
    async with BustcallClient(site.daemon.url, probes=None) as client:
        jobs = await client.jobs()
    assert [(job.target, job.kind, job.state, job.reason) for job in jobs] == [
        ("product:7", "tag", "done", "a price was changed")
    ] * 3


FENCED = "    page = await cache.get_or_set(key, partial(render, number), tags=tags, ttl=300.0)\n"
BUST = 'client.bust(f"product:{number}", kind="tag", reason="a price was changed")'
BEHIND_THE_FENCE = (
    FENCED,
    """\
    found = await cache.get(key)
    page = found.value if found else await render(number)
    if found is None:
        await cache.set(key, page, tags=tags, ttl=300.0)
""",
)
PLAIN_SET = (
    FENCED,
    """\
    page = await plain.get(f"shop:{key}")
    if page is None:
        page = await render(number)
        await plain.set(f"shop:{key}", page, ex=300)
""",
)
PLAIN_CLIENT = (
    "app = FastAPI",
    """\
from redis.asyncio import Redis
plain = Redis.from_url(os.environ["REDIS_URL"], max_connections=1000)
app = FastAPI""",
)
FOREIGN = 'foreign = "shop:{key}"\n'


@pytest.mark.requirement("REL-04")
@pytest.mark.parametrize(
    ("changes", "foreign"),
    [
        pytest.param([BEHIND_THE_FENCE], "", id="stores-without-a-token"),
        pytest.param([PLAIN_SET, PLAIN_CLIENT, (BUST, 'client.bust(f"products/{number}")')], FOREIGN, id="plain-SET"),
        pytest.param([(BUST, "client.status()"), ("result.status", '"busted"')], "", id="does-not-bust"),
    ],
)
async def test_a_service_that_goes_behind_the_fences_back_is_found_out(
    changes: list[tuple[str, str]], foreign: str, open_site: OpenSite
) -> None:
    """The same check finds old versions where the service does what the page warns of."""
    site = open_site(edited(SERVICE, *changes), CONFIGURATION + foreign)
    assert late(await hammered(site))


@pytest.mark.requirement("REL-04")
async def test_reads_and_writes_go_on_while_redis_is_dead(open_site: OpenSite) -> None:
    """Readers get what is in the database, the bust is promised, and done once Redis is back."""
    site = open_site()
    async with visitors() as http, BustcallClient(site.daemon.url, probes=None) as client:
        await site.workers.listen(http)
        one, other = site.workers.urls
        assert [await read_price(http, url) for url in (one, other)] == [1, 1]
        site.redis.kill()
        for version in range(2, 7):
            assert await write_price(http, one, version) in {"accepted", "partial"}
            assert [await read_price(http, url) for url in (one, other)] == [version] * 2
        site.redis.start()
        for job in await client.jobs():
            assert (await client.wait_job(job.job, timeout=PATIENCE)).state == "done"
        before = site.workers.reads()
        async with asyncio.timeout(PATIENCE):
            while site.redis.ask("DBSIZE") == b":0\r\n":  # until a service has found out that it is back
                assert await read_price(http, one) == 6
        assert site.workers.reads() > before
        assert await write_price(http, other, 7) == "busted"
        assert [await read_price(http, url) for url in (one, other)] == [7, 7]


async def test_a_write_is_answered_without_a_daemon_and_its_bust_delivered_later(
    open_site: OpenSite, tmp_path: Path
) -> None:
    """With BUSTCALL_OUTBOX: deferred, and the old value is gone soon after a daemon is back."""
    site = open_site(BUSTCALL_OUTBOX=str(tmp_path / "bustcall-outbox.db"))
    async with visitors() as http:
        await site.workers.listen(http)
        one, other = site.workers.urls
        assert await read_price(http, one) == 1
        site.daemon.kill()
        assert await write_price(http, one, 2) == "deferred"
        assert await read_price(http, other) == 1
        await asyncio.to_thread(site.daemons.start, int(site.daemon.url.rsplit(":", 1)[1]))
        async with asyncio.timeout(PATIENCE):
            while await read_price(http, other) != 2:
                await asyncio.sleep(0.02)


def test_the_page_shows_what_the_check_says(redis: RedisProcess, tmp_path: Path) -> None:
    """Of the page's own configuration: it is in order; and with Redis gone it says so, and exits with 4."""
    (tmp_path / "bustcall.toml").write_text(CONFIGURATION)

    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pybustcall", "daemon", "--config", "bustcall.toml", "--check"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        env["REDIS_URL"] = redis.url
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    fine = check()
    assert fine.returncode == 0
    [shown] = [text for language, text in BLOCKS if language == "text"]
    assert shown.startswith(fine.stdout)
    redis.kill()
    broken = check()
    assert broken.returncode == 4
    assert "the layer redis cannot be used now" in broken.stdout + broken.stderr


def test_the_service_can_be_started_again_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its tests on the page do; here without a daemon and without Redis."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("BUSTCALL_DISABLED", "1")
    run_tests_of_page(IN_TESTS, SERVICE, tmp_path, monkeypatch)


def run_tests_of_page(tests: str, service: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tests that a page shows of its service, each two times."""
    (directory / "service.py").write_text(service, encoding="utf-8")
    (directory / "products.py").write_text(PRODUCTS, encoding="utf-8")
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setitem(sys.modules, "fastapi.testclient", module := types.ModuleType("fastapi.testclient"))
    vars(module).update(TestClient=Visitor)
    for name in ("service", "products"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        names: dict[str, Any] = {}
        exec(tests, names)
        found = [function for name, function in names.items() if name.startswith("test_")]
        assert found
        for function in found * 2:
            function()
    finally:
        for name in ("service", "products"):
            sys.modules.pop(name, None)


@final
class Visitor:
    """As much of FastAPI's TestClient as the pages use; the real one takes httpx."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._runner = asyncio.Runner()
        self._lifespan = app.router.lifespan_context(app)
        self._state: dict[str, object] = {}

    def __enter__(self) -> Visitor:
        self._state = self._runner.run(self._lifespan.__aenter__()) or {}
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()

    def get(self, path: str) -> Visited:
        return Visited(self._runner.run(self._ask(path)))

    async def _ask(self, path: str) -> bytes:
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": b"",
            "headers": [],
            "state": self._state,
        }
        sent: list[Any] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        assert sent[0]["status"] == 200
        return b"".join(message.get("body", b"") for message in sent)


@final
@dataclass(frozen=True, slots=True)
class Visited:
    """An answer to a `Visitor`."""

    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


async def run_snippet(text: str, **names: Any) -> dict[str, Any]:
    """Run a piece of the page inside a coroutine; tell what it named."""
    exec("async def snippet():\n" + textwrap.indent(text, "    ") + "    return locals()\n", names)
    found: dict[str, Any] = await names["snippet"]()
    return found


async def test_the_other_pieces_of_the_page_run(
    open_site: OpenSite, redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, wait, soft, tenants: each does what the page says of it."""
    by_hand, wait, soft, tenants = SNIPPETS
    monkeypatch.setenv("REDIS_URL", redis.url)
    site = open_site()

    async def render(number: int) -> bytes:
        return b"%d" % number

    async with RedisCache(redis.url) as cache, BustcallClient(site.daemon.url, probes=None) as client:
        names: dict[str, Any] = {"cache": cache, "client": client, "render": render}
        assert (await run_snippet(by_hand, **names))["stored"]
        assert (await run_snippet(by_hand, **names))["looked"].found.value == b"7"
        await run_snippet(soft, **names)
        found = await cache.get("products/7")
        assert found is not None
        assert found.stale
        assert (await run_snippet(wait, **names))["result"].ok
        assert await cache.get("products/7") is None
        await cache.set("products/7", b"ours", tags=["product:7"], ttl=60.0)
        tenant: RedisCache = (await run_snippet(tenants, os=os, RedisCache=RedisCache, partial=partial, **names))[
            "theirs"
        ]
        assert await tenant.get("products/7") is None
        await tenant.aclose()
        left = await cache.get("products/7")
        assert left is not None
        assert left.value == b"ours"
