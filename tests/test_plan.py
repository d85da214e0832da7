"""The plan of one call, walked through whole scenarios without a clock, alone and with many calls over one fleet."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.faults import TABLE, Fault, FaultKind
from pybustcall.fleet import Fleet, Flight, Policies
from pybustcall.plan import CallPlan, Send, Stop, Wait
from pybustcall.policies import Breaker, BreakerState, Budget, Failback, Hedge, Probes, Retry
from pybustcall.telemetry import Event
from pybustcall.topology import ring_order


def highest() -> float:
    """Stand in for a random number: 1, so that every wait is its ceiling."""
    return 1.0


def lowest() -> float:
    """Stand in for a random number: 0, so that nothing waits."""
    return 0.0


@dataclass(frozen=True)
class Reply:
    """What a daemon does with one request: acknowledge it (no kind), or fail that way, after so many seconds."""

    kind: FaultKind | None = None
    taking: float = 0.01
    retry_after: float | None = None


HANG: Final = Reply(FaultKind.TIMED_OUT, math.inf)
REFUSE: Final = Reply(FaultKind.UNREACHABLE, 0.001)

STATUS: Final[Mapping[FaultKind, int]] = {
    FaultKind.THROTTLED: 429,
    FaultKind.SERVER_ERROR: 500,
    FaultKind.MALFORMED: 200,
    FaultKind.REJECTED: 422,
    FaultKind.NOT_THIS_SERVICE: 404,
    FaultKind.TOKEN_REFUSED: 401,
    FaultKind.NOT_ALLOWED: 403,
}
"""With which status a daemon answers that fails this way; the other kinds have no answer."""

EVERYTHING: Final = Policies(hedge=Hedge(), breaker=Breaker(), budget=Budget(), probes=Probes(), failback=Failback())
UNPROBED: Final = replace(EVERYTHING, probes=None)


def fault(kind: FaultKind, retry_after: float | None = None, url: str = "http://d0") -> Fault:
    """Make a fault of this kind."""
    return Fault(kind, url, f"it failed: {kind}", "no", status=STATUS.get(kind), retry_after=retry_after)


def fleet_of(
    size: int,
    policies: Policies = UNPROBED,
    random: Callable[[], float] = lowest,
    emit: Callable[[Event], object] = lambda _: None,
    wake: Callable[[], object] = lambda: None,
) -> Fleet:
    """Make a fleet of this many daemons, whose ring is in the order of their numbers."""
    urls = [f"http://d{number}" for number in range(size)]
    client = next(str(number) for number in count() if ring_order(str(number), urls[1:]) == list(range(size - 1)))
    return Fleet(urls, policies, client_id=client, now=0.0, random=random, emit=emit, wake=wake)


@dataclass
class Play:
    """What became of one call: (time, daemon) of each request, the faults, and how it ended."""

    begun: float
    sends: list[tuple[float, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ending: str = ""
    end: float = math.inf

    @property
    def order(self) -> list[int]:
        """Who was asked, in order."""
        return [daemon for _, daemon in self.sends]

    @property
    def elapsed(self) -> float:
        """How long it took."""
        return self.end - self.begun


@dataclass(eq=False)
class _Call:
    plan: CallPlan
    play: Play
    deadline: float
    air: dict[Flight, None] = field(default_factory=dict)
    waits: int = 0


class World:
    """Calls, probes and scripted daemons over one fleet, with a clock that only moves from event to event.

    - `behave`: what the daemon of this number does with a request that reaches it at this time
    - `probe`: the same for probes; as for requests, unless given
    """

    def __init__(
        self,
        behave: Callable[[int, float], Reply],
        size: int = 2,
        *,
        policies: Policies = UNPROBED,
        random: Callable[[], float] = lowest,
        retry: Retry | None = Retry(),  # noqa: B008 - frozen
        timeout: float = 5.0,
        probe: Callable[[int, float], Reply] | None = None,
    ) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Event]] = []
        self.plays: list[Play] = []
        self.probes: list[tuple[float, int]] = []
        self._behave, self._probe = behave, probe or behave
        self._random, self._retry, self._timeout = random, retry, timeout
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = count()
        self.fleet = fleet_of(size, policies, random, lambda event: self.events.append((self.now, event)))

    def call(self, at: float, only: int | None = None) -> Play:
        """Plan a call; its play is filled in while the world runs."""
        play = Play(at)
        self.plays.append(play)

        def begin() -> None:
            self.fleet.called(self.now)
            deadline = self.now + self._timeout
            plan = CallPlan(
                self.fleet, deadline=deadline, retry=self._retry, now=self.now, random=self._random, only=only
            )
            self._step(_Call(plan, play, deadline))

        self.at(at, begin)
        return play

    def calls(self, begin: float, end: float, per_second: float) -> list[Play]:
        """Plan calls at an even pace."""
        return [self.call(begin + number / per_second) for number in range(round((end - begin) * per_second))]

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Do something at that time."""
        heapq.heappush(self._agenda, (time, next(self._ticket), act))

    def run(self, until: float = math.inf) -> None:
        """Let time pass."""
        while True:
            next_event = self._agenda[0][0] if self._agenda else math.inf
            next_probe = self.fleet.next_probe()
            if until == math.inf and not self._agenda:
                return
            time = min(next_event, next_probe)
            if time > until:
                self.now = until
                return
            self.now = max(self.now, time)
            if next_probe < next_event:
                self._take_probes()
            else:
                heapq.heappop(self._agenda)[2]()

    def told(self, kind: type[Event]) -> list[tuple[float, Event]]:
        """The records of one kind, with their times."""
        return [(time, event) for time, event in self.events if type(event) is kind]

    def _take_probes(self) -> None:
        for index in self.fleet.take_probes(self.now):
            self.probes.append((self.now, index))
            reply = self._probe(index, self.now)
            slow = reply.taking > 0.5
            kind = FaultKind.TIMED_OUT if slow else reply.kind
            found = None if kind is None else fault(kind)

            def landed(index: int = index, found: Fault | None = found) -> None:
                self.fleet.probed(index, found, self.now)

            self.at(self.now + min(reply.taking, 0.5), landed)

    def _step(self, call: _Call) -> None:
        while not call.play.ending:
            match call.plan.next_step(self.now):
                case Send() as sending:
                    self._send(call, sending)
                case Wait(until):
                    assert until > self.now, "a wait for the past spins"
                    call.waits += 1
                    self.at(until, lambda mine=call.waits: self._step(call) if mine == call.waits else None)  # type: ignore[misc]
                    return
                case Stop(ending):
                    self._finish(call, ending)

    def _send(self, call: _Call, sending: Send) -> None:
        assert self.now < sending.until <= call.deadline + 1e-9, "nothing is sent beyond the deadline"
        assert sending.instead_of is None, "every request has its slot here"
        call.play.sends.append((self.now, sending.daemon))
        reply = self._behave(sending.daemon, self.now)
        if reply.kind is not FaultKind.NO_SLOT:
            self.fleet.sent(sending.flight, self.now)
        late = self.now + reply.taking > sending.until
        kind = FaultKind.TIMED_OUT if late and reply.kind is not FaultKind.NO_SLOT else reply.kind
        call.air[sending.flight] = None
        self.at(
            min(self.now + reply.taking, sending.until),
            lambda: self._land(call, sending.flight, kind, reply.retry_after),
        )

    def _land(self, call: _Call, flight: Flight, kind: FaultKind | None, retry_after: float | None) -> None:
        if flight not in call.air:
            return
        del call.air[flight]
        if kind is None:
            self.fleet.answered(flight, self.now)
            if not call.play.ending:
                self._finish(call, "answered")
            return
        met = self.fleet.failed(flight, fault(kind, retry_after, f"http://d{flight.daemon}"), self.now)
        if not call.play.ending:
            call.play.faults.append(met)
            call.plan.record(flight, met, self.now)
            self._step(call)

    def _finish(self, call: _Call, ending: str) -> None:
        call.play.ending, call.play.end = ending, self.now
        call.play.faults += call.plan.passed_over
        call.plan.close()
        for loser in list(call.air):
            self.at(self.now + 0.25, lambda loser=loser: self._drop(call, loser))  # type: ignore[misc]

    def _drop(self, call: _Call, flight: Flight) -> None:
        if flight in call.air:
            del call.air[flight]
            self.fleet.dropped(flight, self.now)


