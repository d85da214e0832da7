"""Scripted daemons for tests under virtual time, and fleets of them whose ring has a known order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.fleet import Fleet, Policies
from pybustcall.policies import Breaker, Budget, Failback, Hedge


@dataclass
class Scripted:
    """A daemon that takes so many seconds to answer or to fail, attempt after attempt; the last line repeats."""

    url: str
    script: deque[tuple[float, FaultKind | str]]
    asked: list[float] = field(default_factory=list)
    under_way: int = 0

    async def answer(self, until: float, started: Callable[[], None]) -> str:
        """Play the next line of the script, as a daemon client would: never beyond `until`."""
        loop = asyncio.get_running_loop()
        started()
        self.asked.append(round(loop.time(), 3))
        seconds, outcome = self.script[0] if len(self.script) == 1 else self.script.popleft()
        self.under_way += 1
        try:
            async with asyncio.timeout_at(until):
                await asyncio.sleep(seconds)
        except TimeoutError as error:
            raise AttemptFailed(Fault(FaultKind.TIMED_OUT, self.url, "no answer came in time", "maybe")) from error
        finally:
            self.under_way -= 1
        if isinstance(outcome, FaultKind):
            status = 503 if outcome is FaultKind.THROTTLED else None
            raise AttemptFailed(Fault(outcome, self.url, "it failed", "no", status=status))
        return outcome


def daemon(url: str, *lines: tuple[float, FaultKind | str]) -> Scripted:
    """Script a daemon."""
    return Scripted(url, deque(lines))


NEVER = 1e6


DEFAULTS = Policies(hedge=Hedge(), breaker=Breaker(), budget=Budget(), failback=Failback())


def fleet_of(daemons: tuple[Scripted, ...], policies: Policies = DEFAULTS, chance: float = 0.0) -> Fleet:
    """Make a fleet whose ring has the peers in the order given."""
    urls = [one.url for one in daemons]
    now = asyncio.get_running_loop().time()
    for number in range(10_000):
        fleet = Fleet(urls, policies, client_id=str(number), now=now, random=lambda: chance)
        if fleet.order(now) == list(range(len(urls))):
            return fleet
    raise AssertionError("no client has such a ring")
