"""The client and real daemons, with every fault that a network or a dying process can make, once each.

What is asserted is what a caller can rely on: whether the bust was done, by which daemon, what the first cause is
called, and whether `applied` tells the truth. How many attempts it took, and when, is the dispatcher's affair.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import pytest

from pybustcall import BustcallClient, BustFailed, BustResult, FaultKind, Retry
from pybustcall.testing import Answer, FakeDaemon, FaultyProxy, Trouble
from tests.conftest import PATIENCE, DaemonProcess, StartDaemon, eventually

pytestmark = pytest.mark.requirement("IMP-06")

PAGE = "page.html"
HASTY = Retry(attempt_timeout=0.3)
"""Attempts that nothing answers end soon."""
CALM = Retry(attempt_timeout=PATIENCE)
"""Attempts that are answered in some way are waited for, however slow the machine is just now."""


@dataclass(frozen=True)
class Case:
    """A trouble, what it is called, what is known of the bust, and whether it was done all the same."""

    trouble: Trouble
    kinds: frozenset[FaultKind]
    applied: frozenset[str]
    done: bool = False

    @property
    def kind(self) -> FaultKind:
        """One of the kinds."""
        return min(self.kinds)


def case(trouble: Trouble, kind: FaultKind, applied: str = "maybe", *, done: bool = False) -> Case:
    """Make a case with one right outcome."""
    return Case(trouble, frozenset({kind}), frozenset({applied}), done)


CASES = {
    "refuse": case(Trouble(refuse=True), FaultKind.UNREACHABLE, "no"),
    # The reset may come before the client knows that it is connected, or after.
    "reset": Case(
        Trouble(reset=True),
        frozenset({FaultKind.UNREACHABLE, FaultKind.DISCONNECTED}),
        frozenset({"no", "maybe"}),
    ),
    "stall": case(Trouble(stall=True), FaultKind.TIMED_OUT),
    "half-open": case(Trouble(half_open=True), FaultKind.TIMED_OUT),
    "late": case(Trouble(latency=3600.0), FaultKind.TIMED_OUT),
    "slow": case(Trouble(bandwidth=100.0), FaultKind.TIMED_OUT),
    "drip": case(Trouble(drip=0.1), FaultKind.TIMED_OUT, done=True),
    "request cut short": case(Trouble(close_after=20), FaultKind.DISCONNECTED),
    "request cut off": case(Trouble(close_after=20, abrupt=True), FaultKind.DISCONNECTED),
    "answer lost": case(Trouble(truncate=0), FaultKind.DISCONNECTED, done=True),
    "answer lost by a reset": case(Trouble(truncate=0, abrupt=True), FaultKind.DISCONNECTED, done=True),
    "answer's head truncated": case(Trouble(truncate=30), FaultKind.DISCONNECTED, done=True),
    "garbage": case(Trouble(garbage=True), FaultKind.MALFORMED, done=True),
}


def write_page(daemon: DaemonProcess) -> None:
    """Put a page into the cache."""
    (daemon.root / PAGE).write_text("old")


def is_cached(daemon: DaemonProcess) -> bool:
    """Tell whether the page is still there."""
    return (daemon.root / PAGE).exists()


def retry_for(kind: FaultKind) -> Retry:
    """Tell how to try what is expected to end like that."""
    return HASTY if kind == FaultKind.TIMED_OUT else CALM


@asynccontextmanager
async def faulty_way(daemon: DaemonProcess, trouble: Trouble | None = None) -> AsyncIterator[FaultyProxy]:
    """Put a proxy before the daemon, and a page into its cache."""
    write_page(daemon)
    async with FaultyProxy(daemon.url, trouble=trouble or Trouble()) as proxy:
        yield proxy


async def bust_alone(url: str, kind: FaultKind) -> BustFailed:
    """Bust with nobody else to ask; return the error that it must be, which is expected to be of that kind."""
    timeout = {FaultKind.TIMED_OUT: 1.0, FaultKind.THROTTLED: 5.0}.get(kind, PATIENCE)
    async with BustcallClient(url, retry=retry_for(kind), timeout=timeout) as client:
        with pytest.raises(BustFailed) as caught:
            await client.bust(PAGE)
    return caught.value


async def bust(url: str, *peers: str, kind: FaultKind | None = None) -> BustResult:
    """Bust with peers and time enough; the first is expected to fail like that."""
    retry = CALM if kind is None else retry_for(kind)
    async with BustcallClient(url, peers=peers, retry=retry, timeout=PATIENCE) as client:
        return await client.bust(PAGE)


@pytest.mark.parametrize("fault", CASES.values(), ids=CASES)
async def test_alone_the_call_fails_and_tells_the_truth(start_daemon: StartDaemon, fault: Case) -> None:
    """The first cause is what happened; `applied` never says no of what was done. Healed, the same way serves again."""
    daemon = start_daemon()
    async with faulty_way(daemon, fault.trouble) as proxy:
        error = await bust_alone(proxy.url, fault.kind)
        assert error.causes[0].kind in fault.kinds
        assert error.causes[0].daemon == proxy.url
        assert error.applied in fault.applied
        if fault.done:
            await eventually(lambda: not is_cached(daemon))
        assert is_cached(daemon) is not fault.done
        proxy.heal()
        assert (await bust(proxy.url)).daemon == proxy.url
    assert not is_cached(daemon)


async def test_a_healthy_peer_does_it(start_daemon: StartDaemon) -> None:
    """In each case the call succeeds, in the silent band, by the daemon that could be reached, and tells of the hub."""
    daemon = start_daemon()
    for name, fault in CASES.items():
        async with faulty_way(daemon, fault.trouble) as proxy:
            result = await bust(proxy.url, daemon.url, kind=fault.kind)
        assert (result.status, result.daemon, result.ok) == ("busted", daemon.url, True), name
        assert result.stage >= 9, name
        assert result.causes[0].kind in fault.kinds, name
        assert not is_cached(daemon), name


async def test_a_kept_connection_that_gets_into_trouble_does_no_harm(start_daemon: StartDaemon) -> None:
    """In each case the trouble begins after a bust that went well; the peer does the next."""
    daemon = start_daemon()
    for name, fault in CASES.items():
        async with faulty_way(daemon) as proxy:
            retry = retry_for(fault.kind)
            async with BustcallClient(proxy.url, peers=[daemon.url], retry=retry, timeout=PATIENCE) as client:
                assert (await client.bust("other.html")).daemon == proxy.url, name
                proxy.trouble = fault.trouble
                if fault.trouble.refuse:
                    proxy.drop_connections()
                result = await client.bust(PAGE)
        assert (result.status, result.daemon) == ("busted", daemon.url), name
        assert result.causes[0].kind in fault.kinds, name
        assert not is_cached(daemon), name


async def test_an_answer_truncated_in_its_body_is_told_and_was_applied(start_daemon: StartDaemon) -> None:
    """The head with its Content-Length arrives, three bytes of the body are missing."""
    daemon = start_daemon()
    async with faulty_way(daemon) as proxy:
        await bust(proxy.url)
        write_page(daemon)
        proxy.trouble = Trouble(truncate=proxy.bytes_down - 3)
        error = await bust_alone(proxy.url, FaultKind.DISCONNECTED)
    assert error.causes[0].kind == FaultKind.DISCONNECTED
    assert "in the middle of its answer" in error.causes[0].message
    assert error.applied == "maybe"
    assert not is_cached(daemon)


async def test_a_slow_way_is_no_fault(start_daemon: StartDaemon) -> None:
    """Latency with jitter and a narrow line, all within the attempt's time: a clean success."""
    trouble = Trouble(latency=0.02, jitter=0.02, bandwidth=20_000.0)
    async with faulty_way(start_daemon(), trouble) as proxy:
        async with BustcallClient(proxy.url, timeout=PATIENCE) as client:
            result = await client.bust(PAGE)
        assert (result.status, result.daemon, result.causes) == ("busted", proxy.url, ())


