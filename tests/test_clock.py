"""The clock of a host set back an hour: nothing stays stale, nothing hangs, and nothing is forgotten.

Daemons, Redis and clients are processes whose wall clock is set while they run, by libfaketime; the monotonic clock
goes on, as it does where an administrator or a time server sets the clock of a machine. Each test makes sure of it that
the clock which it means was set: by the `Date` of the daemon's answers, and by Redis's `TIME`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, final

import aiohttp
import pytest

from pybustcall import BustcallClient
from pybustcall.integrations.redis import Found, RedisCache
from pybustcall.jobs import BustJob
from pybustcall.outbox import Outbox, OutboxRow, OutboxStore
from pybustcall.testing import Answer, FakeDaemon
from tests.configured_daemons import REDIS_AND_PAGES, ConfiguredDaemons
from tests.conftest import PATIENCE, DaemonProcess, eventually
from tests.engines import RedisProcess, free_port
from tests.interop import unavailable

HOUR = 3600.0
ROOT = Path(__file__).parent.parent


@final
class HostClock:
    """The wall clock of the processes that are started with its `env`; it runs on wherever it is set."""

    def __init__(self, directory: Path) -> None:
        library = next(Path("/usr").glob("lib/*/faketime/libfaketimeMT.so.1"), None)
        if library is None:
            unavailable("libfaketime is not installed: apt-get install faketime")
        self._file = directory / "clock"
        self.behind = 0.0
        self.set_back(0.0)
        self.env = {
            # The system's own malloc: jemalloc, which Redis has, asks for the time before libfaketime can tell it.
            "LD_PRELOAD": f"{library}:libc.so.6",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # as earlier versions call it
            "NO_FAKE_STAT": "1",
        }

    def set_back(self, seconds: float) -> None:
        """Set it, while they run, to so many seconds before the real time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{-seconds:+g}\n")
        new.rename(self._file)
        self.behind = seconds

    @contextmanager
    def inherited(self) -> Iterator[None]:
        """Have processes that are started within it live by this clock, whoever starts them."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            yield

    def check(self, told: float) -> None:
        """Make sure that somebody lives by this clock, who told the time just now."""
        assert abs(time.time() - self.behind - told) < PATIENCE


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[HostClock]:
    before = shared_by_libfaketime()
    yield HostClock(tmp_path)
    for path in shared_by_libfaketime() - before:  # what processes leave behind that were killed
        if not Path("/proc", path.name.rpartition("_")[2]).exists():
            path.unlink(missing_ok=True)


def shared_by_libfaketime() -> set[Path]:
    return set(Path("/dev/shm").glob("*faketime_s*_*"))


@pytest.fixture
def redis(tmp_path: Path, clock: HostClock) -> Iterator[RedisProcess]:
    with clock.inherited():
        server = RedisProcess(tmp_path)
    with server:
        yield server


@pytest.fixture
def daemons(redis: RedisProcess, pages: Path, clock: HostClock) -> Iterator[ConfiguredDaemons]:
    files = '[files]\nstate = "state"\n[journal]\npath = "journal"\n'
    made = ConfiguredDaemons(pages.parent, files + REDIS_AND_PAGES.format(redis=redis.url), env=clock.env)
    yield made
    made.close()


@asynccontextmanager
async def connected(daemon: DaemonProcess) -> AsyncIterator[BustcallClient]:
    async with BustcallClient(daemon.url, probes=None, timeout=PATIENCE) as client:
        yield client


async def check_clock(clock: HostClock, daemon: DaemonProcess, redis: RedisProcess | None = None) -> None:
    """Make sure that the daemon, and Redis, live by this clock as it is set now."""
    async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/api/v1/capabilities") as response:
        clock.check(parsedate_to_datetime(response.headers["Date"]).timestamp())
    if redis is not None:
        clock.check(float(redis.ask("TIME").split()[2]))


async def in_time(condition: Callable[[], Any], what: str) -> None:
    """Wait for what is asked for; fail long before an hour is over."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            await asyncio.sleep(0.02)


