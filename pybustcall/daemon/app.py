"""The daemon over HTTP: what is served where, and how every answer reads.

This module decides the routes, what is advertised of them, and the answers. Who is let in is `access`'s to decide, what
is well formed `reading`'s; listening and draining are `serving`'s, what a bust removes is the engine's, when it is done
`jobs`', and whether it was done already is `idempotency`'s. Refusals are RFC 9457 problems, name the field to mend,
and never repeat what was sent.

The order of the questions is fixed: is the daemon draining (503), is it this host (421), is it this origin (403), is
it somebody known (401) who may do this (403), does the client fit (428, 426), does it expect what nobody does (417), is
there such a route (404, 405), is it JSON (415) of a bearable size (413) that came in time (408), does it parse (400),
does it say what the route needs (422), is its idempotency key its own (422), is there room (507). What is no HTTP at
all comes before all of them (400).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Final, TypeVar, cast, final, get_args

from aiohttp import web
from pydantic import BaseModel

from pybustcall.capabilities import SEMVERX, VERSION, digest_of
from pybustcall.daemon.access import (
    DIGEST_HEADER,
    Admission,
    Clients,
    Refusal,
    said_binding,
    tiers_of,
)
from pybustcall.daemon.backends import BackendFailure, RefusedKey
from pybustcall.daemon.connections import Connection
from pybustcall.daemon.dependencies import (
    InUse,
    NotCurrent,
    RegistryFull,
    SwapRefused,
    Unreadable,
    Unresolved,
    named,
    resolved,
)
from pybustcall.daemon.engine import IndexFull, Unsupported
from pybustcall.daemon.events import BustEvent, Events, Interest, TooManyReaders
from pybustcall.daemon.history import FaultHistory
from pybustcall.daemon.idempotency import Idempotency, KeyReused, fingerprint_of, name_of
from pybustcall.daemon.index import TooManyNamespaces
from pybustcall.daemon.jobs import BustCancelled, BustFailed, Jobs, NoSuchJob
from pybustcall.daemon.journal import Journal, JournalFailure, Wish
from pybustcall.daemon.openapi import openapi_document
from pybustcall.daemon.reading import (
    KEY_HEADER,
    binding_of,
    check_expectation,
    parse_json,
    read_body,
    read_key,
    refusal_of,
    validate,
)
from pybustcall.daemon.registry import Registry, RegistryFailure
from pybustcall.daemon.replies import bust_reply, counted_reply, echo_of, job_reply
from pybustcall.daemon.settings import DaemonSettings, check_values
from pybustcall.daemon.swaps import SwapFailed, Swaps
from pybustcall.errors import InvalidRequest
from pybustcall.faults import TABLE, FaultKind
from pybustcall.models import (
    BINDING,
    DEFAULT_NAMESPACE,
    KINDS,
    MAX_TARGET_BYTES,
    STRATEGIES,
    AnnounceRequest,
    BindingCapabilities,
    BindingStatus,
    BustRequest,
    CapabilityDocument,
    CapabilityLimits,
    DependenciesReply,
    DependencyReply,
    ForgetReply,
    ForgetRequest,
    HotSwapRequest,
    JobsReply,
    JobState,
    Progress,
    RegisterReply,
    RegisterRequest,
    ResolveReply,
    ResolveRequest,
    StatusReply,
    cache_key_of,
    check_namespace,
    check_target,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from aiohttp.typedefs import Handler

    from pybustcall.daemon.dependencies import Dependency
    from pybustcall.daemon.engine import Engine
    from pybustcall.daemon.journal import Entry

__all__ = ["DAEMON", "DELEGATE", "GRACE", "ROUTES", "Daemon", "DaemonSettings", "Route", "check_settings", "create_app"]

DELEGATE: Final = "pybustcall-daemon"

_UNRESOLVED: Final = "urn:bustcall:problem:unresolved"
_SWAP_REFUSED: Final = "urn:bustcall:problem:swap-refused"
_CANCELLED: Final = "urn:bustcall:problem:cancelled"
_NO_SUCH_JOB: Final = "urn:bustcall:problem:no-such-job"
_IDEMPOTENT: Final = "cache.bust.idempotent"  # a header of busts and hot swaps, not a route
_ACCEPTED: Final = b'{"status": "accepted"'  # how the body of a bust that is a job begins: see `_bust`
_TIMEOUT_HEADER: Final = "Bustcall-Timeout-Ms"
_OF_KINDS: Final[Mapping[str, str]] = {f"cache.bust.{kind}": kind for kind in KINDS if kind != "key"}
_FOLLOWING: Final = (
    _IDEMPOTENT,
    *_OF_KINDS,
    *(f"cache.bust.{name}" for name in ("dry_run", "namespace", "settle", "soft", "verify")),
)  # fields of a bust
_ALWAYS: Final = frozenset({"daemon.status", "daemon.capabilities", "daemon.negotiate"})  # whatever is required

_REJECTED: Final = TABLE[FaultKind.REJECTED].stage
_DENIED: Final = TABLE[FaultKind.NOT_ALLOWED].stage
_BROKEN: Final = TABLE[FaultKind.SERVER_ERROR].stage

GRACE: Final = 0.25  # seconds for the last bytes of answers, and for handlers to end when cancelled

_MOST_JOBS: Final = 1000  # in one answer
_MOST_WANTED: Final = 100  # prefixes, and again tags, that one reader of events can name
_SLOW: Final = 30.0  # seconds that a reader of events may take nothing in before its connection is closed
_PLACE_HEADER: Final = "Last-Event-ID"
_STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would gather what it is to hand on
}
_UNKNOWN: Final = "unknown"
_QUIET: Final = 10.0  # seconds between two lines of the log about denials, or about a journal that fails

_REPLAYED_HEADER: Final = "Idempotency-Replayed"
_ENTITY_TAG: Final = re.compile(r'(?:W/)?"([^"]*)"')

_log = logging.getLogger("pybustcall.daemon")
_Model = TypeVar("_Model", bound=BaseModel)


def check_settings(settings: DaemonSettings) -> None:
    """Raise `ConfigurationError`, naming the setting, if the daemon cannot or must not run with these settings."""
    check_values(settings, _capabilities())


async def _expect_later(_request: web.Request) -> None:
    """Leave `Expect` to the guard and to the reading, so that nobody is asked for a body before they are let in."""


async def _say_expectation(request: web.Request, response: web.StreamResponse) -> None:
    """Say aiohttp's refusal of an `Expect` where there is no route, and so no guard, in our own form."""
    if isinstance(response, web.HTTPExpectationFailed):
        request.app[DAEMON].refuse_expectation(request, response)


