"""Readers of a daemon's events: how soon each is told of a bust, and what a reader costs the daemon in memory.

    python -m bench.events [--readers 1,100,1000] [--busts 100] [--json]

The daemon, with a journal, is a process of its own, bound to one core where the system can do that; the readers are in
this one, bound to another: plain sockets, so that reading costs as little as may be. A client beside them makes the
busts one after the other, each once every reader has heard of the one before, so that none queues.

Measured are the time from the sending of a bust to its answer; from the sending to the arrival of its event at each
reader (the first, the median, p99 and the last); the daemon's resident memory per reader; and the processor time that
the daemon spends on a bust and its events. Writes results/events.json. The exit code tells whether a reader missed an
event, got one twice, or out of order; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.plot import percentile
from bench.record import record
from pybustcall import BustcallClient
from pybustcall.daemon import DaemonSettings, Engine, Indexes, Layer, MemoryBackend, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE: Final = 60.0  # seconds for a reader to hear of a bust, and for the daemon to start
REQUEST: Final = "GET /api/v1/events?prefix=page/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass
class Row:
    """What so many readers came to; times in milliseconds, memory in KB."""

    readers: int
    answer: float
    first: float
    median: float
    p99: float
    last: float
    worst: float
    memory: float
    computed: float
    wrong: int


# The daemon's process


async def serve_events(directory: Path, readers: int, tell: Callable[[str], None]) -> None:
    """Serve a cache in memory until a signal comes."""
    indexes = Indexes()
    engine = Engine([Layer(name="memory", number=0, backend=MemoryBackend(indexes))], indexes)
    settings = DaemonSettings(port=0, journal=directory / "journal", max_readers=readers, max_connections=readers + 100)
    await serve(engine, settings, ready=tell)


def be_daemon(directory: Path, readers: int, told: Any, core: int | None) -> None:
    """Be the daemon's process."""
    bind(core)
    asyncio.run(serve_events(directory, readers, told.send))


def bind(core: int | None) -> None:
    """Use one core only, where the system can do that."""
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def cores() -> tuple[int | None, int | None]:
    """Choose a core for the daemon, and one for the readers; None where there are not two."""
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (there[0], there[1]) if len(there) > 1 else (None, None)


@contextmanager
def running(directory: Path, readers: int, core: int | None) -> Iterator[tuple[str, int]]:
    """Run the daemon; tell its URL and its process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=be_daemon, args=(directory, readers, there, core))
    process.start()
    try:
        if not here.poll(PATIENCE):
            raise SystemExit("the daemon did not start")
        yield str(here.recv()), process.pid or 0
    finally:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
        process.join(PATIENCE)


def resident(pid: int) -> float:
    """Tell the resident memory of a process in KB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    return 0.0


def computed(pid: int) -> float:
    """Tell the processor time of a process in milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


# The readers


class Reader(asyncio.Protocol):
    """A socket that notes when each event arrived."""

    def __init__(self) -> None:
        self.arrived: dict[str, float] = {}
        self.order: list[str] = []
        self.live = asyncio.Event()
        self.heard = asyncio.Event()
        self._text = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        transport.write(REQUEST.encode())  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Note what has arrived. A chunk's size lies between events, and never in one as short as these."""
        now = time.perf_counter()
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            if line.startswith(b'data: {"namespace"'):
                target = str(json.loads(line[6:])["target"])
                self.arrived.setdefault(target, now)
                self.order.append(target)
                self.heard.set()
            elif line == b"event: live":
                self.live.set()

    async def wait_for(self, target: str) -> None:
        """Wait until an event has arrived."""
        while target not in self.arrived:
            self.heard.clear()
            await self.heard.wait()


async def measure(url: str, pid: int, readers: int, busts: int) -> Row:
    """Have so many readers hear of so many busts."""
    loop = asyncio.get_running_loop()
    host, _, port = url.removeprefix("http://").rpartition(":")
    async with BustcallClient(url, probes=None) as client:
        await client.bust("warm/up")
        before = resident(pid)
        following = [(await loop.create_connection(Reader, host, int(port)))[1] for _ in range(readers)]
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(reader.live.wait() for reader in following))
        memory = (resident(pid) - before) / readers
        answers: list[float] = []
        told: list[list[float]] = []
        spent = computed(pid)
        for number in range(busts):
            target = f"page/{number}"
            begun = time.perf_counter()
            await client.bust(target)
            answers.append((time.perf_counter() - begun) * 1000)
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(reader.wait_for(target) for reader in following))
            told.append(sorted((reader.arrived[target] - begun) * 1000 for reader in following))
        spent = computed(pid) - spent
    expected = [f"page/{number}" for number in range(busts)]
    every = sorted(time for times in told for time in times)
    return Row(
        readers=readers,
        answer=statistics.median(answers),
        first=statistics.median(times[0] for times in told),
        median=statistics.median(every),
        p99=percentile(every, 99),
        last=statistics.median(times[-1] for times in told),
        worst=every[-1],
        memory=memory,
        computed=spent / busts,
        wrong=sum(reader.order != expected for reader in following),
    )


def run(readers: int, busts: int) -> Row:
    """Measure with a daemon of its own."""
    mine, other = cores()
    bind(other)
    with tempfile.TemporaryDirectory() as directory, running(Path(directory), readers, mine) as (url, pid):
        return asyncio.run(measure(url, pid, readers, busts))


def table(rows: list[Row]) -> str:
    """Write the rows in Markdown."""
    lines = [
        "| readers | answer | first told | median | p99 | last told | worst | memory | computed | wrong |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.readers} | {row.answer:.1f} ms | {row.first:.1f} ms | {row.median:.1f} ms | {row.p99:.1f} ms"
        f" | {row.last:.1f} ms | {row.worst:.1f} ms | {row.memory:.0f} KB | {row.computed:.1f} ms | {row.wrong} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the bench as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", default="1,100,1000", help="how many readers, by commas (default: %(default)s)")
    parser.add_argument("--busts", type=int, default=100, help="how many busts (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="where to write")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args()
    begun = time.perf_counter()
    counts = [int(it) for it in asked.readers.split(",")]
    least, most = 2 * max(counts) + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (least if most == resource.RLIM_INFINITY else min(least, most), most))
    rows = [run(count, asked.busts) for count in counts]
    recorded = record(asked.output, "events", begun, busts=asked.busts, rows=[asdict(row) for row in rows])
    print(recorded if asked.json else table(rows))
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
