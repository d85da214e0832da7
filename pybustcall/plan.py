"""The course of one call: whom to ask now, when to wait, when to ask a second daemon, when to give up.

`CallPlan` is fed (what happened, now) and answers send, wait or stop. It knows one call; what is known of the daemons
over many calls it asks of the `fleet`. It opens nothing and awaits nothing: `dispatcher` acts on its answers, and tests
walk it through whole scenarios without a clock.

All times are float seconds on one monotonic clock, all deadlines absolute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, final

from pybustcall.faults import TABLE, Band, Fault, FaultKind, Same
from pybustcall.fleet import SILENCE
from pybustcall.policies import Retry, full_jitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybustcall.fleet import Fleet, Flight
    from pybustcall.results import Ending

__all__ = ["CallPlan", "Send", "Step", "Stop", "Wait"]

_LEAST_SHARE: Final = 0.05
"""Seconds below which the time that is left is not halved any further for the sake of untried daemons."""

_LAST_WORD: Final = 0.02
"""Seconds beyond the deadline in which attempts under way report their own timeouts."""


@final
@dataclass(frozen=True, slots=True)
class Send:
    """Ask this daemon (its index), and give up the attempt at `until`.

    `instead_of`: a flight that still waits for its slot, and is withdrawn.
    """

    daemon: int
    until: float
    flight: Flight
    instead_of: Flight | None = None


@final
@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until then, or until an attempt ends, and ask the plan again."""

    until: float


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """Give up: "halted" by a fault that forbids going on, "exhausted", "silent", or the "deadline" is over."""

    ending: Ending


Step = Send | Wait | Stop


@dataclass(slots=True)
class _Candidate:
    """What one call knows of one daemon."""

    attempts: int = 0
    server_errors: int = 0
    not_before: float = 0.0
    out: bool = False
    claims: float | None = None


