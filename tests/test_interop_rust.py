"""A daemon in Rust that has the base protocol and nothing else: the client and the suite take it as it is."""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from pybustcall import BustcallClient, BustFailed, DaemonsUnavailable, ProtocolViolation, Retry
from pybustcall.daemon_client import DaemonClient
from pybustcall.faults import AttemptFailed, FaultKind
from pybustcall.models import bust_request, cache_key_of
from pybustcall.policies import Pool
from pybustcall.session import SessionManager
from pybustcall.testing import check_daemon
from pybustcall.topology import DaemonAddress
from tests.conftest import PATIENCE
from tests.interop import PeerProcess, require, start_peer
from tests.interop.rust_daemon import rust_binary, rust_tests, start_rust_daemon

pytestmark = pytest.mark.requirement("INT-01")

VECTORS = Path(__file__).with_name("vectors")
PLAIN = "text/plain; charset=utf-8"
ONCE = Retry(attempts=1)

StartRust = Callable[..., PeerProcess]


@pytest.fixture
def start_rust() -> Iterator[StartRust]:
    """Start Rust daemons with options; all are gone when the test ends."""
    started: list[PeerProcess] = []

    def start(*options: str) -> PeerProcess:
        started.append(start_rust_daemon(*options))
        return started[-1]

    yield start
    for peer in started:
        peer.kill()


async def test_it_passes_the_conformance_suite(start_rust: StartRust) -> None:
    """What is asked of every daemon, also of one that is not ours."""
    verdicts = await check_daemon(start_rust().url)
    assert {verdict.name: verdict.detail for verdict in verdicts if not verdict.ok} == {}
    assert "tells its capabilities on one of the two routes" in {verdict.name for verdict in verdicts}


async def test_a_bust_is_acknowledged(start_rust: StartRust) -> None:
    """By the daemon's echo of the tolerance and the target's own cache key, at full stage."""
    daemon = start_rust()
    async with BustcallClient(daemon.url) as client:
        result = await client.bust("cdn/naïve.css", strategy="no such strategy", fault_tolerance=3)
        many = await client.bust_many(f"page-{number}" for number in range(200))
    assert (result.status, result.stage, result.applied, result.daemon) == ("busted", 12, "yes", daemon.url)
    assert (result.reported_stage, result.cache_key) == (3, cache_key_of("cdn/naïve.css"))
    assert (many.busted, many.failed) == (200, 0)


async def test_its_history_is_read_to_the_nanosecond(start_rust: StartRust) -> None:
    """Each bust is a line of it, with nine digits of fraction; what it began with comes first."""
    daemon = start_rust("--history", "2")
    async with BustcallClient(daemon.url) as client:
        await client.bust("a", fault_tolerance=7)
        status = await client.status()
    assert (status.daemon, status.daemon_pid, status.cache_size) == (daemon.url, daemon.pid, "1.2MB")
    assert status.bindings["rust"].status == "active"
    assert status.bindings["python"].version is None
    assert [(record.binding, record.fault_stage) for record in status.fault_history] == [
        ("node", 0),
        ("node", 1),
        ("pybustcall", 7),
    ]
    assert datetime.now(UTC) - status.fault_history[-1].timestamp.instant < timedelta(seconds=PATIENCE)
    _, _, body = await ask(daemon.url, "GET", "/api/v1/status")
    assert re.search(r'"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"', body)


async def test_its_capabilities_are_read_from_the_other_route(start_rust: StartRust) -> None:
    """It has no document: the first route is a 404, and the map of bindings is asked for."""
    async with BustcallClient(start_rust().url) as client:
        capabilities = await client.capabilities()
    assert capabilities.document is None
    assert capabilities.bindings is not None
    assert capabilities.bindings["rust"].semverx == "v0.1.3"
    assert capabilities.bindings["rust"].p2p_enabled
    assert not capabilities.bindings["python"].p2p_enabled


