"""The fleet: what is known of the daemons, walked event by event, and whole outages over many calls."""

from __future__ import annotations

import random as chance
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.faults import TABLE, Band, Fault, FaultKind
from pybustcall.fleet import Flight, Policies
from pybustcall.policies import Breaker, BreakerState
from pybustcall.telemetry import BreakerMoved, FailedBack, FailedOver, FaultMet, Hedged
from pybustcall.topology import Route
from tests.test_plan import (
    EVERYTHING,
    HANG,
    REFUSE,
    UNPROBED,
    Reply,
    World,
    answer,
    fail,
    fault,
    fleet_of,
    trip,
    warm,
)


def half() -> float:
    """Stand in for a random number."""
    return 0.5


def seeded(seed: int) -> Callable[[], float]:
    """Make random numbers that a seed repeats."""
    return chance.Random(seed).random


def down_while(begin: float, end: float, daemon: int = 0, how: Reply = REFUSE) -> Callable[[int, float], Reply]:
    """Script daemons of which one is out of order for a time."""
    return lambda index, now: how if index == daemon and begin <= now < end else Reply()


# What is known of a daemon


def test_a_fleet_begins_well() -> None:
    """Nothing is known, so nothing speaks against anybody."""
    fleet = fleet_of(3, EVERYTHING, half)
    assert len(fleet) == 3
    view = fleet.view(0.0)
    assert (view.route, view.hub_share, view.budget) == ("star", 1.0, 1.0)
    assert view.order == ("http://d0", "http://d1", "http://d2")
    assert [daemon.role for daemon in view.daemons] == ["hub", "peer", "peer"]
    assert all(daemon.breaker == "closed" and not daemon.reason for daemon in view.daemons)
    assert not any(daemon.suspect or daemon.overdue or daemon.down or daemon.in_flight for daemon in view.daemons)
    assert all(fleet.well(index, 0.0) and not fleet.down(index, 0.0) for index in range(3))


def test_fifty_concurrent_failures_are_one_incident() -> None:
    """The breaker stays closed, each fault counts as the first, and one incident is counted."""
    fleet = fleet_of(2)
    flights = [fleet.board(0, 1.0) for _ in range(50)]
    for flight in flights:
        assert isinstance(flight, Flight)
        fleet.sent(flight, 1.0)
    assert fleet.view(1.0).daemons[0].in_flight == 50
    stages = {fleet.failed(one, fault(FaultKind.DISCONNECTED), 1.1).stage for one in flights if isinstance(one, Flight)}
    view = fleet.view(1.1).daemons[0]
    assert stages == {8}
    assert (view.incidents, view.breaker, view.in_flight, fleet.counts["incidents"]) == (1, "closed", 0, 1)


@pytest.mark.parametrize("kind", [kind for kind, row in TABLE.items() if not row.incident])
def test_what_says_nothing_of_a_daemons_health_never_ejects_it(kind: FaultKind) -> None:
    """A hundred times 429, 422, no slot or incompatible: never suspect, never escalated, never refused."""
    fleet = fleet_of(2)
    for number in range(100):
        met = fail(fleet, 0, kind, float(number))
        assert met.stage == TABLE[kind].stage
    view = fleet.view(100.0)
    assert (view.daemons[0].breaker, view.daemons[0].incidents, view.daemons[0].suspect) == ("closed", 0, False)
    assert view.order[0] == "http://d0"


@pytest.mark.requirement("IMP-03")
def test_a_daemon_that_keeps_refusing_escalates_through_all_bands_into_quarantine() -> None:
    """8, 7, 6 WARNING; 5, 4, 3 EXCEPTION, its breaker opens at the fifth; 2 PANIC: quarantined, the peer serves."""
    world = World(lambda *_: Reply(), policies=EVERYTHING)
    fleet = world.fleet
    met = [fail(fleet, 0, FaultKind.UNREACHABLE, number * 2.0) for number in range(9)]
    assert [one.stage for one in met] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [one.band for one in met[:7:3]] == [Band.WARNING, Band.EXCEPTION, Band.PANIC]
    assert [one.stage_for_call for one in met[5:]] == [3, 3, 3, 3]
    moves = [(event.old, event.new) for _, event in world.told(BreakerMoved) if isinstance(event, BreakerMoved)]
    assert moves[0] == ("closed", "open")
    assert moves[-1][1] == "quarantined"
    play = world.call(20.0)
    world.run()
    assert (play.order, play.ending) == ([1], "answered")


