"""Failover and failback with real daemons: what callers see while they are killed, stopped and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pybustcall import (
    BustcallClient,
    BustDeferred,
    BustReplayed,
    BustResult,
    Event,
    Failback,
    FailedBack,
    FailedOver,
    Hedge,
    Outbox,
    Probes,
    Retry,
    RowState,
)
from pybustcall.errors import ConfigurationError, InvalidRequest, OutboxError
from pybustcall.testing import Answer, FakeDaemon, FaultyProxy, Trouble
from tests.conftest import PATIENCE, StartDaemon, eventually

QUICK = Probes(hub=0.1, peers=0.1, suspect=0.05, timeout=0.5)
SOON = Failback(hold=0.2, spread=0.1, ramp=0.2)


def files(root: Path, count: int) -> list[str]:
    """Cache so many pages."""
    (root / "p").mkdir()
    for number in range(count):
        (root / f"p/{number}.html").write_text("old")
    return [f"p/{number}.html" for number in range(count)]


@pytest.mark.requirement("RES-03")
@pytest.mark.requirement("IMP-04")
async def test_calls_leave_a_killed_hub_and_return_to_it(start_daemon: StartDaemon) -> None:
    """Star, ring, and back: with the hub killed the peer serves; with the hub back, calls return to it."""
    hub, peer = start_daemon(), start_daemon()
    port = hub.url.rpartition(":")[2]
    events: list[Event] = []
    async with BustcallClient(hub.url, peers=[peer.url], probes=QUICK, failback=SOON) as client:
        client.on_event(events.append)
        assert (await client.bust("a")).daemon == hub.url
        hub.kill()
        assert (await client.bust("b")).daemon == peer.url
        await eventually(lambda: client.topology().route == "ring")
        assert (await client.bust("c")).stage == 12  # on the ring it is no fault that the hub is down
        again = start_daemon("--port", port)
        assert again.url == hub.url
        await eventually(lambda: client.topology().route == "star")
        assert (await client.bust("d")).daemon == hub.url
        assert client.statistics().failovers == client.statistics().failbacks == 1
    assert [type(event) for event in events if isinstance(event, FailedOver | FailedBack)][:2] == [
        FailedOver,
        FailedBack,
    ]


@pytest.mark.requirement("IMP-11")
async def test_a_kill_of_the_hub_under_load_costs_no_caller_anything(start_daemon: StartDaemon) -> None:
    """50 workers bust 1,000 pages; kill -9 in the midst: no error, and every page that was acknowledged is gone."""
    hub, peer = start_daemon(), start_daemon()
    pages = files(hub.root, 1000)
    async with BustcallClient(hub.url, peers=[peer.url], fault_tolerance=3) as client:
        done = 0

        def count(_result: BustResult) -> None:
            nonlocal done
            done += 1
            if done == 300:
                hub.process.send_signal(signal.SIGKILL)

        report = await client.bust_many(pages, concurrency=50, on_progress=count, timeout=PATIENCE)
    assert report.ok, report.failures[:3]
    assert [page for page in pages if (hub.root / page).exists()] == []


@pytest.mark.requirement("IMP-11")
@pytest.mark.requirement("INT-03")
async def test_with_every_daemon_killed_busts_wait_in_the_outbox(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """All down: deferred, no error; one comes back: delivered, and the pages are gone."""
    hub, peer = start_daemon(), start_daemon()
    pages = files(hub.root, 20)
    port = peer.url.rpartition(":")[2]
    events: list[Event] = []
    async with BustcallClient(hub.url, peers=[peer.url], probes=QUICK, outbox=tmp_path / "outbox.db") as client:
        client.on_event(events.append)
        hub.kill()
        peer.kill()
        results = [await client.bust(page) for page in pages]
        assert {result.status for result in results} == {"deferred"}
        assert (await client.outbox.counts()).pending == 20
        start_daemon("--port", port)
        await eventually(lambda: client.statistics().replayed == 20)
        counts = await client.outbox.counts()
        assert (counts.pending, counts.leased, counts.aside) == (0, 0, 0)
    assert [page for page in pages if (hub.root / page).exists()] == []
    assert sum(isinstance(event, BustDeferred) for event in events) == 20
    assert sum(isinstance(event, BustReplayed) and event.ok for event in events) == 20


@pytest.mark.requirement("INT-03")
async def test_a_stopped_hub_is_a_black_hole_that_calls_leave(start_daemon: StartDaemon) -> None:
    """SIGSTOP: connections stay, nothing answers; every call is served by the peer within its deadline."""
    hub, peer = start_daemon(), start_daemon()
    async with BustcallClient(hub.url, peers=[peer.url], hedge=Hedge(samples=20)) as client:
        await client.bust_many([f"warm/{number}" for number in range(100)])
        os.kill(hub.process.pid, signal.SIGSTOP)
        try:
            report = await client.bust_many([f"k/{number}" for number in range(200)], concurrency=50)
        finally:
            os.kill(hub.process.pid, signal.SIGCONT)
        assert report.ok
        assert client.statistics().overdue + client.statistics().hedges > 0


@pytest.mark.requirement("INT-03")
async def test_a_partitioned_hub_is_left_although_it_accepts_connections(start_daemon: StartDaemon) -> None:
    """Nothing passes either way, and nobody is told: probes and calls both find out."""
    hub, peer = start_daemon(), start_daemon()
    async with (
        FaultyProxy(hub.url) as way,
        BustcallClient(way.url, peers=[peer.url], probes=QUICK, failback=SOON) as client,
    ):
        assert (await client.bust("a")).daemon == way.url
        way.trouble = Trouble(stall=True)
        assert (await client.bust("b")).daemon == peer.url
        await eventually(lambda: client.topology().route == "ring")
        way.heal()
        await eventually(lambda: client.topology().route == "star")


async def test_all_reaches_every_daemon_and_owes_the_one_that_is_down(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Its row waits for it alone, although the other is up; it is delivered when it is back."""
    hub, peer = start_daemon(), start_daemon()
    port = peer.url.rpartition(":")[2]
    async with BustcallClient(
        hub.url, peers=[peer.url], probes=QUICK, outbox=tmp_path / "outbox.db", delivery="all"
    ) as client:
        assert (await client.bust("a")).status == "busted"
        peer.kill()
        result = await client.bust("b")
        assert (result.status, result.applied) == ("partial", "yes")
        assert [delivery.status for delivery in result.deliveries] == ["acknowledged", "owed"]
        (row,) = await client.outbox.rows()
        assert row.destination == peer.url
        start_daemon("--port", port)
        await eventually(lambda: client.statistics().replayed == 1)


