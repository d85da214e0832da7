"""Watch it fail over: a hub and two peers are killed and come back while busts flow, and none is lost.

    python examples/failover.py [--seconds 15] [--plain]

The daemons are real processes over one directory of files, and are ended by kill -9. Every bust has a file of its own,
made before the call: what was promised (busted, or deferred into the outbox) and is still there at the end was lost.
A terminal shows a live picture, anything else plain lines. Everything is cleared away afterwards, also after Ctrl-C.
The exit code is 0 only if nothing was lost and every act was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pybustcall import BustcallClient, BustcallError, Event, Failback, FailedBack, FailedOver, Probes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

RATE = 30  # busts a second
PATIENCE = 20.0  # seconds that an act may take beyond its time until what it shows has happened
TICK = 0.2  # seconds between two pictures
COLOURS = {"H": "32", "1": "36", "2": "34", "o": "33", "x": "31", "b": "1"}
SMALL_PRINT = "For the show, daemons are probed every second and the hub is trusted again after 1-2 s, not 30-90 s."


class Daemon:
    """A daemon in a process of its own, which keeps its port when it comes back."""

    def __init__(self, name: str, letter: str, root: Path) -> None:
        self.name, self.letter, self._root = name, letter, root
        self.url, self.port = "", 0
        self.process: Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("BUSTCALL_")}
        command = [sys.executable, "-m", "pybustcall", "daemon", "--root", str(self._root), "--port", str(self.port)]
        self.process = await asyncio.create_subprocess_exec(*command, "--json", stdout=PIPE, env=environment)
        assert self.process.stdout is not None  # noqa: S101 - it is a pipe
        line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)  # where it listens
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    async def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        process, self.process = self.process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


@dataclass
class Flow:
    """The busts: each of a file of its own, which is made before."""

    root: Path
    letters: dict[str, str]
    counts: Counter[str] = field(default_factory=Counter)
    promised: list[Path] = field(default_factory=list)
    lately: Counter[str] = field(default_factory=Counter)
    ended: bool = False

    async def run(self, client: BustcallClient) -> None:
        """Begin a bust every so often, whatever became of those before it, until the flow is ended."""
        async with asyncio.TaskGroup() as calls:
            for number in itertools.count():
                if self.ended:
                    return
                calls.create_task(self._bust(client, f"pages/{number}.html"))
                await asyncio.sleep(1 / RATE)

    async def _bust(self, client: BustcallClient, key: str) -> None:
        file = self.root / key
        file.touch()
        try:
            result = await client.bust(key, fault_tolerance=12)
            status, who = result.status, self.letters.get(result.daemon or "", "x")
        except BustcallError:  # such as an outbox that is full
            status, who = "failed", "x"
        self.counts[status] += 1
        self.lately["o" if status == "deferred" else who] += 1
        if status in {"busted", "deferred"}:
            self.promised.append(file)
        if status == "busted":
            self.counts[who] += 1
            self.counts["lost"] += file.exists()


class Show:
    """What is seen: of everything, one picture or one line of text."""

    def __init__(self, client: BustcallClient, daemons: list[Daemon], flow: Flow, *, live: bool) -> None:
        self.client, self.daemons, self.flow, self.live = client, daemons, flow, live
        self.act, self.strip, self.waiting = "", "", 0
        self._begun = time.monotonic()
        self._events: deque[str] = deque(maxlen=4)
        self._names = {daemon.url: daemon.name for daemon in daemons}

    def tell(self, event: Event) -> None:
        """Take in what the client says of itself."""
        if isinstance(event, FailedOver):
            self._say("failover: the hub is down, calls go to the ring")
        elif isinstance(event, FailedBack):
            self._say(f"failback: {event.share:.0%} of the calls go to the hub first")

    def begin(self, act: str) -> None:
        """Open an act."""
        self.act = act
        self._line(f"\n{act}")

    def _say(self, text: str) -> None:
        self._events.append(f"   {time.monotonic() - self._begun:5.1f} s  {text}")
        self._line(self._events[-1])

    def _line(self, text: str) -> None:
        if not self.live:
            print(text, flush=True)

    def figures(self) -> dict[str, int]:
        """Count."""
        figures = {name: self.flow.counts[name] for name in ("busted", "deferred", "failed", "lost")}
        statistics = self.client.statistics()
        return figures | {name: getattr(statistics, name) for name in ("replayed", "failovers", "failbacks")}

    async def run(self) -> None:
        """Show it all again and again."""
        for number in itertools.count(1):
            await asyncio.sleep(TICK)
            counts = await self.client.outbox.counts()
            self.waiting = counts.pending + counts.leased
            self.strip += max(self.flow.lately, key=self.flow.lately.__getitem__, default=" ")
            self.flow.lately.clear()
            if self.live:
                print("\x1b[H" + "\x1b[K\n".join(self.picture()) + "\x1b[K\x1b[J", end="", flush=True)
            elif number % 5 == 0:
                figures = ", ".join(f"{name} {count}" for name, count in self.figures().items())
                self._line(f"   {time.monotonic() - self._begun:5.1f} s  {figures}, waiting {self.waiting}")

    def picture(self) -> list[str]:
        """Draw: the daemons, where calls go, who served when, and the counts."""
        view, flow = self.client.topology(), self.flow
        lines = [paint(f"{RATE} busts a second, one hub, two peers, kill -9", "b"), SMALL_PRINT, ""]
        for daemon in self.daemons:
            lamp = paint("●", "H") if daemon.process else paint("✖", "x")
            state = f"up, pid {daemon.process.pid}" if daemon.process else "killed"
            count = flow.counts[daemon.letter]
            bar = paint("█" * min(40, count // 10), daemon.letter)
            lines.append(f"   {lamp} {daemon.name:<7} {state:<15} {count:>5} busted {bar}")
        bar = paint("█" * min(40, self.waiting // 3), "o")
        lines += [f"   {paint('■', 'o')} {'outbox':<23} {self.waiting:>5} waiting {bar}", "", paint(self.act, "b"), ""]
        lines.append(f"   route: {view.route}, asked first: {', '.join(self._names[url] for url in view.order)}")
        lines += [f"   who served (H hub, 1 and 2 peers, o outbox), every {TICK:g} s:", ""]
        lines += [f"   {''.join(paint(letter, letter) for letter in self.strip[-90:])}", ""]
        figures = "   ".join(f"{name} {paint(str(count), 'b')}" for name, count in self.figures().items())
        return [*lines, f"   {figures}", "", *self._events]


def paint(text: str, colour: str) -> str:
    """Colour a text by its letter."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if colour in COLOURS else text