def check_order(audit: tuple[BustJob, ...], *reasons: str) -> None:
    """Check that the audit has these busts, the newest first, and that its order is not that of the clock."""
    assert [job.reason for job in audit] == list(reversed(reasons))
    times = [job.at for job in reversed(audit)]
    assert times != sorted(times)


def hold(pages: Path, *names: str) -> None:
    """Have a page cache hold these pages."""
    for name in names:
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).touch()


def held(pages: Path) -> set[str]:
    return {str(path.relative_to(pages)) for path in pages.rglob("*") if path.is_file()}


@pytest.mark.requirement("REL-04")
async def test_busts_reach_what_was_stored_before_and_after_the_clock_was_set_back(
    clock: HostClock, redis: RedisProcess, daemons: ConfiguredDaemons, pages: Path
) -> None:
    """By key, prefix, tag and all; and a fill that began before a bust is refused, whenever either of them was."""
    daemon = daemons.start()
    cache = RedisCache(redis.url)

    async def store(*keys: str) -> None:
        hold(pages, *keys)
        for key in keys:
            assert await cache.set(key, key.encode(), tags=["tagged"] if "tagged" in key else [], ttl=600.0)

    async with connected(daemon) as client:
        await check_clock(clock, daemon, redis)
        await store("old/key", "old/below/1", "old/tagged", "old/other", "first")
        await cache.set("old/short", b"old", tags=["tagged"], ttl=0.2)
        early = (await cache.lookup("late/1")).token
        assert (await client.bust("late/1", reason="early")).ok
        clock.set_back(HOUR)
        await check_clock(clock, daemon, redis)
        token = (await cache.lookup("late/2")).token
        await store("new/key", "new/below/1", "new/tagged", "new/other")
        for target in ("old/key", "new/key", "late/2"):
            assert (await client.bust(target, reason=target)).status == "busted"
        assert [await cache.get(key) for key in ("old/key", "new/key")] == [None, None]
        assert held(pages).isdisjoint({"old/key", "new/key"})
        for target in ("old/below", "new/below"):
            assert (await client.bust(target, kind="prefix", reason=target)).removed == 2
        tagged = await client.bust("tagged", kind="tag", reason="tagged")
        assert tagged.ok
        assert [await cache.get(f"{age}/tagged") for age in ("old", "new")] == [None, None]
        assert await cache.get("old/short") is None  # however long its server would have kept it by its own clock
        assert not await cache.store("late/1", b"old", token=early, ttl=600.0)
        assert not await cache.store("late/2", b"old", token=token, ttl=600.0)
        assert (await client.bust("*", kind="all", confirm=True, reason="all")).ok
        assert [await cache.get(f"{age}/other") for age in ("old", "new")] == [None, None]
        assert held(pages) == set()
        asked = ("old/key", "new/key", "late/2", "old/below", "new/below", "tagged", "all")
        check_order(await client.jobs(), "early", *asked)
    await cache.aclose()


async def test_a_stale_entry_is_made_anew_at_once_though_the_clock_is_set_back_while_its_lease_is_held(
    clock: HostClock, redis: RedisProcess, tmp_path: Path
) -> None:
    """The reader that was to make it has died: the next one is chosen, not after an hour, and no other beside it."""
    configuration = f'[[layers]]\nname = "redis"\nbackend = "redis"\nurl = "{redis.url}"\n'  # files have no soft busts
    daemons = ConfiguredDaemons(tmp_path, configuration, env=clock.env)
    lease = 2 * PATIENCE  # it ends, for who takes it in good order, after the test
    try:
        daemon = daemons.start()
        async with connected(daemon) as client, RedisCache(redis.url, lease=lease) as cache:
            await cache.set("page", b"old", ttl=None)
            assert (await client.bust("page", soft=True)).ok
            assert [(await cache.lookup("page")).refresh for _ in range(2)] == [True, False]
            clock.set_back(HOUR)
            await check_clock(clock, daemon, redis)
            left = int(redis.ask("PTTL", "bustcall:{default}:l:page").removeprefix(b":")) / 1000
            assert HOUR < left <= HOUR + lease  # so long the server would keep it for the dead one
            first, second = [await cache.lookup("page") for _ in range(2)]
            assert (first.refresh, second.refresh) == (True, False)
            assert second.found == Found(b"old", stale=True)
            assert await cache.store("page", b"new", token=first.token, ttl=None)
            assert await cache.get("page") == Found(b"new", stale=False)
    finally:
        daemons.close()


