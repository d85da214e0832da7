"""One daemon over HTTP: what is sent, what is read, and what a failure is called.

This is the one place where foreign errors become ours: whatever aiohttp, the network, TLS or a strange server can do
leaves here as `AttemptFailed` with a `Fault`, or not at all. Cancellation passes untouched. Which daemon to ask, and
how often, is `dispatcher`'s affair.
"""

from __future__ import annotations

import asyncio
import html
import json
import math
import os
import re
import socket
import ssl
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import partial
from time import time
from typing import TYPE_CHECKING, Final, TypeVar, final
from urllib.parse import quote, quote_plus

import aiohttp
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pybustcall.capabilities import SEMVERX, DaemonCapabilities, advertised_digest, advertisement_bytes, digest_of
from pybustcall.errors import BustcallError, SlotTimeout
from pybustcall.faults import AttemptFailed, Fault, FaultKind, kind_of_status
from pybustcall.models import (
    BINDING,
    BindingCapabilities,
    BustReply,
    CapabilityDocument,
    DaemonStatus,
    Problem,
    StatusReply,
    explain,
    redact,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping

    from pybustcall.errors import Applied
    from pybustcall.models import BustRequest, LayerReply
    from pybustcall.session import Lease, SessionManager
    from pybustcall.topology import DaemonAddress

__all__ = ["MAX_REPLY_BYTES", "DaemonClient", "hide"]

MAX_REPLY_BYTES: Final = 1024 * 1024
"""How much of a reply is read by default; a longer one is a protocol violation."""

_MAX_ERROR_BYTES: Final = 4096
_MAX_PROBLEM_BYTES: Final = 65536  # a refused hot swap gives its reasons, at least one for each of 64 names
_MAX_MESSAGE: Final = 300
_MAX_REASONS: Final = 256
_TELLING: Final = 4  # characters from which a target or a token is worth hiding, and not just part of any sentence
_BUST: Final = "/api/v1/bust"
_STATUS: Final = "/api/v1/status"
_CAPABILITIES: Final = "/api/v1/capabilities"
_BINDINGS: Final = "/api/v1/bindings/capabilities"
_DIGEST_HEADER: Final = "Bustcall-Capabilities"
_BINDINGS_MAP: Final = TypeAdapter(dict[str, BindingCapabilities], config=ConfigDict(hide_input_in_errors=True))
_NO_SUCH_ROUTE: Final = frozenset({404, 405, 410, 501})
_ACCEPTED: Final = 202
_NO_ROOM: Final = 507  # by our daemon, which changes nothing then
_CANCELLED: Final = "urn:bustcall:problem:cancelled"  # a bust that was under way
_NO_SUCH_JOB: Final = "urn:bustcall:problem:no-such-job"
_JSON: Final = "application/json"
_STREAM: Final = "text/event-stream"

_Model = TypeVar("_Model", bound=BaseModel)


@final
@dataclass(frozen=True, slots=True)
class _Answer:
    """The status and the bounded body of one HTTP answer.

    `resent`: a request that changes something was sent before, on a used connection that broke: it may have been done.
    """

    status: int
    content_type: str
    retry_after: float | None
    body: bytes
    etag: str | None = None
    digest: str | None = None
    resent: bool = False


class _TooLarge(Exception):
    """A body went over its limit."""


@final
class DaemonClient:
    """Speaks the daemon protocol with one daemon.

    - `address`: where it listens
    - `sessions`: lends the connections
    - `token`: sent as a bearer token, or None
    - `max_reply_bytes`: how much of a reply is read
    - `heard`: is told, of every answer, the daemon's URL and the digest of its capability document, if it says it

    Every method takes `until`, an absolute time of the running loop's clock at which the attempt is given up, and
    `deadline`, the one of the whole call, which is told to the daemon. Every failure is an `AttemptFailed`.
    """

    def __init__(
        self,
        address: DaemonAddress,
        sessions: SessionManager,
        *,
        token: str | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        heard: Callable[[str, str | None], object] = lambda _url, _digest: None,
    ) -> None:
        self.address = address
        self._sessions = sessions
        self._limit = max_reply_bytes
        self._heard = heard
        self._headers = {
            "Accept": f"{_JSON}, application/problem+json",
            "Accept-Encoding": "identity",
            "Bustcall-Binding": BINDING,
            "Bustcall-Version": SEMVERX,
            _DIGEST_HEADER: advertised_digest(),
        }
        self._token = token
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    @property
    def url(self) -> str:
        """The daemon's URL, which names it in results and errors."""
        return self.address.url

    def __repr__(self) -> str:
        return f"DaemonClient({self.url})"

    async def bust(
        self,
        request: BustRequest,
        *,
        until: float,
        deadline: float,
        key: str | None = None,
        started: Callable[[], None] | None = None,
    ) -> BustReply:
        """Ask the daemon to bust; return its reply, which is checked to be to just this request.

        It may say that the bust is accepted, and not applied everywhere yet. `key` is sent as Idempotency-Key;
        `started` is called when the request has its slot and begins.
        """
        with self._redacting(request.target):
            answer = await self._exchange("POST", _BUST, until, deadline, body=request.wire(), key=key, started=started)
            if answer.status != _ACCEPTED:
                self._expect_success(answer)
            reply = self._read(BustReply, answer)
            if doubt := _doubt(request, reply, answer.status):
                raise self._failed(FaultKind.MALFORMED, doubt, "maybe", answer)
            return self._clean_reply(reply, request.target) if reply.layers or reply.job is not None else reply

    async def status(self, *, until: float, deadline: float, started: Callable[[], None] | None = None) -> DaemonStatus:
        """Ask how the daemon is."""
        with self._redacting():
            answer = await self._exchange("GET", _STATUS, until, deadline, started=started)
            self._expect_success(answer)
            return DaemonStatus.model_construct(daemon=self.url, **dict(self._read(StatusReply, answer)))

    async def capabilities(
        self,
        *,
        until: float,
        deadline: float,
        known: DaemonCapabilities | None = None,
        started: Callable[[], None] | None = None,
    ) -> DaemonCapabilities:
        """Ask what the daemon can do, on either route; a daemon with neither is taken as base-only.

        `known` is what was known before: it is returned if that is still so.
        """
        found = await self.document(until=until, deadline=deadline, known=known, started=started)
        if not found.base_only:
            return found
        with self._redacting():
            answer = await self._exchange("GET", _BINDINGS, until, deadline)
            if answer.status in _NO_SUCH_ROUTE:
                return found
            self._expect_success(answer)
            try:
                return DaemonCapabilities(self.url, bindings=_BINDINGS_MAP.validate_json(answer.body))
            except ValidationError as error:
                raise self._malformed(answer, error) from error

    async def document(
        self,
        *,
        until: float,
        deadline: float,
        known: DaemonCapabilities | None = None,
        started: Callable[[], None] | None = None,
    ) -> DaemonCapabilities:
        """Ask for the capability document alone, cheaply if `known` is still the same; one without is base-only."""
        with self._redacting():
            asking = {"If-None-Match": known.etag} if known is not None and known.etag is not None else {}
            answer = await self._exchange("GET", _CAPABILITIES, until, deadline, headers=asking, started=started)
            if answer.status == 304 and known is not None:
                return known
            if answer.status in _NO_SUCH_ROUTE:
                return DaemonCapabilities(self.url)
            return self._document_of(answer)

    async def advertise(self, *, until: float, deadline: float) -> DaemonCapabilities:
        """Tell the daemon what this client can do; return what the daemon can, if it finds that the two fit."""
        with self._redacting():
            answer = await self._exchange("POST", _CAPABILITIES, until, deadline, body=advertisement_bytes())
            return self._document_of(answer)

    async def use(
        self,
        path: str,
        request: BaseModel | None,
        reply: type[_Model],
        *,
        until: float,
        deadline: float,
        key: str | None = None,
        started: Callable[[], None] | None = None,
        method: str | None = None,
    ) -> _Model:
        """Send a request of an extension, or only ask if there is none; return the reply.

        `key` is sent as Idempotency-Key; `method` is by default POST with a request, and GET without one. A DELETE may
        be sent twice, where a connection breaks.
        """
        with self._redacting():
            body = None
            if request is not None:
                body = request.model_dump_json(by_alias=True, exclude_none=True, exclude_unset=True).encode()
            method = method or ("GET" if body is None else "POST")
            answer = await self._exchange(method, path, until, deadline, body=body, key=key, started=started)
            self._expect_success(answer)
            return self._read(reply, answer)

    @asynccontextmanager
    async def follow(
        self, path: str, *, after: str | None, until: float
    ) -> AsyncIterator[Callable[[], Awaitable[bytes]]]:
        """Open a stream of events; tell what reads the next bytes of it, and none at its end.

        - `after`: the id of the event that was read last, or None
        - `until`: when opening it is given up; reading takes as long as it takes

        It takes no slot of the pool, and is closed at the end of the block.
        """
        with self._redacting():
            async with self._sessions.stream(self.address) as lease:
                response = await self._begin_stream(lease, path, after, until)
                try:
                    await self._check_stream(response, until)
                    yield partial(self._read_on, response)
                finally:
                    response.close()

    async def _begin_stream(self, lease: Lease, path: str, after: str | None, until: float) -> aiohttp.ClientResponse:
        headers = {**self._headers, "Accept": f"{_STREAM}, application/problem+json"}
        if after is not None:
            headers["Last-Event-ID"] = after
        try:
            async with asyncio.timeout_at(until):
                return await lease.session.get(
                    lease.url(path),
                    headers=headers,
                    allow_redirects=False,
                    raise_for_status=False,
                    timeout=self._sessions.request_timeout,
                )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            connected = lease.exchange.connected if lease.notes else not _before_sending(error)
            kind, message = _classify(error, connected=connected)
            failed = self._failed(kind, message, "no")
            if not isinstance(error, aiohttp.ClientResponseError):
                raise failed from error
        raise failed  # outside, since such an error holds the request's headers, as in `_exchange`

    async def _check_stream(self, response: aiohttp.ClientResponse, until: float) -> None:
        """Raise `AttemptFailed` unless what answers is a stream of events."""
        self._heard(self.url, response.headers.get(_DIGEST_HEADER))
        answer = _Answer(
            status=response.status,
            content_type=response.headers.get("Content-Type", ""),
            retry_after=_seconds(response.headers.get("Retry-After")),
            body=b"",
        )
        if response.status == 200 and response.content_type == _STREAM:
            return
        if response.status != 200:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):  # what it says beyond its status is not needed
                async with asyncio.timeout_at(until):
                    answer = replace(answer, body=await _read_bounded(response, _MAX_PROBLEM_BYTES, truncate=True))
            self._expect_success(answer)
        told = f"its answer is {response.content_type or 'untyped'}, and no stream of events"
        raise self._failed(FaultKind.MALFORMED, told, "no", answer)

    async def _read_on(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            return await response.content.readany()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            kind, message = _classify(error, connected=True)
            raise self._failed(kind, message, "no") from error

    def _document_of(self, answer: _Answer) -> DaemonCapabilities:
        self._expect_success(answer)
        document = self._read(CapabilityDocument, answer)
        digest = answer.digest or digest_of(answer.body)
        return DaemonCapabilities(self.url, document=document, digest=digest, etag=answer.etag)

    @contextmanager
    def _redacting(self, target: str | None = None) -> Iterator[None]:
        """See that no fault that leaves tells the token or the target, whatever a daemon repeated; cut its text."""
        try:
            yield
        except AttemptFailed as failed:
            fault = failed.fault
            unmet = tuple(self._clean(reason, target) for reason in fault.unmet[:_MAX_REASONS])
            failed.fault = replace(fault, message=self._clean(fault.message, target), unmet=unmet)
            failed.args = (str(failed.fault),)
            raise

    def _clean_reply(self, reply: BustReply, target: str) -> BustReply:
        """Let nothing pass that is shown to people and tells the target or the token."""
        changes: dict[str, object] = {}
        layers = tuple(self._clean_layer(layer, target) for layer in reply.layers)
        if any(clean is not layer for clean, layer in zip(layers, reply.layers, strict=True)):
            changes["layers"] = layers
        if reply.job is not None and (job := self._clean(reply.job, None)) != reply.job:
            changes["job"] = job
        return reply.model_copy(update=changes) if changes else reply

    def _clean_layer(self, layer: LayerReply, target: str) -> LayerReply:
        name = self._clean(layer.name, None)
        error = None if layer.error is None else self._clean(layer.error, target)
        if (name, error) == (layer.name, layer.error):
            return layer
        return layer.model_copy(update={"name": name, "error": error})

    def _clean(self, text: str, target: str | None) -> str:
        if self._token is not None:
            text = hide(text, self._token, "***")
        if target is not None:
            text = hide(text, target, redact(target))
        if not text.isprintable():
            text = "".join(character if character.isprintable() else "?" for character in text)
        return text[:_MAX_MESSAGE] + "…" if len(text) > _MAX_MESSAGE else text

    async def _exchange(
        self,
        method: str,
        path: str,
        until: float,
        deadline: float,
        *,
        body: bytes | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        started: Callable[[], None] | None = None,
    ) -> _Answer:
        """Send one request and read its answer whole, under the time limit and the size limit.

        A used connection that turns out closed before any byte of the answer says nothing of the daemon (servers
        close idle ones): the request is sent again at once on a fresh one, and the attempt is still the same.
        """
        sent_before = False
        while True:
            now = asyncio.get_running_loop().time()
            # What may be applied already stays "maybe" through everything that follows.
            unsent: Applied = "maybe" if sent_before else "no"
            lease: Lease | None = None
            try:
                async with self._sessions.lease(self.address, wait=max(0.0, until - now)) as lease:
                    # The wait for a slot is our own load: the daemon still gets its time, from here on.
                    begun = asyncio.get_running_loop().time()
                    until = min(deadline, begun + until - now)
                    if started is not None and not sent_before:
                        started()
                    async with asyncio.timeout_at(until):
                        answer = await self._send(lease, method, path, deadline - begun, body, key, headers)
                        return replace(answer, resent=True) if sent_before and method != "GET" else answer
            except SlotTimeout as error:
                raise self._failed(FaultKind.NO_SLOT, "no connection slot came free in time", unsent) from error
            except _TooLarge as error:
                told = f"its answer is larger than {self._limit} bytes (max_reply_bytes says how much is read)"
                raise self._failed(FaultKind.MALFORMED, told, "maybe") from error
            except BustcallError:
                raise  # ours already: the client is closed, or a session that was passed in cannot be used
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                if lease is None:
                    raise  # not of a request: nothing here asks for a lease but a slot and a session
                if _is_stale(lease, error) and not sent_before:
                    sent_before = True
                    continue
                # A session that was passed in notes nothing: then only an error of connecting is sure.
                connected = lease.exchange.connected if lease.notes else not _before_sending(error)
                kind, message = _classify(error, connected=connected)
                if sent_before and not connected:
                    message += "; before that, a used connection broke when the request was sent on it"
                if kind is FaultKind.DISCONNECTED and self.address.is_encrypted and not lease.exchange.answered:
                    # With TLS 1.3 a server learns only after the handshake that a certificate is missing, and hangs up.
                    message += "; if it asks for a client certificate, give one with tls=TLS(cert=...)"
                failed = self._failed(kind, message, "maybe" if connected else unsent)
                if not isinstance(error, aiohttp.ClientResponseError):
                    raise failed from error
            # Outside the except block: such an error holds the request's headers, the token among them, and what was
            # answered; it goes neither into the chain nor into the context.
            raise failed

    async def _send(
        self,
        lease: Lease,
        method: str,
        path: str,
        left: float,
        body: bytes | None,
        key: str | None,
        more: Mapping[str, str] | None,
    ) -> _Answer:
        headers = {**self._headers, **(more or {}), "Bustcall-Timeout-Ms": str(max(0, math.floor(left * 1000)))}
        if key is not None:
            headers["Idempotency-Key"] = key
        if body is not None:
            headers["Content-Type"] = _JSON
        try:
            async with lease.session.request(
                method,
                lease.url(path),
                data=body,
                headers=headers,
                allow_redirects=False,
                raise_for_status=False,
                timeout=self._sessions.request_timeout,
            ) as response:
                lease.exchange.answered = True
                told = response.content_type == "application/problem+json"
                well = response.status in {200, _ACCEPTED}
                limit = self._limit if well else _MAX_PROBLEM_BYTES if told else _MAX_ERROR_BYTES
                answer = _Answer(
                    status=response.status,
                    content_type=response.headers.get("Content-Type", ""),
                    retry_after=_seconds(response.headers.get("Retry-After")),
                    body=await _read_bounded(response, limit, truncate=not well),
                    etag=response.headers.get("ETag"),
                    digest=response.headers.get(_DIGEST_HEADER),
                )
        except (aiohttp.ClientError, OSError) as error:
            if _is_stale(lease, error):
                self._sessions.retire(lease)
            raise
        self._heard(self.url, answer.digest)
        return answer

    def _expect_success(self, answer: _Answer) -> None:
        kind = kind_of_status(answer.status)
        if kind is None:
            return
        said, problem = _quote(answer), _problem(answer)
        if problem is not None and problem.type == _NO_SUCH_JOB:
            kind = FaultKind.REJECTED  # it is our daemon's route: what is not there is the job
        if 300 <= answer.status < 400:
            message = f"it answered with a redirect (HTTP {answer.status}), which is never followed{said}"
        elif kind is FaultKind.MALFORMED:
            message = f"it answered HTTP {answer.status}, which the protocol does not know{said}"
        elif kind is FaultKind.NOT_THIS_SERVICE:
            message = f"this is not a bustcall daemon's route (HTTP {answer.status}){said}"
        elif kind is FaultKind.TOKEN_REFUSED:
            lack = "refused the token" if self._token is not None else "wants a token, and this client has none"
            message = f"it {lack} (HTTP {answer.status}){said}"
        elif kind is FaultKind.NOT_ALLOWED:
            message = f"it does not allow this (HTTP {answer.status}){said}"
        elif kind is FaultKind.INCOMPATIBLE:
            message = f"this client does not fit it (HTTP {answer.status}){said}"
        elif kind is FaultKind.REJECTED:
            message = f"it refused the request (HTTP {answer.status}){said}"
        else:
            wait = "" if answer.retry_after is None else f", and asks to wait {answer.retry_after:g} s"
            message = f"it answered HTTP {answer.status}{wait}{said}"
        applied = "no" if answer.status == _NO_ROOM else _APPLIED.get(kind, "no")
        if problem is not None and problem.type == _CANCELLED:
            applied = "maybe"
        raise self._failed(kind, message, applied, answer)

    def _read(self, model: type[_Model], answer: _Answer) -> _Model:
        try:
            return model.model_validate_json(answer.body)
        except ValidationError as error:
            raise self._malformed(answer, error) from error

    def _malformed(self, answer: _Answer, error: ValidationError) -> AttemptFailed:
        field, why = explain(error)
        if "json" not in answer.content_type:
            why = f"it is {answer.content_type.partition(';')[0] or 'untyped'}, not JSON{_quote(answer)}"
        elif field is not None:
            why = f"{field}: {why}"
        return self._failed(FaultKind.MALFORMED, f"its answer is not what the protocol says: {why}", "maybe", answer)

    def _failed(self, kind: FaultKind, message: str, applied: Applied, answer: _Answer | None = None) -> AttemptFailed:
        problem = _problem(answer) if answer is not None else None
        return AttemptFailed(
            Fault(
                kind=kind,
                daemon=self.url,
                message=message,
                applied="maybe" if answer is not None and answer.resent else applied,
                status=answer.status if answer is not None else None,
                retry_after=answer.retry_after if answer is not None else None,
                unmet=(problem.unmet or ()) if problem is not None else (),
            )
        )


def _doubt(request: BustRequest, reply: BustReply, status: int) -> str:  # noqa: PLR0911 - one line a doubt
    """Say why an answer is not to just this request, or contradicts itself; an empty text if all is well."""
    if not reply.answers(request.target):
        return "its answer is for another target (the cache_key differs)"
    if reply.accepted != (status == _ACCEPTED):
        return f"its answer says that the bust is {'accepted' if reply.accepted else 'done'}, with HTTP {status}"
    if field := reply.unechoed(request):
        return (
            f"its answer does not repeat {field}, which was asked: it does not know it (an older daemon may have taken"
            " the place of the one that advertised it), and may have busted something else"
        )
    if reply.accepted:
        return "it accepted a dry run, of which nothing is to be done later" if request.dry_run else ""
    if (failed := next((layer.name for layer in reply.layers if not layer.ok), None)) is not None:
        return f"its answer says that the bust is done, and that it failed in the layer {failed}"
    if request.verify and not request.dry_run and not reply.verified:
        return "its answer does not say that it verified the bust, which was asked"
    return ""


_APPLIED: Final[Mapping[FaultKind, Applied]] = {
    # A server that fails may have done the work before; a proxy's 503 may hide one that did.
    FaultKind.SERVER_ERROR: "maybe",
    FaultKind.THROTTLED: "maybe",
    FaultKind.MALFORMED: "maybe",
    FaultKind.DISCONNECTED: "maybe",
}


def _is_stale(lease: Lease, error: BaseException) -> bool:
    """Tell whether a used connection was found closed before any byte of the answer."""
    lost = isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError | ConnectionError)
    if isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str):
        return False  # it holds the beginning of an answer
    return lost and lease.exchange.reused and not lease.exchange.answered


