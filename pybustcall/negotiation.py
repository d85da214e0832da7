"""Negotiation: asks daemons what they can do, when `capabilities.Agreement` says so, and keeps those out that misfit.

A negotiator belongs to one client and one event loop; what is agreed is shared by all loops of the client. A daemon's
document is asked for by one question at a time, however many calls wait for it; a call that gives up breaks nothing
off. What fits is decided in `capabilities`, what is sent over the wire in `daemon_client`, which daemon is asked for a
bust in `fleet`.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar, final

from pydantic import BaseModel

from pybustcall.dispatcher import reap
from pybustcall.faults import AttemptFailed, Fault, FaultKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from pybustcall.capabilities import Agreement, DaemonCapabilities
    from pybustcall.dispatcher import Ask

__all__ = ["ADVERTISE", "Negotiator"]

ADVERTISE: Final = 428
"""The HTTP status of a daemon that wants to know the client's capabilities first (RFC 6585, section 3)."""

_ASKING: Final = 2.0
"""Seconds that one question may take; a call waits for it only as long as it has time."""


_Model = TypeVar("_Model", bound=BaseModel)
_Daemon = TypeVar("_Daemon", bound="Daemon")


class Daemon(Protocol):
    """What is needed of a daemon here."""

    @property
    def url(self) -> str:
        """The daemon's URL, which names it in results and errors."""
        ...

    async def capabilities(
        self,
        *,
        until: float,
        deadline: float,
        known: DaemonCapabilities | None = None,
        started: Callable[[], None] | None = None,
    ) -> DaemonCapabilities:
        """Ask what it can do, on either route; `known` itself is returned if that is still the same."""
        ...

    async def document(
        self, *, until: float, deadline: float, known: DaemonCapabilities | None = None
    ) -> DaemonCapabilities:
        """Ask for its capability document; `known` itself is returned if that is still the same."""
        ...

    async def advertise(self, *, until: float, deadline: float) -> DaemonCapabilities:
        """Send it our capability document."""
        ...

    async def post(
        self,
        path: str,
        request: BaseModel,
        reply: type[_Model],
        /,
        *,
        until: float,
        deadline: float,
        key: str | None,
        started: Callable[[], None] | None,
    ) -> _Model:
        """Send a request of an extension, and return its reply."""
        ...


_Reply = TypeVar("_Reply")


