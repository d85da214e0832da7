"""What sends a daemon requests, as this client would, and reads its answers whole."""

from __future__ import annotations

import asyncio
import json
import secrets
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self, final
from urllib.parse import urlencode, urlsplit

import aiohttp
from pydantic import TypeAdapter

from pybustcall.capabilities import SEMVERX, advertised_digest
from pybustcall.models import BINDING, BindingCapabilities
from pybustcall.testing.conformance.checking import PAUSE, Answer, Unmet, capability_of
from pybustcall.testing.conformance.reader import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from types import TracebackType

    from pybustcall.topology import DaemonAddress

__all__ = [
    "ACCEPTED",
    "BINDINGS",
    "BUST",
    "CAPABILITIES",
    "DEPENDENCIES",
    "DIGEST",
    "ENTRIES",
    "EVENTS",
    "FORGET",
    "HOTSWAP",
    "JOBS",
    "KEY",
    "MISSING",
    "REPLAYED",
    "RESOLVE",
    "ROUNDS",
    "STATUS",
    "TARGET",
    "Probe",
    "new_key",
]

_MAX_BYTES: Final = 4 * 1024 * 1024
BINDINGS: Final = TypeAdapter(dict[str, BindingCapabilities])
BUST: Final = "/api/v1/bust"
CAPABILITIES: Final = "/api/v1/capabilities"
DEPENDENCIES: Final = "/api/v1/dependencies"
FORGET: Final = "/api/v1/dependencies/forget"
ENTRIES: Final = "/api/v1/entries"
EVENTS: Final = "/api/v1/events"
HOTSWAP: Final = "/api/v1/hotswap"
JOBS: Final = "/api/v1/jobs"
RESOLVE: Final = "/api/v1/resolve"
STATUS: Final = "/api/v1/status"
TARGET: Final = "conformance/naïve key.css"
KEY: Final = "Idempotency-Key"
REPLAYED: Final = "Idempotency-Replayed"
DIGEST: Final = "Bustcall-Capabilities"
_LAST: Final = "Last-Event-ID"
_STREAM: Final = "text/event-stream"
MISSING: Final = (404, 405, 501)  # the answers where there is no such route or method
ACCEPTED: Final = 202
_CROWD: Final = 8  # requests at once
ROUNDS: Final = 3  # of them, since who acts on what may have changed meanwhile is lucky at times