Script = dict[int, Iterator[Reply]]


def always(kind: FaultKind | None, taking: float = 0.0, retry_after: float | None = None) -> Iterator[Reply]:
    """Script a daemon that does the same each time."""
    while True:
        yield Reply(kind, taking, retry_after)


def walk(
    script: Script,
    *,
    timeout: float = 5.0,
    retry: Retry | None = Retry(),  # noqa: B008 - frozen
    random: Callable[[], float] = lowest,
    policies: Policies = UNPROBED,
) -> Play:
    """Run one call over scripted daemons to its end."""
    world = World(
        lambda daemon, _: next(script[daemon]),
        len(script),
        policies=policies,
        random=random,
        retry=retry,
        timeout=timeout,
    )
    play = world.call(0.0)
    world.run()
    assert play.ending, "the plan never ends"
    return play


@dataclass(frozen=True)
class Recovery:
    """What follows a kind of fault: who is asked while both daemons fail so, how it ends, and whether it escalates."""

    order: list[int]
    ending: str
    incident: bool


RECOVERY: Final = {
    FaultKind.UNREACHABLE: Recovery([0, 0, 1, 1, 1, 0], "exhausted", incident=True),
    FaultKind.DISCONNECTED: Recovery([0, 0, 1, 1, 1, 0], "exhausted", incident=True),
    FaultKind.TIMED_OUT: Recovery([0, 1, 0, 1, 0, 1], "exhausted", incident=True),
    FaultKind.THROTTLED: Recovery([0, 1, 0, 1, 0, 1], "exhausted", incident=False),
    FaultKind.SERVER_ERROR: Recovery([0, 0, 1, 1], "exhausted", incident=True),
    FaultKind.MALFORMED: Recovery([0, 1], "exhausted", incident=True),
    FaultKind.NOT_THIS_SERVICE: Recovery([0, 1], "exhausted", incident=True),
    FaultKind.TOKEN_REFUSED: Recovery([0, 1], "exhausted", incident=True),
    FaultKind.INCOMPATIBLE: Recovery([0, 1], "exhausted", incident=False),
    FaultKind.UNSUPPORTED: Recovery([0, 1], "exhausted", incident=False),
    FaultKind.REJECTED: Recovery([0], "halted", incident=False),
    FaultKind.NOT_ALLOWED: Recovery([0], "halted", incident=False),
    FaultKind.CERTIFICATE: Recovery([0], "halted", incident=True),
}
"""The kinds that end an attempt. The other three have tests of their own, named here."""


