"""Readers of events, cut off at random, and a daemon that is killed: nothing is missed without a reset."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from pybustcall import BustcallClient
from pybustcall.testing.proxy import FaultyProxy
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.test_bench import check_table, run_bench

READERS: Final = 4
KILLS: Final = 10
CUTS: Final = 200
FOREVER: Final = ("*", "reset")  # what a reset says of every bust that was acknowledged before it


class Follower:
    """A reader that comes back with the last id that it has, and notes all that it is told, in order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.told: list[tuple[str, str]] = []  # the name of an event, and what was busted
        self.place: str | None = None
        self.lives = 0
        self._task = asyncio.create_task(self._follow())

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def until_live(self) -> None:
        """Wait until it has been told once more that it is live."""
        lives = self.lives
        await eventually(lambda: self.lives > lives, "it follows again")

    async def _follow(self) -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                with suppress(aiohttp.ClientError, OSError, TimeoutError):
                    await self._read(session)
                await asyncio.sleep(0.01)

    async def _read(self, session: aiohttp.ClientSession) -> None:
        headers = {} if self.place is None else {"Last-Event-ID": self.place}
        limits = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE)
        async with session.get(f"{self.url}/api/v1/events", headers=headers, timeout=limits) as response:
            said: dict[str, str] = {}
            async for line in response.content:
                if not line.endswith(b"\n"):
                    return  # cut in the midst of a line
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    said[name] = value
                    continue
                self._take(said)
                said = {}

    def _take(self, said: dict[str, str]) -> None:
        if said.get("event") == "live":
            self.lives += 1
        elif "event" in said:
            self.told.append((said["event"], json.loads(said["data"]).get("target", "")))
        self.place = said.get("id", self.place)


@asynccontextmanager
async def followed(urls: Iterable[str]) -> AsyncIterator[list[Follower]]:
    """Have a reader follow at each URL, from before anything is busted."""
    followers = [Follower(url) for url in urls]
    try:
        await eventually(lambda: all(follower.lives for follower in followers), "all follow")
        yield followers
    finally:
        for follower in followers:
            await follower.aclose()


async def more_than(found: list[str], many: int) -> None:
    """Wait until there are so many."""
    await eventually(lambda: len(found) > many, "busts are made")


def missed(told: list[tuple[str, str]], acknowledged: list[str]) -> list[str]:
    """List what a reader missed: no event of it, and no reset after which it would not be needed.

    A reset makes good what was acknowledged before it was told. That is known here as far as what came before it in the
    reader's own order tells: what was acknowledged earlier than the last bust that it was told of until then.
    """
    order = {target: number for number, target in enumerate(acknowledged)}
    last_reset = max((number for number, (name, _) in enumerate(told) if name == "reset"), default=-1)
    after = [order[target] for name, target in told[last_reset + 1 :] if target in order]
    heard = {target for _, target in told}
    # What was acknowledged before the first bust told after the last reset is made good by it.
    made_good = min(after, default=len(acknowledged)) if last_reset >= 0 else 0
    return [target for target, number in order.items() if target not in heard and number >= made_good]


async def told_of_the_last(followers: list[Follower], target: str) -> None:
    """Wait until every reader knows of the last bust, or of a reset that came for it."""
    await eventually(lambda: all(("bust", target) in follower.told for follower in followers), "all were told")


async def test_a_daemon_that_is_killed_while_it_tells_loses_no_event(tmp_path: Path, start_daemon: StartDaemon) -> None:
    """Ten times, in the midst of busts; every bust that was answered is told of, and nobody had to forget anything."""
    journal = str(tmp_path / "journal")
    daemon = start_daemon("--journal", journal)
    dice = random.Random(5)
    acknowledged: list[str] = []
    number = 0
    async with FaultyProxy(daemon.url) as proxy, followed([proxy.url] * READERS) as followers:
        for _ in range(KILLS):
            async with BustcallClient(daemon.url, probes=None, timeout=2.0, fault_tolerance=12) as client:

                async def bust(client: BustcallClient = client) -> None:
                    nonlocal number
                    while True:
                        number += 1
                        target = str(number)
                        if (await client.bust(target, settle=0)).ok:
                            acknowledged.append(target)

                busting = [asyncio.create_task(bust()) for _ in range(4)]
                await more_than(acknowledged, len(acknowledged) + dice.randrange(5, 40))
                daemon.kill()
                for task in busting:
                    task.cancel()
                await asyncio.wait(busting)
            daemon = await asyncio.to_thread(start_daemon, "--journal", journal)
            proxy.upstream = daemon.url
            proxy.drop_connections()
        async with BustcallClient(daemon.url) as client:
            await client.bust("last", settle=0)
        await told_of_the_last(followers, "last")
        assert len(acknowledged) >= 5 * KILLS
        for follower in followers:
            assert [name for name, _ in follower.told if name == "reset"] == []
            assert missed(follower.told, acknowledged) == []


