"""How long calls take while the hub is killed, or goes silent, under load.

    python -m bench.failover [--trials 100] [--workers 50] [--json]

The daemons are real processes over one directory of files; every bust has a file of its own, made before the call and
looked for after it, so that a bust that returned without having reached any daemon is seen (lost). Two faults: the hub
is killed (SIGKILL), or stopped (SIGSTOP): then it still takes connections, and never answers. Measured is every call
in flight at the fault or begun within half a second after it. A lone caller has made one call before, and makes one
after the fault: it knows nothing of the daemon's usual latency.

On the same machine, under the same load: what one would write by hand with aiohttp (the hub for at most 2 s, then the
peers), and elastic-transport if it is installed. Writes results/failover.json and .svg. The exit code tells whether
pybustcall failed or lost any bust; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from bench.plot import Curve, chart, ecdf, percentile
from bench.record import record
from pybustcall import BustcallClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

Bust = Callable[[str], Awaitable[bool]]
Contestant = Callable[[str, list[str]], AbstractAsyncContextManager[Bust]]

FAULTS = {"killed": signal.SIGKILL, "black hole": signal.SIGSTOP}
GOALS = {  # of pybustcall: milliseconds
    ("killed", "workers"): 50.0,
    ("black hole", "workers"): 300.0,
    ("killed", "lone"): 1500.0,
    ("black hole", "lone"): 3000.0,
}
WINDOW = 0.5  # seconds after the fault in which calls begin that are measured
WARM = 600  # calls before the fault, so that the client knows the hub's live p95, and not that of new connections
PATIENCE = 30.0  # seconds for a phase of a trial
BATCH = 10  # daemons started at once; lone callers at one fault


# Daemons


@dataclass
class Daemon:
    """A reference daemon in a process of its own."""

    process: subprocess.Popen[bytes]
    url: str = ""

    @classmethod
    def start_many(cls, count: int, root: Path) -> list[Daemon]:
        """Start so many daemons over one directory, and wait until they listen."""
        command = [sys.executable, "-m", "pybustcall", "daemon", "--root", str(root), "--port", "0", "--json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
        daemons: list[Daemon] = []
        try:
            for _ in range(count):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
                daemons.append(cls(process))
            for daemon in daemons:
                assert daemon.process.stdout is not None  # noqa: S101 - it is a pipe
                daemon.url = json.loads(daemon.process.stdout.readline())["url"]
        except BaseException:
            end(daemons)
            raise
        return daemons


def end(daemons: list[Daemon]) -> None:
    """Kill daemons, also stopped ones, and wait until they are gone."""
    for daemon in daemons:
        daemon.process.kill()
    for daemon in daemons:
        daemon.process.communicate()


# Contestants: each is given the hub and the peers, and busts a key; it tells whether that was acknowledged


@asynccontextmanager
async def with_pybustcall(hub: str, peers: list[str]) -> AsyncIterator[Bust]:
    """Bust with this package, as it is by default."""
    async with BustcallClient(hub, peers=peers) as client:

        async def bust(key: str) -> bool:
            return (await client.bust(key, strategy="direct", fault_tolerance=12)).ok

        yield bust


@asynccontextmanager
async def with_aiohttp(hub: str, peers: list[str]) -> AsyncIterator[Bust]:
    """Bust as one would by hand: one session, each daemon in turn for at most 2 s, the next after any failure."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:

        async def bust(key: str) -> bool:
            body = {"target": key, "strategy": "direct", "binding": "pybustcall", "fault_tolerance": 6}
            for url in (hub, *peers):
                try:
                    async with session.post(f"{url}/api/v1/bust", json=body) as response:
                        if response.status == 200 and (await response.json())["status"] == "success":
                            return True
                except (aiohttp.ClientError, TimeoutError):
                    continue
            return False

        yield bust


@asynccontextmanager
async def with_elastic_transport(hub: str, peers: list[str]) -> AsyncIterator[Bust]:
    """Bust with elastic-transport: a pool that prefers the hub, one try at each node, 2 s each."""
    import elastic_transport as et  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - optional

    class FirstAlive(et.NodeSelector):  # type: ignore[misc,unused-ignore]
        def select(self, nodes: Any) -> Any:
            return min(nodes, key=lambda node: [hub, *peers].index(node.base_url))

    transport = et.AsyncTransport(
        [et.client_utils.url_to_node_config(url) for url in (hub, *peers)],
        node_class=et.AiohttpHttpNode,
        node_selector_class=FirstAlive,
        randomize_nodes_in_pool=False,
        max_retries=len(peers),
        retry_on_timeout=True,
    )

    async def bust(key: str) -> bool:
        body = {"target": key, "strategy": "direct", "binding": "pybustcall", "fault_tolerance": 6}
        headers = {"content-type": "application/json", "accept": "application/json"}
        try:
            answer = await transport.perform_request(
                "POST", "/api/v1/bust", body=body, headers=headers, request_timeout=2.0
            )
        except et.TransportError:
            return False
        return bool(answer.meta.status == 200 and answer.body["status"] == "success")

    try:
        yield bust
    finally:
        await transport.close()


