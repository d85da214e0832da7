"""The daemon over HTTP: who is let in, what is well formed, and how every refusal reads.

This module decides the routes, the admission (host, origin, token) and the answers. Listening and draining are
`serving`'s, what a bust removes is the engine's to decide, and whether it was done already is `idempotency`'s. Refusals
are RFC 9457 problems, name the field to mend, and never repeat what was sent.

The order of the questions is fixed: is the daemon draining (503), is it this host (421), is it this origin (403), is
it somebody known (401), does it expect what nobody does (417), is there such a route (404, 405), is it JSON (415) of a
bearable size (413) that came in time (408), does it parse (400), does it say what the route needs (422), is its
idempotency key its own (422), is there room (507). What is no HTTP at all comes before all of them (400).
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, final

from aiohttp import HttpVersion11, web
from pydantic import BaseModel, ValidationError

from pybustcall.capabilities import SEMVERX, VERSION
from pybustcall.daemon.backends import BackendFailure, RefusedKey
from pybustcall.daemon.connections import Connection
from pybustcall.daemon.engine import IndexFull, UnknownStrategy
from pybustcall.daemon.history import FaultHistory
from pybustcall.daemon.idempotency import Idempotency, KeyReused, fingerprint_of, name_of
from pybustcall.daemon.openapi import openapi_document
from pybustcall.errors import ConfigurationError
from pybustcall.faults import CLEAN, TABLE, FaultKind
from pybustcall.models import (
    BINDING,
    MAX_TARGET_BYTES,
    STRATEGIES,
    BindingCapabilities,
    BindingStatus,
    BustRequest,
    CapabilityDocument,
    CapabilityLimits,
    Problem,
    RegisterReply,
    RegisterRequest,
    StatusReply,
    cache_key_of,
    explain,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from aiohttp.typedefs import Handler

    from pybustcall.daemon.engine import Engine

__all__ = ["DAEMON", "DELEGATE", "GRACE", "Daemon", "DaemonSettings", "check_settings", "create_app"]

DELEGATE: Final = "pybustcall-daemon"

_ROUTES: Final[Mapping[str, str]] = {
    "cache.bust": "/api/v1/bust",
    "cache.register": "/api/v1/entries",
    "daemon.status": "/api/v1/status",
    "daemon.capabilities": "/api/v1/capabilities",
}
_IDEMPOTENT: Final = "cache.bust.idempotent"  # a header of busts, not a route
_CAPABILITIES: Final[Mapping[str, str]] = {**_ROUTES, _IDEMPOTENT: _ROUTES["cache.bust"]}
_BINDINGS_ROUTE: Final = "/api/v1/bindings/capabilities"
_OPENAPI_ROUTE: Final = "/openapi.json"
_OPEN_TO_ALL: Final = frozenset({_ROUTES["daemon.capabilities"], _BINDINGS_ROUTE, _OPENAPI_ROUTE})

_REJECTED: Final = TABLE[FaultKind.REJECTED].stage
_DENIED: Final = TABLE[FaultKind.NOT_ALLOWED].stage
_BROKEN: Final = TABLE[FaultKind.SERVER_ERROR].stage

GRACE: Final = 0.25  # seconds for the last bytes of answers, and for handlers to end when cancelled

_VISIBLE: Final = re.compile(r"[!-~]+")
_KEY: Final = re.compile(r"[!-~]{1,255}")
_KEY_HEADER: Final = "Idempotency-Key"
_REPLAYED_HEADER: Final = "Idempotency-Replayed"
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_HOST_HEADER: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(?::[0-9]{1,5})?")
_BINDING_NAME: Final = re.compile(r"[A-Za-z0-9._+@/-]{1,64}")

_log = logging.getLogger("pybustcall.daemon")
_Model = TypeVar("_Model", bound=BaseModel)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """Where the daemon listens, whom it lets in, and how much it takes.

    - `host`, `port`: the address; port 0 lets the system choose
    - `socket`: path of a Unix socket to listen on instead (mode 0600)
    - `token`: asked for as `Authorization: Bearer` on every route but the capabilities; never in the repr
    - `allowed_hosts`: names, beyond IP addresses, localhost and `host`, that a `Host` header may say
    - `max_body_bytes`: of one request
    - `read_timeout`: seconds that the head of a request may take to arrive, and again its body
    - `max_connections`: at once; further ones are closed without an answer
    - `max_entries`: in the registry; a new one beyond it is refused
    - `drain`: seconds that requests under way have to finish when the daemon is told to stop
    - `state`: file in which to remember idempotency keys (mode 0600, this daemon's alone), so that a restarted daemon
      still knows them; without one they are forgotten at the end
    """

    host: str = "127.0.0.1"
    port: int = 8989
    socket: str | os.PathLike[str] | None = None
    token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 65536
    read_timeout: float = 10.0
    max_connections: int = 1000
    max_entries: int = 1_000_000
    drain: float = 10.0
    state: str | os.PathLike[str] | None = None


def check_settings(settings: DaemonSettings) -> None:
    """Raise `ConfigurationError`, naming the setting, if the daemon cannot or must not run with these settings."""
    if settings.token is not None and not _VISIBLE.fullmatch(settings.token):
        raise ConfigurationError(
            "the token must be visible ASCII characters without spaces, and at least one", setting="token"
        )
    if settings.socket is None:
        if type(settings.port) is not int or not 0 <= settings.port <= 65535:
            raise ConfigurationError(f"the port must be 0 to 65535, not {settings.port!r}", setting="port")
        if settings.token is None and not _is_loopback(settings.host):
            raise ConfigurationError(
                f"listening on {settings.host!r} lets other machines in, which needs a token; set one (BUSTCALL_TOKEN),"
                " or listen on 127.0.0.1",
                setting="token",
            )
    for name in settings.allowed_hosts:
        if not _HOST_NAME.fullmatch(name):
            raise ConfigurationError(
                f"allowed host {name!r} is not a host name; give names only, without scheme and port",
                setting="allowed_hosts",
            )
    if settings.max_body_bytes < 1:
        raise ConfigurationError(
            f"the largest body must be 1 byte or more, not {settings.max_body_bytes!r}", setting="max_body_bytes"
        )
    if not 0 < settings.read_timeout < float("inf"):
        raise ConfigurationError(
            f"the time to read a request must be more than 0 seconds, not {settings.read_timeout!r}",
            setting="read_timeout",
        )
    if settings.max_connections < 1:
        raise ConfigurationError(
            f"the most connections must be 1 or more, not {settings.max_connections!r}", setting="max_connections"
        )
    if settings.max_entries < 0:
        raise ConfigurationError(
            f"the most entries must be 0 or more, not {settings.max_entries!r}", setting="max_entries"
        )
    if not 0 <= settings.drain < float("inf"):
        raise ConfigurationError(f"the drain must be 0 seconds or more, not {settings.drain!r}", setting="drain")


def _is_loopback(host: str) -> bool:
    address = _ip_address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


# Refusals


class _Refusal(Exception):
    """A request ends here: what to answer, and at which stage to remember it."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        stage: int = _REJECTED,
        field_name: str | None = None,
        supported: tuple[str, ...] | None = None,
        headers: Mapping[str, str] | None = None,
        binding: str = "unknown",
    ) -> None:
        super().__init__(detail)
        self.stage = stage
        self.binding = binding
        self._headers = headers
        self._problem = Problem(
            title=HTTPStatus(status).phrase, status=status, detail=detail, field=field_name, supported=supported
        )

    def response(self) -> web.Response:
        return web.Response(
            status=self._problem.status,
            body=self._problem.model_dump_json(exclude_none=True).encode(),
            headers=self._headers,
            content_type="application/problem+json",
        )


