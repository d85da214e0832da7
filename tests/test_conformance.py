"""The conformance suite: every daemon of ours passes it whole, and it can tell one that does not."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import MultiMapping

from pybustcall import ConfigurationError
from pybustcall.capabilities import advertisement
from pybustcall.daemon import DaemonSettings, Indexes, MemoryBackend, create_app
from pybustcall.daemon.events import BustEvent, Interest
from pybustcall.models import DependencyReply, LayerReply, cache_key_of
from pybustcall.testing import (
    CHECKS,
    Answer,
    Check,
    FakeDaemon,
    FaultyProxy,
    Trouble,
    Verdict,
    check_daemon,
)
from pybustcall.testing.conformance import entries, kinds, probe, reader, suite
from pybustcall.testing.conformance.base import expect_kept
from pybustcall.testing.conformance.checking import Unmet
from pybustcall.testing.conformance.probe import Probe
from pybustcall.testing.conformance.suite import judge
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE, StartDaemon
from tests.plain_cache import engine_over

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02"), pytest.mark.requirement("INT-04")]

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


# The daemons of ours


UNDECIDED = {PREFIX, TAG, DRY_RUN, BUSTS_AGAIN, BUST_DEPENDENTS, DEPENDENTS}
"""What cannot be told of a cache that holds nothing of what is only registered."""


async def test_the_reference_daemon_passes(start_brisk: StartDaemon) -> None:
    """In a process of its own, twice; its cache of files holds nothing that is only registered."""
    daemon = start_brisk()
    for _ in range(2):
        verdicts = await check_daemon(daemon.url, strict=True)
        assert failed(verdicts) == {}
        assert {name for name, why in skipped(verdicts).items() if why.startswith("not decided: ")} == UNDECIDED
        lacks = {
            name for name in skipped(verdicts) if {*named(name).needs} & {"cache.bust.soft", "cache.bust.namespace"}
        }
        assert skipped(verdicts).keys() == UNDECIDED | lacks
        assert len(verdicts) == len(CHECKS)


async def test_the_reference_daemon_passes_with_a_cache_in_memory() -> None:
    """Whole, with nothing skipped, and again."""
    async with in_memory() as url:
        for _ in range(2):
            verdicts = await check_daemon(url, strict=True)
            assert {verdict.outcome for verdict in verdicts} == {"passed"}


async def test_the_reference_daemon_passes_with_a_journal(tmp_path: Path) -> None:
    """Where jobs outlive it, and what is done at once is answered with 200."""
    async with in_memory(journal=tmp_path / "journal", state=tmp_path / "state") as url:
        verdicts = await check_daemon(url, strict=True)
    assert {verdict.outcome for verdict in verdicts} == {"passed"}


class SlowCache:
    """A cache in memory that takes its time to remove, so that a bust becomes a job."""

    def __init__(self, indexes: Indexes) -> None:
        self._inner = MemoryBackend(indexes)
        self.name = self._inner.name
        self.traits = self._inner.traits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def remove(self, namespace: str, keys: Sequence[str], *, generation: int, soft: bool) -> int:
        await asyncio.sleep(0.01)
        return await self._inner.remove(namespace, keys, generation=generation, soft=soft)


async def test_the_reference_daemon_passes_where_busts_become_jobs(tmp_path: Path) -> None:
    """Every bust is answered with 202, and followed to its end."""
    indexes = Indexes()
    settings = DaemonSettings(journal=tmp_path / "journal", answer_within=0.001, events_heartbeat=BEAT)
    async with TestServer(create_app(engine_over(SlowCache(indexes), indexes), settings)) as server:
        verdicts = await check_daemon(str(server.make_url("")), strict=True)
    assert failed(verdicts) == {}
    assert skipped(verdicts) == dict.fromkeys([LAYERS, SETTLES], "it tells nothing of its layers")


async def test_a_daemon_that_serves_certain_namespaces_alone_passes() -> None:
    """What is said of namespaces cannot be tried there, but for what is none."""
    async with in_memory(namespaces=("default", "shop")) as url:
        verdicts = await check_daemon(url, strict=True)
    assert failed(verdicts) == {}
    assert skipped(verdicts) == dict.fromkeys([ALL, APART, TOLD_APART], "it serves no namespaces but its own")


async def test_the_reference_daemon_passes_with_a_token_and_on_a_socket(
    start_brisk: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same daemon on a Unix socket, asking for a token."""
    socket = tmp_path_factory.mktemp("s") / "b.sock"
    daemon = start_brisk("--socket", str(socket), env={"BUSTCALL_TOKEN": "s3cret"})
    assert failed(await check_daemon(daemon.url, token="s3cret", strict=True)) == {}
    assert "busts a key and answers with its SHA-256" in failed(await check_daemon(daemon.url))


async def test_a_daemon_that_requires_something_of_clients_is_told_what_pybustcall_has(
    start_brisk: StartDaemon,
) -> None:
    """The suite introduces itself as the client does."""
    daemon = start_brisk("--require-capability", "cache.bust", "--require-semverx", ">=0.1.0-0")
    assert failed(await check_daemon(daemon.url, strict=True)) == {}


async def test_the_fake_daemon_passes() -> None:
    """Whole, with nothing skipped, and again; so tests against it say something about the real ones."""
    async with FakeDaemon(capabilities=[*EVERYTHING[1:], STREAM], layers=["fake"], heartbeat=BEAT) as fake:
        for _ in range(2):
            verdicts = await check_daemon(fake.url, strict=True)
            assert {verdict.outcome for verdict in verdicts} == {"passed"}
            assert len(verdicts) == len(CHECKS)
        assert fake.advertised[0] == advertisement()


async def test_what_is_not_advertised_is_skipped() -> None:
    """On either route; the verdict says what is missing, and is no failure."""
    for document in (True, False):
        async with FakeDaemon(capabilities=[IDEMPOTENT], document=document) as fake:
            verdicts = await check_daemon(fake.url, strict=True)
        assert failed(verdicts) == {}
        assert len(verdicts) == len(CHECKS)
        not_asked = {check.name for check in CHECKS if check.needs or check.any_of} - set(OF_KEYS)
        not_asked |= {LAYERS, CLAIMS}
        assert set(skipped(verdicts)) == (not_asked if document else not_asked | set(OF_DOCUMENTS))
        assert skipped(verdicts)["swaps dependencies"] == "it does not advertise cache.dependencies, cache.hotswap"
        assert skipped(verdicts)[FIELDS].startswith("it does not advertise any of cache.bust.prefix, cache.bust.tag, ")
        assert skipped(verdicts)[CLAIMS].startswith("it knows no kinds: it ignores the field and does not repeat it")
    assert len(OF_KEYS) == 5


async def test_what_only_ours_must_do_is_asked_only_of_ours() -> None:
    """It is not among the verdicts."""
    async with FakeDaemon() as fake:
        names = {verdict.name for verdict in await check_daemon(fake.url)}
    assert names == {check.name for check in CHECKS if not check.strict}


@pytest.mark.parametrize("answer", [Answer(status=500), Answer(status=404), Answer(body=b"{"), Answer(reset=True)])
async def test_a_daemon_that_does_not_say_what_it_can_do_is_asked_for_the_base(answer: Answer) -> None:
    """Whether it tells its capabilities is a check of its own."""
    async with FakeDaemon(capabilities=(IDEMPOTENT,), probe_plan=[answer] * 2) as fake:
        verdicts = await check_daemon(fake.url)
    assert set(OF_KEYS) <= set(skipped(verdicts))


async def test_an_older_daemon_passes_by_the_other_route() -> None:
    """Capabilities on the route of the existing daemon; what is said of a document does not apply to it."""
    async with FakeDaemon(document=False) as fake:
        verdicts = await check_daemon(fake.url)
    assert failed(verdicts) == {}
    assert skipped(verdicts)["has a sound capability document"] == "it has no capability document"


async def test_a_document_need_not_tell_a_version() -> None:
    """One of unknown version meets fewer requirements, and that is all."""
    async with FakeDaemon(advertises={"semverx": None}) as fake:
        assert (await judged("has a sound capability document", fake.url)).ok


async def test_answers_that_come_in_pieces_are_read_whole() -> None:
    """Byte by byte, as over a bad network."""
    async with FakeDaemon() as fake, FaultyProxy(fake.url) as proxy:
        proxy.trouble = Trouble(drip=0.0001)
        for name in ("busts a key and answers with its SHA-256", "answers HEAD without a body"):
            assert (await judged(name, proxy.url)).ok


async def test_a_base_path_is_asked_below(start_daemon: StartDaemon) -> None:
    """Behind one that is not served every route is missing, which HEAD may say."""
    url = start_daemon().url + "/elsewhere"
    assert (await judged("answers HEAD without a body", url)).ok
    assert (await judged("tells its status", url)).detail == "answered HTTP 404, expected 200"


# Daemons that fail one check


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


def answering(method: str, path: str, status: int | None = None, **fields: Any) -> Defect:
    """Make a defect that gives every answer of 200 of a route another status or other fields."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_(method, path) and exchange.status == 200:
            if fields:
                exchange.say(**fields)
            exchange.status = status or 200

    return defect


def accepting(path: str, **fields: Any) -> Defect:
    """Make a defect that takes everything sent to a route."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", path) and exchange.status != 200:
            exchange.status = 200
            exchange.body = json.dumps(fields).encode()

    return defect


def blaming(path: str, field_name: str | None) -> Defect:
    """Make a defect that names another field in refusals."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", path) and exchange.status != 200:
            exchange.say(field=field_name)

    return defect


def busting(wrong: Callable[[str], bool], **fields: Any) -> Defect:
    """Make a defect in what is said of some targets."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("POST", "bust") and exchange.status == 200 and wrong(exchange.sent["target"]):
            exchange.say(**fields)

    return defect


def without(header: str, status: int) -> Defect:
    """Make a defect that leaves a header out of answers of a status."""

    def defect(exchange: Exchange) -> None:
        if exchange.status == status:
            exchange.headers.pop(header, None)

    return defect


def weak_tags(exchange: Exchange) -> None:
    """Mark the document as equal in meaning only."""
    if "ETag" in exchange.headers:
        exchange.headers["ETag"] = "W/" + exchange.headers["ETag"]


def forgets_its_tag(exchange: Exchange) -> None:
    """Send the document to whoever has it."""
    if exchange.status == 304:
        exchange.status, exchange.body = 200, b"{}"


def always_unchanged(exchange: Exchange) -> None:
    """Say so to everybody but those who ask for the first time."""
    if exchange.is_("GET", "capabilities"):
        exchange.fake.probes += 1
        if exchange.fake.probes > 2:
            exchange.status, exchange.body = 304, b""