@pytest.mark.requirement("IMP-03")
@pytest.mark.requirement("IMP-09")
@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize("kind", FaultKind)
def test_each_kind_of_fault_is_followed_as_its_row_says(kind: FaultKind) -> None:
    """Who is asked, how often and in which order, how the call ends, and whether the daemon is blamed."""
    if kind is FaultKind.SLOW:
        test_a_slow_daemon_is_hedged_and_probed_soon()
    elif kind is FaultKind.NO_SLOT:
        test_no_slot_is_waited_for_at_the_same_daemon_until_the_deadline()
    elif kind is FaultKind.BREAKER_OPEN:
        test_an_open_breaker_passes_the_call_on_without_a_request()
    else:
        recovery = RECOVERY[kind]
        play = walk({0: always(kind), 1: always(kind)})
        assert (play.order, play.ending) == (recovery.order, recovery.ending)
        assert TABLE[kind].incident is recovery.incident
        fleet = fleet_of(2)
        fail(fleet, 0, kind, 1.0)
        assert fleet.view(1.0).daemons[0].incidents == recovery.incident
        assert fleet.view(1.0).daemons[0].suspect is recovery.incident


def fail(fleet: Fleet, daemon: int, kind: FaultKind, now: float, taking: float = 0.0) -> Fault:
    """Let a request to that daemon fail, which must be let through."""
    flight = fleet.board(daemon, now, last=True)
    assert isinstance(flight, Flight)
    fleet.sent(flight, now)
    return fleet.failed(flight, fault(kind, url=f"http://d{daemon}"), now + taking)