_DETAILS: Final[Mapping[int, tuple[int, str]]] = {
    404: (_DENIED, "there is no such route; see /api/v1/capabilities for those that there are"),
    405: (_DENIED, "this route does not take this method; the Allow header says which it takes"),
    417: (_REJECTED, "the only expectation that this daemon knows is 100-continue"),
}


def _refusal_of(error: web.HTTPException, most: int) -> _Refusal:
    """Say an exception of aiohttp's in our own words."""
    if error.status == 413:
        return _Refusal(413, f"the body is larger than {most} bytes")
    stage, detail = _DETAILS.get(error.status, (_REJECTED, "the request cannot be served as it is"))
    allow = error.headers.get("Allow")
    return _Refusal(error.status, detail, stage=stage, headers=None if allow is None else {"Allow": allow})


# Admission


def _admit(request: web.Request, settings: DaemonSettings) -> None:
    """Raise the refusal of a request for another host, from another origin or nobody known, or oddly expecting."""
    listener = request.get_extra_info("socket")
    hosts = request.headers.getall("Host", [])
    if listener is None or listener.family != socket.AF_UNIX:
        _admit_host(hosts, settings)
    _admit_origin(request, hosts)
    if settings.token is not None and request.path not in _OPEN_TO_ALL:
        _admit_token(request.headers.getall("Authorization", []), settings.token)
    if _expects(request) not in {None, "100-continue"}:
        stage, detail = _DETAILS[417]
        raise _Refusal(417, detail, stage=stage)