@final
class Negotiator(Generic[_Daemon]):
    """Knows what each daemon of a client can do.

    - `daemons`: as the fleet numbers them
    - `agreements`: what is known of each of them
    - `judge`: is told which daemon is left out, and why; an empty text ends that
    - `clock`: tells seconds, the same for all loops
    """

    def __init__(
        self,
        daemons: Sequence[_Daemon],
        agreements: Sequence[Agreement],
        *,
        judge: Callable[[int, str], object] = lambda _index, _reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._daemons = daemons
        self._index = {daemon.url: index for index, daemon in enumerate(daemons)}
        self._agreements = agreements
        self._judge = judge
        self._clock = clock
        self._asking: dict[int, asyncio.Task[None]] = {}

    def known(self, daemon: _Daemon) -> DaemonCapabilities | None:
        """Tell what is known of a daemon now, without asking."""
        return self._agreements[self._index[daemon.url]].known

    def heard(self, url: str, digest: str | None) -> None:
        """Take in the digest that an answer carried; a new one is looked into in the background."""
        index = self._index[url]
        if self._agreements[index].heard(digest, self._clock()) and index not in self._asking:
            self._ask(index)

    def look_again(self) -> None:
        """Tell which daemons are left out; ask those in the background that may fit by now, since time has passed."""
        now = self._clock()
        for index, agreement in enumerate(self._agreements):
            self._judge(index, agreement.misfit)
            if agreement.misfit and not agreement.is_fresh(now) and index not in self._asking:
                self._ask(index)

    async def terms(
        self,
        daemon: _Daemon,
        needs: Collection[str] = (),
        *,
        until: float,
        started: Callable[[], None] | None = None,
    ) -> DaemonCapabilities | None:
        """Tell what a request can rely on: what the daemon advertises, or None while that is not known.

        Waits for the document only if the client or the request requires something of it; `started` is called if it
        does. Raises `AttemptFailed`: incompatible, naming what is unmet, or whatever the asking met.
        """
        index = self._index[daemon.url]
        agreement = self._agreements[index]
        if agreement.must_ask(self._clock(), needs):
            if started is not None:
                started()
            await self._wait(index, until)
        if reason := agreement.misfit or agreement.lacking(needs):
            raise AttemptFailed(Fault(FaultKind.INCOMPATIBLE, daemon.url, reason, "no"))
        return agreement.known

    async def look(
        self, daemon: _Daemon, *, until: float, deadline: float, started: Callable[[], None] | None = None
    ) -> DaemonCapabilities:
        """Ask a daemon what it can do, be it known or not. Raises `AttemptFailed`."""
        agreement = self._agreements[self._index[daemon.url]]
        agreement.asked(self._clock())
        found = await daemon.capabilities(until=until, deadline=deadline, known=agreement.known, started=started)
        self._learned(self._index[daemon.url], found)
        return found

    async def settled(
        self, daemon: _Daemon, *, until: float, deadline: float, started: Callable[[], None] | None = None
    ) -> DaemonCapabilities:
        """Tell what a daemon can do; ask only if that is not known, or was not asked for long."""
        agreement = self._agreements[self._index[daemon.url]]
        if agreement.known is not None and agreement.is_fresh(self._clock()):
            return agreement.known
        return await self.look(daemon, until=until, deadline=deadline, started=started)

    async def send(
        self, daemon: _Daemon, request: Callable[[], Awaitable[_Reply]], *, until: float, deadline: float
    ) -> _Reply:
        """Send a request; advertise first what we can do if the daemon asks for that, and note if it refuses us."""
        try:
            try:
                return await request()
            except AttemptFailed as failed:
                if failed.fault.status != ADVERTISE:
                    raise
            found = await daemon.advertise(until=until, deadline=deadline)
            self._learned(self._index[daemon.url], found)
            return await request()
        except AttemptFailed as failed:
            if failed.fault.kind is FaultKind.INCOMPATIBLE:
                index = self._index[daemon.url]
                self._agreements[index].refused(failed.fault.message, self._clock())
                self._judge(index, self._agreements[index].misfit)
            raise

    def asking(
        self, capability: str, path: str, request: BaseModel, reply: type[_Model], *, key: str | None = None
    ) -> Ask[_Daemon, _Model]:
        """Make the attempt to use an extension: only where it is advertised. `key` is sent as Idempotency-Key."""

        async def ask(daemon: _Daemon, /, *, until: float, deadline: float, started: Callable[[], None]) -> _Model:
            await self.terms(daemon, (capability,), until=until)
            send = partial(daemon.post, path, request, reply, key=key, until=until, deadline=deadline, started=started)
            return await self.send(daemon, send, until=until, deadline=deadline)

        return ask

    async def probe(self, index: int, *, until: float) -> Fault | None:
        """Ask for the document, be it known or not, and tell what went wrong with that; None for any sound answer."""
        try:
            await self._fetch(index, until)
        except AttemptFailed as failed:
            # Of a document that cannot be read only the daemon's own word suffers: it is there, and busts may go well.
            if failed.fault.kind is not FaultKind.MALFORMED or failed.fault.status != 200:
                return failed.fault
        return None

    def cancel(self) -> None:
        """End what is being asked in the background, without waiting."""
        for task in self._asking.values():
            task.cancel()

    async def aclose(self) -> None:
        """End what is being asked in the background, and wait for that."""
        await reap(list(self._asking.values()))

    async def _wait(self, index: int, until: float) -> None:
        """Wait for the one question that is under way, or begin it; raise what it met, or that time is over."""
        task = self._asking.get(index) or self._ask(index)
        loop = asyncio.get_running_loop()
        await asyncio.wait({task}, timeout=max(0.0, until - loop.time()))
        url = self._daemons[index].url
        if not task.done():
            raise AttemptFailed(Fault(FaultKind.TIMED_OUT, url, "it did not tell in time what it can do", "no"))
        if task.cancelled():
            raise AttemptFailed(Fault(FaultKind.DISCONNECTED, url, "nobody asks it any more: the client closes", "no"))
        error = task.exception()
        if isinstance(error, AttemptFailed):
            raise AttemptFailed(error.fault) from error  # one for each who waits: they are marked by their calls
        if error is not None:
            raise error

    def _ask(self, index: int) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        work = self._fetch(index, loop.time() + _ASKING)
        # It inherits nothing of the call which happens to be the first: no span, no place in a queue.
        task = loop.create_task(work, name="pybustcall-negotiation", context=contextvars.Context())
        self._asking[index] = task
        task.add_done_callback(lambda _: self._answered(index, task))
        return task

    def _answered(self, index: int, task: asyncio.Task[None]) -> None:
        if self._asking.get(index) is task:
            del self._asking[index]
        if not task.cancelled():
            task.exception()  # seen; whoever waits for it is told

    async def _fetch(self, index: int, until: float) -> None:
        agreement = self._agreements[index]
        agreement.asked(self._clock())
        self._learned(index, await self._daemons[index].document(until=until, deadline=until, known=agreement.known))

    def _learned(self, index: int, found: DaemonCapabilities) -> None:
        agreement = self._agreements[index]
        agreement.learned(found, self._clock())
        self._judge(index, agreement.misfit)
