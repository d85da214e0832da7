"""Policies: frozen values with visible defaults, and the small machines that they configure.

Everything here is pure: a machine is fed (what happened, now, a random number) and answers whether something may be
done. What is known of a whole set of daemons is `fleet`'s, the course of one call `plan`'s.

All times are float seconds on one monotonic clock, all deadlines absolute.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, final

import backoff
from pydantic import ConfigDict

from pybustcall.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BREAKER",
    "MAX_TIMEOUT",
    "Breaker",
    "BreakerSignal",
    "BreakerState",
    "Budget",
    "Circuit",
    "Failback",
    "Hedge",
    "HedgeAllowance",
    "Latency",
    "Pool",
    "Probes",
    "Retry",
    "SharedBudget",
    "check_seconds",
    "full_jitter",
]

MAX_TIMEOUT: Final = 86_400.0
"""The longest time that any setting may name: a day. Longer is a mistake of units."""


_MOST: Final = 1e6
"""The most that an amount or a count of a policy may say. More is a mistake."""

_LEAST_WINDOW: Final = 0.1
"""Seconds; a shorter window would hold next to nothing."""


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


def _check_amount(value: object, setting: str, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= _MOST:
        told = f"{setting} must be a number from {least:g} to {_MOST:g}, not {value!r:.40}"
        raise ConfigurationError(told, setting=setting)
    return float(value)


def _check_window(value: object, setting: str) -> None:
    if check_seconds(value, setting) < _LEAST_WINDOW:
        raise ConfigurationError(f"{setting} must be at least {_LEAST_WINDOW:g} s, not {value!r}", setting=setting)


def _check_share(value: object, setting: str) -> None:
    if not 0 < _check_amount(value, setting) <= 1:
        raise ConfigurationError(f"{setting} must be above 0 and at most 1, not {value!r}", setting=setting)


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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What retries and hedges of all calls may cost together, so that they cannot multiply an outage.

    - `share`: of the calls of the last `window` seconds
    - `reserve`: sends beyond that, refilled by `per_second`, so that few calls can be retried too

    The first send of a call to each daemon is free.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    share: float = 0.1
    window: float = 10.0
    reserve: float = 10.0
    per_second: float = 1.0

    def __post_init__(self) -> None:
        _check_share(self.share, "budget.share")
        _check_window(self.window, "budget.window")
        for name in ("reserve", "per_second"):
            _check_amount(getattr(self, name), f"budget.{name}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """When a second daemon is asked although the first may still answer.

    - `quantile`: of the daemon's live latency, after which a hedge is sent
    - `share`: of the calls of the last 10 s that may be hedged at most
    - `samples`: answers of a daemon that must be known before
    - `overdue`: times the quantile (and at least `overdue_least` seconds) without any answer from a daemon, after which
      it is avoided, and calls that wait for it go on to another. That is failover and not bound by `share`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    quantile: float = 0.95
    share: float = 0.05
    samples: int = 100
    overdue: float = 4.0
    overdue_least: float = 0.05

    def __post_init__(self) -> None:
        _check_share(self.quantile, "hedge.quantile")
        _check_share(self.share, "hedge.share")
        _check_count(self.samples, "hedge.samples")
        _check_amount(self.samples, "hedge.samples")
        _check_amount(self.overdue, "hedge.overdue", least=1.0)
        check_seconds(self.overdue_least, "hedge.overdue_least", zero=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Breaker:
    """When a daemon is no longer asked, and how it is tried again.

    - `incidents`: in a row that open it; concurrent failures of one outage are one incident
    - `rate`, `volume`, `window`: or this share of at least so many answers and incidents within so many seconds
    - `open`, `cap`: how long it stays open, doubling up to `cap`, with equal jitter: d/2 + U(0, d/2)
    - `proofs`: successes in a row, one trial at a time, that close it
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    incidents: int = 5
    rate: float = 0.5
    volume: int = 20
    window: float = 10.0
    open: float = 5.0
    cap: float = 60.0
    proofs: int = 3

    def __post_init__(self) -> None:
        for name in ("incidents", "volume", "proofs"):
            _check_count(getattr(self, name), f"breaker.{name}")
        _check_share(self.rate, "breaker.rate")
        _check_window(self.window, "breaker.window")
        for name in ("open", "cap"):
            check_seconds(getattr(self, name), f"breaker.{name}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """How daemons are probed in the background, on their capabilities route.

    - `hub`, `peers`, `suspect`: seconds between two probes of each, varied by `jitter`
    - `timeout`: seconds for one probe
    - `misses`: in a row after which a daemon is down
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    hub: float = 5.0
    peers: float = 30.0
    suspect: float = 1.0
    jitter: float = 0.2
    timeout: float = 0.5
    misses: int = 3

    def __post_init__(self) -> None:
        for name in ("hub", "peers", "suspect", "timeout"):
            check_seconds(getattr(self, name), f"probes.{name}")
        if not 0 <= _check_amount(self.jitter, "probes.jitter") < 1:
            raise ConfigurationError(f"probes.jitter must be from 0 to below 1, not {self.jitter!r}", setting="probes")
        _check_count(self.misses, "probes.misses")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Failback:
    """How calls return to the hub once it is back: late, spread and little by little.

    - `hold`: seconds that the hub must be good for; a relapse doubles it up to `cap`
    - `evidence`: good probes (or answers) that it takes as well
    - `spread`: then U(0, spread) seconds more, so that many clients do not return together
    - `ramp`: seconds over which 5, 25, 50 and then 100 % of the calls go to the hub first
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    hold: float = 30.0
    cap: float = 600.0
    evidence: int = 3
    spread: float = 60.0
    ramp: float = 60.0

    def __post_init__(self) -> None:
        for name in ("hold", "cap", "spread", "ramp"):
            check_seconds(getattr(self, name), f"failback.{name}", zero=True)
        _check_count(self.evidence, "failback.evidence")
        if self.cap < self.hold:
            raise ConfigurationError(
                f"failback.cap must be at least failback.hold, {self.hold:g} s, not {self.cap!r}",
                setting="failback.cap",
            )


@final
class _Window:
    """A sum over the last `span` seconds, kept in ten slots."""

    def __init__(self, span: float) -> None:
        self._width = span / 10
        self._slots: deque[tuple[int, float]] = deque()
        self._sum = 0.0

    def add(self, now: float, amount: float = 1.0) -> None:
        slot = int(now // self._width)
        before = 0.0
        if self._slots and self._slots[-1][0] == slot:
            before = self._slots.pop()[1]
        else:
            self._forget(slot)  # here too: where only good things happen, nobody asks for the total
        self._slots.append((slot, before + amount))
        self._sum += amount

    def total(self, now: float) -> float:
        self._forget(int(now // self._width))
        return self._sum

    def _forget(self, slot: int) -> None:
        while self._slots and self._slots[0][0] <= slot - 10:
            self._sum -= self._slots.popleft()[1]
        if not self._slots:
            self._sum = 0.0


@final
class SharedBudget:
    """What is left for retries and hedges. Without a policy there is no limit.

    A share of the recent calls is earned, and beside it there is a small reserve that refills with time, so the load
    that retries and hedges add is at most share * calls + per_second, after the reserve is spent. (The form is that of
    Finagle's RetryBudget.)
    """

    def __init__(self, policy: Budget | None) -> None:
        self._policy = policy
        span = policy.window if policy is not None else 1.0
        self._calls = _Window(span)
        self._spent = _Window(span)
        self._reserve = policy.reserve if policy is not None else 0.0
        self._refilled = -math.inf

    def called(self, now: float) -> None:
        """Count a call, of which a share is earned."""
        if self._policy is not None:
            self._calls.add(now)

    def take(self, now: float) -> bool:
        """Spend one send; tell whether there was one."""
        if self._policy is None:
            return True
        if self._earned(now) >= 1:
            self._spent.add(now)
        elif self._refill(now) >= 1:
            self._reserve -= 1
        else:
            return False
        return True

    def affords(self, now: float) -> bool:
        """Tell whether there is one to spend."""
        return self._policy is None or self._earned(now) >= 1 or self._refill(now) >= 1

    def level(self, now: float) -> float:
        """Tell how much is left: 1 for all, 0 for nothing."""
        if self._policy is None:
            return 1.0
        whole = self._policy.share * self._calls.total(now) + self._policy.reserve
        return (max(0.0, self._earned(now)) + self._refill(now)) / whole if whole else 0.0

    def _earned(self, now: float) -> float:
        assert self._policy is not None  # noqa: S101 - for the type checker: asked only where there is a policy
        return self._policy.share * self._calls.total(now) - self._spent.total(now)

    def _refill(self, now: float) -> float:
        assert self._policy is not None  # noqa: S101 - as above
        elapsed = max(0.0, now - self._refilled) if self._refilled > -math.inf else 0.0
        self._reserve = min(self._policy.reserve, self._reserve + elapsed * self._policy.per_second)
        self._refilled = now
        return self._reserve


@final
class HedgeAllowance:
    """Says whether one more call may be hedged: at most a share of the calls, and not while the budget is low."""

    def __init__(self, policy: Hedge | None, budget: SharedBudget) -> None:
        self._policy = policy
        self._budget = budget
        self._calls = _Window(10.0)
        self._hedges = _Window(10.0)

    def called(self, now: float) -> None:
        """Count a call."""
        self._calls.add(now)

    def take(self, now: float) -> bool:
        """Spend one hedge, and its send out of the shared budget; tell whether that may be."""
        if self._policy is None or self._hedges.total(now) + 1 > self._policy.share * self._calls.total(now):
            return False
        if self._budget.level(now) < 0.5 or not self._budget.take(now):
            return False
        self._hedges.add(now)
        return True


@final
class Latency:
    """The live latency of one daemon: the quantile of its last 500 answers, computed anew every 20."""

    def __init__(self, quantile: float, samples: int) -> None:
        self._quantile = quantile
        self._least = samples
        self._values: deque[float] = deque(maxlen=max(500, samples))
        self._fresh = 0
        self._known: float | None = None

    def add(self, seconds: float) -> None:
        """Take in how long an answer took."""
        self._values.append(seconds)
        self._fresh += 1
        if len(self._values) >= self._least and (self._known is None or self._fresh >= 20):
            ordered = sorted(self._values)
            self._known = ordered[min(len(ordered) - 1, math.ceil(self._quantile * len(ordered)) - 1)]
            self._fresh = 0

    @property
    def usual(self) -> float | None:
        """The quantile in seconds, or None before there are enough samples."""
        return self._known


class BreakerState(StrEnum):
    """What a daemon's breaker lets through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    QUARANTINED = "quarantined"


class BreakerSignal(StrEnum):
    """What happens to a breaker."""

    TRIPPED = "tripped"  # enough incidents
    WAITED = "waited"  # its time is over, and no probe speaks against the daemon
    ANSWERED = "answered"  # a bust that was let through nevertheless succeeded
    PROVEN = "proven"  # enough trials succeeded
    RELAPSED = "relapsed"  # a trial failed
    PANICKED = "panicked"  # a fault of the PANIC band
    CLEARED = "cleared"  # good probes ended the quarantine
    RESET = "reset"  # by the user


BREAKER: Final[Mapping[tuple[BreakerState, BreakerSignal], BreakerState]] = MappingProxyType(
    {
        (BreakerState.CLOSED, BreakerSignal.TRIPPED): BreakerState.OPEN,
        (BreakerState.CLOSED, BreakerSignal.PANICKED): BreakerState.QUARANTINED,
        (BreakerState.CLOSED, BreakerSignal.RESET): BreakerState.CLOSED,
        (BreakerState.OPEN, BreakerSignal.WAITED): BreakerState.HALF_OPEN,
        (BreakerState.OPEN, BreakerSignal.ANSWERED): BreakerState.HALF_OPEN,
        (BreakerState.OPEN, BreakerSignal.RELAPSED): BreakerState.OPEN,
        (BreakerState.OPEN, BreakerSignal.PANICKED): BreakerState.QUARANTINED,
        (BreakerState.OPEN, BreakerSignal.RESET): BreakerState.CLOSED,
        (BreakerState.HALF_OPEN, BreakerSignal.PROVEN): BreakerState.CLOSED,
        (BreakerState.HALF_OPEN, BreakerSignal.RELAPSED): BreakerState.OPEN,
        (BreakerState.HALF_OPEN, BreakerSignal.PANICKED): BreakerState.QUARANTINED,
        (BreakerState.HALF_OPEN, BreakerSignal.RESET): BreakerState.CLOSED,
        (BreakerState.QUARANTINED, BreakerSignal.CLEARED): BreakerState.HALF_OPEN,
        (BreakerState.QUARANTINED, BreakerSignal.PANICKED): BreakerState.QUARANTINED,
        (BreakerState.QUARANTINED, BreakerSignal.RESET): BreakerState.CLOSED,
    }
)
"""The breaker as a table. A pair that is not in it is a defect, and changes nothing."""


@final
class Circuit:
    """The breaker of one daemon. Without a policy it never opens, but a quarantine still closes the way.

    Trials are counted by who holds one, so that none can be forgotten: `begin` says whether a send is a trial, and
    exactly one of `succeeded`, `failed` or `released` ends it. Only trials prove anything: an answer to what was sent
    before the breaker opened is old news.
    """

    def __init__(self, policy: Breaker | None) -> None:
        self._policy = policy
        self.state = BreakerState.CLOSED
        self.reason = ""
        self.until = 0.0
        self._openings = 0
        self._proofs = 0
        self._trials = 0
        span = policy.window if policy is not None else 1.0
        self._good = _Window(span)
        self._bad = _Window(span)

    def admits(self, now: float, *, vouched: bool) -> bool:
        """Tell whether a call may be sent there now.

        `vouched`: whether no probe speaks against the daemon. An open breaker whose time is over becomes half-open
        only then, so that no call is spent on a daemon that is known not to answer.
        """
        if self.state is BreakerState.OPEN and now >= self.until and vouched:
            self._move(BreakerSignal.WAITED)
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and self._trials == 0)

    def begin(self) -> bool:
        """Take in that a call is sent there; tell whether it is a trial."""
        trial = self.state is not BreakerState.CLOSED
        self._trials += trial
        return trial

    def released(self, *, trial: bool) -> None:
        """Take in that a send ended and says nothing of the daemon."""
        self._trials -= trial

    def succeeded(self, now: float, *, trial: bool) -> None:
        """Take in a success."""
        self._trials -= trial
        self._good.add(now)
        if trial and self.state is BreakerState.OPEN:
            self._move(BreakerSignal.ANSWERED)
        if trial and self.state is BreakerState.HALF_OPEN:
            self._proofs += 1
            if self._policy is None or self._proofs >= self._policy.proofs:
                self._move(BreakerSignal.PROVEN)
                self._openings = 0

    def failed(self, now: float, incidents: int, *, trial: bool, counted: bool, random: Callable[[], float]) -> None:
        """Take in a failure: `incidents` in a row with this one, `counted` if it is a new one."""
        self._trials -= trial
        if counted:
            self._bad.add(now)
        if self._policy is None:
            return
        if self.state is BreakerState.CLOSED and counted and self._too_many(incidents, now, self._policy):
            self._open(BreakerSignal.TRIPPED, now, random, self._policy)
        elif (self.state is BreakerState.HALF_OPEN and (trial or counted)) or (
            self.state is BreakerState.OPEN and counted and now >= self.until
        ):
            self._open(BreakerSignal.RELAPSED, now, random, self._policy)

    def quarantine(self, reason: str) -> None:
        """Let nothing through until `clear` or `reset`."""
        self._move(BreakerSignal.PANICKED)
        self.reason = reason

    def clear(self) -> None:
        """End a quarantine; trials decide the rest."""
        self._move(BreakerSignal.CLEARED)

    def reset(self) -> None:
        """Close it, whatever was before."""
        self._move(BreakerSignal.RESET)
        self._openings = 0

    def _too_many(self, incidents: int, now: float, policy: Breaker) -> bool:
        bad = self._bad.total(now)
        volume = bad + self._good.total(now)
        return incidents >= policy.incidents or (volume >= policy.volume and bad >= policy.rate * volume)

    def _open(self, signal: BreakerSignal, now: float, random: Callable[[], float], policy: Breaker) -> None:
        self._openings += 1
        longest = ceiling(self._openings, policy.open, policy.cap)
        self.until = now + longest / 2 + random() * longest / 2
        self._move(signal)

    def _move(self, signal: BreakerSignal) -> None:
        self.state = BREAKER[self.state, signal]
        self.reason = ""
        self._proofs = 0
        if self.state is BreakerState.CLOSED:
            self._good = _Window(self._policy.window if self._policy is not None else 1.0)
            self._bad = _Window(self._policy.window if self._policy is not None else 1.0)
