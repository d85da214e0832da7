"""The session manager: pooled aiohttp sessions, one for each event loop and daemon, opened and closed here alone.

It decides who may use a connection and when (a gate, first come first served), which session belongs to which loop,
and what becomes of all that at the end, after a fork, and in another loop. What is sent is `daemon_client`'s affair.

Theory of operation. aiohttp's own pool is left unlimited, because its waiters starve each other; a `_Gate` in front
admits at most `per_daemon` and `total` leases and hands a freed slot to whoever waits longest and can use it. State is
kept per running loop. A loop's sessions are closed with the client, or, if the loop ends first, with the loop: an
asynchronous generator stands guard, which `asyncio.run` closes before it closes the loop. After a fork the child
never touches what it inherited, not even to close it: the event loop's epoll descriptor is shared with the parent.
"""

from __future__ import annotations

import asyncio
import math
import os
import ssl
import threading
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final
from weakref import WeakSet

import aiohttp

from pybustcall.errors import ClientClosed, ConfigurationError, SlotTimeout

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
    from typing import Protocol

    from pybustcall.errors import Applied
    from pybustcall.policies import Pool
    from pybustcall.topology import DaemonAddress

    class Companion(Protocol):
        """What belongs to one event loop beside its sessions: it is made with its first call, and ends before them."""

        async def aclose(self) -> None:
            """End, and wait for that."""