@pytest.mark.requirement("IMP-11")
async def test_a_killed_client_leaves_its_promises_to_the_next(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Kill -9 of a process that stored, or wrote ahead: another one on the same file delivers them."""
    hub = start_daemon()
    (page,) = files(hub.root, 1)
    port = hub.url.rpartition(":")[2]
    hub.kill()
    path = tmp_path / "outbox.db"
    code = f"""
import asyncio, os, signal
from pybustcall import BustcallClient, Outbox
async def main():
    client = BustcallClient({hub.url!r}, outbox=Outbox(path={str(path)!r}, lease=0.5))
    print((await client.bust({page!r})).status, flush=True)
    asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGKILL)
    await client.bust("p/ahead.html", write_ahead=True, timeout=60)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    (hub.root / "p/ahead.html").write_text("old")
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.returncode) == ("deferred\n", -signal.SIGKILL)
    start_daemon("--port", port)
    async with BustcallClient(hub.url, outbox=Outbox(path=path, lease=0.5), probes=QUICK) as client:

        async def nothing_left() -> bool:
            return (await client.outbox.replay()).ok

        async with asyncio.timeout(PATIENCE):
            while not await nothing_left():
                await asyncio.sleep(0.05)
    assert not (hub.root / page).exists()
    assert not (hub.root / "p/ahead.html").exists()


async def test_a_repeat_of_a_lost_answer_is_not_applied_twice() -> None:
    """The answer is lost on its way: the retry carries the same key, and has no effect of its own."""
    plan = [Answer(reset=True, applies=True)]
    async with FakeDaemon(plan, capabilities=["cache.bust.idempotent"]) as fake, BustcallClient(fake.url) as client:
        result = await client.bust("a")
        assert result.ok
        assert [headers["Idempotency-Key"] for headers in fake.headers] == [result.key] * 2
        assert len(fake.applied) == 1
        await client.bust("a", idempotency_key="my-own")
        assert fake.headers[-1]["Idempotency-Key"] == "my-own"


