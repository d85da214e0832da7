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
from pybustcall.faults import (
    CLEAN,
    OVERSIGHT,
    TABLE,
    Band,
    Fault,
    FaultKind,
    Outcome,
    Oversight,
    band_of,
    call_stage,
)
from pybustcall.models import redact
from pybustcall.needs import remedy_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pybustcall.models import Kind, LayerReply

__all__ = [
    "Attempt",
    "BustReport",
    "BustResult",
    "BustStatus",
    "Delivery",
    "DeliveryStatus",
    "Ending",
    "LayerResult",
    "applied_of",
    "error_class",
    "failure",
    "stage_of",
    "summary",
]

BustStatus = Literal["busted", "dry_run", "accepted", "partial", "deferred", "failed", "disabled"]
DeliveryStatus = Literal["acknowledged", "accepted", "owed", "missed"]
Ending = Literal["answered", "halted", "exhausted", "silent", "deadline", "overtaken"]
"""Why a call stopped: a daemon answered, a fault forbade going on, nobody was left to ask, everybody was silent and the
bust can be stored, time was over, or enough others had answered."""


@final
@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at one daemon. `elapsed` is in seconds; `error` is None if it was acknowledged in good time."""

    daemon: str
    stage: int
    elapsed: float
    error: Fault | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What one layer of a daemon's caches did with a bust, if the daemon says so.

    - `daemon`: its URL; `name`: the layer's name there
    - `ok`: whether it is applied there; where it is not, `error` says why
    - `removed`: how many entries went, or were marked stale; of a dry run, how many would
    - `settle`: seconds from the answer to its second bust there, or None
    - `waits`: whether it is busted, or again if it is `ok`, once the layers that come before it are; it has not failed
    """

    daemon: str
    name: str
    ok: bool
    removed: int = 0
    error: str | None = None
    settle: float | None = None
    waits: bool = False

    @classmethod
    def of(cls, daemon: str, told: LayerReply) -> LayerResult:
        """Take what the daemon told of a layer."""
        return cls(
            daemon=daemon,
            name=told.name,
            ok=told.ok,
            removed=told.removed,
            error=told.error,
            settle=told.settle,
            waits=bool(told.waits),
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What one daemon did with a bust that was meant for many.

    - `status`: "acknowledged", "accepted" (it is in that daemon's journal, as `job`), "owed" (it is in the outbox, for
      this daemon: `row`) or "missed"
    - `stage`: the meet of its faults; `error`: the last of them
    - `removed`: how many entries went, if it says so
    """

    daemon: str
    status: DeliveryStatus
    stage: int
    removed: int | None = None
    error: Fault | None = None
    row: int | None = None
    job: str | None = None


@final
@dataclass(frozen=True, slots=True, repr=False)
class BustResult:
    """What one bust came to.

    - `status`: "busted" (applied at as many daemons as were asked for), "accepted" (in a daemon's journal as `job`, and
      not applied everywhere yet), "partial" (a layer of an accepted one failed, and is tried again; or fewer daemons
      have acknowledged, and the others are owed it), "deferred" (it is in the outbox, and will be delivered), "failed",
      "dry_run" (it was told what would go), or "disabled" (the client is switched off)
    - `stage`: 0 (worst) to 12 (clean), as this client saw it; `reported_stage` is the daemon's own word
    - `daemon`: URL of the daemon that acknowledged, or None
    - `cache_key`, `delegate`: what that daemon answered; `removed`: how many entries went, if it says so
    - `kind`, `soft`: what was busted, and how: as was asked, or what was sent instead (`allow_wider`), as `note` says
    - `namespace`, `dry_run`: as was asked; `matched`: how many entries a dry run covers
    - `verified`: whether a daemon has read back that nothing of it is left; None if it was not asked to
    - `layers`: what each layer of the daemons' caches did; `job`: the job's name at `daemon`
    - `attempts`: every attempt, in order; `elapsed`: seconds from the call to its end
    - `deliveries`: what each daemon did, if the bust was meant for many (delivery "quorum" or "all")
    - `rows`: the numbers of its rows in the outbox; `key`: the idempotency key that it carried
    - `note`: what else there is to say, such as that the budget for retries was spent
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
    deliveries: tuple[Delivery, ...] = ()
    rows: tuple[int, ...] = ()
    key: str | None = None
    note: str = ""
    reveal: bool = field(default=False, compare=False)
    kind: Kind = "key"
    namespace: str | None = None
    soft: bool = False
    dry_run: bool = False
    matched: int | None = None
    verified: bool | None = None
    layers: tuple[LayerResult, ...] = ()
    job: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the bust was applied at all that it asked for, or told by a dry run (or the client is disabled)."""
        return self.status in {"busted", "dry_run", "disabled"}

    @property
    def band(self) -> Band:
        """The band of the stage."""
        return band_of(self.stage)

    @property
    def oversight(self) -> Oversight:
        """What the bust asks of people: nothing, to be told, to look into it, or to act."""
        return OVERSIGHT[self.band]

    @property
    def causes(self) -> tuple[Fault, ...]:
        """What went wrong on the way, in order, also on the way to a success."""
        return tuple(attempt.error for attempt in self.attempts if attempt.error is not None)

    @property
    def applied(self) -> Applied:
        """Whether the bust reached a cache: "yes", "no" or "maybe"; of many daemons, whether it reached one.

        One that was only accepted is "yes" if the daemon says of every layer that it is applied there.
        """
        if self.dry_run:
            return "no" if self.status == "dry_run" else applied_of(self.causes)
        if self.status == "busted" or any(delivery.status == "acknowledged" for delivery in self.deliveries):
            return "yes"
        if self.job is not None:
            return "yes" if self.layers and all(layer.ok for layer in self.layers) else "maybe"
        return applied_of(self.causes)

    @property
    def label(self) -> str:
        """The target as logs and texts may show it."""
        return repr(self.target) if self.reveal else redact(self.target)

    def __repr__(self) -> str:
        what = self.label if self.kind == "key" else f"{self.kind} {self.label}"
        more = {"removed": self.removed, "matched": self.matched, "job": self.job}
        if self.dry_run:
            del more["removed"]
        told = "".join(f", {name}={value}" for name, value in more.items() if value is not None)
        return (
            f"BustResult({what} {self.status}, stage={self.stage} {self.band}{told}, daemon={self.daemon}, "
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
        FaultKind.UNSUPPORTED: IncompatibleDaemon,
        FaultKind.CERTIFICATE: Panic,
    }
)

_ADVICE: Final[Mapping[type[BustFailed], str]] = MappingProxyType(
    {
        BustFailed: "It needs no repeating; raise fault_tolerance to 3 or more if that is good enough.",
        BustRejected: "Mend the request: it would be refused again, here and at daemons with the same layers.",
        NotAllowed: "Check the token (BUSTCALL_TOKEN) and what the daemon allows it.",
        DeadlineExceeded: "Bust again, or allow more time with timeout=; busting twice does no harm.",
        DaemonsUnavailable: "Check that a daemon runs there (pybustcall status); busting again does no harm.",
        ProtocolViolation: "Check that the URL is a bustcall daemon's and not another service's.",
        IncompatibleDaemon: "Bring client and daemon to versions that fit, or ask the operator for what is lacking.",
        Panic: "Nothing more was tried: mend the certificate, or name its authority with tls=TLS(ca=...).",
    }
)

_ADVICE_WITHOUT_RESULT: Final[Mapping[type[BustFailed], str]] = MappingProxyType(
    {
        **_ADVICE,
        BustRejected: "Mend the request, or name another daemon with daemon=: what one knows is its own.",
        DeadlineExceeded: "Ask again, or allow more time with timeout=.",
        DaemonsUnavailable: "Check that a daemon runs there (pybustcall status), and ask again.",
    }
)
"""The same of calls that are no busts."""


_ADVICE_NOT_YET: Final = (
    "The daemon goes on with it by itself (client.job tells how far it is); raise fault_tolerance to 6 or more if that"
    " is good enough."
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
    *,
    changes: bool = False,
    repeat: str = "",
) -> BustFailed:
    """Make the error of a call that raises: what happened, where, whether it was applied, and what to do.

    `what` names the call without telling its target. Of a call without a result, `changes` says whether it changes
    anything at a daemon, and `repeat` what to do if it may have.
    """
    answered = result is not None and ending == "answered"
    chosen = BustFailed if answered else error_class(ending, causes)
    stage = result.stage if result is not None else stage_of(Outcome.FAILED, causes)
    applied: Applied = result.applied if result is not None else applied_of(causes) if changes else "no"
    verdict = {
        "yes": "it was applied",
        "no": "it was not applied",
        "maybe": "it may have been applied",
    }[applied]
    clean = result is None or result.status in {"busted", "dry_run"}
    head = {
        BustFailed: f"{what} was acknowledged, but {'only after faults' if clean else 'is not applied everywhere yet'}",
        DeadlineExceeded: f"{what} was not acknowledged within its deadline",
    }.get(chosen, f"{what} failed")
    told = f"{head} (stage {stage}, {band_of(stage)}, after {elapsed:.3f} s)"
    if result is not None:
        told += f"; {_who_has_it(result) or verdict}"
    elif changes:
        told += f"; {verdict}"
    note = result.note if result is not None else ""
    reasons = "; ".join(summary(causes)) or ("" if note else "no attempt could be made")
    if note:
        reasons += f" ({note})" if reasons else note
    advice = _ADVICE[chosen] if result is not None else _ADVICE_WITHOUT_RESULT[chosen]
    if not clean and answered:
        advice = _ADVICE_NOT_YET
    elif result is not None and causes and all(cause.kind is FaultKind.UNSUPPORTED for cause in causes):
        advice = remedy_of(result.kind, soft=result.soft, dry_run=result.dry_run, option="allow_wider=True")
    if applied == "maybe" and repeat:
        advice = repeat
    return chosen(
        f"{told}: {reasons}. {advice}",
        result=result,
        daemon=(result.daemon if result is not None else None) or (causes[-1].daemon if causes else None),
        stage=stage,
        band=band_of(stage),
        applied=applied,
        causes=causes,
        target=result.target if result is not None else None,
    )


def stage_of(outcome: Outcome, causes: Iterable[Fault]) -> int:
    """Tell the stage of a call with these faults."""
    return call_stage(outcome, (cause.stage_for_call for cause in causes))


def _who_has_it(result: BustResult) -> str:
    """Say which daemons have acknowledged and which have not, if it was meant for many."""
    if not result.deliveries:
        return ""
    have = [delivery.daemon for delivery in result.deliveries if delivery.status == "acknowledged"]
    begun = [delivery.daemon for delivery in result.deliveries if delivery.status == "accepted"]
    lack = [delivery.daemon for delivery in result.deliveries if delivery.status not in {"acknowledged", "accepted"}]
    told = f"applied at {', '.join(have)}" if have else "" if begun else "acknowledged by none"
    told += f"{'; ' if have else ''}accepted by {', '.join(begun)}" if begun else ""
    return f"{told}; not acknowledged by {', '.join(lack)}" if lack else told


def summary(causes: Iterable[Fault]) -> Iterable[str]:
    """Tell each cause once, and how often."""
    for text, times in Counter(str(cause) for cause in causes).items():
        yield text if times == 1 else f"{text} ({times} times)"


_KEPT: Final = 1000


@final
@dataclass(frozen=True, slots=True)
class BustReport:
    """What many busts came to: counts, and those that are not ok (at most 1,000 kept, `unkept` more were seen).

    `busted` counts those that are applied, `accepted` those that are in a daemon's journal and not applied everywhere
    yet, `partial` those that some daemons or layers have and others are owed, `deferred` those that are in the outbox,
    and `dry_run` those of which it was only told what would go. `elapsed` is in seconds for all of them together;
    `worst_stage` is the meet of every result's stage.
    """

    total: int = 0
    busted: int = 0
    partial: int = 0
    deferred: int = 0
    failed: int = 0
    elapsed: float = 0.0
    worst_stage: int = CLEAN
    failures: tuple[BustResult, ...] = ()
    unkept: int = 0
    accepted: int = 0
    dry_run: int = 0

    @property
    def ok(self) -> bool:
        """Whether every one of them was applied, or told by a dry run."""
        return self.busted + self.dry_run == self.total

    def __repr__(self) -> str:
        kinds = {
            "told by a dry run": self.dry_run,
            "accepted": self.accepted,
            "partial": self.partial,
            "deferred": self.deferred,
        }
        others = "".join(f", {count} {what}" for what, count in kinds.items() if count)
        told = f"{self.busted} of {self.total} busted{others}, {self.failed} failed"
        return f"BustReport({told}, elapsed={self.elapsed:.3f})"


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
            busted=report.busted + (result.status in {"busted", "disabled"}),
            dry_run=report.dry_run + (result.status == "dry_run"),
            accepted=report.accepted + (result.status == "accepted"),
            partial=report.partial + (result.status == "partial"),
            deferred=report.deferred + (result.status == "deferred"),
            failed=report.failed + (result.status == "failed"),
            worst_stage=min(report.worst_stage, result.stage),
        )

    def finish(self, elapsed: float) -> BustReport:
        """Make the report, once all results were added."""
        return replace(
            self._report,
            elapsed=elapsed,
            failures=tuple(self._failures),
            unkept=self._report.total - self._report.busted - self._report.dry_run - len(self._failures),
        )


assert TABLE.keys() == _CLASS_OF_KIND.keys(), "every kind of fault has an error class"  # noqa: S101 - a law of the tables