async def test_a_second_bust_comes_in_time_though_the_clock_is_set_back_before_it(
    clock: HostClock, daemons: ConfiguredDaemons, pages: Path
) -> None:
    """What a slow reader stored after the first is dropped after `settle` seconds, not an hour later."""
    daemon = daemons.start()
    async with connected(daemon) as client:
        hold(pages, "page")
        result = await client.bust("page", settle=0.5)
        assert result.job is not None
        hold(pages, "page")
        clock.set_back(HOUR)
        await check_clock(clock, daemon)
        await eventually(lambda: held(pages) == set(), "the second bust has not come")
        assert (await client.wait_job(result.job, timeout=PATIENCE)).state == "done"
        hold(pages, "other")
        result = await client.bust("other", settle=0.2)
        hold(pages, "other")
        await eventually(lambda: held(pages) == set(), "one that was asked for afterwards has not come")


async def post_with_key(daemon: DaemonProcess, target: str, key: str) -> tuple[bool, str]:
    """Ask for a bust under an idempotency key; tell whether it was a repeat, and its job."""
    headers = {"Idempotency-Key": key}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{daemon.url}/api/v1/bust", json={"target": target}, headers=headers) as response,
    ):
        assert response.status == 200
        return response.headers.get("Idempotency-Replayed") == "true", (await response.json())["job"]


async def test_a_repeat_is_one_though_the_clock_was_set_back_meanwhile(
    clock: HostClock, daemons: ConfiguredDaemons
) -> None:
    """Also over a restart; and so is one of a request that came afterwards."""
    daemon = daemons.start()
    first = await post_with_key(daemon, "page", "before")
    clock.set_back(HOUR)
    await check_clock(clock, daemon)
    again = await post_with_key(daemon, "page", "before")
    after = await post_with_key(daemon, "page", "after")
    daemon.kill()
    daemon = daemons.start()
    await check_clock(clock, daemon)
    assert [first[0], again[0], after[0]] == [False, True, False]
    assert first[1] == again[1] != after[1]
    assert await post_with_key(daemon, "page", "before") == again
    assert await post_with_key(daemon, "page", "after") == (True, after[1])


async def test_what_was_promised_is_done_though_the_clock_is_set_back_between_a_kill_and_the_restart(
    clock: HostClock, redis: RedisProcess, daemons: ConfiguredDaemons, pages: Path
) -> None:
    """What waited for a layer that was down, and what waited for its second bust; and the audit stays in its order."""
    daemon = daemons.start()
    async with connected(daemon) as client:
        hold(pages, "settling")
        settling = await client.bust("settling", settle=2.0, reason="settling")
        redis.kill()
        owed = [await client.bust(f"owed/{number}", reason=f"owed/{number}") for number in range(5)]
        assert {result.status for result in owed} <= {"accepted", "partial"}
    daemon.kill()
    clock.set_back(HOUR)
    hold(pages, "settling")
    with clock.inherited():
        redis.start()
    cache = RedisCache(redis.url)
    for number in range(5):
        await cache.set(f"owed/{number}", b"old", ttl=600.0)
    daemon = daemons.start()
    await check_clock(clock, daemon, redis)
    async with connected(daemon) as client:
        for result in (settling, *owed):
            assert result.job is not None
            assert (await client.wait_job(result.job, timeout=PATIENCE)).state == "done"
        assert [await cache.get(f"owed/{number}") for number in range(5)] == [None] * 5
        assert held(pages) == set()
        assert (await client.bust("after", reason="after")).ok
        check_order(await client.jobs(), "settling", *(f"owed/{number}" for number in range(5)), "after")
    await cache.aclose()


