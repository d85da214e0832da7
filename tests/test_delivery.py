"""Delivery under virtual time: scripted daemons and a real outbox; what a call promises, and what it owes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from pybustcall.delivery import RESERVE, Delivered, Deliverer, DeliveryMode, Job, Replay
from pybustcall.errors import BustFailed, ClientClosed, IncompatibleDaemon, OutboxError
from pybustcall.faults import FaultKind
from pybustcall.fleet import Fleet
from pybustcall.models import BustReply, BustRequest, LayerReply, bust_request, cache_key_of
from pybustcall.outbox import ANY, Outbox, OutboxRow, OutboxStore, RowState, StoredBust
from pybustcall.policies import Probes, Retry
from pybustcall.results import LayerResult, failure
from pybustcall.telemetry import BustDeferred, Event
from tests.conftest import virtual_time
from tests.scripted import NEVER, Scripted, daemon, fleet_of


class Inline(Executor):
    """Runs at once what it is given: virtual time does not wait for threads."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it."""
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            done.set_exception(error)
        return done


@dataclass
class Bench:
    """A deliverer with what stands around it."""

    deliverer: Deliverer[Scripted]
    fleet: Fleet
    store: OutboxStore | None
    daemons: tuple[Scripted, ...]
    events: list[Event] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)
    requests: list[tuple[BustRequest, bool]] = field(default_factory=list)
    woken: int = 0
    adopted: list[asyncio.Task[object]] = field(default_factory=list)

    async def bust(self, target: str = "a", tolerance: int = 6, timeout: float = 5.0, **how: Any) -> Delivered:
        """Deliver one bust."""
        begun = asyncio.get_running_loop().time()
        mode: DeliveryMode = how.pop("mode", "first")
        asked = {name: how.pop(name) for name in ASKED if name in how}
        return await self.deliverer.bust(
            Job(
                request=bust_request(target, "direct", tolerance, **asked),
                key=how.pop("key", f"key-of-{target}"),
                begun=begun,
                deadline=begun + timeout,
                mode=mode,
                retry=Retry(),
                **how,
            )
        )

    async def rows(self) -> list[tuple[str, str, RowState, bool]]:
        """List the outbox: target, destination, state, sent."""
        assert self.store is not None
        return [(row.bust.target, row.destination, row.state, row.sent) for row in await self.store.rows()]