def answer(fleet: Fleet, daemon: int, now: float, taking: float = 0.0) -> None:
    """Let a request to that daemon be acknowledged."""
    flight = fleet.board(daemon, now, last=True)
    assert isinstance(flight, Flight)
    fleet.sent(flight, now)
    fleet.answered(flight, now + taking)


def warm(fleet: Fleet, daemon: int = 0, usual: float = 0.02, now: float = 0.0) -> None:
    """Let a daemon answer 100 requests in its usual time, so that hedging begins; each was a call."""
    for _ in range(100):
        fleet.called(now)
        answer(fleet, daemon, now, usual)


def trip(fleet: Fleet, daemon: int, now: float) -> None:
    """Let a daemon's breaker open, by five incidents in a row."""
    for number in range(5):
        fail(fleet, daemon, FaultKind.UNREACHABLE, now + number / 1000)
    assert fleet.view(now + 0.005).daemons[daemon].breaker == BreakerState.OPEN


@pytest.mark.requirement("IMP-03")
@pytest.mark.requirement("IMP-09")
def test_a_slow_daemon_is_hedged_and_probed_soon() -> None:
    """SILENT: the hub is slower than usual, the peer answers; the hub is neither blamed nor left, but looked after."""
    woken: list[bool] = []
    fleet = fleet_of(2, EVERYTHING, random=lambda: 0.5, wake=lambda: woken.append(True))
    warm(fleet)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    assert first.daemon == 0
    fleet.sent(first.flight, 1.0)
    assert plan.next_step(1.0) == Wait(pytest.approx(1.02))  # type: ignore[arg-type]
    second = plan.next_step(1.0201)
    assert isinstance(second, Send)
    assert (second.daemon, second.flight.hedge, second.instead_of) == (1, True, None)
    assert fleet.next_probe() == pytest.approx(2.0201)
    assert woken == [True]
    fleet.sent(second.flight, 1.0201)
    fleet.answered(second.flight, 1.03)
    fleet.dropped(first.flight, 1.05)
    assert fleet.view(1.05).daemons[0].incidents == 0
    assert not fleet.view(1.05).daemons[0].suspect


@pytest.mark.requirement("IMP-09")
def test_no_slot_is_waited_for_at_the_same_daemon_until_the_deadline() -> None:
    """Our own load is no reason to fail over, and does not use up attempts."""
    play = walk({0: always(FaultKind.NO_SLOT, 0.5), 1: always(FaultKind.MALFORMED)})
    assert play.ending == "deadline"
    assert set(play.order) == {0}
    assert 10 <= len(play.sends) <= 20


@pytest.mark.requirement("IMP-09")
def test_an_open_breaker_passes_the_call_on_without_a_request() -> None:
    """EXCEPTION: a daemon that is passed over is a fault of stage 5 of the call, and the next daemon serves it."""
    world = World(lambda *_: Reply())
    trip(world.fleet, 0, 0.0)
    plan = CallPlan(world.fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest, only=0)
    assert world.fleet.order(1.0) == [1, 0]
    play = world.call(1.0)
    world.run()
    assert (play.order, play.ending) == ([1], "answered")
    first = plan.next_step(1.0)
    assert isinstance(first, Send), "the only candidate is not refused outright"
    refused = CallPlan(world.fleet, deadline=6.0, retry=Retry(), now=1.1, random=lowest, only=0)
    assert refused.next_step(1.1) == Stop("exhausted")
    assert [(met.kind, met.stage) for met in refused.passed_over] == [(FaultKind.BREAKER_OPEN, 5)]


@pytest.mark.requirement("IMP-09")
def test_no_kind_of_fault_is_without_a_recovery() -> None:
    """A kind that is added to the table needs a scenario here."""
    elsewhere = {FaultKind.SLOW, FaultKind.NO_SLOT, FaultKind.BREAKER_OPEN}
    assert RECOVERY.keys() | elsewhere == set(FaultKind)
    assert not RECOVERY.keys() & elsewhere


def test_a_timeout_sends_the_call_to_the_untried_daemons_first() -> None:
    """Hub hangs, first peer refuses, second hangs: each in turn, then those that may be asked again."""
    script = {
        0: always(FaultKind.TIMED_OUT, math.inf),
        1: always(FaultKind.MALFORMED),
        2: always(FaultKind.TIMED_OUT, math.inf),
    }
    assert walk(script, timeout=60.0).order == [0, 1, 2, 0, 2, 0, 2]


