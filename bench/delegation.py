"""What a bust costs by the number of registered entries: counted steps, and the time until a client has its answer.

    python -m bench.delegation [--most 1000000] [--samples 200] [--json]

Indexes of 1,000 entries and more, three and ten times as many each, up to `--most`: branches of ten entries, each with
a tag and a subject of its own, a fifth with a lifetime. Every bust reaches the same number of entries in each, and they
are registered again after it. Once in this process, with keys that count every comparison, from the wish to its end in
the journal; and once over HTTP, by one client that busts one after the other at a daemon in a process of its own, whose
journal is in memory: what a disk takes does not depend on the entries. Writes results/delegation.json and two plots.
The exit code tells whether the steps of each bust lie on a + b * log2(n) and grow no faster, and whether each bust
removed what it should; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.growth import fitted, plot_steps, sizes, table
from bench.plot import Curve, chart, percentile
from bench.record import record
from pybustcall import BustcallClient
from pybustcall.daemon import DaemonSettings, Engine, Layer, MemoryBackend, serve
from tests.counting import EVERY, LEAVES, branch
from tests.delegation import BUSTS, Asked, delegating, filled, spread, steps_per

if TYPE_CHECKING:
    from collections.abc import Iterator

PLOTTED: Final = tuple(asked.name for asked in BUSTS if asked.strategy == "dimensional")
WARMING: Final = 30  # busts that are not counted: connections, caches, and the daemon's first steps


# Counted steps


async def count_steps(n: int, samples: int) -> dict[str, float]:
    """Tell the steps of each bust among n entries."""
    with tempfile.TemporaryDirectory() as directory:
        async with delegating(filled(n), Path(directory, "journal")) as delegation:
            return {asked.name: round(await steps_per(asked, delegation, samples=samples), 2) for asked in BUSTS}


# Time


async def serve_filled(n: int) -> None:
    """Be a daemon with n registered entries, until it is told to end; say its URL."""
    indexes = filled(n, text=str)
    gc.collect()  # or the first busts would wait for a look at all that was made just now
    engine = Engine([Layer(name="memory", number=0, backend=MemoryBackend(indexes))], indexes)
    settings = DaemonSettings(port=0, max_entries=2 * n)
    await serve(engine, settings, ready=lambda url: print(url, flush=True))


@contextlib.contextmanager
def daemon(n: int) -> Iterator[str]:
    """Run such a daemon in a process of its own; tell its URL."""
    command = [sys.executable, "-m", "bench.delegation", "--serve", str(n)]
    home = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - for the type checker
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGTERM)


def reached(asked: Asked, number: int) -> list[str]:
    """List the keys that a bust removes."""
    return [f"{branch(number)}/{leaf}" for leaf in LEAVES[: asked.removes]]


async def register(client: BustcallClient, keys: list[str], number: int) -> None:
    """Register these entries of a branch as they were at the beginning."""
    subject, tag, ttl = f"s{number:07}", f"t{number:07}", None if number % EVERY else 3600.0
    await asyncio.gather(*(client.register(key, [subject], tags=[tag], ttl=ttl) for key in keys))


async def time_busts(url: str, n: int, samples: int) -> tuple[dict[str, list[float]], int]:
    """Bust each so many times; tell the milliseconds of each, and how many did not remove what they should."""
    wrong = 0
    taken: dict[str, list[float]] = {}
    warming = [(BUSTS[0], number) for number in spread(n, WARMING)]
    measured = [(asked, number) for asked in BUSTS for number in spread(n, samples)]
    async with BustcallClient(url, timeout=30.0, probes=None) as client:
        for asked, number in [*warming, *measured]:
            target = asked.target(number)
            begun = time.perf_counter()
            result = await client.bust(target, kind=asked.kind, strategy=asked.strategy)
            taken.setdefault(asked.name, []).append((time.perf_counter() - begun) * 1000)
            wrong += result.removed != asked.removes
            await register(client, reached(asked, number), number)
    return {name: times[-samples:] for name, times in taken.items()}, wrong


# What came of it


def bench(options: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Measure each bust at each size; sum up, and tell how many did not remove what they should."""
    rows: dict[str, dict[str, Any]] = {
        asked.name: {"bust": asked.name, "removes": asked.removes, "steps": [], "p50_ms": [], "p99_ms": []}
        for asked in BUSTS
    }
    wrong = 0
    for n in sizes(options.most):
        steps = asyncio.run(count_steps(n, options.samples))
        with daemon(n) as url:
            times, missed = asyncio.run(time_busts(url, n, options.samples))
        wrong += missed
        for name, row in rows.items():
            row["steps"].append((n, steps[name]))
            row["p50_ms"].append((n, round(percentile(times[name], 50), 3)))
            row["p99_ms"].append((n, round(percentile(times[name], 99), 3)))
    return [{**row, **fitted(row["steps"])} for row in rows.values()], wrong


def plot_times(rows: dict[str, dict[str, Any]]) -> str:
    """Plot the times, medians as lines and the slowest of a hundred as dashes."""
    curves = [Curve(f"{name}, p50", row["p50_ms"]) for name, row in rows.items()]
    curves += [Curve(f"{name}, p99", row["p99_ms"], dashed=True) for name, row in rows.items()]
    highest = max(value for row in rows.values() for _, value in row["p99_ms"])
    title = "Time of a bust over HTTP, by the number of registered entries"
    return chart(title, curves, x="entries", y="milliseconds", log_x=True, y_range=(0.0, highest))


def main() -> int:
    """Run the bench, or a daemon of it; return the exit code."""
    parser = argparse.ArgumentParser(description="Counted steps and time of busts, by the registered entries.")
    parser.add_argument("--most", type=int, default=10**6, help="the largest index (default: 1000000)")
    parser.add_argument("--samples", type=int, default=200, help="times that each is done (default: 200)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    parser.add_argument("--serve", type=int, metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve_filled(options.serve))
        return 0
    begun = time.perf_counter()
    rows, wrong = bench(options)
    recorded = record(options.output, "delegation", begun, wrong=wrong, rows=rows)
    plotted = {row["bust"]: row for row in rows if row["bust"] in PLOTTED}
    title = "Comparisons of keys per bust, by the number of registered entries"
    (options.output / "delegation_steps.svg").write_text(plot_steps(title, plotted, digits=0))
    (options.output / "delegation_times.svg").write_text(plot_times(plotted))
    times = {"p50_ms": ".2f", "p99_ms": ".2f"}
    print(recorded if options.json else table(rows, ["bust", "removes"], times=times, digits=0))
    return int(wrong > 0 or not all(row["is_logarithmic"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
