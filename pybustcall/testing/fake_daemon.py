"""A daemon for tests: in the test's own process, on a real socket, and as ill-behaved as the plan says.

It decides nothing about caches. Without a plan it answers every well-formed bust with success, and passes the same
conformance suite as the reference daemon; with one, each bust takes the next `Answer` from it. What an answer says and
what was done are two things, as in life: `FakeDaemon.applied` and `FakeDaemon.swaps` tell what really had an effect.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, final, get_args

from aiohttp import web
from pydantic import BaseModel, ValidationError

from pybustcall.capabilities import SEMVERX, VERSION, check_requirements, digest_of, unmet
from pybustcall.clock import clock
from pybustcall.errors import ConfigurationError, InvalidVersion
from pybustcall.jobs import MAX_JOBS
from pybustcall.keys import ENCODINGS, covers
from pybustcall.models import (
    DEFAULT_NAMESPACE,
    KINDS,
    MAX_TARGET_BYTES,
    OVER,
    STRATEGIES,
    AnnounceRequest,
    BindingStatus,
    BustReply,
    BustRequest,
    CapabilityDocument,
    CapabilityLimits,
    DependenciesReply,
    DependencyReply,
    FaultRecord,
    ForgetReply,
    ForgetRequest,
    HotSwapReply,
    HotSwapRequest,
    JobReply,
    JobsReply,
    JobState,
    LayerReply,
    Problem,
    RegisterReply,
    RegisterRequest,
    Requirements,
    ResolveReply,
    ResolveRequest,
    StatusReply,
    Swapped,
    Timestamp,
    cache_key_of,
    explain,
)
from pybustcall.semverx import SemverX, SemverXRange, Spec, can_hot_swap
from pybustcall.testing.proxy import loopback_socket

if TYPE_CHECKING:
    import socket as sockets
    import ssl
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import TracebackType

    from multidict import MultiMapping

__all__ = ["Answer", "FakeDaemon", "Space"]

_HISTORY: Final = 64
_IDEMPOTENT: Final = "cache.bust.idempotent"
_REGISTER: Final = "cache.register"
_JOBS: Final = "cache.bust.jobs"
_EVENTS: Final = "events.stream"
_ACCEPTED: Final = 202
_FLAGS: Final = ("soft", "namespace", "dry_run", "verify", "settle")
_KINDS: Final = tuple(f"cache.bust.{kind}" for kind in KINDS if kind != "key")
_STATES: Final = get_args(JobState)
_KEY_HEADER: Final = "Idempotency-Key"
_DIGEST_HEADER: Final = "Bustcall-Capabilities"
_VERSION_HEADER: Final = "Bustcall-Version"
_KEY: Final = re.compile(r"[!-~]{1,255}")
_PROBLEM: Final = "application/problem+json"
_ANY: Final = SemverXRange.parse("*")
_ALWAYS: Final = frozenset({"/api/v1/status", "/api/v1/capabilities", "/api/v1/bindings/capabilities"})
"""What may be asked by clients that do not fit, too."""

_Model = TypeVar("_Model", bound=BaseModel)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How the fake daemon answers one request. The default is the right answer.

    - `status`, `body`, `headers`: of the answer; `body` None means the reply that belongs to the request
    - `delay`: seconds that the work takes: only after them a bust is applied and something is sent
    - `hang`: nothing ever is sent
    - `reset`: the connection is cut before any byte of the answer
    - `cut`: the connection is closed after this many bytes of the body
    - `raw`: these bytes instead of any HTTP, then the connection is closed
    - `miscount`: by how many bytes Content-Length is wrong: above 0 it promises more than comes, below 0 less; then the
      connection is closed
    - `applies`: whether the bust has an effect, though its answer be late, lost or false; None: iff `status` is 200 and
      there is no `raw`, also if the answer is then lost
    - `job`: the name of the job that a bust becomes which is answered with 202; one is made if it is empty
    - `layers`: what the right answer to a bust says of the layers

    Everything can be said with the fields; the class methods save the writing of bodies.
    """

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang: bool = False
    reset: bool = False
    cut: int | None = None
    raw: bytes | None = None
    miscount: int = 0
    applies: bool | None = None
    job: str = ""
    layers: tuple[LayerReply, ...] = ()

    @classmethod
    def accepted(cls, job: str = "", *, layers: Iterable[LayerReply] = ()) -> Answer:
        """Make the answer that a bust is kept as a job: it has its effect once `FakeDaemon.finish` is called for it."""
        return cls(status=202, job=job, layers=tuple(layers))

    @classmethod
    def problem(cls, status: int, detail: str = "as planned", *, retry_after: int | None = None) -> Answer:
        """Make a refusal as a daemon of ours words it, such as 429, 500 or 503 (RFC 9457).

        `retry_after`: what it asks for in a Retry-After header, in seconds.
        """
        headers = {"Content-Type": _PROBLEM}
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        problem = Problem(title="planned", status=status, detail=detail)
        return cls(status=status, body=_dump(problem), headers=headers)

    @classmethod
    def for_another(cls, target: str = "another/target") -> Answer:
        """Make the right answer to another bust: its `cache_key` is that of `target`. The bust has no effect."""
        return cls(body=_reply(BustRequest(target=target)), applies=False)

    @classmethod
    def page(cls, status: int = 200) -> Answer:
        """Make a web page, as of a captive portal or of another server on the port. The bust has no effect."""
        body = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please sign in.</body></html>"
        return cls(status=status, body=body, headers={"Content-Type": "text/html; charset=utf-8"}, applies=False)

    @classmethod
    def huge(cls, size: int = 2 * 1024 * 1024) -> Answer:
        """Make a JSON body of `size` bytes, by default more than a client reads by default."""
        return cls(body=b'{"padding": "' + b"x" * (size - 15) + b'"}')

    @classmethod
    def redirect(cls, location: str, status: int = 307) -> Answer:
        """Make a redirect to `location`. The bust has no effect."""
        return cls(status=status, body=b"", headers={"Location": location})

    @property
    def has_effect(self) -> bool:
        """Whether a bust that is answered so is applied."""
        return self.applies if self.applies is not None else self.status == 200 and self.raw is None