async def test_a_stall_that_ends_in_time_is_waited_for(start_daemon: StartDaemon) -> None:
    """The bust under way is acknowledged when the network comes back."""
    daemon = start_daemon()
    async with faulty_way(daemon, Trouble(stall=True)) as proxy:
        async with BustcallClient(proxy.url, retry=Retry(attempt_timeout=PATIENCE), timeout=PATIENCE) as client:
            pending = asyncio.create_task(client.bust(PAGE))
            await eventually(lambda: proxy.open_connections > 0)
            proxy.heal()
            assert (await pending).status == "busted"
    assert not is_cached(daemon)


async def test_a_proxy_whose_daemon_is_gone_resets_and_the_next_daemon_does_it(start_daemon: StartDaemon) -> None:
    """Later the way leads to another daemon, as after a move, and serves again."""
    daemon, other = start_daemon(), start_daemon()
    async with faulty_way(daemon) as proxy:
        daemon.kill()
        result = await bust(proxy.url, other.url, kind=FaultKind.DISCONNECTED)
        assert (result.daemon, result.causes[0].kind) == (other.url, FaultKind.DISCONNECTED)
        write_page(daemon)
        proxy.upstream = other.url
        assert (await bust(proxy.url)).daemon == proxy.url
    assert not is_cached(daemon)


@contextmanager
def stopped(daemon: DaemonProcess) -> Iterator[None]:
    """Stop a daemon's process (SIGSTOP), and let it go on (SIGCONT) at the end."""
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


