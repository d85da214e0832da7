"""What a client does on its own, under virtual time: it probes when the fleet says so, and empties the outbox."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pybustcall.background import Courier, Prober, ReplayReport
from pybustcall.delivery import Replay
from pybustcall.errors import ClientClosed, OutboxError
from pybustcall.faults import Fault, FaultKind
from pybustcall.fleet import Fleet, Policies
from pybustcall.outbox import ANY, Outbox, OutboxRow, OutboxStore, RowState, StoredBust
from pybustcall.policies import Probes
from pybustcall.telemetry import BustReplayed, Event
from tests.conftest import virtual_time
from tests.test_delivery import Inline

DEAD = Fault(FaultKind.UNREACHABLE, "hub", "no connection", "no")
MAYBE = Fault(FaultKind.TIMED_OUT, "hub", "no answer", "maybe")


def fleet(probes: Probes | None = Probes()) -> Fleet:  # noqa: B008 - frozen
    """Make a fleet of a hub and a peer."""
    now = asyncio.get_running_loop().time()
    return Fleet(["hub", "peer"], Policies(probes=probes), client_id="c", now=now, random=lambda: 0.5)


@virtual_time
async def test_the_hub_is_probed_every_five_seconds_and_peers_every_thirty() -> None:
    """With no jitter drawn; a suspect every second."""
    probed: list[tuple[float, int]] = []
    fault: Fault | None = None

    async def probe(index: int) -> Fault | None:
        probed.append((round(asyncio.get_running_loop().time(), 1), index))
        return fault if index == 0 else None

    known = fleet()
    prober = Prober(known, probe)
    prober.start()
    prober.start()  # only once
    await asyncio.sleep(31)
    assert probed == [(5.0, 0), (10.0, 0), (15.0, 0), (20.0, 0), (25.0, 0), (30.0, 0), (30.0, 1)]
    fault = DEAD
    probed.clear()
    await asyncio.sleep(6.5)
    assert [at for at, _ in probed] == [35.0, 36.0, 37.0]
    assert known.view(asyncio.get_running_loop().time()).daemons[0].down
    await prober.aclose()
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_a_suspect_is_probed_soon() -> None:
    """A fault of a bust wakes the prober, which was to sleep for longer."""
    probed: list[float] = []

    async def probe(_index: int) -> None:
        probed.append(round(asyncio.get_running_loop().time(), 1))

    loop = asyncio.get_running_loop()
    woken: list[float] = []

    def wake() -> None:
        woken.append(loop.time())
        prober.wake()

    known = Fleet(["hub"], Policies(probes=Probes()), client_id="c", now=0, random=lambda: 0.5, wake=wake)
    prober = Prober(known, probe)
    prober.start()
    await asyncio.sleep(1)
    flight = known.board(0, loop.time())
    assert not isinstance(flight, Fault)
    known.sent(flight, loop.time())
    known.failed(flight, DEAD, loop.time())
    await asyncio.sleep(1.5)
    assert woken == [pytest.approx(1.0, abs=0.01)]
    assert probed == [2.0]
    await prober.aclose()


@virtual_time
async def test_a_probe_that_hangs_ends_with_the_prober() -> None:
    """Closing waits for it; a prober without the policy does nothing; one that was never begun closes too."""
    ended = asyncio.Event()

    async def probe(_index: int) -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            ended.set()

    prober = Prober(fleet(), probe)
    prober.start()
    await asyncio.sleep(6)
    await prober.aclose()
    assert ended.is_set()
    off = Prober(fleet(None), probe)
    off.start()
    await off.aclose()
    off.cancel()
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_the_background_inherits_nothing_of_the_call_that_began_it() -> None:
    """No span of a trace, no place in a queue."""
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="nothing")
    seen: list[str] = []

    async def probe(_index: int) -> None:
        seen.append(mark.get())

    mark.set("a span")
    prober = Prober(fleet(), probe)
    prober.start()
    await asyncio.sleep(6)
    prober.cancel()
    await prober.aclose()
    assert seen == ["nothing"]


@dataclass
class Post:
    """A courier with what stands around it."""

    store: OutboxStore
    courier: Courier
    verdicts: list[Replay] = field(default_factory=list)
    sent: list[tuple[float, str]] = field(default_factory=list)
    paused: list[frozenset[str]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    available: bool = True
    hang: bool = False
    special: dict[str, Replay | Exception] = field(default_factory=dict)

    async def put(self, *targets: str, destination: str = ANY) -> None:
        """Store busts."""
        for target in targets:
            bust = StoredBust(target=target, strategy="direct", fault_tolerance=6, key=f"key-of-{target}")
            await self.store.put(bust, [destination], sent=True)
        self.courier.wake()

    async def states(self) -> dict[str, RowState]:
        """Tell what became of each."""
        return {row.bust.target: row.state for row in await self.store.rows()}


@asynccontextmanager
async def post(path: Path, *verdicts: Replay, replay: float = 50.0) -> AsyncIterator[Post]:
    """Put a courier together; what it delivers meets these verdicts, the last again and again."""
    loop = asyncio.get_running_loop()
    policy = Outbox(path=path / "outbox.db", replay=replay)
    store = OutboxStore(policy, executor=Inline(), clock=lambda: 1e9 + loop.time())

    async def deliver(row: OutboxRow, paused: frozenset[str]) -> Replay:
        made.sent.append((loop.time(), row.bust.target))
        made.paused.append(paused)
        if made.hang:
            await asyncio.sleep(1e6)
        await asyncio.sleep(0.01)
        if paused:
            return Replay(verdict="later")
        if (special := made.special.get(row.bust.target[0])) is not None:
            if isinstance(special, Exception):
                raise special
            return special
        return made.verdicts[0] if len(made.verdicts) == 1 else made.verdicts.pop(0)

    events: list[Event] = []
    counts: Counter[str] = Counter()
    courier = Courier(
        store,
        policy,
        deliver,
        ready=lambda: frozenset({"hub", "peer"}) if made.available else frozenset(),
        owner="courier",
        destinations=["hub", "peer"],
        random=lambda: 0.5,
        emit=events.append,
        counts=counts,
    )
    made = Post(store, courier, list(verdicts), events=events, counts=counts)
    try:
        yield made
    finally:
        await courier.aclose()
        await store.aclose()


DELIVERED = Replay(verdict="delivered")
REFUSED = Replay(verdict="refused", causes=(Fault(FaultKind.REJECTED, "hub", "it refused", "no"),))
LATER = Replay(verdict="later", causes=(DEAD,))


@virtual_time
async def test_what_is_stored_is_delivered_in_order_and_deleted(tmp_path: Path) -> None:
    """At most 50 a second, evenly."""
    async with post(tmp_path, DELIVERED) as made:
        made.courier.start()
        made.courier.start()
        await made.put(*(f"t{number:03}" for number in range(100)))
        await asyncio.sleep(3)
        assert [target for _, target in made.sent] == [f"t{number:03}" for number in range(100)]
        assert made.sent[-1][0] - made.sent[0][0] == pytest.approx(99 / 50, abs=0.1)
        assert await made.states() == {}
        assert made.counts["replayed"] == 100
        assert made.events[0] == BustReplayed(daemon=ANY, row=1, target="t000", ok=True)


@virtual_time
async def test_nothing_is_sent_while_nobody_is_there(tmp_path: Path) -> None:
    """No daemon is worth asking; once one is, the courier goes on within a second or so."""
    async with post(tmp_path, DELIVERED) as made:
        made.available = False
        made.courier.start()
        await made.put("a")
        await asyncio.sleep(30)
        assert made.sent == []
        made.available = True
        await asyncio.sleep(2)
        assert await made.states() == {}


@virtual_time
async def test_a_refused_row_is_set_aside_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is kept, counted, and named in the log by its number, not by its target."""
    async with post(tmp_path, REFUSED, DELIVERED) as made:
        made.courier.start()
        with caplog.at_level(logging.WARNING, "pybustcall"):
            await made.put("secret/path", "b")
            await asyncio.sleep(5)
        assert await made.states() == {"secret/path": RowState.ASIDE}
        assert made.counts["refused"] == 1
        assert "row 1" in caplog.text
        assert "secret" not in caplog.text


