"""Policies: frozen values with visible defaults, and the plan of one call.

Everything here is pure. `CallPlan` is fed (what happened, now, a random number) and answers what to do next: send to
this daemon until then, wait, or stop. It opens nothing and awaits nothing; `dispatcher` acts on its answers, and tests
walk it through whole scenarios without a clock.

All times are float seconds on one monotonic clock, all deadlines absolute.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final, final

import backoff
from pydantic import ConfigDict

from pybustcall.errors import ConfigurationError
from pybustcall.faults import TABLE, FaultKind, Same

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pybustcall.faults import Fault
    from pybustcall.results import Ending

__all__ = ["MAX_TIMEOUT", "CallPlan", "Pool", "Retry", "Send", "Step", "Stop", "Wait", "check_seconds", "full_jitter"]

MAX_TIMEOUT: Final = 86_400.0
"""The longest time that any setting may name: a day. Longer is a mistake of units."""


def check_seconds(value: object, setting: str, *, zero: bool = False) -> float:
    """Return a time in seconds as float; raise `ConfigurationError` unless it is a finite number above 0 (or 0)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{setting} must be a number of seconds, not {value!r}", setting=setting)
    if not (value >= 0 if zero else value > 0) or not value <= MAX_TIMEOUT:
        least = "from 0" if zero else "above 0 and"
        raise ConfigurationError(f"{setting} must be {least} up to {MAX_TIMEOUT:g} s, not {value!r}", setting=setting)
    return float(value)


