"""Eight processes with near caches over one database, while connections are cut and the daemon is killed."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from pybustcall.testing import FaultyProxy, Trouble
from tests.configured_daemons import ConfiguredDaemons
from tests.conftest import PATIENCE, DaemonProcess
from tests.near_worker import GRACE, KEYS, open_database
from tests.staleness import Bust, Read, stale_reads

WORKERS = 8
BUSTS = 10_000
CUTS = 1000
KILLS = 10
HEARTBEAT = 0.5
BOUND = GRACE + 0.2  # seconds; the last since ten processes on two processors look at the clock late at times

SETTINGS = f"""
[journal]
path = "journal.db"

[events]
heartbeat = {HEARTBEAT}
kept = 2000

[[layers]]
name = "memory"
number = 0
backend = "memory"
"""


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory in memory, where there is one: what is killed here are processes, and not the machine."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


@asynccontextmanager
async def workers(url: str, database: Path) -> AsyncIterator[list[Process]]:
    """Run the processes; none is left at the end."""
    running: list[Process] = []
    try:
        for number in range(WORKERS):
            running.append(  # noqa: PERF401 - each that has begun must be ended
                await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "tests.near_worker"),
                    *(url, str(database), f"worker{number}", str(BUSTS // WORKERS)),
                    stdin=PIPE,
                    stdout=PIPE,
                    cwd=Path(__file__).parent.parent,
                )
            )
        yield running
    finally:
        for worker in running:
            if worker.returncode is None:
                worker.kill()
                await worker.wait()


async def cut_at_random(proxy: FaultyProxy, chance: random.Random) -> None:
    """Cut so many connections, one by one or all at once; now and then let nothing pass for a while."""
    done = rounds = 0
    while done < CUTS:
        await asyncio.sleep(chance.expovariate(40.0))
        links, rounds = list(proxy._links), rounds + 1
        if rounds % 100 == 50:
            proxy.trouble = Trouble(stall=True)
            await asyncio.sleep(chance.choice([0.3, 1.0, 2.5]))
            proxy.heal()
        elif chance.random() < 0.1:
            proxy.drop_connections()
            done += len(links)
        elif links:
            chance.choice(links).end(abrupt=chance.random() < 0.5)
            done += 1


async def kill_at_random(daemons: ConfiguredDaemons, daemon: DaemonProcess, chance: random.Random) -> None:
    """Kill the daemon, and start it again."""
    port = int(daemon.url.rpartition(":")[2])
    for _ in range(KILLS):
        await asyncio.sleep(chance.uniform(1.0, 2.5))
        await asyncio.to_thread(daemon.kill)
        await asyncio.sleep(chance.choice([0.0, 0.5]))
        daemon = await asyncio.to_thread(daemons.start, port)


async def ended(worker: Process) -> tuple[list[Read], list[Bust], Counter[str]]:
    """Let a process come to its end; tell its history."""
    out, _ = await worker.communicate(b"")  # which ends its standard input
    assert worker.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]
    reads = [Read(*line) for line in lines if len(line) == 7 and isinstance(line, list)]
    busts = [Bust(*line) for line in lines if len(line) == 4]
    return reads, busts, Counter(lines[-1])


async def test_no_process_returns_what_was_busted_before(quick: Path) -> None:
    """After 10,000 busts by all of them, 1,000 cuts and 10 kills; and all read the last versions in the end."""
    chance = random.Random(20)
    database = quick / "versions.db"
    with closing(open_database(str(database))) as versions:
        versions.executemany("INSERT INTO versions VALUES (?, 1)", [(key,) for key in KEYS])
        daemons = ConfiguredDaemons(quick, SETTINGS)
        try:
            daemon = await asyncio.to_thread(daemons.start)
            async with FaultyProxy(daemon.url) as proxy, workers(proxy.url, database) as running:
                async with asyncio.timeout(12 * PATIENCE), asyncio.TaskGroup() as trouble:
                    trouble.create_task(cut_at_random(proxy, chance))
                    trouble.create_task(kill_at_random(daemons, daemon, chance))
                    for worker in running:
                        assert worker.stdout is not None
                        assert await worker.stdout.readline() == b"written\n"
                async with asyncio.timeout(3 * PATIENCE):
                    histories = await asyncio.gather(*map(ended, running))
        finally:
            daemons.close()
        last = dict(versions.execute("SELECT key, version FROM versions"))
    reads = [read for history in histories for read in history[0]]
    busts = [bust for history in histories for bust in history[1]]
    counts = sum((history[2] for history in histories), Counter[str]())
    assert len({(bust.who, bust.acked) for bust in busts}) == BUSTS
    assert stale_reads(reads, busts, BOUND) == []
    for history in histories:
        assert {read.key: read.version for read in history[0][-len(KEYS) :]} == last
    # Otherwise nothing of all that would be shown.
    assert counts["hits"] > len(reads) / 10
    assert all(counts[name] for name in ("bypassed", "refused", "resets"))
