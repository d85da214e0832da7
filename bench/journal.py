"""How many busts a second the daemon's journal takes, and how long each waits until it is safe on the disk.

    python -m bench.journal [--begins 5000] [--callers 1,64,512] [--directory DIR] [--json]

So many callers begin busts one after the other, and tell of each that it is done; a file of its own for each number of
callers, in DIR (the system's directory for temporary files by default: give one on the disk that you mean, since on
tmpfs nothing is waited for). Measured are the rate, the time that a begin takes, how many share one commit, and how
many bytes an entry has in the file. Beside it, what the disk itself takes to have 4 KiB written and synced, one after
the other. Writes results/journal.json. The exit code tells whether what was begun is there afterwards; times decide
nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench.plot import percentile
from bench.record import record
from pybustcall.daemon.journal import Entry, Journal, Wish
from pybustcall.models import LayerReply

SYNCS: Final = 200  # to tell what the disk itself takes


def a_bust(number: int) -> Entry:
    """Make a bust as a client would ask for it."""
    wish = Wish(namespace="default", kind="key", target=f"/products/{number}?page=2", strategy="dimensional")
    return Entry(job=os.urandom(16).hex(), wish=wish, binding="pybustcall", daemon="hub", at=time.time_ns())


async def measure(callers: int, begins: int, directory: Path) -> dict[str, Any]:
    """Have so many callers begin so many busts in all; sum up."""
    path = directory / f"journal-{callers}.db"
    journal = Journal(path, give_up=600.0)
    await journal.open()
    elapsed: list[float] = []
    numbers = iter(range(begins))
    layers = (LayerReply(name="memory", ok=True, removed=1),)

    async def call() -> None:
        for number in numbers:
            begun = time.perf_counter()
            entry = await journal.begin(a_bust(number))
            elapsed.append((time.perf_counter() - begun) * 1000)
            journal.put(replace(entry, state="done", ended=time.time_ns(), removed=1, attempts=1, layers=layers))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(call())
    seconds = time.perf_counter() - start
    commits = journal.commits
    await journal.close()
    size = path.stat().st_size
    await journal.open()
    found = 0
    before: int | None = None
    while page := await journal.recent(before=before, limit=1000):
        found, before = found + len(page), page[-1].number
    await journal.close()
    return {
        "callers": callers,
        "begins": begins,
        "per_second": round(begins / seconds),
        "p50_ms": round(percentile(elapsed, 50), 2),
        "p99_ms": round(percentile(elapsed, 99), 2),
        "begins_per_commit": round(begins / commits, 1),
        "bytes_per_entry": round(size / begins),
        "lost": begins - found,
    }


def time_of_sync(directory: Path) -> float:
    """Tell the milliseconds that half of the disk's syncs take at most."""
    elapsed = []
    descriptor = os.open(directory / "sync", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for _ in range(SYNCS):
            os.write(descriptor, bytes(4096))
            begun = time.perf_counter()
            os.fdatasync(descriptor)
            elapsed.append((time.perf_counter() - begun) * 1000)
    finally:
        os.close(descriptor)
    return percentile(elapsed, 50)


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table."""
    lines = [
        "| callers | begins | begins/s | p50 ms | p99 ms | begins/commit | bytes/entry | lost |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['callers']} | {row['begins']} | {row['per_second']} | {row['p50_ms']} | {row['p99_ms']} "
        f"| {row['begins_per_commit']} | {row['bytes_per_entry']} | {row['lost']} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description="Group commit of the daemon's journal, by the number of callers.")
    parser.add_argument("--begins", type=int, default=5000, help="busts for each number of callers (default: 5000)")
    parser.add_argument("--callers", default="1,64,512", help="how many at once (default: 1,64,512)")
    parser.add_argument("--directory", type=Path, help="where the journals are (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        sync = time_of_sync(Path(directory))
        rows = [
            asyncio.run(measure(int(callers), options.begins, Path(directory)))
            for callers in options.callers.split(",")
        ]
    recorded = record(options.output, "journal", begun, sync_ms=round(sync, 3), rows=rows)
    print(recorded if options.json else f"{table(rows)}\n\nThe disk syncs 4 KiB in {sync:.2f} ms.")
    return int(any(row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
