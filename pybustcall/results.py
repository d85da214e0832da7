"""What a call came to: frozen records of each attempt and of the whole, as callers read them.

This module decides the shape, the order of evidence ("was it applied?") and which error class a failed result makes.
It never decides what to do next; that is `policies`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, final

from pybustcall.errors import (
    Applied,
    BustFailed,
    BustRejected,
    DaemonsUnavailable,
    DeadlineExceeded,
    IncompatibleDaemon,
    NotAllowed,
    Panic,
    ProtocolViolation,
)
from pybustcall.faults import CLEAN, TABLE, Band, Fault, FaultKind, Outcome, band_of, call_stage
from pybustcall.models import redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Attempt",
    "BustReport",
    "BustResult",
    "BustStatus",
    "Ending",
    "applied_of",
    "error_class",
    "failure",
    "summary",
]

BustStatus = Literal["busted", "failed", "disabled"]
Ending = Literal["answered", "halted", "exhausted", "deadline"]
"""Why a call stopped: a daemon answered, a fault forbade going on, nobody was left to ask, or time was over."""


@final
@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one daemon. `elapsed` is in seconds; `error` is None for the attempt that was acknowledged."""

    daemon: str
    stage: int
    elapsed: float
    error: Fault | None = None


@final
@dataclass(frozen=True, slots=True, repr=False)
class BustResult:
    """What one bust came to.

    - `status`: "busted" (a daemon acknowledged it), "failed", or "disabled" (the client is switched off)
    - `stage`: 0 (worst) to 12 (clean), as this client saw it; `reported_stage` is the daemon's own word
    - `daemon`: URL of the daemon that acknowledged, or None
    - `cache_key`, `delegate`: what that daemon answered; `removed`: how many entries went, if it says so
    - `attempts`: every attempt, in order; `elapsed`: seconds from the call to its end
    - `target`: the whole target; the result's repr shows it redacted, unless `reveal` is set
    """

    target: str
    status: BustStatus
    stage: int
    daemon: str | None = None
    cache_key: str | None = None
    delegate: str | None = None
    reported_stage: int | None = None
    removed: int | None = None
    attempts: tuple[Attempt, ...] = ()
    elapsed: float = 0.0
    reveal: bool = field(default=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the bust was acknowledged by all that it asked for (or the client is disabled)."""
        return self.status != "failed"

    @property
    def band(self) -> Band:
        """The band of the stage."""
        return band_of(self.stage)

    @property
    def causes(self) -> tuple[Fault, ...]:
        """What went wrong on the way, in order, also on the way to a success."""
        return tuple(attempt.error for attempt in self.attempts if attempt.error is not None)

    @property
    def applied(self) -> Applied:
        """Whether the bust reached a cache: "yes", "no" or "maybe"."""
        return "yes" if self.status == "busted" else applied_of(self.causes)

    @property
    def label(self) -> str:
        """The target as logs and texts may show it."""
        return repr(self.target) if self.reveal else redact(self.target)

    def __repr__(self) -> str:
        return (
            f"BustResult({self.label} {self.status}, stage={self.stage} {self.band}, daemon={self.daemon}, "
            f"attempts={len(self.attempts)}, elapsed={self.elapsed:.3f})"
        )


def applied_of(causes: Iterable[Fault]) -> Applied:
    """Tell whether failed attempts may have applied a bust: "maybe" as soon as one was sent and never answered."""
    return "maybe" if any(cause.applied != "no" for cause in causes) else "no"


_CLASS_OF_KIND: Final[Mapping[FaultKind, type[BustFailed]]] = MappingProxyType(
    {
        FaultKind.SLOW: DaemonsUnavailable,
        FaultKind.NO_SLOT: DaemonsUnavailable,
        FaultKind.UNREACHABLE: DaemonsUnavailable,
        FaultKind.DISCONNECTED: DaemonsUnavailable,
        FaultKind.TIMED_OUT: DaemonsUnavailable,
        FaultKind.THROTTLED: DaemonsUnavailable,
        FaultKind.SERVER_ERROR: DaemonsUnavailable,
        FaultKind.BREAKER_OPEN: DaemonsUnavailable,
        FaultKind.MALFORMED: ProtocolViolation,
        FaultKind.NOT_THIS_SERVICE: ProtocolViolation,
        FaultKind.REJECTED: BustRejected,
        FaultKind.TOKEN_REFUSED: NotAllowed,
        FaultKind.NOT_ALLOWED: NotAllowed,
        FaultKind.INCOMPATIBLE: IncompatibleDaemon,
        FaultKind.CERTIFICATE: Panic,
    }
)

_ADVICE: Final[Mapping[type[BustFailed], str]] = MappingProxyType(
    {
        BustFailed: "It needs no repeating; raise fault_tolerance to 3 or more if that is good enough.",
        BustRejected: "Mend the request; every daemon would refuse it.",
        NotAllowed: "Check the token (BUSTCALL_TOKEN) and what the daemon allows it.",
        DeadlineExceeded: "Bust again, or allow more time with timeout=; busting twice does no harm.",
        DaemonsUnavailable: "Check that a daemon runs there (pybustcall status); busting again does no harm.",
        ProtocolViolation: "Check that the URL is a bustcall daemon's and not another service's.",
        IncompatibleDaemon: "Bring client and daemon to versions that fit.",
        Panic: "Nothing more was tried: mend the certificate, or name its authority with tls=TLS(ca=...).",
    }
)


def error_class(ending: Ending, causes: tuple[Fault, ...]) -> type[BustFailed]:
    """Choose the error class of a failed call.

    `DeadlineExceeded` iff the deadline ended it. A fault that halted the call gives its class, since mending that is
    what the caller must do next. Otherwise: one class of causes, that class; mixed, `DaemonsUnavailable`.
    """
    if ending == "deadline":
        return DeadlineExceeded
    if ending == "halted":
        return _CLASS_OF_KIND[causes[-1].kind]
    classes = {_CLASS_OF_KIND[cause.kind] for cause in causes}
    return classes.pop() if len(classes) == 1 else DaemonsUnavailable


def failure(
    what: str,
    ending: Ending,
    causes: tuple[Fault, ...],
    elapsed: float,
    result: BustResult | None = None,
) -> BustFailed:
    """Make the error of a call that raises: what happened, where, whether it was applied, and what to do.

    `what` names the call without telling its target.
    """
    acknowledged = result is not None and result.status == "busted"
    chosen = BustFailed if acknowledged else error_class(ending, causes)
    stage = result.stage if result is not None else call_stage(Outcome.FAILED, (cause.stage for cause in causes))
    applied: Applied = result.applied if result is not None else "no"
    verdict = {
        "yes": "it was applied",
        "no": "it was not applied",
        "maybe": "it may have been applied",
    }[applied]
    head = {
        BustFailed: f"{what} was acknowledged, but only after faults",
        DeadlineExceeded: f"{what} was not acknowledged within its deadline",
    }.get(chosen, f"{what} failed")
    told = f"{head} (stage {stage}, {band_of(stage)}, after {elapsed:.3f} s)"
    if result is not None:
        told += f"; {verdict}"
    reasons = "; ".join(summary(causes)) or "no attempt could be made"
    return chosen(
        f"{told}: {reasons}. {_ADVICE[chosen]}",
        result=result,
        daemon=(result.daemon if result is not None else None) or (causes[-1].daemon if causes else None),
        stage=stage,
        band=band_of(stage),
        applied=applied,
        causes=causes,
        target=result.target if result is not None else None,
    )


def summary(causes: Iterable[Fault]) -> Iterable[str]:
    """Tell each cause once, and how often."""
    for text, times in Counter(str(cause) for cause in causes).items():
        yield text if times == 1 else f"{text} ({times} times)"


_KEPT: Final = 1000


@final
@dataclass(frozen=True, slots=True)
class BustReport:
    """What many busts came to: counts, and those that are not ok (at most 1,000 kept, `unkept` more were seen).

    `elapsed` is in seconds for all of them together; `worst_stage` is the meet of every result's stage.
    """

    total: int = 0
    busted: int = 0
    failed: int = 0
    elapsed: float = 0.0
    worst_stage: int = CLEAN
    failures: tuple[BustResult, ...] = ()
    unkept: int = 0

    @property
    def ok(self) -> bool:
        """Whether every one of them was acknowledged."""
        return self.failed == 0

    def __repr__(self) -> str:
        return f"BustReport({self.busted} of {self.total} busted, {self.failed} failed, elapsed={self.elapsed:.3f})"


@final
class ReportBuilder:
    """Counts results as they come, in flat memory."""

    def __init__(self) -> None:
        self._report = BustReport()
        self._failures: list[BustResult] = []

    def add(self, result: BustResult) -> None:
        """Count one result; keep it if it is not ok and there is room."""
        if not result.ok and len(self._failures) < _KEPT:
            self._failures.append(result)
        report = self._report
        self._report = replace(
            report,
            total=report.total + 1,
            busted=report.busted + result.ok,
            failed=report.failed + (not result.ok),
            worst_stage=min(report.worst_stage, result.stage),
        )

    def finish(self, elapsed: float) -> BustReport:
        """Make the report, once all results were added."""
        return replace(
            self._report,
            elapsed=elapsed,
            failures=tuple(self._failures),
            unkept=self._report.failed - len(self._failures),
        )


assert TABLE.keys() == _CLASS_OF_KIND.keys(), "every kind of fault has an error class"  # noqa: S101 - a law of the tables
