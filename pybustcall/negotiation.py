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
from dataclasses import replace
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

    async def use(
        self,
        path: str,
        request: BaseModel | None,
        reply: type[_Model],
        /,
        *,
        until: float,
        deadline: float,
        key: str | None,
        started: Callable[[], None] | None,
        method: str | None,
    ) -> _Model:
        """Send a request of an extension, or only ask if there is none, and return the reply."""
        ...


_Reply = TypeVar("_Reply")


@final
class Negotiator(Generic[_Daemon]):
    """Knows what each daemon of a client can do.

    - `daemons`: as the fleet numbers them
    - `agreements`: what is known of each of them
    - `judge`: is told which daemon is left out, why, and what is unmet; an empty text ends that
    - `clock`: tells seconds, the same for all loops
    """

    def __init__(
        self,
        daemons: Sequence[_Daemon],
        agreements: Sequence[Agreement],
        *,
        judge: Callable[[int, str, tuple[str, ...]], object] = lambda _index, _reason, _unmet: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._daemons = daemons
        self._index = {daemon.url: index for index, daemon in enumerate(daemons)}
        self._agreements = agreements
        self._judge = judge
        self._clock = clock
        self._asking: dict[int, asyncio.Task[None]] = {}

    def misfit(self, daemon: _Daemon) -> str:
        """Tell why a daemon is left out; an empty text if it is not."""
        return self._agreements[self._index[daemon.url]].misfit

    def heard(self, url: str, digest: str | None) -> None:
        """Take in the digest that an answer carried; a new one is looked into in the background."""
        index = self._index[url]
        if self._agreements[index].heard(digest, self._clock()) and index not in self._asking:
            self._ask(index)

    def look_again(self, *, for_call: bool = True) -> None:
        """Tell which daemons are left out. Those that may fit by now, since time has passed, are asked again.

        In the background; but where all are left out, a call (`for_call`) is let through to them, and asks first.
        """
        now = self._clock()
        through = for_call and all(agreement.misfit for agreement in self._agreements)
        for index, agreement in enumerate(self._agreements):
            if not agreement.misfit or agreement.is_fresh(now):
                self._judge(index, agreement.misfit, agreement.unmet)
            elif through:
                self._judge(index, "", ())
            elif index not in self._asking:
                self._ask(index)

    async def ask_again(self) -> None:
        """Ask those that are left out, and wait for their answers."""
        left_out = [index for index, agreement in enumerate(self._agreements) if agreement.misfit]
        if left_out:
            await asyncio.wait({self._asking.get(index) or self._ask(index) for index in left_out})

    async def terms(
        self,
        daemon: _Daemon,
        needs: Collection[str] = (),
        *,
        until: float,
        started: Callable[[], None] | None = None,
        what: str = "",
        strict: bool = True,
    ) -> DaemonCapabilities | None:
        """Tell what a request can rely on: what the daemon advertises, or None while that is not known.

        - `needs`: the capabilities that the request takes, which is called `what`
        - `started`: called if it has to wait for the document, which it does only if the client or the request requires
          something of the daemon
        - `strict`: whether the daemon must advertise what the request needs

        Raises `AttemptFailed`: incompatible, naming what is unmet; unsupported, naming what is lacking for this
        request; or whatever the asking met.
        """
        index = self._index[daemon.url]
        agreement = self._agreements[index]
        if agreement.must_ask(self._clock(), needs):
            if started is not None:
                started()
            await self._wait(index, until)
        if agreement.misfit:
            self._judge(index, agreement.misfit, agreement.unmet)
            raise _incompatible(daemon.url, agreement.misfit, agreement.unmet)
        if strict and agreement.lacking(needs):
            raise self.unsupported(daemon, needs, what)
        return agreement.known

    def unsupported(self, daemon: _Daemon, needs: Collection[str], what: str = "") -> AttemptFailed:
        """Make the failure of a request that needs what the daemon does not advertise: nothing was sent."""
        lacks = self._agreements[self._index[daemon.url]].lacking(needs)
        message = "; ".join(lacks) + (f": {what} needs that" if what else "")
        return AttemptFailed(Fault(FaultKind.UNSUPPORTED, daemon.url, message, "no", unmet=lacks))

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
        unsure = False
        try:
            for advertisements in (1, 2):
                try:
                    return await request()
                except AttemptFailed as failed:
                    if failed.fault.status != ADVERTISE:
                        raise
                    unsure = unsure or failed.fault.applied != "no"
                # Twice the second time: of several behind one URL another may have been told the first time.
                for _ in range(advertisements):
                    found = await daemon.advertise(until=until, deadline=deadline)
                    self._learned(self._index[daemon.url], found)
            return await request()
        except AttemptFailed as failed:
            fault = failed.fault
            if fault.kind is FaultKind.INCOMPATIBLE and fault.status != ADVERTISE:  # that is a question, no refusal
                self._refused(self._index[daemon.url], fault)
            if unsure:
                failed.fault = replace(fault, applied="maybe")
            raise

    def asking(
        self,
        capability: str,
        path: str,
        request: BaseModel | None,
        reply: type[_Model],
        *,
        key: str | None = None,
        doubt: Callable[[_Model], str] = lambda _: "",
        also: Collection[str] = (),
        method: str | None = None,
    ) -> Ask[_Daemon, _Model]:
        """Make the attempt to use an extension: only where it is advertised.

        - `key`: sent as Idempotency-Key
        - `doubt`: says why a reply is not the answer to what was asked, if it is not
        - `also`: further capabilities that this request takes
        - `method`: by default POST with a request, and GET without one
        """
        needs = (capability, *also)

        async def ask(daemon: _Daemon, /, *, until: float, deadline: float, started: Callable[[], None]) -> _Model:
            await self.terms(daemon, needs, until=until)
            send = partial(
                daemon.use,
                path,
                request,
                reply,
                key=key,
                until=until,
                deadline=deadline,
                started=started,
                method=method,
            )
            answer = await self.send(daemon, send, until=until, deadline=deadline)
            if why := doubt(answer):
                told = f"its answer is not to what was asked: {why}"
                raise AttemptFailed(Fault(FaultKind.MALFORMED, daemon.url, told, "maybe"))
            return answer

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

    def _refused(self, index: int, fault: Fault) -> None:
        agreement = self._agreements[index]
        agreement.refused(fault.message, fault.unmet, self._clock())
        self._judge(index, agreement.misfit, agreement.unmet)

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
        self._judge(index, agreement.misfit, agreement.unmet)


def _incompatible(url: str, reason: str, unmet: tuple[str, ...]) -> AttemptFailed:
    return AttemptFailed(Fault(FaultKind.INCOMPATIBLE, url, reason, "no", unmet=unmet))
