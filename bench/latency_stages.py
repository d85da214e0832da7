"""What stage calls reach, and how long they take, when the network to the hub becomes slow.

    python -m bench.latency_stages [--calls 100] [--step 25] [--json]

The daemons are fakes in this process, so that what was really applied is known; the hub stands behind a proxy that
delays everything. For each delay a client first learns how quick its healthy hub is (120 calls), then the delay is put
in, and callers go on busting. Three circumstances: the hub with a quick peer; the hub alone; the hub alone with a
deadline of 0.25 s, which turns delay into failed calls (EXCEPTION), and the same with an outbox, which turns them into
deferred ones (WARNING). Writes results/latency_stages.json and two plots. The exit code tells whether a bust was lost,
or failed though its deadline was longer than the delay; times decide nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.plot import Curve, chart, percentile
from bench.record import record
from pybustcall import BustcallClient, Hedged
from pybustcall.testing import FakeDaemon, FaultyProxy, Trouble

if TYPE_CHECKING:
    from pybustcall import BustResult, Event

WARM: Final = 120  # calls before the delay: 100 answers make the live p95 known
CALLERS: Final = 5  # that bust one after the other at each delay


@dataclass(frozen=True)
class Circumstance:
    """Under what circumstances the delay meets a client."""

    name: str
    peer: bool = False
    timeout: float = 5.0
    outbox: bool = False


CIRCUMSTANCES: Final = (
    Circumstance("hub and peer", peer=True),
    Circumstance("hub alone"),
    Circumstance("hub alone, 0.25 s", timeout=0.25),
    Circumstance("the same, outbox", timeout=0.25, outbox=True),
)


async def measure(circumstance: Circumstance, delay: float, calls: int) -> dict[str, Any]:
    """Learn, delay everything from and to the hub by so many seconds a round trip, and bust; sum up."""
    results: list[BustResult] = []
    hedged: Counter[str] = Counter()

    def note(event: Event) -> None:
        if isinstance(event, Hedged):
            hedged["overdue" if event.overdue else "hedge"] += 1

    async with AsyncExitStack() as stack:
        hub, peer = [await stack.enter_async_context(FakeDaemon()) for _ in range(2)]
        proxy = await stack.enter_async_context(FaultyProxy(hub.url))
        outbox = None
        if circumstance.outbox:
            outbox = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "outbox.db"
        client = await stack.enter_async_context(
            BustcallClient(
                proxy.url,
                peers=[peer.url] if circumstance.peer else [],
                timeout=circumstance.timeout,
                outbox=outbox,
            )
        )
        for number in range(WARM):
            await client.bust(f"warm/{number}", timeout=5.0)
        usual = client.topology().daemons[0].usual
        client.on_event(note)
        proxy.trouble = Trouble(latency=delay / 2)
        numbers = iter(range(calls))

        async def call() -> None:
            for number in numbers:
                results.append(await client.bust(f"slow/{number}", fault_tolerance=12))  # noqa: PERF401

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(call())
        proxy.heal()
        stored = set()
        if circumstance.outbox:
            await client.outbox.replay()
            stored = {row.bust.target for row in await client.outbox.rows(limit=calls)}
        await client.aclose()  # the hooks were told everything
        applied = {bust.target for daemon in (hub, peer) for bust in daemon.applied}
        promised = {result.target for result in results if result.status in {"busted", "deferred"}}
        by = Counter({proxy.url: "hub", peer.url: "peer"}.get(result.daemon or "", "nobody") for result in results)
    elapsed = [result.elapsed * 1000 for result in results]
    return {
        "circumstance": circumstance.name,
        "delay_ms": round(delay * 1000, 1),
        "calls": len(results),
        "usual_ms": round((usual or 0.0) * 1000, 2),
        "stages": {str(stage): count for stage, count in sorted(Counter(result.stage for result in results).items())},
        "statuses": dict(Counter(result.status for result in results)),
        "p50_ms": round(percentile(elapsed, 50), 1),
        "p99_ms": round(percentile(elapsed, 99), 1),
        "by": dict(by),
        "hedges": hedged["hedge"],
        "overdue": hedged["overdue"],
        "lost": len(promised - applied - stored),
        "may_fail": delay >= circumstance.timeout * 0.9,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Make a Markdown table."""
    lines = [
        "| circumstances | delay ms | calls | stage: calls | p50 ms | p99 ms | answered by | hedges | overdue | lost |",
        "|---|---:|---:|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        stages = ", ".join(f"{stage}: {count}" for stage, count in row["stages"].items())
        by = ", ".join(f"{name} {count}" for name, count in sorted(row["by"].items()))
        lines.append(
            f"| {row['circumstance']} | {row['delay_ms']:g} | {row['calls']} | {stages} | {row['p50_ms']} "
            f"| {row['p99_ms']} | {by} | {row['hedges']} | {row['overdue']} | {row['lost']} |"
        )
    return "\n".join(lines)


def plot_stages(rows: list[dict[str, Any]]) -> str:
    """Plot the stages: a dot's size is the share of the calls that reached it."""
    curves = []
    for shift, circumstance in enumerate(CIRCUMSTANCES):
        dots = [
            ((row["delay_ms"] + 3 * shift, float(stage)), count / row["calls"])
            for row in rows
            if row["circumstance"] == circumstance.name
            for stage, count in row["stages"].items()
        ]
        curves.append(Curve(circumstance.name, [dot for dot, _ in dots], "dots", sizes=[size for _, size in dots]))
    title = "Stage reached, by the delay of the hub (size: share of the calls)"
    return chart(title, curves, x="injected delay, milliseconds", y="stage", y_range=(0.0, 12.0))


def plot_times(rows: list[dict[str, Any]]) -> str:
    """Plot the response times, p50 and p99."""
    curves = [
        Curve(
            f"{circumstance.name}, {share}",
            [(row["delay_ms"], row[f"{share}_ms"]) for row in rows if row["circumstance"] == circumstance.name],
            dashed=share == "p99",
        )
        for circumstance in CIRCUMSTANCES[:3]
        for share in ("p50", "p99")
    ]
    title = "Response time, by the delay of the hub"
    return chart(title, curves, x="injected delay, milliseconds", y="milliseconds")


async def bench(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every circumstance at every delay, one after the other."""
    rows = []
    for circumstance in CIRCUMSTANCES:
        for step in range(round(options.most / options.step) + 1):
            rows.append(await measure(circumstance, step * options.step / 1000, options.calls))  # noqa: PERF401
    return rows


def main() -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(description="Stage reached and response time, by the latency of the hub.")
    parser.add_argument("--calls", type=int, default=100, help="calls at each delay (default: 100)")
    parser.add_argument("--step", type=float, default=25.0, help="milliseconds between delays (default: 25)")
    parser.add_argument("--most", type=float, default=500.0, help="the longest delay in milliseconds (default: 500)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory to write to")
    options = parser.parse_args()
    begun = time.perf_counter()
    rows = asyncio.run(bench(options))
    recorded = record(options.output, "latency_stages", begun, rows=rows)
    (options.output / "latency_stages.svg").write_text(plot_stages(rows))
    (options.output / "latency_times.svg").write_text(plot_times(rows))
    print(recorded if options.json else table(rows))
    return int(any(row["lost"] or (row["statuses"].get("failed") and not row["may_fail"]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