@pytest.mark.requirement("IMP-03")
def test_a_quarantine_ends_with_three_good_probes_and_trials_decide_the_rest() -> None:
    """Time does not end it, nor two probes and a miss; after three in a row it is half-open."""
    fleet = fleet_of(2, EVERYTHING, half)
    fail(fleet, 0, FaultKind.CERTIFICATE, 1.0)
    assert fleet.view(1.0).daemons[0].reason == "it failed: certificate"
    for number, found in enumerate([None, None, fault(FaultKind.UNREACHABLE), None, None]):
        fleet.probed(0, found, 2.0 + number)
    assert fleet.view(7.0).daemons[0].breaker == "quarantined"
    fleet.probed(0, None, 8.0)
    assert fleet.view(8.0).daemons[0].breaker == "half-open"
    for _ in range(3):
        answer(fleet, 0, 9.0)
    assert fleet.view(9.0).daemons[0].breaker == "closed"


@pytest.mark.requirement("IMP-03")
@pytest.mark.parametrize("escalated", [False, True])
def test_a_certificate_that_fails_halts_the_daemon_even_as_the_last_candidate(escalated: bool) -> None:
    """Never plaintext, never in spite of it; also where the daemon was in quarantine for refusing before."""
    fleet = fleet_of(1, EVERYTHING, half)
    if escalated:
        for number in range(7):
            fail(fleet, 0, FaultKind.UNREACHABLE, number / 1000 if number < 5 else number * 1.0)
        assert isinstance(fleet.board(0, 10.0, last=True), Flight)
    fail(fleet, 0, FaultKind.CERTIFICATE, 20.0)
    for number in range(10):
        refused = fleet.board(0, 30.0 + number, last=True)
        assert isinstance(refused, Fault)
        assert refused.kind is FaultKind.BREAKER_OPEN
        assert "quarantine until 3 good probes or client.reset() (it failed: certificate)" in refused.message
    fleet.reset()
    assert isinstance(fleet.board(0, 50.0), Flight)


def test_a_daemon_that_nothing_probes_is_not_quarantined_for_failing_often() -> None:
    """One daemon, no probes, an outage of a minute: nothing would end the quarantine, so the breaker alone decides."""
    world = World(down_while(0.0, 60.0), 1)
    world.calls(0.0, 90.0, 5.0)
    world.run()
    assert {event.new for _, event in world.told(BreakerMoved) if isinstance(event, BreakerMoved)} == {
        "open",
        "half-open",
        "closed",
    }
    late = [play for play in world.plays if play.begun >= 75.0]
    assert all(play.ending == "answered" for play in late)


def test_the_last_candidate_passes_once_a_second() -> None:
    """Ten calls a second for ten seconds at an open breaker: about one a second goes through."""
    world = World(lambda *_: REFUSE, 1, retry=None, policies=replace(UNPROBED, breaker=Breaker(open=60.0)))
    trip(world.fleet, 0, 0.0)
    plays = world.calls(1.0, 11.0, 10.0)
    world.run()
    sends = [play.begun for play in plays if play.sends]
    assert 9 <= len(sends) <= 11
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(sends))
    assert all(play.ending == "exhausted" for play in plays)


def test_a_suspect_that_nothing_probes_is_tried_by_one_call_a_second() -> None:
    """Fifty calls at the same moment: one tries the hub, the others ask the peer."""
    fleet = fleet_of(2)
    fail(fleet, 0, FaultKind.DISCONNECTED, 1.0)
    assert fleet.order(1.5) == [1, 0]
    asked = []
    for _ in range(50):
        asked.append(fleet.order(2.5)[0])
        assert isinstance(fleet.board(asked[-1], 2.5), Flight)  # none is sent yet: each waits for its turn of the loop
    assert Counter(asked) == {0: 1, 1: 49}