_ACCEPTED_BY_ITSELF: Final = Answer.accepted()


@final
@dataclass(frozen=True, slots=True)
class Space:
    """What the fake daemon holds in one namespace: entries and what they depend on, their tags, and which are stale."""

    entries: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)

    def covered(self, bust: BustRequest) -> set[str]:
        """List what a bust names, and what depends on that, also by way of others, unless it is direct."""
        match bust.kind:
            case "prefix":
                named = {key for key in self.entries if covers(bust.target, key)}
            case "tag":
                named = {key for key, tags in self.tags.items() if bust.target in tags}
            case "all":
                named = set(self.entries)
            case _:
                named = {bust.target}
        return named if bust.strategy == "direct" else named | self.dependents(named | {bust.target})

    def dependents(self, names: Iterable[str]) -> set[str]:
        """List the entries that depend on any of these names, also by way of others."""
        found: set[str] = set()
        front = set(names)
        while front:
            front = {key for key, depends_on in self.entries.items() if front.intersection(depends_on)} - found
            found |= front
        return found

    def drop(self, keys: Iterable[str]) -> int:
        """Drop entries; tell how many there were."""
        gone = [key for key in keys if self.entries.pop(key, None) is not None]
        for key in gone:
            self.tags.pop(key, None)
            self.stale.discard(key)
        return len(gone)