async def test_cuts_at_random_lose_no_event(tmp_path: Path, start_daemon: StartDaemon) -> None:
    """Whatever the connection was in the midst of; none is told twice within one life of the daemon either."""
    daemon = start_daemon("--journal", str(tmp_path / "journal"))
    acknowledged: list[str] = []
    dice = random.Random(7)
    async with FaultyProxy(daemon.url) as proxy, followed([proxy.url] * READERS) as followers:
        async with BustcallClient(daemon.url, probes=None) as client:
            for cut in range(CUTS):
                for target in (f"{cut}/{number}" for number in range(dice.randrange(5))):
                    assert (await client.bust(target, settle=0)).ok
                    acknowledged.append(target)
                proxy.drop_connections()
                await asyncio.sleep(dice.random() * 0.02)
            await client.bust("last", settle=0)
        await told_of_the_last(followers, "last")
        for follower in followers:
            assert [target for _, target in follower.told] == [*acknowledged, "last"]
            assert follower.lives > 1


@pytest.mark.parametrize(
    ("told", "lost"),
    [
        ([("bust", "a"), ("bust", "b"), ("bust", "c")], []),
        ([("bust", "a"), ("bust", "c")], ["b"]),
        ([("bust", "b"), ("bust", "a")], ["c"]),
        ([("bust", "a"), ("reset", ""), ("bust", "c")], []),
        ([("reset", ""), ("bust", "a"), ("bust", "c")], ["b"]),
        ([("reset", ""), ("bust", "a"), ("bust", "b")], ["c"]),
        ([("bust", "a"), ("bust", "b"), ("reset", "")], []),
        ([], ["a", "b", "c"]),
    ],
)
def test_what_is_missed_is_found(told: list[Any], lost: list[str]) -> None:
    """The checker above finds a bust of which there was no event, unless a reset made it good."""
    assert missed(told, ["a", "b", "c"]) == lost


async def test_who_was_away_is_told_what_was_busted_or_to_forget_before_anything_else(
    tmp_path: Path, start_daemon: StartDaemon
) -> None:
    """Five busts while the reader is cut off; more than the log keeps; and a journal that was deleted."""
    journal, config = tmp_path / "journal", tmp_path / "bustcall.toml"
    config.write_text(f'[journal]\npath = "{journal}"\n[events]\nkept = 20\n[listen]\nport = 0\n')

    def start() -> str:
        return start_daemon("--config", str(config)).url

    daemon = start_daemon("--config", str(config))
    async with FaultyProxy(daemon.url) as proxy, followed([proxy.url]) as [follower]:
        for busts, told in ((5, ["bust"] * 5), (30, ["reset"])):
            async with BustcallClient(daemon.url) as client:
                proxy.upstream = "http://127.0.0.1:9"
                proxy.drop_connections()
                before = len(follower.told)
                for number in range(busts):
                    await client.bust(str(number), settle=0)
                proxy.upstream = daemon.url
                await follower.until_live()
                assert [name for name, _ in follower.told[before:]] == told
        daemon.kill()
        journal.unlink()
        before = len(follower.told)
        proxy.upstream = await asyncio.to_thread(start)
        await follower.until_live()
        assert follower.told[before:] == [("reset", "")]


def test_the_bench_of_events_tells_each_number_of_readers(tmp_path: Path) -> None:
    """No reader misses an event, or gets one twice or out of order; times are not judged."""
    ran = run_bench("events", tmp_path, "--readers", "1,20", "--busts", "5")
    check_table(ran)
    assert [(row["readers"], row["wrong"]) for row in ran.rows] == [(1, 0), (20, 0)]