# Answering


@final
class _Seldom:
    """Says whether it is time for one more line of the log that anybody can cause as often as they like."""

    def __init__(self) -> None:
        self._told = float("-inf")
        self._untold = 0

    def due(self) -> str | None:
        """Tell what the line ends with, which is how many were left out before it; None to leave this one out, too."""
        now = asyncio.get_running_loop().time()
        if now - self._told < _QUIET:
            self._untold += 1
            return None
        more = f"; {self._untold} more since the line before" if self._untold else ""
        self._told, self._untold = now, 0
        return more


@final
class Daemon:
    """The routes, and what is under way at them."""

    def __init__(
        self,
        engine: Engine,
        settings: DaemonSettings,
        history: FaultHistory,
        idempotency: Idempotency,
        swaps: Swaps,
        jobs: Jobs,
        events: Events,
        version: str,
    ) -> None:
        self._engine = engine
        self._events = events
        self._swaps = swaps
        self._jobs = jobs
        self._settings = settings
        self._history = history
        self._idempotency = idempotency
        self._version = version
        self._admission = Admission(
            hosts=(settings.host, *settings.allowed_hosts),
            token=settings.token,
            operator_token=settings.operator_token,
            tenants=settings.tenants,
            tiers=tiers_of(_capabilities(), settings.access),
        )
        self._clients = Clients(settings.requires)
        self._usable = tuple(name for name in _capabilities() if self._admission.is_usable(name) and _can(engine, name))
        self._document = self._describe().model_dump_json(exclude_none=True).encode()
        self.digest = digest_of(self._document)
        self._served: dict[web.AbstractRoute, str] = {}
        self._stopping = asyncio.Event()
        self._quiet = asyncio.Event()
        self._requests = 0
        self._denials = _Seldom()
        self._journal_failures = _Seldom()
        self._connections: set[asyncio.Task[None]] = set()

    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Admit, answer, and say every refusal as a problem."""
        connection = request.protocol if isinstance(request.protocol, Connection) else None
        if connection is not None:
            connection.begin(request.content)
        try:
            return await self._guard(request, handler)
        finally:
            if connection is not None:
                connection.end()

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._stopping.is_set():
            headers = {"Retry-After": "1", "Connection": "close"}
            return Refusal(503, "this daemon is stopping; ask another, or again later", headers=headers).response()
        self._requests += 1
        if request.task not in self._connections:
            self._connections.add(request.task)
            request.task.add_done_callback(self._connections.discard)
        try:
            return await self._answer(request, handler)
        except Refusal as refusal:
            return self._refuse(refusal, said_binding(request.headers), self._admission.principal(request).namespace)
        finally:
            self._requests -= 1
            if self._requests == 0 and self._stopping.is_set():
                self._quiet.set()

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            capability = self._served.get(request.match_info.route)
            self._admission.admit(request, capability)
            if capability is not None and capability not in _ALWAYS:
                self._clients.check(request.headers)
            check_expectation(request)
            return await handler(request)
        except (Refusal, ConnectionError):
            raise
        except web.HTTPException as error:
            raise refusal_of(error, self._settings.max_body_bytes) from None
        except Exception:  # noqa: BLE001 - the outermost room: logged in full, told as a problem
            _log.exception("unexpected error while answering %s", request.method)
            raise Refusal(500, "the daemon failed; its log says why", stage=_BROKEN) from None

    def _refuse(self, refusal: Refusal, said: str = "unknown", namespace: str | None = None) -> web.Response:
        """Remember a refusal, of the tenant of a namespace if they asked.

        `said` is the binding that the headers say, which a body may say better.
        """
        if refusal.stage is not None:
            binding = said if refusal.binding == "unknown" else refusal.binding
            self._history.record(
                refusal.stage, str(refusal), binding=binding, denial=refusal.denial, namespace=namespace
            )
            if refusal.denial:
                self._tell_denial(refusal, binding)
        return refusal.response()

    def _tell_denial(self, refusal: Refusal, binding: str) -> None:
        """Log a denial, or only count it if one was logged just now: the next line tells how many there were."""
        if (more := self._denials.due()) is not None:
            _log.warning("%s (asked by %s%s)", refusal, binding, more)

    def refuse_unread(self, status: int) -> web.Response:
        """Make the refusal of what is no request, and remember it."""
        refusal = (
            Refusal(status, "the request is not HTTP as this daemon reads it")
            if status < 500
            else Refusal(status, "the daemon failed before it could answer", stage=_BROKEN)
        )
        response = self._refuse(refusal)
        response.headers[DIGEST_HEADER] = self.digest
        return response

    def refuse_expectation(self, request: web.Request, response: web.HTTPExpectationFailed) -> None:
        """Make a problem of aiohttp's own refusal, and remember it."""
        if isinstance(request.protocol, Connection):
            request.protocol.begin(request.content)
            request.protocol.end()
        told = self._refuse(refusal_of(response, self._settings.max_body_bytes))
        response.body = told.body
        response.headers.update(told.headers)
        response.headers["Content-Length"] = str(told.content_length)

    async def bust(self, request: web.Request) -> web.Response:
        """POST /api/v1/bust."""
        started = time.monotonic()
        document = await self._read_json(request)
        binding = binding_of(document)
        key = read_key(request, binding)
        asked = validate(BustRequest, document)
        namespace = self._namespace(request, asked.namespace, binding)
        who = self._admission.principal(request).name
        apply = partial(self._bust, asked, namespace, binding, who, _within(request), started)
        if key is None or asked.dry_run:
            return _answered(await apply())
        try:
            name = name_of(self._admission.credential(request), key)
            answer = await self._idempotency.once(name, fingerprint_of(asked), apply, self._stands)
        except KeyReused as error:
            raise Refusal(422, f"{KEY_HEADER}: {error}", field_name=KEY_HEADER, binding=binding) from None
        return _answered(answer.body, {_REPLAYED_HEADER: "true"} if answer.replayed else None)

    async def _bust(
        self, asked: BustRequest, namespace: str, binding: str, who: str, within: float | None, started: float
    ) -> bytes:
        """Have it done, or counted; tell the body of the answer."""
        wish = Wish(
            namespace=namespace,
            kind=asked.kind,
            target=asked.target,
            strategy=asked.strategy,
            soft=asked.soft,
            verify=asked.verify,
            settle=asked.settle,
        )
        try:
            if asked.dry_run:
                reply = counted_reply(await self._jobs.count(wish))
            else:
                done = await self._jobs.bust(wish, who=who, binding=binding, reason=asked.reason, within=within)
                self._record_failures(done.entry, binding)
                reply = bust_reply(done.entry, accepted=done.accepted)
        except Unsupported as error:
            supported = error.supported or None
            raise Refusal(422, str(error), field_name=error.field, supported=supported, binding=binding) from None
        except RefusedKey as error:
            raise Refusal(422, f"target {error}", field_name="target", binding=binding) from None
        except JournalFailure as error:
            if (more := self._journal_failures.due()) is not None:
                _log.error("a bust was refused: %s%s", error, more)
            status, advice = (507, "; make room on its disk, and busts are taken again") if error.full else (500, "")
            raise Refusal(status, f"{error}{advice}; nothing was busted", stage=_BROKEN, binding=binding) from None
        except BustFailed as error:
            if asked.dry_run:
                raise Refusal(500, f"{error}; nothing was removed", stage=_BROKEN, binding=binding) from None
            _log.error("a bust was not applied in full: %s", error)
            raise Refusal(500, f"the bust was not applied in full: {error}", stage=_BROKEN, binding=binding) from None
        except BustCancelled as error:
            raise Refusal(409, str(error), kind=_CANCELLED, binding=binding) from None
        return json.dumps(
            {
                "status": reply.pop("status"),
                "cache_key": cache_key_of(asked.target),
                "delegate": DELEGATE,
                "fault_stage": reply.pop("fault_stage"),
                "execution_time_ms": int((time.monotonic() - started) * 1000),
                **echo_of(asked),
                **reply,
            }
        ).encode()

    async def _stands(self, body: bytes) -> bool:
        """Tell whether what was answered to a bust still holds: a job that was cancelled, or has failed, does not."""
        if not body.startswith(_ACCEPTED):
            return True
        try:
            entry, _ = await self._jobs.find(json.loads(body)["job"])
        except NoSuchJob:
            return False
        except JournalFailure:
            return True
        return entry.state not in {"cancelled", "failed"}

    def _namespace(self, request: web.Request, asked: str | None, binding: str) -> str:
        """Tell the namespace that is meant. Raises the refusal of one that may not be used."""
        meant = DEFAULT_NAMESPACE if asked is None else asked
        self._admission.principal(request).check(meant, binding)
        if self._settings.namespaces and meant not in self._settings.namespaces:
            told = "namespace is none of those that this daemon serves" + ("; say which" if asked is None else "")
            raise Refusal(422, told, field_name="namespace", binding=binding)
        return meant

    def _record_failures(self, entry: Entry, binding: str) -> None:
        for layer in entry.layers:
            if not layer.ok and not layer.waits:
                why = f"the layer {layer.name} failed: {layer.error}"
                self._history.record(_BROKEN, why, binding=binding, namespace=entry.wish.namespace)

    async def jobs(self, request: web.Request) -> web.Response:
        """GET /api/v1/jobs: the busts of the journal, the newest first."""
        limit = request.query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= _MOST_JOBS):
            raise Refusal(422, f"limit is a number from 1 to {_MOST_JOBS}", field_name="limit")
        state = request.query.get("state")
        if state is not None and state not in get_args(JobState):
            known = get_args(JobState)
            raise Refusal(422, f"state is one of {', '.join(known)}", field_name="state", supported=known)
        try:
            found = await self._jobs.recent(
                before=request.query.get("before"),
                limit=int(limit),
                state=cast("JobState | None", state),
                namespace=self._admission.principal(request).namespace,
            )
        except NoSuchJob:
            raise Refusal(422, "before names no job that is known here", field_name="before") from None
        except JournalFailure as error:
            raise Refusal(500, str(error), stage=_BROKEN) from None
        return _json(JobsReply(jobs=tuple(job_reply(entry, progress) for entry, progress in found)))

    async def job(self, request: web.Request) -> web.Response:
        """GET /api/v1/jobs/{job}."""
        try:
            return _json(job_reply(*await self._find(request)))
        except NoSuchJob as error:
            raise Refusal(404, str(error), kind=_NO_SUCH_JOB) from None
        except JournalFailure as error:
            raise Refusal(500, str(error), stage=_BROKEN) from None

    async def _find(self, request: web.Request) -> tuple[Entry, Progress]:
        """Tell how the job stands that a request names. Another tenant's is none."""
        found = await self._jobs.find(request.match_info["job"])
        if self._admission.principal(request).namespace not in {None, found[0].wish.namespace}:
            raise NoSuchJob
        return found

    async def cancel(self, request: web.Request) -> web.Response:
        """DELETE /api/v1/jobs/{job}: do no more for it. One that is over is told as it is."""
        try:
            await self._find(request)
            await self._jobs.cancel(request.match_info["job"], who=self._admission.principal(request).name)
            return _json(job_reply(*await self._find(request)))
        except NoSuchJob as error:
            raise Refusal(404, str(error), kind=_NO_SUCH_JOB) from None
        except JournalFailure as error:
            raise Refusal(500, str(error), stage=_BROKEN) from None

    async def events(self, request: web.Request) -> web.StreamResponse:
        """GET /api/v1/events: every bust that is applied, as server-sent events, until either side goes."""
        interest = self._interest(request)
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        if request.method == "HEAD":
            return response
        try:
            reader = self._events.follow(
                interest, after=request.headers.get(_PLACE_HEADER), whose=self._admission.credential(request) or ""
            )
        except TooManyReaders as error:
            headers = {"Retry-After": f"{self._events.heartbeat:.0f}"}
            raise Refusal(429, str(error), headers=headers, stage=None) from None
        try:
            await response.prepare(request)
            async for text in reader:
                async with asyncio.timeout(_SLOW):
                    await response.write(text)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # what it was to read has been dropped for a reset long ago
        except ConnectionError:
            pass  # it is gone, and comes back if it likes
        finally:
            reader.close()
        return response

    def _interest(self, request: web.Request) -> Interest:
        """Tell what a reader wants to be told of. Raises the refusal of what cannot be."""
        query = request.query
        for name, most in (("namespace", 1), ("prefix", _MOST_WANTED), ("tag", _MOST_WANTED)):
            said = query.getall(name, [])
            if len(said) > most:
                raise Refusal(422, f"{name} can be said {most} times at most", field_name=name)
            try:
                for text in said:
                    check_namespace(text) if name == "namespace" else check_target(text, name)
            except InvalidRequest as error:
                detail = str(error).removesuffix("; nothing was sent")
                raise Refusal(422, detail, field_name=name) from None
        namespace = self._namespace(request, query.get("namespace"), said_binding(request.headers))
        return Interest(namespace, frozenset(query.getall("prefix", [])), frozenset(query.getall("tag", [])))

    async def register(self, request: web.Request) -> web.Response:
        """POST /api/v1/entries."""
        asked, binding = await self._read(request, RegisterRequest)
        try:
            self._engine.register(
                asked.key,
                asked.depends_on,
                namespace=self._namespace(request, asked.namespace, binding),
                tags=asked.tags,
                ttl=asked.ttl,
                most=self._settings.max_entries,
            )
        except RefusedKey as error:
            raise Refusal(422, f"key {error}", field_name="key", binding=binding) from None
        except (IndexFull, TooManyNamespaces) as error:
            raise Refusal(507, str(error), stage=_BROKEN, binding=binding) from None
        try:
            await self._swaps.registry.save()
        except RegistryFailure as error:
            raise _told(error, "nothing was registered", binding) from error
        return _json(RegisterReply(cache_key=cache_key_of(asked.key)))

    async def announce(self, request: web.Request) -> web.Response:
        """POST /api/v1/dependencies."""
        asked, binding = await self._read(request, AnnounceRequest)
        try:
            known = await self._swaps.registry.announce(asked)
        except Unreadable as error:
            raise Refusal(422, str(error), field_name=error.field, binding=binding) from None
        except NotCurrent as error:
            raise Refusal(409, str(error), field_name="current", binding=binding) from None
        except (RegistryFull, RegistryFailure) as error:
            raise _told(error, "nothing was announced", binding) from error
        return _json(_reply_of(known))

    async def dependencies(self, _request: web.Request) -> web.Response:
        """GET /api/v1/dependencies."""
        known = self._swaps.registry.dependencies
        return _json(DependenciesReply(dependencies=tuple(_reply_of(known[name]) for name in sorted(known))))

    async def forget(self, request: web.Request) -> web.Response:
        """POST /api/v1/dependencies/forget."""
        asked, binding = await self._read(request, ForgetRequest)
        try:
            await self._swaps.forget(named(asked.name, "name"))
        except Unreadable as error:
            raise Refusal(422, str(error), field_name=error.field, binding=binding) from None
        except InUse as error:
            raise Refusal(409, f"{error}; nothing was forgotten", field_name="name", binding=binding) from None
        except RegistryFailure as error:
            raise _told(error, "nothing was forgotten", binding) from error
        return _json(ForgetReply(name=asked.name))

    async def resolve(self, request: web.Request) -> web.Response:
        """POST /api/v1/resolve."""
        asked, binding = await self._read(request, ResolveRequest)
        try:
            spec, version = resolved(asked.spec, self._swaps.registry.dependencies)
        except Unreadable as error:
            raise Refusal(422, str(error), field_name=error.field, binding=binding) from None
        except Unresolved as error:
            raise Refusal(422, str(error), field_name="spec", kind=_UNRESOLVED, binding=binding) from None
        return _json(
            ResolveReply(
                spec=asked.spec, resolved=f"{spec.name}@{version}", version=str(version), state=version.state.value
            )
        )

    async def hotswap(self, request: web.Request) -> web.Response:
        """POST /api/v1/hotswap."""
        document = await self._read_json(request)
        binding = binding_of(document)
        key = read_key(request, binding)
        asked = validate(HotSwapRequest, document)
        name = None if key is None else name_of(self._admission.credential(request), key)
        try:
            answer = await self._swaps.swap(asked, name)
        except KeyReused as error:
            raise Refusal(422, f"{KEY_HEADER}: {error}", field_name=KEY_HEADER, binding=binding) from None
        except Unreadable as error:
            raise Refusal(422, str(error), field_name=error.field, binding=binding) from None
        except SwapRefused as error:
            raise Refusal(409, str(error), kind=_SWAP_REFUSED, unmet=error.unmet, binding=binding) from None
        except RegistryFailure as error:
            raise _told(error, "no version has changed", binding) from error
        except SwapFailed as error:
            _log.error("a hot swap failed: %s", error)
            raise Refusal(500, str(error), stage=_BROKEN, binding=binding) from None
        return _json(answer.reply, {_REPLAYED_HEADER: "true"} if answer.replayed else None)

    async def status(self, request: web.Request) -> web.Response:
        """GET /api/v1/status. It answers in trouble too: a size that cannot be told is "unknown".

        A tenant is told what concerns them, and not how much all have together.
        """
        tenant = self._admission.principal(request).namespace
        try:
            size = await self._engine.size_text() if tenant is None else _UNKNOWN
        except BackendFailure as error:
            self._history.record(_BROKEN, str(error))
            size = _UNKNOWN
        return _json(
            StatusReply(
                daemon_pid=os.getpid(),
                bindings={BINDING: BindingStatus(status="active", version=self._version)},
                cache_size=size,
                fault_history=self._history.records(tenant),
            )
        )

    async def capabilities(self, request: web.Request) -> web.Response:
        """GET /api/v1/capabilities: the document, or 304 if the client has it."""
        if _has(request.headers.getall("If-None-Match", []), self.digest):
            return web.Response(status=304, headers=self._entity_tag())
        return _ok(self._document, self._entity_tag())

    async def negotiate(self, request: web.Request) -> web.Response:
        """POST /api/v1/capabilities: the client's document, which is checked and remembered, for the daemon's."""
        body = await self._read_body(request)
        self._clients.meet(digest_of(body), validate(CapabilityDocument, parse_json(body)))
        return _ok(self._document, self._entity_tag())

    def _entity_tag(self) -> dict[str, str]:
        return {"ETag": f'"{self.digest}"'}

    def _describe(self) -> CapabilityDocument:
        return CapabilityDocument(
            binding=BINDING,
            version=self._version,
            semverx=SEMVERX,
            capabilities=self._usable,
            endpoints={name: path for name, path in _endpoints().items() if name in self._usable},
            supported_strategies=STRATEGIES,
            requires=self._settings.requires,
            limits=CapabilityLimits(max_target_bytes=MAX_TARGET_BYTES, max_body_bytes=self._settings.max_body_bytes),
            access=self._admission.advertised(),
        )

    async def bindings(self, _request: web.Request) -> web.Response:
        """GET /api/v1/bindings/capabilities, in the form of the existing daemon."""
        entry = BindingCapabilities(
            binding=BINDING, capabilities=self._usable, semverx=SEMVERX, stage="experimental", p2p_enabled=False
        )
        return web.json_response({BINDING: entry.model_dump(mode="json")})

    async def openapi(self, _request: web.Request) -> web.Response:
        """GET /openapi.json: the contract of these routes."""
        return web.json_response(openapi_document())

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Serve what the table of routes says."""
        for route in ROUTES:
            for method in ("GET", "HEAD") if route.method == "GET" else (route.method,):
                answer = MethodType(route.answer, self)
                added = router.add_route(method, route.path, answer, expect_handler=_expect_later)
                self._served[added] = route.capability

    async def _read_body(self, request: web.Request) -> bytes:
        most, patience = self._settings.max_body_bytes, self._settings.read_timeout
        return await read_body(request, most=most, patience=patience)

    async def _read_json(self, request: web.Request) -> object:
        return parse_json(await self._read_body(request))

    async def _read(self, request: web.Request, model: type[_Model]) -> tuple[_Model, str]:
        document = await self._read_json(request)
        return validate(model, document), binding_of(document)

    def stop(self) -> None:
        """Begin to stop; asked a second time, no longer wait for the requests under way."""
        self._events.close()
        if self._stopping.is_set() or self._requests == 0:
            self._quiet.set()
        self._stopping.set()

    async def wait_stopping(self) -> None:
        """Wait until the daemon is told to stop."""
        await self._stopping.wait()

    async def wait_quiet(self) -> None:
        """Wait, at most for the time that the settings allow, until the requests under way have finished."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain):
                await self._quiet.wait()

    async def wait_gone(self) -> None:
        """Wait briefly for the tasks of closed connections."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=GRACE)


DAEMON: Final = web.AppKey("daemon", Daemon)


@final
@dataclass(frozen=True, slots=True)
class Route:
    """One route: what is served there, and which capability it takes to ask for it."""

    method: str
    path: str
    capability: str
    answer: Callable[[Daemon, web.Request], Awaitable[web.StreamResponse]]


ROUTES: Final = (
    Route("POST", "/api/v1/bust", "cache.bust", Daemon.bust),
    Route("GET", "/api/v1/jobs", "cache.bust.jobs", Daemon.jobs),
    Route("GET", "/api/v1/jobs/{job}", "cache.bust.jobs", Daemon.job),
    Route("DELETE", "/api/v1/jobs/{job}", "cache.bust.jobs", Daemon.cancel),
    Route("GET", "/api/v1/events", "events.stream", Daemon.events),
    Route("POST", "/api/v1/entries", "cache.register", Daemon.register),
    Route("POST", "/api/v1/dependencies", "cache.dependencies", Daemon.announce),
    Route("GET", "/api/v1/dependencies", "cache.dependencies", Daemon.dependencies),
    Route("POST", "/api/v1/dependencies/forget", "cache.dependencies", Daemon.forget),
    Route("POST", "/api/v1/resolve", "semver.resolve", Daemon.resolve),
    Route("POST", "/api/v1/hotswap", "cache.hotswap", Daemon.hotswap),
    Route("GET", "/api/v1/status", "daemon.status", Daemon.status),
    Route("GET", "/api/v1/capabilities", "daemon.capabilities", Daemon.capabilities),
    Route("POST", "/api/v1/capabilities", "daemon.negotiate", Daemon.negotiate),
    Route("GET", "/api/v1/bindings/capabilities", "daemon.capabilities", Daemon.bindings),
    Route("GET", "/openapi.json", "daemon.capabilities", Daemon.openapi),
)
"""All that is served: the first route of a capability is its endpoint."""


def _endpoints() -> dict[str, str]:
    """Tell the path of each capability that has a route."""
    return {route.capability: route.path for route in reversed(ROUTES)}


def _capabilities() -> tuple[str, ...]:
    """Tell the names of all capabilities."""
    return tuple(sorted({*_endpoints(), *_FOLLOWING}))


def _can(engine: Engine, name: str) -> bool:
    """Tell whether the engine's layers can do what a capability promises."""
    if name in _OF_KINDS:
        return _OF_KINDS[name] in engine.kinds
    of_all_layers = {
        "cache.bust.dry_run": engine.counts,
        "cache.bust.namespace": engine.namespaces,
        "cache.bust.soft": engine.soft,
    }
    return of_all_layers.get(name, True)


