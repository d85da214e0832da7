"""The dispatcher under virtual time: scripted daemons in, who was asked when and what came of it out."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import anyio
import pytest

from pybustcall.dispatcher import Receipt, dispatch
from pybustcall.faults import AttemptFailed, Fault, FaultKind
from pybustcall.policies import Retry
from tests.conftest import virtual_time


@dataclass
class Scripted:
    """A daemon that takes so many seconds to answer or to fail, attempt after attempt; the last line repeats."""

    url: str
    script: deque[tuple[float, FaultKind | str]]
    asked: list[float] = field(default_factory=list)
    under_way: int = 0

    async def answer(self, until: float) -> str:
        """Play the next line of the script, as a daemon client would: never beyond `until`."""
        loop = asyncio.get_running_loop()
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
            raise AttemptFailed(Fault(outcome, self.url, "it failed", "no"))
        return outcome


def daemon(url: str, *lines: tuple[float, FaultKind | str]) -> Scripted:
    """Script a daemon."""
    return Scripted(url, deque(lines))


NEVER = 1e6


async def ask(one: Scripted, /, *, until: float, deadline: float) -> str:
    """Make one attempt."""
    assert until <= deadline
    return await one.answer(until)


async def run(*daemons: Scripted, timeout: float = 5.0, chance: float = 0.0) -> tuple[Receipt[Scripted, str], float]:
    """Dispatch one call; tell the receipt and how long it took."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    receipt = await dispatch(ask, daemons, deadline=begun + timeout, retry=Retry(), random=lambda: chance)
    assert all(one.under_way == 0 for one in daemons)
    return receipt, loop.time() - begun


@virtual_time
async def test_the_hub_answers() -> None:
    """One attempt, and nobody else is asked."""
    hub, peer = daemon("hub", (0.1, "done")), daemon("peer", (0.1, "done"))
    receipt, _ = await run(hub, peer)
    assert (receipt.ending, receipt.reply, receipt.daemon) == ("answered", "done", hub)
    assert [attempt.stage for attempt in receipt.attempts] == [12]
    assert peer.asked == []


@virtual_time
async def test_a_refused_connection_is_tried_again_with_backoff() -> None:
    """Refused twice, then answered: three attempts at the hub, the waits inside their ceilings."""
    hub = daemon("hub", (0, FaultKind.UNREACHABLE), (0, FaultKind.UNREACHABLE), (0.01, "done"))
    receipt, elapsed = await run(hub, chance=1.0)
    assert receipt.reply == "done"
    assert [attempt.stage for attempt in receipt.attempts] == [8, 8, 12]
    assert elapsed == pytest.approx(0.05 + 0.1 + 0.01, abs=0.01)


@virtual_time
async def test_a_hanging_hub_hands_over_within_the_attempt_time() -> None:
    """2 s for the hub, then the peer, which answers at once."""
    hub, peer = daemon("hub", (NEVER, "late")), daemon("peer", (0.01, "done"))
    receipt, elapsed = await run(hub, peer)
    assert receipt.daemon is peer
    assert elapsed == pytest.approx(2.01, abs=0.05)
    assert receipt.causes[0].kind is FaultKind.TIMED_OUT


@virtual_time
async def test_a_dead_hub_is_left_after_its_attempts() -> None:
    """Refused three times, then the peer: a lone caller is served within 0.2 s."""
    hub, peer = daemon("hub", (0, FaultKind.UNREACHABLE)), daemon("peer", (0.01, "done"))
    receipt, elapsed = await run(hub, peer, chance=1.0)
    assert receipt.daemon is peer
    assert len(hub.asked) == 3
    assert elapsed < 0.2


@virtual_time
async def test_when_all_hang_the_deadline_ends_the_call() -> None:
    """Three black holes: 5 s, not more, and every daemon had its chance."""
    daemons = [daemon(name, (NEVER, "late")) for name in ("hub", "b", "c")]
    receipt, elapsed = await run(*daemons)
    assert receipt.ending == "deadline"
    assert elapsed == pytest.approx(5.0, abs=0.02)
    assert all(one.asked for one in daemons)
    assert receipt.reply is None
    assert receipt.error is not None


@virtual_time
async def test_a_halting_fault_asks_nobody_else() -> None:
    """All would refuse what one refuses."""
    hub, peer = daemon("hub", (0, FaultKind.REJECTED)), daemon("peer", (0, "done"))
    receipt, _ = await run(hub, peer)
    assert receipt.ending == "halted"
    assert peer.asked == []


@virtual_time
async def test_the_attempts_tell_how_long_each_took() -> None:
    """Seconds, each attempt for itself."""
    receipt, _ = await run(daemon("hub", (0.3, FaultKind.MALFORMED)), daemon("peer", (0.2, "done")))
    assert [round(attempt.elapsed, 2) for attempt in receipt.attempts] == [0.3, 0.2]


@pytest.mark.parametrize("at", [0.0, 0.01, 1.0, 2.02, 3.5])
@virtual_time
async def test_cancellation_arrives_at_once_and_leaves_nothing_running(at: float) -> None:
    """Cancelled before the first attempt, in it, between two, and in the second daemon's."""
    hub = daemon("hub", (NEVER, "late"))
    peer = daemon("peer", (0, FaultKind.UNREACHABLE), (NEVER, "late"))
    call = asyncio.create_task(run(hub, peer, chance=1.0))
    await asyncio.sleep(at)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert hub.under_way == peer.under_way == 0
    assert len(asyncio.all_tasks()) == 1


@virtual_time
async def test_an_outer_timeout_is_the_callers_own() -> None:
    """asyncio.timeout around a call raises there, and is not taken for the daemon's."""
    hub = daemon("hub", (NEVER, "late"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await run(hub)
    assert hub.under_way == 0


@virtual_time
async def test_an_anyio_scope_cancels_a_call() -> None:
    """FastAPI's scopes deliver their cancellation, and only theirs."""
    hub = daemon("hub", (NEVER, "late"))
    with anyio.move_on_after(1.0) as scope:
        await run(hub)
    assert scope.cancelled_caught
    assert hub.under_way == 0


@virtual_time
async def test_an_unexpected_error_is_not_hidden() -> None:
    """Only AttemptFailed is a failed attempt; anything else is a defect and shows."""

    async def broken(one: Scripted, /, *, until: float, deadline: float) -> str:
        raise ZeroDivisionError

    now = asyncio.get_running_loop().time()
    with pytest.raises(ZeroDivisionError):
        await dispatch(broken, [daemon("hub", (0, "x"))], deadline=now + 1, retry=Retry(), random=lambda: 0)
