"""The dispatcher under virtual time: scripted daemons in, who was asked when and what came of it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio
import pytest

from pybustcall.dispatcher import LINGER, ORDER, Receipt, dispatch, dispatch_each, reap
from pybustcall.errors import ClientClosed
from pybustcall.faults import Fault, FaultKind
from pybustcall.fleet import Fleet, Policies
from pybustcall.policies import Breaker, Budget, Hedge, Latency, Retry
from tests.conftest import virtual_time
from tests.scripted import DEFAULTS, NEVER, Scripted, daemon, fleet_of


async def ask(one: Scripted, /, *, until: float, deadline: float, started: Callable[[], None]) -> str:
    """Make one attempt."""
    assert until <= deadline + 1e-9
    return await one.answer(until, started)


async def run(
    *daemons: Scripted, timeout: float = 5.0, chance: float = 0.0, fleet: Fleet | None = None
) -> tuple[Receipt[Scripted, str], float]:
    """Dispatch one call; tell the receipt and how long it took."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    receipt = await dispatch(
        ask,
        daemons,
        fleet or fleet_of(daemons, chance=chance),
        deadline=begun + timeout,
        retry=Retry(),
        random=lambda: chance,
    )
    assert all(one.under_way == 0 for one in daemons)
    return receipt, loop.time() - begun


async def known(daemons: tuple[Scripted, ...], seconds: float, policies: Policies = DEFAULTS) -> Fleet:
    """Make a fleet whose daemons have answered 200 calls each, after so many seconds."""
    fleet = fleet_of(daemons, policies)
    loop = asyncio.get_running_loop()
    for index in range(len(daemons)):
        for _ in range(200):
            fleet.called(loop.time())
            flight = fleet.board(index, loop.time())
            assert not isinstance(flight, Fault)
            fleet.sent(flight, loop.time() - seconds)
            fleet.answered(flight, loop.time())
    return fleet


@virtual_time
async def test_the_hub_answers() -> None:
    """One attempt, and nobody else is asked."""
    hub, peer = daemon("hub", (0.1, "done")), daemon("peer", (0.1, "done"))
    receipt, _ = await run(hub, peer)
    assert (receipt.ending, receipt.reply, receipt.daemon) == ("answered", "done", hub)
    assert [attempt.stage for attempt in receipt.attempts] == [12]
    assert peer.asked == []


@virtual_time
async def test_a_refused_connection_is_tried_again_with_backoff() -> None:
    """Refused twice, then answered: three attempts at the hub, the waits inside their ceilings."""
    hub = daemon("hub", (0, FaultKind.UNREACHABLE), (0, FaultKind.UNREACHABLE), (0.01, "done"))
    receipt, elapsed = await run(hub, chance=1.0)
    assert receipt.reply == "done"
    assert [attempt.stage for attempt in receipt.attempts] == [8, 7, 12]  # the second escalated by the first
    assert elapsed == pytest.approx(0.05 + 0.1 + 0.01, abs=0.01)


@virtual_time
async def test_a_hanging_hub_hands_over_within_the_attempt_time() -> None:
    """2 s for the hub, then the peer, which answers at once."""
    hub, peer = daemon("hub", (NEVER, "late")), daemon("peer", (0.01, "done"))
    receipt, elapsed = await run(hub, peer)
    assert receipt.daemon is peer
    assert elapsed == pytest.approx(2.01, abs=0.05)
    assert receipt.causes[0].kind is FaultKind.TIMED_OUT


@virtual_time
async def test_a_dead_hub_is_left_after_its_attempts() -> None:
    """Refused twice, then the peer: a lone caller is served within 0.1 s."""
    hub, peer = daemon("hub", (0, FaultKind.UNREACHABLE)), daemon("peer", (0.01, "done"))
    receipt, elapsed = await run(hub, peer, chance=1.0)
    assert receipt.daemon is peer
    assert len(hub.asked) == 2
    assert elapsed < 0.1