async def ask(
    url: str, method: str, path: str, body: bytes | io.BytesIO | None = None, content_type: str = "application/json"
) -> tuple[int, str | None, str]:
    """Send one request as it is; tell the status, the type and the text of the answer."""
    headers = {} if body is None else {"Content-Type": content_type}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url + path, data=body, headers=headers) as response,
    ):
        return response.status, response.headers.get("Content-Type"), await response.text()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"target": "a', "EOF while parsing a string at line 1 column 13"),
        (b"{}", "missing field `target` at line 1 column 2"),
        (b'{"target": 7}', "invalid type: integer `7`, expected a string at line 1 column 12"),
        (
            b'{"target": "a", "fault_tolerance": 300}',
            "invalid value: integer `300`, expected u8 at line 1 column 38",
        ),
    ],
)
async def test_a_body_that_is_no_request_is_told_in_plain_text(start_rust: StartRust, body: bytes, why: str) -> None:
    """The words are those of warp and serde, as the existing daemon has them."""
    answer = await ask(start_rust().url, "POST", "/api/v1/bust", body)
    assert answer == (400, PLAIN, f"Request body deserialize error: {why}")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/api/v1/capabilities", "/api/v1/bust/batch", "/"])
async def test_a_route_that_it_does_not_have_is_empty(start_rust: StartRust, method: str, path: str) -> None:
    """A 404 without a body or a type, whatever the method."""
    assert await ask(start_rust().url, method, path) == (404, None, "")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/v1/bust"), ("PUT", "/api/v1/bust"), ("POST", "/api/v1/status")]
)
async def test_another_method_is_told_in_plain_text(start_rust: StartRust, method: str, path: str) -> None:
    """A 405 of warp's own."""
    assert await ask(start_rust().url, method, path) == (405, PLAIN, "HTTP method not allowed")


async def test_another_content_type_is_told_in_plain_text(start_rust: StartRust) -> None:
    """A 415 of warp's own."""
    answer = await ask(start_rust().url, "POST", "/api/v1/bust", b'{"target": "a"}', "text/plain")
    assert answer == (415, PLAIN, "The request's content-type is not supported")


async def test_it_takes_a_body_of_any_size(start_rust: StartRust) -> None:
    """There is no 413, and no check of the target: that is the client's to do."""
    body = io.BytesIO(b'{"target": "' + b"x" * 10_000_000 + b'"}')
    status, _, _ = await ask(start_rust().url, "POST", "/api/v1/bust", body)
    assert status == 200


async def test_what_it_refuses_is_quoted(start_rust: StartRust) -> None:
    """Its plain words stand in the fault; the client itself sends nothing like this."""
    sessions = SessionManager(pool=Pool())
    client = DaemonClient(DaemonAddress.parse(start_rust().url), sessions)
    request = bust_request("a", "direct", 6).model_copy(update={"fault_tolerance": 300})
    until = asyncio.get_running_loop().time() + PATIENCE
    with pytest.raises(AttemptFailed) as caught:
        await client.bust(request, until=until, deadline=until)
    await sessions.aclose()
    fault = caught.value.fault
    assert (fault.kind, fault.status, fault.applied) == (FaultKind.REJECTED, 400, "no")
    assert "(HTTP 400): Request body deserialize error: invalid value: integer `300`, expected u8" in fault.message


async def test_what_is_no_daemon_of_ours_is_told(start_rust: StartRust) -> None:
    """Below a path where nothing is, every route is an empty 404."""
    async with BustcallClient(start_rust().url + "/elsewhere", retry=ONCE) as client:
        with pytest.raises(BustFailed, match=r"this is not a bustcall daemon's route \(HTTP 404\)") as caught:
            await client.bust("a")
    assert caught.value.applied == "no"


async def test_a_history_of_50_mb_is_not_read(start_rust: StartRust) -> None:
    """Asking for the status says why it fails, in little memory; busts beside it and after it are acknowledged."""
    daemon = start_rust("--history", "500000")
    async with BustcallClient(daemon.url, retry=ONCE, timeout=PATIENCE) as client:
        await client.bust("before")
        tracemalloc.start()
        try:
            asking = asyncio.create_task(client.status())
            beside = [await client.bust(f"beside-{number}") for number in range(20)]
            with pytest.raises(ProtocolViolation, match="its answer is larger than 1048576 bytes"):
                await asking
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        after = await client.bust("after")
    assert peak < 8 * 1024 * 1024
    assert [result.status for result in beside] == ["busted"] * 20
    assert after.status == "busted"
    _, _, body = await ask(daemon.url, "GET", "/api/v1/status")
    assert len(body) > 50_000_000