def test_what_is_passed_over_says_why() -> None:
    """A fault for each state, told to the hooks."""
    told: list[object] = []
    fleet = fleet_of(2, EVERYTHING, half, emit=told.append)
    for number in range(3):
        fleet.probed(1, fault(FaultKind.UNREACHABLE), number)
    assert "it missed 3 probes in a row" in fleet.passed_over(1).message
    trip(fleet, 0, 1.0)
    assert "its breaker is open" in fleet.passed_over(0).message
    fleet.probed(0, None, 20.0)
    trial = fleet.board(0, 20.0)
    assert isinstance(trial, Flight)
    assert trial.trial
    assert "another call is trying it" in fleet.passed_over(0).message
    assert sum(isinstance(one, FaultMet) and one.fault.kind is FaultKind.BREAKER_OPEN for one in told) == 3


def test_an_overdue_daemon_is_avoided_and_any_answer_ends_that() -> None:
    """The oldest request of several has no answer for four times the usual; an answer to any of them is enough."""
    fleet = fleet_of(2)
    warm(fleet)
    flights = [fleet.board(0, 1.0) for _ in range(3)]
    for flight in flights:
        assert isinstance(flight, Flight)
        fleet.sent(flight, 1.0)
    assert fleet.order(1.079) == [0, 1]
    assert fleet.order(1.081) == [1, 0]
    assert fleet.view(1.081).daemons[0].overdue
    last, middle, first = flights[2], flights[1], flights[0]
    assert isinstance(last, Flight)
    assert isinstance(middle, Flight)
    assert isinstance(first, Flight)
    fleet.answered(last, 1.09)
    assert fleet.order(1.09) == [0, 1]
    assert fleet.order(1.18) == [1, 0]
    fleet.failed(middle, fault(FaultKind.REJECTED), 1.19)
    assert fleet.order(1.19) == [0, 1]
    assert fleet.patience(0) == pytest.approx(0.08)
    fleet.dropped(first, 1.2)
    assert fleet.counts["incidents"] == 0, "it answered others meanwhile"


def test_a_loser_whose_daemon_was_silent_all_the_time_is_an_incident() -> None:
    """What is cut before its timeout must not hide a daemon that swallows every request."""
    told: list[object] = []
    fleet = fleet_of(2, emit=told.append)
    warm(fleet)
    flight = fleet.board(0, 1.0)
    assert isinstance(flight, Flight)
    fleet.sent(flight, 1.0)
    fleet.dropped(flight, 1.1)
    assert fleet.view(1.1).daemons[0].incidents == 1
    assert isinstance(told[-1], FaultMet)
    assert told[-1].fault.kind is FaultKind.TIMED_OUT


def test_without_a_hedge_policy_nothing_is_overdue_nor_hedged() -> None:
    """hedge=None: silence is judged by timeouts alone."""
    fleet = fleet_of(2, Policies())
    for _ in range(200):
        answer(fleet, 0, 0.0, 0.01)
    flight = fleet.board(0, 1.0)
    assert isinstance(flight, Flight)
    fleet.sent(flight, 1.0)
    assert fleet.hedge_at(flight) == fleet.overdue_at(flight) == float("inf")
    assert fleet.order(100.0) == [0, 1]
    assert not fleet.spend_hedge(flight, 100.0)


def test_a_hedge_is_told() -> None:
    """Who was slow, who helps, and for how long it was waited."""
    told: list[object] = []
    fleet = fleet_of(2, emit=told.append)
    fleet.told_hedge(Flight(0, 1.0, trial=False, sent=True), 1, 1.5, overdue=False)
    assert told == [Hedged(daemon="http://d1", slow="http://d0", waited=0.5, overdue=False)]


# Probes


def test_probes_come_at_their_intervals_and_spread() -> None:
    """The hub every 5 s, peers every 30, both +-20 %, and all of that range is used."""
    world = World(lambda *_: Reply(None, 0.0), 2, policies=EVERYTHING, random=seeded(1))
    world.run(3000.0)
    for index, usual in ((0, 5.0), (1, 30.0)):
        times = [time for time, probed in world.probes if probed == index]
        pauses = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
        assert 0.8 * usual <= min(pauses) < 0.85 * usual
        assert 1.15 * usual < max(pauses) <= 1.2 * usual


