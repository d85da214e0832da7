"""`BustcallClient`: what users hold. Its lifecycle, its settings, and what a call's outcome means to the caller.

It has arguments checked before anything is sent (`arguments`), hands the job to what belongs to the running event loop
(`runtime`), and decides whether the result raises. It holds no cache logic at all: what a target or a strategy means is
the daemon's affair.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar, final

from pydantic import BaseModel

from pybustcall.arguments import (
    KEPT,
    Kept,
    Options,
    check_capability,
    check_client_id,
    check_flag,
    check_hook,
    check_key,
    check_mode,
    check_session,
    check_token,
    check_types,
    options_of,
    outbox_of,
    requirements_of,
)
from pybustcall.attached import Nearby
from pybustcall.capabilities import DaemonCapabilities
from pybustcall.config import settings_from_env, settings_from_toml
from pybustcall.daemon_client import MAX_REPLY_BYTES, DaemonClient
from pybustcall.delivery import Delivered, DeliveryMode, Job
from pybustcall.dispatcher import dispatch, reap
from pybustcall.errors import ConfigurationError, DaemonsUnavailable, DeadlineExceeded, InvalidRequest, OutboxError
from pybustcall.events import BustEvent, EventStream, Feed, Wanted
from pybustcall.faults import AttemptFailed, Fault, FaultKind, Outcome, call_stage, check_tolerance, raises
from pybustcall.fleet import Fleet, FleetView, Policies
from pybustcall.hotswap import (
    Dependency,
    Resolution,
    Swap,
    SwapResult,
    announce_request,
    at_one,
    check_name,
    check_spec,
    doubt_dependency,
    doubt_registration,
    doubt_resolution,
    doubt_swap,
    register_request,
    swap_request,
)
from pybustcall.jobs import BustJob, doubt_job, doubt_jobs, job_path, jobs_path
from pybustcall.models import (
    DEFAULT_NAMESPACE,
    DEFAULT_STRATEGY,
    DEFAULT_TOLERANCE,
    EVERYTHING,
    BustRequest,
    DaemonStatus,
    DependenciesReply,
    DependencyReply,
    ForgetReply,
    ForgetRequest,
    HotSwapReply,
    JobReply,
    JobsReply,
    RegisterReply,
    Requirements,
    ResolveReply,
    ResolveRequest,
    bust_request,
    check_namespace,
    redact,
)
from pybustcall.near_cache import NearCache, NearCacheStatistics
from pybustcall.policies import Breaker, Budget, Failback, Hedge, Pool, Probes, Retry, check_seconds
from pybustcall.results import Attempt, BustReport, BustResult, ReportBuilder, failure
from pybustcall.runtime import Core, Runtime, close
from pybustcall.semverx import SemverX
from pybustcall.session import TLS, PoolStatistics, SessionManager
from pybustcall.topology import DEFAULT_URL, DaemonAddress, Route, Topology

if TYPE_CHECKING:
    from types import TracebackType

    import aiohttp

    from pybustcall.attached import Drop
    from pybustcall.background import ReplayReport
    from pybustcall.config import Settings
    from pybustcall.dispatcher import Ask
    from pybustcall.models import JobState, Kind
    from pybustcall.outbox import Outbox, OutboxCounts, OutboxRow, OutboxStore
    from pybustcall.telemetry import Event

__all__ = ["BustcallClient", "ClientOutbox", "ClientStatistics"]

_log: Final = logging.getLogger("pybustcall")
_log.addHandler(logging.NullHandler())


_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
"""Seconds between two questions of `wait_job`: from the first on they double."""

_JOBS: Final = "cache.bust.jobs"
_DISABLED: Final = "disabled"
_Reply = TypeVar("_Reply")
_Answer = TypeVar("_Answer", bound=BaseModel)


@final
@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """A snapshot of what a client holds now and has done so far, in all event loops of this process.

    - `pool`: its connections
    - `calls`: busts begun; `attempts`: requests sent for them, replays included
    - `retries`, `retries_denied`: second sends to one daemon, and those that the shared budget denied
    - `hedges`: calls that asked a second daemon at the live p95; `overdue`: calls that left a silent daemon
    - `incidents`: failures that counted against a daemon; `failovers`, `failbacks`: of the hub
    - `probes`, `probes_missed`: of the daemons, in the background
    - `accepted`: busts that daemons keep as jobs, since they are not applied everywhere yet
    - `deferred`, `replayed`, `refused`: busts stored in the outbox, delivered out of it, and set aside there
    - `events_dropped`: events that slow hooks were not told
    - `near`: of each of its near caches
    """

    pool: PoolStatistics
    calls: int = 0
    attempts: int = 0
    retries: int = 0
    retries_denied: int = 0
    hedges: int = 0
    overdue: int = 0
    incidents: int = 0
    failovers: int = 0
    failbacks: int = 0
    probes: int = 0
    probes_missed: int = 0
    deferred: int = 0
    replayed: int = 0
    refused: int = 0
    events_dropped: int = 0
    accepted: int = 0
    near: tuple[NearCacheStatistics, ...] = ()


@final
class ClientOutbox:
    """The outbox of a client: what waits there, and what can be done about it.

    Every method raises `OutboxError` if the file cannot be read or written.
    """

    def __init__(self, core: Core, store: OutboxStore, policy: Outbox) -> None:
        self._core = core
        self._store = store
        self._policy = policy

    @property
    def path(self) -> str:
        """The file."""
        return os.fspath(self._policy.path)

    async def rows(self, *, after: int = 0, limit: int = 1000) -> tuple[OutboxRow, ...]:
        """List rows in the order of their numbers, those beyond `after`."""
        return await self._store.rows(after=after, limit=limit)

    async def counts(self) -> OutboxCounts:
        """Count the rows that wait, that are being delivered, and that were set aside."""
        return await self._store.counts()

    async def replay(self) -> ReplayReport:
        """Deliver now what can be delivered, whatever it was waiting for; tell what came of it."""
        async with self._core.sessions.call():
            runtime = self._core.runtime()
            assert runtime.courier is not None  # noqa: S101 - there is one wherever there is an outbox
            await runtime.negotiator.ask_again()
            return await runtime.courier.replay()

    async def retry(self, ids: Iterable[int] | None = None) -> int:
        """Let rows that were set aside be delivered again, as if they were new; None for all. Tell how many."""
        return await self._store.retry(ids)

    async def purge(self, ids: Iterable[int] | None = None, *, aside_only: bool = True) -> int:
        """Delete rows: those numbered, or all; by default only what was set aside. Tell how many.

        What is deleted is never delivered: the caches keep the old value until it expires.
        """
        return await self._store.purge(ids, aside_only=aside_only)

    def __repr__(self) -> str:
        return f"ClientOutbox({self.path!r})"


@final
class BustcallClient:
    """Hands busts to bustcall daemons, the hub first and its peers after it, within a deadline.

    - `url`: the hub: `http://`, `https://` or `unix:///path/of.sock`
    - `peers`: URLs of the daemons to ask, in this order, when the hub cannot
    - `token`: bearer token; over plain HTTP only to this machine, unless `allow_insecure_token`
    - `tls`: authorities and client certificate for https:// daemons
    - `timeout`: seconds that one call may take in all
    - `fault_tolerance`: 0 to 12; a call raises iff its stage is below 12 minus this
    - `delivery`: how many daemons must acknowledge: "first" (whichever answers), "quorum" (more than half) or "all"
    - `retry`: how a call tries again; None for one attempt at each daemon
    - `hedge`: when a second daemon is asked; None for never
    - `breaker`: when a daemon is no longer asked; `budget`: what retries and hedges may cost; None for no limit
    - `probes`: how daemons are probed in the background; None for not at all
    - `requires`: what a daemon must be able to do, and which versions it may have; one that does not fit is left out
    - `failback`: how calls return to the hub; None for not before `reset`
    - `outbox`: a file, or an `Outbox`, where busts are kept that nobody acknowledged; None: then an outage raises
    - `client_id`: decides in what order this client asks the peers; by default each process has one of its own
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

    _core: Core | None = None  # so that a client whose making failed can be dropped
    _owner = False
    _whole: BustcallClient | None = None  # of a view, the client that it must keep alive

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        peers: Iterable[str] = (),
        token: str | None = None,
        tls: TLS | None = None,
        timeout: float = 5.0,
        fault_tolerance: int = DEFAULT_TOLERANCE,
        delivery: DeliveryMode = "first",
        retry: Retry | None = Retry(),  # noqa: B008 - frozen, and shown to the reader
        hedge: Hedge | None = Hedge(),  # noqa: B008
        breaker: Breaker | None = Breaker(),  # noqa: B008
        budget: Budget | None = Budget(),  # noqa: B008
        probes: Probes | None = Probes(),  # noqa: B008
        failback: Failback | None = Failback(),  # noqa: B008
        requires: Requirements | None = None,
        outbox: Outbox | str | os.PathLike[str] | None = None,
        client_id: str | None = None,
        pool: Pool = Pool(),  # noqa: B008
        max_reply_bytes: int = MAX_REPLY_BYTES,
        trust_env: bool = False,
        allow_insecure_token: bool = False,
        reveal_targets: bool = False,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        topology = Topology.parse(url, peers)
        check_types(tls=tls, pool=pool, session=session)
        check_types(retry=retry, hedge=hedge, breaker=breaker, budget=budget, probes=probes, failback=failback)
        proxied = trust_env or (session is not None and session.trust_env)
        check_token(token, topology, allowed=allow_insecure_token, proxied=proxied)
        check_session(session, topology, token=token, tls=tls, trust_env=trust_env)
        if type(max_reply_bytes) is not int or max_reply_bytes < 1024:
            raise ConfigurationError(
                f"max_reply_bytes must be an integer of at least 1024, not {max_reply_bytes!r}",
                setting="max_reply_bytes",
            )
        check_client_id(client_id)
        self._options = options_of(timeout, fault_tolerance, retry, delivery, reveal_targets)
        self._core = Core(
            topology,
            lambda runtime: SessionManager(pool=pool, tls=tls, trust_env=trust_env, session=session, companion=runtime),
            lambda address, sessions, heard: DaemonClient(
                address, sessions, token=token, max_reply_bytes=max_reply_bytes, heard=heard
            ),
            requires=requirements_of(requires),
            policies=Policies(hedge=hedge, breaker=breaker, budget=budget, probes=probes, failback=failback),
            outbox=outbox_of(outbox),
            client_id=client_id,
        )
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
            delivery=settings.delivery,
            retry=settings.retry,
            hedge=settings.hedge,
            breaker=settings.breaker,
            budget=settings.budget,
            probes=settings.probes,
            failback=settings.failback,
            requires=Requirements.model_validate(settings.requires.model_dump()) if settings.requires else None,
            outbox=settings.outbox,
            client_id=settings.client_id,
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
        client = cls._view(None, options_of(5.0, DEFAULT_TOLERANCE, Retry(), "first", reveal_targets=False))
        _log.info("the bustcall client is disabled: busts are not sent anywhere")
        return client

    @classmethod
    def _view(cls, core: Core | None, options: Options) -> BustcallClient:
        client = cls.__new__(cls)
        client._core = core  # noqa: SLF001 - our own, being made
        client._options = options  # noqa: SLF001
        return client

    def with_options(
        self,
        *,
        timeout: float | None = None,
        fault_tolerance: int | None = None,
        retry: Retry | Literal[Kept.KEPT] | None = KEPT,
        delivery: DeliveryMode | None = None,
        reveal_targets: bool | None = None,
    ) -> BustcallClient:
        """Return a view with other options on the same connections.

        What is not given stays as it is; `retry=None` means one attempt at each daemon. Closing a view closes nothing;
        when the client is closed, so are its views.
        """
        old = self._options
        view = self._view(
            self._core,
            options_of(
                old.timeout if timeout is None else timeout,
                old.fault_tolerance if fault_tolerance is None else fault_tolerance,
                old.retry if retry is KEPT else retry,
                old.delivery if delivery is None else delivery,
                old.reveal_targets if reveal_targets is None else reveal_targets,
            ),
        )
        view._whole = self._whole or self  # noqa: SLF001 - our own
        return view

    async def bust(
        self,
        target: str,
        *,
        kind: Kind = "key",
        strategy: str = DEFAULT_STRATEGY,
        soft: bool = False,
        namespace: str | None = None,
        confirm: bool = False,
        dry_run: bool = False,
        verify: bool = False,
        settle: float | None = None,
        allow_wider: bool = False,
        reason: str | None = None,
        fault_tolerance: int | None = None,
        timeout: float | None = None,
        delivery: DeliveryMode | None = None,
        write_ahead: bool = False,
        idempotency_key: str | None = None,
    ) -> BustResult:
        """Have the old value of `target` dropped from the caches; return once that is acknowledged, or stored.

        - `target`: 1 byte to 8 KiB of UTF-8 without control characters
        - `kind`: what it names: a key, a prefix (the key and all below it, by whole segments), a tag, or all ("*")
        - `strategy`: sent verbatim; the reference daemon knows direct, dimensional and hybrid
        - `soft`: mark as stale instead of removing; readers are served the old value while one of them makes it anew
        - `namespace`: whose entries; None for the daemon's default one. No bust reaches across namespaces
        - `confirm`: must be true for the kind "all"
        - `dry_run`: tell how many entries would go (`matched`), and remove none. It is never stored
        - `verify`: have the daemon read back that nothing of it is left
        - `settle`: seconds after which it is busted a second time, against fills in flight; 0 for never; None for what
          each layer of the daemon does by itself
        - `allow_wider`: where a daemon cannot do it, have it do the next wider: all instead of a prefix or a tag, hard
          instead of soft; the result's `note` and `kind` say so
        - `reason`: why, for the daemon's audit; at most 256 characters
        - `fault_tolerance`: 0 to 12 for this call; 12 never raises: ask the result's `ok`
        - `timeout`: seconds for this call, retries and peers included
        - `delivery`: how many daemons must acknowledge: "first", "quorum" or "all"
        - `write_ahead`: store it before the first attempt, so that not even a kill of this process loses it
        - `idempotency_key`: 1 to 255 visible ASCII characters, the same on every attempt; by default one is made

        A bust that goes on at the daemon after its answer is "accepted", or "partial" if one of its layers failed, with
        the name of its `job`. What is beyond the base protocol is sent only to daemons that advertise it.

        Raises `InvalidRequest` before anything is sent, `OutboxError` if it was to be stored and could not be, and
        `BustFailed` or a subclass of it if the call's stage is below 12 - fault_tolerance; the error tells whether the
        bust was, was not or may have been applied. A cancellation stores the bust first if there is an outbox.
        """
        tolerance = self._tolerance(fault_tolerance)
        request = bust_request(
            target,
            strategy,
            tolerance,
            kind=kind,
            soft=soft,
            namespace=namespace,
            confirm=confirm,
            dry_run=dry_run,
            verify=verify,
            settle=settle,
            reason=reason,
        )
        check_flag(allow_wider, "allow_wider")
        seconds = self._seconds(timeout)
        mode = self._options.delivery if delivery is None else check_mode(delivery)
        check_flag(write_ahead, "write_ahead")
        if write_ahead and self._core is not None and self._core.store is None:
            raise InvalidRequest("write_ahead needs an outbox; nothing was sent", field="write_ahead")
        key = check_key(idempotency_key)
        try:
            delivered = await self._bust(request, seconds, mode, key=key, write_ahead=write_ahead, wider=allow_wider)
        except OutboxError as error:
            unstored = self._unstored(request, key, error)
            if raises(unstored.stage, tolerance):
                raise
            return unstored
        result = delivered.result
        if self._core is not None and raises(result.stage, tolerance):
            what = f"the bust of {result.label}"
            raise failure(what, delivered.ending, result.causes, result.elapsed, result) from delivered.error
        if self._core is not None:
            self._core.digest.tell(result)
        return result

    async def bust_many(
        self,
        targets: Iterable[str] | AsyncIterable[str],
        *,
        concurrency: int = 64,
        on_progress: Callable[[BustResult], object] | None = None,
        kind: Kind = "key",
        strategy: str = DEFAULT_STRATEGY,
        soft: bool = False,
        namespace: str | None = None,
        confirm: bool = False,
        dry_run: bool = False,
        verify: bool = False,
        settle: float | None = None,
        allow_wider: bool = False,
        reason: str | None = None,
        fault_tolerance: int | None = None,
        timeout: float | None = None,
        delivery: DeliveryMode | None = None,
    ) -> BustReport:
        """Bust many targets, at most `concurrency` at once, in flat memory; never raises for a single target.

        - `targets`: any iterable, also an asynchronous one; it is read as the busts go on
        - `on_progress`: called with every result, in the order in which they end; what it raises ends the call
        - `timeout`: seconds for each target, from its turn
        - the others: as in `bust`, the same for all targets

        The report counts them and keeps the results that are not ok, a target that cannot be sent among them. Raises
        `InvalidRequest` for other arguments that cannot be used, before anything is sent.
        """
        tolerance = self._tolerance(fault_tolerance)

        def request_of(target: object) -> BustRequest:
            return bust_request(
                target,
                strategy,
                tolerance,
                kind=kind,
                soft=soft,
                namespace=namespace,
                confirm=confirm,
                dry_run=dry_run,
                verify=verify,
                settle=settle,
                reason=reason,
            )

        request_of(EVERYTHING)  # of any target: the other arguments are refused before one is taken
        check_flag(allow_wider, "allow_wider")
        seconds = self._seconds(timeout)
        mode = self._options.delivery if delivery is None else check_mode(delivery)
        if type(concurrency) is not int or concurrency < 1:
            raise InvalidRequest(
                f"concurrency must be an integer of at least 1, not {concurrency!r}; nothing was sent",
                field="concurrency",
            )
        source = _each(targets)
        turn = asyncio.Lock()
        builder = ReportBuilder()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        workers: set[asyncio.Task[None]] = set()

        async def work() -> None:
            while True:
                async with turn:
                    target = await anext(source, KEPT)
                if target is KEPT:
                    return
                if len(workers) < concurrency:  # one more at work only when there was something to do
                    workers.add(loop.create_task(work()))
                result = await self._bust_checked(target, request_of, seconds, mode, wider=allow_wider)
                builder.add(result)
                if on_progress is not None:
                    on_progress(result)

        # Not a task group: it would take a CancelledError out of the caller's own iterable or callback for the end of
        # the work, and lose the targets that are left in silence.
        async with aclosing(source):
            workers.add(loop.create_task(work()))
            try:
                while left := {worker for worker in workers if not worker.done()}:
                    await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    for worker in workers:
                        if worker.done():
                            worker.result()  # raises what the caller's own iterable or callback did, or a closed client
            finally:
                await reap(workers)
        return builder.finish(loop.time() - begun)

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

        It is asked anew, which costs little if nothing has changed. Raises as `status` does.
        """
        if self._core is None:
            return DaemonCapabilities(_DISABLED)

        async def ask(
            asked: DaemonClient, /, *, until: float, deadline: float, started: Callable[[], None]
        ) -> DaemonCapabilities:
            return await runtime.negotiator.look(asked, until=until, deadline=deadline, started=started)

        async with self._core.sessions.call():
            runtime = self._core.runtime()
            return await self._ask(self._core, ask, "asking for the capabilities", daemon, timeout)

    async def supports(self, name: str, *, daemon: str | None = None, timeout: float | None = None) -> bool:
        """Tell whether the first daemon that answers, the hub asked first, can be relied on for a capability.

        `daemon` asks of another of the URLs. What is known is taken as it was for 300 seconds, or until an answer shows
        that it changed. A daemon without a capability document supports the base protocol alone; one that does not fit
        this client, or a disabled client, supports nothing. Whether the token opens it, only the call itself can tell.
        Raises as `status` does.
        """
        check_capability(name)
        if self._core is None:
            return False

        async def ask(asked: DaemonClient, /, *, until: float, deadline: float, started: Callable[[], None]) -> bool:
            found = await runtime.negotiator.settled(asked, until=until, deadline=deadline, started=started)
            return found.supports(name) and not runtime.negotiator.misfit(asked)

        async with self._core.sessions.call():
            runtime = self._core.runtime()
            return await self._ask(self._core, ask, "asking for the capabilities", daemon, timeout)

    async def resolve(self, spec: str, *, daemon: str | None = None, timeout: float | None = None) -> Resolution:
        """Tell which known version of a cache dependency `name@range` means, such as "pricing-model@^2.0.0".

        The best is the highest that matches, stable before legacy before experimental. The first daemon that answers
        is asked, the hub first, or `daemon` (one of the URLs): registries are each daemon's own.

        Raises `InvalidRequest` for a bad spec, before anything is sent; `BustRejected` if nothing known matches, naming
        what is known; `IncompatibleDaemon` if no daemon advertises "semver.resolve"; and otherwise as `status` does.
        """
        request = ResolveRequest(spec=check_spec(spec))
        using = _Using("resolving " + spec, "semver.resolve", "/api/v1/resolve")
        reply = await self._use(using, request, ResolveReply, daemon, timeout, partial(doubt_resolution, request))
        return Resolution(
            spec=spec,
            resolved=reply.answer.resolved,
            version=SemverX.parse(reply.answer.version),
            state=reply.answer.state,
            daemon=reply.daemon,
        )

    async def announce(
        self,
        name: str,
        versions: str | Iterable[str],
        *,
        current: str | None = None,
        daemon: str | None = None,
        timeout: float | None = None,
    ) -> Dependency:
        """Tell a daemon that there is a cache dependency in these versions; return what it knows of it now.

        `current` is the version in use; the first announcement settles it (by default the best of `versions`), and only
        a hot swap changes it. Entries depend on it that were registered as depending on its name. Done at the first
        daemon that answers, or at `daemon`: registries are each daemon's own. Raises as `resolve` does.
        """
        request = announce_request(name, versions, current)
        using = _Using("announcing " + name, "cache.dependencies", "/api/v1/dependencies", changes=True)
        reply = await self._use(using, request, DependencyReply, daemon, timeout, partial(doubt_dependency, request))
        return Dependency.of(reply.answer, reply.daemon)

    async def dependencies(self, *, daemon: str | None = None, timeout: float | None = None) -> tuple[Dependency, ...]:
        """List the cache dependencies that the first daemon knows which answers, or `daemon`; raises as `resolve` does.

        This, and not `resolve`, tells which version is in use.
        """
        using = _Using("asking for the dependencies", "cache.dependencies", "/api/v1/dependencies")
        reply = await self._use(using, None, DependenciesReply, daemon, timeout)
        return tuple(Dependency.of(one, reply.daemon) for one in reply.answer.dependencies)

    async def forget(self, name: str, *, daemon: str | None = None, timeout: float | None = None) -> str:
        """Have a daemon forget a cache dependency, on which nothing depends any more; return the daemon's URL.

        What is not known is forgotten already. Done at the first daemon that answers, or at `daemon`. Raises
        `BustRejected` if it is in use, and otherwise as `resolve` does.
        """
        request = ForgetRequest(name=check_name(name, "name"))
        using = _Using("forgetting " + name, "cache.dependencies", "/api/v1/dependencies/forget", changes=True)
        return (await self._use(using, request, ForgetReply, daemon, timeout)).daemon

    async def register(
        self,
        key: str,
        depends_on: Iterable[str] = (),
        *,
        tags: Iterable[str] = (),
        ttl: float | None = None,
        namespace: str | None = None,
        daemon: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Tell a daemon that its cache holds `key`, made of what `depends_on` names; a second time replaces the first.

        A bust or a hot swap of any of those then reaches `key`, and so does a bust of one of its `tags`. With `ttl` the
        entry ends by itself after so many seconds, as it does in the cache. `namespace` is whose entry it is. Done at
        the first daemon that answers, or at `daemon`; returns its URL. Raises as `resolve` does, `IncompatibleDaemon`
        also if no daemon knows tags or namespaces, and they are given.
        """
        request = register_request(key, depends_on, tags=tags, ttl=ttl, namespace=namespace)
        label = repr(key) if self._options.reveal_targets else redact(request.key)
        also = ("cache.bust.tag",) * bool(request.tags) + ("cache.bust.namespace",) * (request.namespace is not None)
        using = _Using("registering " + label, "cache.register", "/api/v1/entries", changes=True, also=also)
        doubt = partial(doubt_registration, request)
        return (await self._use(using, request, RegisterReply, daemon, timeout, doubt)).daemon

    async def jobs(
        self,
        *,
        limit: int = 100,
        before: str | None = None,
        state: JobState | None = None,
        daemon: str | None = None,
        timeout: float | None = None,
    ) -> tuple[BustJob, ...]:
        """List the busts in a daemon's journal, the newest first: those under way and those that are over, its audit.

        - `limit`: 1 to 1,000; `before`: the `job` of the last one listed, to go on from there
        - `state`: only those that are waiting, running, settling, done, cancelled or failed

        The first daemon that answers is asked, or `daemon`: journals are each daemon's own. Raises as `resolve` does.
        """
        using = _Using("asking for the jobs", _JOBS, jobs_path(limit, before, state))
        doubt = partial(doubt_jobs, limit, state)
        reply = await self._use(using, None, JobsReply, daemon, timeout, doubt)
        return tuple(BustJob.of(one, reply.daemon) for one in reply.answer.jobs)

    async def job(self, job: str, *, daemon: str | None = None, timeout: float | None = None) -> BustJob:
        """Tell how far a bust is that a daemon accepted; `job` and `daemon` are in the result of `bust`.

        Without `daemon` the first that answers is asked. Raises `BustRejected` if there is no such job there (any
        more), and otherwise as `resolve` does.
        """
        using = _Using("asking for a job", _JOBS, job_path(job))
        reply = await self._use(using, None, JobReply, daemon, timeout, partial(doubt_job, job))
        return BustJob.of(reply.answer, reply.daemon)

    async def cancel_job(self, job: str, *, daemon: str | None = None, timeout: float | None = None) -> BustJob:
        """Have a daemon do no more for a bust that it accepted; tell how it is then. One that is over stays as it is.

        What was removed stays removed, and a layer that has not done it keeps the old value. Doing it twice is
        harmless. Raises as `job` does.
        """
        using = _Using("cancelling a job", _JOBS, job_path(job), changes=True, method="DELETE")
        reply = await self._use(using, None, JobReply, daemon, timeout, partial(doubt_job, job))
        return BustJob.of(reply.answer, reply.daemon)

    async def wait_job(self, job: str, *, timeout: float, daemon: str | None = None) -> BustJob:
        """Wait until a bust that a daemon accepted is over: done, cancelled or failed.

        It is asked for again and again, at most every 2 seconds, for `timeout` seconds in all; a daemon that cannot be
        reached may be back by then. Raises `DeadlineExceeded` if it is not over in time, and otherwise as `job` does.
        """
        seconds = self._seconds(timeout)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        pause = _FIRST_PAUSE
        while True:
            left = max(_FIRST_PAUSE, begun + seconds - loop.time())
            try:
                found = await self.job(job, daemon=daemon, timeout=min(self._options.timeout, left))
            except (DaemonsUnavailable, DeadlineExceeded):
                if loop.time() + pause > begun + seconds:
                    raise
            else:
                if found.is_over:
                    return found
                daemon = found.daemon  # another would not know it
                if loop.time() + pause > begun + seconds:
                    raise DeadlineExceeded(
                        f"the job {job} of {daemon} was not over within {seconds:g} s: it is {found.state}. It goes on;"
                        " wait again, or allow more time with timeout=",
                        daemon=daemon,
                    )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def hot_swap(
        self,
        swaps: Iterable[Swap],
        *,
        daemon: str | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> SwapResult:
        """Put other versions of cache dependencies in the place of the current ones, all or none; bust what depends.

        Done at one daemon, once: the hub, or the next that can be reached if the hub surely has not done it, or
        `daemon` (one of the URLs). While that is uncertain the same daemon is asked again, with the same key. It is
        never stored in the outbox. Returns once it is committed and no entry made with the old versions is left.

        Raises `InvalidRequest` before anything is sent; `BustRejected` if the rules (docs/reference/semverx.md) refuse
        a swap: nothing has changed, and `causes[-1].unmet` says why; `IncompatibleDaemon` if no daemon advertises
        "cache.hotswap"; and otherwise as `bust` does, where `applied` is "maybe" if it may have been committed.
        """
        request = swap_request(swaps)
        key = check_key(idempotency_key)
        seconds = self._seconds(timeout)
        core = self._enabled("a hot swap")
        daemons = core.daemons if daemon is None else (_find(core, daemon),)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            async with core.sessions.call():
                runtime = core.runtime()
                runtime.negotiator.look_again()
                receipt, causes = await at_one(
                    runtime.negotiator.asking(
                        "cache.hotswap",
                        "/api/v1/hotswap",
                        request,
                        HotSwapReply,
                        key=key,
                        doubt=partial(doubt_swap, request),
                    ),
                    daemons,
                    client_id=core.client_id,
                    deadline=begun + seconds,
                    retry=self._options.retry,
                    random=random.random,
                )
        finally:
            core.near.forget("a hot swap: what was made with the old versions is known to the daemon alone")
        elapsed = loop.time() - begun
        if receipt.reply is None or receipt.daemon is None:
            what = f"the hot swap of {', '.join(item.name for item in request.swaps[:3])}"
            repeat = f"Ask that daemon again, with idempotency_key={key!r}: it tells what the swap came to, or does it."
            raise failure(what, receipt.ending, causes, elapsed, changes=True, repeat=repeat) from receipt.error
        return SwapResult.of(request, receipt.reply, receipt.daemon.url, causes, elapsed, key)

    def events(
        self,
        *,
        prefix: str | Iterable[str] = (),
        tags: str | Iterable[str] = (),
        namespace: str | None = None,
        daemon: str | None = None,
    ) -> EventStream:
        """Follow what the daemons bust: iterate over it, with `async for`, inside of its `async with` block.

        - `prefix`, `tags`: up to 100 of each; only what could concern keys below one of the prefixes, or entries with
          one of the tags, as far as they were registered with it; neither: everything
        - `namespace`: whose entries; None for "default"
        - `daemon`: follow this one (one of the URLs) only; None: each of them, since each tells only what it did

        Connections that break, or are silent for three heartbeats, are made anew, and go on where they were; where that
        cannot be, a `Reset` says so. They take no slot of the pool. Where the client is disabled nothing is ever told.
        Raises `InvalidRequest` for arguments that cannot be; what else can be wrong is raised by iterating.
        """
        wanted = Wanted.of(namespace, prefix, tags)
        if self._core is None:
            return EventStream(partial(_follow_nobody, wanted))
        url = None if daemon is None else _find(self._core, daemon).url
        return EventStream(partial(self._follow, wanted, url))

    def near_cache(
        self,
        *,
        ttl: float | None,
        maxsize: int = 10_000,
        namespace: str | None = None,
        grace: float | None = None,
        delivery: DeliveryMode | None = None,
    ) -> NearCache:
        """Make a cache inside of this process, from which the daemons' busts drop what they concern.

        - `ttl`: seconds that a value is served at most, counted from when its loading began; None for no limit
        - `maxsize`: how many values are held; beyond it the one goes that was not asked for longest
        - `namespace`: whose values; None for "default"
        - `grace`: seconds for which values are served that were trusted when a connection broke, from when it was heard
          last; None for three heartbeats of the daemon, 15 s by default. 0: not any more as soon as that is known
        - `delivery`: by how many daemons the busts of all who write are acknowledged at least; None: as this client's
          are. With "first" each daemon must be followed, with "quorum" half of them, with "all" one

        Nothing is served, and nothing held, while the daemons are not followed: each value is then loaded, once for all
        who ask at a time. What this client busts itself is dropped before `bust` returns, in the loop of the call. The
        cache follows the daemons from its first call on, until it is dropped or the client is closed. Raises
        `ConfigurationError` or `InvalidRequest` for a setting that cannot be used.
        """
        mode = self._options.delivery if delivery is None else check_mode(delivery)
        core = self._core
        if core is None:
            return NearCache(None, maxsize=maxsize, ttl=ttl, namespace=namespace, grace=grace, needed=1)

        needed = _needed(len(core.daemons), mode)
        cache = NearCache(self._follow_all, maxsize=maxsize, ttl=ttl, namespace=namespace, grace=grace, needed=needed)
        core.near.add(cache)
        return cache

    def attach(
        self,
        cache: object,
        *,
        key: Callable[[Any], object] | None = None,
        tags: Callable[[Any], str | Iterable[str]] | None = None,
        drop: Drop | None = None,
        namespace: str | None = None,
    ) -> Callable[[], None]:
        """Have busts reach a cache that is none of ours, as long as the application holds it; return what ends that.

        - `cache`: a mapping with `pop` and `clear` (all caches of cachetools, a subclass of dict), a function with
          `cache_clear` (of functools, which each bust clears), or a callable that is given each `BustEvent` or `Reset`.
          It is held weakly: a bound method as long as its object. So keep it under a name of your own: a lambda, or a
          function inside of another, is gone with whoever holds it
        - `key`: tells, for a key of the cache, the key by which it is busted, or several, or None for what is no part
          of this; by default they are the same
        - `tags`: tells, for a key of the cache, the tag of its entry, or several; without it, a bust of any tag clears
          the cache. If this or `key` raises, or tells what is none, the cache is cleared, and the log says why
        - `drop`: what to call instead, with the cache and each `BustEvent` or `Reset`, which means everything
        - `namespace`: whose values; None for "default"

        A foreign cache cannot be bypassed: it is cleared when the daemons are not followed any more, then every three
        heartbeats (15 s where none is known) until they are, and again when they are. So what is put into it late, or
        meanwhile, may be old, but no older than that. A daemon that tells this client of no busts is an error in the
        log. It follows them in the running event loop from now on; where none runs, in that of the client's first call.
        It is called from that loop's thread. Each event takes a look through all keys. Raises `ConfigurationError` for
        what cannot be held weakly, what nobody else holds, async functions, and where `key`, `tags` or `drop` would
        hold the cache, as a function does that closes over what has it; a method of that may be given, and its object
        is held weakly, too. Raises `ClientClosed` after the client's `aclose`.
        """
        meant = DEFAULT_NAMESPACE if namespace is None else check_namespace(namespace)
        core = self._core
        if core is None:
            attachments = Nearby().attachments(meant, 1)
        else:
            core.sessions.check_open()
            attachments = core.near.attachments(meant, _needed(len(core.daemons), self._options.delivery))
        end = attachments.attach(cache, key, tags, drop)
        del cache, key, tags, drop  # so that it is seen whether anybody else holds them
        end.check_held()
        if core is not None and not attachments.is_served:
            core.enter()
        return end

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
                await core.runtime().negotiator.look(daemon, until=deadline, deadline=deadline)
            except AttemptFailed as failed:
                return failed.fault
            return None

        async with core.sessions.call(), asyncio.TaskGroup() as group:
            tasks = {
                daemon.url: [group.create_task(open_one(daemon)) for _ in range(connections)] for daemon in core.daemons
            }
        return {url: next((task.result() for task in opened if task.result()), None) for url, opened in tasks.items()}

    def statistics(self) -> ClientStatistics:
        """Take a snapshot of the client's state and counts; views share it."""
        if self._core is None:
            return ClientStatistics(PoolStatistics())
        counts = Counter(self._core.past)
        for runtime in self._core.runtimes():
            counts.update(runtime.fleet.counts)
        known = {field.name for field in fields(ClientStatistics)}
        return ClientStatistics(
            self._core.sessions.statistics(),
            events_dropped=self._core.hooks.dropped,
            near=self._core.near.statistics(),
            **{name: count for name, count in counts.items() if name in known},
        )

    def topology(self) -> FleetView:
        """Take a snapshot of the daemons as the running event loop's calls know them, and of where calls go now.

        Raises RuntimeError outside an event loop: what is known of daemons belongs to one.
        """
        loop = asyncio.get_running_loop()
        if self._core is None:
            return FleetView(route=Route.STAR, hub_share=1.0, order=(), budget=1.0, daemons=())
        runtime = self._core.sessions.companion
        fleet = runtime.fleet if isinstance(runtime, Runtime) else Runtime(self._core, loop).fleet
        return fleet.view(loop.time())

    def on_event(self, hook: Callable[[Event], object]) -> Callable[[], None]:
        """Have `hook` told what happens, as frozen records (`pybustcall.telemetry`); return what takes it away again.

        Hooks run one after the other in a thread of their own. One that raises is logged; one that is slow delays no
        call, but misses events once 10,000 are waiting.
        """
        check_hook(hook)
        return (lambda: None) if self._core is None else self._core.hooks.add(hook)

    def reset(self) -> None:
        """Forget every fault: close the breakers, end quarantines, and return to the hub at once, in every loop."""
        for runtime in [] if self._core is None else self._core.runtimes():
            if not runtime.loop.is_closed():
                runtime.loop.call_soon_threadsafe(runtime.fleet.reset)

    @property
    def outbox(self) -> ClientOutbox:
        """The outbox. Raises `ConfigurationError` if the client has none."""
        core = self._core
        if core is None or core.store is None or core.outbox is None:
            raise ConfigurationError("this client has no outbox; give it one with outbox=PATH", setting="outbox")
        return ClientOutbox(core, core.store, core.outbox)

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

        What is cut off then goes to the outbox, if there is one. A cancellation cuts the waiting short, but not the
        closing, and arrives when that is done. Repeating it is harmless. A view closes nothing.
        """
        if not self._owner or self._core is None:
            return
        closing = asyncio.ensure_future(close(self._core))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await reap([closing])
            raise

    async def __aenter__(self) -> Self:
        if self._core is not None:
            async with self._core.sessions.call():
                if self._core.store is not None:
                    await self._core.store.open()  # a file that cannot be used is known now, and not in an outage
                self._core.runtime()  # what an earlier process left in the outbox waits for no first call
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        if self._core is None:
            return "BustcallClient(disabled)"
        state = "closed" if self._core.sessions.closed else "open" if self._core.is_open else "unopened"
        return f"BustcallClient({', '.join(self.daemons)}; {state})"

    def __del__(self) -> None:
        if self._owner and self._core is not None and not self._core.sessions.closed and self._core.is_open:
            told = f"{self!r} was dropped open; use `async with`, or aclose"
            warnings.warn(told, ResourceWarning, stacklevel=2, source=self)
            for runtime in self._core.runtimes():
                runtime.abandon()
        if self._owner and self._core is not None:
            self._core.hooks.close()

    async def _bust_checked(
        self,
        target: object,
        request_of: Callable[[object], BustRequest],
        seconds: float,
        mode: DeliveryMode,
        *,
        wider: bool,
    ) -> BustResult:
        """Bust one of many: a target that cannot be sent becomes a failed result."""
        try:
            request = request_of(target)
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
        key = check_key(None)
        try:
            result = (await self._bust(request, seconds, mode, key=key, wider=wider)).result
        except OutboxError as error:
            result = self._unstored(request, key, error)
        if self._core is not None:
            self._core.digest.tell(result)
        return result

    def _unstored(self, request: BustRequest, key: str, error: OutboxError) -> BustResult:
        """Make the result of a bust that could not be stored."""
        return BustResult(
            target=request.target,
            kind=request.kind,
            namespace=request.namespace,
            soft=request.soft,
            status="failed",
            stage=call_stage(Outcome.FAILED, [] if error.stage is None else [error.stage]),
            attempts=tuple(Attempt(cause.daemon, cause.stage, 0.0, cause) for cause in error.causes),
            key=key,
            note=str(error),
            reveal=self._options.reveal_targets,
        )

    async def _bust(
        self,
        request: BustRequest,
        seconds: float,
        mode: DeliveryMode,
        *,
        key: str,
        write_ahead: bool = False,
        wider: bool = False,
    ) -> Delivered:
        reveal = self._options.reveal_targets
        if self._core is None:
            await asyncio.sleep(0)
            stage = call_stage(Outcome.ACKNOWLEDGED, ())
            result = BustResult(
                request.target,
                _DISABLED,
                stage,
                key=key,
                reveal=reveal,
                kind=request.kind,
                namespace=request.namespace,
                soft=request.soft,
                dry_run=request.dry_run,
            )
            return Delivered(result=result, ending="answered", error=None)
        begun = asyncio.get_running_loop().time()
        job = Job(
            request=request,
            key=key,
            begun=begun,
            deadline=begun + seconds,
            mode=mode,
            retry=self._options.retry,
            write_ahead=write_ahead,
            reveal=reveal,
            wider=wider,
        )
        try:
            async with self._core.sessions.call():
                runtime = self._core.runtime()
                runtime.negotiator.look_again()
                return await runtime.deliverer.bust(job)
        finally:
            # Whatever came of it: what was loaded until now may be of before, and whoever busts reads what he wrote.
            if not request.dry_run and not self._core.near.is_empty:
                self._core.near.busted(_event_of(request))

    async def _use(
        self,
        using: _Using,
        request: BaseModel | None,
        reply: type[_Answer],
        daemon: str | None,
        timeout: float | None,
        doubt: Callable[[_Answer], str] = lambda _: "",
    ) -> _Told[_Answer]:
        """Use an extension at the first daemon that answers and advertises it."""
        core = self._enabled(using.what)
        async with core.sessions.call():
            negotiator = core.runtime().negotiator
            negotiator.look_again()
            asking = negotiator.asking(
                using.capability, using.path, request, reply, doubt=doubt, also=using.also, method=using.method
            )

            async def ask(
                asked: DaemonClient, /, *, until: float, deadline: float, started: Callable[[], None]
            ) -> _Told[_Answer]:
                return _Told(await asking(asked, until=until, deadline=deadline, started=started), asked.url)

            return await self._ask(core, ask, using.what, daemon, timeout, changes=using.changes)

    async def _follow(self, wanted: Wanted, daemon: str | None = None, /) -> Feed:
        """Begin a feed in the running loop."""
        core = self._enabled("following the events")
        async with core.sessions.call():
            return core.runtime().following.begin(wanted, daemon)

    async def _follow_all(self, namespace: str, /) -> Feed:
        """Tell the feed of a whole namespace in the running loop."""
        core = self._enabled("following the events")
        async with core.sessions.call():
            return core.runtime().following.shared(namespace)

    def _enabled(self, what: str) -> Core:
        if self._core is None:
            raise InvalidRequest(f"this client is disabled, and has no answer for {what}; nothing was sent")
        return self._core

    async def _ask(
        self,
        core: Core,
        ask: Ask[DaemonClient, _Reply],
        what: str,
        daemon: str | None,
        timeout: float | None,
        *,
        changes: bool = False,
    ) -> _Reply:
        seconds = self._seconds(timeout)
        daemons = core.daemons if daemon is None else (_find(core, daemon),)
        now = asyncio.get_running_loop().time
        begun = now()
        # What such a call meets speaks neither for nor against a daemon's busts: it goes by a fleet of its own.
        urls = [candidate.url for candidate in daemons]
        fleet = Fleet(urls, Policies(), client_id=core.client_id, now=begun, random=random.random)
        async with core.sessions.call():
            receipt = await dispatch(ask, daemons, fleet, deadline=begun + seconds, retry=None, random=random.random)
        if receipt.reply is None:
            elapsed = now() - begun
            raise failure(what, receipt.ending, receipt.causes, elapsed, changes=changes) from receipt.error
        return receipt.reply

    def _tolerance(self, fault_tolerance: int | None) -> int:
        return self._options.fault_tolerance if fault_tolerance is None else check_tolerance(fault_tolerance)

    def _seconds(self, timeout: float | None) -> float:
        if timeout is None:
            return self._options.timeout
        try:
            return check_seconds(timeout, "timeout")
        except ConfigurationError as error:
            raise InvalidRequest(f"{error}; nothing was sent", field="timeout") from None


async def _follow_nobody(wanted: Wanted) -> Feed:
    return Feed((), wanted, random=random.random)


def _event_of(request: BustRequest) -> BustEvent:
    """Tell a bust of this client as an event."""
    return BustEvent(
        namespace=DEFAULT_NAMESPACE if request.namespace is None else request.namespace,
        kind=request.kind,
        target=request.target,
        soft=request.soft,
        strategy=request.strategy,
    )


def _needed(daemons: int, mode: DeliveryMode) -> int:
    """Tell how many daemons must be followed, so that no bust is acknowledged by the others alone."""
    acknowledging = {"first": 1, "quorum": daemons // 2 + 1, "all": daemons}[mode]
    return daemons - acknowledging + 1


@final
@dataclass(frozen=True, slots=True)
class _Using:
    """An extension that is used: what the call is named in errors, where it is, and whether it changes anything.

    `also` are further capabilities that it takes; `method` is POST with a request and GET without one, if not given.
    """

    what: str
    capability: str
    path: str
    changes: bool = False
    also: tuple[str, ...] = ()
    method: str | None = None


@final
@dataclass(frozen=True, slots=True)
class _Told(Generic[_Answer]):
    """An answer, and the URL of the daemon that gave it."""

    answer: _Answer
    daemon: str


def _find(core: Core, daemon: str) -> DaemonClient:
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