def contestants() -> dict[str, Contestant]:
    """List those that can be tried here."""
    found: dict[str, Contestant] = {"pybustcall": with_pybustcall, "aiohttp by hand": with_aiohttp}
    try:
        import elastic_transport  # type: ignore[import-not-found,unused-ignore]  # noqa: F401, PLC0415
    except ImportError:
        pass
    else:
        found["elastic-transport"] = with_elastic_transport
    return found


# Trials


@dataclass
class Series:
    """What the trials of one contestant came to, under one fault: seconds of each call, and what went wrong.

    `before`: calls in the last half second before the fault; `caught`: in flight at the fault; `after`: begun after it.
    """

    contestant: str
    fault: str
    load: str
    trials: int = 0
    before: list[float] = field(default_factory=list)
    caught: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    failed: int = 0
    lost: int = 0

    @property
    def affected(self) -> list[float]:
        """All calls that the fault could affect."""
        return self.caught + self.after

    def summary(self) -> dict[str, Any]:
        """Sum up, in milliseconds."""
        return {
            "contestant": self.contestant,
            "fault": self.fault,
            "load": self.load,
            "trials": self.trials,
            "calls": len(self.affected),
            "caught": len(self.caught),
            **{f"before_p{share}_ms": milliseconds(self.before, share) for share in (50, 95, 99)},
            **{f"p{share}_ms": milliseconds(self.affected, share) for share in (50, 99, 100)},
            "caught_p99_ms": milliseconds(self.caught, 99),
            "goal_ms": GOALS[self.fault, self.load] if self.contestant == "pybustcall" else None,
            "failed": self.failed,
            "lost": self.lost,
            "ecdf": [(round(x * 1000, 3), round(y, 5)) for x, y in ecdf(self.affected)],
        }


def milliseconds(values: list[float], share: float) -> float | None:
    """Tell a percentile in milliseconds: the smallest value that so many per cent are at most; None for no values."""
    if not values:
        return None
    return round(percentile(values, share) * 1000, 2)


class Keys:
    """Makes a file for each key that is to be busted, and knows afterwards which are still there."""

    def __init__(self, root: Path, worker: int) -> None:
        self._root = root
        self._name = f"{worker}"
        self._number = 0
        (root / self._name).mkdir(exist_ok=True)

    def __iter__(self) -> Iterator[str]:
        while True:
            self._number += 1
            key = f"{self._name}/{self._number}-{random.getrandbits(48):x}"  # only to be unique
            (self._root / key).touch()
            yield key


async def timed(bust: Bust, key: str) -> tuple[float, float, str, bool]:
    """Bust a key; return when it began and ended, the key, and whether it was acknowledged."""
    begun = time.perf_counter()
    ok = await bust(key)
    return begun, time.perf_counter(), key, ok


def take(series: Series, calls: list[tuple[float, float, str, bool]], fault: float, root: Path) -> None:
    """Take in the calls of one trial."""
    series.trials += 1
    for begun, ended, key, ok in calls:
        if ended < fault:
            if begun > fault - WINDOW:
                series.before.append(ended - begun)
        elif begun < fault + WINDOW:
            (series.caught if begun < fault else series.after).append(ended - begun)
        series.failed += not ok
        left = (root / key).exists()
        series.lost += ok and left
        if left:
            (root / key).unlink()


async def try_workers(
    series: Series, make: Contestant, hub: Daemon, peers: list[str], root: Path, workers: int, think: float
) -> None:
    """Let workers bust, each with pauses of `think` seconds on average; harm the hub in the midst of it."""
    calls: list[tuple[float, float, str, bool]] = []
    fault = math.inf

    async def work(number: int, bust: Bust) -> None:
        for key in Keys(root, number):
            await asyncio.sleep(random.random() * 2 * think)  # noqa: S311
            if time.perf_counter() > fault + WINDOW:
                return
            calls.append(await timed(bust, key))

    async with make(hub.url, peers) as bust, asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for number in range(workers):
            group.create_task(work(number, bust))
        while len(calls) < WARM:  # noqa: ASYNC110 - the bench's own clock must not wake the measured calls' tasks
            await asyncio.sleep(0.01)
        hub.process.send_signal(FAULTS[series.fault])
        fault = time.perf_counter()
    take(series, calls, fault, root)


async def try_lone(series: Series, make: Contestant, hub: Daemon, peers: list[str], root: Path, callers: int) -> None:
    """Let callers that know nothing of each other make one call each, harm the hub, and let them make another."""
    gate = asyncio.Event()
    calls: list[tuple[float, float, str, bool]] = []

    async def call(number: int) -> None:
        keys = iter(Keys(root, number))
        async with make(hub.url, peers) as bust:
            calls.append(await timed(bust, next(keys)))
            await gate.wait()
            calls.append(await timed(bust, next(keys)))

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(call(number))
        while len(calls) < callers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        hub.process.send_signal(FAULTS[series.fault])
        fault = time.perf_counter()
        gate.set()
    take(series, calls, fault, root)
    series.trials += callers - 1