@virtual_time
async def test_a_failed_row_waits_longer_each_time(tmp_path: Path) -> None:
    """Backoff of the row and of the rounds: ten minutes of outage are a few dozen attempts."""
    async with post(tmp_path, LATER) as made:
        made.courier.start()
        await made.put("a")
        await asyncio.sleep(600)
        assert 10 <= len(made.sent) <= 60
        gaps = [later[0] - earlier[0] for earlier, later in zip(made.sent, made.sent[1:], strict=False)]
        assert max(gaps) <= 50
        made.verdicts[:] = [DELIVERED]
        await asyncio.sleep(60)
        assert await made.states() == {}


@virtual_time
async def test_a_daemon_that_refuses_us_is_paused(tmp_path: Path) -> None:
    """It gets nothing for a minute, whichever row it is."""
    unauthorised = Replay(verdict="later", causes=(Fault(FaultKind.TOKEN_REFUSED, "hub", "bad token", "no"),))
    async with post(tmp_path, unauthorised) as made:
        made.courier.start()
        await made.put("a")
        await asyncio.sleep(30)
        assert made.paused[0] == frozenset()
        assert set(made.paused[1:]) == {frozenset({"hub"})}
        await asyncio.sleep(90)
        assert frozenset() in made.paused[1:]


@virtual_time
async def test_a_courier_that_is_closed_gives_back_what_it_held(tmp_path: Path) -> None:
    """Another process need not wait for the lease to end."""
    async with post(tmp_path, DELIVERED) as made:
        made.hang = True
        await made.put("a", "b")
        made.courier.start()
        await asyncio.sleep(1)
        assert set((await made.states()).values()) == {RowState.LEASED}
        await made.courier.aclose()
        assert set((await made.states()).values()) == {RowState.PENDING}


