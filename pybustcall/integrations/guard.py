"""When a cache that keeps its readers waiting is no longer asked.

This module decides that for the readers' caches of every kind, for each event loop by itself. When a breaker opens, and
for how long, is decided by `policies`; what an error says of the cache, by the cache's own room.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from typing import TYPE_CHECKING, Final, Literal, TypeVar, final
from weakref import WeakKeyDictionary

from pybustcall.policies import Breaker, BreakerState, Circuit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["BREAKER", "Guard", "Guards", "Saying"]

BREAKER: Final = Breaker(incidents=3, open=1.0, cap=10.0, proofs=1)
"""When a cache that does not answer is no longer asked, unless it is told otherwise."""

Saying = Literal["answered", "silent", "nothing"]
"""What an error says of a cache: it kept nobody waiting, it did, or it was not asked at all."""

_T = TypeVar("_T")


@final
class Guard:
    """Lets calls of one event loop through to a cache, or none, or one that tries.

    What was begun before the breaker opened last counts no more when it ends: it may have waited long, and says nothing
    of the cache as it is now. `refuse` makes the error of a call that is not let through, of a text.
    """

    def __init__(self, policy: Breaker | None, where: str, refuse: Callable[[str], Exception]) -> None:
        self._circuit = Circuit(policy)
        self._where = where
        self._refuse = refuse
        self._silent = 0
        self._opened = -math.inf

    def begin(self, now: float) -> bool:
        """Take in that a call begins; tell whether it is the one that tries. Raises what `refuse` made if none may."""
        if not self._circuit.admits(now, vouched=True):
            rest = self._circuit.until - now
            again = f"in {rest:.1f} s" if rest > 0 else "by another call just now"
            raise self._refuse(f"{self._where} has not answered, and is tried again {again}; nothing was sent")
        return self._circuit.begin()

    def answered(self, now: float, *, trial: bool) -> None:
        """Take in an answer."""
        self._silent = 0
        self._circuit.succeeded(now, trial=trial)

    def silent(self, begun: float, now: float, *, trial: bool) -> None:
        """Take in that a call that began then got no answer."""
        counted = begun > self._opened
        self._silent += counted
        before = self._circuit.state
        self._circuit.failed(now, self._silent, trial=trial, counted=counted, random=random.random)
        if self._circuit.state is BreakerState.OPEN and before is not BreakerState.OPEN:
            self._silent, self._opened = 0, now

    def broken_off(self, *, trial: bool) -> None:
        """Take in that a call ended that says nothing of the cache."""
        self._circuit.released(trial=trial)


@final
class Guards:
    """A guard for each event loop, and calls that go through it.

    - `policy`, `where`, `refuse`: as of `Guard`
    - `judge`: tells what an error says of the cache; what it was not made for says nothing
    - `clock`: tells seconds
    """

    def __init__(
        self,
        policy: Breaker | None,
        where: str,
        refuse: Callable[[str], Exception],
        judge: Callable[[BaseException], Saying],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.clock = clock
        self._where = where
        self._refuse = refuse
        self._judge = judge
        self._guards: WeakKeyDictionary[asyncio.AbstractEventLoop, Guard] = WeakKeyDictionary()

    async def call(self, do: Callable[[], Awaitable[_T]]) -> _T:
        """Have something done, and take in what that says of the cache. Raises what `refuse` made if nobody may."""
        loop = asyncio.get_running_loop()
        guard = self._guards.get(loop)
        if guard is None:
            guard = self._guards[loop] = Guard(self.policy, self._where, self._refuse)
        begun = self.clock()
        trial = guard.begin(begun)
        saying: Saying = "answered"
        try:
            return await do()
        except BaseException as error:
            saying = self._judge(error)
            raise
        finally:
            match saying:
                case "answered":
                    guard.answered(self.clock(), trial=trial)
                case "silent":
                    guard.silent(begun, self.clock(), trial=trial)
                case "nothing":
                    guard.broken_off(trial=trial)