@final
class CallPlan:
    """Decides the course of one call over a fleet, under one absolute deadline.

    - `only`: the index of the one daemon to ask, for one leg of a delivery to many; None for whoever answers first
    - `storable`: whether the bust is stored if the call gives up; then it does not wait for daemons that are all silent

    Theory of operation. Each daemon is untried, open (may be asked again, not before a time) or out. While nothing is
    in flight, the next is: the daemon it stays with; the first untried; the open one that may be asked soonest. It
    stays with a daemon that failed in a way that a second attempt often mends (a refused connection is often a
    restart, and its backoff is short), but only while the fault is of the WARNING band, and where others could be
    asked instead, only once and only one call at a time: the rest go on. A second send to a daemon costs budget, the
    first is free. A wait that would reach the deadline is no wait at all: that candidate is passed over, and if none is
    left the call ends at once instead of sleeping through the time of a caller who could do something better with it.

    While an attempt is in flight, its daemon's usual latency decides: slower than that, and the next daemon that is
    well is asked too (a hedge, within its allowance); overdue, and the call moves on to it in any case. The answers of
    both are good. An attempt that still waits for its slot is withdrawn instead: it would only meet the same silence.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        deadline: float,
        retry: Retry | None,
        now: float,
        random: Callable[[], float],
        only: int | None = None,
        storable: bool = False,
    ) -> None:
        self._fleet = fleet
        self._storable = storable
        self._deadline = deadline
        self._retry = retry or Retry(attempts=1)
        self._random = random
        self._candidates = {index: _Candidate() for index in (fleet.order(now) if only is None else [only])}
        self._in_flight: list[Flight] = []
        self._stay: int | None = None
        self._hedged = False
        self._halted = False
        self.passed_over: list[Fault] = []
        self.budget_spent = False

    @property
    def races(self) -> bool:
        """Whether another daemon could be asked while an attempt is in flight."""
        return len(self._candidates) > 1

    def next_step(self, now: float) -> Step:
        """Tell what to do now."""
        if self._halted:
            return Stop("halted")
        if self._in_flight:
            if now >= self._deadline + _LAST_WORD:
                return Stop("deadline")
            return Wait(self._deadline + _LAST_WORD) if now >= self._deadline else self._watch(now)
        if now >= self._deadline:
            return Stop("deadline")
        if self._storable and now >= self._hopeless_at(now) and not self._fleet.try_silence(now):
            open_ones = [index for index, candidate in self._candidates.items() if not candidate.out]
            self.passed_over += [self._fleet.silent(index) for index in open_ones]
            return Stop("silent")
        return self._choose(now)

    def record(self, flight: Flight, fault: Fault, now: float) -> None:
        """Take in that an attempt ended now with this fault, as the fleet escalated it."""
        self._in_flight.remove(flight)
        index, row = flight.daemon, TABLE[fault.kind]
        candidate = self._candidates[index]
        self._end_claim(index)
        candidate.attempts += row.same is not Same.WHILE_TIME
        candidate.server_errors += fault.kind is FaultKind.SERVER_ERROR
        candidate.not_before = now + self._pause(fault, candidate.attempts)
        candidate.out = (
            row.same is Same.NEVER
            or candidate.attempts >= self._retry.attempts
            or (row.same is Same.ONCE and candidate.server_errors > 1)
            or fault.band in {Band.EXCEPTION, Band.PANIC}
        )
        stays = not candidate.out and (row.same is Same.WHILE_TIME or self._retries_at_once(index, row.same, now))
        self._stay = index if stays else None
        self._halted |= row.same is Same.NEVER and not row.next

    def close(self) -> None:
        """End the call: what it claimed is free again."""
        for index in self._candidates:
            self._end_claim(index)

    def _choose(self, now: float) -> Step:
        for index in self._in_order():
            candidate = self._candidates[index]
            if candidate.not_before > now:
                if candidate.not_before < self._deadline:
                    return Wait(candidate.not_before)
                continue
            last = all(other.out for known, other in self._candidates.items() if known != index)
            if (sending := self._send(index, now, last=last)) is not None:
                return sending
        return Stop("exhausted")

    def _send(self, index: int, now: float, *, last: bool = False, hedge: bool = False) -> Send | None:
        """Board a flight to a daemon; where that may not be, the daemon is out."""
        candidate = self._candidates[index]
        if candidate.attempts and not self._fleet.can_retry(now):
            self._fleet.deny_retry()
            candidate.out = self.budget_spent = True
            return None
        boarded = self._fleet.board(index, now, last=last, hedge=hedge)
        if isinstance(boarded, Fault):
            candidate.out = True
            self.passed_over.append(boarded)
            return None
        if candidate.attempts:
            self._fleet.spend_retry(now)  # only now: what is not sent costs nothing
        until = self._attempt_end(index, now)
        self._in_flight.append(boarded)
        return Send(index, until, boarded)

    def _watch(self, now: float) -> Step:
        """Decide whether to go on waiting for what is in flight, or to ask another daemon as well, or instead."""
        newest = self._in_flight[-1]
        while (helper := self._helper(now)) is not None:
            overdue_at = self._fleet.overdue_at(newest)
            hedge_at = math.inf if self._hedged or not newest.sent else self._fleet.hedge_at(newest)
            if now < min(overdue_at, hedge_at):
                # While it waits for its slot, the silence that matters is that of others, and may begin later.
                look = math.inf if newest.sent else now + self._fleet.patience(newest.daemon)
                return Wait(min(overdue_at, hedge_at, look, self._deadline))
            overdue = now >= overdue_at
            if overdue:
                self._fleet.found_overdue(newest, now)
            else:
                self._hedged = True  # once a call, whether it may or not
                if not self._fleet.spend_hedge(newest, now):
                    continue
            sending = self._send(helper, now, hedge=not overdue)
            assert sending is not None  # noqa: S101 - for the type checker: one that is well and untried is not refused
            self._fleet.told_hedge(newest, helper, now, overdue=overdue)
            if not newest.sent:
                self._in_flight.remove(newest)
                return replace(sending, instead_of=newest)
            return sending
        return self._wait_alone(newest, now)

    def _wait_alone(self, newest: Flight, now: float) -> Step:
        """Decide how long to wait where there is nobody else to ask."""
        if not self._storable:
            return Wait(self._deadline)
        given_up = max(self._hopeless_at(now), newest.begun + SILENCE)
        if now >= given_up:
            return Stop("silent")
        # While nothing is known to be silent, that may begin; and a probe may find another daemon well.
        return Wait(min(given_up, now + SILENCE, self._deadline))

    def _hopeless_at(self, now: float) -> float:
        """Tell from when on none of those that could still answer is worth waiting for."""
        open_ones = [index for index, candidate in self._candidates.items() if not candidate.out]
        return self._fleet.hopeless_at(open_ones, now) if open_ones else math.inf

    def _helper(self, now: float) -> int | None:
        """Find the next untried daemon that is well."""
        busy = {flight.daemon for flight in self._in_flight}
        for index in self._in_order():
            candidate = self._candidates[index]
            untried = not candidate.attempts and index not in busy and candidate.not_before <= now
            if untried and self._fleet.well(index, now):
                return index
        return None

    def _retries_at_once(self, index: int, same: Same, now: float) -> bool:
        """Decide whether to try a daemon again before the others are asked."""
        if same not in {Same.BACKOFF, Same.ONCE} or not self._fleet.can_retry(now):
            return False
        candidate = self._candidates[index]
        others = any(not other.out and not other.attempts for other in self._candidates.values() if other != candidate)
        if not others:
            return True
        if candidate.attempts > 1:
            return False
        until = candidate.not_before + self._retry.attempt_timeout
        if self._fleet.claim_retry(index, now, until):
            candidate.claims = until
        return candidate.claims is not None

    def _end_claim(self, index: int) -> None:
        candidate = self._candidates[index]
        if candidate.claims is not None:
            self._fleet.release_retry(index, candidate.claims)
            candidate.claims = None

    def _in_order(self) -> list[int]:
        """Sort those that are not out: the one it stays with, the untried as the fleet has them, the others by time."""
        open_ones = [index for index, candidate in self._candidates.items() if not candidate.out]
        return sorted(open_ones, key=lambda index: (index != self._stay, *self._turn(self._candidates[index])))

    @staticmethod
    def _turn(candidate: _Candidate) -> tuple[bool, float, int]:
        return (candidate.attempts > 0, candidate.not_before, candidate.attempts)

    def _attempt_end(self, index: int, now: float) -> float:
        left = self._deadline - now
        untried = any(
            candidate.attempts == 0 and not candidate.out
            for other, candidate in self._candidates.items()
            if other != index
        )
        share = max(left / 2, min(left, _LEAST_SHARE)) if untried else left
        return now + min(self._retry.attempt_timeout, share)

    def _pause(self, fault: Fault, failures: int) -> float:
        same = TABLE[fault.kind].same
        if same is Same.WHILE_TIME:
            return 0.0  # the wait for a slot was the pause, and goes on: the call keeps its turn there
        if same is not Same.LATER:
            return full_jitter(failures, self._retry.base, self._retry.cap, self._random)
        if fault.retry_after is not None:
            return fault.retry_after
        return full_jitter(failures, self._retry.throttled_base, self._retry.throttled_cap, self._random)