@asynccontextmanager
async def bench(*daemons: Scripted, outbox: Path | None = None, rows: int = 100) -> AsyncIterator[Bench]:
    """Put a deliverer together over scripted daemons."""
    fleet = fleet_of(daemons, chance=0.5)
    store = None
    if outbox is not None:
        store = OutboxStore(Outbox(path=outbox, rows=rows), executor=Inline())

    async def send(
        one: Scripted,
        request: BustRequest,
        /,
        *,
        key: str,
        until: float,
        deadline: float,
        started: Callable[[], None],
        wider: bool,
    ) -> BustReply:
        made.keys.append((one.url, key))
        made.requests.append((request, wider))
        assert until <= deadline
        answer = await one.answer(until, started)
        echo = {name: getattr(request, name) for name in ("kind", "namespace", "soft", "dry_run")}
        said: dict[str, Any] = {"status": "success", "cache_key": cache_key_of(request.target), "removed": 1, **echo}
        return BustReply(**{**said, **ANSWERS[answer]})

    def wake() -> None:
        made.woken += 1

    def adopt(task: asyncio.Task[object], _linger: float) -> None:
        made.adopted.append(task)

    events: list[Event] = []
    deliverer = Deliverer(
        send,
        daemons,
        fleet,
        random=lambda: 0.5,
        adopt=adopt,
        store=store,
        owner="calls",
        emit=events.append,
        wake=wake,
    )
    made = Bench(deliverer, fleet, store, daemons, events)
    try:
        yield made
    finally:
        for task in made.adopted:
            task.cancel()
        await asyncio.gather(*made.adopted, return_exceptions=True)
        if store is not None:
            await store.aclose()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the outbox lies."""
    return tmp_path / "outbox.db"


ASKED = ("kind", "soft", "namespace", "confirm", "dry_run", "verify", "settle", "reason")

WELL = LayerReply(name="redis", ok=True, removed=1)
ILL = LayerReply(name="cdn", ok=False, error="it is down")
AGAIN = LayerReply(name="pages", ok=True, removed=1, waits=True)
LATER = LayerReply(name="memory", ok=False, error="it will be busted", waits=True)
ANSWERS: dict[str, dict[str, Any]] = {
    "ok": {},
    "late": {},
    "layers": {"layers": (WELL,)},
    "verified": {"verified": True},
    "matched": {"removed": 0, "matched": 7},
    "everything": {"kind": "all", "soft": None},
    "accepted": {"status": "accepted", "job": "j1", "layers": (WELL,)},
    "accepted-bare": {"status": "accepted", "job": "j1"},
    "partial": {"status": "accepted", "job": "j2", "layers": (WELL, ILL)},
    "partial-waits": {"status": "accepted", "job": "j2", "layers": (ILL, AGAIN, LATER)},
}
"""What a scripted daemon says in its answer beside the echo."""

OK = (0.01, "ok")
REFUSED = (0.0, FaultKind.UNREACHABLE)


def hub_peer(*lines: tuple[float, FaultKind | str]) -> tuple[Scripted, Scripted]:
    """Script a hub, and a peer that does as it should."""
    return daemon("hub", *lines), daemon("peer", OK)


@pytest.mark.requirement("IMP-03")
@pytest.mark.parametrize(
    ("daemons", "stage"),
    [
        ([daemon("hub", REFUSED, OK)], 9),
        (hub_peer((NEVER, "late")), 9),
        (hub_peer((0.0, FaultKind.TOKEN_REFUSED)), 9),
    ],
    ids=["refused-then-ok", "hub-times-out", "hub-401"],
)
@virtual_time
async def test_acknowledged_after_faults_is_stage_nine(daemons: list[Scripted], stage: int, path: Path) -> None:
    """The worked cases of the fault model: busted, 9, and nothing in the outbox."""
    async with bench(*daemons, outbox=path) as made:
        result = (await made.bust(tolerance=0)).result
        assert (result.status, result.stage, result.ok, result.applied) == ("busted", stage, True, "yes")
        assert await made.rows() == []
    for one in daemons:
        one.asked.clear()


@pytest.mark.requirement("IMP-03")
@pytest.mark.parametrize("tolerance", range(13))
@virtual_time
async def test_an_outage_is_stored_from_tolerance_six(tolerance: int, path: Path) -> None:
    """503 three times, alone: t < 6: 5 failed, not stored; t >= 6: 6 deferred."""
    async with bench(daemon("hub", (0.0, FaultKind.THROTTLED)), outbox=path) as made:
        result = (await made.bust(tolerance=tolerance)).result
        if tolerance < 6:
            assert (result.status, result.stage, result.rows) == ("failed", 5, ())
            assert await made.rows() == []
        else:
            assert (result.status, result.stage, result.ok) == ("deferred", 6, False)
            assert await made.rows() == [("a", ANY, RowState.PENDING, False)]
            assert made.events == [BustDeferred(daemon=ANY, row=result.rows[0], target="a")]
            assert made.woken == 1


@pytest.mark.requirement("IMP-03")
@virtual_time
async def test_without_an_outbox_an_outage_is_stage_five() -> None:
    """503 three times, alone, no outbox."""
    async with bench(daemon("hub", (0.0, FaultKind.THROTTLED))) as made:
        delivered = await made.bust(tolerance=12)
        assert (delivered.result.status, delivered.result.stage) == ("failed", 5)
        assert delivered.ending in {"exhausted", "deadline"}


@pytest.mark.requirement("IMP-03")
@pytest.mark.parametrize(
    ("kind", "stage"), [(FaultKind.REJECTED, 4), (FaultKind.NOT_ALLOWED, 3), (FaultKind.CERTIFICATE, 1)]
)
@virtual_time
async def test_what_was_refused_for_good_is_never_stored(kind: FaultKind, stage: int, path: Path) -> None:
    """422, 403 and a false certificate: it would be refused again."""
    async with bench(daemon("hub", (0.0, kind)), outbox=path) as made:
        result = (await made.bust(tolerance=12)).result
        assert (result.status, result.stage) == ("failed", stage)
        assert await made.rows() == []


@virtual_time
async def test_an_escalated_fault_never_makes_a_call_panic(path: Path) -> None:
    """A daemon that keeps failing is quarantined, but the call is EXCEPTION at worst, or stored."""
    async with bench(daemon("hub", REFUSED)) as made:
        made.fleet.policies = replace(made.fleet.policies, probes=Probes())
        for _ in range(20):
            await asyncio.sleep(1.1)
            result = (await made.bust(tolerance=12)).result
            assert 3 <= result.stage <= 5
        assert made.fleet.view(asyncio.get_running_loop().time()).daemons[0].breaker == "quarantined"


@virtual_time
async def test_attempts_end_in_time_to_store(path: Path) -> None:
    """A daemon that answers others, and not this call: attempts end a quarter of a second before the deadline."""
    hub = daemon("hub", (NEVER, "late"))
    async with bench(hub, outbox=path) as made:
        loop = asyncio.get_running_loop()

        async def chatter() -> None:
            while True:
                await asyncio.sleep(0.1)
                made.fleet._daemons[0].heard = loop.time()

        others = asyncio.create_task(chatter())
        result = (await made.bust(timeout=1.5)).result
        others.cancel()
        assert result.status == "deferred"
        assert 1.5 - RESERVE <= result.elapsed <= 1.5
        assert await made.rows() == [("a", ANY, RowState.PENDING, True)]  # sent: it accepts no joiners


@virtual_time
async def test_every_attempt_carries_the_same_key() -> None:
    """On retries, and at the next daemon."""
    async with bench(daemon("hub", REFUSED), daemon("peer", REFUSED, OK)) as made:
        await made.bust(key="one")
        assert len(made.keys) > 2
        assert {key for _, key in made.keys} == {"one"}


@pytest.mark.requirement("IMP-03")
@virtual_time
async def test_all_with_one_down_is_partial_and_the_missing_one_is_owed(path: Path) -> None:
    """6..8 partial; its row is for that daemon alone, and the deliveries name who has it."""
    async with bench(daemon("hub", OK), daemon("b", REFUSED), daemon("c", OK), outbox=path) as made:
        result = (await made.bust(mode="all")).result
        assert (result.status, result.ok, result.applied) == ("partial", False, "yes")
        assert 6 <= result.stage <= 8
        assert [delivery.status for delivery in result.deliveries] == ["acknowledged", "owed", "acknowledged"]
        assert result.removed == 2
        assert await made.rows() == [("a", "b", RowState.PENDING, False)]
        assert result.deliveries[1].row == result.rows[0]


@pytest.mark.requirement("IMP-03")
@virtual_time
async def test_all_with_one_down_and_no_outbox_fails_and_names_it() -> None:
    """5 failed, applied = yes."""
    async with bench(daemon("hub", OK), daemon("b", REFUSED), daemon("c", OK)) as made:
        delivered = await made.bust(mode="all")
        result = delivered.result
        assert (result.status, result.stage, result.applied) == ("failed", 5, "yes")
        error = failure("the bust", delivered.ending, result.causes, result.elapsed, result)
        assert "applied at hub, c; not acknowledged by b" in str(error)
        assert error.applied == "yes"


@virtual_time
async def test_a_quorum_is_enough_and_the_rest_is_owed(path: Path) -> None:
    """Two of three acknowledge: busted; the third gets it later. Without an outbox it is named as missed."""
    async with bench(daemon("hub", OK), daemon("b", OK), daemon("c", REFUSED), outbox=path) as made:
        result = (await made.bust(mode="quorum")).result
        assert (result.status, result.ok) == ("busted", True)
        assert await made.rows() == [("a", "c", RowState.PENDING, False)]
    async with bench(daemon("hub", OK), daemon("b", OK), daemon("c", REFUSED)) as made:
        result = (await made.bust(mode="quorum")).result
        assert [delivery.status for delivery in result.deliveries] == ["acknowledged", "acknowledged", "missed"]


@virtual_time
async def test_all_down_is_deferred_for_each(path: Path) -> None:
    """A row for each daemon."""
    async with bench(daemon("hub", REFUSED), daemon("b", REFUSED), outbox=path) as made:
        result = (await made.bust(mode="all")).result
        assert result.status == "deferred"
        assert [row[1] for row in await made.rows()] == ["hub", "b"]


@virtual_time
async def test_a_daemon_known_to_be_down_is_owed_at_once(path: Path) -> None:
    """It is not waited for: the call takes as long as the others."""
    b = daemon("b", (NEVER, "late"))
    async with bench(daemon("hub", OK), b, outbox=path) as made:
        for _ in range(6):
            await made.bust(mode="all", timeout=1.0)
            await asyncio.sleep(0.1)
        results = [(await made.bust(f"z{number}", mode="all", timeout=1.0)).result for number in range(10)]
        assert {result.status for result in results} == {"partial"}
        # One call a second tries it, and waits for half a second at most.
        assert sum(result.elapsed > 0.05 for result in results) <= 1
        assert max(result.elapsed for result in results) <= 0.55


@virtual_time
async def test_silence_everywhere_is_not_waited_for_where_the_bust_can_be_stored(path: Path) -> None:
    """Two black holes: calls in flight give up soon, later ones at once; where it cannot be stored they wait."""
    hub, peer = daemon("hub", OK), daemon("peer", OK)
    async with bench(hub, peer, outbox=path) as made:
        for number in range(120):
            await made.bust(f"warm{number}")
        hub.script[0] = peer.script[0] = (NEVER, "late")
        results = [done.result for done in await asyncio.gather(*(made.bust(f"a{number}") for number in range(30)))]
        assert {result.status for result in results} == {"deferred"}
        assert max(result.elapsed for result in results) <= 1.3  # the peer is new to us, and waited for a second
        later = [(await made.bust(f"b{number}")).result for number in range(20)]
        assert {result.status for result in later} == {"deferred"}
        assert sum(result.elapsed > 0.05 for result in later) <= 2
        stern = (await made.bust("c", tolerance=5, timeout=3.0)).result
        assert stern.status == "failed"
        assert stern.elapsed == pytest.approx(3.0, abs=0.05)


@virtual_time
async def test_a_client_closed_under_a_call_to_many_owes_each(path: Path) -> None:
    """A row for every daemon, written ahead or not."""
    hub, peer = daemon("hub", OK), daemon("peer", OK)
    async with bench(hub, peer, outbox=path) as made:

        async def closed(until: float, started: Callable[[], None]) -> str:
            raise ClientClosed("closed", applied="maybe")

        for one in (hub, peer):
            one.answer = closed  # type: ignore[method-assign]
        assert (await made.bust(mode="all")).result.status == "deferred"
        assert (await made.bust("b", mode="all", write_ahead=True)).result.status == "deferred"
        assert sorted(row[1] for row in await made.rows()) == ["hub", "hub", "peer", "peer"]


@virtual_time
async def test_a_quorum_owes_nothing_to_a_daemon_that_refuses(path: Path) -> None:
    """It would refuse it again; and what is full fails the call with the truth about who has it."""
    async with bench(daemon("hub", OK), daemon("b", OK), daemon("c", (0.0, FaultKind.REJECTED)), outbox=path) as made:
        assert (await made.bust(mode="quorum")).result.status == "busted"
        assert await made.rows() == []
    async with bench(daemon("hub", OK), daemon("b", OK), daemon("c", REFUSED), outbox=path, rows=1) as made:
        await made.bust("first", mode="quorum")
        with pytest.raises(OutboxError, match="acknowledged by hub, b") as caught:
            await made.bust("second", mode="quorum")
        assert caught.value.applied == "yes"


@virtual_time
async def test_a_row_that_cannot_be_deleted_costs_no_acknowledged_call(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is delivered once more; the log says why."""
    async with bench(daemon("hub", OK), outbox=path) as made:

        async def broken(*_: object) -> int:
            raise OutboxError("the disk is gone")

        assert made.store is not None
        monkeypatch.setattr(made.store, "done", broken)
        assert (await made.bust(write_ahead=True)).result.status == "busted"
        assert "the disk is gone" in caplog.text


