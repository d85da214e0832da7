"""The dispatcher: drives one call over the daemons, each attempt raced against its time, under one deadline.

It acts on what `policies.CallPlan` decides and records what happened; it holds no rule of its own. What it asks of a
daemon is the small protocol below, so it knows neither HTTP nor addresses. Whether the outcome raises is decided
above, in `bustcall_core`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, final

from pybustcall.errors import ClientClosed
from pybustcall.faults import CLEAN, AttemptFailed
from pybustcall.policies import CallPlan, Send, Stop, Wait
from pybustcall.results import Attempt, applied_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pybustcall.faults import Fault
    from pybustcall.policies import Retry
    from pybustcall.results import Ending

__all__ = ["Ask", "Daemon", "Receipt", "dispatch"]


_TICK: Final = 0.001
"""The shortest wait, in seconds: a loop may wake a little early, and must not spin until the rest has passed."""


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


class Ask(Protocol[_Daemon_contra, _Reply_co]):
    """One attempt: ask this daemon, give up at `until`; raise `AttemptFailed` with the fault, and nothing else."""

    async def __call__(self, daemon: _Daemon_contra, /, *, until: float, deadline: float) -> _Reply_co:
        """Ask, and return the reply."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Receipt(Generic[_Daemon, _Reply]):
    """What a call came to: the reply and who gave it, or why it ended without one.

    `error` is the exception of the last failed attempt, with the foreign error as its cause.
    """

    ending: Ending
    attempts: tuple[Attempt, ...]
    daemon: _Daemon | None = None
    reply: _Reply | None = None
    error: AttemptFailed | None = None

    @property
    def causes(self) -> tuple[Fault, ...]:
        """The faults of the failed attempts, in order."""
        return tuple(attempt.error for attempt in self.attempts if attempt.error is not None)


async def dispatch(
    ask: Ask[_Daemon, _Reply],
    daemons: Sequence[_Daemon],
    *,
    deadline: float,
    retry: Retry | None,
    random: Callable[[], float],
) -> Receipt[_Daemon, _Reply]:
    """Ask the daemons, as the plan decides, until one answers, none may be asked any more, or the deadline is over.

    - `ask`: makes one attempt at one daemon
    - `daemons`: in the order in which they are asked
    - `deadline`: absolute, by the running loop's clock
    - `retry`: how to try again; None for one attempt at each daemon
    - `random`: uniform in [0, 1)

    Never raises for a failed attempt. `ClientClosed` tells what was tried before; cancellation passes at once and
    leaves nothing running.
    """
    now = asyncio.get_running_loop().time
    plan = CallPlan(len(daemons), deadline=deadline, retry=retry)
    attempts: list[Attempt] = []
    last: AttemptFailed | None = None
    while True:
        match plan.next_step(now()):
            case Wait(until):
                await asyncio.sleep(max(until - now(), _TICK))
            case Stop(ending):
                return Receipt(ending, tuple(attempts), error=last)
            case Send(index, until):
                daemon = daemons[index]
                begun = now()
                try:
                    reply = await ask(daemon, until=until, deadline=deadline)
                except AttemptFailed as failure:
                    last = failure
                    attempts.append(Attempt(daemon.url, failure.fault.stage, now() - begun, failure.fault))
                    plan.record(index, failure.fault, now(), random)
                except ClientClosed as closed:
                    closed.causes = tuple(attempt.error for attempt in attempts if attempt.error is not None)
                    if applied_of(closed.causes) == "maybe":
                        closed.applied = "maybe"
                    raise
                else:
                    attempts.append(Attempt(daemon.url, CLEAN, now() - begun))
                    return Receipt("answered", tuple(attempts), daemon, reply, last)