@virtual_time
async def test_when_all_hang_the_deadline_ends_the_call() -> None:
    """Three black holes: 5 s, not more, and every daemon had its chance."""
    daemons = [daemon(name, (NEVER, "late")) for name in ("hub", "b", "c")]
    receipt, elapsed = await run(*daemons)
    assert receipt.ending == "deadline"
    assert elapsed == pytest.approx(5.0, abs=0.02)
    assert all(one.asked for one in daemons)
    assert receipt.reply is None
    assert receipt.error is not None


@virtual_time
async def test_a_halting_fault_asks_nobody_else() -> None:
    """All would refuse what one refuses."""
    hub, peer = daemon("hub", (0, FaultKind.REJECTED)), daemon("peer", (0, "done"))
    receipt, _ = await run(hub, peer)
    assert receipt.ending == "halted"
    assert peer.asked == []


@virtual_time
async def test_the_attempts_tell_how_long_each_took() -> None:
    """Seconds, each attempt for itself."""
    receipt, _ = await run(daemon("hub", (0.3, FaultKind.MALFORMED)), daemon("peer", (0.2, "done")))
    assert [round(attempt.elapsed, 2) for attempt in receipt.attempts] == [0.3, 0.2]


@pytest.mark.parametrize("at", [0.0, 0.01, 1.0, 2.02, 3.5])
@virtual_time
async def test_cancellation_arrives_at_once_and_leaves_nothing_running(at: float) -> None:
    """Cancelled before the first attempt, in it, between two, and in the second daemon's."""
    hub = daemon("hub", (NEVER, "late"))
    peer = daemon("peer", (0, FaultKind.UNREACHABLE), (NEVER, "late"))
    call = asyncio.create_task(run(hub, peer, chance=1.0))
    await asyncio.sleep(at)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert hub.under_way == peer.under_way == 0
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_an_outer_timeout_is_the_callers_own() -> None:
    """asyncio.timeout around a call raises there, and is not taken for the daemon's."""
    hub = daemon("hub", (NEVER, "late"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await run(hub)
    assert hub.under_way == 0


@virtual_time
async def test_an_anyio_scope_cancels_a_call() -> None:
    """FastAPI's scopes deliver their cancellation, and only theirs."""
    hub = daemon("hub", (NEVER, "late"))
    with anyio.move_on_after(1.0) as scope:
        await run(hub)
    assert scope.cancelled_caught
    assert hub.under_way == 0


@virtual_time
async def test_an_unexpected_error_is_not_hidden() -> None:
    """Only AttemptFailed is a failed attempt; anything else is a defect and shows."""

    async def broken(one: Scripted, /, *, until: float, deadline: float, started: Callable[[], None]) -> str:
        raise ZeroDivisionError

    now = asyncio.get_running_loop().time()
    hub = daemon("hub", (0, "x"))
    with pytest.raises(ZeroDivisionError):
        await dispatch(broken, [hub], fleet_of((hub,)), deadline=now + 1, retry=Retry(), random=lambda: 0)


def test_the_order_of_the_policies_is_declared() -> None:
    """From the outside in; the tests below show each to lie around the next."""
    assert ORDER == ("deadline", "failover", "hedge", "breaker", "budget", "retry", "attempt")


@virtual_time
async def test_the_deadline_lies_around_failover() -> None:
    """It ends the call although a daemon is untried."""
    daemons = [daemon(name, (NEVER, "late")) for name in ("hub", "b", "c", "d", "e", "f")]
    receipt, elapsed = await run(*daemons, timeout=0.2)
    assert receipt.ending == "deadline"
    assert elapsed < 0.25
    assert not daemons[-1].asked


@virtual_time
async def test_failover_lies_around_the_hedge_and_the_hedge_around_the_breaker() -> None:
    """A hedge goes to the next in the order of failover whose breaker lets it through."""
    hub, b, c = daemon("hub", (0.3, "late")), daemon("b", (0.01, "b")), daemon("c", (0.01, "c"))
    fleet = await known((hub, b, c), 0.1)
    assert (await run(hub, b, c, fleet=fleet))[0].daemon is b
    fleet._daemons[1].circuit.quarantine("for this test")
    assert (await run(hub, b, c, fleet=fleet))[0].daemon is c


@virtual_time
async def test_the_breaker_lies_around_the_budget() -> None:
    """A retry that an open breaker refuses costs nothing."""
    hub = daemon("hub", (0, FaultKind.UNREACHABLE))
    fleet = fleet_of((hub,), Policies(breaker=Breaker(incidents=1), budget=Budget(reserve=5, per_second=0)))
    before = fleet.view(0).budget
    receipt, _ = await run(hub, fleet=fleet)
    assert len(hub.asked) <= 2  # one call a second passes
    assert [attempt.error.kind for attempt in receipt.attempts if attempt.error][-1] is FaultKind.BREAKER_OPEN
    spent = fleet.counts["retries"]
    assert fleet.view(0).budget == pytest.approx(before - spent / 5, abs=0.03)
    await run(hub, fleet=fleet)
    assert fleet.counts["retries"] == spent


@virtual_time
async def test_the_budget_lies_around_the_retry_and_the_retry_around_the_attempt() -> None:
    """Without budget there is one attempt; with it each attempt has its own 2 seconds."""
    hub = daemon("hub", (NEVER, "late"))
    receipt, elapsed = await run(hub, fleet=fleet_of((hub,), Policies(budget=Budget(reserve=0, per_second=0))))
    assert (len(hub.asked), receipt.budget_spent) == (1, True)
    assert elapsed == pytest.approx(2.0, abs=0.05)
    other = daemon("hub", (NEVER, "late"))
    receipt, elapsed = await run(other, fleet=fleet_of((other,), Policies()))
    assert len(other.asked) == 3
    assert elapsed == pytest.approx(5.0, abs=0.05)


@virtual_time
async def test_the_bare_call_is_the_identity() -> None:
    """With every policy off, a call is one attempt at its daemon, under its deadline."""
    hub = daemon("hub", (0, FaultKind.UNREACHABLE), (0, "never asked"))
    loop = asyncio.get_running_loop()
    receipt = await dispatch(
        ask, (hub,), fleet_of((hub,), Policies()), deadline=loop.time() + 5, retry=None, random=lambda: 0
    )
    assert (receipt.ending, len(hub.asked)) == ("exhausted", 1)


@virtual_time
async def test_a_slow_answer_is_hedged_at_the_live_quantile() -> None:
    """The hub takes longer than its usual 0.1 s: the peer is asked then, and its answer is the first."""
    hub, peer = daemon("hub", (0.3, "late")), daemon("peer", (0.05, "done"))
    fleet = await known((hub, peer), 0.1)
    receipt, elapsed = await run(hub, peer, fleet=fleet)
    assert receipt.daemon is peer
    assert elapsed == pytest.approx(0.15, abs=0.01)
    assert [attempt.error.kind if attempt.error else None for attempt in receipt.attempts] == [FaultKind.SLOW, None]
    assert fleet.counts["hedges"] == 1


@virtual_time
async def test_the_first_answer_wins_although_it_was_hedged() -> None:
    """The hub answers while the hedge is under way: its answer is taken, and the hedge was in vain."""
    hub, peer = daemon("hub", (0.12, "done")), daemon("peer", (0.3, "late"))
    receipt, elapsed = await run(hub, peer, fleet=await known((hub, peer), 0.1))
    assert receipt.daemon is hub
    assert elapsed == pytest.approx(0.12, abs=0.01)


@virtual_time
async def test_hedges_are_at_most_one_in_twenty_calls() -> None:
    """Every call is slow; of 1,000 calls one in twenty is hedged, and no more than the budget bears."""
    hub, peer = daemon("hub", (0.13, "done")), daemon("peer", (1.0, "late"))
    fleet = await known((hub, peer), 0.1, Policies(hedge=Hedge(overdue=100), budget=Budget()))
    fleet._daemons[0].latency = Latency(0.95, 100)
    for _ in range(100):
        fleet._daemons[0].latency.add(0.1)
    for _ in range(1000):
        await run(hub, peer, fleet=fleet)
    assert 0 < len(peer.asked) <= 0.055 * 1400


@virtual_time
async def test_an_overdue_daemon_is_left_and_avoided() -> None:
    """50 calls wait for a hub that fell silent: the peer serves all after 4 times the usual, and later ones at once."""
    hub, peer = daemon("hub", (NEVER, "late")), daemon("peer", (0.01, "done"))
    fleet = await known((hub, peer), 0.02)
    results = await asyncio.gather(*(run_alone(hub, peer, fleet=fleet) for _ in range(50)))
    assert all(receipt.daemon is peer for receipt, _ in results)
    assert max(elapsed for _, elapsed in results) == pytest.approx(0.09, abs=0.01)
    asked = len(hub.asked)
    receipt, elapsed = await run_alone(hub, peer, fleet=fleet)
    assert receipt.daemon is peer
    assert elapsed == pytest.approx(0.01, abs=0.005)
    assert len(hub.asked) == asked


async def run_alone(*daemons: Scripted, fleet: Fleet) -> tuple[Receipt[Scripted, str], float]:
    """Dispatch one of many calls at once."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    receipt = await dispatch(
        ask, daemons, fleet, deadline=begun + 5, retry=Retry(), random=lambda: 0.5, adopt=Linger().adopt
    )
    return receipt, loop.time() - begun


class Linger:
    """Owns losers as a session does."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[object]] = []

    def adopt(self, task: asyncio.Task[object], linger: float) -> None:
        """Cancel it after a while."""
        self.tasks.append(task)
        timer = task.get_loop().call_later(linger, task.cancel)
        task.add_done_callback(lambda _: timer.cancel())


@virtual_time
async def test_a_loser_lingers_and_teaches_how_long_its_daemon_took() -> None:
    """It finishes within its quarter of a second, and its flight is over."""
    hub, peer = daemon("hub", (0.2, "late")), daemon("peer", (0.01, "done"))
    fleet = await known((hub, peer), 0.1)
    owner = Linger()
    loop = asyncio.get_running_loop()
    receipt = await dispatch(
        ask, (hub, peer), fleet, deadline=loop.time() + 5, retry=Retry(), random=lambda: 0, adopt=owner.adopt
    )
    assert receipt.daemon is peer
    assert fleet.view(loop.time()).daemons[0].in_flight == 1
    assert await asyncio.wait_for(asyncio.gather(*owner.tasks), 1) == ["late"]
    assert fleet.view(loop.time()).daemons[0].in_flight == 0


@virtual_time
async def test_a_loser_that_never_answers_is_cut_and_counts_as_an_incident() -> None:
    """A daemon that swallows requests shows, although each is given up before its timeout."""
    hub, peer = daemon("hub", (NEVER, "late")), daemon("peer", (0.01, "done"))
    fleet = await known((hub, peer), 0.02)
    owner = Linger()
    loop = asyncio.get_running_loop()
    await dispatch(
        ask, (hub, peer), fleet, deadline=loop.time() + 5, retry=Retry(), random=lambda: 0, adopt=owner.adopt
    )
    await asyncio.wait(owner.tasks)
    assert owner.tasks[0].cancelled()
    assert fleet.counts["incidents"] == 1
    assert loop.time() <= LINGER + 0.2


@virtual_time
async def test_a_call_that_waits_for_a_slot_leaves_a_silent_daemon() -> None:
    """Its attempt was never sent: it is withdrawn, and the peer is asked instead."""
    hub, peer = daemon("hub", (NEVER, "late")), daemon("peer", (0.01, "done"))
    fleet = await known((hub, peer), 0.02, Policies(hedge=Hedge(share=0.001)))
    slots = {"hub": asyncio.Semaphore(1), "peer": asyncio.Semaphore(10)}

    async def gated(one: Scripted, /, *, until: float, deadline: float, started: Callable[[], None]) -> str:
        async with slots[one.url]:
            return await ask(one, until=until, deadline=deadline, started=started)

    loop = asyncio.get_running_loop()
    calls = [
        dispatch(gated, (hub, peer), fleet, deadline=loop.time() + 5, retry=Retry(), random=lambda: 0) for _ in range(5)
    ]
    receipts = await asyncio.gather(*calls)
    assert [receipt.daemon for receipt in receipts] == [peer] * 5
    assert len(hub.asked) == 1
    assert [receipt.causes[0].kind for receipt in receipts] == [FaultKind.SLOW] + 4 * [FaultKind.NO_SLOT]
    assert not slots["hub"].locked()
    assert loop.time() == pytest.approx(0.09, abs=0.02)


@virtual_time
async def test_a_halted_call_cancels_its_siblings() -> None:
    """The hedge meets a false certificate: nothing goes on, and what was sent may have been applied."""
    hub, peer = daemon("hub", (1.0, "late")), daemon("peer", (0.01, FaultKind.CERTIFICATE))
    receipt, elapsed = await run(hub, peer, fleet=await known((hub, peer), 0.1))
    assert receipt.ending == "halted"
    assert elapsed == pytest.approx(0.11, abs=0.01)
    assert {attempt.error.kind for attempt in receipt.attempts if attempt.error} == {
        FaultKind.CERTIFICATE,
        FaultKind.SLOW,
    }
    assert any(cause.applied == "maybe" for cause in receipt.causes)


@virtual_time
async def test_a_client_closed_under_a_call_tells_what_was_tried() -> None:
    """The hub failed, then the client was closed: the error says both."""
    hub, peer = daemon("hub", (0, FaultKind.MALFORMED)), daemon("peer", (0, "x"))

    async def closing(one: Scripted, /, *, until: float, deadline: float, started: Callable[[], None]) -> str:
        if one is peer:
            raise ClientClosed("closed")
        return await ask(one, until=until, deadline=deadline, started=started)

    now = asyncio.get_running_loop().time()
    with pytest.raises(ClientClosed) as caught:
        await dispatch(closing, (hub, peer), fleet_of((hub, peer)), deadline=now + 5, retry=Retry(), random=lambda: 0)
    assert [cause.kind for cause in caught.value.causes] == [FaultKind.MALFORMED]


async def each(*daemons: Scripted, needed: int) -> tuple[list[Receipt[Scripted, str]], float]:
    """Dispatch one call to every daemon."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    receipts = await dispatch_each(
        ask, daemons, fleet_of(daemons), needed=needed, deadline=begun + 5, retry=Retry(), random=lambda: 0.5
    )
    assert all(one.under_way == 0 for one in daemons)
    return receipts, loop.time() - begun


@virtual_time
async def test_every_daemon_is_asked_at_once() -> None:
    """All acknowledge; it takes as long as the slowest."""
    receipts, elapsed = await each(
        daemon("hub", (0.1, "a")), daemon("b", (0.3, "b")), daemon("c", (0.2, "c")), needed=3
    )
    assert [receipt.reply for receipt in receipts] == ["a", "b", "c"]
    assert elapsed == pytest.approx(0.3, abs=0.01)


@virtual_time
async def test_with_a_quorum_the_others_have_a_moment_more() -> None:
    """Two of three are enough; the third is waited for 0.25 s, and then overtaken."""
    receipts, elapsed = await each(
        daemon("hub", (0.1, "a")), daemon("b", (0.1, "b")), daemon("c", (NEVER, "c")), needed=2
    )
    assert [receipt.ending for receipt in receipts] == ["answered", "answered", "overtaken"]
    assert elapsed == pytest.approx(0.1 + LINGER, abs=0.01)
    assert receipts[2].causes[0].applied == "maybe"


@virtual_time
async def test_a_fault_that_halts_halts_its_own_leg() -> None:
    """A false certificate at one, a refusal at another: the third is asked nevertheless."""
    receipts, _ = await each(
        daemon("hub", (0, FaultKind.CERTIFICATE)),
        daemon("b", (0, FaultKind.REJECTED)),
        daemon("c", (0.1, "c")),
        needed=3,
    )
    assert [receipt.ending for receipt in receipts] == ["halted", "halted", "answered"]


@virtual_time
async def test_cancelling_a_delivery_to_all_leaves_no_leg_behind() -> None:
    """Each leg is waited for."""
    daemons = [daemon(name, (NEVER, "late")) for name in ("hub", "b", "c")]
    call = asyncio.create_task(each(*daemons, needed=3))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert all(one.under_way == 0 for one in daemons)
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_reaping_goes_on_however_often_it_is_cancelled() -> None:
    """The stubborn task ends before the reaper does, and then the cancellation arrives."""
    ended = False

    async def stubborn() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(NEVER)
        finally:
            await asyncio.sleep(0.5)
            ended = True

    victim = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    reaper = asyncio.create_task(reap([victim]))
    for _ in range(3):
        await asyncio.sleep(0.1)
        reaper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reaper
    assert ended


@virtual_time
async def test_an_acknowledgement_that_took_far_too_long_is_stage_ten() -> None:
    """Nobody else could be asked; it is clean but for that, and a probe of the daemon is scheduled."""
    hub = daemon("hub", (0.5, "done"))
    receipt, _ = await run(hub, fleet=await known((hub,), 0.1))
    assert receipt.daemon is hub
    assert [(attempt.stage, attempt.error.kind) for attempt in receipt.attempts if attempt.error] == [
        (10, FaultKind.SLOW)
    ]
    assert receipt.causes[0].applied == "yes"


@virtual_time
async def test_a_lone_daemon_is_asked_once_a_second_in_every_mode() -> None:
    """Its breaker is open for a minute; it is back; a delivery to all finds out as soon as any other call."""
    hub = daemon("hub", (0, FaultKind.UNREACHABLE), (0.01, "done"))
    fleet = fleet_of((hub,), Policies(breaker=Breaker(incidents=1, open=60.0)))
    loop = asyncio.get_running_loop()

    async def to_all() -> Receipt[Scripted, str]:
        receipts = await dispatch_each(
            ask, (hub,), fleet, needed=1, deadline=loop.time() + 5, retry=None, random=lambda: 0
        )
        return receipts[0]

    assert (await to_all()).reply is None
    assert (await to_all()).reply == "done"


@virtual_time
async def test_silence_is_not_waited_for_where_the_bust_is_stored() -> None:
    """Half a second, and the receipt says why; what was sent lingers, and may still arrive."""
    hub = daemon("hub", (NEVER, "late"))
    fleet = await known((hub,), 0.01)
    owner = Linger()
    loop = asyncio.get_running_loop()
    receipt = await dispatch(
        ask,
        (hub,),
        fleet,
        deadline=loop.time() + 5,
        retry=Retry(),
        random=lambda: 0,
        adopt=owner.adopt,
        storable=True,
    )
    assert receipt.ending == "silent"
    assert loop.time() == pytest.approx(0.5, abs=0.02)
    assert "silent" in receipt.causes[0].message
    assert receipt.causes[0].applied == "maybe"
    assert len(owner.tasks) == 1
    await asyncio.wait(owner.tasks)
    again = await dispatch(
        ask, (hub,), fleet, deadline=loop.time() + 5, retry=None, random=lambda: 0, adopt=owner.adopt, storable=True
    )
    third = await dispatch(
        ask, (hub,), fleet, deadline=loop.time() + 5, retry=None, random=lambda: 0, adopt=owner.adopt, storable=True
    )
    assert [again.causes[0].kind, third.causes[0].kind] == [FaultKind.TIMED_OUT, FaultKind.BREAKER_OPEN]
    for task in owner.tasks:
        task.cancel()
    await asyncio.wait(owner.tasks)
