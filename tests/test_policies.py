"""Policies: the values and their defaults, the waits, and the small machines, with their laws."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybustcall.bustcall_core import BustcallClient
from pybustcall.config import Settings
from pybustcall.errors import ConfigurationError
from pybustcall.policies import (
    BREAKER,
    MAX_TIMEOUT,
    Breaker,
    BreakerSignal,
    BreakerState,
    Budget,
    Circuit,
    Failback,
    Hedge,
    HedgeAllowance,
    Latency,
    Pool,
    Probes,
    Retry,
    SharedBudget,
    _Window,
    ceiling,
    check_seconds,
    full_jitter,
)


def state_of(circuit: Circuit) -> BreakerState:
    """Tell the state, which may have changed since it was looked at."""
    return circuit.state


def half() -> float:
    """Stand in for a random number."""
    return 0.5


@given(st.integers(1, 10**9), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_no_wait_is_above_the_cap(failures: int, base: float, cap: float, chance: float) -> None:
    """Whatever the count of failures, 0 <= wait <= cap, and the ceiling never falls."""
    wait = full_jitter(failures, base, cap, lambda: chance)
    assert 0 <= wait <= cap
    assert ceiling(failures, base, cap) <= ceiling(failures + 1, base, cap)


@pytest.mark.parametrize(
    ("policy", "wrong", "why"),
    [
        (Retry, {"attempts": 0}, "retry.attempts must be an integer of at least 1, not 0"),
        (Retry, {"attempts": True}, "retry.attempts"),
        (Retry, {"attempts": 1.5}, "retry.attempts"),
        (Retry, {"attempt_timeout": 0}, "retry.attempt_timeout must be above 0"),
        (Retry, {"base": -1}, "retry.base must be from 0"),
        (Retry, {"cap": float("nan")}, "retry.cap"),
        (Retry, {"throttled_cap": "soon"}, "retry.throttled_cap must be a number of seconds, not 'soon'"),
        (Pool, {"per_daemon": 0}, "pool.per_daemon"),
        (Pool, {"total": "many"}, "pool.total"),
        (Pool, {"wait": 0}, "pool.wait must be above 0"),
        (Pool, {"connect": float("inf")}, "pool.connect"),
        (Pool, {"idle": -1}, "pool.idle must be from 0"),
        (Pool, {"drain": None}, "pool.drain"),
        (Budget, {"share": 0}, "budget.share must be above 0 and at most 1, not 0"),
        (Budget, {"share": 1.1}, "budget.share must be above 0"),
        (Budget, {"share": True}, "budget.share must be a number from 0 to"),
        (Budget, {"window": 0}, "budget.window"),
        (Budget, {"reserve": -1}, "budget.reserve must be a number from 0 to 1e\\+06, not -1"),
        (Budget, {"per_second": math.inf}, "budget.per_second"),
        (Hedge, {"quantile": 0.0}, "hedge.quantile"),
        (Hedge, {"share": "5 %"}, "hedge.share must be a number"),
        (Hedge, {"samples": 0}, "hedge.samples"),
        (Hedge, {"overdue": 0.5}, "hedge.overdue must be a number from 1 to 1e\\+06, not 0.5"),
        (Hedge, {"overdue_least": -1}, "hedge.overdue_least must be from 0"),
        (Breaker, {"incidents": 0}, "breaker.incidents"),
        (Breaker, {"volume": 2.0}, "breaker.volume"),
        (Breaker, {"proofs": 0}, "breaker.proofs"),
        (Breaker, {"rate": 2}, "breaker.rate"),
        (Breaker, {"window": 0}, "breaker.window"),
        (Breaker, {"open": 0}, "breaker.open"),
        (Breaker, {"cap": -1}, "breaker.cap"),
        (Probes, {"hub": 0}, "probes.hub"),
        (Probes, {"peers": "often"}, "probes.peers"),
        (Probes, {"suspect": 0}, "probes.suspect"),
        (Probes, {"timeout": 0}, "probes.timeout"),
        (Probes, {"jitter": 1}, "probes.jitter must be from 0 to below 1, not 1"),
        (Probes, {"misses": 0}, "probes.misses"),
        (Failback, {"hold": -1}, "failback.hold"),
        (Failback, {"cap": math.nan}, "failback.cap"),
        (Failback, {"spread": -1}, "failback.spread"),
        (Failback, {"ramp": MAX_TIMEOUT * 2}, "failback.ramp"),
        (Failback, {"evidence": 0}, "failback.evidence"),
    ],
)
def test_a_policy_refuses_what_makes_no_sense(policy: Any, wrong: dict[str, object], why: str) -> None:
    """The error names the setting, what was expected and what was found."""
    with pytest.raises(ConfigurationError, match=why):
        policy(**wrong)


def test_the_defaults_are_those_of_the_documentation() -> None:
    """A default that is told in docs/explanation/resilience.md is held here."""
    assert Settings().timeout == 5.0
    assert Retry() == Retry(attempts=3, attempt_timeout=2.0, base=0.05, cap=2.0, throttled_base=1.0, throttled_cap=20.0)
    assert Pool() == Pool(per_daemon=20, total=100, wait=0.5, connect=1.0, idle=4.0, drain=10.0)
    assert Budget() == Budget(share=0.1, window=10.0, reserve=10.0, per_second=1.0)
    assert Hedge() == Hedge(quantile=0.95, share=0.05, samples=100, overdue=4.0, overdue_least=0.05)
    assert Breaker() == Breaker(incidents=5, rate=0.5, volume=20, window=10.0, open=5.0, cap=60.0, proofs=3)
    assert Probes() == Probes(hub=5.0, peers=30.0, suspect=1.0, jitter=0.2, timeout=0.5, misses=3)
    assert Failback() == Failback(hold=30.0, cap=600.0, evidence=3, spread=60.0, ramp=60.0)


def test_a_client_has_every_policy_unless_told_otherwise() -> None:
    """The defaults are on; each may be turned off by None."""
    defaults = BustcallClient.__init__.__kwdefaults__
    assert defaults is not None
    told = {name: defaults[name] for name in ("retry", "hedge", "breaker", "budget", "probes", "failback")}
    assert list(told.values()) == [Retry(), Hedge(), Breaker(), Budget(), Probes(), Failback()]


def test_times_are_finite_seconds() -> None:
    """A day is the most; a longer time is a mistake of units."""
    assert check_seconds(3, "timeout") == 3.0
    assert check_seconds(MAX_TIMEOUT, "timeout") == MAX_TIMEOUT
    for nonsense in (True, "3", None, 0, -1, float("inf"), float("nan"), MAX_TIMEOUT * 2):
        with pytest.raises(ConfigurationError, match="timeout must be"):
            check_seconds(nonsense, "timeout")


# The window


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5))))
def test_a_window_holds_the_last_seconds_and_nothing_older(steps: list[tuple[float, int]]) -> None:
    """Everything of the last nine tenths of the span counts, nothing older than the span, whenever it is asked."""
    window, now, added = _Window(10.0), 0.0, list[tuple[float, int]]()
    for pause, amount in steps:
        now += pause
        window.add(now, amount)
        added.append((now, amount))
        recent = sum(amount for time, amount in added if now - time < 9)
        assert recent <= window.total(now) <= sum(amount for time, amount in added if now - time < 10)
    assert window.total(now + 10) == 0


def test_a_window_that_nobody_asks_does_not_grow() -> None:
    """A daemon that never fails is never asked for its total: its window must forget all the same."""
    window = _Window(10.0)
    for second in range(100_000):
        window.add(float(second))
    assert len(window._slots) <= 10
    assert window.total(99_999.0) == 10


# The budget


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 4), st.integers(0, 40), st.integers(0, 40)), max_size=40),
    st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 3.5]),
    st.sampled_from([0.0, 10.0]),
)
def test_the_budget_never_pays_more_than_its_share(
    steps: list[tuple[float, int, int]], share: float, per_second: float, reserve: float
) -> None:
    """In every span of time: at most share * calls (of it and of the window before) + per_second * t + reserve."""
    budget = SharedBudget(Budget(share=share, reserve=reserve, per_second=per_second))
    now, calls, taken = 0.0, list[tuple[float, int]](), list[tuple[float, int]]()
    for pause, called, wanted in steps:
        now += pause
        for _ in range(called):
            budget.called(now)
        calls.append((now, called))
        affordable = budget.affords(now)
        got = [budget.take(now) for _ in range(wanted)]
        assert not wanted or got[0] is affordable
        assert got == sorted(got, reverse=True), "what was denied is not paid in the same moment"
        taken.append((now, sum(got)))
    for first, last in combinations_with_replacement(range(len(taken)), 2):
        begin, end = taken[first][0], taken[last][0]
        spent = sum(amount for _, amount in taken[first : last + 1])
        earned = share * sum(amount for time, amount in calls if begin - 10 < time <= end)
        assert spent <= earned + per_second * (end - begin) + reserve + 1e-6


def test_the_reserve_refills_with_time_and_not_beyond_itself() -> None:
    """10 at once, then one a second; an hour of rest makes it 10 again."""
    budget = SharedBudget(Budget())
    assert sum(budget.take(100.0) for _ in range(50)) == 10
    assert not budget.affords(100.9)
    assert sum(budget.take(103.0) for _ in range(50)) == 3
    assert sum(budget.take(3703.0) for _ in range(50)) == 10


def test_a_share_of_the_calls_is_earned_for_as_long_as_they_are_recent() -> None:
    """100 calls earn 10 sends beside the reserve; 10 s later they earn nothing."""
    budget = SharedBudget(Budget(per_second=0.0))
    for _ in range(100):
        budget.called(5.0)
    assert sum(budget.take(6.0) for _ in range(50)) == 20
    for _ in range(100):
        budget.called(20.0)
    assert not budget.affords(30.0)


def test_the_level_of_the_budget_is_what_is_left_of_it() -> None:
    """1 for all of it, 0 for nothing, also where there was never anything."""
    budget = SharedBudget(Budget(per_second=0.0))
    assert budget.level(0.0) == 1.0
    for _ in range(100):
        budget.called(0.0)
    assert budget.level(0.0) == 1.0
    for _ in range(5):
        budget.take(0.0)
    assert budget.level(0.0) == 0.75
    for _ in range(50):
        budget.take(0.0)
    assert budget.level(0.0) == 0.0
    assert SharedBudget(Budget(reserve=0.0, per_second=0.0)).level(0.0) == 0.0


def test_without_a_policy_the_budget_has_no_limit() -> None:
    """budget=None: everything is affordable, always."""
    budget = SharedBudget(None)
    budget.called(0.0)
    assert all(budget.take(0.0) for _ in range(1000))
    assert budget.affords(0.0)
    assert budget.level(0.0) == 1.0


# Hedges


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 4), st.integers(0, 120), st.integers(0, 20)), max_size=40))
def test_hedges_are_at_most_five_percent_of_the_calls(steps: list[tuple[float, int, int]]) -> None:
    """Over every span of time and the 10 s before it, and so from the beginning to any moment."""
    allowance = HedgeAllowance(Hedge(), SharedBudget(None))
    now, calls, hedges = 0.0, list[tuple[float, int]](), list[tuple[float, int]]()
    for pause, called, wanted in steps:
        now += pause
        for _ in range(called):
            allowance.called(now)
        calls.append((now, called))
        hedges.append((now, sum(allowance.take(now) for _ in range(wanted))))
        for begin in (-math.inf, *(time for time, _ in hedges)):
            made = sum(amount for time, amount in hedges if time >= begin)
            assert made <= 0.05 * sum(amount for time, amount in calls if time > begin - 10) + 1e-9
        last = sum(amount for time, amount in hedges if time > now - 9)
        assert last <= 0.05 * sum(amount for time, amount in calls if time > now - 10) + 1e-9 or not hedges[-1][1]


def test_hedges_are_off_while_the_budget_is_under_half() -> None:
    """And each costs the budget a send."""
    budget = SharedBudget(Budget(share=0.01, reserve=10.0, per_second=0.0))
    allowance = HedgeAllowance(Hedge(share=1.0), budget)
    for _ in range(50):
        allowance.called(0.0)
    assert sum(allowance.take(0.0) for _ in range(50)) == 6, "10, 9, 8, 7, 6 and 5 of 10 are half or more"
    assert budget.level(0.0) == 0.4
    poor = SharedBudget(Budget(share=0.1, reserve=0.6, per_second=0.0))
    allowance = HedgeAllowance(Hedge(share=1.0), poor)
    allowance.called(0.0)
    assert poor.level(0.0) == 1.0
    assert not allowance.take(0.0), "a budget may be full and still hold less than one send"


def test_without_a_policy_nothing_is_hedged() -> None:
    """hedge=None."""
    allowance = HedgeAllowance(None, SharedBudget(None))
    for _ in range(1000):
        allowance.called(0.0)
    assert not allowance.take(0.0)


# Latency


def test_the_usual_latency_is_known_after_a_hundred_answers_and_anew_after_every_twenty() -> None:
    """The p95 of the last 500."""
    latency = Latency(0.95, 100)
    for number in range(1, 100):
        latency.add(number / 100)
    assert latency.usual is None
    latency.add(1.0)
    assert latency.usual == 0.95
    for _ in range(19):
        latency.add(9.0)
    assert latency.usual == 0.95
    latency.add(9.0)
    assert latency.usual == 9.0
    for _ in range(500):
        latency.add(0.5)
    assert latency.usual == 0.5, "what was long ago is forgotten"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_at_least_the_quantile_of_the_answers_was_no_slower_than_usual(values: list[float], quantile: float) -> None:
    """And the usual latency was one of those that were met."""
    latency = Latency(quantile, len(values))
    for value in values:
        latency.add(value)
    assert latency.usual in values
    assert sum(value <= latency.usual for value in values) >= quantile * len(values) - 1e-9


# The breaker


@pytest.mark.parametrize(("state", "signal"), list(product(BreakerState, BreakerSignal)))
def test_every_pair_of_the_breakers_table(state: BreakerState, signal: BreakerSignal) -> None:
    """A pair of the table leads where it says; any other raises, and changes nothing."""
    circuit = Circuit(Breaker())
    circuit.state, circuit.reason = state, "why"
    if (state, signal) in BREAKER:
        circuit._move(signal)
        assert state_of(circuit) is BREAKER[state, signal]
        assert circuit.reason == ""
    else:
        with pytest.raises(KeyError):
            circuit._move(signal)
        assert (circuit.state, circuit.reason) == (state, "why")


def test_the_breakers_table_is_the_documented_one() -> None:
    """Only proof and reset close it, any state may panic, only good probes or reset end a quarantine."""
    into = {state: {signal for (_, signal), end in BREAKER.items() if end is state} for state in BreakerState}
    assert into[BreakerState.CLOSED] == {BreakerSignal.PROVEN, BreakerSignal.RESET}
    assert into[BreakerState.QUARANTINED] == {BreakerSignal.PANICKED}
    assert into[BreakerState.OPEN] == {BreakerSignal.TRIPPED, BreakerSignal.RELAPSED}
    assert all((state, signal) in BREAKER for state in BreakerState for signal in (BreakerSignal.PANICKED, "reset"))
    out = {signal for state, signal in BREAKER if state is BreakerState.QUARANTINED}
    assert out == {BreakerSignal.CLEARED, BreakerSignal.PANICKED, BreakerSignal.RESET}


def fail(circuit: Circuit, now: float, incidents: int = 1, *, counted: bool = True, trial: bool | None = None) -> None:
    """Send there and let it fail."""
    held = circuit.begin() if trial is None else trial
    circuit.failed(now, incidents, trial=held, counted=counted, random=half)


def opened(policy: Breaker | None = None, now: float = 0.0) -> Circuit:
    """Make a breaker that is open until now + 3.75."""
    circuit = Circuit(policy or Breaker())
    fail(circuit, now, 5)
    assert state_of(circuit) is BreakerState.OPEN
    return circuit


def test_five_incidents_in_a_row_open_it() -> None:
    """Four do not, nor do failures that are no new incident."""
    circuit = Circuit(Breaker())
    for number in range(1, 5):
        fail(circuit, number, number)
    fail(circuit, 5.0, 5, counted=False)
    assert state_of(circuit) is BreakerState.CLOSED
    fail(circuit, 6.0, 5)
    assert state_of(circuit) is BreakerState.OPEN
    assert not circuit.admits(6.0, vouched=True)


def test_half_of_twenty_within_ten_seconds_open_it() -> None:
    """Ten good and nine bad do not, ten and ten do; what is older does not count."""
    circuit = Circuit(Breaker())
    for _ in range(10):
        circuit.succeeded(1.0, trial=False)
    for _ in range(9):
        fail(circuit, 2.0)
    assert state_of(circuit) is BreakerState.CLOSED
    fail(circuit, 15.0)
    assert state_of(circuit) is BreakerState.CLOSED, "the others are forgotten"
    for _ in range(10):
        circuit.succeeded(16.0, trial=False)
    for _ in range(9):
        fail(circuit, 17.0)
    assert state_of(circuit) is BreakerState.OPEN


def test_it_opens_for_longer_each_time_with_equal_jitter() -> None:
    """5, 10, 20, 40, 60, 60 s, of each at least half; once closed, it begins anew."""
    for chance, part in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        circuit = Circuit(Breaker())
        circuit.failed(0.0, 5, trial=False, counted=True, random=lambda chance=chance: chance)  # type: ignore[misc]
        waits = [circuit.until]
        for _ in range(5):
            now = circuit.until
            assert circuit.admits(now, vouched=True)
            circuit.failed(now, 5, trial=circuit.begin(), counted=True, random=lambda chance=chance: chance)  # type: ignore[misc]
            waits.append(circuit.until - now)
        assert waits == [pytest.approx(part * longest) for longest in (5, 10, 20, 40, 60, 60)]
    now = circuit.until
    prove(circuit, now)
    fail(circuit, now + 1, 5)
    assert circuit.until == pytest.approx(now + 1 + 3.75)


def prove(circuit: Circuit, now: float) -> None:
    """Let three trials succeed, one after another."""
    for _ in range(3):
        assert state_of(circuit) is not BreakerState.CLOSED
        assert circuit.admits(now, vouched=True)
        trial = circuit.begin()
        assert trial
        assert not circuit.admits(now, vouched=True), "one trial at a time"
        circuit.succeeded(now, trial=trial)
    assert state_of(circuit) is BreakerState.CLOSED


def test_it_becomes_half_open_when_its_time_is_over_and_no_probe_speaks_against_it() -> None:
    """No call is spent on a daemon that is known not to answer."""
    circuit = opened()
    assert not circuit.admits(3.7, vouched=True)
    assert not circuit.admits(60.0, vouched=False)
    assert circuit.admits(60.0, vouched=True)
    prove(circuit, 60.0)


def test_a_trial_that_fails_opens_it_again_and_one_that_says_nothing_does_not() -> None:
    """One success more or less is no proof."""
    circuit = opened()
    assert circuit.admits(4.0, vouched=True)
    circuit.released(trial=circuit.begin())
    circuit.succeeded(4.0, trial=circuit.begin())
    circuit.succeeded(4.0, trial=circuit.begin())
    fail(circuit, 4.0, counted=False)
    assert state_of(circuit) is BreakerState.OPEN
    prove(circuit, 20.0)


def test_a_call_that_passes_an_open_breaker_and_succeeds_is_the_first_proof() -> None:
    """One daemon only: after its recovery it is not refused until its time is over."""
    circuit = opened()
    trial = circuit.begin()
    assert trial
    circuit.succeeded(1.0, trial=trial)
    assert state_of(circuit) is BreakerState.HALF_OPEN
    for _ in range(2):
        assert circuit.admits(1.0, vouched=False)
        circuit.succeeded(1.0, trial=circuit.begin())
    assert state_of(circuit) is BreakerState.CLOSED


def test_a_call_that_passes_an_open_breaker_and_fails_prolongs_it_only_once_its_time_is_over() -> None:
    """Else a call a second would keep it open for ever."""
    circuit = opened()
    fail(circuit, 2.0)
    assert circuit.until == 3.75
    fail(circuit, 4.0)
    assert circuit.until == 4.0 + 7.5


def test_answers_to_what_was_sent_before_it_opened_prove_nothing() -> None:
    """Forty stragglers of an overloaded daemon do not close what half of the calls failing has just opened."""
    circuit = Circuit(Breaker())
    held = [circuit.begin() for _ in range(40)]
    assert not any(held)
    fail(circuit, 1.0, 5)
    for trial in held[:20]:
        circuit.succeeded(1.1, trial=trial)
    assert state_of(circuit) is BreakerState.OPEN
    assert circuit.admits(10.0, vouched=True)
    for trial in held[20:]:
        circuit.succeeded(10.1, trial=trial)
    assert state_of(circuit) is BreakerState.HALF_OPEN
    prove(circuit, 11.0)


def test_a_quarantine_lets_nothing_through_until_it_is_cleared_or_reset() -> None:
    """Time does not end it; after good probes trials decide, after a reset nothing is left of it."""
    for end in ("clear", "reset"):
        circuit = Circuit(Breaker())
        circuit.quarantine("certificate")
        assert circuit.reason == "certificate"
        assert not circuit.admits(1e9, vouched=True)
        fail(circuit, 1.0, 9)
        circuit.succeeded(1.0, trial=True)
        assert state_of(circuit) is BreakerState.QUARANTINED
        circuit._trials = 0
        getattr(circuit, end)()
        assert state_of(circuit) is (BreakerState.HALF_OPEN if end == "clear" else BreakerState.CLOSED)
        assert circuit.reason == ""
        assert circuit.admits(2.0, vouched=True)


def test_without_a_policy_it_never_opens_and_one_trial_ends_a_quarantine() -> None:
    """breaker=None: only PANIC closes the way."""
    circuit = Circuit(None)
    for number in range(100):
        fail(circuit, number, number)
    assert state_of(circuit) is BreakerState.CLOSED
    circuit.quarantine("")
    circuit.clear()
    fail(circuit, 101.0, 9)
    assert circuit.admits(102.0, vouched=True)
    circuit.succeeded(102.0, trial=circuit.begin())
    assert state_of(circuit) is BreakerState.CLOSED


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["board", "force", "good", "bad", "none", "panic", "clear", "reset"]),
            st.integers(0, 9),
            st.floats(0, 8),
            st.integers(1, 8),
            st.booleans(),
        ),
        max_size=120,
    ),
    st.booleans(),
)
def test_it_never_sticks_in_whatever_order_flights_end(  # noqa: PLR0912 - one branch for each event
    steps: list[tuple[str, int, float, int, bool]], configured: bool
) -> None:
    """Trials are exactly those under way; when all have ended, it can be closed by three more."""
    circuit = Circuit(Breaker() if configured else None)
    flights: list[bool] = []
    now = 0.0
    for what, which, pause, incidents, flag in steps:
        now += pause
        if what == "force" or (what == "board" and circuit.admits(now, vouched=flag)):
            flights.append(circuit.begin())
        elif what == "panic":
            circuit.quarantine("")
        elif what == "clear" and circuit.state is BreakerState.QUARANTINED:
            circuit.clear()
        elif what == "reset":
            circuit.reset()
        elif what in {"good", "bad", "none"} and flights:
            trial = flights.pop(which % len(flights))
            if what == "good":
                circuit.succeeded(now, trial=trial)
            elif what == "bad":
                circuit.failed(now, incidents, trial=trial, counted=flag, random=half)
            else:
                circuit.released(trial=trial)
        assert circuit._trials == sum(flights)
    for trial in flights:
        circuit.released(trial=trial)
    assert circuit._trials == 0
    if circuit.state is BreakerState.QUARANTINED:
        circuit.clear()
    now = max(now, circuit.until)
    for _ in range(3):
        if circuit.state is not BreakerState.CLOSED:
            assert circuit.admits(now, vouched=True)
            circuit.succeeded(now, trial=circuit.begin())
    assert state_of(circuit) is BreakerState.CLOSED
