"""The conformance suite: every daemon of ours passes it whole; who may ask, what is left behind, and bad HTTP."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pybustcall import ConfigurationError
from pybustcall.capabilities import advertisement
from pybustcall.daemon import DaemonSettings, Engine, Indexes, MemoryBackend, create_app
from pybustcall.daemon.configuration import load
from pybustcall.models import DependencyReply, cache_key_of
from pybustcall.testing import (
    CHECKS,
    Answer,
    Check,
    FakeDaemon,
    FaultyProxy,
    Trouble,
    check_daemon,
)
from pybustcall.testing.conformance import probe, suite
from pybustcall.testing.conformance.base import expect_kept
from pybustcall.testing.conformance.checking import Unmet
from pybustcall.testing.conformance.probe import Probe
from pybustcall.topology import DaemonAddress
from tests.bent_daemons import forgets_nothing
from tests.conforming import (
    ACCESS,
    AGAIN,
    ALL,
    APART,
    BEAT,
    BUST_DEPENDENTS,
    BUSTS_AGAIN,
    CLAIMS,
    CONNECTIONS,
    DEPENDENTS,
    DRY_RUN,
    EVERYTHING,
    FIELDS,
    FORGETS,
    FORGETS_UNUSED,
    HEAD,
    IDEMPOTENT,
    LAYERS,
    OF_DOCUMENTS,
    OF_EVENTS,
    OF_KEYS,
    PIECES,
    PREFIX,
    SETTLES,
    STEP,
    STREAM,
    TAG,
    TOLD_APART,
    Exchange,
    bent,
    failed,
    in_memory,
    judged,
    named,
    names_known,
    skipped,
)
from tests.conftest import PATIENCE, StartDaemon
from tests.memcached_process import shared_memcached
from tests.plain_cache import engine_over
from tests.redis_harness import shared_redis

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02"), pytest.mark.requirement("INT-04")]


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


@asynccontextmanager
async def configured(directory: Path, *layers: str) -> AsyncIterator[str]:
    """Serve the reference daemon with these layers of a configuration."""
    file = directory / "bustcall.toml"
    tables = [f"[[layers]]\n{layer}\n" for layer in layers]
    await asyncio.to_thread(file.write_text, "\n".join([f"[events]\nheartbeat = {BEAT}", *tables]), encoding="utf-8")
    configuration = load(file)
    indexes = Indexes()
    app = create_app(Engine(configuration.layers(indexes, {}), indexes), configuration.settings({}))
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


SQLITE = 'backend = "sqlite"\npath = "cache.db"'


@pytest.mark.parametrize("among", [(), ("redis", "sqlite")], ids=["alone", "between others"])
async def test_the_reference_daemon_passes_with_memcached(tmp_path: Path, among: tuple[str, ...]) -> None:
    """Which cannot list what it holds: no dry run is advertised then."""
    layers = [f'backend = "memcached"\nurl = "{shared_memcached().url}"']
    if among:
        layers = [f'backend = "redis"\nurl = "{shared_redis().url}"', *layers, SQLITE]
    async with configured(tmp_path, *layers) as url:
        verdicts = await check_daemon(url, strict=True)
    assert failed(verdicts) == {}
    without = {name for name, why in skipped(verdicts).items() if why == "it does not advertise cache.bust.dry_run"}
    assert without == {check.name for check in CHECKS if "cache.bust.dry_run" in check.needs}


@pytest.mark.parametrize("backend", ["redis", "sqlite"])
async def test_the_reference_daemon_passes_with_entries_of_readers(tmp_path: Path, backend: str) -> None:
    """Everything is advertised; nothing is held there that is only registered."""
    layer = SQLITE if backend == "sqlite" else f'backend = "redis"\nurl = "{shared_redis().url}"'
    async with configured(tmp_path, layer) as url:
        verdicts = await check_daemon(url, strict=True)
    assert failed(verdicts) == {}
    assert all(why.startswith("not decided: ") for why in skipped(verdicts).values())


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


# What is left behind


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
