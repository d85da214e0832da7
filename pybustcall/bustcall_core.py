"""`BustcallClient`: what users hold. Its lifecycle, its settings, and what a call's outcome means to the caller.

It checks arguments before anything is sent, hands the job to the dispatcher, and turns the receipt into a result or an
error. It is the one room that knows both the dispatcher and the daemon clients. It holds no cache logic at all: what a
target or a strategy means is the daemon's affair.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, final

import aiohttp

from pybustcall.capabilities import DaemonCapabilities
from pybustcall.config import settings_from_env, settings_from_toml
from pybustcall.daemon_client import MAX_REPLY_BYTES, DaemonClient
from pybustcall.dispatcher import Receipt, dispatch
from pybustcall.errors import ConfigurationError, InvalidRequest
from pybustcall.faults import (
    AttemptFailed,
    Band,
    Fault,
    FaultKind,
    Outcome,
    call_stage,
    check_tolerance,
    raises,
)
from pybustcall.models import (
    DEFAULT_STRATEGY,
    DEFAULT_TOLERANCE,
    BustReply,
    BustRequest,
    DaemonStatus,
    bust_request,
    check_strategy,
)
from pybustcall.policies import Pool, Retry, check_seconds
from pybustcall.results import Attempt, BustReport, BustResult, ReportBuilder, failure, summary
from pybustcall.session import TLS, PoolStatistics, SessionManager
from pybustcall.topology import DEFAULT_URL, DaemonAddress, Topology

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from pybustcall.config import Settings
    from pybustcall.dispatcher import Ask

__all__ = ["BustcallClient", "ClientStatistics"]

_log: Final = logging.getLogger("pybustcall")
_log.addHandler(logging.NullHandler())

_LEVELS: Final = {
    Band.SILENT: logging.INFO,
    Band.WARNING: logging.WARNING,
    Band.EXCEPTION: logging.ERROR,
    Band.PANIC: logging.CRITICAL,
}

_TOKEN: Final = re.compile(r"[!-~]+")
_DISABLED: Final = "disabled"
_Reply = TypeVar("_Reply")


class _StrayCancellation(Exception):
    """A CancelledError out of the caller's iterable or callback, on its way through a task group."""


class _Kept(Enum):
    """Says that an option is left as it is, where None means something."""

    KEPT = "kept"


_KEPT: Final = _Kept.KEPT


@final
@dataclass(frozen=True, slots=True)
class _Options:
    """What `with_options` may vary."""

    timeout: float
    fault_tolerance: int
    retry: Retry | None
    reveal_targets: bool


@final
@dataclass(frozen=True, slots=True)
class _Core:
    """What a client and its views share."""

    topology: Topology
    daemons: tuple[DaemonClient, ...]
    sessions: SessionManager


@final
@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """A snapshot of what a client holds now and has done so far. `pool` tells of its connections."""

    pool: PoolStatistics


