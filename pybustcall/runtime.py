"""What a client shares with its views, and what it has in one event loop: fleet, prober, courier, feeds.

It puts together what the rooms below decide, and ends it all in order. `bustcall_core` makes one `Core` for a client,
and each loop that makes a call gets a `Runtime`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, final

from pybustcall.attached import Nearby
from pybustcall.background import Courier, Prober
from pybustcall.capabilities import Agreement
from pybustcall.clock import runs_here
from pybustcall.delivery import Deliverer
from pybustcall.events import Following
from pybustcall.faults import Band, Fault
from pybustcall.fleet import Fleet, Policies
from pybustcall.needs import needs_of, phrase_of, widened
from pybustcall.negotiation import Negotiator
from pybustcall.outbox import Outbox, OutboxStore
from pybustcall.results import BustResult, summary
from pybustcall.telemetry import BreakerMoved, Event, FailedBack, FailedOver, Hooks, OutboxSetAside

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from pybustcall.daemon_client import DaemonClient
    from pybustcall.models import BustReply, BustRequest, Requirements
    from pybustcall.policies import Probes
    from pybustcall.session import SessionManager
    from pybustcall.topology import DaemonAddress, Topology

__all__ = ["Core", "Runtime", "close"]

_log: Final = logging.getLogger("pybustcall")

_LEVELS: Final = {
    Band.SILENT: logging.INFO,
    Band.WARNING: logging.WARNING,
    Band.EXCEPTION: logging.ERROR,
    Band.PANIC: logging.CRITICAL,
}
_DIGEST: Final = 10.0
"""Seconds in which calls of one status are logged once: an outage is one piece of news, however many calls meet it."""
_FLUSH: Final = 1.0
"""Seconds that `aclose` waits for hooks to be told the last events."""


@final
class Runtime:
    """What belongs to a client in one event loop, beside its connections: what it knows, and what it does by itself."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._past = core.past
        urls = self._urls = [daemon.url for daemon in core.daemons]
        self.fleet = Fleet(
            urls,
            core.policies,
            client_id=core.client_id,
            now=loop.time(),
            random=random.random,
            emit=core.emit,
            wake=self._wake_prober,
        )
        self.negotiator: Negotiator[DaemonClient] = Negotiator(core.daemons, core.agreements, judge=self.fleet.judge)
        self._near = core.near
        self.following = Following(
            [(daemon.url, partial(_open_stream, self.negotiator, daemon)) for daemon in core.daemons],
            random=random.random,
        )
        self._prober = Prober(self.fleet, partial(_probe, self.negotiator, core.policies.probes))
        owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.deliverer: Deliverer[DaemonClient] = Deliverer(
            partial(_send, self.negotiator),
            core.daemons,
            self.fleet,
            random=random.random,
            adopt=core.sessions.adopt,
            store=core.store,
            owner=f"{owner}-calls",
            emit=core.emit,
            wake=self._wake_courier,
        )
        self.courier: Courier | None = None
        if core.store is not None and core.outbox is not None:
            self.courier = Courier(
                core.store,
                core.outbox,
                self.deliverer.replay,
                ready=self._ready,
                owner=f"{owner}-courier",
                destinations=urls,
                random=random.random,
                emit=core.emit,
                counts=self.fleet.counts,
            )

    @property
    def is_here(self) -> bool:
        """Whether it belongs to the event loop that runs here."""
        return runs_here(self.loop)

    @property
    def is_following(self) -> bool:
        """Whether it follows daemons."""
        return not self.loop.is_closed() and self.following.has_begun

    def start(self) -> None:
        """Begin what goes on in the background, if that was not done before."""
        self._prober.start()
        if self.courier is not None:
            self.courier.start()
        self._near.serve(self.following.shared)

    async def aclose(self) -> None:
        """End it, and wait for that."""
        try:
            try:
                await self.following.aclose()
            finally:
                try:
                    await self._prober.aclose()
                finally:
                    await self.negotiator.aclose()
        finally:
            if self.courier is not None:
                await self.courier.aclose()
            self._past.update(self.fleet.counts)
            self.fleet.counts.clear()

    def abandon(self) -> None:
        """End it from wherever the client was dropped, without waiting."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._prober.cancel)
            self.loop.call_soon_threadsafe(self.following.cancel)
            self.loop.call_soon_threadsafe(self.negotiator.cancel)
            if self.courier is not None:
                self.loop.call_soon_threadsafe(self.courier.cancel)

    def _ready(self) -> frozenset[str]:
        self.negotiator.look_again(for_call=False)
        now = self.loop.time()
        return frozenset(url for index, url in enumerate(self._urls) if self.fleet.well(index, now))

    def _wake_prober(self) -> None:
        self._prober.wake()

    def _wake_courier(self) -> None:
        if self.courier is not None:
            self.courier.wake()


@final
class _Digest:
    """Logs calls that were not clean: of each status one in ten seconds in full, and how many there were beside it.

    A call that raises is not logged: its error says all of it, to whoever asked.
    """

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, int]] = {}

    def tell(self, result: BustResult) -> None:
        """Log a result, or count it."""
        if not result.causes and not result.note:
            return
        now = time.monotonic()
        silent_until, passed = self._counts.get(result.status, (0.0, 0))
        if now < silent_until:
            self._counts[result.status] = silent_until, passed + 1
            return
        self._counts[result.status] = now + _DIGEST, 0
        _log.log(
            _LEVELS[result.band],
            "bust of %s: %s, stage %d (%s), attempts: %d, in %.3f s: %s%s",
            result.label,
            result.status,
            result.stage,
            result.band,
            len(result.attempts),
            result.elapsed,
            "; ".join([*summary(result.causes), *([result.note] if result.note else [])]),
            f" (and {passed} more {result.status} since the last such line)" if passed else "",
        )

    def close(self) -> None:
        """Log what was only counted."""
        for status, (_, passed) in self._counts.items():
            if passed:
                level = logging.INFO if status in {"busted", "dry_run"} else logging.WARNING
                _log.log(level, "%d more busts: %s", passed, status)
        self._counts.clear()


@final
class Core:
    """What a client and its views share. It does not hold the client, so that one that is dropped can be noticed."""

    def __init__(
        self,
        topology: Topology,
        sessions: Callable[[Callable[[asyncio.AbstractEventLoop], Runtime]], SessionManager],
        daemon: Callable[[DaemonAddress, SessionManager, Callable[[str, str | None], None]], DaemonClient],
        *,
        requires: tuple[Requirements, ...],
        policies: Policies,
        outbox: Outbox | None,
        client_id: str | None,
    ) -> None:
        self.topology = topology
        self.agreements = tuple(Agreement(requires) for _ in topology)
        self.policies = policies
        self.outbox = outbox
        self.hooks = Hooks()
        self.digest = _Digest()
        self.past: Counter[str] = Counter()
        self.near = Nearby()
        self._client_id = client_id
        self._origin = secrets.token_hex(8)
        self.store = OutboxStore(outbox, on_event=self._outbox_set_aside) if outbox is not None else None
        self.sessions = sessions(partial(Runtime, self))
        self.daemons = tuple(daemon(address, self.sessions, self._heard) for address in topology)

    @property
    def client_id(self) -> str:
        """The name whose hash orders the ring: the given one, or one of this process's own, also after a fork."""
        return self._client_id or f"{self._origin}-{os.getpid()}"

    def runtime(self) -> Runtime:
        """Tell what belongs to the running loop, begun. Only inside `sessions.call()`, or after `sessions.enter()`."""
        runtime = self.sessions.companion
        assert isinstance(runtime, Runtime)  # noqa: S101 - made with the loop's first call
        runtime.start()
        return runtime

    def enter(self) -> None:
        """Begin what belongs to the running loop, if there is one. Raises `ClientClosed` after `aclose`."""
        self.sessions.check_open()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return
        self.sessions.enter()
        self.runtime()

    @property
    def is_open(self) -> bool:
        """Whether connections are open, or daemons followed, that nobody has ended."""
        return self.sessions.is_open or any(runtime.is_following for runtime in self.runtimes())

    def runtimes(self) -> list[Runtime]:
        """List what belongs to each running loop."""
        return [runtime for runtime in self.sessions.companions() if isinstance(runtime, Runtime)]

    def emit(self, event: Event) -> None:
        """Log what an operator wants to know, and tell the hooks."""
        match event:
            case FailedOver(hub=hub, daemon=daemon, reason=reason):
                _log.warning("the hub %s is down, calls go to the ring, %s first: %s", hub, daemon, reason)
            case FailedBack(daemon=daemon, share=share):
                _log.info("%d %% of the calls go to the hub %s first again", round(share * 100), daemon)
            case BreakerMoved(daemon=daemon, old=old, new=new, reason=reason):
                level = logging.CRITICAL if new == "quarantined" and reason else logging.WARNING
                level = logging.INFO if new in {"closed", "half-open"} else level
                _log.log(level, "the breaker of %s: %s, was %s%s", daemon, new, old, f" ({reason})" if reason else "")
            case OutboxSetAside(text=text):
                _log.error("%s", text)
        self.hooks.emit(event)

    def _heard(self, url: str, digest: str | None) -> None:
        """Take in what an answer says of its daemon's capability document."""
        if digest is not None and isinstance(runtime := self.sessions.companion, Runtime):
            runtime.negotiator.heard(url, digest)

    def _outbox_set_aside(self, text: str) -> None:
        self.emit(OutboxSetAside(daemon="", text=text))