@final
class FakeDaemon:
    """Serves the base protocol on loopback (or on a Unix socket) while its `async with` block lasts.

    - `plan`: what the next busts get, one `Answer` each; more can be added to `plan` at any time
    - `swap_plan`: what the next hot swaps get
    - `socket`: path of a Unix socket to listen on instead
    - `tls`: a server's SSL context, for https
    - `document`: whether it serves /api/v1/capabilities (otherwise only the route of the older daemons)
    - `capabilities`: names that it advertises besides those of the base protocol. It really has these:
      "cache.bust.idempotent" (a bust with the Idempotency-Key of one that succeeded is answered from memory, without
      another effect), "cache.bust.tag", ".prefix", ".all", ".soft", ".namespace", ".dry_run", ".verify", ".settle" and
      ".jobs", "cache.register", "cache.dependencies", "semver.resolve", "cache.hotswap", "events.stream" and
      "daemon.negotiate". Fields of a bust whose capability it does not have it ignores, as an older daemon does;
      one that has some kind refuses the others. With ".jobs", a bust of the strategy "hybrid" is answered with
      202 where no plan says otherwise, and is done once somebody has asked for its job; with ".settle", the
      second bust follows
    - `advertises`: fields of its capability document that are to be others; it may be changed at any time, which shows
      in the digest that every answer carries. What its `requires` says of clients is asked of them
    - `layers`: names of the layers of which its answers to busts tell that they are done there
    - `probe_plan`: what the next questions for its capabilities get, on either route
    - `stream_plan`: what the next readers of its events get: an `Answer`, or the first bytes of a stream that then says
      nothing more; the others get a right one, with a sign of life every `heartbeat` seconds

    `requests` holds every bust that it could read, `headers` the headers of each, `applied` the busts and `swaps` the
    hot swaps that had an effect, in order; `dependencies` and `entries` what it knows of them, which a test may set,
    `space` the same of another namespace; `jobs` the busts that it answered with 202, the oldest first, which `finish`
    moves on; `advertised` every capability document that was sent to it. `connections` is how many connections were
    made to it, `probes` how often it was asked for its capabilities, `followed` the id that each reader of its events
    said it had read last, or None. What is refused takes nothing from a plan.

    `stop` and `start` play a restart: the URL stays, and so does what it counts and remembers.
    """

    def __init__(
        self,
        plan: Iterable[Answer] = (),
        *,
        socket: Path | None = None,
        tls: ssl.SSLContext | None = None,
        document: bool = True,
        capabilities: Iterable[str] = (),
        advertises: Mapping[str, object] | None = None,
        layers: Iterable[str] = (),
        probe_plan: Iterable[Answer] = (),
        swap_plan: Iterable[Answer] = (),
        stream_plan: Iterable[Answer | bytes] = (),
        heartbeat: float = 5.0,
    ) -> None:
        self.plan: deque[Answer] = deque(plan)
        self.probe_plan: deque[Answer] = deque(probe_plan)
        self.swap_plan: deque[Answer] = deque(swap_plan)
        self.stream_plan: deque[Answer | bytes] = deque(stream_plan)
        self.followed: list[str | None] = []
        self.heartbeat = heartbeat
        self.epoch = "fake"
        self.requests: list[BustRequest] = []
        self.headers: list[dict[str, str]] = []
        self.applied: list[BustRequest] = []
        self.swaps: list[HotSwapRequest] = []
        self.dependencies: dict[str, DependencyReply] = {}
        self.jobs: dict[str, JobReply] = {}
        self.advertised: list[CapabilityDocument] = []
        self.probes = 0
        self.advertises: dict[str, object] = dict(advertises or {})
        self.url = ""
        self._capabilities = tuple(capabilities)
        self._layers = tuple(layers)
        self._spaces: dict[str, Space] = {}
        self._accepted: dict[str, BustRequest] = {}
        self._unasked: set[str] = set()  # jobs that are done once somebody has asked for them
        self._second: set[asyncio.TimerHandle] = set()
        self._history: deque[FaultRecord] = deque(maxlen=_HISTORY)
        self._memory: dict[tuple[str, str, str], _Remembered] = {}
        self._clients: dict[str, CapabilityDocument] = {}
        self._told: list[tuple[int, dict[str, Any], frozenset[str]]] = []
        self._last_told = self._forgotten = 0
        self._readers: set[asyncio.Event] = set()
        self._socket = socket
        self._tls = tls
        self._document = document
        self._transports: list[asyncio.Transport] = []
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._kept: sockets.socket | None = None

    @property
    def connections(self) -> int:
        """How many connections brought a request so far."""
        return len(self._transports)

    @property
    def entries(self) -> dict[str, tuple[str, ...]]:
        """The entries of the namespace "default", each with what it depends on."""
        return self.space().entries

    def space(self, namespace: str | None = None) -> Space:
        """Tell what it holds in a namespace; None is "default"."""
        return self._spaces.setdefault(namespace or DEFAULT_NAMESPACE, Space())

    def finish(self, job: str, state: JobState = "done") -> None:
        """Move a job on; a bust has its effect when its job is "done"."""
        ended = Timestamp.of_nanoseconds(time.time_ns()) if state in OVER else None
        removed = self._have_effect(self._accepted[job]) if state == "done" else 0
        self.jobs[job] = self.jobs[job].model_copy(update={"state": state, "ended": ended, "removed": removed})

    def tell(
        self,
        target: str = "*",
        *,
        namespace: str = DEFAULT_NAMESPACE,
        kind: str = "key",
        tags: Iterable[str] = (),
        **more: object,
    ) -> str:
        """Tell the readers of its events of a bust that nobody asked for; return the id.

        `tags` are those of what went, by which readers are chosen, and are not told; `more` are further fields.
        """
        self._last_told += 1
        place = f"{self.epoch}-{self._last_told}"
        said = {
            "namespace": namespace,
            "kind": kind,
            "target": target,
            "soft": False,
            "strategy": "dimensional",
            **more,
        }
        self._told.append((self._last_told, said, frozenset(tags)))
        for reader in self._readers:
            reader.set()
        return place

    def forget_events(self, epoch: str | None = None) -> None:
        """Keep no event for readers that come back, which get a reset then; with an `epoch`, begin another log."""
        self._told.clear()
        self._forgotten = self._last_told
        self.epoch = epoch or self.epoch

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._close()
        finally:
            self._give_up_port()

    async def start(self) -> None:
        """Serve, again at the same URL after a `stop`; without effect while it serves."""
        if self._runner is not None:
            return
        self._released = asyncio.Event()
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site: web.BaseSite
        if self._socket is not None:
            site = web.UnixSite(self._runner, self._socket, ssl_context=self._tls)
            self.url = f"unix://{self._socket}"
        else:
            kept = self._kept or loopback_socket()
            self._kept = None  # the site's own from here on
            self._port = kept.getsockname()[1]
            site = web.SockSite(self._runner, kept, ssl_context=self._tls)
            self.url = f"{'https' if self._tls is not None else 'http'}://127.0.0.1:{self._port}"
        await site.start()

    async def stop(self) -> None:
        """Cut every connection and refuse new ones, as when its process is killed; `start` makes it serve again.

        Whatever still waits for its `delay` has no effect any more. Without effect while it does not serve.
        """
        if self._runner is None:
            return
        await self._close()
        if self._socket is None:
            self._kept = loopback_socket(self._port)

    def forget(self) -> None:
        """Forget every idempotency key, as a daemon that keeps them in its memory does when it is killed."""
        self._memory.clear()

    async def _close(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            self._released.set()
            for reader in self._readers:
                reader.set()
            for timer in self._second:
                timer.cancel()
            self._second.clear()
            self.drop_connections()
            await runner.cleanup()

    def _give_up_port(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024, middlewares=[self._middleware])
        app.add_routes(
            [
                web.post("/api/v1/bust", self._bust),
                web.get("/api/v1/status", self._status),
                web.get("/api/v1/bindings/capabilities", self._tell_bindings),
            ]
        )
        app.on_response_prepare.append(self._sign)
        if self._document:
            app.add_routes([web.get("/api/v1/capabilities", self._tell_document)])
            app.add_routes([web.post("/api/v1/capabilities", self._meet)])
        extensions = {
            _REGISTER: [web.post("/api/v1/entries", self._register)],
            "cache.dependencies": [
                web.post("/api/v1/dependencies", self._announce),
                web.get("/api/v1/dependencies", self._tell_dependencies),
                web.post("/api/v1/dependencies/forget", self._forget),
            ],
            "semver.resolve": [web.post("/api/v1/resolve", self._resolve)],
            "cache.hotswap": [web.post("/api/v1/hotswap", self._swap)],
            _JOBS: [
                web.get("/api/v1/jobs", self._list_jobs),
                web.get("/api/v1/jobs/{job}", self._tell_job),
                web.delete("/api/v1/jobs/{job}", self._cancel_job),
            ],
            _EVENTS: [web.get("/api/v1/events", self._follow)],
        }
        for name, routes in extensions.items():
            if name in self._capabilities:
                app.add_routes(routes)
        return app

    def drop_connections(self) -> None:
        """Cut every connection, as a restart of the daemon would."""
        for transport in self._transports:
            if not transport.is_closing():
                transport.abort()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        transport = request.transport
        if transport is not None and transport not in self._transports:
            self._transports.append(transport)
        try:
            self._check_client(request)
            response: web.StreamResponse = await handler(request)
        except _Refused as refusal:
            self._remember(refusal.problem.detail)
            response = refusal.response()
        except web.HTTPException as refusal:
            response = _Refused(refusal.status, f"{request.method} is not served there").response()
        return response

    async def _read(self, request: web.Request, model: type[_Model]) -> _Model:
        """Return what was sent; raise the refusal of what is none."""
        if request.content_type != "application/json":
            raise _Refused(415, "only application/json is read")
        try:
            return model.model_validate_json(await request.read())
        except ValidationError as error:
            malformed = error.errors(include_url=False)[0]["type"] == "json_invalid"
            name, why = explain(error)
            raise _Refused(400 if malformed else 422, why, field=name) from None

    async def _bust(self, request: web.Request) -> web.StreamResponse:
        bust = await self._read(request, BustRequest)
        key = _key_of(request) if _IDEMPOTENT in self._capabilities else None
        read = self._as_read(bust)
        self.requests.append(bust)
        self.headers.append(dict(request.headers))
        meaning = bust.model_dump(exclude={"binding", "fault_tolerance", "confirm", "reason"})
        apply, finish = partial(self._apply, read), partial(self._word, read)
        asked = _Asked(self.plan, meaning, apply, finish, self._unplanned(read))
        return await self._once(request, None if read.dry_run else key, asked)

    def _unplanned(self, bust: BustRequest) -> Answer:
        """Tell how a bust is answered that no plan is for: the rest of a hybrid one is a job, if there are jobs."""
        is_job = bust.strategy == "hybrid" and _JOBS in self._capabilities and not bust.dry_run
        return _ACCEPTED_BY_ITSELF if is_job else Answer()

    def _as_read(self, bust: BustRequest) -> BustRequest:
        """Leave out what this daemon does not know: it ignores such fields; but a kind only if it knows of none."""
        has_kinds = not set(_KINDS).isdisjoint(self._capabilities)
        if has_kinds and bust.kind != "key" and f"cache.bust.{bust.kind}" not in self._capabilities:
            raise _Refused(422, "is not supported", field="kind")
        told: dict[str, bool] = {
            "kind": f"cache.bust.{bust.kind}" in self._capabilities,
            **{name: f"cache.bust.{name}" in self._capabilities for name in _FLAGS},
        }
        ignored = {name: BustRequest.model_fields[name].default for name, known in told.items() if not known}
        return bust.model_copy(update=ignored)

    def _apply(self, bust: BustRequest, effect: bool) -> bytes:
        """Tell the right answer to a bust, and have its effect if it is to have one."""
        removed = self._have_effect(bust) if effect else 0
        space = self.space(bust.namespace)
        matched = len(space.covered(bust) & space.entries.keys()) if bust.dry_run else None
        return _reply(bust, removed if _REGISTER in self._capabilities else None, matched)

    def _have_effect(self, bust: BustRequest) -> int:
        """Do what a bust asks; tell how many entries went or were marked."""
        if bust.dry_run:
            return 0
        self.applied.append(bust)
        if _EVENTS in self._capabilities:
            self._tell_of(bust)
        if bust.settle:
            self._second.add(asyncio.get_running_loop().call_later(bust.settle, self._reach, bust))
        return self._reach(bust)

    def _tell_of(self, bust: BustRequest) -> None:
        space = self.space(bust.namespace)
        hit = space.covered(bust) & space.entries.keys()
        also = sorted(hit - {bust.target})
        self.tell(
            bust.target,
            namespace=bust.namespace or DEFAULT_NAMESPACE,
            kind=bust.kind,
            tags={tag for key in hit for tag in space.tags.get(key, ())},
            soft=bust.soft,
            strategy=bust.strategy,
            **({"also": also} if also else {}),
        )

    def _reach(self, bust: BustRequest) -> int:
        """Drop or mark what a bust covers now; tell how many entries."""
        space = self.space(bust.namespace)
        covered = space.covered(bust)
        if not bust.soft:
            return space.drop(covered)
        marked = covered & space.entries.keys()
        space.stale.update(marked)
        return len(marked)

    def _word(self, bust: BustRequest, right: bytes, answer: Answer) -> bytes:
        """Tell the right answer as the plan wants it: with layers, or as that of a bust that became a job."""
        reply = BustReply.model_validate_json(right)
        layers = answer.layers or (() if answer.status == _ACCEPTED else self._told_layers(bust, reply))
        reply = reply.model_copy(update={"layers": layers})
        if answer.status == _ACCEPTED:
            job = answer.job or f"job-{len(self.jobs) + 1}"
            self._accepted[job] = bust
            if answer is _ACCEPTED_BY_ITSELF:
                self._unasked.add(job)
            state: JobState = "running" if all(layer.ok for layer in answer.layers) else "waiting"
            self.jobs[job] = JobReply(
                job=job,
                state=state,
                target=bust.target,
                kind=bust.kind,
                strategy=bust.strategy,
                soft=bust.soft,
                namespace=bust.namespace,
                binding=bust.binding,
                reason=bust.reason,
                daemon="fake-daemon",
                at=Timestamp.of_nanoseconds(time.time_ns()),
                layers=answer.layers,
            )
            reply = reply.model_copy(update={"status": "accepted", "job": job, "verified": None})
        return reply.model_dump_json(exclude_defaults=True).encode()

    def _told_layers(self, bust: BustRequest, reply: BustReply) -> tuple[LayerReply, ...]:
        """Tell of the layers, of which the first holds all entries."""
        count = (reply.matched if bust.dry_run else reply.removed) or 0
        settle = bust.settle if bust.settle and not bust.dry_run else None
        return tuple(
            LayerReply(name=name, ok=True, removed=0 if number else count, settle=settle)
            for number, name in enumerate(self._layers)
        )

    # Jobs

    async def _list_jobs(self, request: web.Request) -> web.Response:
        state, before = request.query.get("state"), request.query.get("before")
        limit = request.query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_JOBS):
            raise _Refused(422, f"is a number from 1 to {MAX_JOBS}", field="limit")
        if state not in {None, *_STATES}:
            raise _Refused(422, f"is one of {', '.join(_STATES)}", field="state")
        jobs = list(reversed(self.jobs.values()))
        if before is not None:
            jobs = jobs[[job.job for job in jobs].index(before) + 1 :] if before in self.jobs else []
        wanted = [job for job in jobs if state in {None, job.state}]
        return _ok(JobsReply(jobs=tuple(wanted[: int(limit)])))

    async def _tell_job(self, request: web.Request) -> web.Response:
        job = self._job_of(request)
        if job.job in self._unasked:
            self._unasked.remove(job.job)
            self.finish(job.job)
        return _ok(job)

    async def _cancel_job(self, request: web.Request) -> web.Response:
        job = self._job_of(request)
        self._unasked.discard(job.job)
        if job.state not in OVER:
            self.finish(job.job, "cancelled")
        return _ok(self.jobs[job.job])

    def _job_of(self, request: web.Request) -> JobReply:
        job = self.jobs.get(request.match_info["job"])
        if job is None:
            raise _Refused(404, "there is no such job", kind="urn:bustcall:problem:no-such-job")
        return job

    async def _swap(self, request: web.Request) -> web.StreamResponse:
        swap = await self._read(request, HotSwapRequest)
        key = _key_of(request)
        return await self._once(request, key, _Asked(self.swap_plan, swap.model_dump(), partial(self._replace, swap)))

    def _replace(self, asked: HotSwapRequest, effect: bool) -> bytes:
        """Tell the right answer to a hot swap, and replace what it names if it is to have an effect."""
        swaps = self._judge(asked)
        busted = 0
        if effect:
            for swap in swaps:
                known = self.dependencies[swap.name]
                versions = _sorted({*known.versions, swap.to})
                self.dependencies[swap.name] = known.model_copy(update={"current": swap.to, "versions": versions})
            self.swaps.append(asked)
            busted = self.space().drop(self.space().dependents(swap.name for swap in swaps))
        return _dump(HotSwapReply(committed=True, busted=busted, swaps=swaps))

    def _judge(self, asked: HotSwapRequest) -> tuple[Swapped, ...]:
        """Tell what a hot swap changes; raise its refusal with every reason against it."""
        swaps = []
        names = [item.name for item in asked.swaps]
        against = [f"{name}: is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        for number, item in enumerate(asked.swaps):
            to = _canonical(item.to, f"swaps.{number}.to")
            since = None if item.from_ is None else _canonical(item.from_, f"swaps.{number}.from")
            known = self.dependencies.get(item.name)
            if known is None:
                against.append(f"{item.name}: was not announced")
                continue
            if since not in {None, known.current}:
                against.append(f"{item.name}: the current version is {known.current}, not {since}")
            opted = item.model_dump(include={"allow_experimental", "validated", "migrate", "rollback"})
            verdict = can_hot_swap(known.current, to, **opted)
            against += [] if verdict else [f"{item.name}: {reason}" for reason in verdict.reasons]
            swaps.append(Swapped(name=item.name, from_=known.current, to=to))
        if against:
            kind = "urn:bustcall:problem:swap-refused"
            raise _Refused(409, f"the swap is refused: {against[0]}", kind=kind, unmet=tuple(against))
        return tuple(swaps)

    async def _once(self, request: web.Request, key: str | None, asked: _Asked) -> web.StreamResponse:
        """Do something unless it was done with the same key: repeats wait for the first, and get its answer."""
        if key is None:
            return await self._perform(request, asked, None)
        stopped = self._released
        name = (request.path, request.headers.get("Authorization", ""), key)
        while (known := self._memory.get(name)) is not None:
            if known.meaning != asked.meaning:
                raise _Refused(422, "was used for another request", field=_KEY_HEADER)
            if known.reply is not None:
                answer = self._next(asked.plan)
                await self._work(answer)
                if answer.status == 200 and answer.body is None:
                    answer = replace(answer, status=known.status)
                return await self._answer(request, known.reply, answer, replayed=True)
            await known.ended.wait()
            if stopped.is_set():
                return web.Response()  # to nobody: the connection is cut
        self._memory[name] = known = _Remembered(name, asked.meaning)
        return await self._perform(request, asked, known)

    async def _perform(self, request: web.Request, asked: _Asked, known: _Remembered | None) -> web.StreamResponse:
        """Do it as the plan says, and answer. Nothing happens between its effect and its being remembered."""
        try:
            reply = asked.act(False)  # which refuses what takes nothing from the plan
            answer = asked.plan.popleft() if asked.plan else asked.unplanned
            if await self._work(answer):
                reply = asked.act(answer.has_effect)
                if answer.body is None:
                    reply = asked.word(reply, answer)
                if known is not None and (answer.has_effect or answer.status == _ACCEPTED):
                    known.reply = reply
                    known.status = _ACCEPTED if answer.status == _ACCEPTED else 200
        finally:
            if known is not None:
                self._settle(known)
        return await self._answer(request, reply, answer)

    def _settle(self, known: _Remembered) -> None:
        """Let those go on who wait for the same key; what failed is not remembered, so that one of them runs next."""
        if known.reply is None and self._memory.get(known.name) is known:
            del self._memory[known.name]
        known.ended.set()

    @staticmethod
    def _next(plan: deque[Answer]) -> Answer:
        return plan.popleft() if plan else Answer()

    async def _work(self, answer: Answer) -> bool:
        """Take the time that the work takes; tell whether it was finished before the daemon was stopped."""
        if answer.delay:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), answer.delay)
        return not self._released.is_set()

    async def _answer(
        self, request: web.Request, right: bytes, answer: Answer, *, replayed: bool = False
    ) -> web.StreamResponse:
        """Send what the plan says; `right` is the right answer's body, `replayed` whether it is one from memory."""
        if answer.hang:
            await self._released.wait()
        transport = request.transport
        if transport is None:
            return web.Response()  # to nobody: the client has gone
        if answer.raw is not None:
            transport.write(answer.raw)
            transport.close()
            return web.Response()
        if answer.reset:
            transport.abort()
            return web.Response()
        body = right if answer.body is None else answer.body
        headers = {"Content-Type": "application/json", **answer.headers}
        if replayed and answer.status in {200, _ACCEPTED} and answer.body is None:
            headers["Idempotency-Replayed"] = "true"
        if answer.cut is None and not answer.miscount:
            return web.Response(status=answer.status, body=body, headers=headers)
        told = max(1, len(body) + answer.miscount)
        sent = body[: answer.cut]
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": str(told)})
        await response.prepare(request)
        await response.write(sent[:told])
        transport.write(sent[told:])  # past the server, which keeps to the length that it told
        transport.close()
        return response

    # Entries and dependencies

    async def _register(self, request: web.Request) -> web.Response:
        asked = await self._read(request, RegisterRequest)
        space = self.space(asked.namespace if "cache.bust.namespace" in self._capabilities else None)
        space.entries[asked.key] = asked.depends_on
        space.tags[asked.key] = asked.tags
        return _ok(RegisterReply(cache_key=cache_key_of(asked.key)))

    async def _announce(self, request: web.Request) -> web.Response:
        asked = await self._read(request, AnnounceRequest)
        _check_name(asked.name)
        told = [_canonical(version, f"versions.{number}") for number, version in enumerate(asked.versions)]
        current = None if asked.current is None else _canonical(asked.current, "current")
        known = self.dependencies.get(asked.name)
        if known is None:
            known = DependencyReply(name=asked.name, current=current or str(_ANY.best(told)))
        elif current not in {None, known.current}:
            raise _Refused(409, f"the current version is {known.current}; only a hot swap changes it", field="current")
        versions = _sorted({*known.versions, known.current, *told})
        self.dependencies[asked.name] = known.model_copy(update={"versions": versions})
        return _ok(self.dependencies[asked.name])

    async def _tell_dependencies(self, _: web.Request) -> web.Response:
        return _ok(DependenciesReply(dependencies=tuple(known for _, known in sorted(self.dependencies.items()))))

    async def _forget(self, request: web.Request) -> web.Response:
        asked = await self._read(request, ForgetRequest)
        _check_name(asked.name)
        if asked.name in self.dependencies and self.space().dependents([asked.name]):
            raise _Refused(409, "registered entries depend on it", field="name")
        self.dependencies.pop(asked.name, None)
        return _ok(ForgetReply(name=asked.name))

    async def _resolve(self, request: web.Request) -> web.Response:
        asked = await self._read(request, ResolveRequest)
        try:
            spec = Spec.parse(asked.spec)
        except InvalidVersion as error:
            raise _Refused(422, str(error), field="spec") from None
        known = self.dependencies.get(spec.name)
        best = spec.range.best(known.versions) if known is not None else None
        if best is None:
            raise _Refused(422, "no known version is meant", field="spec", kind="urn:bustcall:problem:unresolved")
        version = str(best)
        return _ok(
            ResolveReply(spec=asked.spec, resolved=f"{spec.name}@{version}", version=version, state=best.state.value)
        )

    # Events

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        after = request.headers.get("Last-Event-ID")
        self.followed.append(after)
        place = self._last_told  # what is told from now on reaches this reader
        plan = self.stream_plan.popleft() if self.stream_plan else None
        if isinstance(plan, Answer):
            await self._work(plan)
            return await self._answer(request, b"", plan)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        released, wake = self._released, asyncio.Event()
        self._readers.add(wake)
        try:
            if plan is not None:
                await response.write(plan)
                await released.wait()
            else:
                await self._tell_on(response, partial(_is_wanted, request.query), after, place, wake)
        except ConnectionError:
            pass  # it has gone
        finally:
            self._readers.discard(wake)
        return response

    async def _tell_on(
        self,
        response: web.StreamResponse,
        is_wanted: Callable[[Mapping[str, Any], frozenset[str]], bool],
        after: str | None,
        place: int,
        wake: asyncio.Event,
    ) -> None:
        """Tell a reader what it has missed, or to forget; that it is live; and what comes, until the daemon stops.

        Without an id to go on from it begins at `place`.
        """
        released = self._released

        def told(seen: int) -> bytes:
            return b"".join(
                _event("bust", f"{self.epoch}-{number}", said)
                for number, said, borne in self._told
                if number > seen and is_wanted(said, borne)
            )

        seen = place
        if after in {f"{self.epoch}-{number}" for number in range(self._forgotten, self._last_told + 1)}:
            seen = int(after.rpartition("-")[2])
        elif after is not None:
            reset = {"reason": "events were missed that are no longer kept"}
            await response.write(_event("reset", f"{self.epoch}-{seen}", reset))
        missed, seen = told(seen), self._last_told
        await response.write(_dated(missed + _event("live", f"{self.epoch}-{seen}", {"heartbeat": self.heartbeat})))
        while not released.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self.heartbeat):
                    await wake.wait()
            wake.clear()
            fresh, seen = told(seen), self._last_told
            await response.write(_dated(fresh or f": heartbeat\nid: {self.epoch}-{seen}\n\n".encode()))

    # Status and capabilities

    async def _status(self, _: web.Request) -> web.Response:
        reply = StatusReply(
            daemon_pid=os.getpid(),
            bindings={"pybustcall": BindingStatus(status="active", version=VERSION)},
            cache_size="0B",
            fault_history=tuple(self._history),
        )
        return _ok(reply)

    def _document_bytes(self) -> bytes:
        names = ("cache.bust", "daemon.capabilities", "daemon.status", *self._capabilities)
        document = CapabilityDocument(
            binding="pybustcall",
            version=VERSION,
            semverx=SEMVERX,
            capabilities=names,
            supported_strategies=STRATEGIES,
            limits=CapabilityLimits(max_target_bytes=MAX_TARGET_BYTES),
            access=dict.fromkeys(names, "public"),
        )
        return json.dumps({**document.model_dump(mode="json"), **self.advertises}).encode()

    async def _sign(self, _request: web.Request, response: web.StreamResponse) -> None:
        """Let every answer carry the digest of the document, if there is one."""
        if self._document:
            response.headers.setdefault(_DIGEST_HEADER, digest_of(self._document_bytes()))

    async def _tell_document(self, request: web.Request) -> web.StreamResponse:
        body = self._document_bytes()
        tag = f'"{digest_of(body)}"'
        if request.headers.get("If-None-Match") == tag and not self.probe_plan:
            self.probes += 1
            return web.Response(status=304, headers={"ETag": tag})
        return await self._tell(request, body, {"ETag": tag})

    async def _tell_bindings(self, request: web.Request) -> web.StreamResponse:
        binding = {
            "binding": "pybustcall",
            "capabilities": ["cache.bust", *self._capabilities],
            "semverx": "v0.1.0",
            "stage": "alpha",
            "p2p_enabled": False,
        }
        return await self._tell(request, json.dumps({"pybustcall": binding}).encode())

    async def _tell(
        self, request: web.Request, right: bytes, headers: Mapping[str, str] | None = None
    ) -> web.StreamResponse:
        self.probes += 1
        answer = self._next(self.probe_plan)
        await self._work(answer)
        return await self._answer(request, right, replace(answer, headers={**(headers or {}), **answer.headers}))

    def _requires(self) -> Requirements:
        """Tell what clients must have; a requirement that cannot be read is none."""
        try:
            return check_requirements(Requirements.model_validate(self.advertises.get("requires", {})))
        except (ValidationError, ConfigurationError):
            return Requirements()

    def _check_client(self, request: web.Request) -> None:
        """Raise the refusal of a client that does not fit, or of one that has yet to say what it can do."""
        requires = self._requires()
        if request.path in _ALWAYS or request.match_info.http_exception is not None:
            return
        version = request.headers.get(_VERSION_HEADER)
        client = self._clients.get(request.headers.get(_DIGEST_HEADER, ""))
        if client is not None or not requires.capabilities:
            _judge_client(requires, version, client.capabilities if client is not None else ())
            return
        _judge_client(Requirements(semverx=requires.semverx), version, ())
        detail = "send your capability document to POST /api/v1/capabilities, then repeat the request"
        raise _Refused(428, detail, kind="urn:bustcall:problem:advertise")

    async def _meet(self, request: web.Request) -> web.Response:
        """Take in what a client can do, and tell what this daemon can."""
        client = await self._read(request, CapabilityDocument)
        self.advertised.append(client)
        self._clients[digest_of(await request.read())] = client
        _judge_client(self._requires(), client.semverx, client.capabilities)
        body = self._document_bytes()
        return web.Response(body=body, content_type="application/json", headers={"ETag": f'"{digest_of(body)}"'})

    def _remember(self, message: str) -> None:
        self._history.append(
            FaultRecord(
                timestamp=Timestamp.of_nanoseconds(time.time_ns()), binding="unknown", fault_stage=4, message=message
            )
        )


