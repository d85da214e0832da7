"""Delivery: one bust to as many daemons as were asked for; what is not acknowledged goes to the outbox.

This module decides what a call's receipts amount to: a result with its status and stage, and which daemon is owed
what. It sends through the dispatcher and stores through the outbox; whether a result raises is decided above. It knows
neither HTTP nor SQLite.

The promise (docs/explanation/resilience.md): "busted" was acknowledged by as many as were asked for; "deferred" and
"partial" are on disk for whoever has not, before the call returns. A call that is cancelled stores its bust first.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar, final

from pybustcall.dispatcher import Daemon, dispatch, dispatch_each
from pybustcall.errors import ClientClosed, InvalidRequest, OutboxError
from pybustcall.faults import TABLE, AttemptFailed, Band, Fault, FaultKind, Outcome, band_of
from pybustcall.models import KINDS, bust_request
from pybustcall.needs import phrase_of
from pybustcall.outbox import ANY, OutboxRow, StoredBust
from pybustcall.results import (
    Attempt,
    BustResult,
    BustStatus,
    Delivery,
    Ending,
    LayerResult,
    applied_of,
    stage_of,
)
from pybustcall.telemetry import BustDeferred

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from pybustcall.dispatcher import Adopt, Ask, Receipt
    from pybustcall.errors import Applied
    from pybustcall.fleet import Fleet
    from pybustcall.models import BustReply, BustRequest, Kind, LayerReply
    from pybustcall.outbox import OutboxStore
    from pybustcall.policies import Retry
    from pybustcall.telemetry import Event

__all__ = ["RESERVE", "Delivered", "Deliverer", "DeliveryMode", "Job", "Replay", "Send", "keeps"]

_log: Final = logging.getLogger("pybustcall")

DeliveryMode = Literal["first", "quorum", "all"]
"""How many daemons must acknowledge a bust: the first that answers, more than half, or every one."""

RESERVE: Final = 0.25
"""Seconds that attempts end before the deadline, where there is an outbox to store into, and that a cancelled call may
take to store its bust."""

_STORED_FROM: Final = 6
"""The least fault tolerance whose calls are stored: at 6 a WARNING is good enough."""

_MARGIN: Final = 1.0
"""Seconds beyond its deadline for which a call holds what it wrote ahead: if it was killed, others deliver it then."""

_REPLAY_TIME: Final = 5.0
"""Seconds that one delivery out of the outbox may take."""

_Daemon = TypeVar("_Daemon", bound=Daemon)
_Daemon_contra = TypeVar("_Daemon_contra", bound=Daemon, contravariant=True)
_Any = TypeVar("_Any")


class Send(Protocol[_Daemon_contra]):
    """One attempt to bust at one daemon; raises `AttemptFailed` with the fault, and nothing else."""

    async def __call__(
        self,
        daemon: _Daemon_contra,
        request: BustRequest,
        /,
        *,
        key: str,
        until: float,
        deadline: float,
        started: Callable[[], None],
        wider: bool,
    ) -> BustReply:
        """Send, and return the reply; `wider`: where the daemon cannot do it, the next wider bust that it can do."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One bust to be delivered.

    - `request`: what is sent; `key`: the idempotency key that every attempt carries
    - `begun`, `deadline`: absolute, by the running loop's clock
    - `mode`: how many must acknowledge; `retry`: how to try again
    - `write_ahead`: whether it is stored before the first attempt
    - `wider`: whether a daemon that cannot do it may be asked for the next wider bust that it can do

    A dry run is never stored, whatever is said here.
    """

    request: BustRequest
    key: str
    begun: float
    deadline: float
    mode: DeliveryMode
    retry: Retry | None
    write_ahead: bool = False
    reveal: bool = False
    wider: bool = False

    @property
    def stored(self) -> StoredBust:
        """What the outbox keeps of it."""
        return StoredBust(
            target=self.request.target,
            strategy=self.request.strategy,
            fault_tolerance=self.request.fault_tolerance,
            key=self.key,
            kind=self.request.kind,
            namespace=self.request.namespace,
            soft=self.request.soft,
            verify=self.request.verify,
            settle=self.request.settle,
            reason=self.request.reason,
            allow_wider=self.wider,
        )

    @property
    def patience(self) -> Retry | None:
        """How to try again. An attempt at a dry run may take all of the time: counting takes as long as it takes."""
        if not self.request.dry_run or self.retry is None:
            return self.retry
        return replace(self.retry, attempt_timeout=max(self.retry.attempt_timeout, self.deadline - self.begun))

    @property
    def tolerates_storing(self) -> bool:
        """Whether an outcome of "deferred" is good enough for it."""
        return self.request.fault_tolerance >= _STORED_FROM and not self.request.dry_run


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """What a delivery came to: the result, why it ended, and the error of the last attempt, for the chain of causes."""

    result: BustResult
    ending: Ending
    error: BaseException | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What became of a row of the outbox that was sent again.

    - `verdict`: "delivered"; "refused" (no daemon will ever take it); "later"
    - `causes`: the faults met; `paused`: daemons that refuse us, and not the bust
    """

    verdict: Literal["delivered", "refused", "later"]
    causes: tuple[Fault, ...] = ()

    @property
    def paused(self) -> frozenset[str]:
        """The daemons that take nothing from us until somebody mends a token, a certificate or an address."""
        return frozenset(cause.daemon for cause in self.causes if cause.kind in _PAUSES)

    @property
    def sent(self) -> bool:
        """Whether the bust may have reached a daemon."""
        return any(cause.applied != "no" for cause in self.causes)