def test_a_suspect_is_probed_every_second_until_it_answers() -> None:
    """A fault brings the probe forward, and wakes the prober; one that is under way is not doubled."""
    woken: list[int] = []
    fleet = fleet_of(2, EVERYTHING, half, wake=lambda: woken.append(1))
    assert fleet.next_probe() == 5.0
    assert fleet.take_probes(4.9) == []
    fail(fleet, 0, FaultKind.DISCONNECTED, 1.0)
    assert (fleet.next_probe(), len(woken)) == (2.0, 1)
    fail(fleet, 0, FaultKind.DISCONNECTED, 1.5)
    assert (fleet.next_probe(), len(woken)) == (2.0, 1), "not later than it was due"
    assert fleet.take_probes(2.0) == [0]
    assert fleet.next_probe() == 30.0
    fail(fleet, 0, FaultKind.DISCONNECTED, 2.1)
    assert fleet.next_probe() == 30.0
    fleet.probed(0, fault(FaultKind.UNREACHABLE), 2.2)
    assert fleet.next_probe() == pytest.approx(3.2)
    assert fleet.order(2.2) == [1, 0]
    fleet.probed(0, None, 3.2)
    assert fleet.next_probe() == pytest.approx(8.2)
    assert fleet.order(3.2) == [0, 1]


@pytest.mark.requirement("INT-03")
def test_three_misses_are_down_and_the_calls_leave_the_hub() -> None:
    """Two are not; a daemon that refuses our token is there, and one that is too busy says nothing of its health."""
    told: list[object] = []
    fleet = fleet_of(2, EVERYTHING, half, emit=told.append)
    throttled = Fault(FaultKind.THROTTLED, "http://d0", "busy", "no", status=429)
    for found in (FaultKind.UNREACHABLE, FaultKind.TIMED_OUT):
        fleet.probed(0, fault(found), 1.0)
    fleet.probed(0, throttled, 1.0)
    fleet.probed(0, fault(FaultKind.NO_SLOT), 1.0)
    assert not fleet.down(0, 1.0)
    assert fleet.view(1.0).route == Route.STAR
    fleet.probed(0, Fault(FaultKind.THROTTLED, "http://d0", "stopping", "no", status=503), 1.0)
    assert fleet.down(0, 1.0)
    view = fleet.view(1.0)
    assert (view.route, view.hub_share, view.order[0]) == (Route.RING, 0.0, "http://d1")
    assert [one.reason for one in told if isinstance(one, FailedOver)] == ["3 probes missed: stopping"]
    fleet.probed(0, fault(FaultKind.TOKEN_REFUSED), 2.0)
    assert not fleet.down(0, 2.0)
    assert fleet.counts["probes_missed"] == 3
    assert fleet.view(2.0).daemons[0].breaker == "closed", "missed probes never count against busts"


def test_a_breaker_that_busts_opened_is_not_closed_by_a_probe() -> None:
    """Good probes let trials begin, three of which close it; before its time they do nothing."""
    fleet = fleet_of(2, EVERYTHING, half)
    trip(fleet, 0, 0.0)
    for number in range(3):
        fleet.probed(0, None, 1.0 + number)
    assert fleet.view(3.0).daemons[0].breaker == "open"
    for number in range(10):
        fleet.probed(0, None, 4.0 + number)
    assert fleet.view(14.0).daemons[0].breaker == "half-open"
    for number in range(3):
        assert fleet.view(14.0).daemons[0].breaker == "half-open"
        answer(fleet, 0, 14.0 + number)
    assert fleet.view(17.0).daemons[0].breaker == "closed"


def test_a_breaker_whose_daemon_misses_its_probes_stays_open() -> None:
    """No call is spent on it, however long ago it opened."""
    fleet = fleet_of(2, EVERYTHING, half)
    trip(fleet, 0, 0.0)
    assert isinstance(fleet.board(0, 100.0), Fault)
    fleet.probed(0, None, 101.0)
    assert isinstance(fleet.board(0, 101.0), Flight)


def test_without_probes_there_is_never_one() -> None:
    """probes=None."""
    fleet = fleet_of(2, Policies())
    fail(fleet, 0, FaultKind.DISCONNECTED, 1.0)
    assert fleet.next_probe() == float("inf")
    assert fleet.take_probes(1e9) == []
    fleet.probed(0, None, 2.0)
    assert fleet.next_probe() == float("inf")


