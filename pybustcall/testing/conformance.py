"""The conformance suite: what any daemon must do so that this client can rely on it, checked from outside.

Each check sends requests of the base protocol, or of an extension that the daemon advertises, and says whether the
answers are right. It decides nothing about how a daemon does it, in which language, or with which cache; every daemon
that passes can serve busts.

Keys and dependencies are new ones in each check, so that the suite can be run again, and by several at once. At the end
what was announced is forgotten, as far as the daemon forgets.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, final
from urllib.parse import urlencode, urlsplit

import aiohttp
from pydantic import BaseModel, TypeAdapter, ValidationError

from pybustcall.capabilities import (
    SEMVERX,
    Agreement,
    DaemonCapabilities,
    advertised_digest,
    advertisement,
    advertisement_bytes,
    check_requirements,
    digest_of,
)
from pybustcall.errors import ConfigurationError, InvalidVersion
from pybustcall.keys import SEPARATORS
from pybustcall.models import (
    BINDING,
    DEFAULT_NAMESPACE,
    EVERYTHING,
    KINDS,
    MAX_TARGET_BYTES,
    OVER,
    BindingCapabilities,
    BustReply,
    BustRequest,
    CapabilityDocument,
    DependenciesReply,
    DependencyReply,
    ForgetReply,
    HotSwapReply,
    JobReply,
    JobsReply,
    Problem,
    ResolveReply,
    StatusReply,
    StreamedBust,
    StreamedLive,
    StreamedReset,
    cache_key_of,
    explain,
)
from pybustcall.needs import phrase_of
from pybustcall.semverx import SemverX
from pybustcall.sse import BrokenStream, StreamParser
from pybustcall.topology import DaemonAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from pybustcall.sse import Block

__all__ = ["CHECKS", "Check", "Verdict", "check_daemon"]

_MAX_BYTES: Final = 4 * 1024 * 1024
_BINDINGS: Final = TypeAdapter(dict[str, BindingCapabilities])
_Model = TypeVar("_Model", bound=BaseModel)
_BUST: Final = "/api/v1/bust"
_CAPABILITIES: Final = "/api/v1/capabilities"
_DEPENDENCIES: Final = "/api/v1/dependencies"
_FORGET: Final = "/api/v1/dependencies/forget"
_ENTRIES: Final = "/api/v1/entries"
_EVENTS: Final = "/api/v1/events"
_HOTSWAP: Final = "/api/v1/hotswap"
_JOBS: Final = "/api/v1/jobs"
_RESOLVE: Final = "/api/v1/resolve"
_STATUS: Final = "/api/v1/status"
_TARGET: Final = "conformance/naïve key.css"
_SCRIPTS: Final = "conformance/ключ/キー/مفتاح/🔑/e\u0301.css"
_KEY: Final = "Idempotency-Key"
_REPLAYED: Final = "Idempotency-Replayed"
_DIGEST: Final = "Bustcall-Capabilities"
_LAST: Final = "Last-Event-ID"
_PLACE: Final = re.compile(r"([!-~]{1,200})-([0-9]{1,19})")
_STREAM: Final = "text/event-stream"
_IDEMPOTENT: Final = "cache.bust.idempotent"
_KNOWS: Final = ("cache.dependencies",)
_RESOLVES: Final = ("cache.dependencies", "semver.resolve")
_SWAPS: Final = ("cache.dependencies", "cache.hotswap")
_REGISTERS: Final = ("cache.register",)
_TELLS: Final = ("events.stream",)
_NO_SUCH_JOB: Final = "urn:bustcall:problem:no-such-job"
_NO_JOB: Final = "not decided: it names no job in its answers to busts"
_MISSING: Final = (404, 405, 501)  # the answers where there is no such route or method
_REFUSED: Final = (400, 403, 422)  # the answers to a bust that a daemon does not do
_ACCEPTED: Final = 202
_PAUSE: Final = 0.02  # seconds between two pieces of a body, so that they arrive one by one
_CROWD: Final = 8  # requests at once
_ROUNDS: Final = 3  # of them, since who acts on what may have changed meanwhile is lucky at times
_SETTLE: Final = 0.1  # seconds until a second bust, at first: it must not come before a registration
_LATE: Final = 5.0  # seconds after which a job, or a second bust, is taken as never coming
_SOON: Final = 2.0  # seconds after the answer to a bust, in which its event, which was sent before, has arrived
_LONGEST_BEAT: Final = 10.0  # seconds: a longer heartbeat is not waited for
_PATIENCE: Final = 3  # checks in a row without an answer, after which nothing more is asked


class _Unmet(Exception):
    """A check found something else than it asks for."""


class _Silent(_Unmet):
    """A stream of events does not say in time what it must."""


class _Skipped(Exception):
    """A check does not apply to this daemon."""


@final
@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer; `closes`: it says that its connection ends with it."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    closes: bool = False


@final
class _Probe:
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
            _DIGEST: advertised_digest(),
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
        return self.advertises(_of(field_name))

    def alone(self) -> _Probe:
        """Make a probe that keeps to one connection."""
        return self._like(_Probe(self._address, self._headers, self._timeout, alone=True))

    def _like(self, other: _Probe) -> _Probe:
        other.advertised = self.advertised
        return other

    def stranger(self, token: str | None) -> _Probe:
        """Make a probe that has another token, or none."""
        headers = {name: value for name, value in self._headers.items() if name != "Authorization"}
        headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
        return self._like(_Probe(self._address, headers, self._timeout))

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
    ) -> _Answer:
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
                        raise _Unmet(f"its answer has more than {_MAX_BYTES} bytes")
            said = response.headers.get("Connection", "").lower()
            modern = response.version is not None and response.version >= aiohttp.HttpVersion11
            closes = "close" in said or not (modern or "keep-alive" in said)
            self.closings += closes
            if path == _BUST and response.status == _ACCEPTED and not self.offers("jobs"):
                raise _Unmet(f"a bust is answered with HTTP 202, which takes {_of('jobs')}")
            return _Answer(response.status, response.content_type, bytes(read), response.headers, closes)

    @asynccontextmanager
    async def follow(self, whose: str, *wanted: tuple[str, str], after: str | None = None) -> AsyncIterator[_Stream]:
        """Follow the events, as a reader who wants just this; of those that are told it keeps those about `whose`."""
        sent = {} if after is None else {_LAST: after}
        url = f"{self._address.base}{_EVENTS}?{urlencode(wanted)}"
        async with asyncio.timeout(None) as opening:
            opening.reschedule(asyncio.get_running_loop().time() + self._timeout)
            async with self._session.get(
                url, headers=sent, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=None)
            ) as response:
                opening.reschedule(None)
                if response.status != 200:
                    raise _Unmet(f"answered HTTP {response.status}, expected 200")
                if response.content_type != _STREAM:
                    raise _Unmet(f"its events are {response.content_type}, not {_STREAM}")
                yield _Stream(response.content, whose, self.namespaces, self._timeout)

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

    async def post(self, path: str, document: object, key: str | None = None) -> _Answer:
        """Send a document, with an idempotency key or without."""
        return await self.send("POST", path, json.dumps(document).encode(), headers={} if key is None else {_KEY: key})

    async def post_at_once(self, path: str, document: object, key: str) -> list[_Answer]:
        """Send a document many times with one key; the last bytes of all go out together."""
        body = json.dumps(document).encode()
        sendings = (self.send("POST", path, (body[:-1], body[-1:]), headers={_KEY: key}) for _ in range(_CROWD))
        answers = await asyncio.gather(*sendings, return_exceptions=True)  # none is left behind if one fails
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, _Answer)]

    async def bust(self, **fields: object) -> _Answer:
        return await self.post(_BUST, fields)

    async def bust_once(self, key: str, **fields: object) -> _Answer:
        return await self.post(_BUST, fields, key)


@final
@dataclass(frozen=True, slots=True)
class _Told:
    """A bust as a stream told of it."""

    number: int
    bust: StreamedBust


@final
class _Stream:
    """What one reader of events is told. Each event must be one that can come after those before.

    - `whose`: what the targets begin with that it keeps; everything else is somebody else's, or of another check, but
      for busts of everything in one of the `namespaces`
    - `patience`: seconds until it must be live

    `told` are the busts so far, as often as each was told; `place` is the last id, of `epoch` and `number`. `first`
    is what the stream began with; `reset` is the data of a reset that came, with the number `reset_at`, `live` what it
    said when it was live, and `missed` what it told before that. `beats` is how often it said something else.
    """

    def __init__(self, content: aiohttp.StreamReader, whose: str, namespaces: tuple[str, ...], patience: float) -> None:
        self.told: list[_Told] = []
        self.missed: tuple[_Told, ...] = ()
        self.first = ""
        self.reset: str | None = None
        self.live: StreamedLive | None = None
        self.epoch = ""
        self.number = self.reset_at = -1
        self.beats = 0
        self._content = content
        self._whose = whose
        self._namespaces = namespaces
        self._patience = patience
        self._parser = StreamParser()

    @property
    def place(self) -> str:
        return f"{self.epoch}-{self.number}"

    @property
    def targets(self) -> list[str]:
        """What was busted, each once, in the order in which it was told first."""
        return list(dict.fromkeys(one.bust.target for one in self.told))

    async def begin(self, *, forgets: bool = False) -> None:
        """Read until it is live; `forgets`: that begins with a reset."""
        until = _now() + self._patience
        while self.live is None:
            await self._read(until, "it is live")
        if self.reset is not None and not forgets:
            raise _Unmet("it has a reader forget everything who has missed little or nothing")
        if self.first != "reset" and forgets:
            raise _Unmet(f"a stream begins with {self.first}, not with reset")

    async def until(self, target: str) -> StreamedBust:
        """Read until a bust of a target is told, which was answered by now; tell how that was put first."""
        until = _now() + _SOON
        while target not in self.targets:
            await self._read(until, "a bust is told that was answered")
        return next(one.bust for one in self.told if one.bust.target == target)

    async def until_place(self, number: int, seconds: float) -> None:
        """Read until an id says that everything up to a number was told."""
        until = _now() + seconds
        while self.number < number:
            await self._read(until, "it says how far it is")

    async def _read(self, until: float, what: str) -> None:
        try:
            async with asyncio.timeout_at(until):
                piece = await self._content.readany()
        except TimeoutError:
            raise _Silent(f"a stream of events says nothing more before {what}") from None
        if not piece:
            raise _Unmet("it ends a stream of events whose reader is there")
        try:
            for block in self._parser.feed(piece):
                self._take(block)
        except BrokenStream as broken:
            raise _Unmet(f"its stream of events is none: {broken}") from broken

    def _take(self, block: Block) -> None:
        known = block.data is not None and block.name in {"bust", "reset", "live"}
        if known or block.id:
            self._move(block.name if known else "", block.id)
        if not known:
            self.beats += 1  # or an event of a later version
            return
        self.first = self.first or block.name
        data = block.data or ""
        if block.name == "bust":
            told = _Told(self.number, _understood(StreamedBust, block.name, data))
            of_all = told.bust.kind == "all" and told.bust.namespace in self._namespaces
            if of_all or told.bust.target.startswith(self._whose):
                self.told.append(told)
        elif block.name == "reset":
            _understood(StreamedReset, block.name, data)
            self.reset, self.reset_at = data, self.number
        else:
            self.live = _understood(StreamedLive, block.name, data)
            self.missed = tuple(self.told)

    def _move(self, name: str, place: str) -> None:
        found = _PLACE.fullmatch(place)
        if found is None:
            raise _Unmet(f"an event {name} has the id {place[:40]!r}, which is not EPOCH-NUMBER".replace("  ", " "))
        epoch, number = found[1], int(found[2])
        if self.epoch and epoch != self.epoch and name != "reset":
            raise _Unmet("its events go over to another epoch, and it does not say reset")
        if epoch == self.epoch and (number < self.number or (name == "bust" and number == self.number)):
            raise _Unmet(f"the number of an event is {number} after {self.number}; numbers must rise")
        self.epoch, self.number = epoch, number


def _now() -> float:
    return asyncio.get_running_loop().time()


def _understood(model: type[_Model], name: str, data: str) -> _Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        field_name, why = explain(error)
        raise _Unmet(f"an event {name} cannot be read: {field_name or 'its data'}: {why}") from error


def _of(field_name: str) -> str:
    """Tell the capability that a kind, or a field, of a bust takes."""
    return f"cache.bust.{field_name}"


def _of_all(*field_names: str) -> tuple[str, ...]:
    return tuple(map(_of, field_names))


async def _in_pieces(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for number, piece in enumerate(pieces):
        if number:
            await asyncio.sleep(_PAUSE)
        yield piece


# The base


async def _busts(probe: _Probe) -> None:
    _expect_bust(await probe.bust(target=_TARGET, strategy="direct", binding="pybustcall", fault_tolerance=6))


async def _busts_with_defaults(probe: _Probe) -> None:
    _expect_success(await probe.bust(target=_TARGET))


async def _ignores_unknown_fields(probe: _Probe) -> None:
    _expect_success(await probe.bust(target=_TARGET, colour="green"))


async def _busts_the_same_again(probe: _Probe) -> None:
    for _ in range(2):
        _expect_success(await probe.bust(target=_TARGET))


async def _busts_in_any_script(probe: _Probe) -> None:
    for escaped in (False, True):
        body = json.dumps({"target": _SCRIPTS}, ensure_ascii=escaped).encode()
        _expect_bust(await probe.send("POST", _BUST, body), _SCRIPTS)


async def _reads_the_longest_target(probe: _Probe) -> None:
    beginning = "conformance/"
    rest = MAX_TARGET_BYTES - len(beginning)
    for target in (beginning + "x" * rest, beginning + "é" * (rest // 2)):
        answer = await probe.bust(target=target, strategy="direct")
        if answer.status != _ACCEPTED:
            _expect(answer, 200, 422)
        if answer.status != 422:  # a cache of files has no such name, and may say so
            _expect_bust(answer, target)


async def _keeps_to_the_scale(probe: _Probe) -> None:
    for tolerance in (0, 1, 6, 12):
        answer = await probe.bust(target=_TARGET, fault_tolerance=tolerance)
        _expect_bust(answer)
        stage = json.loads(answer.body).get("fault_stage")
        if stage is not None and stage not in range(13):
            raise _Unmet(f"fault_stage is {stage}, which is not of the scale from 0 to 12")


async def _keeps_its_connections(probe: _Probe) -> None:
    async with probe.alone() as one:
        for target in (_TARGET, f"{_TARGET}.map"):
            _expect_bust(await one.bust(target=target, strategy="direct"), target)
            _expect(await one.send("GET", _STATUS), 200)
        if one.closings:
            raise _Skipped("it closes its connections, and says so")
        _expect_kept(one)


async def _stays_in_step(probe: _Probe) -> None:
    body = json.dumps({"target": "x" * 1000}).encode()
    async with probe.alone() as one:
        for path, sent, content_type, statuses in (
            (_BUST, body, "text/plain", (415,)),
            (_BUST, body[:-1], "application/json", (400,)),
            (_BUST, b"", "application/json", (400, 411, 422)),
            ("/api/v1/nothing-here", body, "application/json", (404, 405)),
        ):
            _expect(await one.send("POST", path, sent, content_type), *statuses)
            _expect_bust(await one.bust(target=_TARGET, strategy="direct"))
        _expect_kept(one)


async def _reads_pieces(probe: _Probe) -> None:
    body = json.dumps({"target": _TARGET, "strategy": "direct"}, ensure_ascii=False).encode()
    middle = body.index("ï".encode()) + 1  # in the middle of a character
    _expect_bust(await probe.send("POST", _BUST, (body[:middle], body[middle:])))


async def _answers_head(probe: _Probe) -> None:
    for path, statuses in ((_STATUS, (200, 404, 405, 501)), ("/api/v1/nothing-here", (404, 405, 501))):
        head, _, rest = (await probe.send_raw("HEAD", path)).partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
        if found is None or int(found[1]) not in statuses:
            said = f"HTTP {found[1].decode()}" if found is not None else "no HTTP"
            raise _Unmet(f"HEAD {path} is answered with {said}, expected one of {', '.join(map(str, statuses))}")
        if rest:
            raise _Unmet(f"the answer to HEAD {path} has a body of {len(rest)} bytes")


async def _tells_its_status(probe: _Probe) -> None:
    answer = await probe.send("GET", _STATUS)
    _expect(answer, 200)
    _read(StatusReply, answer)


async def _tells_its_capabilities(probe: _Probe) -> None:
    answer = await probe.send("GET", _CAPABILITIES)
    if answer.status == 200:
        _read(CapabilityDocument, answer)
        return
    _expect(answer, 404)
    answer = await probe.send("GET", "/api/v1/bindings/capabilities")
    _expect(answer, 200)
    try:
        _BINDINGS.validate_json(answer.body)
    except ValidationError as error:
        raise _Unmet(f"the map of bindings is not one: {explain(error)[1]}") from error


async def _refuses_malformed_json(probe: _Probe) -> None:
    _expect(await probe.send("POST", _BUST, b'{"target": "a'), 400)


async def _refuses_a_missing_target(probe: _Probe) -> None:
    _expect(await probe.bust(strategy="direct"), 400, 422)


async def _refuses_a_mistyped_target(probe: _Probe) -> None:
    _expect(await probe.bust(target=7), 400, 422)


async def _refuses_a_tolerance_beyond_a_byte(probe: _Probe) -> None:
    _expect(await probe.bust(target=_TARGET, fault_tolerance=300), 400, 422)


async def _refuses_other_content_types(probe: _Probe) -> None:
    body = json.dumps({"target": _TARGET}).encode()
    _expect(await probe.send("POST", _BUST, body, "text/plain"), 415)


async def _refuses_other_methods(probe: _Probe) -> None:
    _expect(await probe.send("GET", _BUST), 404, 405)


async def _knows_no_other_route(probe: _Probe) -> None:
    _expect(await probe.send("GET", "/api/v1/nothing-here"), 404)


async def _names_the_field(probe: _Probe) -> None:
    for name, value in (
        ("target", ""),
        ("target", "a\u0007b"),
        ("target", "x" * 8193),
        ("target", "é" * 4097),
        ("fault_tolerance", 13),
    ):
        answer = await probe.bust(**{"target": _TARGET, name: value})
        _expect(answer, 422)
        if answer.content_type != "application/problem+json":
            raise _Unmet(f"a refusal is {answer.content_type}, not application/problem+json")
        _expect_problem(answer, 422, name)


# The capability document


async def _document(probe: _Probe) -> tuple[CapabilityDocument, _Answer]:
    answer = await probe.send("GET", _CAPABILITIES)
    if answer.status == 404:
        raise _Skipped("it has no capability document")
    _expect(answer, 200)
    return _read(CapabilityDocument, answer), answer


async def _has_a_sound_document(probe: _Probe) -> None:
    document, _ = await _document(probe)
    if "cache.bust" not in document.capabilities:
        raise _Unmet("capabilities does not name cache.bust, which is the base")
    try:
        check_requirements(document.requires)
        if document.semverx is not None:
            SemverX.parse(document.semverx)
    except ConfigurationError as error:
        raise _Unmet(f"requires.{error}") from error
    except InvalidVersion as error:
        raise _Unmet(f"semverx: {error}") from error


async def _tells_what_is_unchanged(probe: _Probe) -> None:
    _, answer = await _document(probe)
    tag = f'"{digest_of(answer.body)}"'
    if answer.headers.get("ETag") != tag:
        raise _Unmet(f"its ETag is {answer.headers.get('ETag')}, not {tag}")
    same = await probe.send("GET", _CAPABILITIES, headers={"If-None-Match": tag})
    _expect(same, 304)
    if same.body or same.headers.get("ETag") != tag:
        raise _Unmet("a 304 has a body, or another ETag")
    _expect(await probe.send("GET", _CAPABILITIES, headers={"If-None-Match": '"another"'}), 200)


async def _signs_every_answer(probe: _Probe) -> None:
    _, answer = await _document(probe)
    digest = digest_of(answer.body)
    for method, path, body, content_type in (
        ("GET", _CAPABILITIES, None, ""),
        ("GET", _STATUS, None, ""),
        ("POST", _BUST, json.dumps({"target": _TARGET}).encode(), "application/json"),
        ("POST", _BUST, b'{"target": ""}', "application/json"),
        ("POST", _BUST, b"{", "application/json"),
        ("POST", _BUST, b"{}", "text/plain"),
        ("GET", _BUST, None, ""),
        ("GET", "/api/v1/nothing-here", None, ""),
    ):
        sent = {"If-None-Match": answer.headers.get("ETag", "")} if path == _CAPABILITIES else None
        signed = await probe.send(method, path, body, content_type, sent)
        if signed.headers.get(_DIGEST) != digest:
            told = signed.headers.get(_DIGEST)
            raise _Unmet(f"{_DIGEST} of an HTTP {signed.status} ({method} {path}) is {told}, not {digest}")


async def _tells_the_access(probe: _Probe) -> None:
    document, _ = await _document(probe)
    if untold := [name for name in document.capabilities if name not in document.access]:
        raise _Unmet(f"access does not name {', '.join(untold)}")


async def _fits(probe: _Probe) -> None:
    document, _ = await _document(probe)
    agreement = Agreement([advertisement().requires])
    agreement.learned(DaemonCapabilities("", document), 0.0)
    if agreement.misfit:
        raise _Unmet(agreement.misfit)


async def _keeps_to_the_access(probe: _Probe) -> None:
    document, _ = await _document(probe)
    if not document.access:
        raise _Skipped("its document tells the access of nothing")
    async with probe.stranger(None) as nobody, probe.stranger(_new_key()) as stranger:
        for capability, method, path, body in _harmless(probe):
            tier = document.access.get(capability, "")
            usable = capability in document.capabilities
            if tier == "public" and usable:
                _expect_access(capability, tier, "no token", await nobody.send(method, path, body))
            elif tier in {"protected", "private"}:
                missing = _MISSING if path == _FORGET or not usable else ()  # what nobody may use need not be there
                for one, whose in ((nobody, "no token"), (stranger, "a wrong token")):
                    _expect_access(capability, tier, whose, await one.send(method, path, body), *missing)


def _harmless(probe: _Probe) -> Iterator[tuple[str, str, str, bytes | None]]:
    """Tell requests of each capability that do little, and that whoever is let in can make."""
    name = probe.new_name()
    posts: tuple[tuple[str, str, object], ...] = (
        ("cache.register", _ENTRIES, {"key": _TARGET, "depends_on": []}),  # which is busted next
        ("cache.bust", _BUST, {"target": _TARGET, "strategy": "direct"}),
        ("cache.dependencies", _DEPENDENCIES, {"name": name, "versions": ["1.0.0"]}),
        ("cache.dependencies", _FORGET, {"name": name}),
        ("semver.resolve", _RESOLVE, {"spec": f"{name}@*"}),
        ("cache.hotswap", _HOTSWAP, {"swaps": [{"name": probe.new_name(), "to": "1.0.0"}]}),  # which nobody announced
    )
    for capability, path, document in posts:
        yield capability, "POST", path, json.dumps(document).encode()
    yield "cache.bust.jobs", "GET", f"{_JOBS}?limit=1", None
    yield "cache.bust.jobs", "DELETE", f"{_JOBS}/{_new_key()}", None  # which nobody has
    yield "events.stream", "GET", _EVENTS, None
    yield "daemon.negotiate", "POST", _CAPABILITIES, advertisement_bytes()
    yield "cache.dependencies", "GET", _DEPENDENCIES, None
    yield "daemon.status", "GET", _STATUS, None
    yield "daemon.capabilities", "GET", _CAPABILITIES, None


async def _negotiates(probe: _Probe) -> None:
    _, own = await _document(probe)
    answer = await probe.send("POST", _CAPABILITIES, advertisement_bytes())
    _expect(answer, 200)
    if answer.body != own.body:
        raise _Unmet("it answers a document with another one than its own")


async def _refuses_what_is_no_document(probe: _Probe) -> None:
    for body in (b'{"binding": "a', b"[]", b'{"binding": 7}', b'{"binding": "a", "capabilities": "cache.bust"}'):
        _expect(await probe.send("POST", _CAPABILITIES, body), 400, 422)


# Idempotency keys


async def _answers_a_repeat_from_memory(probe: _Probe) -> None:
    key = _new_key()
    first = await probe.bust_once(key, target=_TARGET, strategy="direct")
    again = await probe.bust_once(key, target=_TARGET, strategy="direct")
    _expect_replay(first, again)


async def _applies_once_what_comes_at_once(probe: _Probe) -> None:
    for _ in range(_ROUNDS):
        _expect_one(await probe.post_at_once(_BUST, {"target": _TARGET, "strategy": "direct"}, _new_key()))


async def _refuses_a_key_of_another_request(probe: _Probe) -> None:
    key = _new_key()
    _expect_success(await probe.bust_once(key, target=_TARGET, strategy="direct"))
    for fields in ({"target": f"{_TARGET}.map", "strategy": "direct"}, {"target": _TARGET, "strategy": "dimensional"}):
        answer = await probe.bust_once(key, **fields)
        _expect_problem(answer, 422, _KEY)


async def _refuses_what_is_no_key(probe: _Probe) -> None:
    for key in ("x" * 256, "two words"):
        answer = await probe.bust_once(key, target=_TARGET)
        _expect_problem(answer, 400, _KEY)


async def _remembers_no_refusal(probe: _Probe) -> None:
    for refused in ({"target": ""}, {"target": _TARGET, "strategy": "no-such-strategy"}):
        key = _new_key()
        first = await probe.bust_once(key, **refused)
        if first.status in {200, _ACCEPTED}:  # a daemon may take any strategy
            continue
        _expect(first, 400, 422)
        answer = await probe.bust_once(key, target=_TARGET)
        _expect_success(answer)
        if _REPLAYED in answer.headers:
            raise _Unmet(f"the first success of a key has {_REPLAYED}")


def _new_key() -> str:
    return f"conformance-{secrets.token_hex(16)}"


# Kinds of busts, and how


async def _repeats_what_was_asked(probe: _Probe) -> None:
    target = probe.new_target()
    _expect_told(await probe.bust(target=target, strategy="direct"), target)
    for fields in await _askable(probe):
        named = EVERYTHING if fields.get("kind") == "all" else target
        _expect_told(await probe.bust(target=named, strategy="direct", **fields), named, **fields)


async def _askable(probe: _Probe) -> list[dict[str, object]]:
    """Tell what can be asked of this daemon that it must repeat: each field, and all together; nothing that is wide."""
    kinds: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    others: list[dict[str, object]] = [{name: True} for name in ("soft", "dry_run") if probe.offers(name)]
    if probe.offers("namespace") and (own := await _namespaces(probe)):
        others.append({"namespace": own[0]})
    together = {name: value for fields in (*kinds, *others) for name, value in fields.items()}
    if probe.offers("all") and (apart := await _apart(probe)):
        kinds.append({"kind": "all", "confirm": True, **apart})
    return [*kinds, *others, together]


async def _claims_nothing_else(probe: _Probe) -> None:
    """Ask for what is not advertised. A daemon of the base ignores a field, and a client sees it by the answer."""
    knows_kinds = any(probe.offers(kind) for kind in KINDS)
    ignored = False
    for kind in (*(kind for kind in KINDS if kind != "key" and not probe.offers(kind)), "no-such-kind"):
        target = probe.new_target()
        answer = await probe.bust(target=target, strategy="direct", kind=kind, confirm=True)
        if answer.status in _REFUSED:
            continue
        if _expect_bust(answer, target).kind not in {None, "key"}:
            raise _Unmet(f"it says that it did a bust of the kind {kind}, which it does not advertise")
        if knows_kinds:
            raise _Unmet(f"it takes the kind {kind}, which it does not advertise, for a key; it must refuse it")
        ignored = True
    for name, value in (("soft", True), ("dry_run", True), ("namespace", "conformance")):
        if not probe.offers(name):
            target = probe.new_target()
            answer = await probe.bust(target=target, strategy="direct", **{name: value})
            if answer.status not in _REFUSED and getattr(_expect_bust(answer, target), name):
                raise _Unmet(f"it says that it kept to {name}, which it does not advertise")
    if ignored:
        raise _Skipped("it knows no kinds: it ignores the field and does not repeat it, which clients take for a fault")


async def _refuses_what_fields_cannot_be(probe: _Probe) -> None:
    wrong: dict[str, tuple[object, ...]] = {
        "soft": ("yes", 1),
        "dry_run": ("yes", 0),
        "verify": ("yes", 1),
        "settle": (-1, 3601, "soon", True),
    }
    values = {name: given for name, given in wrong.items() if probe.offers(name)}
    if any(probe.offers(kind) for kind in KINDS):
        values["kind"] = ("", "no-such-kind", 7)
    await _refuses_each(probe, values)


async def _refuses_what_is_no_namespace(probe: _Probe) -> None:
    await _refuses_each(probe, {"namespace": ("", " ", "two words", ".hidden", "a/b", "é", "x" * 65, 7)})


async def _refuses_each(probe: _Probe, values: Mapping[str, Sequence[object]]) -> None:
    """Expect that a bust is refused with each of these values, by the name of its field, and has no effect."""
    key = probe.new_target()
    held = await _holds_again(probe, key)
    for name, given in values.items():
        for value in given:
            try:
                _expect_problem(await probe.bust(target=key, strategy="direct", **{name: value}), 422, name)
            except _Unmet as unmet:
                raise _Unmet(f"{name} {str(value)[:20]!r}: {unmet}") from unmet
    await _expect_held(probe, key, held, "a refused bust removed an entry")


async def _refuses_everything_unconfirmed(probe: _Probe) -> None:
    apart = await _apart(probe) or {}
    where = {name: value for name, value in apart.items() if name == "namespace"}
    key = probe.new_target()
    held = await _holds_again(probe, key, **where)
    for how, fields in (
        ("without confirm", {"target": EVERYTHING}),
        ("with confirm false", {"target": EVERYTHING, "confirm": False}),
        ("with confirm 1", {"target": EVERYTHING, "confirm": 1}),
        (f"with another target than {EVERYTHING}", {"target": key, "confirm": True}),
    ):
        answer = await probe.bust(strategy="direct", kind="all", **fields, **apart)
        if answer.status in {200, _ACCEPTED}:
            raise _Unmet(f"everything is busted {how}: answered HTTP {answer.status}, expected 422")
        _expect(answer, 422)
        field_name = _read(Problem, answer).field
        if field_name not in {None, "confirm", "target"}:
            raise _Unmet(f"the problem of busting everything {how} names the field {field_name!r}")
    await _expect_held(probe, key, held, "a refused bust of everything removed an entry", **where)


async def _busts_everything(probe: _Probe) -> None:
    own, other = await _expect_namespaces(probe)
    key = probe.new_target()
    held = await _holds(probe, key, namespace=own)
    for namespace, entries in ((own, ("", "/b", "c")), (other, ("",)), (None, ("",))):
        for entry in entries:
            await _register(probe, key + entry, namespace=namespace)
    reply = await _busted(probe, EVERYTHING, kind="all", confirm=True, namespace=own)
    _expect_count("a bust of everything in a namespace of 3 entries", "removed", reply.removed, 3, held=held)
    for namespace in (other, None):
        whose = "another namespace" if namespace else "the default namespace"
        await _expect_held(
            probe, key, held, f"a bust of everything in a namespace reached {whose}", namespace=namespace
        )


async def _busts_by_prefix(probe: _Probe) -> None:
    key = probe.new_target()
    held = await _holds(probe, key)
    below = (key, *(f"{key}{mark}c" for mark in SEPARATORS), f"{key}/c/d")
    beside = (f"{key}c", f"{key}c/d", f"{key}.c", f"{key}*")
    entries = [entry for entry in (*below, *beside) if await _registers(probe, entry)]
    covered = sum(entry in below for entry in entries)
    reply = await _busted(probe, key, kind="prefix")
    _expect_count(f"a bust by a prefix of {covered} entries", "removed", reply.removed, covered, held=held)
    for entry in beside:
        if entry in entries:
            why = f"a bust by the prefix a/b reached a/b{entry.removeprefix(key)}, which does not lie below it"
            await _expect_held(probe, entry, held, why)
    for entry in (key, f"{key}/c"):
        await _register(probe, entry)
    reply = await _busted(probe, f"{key}/", kind="prefix")
    _expect_count("a bust by a prefix that ends with /, of one entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a bust by the prefix a/b/ reached a/b")


async def _busts_by_tag(probe: _Probe) -> None:
    key = probe.new_target()
    tag, other = f"{key}/tag", f"{key}/tag/other"
    held = await _holds(probe, key)
    for entry, tags in ((f"{key}/a", (tag, other)), (f"{key}/b", (tag,)), (f"{key}/c", (other,)), (tag, ())):
        await _register(probe, entry, tags=tags)
    reply = await _busted(probe, tag, kind="tag")
    _expect_count("a bust by a tag of 2 entries", "removed", reply.removed, 2, held=held)
    await _expect_held(probe, f"{key}/c", held, "a bust by a tag reached an entry with another")
    await _expect_held(probe, tag, held, "a bust by a tag reached the key that is called so")


async def _marks_as_stale(probe: _Probe) -> None:
    key = probe.new_target()
    held = await _holds(probe, key)
    await _register(probe, key)
    reply = await _busted(probe, key, soft=True)
    _expect_count("a soft bust of one entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a soft bust removed the entry, which should be stale")


async def _keeps_namespaces_apart(probe: _Probe) -> None:
    own, other = await _expect_namespaces(probe)
    key = probe.new_target()
    held = await _holds(probe, key, namespace=own)
    for namespace in (own, other, None):
        await _register(probe, key, namespace=namespace)
    reply = await _busted(probe, key, namespace=own)
    _expect_count("a bust in a namespace with one such entry", "removed", reply.removed, 1, held=held)
    await _expect_held(probe, key, held, "a bust in a namespace reached another", namespace=other)
    await _expect_held(probe, key, held, "a bust in a namespace reached the default one")


async def _removes_nothing_in_a_dry_run(probe: _Probe) -> None:
    key = probe.new_target()
    tag = f"{key}/tag"
    held = await _holds(probe, key)
    asked: list[tuple[str, dict[str, object], int]] = [(key, {"strategy": "dimensional"}, 2)]
    asked += [(key, {"kind": "prefix"}, 2)] if probe.offers("prefix") else []
    asked += [(tag, {"kind": "tag"}, 1)] if probe.offers("tag") else []
    for target, fields, count in asked:
        await _register(probe, key)
        await _register(probe, f"{key}/page", key, tags=[tag])
        for _ in range(2):
            told = (await _busted(probe, target, **fields, dry_run=True)).matched
            _expect_count(f"a dry run over {count} entries", "matched", told, count, held=held)
        removed = (await _busted(probe, target, **fields)).removed
        _expect_count(f"the bust after a dry run over {count} entries", "removed", removed, count, held=held)
        told = (await _busted(probe, target, **fields, dry_run=True)).matched
        _expect_count("a dry run after the bust", "matched", told, 0, held=held)


async def _verifies(probe: _Probe) -> None:
    key = probe.new_target()
    if probe.advertises(*_REGISTERS):
        await _register(probe, key)
    await _busted(probe, key, verify=True)


async def _tells_when_it_settles(probe: _Probe) -> None:
    for seconds in (0, 0.5):
        target = probe.new_target()
        answer = await probe.bust(target=target, strategy="direct", settle=seconds)
        reply = _expect_told(answer, target, settle=seconds)
        if reply.accepted or not reply.layers:
            raise _Skipped("it tells nothing of its layers")
        told = {layer.settle or 0 for layer in reply.layers}
        if seconds not in told or (seconds == 0 and len(told) > 1):
            found = ", ".join(f"{layer.name} {layer.settle or 0:g}" for layer in reply.layers)
            raise _Unmet(f"a bust with settle {seconds:g} is told to settle otherwise ({found})")


async def _busts_again(probe: _Probe) -> None:
    held = await _holds(probe, probe.new_target())
    if not held:
        raise _Skipped("not decided: the cache does not hold what is only registered")
    clock = asyncio.get_running_loop().time
    wait = _SETTLE
    while True:
        key, begun = probe.new_target(), clock()
        await _busted(probe, key, settle=wait)
        await _register(probe, key)
        if clock() - begun < wait:  # so that it was stored before the second bust
            break
        wait *= 2
        if wait > _LATE:
            raise _Skipped(f"not decided: two requests take it more than {_LATE:g} s")
    while (await _busted(probe, key, dry_run=True)).matched:
        if clock() - begun > wait + _LATE:
            raise _Unmet(f"what was stored before the second bust was due is still there {_LATE:g} s after it")
        await asyncio.sleep(_PAUSE)


async def _tells_its_layers(probe: _Probe) -> None:
    target = probe.new_target()
    reply = _expect_bust(await probe.bust(target=target, strategy="direct"), target)
    if not reply.layers:
        raise _Skipped("it tells nothing of its layers")
    names = [layer.name for layer in reply.layers]
    if len(set(names)) < len(names) or "" in names:
        raise _Unmet(f"it has two layers of one name, or one without a name: {', '.join(names)}")
    failed = [layer for layer in reply.layers if not layer.ok]
    if failed and not reply.accepted:
        raise _Unmet(f"it answers HTTP 200 to a bust that failed in the layer {failed[0].name}")
    if any(not layer.error for layer in failed):
        raise _Unmet("a layer failed, and does not say why in error")
    total = sum(layer.removed for layer in reply.layers)
    if reply.removed is not None and reply.removed != total:
        raise _Unmet(f"removed is {reply.removed}, and of its layers together {total}")


async def _refuses_a_key_of_another_kind(probe: _Probe) -> None:
    key, target = _new_key(), probe.new_target()
    _expect_success(await probe.bust_once(key, target=target, strategy="direct"))
    asked: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    asked += [{"soft": True}] if probe.offers("soft") else []
    asked += [{"namespace": name} for name in (await _namespaces(probe))[:1]] if probe.offers("namespace") else []
    for fields in asked:
        try:
            _expect_problem(await probe.bust_once(key, target=target, strategy="direct", **fields), 422, _KEY)
        except _Unmet as unmet:
            raise _Unmet(f"the key of a plain bust with another {next(iter(fields))}: {unmet}") from unmet


async def _holds_again(probe: _Probe, key: str, **where: Any) -> bool:
    """Register an entry, if that is possible; tell whether the cache holds it, as far as it tells."""
    if not probe.advertises(*_REGISTERS):
        return False
    held = await _holds(probe, key, **where)
    await _register(probe, key, **where)
    return held


async def _expect_held(probe: _Probe, key: str, held: bool, why: str, **where: Any) -> None:
    """Expect that an entry is still there, if the cache holds such; it goes now."""
    if held and await _removed(probe, key, **where) != 1:
        raise _Unmet(why)


async def _namespaces(probe: _Probe) -> tuple[str, ...]:
    """Tell the two namespaces of this run; none if the daemon serves only those that it was told."""
    target = probe.new_target()
    answer = await probe.bust(target=target, strategy="direct", namespace=probe.namespaces[0])
    if answer.status == 422 and _read(Problem, answer).field == "namespace":
        return ()
    _expect_told(answer, target, namespace=probe.namespaces[0])
    return probe.namespaces


async def _expect_namespaces(probe: _Probe) -> tuple[str, str]:
    if not await _namespaces(probe):
        raise _Skipped("it serves no namespaces but its own")
    return probe.namespaces


async def _apart(probe: _Probe) -> dict[str, object] | None:
    """Tell fields with which a bust of everything removes nothing of anybody else's; None if there are none."""
    if probe.offers("namespace") and (own := await _namespaces(probe)):
        return {"namespace": own[0]}
    return {"dry_run": True} if probe.offers("dry_run") else None