@virtual_time
async def test_a_replay_delivers_what_was_waiting_for_its_backoff(tmp_path: Path) -> None:
    """Everything, at once, whatever it waits for; the report says what is left."""
    async with post(tmp_path, LATER, DELIVERED, REFUSED, LATER) as made:
        await made.put("a")
        assert await made.courier.replay() == ReplayReport(left=1)
        await made.put("b", "c")
        report = await made.courier.replay()
        assert (report.delivered, report.refused, report.left, report.ok) == (1, 1, 1, False)


@virtual_time
async def test_a_replay_of_many_takes_several_rounds(tmp_path: Path) -> None:
    """More than one batch, and nothing is left."""
    async with post(tmp_path, DELIVERED, replay=1000) as made:
        await made.put(*(f"t{number}" for number in range(100)))
        assert await made.courier.replay() == ReplayReport(delivered=100)
        assert (await made.courier.replay()).ok


@virtual_time
async def test_an_outbox_that_fails_does_not_end_the_courier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told in the log, and tried again later."""
    async with post(tmp_path, DELIVERED) as made:
        lease = made.store.lease

        async def broken(*_: object) -> tuple[OutboxRow, ...]:
            raise OutboxError("the disk is gone")

        monkeypatch.setattr(made.store, "lease", broken)
        made.courier.start()
        await made.put("a")
        await asyncio.sleep(20)
        assert "the disk is gone" in caplog.text
        monkeypatch.setattr(made.store, "lease", lease)
        await asyncio.sleep(20)
        assert await made.states() == {}


@virtual_time
async def test_leases_that_cannot_be_given_back_end_by_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing goes on; the log says it."""
    async with post(tmp_path, DELIVERED) as made:
        made.hang = True
        made.courier.start()
        await made.put("a")
        await asyncio.sleep(1)
        await made.store.aclose()
        await made.courier.aclose()
        assert "could not be given back" in caplog.text


@virtual_time
async def test_a_daemon_that_fails_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    """A hundred rows that one cannot take stand before five of another: those go out at once, and by a replay too."""
    async with post(tmp_path, DELIVERED) as made:
        made.special["h"] = LATER
        await made.put(*(f"h{number}" for number in range(100)), destination="hub")
        await made.put(*(f"p{number}" for number in range(5)), destination="peer")
        made.courier.start()
        await asyncio.sleep(5)
        assert all(target.startswith("h") for target in await made.states())
        await made.put("p5", destination="peer")
        report = await made.courier.replay()
        assert report.left == 100
        assert "p5" not in await made.states()


@virtual_time
async def test_rows_wait_for_no_backoff_once_their_daemon_is_back(tmp_path: Path) -> None:
    """It was down for ten minutes; a second or two after it is back they are delivered."""
    async with post(tmp_path, LATER) as made:
        made.courier.start()
        await made.put("a", "b")
        await asyncio.sleep(100)
        made.available = False
        await asyncio.sleep(500)
        made.verdicts[:] = [DELIVERED]
        made.available = True
        await asyncio.sleep(2.5)
        assert await made.states() == {}


@virtual_time
async def test_a_defect_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error at one row is logged, and tried again; the others are delivered meanwhile."""
    async with post(tmp_path, DELIVERED) as made:
        made.special = {"z": ZeroDivisionError()}
        made.courier.start()
        await made.put("z", "a")
        await asyncio.sleep(60)
        assert set(await made.states()) == {"z"}
        assert "an unexpected error" in caplog.text
        del made.special["z"]
        await asyncio.sleep(120)
        assert await made.states() == {}


@virtual_time
async def test_a_row_that_another_took_over_is_not_counted_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our lease had ended; who holds it now deletes it, and counts it."""
    async with post(tmp_path, DELIVERED) as made:

        async def gone(*_: object) -> int:
            return 0

        monkeypatch.setattr(made.store, "done", gone)
        await made.put("a")
        await made.courier.replay()
        assert made.counts["replayed"] == 0
        assert made.events == []


@virtual_time
async def test_no_more_is_leased_than_is_sent_in_time(tmp_path: Path) -> None:
    """At one a second and a lease of two seconds, one row at a time."""
    async with post(tmp_path, DELIVERED) as made:
        assert made.courier._batch == 16
        made.courier._policy = Outbox(path="x", lease=2.0, replay=1.0)
        assert made.courier._batch == 1


@virtual_time
async def test_a_closed_courier_leases_nothing_more(tmp_path: Path) -> None:
    """A replay that is under way ends with ClientClosed, and leaves its rows to others."""
    async with post(tmp_path, DELIVERED) as made:
        await made.put("a")
        await made.courier.aclose()
        with pytest.raises(ClientClosed):
            await made.courier.replay()
        assert await made.states() == {"a": RowState.PENDING}


@virtual_time
async def test_a_probe_that_fails_unexpectedly_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and says nothing of the daemon."""
    probed: list[int] = []

    async def probe(index: int) -> Fault | None:
        probed.append(index)
        raise ZeroDivisionError

    prober = Prober(fleet(), probe)
    prober.start()
    await asyncio.sleep(11)
    await prober.aclose()
    assert probed == [0, 0]
    assert "an unexpected error while a daemon was probed" in caplog.text