def test_reset_forgets_every_fault() -> None:
    """Breakers closed, quarantines ended, the hub first again."""
    fleet = fleet_of(2, EVERYTHING, half)
    trip(fleet, 0, 0.0)
    fail(fleet, 1, FaultKind.CERTIFICATE, 0.0)
    assert fleet.view(1.0).route == Route.RING
    fleet.reset()
    view = fleet.view(1.0)
    assert (view.route, view.order) == (Route.STAR, ("http://d0", "http://d1"))
    assert all(one.breaker == "closed" and not one.suspect and not one.incidents for one in view.daemons)


# Whole outages


def in_order(world: World) -> bool:
    """Tell whether nothing is left in flight, and no trial forgotten."""
    view = world.fleet.view(world.now)
    return not any(one.in_flight for one in view.daemons) and not any(
        known.circuit._trials for known in world.fleet._daemons
    )


@pytest.mark.requirement("INT-03")
@pytest.mark.requirement("IMP-04")
@pytest.mark.requirement("RES-03")
@pytest.mark.parametrize("how", [REFUSE, HANG, Reply(FaultKind.SERVER_ERROR)])
def test_the_hub_goes_down_and_comes_back(how: Reply) -> None:
    """No call fails; calls leave the hub once, at once; when it is well again, all return to it, late."""
    world = World(down_while(10.0, 40.0, how=how), 3, policies=EVERYTHING, random=seeded(2))
    world.calls(0.0, 240.0, 20.0)
    world.run(260.0)
    assert all(play.ending == "answered" for play in world.plays)
    (left, over), *more = world.told(FailedOver)
    assert isinstance(over, FailedOver)
    assert (over.daemon, over.hub, more) == ("http://d1", "http://d0", [])
    assert 10.0 <= left < 25.0
    returned = [(time, event.share) for time, event in world.told(FailedBack) if isinstance(event, FailedBack)]
    assert [share for _, share in returned] == [0.05, 1.0]
    assert returned[0][0] > 70.0
    asked = [play.order[0] for play in world.plays if play.begun > 30.0 and play.begun < 40.0]
    assert asked.count(0) <= 12, "one a second at most tries it"
    assert all(play.order == [0] for play in world.plays if play.begun > returned[1][0])
    assert all(play.elapsed < 1.5 for play in world.plays if play.begun > 11.0)
    assert in_order(world)


@pytest.mark.requirement("INT-03")
def test_a_hub_that_nothing_probes_comes_back_by_trials() -> None:
    """Calls try it once its breaker is half-open; three that succeed, and the hold, bring all of them back."""
    world = World(down_while(10.0, 15.0), 3, random=seeded(13))
    world.calls(0.0, 240.0, 20.0)
    world.run()
    assert all(play.ending == "answered" for play in world.plays)
    shares = [event.share for _, event in world.told(FailedBack) if isinstance(event, FailedBack)]
    assert (len(world.told(FailedOver)), shares) == (1, [0.05, 1.0])
    assert in_order(world)


@pytest.mark.requirement("INT-03")
@pytest.mark.requirement("RES-03")
def test_a_hub_that_flaps_is_left_once_and_not_returned_to() -> None:
    """10 s up, 10 s down, for 10 minutes: at most two switches, and every call is served."""

    def behave(daemon: int, now: float) -> Reply:
        return REFUSE if daemon == 0 and now % 20.0 >= 10.0 else Reply()

    for seed in range(3):
        world = World(behave, 3, policies=EVERYTHING, random=seeded(seed))
        world.calls(0.0, 600.0, 5.0)
        world.run(620.0)
        assert all(play.ending == "answered" for play in world.plays)
        assert len(world.told(FailedOver)) + len(world.told(FailedBack)) <= 2
        assert in_order(world)


