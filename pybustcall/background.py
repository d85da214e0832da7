"""What a client does on its own: probe its daemons, and deliver what is in its outbox.

Two tasks, begun with the first call of an event loop and ended by `aclose` or with the loop. When to probe is the
fleet's to decide, what a row's outcome means is `delivery`'s; here are only the loops that wait, ask and tell. Neither
holds the client itself, so that a client that is dropped can be noticed.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

from pybustcall.dispatcher import reap
from pybustcall.errors import ClientClosed, OutboxError
from pybustcall.outbox import ANY, LONGEST_DELAY
from pybustcall.telemetry import BustReplayed

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable, Collection, Coroutine

    from pybustcall.delivery import Replay
    from pybustcall.faults import Fault
    from pybustcall.fleet import Fleet
    from pybustcall.outbox import Outbox, OutboxRow, OutboxStore
    from pybustcall.telemetry import Event

__all__ = ["Courier", "Prober", "ReplayReport"]

_log: Final = logging.getLogger("pybustcall")

_BATCH: Final = 16
_AT_ONCE: Final = 8
_POLL: Final = 5.0
"""Seconds after which the outbox is looked at again: other processes put rows there too."""

_PAUSE: Final = 60.0
"""Seconds for which a daemon that refuses us (its token, its certificate) gets nothing out of the outbox."""

_LONGEST_ROUND: Final = 15.0


@final
class _Bell:
    """Something that can be waited for until a time, and rung before it."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, until: float) -> bool:
        """Wait until it was rung since the last time, or until then; tell whether it was."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(max(until, loop.time() + 0.001)):
                await self._rung.wait()
        except TimeoutError:
            return False
        self._rung.clear()
        return True


def _begin(work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    """Begin a task that inherits nothing of the call which happens to be the first: no span, no place in a queue."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