# Jobs


async def _tells_how_a_bust_stands(probe: _Probe) -> None:
    more: dict[str, object] = {"kind": "tag"} if probe.offers("tag") else {}
    more |= {"soft": True} if probe.offers("soft") else {}
    for fields in ({}, more):
        target, asked = probe.new_target(), {"binding": "conformance", "reason": f"because of {_new_key()}", **fields}
        reply, strategy = await _with_job(probe, target, **asked)
        job = await _job(probe, reply.job)
        told = {"target": target, "kind": "key", "soft": False, **asked, "strategy": strategy}
        for name, value in told.items():
            if (found := getattr(job, name)) != value:
                raise _Unmet(f"a job tells {name} {found!r}, and {value!r} was asked")
        await _followed(probe, reply)
        job = await _job(probe, reply.job)
        if (job.ended is not None) != (job.state in OVER):
            raise _Unmet(f"a job that is {job.state} {'tells' if job.ended else 'does not tell'} when it ended")
        if job.progress.total is not None and job.progress.done > job.progress.total:
            raise _Unmet(f"a job has done {job.progress.done} of {job.progress.total} entries")


async def _lists_jobs(probe: _Probe) -> None:
    older, _ = await _with_job(probe, probe.new_target())
    newer, _ = await _with_job(probe, probe.new_target())
    names = [job.job for job in (await _jobs(probe, "limit=1000"))]
    if older.job not in names or newer.job not in names:
        raise _Unmet("a bust that has a job is not in the list of them")
    if names.index(newer.job) > names.index(older.job):
        raise _Unmet("the newest job is not listed first")
    if (count := len(await _jobs(probe, "limit=1"))) != 1:
        raise _Unmet(f"with limit=1 it lists {count} jobs")
    names = [job.job for job in (await _jobs(probe, f"limit=1000&before={newer.job}"))]
    if older.job not in names or newer.job in names:
        raise _Unmet("before does not leave out what is not older than that job")
    for job in await _jobs(probe, "limit=1000&state=cancelled"):
        if job.state != "cancelled":
            raise _Unmet(f"with state=cancelled it lists a job that is {job.state}")