async def play(show: Show, seconds: float) -> None:
    """Play the acts: each lasts its share of the time, and until what it shows has been seen."""
    hub = show.daemons[0]
    counts, client, enough = show.flow.counts, show.client, RATE // 2

    async def act(text: str, share: float, change: Iterable[Awaitable[None]], seen: Callable[[], bool]) -> None:
        show.begin(text)
        await asyncio.gather(*change)
        end = time.monotonic() + share * seconds
        while time.monotonic() < end or not seen():
            if time.monotonic() > end + PATIENCE:
                raise TimeoutError(f"it was not seen within {PATIENCE:g} s: {text}")
            await asyncio.sleep(0.05)

    def left() -> bool:
        return client.statistics().failovers >= 1 and counts["1"] + counts["2"] >= enough

    served_on_return: list[int] = []

    def returned() -> bool:
        if client.statistics().failbacks < 1 or client.topology().route != "star":
            return False
        served_on_return.append(counts["H"])
        return counts["H"] >= served_on_return[0] + enough

    def replayed() -> bool:
        return client.statistics().replayed == counts["deferred"] and not show.waiting

    await act("1. All are up: the hub serves.", 0.15, [], lambda: counts["H"] >= enough)
    await act("2. kill -9 of the hub: the peers serve.", 0.2, [hub.kill()], left)
    await act("3. The hub comes back: calls return to it, little by little.", 0.3, [hub.start()], returned)
    kills, starts = (one.kill() for one in show.daemons), (one.start() for one in show.daemons)
    await act("4. kill -9 of all: busts are deferred, on disk.", 0.15, kills, lambda: counts["deferred"] >= enough)
    await act("5. All come back: what was deferred is replayed.", 0.2, starts, replayed)


async def run(options: argparse.Namespace) -> int:
    """Set the stage, play, sum up, and clear everything away, whatever happens; return the exit code."""
    live = sys.stdout.isatty() and not options.plain
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    with tempfile.TemporaryDirectory(prefix="bustcall-failover-") as name:
        root = Path(name) / "cache"
        (root / "pages").mkdir(parents=True)
        daemons = [Daemon(*who, root) for who in (("hub", "H"), ("peer 1", "1"), ("peer 2", "2"))]
        try:
            await asyncio.gather(*(daemon.start() for daemon in daemons))
            urls = [daemon.url for daemon in daemons]
            async with BustcallClient(
                urls[0],
                peers=urls[1:],
                timeout=1.0,
                outbox=Path(name) / "outbox.db",
                failback=Failback(hold=1.0, spread=1.0, ramp=2.0),
                probes=Probes(hub=1.0, peers=1.0, suspect=0.3),
            ) as client:
                flow = Flow(root, {daemon.url: daemon.letter for daemon in daemons})
                show = Show(client, daemons, flow, live=live)
                client.on_event(show.tell)
                print("\x1b[?1049h\x1b[?25l\x1b[2J" if live else SMALL_PRINT, end="" if live else "\n", flush=True)
                try:
                    async with asyncio.TaskGroup() as group:
                        busts, picture = group.create_task(flow.run(client)), group.create_task(show.run())
                        await play(show, options.seconds)
                        flow.ended = True
                        await busts
                        picture.cancel()
                finally:
                    print("\x1b[?25h\x1b[?1049l" if live else "", end="" if live else "\n", flush=True)
                await client.outbox.replay()  # nothing, as a rule; now whatever was promised must be gone
                flow.counts["lost"] = sum(file.exists() for file in flow.promised)
                figures = show.figures()
        finally:
            await asyncio.gather(*(daemon.kill() for daemon in daemons))
    print(f"who served: {show.strip.strip()}")
    print(", ".join(f"{name} {count}" for name, count in figures.items()))
    return int(figures["lost"] > 0)


def main() -> int:
    """Run the show; return its exit code, which is 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="A hub and two peers fail and come back while busts flow.")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long it lasts, about (default: 15)")
    parser.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    try:
        return asyncio.run(run(parser.parse_args()))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
