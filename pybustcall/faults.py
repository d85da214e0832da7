"""The fault scale 0 to 12: what a failure weighs, and what follows from it.

Lower is worse; 12 is a clean success. This module decides the stage at which each kind of failure starts, how stages
combine, which band a call falls into, and whether that raises. It knows nothing of clocks, tasks or HTTP libraries:
`daemon_client` says which kind of failure it met, `policies` acts on the table.

The laws of the algebra (docs/explanation/fault-model.md) are held by tests over the whole finite domain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, final

from pybustcall.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pybustcall.errors import Applied

__all__ = [
    "CLEAN",
    "OVERSIGHT",
    "TABLE",
    "AttemptFailed",
    "Band",
    "Fault",
    "FaultKind",
    "Incidents",
    "Outcome",
    "Oversight",
    "Row",
    "Same",
    "band_of",
    "call_stage",
    "check_stage",
    "check_tolerance",
    "escalate",
    "kind_of_status",
    "meet",
    "raises",
]

CLEAN: Final = 12
"""The stage of a clean success, and the identity of `meet`."""


class Band(StrEnum):
    """What the stages mean: PANIC [0,3), EXCEPTION [3,6), WARNING [6,9), SILENT [9,12]."""

    PANIC = "panic"
    EXCEPTION = "exception"
    WARNING = "warning"
    SILENT = "silent"


class Oversight(StrEnum):
    """What a call asks of people: nothing, to be told, to look into it, or to act before it goes on."""

    AUTONOMOUS = "autonomous"
    NOTIFIED = "notified"
    REVIEWED = "reviewed"
    HALTED = "halted"


OVERSIGHT: Final[Mapping[Band, Oversight]] = MappingProxyType(
    {
        Band.SILENT: Oversight.AUTONOMOUS,
        Band.WARNING: Oversight.NOTIFIED,
        Band.EXCEPTION: Oversight.REVIEWED,
        Band.PANIC: Oversight.HALTED,
    }
)
"""The oversight that goes with each band; every bust's result records it."""


class Outcome(Enum):
    """What became of a call, with the lowest and the highest stage that such a call may have."""

    ACKNOWLEDGED = (9, 12)
    KEPT = (6, 8)  # stored, accepted or partly acknowledged: will be delivered, is not yet
    FAILED = (0, 5)


def check_stage(stage: object) -> int:
    """Return `stage` if it is an integer from 0 to 12; raise ValueError for anything else, bool and float included."""
    if type(stage) is not int or not 0 <= stage <= CLEAN:
        raise ValueError(f"a fault stage is an integer from 0 to 12, not {stage!r}")
    return stage


def check_tolerance(fault_tolerance: object) -> int:
    """Return `fault_tolerance` if it is an integer from 0 to 12; raise `InvalidRequest` for anything else."""
    try:
        return check_stage(fault_tolerance)
    except ValueError:
        raise InvalidRequest(
            f"fault_tolerance must be an integer from 0 to 12, not {fault_tolerance!r}; nothing was sent",
            field="fault_tolerance",
        ) from None


def band_of(stage: int) -> Band:
    """Tell the band that a stage lies in."""
    if stage < 3:
        return Band.PANIC
    if stage < 6:
        return Band.EXCEPTION
    if stage < 9:
        return Band.WARNING
    return Band.SILENT


def meet(stages: Iterable[int]) -> int:
    """Combine the stages of one call: the worst counts, and no fault at all is a clean success.

    (stages, meet, 12) is a bounded meet-semilattice: associative, commutative, idempotent, with 12 its identity.
    """
    return min(stages, default=CLEAN)


def escalate(stage: int, incidents: int) -> int:
    """Worsen a stage by the number of incidents in a row before this one; never below 0.

    An action of the natural numbers under addition: escalate(s, 0) = s and
    escalate(escalate(s, a), b) = escalate(s, a + b).
    """
    if incidents < 0:
        raise ValueError(f"incidents are counted from 0, not {incidents!r}")
    return max(0, stage - incidents)


