"""What tests of the conformance suite share: names of checks, verdicts, and daemons whose answers can be bent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import MultiMapping

from pybustcall.daemon import DaemonSettings, Indexes, MemoryBackend, create_app
from pybustcall.testing import (
    CHECKS,
    Check,
    FakeDaemon,
    Verdict,
)
from pybustcall.testing.conformance.probe import Probe
from pybustcall.testing.conformance.suite import judge
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE
from tests.plain_cache import engine_over

__all__ = [
    "ACCESS",
    "AGAIN",
    "ALL",
    "ALSO",
    "APART",
    "AS_ASKED",
    "BEAT",
    "BUSTS_AGAIN",
    "BUST_DEPENDENTS",
    "BY_PREFIX",
    "BY_TAG",
    "CANCELS",
    "CLAIMS",
    "COMES_BACK",
    "CONNECTIONS",
    "DEPENDENTS",
    "DRY_RUN",
    "EVERYTHING",
    "FIELDS",
    "FITS",
    "FORGETS",
    "FORGETS_UNUSED",
    "FORWARDED",
    "HEAD",
    "HEARTBEAT",
    "IDEMPOTENT",
    "IN_ORDER",
    "JOBS",
    "JOB_OF_A_KEY",
    "KEY_OF_ANOTHER_KIND",
    "LAYERS",
    "LISTS",
    "NO_JOB",
    "NO_NAMESPACE",
    "OF_BUSTS",
    "OF_DOCUMENTS",
    "OF_EVENTS",
    "OF_KEYS",
    "ONCE",
    "OVER_STAYS",
    "PIECES",
    "PREFIX",
    "QUESTIONS",
    "REPEATS",
    "RESETS",
    "SETTLES",
    "SOFT",
    "STANDS",
    "STEP",
    "STREAM",
    "SWAPS_ONCE",
    "TAG",
    "TELLS",
    "TELLS_NO_DRY_RUN",
    "THE_END",
    "TOLD_APART",
    "UNCONFIRMED",
    "VERIFIES",
    "Defect",
    "Exchange",
    "Heard",
    "Hearing",
    "Telling",
    "bent",
    "deaf_to",
    "failed",
    "hearing",
    "in_memory",
    "judged",
    "named",
    "names_known",
    "serving_events",
    "serving_whole",
    "silent",
    "skipped",
]

IDEMPOTENT = "cache.bust.idempotent"
JOBS = "cache.bust.jobs"
STREAM = "events.stream"
OF_BUSTS = tuple(
    f"cache.bust.{name}" for name in ("prefix", "tag", "all", "soft", "namespace", "dry_run", "verify", "settle")
)
EVERYTHING = (
    "cache.bust",
    IDEMPOTENT,
    *OF_BUSTS,
    JOBS,
    "cache.register",
    "cache.dependencies",
    "semver.resolve",
    "cache.hotswap",
    "daemon.negotiate",
)
OF_KEYS = [check.name for check in CHECKS if check.needs == (IDEMPOTENT,) and not check.any_of]
OF_EVENTS = [check.name for check in CHECKS if STREAM in check.needs]
OF_DOCUMENTS = [
    "has a sound capability document",
    "tells by its ETag that its document is unchanged",
    "signs every answer with the digest of its document",
    "fits this client",
    "tells the access of each capability",
    "keeps to the access that it tells",
]
ACCESS = "keeps to the access that it tells"
FITS = "fits this client"
ONCE = "applies once what comes with a key many times at once"
SWAPS_ONCE = "swaps once what comes with a key many times at once"
BUST_DEPENDENTS = "busts what depends on what is busted"
DEPENDENTS = "busts what depends on what is swapped"
KEY_OF_ANOTHER_KIND = "refuses a key that belongs to another kind of bust"
LAYERS = "tells each of its layers, and none that failed as done"
REPEATS = "repeats the kind, the namespace, soft and dry_run as they were asked"
CLAIMS = "claims no kind of bust that it does not advertise"
FIELDS = "refuses what the fields of a bust cannot be"
NO_NAMESPACE = "refuses what is no namespace, the empty one too"
UNCONFIRMED = "refuses to bust everything without confirm"
ALL = "busts everything in a namespace, and nothing beyond"
PREFIX = "busts by prefix what lies below it, by whole segments"
TAG = "busts by tag what has it, and nothing else"
SOFT = "marks as stale in a soft bust, and removes nothing"
APART = "keeps namespaces apart"
DRY_RUN = "removes nothing in a dry run, and tells what the bust then removes"
VERIFIES = "says that it verified a bust"
SETTLES = "tells when it settles"
BUSTS_AGAIN = "busts again after settle"
STANDS = "tells how a bust stands under its job"
LISTS = "lists jobs, the newest first"
QUESTIONS = "refuses questions about jobs that cannot be"
NO_JOB = "answers 404 to jobs that it does not know"
CANCELS = "cancels jobs, once"
OVER_STAYS = "leaves jobs that are over as they are"
JOB_OF_A_KEY = "keeps the job of a key for its repeats"
TELLS = "tells of busts in a stream, from when it says that it is live"
IN_ORDER = "tells busts in their order, under ids that rise"
AS_ASKED = "tells in an event what was asked of the bust"
COMES_BACK = "tells who comes back exactly what was missed"
RESETS = "has a reader forget who comes back with an id that it does not know"
BY_PREFIX = "leaves out of a stream what concerns none of its prefixes, and no more"
BY_TAG = "leaves out of a stream what concerns none of its tags, and no more"
TOLD_APART = "tells each namespace its own busts"
TELLS_NO_DRY_RUN = "tells of no dry run"
ALSO = "tells what went with what was busted"
HEARTBEAT = "says with each heartbeat how far it is"
FORGETS = "forgets dependencies"
FORGETS_UNUSED = "forgets no dependency in use"
BEAT = 0.1
"""Seconds of a heartbeat of events that nobody waits for."""


def failed(verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    """Tell what did not pass, and why."""
    return {verdict.name: verdict.detail for verdict in verdicts if not verdict.ok}


def skipped(verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    """Tell what was skipped, and why."""
    return {verdict.name: verdict.detail for verdict in verdicts if verdict.skipped}


def named(name: str) -> Check:
    """Find a check."""
    (check,) = (check for check in CHECKS if check.name == name)
    return check


async def judged(name: str, url: str, advertised: Collection[str] | None = None, timeout: float = PATIENCE) -> Verdict:
    """Run one check alone against a daemon that is taken to advertise this, by default everything."""
    async with Probe(DaemonAddress.parse(url), {}, timeout) as probe:
        probe.advertised = frozenset(EVERYTHING if advertised is None else advertised)
        return await judge(named(name), probe)


@dataclass
class Exchange:
    """One request, and its answer, which a defect may change on its way."""

    fake: FakeDaemon
    method: str
    path: str
    query: Mapping[str, str]
    sent: Any
    key: str | None
    token: str | None
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.body)

    def say(self, **fields: Any) -> None:
        """Change fields of the body."""
        self.body = json.dumps({**self.said, **fields}).encode()

    def asks(self, **fields: Any) -> bool:
        """Tell whether it is a bust with just these values, in answer to which there is a reply."""
        of_it = self.is_("POST", "bust") and self.status in {200, 202} and isinstance(self.sent, dict)
        return of_it and all(self.sent.get(name) == value for name, value in fields.items())

    def is_(self, method: str, path: str) -> bool:
        """Tell whether it is of this route."""
        return (self.method, self.path) == (method, f"/api/v1/{path}")


FORWARDED = ("Content-Type", "ETag", "Bustcall-Capabilities", "Idempotency-Replayed")
Defect = Callable[[Exchange], object]


@dataclass(frozen=True)
class Hearing:
    """A defect in what is heard of busts, and maybe in what is answered, as if all were well."""

    hear: Callable[[dict[str, Any]], dict[str, Any]]
    say: Callable[[Exchange], object] = lambda _: None

    def __call__(self, exchange: Exchange) -> None:
        self.say(exchange)


def deaf_to(*names: str, echoes: bool = False) -> Hearing:
    """Make a defect that ignores fields of busts; `echoes`: and repeats them all the same."""

    def hear(sent: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in sent.items() if name not in names}

    def say(exchange: Exchange) -> None:
        if exchange.asks():
            exchange.say(**{name: exchange.sent[name] for name in names if name in exchange.sent})

    return Hearing(hear, say if echoes else lambda _: None)


def hearing(wrong: Callable[[dict[str, Any]], bool], **fields: Any) -> Hearing:
    """Make a defect that hears other fields in some busts."""
    return Hearing(lambda sent: {**sent, **fields} if wrong(sent) else sent)


@dataclass(frozen=True)
class Heard:
    """One event of a stream, as the daemon said it, and what its reader asked for; a heartbeat has no name.

    `memory` is of the stream, and of nothing else.
    """

    query: MultiMapping[str]
    after: str | None
    name: str
    place: str
    said: dict[str, Any]
    memory: dict[str, Any]

    @property
    def epoch(self) -> str:
        return self.place.rpartition("-")[0]

    @property
    def number(self) -> int:
        return int(self.place.rpartition("-")[2])

    def at(self, number: int) -> Heard:
        """Give it another number."""
        return replace(self, place=f"{self.epoch}-{number}")

    def saying(self, **said: Any) -> Heard:
        """Have it say something else; None leaves a field out."""
        told = {name: value for name, value in {**self.said, **said}.items() if value is not None}
        return replace(self, said=told)

    def text(self) -> bytes:
        """Write it as a stream does."""
        event = f"event: {self.name}\ndata: {json.dumps(self.said)}\n" if self.name else ": heartbeat\n"
        return f"{event}id: {self.place}\n\n".encode()


THE_END = b""


@dataclass(frozen=True)
class Telling:
    """A defect in what is told of busts.

    - `retell`: what is told in place of an event; `THE_END` ends the stream
    - `ask`: what is heard of the reader: what it wants, and the id from which it goes on
    - `hear`, `say`: as of a `Hearing`
    """

    retell: Callable[[Heard], Iterable[Heard | bytes]] = lambda heard: [heard]
    ask: Callable[[list[tuple[str, str]], str | None], tuple[list[tuple[str, str]], str | None]] = lambda *asked: asked
    hear: Callable[[dict[str, Any]], dict[str, Any]] = lambda sent: sent
    say: Callable[[Exchange], object] = lambda _: None

    def __call__(self, exchange: Exchange) -> None:
        self.say(exchange)

    async def pass_on(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Tell a reader on, as long as it is there, what the daemon says."""
        response = web.StreamResponse(headers={"Content-Type": answer.headers["Content-Type"]})
        await response.prepare(request)
        rest, memory = b"", dict[str, Any]()
        async for piece in answer.content.iter_any():
            *texts, rest = (rest + piece).split(b"\n\n")
            for text in texts:
                lines = dict(line.split(": ", 1) for line in text.decode().split("\n"))
                said = json.loads(lines.get("data", "{}"))
                after = request.headers.get("Last-Event-ID")
                heard = Heard(request.query, after, lines.get("event", ""), lines["id"], said, memory)
                for told in self.retell(heard):
                    if told == THE_END:
                        return response
                    await response.write(told if isinstance(told, bytes) else told.text())
            if request.transport is None or request.transport.is_closing():
                break
        return response


