"""Daemons and clients in Node.js and Lua: the same protocol, spoken by programs that share no line with pybustcall."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
from multidict import CIMultiDict

from pybustcall import BustcallClient, BustRejected
from pybustcall.capabilities import digest_of
from pybustcall.models import CapabilityDocument, Problem, StatusReply, cache_key_of
from pybustcall.testing import CHECKS, Answer, FakeDaemon, check_daemon
from tests.conftest import PATIENCE, StartDaemon, wait_until
from tests.interop import PeerProcess, start_peer
from tests.interop.node_lua import CLIENTS, PEERS, start_lua_peer, start_node_peer

pytestmark = [pytest.mark.requirement("INT-02"), pytest.mark.requirement("INT-04")]

VECTORS = Path(__file__).with_name("vectors")
STARTERS: dict[str, Callable[[], PeerProcess]] = {
    "node": partial(start_node_peer, "--heartbeat", "0.2"),
    "lua": start_lua_peer,
}
FILES = {"node": {path.name for path in VECTORS.glob("*.json")}}
FILES["lua"] = FILES["node"] - {"events.json"}
NEEDS = {check.name: check.needs for check in CHECKS}
BASE = {"cache.bust", "daemon.status", "daemon.capabilities"}
BUST = {"Content-Type": "application/json"}

StartPeer = Callable[..., PeerProcess]


@pytest.fixture(params=["node", "lua"])
def language(request: pytest.FixtureRequest) -> str:
    """Name each language in turn."""
    return str(request.param)


@pytest.fixture
def peer(language: str) -> Iterator[PeerProcess]:
    """Start the daemon of each language in turn."""
    with STARTERS[language]() as started:
        yield started


@pytest.fixture
def lua_peer() -> Iterator[PeerProcess]:
    """Start the Lua daemon."""
    with start_lua_peer() as started:
        yield started


async def ask(url: str, path: str, method: str = "GET", **options: Any) -> tuple[int, dict[str, str], bytes]:
    """Send one request; tell the status, the headers and the body of the answer."""
    async with aiohttp.ClientSession() as session, session.request(method, url + path, **options) as response:
        return response.status, {name.lower(): value for name, value in response.headers.items()}, await response.read()


# The daemons


async def test_a_peer_passes_the_conformance_suite(peer: PeerProcess, language: str) -> None:
    """Both do what every daemon must; the one that answers with problems does what is asked of ours, too."""
    verdicts = await check_daemon(peer.url, strict=language == "node")
    told = [verdict for verdict in verdicts if "events.stream" in NEEDS[verdict.name]]
    assert {verdict.outcome for verdict in told if NEEDS[verdict.name] == ("events.stream",)} == {
        {"node": "passed", "lua": "skipped"}[language]
    }
    assert {verdict.name: verdict.detail for verdict in verdicts if not verdict.ok} == {}
    assert len(verdicts) > 10


def test_a_peer_reads_every_vector_as_pybustcall_does(language: str) -> None:
    """Versions, ranges, swaps, requests, replies, errors, faults and, if it has them, events, by its own code."""
    ran = subprocess.run(
        [*PEERS[language](), "--check-vectors", str(VECTORS)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout + ran.stderr
    counts = dict(re.findall(r"^(\w+\.json): (\d+) checked, 0 wrong$", ran.stdout, re.MULTILINE))
    assert counts.keys() == FILES[language]
    assert all(int(count) > 50 for count in counts.values())


def test_a_peer_tells_which_vector_it_reads_otherwise(language: str, tmp_path: Path) -> None:
    """It exits with 1 and names the file and the entry, so that the check can be believed."""
    for path in VECTORS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    wrong = (tmp_path / "replies.json").read_text("utf-8").replace('"reads": "malformed"', '"reads": "acknowledged"', 1)
    (tmp_path / "replies.json").write_text(wrong, "utf-8")
    ran = subprocess.run(
        [*PEERS[language](), "--check-vectors", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert re.search(r"^replies\.json: a reply beyond 1 MiB: found .*malformed.*acknowledged", ran.stdout, re.MULTILINE)
    assert re.search(r"^replies\.json: \d+ checked, 1 wrong$", ran.stdout, re.MULTILINE)


async def test_a_peer_acknowledges_busts_of_the_client(peer: PeerProcess, language: str) -> None:
    """In its own dialect, many at a time over few connections; its status tells how many it did."""
    async with BustcallClient(peer.url) as client:
        result = await client.bust("products/naïve 7.html", strategy="direct", fault_tolerance=3)
        report = await client.bust_many((f"page/{number}" for number in range(300)), concurrency=50)
        with pytest.raises(BustRejected, match="strategy must be"):
            await client.bust("a", strategy="diagonal")
        status = await client.status()
        capabilities = await client.capabilities()
    assert (result.status, result.stage, result.daemon) == ("busted", 12, peer.url)
    assert result.cache_key == cache_key_of("products/naïve 7.html")
    assert (report.busted, report.failed) == (300, 0)
    assert (status.daemon_pid, status.bindings[language].status) == (peer.pid, "active")
    assert [record.fault_stage for record in status.fault_history] == [4]
    assert capabilities.names == BASE | {"node": {"events.stream"}, "lua": set[str]()}[language]
    _, _, body = await ask(peer.url, "/api/v1/status")
    assert json.loads(body)["busts_applied"] == 301


async def test_the_two_dialects_are_spoken(peer: PeerProcess, language: str) -> None:
    """Node.js answers `status: "success"`, Lua `success: true`."""
    status, _, body = await ask(peer.url, "/api/v1/bust", "POST", data=b'{"target": "a"}', headers=BUST)
    said = {name: value for name, value in json.loads(body).items() if name in {"status", "success"}}
    assert (status, said) == (200, {"node": {"status": "success"}, "lua": {"success": True}}[language])


async def test_a_question_for_the_head_alone_has_no_body(peer: PeerProcess) -> None:
    """Where GET is answered, and where nothing is; the connection is kept."""
    with connect(peer) as connection:
        for path, status in (("status", b"200"), ("bust", b"405")):
            connection.sendall(f"HEAD /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 %s " % status)
            assert answer.endswith(b"\r\n\r\n")
            assert re.search(rb"\r\nContent-Length: [1-9]", answer)


async def test_every_answer_carries_the_digest_of_the_document(peer: PeerProcess) -> None:
    """Refusals too, so that a client learns from any answer that the document has changed."""
    _, _, document = await ask(peer.url, "/api/v1/capabilities")
    answers = [
        await ask(peer.url, "/api/v1/bust", "POST", data=body, headers=BUST) for body in (b'{"target": "a"}', b"{}")
    ]
    assert [status for status, _, _ in answers] == [200, 422]
    assert {headers["bustcall-capabilities"] for _, headers, _ in answers} == {digest_of(document)}


async def test_a_peer_tells_its_capabilities_once(peer: PeerProcess, language: str) -> None:
    """A document, with its digest as a strong ETag; who knows it already gets a 304 without a body."""
    status, headers, body = await ask(peer.url, "/api/v1/capabilities")
    document = CapabilityDocument.model_validate_json(body)
    assert (status, document.binding, document.limits.max_target_bytes) == (200, language, 8192)
    assert document.endpoints.keys() == set(document.capabilities) == document.access.keys()
    tag = f'"{digest_of(body)}"'
    assert headers["etag"] == tag
    for known in (tag, f'"another", {tag}', f"W/{tag}", "*"):
        status, headers, body = await ask(peer.url, "/api/v1/capabilities", headers={"If-None-Match": known})
        assert (status, headers["etag"], body) == (304, tag, b"")
    assert (await ask(peer.url, "/api/v1/capabilities", headers={"If-None-Match": '"another"'}))[0] == 200


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers"),
    [
        (400, "POST", "/api/v1/bust", b"{", BUST),
        (403, "GET", "/api/v1/status", None, {"Origin": "https://shop.example"}),
        (404, "GET", "/api/v1/busts", None, {}),
        (405, "GET", "/api/v1/bust", None, {}),
        (413, "POST", "/api/v1/bust", b'{"target": "' + b"x" * 70_000 + b'"}', BUST),
        (415, "POST", "/api/v1/bust", b'{"target": "a"}', {"Content-Type": "text/plain"}),
        (421, "GET", "/api/v1/status", None, {"Host": "shop.example"}),
        (422, "POST", "/api/v1/bust", b'{"target": ""}', BUST),
    ],
)
async def test_a_peer_refuses_in_its_own_words(
    peer: PeerProcess,
    language: str,
    status: int,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
) -> None:
    """Node.js says an RFC 9457 problem, Lua a line of plain text; a 405 names the method that is taken."""
    told, answered, said = await ask(peer.url, path, method, data=body, headers=headers)
    assert told == status
    if language == "node":
        assert answered["content-type"] == "application/problem+json"
        assert Problem.model_validate_json(said).status == status
    else:
        assert answered["content-type"] == "text/plain; charset=utf-8"
        assert re.fullmatch(rb"[ -~]+\n", said)
    assert answered.get("allow") == ("POST" if status == 405 else None)


async def _note(seen: list[object], what: object) -> None:
    seen.append(what)


async def test_a_peer_keeps_a_bounded_history(peer: PeerProcess) -> None:
    """The newest 64 refusals, each on the one connection, which is kept."""
    made: list[object] = []
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(lambda *parameters: _note(made, parameters))
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
        for number in range(70):
            refused = json.dumps({"target": "", "binding": f"b{number}"})
            async with session.post(f"{peer.url}/api/v1/bust", data=refused, headers=BUST) as response:
                assert response.status == 422
                await response.read()
    assert len(made) == 1
    _, _, body = await ask(peer.url, "/api/v1/status")
    history = StatusReply.model_validate_json(body).fault_history
    assert [record.binding for record in history] == [f"b{number}" for number in range(6, 70)]


def test_a_peer_ends_when_it_is_asked_to(peer: PeerProcess, language: str) -> None:
    """Node.js with 0 and Lua by the signal; nothing but the line that it listens was printed."""
    code = peer.terminate()
    assert code == {"node": 0, "lua": -15}[language]
    assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", peer.output())


# One thread for everybody: what others do to the Lua daemon


def connect(peer: PeerProcess) -> socket.socket:
    """Make a bare connection to a peer."""
    return socket.create_connection(("127.0.0.1", int(peer.url.rpartition(":")[2])), timeout=PATIENCE)


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side hangs up."""
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def send_for_ever(connection: socket.socket, data: bytes) -> NoReturn:
    """Send until that is no longer possible."""
    while True:
        connection.send(data)