async def _refuses_what_is_no_question(probe: _Probe) -> None:
    for name, query in (
        ("limit", "limit=0"),
        ("limit", "limit=1001"),
        ("limit", "limit=all"),
        ("state", "state=over"),
    ):
        try:
            _expect_problem(await probe.send("GET", f"{_JOBS}?{query}"), 422, name)
        except _Unmet as unmet:
            raise _Unmet(f"?{query}: {unmet}") from unmet


async def _knows_no_other_job(probe: _Probe) -> None:
    for method in ("GET", "DELETE"):
        answer = await probe.send(method, f"{_JOBS}/{_new_key()}")
        _expect(answer, 404)
        if (kind := _read(Problem, answer).type) != _NO_SUCH_JOB:
            raise _Unmet(f"{method} of a job that is not known is a problem of type {kind}, not {_NO_SUCH_JOB}")


async def _cancels(probe: _Probe) -> None:
    more: dict[str, object] = {"settle": 60} if probe.offers("settle") else {}  # so that it is not over at once
    reply, _ = await _with_job(probe, probe.new_target(), **more)
    first = await _cancelled(probe, reply.job)
    if first.state not in OVER:
        raise _Unmet(f"a job is {first.state} after it was cancelled")
    if more and first.state != "cancelled":
        raise _Unmet(f"a job that would go on for 60 s is {first.state} after it was cancelled")
    for again in (await _cancelled(probe, reply.job), await _job(probe, reply.job)):
        if (again.state, again.ended) != (first.state, first.ended):
            raise _Unmet(f"a job that was {first.state} is {again.state} when it is asked for again, or ended again")


