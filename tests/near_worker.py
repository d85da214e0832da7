"""A process with a near cache over a database that others write, too. It notes what it reads, and what it busts.

    python -m tests.near_worker URL DATABASE NAME BUSTS

It writes and busts at random, so often, and reads at random meanwhile. When all its busts are acknowledged it says
"written", and goes on reading until its standard input ends; then it waits until its streams are live, reads each key
once more, and prints its history: a line for each read and each bust.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Final

from pybustcall import BustcallClient
from pybustcall.events import clock
from pybustcall.near_cache import NearCache
from tests.staleness import Bust, Read

if TYPE_CHECKING:
    from pybustcall.models import Kind

__all__ = ["GRACE", "GROUPS", "KEYS", "open_database"]

GROUPS: Final = 8
KEYS: Final = tuple(f"group{number % GROUPS}/{number}" for number in range(40))
GRACE: Final = 1.5  # seconds
_READERS: Final = 3


def open_database(path: str) -> sqlite3.Connection:
    """Open the database of versions."""
    database = sqlite3.connect(path, isolation_level=None, timeout=30.0, check_same_thread=False)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=OFF")
    database.execute("CREATE TABLE IF NOT EXISTS versions (key TEXT PRIMARY KEY, version INTEGER) WITHOUT ROWID")
    return database


class Worker:
    """The process: what it uses, and what it has noted."""

    def __init__(self, client: BustcallClient, database: sqlite3.Connection, name: str, busts: int) -> None:
        self.client = client
        self.database = database
        self.name = name
        self.left = busts
        self.chance = random.Random(name)
        self.cache = client.near_cache(ttl=None, grace=GRACE)
        self.reads: list[Read] = []
        self.busts: list[Bust] = []

    def write(self, keys: list[str]) -> dict[str, int]:
        """Give keys their next versions; tell these."""
        written = {}
        for key in keys:
            [(written[key],)] = self.database.execute(
                "UPDATE versions SET version = version + 1 WHERE key = ? RETURNING version", (key,)
            ).fetchall()
        return written

    async def load(self, key: str) -> int:
        """Load a version, now and then slowly."""
        [(version,)] = self.database.execute("SELECT version FROM versions WHERE key = ?", (key,)).fetchall()
        if (chance := self.chance.random()) < 0.2:
            await asyncio.sleep(chance / 4)
        return int(version)

    async def read(self, key: str) -> None:
        """Read a key, and note what was returned."""
        asked, trusted = clock(), self.cache.is_trusted
        version = await self.cache.get_or_load(key, lambda: self.load(key), tags=[key.partition("/")[0]])
        self.reads.append(Read(key, version, asked, clock(), self.name, live_since(self.cache), trusted))

    async def go_on_reading(self) -> None:
        """Read at random."""
        while True:
            await self.read(self.chance.choice(KEYS))
            await asyncio.sleep(self.chance.random() * 0.02)

    async def write_and_bust(self) -> None:
        """Write a key, or a whole group, and have it busted, until that is acknowledged."""
        while self.left:
            group = f"group{self.chance.randrange(GROUPS)}"
            keys = [key for key in KEYS if key.startswith(f"{group}/")]
            kind: Kind = self.chance.choice(("tag", "prefix", "all"))
            target = "*" if kind == "all" else group
            if self.chance.random() < 0.9:
                keys = [self.chance.choice(KEYS)]
                kind, target = "key", keys[0]
            written = self.write(keys)
            while True:
                result = await self.client.bust(target, kind=kind, confirm=kind == "all", fault_tolerance=12, timeout=2)
                if result.ok:
                    break
            acked = clock()
            self.busts += [Bust(key, version, acked, self.name) for key, version in written.items()]
            self.left -= 1

    async def run(self) -> None:
        """Do all of it."""
        reading = [asyncio.create_task(self.go_on_reading()) for _ in range(_READERS)]
        await self.write_and_bust()
        print("written", flush=True)  # noqa: T201 - to the test that started it
        await asyncio.to_thread(sys.stdin.read)
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await self.cache.wait_trusted(20.0)
        for key in KEYS:
            await self.read(key)


def live_since(cache: NearCache) -> float | None:
    """Tell when the request was made whose stream is live now."""
    feed = cache._feed
    assert feed is not None
    [follower] = feed.followers
    return follower.opened if follower.is_live else None


async def main(url: str, path: str, name: str, busts: int) -> None:
    with closing(open_database(path)) as database:
        async with BustcallClient(url, probes=None, breaker=None) as client:
            worker = Worker(client, database, name, busts)
            await worker.run()
    for read in worker.reads:
        told = [read.key, read.version, read.asked, read.returned, read.who, read.live_since, read.trusted]
        sys.stdout.write(json.dumps(told) + "\n")
    for bust in worker.busts:
        sys.stdout.write(json.dumps([bust.key, bust.version, bust.acked, bust.who]) + "\n")
    sys.stdout.write(json.dumps(vars_of(worker.cache)) + "\n")


def vars_of(cache: NearCache) -> dict[str, object]:
    """Tell the statistics of a near cache."""
    told = cache.statistics()
    return {name: getattr(told, name) for name in ("hits", "misses", "bypassed", "loads", "refused", "resets")}


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