async def run(contestant: str, make: Contestant, fault: str, options: argparse.Namespace, root: Path) -> list[Series]:
    """Run all trials of one contestant under one fault."""
    trials = options.trials if contestant == "pybustcall" else options.others
    loaded, lone = Series(contestant, fault, "workers"), Series(contestant, fault, "lone")
    peers = await asyncio.to_thread(Daemon.start_many, 2, root)
    hubs: list[Daemon] = []
    urls = [peer.url for peer in peers]

    async def fresh(left: int) -> Daemon:
        """Return a hub in good health: after a kill another one, after a stop the same."""
        if hubs and fault == "killed":
            end([hubs.pop()])
        if not hubs:
            hubs.extend(await asyncio.to_thread(Daemon.start_many, min(left, BATCH) if fault == "killed" else 1, root))
        hubs[-1].process.send_signal(signal.SIGCONT)
        return hubs[-1]

    try:
        for left in range(trials, 0, -1):
            hub = await fresh(left)
            await try_workers(loaded, make, hub, urls, root, options.workers, options.think)
            progress(loaded, trials)
        for left in range(math.ceil(trials / BATCH), 0, -1):
            hub = await fresh(left)
            await try_lone(lone, make, hub, urls, root, min(BATCH, trials - lone.trials))
            progress(lone, trials)
    finally:
        end(peers + hubs)
    return [loaded, lone]


def progress(series: Series, trials: int) -> None:
    """Tell a terminal how far it has come."""
    if sys.stderr.isatty():
        end_ = "\n" if series.trials == trials else "\r"
        print(
            f"{series.contestant}, {series.fault}, {series.load}: {series.trials}/{trials} ", end=end_, file=sys.stderr
        )


# What is told


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}"

    lines = [
        "| hub | load | by | faults | calls | before p50 | p95 | p50 | p99 | max | caught | goal | failed | lost |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = [
            number(row[name])
            for name in ("before_p50_ms", "before_p95_ms", "p50_ms", "p99_ms", "p100_ms", "caught_p99_ms", "goal_ms")
        ]
        cells = [row["fault"], row["load"], row["contestant"], str(row["trials"]), f"{row['calls']:,}", *figures]
        lines.append(f"| {' | '.join(cells)} | {row['failed']} | {row['lost']} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], workers: int) -> str:
    """Plot the distribution of the workers' calls."""
    curves = [
        Curve(
            f"{row['contestant']}, {row['fault']}",
            [(max(x, 0.1), y) for x, y in row["ecdf"]],
            "step",
            dashed=row["fault"] != "killed",
        )
        for row in rows
        if row["load"] == "workers"
    ]
    return chart(
        f"Calls in flight at the fault or begun within {WINDOW:g} s after it, {workers} workers",
        curves,
        x="milliseconds",
        y="share of the calls",
        log_x=True,
        y_range=(0.0, 1.0),
        marks=[(50.0, "goal, killed"), (300.0, "goal, black hole")],
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Failover under load: latency of the calls around a fault of the hub.")
    parser.add_argument("--trials", type=int, default=100, help="faults of each kind (default: 100)")
    parser.add_argument("--others", type=int, help="the same for the others (default: a fifth)")
    parser.add_argument("--workers", type=int, default=50, help="workers that bust (default: 50)")
    parser.add_argument("--think", type=float, default=0.1, help="mean pause of a worker in seconds (default: 0.1)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args(arguments)
    if options.others is None:
        options.others = math.ceil(options.trials / 5)
    return options


async def bench(options: argparse.Namespace) -> list[Series]:
    """Run everything."""
    series: list[Series] = []
    with tempfile.TemporaryDirectory(prefix="bustcall-bench-") as name:
        for contestant, make in contestants().items():
            if contestant == "pybustcall" or options.others:
                for fault in FAULTS:
                    series += await run(contestant, make, fault, options, Path(name))
    return sorted(series, key=lambda one: (one.load != "workers", one.fault != "killed"))


def main() -> int:
    """Run the bench; return the exit code."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons are ended
    begun = time.perf_counter()
    rows = [series.summary() for series in asyncio.run(bench(options))]
    recorded = record(
        options.output,
        "failover",
        begun,
        aiohttp=aiohttp.__version__,
        workers=options.workers,
        think_s=options.think,
        window_s=WINDOW,
        rows=rows,
    )
    (options.output / "failover.svg").write_text(plot(rows, options.workers))
    told = f"milliseconds; caught: p99 of those in flight at the fault\n\n{table(rows)}"
    print(recorded if options.json else told)
    return int(any(row["failed"] or row["lost"] for row in rows if row["contestant"] == "pybustcall"))


if __name__ == "__main__":
    sys.exit(main())