def _within(request: web.Request) -> float | None:
    """Tell how long the caller can wait for an answer: half of what it says it has; None if it says nothing."""
    said = request.headers.get(_TIMEOUT_HEADER, "")
    return int(said) / 2000 if said.isascii() and said.isdigit() and len(said) <= 9 else None


def _answered(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    """Answer a bust: 200 if it is applied, 202 if it is a job, which the body tells, also of a replay."""
    response = _ok(body, headers)
    if body.startswith(_ACCEPTED):
        response.set_status(202)
    return response


def _has(tags: list[str], digest: str) -> bool:
    """Tell whether an If-None-Match names this digest: RFC 9110, 13.1.2, where weak tags count, too."""
    listed = ", ".join(tags)
    return listed.strip() == "*" or digest in _ENTITY_TAG.findall(listed)


async def _say_digest(request: web.Request, response: web.StreamResponse) -> None:
    """Let every answer tell which capability document is in effect."""
    response.headers[DIGEST_HEADER] = request.app[DAEMON].digest


def _json(model: BaseModel, headers: Mapping[str, str] | None = None) -> web.Response:
    return _ok(model.model_dump_json(exclude_none=True, by_alias=True).encode(), headers)


def _ok(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, headers=headers, content_type="application/json", charset="utf-8")


def _reply_of(known: Dependency) -> DependencyReply:
    return DependencyReply(name=known.name, current=known.current, versions=known.versions)


def _told(error: RegistryFull | RegistryFailure, became: str, binding: str) -> Refusal:
    """Say that there is no room, or that the registry fails, and what became of what was asked."""
    full = isinstance(error, RegistryFull) or error.full
    if isinstance(error, RegistryFailure):
        _log.error("%s", error)
    return Refusal(507 if full else 500, f"{error}; {became}", stage=_BROKEN, binding=binding)


async def _busting(jobs: Jobs, swaps: Swaps, events: Events, _app: web.Application) -> AsyncIterator[None]:
    """Open layers, journal and registry, in this order, before anything is busted; close them after the last bust."""
    async with AsyncExitStack() as stack:
        await jobs.prepare()
        stack.push_async_callback(jobs.close)
        events.attach(jobs.journal)
        await swaps.open()
        stack.push_async_callback(swaps.close)
        jobs.start()
        stack.push_async_callback(jobs.finish)
        yield


async def _tell_of_swap(events: Events, journal: Journal, name: str, found: Mapping[str, Sequence[str]]) -> None:
    """Tell of entries that go for the sake of a name, and have that written down: no bust of the journal stands for it.

    If it cannot be, and this process is killed, readers that come back later are not told; the log says that the
    journal fails.
    """
    for namespace, keys in found.items():
        events.tell(BustEvent(namespace=namespace, kind="key", target=name, also=tuple(keys)))
    with suppress(JournalFailure):
        await journal.flush()


def _remembering(memory: Idempotency) -> Callable[[web.Application], AsyncIterator[None]]:
    """Make a memory part of an application's life: open before its first request, closed after its last."""

    async def context(_app: web.Application) -> AsyncIterator[None]:
        await memory.open()
        yield
        await memory.close()

    return context


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    return await request.app[DAEMON].guard(request, handler)


def create_app(
    engine: Engine,
    settings: DaemonSettings,
    *,
    history: FaultHistory | None = None,
    idempotency: Idempotency | None = None,
    swaps: Swaps | None = None,
    jobs: Jobs | None = None,
    events: Events | None = None,
    version: str | None = None,
) -> web.Application:
    """Make the web application; `serve` runs it, and so does any other runner of aiohttp's.

    - `idempotency`: the memory of keys, opened and closed with the application; by default one in `settings.state`
    - `swaps`: the dependencies and their swaps, likewise; by default with a registry in `settings.registry_file`
    - `jobs`: the busts under way, and the layers that they are applied to, likewise; by default with a journal in
      `settings.journal`
    - `events`: the log of what was busted, and those who follow it; it goes on with what the journal has
    - `version`: the installed pybustcall's unless given

    Raises `ConfigurationError` as `check_settings` does. That a file cannot be used is told when it starts.
    """
    check_settings(settings)
    memory = Idempotency(settings.state) if idempotency is None else idempotency
    hot = Swaps(engine, Registry(settings.registry_file)) if swaps is None else swaps
    past = FaultHistory() if history is None else history
    if jobs is None:
        journal = Journal(settings.journal, retention=settings.journal_retention, most=settings.journal_most)
        jobs = Jobs(engine, journal, daemon=_name_of(settings), answer_within=settings.answer_within)
    jobs.save = hot.registry.try_save
    if events is None:
        events = Events(
            most=settings.events_most, most_readers=settings.max_readers, heartbeat=settings.events_heartbeat
        )
    jobs.tell = events.tell
    hot.tell = partial(_tell_of_swap, events, jobs.journal)
    app = web.Application(middlewares=[_guard], client_max_size=settings.max_body_bytes)
    daemon = Daemon(
        engine,
        settings,
        past,
        memory,
        hot,
        jobs,
        events,
        VERSION if version is None else version,
    )
    app[DAEMON] = daemon
    app.cleanup_ctx.append(_remembering(memory))
    app.cleanup_ctx.append(partial(_busting, jobs, hot, events))
    app.on_startup.append(partial(_remember_faults, past, jobs.journal))
    app.on_response_prepare.append(_say_expectation)
    app.on_response_prepare.append(_say_digest)
    daemon.add_routes(app.router)
    return app


def _name_of(settings: DaemonSettings) -> str:
    """Tell the name of a daemon in its audit: where it listens, on which machine."""
    where = f"{settings.host}:{settings.port}" if settings.socket is None else os.fspath(settings.socket)
    return f"{socket.gethostname()} {where}"


async def _remember_faults(history: FaultHistory, journal: Journal, _app: web.Application) -> None:
    """Go on with the faults of the process before this one."""
    history.attach(journal)