def _before_sending(error: BaseException) -> bool:
    """Tell whether an error can only come from making the connection, or from before that."""
    return isinstance(
        error,
        aiohttp.ClientConnectorError
        | aiohttp.ClientConnectorCertificateError
        | aiohttp.ServerFingerprintMismatch
        | aiohttp.ConnectionTimeoutError
        | aiohttp.ClientHttpProxyError
        | aiohttp.InvalidURL,
    )


def _classify(error: BaseException, *, connected: bool) -> tuple[FaultKind, str]:  # noqa: PLR0911 - one line a kind
    """Name what a foreign error means: the kind of fault, and one sentence."""
    match error:
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ServerFingerprintMismatch():
            return FaultKind.CERTIFICATE, f"its certificate cannot be trusted ({_reason(error)})"
        case aiohttp.ClientConnectorDNSError():
            return FaultKind.UNREACHABLE, f"its name cannot be resolved ({_reason(error)})"
        case aiohttp.ClientConnectorSSLError() | aiohttp.ClientSSLError():
            return _classify_handshake(error.os_error)
        case aiohttp.ClientConnectorError():  # a Unix socket's, and a proxy's, are kinds of it
            return FaultKind.UNREACHABLE, f"no connection could be made ({_reason(error)})"
        case aiohttp.ClientHttpProxyError():
            return FaultKind.UNREACHABLE, f"the proxy on the way would not connect (HTTP {error.status})"
        case aiohttp.ConnectionTimeoutError():
            return FaultKind.TIMED_OUT, "no connection was made in time"
        case TimeoutError():
            return FaultKind.TIMED_OUT, "no answer came in time" if connected else "no connection was made in time"
        case aiohttp.ServerDisconnectedError():
            return FaultKind.DISCONNECTED, "it closed the connection without an answer"
        case aiohttp.ClientPayloadError():
            return FaultKind.DISCONNECTED, "it closed the connection in the middle of its answer"
        case aiohttp.ClientConnectionError() | OSError():
            if isinstance(error, ssl.SSLError):
                return _classify_handshake(error)
            return FaultKind.DISCONNECTED, f"the connection broke ({_reason(error)})"
        case _:  # what is left of ClientError and ValueError: an answer that is not HTTP
            return FaultKind.MALFORMED, "its answer is not HTTP"