@pytest.mark.requirement("INT-03")
def test_a_hub_that_is_three_times_slower_is_neither_overdue_nor_left_nor_hedged_much() -> None:
    """50 in flight all the time: no breaker, no failover, every call answered, at most 5 % more requests."""
    slow = World(lambda daemon, now: Reply(None, 0.06 if daemon == 0 and now > 10.0 else 0.02), 3, random=seeded(5))
    warm(slow.fleet)
    slow.calls(0.0, 10.0, 200.0)
    slow.calls(10.0, 15.0, 833.0)
    slow.run()
    assert all(play.ending == "answered" for play in slow.plays)
    assert not slow.told(BreakerMoved)
    assert not slow.told(FailedOver)
    assert slow.fleet.counts["overdue"] == slow.fleet.counts["incidents"] == 0
    late = [play for play in slow.plays if play.begun > 10.0]
    assert len(late) < sum(len(play.sends) for play in late) <= 1.055 * len(late)


@pytest.mark.requirement("INT-03")
def test_a_hub_that_swallows_requests_is_left_within_the_time_of_a_few_answers() -> None:
    """50 workers' worth of calls, a black hole at 10 s: nobody waits for a timeout."""
    world = World(down_while(10.0, 20.0, how=HANG), 3, random=seeded(6))
    world.calls(0.0, 20.0, 100.0)
    world.run()
    hit = [play for play in world.plays if play.begun >= 10.0]
    assert all(play.ending == "answered" and play.elapsed <= 0.3 for play in hit)
    assert world.fleet.counts["hedges"] > 0
    assert sum(0 in play.order for play in hit) <= 25, "the first few, and then one a second"


@pytest.mark.requirement("INT-03")
def test_a_peer_that_is_down_is_nobodys_business_while_the_hub_serves() -> None:
    """And when the hub is down too, the next peer serves."""
    world = World(
        lambda daemon, now: REFUSE if daemon == 1 or (daemon == 0 and now > 120.0) else Reply(), 3, policies=EVERYTHING
    )
    world.calls(0.0, 130.0, 10.0)
    world.run(140.0)
    assert all(play.order == [0] for play in world.plays if play.begun < 120.0)
    assert all(play.ending == "answered" for play in world.plays)
    assert all(1 not in play.order for play in world.plays), "its probes were missed"


@pytest.mark.requirement("INT-03")
@pytest.mark.parametrize("how", [REFUSE, Reply(FaultKind.SERVER_ERROR), HANG, Reply(FaultKind.DISCONNECTED, 0.02)])
@pytest.mark.parametrize("policies", [EVERYTHING, UNPROBED])
def test_with_all_daemons_down_calls_fail_and_do_not_multiply_the_load(how: Reply, policies: Policies) -> None:
    """After 10 s each daemon meets at most 1.15 requests for each call; when they are back, so are the calls."""
    world = World(lambda _, now: how if now < 40.0 else Reply(), 3, policies=policies, random=seeded(7), timeout=2.0)
    world.calls(0.0, 80.0, 100.0)
    world.run(85.0)
    dark = [play for play in world.plays if 10.0 <= play.begun < 38.0]
    assert all(play.ending in {"exhausted", "deadline"} for play in dark)
    load = Counter(daemon for play in dark for daemon in play.order)
    assert all(load[daemon] <= 1.15 * len(dark) for daemon in range(3))
    light = [play for play in world.plays if play.begun > 50.0]
    assert all(play.ending == "answered" for play in light)
    assert in_order(world)


@pytest.mark.requirement("INT-03")
def test_half_of_the_requests_failing_does_not_multiply_the_load() -> None:
    """Each daemon meets at most 1.15 requests for each call."""
    coin = seeded(8)
    world = World(
        lambda *_: Reply(FaultKind.SERVER_ERROR if coin() < 0.5 else None, 0.02), 3, random=seeded(9), timeout=2.0
    )
    world.calls(0.0, 40.0, 100.0)
    world.run()
    late = [play for play in world.plays if play.begun > 10.0]
    load = Counter(daemon for play in late for daemon in play.order)
    assert max(load.values()) <= 1.15 * len(late)


@pytest.mark.requirement("INT-03")
@pytest.mark.parametrize("daemon", [0, 1])
def test_an_incompatible_daemon_is_left_out_and_the_others_serve(daemon: int) -> None:
    """It is not blamed: its breaker stays closed, and no call fails by it."""
    world = World(
        lambda index, _: Reply(FaultKind.INCOMPATIBLE) if index == daemon else REFUSE if index == 0 else Reply(), 3
    )
    world.calls(0.0, 2.0, 10.0)
    world.run()
    assert all(play.ending == "answered" and play.order[-1] in {1, 2} for play in world.plays)
    assert all(play.order.count(daemon) <= 1 for play in world.plays)
    assert world.fleet.view(2.0).daemons[daemon].breaker == "closed"


