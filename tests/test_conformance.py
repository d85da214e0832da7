"""The conformance suite: every daemon of ours passes it whole, and it can tell one that does not."""

from __future__ import annotations

import json

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from pybustcall.models import cache_key_of
from pybustcall.testing import CHECKS, Answer, FakeDaemon, Verdict, check_daemon, conformance
from tests.conftest import StartDaemon

pytestmark = [pytest.mark.requirement("RES-12"), pytest.mark.requirement("RES-02")]


def failed(verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    """Tell what did not pass, and why."""
    return {verdict.name: verdict.detail for verdict in verdicts if not verdict.ok}


async def test_the_reference_daemon_passes(start_daemon: StartDaemon) -> None:
    """In a process of its own."""
    verdicts = await check_daemon(start_daemon().url, strict=True)
    assert failed(verdicts) == {}
    assert len(verdicts) == len(CHECKS)


async def test_the_reference_daemon_passes_with_a_token_and_on_a_socket(
    start_daemon: StartDaemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same daemon on a Unix socket, asking for a token."""
    socket = tmp_path_factory.mktemp("s") / "b.sock"
    daemon = start_daemon("--socket", str(socket), env={"BUSTCALL_TOKEN": "s3cret"})
    assert failed(await check_daemon(daemon.url, token="s3cret", strict=True)) == {}
    assert "busts a key and answers with its SHA-256" in failed(await check_daemon(daemon.url))


async def test_the_fake_daemon_passes() -> None:
    """So tests against it say something about the real ones."""
    async with FakeDaemon() as fake:
        assert failed(await check_daemon(fake.url, strict=True)) == {}


IDEMPOTENT = "cache.bust.idempotent"
OF_KEYS = [check.name for check in CHECKS if check.capability == IDEMPOTENT]


@pytest.mark.parametrize("document", [True, False])
async def test_what_is_advertised_is_checked(document: bool) -> None:
    """On either route; what is not advertised is not asked for."""
    async with FakeDaemon(capabilities=(IDEMPOTENT,), document=document) as fake:
        verdicts = await check_daemon(fake.url, strict=True)
    assert failed(verdicts) == {}
    assert len(verdicts) == len(CHECKS)
    async with FakeDaemon(document=document) as fake:
        names = {verdict.name for verdict in await check_daemon(fake.url, strict=True)}
    assert len(OF_KEYS) == 4
    assert {check.name for check in CHECKS} - names == set(OF_KEYS)


@pytest.mark.parametrize("answer", [Answer(status=500), Answer(status=404), Answer(body=b"{"), Answer(reset=True)])
async def test_a_daemon_that_does_not_say_what_it_can_do_is_asked_for_the_base(answer: Answer) -> None:
    """Whether it tells its capabilities is a check of its own."""
    async with FakeDaemon(capabilities=(IDEMPOTENT,), probe_plan=[answer] * 2) as fake:
        names = {verdict.name for verdict in await check_daemon(fake.url)}
    assert not names & set(OF_KEYS)


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
        (1, [applied(), applied(**AGAIN)], "answered HTTP 200, expected 422"),
        (1, [applied(), Answer.problem(422)], "names the field None, not 'Idempotency-Key'"),
        (2, [applied()], "answered HTTP 200, expected 400"),
        (2, [Answer.problem(400)], "names the field None, not 'Idempotency-Key'"),
        (3, [Answer.problem(422), Answer.problem(422)], "answered HTTP 422, expected 200"),
        (3, [Answer.problem(422), applied(**AGAIN)], "the first success of a key has Idempotency-Replayed"),
    ],
)
async def test_a_daemon_that_remembers_wrongly_does_not_pass(check: int, answers: list[Answer], detail: str) -> None:
    """The verdict tells what was found instead."""
    verdict = await judge_scripted(OF_KEYS[check], answers)
    assert not verdict.ok
    assert detail in verdict.detail


async def judge_scripted(name: str, answers: list[Answer]) -> Verdict:
    """Run one check against a daemon that advertises keys, and gives these answers whatever it is asked."""
    left = iter(answers)

    async def bust(_: web.Request) -> web.Response:
        answer = next(left, answers[-1])
        headers = {"Content-Type": "application/json", **answer.headers}
        return web.Response(status=answer.status, body=answer.body, headers=headers)

    app = web.Application()
    app.router.add_post("/api/v1/bust", bust)
    async with TestServer(app) as server:
        (check,) = (check for check in CHECKS if check.name == name)
        async with aiohttp.ClientSession() as session:
            return await conformance._judge(check, conformance._Probe(session, str(server.make_url("")).rstrip("/")))


async def test_an_older_daemon_passes_by_the_other_route() -> None:
    """Capabilities on the route of the existing daemon."""
    async with FakeDaemon(document=False) as fake:
        assert failed(await check_daemon(fake.url)) == {}


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
    """And nothing is raised."""
    verdicts = await check_daemon("http://127.0.0.1:1")
    assert not any(verdict.ok for verdict in verdicts)