@final
class Prober:
    """Probes the daemons of a fleet when it says so.

    `probe` asks one daemon, by its index, and returns what went wrong, or None; it raises nothing.
    """

    def __init__(self, fleet: Fleet, probe: Callable[[int], Awaitable[Fault | None]]) -> None:
        self._fleet = fleet
        self._probe = probe
        self._bell = _Bell()
        self._task: asyncio.Task[None] | None = None
        self._probing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin, if that was not done before."""
        if self._task is None and self._fleet.policies.probes is not None:
            self._task = _begin(self._run(), "pybustcall-prober")

    def wake(self) -> None:
        """Say that a probe is due earlier than it was."""
        self._bell.ring()

    def cancel(self) -> None:
        """End, without waiting."""
        for task in (self._task, *self._probing):
            if task is not None:
                task.cancel()

    async def aclose(self) -> None:
        """End, and wait for that."""
        if self._task is not None:
            await reap([self._task, *self._probing])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for index in self._fleet.take_probes(loop.time()):
                task = loop.create_task(self._probe_one(index))
                self._probing.add(task)
                task.add_done_callback(self._probing.discard)
            # With every probe under way there is nothing due; each that ends rings.
            await self._bell.wait(min(self._fleet.next_probe(), loop.time() + 3600.0))

    async def _probe_one(self, index: int) -> None:
        fault: Fault | None = None
        try:
            fault = await self._probe(index)
        except Exception:  # noqa: BLE001 - logged; a daemon that is never probed again would never be trusted again
            _log.exception("an unexpected error while a daemon was probed")
        self._fleet.probed(index, fault, asyncio.get_running_loop().time())
        self._bell.ring()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a replay came to: busts delivered, set aside because they were refused, and left for later."""

    delivered: int = 0
    refused: int = 0
    left: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is left to deliver."""
        return not self.left


@final
class Courier:
    """Delivers what is in the outbox: in order for each target, at most `replay` a second, with jitter.

    - `deliver`: sends one row again; the set holds the daemons that are paused
    - `ready`: tells the URLs of the daemons that are well; nothing is sent to the others, except by `replay`
    - `owner`: the name under which rows are leased; `destinations`: the URLs of our daemons
    """

    def __init__(
        self,
        store: OutboxStore,
        policy: Outbox,
        deliver: Callable[[OutboxRow, frozenset[str]], Awaitable[Replay]],
        *,
        ready: Callable[[], frozenset[str]],
        owner: str,
        destinations: Collection[str],
        random: Callable[[], float],
        emit: Callable[[Event], object] = lambda _: None,
        counts: Counter[str],
    ) -> None:
        self._store = store
        self._policy = policy
        self._deliver = deliver
        self._ready = ready
        self._owner = owner
        self._destinations = tuple(destinations)
        self._random = random
        self._emit = emit
        self._counts = counts
        self._bell = _Bell()
        self._task: asyncio.Task[None] | None = None
        self._holds = self._closed = False
        self._paused: dict[str, float] = {}
        self._next_send = 0.0
        self._turn = asyncio.Lock()

    def start(self) -> None:
        """Begin, if that was not done before."""
        if self._task is None:
            self._task = _begin(self._run(), "pybustcall-courier")

    def wake(self) -> None:
        """Say that there is something to deliver, or somebody to deliver to."""
        self._bell.ring()

    def cancel(self) -> None:
        """End, without waiting."""
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """End, wait for that, and give back what was leased, so that another process need not wait for it."""
        self._closed = True
        try:
            if self._task is not None:
                await reap([self._task])
        finally:
            await self._give_back("its client was closed")

    async def _give_back(self, reason: str) -> None:
        """Release whatever is leased in our name: a lease that was cancelled under way never told us its rows."""
        if self._holds:
            try:
                await self._store.release(self._owner, None, sent=True, reason=reason, attempted=False)
            except OutboxError as error:
                _log.warning("what was leased in the outbox could not be given back: %s", error)
            self._holds = False  # only now: a cancellation may have come between

    async def replay(self) -> ReplayReport:
        """Deliver everything that is due, in one go, whoever is thought to be down; tell what came of it.

        What the background delivers in the same time is counted, too.
        """
        delivered, refused = self._counts["replayed"], self._counts["refused"]
        self._paused.clear()
        await self._store.hasten()
        seen: set[int] = set()
        while True:
            tried, _ = await self._round(self._destinations)
            if tried <= seen:  # nothing new: what is left has failed once, and waits
                break
            seen |= tried
        counts = await self._store.counts()
        return ReplayReport(
            delivered=self._counts["replayed"] - delivered,
            refused=self._counts["refused"] - refused,
            left=counts.pending + counts.leased,
        )

    async def _run(self) -> None:
        failures = delivered = 0
        before: frozenset[str] = frozenset()
        while True:
            pause = _POLL
            try:
                ready = self._ready()
                if ready - before:  # what waits for these in a backoff waits for nothing any more
                    await self._store.hasten(sorted((ready - before) | (frozenset() if before else frozenset({ANY}))))
                    failures = 0
                before = ready
                now = asyncio.get_running_loop().time()
                paused = {url for url, until in self._paused.items() if until > now}
                if ready - paused:
                    count = self._counts["replayed"]
                    tried, left = await self._round(sorted(ready - paused))
                    delivered += self._counts["replayed"] - count
                    failures = failures + 1 if tried and left == len(tried) else 0
                    pause = 0.0 if tried and not failures else _POLL
                    if not tried and delivered:
                        _log.info("busts that had waited in the outbox were delivered: %d", delivered)
                        delivered = 0
                else:
                    pause = 1.0
            except OutboxError as error:
                failures += 1
                _log.warning("the outbox cannot be worked on: %s", error)
            except Exception:  # noqa: BLE001 - logged; a courier that ends delivers nothing any more
                failures += 1
                _log.exception("an unexpected error while the outbox was delivered; it goes on")
            if failures:
                pause = min(_LONGEST_ROUND, 0.5 * 2 ** min(failures, 10))
            await self._rest(pause * (0.5 + self._random() / 2), before)

    async def _rest(self, seconds: float, before: frozenset[str]) -> None:
        """Wait so long, or until somebody rings, or a daemon is well that was not before (looked for every second)."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            if await self._bell.wait(loop.time() + min(1.0, left)) or self._ready() - before:
                return

    async def _round(self, destinations: Collection[str]) -> tuple[set[int], int]:
        """Lease a batch and deliver it; tell which rows those were, and how many could not be delivered now."""
        async with self._turn:
            if self._closed:
                raise ClientClosed("the client is closed; what is in the outbox stays there")
            await self._give_back("its delivery was broken off")
            self._holds = True
            rows = await self._store.lease(self._owner, destinations, self._batch)
            if not rows:
                self._holds = False
                return set(), 0
            queue = list(reversed(rows))
            verdicts: list[str] = []
            failures: list[Exception] = []

            async def work() -> None:
                while queue and not failures:
                    row = queue.pop()
                    try:
                        verdicts.append(await self._one(row))
                    except Exception as error:  # noqa: BLE001 - raised below, and not in a group, which nobody expects
                        failures.append(error)

            async with asyncio.TaskGroup() as workers:
                for _ in range(min(_AT_ONCE, len(rows))):
                    workers.create_task(work())
            if failures:
                raise failures[0]
            self._holds = False
            return {row.id for row in rows}, verdicts.count("later")

    @property
    def _batch(self) -> int:
        """How many rows to lease at once: no more than are sent, at our pace, in a part of the lease."""
        return max(1, min(_BATCH, int(self._policy.replay * self._policy.lease / 4)))

    async def _one(self, row: OutboxRow) -> str:
        """Deliver one row, and resolve it in the store."""
        await self._pace()
        now = asyncio.get_running_loop().time()
        paused = frozenset(url for url, until in self._paused.items() if until > now)
        replay = await self._deliver(row, paused)
        for url in replay.paused:
            self._paused[url] = asyncio.get_running_loop().time() + _PAUSE
        reason = str(replay.causes[-1]) if replay.causes else "no daemon that could take it takes anything from us now"
        if replay.verdict == "delivered":
            if not await self._store.done(self._owner, [row.id]):
                return replay.verdict  # our lease ended, and another took it over: it is theirs to count
        elif replay.verdict == "refused":
            _log.warning("a bust in the outbox (row %d) was refused and is set aside: %s", row.id, reason)
            await self._store.set_aside(self._owner, [row.id], reason)
        else:
            delay = (0.5 + self._random() / 2) * min(LONGEST_DELAY, 2.0 ** min(row.attempts, 10))
            await self._store.release(self._owner, [row.id], sent=replay.sent, reason=reason, delay=delay)
            return replay.verdict
        self._counts["replayed" if replay.verdict == "delivered" else "refused"] += 1
        daemon, ok = row.destination, replay.verdict == "delivered"
        self._emit(BustReplayed(daemon=daemon, row=row.id, target=row.bust.target, ok=ok))
        return replay.verdict

    async def _pace(self) -> None:
        """Wait for our turn: at most `replay` a second, each a little earlier or later."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        mine = max(now, self._next_send)
        self._next_send = mine + (0.5 + self._random()) / self._policy.replay
        if mine > now:
            await asyncio.sleep(max(mine - now, 0.001))