@final
class BustcallClient:
    """Hands busts to bustcall daemons, the hub first and its peers after it, within a deadline.

    - `url`: the hub: `http://`, `https://` or `unix:///path/of.sock`
    - `peers`: URLs of the daemons to ask, in this order, when the hub cannot
    - `token`: bearer token; over plain HTTP only to this machine, unless `allow_insecure_token`
    - `tls`: authorities and client certificate for https:// daemons
    - `timeout`: seconds that one call may take in all
    - `fault_tolerance`: 0 to 12; a call raises iff its stage is below 12 minus this
    - `retry`: how a call tries again; None for one attempt at each daemon
    - `pool`: limits and times of the connections
    - `max_reply_bytes`: how much of a daemon's reply is read
    - `trust_env`: whether proxies from the environment are used
    - `allow_insecure_token`: whether the token may cross a network in clear text
    - `reveal_targets`: whether logs and reprs show whole targets instead of redacted ones
    - `session`: an aiohttp session to use instead of own ones; it is never closed by the client

    Nothing is opened before the first call, so a client can be made outside an event loop and before a fork; each
    event loop gets connections of its own, closed with `aclose` or with the loop. Raises `ConfigurationError` for a
    setting that cannot be used.
    """

    _core: _Core | None = None  # so that a client whose making failed can be dropped
    _owner = False

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        peers: Iterable[str] = (),
        token: str | None = None,
        tls: TLS | None = None,
        timeout: float = 5.0,
        fault_tolerance: int = DEFAULT_TOLERANCE,
        retry: Retry | None = Retry(),  # noqa: B008 - frozen, and shown to the reader
        pool: Pool = Pool(),  # noqa: B008
        max_reply_bytes: int = MAX_REPLY_BYTES,
        trust_env: bool = False,
        allow_insecure_token: bool = False,
        reveal_targets: bool = False,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        topology = Topology.parse(url, peers)
        _check_types(tls=tls, retry=retry, pool=pool, session=session)
        proxied = trust_env or (session is not None and session.trust_env)
        _check_token(token, topology, allowed=allow_insecure_token, proxied=proxied)
        _check_session(session, topology, token=token, tls=tls, trust_env=trust_env)
        if type(max_reply_bytes) is not int or max_reply_bytes < 1024:
            raise ConfigurationError(
                f"max_reply_bytes must be an integer of at least 1024, not {max_reply_bytes!r}",
                setting="max_reply_bytes",
            )
        self._options = _options(timeout, fault_tolerance, retry, reveal_targets)
        sessions = SessionManager(pool=pool, tls=tls, trust_env=trust_env, session=session)
        daemons = tuple(
            DaemonClient(address, sessions, token=token, max_reply_bytes=max_reply_bytes) for address in topology
        )
        self._core = _Core(topology, daemons, sessions)
        self._owner = True

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> BustcallClient:
        """Make a client of the BUSTCALL_* variables; raise `ConfigurationError`, naming the variable, for a bad one.

        BUSTCALL_DISABLED=1 makes a disabled client.
        """
        return cls.of_settings(settings_from_env(environ))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], table: str = "pybustcall") -> BustcallClient:
        """Make a client of one table of a TOML file; raise `ConfigurationError`, naming file and key, for a bad one.

        `table` is dotted, such as "tool.pybustcall" in a pyproject.toml.
        """
        return cls.of_settings(settings_from_toml(path, table))

    @classmethod
    def of_settings(cls, settings: Settings) -> BustcallClient:
        """Make a client of checked settings, such as `pybustcall.config` reads."""
        if settings.disabled:
            return cls.disabled()
        tls = None
        if settings.tls is not None:
            password = settings.tls.key_password
            tls = TLS(
                ca=settings.tls.ca,
                cert=settings.tls.cert,
                key=settings.tls.key,
                key_password=password.get_secret_value() if password is not None else None,
            )
        return cls(
            settings.url,
            peers=settings.peers,
            token=settings.token.get_secret_value() if settings.token is not None else None,
            tls=tls,
            timeout=settings.timeout,
            fault_tolerance=settings.fault_tolerance,
            retry=settings.retry,
            pool=settings.pool,
            max_reply_bytes=settings.max_reply_bytes or MAX_REPLY_BYTES,
            trust_env=settings.trust_env,
            allow_insecure_token=settings.allow_insecure_token,
            reveal_targets=settings.reveal_targets,
        )

    @classmethod
    def disabled(cls) -> BustcallClient:
        """Make a client that does nothing and says so: for tests and switches.

        It still checks arguments; a bust's result has status "disabled" and is ok.
        """
        client = cls._view(None, _options(5.0, DEFAULT_TOLERANCE, Retry(), reveal_targets=False))
        _log.info("the bustcall client is disabled: busts are not sent anywhere")
        return client

    @classmethod
    def _view(cls, core: _Core | None, options: _Options) -> BustcallClient:
        client = cls.__new__(cls)
        client._core = core  # noqa: SLF001 - our own, being made
        client._options = options  # noqa: SLF001
        return client

    def with_options(
        self,
        *,
        timeout: float | None = None,
        fault_tolerance: int | None = None,
        retry: Retry | Literal[_Kept.KEPT] | None = _KEPT,
        reveal_targets: bool | None = None,
    ) -> BustcallClient:
        """Return a view with other options on the same connections.

        What is not given stays as it is; `retry=None` means one attempt at each daemon. Closing a view closes nothing;
        when the client is closed, so are its views.
        """
        old = self._options
        return self._view(
            self._core,
            _options(
                old.timeout if timeout is None else timeout,
                old.fault_tolerance if fault_tolerance is None else fault_tolerance,
                old.retry if retry is _KEPT else retry,
                old.reveal_targets if reveal_targets is None else reveal_targets,
            ),
        )

    async def bust(
        self,
        target: str,
        *,
        strategy: str = DEFAULT_STRATEGY,
        fault_tolerance: int | None = None,
        timeout: float | None = None,
    ) -> BustResult:
        """Have the old value of `target` dropped from the caches; return once a daemon has acknowledged it.

        - `target`: 1 byte to 8 KiB of UTF-8 without control characters
        - `strategy`: sent verbatim; the reference daemon knows direct, dimensional and hybrid
        - `fault_tolerance`: 0 to 12 for this call; 12 never raises: ask the result's `ok`
        - `timeout`: seconds for this call, retries and peers included

        Raises `InvalidRequest` before anything is sent, and `BustFailed` or a subclass of it if the call's stage is
        below 12 - fault_tolerance; the error tells whether the bust was, was not or may have been applied.
        """
        tolerance = self._tolerance(fault_tolerance)
        request = bust_request(target, strategy, tolerance)
        seconds = self._seconds(timeout)
        result, receipt = await self._bust(request, seconds)
        if receipt is not None and raises(result.stage, tolerance):
            what = f"the bust of {result.label}"
            raise failure(what, receipt.ending, result.causes, result.elapsed, result) from receipt.error
        return result

    async def bust_many(
        self,
        targets: Iterable[str] | AsyncIterable[str],
        *,
        concurrency: int = 64,
        on_progress: Callable[[BustResult], object] | None = None,
        strategy: str = DEFAULT_STRATEGY,
        fault_tolerance: int | None = None,
        timeout: float | None = None,
    ) -> BustReport:
        """Bust many targets, at most `concurrency` at once, in flat memory; never raises for a single target.

        - `targets`: any iterable, also an asynchronous one; it is read as the busts go on
        - `on_progress`: called with every result, in the order in which they end; what it raises ends the call
        - `timeout`: seconds for each target, from its turn

        The report counts them and keeps the results that are not ok, a target that cannot be sent among them. Raises
        `InvalidRequest` for other arguments that cannot be used, before anything is sent.
        """
        tolerance = self._tolerance(fault_tolerance)
        check_strategy(strategy)
        seconds = self._seconds(timeout)
        if type(concurrency) is not int or concurrency < 1:
            raise InvalidRequest(
                f"concurrency must be an integer of at least 1, not {concurrency!r}; nothing was sent",
                field="concurrency",
            )
        source = _each(targets)
        turn = asyncio.Lock()
        builder = ReportBuilder()
        now = asyncio.get_running_loop().time
        begun = now()
        started = 1

        async def work() -> None:
            nonlocal started
            while True:
                async with turn:
                    target = await anext(source, _KEPT)
                if target is _KEPT:
                    return
                if started < concurrency:  # one more at work only when there was something to do
                    started += 1
                    workers.create_task(watched())
                result = await self._bust_checked(target, strategy, tolerance, seconds)
                builder.add(result)
                if on_progress is not None:
                    on_progress(result)

        async def watched() -> None:
            """Work; a cancellation that nobody asked of this task came out of the caller's own code, and is an error.

            A task group would take it for the end of the work, and the targets that are left would be lost in silence.
            """
            try:
                await work()
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise _StrayCancellation from error

        try:
            async with aclosing(source), asyncio.TaskGroup() as workers:
                workers.create_task(watched())
        except BaseExceptionGroup as group:  # what the caller's own iterable or callback raised, or a closed client
            first = group.exceptions[0]
            if isinstance(first, _StrayCancellation) and first.__cause__ is not None:
                first = first.__cause__
            raise first from first.__cause__
        return builder.finish(now() - begun)

    async def status(self, *, daemon: str | None = None, timeout: float | None = None) -> DaemonStatus:
        """Tell how the first daemon that answers is, the hub asked first, or how `daemon` is (one of the URLs).

        Raises `InvalidRequest` for a daemon that is not among the client's, and a subclass of `BustFailed` if none
        answered within `timeout` seconds.
        """
        if self._core is None:
            return DaemonStatus(daemon=_DISABLED, daemon_pid=0, cache_size="0B")
        return await self._ask(self._core, DaemonClient.status, "asking for the status", daemon, timeout)

    async def capabilities(self, *, daemon: str | None = None, timeout: float | None = None) -> DaemonCapabilities:
        """Tell what the first daemon that answers can do, the hub asked first, or what `daemon` can (one of the URLs).

        Raises as `status` does.
        """
        if self._core is None:
            return DaemonCapabilities(_DISABLED)
        return await self._ask(self._core, DaemonClient.capabilities, "asking for the capabilities", daemon, timeout)

    async def warm_up(self, connections: int = 1) -> dict[str, Fault | None]:
        """Open connections to every daemon ahead of the first bust; tell for each what went wrong, or None.

        `connections` is how many to each daemon, at most the pool's `per_daemon`. Takes at most the client's timeout
        and never raises for a daemon that does not answer.
        """
        if type(connections) is not int or connections < 1:
            raise InvalidRequest(f"connections must be an integer of at least 1, not {connections!r}")
        if self._core is None:
            return {}
        core = self._core
        deadline = asyncio.get_running_loop().time() + self._options.timeout

        async def open_one(daemon: DaemonClient) -> Fault | None:
            try:
                await daemon.capabilities(until=deadline, deadline=deadline)
            except AttemptFailed as failed:
                return failed.fault
            return None

        async with core.sessions.call(), asyncio.TaskGroup() as group:
            tasks = {
                daemon.url: [group.create_task(open_one(daemon)) for _ in range(connections)] for daemon in core.daemons
            }
        return {url: next((task.result() for task in opened if task.result()), None) for url, opened in tasks.items()}

    def statistics(self) -> ClientStatistics:
        """Take a snapshot of the client's state; views share it."""
        return ClientStatistics(PoolStatistics() if self._core is None else self._core.sessions.statistics())

    @property
    def fault_tolerance(self) -> int:
        """What a call tolerates by default: 0 to 12."""
        return self._options.fault_tolerance

    @property
    def daemons(self) -> tuple[str, ...]:
        """The daemons' URLs in normal form, the hub first."""
        return () if self._core is None else tuple(daemon.url for daemon in self._core.daemons)

    async def aclose(self) -> None:
        """Refuse further calls, wait for those under way (at most `pool.drain` seconds), close the connections.

        Repeating it is harmless. A view closes nothing.
        """
        if self._owner and self._core is not None:
            await self._core.sessions.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if self._core is None:
            return "BustcallClient(disabled)"
        state = "closed" if self._core.sessions.closed else "open" if self._core.sessions.is_open else "unopened"
        return f"BustcallClient({', '.join(self.daemons)}; {state})"

    def __del__(self) -> None:
        if self._owner and self._core is not None and not self._core.sessions.closed and self._core.sessions.is_open:
            told = f"{self!r} was dropped open; use `async with`, or aclose"
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)

    async def _bust_checked(self, target: object, strategy: str, tolerance: int, seconds: float) -> BustResult:
        """Bust one of many: a target that cannot be sent becomes a failed result."""
        try:
            request = bust_request(target, strategy, tolerance)
        except InvalidRequest as error:
            await asyncio.sleep(0)  # nothing else here lets the loop run, nor a cancellation in
            fault = Fault(FaultKind.REJECTED, "this client", str(error), "no")
            return BustResult(
                target=target if isinstance(target, str) else f"<{type(target).__name__}>",
                status="failed",
                stage=call_stage(Outcome.FAILED, [fault.stage]),
                attempts=(Attempt(fault.daemon, fault.stage, 0.0, fault),),
                reveal=self._options.reveal_targets,
            )
        result, _ = await self._bust(request, seconds)
        return result

    async def _bust(
        self, request: BustRequest, seconds: float
    ) -> tuple[BustResult, Receipt[DaemonClient, BustReply] | None]:
        reveal = self._options.reveal_targets
        if self._core is None:
            await asyncio.sleep(0)
            return BustResult(request.target, _DISABLED, call_stage(Outcome.ACKNOWLEDGED, ()), reveal=reveal), None
        now = asyncio.get_running_loop().time
        begun = now()

        async def ask(daemon: DaemonClient, /, *, until: float, deadline: float) -> BustReply:
            return await daemon.bust(request, until=until, deadline=deadline)

        async with self._core.sessions.call():
            receipt = await self._dispatch(self._core.daemons, ask, begun + seconds, self._options.retry)
        stages = [cause.stage for cause in receipt.causes]
        reply, daemon = receipt.reply, receipt.daemon
        if reply is None or daemon is None:
            result = BustResult(
                target=request.target,
                status="failed",
                stage=call_stage(Outcome.FAILED, stages),
                attempts=receipt.attempts,
                elapsed=now() - begun,
                reveal=reveal,
            )
        else:
            result = BustResult(
                target=request.target,
                status="busted",
                stage=call_stage(Outcome.ACKNOWLEDGED, stages),
                daemon=daemon.url,
                cache_key=reply.cache_key,
                delegate=reply.delegate,
                reported_stage=reply.fault_stage,
                removed=reply.removed,
                attempts=receipt.attempts,
                elapsed=now() - begun,
                reveal=reveal,
            )
        _tell(result)
        return result, receipt

    async def _ask(
        self,
        core: _Core,
        ask: Ask[DaemonClient, _Reply],
        what: str,
        daemon: str | None,
        timeout: float | None,
    ) -> _Reply:
        seconds = self._seconds(timeout)
        daemons = core.daemons if daemon is None else (_find(core, daemon),)
        now = asyncio.get_running_loop().time
        begun = now()
        async with core.sessions.call():
            receipt = await self._dispatch(daemons, ask, begun + seconds, retry=None)
        if receipt.reply is None:
            raise failure(what, receipt.ending, receipt.causes, now() - begun) from receipt.error
        return receipt.reply

    @staticmethod
    async def _dispatch(
        daemons: tuple[DaemonClient, ...], ask: Ask[DaemonClient, _Reply], deadline: float, retry: Retry | None
    ) -> Receipt[DaemonClient, _Reply]:
        return await dispatch(ask, daemons, deadline=deadline, retry=retry, random=random.random)

    def _tolerance(self, fault_tolerance: int | None) -> int:
        return self._options.fault_tolerance if fault_tolerance is None else check_tolerance(fault_tolerance)

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._options.timeout
        try:
            return check_seconds(timeout, "timeout")
        except ConfigurationError as error:
            raise InvalidRequest(f"{error}; nothing was sent", field="timeout") from None