async def test_lifetimes_end_in_time_though_the_clock_is_set_back(tmp_path: Path, clock: HostClock) -> None:
    """Those that began before, and those that began after; what has a long one is still there."""
    daemons = ConfiguredDaemons(tmp_path, '[[layers]]\nname = "memory"\nbackend = "memory"\n', env=clock.env)
    try:
        daemon = daemons.start()
        async with connected(daemon) as client:
            await client.register("short/before", tags=["t"], ttl=0.5)
            await client.register("long", tags=["t"], ttl=600.0)
            clock.set_back(HOUR)
            await check_clock(clock, daemon)
            await client.register("short/after", tags=["t"], ttl=0.5)

            async def short_ones_are_over() -> bool:
                return (await client.bust("short", kind="prefix", dry_run=True)).matched == 0

            await in_time(short_ones_are_over, "the lifetimes have not ended")
            assert (await client.bust("t", kind="tag")).removed == 1
    finally:
        daemons.close()


async def test_the_audit_keeps_nothing_longer_than_it_should_though_the_clock_is_set_back(
    tmp_path: Path, clock: HostClock
) -> None:
    """What ended in what is now the future goes after the retention, counted from then on, and not an hour later."""
    configuration = '[journal]\npath = "journal"\nretention = 4.0\n[[layers]]\nname = "memory"\nbackend = "memory"\n'
    daemons = ConfiguredDaemons(tmp_path, configuration, env=clock.env)
    try:
        daemon = daemons.start()
        async with connected(daemon) as client:
            for reason in ("before", "before it, too"):  # with the second, the end of the first is written down
                await client.bust("page", reason=reason)
            clock.set_back(HOUR)
            await check_clock(clock, daemon)
            await client.bust("page", reason="after")
            check_order(await client.jobs(), "before", "before it, too", "after")

            async def all_have_gone() -> bool:
                return await client.jobs() == ()

            await in_time(all_have_gone, "the audit keeps them")
    finally:
        daemons.close()