def test_an_attempt_gets_half_of_what_is_left_while_a_daemon_is_untried() -> None:
    """min(2, half of what is left) while an untried daemon remains, else min(2, left)."""
    fleet = fleet_of(2)
    plan = CallPlan(fleet, deadline=3.0, retry=Retry(), now=0.0, random=lowest)
    first = plan.next_step(0.0)
    assert isinstance(first, Send)
    assert (first.daemon, first.until) == (0, 1.5)
    plan.record(first.flight, fault(FaultKind.TIMED_OUT), 1.5)
    second = plan.next_step(1.5)
    assert isinstance(second, Send)
    assert (second.daemon, second.until) == (1, 3.0)
    long = CallPlan(fleet, deadline=100.0, retry=Retry(), now=0.0, random=lowest).next_step(0.0)
    assert isinstance(long, Send)
    assert long.until == 2.0


def test_the_last_moments_of_a_call_are_not_halved_any_further() -> None:
    """With less than 0.05 s left, an attempt gets what there is."""
    step = CallPlan(fleet_of(3), deadline=1.0, retry=Retry(), now=0.96, random=lowest).next_step(0.96)
    assert isinstance(step, Send)
    assert step.until == pytest.approx(1.0)


def test_a_black_holed_hub_leaves_time_for_every_peer() -> None:
    """Three daemons that never answer, 5 s: each is asked, and the call ends at its deadline, not later."""
    play = walk({number: always(FaultKind.TIMED_OUT, math.inf) for number in range(3)})
    assert play.order[:3] == [0, 1, 2]
    assert play.ending == "deadline"
    assert play.end == 5.0


@pytest.mark.requirement("IMP-02")
def test_backoffs_double_inside_their_cap() -> None:
    """The jitter lies inside the ceiling: base, doubled each time, never above the cap."""
    play = walk(
        {0: always(FaultKind.THROTTLED)},
        retry=Retry(attempts=8, throttled_base=0.05, throttled_cap=0.5),
        random=highest,
    )
    waits = [round(later - earlier, 9) for earlier, later in pairwise(time for time, _ in play.sends)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5]


def test_a_refused_connection_is_tried_again_while_its_fault_is_a_warning() -> None:
    """8, 7, 6 (WARNING) are retried after a backoff; 5 (EXCEPTION) ends this daemon for this call."""
    play = walk({0: always(FaultKind.UNREACHABLE)}, retry=Retry(attempts=8), random=highest)
    assert [met.stage for met in play.faults] == [8, 7, 6, 5]
    assert (len(play.sends), play.ending) == (4, "exhausted")


def test_retry_after_is_honoured_within_the_deadline() -> None:
    """The daemon said 2 s: it is asked again after 2 s, not before."""
    play = walk({0: always(FaultKind.THROTTLED, retry_after=2.0)})
    assert play.sends == [(0.0, 0), (2.0, 0), (4.0, 0)]


def test_a_retry_after_beyond_the_deadline_ends_the_call_at_once() -> None:
    """Nobody sleeps through a deadline for nothing: the caller gets his time back."""
    play = walk({0: always(FaultKind.THROTTLED, retry_after=60.0)})
    assert (play.sends, play.ending, play.end) == ([(0.0, 0)], "exhausted", 0.0)


def test_throttling_without_a_word_backs_off_longer() -> None:
    """U(0, 1), then U(0, 2): three attempts fit into 5 s."""
    play = walk({0: always(FaultKind.THROTTLED)}, random=highest)
    assert play.sends == [(0.0, 0), (1.0, 0), (3.0, 0)]


def test_a_throttled_hub_hands_over_to_its_peers_at_once() -> None:
    """The hub wants 2 s of rest; the peer is asked without waiting."""
    script = {0: always(FaultKind.THROTTLED, retry_after=2.0), 1: always(FaultKind.MALFORMED)}
    assert walk(script).sends == [(0.0, 0), (0.0, 1), (2.0, 0), (4.0, 0)]


def test_without_a_retry_policy_each_daemon_is_asked_once() -> None:
    """retry=None turns retries off, not the peers."""
    play = walk({0: always(FaultKind.UNREACHABLE), 1: always(FaultKind.TIMED_OUT)}, retry=None)
    assert play.order == [0, 1]