@final
class _Refused(Exception):
    """A request is not served: what is answered instead."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        field: str | None = None,
        kind: str = "about:blank",
        unmet: tuple[str, ...] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.problem = Problem(type=kind, title="refused", status=status, detail=detail, field=field, unmet=unmet)
        self._headers = dict(headers or {})

    def response(self) -> web.Response:
        """Make the answer: a problem of RFC 9457."""
        headers = {"Content-Type": _PROBLEM, **self._headers}
        return web.Response(status=self.problem.status, body=_dump(self.problem), headers=headers)


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """Something that may have an effect.

    - `plan`: where its answer is taken from
    - `meaning`: what makes two requests the same one
    - `act`: tells the right answer's body, and has the effect if called with true; may raise a refusal, and does so
      before there is any effect
    - `word`: makes of that body what the plan wants
    - `unplanned`: the answer if the plan is at its end
    """

    plan: deque[Answer]
    meaning: dict[str, object]
    act: Callable[[bool], bytes]
    word: Callable[[bytes, Answer], bytes] = lambda right, _: right
    unplanned: Answer = Answer()


@final
@dataclass(slots=True)
class _Remembered:
    """A request with an idempotency key: what it means, and its reply once it has succeeded."""

    name: tuple[str, str, str]  # the route, whose it is, and the key itself
    meaning: dict[str, object]
    reply: bytes | None = None
    status: int = 200
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def _key_of(request: web.Request) -> str | None:
    """Tell the idempotency key, if there is one; raise the refusal of what cannot be."""
    keys = request.headers.getall(_KEY_HEADER, [])
    if len(keys) > 1 or not all(map(_KEY.fullmatch, keys)):
        raise _Refused(400, "must be one value of 1 to 255 visible ASCII characters", field=_KEY_HEADER)
    return keys[0] if keys else None


def _judge_client(requires: Requirements, version: str | None, capabilities: Iterable[str]) -> None:
    """Raise the refusal of a client that lacks what is required of it."""
    if lacks := unmet(requires, version, tuple(capabilities)):
        raise _Refused(
            426,
            f"this client does not fit: {'; '.join(lacks)}",
            kind="urn:bustcall:problem:incompatible",
            unmet=lacks,
            headers={"Upgrade": "bustcall/1", "Connection": "Upgrade"},
        )


def _check_name(name: str) -> None:
    """Raise the refusal of what is no dependency's name."""
    try:
        Spec(name, _ANY)
    except InvalidVersion as error:
        raise _Refused(422, str(error), field="name") from None