def request(body: bytes = b'{"target": "a"}', more: str = "") -> bytes:
    """Write a bust as bytes."""
    head = f"POST /api/v1/bust HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def test_slow_and_silent_connections_keep_nobody_waiting(lua_peer: PeerProcess) -> None:
    """With 100 that send nothing, half a head or half a body, busts of others are acknowledged as ever."""
    beginnings = [b"", b"POST /api/v1/bu", request()[:-5], b"\r"]
    idle = [connect(lua_peer) for _ in range(100)]
    for number, connection in enumerate(idle):
        connection.sendall(beginnings[number % len(beginnings)])
    async with BustcallClient(lua_peer.url, retry=None) as client:
        report = await client.bust_many((f"page/{number}" for number in range(100)), concurrency=20)
    assert (report.busted, report.failed) == (100, 0)
    for connection in idle:
        connection.close()


def test_who_is_too_slow_is_refused_and_left() -> None:
    """Bytes that trickle in extend no patience: a 408, and the connection ends; who was silent gets no answer."""
    with start_lua_peer("--patience", "0.5") as hasty, connect(hasty) as trickling, connect(hasty) as silent:
        sent = 0
        answer = b""
        while not answer:
            trickling.sendall(request()[sent : sent + 1])
            sent += 1
            assert sent < 100
            trickling.settimeout(0.1)
            try:
                answer = trickling.recv(65536)
            except TimeoutError:
                continue
        trickling.settimeout(PATIENCE)
        assert (answer + read_all(trickling)).startswith(b"HTTP/1.1 408 ")
        assert read_all(silent) == b""