def call_stage(outcome: Outcome, faults: Iterable[int]) -> int:
    """Tell the stage of a call: the meet of its faults' stages, held inside the band of its outcome.

    So a better outcome never has a worse stage, whatever happened on the way.
    """
    lowest, highest = outcome.value
    return max(lowest, min(highest, meet(faults)))


def raises(stage: int, fault_tolerance: int) -> bool:
    """Tell whether a call of this stage raises: iff stage < 12 - fault_tolerance."""
    return stage < CLEAN - fault_tolerance


class Same(Enum):
    """When the daemon that failed may be asked again within the same call."""

    NEVER = "never"
    BACKOFF = "after a backoff, before any other daemon"
    ONCE = "once more, after a backoff"
    WHILE_TIME = "while time is left, not counted as an attempt"
    LATER = "after the other daemons, not before it said"
    AFTER_OTHERS = "after the untried daemons"


class FaultKind(StrEnum):
    """What went wrong with one attempt: one name for each row of the table."""

    SLOW = "slow"
    NO_SLOT = "no_slot"
    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    TIMED_OUT = "timed_out"
    THROTTLED = "throttled"
    SERVER_ERROR = "server_error"
    MALFORMED = "malformed"
    BREAKER_OPEN = "breaker_open"
    REJECTED = "rejected"
    NOT_THIS_SERVICE = "not_this_service"
    TOKEN_REFUSED = "token_refused"  # noqa: S105 - a kind of fault, not a secret
    NOT_ALLOWED = "not_allowed"
    INCOMPATIBLE = "incompatible"
    UNSUPPORTED = "unsupported"
    CERTIFICATE = "certificate"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the fault table.

    - `stage`: where this kind of fault starts
    - `same`: when the same daemon may be asked again
    - `next`: whether another daemon may do better
    - `incident`: whether it speaks against the daemon's health (escalates, feeds a breaker)
    """

    stage: int
    same: Same
    next: bool
    incident: bool = True


TABLE: Final[Mapping[FaultKind, Row]] = MappingProxyType(
    {
        FaultKind.SLOW: Row(10, Same.NEVER, next=False, incident=False),
        FaultKind.NO_SLOT: Row(8, Same.WHILE_TIME, next=False, incident=False),
        FaultKind.UNREACHABLE: Row(8, Same.BACKOFF, next=True),
        FaultKind.DISCONNECTED: Row(8, Same.BACKOFF, next=True),
        FaultKind.TIMED_OUT: Row(8, Same.AFTER_OTHERS, next=True),
        FaultKind.THROTTLED: Row(8, Same.LATER, next=True, incident=False),
        FaultKind.SERVER_ERROR: Row(7, Same.ONCE, next=True),
        FaultKind.MALFORMED: Row(5, Same.NEVER, next=True),
        FaultKind.BREAKER_OPEN: Row(5, Same.NEVER, next=True, incident=False),
        FaultKind.REJECTED: Row(4, Same.NEVER, next=False, incident=False),
        FaultKind.NOT_THIS_SERVICE: Row(3, Same.NEVER, next=True),
        FaultKind.TOKEN_REFUSED: Row(3, Same.NEVER, next=True),
        FaultKind.NOT_ALLOWED: Row(3, Same.NEVER, next=False, incident=False),
        FaultKind.INCOMPATIBLE: Row(3, Same.NEVER, next=True, incident=False),
        FaultKind.UNSUPPORTED: Row(3, Same.NEVER, next=True, incident=False),
        FaultKind.CERTIFICATE: Row(1, Same.NEVER, next=False),
    }
)
"""Where each kind of fault starts, and what happens next. Every kind has a row."""


_KIND_OF_STATUS: Final[Mapping[int, FaultKind]] = MappingProxyType(
    {
        401: FaultKind.TOKEN_REFUSED,
        403: FaultKind.NOT_ALLOWED,
        404: FaultKind.NOT_THIS_SERVICE,
        405: FaultKind.NOT_THIS_SERVICE,
        407: FaultKind.TOKEN_REFUSED,  # a proxy between wants credentials of its own
        408: FaultKind.DISCONNECTED,  # RFC 9110, 15.5.9: the server gives up waiting on this connection
        410: FaultKind.NOT_THIS_SERVICE,
        421: FaultKind.NOT_THIS_SERVICE,
        425: FaultKind.THROTTLED,
        426: FaultKind.INCOMPATIBLE,
        428: FaultKind.INCOMPATIBLE,  # it wants to know first what this client can do
        429: FaultKind.THROTTLED,
        501: FaultKind.NOT_THIS_SERVICE,  # a server that does not know POST: a plain file server, for example
        503: FaultKind.THROTTLED,
    }
)


def kind_of_status(status: int) -> FaultKind | None:
    """Classify an HTTP status: None for the one success of the base protocol (200), else the kind of fault.

    A bust may be answered with 202, too, which says that it is kept as a job; everywhere else that is malformed.
    An unknown status of a known class is treated as the class's first (RFC 9110, section 15), so an unknown 4xx is a
    refused request. A redirect, an unexpected 2xx and anything outside 100 to 599 are malformed answers.
    """
    if status == 200:
        return None
    if kind := _KIND_OF_STATUS.get(status):
        return kind
    if 400 <= status < 500:
        return FaultKind.REJECTED
    if 500 <= status < 600:
        return FaultKind.SERVER_ERROR
    return FaultKind.MALFORMED


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed attempt: what happened, at which daemon, and whether the bust may have been applied there.

    `message` is one sentence without the target. `status` is the HTTP status, if one was read. `retry_after` is what
    the daemon asked for, in seconds. `incidents` is how many incidents in a row the daemon had before this one.
    `unmet` is what the daemon found unmet, a sentence each, if it says so: requirements, or rules of a hot swap.
    """

    kind: FaultKind
    daemon: str
    message: str
    applied: Applied
    status: int | None = None
    retry_after: float | None = None
    incidents: int = 0
    unmet: tuple[str, ...] = ()

    @property
    def stage(self) -> int:
        """The stage of this fault: where its kind starts, escalated by the daemon's incidents before it."""
        return escalate(TABLE[self.kind].stage, self.incidents)

    @property
    def is_incident(self) -> bool:
        """Whether it speaks against the daemon's health. A 503 does; a 429 says only that we ask too much."""
        return TABLE[self.kind].incident or (self.kind is FaultKind.THROTTLED and self.status == 503)

    @property
    def stage_for_call(self) -> int:
        """How this fault counts towards its call: escalated, but PANIC only if its kind starts there.

        A daemon that keeps failing is no reason to halt a call that others can serve.
        """
        return max(self.stage, min(TABLE[self.kind].stage, _LEAST_ESCALATED))

    @property
    def band(self) -> Band:
        """The band of the stage."""
        return band_of(self.stage)

    def __str__(self) -> str:
        return f"{self.daemon}: {self.message}"