_IDEMPOTENT: Final = "cache.bust.idempotent"


async def _send(
    negotiator: Negotiator[DaemonClient],
    daemon: DaemonClient,
    request: BustRequest,
    /,
    *,
    key: str,
    until: float,
    deadline: float,
    started: Callable[[], None],
    wider: bool,
) -> BustReply:
    told = False

    def start() -> None:
        nonlocal told
        if not told:
            told = True
            started()

    needs = needs_of(request)
    what = phrase_of(request) if needs else ""
    known = await negotiator.terms(daemon, needs, until=until, started=start, what=what, strict=not wider)
    if needs and known is not None:  # it is known wherever something is needed
        able = widened(request, known.supports)
        if able is None:
            raise negotiator.unsupported(daemon, needs, what)
        request = able
    # A server that does not know the header ignores it; only one that says so is spared it.
    sent = key if known is None or known.supports(_IDEMPOTENT) else None
    bust = partial(daemon.bust, request, key=sent, until=until, deadline=deadline, started=start)
    return await negotiator.send(daemon, bust, until=until, deadline=deadline)


@asynccontextmanager
async def _open_stream(
    negotiator: Negotiator[DaemonClient], daemon: DaemonClient, path: str, /, *, after: str | None, until: float
) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
    """Open a daemon's stream of events, which may want to know first what we can do."""
    async with AsyncExitStack() as opened:

        async def begin() -> Callable[[], Awaitable[bytes]]:
            return await opened.enter_async_context(daemon.follow(path, after=after, until=until))

        yield await negotiator.send(daemon, begin, until=until, deadline=until)


async def _probe(negotiator: Negotiator[DaemonClient], probes: Probes | None, index: int) -> Fault | None:
    assert probes is not None  # noqa: S101 - for the type checker: nothing is probed without the policy
    return await negotiator.probe(index, until=asyncio.get_running_loop().time() + probes.timeout)


async def close(core: Core) -> None:
    """Close in this order: the calls and connections, the outbox that the last of them may need, the hooks."""
    try:
        await core.sessions.aclose()
    finally:
        core.digest.close()
        try:
            if core.store is not None:
                await core.store.aclose()
            loop = asyncio.get_running_loop()
            end = loop.time() + _FLUSH
            while not core.hooks.flush(0) and loop.time() < end:  # noqa: ASYNC110 - it is a thread that is waited for
                await asyncio.sleep(0.005)
        finally:
            core.hooks.close()