def other_document(exchange: Exchange) -> None:
    """Answer a document with another than is served."""
    if exchange.is_("POST", "capabilities"):
        exchange.say(version="other")


def renames(exchange: Exchange) -> None:
    """Forget what was announced."""
    if exchange.is_("GET", "dependencies"):
        exchange.body = b'{"dependencies": []}'


def unsorted(exchange: Exchange) -> None:
    """Tell versions as they came."""
    if exchange.is_("POST", "dependencies") and exchange.status == 200:
        exchange.say(versions=exchange.said["versions"][::-1])


def keeps_what_it_refused(exchange: Exchange) -> None:
    """Announce it all the same."""
    if exchange.is_("POST", "dependencies") and exchange.status == 422:
        _become(exchange, exchange.sent["name"], "1.0.0")


def follows_what_it_refused(exchange: Exchange) -> None:
    """Take the current version from an announcement that says another."""
    if exchange.is_("POST", "dependencies") and exchange.status == 409:
        _become(exchange, exchange.sent["name"], exchange.sent["current"])


def swaps_the_first(exchange: Exchange) -> None:
    """Replace the first of those that it refused together."""
    if exchange.is_("POST", "hotswap") and exchange.status == 409:
        _become(exchange, exchange.sent["swaps"][0]["name"], exchange.sent["swaps"][0]["to"])


def swaps_nothing(exchange: Exchange) -> None:
    """Say that it swapped, and have the old versions in use."""
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        for swap in exchange.sent["swaps"]:
            _become(exchange, swap["name"], "1.0.0")


def _become(exchange: Exchange, name: str, current: str) -> None:
    known = exchange.fake.dependencies.get(name)
    if known is not None:
        exchange.fake.dependencies[name] = known.model_copy(update={"current": current})
    else:
        exchange.fake.dependencies[name] = DependencyReply(name=name, current=current, versions=(current,))


def wrong_version(exchange: Exchange) -> None:
    """Prefer experimental versions."""
    if exchange.is_("POST", "resolve") and exchange.status == 200 and "latest" in exchange.sent["spec"]:
        exchange.say(version="2.1.0-rc.1", state="experimental")


def swaps_again(exchange: Exchange) -> None:
    """Swap at each repeat, which is another effect."""
    if exchange.headers.get("Idempotency-Replayed") and exchange.is_("POST", "hotswap"):
        _become(exchange, exchange.sent["swaps"][0]["name"], exchange.sent["swaps"][0]["to"])


@dataclass
class RemembersRefusals:
    """Answer the next request of a key with the refusal of the first."""

    refused: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, exchange: Exchange) -> None:
        if exchange.key is None:
            return
        if exchange.status == 409:
            self.refused[exchange.key] = exchange.body
        elif exchange.key in self.refused:
            exchange.status, exchange.body = 409, self.refused[exchange.key]


def replays_at_once(exchange: Exchange) -> None:
    """Say of every swap that it is a repeat."""
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.headers["Idempotency-Replayed"] = "true"


def busts_everything(exchange: Exchange) -> None:
    """Have a swap empty the cache."""
    if exchange.is_("POST", "hotswap"):
        exchange.fake.entries.clear()


def wants_any_token(exchange: Exchange) -> None:
    """Let in whoever has a token, whatever it is."""
    if exchange.is_("GET", "capabilities") and exchange.status == 200:
        exchange.say(access={"cache.bust": "protected"})
    if exchange.is_("POST", "bust") and exchange.token is None:
        exchange.status = 401


def denies_its_status(exchange: Exchange) -> None:
    """Say that it is public, and show it to nobody."""
    if exchange.is_("GET", "status"):
        exchange.status = 401


def busts_no_dependents(exchange: Exchange) -> None:
    """Bust what is named and nothing else, and tell that it held nothing at all."""
    if exchange.is_("POST", "bust") and exchange.status == 200:
        exchange.say(removed=0)
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.say(busted=0)


def busts_one_dependent(exchange: Exchange) -> None:
    """The same, but for one."""
    busts_no_dependents(exchange)
    if exchange.is_("POST", "hotswap") and exchange.status == 200:
        exchange.say(busted=1)
    if exchange.is_("POST", "bust") and exchange.status == 200 and exchange.sent.get("strategy") != "direct":
        exchange.say(removed=1)


def forgets_nothing(exchange: Exchange) -> None:
    """Say that it forgot, and list it all the same."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 200:
        _become(exchange, exchange.sent["name"], "1.0.0")


def forgets_everything(exchange: Exchange) -> None:
    """Forget all that it knows."""
    if exchange.is_("POST", "dependencies/forget"):
        exchange.fake.dependencies.clear()


def forgets_what_is_in_use(exchange: Exchange) -> None:
    """Refuse, and forget it all the same."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 409:
        del exchange.fake.dependencies[exchange.sent["name"]]


def misses_what_is_forgotten(exchange: Exchange) -> None:
    """Refuse to forget what is not known."""
    if exchange.is_("POST", "dependencies/forget") and exchange.status == 200:
        forgotten = exchange.fake.dependencies.setdefault("forgotten", DependencyReply(name="forgotten", current="1"))
        if exchange.sent["name"] in forgotten.versions:
            exchange.status = 404
        versions = (*forgotten.versions, exchange.sent["name"])
        exchange.fake.dependencies["forgotten"] = forgotten.model_copy(update={"versions": versions})


def plain_words(exchange: Exchange) -> None:
    """Refuse in plain text."""
    if exchange.status == 422:
        exchange.headers["Content-Type"] = "text/plain"


def older_and_broken(exchange: Exchange) -> None:
    """Have only the older route, and no map there."""
    if exchange.is_("GET", "capabilities"):
        exchange.status = 404
    if exchange.is_("GET", "bindings/capabilities"):
        exchange.body = b"[]"


def too_large(exchange: Exchange) -> None:
    """Take no body above 8000 bytes."""
    if len(json.dumps(exchange.sent)) > 8000:
        exchange.status = 413


def dropping(covers: Callable[[str, str], bool], kind: str, **fields: Any) -> Defect:
    """Make a defect that removes more in busts of a kind: every entry that `covers` finds by the target."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks(kind=kind, **fields):
            space = exchange.fake.space(exchange.sent.get("namespace"))
            space.drop([key for key in space.entries if covers(exchange.sent["target"], key)])

    return defect


def saying(asked: dict[str, Any], **fields: Any) -> Defect:
    """Make a defect in what is said of some busts."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks(**asked):
            exchange.say(**fields)

    return defect


def removes_what_it_refused(exchange: Exchange) -> None:
    """Refuse a bust, and have its effect all the same."""
    if exchange.is_("POST", "bust") and exchange.status == 422:
        for namespace in ("default", exchange.sent.get("namespace") or "default"):
            exchange.fake.space(str(namespace)).entries.clear()


def conflicting(exchange: Exchange) -> None:
    """Refuse busts by another status."""
    if exchange.is_("POST", "bust") and exchange.status == 422:
        exchange.status = 409


def empties_everything(exchange: Exchange) -> None:
    """Have a bust of everything in one namespace empty all."""
    if exchange.asks(kind="all"):
        for space in exchange.fake._spaces.values():
            space.entries.clear()


def removes_soft(exchange: Exchange) -> None:
    """Say that it marked, and remove."""
    if exchange.asks(soft=True):
        exchange.fake.space(exchange.sent.get("namespace")).entries.pop(exchange.sent["target"], None)


def forgets_the_namespace(exchange: Exchange) -> None:
    """Bust in all other namespaces, too."""
    if exchange.asks() and "namespace" in exchange.sent:
        for name, space in exchange.fake._spaces.items():
            if name != "default":
                space.drop([exchange.sent["target"]])


def forgets_the_default_namespace(exchange: Exchange) -> None:
    """Bust in the default namespace, too."""
    if exchange.asks() and "namespace" in exchange.sent:
        exchange.fake.space().drop([exchange.sent["target"]])


def removes_in_a_dry_run(exchange: Exchange) -> None:
    """Count well, and remove what was counted."""
    if exchange.asks(dry_run=True):
        exchange.fake.entries.clear()


def counts_what_is_gone(exchange: Exchange) -> None:
    """Go on telling the number of a dry run from before."""
    if exchange.asks(dry_run=True) and "kind" not in exchange.sent:
        exchange.say(matched=2)


def fails_in_a_layer(**fields: Any) -> Defect:
    """Make a defect that tells of another layer."""

    def defect(exchange: Exchange) -> None:
        if exchange.asks():
            exchange.say(layers=[*exchange.said["layers"], {"name": "outer", "ok": True, "removed": 0, **fields}])

    return defect


def accepts_by_words_alone(exchange: Exchange) -> None:
    """Say that it is a job, with 200."""
    if exchange.asks():
        exchange.say(status="accepted", job="job-1")


def keeps_dry_runs(exchange: Exchange) -> None:
    """Make a job of a dry run."""
    if exchange.asks(dry_run=True):
        exchange.status = 202
        exchange.say(status="accepted", job="job-1")


def is_no_job(exchange: Exchange) -> None:
    """Answer with 202 what is done."""
    if exchange.asks() and exchange.status == 200:
        exchange.status = 202


def of_jobs(method: str = "GET", **fields: Any) -> Defect:
    """Make a defect in what is said of single jobs."""

    def defect(exchange: Exchange) -> None:
        if exchange.method == method and "/jobs/" in exchange.path and exchange.status == 200:
            exchange.say(**fields)

    return defect