def _check_count(value: object, setting: str, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{setting} must be an integer of at least {least}, not {value!r}", setting=setting)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How one call tries again. Waits are full jitter, U(0, min(cap, base * 2^n)): the jitter lies inside the cap.

    - `attempts`: attempts at each daemon in one call
    - `attempt_timeout`: the most that one attempt may take; while another daemon is untried, at most half of what is
      left until the deadline
    - `base`, `cap`: the first ceiling of a backoff and the last
    - `throttled_base`, `throttled_cap`: the same after 429 or 503 without a Retry-After
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    attempts: int = 3
    attempt_timeout: float = 2.0
    base: float = 0.05
    cap: float = 2.0
    throttled_base: float = 1.0
    throttled_cap: float = 20.0

    def __post_init__(self) -> None:
        _check_count(self.attempts, "retry.attempts")
        check_seconds(self.attempt_timeout, "retry.attempt_timeout")
        for name in ("base", "cap", "throttled_base", "throttled_cap"):
            check_seconds(getattr(self, name), f"retry.{name}", zero=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How connections are pooled.

    - `per_daemon`, `total`: the most connections in use at once; further calls wait for a slot, first come first served
    - `wait`: the longest wait for a slot
    - `connect`: the longest time to make a connection, TLS handshake included
    - `idle`: how long an unused connection is kept (uvicorn's and Node's servers close theirs after 5 s)
    - `drain`: how long `aclose` waits for what is under way
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    per_daemon: int = 20
    total: int = 100
    wait: float = 0.5
    connect: float = 1.0
    idle: float = 4.0
    drain: float = 10.0

    def __post_init__(self) -> None:
        _check_count(self.per_daemon, "pool.per_daemon")
        _check_count(self.total, "pool.total")
        for name in ("wait", "connect"):
            check_seconds(getattr(self, name), f"pool.{name}")
        for name in ("idle", "drain"):
            check_seconds(getattr(self, name), f"pool.{name}", zero=True)


def ceiling(failures: int, base: float, cap: float) -> float:
    """Tell the highest wait after this many failures in a row (from 1): base, doubling up to cap."""
    waits = backoff.expo(base=2, factor=base, max_value=cap)
    next(waits)  # the generator's first value is None, by backoff's own convention
    return float(next(islice(waits, min(failures, _FLAT) - 1, None)))


_FLAT = 64
"""After so many doublings every cap is reached; counting further would only take time."""


def full_jitter(failures: int, base: float, cap: float, random: Callable[[], float]) -> float:
    """Choose a wait: uniform between 0 and the ceiling, so that clients that failed together do not return together."""
    return random() * ceiling(failures, base, cap)


_LEAST_SHARE = 0.05
"""Seconds below which the time that is left is not halved any further for the sake of untried daemons."""


@final
@dataclass(frozen=True, slots=True)
class Send:
    """Ask this daemon (its index), and give up the attempt at `until`."""

    daemon: int
    until: float


@final
@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until then, and ask the plan again."""

    until: float


@final
@dataclass(frozen=True, slots=True)
class Stop:
    """Give up: "halted" by a fault that forbids going on, "exhausted", or the "deadline" is over."""

    ending: Ending


Step = Send | Wait | Stop


@dataclass(slots=True)
class _Candidate:
    """What one call knows of one daemon."""

    attempts: int = 0
    server_errors: int = 0
    not_before: float = 0.0
    out: bool = False


@final
class CallPlan:
    """Decides the course of one call over its daemons, in the order given, under one absolute deadline.

    Theory of operation. Each daemon is untried, open (may be asked again, not before a time) or out. After a fault the
    table's row says which, and whether the same daemon is asked again *first* (`_stay`: a connection refused is often
    a restart, and its backoff is short) or only after the untried ones (a timeout, a 429). So `next_step` looks, in
    this order, at: the daemon it stays with; the first untried; the open one that may be asked soonest. A wait that
    would reach the deadline is no wait at all: that candidate is passed over, and if none is left the call ends at
    once instead of sleeping through the time of a caller who could do something better with it.
    """

    def __init__(self, daemons: int, *, deadline: float, retry: Retry | None) -> None:
        self._candidates = [_Candidate() for _ in range(daemons)]
        self._deadline = deadline
        self._retry = retry or Retry(attempts=1)
        self._stay: int | None = None
        self._halted = False

    def next_step(self, now: float) -> Step:
        """Tell what to do now."""
        if self._halted:
            return Stop("halted")
        if now >= self._deadline:
            return Stop("deadline")
        for index in self._in_order():
            start = self._candidates[index].not_before
            if start <= now:
                return Send(index, self._attempt_end(index, now))
            if start < self._deadline:
                return Wait(start)
        return Stop("exhausted")

    def record(self, daemon: int, fault: Fault, now: float, random: Callable[[], float]) -> None:
        """Take in that an attempt at this daemon ended now with this fault."""
        row = TABLE[fault.kind]
        candidate = self._candidates[daemon]
        candidate.attempts += row.same is not Same.WHILE_TIME
        candidate.server_errors += fault.kind is FaultKind.SERVER_ERROR
        candidate.not_before = now + self._pause(fault, candidate.attempts, random)
        candidate.out = (
            row.same is Same.NEVER
            or candidate.attempts >= self._retry.attempts
            or (row.same is Same.ONCE and candidate.server_errors > 1)
        )
        stays = row.same in {Same.BACKOFF, Same.ONCE, Same.WHILE_TIME}
        self._stay = daemon if stays and not candidate.out else None
        self._halted = row.same is Same.NEVER and not row.next

    def _in_order(self) -> Sequence[int]:
        open_ones = [index for index, candidate in enumerate(self._candidates) if not candidate.out]
        return sorted(open_ones, key=lambda index: (index != self._stay, *self._turn(self._candidates[index])))

    @staticmethod
    def _turn(candidate: _Candidate) -> tuple[bool, float, int]:
        return (candidate.attempts > 0, candidate.not_before, candidate.attempts)

    def _attempt_end(self, index: int, now: float) -> float:
        left = self._deadline - now
        untried = any(
            candidate.attempts == 0 and not candidate.out
            for other, candidate in enumerate(self._candidates)
            if other != index
        )
        share = max(left / 2, min(left, _LEAST_SHARE)) if untried else left
        return now + min(self._retry.attempt_timeout, share)

    def _pause(self, fault: Fault, failures: int, random: Callable[[], float]) -> float:
        if TABLE[fault.kind].same is Same.WHILE_TIME:
            return 0.0  # the wait for a slot was the pause, and goes on: the call keeps its turn there
        if TABLE[fault.kind].same is not Same.LATER:
            return full_jitter(failures, self._retry.base, self._retry.cap, random)
        if fault.retry_after is not None:
            return fault.retry_after
        return full_jitter(failures, self._retry.throttled_base, self._retry.throttled_cap, random)
