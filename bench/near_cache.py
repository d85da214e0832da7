"""A near cache: what a hit, a load and a bust cost, what an entry weighs, and how soon another client's cache knows.

    python -m bench.near_cache [--entries 1000,100000] [--calls 100000] [--busts 500] [--json]

A daemon with a journal is a process of its own, bound to one core where the system can do that; two clients, each with
a near cache, are in this one, bound to another. Every entry has two tags, and all share one value.

First, per number of entries held, microseconds for a call: of a **hit**, of entries here and there; beside it a
coroutine that does no more than look into a dict (**dict**), since any asyncio cache costs that; of a **load** of what
is not held, with a loader that returns at once; and of one of 1,000 callers who ask for the same key **together**, of
whom one loads. Then for what is dropped: an event that names a **key**, and one that names a **tag** or a **prefix** of
ten entries, per entry. **bytes** is what an entry takes beside its value, by tracemalloc.

Then busts, one after the other, by one client, of what both hold: milliseconds until its `bust` returned, until the
other's cache had dropped it, and how much later that was than the return (0 if sooner).

Writes results/near_cache.json. The exit code tells whether a cache held what was busted, or lost what was not; times
decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.events import bind, cores, running
from bench.plot import percentile
from bench.record import record
from pybustcall import BustcallClient, BustEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pybustcall import NearCache

PATIENCE: Final = 60.0  # seconds for the streams to be live, and for an event to arrive
TOGETHER: Final = 1000  # callers of one key
GROUP: Final = 10  # entries of one tag, and below one prefix
STRIDE: Final = 7919  # a prime, so that one hit after another is far from the last
VALUE: Final = object()


@dataclass
class Row:
    """What operations took with so many entries held: microseconds, and bytes of an entry."""

    entries: int
    hit: float
    dict: float
    load: float
    together: float
    key: float
    tag: float
    prefix: float
    bytes: float
    wrong: int


@dataclass
class Heard:
    """When so many busts were done: milliseconds, the median and p99."""

    busts: int
    answer: float
    answer_p99: float
    dropped: float
    dropped_p99: float
    later: float
    later_p99: float
    wrong: int


def load() -> object:
    """Load a value at once."""
    return VALUE


def key_of(number: int) -> str:
    """Name an entry; ten are below one prefix."""
    return f"shop/{number // GROUP}/{number}"


async def fill(cache: NearCache, first: int, count: int) -> None:
    """Load so many entries; ten have one tag."""
    for number in range(first, first + count):
        await cache.get_or_load(key_of(number), load, tags=[f"group:{number // GROUP}", f"shop:{number % 7}"])


async def timed(calls: int, work: Callable[[], Awaitable[object]]) -> float:
    """Tell how many microseconds one of so many calls took, which are all made by awaiting `work` once."""
    begun = time.perf_counter()
    await work()
    return (time.perf_counter() - begun) * 1e6 / calls


async def measure_operations(cache: NearCache, entries: int, calls: int) -> Row:
    """Measure with so many entries held, beginning with none."""
    cache.clear()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    await fill(cache, 0, entries)
    weight = (tracemalloc.get_traced_memory()[0] - before) / entries
    tracemalloc.stop()
    keys = [key_of(number * STRIDE % entries) for number in range(calls)]
    table = dict.fromkeys(map(key_of, range(entries)), VALUE)

    async def look(key: str) -> object:
        return table.get(key)

    async def look_all() -> None:
        for key in keys:
            await look(key)

    async def hit_all() -> None:
        for key in keys:
            await cache.get_or_load(key, load)

    async def ask_together() -> None:
        await asyncio.gather(*(cache.get_or_load("popular", load) for _ in range(TOGETHER)))

    wrong = abs(len(cache) - entries)
    bare, hit = await timed(calls, look_all), await timed(calls, hit_all)
    together = await timed(TOGETHER, ask_together)
    cache.drop("popular")
    count = min(calls, entries) // GROUP * GROUP
    loaded = await timed(count, lambda: fill(cache, entries, count))
    groups = count // GROUP

    def drop(kind: str, targets: list[str], expected: int) -> float:
        nonlocal wrong
        before = len(cache)
        begun = time.perf_counter()
        for target in targets:
            cache.busted(BustEvent(target=target, kind=kind))  # type: ignore[arg-type]
        seconds = time.perf_counter() - begun
        wrong += abs(before - len(cache) - expected)
        return seconds * 1e6 / expected

    first = entries // GROUP
    by_key = drop("key", [key_of(number) for number in range(entries, entries + count)], count)
    await fill(cache, entries, count)
    by_tag = drop("tag", [f"group:{number}" for number in range(first, first + groups)], count)
    await fill(cache, entries, count)
    by_prefix = drop("prefix", [f"shop/{number}" for number in range(first, first + groups)], count)
    return Row(entries, hit, bare, loaded, together, by_key, by_tag, by_prefix, weight, wrong)


async def measure_busts(writer: BustcallClient, mine: NearCache, other: NearCache, busts: int) -> Heard:
    """Have so many entries busted that both hold."""
    mine.clear()
    other.clear()
    answers, dropped, later, wrong = [], [], [], 0
    for number in range(busts):
        key = key_of(number)
        for cache in (mine, other):
            await cache.get_or_load(key, load)
        gone = asyncio.create_task(_when_gone(other))
        begun = time.perf_counter()
        await writer.bust(key)
        returned = time.perf_counter()
        wrong += len(mine)
        async with asyncio.timeout(PATIENCE):
            end = await gone
        answers.append((returned - begun) * 1000)
        dropped.append((end - begun) * 1000)
        later.append(max(0.0, end - returned) * 1000)
    (answer, answer_p99), (gone_after, gone_p99), (lag, lag_p99) = map(_middle_and_end, (answers, dropped, later))
    return Heard(busts, answer, answer_p99, gone_after, gone_p99, lag, lag_p99, wrong)


async def _when_gone(cache: NearCache) -> float:
    while len(cache):  # noqa: ASYNC110 - what is measured is when it is gone, without asking it to tell
        await asyncio.sleep(0)
    return time.perf_counter()


def _middle_and_end(times: list[float]) -> tuple[float, float]:
    return statistics.median(times), percentile(sorted(times), 99)


async def measure(url: str, sizes: list[int], calls: int, busts: int) -> tuple[list[Row], Heard]:
    """Measure everything at one daemon."""
    async with BustcallClient(url, probes=None) as writer, BustcallClient(url, probes=None) as reader:
        mine, other = (client.near_cache(maxsize=2 * max(sizes), ttl=3600.0) for client in (writer, reader))
        for cache in (mine, other):
            await cache.wait_trusted(PATIENCE)
        rows = [await measure_operations(mine, size, calls) for size in sizes]
        return rows, await measure_busts(writer, mine, other, busts)


def tables(rows: list[Row], heard: Heard) -> str:
    """Write what was measured in Markdown."""
    lines = [
        "| entries | hit | dict | load | together | key | tag | prefix | bytes | wrong |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.entries:,} | {row.hit:.2f} us | {row.dict:.2f} us | {row.load:.1f} us | {row.together:.1f} us"
        f" | {row.key:.1f} us | {row.tag:.1f} us | {row.prefix:.1f} us | {row.bytes:.0f} | {row.wrong} |"
        for row in rows
    ]
    times = (heard.answer, heard.answer_p99, heard.dropped, heard.dropped_p99, heard.later, heard.later_p99)
    lines += [
        "",
        "| busts | answer | p99 | dropped elsewhere | p99 | later | p99 | wrong |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| {heard.busts} | {' | '.join(f'{time:.2f} ms' for time in times)} | {heard.wrong} |",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the bench as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", default="1000,100000", help="how many entries, by commas (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=100_000, help="how many hits (default: %(default)s)")
    parser.add_argument("--busts", type=int, default=500, help="how many busts (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="where to write")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    asked = parser.parse_args()
    begun = time.perf_counter()
    sizes = [int(it) for it in asked.entries.split(",")]
    daemon_core, own_core = cores()
    bind(own_core)
    with tempfile.TemporaryDirectory() as directory, running(Path(directory), 10, daemon_core) as (url, _):
        rows, heard = asyncio.run(measure(url, sizes, asked.calls, asked.busts))
    recorded = record(
        asked.output, "near_cache", begun, calls=asked.calls, rows=[asdict(row) for row in rows], busts=asdict(heard)
    )
    print(recorded if asked.json else tables(rows, heard))
    return 1 if any(row.wrong for row in rows) or heard.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