def test_a_backoff_that_does_not_fit_passes_to_the_peers() -> None:
    """A wait that would reach the deadline is no wait: the untried peer is asked now."""
    retry = Retry(base=10.0, cap=10.0)
    script = {0: always(FaultKind.UNREACHABLE), 1: always(FaultKind.MALFORMED)}
    play = walk(script, retry=retry, random=highest)
    assert (play.order, play.end) == ([0, 1], 0.0)


def test_a_call_whose_deadline_is_over_asks_nobody() -> None:
    """The deadline comes before everything else, but for a halt."""
    fleet = fleet_of(2)
    assert CallPlan(fleet, deadline=1.0, retry=Retry(), now=1.0, random=lowest).next_step(1.0) == Stop("deadline")
    halted = CallPlan(fleet, deadline=1.0, retry=Retry(), now=0.0, random=lowest)
    first = halted.next_step(0.0)
    assert isinstance(first, Send)
    halted.record(first.flight, fault(FaultKind.CERTIFICATE), 2.0)
    assert halted.next_step(2.0) == Stop("halted")


def test_after_the_deadline_attempts_report_their_own_end_and_nobody_else_is_asked() -> None:
    """The hub is overdue and the peer is well, but time is over: 20 ms for the last word, then the end."""
    fleet = fleet_of(2)
    warm(fleet)
    plan = CallPlan(fleet, deadline=1.01, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    assert plan.next_step(1.005) == Wait(1.01)
    assert plan.next_step(1.01) == Wait(1.03)
    assert plan.next_step(1.029) == Wait(1.03)
    assert plan.next_step(1.03) == Stop("deadline")


@pytest.mark.requirement("IMP-03")
def test_a_halt_is_not_forgotten_over_a_later_fault_of_the_same_moment() -> None:
    """The hub refuses the certificate while the hedge meets a 500: the call halts, whichever is recorded last."""
    fleet = fleet_of(3)
    warm(fleet)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    second = plan.next_step(1.03)
    assert isinstance(second, Send)
    plan.record(first.flight, fault(FaultKind.NOT_ALLOWED), 1.04)
    plan.record(second.flight, fault(FaultKind.SERVER_ERROR, url="http://d1"), 1.04)
    assert plan.next_step(1.04) == Stop("halted")


kinds = st.sampled_from([kind for kind in FaultKind if kind not in {FaultKind.SLOW, FaultKind.BREAKER_OPEN}])


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(kinds, st.floats(0, 3)), min_size=40, max_size=40), min_size=1, max_size=4),
    st.floats(0.01, 20),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_plan_ends_and_keeps_its_bounds(
    scripts: list[list[tuple[FaultKind, float]]], timeout: float, attempts: int, hedging: bool
) -> None:
    """Whatever fails however: nothing is sent after the deadline, nor more often than allowed, nor after a halt."""
    halting = {FaultKind.REJECTED, FaultKind.NOT_ALLOWED, FaultKind.CERTIFICATE}
    slots = 0

    def behave(daemon: int, _: float) -> Reply:
        nonlocal slots
        kind, taking = lines[daemon].pop() if lines[daemon] else (FaultKind.MALFORMED, 0.0)
        slots += kind is FaultKind.NO_SLOT
        return Reply(kind, max(taking, 0.3) if kind is FaultKind.NO_SLOT else taking)

    lines = [list(script) for script in scripts]
    world = World(behave, len(scripts), random=highest, retry=Retry(attempts=attempts), timeout=timeout)
    if hedging:
        warm(world.fleet)
    play = world.call(1.0)
    world.run()
    assert len(play.sends) - slots <= attempts * len(scripts)
    met = [one.kind for one in play.faults if one.kind is not FaultKind.BREAKER_OPEN]
    assert all(kind not in halting for kind in met[:-1])
    assert (play.ending == "halted") == (bool(met) and met[-1] in halting)
    assert play.elapsed <= timeout + 0.02 + 1e-9
    assert all(daemon.in_flight == 0 for daemon in world.fleet.view(world.now).daemons)
    assert all(known.circuit._trials == 0 for known in world.fleet._daemons)