CLIENT = """
import asyncio, sys, time
from pybustcall import BustcallClient, Retry

async def main(url, outbox):
    async with BustcallClient(url, outbox=outbox, timeout=3.0, retry=Retry(attempts=1)) as client:
        word = sys.stdin.readline()
        if word.startswith("bust"):
            result = await client.bust("page", fault_tolerance=12, write_ahead="ahead" in word)
            print(result.status, *result.causes, flush=True)
        print(await asyncio.to_thread(sys.stdin.readline) and time.time(), flush=True)
        while (counts := await client.outbox.counts()).pending or counts.leased:
            await asyncio.sleep(0.05)
        print("delivered", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@final
class Client:
    """A client with an outbox, in a process of its own that lives by a clock of ours."""

    def __init__(self, clock: HostClock, url: str, outbox: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, url, str(outbox)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**inherited, **clock.env},
        )

    def send(self, line: str) -> None:
        """Give it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    async def ask(self, line: str) -> str:
        """Give it a line, and tell its answer."""
        self.send(line)
        return await self.told()

    async def told(self) -> str:
        """Tell the next line that it says, or that it says nothing in time."""
        assert self._process.stdout is not None
        line = asyncio.ensure_future(asyncio.to_thread(self._process.stdout.readline))
        done, _ = await asyncio.wait({line}, timeout=PATIENCE)
        if not done:
            self._process.kill()  # or its line would be waited for until the end
        return (await line).strip() if done else "nothing in time"

    def kill(self) -> None:
        """End it without a warning."""
        self._process.kill()
        self._process.wait(PATIENCE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def start_client(clock: HostClock, tmp_path: Path) -> Iterator[Callable[[str], Client]]:
    """Start clients with one outbox, one after the other."""
    started: list[Client] = []

    def start(url: str) -> Client:
        started.append(Client(clock, url, tmp_path / "outbox"))
        return started[-1]

    yield start
    for client in started:
        client.kill()


@pytest.fixture
def files(tmp_path: Path, pages: Path) -> Iterator[ConfiguredDaemons]:
    """Daemons over the pages, which live by the real clock."""
    configuration = '[[layers]]\nname = "pages"\nbackend = "files"\nroot = "pages"\nsettle = 0.0\n'
    made = ConfiguredDaemons(tmp_path, configuration)
    yield made
    made.close()


@asynccontextmanager
async def rows_of(outbox: Path) -> AsyncIterator[Callable[[], Awaitable[tuple[OutboxRow, ...]]]]:
    store = OutboxStore(Outbox(path=outbox))
    yield store.rows
    await store.aclose()


@pytest.mark.parametrize("killed", [False, True], ids=["it runs on", "it is killed"])
async def test_what_a_client_keeps_is_delivered_once_a_daemon_is_there_though_its_clock_was_set_back(
    clock: HostClock, pages: Path, files: ConfiguredDaemons, start_client: Callable[[str], Client], killed: bool
) -> None:
    """What it wrote down in what is now the future is neither held back nor forgotten."""
    hold(pages, "page")
    port = free_port()
    client = start_client(f"http://127.0.0.1:{port}")
    assert (await client.ask("bust")).startswith("deferred ")
    if killed:
        client.kill()
    clock.set_back(HOUR)
    if killed:
        client = start_client(f"http://127.0.0.1:{port}")
        client.send("deliver")
    clock.check(float(await client.ask("what time is it?")))
    files.start(port)
    assert await client.told() == "delivered"
    assert held(pages) == set()


async def test_what_a_killed_client_was_sending_is_sent_by_the_next_though_its_clock_was_set_back(
    clock: HostClock, pages: Path, files: ConfiguredDaemons, start_client: Callable[[str], Client], tmp_path: Path
) -> None:
    """A lease that was granted in what is now the future keeps nobody waiting."""
    hold(pages, "page")
    async with FakeDaemon([Answer(hang=True)]) as hole, rows_of(tmp_path / "outbox") as rows:
        url = hole.url
        client = start_client(url)
        client.send("bust ahead")
        await eventually(lambda: hole.requests)
        [row] = await rows()
        assert row.state == "leased"
        client.kill()
    clock.set_back(HOUR)
    client = start_client(url)
    client.send("deliver")
    clock.check(float(await client.ask("what time is it?")))
    files.start(int(url.rpartition(":")[2]))
    assert await client.told() == "delivered"
    assert held(pages) == set()


@pytest.mark.parametrize("behind", [HOUR, 90.0], ids=["an hour", "ninety seconds"])
async def test_what_waits_to_be_sent_again_waits_no_longer_though_the_clock_is_set_back(
    clock: HostClock, start_client: Callable[[str], Client], tmp_path: Path, behind: float
) -> None:
    """A wait is a few seconds, and not until the clock has come round to its end again."""
    async with FakeDaemon([Answer.problem(503)] * 1000) as daemon, rows_of(tmp_path / "outbox") as rows:
        client = start_client(daemon.url)
        assert (await client.ask("bust")).startswith("deferred ")

        async def it_waits() -> bool:
            [row] = await rows()
            return row.attempts >= 2 and row.state == "pending" and row.not_before > time.time()

        await in_time(it_waits, "nothing waits")
        clock.set_back(behind)
        daemon.plan.clear()
        clock.check(float(await client.ask("what time is it?")))
        assert await client.told() == "delivered"
        assert [bust.target for bust in daemon.applied] == ["page"]