def _admit_host(hosts: list[str], settings: DaemonSettings) -> None:
    found = _HOST_HEADER.fullmatch(hosts[0]) if len(hosts) == 1 else None
    name = found["name"].strip("[]").lower().removesuffix(".") if found else ""
    known = {"localhost", settings.host.lower().removesuffix(".")}
    known.update(host.lower().removesuffix(".") for host in settings.allowed_hosts)
    if not name or (name not in known and _ip_address(name) is None):
        raise _Refusal(
            421,
            "this daemon does not answer for that host; its operator can add it to the allowed hosts",
            stage=_DENIED,
        )


def _admit_origin(request: web.Request, hosts: list[str]) -> None:
    own = {f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")}
    origins = request.headers.getall("Origin", [])
    sites = request.headers.getall("Sec-Fetch-Site", [])
    if any(origin.lower() not in own for origin in origins) or any(
        site.lower() not in {"same-origin", "none"} for site in sites
    ):
        raise _Refusal(403, "pages of other origins may not call this daemon", stage=_DENIED)


def _admit_token(given: list[str], token: str) -> None:
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    same = hmac.compare_digest(value.strip().encode("utf-8", "surrogateescape"), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise _Refusal(
            401,
            "this daemon wants its token, as Authorization: Bearer",
            stage=_DENIED,
            headers={"WWW-Authenticate": "Bearer"},
        )


# Reading


def _expects(request: web.Request) -> str | None:
    """Tell what the request expects before it sends its body; HTTP/1.0 knows nothing of that."""
    return request.headers.get("Expect", "").lower() or None if request.version >= HttpVersion11 else None


async def _expect_later(_request: web.Request) -> None:
    """Leave `Expect` to the guard and to the reading, so that nobody is asked for a body before they are let in."""


async def _say_expectation(request: web.Request, response: web.StreamResponse) -> None:
    """Say aiohttp's refusal of an `Expect` where there is no route, and so no guard, in our own form."""
    if isinstance(response, web.HTTPExpectationFailed):
        request.app[DAEMON].refuse_expectation(request, response)


async def _read_document(request: web.Request, settings: DaemonSettings) -> object:
    """Read the body as JSON. Raises the refusal if it is something else, too large, late or cut off."""
    if request.content_type != "application/json":
        raise _Refusal(415, "the body must be application/json")
    if (request.content_length or 0) > settings.max_body_bytes:
        raise _Refusal(413, f"the body is larger than {settings.max_body_bytes} bytes")
    try:
        async with asyncio.timeout(settings.read_timeout):
            if _expects(request) == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # of the answer proper, nothing was written yet
            body = await request.read()
    except TimeoutError:
        raise _Refusal(
            408, f"the body did not arrive within {settings.read_timeout:g} seconds", headers={"Connection": "close"}
        ) from None
    except web.RequestPayloadError:
        raise _Refusal(400, "the body is not what its headers announce") from None
    return _parse_json(body)


def _parse_json(body: bytes) -> object:
    """Parse JSON, more strictly than the standard library: no field twice, no NaN, no endless nesting."""
    try:
        return json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _Refusal(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _Refusal(400, f"the body is not JSON: {error.msg} ({where})") from None
    except RecursionError:
        raise _Refusal(400, "the body is nested too deep") from None
    except ValueError:
        raise _Refusal(400, "the body has a number that cannot be read") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refusal(400, "the body names a field twice; which of them counts cannot be told")
    return found


def _no_constant(_name: str) -> float:
    raise _Refusal(400, "the body has NaN or Infinity, which JSON does not know")


def _binding_of(document: object) -> str:
    """Tell the binding that a request says, if it can be shown; "unknown" otherwise."""
    said = document.get("binding") if isinstance(document, dict) else None
    return said if isinstance(said, str) and _BINDING_NAME.fullmatch(said) else "unknown"


def _read_key(request: web.Request, binding: str) -> str | None:
    """Read the idempotency key, if there is one. Raises the refusal of one that cannot be."""
    given = request.headers.getall(_KEY_HEADER, [])
    if not given:
        return None
    if len(given) != 1 or not _KEY.fullmatch(given[0]):
        raise _Refusal(
            400,
            f"{_KEY_HEADER} must be there once, with 1 to 255 visible ASCII characters",
            field_name=_KEY_HEADER,
            binding=binding,
        )
    return given[0]


def _validate(model: type[_Model], document: object) -> _Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        name, reason = explain(error)
        detail = reason if name is None or reason.startswith(f"{name} ") else f"{name}: {reason}"
        raise _Refusal(422, detail, field_name=name, binding=_binding_of(document)) from None


# Answering


@final
class Daemon:
    """The routes, and what is under way at them."""

    def __init__(
        self,
        engine: Engine,
        settings: DaemonSettings,
        history: FaultHistory,
        idempotency: Idempotency,
        version: str,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._history = history
        self._idempotency = idempotency
        self._version = version
        self._stopping = asyncio.Event()
        self._quiet = asyncio.Event()
        self._requests = 0
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
            return _Refusal(503, "this daemon is stopping; ask another, or again later", headers=headers).response()
        self._requests += 1
        if request.task not in self._connections:
            self._connections.add(request.task)
            request.task.add_done_callback(self._connections.discard)
        try:
            return await self._answer(request, handler)
        except _Refusal as refusal:
            return self._refuse(refusal)
        finally:
            self._requests -= 1
            if self._requests == 0 and self._stopping.is_set():
                self._quiet.set()

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _admit(request, self._settings)
            return await handler(request)
        except (_Refusal, ConnectionError):
            raise
        except web.HTTPException as error:
            raise _refusal_of(error, self._settings.max_body_bytes) from None
        except Exception:  # noqa: BLE001 - the outermost room: logged in full, told as a problem
            _log.exception("unexpected error while answering %s", request.method)
            raise _Refusal(500, "the daemon failed; its log says why", stage=_BROKEN) from None

    def _refuse(self, refusal: _Refusal) -> web.Response:
        self._history.record(refusal.stage, str(refusal), binding=refusal.binding)
        return refusal.response()

    def refuse_unread(self, status: int) -> web.Response:
        """Make the refusal of what is no request, and remember it."""
        if status < 500:
            return self._refuse(_Refusal(status, "the request is not HTTP as this daemon reads it"))
        return self._refuse(_Refusal(status, "the daemon failed before it could answer", stage=_BROKEN))

    def refuse_expectation(self, request: web.Request, response: web.HTTPExpectationFailed) -> None:
        """Make a problem of aiohttp's own refusal, and remember it."""
        if isinstance(request.protocol, Connection):
            request.protocol.begin(request.content)
            request.protocol.end()
        told = self._refuse(_refusal_of(response, self._settings.max_body_bytes))
        response.body = told.body
        response.headers.update(told.headers)
        response.headers["Content-Length"] = str(told.content_length)

    async def bust(self, request: web.Request) -> web.Response:
        """POST /api/v1/bust."""
        started = time.monotonic()
        document = await _read_document(request, self._settings)
        binding = _binding_of(document)
        key = _read_key(request, binding)
        asked = _validate(BustRequest, document)
        apply = partial(self._bust, asked, binding, started)
        if key is None:
            return _ok(await apply())
        try:
            answer = await self._idempotency.once(name_of(self._settings.token, key), fingerprint_of(asked), apply)
        except KeyReused as error:
            raise _Refusal(422, f"{_KEY_HEADER}: {error}", field_name=_KEY_HEADER, binding=binding) from None
        return _ok(answer.body, {_REPLAYED_HEADER: "true"} if answer.replayed else None)

    async def _bust(self, asked: BustRequest, binding: str, started: float) -> bytes:
        """Have the engine do it; tell the body of the answer."""
        try:
            removal = await self._engine.bust(asked.target, asked.strategy)
        except UnknownStrategy as error:
            raise _Refusal(422, str(error), field_name="strategy", supported=error.supported, binding=binding) from None
        except RefusedKey as error:
            raise _Refusal(422, f"target {error}", field_name="target", binding=binding) from None
        except BackendFailure as error:
            _log.error("a bust was not applied in full: %s", error)
            raise _Refusal(500, f"the bust was not applied in full: {error}", stage=_BROKEN, binding=binding) from None
        return json.dumps(
            {
                "status": "success",
                "cache_key": cache_key_of(asked.target),
                "delegate": DELEGATE,
                "fault_stage": CLEAN,
                "execution_time_ms": int((time.monotonic() - started) * 1000),
                "removed": removal.count,
            }
        ).encode()

    async def register(self, request: web.Request) -> web.Response:
        """POST /api/v1/entries."""
        asked, binding = await self._read(request, RegisterRequest)
        try:
            self._engine.register(asked.key, asked.depends_on, most=self._settings.max_entries)
        except RefusedKey as error:
            raise _Refusal(422, f"key {error}", field_name="key", binding=binding) from None
        except IndexFull as error:
            raise _Refusal(507, str(error), stage=_BROKEN, binding=binding) from None
        return _json(RegisterReply(cache_key=cache_key_of(asked.key)))

    async def status(self, _request: web.Request) -> web.Response:
        """GET /api/v1/status. It answers in trouble too: a size that cannot be told is "unknown"."""
        try:
            size = await self._engine.size_text()
        except BackendFailure as error:
            self._history.record(_BROKEN, str(error))
            size = "unknown"
        return _json(
            StatusReply(
                daemon_pid=os.getpid(),
                bindings={BINDING: BindingStatus(status="active", version=self._version)},
                cache_size=size,
                fault_history=self._history.records(),
            )
        )

    async def capabilities(self, _request: web.Request) -> web.Response:
        """GET /api/v1/capabilities."""
        guarded: Literal["public", "protected"] = "public" if self._settings.token is None else "protected"
        return _json(
            CapabilityDocument(
                binding=BINDING,
                version=self._version,
                semverx=SEMVERX,
                capabilities=tuple(_CAPABILITIES),
                endpoints=dict(_ROUTES),
                supported_strategies=STRATEGIES,
                limits=CapabilityLimits(
                    max_target_bytes=MAX_TARGET_BYTES, max_body_bytes=self._settings.max_body_bytes
                ),
                access={name: "public" if route in _OPEN_TO_ALL else guarded for name, route in _CAPABILITIES.items()},
            )
        )

    async def bindings(self, _request: web.Request) -> web.Response:
        """GET /api/v1/bindings/capabilities, in the form of the existing daemon."""
        entry = BindingCapabilities(
            binding=BINDING, capabilities=tuple(_CAPABILITIES), semverx=SEMVERX, stage="experimental", p2p_enabled=False
        )
        return web.json_response({BINDING: entry.model_dump(mode="json")})

    async def openapi(self, _request: web.Request) -> web.Response:
        """GET /openapi.json: the contract of these routes."""
        return web.json_response(openapi_document())

    async def _read(self, request: web.Request, model: type[_Model]) -> tuple[_Model, str]:
        document = await _read_document(request, self._settings)
        return _validate(model, document), _binding_of(document)

    def stop(self) -> None:
        """Begin to stop; asked a second time, no longer wait for the requests under way."""
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


def _json(model: BaseModel) -> web.Response:
    return _ok(model.model_dump_json(exclude_none=True).encode())


def _ok(body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, headers=headers, content_type="application/json", charset="utf-8")


def _remembering(idempotency: Idempotency) -> Callable[[web.Application], AsyncIterator[None]]:
    """Make the memory part of an application's life: open before its first request, closed after its last."""

    async def context(_app: web.Application) -> AsyncIterator[None]:
        await idempotency.open()
        yield
        await idempotency.close()

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
    version: str | None = None,
) -> web.Application:
    """Make the web application; `serve` runs it, and so does any other runner of aiohttp's.

    - `idempotency`: the memory of keys, opened and closed with the application; by default one in `settings.state`
    - `version`: the installed pybustcall's unless given

    Raises `ConfigurationError` as `check_settings` does. That a file of keys cannot be used is told when it starts.
    """
    check_settings(settings)
    memory = Idempotency(settings.state) if idempotency is None else idempotency
    app = web.Application(middlewares=[_guard], client_max_size=settings.max_body_bytes)
    daemon = Daemon(
        engine,
        settings,
        FaultHistory() if history is None else history,
        memory,
        VERSION if version is None else version,
    )
    app[DAEMON] = daemon
    app.cleanup_ctx.append(_remembering(memory))
    app.on_response_prepare.append(_say_expectation)
    app.router.add_post(_ROUTES["cache.bust"], daemon.bust, expect_handler=_expect_later)
    app.router.add_post(_ROUTES["cache.register"], daemon.register, expect_handler=_expect_later)
    app.router.add_get(_ROUTES["daemon.status"], daemon.status, expect_handler=_expect_later)
    app.router.add_get(_ROUTES["daemon.capabilities"], daemon.capabilities, expect_handler=_expect_later)
    app.router.add_get(_BINDINGS_ROUTE, daemon.bindings, expect_handler=_expect_later)
    app.router.add_get(_OPENAPI_ROUTE, daemon.openapi, expect_handler=_expect_later)
    return app