async def test_a_web_page_in_place_of_an_answer_is_told_in_words(start_rust: StartRust) -> None:
    """A 502 of a proxy on the way: the error says that it is a page, and shows nothing of it."""
    daemon = start_rust("--html")
    assert (await ask(daemon.url, "POST", "/api/v1/bust", b'{"target": "a"}'))[:2] == (502, "text/html; charset=utf-8")
    async with BustcallClient(daemon.url, retry=ONCE) as client:
        with pytest.raises(DaemonsUnavailable, match="HTTP 502: an HTML page") as caught:
            await client.bust("a")
    assert "<" not in str(caught.value)
    assert "Bad Gateway" not in str(caught.value)
    assert caught.value.applied == "maybe"


async def test_a_stage_beyond_the_scale_is_no_stage(start_rust: StartRust) -> None:
    """The bust is acknowledged all the same; what the daemon reports of itself changes nothing."""
    async with BustcallClient(start_rust("--stage", "255").url) as client:
        result = await client.bust("a")
        status = await client.status()
    assert (result.status, result.stage, result.applied) == ("busted", 12, "yes")
    assert result.reported_stage is None
    assert status.fault_history[-1].fault_stage == 255


async def test_it_is_a_peer_as_any_other(start_rust: StartRust) -> None:
    """Its hub killed, a Rust peer does it; killed too, the call says so."""
    hub, peer = start_rust(), start_rust()
    async with BustcallClient(hub.url, peers=[peer.url], timeout=PATIENCE, retry=ONCE) as client:
        assert (await client.bust("a")).daemon == hub.url
        hub.kill()
        result = await client.bust("b")
        assert (result.daemon, result.stage) == (peer.url, 9)
        peer.kill()
        with pytest.raises(DaemonsUnavailable):
            await client.bust("c")


async def test_a_stopped_one_is_passed_by(start_rust: StartRust) -> None:
    """SIGSTOP: it accepts and never answers; continued, it answers again."""
    hub, peer = start_rust(), start_rust()
    hub.signal(signal.SIGSTOP)
    async with BustcallClient(hub.url, peers=[peer.url], retry=Retry(attempt_timeout=0.2), timeout=PATIENCE) as client:
        assert (await client.bust("a")).daemon == peer.url
    hub.signal(signal.SIGCONT)
    async with BustcallClient(hub.url, timeout=PATIENCE) as client:
        assert (await client.bust("a")).daemon == hub.url


def test_it_ends_when_it_is_asked_to(start_rust: StartRust) -> None:
    """On SIGTERM, also while it is stopped."""
    peer = start_rust()
    peer.signal(signal.SIGSTOP)
    assert peer.terminate() == -signal.SIGTERM
    assert peer.output() == f"listening on {peer.url}\n"


def test_it_listens_where_the_existing_daemon_does() -> None:
    """On port 8989 by default; when that is taken, it says so and ends."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # then somebody else has it
            taken.bind(("127.0.0.1", 8989))
            taken.listen()
        with pytest.raises(pytest.fail.Exception, match=r"with 1 before it listened:\ncannot listen on port 8989: "):
            start_peer([str(rust_binary())])


def test_a_peer_that_does_not_listen_is_ended() -> None:
    """The test that started it fails, and tells what it said; nothing is left running."""
    shell = require("sh", "every system has one")
    with pytest.raises(pytest.fail.Exception, match=r"did not listen within 0\.5 s:\n[0-9]+\n") as caught:
        start_peer([shell, "-c", "echo $$; exec sleep 60"], timeout=0.5)
    (pid,) = re.findall(r"^[0-9]+$", str(caught.value), re.MULTILINE)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_tool_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    """A user's machine passes the test by; in CI it fails."""
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no-such-tool is not installed: ask for it"):
        require("no-such-tool", "ask for it")