@pytest.mark.requirement("INT-03")
@pytest.mark.requirement("RES-03")
def test_a_thousand_clients_return_to_the_hub_spread_out() -> None:
    """In the busiest second at most 5 % of them begin to."""
    seconds: Counter[int] = Counter()
    for seed in range(1000):
        world = World(down_while(0.0, 12.0), 2, policies=EVERYTHING, random=seeded(seed))
        world.run(130.0)
        first = next(time for time, _ in world.told(FailedBack))
        assert first > 42.0
        seconds[int(first)] += 1
    assert sum(seconds.values()) == 1000
    assert max(seconds.values()) <= 50


def test_on_the_way_back_the_hub_gets_its_share() -> None:
    """5, 25, 50 and then 100 % of the calls ask it first."""
    world = World(down_while(0.0, 12.0), 2, policies=EVERYTHING, random=seeded(11))
    world.calls(0.0, 240.0, 50.0)
    world.run(245.0)
    begun = next(time for time, _ in world.told(FailedBack))
    for step, share in enumerate((0.05, 0.25, 0.5, 1.0)):
        inside = [play.order[0] for play in world.plays if 20 * step < play.begun - begun < 20 * (step + 1)]
        assert inside.count(0) / len(inside) == pytest.approx(share, abs=0.04)


def test_a_hub_without_peers_is_never_left() -> None:
    """There is no ring."""
    world = World(down_while(5.0, 30.0), 1, policies=EVERYTHING, random=seeded(12))
    world.calls(0.0, 60.0, 10.0)
    world.run(65.0)
    assert not world.told(FailedOver)
    assert world.fleet.view(65.0).route == Route.STAR
    assert all(play.ending == "answered" for play in world.plays if play.begun > 40.0)


