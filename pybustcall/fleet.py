"""The fleet: what one client knows of its daemons, in one event loop, and what follows from it.

It is fed what happens (a send, an answer, a fault, a probe, the time) and answers who is to be asked, in what order,
whether a daemon may be asked at all, when to hedge, and which daemon is to be probed when. It is pure: no clock, no
task, no socket. `plan` asks it for the course of one call; `dispatcher` and the prober tell it what came of that.

Theory of operation. Six things are known of a daemon, from the quickest to the slowest:

- *overdue*: it has answered nothing at all for several times its usual latency while calls wait for it. New calls
  avoid it, and those that wait move on. Any answer ends that.
- *suspect*: the last thing known of it is a fault that speaks against its health. It is asked after the others, by one
  call at a time, until it answers a bust or a probe, which now comes every second.
- *mute*: a request ended without any answer from it. A call that can be stored does not wait for such daemons alone.
- *down*: its breaker is not closed, or it missed several probes in a row. If it is the hub, calls leave it for the ring
  and return late and little by little (`topology.StarRing`).
- *misfit*: it and this client do not meet each other's requirements. It is asked nothing until that changes.
- *quarantined*: it met a fault of the PANIC band. Nothing is sent until three good probes, or `reset`.

The last candidate of a call is never refused outright: one call a second passes through an open breaker.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, final

from pybustcall.faults import CLEAN, TABLE, Band, Fault, FaultKind, Incidents, band_of
from pybustcall.policies import BreakerState, Circuit, HedgeAllowance, Latency, SharedBudget
from pybustcall.telemetry import AttemptMade, BreakerMoved, Event, FailedBack, FailedOver, FaultMet, Hedged
from pybustcall.topology import Route, StarRing, ring_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pybustcall.policies import Breaker, Budget, Failback, Hedge, Probes

__all__ = ["SILENCE", "DaemonView", "Fleet", "FleetView", "Flight", "Policies"]

_PASS: Final = 1.0
"""Seconds between two calls that pass an open breaker as their last candidate, and between two tries of a suspect."""

SILENCE: Final = 0.5
"""Seconds of silence after which a call that can be stored waits no longer, if nobody else is worth asking."""

_CLEARING: Final = 3
"""Good probes that end a quarantine."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """The policies that a fleet follows; None turns one off."""

    hedge: Hedge | None = None
    breaker: Breaker | None = None
    budget: Budget | None = None
    probes: Probes | None = None
    failback: Failback | None = None


@final
@dataclass(eq=False, slots=True)
class Flight:
    """One request to one daemon: boarded, then sent once it has a slot at `begun`.

    It ends by exactly one of the fleet's `answered`, `failed` and `dropped`, sent or not. `trial`: whether it tries a
    daemon whose breaker is not closed.
    """

    daemon: int
    begun: float
    trial: bool
    hedge: bool = False
    sent: bool = False
    slow: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonView:
    """What is known of one daemon now.

    - `role`: "hub" or "peer"
    - `breaker`: closed, open, half-open or quarantined, and `reason` if it is not closed
    - `suspect`, `overdue`, `down`: see docs/explanation/resilience.md; one that is left out counts as down
    - `misfit`: why it is left out as incompatible, or an empty text
    - `incidents`: in a row, which escalate its faults
    - `usual`: the live p95 of its answers in seconds, or None before there are enough of them
    - `in_flight`: requests on their way; `missed_probes`: in a row
    """

    url: str
    role: Literal["hub", "peer"]
    breaker: BreakerState
    reason: str
    suspect: bool
    overdue: bool
    down: bool
    incidents: int
    usual: float | None
    in_flight: int
    missed_probes: int
    misfit: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """Where calls go now. `route` is star, ring, waiting or returning; `hub_share` the part that goes to the hub first.

    `order` are the URLs in the order in which the next call would ask them; `budget` is what is left for retries and
    hedges, 0 to 1.
    """

    route: Route
    hub_share: float
    order: tuple[str, ...]
    budget: float
    daemons: tuple[DaemonView, ...]


@dataclass(slots=True)
class _Daemon:
    """What is known of one daemon."""

    url: str
    circuit: Circuit
    latency: Latency
    incidents: Incidents = field(default_factory=Incidents)
    flights: dict[Flight, None] = field(default_factory=dict)  # in the order in which they were sent
    heard: float = -math.inf
    suspect: bool = False
    mute: bool = False
    blamed: float = -math.inf
    passed: float = -math.inf
    claimed: float = -math.inf
    misses: int = 0
    vouchers: int = 0
    probe_at: float = math.inf
    misfit: str = ""
    unmet: tuple[str, ...] = ()


@final
class Fleet:
    """What one client knows of its daemons, the hub first.

    - `urls`: the daemons, the hub first
    - `policies`: what to follow
    - `client_id`: decides the order of the ring
    - `random`: uniform in [0, 1)
    - `emit`: is told what happens; it must return at once
    - `wake`: is called when a probe is due earlier than was said before
    """

    def __init__(
        self,
        urls: Sequence[str],
        policies: Policies,
        *,
        client_id: str,
        now: float,
        random: Callable[[], float],
        emit: Callable[[Event], object] = lambda _: None,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self.policies = policies
        self.counts: Counter[str] = Counter()
        self._random = random
        self._emit = emit
        self._wake = wake
        quantile, samples = (policies.hedge.quantile, policies.hedge.samples) if policies.hedge else (0.95, 100)
        self._daemons = [_Daemon(url, Circuit(policies.breaker), Latency(quantile, samples)) for url in urls]
        self._ring = [1 + peer for peer in ring_order(client_id, urls[1:])]
        self._route = StarRing(policies.failback)
        self._budget = SharedBudget(policies.budget)
        self._hedges = HedgeAllowance(policies.hedge, self._budget)
        self._tried_silence = -math.inf
        for index, daemon in enumerate(self._daemons):
            daemon.probe_at = now + self._interval(index)

    def __len__(self) -> int:
        return len(self._daemons)

    # Of one call

    def called(self, now: float) -> None:
        """Count a call: a share of the budget is earned, and of the hedges."""
        self.counts["calls"] += 1
        self._budget.called(now)
        self._hedges.called(now)

    def order(self, now: float) -> list[int]:
        """Tell in what order the next call asks the daemons: as the route says, those that are not well last."""
        self._advance(now)
        share = self._route.share(now)
        hub_first = share >= 1 or (share > 0 and self._random() < share) or self._lone_trial(now)
        preferred = [0, *self._ring] if hub_first else [*self._ring, 0]
        return sorted(preferred, key=lambda index: self._rank(index, now))

    def well(self, daemon: int, now: float) -> bool:
        """Tell whether a daemon may be asked and nothing speaks against it."""
        return self._rank(daemon, now) == 0

    def down(self, daemon: int, now: float) -> bool:
        """Tell whether a daemon is known to be down, so that it is not worth waiting for."""
        return bool(self._daemons[daemon].misfit) or self._missing(daemon) or not self._admits(daemon, now)

    def board(self, daemon: int, now: float, *, last: bool = False, hedge: bool = False) -> Flight | Fault:
        """Admit a request to a daemon: return its flight, or the fault of passing the daemon over.

        `last`: nobody else is left in this call; then one call a second passes an open breaker.
        """
        known = self._daemons[daemon]
        if known.misfit:
            return self._pass_over(known)
        if not self._admits(daemon, now):
            halted = known.circuit.state is BreakerState.QUARANTINED and bool(known.circuit.reason)
            if not last or halted or now - known.passed < _PASS:
                return self._pass_over(known)
            known.passed = now
        if known.suspect and self.policies.probes is None:
            known.blamed = now  # this is the one call a second that tries it
        return Flight(daemon, now, known.circuit.begin(), hedge)

    def try_down(self, daemon: int, now: float) -> bool:
        """Let one call a second ask a daemon that is down, where all are; tell whether this one may."""
        known = self._daemons[daemon]
        halted = known.circuit.state is BreakerState.QUARANTINED or bool(known.misfit)
        return not halted and now - known.passed >= _PASS

    def passed_over(self, daemon: int) -> Fault:
        """Tell the fault of passing over a daemon that is known to be down."""
        return self._pass_over(self._daemons[daemon])

    def _pass_over(self, known: _Daemon) -> Fault:
        if known.misfit:
            fault = Fault(FaultKind.INCOMPATIBLE, known.url, known.misfit, "no", unmet=known.unmet)
            self._emit(FaultMet(daemon=known.url, fault=fault))
            return fault
        reason = known.circuit.reason
        message = {
            BreakerState.QUARANTINED: f"it is in quarantine until {_CLEARING} good probes or client.reset()",
            BreakerState.HALF_OPEN: "its breaker is half-open, and another call is trying it",
            BreakerState.CLOSED: f"it missed {known.misses} probes in a row",
        }.get(known.circuit.state, "its breaker is open after repeated faults; one call a second tries it")
        fault = Fault(FaultKind.BREAKER_OPEN, known.url, f"{message}{f' ({reason})' if reason else ''}", "no")
        self._emit(FaultMet(daemon=known.url, fault=fault))
        return fault

    def claim_retry(self, daemon: int, now: float, until: float) -> bool:
        """Let one call at a time try a failing daemon again, until then; tell whether this one may.

        The others go on to another daemon meanwhile, so an outage does not meet every call's retries.
        """
        known = self._daemons[daemon]
        if now < known.claimed:
            return False
        known.claimed = until
        return True

    def release_retry(self, daemon: int, until: float) -> None:
        """End the claim that was made until then; one that ran out, and was made by another call since, stays."""
        if self._daemons[daemon].claimed == until:
            self._daemons[daemon].claimed = -math.inf

    def can_retry(self, now: float) -> bool:
        """Tell whether there is budget for a second send to one daemon."""
        return self._budget.affords(now)

    def spend_retry(self, now: float) -> None:
        """Spend a second send to one daemon, after `can_retry`."""
        self._budget.take(now)
        self.counts["retries"] += 1

    def deny_retry(self) -> None:
        """Count a second send for which there was no budget."""
        self.counts["retries_denied"] += 1

    def spend_hedge(self, slow: Flight, now: float) -> bool:
        """Spend a hedge of this request; tell whether that may be."""
        if not self._hedges.take(now):
            return False
        self.counts["hedges"] += 1
        self._probe_soon(self._daemons[slow.daemon], now)
        return True

    def told_hedge(self, slow: Flight, helper: int, now: float, *, overdue: bool) -> None:
        """Tell the hooks that a second daemon is asked."""
        urls = self._daemons[helper].url, self._daemons[slow.daemon].url
        self._emit(Hedged(daemon=urls[0], slow=urls[1], waited=now - slow.begun, overdue=overdue))

    def hedge_at(self, flight: Flight) -> float:
        """Tell when this request is slower than its daemon usually is: at the live quantile; inf if that is unknown."""
        usual = self._daemons[flight.daemon].latency.usual
        return math.inf if usual is None or self.policies.hedge is None else flight.begun + usual

    def overdue_at(self, flight: Flight) -> float:
        """Tell when this request is overdue, if its daemon answers nothing at all until then.

        One that still waits for its slot is so when those before it are.
        """
        known = self._daemons[flight.daemon]
        first = flight if flight.sent else next(iter(known.flights), None)
        return math.inf if first is None else max(known.heard, first.begun) + self._patience(known)

    def patience(self, daemon: int) -> float:
        """Tell for how many seconds a daemon may be silent before it is overdue; inf while its usual is unknown."""
        return self._patience(self._daemons[daemon])

    def hopeless_at(self, daemons: Iterable[int], now: float) -> float:
        """Tell from when on no daemon of these is worth waiting for: each is down, or silent for long; inf for never.

        Long is half a second, and several times what is usual; a second, where that is not known yet.
        """
        return max((self._hopeless_at(index, now) for index in daemons), default=-math.inf)

    def try_silence(self, now: float) -> bool:
        """Let one call a second ask daemons that are all silent; tell whether this one may."""
        if now - self._tried_silence < _PASS:
            return False
        self._tried_silence = now
        return True

    def silent(self, daemon: int) -> Fault:
        """Tell the fault of passing over a daemon that answers nothing."""
        known = self._daemons[daemon]
        if known.misfit:
            return self._pass_over(known)
        fault = Fault(FaultKind.BREAKER_OPEN, known.url, "it answers nothing; one call a second tries it", "no")
        self._emit(FaultMet(daemon=known.url, fault=fault))
        return fault

    def _hopeless_at(self, index: int, now: float) -> float:
        known = self._daemons[index]
        if known.mute or self.down(index, now):
            return -math.inf
        oldest = next(iter(known.flights), None)
        if oldest is None or self.policies.hedge is None:
            return math.inf
        unknown = known.latency.usual is None
        return max(known.heard, oldest.begun) + (2 * SILENCE if unknown else max(SILENCE, self._patience(known)))

    def judge(self, daemon: int, misfit: str, unmet: tuple[str, ...] = ()) -> None:
        """Take in why a daemon is to be left out as incompatible; an empty text lets it in again."""
        self._daemons[daemon].misfit = misfit
        self._daemons[daemon].unmet = unmet

    def found_overdue(self, flight: Flight, now: float) -> None:
        """Take in that a call gave up waiting for this request."""
        self.counts["overdue"] += 1
        self._blame(self._daemons[flight.daemon], now)

    # What came of it

    def sent(self, flight: Flight, now: float) -> None:
        """Take in that a request has its slot, and is sent."""
        flight.begun, flight.sent = now, True
        self._daemons[flight.daemon].flights[flight] = None
        self.counts["attempts"] += 1

    def answered(self, flight: Flight, now: float) -> None:
        """Take in that a request was acknowledged; note in its flight whether that took far longer than usual."""
        known = self._land(flight)
        flight.slow = now - flight.begun >= self._patience(known)
        known.heard = now
        known.suspect = known.mute = False
        known.misses = 0  # an acknowledged bust is better evidence than a probe
        known.incidents.succeeded()
        known.latency.add(now - flight.begun)
        self._watched(known, lambda: known.circuit.succeeded(now, trial=flight.trial))
        if flight.daemon == 0:
            self._route.hub_good(now)
        if flight.slow:
            self._probe_soon(known, now)
        stage = TABLE[FaultKind.SLOW].stage if flight.slow else CLEAN
        self._emit(AttemptMade(daemon=known.url, stage=stage, elapsed=now - flight.begun, hedge=flight.hedge))

    def failed(self, flight: Flight, fault: Fault, now: float) -> Fault:
        """Take in that a request failed; return the fault escalated by the daemon's incidents before it."""
        known = self._land(flight)
        if fault.status is not None:
            known.heard = now
        if fault.kind is FaultKind.TIMED_OUT:
            known.mute |= flight.sent and known.heard < flight.begun
        elif fault.kind is not FaultKind.NO_SLOT:
            known.mute = False  # it speaks, or it is dead, which shows at once
        if not fault.is_incident:
            known.circuit.released(trial=flight.trial)
        else:
            fault = self._incident(flight, fault, now)
        self._emit(AttemptMade(daemon=known.url, stage=fault.stage, elapsed=now - flight.begun, hedge=flight.hedge))
        self._emit(FaultMet(daemon=known.url, fault=fault))
        return fault

    def dropped(self, flight: Flight, now: float) -> None:
        """Take in that nobody waits for this request any more.

        If the daemon has answered nothing at all since it was sent, and that is long for it, this is an incident: what
        is cut before its timeout must not hide a daemon that swallows every request.
        """
        known = self._land(flight)
        if flight.sent and now - max(known.heard, flight.begun) >= self._patience(known):
            known.mute = True
            silent = Fault(FaultKind.TIMED_OUT, known.url, "it answered nothing until nobody waited any more", "maybe")
            self._emit(FaultMet(daemon=known.url, fault=self._incident(flight, silent, now)))
        else:
            known.circuit.released(trial=flight.trial)

    # Probes

    def next_probe(self) -> float:
        """Tell when the next probe is due; inf for never."""
        return min((daemon.probe_at for daemon in self._daemons), default=math.inf)

    def take_probes(self, now: float) -> list[int]:
        """Tell which daemons are to be probed now; each is due again once `probed` was told."""
        due = [index for index, daemon in enumerate(self._daemons) if daemon.probe_at <= now]
        for index in due:
            self._daemons[index].probe_at = math.inf
        return due

    def probed(self, index: int, fault: Fault | None, now: float) -> None:
        """Take in what a probe met: None for a good answer.

        Only a daemon that cannot be reached, or fails, has missed a probe; one that asks for a token, say, is there.
        """
        known = self._daemons[index]
        self.counts["probes"] += 1
        if fault is not None and (fault.kind is FaultKind.NO_SLOT or fault.status == 429):
            pass  # it says nothing of the daemon's health
        elif fault is not None and fault.kind in _MISSES:
            known.misses += 1
            known.vouchers = 0
            known.suspect = True
            known.blamed = now
            self.counts["probes_missed"] += 1
            if index == 0:
                self._poor_hub(now, f"{known.misses} probes missed: {fault.message}")
        else:
            known.misses = 0
            known.suspect = known.mute = False
            if index == 0:
                self._route.hub_good(now)
            known.vouchers += 1
            if known.circuit.state is BreakerState.QUARANTINED and known.vouchers >= _CLEARING:
                self._watched(known, known.circuit.clear)
        self._advance(now)
        known.probe_at = now + self._interval(index)

    def reset(self) -> None:
        """Forget every fault: close the breakers, end quarantines, return to the hub."""
        for known in self._daemons:
            self._watched(known, known.circuit.reset)
            known.incidents.succeeded()
            known.suspect, known.mute, known.misses, known.blamed = False, False, 0, -math.inf
        self._route.reset()

    def view(self, now: float) -> FleetView:
        """Take a snapshot."""
        order = self.order(now)
        return FleetView(
            route=self._route.route,
            hub_share=self._route.share(now),
            order=tuple(self._daemons[index].url for index in order),
            budget=self._budget.level(now),
            daemons=tuple(
                DaemonView(
                    url=known.url,
                    role="peer" if index else "hub",
                    breaker=known.circuit.state,
                    reason=known.circuit.reason,
                    suspect=known.suspect,
                    overdue=self._overdue(known, now),
                    down=self.down(index, now),
                    incidents=known.incidents.count(now),
                    usual=known.latency.usual,
                    in_flight=len(known.flights),
                    missed_probes=known.misses,
                    misfit=known.misfit,
                )
                for index, known in enumerate(self._daemons)
            ),
        )

    # Inside

    def _rank(self, index: int, now: float) -> int:
        known = self._daemons[index]
        if known.misfit:
            return 3
        if not self._admits(index, now):
            return 2
        if self._overdue(known, now) or self._missing(index):
            return 1
        return 1 if known.suspect and not self._may_try(known, now) else 0

    def _may_try(self, known: _Daemon, now: float) -> bool:
        """Tell whether a suspect may be tried: where nothing probes it, by one call at a time, once a second."""
        return self.policies.probes is None and not known.flights and now - known.blamed >= _PASS

    def _lone_trial(self, now: float) -> bool:
        """Tell whether a call tries the hub although calls go to the ring: once a second, where nothing probes it."""
        hub = self._daemons[0]
        quiet = not hub.flights and now - max(hub.blamed, hub.heard) >= _PASS
        return self.policies.probes is None and quiet and self._admits(0, now)

    def _admits(self, index: int, now: float) -> bool:
        known = self._daemons[index]
        vouched = self.policies.probes is None or known.vouchers > 0
        before = known.circuit.state
        admits = known.circuit.admits(now, vouched=vouched)
        self._tell_moved(known, before)
        return admits

    def _missing(self, index: int) -> bool:
        probes = self.policies.probes
        return probes is not None and self._daemons[index].misses >= probes.misses

    def _patience(self, known: _Daemon) -> float:
        policy, usual = self.policies.hedge, known.latency.usual
        if policy is None or usual is None:
            return math.inf
        return max(policy.overdue_least, policy.overdue * usual)

    def _overdue(self, known: _Daemon, now: float) -> bool:
        oldest = next(iter(known.flights), None)
        return oldest is not None and now - max(known.heard, oldest.begun) >= self._patience(known)

    def _land(self, flight: Flight) -> _Daemon:
        known = self._daemons[flight.daemon]
        known.flights.pop(flight, None)
        return known

    def _incident(self, flight: Flight, fault: Fault, now: float) -> Fault:
        known = self._daemons[flight.daemon]
        before, counted = known.incidents.failed(flight.begun, now)
        fault = replace(fault, incidents=before)
        self.counts["incidents"] += counted
        self._blame(known, now)
        self._watched(
            known,
            lambda: known.circuit.failed(now, before + 1, trial=flight.trial, counted=counted, random=self._random),
        )
        # One that was escalated this far may still serve as a last candidate; one that began there may not.
        halts = band_of(TABLE[fault.kind].stage) is Band.PANIC
        quarantined = known.circuit.state is BreakerState.QUARANTINED
        # Only probes end a quarantine: without them, a daemon that merely keeps failing is left to its breaker.
        clearable = self.policies.probes is not None
        if band_of(fault.stage) is Band.PANIC and (halts or (clearable and not quarantined)):
            self._watched(known, lambda: known.circuit.quarantine(fault.message if halts else ""))
        if flight.daemon == 0:
            self._poor_hub(now, fault.message)
        return fault

    def _blame(self, known: _Daemon, now: float) -> None:
        known.suspect = True
        known.blamed = now
        known.vouchers = 0
        self._probe_soon(known, now)

    def _probe_soon(self, known: _Daemon, now: float) -> None:
        probes = self.policies.probes
        if probes is not None and known.probe_at < math.inf:
            soon = now + self._spread(probes.suspect)
            if soon < known.probe_at:
                known.probe_at = soon
                self._wake()

    def _poor_hub(self, now: float, reason: str) -> None:
        hub = self._daemons[0]
        if len(self._daemons) == 1:
            return
        if hub.circuit.state is BreakerState.CLOSED and not self._missing(0):
            self._route.hub_poor()
        elif self._route.hub_down(now):
            self.counts["failovers"] += 1
            self._emit(FailedOver(daemon=self._daemons[self._ring[0]].url, hub=hub.url, reason=reason))

    def _advance(self, now: float) -> None:
        before = self._route.route
        after = self._route.advance(now, self._random)
        if after is not before and after in {Route.RETURNING, Route.STAR}:
            self.counts["failbacks"] += after is Route.STAR
            self._emit(FailedBack(daemon=self._daemons[0].url, share=self._route.share(now)))

    def _watched(self, known: _Daemon, act: Callable[[], None]) -> None:
        before = known.circuit.state
        act()
        self._tell_moved(known, before)

    def _tell_moved(self, known: _Daemon, before: BreakerState) -> None:
        circuit = known.circuit
        if circuit.state is not before:
            self._emit(BreakerMoved(daemon=known.url, old=before, new=circuit.state, reason=circuit.reason))

    def _interval(self, index: int) -> float:
        probes, known = self.policies.probes, self._daemons[index]
        if probes is None:
            return math.inf
        troubled = known.suspect or known.misses or known.circuit.state is not BreakerState.CLOSED
        return self._spread(probes.suspect if troubled else probes.peers if index else probes.hub)

    def _spread(self, seconds: float) -> float:
        jitter = self.policies.probes.jitter if self.policies.probes is not None else 0.0
        return seconds * (1 - jitter + 2 * jitter * self._random())


_MISSES: Final = frozenset(
    {
        FaultKind.UNREACHABLE,
        FaultKind.DISCONNECTED,
        FaultKind.TIMED_OUT,
        FaultKind.THROTTLED,  # 503, by a daemon that is stopping, say
        FaultKind.SERVER_ERROR,
        FaultKind.MALFORMED,
        FaultKind.CERTIFICATE,
    }
)