# Pairs of policies


def test_retry_and_budget_a_spent_budget_ends_retries_and_not_first_sends() -> None:
    """The reserve of 2 pays two retries; later calls ask each daemon once, and say why they ended."""
    policies = Policies(budget=Budget(share=0.01, reserve=2.0, per_second=0.0))
    world = World(lambda *_: Reply(FaultKind.SERVER_ERROR, 0.0), policies=policies)
    plays = [world.call(number / 10) for number in range(4)]
    world.run()
    assert [play.order for play in plays] == [[0, 0, 1, 1], [0, 1], [0, 1], [0, 1]]
    assert world.fleet.counts["retries"] == 2
    plan = CallPlan(world.fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest, only=0)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    assert not plan.budget_spent
    denied = world.fleet.counts["retries_denied"]
    plan.record(first.flight, fault(FaultKind.THROTTLED), 1.0)
    assert plan.next_step(1.0) == Stop("exhausted")
    assert plan.budget_spent
    assert world.fleet.counts["retries_denied"] == denied + 1


def test_retry_and_breaker_what_is_not_sent_costs_no_budget() -> None:
    """The breaker opens between an attempt and its retry: the call goes on, and the budget is as it was."""
    fleet = fleet_of(2)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    plan.record(first.flight, fleet.failed(first.flight, fault(FaultKind.UNREACHABLE), 1.1), 1.1)
    for moment in (1.2, 1.3, 1.4, 1.5):
        fail(fleet, 0, FaultKind.UNREACHABLE, moment)
    second = plan.next_step(1.6)
    assert isinstance(second, Send)
    assert second.daemon == 1
    assert fleet.counts["retries"] == 0
    assert fleet.view(1.6).budget == 1.0


def test_hedge_and_breaker_a_daemon_whose_breaker_is_open_is_no_helper() -> None:
    """The hub is slow and the first peer's breaker open: the second peer is asked as well."""
    fleet = fleet_of(3)
    warm(fleet)
    trip(fleet, 1, 0.5)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    second = plan.next_step(1.03)
    assert isinstance(second, Send)
    assert second.daemon == 2


def test_hedge_and_breaker_without_any_helper_the_call_just_waits() -> None:
    """The only peer is down: there is nobody to hedge with, nor to move on to."""
    fleet = fleet_of(2)
    warm(fleet)
    trip(fleet, 1, 0.5)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    assert plan.next_step(3.0) == Wait(6.0)


def test_hedge_and_budget_no_hedge_while_the_budget_is_under_half() -> None:
    """The usual time is over, but retries have eaten the budget: the call waits until the daemon is overdue."""
    fleet = fleet_of(2)
    warm(fleet, usual=0.1)
    for _ in range(15):
        fleet.spend_retry(0.9)
    assert fleet.view(0.9).budget < 0.5
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    assert plan.next_step(1.11) == Wait(pytest.approx(1.4))  # type: ignore[arg-type]
    assert fleet.counts["hedges"] == 0
    second = plan.next_step(1.401)
    assert isinstance(second, Send)
    assert (second.daemon, second.flight.hedge, fleet.counts["overdue"]) == (1, False, 1)
    assert fleet.view(1.401).daemons[0].suspect


def test_overdue_and_half_open_a_trial_that_hangs_is_left_and_opens_the_breaker_again() -> None:
    """The trial is overdue: calls go to the peer, the loser counts as silent, and no trial stays behind."""
    fleet = fleet_of(2)
    warm(fleet)
    trip(fleet, 0, 0.5)
    later = fleet._daemons[0].circuit.until
    trial = fleet.board(0, later)
    assert isinstance(trial, Flight)
    assert trial.trial
    assert isinstance(fleet.board(0, later), Fault), "one trial at a time"
    fleet.sent(trial, later)
    plan = CallPlan(fleet, deadline=later + 5, retry=Retry(), now=later + 0.09, random=lowest)
    step = plan.next_step(later + 0.09)
    assert isinstance(step, Send)
    assert step.daemon == 1
    assert fleet.view(later + 0.09).daemons[0].overdue
    fleet.dropped(trial, later + 0.1)
    assert fleet.view(later + 0.1).daemons[0].breaker == BreakerState.OPEN
    assert fleet._daemons[0].circuit._trials == 0