@final
class Probe:
    """Sends single requests to one daemon, as pybustcall would, and reads the answers whole.

    Each request has a connection of its own, or, of a probe that is `alone`, all have the same one if the daemon keeps
    it. `connections` tells how many were made, `closings` how many the daemon said that it closes. `names` were made up
    to be announced, `entries` were registered, each in its namespace; `namespaces` are two of its own.

    `advertised` is what the daemon says that it can do.
    """

    def __init__(
        self, address: DaemonAddress, headers: Mapping[str, str], timeout: float, *, alone: bool = False
    ) -> None:
        self.advertised: frozenset[str] = frozenset()
        self.connections = 0
        self.closings = 0
        self.names: set[str] = set()
        self.entries: set[tuple[str, str | None]] = set()
        self.namespaces = (f"conformance-{secrets.token_hex(8)}", f"conformance-{secrets.token_hex(8)}")
        self._address = address
        self._headers = {
            "Bustcall-Binding": BINDING,
            "Bustcall-Version": SEMVERX,
            DIGEST: advertised_digest(),
            **headers,
        }
        self._timeout = timeout
        self._alone = alone

    async def __aenter__(self) -> Self:
        limits: dict[str, Any] = {"limit": 1} if self._alone else {"force_close": True}
        path = self._address.socket_path
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(self._count)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(**limits) if path is None else aiohttp.UnixConnector(path, **limits),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            trace_configs=[trace],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def _count(self, *_: object) -> None:
        self.connections += 1

    def advertises(self, *names: str) -> bool:
        """Tell whether the daemon says that it can do all of these."""
        return self.advertised.issuperset(names)

    def offers(self, field_name: str) -> bool:
        """Tell whether the daemon says that it knows this kind, or this field, of a bust."""
        return self.advertises(capability_of(field_name))

    def alone(self) -> Probe:
        """Make a probe that keeps to one connection."""
        return self._like(Probe(self._address, self._headers, self._timeout, alone=True))

    def _like(self, other: Probe) -> Probe:
        other.advertised = self.advertised
        return other

    def stranger(self, token: str | None) -> Probe:
        """Make a probe that has another token, or none."""
        headers = {name: value for name, value in self._headers.items() if name != "Authorization"}
        headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
        return self._like(Probe(self._address, headers, self._timeout))

    def new_name(self) -> str:
        """Make up a dependency's name."""
        name = f"conformance-{secrets.token_hex(8)}"
        self.names.add(name)
        return name

    def new_target(self) -> str:
        """Make up a target, below which keys can be registered."""
        return f"conformance/{secrets.token_hex(8)}"

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | Sequence[bytes] | None = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request; a body that is given in pieces is sent so."""
        sent = {**(headers or {}), **({} if body is None else {"Content-Type": content_type})}
        data: object = body
        if body is not None and not isinstance(body, bytes):
            sent["Content-Length"] = str(sum(map(len, body)))
            data = _in_pieces(body)
        async with self._session.request(
            method, self._address.base + path, data=data, headers=sent, allow_redirects=False
        ) as response:
            read = bytearray()
            if response.content_type != _STREAM:  # which has no end
                async for piece in response.content.iter_any():
                    read += piece
                    if len(read) > _MAX_BYTES:
                        raise Unmet(f"its answer has more than {_MAX_BYTES} bytes")
            said = response.headers.get("Connection", "").lower()
            modern = response.version is not None and response.version >= aiohttp.HttpVersion11
            closes = "close" in said or not (modern or "keep-alive" in said)
            self.closings += closes
            if path == BUST and response.status == ACCEPTED and not self.offers("jobs"):
                raise Unmet(f"a bust is answered with HTTP 202, which takes {capability_of('jobs')}")
            return Answer(response.status, response.content_type, bytes(read), response.headers, closes)

    @asynccontextmanager
    async def follow(self, whose: str, *wanted: tuple[str, str], after: str | None = None) -> AsyncIterator[Stream]:
        """Follow the events, as a reader who wants just this; of those that are told it keeps those about `whose`."""
        sent = {} if after is None else {_LAST: after}
        url = f"{self._address.base}{EVENTS}?{urlencode(wanted)}"
        async with asyncio.timeout(None) as opening:
            opening.reschedule(asyncio.get_running_loop().time() + self._timeout)
            async with self._session.get(
                url, headers=sent, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=None)
            ) as response:
                opening.reschedule(None)
                if response.status != 200:
                    raise Unmet(f"answered HTTP {response.status}, expected 200")
                if response.content_type != _STREAM:
                    raise Unmet(f"its events are {response.content_type}, not {_STREAM}")
                yield Stream(response.content, whose, self.namespaces, self._timeout)

    async def send_raw(self, method: str, path: str) -> bytes:
        """Send a request without a body that ends its connection; read, as they are, all bytes that come until then."""
        where = urlsplit(self._address.base)
        headers = {**self._headers, "Host": where.netloc, "Connection": "close"}
        lines = [f"{method} {where.path}{path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        async with asyncio.timeout(self._timeout):
            reader, writer = await self._connect(where.port)
            try:
                writer.write("\r\n".join([*lines, "", ""]).encode())
                read = b""
                while len(read) <= _MAX_BYTES and (piece := await reader.read(65536)):
                    read += piece
                return read
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    async def _connect(self, port: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = self._address
        if address.socket_path is not None:
            return await asyncio.open_unix_connection(address.socket_path)
        encrypted = address.is_encrypted
        return await asyncio.open_connection(
            address.host, port or (443 if encrypted else 80), ssl=True if encrypted else None
        )

    async def post(self, path: str, document: object, key: str | None = None) -> Answer:
        """Send a document, with an idempotency key or without."""
        return await self.send("POST", path, json.dumps(document).encode(), headers={} if key is None else {KEY: key})

    async def post_at_once(self, path: str, document: object, key: str) -> list[Answer]:
        """Send a document many times with one key; the last bytes of all go out together."""
        body = json.dumps(document).encode()
        sendings = (self.send("POST", path, (body[:-1], body[-1:]), headers={KEY: key}) for _ in range(_CROWD))
        answers = await asyncio.gather(*sendings, return_exceptions=True)  # none is left behind if one fails
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, Answer)]

    async def bust(self, **fields: object) -> Answer:
        """Have something busted."""
        return await self.post(BUST, fields)

    async def bust_once(self, key: str, **fields: object) -> Answer:
        """Have something busted, with an idempotency key."""
        return await self.post(BUST, fields, key)


async def _in_pieces(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for number, piece in enumerate(pieces):
        if number:
            await asyncio.sleep(PAUSE)
        yield piece


def new_key() -> str:
    """Make up an idempotency key."""
    return f"conformance-{secrets.token_hex(16)}"
