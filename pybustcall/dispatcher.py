"""The dispatcher: drives one call over the daemons, a race of attempts under one deadline.

It acts on what `plan.CallPlan` decides, runs each attempt as a task, tells the fleet what came of it, and leaves none
behind: the loser of a race is handed to whoever owns the connections, for a moment in which it may finish; everything
else is cancelled and waited for before the call returns. What it asks of a daemon is the small protocol below, so it
knows neither HTTP nor addresses. Whether the outcome raises is decided above, in `bustcall_core`.

The order of the policies, from the outside in: deadline, failover, hedge, breaker, budget, retry, attempt. It is
declared in `ORDER` and pinned by a test.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, final

from pybustcall.errors import ClientClosed
from pybustcall.faults import CLEAN, AttemptFailed, Fault, FaultKind
from pybustcall.plan import CallPlan, Send, Stop, Wait
from pybustcall.results import Attempt, applied_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from pybustcall.fleet import Fleet, Flight
    from pybustcall.policies import Retry
    from pybustcall.results import Ending

__all__ = ["LINGER", "ORDER", "Ask", "Daemon", "Receipt", "dispatch", "dispatch_each", "reap"]

ORDER: Final = ("deadline", "failover", "hedge", "breaker", "budget", "retry", "attempt")
"""The policies around an attempt, from the outside in."""

LINGER: Final = 0.25
"""Seconds in which the loser of a race may finish: cancelled at once, it would cost its connection."""

_TICK: Final = 0.001
"""The shortest wait, in seconds: a loop may wake a little early, and must not spin until the rest has passed."""

_LATE: Final = 0.01
"""Seconds by which the loop may wake us late before we doubt that a silence is the daemon's: it may be our own."""


class Daemon(Protocol):
    """What the dispatcher needs of a daemon: a name."""

    @property
    def url(self) -> str:
        """The daemon's URL, which names it in results and errors."""
        ...


_Reply = TypeVar("_Reply")
_Reply_co = TypeVar("_Reply_co", covariant=True)
_Daemon = TypeVar("_Daemon", bound=Daemon)
_Daemon_contra = TypeVar("_Daemon_contra", bound=Daemon, contravariant=True)
_Result = TypeVar("_Result")


class Ask(Protocol[_Daemon_contra, _Reply_co]):
    """One attempt: ask this daemon, give up at `until`; raise `AttemptFailed` with the fault, and nothing else.

    `started` is to be called when the request begins: the wait for a connection slot before it is our own load.
    """

    async def __call__(
        self, daemon: _Daemon_contra, /, *, until: float, deadline: float, started: Callable[[], None]
    ) -> _Reply_co:
        """Ask, and return the reply."""
        ...


