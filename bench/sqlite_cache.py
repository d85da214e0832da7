"""A cache in an SQLite file: how much it takes, alone and shared, and a bust of a branch of 100,000 entries in it.

    python -m bench.sqlite_cache [--entries 100000] [--runs 10] [--seconds 2] [--directory DIR] [--json]

First, how many look-ups and stores a second one process gets done, and two at the same time that share the file: each
one after another, and 50 at once; of entries of 1,000 bytes, of which 10,000 are held.

Then busts. A daemon with a journal is a process of its own, and so is a reader that looks up and stores all the while;
in each run the branch is stored anew and busted. A hybrid bust is answered once readers miss the branch, and swept
after it; a dimensional one when the sweep is over, or after a second as a job; a soft one marks. Beside the branch lie
entries with similar keys, and of another tenant, which no bust may touch.

Measured are the time to the answer and to the end, at the client; the longest block of the daemon's event loop, by a
task there that means to sleep for a millisecond, and the most that the loop's thread computed in one go, which does not
count what else the machine did; and how long the reader waited meanwhile to look up and to store. Writes
results/sqlite_cache.json. The exit code tells whether anything was left, or touched; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from bench.plot import percentile
from bench.record import record
from pybustcall import BustcallClient
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Layer, serve
from pybustcall.daemon.backends.sqlite import SqliteBackend
from pybustcall.integrations.sqlite import SqliteCache

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from multiprocessing.connection import Connection

GOAL: Final = 50.0  # milliseconds, of the time to the answer of a hybrid bust and of the longest block
HELD: Final = 10_000  # entries from which look-ups choose
AT_ONCE: Final = 50
VALUE: Final = b"v" * 1000
PREFIX: Final = "product"
OTHERS: Final = 1000  # entries that no bust may touch, in each of two namespaces
TENANT: Final = "tenant"
PAUSE: Final = 0.001  # seconds that the task means to sleep which watches the event loop
PATIENCE: Final = 120.0  # seconds for a bust to end
ROOM: Final = 1 << 30

Work = Literal["look-ups", "stores"]


# How much it takes


async def use(cache: SqliteCache, work: Work, at_once: int, seconds: float, process: int) -> int:
    """Look up or store for so long, so many at once; tell how many were done."""
    end = time.monotonic() + seconds

    async def go(number: int) -> int:
        done = 0
        while time.monotonic() < end:
            key = f"held/{(process * 7919 + number * 104729 + done * 31) % HELD}"
            if work == "look-ups":
                assert await cache.get(key) is not None  # noqa: S101 - it is held
            else:
                await cache.set(key, VALUE, ttl=3600.0)
            done += 1
        return done

    return sum(await asyncio.gather(*(go(number) for number in range(at_once))))


def run_user(path: Path, work: Work, at_once: int, seconds: float, process: int, told: Connection) -> None:
    """Be one of several processes: begin with the others, tell how many were done."""

    async def run() -> int:
        async with SqliteCache(path, max_bytes=ROOM, timeout=10.0) as cache:
            await cache.get("held/0")
            told.send("ready")
            told.recv()
            return await use(cache, work, at_once, seconds, process)

    told.send(asyncio.run(run()))


def throughput(path: Path, work: Work, processes: int, at_once: int, seconds: float) -> dict[str, Any]:
    """Measure one case; make a row of the results."""
    context = multiprocessing.get_context("spawn")
    users = []
    for number in range(processes):
        here, there = context.Pipe()
        process = context.Process(target=run_user, args=(path, work, at_once, seconds, number, there))
        process.start()
        users.append((process, here))
    for _, here in users:
        here.recv()
    for _, here in users:
        here.send("go")
    done = sum(here.recv() for _, here in users)
    for process, _ in users:
        process.join()
    return {"work": work, "processes": processes, "at_once": at_once, "a_second": round(done / seconds)}


# Busts


@dataclass(frozen=True)
class Case:
    """How the branch is busted."""

    name: str
    strategy: str = "hybrid"
    soft: bool = False
    goal: float | None = None


CASES: Final = (
    Case("hybrid", goal=GOAL),
    Case("dimensional", strategy="dimensional"),
    Case("hybrid, soft", soft=True),
)


@dataclass
class Run:
    """What one bust took, in milliseconds, and what was wrong with it."""

    answer: float = 0.0
    end: float = 0.0
    block: float = 0.0
    computed: float = 0.0
    looked: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    left: int = 0
    touched: int = 0


async def watch(longest: Any) -> None:
    """Note for how many milliseconds at most the event loop did not come round, and at most computed meanwhile.

    Where the machine is busy with something else, only the latter tells of the daemon.
    """
    while True:
        begun, computed = time.perf_counter(), time.thread_time()
        await asyncio.sleep(PAUSE)
        longest[0] = max(longest[0], (time.perf_counter() - begun - PAUSE) * 1000)
        longest[1] = max(longest[1], (time.thread_time() - computed) * 1000)


async def serve_watched(path: Path, journal: Path, longest: Any, tell: Callable[[str], None]) -> None:
    """Serve one layer in the file until a signal comes."""
    layer = Layer(name="sqlite", number=0, backend=SqliteBackend(path, timeout=10.0))
    watching = asyncio.create_task(watch(longest))
    try:
        await serve(Engine([layer], Indexes()), DaemonSettings(port=0, journal=journal), ready=tell)
    finally:
        watching.cancel()


def run_daemon(path: Path, journal: Path, longest: Any, told: Connection) -> None:
    """Be the daemon's process."""
    asyncio.run(serve_watched(path, journal, longest, told.send))


