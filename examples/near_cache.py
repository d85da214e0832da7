"""Two services that keep values in their own memory, and drop them as soon as either of them busts.

    pip install 'pybustcall[daemon]'
    python examples/near_cache.py

It starts a daemon in a process of its own, kills it, and starts it again, in a temporary directory that is gone
afterwards. The exit code is 0 only if all came as expected.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

from pybustcall import BustcallClient

GRACE = 1.0  # seconds that values are served after the daemon was heard last
PATIENCE = 20.0


class Service:
    """One of the services: its client, its near cache, and how it loads a product from the database of both."""

    def __init__(self, url: str, prices: dict[int, int]) -> None:
        self.client = BustcallClient(url)
        self.cache = self.client.near_cache(maxsize=10_000, ttl=60.0, grace=GRACE)
        self.prices = prices
        self.loads = 0

    async def price(self, number: int, seconds: float = 0.0) -> str:
        """Tell a product's price, and whether it was loaded for that."""

        async def load() -> int:
            self.loads += 1
            price = self.prices[number]
            await asyncio.sleep(seconds)  # it is on its way, however long that takes
            return price

        before = self.loads
        price = await self.cache.get_or_load(f"products/{number}", load, tags=[f"product:{number}"])
        return f"{price} {'held' if self.loads == before else 'loaded'}"

    async def change(self, number: int, price: int) -> None:
        """Write, and then bust: when that returns, nobody who follows the daemon is served the old price."""
        self.prices[number] = price
        await self.client.bust(f"product:{number}", kind="tag")


async def start_daemon(directory: Path, port: int = 0) -> tuple[Process, str]:
    """Start a daemon that keeps its events in a journal, so that a restart costs no reader anything; tell its URL."""
    options = ["--backend", "memory", "--journal", str(directory / "journal.db"), "--port", str(port), "--json"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pybustcall", "daemon", *options),
        stdout=PIPE,
        stderr=DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")},
    )
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    async with asyncio.timeout(PATIENCE):
        line = await process.stdout.readline()
    if not line:
        sys.exit(f"the daemon ended with {await process.wait()} before it listened")
    return process, json.loads(line)["url"]


async def kill(process: Process) -> None:
    """End a process as `kill -9` does."""
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.communicate()


class Story:
    """What came, and whether it was expected."""

    ok = True

    def note(self, asked: str, expected: str, came: str) -> None:
        """Print a line."""
        self.ok = self.ok and came == expected
        print(f"{asked:<64} {came}{'' if came == expected else f'  (expected: {expected})'}", flush=True)


async def play(directory: Path) -> bool:
    """Play it; tell whether all came as expected."""
    story, prices = Story(), {7: 10}
    daemon, url = await start_daemon(directory)
    try:
        ours, theirs = Service(url, prices), Service(url, prices)
        async with ours.client, theirs.client:
            for service in (ours, theirs):
                await service.cache.wait_trusted(PATIENCE)
            story.note("we ask for a price", "10 loaded", await ours.price(7))
            story.note("and again", "10 held", await ours.price(7))

            await theirs.change(7, 11)
            await asyncio.sleep(0.2)  # the event is on its way
            story.note("they have changed it, and busted", "11 loaded", await ours.price(7))
            await ours.change(7, 12)
            story.note("we have: our own bust is done when it returns", "12 loaded", await ours.price(7))

            await ours.client.bust("products/7")
            slow = asyncio.create_task(ours.price(7, seconds=0.5))
            await asyncio.sleep(0.1)
            await theirs.change(7, 13)
            story.note("a slow load began before they changed it", "12 loaded", await slow)
            story.note("it was not kept", "13 loaded", await ours.price(7))

            await kill(daemon)
            story.note("the daemon is killed; for a moment that is no matter", "13 held", await ours.price(7))
            await asyncio.sleep(GRACE + 0.2)
            story.note("then nothing that is held is served", "13 loaded", await ours.price(7))

            daemon, _ = await start_daemon(directory, int(url.rpartition(":")[2]))
            await ours.cache.wait_trusted(PATIENCE)
            story.note("the daemon is back, and says that nothing was missed", "13 held", await ours.price(7))
            print(ours.cache.statistics())
    finally:
        await kill(daemon)
    return story.ok


def main() -> int:
    """Run it; tell the exit code."""
    with tempfile.TemporaryDirectory(prefix="near-cache-") as directory:
        return 0 if asyncio.run(play(Path(directory))) else 1


if __name__ == "__main__":
    sys.exit(main())
