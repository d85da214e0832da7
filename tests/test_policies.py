"""Policies: the values, the waits, and the plan of one call walked through whole scenarios without a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.errors import ConfigurationError
from pybustcall.faults import Fault, FaultKind
from pybustcall.policies import (
    MAX_TIMEOUT,
    CallPlan,
    Pool,
    Retry,
    Send,
    Stop,
    Wait,
    ceiling,
    check_seconds,
    full_jitter,
)


def highest() -> float:
    """Stand in for a random number: just below 1, so that every wait is its ceiling."""
    return 1.0


def lowest() -> float:
    """Stand in for a random number: 0, so that nothing waits."""
    return 0.0


def fault(kind: FaultKind, retry_after: float | None = None) -> Fault:
    """Make a fault of this kind."""
    return Fault(kind, "http://d", "it failed", "no", retry_after=retry_after)


@dataclass
class Walk:
    """What a plan did against daemons that fail as scripted: (time, daemon) of each attempt, and the ending."""

    sends: list[tuple[float, int]]
    ending: str
    end: float

    @property
    def order(self) -> list[int]:
        """Who was asked, in order."""
        return [daemon for _, daemon in self.sends]


Script = dict[int, Iterator[tuple[Fault, float]]]


def always(kind: FaultKind, taking: float = 0.0, retry_after: float | None = None) -> Iterator[tuple[Fault, float]]:
    """Script a daemon that fails the same way each time, after so many seconds; inf for until the attempt ends."""
    while True:
        yield fault(kind, retry_after), taking


def walk(
    script: Script,
    *,
    timeout: float = 5.0,
    retry: Retry | None = Retry(),  # noqa: B008 - frozen
    random: Callable[[], float] = lowest,
) -> Walk:
    """Run a plan to its end with a clock that only it moves."""
    plan = CallPlan(len(script), deadline=timeout, retry=retry)
    now, sends = 0.0, []
    for _ in range(1000):
        match plan.next_step(now):
            case Send(daemon, until):
                sends.append((now, daemon))
                failed, taking = next(script[daemon])
                assert now < until <= timeout
                now = min(now + taking, until)
                plan.record(daemon, failed, now, random)
            case Wait(until):
                assert now < until < timeout
                now = until
            case Stop(ending):
                return Walk(sends, ending, now)
    raise AssertionError("the plan never ends")


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(
    ("kind", "order", "ending"),
    [
        (FaultKind.UNREACHABLE, [0, 0, 0, 1, 1, 1], "exhausted"),
        (FaultKind.DISCONNECTED, [0, 0, 0, 1, 1, 1], "exhausted"),
        (FaultKind.TIMED_OUT, [0, 1, 0, 1, 0, 1], "exhausted"),
        (FaultKind.THROTTLED, [0, 1, 0, 1, 0, 1], "exhausted"),
        (FaultKind.SERVER_ERROR, [0, 0, 1, 1], "exhausted"),
        (FaultKind.MALFORMED, [0, 1], "exhausted"),
        (FaultKind.NOT_THIS_SERVICE, [0, 1], "exhausted"),
        (FaultKind.TOKEN_REFUSED, [0, 1], "exhausted"),
        (FaultKind.INCOMPATIBLE, [0, 1], "exhausted"),
        (FaultKind.BREAKER_OPEN, [0, 1], "exhausted"),
        (FaultKind.REJECTED, [0], "halted"),
        (FaultKind.NOT_ALLOWED, [0], "halted"),
        (FaultKind.CERTIFICATE, [0], "halted"),
    ],
)
def test_each_kind_of_fault_is_followed_as_its_row_says(kind: FaultKind, order: list[int], ending: str) -> None:
    """Two daemons that always fail this way: who is asked, how often, in which order, and how it ends."""
    walked = walk({0: always(kind), 1: always(kind)})
    assert (walked.order, walked.ending) == (order, ending)


def test_no_slot_is_waited_for_at_the_same_daemon_until_the_deadline() -> None:
    """Our own load is no reason to fail over, and does not use up attempts."""
    walked = walk({0: always(FaultKind.NO_SLOT, 0.5), 1: always(FaultKind.MALFORMED)})
    assert walked.ending == "deadline"
    assert set(walked.order) == {0}
    assert 10 <= len(walked.sends) <= 20


def test_a_timeout_sends_the_call_to_the_untried_daemons_first() -> None:
    """Hub hangs, first peer refuses, second hangs: each in turn, then those that may be asked again."""
    script = {
        0: always(FaultKind.TIMED_OUT, float("inf")),
        1: always(FaultKind.MALFORMED),
        2: always(FaultKind.TIMED_OUT, float("inf")),
    }
    assert walk(script, timeout=60.0).order == [0, 1, 2, 0, 2, 0, 2]


def test_an_attempt_gets_half_of_what_is_left_while_a_daemon_is_untried() -> None:
    """min(2, half of what is left) while an untried daemon remains, else min(2, left)."""
    plan = CallPlan(2, deadline=3.0, retry=Retry())
    assert plan.next_step(0.0) == Send(0, 1.5)
    plan.record(0, fault(FaultKind.TIMED_OUT), 1.5, lowest)
    assert plan.next_step(1.5) == Send(1, 3.0)
    long = CallPlan(2, deadline=100.0, retry=Retry())
    assert long.next_step(0.0) == Send(0, 2.0)


def test_a_black_holed_hub_leaves_time_for_every_peer() -> None:
    """Three daemons that never answer, 5 s: each is asked, and the call ends at its deadline, not later."""
    walked = walk({n: always(FaultKind.TIMED_OUT, float("inf")) for n in range(3)})
    assert walked.order[:3] == [0, 1, 2]
    assert walked.ending == "deadline"
    assert walked.end == 5.0


@pytest.mark.requirement("IMP-02")
def test_backoffs_double_inside_their_cap() -> None:
    """The jitter lies inside the ceiling: base, doubled each time, never above the cap."""
    walked = walk({0: always(FaultKind.UNREACHABLE)}, retry=Retry(attempts=8, base=0.05, cap=0.5), random=highest)
    times = [time for time, _ in walked.sends]
    waits = [round(later - earlier, 9) for earlier, later in pairwise(times)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5, 0.5]


@given(st.integers(1, 10**9), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_no_wait_is_above_the_cap(failures: int, base: float, cap: float, chance: float) -> None:
    """Whatever the count of failures, 0 <= wait <= cap, and the ceiling never falls."""
    wait = full_jitter(failures, base, cap, lambda: chance)
    assert 0 <= wait <= cap
    assert ceiling(failures, base, cap) <= ceiling(failures + 1, base, cap)


def test_retry_after_is_honoured_within_the_deadline() -> None:
    """The daemon said 2 s: it is asked again after 2 s, not before."""
    walked = walk({0: always(FaultKind.THROTTLED, retry_after=2.0)})
    assert walked.sends == [(0.0, 0), (2.0, 0), (4.0, 0)]


def test_a_retry_after_beyond_the_deadline_ends_the_call_at_once() -> None:
    """Nobody sleeps through a deadline for nothing: the caller gets his time back."""
    walked = walk({0: always(FaultKind.THROTTLED, retry_after=60.0)})
    assert (walked.sends, walked.ending, walked.end) == ([(0.0, 0)], "exhausted", 0.0)


def test_throttling_without_a_word_backs_off_longer() -> None:
    """U(0, 1), then U(0, 2): three attempts fit into 5 s."""
    walked = walk({0: always(FaultKind.THROTTLED)}, random=highest)
    assert walked.sends == [(0.0, 0), (1.0, 0), (3.0, 0)]


def test_a_throttled_hub_hands_over_to_its_peers_at_once() -> None:
    """The hub wants 2 s of rest; the peer is asked without waiting."""
    script = {0: always(FaultKind.THROTTLED, retry_after=2.0), 1: always(FaultKind.MALFORMED)}
    assert walk(script).sends == [(0.0, 0), (0.0, 1), (2.0, 0), (4.0, 0)]


def test_without_a_retry_policy_each_daemon_is_asked_once() -> None:
    """retry=None turns retries off, not the peers."""
    walked = walk({0: always(FaultKind.UNREACHABLE), 1: always(FaultKind.TIMED_OUT)}, retry=None)
    assert walked.order == [0, 1]


def test_a_backoff_that_does_not_fit_passes_to_the_peers() -> None:
    """A wait that would reach the deadline is no wait: the untried peer is asked now."""
    retry = Retry(base=10.0, cap=10.0)
    script = {0: always(FaultKind.UNREACHABLE), 1: always(FaultKind.MALFORMED)}
    walked = walk(script, retry=retry, random=highest)
    assert (walked.order, walked.end) == ([0, 1], 0.0)


def test_a_call_whose_deadline_is_over_asks_nobody() -> None:
    """The deadline comes before everything else, but for a halt."""
    assert CallPlan(2, deadline=1.0, retry=Retry()).next_step(1.0) == Stop("deadline")
    halted = CallPlan(1, deadline=1.0, retry=Retry())
    halted.record(0, fault(FaultKind.CERTIFICATE), 2.0, lowest)
    assert halted.next_step(2.0) == Stop("halted")


kinds = st.sampled_from([kind for kind in FaultKind if kind is not FaultKind.SLOW])


@given(
    st.lists(st.lists(st.tuples(kinds, st.floats(0, 3)), min_size=40, max_size=40), min_size=1, max_size=4),
    st.floats(0.01, 20),
    st.integers(1, 4),
)
def test_every_plan_ends_and_keeps_its_bounds(
    scripts: list[list[tuple[FaultKind, float]]], timeout: float, attempts: int
) -> None:
    """Whatever fails however: nothing is sent after the deadline, nor more often than allowed, nor after a halt."""
    halting = {FaultKind.REJECTED, FaultKind.NOT_ALLOWED, FaultKind.CERTIFICATE}
    seen: list[FaultKind] = []

    def play(lines: list[tuple[FaultKind, float]]) -> Iterator[tuple[Fault, float]]:
        for kind, taking in lines:
            seen.append(kind)
            yield fault(kind), max(taking, 0.3) if kind is FaultKind.NO_SLOT else taking
        yield from always(FaultKind.MALFORMED)

    walked = walk(
        {number: play(lines) for number, lines in enumerate(scripts)},
        timeout=timeout,
        retry=Retry(attempts=attempts),
        random=highest,
    )
    counted = len(seen) - seen.count(FaultKind.NO_SLOT)
    assert counted <= attempts * len(scripts)
    assert all(kind not in halting for kind in seen[:-1])
    assert (walked.ending == "halted") == (bool(seen) and seen[-1] in halting)
    assert walked.end <= timeout


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"attempts": 0}, "retry.attempts must be an integer of at least 1, not 0"),
        ({"attempts": True}, "retry.attempts"),
        ({"attempts": 1.5}, "retry.attempts"),
        ({"attempt_timeout": 0}, "retry.attempt_timeout must be above 0"),
        ({"base": -1}, "retry.base must be from 0"),
        ({"cap": float("nan")}, "retry.cap"),
        ({"throttled_cap": "soon"}, "retry.throttled_cap must be a number of seconds, not 'soon'"),
    ],
)
def test_a_retry_policy_refuses_what_makes_no_sense(settings: dict[str, object], why: str) -> None:
    """The error names the setting, what was expected and what was found."""
    with pytest.raises(ConfigurationError, match=why):
        Retry(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"per_daemon": 0}, "pool.per_daemon"),
        ({"total": "many"}, "pool.total"),
        ({"wait": 0}, "pool.wait must be above 0"),
        ({"connect": float("inf")}, "pool.connect"),
        ({"idle": -1}, "pool.idle must be from 0"),
        ({"drain": None}, "pool.drain"),
    ],
)
def test_a_pool_refuses_what_makes_no_sense(settings: dict[str, object], why: str) -> None:
    """The error names the setting."""
    with pytest.raises(ConfigurationError, match=why):
        Pool(**settings)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_documentation() -> None:
    """A default that is told in docs/explanation/resilience.md is held here."""
    assert Retry() == Retry(attempts=3, attempt_timeout=2.0, base=0.05, cap=2.0, throttled_base=1.0, throttled_cap=20.0)
    assert Pool() == Pool(per_daemon=20, total=100, wait=0.5, connect=1.0, idle=4.0, drain=10.0)


def test_times_are_finite_seconds() -> None:
    """A day is the most; a longer time is a mistake of units."""
    assert check_seconds(3, "timeout") == 3.0
    assert check_seconds(MAX_TIMEOUT, "timeout") == MAX_TIMEOUT
    for nonsense in (True, "3", None, 0, -1, float("inf"), float("nan"), MAX_TIMEOUT * 2):
        with pytest.raises(ConfigurationError, match="timeout must be"):
            check_seconds(nonsense, "timeout")