async def _leaves_what_is_over(probe: _Probe) -> None:
    more: dict[str, object] = {"settle": 0} if probe.offers("settle") else {}
    reply, _ = await _with_job(probe, probe.new_target(), **more)
    await _followed(probe, reply)
    before = await _job(probe, reply.job)
    if before.state != "done":
        raise _Skipped(f"not decided: the job is {before.state}")
    after = await _cancelled(probe, reply.job)
    if (after.state, after.ended) != (before.state, before.ended):
        raise _Unmet(f"a job that was done is {after.state} after it was cancelled, or ended again")


async def _keeps_the_job_of_a_key(probe: _Probe) -> None:
    key, target = _new_key(), probe.new_target()
    strategy = await _widest(probe)
    first = await probe.bust_once(key, target=target, strategy=strategy)
    reply = _expect_bust(first, target)
    if reply.job is None:
        raise _Skipped(_NO_JOB)
    for _ in range(2):
        _expect_replay(first, await probe.bust_once(key, target=target, strategy=strategy))
        await _followed(probe, reply)


async def _with_job(probe: _Probe, target: str, **fields: object) -> tuple[BustReply, str]:
    """Bust something so that it may become a job; return the answer, which names it, and with which strategy."""
    strategy = await _widest(probe)
    reply = _expect_told(await probe.bust(target=target, strategy=strategy, **fields), target, **fields)
    if reply.job is None:
        raise _Skipped(_NO_JOB)
    return reply, strategy


async def _widest(probe: _Probe) -> str:
    """Tell the strategy of which a part may be left for later, if the daemon knows it."""
    answer = await probe.send("GET", _CAPABILITIES)
    document = _read(CapabilityDocument, answer) if answer.status == 200 else None
    return "hybrid" if document is not None and "hybrid" in document.supported_strategies else "dimensional"