def listing(change: Callable[[list[Any]], list[Any]]) -> Defect:
    """Make a defect in lists of jobs."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("GET", "jobs") and exchange.status == 200:
            exchange.say(jobs=change(exchange.said["jobs"]))

    return defect


def deaf_to_the_query(name: str) -> Defect:
    """Make a defect that lists all jobs, whatever this part of a query says."""

    def defect(exchange: Exchange) -> None:
        if exchange.is_("GET", "jobs") and name in exchange.query:
            exchange.say(jobs=[job.model_dump(mode="json", exclude_none=True) for job in exchange.fake.jobs.values()])

    return defect


def takes_any_question(exchange: Exchange) -> None:
    """List no jobs where the question cannot be."""
    if exchange.is_("GET", "jobs") and exchange.status == 422:
        exchange.status, exchange.body = 200, b'{"jobs": []}'


def has_no_such_route(exchange: Exchange) -> None:
    """Answer as if the route of jobs were missing."""
    if exchange.status == 404 and "/jobs/" in exchange.path:
        exchange.say(type="about:blank")


def knows_every_job(exchange: Exchange) -> None:
    """Cancel jobs that it does not know."""
    if exchange.status == 404 and exchange.method == "DELETE":
        exchange.status = 200


def cancels_nothing(exchange: Exchange) -> None:
    """Say of a job that was cancelled that it still runs."""
    if exchange.method == "DELETE" and exchange.status == 200:
        exchange.say(state="running")


def revives(exchange: Exchange) -> None:
    """Have a job run again that was cancelled."""
    if exchange.method == "GET" and "/jobs/" in exchange.path and exchange.said.get("state") == "cancelled":
        exchange.say(state="waiting")


def cancels_what_is_over(exchange: Exchange) -> None:
    """Cancel also what is done."""
    if exchange.method == "DELETE" and exchange.status == 200:
        exchange.say(state="cancelled")


def makes_a_job_of_each_repeat(exchange: Exchange) -> None:
    """Name another job in every answer."""
    if exchange.status == 202:
        exchange.say(job=f"job-{len(exchange.fake.requests)}")


def remembers_targets_alone(exchange: Exchange) -> None:
    """Answer from memory whatever comes with a key and the same target."""
    if exchange.is_("POST", "bust") and exchange.status == 422 and exchange.key is not None:
        exchange.status, exchange.body = 200, json.dumps({"status": "success", "cache_key": "sha256:"}).encode()


# Defects in what is told


def retelling(*names: str, **said: Any) -> Telling:
    """Make a defect in what events of some names say; None leaves a field out."""
    return Telling(lambda heard: [heard.saying(**said) if heard.name in names else heard])


def silent(wrong: Callable[[Heard], bool]) -> Telling:
    """Make a defect that does not tell some events."""
    return Telling(lambda heard: [] if wrong(heard) else [heard])


def in_place_of(name: str, *told: bytes) -> Telling:
    """Make a defect that says this where it should tell an event of a name."""
    return Telling(lambda heard: told if heard.name == name else [heard])


def numbered(number: Callable[[int], int]) -> Telling:
    """Make a defect in the numbers of busts."""
    return Telling(lambda heard: [heard.at(number(heard.number)) if heard.name == "bust" else heard])


def unfiltered(*names: str, instead: Callable[[Heard], bool] = lambda _: True) -> Telling:
    """Make a defect that does not hear these parts of what is wanted, and tells what it sees fit `instead`."""
    return Telling(
        lambda heard: [heard] if heard.name != "bust" or instead(heard) else [],
        ask=lambda wanted, after: ([(name, text) for name, text in wanted if name not in names], after),
    )


def going_on(place: Callable[[str], str | None]) -> Telling:
    """Make a defect in the id from which a stream goes on."""
    return Telling(ask=lambda wanted, after: (wanted, None if after is None else place(after)))


def back_by(steps: int, streams: int = 1) -> Telling:
    """Make a defect that goes on some events earlier, in the first so many streams that go on, or in the others."""
    number = count(1)

    def place(after: str) -> str:
        epoch, _, last = after.rpartition("-")
        return f"{epoch}-{int(last) - steps}" if (next(number) <= streams) == (streams > 0) else after

    return going_on(place)


def wants(heard: Heard, covers: Callable[[str, str], bool]) -> bool:
    """Tell whether a key is below one of the wanted prefixes, as somebody understands that."""
    return any(covers(prefix, heard.said["target"]) for prefix in heard.query.getall("prefix", []))


def begins_alike(prefix: str, key: str) -> bool:
    """Take a prefix for a beginning, of what is busted or the other way round."""
    return key.startswith(prefix) or prefix.startswith(key)


def of_interest(heard: Heard, **other: Any) -> bool:
    """Tell whether an event, if it were another one, is what its reader wants."""
    told = BustEvent(**{**heard.said, "also": (), **other})
    prefixes, tags = (frozenset(heard.query.getall(name, [])) for name in ("prefix", "tag"))
    return Interest(told.namespace, prefixes, tags).concerns(told)


def tells_from_before(heard: Heard) -> list[Heard]:
    """Begin with a bust that nobody asked for."""
    return [bust_at(heard, heard.number), heard] if heard.name == "live" and heard.after is None else [heard]


def bust_at(heard: Heard, number: int, target: str = "x") -> Heard:
    """Make up the telling of a bust."""
    said = {"namespace": "default", "kind": "key", "target": target, "soft": False, "strategy": "direct"}
    return replace(heard, name="bust", said=said).at(number)


def tells_the_second_first(heard: Heard) -> list[Heard]:
    """Tell the second bust under the first id, and the first under the second."""
    if heard.name != "bust" or "over" in heard.memory:
        return [heard]
    held = heard.memory.setdefault("held", heard)
    if held is heard:
        return []
    heard.memory["over"] = True
    return [replace(held, said=heard.said), replace(heard, said=held.said)]


def goes_over(heard: Heard) -> list[Heard]:
    """Tell busts in a log of their own."""
    return [replace(heard, place=f"another-{heard.number}") if heard.name == "bust" else heard]


def counts_for_each() -> Telling:
    """Make a defect that gives each reader ids of its own."""
    streams = count(1)

    def retell(heard: Heard) -> list[Heard]:
        number = heard.memory.get("number") or heard.memory.setdefault("number", next(streams))
        return [heard.at(heard.number * 10 + number)]

    return Telling(retell)


def forgets_one(heard: Heard) -> list[Heard]:
    """Leave out one of those that were missed."""
    return [] if heard.after and heard.name == "bust" and heard.said["target"].endswith("/2") else [heard]


@dataclass
class TellsWhatWasMissed:
    """Say in a reset, or right after it, what was busted last."""

    after: bool
    last: str = ""

    def say(self, exchange: Exchange) -> None:
        if exchange.asks():
            self.last = exchange.sent["target"]

    def retell(self, heard: Heard) -> list[Heard]:
        if heard.name != "reset":
            return [heard]
        if self.after:
            return [heard.at(heard.number - 1), bust_at(heard, heard.number, self.last)]
        return [heard.saying(reason=f"missed was {self.last}")]

    def telling(self) -> Telling:
        return Telling(self.retell, say=self.say)


def resets_to_the_beginning(heard: Heard) -> list[Heard]:
    """Say a reset as if nothing had happened yet."""
    return [heard.at(0) if heard.name == "reset" else heard]


def stays_behind(heard: Heard) -> list[Heard]:
    """Say in a heartbeat what it said when it was live."""
    if heard.name == "live":
        heard.memory["live"] = heard.number
    return [heard] if heard.name else [heard.at(heard.memory["live"])]


def busts_in_a_dry_run() -> Telling:
    """Make a defect that does what was only to be tried, and does not say so."""

    def hear(sent: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in sent.items() if name != "dry_run"}

    def say(exchange: Exchange) -> None:
        if exchange.asks(dry_run=True):
            exchange.say(dry_run=True, removed=0, matched=0)

    return Telling(hear=hear, say=say)


def serving_events(status: int = 200, content_type: str = "text/event-stream") -> Telling:
    """Make a defect in how a reader is answered."""

    def say(exchange: Exchange) -> None:
        if exchange.is_("GET", "events"):
            exchange.status, exchange.headers["Content-Type"], exchange.body = status, content_type, b"{}"

    return Telling(say=say)


OF_STREAMS: list[tuple[str, Telling, str]] = [
    (TELLS, serving_events(404, "application/json"), "answered HTTP 404, expected 200"),
    (TELLS, serving_events(content_type="text/plain"), "its events are text/plain, not text/event-stream"),
    (TELLS, retelling("live", heartbeat=None), "an event live cannot be read: heartbeat: Field required"),
    (TELLS, retelling("live", heartbeat=0), "the heartbeat that it says is 0 s"),
    (TELLS, retelling("bust", kind=None), "an event bust cannot be read: kind: Field required"),
    (TELLS, Telling(tells_from_before), "a stream that goes on from no id begins with bust, not with live"),
    (TELLS, silent(lambda heard: heard.name == "bust"), "says nothing more before a bust is told that was answered"),
    (TELLS, silent(lambda heard: heard.name == "live"), "says nothing more before it is live"),
    (TELLS, in_place_of("bust", THE_END), "it ends a stream of events whose reader is there"),
    (TELLS, in_place_of("bust", b"data: \xff\n\n"), "its stream of events is none: it has text that is not UTF-8"),
    (
        TELLS,
        in_place_of("live", b"event: live\ndata: {}\n\n"),
        "an event live has the id '', which is not EPOCH-NUMBER",
    ),
    (TELLS, in_place_of("live", b"event: live\ndata: {}\nid: 7\n\n"), "an event live has the id '7', which is not"),
    (IN_ORDER, numbered(lambda _: 1000), "the number of an event is 1000 after 1000; numbers must rise"),
    (IN_ORDER, numbered(lambda number: 1000 - number), "the number of an event is 998 after 999; numbers must rise"),
    (IN_ORDER, Telling(goes_over), "its events go over to another epoch, and it does not say reset"),
    (IN_ORDER, Telling(tells_the_second_first), "five busts, one after another, are told in another order, or not all"),
    (
        IN_ORDER,
        silent(lambda heard: heard.name == "bust" and heard.said["target"].endswith("/1")),
        "five busts, one after another, are told in another order, or not all",
    ),
    (IN_ORDER, counts_for_each(), "two readers are told of a bust under other ids"),
    (AS_ASKED, retelling("bust", kind="key"), "an event tells kind 'key', and 'prefix' was asked"),
    (AS_ASKED, retelling("bust", soft=None), "an event tells soft 'False', and 'True' was asked"),
    (AS_ASKED, retelling("bust", strategy="direct"), "an event tells strategy 'direct', and 'dimensional' was asked"),
    (AS_ASKED, retelling("bust", namespace="default"), "an event tells namespace 'default', and 'conformance-"),
    (COMES_BACK, going_on(lambda _: None), "is told 0 of 3 events that were missed before it is live"),
    (COMES_BACK, Telling(forgets_one), "is told 2 of 3 events that were missed before it is live"),
    (COMES_BACK, back_by(1), "is told 4 of 3 events that were missed before it is live"),
    (COMES_BACK, going_on(lambda _: "x"), "it has a reader forget everything who has missed little or nothing"),
    (COMES_BACK, back_by(1, streams=-1), "is told 4 of 3 events that were missed before it is live"),
    (RESETS, going_on(lambda _: None), "after an id of another epoch: a stream begins with live, not with reset"),
    (
        RESETS,
        going_on(lambda after: after if len(after) < 32 else None),
        "after an id that was never given: a stream begins with live, not with reset",
    ),
    (
        RESETS,
        going_on(lambda after: after if "-" in after else None),
        "after an id that is none: a stream begins with live, not with reset",
    ),
    (
        RESETS,
        going_on(lambda after: after.removesuffix("x")),
        "after an id with a number that is none: a stream begins with bust, not with reset",
    ),
    (RESETS, retelling("reset", reason=None), "an event reset cannot be read: reason: Field required"),
    (RESETS, TellsWhatWasMissed(after=False).telling(), "after an id of another epoch a reset tells what was busted"),
    (RESETS, TellsWhatWasMissed(after=True).telling(), "after an id of another epoch a reset tells what was busted"),
    (RESETS, Telling(resets_to_the_beginning), "a reset has another id than the newest event"),
    (BY_PREFIX, unfiltered("prefix"), "who wants prefix a, prefix z/ is told of a direct bust of the key ab"),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: wants(heard, begins_alike)),
        "who wants prefix a, prefix z/ is told of a direct bust of the key ab",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: wants(heard, str.__eq__)),
        "who wants prefix a, prefix z/ is not told of a direct bust of the key a/",
    ),
    (
        BY_PREFIX,
        silent(lambda heard: heard.name == "bust" and not wants(heard, lambda prefix, key: key.startswith(prefix))),
        "who wants prefix a, prefix z/ is not told of a direct bust of the prefix above",
    ),
    (
        BY_PREFIX,
        silent(lambda heard: heard.name == "bust" and heard.said["strategy"] == "dimensional"),
        "b.css.gz, prefix c.css.gz, prefix d.css?v=1 is not told of a dimensional bust of the key a.css",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: of_interest(heard, strategy="dimensional")),
        "prefix d.css?v=1 is told of a direct bust of the key c.css",
    ),
    (
        BY_PREFIX,
        unfiltered("prefix", instead=lambda heard: of_interest(heard, kind=heard.said["kind"].replace("tag", "key"))),
        "who wants prefix a, prefix z/ is told of a direct bust of the tag a/c",
    ),
    (BY_TAG, unfiltered("tag", "prefix"), "tag u, prefix p is told of a direct bust of the tag t/a"),
    (BY_TAG, unfiltered("tag"), "who wants tag t, tag u, prefix p is not told of a direct bust of the tag t"),
    (
        BY_TAG,
        silent(lambda heard: "tag" not in heard.query and heard.said.get("kind") == "tag"),
        "the bust of a tag is not told to who wants the prefix of an entry with it",
    ),
    (TOLD_APART, unfiltered("namespace"), "a reader of one namespace is told what was busted in another, or not what"),
    (TELLS_NO_DRY_RUN, busts_in_a_dry_run(), "a dry run, which removes nothing, is told as a bust"),
    (ALSO, retelling("bust", also=None), "also does not name an entry that depends on what was busted"),
    (
        ALSO,
        Telling(lambda heard: [heard.saying(also=None) if heard.said.get("kind") == "tag" else heard]),
        "also does not name an entry that has the tag that was busted",
    ),
    (HEARTBEAT, silent(lambda heard: not heard.name), "a stream says nothing for 1.2 s; every 0.1 s it must say the"),
    (HEARTBEAT, Telling(stays_behind), "a stream says what it said; every 0.1 s it must say the newest id"),
    *(
        (
            ACCESS,
            Telling(say=answering("GET", "capabilities", access={STREAM: tier})),
            f"events.stream is told to be {tier}, and answers no token with HTTP 200",
        )
        for tier in ("protected", "private")
    ),
]

DEFECTS: list[tuple[str, Defect, str]] = [
    (
        "busts targets of any script, written out or escaped",
        busting(lambda target: "キー" in target, cache_key=cache_key_of("?")),
        "cache_key is not the SHA-256",
    ),
    ("reads a target of 8192 bytes", too_large, "answered HTTP 413, expected 200 or 422"),
    (
        "reads a target of 8192 bytes",
        busting(lambda target: len(target) > 4000, cache_key=cache_key_of("?")),
        "cache_key is not the SHA-256",
    ),
    ("reports no fault stage beyond the scale", answering("POST", "bust", fault_stage=13), "fault_stage is 13"),
    (
        "names the field at fault in an RFC 9457 problem",
        plain_words,
        "a refusal is text/plain, not ",
    ),
    ("tells its capabilities on one of the two routes", older_and_broken, "the map of bindings is not one: "),
    (
        "has a sound capability document",
        answering("GET", "capabilities", capabilities=["daemon.status"]),
        "does not name cache.bust",
    ),
    ("has a sound capability document", answering("GET", "capabilities", semverx="1.0"), "semverx: version '1.0'"),
    (
        "has a sound capability document",
        answering("GET", "capabilities", requires={"semverx": "new"}),
        "requires.semverx: range 'new'",
    ),
    ("has a sound capability document", answering("GET", "capabilities", binding=7), "binding: Input should be"),
    ("has a sound capability document", answering("GET", "capabilities", 500), "answered HTTP 500, expected 200"),
    ("tells by its ETag that its document is unchanged", weak_tags, "its ETag is W/"),
    ("tells by its ETag that its document is unchanged", forgets_its_tag, "answered HTTP 200, expected 304"),
    ("tells by its ETag that its document is unchanged", without("ETag", 304), "or another ETag"),
    ("tells by its ETag that its document is unchanged", always_unchanged, "answered HTTP 304, expected 200"),
    *(
        (
            "signs every answer with the digest of its document",
            without("Bustcall-Capabilities", status),
            f"Bustcall-Capabilities of an HTTP {status} ",
        )
        for status in (200, 304, 400, 404, 405, 415, 422)
    ),
    ("tells the access of each capability", answering("GET", "capabilities", access={}), "does not name cache.bust"),
    (
        FITS,
        answering("GET", "capabilities", requires={"semverx": ">=99", "capabilities": ["cache.telepathy"]}),
        "does not match >=99; capability cache.telepathy is missing",
    ),
    (FITS, answering("GET", "capabilities", requires={"semverx": "new"}), "cannot be read: range 'new'"),
    *(
        (
            ACCESS,
            answering("GET", "capabilities", access={name: tier}),
            f"{name} is told to be {tier}, and answers no token with HTTP ",
        )
        for name in (*EVERYTHING, "daemon.status", "daemon.capabilities")
        if name not in {IDEMPOTENT, *OF_BUSTS}
        for tier in ("protected", "private")
    ),
    (ACCESS, wants_any_token, "cache.bust is told to be protected, and answers a wrong token with HTTP 200"),
    (ACCESS, denies_its_status, "daemon.status is told to be public, and answers no token with HTTP 401"),
    (ONCE, answering("POST", "bust", 500), "answered HTTP 500, expected 200"),
    (ONCE, without("Idempotency-Replayed", 200), "of 8 requests with one key at once, 8 and not 1 were done anew"),
    (SWAPS_ONCE, replays_at_once, "of 8 requests with one key at once, 0 and not 1 were done anew"),
    (SWAPS_ONCE, swaps_nothing, "the current version is 1.0.0, and should be 1.1.0"),
    (
        KEY_OF_ANOTHER_KIND,
        remembers_targets_alone,
        "of a plain bust with another kind: answered HTTP 200, expected 422",
    ),
    (KEY_OF_ANOTHER_KIND, deaf_to("kind"), "with another kind: answered HTTP 200, expected 422"),
    (KEY_OF_ANOTHER_KIND, deaf_to("soft", echoes=True), "with another soft: answered HTTP 200, expected 422"),
    (KEY_OF_ANOTHER_KIND, deaf_to("namespace", echoes=True), "with another namespace: answered HTTP 200, expected 422"),
    (LAYERS, fails_in_a_layer(name="fake"), "it has two layers of one name, or one without a name: fake, fake"),
    (LAYERS, fails_in_a_layer(name=""), "or one without a name"),
    (LAYERS, fails_in_a_layer(ok=False, error="away"), "HTTP 200 to a bust that failed in the layer outer"),
    (LAYERS, fails_in_a_layer(removed=3), "removed is 0, and of its layers together 3"),
    (REPEATS, deaf_to("kind"), "the answer to a bust by prefix tells kind None, and 'prefix' was asked"),
    (REPEATS, deaf_to("soft"), "the answer to a soft bust of a key tells soft None, and True was asked"),
    (REPEATS, deaf_to("dry_run"), "the answer to a dry run of a key tells dry_run None, and True was asked"),
    (REPEATS, deaf_to("namespace"), "the answer to a bust of a key in a namespace tells namespace None, and"),
    (REPEATS, saying({}, soft=True), "the answer to a bust of a key tells soft True, and False was asked"),
    (REPEATS, saying({"kind": "tag"}, kind="prefix"), "a bust by tag tells kind 'prefix', and 'tag' was asked"),
    (REPEATS, saying({"kind": "tag", "soft": True}, soft=None), "the answer to a soft dry run by tag in a namespace"),
    (REPEATS, saying({"kind": "all"}, kind=None), "a bust of everything in a namespace tells kind None, and 'all'"),
    (REPEATS, saying({"dry_run": True}, matched=None), "a dry run of a key tells matched None and removed 0"),
    (REPEATS, saying({"dry_run": True}, removed=2), "a dry run of a key tells matched 0 and removed 2"),
    (REPEATS, keeps_dry_runs, "a dry run of a key is accepted as a job, and should be answered at once"),
    (REPEATS, accepts_by_words_alone, "with HTTP 200, and the answer says that it is accepted"),
    (REPEATS, is_no_job, "with HTTP 202, and the answer says that it is done"),
    (
        CLAIMS,
        hearing(lambda sent: sent.get("kind") == "no-such-kind", kind="key"),
        "the kind no-such-kind, which it does",
    ),
    (CLAIMS, deaf_to("kind", echoes=True), "did a bust of the kind no-such-kind"),
    (FIELDS, hearing(lambda sent: sent.get("soft") == "yes", soft=True), "soft 'yes': answered HTTP 200, expected 422"),
    (FIELDS, hearing(lambda sent: sent.get("dry_run") == 0, dry_run=False), "dry_run '0': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("verify") == 1, verify=True), "verify '1': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("settle") == -1, settle=0), "settle '-1': answered HTTP 200, expected 422"),
    (FIELDS, hearing(lambda sent: sent.get("settle") == 3601, settle=0), "settle '3601': answered HTTP 200"),
    (FIELDS, hearing(lambda sent: sent.get("kind") == "", kind="key"), "kind '': answered HTTP 200, expected 422"),
    (FIELDS, blaming("bust", "target"), "the problem names the field 'target', not 'soft'"),
    (FIELDS, removes_what_it_refused, "a refused bust removed an entry"),
    (
        NO_NAMESPACE,
        hearing(lambda sent: sent.get("namespace") == "", namespace=None),
        "namespace '': answered HTTP 200",
    ),
    (NO_NAMESPACE, deaf_to("namespace", echoes=True), "namespace '': answered HTTP 200, expected 422"),
    (NO_NAMESPACE, removes_what_it_refused, "a refused bust removed an entry"),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("kind") == "all" and "confirm" not in sent, confirm=True),
        "everything is busted without confirm: answered HTTP 200, expected 422",
    ),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("confirm") is False, confirm=True),
        "everything is busted with confirm false: answered HTTP 200, expected 422",
    ),
    (
        UNCONFIRMED,
        hearing(lambda sent: sent.get("kind") == "all" and sent.get("confirm") is True, target="*"),
        "everything is busted with another target than *: answered HTTP 200, expected 422",
    ),
    (UNCONFIRMED, deaf_to("kind"), "everything is busted without confirm: answered HTTP 200, expected 422"),
    (UNCONFIRMED, conflicting, "answered HTTP 409, expected 422"),
    (UNCONFIRMED, blaming("bust", "kind"), "busting everything without confirm names the field 'kind'"),
    (UNCONFIRMED, removes_what_it_refused, "a refused bust of everything removed an entry"),
    (ALL, empties_everything, "a bust of everything in a namespace reached another namespace"),
    (ALL, saying({"kind": "all"}, removed=1), "of everything in a namespace of 3 entries tells removed 1, not 3"),
    (ALL, deaf_to("kind", echoes=True), "of 3 entries tells removed 0, not 3"),
    (PREFIX, dropping(lambda prefix, key: key.startswith(prefix), "prefix"), "a bust by the prefix a/b reached a/bc"),
    (PREFIX, dropping(lambda prefix, key: key == prefix[:-1], "prefix"), "a bust by the prefix a/b/ reached a/b"),
    (PREFIX, deaf_to("kind", echoes=True), "a bust by a prefix of 6 entries tells removed 1, not 6"),
    (PREFIX, deaf_to("kind"), "the answer to a bust by prefix tells kind None, and 'prefix' was asked"),
    (TAG, deaf_to("kind", echoes=True), "a bust by a tag of 2 entries tells removed 1, not 2"),
    (TAG, dropping(lambda tag, key: key == tag, "tag"), "a bust by a tag reached the key that is called so"),
    (TAG, dropping(lambda _, key: key.endswith("/c"), "tag"), "a bust by a tag reached an entry with another"),
    (SOFT, removes_soft, "a soft bust removed the entry, which should be stale"),
    (SOFT, deaf_to("soft", echoes=True), "a soft bust removed the entry, which should be stale"),
    (SOFT, deaf_to("soft"), "the answer to a soft bust of a key tells soft None, and True was asked"),
    (SOFT, saying({"soft": True}, removed=0), "a soft bust of one entry tells removed 0, not 1"),
    (APART, forgets_the_namespace, "a bust in a namespace reached another"),
    (APART, forgets_the_default_namespace, "a bust in a namespace reached the default one"),
    (APART, deaf_to("namespace"), "the answer to a bust of a key in a namespace tells namespace None, and"),
    (DRY_RUN, removes_in_a_dry_run, "a dry run over 2 entries tells matched 0, not 2"),
    (DRY_RUN, deaf_to("dry_run"), "the answer to a dry run of a key tells dry_run None, and True was asked"),
    (DRY_RUN, counts_what_is_gone, "a dry run after the bust tells matched 2, not 0"),
    (DRY_RUN, saying({"kind": "tag", "dry_run": True}, matched=5), "a dry run over 1 entries tells matched 5, not 1"),
    (
        DRY_RUN,
        saying({"kind": "prefix", "dry_run": True}, matched=1),
        "a dry run over 2 entries tells matched 1, not 2",
    ),
    (VERIFIES, deaf_to("verify"), "the answer to a bust of a key with verify does not say verified"),
    (SETTLES, deaf_to("settle"), "a bust with settle 0.5 is told to settle otherwise (fake 0)"),
    (
        SETTLES,
        hearing(lambda sent: sent.get("settle") == 0, settle=1),
        "a bust with settle 0 is told to settle otherwise",
    ),
    (STANDS, of_jobs(job="another"), "asked for a job, it tells of another"),
    (STANDS, of_jobs(reason=None), "a job tells reason None, and 'because of conformance-"),
    (STANDS, of_jobs(binding="unknown"), "a job tells binding 'unknown', and 'conformance' was asked"),
    (STANDS, of_jobs(target="*"), "a job tells target '*', and 'conformance/"),
    (STANDS, of_jobs(kind="key"), "a job tells kind 'key', and 'tag' was asked"),
    (STANDS, of_jobs(soft=False), "a job tells soft False, and True was asked"),
    (STANDS, of_jobs(strategy="direct"), "a job tells strategy 'direct', and 'hybrid' was asked"),
    (STANDS, of_jobs(ended=None), "a job that is done does not tell when it ended"),
    (STANDS, of_jobs(state="failed"), "a job that nobody cancelled is failed"),
    (STANDS, of_jobs(state="settling"), "a job that is settling tells when it ended"),
    (STANDS, of_jobs(progress={"done": 3, "total": 2}), "a job has done 3 of 2 entries"),
    (STANDS, of_jobs(state="asleep"), "state: Input should be"),
    (LISTS, listing(lambda _: []), "a bust that has a job is not in the list of them"),
    (LISTS, listing(lambda jobs: jobs[::-1]), "the newest job is not listed first"),
    (LISTS, listing(lambda jobs: jobs * 2), "with limit=1 it lists 2 jobs"),
    (LISTS, deaf_to_the_query("before"), "before does not leave out what is not older than that job"),
    (LISTS, deaf_to_the_query("state"), "with state=cancelled it lists a job that is running"),
    (QUESTIONS, takes_any_question, "?limit=0: answered HTTP 200, expected 422"),
    (NO_JOB, has_no_such_route, "GET of a job that is not known is a problem of type about:blank, not urn:bustcall:"),
    (NO_JOB, knows_every_job, "answered HTTP 200, expected 404"),
    (CANCELS, cancels_nothing, "a job is running after it was cancelled"),
    (CANCELS, of_jobs("DELETE", state="done"), "a job that would go on for 60 s is done after it was cancelled"),
    (CANCELS, revives, "a job that was cancelled is waiting when it is asked for again, or ended again"),
    (OVER_STAYS, cancels_what_is_over, "a job that was done is cancelled after it was cancelled, or ended again"),
    (JOB_OF_A_KEY, makes_a_job_of_each_repeat, "the answer to a repeat is another than the first"),
    (JOB_OF_A_KEY, without("Idempotency-Replayed", 202), "the answer to a repeat has Idempotency-Replayed None"),
    (BUST_DEPENDENTS, answering("POST", "bust", removed=1), "with 2 dependents tells removed 1, not 3"),
    (BUST_DEPENDENTS, answering("POST", "bust", removed=3), "a direct bust of one entry tells removed 3"),
    (BUST_DEPENDENTS, busts_one_dependent, "with 2 dependents tells removed 1, not 3"),
    ("answers a capability document with its own", other_document, "with another one than its own"),
    ("answers a capability document with its own", answering("POST", "capabilities", 202), "answered HTTP 202"),
    ("refuses what is no capability document", accepting("capabilities"), "answered HTTP 200, expected 400 or 422"),
    ("keeps what is announced of dependencies", unsorted, "versions 2.0.0-rc.1, 1.2.0, 1.0.0, not as current 1.2.0"),
    ("keeps what is announced of dependencies", answering("POST", "dependencies", current="9.0.0"), "current 9.0.0"),
    ("keeps what is announced of dependencies", renames, "is not listed as it was answered"),
    ("refuses announcements that say no dependency", accepting("dependencies"), "answered HTTP 200, expected 422"),
    ("refuses announcements that say no dependency", blaming("dependencies", None), "names the field None"),
    ("refuses announcements that say no dependency", keeps_what_it_refused, "whose announcement was refused"),
    ("refuses announcements that say no dependency", follows_what_it_refused, "changed what is known"),
    (FORGETS, forgets_nothing, "a forgotten dependency is still listed, or another is not"),
    (FORGETS, forgets_everything, "a forgotten dependency is still listed, or another is not"),
    (FORGETS, misses_what_is_forgotten, "answered HTTP 404, expected 200"),
    (FORGETS, answering("POST", "dependencies/forget", name="another"), "it tells that it forgot another dependency"),
    (FORGETS, answering("POST", "dependencies/forget", 409), "answered HTTP 409, expected 200"),
    (FORGETS_UNUSED, forgets_what_is_in_use, "a dependency changed that could not be forgotten"),
    (FORGETS_UNUSED, answering("POST", "dependencies/forget", 409), "answered HTTP 409, expected 200"),
    ("resolves a spec to the best known version", wrong_version, "@latest is 2.1.0-rc.1 (experimental), not 2.0.0"),
    ("resolves a spec to the best known version", answering("POST", "resolve", 404), "answered HTTP 404"),
    ("resolves a spec to the best known version", answering("POST", "resolve", state="new"), "state: Input should be"),
    ("refuses specs that mean no known version", blaming("resolve", "name"), "names the field 'name', not 'spec'"),
    ("refuses specs that mean no known version", accepting("resolve"), "answered HTTP 200, expected 422"),
    ("swaps dependencies", answering("POST", "hotswap", committed=False), "was not committed"),
    ("swaps dependencies", answering("POST", "hotswap", swaps=[]), "does not tell what was replaced"),
    ("swaps dependencies", swaps_nothing, "is told as current 1.0.0"),
    ("answers a repeated swap from memory", without("Idempotency-Replayed", 200), "Idempotency-Replayed None"),
    ("answers a repeated swap from memory", swaps_again, "the current version is 1.1.0, and should be 1.0.0"),
    ("answers a repeated swap from memory", accepting("hotswap"), "answered HTTP 200, expected 422"),
    ("remembers no refused swap under a key", RemembersRefusals(), "answered HTTP 409, expected 200"),
    ("remembers no refused swap under a key", replays_at_once, "the first success of a key has"),
    ("keeps to the rules of hot swaps", accepting("hotswap", committed=True), "answered HTTP 200, expected 409"),
    ("keeps to the rules of hot swaps", swaps_the_first, "the current version is 2.0.0, and should be 1.0.0"),
    ("swaps all or none", swaps_the_first, "the current version is 1.1.0, and should be 1.0.0"),
    ("refuses what is no swap", blaming("hotswap", None), "names the field None, not 'swaps'"),
    ("refuses what is no swap", accepting("hotswap"), "answered HTTP 200, expected 422"),
    (DEPENDENTS, answering("POST", "hotswap", busted=1), "a swap of what 3 entries depend on tells busted 1, not 3"),
    (DEPENDENTS, answering("POST", "hotswap", busted=0), "a swap of what 3 entries depend on tells busted 0, not 3"),
    (DEPENDENTS, answering("POST", "hotswap", busted=3), "a swap of what 0 entries depend on tells busted 3, not 0"),
    (DEPENDENTS, busts_one_dependent, "a swap of what 3 entries depend on tells busted 1, not 3"),
    (DEPENDENTS, busts_everything, "an entry was busted that does not depend"),
]


@pytest.mark.parametrize(("name", "defect", "detail"), DEFECTS)
async def test_a_daemon_with_one_defect_does_not_pass(name: str, defect: Defect, detail: str) -> None:
    """The check that looks for it tells what was found instead."""
    async with bent(defect) as url:
        verdict = await judged(name, url)
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


@pytest.mark.parametrize(("name", "defect", "detail"), OF_STREAMS)
async def test_a_daemon_with_one_defect_in_what_it_tells_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, name: str, defect: Telling, detail: str
) -> None:
    """The check that looks for it tells what was found instead; what is not told is not waited for long."""
    monkeypatch.setattr(reader, "_SOON", 0.5)
    async with bent(defect) as url:
        verdict = await judged(name, url, [*EVERYTHING, STREAM], timeout=1.0 if "it is live" in detail else PATIENCE)
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


async def test_a_daemon_that_refuses_without_a_reason_does_not_pass() -> None:
    """A refused swap says in `unmet` why."""

    def silent(exchange: Exchange) -> None:
        if exchange.status == 409:
            exchange.say(unmet=[])

    async with bent(silent) as url:
        assert "does not say in unmet why" in (await judged("swaps all or none", url)).detail


async def test_without_a_defect_the_same_daemon_passes() -> None:
    """So it is the defects that are found."""
    for defect in (lambda _: None, Telling()):
        async with bent(defect) as url:
            assert failed(await check_daemon(url, strict=True)) == {}


async def test_what_others_do_and_what_is_not_known_changes_nothing_in_what_is_told() -> None:
    """Busts of somebody else, in the midst of it, and events of a later version; two runs at once."""

    def rumours(heard: Heard) -> list[Heard | bytes]:
        others = bust_at(heard.at(10 * heard.number - 1), 10 * heard.number - 1, "others/a")
        before = others if heard.name == "bust" else b": a comment\n\nevent: rumour\ndata: nothing\n\n"
        return [before, heard.at(10 * heard.number)]

    def place(wanted: list[tuple[str, str]], after: str | None) -> tuple[list[tuple[str, str]], str | None]:
        return wanted, after.removesuffix("0") if after is not None and after.endswith("0") else after

    async with bent(Telling(rumours, ask=place)) as url:
        for verdicts in await asyncio.gather(check_daemon(url), check_daemon(url)):
            assert {name: why for name, why in failed(verdicts).items() if name in OF_EVENTS} == {}
            assert not {*skipped(verdicts)} & {*OF_EVENTS}


@pytest.mark.parametrize("capabilities", [(), ("cache.bust.tag",)])
async def test_a_daemon_that_tells_and_has_nothing_else_is_judged_by_what_it_has(capabilities: Sequence[str]) -> None:
    """Keys alone, or tags, and nothing registered."""
    async with in_memory() as url:
        for name in OF_EVENTS:
            verdict = await judged(name, url, ["cache.bust", STREAM, *capabilities])
            assert verdict.outcome == ("passed" if {*named(name).needs} <= {STREAM, *capabilities} else "skipped")


async def test_a_heartbeat_that_is_long_is_not_waited_for() -> None:
    """The verdict says so."""
    async with in_memory(beat=60.0) as url:
        verdict = await judged(HEARTBEAT, url, [*EVERYTHING, STREAM])
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: it would say so every 60 s only")


async def test_what_a_cache_cannot_have_is_not_missed_in_what_is_told() -> None:
    """Keys of files, for example, have no question marks."""

    def refuses(exchange: Exchange) -> None:
        if exchange.asks() and "?" in exchange.sent["target"]:
            exchange.status = 422
            exchange.body = json.dumps({"title": "No", "status": 422, "detail": "no", "field": "target"}).encode()

    def hears(sent: dict[str, Any]) -> dict[str, Any]:
        return {**sent, "dry_run": True} if "?" in sent["target"] else sent

    async with bent(Telling(hear=hears, say=refuses)) as url:
        assert (await judged(BY_PREFIX, url, [*EVERYTHING, STREAM])).outcome == "passed"


async def test_a_cache_that_does_not_tell_what_it_removes_is_judged_by_what_it_tells_of_swaps() -> None:
    """Nothing can be said of its busts, which the verdict says."""

    def silent(exchange: Exchange) -> None:
        if exchange.is_("POST", "bust") and exchange.status == 200:
            exchange.say(removed=None)

    async with bent(silent) as url:
        assert (await judged(DEPENDENTS, url)).outcome == "passed"
        verdict = await judged(BUST_DEPENDENTS, url)
    assert verdict.outcome == "skipped"
    assert "not decided: a bust of a target with 2 dependents tells removed None" in verdict.detail


async def test_what_may_be_a_cheat_or_a_cache_of_files_is_not_decided() -> None:
    """A daemon that tells of no entry that it was there says the same as a cache that was never filled."""
    async with bent(busts_no_dependents) as url:
        verdicts = [await judged(name, url) for name in (BUST_DEPENDENTS, DEPENDENTS)]
    assert {verdict.outcome for verdict in verdicts} == {"skipped"}
    for verdict, told in zip(verdicts, ("removed 0", "busted 0"), strict=True):
        assert told in verdict.detail
        assert verdict.detail.endswith("and so is a daemon that busts nothing of it")


@asynccontextmanager
async def careless() -> AsyncIterator[str]:
    """Serve what the fake daemon serves, but look keys up, then act, then write them down, as if alone."""
    answers: dict[tuple[str, str], bytes] = {}
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake, aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.Response:
            body = await request.read()
            name = (request.path, request.headers.get("Idempotency-Key", ""))
            if name in answers:
                headers = {"Content-Type": "application/json", "Idempotency-Replayed": "true"}
                return web.Response(body=answers[name], headers=headers)
            headers = {"Content-Type": "application/json"}
            async with session.request(request.method, fake.url + request.path, data=body, headers=headers) as answer:
                told = await answer.read()
                if answer.status == 200 and name[1]:
                    answers[name] = told
                return web.Response(status=answer.status, body=told, content_type="application/json")

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", forward)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


@pytest.mark.parametrize(
    ("name", "sound", "detail"),
    [
        (ONCE, "answers a repeat of a key from memory", r"of 8 requests .* at once, \d and not 1 were done anew"),
        (SWAPS_ONCE, "remembers no refused swap under a key", "answered HTTP 409, expected 200"),
    ],
)
async def test_a_daemon_that_looks_and_then_acts_does_not_pass(name: str, sound: str, detail: str) -> None:
    """One request after another it serves well."""
    async with careless() as url:
        assert (await judged(sound, url)).outcome == "passed"
        verdict = await judged(name, url)
    assert verdict.outcome == "failed"
    assert re.fullmatch(detail, verdict.detail)


async def test_requests_at_once_of_which_one_gets_no_answer_are_no_answer() -> None:
    """The others are waited for."""
    async with FakeDaemon([Answer(), Answer(reset=True)], capabilities=[IDEMPOTENT]) as fake:
        verdict = await judged(ONCE, fake.url)
        assert len(fake.requests) == 8
    assert (verdict.outcome, verdict.answered) == ("failed", False)


# Kinds of busts, and jobs


async def test_a_second_bust_that_never_comes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored between the two is still there, some time after the second was due."""
    monkeypatch.setattr(kinds, "LATE", 1.0)
    async with bent(deaf_to("settle")) as url:
        verdict = await judged(BUSTS_AGAIN, url)
    assert verdict.outcome == "failed"
    assert verdict.detail == "what was stored before the second bust was due is still there 1 s after it"