def test_who_does_not_read_is_left_and_keeps_nobody_waiting() -> None:
    """Answers that nobody takes fill the way back; others are served, and in the end the connection is cut."""
    questions = b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    with start_lua_peer("--patience", "1") as hasty, connect(hasty) as deaf:
        deaf.settimeout(0.2)
        with suppress(TimeoutError):
            send_for_ever(deaf, questions)
        with connect(hasty) as connection:
            connection.sendall(request(more="Connection: close\r\n"))
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        deaf.settimeout(PATIENCE)
        with pytest.raises(ConnectionError):
            send_for_ever(deaf, questions)


def test_a_request_may_come_byte_by_byte(lua_peer: PeerProcess) -> None:
    """Where one part ends and the next begins changes nothing."""
    with connect(lua_peer) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request(b'{"target": "caf\xc3\xa9"}', "Connection: close\r\n"):
            connection.sendall(bytes([byte]))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["cache_key"] == cache_key_of("café")


def test_requests_that_come_at_once_are_answered_in_turn(lua_peer: PeerProcess) -> None:
    """Also of somebody who has nothing more to say, and after one that is refused."""
    with connect(lua_peer) as connection:
        connection.sendall(request() + request(b'{"target": ""}') + request(b'{"target": "b"}'))
        connection.shutdown(socket.SHUT_WR)
        answers = read_all(connection)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answers) == [b"200", b"422", b"200"]