@pytest.mark.requirement("INT-04")
def test_it_reads_the_test_vectors() -> None:
    """Versions, ranges, requests, replies, errors and faults are to it what they are to pybustcall."""
    done = run("--check-vectors", str(VECTORS))
    assert (done.returncode, done.stderr) == (0, "")
    counts = {name: int(count) for name, count in re.findall(r"^(\S+): (\d+) checked$", done.stdout, re.MULTILINE)}
    assert counts.keys() == {path.name for path in VECTORS.glob("*.json")} - {"events.json"}  # it tells nobody
    assert min(counts.values()) > 50


@pytest.mark.requirement("INT-04")
@pytest.mark.parametrize(
    ("name", "old", "new", "mismatch"),
    [
        ("requests.json", 'fault_tolerance\\": 300', 'fault_tolerance\\": 30', "requests.json: "),
        ("requests.json", '"sha256:', '"sha256:0', "requests.json: "),
        ("ranges.json", '"matches": true', '"matches": false', "ranges.json: "),
        ("ranges.json", '"failed": []', '"failed": ["patch"]', "ranges.json: "),
        ("versions.json", '"1.0.0-rc.1", "1.0.0"', '"1.0.0", "1.0.0-rc.1"', "versions.json: "),
        ("versions.json", None, "{", "versions.json: "),
        ("replies.json", '"acknowledged"', '"malformed"', 'replies.json: "the whole reply of the first dialect": '),
        ("replies.json", '"malformed"', '"acknowledged"', 'replies.json: "a reply beyond 1 MiB": '),
        ("errors.json", '"rejected"', '"throttled"', 'errors.json: "a base daemon: malformed JSON": the kind is '),
        ("errors.json", '"stage": 4', '"stage": 5', 'errors.json: "a base daemon: malformed JSON": the stage is '),
        ("errors.json", '"applied": "maybe"', '"applied": "no"', 'errors.json: "ours: the body came too late": '),
        ("errors.json", '"next": true', '"next": false', 'errors.json: "a base daemon: no such route": '),
        ("errors.json", '"retry_after": 7', '"retry_after": 8', 'errors.json: "too much is asked": the wait is '),
        ("faults.json", '"band": "silent"', '"band": "warning"', "faults.json: Stage(9): the band is Silent, "),
        ("faults.json", '"stage": -1', '"stage": 1', 'faults.json: "below the scale": '),
        ("faults.json", '"result": 7', '"result": 6', "faults.json: (Stage(8), 1): the stage is Stage(7), "),
        ("faults.json", '"incident": false', '"incident": true', "faults.json: Slow: the row is "),
        ("faults.json", '"in_call": 8', '"in_call": 7', "faults.json: (Unreachable, 0): the stage in the call is "),
        ("faults.json", '[8, 3], "stage": 9', '[8, 3], "stage": 8', "faults.json: (Acknowledged, [Stage(8), Stage(3)"),
        ("faults.json", '"raises": true', '"raises": false', "faults.json: (Stage(0), Stage(0)): whether it raises "),
        ("faults.json", '"kind": null', '"kind": "slow"', "faults.json: 200: the kind is None, "),
        ("faults.json", '"band": "silent"', '"band": "loud"', "faults.json: unknown variant `loud`"),
    ],
)
def test_it_tells_a_vector_that_it_reads_otherwise(
    tmp_path: Path, name: str, old: str | None, new: str, mismatch: str
) -> None:
    """So that its agreement means something."""
    shutil.copytree(VECTORS, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(new if old is None else text.replace(old, new, 1))
    done = run("--check-vectors", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(mismatch)
    assert done.stderr.count("\n") == 1


def test_it_passes_its_own_tests() -> None:
    """Those of the crate, by cargo."""
    assert "test result: ok" in rust_tests()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run([rust_binary(), *arguments], capture_output=True, text=True, check=False, timeout=PATIENCE)