async def test_a_daemon_too_slow_to_store_anything_before_the_second_bust_is_not_judged_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A longer time is tried, up to what a check may take."""
    monkeypatch.setattr(kinds, "_SETTLE", 1e-9)
    monkeypatch.setattr(kinds, "LATE", 3e-9)
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(BUSTS_AGAIN, fake.url)
        assert len([bust for bust in fake.applied if bust.settle]) == 2
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: two requests take it more than 3e-09 s")


async def test_a_job_that_does_not_end_is_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be reached is like that, and no fault of the daemon's."""
    monkeypatch.setattr(entries, "LATE", 0.05)
    async with FakeDaemon([Answer.accepted()] * 5, capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(VERIFIES, fake.url)
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: a job is still running after 0.05 s")


async def test_jobs_of_a_daemon_that_advertises_none_are_a_fault() -> None:
    """A client could not ask for them, and takes such an answer for none."""
    without_jobs = set(EVERYTHING) - {JOBS}
    async with FakeDaemon([Answer.accepted()], capabilities=without_jobs - {"cache.bust"}) as fake:
        verdict = await judged(VERIFIES, fake.url, without_jobs)
    assert (verdict.outcome, verdict.detail) == (
        "failed",
        "a bust is answered with HTTP 202, which takes cache.bust.jobs",
    )


async def test_a_layer_of_a_job_that_failed_says_why() -> None:
    """That it failed is no fault; that nobody is told is one."""
    for error, outcome in (("away", "passed"), (None, "failed")):
        layers = [LayerReply(name="redis", ok=False, error=error)]
        async with FakeDaemon([Answer.accepted(layers=layers)], capabilities=[JOBS]) as fake:
            assert (await judged(LAYERS, fake.url)).outcome == outcome


async def test_where_no_job_is_named_nothing_is_said_of_jobs() -> None:
    """A daemon may do everything at once, and tell jobs of others."""

    def at_once(exchange: Exchange) -> None:
        if exchange.asks():
            exchange.status = 200
            exchange.say(status="success", job=None)

    async with bent(at_once) as url:
        for name in (STANDS, LISTS, CANCELS, OVER_STAYS, JOB_OF_A_KEY):
            verdict = await judged(name, url)
            assert (verdict.outcome, verdict.detail) == (
                "skipped", "not decided: it names no job in its answers to busts",
            )  # fmt: skip
        for name in (QUESTIONS, NO_JOB):
            assert (await judged(name, url)).outcome == "passed"


async def test_jobs_are_asked_for_in_a_strategy_that_the_daemon_knows() -> None:
    """Hybrid only if it is said to be supported."""
    for document, advertises in ((True, {"supported_strategies": ["direct", "dimensional"]}), (False, {})):
        async with FakeDaemon(capabilities=[JOBS], document=document, advertises=advertises) as fake:
            assert (await judged(LISTS, fake.url)).outcome == "skipped"
            assert {bust.strategy for bust in fake.requests} == {"dimensional"}


async def test_a_job_that_is_not_done_for_long_is_not_judged_by_its_cancelling() -> None:
    """It may be settling, since nobody can say when that ends."""
    async with bent(of_jobs(state="settling", ended=None)) as url:
        verdict = await judged(OVER_STAYS, url)
    assert (verdict.outcome, verdict.detail) == ("skipped", "not decided: the job is settling")


async def test_a_cache_in_which_nothing_is_held_is_judged_by_its_words_alone() -> None:
    """What it says of its busts is true of an empty one; a wrong number is not."""

    def empty(exchange: Exchange) -> None:
        if exchange.asks():
            counts = {name: 0 for name in ("removed", "matched") if name in exchange.said}
            exchange.say(**counts, layers=[])

    async with bent(empty) as url:
        for name in (ALL, PREFIX, TAG, SOFT, APART, DRY_RUN, BUSTS_AGAIN):
            verdict = await judged(name, url)
            assert (verdict.outcome, verdict.detail.startswith("not decided: ")) == ("skipped", True), verdict
        for name in (UNCONFIRMED, FIELDS, NO_NAMESPACE):
            assert (await judged(name, url)).outcome == "passed"


async def test_keys_that_a_cache_cannot_hold_are_left_out() -> None:
    """A prefix is judged by the others."""

    def without(marks: str) -> Defect:
        def defect(exchange: Exchange) -> None:
            if exchange.is_("POST", "entries") and any(mark in exchange.sent["key"] for mark in marks):
                exchange.status = 422
                exchange.fake.entries.pop(exchange.sent["key"])

        return defect

    async with bent(without("?*")) as url:
        assert (await judged(PREFIX, url)).outcome == "passed"
        assert (await judged(TAG, url)).outcome == "passed"
    async with bent(without("/")) as url:
        assert (await judged(TAG, url)).detail == "answered HTTP 422, expected 200"
        assert FORGETS_UNUSED in failed(await check_daemon(url))


async def test_without_registrations_the_kinds_are_judged_by_their_answers() -> None:
    """What is repeated, refused and told of jobs; not what goes."""
    async with FakeDaemon(capabilities=[*OF_BUSTS, JOBS, IDEMPOTENT], layers=["fake"]) as fake:
        verdicts = await check_daemon(fake.url)
    assert failed(verdicts) == {}
    assert all("cache.register" in named(name).needs for name in (ALL, PREFIX, TAG, SOFT, APART, DRY_RUN, BUSTS_AGAIN))
    for name in (REPEATS, CLAIMS, FIELDS, NO_NAMESPACE, UNCONFIRMED, VERIFIES, SETTLES, STANDS, JOB_OF_A_KEY):
        assert name not in skipped(verdicts)


@pytest.mark.parametrize("kinds", [["cache.bust.tag"], ["cache.bust.prefix", "cache.bust.soft"]])
async def test_a_daemon_with_some_kinds_refuses_the_others(kinds: list[str]) -> None:
    """It knows the field, so that it can; one that takes them for keys does not pass."""
    async with FakeDaemon(capabilities=kinds) as fake:
        assert (await judged(CLAIMS, fake.url, kinds)).outcome == "passed"
        for advertised in (kinds, ["cache.bust.soft"]):
            assert (await judged(FIELDS, fake.url, advertised)).outcome == "passed"
    async with FakeDaemon(capabilities=["cache.bust.namespace"]) as fake:
        verdict = await judged(CLAIMS, fake.url, kinds)
    assert verdict.outcome == "failed"
    assert verdict.detail.endswith(", which it does not advertise, for a key; it must refuse it")


async def test_a_daemon_that_does_what_it_does_not_advertise_does_not_pass() -> None:
    """A kind, or a field: clients go by the document."""
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:
        verdict = await judged(CLAIMS, fake.url, ["cache.bust", "cache.bust.soft"])
        assert verdict.detail == "it says that it did a bust of the kind prefix, which it does not advertise"
        verdict = await judged(CLAIMS, fake.url, set(EVERYTHING) - {"cache.bust.soft"})
        assert verdict.detail == "it says that it kept to soft, which it does not advertise"


async def test_nobody_elses_entries_are_removed_by_a_bust_of_everything() -> None:
    """It is tried in a namespace of its own, or as a dry run, or not at all."""
    for kept in ({"cache.bust.namespace", "cache.bust.dry_run"}, {"cache.bust.dry_run"}, set[str]()):
        capabilities = {"cache.register", "cache.bust.all", *kept}
        async with FakeDaemon(capabilities=capabilities) as fake:
            fake.entries["of/others"] = ()
            assert failed(await check_daemon(fake.url, strict=True)) == {}
            assert "of/others" in fake.entries


# What is left behind


async def names_known(url: str) -> list[str]:
    """List the dependencies that a daemon knows."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/dependencies") as answer:
        return [known["name"] for known in (await answer.json())["dependencies"]]


async def test_two_runs_leave_no_dependency_behind(start_brisk: StartDaemon) -> None:
    """Of a cache of files, which holds what depends on them as little as what was registered."""
    url = start_brisk().url
    for _ in range(2):
        await check_daemon(url, strict=True)
        assert await names_known(url) == []


async def test_two_runs_leave_nothing_of_their_own_behind_in_memory() -> None:
    """Neither a dependency nor an entry; what was there before stays."""
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:
        kept = DependencyReply(name="conformance-of-others", current="1.0.0", versions=("1.0.0",))
        fake.dependencies[kept.name] = kept
        fake.entries["conformance/of-others"] = (kept.name,)
        for _ in range(2):
            await check_daemon(fake.url, strict=True)
            assert fake.dependencies == {kept.name: kept}
            assert fake.entries == {"conformance/of-others": (kept.name,)}
            assert {name for name, space in fake._spaces.items() if space.entries} == {"default"}


async def test_what_is_public_is_announced_by_nobody_and_forgotten_too() -> None:
    """The check of the access announces without a token."""
    async with FakeDaemon(capabilities=["cache.dependencies", "cache.register"]) as fake:
        verdicts = await check_daemon(fake.url, token="s3cret")
        assert ACCESS not in skipped(verdicts)
        assert (fake.dependencies, fake.entries) == ({}, {})


async def test_a_daemon_that_cannot_forget_is_left_as_it_is() -> None:
    """Which is its right, and so is asking for the token before it says so."""

    def cannot(exchange: Exchange) -> None:
        if exchange.is_("POST", "dependencies/forget"):
            exchange.status = 404
        elif exchange.path == "/api/v1/capabilities" and exchange.status == 200:
            exchange.say(access={"cache.dependencies": "protected"})
        elif exchange.path == "/api/v1/dependencies" and exchange.token != "Bearer s3cret":
            exchange.status = 401

    async with bent(cannot) as url:
        verdicts = await check_daemon(url, token="s3cret")
        assert failed(verdicts) == {}
        others = {name: why for name, why in skipped(verdicts).items() if name not in OF_EVENTS}
        assert others == dict.fromkeys([FORGETS, FORGETS_UNUSED], "it cannot forget dependencies")


async def test_a_daemon_that_forgets_nothing_is_left_as_it_is() -> None:
    """It fails the check; that nothing can be cleared away is no other failure."""
    async with bent(forgets_nothing) as url:
        assert list(failed(await check_daemon(url, strict=True))) == [FORGETS]
        assert len(await names_known(url)) > 10


async def test_a_daemon_that_is_gone_at_the_end_is_left_alone() -> None:
    """Its verdicts are told all the same."""
    async with FakeDaemon(capabilities=EVERYTHING[1:]) as fake:

        async def leaves(_: object) -> None:
            await fake.stop()

        checks = (named("keeps what is announced of dependencies"), Check("is there until the end", leaves))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(suite, "CHECKS", checks)
            verdicts = await check_daemon(fake.url)
        assert [verdict.outcome for verdict in verdicts] == ["passed", "passed"]


# Access


CHEAT = {**dict.fromkeys(EVERYTHING, "protected"), "daemon.status": "protected", "cache.hotswap": "private"}


@pytest.mark.parametrize("token", [None, "s3cret"])
async def test_a_daemon_that_says_protected_and_serves_everybody_does_not_pass(token: str | None) -> None:
    """Whether or not there is a token; nothing else is wrong with it."""
    async with FakeDaemon(capabilities=EVERYTHING[1:], advertises={"access": CHEAT}) as fake:
        found = failed(await check_daemon(fake.url, token=token))
    assert found == {ACCESS: "cache.register is told to be protected, and answers no token with HTTP 200"}


@pytest.mark.parametrize(
    ("given", "options", "env"),
    [
        ("s3cret", (), {"BUSTCALL_TOKEN": "s3cret"}),
        ("s3cret", ("--access", "cache.hotswap=private"), {"BUSTCALL_TOKEN": "s3cret"}),
        ("s3cret", ("--access", "daemon.capabilities=protected"), {"BUSTCALL_TOKEN": "s3cret"}),
        (
            "0perator",
            ("--access", "cache.hotswap=private", "--access", "daemon.status=public"),
            {"BUSTCALL_TOKEN": "s3cret", "BUSTCALL_OPERATOR_TOKEN": "0perator"},
        ),
        (None, (), {}),
    ],
)
async def test_a_daemon_that_keeps_to_its_access_passes(
    start_brisk: StartDaemon, given: str | None, options: tuple[str, ...], env: dict[str, str]
) -> None:
    """Public, protected and private, with tokens and without, and what nobody may use."""
    verdicts = await check_daemon(start_brisk(*options, env=env).url, token=given, strict=True)
    assert failed(verdicts) == {}
    assert ACCESS not in skipped(verdicts)


async def test_what_nobody_may_use_need_not_be_there() -> None:
    """A capability that is private and not advertised may be missing altogether; one that is served may not."""
    without_swaps = [name for name in EVERYTHING if name not in {"cache.bust", "cache.hotswap"}]
    for capabilities, outcome in ((without_swaps, "passed"), (EVERYTHING[1:], "failed")):
        names = ["cache.bust", "daemon.status", "daemon.capabilities", *without_swaps]
        says = {"capabilities": names, "access": {**dict.fromkeys(names, "public"), "cache.hotswap": "private"}}
        async with FakeDaemon(capabilities=capabilities, advertises=says) as fake:
            assert (await judged(ACCESS, fake.url)).outcome == outcome


async def test_where_no_access_is_told_none_is_asked_for() -> None:
    """Ours must tell it, which is another check."""
    async with FakeDaemon(advertises={"access": {}}) as fake:
        verdict = await judged(ACCESS, fake.url)
    assert (verdict.outcome, verdict.detail) == ("skipped", "its document tells the access of nothing")


# Daemons that speak HTTP badly


@dataclass(frozen=True)
class Crooked:
    """How a daemon of a few lines handles its connections.

    - `head`: what it answers to HEAD, after the status line
    - `silent`: it closes each connection without saying so; `closing`: it says so
    - `hasty`: it takes what has arrived of a body for all of it
    - `lazy`: it leaves the body of what it refuses where it is
    - `stuck`: nobody ever hears of it what it is asked
    - `nonsense`: it speaks something else
    """

    head: bytes = b"Content-Length: 2\r\n\r\n"
    silent: bool = False
    closing: bool = False
    hasty: bool = False
    lazy: bool = False
    stuck: bool = False
    nonsense: bytes = b""


@asynccontextmanager
async def serving(crooked: Crooked) -> AsyncIterator[str]:
    """Serve busts and the status over HTTP/1.1, in just so many words."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not reader.at_eof():
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.split(b" ", 2)[:2]
                found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                length = int(found[1]) if found is not None else 0
                refused = b"application/json" not in head or path != b"/api/v1/bust"
                body = b""
                if not (crooked.lazy and refused):
                    body = await reader.read(length) if crooked.hasty and length else await reader.readexactly(length)
                answer = b"HTTP/1.1 " + reply(method, path, refused, body)
                if crooked.closing:
                    answer = answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
                if crooked.stuck:
                    continue
                writer.write(crooked.nonsense or answer)
                if crooked.silent or crooked.closing or b"Connection: close" in head:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def reply(method: bytes, path: bytes, refused: bool, body: bytes) -> bytes:
        if method == b"HEAD":
            return (b"404 Not Found\r\n" if b"nothing" in path else b"200 OK\r\n") + crooked.head
        if method == b"GET":
            return b"200 OK\r\nContent-Length: 2\r\n\r\n{}"
        try:
            target = None if refused else json.loads(body)["target"]
        except ValueError:
            target = None
        if target is None:
            status = b"404 Not Found" if b"nothing" in path else b"415 No" if refused else b"400 Bad Request"
            return status + b"\r\nContent-Length: 0\r\n\r\n"
        said = json.dumps({"success": True, "cache_key": cache_key_of(target)}).encode()
        return b"200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


CONNECTIONS = "serves one request after another on a connection"
STEP = "stays in step after a refusal"
PIECES = "reads a body that comes in pieces"
HEAD = "answers HEAD without a body"


@pytest.mark.parametrize(
    ("name", "crooked", "outcome", "detail"),
    [
        (CONNECTIONS, Crooked(), "passed", ""),
        (STEP, Crooked(), "passed", ""),
        (PIECES, Crooked(), "passed", ""),
        (HEAD, Crooked(), "passed", ""),
        (CONNECTIONS, Crooked(closing=True), "skipped", "it closes its connections, and says so"),
        (STEP, Crooked(closing=True), "passed", ""),
        (CONNECTIONS, Crooked(silent=True), "failed", ""),
        (STEP, Crooked(lazy=True), "failed", ""),
        (PIECES, Crooked(hasty=True), "failed", "answered HTTP 400, expected 200"),
        (HEAD, Crooked(head=b"Content-Length: 2\r\n\r\n{}"), "failed", "HEAD /api/v1/status has a body of 2 bytes"),
        (HEAD, Crooked(nonsense=b"nonsense\r\n\r\n"), "failed", "HEAD /api/v1/status is answered with no HTTP"),
        (HEAD, Crooked(nonsense=b"HTTP/1.1 500 Oh\r\n\r\n"), "failed", "is answered with HTTP 500, expected one of"),
        (STEP, Crooked(nonsense=b"nonsense\r\n\r\n"), "failed", "it does not speak HTTP: "),
    ],
)
async def test_connections_are_kept_as_http_says(name: str, crooked: Crooked, outcome: str, detail: str) -> None:
    """A daemon may close what it says that it closes; it may not lose count of what it was sent."""
    async with serving(crooked) as url:
        verdict = await judged(name, url)
    assert (verdict.outcome, detail in verdict.detail) == (outcome, True), verdict


async def test_a_connection_that_ends_without_a_word_is_seen_though_the_requests_went_well() -> None:
    """HTTP clients send GET again on another one, and nobody is told."""
    async with serving(Crooked(silent=True)) as url:
        async with Probe(DaemonAddress.parse(url), {}, PATIENCE, alone=True) as probe:
            for _ in range(3):
                await probe.send("GET", "/api/v1/status")
                await asyncio.sleep(0.01)  # its end arrives
            with pytest.raises(Unmet, match="closed a connection without saying so"):
                expect_kept(probe)


async def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some megabytes are enough of any answer."""
    monkeypatch.setattr(probe, "_MAX_BYTES", 1000)
    async with FakeDaemon([Answer.huge(1001), Answer.huge(1000)]) as fake:
        assert "more than 1000 bytes" in (await judged("busts the same key again", fake.url)).detail
        assert (await judged("busts with defaults for every field but the target", fake.url)).ok


# Keys


def applied(target: str = "conformance/naïve key.css", **headers: str) -> Answer:
    """Make the answer to a bust that is always applied anew."""
    body = {"status": "success", "cache_key": cache_key_of(target), "execution_time_ms": 7}
    return Answer(body=json.dumps(body).encode(), headers=headers)


AGAIN = {"Idempotency-Replayed": "true"}


@pytest.mark.parametrize(
    ("check", "answers", "detail"),
    [
        (0, [applied(**AGAIN)], "the first answer to a key has Idempotency-Replayed"),
        (0, [applied(), applied()], "has Idempotency-Replayed None, not 'true'"),
        (0, [applied(), applied("another", **AGAIN)], "is another than the first"),
        (0, [applied(), Answer(status=409)], "answered HTTP 409, expected 200"),
        (2, [applied(), applied(**AGAIN)], "answered HTTP 200, expected 422"),
        (2, [applied(), Answer.problem(422)], "names the field None, not 'Idempotency-Key'"),
        (3, [applied()], "answered HTTP 200, expected 400"),
        (3, [Answer.problem(400)], "names the field None, not 'Idempotency-Key'"),
        (4, [Answer.problem(422), Answer.problem(422)], "answered HTTP 422, expected 200"),
        (4, [Answer.problem(422), applied(**AGAIN)], "the first success of a key has Idempotency-Replayed"),
    ],
)
async def test_a_daemon_that_remembers_wrongly_does_not_pass(check: int, answers: list[Answer], detail: str) -> None:
    """The verdict tells what was found instead."""
    left = iter(answers)

    async def bust(_: web.Request) -> web.Response:
        answer = next(left, answers[-1])
        headers = {"Content-Type": "application/json", **answer.headers}
        return web.Response(status=answer.status, body=answer.body, headers=headers)

    app = web.Application()
    app.router.add_post("/api/v1/bust", bust)
    async with TestServer(app) as server:
        verdict = await judged(OF_KEYS[check], str(server.make_url("")))
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


# The base


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (Answer(status=500), "answered HTTP 500, expected 200"),
        (Answer(body=b"{}"), "cache_key: Field required"),
        (Answer(body=b'{"status": "success", "cache_key": "md5:1"}'), "does not begin with sha256:"),
        (Answer(body=b'{"status": "success", "cache_key": "sha256:1"}'), "is not the SHA-256 of the target"),
        (Answer(reset=True), "no answer"),
    ],
)
async def test_a_daemon_that_answers_wrongly_does_not_pass(answer: Answer, detail: str) -> None:
    """The verdict tells what was found instead."""
    async with FakeDaemon([answer]) as fake:
        verdicts = failed(await check_daemon(fake.url))
    assert detail in verdicts["busts a key and answers with its SHA-256"]


async def test_a_daemon_that_is_down_fails_every_check() -> None:
    """Nothing is raised, and after three checks it is asked no more."""
    verdicts = await check_daemon("http://127.0.0.1:1")
    asked = [verdict for verdict in verdicts if not verdict.skipped]
    assert not any(verdict.ok or verdict.answered for verdict in asked)
    assert [verdict.detail == "not asked any more" for verdict in asked] == [False] * 3 + [True] * (len(asked) - 3)


async def test_a_daemon_that_is_stuck_costs_three_timeouts() -> None:
    """Not one for each check; connections that are taken and never served included."""
    async with serving(Crooked(stuck=True)) as url:
        verdicts = await check_daemon(url, timeout=0.05)
    assert [verdict.detail for verdict in verdicts[:4]] == ["no answer: TimeoutError"] * 3 + ["not asked any more"]


@pytest.mark.parametrize(
    ("url", "token", "setting"),
    [
        ("ftp://127.0.0.1", None, "url"),
        ("http://127.0.0.1:1", "two words", "token"),
        ("http://127.0.0.1:1", "a\r\nX: y", "token"),
        ("http://daemon.example:1", "s3cret", "token"),
    ],
)
async def test_what_cannot_be_asked_is_refused(url: str, token: str | None, setting: str) -> None:
    """A URL that is none; a token that is none, or would cross a network in clear text."""
    with pytest.raises(ConfigurationError) as caught:
        await check_daemon(url, token=token)
    assert caught.value.setting == setting
    assert "s3cret" not in str(caught.value)


def test_every_check_was_seen_to_fail() -> None:
    """Of those that came with the extensions; the others are failed by the daemons above and by the peers' tests."""
    planted = {name for name, _, _ in (*DEFECTS, *OF_STREAMS)} | {
        CONNECTIONS,
        STEP,
        PIECES,
        HEAD,
        BUSTS_AGAIN,
        *OF_KEYS,
    }
    extensions = {check.name for check in CHECKS if check.needs or check.any_of}
    assert extensions | {*OF_DOCUMENTS, LAYERS, CLAIMS} <= planted
    assert len({check.name for check in CHECKS}) == len(CHECKS)