@pytest.mark.parametrize("silent", [True, False])
def test_an_attempt_that_waits_for_a_slot_of_a_silent_daemon_is_withdrawn(silent: bool) -> None:
    """Nobody queues behind a silence: the peer is asked instead. While the daemon answers, the queue is worth it."""
    fleet = fleet_of(2)
    warm(fleet)
    before = fleet.board(0, 1.0)
    assert isinstance(before, Flight)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    assert plan.next_step(1.0) == Wait(pytest.approx(1.08)), "it looks again: a silence may begin later"  # type: ignore[arg-type]
    fleet.sent(before, 1.01)
    if not silent:
        answer(fleet, 0, 1.05)
        assert plan.next_step(1.1) == Wait(pytest.approx(1.13))  # type: ignore[arg-type]
        return
    second = plan.next_step(1.1)
    assert isinstance(second, Send)
    assert (second.daemon, second.instead_of, second.flight.hedge) == (1, first.flight, False)
    fleet.dropped(first.flight, 1.1)
    plan.record(second.flight, fault(FaultKind.MALFORMED, url="http://d1"), 1.2)
    again = plan.next_step(1.2)
    assert isinstance(again, Send)
    assert again.daemon == 0, "it was not sent there yet, so it may be asked, for nothing"
    assert fleet.counts["retries"] == 0


def test_claim_and_close_only_one_call_retries_at_once_and_a_cancelled_one_frees_the_claim() -> None:
    """Of two calls that met a refused connection one stays, the other goes on; when the first is closed, others may."""

    def refused(now: float) -> CallPlan:
        plan = CallPlan(fleet, deadline=now + 5, retry=Retry(), now=now, random=highest)
        first = plan.next_step(now)
        assert isinstance(first, Send)
        assert first.daemon == 0
        plan.record(first.flight, fault(FaultKind.UNREACHABLE), now)
        return plan

    fleet = fleet_of(2)
    staying, going = refused(1.0), refused(1.0)
    assert staying.next_step(1.0) == Wait(pytest.approx(1.05))  # type: ignore[arg-type]
    step = going.next_step(1.0)
    assert isinstance(step, Send)
    assert step.daemon == 1
    going.close()
    assert isinstance(refused(1.01).next_step(1.01), Send), "closing a call that holds no claim frees none"
    staying.close()
    assert isinstance(refused(1.02).next_step(1.02), Wait)


def test_a_claim_that_ran_out_and_was_made_anew_is_not_ended_by_the_first_call() -> None:
    """Who is late must not let in a third beside the second."""
    fleet = fleet_of(2)
    assert fleet.claim_retry(0, 1.0, until=2.0)
    assert not fleet.claim_retry(0, 1.9, until=3.0)
    assert fleet.claim_retry(0, 2.0, until=3.0)
    fleet.release_retry(0, 2.0)
    assert not fleet.claim_retry(0, 2.1, until=4.0)
    fleet.release_retry(0, 3.0)
    assert fleet.claim_retry(0, 2.2, until=4.0)


def test_a_leg_asks_its_own_daemon_alone() -> None:
    """One leg of a delivery to many neither fails over nor hedges."""
    world = World(lambda *_: REFUSE, 3)
    play = world.call(0.0, only=1)
    world.run()
    assert set(play.order) == {1}


def test_a_call_is_hedged_once_at_most() -> None:
    """The hub and the first peer are both slower than usual: the second peer is not asked as well."""
    fleet = fleet_of(3)
    warm(fleet)
    warm(fleet, 1)
    plan = CallPlan(fleet, deadline=6.0, retry=Retry(), now=1.0, random=lowest)
    first = plan.next_step(1.0)
    assert isinstance(first, Send)
    fleet.sent(first.flight, 1.0)
    second = plan.next_step(1.03)
    assert isinstance(second, Send)
    fleet.sent(second.flight, 1.03)
    assert plan.next_step(1.06) == Wait(pytest.approx(1.11))  # type: ignore[arg-type]
    third = plan.next_step(1.12)
    assert isinstance(third, Send), "but one that is overdue is left"
    assert (third.daemon, third.flight.hedge) == (2, False)