_PAUSES: Final = frozenset(
    {
        FaultKind.TOKEN_REFUSED,
        FaultKind.NOT_ALLOWED,
        FaultKind.NOT_THIS_SERVICE,
        FaultKind.INCOMPATIBLE,
        FaultKind.CERTIFICATE,
    }
)


def keeps(causes: Sequence[Fault], tolerance: int) -> bool:
    """Decide whether a bust that failed so is stored: its tolerance accepts that, and no daemon refused it for good.

    Nor is it if nothing but that was met which no waiting mends: daemons that cannot do such a bust.
    """
    if _is_unsupported(causes):
        return False
    refused = any(cause.kind in {FaultKind.REJECTED, FaultKind.NOT_ALLOWED} for cause in causes)
    panicked = any(band_of(TABLE[cause.kind].stage) is Band.PANIC for cause in causes)
    return tolerance >= _STORED_FROM and not refused and not panicked


@final
class Deliverer(Generic[_Daemon]):
    """Delivers busts to one client's daemons, in one event loop.

    - `send`: makes one attempt at one daemon
    - `daemons`: as the fleet numbers them, the hub first
    - `store`: the outbox, or None; `owner`: the name under which its rows are leased
    - `adopt`: takes over tasks that may go on for a moment after their call
    - `emit`: is told of what is deferred; `wake`: is called when there is something to deliver later
    """

    def __init__(
        self,
        send: Send[_Daemon],
        daemons: Sequence[_Daemon],
        fleet: Fleet,
        *,
        random: Callable[[], float],
        adopt: Adopt,
        store: OutboxStore | None = None,
        owner: str = "",
        emit: Callable[[Event], object] = lambda _: None,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self._send = send
        self._daemons = daemons
        self._fleet = fleet
        self._random = random
        self._adopt = adopt
        self._store = store
        self._owner = owner
        self._emit = emit
        self._wake = wake

    async def bust(self, job: Job) -> Delivered:
        """Deliver one bust, and store what is owed.

        Raises `OutboxError` if it cannot be stored, and `ClientClosed` if the client was closed under it without an
        outbox. A cancellation stores the bust first, for at most 0.25 s, and then arrives.
        """
        tolerated = self._store is not None and job.tolerates_storing
        ahead: tuple[int, ...] = ()
        if job.write_ahead and self._store is not None and not job.request.dry_run:
            ahead = await self._write_ahead(self._store, job)
        try:
            legs = await self._attempt(job, tolerated=tolerated)
        except asyncio.CancelledError:
            if tolerated:
                await self._outlast(lambda: self._keep_cancelled(job, ahead))
            elif ahead:
                await self._outlast(lambda: self._take_back(ahead))
            raise
        except ClientClosed as closed:
            if not tolerated:
                await self._take_back(ahead)
                raise
            causes = (*closed.causes, Fault(FaultKind.DISCONNECTED, _HERE, "the client was closed", closed.applied))
            attempts = tuple(Attempt(cause.daemon, cause.stage, 0.0, cause) for cause in causes)
            legs = [_Leg(None, attempts, "exhausted", None if job.mode == "first" else self._daemons[0].url)]
            if job.mode != "first":
                legs += [_Leg(None, (), "exhausted", daemon.url) for daemon in self._daemons[1:]]
        owed = self._owed(job, legs)
        rows = await self._store_owed(job, legs, owed, ahead) if owed or ahead else {}
        return self._delivered(job, legs, rows)

    async def replay(self, row: OutboxRow, paused: frozenset[str] = frozenset()) -> Replay:
        """Send a row of the outbox again: to the daemon that is owed, or to one after the other until one answers."""
        loop = asyncio.get_running_loop()
        try:
            request = _request_of(row.bust)
        except InvalidRequest as error:  # nobody could send it: it was not this version that stored it
            fault = Fault(FaultKind.REJECTED, _HERE, str(error), "no")
            return Replay(verdict="refused", causes=(fault,))
        causes: list[Fault] = []
        passed = False
        for index in self._fleet.order(loop.time()):
            daemon = self._daemons[index]
            if row.destination not in {ANY, daemon.url}:
                continue
            if daemon.url in paused:
                passed = True
                continue
            receipt = await dispatch(
                self._ask(request, row.bust.key, row.bust.allow_wider),
                self._daemons,
                self._fleet,
                deadline=loop.time() + _REPLAY_TIME,
                retry=None,
                random=self._random,
                only=index,
            )
            if receipt.reply is not None:
                return Replay(verdict="delivered", causes=tuple(causes))
            causes += receipt.causes
            if any(cause.kind is FaultKind.REJECTED for cause in receipt.causes):
                return Replay(verdict="refused", causes=tuple(causes))
        refused = not passed and _is_unsupported(causes)
        return Replay(verdict="refused" if refused else "later", causes=tuple(causes))

    def _ask(self, request: BustRequest, key: str, wider: bool) -> Ask[_Daemon, BustReply]:
        async def ask(daemon: _Daemon, /, *, until: float, deadline: float, started: Callable[[], None]) -> BustReply:
            return await self._send(
                daemon, request, key=key, until=until, deadline=deadline, started=started, wider=wider
            )

        return ask

    async def _attempt(self, job: Job, *, tolerated: bool) -> list[_Leg]:
        """Dispatch to one daemon or to all of them; return a leg for each receipt."""
        seconds = job.deadline - job.begun
        deadline = job.deadline - (min(RESERVE, seconds / 4) if tolerated else 0.0)
        ask = self._ask(job.request, job.key, job.wider)
        if job.mode == "first":
            receipt = await dispatch(
                ask,
                self._daemons,
                self._fleet,
                deadline=deadline,
                retry=job.patience,
                random=self._random,
                adopt=self._adopt,
                storable=tolerated,
            )
            daemon = receipt.daemon.url if receipt.daemon is not None else None
            return [_leg(receipt, daemon)]
        receipts = await dispatch_each(
            ask,
            self._daemons,
            self._fleet,
            needed=self._needed(job.mode),
            deadline=deadline,
            retry=job.patience,
            random=self._random,
            adopt=self._adopt,
            storable=tolerated,
        )
        return [_leg(receipt, daemon.url) for receipt, daemon in zip(receipts, self._daemons, strict=True)]

    def _needed(self, mode: DeliveryMode) -> int:
        return {"first": 1, "quorum": len(self._daemons) // 2 + 1, "all": len(self._daemons)}[mode]

    def _owed(self, job: Job, legs: list[_Leg]) -> list[_Leg]:
        """Decide whose bust is to be stored."""
        lack = [leg for leg in legs if leg.reply is None]
        have = len(legs) - len(lack)
        enough = have >= self._needed(job.mode)
        if self._store is None or job.request.dry_run or (enough and job.mode == "first"):
            return []
        if enough:  # the call is well; each that has missed it is owed, but for one that would refuse it again
            return [leg for leg in lack if keeps(_causes([leg]), _STORED_FROM)]
        able = [leg for leg in lack if not _is_unsupported(_causes([leg]))]
        if have + len(able) < self._needed(job.mode):  # so many will never have it: to promise it would be a lie
            return []
        return able if keeps(_causes(legs), job.request.fault_tolerance) else []

    async def _store_owed(self, job: Job, legs: list[_Leg], owed: list[_Leg], ahead: tuple[int, ...]) -> dict[str, int]:
        """Store what is owed, a row for each destination; return their numbers. What was written ahead is resolved.

        Once begun this is finished, although the call is cancelled, or its time is over.
        """
        loop = asyncio.get_running_loop()
        storing = loop.create_task(self._store_rows(job, owed, ahead))
        try:
            ended, _ = await asyncio.wait({storing}, timeout=max(RESERVE, job.deadline - loop.time()))
        except asyncio.CancelledError:
            await self._outlast(lambda: self._store_rows(job, owed, ahead), storing)
            raise
        if not ended:
            self._adopt(storing, _REPLAY_TIME)
            storing.add_done_callback(_seen)
            raise _told(OutboxError("the outbox took too long to store it; it may still be stored"), job, legs)
        try:
            return storing.result()
        except OutboxError as error:
            if not owed:  # a row that could not be deleted changes nothing of what the call came to: it costs a miss
                _log.warning("what was written ahead could not be taken back, and will be delivered: %s", error)
                return {}
            raise _told(error, job, legs) from error.__cause__

    async def _store_rows(self, job: Job, owed: list[_Leg], ahead: tuple[int, ...]) -> dict[str, int]:
        assert self._store is not None  # noqa: S101 - for the type checker: only then is anything owed
        destinations = [leg.daemon or ANY for leg in owed]
        sent = any(cause.applied != "no" for cause in _causes(owed))
        if ahead:
            written = dict(zip(self._destinations(job.mode), ahead, strict=True))
            rows = {destination: written[destination] for destination in destinations}
            await self._store.done(self._owner, [row for row in ahead if row not in rows.values()])
            if rows:
                rows = await self._give_back(self._store, job, rows, sent=sent, reason=_reason(owed))
        else:
            reasons = [_reason([leg]) for leg in owed]
            stored = await self._store.put(job.stored, destinations, sent=sent, reason=reasons)
            rows = dict(zip(destinations, stored, strict=True))
        self._tell_deferred(job, rows)
        return rows

    def _delivered(self, job: Job, legs: list[_Leg], rows: dict[str, int]) -> Delivered:
        have = [leg for leg in legs if leg.reply is not None]
        lack = [leg for leg in legs if leg.reply is None]
        enough = len(have) >= self._needed(job.mode)
        replies = [leg.reply for leg in have if leg.reply is not None]
        layers = tuple(layer for leg in have for layer in _layers(leg))
        status = _status(job.request, replies, enough=enough, owed=bool(rows), clean=all(layer.ok for layer in layers))
        # Of several that acknowledged, the one that is told is one whose answer was not the end of it.
        first = next((leg for leg in have if leg.reply is not None and leg.reply.accepted), have[0] if have else None)
        reply = first.reply if first is not None else None
        if enough and status in {"accepted", "partial"}:
            self._fleet.counts["accepted"] += 1
        result = BustResult(
            target=job.request.target,
            status=status,
            stage=stage_of(_OUTCOMES[status], _causes(legs)),
            daemon=first.daemon if first is not None else None,
            cache_key=reply.cache_key if reply is not None else None,
            delegate=reply.delegate if reply is not None else None,
            reported_stage=reply.fault_stage if reply is not None else None,
            removed=_sum(reply.removed for reply in replies),
            attempts=tuple(attempt for leg in legs for attempt in leg.attempts),
            elapsed=asyncio.get_running_loop().time() - job.begun,
            deliveries=() if job.mode == "first" else tuple(_delivery(leg, rows) for leg in legs),
            rows=tuple(rows.values()),
            key=job.key,
            note=_note(job.request, legs, have),
            reveal=job.reveal,
            kind=_kind(reply, job.request),
            namespace=job.request.namespace,
            soft=job.request.soft if reply is None else bool(reply.soft),
            dry_run=job.request.dry_run,
            matched=_sum(reply.matched for reply in replies),
            verified=_verified(job.request, replies),
            layers=layers,
            job=reply.job if reply is not None else None,
        )
        ending: Ending = "answered" if enough else _ending(lack)
        error = next((leg.error for leg in reversed(lack) if leg.error is not None), None)
        return Delivered(result=result, ending=ending, error=error)

    def _destinations(self, mode: DeliveryMode) -> list[str]:
        return [ANY] if mode == "first" else [daemon.url for daemon in self._daemons]

    async def _write_ahead(self, store: OutboxStore, job: Job) -> tuple[int, ...]:
        writing = asyncio.ensure_future(
            store.put(
                job.stored,
                self._destinations(job.mode),
                sent=False,
                owner=self._owner,
                lease=job.deadline - job.begun + _MARGIN,
            )
        )
        loop = asyncio.get_running_loop()
        try:
            ended, _ = await asyncio.wait({writing}, timeout=max(RESERVE, job.deadline - loop.time()))
        except asyncio.CancelledError:
            await self._outlast(lambda: self._let_go(store, job, writing))
            raise
        if not ended:
            late = loop.create_task(self._withdraw(writing))
            self._adopt(late, _REPLAY_TIME)
            late.add_done_callback(_seen)
            raise _told(OutboxError("the outbox took too long to write it ahead; nothing was sent"), job, [])
        return writing.result()

    async def _withdraw(self, writing: asyncio.Future[tuple[int, ...]]) -> None:
        """Take back what is written ahead too late."""
        await self._take_back(await writing)

    async def _let_go(self, store: OutboxStore, job: Job, writing: asyncio.Future[tuple[int, ...]]) -> None:
        """Release what a cancelled call has written ahead, to be delivered; or take it back, if so is its tolerance."""
        if writing.cancelled():  # the loop is ending: written or not, nobody can tell any more
            if job.tolerates_storing:
                await store.put(job.stored, self._destinations(job.mode), sent=False, reason=_CANCELLED)
        elif job.tolerates_storing:
            rows = dict(zip(self._destinations(job.mode), await asyncio.shield(writing), strict=True))
            self._tell_deferred(job, await self._give_back(store, job, rows, sent=False, reason=_CANCELLED))
        else:
            await self._take_back(await asyncio.shield(writing))

    async def _keep_cancelled(self, job: Job, ahead: tuple[int, ...]) -> None:
        assert self._store is not None  # noqa: S101 - for the type checker: only then is anything kept
        destinations = self._destinations(job.mode)
        if ahead:
            written = dict(zip(destinations, ahead, strict=True))
            rows = await self._give_back(self._store, job, written, sent=True, reason=_CANCELLED)
        else:
            stored = await self._store.put(job.stored, destinations, sent=True, reason=_CANCELLED)
            rows = dict(zip(destinations, stored, strict=True))
        self._tell_deferred(job, rows)

    async def _give_back(
        self, store: OutboxStore, job: Job, rows: dict[str, int], *, sent: bool, reason: str
    ) -> dict[str, int]:
        """Release rows that were written ahead; store anew what is no longer ours.

        Its lease ended and another took it over, or its file was set aside meanwhile: a row too many costs one miss.
        """
        if await store.release(self._owner, list(rows.values()), sent=sent, reason=reason) == len(rows):
            return rows
        return dict(zip(rows, await store.put(job.stored, list(rows), sent=sent, reason=reason), strict=True))

    async def _take_back(self, ahead: tuple[int, ...]) -> None:
        if ahead and self._store is not None:
            await self._store.done(self._owner, ahead)

    def _tell_deferred(self, job: Job, rows: dict[str, int]) -> None:
        for destination, row in rows.items():
            self._emit(BustDeferred(daemon=destination, row=row, target=job.request.target))
        if rows:
            self._fleet.counts["deferred"] += 1
            self._wake()

    async def _outlast(
        self, work: Callable[[], Coroutine[object, object, _Any]], begun: asyncio.Task[_Any] | None = None
    ) -> None:
        """Let the work finish although the call is cancelled, again and again if need be; wait 0.25 s for it at most.

        `begun` is the work if it is under way. At its end a loop cancels every task, this one too; then the work is
        begun anew: a row too many is one miss too many, a row too few a bust lost. What takes longer goes on without
        us, and is waited for when the client is closed.
        """
        loop = asyncio.get_running_loop()
        task = begun or loop.create_task(work())
        end = loop.time() + RESERVE
        while (not task.done() or task.cancelled()) and (left := end - loop.time()) > 0:
            if task.cancelled():
                task = loop.create_task(work())
            try:
                await asyncio.wait({task}, timeout=max(0.001, left))
            except asyncio.CancelledError:
                continue  # our caller raises the one that brought us here
        if not task.done():
            self._adopt(task, _REPLAY_TIME)
        task.add_done_callback(_seen)


def _seen(task: asyncio.Future[_Any]) -> None:
    """Log an error that can be told to nobody, since it is the cancellation that arrives, or the call is over."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.warning("a bust could not be stored after its call: %s", error)


_HERE: Final = "this client"
_CANCELLED: Final = "the call was cancelled"
_BUDGET_SPENT: Final = "no further attempt: the budget that all calls share for retries is spent"


@final
@dataclass(frozen=True, slots=True)
class _Leg:
    """What one daemon, or the race of them, came to."""

    reply: BustReply | None
    attempts: tuple[Attempt, ...]
    ending: Ending
    daemon: str | None = None
    error: AttemptFailed | None = None
    budget_spent: bool = False


def _leg(receipt: Receipt[_Daemon, BustReply], daemon: str | None) -> _Leg:
    return _Leg(receipt.reply, receipt.attempts, receipt.ending, daemon, receipt.error, receipt.budget_spent)


def _causes(legs: Sequence[_Leg]) -> tuple[Fault, ...]:
    """List the faults, those of a leg that was halted last: they say what must be mended first."""
    ordered = sorted(legs, key=lambda leg: leg.reply is None and leg.ending == "halted")
    return tuple(attempt.error for leg in ordered for attempt in leg.attempts if attempt.error is not None)


def _is_unsupported(causes: Sequence[Fault]) -> bool:
    """Tell whether daemons that cannot do such a bust are all that was met."""
    return bool(causes) and all(cause.kind is FaultKind.UNSUPPORTED for cause in causes)


_OUTCOMES: Final[dict[BustStatus, Outcome]] = {
    "busted": Outcome.ACKNOWLEDGED,
    "dry_run": Outcome.ACKNOWLEDGED,
    "accepted": Outcome.KEPT,
    "partial": Outcome.KEPT,
    "deferred": Outcome.KEPT,
    "failed": Outcome.FAILED,
}


def _status(request: BustRequest, replies: Sequence[BustReply], *, enough: bool, owed: bool, clean: bool) -> BustStatus:
    """Tell what a bust came to.

    - `enough`: whether as many daemons have acknowledged as were asked for
    - `owed`: whether it is stored for those that have not
    - `clean`: whether no layer of those that have acknowledged failed
    """
    if not enough:
        return "failed" if not owed else "partial" if replies else "deferred"
    if request.dry_run:
        return "dry_run"
    if any(reply.accepted for reply in replies):
        return "accepted" if clean else "partial"
    return "busted"


def _kind(reply: BustReply | None, request: BustRequest) -> Kind:
    """Tell what was busted: what was sent is what is repeated in the answer, which was checked."""
    if reply is None:
        return request.kind
    return next((kind for kind in KINDS if kind == reply.kind), "key")


def _layers(leg: _Leg) -> tuple[LayerResult, ...]:
    said = leg.reply.layers if leg.reply is not None else ()
    return tuple(LayerResult.of(leg.daemon or "", it) for it in said)


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up what was told; None if nothing was."""
    told = [count for count in counts if count is not None]
    return sum(told) if told else None


def _verified(request: BustRequest, replies: Sequence[BustReply]) -> bool | None:
    """Tell whether each that acknowledged has read back that nothing is left; None if none was asked to."""
    if not request.verify or not replies:
        return None
    return all(bool(reply.verified) for reply in replies)


def _note(request: BustRequest, legs: Sequence[_Leg], have: Sequence[_Leg]) -> str:
    """Say what the status does not: what was sent instead, what is not done yet, and why no more was tried."""
    told = []
    for leg in have:
        assert leg.reply is not None  # noqa: S101 - for the type checker: these are they that have answered
        kind, soft = _kind(leg.reply, request), bool(leg.reply.soft)
        if (kind, soft) != (request.kind, request.soft):
            sent = request.model_copy(update={"kind": kind, "soft": soft})
            told.append(
                f"wider than asked: {leg.daemon} cannot do {phrase_of(request)}, and was sent {phrase_of(sent)}"
            )
        if leg.reply.accepted:
            told.append(f"{leg.daemon} goes on with it as the job {leg.reply.job}")
        told += [open_ for layer in leg.reply.layers if (open_ := _open_at(layer))]
    if any(leg.budget_spent for leg in legs if leg.reply is None):
        told.append(_BUDGET_SPENT)
    return "; ".join(told)


def _open_at(layer: LayerReply) -> str:
    """Say what is not done at a layer of a daemon; an empty text if all is."""
    if layer.ok:
        return f"its layer {layer.name} is busted again once the layers inside of it are" if layer.waits else ""
    return f"its layer {layer.name} {'waits' if layer.waits else 'failed'}: {layer.error or 'no reason was told'}"


def _ending(lack: Sequence[_Leg]) -> Ending:
    endings = {leg.ending for leg in lack}
    if "halted" in endings:
        return "halted"
    return "deadline" if endings == {"deadline"} else "exhausted"


def _delivery(leg: _Leg, rows: dict[str, int]) -> Delivery:
    daemon = leg.daemon or ""
    causes = _causes([leg])
    if (reply := leg.reply) is not None:
        return Delivery(
            daemon=daemon,
            status="accepted" if reply.accepted else "acknowledged",
            stage=stage_of(Outcome.KEPT if reply.accepted else Outcome.ACKNOWLEDGED, causes),
            removed=reply.removed,
            job=reply.job,
        )
    return Delivery(
        daemon=daemon,
        status="owed" if daemon in rows else "missed",
        stage=stage_of(Outcome.FAILED, causes),
        error=causes[-1] if causes else None,
        row=rows.get(daemon),
    )


def _reason(legs: Sequence[_Leg]) -> str:
    """Say in one line why a row is in the outbox."""
    causes = _causes(legs)
    return str(causes[-1]) if causes else "no attempt could be made in time"


def _told(error: OutboxError, job: Job, legs: Sequence[_Leg]) -> OutboxError:
    """Say of a bust that could not be stored what was tried before, and who has it."""
    causes = _causes(legs)
    have = [leg.daemon for leg in legs if leg.reply is not None and leg.daemon is not None]
    applied: Applied = "yes" if have else applied_of(causes)
    before = f"acknowledged by {', '.join(have)}; " if have else ""
    return OutboxError(
        f"{error}; before that: {before}{_reason(legs)}",
        daemon=causes[-1].daemon if causes else None,
        stage=stage_of(Outcome.FAILED, causes),
        band=band_of(stage_of(Outcome.FAILED, causes)),
        applied=applied,
        causes=causes,
        target=job.request.target,
    )


def _request_of(bust: StoredBust) -> BustRequest:
    """Make the request of a stored bust; raise `InvalidRequest` if it cannot be sent."""
    return bust_request(
        bust.target,
        bust.strategy,
        bust.fault_tolerance,
        kind=bust.kind,
        soft=bust.soft,
        namespace=bust.namespace,
        confirm=bust.kind == "all",  # it was confirmed when it was stored
        verify=bust.verify,
        settle=bust.settle,
        reason=bust.reason,
    )
