"""A bust of a branch of 100,000 entries in Redis: how soon it is answered, and how long it holds anybody up.

    python -m bench.redis_prefix [--entries 100000] [--runs 10] [--directory DIR] [--json]

A Redis server and a daemon with a journal are processes of their own; the clients are in this one. In each run the
branch is stored anew and busted by a new client, which has yet to connect and to learn what the daemon can do. Entries
of ours, by a hybrid bust and by a dimensional one; and plain keys of another program, which the daemon finds by going
through all keys of the server (SCAN), with its usual time to answer and with none. Beside them lie keys that no bust
may touch: entries with similar keys and of another tenant, and those of programs that nobody told the daemon of.

Measured are the time to the answer and to the end, at the client; the longest block of the daemon's event loop, by a
task there that means to sleep for a millisecond, and the most that the daemon computed in one go, which does not count
what else the machine did; the longest command of the Redis server, as its slow log tells; and how long others waited
meanwhile: who asked the daemon how far it was, and who read an entry from Redis. Writes
results/redis_prefix.json. The exit code tells whether an entry was left, another key was touched, or progress did not
rise to 100 %; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.plot import percentile
from bench.record import record
from pybustcall import BustcallClient
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Layer, serve
from pybustcall.daemon.backends.redis import RedisBackend
from pybustcall.integrations.redis import RedisCache
from pybustcall.models import DEFAULT_NAMESPACE
from pybustcall.redis_layout import DEFAULT_PREFIX
from tests.engines import RedisProcess
from tests.redis_branch import PLAIN, PREFIX, branch, connect, contents, put_others, put_plain, store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from redis import Redis

GOAL: Final = 50.0  # milliseconds, of the time to the answer of a hybrid bust and of the longest block
OTHERS: Final = 4000  # keys that no bust may touch
ELSEWHERE: Final = "user/0"  # one of them, which is read meanwhile
ENTRY: Final = f"{DEFAULT_PREFIX}:{{{DEFAULT_NAMESPACE}}}:e:"  # what the names of our entries begin with
SLOW_LOG: Final = {"slowlog-log-slower-than": "100", "slowlog-max-len": "100000"}  # from a tenth of a millisecond on
PAUSE: Final = 0.001  # seconds that the task means to sleep which watches the event loop
PATIENCE: Final = 120.0  # seconds for a bust to end


@dataclass(frozen=True)
class Case:
    """What is busted, and how. `within`: seconds after which the daemon answers what goes on."""

    name: str
    strategy: str = "hybrid"
    plain: bool = False
    within: float = 1.0
    goal: float | None = None


CASES: Final = (
    Case("hybrid", goal=GOAL),
    Case("dimensional", strategy="dimensional"),
    Case("hybrid, by SCAN", plain=True),
    Case("hybrid, by SCAN, answer_within 0", plain=True, within=0.0),
)


@dataclass
class Run:
    """What one bust took, in milliseconds, and what was wrong with it."""

    answer: float = 0.0
    end: float = 0.0
    block: float = 0.0
    computed: float = 0.0
    command: float = 0.0
    asked: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    left: int = 0
    touched: int = 0

    @property
    def is_right(self) -> bool:
        """Whether all went that was to go, nothing else did, and progress rose to 100 %."""
        return not self.left and not self.touched and self.shares == sorted(self.shares) and self.shares[-1] == 1.0


# The daemon's process


async def watch(longest: Any) -> None:
    """Note for how many milliseconds at most the event loop did not come round, and at most computed meanwhile.

    Where the machine is busy with something else, only the latter tells of the daemon.
    """
    while True:
        begun, computed = time.perf_counter(), time.thread_time()
        await asyncio.sleep(PAUSE)
        longest[0] = max(longest[0], (time.perf_counter() - begun - PAUSE) * 1000)
        longest[1] = max(longest[1], (time.thread_time() - computed) * 1000)


async def serve_watched(url: str, journal: Path, case: Case, longest: Any, tell: Callable[[str], None]) -> None:
    """Serve one layer in Redis until a signal comes."""
    layer = Layer(name="redis", number=0, backend=RedisBackend(url, foreign=PLAIN if case.plain else None))
    settings = DaemonSettings(port=0, journal=journal, answer_within=case.within)
    watching = asyncio.create_task(watch(longest))
    try:
        await serve(Engine([layer], Indexes()), settings, ready=tell)
    finally:
        watching.cancel()


def run_daemon(url: str, journal: Path, case: Case, longest: Any, told: Connection) -> None:
    """Be the daemon's process."""
    asyncio.run(serve_watched(url, journal, case, longest, told.send))


@contextmanager
def daemon(url: str, journal: Path, case: Case) -> Iterator[tuple[str, Any]]:
    """Run a daemon in a process of its own; tell its URL, and where it notes its longest blocks."""
    context = multiprocessing.get_context("spawn")
    longest = context.Array("d", 2, lock=False)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run_daemon, args=(url, journal, case, longest, there))
    process.start()
    there.close()
    try:
        yield here.recv(), longest
    finally:
        process.terminate()
        process.join(PATIENCE)
        process.kill()
        process.join()
        here.close()


# One bust