@contextmanager
def daemon(path: Path, journal: Path) -> Iterator[tuple[str, Any]]:
    """Run a daemon in a process of its own; tell its URL, and where it notes its longest blocks."""
    context = multiprocessing.get_context("spawn")
    longest = context.Array("d", 2, lock=False)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=run_daemon, args=(path, journal, longest, there))
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


async def put_all(cache: SqliteCache, keys: list[str]) -> None:
    """Store entries, some at once."""
    for begin in range(0, len(keys), 500):
        await asyncio.gather(*(cache.set(key, VALUE, tags=["all"], ttl=3600.0) for key in keys[begin : begin + 500]))


async def repeat(took: list[float], ask: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Ask again and again, and note how long each time takes, in milliseconds."""
    while True:
        begun = time.perf_counter()
        await ask()
        took.append((time.perf_counter() - begun) * 1000)
        await asyncio.sleep(0.005)


async def bust(case: Case, url: str, cache: SqliteCache, run: Run) -> None:
    """Bust the branch, and wait until it is over, while somebody looks up and stores elsewhere."""
    async with BustcallClient(url, probes=None) as client:
        asking = [
            asyncio.create_task(repeat(run.looked, lambda: cache.get("other/0"))),
            asyncio.create_task(repeat(run.stored, lambda: cache.set("other/new", VALUE, ttl=None))),
        ]
        try:
            await asyncio.sleep(0.05)
            begun = time.perf_counter()
            result = await client.bust(PREFIX, kind="prefix", strategy=case.strategy, soft=case.soft)
            run.answer = (time.perf_counter() - begun) * 1000
            assert result.job is not None, result  # noqa: S101 - the daemon has a journal
            told = await client.wait_job(result.job, timeout=PATIENCE)
            run.end = (time.perf_counter() - begun) * 1000
            assert told.state == "done", told  # noqa: S101 - nothing else is possible
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)


async def measure(case: Case, path: Path, directory: Path, entries: int, runs: int) -> list[Run]:
    """Store and bust the branch so many times."""
    branch = [f"{PREFIX}/{number % 97}/{number}" for number in range(entries)]
    others = [f"other/{number}" for number in range(OTHERS - 2)] + [f"{PREFIX}s/1", f"{PREFIX}s"]
    done: list[Run] = []
    async with (
        SqliteCache(path, max_bytes=ROOM, timeout=10.0) as cache,
        SqliteCache(path, namespace=TENANT, max_bytes=ROOM) as tenant,
    ):
        await put_all(cache, others)
        await put_all(tenant, branch[:OTHERS])
        with daemon(path, directory / f"journal-{CASES.index(case)}.db") as (url, longest):
            for _ in range(runs):
                await put_all(cache, branch)
                run = Run()
                longest[:] = [0.0, 0.0]
                await bust(case, url, cache, run)
                run.block, run.computed = longest
                found = [await cache.get(key) for key in branch[:: max(1, entries // 5000)]]
                run.left = sum(it is not None and not (case.soft and it.stale) for it in found)
                kept = [await cache.get(key) for key in others] + [await tenant.get(key) for key in branch[:OTHERS]]
                run.touched = sum(it is None or it.stale for it in kept)
                done.append(run)
    return done


def summed_up(case: Case, entries: int, runs: list[Run]) -> dict[str, Any]:
    """Make a row of the results."""
    row: dict[str, Any] = {"case": case.name, "entries": entries, "runs": len(runs)}
    row |= {"answer_goal_ms": case.goal, "block_goal_ms": GOAL}
    for name in ("answer", "block", "computed", "end"):
        values = [getattr(run, name) for run in runs]
        row |= {f"{name}_ms": round(statistics.median(values), 1), f"{name}_max_ms": round(max(values), 1)}
    for name in ("looked", "stored"):
        took = [it for run in runs for it in getattr(run, name)]
        row |= {f"{name}_p99_ms": round(percentile(took, 99), 1), f"{name}_max_ms": round(max(took), 1)}
    return row | {"left": sum(run.left for run in runs), "touched": sum(run.touched for run in runs)}


def tables(taken: list[dict[str, Any]], busted: list[dict[str, Any]]) -> str:
    """Make two Markdown tables: how many a second; and of milliseconds the median of the runs and the worst."""
    lines = ["| | processes | at once | a second |", "|---|---:|---:|---:|"]
    lines += [f"| {row['work']} | {row['processes']} | {row['at_once']} | {row['a_second']:,} |" for row in taken]
    heads = ["bust", "runs", *(f"{name} ms | worst" for name in ("answer", "block", "computed"))]
    heads += ["look-up p99 | worst", "store p99 | worst", "end s", "left", "touched"]
    lines += ["", f"| {' | '.join(heads)} |", f"|---|{'---:|' * 14}"]
    for row in busted:
        figures = [f"{row[f'{name}_ms']:,} | {row[f'{name}_max_ms']:,}" for name in ("answer", "block", "computed")]
        figures += [f"{row[f'{name}_p99_ms']:,} | {row[f'{name}_max_ms']:,}" for name in ("looked", "stored")]
        figures += [f"{row['end_ms'] / 1000:.1f}", str(row["left"]), str(row["touched"])]
        lines.append(f"| {row['case']} | {row['runs']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description="A cache in an SQLite file: look-ups, stores, and large busts.")
    parser.add_argument("--entries", type=int, default=100_000, help="how many are busted (default: 100000)")
    parser.add_argument("--runs", type=int, default=10, help="busts of each case (default: 10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for which each case is tried (default: 2)")
    parser.add_argument("--directory", type=Path, help="where the files are (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)

        async def fill(path: Path) -> None:
            async with SqliteCache(path, max_bytes=ROOM) as cache:
                await put_all(cache, [f"held/{number}" for number in range(HELD)])

        asyncio.run(fill(directory / "taken.db"))
        works: tuple[Work, ...] = ("look-ups", "stores")
        taken = [
            throughput(directory / "taken.db", work, processes, at_once, options.seconds)
            for work in works
            for processes in (1, 2)
            for at_once in (1, AT_ONCE)
        ]
        busted = [
            summed_up(
                case,
                options.entries,
                asyncio.run(
                    measure(case, directory / f"{CASES.index(case)}.db", directory, options.entries, options.runs)
                ),
            )
            for case in CASES
        ]
    recorded = record(options.output, "sqlite_cache", begun, sqlite=sqlite3.sqlite_version, taken=taken, rows=busted)
    print(recorded if options.json else tables(taken, busted))
    return int(any(row["left"] or row["touched"] for row in busted))


if __name__ == "__main__":
    sys.exit(main())