def _options(timeout: float, fault_tolerance: int, retry: Retry | None, reveal_targets: bool) -> _Options:
    try:
        tolerance = check_tolerance(fault_tolerance)
    except InvalidRequest:
        raise ConfigurationError(
            f"fault_tolerance must be an integer from 0 to 12, not {fault_tolerance!r}", setting="fault_tolerance"
        ) from None
    _check_types(retry=retry)
    return _Options(check_seconds(timeout, "timeout"), tolerance, retry, reveal_targets)


_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "tls": (TLS, type(None)),
    "retry": (Retry, type(None)),
    "pool": (Pool,),
    "session": (aiohttp.ClientSession, type(None)),
}


def _check_types(**settings: object) -> None:
    for setting, value in settings.items():
        if not isinstance(value, _TYPES[setting]):
            expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in _TYPES[setting])
            raise ConfigurationError(f"{setting} must be {expected}, not {type(value).__name__}", setting=setting)


def _check_token(token: object, topology: Topology, *, allowed: bool, proxied: bool) -> None:
    """Refuse a token that no header can carry, or that would cross a network, or a proxy, in clear text."""
    if token is None:
        return
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise ConfigurationError("token must be visible ASCII characters without spaces", setting="token")
    for address in topology:
        kept = address.is_encrypted or address.scheme == "unix" or (address.is_local and not proxied)
        if not kept and not allowed:
            raise ConfigurationError(
                f"the token would go to {address} in clear text; use https://, or say allow_insecure_token=True",
                setting="token",
            )