async def bust(case: Case, daemon_url: str, redis_url: str, run: Run) -> None:
    """Bust the branch, and ask how far it is until it is over, while somebody reads from the cache."""
    async with BustcallClient(daemon_url, probes=None) as client, RedisCache(redis_url) as cache:
        await cache.get(ELSEWHERE)
        reading = asyncio.create_task(read(cache, run))
        try:
            begun = time.perf_counter()
            result = await client.bust(PREFIX, kind="prefix", strategy=case.strategy)
            run.answer = (time.perf_counter() - begun) * 1000
            assert result.job is not None, result  # noqa: S101 - the daemon has a journal
            state = "running"
            while state == "running":
                asked = time.perf_counter()
                told = await client.job(result.job)
                run.asked.append((time.perf_counter() - asked) * 1000)
                if told.total:
                    run.shares.append(told.done / told.total)
                state = told.state
                await asyncio.sleep(0.02)
            run.end = (time.perf_counter() - begun) * 1000
            told = await client.wait_job(result.job, timeout=PATIENCE)
            run.shares.append(told.done / (told.total or 1) if told.state == "done" else 0.0)
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        if not reading.cancelled():
            reading.result()


async def read(cache: RedisCache, run: Run) -> None:
    """Read an entry that is not busted again and again, and note how long each time takes."""
    while True:
        begun = time.perf_counter()
        await cache.get(ELSEWHERE)
        run.read.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.005)


def left_of(redis: Redis, case: Case, entries: int) -> int:
    """Count what is left of the branch."""
    begin = PLAIN if case.plain else ENTRY
    return sum(it is not None for it in contents(redis, [(begin + key).encode() for key in branch(entries)]).values())


def measure(case: Case, server: RedisProcess, directory: Path, entries: int, runs: int) -> list[Run]:
    """Store and bust the branch so many times."""
    done: list[Run] = []
    with connect(server.port) as redis:
        redis.flushall()
        before = contents(redis, put_others(redis, OTHERS))
        with daemon(server.url, directory / f"journal-{CASES.index(case)}.db", case) as (url, longest):
            for _ in range(runs):
                (put_plain if case.plain else store)(redis, branch(entries))
                run = Run()
                redis.slowlog_reset()
                redis.slowlog_reset()  # the first one notes itself, if it took long
                longest[:] = [0.0, 0.0]
                asyncio.run(bust(case, url, server.url, run))
                run.block, run.computed = longest
                run.command = max((it["duration"] / 1000 for it in redis.slowlog_get(-1)), default=0.0)
                run.left = left_of(redis, case, entries)
                run.touched = sum(value != before[name] for name, value in contents(redis, list(before)).items())
                done.append(run)
    return done


# What comes of it


def summed_up(case: Case, entries: int, runs: list[Run]) -> dict[str, Any]:
    """Make a row of the results."""
    asked, reads = ([took for run in runs for took in getattr(run, name)] for name in ("asked", "read"))
    row: dict[str, Any] = {"case": case.name, "entries": entries, "runs": len(runs)}
    row |= {"answer_goal_ms": case.goal, "block_goal_ms": GOAL}
    for name in ("answer", "block", "computed", "command", "end"):
        values = [getattr(run, name) for run in runs]
        row |= {f"{name}_ms": round(statistics.median(values), 1), f"{name}_max_ms": round(max(values), 1)}
    return row | {
        "asked": len(asked),
        "asked_p99_ms": round(percentile(asked, 99), 1),
        "asked_max_ms": round(max(asked), 1),
        "read": len(reads),
        "read_p99_ms": round(percentile(reads, 99), 1),
        "read_max_ms": round(max(reads), 1),
        "left": sum(run.left for run in runs),
        "touched": sum(run.touched for run in runs),
        "right": sum(run.is_right for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table: of times in milliseconds the median of the runs and the worst."""
    times = {"answer": "answer ms", "block": "block ms", "computed": "computed ms", "command": "Redis ms"}
    heads = ["bust", "runs", *(f"{told} | worst" for told in times.values())]
    heads += ["asked p99 | worst", "read p99 | worst", "end s", "left", "touched"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * 16}"]
    for row in rows:
        figures = [f"{row[f'{name}_ms']:,} | {row[f'{name}_max_ms']:,}" for name in times]
        figures += [f"{row[f'{name}_p99_ms']:,} | {row[f'{name}_max_ms']:,}" for name in ("asked", "read")]
        figures += [f"{row['end_ms'] / 1000:.1f}", str(row["left"]), str(row["touched"])]
        lines.append(f"| {row['case']} | {row['runs']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description="Busts of a large branch in Redis: answer, blocks, and all gone.")
    parser.add_argument("--entries", type=int, default=100_000, help="how many are busted (default: 100000)")
    parser.add_argument("--runs", type=int, default=10, help="busts of each case (default: 10)")
    parser.add_argument("--directory", type=Path, help="where the journals are (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args()
    if shutil.which("redis-server") is None:
        parser.error("redis-server is not installed: apt-get install redis-server")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.directory) as name, RedisProcess(Path(name), **SLOW_LOG) as server:
        rows = [
            summed_up(case, options.entries, measure(case, server, Path(name), options.entries, options.runs))
            for case in CASES
        ]
        with connect(server.port) as redis:
            version = redis.info("server")["redis_version"]
    recorded = record(options.output, "redis_prefix", begun, redis=version, rows=rows)
    print(recorded if options.json else table(rows))
    return int(any(row["right"] < row["runs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