async def test_a_stopped_process_is_passed_by_and_used_again_when_it_goes_on(start_daemon: StartDaemon) -> None:
    """Nothing answers, though the kernel still accepts; alone it is an error, and afterwards as if nothing had been."""
    daemon, peer = start_daemon(), start_daemon()
    with stopped(daemon):
        write_page(daemon)
        error = await bust_alone(daemon.url, FaultKind.TIMED_OUT)
        assert (error.causes[0].kind, error.applied) == (FaultKind.TIMED_OUT, "maybe")
        assert is_cached(daemon)
        result = await bust(daemon.url, peer.url, kind=FaultKind.TIMED_OUT)
        assert (result.daemon, result.causes[0].kind) == (peer.url, FaultKind.TIMED_OUT)
    write_page(daemon)
    result = await bust(daemon.url)
    assert (result.status, result.daemon) == ("busted", daemon.url)
    assert not is_cached(daemon)


async def test_a_stopped_process_still_does_what_it_had_got(start_daemon: StartDaemon) -> None:
    """The call has failed and said "maybe"; when the process goes on, it reads the request, and the page goes."""
    daemon = start_daemon()
    async with BustcallClient(daemon.url, retry=HASTY, timeout=1.0) as client:
        await client.bust("other.html")
        write_page(daemon)
        with stopped(daemon):
            with pytest.raises(BustFailed) as caught:
                await client.bust(PAGE)
            assert caught.value.applied == "maybe"
            assert is_cached(daemon)
        await eventually(lambda: not is_cached(daemon), "the daemon works off what it had got")


async def test_a_kill_in_the_middle_of_a_bust_is_survived_by_a_peer(start_daemon: StartDaemon) -> None:
    """SIGKILL while the request arrives: the peer does it, the cause is the connection that broke."""
    daemon, peer = start_daemon(), start_daemon()
    async with faulty_way(daemon) as proxy:
        async with BustcallClient(proxy.url, peers=[peer.url], timeout=PATIENCE) as client:
            await client.bust("other.html")
            before = proxy.bytes_up
            proxy.trouble = Trouble(bandwidth=2000.0)  # so that there is a middle
            pending = asyncio.create_task(client.bust(PAGE))
            await eventually(lambda: proxy.bytes_up > before)
            daemon.kill()
            result = await pending
    assert (result.status, result.daemon) == ("busted", peer.url)
    assert result.causes[0].kind == FaultKind.DISCONNECTED
    assert not is_cached(daemon)


async def test_a_kill_in_the_middle_of_a_lone_bust_is_told(start_daemon: StartDaemon) -> None:
    """Nobody else can do it: the call fails, and does not claim to know what it cannot."""
    daemon = start_daemon()
    async with faulty_way(daemon) as proxy:
        async with BustcallClient(proxy.url, retry=CALM, timeout=PATIENCE) as client:
            await client.bust("other.html")
            before = proxy.bytes_up
            proxy.trouble = Trouble(bandwidth=2000.0)
            pending = asyncio.create_task(client.bust(PAGE))
            await eventually(lambda: proxy.bytes_up > before)
            daemon.kill()
            with pytest.raises(BustFailed) as caught:
                await pending
    assert (caught.value.causes[0].kind, caught.value.applied) == (FaultKind.DISCONNECTED, "maybe")


WRONG_ANSWERS = {
    "wrong length, too long": (Answer(miscount=7), FaultKind.DISCONNECTED, True),
    "wrong length, too short": (Answer(miscount=-7), FaultKind.MALFORMED, True),
    "wrong key": (Answer.for_another("b"), FaultKind.MALFORMED, False),
    "web page": (Answer.page(), FaultKind.MALFORMED, False),
    "huge": (Answer.huge(), FaultKind.MALFORMED, True),
    "redirect": (Answer.redirect("http://127.0.0.1:1/"), FaultKind.MALFORMED, False),
    "reset": (Answer(reset=True), FaultKind.DISCONNECTED, True),
    "hang": (Answer(hang=True), FaultKind.TIMED_OUT, True),
    "late": (Answer(delay=0.6), FaultKind.TIMED_OUT, None),
    "throttled": (Answer.problem(429, retry_after=9), FaultKind.THROTTLED, False),
    "unavailable": (Answer.problem(503), FaultKind.THROTTLED, False),
    "failed": (Answer.problem(500), FaultKind.SERVER_ERROR, False),
    "failed after the effect": (Answer(status=500, body=b"", applies=True), FaultKind.SERVER_ERROR, True),
}


@pytest.mark.parametrize(("answer", "kind", "done"), WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
async def test_a_wrong_answer_is_told_and_a_peer_does_it(answer: Answer, kind: FaultKind, done: bool | None) -> None:
    """What no proxy can make, a daemon that misbehaves can; alone, `applied` does not deny what was done."""
    async with FakeDaemon([answer] * 20) as fake, FakeDaemon() as peer:
        result = await bust(fake.url, peer.url, kind=kind)
        assert (result.status, result.daemon, result.causes[0].kind) == ("busted", peer.url, kind)
        assert [bust.target for bust in peer.applied] == [PAGE]
        error = await bust_alone(fake.url, kind)
        assert error.causes[0].kind == kind
        assert done is None or bool(fake.applied) is done
        assert not fake.applied or error.applied == "maybe"