async def test_hooks_are_told_and_harm_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One raises, one blocks for ever: the calls go on, and the third is told nevertheless before both."""
    seen: list[Event] = []
    release = threading.Event()

    def broken(_event: Event) -> None:
        raise ZeroDivisionError

    def stuck(_event: Event) -> None:
        release.wait()

    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        remove = client.on_event(seen.append)
        client.on_event(broken)
        client.on_event(stuck)
        report = await client.bust_many(["a", "b", "c"])
        assert report.ok
        await eventually(lambda: seen)
        remove()
        release.set()
        with pytest.raises(ConfigurationError, match="callable"):
            client.on_event("not a hook")  # type: ignore[arg-type]
    assert "a hook failed" in caplog.text


async def test_what_cannot_be_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    """Wrong modes, keys, and a write-ahead with nowhere to write to."""
    async with FakeDaemon() as fake, BustcallClient(fake.url) as client:
        for wrong in ({"delivery": "most"}, {"idempotency_key": "a b"}, {"idempotency_key": ""}, {"write_ahead": True}):
            with pytest.raises(InvalidRequest, match="nothing was sent"):
                await client.bust("a", **wrong)
        with pytest.raises(InvalidRequest, match="delivery"):
            await client.bust_many(["a"], delivery="most")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="no outbox"):
            _ = client.outbox
        assert fake.requests == []
    for name, value in {"delivery": "most", "outbox": 7, "client_id": "", "hedge": 0.95, "probes": True}.items():
        with pytest.raises(ConfigurationError, match=name):
            BustcallClient(**{name: value})  # type: ignore[arg-type]


async def test_an_outbox_that_cannot_be_written_fails_the_call_and_only_then(tmp_path: Path) -> None:
    """OutboxError, for one call; a failed result, among many."""
    client = BustcallClient("http://127.0.0.1:1", outbox=tmp_path / "missing" / "outbox.db", retry=None)
    with pytest.raises(OutboxError):
        await client.bust("a")
    report = await client.bust_many(["a"])
    assert report.failed == 1
    assert "outbox" in report.failures[0].note
    await client.aclose()


async def test_closing_a_client_defers_what_is_under_way(tmp_path: Path) -> None:
    """A call that hangs is cut off after the drain, and its bust is on disk."""
    from pybustcall import Pool

    path = tmp_path / "outbox.db"
    async with FakeDaemon([Answer(hang=True)]) as fake:
        client = BustcallClient(fake.url, outbox=path, pool=Pool(drain=0.1), probes=None)
        call = asyncio.create_task(client.bust("a"))
        await eventually(lambda: fake.requests)
        await client.aclose()
        result = await call
        assert (result.status, result.applied) == ("deferred", "maybe")
        async with BustcallClient(fake.url, outbox=path) as heir:
            await eventually(lambda: heir.statistics().replayed)  # without a call of its own
        assert [request.target for request in fake.requests] == ["a", "a"]


async def test_a_row_that_a_daemon_refuses_can_be_seen_retried_and_purged(tmp_path: Path) -> None:
    """Set aside, listed with its reason, delivered after all, or deleted."""
    async with FakeDaemon() as fake:
        async with BustcallClient(fake.url, outbox=tmp_path / "outbox.db", retry=Retry(attempts=1)) as client:
            fake.plan.extend([Answer.problem(500), Answer.problem(422, detail="no such thing")])
            assert (await client.bust("a")).status == "deferred"
            report = await client.outbox.replay()
            if not report.refused:  # the courier was quicker
                await eventually(lambda: client.statistics().refused)
            (row,) = await client.outbox.rows()
            assert row.state is RowState.ASIDE
            assert "422" in row.reason
            assert client.outbox.path.endswith("outbox.db")
            assert "outbox.db" in repr(client.outbox)
            assert await client.outbox.retry([row.id]) == 1
            assert (await client.outbox.replay()).left == 0
            fake.plan.extend([Answer.problem(500)])
            await client.bust("b")
            assert await client.outbox.purge() == 0
            assert await client.outbox.purge(aside_only=False) <= 1


async def test_reset_forgets_every_fault() -> None:
    """An open breaker closes, and the next call goes to the hub."""
    async with FakeDaemon() as fake:
        await fake.stop()
        async with BustcallClient(fake.url, probes=None, retry=None) as client:
            for _ in range(6):
                await client.bust("a", fault_tolerance=12)
            assert client.topology().daemons[0].breaker == "open"
            await fake.start()
            client.reset()
            await asyncio.sleep(0)
            assert client.topology().daemons[0].breaker == "closed"
            assert (await client.bust("a")).ok


def test_a_topology_belongs_to_an_event_loop() -> None:
    """Outside one there is nothing to tell; a client that made no call yet has a fresh one."""
    client = BustcallClient("http://127.0.0.1:1", peers=["http://127.0.0.1:2"])
    with pytest.raises(RuntimeError):
        client.topology()

    async def look() -> tuple[str, ...]:
        return client.topology().order

    assert asyncio.run(look()) == ("http://127.0.0.1:1", "http://127.0.0.1:2")


async def test_a_disabled_client_has_an_empty_topology() -> None:
    """It has no daemons, no events, nothing to reset."""
    client = BustcallClient.disabled()
    assert client.topology().order == ()
    client.on_event(print)()
    client.reset()
    assert client.statistics().calls == 0