_LEAST_ESCALATED: Final = 3
_FORGET: Final = 30.0
"""Seconds without a failure after which one incident is forgotten."""


@final
class Incidents:
    """Counts the incidents in a row of one daemon: what escalates its faults.

    A failure is a new incident only if its attempt began after the last counted failure had ended, so that many
    concurrent failures of one outage are one. A success sets the count to 0; otherwise it falls by 1 for each 30 s
    without a failure, and never another way.
    """

    def __init__(self) -> None:
        self._count = 0
        self._ended = -math.inf
        self._last = -math.inf

    def count(self, now: float) -> int:
        """Tell how many incidents in a row there are."""
        if self._count:
            forgotten = int((now - self._last) // _FORGET)
            self._count = max(0, self._count - forgotten)
            self._last += forgotten * _FORGET
        return self._count

    def failed(self, begun: float, now: float) -> tuple[int, bool]:
        """Take in a failure of an attempt that began then; tell (incidents before it, whether it is a new one)."""
        before = self.count(now)
        self._last = now
        if begun <= self._ended:
            return max(0, before - 1), False
        self._ended = now
        self._count = before + 1
        return before, True

    def succeeded(self) -> None:
        """Take in a success."""
        self._count = 0


class AttemptFailed(Exception):
    """One attempt at one daemon failed. Passed between the floors; callers see it only as a `__cause__`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault
