"""Hot swaps of real daemons that are killed at every step, and in the midst of traffic: all or none, busted if all."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import pytest

from pybustcall import BustcallClient, Retry, Swap
from pybustcall.daemon.swaps import STEPS
from pybustcall.testing import FakeDaemon
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.test_daemon_app import BUST, ENTRIES
from tests.test_daemon_idempotency import KEY, REPLAYED
from tests.test_daemon_swaps import DEPENDENCIES, HOTSWAP

pytestmark = pytest.mark.requirement("IMP-12")

ROOT = Path(__file__).parent.parent
NAMES = ("model", "templates")
SWAP = {"swaps": [{"name": name, "from": "1.0.0", "to": "1.1.0"} for name in NAMES]}
COMMITTED = STEPS[STEPS.index("committed") :]


class StartStepwise(Protocol):
    """Start a daemon that ends itself at a step; tell its process and its URL."""

    def __call__(self, root: Path, registry: Path, **at: str) -> tuple[subprocess.Popen[bytes], str]: ...


@pytest.fixture
def start_stepwise() -> Iterator[StartStepwise]:
    """Start daemons that end themselves; what is left of them is gone when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(root: Path, registry: Path, **at: str) -> tuple[subprocess.Popen[bytes], str]:
        command = [sys.executable, "-m", "tests.stepwise_daemon", "--root", str(root), "--registry", str(registry)]
        command += [word for name, step in at.items() for word in (f"--{name.replace('_', '-')}", step)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        started.append(process)
        assert process.stdout is not None
        return process, json.loads(process.stdout.readline())["url"]

    yield start
    for process in started:
        process.kill()
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


@asynccontextmanager
async def talking(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(PATIENCE)) as client:
        yield client


async def post(client: aiohttp.ClientSession, path: str, document: object, **headers: str) -> dict[str, Any]:
    async with client.post(path, json=document, headers=headers) as response:
        assert response.status == 200, await response.text()
        found: dict[str, Any] = await response.json()
        return {**found, "replayed": response.headers.get(REPLAYED)} if path == HOTSWAP else found


async def versions(client: aiohttp.ClientSession) -> tuple[str, ...]:
    """Tell which versions are in use."""
    async with client.get(DEPENDENCIES) as response:
        return tuple(one["current"] for one in (await response.json())["dependencies"])


async def furnish(client: aiohttp.ClientSession, root: Path) -> set[Path]:
    """Announce two dependencies, and make entries of them, and one of neither; tell those that depend on them."""
    pages = {root / f"{name}-page" for name in NAMES}
    for name in NAMES:
        await post(client, DEPENDENCIES, {"name": name, "versions": ["1.0.0"]})
        (root / f"{name}-page").write_text("1.0.0")
        await post(client, ENTRIES, {"key": f"{name}-page", "depends_on": [name]})
    (root / "unrelated").write_text("precious")
    await post(client, ENTRIES, {"key": "unrelated", "depends_on": ["product:7"]})
    return pages


def held(pages: set[Path]) -> int:
    return sum(page.exists() for page in pages)


@pytest.mark.parametrize("step", STEPS)
async def test_a_daemon_killed_at_any_step_swaps_all_or_none(
    step: str, start_stepwise: StartStepwise, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Restarted on the same files it has both versions or neither, and busted what depends on them if it has both.

    A repeat gets the one right answer: what is made after the restart shows whether the swap was done again for it.
    """
    root, registry = tmp_path / "cache", tmp_path / "r"
    process, url = start_stepwise(root, registry, kill_at=step)
    async with talking(url) as client:
        pages = await furnish(client, root)
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(client, HOTSWAP, SWAP, **{KEY: "k"})
    assert process.wait(PATIENCE) == -9
    if step == "committed":  # what a reader made with the old version just before the commit
        (root / "model-page").write_text("1.0.0")
    done = step in COMMITTED
    for _ in range(2):  # also if it is killed again before anybody asks
        daemon = start_daemon("--registry", str(registry))
        async with talking(daemon.url) as client:
            assert await versions(client) == (("1.1.0",) * 2 if done else ("1.0.0",) * 2)
        assert held(pages) == (2 if step in {"validated", "prepared"} else 0)
        daemon.kill()
    async with talking(start_daemon("--registry", str(registry)).url) as client:
        if done:
            for page in pages:
                page.write_text("1.1.0")
        first = await post(client, HOTSWAP, SWAP, **{KEY: "k"})
        assert await versions(client) == ("1.1.0", "1.1.0")
        assert held(pages) == (2 if done else 0)
        assert (first["committed"], first["replayed"]) == (True, "true" if done else None)
        assert [(it["name"], it["from"], it["to"]) for it in first["swaps"]] == [
            (name, "1.0.0", "1.1.0") for name in NAMES
        ]
        assert await post(client, HOTSWAP, SWAP, **{KEY: "k"}) == {**first, "replayed": "true"}
        other = {"swaps": SWAP["swaps"][:1]}
        async with client.post(HOTSWAP, json=other, headers={KEY: "k"}) as response:
            assert (response.status, (await response.json())["field"]) == (422, KEY)
    assert (root / "unrelated").read_text() == "precious"


@pytest.mark.parametrize("step", STEPS)
async def test_a_client_whose_daemon_is_killed_at_any_step_gets_its_answer_when_it_is_back(
    step: str, start_stepwise: StartStepwise, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """The same daemon is asked again, with the same key: the swap is done, once, and the caller sees no error."""
    root, registry = tmp_path / "cache", tmp_path / "r"
    process, url = start_stepwise(root, registry, kill_at=step)
    async with talking(url) as session:
        pages = await furnish(session, root)
    async with FakeDaemon(capabilities=["cache.hotswap", "cache.dependencies"]) as peer:
        retry = Retry(attempts=1000, base=0.05, cap=0.1)
        async with BustcallClient(url, peers=[peer.url], retry=retry, probes=None) as client:
            swaps = [Swap(name, to="1.1.0", from_="1.0.0") for name in NAMES]
            swapping = asyncio.create_task(client.hot_swap(swaps, timeout=2 * PATIENCE))
            assert await asyncio.to_thread(process.wait, PATIENCE) == -9
            start_daemon("--port", url.rpartition(":")[2], "--registry", str(registry))
            result = await swapping
            assert [(swap.name, swap.from_, swap.to) for swap in result.swaps] == [
                (it, "1.0.0", "1.1.0") for it in NAMES
            ]
            assert (result.daemon, result.stage) == (url, 9 if result.causes else 12)
            assert result.causes
            assert (await client.resolve("model@*")).resolved == "model@1.1.0"
        assert peer.swaps == []
    assert held(pages) == 0


@pytest.mark.parametrize(("broken", "killed"), [("prepared", "rolled back"), ("committed", "owed")])
async def test_a_daemon_killed_while_it_rolls_back_has_none(
    broken: str, killed: str, start_stepwise: StartStepwise, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """And busts what it owed at its next start, when the cache is there again; then the swap can be repeated."""
    root, registry = tmp_path / "cache", tmp_path / "r"
    process, url = start_stepwise(root, registry, break_at=broken, kill_at=killed)
    async with talking(url) as client:
        pages = await furnish(client, root)
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(client, HOTSWAP, SWAP, **{KEY: "k"})
    assert process.wait(PATIENCE) == -9
    (tmp_path / "cache.away").rename(root)
    if broken == "committed":  # what a reader made with the new version in the short time that it was current
        (root / "model-page").write_text("1.1.0")
    async with talking(start_daemon("--registry", str(registry)).url) as client:
        assert await versions(client) == ("1.0.0", "1.0.0")
        assert held(pages) == (2 if broken == "prepared" else 0)
        answer = await post(client, HOTSWAP, SWAP, **{KEY: "k"})
        assert (await versions(client), answer["replayed"]) == (("1.1.0", "1.1.0"), None)
    assert held(pages) == 0


async def test_a_cache_that_is_gone_for_a_while_is_busted_when_it_is_back(
    start_stepwise: StartStepwise, tmp_path: Path
) -> None:
    """The daemon goes on, says what it owes, and pays it."""
    root, registry = tmp_path / "cache", tmp_path / "r"
    root.mkdir()
    _, url = start_stepwise(root, registry, break_at="committed")
    async with talking(url) as client:
        await furnish(client, root)
        async with client.post(HOTSWAP, json=SWAP) as response:
            assert response.status == 500
            assert "the swap was rolled back; 2 entries are owed a bust" in (await response.json())["detail"]
        assert await versions(client) == ("1.0.0", "1.0.0")
        away = tmp_path / "cache.away"
        (away / "model-page").write_text("1.1.0")
        away.rename(root)
        await eventually(lambda: not (root / "model-page").exists())
        assert (root / "unrelated").exists()


# In the midst of traffic


class Reader:
    """Makes entries of the model as it is, as a well-behaved application does.

    It asks for the current version, makes the entry, registers it, and asks again: if the version changed meanwhile, or
    if it cannot be told, it drops what it made. `made` counts the entries that it kept.
    """

    def __init__(self, client: aiohttp.ClientSession, root: Path, name: str) -> None:
        self.client = client
        self.root = root
        self.name = name
        self.resting = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()
        self.made = 0

    async def run(self) -> None:
        """Read for ever; while it is not to go, rest between two entries."""
        while True:
            if not self.go.is_set():
                self.resting.set()
                await self.go.wait()
                self.resting.clear()
            await self.read(f"{self.name}-{self.made % 20}")

    async def read(self, key: str) -> None:
        """Make one entry, and keep it if it is not old already."""
        page = self.root / key
        kept = False
        try:
            version = (await versions(self.client))[0]
            page.write_text(version)
            await post(self.client, ENTRIES, {"key": key, "depends_on": ["model"]})
            kept = (await versions(self.client))[0] == version
        finally:
            if kept:
                self.made += 1
            else:
                page.unlink(missing_ok=True)


def made_more(readers: list[Reader], than: int) -> bool:
    return sum(reader.made for reader in readers) > than


@asynccontextmanager
async def reading(readers: list[Reader]) -> AsyncIterator[None]:
    """Let them all read meanwhile. One that fails fails the test."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(reader.run()) for reader in readers]
        yield
        for task in tasks:
            task.cancel()


async def rest(readers: list[Reader]) -> None:
    """Let every reader end what it has begun."""
    for reader in readers:
        reader.go.clear()
    await asyncio.gather(*(reader.resting.wait() for reader in readers))


def resume(readers: list[Reader]) -> None:
    for reader in readers:
        reader.go.set()


async def test_after_a_swap_in_the_midst_of_traffic_no_old_entry_is_left(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Eight readers make entries, one client busts, and swaps follow one another: what is held is always current."""
    daemon = start_daemon("--registry", str(tmp_path / "r"))
    chance = random.Random(12)
    async with talking(daemon.url) as client:
        await post(client, DEPENDENCIES, {"name": "model", "versions": ["1.0.0"]})
        readers = [Reader(client, daemon.root, f"reader{number}") for number in range(8)]
        async with reading(readers):
            for number in range(1, 25):
                await eventually(partial(made_more, readers, 16 + sum(reader.made for reader in readers)))
                await post(client, BUST, {"target": f"reader{chance.randrange(8)}-{chance.randrange(20)}"})
                swap = {"swaps": [{"name": "model", "to": f"1.{number}.0"}]}
                assert (await post(client, HOTSWAP, swap, **{KEY: f"k{number}"}))["committed"]
                await rest(readers)
                assert {page.read_text() for page in daemon.root.iterdir()} <= {f"1.{number}.0"}
                resume(readers)


async def read_on(reader: Reader) -> None:
    """Read until the daemon is gone."""
    with suppress(aiohttp.ClientError):
        await reader.run()


FIRST = "the first removal"


@pytest.mark.parametrize("step", [*STEPS, FIRST])
async def test_a_daemon_killed_in_the_midst_of_traffic_swaps_all_or_none(
    step: str, start_stepwise: StartStepwise, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Once the swap is answered by the next process, nothing is left of all that readers made with the old version."""
    root, registry = tmp_path / "cache", tmp_path / "r"
    process, url = start_stepwise(root, registry, kill_at=step)
    async with talking(url) as client:
        pages = await furnish(client, root)
        readers = [Reader(client, root, f"reader{number}") for number in range(6)]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(read_on(reader))
            await eventually(partial(made_more, readers, 60))
            async with asyncio.timeout(PATIENCE):
                swapping = asyncio.create_task(post(client, HOTSWAP, SWAP, **{KEY: "k"}))
                if step == FIRST:
                    await eventually(lambda: held(pages) < 2)
                    process.kill()
                await asyncio.wait({swapping})
    assert process.wait(PATIENCE) == -9
    assert isinstance(swapping.exception(), aiohttp.ClientConnectionError)
    async with talking(start_daemon("--registry", str(registry)).url) as client:
        found = await versions(client)
        assert found in {("1.0.0", "1.0.0"), ("1.1.0", "1.1.0")}
        assert step == FIRST or (found == ("1.1.0", "1.1.0")) is (step in COMMITTED)
        answer = await post(client, HOTSWAP, SWAP, **{KEY: "k"})
        assert (answer["replayed"] == "true") is (found == ("1.1.0", "1.1.0"))
        assert await versions(client) == ("1.1.0", "1.1.0")
    assert {page.read_text() for page in root.iterdir()} <= {"1.1.0", "precious"}
