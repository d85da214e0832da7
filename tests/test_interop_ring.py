"""Daemons in four languages around one client: a Rust hub, peers in Node.js, Lua and Python, killed and come back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from urllib.request import urlopen

import pytest

from pybustcall import BustcallClient, BustResult, Failback, Probes
from pybustcall.topology import ring_order
from tests.conftest import PATIENCE, StartDaemon, eventually
from tests.interop import PeerProcess, start_peer
from tests.interop.node_lua import PEERS
from tests.interop.rust_daemon import rust_binary

pytestmark = [pytest.mark.requirement("INT-02"), pytest.mark.requirement("INT-03")]

QUICK = Probes(hub=0.1, peers=0.1, suspect=0.05, timeout=0.5)
SOON = Failback(hold=0.2, spread=0.1, ramp=0.2)
COMMANDS: dict[str, Callable[[], list[str]]] = {**PEERS, "rust": lambda: [str(rust_binary())]}

Start = Callable[..., PeerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a daemon in a language, on a free port or again on the one of a URL; all are gone when the test ends."""
    started: list[PeerProcess] = []

    def start_one(language: str, url: str = ":0") -> PeerProcess:
        started.append(start_peer([*COMMANDS[language](), "--port", url.rpartition(":")[2]]))
        return started[-1]

    yield start_one
    for peer in started:
        peer.kill()


def busts_applied(peer: PeerProcess) -> int:
    """Ask a peer how many busts it did."""
    with urlopen(f"{peer.url}/api/v1/status", timeout=PATIENCE) as answer:
        return int(json.load(answer)["busts_applied"])


def client_id_for(order: list[str]) -> str:
    """Find a client id that asks these peers in just this order."""
    wanted = list(range(len(order)))
    return next(name for number in count() if ring_order(name := f"client-{number}", order) == wanted)


@pytest.mark.requirement("INT-01")
async def test_the_ring_is_walked_to_its_last_daemon_and_the_hub_taken_up_again(
    start: Start, start_daemon: StartDaemon
) -> None:
    """The hub is killed, then peer after peer: the next one serves; the hub comes back: calls go to it."""
    hub, node, lua, python = start("rust"), start("node"), start("lua"), start_daemon()
    peers = [node.url, lua.url, python.url]
    client = BustcallClient(hub.url, peers=peers, client_id=client_id_for(peers), probes=None, hedge=None)
    results: list[BustResult] = []
    async with client:

        async def bust_some() -> str:
            """Bust a few pages; tell which daemon did it, which must be one."""
            pages = [f"page/{len(results) + number}.html" for number in range(5)]
            results.extend([await client.bust(page, fault_tolerance=3) for page in pages])
            (daemon,) = {str(result.daemon) for result in results[-5:]}
            return daemon

        assert await bust_some() == hub.url
        hub.kill()
        assert await bust_some() == node.url
        assert busts_applied(node) == 5
        node.kill()
        assert await bust_some() == lua.url
        assert busts_applied(lua) == 5
        lua.kill()
        (python.root / "page").mkdir()
        for number in range(15, 20):
            (python.root / f"page/{number}.html").write_text("old")
        assert await bust_some() == python.url
        assert list((python.root / "page").iterdir()) == []

        again = start("rust", hub.url)
        client.reset()
        await eventually(lambda: not client.topology().daemons[0].suspect)
        assert await bust_some() == again.url == hub.url
    assert {result.status for result in results} == {"busted"}
    assert all(result.stage >= 9 for result in results)
    # The first call that met a dead daemon tells so.
    dead = [{fault.daemon for fault in results[number].causes} for number in (0, 5, 10, 15, 20)]
    assert dead == [set(), {hub.url}, {node.url}, {lua.url}, set()]


async def test_no_bust_is_lost_while_one_daemon_after_the_other_is_killed(
    start: Start, start_daemon: StartDaemon
) -> None:
    """50 workers, 1,200 pages, three daemons killed in the midst: every call tells who did it, and each is somebody."""
    hub, node, lua, python = start("rust"), start("node"), start("lua"), start_daemon()
    peers = [node.url, lua.url, python.url]
    kills = {300: hub, 600: node, 900: lua}
    done = 0
    served: Counter[str] = Counter()

    def kill_in_turn(result: BustResult) -> None:
        nonlocal done
        done += 1
        served[str(result.daemon)] += 1
        if done in kills:
            kills[done].kill()

    async with BustcallClient(
        hub.url, peers=peers, client_id=client_id_for(peers), probes=QUICK, hedge=None, fault_tolerance=3
    ) as client:
        report = await client.bust_many(
            (f"page/{number}" for number in range(1200)), concurrency=50, on_progress=kill_in_turn, timeout=PATIENCE
        )
    assert report.ok, report.failures[:3]
    assert report.busted == served.total() == 1200
    assert served.keys() == {hub.url, *peers}
    assert all(number >= 100 for number in served.values())


@pytest.mark.parametrize("language", ["rust", "node", "lua"])
async def test_calls_leave_a_hub_of_any_language_and_return_to_it(start: Start, language: str) -> None:
    """Probes alone find out that it is back; nobody resets anything."""
    hub = start(language)
    others = [start(other) for other in COMMANDS if other != language]
    peers = [peer.url for peer in others]
    async with BustcallClient(hub.url, peers=peers, probes=QUICK, failback=SOON, hedge=None) as client:
        assert (await client.bust("a")).daemon == hub.url
        hub.kill()
        assert (await client.bust("b")).daemon in peers
        await eventually(lambda: client.topology().route == "ring")
        assert (await client.bust("c")).daemon in peers
        again = start(language, hub.url)
        await eventually(lambda: client.topology().route == "star")
        result = await client.bust("d")
        assert (result.daemon, result.stage) == (again.url, 12)
        assert client.statistics().failovers == client.statistics().failbacks == 1
