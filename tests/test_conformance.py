"""The conformance suite: every daemon of ours passes it whole, and it can tell one that does not."""

from __future__ import annotations

import pytest

from pybustcall.testing import CHECKS, Answer, FakeDaemon, Verdict, check_daemon
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
