"""The fault history: it is bounded, denials are counted, and what the journal gives back is what was there."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybustcall.daemon.history import Fault, FaultHistory
from pybustcall.daemon.journal import Journal
from pybustcall.models import FaultRecord

SECOND = 1_000_000_000


class Desk:
    """A shelf in memory."""

    def __init__(self) -> None:
        self.places: dict[int, Fault] = {}
        self.changes = 0

    @property
    def faults(self) -> tuple[Fault, ...]:
        return tuple(self.places[place] for place in sorted(self.places))

    def put_fault(self, fault: Fault) -> None:
        self.places[fault.place] = fault
        self.changes += 1

    def drop_fault(self, place: int) -> None:
        del self.places[place]  # never one that is not there
        self.changes += 1


def restarted(desk: Desk, limit: int = 256) -> FaultHistory:
    history = FaultHistory(limit)
    history.attach(desk)
    return history


def told(history: FaultHistory) -> list[tuple[int, str, str]]:
    return [(it.fault_stage, it.binding, it.message) for it in history.records()]


def told_by(history: FaultHistory) -> list[tuple[str, str]]:
    return [(it.binding, it.message) for it in history.records()]


# In one process


def test_what_concerns_one_namespace_alone_is_told_apart() -> None:
    """Denials are counted for each by itself, also where they are so many that bindings are no longer told."""
    history = FaultHistory(3)
    for namespace in ("shop", "bank", None, "shop"):
        history.record(4, "denied", binding=f"of {namespace}", denial=True, namespace=namespace)
        history.record(3, "a fault", namespace=namespace)
    assert len(history.records()) == 6  # the oldest fault has gone
    assert [(it.message.partition(" (")[0], it.binding) for it in history.records("shop")] == [
        ("denied", "of shop"), ("a fault", "unknown")
    ]  # fmt: skip
    assert " (2 times since " in history.records("shop")[0].message
    assert len(history.records("bank")) == 2
    for number in range(5):
        history.record(4, "denied", binding=f"other {number}", denial=True, namespace="bank")
    assert [it.binding for it in history.records("shop")] == ["unknown", "unknown"]
    assert history.records("none") == ()


def test_the_history_keeps_the_newest_faults_with_their_nanoseconds() -> None:
    """It is bounded, oldest first, and stamped by its clock."""
    instants = iter((1, 1_000_000_002, 1_700_000_000_123_456_789))
    history = FaultHistory(2, clock=lambda: next(instants))
    for stage in (3, 4, 7):
        history.record(stage, f"fault {stage}", binding="go")
    assert [(record.fault_stage, str(record.timestamp)) for record in history.records()] == [
        (4, "1970-01-01T00:00:01.000000002Z"),
        (7, "2023-11-14T22:13:20.123456789Z"),
    ]
    assert len(history) == 2
    assert repr(history) == "FaultHistory(2 faults, 0 denials, at most 2 of each)"


@pytest.mark.requirement("INT-14")
def test_denials_are_not_washed_out_by_other_faults() -> None:
    """They are kept apart, and told together, in the order in which they happened."""
    history = FaultHistory(2)
    history.record(3, "denied", binding="go", denial=True)
    for number in range(100):
        history.record(4, f"fault {number}")
    history.record(3, "denied too", denial=True)
    assert told_by(history) == [
        ("go", "denied"), ("unknown", "fault 98"), ("unknown", "fault 99"), ("unknown", "denied too"),
    ]  # fmt: skip


@pytest.mark.requirement("INT-14")
def test_equal_denials_are_one_with_a_count() -> None:
    """Since the first, at the time of the last, also if others lie between; another binding is another one."""
    instants = iter(range(1_000_000_000, 6_000_000_000, 1_000_000_000))
    history = FaultHistory(clock=lambda: next(instants))
    for message, binding in (("a", "go"), ("b", "go"), ("a", "go"), ("a", "lua"), ("a", "go")):
        history.record(3, message, binding=binding, denial=True)
    assert told_by(history) == [("go", "b"), ("lua", "a"), ("go", "a (3 times since 1970-01-01T00:00:01.000000000Z)")]
    assert [str(record.timestamp)[17:19] for record in history.records()] == ["02", "04", "05"]
    assert len(history) == 3


@pytest.mark.requirement("INT-14")
def test_denials_under_many_bindings_are_counted_all_the_same() -> None:
    """Who invents a binding for each makes the daemon forget bindings, and no denial."""
    instants = iter(range(1_000_000_000, 2**62, 1_000_000_000))
    history = FaultHistory(3, clock=lambda: next(instants))
    history.record(3, "mine", binding="go", denial=True)
    for number in range(40):
        history.record(3, "denied", binding=f"b{number}", denial=True)
    assert told_by(history) == [
        ("unknown", "mine"),
        ("unknown", "denied (39 times since 1970-01-01T00:00:02.000000000Z)"),
        ("b39", "denied"),
    ]


def test_denials_of_too_many_kinds_go_oldest_first() -> None:
    """There is a bound to them, too."""
    history = FaultHistory(2)
    for number in range(4):
        history.record(3, f"denied {number}", denial=True)
    assert told_by(history) == [("unknown", "denied 2"), ("unknown", "denied 3")]


def test_the_history_refuses_what_is_no_stage_and_no_limit() -> None:
    """A stage is 0 to 12, and a history of nothing is none."""
    with pytest.raises(ValueError, match="0 to 12"):
        FaultHistory().record(13, "x")
    with pytest.raises(ValueError, match="at least 1"):
        FaultHistory(0)


# Beyond it


@pytest.mark.requirement("IMP-12")
async def test_faults_and_denials_outlive_the_process(tmp_path: Path) -> None:
    """In the journal, with their times and counts; and counting goes on from there."""
    instants = (number * SECOND for number in count(1))
    history = FaultHistory(clock=lambda: next(instants))
    journal = Journal(tmp_path / "j")
    await journal.open()
    history.record(5, "before the journal was open")
    history.attach(journal)
    history.record(3, "denied", binding="go", denial=True)
    history.record(4, "broken", binding="lua")
    history.record(3, "denied", binding="go", denial=True)
    before = history.records()
    await journal.close()
    journal = Journal(tmp_path / "j")
    await journal.open()
    history = FaultHistory(clock=lambda: next(instants))
    history.attach(journal)
    assert history.records() == before
    history.record(3, "denied", binding="go", denial=True)
    await journal.close()
    assert [(str(it.timestamp)[17:19], it.message) for it in history.records()] == [
        ("01", "before the journal was open"),
        ("03", "broken"),
        ("05", "denied (3 times since 1970-01-01T00:00:02.000000000Z)"),
    ]


def test_what_was_recorded_before_comes_after_what_is_on_the_shelf() -> None:
    """Denials that are like those on the shelf are counted with them."""
    desk = Desk()
    history = restarted(desk)
    history.record(3, "denied", denial=True)
    history.record(5, "old")
    history = FaultHistory()
    history.record(5, "new")
    history.record(3, "denied", denial=True)
    history.attach(desk)
    assert [message.partition(" since")[0] for _, _, message in told(history)] == ["old", "new", "denied (2 times"]
    assert told(restarted(desk)) == told(history)


def test_taking_up_what_is_there_changes_nothing_on_the_shelf() -> None:
    """So a restart writes nothing."""
    desk = Desk()
    history = restarted(desk)
    history.record(5, "a")
    history.record(3, "b", denial=True)
    before = desk.changes
    assert told(restarted(desk)) == told(history)
    assert desk.changes == before


def test_a_smaller_history_drops_the_oldest_from_the_shelf() -> None:
    """So the shelf is bounded by whoever uses it now."""
    desk = Desk()
    history = restarted(desk)
    for number in range(5):
        history.record(5, f"fault {number}")
        history.record(3, "denied", binding=f"b{number}", denial=True)
    history = restarted(desk, 2)
    assert [(binding, message.partition(" since")[0]) for _, binding, message in told(history)] == [
        ("unknown", "fault 3"),
        ("unknown", "denied (4 times"),
        ("unknown", "fault 4"),
        ("b4", "denied"),
    ]
    assert len(desk.places) == 4


@pytest.mark.parametrize("newer", ["a", "b"])
def test_the_oldest_denial_goes_whether_it_was_folded_or_not(newer: str) -> None:
    """The order is that in which they were last met, before a restart and after."""
    desk = Desk()
    history = restarted(desk, 2)
    for message in ("a", "b", newer, "c"):
        history.record(3, message, denial=True)
    kept = [message.partition(" ")[0] for _, _, message in told(history)]
    assert kept == [newer, "c"]
    assert told(restarted(desk, 2)) == told(history)


faults = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.sampled_from(["m", "n", "o"]),
        st.sampled_from(["unknown", "go", "lua"]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=30,
)


@given(faults=faults, limit=st.integers(1, 4))
def test_a_history_that_was_restarted_is_the_same(faults: list[tuple[int, str, str, bool, bool]], limit: int) -> None:
    """Whenever, and however often: it tells what one that never ended does, and the shelf holds no more than that."""
    instants = iter(range(1, 1000))

    def clock() -> int:
        return now

    desk = Desk()
    lasting, broken = FaultHistory(limit, clock=clock), FaultHistory(limit, clock=clock)
    broken.attach(desk)
    for stage, message, binding, denial, restart in faults:
        now = next(instants) * SECOND
        for history in (lasting, broken):
            history.record(stage, message, binding=binding, denial=denial)
        if restart:
            broken = FaultHistory(limit, clock=clock)
            broken.attach(desk)
        assert broken.records() == lasting.records()
        assert len(desk.places) == len(broken) <= 2 * limit


def test_a_fault_is_told_as_the_status_does() -> None:
    """With nanoseconds, and a count if it is more than one."""
    fault = Fault(place=0, stage=4, message="m", binding="go", at=2 * SECOND + 1, first=SECOND, times=2)
    told = fault.told()
    assert isinstance(told, FaultRecord)
    assert str(told.timestamp) == "1970-01-01T00:00:02.000000001Z"
    assert told.message == "m (2 times since 1970-01-01T00:00:01.000000000Z)"