def _canonical(text: str, field: str) -> str:
    """Write a version as all of its spellings are known; raise the refusal of what is none."""
    try:
        return str(SemverX.parse(text))
    except InvalidVersion as error:
        raise _Refused(422, str(error), field=field) from None


def _sorted(versions: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(versions, key=lambda version: (SemverX.parse(version), version)))


def _reply(bust: BustRequest, removed: int | None = None, matched: int | None = None) -> bytes:
    reply = BustReply(
        status="success",
        cache_key=cache_key_of(bust.target),
        delegate="fake-daemon",
        fault_stage=bust.fault_tolerance,
        execution_time_ms=0,
        removed=removed,
        kind=bust.kind if bust.kind != "key" else None,
        namespace=bust.namespace,
        soft=bust.soft or None,
        dry_run=bust.dry_run or None,
        matched=matched,
        verified=(bust.verify and not bust.dry_run) or None,
    )
    return reply.model_dump_json(exclude_defaults=True).encode()


def _is_wanted(query: MultiMapping[str], said: Mapping[str, Any], borne: frozenset[str]) -> bool:
    """Tell whether a reader is to be told of a bust: it may concern something that the reader holds.

    `borne` are the tags of what went.
    """
    prefixes, tags = query.getall("prefix", []), query.getall("tag", [])
    kind, target, wide = said["kind"], said["target"], said["strategy"] != "direct"
    if said["namespace"] != query.get("namespace", DEFAULT_NAMESPACE):
        return False
    if not (prefixes or tags) or kind == "all" or (kind == "tag" and target in tags) or not borne.isdisjoint(tags):
        return True
    keys = [*([] if kind == "tag" else [target]), *said.get("also", ())]
    marks = ("?", *ENCODINGS) if wide else ()
    return any(
        any(covers(prefix, key) or prefix.startswith(tuple(key + mark for mark in marks)) for key in keys)
        or (kind == "prefix" and covers(target, prefix))
        for prefix in prefixes
    )


def _dated(text: bytes) -> bytes:
    """Put into the last event when it was written."""
    return text.removesuffix(b"\n") + f"at: {clock():.3f}\n\n".encode()


def _event(name: str, place: str, said: Mapping[str, object]) -> bytes:
    return f"id: {place}\nevent: {name}\ndata: {json.dumps(said)}\n\n".encode()


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_none=True, by_alias=True).encode()


def _ok(model: BaseModel) -> web.Response:
    return web.Response(body=_dump(model), content_type="application/json")