@virtual_time
async def test_a_slow_outbox_does_not_hold_a_call_beyond_its_deadline(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OutboxError in time, ahead of the attempts or after them."""
    async with bench(daemon("hub", REFUSED), outbox=path) as made:

        async def slow(*_: object, **__: object) -> tuple[int, ...]:
            await asyncio.sleep(20)
            return (1,)

        assert made.store is not None
        monkeypatch.setattr(made.store, "put", slow)
        loop = asyncio.get_running_loop()
        for ahead in (False, True):
            begun = loop.time()
            with pytest.raises(OutboxError, match="took too long"):
                await made.bust(timeout=1.0, write_ahead=ahead)
            assert loop.time() - begun <= 1.05


@pytest.mark.requirement("IMP-03")
@virtual_time
async def test_a_panic_releases_in_reverse_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row, trial, request were taken; request, trial, row are given back: nothing is left of the halted call."""
    hub = daemon("hub", (0.1, FaultKind.CERTIFICATE))
    async with bench(hub, outbox=path) as made:
        assert made.store is not None
        done = made.store.done
        seen: list[tuple[int, int]] = []

        async def noted(owner: str, ids: Sequence[int]) -> int:
            view = made.fleet.view(asyncio.get_running_loop().time()).daemons[0]
            seen.append((hub.under_way, view.in_flight))
            return await done(owner, ids)

        monkeypatch.setattr(made.store, "done", noted)
        delivered = await made.bust(write_ahead=True)
        assert (delivered.ending, delivered.result.stage, delivered.result.applied) == ("halted", 1, "no")
        assert seen == [(0, 0)]
        assert await made.rows() == []


@pytest.mark.requirement("IMP-03")
@virtual_time
async def test_a_leg_that_panics_halts_alone_but_is_not_stored(path: Path) -> None:
    """All: a false certificate at one; the others acknowledge; the call fails at stage 1 and says who has it."""
    async with bench(daemon("hub", (0.0, FaultKind.CERTIFICATE)), daemon("b", OK), outbox=path) as made:
        delivered = await made.bust(mode="all")
        result = delivered.result
        assert (result.status, result.stage, result.applied) == ("failed", 1, "yes")
        assert delivered.ending == "halted"
        assert await made.rows() == []
        assert made.fleet.view(asyncio.get_running_loop().time()).daemons[0].breaker == "quarantined"


@pytest.mark.parametrize("at", [0.0, 0.005, 0.5, 2.5])
@virtual_time
async def test_a_cancelled_call_is_stored_first(at: float, path: Path) -> None:
    """Wherever the cancellation finds it; then it arrives."""
    async with bench(daemon("hub", REFUSED, (NEVER, "late")), daemon("b", (NEVER, "late")), outbox=path) as made:
        call = asyncio.create_task(made.bust())
        await asyncio.sleep(at)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await made.rows() == [("a", ANY, RowState.PENDING, True)]
        assert len(made.events) == 1


@virtual_time
async def test_a_cancelled_call_that_does_not_tolerate_storing_is_not_stored(path: Path) -> None:
    """T < 6 says that stored is not good enough."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path) as made:
        call = asyncio.create_task(made.bust(tolerance=5, write_ahead=True))
        await asyncio.sleep(0.5)
        assert await made.rows() == [("a", ANY, RowState.LEASED, False)]
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await made.rows() == []


@virtual_time
async def test_an_anyio_scope_that_cancels_again_and_again_finds_it_stored(path: Path) -> None:
    """Under FastAPI a cancellation is delivered in every await of the clean-up, too."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path) as made:
        with anyio.move_on_after(0.5) as scope:
            await made.bust()
        assert scope.cancelled_caught
        assert await made.rows() == [("a", ANY, RowState.PENDING, True)]


@virtual_time
async def test_a_client_closed_under_a_call_defers_it(path: Path) -> None:
    """Its connections went; the bust is in the outbox."""
    hub = daemon("hub", OK)
    async with bench(hub, outbox=path) as made:

        async def closed(until: float, started: Callable[[], None]) -> str:
            started()
            raise ClientClosed("closed", applied="maybe")

        hub.answer = closed  # type: ignore[method-assign]
        result = (await made.bust()).result
        assert (result.status, result.applied) == ("deferred", "maybe")
        with pytest.raises(ClientClosed):
            await made.bust(tolerance=5)
        with pytest.raises(ClientClosed):
            await made.bust(tolerance=5, write_ahead=True)
        assert len(await made.rows()) == 1


@virtual_time
async def test_write_ahead_is_on_disk_before_the_first_attempt_and_gone_after_the_acknowledgement(path: Path) -> None:
    """Nobody else may send it meanwhile."""
    async with bench(daemon("hub", (0.5, "ok")), outbox=path) as made:
        call = asyncio.create_task(made.bust(write_ahead=True))
        await asyncio.sleep(0.2)
        assert await made.rows() == [("a", ANY, RowState.LEASED, False)]
        assert made.store is not None
        assert await made.store.lease("another", [], 10) == ()
        assert (await call).result.status == "busted"
        assert await made.rows() == []


@virtual_time
async def test_write_ahead_of_what_fails_is_released_or_taken_back(path: Path) -> None:
    """Deferred where that is tolerated; deleted where it is not, or where a daemon refuses it for good."""
    async with bench(daemon("hub", REFUSED), outbox=path) as made:
        assert (await made.bust(write_ahead=True)).result.status == "deferred"
        assert [row[:3] for row in await made.rows()] == [("a", ANY, RowState.PENDING)]
        assert (await made.bust("b", tolerance=5, write_ahead=True)).result.status == "failed"
        assert len(await made.rows()) == 1
    async with bench(daemon("hub", (0.0, FaultKind.REJECTED)), outbox=path) as made:
        assert (await made.bust("c", write_ahead=True)).result.status == "failed"
        assert len(await made.rows()) == 1


@virtual_time
async def test_a_written_row_that_is_no_longer_ours_is_stored_anew(path: Path) -> None:
    """It was purged, or its file set aside, while the call went on: a row too many is better than one too few."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path) as made:
        call = asyncio.create_task(made.bust(write_ahead=True, timeout=1.0))
        await asyncio.sleep(0.5)
        assert made.store is not None
        await made.store.purge(aside_only=False)
        result = (await call).result
        assert result.status == "deferred"
        assert [row.id for row in await made.store.rows()] == list(result.rows)


@virtual_time
async def test_write_ahead_to_all_keeps_only_what_is_owed(path: Path) -> None:
    """A row for each daemon before; the ones that acknowledged lose theirs."""
    async with bench(daemon("hub", (0.3, "ok")), daemon("b", REFUSED), outbox=path) as made:
        call = asyncio.create_task(made.bust(mode="all", write_ahead=True))
        await asyncio.sleep(0.05)
        assert [row[1] for row in await made.rows()] == ["hub", "b"]
        result = (await call).result
        assert result.status == "partial"
        assert [row[:3] for row in await made.rows()] == [("a", "b", RowState.PENDING)]


@virtual_time
async def test_a_cancelled_write_ahead_call_leaves_its_row_to_be_delivered(path: Path) -> None:
    """The lease is given back, so that it need not run out."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path) as made:
        call = asyncio.create_task(made.bust(write_ahead=True))
        await asyncio.sleep(0.5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert [row[:3] for row in await made.rows()] == [("a", ANY, RowState.PENDING)]


@virtual_time
async def test_a_full_outbox_fails_the_call_and_says_what_was_tried(path: Path) -> None:
    """OutboxError: nothing is dropped in silence."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path, rows=1) as made:
        await made.bust("first", timeout=0.5)
        with pytest.raises(OutboxError, match="full") as caught:
            await made.bust("second", timeout=0.5)
        assert caught.value.applied == "maybe"
        assert caught.value.target == "second"
        assert "second" not in str(caught.value)
        assert [cause.kind for cause in caught.value.causes] == [FaultKind.TIMED_OUT]


async def replayed(made: Bench, paused: frozenset[str] = frozenset()) -> tuple[OutboxRow, Replay]:
    """Lease the first row and send it again."""
    assert made.store is not None
    (row,) = await made.store.lease("courier", [one.url for one in made.daemons], 1)
    return row, await made.deliverer.replay(row, paused)


@virtual_time
async def test_a_row_for_anybody_goes_to_whoever_answers(path: Path) -> None:
    """The hub refuses our token: the peer takes it, and the hub is paused. It is the very key that was stored."""
    hub, peer = daemon("hub", REFUSED), daemon("peer", REFUSED)
    async with bench(hub, peer, outbox=path) as made:
        await made.bust(key="the-key")
        hub.script.append((0.0, FaultKind.TOKEN_REFUSED))
        hub.script.popleft()
        peer.script.append(OK)
        peer.script.popleft()
        made.keys.clear()
        _, replay = await replayed(made)
        assert replay.verdict == "delivered"
        assert replay.paused == {"hub"}
        assert {key for _, key in made.keys} == {"the-key"}


@virtual_time
async def test_an_owed_row_goes_to_its_daemon_alone(path: Path) -> None:
    """Never elsewhere, whoever else would answer."""
    b = daemon("b", REFUSED)
    async with bench(daemon("hub", OK), b, outbox=path) as made:
        await made.bust(mode="all")
        made.keys.clear()
        _, replay = await replayed(made)
        assert (replay.verdict, replay.sent) == ("later", False)
        assert {url for url, _ in made.keys} == {"b"}
        assert (await made.deliverer.replay(_, frozenset({"b"}))).verdict == "later"


@virtual_time
async def test_a_refused_row_is_known_as_such(path: Path) -> None:
    """422 by one is 422 by all: nobody else is asked."""
    hub, peer = daemon("hub", REFUSED), daemon("peer", REFUSED)
    async with bench(hub, peer, outbox=path) as made:
        await made.bust()
        hub.script.append((0.0, FaultKind.REJECTED))
        hub.script.popleft()
        made.keys.clear()
        _, replay = await replayed(made)
        assert replay.verdict == "refused"
        assert [url for url, _ in made.keys] == ["hub"]


@pytest.mark.parametrize(
    "odd", [{"kind": "planet"}, {"kind": "all"}, {"namespace": "-"}, {"settle": "soon"}, {"verify": 1}, {"target": ""}]
)
@virtual_time
async def test_a_row_of_another_version_is_refused_and_never_sent_as_something_else(
    odd: dict[str, Any], path: Path
) -> None:
    """What cannot be sent as it is meant: the row is set aside, with the reason, and no daemon is asked."""
    async with bench(daemon("hub", OK), outbox=path) as made:
        assert made.store is not None
        bust = replace(StoredBust(target="a", strategy="direct", fault_tolerance=6, key="k"), **odd)
        await made.store.put(bust, sent=False)
        _, replay = await replayed(made)
        assert replay.verdict == "refused"
        assert replay.causes[0].kind is FaultKind.REJECTED
        assert made.keys == []


# What is beyond the base: kinds, soft, dry runs, jobs and layers


UNSUPPORTED = (0.0, FaultKind.UNSUPPORTED)


@virtual_time
async def test_an_accepted_bust_is_kept_and_names_its_job(path: Path) -> None:
    """202: a daemon's journal has it. Stage 6 to 8, not ok, applied where it says so, and nothing in the outbox."""
    async with bench(daemon("hub", (0.01, "accepted")), outbox=path) as made:
        delivered = await made.bust()
        result = delivered.result
        assert (result.status, result.stage, result.ok, result.band) == ("accepted", 8, False, "warning")
        assert (result.job, result.daemon, result.applied) == ("j1", "hub", "yes")
        assert result.layers == (LayerResult(daemon="hub", name="redis", ok=True, removed=1),)
        assert result.note == "hub goes on with it as the job j1"
        assert await made.rows() == []
        assert made.fleet.counts["accepted"] == 1


@virtual_time
async def test_an_accepted_bust_without_layers_may_be_applied() -> None:
    """Nothing was told of where it is."""
    async with bench(daemon("hub", (0.01, "accepted-bare"))) as made:
        assert (await made.bust()).result.applied == "maybe"


@virtual_time
async def test_a_layer_that_failed_makes_it_partial_and_is_named() -> None:
    """The note says which, and why; it may be applied there later."""
    async with bench(daemon("hub", (0.01, "partial"))) as made:
        result = (await made.bust()).result
        assert (result.status, result.stage, result.applied, result.job) == ("partial", 8, "maybe", "j2")
        assert result.note == "hub goes on with it as the job j2; its layer cdn failed: it is down"
        assert [layer.ok for layer in result.layers] == [True, False]


@virtual_time
async def test_a_layer_that_waits_for_another_has_not_failed() -> None:
    """One that is done already is done again, and the note says so."""
    async with bench(daemon("hub", (0.01, "partial-waits"))) as made:
        result = (await made.bust()).result
        assert result.status == "partial"
        assert result.note == (
            "hub goes on with it as the job j2; its layer cdn failed: it is down; its layer pages is busted again once"
            " the layers inside of it are; its layer memory waits: it will be busted"
        )
        assert [(layer.ok, layer.waits) for layer in result.layers] == [(False, False), (True, True), (False, True)]


@pytest.mark.parametrize(("answer", "told"), [("accepted", "as the job j1"), ("partial", "its layer cdn failed")])
@virtual_time
async def test_what_is_not_applied_yet_raises_below_its_tolerance_and_says_what_to_do(answer: str, told: str) -> None:
    """Nobody was unavailable: the daemon has it, and goes on."""
    async with bench(daemon("hub", (0.01, answer))) as made:
        delivered = await made.bust(tolerance=3)
        error = failure("the bust", delivered.ending, (), 0.1, delivered.result)
        assert type(error) is BustFailed
        assert "the bust was acknowledged, but is not applied everywhere yet" in str(error)
        assert told in str(error)
        assert "client.job" in str(error)


@virtual_time
async def test_of_many_one_accepts_and_the_call_is_accepted() -> None:
    """Its journal has it: that daemon counts; the result is of the one whose answer was not the end of it."""
    async with bench(daemon("hub", OK), daemon("b", (0.01, "accepted"))) as made:
        delivered = await made.bust(mode="all")
        result = delivered.result
        assert (result.status, result.applied, result.daemon, result.job) == ("accepted", "yes", "b", "j1")
        assert [(one.status, one.job) for one in result.deliveries] == [("acknowledged", None), ("accepted", "j1")]
        assert 6 <= result.stage <= 8
        assert "applied at hub; accepted by b" in str(failure("it", "answered", (), 0.1, result))


@virtual_time
async def test_of_many_that_all_accept_none_is_said_to_have_applied_it() -> None:
    """The error's text tells the two apart."""
    async with bench(daemon("hub", (0.01, "accepted-bare")), daemon("b", (0.01, "accepted-bare"))) as made:
        result = (await made.bust(mode="all")).result
        assert (result.status, result.applied) == ("accepted", "maybe")
        assert "; accepted by hub, b:" in str(failure("it", "answered", (), 0.1, result))


@virtual_time
async def test_a_dry_run_tells_what_would_go() -> None:
    """A status of its own: nothing was busted, and all is well."""
    async with bench(daemon("hub", (0.01, "matched"))) as made:
        result = (await made.bust(dry_run=True)).result
        assert (result.status, result.ok, result.stage, result.applied) == ("dry_run", True, 12, "no")
        assert (result.matched, result.removed, result.dry_run) == (7, 0, True)


@pytest.mark.parametrize("how", [{}, {"mode": "all"}, {"write_ahead": True}])
@virtual_time
async def test_a_dry_run_is_never_stored(how: dict[str, Any], path: Path) -> None:
    """Its answer would come too late for anybody."""
    async with bench(daemon("hub", REFUSED), outbox=path) as made:
        result = (await made.bust(dry_run=True, tolerance=12, **how)).result
        assert (result.status, result.applied) == ("failed", "no")
        assert await made.rows() == []


@virtual_time
async def test_a_cancelled_dry_run_is_not_stored(path: Path) -> None:
    """Nor one that was to be written ahead."""
    async with bench(daemon("hub", (NEVER, "late")), outbox=path) as made:
        call = asyncio.create_task(made.bust(dry_run=True, write_ahead=True))
        await asyncio.sleep(0.5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await made.rows() == []


@virtual_time
async def test_counts_of_many_daemons_add_up() -> None:
    """What was told; verified only if each says so."""
    async with bench(daemon("hub", (0.01, "matched")), daemon("b", (0.01, "matched"))) as made:
        assert (await made.bust(dry_run=True, mode="all")).result.matched == 14
    for second, verified in (("verified", True), ("accepted", False)):
        async with bench(daemon("hub", (0.01, "verified")), daemon("b", (0.01, second))) as made:
            assert (await made.bust(verify=True, mode="all")).result.verified is verified
    async with bench(daemon("hub", OK)) as made:
        assert (await made.bust()).result.verified is None


@virtual_time
async def test_what_was_sent_wider_is_said() -> None:
    """In the note, and by the kind; what was asked is the caller's to remember."""
    async with bench(daemon("hub", (0.01, "everything"))) as made:
        result = (await made.bust("sale", kind="tag", soft=True, wider=True)).result
        assert (result.target, result.kind, result.soft, result.status) == ("sale", "all", False, "busted")
        assert result.note == "wider than asked: hub cannot do a soft bust by tag, and was sent a bust of everything"
        assert made.requests[0][1]


@virtual_time
async def test_a_failed_bust_tells_what_was_asked() -> None:
    """Kind, namespace and soft, as they were given."""
    async with bench(daemon("hub", REFUSED)) as made:
        result = (await made.bust(kind="prefix", namespace="n", soft=True, tolerance=12)).result
        assert (result.kind, result.namespace, result.soft, result.job) == ("prefix", "n", True, None)


@virtual_time
async def test_a_daemon_that_cannot_do_it_is_passed_by(path: Path) -> None:
    """The next one can: busted. The first is asked for the next bust as if nothing had been."""
    async with bench(daemon("hub", UNSUPPORTED, OK), daemon("peer", OK), outbox=path) as made:
        result = (await made.bust(kind="tag")).result
        assert (result.status, result.stage, result.daemon) == ("busted", 9, "peer")
        assert (await made.bust()).result.daemon == "hub"
        assert await made.rows() == []


@pytest.mark.parametrize("write_ahead", [False, True])
@virtual_time
async def test_what_no_daemon_can_do_is_not_stored(write_ahead: bool, path: Path) -> None:
    """No waiting mends that; the advice says what does."""
    async with bench(daemon("hub", UNSUPPORTED), daemon("b", UNSUPPORTED), outbox=path) as made:
        delivered = await made.bust(kind="tag", tolerance=12, write_ahead=write_ahead)
        assert (delivered.result.status, delivered.result.stage, delivered.result.applied) == ("failed", 3, "no")
        assert await made.rows() == []
        error = failure("it", delivered.ending, delivered.result.causes, 0.1, delivered.result)
        assert type(error) is IncompatibleDaemon
        assert "allow_wider=True" in str(error)


@virtual_time
async def test_what_a_daemon_that_is_down_may_be_able_to_do_is_stored(path: Path) -> None:
    """One cannot do it, the other cannot be asked."""
    async with bench(daemon("hub", UNSUPPORTED), daemon("b", REFUSED), outbox=path) as made:
        assert (await made.bust(kind="tag")).result.status == "deferred"


@pytest.mark.parametrize(("mode", "status", "owed"), [("all", "failed", []), ("quorum", "partial", ["c"])])
@virtual_time
async def test_many_of_which_one_cannot_do_it(mode: str, status: str, owed: list[str], path: Path) -> None:
    """All can never have it, and so nothing is promised; of a quorum the one that is down is owed, the other not."""
    async with bench(daemon("hub", OK), daemon("b", UNSUPPORTED), daemon("c", REFUSED), outbox=path) as made:
        result = (await made.bust(kind="tag", mode=mode)).result
        assert result.status == status
        assert [row[1] for row in await made.rows()] == owed
        assert [one.status for one in result.deliveries] == ["acknowledged", "missed", "owed" if owed else "missed"]


@virtual_time
async def test_a_quorum_owes_nothing_to_a_daemon_that_cannot_do_it(path: Path) -> None:
    """The call is well, and the row would be refused."""
    async with bench(daemon("hub", OK), daemon("b", OK), daemon("c", UNSUPPORTED), outbox=path) as made:
        result = (await made.bust(kind="tag", mode="quorum")).result
        assert (result.status, result.deliveries[2].status) == ("busted", "missed")
        assert await made.rows() == []


@virtual_time
async def test_a_row_is_sent_again_as_it_was_meant(path: Path) -> None:
    """With its kind, namespace, soft, verify, settle, reason, and whether wider will do."""
    asked: dict[str, Any] = {
        "kind": "prefix",
        "soft": True,
        "namespace": "n",
        "verify": True,
        "settle": 2.0,
        "reason": "why",
    }
    async with bench(daemon("hub", REFUSED), outbox=path) as made:
        await made.bust("a/b", wider=True, **asked)
        made.daemons[0].script[0] = (0.0, "verified")
        made.requests.clear()
        _, replay = await replayed(made)
        assert replay.verdict == "delivered"
        ((request, wider),) = made.requests
        assert {name: getattr(request, name) for name in asked} == asked
        assert wider


@virtual_time
async def test_everything_was_confirmed_when_it_was_stored(path: Path) -> None:
    """So that it can be sent again."""
    async with bench(daemon("hub", REFUSED), outbox=path) as made:
        await made.bust("*", kind="all", confirm=True)
        made.daemons[0].script[0] = OK
        _, replay = await replayed(made)
        assert replay.verdict == "delivered"
        assert made.requests[-1][0].confirm


@virtual_time
async def test_a_row_that_is_accepted_is_delivered(path: Path) -> None:
    """The daemon's journal has it: that is as good as our outbox."""
    async with bench(daemon("hub", REFUSED), outbox=path) as made:
        await made.bust()
        made.daemons[0].script[0] = (0.0, "partial")
        assert (await replayed(made))[1].verdict == "delivered"


@virtual_time
async def test_a_row_that_no_daemon_can_do_is_refused_and_pauses_none(path: Path) -> None:
    """The other rows go on; while one of them cannot be asked, it waits."""
    async with bench(daemon("hub", REFUSED), daemon("b", REFUSED), outbox=path) as made:
        await made.bust(kind="tag")
        made.daemons[0].script[0] = made.daemons[1].script[0] = UNSUPPORTED
        assert made.store is not None
        (row,) = await made.store.lease("test", ("hub", "b"), 10)
        assert (await made.deliverer.replay(row, frozenset({"b"}))).verdict == "later"
        replay = await made.deliverer.replay(row)
        assert (replay.verdict, replay.paused, replay.sent) == ("refused", frozenset(), False)
        made.daemons[1].script[0] = REFUSED
        assert (await made.deliverer.replay(row)).verdict == "later"


@virtual_time
async def test_a_dry_run_may_take_all_of_the_time() -> None:
    """Counting takes as long as it takes, and to begin it anew would not shorten it; a bust is tried again sooner."""
    for dry_run, attempts in ((True, 1), (False, Retry().attempts)):
        counting = daemon("hub", (9.0, "ok"))
        async with bench(counting) as made:
            await made.bust(timeout=10.0, dry_run=dry_run, tolerance=12)
            assert len(counting.asked) == attempts