def test_a_body_is_asked_for_before_it_comes(lua_peer: PeerProcess) -> None:
    """With Expect: 100-continue."""
    head, _, body = request(more="Expect: 100-continue\r\nConnection: close\r\n").partition(b"\r\n\r\n")
    with connect(lua_peer) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"\n\r\n\r\n", b"400"),
        (b"A\n\r\n\r\n", b"400"),
        (b"\r\r\n\r\n", b"400"),
        (b"GET /api/v1/status\r\n\r\n", b"400"),
        (b"GET /api/v1/status HTTP/2.0\r\n\r\n", b"400"),
        (b"GET /api/v1/status HTTP/1.1\r\nHost localhost\r\n\r\n", b"400"),
        (b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", b"400"),
        (b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"400"),
        (request(more="Content-Length: 3\r\n"), b"400"),
        (request().replace(b"Length: 15", b"Length: -1"), b"400"),
        (request().replace(b"Length: 15", b"Length: 99999999999999999999"), b"413"),
        (request().replace(b"Length: 15", b"Length: 65537"), b"413"),
        (request(more="Transfer-Encoding: chunked\r\n"), b"411"),
        (b"GET /" + b"x" * 20_000, b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_not_http_is_refused_and_left(lua_peer: PeerProcess, sent: bytes, status: bytes) -> None:
    """One answer, and the connection ends; the daemon goes on."""
    with connect(lua_peer) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert re.findall(rb"^HTTP/1\.1 (\d+) ", answer) == [status]
    assert b"\r\nConnection: close\r\n" in answer
    with connect(lua_peer) as connection:
        connection.sendall(request(more="Connection: close\r\n"))
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("function", "sent"),
    [("gsub", b"GET /planted HTTP/1.1\r\n\r\n"), ("find", b"GET /planted")],
)
def test_an_error_ends_the_connection_that_it_is_about_and_no_other(function: str, sent: bytes) -> None:
    """Wherever it is made, here planted where the head is read; it is told, and the daemon goes on."""
    plant = f"""
        local real = string.{function}
        string.{function} = function(text, ...)
          if text:match "planted" then error "as planted" end
          return real(text, ...)
        end
    """
    interpreter, script = PEERS["lua"]()
    with start_peer([interpreter, "-e", plant, script, "--port", "0"]) as broken, connect(broken) as other:
        whole = request(more="Connection: close\r\n")
        other.sendall(whole[:-5])
        for _ in range(2):
            with connect(broken) as connection:
                connection.sendall(sent)
                assert read_all(connection) == b""
        other.sendall(whole[-5:])
        assert read_all(other).startswith(b"HTTP/1.1 200 ")
        told = re.findall(r"^a connection was closed after an error: .*as planted$", broken.output(), re.MULTILINE)
        assert len(told) == 2


def test_more_connections_than_it_serves_are_closed(lua_peer: PeerProcess) -> None:
    """Beyond 256 at once; those that it has are served, and when they are gone it takes others again."""
    last = request(more="Connection: close\r\n")
    kept = [connect(lua_peer) for _ in range(256)]
    with connect(lua_peer) as beyond:
        assert read_all(beyond) == b""
    for connection in kept:
        connection.sendall(last)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
        connection.close()

    def is_served() -> bool:
        with connect(lua_peer) as connection, suppress(ConnectionError):
            connection.sendall(last)
            return read_all(connection).startswith(b"HTTP/1.1 200 ")
        return False

    wait_until(is_served, "a connection is served again")


# The clients in the documentation


async def run_client(language: str, url: str, *targets: str, token: str | None = None) -> tuple[int, list[str]]:
    """Run the documentation's client of a language; tell its exit code and its lines."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("BUSTCALL_")}
    env |= {"BUSTCALL_URL": url, "NO_PROXY": "*"} | ({} if token is None else {"BUSTCALL_TOKEN": token})
    process = await asyncio.create_subprocess_exec(
        *CLIENTS[language](), *targets, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, warned = await asyncio.wait_for(process.communicate(), PATIENCE)
    sys.stderr.write(warned.decode())  # Node.js 18 finds its own fetch experimental
    assert process.returncode is not None
    return process.returncode, said.decode().splitlines()


async def test_a_client_busts_at_the_reference_daemon(language: str, start_daemon: StartDaemon) -> None:
    """A line for each target; the cached files are gone."""
    daemon = start_daemon()
    for name in ("a.html", "naïve.css", "kept.html"):
        (daemon.root / name).write_text("old")
    code, lines = await run_client(language, daemon.url, "a.html", "naïve.css")
    assert (code, lines) == (0, ["busted a.html", "busted naïve.css"])
    assert [path.name for path in daemon.root.iterdir()] == ["kept.html"]


async def test_a_client_sends_its_token(language: str, start_daemon: StartDaemon) -> None:
    """With the right one it is let in; with a wrong one or none it says so and fails."""
    daemon = start_daemon(env={"BUSTCALL_TOKEN": "s3cret"})
    assert await run_client(language, daemon.url, "a", token="s3cret") == (0, ["busted a"])
    for token in ("wrong", None):
        code, lines = await run_client(language, daemon.url, "a", token=token)
        assert code == 1
        assert re.match(r"failed a: HTTP 401: .*this daemon wants its token", lines[0])


async def test_a_client_tells_a_refusal_and_goes_on(language: str, start_daemon: StartDaemon) -> None:
    """The targets after it are busted; the exit code says that one failed."""
    code, lines = await run_client(language, start_daemon().url + "/", "../secret", "b")
    assert code == 1
    assert re.match(r"failed \.\./secret: HTTP 422: .*target", lines[0])
    assert lines[1:] == ["busted b"]


async def test_a_client_tries_once_more_with_the_same_key(language: str) -> None:
    """A connection that breaks before the answer costs nothing; the repeat is recognised, and applied once."""
    plan = [Answer(reset=True, applies=True)]
    async with FakeDaemon(plan, capabilities=["cache.bust.idempotent"]) as fake:
        assert await run_client(language, fake.url, "a", "b") == (0, ["busted a", "busted b"])
        keys = [CIMultiDict(headers)["Idempotency-Key"] for headers in fake.headers]
        assert [bust.target for bust in fake.applied] == ["a", "b"]
    assert keys[0] == keys[1] != keys[2]
    assert all(len(key) >= 32 for key in keys)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer.for_another(), "its answer is for another target"),
        (Answer.page(), "its answer does not say that it succeeded"),
        (Answer.redirect("http://127.0.0.1:1/"), "HTTP 307"),
        (Answer.problem(503, "stopping"), "HTTP 503: .*stopping"),
    ],
)
async def test_a_client_believes_no_wrong_answer(language: str, answer: Answer, why: str) -> None:
    """It is asked once, and the client fails."""
    async with FakeDaemon([answer]) as fake:
        code, lines = await run_client(language, fake.url, "a")
        assert len(fake.requests) == 1
    assert code == 1
    assert re.match(f"failed a: {why}", lines[0]), lines


async def test_a_client_fails_where_nobody_listens(language: str) -> None:
    """After the second try, with a line that says so."""
    code, lines = await run_client(language, "http://127.0.0.1:1", "a")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("failed a: ")


@pytest.mark.parametrize("server", ["node", "lua"])
async def test_every_client_busts_at_every_peer(language: str, server: str) -> None:
    """Neither side of such a call is pybustcall."""
    with STARTERS[server]() as started:
        assert await run_client(language, started.url, "a", "käse/日本語") == (0, ["busted a", "busted käse/日本語"])