def _classify_handshake(error: BaseException) -> tuple[FaultKind, str]:
    """Tell a broken handshake, which may work next time, from one that never can."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return FaultKind.CERTIFICATE, f"its certificate cannot be trusted ({_reason(error)})"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError) or not isinstance(
        error, ssl.SSLError
    ):
        return FaultKind.UNREACHABLE, f"the TLS handshake broke ({_reason(error)})"
    return FaultKind.MALFORMED, f"it does not speak TLS as expected ({_reason(error)})"


def _reason(error: BaseException) -> str:
    """Tell an error in a few words of its own, on one line."""
    inner = getattr(error, "os_error", None) or getattr(error, "certificate_error", None) or error
    number = getattr(inner, "errno", None)
    plain = isinstance(inner, OSError) and not isinstance(inner, ssl.SSLError | socket.gaierror)
    text = os.strerror(number) if plain and number else str(inner) or type(inner).__name__
    return " ".join(str(text).split())


def _quote(answer: _Answer) -> str:
    """Quote what a daemon said in an error's body: a problem's detail, or a text; of a page only that it is one."""
    if "html" in answer.content_type:
        return ": an HTML page" if answer.body else ""
    problem = _problem(answer)
    text = "" if problem is None else "; ".join([problem.detail, *_beyond(problem.detail, problem.unmet or ())])
    text = text or answer.body.decode("utf-8", "replace")
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    return f": {text}" if text else ""


def _beyond(text: str, reasons: Iterable[str]) -> Iterable[str]:
    """Tell the reasons that a text does not say already."""
    return [reason for reason in reasons if reason not in text]


def _problem(answer: _Answer) -> Problem | None:
    """Read the problem that a refusal is, if it is one (RFC 9457)."""
    if answer.status < 400 or "json" not in answer.content_type:
        return None
    try:
        return Problem.model_validate_json(answer.body)
    except ValidationError:
        return None


def hide(text: str, secret: str, shown: str) -> str:
    """Put `shown` in place of `secret` in a text that somebody else wrote, however it is escaped there.

    Of a secret that is cut off at the end of the text, the part that is there is hidden too. Up to three characters
    are no secret, and up to seven must stand alone: they would be found in any sentence.
    """
    if len(secret) < _TELLING:
        return text
    forms = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        html.escape(secret),
        ascii(secret)[1:-1],
    }
    lower = text.lower()
    for form in sorted(forms, key=len, reverse=True):
        if form[: _TELLING + 1].lower() not in lower:
            continue  # neither it nor its beginning is there, which is most often so
        pattern = re.escape(form) if len(form) >= 2 * _TELLING else rf"(?<!\w){re.escape(form)}(?!\w)"
        text = re.sub(pattern, lambda _: shown, text, flags=re.IGNORECASE)
        for length in range(min(len(form) - 1, len(text)), _TELLING, -1):
            if text.endswith(form[:length]):
                text = text[:-length] + shown
                break
    return text


async def _read_bounded(response: aiohttp.ClientResponse, limit: int, *, truncate: bool) -> bytes:
    """Read a body up to `limit` bytes; beyond it, cut it off (`truncate`) or raise. The connection is then closed."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            response.close()
            if truncate:
                return bytes(body[:limit])
            raise _TooLarge
    return bytes(body)


def _seconds(retry_after: str | None) -> float | None:
    """Read a Retry-After header: a number of seconds or an HTTP date (RFC 9110, section 10.2.3)."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except (ValueError, OverflowError):
        return None