__all__ = ["TLS", "DaemonPoolStatistics", "Exchange", "Lease", "PoolStatistics", "SessionManager"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How daemons behind https:// are known, and how this client shows who it is.

    - `ca`: PEM file of the authorities to trust instead of the system's
    - `cert`, `key`: PEM files of a client certificate and its private key (`key` may be inside `cert`)
    - `key_password`: password of the key; never shown
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    key_password: str | None = field(default=None, repr=False)

    def make_context(self) -> ssl.SSLContext:
        """Load the files; raise `ConfigurationError`, naming the setting, for one that cannot be used."""
        if self.key is not None and self.cert is None:
            raise ConfigurationError("tls.key is given without tls.cert, the certificate it belongs to", setting="tls")
        for setting, path in (("tls.ca", self.ca), ("tls.cert", self.cert), ("tls.key", self.key)):
            if path is not None and not Path(path).is_file():
                raise ConfigurationError(f"{setting}: there is no file {os.fspath(path)!r}", setting=setting)
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(
                f"tls.ca: {os.fspath(self.ca or '')!r} holds no usable certificates ({error})", setting="tls.ca"
            ) from error
        if self.cert is not None:
            try:
                # Without a password OpenSSL would ask for one on the terminal; the empty one makes it fail instead.
                context.load_cert_chain(self.cert, self.key, password=self.key_password or "")
            except (ssl.SSLError, OSError, ValueError) as error:
                raise ConfigurationError(
                    f"tls.cert: {os.fspath(self.cert)!r} and its key cannot be used ({error})", setting="tls.cert"
                ) from error
        return context


@final
@dataclass(slots=True)
class Exchange:
    """What is noted of one request: whether it got a connection, whether a used one, and whether an answer began."""

    connected: bool = False
    reused: bool = False
    answered: bool = False


@final
@dataclass(slots=True)
class _Ticket:
    """A call's place among those who wait for slots: its turn, and whether its first wait was in vain."""

    turn: int
    waited: bool = False


_TICKET: ContextVar[_Ticket | None] = ContextVar("pybustcall_ticket", default=None)
_EXCHANGE: ContextVar[Exchange | None] = ContextVar("pybustcall_exchange", default=None)


class _NotingConnector(aiohttp.BaseConnector):
    """Tells the exchange under way that it has its connection, without a TraceConfig's cost at every step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._used: WeakSet[object] = WeakSet()

    async def connect(self, *request: Any, **how: Any) -> Any:
        connection = await super().connect(*request, **how)
        if (exchange := _EXCHANGE.get()) is not None:
            exchange.connected = True
            exchange.reused = connection.protocol in self._used
        self._used.add(connection.protocol)
        return connection


class _TCPConnector(_NotingConnector, aiohttp.TCPConnector):
    pass


class _UnixConnector(_NotingConnector, aiohttp.UnixConnector):
    pass


@final
@dataclass(frozen=True, slots=True)
class DaemonPoolStatistics:
    """Connections of one daemon: slots `in_use`, calls `waiting` for one."""

    in_use: int
    waiting: int


@final
@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of the pool, over all event loops of this process.

    - `calls`: calls under way now, those in a backoff included
    - `in_use`, `waiting`: slots held and calls waiting for one, now
    - `granted`, `timed_out`: slots handed out, and waits that ended in `SlotTimeout`, since the client was made
    - `refreshed`: how often stale connections were replaced by fresh ones
    - `sessions`: aiohttp sessions open now
    - `daemons`: the same by daemon URL
    """

    calls: int = 0
    in_use: int = 0
    waiting: int = 0
    granted: int = 0
    timed_out: int = 0
    refreshed: int = 0
    sessions: int = 0
    daemons: Mapping[str, DaemonPoolStatistics] = field(default_factory=dict)


@final
class _Gate:
    """Admits at most so many at once for each daemon and in all; first come, first served. One loop only.

    A freed slot goes to the call that came first among those whose daemon has room, so that a saturated daemon delays
    nobody else's calls. A call keeps its turn when a wait of it has ended: under a burst the oldest are served, and
    not whoever asked last.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._turn = 0
        self.in_use: dict[str, int] = {}
        self.waiters: dict[str, list[tuple[int, int, asyncio.Future[None]]]] = {}  # heaps, oldest turn on top
        self.waiting: dict[str, int] = {}
        self.total = 0
        self.granted = 0
        self.timed_out = 0

    def next_turn(self) -> int:
        """Count one more comer."""
        self._turn += 1
        return self._turn

    async def acquire(self, daemon: str, wait: float, turn: int) -> None:
        """Take a slot, waiting at most `wait` seconds for it; raise `SlotTimeout` if none came free."""
        if not self.waiting.get(daemon) and self._has_room(daemon):
            self._take(daemon)
            return
        slot = asyncio.get_running_loop().create_future()
        heappush(self.waiters.setdefault(daemon, []), (turn, self.next_turn(), slot))
        self.waiting[daemon] = self.waiting.get(daemon, 0) + 1
        try:
            async with asyncio.timeout(wait):
                await slot
        except BaseException as error:
            if slot.done() and not slot.cancelled():  # granted in the same moment in which the wait ended
                self.release(daemon)
            if isinstance(error, TimeoutError):
                self.timed_out += 1
                raise SlotTimeout(
                    f"no connection slot for {daemon} came free within {wait:.3f} s: {self.in_use.get(daemon, 0)} of "
                    f"{self._pool.per_daemon} are in use there, {self.total} of {self._pool.total} in all. Nothing was "
                    "sent; make fewer calls at once, or allow more or a longer wait with pool=Pool(...)",
                    daemon=daemon,
                ) from None
            raise
        finally:
            self.waiting[daemon] -= 1

    def release(self, daemon: str) -> None:
        """Give a slot back, and hand it on."""
        self.in_use[daemon] -= 1
        self.total -= 1
        while (heir := self._oldest()) is not None:
            self._take(heir)
            heappop(self.waiters[heir])[2].set_result(None)

    def _take(self, daemon: str) -> None:
        self.in_use[daemon] = self.in_use.get(daemon, 0) + 1
        self.total += 1
        self.granted += 1

    def _has_room(self, daemon: str) -> bool:
        return self.total < self._pool.total and self.in_use.get(daemon, 0) < self._pool.per_daemon

    def _oldest(self) -> str | None:
        """Tell whose waiter comes next, passing by those that were cancelled and have not run since."""
        heads: list[tuple[int, str]] = []
        for daemon, queue in self.waiters.items():
            while queue and queue[0][2].done():
                heappop(queue)
            if queue and self._has_room(daemon):
                heads.append((queue[0][0], daemon))
        return min(heads)[1] if heads else None


@final
@dataclass(eq=False, slots=True)
class Lease:
    """The right to one request to one daemon: its session, and where its routes begin.

    `notes` tells whether the session's connector fills in `exchange`; one that was passed in does not.
    """

    address: DaemonAddress
    session: aiohttp.ClientSession
    notes: bool
    exchange: Exchange = field(default_factory=Exchange)
    retired: bool = False

    def url(self, path: str) -> str:
        """Tell the URL of a route."""
        return self.address.base + path


@final
@dataclass(eq=False, slots=True)
class _Pooled:
    session: aiohttp.ClientSession
    leases: int = 0


@final
class _LoopState:
    """Everything that belongs to one running event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool, forget: Callable[[_LoopState], None]) -> None:
        self.loop = loop
        self.companion: Companion | None = None
        self.pool = pool
        self.forget = forget
        self.gate = _Gate(pool)
        self.sessions: dict[str, _Pooled] = {}
        self.streams: dict[str, _Pooled] = {}  # apart: a session whose connections are stale waits for its leases
        self.retired: set[_Pooled] = set()
        self.calls = 0
        self.refreshed = 0
        self.closed = False
        self.cleanup: set[asyncio.Task[None]] = set()
        self.adopted: set[asyncio.Task[object]] = set()
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.guard = self._stand_guard()
        self.closing: asyncio.Task[None] | None = None

    async def _stand_guard(self) -> AsyncGenerator[None, None]:
        """Close the sessions when the generator is closed: by `aclose`, or by the loop at its end."""
        try:
            yield
        finally:
            interrupted: BaseException | None = None
            for end in self._ends():
                try:
                    await end
                except BaseException as error:  # noqa: BLE001 - such as a cancellation by a loop that ends: raised below
                    interrupted = error
            self.forget(self)
            if interrupted is not None:
                raise interrupted

    def _ends(self) -> Iterator[Awaitable[object]]:
        """Tell, one after the other, what is to be waited for at the end."""
        if self.companion is not None:
            yield self.companion.aclose()
        self.closed = True
        while self.sessions or self.streams or self.retired:
            table = self.sessions or self.streams
            pooled = table.popitem()[1] if table else self.retired.pop()
            yield pooled.session.close()
        if left := self.cleanup | self.adopted:
            yield asyncio.wait(left)

    async def close(self) -> None:
        """Wait for calls under way (at most `drain` seconds), then close the sessions. Repeating it is harmless.

        A cancellation cuts the drain short, but not the closing; it arrives when that is done.
        """
        if self.closing is None:
            self.closing = self.loop.create_task(self._close())
        try:
            await asyncio.shield(self.closing)
        except asyncio.CancelledError:
            self.quiet.set()
            while not self.closing.done():
                try:
                    await asyncio.wait({self.closing})
                except asyncio.CancelledError:
                    continue
            raise

    async def _close(self) -> None:
        await self._wait_quiet(self.pool.drain)
        try:
            await self.guard.aclose()
        except RuntimeError:
            if not getattr(self.guard, "ag_running", False):
                raise
            # The loop is ending, and closes the guard at this very moment: nothing is left to us.
        await self._wait_quiet(_GRACE)  # calls that were cut off have something to store, perhaps

    async def _wait_quiet(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.quiet.wait()
        except TimeoutError:
            pass

    def adopt(self, task: asyncio.Task[object], linger: float) -> None:
        """Own a task for its last moments."""
        timer = self.loop.call_later(linger, task.cancel)
        self.adopted.add(task)

        def over(task: asyncio.Task[object]) -> None:
            timer.cancel()
            self.adopted.discard(task)

        task.add_done_callback(over)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run cleanup that must not wait for its caller; the guard waits for it."""
        task = self.loop.create_task(work)
        self.cleanup.add(task)
        task.add_done_callback(self.cleanup.discard)


_MANAGERS: WeakSet[SessionManager] = WeakSet()
_INHERITED: list[object] = []
"""What a forked child must neither use nor close, nor let the garbage collector close."""

_CUT_OFF: Final = "the client was closed while the call was under way; close it later, or allow pool.drain more time"

_GRACE: Final = 1.0
"""Seconds beyond the drain that another thread's loop has to close its sessions."""


def _after_fork() -> None:
    for manager in list(_MANAGERS):
        manager.forget_parent()


os.register_at_fork(after_in_child=_after_fork)


@final
class SessionManager:
    """Opens, lends and closes the pooled sessions of one client.

    - `pool`: limits and times
    - `tls`: for https:// daemons; loaded at once, so that a bad file is a `ConfigurationError` here
    - `trust_env`: whether proxies from the environment are used
    - `session`: an aiohttp session to use instead of own ones; it is never closed here
    - `companion`: makes what else belongs to each event loop; it is closed before the loop's sessions
    """

    def __init__(
        self,
        *,
        pool: Pool,
        tls: TLS | None = None,
        trust_env: bool = False,
        session: aiohttp.ClientSession | None = None,
        companion: Callable[[asyncio.AbstractEventLoop], Companion] | None = None,
    ) -> None:
        self._pool = pool
        self._ssl: ssl.SSLContext | bool = tls.make_context() if tls is not None else True
        self._trust_env = trust_env
        self._timeout = aiohttp.ClientTimeout(total=None, connect=pool.connect)
        self._given = session
        self._make_companion = companion
        self._given_loop: asyncio.AbstractEventLoop | None = None
        self._states: dict[asyncio.AbstractEventLoop, _LoopState] = {}
        self._lock = threading.Lock()  # for the table alone: loops in other threads enter themselves there
        self._past = PoolStatistics()  # what loops that have ended counted
        self._closed = False
        _MANAGERS.add(self)

    @property
    def request_timeout(self) -> aiohttp.ClientTimeout:
        """The one limit that aiohttp holds, on making a connection; deadlines are held by the callers."""
        return self._timeout

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    @property
    def is_open(self) -> bool:
        """Whether sessions are open that nobody has closed, nor can any more once the manager is dropped."""
        return any((state.sessions or state.streams) and not state.loop.is_closed() for state in self._snapshot())

    def check_open(self) -> None:
        """Raise `ClientClosed` after `aclose`."""
        if self._closed:
            raise ClientClosed("the client is closed; nothing was sent. Make a new one, or call before aclose")

    def enter(self) -> None:
        """Make what belongs to the running event loop, without a call; raise `ClientClosed` after `aclose`."""
        self.check_open()
        self._state()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Count one call as under way, so that `aclose` waits for it; raise `ClientClosed` after `aclose`."""
        self.check_open()
        state = self._state()
        state.calls += 1
        state.quiet.clear()
        token = _TICKET.set(_Ticket(state.gate.next_turn()))
        try:
            yield
        finally:
            _TICKET.reset(token)
            state.calls -= 1
            if not state.calls:
                state.quiet.set()

    @asynccontextmanager
    async def lease(self, address: DaemonAddress, *, wait: float | None = None) -> AsyncIterator[Lease]:
        """Lend a slot and a session for one request to a daemon.

        Waits at most the pool's `wait` for a slot, and at most `wait` seconds; else raises `SlotTimeout`. A call that
        has waited so in vain waits longer the next time, up to `wait` alone, and keeps its turn. What the connector
        notes of the request is in the lease's `exchange`. Raises `ClientClosed` once the sessions are closed.
        """
        state = self._state()
        ticket = _TICKET.get() or _Ticket(state.gate.next_turn())
        limit = math.inf if ticket.waited else self._pool.wait
        try:
            await state.gate.acquire(address.url, min(limit, self._pool.wait if wait is None else wait), ticket.turn)
        except SlotTimeout:
            ticket.waited = True
            raise
        try:
            pooled = self._pooled(state, address, state.sessions)
            pooled.leases += 1
            lease = Lease(address, pooled.session, notes=self._given is None)
            token = _EXCHANGE.set(lease.exchange)
            try:
                yield lease
            except (aiohttp.ClientError, OSError) as error:
                if not state.closed:
                    raise
                applied: Applied = "maybe" if lease.exchange.connected or not lease.notes else "no"
                raise ClientClosed(_CUT_OFF, daemon=address.url, applied=applied) from error
            finally:
                _EXCHANGE.reset(token)
                pooled.leases -= 1
                if lease.retired:
                    self._retire(state, address, pooled)
                if pooled in state.retired and not pooled.leases:
                    state.retired.discard(pooled)
                    state.spawn(pooled.session.close())
        finally:
            state.gate.release(address.url)

    @asynccontextmanager
    async def stream(self, address: DaemonAddress) -> AsyncIterator[Lease]:
        """Lend a session for a request whose answer goes on, such as a stream of events, without taking a slot.

        Its connection is closed at the end of the block, and with the sessions. Raises `ClientClosed` once these are.
        """
        state = self._state()
        pooled = self._pooled(state, address, state.streams)
        lease = Lease(address, pooled.session, notes=self._given is None)
        token = _EXCHANGE.set(lease.exchange)
        try:
            yield lease
        except (aiohttp.ClientError, OSError) as error:
            if not state.closed:
                raise
            raise ClientClosed(_CUT_OFF, daemon=address.url) from error
        finally:
            _EXCHANGE.reset(token)

    def adopt(self, task: asyncio.Task[object], linger: float) -> None:
        """Own a task that outlives its call: cancel it after `linger` seconds, and wait for it when closing."""
        state = self._states.get(task.get_loop())
        if state is None:  # the loop is ending, and its state has gone
            task.cancel()
        else:
            state.adopt(task, linger)

    def companions(self) -> list[Companion]:
        """List what the running event loops have beside their sessions."""
        return [state.companion for state in self._snapshot() if state.companion is not None]

    @property
    def companion(self) -> Companion | None:
        """What the running event loop has beside its sessions, once it made a call."""
        state = self._states.get(asyncio.get_running_loop())
        return state.companion if state is not None else None

    @staticmethod
    def retire(lease: Lease) -> None:
        """Say that the connections of this lease's session are stale: later leases get a session with fresh ones."""
        lease.retired = True

    def statistics(self) -> PoolStatistics:
        """Take a snapshot of the pool."""
        states = self._snapshot()
        daemons: dict[str, DaemonPoolStatistics] = {}
        for state in states:
            for daemon, in_use in state.gate.in_use.items():
                before = daemons.get(daemon, DaemonPoolStatistics(0, 0))
                waiting = before.waiting + state.gate.waiting.get(daemon, 0)
                daemons[daemon] = DaemonPoolStatistics(before.in_use + in_use, waiting)
        return PoolStatistics(
            calls=sum(state.calls for state in states),
            in_use=sum(state.gate.total for state in states),
            waiting=sum(sum(state.gate.waiting.values()) for state in states),
            granted=self._past.granted + sum(state.gate.granted for state in states),
            timed_out=self._past.timed_out + sum(state.gate.timed_out for state in states),
            refreshed=self._past.refreshed + sum(state.refreshed for state in states),
            sessions=sum(len(state.sessions) + len(state.streams) for state in states),
            daemons=daemons,
        )

    async def aclose(self) -> None:
        """Refuse new calls, wait for those under way, close every session opened here. Repeating it is harmless.

        Sessions that another running loop uses are closed there.
        """
        self._closed = True
        here = asyncio.get_running_loop()
        interrupted: asyncio.CancelledError | None = None
        # Our own loop first: where the others end, or their threads hang, is beyond us.
        for state in sorted(self._snapshot(), key=lambda state: state.loop is not here):
            try:
                if state.loop is here:
                    await state.close()
                elif state.loop.is_running():
                    await self._close_elsewhere(state, wait=interrupted is None)
            except asyncio.CancelledError as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    async def _close_elsewhere(self, state: _LoopState, *, wait: bool) -> None:
        """Have another thread's loop close its sessions, as long as it runs and answers."""
        closing = state.close()
        try:
            elsewhere = asyncio.run_coroutine_threadsafe(closing, state.loop)
        except RuntimeError:  # it ended in this moment, and closed them itself
            closing.close()
            return
        if not wait:
            return
        ourselves = asyncio.current_task()
        try:
            async with asyncio.timeout(self._pool.drain + _GRACE):
                await asyncio.wrap_future(elsewhere)
        except TimeoutError:
            return
        except asyncio.CancelledError:
            if ourselves is not None and ourselves.cancelling():
                raise
            # Not our cancellation: that loop is ending, which cancels its tasks and closes the sessions.

    def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._states.get(loop)
        if state is None:
            state = _LoopState(loop, self._pool, self._forget)
            if self._make_companion is not None:
                state.companion = self._make_companion(loop)
            with self._lock:
                self._states[loop] = state
            with suppress(StopIteration):  # it never suspends
                state.guard.__anext__().send(None)  # from here on the loop knows the guard
        return state

    def _forget(self, state: _LoopState) -> None:
        """Let go of a loop whose sessions are closed; keep what it counted."""
        with self._lock:
            self._states.pop(state.loop, None)
            self._past = replace(
                self._past,
                granted=self._past.granted + state.gate.granted,
                timed_out=self._past.timed_out + state.gate.timed_out,
                refreshed=self._past.refreshed + state.refreshed,
            )

    def forget_parent(self) -> None:
        """Begin anew in a forked child: keep what was inherited alive and untouched, for as long as the child lives."""
        self._lock = threading.Lock()  # a thread of the parent may have held the old one
        _INHERITED.append(self._states)
        self._states = {}

    def _snapshot(self) -> list[_LoopState]:
        with self._lock:
            return list(self._states.values())

    def _pooled(self, state: _LoopState, address: DaemonAddress, table: dict[str, _Pooled]) -> _Pooled:
        if state.closed:
            raise ClientClosed(_CUT_OFF, daemon=address.url)
        if self._given is not None:
            return self._borrowed(state, self._given)
        pooled = table.get(address.url)
        if pooled is None:
            pooled = table[address.url] = _Pooled(self._open(address))
        return pooled

    def _borrowed(self, state: _LoopState, session: aiohttp.ClientSession) -> _Pooled:
        if session.closed:
            raise ConfigurationError("the session that was passed in is closed", setting="session")
        self._given_loop = self._given_loop or state.loop
        if self._given_loop is not state.loop:
            raise ConfigurationError("the session that was passed in belongs to another event loop", setting="session")
        return _Pooled(session)

    def _open(self, address: DaemonAddress) -> aiohttp.ClientSession:
        limits: dict[str, Any] = {"limit": 0, "limit_per_host": 0, "keepalive_timeout": self._pool.idle}
        connector: aiohttp.BaseConnector
        if address.socket_path is not None:
            connector = _UnixConnector(path=address.socket_path, **limits)
        else:
            connector = _TCPConnector(ssl=self._ssl, **limits)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=self._trust_env,
            auto_decompress=False,
        )

    def _retire(self, state: _LoopState, address: DaemonAddress, pooled: _Pooled) -> None:
        if state.sessions.get(address.url) is pooled:
            del state.sessions[address.url]
            state.retired.add(pooled)
            state.refreshed += 1