@asynccontextmanager
async def serving_whole(defect: Defect) -> AsyncIterator[tuple[str, FakeDaemon]]:
    """Serve the fake daemon; for a defect in what is told the reference daemon, and one that is not asked."""
    async with FakeDaemon(capabilities=EVERYTHING[1:], layers=["fake"]) as fake:
        if not isinstance(defect, Telling):
            yield fake.url, fake
            return
        async with in_memory() as url:
            yield url, fake


@asynccontextmanager
async def in_memory(beat: float = BEAT, **settings: Any) -> AsyncIterator[str]:
    """Serve the reference daemon with a cache in memory, in this process."""
    indexes = Indexes()
    app = create_app(engine_over(MemoryBackend(indexes), indexes), DaemonSettings(events_heartbeat=beat, **settings))
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@asynccontextmanager
async def bent(defect: Defect) -> AsyncIterator[str]:
    """Serve what a sound daemon serves, but for a defect."""
    async with serving_whole(defect) as (url, fake), aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {name: value for name, value in request.headers.items() if name not in {"Host", "Content-Length"}}
            try:
                sent = json.loads(body)
            except ValueError:
                sent = None
            if isinstance(defect, Hearing | Telling) and request.path == "/api/v1/bust" and isinstance(sent, dict):
                body = json.dumps(defect.hear(sent)).encode()
            query = list(request.query.items())
            if isinstance(defect, Telling) and request.path == "/api/v1/events":
                query, after = defect.ask(query, headers.pop("Last-Event-ID", None))
                headers |= {} if after is None else {"Last-Event-ID": after}
            async with session.request(
                request.method, url + request.path, params=query, data=body, headers=headers
            ) as answer:
                is_stream = answer.content_type == "text/event-stream"
                exchange = Exchange(
                    fake=fake,
                    method=request.method,
                    path=request.path,
                    query=request.query,
                    sent=sent,
                    key=request.headers.get("Idempotency-Key"),
                    token=request.headers.get("Authorization"),
                    status=answer.status,
                    headers={name: answer.headers[name] for name in FORWARDED if name in answer.headers},
                    body=b"" if is_stream else await answer.read(),
                )
                defect(exchange)
                if is_stream and exchange.status == 200 and exchange.body == b"":
                    assert isinstance(defect, Telling)
                    with suppress(ConnectionError):
                        return await defect.pass_on(request, answer)
            return web.Response(status=exchange.status, headers=exchange.headers, body=exchange.body)

        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{path:.*}", forward)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


def silent(wrong: Callable[[Heard], bool]) -> Telling:
    """Make a defect that does not tell some events."""
    return Telling(lambda heard: [] if wrong(heard) else [heard])


def serving_events(status: int = 200, content_type: str = "text/event-stream") -> Telling:
    """Make a defect in how a reader is answered."""

    def say(exchange: Exchange) -> None:
        if exchange.is_("GET", "events"):
            exchange.status, exchange.headers["Content-Type"], exchange.body = status, content_type, b"{}"

    return Telling(say=say)


async def names_known(url: str) -> list[str]:
    """List the dependencies that a daemon knows."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/dependencies") as answer:
        return [known["name"] for known in (await answer.json())["dependencies"]]


CONNECTIONS = "serves one request after another on a connection"
STEP = "stays in step after a refusal"
PIECES = "reads a body that comes in pieces"
HEAD = "answers HEAD without a body"
AGAIN = {"Idempotency-Replayed": "true"}
