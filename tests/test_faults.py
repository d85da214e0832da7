"""The fault scale: its laws over the whole finite domain, its table, its worked cases."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.errors import InvalidRequest
from pybustcall.faults import (
    CLEAN,
    OVERSIGHT,
    TABLE,
    AttemptFailed,
    Band,
    Fault,
    FaultKind,
    Incidents,
    Outcome,
    Oversight,
    Same,
    band_of,
    call_stage,
    check_stage,
    check_tolerance,
    escalate,
    kind_of_status,
    meet,
    raises,
)
from pybustcall.results import BustResult

STAGES = range(13)
stages = st.integers(0, 12)
incidents = st.integers(0, 40)

pytestmark = pytest.mark.requirement("RES-05")


def test_bands_are_half_open_but_for_the_last() -> None:
    """PANIC [0,3), EXCEPTION [3,6), WARNING [6,9), SILENT [9,12]."""
    expected = [Band.PANIC] * 3 + [Band.EXCEPTION] * 3 + [Band.WARNING] * 3 + [Band.SILENT] * 4
    assert [band_of(stage) for stage in STAGES] == expected


@pytest.mark.requirement("INT-14")
def test_each_band_has_a_level_of_oversight_that_every_bust_records() -> None:
    """The worse the band, the more it asks of people."""
    levels = [BustResult("a", "failed", stage).oversight for stage in range(13)]
    expected = [Oversight.HALTED] * 3 + [Oversight.REVIEWED] * 3 + [Oversight.NOTIFIED] * 3 + [Oversight.AUTONOMOUS] * 4
    assert levels == expected
    assert OVERSIGHT.keys() == set(Band)


@pytest.mark.parametrize("stage", [-1, 13, True, False, 6.0, "6", None, float("nan")])
def test_what_is_no_stage_is_refused_where_it_enters(stage: object) -> None:
    """Bool, float, text and anything out of range is no stage and no tolerance."""
    with pytest.raises(ValueError, match="integer from 0 to 12"):
        check_stage(stage)
    with pytest.raises(InvalidRequest, match="fault_tolerance must be an integer from 0 to 12") as caught:
        check_tolerance(stage)
    assert caught.value.field == "fault_tolerance"


def test_every_stage_is_accepted() -> None:
    """0 to 12 are stages."""
    assert [check_stage(stage) for stage in STAGES] == list(STAGES)


def test_meet_is_associative_commutative_and_idempotent_with_identity_12() -> None:
    """(stages, meet, 12) is a bounded meet-semilattice, over every triple of stages."""
    for a, b, c in product(STAGES, repeat=3):
        assert meet([meet([a, b]), c]) == meet([a, meet([b, c])])
        assert meet([a, b]) == meet([b, a])
        assert meet([a, a]) == a
        assert meet([a, CLEAN]) == a
    assert meet([]) == CLEAN


@given(st.lists(stages), st.randoms())
def test_the_meet_of_a_sequence_does_not_depend_on_order_or_repetition(faults: list[int], random: Any) -> None:
    """Shuffling the faults of a call, or seeing one twice, changes nothing."""
    shuffled = [*faults, *faults[:3]]
    random.shuffle(shuffled)
    assert meet(shuffled) == meet(faults)


def test_escalation_is_an_action_of_addition_over_the_whole_domain() -> None:
    """escalate(s, 0) = s, and escalating twice adds up."""
    for stage in STAGES:
        assert escalate(stage, 0) == stage
        for a, b in product(range(15), repeat=2):
            assert escalate(escalate(stage, a), b) == escalate(stage, a + b)


def test_escalation_keeps_order_falls_in_n_and_distributes_over_meet() -> None:
    """A worse fault stays worse, more incidents are never better, and it does not matter what is done first."""
    for a, b, n in product(STAGES, STAGES, range(15)):
        assert (escalate(a, n) <= escalate(b, n)) or a > b
        assert escalate(a, n + 1) <= escalate(a, n)
        assert escalate(meet([a, b]), n) == meet([escalate(a, n), escalate(b, n)])


@given(stages, st.lists(incidents, max_size=6))
def test_escalating_step_by_step_equals_escalating_at_once(stage: int, steps: list[int]) -> None:
    """A sequence of escalations is one escalation by their sum."""
    stepwise = stage
    for step in steps:
        stepwise = escalate(stepwise, step)
    assert stepwise == escalate(stage, sum(steps))


def test_a_daemon_that_keeps_refusing_goes_through_all_bands() -> None:
    """8, 7, 6 (WARNING), 5, 4, 3 (EXCEPTION), 2, 1, 0 (PANIC)."""
    path = [escalate(TABLE[FaultKind.UNREACHABLE].stage, n) for n in range(10)]
    assert path == [8, 7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_incidents_are_never_negative() -> None:
    """A negative count of incidents is a mistake and not an improvement."""
    with pytest.raises(ValueError, match="counted from 0"):
        escalate(5, -1)


def test_a_call_stays_in_the_band_of_its_outcome_whatever_happened() -> None:
    """Acknowledged is SILENT, kept is WARNING, failed is EXCEPTION or PANIC, for every pair of faults."""
    for a, b in product(STAGES, repeat=2):
        assert band_of(call_stage(Outcome.ACKNOWLEDGED, [a, b])) is Band.SILENT
        assert band_of(call_stage(Outcome.KEPT, [a, b])) is Band.WARNING
        assert band_of(call_stage(Outcome.FAILED, [a, b])) in {Band.EXCEPTION, Band.PANIC}


def test_a_better_outcome_never_has_a_worse_stage() -> None:
    """Whatever the faults, acknowledged is above kept, and kept above failed."""
    for left, right in product(product(STAGES, repeat=2), repeat=2):
        acknowledged = call_stage(Outcome.ACKNOWLEDGED, left)
        kept = call_stage(Outcome.KEPT, right)
        assert acknowledged > kept > call_stage(Outcome.FAILED, left)


def test_a_call_without_any_fault_is_clean() -> None:
    """No fault, acknowledged: 12."""
    assert call_stage(Outcome.ACKNOWLEDGED, []) == CLEAN


@given(st.lists(stages), stages, st.sampled_from(Outcome))
def test_a_further_fault_never_makes_a_call_better(faults: list[int], further: int, outcome: Outcome) -> None:
    """Stages of calls fall with every fault, or stay."""
    assert call_stage(outcome, [*faults, further]) <= call_stage(outcome, faults)


def test_a_call_raises_iff_its_stage_is_below_twelve_minus_tolerance() -> None:
    """T = 0 accepts only clean success, 3 acknowledged ones, 6 also kept ones, 12 everything."""
    for stage, tolerance in product(STAGES, STAGES):
        assert raises(stage, tolerance) is (stage < 12 - tolerance)
    assert [stage for stage in STAGES if not raises(stage, 0)] == [12]
    assert [stage for stage in STAGES if not raises(stage, 3)] == [9, 10, 11, 12]
    assert [stage for stage in STAGES if not raises(stage, 6)] == [6, 7, 8, 9, 10, 11, 12]
    assert not any(raises(stage, 12) for stage in STAGES)


def test_more_tolerance_never_raises_more() -> None:
    """Raising is monotone in the stage and in the tolerance."""
    for stage, tolerance in product(range(12), range(12)):
        assert raises(stage, tolerance) or not raises(stage, tolerance + 1)
        assert raises(stage, tolerance) or not raises(stage + 1, tolerance)


ROWS = {
    FaultKind.SLOW: (10, Same.NEVER, False),
    FaultKind.NO_SLOT: (8, Same.WHILE_TIME, False),
    FaultKind.UNREACHABLE: (8, Same.BACKOFF, True),
    FaultKind.DISCONNECTED: (8, Same.BACKOFF, True),
    FaultKind.TIMED_OUT: (8, Same.AFTER_OTHERS, True),
    FaultKind.THROTTLED: (8, Same.LATER, True),
    FaultKind.SERVER_ERROR: (7, Same.ONCE, True),
    FaultKind.MALFORMED: (5, Same.NEVER, True),
    FaultKind.BREAKER_OPEN: (5, Same.NEVER, True),
    FaultKind.REJECTED: (4, Same.NEVER, False),
    FaultKind.NOT_THIS_SERVICE: (3, Same.NEVER, True),
    FaultKind.TOKEN_REFUSED: (3, Same.NEVER, True),
    FaultKind.NOT_ALLOWED: (3, Same.NEVER, False),
    FaultKind.INCOMPATIBLE: (3, Same.NEVER, True),
    FaultKind.UNSUPPORTED: (3, Same.NEVER, True),
    FaultKind.CERTIFICATE: (1, Same.NEVER, False),
}


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize("kind", FaultKind)
def test_every_kind_of_failure_has_the_row_of_the_model(kind: FaultKind) -> None:
    """Kind -> stage -> same daemon again -> next daemon, as docs/explanation/fault-model.md says."""
    row = TABLE[kind]
    assert (row.stage, row.same, row.next) == ROWS[kind]
    fault = Fault(kind, "http://d", "m", "no")
    assert fault.stage == row.stage
    assert fault.band is band_of(row.stage)


def test_what_says_nothing_of_a_daemons_health_is_no_incident() -> None:
    """Slowness, slots, 429, refused or forbidden requests and incompatibility neither escalate nor feed a breaker."""
    harmless = {kind for kind, row in TABLE.items() if not row.incident}
    assert harmless == {
        FaultKind.SLOW,
        FaultKind.NO_SLOT,
        FaultKind.THROTTLED,
        FaultKind.REJECTED,
        FaultKind.NOT_ALLOWED,
        FaultKind.INCOMPATIBLE,
        FaultKind.UNSUPPORTED,
        FaultKind.BREAKER_OPEN,
    }


@pytest.mark.parametrize(("status", "incident"), [(503, True), (429, False), (425, False)])
def test_503_speaks_against_a_daemon_and_429_does_not(status: int, incident: bool) -> None:
    """It is unavailable, or we ask too much of it."""
    assert Fault(FaultKind.THROTTLED, "d", "m", "no", status=status).is_incident is incident


STATUSES = {
    200: None,
    201: FaultKind.MALFORMED,
    202: FaultKind.MALFORMED,
    204: FaultKind.MALFORMED,
    301: FaultKind.MALFORMED,
    307: FaultKind.MALFORMED,
    400: FaultKind.REJECTED,
    401: FaultKind.TOKEN_REFUSED,
    403: FaultKind.NOT_ALLOWED,
    404: FaultKind.NOT_THIS_SERVICE,
    405: FaultKind.NOT_THIS_SERVICE,
    408: FaultKind.DISCONNECTED,
    413: FaultKind.REJECTED,
    415: FaultKind.REJECTED,
    418: FaultKind.REJECTED,
    422: FaultKind.REJECTED,
    426: FaultKind.INCOMPATIBLE,
    429: FaultKind.THROTTLED,
    500: FaultKind.SERVER_ERROR,
    501: FaultKind.NOT_THIS_SERVICE,
    502: FaultKind.SERVER_ERROR,
    503: FaultKind.THROTTLED,
    504: FaultKind.SERVER_ERROR,
    999: FaultKind.MALFORMED,
    100: FaultKind.MALFORMED,
}


@pytest.mark.requirement("RES-10")
@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_every_http_status_has_a_kind(status: int, kind: FaultKind | None) -> None:
    """Only 200 is success; an unknown 4xx is a refused request, as RFC 9110 treats it."""
    assert kind_of_status(status) is kind


def test_every_status_there_is_can_be_classified() -> None:
    """No status makes the classification fail, and 200 alone is no fault."""
    assert [status for status in range(1000) if kind_of_status(status) is None] == [200]


# Incidents in a row of one daemon


@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("before", range(13))
def test_an_escalated_fault_makes_a_call_panic_only_if_it_starts_there(kind: FaultKind, before: int) -> None:
    """Of the daemon it tells the whole escalation, of the call no lower than 3."""
    met = Fault(kind, "http://d", "m", "no", incidents=before)
    base = TABLE[kind].stage
    assert met.stage == max(0, base - before)
    assert met.band is band_of(met.stage)
    assert met.stage_for_call == (max(met.stage, 3) if base >= 3 else base)
    assert (band_of(met.stage_for_call) is Band.PANIC) is (base < 3)


def test_a_fault_tells_its_daemon_and_what_happened() -> None:
    """As text."""
    met = Fault(FaultKind.SLOW, "http://d", "it was slow", "no")
    assert str(met) == str(AttemptFailed(met)) == "http://d: it was slow"
    assert AttemptFailed(met).fault is met


def test_concurrent_failures_of_one_outage_are_one_incident() -> None:
    """Fifty attempts under way when the daemon dies: one; the next that begins after it: another."""
    one = Incidents()
    assert one.failed(0.0, 1.0) == (0, True)
    assert [one.failed(0.0 + number / 50, 1.0 + number / 100) for number in range(49)] == [(0, False)] * 49
    assert one.count(2.0) == 1
    assert one.failed(1.0, 2.0) == (0, False), "it began when the counted one ended, not after"
    assert one.failed(1.1, 2.0) == (1, True)
    assert one.failed(1.2, 2.1) == (1, False)
    assert one.count(2.1) == 2


def test_a_success_forgets_all_incidents_and_half_a_minute_forgets_one() -> None:
    """The count falls by 1 per 30 s without a failure, even one that is not counted; never below 0."""
    one = Incidents()
    assert one.count(0.0) == 0
    for number in range(4):
        one.failed(number + 0.5, number + 1.0)
    assert one.count(33.9) == 4
    assert one.count(34.0) == 3
    assert one.count(63.9) == 3
    assert one.failed(0.0, 63.9) == (2, False)
    assert one.count(93.8) == 3
    assert one.count(93.9) == 2
    assert one.failed(94.0, 95.0) == (2, True)
    assert one.count(1e6) == 0
    one.failed(1e6 + 1, 1e6 + 2)
    one.succeeded()
    assert one.count(1e6 + 2) == 0
    assert one.failed(1e6 + 1.5, 1e6 + 2) == (0, False), "of an outage that was over"


@given(
    st.lists(
        st.tuples(st.sampled_from(["fails", "succeeds", "looks"]), st.floats(0, 70), st.floats(0, 100)), max_size=60
    )
)
def test_incidents_are_counted_as_the_model_says(steps: list[tuple[str, float, float]]) -> None:
    """Against the plainest possible model: the count, when it was counted last, and when a failure was met last."""
    one, now = Incidents(), 0.0
    count, ended, since = 0, float("-inf"), 0.0
    for what, pause, age in steps:
        now += pause
        while count and now - since >= 30:
            count, since = count - 1, since + 30
        if what == "succeeds":
            one.succeeded()
            count = 0
        elif what == "fails":
            new = now - age > ended
            expected = count if new else max(0, count - 1)
            assert one.failed(now - age, now) == (expected, new)
            count, ended, since = count + new, now if new else ended, now
        assert one.count(now) == count


def test_a_result_shows_what_was_busted_and_how_much() -> None:
    """Its kind where that is no key, the number that went or would go, and the job that goes on."""
    shown = repr(BustResult("cdn", "accepted", 8, kind="prefix", removed=3, job="f00", reveal=True))
    assert shown.startswith("BustResult(prefix 'cdn' accepted, stage=8")
    assert ", removed=3, job=f00, daemon=None" in shown
    dry = repr(BustResult("cdn/a", "dry_run", 12, dry_run=True, removed=0, matched=7, reveal=True))
    assert dry.startswith("BustResult('cdn/a' dry_run, stage=12")
    assert ", matched=7, daemon" in dry
    assert "removed" not in dry