async def _job(probe: _Probe, job: str | None) -> JobReply:
    return _expect_job(await probe.send("GET", f"{_JOBS}/{job}"), job)


async def _cancelled(probe: _Probe, job: str | None) -> JobReply:
    return _expect_job(await probe.send("DELETE", f"{_JOBS}/{job}"), job)


async def _jobs(probe: _Probe, query: str) -> tuple[JobReply, ...]:
    answer = await probe.send("GET", f"{_JOBS}?{query}")
    _expect(answer, 200)
    return _read(JobsReply, answer).jobs


async def _followed(probe: _Probe, reply: BustReply) -> BustReply:
    """Wait until a bust that is a job is applied; return its answer with what it removed."""
    if not reply.accepted:
        return reply
    until = asyncio.get_running_loop().time() + _LATE
    while (job := await _job(probe, reply.job)).state not in {*OVER, "settling"}:
        if asyncio.get_running_loop().time() > until:
            raise _Skipped(f"not decided: a job is still {job.state} after {_LATE:g} s")
        await asyncio.sleep(_PAUSE)
    if job.state in {"cancelled", "failed"}:
        raise _Unmet(f"a job that nobody cancelled is {job.state}")
    return reply.model_copy(update={"removed": job.removed})


async def _busted(probe: _Probe, target: str, **fields: object) -> BustReply:
    """Have something busted to its end, by default directly; expect the answer to just this question."""
    fields = {"strategy": "direct", **fields}
    return await _followed(probe, _expect_told(await probe.bust(target=target, **fields), target, **fields))


# Events


async def _tells_of_busts(probe: _Probe) -> None:
    key = probe.new_target()
    await _bust_told(probe, f"{key}/before")
    async with probe.follow(key) as stream:
        await stream.begin()
        if stream.first != "live":
            raise _Unmet(f"a stream that goes on from no id begins with {stream.first}, not with live")
        heartbeat = stream.live.heartbeat if stream.live is not None else 0.0
        if not 0 < heartbeat < float("inf"):
            raise _Unmet(f"the heartbeat that it says is {heartbeat:g} s")
        await _bust_told(probe, key)
        _expect_event(await stream.until(key), key)


async def _tells_in_order(probe: _Probe) -> None:
    key = probe.new_target()
    names = [f"{key}/{number}" for number in range(5)]
    async with probe.follow(key) as stream, probe.follow(key) as other:
        for reader in (stream, other):
            await reader.begin()
        for name in names:
            await _bust_told(probe, name)
        for reader in (stream, other):
            await reader.until(names[-1])
            if reader.targets != names:
                raise _Unmet("five busts, one after another, are told in another order, or not all")
        if _upto(stream.told, other.number) != _upto(other.told, stream.number):
            raise _Unmet("two readers are told of a bust under other ids")


async def _tells_what_was_asked(probe: _Probe) -> None:
    key = probe.new_target()
    own = (await _namespaces(probe))[:1] if probe.offers("namespace") else ()
    asked: list[dict[str, object]] = [{"kind": kind} for kind in ("prefix", "tag") if probe.offers(kind)]
    asked += [{"soft": True}] if probe.offers("soft") else []
    asked += [{"strategy": strategy} for strategy in ("direct", "dimensional")]
    for namespace in (None, *own):
        where: dict[str, object] = {} if namespace is None else {"namespace": namespace}
        wanted = () if namespace is None else (("namespace", namespace),)
        async with probe.follow(key, *wanted) as stream:
            await stream.begin()
            for number, fields in enumerate(asked):
                await _bust_told(probe, f"{key}/{number}", **fields, **where)
                _expect_event(await stream.until(f"{key}/{number}"), f"{key}/{number}", **fields, **where)
            if namespace and probe.offers("all"):
                await _bust_told(probe, EVERYTHING, kind="all", confirm=True, **where)
                _expect_event(await stream.until(EVERYTHING), EVERYTHING, kind="all", **where)


async def _tells_what_was_missed(probe: _Probe) -> None:
    key = probe.new_target()
    names = [f"{key}/{number}" for number in range(4)]
    async with probe.follow(key) as staying:
        await staying.begin()
        async with probe.follow(key) as going:
            await going.begin()
            await _bust_told(probe, names[0])
            await going.until(names[0])
        for name in names[1:]:
            await _bust_told(probe, name)
        await staying.until(names[-1])
        since = [told for told in staying.told if told.number > going.number]
        async with probe.follow(key, after=going.place) as back:
            await back.begin()
        if (back.epoch, _upto(back.missed, staying.number)) != (staying.epoch, since):
            told, count = len(_upto(back.missed, staying.number)), len(since)
            raise _Unmet(
                f"who comes back is told {told} of {count} events that were missed before it is live, or others"
            )
        async with probe.follow(key, after=staying.place) as back:
            await back.begin()
            await _bust_told(probe, key)
            await back.until(key)
        if _upto(back.missed, staying.number):
            raise _Unmet("who comes back and has missed nothing is told again what was told")


