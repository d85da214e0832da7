"""A daemon for tests: in the test's own process, on a real socket, and as ill-behaved as the plan says.

It decides nothing about caches. Without a plan it answers every well-formed bust with success, and passes the same
conformance suite as the reference daemon; with one, each bust takes the next `Answer` from it. What an answer says and
what was done are two things, as in life: `FakeDaemon.applied` tells which busts really had an effect.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, final

from aiohttp import web
from pydantic import ValidationError

from pybustcall.capabilities import SEMVERX, VERSION
from pybustcall.models import (
    MAX_TARGET_BYTES,
    STRATEGIES,
    BindingStatus,
    BustReply,
    BustRequest,
    CapabilityDocument,
    CapabilityLimits,
    FaultRecord,
    Problem,
    StatusReply,
    Timestamp,
    cache_key_of,
    explain,
)
from pybustcall.testing.proxy import loopback_socket

if TYPE_CHECKING:
    import socket as sockets
    import ssl
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

__all__ = ["Answer", "FakeDaemon"]

_HISTORY: Final = 64
_IDEMPOTENT: Final = "cache.bust.idempotent"
_KEY_HEADER: Final = "Idempotency-Key"
_KEY: Final = re.compile(r"[!-~]{1,255}")
_PROBLEM: Final = "application/problem+json"


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

    @classmethod
    def problem(cls, status: int, detail: str = "as planned", *, retry_after: int | None = None) -> Answer:
        """Make a refusal as a daemon of ours words it, such as 429, 500 or 503 (RFC 9457).

        `retry_after`: what it asks for in a Retry-After header, in seconds.
        """
        headers = {"Content-Type": _PROBLEM}
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        return cls(status=status, body=_problem_body(status, "planned", detail), headers=headers)

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


@final
class FakeDaemon:
    """Serves the base protocol on loopback (or on a Unix socket) while its `async with` block lasts.

    - `plan`: what the next busts get, one `Answer` each; more can be added to `plan` at any time
    - `socket`: path of a Unix socket to listen on instead
    - `tls`: a server's SSL context, for https
    - `document`: whether it serves /api/v1/capabilities (otherwise only the route of the older daemons)
    - `capabilities`: names that it advertises besides those of the base protocol. "cache.bust.idempotent" it really
      has: a bust with the Idempotency-Key of one that succeeded is answered from memory, without another effect
    - `probe_plan`: what the next questions for its capabilities get, on either route

    `requests` holds every bust that it could read, `headers` the headers of each, `applied` the busts that had an
    effect, in order; `connections` is how many connections were made to it, `probes` how often it was asked for its
    capabilities. A bust that is refused takes nothing from the plan.

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
        probe_plan: Iterable[Answer] = (),
    ) -> None:
        self.plan: deque[Answer] = deque(plan)
        self.probe_plan: deque[Answer] = deque(probe_plan)
        self.requests: list[BustRequest] = []
        self.headers: list[dict[str, str]] = []
        self.applied: list[BustRequest] = []
        self.probes = 0
        self.url = ""
        self._capabilities = tuple(capabilities)
        self._history: deque[FaultRecord] = deque(maxlen=_HISTORY)
        self._memory: dict[tuple[str, str], _Remembered] = {}
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

        Busts that still wait for their `delay` have no effect any more. Without effect while it does not serve.
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
        if self._document:
            app.add_routes([web.get("/api/v1/capabilities", self._tell_document)])
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
            response: web.StreamResponse = await handler(request)
        except web.HTTPException as refusal:
            response = _problem(refusal.status, refusal.reason, f"{request.method} is not served there")
        return response

    async def _bust(self, request: web.Request) -> web.StreamResponse:
        bust = await self._read(request)
        if isinstance(bust, web.Response):
            return bust
        self.requests.append(bust)
        self.headers.append(dict(request.headers))
        if _IDEMPOTENT in self._capabilities and _KEY_HEADER in request.headers:
            return await self._once(request, bust)
        return await self._perform(request, bust, None)

    async def _read(self, request: web.Request) -> BustRequest | web.Response:
        """Return the bust, or the refusal of what is none."""
        if request.content_type != "application/json":
            return self._refuse(415, "only application/json is read")
        try:
            bust = BustRequest.model_validate_json(await request.read())
        except ValidationError as error:
            malformed = error.errors(include_url=False)[0]["type"] == "json_invalid"
            field_, why = explain(error)
            return self._refuse(400 if malformed else 422, why, field_)
        keys = request.headers.getall(_KEY_HEADER, [])
        if _IDEMPOTENT in self._capabilities and (len(keys) > 1 or not all(map(_KEY.fullmatch, keys))):
            return self._refuse(400, "must be one value of 1 to 255 visible ASCII characters", _KEY_HEADER)
        return bust

    async def _once(self, request: web.Request, bust: BustRequest) -> web.StreamResponse:
        """Apply a bust unless one of the same key was: repeats wait for the first, and are answered from memory."""
        stopped = self._released
        key = (request.headers.get("Authorization", ""), request.headers[_KEY_HEADER])
        while (known := self._memory.get(key)) is not None:
            if known.meaning != _meaning(bust):
                return self._refuse(422, "was used for another request", _KEY_HEADER)
            if known.reply is not None:
                answer = self._next(self.plan)
                await self._work(answer)
                return await self._answer(request, known.reply, answer, replayed=True)
            await known.ended.wait()
            if stopped.is_set():
                return web.Response()  # to nobody: the connection is cut
        self._memory[key] = known = _Remembered(key, _meaning(bust))
        return await self._perform(request, bust, known)

    async def _perform(self, request: web.Request, bust: BustRequest, known: _Remembered | None) -> web.StreamResponse:
        """Apply a bust as the plan says, and answer it. Nothing happens between its effect and its being remembered."""
        answer = self._next(self.plan)
        reply = _reply(bust)
        try:
            if await self._work(answer) and answer.has_effect:
                self.applied.append(bust)
                if known is not None:
                    known.reply = reply
        finally:
            if known is not None:
                self._settle(known)
        return await self._answer(request, reply, answer)

    def _settle(self, known: _Remembered) -> None:
        """Let those go on who wait for a bust of the same key; what failed is not remembered, so that one runs next."""
        if known.reply is None and self._memory.get(known.key) is known:
            del self._memory[known.key]
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
        if replayed and answer.status == 200 and answer.body is None:
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

    async def _status(self, _: web.Request) -> web.Response:
        reply = StatusReply(
            daemon_pid=os.getpid(),
            bindings={"pybustcall": BindingStatus(status="active", version=VERSION)},
            cache_size="0B",
            fault_history=tuple(self._history),
        )
        return web.Response(text=reply.model_dump_json(), content_type="application/json")

    async def _tell_document(self, request: web.Request) -> web.StreamResponse:
        document = CapabilityDocument(
            binding="pybustcall",
            version=VERSION,
            semverx=SEMVERX,
            capabilities=("cache.bust", "daemon.capabilities", "daemon.status", *self._capabilities),
            supported_strategies=STRATEGIES,
            limits=CapabilityLimits(max_target_bytes=MAX_TARGET_BYTES),
        )
        return await self._tell(request, document.model_dump_json().encode())

    async def _tell_bindings(self, request: web.Request) -> web.StreamResponse:
        binding = {
            "binding": "pybustcall",
            "capabilities": ["cache.bust", *self._capabilities],
            "semverx": "v0.1.0",
            "stage": "alpha",
            "p2p_enabled": False,
        }
        return await self._tell(request, json.dumps({"pybustcall": binding}).encode())

    async def _tell(self, request: web.Request, right: bytes) -> web.StreamResponse:
        self.probes += 1
        answer = self._next(self.probe_plan)
        await self._work(answer)
        return await self._answer(request, right, answer)

    def _refuse(self, status: int, detail: str, field_: str | None = None) -> web.Response:
        self._history.append(
            FaultRecord(
                timestamp=Timestamp.of_nanoseconds(time.time_ns()), binding="unknown", fault_stage=4, message=detail
            )
        )
        return _problem(status, "refused", detail, field_)


@final
@dataclass(slots=True)
class _Remembered:
    """A bust with an idempotency key: what it means, and its reply once it has succeeded."""

    key: tuple[str, str]  # whose it is, and the key itself
    meaning: dict[str, object]
    reply: bytes | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def _meaning(bust: BustRequest) -> dict[str, object]:
    """Tell what makes two busts the same one: everything but who asks, and what they tolerate."""
    return bust.model_dump(exclude={"binding", "fault_tolerance"})


def _reply(bust: BustRequest) -> bytes:
    reply = BustReply(
        status="success",
        cache_key=cache_key_of(bust.target),
        delegate="fake-daemon",
        fault_stage=bust.fault_tolerance,
        execution_time_ms=0,
    )
    return reply.model_dump_json(exclude_none=True).encode()


def _problem(status: int, title: str, detail: str, field_: str | None = None) -> web.Response:
    return web.Response(
        status=status, body=_problem_body(status, title, detail, field_), headers={"Content-Type": _PROBLEM}
    )


def _problem_body(status: int, title: str, detail: str, field_: str | None = None) -> bytes:
    return Problem(title=title, status=status, detail=detail, field=field_).model_dump_json(exclude_none=True).encode()