events = st.tuples(
    st.sampled_from(
        ["board", "board", "last", "send", "good", "bad", "drop", "probe", "miss", "call", "reset", "hedge"]
    ),
    st.integers(0, 20),
    st.floats(0, 6),
    st.sampled_from([kind for kind in FaultKind if kind is not FaultKind.BREAKER_OPEN]),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(events, max_size=120), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_whatever_happens_in_whatever_order_the_books_agree(
    steps: list[tuple[str, int, float, FaultKind]], size: int, probed: bool, seed: int
) -> None:
    """The order is a permutation, flights and trials are those under way, the budget lies in 0 to 1."""
    fleet = fleet_of(size, EVERYTHING if probed else UNPROBED, seeded(seed))
    flights: list[Flight] = []
    now = 0.0
    for what, number, pause, kind in steps:
        now += pause
        daemon = number % size
        flight = flights[number % len(flights)] if flights else None
        if what in {"board", "last"}:
            boarded = fleet.board(daemon, now, last=what == "last")
            flights += [boarded] if isinstance(boarded, Flight) else []
        elif what in {"probe", "miss"}:
            fleet.probed(daemon, None if what == "probe" else fault(kind), now)
        elif what == "call":
            fleet.called(now)
        elif what == "reset":
            fleet.reset()
        elif flight is not None and what == "send" and not flight.sent:
            fleet.sent(flight, now)
        elif flight is not None and what == "hedge":
            fleet.spend_hedge(flight, now)
            fleet.found_overdue(flight, now)
        elif flight is not None and what in {"good", "bad", "drop"}:
            flights.remove(flight)
            if what == "good":
                fleet.answered(flight, now)
            elif what == "bad":
                fleet.failed(flight, fault(kind), now)
            else:
                fleet.dropped(flight, now)
        assert sorted(fleet.order(now)) == list(range(size))
        view = fleet.view(now)
        assert 0.0 <= view.budget <= 1.0
        for index, one in enumerate(view.daemons):
            mine = [each for each in flights if each.daemon == index]
            assert one.in_flight == sum(each.sent for each in mine)
            assert fleet._daemons[index].circuit._trials == sum(each.trial for each in mine)
            assert one.breaker in set(BreakerState)


def test_a_policy_that_is_off_takes_no_part() -> None:
    """Everything None: daemons are asked in order, as often as the call says."""
    world = World(lambda *_: Reply(FaultKind.SERVER_ERROR), 2, policies=Policies())
    plays = world.calls(0.0, 60.0, 1.0)
    world.run()
    assert all(play.ending == "exhausted" for play in plays)
    assert all(play.order[0] == 0 for play in plays[:2])


def test_an_acknowledged_bust_outweighs_missed_probes() -> None:
    """A hub whose capabilities fail while its busts succeed is not down."""
    fleet = fleet_of(1, EVERYTHING, half)
    for now in (1.0, 2.0, 3.0):
        fleet.take_probes(1e9)
        fleet.probed(0, fault(FaultKind.SERVER_ERROR), now)
    assert fleet.down(0, 3.0)
    answer(fleet, 0, 4.0)
    assert not fleet.down(0, 4.0)
    assert fleet.well(0, 4.0)


def test_without_probes_calls_try_the_hub_until_there_is_evidence_enough() -> None:
    """One call a second, although its breaker has closed: else the failback would wait for evidence for ever."""
    policies = replace(UNPROBED, breaker=Breaker(incidents=1, open=1.0, proofs=1))
    fleet = fleet_of(2, policies, half)
    fail(fleet, 0, FaultKind.UNREACHABLE, 0.0)
    assert fleet.view(0.0).route is Route.RING
    now, asked = 2.0, 0
    while fleet.view(now).route is not Route.STAR:
        first = fleet.order(now)[0]
        asked += first == 0
        answer(fleet, first, now)
        now += 0.1
        assert now < 300
    assert asked > 3


def test_silence_is_hopeless_only_where_everybody_is_silent_or_down() -> None:
    """Half a second; one who may still answer is worth waiting for."""
    fleet = fleet_of(2, EVERYTHING, half)
    warm(fleet, 0)
    warm(fleet, 1)
    for index in (0, 1):
        flight = fleet.board(index, 1.0)
        assert isinstance(flight, Flight)
        fleet.sent(flight, 1.0)
    assert fleet.hopeless_at([0, 1], 1.0) == pytest.approx(1.5)
    assert fleet.hopeless_at([], 1.0) < 0
    answer(fleet, 1, 1.2)
    assert fleet.hopeless_at([0, 1], 1.3) == pytest.approx(1.7)
    assert fleet_of(1, replace(EVERYTHING, hedge=None), half).hopeless_at([0], 1.0) > 1e9
    assert fleet.try_silence(5.0)
    assert not fleet.try_silence(5.9)
    assert fleet.try_silence(6.0)
    assert "answers nothing" in fleet.silent(0).message


def test_a_mute_daemon_is_hopeless_until_it_speaks() -> None:
    """A request that ended without any answer; a refusal, a probe or a dead connection ends that."""
    fleet = fleet_of(1, EVERYTHING, half)
    for begun, cure in ((100.0, FaultKind.REJECTED), (200.0, FaultKind.UNREACHABLE), (300.0, None)):
        fail(fleet, 0, FaultKind.TIMED_OUT, begun, taking=2.0)
        assert fleet.hopeless_at([0], begun + 2) < 0
        if cure is None:
            fleet.take_probes(1e9)
            fleet.probed(0, None, begun + 3)
        else:
            fail(fleet, 0, cure, begun + 3)
        assert fleet.hopeless_at([0], begun + 3) > 1e9


def test_where_all_are_down_one_call_a_second_asks_them_all() -> None:
    """As with a lone daemon; but not one in quarantine."""
    fleet = fleet_of(1, replace(UNPROBED, breaker=Breaker(incidents=1, open=60.0)), half)
    fail(fleet, 0, FaultKind.UNREACHABLE, 0.0)
    assert fleet.down(0, 1.0)
    assert fleet.try_down(0, 1.0)
    assert isinstance(fleet.board(0, 1.0, last=True), Flight)
    assert not fleet.try_down(0, 1.5)
    fail(fleet_of(1, EVERYTHING, half), 0, FaultKind.CERTIFICATE, 0.0)
    fleet = fleet_of(1, EVERYTHING, half)
    fail(fleet, 0, FaultKind.CERTIFICATE, 0.0)
    assert not fleet.try_down(0, 10.0)