async def _has_forgotten(probe: _Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as reader:
        await reader.begin()
        await _bust_told(probe, f"{key}/before")
        await reader.until(f"{key}/before")
    epoch, number = reader.epoch, reader.number
    for what, place in (
        ("of another epoch", f"{secrets.token_hex(8)}-{number}"),
        ("that was never given", f"{epoch}-{number + 10**15}"),
        ("that is none", "nonsense"),
        ("with a number that is none", f"{epoch}-{number}x"),
    ):
        async with probe.follow(key, after=place) as back:
            try:
                await back.begin(forgets=True)
            except _Unmet as unmet:
                raise _Unmet(f"after an id {what}: {unmet}") from unmet
            if back.missed or key in (back.reset or ""):
                raise _Unmet(f"after an id {what} a reset tells what was busted")
            if (back.epoch, back.reset_at >= number) != (epoch, True):
                raise _Unmet(f"after an id {what} a reset has another id than the newest event")
            await _bust_told(probe, key)
            await back.until(key)


async def _filters_by_prefix(probe: _Probe) -> None:
    key = probe.new_target()
    direct, wide = {"strategy": "direct"}, {"strategy": "dimensional"}
    through = {f"{key}/{name}": direct for name in ("a", "a/", "a/b", "a:b", "a?b", "a#b", "z/y")}
    without = {f"{key}/{name}": direct for name in ("ab", "ab/c", "a.gz", "z", "A/b", "b/a", "a*")}
    if probe.offers("prefix"):
        through[key] = {"kind": "prefix"}
        without[f"{key}/b"] = {"kind": "prefix"}
    if probe.offers("tag"):
        without[f"{key}/a/c"] = {"kind": "tag"}
    await _expect_filtered(probe, key, (("prefix", f"{key}/a"), ("prefix", f"{key}/z/")), through, without)
    key = probe.new_target()
    through = {f"{key}/a.css": wide, f"{key}/b.css": wide, f"{key}/c.css.gz": direct}
    without = {f"{key}/a": wide, f"{key}/b": wide, f"{key}/c.css": direct, f"{key}/d.css": direct}
    variants = ("a.css?v=1", "b.css.gz", "c.css.gz", "d.css?v=1")
    await _expect_filtered(probe, key, [("prefix", f"{key}/{name}") for name in variants], through, without)


async def _filters_by_tag(probe: _Probe) -> None:
    key = probe.new_target()
    tag, direct = {"kind": "tag"}, {"strategy": "direct"}
    wanted = (("tag", f"{key}/t"), ("tag", f"{key}/u"), ("prefix", f"{key}/p"))
    through = {f"{key}/p": direct, f"{key}/t": tag, f"{key}/u": tag}
    without = {f"{key}/t/a": tag, f"{key}/v": tag, f"{key}/p/q": tag, f"{key}/u/a": direct}
    await _expect_filtered(probe, key, wanted, through, without)
    if probe.advertises(*_REGISTERS):
        entry, held_by = f"{key}/held/entry", f"{key}/held-by"
        async with probe.follow(key, ("prefix", f"{key}/held")) as stream:
            await stream.begin()
            await _register(probe, entry, tags=[held_by])
            await _bust_told(probe, held_by, **tag)
            try:
                await stream.until(held_by)
            except _Silent as silent:
                raise _Unmet("the bust of a tag is not told to who wants the prefix of an entry with it") from silent


async def _tells_namespaces_apart(probe: _Probe) -> None:
    own, other = await _expect_namespaces(probe)
    key = probe.new_target()
    async with (
        probe.follow(key, ("namespace", own)) as one,
        probe.follow(key, ("namespace", other)) as two,
        probe.follow(key) as default,
    ):
        readers: tuple[tuple[_Stream, str | None], ...] = ((one, own), (two, other), (default, None))
        for reader, _ in readers:
            await reader.begin()
        for _, namespace in readers:
            where = {} if namespace is None else {"namespace": namespace}
            await _bust_told(probe, f"{key}/{namespace}", **where)
            await _bust_told(probe, key, **where)
        for reader, namespace in readers:
            await reader.until(key)
            if reader.targets != [f"{key}/{namespace}", key]:
                raise _Unmet("a reader of one namespace is told what was busted in another, or not what was in its own")


async def _tells_of_no_dry_run(probe: _Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as stream:
        await stream.begin()
        await _bust_told(probe, f"{key}/dry", dry_run=True)
        await _bust_told(probe, key)
        await stream.until(key)
        if stream.targets != [key]:
            raise _Unmet("a dry run, which removes nothing, is told as a bust")


async def _tells_what_went_too(probe: _Probe) -> None:
    key = probe.new_target()
    asked: list[tuple[str, dict[str, object]]] = [(f"{key}/part", {"strategy": "dimensional"})]
    asked += [(f"{key}/tag", {"kind": "tag"})] if probe.offers("tag") else []
    async with probe.follow(key) as stream:
        await stream.begin()
        for target, fields in asked:
            await _register(probe, f"{key}/page", f"{key}/part", tags=[f"{key}/tag"] if probe.offers("tag") else [])
            await _bust_told(probe, target, **fields)
            told = await stream.until(target)
            if told.kind != "all" and f"{key}/page" not in told.also:
                why = "has the tag that" if fields.get("kind") else "depends on what"
                raise _Unmet(f"also does not name an entry that {why} was busted")


async def _says_where_it_is(probe: _Probe) -> None:
    key = probe.new_target()
    async with probe.follow(key) as everything, probe.follow(key, ("prefix", f"{key}/nothing")) as nothing:
        await everything.begin()
        await nothing.begin()
        beat = nothing.live.heartbeat if nothing.live is not None else 0.0
        if beat > _LONGEST_BEAT:
            raise _Skipped(f"not decided: it would say so every {beat:g} s only")
        await _bust_told(probe, key)
        await everything.until(key)
        try:
            await nothing.until_place(everything.number, 2 * beat + 1)
        except _Silent as silent:
            said = "says what it said" if nothing.beats else f"says nothing for {2 * beat + 1:g} s"
            raise _Unmet(f"a stream {said}; every {beat:g} s it must say the newest id") from silent


async def _bust_told(probe: _Probe, target: str, **fields: object) -> bool:
    """Have something busted, by default directly and once, so that it is told by the time that it is answered.

    Return whether the cache can have such a key.
    """
    fields = {"strategy": "direct", **({"settle": 0} if probe.offers("settle") else {}), **fields}
    answer = await probe.bust(target=target, **fields)
    if answer.status == 422 and _read(Problem, answer).field == "target":
        return False
    _expect_told(answer, target, **fields)
    return True


def _upto(told: Sequence[_Told], number: int) -> list[_Told]:
    return [one for one in told if one.number <= number]


def _expect_event(told: StreamedBust, target: str, **fields: object) -> None:
    """Expect that a bust is told as it was asked."""
    asked: dict[str, object] = {
        "namespace": DEFAULT_NAMESPACE,
        "kind": "key",
        "target": target,
        "soft": False,
        "strategy": "direct",
        **fields,
    }
    for name, value in asked.items():
        if (found := getattr(told, name)) != value:
            raise _Unmet(f"an event tells {name} {str(found)[:40]!r}, and {str(value)[:40]!r} was asked")


async def _expect_filtered(
    probe: _Probe,
    key: str,
    wanted: Sequence[tuple[str, str]],
    through: Mapping[str, Mapping[str, object]],
    without: Mapping[str, Mapping[str, object]],
) -> None:
    """Expect that who wants this is told of busts of `through`, and of none of `without`, but for what cannot be."""
    asked = ", ".join(f"{name} {text.removeprefix(key)[1:]}" for name, text in wanted)

    def phrase(target: str, fields: Mapping[str, object]) -> str:
        kind = fields.get("kind", "key")
        return f"a {fields.get('strategy', 'direct')} bust of the {kind} {target.removeprefix(key)[1:] or 'above'}"

    async with probe.follow(key, *wanted) as stream:
        await stream.begin()
        busted = {
            target: phrase(target, fields)
            for target, fields in (*without.items(), *through.items())
            if await _bust_told(probe, target, **fields)
        }
        for target in through:
            try:
                if target in busted:
                    await stream.until(target)
            except _Silent as silent:
                raise _Unmet(f"who wants {asked} is not told of {busted[target]}") from silent
        for target in stream.targets:
            if target not in through:
                raise _Unmet(f"who wants {asked} is told of {busted.get(target, 'what was not busted')}")


# Dependencies: announced, resolved, swapped


async def _announces(probe: _Probe) -> None:
    name, other = probe.new_name(), probe.new_name()
    for _ in range(2):
        known = await _announce(probe, name, "1.2.0", "1.0.0", "2.0.0-rc.1")
        _expect_known(known, name, "1.2.0", "1.0.0", "1.2.0", "2.0.0-rc.1")
    known = await _announce(probe, name, "1.10.0", "v1.0.0", current="1.2.0")
    _expect_known(known, name, "1.2.0", "1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1")
    _expect_known(await _announce(probe, other, "2.0.0", current="1.0.0"), other, "1.0.0", "1.0.0", "2.0.0")
    listed = await _listed(probe)
    if listed.get(name) != known or other not in listed:
        raise _Unmet("what was announced is not listed as it was answered")


async def _refuses_announcements(probe: _Probe) -> None:
    name = probe.new_name()
    for field_name, wrong in (
        ("name", {"name": "two words"}),
        ("versions", {"versions": []}),
        ("versions", {"versions": ["1.0.0", "one"]}),
        ("current", {"current": "one"}),
    ):
        answer = await probe.post(_DEPENDENCIES, {"name": name, "versions": ["1.0.0"], **wrong})
        _expect_problem(answer, 422, field_name)
    if name in await _listed(probe):
        raise _Unmet("a dependency is known whose announcement was refused")
    before = await _announce(probe, name, "1.0.0", "1.1.0", current="1.0.0")
    _expect(await probe.post(_DEPENDENCIES, {"name": name, "versions": ["1.2.0"], "current": "1.1.0"}), 409)
    if (await _listed(probe)).get(name) != before:
        raise _Unmet("a refused announcement changed what is known")


async def _forgets(probe: _Probe) -> None:
    name, other = probe.new_name(), probe.new_name()
    for one in (name, other):
        await _announce(probe, one, "1.0.0")
    first = await _forget_first(probe, name)
    for answer in (first, await _forget(probe, name)):  # what is not known is forgotten already
        _expect(answer, 200)
        if _read(ForgetReply, answer).name != name:
            raise _Unmet("it tells that it forgot another dependency")
    listed = await _listed(probe)
    if name in listed or other not in listed:
        raise _Unmet("a forgotten dependency is still listed, or another is not")
    _expect_known(await _announce(probe, name, "0.9.0"), name, "0.9.0", "0.9.0")
    _expect_problem(await _forget(probe, "two words"), 422, "name")


async def _forgets_nothing_in_use(probe: _Probe) -> None:
    name, key = probe.new_name(), probe.new_target()
    before = await _announce(probe, name, "1.0.0")
    await _register(probe, key, name)
    _expect_problem(await _forget_first(probe, name), 409, "name")
    if (await _listed(probe)).get(name) != before:
        raise _Unmet("a dependency changed that could not be forgotten")
    await _register(probe, key)
    _expect(await _forget(probe, name), 200)


async def _resolves(probe: _Probe) -> None:
    name = probe.new_name()
    await _announce(probe, name, "0.9.0-legacy", "1.0.0", "1.2.0", "1.10.0", "2.0.0", "2.1.0-rc.1", current="1.0.0")
    for asked, version, state in (
        ("@^1.0.0", "1.10.0", "stable"),
        ("@1.2.x", "1.2.0", "stable"),
        ("", "2.0.0", "stable"),
        ("@latest", "2.0.0", "stable"),
        ("@<1.0.0", "0.9.0-legacy", "legacy"),
        ("@>2.0.0", "2.1.0-rc.1", "experimental"),
    ):
        answer = await probe.post(_RESOLVE, {"spec": name + asked})
        _expect(answer, 200)
        reply = _read(ResolveReply, answer)
        found = (reply.spec, reply.resolved, reply.version, reply.state)
        if found != (name + asked, f"{name}@{version}", version, state):
            raise _Unmet(f"name{asked} is {reply.version} ({reply.state}), not {version} ({state})")


async def _refuses_specs(probe: _Probe) -> None:
    name = probe.new_name()
    await _announce(probe, name, "1.0.0")
    for spec in (f"{name}@^2.0.0", f"{probe.new_name()}@*", f"{name}@private", "two words@*", ""):
        _expect_problem(await probe.post(_RESOLVE, {"spec": spec}), 422, "spec")


async def _swaps(probe: _Probe) -> None:
    name, other = await _new_pair(probe)
    answer = await _swap(probe, {"name": name, "from": "1.0.0", "to": "1.1.0"}, {"name": other, "to": "1.2.0"})
    reply = _expect_swap(answer)
    told = {(swapped.name, swapped.from_, swapped.to) for swapped in reply.swaps}
    if told != {(name, "1.0.0", "1.1.0"), (other, "1.0.0", "1.2.0")}:
        raise _Unmet("swaps does not tell what was replaced")
    listed = await _listed(probe)
    _expect_known(listed[name], name, "1.1.0", "1.0.0", "1.1.0")
    _expect_known(listed[other], other, "1.2.0", "1.0.0", "1.1.0", "1.2.0")


async def _answers_a_repeated_swap(probe: _Probe) -> None:
    name, other = await _new_pair(probe)
    key, swap = _new_key(), {"name": name, "from": "1.0.0", "to": "1.1.0"}
    first = await _swap(probe, swap, key=key)
    _expect_swap(first)
    _expect_swap(await _swap(probe, {"name": name, "to": "1.0.0"}, key=_new_key()))
    _expect_replay(first, await _swap(probe, swap, key=key))
    await _expect_current(probe, name, "1.0.0")
    _expect_problem(await _swap(probe, {"name": other, "to": "1.1.0"}, key=key), 422, _KEY)
    await _expect_current(probe, other, "1.0.0")


async def _swaps_once_what_comes_at_once(probe: _Probe) -> None:
    for _ in range(_ROUNDS):
        name, _ = await _new_pair(probe)
        swaps = [{"name": name, "from": "1.0.0", "to": "1.1.0"}]
        _expect_one(await probe.post_at_once(_HOTSWAP, {"swaps": swaps}, _new_key()))
        await _expect_current(probe, name, "1.1.0")


async def _remembers_no_refused_swap(probe: _Probe) -> None:
    name, _ = await _new_pair(probe)
    key = _new_key()
    _expect_refused(await _swap(probe, {"name": name, "to": "2.0.0"}, key=key))
    answer = await _swap(probe, {"name": name, "to": "1.1.0"}, key=key)
    _expect_swap(answer)
    if _REPLAYED in answer.headers:
        raise _Unmet(f"the first success of a key has {_REPLAYED}")


async def _keeps_to_the_rules(probe: _Probe) -> None:
    name, _ = await _new_pair(probe)
    for before, to, opted in (
        ("1.0.0", "2.0.0", None),
        ("1.0.0", "1.1.0-rc.1", "allow_experimental"),
        ("1.1.0-rc.1", "1.1.0", "validated"),
        ("1.1.0", "1.0.0-legacy", "rollback"),
        ("1.0.0-legacy", "2.0.0", "migrate"),
    ):
        _expect_refused(await _swap(probe, {"name": name, "to": to}))
        await _expect_current(probe, name, before)
        if opted is not None:
            _expect_swap(await _swap(probe, {"name": name, "to": to, opted: True}))
            await _expect_current(probe, name, to)


async def _swaps_all_or_none(probe: _Probe) -> None:
    name, other = await _new_pair(probe)
    for bad in (
        {"name": other, "to": "2.0.0"},
        {"name": other, "from": "0.9.0", "to": "1.1.0"},
        {"name": probe.new_name(), "to": "1.1.0"},
    ):
        _expect_refused(await _swap(probe, {"name": name, "to": "1.1.0"}, bad))
        await _expect_current(probe, name, "1.0.0")
        await _expect_current(probe, other, "1.0.0")


async def _refuses_what_is_no_swap(probe: _Probe) -> None:
    name, _ = await _new_pair(probe)
    for swaps in ([], [{"name": name}], [{"name": name, "to": "one"}], [{"name": name, "to": "1.1.0", "from": "one"}]):
        _expect_problem(await probe.post(_HOTSWAP, {"swaps": swaps}), 422, "swaps")
    await _expect_current(probe, name, "1.0.0")


async def _busts_dependents(probe: _Probe) -> None:
    key = probe.new_target()
    await _register(probe, f"{key}/page", f"{key}/part")
    await _register(probe, f"{key}/whole", f"{key}/page")
    held = await _holds(probe, f"{key}/part")
    await _register(probe, f"{key}/part")
    reply = await _busted(probe, f"{key}/part", strategy="dimensional")
    _expect_count("a bust of a target with 2 dependents", "removed", reply.removed, 3, held=held)


async def _busts_what_depends(probe: _Probe) -> None:
    name, other = await _new_pair(probe)
    key = probe.new_target()
    held = await _holds(probe, f"{key}/alone")
    await _register(probe, f"{key}/alone", probe.new_name())
    await _register(probe, f"{key}/page", name)
    await _register(probe, f"{key}/part", other, probe.new_name())
    await _register(probe, f"{key}/whole", f"{key}/part")
    for versions, count in ((("1.1.0", "1.1.0"), 3), (("1.0.0", "1.0.0"), 0)):
        swaps = ({"name": swapped, "to": to} for swapped, to in zip((name, other), versions, strict=True))
        reply = _expect_swap(await _swap(probe, *swaps))
        _expect_count(f"a swap of what {count} entries depend on", "busted", reply.busted, count, held=held)
    if held and await _removed(probe, f"{key}/alone") != 1:
        raise _Unmet("an entry was busted that does not depend on what was swapped")


async def _holds(probe: _Probe, key: str, namespace: str | None = None) -> bool:
    """Tell whether the cache holds an entry because it was registered, as far as it tells."""
    await _register(probe, key, namespace=namespace)
    removed = await _removed(probe, key, namespace)
    if removed not in {None, 0, 1}:
        raise _Unmet(f"a direct bust of one entry tells removed {removed}")
    return removed == 1


def _expect_count(what: str, field_name: str, told: int | None, count: int, *, held: bool) -> None:
    """Expect a number; a cache that seems to hold nothing may tell none, which then proves nothing."""
    if told == count:
        return
    if held or told:
        raise _Unmet(f"{what} tells {field_name} {told}, not {count}")
    raise _Skipped(
        f"not decided: {what} tells {field_name} {told}, and so does a bust of an entry just registered; a cache that"
        " does not hold what is only registered is like that, and so is a daemon that busts nothing of it"
    )


async def _new_pair(probe: _Probe) -> tuple[str, str]:
    """Announce two dependencies in versions 1.0.0, which is current, and 1.1.0."""
    names = (probe.new_name(), probe.new_name())
    for name in names:
        _expect_known(await _announce(probe, name, "1.0.0", "1.1.0", current="1.0.0"), name, "1.0.0", "1.0.0", "1.1.0")
    return names


async def _announce(probe: _Probe, name: str, *versions: str, current: str | None = None) -> DependencyReply:
    said = {"name": name, "versions": versions, **({} if current is None else {"current": current})}
    answer = await probe.post(_DEPENDENCIES, said)
    _expect(answer, 200)
    return _read(DependencyReply, answer)


async def _listed(probe: _Probe) -> dict[str, DependencyReply]:
    answer = await probe.send("GET", _DEPENDENCIES)
    _expect(answer, 200)
    return {known.name: known for known in _read(DependenciesReply, answer).dependencies}


async def _forget(probe: _Probe, name: str) -> _Answer:
    return await probe.post(_FORGET, {"name": name})


async def _forget_first(probe: _Probe, name: str) -> _Answer:
    """Do the same where it is not known whether the daemon can forget at all."""
    answer = await _forget(probe, name)
    if answer.status in _MISSING:
        raise _Skipped("it cannot forget dependencies")
    return answer


async def _swap(probe: _Probe, *swaps: Mapping[str, object], key: str | None = None) -> _Answer:
    return await probe.post(_HOTSWAP, {"swaps": swaps}, key)


async def _register(
    probe: _Probe, key: str, *depends_on: str, tags: Sequence[str] = (), namespace: str | None = None
) -> None:
    if not await _registers(probe, key, *depends_on, tags=tags, namespace=namespace):
        raise _Unmet("answered HTTP 422, expected 200")


async def _registers(
    probe: _Probe, key: str, *depends_on: str, tags: Sequence[str] = (), namespace: str | None = None
) -> bool:
    """Register an entry; tell whether the cache can hold it."""
    probe.entries.add((key, namespace))
    said = {"key": key, "depends_on": depends_on, **({"tags": tags} if tags else {})}
    answer = await probe.post(_ENTRIES, {**said, **({} if namespace is None else {"namespace": namespace})})
    if answer.status != 422:
        _expect(answer, 200)
    return answer.status == 200


async def _removed(probe: _Probe, target: str, namespace: str | None = None) -> int | None:
    where: dict[str, object] = {} if namespace is None else {"namespace": namespace}
    return (await _busted(probe, target, **where)).removed


# What is asked for


@final
@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a daemon must do.

    - `strict`: asked of daemons of ours, not of every other
    - `needs`: capabilities without which a daemon is not asked
    - `any_of`: capabilities of which a daemon must have one to be asked, if there are any
    """

    name: str
    run: Callable[[Any], Awaitable[None]]
    strict: bool = False
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check came to.

    - `ok`: it did not fail
    - `detail`: what was found instead, or why it was skipped
    - `skipped`: it was not asked, since the daemon does not advertise what it is about; or its answers decide nothing
    - `answered`: false if it failed for want of an answer
    """

    name: str
    ok: bool
    detail: str = ""
    skipped: bool = False
    answered: bool = True

    @property
    def outcome(self) -> Literal["passed", "failed", "skipped"]:
        """The same in one word."""
        return "skipped" if self.skipped else "passed" if self.ok else "failed"


CHECKS: Final[tuple[Check, ...]] = (
    Check("busts a key and answers with its SHA-256", _busts),
    Check("busts with defaults for every field but the target", _busts_with_defaults),
    Check("ignores fields that it does not know", _ignores_unknown_fields),
    Check("busts the same key again", _busts_the_same_again),
    Check("busts targets of any script, written out or escaped", _busts_in_any_script),
    Check("reads a target of 8192 bytes", _reads_the_longest_target),
    Check("reports no fault stage beyond the scale", _keeps_to_the_scale),
    Check("serves one request after another on a connection", _keeps_its_connections),
    Check("stays in step after a refusal", _stays_in_step),
    Check("reads a body that comes in pieces", _reads_pieces),
    Check("answers HEAD without a body", _answers_head),
    Check("tells its status", _tells_its_status),
    Check("tells its capabilities on one of the two routes", _tells_its_capabilities),
    Check("refuses malformed JSON", _refuses_malformed_json),
    Check("refuses a request without a target", _refuses_a_missing_target),
    Check("refuses a target that is no string", _refuses_a_mistyped_target),
    Check("refuses a fault tolerance beyond a byte", _refuses_a_tolerance_beyond_a_byte),
    Check("refuses other content types than JSON", _refuses_other_content_types),
    Check("refuses other methods than POST for a bust", _refuses_other_methods),
    Check("answers 404 to routes that it does not have", _knows_no_other_route),
    Check("names the field at fault in an RFC 9457 problem", _names_the_field, strict=True),
    Check("has a sound capability document", _has_a_sound_document),
    Check("tells by its ETag that its document is unchanged", _tells_what_is_unchanged, strict=True),
    Check("signs every answer with the digest of its document", _signs_every_answer, strict=True),
    Check("fits this client", _fits),
    Check("tells the access of each capability", _tells_the_access, strict=True),
    Check("keeps to the access that it tells", _keeps_to_the_access),
    Check("answers a capability document with its own", _negotiates, needs=("daemon.negotiate",)),
    Check("refuses what is no capability document", _refuses_what_is_no_document, needs=("daemon.negotiate",)),
    Check("answers a repeat of a key from memory", _answers_a_repeat_from_memory, needs=(_IDEMPOTENT,)),
    Check(
        "applies once what comes with a key many times at once", _applies_once_what_comes_at_once, needs=(_IDEMPOTENT,)
    ),
    Check("refuses a key that belongs to another request", _refuses_a_key_of_another_request, needs=(_IDEMPOTENT,)),
    Check("refuses what cannot be a key", _refuses_what_is_no_key, needs=(_IDEMPOTENT,)),
    Check("remembers no refusal under a key", _remembers_no_refusal, needs=(_IDEMPOTENT,)),
    Check(
        "refuses a key that belongs to another kind of bust",
        _refuses_a_key_of_another_kind,
        needs=(_IDEMPOTENT,),
        any_of=_of_all("prefix", "tag", "soft", "namespace"),
    ),
    Check("tells each of its layers, and none that failed as done", _tells_its_layers),
    Check(
        "repeats the kind, the namespace, soft and dry_run as they were asked",
        _repeats_what_was_asked,
        any_of=_of_all("prefix", "tag", "all", "soft", "namespace", "dry_run"),
    ),
    Check("claims no kind of bust that it does not advertise", _claims_nothing_else),
    Check(
        "refuses what the fields of a bust cannot be",
        _refuses_what_fields_cannot_be,
        any_of=_of_all("prefix", "tag", "all", "soft", "dry_run", "verify", "settle"),
    ),
    Check("refuses what is no namespace, the empty one too", _refuses_what_is_no_namespace, needs=_of_all("namespace")),
    Check("refuses to bust everything without confirm", _refuses_everything_unconfirmed, needs=_of_all("all")),
    Check(
        "busts everything in a namespace, and nothing beyond",
        _busts_everything,
        needs=(*_of_all("all", "namespace"), *_REGISTERS),
    ),
    Check(
        "busts by prefix what lies below it, by whole segments",
        _busts_by_prefix,
        needs=(*_of_all("prefix"), *_REGISTERS),
    ),
    Check("busts by tag what has it, and nothing else", _busts_by_tag, needs=(*_of_all("tag"), *_REGISTERS)),
    Check("marks as stale in a soft bust, and removes nothing", _marks_as_stale, needs=(*_of_all("soft"), *_REGISTERS)),
    Check("keeps namespaces apart", _keeps_namespaces_apart, needs=(*_of_all("namespace"), *_REGISTERS)),
    Check(
        "removes nothing in a dry run, and tells what the bust then removes",
        _removes_nothing_in_a_dry_run,
        needs=(*_of_all("dry_run"), *_REGISTERS),
    ),
    Check("says that it verified a bust", _verifies, needs=_of_all("verify")),
    Check("tells when it settles", _tells_when_it_settles, needs=_of_all("settle")),
    Check("busts again after settle", _busts_again, needs=(*_of_all("settle", "dry_run"), *_REGISTERS)),
    Check("tells how a bust stands under its job", _tells_how_a_bust_stands, needs=_of_all("jobs")),
    Check("lists jobs, the newest first", _lists_jobs, needs=_of_all("jobs")),
    Check("refuses questions about jobs that cannot be", _refuses_what_is_no_question, needs=_of_all("jobs")),
    Check("answers 404 to jobs that it does not know", _knows_no_other_job, needs=_of_all("jobs")),
    Check("cancels jobs, once", _cancels, needs=_of_all("jobs")),
    Check("leaves jobs that are over as they are", _leaves_what_is_over, needs=_of_all("jobs")),
    Check("keeps the job of a key for its repeats", _keeps_the_job_of_a_key, needs=(*_of_all("jobs"), _IDEMPOTENT)),
    Check("tells of busts in a stream, from when it says that it is live", _tells_of_busts, needs=_TELLS),
    Check("tells busts in their order, under ids that rise", _tells_in_order, needs=_TELLS),
    Check("tells in an event what was asked of the bust", _tells_what_was_asked, needs=_TELLS),
    Check("tells who comes back exactly what was missed", _tells_what_was_missed, needs=_TELLS),
    Check("has a reader forget who comes back with an id that it does not know", _has_forgotten, needs=_TELLS),
    Check("leaves out of a stream what concerns none of its prefixes, and no more", _filters_by_prefix, needs=_TELLS),
    Check(
        "leaves out of a stream what concerns none of its tags, and no more",
        _filters_by_tag,
        needs=(*_TELLS, *_of_all("tag")),
    ),
    Check("tells each namespace its own busts", _tells_namespaces_apart, needs=(*_TELLS, *_of_all("namespace"))),
    Check("tells of no dry run", _tells_of_no_dry_run, needs=(*_TELLS, *_of_all("dry_run"))),
    Check("tells what went with what was busted", _tells_what_went_too, needs=(*_TELLS, *_REGISTERS)),
    Check("says with each heartbeat how far it is", _says_where_it_is, needs=_TELLS),
    Check("busts what depends on what is busted", _busts_dependents, needs=_REGISTERS),
    Check("keeps what is announced of dependencies", _announces, needs=_KNOWS),
    Check("refuses announcements that say no dependency", _refuses_announcements, needs=_KNOWS),
    Check("forgets dependencies", _forgets, needs=_KNOWS),
    Check("forgets no dependency in use", _forgets_nothing_in_use, needs=(*_KNOWS, *_REGISTERS)),
    Check("resolves a spec to the best known version", _resolves, needs=_RESOLVES),
    Check("refuses specs that mean no known version", _refuses_specs, needs=_RESOLVES),
    Check("swaps dependencies", _swaps, needs=_SWAPS),
    Check("answers a repeated swap from memory", _answers_a_repeated_swap, needs=_SWAPS),
    Check("swaps once what comes with a key many times at once", _swaps_once_what_comes_at_once, needs=_SWAPS),
    Check("remembers no refused swap under a key", _remembers_no_refused_swap, needs=_SWAPS),
    Check("keeps to the rules of hot swaps", _keeps_to_the_rules, needs=_SWAPS),
    Check("swaps all or none", _swaps_all_or_none, needs=_SWAPS),
    Check("refuses what is no swap", _refuses_what_is_no_swap, needs=_SWAPS),
    Check("busts what depends on what is swapped", _busts_what_depends, needs=(*_SWAPS, *_REGISTERS)),
)
"""The base protocol and the extensions, as checks."""


async def check_daemon(
    url: str, *, token: str | None = None, strict: bool = False, timeout: float = 10.0
) -> tuple[Verdict, ...]:
    """Run the checks of the base protocol, and of what it advertises, against the daemon at `url`; tell their verdicts.

    - `strict`: also what only daemons of ours must do
    - `timeout`: seconds for each request

    The checks bust and register keys that begin with "conformance/", also in namespaces that begin with "conformance-",
    and announce dependencies whose names begin so, ever new ones, and have these forgotten at the end. Everything is
    busted in such a namespace only, or as a dry run. What the daemon does not advertise is skipped, which is no
    failure. Raises `ConfigurationError` for a URL that is none, and for a token that is none or would cross
    a network in clear text; a daemon that does not answer makes verdicts that say so, and after three of them in a row
    it is asked no more.
    """
    address = DaemonAddress.parse(url)
    headers = {} if token is None else {"Authorization": f"Bearer {_checked(token, address)}"}
    async with _Probe(address, headers, timeout) as probe:
        probe.advertised = await _advertised(probe)
        verdicts: list[Verdict] = []
        for check in [check for check in CHECKS if strict or not check.strict]:
            over = _is_given_up(verdicts)
            verdicts.append(_not_asked(check) if over else await _judge(check, probe))
        await _clean_up(probe, verdicts)
        return tuple(verdicts)


async def _clean_up(probe: _Probe, verdicts: Sequence[Verdict]) -> None:
    """Have forgotten what was announced and registered, as far as that goes: no verdict depends on it."""
    if _is_given_up(verdicts):
        return
    with suppress(_Unmet, _Skipped, aiohttp.ClientError, TimeoutError, OSError):
        for key, namespace in sorted(probe.entries, key=str):
            if await _registers(probe, key, namespace=namespace):  # so that it has nothing, also where it is not held
                await _removed(probe, key, namespace)
        for name in sorted(probe.names.intersection(await _listed(probe) if probe.names else ())):
            await _forget(probe, name)


def _is_given_up(verdicts: Sequence[Verdict]) -> bool:
    """Tell whether the last checks went unanswered, so that more of them would only cost time."""
    recent = verdicts[-_PATIENCE:]
    return len(recent) == _PATIENCE and not any(verdict.answered for verdict in recent)


def _not_asked(check: Check) -> Verdict:
    return Verdict(check.name, ok=False, detail="not asked any more", answered=False)


def _checked(token: str, address: DaemonAddress) -> str:
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigurationError("token must be visible ASCII characters without spaces", setting="token")
    if not (address.is_encrypted or address.is_local):
        raise ConfigurationError(f"the token would go to {address} in clear text; use https://", setting="token")
    return token


async def _advertised(probe: _Probe) -> frozenset[str]:
    """Tell what the daemon says it can do, and say the same of us; bad answers are for a check to tell."""
    try:
        answer = await probe.send("GET", _CAPABILITIES)
        if answer.status == 200:
            found = frozenset(_read(CapabilityDocument, answer).capabilities)
            if "daemon.negotiate" in found:
                await probe.send("POST", _CAPABILITIES, advertisement_bytes())
            return found
        answer = await probe.send("GET", "/api/v1/bindings/capabilities")
        if answer.status == 200:
            bindings = _BINDINGS.validate_json(answer.body)
            return frozenset(name for binding in bindings.values() for name in binding.capabilities)
    except (_Unmet, ValidationError, aiohttp.ClientError, OSError):
        pass
    return frozenset()


async def _judge(check: Check, probe: _Probe) -> Verdict:
    missing = [name for name in check.needs if not probe.advertises(name)]
    if check.any_of and not any(map(probe.advertises, check.any_of)):
        missing.append(f"any of {', '.join(check.any_of)}")
    if missing:
        return Verdict(check.name, ok=True, detail=f"it does not advertise {', '.join(missing)}", skipped=True)
    try:
        await check.run(probe)
    except _Skipped as reason:
        return Verdict(check.name, ok=True, detail=str(reason), skipped=True)
    except _Unmet as unmet:
        return Verdict(check.name, ok=False, detail=str(unmet))
    except aiohttp.ClientResponseError as error:
        return Verdict(check.name, ok=False, detail=f"it does not speak HTTP: {' '.join(error.message.split())}")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        detail = f"no answer: {str(error) or type(error).__name__}"
        return Verdict(check.name, ok=False, detail=detail, answered=False)
    return Verdict(check.name, ok=True)


def _expect(answer: _Answer, *statuses: int) -> None:
    if answer.status not in statuses:
        expected = " or ".join(str(status) for status in statuses)
        raise _Unmet(f"answered HTTP {answer.status}, expected {expected}")


def _expect_success(answer: _Answer) -> None:
    """Expect that a bust is done, or kept as a job."""
    if answer.status != _ACCEPTED:
        _expect(answer, 200)


def _expect_bust(answer: _Answer, target: str = _TARGET) -> BustReply:
    _expect_success(answer)
    reply = _read(BustReply, answer)
    if reply.accepted != (answer.status == _ACCEPTED):
        said = "accepted" if reply.accepted else "done"
        raise _Unmet(f"a bust is answered with HTTP {answer.status}, and the answer says that it is {said}")
    if not reply.cache_key.startswith("sha256:"):
        raise _Unmet(f"cache_key does not begin with sha256: ({reply.cache_key[:20]!r})")
    if reply.cache_key != cache_key_of(target):
        raise _Unmet("cache_key is not the SHA-256 of the target's UTF-8 bytes")
    return reply


def _expect_told(answer: _Answer, target: str, **fields: object) -> BustReply:
    """Expect the answer to a bust with these fields: it repeats what it must, and tells what was asked for."""
    reply = _expect_bust(answer, target)
    asked = BustRequest.model_validate({"target": target, **fields})
    what = phrase_of(asked)
    if name := reply.unechoed(asked):
        told, wanted = getattr(reply, name), getattr(asked, name)
        raise _Unmet(f"the answer to {what} tells {name} {told!r}, and {wanted!r} was asked")
    if asked.dry_run and reply.accepted:
        raise _Unmet(f"{what} is accepted as a job, and should be answered at once")
    if asked.dry_run and (reply.matched is None or reply.removed):
        raise _Unmet(f"{what} tells matched {reply.matched} and removed {reply.removed}")
    if asked.verify and not (asked.dry_run or reply.accepted or reply.verified):
        raise _Unmet(f"the answer to {what} does not say verified")
    return reply


def _expect_job(answer: _Answer, job: str | None) -> JobReply:
    _expect(answer, 200)
    reply = _read(JobReply, answer)
    if reply.job != job:
        raise _Unmet("asked for a job, it tells of another")
    return reply


def _expect_problem(answer: _Answer, status: int, name: str) -> None:
    """Expect a refusal that names a field, or something in it."""
    _expect(answer, status)
    problem = _read(Problem, answer)
    if problem.field is None or problem.field.partition(".")[0] != name:
        raise _Unmet(f"the problem names the field {problem.field!r}, not {name!r}")


def _expect_replay(first: _Answer, again: _Answer) -> None:
    _expect_success(first)
    _expect_success(again)
    if _REPLAYED in first.headers:
        raise _Unmet(f"the first answer to a key has {_REPLAYED}")
    if again.headers.get(_REPLAYED) != "true":
        raise _Unmet(f"the answer to a repeat has {_REPLAYED} {again.headers.get(_REPLAYED)!r}, not 'true'")
    if (again.status, again.body) != (first.status, first.body):
        raise _Unmet("the answer to a repeat is another than the first")


def _expect_one(answers: Sequence[_Answer]) -> None:
    """Expect that one of these answers is the first, and the others repeats of it."""
    for answer in answers:
        _expect_success(answer)
    fresh = [answer for answer in answers if _REPLAYED not in answer.headers]
    if len(fresh) != 1:
        raise _Unmet(f"of {len(answers)} requests with one key at once, {len(fresh)} and not 1 were done anew")
    for answer in answers:
        if answer is not fresh[0]:
            _expect_replay(fresh[0], answer)


def _expect_access(capability: str, tier: str, whose: str, answer: _Answer, *missing: int) -> None:
    """Expect that who has no token, or a wrong one, is denied where that is said, and nowhere else."""
    denied = answer.status in {401, 403}
    if denied == (tier == "public") and answer.status not in missing:
        raise _Unmet(f"{capability} is told to be {tier}, and answers {whose} with HTTP {answer.status}")


def _expect_kept(probe: _Probe) -> None:
    """Expect that connections ended only where the daemon said so."""
    if probe.connections > 1 + probe.closings:
        raise _Unmet("it closed a connection without saying so in the answer before")


def _expect_known(known: DependencyReply, name: str, current: str, *versions: str) -> None:
    if known != DependencyReply(name=name, current=current, versions=versions):
        told = f"current {known.current}, versions {', '.join(known.versions)}"
        raise _Unmet(f"a dependency is told as {told}, not as current {current}, versions {', '.join(versions)}")


def _expect_swap(answer: _Answer) -> HotSwapReply:
    _expect(answer, 200)
    reply = _read(HotSwapReply, answer)
    if not reply.committed:
        raise _Unmet("a swap is answered with 200, and was not committed")
    return reply


def _expect_refused(answer: _Answer) -> None:
    _expect(answer, 409)
    if not _read(Problem, answer).unmet:
        raise _Unmet("a refused swap does not say in unmet why")


async def _expect_current(probe: _Probe, name: str, version: str) -> None:
    known = (await _listed(probe)).get(name)
    if known is None or known.current != version:
        raise _Unmet(f"the current version is {known.current if known else 'none'}, and should be {version}")


def _read(model: type[_Model], answer: _Answer) -> _Model:
    try:
        return model.model_validate_json(answer.body)
    except ValidationError as error:
        name, why = explain(error)
        raise _Unmet(f"{name or 'the body'}: {why}") from error
