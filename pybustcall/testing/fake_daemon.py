"""A daemon for tests: in the test's own process, on a real socket, and as ill-behaved as the plan says.

It decides nothing about caches. Without a plan it answers every well-formed bust with success, and passes the same
conformance suite as the reference daemon; with one, each bust takes the next `Answer` from it.
"""

from __future__ import annotations

import asyncio
import os
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

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

__all__ = ["Answer", "FakeDaemon"]

_HISTORY: Final = 64


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How the fake daemon answers one bust. The default is the right answer.

    - `status`, `body`, `headers`: of the answer; `body` None means the reply that belongs to the request
    - `delay`: seconds before anything is sent; `hang`: nothing ever is
    - `reset`: the connection is cut before any byte of the answer
    - `cut`: the connection is closed after this many bytes of the body
    - `raw`: these bytes instead of any HTTP, then the connection is closed
    """

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang: bool = False
    reset: bool = False
    cut: int | None = None
    raw: bytes | None = None


@final
class FakeDaemon:
    """Serves the base protocol on loopback (or on a Unix socket) while its `async with` block lasts.

    - `plan`: what the next busts get, one `Answer` each; more can be added to `plan` at any time
    - `socket`: path of a Unix socket to listen on instead
    - `tls`: a server's SSL context, for https
    - `document`: whether it serves /api/v1/capabilities (otherwise only the route of the older daemons)

    `requests` holds every bust that it could read, `headers` the headers of each, `connections` how many connections
    were made to it.
    """

    def __init__(
        self,
        plan: Iterable[Answer] = (),
        *,
        socket: Path | None = None,
        tls: ssl.SSLContext | None = None,
        document: bool = True,
    ) -> None:
        self.plan: deque[Answer] = deque(plan)
        self.requests: list[BustRequest] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._history: deque[FaultRecord] = deque(maxlen=_HISTORY)
        self._socket = socket
        self._tls = tls
        self._transports: list[asyncio.BaseTransport] = []
        self._released = asyncio.Event()
        app = web.Application(client_max_size=64 * 1024, middlewares=[self._middleware])
        app.add_routes(
            [
                web.post("/api/v1/bust", self._bust),
                web.get("/api/v1/status", self._status),
                web.get("/api/v1/bindings/capabilities", self._bindings),
            ]
        )
        if document:
            app.add_routes([web.get("/api/v1/capabilities", self._capabilities)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    @property
    def connections(self) -> int:
        """How many connections brought a request so far."""
        return len(self._transports)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site: web.BaseSite
        if self._socket is not None:
            site = web.UnixSite(self._runner, self._socket, ssl_context=self._tls)
            await site.start()
            self.url = f"unix://{self._socket}"
        else:
            site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
            await site.start()
            port = self._runner.addresses[0][1]
            self.url = f"{'https' if self._tls is not None else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        self.drop_connections()
        await self._runner.cleanup()

    def drop_connections(self) -> None:
        """Cut every connection, as a restart of the daemon would."""
        for transport in self._transports:
            if isinstance(transport, asyncio.Transport) and not transport.is_closing():
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
        if request.content_type != "application/json":
            return self._refuse(415, "only application/json is read")
        try:
            bust = BustRequest.model_validate_json(await request.read())
        except ValidationError as error:
            malformed = error.errors(include_url=False)[0]["type"] == "json_invalid"
            field_, why = explain(error)
            return self._refuse(400 if malformed else 422, why, field_)
        self.requests.append(bust)
        self.headers.append(dict(request.headers))
        return await self._answer(request, bust, self.plan.popleft() if self.plan else Answer())

    async def _answer(self, request: web.Request, bust: BustRequest, answer: Answer) -> web.StreamResponse:
        transport = request.transport
        if answer.hang or answer.delay:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), None if answer.hang else answer.delay)
        if isinstance(transport, asyncio.Transport) and (answer.reset or answer.raw is not None):
            if answer.raw is not None:
                transport.write(answer.raw)
                transport.close()
            else:
                transport.abort()
            return web.Response()
        body = _reply(bust) if answer.body is None else answer.body
        headers = {"Content-Type": "application/json", **answer.headers}
        if answer.cut is None:
            return web.Response(status=answer.status, body=body, headers=headers)
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: answer.cut])
        if transport is not None:
            transport.close()
        return response

    async def _status(self, _: web.Request) -> web.Response:
        reply = StatusReply(
            daemon_pid=os.getpid(),
            bindings={"pybustcall": BindingStatus(status="active", version=VERSION)},
            cache_size="0B",
            fault_history=tuple(self._history),
        )
        return _json(reply.model_dump_json())

    async def _capabilities(self, _: web.Request) -> web.Response:
        document = CapabilityDocument(
            binding="pybustcall",
            version=VERSION,
            semverx=SEMVERX,
            capabilities=("cache.bust", "daemon.capabilities", "daemon.status"),
            supported_strategies=STRATEGIES,
            limits=CapabilityLimits(max_target_bytes=MAX_TARGET_BYTES),
        )
        return _json(document.model_dump_json())

    async def _bindings(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "pybustcall": {
                    "binding": "pybustcall",
                    "capabilities": ["cache.bust"],
                    "semverx": "v0.1.0",
                    "stage": "alpha",
                    "p2p_enabled": False,
                }
            }
        )

    def _refuse(self, status: int, detail: str, field_: str | None = None) -> web.Response:
        self._history.append(
            FaultRecord(
                timestamp=Timestamp.of_nanoseconds(time.time_ns()), binding="unknown", fault_stage=4, message=detail
            )
        )
        return _problem(status, "refused", detail, field_)


def _reply(bust: BustRequest) -> bytes:
    reply = BustReply(
        status="success",
        cache_key=cache_key_of(bust.target),
        delegate="fake-daemon",
        fault_stage=bust.fault_tolerance,
        execution_time_ms=0,
    )
    return reply.model_dump_json(exclude_none=True).encode()


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json")


def _problem(status: int, title: str, detail: str, field_: str | None = None) -> web.Response:
    problem = Problem(title=title, status=status, detail=detail, field=field_)
    return web.Response(
        status=status, text=problem.model_dump_json(exclude_none=True), content_type="application/problem+json"
    )
