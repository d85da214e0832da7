"""Client and daemons in processes of their own, over a real directory of cached files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from pybustcall import BustcallClient, BustRejected, DaemonsUnavailable, NotAllowed, Retry
from tests.conftest import PATIENCE, StartDaemon, eventually


@pytest.mark.requirement("IMP-08")
async def test_a_bust_removes_the_file_and_its_variants(start_daemon: StartDaemon) -> None:
    """The client knows no cache: the daemon removed what the strategy means."""
    daemon = start_daemon()
    for name in ("main.css", "main.css.gz", "main.css?v=2", "main.css.map"):
        (daemon.root / name).write_text("old")
    async with BustcallClient(daemon.url) as client:
        await client.bust("main.css", strategy="direct")
        assert sorted(os.listdir(daemon.root)) == ["main.css.gz", "main.css.map", "main.css?v=2"]
        await client.bust("main.css")
        assert sorted(os.listdir(daemon.root)) == ["main.css.map"]


@pytest.mark.requirement("IMP-08")
async def test_when_the_daemon_is_killed_a_peer_does_it(start_daemon: StartDaemon) -> None:
    """Kill -9 of the hub: the next bust is served by the peer, within its deadline."""
    hub, peer = start_daemon(), start_daemon()
    async with BustcallClient(hub.url, peers=[peer.url], timeout=PATIENCE) as client:
        assert (await client.bust("a")).daemon == hub.url
        hub.kill()
        (hub.root / "page.html").write_text("old")
        result = await client.bust("page.html")
    assert (result.daemon, result.stage, result.status) == (peer.url, 9, "busted")
    assert not (hub.root / "page.html").exists()


async def test_busts_under_load_survive_the_kill_of_the_hub(start_daemon: StartDaemon) -> None:
    """500 busts, the hub killed in the middle: every one is acknowledged by somebody."""
    hub, peer = start_daemon(), start_daemon()
    done = 0

    def count(result: object) -> None:
        nonlocal done
        done += 1
        if done == 200:
            hub.process.send_signal(signal.SIGKILL)

    names = [f"page-{number}.html" for number in range(500)]
    for name in names:
        (hub.root / name).write_text("old")
    async with BustcallClient(hub.url, peers=[peer.url], timeout=PATIENCE) as client:
        report = await client.bust_many(names, on_progress=count)
    assert (report.busted, report.failed) == (500, 0)
    assert os.listdir(hub.root) == []


async def test_a_stopped_hub_is_passed_by(start_daemon: StartDaemon) -> None:
    """SIGSTOP: connections are accepted and nothing answers; the attempt ends and the peer does it."""
    hub, peer = start_daemon(), start_daemon()
    os.kill(hub.process.pid, signal.SIGSTOP)
    try:
        retry = Retry(attempt_timeout=0.2)
        async with BustcallClient(hub.url, peers=[peer.url], retry=retry, timeout=PATIENCE) as client:
            result = await client.bust("a")
    finally:
        os.kill(hub.process.pid, signal.SIGCONT)
    assert result.daemon == peer.url
    assert result.causes[0].kind == "timed_out"


async def test_with_every_daemon_killed_the_call_says_so(start_daemon: StartDaemon) -> None:
    """Raise, never pretend."""
    daemon = start_daemon()
    daemon.kill()
    async with BustcallClient(daemon.url) as client:
        with pytest.raises(DaemonsUnavailable, match="it was not applied"):
            await client.bust("a")


async def test_a_daemon_that_comes_back_is_used_again(start_daemon: StartDaemon) -> None:
    """Connections kept from before its restart do no harm."""
    daemon = start_daemon()
    port = daemon.url.rsplit(":", 1)[1]
    async with BustcallClient(daemon.url) as client:
        await asyncio.gather(*(client.bust(f"{number}") for number in range(10)))
        daemon.kill()
        again = start_daemon("--port", port)
        assert again.url == daemon.url
        result = await client.bust("a")
    assert (result.stage, len(result.attempts)) == (12, 1)


async def test_a_path_outside_the_root_is_refused_by_the_daemon(start_daemon: StartDaemon) -> None:
    """The client sends it: it knows no paths. The daemon names the field."""
    daemon = start_daemon()
    outside = daemon.root.parent / "secret.txt"
    outside.write_text("keep")
    async with BustcallClient(daemon.url) as client:
        with pytest.raises(BustRejected, match=r"HTTP 422.*target has a segment") as caught:
            await client.bust("../secret.txt")
    assert caught.value.applied == "no"
    assert outside.exists()


async def test_an_unknown_strategy_is_refused_with_the_known_ones(start_daemon: StartDaemon) -> None:
    """The client sends it verbatim."""
    async with BustcallClient(start_daemon().url) as client:
        with pytest.raises(BustRejected, match="direct, dimensional"):
            await client.bust("a", strategy="by-moonlight")


async def test_a_token_is_asked_for(start_daemon: StartDaemon) -> None:
    """With it the bust is done, without it refused."""
    daemon = start_daemon(env={"BUSTCALL_TOKEN": "s3cret"})
    async with BustcallClient(daemon.url, token="s3cret") as client:
        assert (await client.bust("a")).ok
    async with BustcallClient(daemon.url) as client:
        with pytest.raises(NotAllowed):
            await client.bust("a")


async def test_a_daemon_told_to_stop_finishes_what_is_under_way(start_daemon: StartDaemon) -> None:
    """SIGTERM while busts are sent: no call fails, since the rest go to the peer; the hub exits with 0."""
    hub, peer = start_daemon(), start_daemon()
    done = 0

    def count(result: object) -> None:
        nonlocal done
        done += 1
        if done == 50:
            hub.process.terminate()

    async with BustcallClient(hub.url, peers=[peer.url], timeout=PATIENCE) as client:
        report = await client.bust_many((f"{number}" for number in range(300)), on_progress=count)
    assert (report.busted, report.failed) == (300, 0)
    assert hub.process.wait(PATIENCE) == 0


async def test_a_gunicorn_style_prefork_works(start_daemon: StartDaemon) -> None:
    """One client object made before the fork, used in four workers: each busts with connections of its own."""
    script = """
import asyncio, os, sys
from pybustcall import BustcallClient
client = BustcallClient(sys.argv[1])
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        asyncio.run(client.bust(f"worker-{number}.html"))
        os._exit(0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(any(codes))
"""
    daemon = start_daemon()
    for number in range(4):
        (daemon.root / f"worker-{number}.html").write_text("old")
    process = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, daemon.url], timeout=PATIENCE, check=False
    )
    assert process.returncode == 0
    await eventually(lambda: os.listdir(daemon.root) == [])