class Adopt(Protocol):
    """Who owns a loser of a race for its last moments: lets the task run for so many seconds, then cancels it."""

    def __call__(self, task: asyncio.Task[object], linger: float, /) -> None:
        """Take the task over."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Receipt(Generic[_Daemon, _Reply]):
    """What a call came to: the reply and who gave it, or why it ended without one.

    `error` is the exception of the last failed attempt, with the foreign error as its cause. `budget_spent`: whether
    the call could have gone on, had there been budget for another attempt.
    """

    ending: Ending
    attempts: tuple[Attempt, ...]
    daemon: _Daemon | None = None
    reply: _Reply | None = None
    error: AttemptFailed | None = None
    budget_spent: bool = False

    @property
    def causes(self) -> tuple[Fault, ...]:
        """The faults of the failed attempts, in order."""
        return tuple(attempt.error for attempt in self.attempts if attempt.error is not None)


async def reap(tasks: Iterable[asyncio.Task[_Result]]) -> None:
    """Cancel tasks and wait until they have ended, however often the waiting is cancelled; then let that arrive.

    Under an anyio scope a cancellation is delivered again and again; a task left behind would outlive its owner.
    """
    ours = list(tasks)
    left = {task for task in ours if not task.done()}
    for task in left:
        task.cancel()
    interrupted: asyncio.CancelledError | None = None
    while left:
        try:
            _, left = await asyncio.wait(left)
        except asyncio.CancelledError as error:
            interrupted = error
            left = {task for task in left if not task.done()}
    for task in ours:
        if not task.cancelled():
            task.exception()  # whoever wanted to know of it has looked before
    if interrupted is not None:
        raise interrupted


@final
class _Race(Generic[_Daemon, _Reply]):
    """One call under way."""

    def __init__(
        self, ask: Ask[_Daemon, _Reply], daemons: Sequence[_Daemon], fleet: Fleet, plan: CallPlan, deadline: float
    ) -> None:
        self._ask = ask
        self._daemons = daemons
        self._fleet = fleet
        self._plan = plan
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._bell: asyncio.Future[None] = self._loop.create_future()
        self._boarded: dict[asyncio.Task[_Reply], tuple[Flight, float]] = {}
        self._withdrawn: list[asyncio.Task[_Reply]] = []
        self._ended: list[asyncio.Task[_Reply]] = []
        self._attempts: list[Attempt] = []
        self._last: AttemptFailed | None = None

    async def run(self) -> Receipt[_Daemon, _Reply]:
        """Act on the plan until there is a reply, or nothing more to do."""
        while True:
            match self._plan.next_step(self._loop.time()):
                case Send() as sending:
                    self._start(sending)
                case Stop(ending):
                    return self._give_up(ending)
                case Wait(until):
                    await self._wait(until)
            ended, self._ended = self._ended, []
            # A reply wins over a failure that came in the same moment.
            for task in sorted(ended, key=lambda task: task.exception() is not None):
                if task.exception() is None:
                    return self._win(task)
                self._take_failure(task)

    async def settle(self) -> None:
        """Cancel what is still under way, and wait for its end."""
        self._plan.close()
        if self._boarded or self._withdrawn:
            await reap([*self._boarded, *self._withdrawn])

    def hand_over(self, adopt: Adopt) -> None:
        """Give what is still under way to its new owner."""
        for task in self._boarded:
            adopt(task, LINGER)
        self._boarded = {}

    def _start(self, sending: Send) -> None:
        flight = sending.flight
        if sending.instead_of is not None:
            self._withdraw(sending.instead_of)
        work: Coroutine[object, object, _Reply] = self._ask(
            self._daemons[sending.daemon],
            until=sending.until,
            deadline=self._deadline,
            started=partial(self._sent, flight),
        )
        task = self._loop.create_task(work)
        self._boarded[task] = (flight, self._loop.time())
        task.add_done_callback(partial(self._landed, flight))

    def _withdraw(self, flight: Flight) -> None:
        """Cancel an attempt that has not been sent; its last moments are waited for at the end of the call."""
        task = next(task for task, (boarded, _) in self._boarded.items() if boarded is flight)
        _, begun = self._boarded.pop(task)
        task.cancel()
        self._withdrawn.append(task)
        url = self._daemons[flight.daemon].url
        fault = Fault(FaultKind.NO_SLOT, url, "its slots are taken, and it is silent", "no")
        self._attempts.append(Attempt(fault.daemon, fault.stage, self._loop.time() - begun, fault))

    def _sent(self, flight: Flight) -> None:
        self._fleet.sent(flight, self._loop.time())
        if self._plan.races:  # from here on its daemon may be slow
            self._ring()

    def _landed(self, flight: Flight, task: asyncio.Task[_Reply]) -> None:
        """Tell the fleet how an attempt ended, be it in the race or in its last moments after it."""
        now = self._loop.time()
        error = None if task.cancelled() else task.exception()
        if isinstance(error, AttemptFailed):
            error.fault = self._fleet.failed(flight, error.fault, now)
        elif task.cancelled() or error is not None:
            self._fleet.dropped(flight, now)
        else:
            self._fleet.answered(flight, now)
        if task in self._boarded and not task.cancelled():
            self._ended.append(task)
            self._ring()

    def _ring(self) -> None:
        if not self._bell.done():
            self._bell.set_result(None)

    async def _wait(self, until: float) -> None:
        """Wait for the bell or the time.

        If the loop wakes us late, answers may lie unread in its sockets: it gets a few turns to read them before
        anybody concludes that a daemon was silent.
        """
        if not self._ended:
            timer = self._loop.call_at(max(until, self._loop.time() + _TICK), self._ring)
            try:
                await self._bell
            finally:
                timer.cancel()
            if self._loop.time() - until > _LATE:
                for _ in range(5):
                    await asyncio.sleep(0)
        self._bell = self._loop.create_future()

    def _take_failure(self, task: asyncio.Task[_Reply]) -> None:
        flight, begun = self._boarded.pop(task)
        now = self._loop.time()
        error = task.exception()
        if not isinstance(error, AttemptFailed):
            assert error is not None  # noqa: S101 - only failures come here
            raise self._told(error) if isinstance(error, ClientClosed) else error
        self._last = error
        self._attempts.append(Attempt(error.fault.daemon, error.fault.stage, now - begun, error.fault))
        self._plan.record(flight, error.fault, now)

    def _told(self, closed: ClientClosed) -> ClientClosed:
        """Say of a closed client what was tried before."""
        closed.causes = tuple(attempt.error for attempt in self._attempts if attempt.error is not None)
        if applied_of(closed.causes) == "maybe" or len(self._boarded) > 0:
            closed.applied = "maybe"
        return closed

    def _win(self, task: asyncio.Task[_Reply]) -> Receipt[_Daemon, _Reply]:
        flight, begun = self._boarded.pop(task)
        winner, now = self._daemons[flight.daemon], self._loop.time()
        self._note_losers(FaultKind.SLOW, f"it was slower than {winner.url}, which was asked as well")
        self._attempts.append(_acknowledged(winner.url, now - begun, slow=flight.slow))
        return self._receipt("answered", winner, task.result())

    def _give_up(self, ending: Ending) -> Receipt[_Daemon, _Reply]:
        if ending == "deadline":
            self._note_losers(FaultKind.TIMED_OUT, "no answer came in time")
        elif ending == "silent":
            self._note_losers(
                FaultKind.TIMED_OUT, "it is silent, as is everybody else, and was not waited for any longer"
            )
        else:
            self._note_losers(FaultKind.SLOW, "it was asked as well, and given up when the call was halted")
        for fault in self._plan.passed_over:
            self._attempts.append(Attempt(fault.daemon, fault.stage, 0.0, fault))
        return self._receipt(ending)

    def _note_losers(self, kind: FaultKind, message: str) -> None:
        now = self._loop.time()
        for flight, begun in self._boarded.values():
            fault = Fault(kind, self._daemons[flight.daemon].url, message, "maybe" if flight.sent else "no")
            self._attempts.append(Attempt(fault.daemon, fault.stage, now - begun, fault))

    def _receipt(
        self, ending: Ending, daemon: _Daemon | None = None, reply: _Reply | None = None
    ) -> Receipt[_Daemon, _Reply]:
        return Receipt(ending, tuple(self._attempts), daemon, reply, self._last, self._plan.budget_spent)


def _acknowledged(daemon: str, elapsed: float, *, slow: bool) -> Attempt:
    if not slow:
        return Attempt(daemon, CLEAN, elapsed)
    fault = Fault(FaultKind.SLOW, daemon, "it acknowledged, but took far longer than it usually does", "yes")
    return Attempt(daemon, fault.stage, elapsed, fault)


async def dispatch(
    ask: Ask[_Daemon, _Reply],
    daemons: Sequence[_Daemon],
    fleet: Fleet,
    *,
    deadline: float,
    retry: Retry | None,
    random: Callable[[], float],
    adopt: Adopt | None = None,
    only: int | None = None,
    storable: bool = False,
) -> Receipt[_Daemon, _Reply]:
    """Ask the daemons, as the plan decides, until one answers, none may be asked any more, or the deadline is over.

    - `ask`: makes one attempt at one daemon
    - `daemons`: as the fleet numbers them
    - `deadline`: absolute, by the running loop's clock
    - `retry`: how to try again; None for one attempt at each daemon
    - `random`: uniform in [0, 1)
    - `adopt`: takes over the losers of a race; without it they are cancelled
    - `only`: the index of the one daemon to ask, for a leg of `dispatch_each`
    - `storable`: whether the bust is stored if the call gives up; then silence is not waited for

    Never raises for a failed attempt. `ClientClosed` tells what was tried before; cancellation passes at once and
    leaves nothing running.
    """
    now = asyncio.get_running_loop().time()
    if only is None:
        fleet.called(now)
    plan = CallPlan(fleet, deadline=deadline, retry=retry, now=now, random=random, only=only, storable=storable)
    race = _Race(ask, daemons, fleet, plan, deadline)
    try:
        receipt = await race.run()
        if adopt is not None and receipt.ending in {"answered", "silent"}:
            race.hand_over(adopt)
        return receipt
    finally:
        await race.settle()


async def dispatch_each(
    ask: Ask[_Daemon, _Reply],
    daemons: Sequence[_Daemon],
    fleet: Fleet,
    *,
    needed: int,
    deadline: float,
    retry: Retry | None,
    random: Callable[[], float],
    adopt: Adopt | None = None,
    storable: bool = False,
) -> list[Receipt[_Daemon, _Reply]]:
    """Ask every daemon, each by a leg of its own; return a receipt for each, in the daemons' order.

    Once `needed` of them have acknowledged, the others have 0.25 s more; their receipts then end "overtaken". A daemon
    that is known to be down is passed over at once. A fault that halts, halts only its own leg.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    fleet.called(begun)
    up = {index for index in range(len(daemons)) if not fleet.down(index, begun)}
    if not up:  # nobody else is left: as with a single daemon, one call a second goes on
        up = {index for index in range(len(daemons)) if fleet.try_down(index, begun)}
    legs: list[asyncio.Task[Receipt[_Daemon, _Reply]]] = [
        loop.create_task(
            dispatch(
                ask,
                daemons,
                fleet,
                deadline=deadline,
                retry=retry,
                random=random,
                adopt=adopt,
                only=index,
                storable=storable,
            )
            if index in up
            else _passed_over(fleet.passed_over(index), daemon)
        )
        for index, daemon in enumerate(daemons)
    ]
    try:
        left: set[asyncio.Task[Receipt[_Daemon, _Reply]]] = set(legs)
        while left:
            ended, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            if any(leg.exception() is not None for leg in ended):
                break
            if sum(leg.done() and leg.result().reply is not None for leg in legs) >= needed:
                if left:
                    await asyncio.wait(left, timeout=LINGER)
                break
    finally:
        await reap(legs)
    return [
        _overtaken(daemon, loop.time() - begun) if leg.cancelled() else leg.result()
        for daemon, leg in zip(daemons, legs, strict=True)
    ]


async def _passed_over(fault: Fault, _daemon: _Daemon) -> Receipt[_Daemon, _Reply]:
    return Receipt("exhausted", (Attempt(fault.daemon, fault.stage, 0.0, fault),))


def _overtaken(daemon: _Daemon, elapsed: float) -> Receipt[_Daemon, _Reply]:
    fault = Fault(FaultKind.SLOW, daemon.url, "enough others had acknowledged before it did", "maybe")
    return Receipt("overtaken", (Attempt(daemon.url, fault.stage, elapsed, fault),))