def _check_session(
    session: aiohttp.ClientSession | None, topology: Topology, *, token: str | None, tls: TLS | None, trust_env: bool
) -> None:
    if session is None:
        return
    if tls is not None or trust_env:
        raise ConfigurationError(
            "tls and trust_env belong to the session that was passed in; set them there", setting="session"
        )
    if token is not None and session.auth is not None:
        raise ConfigurationError(
            "the session that was passed in has an auth of its own, which the token would contradict; give one of them",
            setting="session",
        )
    on_socket = isinstance(session.connector, aiohttp.UnixConnector)
    for address in topology:
        if (address.socket_path is not None) != on_socket:
            raise ConfigurationError(
                f"the session that was passed in cannot reach {address}: its connector is "
                f"{'a' if on_socket else 'not a'} Unix socket's",
                setting="session",
            )


def _find(core: _Core, daemon: str) -> DaemonClient:
    try:
        url = DaemonAddress.parse(daemon).url
    except ConfigurationError as error:
        raise InvalidRequest(f"{error}; nothing was sent", field="daemon") from None
    for candidate in core.daemons:
        if candidate.url == url:
            return candidate
    known = ", ".join(candidate.url for candidate in core.daemons)
    raise InvalidRequest(f"daemon {url} is none of this client's ({known}); nothing was sent", field="daemon")


async def _each(targets: Any) -> AsyncGenerator[object, None]:
    if isinstance(targets, str | bytes):
        raise InvalidRequest("targets must be many strings, not one; use bust for one", field="targets")
    if isinstance(targets, AsyncIterable):
        async for target in targets:
            yield target
    elif isinstance(targets, Iterable):
        for target in targets:
            yield target
    else:
        raise InvalidRequest(f"targets must be an iterable of strings, not {type(targets).__name__}", field="targets")


def _tell(result: BustResult) -> None:
    """Log what a call met on its way: nothing for a clean success, else at the level of its band."""
    if result.causes:
        _log.log(
            _LEVELS[result.band],
            "bust of %s: %s, stage %d (%s), attempts: %d, in %.3f s: %s",
            result.label,
            result.status,
            result.stage,
            result.band,
            len(result.attempts),
            result.elapsed,
            "; ".join(summary(result.causes)),
        )
